"""Clients that stop reading, and connections whose other end is gone: what they hold, how they end, whom they harm.

`REL_N` (stuck clients, 50) and `REL_SECONDS` (of each stretch, 1.5) make it heavier. Ratios of times are measured in
one run; they are printed, and held strictly when `REL_SECONDS` is set: side by side with others they say little.
Engines that break a promise on purpose (`broken_doors.py`) are found out by the same checks.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest

from tests.functions.apps import write_app
from tests.reliability.raw import (
    PING,
    TEXT,
    RawClient,
    file_count,
    percentile,
    resident_bytes,
    until,
    within,
)
from tests.reliability.server_process import ServerProcess
from tests.sync.fakes import add, connect, query_set

pytestmark = pytest.mark.slow

STUCK_COUNT = int(os.environ.get("REL_N", "50"))
SECONDS = float(os.environ.get("REL_SECONDS", "1.5"))
IS_STRICT = "REL_SECONDS" in os.environ
UPDATES_PER_SECOND = 50
GOOD_COUNT = 5  # each reads 5 MB a second
RESULT_SIZE = 100_000
MIB = 1 << 20
SLACK_SECONDS = 2.0  # for a busy machine, on top of what is promised

SCHEMA = """
    from engine import Table

    class Number(Table, name="numbers"):
        value: int
"""
FUNCTIONS = f"""
    @query
    async def large(ctx) -> str:
        number = await ctx.db.query(Number).first()
        return f"{{number.value if number else 0}}:" + "x" * {RESULT_SIZE}

    @mutation
    async def put(ctx, value: int) -> None:
        number = await ctx.db.query(Number).first()
        if number is None:
            await ctx.db.insert(Number(value=value))
        else:
            await ctx.db.patch(number.id, value=value)
