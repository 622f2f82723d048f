"""Compiling the aggregates of a table."""

from collections.abc import Callable, Collection

from engine.errors import SchemaError
from engine.schema.compiled import AggregateSchema, Field
from engine.schema.declarations import AggregateDeclaration, Table, declared, is_name
from engine.schema.indexes import column_of, compile_key_of, scalar_field

AGGREGATE_COUNT_MAX = 32  # of one table: each may be written again with every document
AGGREGATE_FIELD_COUNT_MAX = 16  # of its key, and of its sums


def compile_aggregates(
    document_type: type[Table], fields: tuple[Field, ...], index_names: Collection[str]
) -> tuple[AggregateSchema, ...]:
    table = document_type.__table_name__
    declarations = declared(document_type, AggregateDeclaration)
    if len(declarations) > AGGREGATE_COUNT_MAX:
        raise SchemaError(f"{table}: {len(declarations)} aggregates, {AGGREGATE_COUNT_MAX} allowed.")
    field_by_name = {field.name: field for field in fields}
    taken = {name.lower() for name in index_names}
    name_by_fields: dict[frozenset[str], str] = {}
    aggregates = []
    for name, declaration in declarations.items():
        where = f"{table}.{name}"
        if not is_name(name) or name.lower() in taken:
            raise SchemaError(f"{where}: no name for an aggregate, or taken (SQLite ignores case). Rename it.")
        taken.add(name.lower())
        other = name_by_fields.setdefault(frozenset(declaration.fields), name)
        if other != name:
            raise SchemaError(f"{where}: {table}.{other} has the same fields. Make one of them, with all sums.")
        aggregates.append(_compile_aggregate(where, declaration, field_by_name))
    return tuple(aggregates)


def _compile_aggregate(
    where: str, declaration: AggregateDeclaration, field_by_name: dict[str, Field]
) -> AggregateSchema:
    for names in (declaration.fields, declaration.sums):
        if len(names) > AGGREGATE_FIELD_COUNT_MAX:
            raise SchemaError(f"{where}: {len(names)} fields, {AGGREGATE_FIELD_COUNT_MAX} allowed.")
        if len(set(names)) < len(names):
            raise SchemaError(f"{where}: a field is named twice.")
    key_columns = tuple(column_of(scalar_field(where, name, field_by_name)) for name in declaration.fields)
    summed = [scalar_field(where, name, field_by_name) for name in declaration.sums]
    for field in summed:
        if field.column.sqlite_type != "INTEGER" or field.column.is_bool:
            raise SchemaError(
                f"{where}: {field.name!r} cannot be summed: it is {field.shape}. A sum is of an `int` field: only "
                "whole numbers add up to the same in every order."
            )
    return AggregateSchema(
        name=declaration.name,
        fields=declaration.fields,
        sums=declaration.sums,
        is_public=declaration.is_public,
        key_of=compile_key_of(key_columns),
        amounts_of=_compile_amounts_of(summed),
    )


def _compile_amounts_of(summed: list[Field]) -> Callable[[Table], tuple[int, ...]]:
    parts = [f"d.{field.name} or 0," if field.column.nullable else f"d.{field.name}," for field in summed]
    amounts_of: Callable[[Table], tuple[int, ...]] = eval(f"lambda d: ({' '.join(parts)})")  # noqa: S307 - names were checked
    return amounts_of
