"""What an app declares in `schema.py` (`declarations`), and the compiled, immutable schema that the engine runs on.

How tables and indexes look in SQLite is the business of `storage/ddl.py`.
"""

from engine.schema.compiled import Field, IndexColumn, IndexSchema, Schema, TableSchema
from engine.schema.compiler import compile_schema
from engine.schema.declarations import Index, IndexDeclaration, Table, TableMeta, index, unique
from engine.schema.indexes import INDEX_COUNT_MAX

__all__ = [
    "INDEX_COUNT_MAX",
    "Field",
    "Index",
    "IndexColumn",
    "IndexDeclaration",
    "IndexSchema",
    "Schema",
    "Table",
    "TableMeta",
    "TableSchema",
    "compile_schema",
    "index",
    "unique",
]
