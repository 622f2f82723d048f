"""(session id, request id) → outcome, in the same commit as the writes: what makes a resent mutation apply once.

    find ──it came before──> answered          record ──> of the open group ──write──> rows ──COMMIT──> kept
      └──else it runs ──────────────────────────┘              └──undone, wholly or for one mutation──> forgotten

Invariants
  1. A row is in the same SQLite transaction as the effects of its mutation; each that succeeds has one.
  2. A key answers only the identity and arguments that it was recorded with; another asker is refused.
  3. Rows go `ledger_seconds_after_seen` after the client surely saw the answer, else after `ledger_days`.
  4. No row of a session, and no outcome of the open group, has a higher request id than is noted for that session.
  5. A row is read only if it is as it was written, and missed only if its neighbours are, in a table whose pages were
     found sound at the start: else StorageFailed.

The ids of a session grow, so the note tells nearly always that a request is new, without a look-up in the table.
"""

import hashlib
import zlib

import msgspec

from engine.errors import Overloaded, RequestIdReused, StorageFailed
from engine.limits import Limits
from engine.storage.connections import DAMAGED_REMEDY, Connection, Row, WriterConnection

CREATE = """
CREATE TABLE IF NOT EXISTS _engine_ledger (
    session_id TEXT NOT NULL,
    request_id INTEGER NOT NULL,
    digest BLOB NOT NULL,      -- of who asked for what
    ts INTEGER NOT NULL,       -- commit timestamp, ns
    value BLOB NOT NULL,       -- the result as JSON
    checksum INTEGER,          -- of the row; NULL in rows of an older engine
    PRIMARY KEY (session_id, request_id)
) STRICT, WITHOUT ROWID"""
_UP_TO = """
SELECT session_id, request_id, digest, ts, value, checksum FROM _engine_ledger
WHERE (session_id, request_id) <= (?, ?) ORDER BY session_id DESC, request_id DESC LIMIT 1"""
_BEHIND = """
SELECT session_id, request_id, digest, ts, value, checksum FROM _engine_ledger
WHERE (session_id, request_id) > (?, ?) ORDER BY session_id, request_id LIMIT ?"""
_NEWEST = (1 << 63) - 1  # after every request

_SWEEP_COUNT = 500  # rows looked at in one group: a search through all of them would hold the loop
_NS_PER_DAY = 86_400 * 1_000_000_000


class LedgerKey(msgspec.Struct, frozen=True):
    """The client's own name for one request, and a digest of who asked for what."""

    session_id: str
    request_id: int
    digest: bytes

    @classmethod
    def of(
        cls, session_id: str, request_id: int, token_identifier: str | None, path: str, arguments: bytes
    ) -> "LedgerKey":
        who, what = (token_identifier or "").encode(), path.encode()
        # each part after its length; in one piece: 0.7 × the instructions of an update for each
        sizes = len(who).to_bytes(8), len(what).to_bytes(8), len(arguments).to_bytes(8)
        asked = b"".join((sizes[0], who, sizes[1], what, sizes[2], arguments))
        return cls(session_id, request_id, hashlib.blake2b(asked, digest_size=16).digest())


class RecordedOutcome(msgspec.Struct, frozen=True):
    ts: int
    value: bytes


_Row = tuple[str, int, bytearray, int, bytearray, int]  # as in the table


class _Seen:
    """Up to which request a client has had its answers, and since when."""

    __slots__ = ("newest_request_id", "request_id", "since_seconds")

    def __init__(self, request_id: int, since_seconds: float, newest_request_id: int) -> None:
        self.request_id, self.since_seconds = request_id, since_seconds
        self.newest_request_id = newest_request_id  # seen later than `since_seconds`


