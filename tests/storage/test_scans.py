"""A scan gives what sorting all documents in Python by their order keys would give, and walks an index for it."""

import re
from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ids import creation_time_of, make_id
from engine.limits import Limits
from engine.ranges import BY_CREATION_TIME, IndexRange, OrderKey, after, before, key_prefix
from engine.schema import DeletedAt, IndexSchema, Table, compile_schema, index
from engine.storage import ddl, scans
from engine.storage.connections import TEMPORARY, Database
from engine.storage.rows import RowCodec
from tests.strategies import int64s, texts


class Thing(Table, name="things"):
    number: int | None = None
    ratio: float = 0.0
    label: str | None = None
    name: str = ""
    blob: bytes | None = None
    mixed: int | float | str | bytes | None = None
    flag: bool | None = None
    big: float | None = None

    by_number = index("number")
    by_name_ratio = index("name", "ratio")
    by_label_number = index("label", "number")
    by_mixed = index("mixed")
    by_flag_mixed = index("flag", "mixed")
    by_blob_big = index("blob", "big")
    by_much = index("number", "label", "ratio", "mixed", "flag")


class Kept(Thing, name="kept"):
    """The same where deleted documents stay."""

    deleted_at: DeletedAt = None


class Store(NamedTuple):
    database: Database
    codec: RowCodec[Thing]

    @property
    def name(self) -> str:
        return self.codec.table.name

    @property
    def indexes(self) -> list[IndexSchema]:
        """Those of the documents that are there, and those with deleted ones."""
        table = self.codec.table
        return [*table.indexes_by_name.values(), *table.indexes_with_deleted.values()]

    def insert(self, document: Thing, number: int) -> Thing:
        """Store it as the number-th document ever."""
        table = self.codec.table
        document_id = make_id(table.id_tag, number, bytes([number]) * 9)
        document = table.with_id(document, document_id, creation_time_of(number))
        table.check(document)
        self.codec.insert(self.database.writer, self.codec.encode(document))
        return self.codec.decode(self.codec.encode(document))


@pytest.fixture(scope="module")
def stores() -> Iterator[list[Store]]:
    schema = compile_schema([Thing, Kept], Limits())
    database = Database.open(TEMPORARY, Limits())
    ddl.apply_schema(database.writer, schema)
    yield [Store(database, RowCodec(schema.table_of(table))) for table in (Thing, Kept)]
    database.close()


@pytest.fixture
def store(stores: list[Store]) -> Store:
    return stores[0]


# few values, so that many keys share a prefix; the neighbours of each kind, so that its borders are met
numbers = st.sampled_from([-1, 0, 1, 2**53, 2**53 + 1, -(2**63), 2**63 - 1]) | int64s
ratios = st.sampled_from([-inf, -1.5, 0.0, -0.0, 1.0, 2.0**53, 2.0**63, inf]) | st.floats(allow_nan=False)
some_texts = st.sampled_from(["", "\0", "a", "ab", "b", "1", "\U0001f600", "\uffff"]) | texts
blobs = st.sampled_from([b"", b"\0", b"a", b"\xff"]) | st.binary(max_size=2)
mixed = st.none() | numbers | ratios | some_texts | blobs
scalars = mixed | st.booleans()  # for cuts: also what a column cannot hold

things = st.builds(
    Thing,
    number=st.none() | numbers,
    ratio=ratios,
    label=st.none() | some_texts,
    name=some_texts,
    blob=st.none() | blobs,
    mixed=mixed,
    flag=st.none() | st.booleans(),
    big=st.none() | ratios,
)


def documents_of(data: st.DataObject, store: Store, things: list[Thing]) -> list[Thing]:
    """The same documents for this table; where deleted ones stay, some of them are."""
    if store.codec.table.deleted_field is None:
        return things
    return [
        Kept(**{name: getattr(thing, name) for name in Thing.__struct_fields__}, deleted_at=deleted_at)
        for thing in things
        for deleted_at in (data.draw(st.sampled_from([None, 5.0])),)
    ]


