"""What a commit changed. Pure.

Invariants
  1. One entry a document: its first old state and its last new one. A document that one mutation made and deleted is
     absent; one that a mutation made and a later one deleted has neither: the commit is there all the same, with its
     timestamp and its outcomes.
  2. A write that leaves the row as it was never gets here (`transaction.py` compares the stored forms).
"""

from collections.abc import Iterator

import msgspec

from engine.schema import Table, TableSchema


class Write(msgspec.Struct, frozen=True):
    """One changed document; `old` is None if it was not there before, `new` if it is not there after."""

    table: TableSchema
    document_id: str
    old: Table | None
    new: Table | None


class WriteSet:
    """The changed documents of one mutation, or of all mutations of one group commit."""

    __slots__ = ("_by_document",)

    def __init__(self, by_document: dict[tuple[str, str], Write] | None = None) -> None:
        self._by_document = by_document if by_document is not None else {}

    def add(self, write: Write) -> None:
        """Add what the same mutation wrote next."""
        write = self._put(write)
        if write.old is None and write.new is None:
            del self._by_document[write.table.name, write.document_id]

    def merge(self, other: "WriteSet") -> None:
        """Add all that a later mutation wrote."""
        for write in other:
            self._put(write)

    def _put(self, write: Write) -> Write:
        place = (write.table.name, write.document_id)
        earlier = self._by_document.pop(place, None)
        if earlier is not None:
            write = Write(write.table, write.document_id, earlier.old, write.new)
        self._by_document[place] = write
        return write

    def copy(self) -> "WriteSet":
        """The state to return to when a nested mutation fails."""
        return WriteSet(dict(self._by_document))

    def __iter__(self) -> Iterator[Write]:
        return iter(self._by_document.values())

    def __len__(self) -> int:
        return len(self._by_document)