class Ledger:
    """The outcomes of one database."""

    def __init__(self, limits: Limits, row_count: int) -> None:
        self._limits = limits
        self._swept_up_to = ("", -1)  # where the search for old rows goes on
        self._seen: dict[str, _Seen] = {}  # by session id; one entry each, however much it writes
        self._row_count = row_count  # in the table, as the open group sees it
        self._durable_row_count = row_count
        self._open: dict[tuple[str, int], _Row] = {}  # of the open group, in order; by session and request id
        self._newest_request_id: dict[str, int] = {}  # by session id (invariant 4); -1: it has none
        self.lookup_count = 0  # in the table, for the open group

    @classmethod
    def open(cls, writer: WriterConnection, limits: Limits) -> "Ledger":
        writer.execute(CREATE)
        if not writer.fetch_all("SELECT 1 FROM pragma_table_info('_engine_ledger') WHERE name = 'checksum'"):
            writer.execute("ALTER TABLE _engine_ledger ADD COLUMN checksum INTEGER")
        # what keeps rows from being found, if it is damaged; 0.5 s for a million of them
        ((finding,), *_) = writer.fetch_all("PRAGMA integrity_check('_engine_ledger')")
        if finding != "ok":
            raise StorageFailed(f"the exactly-once ledger is damaged ({finding}): {DAMAGED_REMEDY}")
        count = writer.read_ledger_row_count()
        if count is None:  # an older engine did not keep it
            ((count,),) = writer.fetch_all("SELECT count(*) FROM _engine_ledger")
        return cls(limits, count)

    def lookup(self, connection: Connection, key: LedgerKey) -> RecordedOutcome | None:
        """The outcome in the table for this request (invariant 2)."""
        row = _last_up_to(connection, key.session_id, key.request_id)
        if row is None or row[:2] != (key.session_id, key.request_id):
            return None
        _, _, digest, ts, value, _ = row
        return _outcome(key, digest, ts, value)

    # -- of the group that is open

    def find(self, writer: Connection, key: LedgerKey) -> RecordedOutcome | None:
        """The outcome recorded for this request, if it was run before, or in the open group."""
        newest = self._newest_request_id.get(key.session_id)
        if newest is None:
            newest = self._note_newest(writer, key.session_id)
        if key.request_id > newest:
            return None
        row = self._open.get((key.session_id, key.request_id))
        if row is not None:
            _, _, digest, ts, value, _ = row
            return _outcome(key, digest, ts, value)
        self.lookup_count += 1
        return self.lookup(writer, key)

    def check_room(self) -> None:
        """Raises Overloaded when no more can be recorded."""
        count = self._row_count + len(self._open)
        if count >= self._limits.ledger_row_count_max:
            raise Overloaded(
                f"exactly-once ledger: {count:,} outcomes kept, {self._limits.ledger_row_count_max:,} "
                "allowed. "
                "Try again later, or raise limits.ledger_row_count_max."
            )

    def record(self, key: LedgerKey, ts: int, value: bytes) -> None:
        """Remember the outcome of a mutation that stays in the open group."""
        session_id, request_id = key.session_id, key.request_id
        checksum = _checksum_of(session_id, request_id, key.digest, ts, value)  # 0.6 µs
        # sqlite3 asks each `bytes` for an adapter, a `bytearray` not: 0.8 × the instructions of a row
        digest = bytearray(key.digest)
        self._open[session_id, request_id] = (session_id, request_id, digest, ts, bytearray(value), checksum)
        if request_id > self._newest_request_id.get(session_id, request_id):
            self._newest_request_id[session_id] = request_id

    def write(self, writer: WriterConnection) -> int:
        """Put the outcomes of the open group into its transaction; how many rows there are with them."""
        if self._open:
            writer.execute_many("INSERT INTO _engine_ledger VALUES (?, ?, ?, ?, ?, ?)", self._open.values())
            self._row_count += len(self._open)
        return self._row_count

    def keep(self) -> None:
        """The group is durable."""
        self._open.clear()
        self._durable_row_count = self._row_count

    def undo(self) -> None:
        """Nothing of the group happened. What is noted for its sessions may be too high now: that costs a look-up."""
        self._open.clear()
        self._row_count = self._durable_row_count

    def _note_newest(self, writer: Connection, session_id: str) -> int:
        """Note the newest request of a session that is not noted (any more)."""
        noted = self._newest_request_id
        if len(noted) >= self._limits.ledger_session_count_max:
            del noted[next(iter(noted))]
        self.lookup_count += 1
        row = _last_up_to(writer, session_id, _NEWEST)
        newest = row[1] if row is not None and row[0] == session_id else -1
        in_open = [request_id for session, request_id in self._open if session == session_id]
        noted[session_id] = max(newest, *in_open, -1)
        return noted[session_id]

    # -- forgetting

    def saw(self, session_id: str, request_id: int, now_seconds: float) -> None:
        """The client surely has the answers up to this request."""
        earlier = self._seen.get(session_id)
        if earlier is None:
            self._seen[session_id] = _Seen(request_id, now_seconds, request_id)
        else:
            earlier.newest_request_id = request_id

    def forget(self, connection: Connection, now_ns: int, now_seconds: float) -> bool:
        """Drop some of what invariant 3 lets go, in the transaction that is open; whether that was all of it."""
        for session_id, seen in list(self._seen.items()):
            if now_seconds - seen.since_seconds < self._limits.ledger_seconds_after_seen:
                continue
            self._delete(
                connection,
                "DELETE FROM _engine_ledger WHERE session_id = ? AND request_id <= ?",
                (session_id, seen.request_id),
            )
            if seen.newest_request_id == seen.request_id:
                del self._seen[session_id]
            else:
                self._seen[session_id] = _Seen(seen.newest_request_id, now_seconds, seen.newest_request_id)
        rows = connection.fetch_all(_BEHIND, (*self._swept_up_to, _SWEEP_COUNT))
        oldest_ts = now_ns - self._limits.ledger_days * _NS_PER_DAY
        for session_id, request_id, _, ts, *_ in map(_checked, rows):
            if ts < oldest_ts:
                self._delete(
                    connection,
                    "DELETE FROM _engine_ledger WHERE session_id = ? AND request_id = ?",
                    (session_id, request_id),
                )
        is_done = len(rows) < _SWEEP_COUNT
        self._swept_up_to = ("", -1) if is_done else (rows[-1][0], rows[-1][1])
        return is_done

    def _delete(self, connection: Connection, sql: str, parameters: tuple[str | int, ...]) -> None:
        self._row_count -= connection.execute(sql, parameters).rowcount


