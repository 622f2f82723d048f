"""What a run depended on. Pure.

Invariants
  1. Every document, range and search that could change the run's result is here, cut to what the run really consumed.
  2. At most `range_count_max` ranges and searches: each becomes an entry of the invalidation index.
"""

from typing import NamedTuple

import msgspec

from engine.errors import LimitExceeded
from engine.ranges import IndexRange, OrderKey, Scalar
from engine.transaction.moments import MovingRead
from engine.values.words import Terms


class SearchRead(msgspec.Struct, frozen=True):
    """What a search depends on: every document that matches, or did."""

    table: str
    index: str
    filters: tuple[tuple[str, Scalar], ...]  # (field, value in its column), in the order of the declaration
    terms: Terms


class CellEntry(NamedTuple):
    """One number of one cell of an aggregate: its count, or one of its sums."""

    table: str
    aggregate: str
    key: OrderKey
    field: str | None  # whose sum; None: the count


class ReadSet:
    """Documents read by id, ranges scanned, ranges of which only the keys were read, and searches."""

    __slots__ = (
        "_range_count",
        "_range_count_max",
        "cells",
        "documents",
        "key_ranges",
        "moving",
        "ranges",
        "rerun_at_ms",
        "searches",
    )

    def __init__(self, range_count_max: int) -> None:
        self._range_count_max = range_count_max
        self._range_count = 0  # and searches; see `take_room`
        self.documents: set[tuple[str, str]] = set()  # (table, id), also of missing documents
        self.cells: set[CellEntry] = set()  # only another number re-runs
        self.ranges: list[IndexRange] = []  # any write to a document inside re-runs
        self.key_ranges: list[IndexRange] = []  # only keys that come or go re-run: `count()`
        self.searches: list[SearchRead] = []  # any write to a document that matches, or did, re-runs
        self.moving: list[MovingRead] = []  # scans of ranges that move with time, until `depend_on_time` looks at them
        self.rerun_at_ms: float | None = None  # when the result changes though nothing is written

    def add_document(self, table: str, document_id: str) -> None:
        self.documents.add((table, document_id))

    def add_cell(self, entry: CellEntry) -> None:
        self.cells.add(entry)

    def add_range(self, index_range: IndexRange) -> int:
        """Add a range; the returned place is for `replace_range` while its scan goes on."""
        self.take_room()
        self.ranges.append(index_range)
        return len(self.ranges) - 1

    def replace_range(self, place: int, index_range: IndexRange) -> None:
        """Widen or narrow the range that a scan has consumed so far."""
        self.ranges[place] = index_range

    def add_key_range(self, index_range: IndexRange) -> None:
        self.take_room()
        self.key_ranges.append(index_range)

    def add_search(self, search: SearchRead) -> None:
        self.take_room()
        self.searches.append(search)

    def rerun_by(self, when_ms: float) -> None:
        """The result is true until then at most."""
        self.rerun_at_ms = when_ms if self.rerun_at_ms is None else min(self.rerun_at_ms, when_ms)

    def fresh(self) -> "ReadSet":
        """An empty one, with the room left here: what a nested query reads is told apart from its caller's reads."""
        fresh = ReadSet(self._range_count_max)
        fresh._range_count = self._range_count
        return fresh

    def merge(self, other: "ReadSet") -> None:
        """Depend on all that the other one does, too: one that `fresh` made here, so there is room for it."""
        for read in other.moving:
            place = None if read.place is None else read.place + len(self.ranges)
            self.moving.append(msgspec.structs.replace(read, place=place))
        if other.rerun_at_ms is not None:
            self.rerun_by(other.rerun_at_ms)
        self.documents |= other.documents
        self.cells |= other.cells
        self.ranges += other.ranges
        self.key_ranges += other.key_ranges
        self.searches += other.searches
        self._range_count = other._range_count

    def equals(self, other: "ReadSet") -> bool:
        """Whether both would be listed in the same places of the invalidation index."""
        return (
            self.ranges == other.ranges
            and self.documents == other.documents
            and self.cells == other.cells
            and self.key_ranges == other.key_ranges
            and self.searches == other.searches
        )

    def take_room(self) -> None:
        """One range or search more is read."""
        if self._range_count >= self._range_count_max:
            raise LimitExceeded(
                "index ranges read",
                used=self._range_count + 1,
                allowed=self._range_count_max,
                remedy="Read one wider range, or raise limits.read_range_count_max.",
            )
        self._range_count += 1


class UntrackedReads(ReadSet):
    """Of a mutation: nobody asks what it depended on, but its ranges and searches are as many at most."""

    __slots__ = ()

    def __init__(self, range_count_max: int) -> None:
        self._range_count_max = range_count_max
        self._range_count = 0
        self.rerun_at_ms = None

    def add_document(self, table: str, document_id: str) -> None:
        pass

    def add_cell(self, entry: CellEntry) -> None:
        pass

    def add_range(self, index_range: IndexRange) -> int:
        self.take_room()
        return 0

    def add_key_range(self, index_range: IndexRange) -> None:
        self.take_room()

    def add_search(self, search: SearchRead) -> None:
        self.take_room()
