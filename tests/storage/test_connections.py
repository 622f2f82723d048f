"""Opening, locking, transactions, snapshots and the WAL, on real files."""

import os
import resource
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.errors import (
    CommitUnknown,
    ConfigError,
    EngineError,
    InternalError,
    Overloaded,
    StorageFailed,
    StorageFull,
)
from engine.limits import Limits
from engine.storage import connections
from engine.storage.connections import TEMPORARY, Database, WriterConnection
from engine.storage.lock import LockHolder, lock_holder

ROOT = Path(__file__).parents[2]
SERVE = """
import sys
from engine.limits import Limits
from engine.storage.connections import Database
database = Database.open(sys.argv[1], Limits())
database.announce(address="http://127.0.0.1:3210", key="adm_1")
print("open", flush=True)
sys.stdin.read()
database.close()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "engine.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    with closing(Database.open(path, Limits())) as database:
        database.writer.execute("CREATE TABLE things (name TEXT PRIMARY KEY) STRICT")
        yield database


def insert(writer: WriterConnection, name: str) -> None:
    writer.execute("INSERT INTO things VALUES (?)", (name,))


def names(connection: connections.Connection) -> list[str]:
    return [name for (name,) in connection.fetch_all("SELECT name FROM things ORDER BY name")]


def wal_file_size_bytes(database: Database) -> int:
    return Path(f"{database.path}-wal").stat().st_size


def commit(writer: WriterConnection, name: str, ts: int) -> None:
    writer.begin()
    insert(writer, name)
    writer.write_meta(ts, ts * 10, 0)
    writer.commit()


@contextmanager
def served_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the database open."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process


# -- files and the lock


def test_only_the_owner_may_read_the_files(database: Database) -> None:
    files = sorted(database.path.parent.iterdir())
    assert [file.name for file in files] == ["engine.db", "engine.db-shm", "engine.db-wal", "engine.db.lock"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_a_database_that_is_open_cannot_be_opened_again(database: Database) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.db is in use by process {os.getpid()}\. Stop that process"):
        Database.open(database.path, Limits())
    assert names(database.writer) == []


@pytest.mark.slow
def test_another_process_keeps_it_until_it_closes_in_good_order(path: Path) -> None:
    with served_elsewhere(path) as process:
        with pytest.raises(ConfigError, match=rf"in use by process {process.pid} at http://127\.0\.0\.1:3210"):
            Database.open(path, Limits())
        assert lock_holder(path) == LockHolder(process.pid, "http://127.0.0.1:3210", "adm_1")
        process.communicate("")
        assert process.returncode == 0
    assert lock_holder(path) is None
    Database.open(path, Limits()).close()


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_gone_with_it(path: Path) -> None:
    with served_elsewhere(path) as process:
        process.kill()
        process.wait()
        assert lock_holder(path) is None
        Database.open(path, Limits()).close()


def test_a_database_that_was_never_opened_has_no_holder(path: Path) -> None:
    assert lock_holder(path) is None


def test_it_says_where_it_serves_once_it_does(database: Database) -> None:
    assert lock_holder(database.path) == LockHolder(os.getpid())
    database.announce(address="http://127.0.0.1:3210", key="adm_1")
    assert lock_holder(database.path) == LockHolder(os.getpid(), "http://127.0.0.1:3210", "adm_1")


def test_a_temporary_database_is_gone_when_it_is_closed() -> None:
    database = Database.open(TEMPORARY, Limits())
    assert database.path.exists()
    database.close()
    assert not database.path.parent.exists()


def test_the_secret_is_made_once(path: Path) -> None:
    with closing(Database.open(path, Limits(), entropy=lambda size: b"s" * size)) as database:
        assert database.read_secret() == b"s" * 32
    with closing(Database.open(path, Limits())) as database:
        assert database.read_secret() == b"s" * 32


# -- what is not ours to serve


def refused(path: Path) -> str:
    """The refusal; the file is as it was, and can be opened by others."""
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        Database.open(path, Limits())
    assert path.read_bytes() == before
    assert lock_holder(path) is None
    return str(caught.value)


def test_the_database_of_another_program_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE invoices (number)")
    assert "the database of another program (it has 'invoices')" in refused(path)


def test_a_newer_format_is_refused_untouched(path: Path) -> None:
    Database.open(path, Limits()).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE _engine_meta SET format_version = 99")
        connection.commit()
    assert "has format 99, this engine reads up to 3. Use a newer engine" in refused(path)


def test_a_file_that_is_no_database_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n" * 1000)
    assert "is not an SQLite database" in refused(path)


# -- transactions


def test_what_was_committed_is_there_after_reopening(path: Path) -> None:
    with closing(Database.open(path, Limits())) as database:
        assert database.writer.read_meta() == (0, 0)
        database.writer.execute("CREATE TABLE things (name TEXT PRIMARY KEY) STRICT")
        commit(database.writer, "a", ts=7)
    with closing(Database.open(path, Limits())) as database:
        assert database.writer.read_meta() == (7, 70)
        assert names(database.writer) == ["a"]


def test_a_file_of_an_older_engine_gets_what_it_lacks(path: Path) -> None:
    with closing(Database.open(path, Limits())) as database:
        database.writer.execute("CREATE TABLE things (name TEXT PRIMARY KEY) STRICT")
        commit(database.writer, "a", ts=7)
        assert database.writer.read_ledger_row_count() == 0
        for column in ("ledger_row_count", "checksum"):
            database.writer.execute(f"ALTER TABLE _engine_meta DROP COLUMN {column}")
    with closing(Database.open(path, Limits())) as database:
        assert database.writer.read_ledger_row_count() is None
        commit(database.writer, "b", ts=8)
        assert database.writer.read_meta() == (8, 80)
        assert database.writer.read_ledger_row_count() == 0


def test_rows_that_nobody_fetched_hold_no_snapshot(database: Database) -> None:
    reader = database.open_reader()
    reader.pin()
    reader.execute("SELECT 1 FROM sqlite_master UNION ALL SELECT 2")  # as a watchdog may cut off a read
    commit(database.writer, "a", ts=7)
    reader.unpin()
    assert reader.pin() == 7


@pytest.mark.parametrize("kind", ["writer", "reader"])
def test_a_database_that_somebody_has_tampered_with_can_do_little(database: Database, kind: str) -> None:
    connection = database.writer if kind == "writer" else database.open_reader()
    assert connection.fetch_all("PRAGMA trusted_schema") == [(0,)]
    assert connection.fetch_all("PRAGMA cell_size_check") == [(1,)]
    assert connection.fetch_all("PRAGMA mmap_size") == [(0,)]
    with pytest.raises(InternalError, match="not authorized"):
        connection.fetch_all("SELECT load_extension('libm')")
    if sys.version_info >= (3, 12):
        assert connection._connection.getconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE)


def test_every_commit_is_synced_to_the_disk(database: Database) -> None:
    assert database.writer.fetch_all("PRAGMA synchronous") == [(2,)]  # FULL
    assert database.writer.fetch_all("PRAGMA journal_mode") == [("wal",)]


def test_a_savepoint_undoes_its_own_writes_only(database: Database) -> None:
    writer = database.writer
    writer.begin()
    insert(writer, "before")
    writer.savepoint()
    insert(writer, "outer")
    writer.savepoint()
    insert(writer, "inner")
    writer.rollback_to()
    writer.release()
    writer.release()
    writer.commit()
    assert names(writer) == ["before", "outer"]


def test_rolling_back_what_sqlite_rolled_back_by_itself_is_fine(database: Database) -> None:
    database.writer.begin()
    database.writer.savepoint()
    database.writer.rollback()
    assert not database.writer.in_transaction
    database.writer.rollback()


def test_a_full_disk_during_a_write_is_a_retryable_error_and_the_writer_recovers(database: Database) -> None:
    writer = database.writer
    ((page_count,),) = writer.fetch_all("PRAGMA page_count")
    writer.fetch_all(f"PRAGMA max_page_count = {page_count}")
    writer.begin()
    with pytest.raises(StorageFull, match="The disk is full"):
        insert(writer, "x" * 100_000)
    writer.rollback()
    writer.fetch_all("PRAGMA max_page_count = 100000")
    commit(writer, "y", ts=1)
    assert names(writer) == ["y"]


class _FailingCursor(sqlite3.Cursor):
    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        assert isinstance(self.connection, _FailingConnection)
        if sql == "COMMIT" and self.connection.commit_code is not None:
            error = sqlite3.OperationalError("injected")
            error.sqlite_errorcode = self.connection.commit_code
            raise error
        return super().execute(sql, parameters)


class _FailingConnection(sqlite3.Connection):
    """COMMIT fails with the given code; everything else is SQLite."""

    commit_code: int | None = None

    def cursor(self, *_: Any) -> _FailingCursor:  # type: ignore[override]
        return super().cursor(_FailingCursor)


@pytest.fixture
def failing(database: Database) -> Iterator[_FailingConnection]:
    """A second writer on the file, of which the test says how COMMIT fails."""
    connection = sqlite3.connect(database.path, factory=_FailingConnection, isolation_level=None)
    with closing(connection):
        yield connection


def test_a_full_disk_at_commit_rolls_back(database: Database, failing: _FailingConnection) -> None:
    writer = WriterConnection(failing, database.writer._wal_index)
    failing.commit_code = sqlite3.SQLITE_FULL
    with pytest.raises(StorageFull):
        commit(writer, "a", ts=1)
    assert not writer.in_transaction
    failing.commit_code = None
    commit(writer, "b", ts=2)
    assert names(database.writer) == ["b"]


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_INTERRUPT])
def test_any_other_failure_of_commit_is_unknown(database: Database, failing: _FailingConnection, code: int) -> None:
    writer = WriterConnection(failing, database.writer._wal_index)
    failing.commit_code = code
    with pytest.raises(CommitUnknown, match="Whether it is on disk shows after a restart"):
        commit(writer, "a", ts=1)


@pytest.mark.slow
def test_a_write_that_the_disk_refuses_at_commit_is_unknown(path: Path) -> None:
    program = f"""
