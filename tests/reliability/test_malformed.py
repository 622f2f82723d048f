"""Malformed input of every kind: the process lives, each bad connection is told so once and goes, nothing is left.

20,000 inputs: half go over real sockets to a served app, half to the parsers that stand first. `REL_N` is another
number of them, `REL_SEED` another seed. The engine serves on this test's own loop, so what is left behind of a
connection can be counted: tasks, sockets, sessions, subscriptions, memory.

All along a canary, an honest client, calls functions; each of its calls must succeed.
"""

import asyncio
import ctypes
import gc
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from engine.auth.admin import parse_authorization
from engine.auth.fetching import FETCH_SIZE_BYTES_MAX
from engine.auth.jwks import parse_key_set
from engine.auth.tokens import TokenVerifier
from engine.clock import SystemClock
from engine.errors import AuthenticationFailed, InvalidArgument, InvalidCursor
from engine.functions.pages import CursorSeal
from engine.live.view import View
from engine.server import frames
from engine.server.connection import Connection
from engine.server.frames import BrokenRule, FrameReader
from engine.server.websocket import WebSocketDoor
from engine.sync import protocol
from engine.sync.session import Session
from engine.testing import ManualClock
from tests.auth.issuers import provider
from tests.functions.apps import UNHURRIED
from tests.reliability.malformed import CLOSE, MESSAGE_SIZE_MAX, Attack, Maker
from tests.reliability.malformed_answers import Fault, attack_http, attack_socket
from tests.server.real import RealServer, serve_app
from tests.sync.fakes import add, connect, mutation, query_set

COUNT = int(os.environ.get("REL_N", 20_000))
SEED = int(os.environ.get("REL_SEED", 20_261))

SECONDS_MAX = 10  # what takes longer hangs
SLOW_COUNT_MAX = 2  # that a busy machine makes slow; what an input makes slow comes again
GONE_SECONDS_MAX = 1.0  # of this process's time, as others use the machine too
INPUT_SECONDS_MAX = 0.05  # of the loop, for one read of a socket
GROWTH_BYTES_MAX = 5 << 20
GROWTH_OBJECTS_MAX = 20_000
AT_ONCE = 8

FUNCTIONS = """
@query
async def by_key(ctx, key: str) -> list[Item]: return await ctx.db.query(Item.by_key, key=key).take(10)
@query
async def page(ctx, key: str, pagination_opts: PaginationOptions) -> Page[Item]:
    return await ctx.db.query(Item.by_key, key=key).paginate(pagination_opts)
@query
async def any(ctx, value: Any) -> None: pass
@query(internal=True)
async def secret(ctx) -> None: pass
@query
async def count(ctx) -> int: return await ctx.db.query(Item.by_key, key="canary").count()
@mutation
async def add(ctx, key: str) -> None:
    if await ctx.db.query(Item.by_key, key=key).first() is None: await ctx.db.insert(Item(key=key))
@mutation
async def chirp(ctx) -> None: await ctx.db.insert(Item(key="canary"))
@action
async def act(ctx) -> int: return 1
@http.get("/items/{key}")
async def item(ctx, key: str) -> str: return key
@http.post("/items/{key}")
async def set_item(ctx, key: str, body: dict[str, int]) -> str: return key
"""

# Caches that are full soon: what grows after that is not one of them.
LIMITS = msgspec.structs.replace(
    UNHURRIED,
    result_cache_count_max=50,
    ledger_session_count_max=50,
    kept_document_count_max=50,
    message_size_bytes_max=MESSAGE_SIZE_MAX,
)

# -- the served app, its canary, and what it must not leave behind


