"""What one run costs, from its arguments to its result: seconds for one, in a transaction that is open already.

Fixed: 10,000 messages in 10 games; nothing is committed, nobody watches. Varies: whether what the run reads was read or
written before (`transaction/kept.py`), or comes from SQLite.

    progress    a mutation finds the caller and their progress by indexes and a game by its id, and writes the progress
    transfer    a mutation reads two documents by their ids and writes both
    newest      a query shows the newest 50 messages of a game
"""

import sys
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import msgspec
import pytest

from bench.tables import Chat, Game, Message, Progress
from engine import Id, Identity, MutationCtx, QueryCtx, mutation, query
from engine.events import Events
from engine.functions.outcomes import Call
from engine.functions.registry import Registry, functions_of
from engine.functions.runner import Runner
from engine.identity import Caller
from engine.limits import Limits
from engine.transaction.kept import Kept
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import TickSource, WriteTransaction

Benchmark = Callable[..., Any]
LIMITS = Limits(run_slow_ms=60_000, run_ms_max=60_000)  # a busy machine makes no run a long one
SHOWN_COUNT = 50


@mutation
async def save_progress(ctx: MutationCtx, game_id: Id[Game], position_seconds: float) -> Id[Progress]:
    identity = ctx.auth.identity()
    assert identity is not None
    game = await ctx.db.get(game_id)
    assert game is not None
    earlier = await ctx.db.query(Progress.by_user_content, user_id=identity.subject, content_id="content").unique()
    if earlier is None:
        return await ctx.db.insert(
            Progress(user_id=identity.subject, content_id="content", position_seconds=position_seconds, completed=False)
        )
    await ctx.db.patch(earlier.id, position_seconds=position_seconds)
    return earlier.id


@mutation
async def transfer(ctx: MutationCtx, source: Id[Message], target: Id[Message], amount: float) -> None:
    payer, payee = await ctx.db.get(source), await ctx.db.get(target)
    assert payer is not None
    assert payee is not None
    await ctx.db.patch(source, created_at=payer.created_at - amount)
    await ctx.db.patch(target, created_at=payee.created_at + amount)


@query
async def newest(ctx: QueryCtx, game_id: Id[Game]) -> list[Message]:
    return await ctx.db.query(Message.by_game, game_id=game_id).order("desc").take(SHOWN_COUNT)


class App:
    """The functions above on the messages of `chat`."""

    def __init__(self, chat: Chat, kept: Kept | None) -> None:
        self.chat, self._kept = chat, kept
        registry = Registry(
            functions_of({"bench": sys.modules[__name__]}, limits=LIMITS, tags=chat.schema.tag_of_class)
        )
        self.runner = Runner(registry, LIMITS, chat.clock, Events(), cursor_secret=b"", is_production=True)
        self._caller = Caller(Identity(subject="7", issuer="bench"))
        _, last_tick = chat.database.writer.read_meta()
        self._ticks = TickSource(chat.clock, last_tick)

    def write(self, path: str, **arguments: Any) -> bytes:
        """Run a mutation as a client asks for it; its result."""
        chat, call = self.chat, self._call("mutation", path, arguments)
        transaction = WriteTransaction(chat.database.writer, chat.catalog, LIMITS, self._ticks, chat.clock, self._kept)
        value = self.runner.execute_mutation(call, self._caller, transaction).value
        assert value is not None
        return value

    def read(self, path: str, **arguments: Any) -> bytes:
        """Run a query on what the writer sees; its result."""
        chat, call = self.chat, self._call("query", path, arguments)
        transaction = ReadTransaction(chat.database.writer, chat.catalog, LIMITS, self._kept)
        value = self.runner.run_query(call, self._caller, transaction, 0.0, None).outcome.value
        assert value is not None
        return value

    def _call(self, kind: Any, path: str, arguments: dict[str, Any]) -> Call:
        return self.runner.resolve(kind, f"bench:{path}", msgspec.json.encode(arguments))


@pytest.fixture(params=["kept", "asked of SQLite"])
def app(chat: Chat, request: pytest.FixtureRequest) -> Iterator[App]:
    app = App(chat, Kept(LIMITS) if request.param == "kept" else None)
    chat.database.writer.begin()
    yield app
    chat.database.writer.rollback()
    app.runner.close()


@pytest.mark.benchmark(group="progress")
def test_progress_is_saved(benchmark: Benchmark, app: App) -> None:
    positions, game_id = count(), app.chat.game_ids[3]
    first = app.write("save_progress", game_id=game_id, position_seconds=0.5)
    assert benchmark(lambda: app.write("save_progress", game_id=game_id, position_seconds=next(positions))) == first


@pytest.mark.benchmark(group="transfer")
def test_a_transfer_is_made(benchmark: Benchmark, app: App) -> None:
    source, target, *_ = app.chat.message_ids
    assert benchmark(lambda: app.write("transfer", source=source, target=target, amount=0.5)) == b"null"


@pytest.mark.benchmark(group="newest")
def test_50_messages_are_shown_again(benchmark: Benchmark, app: App) -> None:
    game_id = app.chat.game_ids[3]
    assert len(msgspec.json.decode(benchmark(lambda: app.read("newest", game_id=game_id)))) == SHOWN_COUNT
