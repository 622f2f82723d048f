"""What one run reads on one SQLite connection, and the tables that it can reach.

A query reads from a pinned snapshot and keeps a read set; a mutation (`transaction.py`) reads on the writer connection.
Plain calls: nothing here waits.

Invariants
  1. Every row that reaches the run is counted against the limits before it is decoded.
  2. `check_deadline` is called once per operation: a run that loops over `ctx.db` cannot outlive its time.
  3. A deleted document that its table keeps is absent, but for who asks `with_deleted`.
Functions call it through `functions/reader.py`; who may call what is decided there.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from engine.errors import InvalidDocument, LimitExceeded
from engine.ids import TAG_LENGTH, looks_like_id
from engine.limits import Limits
from engine.ranges import IndexRange, OrderKey, Scalar, after, before, key_prefix
from engine.schema import AggregateSchema, IndexSchema, Table, TableSchema
from engine.storage import ranked, scans
from engine.storage import search as search_indexes
from engine.storage import totals as cells
from engine.storage.connections import Connection
from engine.storage.rows import RowCodec, Stored
from engine.transaction import rules, totals
from engine.transaction.kept import SCAN_COUNT_MAX, Kept, prefix_of
from engine.transaction.read_set import CellEntry, ReadSet, SearchRead, UntrackedReads

if TYPE_CHECKING:
    from engine.transaction.transaction import WriteTransaction

T = TypeVar("T", bound=Table)

# Runs the triggers of a table, given the change of one of its documents.
Fire = Callable[["WriteTransaction", TableSchema, rules.Change[Any]], None]


def no_deadline() -> None:
    """Of a transaction that no function runs in."""


_ANY = 1 << 62
_UNBOUNDED = Limits(
    read_document_count_max=_ANY,
    read_size_bytes_max=_ANY,
    write_document_count_max=_ANY,
    write_size_bytes_max=_ANY,
    document_size_bytes_max=_ANY,
)


class Catalog:
    """The tables that a run can reach, by document class and by the tag of an id. Immutable."""

    def __init__(
        self,
        codecs: Iterable[RowCodec[Any]],
        on_delete: Mapping[type[Table], Callable[..., None]] | None = None,
        *,
        triggered: Collection[str] = (),
        fire: Fire | None = None,
    ) -> None:
        """`fire` is called for each change of a document of the tables that are named in `triggered`."""
        assert fire is not None or not triggered
        self.triggered, self.fire = frozenset(triggered), fire
        # what the engine itself does, with the transaction and the document, when one of a class is deleted
        self.on_delete = on_delete or {}
        self.plans: dict[Any, Any] = {}  # of queries that functions make: `functions/bounds.py`
        self._by_type: dict[type[Table], RowCodec[Any]] = {}
        self._by_tag: dict[str, RowCodec[Any]] = {}
        self._by_table: dict[str, RowCodec[Any]] = {}
        for codec in codecs:
            self._by_type[codec.table.document_type] = codec
            self._by_tag[codec.table.id_tag] = codec
            self._by_table[codec.table.name] = codec
        # tables of which a write may set off another one: most pay nothing for what they do not declare
        self.followed = frozenset(name for name, codec in self._by_table.items() if self._is_followed(codec.table))

    def _is_followed(self, table: TableSchema) -> bool:
        has_shadows = table.aggregates or table.ranked_indexes or table.search_indexes_by_name
        return bool(has_shadows) or table.name in self.triggered or table.document_type in self.on_delete

    def of_table(self, name: str) -> RowCodec[Any]:
        """The table of this name, which is there."""
        return self._by_table[name]

    def of_type(self, document_type: type[Table]) -> RowCodec[Any]:
        codec = self._by_type.get(document_type)
        if codec is None:
            raise InvalidDocument(
                f"{getattr(document_type, '__name__', document_type)!r} is not a table of schema.py. "
                "Tables are subclasses of engine.Table defined there."
            )
        return codec

    def of_id(self, document_id: str) -> RowCodec[Any]:
        codec = self._by_tag.get(str(document_id)[:TAG_LENGTH])
        if codec is None or not looks_like_id(document_id):
            raise InvalidDocument(f"{document_id!r} is not an id of any table.")
        return codec


class ReadTransaction:
    """What one run reads; for a query also what it depends on."""

    is_tracked: ClassVar[bool] = True  # whether the read set is to be exact
    run: object | None = None  # of the function that runs; for triggers
    write_count = 0  # stays so, unless this is a WriteTransaction
    read_count = 0  # documents, also those that a filter then drops
    read_size_bytes = 0
    check_deadline: Callable[[], None] = staticmethod(no_deadline)  # another one while a function runs

    def __init__(
        self,
        connection: Connection,
        catalog: Catalog,
        limits: Limits,
        kept: Kept | None = None,
    ) -> None:
        self._connection = connection
        self.catalog = catalog
        self._limits = limits
        self._kept = kept  # of what this connection sees; None: nothing is kept of it
        self.read_set = (ReadSet if self.is_tracked else UntrackedReads)(limits.read_range_count_max)

    def another(self, limits: Limits) -> "ReadTransaction":
        """One that reads the same snapshot, and of which nothing is known yet."""
        return ReadTransaction(self._connection, self.catalog, limits)

    def impose(self, limits: Limits, check_deadline: Callable[[], None]) -> None:
        """A function begins: what it uses is counted from here on, and bounded."""
        self._limits, self.check_deadline = limits, check_deadline
        self.read_count = self.read_size_bytes = 0

    def lift_limits(self) -> None:
        """What the engine itself does here from now on is not bounded: limits are for functions."""
        self._limits, self.check_deadline = _UNBOUNDED, no_deadline

    def get(self, document_id: str, *, with_deleted: bool = False) -> Table | None:
        """The document, or None; either way the run depends on that one row."""
        codec = self.catalog.of_id(document_id)
        if self.is_tracked:
            self.read_set.add_document(codec.table.name, document_id)
        return self._read(codec, document_id, with_deleted=with_deleted)

    def scan(
        self,
        document_type: type[Table],
        index: IndexSchema,
        index_range: IndexRange,
        *,
        descending: bool,
        limit: int | None,
    ) -> list[Any]:
        """Documents in index order, at most `limit`; the caller adds to the read set what it consumes of them."""
        codec = self.catalog.of_type(document_type)
        prefix = prefix_of(index_range)
        if prefix is not None:
            return self.under(codec, index, prefix, descending=descending, limit=limit)
        self.check_deadline()
        if index_range.start >= index_range.end:
            return []
        room = self._limits.read_document_count_max - self.read_count
        wanted = room + 1 if limit is None else min(limit, room + 1)
        rows = scans.fetch(self._connection, codec, index, index_range, descending=descending, limit=wanted)
        self._spend(codec, rows)
        decode = codec.decode
        return [decode(row) for row in rows]

    def under(
        self, codec: RowCodec[Any], index: IndexSchema, prefix: OrderKey, *, descending: bool, limit: int | None
    ) -> list[Any]:
        """As `scan`, of all documents that have these values in the first columns of the index."""
        self.check_deadline()
        room = self._limits.read_document_count_max - self.read_count
        wanted = room + 1 if limit is None or limit > room else limit
        kept = None if codec.table.is_hidden else self._kept
        found = None if kept is None else kept.find(index, prefix, wanted, descending=descending)
        if found is None:
            rows = scans.fetch_under(self._connection, codec, index, prefix, descending=descending, limit=wanted)
            if kept is None or len(rows) > SCAN_COUNT_MAX:
                self._spend(codec, rows)
                decode = codec.decode
                return [decode(row) for row in rows]
            size_of = codec.size_of_row
            found = [Stored(row, size_of(row)) for row in rows]
            kept.keep_scan(codec, index, prefix, found, descending=descending, is_whole=len(found) < wanted)
        if len(found) == 1:
            (stored,) = found
            self._spend_read(1, stored.size_bytes)
            return [stored.give(codec)]
        size_bytes = 0
        for stored in found:
            size_bytes += stored.size_bytes
        self._spend_read(len(found), size_bytes)
        return [document if (document := s.document) is not None else s.give(codec) for s in found]

    def find(self, document_type: type[T], index_name: str, *values: Scalar, limit: int | None = None) -> list[T]:
        """The documents that the index has under these column values, in its order; a read of the engine itself."""
        return self.scan(*self.range_of(document_type, index_name, *values), descending=False, limit=limit)

    def range_of(
        self, document_type: type[T], index_name: str, *values: Scalar
    ) -> tuple[type[T], IndexSchema, IndexRange]:
        """Where those documents are, for `scan` and `count`."""
        table, prefix = self.catalog.of_type(document_type).table, key_prefix(values)
        index_range = IndexRange(table.name, index_name, before(prefix), after(prefix))
        return document_type, table.indexes_by_name[index_name], index_range

    def count(self, document_type: type[Table], index: IndexSchema, index_range: IndexRange) -> int:
        """How many documents the range holds; the run depends on their keys only."""
        table = self.catalog.of_type(document_type).table
        total = self.count_total(table, index, index_range)
        if total is not None:
            return total
        self.check_deadline()
        self.read_set.add_key_range(index_range)
        if index_range.start >= index_range.end:
            return 0
        if index.is_ranked:
            self._spend_documents(1)
            return ranked.count(self._connection, table, index, index_range)
        room = self._limits.read_document_count_max - self.read_count
        number = scans.count(self._connection, table, index, index_range, limit=room + 1)
        self._spend_documents(number)
        return number

    def count_total(self, table: TableSchema, index: IndexSchema, index_range: IndexRange) -> int | None:
        """The same from an aggregate that has it as one cell, on which the run then depends; None: there is none."""
        covering = totals.covering(table, index, index_range)
        if covering is None:
            return None
        aggregate, key = covering
        count, *_ = self.total(table, aggregate, key)
        self.read_set.add_cell(CellEntry(table.name, aggregate.name, key, None))
        return count

    def total(self, table: TableSchema, aggregate: AggregateSchema, key: OrderKey) -> tuple[int, ...]:
        """Count and sums of one cell; the caller adds to the read set what it uses of them."""
        self.check_deadline()
        self._spend_documents(1)
        return cells.read(self._connection, table.name, aggregate, key)

    def rank(
        self,
        document_type: type[Table],
        index: IndexSchema,
        index_range: IndexRange,
        document_id: str,
        *,
        descending: bool,
    ) -> int | None:
        """How many documents of a ranked index are before this one; None if the range does not hold it.

        The run depends on its key and on those before it; where it is not in the range, on the document.
        """
        codec = self.catalog.of_id(document_id)
        if codec.table.document_type is not document_type:
            raise InvalidDocument(f"rank {index_range.table}: {document_id!r} is an id of {codec.table.name}.")
        try:
            document = self._read(codec, document_id, with_deleted=False)
        except LimitExceeded:
            self.read_set.add_document(codec.table.name, document_id)  # how large it is may be why it fails
            raise
        key = None if document is None else index.key_of(document)
        if key is None or not index_range.holds(key):
            self.read_set.add_document(codec.table.name, document_id)
            return None
        own = IndexRange(index_range.table, index_range.index, before(key[:-1]), after(key[:-1]))
        self.read_set.add_key_range(own)
        return self.count(document_type, index, index_range.ahead_of(key, descending=descending))

    def slice(
        self,
        document_type: type[Table],
        index: IndexSchema,
        index_range: IndexRange,
        *,
        descending: bool,
        skip: int,
        size: int,
    ) -> list[Any]:
        """At most `size` documents of a ranked index, after the first `skip`.

        The run depends on them and on the keys before them.
        """
        self.check_deadline()
        self._spend_documents(1)
        table = self.catalog.of_type(document_type).table
        first = ranked.rank(self._connection, table, index, index_range.start)
        last = max(first, ranked.rank(self._connection, table, index, index_range.end))
        if descending:
            begin, end = max(first, last - skip - size), last - skip
        else:
            begin, end = first + skip, min(first + skip + size, last)
        if begin >= end:  # until there are more keys, it is empty
            self.read_set.add_key_range(index_range)
            return []
        cut, passed = ranked.seek(self._connection, table, index, begin)
        rest = IndexRange(index_range.table, index_range.index, cut, index_range.end)
        try:
            documents = self.scan(document_type, index, rest, descending=False, limit=passed + end - begin)[passed:]
        except LimitExceeded:
            self.read_set.add_range(index_range)  # how much is there is why it fails
            raise
        if descending:
            documents.reverse()
        first_key, last_key = index.key_of(documents[0]), index.key_of(documents[-1])
        here = index_range  # what comes before the first page belongs to it
        if skip:
            self.read_set.add_key_range(index_range.ahead_of(first_key, descending=descending))
            here = index_range.rest_from(first_key, descending=descending)
        # while the page is not full, what comes after it belongs to it
        self.read_set.add_range(here.cut_at(last_key, descending=descending) if len(documents) == size else here)
        return documents

    def search(
        self, document_type: type[Table], search: SearchRead, *, before_tick: int | None, limit: int
    ) -> list[Any]:
        """Documents that match, newest first, at most `limit`; the caller adds the search to the read set."""
        self.check_deadline()
        codec = self.catalog.of_type(document_type)
        index = codec.table.search_indexes_by_name[search.index]
        wanted = min(limit, self._limits.read_document_count_max - self.read_count + 1)
        rows = search_indexes.fetch(
            self._connection, codec, index, search.filters, search.terms, before_tick=before_tick, limit=wanted
        )
        self._spend(codec, rows)
        return [codec.decode(row) for row in rows]

    def _read(self, codec: RowCodec[Any], document_id: str, *, with_deleted: bool) -> Table | None:
        self.check_deadline()
        kept = self._kept
        stored = None if kept is None else kept.get(document_id)
        if stored is None:
            row = codec.get(self._connection, document_id)
            if row is None:
                self._spend_documents(1)  # a look-up is one too
                return None
            stored = Stored(row, codec.size_of_row(row))
            if kept is not None and not codec.table.is_hidden:
                kept.keep(stored)
        self._spend_read(1, stored.size_bytes)
        document: Table = stored.give(codec)
        if codec.table.deleted_field is None or with_deleted:
            return document
        return None if codec.table.is_deleted(document) else document

    def _spend(self, codec: RowCodec[Any], rows: list[Any]) -> None:
        self._spend_read(len(rows), sum(map(codec.size_of_row, rows)))

    def _spend_read(self, count: int, size_bytes: int) -> None:
        limits = self._limits
        self.read_count += count
        self.read_size_bytes += size_bytes
        if self.read_count > limits.read_document_count_max:
            self._spend_documents(0)
        if self.read_size_bytes > limits.read_size_bytes_max:
            raise LimitExceeded(
                "bytes read by one run",
                used=self.read_size_bytes,
                allowed=limits.read_size_bytes_max,
                remedy="Read fewer documents (an index, take, paginate), or raise limits.read_size_bytes_max.",
            )

    def _spend_documents(self, count: int) -> None:
        self.read_count += count
        if self.read_count > self._limits.read_document_count_max:
            raise LimitExceeded(
                "documents read by one run",
                used=self.read_count,
                allowed=self._limits.read_document_count_max,
                remedy="Read fewer documents (an index, take, paginate), or raise limits.read_document_count_max.",
            )
