"""Which live queries a commit may have changed.

Invariants
  1. An entry is listed under exactly the documents and ranges of its newest read set.
  2. `affected` costs what it returns plus a few look-ups per written index, however many entries are listed
     (`lookup_count`: in a hash table, or in a tree of intervals, whose depth grows with the logarithm of its size).
  3. Old and new keys of a write both count: a row that leaves a range changes its result too.
  4. A number of a total is affected only by a write that changes that number.
  5. A range of which only the keys were read is affected only when a key comes or goes: by the old key or by the new
     one, not by both.

A range is found by hashing the columns that are equal for all its keys; within one such bucket, ranges that are not the
whole bucket lie in an interval tree. Searches are found in `search_entries.py`. Knows nothing of running queries
(`publisher`) or of clients (`sync`).
"""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from engine.live.intervals import IntervalTree
from engine.live.search_entries import SearchEntries
from engine.ranges import IndexRange, OrderKey, after, before
from engine.schema import KeyOf
from engine.transaction.read_set import ReadSet, SearchRead
from engine.transaction.totals import cell_changes
from engine.transaction.write_set import Write

E = TypeVar("E", bound=Hashable)
V = TypeVar("V", bound=Hashable)
K = TypeVar("K", bound=Hashable)

_NOTHING = ReadSet(0)


