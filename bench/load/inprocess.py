"""Mutations of a program in the engine's own process: 64 callers, each with the next when the last is durable.

`run` starts `python -m bench.load.inprocess APP DATABASE SECONDS` on the demo app, so that nothing else is in the
process: it prints what it reached as JSON. The callers are part of its time. The limit is `commits.py`.
"""

import asyncio
import sys
import time
from array import array
from pathlib import Path

import msgspec

from bench.load.commits import progress_updates, raw_commits
from bench.load.demo import subjects
from bench.load.figures import Figure, Goal, percentile
from bench.load.processes import ISSUER, Tokens, prepared_app, python
from bench.load.stretches import Options
from engine import Engine
from engine.cli import run_loop
from engine.config import load_config
from engine.identity import Identity

CALLER_COUNT = 64
_DURATION_SECONDS = 3_600.0


class Reached(msgspec.Struct, frozen=True):
    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_micros: float  # for one mutation


async def run(options: Options) -> list[Figure]:
    async with prepared_app(Tokens()) as directory:
        database = directory / "bench.db"
        output = await python("-m", "bench.load.inprocess", str(directory), str(database), str(options.seconds))
        reached = msgspec.json.decode(output, type=Reached)
        raw = raw_commits(database, CALLER_COUNT, options.seconds / 4, progress_updates)
    workload, goal = f"in process, {CALLER_COUNT} callers", Goal(15, "≥", 25_000)
    return [
        Figure(workload, "durable mutations", reached.per_second, "/s", raw.per_second, goal),
        Figure(workload, "durable p50", reached.p50_ms, "ms", raw.p50_ms),
        Figure(workload, "durable p99", reached.p99_ms, "ms", raw.p99_ms),
        Figure(workload, "CPU a mutation", reached.cpu_micros, "µs"),
    ]


def main() -> None:
    app, database, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    reached = run_loop(_call(app, database, seconds))
    print(msgspec.json.encode(reached).decode())


async def _call(app: Path, database: Path, seconds: float) -> Reached:
    async with Engine.open(app, database, config=load_config(app)) as engine:
        content_id = (await engine.query("content:list"))[0].id
        identities = [Identity(issuer=ISSUER, subject=subject) for subject in subjects(CALLER_COUNT)]
        for identity in identities:
            await engine.mutation("users:store", identity=identity)
        latencies, cpu_before, began = array("d"), time.process_time(), time.perf_counter()

        async def call(identity: Identity) -> None:
            while (sent_at := time.perf_counter()) < began + seconds:
                await engine.mutation(
                    "watch_progress:update_progress",
                    identity=identity,
                    content_id=content_id,
                    position_seconds=sent_at % _DURATION_SECONDS,
                    duration_seconds=_DURATION_SECONDS,
                )
                latencies.append(1_000 * (time.perf_counter() - sent_at))

        await asyncio.gather(*map(call, identities))
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu_before
    count = len(latencies)
    return Reached(count / elapsed, percentile(latencies, 50), percentile(latencies, 99), 1e6 * cpu / count)


if __name__ == "__main__":
    main()
