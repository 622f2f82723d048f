"""Counts and sums by key: a shadow table for each aggregate, with one row for each *cell*.

    "stream_sessions.viewers.totals"    key TEXT PRIMARY KEY   count   sum_watch_seconds
                                        ["3v1k…",1]            41      51200

The key is a JSON array of the column values, so that other programs can read it. `transaction/totals.py` says which
cells a write changes.

Invariants
  1. A cell holds the count and the sums of the live documents that have its key; one without documents has no row.
  2. Values that are equal in the order of `ranges.py` (1 and 1.0, true and 1) share a cell; all others differ as text.
  3. A sum is exact, or the write that would take it beyond 64 bits fails (TotalOverflow).
"""

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from math import isinf
from typing import NamedTuple

import msgspec

from engine.errors import TotalOverflow
from engine.ranges import NULL, OrderKey
from engine.schema import AggregateSchema, Table
from engine.storage.connections import Connection, WriterConnection
from engine.storage.rows import quoted
from engine.values.wire import INT64_MAX, INT64_MIN

Totals = tuple[int, ...]  # the count, then the sums

_CHUNK_DOCUMENT_COUNT = 10_000  # counted together in memory


def read(connection: Connection, table: str, aggregate: AggregateSchema, key: OrderKey) -> Totals:
    """The totals of one cell: one look-up."""
    rows = connection.fetch_all(_statements(table, aggregate).read, (_text_of(key),))
    return rows[0] if rows else (0,) * (1 + len(aggregate.sums))


def add(writer: WriterConnection, table: str, aggregate: AggregateSchema, key: OrderKey, changes: Totals) -> None:
    """Change one cell by these amounts, the count's first. Raises TotalOverflow."""
    statements, text = _statements(table, aggregate), _text_of(key)
    while True:
        # the difference of two 64-bit numbers may need more: it is then added in parts, on the way to what it makes
        parts = [max(INT64_MIN, min(change, INT64_MAX)) for change in changes]
        try:
            ((count,),) = writer.fetch_all(statements.add, (text, *parts))
        except sqlite3.IntegrityError as error:  # SQLite made a REAL of the sum, which the column does not hold
            field = str(error).rpartition(".sum_")[2]
            raise TotalOverflow(table, aggregate.name, field) from error
        changes = tuple([change - part for change, part in zip(changes, parts, strict=True)])
        if not any(changes):
            break
    assert count >= 0, f"{table}.{aggregate.name} {text}: {count} documents"
    if count == 0:
        writer.execute(statements.remove, (text,))


def build(writer: WriterConnection, table: str, aggregate: AggregateSchema, documents: Iterator[Table]) -> None:
    """Make the shadow table, of the live documents that are there."""
    columns = "".join(f", {quoted(name)} INTEGER NOT NULL" for name in _columns(aggregate))
    name = sql_name(table, aggregate.name)
    writer.execute(f'CREATE TABLE {name} ("key" TEXT PRIMARY KEY{columns}) STRICT, WITHOUT ROWID')
    while chunk := list(islice(documents, _CHUNK_DOCUMENT_COUNT)):
        for key, totals in _recount(aggregate, chunk).items():
            add(writer, table, aggregate, key, totals)


def verify(connection: Connection, table: str, aggregate: AggregateSchema, documents: Iterable[Table]) -> None:
    """Check invariant 1 by counting all live documents again."""
    columns = ", ".join(map(quoted, ("key", *_columns(aggregate))))
    stored = connection.fetch_all(f"SELECT {columns} FROM {sql_name(table, aggregate.name)}")  # noqa: S608 - names were checked
    counted = {_text_of(key): totals for key, totals in _recount(aggregate, documents).items()}
    assert {key: tuple(totals) for key, *totals in stored} == counted, f"{table}.{aggregate.name}: invariant 1"


def sql_name(table: str, aggregate: str) -> str:
    """The name of the shadow table, quoted: neither a table nor an index has two dots in its name."""
    return quoted(f"{table}.{aggregate}.totals")


def _recount(aggregate: AggregateSchema, documents: Iterable[Table]) -> dict[OrderKey, Totals]:
    zeros = (0,) * (1 + len(aggregate.sums))
    totals_by_key: dict[OrderKey, Totals] = defaultdict(lambda: zeros)
    for document in documents:
        key = aggregate.key_of(document)
        count, *sums = totals_by_key[key]
        amounts = aggregate.amounts_of(document)
        totals_by_key[key] = (count + 1, *[total + amount for total, amount in zip(sums, amounts, strict=True)])
    return totals_by_key


# -- SQL; names come from the checked schema, values are parameters


class _Statements(NamedTuple):
    read: str
    add: str
    remove: str


@lru_cache(maxsize=1024)
def _statements(table: str, aggregate: AggregateSchema) -> _Statements:
    name, columns = sql_name(table, aggregate.name), [quoted(column) for column in _columns(aggregate)]
    values = ", ".join("?" * (1 + len(columns)))
    changes = ", ".join(f"{column} = {column} + excluded.{column}" for column in columns)
    return _Statements(
        read=f'SELECT {", ".join(columns)} FROM {name} WHERE "key" = ?',  # noqa: S608
        add=f"INSERT INTO {name} VALUES ({values}) "  # noqa: S608
        f'ON CONFLICT ("key") DO UPDATE SET {changes} RETURNING "count"',
        remove=f'DELETE FROM {name} WHERE "key" = ?',  # noqa: S608
    )


def forget_total_statements() -> None:
    """Those of a schema that is gone, which they would keep."""
    _statements.cache_clear()


def _columns(aggregate: AggregateSchema) -> list[str]:
    return ["count", *(f"sum_{field}" for field in aggregate.sums)]


def _text_of(key: OrderKey) -> str:
    """Invariant 2."""
    return f"[{','.join([_json_of(rank, value) for rank, value in zip(key[::2], key[1::2], strict=True)])}]"


def _json_of(rank: object, value: object) -> str:
    if rank == NULL:
        return "null"
    match value:
        case str():
            return msgspec.json.encode(value).decode()
        case bytes():
            return f'{{"hex":"{value.hex()}"}}'
        case float() if isinf(value):
            return "9e999" if value > 0 else "-9e999"
        case float() if not (value.is_integer() and INT64_MIN <= value <= INT64_MAX):
            return repr(value)
    return str(int(value))  # type: ignore[call-overload]  # of a number
