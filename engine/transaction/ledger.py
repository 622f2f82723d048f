"""(session id, request id) → outcome, in the same commit as the writes: what makes a resent mutation apply once.

Invariants
  1. A row is in the same SQLite transaction as the effects of its mutation; only mutations that wrote have one.
  2. A key answers only the identity and arguments that it was recorded with; another asker is refused.
  3. Rows go `ledger_seconds_after_seen` after the client surely saw the answer, else after `ledger_days`.
"""

import hashlib

import msgspec

from engine.errors import Overloaded, RequestIdReused
from engine.limits import Limits
from engine.storage.connections import Connection

CREATE = """
CREATE TABLE IF NOT EXISTS _engine_ledger (
    session_id TEXT NOT NULL,
    request_id INTEGER NOT NULL,
    digest BLOB NOT NULL,      -- of who asked for what
    ts INTEGER NOT NULL,       -- commit timestamp, ns
    value BLOB NOT NULL,       -- the result as JSON
    PRIMARY KEY (session_id, request_id)
) STRICT, WITHOUT ROWID"""

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
        digest = hashlib.blake2b(digest_size=16)
        for part in ((token_identifier or "").encode(), path.encode(), arguments):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
        return cls(session_id, request_id, digest.digest())


class RecordedOutcome(msgspec.Struct, frozen=True):
    ts: int
    value: bytes


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
        self._row_count = row_count  # exact at start; a group that is rolled back leaves it a little too high

    @classmethod
    def open(cls, writer: Connection, limits: Limits) -> "Ledger":
        writer.execute(CREATE)
        ((count,),) = writer.fetch_all("SELECT count(*) FROM _engine_ledger")
        return cls(limits, count)

    def lookup(self, connection: Connection, key: LedgerKey) -> RecordedOutcome | None:
        """The outcome recorded for this request, if it was committed before (invariant 2)."""
        rows = connection.fetch_all(
            "SELECT digest, ts, value FROM _engine_ledger WHERE session_id = ? AND request_id = ?",
            (key.session_id, key.request_id),
        )
        if not rows:
            return None
        ((digest, ts, value),) = rows
        if digest != key.digest:
            raise RequestIdReused(
                f"request id {key.request_id} of this session was used for another request. "
                "A client must give each mutation a request id of its own."
            )
        return RecordedOutcome(ts, value)

    def record(self, connection: Connection, key: LedgerKey, ts: int, value: bytes) -> None:
        """Remember the outcome in the transaction that is open."""
        if self._row_count >= self._limits.ledger_row_count_max:
            raise Overloaded(
                f"exactly-once ledger: {self._row_count:,} outcomes kept, {self._limits.ledger_row_count_max:,} "
                "allowed. "
                "Try again later, or raise limits.ledger_row_count_max."
            )
        connection.execute(
            "INSERT INTO _engine_ledger VALUES (?, ?, ?, ?, ?)",
            (key.session_id, key.request_id, key.digest, ts, value),
        )
        self._row_count += 1

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
        rows = connection.fetch_all(
            "SELECT session_id, request_id, ts FROM _engine_ledger "
            "WHERE (session_id, request_id) > (?, ?) ORDER BY session_id, request_id LIMIT ?",
            (*self._swept_up_to, _SWEEP_COUNT),
        )
        oldest_ts = now_ns - self._limits.ledger_days * _NS_PER_DAY
        for session_id, request_id, ts in rows:
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
