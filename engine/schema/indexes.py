"""Compiling the indexes of a table."""

from collections.abc import Callable

from engine.errors import SchemaError
from engine.ids import TICKS_PER_MS
from engine.ranges import BY_CREATION_TIME, BYTES, MIDDLE, NULL, NUMBER, TEXT, OrderKey, key_prefix
from engine.schema.compiled import Field, IndexColumn, IndexSchema
from engine.schema.declarations import BUILT_IN_FIELDS, IndexDeclaration, Table, is_name

INDEX_COUNT_MAX = 32  # of one table: each is written again with every document
INDEX_FIELD_COUNT_MAX = 16

_RANK_BY_SQLITE_TYPE = {"INTEGER": NUMBER, "REAL": NUMBER, "TEXT": TEXT, "BLOB": BYTES, "ANY": None}
_TICK_COLUMN = IndexColumn("_creation", NUMBER, is_nullable=False)


def compile_indexes(document_type: type[Table], fields: tuple[Field, ...]) -> dict[str, IndexSchema]:
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
        if not is_name(name) or name_by_lower_name.setdefault(name.lower(), name) != name or name in indexes:
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
        if name in BUILT_IN_FIELDS:
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
    key_of: Callable[[Table], OrderKey] = eval(f"lambda d: ({', '.join(parts)})", {"key_prefix": key_prefix})  # noqa: S307 - names were checked
    return key_of
