"""Every operation of storage fails once: the engine serves on or ends at once, and nothing that it said was wrong.

The method is SQLite's own: the n-th operation fails (`storage_faults.c`), for every n until a run meets no fault. Exit
code 75 says that storage is in an unknown state; what was committed shows after the next start, and is asked for again.
Then served apps: on a disk that fails for good, that is full for a while, and with a database that is locked.

REL_N: up to which operation, each with EIO, ENOSPC and EDQUOT.
"""

import asyncio
import copy
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.storage.lock import lock_holder
from tests.reliability.clients import Crowd, Watcher
from tests.reliability.history import copy_database, read_stored, violations
from tests.reliability.server_process import ServerProcess
from tests.reliability.storage_faults import ERRNOS, Clients, FaultyEngines, compiled_faults, faulty_engines
from tests.reliability.test_kill import write_app

pytestmark = pytest.mark.slow

IS_NIGHTLY = "REL_N" in os.environ
OPERATION_COUNT = int(os.environ.get("REL_N", 80))
OPERATION_COUNT_MIN = 300  # of a whole run
MAKING_COUNT = 100  # operations that make a database
BLOCK_COUNT = 40  # operations of one test: it has a time limit
LIMITS = {"wal_checkpoint_size_bytes": 64 << 10}  # so that a few puts set one off
PUT_COUNT = 3  # of each writer
END_SECONDS_MAX = 5  # from a fault to the end of the process; it takes some milliseconds
STORAGE_UNKNOWN, UNAVAILABLE = 75, 69


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyEngines]:
    with faulty_engines(tmp_path_factory.mktemp("faults")) as engines:
        yield engines


@pytest.fixture(scope="module")
def crashed(engines: FaultyEngines, tmp_path_factory: pytest.TempPathFactory) -> Clients:
    """A database that was in use when its process died: the next one starts with a WAL to recover."""
    clients = Clients(tmp_path_factory.mktemp("crashed") / "engine.db")
    crash = {"IOF_CRASH_AT": "40", "IOF_CRASH_OP": "sync"}
    assert engines.run(clients, put_count=1_000, limits=LIMITS, environment=crash) < 0
    assert clients.answers
    return clients


def continued(clients: Clients, directory: Path) -> Clients:
    """The same clients, on a copy of their database."""
    shutil.copytree(clients.database.parent, directory)
    copied = copy.deepcopy(clients)
    copied.database = directory / clients.database.name
    return copied


def fail_once(engines: FaultyEngines, clients: Clients, at: int, error: str) -> bool:
    """One process of which one operation fails, and the next one. Whether it came so far."""
    what = f"operation {at}, {error}"
    fault = {"IOF_FAIL_AT": str(at), "IOF_ERRNO": ERRNOS[error]}
    code = engines.run(clients, put_count=PUT_COUNT, limits=LIMITS, environment=fault)
    had_fault = engines.fault_count == 1
    answer_count = len(clients.answers)
    is_refused_at_start = code == UNAVAILABLE and error != "EIO"
    assert code in (0, STORAGE_UNKNOWN) or is_refused_at_start, f"{what}: exit code {code}; {engines.log_tail()}"
    assert engines.seconds_after_fault < END_SECONDS_MAX or code == 0, f"{what}: ended too late"
    assert set(clients.refused.values()) <= {"StorageFull"}, f"{what}: {clients.refused}"
    assert not clients.refused or error == "ENOSPC", f"{what}: {clients.refused}"
    assert clients.violations() == [], what
    assert code != 0 or clients.unanswered_count == 0, f"{what}: nobody answered, and it ended in good order"

    assert engines.run(clients, put_count=1, limits=LIMITS) == 0, f"{what}: {engines.log_tail()}"
    assert clients.violations(engines.entries_table) == [], what
    assert clients.unanswered_count == 0, what
    assert len(clients.answers) > answer_count
    return had_fault


@pytest.mark.parametrize("first", range(1, OPERATION_COUNT + 1, BLOCK_COUNT))
@pytest.mark.parametrize("error", [*ERRNOS] if IS_NIGHTLY else ["EIO"])
def test_each_operation_may_fail(
    engines: FaultyEngines, crashed: Clients, tmp_path: Path, error: str, first: int
) -> None:
    fault_count, last = 0, min(OPERATION_COUNT, first + BLOCK_COUNT - 1)
    for at in range(first, last + 1):
        directory = tmp_path / str(at)
        if not fail_once(engines, continued(crashed, directory), at, error):
            break
        fault_count += 1
        shutil.rmtree(directory)
    print(f"{fault_count} operations failed one by one, with {error}; ended in {engines.slowest_end_seconds:.2f} s")
    assert fault_count == last - first + 1 or last > OPERATION_COUNT_MIN, "a run has more operations than that"


