"""`engine profile`: what a loop is at is noted under its stage and its function, and nothing is done while nobody asks.

Interrupts are raised by hand where a test says what they meet; the timer is then set far away.
"""

import asyncio
import ctypes
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from types import CodeType

import pytest
import uvloop

from engine.auth.admin import digest_of
from engine.clock import SystemClock
from engine.errors import Overloaded
from engine.limits import Limits
from engine.live.invalidation import InvalidationIndex
from engine.observe import profile
from engine.observe.profile import Profile, profile_text, recording, stacks_of
from engine.observe.stages import _STAGE_BY_PLACE, DISK, IDLE, OTHER, STAGES, _place_of, _stage_of, stage_of
from engine.storage.connections import Connection, Database
from engine.sync import protocol
from engine.sync.session import Session
from tests.functions.apps import open_app
from tests.server.real import serve_app
from tests.small_engine import Subscriber

ENGINE = Path(profile.__file__).parents[1]
FUNCTIONS = """
import signal
from schema import Message

@query
async def spin(ctx, times: int) -> int:
    await ctx.db.query(Message).take(1)
    for _ in range(times):
        signal.raise_signal(signal.SIGALRM)
    return times

@mutation
async def send(ctx) -> None:
    await ctx.db.insert(Message(text="hi"))
    signal.raise_signal(signal.SIGALRM)
"""
SCHEMA = """
from engine import Table

class Message(Table, name="messages"):
    text: str
"""


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_INTERVAL_SECONDS", 3_600.0)
    monkeypatch.setattr(profile, "_LOST_SECONDS", 3_600.0)


def counts(told: Profile) -> dict[str, int]:
    """How often each stage was met that was met at all."""
    return {stage.name: stage.sample_count for stage in told.stages if stage.sample_count}


@pytest.mark.usefixtures("by_hand")
async def test_a_function_that_takes_time_is_told_under_its_path_and_stage(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        with recording() as recorded:
            await app.engine.query("m:spin", times=5)
            await asyncio.sleep(0)
        told = recorded.profile()
    (spin,) = told.functions
    assert (spin.path, spin.kind, spin.sample_count) == ("m:spin", "query", 5)
    assert counts(told) == {"functions": 5}
    assert spin.own_seconds == pytest.approx(spin.seconds)
    assert spin.sql_seconds == 0
    assert spin.seconds == pytest.approx(told.seconds) == pytest.approx(sum(told.stacks.values()))
    assert told.longest_in == "query m:spin"
    assert told.longest_ms > 0
    (stack,) = [line for line in stacks_of(told).splitlines() if "spin" in line]
    assert "Runner.run_query (functions/runner.py" in stack
    assert int(stack.rpartition(" ")[2]) >= 0


@pytest.mark.usefixtures("by_hand")
async def test_a_rerun_is_told_apart_from_a_first_run_and_from_the_write_that_caused_it(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        with recording() as recorded:
            subscriber = Subscriber(app.engine, None)
            subscriber.ask(0, "m:spin", times=3)
            await subscriber.catch_up()
            await app.engine.mutation("m:send")
            await subscriber.catch_up()
        ran = {(function.kind, function.path): function.sample_count for function in recorded.profile().functions}
    assert ran == {("query", "m:spin"): 3, ("mutation", "m:send"): 1, ("re-run", "m:spin"): 3}


@pytest.mark.parametrize("make_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_loop_with_nothing_to_do_is_idle(
    make_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "_INTERVAL_SECONDS", 0.002)

    async def rest() -> Profile:
        async with asyncio.timeout(10):
            with recording() as recorded:
                while counts(recorded.profile()).get(IDLE, 0) < 5:  # noqa: ASYNC110 - a signal tells nobody
                    await asyncio.sleep(0.05)
            return recorded.profile()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        told = runner.run(rest())
    idle = next(stage for stage in told.stages if stage.name == IDLE)
    assert idle.seconds > told.seconds / 2
    assert told.functions == []


def test_a_loop_that_waits_for_another_thread_in_storage_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "_INTERVAL_SECONDS", 0.002)
    database = Database.open(tmp_path / "a.db", Limits(), entropy=SystemClock().entropy)
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def wait() -> None:
        begun = asyncio.create_task(asyncio.to_thread(database.writer.begin))  # until the other one lets go
        async with asyncio.timeout(4):
            with recording() as recorded:
                while counts(recorded.profile()).get(DISK, 0) < 3:  # noqa: ASYNC110 - a signal tells nobody
                    await asyncio.sleep(0.02)
        other.execute("ROLLBACK")
        await begun

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(wait())
    finally:
        other.close()
        database.close()


@pytest.mark.usefixtures("by_hand")
def test_an_interrupt_of_the_wait_that_is_served_by_the_next_callback_counts_as_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profile, "_LATE_SECONDS", float("-inf"))
    raise_unseen = ctypes.PyDLL(None)["raise"]  # from C: nothing looks before the next callback's first step

    def work() -> None: ...

    def work_on() -> None:
        signal.raise_signal(signal.SIGALRM)

    async def run() -> Profile:
        loop = asyncio.get_running_loop()
        with recording() as recorded:
            for callback in (work, work_on):
                loop.call_soon(raise_unseen, signal.SIGALRM)
                loop.call_soon(callback)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return recorded.profile()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert counts(runner.run(run())) == {IDLE: 2, OTHER: 1}


@pytest.mark.usefixtures("by_hand")
async def test_nothing_is_noted_and_no_timer_runs_while_nobody_records() -> None:
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with recording() as first:
        with recording() as second:
            signal.raise_signal(signal.SIGALRM)
        assert signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0), "the other one goes on"
        signal.raise_signal(signal.SIGALRM)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    signal.raise_signal(signal.SIGALRM)  # one that was under way
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert first.profile().sample_count == 2
    assert second.profile().sample_count == 1


