"""One WebSocket after its handshake: bytes in to its session, its heartbeat, its end.

    open ──session.closing──> closing: our close frame is out ──that of the peer──> gone
     │                           └─ 2 s: aborted
     └─ gone without a word, or silent for 1.5 heartbeats ──> gone

Invariants
  1. What a client sent in one go is fed to its session before the session is flushed: one burst, one Transition.
  2. While the session wants no more, nothing is read: what has been read waits as bytes, the rest in the socket.
  3. The heartbeat rests while nothing is read, or the peer has not read what it was sent: a pong could not be seen.
  4. A connection keeps no task, no timer and no request: idle, it is this object, its session and its transport.

Messages go straight from the transport to the session, in the same turn of the loop: no task waits for them.
"""

import asyncio
import logging
from functools import partial
from typing import Final, Protocol

from engine.clock import Clock, TimerHandle
from engine.errors import AuthenticationFailed, RateLimited
from engine.limits import Limits
from engine.server import frames
from engine.server.addresses import Addresses
from engine.server.deflate import Deflater
from engine.server.lagging import Lagging
from engine.server.outgoing import Outgoing
from engine.sync import protocol
from engine.sync.backend import AdminKey, Backend, Credential
from engine.sync.refusals import Close
from engine.sync.session import Session
from engine.sync.shared_frames import SharedFrames

_log = logging.getLogger("engine.server")

_BURST_COUNT_MAX: Final = 256  # messages fed in one go before others have their turn
_BURST_LENGTH_MAX: Final = 1 << 20  # one longer than this ends the go: compressed, many fit into one read

# Sweeps without a byte from the peer, of which there are `SWEEPS_PER_HEARTBEAT` in a heartbeat.
SWEEPS_PER_HEARTBEAT: Final = 4
_SILENT_SWEEPS_TO_PING: Final = 4
_SILENT_SWEEPS_MAX: Final = 6


class Door(Protocol):
    """What a connection needs of the door that it came through."""

    backend: Backend
    limits: Limits
    clock: Clock
    shared_frames: SharedFrames
    deflater: Deflater
    shared_deflated_frames: SharedFrames
    lagging: Lagging
    addresses: Addresses

    def flush_soon(self, connection: "Connection") -> None: ...

    def connected(self, connection: "Connection") -> None:
        """Its client has said Connect."""

    def gone(self, connection: "Connection") -> None: ...


