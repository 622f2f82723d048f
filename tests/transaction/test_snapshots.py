"""What queries read: the newest commit, snapshots that are lent, and those that are kept for a while."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from engine.errors import LimitExceeded, Overloaded
from engine.limits import Limits
from engine.storage.connections import TEMPORARY, Connection, Database
from engine.testing import ManualClock
from engine.transaction.snapshots import Snapshots


class Store:
    """A database with one number in it that each commit sets, and its snapshots."""

    def __init__(self, database: Database, clock: ManualClock, limits: Limits) -> None:
        self.database, self.clock = database, clock
        database.writer.execute("CREATE TABLE numbers (number INTEGER, padding BLOB)")
        database.writer.execute("INSERT INTO numbers VALUES (0, NULL)")
        self.snapshots = Snapshots(database, limits, clock)

    def commit(self, number: int, *, padding_size_bytes: int = 0) -> None:
        """Commit a number, with its value as timestamp, and show it."""
        writer = self.database.writer
        writer.begin()
        writer.execute("UPDATE numbers SET number = ?, padding = zeroblob(?)", (number, padding_size_bytes))
        writer.write_meta(number, number, 0)
        writer.commit()

    def show(self, number: int, *, padding_size_bytes: int = 0) -> None:
        self.commit(number, padding_size_bytes=padding_size_bytes)
        assert self.snapshots.advance() == number

    def number_at(self, ts: int) -> int | None:
        """What a query at this timestamp reads; None if it is not there any more."""
        reader = self.snapshots.lend(ts)
        if reader is None:
            return None
        try:
            return number_in(reader)
        finally:
            self.snapshots.give_back(reader)

    @property
    def reader_count(self) -> int:
        return len(self.database._readers)


def number_in(reader: Connection) -> int:
    ((number,),) = reader.fetch_all("SELECT number FROM numbers")
    return int(number)


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def store(limits: Limits) -> Iterator[Store]:
    with closing(Database.open(TEMPORARY, limits)) as database:
        yield Store(database, ManualClock(), limits)


# -- the newest commit


def test_a_commit_is_seen_from_the_advance_on_and_not_before(store: Store) -> None:
    store.commit(1)
    assert (store.snapshots.ts, number_in(store.snapshots.reader)) == (0, 0)
    assert store.snapshots.advance() == 1
    assert (store.snapshots.ts, number_in(store.snapshots.reader)) == (1, 1)


def test_one_connection_does_while_nothing_is_lent(store: Store) -> None:
    for number in range(1, 10):
        store.show(number)
    assert store.reader_count == 1


# -- lent ones


def test_a_lent_snapshot_stays_as_it_is_while_others_go_on(store: Store) -> None:
    store.show(1)
    lent = store.snapshots.lend(1)
    assert lent is not None
    for number in (2, 3):
        store.show(number)
        assert number_in(lent) == 1
        assert number_in(store.snapshots.reader) == number
    store.snapshots.give_back(lent)
    assert not lent.in_transaction


def test_a_snapshot_lent_to_two_stays_until_both_have_given_it_back(store: Store) -> None:
    store.show(1)
    first, second = store.snapshots.lend(1), store.snapshots.lend(1)
    assert first is not None
    assert second is first
    store.show(2)
    store.snapshots.give_back(first)
    assert number_in(first) == 1
    assert first.in_transaction
    store.snapshots.give_back(first)
    assert not first.in_transaction


def test_one_that_is_given_back_while_it_is_the_newest_stays_pinned(store: Store) -> None:
    lent = store.snapshots.lend(0)
    assert lent is store.snapshots.reader
    store.snapshots.give_back(lent)
    assert lent.in_transaction
    store.show(1)
    assert store.snapshots.reader is lent


def test_connections_that_were_given_back_serve_again(store: Store) -> None:
    for number in range(10):
        lent = store.snapshots.lend(number)
        assert lent is not None
        store.show(number + 1)
        store.snapshots.give_back(lent)
    assert store.reader_count == 2


def test_a_snapshot_that_is_not_kept_cannot_be_lent(store: Store) -> None:
    store.show(1)
    store.show(2)
    assert store.snapshots.lend(1) is None
    assert store.snapshots.lend(3) is None


# -- retained ones


def test_a_retained_snapshot_is_there_for_30_seconds(store: Store) -> None:
    store.show(1)
    assert store.snapshots.retain() == 1
    store.clock.advance(30)
    store.show(2)
    assert store.number_at(1) == 1
    store.clock.advance(0.001)
    store.show(3)
    assert store.number_at(1) is None
    assert store.number_at(3) == 3


def test_asking_for_it_again_keeps_it_as_long_again(store: Store) -> None:
    store.show(1)
    store.snapshots.retain()
    store.clock.advance(29)
    assert store.snapshots.retain() == 1
    store.clock.advance(29)
    store.show(2)
    assert store.number_at(1) == 1


def test_a_run_that_has_a_retained_snapshot_ends_on_it(store: Store) -> None:
    store.show(1)
    store.snapshots.retain()
    store.show(2)
    lent = store.snapshots.lend(1)
    assert lent is not None
    store.clock.advance(31)
    store.show(3)
    assert store.number_at(1) is None
    assert number_in(lent) == 1
    store.snapshots.give_back(lent)
    assert not lent.in_transaction


def test_of_many_askers_at_a_time_the_late_ones_share_the_newest_that_is_kept(store: Store) -> None:
    given = []
    for number in range(1, 11):
        store.show(number)
        given.append(store.snapshots.retain())
    assert given == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6]
    assert store.reader_count <= 8


def test_when_there_are_as_many_as_fit_the_oldest_makes_room_for_one_that_is_due(store: Store) -> None:
    for number in range(1, 7):
        store.show(number)
        store.snapshots.retain()
    store.clock.advance(5)
    store.show(7)
    assert store.snapshots.retain() == 7
    assert [number for number in range(1, 8) if store.number_at(number) is not None] == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("limits", [Limits(wal_size_bytes_max=200_000)])
def test_a_wal_at_its_bound_lets_go_of_what_is_retained_and_refuses_more(store: Store) -> None:
    store.show(1)
    store.snapshots.retain()
    store.show(2, padding_size_bytes=100_000)
    assert store.number_at(1) == 1
    store.show(3, padding_size_bytes=200_000)
    assert store.number_at(1) is None
    with pytest.raises(Overloaded, match=r"the write-ahead log has \d+,\d+ bytes, 200,000 allowed"):
        store.snapshots.retain()
    assert number_in(store.snapshots.reader) == 3

    store.database.writer.checkpoint()  # as the committer does: the readers move before and after
    store.snapshots.advance()
    assert store.snapshots.retain() == 3


# -- old ones


def test_a_run_that_reads_an_old_snapshot_for_too_long_is_told_so_by_its_next_read(store: Store) -> None:
    store.show(1)
    lent = store.snapshots.lend(1)
    assert lent is not None
    store.clock.advance(100)
    store.show(2)  # from here on it is old
    store.clock.advance(5)
    store.show(3)
    assert number_in(lent) == 1
    store.clock.advance(0.1)
    store.show(4)
    with pytest.raises(LimitExceeded, match=r"not the newest: 5\.1 used, 5 allowed.* limits.snapshot_old_seconds_max"):
        number_in(lent)
    assert not lent.in_transaction
    before = store.reader_count
    store.snapshots.give_back(lent)
    assert store.reader_count == before - 1
    store.show(5)


def test_one_that_nobody_has_written_past_may_be_read_for_ever(store: Store) -> None:
    store.show(1)
    lent = store.snapshots.lend(1)
    assert lent is not None
    store.clock.advance(1_000)
    assert number_in(lent) == 1
    store.snapshots.give_back(lent)
    store.show(2)
    assert number_in(store.snapshots.reader) == 2


def test_a_run_on_a_retained_snapshot_has_its_time_once_that_is_let_go(store: Store) -> None:
    store.show(1)
    store.snapshots.retain()
    store.show(2)
    lent = store.snapshots.lend(1)
    assert lent is not None
    store.clock.advance(31)
    store.show(3)
    store.clock.advance(5)
    store.show(4)
    assert number_in(lent) == 1
    store.clock.advance(1)
    store.show(5)
    with pytest.raises(LimitExceeded):
        number_in(lent)
    store.snapshots.give_back(lent)
