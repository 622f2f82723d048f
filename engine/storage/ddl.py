"""Tables and indexes in SQLite, made to match the schema.

What the file holds is described beside it, in the row of `_engine_meta`. A schema that differs from the description is
applied in one transaction:

    added        a table · an index · a field with a default, or one that may be None · a foreign key, if every row
                 names a document that is there
    changed      an index · the type of a field, if the value of every row fits the new one
    dropped      an index · a foreign key · a field, if it is None in every row
    let be       a table that is no longer declared: it is compared again when it comes back

Invariants
  1. A change that some row does not fit is a SchemaError with the table, the field and such a row. Nothing is changed.
  2. The description says what the file holds, also of tables that the schema does not declare any more.

What is made of the rows of a table (`search.py`, `shadows.py`) follows: it is made anew when it is no longer right.
Adding a field writes no row; any other change of how a field is stored copies its table, and so does a default factory
that may give each row another value.
"""

from collections.abc import Callable, Iterator
from math import isinf
from typing import Any

import msgspec

from engine.errors import EngineError, SchemaError
from engine.ids import TICKS_PER_MS, tick_of
from engine.ranges import BY_CREATION_TIME, Scalar
from engine.schema import Field, ForeignKey, IndexSchema, Schema, TableSchema
from engine.storage import search, shadows
from engine.storage.connections import Row, WriterConnection
from engine.storage.rows import TICK, deleted_sql, live_sql, quoted
from engine.storage.scans import deleted_index_sql_name, index_sql_name
from engine.storage.shadows import ShadowDescription
from engine.values.shapes import Constrained, DictShape, ListShape, LiteralShape, RecordShape, Shape, UnionShape
from engine.values.wire import UNBOUNDED, Mismatch, describe, value_of

_COPY = "_engine_copy"  # a table being copied; the schema lets no table have this name
_PAGE_ROW_COUNT = 1_000

# Statements are made of names that the schema has checked, and of literals that SQLite quoted: hence `noqa: S608`.


class ColumnDescription(msgspec.Struct, frozen=True):
    """How a column is stored, and what its values may be."""

    sqlite_type: str
    is_nullable: bool
    is_json: bool
    is_bool: bool
    alternatives: list[str]  # each kind of value, in full

    def is_stored_like(self, other: "ColumnDescription") -> bool:
        """Whether a value of one looks the same in the other."""
        return (self.sqlite_type, self.is_nullable, self.is_json, self.is_bool) == (
            other.sqlite_type,
            other.is_nullable,
            other.is_json,
            other.is_bool,
        )


class IndexDescription(msgspec.Struct, frozen=True):
    fields: list[str]
    is_unique: bool
    deleted_field: str | None = None  # it is in two parts (`scans.py`)


class ForeignKeyDescription(msgspec.Struct, frozen=True):
    """Which rows must name which: whenever this changes, all of them are looked at."""

    parent: str
    deleted_field: str | None
    parent_deleted_field: str | None


class TableDescription(msgspec.Struct, frozen=True):
    columns: dict[str, ColumnDescription]
    indexes: dict[str, IndexDescription]
    foreign_keys: dict[str, ForeignKeyDescription] = {}  # by field; none while the table is not declared
    search_indexes: dict[str, search.SearchIndexDescription] = {}
    shadows: dict[str, ShadowDescription] = {}


def apply_schema(writer: WriterConnection, schema: Schema) -> list[str]:
    """Make the file match the schema, or change nothing (invariant 1). Says what was done, for the log."""
    stored = _read_descriptions(writer)
    wanted = {name: _describe_table(table, schema) for name, table in schema.tables_by_name.items()}
    # nobody enforces the foreign keys of a table that is not declared: its rows are looked at when it comes back
    let_be = {name: msgspec.structs.replace(description, foreign_keys={}) for name, description in stored.items()}
    described = {**let_be, **wanted}
    if described == stored:
        return []
    writer.begin()
    try:
        done: list[str] = []
        for name, table in schema.tables_by_name.items():
            done += _Migration(writer, table, wanted[name]).run(stored.get(name))
        for name, table in schema.tables_by_name.items():
            present = stored[name].foreign_keys if name in stored else {}
            done += _change_foreign_keys(writer, table, schema, present, wanted[name].foreign_keys)
            done += _change_derived(writer, table, stored.get(name), wanted[name])
        text = msgspec.json.encode(described).decode()
        writer.write_schema(text)
    except BaseException:
        writer.rollback()
        raise
    writer.commit()
    return done


