"""The machine that makes up histories for a `World`: what clients and operators may do, in any order."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from msgspec.structs import replace

from engine import Identity
from tests.model.asks import Asking, PageQuery, Query, insert, write
from tests.model.choices import Choices, made
from tests.model.clients import IDENTITIES, Mutation, Request, Subscriber, Subscription
from tests.model.plans import Write
from tests.model.schemas import PEOPLE, USER, PolicySpec, Pool, SchemaSpec
from tests.model.world import World

SUBSCRIBER_COUNT_MAX = 4
SUBSCRIPTION_COUNT_MAX = 8  # of one subscriber

CONTROL = settings(
    stateful_step_count=40,
    max_examples=100,  # most need less than 20
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # that it is found is enough
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
STEPS = settings(
    stateful_step_count=40,
    deadline=None,
    # hypothesis would look for a shorter history for five minutes: as long as pytest lets a test take
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

BreakEngine = Callable[[pytest.MonkeyPatch], None]


class SubscribersAreNeverStale(RuleBasedStateMachine):
    """The engine is idle between steps, but for lagging subscribers."""

    schema: SchemaSpec
    other_policies: Mapping[str, PolicySpec] | None = None  # of some of its tables, after a reload
    time_steps: tuple[float | None, ...] = (0, 0, 1, 1_000)  # ms; None: to the next timer
    world: World

    @initialize(data=st.data(), has_small_cache=st.booleans())
    def open(self, data: st.DataObject, has_small_cache: bool) -> None:
        self.begin(data, World(self.schema, has_small_cache=has_small_cache))

    def begin(self, data: st.DataObject, world: World) -> None:
        """With some documents, and two subscribers who ask something."""
        self.world = world
        if "User" in self.tables:
            roles = data.draw(made(lambda choices: [choices.one(USER.values("role", self.pool)) for _ in PEOPLE]))
            for subject, role in zip(PEOPLE[1:], roles, strict=False):  # the first is not known yet
                fields = {"subject": subject, "role": role, "until": math.inf}
                world.commit([Mutation([Write("insert", "User", "", fields, is_unrestricted=True)])])
        for _ in range(4):
            world.commit([Mutation([document]) for document in data.draw(made(self.inserts))])
        for identity in (IDENTITIES[1], IDENTITIES[3]):
            subscriber = world.open_subscriber()
            subscriber.set_identity(identity)
            for query in data.draw(self.asks(3)):
                subscriber.add(query)
        world.catch_up()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()

    # -- writing

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """One mutation, or some in one group; at once or later."""
        self.world.pass_time(data.draw(made(lambda choices: choices.one(self.time_steps))))
        self.world.commit(data.draw(self.mutations(1, 3)))

    @rule(data=st.data())
    def commit_what_undoes_itself(self, data: st.DataObject) -> None:
        """A document that is gone before anybody can see it; its mutations are committed all the same."""
        first = data.draw(made(self.inserts))[0]
        self.world.commit([Mutation([first]), Mutation([Write("delete_newest", first.table, is_unrestricted=True)])])

    def write_something(self, data: st.DataObject) -> None:
        """So that whatever was asked has to go on being right."""
        self.world.commit(data.draw(self.mutations(1, 1)))

    @rule(data=st.data(), turns=st.integers(0, 6))
    def commit_while_long_queries_run(self, data: st.DataObject, turns: int) -> None:
        self.world.commit_in_a_hurry(data.draw(self.mutations(1, 3)), turns)

    @precondition(lambda self: self.world.subscribers)
    @rule(data=st.data(), turns=st.integers(1, 6))
    def ask_something_else_while_commits_are_under_way(self, data: st.DataObject, turns: int) -> None:
        mutations, doings = data.draw(self.mutations(1, 3)), data.draw(made(self.doings))
        self.world.commit_in_a_hurry(mutations, turns, doings)

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        request: Request = data.draw(st.sampled_from(self.world.requests))
        again = self.world.send_again(request, request.mutation.identity)
        assert request.outcome is not None
        assert (again.ts, again.value) == (request.outcome.ts, request.outcome.value)
        somebody_else = None if request.mutation.identity is not None else IDENTITIES[1]
        refused = self.world.send_again(request, somebody_else)
        assert refused.failure is not None
        assert refused.failure.code == "RequestIdReused"

    @precondition(lambda self: "User" in self.tables)
    @rule(data=st.data(), in_a_hurry=st.booleans())
    def change_a_role(self, data: st.DataObject, in_a_hurry: bool) -> None:
        """Alone, or together with something else."""
        change = data.draw(made(self.role_change))
        others = data.draw(self.mutations(0, 1))
        if in_a_hurry:
            self.world.commit_in_a_hurry([*others, change], 3)
        else:
            self.world.commit([*others, change])

    # -- asking

    @precondition(lambda self: len(self.world.subscribers) < SUBSCRIBER_COUNT_MAX)
    @rule(data=st.data(), identity=st.sampled_from(IDENTITIES))
    def open_subscriber(self, data: st.DataObject, identity: Any) -> None:
        subscriber = self.world.open_subscriber()
        subscriber.set_identity(identity)
        for query in data.draw(self.asks(2)):
            subscriber.add(query)
        self.world.catch_up()
        self.write_something(data)

    @precondition(lambda self: self.has_room)
    @rule(data=st.data())
    def subscribe(self, data: st.DataObject) -> None:
        subscriber = data.draw(st.sampled_from([s for s in self.world.subscribers if self.room_of(s)]))
        for query in data.draw(self.asks(1)):
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

    @rule(data=st.data())
    def pass_time(self, data: st.DataObject) -> None:
        self.world.pass_time(data.draw(made(lambda choices: choices.one(self.time_steps))))

    @precondition(lambda self: self.settled)
    @rule(data=st.data())
    def run_afresh(self, data: st.DataObject) -> None:
        self.world.check_fresh_run(*data.draw(st.sampled_from(self.settled)))

    @precondition(lambda self: len(self.world.requests) % 8 == 7)
    @rule(data=st.data(), has_others=st.booleans())
    def reload(self, data: st.DataObject, has_others: bool) -> None:
        """The same code; or other policies, and the old ones the next time."""
        old = {name: table.policy for name, table in self.tables.items() if table.policy is not None}
        self.world.reload(self.other_policies if has_others else None)
        if has_others and self.other_policies is not None:
            self.other_policies = old
        self.write_something(data)

    # -- what there is

    @property
    def tables(self) -> Mapping[str, Any]:
        return self.world.schema.tables

    def inserts(self, choices: Choices) -> list[Write]:
        return choices.many(lambda: insert(choices, self.world.schema, self.pool), 1, 3)

    def mutations(self, least: int, most: int) -> st.SearchStrategy[list[Mutation]]:
        return made(lambda choices: choices.many(lambda: self.mutation(choices), least, most))

    def mutation(self, choices: Choices) -> Mutation:
        def some() -> list[Write]:
            return choices.many(lambda: write(choices, self.world.schema, self.pool), 1, 2)

        writes, who = some(), choices.index(len(IDENTITIES))
        if "User" in self.tables and choices.chance(5):  # who may do it changes in the middle
            judged = partial(replace, is_unrestricted=False)
            writes = [*map(judged, writes), *self.role_change(choices, IDENTITIES[who]).writes, *map(judged, some())]
            writes = [replace(write, does_catch=True) for write in writes]
        if choices.chance(3):
            return Mutation(writes, [], some(), some(), does_fail=choices.chance(3), identity_index=who)
        reads = choices.many(lambda: Asking(choices, self.world.schema, self.pool).step(1), 0, 1)
        return Mutation(writes, reads, does_fail=choices.chance(6), identity_index=who)

    def role_change(self, choices: Choices, identity: Identity | None = None) -> Mutation:
        """Of the user who has this identity, or of anybody."""
        users = [document for document in self.world.state.values() if document.table == "User"]
        if identity is not None:
            users = [user for user in users if user.fields["subject"] == identity.subject] or users
        fields = {field: choices.one(USER.values(field, self.pool)) for field in USER.fields}
        if not users or choices.chance(6):
            return Mutation([Write("insert", "User", "", fields, is_unrestricted=True)])
        field = choices.one(["role", "role", "until"])
        user = choices.one(users)
        return Mutation([Write("patch", "User", user.id, {field: fields[field]}, is_unrestricted=True)])

    def doings(self, choices: Choices) -> list[Callable[[], None]]:
        """What subscribers may do at any moment."""

        def doing() -> Callable[[], None]:
            subscriber = choices.one(self.world.subscribers)
            if subscriber.subscriptions and choices.chance(3):
                query_id = choices.one(sorted(subscriber.subscriptions))
                return lambda: subscriber.remove(query_id) if query_id in subscriber.subscriptions else None
            if self.room_of(subscriber) and choices.chance(2):
                query = Asking(choices, self.world.schema, self.pool).query()
                return partial(subscriber.add, query)
            return partial(subscriber.set_identity, choices.one(IDENTITIES))

        return choices.many(doing, 1, 3)

    def asks(self, least: int) -> st.SearchStrategy[list[Query]]:
        """What a subscriber may ask; often what somebody asks already."""
        asked = [
            subscription.query for other in self.world.subscribers for subscription in other.subscriptions.values()
        ]

        def ask(choices: Choices) -> Query:
            if asked and choices.chance(2):
                return choices.one(asked)
            return Asking(choices, self.world.schema, self.pool).query()

        return made(lambda choices: choices.many(lambda: ask(choices), least, least + 1))

    @property
    def pool(self) -> Pool:
        ids: dict[str, list[str]] = {}
        for document in self.world.state.values():
            ids.setdefault(document.table, []).append(document.id)
        creation_times = [document.creation_time for document in self.world.state.values()]
        return Pool(ids, creation_times[-3:], self.world.now)

    @property
    def pages(self) -> list[tuple[Subscriber, Any]]:
        return [
            (subscriber, subscription)
            for subscriber in self.world.subscribers
            for subscription in subscriber.subscriptions.values()
            if subscription.page is not None
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


def check_machine(machine: type[SubscribersAreNeverStale], example_count: int) -> None:
    """Let the machine make up so many histories."""
    run_state_machine_as_test(machine, settings=settings(STEPS, max_examples=example_count))  # type: ignore[no-untyped-call]


def check_that_it_finds(
    machine: type[SubscribersAreNeverStale], break_engine: BreakEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative control: the machine finds an engine that is broken in one place."""
    break_engine(monkeypatch)
    with pytest.raises((AssertionError, Flaky)):  # it may depend on how fast the machine is
        run_state_machine_as_test(machine, settings=CONTROL)  # type: ignore[no-untyped-call]
