"""`ctx.db`: how functions read and write documents.

A scan is built (`query`, `order`, `filter`) and then ended (`take`, `first`, `unique`, `collect`, `count`, `async for`;
`paginate` is in `pages.py`). Each end adds to the read set exactly the part of the index that it looked at.

Invariants
  1. The range in the read set ends at the last document that the run has seen, filtered out or not.
  2. Every statement is finished before the function goes on; an `async for` sees what its body writes further on.
"""

import math
from collections.abc import AsyncIterator, Callable, Mapping
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, cast

import msgspec

from engine.errors import DocumentNotFound, FunctionMisuse, InvalidDocument, LimitExceeded, NotUnique
from engine.functions.moments import Moment
from engine.functions.pages import Page, PaginationOptions, read_page
from engine.functions.search import Search, read_terms
from engine.functions.totals import RankedPage, Total
from engine.ids import TICKS_PER_MS, Id
from engine.ranges import BY_CREATION_TIME, IndexRange, OrderKey, after, before, key_prefix
from engine.schema import Aggregate, Index, IndexSchema, SearchIndex, Table, TableSchema
from engine.transaction.moments import MovingBound, MovingRead
from engine.transaction.read_set import SearchRead
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import WriteTransaction
from engine.values.wire import Mismatch

if TYPE_CHECKING:
    from engine.functions.policies import Guard
    from engine.functions.run import Run

T = TypeVar("T", bound=Table)

_FIRST_CHUNK, _CHUNK_MAX = 32, 1024
_TICK_MAX = 1 << 62  # an infinite bound still fits SQLite
_MISSING: Any = object()
_NOTHING: Mapping[str, Any] = {}


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
        given: Mapping[str, Any] = _NOTHING
        moving: tuple[MovingBound, ...] = ()
        if not (gt is gte is lt is lte is _MISSING):
            bounds = {"gt": gt, "gte": gte, "lt": lt, "lte": lte}
            given = {name: bound for name, bound in bounds.items() if bound is not _MISSING}
            moving = tuple(
                MovingBound(name, bound.ago_ms, len(equal))
                for name, bound in given.items()
                if isinstance(bound, Moment)
            )
        index_range = _range_of(table, index, equal, given)
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
        cell = key_prefix([_column_value(table, field, key[field], where) for field in aggregate.fields])
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
        filters = tuple((n, _column_value(table, n, equal[n], where)) for n in index.filters if n in equal)
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


