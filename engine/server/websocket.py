"""The door for clients that stay: WebSocket ↔ session, turns between sessions, back-pressure.

    open ──session.closing──> closing ──close handshake, or 2 s──> gone
     │ └─ unsent bytes past the high water: lagging; nothing of it leaves for 30 s: aborted
     └─ peer closed, or silent for 1.5 heartbeats ──> gone

Invariants
  1. What a client sent in one go is fed to its session before the session is flushed: one burst, one Transition.
  2. Frames leave in the order of the outbox, and all that is pending of one connection is one write.
  3. A connection holds at most the high water mark and one flush in unsent bytes: past the mark its session makes
     nothing new.
  4. While reading is paused by us the heartbeat rests: a pong could not be seen.

Frames are written straight to the transport: no task, no await, no copy of a result. Outgoing compression is off:
deflate takes 5 µs per KiB, so a page of 10 KiB would cost each of its subscribers five times what the rest of its way
out does (about 10 µs), for bytes that they all share.
"""

import asyncio
import logging
import socket
import struct
from collections import deque
from typing import Final

from aiohttp import WSMsgType, web

from engine.clock import Clock, TimerHandle
from engine.errors import AuthenticationFailed, Overloaded
from engine.limits import Limits
from engine.server.origins import Origins
from engine.sync import protocol
from engine.sync.backend import AdminKey, Backend
from engine.sync.session import Session

_log = logging.getLogger("engine.server")

_CLOSE_SECONDS_MAX: Final = 2  # for the close handshake
_SOCKET_SEND_BUFFER_BYTES: Final = 256 << 10  # the kernel would take 4 MB for a client that has stopped reading
_BURST_COUNT_MAX: Final = 256  # messages fed in one go before others have their turn
_TURN_COUNT_MAX: Final = 256  # sessions flushed in one go before sockets are read again

_FINAL, _TEXT, _PING, _PONG = 0x80, 0x1, 0x9, 0xA


