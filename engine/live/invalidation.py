"""Which live queries a commit may have changed.

Invariants
  1. An entry is listed under exactly the documents and ranges of its newest read set.
  2. `affected` costs what it returns plus a few look-ups per written index, however many entries are listed.
  3. Old and new keys of a write both count: a row that leaves a range changes its result too.
  4. A number of a total is affected only by a write that changes that number.
  5. A range of which only the keys were read is affected only when a key comes or goes: by the old key or by the new
     one, not by both.

A range is found by hashing the columns that are equal for all its keys; within one such bucket, ranges that are not the
whole bucket lie in an interval tree. Searches are found in `search_entries.py`. Knows nothing of running queries
(`publisher`) or of clients (`sync`).
"""

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

from engine.live.intervals import IntervalTree
from engine.live.search_entries import SearchEntries
from engine.ranges import IndexRange, OrderKey, after, before
from engine.schema import KeyOf
from engine.transaction.read_set import ReadSet
from engine.transaction.totals import cell_changes
from engine.transaction.write_set import Write

E = TypeVar("E", bound=Hashable)
V = TypeVar("V", bound=Hashable)


class InvalidationIndex(Generic[E]):
    """Entries (live queries) by what they read."""

    def __init__(self) -> None:
        self._read_set_by_entry: dict[E, ReadSet] = {}
        self._by_document: dict[tuple[str, str], set[E]] = {}
        self._by_cell: dict[tuple[str, str], dict[tuple[OrderKey, str | None], set[E]]] = {}  # of each aggregate
        self._by_index: dict[tuple[str, str], _IndexEntries[E]] = {}
        self._by_search_index: dict[tuple[str, str], SearchEntries[E]] = {}

    def __len__(self) -> int:
        return len(self._read_set_by_entry)

    def read_set_of(self, entry: E) -> ReadSet:
        """What an entry is listed under."""
        return self._read_set_by_entry[entry]

    def put(self, entry: E, read_set: ReadSet) -> None:
        """List an entry under its newest read set (invariant 1)."""
        listed = self._read_set_by_entry.get(entry)
        if listed is not None and listed.equals(read_set):
            return
        self.remove(entry)
        self._read_set_by_entry[entry] = read_set
        for place in read_set.documents:
            self._by_document.setdefault(place, set()).add(entry)
        for cell in read_set.cells:
            by_number = self._by_cell.setdefault((cell.table, cell.aggregate), {})
            by_number.setdefault((cell.key, cell.field), set()).add(entry)
        for index_range, is_keys_only in _ranges_of(read_set):
            place = (index_range.table, index_range.index)
            entries = self._by_index.get(place)
            if entries is None:
                entries = self._by_index[place] = _IndexEntries()
            entries.add(entry, index_range, is_keys_only=is_keys_only)
        for search in read_set.searches:
            place = (search.table, search.index)
            self._by_search_index.setdefault(place, SearchEntries()).add(entry, search)

    def remove(self, entry: E) -> None:
        """Forget an entry; nothing happens if it is not listed."""
        read_set = self._read_set_by_entry.pop(entry, None)
        if read_set is None:
            return
        for place in read_set.documents:
            entries_here = self._by_document[place]
            entries_here.discard(entry)
            if not entries_here:
                del self._by_document[place]
        for cell in read_set.cells:
            by_number = self._by_cell[cell.table, cell.aggregate]
            entries_here = by_number[cell.key, cell.field]
            entries_here.discard(entry)
            if not entries_here:
                del by_number[cell.key, cell.field]
                if not by_number:
                    del self._by_cell[cell.table, cell.aggregate]
        for index_range, is_keys_only in _ranges_of(read_set):
            place = (index_range.table, index_range.index)
            entries = self._by_index.get(place)
            if entries is not None:
                entries.remove(entry, index_range, is_keys_only=is_keys_only)
                if not entries:
                    del self._by_index[place]
        for search in read_set.searches:
            place = (search.table, search.index)
            searches = self._by_search_index.get(place)
            if searches is not None:
                searches.remove(entry, search)
                if not searches:
                    del self._by_search_index[place]

    def affected(self, writes: Iterable[Write]) -> set[E]:
        """The entries whose result these writes may have changed."""
        found: set[E] = set()
        for write in writes:
            table = write.table
            here = self._by_document.get((table.name, write.document_id))
            if here is not None:
                found |= here
            for range_name, key_of in table.key_places:
                entries = self._by_index.get((table.name, range_name))
                if entries is not None:
                    entries.find(*_keys_of(key_of, write), found)
            for aggregate in table.aggregates:
                by_number = self._by_cell.get((table.name, aggregate.name))
                if by_number is not None:
                    for change in cell_changes(table, aggregate, write.old, write.new):
                        for field in change.entries(aggregate):
                            found |= by_number.get((change.key, field), frozenset())
            for search_index in table.search_indexes_by_name.values():
                searches = self._by_search_index.get((table.name, search_index.name))
                if searches is not None:
                    searches.find(search_index, write, found)
        return found


