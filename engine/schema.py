"""What an app declares in `schema.py`, and the compiled, immutable schema that the engine runs on.

    class ChatMessage(Table, name="live_chat_messages"):
        game_id: Id["Game"]
        message: str
        by_game = index("game_id", "created_at")

Invariants
  1. A document is frozen, and keyword-only: a field may be added anywhere in the class.
  2. A compiled schema is sound: every id names a table, every index its fields, every name is fit for SQL, and every
     default fits its field. What is not is a SchemaError that says where.
  3. `TableSchema.check` accepts exactly the documents that can be stored and read back equal (an int in a float field
     comes back as the float).
  4. `IndexSchema.key_of` gives the order key that SQLite sorts the document's row by.

How tables and indexes look in SQLite is the business of `storage/ddl.py`.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, Self, TypeVar, dataclass_transform

import msgspec

from engine.errors import InvalidArgument, InvalidDocument, SchemaError
from engine.ids import TICKS_PER_MS, Id, is_id, table_tag
from engine.limits import Limits
from engine.ranges import BY_CREATION_TIME, BYTES, MIDDLE, NULL, NUMBER, TEXT, OrderKey, key_prefix
from engine.values import shapes
from engine.values.columns import Column, compile_column
from engine.values.decoder import compile_shape_decoder
from engine.values.encoder import compile_to_wire
from engine.values.shapes import (
    Bool,
    Bytes,
    Float,
    Int,
    Int64Shape,
    LiteralShape,
    Null,
    Shape,
    Str,
    UnionShape,
)
from engine.values.wire import INT64_MAX, INT64_MIN, Mismatch, check_nesting, check_text

INDEX_COUNT_MAX = 32  # of one table: each is written again with every document
INDEX_FIELD_COUNT_MAX = 16

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # in a class name, but for the first
_SYSTEM_NAME = re.compile(r"_[A-Za-z0-9_]*")
_SCALAR_TYPES = frozenset({type(None), bool, int, float, str, bytes})
_BUILT_IN_FIELDS = {"id": "_id", "creation_time": "_creationTime"}  # and their names on the wire

T = TypeVar("T", bound="Table")


# -- what an app writes


class Index(msgspec.Struct, Generic[T], frozen=True):
    """What `ChatMessage.by_game` gives: the index to scan, and the class of what comes out."""

    document_type: type[T]
    name: str
    fields: tuple[str, ...]
    is_unique: bool


class IndexDeclaration:
    """`index(...)` or `unique(...)` in the body of a table's class."""

    def __init__(self, fields: tuple[str, ...], *, is_unique: bool) -> None:
        self.fields, self.is_unique = fields, is_unique
        self.name = ""  # set by the class body

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type[T]) -> Index[T]:
        return Index(owner, self.name, self.fields, self.is_unique)


def index(*fields: str) -> IndexDeclaration:
    """Rows in the order of these fields, then of their creation: `by_game = index("game_id", "created_at")`."""
    return IndexDeclaration(fields, is_unique=False)


def unique(*fields: str) -> IndexDeclaration:
    """An index in which no two documents have the same values. As in SQL, a None is unlike any other None."""
    return IndexDeclaration(fields, is_unique=True)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class TableMeta(msgspec.StructMeta):
    """Makes the classes of documents; `name` is the table's name, `system=True` marks the engine's own tables."""

    def __new__(
        mcls,
        class_name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        name: str = "",
        system: bool = False,
    ) -> type:
        namespace["__table_name__"] = name or _WORD_START.sub("_", class_name).lower()
        namespace["__is_system_table__"] = system
        return super().__new__(mcls, class_name, bases, namespace, frozen=True, kw_only=True, rename=_BUILT_IN_FIELDS)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Table(msgspec.Struct, metaclass=TableMeta):
    """The base of an app's tables: an instance is one document, immutable."""

    __table_name__: ClassVar[str]
    __is_system_table__: ClassVar[bool]

    # both are given by the engine when the document is stored
    id: Id[Self] = ""  # type: ignore[assignment]  # to the checker an Id is more than a str
    creation_time: float = 0.0  # ms since the epoch


# -- what it compiles to


