"""What a function is given as `ctx`: one class for each kind of function.

`now` and `random` are fixed by the run, so that the same data and arguments give the same result; `auth` is tracked;
`db` reads, and in a mutation writes. Nothing here decides anything: the runner does.
"""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from engine.clock import seeded_random
from engine.errors import FunctionMisuse
from engine.functions.reader import DatabaseReader, DatabaseWriter
from engine.identity import Identity

if TYPE_CHECKING:
    from engine.functions.run import Run

_KINDS_BY_ATTRIBUTE = {
    "db": "queries and mutations (an action runs one of them)",
    "scheduler": "mutations and actions",
    "run_mutation": "mutations and actions",
    "run_action": "actions",
}

FunctionReference = str | Callable[..., Any]  # a function itself, or its path


class Auth:
    """Who asks."""

    def __init__(self, run: "Run") -> None:
        self._run = run

    def identity(self) -> Identity | None:
        """The signed-in caller, or None. A query that never asks is shared by everybody."""
        return self._run.identity()


class Log:
    """Lines for the developer: `ctx.log("joined", game_id)`. Clients print them in development."""

    def __init__(self, run: "Run") -> None:
        self._run = run

    def __call__(self, *parts: object) -> None:
        self._run.log("LOG", parts)

    def debug(self, *parts: object) -> None:
        self._run.log("DEBUG", parts)

    def info(self, *parts: object) -> None:
        self._run.log("INFO", parts)

    def warn(self, *parts: object) -> None:
        self._run.log("WARN", parts)

    def error(self, *parts: object) -> None:
        self._run.log("ERROR", parts)


class Scheduler(Protocol):
    """Runs functions later. From a mutation it is part of the commit: rolled back means never scheduled."""

    async def run_after(self, delay: float | timedelta, function: FunctionReference, /, **arguments: Any) -> str:
        """Run a mutation or action once, after a delay in ms (or a timedelta); the id of the job."""

    async def run_at(self, when_ms: float, function: FunctionReference, /, **arguments: Any) -> str:
        """Run a mutation or action once, at a time in ms since the epoch; the id of the job."""

    async def cancel(self, job_id: str) -> None:
        """Keep a job from running; nothing happens if it has run, runs, or is gone."""


class NestedCalls(Protocol):
    """Calling functions from functions; made by the runner for one run."""

    async def run_query(self, function: FunctionReference, arguments: dict[str, Any]) -> Any: ...
    async def run_mutation(self, function: FunctionReference, arguments: dict[str, Any]) -> Any: ...
    async def run_action(self, function: FunctionReference, arguments: dict[str, Any]) -> Any: ...


class _Context:
    def __init__(self, run: "Run", now: float, seed: Callable[[], bytes], calls: NestedCalls) -> None:
        self.now = now
        """Milliseconds since the epoch, fixed for the run; strictly growing from mutation to mutation."""
        self.auth = Auth(run)
        self.log = Log(run)
        self._seed = seed
        self._calls = calls

    @cached_property
    def random(self) -> Random:
        """Seeded: a run that is repeated draws the same numbers; each function that it calls draws others."""
        return seeded_random(self._seed())

    def run_query(self, function: FunctionReference, /, **arguments: Any) -> Awaitable[Any]:
        """What another query returns; in a query or mutation it reads the same snapshot."""
        return self._calls.run_query(function, arguments)

    if not TYPE_CHECKING:  # a checker shall still find misspelt names

        def __getattr__(self, name: str) -> Any:
            kinds = _KINDS_BY_ATTRIBUTE.get(name)
            if kinds is None:
                raise AttributeError(f"ctx has no {name!r}")
            raise FunctionMisuse(f"ctx.{name} is there in {kinds} only.")


class QueryCtx(_Context):
    """`ctx` of a query."""

    def __init__(
        self, run: "Run", now: float, seed: Callable[[], bytes], calls: NestedCalls, db: DatabaseReader
    ) -> None:
        super().__init__(run, now, seed, calls)
        self.db = db


class MutationCtx(_Context):
    """`ctx` of a mutation."""

    def __init__(
        self,
        run: "Run",
        now: float,
        seed: Callable[[], bytes],
        calls: NestedCalls,
        db: DatabaseWriter,
        scheduler: Scheduler,
    ) -> None:
        super().__init__(run, now, seed, calls)
        self.db = db
        self.scheduler = scheduler

    def run_mutation(self, function: FunctionReference, /, **arguments: Any) -> Awaitable[Any]:
        """Run another mutation inside this one; if it raises, its own writes are undone and you may go on."""
        return self._calls.run_mutation(function, arguments)


class ActionCtx(_Context):
    """`ctx` of an action: no `db`; each query and mutation it runs is a transaction of its own."""

    def __init__(
        self, run: "Run", now: float, seed: Callable[[], bytes], calls: NestedCalls, scheduler: Scheduler
    ) -> None:
        super().__init__(run, now, seed, calls)
        self.scheduler = scheduler

    def run_mutation(self, function: FunctionReference, /, **arguments: Any) -> Awaitable[Any]:
        """Run a mutation; it is durable when this returns."""
        return self._calls.run_mutation(function, arguments)

    def run_action(self, function: FunctionReference, /, **arguments: Any) -> Awaitable[Any]:
        """Run another action and wait for it."""
        return self._calls.run_action(function, arguments)
