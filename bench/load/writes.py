"""32 clients, then a lone one, write their own watch progress as fast as they can.

First a client's next write follows when the last is durable: at its MutationResponse. Then each watches its progress,
and the next follows when the last has come back as a new result. The limit is `commits.py` on a copy of the database as
the load left it.
"""

import asyncio
import random
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from bench.load.client import Client, Crowd
from bench.load.commits import RawCommits, progress_updates, raw_commits
from bench.load.connection import Receiver
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, Goal, Row
from bench.load.processes import Server, Tokens, engine_server
from bench.load.stretches import Options, Reached, Send, as_acknowledged, cost_of

WRITER_COUNT = 32
GROUP_COUNTS = (WRITER_COUNT, 100)  # of the limit
WORKLOAD, ACKNOWLEDGED = f"writes, {WRITER_COUNT} clients", "acknowledged"
NOT_DURABLE = "no fsync"  # in the title of another server that is not
_PEER_RATIO = 3  # over the best other server that is durable too
DURATION_SECONDS = 3_600.0
_SEED = 32


class Written(msgspec.Struct, frozen=True):
    """What the stretches came to."""

    durable: Reached  # many clients, each next write at the response
    shown: Reached  # at the new result
    lone_durable: Reached  # the same by one client
    lone_shown: Reached


async def run(options: Options) -> list[Figure]:
    tokens = Tokens()
    with tempfile.TemporaryDirectory() as name:
        database = Path(name) / "raw.db"
        async with engine_server(tokens) as server:
            written = await write(server, tokens, options)
            stored = server.database
            await server.stop()
            shutil.copy(stored, database)
        raw = {
            count: raw_commits(database, count, options.seconds / 4, progress_updates) for count in (1, *GROUP_COUNTS)
        }
    return [*_many(written, raw), *_lone(written, raw[1])]


def _many(written: Written, raw: dict[int, RawCommits]) -> Iterator[Figure]:
    durable, shown, limit = written.durable, written.shown, raw[WRITER_COUNT]
    yield Figure(WORKLOAD, ACKNOWLEDGED, durable.per_second, "/s", limit.per_second, Goal(4, "≥", 15_000))
    yield Figure(WORKLOAD, f"{ACKNOWLEDGED} (limit: groups of 100)", durable.per_second, "/s", raw[100].per_second)
    yield Figure(WORKLOAD, "acknowledged p50", durable.p50_ms, "ms", limit.p50_ms)
    yield Figure(WORKLOAD, "acknowledged p99", durable.p99_ms, "ms", limit.p99_ms, Goal(4, "≤", 6))
    yield Figure(WORKLOAD, "server CPU a write", durable.cpu_micros, "µs")
    yield from durable.cost.figures(WORKLOAD)
    workload = f"writes shown, {WRITER_COUNT} clients"
    yield Figure(workload, "own new results", shown.per_second, "/s", limit.per_second)
    yield Figure(workload, "own new result p50", shown.p50_ms, "ms", limit.p50_ms)
    yield Figure(workload, "own new result p99", shown.p99_ms, "ms", limit.p99_ms)
    yield from shown.cost.figures(workload)


def against_peers(rows: Iterable[Row]) -> Iterator[Figure]:
    """Our rate over the best of the other servers, if both are among the rows."""
    rates = {row.workload: row.value for row in rows if isinstance(row, Figure) and row.name == ACKNOWLEDGED}
    ours, mark = rates.get(WORKLOAD), f"{WORKLOAD}: "
    peers = [(rate, workload) for workload, rate in rates.items() if workload.startswith(mark)]
    durable = [(rate, workload.removeprefix(mark)) for rate, workload in peers if NOT_DURABLE not in workload]
    if ours is not None and durable:
        rate, title = max(durable)
        goal = Goal(4, "≥", _PEER_RATIO, of="ratio")
        yield Figure(WORKLOAD, f"{ACKNOWLEDGED} (limit: {title})", ours, "/s", rate, goal)


def _lone(written: Written, raw: RawCommits) -> Iterator[Figure]:
    workload, durable, shown = "writes, lone client", written.lone_durable, written.lone_shown
    yield Figure(workload, "acknowledged", durable.per_second, "/s", raw.per_second)
    yield Figure(workload, "acknowledged p50", durable.p50_ms, "ms", raw.p50_ms, Goal(5, "≤", 0.5))
    yield Figure(workload, "acknowledged p99", durable.p99_ms, "ms", raw.p99_ms)
    yield Figure(workload, "own new result p50", shown.p50_ms, "ms", raw.p50_ms, Goal(5, "≤", 0.8))
    yield Figure(workload, "own new result p99", shown.p99_ms, "ms", raw.p99_ms)
    yield from durable.cost.figures(workload)


async def write(server: Server, tokens: Tokens, options: Options) -> Written:
    """The stretches, on a server of the demo app."""
    crowd = Crowd(server.port)
    content_id = await first_id(server, "content:list")
    writers = await crowd.join(subjects(WRITER_COUNT), tokens.sign, lambda user: user.mutate("users:store", {}))

    async def stretch(clients: list[Client], seconds: float, *, is_shown: bool) -> Reached:
        return await crowd.unless_lost(_write(server, clients, content_id, seconds, is_shown=is_shown))

    async with options.flame(server, "writes"):
        durable = await stretch(writers, options.seconds, is_shown=False)
    lone_durable = await stretch(writers[:1], options.seconds / 2, is_shown=False)
    for writer in writers:
        await crowd.unless_lost(writer.watch("watch_progress:get_progress", {"content_id": content_id}))
    shown = await stretch(writers, options.seconds, is_shown=True)
    lone_shown = await stretch(writers[:1], options.seconds / 2, is_shown=True)
    crowd.close()
    return Written(durable, shown, lone_durable, lone_shown)


async def _write(server: Server, writers: list[Client], content_id: str, seconds: float, *, is_shown: bool) -> Reached:
    latencies, randomness = array("d"), random.Random(_SEED)
    result_counts = dict.fromkeys(writers, 0)  # new results that a client was shown

    def counter(client: Client) -> Receiver:
        def count(buffer: bytearray, start: int, end: int) -> None:
            result_counts[client] += buffer.find(b'"QueryUpdated"', start, end) >= 0

        return count

    def sender(client: Client) -> Send:
        def send(on_done: Callable[[], None]) -> None:
            sent_at, results_before = time.perf_counter(), result_counts[client]

            def finish() -> None:
                if is_shown and result_counts[client] == results_before:
                    raise RuntimeError("a write is over and its result has not come")
                latencies.append(1_000 * (time.perf_counter() - sent_at))
                on_done()

            arguments = {
                "content_id": content_id,
                "position_seconds": randomness.randrange(int(DURATION_SECONDS)),
                "duration_seconds": DURATION_SECONDS,
                "device_type": "desktop",
            }
            end = {"on_done" if is_shown else "on_answer": finish}
            client.start_mutation("watch_progress:update_progress", arguments, **end)

        return send

    for client in writers:
        client.on_result = counter(client)
    with cost_of(server) as cost:
        await asyncio.gather(*[as_acknowledged(sender(client), seconds=seconds) for client in writers])
    return Reached.of(latencies, cost)
