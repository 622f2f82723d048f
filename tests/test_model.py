"""Subscribers are never stale, whatever is asked and whatever is written: the engine against a naive oracle.

Hypothesis makes up the history; `tests/model/world.py` runs it on a real engine and says what must be true. Each of the
negative controls breaks one thing in the engine and shows that the same machine finds it.
"""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from engine.functions.run import Run
from engine.live import invalidation
from engine.live.invalidation import InvalidationIndex
from engine.live.live_query import LiveQuery
from engine.live.view import View
from engine.ranges import IndexRange, after, before
from engine.transaction.ledger import Ledger
from engine.transaction.read_set import ReadSet
from engine.transaction.transaction import WriteTransaction
from tests.model.asks import PageQuery, Query, Write, inserts, queries, scan_asks, writes
from tests.model.schemas import RICH, SchemaSpec, schema_specs
from tests.model.world import IDENTITIES, Mutation, Request, Subscriber, Subscription, World

SUBSCRIBER_COUNT_MAX = 4
SUBSCRIPTION_COUNT_MAX = 8  # of one subscriber

EXAMPLE_COUNT = settings.default.max_examples // 2  # in the pull-request profile: 50
CONTROL = settings(
    stateful_step_count=40,
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # that it is found is enough
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
STEPS = settings(stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


class SubscribersAreNeverStale(RuleBasedStateMachine):
    """The engine is idle between steps, but for lagging subscribers."""

    world: World

    @initialize(data=st.data(), has_small_cache=st.booleans())
    def open(self, data: st.DataObject, has_small_cache: bool) -> None:
        self.begin(data, World(RICH, has_small_cache=has_small_cache))

    def begin(self, data: st.DataObject, world: World) -> None:
        """With some documents, and two subscribers who ask something."""
        self.world = world
        documents = data.draw(st.lists(inserts(world.schema), min_size=3, max_size=10))
        world.commit([Mutation([document]) for document in documents])
        for identity in IDENTITIES[1:3]:
            subscriber = world.open_subscriber()
            subscriber.set_identity(identity)
            for query in data.draw(self.asks(min_size=3)):
                subscriber.add(query)
        world.catch_up()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()

    # -- writing

    @rule(data=st.data(), milliseconds=st.sampled_from([0, 0, 1, 1_000]))
    def commit(self, data: st.DataObject, milliseconds: int) -> None:
        """One mutation, or some in one group; at once or later."""
        self.world.clock.advance(milliseconds / 1000)
        self.world.commit(data.draw(st.lists(self.mutations(), min_size=1, max_size=3)))

    @rule(data=st.data())
    def commit_what_undoes_itself(self, data: st.DataObject) -> None:
        """A document that is gone before anybody can see it; its mutations are committed all the same."""
        made = data.draw(inserts(self.world.schema))
        self.world.commit([Mutation([made]), Mutation([Write("delete_newest", made.table, "", {})])])

    def write_something(self, data: st.DataObject) -> None:
        """So that whatever was asked has to go on being right."""
        self.world.commit([data.draw(self.mutations())])

    @rule(data=st.data(), turns=st.integers(0, 6))
    def commit_while_long_queries_run(self, data: st.DataObject, turns: int) -> None:
        self.world.commit_in_a_hurry(data.draw(st.lists(self.mutations(), min_size=1, max_size=3)), turns)

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        request: Request = data.draw(st.sampled_from(self.world.requests))
        again = self.world.send_again(request)
        assert request.outcome is not None
        assert (again.ts, again.value) == (request.outcome.ts, request.outcome.value)
        refused = self.world.send_again(request, IDENTITIES[1])
        assert refused.failure is not None
        assert refused.failure.code == "RequestIdReused"

    # -- asking

    @precondition(lambda self: len(self.world.subscribers) < SUBSCRIBER_COUNT_MAX)
    @rule(data=st.data(), identity=st.sampled_from(IDENTITIES))
    def open_subscriber(self, data: st.DataObject, identity: Any) -> None:
        subscriber = self.world.open_subscriber()
        subscriber.set_identity(identity)
        for query in data.draw(self.asks(min_size=2)):
            subscriber.add(query)
        self.world.catch_up()
        self.write_something(data)

    @precondition(lambda self: self.has_room)
    @rule(data=st.data())
    def subscribe(self, data: st.DataObject) -> None:
        subscriber = data.draw(st.sampled_from([s for s in self.world.subscribers if self.room_of(s)]))
        for query in data.draw(self.asks(min_size=1)):
            subscriber.add(query)
        self.world.catch_up()
        self.write_something(data)

    @precondition(lambda self: self.has_room and self.pages)
    @rule(data=st.data())
    def load_more(self, data: st.DataObject) -> None:
        """The page after one that a subscriber holds, or after one of another list."""
        subscriber, subscription = data.draw(st.sampled_from(self.pages))
        _, other = data.draw(st.sampled_from([(subscriber, subscription), *self.pages]))
        if self.room_of(subscriber):
            subscriber.add(PageQuery(subscription.query.scan, 2, other.page["continueCursor"]))
            self.world.catch_up()
        self.write_something(data)

    @precondition(lambda self: any(subscription.page["splitCursor"] for _, subscription in self.pages))
    @rule(data=st.data())
    def split_page(self, data: st.DataObject) -> None:
        """Two pages in the place of one: together they hold what it held, and go on doing so."""
        subscriber, subscription = data.draw(st.sampled_from([p for p in self.pages if p[1].page["splitCursor"]]))
        query, page = subscription.query, subscription.page
        parts = [
            subscriber.add(PageQuery(query.scan, query.num_items, query.cursor, page["splitCursor"])),
            subscriber.add(PageQuery(query.scan, query.num_items, page["splitCursor"], page["continueCursor"])),
        ]
        self.world.catch_up()
        if not subscriber.is_lagging:
            assert [document for part in parts for document in part.page["page"]] == subscription.page["page"]
            subscriber.remove(next(id for id, other in subscriber.subscriptions.items() if other is subscription))
        self.write_something(data)

    @precondition(lambda self: any(subscriber.subscriptions for subscriber in self.world.subscribers))
    @rule(data=st.data(), does_resume=st.booleans())
    def unsubscribe(self, data: st.DataObject, does_resume: bool) -> None:
        """No longer ask; or ask again, as a client does that connects again."""
        subscriber = data.draw(st.sampled_from([s for s in self.world.subscribers if s.subscriptions]))
        query_id = data.draw(st.sampled_from(sorted(subscriber.subscriptions)))
        subscription = subscriber.subscriptions[query_id]
        subscriber.remove(query_id)
        if does_resume:
            subscriber.add(subscription.query, resumes=subscription)
        self.world.catch_up()
        self.write_something(data)

    @precondition(lambda self: self.world.subscribers)
    @rule(data=st.data(), identity=st.sampled_from(IDENTITIES))
    def change_identity(self, data: st.DataObject, identity: Any) -> None:
        data.draw(st.sampled_from(self.world.subscribers)).set_identity(identity)
        self.world.catch_up()
        self.write_something(data)

    @precondition(lambda self: self.world.subscribers)
    @rule(data=st.data())
    def lag_or_catch_up(self, data: st.DataObject) -> None:
        subscriber = data.draw(st.sampled_from(self.world.subscribers))
        subscriber.is_lagging = not subscriber.is_lagging
        subscriber.is_settled = False
        self.world.catch_up()
        self.write_something(data)

    @precondition(lambda self: len(self.world.subscribers) > 2)
    @rule(data=st.data())
    def close_subscriber(self, data: st.DataObject) -> None:
        self.world.close_subscriber(data.draw(st.sampled_from(self.world.subscribers)))

    # -- the rest of the world

    @precondition(lambda self: self.settled)
    @rule(data=st.data())
    def run_afresh(self, data: st.DataObject) -> None:
        self.world.check_fresh_run(*data.draw(st.sampled_from(self.settled)))

    @precondition(lambda self: len(self.world.requests) % 8 == 7)
    @rule(data=st.data())
    def reload(self, data: st.DataObject) -> None:
        self.world.reload()
        self.write_something(data)

    # -- what there is

    def mutations(self) -> st.SearchStrategy[Mutation]:
        some = st.lists(writes(self.world.schema, self.ids_by_table), min_size=1, max_size=2)
        reads = st.lists(scan_asks(self.world.schema, self.creation_times), max_size=1)
        fails = st.sampled_from([False, False, False, False, False, True])
        plain = st.builds(Mutation, some, reads, does_fail=fails)
        return plain | plain | st.builds(Mutation, some, inside=some, after=some, does_fail=fails)

    def asks(self, min_size: int) -> st.SearchStrategy[list[Query]]:
        """What a subscriber may ask; often what somebody asks already."""
        new = queries(self.world.schema, self.ids, self.creation_times)
        asked = [
            subscription.query for other in self.world.subscribers for subscription in other.subscriptions.values()
        ]
        return st.lists(new | st.sampled_from(asked) if asked else new, min_size=min_size, max_size=min_size + 1)

    @property
    def ids_by_table(self) -> dict[str, list[str]]:
        ids: dict[str, list[str]] = {}
        for document in self.world.state.values():
            ids.setdefault(document.table, []).append(document.id)
        return ids

    @property
    def ids(self) -> list[str]:
        return list(self.world.state)

    @property
    def creation_times(self) -> list[float]:
        return [document.creation_time for document in self.world.state.values()]

    @property
    def pages(self) -> list[tuple[Subscriber, Any]]:
        return [
            (subscriber, subscription)
            for subscriber in self.world.subscribers
            for subscription in subscriber.subscriptions.values()
            if isinstance(subscription.query, PageQuery) and subscription.result is not None and subscription.page
        ]

    @property
    def settled(self) -> list[tuple[Subscriber, Subscription]]:
        return [
            (subscriber, subscription)
            for subscriber in self.world.subscribers
            if subscriber.is_settled and not subscriber.is_lagging
            for subscription in subscriber.subscriptions.values()
        ]

    @property
    def has_room(self) -> bool:
        return any(self.room_of(subscriber) for subscriber in self.world.subscribers)

    def room_of(self, subscriber: Subscriber) -> bool:
        return len(subscriber.subscriptions) < SUBSCRIPTION_COUNT_MAX


class OnAnySchema(SubscribersAreNeverStale):
    @initialize(data=st.data(), schema=schema_specs())
    def open(self, data: st.DataObject, schema: SchemaSpec) -> None:
        self.begin(data, World(schema))


@pytest.mark.slow
def test_subscribers_hold_what_a_fresh_run_returns_and_nothing_else_runs() -> None:
    run_state_machine_as_test(SubscribersAreNeverStale, settings=settings(STEPS, max_examples=EXAMPLE_COUNT))


@pytest.mark.slow
def test_the_same_holds_on_any_schema() -> None:
    run_state_machine_as_test(OnAnySchema, settings=settings(STEPS, max_examples=EXAMPLE_COUNT // 3))


# -- negative controls: the machine finds what is broken on purpose


def _drop_invalidations(patch: pytest.MonkeyPatch) -> None:
    """One in twenty live queries is not told of a write."""
    affected = InvalidationIndex.affected

    def dropping(self: Any, writes: Any) -> Any:
        found = affected(self, writes)
        self.found_count = getattr(self, "found_count", 0) + len(found)
        if self.found_count >= 20:
            self.found_count = 0
            found.pop()
        return found

    patch.setattr(InvalidationIndex, "affected", dropping)


def _ignore_old_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(invalidation, "_keys_of", lambda key_of, write: (None, write.new and key_of(write.new)))


def _leave_ranges_uncut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(IndexRange, "cut_at", lambda self, last_key, *, descending: self)


def _cut_ranges_one_document_early(patch: pytest.MonkeyPatch) -> None:
    def cut(self: IndexRange, last_key: Any, *, descending: bool) -> IndexRange:
        if descending:
            return IndexRange(self.table, self.index, after(last_key[:-1]), max(after(last_key[:-1]), self.end))
        return IndexRange(self.table, self.index, self.start, max(self.start, before(last_key[:-1])))

    patch.setattr(IndexRange, "cut_at", cut)


def _count_documents_for_keys(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadSet, "add_key_range", ReadSet.add_range)


def _forget_document_reads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadSet, "add_document", lambda self, table, document_id: None)


def _forget_identity_reads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "_read_part", lambda self, part: None)


def _forget_journals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LiveQuery, "journal", None)


def _wait_for_no_long_query(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(View, "wait_for", lambda self, live_query: None)


def _tell_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(View, "changed", lambda self, query_ids: None)


def _forget_outcomes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "record", lambda *_: None)


def _keep_what_nested_mutations_wrote(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WriteTransaction, "undo_nested", lambda self, saved: self.end_nested(saved))


@pytest.mark.slow
@pytest.mark.parametrize(
    "break_engine",
    [
        _drop_invalidations,
        _ignore_old_keys,
        _leave_ranges_uncut,
        _cut_ranges_one_document_early,
        _count_documents_for_keys,
        _forget_document_reads,
        _forget_identity_reads,
        _forget_journals,
        _wait_for_no_long_query,
        _tell_nobody,
        _forget_outcomes,
        _keep_what_nested_mutations_wrote,
    ],
)
def test_the_machine_finds_an_engine_that_is_broken(break_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    break_engine(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(SubscribersAreNeverStale, settings=CONTROL)
