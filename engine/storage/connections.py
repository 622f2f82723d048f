"""Opening a database: its lock, its one writer, and readers pinned to a snapshot.

Invariants
  1. One process serves a database: it holds an exclusive `flock` on `DATABASE.lock` from open to close.
  2. One connection writes; every other one is `mode=ro`. Only the writer checkpoints, and never during a commit: two
     checkpoints that meet can corrupt the file in SQLite before 3.51.3 (sqlite.org/wal.html, "the WAL-reset bug").
  3. A pinned reader sees one commit timestamp, whatever is committed meanwhile.
  4. No `sqlite3.Error` leaves this package: `translated` makes it ours, in one place. (A broken constraint goes on to
     `rows.py`, which knows its name.)

The caller decides when to commit, to pin and to checkpoint (`transaction/committer.py`).
"""

import contextlib
import fcntl
import os
import sqlite3
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.clock import SystemClock
from engine.errors import CommitUnknown, ConfigError, EngineError, InternalError, Overloaded, StorageFull
from engine.limits import Limits
from engine.ranges import Scalar

TEMPORARY = ":memory:"  # as a path: a file in a temporary directory, gone when it is closed
FORMAT_VERSION = 2  # of the file; raised when an older engine could no longer read it, or keep what is in it

Row = tuple[Any, ...]

_SQLITE_VERSION_SAFE = (3, 51, 3)  # invariant 2 is all that stands between older ones and the WAL-reset bug
_BUSY_SECONDS_MAX = 5.0  # how long a foreign writer (an SQL shell) may keep us waiting
_CACHED_STATEMENT_COUNT = 512
_CACHE_SIZE_KIB = 16 << 10  # pages that each connection keeps
_WAL_CHECKPOINTS_KEPT = 16  # a WAL file that grew past this many checkpoints' worth shrinks when it starts anew
_WAL_FRAME_HEADER_SIZE_BYTES = 24
_WAL_INDEX_HEAD = struct.Struct("=I12xI76xI")  # version, frames, frames checkpointed: sqlite.org/walformat.html, 2.1
_WAL_INDEX_VERSION = 3007000

_META = """
CREATE TABLE "_engine_meta" (
    "one" INTEGER PRIMARY KEY CHECK ("one" = 1),
    "format_version" INTEGER NOT NULL,
    "ts" INTEGER NOT NULL,
    "tick" INTEGER NOT NULL,
    "schema_json" TEXT NOT NULL,
    "secret" BLOB NOT NULL,
    "ledger_row_count" INTEGER  -- counting them takes time that grows with them; NULL: an older engine made the file
) STRICT
"""


def translated(error: sqlite3.Error) -> EngineError:
    """What an SQLite error means to the engine."""
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    name = getattr(error, "sqlite_errorname", "no SQLite code")
    if primary == sqlite3.SQLITE_FULL:
        return StorageFull("The disk is full: nothing was written. Try again when there is room.")
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Overloaded(f"Another program has locked the database for {_BUSY_SECONDS_MAX:g} s. Try again.")
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

    def __init__(self, connection: sqlite3.Connection, wal_index: "_WalIndex") -> None:
        super().__init__(connection)
        self._wal_index = wal_index
        ((page_size_bytes,),) = self.fetch_all("PRAGMA page_size")
        self._frame_size_bytes = int(page_size_bytes) + _WAL_FRAME_HEADER_SIZE_BYTES
        self._data_version = self._read_data_version()

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
        self.execute(
            'UPDATE "_engine_meta" SET "ts" = ?, "tick" = ?, "ledger_row_count" = ?', (ts, tick, ledger_row_count)
        )

    def foreign_commit_seen(self) -> bool:
        """Whether somebody else has written to the file since it was opened."""
        return self._read_data_version() != self._data_version

    def _read_data_version(self) -> int:
        ((version,),) = self.fetch_all("PRAGMA data_version")
        return int(version)

    # -- the WAL

    def wal_size_bytes(self) -> int:
        """What the WAL holds and the next write adds to; 0 when all of it is checkpointed. (The file keeps its size
        when it starts anew, so its size says nothing.)"""
        return self._wal_index.read_frame_count() * self._frame_size_bytes

    def checkpoint(self, mode: Literal["PASSIVE", "TRUNCATE"] = "PASSIVE") -> tuple[int, int]:
        """Copy the WAL into the database file: (frames in it, frames copied so far).

        Frames newer than the snapshot of a pinned reader stay. TRUNCATE waits for every reader, then empties the file.
        """
        assert not self.in_transaction, "a checkpoint during a transaction"
        ((_, frame_count, copied_count),) = self.fetch_all(f"PRAGMA wal_checkpoint({mode})")
        return frame_count, copied_count


