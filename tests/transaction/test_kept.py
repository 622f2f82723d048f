"""What is kept gives what SQLite would give, whatever was written, undone and evicted in between."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any, cast

import pytest

from engine.ids import Id
from engine.limits import Limits
from engine.ranges import OrderKey, key_prefix
from engine.schema import DeletedAt, Table, compile_schema, foreign_key, index, unique
from engine.storage.connections import TEMPORARY, Database
from engine.storage.ddl import apply_schema
from engine.storage.rows import RowCodec
from engine.testing import ManualClock
from engine.transaction.kept import SCAN_COUNT_MAX, Kept
from engine.transaction.reading import Catalog, ReadTransaction
from engine.transaction.transaction import TickSource, WriteTransaction
from engine.transaction.write_set import WriteSet

LIMITS = Limits()


class Room(Table, name="rooms"):
    name: str
    by_name = unique("name")


class Note(Table, name="notes"):
    room_id: Id[Room]
    place: float | None = None
    is_open: bool = True
    text: str = ""
    deleted_at: DeletedAt = None
    by_room = index("room_id", "place")
    by_open = index("is_open", "room_id")
    room = foreign_key("room_id", on_delete="cascade")


class Tagged(Table, name="tagged"):
    key: str
    tags: list[str] = []
    more: dict[str, list[int]] = {}
    by_key = index("key")


class Labelled(Table, name="labelled"):
    key: str
    labels: list[str] = []
    by_key = index("key")


class Store:
    """A database whose writer keeps what it reads and writes, and a snapshot that does."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.clock = ManualClock()
        self.schema = compile_schema([Room, Note, Tagged, Labelled], limits)
        self.catalog = Catalog([RowCodec(table) for table in self.schema.tables_by_name.values()])
        self.database = Database.open(TEMPORARY, limits, entropy=self.clock.entropy)
        apply_schema(self.database.writer, self.schema)
        self.ticks = TickSource(self.clock, 0)
        self.limits = limits
        self.kept, self.published = Kept(limits), Kept(limits)
        self.statements: list[str] = []  # that the writer was told
        self.database.writer._connection.set_trace_callback(self.statements.append)
        self.reader = self.database.open_reader()
        self.reader.pin()

    def close(self) -> None:
        self.reader.unpin()
        self.database.close()

    def mutation(self) -> WriteTransaction:
        writer = self.database.writer
        return WriteTransaction(writer, self.catalog, self.limits, self.ticks, self.clock, self.kept)

    def new_room(self, name: str = "a") -> Id[Room]:
        return cast("Id[Room]", self.mutation().insert(Room(name=name)))

    def commit(self, write_set: WriteSet) -> None:
        self.database.writer.commit()
        self.reader.unpin()
        self.reader.pin()
        self.published.follow(write_set)
        self.database.writer.begin()

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Nothing in here asks SQLite."""
        self.statements.clear()
        yield
        assert self.statements == []

    def scan(
        self,
        transaction: ReadTransaction,
        document_type: type[Table],
        index: str,
        *values: Any,
        limit: int | None = None,
        descending: bool = False,
        with_deleted: bool = False,
    ) -> list[Any]:
        codec = self.catalog.of_type(document_type)
        indexes = codec.table.indexes_with_deleted if with_deleted else codec.table.indexes_by_name
        prefix: OrderKey = key_prefix(values)
        return transaction.under(codec, indexes[index], prefix, descending=descending, limit=limit)


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    store.database.writer.begin()
    yield store
    store.close()


def test_what_was_read_is_not_asked_for_again(store: Store) -> None:
    room_id = store.new_room()
    store.kept.clear()
    assert store.mutation().get(room_id) == store.scan(store.mutation(), Room, "by_name", "a")[0]
    assert store.scan(store.mutation(), Room, "by_name", "b", limit=2) == []
    with store.silence():
        document = store.mutation().get(room_id)
        assert store.scan(store.mutation(), Room, "by_name", "a") == [document]
        assert store.scan(store.mutation(), Room, "by_name", "a", limit=2) == [document]
        assert store.scan(store.mutation(), Room, "by_name", "b") == []


def test_what_is_kept_counts_against_the_limits_as_what_is_read_does(store: Store) -> None:
    room_id = store.new_room()
    counts = []
    for _ in range(2):
        transaction = store.mutation()
        transaction.get(room_id)
        store.scan(transaction, Room, "by_name", "a")
        store.scan(transaction, Room, "by_name", "b")
        counts.append((transaction.read_count, transaction.read_size_bytes))
        store.kept.clear()
    assert counts[0] == counts[1] != (0, 0)


def test_a_written_document_is_there_without_asking_as_sqlite_would_give_it(store: Store) -> None:
    mutation, room_id = store.mutation(), store.new_room()
    note_id = mutation.insert(Note(room_id=room_id, place=1))  # an int where a float belongs
    with store.silence():
        note = store.mutation().get(note_id)
    assert isinstance(note, Note)
    assert type(note.place) is float
    store.mutation().patch(note_id, {"place": -0.0})
    with store.silence():
        note = store.mutation().get(note_id)
    assert isinstance(note, Note)
    assert repr(note.place) == "0.0"


@pytest.mark.parametrize("document_type", [Tagged, Labelled])
def test_a_run_cannot_change_what_the_next_one_reads(store: Store, document_type: Any) -> None:
    document = document_type(key="k")
    document_id = store.mutation().insert(document)
    for read in (store.mutation().get, lambda _: store.scan(store.mutation(), document_type, "by_key", "k")[0]):
        found: Any = read(document_id)
        [*lists] = [value for value in (getattr(found, "tags", None), getattr(found, "labels", None)) if value == []]
        lists[0].append("mine")
        again: Any = read(document_id)
        assert "mine" not in str(again)


def test_a_scan_of_the_first_is_none_of_all(store: Store) -> None:
    mutation, room_id = store.mutation(), store.new_room()
    ids = [mutation.insert(Note(room_id=room_id, place=float(place))) for place in range(6)]
    store.kept.clear()

    def read(limit: int | None, *, descending: bool) -> list[str]:
        notes = store.scan(store.mutation(), Note, "by_room", room_id, limit=limit, descending=descending)
        return [note.id for note in notes]

    assert read(3, descending=True) == ids[:2:-1]
    assert read(3, descending=False) == ids[:3]
    with store.silence():
        assert read(2, descending=True) == ids[:3:-1]
        assert read(2, descending=False) == ids[:2]
    assert read(4, descending=True) == ids[:1:-1]
    store.mutation().delete(ids[5])
    with store.silence():  # one less than there were, and no more is asked for
        assert read(3, descending=True) == ids[4:1:-1]
    assert read(None, descending=False) == ids[:5]


def test_what_is_undone_was_never_there(store: Store) -> None:
    room_id = store.new_room()
    mutation = store.mutation()
    for undo in (mutation.undo_nested, lambda _: roll_back(store, mutation)):
        savepoint = mutation.begin_nested()
        mutation.patch(room_id, {"name": "b"})
        assert [room.name for room in store.scan(mutation, Room, "by_name", "b")] == ["b"]
        undo(savepoint)
        assert [room.name for room in store.scan(mutation, Room, "by_name", "a")] == ["a"]
        assert store.scan(mutation, Room, "by_name", "b") == []
        room: Any = mutation.get(room_id)
        assert room.name == "a"


def roll_back(store: Store, mutation: WriteTransaction) -> None:
    """As the committer does."""
    store.database.writer.rollback_to(1)
    store.database.writer.release(1)
    mutation.undone()


def test_large_documents_and_long_scans_are_not_kept(store: Store) -> None:
    mutation, room_id = store.mutation(), store.new_room()
    large_id = mutation.insert(Note(room_id=room_id, text="x" * LIMITS.kept_document_size_bytes_max))
    assert store.kept.get(large_id) is None
    for _ in range(SCAN_COUNT_MAX):
        mutation.insert(Note(room_id=room_id))
    assert len(store.scan(mutation, Note, "by_room", room_id)) == SCAN_COUNT_MAX + 1
    assert store.kept._scans == {}


def test_at_most_so_many_are_kept() -> None:
    store = Store(Limits(kept_document_count_max=4))
    store.database.writer.begin()
    mutation = store.mutation()
    ids = [mutation.insert(Room(name=str(number))) for number in range(10)]
    assert [document_id for document_id in ids if store.kept.get(document_id) is not None] == ids[-4:]
    for number in range(10):
        assert [room.name for room in store.scan(store.mutation(), Room, "by_name", str(number))] == [str(number)]
    (scans,) = store.kept._scans.values()
    assert len(scans.by_prefix) == 4
    store.close()


def test_a_scan_grows_to_its_bound_and_no_further(store: Store) -> None:
    room_id = store.new_room()
    for descending in (True, False):
        store.scan(store.mutation(), Note, "by_room", room_id, limit=2, descending=descending)
    ids = [store.mutation().insert(Note(room_id=room_id, place=float(n))) for n in range(2 * SCAN_COUNT_MAX)]
    for scans in store.kept._scans.values():
        assert all(len(scan.document_ids) <= SCAN_COUNT_MAX for scan in scans.by_prefix.values())
    with store.silence():
        newest = store.scan(store.mutation(), Note, "by_room", room_id, limit=10, descending=True)
        oldest = store.scan(store.mutation(), Note, "by_room", room_id, limit=10)
    assert [note.id for note in newest] == ids[:-11:-1]
    assert [note.id for note in oldest] == ids[:10]
    for descending in (True, False):
        assert len(store.scan(store.mutation(), Note, "by_room", room_id, descending=descending)) == len(ids)


# -- against SQLite itself


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_after_any_history_all_reads_are_those_of_sqlite(seed: int) -> None:
    store, random = Store(Limits(kept_document_count_max=(6, 40, 16_384)[seed % 3])), Random(seed)
    store.database.writer.begin()
    rooms = [store.new_room(str(number)) for number in range(3)]
    notes: list[str] = []
    group = WriteSet()

    def write(mutation: WriteTransaction) -> None:
        note = random.choice(notes) if notes else None
        fields: dict[str, Any] = {
            "place": random.choice([None, 0.0, -0.0, 1, 2.5, 3.0]),
            "is_open": random.random() < 0.5,
            "room_id": random.choice(rooms),
        }
        fields = dict(random.sample(list(fields.items()), random.randint(1, 3)))
        match random.randrange(6):
            case 0 | 1:
                given = {"room_id": random.choice(rooms), **fields}
                notes.append(mutation.insert(Note(**given)))
            case 2 | 3 if note:
                mutation.patch(note, fields, with_deleted=True)
            case 4 if note and mutation.get(note) is not None:
                mutation.delete(note)
            case 5 if note:
                random.choice([mutation.restore, mutation.restore, mutation.purge])(note)

    for _ in range(60):
        mutation = store.mutation()
        outer = mutation.begin_nested()
        for _ in range(random.randint(1, 3)):
            before = list(notes)
            inner = mutation.begin_nested() if random.random() < 0.4 else None
            write(mutation)
            compare(store, mutation, rooms, notes, random)
            if inner is not None and random.random() < 0.5:
                mutation.undo_nested(inner)
                notes[:] = before
            elif inner is not None:
                mutation.end_nested(inner)
            notes[:] = [note for note in notes if mutation.get(note, with_deleted=True) is not None]
        if random.random() < 0.2:
            before_all = [write.document_id for write in mutation.write_set if write.old is None]
            mutation.undo_nested(outer)
            notes[:] = [note for note in notes if note not in before_all]
            notes += [
                n.id
                for n in store.scan(uncached(store), Note, "by_creation_time", with_deleted=True)
                if n.id not in notes
            ]
        else:
            mutation.end_nested(outer)
            group.merge(mutation.write_set)
        compare(store, store.mutation(), rooms, notes, random)
        if random.random() < 0.3:
            store.commit(group)
            group = WriteSet()
        published = ReadTransaction(store.reader, store.catalog, store.limits, store.published)
        compare(store, published, rooms, notes, random)
    store.close()


def uncached(store: Store, transaction: ReadTransaction | None = None) -> ReadTransaction:
    connection = store.database.writer if transaction is None else transaction._connection
    return ReadTransaction(connection, store.catalog, store.limits)


def compare(
    store: Store, transaction: ReadTransaction, rooms: list[Id[Room]], notes: list[str], random: Random
) -> None:
    """The same reads with and without what is kept."""

    def scan(index: str, values: tuple[Any, ...], options: dict[str, Any], reading: ReadTransaction) -> list[Any]:
        return store.scan(reading, Note, index, *values, **options)

    plain = uncached(store, transaction)
    reads: list[Callable[[ReadTransaction], Any]] = []
    if notes:
        note, with_deleted = random.choice(notes), random.random() < 0.5
        reads.append(lambda reading: reading.get(note, with_deleted=with_deleted))
    for index_name, values in (
        ("by_room", (random.choice(rooms),)),
        ("by_room", (random.choice(rooms), random.choice([None, 0.0, 1, 2.5]))),
        ("by_open", (random.random() < 0.5,)),
        ("by_open", (random.random() < 0.5, random.choice(rooms))),
        ("by_creation_time", ()),
    ):
        options: dict[str, Any] = {
            "limit": random.choice([1, 2, 3, 5, None]),
            "descending": random.random() < 0.5,
            "with_deleted": random.random() < 0.5,
        }
        reads.append(partial(scan, index_name, values, options))
    transaction.read_count = transaction.read_size_bytes = 0
    for read in reads:
        assert repr(read(transaction)) == repr(read(plain))
        assert (transaction.read_count, transaction.read_size_bytes) == (plain.read_count, plain.read_size_bytes)
