"""Clients that go away, over real sockets: who watches is counted right within seconds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.server.app import serving
from tests.functions.apps import OpenApp, open_app
from tests.server.fakes import Served, SocketClient
from tests.sync.fakes import add, connect, mutation, query_set

FUNCTIONS = """
@mutation
async def join(ctx, who: str) -> None:
    if await ctx.db.query(Name.by_name, name=who).unique() is None:
        await ctx.db.insert(Name(name=who))
    await ctx.session.on_disconnect(leave, who=who)

@mutation
async def leave(ctx, who: str) -> None:
    found = await ctx.db.query(Name.by_name, name=who).unique()
    if found is not None:
        await ctx.db.delete(found.id)

@query
async def here(ctx) -> list[str]: return [name.name async for name in ctx.db.query(Name.by_name)]
"""
WATCHER = "00000000-0000-4000-8000-000000000000"


class Watched:
    """A served app, and a client who sees who is there."""

    def __init__(self, app: OpenApp, server: Served, watcher: SocketClient) -> None:
        self.app, self.server, self._watcher = app, server, watcher

    async def sees(self) -> Any:
        """What the watcher is shown next."""
        async with asyncio.timeout(10):
            while (message := await self._watcher.hear())["type"] != "Transition":
                pass
            return message["modifications"][0]["value"]

    @asynccontextmanager
    async def joined(self, number: int, who: str) -> AsyncIterator[SocketClient]:
        """A client that stays until the block ends, however it does."""
        async with self.server.connected() as client:
            await client.say(connect(sessionId=session_id(number)), query_set(0))
            await client.hear()
            await client.say(mutation(0, "m:join", {"who": who}))
            assert (await client.hear())["success"]
            yield client

    async def until_connected(self, *numbers: int) -> None:
        """Until each of these sessions has one connection, and no others but the watcher have any."""
        expected = {WATCHER: 1, **{session_id(number): 1 for number in numbers}}
        async with asyncio.timeout(10):
            while self.app.engine._disconnects._connection_counts != expected:  # noqa: ASYNC110 - told to nobody
                await asyncio.sleep(0)


def session_id(number: int) -> str:
    return f"11111111-0000-4000-8000-{number:012}"


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    async with (
        open_app(tmp_path, FUNCTIONS) as app,
        serving(app.engine, "127.0.0.1", 0) as address,
        aiohttp.ClientSession() as session,
    ):
        server = Served(address, session)
        async with server.connected() as watcher:
            watched = Watched(app, server, watcher)
            await watcher.say(connect(sessionId=WATCHER), query_set(0, add(0, "m:here")))
            assert await watched.sees() == []
            yield watched


def vanish(client: SocketClient) -> None:
    """Drop the connection without a word, as a phone in a tunnel does."""
    connection = client.socket._response.connection
    assert connection is not None
    assert connection.transport is not None
    connection.transport.abort()


async def test_a_closed_tab_is_gone_within_seconds(watched: Watched) -> None:
    async with watched.joined(1, "maya") as client:
        assert await watched.sees() == ["maya"]
        await client.socket.close(code=1001)
    await watched.until_connected()
    await watched.app.turn(1.999)
    assert await watched.app.call("m:here") == ["maya"]
    await watched.app.turn(0.001)
    assert await watched.sees() == []


async def test_a_lost_connection_is_given_time_to_come_back(watched: Watched) -> None:
    async with watched.joined(1, "maya") as client:
        assert await watched.sees() == ["maya"]
        vanish(client)
        await watched.until_connected()
    await watched.app.turn(9)
    async with watched.server.connected() as again:
        await again.say(connect(sessionId=session_id(1), connectionCount=1), query_set(0))
        await watched.until_connected(1)
        await watched.app.turn(60)
        assert await watched.app.call("m:here") == ["maya"]
        vanish(again)
        await watched.until_connected()
    await watched.app.turn(10)
    assert await watched.sees() == []


async def test_a_client_that_reconnects_before_the_server_knows_that_it_was_gone_has_not_left(watched: Watched) -> None:
    async with watched.joined(1, "maya") as old:
        assert await watched.sees() == ["maya"]
        async with watched.server.connected() as new:
            await new.say(connect(sessionId=session_id(1), connectionCount=1), query_set(0))
            await new.hear()
            vanish(old)
            await watched.until_connected(1)
            await watched.app.turn(60)
            assert await watched.app.call("m:here") == ["maya"]
            await new.socket.close(code=1001)
        await watched.until_connected()
        await watched.app.turn(2)
        assert await watched.sees() == []


async def test_a_page_that_is_loaded_again_never_shows_as_gone(watched: Watched) -> None:
    async with watched.joined(1, "maya") as before:
        assert await watched.sees() == ["maya"]
        await before.socket.close(code=1001)
    async with watched.joined(2, "maya"):
        await watched.until_connected(2)
        await watched.app.turn(60)
        assert await watched.app.call("m:here") == ["maya"]


async def test_over_http_it_is_an_error_that_says_what_to_do(watched: Watched) -> None:
    status, answer = await watched.server.post("/api/mutation", {"path": "m:join", "args": {"who": "curl"}})
    assert (status, answer["status"]) == (200, "error")
    assert "SessionRequired: m:join uses ctx.session.on_disconnect" in answer["errorMessage"]
    assert await watched.app.call("m:here") == []
