"""1,000,000 documents against 1,000: starting, the first query, the first write, then writes and progress as ever.

The table is the demo app's watch progress, with its five indexes: 1,000 users with 1,000 contents each, against one
each. The limit of the large table is the small one, in the same run.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bench.load import progress, writes
from bench.load.client import Client, Crowd
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, Goal
from bench.load.filling import fill
from bench.load.processes import ISSUER, Tokens, engine_server
from bench.load.stretches import Options

USER_COUNT = 1_000
CONTENT_COUNT = 1_000
_FLAT = 1.2  # as among subscriptions
_DURATION_SECONDS = 3_600.0
_PROGRESS_COLUMNS = (
    "user_id, content_id, position_seconds, duration_seconds, completion_percentage, last_watched_at, completed"
)


class Sized(msgspec.Struct, frozen=True):
    """What a table of this size came to."""

    document_count: int
    start_seconds: float
    first_query_ms: float
    first_write_ms: float
    written: writes.Written
    updated: progress.Reached


async def run(options: Options) -> list[Figure]:
    small = await _measure(1, options)
    return list(_compare(await _measure(options.size(CONTENT_COUNT), options), small))


async def _measure(content_count: int, options: Options) -> Sized:
    tokens = Tokens()
    async with engine_server(tokens, fill=_filler(content_count)) as server:
        crowd = Crowd(server.port)
        content_id = await first_id(server, "content:list")
        (user,) = await crowd.join(subjects(1), tokens.sign, _nothing_to_prepare)
        began = time.perf_counter()
        await crowd.unless_lost(user.watch("watch_progress:get_progress", {"content_id": content_id}))
        queried = time.perf_counter()
        arguments = {"content_id": content_id, "position_seconds": 1.0, "duration_seconds": _DURATION_SECONDS}
        await crowd.unless_lost(user.mutate("watch_progress:update_progress", arguments))
        written = time.perf_counter()
        crowd.close()
        return Sized(
            document_count=USER_COUNT * content_count,
            start_seconds=server.start_seconds,
            first_query_ms=1_000 * (queried - began),
            first_write_ms=1_000 * (written - queried),
            written=await writes.write(server, tokens, options),
            updated=await progress.update(server, tokens, options),
        )


async def _nothing_to_prepare(client: Client) -> None:
    pass


def _filler(content_count: int) -> Callable[[Path], None]:
    def fill_all(database: Path) -> None:
        users = [(f"{ISSUER}|{name}", name, "user", "[]") for name in subjects(USER_COUNT)]
        user_ids = fill(database, "users", "token_identifier, name, role, permissions", users)
        contents = [(f"A replay, part {number}", "replay", _DURATION_SECONDS) for number in range(content_count)]
        content_ids = fill(database, "content", "title, kind, duration_seconds", contents)
        now_ms = time.time() * 1_000
        rows = (
            (user_id, content_id, 36.0, _DURATION_SECONDS, 1.0, now_ms, 0)
            for content_id in content_ids
            for user_id in user_ids
        )
        fill(database, "user_watch_progress", _PROGRESS_COLUMNS, rows)

    return fill_all


def _compare(large: Sized, small: Sized) -> Iterator[Figure]:
    workload, flat = f"{large.document_count:,} documents", Goal(11, "≤", _FLAT, of="ratio")
    many, few = large.written, small.written
    yield Figure(workload, "start", large.start_seconds, "s", small.start_seconds, Goal(11, "≤", 1))
    yield Figure(workload, "first query", large.first_query_ms, "ms", small.first_query_ms)
    yield Figure(workload, "first write", large.first_write_ms, "ms", small.first_write_ms)
    yield Figure(workload, "32 writers, acknowledged", many.durable.per_second, "/s", few.durable.per_second)
    yield Figure(workload, "32 writers, CPU a write", many.durable.cpu_micros, "µs", few.durable.cpu_micros, flat)
    yield Figure(workload, "lone writer, own new result p50", many.lone_shown.p50_ms, "ms", few.lone_shown.p50_ms, flat)
    yield Figure(workload, "own progress, 200/s, p50", large.updated.p50_ms, "ms", small.updated.p50_ms, flat)
    yield Figure(
        workload, "own progress, CPU an update", large.updated.cpu_micros, "µs", small.updated.cpu_micros, flat
    )
