"""One client's WebSocket, as cheap as it gets in Python: the load must cost far less than the server it measures.

Invariants
  1. A frame is shown to its receiver where it was read, `buffer[start:end]`, during the call only; nothing is decoded.
  2. All connections read into one buffer, since each read is consumed before the next.
  3. A connection that ends by itself calls `on_lost` once; one that was closed here does not.
  4. What is sent while a read is consumed leaves in one write at its end.

Speaks what the measured servers speak: unfragmented text frames, no extension. Client frames are masked with the zero
key, which any server must accept and which leaves the payload as it is.
"""

import asyncio
from collections.abc import Callable
from itertools import count
from typing import cast

Receiver = Callable[[bytearray, int, int], None]

_TEXT, _CLOSE, _PING, _PONG = 0x81, 0x88, 0x89, 0x8A
_KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
_READ = bytearray(1 << 18)  # invariant 2
_READ_VIEW = memoryview(_READ)
_PORT_COUNT = 20_000  # connections from one address to one port: fewer than a system has ports for it
_numbers = count()


class Connection(asyncio.BufferedProtocol):
    """Frames out by `send`, frames in to `on_frame`."""

    def __init__(self, on_frame: Receiver, on_lost: Callable[[str], None]) -> None:
        self.on_frame = on_frame
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None  # None before the connection and after `close`
        self._is_upgraded = False  # the server accepted
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rest = bytearray()  # the start of a frame that has not come whole
        self._is_reading = False
        self._unsent: list[bytes] = []  # frames; empty unless a read is being consumed

    @classmethod
    async def open(cls, port: int, on_frame: Receiver, on_lost: Callable[[str], None]) -> "Connection":
        """Connect to the sync endpoint on this machine and wait for the upgrade."""
        loop = asyncio.get_running_loop()
        number = next(_numbers) // _PORT_COUNT
        source = (f"127.0.0.{1 + number}", 0) if number else None
        _, connection = await loop.create_connection(
            lambda: cls(on_frame, on_lost), "127.0.0.1", port, local_addr=source
        )
        await connection._opened
        return connection

    def send(self, *messages: bytes) -> None:
        """Send text messages in one write."""
        assert self._transport is not None
        frames = [_frame(_TEXT, message) for message in messages]
        if self._is_reading:
            self._unsent += frames
        else:
            self._transport.write(b"".join(frames))

    @property
    def is_open(self) -> bool:
        return self._transport is not None and self._is_upgraded

    def only_count(self, on_size: Callable[[int], None]) -> None:
        """From now on be told of the size of each frame in bytes, and of nothing else."""
        self.on_frame = lambda buffer, start, end: on_size(end - start)

    def close(self) -> None:
        """End the connection without a closing handshake; `on_lost` is not called."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(
            b"GET /api/1.48.0/sync HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: " + _KEY + b"\r\nSec-WebSocket-Version: 13\r\n" + self.offer + b"\r\n"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._lose(f"the server ended the connection: {exc}")

    def get_buffer(self, sizehint: int) -> memoryview:
        return _READ_VIEW

    def buffer_updated(self, nbytes: int) -> None:
        self._is_reading = True
        if not self._rest and self._is_upgraded:
            consumed = self._receive(_READ, nbytes)
            if consumed < nbytes:
                self._rest = _READ[consumed:nbytes]
        else:
            joined = self._rest
            joined += _READ_VIEW[:nbytes]
            consumed = self._receive(joined, len(joined)) if self._is_upgraded else self._upgrade(joined)
            self._rest = joined[consumed:]
        self._is_reading = False
        if self._unsent and self._transport is not None:
            self._transport.write(b"".join(self._unsent))  # 4
            self._unsent.clear()

    # -- what was read

    def _upgrade(self, buffer: bytearray) -> int:
        """Read the answer to the upgrade and what follows it; how many bytes are done with."""
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            return 0
        if not buffer.startswith(b"HTTP/1.1 101"):
            self._lose(f"no upgrade: {bytes(buffer[:200])!r}")
            return len(buffer)
        reason = self.refusal(bytes(buffer[:end]))
        if reason is not None:
            self._lose(reason)
            return len(buffer)
        self._is_upgraded = True
        if self._opened.done():  # nobody waits for it any more
            self.close()
            return len(buffer)
        self._opened.set_result(None)
        frames = buffer[end + 4 :]
        return end + 4 + self._receive(frames, len(frames))

    def _receive(self, buffer: bytearray, size: int) -> int:
        """Hand each whole frame in `buffer[:size]` to the receiver; how many bytes are done with."""
        position = 0
        while size - position >= 2:
            start, length = position + 2, buffer[position + 1]  # a server does not mask
            if length == 126:
                start += 2
                length = int.from_bytes(buffer[position + 2 : start])
            elif length == 127:
                start += 8
                length = int.from_bytes(buffer[position + 2 : start])
            end = start + length
            if end > size:
                break
            first = buffer[position]
            if first == _TEXT:
                self.on_frame(buffer, start, end)
            elif first == _PING and self._transport is not None:
                self._transport.write(_frame(_PONG, bytes(buffer[start:end])))
            elif first != _PONG:
                self._other_frame(first, buffer, start, end)
                if self._transport is None:
                    return size
            position = end
        return position

    # -- for connections that offer an extension (`deflate.py`)

    offer = b""  # header lines of the request

    def refusal(self, answer: bytes) -> str | None:
        """What is wrong with the header of the server's answer, if anything is."""
        return None

    def _other_frame(self, first: int, buffer: bytearray, start: int, end: int) -> None:
        self._lose(f"frame {first:#x}: {bytes(buffer[start : min(end, start + 200)])!r}")

    def _lose(self, reason: str) -> None:
        self.close()
        if not self._opened.done():
            self._opened.set_exception(ConnectionError(reason))
        else:
            self._on_lost(reason)


def _frame(first: int, payload: bytes) -> bytes:
    length = len(payload)
    if length < 126:
        head = bytes((first, 0x80 | length))
    elif length < 1 << 16:
        head = bytes((first, 0x80 | 126)) + length.to_bytes(2)
    else:
        head = bytes((first, 0x80 | 127)) + length.to_bytes(8)
    return head + b"\0\0\0\0" + payload
