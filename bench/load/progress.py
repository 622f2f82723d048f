"""1,000 users each watch their own progress on a screen; 200 times a second one of them, by chance, moves on.

Latency runs from sending the update to its arrival as a new result at the same user. Nobody else may be told. The limit
is the same SQLite statements, each update committed alone (`commits.py`), on a copy of the database.
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
from bench.load.commits import progress_updates, raw_commits
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, Goal, percentile
from bench.load.processes import Server, Tokens, engine_server
from bench.load.stretches import Cost, Options, by_timetable, cost_of

UPDATES_PER_SECOND = 200
DURATION_SECONDS = 1e6  # the position of an update is its number
_FIELD = b'"position_seconds":'
_SETTLE_SECONDS_MAX = 30
_SEED = 200


class Arrivals:
    """What arrives at the users: their own updates, each with its number as the position."""

    def __init__(self) -> None:
        self.latencies_ms = array("d")
        self._sent_at: dict[int, float] = {}  # by number; until it arrived
        self._is_complete = asyncio.Event()  # all have arrived

    def next_number(self) -> int:
        number = len(self.latencies_ms) + len(self._sent_at) + 1
        self._sent_at[number] = time.perf_counter()
        self._is_complete.clear()
        return number

    def receive(self, buffer: bytearray, start: int, end: int) -> None:
        field = buffer.find(_FIELD, start, end)
        if field >= 0:
            position = field + len(_FIELD)
            number = int(float(buffer[position : buffer.index(b",", position)]))
            self.latencies_ms.append(1_000 * (time.perf_counter() - self._sent_at.pop(number)))
            if not self._sent_at:
                self._is_complete.set()

    async def complete(self) -> None:
        await asyncio.wait_for(self._is_complete.wait(), _SETTLE_SECONDS_MAX)


class Reached(msgspec.Struct, frozen=True):
    """What the stretch came to."""

    p50_ms: float
    p99_ms: float
    update_count: int
    transition_count: int
    cost: Cost

    @property
    def cpu_micros(self) -> float:
        """Of the server, for one update."""
        return 1e6 * self.cost.server_cpu_seconds / self.update_count


async def run(options: Options) -> list[Figure]:
    tokens = Tokens()
    with tempfile.TemporaryDirectory() as name:
        database = Path(name) / "raw.db"
        async with engine_server(tokens) as server:
            reached = await update(server, tokens, options)
            stored = server.database
            await server.stop()
            shutil.copy(stored, database)
        raw = raw_commits(database, 1, options.seconds / 4, progress_updates)
    workload = f"progress, {UPDATES_PER_SECOND}/s"
    return [
        Figure(workload, "latency p50", reached.p50_ms, "ms", raw.p50_ms, Goal(6, "≤", 0.8)),
        Figure(workload, "latency p99", reached.p99_ms, "ms", raw.p99_ms, Goal(6, "≤", 3)),
        Figure(workload, "server CPU an update", reached.cpu_micros, "µs"),
        Figure(workload, "Transitions an update", reached.transition_count / reached.update_count, "", 1.0),
        *reached.cost.figures(workload),
    ]


async def update(server: Server, tokens: Tokens, options: Options) -> Reached:
    """The stretch, on a server of the demo app."""
    arrivals, randomness = Arrivals(), random.Random(_SEED)
    crowd = Crowd(server.port)
    content_id = await first_id(server, "content:list")

    async def prepare(client: Client) -> None:
        await client.mutate("users:store", {})
        await client.watch("watch_progress:get_progress", {"content_id": content_id})
        client.on_result = arrivals.receive

    users = await crowd.join(subjects(options.viewer_count), tokens.sign, prepare)

    def send(on_done: Callable[[], None]) -> None:
        user = randomness.choice(users)
        while user.is_busy:
            user = randomness.choice(users)
        arguments = {
            "content_id": content_id,
            "position_seconds": arrivals.next_number(),
            "duration_seconds": DURATION_SECONDS,
        }
        user.start_mutation("watch_progress:update_progress", arguments, on_done)

    async def stretch() -> None:
        await by_timetable(send, per_second=UPDATES_PER_SECOND, seconds=options.seconds)
        await arrivals.complete()

    transitions_before = sum(user.transition_count for user in users)
    with cost_of(server) as cost:
        await crowd.unless_lost(stretch())
    transition_count = sum(user.transition_count for user in users) - transitions_before
    crowd.close()
    latencies = arrivals.latencies_ms
    return Reached(percentile(latencies, 50), percentile(latencies, 99), len(latencies), transition_count, cost)
