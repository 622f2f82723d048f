"""Ranks in an index: a counted skip list in a shadow table, so that whatever asks for places costs O(log n).

    level 2   ·───────── 5 ────────>h─────── 3 ──────>
    level 1   ·──── 2 ───>c─── 3 ──>h─────── 3 ──────>     · the head: it comes before every key
    the index    a    b   c   e   g   h    m    p          is not stored again

A document whose creation tick has a hash that ends in n zeros (as hexadecimal) has a *node* on each level from 1 to n.
A node counts the keys from its own up to the next node of its level, the head of a level those before its first node.
So the rank of a key is a sum of a few nodes of each level and of a few entries of the index.

Invariants
  1. The nodes follow from the keys that the index holds, not from the order in which they came and went (`_nodes_of`).
  2. `encode_key` gives keys and cuts the same order as bytes that they have as tuples.
  3. A level has a head if, and only if, it or a level above it has a node.
"""

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from engine.ranges import BYTES, HIGH, NUMBER, TEXT, IndexRange, OrderKey, after, before
from engine.schema import IndexSchema, TableSchema
from engine.storage import scans
from engine.storage.connections import Connection, Row, WriterConnection
from engine.storage.rows import quoted

_LEVEL_MAX = 8  # one in 16⁸ documents reaches it
_UNBOUNDED = 1 << 62
_HEAD = b""  # the key of the heads
_END = b"\xff"  # after all keys: each begins with the rank of a value


def count(connection: Connection, table: TableSchema, index: IndexSchema, index_range: IndexRange) -> int:
    """How many keys the range holds."""
    return rank(connection, table, index, index_range.end) - rank(connection, table, index, index_range.start)


def rank(connection: Connection, table: TableSchema, index: IndexSchema, cut: OrderKey) -> int:
    """How many keys lie before a cut."""
    sql, end = _sql(table.name, index.name), encode_key(cut)
    if end == _HEAD:
        return 0
    passed, node, position = 0, _HEAD, _position_of(())
    for level in range(_top(connection, sql), 0, -1):
        nodes = connection.fetch_all(sql.between, (level, node, end))
        passed += sum([node_count for _, _, node_count in nodes[:-1]])
        node, position, _ = nodes[-1]
    return passed + _count_entries(connection, table, index, _cut_at(position), cut)


def seek(connection: Connection, table: TableSchema, index: IndexSchema, wanted: int) -> tuple[OrderKey, int]:
    """A cut before the key of this rank, which is there, and how many keys lie in between: none, or a few."""
    sql = _sql(table.name, index.name)
    node, end, position = _HEAD, _END, _position_of(())
    for level in range(_top(connection, sql), 0, -1):
        nodes = connection.fetch_all(sql.between, (level, node, end))
        place = 0
        while wanted >= nodes[place][2]:
            wanted -= nodes[place][2]
            place += 1
        node, position, _ = nodes[place]
        end = nodes[place + 1][0] if place + 1 < len(nodes) else end
    return _cut_at(position), wanted


# -- writing


def insert(writer: WriterConnection, table: TableSchema, index: IndexSchema, key: OrderKey) -> None:
    """Count a key that the index has held since just now."""
    sql, node, key_level = _sql(table.name, index.name), encode_key(key), _level_of(key)
    top = _top(writer, sql)
    if key_level > top:
        if top:
            ((count_before,),) = writer.fetch_all(sql.sum_between, (top, _HEAD, _END))
        else:
            count_before = _count_entries(writer, table, index, before(()), after(())) - 1
        for level in range(top + 1, key_level + 1):
            writer.execute(sql.put, (level, _HEAD, _position_of(()), count_before))
    for level in range(1, key_level + 1):  # from the bottom: each level is counted by the one below
        ((next_node, next_position),) = writer.fetch_all(sql.next, (level, node)) or [(_END, None)]
        if level == 1:
            end = after(()) if next_position is None else _cut_at(next_position)
            node_count = _count_entries(writer, table, index, before(key[:-1]), end)
        else:
            ((node_count,),) = writer.fetch_all(sql.sum_between, (level - 1, node, next_node))
        writer.execute(sql.add, (1 - node_count, level, node))
        writer.execute(sql.put, (level, node, _position_of(key[:-1]), node_count))
    for level in range(key_level + 1, top + 1):
        writer.execute(sql.add, (1, level, node))


def remove(writer: WriterConnection, table: TableSchema, index: IndexSchema, key: OrderKey) -> None:
    """No longer count a key that the index has just lost."""
    sql, node, key_level = _sql(table.name, index.name), encode_key(key), _level_of(key)
    for level in range(key_level + 1, _top(writer, sql) + 1):
        writer.execute(sql.add, (-1, level, node))
    for level in range(1, key_level + 1):
        ((node_count,),) = writer.fetch_all(sql.remove, (level, node))
        writer.execute(sql.add, (node_count - 1, level, node))
    while key_level and (last := writer.fetch_all(sql.last)) and last[0][1] == _HEAD:  # invariant 3
        writer.fetch_all(sql.remove, last[0])


def build(writer: WriterConnection, table: str, index: IndexSchema, keys: Iterable[OrderKey]) -> None:
    """Make the shadow table, of all keys of the index in its order."""
    sql = _sql(table, index.name)
    writer.execute(sql.create)
    for row in _nodes_of(keys):
        writer.execute(sql.put, row)


def verify(connection: Connection, table: str, index: IndexSchema, keys: Iterable[OrderKey]) -> None:
    """Check invariant 1, given all keys of the index in its order."""
    stored = connection.fetch_all(_sql(table, index.name).all)
    assert stored == sorted(_nodes_of(keys)), f"{table}.{index.name}: invariant 1"