@pytest.mark.parametrize("error", [*ERRNOS] if IS_NIGHTLY else ["EIO"])
def test_each_operation_may_fail_while_a_database_is_made(engines: FaultyEngines, tmp_path: Path, error: str) -> None:
    for at in range(1, min(OPERATION_COUNT, MAKING_COUNT) + 1, 1 if IS_NIGHTLY else 4):
        clients = Clients(tmp_path / str(at) / "engine.db")
        assert fail_once(engines, clients, at, error), "it takes more operations than that"
        shutil.rmtree(clients.database.parent)


def test_a_commit_that_is_unknown_and_told_as_failed_is_found_out(
    engines: FaultyEngines, crashed: Clients, tmp_path: Path
) -> None:
    """The control of the above."""
    found: list[str] = []
    for at in range(6, 12):
        clients = continued(crashed, tmp_path / str(at))
        fault = {"IOF_FAIL_OP": "sync", "IOF_FAIL_AT": str(at), "IOF_STICKY": "1"}
        engines.run(clients, put_count=PUT_COUNT, limits=LIMITS, environment=fault, broken="commits")
        found += clients.violations()
    assert any("refused and applied" in line for line in found), found


# -- served apps

UNAVAILABLE_STATUS = 503
RECOVERY_SECONDS_MAX = 5
CLEAR = """
from engine import Id, MutationCtx, mutation
from schema import Entry

@mutation
async def clear(ctx: MutationCtx, number: int) -> None:
    for entry in await ctx.db.query(Entry.by_client, client=0, number=number).collect():
        await ctx.db.delete(entry.id)
"""


class Served:
    """An app on a disk that does as the test says, over HTTP."""

    def __init__(self, server: ServerProcess, http: aiohttp.ClientSession, directory: Path) -> None:
        self.server, self._http = server, http
        self.full, self.free = directory / "full", directory / "free"  # for `storage_faults.c`

    async def ask(self, kind: str, path: str, *, is_admin: bool = False, **arguments: Any) -> tuple[int, Any]:
        """The status, and the value or the code of the refusal; an operator asks as `engine run` does."""
        headers = {}
        if is_admin:
            kind = "function"
            holder = lock_holder(self.server.database)
            assert holder is not None
            headers["Authorization"] = f"Convex {holder.key}"
        body = {"path": path, "args": arguments, "format": "json"}
        async with self._http.post(f"{self.server.address}/api/{kind}", json=body, headers=headers) as response:
            told = await response.json()
            return response.status, told.get("value", told.get("code"))

    async def put(self, number: int, *, is_admin: bool = False) -> tuple[int, Any]:
        return await self.ask("mutation", "puts:put", client=0, number=number, is_admin=is_admin)

    async def upload(self) -> int:
        """The status of an upload."""
        status, address = await self.ask("action", "uploads:address")
        assert status == 200
        async with self._http.post(address, data=b"x" * 1_000) as response:
            return response.status


UPLOADS = """
from engine import ActionCtx, action

@action
async def address(ctx: ActionCtx) -> str:
    return await ctx.storage.generate_upload_url()
"""


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[Served]:
    app = write_app(directory / "app")
    (app / "functions" / "clear.py").write_text(CLEAR)
    (app / "functions" / "uploads.py").write_text(UPLOADS)
    server = ServerProcess(app, directory / "engine.db")
    async with aiohttp.ClientSession() as http:
        app_served = Served(server, http, directory)
        server.environment = {
            "LD_PRELOAD": str(compiled_faults(directory)),
            "IOF_MATCH": str(server.database),
            "IOF_FULL": str(app_served.full),
            "IOF_FREE": str(app_served.free),
        }
        try:
            await server.start()
            yield app_served
        finally:
            await server.close()


async def within(seconds: float, ask: Callable[[], Awaitable[bool]], what: str) -> None:
    """Ask until it is so."""
    began = time.monotonic()
    while not await ask():
        assert time.monotonic() - began < seconds, f"after {seconds} s: {what}"
        await asyncio.sleep(0.05)


