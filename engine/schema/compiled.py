"""The compiled, immutable schema that the engine runs on.

Invariants
  1. `TableSchema.check` accepts exactly the documents that can be stored and read back equal (an int in a float field
     comes back as the float).
  2. `IndexSchema.key_of` gives the order key that SQLite sorts the document's row by.
  3. A table with a `DeletedAt` field has each index twice: one of the documents that are there, and one that holds the
     deleted ones too. Ranges of the two have different names, so who read the one is not woken by writes to the other.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from engine.errors import SchemaError
from engine.ranges import OrderKey
from engine.schema.declarations import OnDelete, Stamp, T, Table
from engine.values.columns import Column
from engine.values.shapes import Shape

KeyOf = Callable[[Table], OrderKey | None]  # None: the index does not hold the document


class Field(msgspec.Struct, frozen=True, eq=False):
    """One field of a table, and the column that holds it."""

    name: str
    annotation: Any
    shape: Shape
    column: Column
    default: Any  # msgspec.NODEFAULT: there is none
    default_factory: Any
    id_table: str | None  # the table whose ids it holds
    stamp: Stamp | None  # the engine keeps it
    fit: Callable[[Any], None]  # raises Mismatch for a value that it cannot hold
    fits: Callable[[Any], bool]  # True: it can hold the value; False: `fit` knows

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

    name: str  # of its ranges
    declared_name: str  # the same, but for an index that holds deleted documents too
    fields: tuple[str, ...]
    is_unique: bool
    is_ranked: bool  # ranks in it are kept
    columns: tuple[IndexColumn, ...]  # of the fields, then the creation tick
    key_of: Callable[[Table], OrderKey]  # the full key of a stored document
    deleted_field: str | None  # of its table
    holds_deleted: bool  # those documents too of which that field is not None


class ForeignKey(msgspec.Struct, frozen=True, eq=False):
    """A field that always names a document that is there."""

    table: str
    field: str
    parent: str  # the table whose documents it names
    on_delete: OnDelete
    index: IndexSchema  # begins with the field: who names a document is looked up in it
    index_with_deleted: IndexSchema  # the same index where there are no deleted documents


class AggregateSchema(msgspec.Struct, frozen=True, eq=False):
    """Count and sums of a table's documents, kept for each *cell*: each combination of values of the key's fields."""

    name: str
    fields: tuple[str, ...]  # of the key; none: one cell for the whole table
    sums: tuple[str, ...]
    is_public: bool  # may be read under a policy that hides some of what it counts
    key_of: Callable[[Table], OrderKey]  # the cell that a document is in: an order key
    amounts_of: Callable[[Table], tuple[int, ...]]  # what a document adds to each of the sums


class SearchIndexSchema(msgspec.Struct, frozen=True, eq=False):
    """A search index: the words of one field, and the fields that can narrow a search."""

    name: str
    field: str
    filters: tuple[str, ...]
    text_of: Callable[[Table], str | None]  # None: no search finds the document, it has no text or is deleted


class TableSchema(msgspec.Struct, frozen=True, eq=False):
    """A table: its documents, their fields, their indexes."""

    name: str
    document_type: type[Table]
    id_tag: str  # the first characters of its ids
    fields: tuple[Field, ...]  # without `id` and `creation_time`
    fields_by_name: dict[str, Field]
    indexes_by_name: dict[str, IndexSchema]
    indexes_with_deleted: dict[str, IndexSchema]  # by the same names; the same ones where no deleted document stays
    ranked_indexes: tuple[IndexSchema, ...]
    aggregates: tuple[AggregateSchema, ...]
    key_places: tuple[tuple[str, KeyOf], ...]  # of each range name: where a document lies in it (invariant 3)
    search_indexes_by_name: dict[str, SearchIndexSchema]
    foreign_keys: tuple[ForeignKey, ...]
    child_keys: tuple[ForeignKey, ...]  # foreign keys that name documents of this table
    updated_field: str | None
    deleted_field: str | None
    is_system: bool
    is_hidden: bool  # a write wakes nobody
    check: Callable[[Table], None]  # InvalidDocument for a document that does not fit (invariant 1)
    check_over: Callable[[Table, Table], None]  # the same, of one that is written over the second, which does

    def with_id(self, document: T, document_id: str, creation_time: float) -> T:
        """The same document under this id."""
        return msgspec.structs.replace(document, id=document_id, creation_time=creation_time)

    def is_deleted(self, document: Table) -> bool:
        """Whether it is there for `with_deleted()` only."""
        return self.deleted_field is not None and getattr(document, self.deleted_field) is not None


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
