"""Sockets that speak HTTP: how long and how many, in silence and after; what a header may have."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from engine.config import Config
from engine.limits import Limits
from engine.server import websocket
from engine.server.connection import Connection
from tests.server.fakes import FakeEngine, Served, served

Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]
GET = b"GET /version HTTP/1.1\r\nHost: engine\r\n\r\n"


@asynccontextmanager
async def limited(**limits: Any) -> AsyncIterator[tuple[FakeEngine, Served, Callable[[], Any]]]:
    """A server with these limits, and a way to open sockets to it."""
    engine = FakeEngine(Config(limits=Limits(**limits)))
    writers = []

    async def connect() -> Opened:
        url = server.url("")
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writers.append(writer)
        return reader, writer

    async with served(engine) as server:
        yield engine, server, connect
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def ask(socket: Opened, request: bytes = GET) -> int:
    """The status of the answer to a request."""
    reader, writer = socket
    writer.write(request)
    head = (await within(reader.readuntil(b"\r\n\r\n"))).decode()
    length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length:"))
    await within(reader.readexactly(length))
    return int(head.split()[1])


async def within(work: Any) -> Any:
    return await asyncio.wait_for(work, 10)


async def is_closed(socket: Opened) -> bool:
    """Whether the server has closed it: its end comes before the answer to a request would."""
    try:
        return bool(await within(socket[0].read(1)) == b"")
    except ConnectionError:
        return True


async def test_a_socket_has_so_long_for_its_header_and_no_longer() -> None:
    async with limited(http_header_seconds_max=7) as (engine, _, connect):
        slow, in_time = await connect(), await connect()
        for reader_writer in (slow, in_time):
            reader_writer[1].write(GET[:20])
        await settled(engine, 2)
        engine.clock.advance(6.9)
        assert await ask(in_time, GET[20:]) == 200
        engine.clock.advance(0.1)
        assert await is_closed(slow)
        assert await ask(in_time) == 200, "it has shown that it speaks"
        assert engine.clock.seconds_to_next_timer is None


async def settled(engine: FakeEngine, count: int) -> None:
    """Until so many sockets are known to the server: each waits for its header."""
    async with asyncio.timeout(10):
        while len(engine.clock._timers) < count:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0)


async def test_of_the_silent_the_oldest_makes_room() -> None:
    async with limited(unconnected_count_max=2) as (engine, _, connect):
        oldest, second = await connect(), await connect()
        await settled(engine, 2)
        third = await connect()
        assert await is_closed(oldest)
        assert await ask(second) == await ask(third) == 200


async def test_past_the_bound_the_oldest_that_asks_nothing_makes_room() -> None:
    async with limited(http_connection_count_max=2) as (_, server, connect):
        oldest, second = await connect(), await connect()
        assert await ask(oldest) == await ask(second) == 200
        third = await connect()
        assert await ask(third) == 200
        assert await is_closed(oldest)
        assert await ask(second) == 200
        async with server.connected() as sync:  # takes the place of `second`, and then of none
            await sync.say({"type": "Connect", "sessionId": "3f0e8f6c-0c51-4c0a-9b6a-5b8f0c4c2d10"})
            assert await is_closed(second)
            assert await ask(await connect()) == await ask(third) == 200


async def test_who_is_being_answered_is_not_sent_away_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()
    async with limited(http_connection_count_max=2) as (engine, _, connect):

        async def wait(*_: Any, **__: Any) -> Any:
            await release.wait()
            return engine.backend._outcome("query", "none", b"", None, None, False)

        monkeypatch.setattr(engine.backend, "http_query", wait)
        body = b'{"path":"m:q"}'
        request = b"POST /api/query HTTP/1.1\r\nHost: e\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        sockets = [await connect(), await connect()]
        await settled(engine, 2)
        asking = [asyncio.ensure_future(ask(socket, request)) for socket in sockets]
        while engine.clock.seconds_to_next_timer is not None:  # noqa: ASYNC110 - their headers are not here yet
            await asyncio.sleep(0)
        assert await is_closed(await connect()), "there is no room for it"
        release.set()
        assert await asyncio.gather(*asking) == [200, 200]


async def test_a_header_may_have_so_many_fields_of_such_a_size() -> None:
    async with limited(http_header_field_count_max=10, http_header_field_size_bytes_max=9_000) as (_, _, connect):

        def request(count: int, size: int = 1) -> bytes:
            fields = b"".join(b"X-%d: %b\r\n" % (number, b"x" * size) for number in range(count - 1))
            return GET[:-2] + fields + b"\r\n"

        assert await ask(await connect(), request(10)) == 200
        assert await ask(await connect(), request(11)) == 400
        assert await ask(await connect(), request(2, 9_000)) == 200
        assert await ask(await connect(), request(2, 9_001)) == 400


@pytest.mark.parametrize("sent", [b"\x16\x03\x01 hello", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"])
async def test_what_is_no_http_is_answered_and_nobody_is_alarmed(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with limited() as (_, _, connect):
        socket = await connect()
        assert await ask(socket, sent) == 400
        assert await is_closed(socket)
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


@pytest.mark.slow
async def test_a_socket_that_asks_nothing_more_is_closed_after_a_while() -> None:
    async with limited(http_keep_alive_seconds=1) as (_, _, connect):
        socket = await connect()
        assert await ask(socket) == 200
        assert await ask(socket) == 200
        assert await is_closed(socket)


async def test_so_many_credentials_are_refused_on_one_connection_and_then_it_is_closed() -> None:
    async with limited(authentication_failure_count_max=3) as (_, _, connect):
        socket, request = await connect(), b"POST /api/query HTTP/1.1\r\nHost: e\r\nAuthorization: Bearer no\r\n"
        body = b'{"path":"m:q"}'
        request += b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        for _ in range(3):
            assert await ask(socket, request) == 401
        assert await is_closed(socket)
        other = await connect()
        assert await ask(other, request) == 401
        assert await ask(other) == 200, "that was another one"


async def test_a_peer_that_does_not_read_its_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async with limited() as (engine, server, connect):
        engine.backend.show("m:large", "x" * 8_000_000)
        engine.backend.outcomes["m:large"] = engine.backend.results["m:large"]
        body = b'{"path":"m:large"}'
        reader, writer = await connect()
        writer.transport.pause_reading()
        writer.write(b"POST /api/query HTTP/1.1\r\nHost: e\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        async with asyncio.timeout(10):
            while engine.clock.seconds_to_next_timer != 7.5:  # noqa: ASYNC110 - its header is here, and it is stuck
                await asyncio.sleep(0)
        engine.clock.advance(30)
        writer.transport.resume_reading()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await within(reader.readexactly(8_000_000))
        assert await server.get("/version")
        assert engine.clock.seconds_to_next_timer is None


async def test_the_kernel_holds_little_for_a_websocket(monkeypatch: pytest.MonkeyPatch) -> None:
    transports: list[asyncio.Transport] = []

    class Noted(Connection):
        def __init__(self, door: Any, transport: asyncio.Transport, **options: Any) -> None:
            super().__init__(door, transport, **options)
            transports.append(transport)

    monkeypatch.setattr(websocket, "Connection", Noted)
    async with (
        limited(socket_send_buffer_size_bytes=64 << 10, send_buffer_high_water_bytes=50_000) as (_, server, _),
        server.connected(),
    ):
        (transport,) = transports
        kernel_socket = transport.get_extra_info("socket")
        assert kernel_socket.getsockopt(1, 7) == 2 * (64 << 10), "Linux doubles it for its own book-keeping"
        assert transport.get_write_buffer_limits()[1] == 50_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "allowed", "taken", "open_files"),
    [(100, 9_000, (100, 4_096), 5_388), (20_000, 9_000, (5_856, 1_952), 9_000), (20_000, 600, (225, 75), 600)],
)
def test_no_more_connections_are_taken_than_the_system_allows_files(
    wanted: int, allowed: int, taken: tuple[int, int], open_files: int
) -> None:
    program = f"""
import logging, resource
from engine.limits import Limits
from engine.server.app import _within_the_system
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {allowed}))
logging.basicConfig()
limits = _within_the_system(Limits(connection_count_max={wanted}))
print(limits.connection_count_max, limits.http_connection_count_max, *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert tuple(map(int, done.stdout.split())) == (*taken, open_files, allowed)
    told = f"{taken[0]} connections at most: the system allows {allowed} open files (ulimit -n)"
    assert (told in done.stderr) is (taken[0] < wanted)
