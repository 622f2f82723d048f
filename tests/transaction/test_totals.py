"""Totals, ranks and counts after any writes: what they are, and whom a write makes doubt them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.errors import LimitExceeded, TotalOverflow
from engine.limits import Limits
from engine.live.invalidation import InvalidationIndex
from engine.ranges import IndexRange, OrderKey, after, before, key_prefix
from engine.schema import AggregateSchema, DeletedAt, IndexSchema, Table, aggregate, compile_schema, index
from engine.storage import ddl, shadows
from engine.storage.connections import TEMPORARY, Database
from engine.storage.rows import RowCodec
from engine.testing import ManualClock
from engine.transaction.read_set import CellEntry
from engine.transaction.reading import Catalog, ReadTransaction
from engine.transaction.totals import covering
from engine.transaction.transaction import TickSource, WriteTransaction
from engine.transaction.write_set import WriteSet
from engine.values.wire import INT64_MAX


class Score(Table, name="scores"):
    board: str
    active: bool | None = None
    points: int | None = None
    note: str = ""
    deleted_at: DeletedAt = None
    boards = aggregate("board", sum=("points",))
    active_boards = aggregate("active", "board")
    everything = aggregate(sum=("points",))
    by_points = index("board", "points", ranked=True)
    by_active = index("board", "active")


class Store:
    """A database with scores: few of them have nodes in the ranked index, but some do."""

    def __init__(self, document_count: int) -> None:
        self.database, self.clock = Database.open(TEMPORARY, Limits()), ManualClock()
        self.writer = self.database.writer
        schema = compile_schema([Score], Limits())
        ddl.apply_schema(self.writer, schema)
        self.table = schema.table_of(Score)
        self.catalog = Catalog([RowCodec(self.table)])
        self.ticks = TickSource(self.clock, 0)
        with self.transaction() as transaction:
            for number in range(document_count):
                board = "ab"[number % 2]
                transaction.insert(Score(board=board, active=number % 3 == 0, points=number % 7, note=f"{number}"))
        self.writer.begin()

    @contextmanager
    def transaction(self) -> Iterator[WriteTransaction]:
        self.writer.begin()
        yield self.write()
        self.writer.commit()

    def write(self) -> WriteTransaction:
        return WriteTransaction(self.writer, self.catalog, Limits(), self.ticks, self.clock)

    def read(self) -> ReadTransaction:
        return ReadTransaction(self.writer, self.catalog, Limits())

    def documents(self, *, with_deleted: bool = False) -> list[Score]:
        by_creation_time = self.table.indexes_by_name["by_creation_time"]
        if with_deleted:
            by_creation_time = self.table.indexes_with_deleted["by_creation_time"]
        return self.read().scan(Score, by_creation_time, everything(by_creation_time), descending=False, limit=None)

    def aggregate(self, name: str) -> AggregateSchema:
        return next(aggregate for aggregate in self.table.aggregates if aggregate.name == name)


def everything(index: IndexSchema) -> IndexRange:
    return IndexRange("scores", index.name, before(()), after(()))


STORE = Store(150)
BY_POINTS, BY_ACTIVE = STORE.table.indexes_by_name["by_points"], STORE.table.indexes_by_name["by_active"]

boards, actives, points = (
    st.sampled_from("abc"),
    st.sampled_from([None, False, True]),
    st.sampled_from([None, -5, 0, 3, 9]),
)
fields = st.fixed_dictionaries(
    {}, optional={"board": boards, "active": actives, "points": points, "note": st.sampled_from(["", "n"])}
)


# -- what is asked, and what the answer is by looking at every document


class CountOf(NamedTuple):
    index: IndexSchema
    index_range: IndexRange

    def ask(self, read: ReadTransaction) -> object:
        return read.count(Score, self.index, self.index_range)

    def answer(self, documents: list[Score]) -> object:
        return sum(self.index_range.holds(self.index.key_of(document)) for document in documents)


class NumberOf(NamedTuple):
    """One number of a cell."""

    aggregate: AggregateSchema
    key: OrderKey
    field: str | None

    def ask(self, read: ReadTransaction) -> object:
        read.read_set.add_cell(CellEntry("scores", self.aggregate.name, self.key, self.field))
        numbers = read.total(STORE.table, self.aggregate, self.key)
        return numbers[0 if self.field is None else 1 + self.aggregate.sums.index(self.field)]

    def answer(self, documents: list[Score]) -> object:
        inside = [document for document in documents if self.aggregate.key_of(document) == self.key]
        return len(inside) if self.field is None else sum(getattr(document, self.field) or 0 for document in inside)


class RankOf(NamedTuple):
    index_range: IndexRange
    descending: bool
    document_id: str

    def ask(self, read: ReadTransaction) -> object:
        return read.rank(Score, BY_POINTS, self.index_range, self.document_id, descending=self.descending)

    def answer(self, documents: list[Score]) -> object:
        ids = [document.id for document in scanned(documents, self.index_range, descending=self.descending)]
        return ids.index(self.document_id) if self.document_id in ids else None


class PageOf(NamedTuple):
    index_range: IndexRange
    descending: bool
    skip: int
    size: int

    def ask(self, read: ReadTransaction) -> object:
        shape = {"descending": self.descending, "skip": self.skip, "size": self.size}
        return read.slice(Score, BY_POINTS, self.index_range, **shape)

    def answer(self, documents: list[Score]) -> object:
        return scanned(documents, self.index_range, descending=self.descending)[self.skip :][: self.size]


Ask = CountOf | NumberOf | RankOf | PageOf


def scanned(documents: list[Score], index_range: IndexRange, *, descending: bool) -> list[Score]:
    inside = [document for document in documents if index_range.holds(BY_POINTS.key_of(document))]
    return sorted(inside, key=BY_POINTS.key_of, reverse=descending)


def some_of(documents: list[Score]) -> st.SearchStrategy[Score]:
    """Often one of a few, so that what is asked about is written too."""
    return st.sampled_from(documents[:5]) | st.sampled_from(documents)


@st.composite
def ranges(draw: st.DrawFn, index: IndexSchema) -> IndexRange:
    prefix = key_prefix(draw(st.sampled_from([(), ("a",), ("b",), ("a", None), ("a", 0), ("b", 1)])))
    if draw(st.booleans()):
        return IndexRange("scores", index.name, before(prefix), after(prefix))
    cuts = [draw(st.sampled_from([before, after]))(key_prefix(("a", draw(points)))) for _ in range(2)]
    return IndexRange("scores", index.name, min(cuts), max(cuts))


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    kind = draw(st.sampled_from([CountOf, NumberOf, RankOf, PageOf]))
    if kind is CountOf:
        index = draw(st.sampled_from([BY_POINTS, BY_ACTIVE, STORE.table.indexes_by_name["by_creation_time"]]))
        if index.name == "by_creation_time":
            return CountOf(index, everything(index))
        return CountOf(index, draw(ranges(index)))
    if kind is NumberOf:
        aggregate = draw(st.sampled_from(STORE.table.aggregates))
        values = {"board": boards, "active": actives}
        key = key_prefix([draw(values[field]) for field in aggregate.fields])
        return NumberOf(aggregate, key, draw(st.sampled_from([None, *aggregate.sums])))
    index_range, descending = draw(ranges(BY_POINTS)), draw(st.booleans())
    if kind is RankOf:
        return RankOf(index_range, descending, draw(some_of(STORE.documents(with_deleted=True))).id)
    skip = draw(st.just(0) | st.integers(0, 60))  # often the first page
    return PageOf(index_range, descending, skip, draw(st.integers(1, 3) | st.integers(1, 30)))


class NobodyHoldsWhatIsNoLongerTrue(RuleBasedStateMachine):
    """Answers are asked again only when a write affects them, and are always what looking at every document gives."""

    def __init__(self) -> None:
        super().__init__()
        STORE.writer.savepoint()
        self.invalidation: InvalidationIndex[Ask] = InvalidationIndex()
        self.held: dict[Ask, object] = {}

    def teardown(self) -> None:
        shadows.verify(STORE.writer, STORE.table)
        STORE.writer.rollback_to()
        STORE.writer.release()

    @rule(ask=asks())
    def hold(self, ask: Ask) -> None:
        read = STORE.read()
        self.held[ask] = ask.ask(read)
        self.invalidation.put(ask, read.read_set)

    @rule(data=st.data(), count=st.integers(1, 3))
    def write(self, data: st.DataObject, count: int) -> None:
        transaction = STORE.write()
        for _ in range(count):
            self.write_one(transaction, data)
        self.publish(transaction.write_set)

    @rule(data=st.data(), is_kept=st.booleans())
    def write_nested(self, data: st.DataObject, is_kept: bool) -> None:
        transaction = STORE.write()
        self.write_one(transaction, data)
        savepoint = transaction.begin_nested()
        self.write_one(transaction, data)
        self.write_one(transaction, data)
        (transaction.end_nested if is_kept else transaction.undo_nested)(savepoint)
        self.write_one(transaction, data)
        self.publish(transaction.write_set)

    def write_one(self, transaction: WriteTransaction, data: st.DataObject) -> None:
        documents = STORE.documents(with_deleted=True)
        operations: list[Callable[[], object]] = [
            lambda: transaction.insert(Score(**{"board": "a"} | data.draw(fields)))
        ]
        if documents:
            document = data.draw(some_of(documents))
            if document.deleted_at is None:
                operations += [
                    lambda: transaction.patch(document.id, data.draw(fields)),
                    lambda: transaction.replace(document.id, Score(**{"board": "c"} | data.draw(fields))),
                    lambda: transaction.delete(document.id),
                ]
            else:
                operations.append(lambda: transaction.restore(document.id))
            operations.append(lambda: transaction.purge(document.id))
        data.draw(st.sampled_from(operations))()

    def publish(self, write_set: WriteSet) -> None:
        for ask in self.invalidation.affected(write_set):
            read = STORE.read()
            self.held[ask] = ask.ask(read)
            self.invalidation.put(ask, read.read_set)

    @precondition(lambda self: self.held)
    @invariant()
    def held_answers_are_true(self) -> None:
        documents = STORE.documents()
        assert self.held == {ask: ask.answer(documents) for ask in self.held}


@pytest.mark.slow
class TestNobodyHoldsWhatIsNoLongerTrue(NobodyHoldsWhatIsNoLongerTrue.TestCase):  # type: ignore[misc]  # made at run time
    settings = settings(stateful_step_count=20)


# -- which count is a cell


def whole(*values: Any) -> tuple[OrderKey, OrderKey]:
    prefix = key_prefix(values)
    return before(prefix), after(prefix)


@pytest.mark.parametrize(
    ("index", "cuts", "found"),
    [
        ("by_creation_time", whole(), ("everything", ())),
        ("by_points", whole(), ("everything", ())),
        ("by_points", whole("a"), ("boards", key_prefix(["a"]))),
        ("by_active", whole("a", True), ("active_boards", key_prefix([True, "a"]))),
        ("by_active", whole("a", None), ("active_boards", key_prefix([None, "a"]))),
        ("by_points", whole("a", 3), None),
        ("by_creation_time", whole(7), None),
        ("by_active", whole("a", True, 7), None),
        ("by_points", (before(key_prefix(["a"])), after(key_prefix(["b"]))), None),
        ("by_active", (before(key_prefix(["a", False])), after(key_prefix(["a", True]))), None),
        ("by_points", (after(key_prefix(["a", None])), after(key_prefix(["a"]))), None),
        ("by_points", (before(key_prefix(["a"])), before(key_prefix(["a"]))), None),
    ],
)
def test_a_count_is_a_cell_if_its_equal_fields_are_the_key(index: str, cuts: Any, found: Any) -> None:
    index_schema = STORE.table.indexes_by_name[index]
    cell = covering(STORE.table, index_schema, IndexRange("scores", index, *cuts))
    assert found == (None if cell is None else (cell[0].name, cell[1]))


def test_a_count_with_deleted_documents_is_not_a_cell() -> None:
    index_schema = STORE.table.indexes_with_deleted["by_points"]
    assert covering(STORE.table, index_schema, everything(index_schema)) is None


def test_a_total_a_count_and_a_rank_are_few_documents_against_the_limits() -> None:
    read = STORE.read()
    read.impose(Limits(read_document_count_max=6), lambda: None)
    assert read.count(Score, BY_POINTS, IndexRange("scores", "by_points", *whole("a"))) == 75  # 1: the cell
    assert read.count(Score, BY_POINTS, IndexRange("scores", "by_points", *whole("a", 3))) == 10  # 1: the ranks
    document = STORE.documents()[-1]
    assert read.rank(Score, BY_POINTS, everything(BY_POINTS), document.id, descending=True) is not None  # 2
    read.total(STORE.table, STORE.aggregate("boards"), key_prefix(["a"]))  # 1
    assert read.read_count == 5


# -- writes


def test_a_rank_that_fails_for_the_size_of_its_document_depends_on_it() -> None:
    read = ReadTransaction(STORE.writer, STORE.catalog, Limits(read_size_bytes_max=1))
    document, *_ = STORE.documents()
    with pytest.raises(LimitExceeded, match="bytes read"):
        RankOf(everything(BY_POINTS), False, document.id).ask(read)
    assert set(read.read_set.documents) == {("scores", document.id)}


def test_a_write_that_takes_a_sum_too_far_leaves_nothing_behind() -> None:
    class Play(Table, name="plays"):
        name: str
        points: int
        plays = aggregate()
        names = aggregate("name", sum=("points",))

    database = Database.open(TEMPORARY, Limits())
    schema = compile_schema([Play], Limits())
    ddl.apply_schema(database.writer, schema)
    table = schema.table_of(Play)
    catalog, clock = Catalog([RowCodec(table)]), ManualClock()
    database.writer.begin()
    transaction = WriteTransaction(database.writer, catalog, Limits(), TickSource(clock, 0), clock)
    first = transaction.insert(Play(name="a", points=INT64_MAX))
    other = transaction.insert(Play(name="b", points=1))
    written = len(transaction.write_set)
    for write in (
        lambda: transaction.insert(Play(name="a", points=1)),
        lambda: transaction.patch(other, {"name": "a"}),
        lambda: transaction.replace(other, Play(name="a", points=2)),
    ):
        with pytest.raises(TotalOverflow):
            write()
    assert len(transaction.write_set) == written
    shadows.verify(database.writer, table)
    transaction.patch(first, {"points": 0})
    transaction.patch(other, {"name": "a"})
    shadows.verify(database.writer, table)
    database.writer.rollback()
    database.close()


@contextmanager
def traced(store: Store) -> Iterator[list[str]]:
    statements: list[str] = []
    store.writer._connection.set_trace_callback(statements.append)
    yield statements
    store.writer._connection.set_trace_callback(None)


def test_a_write_beside_keys_and_sums_touches_no_cell() -> None:
    document = STORE.documents()[0]
    STORE.writer.savepoint()
    with traced(STORE) as statements:
        STORE.write().patch(document.id, {"note": "other"})
    STORE.writer.rollback_to()
    STORE.writer.release()
    assert not [statement for statement in statements if ".totals" in statement or ".ranks" in statement]


@pytest.mark.slow
def test_100_000_viewers_join_and_leave_at_the_cost_of_ten() -> None:
    class Viewer(Table, name="viewers"):
        game: str
        active: bool
        seconds: int = 0
        watching = aggregate("game", "active", sum=("seconds",))
        by_game = index("game", "active")

    database = Database.open(TEMPORARY, Limits())
    schema = compile_schema([Viewer], Limits())
    ddl.apply_schema(database.writer, schema)
    catalog, clock = Catalog([RowCodec(schema.table_of(Viewer))]), ManualClock()
    ticks = TickSource(clock, 0)
    database.writer.begin()
    statements: list[str] = []
    costs: list[list[str]] = []
    index_schema = schema.table_of(Viewer).indexes_by_name["by_game"]
    for count in (10, 100_000):
        for _ in range(count):
            WriteTransaction(database.writer, catalog, Limits(), ticks, clock).insert(Viewer(game="g", active=True))
        database.writer._connection.set_trace_callback(statements.append)
        transaction = WriteTransaction(database.writer, catalog, Limits(), ticks, clock)
        viewer = transaction.insert(Viewer(game="g", active=True))
        transaction.patch(viewer, {"seconds": 60})
        transaction.patch(viewer, {"active": False})
        transaction.count(Viewer, index_schema, IndexRange("viewers", "by_game", *whole("g", True)))
        transaction.delete(viewer)
        database.writer._connection.set_trace_callback(None)
        costs.append([statement.split()[0] for statement in statements])
        statements.clear()
    few, many = costs
    assert few == many
    assert len(many) < 30
    database.writer.rollback()
    database.close()