class Field(msgspec.Struct, frozen=True, eq=False):
    """One field of a table, and the column that holds it."""

    name: str
    annotation: Any
    shape: Shape
    column: Column
    default: Any  # msgspec.NODEFAULT: there is none
    default_factory: Any
    id_table: str | None  # the table whose ids it holds
    fit: Callable[[Any], None]  # raises Mismatch for a value that it cannot hold

    @property
    def has_default(self) -> bool:
        return self.default is not msgspec.NODEFAULT or self.default_factory is not msgspec.NODEFAULT

    def make_default(self) -> Any:
        assert self.has_default
        return self.default if self.default is not msgspec.NODEFAULT else self.default_factory()


class IndexColumn(msgspec.Struct, frozen=True):
    """How the values of one column of an index sort."""

    name: str  # in SQLite
    rank: int | None  # of its values in `ranges.py`, besides null; None: they are of several kinds
    is_nullable: bool


class IndexSchema(msgspec.Struct, frozen=True, eq=False):
    """An index of a table; `by_creation_time` is the one that every table has."""

    name: str
    fields: tuple[str, ...]
    is_unique: bool
    columns: tuple[IndexColumn, ...]  # of the fields, then the creation tick
    key_of: Callable[[Table], OrderKey]  # the full key of a stored document


class TableSchema(msgspec.Struct, frozen=True, eq=False):
    """A table: its documents, their fields, their indexes."""

    name: str
    document_type: type[Table]
    id_tag: str  # the first characters of its ids
    fields: tuple[Field, ...]  # without `id` and `creation_time`
    fields_by_name: dict[str, Field]
    indexes_by_name: dict[str, IndexSchema]
    is_system: bool
    check: Callable[[Table], None]  # InvalidDocument for a document that does not fit (invariant 3)

    def with_id(self, document: T, document_id: str, creation_time: float) -> T:
        """The same document under this id."""
        return msgspec.structs.replace(document, id=document_id, creation_time=creation_time)


class Schema(msgspec.Struct, frozen=True, eq=False):
    """All tables of an app, and the engine's own."""

    tables_by_name: dict[str, TableSchema]
    tables_by_class_name: dict[str, TableSchema]

    def table_of(self, document_type: type[Table]) -> TableSchema:
        table = self.tables_by_class_name.get(document_type.__name__)
        if table is None or table.document_type is not document_type:
            raise SchemaError(f"{document_type.__name__} is not a table of this schema.")
        return table

    def tag_of_class(self, class_name: str) -> str:
        """The id tag of a document class; KeyError for one that is not there."""
        return self.tables_by_class_name[class_name].id_tag


def compile_schema(document_types: Iterable[type[Table]], limits: Limits) -> Schema:
    """Check what the app declared and compile it (invariant 2)."""
    types = list(document_types)
    table_name_by_class_name = _check_tables(types)
    tag_of_class = {name: table_tag(table) for name, table in table_name_by_class_name.items()}
    tables = [_compile_table(document_type, table_name_by_class_name, tag_of_class, limits) for document_type in types]
    return Schema({table.name: table for table in tables}, {table.document_type.__name__: table for table in tables})


def _check_tables(types: list[type[Table]]) -> dict[str, str]:
    """Check what tables must not share; gives the table names by class name."""
    class_by_name: dict[str, type[Table]] = {}
    class_by_table: dict[str, type[Table]] = {}
    table_by_tag: dict[str, str] = {}
    for document_type in types:
        class_name, table = document_type.__name__, document_type.__table_name__
        is_system = document_type.__is_system_table__
        if not _is_name(table, is_system=is_system) or table.lower().startswith("sqlite_"):
            raise SchemaError(
                f"{class_name}: {table!r} is no table name. Names are letters, digits and '_' and begin with a letter; "
                "those that begin with '_' or 'sqlite_' are taken."
            )
        other = class_by_name.setdefault(class_name, document_type)
        if other is not document_type:
            raise SchemaError(
                f"two tables have the class name {class_name} ({other.__module__} and {document_type.__module__}): "
                f"Id[{class_name}] could mean either. Rename one class."
            )
        other = class_by_table.setdefault(table.lower(), document_type)
        if other is not document_type:
            raise SchemaError(
                f"{other.__name__} and {class_name} are both the table {table!r} (SQLite ignores case). "
                f'Give one another name: class {class_name}(Table, name="…").'
            )
        other_table = table_by_tag.setdefault(table_tag(table), table)
        if other_table != table:
            raise SchemaError(f"the tables {other_table!r} and {table!r} would have the same id tag. Rename one.")
    return {document_type.__name__: document_type.__table_name__ for document_type in types}


