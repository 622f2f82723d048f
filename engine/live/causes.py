"""Why a live query runs again: the first write of a commit that falls into something that it read. For developers.

Found by asking the invalidation index about one read at a time, so that it cannot disagree with it. That is slow, and
only done while somebody traces.
"""

from collections.abc import Iterable, Iterator

from engine.events import Cause
from engine.live.invalidation import InvalidationIndex
from engine.ranges import IndexRange, columns_of
from engine.transaction.read_set import CellEntry, ReadSet
from engine.transaction.reading import Catalog
from engine.transaction.write_set import WriteSet

Written = tuple[str, WriteSet]  # path of a function, and what it wrote


def cause_of(ts: int, read_set: ReadSet, writers: Iterable[Written], catalog: Catalog) -> Cause:
    """The reason in words; a moment that has come if no write is one."""
    for part, description in _parts(read_set, catalog):
        index: InvalidationIndex[str] = InvalidationIndex()
        index.put("the query", part)
        for function, write_set in writers:
            for write in write_set:
                if index.affected([write]):
                    return Cause(ts, function, f"{write.table.name}/{write.document_id}", description)
    return Cause(ts, "", "", "a moment that it declared has come")


def reads_of(read_set: ReadSet, catalog: Catalog) -> list[str]:
    """Everything that a query depends on, in words."""
    return [description for _, description in _parts(read_set, catalog)]


def _parts(read_set: ReadSet, catalog: Catalog) -> Iterator[tuple[ReadSet, str]]:
    """Each single read, and its description."""
    for table, document_id in sorted(read_set.documents):
        part = ReadSet(1)
        part.add_document(table, document_id)
        yield part, f"the document {table}/{document_id}"
    for index_range in read_set.ranges:
        part = ReadSet(1)
        part.add_range(index_range)
        yield part, f"documents of {_range_text(index_range, catalog)}"
    for index_range in read_set.key_ranges:
        part = ReadSet(1)
        part.add_key_range(index_range)
        yield part, f"keys of {_range_text(index_range, catalog)}"
    for cell in sorted(read_set.cells, key=repr):
        part = ReadSet(1)
        part.add_cell(cell)
        yield part, _cell_text(cell)
    for search in read_set.searches:
        part = ReadSet(1)
        part.add_search(search)
        words = [*search.terms.words, *([] if search.terms.prefix is None else [f"{search.terms.prefix}…"])]
        equal = "".join(f", {field}={value!r}" for field, value in search.filters)
        yield part, f"matches of {search.table}.{search.index}: {' '.join(words)}{equal}"


def _range_text(index_range: IndexRange, catalog: Catalog) -> str:
    table = catalog.of_table(index_range.table).table
    indexes = (*table.indexes_by_name.values(), *table.indexes_with_deleted.values())
    fields = next(index.fields for index in indexes if index.name == index_range.index)
    return index_range.text((*fields, "creation"))


def _cell_text(cell: CellEntry) -> str:
    values = ", ".join(map(repr, columns_of((*cell.key, 0))[0]))
    return f"the {'count' if cell.field is None else f'sum of {cell.field}'} of {cell.table}.{cell.aggregate}: {values}"
