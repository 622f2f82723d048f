"""What one mutation reads and writes on the writer connection, inside its savepoint.

SQLite itself shows a mutation its own writes. Plain calls: nothing here waits.

Invariants
  1. Ticks given to documents strictly grow over the life of the database (`TickSource`).
  2. A write and all that it sets off (`rules.py`) happen as one or not at all, whatever its caller makes of the error.
  3. Whoever writes a document, `_changed` is told.
Functions call it through `functions/reader.py`; who may call what is decided there.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import msgspec

from engine.clock import Clock
from engine.errors import DocumentNotFound, FunctionMisuse, InvalidDocument, LimitExceeded, StorageFull
from engine.ids import TICKS_PER_MS, creation_time_of, make_id
from engine.limits import Limits
from engine.schema import ForeignKey, Table, TableSchema
from engine.storage import scans
from engine.storage import search as search_indexes
from engine.storage.connections import WriterConnection
from engine.storage.rows import RowCodec, Stored
from engine.transaction import rules, totals
from engine.transaction.kept import Kept
from engine.transaction.reading import Catalog, ReadTransaction
from engine.transaction.write_set import Write, WriteSet

_ALONE = nullcontext()


class TickSource:
    """Strictly growing ticks of 2⁻¹² ms: creation times of documents and `ctx.now` of mutations."""

    def __init__(self, clock: Clock, last_tick: int) -> None:
        self._clock = clock
        self.last_tick = last_tick  # written with each commit, so that it grows over restarts too

    def next_tick(self) -> int:
        wall_tick = self._clock.wall_ns() * TICKS_PER_MS // 1_000_000
        self.last_tick = max(self.last_tick + 1, wall_tick)
        return self.last_tick


class Savepoint(msgspec.Struct, frozen=True):
    """What a nested mutation goes back to when it fails."""

    depth: int
    write_count: int  # changes
    has_hidden_writes: bool


class WriteTransaction(ReadTransaction):
    """What one mutation reads and writes; it sees its own writes."""

    has_hidden_writes = False  # to tables that no query can depend on: to be committed, and nobody is woken
    write_size_bytes = 0
    fired_count = 0  # changes that triggers were told of
    _depth = 0  # savepoints that are open inside the committer's
    is_tracked: ClassVar[bool] = False  # mutations run one after another: what one depends on, nobody else changes

    def __init__(
        self,
        writer: WriterConnection,
        catalog: Catalog,
        limits: Limits,
        ticks: TickSource,
        clock: Clock,
        kept: Kept | None = None,
    ) -> None:
        super().__init__(writer, catalog, limits, kept)
        self._writer = writer
        self._ticks, self._clock = ticks, clock
        self.tick = ticks.next_tick()  # of `ctx.now`
        self._writes: list[Write] = []  # in order; what is undone is taken off again

    def impose(self, limits: Limits, check_deadline: Callable[[], None]) -> None:
        self._limits, self.check_deadline = limits, check_deadline
        self.read_count = self.read_size_bytes = self.write_count = self.write_size_bytes = 0

    def insert(self, document: Table) -> str:
        """Store a new document and give its id; whatever id and creation time it carries are replaced."""
        codec = self.catalog.of_type(type(document))
        self.check_deadline()
        tick = self._ticks.next_tick()
        document_id = make_id(codec.table.id_tag, tick, self._clock.entropy(9))
        table = codec.table
        new = table.with_id(document, document_id, creation_time_of(tick))
        if table.updated_field is not None:
            new = msgspec.structs.replace(new, **{table.updated_field: self.now})
        if table.deleted_field is not None:
            rules.check_deletion_stays(table, "insert", None, new)
        table.check(new)
        stored = self._encode(codec, new)
        rules.check_parents(self, table, None, new)
        with self._as_one(table):
            codec.insert(self._writer, stored.row)
            self._changed(codec, "insert", None, new, stored)
        return document_id

    def patch(self, document_id: str, changes: dict[str, Any], *, with_deleted: bool = False) -> None:
        """Change some fields of a document that is there."""
        codec = self.catalog.of_id(document_id)
        old = self.existing(codec, document_id, "patch", with_deleted=with_deleted)
        self.write_over(codec, "patch", old, self.changed(codec, old, changes))

    def changed(self, codec: RowCodec[Any], old: Table, changes: dict[str, Any]) -> Table:
        """The document with other values in some fields, which are the table's; not written yet."""
        fields = codec.table.fields_by_name
        for name in changes:
            if name not in fields:
                raise InvalidDocument(
                    f"patch {codec.table.name}: there is no field {name!r} to change; "
                    f"the fields are {', '.join(sorted(fields))}.",
                    table=codec.table.name,
                    field=name,
                    value=changes[name],
                )
        return msgspec.structs.replace(old, **changes)

    def replace(self, document_id: str, document: Table, *, with_deleted: bool = False) -> None:
        """Put another document in the place of one that is there; id and creation time stay."""
        codec = self.catalog.of_id(document_id)
        old = self.existing(codec, document_id, "replace", with_deleted=with_deleted)
        self.write_over(codec, "replace", old, codec.table.with_id(document, old.id, old.creation_time))

    def delete(self, document_id: str) -> None:
        """Remove a document that is there; where deleted documents stay, mark it."""
        codec = self.catalog.of_id(document_id)
        old = self.existing(codec, document_id, "delete", with_deleted=False)
        self._delete(codec, old, is_for_good=False)

    def purge(self, document_id: str) -> None:
        """Remove a document, deleted or not, for good from a table where deleted ones stay."""
        codec = self.catalog.of_id(document_id)
        old = self.existing(codec, document_id, "purge", with_deleted=True)
        _check_keeps_deleted(codec.table, "purge", "delete removes it for good")
        self._delete(codec, old, is_for_good=True)

    def restore(self, document_id: str) -> None:
        """Bring a deleted document back; nothing happens if it is not deleted."""
        codec = self.catalog.of_id(document_id)
        deleted = self.existing(codec, document_id, "restore", with_deleted=True)
        table = codec.table
        _check_keeps_deleted(table, "restore", "what was deleted is gone")
        if not table.is_deleted(deleted):
            return
        changes: dict[str, float | None] = {str(table.deleted_field): None}
        if table.updated_field is not None:
            changes[table.updated_field] = self.now
        new = msgspec.structs.replace(deleted, **changes)
        stored = self._encode(codec, new)
        rules.check_parents(self, table, None, new)
        with self._as_one(table):
            codec.update(self._writer, stored.row, codec.encode(deleted))
            self._changed(codec, "insert", deleted, new, stored)

    def _delete(self, codec: RowCodec[Any], old: Table, *, is_for_good: bool) -> None:
        if codec.table.child_keys:
            with self.nested():
                rules.Deletion(self, is_for_good=is_for_good).run(old.id)
        else:
            with self._as_one(codec.table):
                self.delete_alone(codec, old, is_for_good=is_for_good)

    def _changed(
        self,
        codec: RowCodec[Any],
        operation: rules.Operation,
        old: Table | None,
        new: Table | None,
        stored: Stored | None,
    ) -> None:
        """A document was written, by whomever: all that follows from it begins here. `stored` is what `new` became."""
        table, document = codec.table, new if new is not None else old
        assert document is not None
        if not table.is_hidden:
            self._writes.append(Write(table, document.id, old, new, stored))  # first: what is listed can be undone
            if self._kept is not None:
                self._kept.wrote(table.name, document.id, old, new, stored)
        is_followed = table.name in self.catalog.followed
        if is_followed:
            totals.update(self._writer, table, old, new)  # before what may write again
            for index in table.search_indexes_by_name.values():
                search_indexes.update(self._writer, table, index, old, new)
            if new is None and (follow := self.catalog.on_delete.get(table.document_type)) is not None:
                follow(self, old)
        if table.is_hidden:
            self.has_hidden_writes = True
            return
        if not is_followed or table.name not in self.catalog.triggered:
            return
        change = rules.change_of(table, operation, old, new)
        if change is not None:
            assert self.catalog.fire is not None
            self.fired_count += 1
            self.catalog.fire(self, table, change)

    # -- for `rules.py`

    def is_there(self, document_id: str) -> bool:
        """Whether the document is there, and not deleted."""
        self.check_deadline()
        return self.catalog.of_id(document_id).is_live(self._writer, document_id)

    def find_children(self, key: ForeignKey, document_id: str, *, limit: int, with_deleted: bool) -> list[str]:
        """The ids of documents whose foreign key names this one, at most `limit`."""
        self.check_deadline()
        table = self.catalog.of_table(key.table).table
        index = key.index_with_deleted if with_deleted else key.index
        return scans.ids_under(self._writer, table, index, (document_id,), limit=limit)

    def find_row(self, document_id: str, *, with_deleted: bool) -> tuple[RowCodec[Any], Table] | None:
        """The document as it is now."""
        codec = self.catalog.of_id(document_id)
        document = self._read(codec, document_id, with_deleted=with_deleted)
        return None if document is None else (codec, document)

    def delete_alone(self, codec: RowCodec[Any], old: Table, *, is_for_good: bool) -> None:
        """Delete a document, whatever names it."""
        deleted_field = codec.table.deleted_field
        if is_for_good or deleted_field is None:
            self._spend_write(0)
            codec.delete(self._writer, old.id)
            self._changed(codec, "delete", old, None, None)
        else:
            new = msgspec.structs.replace(old, **{deleted_field: self.now})
            stored = self._encode(codec, new)
            codec.update(self._writer, stored.row, codec.encode(old))
            self._changed(codec, "delete", old, new, stored)

    @property
    def write_room(self) -> int:
        """How many more documents may be written."""
        return self._limits.write_document_count_max - self.write_count

    # -- what was written

    @property
    def write_set(self) -> WriteSet:
        """What this mutation has changed so far."""
        write_set = WriteSet()
        for write in self._writes:
            write_set.add(write)
        return write_set

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
        self._check_open()
        self._depth += 1
        self._writer.savepoint(self._depth)
        return Savepoint(self._depth, len(self._writes), self.has_hidden_writes)

    def end_nested(self, savepoint: "Savepoint") -> None:
        """Keep what was written since `begin_nested`; StorageFull when storage has undone it meanwhile."""
        self._check_open()
        self._writer.release(savepoint.depth)
        self._depth = savepoint.depth - 1

    def undo_nested(self, savepoint: "Savepoint") -> None:
        """Undo what was written since `begin_nested`, also in savepoints inside it that a stopped run left open.

        When storage has undone everything, there is nothing left to.
        """
        self._forget(savepoint.write_count)
        self.has_hidden_writes = savepoint.has_hidden_writes
        if self._writer.in_transaction:
            self._writer.rollback_to(savepoint.depth)
            self._writer.release(savepoint.depth)
        self._depth = savepoint.depth - 1

    def undone(self) -> None:
        """All that was written is undone: the committer has rolled it back."""
        self._forget(0)

    def _forget(self, write_count: int) -> None:
        """Only so many writes count from now on."""
        if self._kept is not None:  # first: whoever is stopped in here begins again
            self._kept.forget(self._writes[write_count:])
        del self._writes[write_count:]

    @contextmanager
    def nested(self) -> Iterator[None]:
        """A savepoint around some writes: all of them are kept, or none if one raises."""
        savepoint = self.begin_nested()
        try:
            yield
        except BaseException:
            self.undo_nested(savepoint)
            raise
        self.end_nested(savepoint)

    def _as_one(self, table: TableSchema) -> AbstractContextManager[None]:
        """Around one write of the table (invariant 2); costs nothing where it sets off nothing."""
        return self.nested() if table.name in self.catalog.followed else _ALONE

    def existing(self, codec: RowCodec[Any], document_id: str, operation: str, *, with_deleted: bool) -> Table:
        """A document that is to be written over. Raises DocumentNotFound."""
        old = self._read(codec, document_id, with_deleted=with_deleted)
        if old is None:
            raise DocumentNotFound(codec.table.name, document_id, operation)
        return old

    def write_over(self, codec: RowCodec[Any], operation: rules.Operation, old: Table, new: Table) -> None:
        """Put `new` in the place of `old`, if it differs."""
        table = codec.table
        if table.deleted_field is not None:
            new = rules.check_deletion_stays(table, operation, old, new)
        if table.updated_field is not None:
            new = msgspec.structs.replace(new, **{table.updated_field: getattr(old, table.updated_field)})
        table.check_over(new, old)
        stored, old_row = self._encode(codec, new), codec.encode(old)
        if stored.row == old_row:
            return  # invariant 2 of write_set: nothing changed, so nobody is woken
        if table.updated_field is not None:
            new = msgspec.structs.replace(new, **{table.updated_field: self.now})
            stored = Stored(codec.encode(new), stored.size_bytes)
        if table.foreign_keys and not table.is_deleted(new):  # a deleted one is looked at when it is restored
            rules.check_parents(self, table, old, new)
        with self._as_one(table):
            codec.update(self._writer, stored.row, old_row)
            self._changed(codec, operation, old, new, stored)

    def _encode(self, codec: RowCodec[Any], document: Table) -> Stored:
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
        return Stored(row, size)

    def _spend_write(self, size_bytes: int) -> None:
        if not self._writer.in_transaction:
            self._check_open()
        self.write_count += 1
        self.write_size_bytes += size_bytes
        limits = self._limits
        if self.write_count > limits.write_document_count_max or self.write_size_bytes > limits.write_size_bytes_max:
            self.expect_writes(0)

    def expect_writes(self, count: int) -> None:
        """LimitExceeded when this many more documents would be too many."""
        limits = self._limits
        if self.write_count + count > limits.write_document_count_max:
            allowed = limits.write_document_count_max
            raise _too_much_written("documents", self.write_count + count, allowed, "write_document_count_max")
        if self.write_size_bytes > limits.write_size_bytes_max:
            allowed = limits.write_size_bytes_max
            raise _too_much_written("bytes", self.write_size_bytes, allowed, "write_size_bytes_max")

    def _check_open(self) -> None:
        if not self._writer.in_transaction:  # a write now would be on its own, and durable at once
            raise StorageFull("storage has undone this mutation; nothing more can be written in it. Try again.")


def _too_much_written(what: str, used: int, allowed: int, name: str) -> LimitExceeded:
    return LimitExceeded(
        f"{what} written by one mutation",
        used=used,
        allowed=allowed,
        remedy=f"Write in several mutations (ctx.scheduler.run_after(0, …)), or raise limits.{name}.",
    )


def _check_keeps_deleted(table: TableSchema, operation: str, remedy: str) -> None:
    if table.deleted_field is None:
        raise FunctionMisuse(f"{operation} {table.name}: the table has no DeletedAt field; {remedy}.")
