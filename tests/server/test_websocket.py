"""The WebSocket door over real sockets: handshake, frames, turns, back-pressure, closing."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from engine.config import Config
from engine.limits import Limits
from engine.sync.protocol import encode_timestamp
from tests.server.fakes import FakeEngine, Served, SocketClient, served
from tests.sync.fakes import SESSION_ID, add, authenticate, connect, mutation, query_set


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.backend.show("chat:list", ["hi"])
    return engine


@pytest.fixture
async def server(engine: FakeEngine) -> AsyncIterator[Served]:
    async with served(engine) as server:
        yield server


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what it waits for knows nothing of tests
            await asyncio.sleep(0)


async def subscribe(client: SocketClient) -> dict[str, Any]:
    await client.say(connect(), query_set(0, add(0, "chat:list")))
    return await client.hear()


@pytest.mark.parametrize("path", ["/api/1.48.0/sync", "/api/0.1.0-alpha.3/sync", "/api/sync", "//api/1.48.0/sync"])
async def test_clients_connect_at_every_address_they_use(server: Served, path: str) -> None:
    async with server.connected(path, headers={"Convex-Client": "python-0.8.1"}) as sync:
        assert (await subscribe(sync))["modifications"][0]["value"] == ["hi"]


async def test_no_subprotocol_is_negotiated(server: Served) -> None:
    async with server.connected(protocols=("graphql",)) as sync:
        assert (sync.socket.protocol, sync.socket.compress) == (None, 0)


@pytest.mark.parametrize("length", [1, 1_000, 100_000])
async def test_who_offers_compression_gets_and_sends_compressed_messages(
    engine: FakeEngine, server: Served, length: int
) -> None:
    async with server.connected(compress=15) as sync:
        assert sync.socket.compress == 15
        await subscribe(sync)
        for number in range(3):
            engine.backend.commit(**{"chat:list": str(number) + "é" * length})
            assert (await sync.hear())["modifications"][0]["value"] == str(number) + "é" * length
        await sync.say(mutation(0, "chat:send", {"body": "é" * length}))
        await until(lambda: engine.backend.mutations)
        assert json.loads(engine.backend.mutations[0].arguments) == {"body": "é" * length}


@pytest.mark.parametrize("length", [1, 1_000, 100_000])
async def test_frames_of_every_size_arrive_whole(engine: FakeEngine, server: Served, length: int) -> None:
    engine.backend.show("chat:list", "é" * length)
    async with server.connected() as sync:
        assert (await subscribe(sync))["modifications"][0]["value"] == "é" * length


async def test_a_burst_is_one_transition(server: Served) -> None:
    async with server.connected() as sync:
        sets = [query_set(number, add(number, "chat:list")) for number in range(50)]
        await sync.say(connect(), authenticate(0, "good"), *sets)
        transition = await sync.hear()
        assert transition["endVersion"]["identity"] == 1
        assert len(transition["modifications"]) == transition["endVersion"]["querySet"]


async def test_an_answer_and_its_transition_are_sent_together(engine: FakeEngine, server: Served) -> None:
    async with server.connected() as sync:
        await subscribe(sync)
        await sync.say(mutation(0))
        await until(lambda: engine.backend.mutations)
        ts = engine.backend.commit(engine.backend.mutations[0], **{"chat:list": ["x"]})
        assert (await sync.hear())["ts"] == encode_timestamp(ts)
        assert (await sync.hear())["modifications"][0]["value"] == ["x"]


async def test_an_ignored_ping_comes_back(server: Served) -> None:
    async with server.connected(autoping=False) as sync:
        await sync.socket.ping(b"are you there")
        message = await sync.socket.receive()
        assert (message.type, bytes(message.data)) == (aiohttp.WSMsgType.PONG, b"are you there")


async def test_silence_is_filled_with_pings_and_answers_are_confirmed(engine: FakeEngine, server: Served) -> None:
    async with server.connected() as sync:
        await subscribe(sync)
        await sync.say(mutation(3))
        await until(lambda: engine.backend.mutations)
        engine.backend.commit(engine.backend.mutations[0])
        await sync.hear()
        await sync.hear()
        engine.clock.advance(15)
        assert await sync.hear() == {"type": "Ping"}
        await sync.say({"type": "Event", "eventType": "x"})  # the client has read, and so answered, the ping before it
        engine.clock.advance(15)
        assert await sync.hear() == {"type": "Ping"}
        assert engine.backend.seen == [(SESSION_ID, 3)]


async def test_a_binary_message_is_refused(server: Served) -> None:
    async with server.connected() as sync:
        await sync.socket.send_bytes(b"{}")
        assert await sync.closed() == (1003, "BinaryMessage")


async def test_a_broken_message_is_told_and_closes(server: Served) -> None:
    async with server.connected() as sync:
        await sync.say(connect())
        await sync.socket.send_str("{")
        assert (await sync.hear())["type"] == "FatalError"
        assert await sync.closed() == (1000, "")


async def test_a_refused_token_is_told_and_closes(server: Served) -> None:
    async with server.connected() as sync:
        await sync.say(connect(), authenticate(0, "bad"), query_set(0))
        error = await sync.hear()
        assert (error["type"], error["authUpdateAttempted"], error["baseVersion"]) == ("AuthError", True, 0)
        assert await sync.closed() == (1000, "")


async def test_a_bug_closes_one_connection_and_harms_no_other(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    async with server.connected() as broken, server.connected() as other:
        await broken.say(connect(), authenticate(0, "bug"))
        assert await broken.closed() == (1011, "InternalServerError")
        assert "ZeroDivisionError" in caplog.text
        assert (await subscribe(other))["type"] == "Transition"


async def test_messages_up_to_the_bound_are_taken_and_larger_ones_close() -> None:
    engine = FakeEngine(Config(limits=Limits(message_size_bytes_max=100_000)))
    async with served(engine) as server, server.connected() as sync:
        frame = json.dumps({"type": "Event", "eventType": ""})
        await sync.say(connect())
        await sync.socket.send_str(frame.replace('""', f'"{"x" * (100_000 - len(frame))}"'))
        await sync.say(query_set(0))
        assert (await sync.hear())["type"] == "Transition"
        await sync.socket.send_str(frame.replace('""', f'"{"x" * (100_001 - len(frame))}"'))
        assert (await sync.closed())[0] == 1009


@pytest.mark.slow
async def test_a_message_of_32_mib_is_taken(server: Served) -> None:
    async with server.connected() as sync:
        await sync.say(connect(), query_set(0))
        await sync.hear()
        await sync.say(mutation(0, "chat:send", {"body": "x" * ((32 << 20) - 200)}))
        answer = await sync.hear()
        assert answer["result"].startswith("LimitExceeded: bytes of arguments")


# -- back-pressure -----------------------------------------------------------------------------------------------------


class RawClient:
    """A client that writes frames byte by byte and reads when the test says so, with a small receive buffer."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.connect((host, int(port)))
        raw.setblocking(False)
        self.raw, self.host = raw, host

    async def open(self, *, and_send: bytes = b"") -> bytes:
        """The answer, and what came behind it."""
        handshake = (
            f"GET /api/sync HTTP/1.1\r\nHost: {self.host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        await asyncio.get_running_loop().sock_sendall(self.raw, handshake.encode() + and_send)
        received = await self.receive()
        assert b"101" in received
        return received

    async def send(self, first_byte: int, payload: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.raw, masked(first_byte, payload))

    async def say(self, message: dict[str, Any]) -> None:
        await self.send(0x81, json.dumps(message).encode())

    async def receive(self) -> bytes:
        async with asyncio.timeout(10):
            return await asyncio.get_running_loop().sock_recv(self.raw, 1 << 20)

    def close(self) -> None:
        self.raw.close()


def masked(first_byte: int, payload: bytes) -> bytes:
    """One frame, masked with zeros."""
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    else:
        length = bytes((0x80 | 126,)) + size.to_bytes(2) if size < 1 << 16 else bytes((0x80 | 127,)) + size.to_bytes(8)
    return bytes((first_byte,)) + length + bytes(4) + payload


async def stuck_subscriber(engine: FakeEngine, server: Served) -> RawClient:
    """A subscriber that read the handshake only, with results of 200 kB committed until the server holds them back."""
    stuck = RawClient(server.address)
    await stuck.open()
    await stuck.say(connect())
    await stuck.say(query_set(0, add(0, "chat:list"), add(1, "chat:list")))
    await until(lambda: engine.backend.views and engine.backend.views[0].paths)
    view = engine.backend.views[0]
    for number in range(100):
        taken_count = view.taken_count
        engine.backend.commit(**{"chat:list": str(number) + "x" * 200_000})
        for _ in range(3):
            await asyncio.sleep(0)
        if view.taken_count == taken_count:
            return stuck
    raise AssertionError("the server never noticed that nobody reads")


async def test_a_client_that_does_not_read_is_skipped_then_gets_the_newest_state_once(
    engine: FakeEngine, server: Served
) -> None:
    stuck = await stuck_subscriber(engine, server)
    view = engine.backend.views[0]
    taken_count = view.taken_count
    for number in range(50):
        engine.backend.commit(**{"chat:list": f"late {number}"})
        await asyncio.sleep(0)
    assert view.taken_count == taken_count, "nothing is made for a client that is behind"
    received = b""
    while b"late" not in received:
        received = received[-100:] + await stuck.receive()
    assert b"late 49" in received
    assert view.taken_count == taken_count + 1
    stuck.close()


async def test_a_client_that_never_reads_again_is_dropped(engine: FakeEngine, server: Served) -> None:
    stuck = await stuck_subscriber(engine, server)
    assert not engine.backend.views[0].is_closed
    engine.clock.advance(29)
    await asyncio.sleep(0)
    assert not engine.backend.views[0].is_closed
    engine.clock.advance(2)
    await until(lambda: engine.backend.views[0].is_closed)
    stuck.close()


async def test_a_full_queue_of_mutations_stops_reading_until_there_is_room() -> None:
    engine = FakeEngine(Config(limits=Limits(mutation_queue_count_max=3)))
    async with served(engine) as server, server.connected() as sync:
        await sync.say(connect(), query_set(0))
        await sync.hear()
        await sync.say(*[mutation(number) for number in range(20)])
        answered = []
        while len(answered) < 20:
            await until(lambda: engine.backend.mutations)
            engine.backend.commit(engine.backend.mutations[0])
            message = await sync.hear()
            while message["type"] != "MutationResponse":
                message = await sync.hear()
            answered.append(message["requestId"])
        assert answered == list(range(20))


# -- frames that no browser sends --------------------------------------------------------------------------------------

TEXT, CONTINUATION, CLOSE, PING, FINAL = 0x1, 0x0, 0x8, 0x9, 0x80


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([(FINAL | TEXT, b"\xff\xfe")], 1007),
        ([(FINAL | CONTINUATION, b"x")], 1002),
        ([(TEXT, b"x"), (FINAL | TEXT, b"x")], 1002),
        ([(FINAL | 0x40 | TEXT, b"x")], 1002),
        ([(FINAL | 0x3, b"x")], 1002),
        ([(FINAL | 0xB, b"x")], 1002),
        ([(PING, b"x")], 1002),
        ([(FINAL | PING, b"x" * 126)], 1002),
        ([(FINAL | CLOSE, b"x")], 1002),
        ([(FINAL | CLOSE, (1005).to_bytes(2))], 1002),
        ([(FINAL | CLOSE, (1000).to_bytes(2))], 1000),
        ([(FINAL | 0x2, b"x")], 1003),
    ],
)
async def test_frames_that_break_the_rules_are_answered_with_a_close(
    server: Served, frames: list[tuple[int, bytes]], code: int
) -> None:
    raw = RawClient(server.address)
    await raw.open()
    for first_byte, payload in frames:
        await raw.send(first_byte, payload)
    answer = await raw.receive()
    assert (answer[0], int.from_bytes(answer[2:4])) == (FINAL | CLOSE, code)
    raw.close()


