"""The compiled, immutable schema that the engine runs on.

Invariants
  1. `TableSchema.check` accepts exactly the documents that can be stored and read back equal (an int in a float field
     comes back as the float).
  2. `IndexSchema.key_of` gives the order key that SQLite sorts the document's row by.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from engine.errors import SchemaError
from engine.ranges import OrderKey
from engine.schema.declarations import T, Table
from engine.values.columns import Column
from engine.values.shapes import Shape


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
    is_hidden: bool  # a write wakes nobody
    check: Callable[[Table], None]  # InvalidDocument for a document that does not fit (invariant 1)

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
