"""One stretch of load: how it is paced, how long it took, what it cost."""

import asyncio
import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from bench.load.figures import Figure, percentile
from bench.load.processes import Server, busy_cpu_seconds, usage_of

Send = Callable[[Callable[[], None]], None]  # sends one mutation; the callable it is given is called when that is over

_SHORT_DIVISOR = 10
_FLAME_SAMPLES_PER_SECOND = 250
_TITLE = re.compile('(<text id="title"[^>]*>)[^<]*<')  # py-spy puts its own command there
_EXTRAS = re.compile(
    r'<script.*?</script>| onload="[^"]*"|<text id="(?:search|unzoom|matched)".*?</text>|<!--.*?-->', re.DOTALL
)  # of its picture: the code that zooms, and its buttons


class Options(msgspec.Struct, frozen=True):
    seconds: float = 10.0  # of each stretch
    viewer_count: int = 1_000
    is_short: bool = False
    flames: Path | None = None  # the directory for flame graphs; None: none are made

    def size(self, count: int) -> int:
        """How many of what makes a workload large: a tenth in the short form."""
        return count // _SHORT_DIVISOR if self.is_short else count

    @asynccontextmanager
    async def flame(self, server: Server, name: str) -> AsyncIterator[None]:
        """Record where the server is while the block runs, at most `seconds`: `NAME.svg`. Costs it some speed."""
        if self.flames is None:
            yield
            return
        self.flames.mkdir(parents=True, exist_ok=True)
        target = self.flames / f"{name}.svg"
        sampler = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if sampler is None:
            raise RuntimeError("flame graphs need py-spy: pip install '.[bench]'")
        arguments = ["record", "--pid", str(server.pid), "--output", str(target), "--duration", f"{self.seconds:.0f}"]
        arguments += ["--rate", str(_FLAME_SAMPLES_PER_SECOND)]
        recording = await asyncio.create_subprocess_exec(
            sampler, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            yield
            output, _ = await recording.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                recording.kill()
        if recording.returncode:
            raise RuntimeError(f"py-spy ended with {recording.returncode}: {output.decode()[-500:]}")
        title = f"{name}: the server, {_FLAME_SAMPLES_PER_SECOND} samples/s of each thread that is not idle"
        target.write_text(_EXTRAS.sub("", _TITLE.sub(rf"\g<1>{title}<", target.read_text())))


class Cost(msgspec.Struct):
    """What a stretch used; filled in when it ends."""

    seconds: float = 0.0
    server_cpu_seconds: float = 0.0
    load_cpu_seconds: float = 0.0
    other_cpu_seconds: float = 0.0  # of all else on the machine: above a few per cent the figures are too low

    def figures(self, workload: str) -> Iterator[Figure]:
        yield Figure(workload, "server, of one core", self.server_percent, "%")
        yield Figure(workload, "load generator, of one core", 100 * self.load_cpu_seconds / self.seconds, "%")
        yield Figure(workload, "anything else, of one core", self.other_percent, "%")

    @property
    def server_percent(self) -> float:
        return 100 * self.server_cpu_seconds / self.seconds

    @property
    def other_percent(self) -> float:
        return 100 * self.other_cpu_seconds / self.seconds


class Reached(msgspec.Struct, frozen=True):
    """What a closed loop came to."""

    per_second: float
    p50_ms: float
    p99_ms: float
    cost: Cost

    @classmethod
    def of(cls, latencies_ms: Sequence[float], cost: Cost) -> "Reached":
        """From the latency of each request, and what all of them cost."""
        per_second = len(latencies_ms) / cost.seconds
        return cls(per_second, percentile(latencies_ms, 50), percentile(latencies_ms, 99), cost)

    @property
    def cpu_micros(self) -> float:
        """Of the server, for one request."""
        return 1e6 * self.cost.server_cpu_seconds / (self.per_second * self.cost.seconds)


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


async def as_acknowledged(
    send: Send, *, seconds: float = float("inf"), count: int | None = None, in_flight_count: int = 1
) -> None:
    """Send the next when one is over, until the time is up or so many were sent; returns when all are over."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    deadline, left, going_count = time.perf_counter() + seconds, count, in_flight_count

    def send_next() -> None:
        nonlocal left, going_count
        if left == 0 or time.perf_counter() > deadline:
            going_count -= 1
            if not going_count:
                ended.set_result(None)
            return
        if left is not None:
            left -= 1
        send(send_next)

    for _ in range(in_flight_count):
        send_next()
    await ended
