"""Documents as rows, and the statements that read and write one row.

A row is a tuple `(tick, id, field, field, …)`: the creation tick is the primary key, the fields stand in the order of
the schema whatever their order in the file. `creation_time` is computed from the tick, here and in SQLite.

Invariants
  1. `decode(encode(document)) == document` for every document that `TableSchema.check` accepts.
  2. Values never get into the text of a statement; names do, which the schema has checked.
"""

import sqlite3
from collections.abc import Callable
from itertools import compress, count
from operator import itemgetter
from typing import Any, Generic, TypeVar

import msgspec

from engine.errors import InternalError, UniqueViolation
from engine.ids import TICKS_PER_MS, tick_of
from engine.schema import Field, Table, TableSchema
from engine.storage.connections import Connection, Row, WriterConnection
from engine.values.shapes import Bool, Bytes, Float, Int, Int64Shape, ListShape, LiteralShape, Str

T = TypeVar("T", bound=Table)

_Update = tuple[str, Callable[[Row], Row]]

TICK = "_creation"  # the column of the creation tick: the rowid, in which every index of SQLite ends
_VALUE_START = 2  # the place of the first field in a row
_UPDATE_COUNT_MAX = 256  # sets of columns that a table's statements are kept for
_SCALAR_SHAPES = (Bool, Bytes, Float, Int, Int64Shape, LiteralShape, Str)
_OTHER_SIZE_BYTES = 9  # what a number counts for in limits, as in Convex; null and bool are rounded up to it


def quoted(name: str) -> str:
    """A name of the schema as SQL; the schema allows no quotes in names."""
    assert '"' not in name, name
    return f'"{name}"'


def live_sql(deleted_field: str) -> str:
    """The rows of documents that are there: in an index as in a statement, or SQLite would not use the index."""
    return f"{quoted(deleted_field)} IS NULL"


def deleted_sql(deleted_field: str) -> str:
    """The rows of deleted documents."""
    return f"{quoted(deleted_field)} IS NOT NULL"


def columns_of(table: TableSchema) -> tuple[str, ...]:
    """The columns of a row, in its order."""
    return (TICK, "id", *(field.name for field in table.fields))


class Stored(msgspec.Struct, gc=False):
    """A row that is there, and the document that it holds."""

    row: Row
    size_bytes: int  # what it counts for in limits
    document: Any = None  # made when it is first asked for, where no run can change it
    _model: Any = None  # where one can: nobody's, to be copied

    def give(self, codec: "RowCodec[Any]") -> Any:
        """The document; of a table with lists or dicts one that nobody else holds, as a run may change it."""
        document = self.document
        if document is None:
            if codec.is_shareable:
                document = self.document = codec.decode(self.row)
            elif codec.copy is None:
                document = codec.decode(self.row)
            else:
                if self._model is None:
                    self._model = codec.decode(self.row)
                document = codec.copy(self._model)
        return document


