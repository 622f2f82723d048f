"""From what an app declared to the compiled schema.

A compiled schema is sound: every id names a table, every index and foreign key its fields, every name is fit for SQL,
and every default fits its field. What is not is a SchemaError that says where.
"""

import inspect
from collections.abc import Iterable
from typing import Any, Literal, get_args

import msgspec

from engine.errors import SchemaError
from engine.ids import table_tag
from engine.limits import Limits
from engine.schema.aggregates import compile_aggregates
from engine.schema.compiled import Field, Schema, TableSchema
from engine.schema.declarations import (
    BUILT_IN_FIELDS,
    AggregateDeclaration,
    ForeignKeyDeclaration,
    IndexDeclaration,
    SearchIndexDeclaration,
    Stamp,
    Table,
    is_name,
)
from engine.schema.fit import compile_check, compile_fit, compile_fits
from engine.schema.foreign_keys import link_foreign_keys
from engine.schema.indexes import compile_indexes, live_key_of, with_deleted
from engine.schema.search_indexes import compile_search_indexes
from engine.values import shapes
from engine.values.columns import compile_column
from engine.values.shapes import Str, UnionShape
from engine.values.wire import Mismatch

_DEFAULT_BY_STAMP = {"updated": 0.0, "deleted": None}


def compile_schema(document_types: Iterable[type[Table]], limits: Limits) -> Schema:
    """Check what the app declared and compile it."""
    types = list(document_types)
    table_name_by_class_name = _check_tables(types)
    tag_of_class = {name: table_tag(table) for name, table in table_name_by_class_name.items()}
    tables = link_foreign_keys(
        [_compile_table(document_type, table_name_by_class_name, tag_of_class, limits) for document_type in types]
    )
    return Schema({table.name: table for table in tables}, {table.document_type.__name__: table for table in tables})


def _check_tables(types: list[type[Table]]) -> dict[str, str]:
    """Check what tables must not share; gives the table names by class name."""
    class_by_name: dict[str, type[Table]] = {}
    class_by_table: dict[str, type[Table]] = {}
    table_by_tag: dict[str, str] = {}
    for document_type in types:
        class_name, table = document_type.__name__, document_type.__table_name__
        is_system = document_type.__is_system_table__
        if not is_name(table, is_system=is_system) or table.lower().startswith("sqlite_"):
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
    updated_field, deleted_field = _stamped(table, fields, "updated"), _stamped(table, fields, "deleted")
    indexes = compile_indexes(document_type, fields, deleted_field)
    ranges_of, indexes_with_deleted = list(indexes.values()), indexes
    if deleted_field is not None:
        indexes_with_deleted = {name: with_deleted(index) for name, index in indexes.items()}
        ranges_of += indexes_with_deleted.values()
    return TableSchema(
        name=table,
        document_type=document_type,
        id_tag=tag_of_class[document_type.__name__],
        fields=fields,
        fields_by_name={field.name: field for field in fields},
        indexes_by_name=indexes,
        indexes_with_deleted=indexes_with_deleted,
        ranked_indexes=tuple(index for index in indexes.values() if index.is_ranked),
        aggregates=compile_aggregates(document_type, fields, indexes),
        key_places=tuple((index.name, live_key_of(index)) for index in ranges_of),
        search_indexes_by_name=compile_search_indexes(document_type, fields, deleted_field),
        foreign_keys=(),
        child_keys=(),
        updated_field=updated_field,
        deleted_field=deleted_field,
        is_system=document_type.__is_system_table__,
        is_hidden=document_type.__is_hidden_table__,
        check=compile_check(document_type, fields, tag_of_class),
        check_over=compile_check(document_type, fields, tag_of_class, is_over=True),
    )


def _stamped(table: str, fields: tuple[Field, ...], kind: Literal["updated", "deleted"]) -> str | None:
    """The field that the engine keeps in this way."""
    names = [field.name for field in fields if field.stamp is not None and field.stamp.kind == kind]
    if len(names) > 1:
        raise SchemaError(f"{table}: {names[0]!r} and {names[1]!r} are both {kind.title()}At. Keep one of them.")
    return names[0] if names else None


# -- fields


def _compile_fields(
    document_type: type[Table],
    table_name_by_class_name: dict[str, str],
    tag_of_class: dict[str, str],
    limits: Limits,
) -> tuple[Field, ...]:
    table = document_type.__table_name__
    for owner in document_type.__mro__[: document_type.__mro__.index(Table)]:
        for name in BUILT_IN_FIELDS.keys() & inspect.get_annotations(owner).keys():
            raise SchemaError(f"{table}.{name}: every document has this field; the engine sets it. Rename yours.")
    try:
        infos = msgspec.structs.fields(document_type)
    except NameError as error:
        raise SchemaError(f"{table}: {error}. An annotation of {document_type.__name__} names it.") from error
    infos = tuple(info for info in infos if info.name not in BUILT_IN_FIELDS)
    if len(infos) > limits.object_field_count_max:
        raise SchemaError(f"{table}: {len(infos):,} fields, {limits.object_field_count_max:,} allowed. Nest some.")

    field_by_lower_name: dict[str, str] = {name: name for name in BUILT_IN_FIELDS}
    for info in infos:
        if not is_name(info.name) or len(info.name) > limits.field_name_length_max:
            raise SchemaError(
                f"{table}.{info.name}: no field name. Names are ASCII letters, digits and '_', begin with a letter and "
                f"have at most {limits.field_name_length_max} characters."
            )
        other = field_by_lower_name.setdefault(info.name.lower(), info.name)
        if other != info.name:
            raise SchemaError(f"{table}: {other!r} and {info.name!r} are one column (SQLite ignores case). Rename one.")
        if isinstance(info.default, IndexDeclaration):
            raise SchemaError(f"{table}.{info.name}: write an index without an annotation: {info.name} = index(…).")
        if isinstance(info.default, AggregateDeclaration):
            raise SchemaError(
                f"{table}.{info.name}: write an aggregate without an annotation: {info.name} = aggregate(…)."
            )
        if isinstance(info.default, SearchIndexDeclaration):
            raise SchemaError(
                f"{table}.{info.name}: write a search index without an annotation: {info.name} = search_index(…)."
            )
        if isinstance(info.default, ForeignKeyDeclaration):
            raise SchemaError(
                f"{table}.{info.name}: write a foreign key without an annotation: {info.name} = foreign_key(…)."
            )
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
    stamp = _stamp_of(info.type, where)
    if stamp is not None and info.default != (default := _DEFAULT_BY_STAMP[stamp.kind]):
        raise SchemaError(f"{where}: the engine sets this field. Declare it with the default {default!r}.")
    return Field(
        name=info.name,
        annotation=info.type,
        shape=shape,
        column=column,
        default=info.default,
        default_factory=info.default_factory,
        id_table=None if id_class is None else table_name_by_class_name[id_class],
        stamp=stamp,
        fit=compile_fit(shape, column, tag_of_class, limits),
        fits=compile_fits(shape, tag_of_class),
    )


def _stamp_of(annotation: Any, where: str) -> Stamp | None:
    for part in get_args(annotation):
        if isinstance(part, Stamp):
            return part
        if any(isinstance(mark, Stamp) for mark in get_args(part)):
            raise SchemaError(f"{where}: UpdatedAt and DeletedAt stand alone, not in a union or a list.")
    return None