def _last_up_to(connection: Connection, session_id: str, request_id: int) -> Row | None:
    """The last row up to this key, in the order of keys; None if there is none.

    A row whose key is damaged still lies where it was: it is the one found here, or the next one (invariant 5).
    """
    key = (session_id, request_id)
    found = [*map(_checked, (*connection.fetch_all(_UP_TO, key), *connection.fetch_all(_BEHIND, (*key, 1))))]
    return found[0] if found and found[0][:2] <= key else None


def _checked(row: Row) -> Row:
    """Invariant 5."""
    *content, checksum = row
    if checksum not in (None, _checksum_of(*content)):
        raise StorageFailed(f"a row of the exactly-once ledger is damaged: {DAMAGED_REMEDY}")
    return row


def _checksum_of(session_id: str, request_id: int, digest: bytes, ts: int, value: bytes) -> int:
    try:
        return zlib.crc32(value, zlib.crc32(b"%b %d %d %b" % (session_id.encode(), request_id, ts, digest)))
    except (TypeError, AttributeError):  # a damaged row has any types
        return -1


def _outcome(key: LedgerKey, digest: bytes | bytearray, ts: int, value: bytes | bytearray) -> RecordedOutcome:
    """Invariant 2."""
    if digest != key.digest:
        raise RequestIdReused(
            f"request id {key.request_id} of this session was used for another request. "
            "A client must give each mutation a request id of its own."
        )
    return RecordedOutcome(ts, bytes(value))