class RowCodec(Generic[T]):
    """One table's rows. Its functions are generated once: a row of 8 fields decodes in half a microsecond."""

    def __init__(self, table: TableSchema) -> None:
        self.table, self.id_tag = table, table.id_tag
        self.is_shareable = not any(field.column.is_json for field in table.fields)  # no run can change a document
        self.copy: Callable[[T], T] | None = _compile_copy(table)  # None: decoding again is quicker
        self.columns_sql = ", ".join(map(quoted, columns_of(table)))
        self.decode: Callable[[Row], T] = _compile_decode(table)
        self.encode: Callable[[T], Row] = _compile_encode(table)
        self.size_of_row: Callable[[Row], int] = _compile_size_of_row(table)

        name = quoted(table.name)
        columns = columns_of(table)
        values = ", ".join("?" * len(columns))
        where = f'WHERE "{TICK}" = ?1 AND "id" = ?2'
        self._get_sql = f"SELECT {self.columns_sql} FROM {name} {where}"  # noqa: S608 - invariant 2, here and below
        live = "" if table.deleted_field is None else f" AND {live_sql(table.deleted_field)}"
        self._is_live_sql = f"SELECT 1 FROM {name} {where}{live}"  # noqa: S608
        self._insert_sql = f"INSERT INTO {name} ({self.columns_sql}) VALUES ({values})"  # noqa: S608
        self._differs: Callable[[Row, Row], tuple[bool, ...]] = _compile_differs(table)
        self._updates: dict[tuple[bool, ...], _Update] = {}  # for each set of changed columns
        self._delete_sql = f"DELETE FROM {name} {where}"  # noqa: S608
        self._unique_by_columns = {
            ", ".join(f"{table.name}.{field}" for field in index.fields): index
            for index in table.indexes_by_name.values()
            if index.is_unique
        }

    def get(self, connection: Connection, document_id: str) -> Row | None:
        """The row with this well-formed id, if it is there."""
        rows = connection.fetch_all(self._get_sql, (tick_of(document_id), document_id))
        return rows[0] if rows else None

    def is_live(self, connection: Connection, document_id: str) -> bool:
        """Whether the document with this well-formed id is there, and not deleted."""
        return bool(connection.fetch_all(self._is_live_sql, (tick_of(document_id), document_id)))

    def insert(self, connection: WriterConnection, row: Row) -> None:
        """Store a new row; UniqueViolation when another one holds its place in a `unique(...)`."""
        try:
            connection.execute(self._insert_sql, row)
        except sqlite3.IntegrityError as error:
            raise self._violation(error, row) from error

    def update(self, connection: WriterConnection, row: Row, old: Row | None = None) -> None:
        """Write a row over the one with the same id.

        Given what it was, only what differs is written: SQLite rewrites every index that a named column is in, changed
        or not. A heartbeat then dirties one page, not one more for each index of its table.
        """
        if old is None:
            which: tuple[bool, ...] = (True,) * (len(row) - _VALUE_START)
        else:
            assert old[:_VALUE_START] == row[:_VALUE_START], f"{self.table.name}: {old[1]} written over as {row[1]}"
            which = self._differs(row, old)
        found = self._updates.get(which) or self._make_update(which)
        if found is None:
            return
        sql, parameters_of = found
        try:
            changed_count = connection.execute(sql, parameters_of(row)).rowcount
        except sqlite3.IntegrityError as error:
            raise self._violation(error, row) from error
        assert changed_count == 1, f"{self.table.name}: the row {row[1]} is not there"

    def delete(self, connection: WriterConnection, document_id: str) -> None:
        """Remove a row that is there."""
        deleted_count = connection.execute(self._delete_sql, (tick_of(document_id), document_id)).rowcount
        assert deleted_count == 1, f"{self.table.name}: the row {document_id} is not there"

    def _make_update(self, which: tuple[bool, ...]) -> _Update | None:
        """The statement that writes these values, and its parameters in a row; None: there are none."""
        columns, places = columns_of(self.table), [*compress(count(_VALUE_START), which)]
        if not places:
            return None
        changes = ", ".join(f"{quoted(columns[place])} = ?" for place in places)
        sql = f'UPDATE {quoted(self.table.name)} SET {changes} WHERE "{TICK}" = ? AND "id" = ?'  # noqa: S608
        update = sql, itemgetter(*places, 0, 1)
        if len(self._updates) < _UPDATE_COUNT_MAX:
            self._updates[which] = update
        return update

    def _violation(self, error: sqlite3.IntegrityError, row: Row) -> UniqueViolation | InternalError:
        """SQLite names the columns: `UNIQUE constraint failed: users.team, users.name`."""
        columns = str(error).partition("UNIQUE constraint failed: ")[2]
        index = self._unique_by_columns.get(columns)
        if index is None:  # two rows with one tick, or a null or a type that `TableSchema.check` lets through
            return InternalError(f"{self.table.name}: {error}")
        values = dict(zip(columns_of(self.table), row, strict=True))
        return UniqueViolation(self.table.name, index.name, {field: values[field] for field in index.fields})


