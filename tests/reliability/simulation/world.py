"""A server and its process, disk and network in one thread, on virtual time: the same seed gives the same history.

    up ──a fault point, or `crash`──> dead ──down for a while──> up, on what was on the disk

SQLite, the engine and its sessions are real. Time, randomness, the network and the thread that commits are the
world's. What is on the disk when a process dies are its files, as they lie there; when power is lost too, no more of
the WAL than was synced.

Invariants
  1. One random source, asked in the order in which things happen; nothing else is left to chance.
  2. What a dead process still does changes nothing: its connections are cut, its timers dead, its files no longer used.
"""

import asyncio
import itertools
import shutil
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest

from engine import backend, faults
from engine.clock import TimerHandle
from engine.config import Config
from engine.engine import Engine
from engine.errors import CommitUnknown, EngineClosed, EngineError, StorageFull
from engine.events import Event, Events
from engine.limits import Limits
from engine.live import publisher, sharing
from engine.live.live_query import LiveQuery
from engine.live.view import View
from engine.sync.shared_frames import SharedFrames
from tests.model import stopwatch
from tests.reliability.simulation import loop
from tests.reliability.simulation.network import Conditions, Line, Server

T = TypeVar("T")

START_MS = 1_790_812_800_000  # 2026-10-01 00:00 UTC
_FRAME_HEADER_SIZE_BYTES, _WAL_HEADER_SIZE_BYTES, _PAGE_SIZE_BYTES = 24, 32, 4096
_RESTART_SECONDS_MAX = 0.5
_SYNC_SECONDS_MAX = 0.003

LIMITS = Limits(
    run_ms_max=600_000,  # so that the watchdog, which sees real time, stops nothing
    ledger_seconds_after_seen=10**9,  # the ledger is read at the end
    ledger_days=36_500,
)


class Crash(BaseException):
    """The process is dead: nothing of what it was doing goes on."""


