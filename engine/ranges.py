"""Ranges of index keys, and the order they live in. Pure.

An *order key* is a flat tuple with two entries a column, `(rank, value, rank, value, …)`: flat tuples compare and hash
fastest, and the first `2 * n` entries are the key of an n-column prefix. The last column of every index is the
creation tick of the document (`ids.py`), which makes each full key unique. A *cut* is a place between keys: just
before or just after all keys that begin with some prefix.

Invariants
  1. Order keys compare in Python exactly as SQLite orders the same columns: null, numbers, text by code point, bytes.
  2. A range is half-open: it holds the keys `start <= key < end`; `start` and `end` are cuts.
  3. A full key never equals a cut: a cut ends in LOW or HIGH, a full key in MIDDLE.
"""

from collections.abc import Sequence

import msgspec

Scalar = None | bool | int | float | str | bytes
OrderKey = tuple[object, ...]

LOW, NULL, NUMBER, TEXT, BYTES, MIDDLE, HIGH = -1, 0, 1, 2, 3, 5, 9
_RANK = {type(None): NULL, bool: NUMBER, int: NUMBER, float: NUMBER, str: TEXT, bytes: BYTES}

BY_CREATION_TIME = "by_creation_time"  # every table has this index: its rows as they were made


def key_prefix(values: Sequence[Scalar]) -> OrderKey:
    """The flat key of the first columns of an index."""
    flat: list[object] = []
    for value in values:
        flat += (_RANK[type(value)], 0 if value is None else value)
    return tuple(flat)


def full_key(values: Sequence[Scalar], tick: int) -> OrderKey:
    """The key of one document in an index: its column values, then its creation tick."""
    return (*key_prefix(values), NUMBER, tick, MIDDLE)


def before(prefix: OrderKey) -> OrderKey:
    """The cut just before all keys that begin with `prefix`."""
    return (*prefix, LOW)


def after(prefix: OrderKey) -> OrderKey:
    """The cut just after all keys that begin with `prefix`."""
    return (*prefix, HIGH)


def columns_of(cut: OrderKey) -> tuple[list[Scalar], bool]:
    """The column values that a cut names, and whether it lies after (else before) the keys that begin with them."""
    values = [None if rank == NULL else value for rank, value in zip(cut[:-1:2], cut[1:-1:2], strict=True)]
    return values, cut[-1] == HIGH  # type: ignore[return-value]  # a flat key holds scalars at odd places


class IndexRange(msgspec.Struct, frozen=True):
    """Some keys of one index: `start <= key < end` (invariant 2)."""

    table: str
    index: str
    start: OrderKey
    end: OrderKey

    def holds(self, key: OrderKey) -> bool:
        return self.start <= key < self.end

    @property
    def prefix(self) -> OrderKey:
        """The columns that are equal for every key in the range: what the invalidation index hashes."""
        start, end = self.start, self.end
        size_max = min(len(start), len(end)) - 1
        for size in range(0, size_max, 2):
            if start[size] != end[size] or start[size + 1] != end[size + 1]:
                return start[:size]
        return start[:size_max]

    def ahead_of(self, key: OrderKey, *, descending: bool) -> "IndexRange":
        """The part that a scan passes before it comes to this full key."""
        if descending:
            return IndexRange(self.table, self.index, after(key[:-1]), self.end)
        return IndexRange(self.table, self.index, self.start, before(key[:-1]))

    def rest_from(self, key: OrderKey, *, descending: bool) -> "IndexRange":
        """The part that a scan reads from this full key on."""
        if descending:
            return IndexRange(self.table, self.index, self.start, after(key[:-1]))
        return IndexRange(self.table, self.index, before(key[:-1]), self.end)

    def text(self, columns: Sequence[str]) -> str:
        """For people: `chat.by_game: game_id='…', created_at from 5.0`, given the names of the index's columns."""
        equal, _ = columns_of((*self.prefix, LOW))
        parts = [f"{column}={value!r}" for column, value in zip(columns, equal, strict=False)]
        for cut, words in ((self.start, ("from", "after")), (self.end, ("before", "up to"))):
            values, is_after = columns_of(cut)
            named = [f"{column} {value!r}" for column, value in zip(columns, values, strict=False)][len(equal) :]
            if named:
                parts.append(f"{words[is_after]} {', '.join(named)}")
        return f"{self.table}.{self.index}: {', '.join(parts) or 'all'}"

    def cut_at(self, last_key: OrderKey, *, descending: bool) -> "IndexRange":
        """The part that a scan consumed when `last_key` (a full key) was the last row it looked at."""
        if descending:
            return IndexRange(self.table, self.index, before(last_key[:-1]), self.end)
        return IndexRange(self.table, self.index, self.start, after(last_key[:-1]))


def range_under(table: str, index: str, prefix: OrderKey) -> IndexRange:
    """All keys that begin with the prefix."""
    return IndexRange(table, index, before(prefix), after(prefix))
