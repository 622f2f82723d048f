"""`ctx.db`: how functions read and write documents.

A scan is built (`query`, `order`, `filter`) and then ended (`take`, `first`, `unique`, `collect`, `count`, `async for`;
`paginate` is in `pages.py`). Each end adds to the read set exactly the part of the index that it looked at.

Invariants
  1. The range in the read set ends at the last document that the run has seen, filtered out or not.
  2. Every statement is finished before the function goes on; an `async for` sees what its body writes further on.
"""

import math
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from engine.errors import FunctionMisuse, InvalidDocument, LimitExceeded, NotUnique
from engine.functions.pages import Page, PaginationOptions, read_page
from engine.ids import TICKS_PER_MS, Id
from engine.ranges import BY_CREATION_TIME, IndexRange, OrderKey, after, before, key_prefix
from engine.schema import Index, IndexSchema, Table, TableSchema
from engine.transaction.transaction import ReadTransaction, WriteTransaction
from engine.values.wire import Mismatch

if TYPE_CHECKING:
    from engine.functions.run import Run

T = TypeVar("T", bound=Table)

_FIRST_CHUNK, _CHUNK_MAX = 32, 1024
_TICK_MAX = 1 << 62  # an infinite bound still fits SQLite
_MISSING: Any = object()


class DatabaseReader:
    """`ctx.db` of a query."""

    def __init__(self, transaction: ReadTransaction, run: "Run") -> None:
        self._transaction = transaction
        self._run = run

    async def get(self, id: Id[T]) -> T | None:
        """The document with this id, or None."""
        if self._run.wants_pause:
            await self._run.pause()
        return cast("T | None", self._transaction.get(id))

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
        index = table.indexes_by_name[index_name]
        bounds = {"gt": gt, "gte": gte, "lt": lt, "lte": lte}
        index_range = _range_of(table, index, equal, {k: v for k, v in bounds.items() if v is not _MISSING})
        return Scan(self._transaction, self._run, document_type, index, index_range)

    if not TYPE_CHECKING:  # a checker shall still find misspelt names

        def __getattr__(self, name: str) -> Any:
            if name in ("insert", "patch", "replace", "delete"):
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
        return cast("Id[T]", self._writes.insert(document))

    async def patch(self, id: Id[T], /, **fields: Any) -> None:
        """Change some fields. Raises DocumentNotFound."""
        self._check_writable(self._writes.catalog.of_id(id).table)
        self._writes.patch(id, fields)

    async def replace(self, id: Id[T], document: T) -> None:
        """Put `document` in the place of the one that is there. Raises DocumentNotFound."""
        table = self._writes.catalog.of_id(id).table
        self._check_writable(table)
        if type(document) is not table.document_type:
            raise InvalidDocument(
                f"replace {table.name}: {id!r} is an id of {table.name}, the document is a {type(document).__name__}."
            )
        self._writes.replace(id, document)

    async def delete(self, id: Id[T]) -> None:
        """Remove a document. Raises DocumentNotFound."""
        self._check_writable(self._writes.catalog.of_id(id).table)
        self._writes.delete(id)

    def _check_writable(self, table: TableSchema) -> None:
        self._run.check_open()
        if table.is_system:
            raise FunctionMisuse(f"{table.name} is the engine's own table: use ctx.scheduler to change jobs.")


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
    ) -> None:
        self._transaction, self._run = transaction, run
        self._document_type, self._index, self._range = document_type, index, index_range
        self._descending, self._filters = descending, filters

    def order(self, direction: Literal["asc", "desc"]) -> "Scan[T]":
        """Read in index order, or backwards."""
        if direction not in ("asc", "desc"):
            raise FunctionMisuse(f'order: {direction!r} is no direction; "asc" and "desc" are.')
        return self._with(descending=direction == "desc")

    def filter(self, predicate: Callable[[T], bool]) -> "Scan[T]":
        """Keep only documents for which the predicate is true. It costs a read for each one that it drops."""
        return self._with(filters=(*self._filters, predicate))

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
        if self._filters:
            return len(await self.collect())
        if self._run.wants_pause:
            await self._run.pause()
        return self._transaction.count(self._document_type, self._index, self._range)

    async def paginate(self, options: PaginationOptions) -> Page[T]:
        """One page; a client that subscribes to it keeps the page's range, not its length."""
        if self._run.wants_pause:
            await self._run.pause()
        journal = self._run.begin_page()
        seal = self._run.cursor_seal(self._index.name, self._range, descending=self._descending)
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
        return all(predicate(document) for predicate in self._filters)

    def _start(self, index_range: IndexRange | None = None) -> "Reading[T]":
        return Reading(
            self._transaction, self._document_type, self._index, index_range or self._range, descending=self._descending
        )

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
            filters=self._filters if filters is None else filters,
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
    ) -> None:
        self._transaction, self._document_type, self._index = transaction, document_type, index
        self._range, self._descending = index_range, descending
        self._rest = index_range  # not read yet
        self._place: int | None = None  # in the read set
        self.is_exhausted = False  # True once the end of the range was read
        if not transaction.is_tracked:
            transaction.read_set.add_range(index_range)  # counts against the limit; nobody asks what of it was read

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
        read_set = self._transaction.read_set
        if self._place is None:
            self._place = read_set.add_range(index_range)
        else:
            read_set.replace_range(self._place, index_range)


def _range_of(table: TableSchema, index: IndexSchema, equal: dict[str, Any], bounds: dict[str, Any]) -> IndexRange:
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
        values = {name: _column_value(table, bounded_field, value, where) for name, value in bounds.items()}
    else:  # every index ends in the creation time
        bounded_field = "creation_time"
        values = {name: _tick_bound(name, value, where) for name, value in bounds.items()}
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