async def test_a_message_may_come_in_pieces_with_pings_between(server: Served) -> None:
    raw = RawClient(server.address)
    await raw.open()
    text = json.dumps(connect()).encode()
    await raw.send(TEXT, text[:20])
    await raw.send(FINAL | PING, b"")
    assert await raw.receive() == bytes((0x8A, 0))
    await raw.send(CONTINUATION, text[20:40])
    await raw.send(FINAL | CONTINUATION, text[40:])
    await raw.say(query_set(0))
    assert b'"Transition"' in await raw.receive()
    raw.close()


@pytest.mark.parametrize("size", [1, 200_000])
async def test_what_is_sent_right_behind_the_handshake_is_read(server: Served, size: int) -> None:
    raw = RawClient(server.address)
    texts = [json.dumps(message).encode() for message in (connect(), query_set(0), {"type": "Event", "x": "x" * size})]
    frames = b"".join(masked(FINAL | TEXT, text) for text in texts) + masked(FINAL | PING, b"done")
    received = await raw.open(and_send=frames)
    while b"done" not in received:
        received += await raw.receive()
    assert b'"Transition"' in received
    raw.close()


async def test_an_open_connection_holds_no_task(engine: FakeEngine, server: Served) -> None:
    task_count = len(asyncio.all_tasks())
    raw = RawClient(server.address)
    await raw.open()
    await raw.say(connect())
    await raw.say(query_set(0, add(0, "chat:list")))
    assert b'"Transition"' in await raw.receive()
    await until(lambda: len(asyncio.all_tasks()) == task_count)
    raw.close()