class Watch:
    """What is seen of a server while it is attacked."""

    def __init__(self, real: RealServer) -> None:
        self.port = int(real.server.address.rpartition(":")[2])
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.canary_calls = 0
        self.slowest_seconds, self.slowest_input = 0.0, b""
        self.slow_count = 0  # reads past what one may take
        self.task_count_max = 0

    async def one(self, kind: str, data: bytes, work: Callable[[], Any]) -> None:
        try:
            async with asyncio.timeout(SECONDS_MAX):
                outcome = await work()
        except (Fault, TimeoutError, ConnectionError, ValueError, asyncio.IncompleteReadError) as error:
            self.faults.append(f"{kind}: {error!r} for {data[:300]!r}")
            outcome = "fault"
        self.outcomes[f"{kind}: {outcome}"] += 1


def counts() -> Counter[str]:
    """What is alive of connections."""
    gc.collect()
    kinds = Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, Connection | Session | View))
    kinds["tasks"] = len(asyncio.all_tasks())
    kinds["sockets"] = sum(map(is_socket, Path("/proc/self/fd").iterdir()))
    return kinds


def is_socket(descriptor: Path) -> bool:
    try:
        return os.readlink(descriptor).startswith("socket:")
    except FileNotFoundError:  # that of the listing itself
        return False


