"""One stretch of load: how it is paced, how long it took, what it cost."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from bench.load.figures import Figure
from bench.load.processes import Server, busy_cpu_seconds, usage_of

Send = Callable[[Callable[[], None]], None]  # sends one mutation; the callable it is given is called when that is over


class Options(msgspec.Struct, frozen=True):
    seconds: float = 10.0  # of each stretch
    viewer_count: int = 1_000


class Cost(msgspec.Struct):
    """What a stretch used; filled in when it ends."""

    seconds: float = 0.0
    server_cpu_seconds: float = 0.0
    load_cpu_seconds: float = 0.0
    other_cpu_seconds: float = 0.0  # of all else on the machine: above a few per cent the figures are too low

    def figures(self, workload: str) -> Iterator[Figure]:
        yield Figure(workload, "server, of one core", 100 * self.server_cpu_seconds / self.seconds, "%")
        yield Figure(workload, "load generator, of one core", 100 * self.load_cpu_seconds / self.seconds, "%")
        yield Figure(workload, "anything else, of one core", self.other_percent, "%")

    @property
    def other_percent(self) -> float:
        return 100 * self.other_cpu_seconds / self.seconds


@contextmanager
def cost_of(server: Server) -> Iterator[Cost]:
    """Measure the stretch of load inside the `with` block."""
    cost, started = Cost(), time.perf_counter()
    busy_before, before, load_before = busy_cpu_seconds(), server.usage, usage_of(os.getpid())
    yield cost
    cost.seconds = time.perf_counter() - started
    cost.server_cpu_seconds = server.usage.cpu_seconds - before.cpu_seconds
    cost.load_cpu_seconds = usage_of(os.getpid()).cpu_seconds - load_before.cpu_seconds
    ours = cost.server_cpu_seconds + cost.load_cpu_seconds
    cost.other_cpu_seconds = max(0.0, busy_cpu_seconds() - busy_before - ours)


async def by_timetable(send: Send, *, per_second: float, seconds: float) -> None:
    """Send at a fixed rate, whatever becomes of what was sent; returns when all is over."""
    pending = 0
    idle = asyncio.Event()

    def finish() -> None:
        nonlocal pending
        pending -= 1
        if not pending:
            idle.set()

    started = time.perf_counter()
    for index in range(round(per_second * seconds)):
        await asyncio.sleep(max(0.0, started + index / per_second - time.perf_counter()))
        pending += 1
        idle.clear()
        send(finish)
    await idle.wait()


async def as_acknowledged(send: Send, *, seconds: float = float("inf"), count: int | None = None) -> None:
    """Send the next when the last is over, until the time is up or so many were sent."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    deadline, left = time.perf_counter() + seconds, count

    def send_next() -> None:
        nonlocal left
        if left == 0 or time.perf_counter() > deadline:
            ended.set_result(None)
            return
        if left is not None:
            left -= 1
        send(send_next)

    send_next()
    await ended
