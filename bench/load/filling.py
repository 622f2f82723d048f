"""Large tables, made quickly: rows by plain SQL into a database that no engine has open.

Invariant: a row is stored as the engine would store it; its id says its table and its creation tick, which is older
than all that the engine gave out. For tables that have nothing beside their indexes: no total, no search, no rule.
"""

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random

from engine.ids import TICKS_PER_MS, make_id, table_tag

Value = str | float | int | None
_AGE_MS = 3_600_000
_SEED = 1


def fill(database: Path, table: str, columns: str, rows: Iterable[tuple[Value, ...]]) -> list[str]:
    """Insert rows with these columns (`"a, b"`); their ids, in order."""
    ids: list[str] = []

    def complete() -> Iterator[tuple[Value, ...]]:
        tag, randomness = table_tag(table), Random(_SEED)
        first_tick = int((time.time() * 1_000 - _AGE_MS) * TICKS_PER_MS)
        for tick, row in enumerate(rows, first_tick):
            document_id = make_id(tag, tick, randomness.randbytes(9))
            ids.append(document_id)
            yield tick, document_id, *row

    marks = ", ".join("?" * (3 + columns.count(",")))
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("PRAGMA cache_size = -1000000")  # kB: the indexes are filled in no order
        connection.executemany(f"INSERT INTO {table} (_creation, id, {columns}) VALUES ({marks})", complete())
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return ids
