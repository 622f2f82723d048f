"""What a run depended on. Pure.

Invariants
  1. Every document and range that could change the run's result is here, cut to what the run really consumed.
  2. At most `range_count_max` ranges: each becomes an entry of the invalidation index.
"""

from engine.errors import LimitExceeded
from engine.ranges import IndexRange


class ReadSet:
    """Documents read by id, ranges scanned, and ranges of which only the keys were read."""

    __slots__ = ("_range_count_max", "documents", "key_ranges", "ranges")

    def __init__(self, range_count_max: int) -> None:
        self._range_count_max = range_count_max
        self.documents: set[tuple[str, str]] = set()  # (table, id), also of missing documents
        self.ranges: list[IndexRange] = []  # any write to a document inside re-runs
        self.key_ranges: list[IndexRange] = []  # only keys that come or go re-run: `count()`

    def add_document(self, table: str, document_id: str) -> None:
        self.documents.add((table, document_id))

    def add_range(self, index_range: IndexRange) -> int:
        """Add a range; the returned place is for `replace_range` while its scan goes on."""
        self._check_room()
        self.ranges.append(index_range)
        return len(self.ranges) - 1

    def replace_range(self, place: int, index_range: IndexRange) -> None:
        """Widen or narrow the range that a scan has consumed so far."""
        self.ranges[place] = index_range

    def add_key_range(self, index_range: IndexRange) -> None:
        self._check_room()
        self.key_ranges.append(index_range)

    def equals(self, other: "ReadSet") -> bool:
        """Whether both would be listed in the same places of the invalidation index."""
        return self.ranges == other.ranges and self.documents == other.documents and self.key_ranges == other.key_ranges

    def _check_room(self) -> None:
        used = len(self.ranges) + len(self.key_ranges) + 1
        if used > self._range_count_max:
            raise LimitExceeded(
                "index ranges read",
                used=used,
                allowed=self._range_count_max,
                remedy="Read one wider range, or raise limits.read_range_count_max.",
            )