def sql_name(table: str, index: str) -> str:
    """The name of the shadow table, quoted: neither a table nor an index has two dots in its name."""
    return quoted(f"{table}.{index}.ranks")


def _nodes_of(keys: Iterable[OrderKey]) -> Iterator[Row]:
    """All nodes of an index with these keys, each when the next one of its level is known."""
    open_nodes = [(_HEAD, _position_of(()), 0)] * (_LEVEL_MAX + 1)  # by level: the newest, and the number at its start
    top = number = 0
    for key in keys:
        key_level = _level_of(key)
        if key_level:
            top = max(top, key_level)
            opened = (encode_key(key), _position_of(key[:-1]), number)
            for level in range(1, key_level + 1):
                node, position, start = open_nodes[level]
                yield level, node, position, number - start
                open_nodes[level] = opened
        number += 1
    for level in range(1, top + 1):
        node, position, start = open_nodes[level]
        yield level, node, position, number - start


def _level_of(key: OrderKey) -> int:
    """The highest level of a key's node; 0: it has none.

    By the tick, which nobody can choose: whoever chose the hashes of many keys could put them all on one level.
    """
    tick: Any = key[-2]
    digest = int.from_bytes(blake2b(tick.to_bytes(8), digest_size=_LEVEL_MAX // 2).digest())
    return ((digest & -digest).bit_length() - 1) // 4 if digest else _LEVEL_MAX


def _top(connection: Connection, sql: "_Sql") -> int:
    """The highest level that has a node; 0: none has."""
    found = connection.fetch_all(sql.last)
    return found[0][0] if found else 0


def _count_entries(
    connection: Connection, table: TableSchema, index: IndexSchema, start: OrderKey, end: OrderKey
) -> int:
    index_range = IndexRange(table.name, index.name, start, end)
    return scans.count(connection, table, index, index_range, limit=_UNBOUNDED)


def _position_of(prefix: OrderKey) -> bytes:
    """A node's key once more, to be read back."""
    return msgspec.msgpack.encode(prefix)


def _cut_at(position: bytes) -> OrderKey:
    return before(tuple(msgspec.msgpack.decode(position)))


# -- keys as bytes

_FLOAT = struct.Struct(">d")
_SIGN, _ALL_BITS = 1 << 63, (1 << 64) - 1


def encode_key(key: OrderKey) -> bytes:
    """A key or a cut (invariant 2)."""
    parts: list[bytes] = []
    for value_rank, value in zip(key[:-1:2], key[1:-1:2], strict=True):
        parts.append(value_rank.to_bytes())  # type: ignore[attr-defined]  # a rank stands at each even place
        if value_rank == NUMBER:
            parts.append(_encode_number(value))
        elif value_rank in (TEXT, BYTES):
            raw: bytes = value.encode() if isinstance(value, str) else value  # type: ignore[assignment]
            parts.append(raw.replace(b"\0", b"\0\xff") + b"\0\0")  # a shorter one comes first
    if key[-1] == HIGH:
        parts.append(_END)
    return b"".join(parts)


def _encode_number(number: Any) -> bytes:
    """The nearest double, whose bits are made to sort, then what an int is beyond it (up to 512 either way)."""
    double = float(number) + 0.0
    bits = int.from_bytes(_FLOAT.pack(double))
    rest = 0 if isinstance(number, float) else number - int(double)
    return (bits ^ (_ALL_BITS if bits & _SIGN else _SIGN)).to_bytes(8) + (rest + 0x8000).to_bytes(2)


# -- SQL; names come from the checked schema, values are parameters


class _Sql(NamedTuple):
    create: str
    all: str
    last: str  # level and key of the last node on the highest level
    between: str  # of one level
    sum_between: str
    next: str  # after a key, on one level
    put: str
    remove: str  # gives what it counted
    add: str  # to what the last node up to a key counts, on one level


@lru_cache(maxsize=1024)
def _sql(table: str, index: str) -> _Sql:
    name = sql_name(table, index)
    between = f'FROM {name} WHERE "level" = ? AND "key" >= ? AND "key" < ?'
    return _Sql(
        create=f'CREATE TABLE {name} ("level" INTEGER NOT NULL, "key" BLOB NOT NULL, "position" BLOB NOT NULL, '
        '"count" INTEGER NOT NULL, PRIMARY KEY ("level", "key")) STRICT, WITHOUT ROWID',
        all=f'SELECT * FROM {name} ORDER BY "level", "key"',  # noqa: S608
        last=f'SELECT "level", "key" FROM {name} ORDER BY "level" DESC, "key" DESC LIMIT 1',  # noqa: S608
        between=f'SELECT "key", "position", "count" {between} ORDER BY "key"',
        sum_between=f'SELECT sum("count") {between}',
        next=f'SELECT "key", "position" FROM {name} WHERE "level" = ? AND "key" > ? ORDER BY "key" LIMIT 1',  # noqa: S608
        put=f"INSERT INTO {name} VALUES (?, ?, ?, ?)",  # noqa: S608
        remove=f'DELETE FROM {name} WHERE "level" = ? AND "key" = ? RETURNING "count"',  # noqa: S608
        add=f'UPDATE {name} SET "count" = "count" + ?1 WHERE "level" = ?2 AND '  # noqa: S608
        f'"key" = (SELECT max("key") FROM {name} WHERE "level" = ?2 AND "key" <= ?3)',
    )