@pytest.mark.usefixtures("by_hand")
async def test_what_cannot_be_sampled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin() -> None:
        with recording():
            pass

    with pytest.raises(Overloaded, match="main thread"):
        await asyncio.to_thread(begin)
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        with pytest.raises(Overloaded, match="SIGALRM"):
            begin()
    finally:
        signal.signal(signal.SIGALRM, before)
    monkeypatch.setattr(profile, "_RECORDING_COUNT_MAX", 1)
    with recording(), pytest.raises(Overloaded, match="1 allowed"):
        begin()
    begin()


@pytest.mark.usefixtures("by_hand")
async def test_a_recording_keeps_so_many_stacks_and_the_rest_by_their_innermost_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profile, "_STACK_COUNT_MAX", 3)
    monkeypatch.setattr(profile, "_STACK_DEPTH_MAX", 20)

    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        else:
            signal.raise_signal(signal.SIGALRM)

    with recording() as recorded:
        for depth in range(12):
            deep(depth)
    told = recorded.profile()
    assert told.sample_count == 12, "each is counted all the same"
    assert len(told.stacks) == 4
    assert all(stack.count(";") < 20 for stack in told.stacks)


async def test_it_is_for_admins_and_bounded(tmp_path: Path) -> None:
    async with serve_app(tmp_path, FUNCTIONS, schema=SCHEMA, admin_key_digests=(digest_of("key"),)) as served:
        admin = {"Authorization": "Convex key"}
        assert (await served.ask("POST", "/api/profile", json={"seconds": 1})).refusal == (403, "Forbidden")
        user = await served.ask("POST", "/api/profile", json={"seconds": 1}, headers=served.token("alice"))
        assert user.refusal == (403, "Forbidden")
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        for seconds in (0, -1, Limits().profile_seconds_max + 1, "1"):
            reply = await served.ask("POST", "/api/profile", json={"seconds": seconds}, headers=admin)
            assert reply.refusal == (400, "InvalidArgument")
        asked = asyncio.create_task(served.ask("POST", "/api/profile", json={"seconds": 30}, headers=admin))
        async with asyncio.timeout(10):
            while signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0):  # noqa: ASYNC110 - nor does a timer
                await asyncio.sleep(0)
        await served.app.turn(30)
        told = (await asked).json
        assert [stage["name"] for stage in told["stages"]] == list(STAGES)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# -- stages


def codes_of(path: Path) -> Iterator[CodeType]:
    """Every function in a module."""

    def inside(code: CodeType) -> Iterator[CodeType]:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from inside(constant)

    return inside(compile(path.read_text(), str(path), "exec"))


@pytest.mark.parametrize(
    ("stack", "stage"),
    [
        ([Connection.execute, InvalidationIndex.affected], "SQL"),
        ([InvalidationIndex.affected, Connection.execute], "invalidate"),
        ([Session.receive], "frames in"),
        ([protocol.encode_transition, Session.flush], "encode"),
        ([protocol.decode_message, Session.receive], "frames in"),
        ([asyncio.sleep, Session.receive], "frames in"),
        ([asyncio.sleep], OTHER),
    ],
)
def test_a_stack_is_in_the_stage_of_its_innermost_frame_that_has_one(
    stack: list[Callable[..., object]], stage: str
) -> None:
    assert stage_of([function.__code__ for function in stack]) == stage


def test_what_the_table_of_stages_names_is_there() -> None:
    aiohttp = find_spec("aiohttp")
    assert aiohttp is not None
    assert aiohttp.origin is not None
    files = [*ENGINE.rglob("*.py"), Path(aiohttp.origin).with_name("web_protocol.py")]
    named: set[str] = set()
    for path in files:
        named.update(pattern for code in codes_of(path) if (pattern := _pattern_of(code)) is not None)
    assert named == _STAGE_BY_PLACE.keys(), "each is the first that fits somewhere"


def _pattern_of(code: CodeType) -> str | None:
    place = _place_of(code)
    return next((pattern for pattern in _STAGE_BY_PLACE if fnmatchcase(place, pattern)), None)


@pytest.mark.parametrize("folder", ["server", "sync", "auth", "functions", "values", "storage", "transaction", "live"])
def test_every_module_of_the_hot_path_has_a_stage_or_is_asked_for_by_one(folder: str) -> None:
    stages = {_stage_of(code) for path in (ENGINE / folder).glob("*.py") for code in codes_of(path)}
    assert stages - {None} <= set(STAGES)
    assert stages - {None}


def test_the_text_names_stages_functions_and_the_longest_hold() -> None:
    told = Profile(
        seconds=2.0,
        sample_count=200,
        sampler_seconds=0.01,
        stages=[profile.Stage("SQL", 0.5, 50), profile.Stage(IDLE, 1.5, 150)],
        functions=[profile.Ran("chat:send", "mutation", 0.5, 0.125, 0.25, 50)],
        longest_ms=12.345,
        longest_in="mutation chat:send",
        stacks={"a;b": 0.5, "a;idle": 1.5},
    )
    text = profile_text(told)
    assert text.startswith("2.0 s, 200 samples; taking them:   0.5 %\n")
    assert "\nSQL                       25.0 %        50\n" in text
    assert "\nmutation chat:send      25.0 %       6.2 %      12.5 %        50\n" in text
    assert text.endswith("The loop was held for 12.3 ms at most: mutation chat:send.")
    assert stacks_of(told) == "a;b 500000\na;idle 1500000\n"


def test_only_the_main_thread_is_interrupted() -> None:
    assert threading.current_thread() is threading.main_thread(), "else these tests say nothing"