def _compile_decode(table: TableSchema) -> Callable[[Row], Any]:
    names: dict[str, Any] = {"document_type": table.document_type}
    parts = ["id=r[1]", f"creation_time=r[0] / {TICKS_PER_MS}"]
    for place, field in enumerate(table.fields, _VALUE_START):
        parts.append(f"{field.name}={_decoded(field, f'r[{place}]', names)}")
    decode: Callable[[Row], Any] = _compile(f"lambda r: document_type({', '.join(parts)})", table, names)
    return decode


def _decoded(field: Field, value: str, names: dict[str, Any]) -> str:
    """The expression that makes the field's value of what SQLite gave."""
    column = field.column
    if column.plain or (column.is_scalar and not column.is_bool):
        return value
    name = f"from_column_{field.name}"
    names[name] = column.from_column
    made = f"{value} == 1" if column.is_bool else f"{name}({value})"
    return f"(None if {value} is None else {made})" if column.nullable else made


def _compile_copy(table: TableSchema) -> Callable[[Any], Any] | None:
    """What makes another document of one that holds lists of scalars: a third of the time of decoding them."""
    parts = ["id=d.id", "creation_time=d.creation_time"]
    for field in table.fields:
        place = f"d.{field.name}"
        if field.column.is_json:
            if not (isinstance(field.shape, ListShape) and isinstance(field.shape.item, _SCALAR_SHAPES)):
                return None
            place += ".copy()"
        parts.append(f"{field.name}={place}")
    names = {"document_type": table.document_type}
    copy: Callable[[Any], Any] = _compile(f"lambda d: document_type({', '.join(parts)})", table, names)
    return copy


def _compile_encode(table: TableSchema) -> Callable[[Any], Row]:
    names: dict[str, Any] = {"tick_of": tick_of}
    parts = ["tick_of(d.id)", "d.id"]
    for field in table.fields:
        place = f"d.{field.name}"
        if field.column.plain or field.column.is_bool:
            parts.append(place)
        elif field.column.is_float:
            made = f"{place} + 0.0"  # an int becomes a float, -0.0 becomes 0.0
            parts.append(f"None if {place} is None else {made}" if field.column.nullable else made)
        else:
            name = f"to_column_{field.name}"
            names[name] = field.column.to_column
            parts.append(f"{name}({place})")
    encode: Callable[[Any], Row] = _compile(f"lambda d: ({', '.join(parts)})", table, names)
    return encode


def _compile_differs(table: TableSchema) -> Callable[[Row, Row], tuple[bool, ...]]:
    """Which values of two rows are not the same."""
    parts = "".join(f"r[{place}] != o[{place}], " for place in range(_VALUE_START, _VALUE_START + len(table.fields)))
    differs: Callable[[Row, Row], tuple[bool, ...]] = _compile(f"lambda r, o: ({parts})", table, {})
    return differs


def _compile_size_of_row(table: TableSchema) -> Callable[[Row], int]:
    """Text and bytes by their length, everything else by the largest that it can be."""
    fixed_size_bytes, parts = 2 * _OTHER_SIZE_BYTES, []
    for place, field in enumerate(table.fields, _VALUE_START):
        value = f"r[{place}]"
        fixed_size_bytes += len(field.name) + 1
        if field.column.sqlite_type in ("INTEGER", "REAL"):
            fixed_size_bytes += _OTHER_SIZE_BYTES
        elif field.column.sqlite_type == "TEXT" and not field.column.nullable:
            parts.append(f"(len({value}) if {value}.isascii() else len({value}.encode()))")
        else:
            parts.append(f"size_of({value})")
    sizes = " + ".join([str(fixed_size_bytes), *parts])
    size_of_row: Callable[[Row], int] = _compile(f"lambda r: {sizes}", table, {"size_of": _size_of})
    return size_of_row


def _size_of(value: Any) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    return len(value) if isinstance(value, bytes) else _OTHER_SIZE_BYTES


def _compile(expression: str, table: TableSchema, names: dict[str, Any]) -> Any:
    return eval(compile(expression, f"<rows of {table.name}>", "eval"), names)  # noqa: S307 - invariant 2
