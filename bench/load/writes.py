"""32 clients, then a lone one, write their own watch progress as fast as they are acknowledged.

The raw limit is `commits.py` on a copy of the database as the load left it.
"""

import asyncio
import random
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.load.client import Client, Crowd
from bench.load.commits import raw_commits
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, percentile
from bench.load.processes import Server, Tokens, engine_server
from bench.load.stretches import Cost, Options, as_acknowledged, cost_of

WRITER_COUNT = 32
GROUP_COUNTS = (WRITER_COUNT, 100)  # of the raw limit
DURATION_SECONDS = 3_600.0
_SEED = 32


class Reached(msgspec.Struct, frozen=True):
    per_second: float
    p50_ms: float
    p99_ms: float
    cost: Cost


async def run(options: Options) -> list[Figure]:
    tokens = Tokens()
    with tempfile.TemporaryDirectory() as name:
        database = Path(name) / "raw.db"
        async with engine_server(tokens) as server:
            crowd = Crowd(server.port)
            content_id = await first_id(server, "content:list")
            writers = await crowd.join(subjects(WRITER_COUNT), tokens.sign, lambda user: user.mutate("users:store", {}))
            many = await crowd.unless_lost(_write(server, writers, content_id, options.seconds))
            lone = await crowd.unless_lost(_write(server, writers[:1], content_id, options.seconds / 2))
            crowd.close()
            stored = server.database
            await server.stop()
            shutil.copy(stored, database)
        raw = {count: raw_commits(database, count, options.seconds / 4) for count in (1, *GROUP_COUNTS)}
    workload = f"writes, {WRITER_COUNT} clients"
    return [
        *[
            Figure(workload, f"mutations (raw: groups of {count})", many.per_second, "/s", raw[count].per_second)
            for count in GROUP_COUNTS
        ],
        Figure(workload, "acknowledged p50", many.p50_ms, "ms", raw[WRITER_COUNT].p50_ms),
        Figure(workload, "acknowledged p99", many.p99_ms, "ms", raw[WRITER_COUNT].p99_ms),
        *many.cost.figures(workload),
        Figure("writes, lone client", "mutations", lone.per_second, "/s", raw[1].per_second),
        Figure("writes, lone client", "acknowledged p50", lone.p50_ms, "ms", raw[1].p50_ms),
        Figure("writes, lone client", "acknowledged p99", lone.p99_ms, "ms", raw[1].p99_ms),
    ]


async def _write(server: Server, writers: list[Client], content_id: str, seconds: float) -> Reached:
    latencies, randomness = array("d"), random.Random(_SEED)

    def sender(client: Client) -> Callable[[Callable[[], None]], None]:
        def send(on_done: Callable[[], None]) -> None:
            sent_at = time.perf_counter()

            def finish() -> None:
                latencies.append(1_000 * (time.perf_counter() - sent_at))
                on_done()

            client.start_mutation(
                "watch_progress:update_progress",
                {
                    "content_id": content_id,
                    "position_seconds": randomness.randrange(int(DURATION_SECONDS)),
                    "duration_seconds": DURATION_SECONDS,
                    "device_type": "desktop",
                },
                finish,
            )

        return send

    with cost_of(server) as cost:
        await asyncio.gather(*[as_acknowledged(sender(client), seconds=seconds) for client in writers])
    return Reached(len(latencies) / cost.seconds, percentile(latencies, 50), percentile(latencies, 99), cost)