def _read_descriptions(writer: WriterConnection) -> dict[str, TableDescription]:
    ((text,),) = writer.fetch_all('SELECT "schema_json" FROM "_engine_meta"')
    return msgspec.json.decode(text, type=dict[str, TableDescription])


class _Migration:
    """One table, from how it is stored to how it is declared; inside an open transaction."""

    def __init__(self, writer: WriterConnection, table: TableSchema, wanted: TableDescription) -> None:
        self._writer, self._table, self._wanted = writer, table, wanted
        self._sql_name = quoted(table.name)
        self._done: list[str] = []

    def run(self, stored: TableDescription | None) -> list[str]:
        if stored is None:
            self._create()
            return self._done
        indexes = stored.indexes
        if stored.columns != self._wanted.columns and self._change_columns(stored.columns):
            indexes = {}  # those of the old copy went with it
        self._change_indexes(indexes, stored.indexes)
        return self._done

    def _create(self) -> None:
        name = self._table.name
        if self._writer.fetch_all("SELECT 1 FROM sqlite_master WHERE lower(name) = lower(?)", (name,)):
            raise SchemaError(f"{name}: another program made a table of this name. Give yours another name.")
        self._writer.execute(_create_table_sql(self._sql_name, self._table))
        for index in _stored_indexes(self._table):
            self._create_index(index)
        self._done.append(f"{name}: table added")

    # -- columns

    def _change_columns(self, stored: dict[str, ColumnDescription]) -> bool:
        """Add, convert and drop columns; whether the table was copied for that."""
        wanted = self._wanted.columns
        dropped = [column for column in stored if column not in wanted]
        added = [field for field in self._table.fields if field.name not in stored]
        changed = [
            field for field in self._table.fields if stored.get(field.name, wanted[field.name]) != wanted[field.name]
        ]
        for column in dropped:
            self._check_drop(column)
        default_by_added = {field.name: self._default_of_old_rows(field) for field in added}
        literals = {
            field.name: self._literal(default_by_added[field.name](), field) if _has_one_default(field) else None
            for field in added
        }

        is_copied = (
            bool(dropped)
            or None in literals.values()
            or any(not stored[field.name].is_stored_like(wanted[field.name]) for field in changed)
        )
        if is_copied:
            self._copy(stored, default_by_added)
        else:
            for field in changed:
                self._check_values(field, stored[field.name])
            for field in added:
                # of the rows that are there: new ones give every column a value
                default = "" if literals[field.name] == "NULL" else f" DEFAULT {literals[field.name]}"
                self._writer.execute(f"ALTER TABLE {self._sql_name} ADD COLUMN {_column_sql(field)}{default}")
        self._done += [f"{self._table.name}.{column}: field dropped" for column in dropped]
        self._done += [f"{self._table.name}.{field.name}: field added" for field in added]
        self._done += [f"{self._table.name}.{field.name}: type changed to {field.shape}" for field in changed]
        return is_copied

    def _check_drop(self, column: str) -> None:
        name = quoted(column)
        sql = f'SELECT "id", {name} FROM {self._sql_name} WHERE {name} IS NOT NULL LIMIT 1'  # noqa: S608
        for row_id, value in self._writer.fetch_all(sql):
            raise SchemaError(
                f"{self._table.name}.{column}: the field is gone, but the row {row_id!r} has {describe(value)} in it. "
                "Declare it as optional (`… | None = None`), set it to None in every row, and drop it then."
            )

    def _default_of_old_rows(self, field: Field) -> Callable[[], Scalar]:
        """What makes the value of a new column for the rows that are there."""
        if field.has_default:
            return lambda: self._fitting_default(field)
        if field.column.nullable:
            return lambda: None
        for (row_id,) in self._writer.fetch_all(f'SELECT "id" FROM {self._sql_name} LIMIT 1'):  # noqa: S608
            raise SchemaError(
                f"{self._table.name}.{field.name}: the field is new and has no default, and there are rows, such as "
                f"{row_id!r}. Give it a default, or make it optional (`… | None = None`)."
            )
        return lambda: None

    def _fitting_default(self, field: Field) -> Scalar:
        value = field.make_default()
        try:
            field.fit(value)  # a factory may give each time another
        except Mismatch as error:
            raise SchemaError(f"{self._table.name}.{field.name}: its default does not fit: {error}") from None
        return field.column.to_column(value)

    def _literal(self, value: Scalar, field: Field) -> str | None:
        """The value as SQL; None for what cannot be the default of an added column."""
        if value is None and not field.column.nullable:
            return None  # an empty table, but SQLite does not look
        if isinstance(value, float) and isinf(value):
            return None
        ((literal,),) = self._writer.fetch_all("SELECT quote(?)", (value,))
        ((read_back,),) = self._writer.fetch_all(f"SELECT {literal}")
        return literal if read_back == value else None  # text with a NUL has no literal

    def _check_values(self, field: Field, stored: ColumnDescription) -> None:
        """Check that every row fits the new type of a column that is stored as before."""
        if set(stored.alternatives) <= set(self._wanted.columns[field.name].alternatives):
            return  # it may only hold more than it did
        convert = self._converter(field, stored)
        for _, row_id, value in self._rows(quoted(field.name)):
            convert(row_id, value)

    def _copy(self, stored: dict[str, ColumnDescription], default_by_added: dict[str, Callable[[], Scalar]]) -> None:
        """Write every row again into a new table, converted, and let it take the old one's place."""
        copy = quoted(_COPY)
        self._writer.execute(_create_table_sql(copy, self._table))
        kept = [field for field in self._table.fields if field.name in stored]
        converters = [self._converter(field, stored[field.name]) for field in kept]
        columns = [TICK, "id", *(field.name for field in kept), *default_by_added]
        insert = f"INSERT INTO {copy} ({', '.join(map(quoted, columns))}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608
        for tick, row_id, *values in self._rows(*(quoted(field.name) for field in kept)):
            converted = [convert(row_id, value) for convert, value in zip(converters, values, strict=True)]
            defaults = [make() for make in default_by_added.values()]
            self._writer.execute(insert, (tick, row_id, *converted, *defaults))
        self._writer.execute(f"DROP TABLE {self._sql_name}")
        self._writer.execute(f"ALTER TABLE {copy} RENAME TO {self._sql_name}")

    def _rows(self, *columns: str) -> Iterator[Row]:
        """Tick, id and these columns of every row, a page at a time."""
        last_tick = -1
        names = ", ".join((quoted(TICK), '"id"', *columns))
        sql = f'SELECT {names} FROM {self._sql_name} WHERE "{TICK}" > ? ORDER BY "{TICK}" LIMIT ?'  # noqa: S608
        while page := self._writer.fetch_all(sql, (last_tick, _PAGE_ROW_COUNT)):
            yield from page
            last_tick = page[-1][0]

    def _converter(self, field: Field, stored: ColumnDescription) -> Callable[[str, Any], Scalar]:
        """A function from the id and the stored value of a row to its new value; SchemaError when there is none."""
        read, where = _compile_read(field, stored), f"{self._table.name}.{field.name}"

        def convert(row_id: str, value: Any) -> Scalar:
            try:
                logical = read(value)
                field.fit(logical)
                return field.column.to_column(logical)
            except (Mismatch, EngineError) as error:
                raise SchemaError(
                    f"{where}: the row {row_id!r} has {describe(value)}, which does not fit the new type: {error}. "
                    "Change such rows under the old schema first, or let the type take them too."
                ) from None

        return convert

    # -- indexes

    def _change_indexes(self, present: dict[str, IndexDescription], stored: dict[str, IndexDescription]) -> None:
        """`present`: those that the file has; `stored`: those that it had before, for the log."""
        table, wanted = self._table.name, self._wanted.indexes
        for name, description in present.items():
            if wanted.get(name) != description:
                self._writer.execute(f"DROP INDEX {index_sql_name(table, name)}")
                self._writer.execute(f"DROP INDEX IF EXISTS {deleted_index_sql_name(table, name)}")
        self._done += [f"{table}.{name}: index dropped" for name in stored if name not in wanted]
        for index in _stored_indexes(self._table):
            if present.get(index.name) != wanted[index.name]:
                if index.is_unique:
                    self._check_unique(index)
                self._create_index(index)
            if stored.get(index.name) != wanted[index.name]:
                self._done.append(f"{table}.{index.name}: index {'changed' if index.name in stored else 'added'}")

    def _create_index(self, index: IndexSchema) -> None:
        table, is_unique = self._table.name, "UNIQUE " if index.is_unique else ""
        columns = ", ".join(map(quoted, index.fields or (TICK,)))
        create = f"INDEX {index_sql_name(table, index.name)} ON {self._sql_name} ({columns})"
        if index.deleted_field is None:
            self._writer.execute(f"CREATE {is_unique}{create}")
            return
        self._writer.execute(f"CREATE {is_unique}{create} WHERE {live_sql(index.deleted_field)}")
        if index.name != BY_CREATION_TIME:  # in creation order the rows lie themselves, deleted ones among them
            create = f"INDEX {deleted_index_sql_name(table, index.name)} ON {self._sql_name} ({columns})"
            self._writer.execute(f"CREATE {create} WHERE {deleted_sql(index.deleted_field)}")

    def _check_unique(self, index: IndexSchema) -> None:
        columns = [quoted(field) for field in index.fields]
        tests = [f"{column} IS NOT NULL" for column in columns]
        if index.deleted_field is not None:
            tests.append(live_sql(index.deleted_field))
        names, are_given = ", ".join(columns), " AND ".join(tests)
        sql = (
            f'SELECT min("id"), max("id"), {names} FROM {self._sql_name} WHERE {are_given} '  # noqa: S608
            f"GROUP BY {names} HAVING count(*) > 1 LIMIT 1"
        )
        for first_id, last_id, *values in self._writer.fetch_all(sql):
            shared = ", ".join(f"{field}={describe(value)}" for field, value in zip(index.fields, values, strict=True))
            raise SchemaError(
                f"{self._table.name}.{index.name}: cannot be unique, the rows {first_id!r} and {last_id!r} both have "
                f"{shared}. Change or delete one of them first."
            )


