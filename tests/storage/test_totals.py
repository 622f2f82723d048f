"""Cells of an aggregate: which values share one, exact sums, and what other programs see."""

from collections.abc import Iterator
from contextlib import closing
from itertools import product
from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import TotalOverflow
from engine.limits import Limits
from engine.ranges import key_prefix
from engine.schema import Table, aggregate, compile_schema
from engine.storage import ddl, totals
from engine.storage.connections import TEMPORARY, Database, WriterConnection
from engine.storage.totals import _text_of
from engine.values.wire import INT64_MAX, INT64_MIN
from tests.strategies import int64s, texts


class Visit(Table, name="visits"):
    place: str
    active: bool
    seconds: int
    count: int = 0  # a field like the column of the count
    by_place = aggregate("place", "active", sum=("seconds", "count"))


VISITS = compile_schema([Visit], Limits()).tables_by_name["visits"]
(BY_PLACE,) = VISITS.aggregates
HOME = key_prefix(["home", True])


@pytest.fixture
def writer() -> Iterator[WriterConnection]:
    with closing(Database.open(TEMPORARY, Limits())) as database:
        ddl.apply_schema(database.writer, compile_schema([Visit], Limits()))
        yield database.writer


def add(writer: WriterConnection, *changes: int) -> None:
    totals.add(writer, "visits", BY_PLACE, HOME, changes)


def read(writer: WriterConnection) -> tuple[int, ...]:
    return totals.read(writer, "visits", BY_PLACE, HOME)


def test_a_cell_adds_up_and_is_gone_with_its_last_document(writer: WriterConnection) -> None:
    assert read(writer) == (0, 0, 0)
    add(writer, 1, 10, 3)
    add(writer, 1, -4, 0)
    assert read(writer) == (2, 6, 3)
    add(writer, -1, -10, -3)
    add(writer, 0, 2, 0)
    assert read(writer) == (1, -2, 0)
    add(writer, -1, 2, 0)
    assert writer.fetch_all('SELECT * FROM "visits.by_place.totals"') == []


def test_other_programs_can_read_the_cells(writer: WriterConnection) -> None:
    add(writer, 2, 30, 4)
    sql = """SELECT count, sum_seconds, sum_count FROM "visits.by_place.totals" WHERE key = json_array('home', 1)"""
    assert writer.fetch_all(sql) == [(2, 30, 4)]


def test_a_sum_may_use_all_64_bits_and_go_from_one_end_to_the_other(writer: WriterConnection) -> None:
    add(writer, 1, INT64_MIN, 0)
    add(writer, 0, INT64_MAX - INT64_MIN, INT64_MAX)
    assert read(writer) == (1, INT64_MAX, INT64_MAX)
    add(writer, 0, INT64_MIN - INT64_MAX, 0)
    assert read(writer) == (1, INT64_MIN, INT64_MAX)
    add(writer, -1, -INT64_MIN, -INT64_MAX)
    assert read(writer) == (0, 0, 0)


@pytest.mark.parametrize(("there", "change"), [(INT64_MAX, 1), (INT64_MIN, -1), (INT64_MIN, -600), (1, INT64_MAX)])
def test_a_sum_beyond_64_bits_is_refused_and_changes_nothing(writer: WriterConnection, there: int, change: int) -> None:
    add(writer, 1, 7, there)
    with pytest.raises(TotalOverflow, match=r"visits\.by_place: the sum of 'count' would not fit 64 bits") as caught:
        add(writer, 1, 5, change)
    assert (caught.value.table, caught.value.aggregate, caught.value.field) == ("visits", "by_place", "count")
    assert read(writer) == (1, 7, there)


NEAR = [  # what may be taken for each other
    *(None, False, True, 0, 1, 1.0, 0.0, 0.5, inf, -inf, 1e300, 2**53, 2.0**53, 2**53 + 1),
    *(2**63 - 1, 2.0**63, -(2**63), -(2.0**63), -(2.0**70)),
    *("", "0", "1", "null", "true", '"', '","', "\\", "\0", "é", "[]"),
    *(b"", b"0", b"1", b"\0", b'{"hex":""}'),
]
scalars = st.sampled_from(NEAR) | int64s | st.floats(allow_nan=False) | texts | st.binary(max_size=2)


def test_values_share_a_cell_only_if_they_are_equal_in_the_order_of_columns() -> None:
    for one, other in product(NEAR, repeat=2):
        left, right = key_prefix([one]), key_prefix([other])
        assert (_text_of(left) == _text_of(right)) == (left == right), (one, other)


@given(st.lists(scalars, min_size=2, max_size=2), st.lists(scalars, min_size=2, max_size=2))
def test_keys_share_a_cell_only_if_they_are_equal_in_the_order_of_columns(one: list[Any], other: list[Any]) -> None:
    left, right = key_prefix(one), key_prefix(other)
    assert (_text_of(left) == _text_of(right)) == (left == right)


@given(st.lists(scalars, max_size=3))
def test_the_key_of_a_cell_is_json(columns: list[Any]) -> None:
    values = msgspec.json.decode(_text_of(key_prefix(columns)).replace("9e999", "9e300"))
    for value, column in zip(values, columns, strict=True):
        match column:
            case bytes():
                assert value == {"hex": column.hex()}
            case float() if column in (inf, -inf):
                assert abs(value) == 9e300
            case _:
                assert value == column


def test_verify_finds_a_cell_that_is_wrong(writer: WriterConnection) -> None:
    visit = Visit(place="home", active=True, seconds=5)
    add(writer, 1, 5, 0)
    totals.verify(writer, "visits", BY_PLACE, [visit])
    for wrong in ([], [visit, visit], [msgspec.structs.replace(visit, seconds=6)]):
        with pytest.raises(AssertionError, match="invariant 1"):
            totals.verify(writer, "visits", BY_PLACE, wrong)
