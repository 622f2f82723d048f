"""permessage-deflate (RFC 7692) as a server of shared results uses it: what many are sent is compressed once for all.

A message is put together of blocks that each stand alone: a large piece, such as a query's result, is compressed once
and kept; the small head that differs from client to client is stored as it is. So no state is kept for a client
(`no_context_takeover`, both ways), and a message costs each further client little more than uncompressed.

Invariants
  1. The blocks of a message end on bytes, so that those of one piece fit into any message.
  2. What is kept is at most `deflated_cache_size_bytes`: what is sent, is sent to all within a few turns of the loop.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Final

from engine.limits import Limits
from engine.server import frames
from engine.sync.protocol import Frame

ACCEPTED: Final = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
_ACCEPTABLE: Final = {"server_no_context_takeover", "client_no_context_takeover", "client_max_window_bits"}

_SIZE_BYTES_MIN: Final = 1 << 10  # a smaller message is one packet anyway
_LEVEL: Final = 4  # a page of chat to 0.32 of its size; 1: 0.34 in half of the time, 9: 0.31 in twice as much
_STORED_SIZE_BYTES_MAX: Final = (1 << 16) - 1  # of a block
_END: Final = b"\0"  # the head of an empty block, of which the receiver knows the rest


def is_offered(offers: Iterable[str]) -> bool:
    """Whether the values of Sec-WebSocket-Extensions have an offer that `ACCEPTED` answers."""
    for offer in ",".join(offers).split(","):
        name, *parameters = (part.strip() for part in offer.split(";"))
        if name == "permessage-deflate" and {part.partition("=")[0].strip() for part in parameters} <= _ACCEPTABLE:
            return True
    return False


class Deflater:
    """For all connections of one door."""

    def __init__(self, plain: Callable[[Frame], bytes], limits: Limits) -> None:
        self._plain, self._limits = plain, limits  # `plain` makes a small message ready
        self._kept: dict[int, tuple[bytes, bytes]] = {}  # by `id` of a piece: it and its block; oldest first
        self._kept_size_bytes = 0

    def ready(self, frame: Frame) -> bytes:
        """A text message as one WebSocket frame."""
        if sum(map(len, frame)) < _SIZE_BYTES_MIN:
            return self._plain(frame)
        blocks = [self._block(piece) if len(piece) >= _SIZE_BYTES_MIN else _stored(piece) for piece in frame]
        blocks.append(_END)
        return b"".join((frames.header(frames.TEXT | frames.COMPRESSED, sum(map(len, blocks))), *blocks))

    def _block(self, piece: bytes) -> bytes:
        kept = self._kept.get(id(piece))
        if kept is not None:  # it is this very piece: being kept, its id is no other's
            return kept[1]
        if len(piece) > self._limits.deflated_piece_size_bytes_max:
            return _stored(piece)
        deflater = zlib.compressobj(_LEVEL, wbits=-zlib.MAX_WBITS)
        block = deflater.compress(piece) + deflater.flush(zlib.Z_SYNC_FLUSH)  # 1
        self._kept[id(piece)] = piece, block
        self._kept_size_bytes += len(piece) + len(block)
        while self._kept_size_bytes > self._limits.deflated_cache_size_bytes:
            oldest = self._kept.pop(next(iter(self._kept)))
            self._kept_size_bytes -= sum(map(len, oldest))
        return block


def _stored(piece: bytes) -> bytes:
    """A piece as it is, in blocks of RFC 1951, section 3.2.4."""
    blocks: list[bytes] = []
    for start in range(0, len(piece), _STORED_SIZE_BYTES_MAX):
        part = piece[start : start + _STORED_SIZE_BYTES_MAX]
        size = len(part)
        blocks += (b"\0", size.to_bytes(2, "little"), (size ^ 0xFFFF).to_bytes(2, "little"), part)
    return b"".join(blocks)
