"""Compiling the indexes of a table."""

from collections.abc import Callable

import msgspec

from engine.errors import SchemaError
from engine.ids import TICKS_PER_MS
from engine.ranges import BY_CREATION_TIME, BYTES, MIDDLE, NULL, NUMBER, TEXT, OrderKey, key_prefix
from engine.schema.compiled import Field, IndexColumn, IndexSchema, KeyOf
from engine.schema.declarations import BUILT_IN_FIELDS, IndexDeclaration, Table, declared, is_name

INDEX_COUNT_MAX = 32  # of one table: each is written again with every document
INDEX_FIELD_COUNT_MAX = 16

_RANK_BY_SQLITE_TYPE = {"INTEGER": NUMBER, "REAL": NUMBER, "TEXT": TEXT, "BLOB": BYTES, "ANY": None}
_TICK_COLUMN = IndexColumn("_creation", NUMBER, is_nullable=False)


def compile_indexes(
    document_type: type[Table], fields: tuple[Field, ...], deleted_field: str | None
) -> dict[str, IndexSchema]:
    """By name, also that of the creation order; of a table with a `deleted_field` those that leave deleted ones out."""
    table = document_type.__table_name__
    declarations = declared(document_type, IndexDeclaration)
    if len(declarations) > INDEX_COUNT_MAX:
        raise SchemaError(f"{table}: {len(declarations)} indexes, {INDEX_COUNT_MAX} allowed.")

    field_by_name = {field.name: field for field in fields}
    by_creation_time = IndexDeclaration((), is_unique=False)
    indexes = {BY_CREATION_TIME: _compile_index(BY_CREATION_TIME, by_creation_time, field_by_name, deleted_field)}
    name_by_fields: dict[tuple[str, ...], str] = {}
    name_by_lower_name = {BY_CREATION_TIME: BY_CREATION_TIME}
    for name, declaration in declarations.items():
        where = f"{table}.{name}"
        if not is_name(name) or name_by_lower_name.setdefault(name.lower(), name) != name or name in indexes:
            raise SchemaError(f"{where}: no name for an index, or taken (SQLite ignores case). Rename it.")
        _check_index(where, declaration, field_by_name)
        other = name_by_fields.setdefault(declaration.fields, name)
        if other != name:
            raise SchemaError(f"{where}: {table}.{other} has the same fields. Drop one (a unique one is an index too).")
        indexes[name] = _compile_index(name, declaration, field_by_name, deleted_field)
    return indexes


def with_deleted(index: IndexSchema) -> IndexSchema:
    """The same index, holding the deleted documents too; ranks are of those that are there. No name has a '+'."""
    return msgspec.structs.replace(index, name=f"{index.name}+deleted", holds_deleted=True, is_ranked=False)


def live_key_of(index: IndexSchema) -> KeyOf:
    """The key of a document in an index that leaves deleted ones out."""
    key_of, deleted_field = index.key_of, index.deleted_field
    if deleted_field is None or index.holds_deleted:
        return key_of
    return lambda document: None if getattr(document, deleted_field) is not None else key_of(document)


def _check_index(where: str, declaration: IndexDeclaration, field_by_name: dict[str, Field]) -> None:
    names = declaration.fields
    if not 1 <= len(names) <= INDEX_FIELD_COUNT_MAX:
        raise SchemaError(f"{where}: an index has 1 to {INDEX_FIELD_COUNT_MAX} fields, not {len(names)}.")
    if len(set(names)) < len(names):
        raise SchemaError(f"{where}: a field is named twice.")
    for name in names:
        if name in BUILT_IN_FIELDS:
            raise SchemaError(
                f"{where}: every index ends in the creation time and the id by itself. Leave out {name!r}."
            )
        scalar_field(where, name, field_by_name)


def scalar_field(where: str, name: str, field_by_name: dict[str, Field]) -> Field:
    """The field of this name; SchemaError if there is none, or its values have no order."""
    field = field_by_name.get(name)
    if field is None:
        raise SchemaError(f"{where}: there is no field {name!r}. The fields are {', '.join(sorted(field_by_name))}.")
    if not field.column.is_scalar:
        raise SchemaError(
            f"{where}: {name!r} cannot be indexed: it is {field.shape}. Index bool, numbers, text, ids and bytes."
        )
    return field


def _compile_index(
    name: str, declaration: IndexDeclaration, field_by_name: dict[str, Field], deleted_field: str | None
) -> IndexSchema:
    columns = tuple(column_of(field_by_name[field]) for field in declaration.fields)
    tick = f"{NUMBER}, int(d.creation_time * {TICKS_PER_MS}), {MIDDLE}"
    return IndexSchema(
        name=name,
        declared_name=name,
        fields=declaration.fields,
        is_unique=declaration.is_unique,
        is_ranked=declaration.is_ranked,
        columns=(*columns, _TICK_COLUMN),
        key_of=compile_key_of(columns, tick),
        deleted_field=deleted_field,
        holds_deleted=False,
    )


def column_of(field: Field) -> IndexColumn:
    """How the values of a scalar field sort."""
    return IndexColumn(field.name, _RANK_BY_SQLITE_TYPE[field.column.sqlite_type], field.column.nullable)


def compile_key_of(columns: tuple[IndexColumn, ...], *end: str) -> Callable[[Table], OrderKey]:
    """The flat key of a document as one tuple display: half the time of a loop over the fields."""
    parts: list[str] = []
    for column in columns:
        place = f"d.{column.name}"
        if column.rank is None:
            parts.append(f"*key_prefix(({place},))")
        elif column.is_nullable:
            parts.append(f"{NULL} if {place} is None else {column.rank}, 0 if {place} is None else {place}")
        else:
            parts.append(f"{column.rank}, {place}")
    display = "".join(f"{part}, " for part in (*parts, *end))
    key_of: Callable[[Table], OrderKey] = eval(f"lambda d: ({display})", {"key_prefix": key_prefix})  # noqa: S307 - names were checked
    return key_of