import resource
from engine.errors import CommitUnknown
from engine.limits import Limits
from engine.storage.connections import Database
database = Database.open({str(path)!r}, Limits())
writer = database.writer
writer.begin()
writer.execute("CREATE TABLE things AS SELECT zeroblob(100000) AS data")
resource.setrlimit(resource.RLIMIT_FSIZE, ({32 << 10}, {resource.RLIM_INFINITY}))
try:
    writer.commit()
except CommitUnknown:
    print("unknown")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("unknown\n", "")
    with closing(Database.open(path, Limits())) as database:
        assert database.writer.fetch_all("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize(
    "statement",
    [
        "ts = ts + 1",
        "tick = tick - 1",
        "ledger_row_count = 5",
        "schema_json = '{ }'",
        "secret = zeroblob(32)",
        "format_version = 1",
        "checksum = checksum + 1",
    ],
)
def test_a_damaged_row_about_the_database_is_found_out(path: Path, statement: str) -> None:
    with closing(Database.open(path, Limits())) as database:
        database.writer.execute("CREATE TABLE things (name TEXT PRIMARY KEY) STRICT")
        commit(database.writer, "a", ts=7)
        commit(database.writer, "b", ts=8)
    Database.open(path, Limits()).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE _engine_meta SET {statement}")
    with pytest.raises(StorageFailed, match="the row that describes the database is damaged: restore a backup"):
        Database.open(path, Limits())


