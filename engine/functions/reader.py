"""`ctx.db`: how functions read and write documents.

Invariant: in a restricted run nothing is handed out, and nothing is written, that the policies do not allow.
"""

from copy import copy
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import msgspec

from engine.errors import DocumentNotFound, FunctionMisuse, InvalidDocument
from engine.functions.bounds import bounded, column_value, make_plan
from engine.functions.moments import Moment
from engine.functions.scan import Scan
from engine.functions.search import Search, read_terms
from engine.functions.totals import Total
from engine.ids import Id
from engine.ranges import IndexRange, key_prefix
from engine.schema import Aggregate, Index, SearchIndex, Table
from engine.storage.rows import RowCodec
from engine.transaction.moments import MovingBound
from engine.transaction.read_set import SearchRead
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import WriteTransaction

if TYPE_CHECKING:
    from engine.functions.policies import Guard
    from engine.functions.run import Run

T = TypeVar("T", bound=Table)

_MISSING: Any = object()


class DatabaseReader:
    """`ctx.db` of a query."""

    _sees_deleted = False

    def __init__(self, transaction: ReadTransaction, run: "Run", guard: "Guard | None" = None) -> None:
        self._transaction = transaction
        self._run = run
        self._guard = guard  # the policies that restrict it

    def _guard_of(self, table: str) -> "Guard | None":
        guard = self._guard
        return guard if guard is not None and guard.covers(table) else None

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
        if document is None:
            return None
        guard = self._guard
        if guard is not None and guard.covers(document.__table_name__) and not guard.may_read(document):
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
        transaction, run = self._transaction, self._run
        catalog, key = transaction.catalog, (source, self._sees_deleted, *equal)
        plan = catalog.plans.get(key) or make_plan(catalog, key)
        if plan.is_hidden:  # nobody would be woken when it changes
            raise FunctionMisuse(f"{run.function.path}: {plan.table.name} is the engine's own, no function reads it.")
        prefix = plan.prefix_of(equal)
        index_range: IndexRange | None = None
        moving: tuple[MovingBound, ...] = ()
        if not (gt is gte is lt is lte is _MISSING):
            bounds = {"gt": gt, "gte": gte, "lt": lt, "lte": lte}
            given = {name: bound for name, bound in bounds.items() if bound is not _MISSING}
            moving = tuple(
                MovingBound(name, bound.ago_ms, len(equal))
                for name, bound in given.items()
                if isinstance(bound, Moment)
            )
            index_range = bounded(plan, prefix, equal, given)
        guard = self._guard
        if guard is not None and not guard.covers(plan.table.name):
            guard = None
        return Scan(transaction, run, plan.codec, plan.index, prefix, index_range, False, (), moving, equal, guard)

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
        guard = self._guard_of(table.name)
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
        guard = self._guard_of(table.name)
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

    def __init__(self, transaction: WriteTransaction, run: "Run", guard: "Guard | None" = None) -> None:
        super().__init__(transaction, run, guard)
        self._writes = transaction

    async def insert(self, document: T) -> Id[T]:
        """Store a new document; its id."""
        guard = self._writing(self._writes.catalog.of_type(type(document)))
        if guard is not None:
            guard.check("insert", document)
        return cast("Id[T]", self._writes.insert(document))

    async def patch(self, id: Id[T], /, **fields: Any) -> None:
        """Change some fields. Raises DocumentNotFound."""
        writes = self._writes
        codec = writes.catalog.of_id(id)
        guard = self._writing(codec)
        old = self._existing(guard, codec, id, "patch")
        new = writes.changed(codec, old, fields)
        if guard is not None:
            guard.check("update", old, new)
        writes.write_over(codec, "patch", old, new)

    async def replace(self, id: Id[T], document: T) -> None:
        """Put `document` in the place of the one that is there. Raises DocumentNotFound."""
        codec = self._writes.catalog.of_id(id)
        guard, table = self._writing(codec), codec.table
        if type(document) is not table.document_type:
            raise InvalidDocument(
                f"replace {table.name}: {id!r} is an id of {table.name}, the document is a {type(document).__name__}."
            )
        old = self._existing(guard, codec, id, "replace")
        new = table.with_id(document, old.id, old.creation_time)
        if guard is not None:
            guard.check("update", old, new)
        self._writes.write_over(codec, "replace", old, new)

    async def delete(self, id: Id[T]) -> None:
        """Remove a document; a table with a `DeletedAt` field keeps it. Raises DocumentNotFound."""
        codec = self._writes.catalog.of_id(id)
        guard = self._writing(codec)
        if guard is not None:
            guard.check("delete", self._existing(guard, codec, id, "delete"))
        self._writes.delete(id)

    async def restore(self, id: Id[T]) -> None:
        """Bring a deleted document back that its table has kept. Raises DocumentNotFound."""
        codec = self._writes.catalog.of_id(id)
        guard, deleted_field = self._writing(codec), codec.table.deleted_field
        if guard is not None and deleted_field is not None:
            old = self.with_deleted()._existing(guard, codec, id, "restore")
            guard.check("update", old, msgspec.structs.replace(old, **{deleted_field: None}))
        self._writes.restore(id)

    async def purge(self, id: Id[T]) -> None:
        """Remove a document for good, deleted or not, where `delete` keeps it. Raises DocumentNotFound."""
        codec = self._writes.catalog.of_id(id)
        guard = self._writing(codec)
        if guard is not None:
            guard.check("delete", self.with_deleted()._existing(guard, codec, id, "purge"))
        self._writes.purge(id)

    def _writing(self, codec: RowCodec[Any]) -> "Guard | None":
        """What decides about a write of the table. Raises FunctionMisuse where none may be."""
        self._run.check_open()
        table = codec.table
        if table.is_system:
            raise FunctionMisuse(f"{table.name} is the engine's own table: ctx.scheduler and ctx.storage change it.")
        return self._guard_of(table.name)

    def _existing(self, guard: "Guard | None", codec: RowCodec[Any], document_id: str, operation: str) -> Table:
        """A document that is to be written over; what the caller may not see is not there for it."""
        document = self._writes.existing(codec, document_id, operation, with_deleted=self._sees_deleted)
        if guard is not None and not guard.may_read(document):
            raise DocumentNotFound(codec.table.name, document_id, operation)
        return document
