"""Time for the first runs of queries: slices of it, between which others have the loop.

    open ──a slice is used up──> resting, a few turns of the loop ──> open
              └─ who still wants to run waits, and is told when it is open again

Invariants
  1. In a turn that is open one may always run; all views share its slice.
  2. Who waits is told in the order that they came, a bounded number at a time: being told for nothing costs 10 µs.
"""

import asyncio
from collections.abc import Callable
from itertools import islice

from engine.clock import GIVEN_TURN_COUNT
from engine.live.view import View

_TOLD_COUNT_MAX = 32  # in a turn


class FirstRuns:
    """Of one publisher."""

    def __init__(self, slice_seconds: float, cpu: Callable[[], float], tell: Callable[[View], None]) -> None:
        self._slice_seconds, self._cpu, self._tell = slice_seconds, cpu, tell
        self._end: float | None = None  # of the slice; None: none has begun in this turn
        self._resting_turn_count = 0
        self._is_resting = False
        self._is_scheduled = False
        self._waiting: dict[View, None] = {}  # in the order they came

    @property
    def is_idle(self) -> bool:
        return not self._waiting

    def has_time(self) -> bool:
        """Whether one more query may be run now."""
        now = self._cpu()
        if self._end is None:
            self._end = now + self._slice_seconds
            self._schedule()
            return True
        if now < self._end and not self._is_resting:
            return True
        if not self._is_resting:
            self._is_resting, self._resting_turn_count = True, GIVEN_TURN_COUNT
        return False

    def wait(self, view: View) -> None:
        """Tell it when there is time again."""
        self._waiting[view] = None

    def forget(self, view: View) -> None:
        """It is closed."""
        self._waiting.pop(view, None)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_scheduled = False
        if self._resting_turn_count:
            self._resting_turn_count -= 1
            self._schedule()
            return
        self._end, self._is_resting = None, False
        for view in list(islice(self._waiting, _TOLD_COUNT_MAX)):
            del self._waiting[view]
            self._tell(view)
        if self._waiting:
            self._schedule()