def test_what_describes_the_tables_may_change(path: Path) -> None:
    with closing(Database.open(path, Limits())) as database:
        writer = database.writer
        writer.execute("CREATE TABLE things (name TEXT PRIMARY KEY) STRICT")
        commit(writer, "a", ts=7)
        writer.begin()
        writer.write_schema('{"things": {}}')
        writer.commit()
        Database.open(path.with_name("other.db"), Limits()).close()
    with closing(Database.open(path, Limits())) as database:
        commit(database.writer, "b", ts=8)
    Database.open(path, Limits()).close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_FULL, StorageFull),
        (sqlite3.SQLITE_BUSY, Overloaded),
        (sqlite3.SQLITE_IOERR_READ, StorageFailed),
        (sqlite3.SQLITE_CANTOPEN, StorageFailed),
        (sqlite3.SQLITE_CORRUPT, StorageFailed),
        (sqlite3.SQLITE_MISUSE, InternalError),
    ],
)
def test_what_an_error_of_sqlite_means(code: int, kind: type[EngineError]) -> None:
    error = sqlite3.OperationalError("injected")
    error.sqlite_errorcode = code
    assert type(connections.translated(error)) is kind


def test_the_commit_of_another_program_is_noticed(database: Database) -> None:
    commit(database.writer, "a", ts=1)
    assert not database.writer.foreign_commit_seen()
    with closing(sqlite3.connect(database.path)) as other:
        other.execute("INSERT INTO things VALUES ('b')")
        other.commit()
    assert database.writer.foreign_commit_seen()


