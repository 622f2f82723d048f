"""One run's reads and writes on one SQLite connection.

A query reads from a pinned snapshot and keeps a read set; a mutation reads and writes on the writer connection inside
its savepoint, where SQLite itself shows a run its own writes. Plain calls: nothing here waits.

Invariants
  1. Every row that reaches the run is counted against the limits before it is decoded.
  2. `check_deadline` is called once per operation: a run that loops over `ctx.db` cannot outlive its time.
  3. Ticks given to documents strictly grow over the life of the database (`TickSource`).
Functions call it through `functions/reader.py`; who may call what is decided there.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import msgspec

from engine.clock import Clock
from engine.errors import DocumentNotFound, InvalidDocument, LimitExceeded, StorageFull
from engine.ids import TAG_LENGTH, TICKS_PER_MS, creation_time_of, is_id, make_id
from engine.limits import Limits
from engine.ranges import IndexRange
from engine.schema import IndexSchema, Table
from engine.storage import scans
from engine.storage.connections import Connection, WriterConnection
from engine.storage.rows import RowCodec
from engine.transaction.read_set import ReadSet
from engine.transaction.write_set import Write, WriteSet


class TickSource:
    """Strictly growing ticks of 2⁻¹² ms: creation times of documents and `ctx.now` of mutations."""

    def __init__(self, clock: Clock, last_tick: int) -> None:
        self._clock = clock
        self.last_tick = last_tick  # written with each commit, so that it grows over restarts too

    def next_tick(self) -> int:
        wall_tick = self._clock.wall_ns() * TICKS_PER_MS // 1_000_000
        self.last_tick = max(self.last_tick + 1, wall_tick)
        return self.last_tick


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

    def __init__(self, codecs: Iterable[RowCodec[Any]]) -> None:
        self._by_type: dict[type[Table], RowCodec[Any]] = {}
        self._by_tag: dict[str, RowCodec[Any]] = {}
        for codec in codecs:
            self._by_type[codec.table.document_type] = codec
            self._by_tag[codec.table.id_tag] = codec

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
        if codec is None or not is_id(document_id, codec.table.id_tag):
            raise InvalidDocument(f"{document_id!r} is not an id of any table.")
        return codec


class Savepoint(msgspec.Struct, frozen=True):
    """What a nested mutation goes back to when it fails."""

    depth: int
    write_set: WriteSet
    has_hidden_writes: bool


class ReadTransaction:
    """What one run reads; for a query also what it depends on."""

    is_tracked: ClassVar[bool] = True  # whether the read set is to be exact

    def __init__(
        self,
        connection: Connection,
        catalog: Catalog,
        limits: Limits,
    ) -> None:
        self._connection = connection
        self.catalog = catalog
        self._limits = limits
        self.check_deadline: Callable[[], None] = no_deadline  # another one while a function runs
        self.read_set = ReadSet(limits.read_range_count_max)
        self.read_count = 0  # documents, also those that a filter then drops
        self.read_size_bytes = 0
        self.write_count = 0  # stays so, unless this is a WriteTransaction

    def impose(self, limits: Limits, check_deadline: Callable[[], None]) -> None:
        """A function begins: what it uses is counted from here on, and bounded."""
        self._limits, self.check_deadline = limits, check_deadline
        self.read_count = self.read_size_bytes = 0

    def lift_limits(self) -> None:
        """What the engine itself does here from now on is not bounded: limits are for functions."""
        self._limits, self.check_deadline = _UNBOUNDED, no_deadline

    def get(self, document_id: str) -> Table | None:
        """The document, or None; either way the run depends on that one row."""
        codec = self.catalog.of_id(document_id)
        self.read_set.add_document(codec.table.name, document_id)
        return self._read(codec, document_id)

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
        self.check_deadline()
        if index_range.start >= index_range.end:
            return []
        codec = self.catalog.of_type(document_type)
        room = self._limits.read_document_count_max - self.read_count
        wanted = room + 1 if limit is None else min(limit, room + 1)
        rows = scans.fetch(self._connection, codec, index, index_range, descending=descending, limit=wanted)
        self._spend(codec, rows)
        decode = codec.decode
        return [decode(row) for row in rows]

    def count(self, document_type: type[Table], index: IndexSchema, index_range: IndexRange) -> int:
        """How many documents the range holds; the run depends on their keys only."""
        self.check_deadline()
        self.read_set.add_key_range(index_range)
        if index_range.start >= index_range.end:
            return 0
        codec = self.catalog.of_type(document_type)
        room = self._limits.read_document_count_max - self.read_count
        number = scans.count(self._connection, codec.table, index, index_range, limit=room + 1)
        self._spend_documents(number)
        return number

    def _read(self, codec: RowCodec[Any], document_id: str) -> Table | None:
        self.check_deadline()
        row = codec.get(self._connection, document_id)
        if row is None:
            self._spend_documents(1)  # a look-up is one too
            return None
        self._spend(codec, [row])
        document: Table = codec.decode(row)
        return document

    def _spend(self, codec: RowCodec[Any], rows: list[Any]) -> None:
        self._spend_documents(len(rows))
        self.read_size_bytes += sum(map(codec.size_of_row, rows))
        if self.read_size_bytes > self._limits.read_size_bytes_max:
            raise LimitExceeded(
                "bytes read by one run",
                used=self.read_size_bytes,
                allowed=self._limits.read_size_bytes_max,
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


class WriteTransaction(ReadTransaction):
    """What one mutation reads and writes; it sees its own writes."""

    is_tracked: ClassVar[bool] = False  # mutations run one after another: what one depends on, nobody else changes

    def __init__(
        self,
        writer: WriterConnection,
        catalog: Catalog,
        limits: Limits,
        ticks: TickSource,
        clock: Clock,
    ) -> None:
        super().__init__(writer, catalog, limits)
        self._writer = writer
        self._ticks, self._clock = ticks, clock
        self.tick = ticks.next_tick()  # of `ctx.now`
        self.write_set = WriteSet()
        self.has_hidden_writes = False  # to tables that no query can depend on: to be committed, and nobody is woken
        self.write_size_bytes = 0
        self._depth = 0  # savepoints that are open inside the committer's

    def impose(self, limits: Limits, check_deadline: Callable[[], None]) -> None:
        super().impose(limits, check_deadline)
        self.write_count = self.write_size_bytes = 0

    def insert(self, document: Table) -> str:
        """Store a new document and give its id; whatever id and creation time it carries are replaced."""
        codec = self.catalog.of_type(type(document))
        self.check_deadline()
        tick = self._ticks.next_tick()
        document_id = make_id(codec.table.id_tag, tick, self._clock.entropy(9))
        new = codec.table.with_id(document, document_id, creation_time_of(tick))
        codec.table.check(new)
        row = self._encode(codec, new)
        codec.insert(self._writer, row)
        self._changed(codec, document_id, None, new)
        return document_id

    def patch(self, document_id: str, changes: dict[str, Any]) -> None:
        """Change some fields of a document that is there."""
        codec, old = self._existing(document_id, "patch")
        allowed = {field.name for field in codec.table.fields}
        for name in changes:
            if name not in allowed:
                raise InvalidDocument(
                    f"patch {codec.table.name}: there is no field {name!r} to change; "
                    f"the fields are {', '.join(sorted(allowed))}."
                )
        self._write_over(codec, old, msgspec.structs.replace(old, **changes))

    def replace(self, document_id: str, document: Table) -> None:
        """Put another document in the place of one that is there; id and creation time stay."""
        codec, old = self._existing(document_id, "replace")
        self._write_over(codec, old, codec.table.with_id(document, old.id, old.creation_time))

    def delete(self, document_id: str) -> None:
        """Remove a document that is there."""
        codec, old = self._existing(document_id, "delete")
        self._spend_write(0)
        codec.delete(self._writer, document_id)
        self._changed(codec, document_id, old, None)

    def _changed(self, codec: RowCodec[Any], document_id: str, old: Table | None, new: Table | None) -> None:
        """A document was written, by whomever: all that follows from it begins here."""
        if codec.table.is_hidden:
            self.has_hidden_writes = True
            return
        self.write_set.add(Write(codec.table, document_id, old, new))

    @property
    def now(self) -> float:
        """`ctx.now` of the mutation: ms since the epoch."""
        return creation_time_of(self.tick)

    @property
    def is_open(self) -> bool:
        """False once SQLite has undone the whole transaction by itself, after a storage error."""
        return self._writer.in_transaction

    def begin_nested(self) -> "Savepoint":
        """Open a savepoint for a nested mutation; the result is for `end_nested` or `undo_nested`."""
        self._depth += 1
        self._writer.savepoint(self._depth)
        return Savepoint(self._depth, self.write_set.copy(), self.has_hidden_writes)

    def end_nested(self, savepoint: "Savepoint") -> None:
        """Keep what was written since `begin_nested`."""
        self._writer.release(savepoint.depth)
        self._depth = savepoint.depth - 1

    def undo_nested(self, savepoint: "Savepoint") -> None:
        """Undo what was written since `begin_nested`, also in savepoints inside it that a stopped run left open.

        When storage has undone everything, there is nothing left to.
        """
        self.write_set, self.has_hidden_writes = savepoint.write_set, savepoint.has_hidden_writes
        if self._writer.in_transaction:
            self._writer.rollback_to(savepoint.depth)
            self._writer.release(savepoint.depth)
        self._depth = savepoint.depth - 1

    def _existing(self, document_id: str, operation: str) -> tuple[RowCodec[Any], Table]:
        codec = self.catalog.of_id(document_id)
        old = self._read(codec, document_id)
        if old is None:
            raise DocumentNotFound(codec.table.name, document_id, operation)
        return codec, old

    def _write_over(self, codec: RowCodec[Any], old: Table, new: Table) -> None:
        codec.table.check(new)
        row, old_row = self._encode(codec, new), codec.encode(old)
        if row == old_row:
            return  # invariant 2 of write_set: nothing changed, so nobody is woken
        codec.update(self._writer, row, old_row)
        self._changed(codec, old.id, old, new)

    def _encode(self, codec: RowCodec[Any], document: Table) -> tuple[Any, ...]:
        row = codec.encode(document)
        size = codec.size_of_row(row)
        if size > self._limits.document_size_bytes_max:
            raise LimitExceeded(
                f"size in bytes of a document of {codec.table.name}",
                used=size,
                allowed=self._limits.document_size_bytes_max,
                remedy="Split it into several documents, or raise limits.document_size_bytes_max.",
            )
        self._spend_write(size)
        return row

    def _spend_write(self, size_bytes: int) -> None:
        if not self._writer.in_transaction:  # a write now would be on its own, and durable at once
            raise StorageFull("storage has undone this mutation; nothing more can be written in it. Try again.")
        self.write_count += 1
        self.write_size_bytes += size_bytes
        for what, used, allowed, name in (
            ("documents written by one mutation", self.write_count, self._limits.write_document_count_max,
             "write_document_count_max"),
            ("bytes written by one mutation", self.write_size_bytes, self._limits.write_size_bytes_max,
             "write_size_bytes_max"),
        ):  # fmt: skip
            if used > allowed:
                raise LimitExceeded(
                    what,
                    used=used,
                    allowed=allowed,
                    remedy=f"Write in several mutations (ctx.scheduler.run_after(0, …)), or raise limits.{name}.",
                )
