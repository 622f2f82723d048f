"""The engine under test.

    opened ──crash──> dead ──reopen──> opened, on the files as they were at the crash
       └─────────────reopen────────────> opened, after a stop in good order

Invariants
  1. It is the real engine on a real file, in development mode; only time and entropy are the test's, and no commit
     waits for the disk (as nothing is to survive the machine).
  2. Nothing of a dead process's memory is there after `reopen`: no session, subscription, timer, action or module.
  3. What waits here is bounded in real time, and then fails with what is still under way.
"""

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from engine.auth.development import DEVELOPMENT_ISSUER
from engine.config import load_config
from engine.engine import Engine
from engine.errors import EngineClosed
from engine.events import ActionRan, Event, Events, MutationRan, QueryRan
from engine.identity import Identity
from engine.server.app import serving
from engine.testing import modules
from engine.testing.clients import Client, Subscription, result_of
from engine.testing.clock import ManualClock, ProcessClock, span_ns

_IDLE_SECONDS_MAX = 20  # of real time; what takes longer hangs
_QUIET_TURN_COUNT = 10  # turns of the loop in which another task of the test may still begin something
_NOW_NS = 1_000_000  # while time stands still `ctx.now` goes on by fractions of a ms: what is due so soon is due now


class TestEngine:
    """One app on one database, as its tests see it. `open_test_engine` makes it, or pytest's fixture `engine`."""

    __test__ = False  # not a class of tests, whatever its name says to pytest

    running: Engine
    """The engine itself; another one after `reopen`."""

    def __init__(
        self,
        app: Path,
        directory: Path,
        clock: ManualClock,
        config: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        self.app, self.clock, self.events = app, clock, Events()
        self._overrides, self._settings = {"mode": "development", **config}, settings
        self._directory = directory  # each process has one in it
        self._process_count = 0
        self._process_clock = ProcessClock(clock)
        self._stack = AsyncExitStack()  # of what is running
        self._burial: asyncio.Future[None] | None = None  # of what died, until `reopen`

    # -- calling functions

    async def query(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> Any:
        """What the query returns now, for nobody or for somebody; internal ones too.

        Raises AppError and the errors of `engine.errors`.
        """
        __tracebackhide__ = True
        return await result_of(self.alive().query(path, identity=identity, **arguments))

    async def mutation(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> Any:
        """Run a mutation; internal ones too."""
        __tracebackhide__ = True
        return await result_of(self.alive().mutation(path, identity=identity, **arguments))

    async def action(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> Any:
        """Run an action to its end; internal ones too."""
        __tracebackhide__ = True
        return await result_of(self.alive().action(path, identity=identity, **arguments))

    def subscribe(self, path: str, /, *, identity: Identity | None = None, **arguments: Any) -> Subscription:
        """Watch a query."""
        asked = f"{path}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
        return Subscription(self, self.alive().subscribe(path, identity=identity, **arguments), asked)

    def as_user(self, subject: str | None = None, /, *, issuer: str = DEVELOPMENT_ISSUER, **claims: Any) -> Client:
        """A client of somebody who is signed in, with these claims in the token; of nobody without a subject.

        The issuer is that of `engine dev`. Two clients of one user are two tabs.
        """
        if subject is None:
            assert not claims, f"nobody has claims: {claims}"
            return Client(self, None)
        return Client(self, Identity(subject=subject, issuer=issuer, claims={"iss": issuer, "sub": subject, **claims}))

    # -- time

    async def advance(self, seconds: float = 0, *, minutes: float = 0, hours: float = 0, days: float = 0) -> None:
        """Let time pass, and all that it sets off: timers fire one after another, with nothing under way in between."""
        end_ns = self.clock.elapsed_ns + span_ns(seconds, minutes, hours, days)
        await self.wait_until_idle()
        while self.clock.fire_next(end_ns):
            await self.wait_until_idle()
        self.clock.reach(end_ns)
        await self.wait_until_idle()

    async def wait_until_idle(self) -> None:
        """Until nothing is under way, or due in this very millisecond. Raises the error that ended the engine."""
        __tracebackhide__ = True
        await self.idle_unless(lambda: False)

    async def idle_unless(self, has_come: Callable[[], bool]) -> bool:
        """Until something has come, or nothing is under way that could bring it; whether it has."""
        __tracebackhide__ = True
        quiet_turn_count = 0
        try:
            async with asyncio.timeout(_IDLE_SECONDS_MAX):
                while not has_come():
                    quiet_turn_count = 0 if self.alive().under_way else quiet_turn_count + 1
                    if quiet_turn_count > _QUIET_TURN_COUNT:
                        if not self.clock.fire_next(self.clock.elapsed_ns + _NOW_NS):
                            return False
                        quiet_turn_count = 0
                    await asyncio.sleep(0)
        except TimeoutError:
            under_way = " and ".join(self.alive().under_way) or "timers that are due"
            raise AssertionError(
                f"after {_IDLE_SECONDS_MAX:g} s there still are {under_way}. "
                "Does a job start itself again at once, or an action wait for somebody?"
            ) from None
        return True

    # -- what ran

    @asynccontextmanager
    async def count_runs(self) -> AsyncIterator[Counter[str]]:
        """How often each function ran in the block, and in what the block set off, by path."""
        counts: Counter[str] = Counter()

        def count(event: Event) -> None:
            if isinstance(event, QueryRan | MutationRan | ActionRan):
                counts[event.path] += 1

        await self.wait_until_idle()
        stop = self.events.listen(count)
        try:
            yield counts
            await self.wait_until_idle()
        finally:
            stop()

    # -- over HTTP

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Serve it on a free port of this machine; the address. For routes, files and clients of other kinds."""
        engine = self.alive()
        async with serving(engine, "127.0.0.1", 0) as address:
            engine.files.addresses.base = address
            yield address

    # -- life and death

    def crash(self) -> None:
        """Let the process die here and now: what is on disk is all that is left, for `reopen`.

        Whoever waits for an answer gets EngineClosed, whether its mutation was committed or not.
        """
        dead = self.alive()
        self._process_count += 1
        copy = self._directory / str(self._process_count)
        # What SQLite needs to recover is in the database and its WAL; the rest belongs to the process.
        shutil.copytree(dead.database.path.parent, copy, ignore=shutil.ignore_patterns("*-shm", "*.lock"))
        self._process_clock.is_alive = False
        dead.abandon()
        self._burial = asyncio.ensure_future(self._stack.aclose())  # it stops the actions in the next turn of the loop

    async def reopen(self) -> None:
        """Start again on the same files: after `crash`, else after a stop in good order."""
        await self.close()
        await self._open(keeps_modules=False)

    async def _open(self, *, keeps_modules: bool) -> None:
        process_clock = self._process_clock = ProcessClock(self.clock)
        events = Events()  # of this process: the dead say nothing
        events.listen(lambda event: self.events.emit(event) if process_clock.is_alive else None)
        directory = self._directory / str(self._process_count)
        config = load_config(self.app, self._overrides)
        if "storage" not in self._overrides:
            config = msgspec.structs.replace(config, storage=None)  # files lie beside the database, in no bucket
        self.running = await self._stack.enter_async_context(
            Engine.open(
                self.app,
                directory / "engine.db",
                config=config,
                settings=self._settings,
                clock=process_clock,
                events=events,
                keeps_modules=keeps_modules,
            )
        )
        while "mutations" in self.running.under_way:  # noqa: ASYNC110 - those of jobs that were due
            await asyncio.sleep(0)
        self.running.database.writer.execute("PRAGMA synchronous = OFF")

    async def close(self) -> None:
        """Stop; what has died is cleaned up."""
        await (self._burial or self._stack.aclose())
        self._process_clock.is_alive, self._burial = False, None

    def alive(self) -> Engine:
        """What is running; raises EngineClosed after a crash."""
        __tracebackhide__ = True
        if self._burial is not None:
            raise EngineClosed("the engine has crashed: `await engine.reopen()` starts it again.")
        return self.running


@asynccontextmanager
async def open_test_engine(
    app: str | Path = ".",
    *,
    clock: ManualClock | None = None,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> AsyncIterator[TestEngine]:
    """An engine on a new database; `config`, of the shape of `engine.toml`, and `settings` stand over the app's own."""
    app = modules.use(Path(app))
    with tempfile.TemporaryDirectory(prefix="engine-test-") as directory:
        engine = TestEngine(app, Path(directory), clock or ManualClock(), config or {}, settings or {})
        try:
            await engine._open(keeps_modules=True)
            modules.keep()
            yield engine
        finally:
            await engine.close()
        if engine.running.failed.done():
            raise engine.running.failed.result()
