"""Index ranges as ordered SQL scans.

A cut may lie deep in an index, `(a, b, c) > (1, 2, 3)`, and null comes before everything but compares with nothing in
SQL. So a range is taken apart into *segments*: an equality prefix with at most one bounded column after it, which
SQLite walks in one go. Put together in index order they are the range. Nearly every range is one segment.

Where deleted documents stay, SQLite has each index in two parts, the documents that are there and the deleted ones: so
however many were deleted, a scan walks none of them. A scan with deleted documents merges the two parts.

Invariants
  1. `fetch` gives the rows whose full key lies in the range, in index order, as if sorted in Python by `key_of`.
  2. Every statement walks the named index (or the rowid): never the whole table, never a sort.
  3. A value whose kind the column cannot hold is placed by its rank in `ranges.py`, not by SQLite's conversions.
  4. Each call leaves no statement open.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import Any, Literal, NamedTuple

from engine.ranges import (
    BY_CREATION_TIME,
    BYTES,
    HIGH,
    LOW,
    NULL,
    NUMBER,
    TEXT,
    IndexRange,
    OrderKey,
    Scalar,
    after,
    before,
)
from engine.schema import IndexColumn, IndexSchema, TableSchema
from engine.storage.connections import Connection, Row
from engine.storage.rows import RowCodec, deleted_sql, live_sql, quoted

_SMALLEST_BY_RANK: dict[int | None, Scalar] = {NUMBER: -inf, TEXT: "", BYTES: b"", None: -inf}  # that is not null


class Statement(NamedTuple):
    """One segment as SQL; its last parameter, the limit, is left to whoever runs it."""

    sql: str
    parameters: tuple[Scalar, ...]


def fetch(
    connection: Connection,
    codec: RowCodec[Any],
    index: IndexSchema,
    index_range: IndexRange,
    *,
    descending: bool,
    limit: int,
) -> list[Row]:
    """The first rows of the range in the order of the index, or in the opposite one."""
    rows: list[Row] = []
    for sql, parameters in fetch_statements(codec, index, index_range, descending=descending):
        if limit <= len(rows):
            break
        found = connection.fetch_all(sql, (*parameters, limit - len(rows)))
        rows = rows + found if rows else found
    return rows


def fetch_under(
    connection: Connection,
    codec: RowCodec[Any],
    index: IndexSchema,
    prefix: OrderKey,
    *,
    descending: bool,
    limit: int,
) -> list[Row]:
    """The same of all rows that have these values in the first columns."""
    sql, ranks = _under_sql(codec.columns_sql, codec.table.name, index, len(prefix) // 2, descending)
    if prefix[::2] == ranks:  # nearly always: one segment
        return connection.fetch_all(sql, (*prefix[1::2], limit))  # type: ignore[arg-type]  # scalars at odd places
    index_range = IndexRange(codec.table.name, index.name, before(prefix), after(prefix))
    return fetch(connection, codec, index, index_range, descending=descending, limit=limit)


def count(
    connection: Connection, table: TableSchema, index: IndexSchema, index_range: IndexRange, *, limit: int
) -> int:
    """How many rows the range holds; stops at `limit`. Reads nothing but the index."""
    number = 0
    for sql, parameters in count_statements(table, index, index_range):
        if limit <= number:
            break
        ((found,),) = connection.fetch_all(sql, (*parameters, limit - number))
        number += found
    return number


def fetch_statements(
    codec: RowCodec[Any], index: IndexSchema, index_range: IndexRange, *, descending: bool
) -> list[Statement]:
    """What `fetch` runs, one after another until it has enough."""
    table, columns_sql = codec.table.name, codec.columns_sql
    statements = [
        Statement(_fetch_sql(columns_sql, table, index, shape, descending), parameters * _part_count(index))
        for shape, parameters in _segments(index, index_range)
    ]
    return statements[::-1] if descending else statements


def count_statements(table: TableSchema, index: IndexSchema, index_range: IndexRange) -> list[Statement]:
    """What `count` runs, one after another until it has counted enough."""
    return [
        Statement(_count_sql(table.name, index, shape), parameters * _part_count(index))
        for shape, parameters in _segments(index, index_range)
    ]


def ids_under(
    connection: Connection, table: TableSchema, index: IndexSchema, prefix: Sequence[Scalar], *, limit: int
) -> list[str]:
    """The ids of rows that have these values in the first columns of the index, at most `limit`."""
    sql = _ids_sql(table.name, index, _Shape(len(prefix)))
    parameters = (*prefix,) * _part_count(index)
    return [document_id for (document_id,) in connection.fetch_all(sql, (*parameters, limit))]


# -- from a range to segments


class _Shape(NamedTuple):
    """A segment without its values."""

    equal_count: int  # columns, from the left, that are given
    is_null: bool = False  # the next column is null
    lower: Literal["", ">", ">="] = ""  # than the smallest value of the next column
    upper: Literal["", "<", "<="] = ""


class _Bound(NamedTuple):
    """One side of a bounded column; without a rank there is none."""

    rank: int | None = None
    value: Any = None
    is_included: bool = False


_Segment = tuple[_Shape, tuple[Scalar, ...]]
_UNBOUNDED = _Bound()


def _segments(index: IndexSchema, index_range: IndexRange) -> list[_Segment]:
    """The segments of a range, ascending."""
    if index_range.start >= index_range.end:
        return []
    first, last = index_range.start[:-1], index_range.end[:-1]
    if first == last:
        return _bounded(index, first, _UNBOUNDED, _UNBOUNDED)
    start_is_included, end_is_included = index_range.start[-1] != HIGH, index_range.end[-1] == HIGH
    shared = 0
    while shared < len(first) and first[shared : shared + 2] == last[shared : shared + 2]:
        shared += 2
    segments: list[_Segment] = []
    # What shares more of the start's columns comes first: (1, 2, >3), then (1, >2), then (>1).
    for place in range(len(first) - 2, shared, -2):
        is_included = start_is_included and place == len(first) - 2
        segments += _bounded(index, first[:place], _bound_at(first, place, is_included), _UNBOUNDED)
    segments += _bounded(
        index,
        first[:shared],
        _bound_at(first, shared, start_is_included and shared == len(first) - 2),
        _bound_at(last, shared, end_is_included and shared == len(last) - 2),
    )
    for place in range(shared + 2, len(last), 2):
        is_included = end_is_included and place == len(last) - 2
        segments += _bounded(index, last[:place], _UNBOUNDED, _bound_at(last, place, is_included))
    return segments


def _bound_at(prefix: OrderKey, place: int, is_included: bool) -> _Bound:
    if place >= len(prefix):
        return _UNBOUNDED
    rank, value = prefix[place : place + 2]
    return _Bound(rank, value, is_included)  # type: ignore[arg-type]  # a rank stands at each even place


def _bounded(index: IndexSchema, prefix: OrderKey, lower: _Bound, upper: _Bound) -> list[_Segment]:
    """The segments of the keys that begin with `prefix` and have the next column within the bounds."""
    equal_count = len(prefix) // 2
    values: list[Any] = []
    for place, column in enumerate(index.columns[:equal_count]):
        rank, value = prefix[2 * place], prefix[2 * place + 1]
        if rank == column.rank or (column.rank is None and rank != NULL):
            values.append(value)
        elif rank == NULL and column.is_nullable:
            values.append(None)
        else:
            return []  # invariant 3: the column holds nothing of this kind
    if lower is upper is _UNBOUNDED:
        return [(_Shape(equal_count), tuple(values))]
    column = index.columns[equal_count]
    segments: list[_Segment] = []
    shape, bounds = _shape_of_values(column, equal_count, lower, upper)
    if column.is_nullable and _holds_null(lower, upper):
        if shape is not None and not bounds:  # null and all values: the whole prefix
            return [(_Shape(equal_count), tuple(values))]
        segments.append((_Shape(equal_count, is_null=True), tuple(values)))
    elif column.is_nullable and shape is not None and not bounds:
        # `IS NOT NULL` would not be looked up in the index
        shape, bounds = shape._replace(lower=">="), (_SMALLEST_BY_RANK[column.rank],)
    if shape is not None:
        segments.append((shape, (*values, *bounds)))
    return segments


def _holds_null(lower: _Bound, upper: _Bound) -> bool:
    return (lower.rank is None or (lower.rank == NULL and lower.is_included)) and (
        upper.rank != NULL or upper.is_included
    )


def _shape_of_values(
    column: IndexColumn, equal_count: int, lower: _Bound, upper: _Bound
) -> tuple[_Shape | None, tuple[Any, ...]]:
    """The segment of what is not null, with its bounds; no shape where nothing can be (invariant 3)."""
    lower_sign: Literal["", ">", ">="] = ""
    upper_sign: Literal["", "<", "<="] = ""
    bounds: tuple[Any, ...] = ()
    if lower.rank is not None and lower.rank != NULL:
        if column.rank is None or lower.rank == column.rank:
            lower_sign, bounds = ">=" if lower.is_included else ">", (lower.value,)
        elif lower.rank > column.rank:
            return None, ()
    if upper.rank is not None:
        if upper.rank == NULL or (column.rank is not None and upper.rank < column.rank):
            return None, ()
        if column.rank is None or upper.rank == column.rank:
            upper_sign, bounds = "<=" if upper.is_included else "<", (*bounds, upper.value)
    return _Shape(equal_count, lower=lower_sign, upper=upper_sign), bounds


# -- from a segment to SQL; names come from the checked schema, values are parameters


@lru_cache(maxsize=4096)
def _fetch_sql(columns_sql: str, table: str, index: IndexSchema, shape: _Shape, descending: bool) -> str:
    direction = " DESC" if descending else ""
    order = [quoted(column.name) + direction for column in index.columns[shape.equal_count + shape.is_null :]]
    order_sql = f" ORDER BY {', '.join(order)}" if order else ""
    return f"{_select_sql(columns_sql, table, index, shape)}{order_sql} LIMIT ?"


@lru_cache(maxsize=4096)
def _under_sql(
    columns_sql: str, table: str, index: IndexSchema, equal_count: int, descending: bool
) -> tuple[str, tuple[int | None, ...]]:
    """The statement for all under a prefix, and the ranks of values that it is right for."""
    ranks = tuple([column.rank for column in index.columns[:equal_count]])
    if _part_count(index) > 1:
        return "", (LOW,)  # of no value
    return _fetch_sql(columns_sql, table, index, _Shape(equal_count), descending), ranks


@lru_cache(maxsize=4096)
def _count_sql(table: str, index: IndexSchema, shape: _Shape) -> str:
    return f"SELECT count(*) FROM ({_select_sql('1', table, index, shape)} LIMIT ?)"  # noqa: S608


@lru_cache(maxsize=4096)
def _ids_sql(table: str, index: IndexSchema, shape: _Shape) -> str:
    return f"{_select_sql(quoted('id'), table, index, shape)} LIMIT ?"


def forget_scan_statements() -> None:
    """Those of a schema that is gone, which they would keep."""
    for made in (_fetch_sql, _under_sql, _count_sql, _ids_sql):
        made.cache_clear()


def _select_sql(columns_sql: str, table: str, index: IndexSchema, shape: _Shape) -> str:
    columns = index.columns
    tests = [
        f"{quoted(column.name)} {'IS' if column.is_nullable else '='} ?" for column in columns[: shape.equal_count]
    ]
    if shape.is_null:
        tests.append(f"{quoted(columns[shape.equal_count].name)} IS NULL")
    tests += [f"{quoted(columns[shape.equal_count].name)} {sign} ?" for sign in (shape.lower, shape.upper) if sign]
    selects = []
    for part in _parts_of(table, index):
        all_tests = [*tests, part.test_sql] if part.test_sql else tests
        where = f" WHERE {' AND '.join(all_tests)}" if all_tests else ""
        selects.append(f"SELECT {columns_sql} FROM {quoted(table)} {part.hint_sql}{where}")  # noqa: S608
    return " UNION ALL ".join(selects)


# -- the parts of an index


class _IndexPart(NamedTuple):
    """One index of SQLite: an index of a table, or one of the two parts of it."""

    hint_sql: str  # without it SQLite is free to walk another index and sort (invariant 2)
    test_sql: str  # which documents are in it; empty: all


def _parts_of(table: str, index: IndexSchema) -> tuple[_IndexPart, ...]:
    """What of SQLite holds the documents of the index, each once."""
    name = index.declared_name
    if name == BY_CREATION_TIME and (index.holds_deleted or index.deleted_field is None):
        return (_IndexPart("NOT INDEXED", ""),)  # the rowid is the creation tick
    here = f"INDEXED BY {index_sql_name(table, name)}"
    if index.deleted_field is None:
        return (_IndexPart(here, ""),)
    live = _IndexPart(here, live_sql(index.deleted_field))
    if not index.holds_deleted:
        return (live,)
    deleted = f"INDEXED BY {deleted_index_sql_name(table, name)}"
    return (live, _IndexPart(deleted, deleted_sql(index.deleted_field)))


def _part_count(index: IndexSchema) -> int:
    return 2 if index.holds_deleted and index.declared_name != BY_CREATION_TIME else 1


def index_sql_name(table: str, index: str) -> str:
    """The name of an index in SQLite, quoted: no name of a table holds a dot, so it is nobody else's."""
    return quoted(f"{table}.{index}")


def deleted_index_sql_name(table: str, index: str) -> str:
    """The name of the part with the deleted documents."""
    return quoted(f"{table}.{index}+deleted")
