"""When queries are due by time alone: what is kept of it, and what follows when the commit for it fails."""

from engine import Limits
from engine.live.live_query import Ask, LiveQuery
from engine.live.moments import Moments
from engine.live.view import View
from engine.testing import ManualClock

DAY_MS = 86_400_000.0


class Watcher(View):
    """One who never takes."""

    def __init__(self) -> None:
        pass


def live_query(*, is_watched: bool = False) -> LiveQuery:
    made = LiveQuery(Ask("m:q", b"{}", None), None, None, is_restricted=True)
    if is_watched:
        made.watchers[Watcher()] = (0,)
    return made


class Waiting:
    """Moments, and the commits that they asked for."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.asked_at: list[float] = []  # s since the start
        self.moments = Moments(self.clock, Limits(), self._ask, lambda dropped: self.moments.put(dropped, None))

    def _ask(self) -> bool:
        self.asked_at.append(self.clock.monotonic())
        return True


async def test_what_is_not_true_any_more_is_not_kept_until_its_time() -> None:
    waiting = Waiting()
    now, kept = waiting.moments.now_ms(), live_query(is_watched=True)
    for number in range(1_000):
        waiting.moments.put(kept, now + DAY_MS + number)
        dropped = live_query()
        waiting.moments.put(dropped, now + DAY_MS)
        waiting.moments.put(dropped, None)
    assert len(waiting.moments) < 100
    waiting.clock.advance(days=1, seconds=1)
    assert waiting.moments.due() == {kept}
    assert len(waiting.moments) == 0


async def test_a_timer_is_due_exactly_when_its_moment_comes() -> None:
    waiting = Waiting()
    moment = waiting.moments.now_ms() + 1_000
    waiting.clock.advance(0.000_002_442)  # to a time that no float of ms says exactly
    waiting.moments.put(live_query(is_watched=True), moment)
    waiting.clock.advance(1 - 0.000_002_442)
    assert waiting.clock.wall_ns() == moment * 1_000_000
    assert waiting.asked_at == [1]


async def test_a_commit_that_was_asked_for_and_did_not_come_is_asked_for_again() -> None:
    waiting = Waiting()
    due = live_query(is_watched=True)
    waiting.moments.put(due, waiting.moments.now_ms() + 1_000)
    waiting.clock.advance(3.5)
    assert waiting.asked_at == [1, 2, 3]
    assert waiting.moments.due() == {due}
    waiting.clock.advance(60)
    assert waiting.asked_at == [1, 2, 3]


async def test_moments_that_are_closer_together_share_a_commit() -> None:
    waiting = Waiting()
    interval_ms = Limits().moment_interval_ms
    start = waiting.moments.now_ms() + 1_000
    first, close, far = (live_query(is_watched=True) for _ in range(3))
    waiting.moments.put(first, start)
    waiting.moments.put(close, start + 1)
    waiting.moments.put(far, start + 2 * interval_ms)
    waiting.clock.advance(1)
    assert waiting.moments.due() == {first}
    waiting.clock.advance((interval_ms - 1) / 1_000)
    assert len(waiting.asked_at) == 1
    waiting.clock.advance(0.001)
    assert len(waiting.asked_at) == 2
    assert waiting.moments.due() == {close}
    waiting.clock.advance(interval_ms / 1_000)
    assert len(waiting.asked_at) == 3
    assert waiting.moments.due() == {far}