# -- foreign keys


def _change_foreign_keys(
    writer: WriterConnection,
    table: TableSchema,
    schema: Schema,
    stored: dict[str, ForeignKeyDescription],
    wanted: dict[str, ForeignKeyDescription],
) -> list[str]:
    """Check what a new or changed foreign key demands of the rows that are there."""
    done = [f"{table.name}.{field}: foreign key dropped" for field in stored if field not in wanted]
    for key in table.foreign_keys:
        if stored.get(key.field) != wanted[key.field]:
            _check_parents(writer, table, key, schema.tables_by_name[key.parent])
            done.append(f"{table.name}.{key.field}: foreign key {'changed' if key.field in stored else 'added'}")
    return done


def _check_parents(writer: WriterConnection, table: TableSchema, key: ForeignKey, parent: TableSchema) -> None:
    field, last_id = quoted(key.field), ""
    live = "" if table.deleted_field is None else f" AND {live_sql(table.deleted_field)}"
    parents_sql = (
        f'SELECT {field}, min("id") FROM {quoted(table.name)} WHERE {field} > ?{live} '  # noqa: S608
        f"GROUP BY {field} ORDER BY {field} LIMIT ?"
    )
    live = "" if parent.deleted_field is None else f" AND {live_sql(parent.deleted_field)}"
    parent_sql = f'SELECT 1 FROM {quoted(parent.name)} WHERE "{TICK}" = ? AND "id" = ?{live}'  # noqa: S608
    while page := writer.fetch_all(parents_sql, (last_id, _PAGE_ROW_COUNT)):
        for parent_id, row_id in page:
            if not writer.fetch_all(parent_sql, (tick_of(parent_id), parent_id)):
                raise SchemaError(
                    f"{table.name}.{key.field}: cannot be a foreign key, the row {row_id!r} names {parent_id!r}, "
                    f"which is not in {parent.name}. Change or delete such rows first."
                )
        last_id = page[-1][0]