def _compile_table(
    document_type: type[Table], table_name_by_class_name: dict[str, str], tag_of_class: dict[str, str], limits: Limits
) -> TableSchema:
    table = document_type.__table_name__
    fields = _compile_fields(document_type, table_name_by_class_name, tag_of_class, limits)
    for field in fields:
        if field.has_default:
            try:
                field.fit(field.make_default())
            except Mismatch as error:
                raise SchemaError(f"{table}.{field.name}: its default does not fit: {error}") from None
    return TableSchema(
        name=table,
        document_type=document_type,
        id_tag=tag_of_class[document_type.__name__],
        fields=fields,
        fields_by_name={field.name: field for field in fields},
        indexes_by_name=_compile_indexes(document_type, fields),
        is_system=document_type.__is_system_table__,
        check=_compile_check(document_type, fields, tag_of_class),
    )


def _is_name(name: str, *, is_system: bool = False) -> bool:
    return bool(_NAME.fullmatch(name) or (is_system and _SYSTEM_NAME.fullmatch(name)))


# -- fields


def _compile_fields(
    document_type: type[Table],
    table_name_by_class_name: dict[str, str],
    tag_of_class: dict[str, str],
    limits: Limits,
) -> tuple[Field, ...]:
    table = document_type.__table_name__
    for owner in document_type.__mro__[: document_type.__mro__.index(Table)]:
        for name in _BUILT_IN_FIELDS.keys() & inspect.get_annotations(owner).keys():
            raise SchemaError(f"{table}.{name}: every document has this field; the engine sets it. Rename yours.")
    try:
        infos = msgspec.structs.fields(document_type)
    except NameError as error:
        raise SchemaError(f"{table}: {error}. An annotation of {document_type.__name__} names it.") from error
    infos = tuple(info for info in infos if info.name not in _BUILT_IN_FIELDS)
    if len(infos) > limits.object_field_count_max:
        raise SchemaError(f"{table}: {len(infos):,} fields, {limits.object_field_count_max:,} allowed. Nest some.")

    field_by_lower_name: dict[str, str] = {name: name for name in _BUILT_IN_FIELDS}
    for info in infos:
        if not _is_name(info.name) or len(info.name) > limits.field_name_length_max:
            raise SchemaError(
                f"{table}.{info.name}: no field name. Names are ASCII letters, digits and '_', begin with a letter and "
                f"have at most {limits.field_name_length_max} characters."
            )
        other = field_by_lower_name.setdefault(info.name.lower(), info.name)
        if other != info.name:
            raise SchemaError(f"{table}: {other!r} and {info.name!r} are one column (SQLite ignores case). Rename one.")
        if isinstance(info.default, IndexDeclaration):
            raise SchemaError(f"{table}.{info.name}: write an index without an annotation: {info.name} = index(…).")
    return tuple(_compile_field(table, info, table_name_by_class_name, tag_of_class, limits) for info in infos)


def _compile_field(
    table: str,
    info: msgspec.structs.FieldInfo,
    table_name_by_class_name: dict[str, str],
    tag_of_class: dict[str, str],
    limits: Limits,
) -> Field:
    where = f"{table}.{info.name}"
    shape = shapes.shape_of(info.type, where=where)
    id_class: str | None = None
    for part in shapes.parts_of(shape):
        if isinstance(part, Str) and part.id_of is not None and part.id_of not in table_name_by_class_name:
            known = ", ".join(sorted(table_name_by_class_name))
            raise SchemaError(f"{where}: Id[{part.id_of!r}] names no table. The classes of tables are {known}.")
    for part in shape.alternatives if isinstance(shape, UnionShape) else (shape,):
        if isinstance(part, Str) and part.id_of is not None:
            id_class = part.id_of
    column = compile_column(info.type, where=where)
    return Field(
        name=info.name,
        annotation=info.type,
        shape=shape,
        column=column,
        default=info.default,
        default_factory=info.default_factory,
        id_table=None if id_class is None else table_name_by_class_name[id_class],
        fit=_compile_fit(shape, column, tag_of_class, limits),
    )


