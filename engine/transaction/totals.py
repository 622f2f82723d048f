"""What a write changes in the totals of its table, and in the ranks of its indexes.

A *cell* is one key of an aggregate: its count, and one sum for each summed field. A run depends on each number of a
cell by itself (`read_set.CellEntry`): a count does not change with a sum.
"""

from collections.abc import Iterator
from typing import NamedTuple

from engine.ranges import IndexRange, OrderKey, after, before
from engine.schema import AggregateSchema, IndexSchema, Table, TableSchema
from engine.storage import ranked, totals
from engine.storage.connections import WriterConnection


class CellChange(NamedTuple):
    """What a write adds to one cell."""

    key: OrderKey
    count_change: int
    sum_changes: tuple[int, ...]  # in the order of the aggregate

    def entries(self, aggregate: AggregateSchema) -> Iterator[str | None]:
        """Which numbers of the cell are others now: None for the count, the field for a sum."""
        if self.count_change:
            yield None
        for field, change in zip(aggregate.sums, self.sum_changes, strict=True):
            if change:
                yield field


def cell_changes(
    table: TableSchema, aggregate: AggregateSchema, old: Table | None, new: Table | None
) -> list[CellChange]:
    """The cells that change when a document of the table does; deleted documents count nowhere."""
    old, new = _live(table, old), _live(table, new)
    old_key = aggregate.key_of(old) if old is not None else None
    new_key = aggregate.key_of(new) if new is not None else None
    if old is not None and new is not None and old_key == new_key:
        pairs = zip(aggregate.amounts_of(old), aggregate.amounts_of(new), strict=True)
        amounts = tuple([new_amount - old_amount for old_amount, new_amount in pairs])
        return [CellChange(aggregate.key_of(new), 0, amounts)] if any(amounts) else []
    changes = []
    if old is not None:
        changes.append(CellChange(aggregate.key_of(old), -1, tuple([-amount for amount in aggregate.amounts_of(old)])))
    if new is not None:
        changes.append(CellChange(aggregate.key_of(new), 1, aggregate.amounts_of(new)))
    return changes


def update(writer: WriterConnection, table: TableSchema, old: Table | None, new: Table | None) -> None:
    """Bring totals and ranks up to a write that was just done, before another one. Raises TotalOverflow."""
    for aggregate in table.aggregates:
        for change in cell_changes(table, aggregate, old, new):
            totals.add(writer, table.name, aggregate, change.key, (change.count_change, *change.sum_changes))
    if not table.ranked_indexes:
        return
    old, new = _live(table, old), _live(table, new)
    for index in table.ranked_indexes:
        old_key = index.key_of(old) if old is not None else None
        new_key = index.key_of(new) if new is not None else None
        if old_key == new_key:
            continue
        if old_key is not None:
            ranked.remove(writer, table, index, old_key)
        if new_key is not None:
            ranked.insert(writer, table, index, new_key)


def covering(
    table: TableSchema, index: IndexSchema, index_range: IndexRange
) -> tuple[AggregateSchema, OrderKey] | None:
    """An aggregate that has the range's count as one cell, and that cell's key."""
    if not table.aggregates or index.holds_deleted:
        return None
    prefix = index_range.prefix
    if index_range.start != before(prefix) or index_range.end != after(prefix):
        return None
    place_by_field = {field: 2 * place for place, field in enumerate(index.fields) if 2 * place < len(prefix)}
    for aggregate in table.aggregates:
        if 2 * len(aggregate.fields) == len(prefix) and place_by_field.keys() == set(aggregate.fields):
            key: list[object] = []
            for field in aggregate.fields:
                key += prefix[place_by_field[field] : place_by_field[field] + 2]
            return aggregate, tuple(key)
    return None


def _live(table: TableSchema, document: Table | None) -> Table | None:
    return None if document is None or table.is_deleted(document) else document
