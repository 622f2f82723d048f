"""Opening a database: its one writer, and readers pinned to a snapshot.

Invariants
  1. One process serves a database: it holds its lock (`lock.py`) from open to close.
  2. One connection writes; every other one is `mode=ro`. Only the writer checkpoints, and never during a commit: two
     checkpoints that meet can corrupt the file in SQLite before 3.51.3 (sqlite.org/wal.html, "the WAL-reset bug").
  3. A pinned reader sees one commit timestamp, whatever is committed meanwhile.
  4. No `sqlite3.Error` leaves this package: `translated` makes it ours, in one place. (A broken constraint goes on to
     `rows.py`, which knows its name.) Nor does an `OSError` of opening a database.

The caller decides when to commit, to pin and to checkpoint (`transaction/committer.py`).
"""

import contextlib
import os
import sqlite3
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from engine.clock import SystemClock
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
from engine.ranges import Scalar
from engine.storage.disk import free_size_bytes, make_directory, os_errors_translated, sync_directory
from engine.storage.lock import DatabaseLock, LockHolder
from engine.storage.wal import FRAME_HEADER_SIZE_BYTES, WalIndex, check_wal

TEMPORARY = ":memory:"  # as a path: a file in a temporary directory, gone when it is closed
FORMAT_VERSION = 3  # of the file; raised when an older engine could no longer read it, or keep what is in it

Row = tuple[Any, ...]

_SQLITE_VERSION_SAFE = (3, 51, 3)  # invariant 2 is all that stands between older ones and the WAL-reset bug
_BUSY_SECONDS_MAX = 5.0  # how long a foreign writer (an SQL shell) may keep us waiting
_CACHED_STATEMENT_COUNT = 512
_CACHE_SIZE_KIB = 16 << 10  # pages that each connection keeps
DAMAGED_REMEDY = "restore a backup; `PRAGMA integrity_check` in an SQL shell says more."

_META = """
CREATE TABLE "_engine_meta" (
    "one" INTEGER PRIMARY KEY CHECK ("one" = 1),
    "format_version" INTEGER NOT NULL,
    "ts" INTEGER NOT NULL,
    "tick" INTEGER NOT NULL,
    "schema_json" TEXT NOT NULL,
    "secret" BLOB NOT NULL,
    "ledger_row_count" INTEGER,  -- counting them takes time that grows with them
    "checksum" INTEGER  -- of what is above
) STRICT
"""
_ADDED_TO_META = ("ledger_row_count", "checksum")  # NULL in a file of an older engine, until the next commit


def translated(error: sqlite3.Error) -> EngineError:
    """What an SQLite error means to the engine."""
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    name = getattr(error, "sqlite_errorname", "no SQLite code")
    if primary == sqlite3.SQLITE_FULL:
        return StorageFull("The disk is full: nothing was written. Try again when there is room.")
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Overloaded(f"Another program has locked the database for {_BUSY_SECONDS_MAX:g} s. Try again.")
    if primary in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return StorageFailed(f"The disk of the database failed: {error} ({name}). The system's log may say more.")
    # CORRUPT is also what a read is that fails with EIO; damaged text has no code
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or "Could not decode to UTF-8" in str(error):
        return StorageFailed(f"{error} ({name}). If it stays so after a restart, {DAMAGED_REMEDY}")
    return InternalError(f"SQLite: {error} ({name})")


def sqlite_warning() -> str | None:
    """What to log at start about the SQLite library that this process uses; None when there is nothing to say."""
    if sqlite3.sqlite_version_info >= _SQLITE_VERSION_SAFE:
        return None
    safe = ".".join(map(str, _SQLITE_VERSION_SAFE))
    return (
        f"SQLite {sqlite3.sqlite_version}: before {safe}, a second program that writes to the database or checkpoints "
        "it can corrupt it while the engine runs. Reading it with other programs is fine."
    )


class Connection:
    """What the writer and the readers have in common: statements that are finished when they return."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # one cursor for all: 0.8 × the instructions of a new one each. What a watchdog's exception left unread in it,
        # the next statement ends.
        self._cursor = connection.cursor()
        self._execute = self._cursor.execute

    def execute(self, sql: str, parameters: Sequence[Scalar] = ()) -> sqlite3.Cursor:
        """Run a statement that gives no rows; `rowcount`, until the next statement, says how many it changed."""
        try:
            return self._execute(sql, parameters)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise translated(error) from error

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement that gives no rows with the parameters of each of these."""
        try:
            self._cursor.executemany(sql, rows)
        except sqlite3.Error as error:
            raise translated(error) from error

    def fetch_all(self, sql: str, parameters: Sequence[Scalar] = ()) -> list[Row]:
        """All rows of a statement; it holds no lock and no snapshot of its own afterwards."""
        try:
            return self._execute(sql, parameters).fetchall()
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise translated(error) from error

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def close(self) -> None:
        self._connection.close()


