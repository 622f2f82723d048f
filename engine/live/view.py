"""All that one subscriber asks, always at one timestamp.

    settled ──a commit changes a result──> settled, with changes to take
       │ a query of it runs long                        ▲
       └──> waiting ──its round begins──> held ──its round ends──┘

Invariants
  1. A change that is taken is the state of every query of the view at its `ts`; `ts` never goes back.
  2. While a long query runs at a timestamp, the view is held at that timestamp: the other results that belong to it
     are kept until it is done, whatever is committed meanwhile.
  3. A result is given once; an equal one is not given again.
  4. While the run of a query of it is put off (`deliveries`), what is taken is the last state at which that was right;
     if another one is newer than that, it runs now.
"""

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import msgspec

from engine.identity import Identity
from engine.live.live_query import Ask, LiveQuery, QueryIds, Result

if TYPE_CHECKING:
    from engine.live.publisher import Publisher


_ONLY_SIZE_BYTES_MAX = 64 << 10  # larger ones are rather written in pieces than copied


class ViewChange(msgspec.Struct, frozen=True):
    """What is new since the last change that was taken."""

    ts: int
    results: dict[int, Result]  # by query id; may be empty


class _Hold:
    """A moment that long queries are being run for (invariant 2)."""

    def __init__(self, ts: int, results: dict[int, Result]) -> None:
        self.ts, self.results = ts, results
        self.awaited: dict[LiveQuery, None] = {}


class _Subscription:
    """What is asked under one query id."""

    __slots__ = ("ask", "dependencies", "live_query", "taken")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.live_query: LiveQuery | None = None  # None until it is attached
        self.taken: bytes | None = None  # a digest: a lagging subscriber must not keep old results alive
        self.dependencies: tuple[LiveQuery, ...] = ()  # what it is shared by; set by sharing


