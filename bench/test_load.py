"""The arithmetic of the load: percentiles, goals, the table, who is picked; and its client against another server."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from bench.load.client import Crowd
from bench.load.connection import Connection
from bench.load.deflate import DeflateConnection
from bench.load.figures import Failure, Figure, Goal, Row, markdown_table, percentile
from bench.load.stretches import Options, as_acknowledged
from bench.load.transfers import picks
from bench.load.writes import ACKNOWLEDGED, WORKLOAD, against_peers


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 51), (99, 100), (100, 100)])
def test_a_percentile_is_one_of_the_values(percent: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == expected


def test_a_percentile_of_one_value_is_that_value() -> None:
    assert percentile([7.0], 99) == 7.0


@pytest.mark.parametrize(
    ("goal", "is_met"),
    [
        (Goal(1, "≥", 0.5, of="ratio"), True),
        (Goal(1, "≥", 0.51, of="ratio"), False),
        (Goal(1, "≤", 50), True),
        (Goal(1, "≤", 49.9), False),
    ],
)
def test_a_goal_is_met_by_the_value_or_by_the_ratio(goal: Goal, is_met: bool) -> None:
    assert goal.is_met(Figure("chat", "rate", 50.0, "/s", raw=100.0, goal=goal)) == is_met


def test_a_ratio_to_a_limit_that_is_missing_meets_no_goal() -> None:
    assert not Goal(1, "≤", 2.0, of="ratio").is_met(Figure("chat", "rate", 50.0, "/s"))


def test_the_table_has_the_goals_in_their_order_and_a_row_for_what_failed() -> None:
    rows: list[Row] = [
        Figure("progress", "p50", 0.9, "ms", 0.3, Goal(6, "≤", 0.8)),
        Figure("progress", "server", 20, "%"),
        Failure((4, 5), "writes", "RuntimeError: no"),
        Figure("chat", "deliveries", 90_000, "/s", 100_000, Goal(1, "≥", 0.85, of="ratio")),
    ]
    lines = [line for line in markdown_table(rows, "command").split("\n") if line.startswith("| ")]
    assert lines[2:5] == [
        "| 1 | chat | deliveries | 100,000 /s | 90,000 /s | 0.90 | ≥ 0.85 × | yes |",
        "| 4, 5 | writes | RuntimeError: no |  |  |  |  | **no** |",
        "| 6 | progress | p50 | 0.3 ms | 0.9 ms | 3.00 | ≤ 0.8 ms | **no** |",
    ]
    assert lines[-1] == "|  | progress | server |  | 20 % |  |  |  |"


def test_the_best_other_server_is_one_that_is_durable() -> None:
    rates = {"": 9_000.0, ": slow": 2_000.0, ": fast": 3_000.0, ": fastest, no fsync": 8_000.0}
    rows = [Figure(WORKLOAD + title, ACKNOWLEDGED, rate, "/s") for title, rate in rates.items()]
    (compared,) = against_peers(rows)
    assert (compared.raw, compared.ratio, "fast" in compared.name) == (3_000, 3, True)
    assert list(against_peers(rows[1:])) == list(against_peers(rows[:1])) == []


@pytest.mark.parametrize(("alpha", "first_share"), [(0.0, 1 / 1_000), (1.5, 0.39)])
def test_accounts_are_picked_by_their_rank(alpha: float, first_share: float) -> None:
    ids = [f"account {number}" for number in range(1_000)]
    pairs = picks(ids, alpha)
    assert all(payer != payee for payer, payee in pairs)
    counts = Counter(account for pair in pairs for account in pair)
    # the first account is in no pair with itself, so it loses a part of its share
    assert counts[ids[0]] / (2 * len(pairs)) == pytest.approx(first_share, rel=0.25)


async def test_as_many_are_in_flight_as_is_said() -> None:
    in_flight, most = 0, 0

    def send(on_done: Callable[[], None]) -> None:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)

        def finish() -> None:
            nonlocal in_flight
            in_flight -= 1
            on_done()

        asyncio.get_running_loop().call_soon(finish)

    await as_acknowledged(send, count=100, in_flight_count=7)
    assert (most, in_flight) == (7, 0)


def test_the_short_form_is_a_tenth() -> None:
    assert (Options().size(10_000), Options(is_short=True).size(10_000)) == (10_000, 1_000)


MESSAGES = ["short", "a longer one, " * 100, "ünïcödé, " * 5_000, "short"]


@asynccontextmanager
async def _server(*, takes_deflate: bool) -> AsyncIterator[int]:
    """A WebSocket server that sends `MESSAGES` when it is sent anything; its port."""

    async def sync(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=takes_deflate)
        await socket.prepare(request)
        async for _ in socket:
            for message in MESSAGES:
                await socket.send_str(message)
        return socket

    app = web.Application()
    app.router.add_get("/api/{version}/sync", sync)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port: int = runner.addresses[0][1]
    yield port
    await runner.cleanup()


@pytest.mark.parametrize("connection_class", [Connection, DeflateConnection])
async def test_the_client_gets_what_a_server_sends(connection_class: type[Connection]) -> None:
    received, all_here = list[str](), asyncio.Event()

    def receive(buffer: bytearray, start: int, end: int) -> None:
        received.append(bytes(buffer[start:end]).decode())
        if len(received) == len(MESSAGES):
            all_here.set()

    async with _server(takes_deflate=True) as port:
        crowd = Crowd(port, connection_class)
        connection = await crowd.connect(receive)
        connection.send(b"go")
        await crowd.unless_lost(all_here.wait())
        crowd.close()
    assert received == MESSAGES


async def test_who_only_counts_is_told_what_is_on_the_wire() -> None:
    sizes, all_here = list[int](), asyncio.Event()

    def count(size_bytes: int) -> None:
        sizes.append(size_bytes)
        if len(sizes) == len(MESSAGES):
            all_here.set()

    async with _server(takes_deflate=True) as port:
        crowd = Crowd(port, DeflateConnection)
        connection = await crowd.connect(lambda buffer, start, end: None)
        connection.only_count(count)
        connection.send(b"go")
        await crowd.unless_lost(all_here.wait())
        crowd.close()
    assert max(sizes) < 1_000 < max(map(len, MESSAGES))


async def test_a_server_without_deflate_is_told_of() -> None:
    async with _server(takes_deflate=False) as port:
        with pytest.raises(ConnectionError, match="not negotiated"):
            await Crowd(port, DeflateConnection).connect(lambda buffer, start, end: None)
