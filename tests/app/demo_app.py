"""The demo app in a test: its engine, its people, and what has run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from engine.engine import Engine
from engine.errors import AppError
from engine.events import Event, QueryRan
from engine.identity import Identity
from engine.testing import ManualClock, open_test_engine

APP = Path(__file__).parents[2]
ISSUER = "https://development.localhost"
SECONDS_MAX = 20  # a test that waits longer hangs


def person(subject: str, **claims: str) -> Identity:
    """Somebody who signs in; only those below are in the demo data."""
    return Identity(subject=subject, issuer=ISSUER, claims=claims)


MAYA, SAM, TOMAS, AIKO = person("maya"), person("sam"), person("tomas"), person("aiko")  # admin, moderator, and users


def missing(document_id: str) -> str:
    """An id of the same table that no document has."""
    return document_id[:-1] + ("0" if document_id[-1] != "0" else "1")


class DemoApp:
    """One engine over the demo app, filled by `demo:seed`."""

    def __init__(self, engine: Engine, clock: ManualClock) -> None:
        self.engine, self.clock = engine, clock
        self.events: list[Event] = []  # since the last `forget_events`, in order
        self.contents: list[Any] = []  # by title
        self.live_game = self.quiet_game = ""  # with the demo chat, and without any

    async def open(self) -> None:
        assert await self.engine.mutation("demo:seed")
        self.contents = await self.query("content:list")
        games = await self.query("games:list")
        self.live_game = next(game.id for game in games if game.status == "live")
        self.quiet_game = next(game.id for game in games if game.status == "scheduled")
        self.clock.advance(1)  # what a test does now happens at whole milliseconds: nothing else did
        self.engine.events.listen(self.events.append)

    async def query(self, path: str, identity: Identity | None = None, **arguments: Any) -> Any:
        return await self.engine.query(path, identity=identity, **arguments)

    async def mutation(self, path: str, identity: Identity | None = None, **arguments: Any) -> Any:
        return await self.engine.mutation(path, identity=identity, **arguments)

    async def refusal(self, path: str, identity: Identity | None = None, **arguments: Any) -> str:
        """The `code` with which the app refuses a mutation or a query."""
        is_query = path.partition(":")[2].startswith(("get_", "list", "me", "moderation_"))
        try:
            await (self.query if is_query else self.mutation)(path, identity, **arguments)
        except AppError as error:
            return str(error.data["code"])
        raise AssertionError(f"{path} was not refused")

    @asynccontextmanager
    async def subscribed(
        self, path: str, identity: Identity | None = None, **arguments: Any
    ) -> AsyncIterator["Subscriber"]:
        """A subscriber that holds its first result."""
        async with self.engine.subscribe(path, identity=identity, **arguments) as results:
            subscriber = Subscriber(results)
            await subscriber.next()
            yield subscriber

    def forget_events(self) -> None:
        self.events.clear()

    def run_count(self, path: str) -> int:
        """How often a query ran since the last `forget_events`."""
        return sum(isinstance(event, QueryRan) and event.path == path for event in self.events)

    async def idle(self) -> None:
        """Until everything that commits have set off is done."""
        async with asyncio.timeout(SECONDS_MAX):
            await self.engine.wait_until_idle()

    async def turn(self, seconds: float) -> None:
        """Let time pass, timer by timer, and what each sets off."""
        end = self.clock.monotonic() + seconds
        while (wait := self.clock.seconds_to_next_timer) is not None and self.clock.monotonic() + wait <= end:
            self.clock.advance(wait)
            await self.idle()
        self.clock.advance(end - self.clock.monotonic())
        await self.idle()


class Subscriber:
    """One subscription: the results that were pushed so far, oldest first."""

    def __init__(self, results: AsyncIterator[Any]) -> None:
        self._results = results
        self.pushed: list[Any] = []

    async def next(self) -> Any:
        """Wait for the next push."""
        async with asyncio.timeout(SECONDS_MAX):
            self.pushed.append(await anext(self._results))
        return self.pushed[-1]

    async def until(self, expected: Any) -> None:
        """Wait for pushes until one is equal to `expected`."""
        while self.pushed[-1] != expected:
            await self.next()


@asynccontextmanager
async def open_demo_app(**options: Any) -> AsyncIterator[DemoApp]:
    clock = ManualClock()
    async with open_test_engine(APP, clock=clock, **options) as engine:
        app = DemoApp(engine, clock)
        await app.open()
        yield app
