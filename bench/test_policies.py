"""What a policy costs: seconds for one run of a query that shows the newest 50 messages of a game, and of a mutation.

Fixed: 10,000 messages in 10 games, all of which the caller may see; documents of 7 fields; the result is encoded. What
the viewer query returns is known, as in a server where its caller watches anything. Varies: what the policy looks at.
A mutation runs in a transaction that is open already; nothing is committed.

    the key        only at a field that the query fixes: one verdict for all messages
    a field        at a field of each message; the viewer is asked of none
    the viewer     at the viewer first, for each message
    a document     at one that it reads for each message (its own, once more)
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from bench.tables import Chat, Game, Message
from engine import Id, Identity, MutationCtx, Policy, QueryCtx, mutation, query
from engine.events import Events
from engine.functions.outcomes import Call
from engine.functions.policies import TablePolicy
from engine.functions.registry import Registry, functions_of
from engine.functions.runner import Runner
from engine.identity import Caller
from engine.limits import Limits
from engine.storage.connections import SnapshotReader
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import TickSource, WriteTransaction

Benchmark = Callable[..., Any]
LIMITS = Limits(run_slow_ms=60_000, run_ms_max=60_000)  # a busy machine makes no run a long one
SHOWN_COUNT = 50


class Viewer(msgspec.Struct, frozen=True):
    game_id: Id[Game]
    is_moderator: bool


@query(internal=True)
async def viewer(ctx: QueryCtx) -> Viewer:
    identity = ctx.auth.identity()
    assert identity is not None
    return Viewer(identity.claims["game"], is_moderator=False)


@query
async def newest(ctx: QueryCtx, game_id: Id[Game]) -> list[Message]:
    return await ctx.db.query(Message.by_game, game_id=game_id).order("desc").take(SHOWN_COUNT)


@mutation
async def send(ctx: MutationCtx, game_id: Id[Game]) -> Id[Message]:
    return await ctx.db.insert(
        Message(game_id=game_id, user_id="user-7", message="What a save", user_name="Viewer 7", created_at=ctx.now)
    )


@mutation
async def edit(ctx: MutationCtx, message_id: Id[Message]) -> None:
    await ctx.db.patch(message_id, message=f"What a save, {ctx.now}")


class ByKey(Policy[Viewer]):
    def read(self, message: Message) -> Any:
        return message.game_id == self.viewer.game_id

    def insert(self, message: Message) -> Any:
        return self.read(message)

    def update(self, old: Message, new: Message) -> Any:
        return self.read(new)


class ByField(ByKey):
    def read(self, message: Message) -> Any:
        return message.status == "active" or self.viewer.is_moderator


class ByViewer(ByKey):
    def read(self, message: Message) -> Any:
        return self.viewer.is_moderator or message.status == "active"


class ByDocument(ByKey):
    async def read(self, message: Message) -> Any:
        return await self.db.get(message.id) is not None

    async def insert(self, message: Message) -> Any:
        return await self.db.get(message.game_id) is not None


POLICIES = {"none": None, "the key": ByKey, "a field": ByField, "the viewer": ByViewer, "a document": ByDocument}
by_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))


class App:
    """The functions above on the messages of `chat`, under one policy."""

    def __init__(self, chat: Chat, policy: type[Policy[Viewer]] | None) -> None:
        self.chat, tags = chat, chat.schema.tag_of_class
        registry = Registry(functions_of({"bench": sys.modules[__name__]}, limits=LIMITS, tags=tags))
        self.runner = Runner(registry, LIMITS, chat.clock, Events(), cursor_secret=b"", is_production=True)
        if policy is not None:
            registry.policies = {"messages": TablePolicy(policy, self.runner.call_of(viewer, ("query",), {}))}
        self.caller = Caller(Identity(subject="7", issuer="bench", claims={"game": chat.game_ids[3]}))
        _, last_tick = chat.database.writer.read_meta()
        self._ticks = TickSource(chat.clock, last_tick)

    def call(self, function: Callable[..., Any], **arguments: Any) -> Call:
        return self.runner.call_of(function, ("query", "mutation"), arguments)

    def shown(self, reader: SnapshotReader) -> Callable[[], bytes]:
        """What runs the query; its result."""
        call, chat = self.call(newest, game_id=self.chat.game_ids[3]), self.chat
        first = self.runner.run_query(call, self.caller, ReadTransaction(reader, chat.catalog, LIMITS), 0.0, None)
        known = {nested: run.outcome for nested, run in first.nested.items()}

        def run() -> bytes:
            transaction = ReadTransaction(reader, chat.catalog, LIMITS)
            value = self.runner.run_query(call, self.caller, transaction, 0.0, None, known.get).outcome.value
            assert value is not None
            return value

        return run

    def write(self, call: Call) -> bytes:
        """Run a mutation; its result."""
        chat = self.chat
        transaction = WriteTransaction(chat.database.writer, chat.catalog, LIMITS, self._ticks, chat.clock)
        value = self.runner.execute_mutation(call, self.caller, transaction).value
        assert value is not None
        assert len(transaction.write_set) == 1
        return value


@pytest.fixture
def app(chat: Chat, policy: type[Policy[Viewer]] | None) -> Iterator[App]:
    app = App(chat, policy)
    chat.database.writer.begin()
    yield app
    chat.database.writer.rollback()
    app.runner.close()


@by_policy
@pytest.mark.benchmark(group="50 messages are shown")
def test_50_messages_are_shown(benchmark: Benchmark, app: App) -> None:
    reader = app.chat.database.open_reader()
    reader.pin()
    assert len(msgspec.json.decode(benchmark(app.shown(reader)))) == SHOWN_COUNT
    reader.unpin()


@by_policy
@pytest.mark.benchmark(group="a message is sent")
def test_a_message_is_sent(benchmark: Benchmark, app: App) -> None:
    call = app.call(send, game_id=app.chat.game_ids[3])
    message_id = msgspec.json.decode(benchmark(app.write, call))
    assert app.chat.catalog.of_id(message_id).table.name == "messages"


@by_policy
@pytest.mark.benchmark(group="a message is edited")
def test_a_message_is_edited(benchmark: Benchmark, app: App) -> None:
    call = app.call(edit, message_id=app.chat.message_ids[3])
    assert benchmark(app.write, call) == b"null"