class Clock:
    """Time as one process sees it: the loop's, from a start that an operator may change."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.is_alive = True

    def wall_ns(self) -> int:
        return self._world.wall_ns

    def monotonic(self) -> float:
        return self._world.loop.now

    def call_later(self, delay_seconds: float, callback: Callable[[], None]) -> TimerHandle:
        return self._world.loop.call_later(delay_seconds, lambda: callback() if self.is_alive else None)

    async def sleep(self, delay_seconds: float) -> None:
        await asyncio.sleep(delay_seconds)

    def entropy(self, size_bytes: int) -> bytes:
        return self._world.random.randbytes(size_bytes)


class Disk:
    """How much of the WAL would outlive a loss of power."""

    synced_frame_count = 0
    is_lazy = False  # a fault of its own: most of what it says is synced is not

    def __init__(self, random_source: Random) -> None:
        self._random = random_source
        self.frame_count: Callable[[], int] = lambda: 0  # of the WAL now; set with each server

    def synced(self) -> None:
        if not self.is_lazy or self._random.random() < 0.2:
            self.synced_frame_count = self.frame_count()

    @property
    def has_lost(self) -> bool:
        return self.frame_count() > self.synced_frame_count > 0


class Plan:
    """What goes wrong at fault points. A quarter of them is armed, others with each seed; armed ones fire seldom."""

    def __init__(self, world: "World", random_source: Random, *, crash_chance: float, error_chance: float) -> None:
        self._world, self._random = world, random_source
        self._crash_chance, self._error_chance = crash_chance, error_chance
        self.armed = {point: random_source.random() < 0.25 for point in faults.POINTS}
        self.is_quiet = True  # nothing goes wrong for now
        self.passed: set[faults.Point] = set()  # where the engine was

    async def pause(self, point: faults.PausePoint) -> None:
        self.passed.add(point)
        if self._dies(point):
            self._world.crash(point)
        if self._world.is_dead:
            raise Crash
        if self.is_quiet or not self.armed[point] or self._random.random() >= 0.25:
            return
        if self._random.random() < self._error_chance:
            self._fail(point)
        for _ in range(self._random.randrange(8)):
            await asyncio.sleep(self._random.choice((0, 0, 0.001, 0.01)))
            if self._world.is_dead:
                raise Crash

    def reach(self, point: faults.ReachPoint) -> None:
        self.passed.add(point)
        if self._dies(point):
            self._world.crash(point)
        if self._world.is_dead:
            raise Crash
        is_calm = self.is_quiet or not self.armed[point] or not self._world.is_up.is_set()
        if point == "mutation.ran" and not is_calm and self._random.random() < self._error_chance / 5:
            self._note("storage undoes the group")
            self._world.engine.database.writer.rollback()

    def _dies(self, point: faults.Point) -> bool:
        if self.is_quiet or self._world.is_dead or not self.armed[point]:
            return False
        return self._random.random() < self._crash_chance * (0.05 if point in _FREQUENT else 1)

    def _fail(self, point: faults.PausePoint) -> None:
        match point:
            case "commit.before_sync":
                self._note("disk full")
                raise StorageFull("the disk is full, says the test")
            case "checkpoint.begun":
                self._note("disk full")
                raise StorageFull("the disk is full, says the test")
            case "commit.after_sync":
                self._note("commit unknown")
                raise CommitUnknown("the test says so")

    def _note(self, what: str) -> None:
        self._world.happened[what] += 1
        self._world.tell(what)


# these come with each message or mutation, the others with each commit
_FREQUENT = {"mutation.ran", "session.received", "session.answered", "session.transition", "publish.passing"}


class World:
    """`live` makes it; `engine` is another one after each crash."""

    def __init__(self, app: Path, directory: Path, seed: int, config: Config | None) -> None:
        self.seed, self.random = seed, Random(seed)
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, loop.VirtualLoop)
        self.trace: list[str] = []  # all that happened, in order
        self.conditions = Conditions()
        self.disk = Disk(self.random)
        self.is_up, self.is_dead = asyncio.Event(), True
        self.engine: Engine
        self.death_count = 0
        self.wall_skew_ns = 0
        self.loses_power = False  # with each crash
        self._app, self._directory = app, directory
        self._config = config or Config(limits=LIMITS)
        self._server: Server
        self._lines: list[Line] = []  # of this process, also those that are gone
        self._clock: Clock
        self._process: asyncio.Task[None]
        self._restart: asyncio.Task[None] | None = None
        self.plan: Plan
        self.happened: Counter[str] = Counter()  # of what goes wrong
        self.errors: list[str] = []  # that nobody caught
        self.on_event: Callable[[Event], None] = lambda event: None

    # -- time

    @property
    def wall_ns(self) -> int:
        return START_MS * 1_000_000 + round(self.loop.now * 1e9) + self.wall_skew_ns

    def set_wall(self, milliseconds: float) -> None:
        """Set the wall clock, as an operator may."""
        self.wall_skew_ns += round(milliseconds * 1e6) - self.wall_ns

    def tell(self, what: str) -> None:
        self.trace.append(f"{self.loop.now:.6f} {what}")

    # -- the process

    def start(self) -> None:
        """Start a process; `is_up` says when it serves."""
        self.is_dead = False
        self._clock = Clock(self)
        self._process = asyncio.create_task(self._live(self._clock))
        self._process.add_done_callback(self._ended)

    async def _live(self, clock: Clock) -> None:
        """One process, from its start to its burial."""
        events = Events()
        events.listen(lambda event: self._hear(event) if clock.is_alive else None)
        async with Engine.open(self._app, self.database, config=self._config, clock=clock, events=events) as engine:
            if not clock.is_alive:  # it has died while it started
                engine.abandon()
                return
            self.engine = engine
            engine.failed.add_done_callback(lambda failed: self._failed(failed.result()) if clock.is_alive else None)
            writer, limits = engine.database.writer, self._config.limits
            writer.execute("PRAGMA synchronous = OFF")  # nothing is to outlive the machine
            self.disk.frame_count = writer._wal_index.read_frame_count
            self.disk.synced_frame_count = self.disk.frame_count()
            self._server = Server(engine.backend, limits, clock, SharedFrames(b"".join, clock))
            self.is_up.set()
            self.tell("up")
            try:
                await asyncio.get_running_loop().create_future()  # until somebody ends it
            finally:
                if not clock.is_alive:
                    engine.abandon()

    def crash(self, why: str) -> None:
        """The process dies here and now."""
        if self.is_dead:
            return
        self.tell(f"crash: {why}")
        self.happened[f"crash: {why}"] += 1
        self.is_dead = True
        self.is_up.clear()
        self.death_count += 1
        self._take_image()
        self._clock.is_alive = False
        for line in self._lines:
            line.cut()
        self._lines.clear()
        self._restart = asyncio.create_task(self._start_again())

    async def connect(self) -> Line:
        """A new connection of a client. Raises ConnectionError while there is no server."""
        await asyncio.sleep(self.random.random() * self.conditions.delay_seconds_max)
        if not self.is_up.is_set():
            raise ConnectionRefusedError
        line = Line(self._server, self.random, self.conditions, self._note)
        self._lines.append(line)
        return line

    def calm(self) -> None:
        """Nothing goes wrong any more."""
        self.plan.is_quiet = True
        self.conditions = self.conditions._replace(cut_chance=0, lag_chance=0)
        for line in self._lines:
            line.conditions = self.conditions

    async def close(self) -> None:
        """Stop in good order."""
        self.calm()
        if self._restart is not None:
            await self._restart
        self.is_up.clear()
        for line in self._lines:
            line.cut()
        await self._end_process()
        self.is_dead, self._clock.is_alive = True, False

    @property
    def database(self) -> Path:
        return self._directory / str(self.death_count) / "engine.db"

    def hear_of_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What nobody caught."""
        if not isinstance(context.get("exception"), Crash):
            self.errors.append(str(context))

    # -- inside

    def _note(self, what: str) -> None:
        self.happened[what] += 1
        self.tell(what)

    def _ended(self, process: "asyncio.Task[None]") -> None:
        """A process that fails to start, or to stop, is a bug that nobody else would hear of."""
        if not process.cancelled() and not isinstance(process.exception(), Crash | EngineClosed | None):
            traceback.print_exception(process.exception())
            self.loop.stop()

    def _failed(self, error: EngineError) -> None:
        self.crash(f"exit: {error.code}")

    async def _start_again(self) -> None:
        await self._end_process()
        await asyncio.sleep(self.random.random() * _RESTART_SECONDS_MAX)
        self.start()

    async def _end_process(self) -> None:
        self._process.cancel()
        with suppress(asyncio.CancelledError, Crash, EngineError):
            await self._process

    def _take_image(self) -> None:
        """What SQLite needs to recover is in the database and its WAL; the rest belongs to the process."""
        new, old = self.database.parent, self._directory / str(self.death_count - 1)
        shutil.copytree(old, new, ignore=shutil.ignore_patterns("*-shm", "*.lock"))
        wal = new / "engine.db-wal"
        if self.loses_power and self.disk.has_lost:
            frame_size = _PAGE_SIZE_BYTES + _FRAME_HEADER_SIZE_BYTES
            lost_count = self.disk.frame_count() - self.disk.synced_frame_count
            kept = self.disk.synced_frame_count * frame_size + self.random.randrange(lost_count * frame_size)
            with wal.open("r+b") as file:
                file.truncate(_WAL_HEADER_SIZE_BYTES + kept)
            self.tell("power lost")

    def _hear(self, event: Event) -> None:
        self.tell(str(event))
        self.on_event(event)


