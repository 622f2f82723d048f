"""One engine under test, its subscribers, and everything that must be true of them.

`World` does one thing at a time (commits, subscribes, lets time pass, …) and checks after it, against the oracle:
  - every result a subscriber holds is right at the timestamp of its newest change, changed or not, for who asks;
  - no result that is given has a row in it that the policies hide from who asks, as things stood at its timestamp;
  - timestamps only grow; an equal result is not given again; nobody who has something to take is left untold;
  - a commit, or a moment that has come, runs each query that it touches once for all who share it, and no other.
"""

import asyncio
import itertools
import shutil
import sys
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest

from engine import Config, Engine, Identity, Limits
from engine.events import Committed, Event
from engine.live.live_query import Result
from engine.live.view import ViewChange
from engine.sync.backend import MutationOutcome
from engine.testing import ManualClock
from engine.values import decode_value
from tests.model import stopwatch
from tests.model.asks import PageQuery, PlanQuery
from tests.model.clients import IDENTITIES, Mutation, Request, Subscriber, Subscription, page_of, without_cursors
from tests.model.oracle import Asked, Run
from tests.model.scans import Change, Document, Position, Refused, Snapshot, State, changes_between
from tests.model.schemas import PolicySpec, SchemaSpec
from tests.model.writes import TRIGGER_DEPTH_MAX, Mutating

T = TypeVar("T")

FUNCTIONS = Path(__file__).parent / "functions"
SECONDS_MAX = 30  # a step that takes longer hangs
LIMITS = Limits(
    run_ms_max=60_000,  # so that no run is stopped
    group_commit_ms_max=10_000,  # so that mutations that are sent together are one group, however slow the machine is
    trigger_depth_max=TRIGGER_DEPTH_MAX,
    moment_interval_ms=0,  # so that every moment has its own commit
)


class Taken(NamedTuple):
    """What a subscriber held once it had taken a change."""

    ts: int
    identity: Identity | None
    held: list[tuple[Subscription, Any, str | None]]  # with what it says, and its journal


