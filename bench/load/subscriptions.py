"""One write among 10, 1,000 and 100,000 unrelated subscriptions; then one that touches 1, 10, 100 and 1,000 of them.

1,000 signed-in users hold the subscriptions on the bench's own app: points and ranges of the group that is written, at
other places, and pages of other groups. A lone user writes the item that it watches, the next when the last has come
back as a new result. Then users watch the newest 50 items of a group, each by a query of their own, and one of them is
written.

Invariants
  1. A write among unrelated subscriptions runs one query: the writer's own.
  2. Calls are those of the event loop's thread, counted apart from the times, which counting spoils.
"""

import asyncio
import sqlite3
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bench.load.client import Client, Crowd, Query
from bench.load.connection import Receiver
from bench.load.demo import subjects
from bench.load.figures import Figure, Goal, percentile
from bench.load.filling import fill
from bench.load.processes import BENCH_APP, Server, Tokens, engine_server
from bench.load.stretches import Options, Send, as_acknowledged, cost_of

UNRELATED_COUNT = 100_000
TOUCHED_COUNTS = (1, 10, 100, 1_000)
_FEW_COUNT, _SOME_COUNT = 10, 1_000  # unrelated subscriptions before the many
_HOT = "hot"
_GROUP_ITEM_COUNT = 60
_LATEST_COUNT = 50  # of them are watched
_RAW_READ_COUNT = 1_000
_RAW_READ = (
    'SELECT _creation, id, "group", place, label FROM items INDEXED BY "items.by_group" WHERE "group" = ?'
    f" ORDER BY place DESC LIMIT {_LATEST_COUNT}"
)
_WRITES_COUNTED = 100
_CALLS_SPREAD = 1.2  # a tree of ranges is a little deeper with more of them
_SETTLE_SECONDS_MAX = 30


class Stage(msgspec.Struct, frozen=True):
    """Writing among so many unrelated subscriptions."""

    unrelated_count: int
    p50_ms: float
    p99_ms: float
    cpu_micros: float  # of the server, for a write
    runs: float  # of queries, for a write
    calls: float  # for a write


async def run(options: Options) -> list[Figure]:
    tokens = Tokens()
    async with engine_server(tokens, app=BENCH_APP, fill=_fill) as server:
        crowd = Crowd(server.port)
        users = await crowd.join(subjects(options.viewer_count), tokens.sign, _nothing_to_prepare)
        writer = (await crowd.join(["writer"], tokens.sign, _nothing_to_prepare))[0]
        await crowd.unless_lost(writer.watch("items:point", {"group": _HOT, "place": 0}))
        stages = await crowd.unless_lost(_stages(server, users, writer, options))
        millis_by_count = await crowd.unless_lost(_touches(users, writer, options))
        crowd.close()
        read_micros = raw_read_micros(server.database)
    return [*_flat(stages), *_linear(millis_by_count, read_micros)]


def raw_read_micros(database: Path) -> float:
    """The limit of a re-run: its 50 rows read by a statement and encoded, and no more."""
    names = ("_creationTime", "_id", "group", "place", "label")
    group = f"touched by {TOUCHED_COUNTS[0]}"
    began = time.perf_counter()
    with closing(sqlite3.connect(database)) as connection:
        for _ in range(_RAW_READ_COUNT):
            rows = connection.execute(_RAW_READ, (group,)).fetchall()
            msgspec.json.encode([dict(zip(names, row, strict=True)) for row in rows])
    assert len(rows) == _LATEST_COUNT
    return 1e6 * (time.perf_counter() - began) / _RAW_READ_COUNT


def _fill(database: Path) -> None:
    groups = [f"touched by {count}" for count in TOUCHED_COUNTS]
    rows = [(group, place, f"Item {place} of {group}") for group in groups for place in range(_GROUP_ITEM_COUNT)]
    fill(database, "items", '"group", place, label', rows)


async def _nothing_to_prepare(client: Client) -> None:
    pass


def _unrelated(number: int) -> Query:
    place = number + 1.0
    match number % 3:
        case 0:
            return "items:point", {"group": _HOT, "place": place}
        case 1:
            return "items:between", {"group": _HOT, "start": place, "end": place + 0.5}
        case _:
            options = {"numItems": 10, "cursor": None}
            return "items:page", {"group": f"pages {number}", "pagination_opts": options}


async def _stages(server: Server, users: list[Client], writer: Client, options: Options) -> list[Stage]:
    stages, watched_count, without_flames = [], 0, replace(options, flames=None)
    await server.run_counts()
    for count in (_FEW_COUNT, _SOME_COUNT, options.size(UNRELATED_COUNT)):
        queries = [_unrelated(number) for number in range(watched_count, count)]
        for index, user in enumerate(users):
            if share := queries[index :: len(users)]:
                await user.watch_all(share)
        watched_count = count
        stages.append(await _stage(server, writer, count, options if count > _SOME_COUNT else without_flames))
    return stages


