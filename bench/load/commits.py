"""The raw limit of writing: the SQLite statements of a mutation in grouped commits, and no more.

One connection and one thread; no functions, no sockets. WAL and `synchronous=FULL` as in the engine, on a copy of the
database that the load left: the same tables, indexes and rows.

Invariant: a step of `progress_updates` runs the statements that the engine runs for one
`watch_progress:update_progress`, in its order, a step of `transfers` those for one `accounts:transfer`; once a group
come BEGIN IMMEDIATE, the row with the engine's timestamps, and COMMIT.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import msgspec

from bench.load.figures import percentile

_LEDGER_LOOKUP = "SELECT digest, ts, value FROM _engine_ledger WHERE session_id = ? AND request_id = ?"
_LEDGER_INSERT = "INSERT INTO _engine_ledger VALUES (?, ?, ?, ?, ?, NULL)"
_BY_TOKEN = (
    "SELECT _creation, id, token_identifier, name, avatar, role, permissions FROM users"
    ' INDEXED BY "users.by_token_identifier" WHERE token_identifier = ? ORDER BY _creation LIMIT'
)
_USER_BY_TOKEN = f"{_BY_TOKEN} 32"  # where a policy may hide rows, a chunk is asked for
_VIEWER_BY_TOKEN = f"{_BY_TOKEN} 2"  # by whom policies judge
_CONTENT_BY_ID = "SELECT _creation, id, title, kind, duration_seconds FROM content WHERE _creation = ? AND id = ?"
_PROGRESS = (
    "SELECT _creation, id, user_id, content_id, position_seconds, duration_seconds, completion_percentage,"
    " last_watched_at, device_type, completed FROM user_watch_progress"
)
_PROGRESS_BY_PAIR = (
    f'{_PROGRESS} INDEXED BY "user_watch_progress.by_user_content"'
    " WHERE user_id = ? AND content_id = ? ORDER BY _creation LIMIT 32"
)
_PROGRESS_BY_ID = f"{_PROGRESS} WHERE _creation = ? AND id = ?"
_PROGRESS_UPDATE = (
    "UPDATE user_watch_progress SET position_seconds = ?, completion_percentage = ?, last_watched_at = ?"
    " WHERE _creation = ? AND id = ?"
)
_ACCOUNT_BY_ID = "SELECT _creation, id, balance FROM accounts WHERE _creation = ? AND id = ?"
_ACCOUNT_UPDATE = "UPDATE accounts SET balance = ? WHERE _creation = ? AND id = ?"
_META_UPDATE = "UPDATE _engine_meta SET ts = ?, tick = ?"
_WAL_PAGE_COUNT_MAX = 1_024  # then a checkpoint, as in the engine


class RawCommits(msgspec.Struct, frozen=True):
    """What bare grouped commits came to."""

    per_second: float  # mutations
    p50_ms: float  # from BEGIN until a group is durable
    p99_ms: float


Mutations = Callable[[sqlite3.Connection], Iterator[None]]  # each step runs the statements of one mutation


def raw_commits(database: Path, group_count: int, seconds: float, mutations_on: Mutations) -> RawCommits:
    """Commit groups of so many mutations for so long."""
    connection = sqlite3.connect(database, isolation_level=None, cached_statements=512)
    for pragma in ("journal_mode = WAL", "synchronous = FULL", f"wal_autocheckpoint = {_WAL_PAGE_COUNT_MAX}"):
        connection.execute(f"PRAGMA {pragma}")
    mutations = mutations_on(connection)
    milliseconds: list[float] = []
    deadline = time.perf_counter() + seconds
    while (began := time.perf_counter()) < deadline:
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(group_count):
            next(mutations)
        connection.execute(_META_UPDATE, (time.time_ns(), time.time_ns() // 244))
        connection.execute("COMMIT")
        milliseconds.append(1_000 * (time.perf_counter() - began))
    connection.close()
    per_second = 1_000 * group_count * len(milliseconds) / sum(milliseconds)
    return RawCommits(per_second, percentile(milliseconds, 50), percentile(milliseconds, 99))


def progress_updates(connection: sqlite3.Connection) -> Iterator[None]:
    """For one user after the other."""
    rows = connection.execute(
        "SELECT token_identifier, user_id, content_id FROM user_watch_progress JOIN users ON users.id = user_id"
    ).fetchall()
    session_id = f"{time.time_ns():032x}"
    execute = connection.execute
    for request_id in count():
        token_identifier, user_id, content_id = rows[request_id % len(rows)]
        execute(_LEDGER_LOOKUP, (session_id, request_id)).fetchall()
        execute("SAVEPOINT run")
        execute(_USER_BY_TOKEN, (token_identifier,)).fetchall()
        execute(_CONTENT_BY_ID, (_tick_of(content_id), content_id)).fetchall()
        ((tick, document_id, *_),) = execute(_PROGRESS_BY_PAIR, (user_id, content_id)).fetchall()
        execute(_VIEWER_BY_TOKEN, (token_identifier,)).fetchall()
        for _ in ("for the policy", "for the write"):
            execute(_PROGRESS_BY_ID, (tick, document_id)).fetchall()
        position = float(request_id % 3_600)
        execute(_PROGRESS_UPDATE, (position, position / 36, time.time() * 1_000, tick, document_id))
        result = b'"' + document_id.encode() + b'"'
        execute(_LEDGER_INSERT, (session_id, request_id, bytes(16), time.time_ns(), result))
        execute("RELEASE run")
        yield


def transfers(connection: sqlite3.Connection) -> Iterator[None]:
    """From one account to the next."""
    ids = [row[0] for row in connection.execute("SELECT id FROM accounts").fetchall()]
    session_id = f"{time.time_ns():032x}"
    execute = connection.execute
    for request_id in count():
        pair = [ids[request_id % len(ids)], ids[(request_id + 1) % len(ids)]]
        execute(_LEDGER_LOOKUP, (session_id, request_id)).fetchall()
        execute("SAVEPOINT run")
        for _ in ("by the function", "for the write"):
            accounts = [
                execute(_ACCOUNT_BY_ID, (_tick_of(document_id), document_id)).fetchone() for document_id in pair
            ]
        for (tick, document_id, balance), change in zip(accounts, (-1, 1), strict=True):
            execute(_ACCOUNT_UPDATE, (balance + change, tick, document_id))
        execute(_LEDGER_INSERT, (session_id, request_id, bytes(16), time.time_ns(), b"null"))
        execute("RELEASE run")
        yield


def _tick_of(document_id: str) -> int:
    return int(document_id[4:15], 32)
