"""How much of one pass each subscriber has had: who asks much is not to hold up those who ask little.

Invariant: a live query is over its share only if all who watch it are, as far as they are looked at.

It is kept for passes only that are longer than a slice: most never need it.
"""

from collections.abc import Iterator
from itertools import islice

from engine.live.live_query import LiveQuery
from engine.live.view import View

_LOOKED_AT_COUNT_MAX = 8  # watchers of one live query: a result that many share is rather run at once


class Shares:
    """Of one pass."""

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max
        self._seconds_by_view: dict[View, float] = {}

    def add(self, live_query: LiveQuery, seconds: float) -> None:
        """It was run for so long."""
        for view in _watchers(live_query):
            self._seconds_by_view[view] = self._seconds_by_view.get(view, 0.0) + seconds

    def are_used_up(self, live_query: LiveQuery) -> bool:
        """Whether it is to be run later, when everybody else has had his turn."""
        if len(live_query.watchers) + len(live_query.dependents) > _LOOKED_AT_COUNT_MAX:
            return False
        return all(self._seconds_by_view.get(view, 0.0) > self._seconds_max for view in _watchers(live_query))


def _watchers(live_query: LiveQuery) -> Iterator[View]:
    yield from islice(live_query.watchers, _LOOKED_AT_COUNT_MAX)
    yield from islice(live_query.dependents, _LOOKED_AT_COUNT_MAX)