class Scan(Generic[T]):
    """An ordered read of one index range, not started yet. Each step gives a new scan."""

    def __init__(
        self,
        transaction: ReadTransaction,
        run: "Run",
        document_type: type[T],
        index: IndexSchema,
        index_range: IndexRange,
        *,
        descending: bool = False,
        filters: tuple[Callable[[T], bool], ...] = (),
        moving: tuple[MovingBound, ...] = (),
        equal: Mapping[str, Any] = _NOTHING,
        guard: "Guard | None" = None,
    ) -> None:
        self._transaction, self._run, self._moving = transaction, run, moving
        self._document_type, self._index, self._range = document_type, index, index_range
        self._descending, self._equal, self._guard = descending, equal, guard
        self._predicates = filters  # those of the function
        if guard is None:
            self._filters = filters

    @cached_property
    def _filters(self) -> tuple[Callable[[T], bool], ...]:  # of a scan that a policy restricts
        assert self._guard is not None
        if self._verdict:
            return self._predicates
        return (self._guard.may_read, *self._predicates)  # what is hidden meets no predicate of the function

    @cached_property
    def _verdict(self) -> bool | None:
        """Whether all of the range may be read, by the values that all of it has; None: each document is judged."""
        if self._guard is None or not self._transaction.is_tracked:  # a mutation may change who may read
            return None
        return self._guard.reads_alike(self._range.table, self._equal)

    def order(self, direction: Literal["asc", "desc"]) -> "Scan[T]":
        """Read in index order, or backwards."""
        if direction not in ("asc", "desc"):
            raise FunctionMisuse(f'order: {direction!r} is no direction; "asc" and "desc" are.')
        return self._with(descending=direction == "desc")

    def with_deleted(self) -> "Scan[T]":
        """Read deleted documents too, where their table keeps them: each stands where it would if it were there."""
        table = self._transaction.catalog.of_type(self._document_type).table
        if table.deleted_field is None:
            raise FunctionMisuse(
                f"with_deleted: {table.name} keeps no deleted documents; a field `deleted_at: DeletedAt = None` would."
            )
        index = table.indexes_with_deleted[self._index.declared_name]
        scan = copy(self)
        scan._index, scan._range = index, msgspec.structs.replace(self._range, index=index.name)
        return scan

    def filter(self, predicate: Callable[[T], bool]) -> "Scan[T]":
        """Keep only documents for which the predicate is true. It costs a read for each one that it drops."""
        return self._with(filters=(*self._predicates, predicate))

    async def take(self, n: int) -> list[T]:
        """The first `n` documents, or all if there are fewer."""
        if type(n) is not int or n < 0:
            raise FunctionMisuse(f"take: {n!r} documents; a whole number from 0 on can be taken.")
        taken: list[T] = []
        reading = self._start()
        while len(taken) < n and not reading.is_exhausted:
            if self._run.wants_pause:
                await self._run.pause()
            if not self._filters:
                taken += reading.next_chunk(n - len(taken))
            else:
                document: T | None = None
                try:
                    for document in reading.next_chunk(max(n, _FIRST_CHUNK)):
                        if self._keeps(document):
                            taken.append(document)
                            if len(taken) == n:
                                return taken
                finally:  # a predicate may raise
                    if document is not None:
                        reading.saw(document)
        if len(taken) < n:
            reading.saw_the_end()
        elif taken:
            reading.saw(taken[-1])
        return taken

    async def first(self) -> T | None:
        """The first document, or None."""
        taken = await self.take(1)
        return taken[0] if taken else None

    async def unique(self) -> T | None:
        """The only document, or None. Raises NotUnique when there are two."""
        taken = await self.take(2)
        if len(taken) > 1:
            raise NotUnique(
                f"unique: two documents of {self._range.table} match in {self._index.name}: "
                f"{taken[0].id} and {taken[1].id}. Use first() if any will do."
            )
        return taken[0] if taken else None

    async def collect(self) -> list[T]:
        """All documents of the range."""
        if self._run.wants_pause:
            await self._run.pause()
        reading = self._start()
        documents = reading.next_chunk(None)
        reading.saw_the_end()  # before the predicates, which may raise
        return [d for d in documents if self._keeps(d)] if self._filters else documents

    async def count(self) -> int:
        """How many documents there are. Without a filter it depends on keys only: other changes never re-run it."""
        if self._verdict is False:
            return 0
        if self._filters:
            return len(await self.collect())
        if self._run.wants_pause:
            await self._run.pause()
        self._move_with_time(None)
        return self._transaction.count(self._document_type, self._index, self._range)

    async def rank(self, document: T | Id[T]) -> int | None:
        """How many documents of this scan come before one, 0 for the first; None if it is not among them.

        Of an index with `ranked=True`. A query depends on the keys up to that document: what comes after it, and what
        changes beside the keys, never re-runs it.
        """
        self._check_ranked("rank")
        if self._run.wants_pause:
            await self._run.pause()
        document_id = document.id if isinstance(document, Table) else document
        return self._transaction.rank(
            self._document_type, self._index, self._range, document_id, descending=self._descending
        )

    async def page(self, number: int, size: int, *, with_total: bool = False) -> RankedPage[T]:
        """The page of this number, from 0 on, of an index with `ranked=True`; empty when there are not so many.

        A query depends on the documents of the page and on the keys before it, with the total on all keys.
        """
        self._check_ranked("page")
        for name, value, least in (("number", number, 0), ("size", size, 1)):
            if type(value) is not int or value < least:
                raise FunctionMisuse(f"page: {name}={value!r}; it is a whole number from {least} on.")
        if self._run.wants_pause:
            await self._run.pause()
        transaction, source = self._transaction, (self._document_type, self._index, self._range)
        page = transaction.slice(*source, descending=self._descending, skip=number * size, size=size)
        total = transaction.count(*source) if with_total else None
        return RankedPage(page=page, number=number, size=size, total=total)

    def _check_ranked(self, what: str) -> None:
        where = f"{what} {self._range.table}.{self._index.declared_name}"
        if not self._index.is_ranked:
            raise FunctionMisuse(f"{where}: places in it are not kept. Declare it as index(…, ranked=True).")
        if self._filters:
            raise FunctionMisuse(
                f"{where}: places count every document, and a filter or a policy hides some. Index what it looks at, "
                "or read with take(n)."
            )

    async def paginate(self, options: PaginationOptions) -> Page[T]:
        """One page; a client that subscribes to it keeps the page's range, not its length."""
        if self._run.wants_pause:
            await self._run.pause()
        journal = self._run.begin_page()
        start, end = self._range.start, self._range.end
        for bound in self._moving:  # a cursor outlives the moment
            start, end = ((bound.name, bound.ago_ms), end) if bound.is_lower else (start, (bound.name, bound.ago_ms))
        seal = self._run.cursor_seal(self._index.name, start, end, self._descending)
        page = read_page(
            options, journal, seal, self._index, self._range, self._start, self._keeps, descending=self._descending
        )
        self._run.end_page(page.continue_cursor)
        return page

    async def __aiter__(self) -> AsyncIterator[T]:
        reading, size = self._start(), _FIRST_CHUNK
        while not reading.is_exhausted:
            if self._run.wants_pause:
                await self._run.pause()
            write_count = self._transaction.write_count
            for document in reading.next_chunk(size):
                reading.saw(document)
                if self._keeps(document):
                    yield document
                if self._transaction.write_count != write_count:
                    reading.go_on_after(document)  # what was fetched besides may have changed
                    size = 1
                    break
            else:
                size = min(size * 2, _CHUNK_MAX)
        reading.saw_the_end()

    def _keeps(self, document: T) -> bool:
        for predicate in self._filters:  # noqa: SIM110 - for each document of a scan: `all` would make a generator
            if not predicate(document):
                return False
        return True

    def _start(self, index_range: IndexRange | None = None) -> "Reading[T]":
        return Reading(
            self._transaction,
            self._document_type,
            self._index,
            index_range or self._range,
            descending=self._descending,
            moves_with_time=self._move_with_time if self._moving else None,
        )

    def _move_with_time(self, place: int | None) -> None:
        """What this scan read, which is at this place of the read set, changes by time alone."""
        if self._moving and self._transaction.is_tracked:
            read = MovingRead(self._document_type, self._index, self._range, self._moving, place)
            self._transaction.read_set.moving.append(read)

    def _with(
        self, *, descending: bool | None = None, filters: tuple[Callable[[T], bool], ...] | None = None
    ) -> "Scan[T]":
        return Scan(
            self._transaction,
            self._run,
            self._document_type,
            self._index,
            self._range,
            descending=self._descending if descending is None else descending,
            filters=self._predicates if filters is None else filters,
            moving=self._moving,
            equal=self._equal,
            guard=self._guard,
        )


