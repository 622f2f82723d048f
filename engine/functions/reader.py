"""`ctx.db`: how functions read and write documents.

Invariant: in a restricted run nothing is handed out, and nothing is written, that the policies do not allow.
"""

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import msgspec

from engine.errors import DocumentNotFound, FunctionMisuse, InvalidDocument
from engine.functions.bounds import column_value, range_of
from engine.functions.moments import Moment
from engine.functions.scan import Scan
from engine.functions.search import Search, read_terms
from engine.functions.totals import Total
from engine.ids import Id
from engine.ranges import BY_CREATION_TIME, key_prefix
from engine.schema import Aggregate, Index, SearchIndex, Table, TableSchema
from engine.transaction.moments import MovingBound
from engine.transaction.read_set import SearchRead
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import WriteTransaction

if TYPE_CHECKING:
    from engine.functions.policies import Guard
    from engine.functions.run import Run

T = TypeVar("T", bound=Table)

_MISSING: Any = object()
_NO_BOUNDS: Mapping[str, Any] = {}


class DatabaseReader:
    """`ctx.db` of a query."""

    _guard: "Guard | None" = None  # the policies that restrict it
    _sees_deleted = False

    def __init__(self, transaction: ReadTransaction, run: "Run") -> None:
        self._transaction = transaction
        self._run = run

    def restrict(self, guard: "Guard") -> None:
        """See from now on what the policies allow, and nothing else."""
        self._guard = guard

    def _guard_of(self, documents: type[Table] | Table) -> "Guard | None":
        guard = self._guard
        return guard if guard is not None and guard.covers(documents) else None

    @property
    def unrestricted(self) -> Self:
        """The same without policies: for what the app itself has to know or do, not for what it shows."""
        database = copy(self)
        database._guard = None
        return database

    def with_deleted(self) -> Self:
        """The same with deleted documents: those of tables with a `DeletedAt` field, where they stay."""
        database = copy(self)
        database._sees_deleted = True
        return database

    async def get(self, id: Id[T]) -> T | None:
        """The document with this id, or None."""
        if self._run.wants_pause:
            await self._run.pause()
        document = self._transaction.get(id, with_deleted=self._sees_deleted)
        if document is None or (self._guard and (guard := self._guard_of(document)) and not guard.may_read(document)):
            return None
        return cast("T | None", document)

    def query(
        self,
        source: type[T] | Index[T],
        /,
        *,
        gt: Any = _MISSING,
        gte: Any = _MISSING,
        lt: Any = _MISSING,
        lte: Any = _MISSING,
        **equal: Any,
    ) -> "Scan[T]":
        """Begin a scan of a table (in creation order) or of one of its indexes.

        Keyword arguments fix a prefix of the index's fields; `gt`, `gte`, `lt`, `lte` bound the next one. As in SQL,
        a bound never matches null.
        """
        document_type, index_name = (
            (source.document_type, source.name) if isinstance(source, Index) else (source, BY_CREATION_TIME)
        )
        table = self._transaction.catalog.of_type(document_type).table
        if table.is_hidden:  # nobody would be woken when it changes
            raise FunctionMisuse(f"{self._run.function.path}: {table.name} is the engine's own, no function reads it.")
        index = (table.indexes_with_deleted if self._sees_deleted else table.indexes_by_name)[index_name]
        given: Mapping[str, Any] = _NO_BOUNDS
        moving: tuple[MovingBound, ...] = ()
        if not (gt is gte is lt is lte is _MISSING):
            bounds = {"gt": gt, "gte": gte, "lt": lt, "lte": lte}
            given = {name: bound for name, bound in bounds.items() if bound is not _MISSING}
            moving = tuple(
                MovingBound(name, bound.ago_ms, len(equal))
                for name, bound in given.items()
                if isinstance(bound, Moment)
            )
        index_range = range_of(table, index, equal, given)
        guard = self._guard and self._guard_of(document_type)
        return Scan(
            self._transaction, self._run, document_type, index, index_range, moving=moving, equal=equal, guard=guard
        )

    async def total(self, source: Aggregate[T], /, **key: Any) -> Total:
        """Count and sums of the documents that have these values in all fields of the aggregate: one look-up."""
        if self._run.wants_pause:
            await self._run.pause()
        table = self._transaction.catalog.of_type(source.document_type).table
        aggregate = next(aggregate for aggregate in table.aggregates if aggregate.name == source.name)
        where = f"total {table.name}.{aggregate.name}"
        if key.keys() != set(aggregate.fields):
            raise FunctionMisuse(
                f"{where}: it has the fields ({', '.join(aggregate.fields)}), not ({', '.join(key)}). Give each of "
                "them one value, or declare another aggregate."
            )
        guard = self._guard_of(source.document_type)
        if guard and not aggregate.is_public and not guard.reads_alike(table.name, key):
            raise FunctionMisuse(
                f"{where}: it counts documents that the policy of {table.name} may hide from this caller. Declare it "
                "with public=True if everybody may know its numbers, or read ctx.db.unrestricted.total(…)."
            )
        cell = key_prefix(
            [column_value(table, field, key[field], "total", aggregate.name) for field in aggregate.fields]
        )
        numbers = self._transaction.total(table, aggregate, cell)
        return Total(self._transaction, self._run, table.name, aggregate, cell, numbers)

    def search(self, source: SearchIndex[T], text: str, /, **equal: Any) -> Search[T]:
        """Begin a search for the words that a user typed: documents that have all of them, the most relevant first.

        The last word may be typed only in part. Keyword arguments fix filter fields of the search index. Quotes and
        operators are plain text; a text without words finds nothing. Deleted documents are in no search.
        """
        table = self._transaction.catalog.of_type(source.document_type).table
        index = table.search_indexes_by_name[source.name]
        where = f"search {table.name}.{index.name}"
        for name in equal:
            if name not in index.filters:
                raise FunctionMisuse(
                    f"{where}: {name!r} is none of its filter fields ({', '.join(index.filters) or 'it has none'}). "
                    "Add it there, or use filter(…)."
                )
        filters = tuple(
            (n, column_value(table, n, equal[n], "search", index.name)) for n in index.filters if n in equal
        )
        terms = read_terms(text, where, self._run.limits)
        search = Search(
            self._transaction,
            self._run,
            source.document_type,
            index,
            SearchRead(table.name, index.name, filters, terms),
        )
        guard = self._guard_of(source.document_type)
        return search if guard is None else search.filter(guard.may_read)

    if not TYPE_CHECKING:  # a checker shall still find misspelt names

        def __getattr__(self, name: str) -> Any:
            if name in ("insert", "patch", "replace", "delete", "restore", "purge"):
                raise FunctionMisuse(
                    f"{self._run.function.path}: ctx.db.{name} in a query; a query only reads. Make it a @mutation."
                )
            raise AttributeError(f"ctx.db has no {name!r}")