class World:
    """An engine with subscribers, and the history of what was committed."""

    def __init__(self, schema: SchemaSpec, *, has_small_cache: bool = False) -> None:
        self.schema = schema
        self.subscribers: list[Subscriber] = []
        self.state: State = {}
        self.requests: list[Request] = []  # those that wrote
        self._has_small_cache = has_small_cache
        self._positions: dict[str, tuple[str, Position]] = {}  # by cursor: the list that it is of, and where it is
        self._runner = asyncio.Runner()
        self._patches = pytest.MonkeyPatch()
        for module in ("functions.run", "functions.runner", "live.deliveries", "live.publisher"):
            self._patches.setattr(f"engine.{module}._cpu", stopwatch.cpu)
        self._next_request_id = itertools.count()
        self._directory = Path(tempfile.mkdtemp(prefix="engine-model-"))
        shutil.copytree(FUNCTIONS, self._directory / "functions", ignore=shutil.ignore_patterns("__pycache__"))
        schema.write(self._directory)
        limits = LIMITS
        if has_small_cache:
            limits = msgspec.structs.replace(limits, result_cache_size_bytes=300, result_cache_count_max=2)
        self.clock = ManualClock()
        self._opening = Engine.open(
            self._directory, self._directory / "engine.db", config=Config(limits=limits), clock=self.clock
        )
        self.engine: Engine = self.run(self._opening.__aenter__())
        self.engine.events.listen(self._hear)
        self._timestamps = [self.engine.backend.published_ts()]  # of `_history`, ascending
        self._history: list[State] = [self.state]
        self._versions: list[Document] = []  # that there ever were
        self._newest_now = 0.0  # `ctx.now` of the newest mutation
        self._now_by_ts = {self._timestamps[0]: self.now}  # the newest time for which it was the published one
        self._commit_count = 0
        self._unchecked: list[Taken] = []  # taken before it was known what had been committed

    def close(self) -> None:
        try:
            self.run(self._opening.__aexit__(None, None, None))
        finally:
            self._runner.close()
            self._patches.undo()
            shutil.rmtree(self._directory)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def within_time() -> T:
            async with asyncio.timeout(SECONDS_MAX):
                return await work

        return self._runner.run(within_time())

    @property
    def now(self) -> float:
        """ms since the epoch."""
        return self.clock.wall_ns() / 1_000_000

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.state, self.now)

    # -- what can happen

    def open_subscriber(self) -> Subscriber:
        subscriber = Subscriber(self.engine)
        self.subscribers.append(subscriber)
        return subscriber

    def close_subscriber(self, subscriber: Subscriber) -> None:
        self.subscribers.remove(subscriber)
        subscriber.view.close()

    def commit(self, mutations: Sequence[Mutation]) -> None:
        """Commit some mutations together; what they touch runs again, once, and nothing else."""
        requests = [Request(mutation, next(self._next_request_id)) for mutation in mutations]
        before = self.snapshot
        self._forget_runs()
        self.run(self._send(requests, wait=True))
        touched = {write.id for mutation in mutations for write in mutation.all_writes}
        touched |= self._take_over(requests)
        changes = changes_between(before.state, self.state)
        # the engine keeps the first old and the last new state of a document, though they may be equal
        perhaps = [*changes, *(Change(before.state.get(id), self.state.get(id)) for id in touched)]
        self._check_runs(before, changes, perhaps)
        self._check_told()
        self.catch_up(before, perhaps)

    def commit_in_a_hurry(
        self, mutations: Sequence[Mutation], turns: int, meanwhile: Iterable[Callable[[], None]] = ()
    ) -> None:
        """Commit while subscribers take what they are told of, without waiting for long queries.

        Meanwhile something else is done, in one of the turns of the loop for each mutation.
        """
        doings = iter(meanwhile)
        requests = [Request(mutation, next(self._next_request_id)) for mutation in mutations]

        async def hurry() -> None:
            for request in requests:
                await self._send([request], wait=False)
                for turn in range(turns):
                    await asyncio.sleep(0)
                    if turn == turns // 2:
                        next(doings, _do_nothing)()
                    for subscriber in self._taking:
                        if subscriber.is_told:
                            self._take(subscriber, is_known=False)
                await self._answered(request)
                self._take_over([request])
                for subscriber in self._taking:
                    self._take(subscriber)
            await self._idle()

        self.run(hurry())
        self.catch_up()

    def pass_time(self, milliseconds: float | None) -> None:
        """Let time pass, if only to the next timer; what becomes true, or false, by that alone is told."""
        before = self.snapshot
        seconds = self.clock.seconds_to_next_timer if milliseconds is None else milliseconds / 1000
        if seconds is None:
            return
        self._forget_runs()
        self._commit_count = 0
        self._note_time()
        self.clock.advance(seconds)
        self.run(self._idle())
        self._check_runs_of_moment(before)
        self._check_told()
        self.catch_up(before)

    def send_again(self, request: Request, identity: Identity | None) -> MutationOutcome:
        """What a client is told that sends a mutation once more."""
        again = Request(request.mutation, request.request_id)
        self._forget_runs()
        self.run(self._send([again], wait=True, identity=identity))
        assert not self._runs(), "what was applied before touches nothing"
        assert again.outcome is not None
        return again.outcome

    def reload(self, policies: Mapping[str, PolicySpec] | None = None) -> None:
        """Load the same code again, or with other policies for these tables."""
        if policies is not None:
            tables = {name: table._replace(policy=policies.get(name)) for name, table in self.schema.tables.items()}
            self.schema = self.schema._replace(tables=tables)
            self.schema.write(self._directory)
        self.run(self.engine.reload())
        for subscriber in self.subscribers:
            subscriber.is_settled = False
        self.catch_up()

    def check_fresh_run(self, subscriber: Subscriber, subscription: Subscription) -> None:
        """What is held is, byte for byte, what a run of its own returns now."""
        query, held, backend = subscription.query, subscription.result, self.engine.backend
        assert held is not None
        arguments, ts = query.arguments(), backend.published_ts()
        fresh = self.run(backend.http_query(query.path, arguments, subscriber.identity, ts))
        assert fresh.looks_like(held) or isinstance(query, PageQuery)

    async def _answered(self, request: Request) -> None:
        while request.outcome is None and not self.engine.failed.done():  # noqa: ASYNC110 - of two unlike things
            await asyncio.sleep(0)

    async def _idle(self) -> None:
        idle = asyncio.create_task(self.engine.wait_until_idle())
        await asyncio.wait((idle, self.engine.failed), return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        assert not self.engine.failed.done(), self.engine.failed.result()

    @property
    def _taking(self) -> list[Subscriber]:
        return [subscriber for subscriber in self.subscribers if not subscriber.is_lagging]

    def _hear(self, event: Event) -> None:
        if isinstance(event, Committed):
            self._commit_count += 1
            self._now_by_ts[event.ts] = self.now

    def _note_time(self) -> None:
        self._now_by_ts[self.engine.backend.published_ts()] = self.now

    # -- commits

    async def _send(
        self, requests: Sequence[Request], *, wait: bool, identity: Identity | str | None = "its own"
    ) -> None:
        for request in requests:

            def done(outcome: MutationOutcome, request: Request = request) -> None:
                assert request.outcome is None, "a request is answered once"
                request.outcome = outcome

            mutation = request.mutation
            who = mutation.identity if isinstance(identity, str) else identity
            arguments = mutation.arguments(str(request.request_id))
            self.engine.backend.start_mutation(mutation.path, arguments, who, "session", request.request_id, done)
        if wait:
            await self._idle()

    def _take_over(self, requests: Sequence[Request]) -> set[str]:
        """Add what was committed to the history, having checked every answer; ids of what was perhaps written."""
        touched: set[str] = set()
        for request in requests:
            outcome, before = request.outcome, self.state
            assert outcome is not None
            made = self._app_state.made_by_key[str(request.request_id)]
            assert made.now > self._newest_now, "ctx.now grows from mutation to mutation"
            self._newest_now = made.now
            mutating = Mutating(self.schema, before, made.now, made.inserts, request.mutation.identity)
            touched |= {entry["id"] for entry in made.inserts if "id" in entry}
            try:
                expected = ("value", mutating.do(request.mutation))
            except Refused as refused:
                expected = ("refused", refused.code)
            failure = outcome.failure
            found = ("value", _value_of(outcome.value)) if failure is None else ("refused", failure.code)
            _check_same(found, expected, request.mutation, failure)
            assert (outcome.ts is None) == (failure is not None), "who is refused has committed nothing"
            if outcome.ts is None:
                continue
            assert outcome.ts <= self.engine.backend.published_ts(), "who is answered sees what he wrote"
            after = mutating.documents
            if after != before:
                assert outcome.ts > self._timestamps[-1], "commit timestamps grow"
                new = [document for id, document in after.items() if id not in before]
                newest = max((document.creation_time for document in before.values()), default=0.0)
                assert all(document.creation_time > newest for document in new), "creation times grow"
                self._timestamps.append(outcome.ts)
                self._history.append(after)
                self._versions += [change.new for change in changes_between(before, after) if change.new is not None]
                self.state = after
                self.requests.append(request)
        for taken in self._unchecked:
            self._check(taken)
        self._unchecked.clear()
        self._learn_page_ends()
        return touched

    def _learn_page_ends(self) -> None:
        """A watched page that could not be read before, and now can, ends from now on where it now does."""
        for subscriber, subscription in _asking(self.subscribers):
            if isinstance(subscription.query, PageQuery) and subscription.result is not None:
                self._evaluate(subscriber.identity, subscription, self.snapshot)

    # -- results

    def catch_up(self, before: Snapshot | None = None, changes: Sequence[Change] = ()) -> None:
        """Every subscriber that is not lagging takes the newest state; `before` is what there was before `changes`."""
        possibly: dict[str, set[Any]] = defaultdict(set)
        for subscriber, subscription in _asking(self._taking):
            if (
                not subscriber.is_settled
                or before is None
                or self._is_regrouped(subscriber, subscription, before, changes)
            ):
                run = self._evaluate(subscriber.identity, subscription, self.snapshot)
                possibly[subscription.query.run_key].add(self._token(subscription, run))
        self._forget_runs()
        for subscriber in self._taking:
            self.run(self._catch_up(subscriber))
        if not self._has_small_cache:
            for key, count in Counter(self._runs()).items():
                most = len(possibly[key])
                assert count <= most, f"ran {count} times for who took it, expected {most} at most: {self._about(key)}"
        self._note_time()

    async def _catch_up(self, subscriber: Subscriber) -> None:
        published_ts = self.engine.backend.published_ts()
        while True:
            subscriber.is_told = False
            if self._take(subscriber) == published_ts:
                subscriber.is_settled = True
                return
            await self._idle()
            assert subscriber.is_told, "who may take something newer is told"

    def _take(self, subscriber: Subscriber, *, is_known: bool = True) -> int | None:
        """`is_known`: whether all that was committed is in the history, so that what is taken can be checked."""
        change = subscriber.view.take()
        if change is None:
            return None
        taken = self._accept(subscriber, change)
        if is_known:
            self._check(taken)
        else:
            self._unchecked.append(taken)
        return change.ts

    def _accept(self, subscriber: Subscriber, change: ViewChange) -> Taken:
        assert change.ts >= subscriber.ts, "timestamps never go back"
        subscriber.ts = change.ts
        for query_id, result in change.results.items():
            subscription = subscriber.subscriptions[query_id]
            seen = _seen_of(result)
            if seen[0] == "value" or seen[1] == "AppError":  # others differ in their text, which only a developer sees
                assert (seen, result.journal) != (subscription.seen, subscription.journal), "an equal one is not given"
            subscription.result, subscription.seen = result, seen
            if isinstance(subscription.query, PageQuery):
                subscription.journal = result.journal
        held = []
        for subscription in subscriber.subscriptions.values():
            assert subscription.result is not None, "a change has a result for every query of the view"
            held.append((subscription, subscription.seen, subscription.journal))
        return Taken(change.ts, subscriber.identity, held)

    def _check(self, taken: Taken) -> None:
        """All that is held is right, as things stood at its timestamp."""
        state = self._history[bisect_right(self._timestamps, taken.ts) - 1]
        is_newest = taken.ts == self.engine.backend.published_ts()
        snapshot = Snapshot(state, self.now if is_newest else self._now_by_ts[taken.ts])
        for subscription, seen, journal in taken.held:
            page, found = page_of(subscription.query, seen), without_cursors(subscription.query, seen)
            if isinstance(subscription.query, PageQuery) and not subscription.has_shown_end:
                self._find_end(taken.identity, subscription, found, snapshot)
                subscription.has_shown_end = page is not None
            expected = self._evaluate(taken.identity, subscription, snapshot)
            _check_same(found, expected.seen, subscription.query, taken.identity, taken.ts)
            if page is not None:
                self._check_page(subscription, page, journal, expected)
            if not (isinstance(subscription.query, PageQuery) and subscription.query.scan.is_unrestricted):
                for id in _ids_in(seen):
                    seeing = Run(self.schema, snapshot, taken.identity).end(lambda run, id=id: run.sees(state[id]))
                    assert seeing.seen == ("value", True), f"{subscription.query} shows {id}, which a policy hides"

    def _find_end(self, identity: Identity | None, subscription: Subscription, found: Any, snapshot: Snapshot) -> None:
        """Of a page that had no documents yet: where it got to at some moment since it was asked.

        It may have run before, unseen, while something else was waited for or somebody else was signed in.
        """

        def ends() -> Iterator[Position | None]:
            fresh = Subscription(subscription.query, subscription.asked_ts)
            for i in reversed(range(bisect_right(self._timestamps, subscription.asked_ts) - 1, len(self._history))):
                then = Snapshot(self._history[i], self._now_by_ts.get(self._timestamps[i], snapshot.now))
                for somebody in IDENTITIES:
                    yield self._evaluate(somebody, fresh, then).end_position

        guess = subscription.until
        for until in itertools.chain([guess], ends()):
            subscription.until = until
            if self._evaluate(identity, subscription, snapshot).seen == found:
                return
        subscription.until = guess

    def _check_page(self, subscription: Subscription, held: Any, journal: str | None, expected: Run) -> None:
        query = subscription.query
        assert isinstance(query, PageQuery)
        assert expected.end_position is not None
        if query.end_cursor is not None:
            assert held["continueCursor"] == query.end_cursor
        self._learn(held["continueCursor"], query, expected.end_position)
        assert (held["splitCursor"] is None) == (expected.split_position is None)
        if expected.split_position is not None:
            self._learn(held["splitCursor"], query, expected.split_position)
        assert journal == held["continueCursor"]

    def _learn(self, cursor: str, query: PageQuery, position: Position) -> None:
        assert self._positions.setdefault(cursor, (query.key, position)) == (query.key, position)

    def _evaluate(self, identity: Identity | None, subscription: Subscription, snapshot: Snapshot) -> Run:
        """What the subscription must hold at a snapshot."""
        run = Run(self.schema, snapshot, identity)
        match subscription.query:
            case PlanQuery(steps):
                return run.end(lambda run: run.follow(steps))
            case PageQuery() as query:
                run.end(lambda run: self._evaluate_page(subscription, query, run))
                if subscription.until is None and subscription.result is not None:
                    subscription.until = run.end_position
                return run
        raise AssertionError(subscription.query)

    def _evaluate_page(self, subscription: Subscription, query: PageQuery, run: Run) -> Any:
        after = self._position(query.cursor, query)
        until = self._position(query.end_cursor, query) or subscription.until
        return run.page(query.scan, query.num_items, after, until)

    def _position(self, cursor: str | None, query: PageQuery) -> Position | None:
        if cursor is None:
            return None
        key, position = self._positions[cursor]
        if key != query.key:
            raise Refused("InvalidCursor")
        return position

    # -- what ran, and who was told

    def _check_runs(self, before: Snapshot, changes: Sequence[Change], perhaps: Sequence[Change]) -> None:
        """Each live query that was touched ran once, and no other."""
        surely: dict[str, set[Any]] = defaultdict(set)
        possibly: dict[str, set[Any]] = defaultdict(set)
        is_calm = True  # nothing is touched but the query that policies judge by
        for subscriber, subscription in _asking(self.subscribers):
            query = subscription.query
            run = self._evaluate(subscriber.identity, subscription, before)
            token = self._token(subscription, run)
            is_sure = subscription.result is not None and subscriber.is_settled
            if isinstance(query, PageQuery):
                is_sure = is_sure and subscription.journal is not None
            if run.parts:
                is_sure = is_sure and not subscriber.is_lagging and not _may_regroup(run, perhaps)
                is_sure = is_sure and not self.schema.has_slow_role
            is_sure = is_sure and not run.has_called_inline
            if is_sure and run.is_touched_by(changes):
                surely[query.run_key].add(token)
            is_calm = is_calm and not any(
                asked.steps is not None and inner.may_be_touched_by(perhaps) for asked, inner in _called(run)
            )
            has_any_end = isinstance(query, PageQuery) and not subscription.has_shown_end  # who knows where
            if run.may_be_touched_by(perhaps) or (has_any_end and subscription.result is not None):
                is_calm = False
                possibly[query.run_key].add(token if is_sure else object())
        ran = Counter(self._runs())
        for key in {*ran, *surely}:
            least, most = len(surely[key]), len(possibly[key])
            assert least <= ran[key] <= most, f"ran {ran[key]} times, expected {least} to {most}: {self._about(key)}"
        if is_calm and not self._has_small_cache:
            self._check_judged(before, perhaps)

    def _check_judged(self, before: Snapshot, perhaps: Sequence[Change]) -> None:
        """While nothing else has changed, only those are judged anew whose own role may be another one."""
        for subject in self._app_state.judged:
            identity = next(i for i in IDENTITIES if (None if i is None else i.subject) == subject)
            role = Run(self.schema, before, identity).end(Run.role)
            assert role.may_be_touched_by(perhaps), f"{subject} was judged again for the change of another one"

    def _check_runs_of_moment(self, before: Snapshot) -> None:
        """Time ran nothing but what it may have changed, once for each moment."""
        possibly: dict[str, set[Any]] = defaultdict(set)
        for subscriber, subscription in _asking(self.subscribers):
            run = self._evaluate(subscriber.identity, subscription, before)
            if run.is_touched_by_time(self.now, self._versions):
                possibly[subscription.query.run_key].add(self._token(subscription, run))
        for key, count in Counter(self._runs()).items():
            assert key in possibly, f"ran though no moment of it has come: {self._about(key)}"
            assert count <= self._commit_count * len(possibly[key]), f"ran {count} times: {self._about(key)}"

    def _check_told(self) -> None:
        """Who holds a result that is not right any more has been told."""
        for subscriber, subscription in _asking(self._taking):
            if subscriber.is_settled and not subscriber.is_told:
                expected = self._evaluate(subscriber.identity, subscription, self.snapshot).seen
                held = without_cursors(subscription.query, subscription.seen)
                _check_same(held, expected, "who can take a change is told", subscription.query)

    def _token(self, subscription: Subscription, run: Run) -> Any:
        """The same for those who share one result; nobody shares it while it takes a round to know who may."""
        somebody = subscription if self.schema.has_slow_role and run.parts else None
        return (somebody, subscription.journal, *_plain_parts(run))

    def _is_regrouped(
        self, subscriber: Subscriber, subscription: Subscription, before: Snapshot, changes: Sequence[Change]
    ) -> bool:
        """Whether others may share the result now than before."""
        then = self._evaluate(subscriber.identity, subscription, before)
        now = self._evaluate(subscriber.identity, subscription, self.snapshot)
        if _plain_parts(then) != _plain_parts(now):
            return True
        is_touched = then.may_be_touched_by(changes) or then.is_touched_by_time(self.now, self._versions)
        if is_touched and then.has_called_inline:
            return True
        # with a slow role, what is shared by whom may only be known after a round
        return (is_touched or self.schema.has_slow_role) and _may_regroup(then, changes)

    def _about(self, key: str) -> str:
        """Which query this is, and who asks it."""
        asking = [
            (subscription.query, subscriber.identity, subscriber.is_settled, subscriber.is_lagging)
            for subscriber, subscription in _asking(self.subscribers)
            if subscription.query.run_key == key
        ]
        return f"{asking[0][0]} of {[who for _, *who in asking]}" if asking else key

    @property
    def _app_state(self) -> Any:
        return sys.modules["functions._state"]

    def _runs(self) -> list[str]:
        return list(self._app_state.ran)

    def _forget_runs(self) -> None:
        self._app_state.ran.clear()
        self._app_state.judged.clear()


def _do_nothing() -> None: ...


def _asking(subscribers: Iterable[Subscriber]) -> Iterator[tuple[Subscriber, Subscription]]:
    for subscriber in subscribers:
        for subscription in subscriber.subscriptions.values():
            yield subscriber, subscription


def _check_same(found: Any, expected: Any, *about: Any) -> None:
    assert found == expected, "\n".join(map(str, ("found", found, "expected", expected, "of", *about)))


def _called(run: Run) -> Iterator[tuple[Asked, Run]]:
    """The queries by whose results this one is shared, and those by whose results these are."""
    for part in run.parts:
        if isinstance(part, Asked):
            inner = run.run_of(part, run.snapshot)
            yield part, inner
            yield from _called(inner)


def _may_regroup(run: Run, changes: Sequence[Change]) -> bool:
    """Whether these changes touch a query by whose result this one is shared."""
    return any(inner.may_be_touched_by(changes) for _, inner in _called(run))


def _plain_parts(run: Run) -> list[tuple[str, str]]:
    """What the run read of who asks, comparable."""
    return sorted((str(part), repr(value)) for part, value in run.parts.items())


def _ids_in(value: Any) -> Iterator[str]:
    """Of the documents in a result, but for those that are shown without regard to policies."""
    if isinstance(value, dict):
        if "id" in value and "creation_time" in value:
            yield value["id"]
        elif "unrestricted" not in value:
            for inner in value.values():
                yield from _ids_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _ids_in(inner)


def _value_of(raw: bytes | None) -> Any:
    assert raw is not None
    return decode_value(msgspec.json.decode(raw))


def _seen_of(result: Result) -> Any:
    assert (result.value is None) != (result.failure is None), "a result says one thing"
    if result.failure is None:
        return "value", _value_of(result.value)
    data = result.failure.data
    is_app_error = result.failure.code == "AppError"
    return "refused", result.failure.code, _value_of(data) if is_app_error else None