def _change_derived(
    writer: WriterConnection, table: TableSchema, stored: TableDescription | None, wanted: TableDescription
) -> list[str]:
    """What is made of the rows: search indexes, totals and ranks."""
    if stored is None:
        search.migrate(writer, table, {}, set())
        shadows.migrate(writer, table, {}, set())
        return []  # a table that is added is added with all of this
    restored_columns = {
        name
        for name, column in stored.columns.items()
        if name in wanted.columns and not column.is_stored_like(wanted.columns[name])
    }
    done = search.migrate(writer, table, stored.search_indexes, restored_columns)
    return done + shadows.migrate(writer, table, stored.shadows, restored_columns)


# -- SQL


def _create_table_sql(sql_name: str, table: TableSchema) -> str:
    columns = [
        f'"{TICK}" INTEGER PRIMARY KEY',
        '"id" TEXT NOT NULL',
        f'"creation_time" REAL GENERATED ALWAYS AS ("{TICK}" / {float(TICKS_PER_MS)}) VIRTUAL',  # for other programs
        *map(_column_sql, table.fields),
    ]
    return f"CREATE TABLE {sql_name} ({', '.join(columns)}) STRICT"


def _column_sql(field: Field) -> str:
    return f"{quoted(field.name)} {field.column.sqlite_type}{'' if field.column.nullable else ' NOT NULL'}"


