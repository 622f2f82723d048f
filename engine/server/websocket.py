"""The door for clients that stay: WebSocket handshakes, and turns between the connections that came of them.

Invariants
  1. A refused handshake is answered like any HTTP request; an accepted one leaves nothing of aiohttp behind.
  2. A connection is in `_connections` from its handshake until its transport is gone.

aiohttp reads the request and finds the way here; from the handshake on the transport speaks to `Connection`. (With
aiohttp's own WebSocket a message takes 1.7 × the work to come in, and an idle client 2.2 × the memory: a task, a
request, a response, a queue and timers for each.)
"""

import asyncio
import base64
import binascii
import hashlib
import socket
from collections import deque
from typing import Any, Final, cast

from aiohttp import web

from engine.clock import Clock
from engine.errors import Overloaded
from engine.limits import Limits
from engine.server import deflate
from engine.server.addresses import Addresses
from engine.server.connection import SWEEPS_PER_HEARTBEAT, Connection
from engine.server.lagging import Lagging
from engine.server.origins import Origins
from engine.server.outgoing import ready
from engine.sync import protocol
from engine.sync.backend import Backend
from engine.sync.shared_frames import SharedFrames

_TURN_COUNT_MAX: Final = 256  # sessions flushed in one go before sockets are read again
_ACCEPT_SALT: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_KEY_SIZE: Final = 16


class WebSocketDoor:
    """All connections of one server."""

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        clock: Clock,
        origins: Origins,
        lagging: Lagging,
        addresses: Addresses,
    ) -> None:
        self.backend, self.limits, self.clock, self.origins = backend, limits, clock, origins
        self.lagging, self.addresses = lagging, addresses
        self.shared_frames = SharedFrames(ready, clock)
        self.deflater = deflate.Deflater(ready, limits)
        self.shared_deflated_frames = SharedFrames(self.deflater.ready, clock)
        self._connections: set[Connection] = set()
        self._unconnected: dict[Connection, None] = {}  # those with no Connect yet, oldest first
        self._due: deque[Connection] = deque()  # to be flushed; each is in it at most once (`is_due`)
        self._is_turn_scheduled = False
        self._sweep_timer: asyncio.TimerHandle | None = None  # runs while there are connections
        self._is_closing = False
        self._all_gone = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a handshake; the connection goes on by itself."""
        if self._is_closing or len(self._connections) >= self.limits.connection_count_max:
            raise Overloaded(
                f"connections: {len(self._connections):,}, {self.limits.connection_count_max:,} allowed. "
                "Try again, or raise limits.connection_count_max."
            )
        does_deflate = deflate.is_offered(request.headers.getall("Sec-WebSocket-Extensions", ()))
        answer = _accepting(request, deflate.ACCEPTED if does_deflate else None)
        address = self.addresses.name_of(request)
        self.addresses.connect(address)
        transport, unread = _taken_from_aiohttp(request, self.limits.socket_send_buffer_size_bytes)
        if transport is None:
            self.addresses.disconnect(address)
            return _Nothing()
        connection = Connection(
            self,
            transport,
            accepts_chunks=protocol.accepts_chunks(
                request.match_info.get("version"), request.headers.get("Convex-Client")
            ),
            may_use_admin_key=self.origins.may_use_admin_key(request),
            does_deflate=does_deflate,
            address=address,
        )
        self._connections.add(connection)
        self._unconnected[connection] = None
        transport.set_protocol(connection)
        transport.write(answer)
        if unread:
            connection.data_received(unread)
        if len(self._unconnected) > self.limits.unconnected_count_max:
            oldest = next(iter(self._unconnected))  # so that sockets which say nothing keep nobody out
            del self._unconnected[oldest]
            oldest.session.close(protocol.CLOSE_TRY_AGAIN_LATER, "TooManyConcurrentRequests")
        if self._sweep_timer is None:
            self._sweep_later()
        return _Nothing()

    def connected(self, connection: Connection) -> None:
        """Its client has said Connect."""
        self._unconnected.pop(connection, None)

    def gone(self, connection: Connection) -> None:
        """Its transport has ended."""
        self._connections.discard(connection)
        self._unconnected.pop(connection, None)
        if not self._connections:
            if self._sweep_timer is not None:
                self._sweep_timer.cancel()
                self._sweep_timer = None
            if self._is_closing:
                self._all_gone.set()

    def flush_soon(self, connection: Connection) -> None:
        """Flush it once what the loop has at hand is read."""
        if connection.is_due:
            return
        connection.is_due = True
        self._due.append(connection)
        if not self._is_turn_scheduled:
            self._is_turn_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush_due)

    def _flush_due(self) -> None:
        self._is_turn_scheduled = False
        for _ in range(min(len(self._due), _TURN_COUNT_MAX)):
            connection = self._due.popleft()
            connection.is_due = False
            connection.flush()
        if self._due and not self._is_turn_scheduled:
            self._is_turn_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush_due)

    def _sweep_later(self) -> None:
        # by the loop's clock, not the engine's: that of a test may pass a day before a peer can answer
        interval_seconds = self.limits.heartbeat_interval_seconds / SWEEPS_PER_HEARTBEAT
        self._sweep_timer = asyncio.get_running_loop().call_later(interval_seconds, self._sweep)

    def _sweep(self) -> None:
        for connection in self._connections:  # 20,000 of them: 2 ms
            connection.sweep()
        self._sweep_later()

    async def close(self) -> None:
        """Take nobody in any more, tell all clients to come back later, and wait until they are gone."""
        self._is_closing = True
        if not self._connections:
            return
        for connection in self._connections:
            connection.session.end()
        await self._all_gone.wait()

    def abort(self) -> None:
        """Drop whoever is left."""
        for connection in self._connections:
            connection.abort()


class _Nothing(web.StreamResponse):
    """Ends the handling of a request whose connection is not aiohttp's any more."""

    @property
    def prepared(self) -> bool:
        return True

    async def prepare(self, request: web.BaseRequest) -> None:
        pass

    async def write_eof(self, data: Any = b"") -> None:
        pass