class Reading(Generic[T]):
    """A scan under way: reads on from where it was, and keeps its entry of the read set true (invariant 1)."""

    def __init__(
        self,
        transaction: ReadTransaction,
        document_type: type[T],
        index: IndexSchema,
        index_range: IndexRange,
        *,
        descending: bool,
        moves_with_time: Callable[[int], None] | None = None,
    ) -> None:
        self._transaction, self._document_type, self._index = transaction, document_type, index
        self._range, self._descending, self._moves_with_time = index_range, descending, moves_with_time
        self._rest = index_range  # not read yet
        self._read_set = transaction.read_set  # of the function that reads, not of one that it calls meanwhile
        self._place: int | None = None  # in the read set
        self.is_exhausted = False  # True once the end of the range was read
        if not transaction.is_tracked:
            self._read_set.add_range(index_range)  # counts against the limit; nobody asks what of it was read

    def next_chunk(self, limit: int | None) -> list[T]:
        """The next documents, at most `limit`; None for all. What of them was consumed is told by `saw`."""
        try:
            documents: list[T] = self._transaction.scan(
                self._document_type, self._index, self._rest, descending=self._descending, limit=limit
            )
        except LimitExceeded:
            self.saw_the_end()  # how much is there is why it fails
            raise
        if limit is None or len(documents) < limit:
            self.is_exhausted = True
        elif documents:
            self.go_on_after(documents[-1])
        return documents

    def go_on_after(self, document: T) -> None:
        """The next chunk begins after this document."""
        key = self._index.key_of(document)[:-1]
        whole = self._range
        start, end = (whole.start, before(key)) if self._descending else (after(key), whole.end)
        self._rest = IndexRange(whole.table, whole.index, start, end)
        self.is_exhausted = False

    def saw(self, document: T) -> None:
        """The run has consumed the range up to this document."""
        if self._transaction.is_tracked:
            self._depend(self._range.cut_at(self._index.key_of(document), descending=self._descending))

    def saw_the_end(self) -> None:
        """The run knows that nothing more is there."""
        if self._transaction.is_tracked:
            self._depend(self._range)

    def _depend(self, index_range: IndexRange) -> None:
        if self._place is None:
            self._place = self._read_set.add_range(index_range)
            if self._moves_with_time is not None:
                self._moves_with_time(self._place)
        else:
            self._read_set.replace_range(self._place, index_range)


