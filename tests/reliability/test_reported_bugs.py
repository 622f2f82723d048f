"""What users of other systems reported, replayed on this one. The numbers are those of the collected reports.

    reported                                            replayed by
     1 an open tab never resyncs after a restart        test_1_…; tests/sync/test_session.py (a silent socket)
     2 a failed or racing token refresh stops it        tests/sync/test_session.py (`…expired…`, `…newer_credential…`),
                                                        tests/clients/authentication.test.ts
     3 a full resubscribe 160 times a day               test_3_…
     4 rejections after a deploy with live sockets      test_4_…; tests/clients/development.test.ts (a reload)
     5 out of memory at each start                      test_5_and_15_…
     6 memory is kept after each deploy                 tests/reliability/test_soak.py
     7 no lease after the disk was full                 tests/storage/test_connections.py (a killed process's lock),
                                                        tests/reliability/test_io_faults.py (a full disk)
     8 pages with duplicates or gaps; InvalidCursor     tests/functions/test_pages.py,
                                                        tests/clients/pagination.test.tsx
     9 unsent mutations are not pushed on reconnect     test_9_…
    10 "subscribed" is told before changes flow         test_10_…
    11 a rejoin without subscriptions; missed events    test_11_…
    12 a channel dies silently with its token           test_12_…
    13 the start hangs on a foreign transaction         test_13_…
    14 "busy" told as 404; creates fail side by side    test_14_…
    15 a backlog of jobs stalls everything              test_5_and_15_…

Of 7 the lease, and of 13 the replication stream, are of several nodes: they wait for the storage that has them.

`REL_N` is the number of restarts of the first (2).
"""

import asyncio
import os
import random
import re
import signal
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.ids import make_id, table_tag
from engine.testing import ManualClock
from tests.reliability.clients import Crowd
from tests.reliability.history import copy_database, read_stored, violations
from tests.reliability.proxy import Proxy, open_proxy
from tests.reliability.server_process import REPOSITORY, ServerProcess
from tests.reliability.test_kill import write_app
from tests.reliability.test_reconnect import Rooms, Tab, through_a_bad_network, write_rooms_app
from tests.server.fakes import SocketClient
from tests.server.test_served_engine import run as run_served
from tests.server.test_served_engine import value_of
from tests.sync.fakes import add, authenticate, connect, query_set

pytestmark = pytest.mark.slow

SEED = 20_264
RESTART_COUNT = int(os.environ.get("REL_N", 2))
RESTART_COUNT_MAX = 10  # of one test
WRITER_COUNT = 20
RESUBSCRIBE_COUNT = 160
BACKLOG_COUNT, OUTCOME_COUNT, FILL_COUNT = 100_000, 200_000, 13
MEMORY_BYTES_MAX = 512 << 20
WAL_SIZE_BYTES_MIN = 100_000_000  # to be taken in at the start
READY_SECONDS_MAX = 2
CANARY_COUNT = 40
TOKEN_SECONDS = 60 + 30  # thirty are forgiven


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[tuple[ServerProcess, Proxy, Rooms, asyncio.TaskGroup]]:
    """A server with the app of rooms, and a proxy before it."""
    server = ServerProcess(write_rooms_app(directory / "app"), directory / "engine.db")
    try:
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(open_proxy(server.port, random.Random(SEED)))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            await server.start()
            yield server, proxy, Rooms(server, http), tasks
    finally:
        await server.close()
    assert "Traceback" not in server.log(), server.log_tail()


def test_each_report_is_replayed_somewhere() -> None:
    assert __doc__ is not None
    assert re.findall(r"^ +(\d+) ", __doc__, re.MULTILINE) == [str(number) for number in range(1, 16)]
    for path in re.findall(r"tests/[\w/]+[\w.]+\.(?:py|tsx?)", __doc__):
        assert (REPOSITORY / path).is_file(), path
    for start in re.findall(r"test_\d\w*_(?=…)", __doc__):
        assert any(name.startswith(start) for name in globals()), start