class InvalidationIndex(Generic[E]):
    """Entries (live queries) by what they read."""

    def __init__(self) -> None:
        self._read_set_by_entry: dict[E, ReadSet] = {}
        self._by_document: dict[tuple[str, str], set[E]] = {}
        self._by_cell: dict[tuple[str, str], dict[tuple[OrderKey, str | None], set[E]]] = {}  # of each aggregate
        self._by_index: dict[tuple[str, str], _IndexEntries[E]] = {}
        self._by_search_index: dict[tuple[str, str], SearchEntries[E]] = {}
        self.lookup_count = 0  # made by `affected`

    def __len__(self) -> int:
        return len(self._read_set_by_entry)

    def read_set_of(self, entry: E) -> ReadSet:
        """What an entry is listed under."""
        return self._read_set_by_entry[entry]

    def put(self, entry: E, read_set: ReadSet) -> None:
        """List an entry under its newest read set (invariant 1)."""
        listed = self._read_set_by_entry.get(entry)
        if listed is None:
            listed = _NOTHING
        elif listed.equals(read_set):
            return
        self._read_set_by_entry[entry] = read_set
        self._move(entry, listed, read_set)

    def remove(self, entry: E) -> None:
        """Forget an entry; nothing happens if it is not listed."""
        listed = self._read_set_by_entry.pop(entry, None)
        if listed is not None:
            self._move(entry, listed, _NOTHING)

    def _move(self, entry: E, old: ReadSet, new: ReadSet) -> None:
        """Change the places in which the two differ: most of what a run reads, its re-run reads too."""
        for place in new.documents - old.documents:
            self._by_document.setdefault(place, set()).add(entry)
        for place in old.documents - new.documents:
            _discard(self._by_document, place, entry)
        for cell in new.cells - old.cells:
            by_number = self._by_cell.setdefault((cell.table, cell.aggregate), {})
            by_number.setdefault((cell.key, cell.field), set()).add(entry)
        for cell in old.cells - new.cells:
            by_number = self._by_cell[cell.table, cell.aggregate]
            _discard(by_number, (cell.key, cell.field), entry)
            if not by_number:
                del self._by_cell[cell.table, cell.aggregate]
        if old.ranges != new.ranges:
            self._move_ranges(entry, _filled(old.ranges), _filled(new.ranges), is_keys_only=False)
        if old.key_ranges != new.key_ranges:
            self._move_ranges(entry, _filled(old.key_ranges), _filled(new.key_ranges), is_keys_only=True)
        if old.searches != new.searches:
            self._move_searches(entry, set(old.searches), set(new.searches))

    def _move_ranges(self, entry: E, old: set[IndexRange], new: set[IndexRange], *, is_keys_only: bool) -> None:
        for index_range in new - old:  # first: what is shared by old and new need not be made anew
            place = (index_range.table, index_range.index)
            entries = self._by_index.get(place)
            if entries is None:
                entries = self._by_index[place] = _IndexEntries()
            entries.add(entry, index_range, is_keys_only=is_keys_only)
        for index_range in old - new:
            place = (index_range.table, index_range.index)
            entries = self._by_index[place]
            entries.remove(entry, index_range, is_keys_only=is_keys_only)
            if not entries:
                del self._by_index[place]

    def _move_searches(self, entry: E, old: set[SearchRead], new: set[SearchRead]) -> None:
        for search in new - old:
            self._by_search_index.setdefault((search.table, search.index), SearchEntries()).add(entry, search)
        for search in old - new:
            place = (search.table, search.index)
            searches = self._by_search_index[place]
            searches.remove(entry, search)
            if not searches:
                del self._by_search_index[place]

    def affected(self, writes: Iterable[Write]) -> set[E]:
        """The entries whose result these writes may have changed."""
        found: set[E] = set()
        lookup_count = 0
        for write in writes:
            table = write.table
            lookup_count += 1 + len(table.key_places)
            here = self._by_document.get((table.name, write.document_id))
            if here is not None:
                found |= here
            for range_name, key_of in table.key_places:
                entries = self._by_index.get((table.name, range_name))
                if entries is not None:
                    lookup_count += entries.find(*_keys_of(key_of, write), found)
            for aggregate in table.aggregates:
                by_number = self._by_cell.get((table.name, aggregate.name))
                lookup_count += 1
                if by_number is not None:
                    for change in cell_changes(table, aggregate, write.old, write.new):
                        for field in change.entries(aggregate):
                            lookup_count += 1
                            found |= by_number.get((change.key, field), frozenset())
            for search_index in table.search_indexes_by_name.values():
                searches = self._by_search_index.get((table.name, search_index.name))
                lookup_count += 1
                if searches is not None:
                    searches.find(search_index, write, found)
        self.lookup_count += lookup_count
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
            bucket.keys.add((entry, index_range), index_range, prefix)
        else:
            bucket.documents.add(entry, index_range, prefix)

    def remove(self, entry: E, index_range: IndexRange, *, is_keys_only: bool) -> None:
        prefix = index_range.prefix
        buckets = self._buckets_by_length[len(prefix)]
        bucket = buckets[prefix]
        if is_keys_only:
            bucket.keys.remove((entry, index_range), index_range, prefix)
        else:
            bucket.documents.remove(entry, index_range, prefix)
        if not bucket:
            del buckets[prefix]
            if not buckets:
                del self._buckets_by_length[len(prefix)]

    def find(self, old_key: OrderKey | None, new_key: OrderKey | None, found: set[E]) -> int:
        """Add the entries that a write with these keys may have changed to `found`; how many look-ups that took."""
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
        return 2 * len(self._buckets_by_length)


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

    def add(self, value: V, index_range: IndexRange, prefix: OrderKey) -> None:
        if _is_whole(index_range, prefix):
            self._whole.add(value)
        else:
            self._parts.add(index_range.start, index_range.end, value)

    def remove(self, value: V, index_range: IndexRange, prefix: OrderKey) -> None:
        if _is_whole(index_range, prefix):
            self._whole.discard(value)
        else:
            self._parts.discard(index_range.start, index_range.end, value)

    def find(self, key: OrderKey, found: set[V]) -> None:
        found |= self._whole
        if self._parts:
            self._parts.find(key, found)


def _filled(ranges: list[IndexRange]) -> set[IndexRange]:
    """Those that hold any key."""
    return {index_range for index_range in ranges if index_range.start < index_range.end}


def _is_whole(index_range: IndexRange, prefix: OrderKey) -> bool:
    return index_range.start == before(prefix) and index_range.end == after(prefix)


def _discard(entries_by_place: dict[K, set[E]], place: K, entry: E) -> None:
    entries = entries_by_place[place]
    entries.discard(entry)
    if not entries:
        del entries_by_place[place]


def _keys_of(key_of: KeyOf, write: Write) -> tuple[OrderKey | None, OrderKey | None]:
    old_key = key_of(write.old) if write.old is not None else None
    new_key = key_of(write.new) if write.new is not None else None
    return old_key, new_key