async def test_nothing_is_left_behind_by_clients_that_vanish(engine: FakeEngine, server: Served) -> None:
    task_count = len(asyncio.all_tasks())
    clients = [RawClient(server.address) for _ in range(30)]
    for number, raw in enumerate(clients):
        await raw.open()
        if number % 3:
            await raw.say(connect())
            await raw.say(query_set(0, add(0, "chat:list")))
            assert b'"Transition"' in await raw.receive()
        raw.close()
    await until(lambda: len(engine.backend.views) == 30 and all(view.is_closed for view in engine.backend.views))
    await until(lambda: len(asyncio.all_tasks()) == task_count)
    await until(lambda: engine.clock.seconds_to_next_timer is None)


@pytest.mark.parametrize(("code", "told"), [(1000, 1000), (1001, 1001), (4_000, 4_000)])
async def test_the_code_that_a_client_closes_with_is_told(
    engine: FakeEngine, server: Served, code: int, told: int
) -> None:
    async with server.connected() as sync:
        await subscribe(sync)
        await sync.socket.close(code=code)
    await until(lambda: len(engine.backend.connections) == 2)
    assert engine.backend.connections == [(SESSION_ID, "connected"), (SESSION_ID, told)]


async def test_a_client_that_vanishes_leaves_no_code(engine: FakeEngine, server: Served) -> None:
    raw = RawClient(server.address)
    await raw.open()
    await raw.say(connect())
    await raw.say(query_set(0, add(0, "chat:list")))
    assert b'"Transition"' in await raw.receive()
    raw.close()
    await until(lambda: len(engine.backend.connections) == 2)
    assert engine.backend.connections == [(SESSION_ID, "connected"), (SESSION_ID, None)]


