"""What arrives at the viewers of a peer's chat: numbered messages, each marked `~0000000~` in its text.

Invariants
  1. A delivery is one frame at one viewer. Its latency, from sending, is taken for each message that the viewer has not
     seen yet: the newest of a frame, before the first that it has.
  2. A stretch ends when every viewer has seen every message.

Numbers need not come in order: messages of two users, sent at nearly the same time, are read in either order. (The
viewers of the engine, in `bench.load.chat`, are told of the newest state only.)
"""

import asyncio
import time
from array import array
from collections.abc import Awaitable

import msgspec

from bench.load.broadcast import MARK_DIGITS
from bench.load.connection import Receiver
from bench.load.figures import percentile
from bench.load.processes import Server
from bench.load.stretches import Cost, cost_of

_SETTLE_SECONDS_MAX = 60


class Reached(msgspec.Struct, frozen=True):
    """What a stretch came to."""

    p50_ms: float
    p99_ms: float
    cpu_micros: float  # of the server, for one delivery
    size_bytes: int  # of the newest delivery
    cost: Cost


class Messages:
    """Those of one chat."""

    def __init__(self, viewer_count: int) -> None:
        self._viewer_count = viewer_count
        self._sent_at: list[float] = []  # by number
        self._latencies_ms = array("d")
        self._delivery_count = 0
        self._size_bytes = 0
        self._missing_count = 0  # messages, over all viewers
        self._is_complete = asyncio.Event()

    def text(self) -> str:
        """Of the message that is sent now."""
        number = len(self._sent_at)
        self._sent_at.append(time.perf_counter())
        self._missing_count += self._viewer_count
        self._is_complete.clear()
        return f"What a save, did anyone else see that? ~{number:0{MARK_DIGITS}d}~"

    def receiver(self) -> Receiver:
        """What one viewer does with each frame."""
        seen = set[int]()

        def receive(buffer: bytearray, start: int, end: int) -> None:
            mark = buffer.rfind(b"~", start, end)
            if mark < 0:
                return
            self._delivery_count += 1
            self._size_bytes = end - start
            now = time.perf_counter()
            while mark >= 0 and (number := int(buffer[mark - MARK_DIGITS : mark])) not in seen:
                seen.add(number)
                self._latencies_ms.append(1_000 * (now - self._sent_at[number]))
                self._missing_count -= 1
                mark = buffer.rfind(b"~", start, mark - MARK_DIGITS - 1)
            if not self._missing_count:
                self._is_complete.set()

        return receive

    async def measure(self, server: Server, load: Awaitable[None]) -> Reached:
        """Put the load on the server and wait for the end of the stretch."""
        self._latencies_ms, self._delivery_count = array("d"), 0
        with cost_of(server) as cost:
            await load
            await asyncio.wait_for(self._is_complete.wait(), _SETTLE_SECONDS_MAX)
        return Reached(
            p50_ms=percentile(self._latencies_ms, 50),
            p99_ms=percentile(self._latencies_ms, 99),
            cpu_micros=1e6 * cost.server_cpu_seconds / self._delivery_count,
            size_bytes=self._size_bytes,
            cost=cost,
        )
