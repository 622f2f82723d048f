"""What one greedy session costs another one's single call: a small mutation, and a query asked anew, one at a time.

The bound is 3 × the same call beside an idle server, or 20 ms, whichever is more, for functions that stay below 5 ms
between two calls of `ctx.db`. What functions cost that do not is in the rows "besides": a mutation is never
interrupted, and a query only where it calls `ctx.db`.
"""

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count

from bench.load.client import Client, Crowd, Query
from bench.load.figures import Figure, Goal, percentile
from bench.load.processes import BENCH_APP, Tokens, engine_server
from bench.load.stretches import Options

QUEUED_COUNT, QUERY_COUNT = 256, 1_000
_RATIO_MAX, _MS_MAX = 3.0, 20.0
_GOAL_NUMBER = 18
_PACE_SECONDS = 0.01
_GREEDY_SECONDS_MAX = 20.0

Greed = Callable[["Stage"], Awaitable[None]]  # returns when the greedy session has nothing more under way


class Stage:
    """The two sessions of one measurement."""

    def __init__(self, greedy: Client, other: Client, writer: Client) -> None:
        self.greedy, self.other, self.writer = greedy, other, writer
        self.is_ready = asyncio.Event()  # what is to be measured has begun


class _Latencies:
    def __init__(self) -> None:
        self.mutations, self.queries = array("d"), array("d")


async def run(options: Options) -> list[Figure]:
    size = options.size
    figures: list[Figure] = []
    cases: list[tuple[str, Greed, bool]] = [
        (f"{QUEUED_COUNT} mutations of 4 ms queued", mutations(QUEUED_COUNT, 1, 4.0), True),
        (f"{QUEUED_COUNT} mutations of 5 × 4 ms queued", mutations(size(QUEUED_COUNT), 5, 4.0), False),
        (f"{size(QUERY_COUNT):,} queries of 4 ms asked", asks(size(QUERY_COUNT), 1, 4.0), True),
        (f"{size(QUERY_COUNT):,} queries of 5 × 4 ms asked", asks(size(QUERY_COUNT), 5, 4.0), True),
        (f"{size(QUERY_COUNT):,} queries of 2 ms touched by each write", touches(size(QUERY_COUNT), 1, 2.0), True),
        (f"{size(QUERY_COUNT):,} queries of 5 × 4 ms touched by each write", touches(size(QUERY_COUNT), 5, 4.0), True),
        (f"{size(QUERY_COUNT):,} queries of 40 ms in one piece asked", asks(size(QUERY_COUNT) // 10, 1, 40.0), False),
    ]
    for name, greed, is_bounded in cases:
        async with _stage() as (crowd, stage):
            idle = await crowd.unless_lost(_measured(stage, _nothing, options.seconds / 4))
            beside = await crowd.unless_lost(_measured(stage, greed, options.seconds))
        for what, alone, with_greed in (
            ("a mutation", idle.mutations, beside.mutations),
            ("a query", idle.queries, beside.queries),
        ):
            limit_ms = percentile(alone, 99)
            bound_ms = max(_MS_MAX, _RATIO_MAX * limit_ms)
            goal = Goal(_GOAL_NUMBER, "≤", round(bound_ms, 1)) if is_bounded else None
            value_ms = percentile(with_greed, 99)
            figures.append(Figure(f"beside {name}", f"{what}, p99", value_ms, "ms", limit_ms, goal))
    return figures


@asynccontextmanager
async def _stage() -> AsyncIterator[tuple[Crowd, Stage]]:
    tokens = Tokens()
    async with engine_server(tokens, app=BENCH_APP) as server:
        crowd = Crowd(server.port)

        async def prepare(client: Client) -> None:
            await client.mutate("items:put", {"group": client.subject, "place": 0.0, "label": ""})

        greedy, other, writer = await crowd.join(["greedy", "other", "writer"], tokens.sign, prepare)
        yield crowd, Stage(greedy, other, writer)
        crowd.close()


async def _nothing(stage: Stage) -> None:
    stage.is_ready.set()
    await asyncio.sleep(_GREEDY_SECONDS_MAX)


async def _measured(stage: Stage, greed: Greed, seconds: float) -> _Latencies:
    """Single calls, until the time is up or the greedy session is done."""
    latencies = _Latencies()
    stage.is_ready.clear()
    greedy = asyncio.ensure_future(greed(stage))
    try:
        await stage.is_ready.wait()
        deadline = time.perf_counter() + seconds
        for number in count():
            if time.perf_counter() > deadline or (greedy.done() and number):
                break
            began = time.perf_counter()
            await stage.other.mutate("items:put", {"group": "other", "place": 0.0, "label": f"{began}"})
            latencies.mutations.append(1_000 * (time.perf_counter() - began))
            began = time.perf_counter()
            await stage.other.watch("items:one", {"group": "other", "place": -1.0, "asker": f"{began}"})
            latencies.queries.append(1_000 * (time.perf_counter() - began))
            await asyncio.sleep(_PACE_SECONDS)
        if greedy.done():
            greedy.result()
    finally:
        greedy.cancel()
    return latencies


def mutations(how_many: int, piece_count: int, piece_ms: float) -> Greed:
    """Its queue is filled again each time it is empty."""

    async def greed(stage: Stage) -> None:
        stage.is_ready.set()
        arguments = {"group": "greedy", "piece_count": piece_count, "piece_ms": piece_ms}
        while True:
            await asyncio.gather(*[stage.greedy.mutate("heavy:write", arguments) for _ in range(how_many)])

    return greed


def asks(how_many: int, piece_count: int, piece_ms: float) -> Greed:
    """Comes with all of them at once."""

    async def greed(stage: Stage) -> None:
        stage.is_ready.set()
        await stage.greedy.watch_all(_queries(how_many, piece_count, piece_ms))

    return greed


def touches(how_many: int, piece_count: int, piece_ms: float) -> Greed:
    """Watches all of them, and a third session's writes change all of them, one after another."""

    async def greed(stage: Stage) -> None:
        await stage.greedy.watch_all(_queries(how_many, piece_count, piece_ms))
        stage.is_ready.set()
        while True:
            await stage.writer.mutate("items:put", {"group": "greedy", "place": 0.0, "label": f"{time.perf_counter()}"})

    return greed


def _queries(how_many: int, piece_count: int, piece_ms: float) -> Sequence[Query]:
    arguments = {"group": "greedy", "piece_count": piece_count, "piece_ms": piece_ms}
    return [("heavy:watched", arguments | {"asker": asker}) for asker in range(how_many)]
