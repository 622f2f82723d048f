"""Clients that lose their connection, all at once or by a network that misbehaves, come back and are current.

`REL_N` is the number of clients that come back after a restart (300).
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.reliability.clients import Client, Crowd
from tests.reliability.history import copy_database, read_stored, violations
from tests.reliability.proxy import Proxy, open_proxy
from tests.reliability.server_process import SECONDS_MAX, ServerProcess
from tests.reliability.test_kill import write_app
from tests.sync.fakes import add, query_set

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("REL_SEED", 20_262))
CLIENT_COUNT = int(os.environ.get("REL_N", 300))
ROOM_COUNT = 40
COMEBACK_SECONDS = 5 * min(1, CLIENT_COUNT / 2_000)  # over which the clients come back: 400 a second
CURRENT_SECONDS_MAX = 15

SCHEMA = """
from engine import Table, index

class Note(Table, name="notes"):
    room: int
    text: str
    by_room = index("room")
"""

NOTES = """
from collections import Counter
from engine import ActionCtx, MutationCtx, QueryCtx, action, mutation, query
from schema import Note

runs = Counter()  # of queries, by what they were asked

@query
async def texts(ctx: QueryCtx, room: int) -> list[str]:
    runs[str(room)] += 1
    return [note.text for note in await ctx.db.query(Note.by_room, room=room).collect()]

@query
async def count(ctx: QueryCtx) -> int:
    runs["all"] += 1
    return await ctx.db.query(Note).count()

@mutation
async def write(ctx: MutationCtx, room: int, text: str) -> None:
    await ctx.db.insert(Note(room=room, text=text))

@action
async def take_runs(ctx: ActionCtx) -> dict[str, int]:
    taken = dict(runs)
    runs.clear()
    return taken
