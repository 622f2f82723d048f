"""For tests of the engine and of apps: a clock that is turned by hand, and an engine on a database that goes away.

    clock = ManualClock()
    async with open_test_engine(app=".", clock=clock) as engine:
        await engine.mutation("presence:join", …)
        clock.advance(180)

Invariants
  1. No time passes by itself on a `ManualClock`; the same seed gives the same entropy.
  2. Timers fire in the order of their due times, ties in the order they were made, each at exactly its due time.
"""

import asyncio
import heapq
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from engine.clock import seeded_random
from engine.engine import Engine

_NS_PER_SECOND = 1_000_000_000
_START_MS = 1_790_812_800_000  # 2026-10-01 00:00 UTC


class ManualClock:
    """A `Clock` whose time a test turns."""

    def __init__(self, *, start_ms: int = _START_MS, seed: int = 0) -> None:
        self._elapsed_ns = 0
        self._wall_start_ns = start_ms * 1_000_000
        self._timers: list[tuple[int, int, _Timer]] = []  # a heap of (due, number, timer); cancelled ones stay in it
        self._timer_count = 0  # made so far: numbers them
        self._random = seeded_random(seed.to_bytes(8))

    def wall_ns(self) -> int:
        return self._wall_start_ns + self._elapsed_ns

    def monotonic(self) -> float:
        return self._elapsed_ns / _NS_PER_SECOND

    def call_later(self, delay_seconds: float, callback: Callable[[], None]) -> "_Timer":
        timer = _Timer(callback)
        # at least 1 ns, so that one who waits for what rounding left of a delay comes to its end
        due_ns = self._elapsed_ns + max(1, round(delay_seconds * _NS_PER_SECOND))
        heapq.heappush(self._timers, (due_ns, self._timer_count, timer))
        self._timer_count += 1
        return timer

    async def sleep(self, delay_seconds: float) -> None:
        woken = asyncio.Event()
        timer = self.call_later(delay_seconds, woken.set)
        try:
            await woken.wait()
        finally:
            timer.cancel()

    def entropy(self, size_bytes: int) -> bytes:
        return self._random.randbytes(size_bytes)

    def advance(self, seconds: float) -> None:
        """Let time pass: fire every timer that is due by then, those included that fired timers make.

        What a timer wakes runs when the test next awaits.
        """
        end_ns = self._elapsed_ns + round(seconds * _NS_PER_SECOND)
        assert end_ns >= self._elapsed_ns, f"time passes forward: {seconds} s"
        while self._timers and self._timers[0][0] <= end_ns:
            due_ns, _, timer = heapq.heappop(self._timers)
            self._elapsed_ns = due_ns
            timer.fire()
        self._elapsed_ns = end_ns

    def set_wall(self, milliseconds: int) -> None:
        """Set the wall clock, as an operator or NTP may, also backwards; timers do not notice."""
        self._wall_start_ns = milliseconds * 1_000_000 - self._elapsed_ns

    @property
    def seconds_to_next_timer(self) -> float | None:
        """How far to `advance` for the next timer to fire; None if there is none."""
        while self._timers and self._timers[0][2].is_cancelled:
            heapq.heappop(self._timers)
        return (self._timers[0][0] - self._elapsed_ns) / _NS_PER_SECOND if self._timers else None


class _Timer:
    """A callback that a `ManualClock` will call, once."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def fire(self) -> None:
        if not self.is_cancelled:
            self._callback()


@asynccontextmanager
async def open_test_engine(
    app: str | Path = ".", *, clock: ManualClock | None = None, **options: Any
) -> AsyncIterator[Engine]:
    """An engine on a new database in a temporary directory; `options` are those of `Engine.open`."""
    with tempfile.TemporaryDirectory(prefix="engine-test-") as directory:
        database = Path(directory) / "engine.db"
        async with Engine.open(app=app, database=database, clock=clock or ManualClock(), **options) as engine:
            yield engine
