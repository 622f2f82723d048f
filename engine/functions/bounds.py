"""From the keyword arguments of `ctx.db.query` to an index range; clear errors for what an index cannot do."""

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import FunctionMisuse, InvalidDocument
from engine.functions.moments import Moment
from engine.ids import TICKS_PER_MS
from engine.ranges import IndexRange, OrderKey, after, before, key_prefix
from engine.schema import IndexSchema, TableSchema
from engine.values.wire import Mismatch

_TICK_MAX = 1 << 62  # an infinite bound still fits SQLite


def range_of(table: TableSchema, index: IndexSchema, equal: Mapping[str, Any], bounds: Mapping[str, Any]) -> IndexRange:
    """The range that `equal` and the bounds describe; clear errors for what an index cannot do."""
    fields = index.fields
    for name in equal:
        if name not in fields[: len(equal)]:
            raise FunctionMisuse(
                f"query {table.name}.{index.name}: {name!r} is not among the first {len(equal)} field(s) of the index "
                f"({', '.join(fields) or 'it has none'}). Fix its fields from the left, or declare another index."
            )
    prefix = key_prefix([column_value(table, name, equal[name], "query", index.name) for name in fields[: len(equal)]])
    if not bounds:
        return IndexRange(table.name, index.name, before(prefix), after(prefix))
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
