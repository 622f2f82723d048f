"""The shadow tables of a table, which hold its totals (`totals.py`) and the ranks in its indexes (`ranked.py`).

Who writes a document updates them in the same transaction; here they are made, and made anew, from the rows.
"""

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from engine.errors import SchemaError, TotalOverflow
from engine.ranges import BY_CREATION_TIME, IndexRange, after, before
from engine.schema import IndexSchema, TableSchema
from engine.storage import ranked, scans, totals
from engine.storage.connections import Connection, WriterConnection
from engine.storage.rows import RowCodec

_PAGE_ROW_COUNT = 1_000


class ShadowDescription(msgspec.Struct, frozen=True):
    """What is in a shadow table; one of another description is made anew."""

    kind: Literal["aggregate", "ranks"]
    fields: list[str]
    sums: list[str]
    deleted_field: str | None


def describe(table: TableSchema) -> dict[str, ShadowDescription]:
    """By name: an aggregate is not called like an index."""
    described = {
        aggregate.name: ShadowDescription(
            "aggregate", list(aggregate.fields), list(aggregate.sums), table.deleted_field
        )
        for aggregate in table.aggregates
    }
    for index in table.ranked_indexes:
        described[index.name] = ShadowDescription("ranks", list(index.fields), [], table.deleted_field)
    return described


def migrate(
    writer: WriterConnection, table: TableSchema, stored: dict[str, ShadowDescription], restored_columns: set[str]
) -> list[str]:
    """Make the shadow tables match the schema, when the table itself does; says what was done.

    `restored_columns` hold other values than they did. A copy of the table keeps the shadow tables: ticks never change.
    """
    wanted = describe(table)
    kept = {
        name
        for name, description in stored.items()
        if wanted.get(name) == description and restored_columns.isdisjoint(description.fields + description.sums)
    }
    done = []
    for name, description in stored.items():
        if name not in kept:
            owner = totals if description.kind == "aggregate" else ranked
            writer.execute(f"DROP TABLE {owner.sql_name(table.name, name)}")
            if name not in wanted or wanted[name].kind != description.kind:
                done.append(f"{table.name}.{name}: {description.kind} dropped")
    if wanted.keys() == kept:
        return done
    codec: RowCodec[Any] = RowCodec(table)
    for aggregate in table.aggregates:
        if aggregate.name not in kept:
            documents = _walk(writer, codec, table.indexes_by_name[BY_CREATION_TIME])
            try:
                totals.build(writer, table.name, aggregate, documents)
            except TotalOverflow as error:
                raise SchemaError(str(error)) from error
    for index in table.ranked_indexes:
        if index.name not in kept:
            ranked.build(writer, table.name, index, map(index.key_of, _walk(writer, codec, index)))
    for name, description in wanted.items():
        if name not in kept:
            is_changed = name in stored and stored[name].kind == description.kind
            done.append(f"{table.name}.{name}: {description.kind} {'changed' if is_changed else 'added'}")
    return done


def verify(connection: Connection, table: TableSchema) -> None:
    """Check by reading every row that the shadow tables say what the rows do."""
    codec: RowCodec[Any] = RowCodec(table)
    for aggregate in table.aggregates:
        documents = _walk(connection, codec, table.indexes_by_name[BY_CREATION_TIME])
        totals.verify(connection, table.name, aggregate, documents)
    for index in table.ranked_indexes:
        ranked.verify(connection, table.name, index, map(index.key_of, _walk(connection, codec, index)))


def _walk(connection: Connection, codec: RowCodec[Any], index: IndexSchema) -> Iterator[Any]:
    """Every document of an index in its order, a page of rows at a time."""
    rest = IndexRange(codec.table.name, index.name, before(()), after(()))
    while rows := scans.fetch(connection, codec, index, rest, descending=False, limit=_PAGE_ROW_COUNT):
        documents = [codec.decode(row) for row in rows]
        yield from documents
        rest = IndexRange(rest.table, rest.index, after(index.key_of(documents[-1])[:-1]), rest.end)