@pytest.mark.parametrize("first", range(0, RESTART_COUNT, RESTART_COUNT_MAX))
async def test_1_a_tab_in_the_background_resyncs_after_each_restart(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THROTTLED", "1")
    server = ServerProcess(write_app(tmp_path / "app"), tmp_path / "engine.db")
    crowd = Crowd(server, random.Random(SEED), [1], npm=[1])
    try:
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
            await server.start()
            crowd.start(http, tasks)
            await crowd.officials_answered_by(1)
            for _ in range(min(RESTART_COUNT_MAX, RESTART_COUNT - first)):
                server.kill()
                await server.ended()
                await server.start()
                await crowd.officials_answered_by(server.start_count)  # nobody tells it that there is a network
            await crowd.finish()
        server.kill()
        await server.ended()
    finally:
        await server.close()
    stored = read_stored(copy_database(server.database, tmp_path / "copy.db"), None)
    assert violations(crowd.told(), stored) == []


async def test_3_resubscribing_all_day_runs_nothing_again(tmp_path: Path) -> None:
    tab_count = 8
    async with served(tmp_path) as (server, proxy, rooms, tasks):
        tabs = [Tab(server, random.Random(n), n, proxy.sync_address) for n in range(tab_count)]
        running = [tasks.create_task(tab.run(rooms.http)) for tab in tabs]
        for room in range(tab_count):
            await rooms.write(room)
        await rooms.all_current(tabs)
        await rooms.take_runs()
        for count in range(1, RESUBSCRIBE_COUNT // tab_count + 1):
            proxy.reset()
            await asyncio.gather(*[tab.lost(count) for tab in tabs])
            await rooms.all_current(tabs)
        assert await rooms.take_runs() == {}
        for task in running:
            task.cancel()


async def test_4_a_deploy_with_live_sockets_rejects_no_call(tmp_path: Path) -> None:
    """The server is stopped and started as a deploy does it, while many write; `Writer` fails on any rejection."""
    server = ServerProcess(write_app(tmp_path / "app"), tmp_path / "engine.db")
    crowd = Crowd(server, random.Random(SEED), [1] * WRITER_COUNT)
    try:
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
            await server.start()
            crowd.start(http, tasks)
            await crowd.answered(3)
            for _ in range(2):
                server.send(signal.SIGTERM)
                await server.ended(0)
                began = time.monotonic()
                await server.start()
                await crowd.answered(1)
                print(f"each was answered {time.monotonic() - began:.2f} s after the stop")
            await crowd.finish()
        server.kill()
        await server.ended()
    finally:
        await server.close()
    stored = read_stored(copy_database(server.database, tmp_path / "copy.db"), None)
    assert violations(crowd.told(), stored) == []


async def test_9_unsent_mutations_are_pushed_when_every_second_connection_fails(tmp_path: Path) -> None:
    """With an official client, too, whose promises all resolve."""

    async def drop(proxy: Proxy, crowd: Crowd) -> None:
        (npm,) = crowd.officials
        proxy.mode = "drop"
        for _ in range(3):
            proxy.reset()
            await crowd.answered(3)
            await npm.answered_more(1, meanwhile=crowd.go_online)
        assert proxy.dropped_count > 0

    await through_a_bad_network(tmp_path, drop, npm=[3])


async def test_10_nothing_written_between_the_steps_of_subscribing_is_missed(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, _, rooms, tasks):
        tabs = [Tab(server, random.Random(n), 0) for n in range(30)]
        is_over = False

        async def write_on() -> None:
            while not is_over:
                await rooms.write(0)

        writing = tasks.create_task(write_on())
        running = []
        for tab in tabs:  # each begins somewhere between two commits
            running.append(tasks.create_task(tab.run(rooms.http)))
            await tab.heard_from(1)
        is_over = True
        await writing
        await rooms.all_current(tabs)
        for task in running:
            task.cancel()


async def test_11_who_comes_back_has_its_subscriptions_and_all_that_it_missed_at_once(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, proxy, rooms, tasks):
        tab = Tab(server, random.Random(SEED), 0, proxy.sync_address)
        running = tasks.create_task(tab.run(rooms.http))
        await rooms.write(0)
        await rooms.all_current([tab])
        for count in range(1, 6):
            proxy.mode = "blackhole"
            proxy.reset()
            await tab.lost(count)
            for _ in range(3):
                await rooms.write(0)
            proxy.mode = "pass"
            await rooms.all_current([tab])
            assert tab.transition_count == 1  # the first one has it all
            await rooms.write(0)
            await rooms.all_current([tab])
        running.cancel()


async def test_12_no_update_is_missed_over_half_an_hour_of_tokens_that_last_a_minute(tmp_path: Path) -> None:
    """One of them is not replaced in time: then the client is told, and has all once it is back."""
    app, clock, texts, expired_at = write_rooms_app(tmp_path / "app"), ManualClock(), list[str](), list[int]()
    async with run_served(app, clock) as running, AsyncExitStack() as stack:
        sync: SocketClient | None = None
        for second in range(0, 1_800, 10):
            token = running.token("alice", seconds=60)
            if sync is None:
                sync, version, signed_at = await stack.enter_async_context(running.server.connected()), 1, second
                await sync.say(connect(), authenticate(0, token), query_set(0, add(0, "notes:texts", {"room": 0})))
                assert value_of(await hear_past_pings(sync)) == texts  # all that it missed
            elif second % 50 == 0 and second not in (900, 950):
                await sync.say(authenticate(version, token))
                version, signed_at = version + 1, second
                assert (await hear_past_pings(sync))["endVersion"]["identity"] == version
            texts.append(f"second {second}")
            await running.engine.mutation("notes:write", room=0, text=texts[-1])
            assert value_of(await hear_past_pings(sync)) == texts
            clock.advance(10)
            if second + 10 - signed_at >= TOKEN_SECONDS:
                assert (await hear_past_pings(sync))["type"] == "AuthError"
                assert await sync.closed() == (1000, "")
                sync = None
                expired_at.append(second + 10)
    assert expired_at == [850 + TOKEN_SECONDS]


async def hear_past_pings(sync: SocketClient) -> dict[str, Any]:
    while (message := await sync.hear())["type"] == "Ping":
        pass
    return message


async def test_13_a_start_does_not_hang_on_the_transaction_of_another_program(tmp_path: Path) -> None:
    server = ServerProcess(write_rooms_app(tmp_path / "app"), tmp_path / "engine.db")
    try:
        await server.start()
        server.kill()
        await server.ended()
        with closing(sqlite3.connect(server.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(AssertionError, match="the server ended with"):  # within what `start` waits for
                await server.start()
            other.execute("ROLLBACK")
        assert "locked the database" in server.log_tail()
        assert "Traceback" not in server.log()
        await server.close()
        await server.start()
    finally:
        await server.close()


async def test_14_a_busy_database_is_waited_for_and_no_call_is_lost_for_it(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, _, rooms, _):
        await asyncio.gather(*[rooms.write(number % 40) for number in range(200)])  # creates side by side all succeed
        with closing(sqlite3.connect(server.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = asyncio.ensure_future(rooms.write(0))
            await rooms.take_runs()  # others are served meanwhile
            other.execute("ROLLBACK")
            await waiting

            other.execute("BEGIN IMMEDIATE")  # for longer than mutations wait
            status, answer = await rooms.ask("mutation", "notes:write", room=0, text="too late")
            other.execute("ROLLBACK")
        assert (status, answer["code"]) == (503, "Overloaded")
        await rooms.write(0)
        _, answer = await rooms.ask("query", "notes:texts", room=0)
        assert answer["value"] == rooms.texts[0]


BACKLOG_SCHEMA = """
from engine import Table

class Document(Table, name="documents"):
    content: str

class Beat(Table, name="beats"):
    number: int
"""

BACKLOG = """
from engine import MutationCtx, mutation
from schema import Beat, Document

@mutation
async def fill(ctx: MutationCtx, count: int) -> None:
    for _ in range(count):
        await ctx.db.insert(Document(content="x" * 1_000_000))

@mutation
async def beat(ctx: MutationCtx, number: int) -> None:
    await ctx.db.insert(Beat(number=number))

@mutation
async def plan(ctx: MutationCtx, delay: float) -> None:
    await ctx.scheduler.run_after(delay, work)

@mutation(internal=True)
async def work(ctx: MutationCtx) -> None:
    await ctx.db.insert(Beat(number=-1))
"""


async def test_5_and_15_a_server_starts_with_much_data_and_a_backlog_in_little_memory(tmp_path: Path) -> None:
    """And what a client asks meanwhile is answered as soon as ever, or nearly."""
    app = tmp_path / "app"
    (app / "functions").mkdir(parents=True)
    (app / "schema.py").write_text(BACKLOG_SCHEMA)
    (app / "functions" / "work.py").write_text(BACKLOG)
    (app / "engine.toml").write_text("[limits]\nwal_checkpoint_size_bytes = 1_000_000_000\n")
    server = ServerProcess(app, tmp_path / "engine.db", memory_bytes_max=MEMORY_BYTES_MAX)
    try:
        async with aiohttp.ClientSession() as http:
            began = time.monotonic()
            await server.start()
            empty_seconds = time.monotonic() - began
            rooms = Rooms(server, http)
            for _ in range(FILL_COUNT):
                assert (await rooms.ask("mutation", "work:fill", count=8))[1]["status"] == "success"
            assert (await rooms.ask("mutation", "work:plan", delay=3_600_000))[1]["status"] == "success"
            usual = await canary_seconds(rooms)
            server.kill()
            await server.ended()
            wal = server.database.with_name("engine.db-wal")
            with closing(sqlite3.connect(server.database)) as holder:  # else the WAL goes with the last who closes it
                add_backlog(holder)
                assert wal.stat().st_size > WAL_SIZE_BYTES_MIN
                kept = copy_database(server.database, tmp_path / "kept.db")
            copy_database(kept, server.database)

            began = time.monotonic()
            await server.start()
            full_seconds = time.monotonic() - began
            meanwhile = min([await canary_seconds(rooms) for _ in range(3)])
            server.kill()
            await server.ended()
    finally:
        await server.close()
    print(
        f"ready after {full_seconds:.2f} s, {empty_seconds:.2f} s when empty; an answer took {usual} s, {meanwhile} s"
    )
    assert full_seconds <= empty_seconds + READY_SECONDS_MAX
    with closing(sqlite3.connect(server.database)) as connection:
        counts = dict(connection.execute("SELECT state, count(*) FROM _scheduled_jobs GROUP BY state").fetchall())
    assert counts["succeeded"] > 0
    assert counts["pending"] > 1, "the backlog was gone before the canary had sung"
    assert meanwhile <= max(3 * usual, 0.02)


async def canary_seconds(rooms: Rooms) -> float:
    """How long one mutation of a client takes, as a rule."""
    took = []
    for number in range(CANARY_COUNT):
        began = time.perf_counter()
        assert (await rooms.ask("mutation", "work:beat", number=number))[1]["status"] == "success"
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def add_backlog(connection: sqlite3.Connection) -> None:
    """Jobs that are due, as copies of the one that is there, and outcomes of requests."""
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    with connection:
        ((tick,),) = connection.execute("SELECT tick FROM _engine_meta")
        ticks = range(tick + 1, tick + 1 + BACKLOG_COUNT)
        tag = table_tag("_scheduled_jobs")
        connection.execute("CREATE TEMP TABLE new (tick INTEGER, id TEXT)")
        connection.executemany("INSERT INTO new VALUES (?, ?)", ((n, make_id(tag, n, bytes(9))) for n in ticks))
        connection.execute("""
            INSERT INTO _scheduled_jobs (_creation, id, path, arguments, due_at, state, attempts)
            SELECT tick, new.id, path, arguments, due_at - 7200000, state, attempts FROM new, _scheduled_jobs""")
        outcomes = (("%032x" % (n // 100), n % 100, bytes(16), 1, b"null") for n in range(OUTCOME_COUNT))
        connection.executemany(
            "INSERT INTO _engine_ledger (session_id, request_id, digest, ts, value) VALUES (?, ?, ?, ?, ?)", outcomes
        )
        connection.execute(
            "UPDATE _engine_meta SET tick = ?, ledger_row_count = ledger_row_count + ?, checksum = NULL",
            (ticks[-1], OUTCOME_COUNT),
        )