# -- indexes


def _compile_indexes(document_type: type[Table], fields: tuple[Field, ...]) -> dict[str, IndexSchema]:
    table = document_type.__table_name__
    declared: dict[str, IndexDeclaration] = {}
    for owner in reversed(document_type.__mro__):  # those of a base class too
        for name, value in vars(owner).items():
            declared.pop(name, None)
            if isinstance(value, IndexDeclaration):
                declared[name] = value
    if len(declared) > INDEX_COUNT_MAX:
        raise SchemaError(f"{table}: {len(declared)} indexes, {INDEX_COUNT_MAX} allowed.")

    field_by_name = {field.name: field for field in fields}
    indexes = {BY_CREATION_TIME: _compile_index(BY_CREATION_TIME, IndexDeclaration((), is_unique=False), field_by_name)}
    name_by_fields: dict[tuple[str, ...], str] = {}
    name_by_lower_name = {BY_CREATION_TIME: BY_CREATION_TIME}
    for name, declaration in declared.items():
        where = f"{table}.{name}"
        if not _is_name(name) or name_by_lower_name.setdefault(name.lower(), name) != name or name in indexes:
            raise SchemaError(f"{where}: no name for an index, or taken (SQLite ignores case). Rename it.")
        _check_index(where, declaration, field_by_name)
        other = name_by_fields.setdefault(declaration.fields, name)
        if other != name:
            raise SchemaError(f"{where}: {table}.{other} has the same fields. Drop one (a unique one is an index too).")
        indexes[name] = _compile_index(name, declaration, field_by_name)
    return indexes


def _check_index(where: str, declaration: IndexDeclaration, field_by_name: dict[str, Field]) -> None:
    names = declaration.fields
    if not 1 <= len(names) <= INDEX_FIELD_COUNT_MAX:
        raise SchemaError(f"{where}: an index has 1 to {INDEX_FIELD_COUNT_MAX} fields, not {len(names)}.")
    if len(set(names)) < len(names):
        raise SchemaError(f"{where}: a field is named twice.")
    for name in names:
        if name in _BUILT_IN_FIELDS:
            raise SchemaError(
                f"{where}: every index ends in the creation time and the id by itself. Leave out {name!r}."
            )
        field = field_by_name.get(name)
        if field is None:
            raise SchemaError(
                f"{where}: there is no field {name!r}. The fields are {', '.join(sorted(field_by_name))}."
            )
        if not field.column.is_scalar:
            raise SchemaError(
                f"{where}: {name!r} cannot be indexed: it is {field.shape}. Index bool, numbers, text, ids and bytes."
            )


_RANK_BY_SQLITE_TYPE = {"INTEGER": NUMBER, "REAL": NUMBER, "TEXT": TEXT, "BLOB": BYTES, "ANY": None}
_TICK_COLUMN = IndexColumn("_creation", NUMBER, is_nullable=False)


def _compile_index(name: str, declaration: IndexDeclaration, field_by_name: dict[str, Field]) -> IndexSchema:
    columns = tuple(
        IndexColumn(field, _RANK_BY_SQLITE_TYPE[column.sqlite_type], column.nullable)
        for field in declaration.fields
        for column in (field_by_name[field].column,)
    )
    return IndexSchema(
        name, declaration.fields, declaration.is_unique, (*columns, _TICK_COLUMN), _compile_key_of(columns)
    )


def _compile_key_of(columns: tuple[IndexColumn, ...]) -> Callable[[Table], OrderKey]:
    """The flat key as one tuple display: half the time of a loop over the fields."""
    parts: list[str] = []
    for column in columns:
        place = f"d.{column.name}"
        if column.rank is None:
            parts.append(f"*key_prefix(({place},))")
        elif column.is_nullable:
            parts.append(f"{NULL} if {place} is None else {column.rank}, 0 if {place} is None else {place}")
        else:
            parts.append(f"{column.rank}, {place}")
    parts.append(f"{NUMBER}, int(d.creation_time * {TICKS_PER_MS}), {MIDDLE}")
    key_of: Callable[[Table], OrderKey] = _evaluate(f"lambda d: ({', '.join(parts)})", {"key_prefix": key_prefix})
    return key_of


