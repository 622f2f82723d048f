"""What one search costs: seconds for `ctx.db.search(…).take(20)` on a pinned reader, pages in SQLite's cache.

Fixed: 100,000 messages of 10 words in 10 games, words as rare and as frequent as those of a language. Varies: how many
messages match; the newest 1,024 of them are read and ranked.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from engine.functions.reader import DatabaseReader
from engine.functions.run import Run
from engine.functions.search import Search
from engine.identity import SYSTEM
from engine.limits import Limits
from engine.schema import Table, compile_schema, search_index
from engine.storage.connections import Database
from engine.storage.ddl import apply_schema
from engine.storage.rows import RowCodec
from engine.testing import ManualClock
from engine.transaction.reading import Catalog, ReadTransaction
from engine.transaction.transaction import TickSource, WriteTransaction

Benchmark = Callable[..., Any]
MESSAGE_COUNT, WORD_COUNT, GAME_COUNT = 100_000, 20_000, 10
LIMITS = Limits(run_ms_max=60_000)


class Message(Table, name="messages"):
    game: str
    body: str
    search = search_index("body", filter=("game",))


@pytest.fixture(scope="module")
def transaction(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadTransaction]:
    clock, schema = ManualClock(), compile_schema([Message], LIMITS)
    path: Path = tmp_path_factory.mktemp("search") / "bench.db"
    database = Database.open(path, LIMITS, entropy=clock.entropy)
    apply_schema(database.writer, schema)
    catalog = Catalog([RowCodec(table) for table in schema.tables_by_name.values()])
    ticks, chance = TickSource(clock, 0), random.Random(1)
    words = [f"w{number}" for number in range(WORD_COUNT)]
    weights = list(itertools.accumulate(1 / (number + 1) for number in range(WORD_COUNT)))
    for group in range(MESSAGE_COUNT // 100):
        database.writer.begin()
        for number in range(100):
            database.writer.savepoint()
            body = " ".join(chance.choices(words, cum_weights=weights, k=10))
            message = Message(game=f"game {(group + number) % GAME_COUNT}", body=body)
            WriteTransaction(database.writer, catalog, LIMITS, ticks, clock).insert(message)
            database.writer.release()
        database.writer.commit()
    reader = database.open_reader()
    reader.pin()
    yield ReadTransaction(reader, catalog, LIMITS)
    database.close()


@pytest.mark.parametrize(
    ("text", "fixed", "match_count"),
    [
        ("w9000 w0", {}, range(1, 20)),
        ("w0", {}, range(1_024, 1_025)),
        ("w0 w", {"game": "game 3"}, range(1_024, 1_025)),
        ("w1 w2 w3", {"game": "game 3"}, range(50, 1_024)),
    ],
    ids=["rare", "frequent", "frequent_in_one_game", "three_words_in_one_game"],
)
def test_a_search_costs_what_it_ranks(
    benchmark: Benchmark, transaction: ReadTransaction, text: str, fixed: dict[str, str], match_count: range
) -> None:
    run = Run(cast(Any, None), cast(Any, None), SYSTEM, LIMITS, may_run_long=True)

    def searched() -> Search[Message]:
        transaction.impose(LIMITS, lambda: None)
        transaction.read_set = transaction.read_set.fresh()
        return DatabaseReader(transaction, run).search(Message.search, text, **fixed)

    def take(n: int) -> list[Message]:
        try:
            searched().take(n).send(None)
        except StopIteration as stop:
            found: list[Message] = stop.value
            return found
        raise AssertionError("a search never waits")

    assert len(take(10_000)) in match_count
    assert len(benchmark(take, 20)) == min(20, len(take(20)))