class _WalIndex:
    """The index of the WAL that the connections of an open database share, seen from outside."""

    def __init__(self, database_path: Path) -> None:
        self._index_path = f"{database_path}-shm"
        self._index_file = -1  # open from `open` to `close`

    def open(self) -> None:
        self._index_file = os.open(self._index_path, os.O_RDONLY | os.O_CLOEXEC)

    def read_frame_count(self) -> int:
        """Frames before the place where the next write goes; 0 when all are checkpointed and it starts anew."""
        head = os.pread(self._index_file, _WAL_INDEX_HEAD.size, 0)
        version, frame_count, frame_count_checkpointed = _WAL_INDEX_HEAD.unpack(head)
        assert version in (0, _WAL_INDEX_VERSION), f"unknown WAL index {version}"  # 0: nothing was written yet
        return 0 if frame_count == frame_count_checkpointed else int(frame_count)

    def close(self) -> None:
        """Only when no connection is left: closing a file drops all locks that this process has on it (POSIX)."""
        if self._index_file >= 0:
            os.close(self._index_file)


class SnapshotReader(Connection):
    """A read-only connection that shows one commit timestamp from `pin` to `unpin` (invariant 3)."""

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


class LockHolder(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who serves a database, as `DATABASE.lock` says."""

    pid: int | None = None  # None: it has only just started
    address: str | None = None  # where it serves; None while it does not
    key: str | None = None  # what its administration asks for


def lock_holder(path: str | Path) -> LockHolder | None:
    """The process that serves this database now, if one does."""
    try:
        file = os.open(_lock_path(Path(path)), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        content = os.pread(file, 1 << 16, 0)
        if not content:
            return None  # closed in good order
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parse_holder(content)
        return None  # it has died: the lock went with it
    finally:
        os.close(file)


def _lock_path(path: Path) -> Path:
    return Path(f"{path.resolve()}.lock")


def _parse_holder(content: bytes) -> LockHolder:
    try:
        return msgspec.json.decode(content, type=LockHolder)
    except msgspec.DecodeError:
        return LockHolder()


class _DatabaseLock:
    """The exclusive hold on `DATABASE.lock` (invariant 1). The file stays; its content goes on close."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _parse_holder(os.pread(self._file, 1 << 16, 0))
            os.close(self._file)
            raise ConfigError(
                f"{path} is in use by process {holder.pid or '(starting)'}"
                f"{f' at {holder.address}' if holder.address else ''}. Stop that process, or use another database."
            ) from None
        self.write(LockHolder(pid=os.getpid()))

    def write(self, holder: LockHolder | None) -> None:
        os.ftruncate(self._file, 0)
        if holder is not None:
            os.pwrite(self._file, msgspec.json.encode(holder), 0)

    def release(self) -> None:
        self.write(None)
        os.close(self._file)


class Database:
    """One open database: its lock, its writer, and the readers that were opened."""

    def __init__(
        self, path: Path, writer: WriterConnection, lock: _DatabaseLock, resources: contextlib.ExitStack
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
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _DatabaseLock(path)
            resources.callback(lock.release)
            _make_file(path)
            wal_index = _WalIndex(path)
            resources.callback(wal_index.close)
            try:
                connection = _connect(path, "rw")
                resources.callback(connection.close)
                is_new = _check_format(connection, path)
                _configure_writer(connection, path, limits, is_temporary=is_temporary)
                if is_new:
                    _make_meta(connection, (entropy or SystemClock().entropy)(32))
                elif not _has_ledger_row_count(connection):
                    connection.execute('ALTER TABLE "_engine_meta" ADD COLUMN "ledger_row_count" INTEGER')
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_NOTADB:
                    raise ConfigError(f"{path} is not an SQLite database. Use another path.") from error
                raise translated(error) from error
            wal_index.open()
            return cls(path, WriterConnection(connection, wal_index), lock, resources.pop_all())

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

    def close(self) -> None:
        """Close every connection and let go of the lock; an open transaction is rolled back."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()
        self._resources.close()  # the writer closes last of the connections: SQLite then empties the WAL


def _make_file(path: Path) -> None:
    """Make the file before SQLite does: only its owner may read it, and its name is on disk."""
    if path.exists():
        return
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """The names in a directory are on disk when this returns."""
    directory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


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


def _configure_writer(connection: sqlite3.Connection, path: Path, limits: Limits, *, is_temporary: bool) -> None:
    ((journal_mode,),) = connection.execute("PRAGMA journal_mode = WAL").fetchall()
    if journal_mode != "wal":
        raise ConfigError(f"{path}: SQLite cannot keep a WAL here (journal mode {journal_mode!r}). Use a local disk.")
    connection.execute(f"PRAGMA synchronous = {'OFF' if is_temporary else 'FULL'}")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_CHECKPOINTS_KEPT * limits.wal_checkpoint_size_bytes}")


def _make_meta(connection: sqlite3.Connection, secret: bytes) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(_META)
    connection.execute("""INSERT INTO "_engine_meta" VALUES (1, ?, 0, 0, '{}', ?, 0)""", (FORMAT_VERSION, secret))
    connection.execute("COMMIT")


def _has_ledger_row_count(connection: sqlite3.Connection) -> bool:
    columns = connection.execute("SELECT name FROM pragma_table_info('_engine_meta')").fetchall()
    return ("ledger_row_count",) in columns
