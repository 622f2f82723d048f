"""What totals and ranks cost: seconds for one read, or for one written document, rows in the page cache.

Varies: how many rows the table has, all of them behind one key, and whether a total or ranks are kept; where they are
not, the same number is counted by a scan of the index. A write goes there and back, which is two; nothing is committed.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.ids import creation_time_of, make_id
from engine.limits import Limits
from engine.ranges import IndexRange, after, before, key_prefix
from engine.schema import IndexSchema, Table, aggregate, compile_schema, index
from engine.storage import shadows
from engine.storage.connections import TEMPORARY, Database
from engine.storage.ddl import apply_schema
from engine.storage.rows import RowCodec
from engine.testing import ManualClock
from engine.transaction.reading import Catalog, ReadTransaction
from engine.transaction.transaction import TickSource, WriteTransaction

Benchmark = Callable[..., Any]
PAGE_SIZE = 50


class CountedViewer(Table):
    game: str
    active: bool
    seconds: int
    watching = aggregate("game", "active", sum=("seconds",))
    by_game = index("game", "active")


class Viewer(Table):
    game: str
    active: bool
    seconds: int
    by_game = index("game", "active")


class RankedScore(Table):
    board: str
    points: int
    by_points = index("board", "points", ranked=True)


class Score(Table):
    board: str
    points: int
    by_points = index("board", "points")


class Store:
    """A database with this many rows in each of the tables."""

    def __init__(self, row_count: int) -> None:
        self.row_count, self.clock, chance = row_count, ManualClock(), random.Random(1)
        document_types: list[type[Table]] = [CountedViewer, Viewer, RankedScore, Score]
        self.schema = compile_schema(document_types, Limits())
        self.database = Database.open(TEMPORARY, Limits())
        writer = self.database.writer
        apply_schema(writer, self.schema)
        codecs = {document_type: RowCodec[Any](self.schema.table_of(document_type)) for document_type in document_types}
        self.catalog = Catalog(codecs.values())
        self.ids: dict[type[Table], list[str]] = {document_type: [] for document_type in document_types}
        writer.begin()
        for tick in range(1, row_count + 1):
            points = chance.randrange(1 << 30)
            for document_type, codec in codecs.items():
                fields: dict[str, Any] = {"board": "b", "points": points}
                if document_type in (CountedViewer, Viewer):
                    fields = {"game": "g", "active": True, "seconds": 60}
                document_id = make_id(codec.table.id_tag, tick, b"123456789")
                document = document_type(id=document_id, creation_time=creation_time_of(tick), **fields)
                codec.insert(writer, codec.encode(document))
                self.ids[document_type].append(document_id)
        for codec in codecs.values():  # made anew, of the rows
            shadows.migrate(writer, codec.table, shadows.describe(codec.table), set(codec.table.fields_by_name))
        writer.commit()
        self.ticks = TickSource(self.clock, row_count)

    def read(self) -> ReadTransaction:
        transaction = ReadTransaction(self.database.writer, self.catalog, Limits())
        transaction.lift_limits()  # a million rows are more than a function may count
        return transaction

    def write(self) -> WriteTransaction:
        return WriteTransaction(self.database.writer, self.catalog, Limits(), self.ticks, self.clock)

    def index(self, document_type: type[Table], name: str) -> IndexSchema:
        return self.schema.table_of(document_type).indexes_by_name[name]

    def range(self, document_type: type[Table], name: str, *values: Any) -> IndexRange:
        prefix = key_prefix(values)
        return IndexRange(self.schema.table_of(document_type).name, name, before(prefix), after(prefix))


@pytest.fixture(scope="module", params=[1_000, 1_000_000], ids="{:,} rows".format)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    store = Store(request.param)
    yield store
    store.database.close()


kept_or_not = pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "by scan"])


@kept_or_not
def test_a_count_is_read(benchmark: Benchmark, store: Store, is_kept: bool) -> None:
    document_type = CountedViewer if is_kept else Viewer
    index, index_range = store.index(document_type, "by_game"), store.range(document_type, "by_game", "g", True)
    assert benchmark(lambda: store.read().count(document_type, index, index_range)) == store.row_count


@kept_or_not
def test_a_viewer_leaves_and_joins(benchmark: Benchmark, store: Store, is_kept: bool) -> None:
    ids, chance = store.ids[CountedViewer if is_kept else Viewer], random.Random(2)

    def leave_and_join() -> None:
        transaction, document_id = store.write(), chance.choice(ids)
        transaction.patch(document_id, {"active": False})
        transaction.patch(document_id, {"active": True})

    store.database.writer.begin()
    benchmark(leave_and_join)
    store.database.writer.rollback()
    shadows.verify(store.database.writer, store.schema.table_of(CountedViewer))


@kept_or_not
def test_a_document_is_ranked(benchmark: Benchmark, store: Store, is_kept: bool) -> None:
    document_type = RankedScore if is_kept else Score
    index, index_range = store.index(document_type, "by_points"), store.range(document_type, "by_points", "b")
    (lowest,) = store.read().find(document_type, "by_points", "b", limit=1)
    assert benchmark(lambda: rank(store, document_type, index, index_range, lowest.id)) == store.row_count - 1


def rank(
    store: Store, document_type: type[Table], index: IndexSchema, index_range: IndexRange, document_id: str
) -> int | None:
    """The place in descending order."""
    transaction = store.read()
    if index.is_ranked:
        return transaction.rank(document_type, index, index_range, document_id, descending=True)
    document = transaction.get(document_id)
    assert document is not None
    ahead = index_range.ahead_of(index.key_of(document), descending=True)
    return transaction.count(document_type, index, ahead)


def test_a_page_in_the_middle_is_read_with_the_total(benchmark: Benchmark, store: Store) -> None:
    index, index_range = store.index(RankedScore, "by_points"), store.range(RankedScore, "by_points", "b")

    def read() -> tuple[list[Any], int]:
        transaction, skip = store.read(), store.row_count // 2
        page = transaction.slice(RankedScore, index, index_range, descending=True, skip=skip, size=PAGE_SIZE)
        return page, transaction.count(RankedScore, index, index_range)

    page, total = benchmark(read)
    points = [score.points for score in page]
    assert (len(points), points, total) == (PAGE_SIZE, sorted(points, reverse=True), store.row_count)


@kept_or_not
def test_a_score_changes_twice(benchmark: Benchmark, store: Store, is_kept: bool) -> None:
    ids, chance = store.ids[RankedScore if is_kept else Score], random.Random(3)

    def change() -> None:
        transaction, document_id = store.write(), chance.choice(ids)
        transaction.patch(document_id, {"points": chance.randrange(1 << 30)})
        transaction.patch(document_id, {"points": chance.randrange(1 << 30)})

    store.database.writer.begin()
    benchmark(change)
    store.database.writer.rollback()


def test_the_ranks_are_those_of_an_index_that_is_built_at_once(store: Store) -> None:
    """Not a figure: that what was measured is right."""
    writer, chance = store.database.writer, random.Random(4)
    writer.begin()
    for document_id in chance.sample(store.ids[RankedScore], 500):
        store.write().patch(document_id, {"points": chance.randrange(1 << 30)})
    shadows.verify(writer, store.schema.table_of(RankedScore))
    writer.rollback()