# -- does a document fit?


def _compile_check(
    document_type: type[Table], fields: tuple[Field, ...], tag_of_class: dict[str, str]
) -> Callable[[Table], None]:
    """Quick tests in a row, one a field; where one fails, the field's `fit` looks closer and finds the words."""
    names: dict[str, Any] = {"document_type": document_type, "is_id": is_id, "is_text": _is_text}
    table = document_type.__table_name__

    def refuse(document: object) -> None:
        kind = type(document).__name__
        raise InvalidDocument(f"{table}: expected a document of {document_type.__name__}, got {kind}.")

    def look_closer(name: str, fit: Callable[[Any], None], value: Any) -> None:
        try:
            fit(value)
        except Mismatch as error:
            raise InvalidDocument(f"{table}.{error.under(name)}") from None

    names |= {"refuse": refuse, "look_closer": look_closer}
    lines = ["def check(document):", "    if document.__class__ is not document_type: refuse(document)"]
    for number, field in enumerate(fields):
        names[f"fit_{number}"] = field.fit
        quick = _quick_test(field.shape, names, tag_of_class)
        lines.append(f"    v = document.{field.name}")
        lines.append(f"    if not ({quick}): look_closer({field.name!r}, fit_{number}, v)")
    exec(compile("\n".join(lines), f"<check {table}>", "exec"), names)  # noqa: S102 - field names were checked
    check: Callable[[Table], None] = names["check"]
    return check


def _quick_test(shape: Shape, names: dict[str, Any], tag_of_class: dict[str, str]) -> str:
    """An expression that holds only if the value `v` fits; it may miss some that do."""
    match shape:
        case Null():
            return "v is None"
        case Bool():
            return "v is True or v is False"
        case Int() | Int64Shape():
            return f"v.__class__ is int and {INT64_MIN} <= v <= {INT64_MAX}"
        case Float():
            return "v.__class__ is float and v == v"
        case Bytes():
            return "v.__class__ is bytes"
        case Str(id_of=None):
            return "v.__class__ is str and (v.isascii() or is_text(v))"
        case Str(id_of=str(class_name)):
            return f"v.__class__ is str and is_id(v, {tag_of_class[class_name]!r})"
        case LiteralShape(choices):
            name = f"choices_{len(names)}"
            names[name] = frozenset(choices)
            return f"v.__class__ is {type(choices[0]).__name__} and v in {name}"
        case UnionShape(alternatives):
            return " or ".join(f"({_quick_test(part, names, tag_of_class)})" for part in alternatives)
    return "False"


def _compile_fit(shape: Shape, column: Column, tag_of_class: dict[str, str], limits: Limits) -> Callable[[Any], None]:
    """A function that raises Mismatch for a value that the field cannot hold."""
    to_wire = compile_to_wire(shape, limits=limits)
    depth_max = limits.document_depth_max - 1  # the document is the first level
    holds_ids = any(isinstance(part, Str) and part.id_of is not None for part in shapes.parts_of(shape))
    decode = compile_shape_decoder(shape, limits=limits, tags=tag_of_class.__getitem__, is_stored=True)

    def fit(value: Any) -> None:
        wire = to_wire(value)
        if column.is_scalar:
            if type(value) not in _SCALAR_TYPES:  # an enum's member, a float of NumPy
                raise Mismatch(f"expected {shape}, got a {type(value).__name__}. Give the plain value")
            if value != value:
                raise Mismatch("NaN has no place in the order of a column; store None, or nest it in a list")
        else:
            check_nesting(wire, depth_max)
        if holds_ids:
            try:
                decode(wire)
            except InvalidArgument as error:
                raise Mismatch(str(error)) from None

    return fit


def _is_text(value: str) -> bool:
    try:
        check_text(value)
    except Mismatch:
        return False
    return True


def _evaluate(expression: str, names: dict[str, Any]) -> Any:
    return eval(compile(expression, "<schema>", "eval"), names)  # noqa: S307 - made of names that were checked
