"""Time and randomness: the only module that imports `time`, `random` or `os.urandom`.

Everything that waits or asks the hour is given a `Clock`, so a test turns time by hand (`testing.ManualClock`).
"""

import asyncio
import os
import random
import time
from collections.abc import Callable
from typing import Final, Protocol

GIVEN_TURN_COUNT: Final = 8  # of the loop: more than a request takes from its socket to its answer, but for the disk


class TimerHandle(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch; may step back when the machine's clock is set."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never steps back."""

    def call_later(self, delay_seconds: float, callback: Callable[[], None]) -> TimerHandle:
        """Call back on the running loop after a delay of monotonic time."""

    async def sleep(self, delay_seconds: float) -> None: ...

    def entropy(self, size_bytes: int) -> bytes:
        """Bytes that nobody can guess; seeded in tests."""


class SystemClock:
    """The machine's own time and randomness."""

    def __init__(self) -> None:
        self._pool = b""  # unguessable bytes not handed out yet: one system call serves many ids
        self._pool_used = 0

    def wall_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()

    def call_later(self, delay_seconds: float, callback: Callable[[], None]) -> TimerHandle:
        return asyncio.get_running_loop().call_later(delay_seconds, callback)

    async def sleep(self, delay_seconds: float) -> None:
        await asyncio.sleep(delay_seconds)

    def entropy(self, size_bytes: int) -> bytes:
        start = self._pool_used
        if start + size_bytes > len(self._pool):
            self._pool, start = os.urandom(max(4096, size_bytes)), 0
        self._pool_used = start + size_bytes
        return self._pool[start : start + size_bytes]


async def give_way() -> None:
    """Let others have the loop, after a slice of long work.

    With one turn only, each step of another's request would wait for one more slice.
    """
    for _ in range(GIVEN_TURN_COUNT):  # 10 µs each when nobody wants them
        await asyncio.sleep(0)


def cpu_clock() -> Callable[[], float]:
    """Seconds for measuring how long a run holds the loop: real even when a test turns the clock by hand."""
    return time.perf_counter


def seeded_random(seed: bytes) -> random.Random:
    """A generator that gives the same numbers for the same seed: `ctx.random`."""
    return random.Random(seed)  # noqa: S311 - reproducibility is the point; secrets come from `entropy`
