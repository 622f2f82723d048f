"""Histories of transactions are what a database gives that runs one after another, whatever goes wrong meanwhile.

Each history has 1,000 transactions of 16 clients in a simulated world (`simulation/`): connections are lost, clients
die or stop reading, the process dies at fault points, disks are full, code is loaded again, the clock is set. It is
judged by the engine's own record, by the rules of the protocol, and by what clients saw (`list_append`). Then the same
over real WebSockets and HTTP. `REL_N` transactions from seed `REL_SEED` on.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from engine import faults
from engine.clock import SystemClock
from engine.config import Config
from engine.engine import Engine
from engine.live import publisher
from engine.live.invalidation import InvalidationIndex
from engine.server.app import serving
from engine.storage.connections import SnapshotReader, WriterConnection
from engine.transaction import committer
from engine.transaction.committer import Group
from engine.transaction.ledger import Ledger
from tests.reliability.simulation import histories
from tests.reliability.simulation.clients import History, Socket
from tests.reliability.simulation.histories import Break, Findings, judge, simulate
from tests.reliability.simulation.replay import Committed
from tests.reliability.simulation.transactions import encode, write_app
from tests.reliability.simulation.world import LIMITS, World

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("REL_SEED", "1"))
TRANSACTION_COUNT = int(os.environ.get("REL_N", "20000"))
HISTORY_LENGTH = 1_000
SEEDS_AT_ONCE = 5  # so that no test takes long
SHOWN_COUNT = 5
CONFLICTING_PART_MIN = 0.2  # else the histories show little
OF_JOBS = {"job.due", "job.ran", "action.claimed", "action.ran", "action.recorded"}  # see test_scheduled.py


class Total:
    """What all histories came to, so far."""

    checked_count = conflict_count = 0
    happened: Counter[str] = Counter()
    passed: set[faults.Point] = set()


@pytest.mark.parametrize("first_seed", range(SEED, SEED + max(1, TRANSACTION_COUNT // HISTORY_LENGTH), SEEDS_AT_ONCE))
def test_every_history_is_serializable_in_real_time_and_every_subscriber_saw_it(first_seed: int) -> None:
    for seed in range(first_seed, min(first_seed + SEEDS_AT_ONCE, SEED + max(1, TRANSACTION_COUNT // HISTORY_LENGTH))):
        findings, _ = simulate(seed, HISTORY_LENGTH)
        again = f"seed {seed}; again: REL_SEED={seed} REL_N={HISTORY_LENGTH}"
        assert not findings.all, "\n".join([again, *findings.all[:SHOWN_COUNT]])
        Total.checked_count += findings.checked_count
        Total.conflict_count += findings.conflict_count
        Total.happened += findings.happened
        Total.passed |= findings.passed


def test_the_histories_show_something() -> None:
    """Of those above, in this process."""
    checked_count, happened = Total.checked_count, Total.happened
    print(f"{checked_count:,} checked, {Total.conflict_count:,} in conflict; {dict(happened.most_common())}")
    assert checked_count > 0.85 * TRANSACTION_COUNT  # the others failed on purpose, or nobody knows
    assert Total.conflict_count > CONFLICTING_PART_MIN * checked_count
    assert happened["cut"], happened
    assert happened["lags"], happened
    assert set(faults.POINTS) - Total.passed == OF_JOBS, "each fault point is on the way"
    if TRANSACTION_COUNT >= 20_000:
        assert sum(what.startswith("crash: ") for what in happened) >= 8, happened
        for what in ("disk full", "commit unknown", "storage undoes the group"):
            assert happened[what], happened


def test_the_same_seed_gives_the_same_events_and_another_seed_others() -> None:
    traces = []
    for seed in range(SEED, SEED + 5):
        _, trace = simulate(seed, 150)
        assert simulate(seed, 150)[1] == trace, f"seed {seed}"
        traces.append(trace)
    assert all(trace != traces[0] for trace in traces[1:])


# -- the same, over real connections


class WebSocket:
    """A socket of the official protocol."""

    close_code: int | None = None

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, random_source: Random) -> None:
        self._socket, self._random = socket, random_source

    async def say(self, text: str) -> None:
        await self._socket.send_str(text)

    async def hear(self) -> str | None:
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.TEXT and self._random.random() > 1 / 400:
            return str(message.data)
        if message.type is aiohttp.WSMsgType.CLOSE:
            self.close_code = message.data
        self.cut()
        return None

    def cut(self) -> None:
        connection = self._socket._conn  # to close in good order would be another thing
        if connection is not None and connection.transport is not None:
            connection.transport.abort()


async def over_sockets(directory: Path, seed: int, transaction_count: int) -> Findings:
    """A history over WebSockets, with three more clients that ask over HTTP."""
    history = History(Random(seed), transaction_count)
    committed: list[Committed] = []
    config = Config(mode="development", limits=LIMITS)
    app, database = write_app(directory / "app"), directory / "engine.db"
    async with (
        Engine.open(app, database, config=config, clock=SystemClock()) as engine,
        serving(engine, "127.0.0.1", 0) as address,
        aiohttp.ClientSession() as http,
    ):
        publish = engine._committer._publish

        async def recorded(group: Group) -> None:
            for submission, settled in group.settled:
                if submission.function == "tx:run" and settled.execution is not None:
                    value, write_set = settled.execution.value, settled.write_set
                    if value is not None and (submission.key is not None or write_set):
                        committed.append(Committed(settled.ts, *json.loads(json.loads(value))))
            await publish(group)

        engine._committer._publish = recorded
        await engine.mutation("tx:begin")

        async def open_socket() -> Socket:
            return WebSocket(await http.ws_connect(f"{address}/api/1.48.0/sync", max_msg_size=0), history.random)

        async def ask_over_http() -> None:
            client = history.next_client()
            number = 0
            while (request := history.new_request(client, number)) is not None:
                number += 1
                arguments = {"client": client, "number": request.number, "operations": encode(request.operations)}
                body = {"path": "tx:run", "args": arguments, "format": "json"}
                async with http.post(f"{address}/api/mutation", json=body) as response:
                    answer: Any = await response.json()
                request.answered_at = next(history.moment)
                if answer["status"] == "success":
                    request.status, request.results = "ok", json.loads(answer["value"])[2]
                else:
                    request.status = "fail"

        async def settle() -> None:
            await asyncio.wait(asking)
            await engine.wait_until_idle()
            await asyncio.sleep(0.2)

        asking = [asyncio.create_task(ask_over_http()) for _ in range(3)]
        await histories.have_all_done(history, open_socket, settle, death_chance=0.002)
        for task in asking:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    return judge(history, committed, database)


async def test_histories_over_real_connections_are_serializable_too(tmp_path: Path) -> None:
    count = max(1_500, TRANSACTION_COUNT // 20)
    findings = await over_sockets(tmp_path, SEED, count)
    assert not findings.all, "\n".join([f"seed {SEED}", *findings.all[:SHOWN_COUNT]])
    assert findings.conflict_count > CONFLICTING_PART_MIN * count


# -- the checkers show something only if they find what an engine does that breaks its promises


class Past:
    """A snapshot that stays behind."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._engine: Engine | None = None
        self._reader: SnapshotReader
        self._ask_count = 0

    def now_and_then(self) -> SnapshotReader | None:
        """1 in 500 times: what was there some while ago."""
        self._ask_count += 1
        if self._ask_count % 100 == 0 and self._world.is_up.is_set():
            if self._engine is not self._world.engine:
                self._engine = self._world.engine
                self._reader = self._engine.database.open_reader()
            self._reader.unpin()
            self._reader.pin()
        is_there = self._engine is self._world.engine and self._world.is_up.is_set()
        return self._reader if is_there and self._world.random.random() < 1 / 500 else None


