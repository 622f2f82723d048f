"""From a commit to the subscribers whose results it changed.

    commit ─> affected live queries ─> each run once on the published snapshot ─> views with a change are told
                                          ├─ holds the loop for run_slow_ms: abandoned, runs in the next round
                                          └─ its watchers have had their share of a long pass: runs in the next round

A *round* runs the long queries, one after another, on a snapshot of its own, pausing for the loop every run_slow_ms. It
takes all that wait when it begins, so every long query of a view is run at one timestamp and none starves.

Invariants
  1. After a pass every live query that is watched is clean, or waits for a round, or was put off (`deliveries`).
  2. A live query runs once per pass or round, however many watch it, and only if a write fell into its read set; what
     was put off runs once for all the commits of that time.
  3. The next commit is published only after the pass for this one is over.
  4. Results that nobody watches go as soon as a commit touches them.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

import msgspec

from engine import faults
from engine.clock import Clock, cpu_clock, give_way
from engine.errors import InternalError, RequestError
from engine.events import Cause, Events, QueryRan, Reran, ResultChanged, ResultUnchanged
from engine.functions.outcomes import Call, NestedQuery, Outcome, QueryRun
from engine.functions.run import Known, RanLong
from engine.functions.runner import Runner
from engine.identity import Caller, Identity
from engine.live.asks import Asks
from engine.live.causes import Written, cause_of
from engine.live.deliveries import Deliveries
from engine.live.first_runs import FirstRuns
from engine.live.invalidation import InvalidationIndex
from engine.live.live_query import Ask, LiveQuery, Result
from engine.live.moments import Moments
from engine.live.results import ResultCache
from engine.live.shares import Shares
from engine.live.sharing import Sharing
from engine.live.view import View
from engine.storage.connections import SnapshotReader
from engine.transaction.kept import Kept
from engine.transaction.read_set import ReadSet
from engine.transaction.reading import Catalog, ReadTransaction
from engine.transaction.snapshots import Snapshots
from engine.transaction.write_set import WriteSet

_cpu = cpu_clock()


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
        ask_for_commit: Callable[[], bool],
    ) -> None:
        self._runner, self._snapshots, self.catalog = runner, snapshots, catalog
        self._clock, self._events, self._on_fatal = clock, events, on_fatal
        self.ts = snapshots.ts  # published
        self.kept = Kept(runner.limits)  # of the published snapshot
        self.is_passing = False  # a pass is under way: views take nothing
        self.views: set[View] = set()
        self._index: InvalidationIndex[LiveQuery] = InvalidationIndex()
        self._sharing = Sharing(self._run_unless_it_waits, self._use, self._release)
        self.cache = ResultCache(runner.limits, self._drop)
        self.deliveries = Deliveries(runner.limits, self._run_put_off)
        self._asks = Asks(partial(runner.resolve, "query"))
        self.first_runs = FirstRuns(self._slice_seconds, lambda: _cpu(), self.tell_later)
        self._long_paths: set[str] = set()  # functions that ran long the last time
        self._long_waiting: dict[LiveQuery, None] = {}
        self._round: asyncio.Task[None] | None = None
        self._round_members: dict[LiveQuery, None] = {}  # of the round under way, not run yet
        self._round_writes = WriteSet()  # committed since it began
        self._moments = Moments(clock, runner.limits, ask_for_commit, self._drop)

    # -- what views call

    def ask_of(self, path: str, arguments: bytes, journal: str | None) -> Ask:
        """This ask, as one object for all who ask it."""
        return self._asks.ask(path, arguments, journal)

    def find(self, ask: Ask, identity: Identity | None) -> LiveQuery:
        """The live query for an ask: one that runs already, if the asker may share it, else a new one."""
        try:
            call = self._asks.call(ask)
        except RequestError as error:  # no such function, wrong arguments: a result like any other, but not shared
            live_query = LiveQuery(ask, None, identity, is_restricted=True)
            failure = self._runner.failures.of(error, ask.path)
            live_query.result = Result(self.ts, Outcome(None, failure, ()), ask.journal)
            live_query.is_dirty = False
            return live_query
        return self._sharing.find(ask, call, identity, is_restricted=True)

    def attach(self, view: View, query_id: int, live_query: LiveQuery) -> None:
        """The view holds the query under this id from now on; one without a result is run at once."""
        live_query.watchers[view] = (*live_query.watchers.get(view, ()), query_id)
        self.cache.use(live_query)
        if live_query in self._long_waiting or live_query in self._round_members:
            view.wait_for(live_query)
        elif live_query.is_dirty:
            self._run(live_query)
        if view.held(query_id) is live_query:  # else the run has shown that it is not right for this caller
            self._sharing.depend(view, query_id, live_query)

    def detach(self, view: View, query_id: int, live_query: LiveQuery) -> None:
        """The view no longer holds the query under this id. The result stays for the next who asks, for a while."""
        self._sharing.forget(view, query_id)
        left = tuple(each for each in live_query.watchers[view] if each != query_id)
        if left:
            live_query.watchers[view] = left
        else:
            del live_query.watchers[view]
            if not live_query.is_watched:
                self._release(live_query)

    def suits(self, live_query: LiveQuery, identity: Identity | None) -> bool:
        """Whether the result is right for this caller too."""
        return self._sharing.suits(live_query, identity)

    def refill(self, live_query: LiveQuery) -> None:
        """Get the bytes of an evicted result again, unless a round will."""
        self._run_unless_it_waits(live_query)

    def tell_later(self, view: View) -> None:
        """Call the view's `on_ready` in a turn to come, after the pass if there is one."""
        self.deliveries.tell_later(view)

    # -- what the engine calls

    async def publish(self, ts: int, write_set: WriteSet, writers: Iterable[Written] = ()) -> None:
        """Readers show `ts` now; run what the writes touch and tell who sees a change.

        `writers` are those who wrote, for whoever wants to know why queries run.
        """
        last_ts, self.ts = self.ts, ts
        if faults.plan is not None:
            faults.plan.reach("publish.begun")
        if self._round is not None:
            self._round_writes.merge(write_set)
        affected = self._index.affected(write_set) | self._moments.due()
        if not affected:
            self._begin_round()
            return
        self.is_passing = True
        self.deliveries.hold()
        turn_end = _cpu() + self._slice_seconds
        for live_query in affected:  # all of them first: one may be needed to know who shares another
            if live_query.is_watched:
                live_query.is_dirty = True
                if self._events.is_traced:
                    read_set = self._index.read_set_of(live_query)
                    live_query.cause = cause_of(ts, read_set, writers, self.catalog)
            else:
                self._drop(live_query)  # invariant 4
        shares: Shares | None = None  # None: the pass is no longer than a slice so far
        for live_query in affected:
            is_to_run = live_query.is_dirty and live_query.is_watched and not self._waits(live_query)
            if is_to_run and not self.deliveries.try_to_put_off(live_query, last_ts):
                if shares is None:
                    self._run(live_query)
                elif shares.are_used_up(live_query):
                    self._wait_for_round(live_query)
                else:
                    began = _cpu()
                    self._run(live_query)
                    shares.add(live_query, _cpu() - began)
            if faults.plan is not None:
                await faults.plan.pause("publish.passing")
            if _cpu() > turn_end:
                await give_way()
                turn_end = _cpu() + self._slice_seconds
                shares = shares or Shares(self._runner.limits.pass_share_ms / 1000)
        self.is_passing = False
        self._begin_round()
        self.deliveries.release()

    def reload(self, catalog: Catalog) -> None:
        """The code has changed: every subscriber gets what the new code returns."""
        self.catalog = catalog
        self.kept.clear()
        self._long_waiting.clear()
        self._long_paths.clear()
        self._asks.clear()
        self.deliveries.clear()
        for view in self.views:
            view.reattach_all()
            self.tell_later(view)
        self._index = InvalidationIndex()
        self._moments.clear()
        self._sharing.clear()
        self.cache.clear()

    async def ask_once(self, path: str, arguments: bytes, identity: Identity | None) -> Result:
        """What a query returns now, from the shared result if there is one."""
        result = self._result_now(path, arguments, identity)
        if result is not None:  # 0.3 × the CPU of a view, for a result that is there
            return result
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
        is_running = self._round is not None or bool(self._long_waiting) or self.is_passing
        return not is_running and self.deliveries.is_idle and self.first_runs.is_idle

    async def close(self) -> None:
        self._moments.close()
        self.deliveries.close()
        if self._round is not None:
            self._round.cancel()
            await asyncio.gather(self._round, return_exceptions=True)

    def _result_now(self, path: str, arguments: bytes, identity: Identity | None) -> Result | None:
        """The result that is there, or that a short run gives; None: somebody has to wait for it."""
        if self.is_passing:
            return None
        with self.cache:
            live_query = self.find(Ask(path, arguments, None), identity)
            if not live_query.is_dirty:
                self.cache.use(live_query)
            elif live_query.identity is identity and not live_query.is_watched and self.first_runs.has_time():
                self._run_unless_it_waits(live_query)  # nobody else's run, which might turn out to be theirs alone
            if not live_query.is_watched and live_query not in self._round_members:
                self._release(live_query)
            result = None if live_query.is_dirty else live_query.result
        return None if result is None or result.is_evicted else result

    # -- keeping

    def _drop(self, live_query: LiveQuery) -> None:
        self._sharing.unlist(live_query)
        self._index.remove(live_query)
        self._moments.put(live_query, None)
        self.cache.forget(live_query)
        self.deliveries.has_run(live_query)
        self._long_waiting.pop(live_query, None)

    def _use(self, live_query: LiveQuery) -> None:
        self.cache.use(live_query)

    def _release(self, live_query: LiveQuery) -> None:
        """Nobody watches it any more: it is kept for the next who asks, until a commit touches it or room is needed."""
        result = live_query.result
        if live_query.is_dirty or not live_query.keys or result is None or not result.is_repeatable:
            self._drop(live_query)
        else:
            self.cache.leave(live_query)

    # -- running

    def _run_unless_it_waits(self, live_query: LiveQuery) -> None:
        if not self._waits(live_query):
            self._run(live_query)

    def _waits(self, live_query: LiveQuery) -> bool:
        """Whether a round will run it."""
        return live_query in self._long_waiting or live_query in self._round_members

    def _run_put_off(self, live_query: LiveQuery) -> None:
        try:
            self._run(live_query)
        except Exception as error:  # noqa: BLE001 - a bug of ours: nobody else would hear of it
            self._on_fatal(_bug("a live query that was put off", error))

    def _run(self, live_query: LiveQuery) -> None:
        """Run on the published snapshot; what would hold the loop waits for a round."""
        self.deliveries.has_run(live_query)
        call = live_query.call
        assert call is not None, "what could not be resolved is never dirty"
        if call.function.path in self._long_paths:
            self._wait_for_round(live_query)
            return
        if live_query.nested and not self._choose_identity(live_query):
            return
        if not live_query.nested and live_query.is_watched:  # of somebody who is still there
            live_query.identity = next(iter(live_query.watchers or live_query.dependents)).identity
        identity = live_query.identity
        run = self._run_short(live_query, call)
        if run is None and self._round is not None:
            run = self._run_short(live_query, call)  # perhaps the machine was busy; else it waits for a whole round
        if run is None:
            self._long_paths.add(call.function.path)
            self._wait_for_round(live_query)
            return
        if run.nested and (self._round_members or self._long_waiting) and self._called_what_waits(run, identity):
            self._wait_for_round(live_query)  # who shares it is not known before; until then it would run in vain
            return
        self._finish(live_query, run, self.ts)

    def _run_short(self, live_query: LiveQuery, call: Call) -> QueryRun | None:
        """A run on the published snapshot; None: it would hold the loop."""
        transaction = ReadTransaction(self._snapshots.reader, self.catalog, self._runner.limits, self.kept)
        identity = live_query.identity
        caller = Caller(identity, is_restricted=live_query.is_restricted)
        known = self._known_at(identity, self.ts)
        try:
            return self._runner.run_query(call, caller, transaction, self._moments.now_ms(), live_query.journal, known)
        except RanLong:
            return None

    def _called_what_waits(self, run: QueryRun, identity: Identity | None) -> bool:
        """Whether a round will run a query that was run inside of this run, too."""
        for nested, inner in run.nested.items():
            live_query = self._sharing.look_up(nested, identity)
            if live_query is not None and self._waits(live_query):
                return True
            if self._called_what_waits(inner, identity):
                return True
        return False

    def _choose_identity(self, live_query: LiveQuery) -> bool:
        """One for whom the queries that it calls still return what it is shared by; the others leave.

        False when there is none: then it does not run.
        """
        for view in [*live_query.watchers, *live_query.dependents]:
            if self._sharing.suits(live_query, view.identity):
                live_query.identity = view.identity
                return True
            self._move(view, live_query)
        if live_query.is_watched:
            self._wait_for_round(live_query)  # what it calls is known after the round
        else:
            self._drop(live_query)
        return False

    def _move(self, view: View, live_query: LiveQuery) -> None:
        """This view finds another live query for what it asked."""
        for query_id in list(live_query.watchers.get(view, ())):
            view.reattach(query_id)
        self.tell_later(view)

    def _finish(self, live_query: LiveQuery, run: QueryRun, ts: int, *, is_part: bool = False) -> None:
        """Take over what a run gave; `is_part`: it was made inside of another one."""
        with self.cache:  # what it is shared by is not watched before the end
            self._take_over(live_query, run, ts, is_part=is_part)

    def _take_over(self, live_query: LiveQuery, run: QueryRun, ts: int, *, is_part: bool) -> None:
        call, old, started_from = live_query.call, live_query.result, live_query.journal
        assert call is not None
        for nested, inner in run.nested.items():
            self._adopt(nested, inner, live_query.identity, ts)
        result = Result(ts, run.outcome, run.journal)
        events = self._events
        if events.listeners and not is_part:
            events.emit(QueryRan(call.function.path, ts))
        live_query.is_dirty = False
        self._index.put(live_query, run.read_set)
        self._moments.put(live_query, run.read_set.rerun_at_ms)
        is_news_to_callers = bool(live_query.dependents) and (old is None or old.token != result.token)
        if old is not None and result.looks_like(old):
            if events.listeners:
                events.emit(ResultUnchanged(call.function.path, ts))
            if old.is_evicted:
                live_query.result = result
        else:
            live_query.result = result
            self.deliveries.spread(live_query)
            if events.listeners and not is_part:
                events.emit(ResultChanged(call.function.path, ts))
        cause = live_query.cause
        if cause is not None:
            is_changed = live_query.result is not old
            events.emit(Reran(call.function.path, live_query.ask.arguments, cause, is_changed))
            live_query.cause = None
        variant = tuple(
            (part, value if isinstance(part, NestedQuery) else repr(value)) for part, value in run.parts.items()
        )
        # a page that ran again from its journal no longer is what one asks who starts without
        journals = {started_from, live_query.journal}
        if variant != live_query.variant or journals != {key[2] for key, *_ in live_query.keys}:
            live_query.variant = variant
            serving = self._sharing.list(live_query, journals)
            for view in list(live_query.watchers):
                # a re-run that reads more of the identity splits its subscribers
                if not self._sharing.suits(serving, view.identity):
                    self._move(view, live_query)
                    continue
                for query_id in list(live_query.watchers.get(view, ())):  # a run inside may move it
                    if serving is live_query:
                        self._sharing.depend(view, query_id, live_query)
                    else:  # now: later, what it is shared by may have left the cache, and would be run in a round again
                        view.move(query_id, serving)
                        self.tell_later(view)
            is_news_to_callers = True
        if is_news_to_callers:
            self._tell_dependents(live_query, cause)
        self.cache.put(live_query)  # after all that it has set off: if one result keeps its bytes, it is this one
        if not live_query.is_watched:
            self._release(live_query)

    def _adopt(self, nested: NestedQuery, run: QueryRun, identity: Identity | None, ts: int) -> None:
        """A query was run inside of another one: that is its own first run, too."""
        live_query = self._sharing.look_up(nested, identity)
        if live_query is None:
            ask = Ask(nested.call.function.path, nested.wire_arguments, None)
            live_query = LiveQuery(ask, nested.call, identity, is_restricted=nested.is_restricted)
        elif live_query.result is None or (live_query.result.is_repeatable and not live_query.result.is_evicted):
            return
        self._finish(live_query, run, ts, is_part=True)

    def _tell_dependents(self, live_query: LiveQuery, cause: Cause | None) -> None:
        """What queries share by has changed: those for whom another one is right now look for it."""
        for view, query_ids in list(live_query.dependents.items()):
            for query_id in list(query_ids):
                held = view.held(query_id)
                if held is None:
                    continue
                if self._sharing.suits(held, view.identity):
                    self._sharing.depend(view, query_id, held)
                else:
                    if cause is not None:  # another result, of a query that need not have run
                        read = f"{cause.read}; so {live_query.path} returned something else"
                        because = msgspec.structs.replace(cause, read=read)
                        self._events.emit(Reran(held.path, held.ask.arguments, because, True))
                    view.reattach(query_id)
                    self.tell_later(view)

    # -- long queries

    def _wait_for_round(self, live_query: LiveQuery) -> None:
        live_query.is_dirty = True
        self._long_waiting[live_query] = None
        for view in [*live_query.watchers, *live_query.dependents]:
            view.wait_for(live_query)
        if not self.is_passing:
            self._begin_round()

    def _begin_round(self) -> None:
        """Run all long queries that wait, unless a round is under way."""
        if self.is_passing or self._round is not None or not self._long_waiting:
            return
        self.deliveries.run_put_off()  # what is held, is held at one timestamp
        if self._round is not None:
            return
        ts, now_ms, reader = self.ts, self._moments.now_ms(), self._snapshots.lend(self.ts)
        assert reader is not None, "the published snapshot is always there"
        self._round_members, self._long_waiting = self._long_waiting, {}
        self._round_writes = WriteSet()
        for live_query in self._round_members:
            for view in {**live_query.watchers, **live_query.dependents}:
                view.hold(self.ts, live_query)

        async def run_round() -> None:
            try:
                await self._run_round(reader, ts, now_ms)
            except Exception as error:  # noqa: BLE001 - a bug of ours: nobody else would hear of it
                self._on_fatal(_bug("a round of long queries", error))
            finally:
                self._snapshots.give_back(reader)

        self._round = asyncio.create_task(run_round())

    async def _run_round(self, reader: SnapshotReader, ts: int, now_ms: float) -> None:
        is_first, turn_end = True, _cpu() + self._slice_seconds
        while self._round_members:
            if _cpu() > turn_end:  # many that pause too rarely by themselves hold the loop as one does
                await give_way()
                turn_end = _cpu() + self._slice_seconds
                if not self._round_members:
                    break
            live_query = next(iter(self._round_members))
            call = live_query.call
            assert call is not None
            if faults.plan is not None:
                await faults.plan.pause("round.running")
            if live_query.is_watched:
                identity = live_query.identity = next(iter(live_query.watchers or live_query.dependents)).identity
                transaction = ReadTransaction(reader, self.catalog, self._runner.limits)
                caller = Caller(identity, is_restricted=live_query.is_restricted)
                run = await self._runner.run_long_query(
                    call, caller, transaction, now_ms, live_query.journal, self._known_at(identity, ts)
                )
                if reader.is_cut and not is_first:  # not its fault: the queries before it took the time
                    self._end_round_early()
                    break
                is_first = False
                if run.duration_seconds < self._slice_seconds / 2:
                    self._long_paths.discard(call.function.path)
            self._round_members.pop(live_query, None)
            if not live_query.is_watched:
                self._drop(live_query)
                continue
            _forget_touched(run.nested, self._round_writes)
            watchers, dependents = dict(live_query.watchers), list(live_query.dependents)
            self._finish(live_query, run, ts)
            for view in {**watchers, **dict.fromkeys(dependents)}:
                view.settled(live_query, watchers.get(view, ()))
                self.tell_later(view)
            if _touches(run.read_set, self._round_writes):
                self._wait_for_round(live_query)
        self._round = None
        self._begin_round()

    def _end_round_early(self) -> None:
        """The snapshot of the round is gone: those that are left wait for the next one, on the newest."""
        for live_query in self._round_members:
            for view in {**live_query.watchers, **live_query.dependents}:
                view.let_go()
        self._long_waiting = {**self._round_members, **self._long_waiting}
        self._round_members = {}

    def _known_at(self, identity: Identity | None, ts: int) -> Known:
        return lambda nested: self._sharing.known(nested, identity, ts)

    @property
    def _slice_seconds(self) -> float:
        return self._runner.limits.run_slow_ms / 1000


def _bug(what: str, error: Exception) -> InternalError:
    if isinstance(error, InternalError):
        return error
    fatal = InternalError(f"{what} failed: {type(error).__name__}: {error}")
    fatal.__cause__ = error
    return fatal


def _forget_touched(nested: dict[NestedQuery, QueryRun], writes: WriteSet) -> None:
    """Leave those, and those inside of them, that are still true."""
    for query, run in list(nested.items()):
        if _touches(run.read_set, writes):
            del nested[query]
        else:
            _forget_touched(run.nested, writes)


def _touches(read_set: ReadSet, writes: WriteSet) -> bool:
    index: InvalidationIndex[str] = InvalidationIndex()
    index.put("run", read_set)
    return bool(index.affected(writes))