class _IndexEntries(Generic[E]):
    """The ranges of one index, by the length of their equal prefix and then by the prefix itself."""

    def __init__(self) -> None:
        self._buckets_by_length: dict[int, dict[OrderKey, _Bucket[E]]] = {}

    def __bool__(self) -> bool:
        return bool(self._buckets_by_length)

    def add(self, entry: E, index_range: IndexRange, *, is_keys_only: bool) -> None:
        prefix = index_range.prefix
        buckets = self._buckets_by_length.setdefault(len(prefix), {})
        bucket = buckets.get(prefix)
        if bucket is None:
            bucket = buckets[prefix] = _Bucket()
        if is_keys_only:
            bucket.keys.add((entry, index_range), index_range)
        else:
            bucket.documents.add(entry, index_range)

    def remove(self, entry: E, index_range: IndexRange, *, is_keys_only: bool) -> None:
        prefix = index_range.prefix
        buckets = self._buckets_by_length.get(len(prefix), {})
        bucket = buckets.get(prefix)
        if bucket is None:
            return  # listed twice under one range, and removed the first time
        if is_keys_only:
            bucket.keys.remove((entry, index_range), index_range)
        else:
            bucket.documents.remove(entry, index_range)
        if not bucket:
            del buckets[prefix]
            if not buckets:
                del self._buckets_by_length[len(prefix)]

    def find(self, old_key: OrderKey | None, new_key: OrderKey | None, found: set[E]) -> None:
        for length, buckets in self._buckets_by_length.items():
            old_bucket = buckets.get(old_key[:length]) if old_key is not None else None
            new_bucket = buckets.get(new_key[:length]) if new_key is not None else None
            for bucket, key in ((old_bucket, old_key), (new_bucket, new_key)):
                if bucket is not None and key is not None:
                    bucket.documents.find(key, found)
            if old_key == new_key:
                continue  # invariant 5: no key came or went
            left: set[tuple[E, IndexRange]] = set()
            entered: set[tuple[E, IndexRange]] = set()
            if old_bucket is not None and old_key is not None:
                old_bucket.keys.find(old_key, left)
            if new_bucket is not None and new_key is not None:
                new_bucket.keys.find(new_key, entered)
            found.update(entry for entry, _ in left ^ entered)


class _Bucket(Generic[E]):
    """All ranges with one equal prefix: of those whose documents were read, and of those whose keys were."""

    def __init__(self) -> None:
        self.documents: _Ranges[E] = _Ranges()
        # a key may leave one range and enter another of the same entry: so ranges are told apart here
        self.keys: _Ranges[tuple[E, IndexRange]] = _Ranges()

    def __bool__(self) -> bool:
        return bool(self.documents) or bool(self.keys)


class _Ranges(Generic[V]):
    """Ranges of one prefix: the whole of it, or a part."""

    def __init__(self) -> None:
        self._whole: set[V] = set()
        self._parts: IntervalTree[OrderKey, V] = IntervalTree()

    def __bool__(self) -> bool:
        return bool(self._whole) or bool(self._parts)

    def add(self, value: V, index_range: IndexRange) -> None:
        if _is_whole(index_range):
            self._whole.add(value)
        elif index_range.start < index_range.end:
            self._parts.add(index_range.start, index_range.end, value)

    def remove(self, value: V, index_range: IndexRange) -> None:
        if _is_whole(index_range):
            self._whole.discard(value)
        elif index_range.start < index_range.end:
            self._parts.discard(index_range.start, index_range.end, value)

    def find(self, key: OrderKey, found: set[V]) -> None:
        found |= self._whole
        if self._parts:
            self._parts.find(key, found)


def _is_whole(index_range: IndexRange) -> bool:
    prefix = index_range.prefix
    return index_range.start == before(prefix) and index_range.end == after(prefix)


def _ranges_of(read_set: ReadSet) -> Iterator[tuple[IndexRange, bool]]:
    for index_range in read_set.ranges:
        yield index_range, False
    for index_range in read_set.key_ranges:
        yield index_range, True


def _keys_of(key_of: KeyOf, write: Write) -> tuple[OrderKey | None, OrderKey | None]:
    old_key = key_of(write.old) if write.old is not None else None
    new_key = key_of(write.new) if write.new is not None else None
    return old_key, new_key
