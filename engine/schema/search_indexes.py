"""Compiling the search indexes of a table."""

from collections.abc import Callable

from engine.errors import SchemaError
from engine.schema.compiled import Field, SearchIndexSchema
from engine.schema.declarations import SearchIndexDeclaration, Table, declared, is_name

SEARCH_INDEX_COUNT_MAX = 4  # of one table: each splits its text into words with every document
SEARCH_FILTER_COUNT_MAX = 8


def compile_search_indexes(
    document_type: type[Table], fields: tuple[Field, ...], deleted_field: str | None
) -> dict[str, SearchIndexSchema]:
    """By name."""
    table = document_type.__table_name__
    declarations = declared(document_type, SearchIndexDeclaration)
    if len(declarations) > SEARCH_INDEX_COUNT_MAX:
        raise SchemaError(f"{table}: {len(declarations)} search indexes, {SEARCH_INDEX_COUNT_MAX} allowed.")
    field_by_name = {field.name: field for field in fields}
    name_by_lower_name: dict[str, str] = {}
    indexes: dict[str, SearchIndexSchema] = {}
    for name, declaration in declarations.items():
        where = f"{table}.{name}"
        if not is_name(name) or name_by_lower_name.setdefault(name.lower(), name) != name:
            raise SchemaError(f"{where}: no name for a search index, or taken (SQLite ignores case). Rename it.")
        _check(where, declaration, field_by_name)
        text_of = _compile_text_of(declaration.field, deleted_field)
        indexes[name] = SearchIndexSchema(name, declaration.field, declaration.filters, text_of)
    return indexes


def _check(where: str, declaration: SearchIndexDeclaration, field_by_name: dict[str, Field]) -> None:
    names = (declaration.field, *declaration.filters)
    if len(declaration.filters) > SEARCH_FILTER_COUNT_MAX:
        count = len(declaration.filters)
        raise SchemaError(f"{where}: {count} filter fields, {SEARCH_FILTER_COUNT_MAX} allowed.")
    if len(set(names)) < len(names):
        raise SchemaError(f"{where}: a field is named twice.")
    for name in names:
        if name not in field_by_name:
            raise SchemaError(
                f"{where}: there is no field {name!r}. The fields are {', '.join(sorted(field_by_name))}."
            )
    text = field_by_name[declaration.field]
    if text.column.sqlite_type != "TEXT" or not text.column.is_scalar or text.id_table is not None:
        raise SchemaError(
            f"{where}: {text.name!r} cannot be searched: it is {text.shape}. "
            "Search a field that is `str` or `str | None`."
        )
    for name in declaration.filters:
        if not field_by_name[name].column.is_scalar:
            raise SchemaError(
                f"{where}: {name!r} cannot be a filter: it is {field_by_name[name].shape}. "
                "Filter by bool, numbers, text, ids and bytes."
            )


def _compile_text_of(field: str, deleted_field: str | None) -> Callable[[Table], str | None]:
    deleted = "" if deleted_field is None else f"None if d.{deleted_field} is not None else "
    text_of: Callable[[Table], str | None] = eval(f"lambda d: {deleted}d.{field}")  # noqa: S307 - names were checked
    return text_of
