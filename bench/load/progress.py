"""1,000 users each watch their own progress on a screen; 200 times a second one of them, by chance, moves on.

Latency runs from sending the update to its arrival as a new result at the same user. Nobody else may be told.
"""

import asyncio
import random
import time
from array import array
from collections.abc import Callable

from bench.load.client import Client, Crowd
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, percentile
from bench.load.processes import Tokens, engine_server
from bench.load.stretches import Options, by_timetable, cost_of

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


async def run(options: Options) -> list[Figure]:
    tokens, arrivals, randomness = Tokens(), Arrivals(), random.Random(_SEED)
    async with engine_server(tokens) as server:
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
    workload, update_count = "progress, 200/s", len(arrivals.latencies_ms)
    return [
        Figure(workload, "latency p50", percentile(arrivals.latencies_ms, 50), "ms"),
        Figure(workload, "latency p99", percentile(arrivals.latencies_ms, 99), "ms"),
        Figure(workload, "server CPU an update", 1e6 * cost.server_cpu_seconds / update_count, "µs"),
        Figure(workload, "Transitions an update", transition_count / update_count, "", 1.0),
        *cost.figures(workload),
    ]
