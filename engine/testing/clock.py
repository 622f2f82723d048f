"""Time that a test turns.

Invariants
  1. No time passes by itself on a `ManualClock`; the same seed gives the same entropy.
  2. Timers fire in the order of their due times, ties in the order they were made, each at exactly its due time.
  3. A timer of a `ProcessClock` fires only while the process lives.
"""

import asyncio
import heapq
from collections.abc import Callable

from engine.clock import seeded_random

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

    def advance(self, seconds: float = 0, *, minutes: float = 0, hours: float = 0, days: float = 0) -> None:
        """Let time pass: fire every timer that is due by then, those included that fired timers make.

        What a timer wakes runs when the test next awaits, all at the end of that time; `TestEngine.advance` lets it run
        in between.
        """
        end_ns = self._elapsed_ns + span_ns(seconds, minutes, hours, days)
        while self.fire_next(end_ns):
            pass
        self.reach(end_ns)

    def fire_next(self, end_ns: int) -> bool:
        """Let time pass to the next timer that is due by `end_ns`, and fire it; whether there is one."""
        while self._timers and self._timers[0][0] <= end_ns:
            due_ns, _, timer = heapq.heappop(self._timers)
            if not timer.is_cancelled:
                self._elapsed_ns = due_ns
                timer.fire()
                return True
        return False

    def reach(self, end_ns: int) -> None:
        """Let time pass in which no timer is due."""
        self._elapsed_ns = max(self._elapsed_ns, end_ns)

    @property
    def elapsed_ns(self) -> int:
        """The time since the start; `end_ns` is one like it."""
        return self._elapsed_ns

    def set_wall(self, milliseconds: int) -> None:
        """Set the wall clock, as an operator or NTP may, also backwards; timers do not notice."""
        self._wall_start_ns = milliseconds * 1_000_000 - self._elapsed_ns

    @property
    def seconds_to_next_timer(self) -> float | None:
        """How far to `advance` for the next timer to fire; None if there is none."""
        while self._timers and self._timers[0][2].is_cancelled:
            heapq.heappop(self._timers)
        return (self._timers[0][0] - self._elapsed_ns) / _NS_PER_SECOND if self._timers else None


class ProcessClock:
    """The clock as one process sees it."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.wall_ns, self.monotonic, self.sleep, self.entropy = (
            clock.wall_ns,
            clock.monotonic,
            clock.sleep,
            clock.entropy,
        )
        self.is_alive = True

    def call_later(self, delay_seconds: float, callback: Callable[[], None]) -> "_Timer":
        return self._clock.call_later(delay_seconds, lambda: callback() if self.is_alive else None)


class _Timer:
    """A callback that a `ManualClock` will call, once."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def fire(self) -> None:
        self._callback()


def span_ns(seconds: float, minutes: float, hours: float, days: float) -> int:
    """A span of time that passes, in ns."""
    span = round((seconds + 60 * (minutes + 60 * (hours + 24 * days))) * _NS_PER_SECOND)
    assert span >= 0, f"time passes forward: {span / _NS_PER_SECOND} s"
    return span