def resident_bytes() -> int:
    """What is in use: the allocator gives back first what it only keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def settled(baseline: Counter[str]) -> Counter[str]:
    """What is left once the loop has had a second of work to let go."""
    start, end = time.process_time(), asyncio.get_running_loop().time() + SECONDS_MAX
    while counts() - baseline and time.process_time() - start < GONE_SECONDS_MAX:
        await asyncio.sleep(0.05)
        if asyncio.get_running_loop().time() > end:
            break
    left = counts() - baseline
    if left:
        print(*asyncio.all_tasks(), sep="\n")
    return left


@contextmanager
def measured(watch: Watch) -> Iterator[None]:
    """Watch how long each read of a socket holds the loop."""
    real = Connection.data_received

    def data_received(self: Connection, data: bytes) -> None:
        start = time.thread_time()
        real(self, data)
        seconds = time.thread_time() - start
        watch.slow_count += seconds > INPUT_SECONDS_MAX
        if seconds > watch.slowest_seconds:
            watch.slowest_seconds, watch.slowest_input = seconds, data[:300]

    Connection.data_received = data_received  # type: ignore[method-assign]
    try:
        yield
    finally:
        Connection.data_received = real  # type: ignore[method-assign]


@asynccontextmanager
async def canary(real: RealServer, watch: Watch) -> AsyncIterator[None]:
    """An honest client: it watches a count, and adds to it."""

    async def live() -> None:
        async with real.server.connected() as socket:
            await socket.say(connect(), query_set(0, add(0, "m:count")))
            count = (await socket.hear())["modifications"][0]["value"]
            for request_id in range(1 << 30):
                await socket.say(mutation(request_id, "m:chirp"))
                seen: set[str] = set()
                async with asyncio.timeout(SECONDS_MAX):
                    while seen != {"MutationResponse", "Transition"}:
                        heard = await socket.hear()
                        if heard["type"] == "MutationResponse":
                            assert heard["success"], heard
                        elif heard["type"] == "Transition":
                            (news,) = heard["modifications"]
                            assert news["value"] == count + 1, "each of its own writes, once"
                            count = news["value"]
                        seen.add(heard["type"])
                    seen.discard("Ping")
                status, answer = await real.server.post("/api/query", {"path": "m:count", "args": {}})
                assert (status, answer["value"]) == (200, count)
                watch.canary_calls += 2
                await asyncio.sleep(0.01)

    living = asyncio.ensure_future(live())
    try:
        yield
        if living.done():
            living.result()
    finally:
        living.cancel()
        with suppress(asyncio.CancelledError):
            await living


async def assault(watch: Watch, makers: list[Maker], count: int) -> None:
    """So many inputs, some at once: those of each maker one after another."""

    async def some(maker: Maker, share: int) -> None:
        for _ in range(share):
            if maker.random.random() < 0.75:
                attack = maker.attack()
                await watch.one("socket", attack.data, lambda attack=attack: attack_socket(watch.port, attack))
            else:
                request = maker.request()
                await watch.one("http", request, lambda request=request: attack_http(watch.port, request))

    async with asyncio.TaskGroup() as group:
        for number, maker in enumerate(makers):
            group.create_task(some(maker, count // len(makers) + (number < count % len(makers))))


async def attacked(directory: Path, count: int, caplog: pytest.LogCaptureFixture, *, seed: int) -> list[str]:
    """Everything that went wrong; and, printed, what came of the inputs."""
    complaints: list[str] = []
    caplog.set_level(logging.WARNING)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(f"the loop was told: {context}"))
    clock = cast(ManualClock, SystemClock())  # timers of real connections pass by themselves
    async with serve_app(directory, FUNCTIONS, mode="production", clock=clock, limits=LIMITS) as real:
        token = real.token("alice")["Authorization"].removeprefix("Bearer ")
        watch, makers = Watch(real), [Maker(f"{seed}-{number}", token) for number in range(AT_ONCE)]
        await assault(watch, makers, min(200, count // 4))  # what is made once, is made
        gc.freeze()  # as a serving process does: a collection would count for the input that it comes upon
        baseline = await stable_counts()
        async with canary(real, watch):
            with measured(watch):
                await assault(watch, makers, count // 2)
                half_bytes, half_blocks = resident_bytes(), sys.getallocatedblocks()
                await assault(watch, makers, count - count // 2)
                growth_bytes, growth_blocks = resident_bytes() - half_bytes, sys.getallocatedblocks() - half_blocks
        await real.server.session.close()
        left = await settled(baseline)
        gc.unfreeze()
    print(f"REL_SEED={seed}", dict(sorted(watch.outcomes.items())), f"{watch.canary_calls} calls of the canary")
    print(
        f"slowest read: {watch.slowest_seconds * 1e3:.1f} ms; growth in the second half: "
        f"{growth_bytes >> 10} KiB, {growth_blocks:,} objects"
    )
    complaints += watch.faults
    if left:
        complaints.append(f"left behind: {left}")
    if growth_bytes > GROWTH_BYTES_MAX:
        complaints.append(f"grew by {growth_bytes:,} bytes")
    if growth_blocks > GROWTH_OBJECTS_MAX:
        complaints.append(f"grew by {growth_blocks:,} objects")
    if watch.slow_count > SLOW_COUNT_MAX:
        complaints.append(f"{watch.slowest_seconds:.3f} s of the loop for {watch.slowest_input!r}")
    if not watch.canary_calls:
        complaints.append("the canary never sang")
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    # whoever says so may be right: an operator is to know
    complaints += [f"logged: {error}" for error in errors if "this database lost commits" not in error]
    print(*(complaint[:1_000] for complaint in complaints), sep="\n")
    return complaints


async def stable_counts() -> Counter[str]:
    """What is alive once nothing goes away any more."""
    before = counts()
    for _ in range(10):
        await asyncio.sleep(0.05)
        after = counts()
        if after == before:
            break
        before = after
    return before


@pytest.fixture(autouse=True)
def small_page_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's caches, too, are full soon."""
    monkeypatch.setattr("engine.storage.connections._CACHE_SIZE_KIB", 256)