# -- bounds and the end ------------------------------------------------------------------------------------------------


async def test_connections_past_the_bound_are_refused() -> None:
    engine = FakeEngine(Config(limits=Limits(connection_count_max=1)))
    async with served(engine) as server, server.connected() as first:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await server.session.ws_connect(server.url("/api/sync"))
        assert refused.value.status == 503
        assert (await subscribe_nothing(first))["type"] == "Transition"


async def subscribe_nothing(client: SocketClient) -> dict[str, Any]:
    await client.say(connect(), query_set(0))
    return await client.hear()


async def test_sockets_that_say_nothing_make_room_for_new_ones() -> None:
    engine = FakeEngine(Config(limits=Limits(unconnected_count_max=2)))
    async with served(engine) as server, server.connected() as talking:
        await subscribe_nothing(talking)
        async with (
            server.connected() as oldest,
            server.connected() as second,
            server.connected(),
            server.connected() as newest,
        ):
            for silent in (second, oldest):
                assert await silent.closed() == (1013, "TooManyConcurrentRequests")
            assert (await subscribe_nothing(newest))["type"] == "Transition"


async def test_a_socket_that_never_connects_is_closed_in_the_end(engine: FakeEngine, server: Served) -> None:
    async with server.connected() as sync:
        await until(lambda: engine.backend.views)
        for _ in range(20):
            engine.clock.advance(15)
        while (message := await sync.socket.receive()).type is aiohttp.WSMsgType.TEXT:
            assert json.loads(message.data) == {"type": "Ping"}
        assert message.data == 1000