class _Worker:
    """In the place of the thread that commits: takes a while, then does it here."""

    world: World

    def __init__(self, name: str) -> None:
        """It has no thread."""

    async def run(self, call: Callable[[], Any]) -> Any:
        world = self.world
        await asyncio.sleep(world.random.random() * _SYNC_SECONDS_MAX)
        if world.is_dead:
            raise Crash
        result = call()
        world.disk.synced()
        return result

    def close(self) -> None:
        """Nothing to end."""


def _numbered(kind: type[Any]) -> type[Any]:
    """The same class, but of two objects in a set the same comes first each time."""
    numbers = itertools.count()

    def begin(self: Any, *args: Any, **more: Any) -> None:
        kind.__init__(self, *args, **more)

    def make(cls: type[Any], *args: Any, **more: Any) -> Any:
        made = object.__new__(cls)
        made._number = next(numbers)
        return made

    body = {"__slots__": ("_number",), "__new__": make, "__init__": begin, "__hash__": lambda self: self._number}
    return type(kind.__name__, (kind,), body)


@asynccontextmanager
async def _living(
    app: Path, directory: Path, seed: int, config: Config | None, crash_chance: float, error_chance: float
) -> AsyncIterator[World]:
    world = World(app, directory, seed, config)
    with pytest.MonkeyPatch.context() as patches:
        for module in (
            "functions.run",
            "functions.runner",
            "live.deliveries",
            "live.publisher",
            "transaction.committer",
        ):
            patches.setattr(f"engine.{module}._cpu", stopwatch.cpu)
        patches.setattr("engine.transaction.committer.Worker", type("Worker", (_Worker,), {"world": world}))
        for kind, modules in ((LiveQuery, (publisher, sharing)), (View, (publisher, backend))):
            numbered = _numbered(kind)
            for module in modules:
                patches.setattr(module, kind.__name__, numbered)
        patches.setattr(stopwatch, "_held_seconds", 0.0)
        world.plan = Plan(world, world.random, crash_chance=crash_chance, error_chance=error_chance)
        patches.setattr(faults, "plan", world.plan)
        asyncio.get_running_loop().set_exception_handler(world.hear_of_error)
        try:
            world.start()
            await world.is_up.wait()
            yield world
        finally:
            await world.close()


def live(
    app: Path,
    directory: Path,
    seed: int,
    history: Callable[[World], Awaitable[T]],
    *,
    config: Config | None = None,
    crash_chance: float = 0.02,
    error_chance: float = 0.1,
) -> T:
    """One history in one world."""

    async def lived() -> T:
        async with _living(app, directory, seed, config, crash_chance, error_chance) as world:
            return await history(world)

    return loop.run(lived())
