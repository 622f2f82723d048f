"""What an app declares in `schema.py` (`declarations`), and the compiled, immutable schema that the engine runs on.

How tables and indexes look in SQLite is the business of `storage/ddl.py`.
"""

from engine.schema.compiled import (
    AggregateSchema,
    Field,
    ForeignKey,
    IndexColumn,
    IndexSchema,
    KeyOf,
    Schema,
    SearchIndexSchema,
    TableSchema,
)
from engine.schema.compiler import compile_schema
from engine.schema.declarations import (
    Aggregate,
    AggregateDeclaration,
    DeletedAt,
    Index,
    IndexDeclaration,
    SearchIndex,
    SearchIndexDeclaration,
    Table,
    TableMeta,
    UpdatedAt,
    aggregate,
    foreign_key,
    index,
    search_index,
    unique,
)
from engine.schema.indexes import INDEX_COUNT_MAX

__all__ = [
    "INDEX_COUNT_MAX",
    "Aggregate",
    "AggregateDeclaration",
    "AggregateSchema",
    "DeletedAt",
    "Field",
    "ForeignKey",
    "Index",
    "IndexColumn",
    "IndexDeclaration",
    "IndexSchema",
    "KeyOf",
    "Schema",
    "SearchIndex",
    "SearchIndexDeclaration",
    "SearchIndexSchema",
    "Table",
    "TableMeta",
    "TableSchema",
    "UpdatedAt",
    "aggregate",
    "compile_schema",
    "foreign_key",
    "index",
    "search_index",
    "unique",
]
