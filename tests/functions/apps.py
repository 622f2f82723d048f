"""Small apps, written into a directory of their own, and what happens in them."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

from engine.config import Config, Mode
from engine.engine import Engine
from engine.events import Event, JobFinished, QueryRan
from engine.functions.calls import value_of
from engine.functions.failures import Failure
from engine.functions.outcomes import Outcome
from engine.limits import Limits
from engine.live.live_query import Result
from engine.sync.backend import ActionOutcome, MutationOutcome
from engine.testing import ManualClock

SECONDS_MAX = 20  # a test that waits longer hangs

UNHURRIED = Limits(run_slow_ms=10_000, run_ms_max=10_000)  # a busy machine changes nothing

SCHEMA = """
    from engine import Id, Table, index, unique

    class Item(Table, name="items"):
        key: str
        rank: int = 0
        note: str = ""
        score: float | None = None
        by_key = index("key", "rank")
        by_score = index("score")

    class Name(Table, name="names"):
        name: str
        by_name = unique("name")
"""

_HEADER = """
import asyncio
from typing import Any
from engine import *
from schema import *
"""


def write_app(directory: Path, functions: str | Mapping[str, str], *, schema: str = SCHEMA) -> Path:
    """Write `schema.py` and `functions/`: one module `m`, or several by their paths; what was there goes."""
    modules = {"m": functions} if isinstance(functions, str) else functions
    directory.mkdir(exist_ok=True)
    (directory / "schema.py").write_text(dedent(schema))
    for old in (directory / "functions").rglob("*.py"):
        old.unlink()
    for name, source in modules.items():
        path = directory / "functions" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_HEADER + dedent(source))
    return directory


class OpenApp:
    """An engine over such an app, its clock, and the events since the last `forget_events`."""

    def __init__(self, directory: Path, engine: Engine, clock: ManualClock) -> None:
        self.directory, self.engine, self.clock = directory, engine, clock
        self.events: list[Event] = []
        engine.events.listen(self.events.append)

    async def call(self, path: str, **arguments: Any) -> Any:
        """What a function returns, whatever its kind; raises what it raises."""
        function = self.engine.registry.any(path, ("query", "mutation", "action"))
        async with asyncio.timeout(SECONDS_MAX):
            match function.kind:
                case "query":
                    return await self.engine.query(path, **arguments)
                case "mutation":
                    return await self.engine.mutation(path, **arguments)
                case "action":
                    return await self.engine.action(path, **arguments)

    async def outcome(self, path: str, **arguments: Any) -> MutationOutcome | ActionOutcome | Result:
        """What a client would be told: bytes or failure, and log lines."""
        function = self.engine.registry.any(path, ("query", "mutation", "action"))
        raw = function.signature.to_wire_bytes(function.signature.from_python(arguments))
        backend = self.engine.backend
        async with asyncio.timeout(SECONDS_MAX):
            match function.kind:
                case "query":
                    return await backend.http_query(path, raw, None)
                case "mutation":
                    return await backend.http_mutation(path, raw, None)
                case "action":
                    return await backend.http_action(path, raw, None)

    async def failure(self, path: str, **arguments: Any) -> Failure:
        """How a function fails, as its client is told."""
        failure = (await self.outcome(path, **arguments)).failure
        assert failure is not None, f"{path} did not fail"
        return failure

    async def page(self, path: str, journal: str | None = None, **arguments: Any) -> tuple[Any, str | None]:
        """The result of a paginated query as a client that holds this journal gets it, and the new journal."""
        function = self.engine.registry.any(path, ("query",))
        raw = function.signature.to_wire_bytes(function.signature.from_python(arguments))
        view = self.engine.backend.make_view(lambda: None)
        try:
            view.add(0, path, raw, journal)
            change = view.take()
            assert change is not None, "a short query is there at once"
            result = change.results[0]
            return value_of(function, Outcome(result.value, result.failure, result.log_lines)), result.journal
        finally:
            view.close()

    @asynccontextmanager
    async def watched(self, path: str, **arguments: Any) -> AsyncIterator[AsyncIterator[Any]]:
        """A subscription of which the first result was taken."""
        async with self.engine.subscribe(path, **arguments) as results:
            await anext(results)
            self.forget_events()
            yield results

    def forget_events(self) -> None:
        self.events.clear()

    def run_count(self, path: str) -> int:
        """How often a query ran since the last `forget_events`."""
        return sum(isinstance(event, QueryRan) and event.path == path for event in self.events)

    @property
    def jobs_finished(self) -> list[tuple[str, str]]:
        """Path and state of each job that ended, in order."""
        return [(event.path, event.state) for event in self.events if isinstance(event, JobFinished)]

    async def idle(self) -> None:
        """Until everything that was set off is done."""
        async with asyncio.timeout(SECONDS_MAX):
            await self.engine.wait_until_idle()
            await asyncio.sleep(0)
            await self.engine.wait_until_idle()

    async def turn(self, seconds: float) -> None:
        """Let time pass, timer by timer, and what each sets off."""
        await self.idle()
        end = self.clock.monotonic() + seconds
        while (wait := self.clock.seconds_to_next_timer) is not None and self.clock.monotonic() + wait <= end:
            self.clock.advance(wait)
            await self.idle()
        self.clock.advance(end - self.clock.monotonic())
        await self.idle()

    async def rewrite(self, functions: str | Mapping[str, str], *, schema: str = SCHEMA) -> None:
        """Save other code and reload it."""
        write_app(self.directory, functions, schema=schema)
        await self.engine.reload()


@asynccontextmanager
async def open_app(
    directory: Path,
    functions: str | Mapping[str, str] | None = None,
    *,
    schema: str = SCHEMA,
    mode: Mode = "development",
    limits: Limits | None = None,
    clock: ManualClock | None = None,
    **more: Any,
) -> AsyncIterator[OpenApp]:
    """Write an app (None: open what is there) and open it; its database lies beside it and stays. `more` configures."""
    if functions is not None:
        write_app(directory / "app", functions, schema=schema)
    clock = clock or ManualClock()
    config = Config(mode=mode, limits=limits or UNHURRIED, **more)
    async with Engine.open(directory / "app", directory / "engine.db", config=config, clock=clock) as engine:
        yield OpenApp(directory / "app", engine, clock)
