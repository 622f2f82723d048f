"""All that one subscriber asks, always at one timestamp.

    settled ──a commit changes a result──> settled, with changes to take
       │ a query of it runs long                        ▲
       └──> waiting ──its round begins──> held ──its round ends──┘

Invariants
  1. A change that is taken is the state of every query of the view at its `ts`; `ts` never goes back.
  2. While a long query runs at a timestamp, the view is held at that timestamp: the other results that belong to it
     are kept until it is done, whatever is committed meanwhile.
  3. A result is given once; an equal one is not given again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from engine.identity import Identity
from engine.live.live_query import Ask, LiveQuery, Result

if TYPE_CHECKING:
    from engine.live.publisher import Publisher


class ViewChange(msgspec.Struct, frozen=True):
    """What is new since the last change that was taken."""

    ts: int
    results: dict[int, Result]  # by query id; may be empty


class _Hold:
    """A moment that long queries are being run for (invariant 2)."""

    def __init__(self, ts: int, results: dict[int, Result]) -> None:
        self.ts, self.results = ts, results
        self.awaited: dict[LiveQuery, None] = {}


class View:
    """The queries of one subscriber."""

    def __init__(self, publisher: "Publisher", on_ready: Callable[[], None]) -> None:
        self._publisher, self._on_ready = publisher, on_ready
        self.identity: Identity | None = None
        self._asks: dict[int, Ask] = {}
        self._live_queries: dict[int, LiveQuery] = {}  # those of _asks that are attached
        self._unattached: dict[int, None] = {}  # the others, in the order they came
        self._changed: set[int] = set()  # have a result that was not taken, perhaps
        self._taken: dict[int, bytes] = {}  # digests: a lagging subscriber must not keep old results alive
        self.dependencies: dict[int, tuple[LiveQuery, ...]] = {}  # what queries are shared by; set by sharing
        self._waiting: set[LiveQuery] = set()  # long queries without a result at the published timestamp
        self._hold: _Hold | None = None
        self._kept: dict[int, Result] = {}  # with bytes, of a state too large for the cache that is being taken
        publisher.views.add(self)

    def add(self, query_id: int, path: str, arguments: bytes, journal: str | None) -> None:
        """Ask a query; its result is in a change that is taken later."""
        assert query_id not in self._asks, "query ids are unique in a view"
        self._asks[query_id] = Ask(path, arguments, journal)
        self._unattached[query_id] = None
        self._hold = None  # what was held knows nothing of this query

    def remove(self, query_id: int) -> None:
        """No longer ask; nothing happens for an unknown id."""
        if self._asks.pop(query_id, None) is not None:
            self._detach(query_id)
            self._unattached.pop(query_id, None)
            self._taken.pop(query_id, None)
            self._kept.pop(query_id, None)

    def set_identity(self, identity: Identity | None) -> None:
        """Ask everything as somebody else; queries that read no difference go on as they are."""
        self.identity = identity
        self._hold = None  # what was held was for somebody else
        for query_id, live_query in list(self._live_queries.items()):
            if live_query.nested or not self._publisher.suits(live_query, identity):
                self.reattach(query_id)

    def take(self) -> ViewChange | None:
        """The newest state at which every query has a result; None while there is none (`on_ready` will be called)."""
        hold = self._hold
        if hold is not None:
            if hold.awaited:
                return None
            self._hold = None
            if not self._unattached and not self._lack_bytes(hold.results):
                self._publisher.tell_later(self)  # there may be a newer state already
                return ViewChange(hold.ts, self._give(hold.results))
            self._keep(hold.results)
        if self._publisher.is_passing:
            self._publisher.tell_later(self)
            return None
        while self._unattached:
            if not self._publisher.has_time:
                self._publisher.tell_later(self)
                return None
            query_id = next(iter(self._unattached))
            del self._unattached[query_id]
            with self._publisher.cache:
                live_query = self._live_queries[query_id] = self._publisher.find(self._asks[query_id], self.identity)
                self._changed.add(query_id)
                self._publisher.attach(self, query_id, live_query)
        results = self._refilled()
        if self._waiting or self._unattached:
            return None  # the publisher tells when that has changed
        self._publisher.has_newest(self)
        return ViewChange(self._publisher.ts, self._give(results))

    def close(self) -> None:
        """Ask nothing any more."""
        self._publisher.views.discard(self)
        for query_id in list(self._asks):
            self.remove(query_id)

    # -- called by the publisher

    def reattach(self, query_id: int) -> None:
        """The live query behind this id does not suit any more: another one is looked for at the next `take`."""
        live_query = self._live_queries.get(query_id)
        if live_query is not None:
            ask = self._asks[query_id]
            self._asks[query_id] = Ask(ask.path, ask.arguments, live_query.journal)
            self._detach(query_id)
        self._unattached[query_id] = None

    def reattach_all(self) -> None:
        """The app's code has changed."""
        self._hold = None
        self._waiting.clear()
        for query_id in list(self._live_queries):
            self.reattach(query_id)

    def held(self, query_id: int) -> LiveQuery | None:
        """The live query behind this id; None while there is none."""
        return self._live_queries.get(query_id)

    def changed(self, query_ids: set[int]) -> None:
        """These have a new result."""
        self._changed |= query_ids

    def wait_for(self, live_query: LiveQuery) -> None:
        """This one has no result at the published timestamp; it runs in a round to come."""
        self._waiting.add(live_query)

    def no_longer_waits_for(self, live_query: LiveQuery) -> None:
        """It holds this one no more, and depends on it no more."""
        if self not in live_query.watchers and self not in live_query.dependents:
            self._waiting.discard(live_query)
            if self._hold is not None:
                self._hold.awaited.pop(live_query, None)

    def hold(self, ts: int, live_query: LiveQuery) -> None:
        """A round at `ts` runs this one; all others are settled at `ts` (invariant 2)."""
        if self._unattached:
            return  # not all of the view is there at `ts`
        if self._hold is None or not self._hold.awaited:  # one that is done and was not taken: this one is newer
            self._hold = _Hold(ts, self._newest())
        assert self._hold.ts == ts, "one round at a time"
        self._hold.awaited[live_query] = None

    def settled(self, live_query: LiveQuery, query_ids: set[int]) -> None:
        """The round has its result at the timestamp of the hold."""
        self._waiting.discard(live_query)
        if self._hold is not None and live_query in self._hold.awaited:
            del self._hold.awaited[live_query]
            if live_query.result is not None:
                self._hold.results.update(dict.fromkeys(query_ids, live_query.result))

    def ready(self) -> None:
        self._on_ready()

    # -- inside

    def _detach(self, query_id: int) -> None:
        self._changed.discard(query_id)
        live_query = self._live_queries.pop(query_id, None)
        if live_query is not None:
            self._publisher.detach(self, query_id, live_query)
            self.no_longer_waits_for(live_query)
        if self._hold is not None:
            self._hold.results.pop(query_id, None)

    def _newest(self) -> dict[int, Result]:
        """The results that may be news, of queries that are not waited for."""
        newest = {}
        for query_id in self._changed:
            live_query = self._live_queries[query_id]
            if live_query not in self._waiting:
                assert live_query.result is not None, "a settled query has a result"
                newest[query_id] = live_query.result
        return newest

    def _refilled(self) -> dict[int, Result]:
        """The same with their bytes; what the cache has no room for is kept here until all of it can be given."""
        results = self._newest()
        if self._lack_bytes(results):
            self._keep(results)  # the runs below may evict these
            for query_id, result in results.items():
                if self._lacks_bytes(query_id, result):
                    results[query_id] = self._with_bytes(query_id, result)
        return results

    def _with_bytes(self, query_id: int, evicted: Result) -> Result:
        kept = self._kept.get(query_id)
        if kept is not None and kept.digest == evicted.digest:
            return kept
        live_query = self._live_queries.get(query_id)
        if live_query is None:
            return evicted  # the run for another one's bytes has split this one: nothing can be given now
        assert live_query.result is not None, "a settled query has a result"
        if live_query.result.is_evicted:
            self._publisher.refill(live_query)
        self._keep({query_id: live_query.result})
        return live_query.result

    def _keep(self, results: dict[int, Result]) -> None:
        self._kept.update({query_id: result for query_id, result in results.items() if not result.is_evicted})

    def _lacks_bytes(self, query_id: int, result: Result) -> bool:
        return result.is_evicted and self._taken.get(query_id) != result.digest

    def _lack_bytes(self, results: dict[int, Result]) -> bool:
        return any(self._lacks_bytes(query_id, result) for query_id, result in results.items())

    def _give(self, results: dict[int, Result]) -> dict[int, Result]:
        """Of these, what the subscriber does not have yet (invariant 3)."""
        given = {}
        for query_id, result in results.items():
            if self._taken.get(query_id) != result.digest:
                self._taken[query_id] = result.digest
                given[query_id] = result
            live_query = self._live_queries.get(query_id)
            newest = live_query.result if live_query is not None else None
            if newest is not None and (newest is result or newest.digest == result.digest):
                self._changed.discard(query_id)
        self._kept.clear()
        return given