class WriterConnection(Connection):
    """The only connection that writes. Not for two threads at a time: COMMIT and checkpoints run on their own thread
    while nobody else touches the writer."""

    def __init__(self, connection: sqlite3.Connection, wal_index: WalIndex, directory: Path | None = None) -> None:
        """`directory`: on whose disk room is looked for; None: for a database that goes away nobody does."""
        super().__init__(connection)
        self._wal_index, self._directory = wal_index, directory
        ((page_size_bytes,),) = self.fetch_all("PRAGMA page_size")
        self._page_size_bytes = int(page_size_bytes)
        self._frame_size_bytes = self._page_size_bytes + FRAME_HEADER_SIZE_BYTES
        self._data_version = self._read_data_version()
        self._fixed_checksum: int | None = None  # None: not known, or not any more

    # -- transactions

    def stop_waiting(self) -> None:
        """From now on `begin` fails at once when another program holds the lock: the caller waits off the loop."""
        self.fetch_all("PRAGMA busy_timeout = 0")

    def begin(self) -> None:
        """Open a transaction that may write: nobody else can from here on."""
        self.execute("BEGIN IMMEDIATE")

    def savepoint(self, depth: int = 0) -> None:
        """Open a savepoint; `depth` counts those around it."""
        self.execute(f"SAVEPOINT run_{depth:d}" if depth else "SAVEPOINT run_0")  # the one of every mutation

    def rollback_to(self, depth: int = 0) -> None:
        """Undo what was written since the innermost savepoint of this depth, which stays open; those inside it go."""
        self.execute(f"ROLLBACK TO run_{depth:d}")

    def release(self, depth: int = 0) -> None:
        """Close that savepoint and those inside it; what was written since belongs to the one around it."""
        self.execute(f"RELEASE run_{depth:d}" if depth else "RELEASE run_0")

    def commit(self) -> None:
        """Make the transaction durable: it is on disk when this returns.

        `StorageFull`: nothing is, and the transaction is rolled back. `CommitUnknown`: it may be; the process must end.
        """
        assert self.in_transaction, "COMMIT without a transaction"
        try:
            self._execute("COMMIT")
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_FULL:
                raise CommitUnknown(f"COMMIT failed: {error}. Whether it is on disk shows after a restart.") from error
            try:
                self.rollback()
            except EngineError as rollback_error:
                raise CommitUnknown(f"COMMIT met a full disk, then ROLLBACK failed: {rollback_error}") from error
            raise translated(error) from error

    def rollback(self) -> None:
        """Undo the whole transaction; nothing to do when SQLite has done it by itself."""
        if self.in_transaction:
            self.execute("ROLLBACK")

    # -- the one row about the database itself

    def read_meta(self) -> tuple[int, int]:
        """The newest commit timestamp and the newest creation tick."""
        ((ts, tick),) = self.fetch_all('SELECT "ts", "tick" FROM "_engine_meta"')
        return ts, tick

    def read_ledger_row_count(self) -> int | None:
        """As it was written last; None: never."""
        ((count,),) = self.fetch_all('SELECT "ledger_row_count" FROM "_engine_meta"')
        return None if count is None else int(count)

    def write_meta(self, ts: int, tick: int, ledger_row_count: int) -> None:
        if self._fixed_checksum is None:
            self._fixed_checksum = self._read_fixed_checksum()
        self.execute(
            'UPDATE "_engine_meta" SET "ts" = ?, "tick" = ?, "ledger_row_count" = ?, "checksum" = ?',
            (ts, tick, ledger_row_count, _checksum_of((ts, tick, ledger_row_count), self._fixed_checksum)),
        )

    def write_schema(self, schema_json: str) -> None:
        """What the tables are now, for the next start; in the transaction that is open."""
        # an older engine would write rows without what this one has made of them
        self.execute(
            'UPDATE "_engine_meta" SET "schema_json" = ?, "format_version" = ?, "checksum" = NULL',
            (schema_json, FORMAT_VERSION),
        )
        self._fixed_checksum = None

    def check_meta(self) -> None:
        """Raises StorageFailed if the row is not as it was written."""
        ((*varying, checksum),) = self.fetch_all(
            'SELECT "ts", "tick", "ledger_row_count", "checksum" FROM "_engine_meta"'
        )
        if checksum not in (None, _checksum_of(tuple(varying), self._read_fixed_checksum())):
            raise StorageFailed(f"the row that describes the database is damaged: {DAMAGED_REMEDY}")

    def _read_fixed_checksum(self) -> int:
        """Of what commits leave as it is."""
        (fixed,) = self.fetch_all('SELECT "format_version", "schema_json", "secret" FROM "_engine_meta"')
        return _checksum_of(fixed, 0)

    def foreign_commit_seen(self) -> bool:
        """Whether somebody else has written to the file since it was opened."""
        return self._read_data_version() != self._data_version

    def _read_data_version(self) -> int:
        ((version,),) = self.fetch_all("PRAGMA data_version")
        return int(version)

    def room_size_bytes(self) -> int | None:
        """How much more there can be: what the disk has free, and pages of the file that hold nothing any more."""
        if self._directory is None:
            return None
        ((free_page_count,),) = self.fetch_all("PRAGMA freelist_count")
        return free_size_bytes(self._directory) + int(free_page_count) * self._page_size_bytes

    # -- the WAL

    def wal_size_bytes(self) -> int:
        """What the WAL holds and the next write adds to; 0 when all of it is checkpointed. (The file keeps its size
        when it starts anew, so its size says nothing.)"""
        return self._wal_index.read_frame_count() * self._frame_size_bytes

    def wal_file_size_bytes(self) -> int:
        return self._wal_index.wal_path.stat().st_size

    def checkpoint(self, mode: Literal["PASSIVE", "TRUNCATE"] = "PASSIVE") -> tuple[int, int]:
        """Copy the WAL into the database file: (frames in it, frames copied so far).

        Frames newer than the snapshot of a pinned reader stay. TRUNCATE waits for every reader, then empties the file.
        """
        assert not self.in_transaction, "a checkpoint during a transaction"
        ((_, frame_count, copied_count),) = self.fetch_all(f"PRAGMA wal_checkpoint({mode})")
        return frame_count, copied_count


