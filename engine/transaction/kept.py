"""Documents and short scans that were read or written lately: what SQLite would give for them now, without asking it.

There is one for each of two states: what the writer sees, its uncommitted writes included, and what is published. The
one is told of each write (`wrote`) and of each that is undone (`forget`), the other of each commit (`follow`).

Invariants
  1. What `get` and `find` give is what SQLite would give on that connection, in the same order. Or they give None.
  2. Each step that adds something is one assignment of a whole: a run may be stopped between any two. What it has half
     done with a write is undone with the write.
  3. At most `kept_document_count_max` documents and as many scans, of at most SCAN_COUNT_MAX documents each. What came
     first goes first.

A scan is kept as the ids of the first or the last documents under a prefix of an index. A write that leaves the key
of its document as it is touches none; one that changes it is spliced into those that it leaves and enters.

Why: with it a mutation that reads and writes two documents takes 0.7 × the time, a query of 50 a quarter
(bench/test_runs.py).
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from engine.limits import Limits
from engine.ranges import HIGH, LOW, IndexRange, OrderKey
from engine.schema import IndexSchema, Table
from engine.schema.indexes import live_key_of
from engine.storage.rows import RowCodec, Stored
from engine.transaction.write_set import Write

SCAN_COUNT_MAX = 128  # documents of one scan: a page or two of what people look at


class Kept:
    """What is kept of one state of the database, of the tables of one catalog."""

    def __init__(self, limits: Limits) -> None:
        self._count_max = limits.kept_document_count_max
        self._size_bytes_max = limits.kept_document_size_bytes_max
        self._documents: OrderedDict[str, Stored] = OrderedDict()  # by id
        self._scans: dict[tuple[IndexSchema, bool], _Scans] = {}  # and whether it descends
        self._scans_by_table: dict[str, tuple[_Scans, ...]] = {}
        self.get = self._documents.get
        """The row and document with this id; None: it is not known."""

    def keep(self, stored: Stored) -> None:
        """This row is there."""
        documents = self._documents
        if stored.size_bytes > self._size_bytes_max:
            documents.pop(stored.row[1], None)
            return
        documents[stored.row[1]] = stored
        while len(documents) > self._count_max:
            documents.popitem(last=False)

    def find(self, index: IndexSchema, prefix: OrderKey, limit: int, *, descending: bool) -> list[Stored] | None:
        """The first rows under the prefix of the index, or the last ones backwards; None: they are not known."""
        scans = self._scans.get((index, descending))
        scan = None if scans is None else scans.by_prefix.get(prefix)
        if scan is None:
            return None
        ids = scan.document_ids
        if len(ids) < limit:
            if not scan.is_whole:
                return None
        elif len(ids) > limit:
            ids = ids[-limit:] if descending else ids[:limit]
        try:
            found = [*map(self._documents.__getitem__, ids)]
        except KeyError:
            return None
        if descending:
            found.reverse()
        return found

    def keep_scan(
        self,
        codec: RowCodec[Any],
        index: IndexSchema,
        prefix: OrderKey,
        found: list[Stored],
        *,
        descending: bool,
        is_whole: bool,
    ) -> None:
        """These are the first rows under the prefix of the index, or the last ones backwards; `is_whole`: all."""
        if len(found) > SCAN_COUNT_MAX or not (found or is_whole):
            return
        scans = self._scans.get((index, descending))
        if scans is None:
            scans = _Scans(codec, index, descending=descending)
            table = codec.table.name
            self._scans_by_table[table] = (*self._scans_by_table.get(table, ()), scans)
            self._scans[index, descending] = scans
        for stored in found:
            self.keep(stored)
        ids = [stored.row[1] for stored in found]
        if descending:
            ids.reverse()
        scans.keep(prefix, _Scan(ids, is_whole=is_whole), self._count_max)

    def wrote(self, table: str, document_id: str, old: Table | None, new: Table | None, stored: Stored | None) -> None:
        """A document was written; `stored` is its row now, None when it is gone."""
        for scans in self._scans_by_table.get(table, ()):
            scans.splice(document_id, old, new, self._documents)
        if stored is None:
            self._documents.pop(document_id, None)
        else:
            self.keep(stored)

    def follow(self, writes: Iterable[Write]) -> None:
        """These were committed."""
        for write in writes:
            if write.stored is None and write.new is not None:
                self.forget((write,))
            else:
                self.wrote(write.table.name, write.document_id, write.old, write.new, write.stored)

    def forget(self, writes: Iterable[Write]) -> None:
        """These were undone, or may have been."""
        for write in writes:
            self._documents.pop(write.document_id, None)
            for scans in self._scans_by_table.get(write.table.name, ()):
                scans.forget(write.old)
                scans.forget(write.new)

    def clear(self) -> None:
        """Nobody knows what is there."""
        self._scans.clear()
        self._scans_by_table.clear()
        self._documents.clear()


def prefix_of(index_range: IndexRange) -> OrderKey | None:
    """The columns that are fixed in a range of which nothing else is bounded; None: something is."""
    start, end = index_range.start, index_range.end
    if len(start) == len(end) and start[-1] == LOW and end[-1] == HIGH:
        prefix = start[:-1]
        if prefix == end[:-1]:
            return prefix
    return None


class _Scan:
    """The first or the last documents under a prefix, in ascending order."""

    __slots__ = ("document_ids", "is_whole", "keys")

    def __init__(self, document_ids: list[str], *, is_whole: bool) -> None:
        self.document_ids = document_ids
        self.is_whole = is_whole  # there are no others
        self.keys: list[OrderKey] | None = None  # of the documents; made when it is first spliced


class _Scans:
    """Those of one index in one direction."""

    def __init__(self, codec: RowCodec[Any], index: IndexSchema, *, descending: bool) -> None:
        self._codec, self._index, self._descending = codec, index, descending
        self._key_of = live_key_of(index)  # None: the index does not hold the document
        self._sizes: tuple[int, ...] = ()  # of the prefixes
        self.by_prefix: OrderedDict[OrderKey, _Scan] = OrderedDict()

    def keep(self, prefix: OrderKey, scan: _Scan, count_max: int) -> None:
        if len(prefix) not in self._sizes:
            self._sizes = (*self._sizes, len(prefix))  # before there is one to be spliced
        self.by_prefix[prefix] = scan
        while len(self.by_prefix) > count_max:
            self.by_prefix.popitem(last=False)

    def splice(self, document_id: str, old: Table | None, new: Table | None, documents: dict[str, Stored]) -> None:
        """The document moves from the key that it had to the one that it has."""
        old_key = None if old is None else self._key_of(old)
        new_key = None if new is None else self._key_of(new)
        if old_key == new_key:
            return
        for key, move in ((old_key, self._remove), (new_key, self._add)):
            if key is None:
                continue
            for size in self._sizes:
                prefix = key[:size]
                scan = self.by_prefix.get(prefix)
                if scan is not None and not (self._make_keys(scan, documents) and move(scan, key, document_id)):
                    del self.by_prefix[prefix]

    def forget(self, document: Table | None) -> None:
        """What is under the prefixes of this document is not known any more."""
        key = None if document is None else self._key_of(document)
        if key is not None:
            for size in self._sizes:
                self.by_prefix.pop(key[:size], None)

    def _make_keys(self, scan: _Scan, documents: dict[str, Stored]) -> bool:
        """False: a document is not kept any more."""
        if scan.keys is None:
            key_of, codec = self._index.key_of, self._codec
            try:
                scan.keys = [key_of(documents[document_id].give(codec)) for document_id in scan.document_ids]
            except KeyError:
                return False
        return True

    # both give False where the scan is of no use any more

    def _remove(self, scan: _Scan, key: OrderKey, document_id: str) -> bool:
        keys = scan.keys
        assert keys is not None
        place = bisect_left(keys, key)
        if place < len(keys) and keys[place] == key:
            del keys[place], scan.document_ids[place]
        return scan.is_whole or bool(keys)

    def _add(self, scan: _Scan, key: OrderKey, document_id: str) -> bool:
        keys = scan.keys
        assert keys is not None
        if not scan.is_whole and (key < keys[0] if self._descending else key > keys[-1]):
            return True  # it lies beyond those that are kept
        place = bisect_left(keys, key)
        keys.insert(place, key)
        scan.document_ids.insert(place, document_id)
        return len(keys) <= SCAN_COUNT_MAX or self._halve(scan)

    def _halve(self, scan: _Scan) -> bool:
        keep = slice(-SCAN_COUNT_MAX // 2, None) if self._descending else slice(SCAN_COUNT_MAX // 2)
        assert scan.keys is not None
        scan.keys, scan.document_ids, scan.is_whole = scan.keys[keep], scan.document_ids[keep], False
        return True
