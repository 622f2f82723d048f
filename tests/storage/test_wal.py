"""A WAL that a dead process has left: taken in, or refused when commits in it are lost."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from engine.errors import StorageFailed
from engine.limits import Limits
from engine.storage.connections import Database

COMMIT_COUNT = 20
HEADER_SIZE, FRAME_SIZE = 32, 24 + 4_096


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What is on the disk after COMMIT_COUNT commits of a process that died then."""
    path = tmp_path / "living" / "engine.db"
    with closing(Database.open(path, Limits())) as database:
        database.writer.execute("CREATE TABLE numbers (number INTEGER)")
        for number in range(1, COMMIT_COUNT + 1):
            database.writer.begin()
            database.writer.execute("INSERT INTO numbers VALUES (?)", (number,))
            database.writer.write_meta(number, number, 0)
            database.writer.commit()
        for suffix in ("", "-wal"):
            (tmp_path / "dead").mkdir(exist_ok=True)
            shutil.copyfile(f"{path}{suffix}", tmp_path / "dead" / f"engine.db{suffix}")
    return tmp_path / "dead" / "engine.db"


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def flip(path: Path, offset: int) -> None:
    content = bytearray(wal_of(path).read_bytes())
    content[offset] ^= 1
    wal_of(path).write_bytes(content)


def newest_ts(path: Path) -> int:
    with closing(Database.open(path, Limits())) as database:
        ts, _ = database.writer.read_meta()
        return ts


def test_it_is_taken_in_and_the_process_starts_with_an_empty_one(left: Path) -> None:
    with closing(Database.open(left, Limits())) as database:
        assert database.writer.read_meta() == (COMMIT_COUNT, COMMIT_COUNT)
        assert wal_of(left).stat().st_size == 0


def test_a_last_commit_that_a_crash_has_torn_was_never_acknowledged_and_is_dropped(left: Path) -> None:
    flip(left, wal_of(left).stat().st_size - 100)
    assert newest_ts(left) == COMMIT_COUNT - 1


@pytest.mark.parametrize("frames_from_end", [3, 5, 10])
@pytest.mark.parametrize("offset", [5, 9, 13, 20, 2_000])  # a size, a salt, the other, a checksum, the page
def test_a_damaged_commit_before_the_last_is_refused_and_nothing_is_touched(
    left: Path, frames_from_end: int, offset: int
) -> None:
    frame_count = (wal_of(left).stat().st_size - HEADER_SIZE) // FRAME_SIZE
    flip(left, HEADER_SIZE + (frame_count - frames_from_end) * FRAME_SIZE + offset)
    before = left.read_bytes(), wal_of(left).read_bytes()
    for _ in range(2):
        with pytest.raises(
            StorageFailed, match=r"-wal is damaged: commits behind frame \d+ are lost; restore a backup"
        ):
            newest_ts(left)
    assert (left.read_bytes(), wal_of(left).read_bytes()) == before


@pytest.mark.parametrize("offset", [0, 9, 17, 25])  # magic, size of a page, a salt, the checksum
def test_a_damaged_header_is_refused(left: Path, offset: int) -> None:
    flip(left, offset)
    with pytest.raises(StorageFailed, match="-wal is damaged at its start"):
        newest_ts(left)


def test_what_a_rolled_back_transaction_has_spilled_is_no_damage(left: Path) -> None:
    """Frames without a commit, behind the last one, as a process leaves them that dies in a large transaction."""
    with closing(sqlite3.connect(left, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 5")
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE large AS SELECT zeroblob(200000) AS data")
        copied = left.parent.parent / "spilled"
        copied.mkdir()
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{left}{suffix}", copied / f"engine.db{suffix}")
    assert wal_of(copied / "engine.db").stat().st_size > 200_000
    assert newest_ts(copied / "engine.db") == COMMIT_COUNT


def test_a_crash_while_the_file_was_made_is_no_damage(tmp_path: Path) -> None:
    """A rollback journal is there then, which only a writer can take in."""
    path, left = tmp_path / "made.db", tmp_path / "left.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("VACUUM")  # a first page, to be journalled
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE large AS SELECT zeroblob(200000) AS data")
        for suffix in ("", "-journal"):
            shutil.copyfile(f"{path}{suffix}", f"{left}{suffix}")
    wal_of(left).write_bytes(bytes(10_000))
    assert newest_ts(left) == 0