def read_the_past(patches: pytest.MonkeyPatch, world: World) -> None:
    """1 in 500 mutations reads what was there some while ago, as if nothing validated it."""
    honest, past = committer.WriteTransaction, Past(world)

    def begin(*args: Any) -> Any:
        transaction, reader = honest(*args), past.now_and_then()
        if reader is not None:
            world.engine._committer._kept.clear()
            transaction._connection, transaction._kept = reader, None
        return transaction

    patches.setattr(committer, "WriteTransaction", begin)


def keep_what_failed(patches: pytest.MonkeyPatch, world: World) -> None:
    """Of the mutations that fail, which are 1 in 20, 1 in 25 is not undone."""
    honest = WriterConnection.rollback_to

    def rollback_to(writer: WriterConnection, depth: int = 0) -> None:
        if depth or world.random.random() > 1 / 25:
            honest(writer, depth)

    patches.setattr(WriterConnection, "rollback_to", rollback_to)


def drop_invalidations(patches: pytest.MonkeyPatch, world: World) -> None:
    """1 in 1,000."""
    honest = InvalidationIndex.affected

    def affected(index: InvalidationIndex[Any], writes: Any) -> set[Any]:
        found = honest(index, writes)
        return {each for each in found if world.random.random() > 1 / 1_000}

    patches.setattr(InvalidationIndex, "affected", affected)


def answer_before_sync(patches: pytest.MonkeyPatch, world: World) -> None:
    """Commits are said to be on the disk when they are not, and power is lost."""
    world.disk.is_lazy = world.loses_power = True


def forget_requests(patches: pytest.MonkeyPatch, world: World) -> None:
    """1 in 10 mutations is committed without its record."""
    honest = Ledger.record

    def record(ledger: Ledger, *args: Any) -> None:
        if world.random.random() > 1 / 10:
            honest(ledger, *args)

    patches.setattr(Ledger, "record", record)


def show_the_past(patches: pytest.MonkeyPatch, world: World) -> None:
    """1 in 500 runs of a query is on a snapshot that is older than it says."""
    honest, past = publisher.ReadTransaction, Past(world)

    def begin(connection: Any, catalog: Any, limits: Any, kept: Any = None) -> Any:
        reader = past.now_and_then()
        return honest(connection, catalog, limits, kept) if reader is None else honest(reader, catalog, limits)

    patches.setattr(publisher, "ReadTransaction", begin)


@pytest.mark.parametrize(
    ("breaking", "complaints"),
    [
        (read_the_past, ["at ", "kind='G2'|kind='realtime'"]),
        (keep_what_failed, ["failed, and applied|stored ", "kind='G1a'"]),
        (drop_invalidations, ["client "]),
        (answer_before_sync, ["acknowledged and lost|was sent away", ""]),
        (forget_requests, ["kind='duplicate'"]),
        (show_the_past, ["client "]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_an_engine_that_breaks_a_promise_is_found_out(breaking: Break, complaints: Sequence[str]) -> None:
    """Within as many histories as the lane runs, by each of the checkers that look for it."""
    found: list[str] = []
    for seed in range(1, 1 + 20):
        found += simulate(seed, HISTORY_LENGTH, breaking)[0].all
        if all(any(part in text for text in found for part in each.split("|")) for each in complaints):
            return
    raise AssertionError(f"not found: {complaints}; found: {found[:SHOWN_COUNT]}")