"""


class Tab(Client):
    """Watches a room, and the count of all notes."""

    def __init__(
        self, server: ServerProcess, random_source: random.Random, room: int, address: str | None = None
    ) -> None:
        super().__init__(server, random_source, address)
        self.room = room
        self.comeback_seconds = 0.0  # at most, after its connection has ended
        self.transition_count = 0  # on this connection
        self.texts: list[str] = []
        self.count: int | None = None  # None until the connection's first result
        self._random = random_source

    def shows(self, texts: list[str], count: int) -> bool:
        """Whether this is what the newest start of the server has shown it."""
        return self.heard_at_start == self._server.start_count and (self.texts, self.count) == (texts, count)

    async def _pause(self) -> None:
        self.count, self.transition_count = None, 0
        if self.comeback_seconds:  # as the jitter of official clients spreads them
            await asyncio.sleep(self._random.uniform(0, self.comeback_seconds))

    async def _begin(self) -> None:
        await self._say(query_set(0, add(0, "notes:texts", {"room": self.room}), add(1, "notes:count")))

    async def _moved(self, ts: int, transition: dict[str, Any]) -> None:
        self.transition_count += 1
        for modification in transition["modifications"]:
            assert modification["type"] == "QueryUpdated", f"{modification}; {self._server.log_tail()}"
            if modification["queryId"] == 0:
                self.texts = modification["value"]
            else:
                self.count = int(modification["value"])


def write_rooms_app(directory: Path) -> Path:
    (directory / "functions").mkdir(parents=True)
    (directory / "schema.py").write_text(SCHEMA)
    (directory / "functions" / "notes.py").write_text(NOTES)
    return directory


class Rooms:
    """What was written."""

    def __init__(self, server: ServerProcess, http: aiohttp.ClientSession) -> None:
        self.texts: dict[int, list[str]] = {room: [] for room in range(ROOM_COUNT)}
        self.http, self._server = http, server

    async def write(self, room: int) -> None:
        self.texts[room].append(f"note {len(self.texts[room])}")
        await self._call("mutation", "notes:write", room=room, text=self.texts[room][-1])

    async def take_runs(self) -> dict[str, int]:
        """How often each query has run since this was asked."""
        return {name: int(count) for name, count in (await self._call("action", "notes:take_runs")).items()}

    async def all_current(self, tabs: Sequence[Tab]) -> float:
        """Wait until each of these shows what was written; how long that took, in seconds."""
        began, count = time.monotonic(), sum(map(len, self.texts.values()))
        await asyncio.gather(*[tab.until(partial(tab.shows, self.texts[tab.room], count)) for tab in tabs])
        return time.monotonic() - began

    async def ask(self, kind: str, path: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
        """The status and the answer, over HTTP."""
        body = {"path": path, "args": arguments, "format": "json"}
        async with self.http.post(f"{self._server.address}/api/{kind}", json=body) as response:
            return response.status, await response.json()

    async def _call(self, kind: str, path: str, **arguments: Any) -> Any:
        status, answer = await self.ask(kind, path, **arguments)
        assert (status, answer["status"]) == (200, "success"), answer
        return answer["value"]


async def test_all_clients_come_back_after_a_restart_and_what_they_share_is_run_once(tmp_path: Path) -> None:
    random_source = random.Random(SEED)
    server = ServerProcess(write_rooms_app(tmp_path / "app"), tmp_path / "engine.db")
    tabs = [Tab(server, random_source, number % ROOM_COUNT) for number in range(CLIENT_COUNT)]
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as http,
            asyncio.TaskGroup() as tasks,
        ):
            rooms = Rooms(server, http)
            await server.start()
            for tab in tabs:
                tab.comeback_seconds = COMEBACK_SECONDS
            running = [tasks.create_task(tab.run(http)) for tab in tabs]
            for room in range(ROOM_COUNT):
                await rooms.write(room)
            await rooms.all_current(tabs)

            server.kill()
            await server.ended()
            await server.start()
            seconds = await rooms.all_current(tabs)
            print(f"{CLIENT_COUNT} clients were current {seconds:.2f} s after the restart")
            assert seconds <= CURRENT_SECONDS_MAX
            asked = {"all": 1} | {str(room): 1 for room in range(min(ROOM_COUNT, CLIENT_COUNT))}
            assert await rooms.take_runs() == asked  # each once, however many ask it

            await rooms.write(7)
            await rooms.all_current(tabs)
            assert await rooms.take_runs() == {"all": 1, "7": 1}
            for task in running:
                task.cancel()
    finally:
        await server.close()
    assert "ERROR" not in server.log(), server.log_tail()


# -- a network that misbehaves


async def through_a_bad_network(
    directory: Path, misbehave: Callable[[Proxy, Crowd], Awaitable[None]], *, npm: Sequence[int] = ()
) -> None:
    """Clients put numbers while the network misbehaves, and until it is well again; then all is checked."""
    random_source = random.Random(SEED)
    server = ServerProcess(write_app(directory / "app"), directory / "engine.db")
    try:
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(open_proxy(server.port, random_source))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            crowd = Crowd(server, random_source, [4] * 3, npm=npm, address=proxy.address)
            await server.start()
            crowd.start(http, tasks)
            await crowd.answered()
            await misbehave(proxy, crowd)
            proxy.mode = "pass"
            crowd.go_online()
            await crowd.answered()
            await crowd.finish()
        server.kill()
        await server.ended()
    finally:
        await server.close()
    stored = read_stored(copy_database(server.database, directory / "copy.db"), None)
    assert violations(crowd.told(), stored) == []
    assert len(stored.entries) == crowd.sent_count
    for word in ("ERROR", "Traceback"):
        assert word not in server.log(), server.log_tail()


async def test_a_slow_network_costs_no_connection(tmp_path: Path) -> None:
    async def delay(proxy: Proxy, crowd: Crowd) -> None:
        proxy.mode = "delay"
        await crowd.answered()
        assert [client.loss_count for client in crowd.raw] == [0] * 4

    await through_a_bad_network(tmp_path, delay)


async def test_what_a_blackhole_held_goes_on_where_it_was(tmp_path: Path) -> None:
    async def hold(proxy: Proxy, crowd: Crowd) -> None:
        proxy.mode = "blackhole"
        await asyncio.gather(*[asyncio.wait_for(writer.silence(), SECONDS_MAX) for writer in crowd.writers])
        proxy.mode = "pass"
        await crowd.answered()
        assert [client.loss_count for client in crowd.raw] == [0] * 4

    await through_a_bad_network(tmp_path, hold)


async def test_clients_that_the_server_takes_for_gone_come_back(tmp_path: Path) -> None:
    async def half_close(proxy: Proxy, crowd: Crowd) -> None:
        for count in range(1, 4):
            proxy.half_close()
            await asyncio.gather(*[client.lost(count) for client in crowd.raw])
            await crowd.answered()

    await through_a_bad_network(tmp_path, half_close)


async def test_clients_whose_connections_are_reset_come_back(tmp_path: Path) -> None:
    async def reset(proxy: Proxy, crowd: Crowd) -> None:
        for count in range(1, 11):
            proxy.reset()
            await asyncio.gather(*[client.lost(count) for client in crowd.raw])
            await crowd.answered(5)

    await through_a_bad_network(tmp_path, reset)


async def test_clients_that_lose_every_second_connection_lose_nothing_else(tmp_path: Path) -> None:
    async def drop(proxy: Proxy, crowd: Crowd) -> None:
        proxy.mode = "drop"
        for _ in range(10):
            proxy.reset()
            await crowd.answered(5)
        assert proxy.dropped_count > 10

    await through_a_bad_network(tmp_path, drop)


# -- a database that is older than what its clients have seen


async def all_answered(crowd: Crowd, server: ServerProcess) -> None:
    crowd.go_online()
    await crowd.answered()
    await crowd.officials_answered_by(server.start_count)


async def with_an_older_database(directory: Path, *, broken: str | None = None) -> str:
    """The log of a server that is given a copy of its database from before its clients' newest answers.

    Raises what the clients find wrong.
    """
    random_source = random.Random(SEED)
    server = ServerProcess(write_app(directory / "app"), directory / "engine.db", broken=broken)
    try:
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(open_proxy(server.port, random_source))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            crowd = Crowd(server, random_source, [4] * 3, npm=[3], address=proxy.address)
            await server.start()
            crowd.start(http, tasks)
            await all_answered(crowd, server)
            server.kill()
            await server.ended()
            older = copy_database(server.database, directory / "older.db")

            await server.start()
            await all_answered(crowd, server)
            server.kill()
            await server.ended()
            newest = copy_database(server.database, directory / "newest.db")

            copy_database(older, server.database)
            await asyncio.gather(*[client.silence() for client in (*crowd.writers, *crowd.officials)])
            told = crowd.told()
            await server.start()
            crowd.go_online()
            await asyncio.gather(*[client.lost(client.loss_count + 3) for client in crowd.raw])
            assert crowd.told().answers == told.answers, "the old database was served"
            server.kill()
            await server.ended()

            copy_database(newest, server.database)
            await server.start()
            await all_answered(crowd, server)
            await crowd.finish()
        server.kill()
        await server.ended()
    finally:
        await server.close()
    stored = read_stored(copy_database(server.database, directory / "copy.db"), None)
    assert violations(crowd.told(), stored) == []
    return server.log()


async def test_clients_that_have_seen_more_than_the_database_holds_are_not_served(tmp_path: Path) -> None:
    log = await with_an_older_database(tmp_path)
    assert "this database lost commits" in log


async def test_a_server_that_serves_them_all_the_same_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        await with_an_older_database(tmp_path, broken="clients that saw more are served")
    found = raised.value.subgroup(AssertionError)
    assert found is not None
