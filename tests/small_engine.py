"""An engine on `small_app`, what has happened in it, and subscribers that are driven by hand."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from engine import Config, Engine, Identity, Limits
from engine.events import Event, QueryRan
from engine.live.live_query import Result
from engine.live.view import ViewChange
from engine.sync.backend import MutationOutcome
from engine.testing import ManualClock
from engine.values import decode_value

APP = Path(__file__).parent / "small_app"
SECONDS_MAX = 20  # a test that waits longer hangs


def person(subject: str, **claims: str) -> Identity:
    return Identity(subject=subject, issuer="https://issuer.example", claims=claims)


class SmallEngine:
    """The engine under test."""

    def __init__(self, engine: Engine, clock: ManualClock) -> None:
        self.engine, self.clock = engine, clock
        self.events: list[Event] = []  # since the last `forget`, in order
        engine.events.listen(self.events.append)

    def forget(self) -> None:
        self.events.clear()

    def count_of(self, kind: type[Event], path: str | None = None) -> int:
        return sum(type(event) is kind and path in (None, getattr(event, "path", None)) for event in self.events)

    def run_count(self, path: str | None = None) -> int:
        """How many queries ran since the last `forget`."""
        return self.count_of(QueryRan, path)

    async def mutate(self, path: str, **arguments: Any) -> Any:
        """A mutation, and all that follows from it."""
        result = await self.engine.mutation(path, **arguments)
        await self.idle()
        return result

    def send(
        self,
        path: str,
        request_id: int,
        *,
        session: str = "session",
        identity: Identity | None = None,
        **arguments: Any,
    ) -> "Sent":
        """A mutation as a session sends it; answered later."""
        sent = Sent()
        raw = json.dumps(arguments).encode()
        self.engine.backend.start_mutation(path, raw, identity, session, request_id, sent.answers.append)
        return sent

    def subscriber(self, identity: Identity | None = None) -> "Subscriber":
        return Subscriber(self.engine, identity)

    async def idle(self) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            await self.engine.wait_until_idle()


class Sent:
    """A mutation that was sent, and its answers: one, if all is well."""

    def __init__(self) -> None:
        self.answers: list[MutationOutcome] = []

    @property
    def outcome(self) -> MutationOutcome:
        (outcome,) = self.answers
        return outcome


class Subscriber:
    """A view, and what its client holds."""

    def __init__(self, engine: Engine, identity: Identity | None, on_ready: Callable[[], None] | None = None) -> None:
        self.told_count = 0
        self.results: dict[int, Result] = {}  # the newest of each query
        self.ts = 0
        self.view = engine.backend.make_view(self._told)
        self.view.set_identity(identity)
        self._engine = engine

    def ask(self, query_id: int, path: str, journal: str | None = None, **arguments: Any) -> None:
        self.view.add(query_id, path, json.dumps(arguments).encode(), journal)

    def take(self) -> ViewChange | None:
        change = self.view.take()
        if change is not None:
            assert change.ts >= self.ts
            self.ts = change.ts
            self.results.update(change.results)
        return change

    async def catch_up(self) -> dict[int, Result]:
        """Take until nothing newer is there; what was given meanwhile."""
        given: dict[int, Result] = {}
        async with asyncio.timeout(SECONDS_MAX):
            while True:
                change = self.take()
                given.update(change.results if change is not None else {})
                if change is not None and change.ts == self._engine.backend.published_ts():
                    return given
                await self._engine.wait_until_idle()

    def value(self, query_id: int = 0) -> Any:
        return value_of(self.results[query_id])

    def _told(self) -> None:
        self.told_count += 1


def value_of(result: Result) -> Any:
    assert result.failure is None, result.failure
    assert result.value is not None
    return decode_value(msgspec.json.decode(result.value))


@asynccontextmanager
async def small_engine(database: str | Path = ":memory:", **limits: int) -> AsyncIterator[SmallEngine]:
    """Open, on a database that goes away, with some limits set; no query is long by chance."""
    clock = ManualClock()
    config = Config(mode="development", limits=Limits(**{"run_slow_ms": 1_000, **limits}))
    async with Engine.open(APP, database, config=config, clock=clock) as engine:
        yield SmallEngine(engine, clock)
