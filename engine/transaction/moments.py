"""When a range that moves with time changes by time alone.

A document falls out of a lower bound that moves up, or comes under an upper one, at an exact moment: the first such
moment is known from the document next to the bound. A live query runs again then, and not before. When that document
moves away meanwhile the moment comes for nothing, once; when another one comes before it, it was written into the range
up to the first one, and the query runs again anyway.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from engine.ids import TICKS_PER_MS
from engine.ranges import IndexRange, after, before
from engine.schema import IndexSchema, Table

if TYPE_CHECKING:
    from engine.transaction.reading import ReadTransaction


class MovingBound(msgspec.Struct, frozen=True):
    """A bound of a scan that moves with time: now less `ago_ms`."""

    name: str  # gt, gte, lt or lte
    ago_ms: float
    column: int  # the bounded one, in the index

    @property
    def is_lower(self) -> bool:
        return self.name in ("gt", "gte")

    def moment_for(self, value: Any) -> float | None:
        """The first `now`, in ms, at which a document with this value is on the other side of the bound.

        None: never. No time reaches what is infinite, nor a text in a field that may be a number as well.
        """
        if not isinstance(value, int | float) or math.isinf(value):
            return None
        now: float = value + self.ago_ms
        is_enough_to_reach = self.name in ("gt", "lte")
        while not (now - self.ago_ms > value or (is_enough_to_reach and now - self.ago_ms == value)):
            now = math.nextafter(now, math.inf)
        return now


class MovingRead(msgspec.Struct, frozen=True):
    """A scan of a range that moves."""

    document_type: type[Table]
    index: IndexSchema
    whole: IndexRange
    bounds: tuple[MovingBound, ...]
    place: int | None  # of what it consumed, among the ranges of the read set; None: all of it


def depend_on_time(transaction: "ReadTransaction") -> None:
    """Add to the read set when what the run read changes by time alone; at its end, when it is known what it read."""
    read_set = transaction.read_set
    moving, read_set.moving = read_set.moving, []
    for read in moving:
        consumed = read.whole if read.place is None else read_set.ranges[read.place]
        for bound in read.bounds:
            for region in _regions(bound, read.whole, consumed):
                _meet_next(transaction, read, bound, region)


def _regions(bound: MovingBound, whole: IndexRange, consumed: IndexRange) -> Iterator[IndexRange]:
    """Where the document is that the bound meets next: the first one inside of a lower bound, or above an upper one."""
    if bound.is_lower:
        yield consumed
    elif consumed.end == whole.end:
        yield IndexRange(whole.table, whole.index, whole.end, after(whole.end[: 2 * bound.column]))


def _meet_next(transaction: "ReadTransaction", read: MovingRead, bound: MovingBound, region: IndexRange) -> None:
    read_set = transaction.read_set
    found = transaction.scan(read.document_type, read.index, region, descending=False, limit=1)
    if not found:
        read_set.add_range(region)
        return
    key = read.index.key_of(found[0])
    ahead = IndexRange(region.table, region.index, region.start, before(key[:-1]))
    if ahead.start < ahead.end:
        read_set.add_range(ahead)
    value: Any = key[2 * bound.column + 1]
    is_tick = bound.column == len(read.index.fields)
    moment = bound.moment_for(value / TICKS_PER_MS if is_tick else value)
    if moment is not None:
        read_set.rerun_by(moment)