@pytest.mark.slow
async def test_malformed_input_over_sockets_harms_nobody_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    complaints = await attacked(tmp_path, COUNT // 2, caplog, seed=SEED)
    assert not complaints, f"REL_SEED={SEED}: {len(complaints)}, printed above"


# -- texts, for each parser that a stranger reaches first


def parsers(good_cursor: str) -> dict[str, tuple[Callable[[Maker], Any], Callable[[Any], object], tuple[type, ...]]]:
    """What makes an input, what reads it, and what it may raise."""
    seal = CursorSeal(b"secret", b"query")
    verifier = TokenVerifier([provider()], ManualClock())

    def verify(text: str) -> None:
        coroutine = verifier.verify(text)
        with suppress(StopIteration):
            coroutine.send(None)
            raise AssertionError("it waits for something")

    def read_frames(attack: Attack) -> None:
        for message in FrameReader(1 << 20, inflates=attack.is_deflated).read(attack.data):
            if not isinstance(message, str) and message[0] == CLOSE:
                frames.close_code(message[1])

    def parse_header(text: str) -> None:
        parse_authorization(text)

    return {
        "messages": (Maker.json_text, protocol.decode_message, (InvalidArgument,)),
        "tokens": (Maker.token, verify, (AuthenticationFailed,)),
        "headers": (
            lambda maker: maker.random.choice(["Bearer ", "Convex ", "Convex x|", ""]) + maker.token(),
            parse_header,
            (AuthenticationFailed,),
        ),
        "cursors": (lambda maker: maker.cursor(good_cursor), seal.open, (InvalidCursor,)),
        "timestamps": (lambda maker: maker.cursor("AAAAAAAAAAA="), protocol.decode_timestamp, (InvalidArgument,)),
        "key sets": (lambda maker: maker.json_text()[:FETCH_SIZE_BYTES_MAX], parse_key_set, (ValueError,)),
        "frames": (Maker.attack, read_frames, (BrokenRule,)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", parsers("AAAA"))
def test_a_parser_raises_nothing_but_its_own_error_and_is_quick(name: str) -> None:
    seal = CursorSeal(b"secret", b"query")
    make, read, allowed = parsers(seal.seal((2, "a key", 1, 7)))[name]
    maker = Maker(f"{SEED}-{name}", "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1wbGUvIn0.c2ln")
    refused_count, count = 0, max(50, COUNT // 2 // len(parsers("")))
    gc.freeze()
    for number in range(count):
        text = make(maker)
        start = time.thread_time()
        try:
            read(text)
        except allowed:
            refused_count += 1
        except Exception as error:
            raise AssertionError(f"REL_SEED={SEED}, input {number}: {error!r} for {str(text)[:500]}") from error
        seconds = time.thread_time() - start
        assert seconds < INPUT_SECONDS_MAX, f"REL_SEED={SEED}, input {number}: {seconds:.3f} s for {str(text)[:500]}"
    gc.unfreeze()
    assert refused_count > count // 20, "they are malformed"


# -- controls: each way to break the engine is found out with few inputs


def _a_reader_that_lets_an_error_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "decode_message", protocol._decoder.decode)


def _an_http_door_that_lets_an_error_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.server.http._decode", lambda body, kind: msgspec.json.decode(body, type=kind))


def _a_door_that_keeps_who_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Connection] = []
    real = WebSocketDoor.gone

    def gone(self: WebSocketDoor, connection: Connection) -> None:
        kept.append(connection)
        real(self, connection)

    monkeypatch.setattr(WebSocketDoor, "gone", gone)


def _a_session_that_says_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session._fail

    def fail(self: Session, error: str) -> None:
        self.outbox.append(protocol.fatal_error(error))
        real(self, error)

    monkeypatch.setattr(Session, "_fail", fail)


def _a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    real = protocol.decode_message

    def decode(text: str | bytes) -> protocol.Message:
        end = time.thread_time() + 2 * INPUT_SECONDS_MAX
        while len(text) > 9_000 and time.thread_time() < end:
            pass
        return real(text)

    monkeypatch.setattr(protocol, "decode_message", decode)


BROKEN = {
    "an error of a message gets out": (_a_reader_that_lets_an_error_out, "1011"),
    "an error of a body gets out": (_an_http_door_that_lets_an_error_out, "status 500"),
    "who is gone is kept": (_a_door_that_keeps_who_is_gone, "left behind"),
    "the end is told twice": (_a_session_that_says_it_twice, "something after the end"),
    "a reader is slow": (_a_slow_reader, "s of the loop"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("break_it", "complaint"), BROKEN.values(), ids=BROKEN.keys())
async def test_an_engine_that_is_broken_is_found_out(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
    complaint: str,
) -> None:
    break_it(monkeypatch)
    assert any(complaint in each for each in await attacked(tmp_path, 240, caplog, seed=20_261))
