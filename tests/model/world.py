"""One engine under test, its subscribers, and everything that must be true of them.

`World` does one thing at a time (commits, subscribes, …) and checks after it, against the oracle:
  - every result a subscriber holds is right at the timestamp of its newest change, changed or not;
  - timestamps only grow; an equal result is not given again; nobody who has something to take is left untold;
  - a commit runs each query that it touches once, and no other.
"""

import asyncio
import itertools
import shutil
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from engine import Config, Engine, Identity, Limits
from engine.live.live_query import Result
from engine.live.view import ViewChange
from engine.sync.backend import MutationOutcome
from engine.testing import ManualClock
from engine.values import decode_value
from tests.model.asks import (
    GetQuery,
    NestedQuery,
    PageQuery,
    Query,
    ScanAsk,
    ScanQuery,
    WhoQuery,
    Write,
    encode,
)
from tests.model.oracle import Change, Evaluation, Oracle, Position, Refused, State, changes_between
from tests.model.schemas import SchemaSpec, source_of

T = TypeVar("T")

FUNCTIONS = Path(__file__).parent / "functions"
SECONDS_MAX = 30  # a step that takes longer hangs
LIMITS = Limits(
    run_ms_max=60_000,  # so that no run is stopped, however slow the machine is
    run_slow_ms=1,  # so that a query is soon long
    group_commit_ms_max=10_000,  # so that mutations that are sent together are one group, however slow the machine is
)
ISSUER = "https://issuer.example"
IDENTITIES = (
    None,
    Identity(subject="alice", issuer=ISSUER, claims={"role": "admin"}),
    Identity(subject="alice", issuer=ISSUER, claims={"role": "user"}),
    Identity(subject="bob", issuer=ISSUER, claims={"role": "user"}),
)


class Mutation(msgspec.Struct):
    """What one mutation is asked to do."""

    writes: list[Write]
    reads: list[ScanAsk] = []
    inside: list[Write] | None = None  # a nested mutation between `writes` and `after`
    after: list[Write] = []
    does_fail: bool = False

    @property
    def path(self) -> str:
        return "model:write" if self.inside is None else "model:write_nested"

    def arguments(self) -> bytes:
        if self.inside is None:
            return encode({"writes": self.writes, "reads": self.reads, "does_fail": self.does_fail})
        parts = {"before": self.writes, "inside": self.inside, "after": self.after}
        return encode({**parts, "does_fail": self.does_fail})


class Request(msgspec.Struct):
    """A mutation that was sent, and how it ended."""

    mutation: Mutation
    request_id: int
    outcome: MutationOutcome | None = None


class Subscription:
    """One query that a subscriber asks, and what it holds of it."""

    def __init__(self, query: Query) -> None:
        self.query = query
        self.journal: str | None = None
        self.result: Result | None = None  # the newest that was given
        self.seen: Any = None  # what it says
        self.until: Position | None = None  # where its page ends, once it has had one

    @property
    def page(self) -> Any:
        """Of a page that has a value: as the client sees it."""
        return self.seen[1] if self.seen[0] == "value" else None


class Subscriber:
    """A view, and what its client knows."""

    def __init__(self, world: "World") -> None:
        self.identity: Identity | None = None
        self.subscriptions: dict[int, Subscription] = {}
        self.ts = 0  # of the newest change
        self.is_lagging = False  # takes nothing for now
        self.is_settled = False  # took everything since it last asked for something else
        self.is_told = False
        self.view = world.engine.backend.make_view(self._told)
        self._next_id = itertools.count()

    def add(self, query: Query, *, resumes: Subscription | None = None) -> Subscription:
        """Ask from now on; with an earlier subscription's journal, as a client does that connects again."""
        query_id, subscription = next(self._next_id), Subscription(query)
        if resumes is not None and resumes.journal is not None:
            subscription.journal, subscription.until = resumes.journal, resumes.until
        self.subscriptions[query_id] = subscription
        self.view.add(query_id, query.path, query.arguments(), subscription.journal)
        self.is_settled = False
        return subscription

    def remove(self, query_id: int) -> None:
        self.view.remove(query_id)
        del self.subscriptions[query_id]

    def set_identity(self, identity: Identity | None) -> None:
        self.identity = identity
        self.view.set_identity(identity)
        self.is_settled = False

    def _told(self) -> None:
        self.is_told = True


