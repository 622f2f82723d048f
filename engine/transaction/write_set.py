"""What a commit changed. Pure.

Invariants
  1. One entry a document: its first old state and its last new one. A document made and deleted in between is absent.
  2. A write that leaves the row as it was never gets here (`transaction.py` compares the stored forms).
"""

from collections.abc import Iterator

import msgspec

from engine.schema import Table, TableSchema
from engine.storage.rows import Stored


class Write(msgspec.Struct, frozen=True):
    """One changed document; `old` is None for an insert, `new` for a delete."""

    table: TableSchema
    document_id: str
    old: Table | None
    new: Table | None
    stored: Stored | None = None  # the row of `new`, where it is known


class WriteSet:
    """The changed documents of one mutation, or of all mutations of one group commit."""

    __slots__ = ("_by_document",)

    def __init__(self) -> None:
        self._by_document: dict[tuple[str, str], Write] = {}

    def add(self, write: Write) -> None:
        place = (write.table.name, write.document_id)
        earlier = self._by_document.pop(place, None)
        if earlier is not None:
            write = Write(write.table, write.document_id, earlier.old, write.new, write.stored)
        if write.old is not None or write.new is not None:
            self._by_document[place] = write

    def merge(self, other: "WriteSet") -> None:
        """Add all that a later mutation wrote."""
        for place, write in other._by_document.items():
            if place in self._by_document:
                self.add(write)
            else:
                self._by_document[place] = write

    def __iter__(self) -> Iterator[Write]:
        return iter(self._by_document.values())

    def __len__(self) -> int:
        return len(self._by_document)