"""


@asynccontextmanager
async def serving(directory: Path, *, broken: str | None = None, **limits: int) -> AsyncIterator[ServerProcess]:
    app = write_app(directory / "app", FUNCTIONS, schema=SCHEMA)
    (app / "engine.toml").write_text("[limits]\n" + "".join(f"{name} = {value}\n" for name, value in limits.items()))
    server = ServerProcess(app, directory / "engine.db", broken=broken)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def value_of(text: str | bytes) -> int | None:
    """The number that a Transition brings; None if it brings none."""
    found = json.loads(text)
    for modification in found.get("modifications", ()):
        return int(modification["value"].partition(":")[0])
    return None


class Crowd:
    """One that puts numbers at a steady pace, and good clients that note how long each takes to come."""

    def __init__(self, server: ServerProcess, http: aiohttp.ClientSession) -> None:
        self._server, self._http = server, http
        self.newest = 0  # that was put
        self._put_at: dict[int, float] = {}
        self.latencies: list[float] = []
        self.shown: list[int] = []  # the newest of each client

    async def read(self, index: int) -> None:
        async with self._http.ws_connect(self._server.sync_address, max_msg_size=0) as socket:
            await socket.send_str(json.dumps(connect()))
            await socket.send_str(json.dumps(query_set(0, add(0, "m:large"))))
            async for heard in socket:
                value = value_of(heard.data)
                if value is not None:
                    self.shown[index] = value
                    if value in self._put_at:
                        self.latencies.append(time.perf_counter() - self._put_at[value])

    async def put_for(self, seconds: float) -> list[float]:
        """Put numbers for so long; the latencies of all good clients meanwhile."""
        self.latencies = []
        start = time.perf_counter()
        for count in range(int(seconds * UPDATES_PER_SECOND)):
            await asyncio.sleep(max(0.0, start + count / UPDATES_PER_SECOND - time.perf_counter()))
            await self.put()
        await until(lambda: min(self.shown) == self.newest, "good clients have the newest number")
        return self.latencies

    async def put(self) -> None:
        self.newest += 1
        self._put_at[self.newest] = time.perf_counter()
        body = {"path": "m:put", "args": {"value": self.newest}, "format": "json"}
        async with self._http.post(f"{self._server.address}/api/mutation", json=body) as response:
            assert (await response.json())["status"] == "success"


@asynccontextmanager
async def good_crowd(server: ServerProcess) -> AsyncIterator[Crowd]:
    async with aiohttp.ClientSession() as http:
        crowd = Crowd(server, http)
        crowd.shown = [-1] * GOOD_COUNT
        reading = [asyncio.create_task(crowd.read(index)) for index in range(GOOD_COUNT)]
        await until(lambda: min(crowd.shown) == 0, "good clients are there")
        try:
            yield crowd
            assert not any(task.done() for task in reading), "no good client was sent away"
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)


async def stuck_clients(server: ServerProcess, count: int) -> list[RawClient]:
    """Subscribers that have stopped reading."""
    asking = (connect(), query_set(0, add(0, "m:large")))
    return [await RawClient.upgraded(server.port, *asking, receive_buffer_bytes=16 << 10) for _ in range(count)]


class Measured(NamedTuple):
    """What stuck clients cost."""

    each_bytes: float
    growth_bytes: float  # while all of them were stuck
    full_bytes: float
    p99_ratio: float

    def __str__(self) -> str:
        return (
            f"{self.each_bytes / MIB:.2f} MiB for each stuck client, {self.growth_bytes / MIB:+.1f} MiB while they "
            f"were; p99 of the others {self.p99_ratio:.2f} × the baseline"
        )


async def check_stuck_clients(server: ServerProcess, count: int, seconds: float, stuck_seconds: float) -> Measured:
    """All but the ratio, which says little on a busy machine."""
    async with good_crowd(server) as crowd:
        before = await crowd.put_for(seconds)
        baseline_files, baseline_bytes = file_count(server.pid), resident_bytes(server.pid)
        stuck = await stuck_clients(server, count)
        stuck_at = time.perf_counter()
        await crowd.put_for(1)  # until their sockets are full
        full_bytes = resident_bytes(server.pid)
        during = await crowd.put_for(seconds)
        later_bytes = resident_bytes(server.pid)
        measured = Measured(
            (later_bytes - baseline_bytes) / count,
            later_bytes - full_bytes,
            full_bytes,
            percentile(during, 0.99) / percentile(before, 0.99),
        )
        assert measured.each_bytes <= 2 * MIB, str(measured)
        assert measured.growth_bytes <= max(10 * MIB, 0.05 * full_bytes), f"not flat: {measured}"

        # one reads again: what had been sent to it, then one Transition to the newest state, and nothing else
        resumed, stuck = stuck[0], stuck[1:]
        values = await read_up_to(resumed, crowd.newest)
        skipped = [later - earlier for earlier, later in pairwise(values)]
        assert skipped[-1] >= UPDATES_PER_SECOND * seconds / 2, f"it did not skip to the newest state: {values}"
        assert max(skipped[:-1], default=0) < skipped[-1], f"more than one catch-up: {values}"
        await crowd.put()
        assert await read_up_to(resumed, crowd.newest) == [crowd.newest]
        resumed.close()

        # the others are aborted in time, and nothing of them is left
        left_seconds = stuck_at + 1 + 1.25 * stuck_seconds + 1 + SLACK_SECONDS - time.perf_counter()
        await until(lambda: file_count(server.pid) <= baseline_files, "stuck clients are gone", left_seconds)
        for client in stuck:
            await within(client.ended(), "what was sent to a stuck client ends")
            client.close()
        await crowd.put_for(0.2)
        return measured


async def test_clients_that_do_not_read_hold_little_and_harm_nobody(tmp_path: Path) -> None:
    stuck_seconds = int(3 * SECONDS)
    limits = {"send_stuck_seconds_max": stuck_seconds, "send_unsent_size_bytes_max": STUCK_COUNT * MIB}
    async with serving(tmp_path, **limits) as server:
        measured = await check_stuck_clients(server, STUCK_COUNT, SECONDS, stuck_seconds)
    print(f"{STUCK_COUNT}: {measured}")
    assert measured.p99_ratio <= (1.5 if IS_STRICT else 5), str(measured)


@pytest.mark.parametrize(
    ("broken", "found_out_by"),
    [("who lags is sent everything", "it did not skip"), ("who is stuck is kept", "stuck clients are gone")],
)
async def test_doors_that_break_what_holds_for_stuck_clients_are_found_out(
    tmp_path: Path, broken: str, found_out_by: str
) -> None:
    async with serving(tmp_path, broken=broken, send_stuck_seconds_max=4) as server:
        with pytest.raises(AssertionError, match=found_out_by):
            await check_stuck_clients(server, 5, 1, stuck_seconds=0 if "kept" in broken else 4)


async def read_up_to(client: RawClient, newest: int) -> list[int]:
    """The numbers that a client is shown until it has the newest, and then nothing for a while."""
    values: list[int] = []
    while not values or values[-1] != newest:
        heard = await within(client.hear(), f"number {newest}; so far {values}")
        assert heard is not None, f"the connection has ended; so far {values}"
        if heard[0] == TEXT and (value := value_of(heard[1])) is not None:
            values.append(value)
    return values


async def check_half_open(server: ServerProcess, count: int, heartbeat_seconds: float) -> list[float]:
    """How long each half-open connection was kept."""
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(server.sync_address) as alive,  # answers pings by itself while it is read
    ):
        baseline = file_count(server.pid)
        await alive.send_str(json.dumps(connect()))
        asking = (connect(), query_set(0, add(0, "m:large")))
        half_open = [await RawClient.upgraded(server.port, *asking) for _ in range(count)]
        listening = asyncio.create_task(listen(alive))
        seconds_max = 1.75 * heartbeat_seconds + SLACK_SECONDS
        ends = await asyncio.gather(*[seconds_to_end(client, seconds_max) for client in half_open])
        # a quarter of a heartbeat is how exactly silence is measured
        assert min(ends) >= 1.25 * heartbeat_seconds - 0.1
        await until(lambda: file_count(server.pid) <= baseline, "their sockets are freed")
        assert not listening.done(), "who answers stays"
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        for client in half_open:
            client.close()
        return ends


async def test_peers_that_are_gone_without_a_word_are_noticed_in_one_and_a_half_heartbeats(tmp_path: Path) -> None:
    async with serving(tmp_path, heartbeat_interval_seconds=2) as server:
        ends = await check_half_open(server, STUCK_COUNT, 2)
    print(f"{STUCK_COUNT} half-open: closed after {min(ends):.2f} to {max(ends):.2f} s, heartbeat 2 s")


async def test_a_door_that_keeps_half_open_connections_is_found_out(tmp_path: Path) -> None:
    async with serving(tmp_path, broken="who is silent is kept", heartbeat_interval_seconds=1) as server:
        with pytest.raises(AssertionError, match="the end of a half-open connection"):
            await check_half_open(server, 2, 1)


async def listen(socket: aiohttp.ClientWebSocketResponse) -> None:
    async for _ in socket:
        pass


async def seconds_to_end(client: RawClient, seconds_max: float) -> float:
    """From the last byte that this one sends to the end of its connection; it was pinged meanwhile."""
    start, opcodes = time.perf_counter(), set()

    async def hear_all() -> None:
        while (heard := await client.hear()) is not None:
            opcodes.add(heard[0])

    await within(hear_all(), "the end of a half-open connection", seconds_max)
    assert PING in opcodes
    return time.perf_counter() - start


async def test_a_client_that_does_not_read_an_answer_over_http_is_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path, send_stuck_seconds_max=2, socket_send_buffer_size_bytes=8_192) as server:
        baseline = file_count(server.pid)
        body = json.dumps({"path": "m:large", "args": {}}).encode()
        request = b"POST /api/query HTTP/1.1\r\nHost: e\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        stuck = [await RawClient.open(server.port, receive_buffer_bytes=4 << 10) for _ in range(STUCK_COUNT)]
        for client in stuck:
            await client.send(request * 64)  # more than the kernel takes
        await until(lambda: file_count(server.pid) > baseline, "they are there")
        await until(lambda: file_count(server.pid) <= baseline, "they are dropped", 2 * 1.25 + 1 + SLACK_SECONDS)
        for client in stuck:
            client.close()