def _range_of(
    table: TableSchema, index: IndexSchema, equal: Mapping[str, Any], bounds: Mapping[str, Any]
) -> IndexRange:
    """The range that `equal` and the bounds describe; clear errors for what an index cannot do."""
    where = f"query {table.name}.{index.name}"
    fields = index.fields
    for name in equal:
        if name not in fields[: len(equal)]:
            raise FunctionMisuse(
                f"{where}: {name!r} is not among the first {len(equal)} field(s) of the index "
                f"({', '.join(fields) or 'it has none'}). Fix its fields from the left, or declare another index."
            )
    prefix = key_prefix([_column_value(table, name, equal[name], where) for name in fields[: len(equal)]])
    if not bounds:
        return IndexRange(table.name, index.name, before(prefix), after(prefix))
    if len(bounds) > 1 and ({"gt", "gte"} <= bounds.keys() or {"lt", "lte"} <= bounds.keys()):
        raise FunctionMisuse(f"{where}: two bounds of one side; give gt or gte, and lt or lte.")
    if len(equal) < len(fields):
        bounded_field = fields[len(equal)]
        is_int = table.fields_by_name[bounded_field].column.sqlite_type == "INTEGER"
        values = {
            name: _column_value(
                table, bounded_field, value.as_bound(name, is_int=is_int) if isinstance(value, Moment) else value, where
            )
            for name, value in bounds.items()
        }
    else:  # every index ends in the creation time
        bounded_field = "creation_time"
        values = {
            name: _tick_bound(name, value.ms if isinstance(value, Moment) else value, where)
            for name, value in bounds.items()
        }
    if None in values.values():
        raise FunctionMisuse(
            f"{where}: a bound of None matches nothing; leave it out, or ask for {bounded_field}=None."
        )
    start, end = after(prefix + key_prefix([None])), after(prefix)  # bounds never match null
    for name, value in values.items():
        key: OrderKey = prefix + key_prefix([value])
        match name:
            case "gt":
                start = after(key)
            case "gte":
                start = before(key)
            case "lt":
                end = before(key)
            case _:
                end = after(key)
    return IndexRange(table.name, index.name, start, max(start, end))


def _tick_bound(name: str, creation_time_ms: Any, where: str) -> int:
    if type(creation_time_ms) not in (int, float) or math.isnan(creation_time_ms):
        raise FunctionMisuse(f"{where}: {name}={creation_time_ms!r} is no creation time; give ms since the epoch.")
    ticks: float = max(-_TICK_MAX, min(creation_time_ms * TICKS_PER_MS, _TICK_MAX))
    return math.floor(ticks) if name in ("gt", "lte") else math.ceil(ticks)


def _column_value(table: TableSchema, field_name: str, value: Any, where: str) -> Any:
    field = table.fields_by_name[field_name]
    if value is None:
        return None
    try:
        field.fit(value)
    except Mismatch as error:
        raise InvalidDocument(f"{where}: {field_name}={value!r} cannot be in that field: {error}") from None
    return field.column.to_column(value)