class World:
    """An engine with subscribers, and the history of what was committed."""

    def __init__(self, schema: SchemaSpec, *, has_small_cache: bool = False) -> None:
        self.schema, self.oracle = schema, Oracle(schema)
        self.subscribers: list[Subscriber] = []
        self.state: State = {}
        self.requests: list[Request] = []  # those that wrote
        self._has_small_cache = has_small_cache
        self._positions: dict[str, tuple[str, Position]] = {}  # by cursor: the list that it is of, and where it is
        self._runner = asyncio.Runner()
        self._next_request_id = itertools.count()
        self._directory = Path(tempfile.mkdtemp(prefix="engine-model-"))
        (self._directory / "schema.py").write_text(source_of(schema))
        shutil.copytree(FUNCTIONS, self._directory / "functions", ignore=shutil.ignore_patterns("__pycache__"))
        limits = LIMITS
        if has_small_cache:
            limits = msgspec.structs.replace(limits, result_cache_size_bytes=300, result_cache_count_max=2)
        self.clock = ManualClock()
        self._opening = Engine.open(
            self._directory, self._directory / "engine.db", config=Config(limits=limits), clock=self.clock
        )
        self.engine: Engine = self.run(self._opening.__aenter__())
        self._timestamps = [self.engine.backend.published_ts()]  # of `_history`, ascending
        self._history: list[State] = [self.state]

    def close(self) -> None:
        try:
            self.run(self._opening.__aexit__(None, None, None))
        finally:
            self._runner.close()
            shutil.rmtree(self._directory)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def within_time() -> T:
            async with asyncio.timeout(SECONDS_MAX):
                return await work

        return self._runner.run(within_time())

    # -- what can happen

    def open_subscriber(self) -> Subscriber:
        subscriber = Subscriber(self)
        self.subscribers.append(subscriber)
        return subscriber

    def close_subscriber(self, subscriber: Subscriber) -> None:
        self.subscribers.remove(subscriber)
        subscriber.view.close()

    def commit(self, mutations: Sequence[Mutation]) -> None:
        """Commit some mutations together; what they touch runs again, once, and nothing else."""
        requests = [Request(mutation, next(self._next_request_id)) for mutation in mutations]
        before = self.state
        self._forget_runs()
        self.run(self._send(requests, len(requests)))
        self._take_over(requests)
        written = {write.id for mutation in mutations for write in _writes_of(mutation)}
        changes = changes_between(before, self.state)
        # the engine keeps the first old and the last new state of a document, though they may be equal
        perhaps = [*changes, *(Change(before.get(id), self.state.get(id)) for id in written)]
        self._check_runs(before, changes, perhaps)
        self._check_told()
        self.catch_up(before)

    def commit_in_a_hurry(self, mutations: Sequence[Mutation], turns: int) -> None:
        """Commit while subscribers take in between, without waiting for long queries."""
        requests = [Request(mutation, next(self._next_request_id)) for mutation in mutations]

        async def hurry() -> None:
            for request in requests:
                await self._send([request], 0)
                for _ in range(turns):
                    await asyncio.sleep(0)
                await self._answered(request)
                self._take_over([request])
                for subscriber in self._taking:
                    self._take(subscriber)
            await self._idle()

        self.run(hurry())
        self.catch_up()

    def send_again(self, request: Request, identity: Identity | None = None) -> MutationOutcome:
        """What a client is told that sends a mutation once more."""
        again = Request(request.mutation, request.request_id)
        self._forget_runs()
        self.run(self._send([again], 1, identity))
        assert not self._runs(), "what was applied before touches nothing"
        assert again.outcome is not None
        return again.outcome

    def reload(self) -> None:
        """Load the same code again."""
        self.run(self.engine.reload())
        for subscriber in self.subscribers:
            subscriber.is_settled = False
        self.catch_up()

    def check_fresh_run(self, subscriber: Subscriber, subscription: Subscription) -> None:
        """What is held is, byte for byte, what a run of its own returns now."""
        query, held = subscription.query, subscription.result
        assert held is not None
        fresh = self.run(
            self.engine.backend.http_query(query.path, query.arguments(), subscriber.identity, is_admin=True)
        )
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
    def _taking(self) -> Iterable[Subscriber]:
        return [subscriber for subscriber in self.subscribers if not subscriber.is_lagging]

    # -- commits

    async def _send(self, requests: Sequence[Request], wait_for: int, identity: Identity | None = None) -> None:
        for request in requests:

            def done(outcome: MutationOutcome, request: Request = request) -> None:
                assert request.outcome is None, "a request is answered once"
                request.outcome = outcome

            mutation = request.mutation
            self.engine.backend.start_mutation(
                mutation.path, mutation.arguments(), identity, "session", request.request_id, done
            )
        if wait_for:
            await self._idle()

    def _take_over(self, requests: Sequence[Request]) -> None:
        """Add what was committed to the history, having checked every answer."""
        for request in requests:
            outcome, before = request.outcome, self.state
            assert outcome is not None
            made = _insert_results(request.mutation, outcome)
            try:
                after, results = self._apply(before, request.mutation, made)
            except Refused as refused:
                expected_code = refused.code
            else:
                expected_code = None
            if expected_code is not None:
                assert outcome.failure is not None
                assert (outcome.failure.code, outcome.ts) == (expected_code, None)
                continue
            assert outcome.failure is None, outcome.failure
            assert outcome.ts is not None
            assert _value_of(outcome.value) == results
            assert outcome.ts <= self.engine.backend.published_ts(), "who is answered sees what he wrote"
            if after != before:
                assert outcome.ts > self._timestamps[-1], "commit timestamps grow"
                self._timestamps.append(outcome.ts)
                self._history.append(after)
                self.state = after
                self.requests.append(request)
        self._learn_page_ends()

    def _apply(self, state: State, mutation: Mutation, made: list[Any]) -> tuple[State, list[Any]]:
        """The state after a mutation and what it returns; raises Refused as it would. `made` has what inserts gave."""
        ids = iter(made)

        def write_all(state: State, writes: Sequence[Write]) -> tuple[State, list[Any]]:
            results = []
            for write in writes:
                id, creation_time = next(ids) if write.does == "insert" else (write.id, 0.0)
                state = self.oracle.write(state, write, id, creation_time)
                results.append(state[id].plain() if id in state else None)
            return state, results

        state, results = write_all(state, mutation.writes)
        if mutation.inside is not None:
            inner_state, inner_results = write_all(state, mutation.inside)
            state, more = (state, ["undone"]) if mutation.does_fail else (inner_state, inner_results)
            state, last = write_all(state, mutation.after)
            return state, [*results, *more, *last]
        results += [self.oracle.scan(state, ask, []) for ask in mutation.reads]
        if mutation.does_fail:
            raise Refused("AppError")
        return state, results

    def _learn_page_ends(self) -> None:
        """A watched page that could not be read before, and now can, ends from now on where it now does."""
        for subscriber in self.subscribers:
            for subscription in subscriber.subscriptions.values():
                if isinstance(subscription.query, PageQuery) and subscription.result is not None:
                    self._evaluate(subscriber, subscription, self.state)

    # -- results

    def catch_up(self, before: State | None = None) -> None:
        """Every subscriber that is not lagging takes the newest state; `before` is the one before this commit."""
        may_run = {
            subscription.query.run_key
            for subscriber in self._taking
            for subscription in subscriber.subscriptions.values()
            if not subscriber.is_settled or before is None or self._splits(subscriber, subscription, before)
        }
        self._forget_runs()
        for subscriber in self._taking:
            self.run(self._catch_up(subscriber))
        if not self._has_small_cache:
            assert set(self._runs()) <= may_run, "taking runs only what is new to the view"

    async def _catch_up(self, subscriber: Subscriber) -> None:
        published_ts = self.engine.backend.published_ts()
        while True:
            subscriber.is_told = False
            if self._take(subscriber) == published_ts:
                subscriber.is_settled = True
                return
            await self._idle()
            assert subscriber.is_told, "who may take something newer is told"

    def _take(self, subscriber: Subscriber) -> int | None:
        change = subscriber.view.take()
        if change is not None:
            self._accept(subscriber, change)
        return change and change.ts

    def _accept(self, subscriber: Subscriber, change: ViewChange) -> None:
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
        state = self._state_at(change.ts)
        for subscription in subscriber.subscriptions.values():
            assert subscription.result is not None, "a change has a result for every query of the view"
            expected = self._evaluate(subscriber, subscription, state)
            if isinstance(subscription.query, PageQuery) and subscription.page is not None:
                self._check_page(subscription, expected)
            else:
                assert subscription.seen == expected.seen, (subscription.query, change.ts)

    def _check_page(self, subscription: Subscription, expected: Evaluation) -> None:
        held, query = subscription.page, subscription.query
        assert isinstance(query, PageQuery)
        assert ("value", (held["page"], held["isDone"])) == expected.seen, query
        assert expected.end_position is not None
        if query.end_cursor is not None:
            assert held["continueCursor"] == query.end_cursor
        self._learn(held["continueCursor"], query, expected.end_position)
        assert (held["splitCursor"] is None) == (expected.split_position is None)
        if expected.split_position is not None:
            self._learn(held["splitCursor"], query, expected.split_position)
        assert subscription.journal == held["continueCursor"]

    def _learn(self, cursor: str, query: PageQuery, position: Position) -> None:
        assert self._positions.setdefault(cursor, (query.key, position)) == (query.key, position)

    def _evaluate(self, subscriber: Subscriber, subscription: Subscription, state: State) -> Evaluation:
        """What the subscription must hold at a state."""
        oracle = self.oracle
        match subscription.query:
            case ScanQuery(ask):
                return oracle.evaluate(lambda run: oracle.scan(state, ask, run.reads))
            case GetQuery(ids):
                return oracle.evaluate(lambda run: oracle.get(state, ids, run.reads))
            case NestedQuery(asks, does_catch):
                return oracle.evaluate(lambda run: oracle.nested(state, asks, does_catch, run.reads))
            case WhoQuery(parts, when, more):
                return oracle.evaluate(lambda run: oracle.who(state, subscriber.identity, parts, when, more, run))
            case PageQuery() as query:
                evaluation = oracle.evaluate(lambda run: self._evaluate_page(subscription, query, state, run))
                if subscription.until is None and subscription.result is not None:
                    subscription.until = evaluation.end_position
                return evaluation
        raise AssertionError(subscription.query)

    def _evaluate_page(self, subscription: Subscription, query: PageQuery, state: State, run: Evaluation) -> Any:
        after = self._position(query.cursor, query)
        until = self._position(query.end_cursor, query) or subscription.until
        return self.oracle.page(state, query.scan, query.num_items, after, until, run)

    def _position(self, cursor: str | None, query: PageQuery) -> Position | None:
        if cursor is None:
            return None
        key, position = self._positions[cursor]
        if key != query.key:
            raise Refused("InvalidCursor")
        return position

    def _state_at(self, ts: int) -> State:
        return self._history[bisect_right(self._timestamps, ts) - 1]

    # -- what ran, and who was told

    def _check_runs(self, before: State, changes: Sequence[Change], perhaps: Sequence[Change]) -> None:
        """Each live query that was touched ran once, and no other."""
        surely: dict[str, set[Any]] = {}
        possibly: dict[str, set[Any]] = {}
        for subscriber in self.subscribers:
            for subscription in subscriber.subscriptions.values():
                query = subscription.query
                evaluation = self._evaluate(subscriber, subscription, before)
                token: Any = (subscription.journal, *sorted(evaluation.parts.items()))
                is_sure = subscription.result is not None and subscriber.is_settled
                if isinstance(query, PageQuery):
                    is_sure = is_sure and subscription.journal is not None
                elif isinstance(query, WhoQuery):
                    is_sure = is_sure and not subscriber.is_lagging
                if is_sure and evaluation.is_touched_by(changes):
                    surely.setdefault(query.run_key, set()).add(token)
                if evaluation.is_touched_by(perhaps):
                    possibly.setdefault(query.run_key, set()).add(token if is_sure else object())
        ran = Counter(self._runs())
        for key in {*ran, *surely}:
            least, most = len(surely.get(key, ())), len(possibly.get(key, ()))
            assert least <= ran[key] <= most, f"{key} ran {ran[key]} times, expected {least} to {most}"

    def _check_told(self) -> None:
        """Who holds a result that is not right any more has been told."""
        for subscriber in self._taking:
            if subscriber.is_settled and not subscriber.is_told:
                for subscription in subscriber.subscriptions.values():
                    expected = self._evaluate(subscriber, subscription, self.state).seen
                    held = subscription.seen
                    if isinstance(subscription.query, PageQuery) and subscription.page is not None:
                        held = ("value", (subscription.page["page"], subscription.page["isDone"]))
                    assert held == expected, "who can take a change is told"

    def _splits(self, subscriber: Subscriber, subscription: Subscription, before: State) -> bool:
        """Whether other callers may share the result now than before."""
        then = self._evaluate(subscriber, subscription, before).parts
        return then != self._evaluate(subscriber, subscription, self.state).parts

    def _runs(self) -> list[str]:
        return list(sys.modules["functions.model"].ran)

    def _forget_runs(self) -> None:
        sys.modules["functions.model"].ran.clear()


def _writes_of(mutation: Mutation) -> list[Write]:
    return [*mutation.writes, *(mutation.inside or []), *mutation.after]


def _insert_results(mutation: Mutation, outcome: MutationOutcome) -> list[tuple[str, float]]:
    """The id and creation time of each insert, in order; made up where the mutation failed."""
    writes, made = _writes_of(mutation), []
    results: list[Any] = [] if outcome.value is None else list(_value_of(outcome.value))
    if mutation.inside is not None and mutation.does_fail and results:
        place = len(mutation.writes)
        results[place : place + 1] = [None] * len(mutation.inside)
    for i, write in enumerate(writes):
        if write.does == "insert":
            result = results[i] if i < len(results) else None
            made.append((f"nobody {i}", 1e15 + i) if result is None else (result["id"], result["creation_time"]))
    return made


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