def _stored_indexes(table: TableSchema) -> list[IndexSchema]:
    """Those that SQLite keeps apart; in creation order the rows lie themselves, but for those that are deleted."""
    return [
        index
        for index in table.indexes_by_name.values()
        if index.name != BY_CREATION_TIME or index.deleted_field is not None
    ]


def _has_one_default(field: Field) -> bool:
    """Whether its default is the same for every row; a factory of the app's may draw a random number."""
    return field.default_factory in (msgspec.NODEFAULT, list, dict, set)


# -- descriptions


def _describe_table(table: TableSchema, schema: Schema) -> TableDescription:
    columns = {
        field.name: ColumnDescription(
            sqlite_type=field.column.sqlite_type,
            is_nullable=field.column.nullable,
            is_json=field.column.is_json,
            is_bool=field.column.is_bool,
            alternatives=_alternatives(field.shape, ()),
        )
        for field in table.fields
    }
    indexes = {
        index.name: IndexDescription(list(index.fields), index.is_unique, index.deleted_field)
        for index in _stored_indexes(table)
    }
    foreign_keys = {
        key.field: ForeignKeyDescription(
            key.parent, table.deleted_field, schema.tables_by_name[key.parent].deleted_field
        )
        for key in table.foreign_keys
    }
    return TableDescription(columns, indexes, foreign_keys, search.describe(table), shadows.describe(table))


def _alternatives(shape: Shape, within: tuple[RecordShape, ...]) -> list[str]:
    """The kinds of value of a shape, sorted; one that gains a kind holds all that it held."""
    parts = shape.alternatives if isinstance(shape, UnionShape) else (shape,)
    texts: set[str] = set()
    for part in parts:
        texts |= set(map(repr, part.choices)) if isinstance(part, LiteralShape) else {_text_of(part, within)}
    return sorted(texts)


def _text_of(shape: Shape, within: tuple[RecordShape, ...]) -> str:
    """The shape in full: two with the same text hold the same values."""
    match shape:
        case ListShape(item):
            return f"list[{_inner_text(item, within)}]"
        case DictShape(key, item):
            return f"dict[{_inner_text(key, within)}, {_inner_text(item, within)}]"
        case Constrained(inner):
            return f"{_inner_text(inner, within)} in {shape}"
        case RecordShape() if shape in within:
            return f"{shape} again"
        case RecordShape():
            inside = (*within, shape)
            fields = [
                f"{field.wire_name}{'' if field.is_required else '?'}: {_inner_text(field.shape, inside)}"
                for field in shape.fields
            ]
            tag = "" if shape.tag_field is None else f" {shape.tag_field}={shape.tag!r}"
            return f"{shape}{tag} {{{', '.join(fields)}}}"
    return str(shape)


def _inner_text(shape: Shape, within: tuple[RecordShape, ...]) -> str:
    return " | ".join(_alternatives(shape, within))


def _compile_read(field: Field, stored: ColumnDescription) -> Callable[[Any], Any]:
    """A function from what an old column stores to its value, as the new field's type has it if it can be told."""
    decode_json = msgspec.json.Decoder().decode

    def read(value: Any) -> Any:
        if value is None:
            return None
        if stored.is_bool:
            return value == 1
        if not stored.is_json:
            return value
        if field.column.is_json:
            return field.column.from_column(value)
        return value_of(decode_json(value), UNBOUNDED, keeps_ints=True)

    return read
