"""The way out of one WebSocket: what its session has to say, as frames to its transport; back-pressure.

    at ease ──more than the high water unsent──> lagging ──a quarter of it left──> at ease
                                                    └─ stuck, or all that lag hold too much: aborted (`lagging.py`)

Invariants
  1. Frames leave in the order of the outbox, and all that is pending of one connection is one write.
  2. A connection holds at most the high water mark and one flush in unsent bytes: past the mark its session makes
     nothing new.

Frames are written straight to the transport: no task, no await. What is the same for many clients is made ready once
(`sync/shared_frames.py`), and written by their sessions while these are in step; what is large and shared is also
compressed once only (`deflate.py`).
"""

import asyncio
from typing import Final

from engine.limits import Limits
from engine.server import frames
from engine.server.deflate import Deflater
from engine.server.lagging import Lagging
from engine.sync.protocol import Frame
from engine.sync.session import Session

_COPY_SIZE_BYTES_MAX: Final = 64 << 10  # up to this it is cheaper to join pieces than to hand over each


def ready(frame: Frame) -> bytes:
    """A message as one piece that can be written."""
    return b"".join((_text_header(sum(map(len, frame))), *frame))


class Outgoing:
    """What one connection sends."""

    __slots__ = ("_deflater", "_lagging", "_session", "_transport", "is_lagging")

    def __init__(
        self,
        transport: asyncio.Transport,
        session: Session,
        limits: Limits,
        lagging: Lagging,
        *,
        deflater: Deflater | None = None,
    ) -> None:
        self._transport, self._session, self._lagging = transport, session, lagging
        self._deflater = deflater  # of a client that takes compressed messages
        self.is_lagging = False
        transport.set_write_buffer_limits(high=limits.send_buffer_high_water_bytes)

    def write(self) -> None:
        """Everything pending, in one write (1)."""
        session = self._session
        pieces: list[bytes] = []
        size_bytes = 0
        for frame in session.outbox:
            if self._deflater is not None:
                pieces.append(self._deflater.ready(frame))
                size_bytes += len(pieces[-1])
                continue
            frame_size_bytes = len(frame[0]) if len(frame) == 1 else sum(map(len, frame))
            size_bytes += frame_size_bytes
            pieces.append(_text_header(frame_size_bytes))
            pieces += frame
        session.outbox.clear()
        if session.ping_payload is not None:
            pieces += (frames.header(frames.PING, len(session.ping_payload)), session.ping_payload)
            session.ping_payload = None
        if not pieces or self._transport.is_closing():
            return
        if size_bytes <= _COPY_SIZE_BYTES_MAX:
            self._transport.write(b"".join(pieces))
        else:
            self._transport.writelines(pieces)

    def write_control(self, opcode: int, payload: bytes) -> None:
        """A ping, a pong or a close."""
        if not self._transport.is_closing():
            self._transport.write(frames.header(opcode, len(payload)) + payload)

    def pause(self) -> None:
        """The transport holds more than the high water mark (2)."""
        self.is_lagging = True
        self._session.set_lagging(True)
        self._lagging.began(self._transport)

    def resume(self) -> None:
        """The peer has read enough."""
        self.end()
        if not self._transport.is_closing():
            self._session.set_lagging(False)

    def end(self) -> None:
        """The transport is gone, or lags no more."""
        if self.is_lagging:
            self.is_lagging = False
            self._lagging.ended(self._transport)


_SHORT_TEXT_HEADERS: Final = [frames.header(frames.TEXT, size_bytes) for size_bytes in range(126)]
_TEXT_HEADER: Final = frames.header(frames.TEXT, 126)[:2]


def _text_header(size_bytes: int) -> bytes:
    """`frames.header` of a text, in a third of the time."""
    if size_bytes < 126:
        return _SHORT_TEXT_HEADERS[size_bytes]
    if size_bytes < 1 << 16:
        return _TEXT_HEADER + size_bytes.to_bytes(2)
    return frames.header(frames.TEXT, size_bytes)
