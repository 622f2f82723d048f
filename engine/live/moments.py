"""The live queries that time alone changes, by when.

Invariants
  1. When the time of a live query that somebody watches has come, a commit is asked for: an empty one gives the moment
     a timestamp, and the pass for it runs every query that is due.
  2. The time that queries are told never steps back, and is not before the moment that they run for.
"""

import heapq
import math
from collections.abc import Callable

from engine.clock import Clock, TimerHandle
from engine.limits import Limits
from engine.live.live_query import LiveQuery

_TIMER_SECONDS_MAX = 3_600.0  # the wall clock may be set meanwhile


_RETRY_MS = 1_000.0  # after a commit that was asked for and did not come
_STALE_COUNT_MIN = 64  # entries that may be outdated before anybody counts


class Moments:
    """A heap of (ms since the epoch, number, live query).

    An entry that is not true any more stays for a while: at most as many as are true, and a few.
    """

    def __init__(
        self, clock: Clock, limits: Limits, ask_for_commit: Callable[[], bool], drop: Callable[[LiveQuery], None]
    ) -> None:
        self._clock, self._limits = clock, limits
        self._ask_for_commit = ask_for_commit  # False: not now
        self._drop = drop  # nobody watches it
        self._heap: list[tuple[float, int, LiveQuery]] = []
        self._moments: dict[LiveQuery, float] = {}  # what is true
        self._count = 0  # put so far: numbers them
        self._timer: TimerHandle | None = None
        self._timer_ms = 0.0
        self._newest_ms = 0.0
        self._asked_ms = 0.0  # when a commit was asked for the last time

    def __len__(self) -> int:
        return len(self._heap)

    def now_ms(self) -> float:
        """The time for queries (invariant 2)."""
        self._newest_ms = max(self._newest_ms, self._clock.wall_ns() / 1_000_000)
        return self._newest_ms

    def put(self, live_query: LiveQuery, moment_ms: float | None) -> None:
        """It is due at this moment, and at no other; None: never."""
        if moment_ms == self._moments.get(live_query):
            return
        if moment_ms is None:
            del self._moments[live_query]
        else:
            self._moments[live_query] = moment_ms
            self._push(live_query, moment_ms)
            self._set_timer()
        if len(self._heap) > 2 * len(self._moments) + _STALE_COUNT_MIN:  # they keep live queries and results alive
            self._heap.clear()
            for each, true_ms in self._moments.items():
                self._push(each, true_ms)

    def due(self) -> set[LiveQuery]:
        """Those whose moment has come; they are taken."""
        found: set[LiveQuery] = set()
        if not self._heap:
            return found
        now = self.now_ms()
        while self._heap and self._heap[0][0] <= now:
            moment_ms, _, live_query = heapq.heappop(self._heap)
            if self._moments.get(live_query) == moment_ms:
                del self._moments[live_query]
                found.add(live_query)
        self._set_timer()
        return found

    def clear(self) -> None:
        self._heap.clear()
        self._moments.clear()

    def close(self) -> None:
        self.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self) -> None:
        if not self._heap:
            return
        first_ms = max(self._heap[0][0], self._asked_ms + self._limits.moment_interval_ms)
        if self._timer is not None:
            if self._timer_ms <= first_ms:
                return
            self._timer.cancel()
        self._wait_until(first_ms)

    def _wait_until(self, when_ms: float) -> None:
        self._timer_ms = when_ms
        delay_seconds = (_ns(when_ms) - self._clock.wall_ns()) / 1_000_000_000
        self._timer = self._clock.call_later(min(max(delay_seconds, 0.0), _TIMER_SECONDS_MAX), self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self.now_ms()
        while self._heap and self._heap[0][0] <= now:
            moment_ms, _, live_query = self._heap[0]
            is_true = self._moments.get(live_query) == moment_ms
            if is_true and live_query.is_watched:
                self._asked_ms = now
                if self._ask_for_commit():
                    # the pass takes what is due, and sets the timer again; if the commit fails there is none
                    self._wait_until(now + _RETRY_MS)
                    return
                break
            heapq.heappop(self._heap)
            if is_true:
                self._drop(live_query)
        self._set_timer()

    def _push(self, live_query: LiveQuery, moment_ms: float) -> None:
        self._count += 1
        heapq.heappush(self._heap, (moment_ms, self._count, live_query))


def _ns(milliseconds: float) -> int:
    """The same time, rounded up: not their product, which is only right to 256 ns."""
    rest, whole = math.modf(milliseconds)
    return int(whole) * 1_000_000 + math.ceil(rest * 1_000_000)