class WebSocketDoor:
    """All connections of one server."""

    def __init__(
        self, backend: Backend, limits: Limits, clock: Clock, origins: Origins, *, connection_count_max: int
    ) -> None:
        self.backend, self.limits, self.clock, self.origins = backend, limits, clock, origins
        self._connection_count_max = connection_count_max
        self._connections: set[_Connection] = set()
        self._unconnected: dict[_Connection, None] = {}  # those with no Connect yet, oldest first
        self._due: deque[_Connection] = deque()  # to be flushed; each is in it at most once (`is_due`)
        self._is_turn_scheduled = False
        self._is_closing = False
        self._all_gone = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one connection until it ends."""
        if self._is_closing or len(self._connections) >= self._connection_count_max:
            raise Overloaded(f"connections: {len(self._connections):,}, {self._connection_count_max:,} allowed.")
        response = web.WebSocketResponse(
            # aiohttp refuses what reaches the bound, we what passes it
            max_msg_size=self.limits.message_size_bytes_max + 1,
            heartbeat=self.limits.heartbeat_interval_seconds,
            timeout=_CLOSE_SECONDS_MAX,
            autoping=False,
            compress=False,
        )
        await response.prepare(request)
        connection = _Connection(self, request, response)
        self._connections.add(connection)
        self._unconnected[connection] = None
        if len(self._unconnected) > self.limits.unconnected_count_max:
            # the oldest, so that sockets which say nothing keep nobody out
            next(iter(self._unconnected)).session.close(protocol.CLOSE_TRY_AGAIN_LATER, "TooManyConcurrentRequests")
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)
            self._unconnected.pop(connection, None)
            if self._is_closing and not self._connections:
                self._all_gone.set()
        return response

    def connected(self, connection: "_Connection") -> None:
        """Its client has said Connect."""
        self._unconnected.pop(connection, None)

    def flush_soon(self, connection: "_Connection") -> None:
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


class _Connection:
    """One WebSocket and its session."""

    def __init__(self, door: WebSocketDoor, request: web.Request, response: web.WebSocketResponse) -> None:
        transport = request.transport
        assert transport is not None, "the handshake has just been sent on it"
        self.is_due = False  # in the door's queue; changed by the door
        self._door, self._request, self._response, self._transport = door, request, response, transport
        self._limits, self._clock = door.limits, door.clock
        self._is_waiting_for_room = False
        self._has_room = asyncio.Event()  # set when reading may go on
        self._closing: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None  # not None: the session lags
        self._stuck_timer: TimerHandle | None = None
        transport.set_write_buffer_limits(high=self._limits.send_buffer_high_water_bytes)
        kernel_socket = transport.get_extra_info("socket")
        if kernel_socket is not None:
            kernel_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_SEND_BUFFER_BYTES)
        self.session = Session(
            door.backend,
            self._limits,
            self._clock,
            wake=self._wake,
            accepts_chunks=protocol.accepts_chunks(
                request.match_info.get("version"), request.headers.get("Convex-Client")
            ),
        )

    async def serve(self) -> None:
        """Read until the end, then close."""
        try:
            await self._read()
        except Exception:  # noqa: BLE001 - a door: one broken session harms nobody else
            self._give_up()
        finally:
            self.session.close(protocol.CLOSE_NORMAL, "")  # unless it is closing for a reason of its own
            self._write()
            await self._close()
            if self._draining is not None:
                self._draining.cancel()
            if self._stuck_timer is not None:
                self._stuck_timer.cancel()

    def flush(self) -> None:
        """Bring what the session has to say to the socket."""
        try:
            self.session.flush()
            self._write()
        except Exception:  # noqa: BLE001 - a door: one broken session harms nobody else
            self._give_up()
        if self.session.closing is not None and self._closing is None:
            self._closing = asyncio.ensure_future(self._shake_hands())
        if self._is_waiting_for_room and not self.session.is_reading_paused:
            self._has_room.set()

    def abort(self) -> None:
        self._transport.abort()

    def _wake(self) -> None:
        self._door.flush_soon(self)

    def _give_up(self) -> None:
        _log.exception("session %s failed", self.session.session_id)
        self.session.close(protocol.CLOSE_INTERNAL_ERROR, "InternalServerError")

    # -- in ------------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        session = self.session
        burst_count = 0  # messages since others last had their turn, at least
        while session.closing is None:
            if session.unverified is not None:
                await self._verify()
                continue
            if session.is_reading_paused:
                await self._wait_for_room()
                continue
            message = await self._response.receive()  # does not wait while something is buffered
            match message.type:
                case WSMsgType.TEXT:
                    is_first = session.session_id is None
                    session.receive(message.data)
                    if is_first and session.session_id is not None:
                        self._door.connected(self)
                    self._wake()
                case WSMsgType.PING:
                    self._answer_ping(message.data)
                case WSMsgType.PONG:
                    session.pong(bytes(message.data))
                case WSMsgType.BINARY:
                    session.close(protocol.CLOSE_UNSUPPORTED_DATA, "BinaryMessage")
                case WSMsgType.CLOSE:
                    session.peer_closed(message.data)
                    return
                case _:  # closed by us, or gone without a word
                    return
            burst_count += 1
            if burst_count >= _BURST_COUNT_MAX:
                burst_count = 0
                await asyncio.sleep(0)

    async def _verify(self) -> None:
        credential = self.session.unverified
        assert credential is not None, "asked for by `_read`"
        try:
            if isinstance(credential, AdminKey) and not self._door.origins.may_use_admin_key(self._request):
                raise AuthenticationFailed("Admin keys are not accepted from pages of this origin.")
            verified = await self._door.backend.authenticate(credential)
        except AuthenticationFailed as error:
            self.session.refuse(error)
        else:
            self.session.accept(verified)

    async def _wait_for_room(self) -> None:
        self._has_room.clear()
        self._is_waiting_for_room = True
        self._response._cancel_heartbeat()  # 4; aiohttp has no public way to hold it
        try:
            await self._has_room.wait()
        finally:
            self._is_waiting_for_room = False
            if not self._response.closed:
                self._response._reset_heartbeat()

    # -- out -----------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Everything pending, in one write (2)."""
        session = self.session
        pieces: list[bytes] = []
        for frame in session.outbox:
            pieces.append(_header(_TEXT, sum(map(len, frame))))
            pieces += frame
        session.outbox.clear()
        if session.ping_payload is not None:
            pieces += (_header(_PING, len(session.ping_payload)), session.ping_payload)
            session.ping_payload = None
        if not pieces or self._transport.is_closing():
            return
        self._transport.writelines(pieces)
        if self._draining is None:
            unsent_size_bytes = self._transport.get_write_buffer_size()
            if unsent_size_bytes > self._limits.send_buffer_high_water_bytes:
                session.set_lagging(True)  # 3
                self._draining = asyncio.ensure_future(self._drain())
                self._watch_for_progress(unsent_size_bytes)

    def _answer_ping(self, payload: bytes) -> None:
        if self._draining is None and not self._transport.is_closing():  # who does not read needs no pong
            self._transport.write(_header(_PONG, len(payload)) + payload)

    async def _drain(self) -> None:
        """Wait until the peer has read enough."""
        try:
            await self._request.writer.drain()
        except ConnectionError:
            return  # `_read` sees the end too
        finally:
            if self._stuck_timer is not None:
                self._stuck_timer.cancel()
        self._draining = None
        if not self._transport.is_closing():
            self.session.set_lagging(False)

    def _watch_for_progress(self, unsent_size_bytes: int) -> None:
        def check() -> None:
            left_size_bytes = self._transport.get_write_buffer_size()
            if left_size_bytes >= unsent_size_bytes:
                _log.info("session %s: nothing was read from it for long: aborted", self.session.session_id)
                self.abort()
            else:
                self._watch_for_progress(left_size_bytes)

        self._stuck_timer = self._clock.call_later(self._limits.send_stuck_seconds_max, check)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._shake_hands())
        await self._closing

    async def _shake_hands(self) -> None:
        closing = self.session.closing
        assert closing is not None
        self._has_room.set()
        timer = self._clock.call_later(_CLOSE_SECONDS_MAX, self.abort)  # aiohttp waits for unsent bytes without end
        try:
            await self._response.close(code=closing.code, message=closing.reason.encode())
        except ConnectionError:
            pass  # gone already
        finally:
            timer.cancel()


def _header(opcode: int, size_bytes: int) -> bytes:
    """The header of a whole, unmasked frame: RFC 6455, section 5.2."""
    if size_bytes < 126:
        return struct.pack("!BB", _FINAL | opcode, size_bytes)
    if size_bytes < 1 << 16:
        return struct.pack("!BBH", _FINAL | opcode, 126, size_bytes)
    return struct.pack("!BBQ", _FINAL | opcode, 127, size_bytes)