def test_other_programs_can_read_meanwhile(database: Database) -> None:
    commit(database.writer, "a", ts=1)
    database.writer.begin()
    insert(database.writer, "b")
    with closing(sqlite3.connect(f"file:{database.path}?mode=ro", uri=True)) as other:
        assert other.execute("SELECT name FROM things").fetchall() == [("a",)]
    assert not database.writer.foreign_commit_seen()


def test_a_locked_database_is_overload(database: Database) -> None:
    database.writer.execute("PRAGMA busy_timeout = 0")
    with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Overloaded, match="Another program has locked the database"):
            database.writer.begin()


def test_any_other_error_of_sqlite_is_internal(database: Database) -> None:
    with pytest.raises(InternalError, match="SQLite: no such table: missing"):
        database.writer.fetch_all("SELECT * FROM missing")


def test_an_old_sqlite_is_worth_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    assert "before 3.51.3, a second program that writes" in (connections.sqlite_warning() or "")
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 3))
    assert connections.sqlite_warning() is None


# -- snapshots and the WAL


def test_a_pinned_reader_sees_one_commit_timestamp(database: Database) -> None:
    writer, reader = database.writer, database.open_reader()
    commit(writer, "a", ts=1)
    assert reader.pin() == 1
    commit(writer, "b", ts=2)
    assert names(reader) == ["a"]
    reader.unpin()
    assert reader.pin() == 2
    assert names(reader) == ["a", "b"]


def test_a_reader_sees_nothing_of_an_open_transaction(database: Database) -> None:
    reader = database.open_reader()
    database.writer.begin()
    insert(database.writer, "a")
    assert reader.pin() == 0
    assert names(reader) == []


def test_a_reader_cannot_write(database: Database) -> None:
    reader = database.open_reader()
    with pytest.raises(InternalError, match="readonly"):
        reader.execute("DELETE FROM things")


def test_the_wal_starts_anew_once_it_is_checkpointed_and_readers_have_moved(database: Database) -> None:
    writer, reader = database.writer, database.open_reader()
    commit(writer, "x" * 50_000, ts=1)
    reader.pin()
    commit(writer, "y" * 50_000, ts=2)
    size_bytes = writer.wal_size_bytes()
    assert size_bytes > 100_000

    frame_count, copied_count = writer.checkpoint()
    assert copied_count < frame_count  # the reader needs the rest
    assert writer.wal_size_bytes() == size_bytes

    reader.unpin()
    frame_count, copied_count = writer.checkpoint()
    assert copied_count == frame_count
    assert writer.wal_size_bytes() == 0
    assert reader.pin() == 2

    commit(writer, "z", ts=3)
    assert 0 < writer.wal_size_bytes() < 50_000
    assert wal_file_size_bytes(database) >= size_bytes  # the file stays as it was


def test_truncate_gives_the_room_of_the_wal_back(database: Database) -> None:
    commit(database.writer, "x" * 50_000, ts=1)
    assert wal_file_size_bytes(database) > 50_000
    database.writer.checkpoint("TRUNCATE")
    assert wal_file_size_bytes(database) == 0
    assert database.writer.wal_size_bytes() == 0


def test_nothing_is_checkpointed_unless_asked(database: Database) -> None:
    for number in range(60):
        commit(database.writer, f"{number:02}" + "x" * 100_000, ts=number + 1)
    assert database.writer.wal_size_bytes() > 6_000_000
