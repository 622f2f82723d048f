"""WebSocket frames as a server reads and writes them: RFC 6455, sections 5 to 8; RFC 7692. No socket, no session.

Invariants
  1. Nothing that breaks the rules comes through: each frame is masked and of a known kind, reserved bits are zero, a
     control frame is whole and short, the pieces of a message follow each other, text is UTF-8.
  2. What is held is at most one message, whose size is checked when it is announced, and one read of the socket; of
     what a message is compressed to and what it unfolds to, each is within the bound.

Messages are text here: a binary one is refused as soon as it begins.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Final

from aiohttp._websocket.helpers import websocket_mask  # has no public name; compiled: big integers take 3 × as long

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA
COMPRESSED: Final = 0x40  # beside the opcode of a message, where permessage-deflate was agreed on

_FINAL: Final = 0x80  # of the first byte
_RESERVED: Final = 0x70
_CONTROL: Final = 0x08
_OPCODE: Final = 0x0F
_MASKED: Final = 0x80  # of the second byte
_LENGTH: Final = 0x7F
_LENGTH_IN_2_BYTES: Final = 126
_WHOLE_TEXT: Final = _FINAL | TEXT
_COMMON_LENGTH: Final = _MASKED | _LENGTH_IN_2_BYTES
_COMMON_HEADER: Final = struct.Struct("!BBH4s")

_KEY_SIZE: Final = 4
_HEADER_SIZE_MIN: Final = 2 + _KEY_SIZE
_CONTROL_SIZE_BYTES_MAX: Final = 125

_PROTOCOL_ERROR, _UNSUPPORTED_DATA, _INVALID_TEXT, _TOO_BIG = 1002, 1003, 1007, 1009
_DEFLATE_END: Final = b"\0\0\xff\xff"  # that a sender leaves out: RFC 7692, section 7.2.1
_NO_CODE: Final = 1005  # stands for a close frame without one
_CLOSE_CODES: Final = frozenset({*range(1000, 1015), *range(3000, 5000)} - {1004, _NO_CODE, 1006})  # that may be sent


class BrokenRule(Exception):
    """What was read is no WebSocket, or more than is taken: the connection is to be closed with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class FrameReader:
    """Bytes in, messages out."""

    __slots__ = ("_inflates", "_is_compressed", "_partial", "_rest", "_wanted_size", "message_size_bytes_max")

    def __init__(self, message_size_bytes_max: int, *, inflates: bool = False) -> None:
        self._inflates = inflates  # permessage-deflate was agreed on, without context takeover
        self._is_compressed = False  # the message that is being read
        self.message_size_bytes_max = message_size_bytes_max  # may be changed at any time
        self._rest: bytes | bytearray = b""  # what was not given out yet; mutable once a frame came in pieces
        self._wanted_size = 0  # with a smaller rest there is no point in looking at it
        self._partial: bytearray | None = None  # the frames so far of a message that comes in several

    def keep(self, data: bytes | bytearray) -> None:
        """Put it behind the rest, for a later `read`."""
        if not self._rest:
            self._rest = data
        elif isinstance(self._rest, bytearray):
            self._rest += data
        else:
            self._rest = bytearray(self._rest) + data

    def read(self, data: bytes | bytearray) -> Iterator[str | tuple[int, bytes]]:
        """Each message that is whole with this data: a text, or a control frame as its opcode and payload.

        What is not taken of them comes with the next read. Raises `BrokenRule`, after which there must be none.
        """
        if self._rest:
            self.keep(data)
            data = self._rest
            if len(data) < self._wanted_size:
                return
        position, size, wanted_size = 0, len(data), _HEADER_SIZE_MIN
        try:
            while size - position >= wanted_size:
                if size - position >= _COMMON_HEADER.size:
                    # nearly every message: one frame of 126 bytes to 64 KiB; 0.5 × the work of what is below
                    first, second, length, key = _COMMON_HEADER.unpack_from(data, position)
                    end = position + _COMMON_HEADER.size + length
                    if (
                        first == _WHOLE_TEXT
                        and second == _COMMON_LENGTH
                        and end <= size
                        and length <= self.message_size_bytes_max
                        and self._partial is None
                    ):
                        payload = bytearray(data[end - length : end])
                        websocket_mask(key, payload)
                        position = end
                        yield _text(payload)
                        continue
                header_size, length = self._header(data, position, size)
                if size - position < header_size + length:
                    wanted_size = header_size + length
                    break
                first, start = data[position], position + header_size
                position = start + length
                message = self._message(first, bytes(data[start - _KEY_SIZE : start]), data[start:position])
                if message is not None:
                    yield message
        finally:
            self._rest, self._wanted_size = data[position:] if position else data, wanted_size

    def _header(self, data: bytes | bytearray, position: int, size: int) -> tuple[int, int]:
        """The sizes of a frame's header and payload; where the header is not whole, a payload of none."""
        first, second = data[position], data[position + 1]
        self._check(first, second)
        header_size, length = _HEADER_SIZE_MIN, second & _LENGTH
        if length > _CONTROL_SIZE_BYTES_MAX:
            header_size += 2 if length == _LENGTH_IN_2_BYTES else 8
            if size - position < header_size:
                return header_size, 0
            length = int.from_bytes(data[position + 2 : position + header_size - _KEY_SIZE])
        if not first & _CONTROL and length + len(self._partial or b"") > self.message_size_bytes_max:
            raise BrokenRule(_TOO_BIG, "MessageTooLarge")
        return header_size, length

    def _message(self, first: int, key: bytes, payload: bytes | bytearray) -> str | tuple[int, bytes] | None:
        """What a frame completes."""
        if not isinstance(payload, bytearray):
            payload = bytearray(payload)
        websocket_mask(key, payload)
        if first & _CONTROL:
            return first & _OPCODE, bytes(payload)
        if self._partial is not None:
            self._partial += payload
            payload = self._partial
        else:
            self._is_compressed = first & COMPRESSED != 0
        self._partial = None if first & _FINAL else payload
        if not first & _FINAL:
            return None
        return _text(self._inflated(payload) if self._is_compressed else payload)

    def _inflated(self, payload: bytearray) -> bytes:
        try:
            inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(
                payload + _DEFLATE_END, self.message_size_bytes_max + 1
            )
        except zlib.error as error:
            raise BrokenRule(_PROTOCOL_ERROR, "InvalidCompression") from error
        if len(inflated) > self.message_size_bytes_max:
            raise BrokenRule(_TOO_BIG, "MessageTooLarge")
        return inflated

    def _check(self, first: int, second: int) -> None:
        """Whether such a frame may come now (1)."""
        opcode = first & _OPCODE
        if self._inflates and opcode == TEXT:
            first &= ~COMPRESSED
        if first & _RESERVED or second < _MASKED or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise BrokenRule(_PROTOCOL_ERROR, "InvalidFrame")
        if opcode & _CONTROL:
            if not first & _FINAL or second & _LENGTH > _CONTROL_SIZE_BYTES_MAX:
                raise BrokenRule(_PROTOCOL_ERROR, "InvalidControlFrame")
        elif (opcode == CONTINUATION) is (self._partial is None):
            raise BrokenRule(_PROTOCOL_ERROR, "InvalidContinuation")
        elif opcode == BINARY:
            raise BrokenRule(_UNSUPPORTED_DATA, "BinaryMessage")


def close_code(payload: bytes) -> int:
    """The code in the payload of a close frame; raises `BrokenRule`."""
    if not payload:
        return _NO_CODE
    code = int.from_bytes(payload[:2])
    if len(payload) == 1 or code not in _CLOSE_CODES:
        raise BrokenRule(_PROTOCOL_ERROR, "InvalidCloseCode")
    _text(payload[2:])
    return code


def header(opcode: int, size_bytes: int) -> bytes:
    """The header of a whole, unmasked frame."""
    if size_bytes < 126:
        return struct.pack("!BB", _FINAL | opcode, size_bytes)
    if size_bytes < 1 << 16:
        return struct.pack("!BBH", _FINAL | opcode, 126, size_bytes)
    return struct.pack("!BBQ", _FINAL | opcode, 127, size_bytes)


def _text(payload: bytes | bytearray) -> str:
    try:
        return str(payload, "utf-8")
    except UnicodeDecodeError as error:
        raise BrokenRule(_INVALID_TEXT, "InvalidText") from error