async def test_on_a_full_disk_reads_and_subscriptions_go_on_and_mutations_do_when_there_is_room(tmp_path: Path) -> None:
    async with served(tmp_path) as app, asyncio.TaskGroup() as tasks, aiohttp.ClientSession() as http:
        early, late = (Watcher(app.server, random.Random(seed)) for seed in (1, 2))
        watching = [tasks.create_task(early.run(http))]
        assert await app.put(0) == (200, 1)
        await early.until(lambda: bool(early.seen) and early.seen[-1].count == 1)

        app.full.touch()
        for number in range(1, 4):
            assert await app.put(number) == (UNAVAILABLE_STATUS, "StorageFull")
        assert await app.ask("query", "puts:count") == (200, 1)
        watching.append(tasks.create_task(late.run(http)))
        await late.until(lambda: bool(late.seen) and late.seen[-1].count == 1)
        assert await app.upload() != 200

        app.full.unlink()

        async def is_taken() -> bool:
            return await app.put(4) == (200, 2)

        await within(RECOVERY_SECONDS_MAX, is_taken, "mutations are still refused")
        for watcher in (early, late):
            await watcher.until(lambda watcher=watcher: watcher.seen[-1].count == 2)
        assert await app.upload() == 200
        assert app.server.start_count == 1
        log = app.server.log()
        assert log.count("the disk has no room") == log.count("the disk has room again") == 1, log
        assert "Traceback" not in log
        for task in watching:
            task.cancel()


async def test_with_little_room_only_an_operator_may_delete(tmp_path: Path) -> None:
    async with served(tmp_path) as app:
        assert await app.put(0) == (200, 1)
        assert await app.put(1) == (200, 2)
        app.free.write_text(str((64 << 20) - (1 << 20)))

        async def is_refused() -> bool:
            return await app.put(9) == (UNAVAILABLE_STATUS, "StorageFull")

        await within(RECOVERY_SECONDS_MAX, is_refused, "mutations are still taken")
        assert await app.put(10, is_admin=True) == (UNAVAILABLE_STATUS, "StorageFull")
        assert await app.ask("mutation", "clear:clear", number=0) == (UNAVAILABLE_STATUS, "StorageFull")
        assert await app.ask("mutation", "clear:clear", number=0, is_admin=True) == (200, None)
        assert await app.upload() == UNAVAILABLE_STATUS
        assert (await app.ask("query", "puts:count"))[0] == 200

        app.free.write_text(str(65 << 20))

        async def is_taken() -> bool:
            return (await app.put(11))[0] == 200

        await within(RECOVERY_SECONDS_MAX, is_taken, "mutations are still refused")
        assert await app.upload() == 200


LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("BEGIN IMMEDIATE")
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def locked_elsewhere(database: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process holds the lock until its input ends."""
    command = [sys.executable, "-c", LOCK, database]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locker:
        assert locker.stdout is not None
        locker.stdout.readline()
        yield locker


async def test_a_locked_database_is_waited_for_then_mutations_are_to_be_tried_again(tmp_path: Path) -> None:
    async with served(tmp_path) as app:
        assert await app.put(0) == (200, 1)
        with locked_elsewhere(app.server.database) as locker:
            began = time.monotonic()
            asked = [asyncio.create_task(app.put(number)) for number in (1, 2)]
            assert await app.ask("query", "puts:count") == (200, 1)
            assert [await one for one in asked] == [(UNAVAILABLE_STATUS, "Overloaded")] * 2
            assert time.monotonic() - began >= RECOVERY_SECONDS_MAX
            waiting = asyncio.create_task(app.put(3))
            assert await app.ask("query", "puts:count") == (200, 1)
            assert locker.stdin is not None
            locker.stdin.close()
        assert await waiting == (200, 2)


@pytest.mark.parametrize("sync", [20, 35])
async def test_when_syncs_fail_nobody_is_answered_and_the_next_process_knows(tmp_path: Path, sync: int) -> None:
    async with served(tmp_path) as app, asyncio.TaskGroup() as tasks, aiohttp.ClientSession() as http:
        server = app.server
        server.kill()  # its tables are there
        await server.ended()
        fault = {"IOF_FAIL_OP": "sync", "IOF_FAIL_AT": str(sync), "IOF_STICKY": "1"}
        sound, server.environment = server.environment, {**server.environment, **fault}
        crowd = Crowd(server, random.Random(sync), (4, 4, 4))
        crowd.start(http, tasks)
        await server.start()
        await server.ended(STORAGE_UNKNOWN)
        stored = read_stored(copy_database(server.database, tmp_path / "copy.db"), None)
        assert violations(crowd.told(), stored) == []
        assert len(stored.entries) >= len(crowd.told().answers) > 0

        server.environment = sound
        await server.start()
        await crowd.finish()
        server.kill()
        await server.ended()
        stored = read_stored(copy_database(server.database, tmp_path / "copy.db"), None)
        assert violations(crowd.told(), stored) == []
        assert len(stored.entries) == len(crowd.told().answers) == crowd.sent_count
        assert sum(writer.repeat_count for writer in crowd.writers) > 0