async def _stage(server: Server, writer: Client, unrelated_count: int, options: Options) -> Stage:
    latencies = array("d")

    def send(on_done: Callable[[], None]) -> None:
        sent_at = time.perf_counter()

        def finish() -> None:
            latencies.append(1_000 * (time.perf_counter() - sent_at))
            on_done()

        label = f"write {len(latencies)} among {unrelated_count}"
        writer.start_mutation("items:put", {"group": _HOT, "place": 0, "label": label}, finish)

    await as_acknowledged(send, count=_WRITES_COUNTED)  # warm
    latencies = array("d")
    async with options.flame(server, "subscriptions"):
        with cost_of(server) as cost:
            await as_acknowledged(send, seconds=options.seconds)
    cpu_micros = 1e6 * cost.server_cpu_seconds / len(latencies)
    p50_ms, p99_ms = percentile(latencies, 50), percentile(latencies, 99)
    runs_before = sum((await server.run_counts()).values())
    await server.call_count()
    await as_acknowledged(send, count=_WRITES_COUNTED)
    calls = await server.call_count() / _WRITES_COUNTED
    runs = (sum((await server.run_counts()).values()) - runs_before) / _WRITES_COUNTED
    return Stage(unrelated_count, p50_ms, p99_ms, cpu_micros, runs, calls)


async def _touches(users: list[Client], writer: Client, options: Options) -> dict[int, float]:
    """Milliseconds from writing until all that it touches have their new result, the median, by how many they are."""
    touches = _Touches()
    millis_by_count = {}
    for count in TOUCHED_COUNTS:
        if count > len(users):
            break
        group = f"touched by {count}"
        for user in users[:count]:
            user.on_result = None
            await user.watch("items:latest", {"group": group, "asker": user.subject})
            user.on_result = touches.receiver(group)
        send = touches.sender(writer, group, count)
        await as_acknowledged(send, count=3)  # warm
        touches.latencies_ms = array("d")
        await as_acknowledged(send, seconds=options.seconds / 2)
        millis_by_count[count] = percentile(touches.latencies_ms, 50)
    return millis_by_count


class _Touches:
    """Writes that touch many queries, and the arrival of their results."""

    def __init__(self) -> None:
        self.latencies_ms = array("d")
        self._left = 0  # users that have not got the result of the last write
        self._on_arrived: Callable[[], None]  # set by `sender`

    def receiver(self, group: str) -> Receiver:
        """What one user does with each frame."""
        mark = f'"group":"{group}"'.encode()

        def receive(buffer: bytearray, start: int, end: int) -> None:
            if buffer.find(mark, start, end) >= 0:
                self._left -= 1
                if not self._left:
                    self._on_arrived()

        return receive

    def sender(self, writer: Client, group: str, count: int) -> Send:
        def send(on_done: Callable[[], None]) -> None:
            sent_at, self._left = time.perf_counter(), count

            def arrived() -> None:
                self.latencies_ms.append(1_000 * (time.perf_counter() - sent_at))
                asyncio.get_running_loop().call_soon(on_done)

            self._on_arrived = arrived
            arguments = {"group": group, "place": _GROUP_ITEM_COUNT - 1, "label": f"written at {sent_at}"}
            writer.start_mutation("items:put", arguments)

        return send


def _flat(stages: list[Stage]) -> Iterator[Figure]:
    few = stages[0]
    for stage in stages:
        workload, is_more = f"a write among {stage.unrelated_count:,} unrelated", stage is not few
        flat, spread = Goal(7, "≤", 1.2, of="ratio"), Goal(7, "≤", _CALLS_SPREAD, of="ratio")
        yield Figure(workload, "own new result p50", stage.p50_ms, "ms", few.p50_ms, flat if is_more else None)
        yield Figure(workload, "own new result p99", stage.p99_ms, "ms", few.p99_ms)
        yield Figure(workload, "server CPU a write", stage.cpu_micros, "µs", few.cpu_micros)
        yield Figure(workload, "runs of queries", stage.runs, "", few.runs, Goal(7, "≤", 1))
        yield Figure(workload, "calls", stage.calls, "", few.calls, spread if is_more else None)


def _linear(millis_by_count: dict[int, float], read_micros: float) -> Iterator[Figure]:
    """A re-run costs the same however many there are; what a write costs besides is taken off."""
    one_ms = millis_by_count[1]
    for count, millis in millis_by_count.items():
        if count == 1:
            continue
        workload, micros = f"a write that touches {count:,} queries", 1_000 * (millis - one_ms) / (count - 1)
        yield Figure(workload, "until all have the result, p50", millis, "ms")
        yield Figure(workload, "a re-run of 50 rows with its push", micros, "µs", read_micros, Goal(8, "≤", 100))