class View:
    """The queries of one subscriber. Idle ones are many: what most never need is made when it is needed."""

    __slots__ = (
        "_hold",
        "_kept",
        "_publisher",
        "_subscriptions",
        "_unattached",
        "_waiting",
        "changed",
        "identity",
        "is_due",
        "on_ready",
    )

    def __init__(self, publisher: "Publisher", on_ready: Callable[[], None]) -> None:
        self._publisher = publisher
        self.on_ready = on_ready  # called by the publisher when there is something to take
        self.identity: Identity | None = None
        self._subscriptions: dict[int, _Subscription] = {}
        self._unattached: dict[int, None] = {}  # in the order they came
        self.changed: QueryIds | set[int] | None = None  # have a result that was not taken, perhaps; never empty
        self.is_due = False  # to be told; changed by the publisher
        self._waiting: set[LiveQuery] | None = None  # long queries without a result at the published timestamp
        self._hold: _Hold | None = None
        self._kept: dict[int, Result] | None = None  # with bytes, of a state too large for the cache, being taken
        publisher.views.add(self)

    def add(self, query_id: int, path: str, arguments: bytes, journal: str | None) -> None:
        """Ask a query; its result is in a change that is taken later."""
        assert query_id not in self._subscriptions, "query ids are unique in a view"
        self._subscriptions[query_id] = _Subscription(self._publisher.ask_of(path, arguments, journal))
        self._unattached[query_id] = None
        self._hold = None  # what was held knows nothing of this query

    def remove(self, query_id: int) -> None:
        """No longer ask; nothing happens for an unknown id."""
        if query_id in self._subscriptions:
            self._detach(query_id)
            del self._subscriptions[query_id]
            self._unattached.pop(query_id, None)
            if self._kept is not None:
                self._kept.pop(query_id, None)

    def set_identity(self, identity: Identity | None) -> None:
        """Ask everything as somebody else; queries that read no difference go on as they are."""
        self.identity = identity
        self._hold = None  # what was held was for somebody else
        for query_id, subscription in self._subscriptions.items():
            live_query = subscription.live_query
            if live_query is not None and (live_query.nested or not self._publisher.suits(live_query, identity)):
                self.reattach(query_id)

    def take(self) -> ViewChange | None:
        """The newest state at which every query has a result; None while there is none (`on_ready` will be called)."""
        publisher, hold = self._publisher, self._hold
        if hold is not None:
            if hold.awaited:
                return None
            self._hold = None
            if not self._unattached and not self._lack_bytes(hold.results):
                publisher.tell_later(self)  # there may be a newer state already
                return ViewChange(hold.ts, self._give(hold.results))
            self._keep(hold.results)
        if publisher.is_passing:
            publisher.tell_later(self)
            return None
        if self._unattached and not self._attach():
            publisher.first_runs.wait(self)
            return None
        ts = self._settled_ts() if publisher.deliveries.put_off else publisher.ts
        results = self._refilled()
        if self._waiting or self._unattached:
            return None  # the publisher tells when that has changed
        self.is_due = False
        return ViewChange(ts, self._give(results) if results else results)

    def take_only(self, since_ts: int) -> tuple[int, Result] | None:
        """The one result that is new, if nothing else is: the state at its `ts` is what was taken before, and this.

        None: `take` tells more. This is a fifth of what `take` costs, for results that many wait for.
        """
        changed = self.changed
        if changed is None or len(changed) != 1 or self._unattached or self._waiting or self._hold is not None:
            return None
        (query_id,) = changed
        subscription = self._subscriptions[query_id]
        live_query = subscription.live_query
        assert live_query is not None, "only what is attached changes"
        result = live_query.result
        assert result is not None, "a settled query has a result"
        if result.value is None or len(result.value) > _ONLY_SIZE_BYTES_MAX or result.ts < since_ts:
            return None
        deliveries = self._publisher.deliveries
        if deliveries.put_off and deliveries.is_another_put_off(self, live_query):
            return None
        digest = result.digest
        if subscription.taken == digest:
            return None
        subscription.taken = digest
        self.changed = None
        return query_id, result

    def close(self) -> None:
        """Ask nothing any more."""
        self._publisher.views.discard(self)
        self._publisher.first_runs.forget(self)
        for query_id in list(self._subscriptions):
            self.remove(query_id)
        self.is_due = False

    # -- called by the publisher

    def reattach(self, query_id: int) -> None:
        """The live query behind this id does not suit any more: another one is looked for at the next `take`."""
        subscription = self._subscriptions[query_id]
        if subscription.live_query is not None:
            ask = subscription.ask
            journal = subscription.live_query.journal
            if journal != ask.journal:
                subscription.ask = Ask(ask.path, ask.arguments, journal)
            self._detach(query_id)
        self._unattached[query_id] = None

    def move(self, query_id: int, live_query: LiveQuery) -> None:
        """Another live query has been found for this id, which has a result."""
        self.reattach(query_id)
        del self._unattached[query_id]
        self._hold = None  # what was held knows nothing of this result
        self._attach_to(query_id, live_query)

    def reattach_all(self) -> None:
        """The app's code has changed."""
        self._hold = None
        self._waiting = None
        for query_id, subscription in self._subscriptions.items():
            if subscription.live_query is not None:
                self.reattach(query_id)

    def held(self, query_id: int) -> LiveQuery | None:
        """The live query behind this id; None while there is none."""
        subscription = self._subscriptions.get(query_id)
        return None if subscription is None else subscription.live_query

    def mark(self, query_ids: Iterable[int]) -> None:
        """These have a new result."""
        if isinstance(self.changed, set):
            self.changed.update(query_ids)
        else:
            self.changed = {*(self.changed or ()), *query_ids}

    def dependencies_of(self, query_id: int) -> tuple[LiveQuery, ...]:
        """What the live query behind this id is shared by."""
        return self._subscriptions[query_id].dependencies

    def depend_on(self, query_id: int, dependencies: tuple[LiveQuery, ...]) -> None:
        """It is shared by these from now on; for sharing."""
        self._subscriptions[query_id].dependencies = dependencies

    def wait_for(self, live_query: LiveQuery) -> None:
        """This one has no result at the published timestamp; it runs in a round to come."""
        if self._waiting is None:
            self._waiting = set()
        self._waiting.add(live_query)

    def no_longer_waits_for(self, live_query: LiveQuery) -> None:
        """It holds this one no more, and depends on it no more."""
        if self not in live_query.watchers and self not in live_query.dependents:
            if self._waiting:
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

    def let_go(self) -> None:
        """The round ends before it has run all: what was held for it is not shown."""
        self._hold = None

    def settled(self, live_query: LiveQuery, query_ids: QueryIds) -> None:
        """The round has its result at the timestamp of the hold."""
        if self._waiting:
            self._waiting.discard(live_query)
        if self._hold is not None and live_query in self._hold.awaited:
            del self._hold.awaited[live_query]
            if live_query.result is not None:
                self._hold.results.update(dict.fromkeys(query_ids, live_query.result))

    # -- inside

    def _attach(self) -> bool:
        """Find a live query for each ask that has none; False when others are to have the loop before all is done."""
        publisher = self._publisher
        while self._unattached:
            if not publisher.first_runs.has_time():
                return False
            query_id = next(iter(self._unattached))
            del self._unattached[query_id]
            with publisher.cache:
                self._attach_to(query_id, publisher.find(self._subscriptions[query_id].ask, self.identity))
        self._unattached = {}  # the emptied one keeps its table
        return True

    def _attach_to(self, query_id: int, live_query: LiveQuery) -> None:
        self._subscriptions[query_id].live_query = live_query
        self.mark((query_id,))
        self._publisher.attach(self, query_id, live_query)

    def _detach(self, query_id: int) -> None:
        self._unmark((query_id,))
        subscription = self._subscriptions[query_id]
        live_query, subscription.live_query = subscription.live_query, None
        if live_query is not None:
            self._publisher.detach(self, query_id, live_query)
            self.no_longer_waits_for(live_query)
        if self._hold is not None:
            self._hold.results.pop(query_id, None)

    def _unmark(self, query_ids: Collection[int]) -> None:
        changed = self.changed
        if changed is None:
            return
        left = [each for each in changed if each not in query_ids]
        self.changed = set(left) if left else None

    def _settled_ts(self) -> int:
        """The newest timestamp at which all queries that run are right; what stands in the way of any is run now."""
        publisher = self._publisher
        put_off = publisher.deliveries.put_off_of(self)
        if not put_off:
            return publisher.ts
        ts = min(waiting.ts for _, waiting in put_off)
        newest = self._newest()
        if self._waiting or any(result.ts > ts for result in newest.values()) or self._lack_bytes(newest):
            for live_query, _ in put_off:
                publisher.refill(live_query)
            return publisher.ts
        for _, waiting in put_off:
            waiting.views[self] = None
        return ts

    def _newest(self) -> dict[int, Result]:
        """The results that may be news, of queries that are not waited for."""
        newest: dict[int, Result] = {}
        for query_id in self.changed or ():
            live_query = self._subscriptions[query_id].live_query
            assert live_query is not None, "only what is attached changes"
            if not self._waiting or live_query not in self._waiting:
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
        kept = self._kept.get(query_id) if self._kept is not None else None
        if kept is not None and kept.digest == evicted.digest:
            return kept
        live_query = self.held(query_id)
        if live_query is None:
            return evicted  # the run for another one's bytes has split this one: nothing can be given now
        assert live_query.result is not None, "a settled query has a result"
        if live_query.result.is_evicted:
            self._publisher.refill(live_query)
        self._keep({query_id: live_query.result})
        return live_query.result

    def _keep(self, results: dict[int, Result]) -> None:
        if self._kept is None:
            self._kept = {}
        self._kept.update({query_id: result for query_id, result in results.items() if not result.is_evicted})

    def _lacks_bytes(self, query_id: int, result: Result) -> bool:
        return result.is_evicted and self._subscriptions[query_id].taken != result.digest

    def _lack_bytes(self, results: dict[int, Result]) -> bool:
        return any(self._lacks_bytes(query_id, result) for query_id, result in results.items())

    def _give(self, results: dict[int, Result]) -> dict[int, Result]:
        """Of these, what the subscriber does not have yet (invariant 3)."""
        given = {}
        settled = set()
        for query_id, result in results.items():
            subscription = self._subscriptions[query_id]
            if subscription.taken != result.digest:
                subscription.taken = result.digest
                given[query_id] = result
            live_query = subscription.live_query
            newest = live_query.result if live_query is not None else None
            if newest is not None and (newest is result or newest.digest == result.digest):
                settled.add(query_id)
        self._unmark(settled)  # not all of them need be marked: a round may have found no change
        self._kept = None
        return given
