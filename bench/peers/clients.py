"""Users of the peers, as cheap for the load generator as those of the engine are (`bench/load/client.py`).

Invariants
  1. A write is over when the server has acknowledged it; those of one client are acknowledged in order.
  2. What it is shown comes to `on_result`, undecoded; a lost connection or a refusal ends the whole run (`Crowd.lose`).
"""

import asyncio
import json
import re
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, cast

from bench.load.client import Crowd
from bench.load.connection import Connection, Receiver

GAME, CONTENT = (str(uuid.uuid5(uuid.NAMESPACE_OID, name)) for name in ("game", "content"))  # as long as real ones
DURATION_SECONDS = 1e6
Done = Callable[[], None]


class PeerClient(Protocol):
    """One user, with one connection or two."""

    async def open(self) -> None: ...

    def close(self) -> None: ...

    async def watch_chat(self, on_result: Receiver) -> None:
        """Returns when it is being told."""

    async def watch_progress(self, on_result: Receiver) -> None: ...

    def send_message(self, text: str, on_done: Done) -> None: ...

    def set_progress(self, position: float, on_done: Done) -> None: ...


class WebSocketClient:
    """Speaks what the three servers by hand speak: JSON of a `type`, which comes first."""

    _TYPE_INDEX = len('{"type":"')
    _ACKNOWLEDGED = ord("o")

    def __init__(self, crowd: Crowd, port: int, user: str) -> None:
        self._crowd, self._name = crowd, user
        self._connection: Connection  # set by `open`
        self._on_result: Receiver | None = None
        self._in_flight: deque[Done] = deque()  # writes, the oldest first
        self._shown: asyncio.Future[None] | None = None  # waits for the first result
        self._request_count = 0

    async def open(self) -> None:
        self._connection = await self._crowd.connect(self._receive)
        self._send({"type": "hello", "user": _id_of(self._name), "name": self._name})

    def close(self) -> None:
        self._connection.close()

    async def watch_chat(self, on_result: Receiver) -> None:
        await self._watch({"type": "watch_chat", "game": GAME}, on_result)

    async def watch_progress(self, on_result: Receiver) -> None:
        await self._watch({"type": "watch_progress"}, on_result)

    def send_message(self, text: str, on_done: Done) -> None:
        self._write({"type": "send_message", "game": GAME, "text": text}, on_done)

    def set_progress(self, position: float, on_done: Done) -> None:
        message = {"type": "set_progress", "content": CONTENT, "position_seconds": position}
        self._write(message | {"duration_seconds": DURATION_SECONDS}, on_done)

    async def _watch(self, message: dict[str, Any], on_result: Receiver) -> None:
        self._shown = asyncio.get_running_loop().create_future()
        self._send(message)
        await self._shown
        self._shown, self._on_result = None, on_result

    def _write(self, message: dict[str, Any], on_done: Done) -> None:
        self._in_flight.append(on_done)
        self._request_count += 1
        self._send({**message, "id": self._request_count})

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.send(json.dumps(message).encode())

    def _receive(self, buffer: bytearray, start: int, end: int) -> None:
        if buffer[start + self._TYPE_INDEX] == self._ACKNOWLEDGED:
            self._in_flight.popleft()()
        elif self._on_result is not None:
            self._on_result(buffer, start, end)
        elif self._shown is not None:
            self._shown.set_result(None)