async def test_a_stop_tells_everybody_to_come_back_once_their_mutation_is_answered(engine: FakeEngine) -> None:
    async with aiohttp.ClientSession() as outside:
        async with served(engine) as server:
            address = server.address
            idle = SocketClient(await outside.ws_connect(f"{address}/api/sync"))
            busy = SocketClient(await outside.ws_connect(f"{address}/api/sync"))
            await subscribe(idle)
            await subscribe(busy)
            await busy.say(mutation(0))
            await until(lambda: engine.backend.mutations)

            async def commit_late() -> None:
                assert await idle.closed() == (1001, "")
                engine.backend.commit(engine.backend.mutations[0])
                assert (await busy.hear())["type"] == "MutationResponse"
                assert (await busy.hear())["type"] == "Transition"
                assert await busy.closed() == (1001, "")

            ending = asyncio.ensure_future(commit_late())
        await ending
        with pytest.raises(aiohttp.ClientConnectorError):
            await outside.get(f"{address}/version")


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("https://app.example", True),
        ("https://APP.example", True),
        (None, True),
        ("null", False),
        ("https://app.example.evil", False),
        ("https://evil.app.example", False),
        ("http://app.example", False),
        ("https://app.example:444", False),
        ("https://app.example/", False),
        ("", False),
    ],
)
async def test_only_listed_origins_connect_once_there_is_a_list(origin: str | None, is_allowed: bool) -> None:
    engine = FakeEngine(Config(allowed_origins=("https://app.example",)))
    headers = {} if origin is None else {"Origin": origin}
    async with served(engine) as server:
        if is_allowed:
            async with server.connected(headers=headers) as sync:
                await subscribe_nothing(sync)
        else:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await server.session.ws_connect(server.url("/api/sync"), headers=headers)
            assert refused.value.status == 403


@pytest.mark.parametrize(
    ("origin", "answer"),
    [(None, "Transition"), ("https://app.example", "Transition"), ("https://evil.example", "AuthError")],
)
async def test_an_admin_key_is_taken_from_listed_pages_only(origin: str | None, answer: str) -> None:
    engine = FakeEngine(Config(allowed_origins=("https://app.example",) if origin != "https://evil.example" else ()))
    headers = {} if origin is None else {"Origin": origin}
    message = {"type": "Authenticate", "baseVersion": 0, "tokenType": "Admin", "value": "key"}
    async with served(engine) as server, server.connected(headers=headers) as sync:
        await sync.say(connect(), message, query_set(0))
        assert (await sync.hear())["type"] == answer


HANDSHAKE = {
    "Upgrade": "WebSocket",
    "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        *[{name: value for name, value in HANDSHAKE.items() if name != left_out} for left_out in HANDSHAKE],
        HANDSHAKE | {"Upgrade": "h2c"},
        HANDSHAKE | {"Connection": "close"},
        HANDSHAKE | {"Sec-WebSocket-Version": "12"},
        HANDSHAKE | {"Sec-WebSocket-Key": "c2hvcnQ="},
        HANDSHAKE | {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ"},
        HANDSHAKE | {"Sec-WebSocket-Key": "é" * 24},
    ],
)
async def test_a_request_that_is_no_handshake_is_an_error_in_json(server: Served, headers: dict[str, str]) -> None:
    status, body = await server.get("/api/sync", headers=headers)
    assert (status, json.loads(body)["code"]) == (400, "BadRequest")
    assert (await server.get("/version"))[0] == 200


async def test_a_handshake_is_answered_as_the_standard_says(server: Served) -> None:
    async with server.session.get(server.url("/api/sync"), headers=HANDSHAKE) as answer:
        assert answer.status == 101
        assert answer.headers["Sec-WebSocket-Accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


async def test_a_socket_without_a_whole_header_is_closed_in_time(engine: FakeEngine, server: Served) -> None:
    url = server.url("")
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET /version HTTP/1.1\r\nHost: ")
    await until(lambda: engine.clock.seconds_to_next_timer is not None)
    engine.clock.advance(10)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await reader.readexactly(1)
    writer.close()