class Connection(asyncio.Protocol):
    """Made after the handshake, for a transport that is to be given it as its protocol."""

    __slots__ = (
        "_address",
        "_closing_timer",
        "_door",
        "_is_closing",
        "_is_connected",
        "_is_held",
        "_is_peer_closed",
        "_is_waiting_for_room",
        "_may_use_admin_key",
        "_reader",
        "_silent_sweep_count",
        "_transport",
        "_verifying",
        "is_due",
        "outgoing",
        "session",
    )

    def __init__(
        self,
        door: Door,
        transport: asyncio.Transport,
        *,
        accepts_chunks: bool,
        may_use_admin_key: bool,
        does_deflate: bool = False,
        address: str | None = None,
    ) -> None:
        limits = door.limits
        self.is_due = False  # in the door's queue; changed by the door
        self._door, self._transport, self._may_use_admin_key = door, transport, may_use_admin_key
        self._address = address  # whose counts it goes to (`addresses.py`); None: nobody's
        # None: the peer broke the rules, and what it sends is not looked at any more
        self._reader: frames.FrameReader | None = frames.FrameReader(
            limits.message_before_connect_size_bytes_max, inflates=does_deflate
        )
        self._is_connected = False  # its client has said Connect
        self._is_held = False  # nothing is read; `_take` comes again
        self._is_waiting_for_room = False  # held until the session wants more
        self._verifying: asyncio.Task[None] | None = None  # of a credential
        self._silent_sweep_count = 0
        self._is_closing = False  # our close frame is out, or the transport gone
        self._is_peer_closed = False  # its close frame is here
        self._closing_timer: TimerHandle | None = None
        self.session = Session(
            door.backend,
            limits,
            door.clock,
            wake=partial(door.flush_soon, self),
            accepts_chunks=accepts_chunks,
            write=self._write_ready,
            shared=door.shared_deflated_frames if does_deflate else door.shared_frames,
        )
        self.outgoing = Outgoing(
            transport, self.session, limits, door.lagging, deflater=door.deflater if does_deflate else None
        )

    def flush(self) -> None:
        """Bring what the session has to say to the socket."""
        session = self.session
        try:
            session.flush()
            self.outgoing.write()
        except Exception:  # noqa: BLE001 - a door: one broken session harms nobody else
            self._give_up()
        if session.closing is not None:
            self._close(session.closing)
        elif self._is_waiting_for_room and not session.is_reading_paused:
            self._is_waiting_for_room = False
            asyncio.get_running_loop().call_soon(self._take)

    def _write_ready(self, frame: bytes) -> None:
        try:
            self._transport.write(frame)
        except Exception:  # noqa: BLE001 - a door: the client lacks what its session takes for sent
            self._give_up()

    def sweep(self) -> None:
        """The heartbeat: called at even intervals, `SWEEPS_PER_HEARTBEAT` in each."""
        if self._is_held or self._is_closing or self.outgoing.is_lagging:
            self._silent_sweep_count = 0  # 3
            return
        self._silent_sweep_count += 1
        if self._silent_sweep_count == _SILENT_SWEEPS_TO_PING:
            self.outgoing.write_control(frames.PING, b"")
        elif self._silent_sweep_count == _SILENT_SWEEPS_MAX:
            self.abort()

    def abort(self) -> None:
        self._transport.abort()

    # -- called by the transport ---------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._silent_sweep_count = 0
        reader = self._reader
        if reader is None:
            return
        if self._is_closing:
            self._await_close(reader, data)
        elif self._is_held:
            reader.keep(data)
        else:
            self._take(data)

    def eof_received(self) -> None:
        self._is_peer_closed = True  # without a word
        self.session.close(protocol.CLOSE_NORMAL, "")  # unless it is closing for a reason of its own
        self.flush()

    def pause_writing(self) -> None:
        self.outgoing.pause()

    def resume_writing(self) -> None:
        self.outgoing.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closing = True
        self.session.close(protocol.CLOSE_NORMAL, "")
        self.outgoing.end()
        if self._closing_timer is not None:
            self._closing_timer.cancel()
        self._door.addresses.disconnect(self._address)
        self._door.gone(self)

    # -- in ------------------------------------------------------------------------------------------------------------

    def _take(self, data: bytes = b"") -> None:
        """Feed the session what has been read, as far as it wants more; then flush it (1)."""
        session, reader = self.session, self._reader
        if reader is None or self._is_closing:
            return
        room_count = _BURST_COUNT_MAX
        try:
            for message in reader.read(data):
                if isinstance(message, str):
                    session.receive(message)
                    if not self._is_connected and session.session_id is not None:
                        self._connect(reader)
                else:
                    self._take_control(*message)
                room_count = 0 if len(message) > _BURST_LENGTH_MAX else room_count - 1
                if not room_count or session.closing is not None or session.unverified is not None:
                    break
        except frames.BrokenRule as error:
            self._reader = None
            session.close(error.code, error.reason)
        except Exception:  # noqa: BLE001 - a door: one broken session harms nobody else
            self._give_up()
        if session.closing is None:
            if session.is_reading_paused:
                self._wait_for_room()
            elif not room_count:
                self._hold()
                asyncio.get_running_loop().call_soon(self._take)
            elif self._is_held:
                self._release()
        self.flush()

    def _connect(self, reader: frames.FrameReader) -> None:
        self._is_connected = True
        reader.message_size_bytes_max = self._door.limits.message_size_bytes_max
        self._door.connected(self)

    def _take_control(self, opcode: int, payload: bytes) -> None:
        match opcode:
            case frames.PING:
                if not self.outgoing.is_lagging:  # who does not read needs no pong
                    self.outgoing.write_control(frames.PONG, payload)
            case frames.PONG:
                self.session.pong(payload)
            case _:
                code = frames.close_code(payload)
                self._is_peer_closed = True
                self.session.peer_closed(code)

    def _hold(self) -> None:
        self._is_held = True
        self._transport.pause_reading()

    def _release(self) -> None:
        self._is_held = False
        self._transport.resume_reading()

    def _wait_for_room(self) -> None:
        self._hold()
        self._is_waiting_for_room = True
        if self.session.unverified is not None:
            self._verifying = asyncio.ensure_future(self._verify(self.session.unverified))

    async def _verify(self, credential: Credential) -> None:
        addresses, address = self._door.addresses, self._address
        try:
            addresses.check_credential(address)
            if isinstance(credential, AdminKey) and not self._may_use_admin_key:
                raise AuthenticationFailed("Admin keys are not accepted from pages of this origin.")
            verified = await self._door.backend.authenticate(credential)
            self.session.accept(verified)
        except AuthenticationFailed as error:
            addresses.credential_failed(address)
            self.session.refuse(error)  # which closes: each connection has one try
        except RateLimited:  # nothing is said of the credential: the client keeps it, and tries again later
            self.session.close(protocol.CLOSE_TRY_AGAIN_LATER, "TooManyConcurrentRequests")
        except Exception:  # noqa: BLE001 - a door: one broken session harms nobody else
            self._give_up()
        self._verifying = None

    def _give_up(self) -> None:
        _log.exception("session %s failed", self.session.session_id)
        self.session.close(protocol.CLOSE_INTERNAL_ERROR, "InternalServerError")

    # -- the end -------------------------------------------------------------------------------------------------------

    def _close(self, closing: Close) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        if self._transport.is_closing():
            return
        self.outgoing.write_control(frames.CLOSE, closing.code.to_bytes(2) + closing.reason.encode())
        self._closing_timer = self._door.clock.call_later(self._door.limits.close_seconds_max, self.abort)
        self._release()
        if self._reader is None:
            self._transport.write_eof()  # to close with something unread would take the close frame from the peer
        else:
            self._await_close(self._reader, b"")

    def _await_close(self, reader: frames.FrameReader, data: bytes) -> None:
        """Leave out what comes before the peer's close frame."""
        try:
            for message in reader.read(data):
                self._is_peer_closed |= not isinstance(message, str) and message[0] == frames.CLOSE
        except frames.BrokenRule:
            self._is_peer_closed = True  # as good as
        if self._is_peer_closed:
            self._transport.close()