class _Unread:
    """In the place of a parser: takes what was read behind the request."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        pass


def _accepting(request: web.Request, extension: str | None) -> bytes:
    """The answer to a handshake; raises HTTPBadRequest for what is none."""
    headers = request.headers
    if request.method != "GET" or headers.get("Upgrade", "").strip().lower() != "websocket":
        raise web.HTTPBadRequest(text="This address is for WebSockets: expected GET with Upgrade: websocket.")
    if "upgrade" not in [option.strip().lower() for option in headers.get("Connection", "").split(",")]:
        raise web.HTTPBadRequest(text="Expected Connection: Upgrade. (A proxy may have left it out.)")
    if headers.get("Sec-WebSocket-Version") != "13":
        raise web.HTTPBadRequest(text="Expected Sec-WebSocket-Version: 13.")
    key = headers.get("Sec-WebSocket-Key", "").encode()
    try:
        is_key = len(base64.b64decode(key, validate=True)) == _KEY_SIZE
    except binascii.Error:
        is_key = False
    if not is_key:
        raise web.HTTPBadRequest(text=f"Expected a Sec-WebSocket-Key of {_KEY_SIZE} bytes in base64.")
    accept = base64.b64encode(hashlib.sha1(key + _ACCEPT_SALT, usedforsecurity=False).digest()).decode()
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept}",
    ]
    if extension is not None:
        lines.append(f"Sec-WebSocket-Extensions: {extension}")
    return "\r\n".join([*lines, "", ""]).encode()


def _taken_from_aiohttp(request: web.Request, send_buffer_size_bytes: int) -> tuple[asyncio.Transport | None, bytes]:
    """The transport, None if it is gone, and what was read behind the request; aiohttp knows the connection no more."""
    http, transport, unread = request.protocol, request.transport, _Unread()
    http.set_parser(cast(Any, unread))
    http.transport = None  # so that `connection_lost` leaves it open
    http.connection_lost(None)
    if transport is not None:
        kernel_socket = transport.get_extra_info("socket")
        if kernel_socket is not None:
            kernel_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_size_bytes)
    return transport, unread.data
