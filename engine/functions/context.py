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
from engine.functions.moments import Moment
from engine.functions.reader import DatabaseReader, DatabaseWriter
from engine.identity import Identity
from engine.ids import Id

if TYPE_CHECKING:
    from engine.functions.jobs import ScheduledJob
    from engine.functions.rate_limits import RateLimit
    from engine.functions.run import Run
    from engine.functions.runner import Runner
    from engine.functions.storage import ActionStorage, MutationStorage, QueryStorage
    from engine.transaction.reading import ReadTransaction
    from engine.transaction.transaction import WriteTransaction

_KINDS_BY_ATTRIBUTE = {
    "db": "queries and mutations (an action runs one of them)",
    "scheduler": "mutations and actions",
    "run_mutation": "mutations and actions",
    "run_action": "actions",
    "storage": "queries, mutations and actions",
    "limit": "mutations",
    "request": "actions and routes",
    "session": "mutations",
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
    """Runs functions later. From a mutation it is part of the commit: rolled back means never scheduled.

    A job is a document: `ctx.db.get(job_id)` gives the `ScheduledJob` with its state, error and attempts.
    """

    async def run_after(
        self, delay: float | timedelta, function: FunctionReference, /, **arguments: Any
    ) -> "Id[ScheduledJob]":
        """Run a mutation or action once, after a delay in ms (or a timedelta); the id of the job."""

    async def run_at(self, when_ms: float, function: FunctionReference, /, **arguments: Any) -> "Id[ScheduledJob]":
        """Run a mutation or action once, at a time in ms since the epoch; the id of the job."""

    async def cancel(self, job_id: "Id[ScheduledJob] | str") -> None:
        """Keep a job from running, and cancel an action under way; nothing happens if it has ended, or is gone."""


class Session(Protocol):
    """The connection of the client who called, where there is one that stays: a WebSocket, not HTTP."""

    @property
    def is_open(self) -> bool:
        """Whether such a client called this mutation; if not, what is below raises SessionRequired."""

    async def on_disconnect(self, function: FunctionReference, /, **arguments: Any) -> None:
        """Run a mutation once, as this caller, when the client is gone and does not come back in time.

        Registering the same call again changes nothing. It stays registered until it has run, over reconnects and
        restarts of the server. While other sessions of the caller have registered the same call, only the last runs it.
        """

    async def cancel_on_disconnect(self, function: FunctionReference, /, **arguments: Any) -> None:
        """Take back what this session registered; nothing happens if it did not."""


class NestedCalls(Protocol):
    """Calling functions from functions; made by the runner for one run."""

    async def run_query(self, function: FunctionReference, arguments: dict[str, Any]) -> Any: ...
    async def run_mutation(self, function: FunctionReference, arguments: dict[str, Any]) -> Any: ...
    async def run_action(self, function: FunctionReference, arguments: dict[str, Any]) -> Any: ...


class _Context:
    _run: "Run"
    _now: float
    _calls: NestedCalls
    _seed: Callable[[], bytes]  # not made before it is asked for

    @property
    def auth(self) -> Auth:
        """Who asks."""
        return Auth(self._run)

    @property
    def now(self) -> float:
        """Milliseconds since the epoch, fixed for the run; strictly growing from mutation to mutation."""
        return self._now

    @cached_property
    def log(self) -> Log:
        """Lines for the developer."""
        return Log(self._run)

    @property
    def settings(self) -> Any:
        """What the operator set for the app: an instance of its class of `Settings`."""
        return self._run.settings

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


class _Timed(_Context):
    """Of what reads the database."""

    def ago(
        self, *, days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0, milliseconds: float = 0
    ) -> Moment:
        """A bound that moves with time: `ctx.db.query(Session.by_seen, gte=ctx.ago(minutes=2))`.

        A query that has one runs again by itself, at the moment when its result can change.
        """
        return Moment(
            self._now,
            timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds, milliseconds=milliseconds),
        )


class QueryCtx(_Timed):
    """`ctx` of a query."""

    def __init__(
        self,
        run: "Run",
        now: float,
        seed: Callable[[], bytes],
        calls: NestedCalls,
        db: DatabaseReader,
        runner: "Runner",
        transaction: "ReadTransaction",
    ) -> None:
        self._run, self._now, self._seed, self._calls, self.db = run, now, seed, calls, db
        self._runner, self._transaction = runner, transaction  # for what few functions ask for

    @cached_property
    def storage(self) -> "QueryStorage":
        """Files that clients have uploaded."""
        return self._runner.query_storage(self._run, self._transaction)

    @property
    def now(self) -> float:
        """The time of this run, in ms: no time that passes runs a query again. `ago` and `rerun_at` do."""
        self._run.read_now = True
        return self._now

    def rerun_at(self, when: float | Moment) -> None:
        """Run again at this time (ms since the epoch), whatever is written or not; nothing happens if it has passed."""
        when_ms = when.ms if isinstance(when, Moment) else float(when)
        if when_ms > self._now:
            self._run.rerun_by(when_ms)


class MutationCtx(_Timed):
    """`ctx` of a mutation."""

    def __init__(
        self,
        run: "Run",
        now: float,
        seed: Callable[[], bytes],
        calls: NestedCalls,
        db: DatabaseWriter,
        runner: "Runner",
        transaction: "WriteTransaction",
    ) -> None:
        self._run, self._now, self._seed, self._calls, self.db = run, now, seed, calls, db
        self._runner, self._transaction = runner, transaction  # for what few functions ask for

    @cached_property
    def storage(self) -> "MutationStorage":
        """Files that clients have uploaded."""
        return self._runner.mutation_storage(self._run, self._transaction)

    @cached_property
    def scheduler(self) -> Scheduler:
        """Runs functions later."""
        return self._runner.scheduler(self._run, self._transaction)

    @cached_property
    def session(self) -> Session:
        """The connection of the client who called."""
        return self._runner.session(self._run, self._transaction)

    async def limit(self, rate: "RateLimit", *, key: str = "", cost: int = 1) -> None:
        """Use a declared rate limit on behalf of `key`, or raise RateLimited; what fails later has used nothing."""
        self._runner.limiter(self._run, self._transaction).use(rate, key, cost)

    def run_mutation(self, function: FunctionReference, /, **arguments: Any) -> Awaitable[Any]:
        """Run another mutation inside this one; if it raises, its own writes are undone and you may go on."""
        return self._calls.run_mutation(function, arguments)


class ActionCtx(_Context):
    """`ctx` of an action: no `db`; each query and mutation it runs is a transaction of its own."""

    def __init__(
        self,
        run: "Run",
        now: float,
        seed: Callable[[], bytes],
        calls: NestedCalls,
        storage: "ActionStorage",
        scheduler: Scheduler,
    ) -> None:
        self._run, self._now, self._seed, self._calls = run, now, seed, calls
        self.storage = storage
        self.scheduler = scheduler
        self.request = run.request
        """The HTTP request of the route that this is, or that called this; None if none did."""

    def run_mutation(self, function: FunctionReference, /, **arguments: Any) -> Awaitable[Any]:
        """Run a mutation; it is durable when this returns."""
        return self._calls.run_mutation(function, arguments)

    def run_action(self, function: FunctionReference, /, **arguments: Any) -> Awaitable[Any]:
        """Run another action and wait for it."""
        return self._calls.run_action(function, arguments)
