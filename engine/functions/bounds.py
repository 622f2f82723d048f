"""From the keyword arguments of `ctx.db.query` to what of an index they describe.

names of the fields that are fixed    a plan, made once for all queries that fix the same ones
their values                          a prefix of the index
bounds                                a range under it
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import FunctionMisuse, InvalidDocument
from engine.functions.moments import Moment
from engine.ids import TICKS_PER_MS
from engine.ranges import BY_CREATION_TIME, IndexRange, OrderKey, after, before, key_prefix
from engine.schema import Index, IndexSchema, TableSchema
from engine.storage.rows import RowCodec
from engine.transaction.reading import Catalog
from engine.values.wire import Mismatch

_PLAN_COUNT_MAX = 4_096  # of one catalog; an app has as many as it writes queries
_TICK_MAX = 1 << 62  # an infinite bound still fits SQLite


class Plan:
    """What all queries have in common that fix the same fields of an index."""

    __slots__ = ("_columns", "codec", "index", "is_hidden", "table")

    def __init__(self, codec: RowCodec[Any], index: IndexSchema, names: Collection[str]) -> None:
        table = codec.table
        fields = index.fields[: len(names)]
        for name in names:
            if name not in fields:
                raise FunctionMisuse(
                    f"query {table.name}.{index.name}: {name!r} is not among the first {len(names)} field(s) of the "
                    f"index ({', '.join(index.fields) or 'it has none'}). Fix its fields from the left, or declare "
                    "another index."
                )
        self.codec, self.table, self.index, self.is_hidden = codec, table, index, table.is_hidden
        self._columns = [(column, table.fields_by_name[column.name]) for column in index.columns[: len(names)]]

    def prefix_of(self, equal: Mapping[str, Any]) -> OrderKey:
        """The key of these values. Raises InvalidDocument."""
        flat: list[object] = []
        for column, field in self._columns:
            value = equal[column.name]
            rank = column.rank
            if rank is None or value is None or not field.fits(value):  # most are not: 1 µs instead of 5
                value = column_value(self.table, column.name, value, "query", self.index.name)
                flat += key_prefix((value,))
            else:
                flat += (rank, value + 0.0 if field.column.is_float else value)
        return tuple(flat)


def make_plan(catalog: Catalog, key: tuple[Any, ...]) -> Plan:
    """The plan of this key, kept in the catalog. Raises FunctionMisuse where the index cannot do that."""
    source, with_deleted, *names = key
    document_type, index_name = (
        (source.document_type, source.name) if isinstance(source, Index) else (source, BY_CREATION_TIME)
    )
    codec = catalog.of_type(document_type)
    indexes = codec.table.indexes_with_deleted if with_deleted else codec.table.indexes_by_name
    plan = Plan(codec, indexes[index_name], names)
    if len(catalog.plans) < _PLAN_COUNT_MAX:
        catalog.plans[key] = plan
    return plan


def bounded(plan: Plan, prefix: OrderKey, equal: Collection[str], bounds: Mapping[str, Any]) -> IndexRange:
    """The range under the prefix that the bounds describe; clear errors for what an index cannot do."""
    table, index, fields = plan.table, plan.index, plan.index.fields
    where = f"query {table.name}.{index.name}"
    if len(bounds) > 1 and ({"gt", "gte"} <= bounds.keys() or {"lt", "lte"} <= bounds.keys()):
        raise FunctionMisuse(f"{where}: two bounds of one side; give gt or gte, and lt or lte.")
    if len(equal) < len(fields):
        bounded_field = fields[len(equal)]
        is_int = table.fields_by_name[bounded_field].column.sqlite_type == "INTEGER"
        values = {
            name: column_value(
                table,
                bounded_field,
                value.as_bound(name, is_int=is_int) if isinstance(value, Moment) else value,
                "query",
                index.name,
            )
            for name, value in bounds.items()
        }
    else:  # every index ends in the creation time
        bounded_field = "creation_time"
        values = {
            name: _tick_bound(name, value.ms if isinstance(value, Moment) else value, where)
            for name, value in bounds.items()
        }
    if None in values.values():
        raise FunctionMisuse(
            f"{where}: a bound of None matches nothing; leave it out, or ask for {bounded_field}=None."
        )
    start, end = after(prefix + key_prefix([None])), after(prefix)  # bounds never match null
    for name, value in values.items():
        key: OrderKey = prefix + key_prefix([value])
        match name:
            case "gt":
                start = after(key)
            case "gte":
                start = before(key)
            case "lt":
                end = before(key)
            case _:
                end = after(key)
    if start > end:  # empty; a cursor outlives the moment: the side stays that does not move with time
        is_lower_moving = any(isinstance(bounds.get(name), Moment) for name in ("gt", "gte"))
        start, end = (end, end) if is_lower_moving else (start, start)
    return IndexRange(table.name, index.name, start, end)


def _tick_bound(name: str, creation_time_ms: Any, where: str) -> int:
    if type(creation_time_ms) not in (int, float) or math.isnan(creation_time_ms):
        raise FunctionMisuse(f"{where}: {name}={creation_time_ms!r} is no creation time; give ms since the epoch.")
    ticks: float = max(-_TICK_MAX, min(creation_time_ms * TICKS_PER_MS, _TICK_MAX))
    return math.floor(ticks) if name in ("gt", "lte") else math.ceil(ticks)


def column_value(table: TableSchema, field_name: str, value: Any, operation: str, source: str) -> Any:
    """A value as the field's column has it. Raises InvalidDocument, naming what it is for: `query items.by_key`."""
    field = table.fields_by_name[field_name]
    if value is None:
        return None
    try:
        field.fit(value)
    except Mismatch as error:
        where = f"{operation} {table.name}.{source}"
        raise InvalidDocument(f"{where}: {field_name}={value!r} cannot be in that field: {error}") from None
    return field.column.to_column(value)