class PocketBaseClient:
    """Writes by its HTTP API on a connection that is kept, and is told by its event stream."""

    def __init__(self, crowd: Crowd, port: int, user: str) -> None:
        self._port, self._name = port, user
        self._requests, self._events = _Requests(crowd), _EventStream(crowd)
        self._progress_id = ""  # of the user's own record; set by the first need

    async def open(self) -> None:
        await self._requests.connect(self._port)

    def close(self) -> None:
        self._requests.close()
        self._events.close()

    async def watch_chat(self, on_result: Receiver) -> None:
        await self._subscribe("messages/*", on_result)

    async def watch_progress(self, on_result: Receiver) -> None:
        await self._subscribe(f"progress/{await self._own_progress()}", on_result)

    def send_message(self, text: str, on_done: Done) -> None:
        record = {"game_id": GAME, "user_id": _id_of(self._name), "message": text, "user_name": self._name}
        self._write("POST", "messages/records", record | {"status": "active", "created_at": _now_ms()}, on_done)

    def set_progress(self, position: float, on_done: Done) -> None:
        assert self._progress_id, "`prepare_progress` has made it"
        self._write("PATCH", f"progress/records/{self._progress_id}", self._progress(position), on_done)

    async def prepare_progress(self) -> None:
        await self._own_progress()

    async def _own_progress(self) -> str:
        if not self._progress_id:
            answer = await self._requests.ask("POST", "/api/collections/progress/records", self._progress(0))
            self._progress_id = json.loads(answer)["id"]
        return self._progress_id

    def _progress(self, position: float) -> dict[str, Any]:
        return {
            "user_id": _id_of(self._name),
            "content_id": CONTENT,
            "position_seconds": position,
            "duration_seconds": DURATION_SECONDS,
            "completion_percentage": 100 * position / DURATION_SECONDS,
            "last_watched_at": _now_ms(),
            "device_type": "desktop",
        }

    def _write(self, method: str, path: str, record: dict[str, Any], on_done: Done) -> None:
        self._requests.send(method, f"/api/collections/{path}", record, lambda answer: on_done())

    async def _subscribe(self, topic: str, on_result: Receiver) -> None:
        await self._events.connect(self._port)
        asked = {"clientId": await self._events.client_id, "subscriptions": [topic]}
        await self._requests.ask("POST", "/api/realtime", asked)
        self._events.on_event = on_result


def _id_of(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class _Stream(asyncio.Protocol):
    """A connection that is lost only at the end."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._transport: asyncio.Transport | None = None  # set by the event loop; None before and after
        self._buffer = bytearray()

    async def connect(self, port: int) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._crowd.lose(f"the server ended the connection: {exc}")


class _Requests(_Stream):
    """HTTP requests, one after another."""

    def __init__(self, crowd: Crowd) -> None:
        super().__init__(crowd)
        self._waiting: deque[tuple[bytes, Callable[[bytes], None]]] = deque()  # the first of them is in flight

    def send(self, method: str, path: str, body: dict[str, Any], on_answer: Callable[[bytes], None]) -> None:
        content = json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        self._waiting.append((head.encode() + content, on_answer))
        if len(self._waiting) == 1:
            self.write(self._waiting[0][0])

    async def ask(self, method: str, path: str, body: dict[str, Any]) -> bytes:
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.send(method, path, body, answered.set_result)
        return await answered

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, mark, body = bytes(self._buffer).partition(b"\r\n\r\n")
        length = re.search(rb"\r\nContent-Length: (\d+)", head)
        if not mark or len(body) < (int(length[1]) if length else 0):
            return
        if not head.startswith(b"HTTP/1.1 20"):
            self._crowd.lose(f"refused: {bytes(self._buffer[:500])!r}")
            return
        self._buffer.clear()
        _, on_answer = self._waiting.popleft()
        if self._waiting:
            self.write(self._waiting[0][0])
        on_answer(body)


class _EventStream(_Stream):
    """Server-sent events; the borders of chunks between them do not matter to who looks for a field."""

    def __init__(self, crowd: Crowd) -> None:
        super().__init__(crowd)
        self.client_id: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.on_event: Receiver | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.write(b"GET /api/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\n\n")) >= 0:
            if self.on_event is not None:
                self.on_event(self._buffer, 0, end)
            elif not self.client_id.done() and (found := re.search(rb'"clientId":"(\w+)"', self._buffer)):
                self.client_id.set_result(found[1].decode())
            del self._buffer[: end + 2]
