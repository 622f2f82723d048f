"""Which results keep their bytes: the most recently used ones, within a bound.

Invariants
  1. The bytes of all results together stay within `result_cache_size_bytes`, those of live queries that nobody watches
     within `result_cache_count_max` results too.
  2. A watched live query keeps at least the digest of its result; one that nobody watches goes altogether.
  3. Inside of `with cache:` nothing goes: what has been found there is not watched yet. Room is made at the end.
"""

from collections import OrderedDict
from collections.abc import Callable

from engine.limits import Limits
from engine.live.live_query import LiveQuery


class ResultCache:
    """Live queries in the order of their last use."""

    def __init__(self, limits: Limits, drop: Callable[[LiveQuery], None]) -> None:
        self._limits, self._drop_live_query = limits, drop
        self._size_by_live_query: OrderedDict[LiveQuery, int] = OrderedDict()
        self._size_bytes = 0
        self._idle: OrderedDict[LiveQuery, None] = OrderedDict()  # those that nobody watches, oldest first
        self._block_count = 0  # `with` blocks under way

    def __enter__(self) -> None:
        self._block_count += 1

    def __exit__(self, *_: object) -> None:
        self._block_count -= 1
        self._make_room()

    def put(self, live_query: LiveQuery) -> None:
        """A run has given a result: count its bytes, and make room."""
        self.forget(live_query)
        assert live_query.result is not None
        size = self._size_by_live_query[live_query] = live_query.result.size_bytes
        self._size_bytes += size
        self._make_room()

    def use(self, live_query: LiveQuery) -> None:
        """Somebody asks for it: it is the newest now, and watched. Forms made since the last use are counted."""
        self._idle.pop(live_query, None)
        counted = self._size_by_live_query.get(live_query)
        if counted is not None:
            self._size_by_live_query.move_to_end(live_query)
            assert live_query.result is not None
            size = live_query.result.size_bytes
            if size != counted:
                self._size_by_live_query[live_query] = size
                self._size_bytes += size - counted

    def leave(self, live_query: LiveQuery) -> None:
        """Nobody watches it any more: it stays while there is room."""
        self._idle[live_query] = None
        self._make_room()

    def forget(self, live_query: LiveQuery) -> None:
        """Stop counting it."""
        self._size_bytes -= self._size_by_live_query.pop(live_query, 0)
        self._idle.pop(live_query, None)

    def clear(self) -> None:
        self._size_by_live_query.clear()
        self._idle.clear()
        self._size_bytes = 0

    def _make_room(self) -> None:
        if self._block_count:
            return  # invariant 3
        while self._size_bytes > self._limits.result_cache_size_bytes and len(self._size_by_live_query) > 1:
            oldest = next(iter(self._size_by_live_query))
            self.forget(oldest)
            if oldest.is_watched:
                assert oldest.result is not None
                oldest.result = oldest.result.evicted()
            else:
                self._drop_live_query(oldest)
        while len(self._idle) > self._limits.result_cache_count_max:
            self._drop_live_query(next(iter(self._idle)))