class SnapshotReader(Connection):
    """A read-only connection that shows one commit timestamp from `pin` to `unpin` (invariant 3)."""

    is_cut = False  # set by `cut`

    def pin(self) -> int:
        """Hold the newest snapshot; gives its commit timestamp."""
        assert not self.in_transaction, "the reader is pinned already"
        self.execute("BEGIN")
        ((ts,),) = self.fetch_all('SELECT "ts" FROM "_engine_meta"')  # the first read takes the snapshot
        return int(ts)

    def unpin(self) -> None:
        """Let go of the snapshot; a pinned one holds back the checkpoint."""
        if self.in_transaction:
            self.execute("ROLLBACK")

    def cut(self, error: EngineError) -> None:
        """Take the snapshot away from whoever reads it: this is the answer to all that it still asks."""

        def refuse(*_: Any) -> NoReturn:
            raise error

        self.unpin()
        self.is_cut = True
        self._execute = refuse


class Database:
    """One open database: its lock, its writer, and the readers that were opened."""

    def __init__(
        self, path: Path, writer: WriterConnection, lock: DatabaseLock, resources: contextlib.ExitStack
    ) -> None:
        self.path, self.writer = path, writer
        self._lock = lock
        self._resources = resources  # closes everything but the readers, in order
        self._readers: list[SnapshotReader] = []

    @classmethod
    def open(cls, path: str | Path, limits: Limits, *, entropy: Callable[[int], bytes] | None = None) -> "Database":
        """Open the database, or make it. `ConfigError`: it is not ours to serve, and stays as it was.

        `entropy` gives the secret of a new database; without it the machine does.
        """
        with contextlib.ExitStack() as resources:
            is_temporary = str(path) == TEMPORARY
            if is_temporary:
                path = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="engine-")), "engine.db")
            path = Path(path).resolve()
            with os_errors_translated(f"opening {path}"):
                make_directory(path.parent)
                lock = DatabaseLock(path)
                resources.callback(lock.release)
                _make_file(path)
            wal_index = WalIndex(path)
            resources.callback(wal_index.close)
            try:
                _check_wal_left(path, wal_index)
                connection = _connect(path, "rw")
                resources.callback(connection.close)
                is_new = _check_format(connection, path)
                _configure_writer(connection, path, is_temporary=is_temporary)
                if is_new:
                    _make_meta(connection, (entropy or SystemClock().entropy)(32))
                else:
                    _add_to_meta(connection)
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_NOTADB:
                    raise ConfigError(f"{path} is not an SQLite database. Use another path.") from error
                raise translated(error) from error
            with os_errors_translated(f"opening the WAL index of {path}"):
                wal_index.open()
            writer = WriterConnection(connection, wal_index, None if is_temporary else path.parent)
            writer.check_meta()
            return cls(path, writer, lock, resources.pop_all())

    def open_reader(self) -> SnapshotReader:
        """One more read-only connection, not pinned yet; closed with the database at the latest."""
        try:
            reader = SnapshotReader(_connect(self.path, "ro"))
        except sqlite3.Error as error:
            raise translated(error) from error
        self._readers.append(reader)
        return reader

    def read_secret(self) -> bytes:
        """32 bytes that nobody outside knows; made with the database."""
        ((secret,),) = self.writer.fetch_all('SELECT "secret" FROM "_engine_meta"')
        return bytes(secret)

    def announce(self, *, address: str | None, key: str | None) -> None:
        """Say in `DATABASE.lock` where this process serves, for the commands that act through it."""
        self._lock.write(LockHolder(pid=os.getpid(), address=address, key=key))

    def close_reader(self, reader: SnapshotReader) -> None:
        """One that is not needed any more."""
        self._readers.remove(reader)
        reader.close()

    def close(self) -> None:
        """Close every connection and let go of the lock; an open transaction is rolled back."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()
        self._resources.close()  # the writer closes last of the connections: SQLite then empties the WAL


def _make_file(path: Path) -> None:
    """Make the file before SQLite does: only its owner may read it, and its name is on disk."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    # also of what is there: a process that was killed may have made it, and not come as far as this
    for directory in (path.parent, path.parent.parent):
        sync_directory(directory)


