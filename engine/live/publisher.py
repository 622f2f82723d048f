"""From a commit to the subscribers whose results it changed.

    commit ─> affected live queries ─> each run once on the published snapshot ─> views with a change are told
                                          └─ holds the loop for run_slow_ms: abandoned, runs in the next round

A *round* runs the long queries, one after another, on a snapshot of its own, pausing for the loop every run_slow_ms. It
takes all that wait when it begins, so every long query of a view is run at one timestamp and none starves.

Invariants
  1. After a pass every live query that is watched is clean, or waits for a round.
  2. A live query runs once per pass or round, however many watch it, and only if a write fell into its read set.
  3. The next commit is published only after the pass for this one is over.
  4. Results that nobody watches go as soon as a commit touches them.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from engine.clock import Clock, cpu_clock
from engine.errors import InternalError, RequestError
from engine.events import Events, QueryRan, ResultChanged, ResultUnchanged
from engine.functions.run import RanLong
from engine.functions.runner import QueryRun, Runner
from engine.identity import Caller, Identity, Part
from engine.live.invalidation import InvalidationIndex
from engine.live.live_query import Ask, LiveQuery, Result, Variant, variant_of
from engine.live.results import ResultCache
from engine.live.view import View
from engine.storage.connections import SnapshotReader
from engine.transaction.read_set import ReadSet
from engine.transaction.snapshots import Snapshots
from engine.transaction.transaction import Catalog, ReadTransaction
from engine.transaction.write_set import WriteSet

_cpu = cpu_clock()
_Key = tuple[str, bytes, str | None]  # function path, canonical arguments, journal that it starts from


class Publisher:
    """The live queries of one engine."""

    def __init__(
        self,
        runner: Runner,
        snapshots: Snapshots,
        catalog: Catalog,
        clock: Clock,
        events: Events,
        on_fatal: Callable[[InternalError], None],
    ) -> None:
        self._runner, self._snapshots, self.catalog = runner, snapshots, catalog
        self._clock, self._events, self._on_fatal = clock, events, on_fatal
        self.ts = snapshots.ts  # published
        self.is_passing = False  # a pass is under way: views take nothing
        self.views: set[View] = set()
        self._index: InvalidationIndex[LiveQuery] = InvalidationIndex()
        self._listed: dict[_Key, dict[tuple[Part, ...], dict[Variant, LiveQuery]]] = {}
        self._new: dict[tuple[Any, ...], LiveQuery] = {}  # those that never ran: what they read is not known
        self._cache = ResultCache(runner.limits, self._drop)
        self._ready: dict[View, None] = {}  # to be told when the pass is over
        self._tell_is_due = False
        self._turn_is_open = False
        self._turn_end = 0.0  # when initial runs leave the loop to others
        self._long_paths: set[str] = set()  # functions that ran long the last time
        self._long_waiting: dict[LiveQuery, None] = {}
        self._round: asyncio.Task[None] | None = None
        self._round_members: dict[LiveQuery, None] = {}  # of the round under way, not run yet
        self._round_writes = WriteSet()  # committed since it began

    # -- what views call

    def find(self, ask: Ask, identity: Identity | None) -> LiveQuery:
        """The live query for an ask: one that runs already, if the asker may share it, else a new one."""
        try:
            call = self._runner.resolve("query", ask.path, ask.arguments)
        except RequestError as error:  # no such function, wrong arguments: a result like any other, but not shared
            live_query = LiveQuery(ask, None, identity)
            failure = self._runner.failures.of(error, ask.path)
            live_query.result = Result(ts=self.ts, value=None, failure=failure, journal=ask.journal, log_lines=())
            live_query.is_dirty = False
            return live_query
        key = (call.function.path, call.arguments.canonical, ask.journal)
        variants = []
        for parts, by_variant in self._listed.get(key, {}).items():
            variant = variant_of(identity, list(parts))
            found = by_variant.get(variant)
            if found is not None:
                return found
            variants.append(variant)
        # as far as is known they can share what has not run yet; if not, the run splits them
        new_key = (*key, tuple(variants))
        waiting = self._new.get(new_key)
        if waiting is not None:
            return waiting
        live_query = self._new[new_key] = LiveQuery(ask, call, identity)
        live_query.new_key = new_key
        return live_query

    def attach(self, view: View, query_id: int, live_query: LiveQuery) -> None:
        """The view holds the query under this id from now on; one without a result is run at once."""
        live_query.watchers.setdefault(view, set()).add(query_id)
        self._cache.use(live_query)
        if live_query in self._long_waiting or live_query in self._round_members:
            view.wait_for(live_query)
        elif live_query.is_dirty:
            self._run(live_query)

    def detach(self, view: View, query_id: int, live_query: LiveQuery) -> None:
        """The view no longer holds the query under this id. The result stays for the next who asks, for a while."""
        query_ids = live_query.watchers[view]
        query_ids.discard(query_id)
        if query_ids:
            return
        del live_query.watchers[view]
        if live_query.watchers:
            return
        result = live_query.result
        if live_query.is_dirty or not live_query.keys or result is None or result.value is None:
            self._drop(live_query)
        else:
            self._cache.leave(live_query)

    def refill(self, live_query: LiveQuery) -> None:
        """Get the bytes of an evicted result again, unless a round will."""
        if live_query not in self._long_waiting and live_query not in self._round_members:
            self._run(live_query)

    @property
    def has_time(self) -> bool:
        """Whether initial runs may go on in this turn of the loop; all views share its run_slow_ms. One always may."""
        now = _cpu()
        if self._turn_is_open:
            return now < self._turn_end
        self._turn_is_open = True
        self._turn_end = now + self._slice_seconds
        asyncio.get_running_loop().call_soon(self._close_turn)
        return True

    def tell_later(self, view: View) -> None:
        """Call the view's `on_ready` in the next turn of the loop, or after the pass."""
        self._ready[view] = None
        if not self._tell_is_due and not self.is_passing:
            self._tell_is_due = True
            asyncio.get_running_loop().call_soon(self._tell)

    def has_newest(self, view: View) -> None:
        """The view took all there is: nothing is left to be told."""
        self._ready.pop(view, None)

    # -- what the engine calls

    async def publish(self, ts: int, write_set: WriteSet) -> None:
        """Readers show `ts` now; run what the writes touch and tell who sees a change."""
        self.ts = ts
        if self._round is not None:
            self._round_writes.merge(write_set)
        affected = self._index.affected(write_set)
        if not affected:
            self._begin_round()
            return
        self.is_passing = True
        turn_end = _cpu() + self._slice_seconds
        for live_query in affected:
            if not live_query.watchers:
                self._drop(live_query)  # invariant 4
                continue
            live_query.is_dirty = True
            if live_query in self._long_waiting or live_query in self._round_members:
                continue
            self._run(live_query)
            if _cpu() > turn_end:
                await asyncio.sleep(0)
                turn_end = _cpu() + self._slice_seconds
        self.is_passing = False
        self._begin_round()
        self._tell()

    def reload(self, catalog: Catalog) -> None:
        """The code has changed: every subscriber gets what the new code returns."""
        self.catalog = catalog
        self._long_waiting.clear()
        self._long_paths.clear()
        for view in self.views:
            view.reattach_all()
            self.tell_later(view)
        self._index = InvalidationIndex()
        self._listed.clear()
        self._new.clear()
        self._cache.clear()

    async def ask_once(self, path: str, arguments: bytes, identity: Identity | None) -> Result:
        """What a query returns now, from the shared result if there is one."""
        ready = asyncio.Event()
        view = View(self, ready.set)
        try:
            view.identity = identity
            view.add(0, path, arguments, None)
            while True:
                change = view.take()
                if change is not None:
                    return change.results[0]
                await ready.wait()
                ready.clear()
        finally:
            view.close()

    @property
    def is_idle(self) -> bool:
        """Whether every watched query is clean and every view has been told."""
        return self._round is None and not self._long_waiting and not self._ready and not self.is_passing

    async def close(self) -> None:
        if self._round is not None:
            self._round.cancel()
            await asyncio.gather(self._round, return_exceptions=True)

    # -- listing

    def _list(self, live_query: LiveQuery, journals: set[str | None]) -> bool:
        """List a live query under these starting journals; False if another one gives its callers the same already."""
        assert live_query.call is not None
        self._unlist(live_query)
        path, canonical = live_query.call.function.path, live_query.call.arguments.canonical
        parts, variant = tuple(part for part, _ in live_query.variant), live_query.variant
        same_page = self._listed.get((path, canonical, live_query.journal), {}).get(parts, {}).get(variant)
        serving = same_page or live_query
        if serving.is_dirty:  # it is about to change: asks under another journal may not rely on it
            return False
        for journal in journals:
            key = (path, canonical, journal)
            by_variant = self._listed.setdefault(key, {}).setdefault(parts, {})
            if by_variant.setdefault(variant, serving) is serving:
                serving.keys.add((key, parts, variant))
        return serving is live_query

    def _unlist(self, live_query: LiveQuery) -> None:
        for key, parts, variant in live_query.keys:
            by_parts = self._listed.get(key, {})
            by_variant = by_parts.get(parts, {})
            if by_variant.get(variant) is live_query:
                del by_variant[variant]
                if not by_variant:
                    del by_parts[parts]
                    if not by_parts:
                        del self._listed[key]
        live_query.keys.clear()
        if self._new.get(live_query.new_key) is live_query:
            del self._new[live_query.new_key]

    def _drop(self, live_query: LiveQuery) -> None:
        self._unlist(live_query)
        self._index.remove(live_query)
        self._cache.forget(live_query)
        self._long_waiting.pop(live_query, None)

    # -- running

    def _run(self, live_query: LiveQuery) -> None:
        """Run on the published snapshot; what would hold the loop waits for a round."""
        call = live_query.call
        assert call is not None, "what could not be resolved is never dirty"
        if call.function.path in self._long_paths:
            self._wait_for_round(live_query)
            return
        if live_query.watchers:
            live_query.identity = next(iter(live_query.watchers)).identity
        transaction = ReadTransaction(self._snapshots.reader, self.catalog, self._runner.limits)
        try:
            run = self._runner.run_query(
                call, Caller(live_query.identity), transaction, self._now_ms(), live_query.journal
            )
        except RanLong:
            self._long_paths.add(call.function.path)
            self._wait_for_round(live_query)
            return
        self._finish(live_query, run, self.ts)

    def _finish(self, live_query: LiveQuery, run: QueryRun, ts: int) -> None:
        """Take over what a run gave."""
        call, old, started_from = live_query.call, live_query.result, live_query.journal
        assert call is not None
        result = Result(ts=ts, value=run.value, failure=run.failure, journal=run.journal, log_lines=run.log_lines)
        events = self._events
        if events.listeners:
            events.emit(QueryRan(call.function.path, ts))
        live_query.is_dirty = False
        self._index.put(live_query, run.read_set)
        if old is not None and result.looks_like(old):
            if events.listeners:
                events.emit(ResultUnchanged(call.function.path, ts))
            if old.is_evicted:
                live_query.result = result
        else:
            live_query.result = result
            for view, query_ids in live_query.watchers.items():
                view.changed(query_ids)
                self.tell_later(view)
            if events.listeners:
                events.emit(ResultChanged(call.function.path, ts))
        self._cache.put(live_query)
        variant = tuple((part, repr(value)) for part, value in run.parts.items())
        # a page that ran again from its journal no longer is what one asks who starts without
        journals = {started_from, live_query.journal}
        if variant != live_query.variant or journals != {key[2] for key, _, _ in live_query.keys}:
            live_query.variant = variant
            is_listed = self._list(live_query, journals)
            for view in list(live_query.watchers):
                # a re-run that reads more of the identity splits its subscribers
                if not is_listed or not live_query.suits(view.identity):
                    for query_id in list(live_query.watchers[view]):
                        view.reattach(query_id)
                    self.tell_later(view)

    # -- long queries

    def _wait_for_round(self, live_query: LiveQuery) -> None:
        live_query.is_dirty = True
        self._long_waiting[live_query] = None
        for view in live_query.watchers:
            view.wait_for(live_query)
        if not self.is_passing:
            self._begin_round()

    def _begin_round(self) -> None:
        """Run all long queries that wait, unless a round is under way."""
        if self.is_passing or self._round is not None or not self._long_waiting:
            return
        ts, now_ms, reader = self.ts, self._now_ms(), self._snapshots.lend(self.ts)
        assert reader is not None, "the published snapshot is always there"
        self._round_members, self._long_waiting = self._long_waiting, {}
        self._round_writes = WriteSet()
        for live_query in self._round_members:
            for view in live_query.watchers:
                view.hold(self.ts, live_query)

        async def run_round() -> None:
            try:
                await self._run_round(reader, ts, now_ms)
            except InternalError as error:
                self._on_fatal(error)
            except Exception as error:  # noqa: BLE001 - a bug of ours: nobody else would hear of it
                fatal = InternalError(f"a round of long queries failed: {type(error).__name__}: {error}")
                fatal.__cause__ = error
                self._on_fatal(fatal)
            finally:
                self._snapshots.give_back(reader)

        self._round = asyncio.create_task(run_round())

    async def _run_round(self, reader: SnapshotReader, ts: int, now_ms: float) -> None:
        while self._round_members:
            live_query = next(iter(self._round_members))
            call = live_query.call
            assert call is not None
            if live_query.watchers:
                live_query.identity = next(iter(live_query.watchers)).identity
                transaction = ReadTransaction(reader, self.catalog, self._runner.limits)
                run = await self._runner.run_long_query(
                    call, Caller(live_query.identity), transaction, now_ms, live_query.journal
                )
                if run.duration_seconds < self._slice_seconds / 2:
                    self._long_paths.discard(call.function.path)
            self._round_members.pop(live_query, None)
            if not live_query.watchers:
                self._drop(live_query)
                continue
            watchers = list(live_query.watchers.items())
            self._finish(live_query, run, ts)
            for view, query_ids in watchers:
                view.settled(live_query, query_ids)
                self.tell_later(view)
            if _touches(run.read_set, self._round_writes):
                self._wait_for_round(live_query)
        self._round = None
        self._begin_round()

    def _close_turn(self) -> None:
        self._turn_is_open = False

    def _now_ms(self) -> float:
        return self._clock.wall_ns() / 1_000_000

    @property
    def _slice_seconds(self) -> float:
        return self._runner.limits.run_slow_ms / 1000

    def _tell(self) -> None:
        self._tell_is_due = False
        if self.is_passing:
            return  # its end tells
        ready, self._ready = self._ready, {}
        for view in ready:
            view.ready()


def _touches(read_set: ReadSet, writes: WriteSet) -> bool:
    index: InvalidationIndex[str] = InvalidationIndex()
    index.put("run", read_set)
    return bool(index.affected(writes))
