"""Compiling foreign keys: from a field of one table to the documents of another."""

from collections.abc import Sequence
from typing import get_args

import msgspec

from engine.errors import SchemaError
from engine.schema.compiled import ForeignKey, TableSchema
from engine.schema.declarations import ForeignKeyDeclaration, OnDelete, declared
from engine.values.shapes import Null, Str, UnionShape

_ON_DELETE: tuple[str, ...] = get_args(OnDelete)


def link_foreign_keys(tables: Sequence[TableSchema]) -> list[TableSchema]:
    """The tables, each knowing its own foreign keys and those that name its documents."""
    by_name = {table.name: table for table in tables}
    keys_by_table = {table.name: _compile_foreign_keys(table, by_name) for table in tables}
    all_keys = [key for keys in keys_by_table.values() for key in keys]
    return [
        msgspec.structs.replace(
            table,
            foreign_keys=keys_by_table[table.name],
            child_keys=tuple(key for key in all_keys if key.parent == table.name),
        )
        for table in tables
    ]


def _compile_foreign_keys(table: TableSchema, tables_by_name: dict[str, TableSchema]) -> tuple[ForeignKey, ...]:
    keys: dict[str, ForeignKey] = {}
    for name, declaration in declared(table.document_type, ForeignKeyDeclaration).items():
        where = f"{table.name}.{name}"
        if declaration.field in keys:
            raise SchemaError(f"{where}: {declaration.field!r} has a foreign key already. Drop one.")
        keys[declaration.field] = _compile_foreign_key(where, table, declaration, tables_by_name)
    return tuple(keys.values())


def _compile_foreign_key(
    where: str, table: TableSchema, declaration: ForeignKeyDeclaration, tables_by_name: dict[str, TableSchema]
) -> ForeignKey:
    field, on_delete = table.fields_by_name.get(declaration.field), declaration.on_delete
    if field is None:
        known = ", ".join(sorted(table.fields_by_name))
        raise SchemaError(f"{where}: there is no field {declaration.field!r}. The fields are {known}.")
    if on_delete not in _ON_DELETE:
        raise SchemaError(f"{where}: on_delete is {', '.join(map(repr, _ON_DELETE))}, not {on_delete!r}.")
    alternatives = field.shape.alternatives if isinstance(field.shape, UnionShape) else (field.shape,)
    kinds = [part for part in alternatives if not isinstance(part, Null)]
    if len(kinds) != 1 or not isinstance(kinds[0], Str) or field.id_table is None:
        raise SchemaError(f"{where}: {field.name!r} is {field.shape}. A foreign key is an Id[T] or an Id[T] | None.")
    if on_delete == "set_null" and not field.column.nullable:
        raise SchemaError(
            f'{where}: on_delete="set_null" needs a field that may be None. Declare {field.name!r} as '
            f"{field.shape} | None, or choose another on_delete."
        )
    if tables_by_name[field.id_table].is_system:
        raise SchemaError(
            f"{where}: {field.id_table} is the engine's own table, and the engine deletes its documents by itself. "
            "Leave the foreign key out."
        )
    index = next((index for index in table.indexes_by_name.values() if index.fields[:1] == (field.name,)), None)
    if index is None:
        raise SchemaError(
            f"{where}: when a document of {field.id_table} is deleted, those that name it are looked up in an index, "
            f'and none begins with {field.name!r}. Declare one: by_{field.name} = index("{field.name}").'
        )
    return ForeignKey(
        table=table.name,
        field=field.name,
        parent=field.id_table,
        on_delete=on_delete,
        index=index,
        index_with_deleted=table.indexes_with_deleted[index.name],
    )
