"""What the test asks about afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

import schema
from engine import MutationCtx, QueryCtx, Table
from engine.ids import make_id, table_tag
from tests.model import stopwatch

TABLES: dict[str, type[Table]] = {
    name: value
    for name, value in vars(schema).items()
    if isinstance(value, type) and issubclass(value, Table) and value is not Table
}
SLOW_SECONDS = 1  # longer than `run_slow_ms` of the engine under test


class Made(msgspec.Struct):
    """What one mutation, with its triggers, did that nobody can know before."""

    now: float
    write_count: int = 0  # those that the test has asked for
    inserts: list[dict[str, Any]] = []  # those that were begun, in order; id and creation time if they succeeded


ran: list[str] = []  # keys of the queries that ran, in order; nested ones have none
judged: list[str | None] = []  # who asked, of each run of the query that policies judge by; not in mutations
made_by_key: dict[str, Made] = {}  # of each mutation, by the key that it was given
_under_way: list[Made] = []  # the mutation that is, if one is


@contextmanager
def recorded(key: str) -> Iterator[None]:
    """Keep that a query ran; one that is abandoned, to start again in a round, has not."""
    try:
        yield
    except Exception:
        ran.append(key)
        raise
    ran.append(key)


@contextmanager
def mutation_under_way(ctx: MutationCtx, key: str) -> Iterator[None]:
    made_by_key[key] = Made(ctx.now)
    _under_way.append(made_by_key[key])
    try:
        yield
    finally:
        _under_way.clear()


def begin_write() -> None:
    _under_way[0].write_count += 1


def note_judged(subject: str | None) -> None:
    if not _under_way:
        judged.append(subject)


async def insert(ctx: MutationCtx, class_name: str, fields: dict[str, Any], *, is_unrestricted: bool = True) -> str:
    made = _under_way[0]
    entry: dict[str, Any] = {"write": made.write_count, "table": class_name, "fields": fields}
    made.inserts.append(entry)
    database = ctx.db.unrestricted if is_unrestricted else ctx.db
    id = await database.insert(TABLES[class_name](**fields))
    document = await ctx.db.unrestricted.with_deleted().get(id)
    entry |= {"id": id, "creation_time": document.creation_time}
    return id


async def hold_the_loop(ctx: QueryCtx) -> None:
    """Run long: pause, in a round, twice."""
    nobody = make_id(table_tag(next(iter(TABLES.values())).__table_name__), 1, bytes(9))
    for _ in range(2):
        stopwatch.hold(SLOW_SECONDS)
        await ctx.db.get(nobody)
