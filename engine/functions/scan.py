"""Ordered reads of index ranges, as functions build them.

A scan is built (`query`, `order`, `filter`) and then ended (`take`, `first`, `unique`, `collect`, `count`, `async for`;
`paginate` is in `pages.py`). Each end adds to the read set exactly the part of the index that it looked at.

Invariants
  1. The range in the read set ends at the last document that the run has seen, filtered out or not.
  2. Every statement is finished before the function goes on; an `async for` sees what its body writes further on.
  3. A document that a policy hides meets no predicate of the function, and is in no result.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec

from engine.errors import FunctionMisuse, LimitExceeded, NotUnique
from engine.functions.pages import Page, PaginationOptions, read_page
from engine.functions.totals import RankedPage
from engine.ids import Id
from engine.ranges import IndexRange, OrderKey, after, before, range_under
from engine.schema import IndexSchema, Table
from engine.storage.rows import RowCodec
from engine.transaction.moments import MovingBound, MovingRead
from engine.transaction.reading import ReadTransaction

if TYPE_CHECKING:
    from engine.functions.policies import Guard
    from engine.functions.run import Run

T = TypeVar("T", bound=Table)

_FIRST_CHUNK, _CHUNK_MAX = 32, 1024


class Scan(Generic[T]):
    """An ordered read of one index range, not started yet. Each step gives a new scan."""

    __slots__ = (
        "_asked",
        "_codec",
        "_descending",
        "_equal",
        "_guard",
        "_index",
        "_moving",
        "_predicates",
        "_prefix",
        "_range",
        "_run",
        "_transaction",
        "_verdict",
    )

    def __init__(
        self,
        transaction: ReadTransaction,
        run: "Run",
        codec: RowCodec[T],
        index: IndexSchema,
        prefix: OrderKey,
        index_range: IndexRange | None,
        descending: bool,
        predicates: tuple[Callable[[T], bool], ...],
        moving: tuple[MovingBound, ...],
        equal: Mapping[str, Any],
        guard: "Guard | None",
    ) -> None:
        self._transaction, self._run, self._moving = transaction, run, moving
        self._codec, self._index, self._prefix = codec, index, prefix
        self._range = index_range  # None: all that is under the prefix
        self._descending, self._equal, self._guard = descending, equal, guard
        self._predicates = predicates  # those of the function
        self._verdict: bool | None = None  # set with `_asked`
        self._asked: tuple[Callable[[T], bool], ...] | None = predicates if guard is None else None  # by `_tests`

    def _tests(self) -> tuple[Callable[[T], bool], ...]:
        """What a document must pass. Not asked before it matters: policies read, and that counts."""
        if self._asked is None:
            self._asked = self._ask_policy()
        return self._asked

    def _keeps(self, document: T) -> bool:
        return _passes(document, self._tests())

    def _ask_policy(self) -> tuple[Callable[[T], bool], ...]:
        guard = self._guard
        assert guard is not None
        table = self._codec.table.name
        if self._transaction.is_tracked:  # a mutation may change who may read
            # whether all of the range may be read, by the values that all of it has; None: each document is judged
            self._verdict = guard.reads_alike(table, self._equal)
            if self._verdict:
                return self._predicates
        return (guard.reads(table), *self._predicates)  # what is hidden meets no predicate of the function

    def order(self, direction: Literal["asc", "desc"]) -> "Scan[T]":
        """Read in index order, or backwards."""
        if direction not in ("asc", "desc"):
            raise FunctionMisuse(f'order: {direction!r} is no direction; "asc" and "desc" are.')
        return self._with(descending=direction == "desc")

    def with_deleted(self) -> "Scan[T]":
        """Read deleted documents too, where their table keeps them: each stands where it would if it were there."""
        table = self._codec.table
        if table.deleted_field is None:
            raise FunctionMisuse(
                f"with_deleted: {table.name} keeps no deleted documents; a field `deleted_at: DeletedAt = None` would."
            )
        index = table.indexes_with_deleted[self._index.declared_name]
        scan = copy(self)
        scan._index = index
        if self._range is not None:
            scan._range = msgspec.structs.replace(self._range, index=index.name)
        return scan

    def filter(self, predicate: Callable[[T], bool]) -> "Scan[T]":
        """Keep only documents for which the predicate is true. It costs a read for each one that it drops."""
        return self._with(predicates=(*self._predicates, predicate))

    async def take(self, n: int) -> list[T]:
        """The first `n` documents, or all if there are fewer."""
        if type(n) is not int or n < 0:
            raise FunctionMisuse(f"take: {n!r} documents; a whole number from 0 on can be taken.")
        taken: list[T] = []
        if n == 0:
            return taken
        tests, transaction = self._tests(), self._transaction
        if transaction.is_tracked or self._range is not None:
            reading = self._start()
        else:  # of a mutation nobody asks what it has read: 0.93 × the bytecodes of one with three scans
            if self._run.wants_pause:
                await self._run.pause()
            size = max(n, _FIRST_CHUNK) if tests else n
            transaction.read_set.take_room()
            chunk = transaction.under(self._codec, self._index, self._prefix, descending=self._descending, limit=size)
            for found in chunk:
                if not tests or _passes(found, tests):
                    taken.append(found)
                    if len(taken) == n:
                        return taken
            if len(chunk) < size:
                return taken
            reading = self._start()
            reading.go_on_after(chunk[-1])
        while len(taken) < n and not reading.is_exhausted:
            if self._run.wants_pause:
                await self._run.pause()
            if not tests:
                taken += reading.next_chunk(n - len(taken))
            else:
                document: T | None = None
                try:
                    for document in reading.next_chunk(max(n, _FIRST_CHUNK)):
                        for passes in tests:
                            if not passes(document):
                                break
                        else:
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
                f"unique: two documents of {self._codec.table.name} match in {self._index.name}: "
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
        tests = self._tests()
        return [document for document in documents if _passes(document, tests)] if tests else documents

    async def count(self) -> int:
        """How many documents there are. Without a filter it depends on keys only: other changes never re-run it."""
        tests = self._tests()
        if self._verdict is False:
            return 0
        if tests:
            return len(await self.collect())
        if self._run.wants_pause:
            await self._run.pause()
        self._move_with_time(None)
        return self._transaction.count(self._codec.table.document_type, self._index, self._whole())

    async def rank(self, document: T | Id[T]) -> int | None:
        """How many documents of this scan come before one, 0 for the first; None if it is not among them.

        Of an index with `ranked=True`. A query depends on the keys up to that document: what comes after it, and what
        changes beside the keys, never re-runs it.
        """
        self._check_ranked("rank")
        if self._run.wants_pause:
            await self._run.pause()
        self._move_with_time(None)
        document_id = document.id if isinstance(document, Table) else document
        return self._transaction.rank(
            self._codec.table.document_type, self._index, self._whole(), document_id, descending=self._descending
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
        self._move_with_time(None)
        transaction, source = self._transaction, (self._codec.table.document_type, self._index, self._whole())
        page = transaction.slice(*source, descending=self._descending, skip=number * size, size=size)
        total = transaction.count(*source) if with_total else None
        return RankedPage(page=page, number=number, size=size, total=total)

    def _check_ranked(self, what: str) -> None:
        where = f"{what} {self._codec.table.name}.{self._index.declared_name}"
        if not self._index.is_ranked:
            raise FunctionMisuse(f"{where}: places in it are not kept. Declare it as index(…, ranked=True).")
        if self._tests():
            raise FunctionMisuse(
                f"{where}: places count every document, and a filter or a policy hides some. Index what it looks at, "
                "or read with take(n)."
            )

    async def paginate(self, options: PaginationOptions) -> Page[T]:
        """One page; a client that subscribes to it keeps the page's range, not its length."""
        if self._run.wants_pause:
            await self._run.pause()
        journal = self._run.begin_page()
        whole = self._whole()
        start, end = whole.start, whole.end
        for bound in self._moving:  # a cursor outlives the moment
            start, end = ((bound.name, bound.ago_ms), end) if bound.is_lower else (start, (bound.name, bound.ago_ms))
        seal = self._run.cursor_seal(self._index.name, start, end, self._descending)
        page = read_page(
            options, journal, seal, self._index, whole, self._start, self._keeps, descending=self._descending
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

    def _start(self, index_range: IndexRange | None = None) -> "Reading[T]":
        return Reading(
            self._transaction,
            self._codec,
            self._index,
            self._prefix,
            index_range or self._range,
            self._descending,
            self._move_with_time if self._moving else None,
        )

    def _whole(self) -> IndexRange:
        return self._range or range_under(self._codec.table.name, self._index.name, self._prefix)

    def _move_with_time(self, place: int | None) -> None:
        """What this scan read, which is at this place of the read set, changes by time alone."""
        if self._moving and self._transaction.is_tracked:
            read = MovingRead(self._codec.table.document_type, self._index, self._whole(), self._moving, place)
            self._transaction.read_set.moving.append(read)

    def _with(
        self, *, descending: bool | None = None, predicates: tuple[Callable[[T], bool], ...] | None = None
    ) -> "Scan[T]":
        return Scan(
            self._transaction,
            self._run,
            self._codec,
            self._index,
            self._prefix,
            self._range,
            self._descending if descending is None else descending,
            self._predicates if predicates is None else predicates,
            self._moving,
            self._equal,
            self._guard,
        )


def _passes(document: T, tests: tuple[Callable[[T], bool], ...]) -> bool:
    for passes in tests:  # noqa: SIM110 - for each document of a scan: `all` would make a generator
        if not passes(document):
            return False
    return True


class Reading(Generic[T]):
    """A scan under way: reads on from where it was, and keeps its entry of the read set true (invariant 1)."""

    __slots__ = (
        "_codec",
        "_descending",
        "_index",
        "_is_tracked",
        "_last",
        "_moves_with_time",
        "_place",
        "_prefix",
        "_range",
        "_read_set",
        "_transaction",
        "is_exhausted",
    )

    def __init__(
        self,
        transaction: ReadTransaction,
        codec: RowCodec[T],
        index: IndexSchema,
        prefix: OrderKey,
        index_range: IndexRange | None,
        descending: bool,
        moves_with_time: Callable[[int], None] | None,
    ) -> None:
        self._transaction, self._codec, self._index = transaction, codec, index
        self._prefix, self._range = prefix, index_range  # None: all that is under the prefix
        self._descending, self._moves_with_time = descending, moves_with_time
        self._last: T | None = None  # the next chunk begins after it
        self._read_set = transaction.read_set  # of the function that reads, not of one that it calls meanwhile
        self._place: int | None = None  # in the read set
        self.is_exhausted = False  # True once the end of the range was read
        self._is_tracked = transaction.is_tracked
        if not self._is_tracked:
            self._read_set.take_room()  # nobody asks what was read

    def next_chunk(self, limit: int | None) -> list[T]:
        """The next documents, at most `limit`; None for all. What of them was consumed is told by `saw`."""
        transaction, index, descending = self._transaction, self._index, self._descending
        try:
            if self._last is None and self._range is None:
                documents = transaction.under(self._codec, index, self._prefix, descending=descending, limit=limit)
            else:
                rest = self._whole() if self._last is None else self._range_after(self._last)
                document_type = self._codec.table.document_type
                documents = transaction.scan(document_type, index, rest, descending=descending, limit=limit)
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
        self._last = document
        self.is_exhausted = False

    def _range_after(self, document: T) -> IndexRange:
        key = self._index.key_of(document)[:-1]
        whole = self._whole()
        start, end = (whole.start, before(key)) if self._descending else (after(key), whole.end)
        return IndexRange(whole.table, whole.index, start, end)

    def _whole(self) -> IndexRange:
        if self._range is None:
            self._range = range_under(self._codec.table.name, self._index.name, self._prefix)
        return self._range

    def saw(self, document: T) -> None:
        """The run has consumed the range up to this document."""
        if self._is_tracked:
            self._depend(self._whole().cut_at(self._index.key_of(document), descending=self._descending))

    def saw_the_end(self) -> None:
        """The run knows that nothing more is there."""
        if self._is_tracked:
            self._depend(self._whole())

    def _depend(self, index_range: IndexRange) -> None:
        if self._place is None:
            self._place = self._read_set.add_range(index_range)
            if self._moves_with_time is not None:
                self._moves_with_time(self._place)
        else:
            self._read_set.replace_range(self._place, index_range)