def _connect(path: Path, mode: Literal["rw", "ro"]) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}",
        uri=True,
        timeout=_BUSY_SECONDS_MAX,
        isolation_level=None,  # we say BEGIN
        check_same_thread=False,  # COMMIT runs in a thread; the module is built with threadsafety 3
        cached_statements=_CACHED_STATEMENT_COUNT,
    )
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
    for pragma in (
        "foreign_keys = OFF",
        "trusted_schema = OFF",
        "cell_size_check = ON",
        "wal_autocheckpoint = 0",  # the committer says when (invariant 2)
        "temp_store = MEMORY",
        f"cache_size = -{_CACHE_SIZE_KIB}",
    ):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _check_wal_left(path: Path, wal_index: WalIndex) -> None:
    """Refuse a WAL that has lost commits, before a writer takes it in."""
    # a rollback journal is there only if a crash came while the file was made: it has no commits yet
    has_journal = Path(f"{path}-journal").exists()
    if has_journal or not wal_index.wal_path.exists() or not path.stat().st_size:
        return
    with contextlib.closing(_connect(path, "ro")) as connection:  # it makes the index, and leaves the WAL as it is
        connection.execute("SELECT 1 FROM sqlite_master").fetchall()
        with os_errors_translated(f"reading {wal_index.wal_path}"):
            check_wal(wal_index.wal_path, wal_index.read_frame_count_taken(), DAMAGED_REMEDY)


def _check_format(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the database is new; refuse one that is not ours, before anything is written to it."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return True
    if "_engine_meta" not in tables:
        raise ConfigError(f"{path} is the database of another program (it has {min(tables)!r}). Use another path.")
    ((version,),) = connection.execute('SELECT "format_version" FROM "_engine_meta"').fetchall()
    if version > FORMAT_VERSION:
        raise ConfigError(f"{path} has format {version}, this engine reads up to {FORMAT_VERSION}. Use a newer engine.")
    return False


def _configure_writer(connection: sqlite3.Connection, path: Path, *, is_temporary: bool) -> None:
    ((journal_mode,),) = connection.execute("PRAGMA journal_mode = WAL").fetchall()
    if journal_mode != "wal":
        raise ConfigError(f"{path}: SQLite cannot keep a WAL here (journal mode {journal_mode!r}). Use a local disk.")
    connection.execute(f"PRAGMA synchronous = {'OFF' if is_temporary else 'FULL'}")
    connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone leaves it in the drive's cache
    connection.execute("PRAGMA checkpoint_fullfsync = ON")
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # `wal.py`, invariant 1
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_FULL:  # on a full disk queries are served all the same
            raise


def _make_meta(connection: sqlite3.Connection, secret: bytes) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(_META)
    connection.execute("""INSERT INTO "_engine_meta" VALUES (1, ?, 0, 0, '{}', ?, 0, NULL)""", (FORMAT_VERSION, secret))
    connection.execute("COMMIT")


def _add_to_meta(connection: sqlite3.Connection) -> None:
    """What the file of an older engine lacks."""
    present = connection.execute("SELECT name FROM pragma_table_info('_engine_meta')").fetchall()
    missing = [column for column in _ADDED_TO_META if (column,) not in present]
    if missing:
        connection.execute("BEGIN IMMEDIATE")
        for column in missing:
            connection.execute(f'ALTER TABLE "_engine_meta" ADD COLUMN "{column}" INTEGER')
        # an older engine would not keep what is in them
        connection.execute('UPDATE "_engine_meta" SET "format_version" = ?', (FORMAT_VERSION,))
        connection.execute("COMMIT")


def _checksum_of(values: Row, start: int) -> int:
    return zlib.crc32(repr(values).encode(), start)