class DatabaseWriter(DatabaseReader):
    """`ctx.db` of a mutation."""

    def __init__(self, transaction: WriteTransaction, run: "Run") -> None:
        super().__init__(transaction, run)
        self._writes = transaction

    async def insert(self, document: T) -> Id[T]:
        """Store a new document; its id."""
        self._check_writable(self._writes.catalog.of_type(type(document)).table)
        if self._guard and (guard := self._guard_of(document)):
            guard.check("insert", document)
        return cast("Id[T]", self._writes.insert(document))

    async def patch(self, id: Id[T], /, **fields: Any) -> None:
        """Change some fields. Raises DocumentNotFound."""
        table = self._writes.catalog.of_id(id).table
        self._check_writable(table)
        # where a field is not one of the table, the write itself says what is wrong
        if self._guard and fields.keys() <= table.fields_by_name.keys():
            guard = self._guard_of(table.document_type)
            if guard is not None:
                old = self._seen(guard, id, "patch")
                guard.check("update", old, msgspec.structs.replace(old, **fields))
        self._writes.patch(id, fields, with_deleted=self._sees_deleted)

    async def replace(self, id: Id[T], document: T) -> None:
        """Put `document` in the place of the one that is there. Raises DocumentNotFound."""
        table = self._writes.catalog.of_id(id).table
        self._check_writable(table)
        if type(document) is not table.document_type:
            raise InvalidDocument(
                f"replace {table.name}: {id!r} is an id of {table.name}, the document is a {type(document).__name__}."
            )
        if self._guard and (guard := self._guard_of(table.document_type)):
            old = self._seen(guard, id, "replace")
            guard.check("update", old, table.with_id(document, old.id, old.creation_time))
        self._writes.replace(id, document, with_deleted=self._sees_deleted)

    async def delete(self, id: Id[T]) -> None:
        """Remove a document; a table with a `DeletedAt` field keeps it. Raises DocumentNotFound."""
        table = self._writes.catalog.of_id(id).table
        self._check_writable(table)
        if guard := self._guard_of(table.document_type):
            guard.check("delete", self._seen(guard, id, "delete"))
        self._writes.delete(id)

    async def restore(self, id: Id[T]) -> None:
        """Bring a deleted document back that its table has kept. Raises DocumentNotFound."""
        table = self._writes.catalog.of_id(id).table
        self._check_writable(table)
        if (guard := self._guard_of(table.document_type)) and table.deleted_field is not None:
            old = self.with_deleted()._seen(guard, id, "restore")
            guard.check("update", old, msgspec.structs.replace(old, **{table.deleted_field: None}))
        self._writes.restore(id)

    async def purge(self, id: Id[T]) -> None:
        """Remove a document for good, deleted or not, where `delete` keeps it. Raises DocumentNotFound."""
        table = self._writes.catalog.of_id(id).table
        self._check_writable(table)
        if guard := self._guard_of(table.document_type):
            guard.check("delete", self.with_deleted()._seen(guard, id, "purge"))
        self._writes.purge(id)

    def _seen(self, guard: "Guard", document_id: str, operation: str) -> Table:
        """A document that is to be written over; what the caller may not see is not there for it."""
        document = self._writes.get(document_id, with_deleted=self._sees_deleted)
        if document is None or not guard.may_read(document):
            raise DocumentNotFound(self._writes.catalog.of_id(document_id).table.name, document_id, operation)
        return document

    def _check_writable(self, table: TableSchema) -> None:
        self._run.check_open()
        if table.is_system:
            raise FunctionMisuse(f"{table.name} is the engine's own table: ctx.scheduler and ctx.storage change it.")
