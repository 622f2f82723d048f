"""Who is to be told of new results: views in a queue, served in turns; queries whose next run waits for that.

    a result is new ──its watchers──> due ──a turn comes to it──> told: takes the newest state

When commits come faster than all can be told, a live query that is due at many is not run for states that nobody would
be given: it is *put off* until all have its last result, at most `rerun_wait_ms_max`. Meanwhile a view that holds it
takes the last state at which it was right.

Invariants
  1. A view is due from the moment there is news for it until it is told or has taken it; each is told in its turn,
     the longest due first.
  2. A live query is put off only while its last result is still being brought to somebody, only if it is dirty, and
     runs within `rerun_wait_ms_max` after that, or as soon as somebody needs it at the published timestamp.
  3. Nobody is told while a pass is under way.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from engine.clock import cpu_clock
from engine.limits import Limits
from engine.live.live_query import LiveQuery
from engine.live.view import View

_TURN_COUNT_MAX = 256  # views told in one go before sockets are read again
_PUT_OFF_COUNT_MAX = 8  # each view that is told looks at all of them

_cpu = cpu_clock()


class PutOff:
    """A live query whose run waits."""

    __slots__ = ("deadline", "ts", "views")

    def __init__(self, ts: int, deadline: float) -> None:
        self.ts = ts  # the newest at which its last result is right
        self.deadline = deadline
        self.views: dict[View, None] = {}  # to be told when it has run, even if nothing changes


class Deliveries:
    """The queue of one publisher."""

    def __init__(self, limits: Limits, run: Callable[[LiveQuery], None]) -> None:
        self._limits = limits
        self._run = run  # now; calls `has_run`
        self.put_off: dict[LiveQuery, PutOff] = {}
        self._due: deque[View] = deque()  # also some that are due no more
        self._done_count = 0  # that have left the queue so far: numbers its places
        self._is_turn_scheduled = False
        self._is_held = False

    @property
    def is_idle(self) -> bool:
        return not self._due and not self.put_off

    def hold(self) -> None:
        """A pass begins (3)."""
        self._is_held = True

    def release(self) -> None:
        """The pass is over."""
        self._is_held = False
        if self._due:
            self._schedule()

    def spread(self, live_query: LiveQuery) -> None:
        """Its result is new: tell all who watch it."""
        due = self._due
        for view, query_ids in live_query.watchers.items():  # 0.1 µs a view
            if view.changed is None:
                view.changed = query_ids
            elif view.changed is not query_ids:
                view.mark(query_ids)
            if not view.is_due:
                view.is_due = True
                due.append(view)
        live_query.last_place = self._done_count + len(due)
        self._schedule()

    def tell_later(self, view: View) -> None:
        """Tell this one, for whatever reason."""
        if not view.is_due:
            view.is_due = True
            self._due.append(view)
        self._schedule()

    def try_to_put_off(self, live_query: LiveQuery, ts: int) -> bool:
        """Whether the run of a dirty live query may wait; `ts` is the newest at which its result is right."""
        waiting = self.put_off.get(live_query)
        if waiting is not None:
            return _cpu() < waiting.deadline
        if live_query.last_place <= self._done_count or len(self.put_off) >= _PUT_OFF_COUNT_MAX:
            return False
        if live_query.dependents or live_query.result is None:
            return False  # what others are shared by is to be known at once
        self.put_off[live_query] = PutOff(ts, _cpu() + self._limits.rerun_wait_ms_max / 1000)
        return True

    def put_off_of(self, view: View) -> list[tuple[LiveQuery, PutOff]]:
        """Those that the view holds."""
        return [(live_query, waiting) for live_query, waiting in self.put_off.items() if view in live_query.watchers]

    def is_another_put_off(self, view: View, live_query: LiveQuery) -> bool:
        """Whether the view holds one that was put off, apart from this one."""
        return any(each is not live_query and view in each.watchers for each in self.put_off)

    def has_run(self, live_query: LiveQuery) -> None:
        """It runs now, or never again."""
        waiting = self.put_off.pop(live_query, None)
        if waiting is not None:
            for view in waiting.views:
                self.tell_later(view)

    def clear(self) -> None:
        """No run waits any more."""
        for live_query in list(self.put_off):
            self.has_run(live_query)

    def close(self) -> None:
        """Tell nobody and run nothing any more."""
        self.put_off.clear()
        self._due.clear()

    def run_put_off(self) -> None:
        """Run all that were put off."""
        self._run_all(list(self.put_off))

    def _schedule(self) -> None:
        if not self._is_turn_scheduled and not self._is_held:
            self._is_turn_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_turn_scheduled = False
        if self._is_held:
            return  # 3; its end schedules
        due = self._due
        for _ in range(min(len(due), _TURN_COUNT_MAX)):
            view = due.popleft()
            self._done_count += 1
            if view.is_due:
                view.is_due = False
                try:
                    view.on_ready()
                except Exception as error:  # noqa: BLE001 - a door's own bug must not cost the others their results
                    context = {"message": "telling a subscriber of a new result failed", "exception": error}
                    asyncio.get_running_loop().call_exception_handler(context)
        if self.put_off:
            now = _cpu()
            self._run_all([each for each, waiting in self.put_off.items() if not due or waiting.deadline <= now])
        if due:
            self._schedule()

    def _run_all(self, live_queries: Iterable[LiveQuery]) -> None:
        for live_query in live_queries:
            if live_query in self.put_off:  # else the run of another one needed it
                self._run(live_query)