@st.composite
def cuts(draw: st.DrawFn, index: IndexSchema, documents: list[Thing]) -> OrderKey:
    """A place between keys: near a document, or made of any values whatever the columns hold."""
    if documents and draw(st.booleans()):
        full = index.key_of(draw(st.sampled_from(documents)))[:-1]
        prefix = full[: 2 * draw(st.integers(0, len(full) // 2))]
    else:
        prefix = key_prefix(draw(st.lists(scalars, max_size=len(index.fields))))
    return draw(st.sampled_from([before, after]))(prefix)


def plan_of(store: Store, statement: scans.Statement) -> list[str]:
    rows = store.database.writer.fetch_all(f"EXPLAIN QUERY PLAN {statement.sql}", (*statement.parameters, 1))
    return [row[3] for row in rows]


def assert_walks_index(plan: list[str], name: str, index: IndexSchema, statement: scans.Statement) -> None:
    """No sort, no scan of the table; a look-up wherever the segment has anything to look up."""
    looked_up = re.sub('"deleted_at" IS (NOT )?NULL( AND )?', "", statement.sql)
    walk = "SEARCH" if re.search(" WHERE [^ ]", looked_up) else "SCAN"
    steps = [step for step in plan if name in step]
    for step in steps:
        assert step.startswith(f"{walk} {name}")
        if index.declared_name != BY_CREATION_TIME or (index.deleted_field and not index.holds_deleted):
            assert f"INDEX {name}.{index.declared_name}" in step
        elif walk == "SEARCH":
            assert "INTEGER PRIMARY KEY" in step
    assert not any("TEMP B-TREE" in step for step in plan)
    # both parts of the index, merged
    assert len(steps) == (2 if index.holds_deleted and index.declared_name != BY_CREATION_TIME else 1)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(data=st.data(), documents=st.lists(things, max_size=12), descending=st.booleans(), limit=st.integers(0, 15))
def test_a_scan_is_the_sorted_documents_of_its_range_and_walks_its_index(
    stores: list[Store], data: st.DataObject, documents: list[Thing], descending: bool, limit: int
) -> None:
    store = data.draw(st.sampled_from(stores))
    writer, table = store.database.writer, store.codec.table
    index = data.draw(st.sampled_from(store.indexes))
    documents = documents_of(data, store, documents)
    writer.begin()
    try:
        stored = [store.insert(document, number) for number, document in enumerate(documents, 1)]
        cut_strategy = cuts(index, stored)
        index_range = IndexRange(table.name, index.name, data.draw(cut_strategy), data.draw(cut_strategy))

        held = [document for document in stored if index.holds_deleted or not table.is_deleted(document)]
        inside = [document for document in held if index_range.holds(index.key_of(document))]
        inside.sort(key=index.key_of, reverse=descending)
        rows = scans.fetch(writer, store.codec, index, index_range, descending=descending, limit=limit)
        assert [store.codec.decode(row) for row in rows] == inside[:limit]
        assert scans.count(writer, table, index, index_range, limit=limit) == len(inside[:limit])

        for statement in scans.fetch_statements(store.codec, index, index_range, descending=descending):
            assert_walks_index(plan_of(store, statement), table.name, index, statement)
        for statement in scans.count_statements(table, index, index_range):
            assert_walks_index(plan_of(store, statement), table.name, index, statement)
    finally:
        writer.rollback()


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(data=st.data(), documents=st.lists(things, min_size=1, max_size=8), descending=st.booleans())
def test_reading_on_from_the_last_row_meets_every_document_once(
    stores: list[Store], data: st.DataObject, documents: list[Thing], descending: bool
) -> None:
    store = data.draw(st.sampled_from(stores))
    writer, table = store.database.writer, store.codec.table
    index = data.draw(st.sampled_from(store.indexes))
    writer.begin()
    try:
        stored = [
            store.insert(document, number) for number, document in enumerate(documents_of(data, store, documents), 1)
        ]
        held = [document for document in stored if index.holds_deleted or not table.is_deleted(document)]
        rest = IndexRange(table.name, index.name, before(()), after(()))
        seen: list[Thing] = []
        while rows := scans.fetch(writer, store.codec, index, rest, descending=descending, limit=3):
            seen += map(store.codec.decode, rows)
            last = index.key_of(seen[-1])[:-1]
            start, end = (rest.start, before(last)) if descending else (after(last), rest.end)
            rest = IndexRange(table.name, index.name, start, end)
        assert len(seen) == len(held)
        assert seen == sorted(held, key=index.key_of, reverse=descending)
    finally:
        writer.rollback()


def statements(store: Store, index: str, start: OrderKey, end: OrderKey, *, descending: bool = False) -> list[str]:
    """The part of each statement that says which rows, in order."""
    index_range = IndexRange("things", index, start, end)
    index_schema = store.codec.table.indexes_by_name[index]
    found = scans.fetch_statements(store.codec, index_schema, index_range, descending=descending)
    return [statement.sql.partition(" WHERE ")[2].replace('"', "") for statement in found]


def test_an_equality_prefix_with_bounds_is_one_statement(store: Store) -> None:
    a, low, high = key_prefix(["a"]), key_prefix(["a", 1.0]), key_prefix(["a", 2.0])
    assert statements(store, "by_name_ratio", before(a), after(a)) == ["name = ? ORDER BY ratio, _creation LIMIT ?"]
    assert statements(store, "by_name_ratio", before(low), before(high), descending=True) == [
        "name = ? AND ratio >= ? AND ratio < ? ORDER BY ratio DESC, _creation DESC LIMIT ?"
    ]


def test_a_page_that_starts_deep_in_an_index_takes_one_statement_for_each_column(store: Store) -> None:
    key = (*key_prefix(["a", 1.0]), *key_prefix([7]))
    assert statements(store, "by_name_ratio", after(key), after(())) == [
        "name = ? AND ratio = ? AND _creation > ? ORDER BY _creation LIMIT ?",
        "name = ? AND ratio > ? ORDER BY ratio, _creation LIMIT ?",
        "name > ? ORDER BY name, ratio, _creation LIMIT ?",
    ]


def test_nulls_come_first_below_an_upper_bound(store: Store) -> None:
    assert statements(store, "by_number", before(()), before(key_prefix([5]))) == [
        "number IS NULL ORDER BY _creation LIMIT ?",
        "number < ? ORDER BY number, _creation LIMIT ?",
    ]


def test_everything_but_null_is_looked_up_from_the_smallest_value(store: Store) -> None:
    assert statements(store, "by_number", after(key_prefix([None])), after(())) == [
        "number >= ? ORDER BY number, _creation LIMIT ?"
    ]


def test_a_value_of_another_kind_is_not_converted_to_match(store: Store) -> None:
    writer, table = store.database.writer, store.codec.table
    writer.begin()
    try:
        store.insert(Thing(number=5, name="5"), 1)
        for name, value in (("by_number", "5"), ("by_name_ratio", 5)):
            prefix = key_prefix([value])
            index_range = IndexRange("things", name, before(prefix), after(prefix))
            assert scans.count(writer, table, table.indexes_by_name[name], index_range, limit=9) == 0
    finally:
        writer.rollback()


def test_who_names_a_document_is_looked_up_by_id(stores: list[Store]) -> None:
    for store in stores:
        writer, table = store.database.writer, store.codec.table
        writer.begin()
        try:
            made = [Thing(number=number) for number in (1, 2, 1, None)]
            if table.deleted_field is not None:
                made = [*[Kept(number=thing.number) for thing in made], Kept(number=1, deleted_at=5.0)]
            ids = [store.insert(document, number).id for number, document in enumerate(made, 1)]
            index, with_deleted = table.indexes_by_name["by_number"], table.indexes_with_deleted["by_number"]
            assert scans.ids_under(writer, table, index, (1,), limit=9) == [ids[0], ids[2]]
            assert scans.ids_under(writer, table, index, (1,), limit=1) == [ids[0]]
            assert sorted(scans.ids_under(writer, table, with_deleted, (1,), limit=9)) == [ids[0], ids[2], *ids[4:]]
        finally:
            writer.rollback()
