"""The tables of the module benchmarks and a database of chat: seeded, the same in every run."""

from pathlib import Path
from typing import Literal, cast

from engine.ids import Id
from engine.limits import Limits
from engine.schema import Schema, Table, compile_schema, index, unique
from engine.storage.connections import Database
from engine.storage.ddl import apply_schema
from engine.storage.rows import RowCodec
from engine.testing import ManualClock
from engine.transaction.reading import Catalog
from engine.transaction.transaction import TickSource, WriteTransaction

GAME_COUNT = 10
MESSAGE_COUNT = 10_000  # over all games, in turn


class Game(Table, name="games"):
    title: str


class Message(Table, name="messages"):
    game_id: Id[Game]
    user_id: str
    message: str
    user_name: str
    user_avatar: str | None = None
    status: Literal["active", "hidden", "deleted"] = "active"
    created_at: float
    by_game = index("game_id", "created_at")
    by_user = index("user_id")


class Progress(Table, name="progress"):
    user_id: str
    content_id: str
    position_seconds: float
    completed: bool
    by_user_content = unique("user_id", "content_id")


class Chat:
    """A database on disk with games and their messages."""

    def __init__(self, directory: Path) -> None:
        self.limits, self.clock = Limits(), ManualClock()
        self.schema: Schema = compile_schema([Game, Message, Progress], self.limits)
        self.catalog = Catalog([RowCodec(table) for table in self.schema.tables_by_name.values()])
        self.database = Database.open(directory / "bench.db", self.limits, entropy=self.clock.entropy)
        apply_schema(self.database.writer, self.schema)
        writer = self.database.writer
        ticks = TickSource(self.clock, 0)
        writer.begin()
        games = [Game(title=f"Game {number}") for number in range(GAME_COUNT)]
        self.game_ids = [cast("Id[Game]", self._write(ticks).insert(game)) for game in games]
        messages = map(self.message, range(MESSAGE_COUNT))
        self.message_ids = [cast("Id[Message]", self._write(ticks).insert(message)) for message in messages]
        writer.write_meta(1, ticks.last_tick, 0)
        writer.commit()

    def message(self, number: int) -> Message:
        """A message that is not stored yet, of the game whose turn it is."""
        return Message(
            game_id=self.game_ids[number % GAME_COUNT],
            user_id=f"user-{number % 100}",
            message=f"What a save, did anyone else see that? {number}",
            user_name=f"Viewer {number % 100}",
            created_at=self.clock.wall_ns() / 1e6 + number,
        )

    def _write(self, ticks: TickSource) -> WriteTransaction:
        return WriteTransaction(self.database.writer, self.catalog, self.limits, ticks, self.clock)
