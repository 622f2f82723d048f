"""`InvalidationIndex` against comparing every read set with every write."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine import Limits, Table, aggregate, index
from engine.live.invalidation import InvalidationIndex
from engine.ranges import IndexRange, OrderKey, after, before, key_prefix
from engine.schema import DeletedAt, compile_schema
from engine.transaction.read_set import CellEntry, ReadSet
from engine.transaction.write_set import Write


class Thing(Table, name="things"):
    a: int | None
    b: str
    deleted_at: DeletedAt = None
    by_a_b = index("a", "b")
    by_b = index("b")
    cells_b = aggregate("b", sum=("a",))
    cells = aggregate(sum=("a",))


THINGS = compile_schema([Thing], Limits()).tables_by_name["things"]
INDEXES = {
    index.name: index for index in (*THINGS.indexes_by_name.values(), *THINGS.indexes_with_deleted.values())
}  # those that leave deleted documents out, and those that hold them

numbers, texts, ticks = st.sampled_from([None, 0, 1, 2]), st.sampled_from(["", "x", "y"]), st.integers(1, 4)


@st.composite
def prefixes(draw: st.DrawFn, name: str) -> OrderKey:
    columns_by_name = {"by_a_b": [numbers, texts, ticks], "by_b": [texts, ticks], "by_creation_time": [ticks]}
    columns = columns_by_name[INDEXES[name].declared_name]
    return key_prefix([draw(column) for column in columns[: draw(st.integers(0, len(columns)))]])


@st.composite
def ranges(draw: st.DrawFn) -> IndexRange:
    name = draw(st.sampled_from(sorted(INDEXES)))
    prefix = draw(prefixes(name))
    whole = IndexRange("things", name, before(prefix), after(prefix))
    cuts = st.tuples(st.sampled_from([before, after]), prefixes(name)).map(lambda cut: cut[0](cut[1]))
    start, end = sorted(draw(st.tuples(cuts, cuts)))
    return draw(st.sampled_from([whole, IndexRange("things", name, start, end)]))


@st.composite
def cell_entries(draw: st.DrawFn) -> CellEntry:
    name, columns = draw(st.sampled_from([("cells_b", [texts]), ("cells", [])]))
    key = key_prefix([draw(column) for column in columns])
    return CellEntry("things", name, key, draw(st.sampled_from([None, "a"])))


@st.composite
def read_sets(draw: st.DrawFn) -> ReadSet:
    read_set = ReadSet(100)
    for index_range in draw(st.lists(ranges(), max_size=3)):
        read_set.add_range(index_range)
    for index_range in draw(st.lists(ranges(), max_size=3)):
        read_set.add_key_range(index_range)
    for entry in draw(st.lists(cell_entries(), max_size=3)):
        read_set.add_cell(entry)
    for document_id in draw(st.lists(st.sampled_from(["1", "2", "3"]), max_size=2)):
        read_set.add_document("things", document_id)
    return read_set


def thing(tick: int, a: int | None, b: str, deleted_at: float | None = None) -> Thing:
    return Thing(id=str(tick), creation_time=tick / 4096, a=a, b=b, deleted_at=deleted_at)


@st.composite
def changes(draw: st.DrawFn) -> Write:
    tick = draw(ticks)
    documents = st.builds(thing, st.just(tick), numbers, texts, st.sampled_from([None, None, 5.0]))
    old, new = draw(st.tuples(st.none() | documents, st.none() | documents).filter(any))
    return Write(THINGS, str(tick), old, new)


def is_affected(read_set: ReadSet, write: Write) -> bool:
    """The same question, range by range."""
    if ("things", write.document_id) in read_set.documents:
        return True

    def holds(index_range: IndexRange, document: Any) -> bool:
        index = INDEXES[index_range.index]
        is_there = document is not None and (index.holds_deleted or document.deleted_at is None)
        return is_there and index_range.holds(index.key_of(document))

    def number(entry: CellEntry, document: Any) -> int:
        """What the document gives to one number of a cell."""
        is_there = document is not None and document.deleted_at is None
        key = key_prefix([document.b] if entry.aggregate == "cells_b" else []) if is_there else None
        return 0 if key != entry.key else 1 if entry.field is None else document.a or 0

    if any(number(entry, write.old) != number(entry, write.new) for entry in read_set.cells):
        return True
    return any(holds(r, write.old) or holds(r, write.new) for r in read_set.ranges) or any(
        holds(r, write.old) != holds(r, write.new) for r in read_set.key_ranges
    )


class FindsWhatWasRead(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index: InvalidationIndex[str] = InvalidationIndex()
        self.read_sets: dict[str, ReadSet] = {}

    @rule(entry=st.sampled_from("abcd"), read_set=read_sets())
    def put(self, entry: str, read_set: ReadSet) -> None:
        self.index.put(entry, read_set)
        self.read_sets[entry] = read_set

    @rule(entry=st.sampled_from("abcd"))
    def remove(self, entry: str) -> None:
        self.index.remove(entry)
        self.read_sets.pop(entry, None)

    @rule(writes=st.lists(changes(), max_size=3))
    def write(self, writes: list[Write]) -> None:
        expected = {entry for entry, read in self.read_sets.items() if any(is_affected(read, w) for w in writes)}
        assert self.index.affected(writes) == expected

    @invariant()
    def nothing_is_left_of_what_was_removed(self) -> None:
        assert len(self.index) == len(self.read_sets)
        if not self.read_sets:
            assert not self.index._by_document
            assert not self.index._by_index
            assert not self.index._by_cell


@pytest.mark.slow
class TestFindsWhatWasRead(FindsWhatWasRead.TestCase):  # type: ignore[misc]  # made at run time
    settings = settings(stateful_step_count=20)


def everything(name: str) -> IndexRange:
    return IndexRange("things", name, before(()), after(()))


@given(changes())
def test_a_write_to_another_table_affects_nothing(write: Write) -> None:
    index: InvalidationIndex[str] = InvalidationIndex()
    read_set = ReadSet(1)
    read_set.add_range(IndexRange("others", "by_b", before(()), after(())))
    read_set.add_document("others", write.document_id)
    index.put("entry", read_set)
    assert not index.affected([write])


def test_a_count_is_not_affected_by_a_document_that_stays_in_its_range() -> None:
    index: InvalidationIndex[str] = InvalidationIndex()
    read_set = ReadSet(1)
    read_set.add_key_range(everything("by_b"))
    index.put("count", read_set)
    assert not index.affected([Write(THINGS, "1", thing(1, 0, "x"), thing(1, 1, "y"))])
    assert index.affected([Write(THINGS, "1", thing(1, 0, "x"), None)]) == {"count"}


def test_two_counts_of_one_query_are_affected_by_a_document_that_goes_from_one_to_the_other() -> None:
    index: InvalidationIndex[str] = InvalidationIndex()
    read_set = ReadSet(2)
    for text in ("x", "y"):
        read_set.add_key_range(IndexRange("things", "by_b", before(key_prefix([text])), after(key_prefix([text]))))
    index.put("counts", read_set)
    assert index.affected([Write(THINGS, "1", thing(1, 0, "x"), thing(1, 0, "y"))]) == {"counts"}


def test_a_write_looks_only_into_the_buckets_of_its_own_keys() -> None:
    """Invariant 2, by counting: ten thousand readers of other prefixes are never looked at."""
    index: InvalidationIndex[int] = InvalidationIndex()
    for number in range(10_000):
        read_set = ReadSet(1)
        prefix = key_prefix([number, "x"])
        read_set.add_range(IndexRange("things", "by_a_b", before(prefix), after(prefix)))
        index.put(number, read_set)
    buckets = index._by_index["things", "by_a_b"]._buckets_by_length
    assert {length: len(by_prefix) for length, by_prefix in buckets.items()} == {4: 10_000}
    assert index.affected([Write(THINGS, "1", None, thing(1, 77, "x"))]) == {77}


def test_a_write_affects_only_the_numbers_of_a_cell_that_it_changes() -> None:
    index: InvalidationIndex[str] = InvalidationIndex()
    for name, field in (("count", None), ("sum", "a")):
        for text in ("x", "y"):
            read_set = ReadSet(1)
            read_set.add_cell(CellEntry("things", "cells_b", key_prefix([text]), field))
            index.put(f"{name} of {text}", read_set)
    assert index.affected([Write(THINGS, "1", thing(1, 2, "x"), thing(1, 3, "x"))]) == {"sum of x"}
    assert index.affected([Write(THINGS, "1", None, thing(1, None, "x"))]) == {"count of x"}
    assert not index.affected([Write(THINGS, "1", thing(1, None, "x"), thing(1, 0, "x"))])
    moved = index.affected([Write(THINGS, "1", thing(1, 2, "x"), thing(1, 2, "y"))])
    assert moved == {"count of x", "count of y", "sum of x", "sum of y"}
