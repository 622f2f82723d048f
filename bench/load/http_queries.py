"""`/api/query` over 32 connections that stay open, each with the next request when the last is answered.

Cached: the same query of 50 rows again; uncached: each has arguments that nobody asked with before. Of the uncached
ones those of one row have the goal: to read 50 costs more than the bare handler does for all. Signed in, 1,000 users
take turns. The limit is `bare.py`, which answers the same requests with the same bytes.
"""

import asyncio
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import count, cycle
from pathlib import Path
from typing import cast

import msgspec

from bench.load.demo import subjects
from bench.load.figures import Figure, Goal
from bench.load.filling import fill
from bench.load.processes import BENCH_APP, Server, Tokens, engine_server, listening
from bench.load.stretches import Options, Reached, as_acknowledged, cost_of

CONNECTION_COUNT = 32
_WARM_COUNT = 40  # requests of each connection before measuring: all users have asked once
_GROUP_ITEM_COUNT = 60
_HEADER_END, _LENGTH = b"\r\n\r\n", b"content-length: "

Requests = Iterator[bytes]


class _Kind(msgspec.Struct, frozen=True):
    """What is asked for."""

    name: str
    path: str
    arguments: dict[str, str | float]
    is_cached: bool
    has_goal: bool


_KINDS = (
    _Kind("50 rows, cached", "items:latest", {"group": "asked"}, is_cached=True, has_goal=True),
    _Kind("one row, uncached", "items:one", {"group": "asked", "place": 1.0}, is_cached=False, has_goal=True),
    _Kind("50 rows, uncached", "items:latest", {"group": "asked"}, is_cached=False, has_goal=False),
)


async def run(options: Options) -> list[Figure]:
    tokens = Tokens()
    askers = {"signed in": [tokens.sign(subject) for subject in subjects(options.viewer_count)], "anonymous": []}
    asked = [(kind, who) for kind in _KINDS for who in askers]
    async with engine_server(tokens, app=BENCH_APP, fill=_fill) as server:
        answers = {kind.name: await _answer(server, _requests(kind, [])) for kind in _KINDS}
        ours = [await _stretch(server, _requests(kind, askers[who]), options.seconds) for kind, who in asked]
    raw = []
    for kind, who in asked:
        with tempfile.TemporaryDirectory() as name:
            payload = Path(name) / "answer"
            payload.write_bytes(answers[kind.name])
            async with listening(["-m", "bench.load.bare", str(payload)], Path(name)) as server:
                raw.append(await _stretch(server, _requests(kind, askers[who]), options.seconds))
    return [
        figure
        for (kind, who), mine, limit in zip(asked, ours, raw, strict=True)
        for figure in _compare(f"HTTP query of {kind.name}, {who}", mine, limit, has_goal=kind.has_goal)
    ]


def _fill(database: Path) -> None:
    rows = [("asked", place, f"Item {place}, with a label of some length") for place in range(_GROUP_ITEM_COUNT)]
    fill(database, "items", '"group", place, label', rows)


_numbers = count()  # of the askers, over all stretches


def _requests(kind: _Kind, signed: list[str]) -> Requests:
    tokens = cycle([f"Authorization: Bearer {token}\r\n" for token in signed] or [""])
    while True:
        asker = "everybody" if kind.is_cached else f"asker {next(_numbers)}"
        arguments = kind.arguments | {"asker": asker}
        body = msgspec.json.encode({"path": kind.path, "format": "convex_encoded_json", "args": arguments})
        head = (
            f"POST /api/query HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{next(tokens)}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        yield head.encode() + body


class _HttpConnection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport  # set by `connection_made`
        self._on_answer: Callable[[bytes], None]  # set by `ask`
        self._received = b""

    def ask(self, request: bytes, on_answer: Callable[[bytes], None]) -> None:
        self._on_answer = on_answer
        self._transport.write(request)

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data
        head_end = received.find(_HEADER_END)
        if head_end < 0:
            return
        head = received[:head_end].lower()
        length_start = head.index(_LENGTH) + len(_LENGTH)
        length = int(head[length_start:].split(b"\r", 1)[0])
        body_start = head_end + len(_HEADER_END)
        if len(received) >= body_start + length:
            self._received = b""
            is_good = head.startswith(b"http/1.1 200")
            self._on_answer(received[body_start:] if is_good else b"")


async def _connect(server: Server) -> _HttpConnection:
    _, connection = await asyncio.get_running_loop().create_connection(_HttpConnection, "127.0.0.1", server.port)
    return connection


async def _answer(server: Server, requests: Requests) -> bytes:
    connection = await _connect(server)
    answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    connection.ask(next(requests), answered.set_result)
    answer = await answered
    connection.close()
    if b'"status":"success"' not in answer:
        raise RuntimeError(f"the query failed: {answer[:500]!r}")
    return answer


async def _stretch(server: Server, requests: Requests, seconds: float) -> Reached:
    latencies, wrong, size = array("d"), list[bytes](), len(await _answer(server, requests))
    connections = [await _connect(server) for _ in range(CONNECTION_COUNT)]

    def sender(connection: _HttpConnection) -> Callable[[Callable[[], None]], None]:
        def send(on_done: Callable[[], None]) -> None:
            sent_at = time.perf_counter()

            def finish(answer: bytes) -> None:
                if len(answer) != size:
                    wrong.append(answer)
                latencies.append(1_000 * (time.perf_counter() - sent_at))
                on_done()

            connection.ask(next(requests), finish)

        return send

    await asyncio.gather(*[as_acknowledged(sender(each), count=_WARM_COUNT) for each in connections])
    latencies = array("d")
    with cost_of(server) as cost:
        await asyncio.gather(*[as_acknowledged(sender(each), seconds=seconds) for each in connections])
    for connection in connections:
        connection.close()
    if wrong:
        raise RuntimeError(f"{len(wrong):,} answers are not as the first: {wrong[0][:500]!r}")
    return Reached.of(latencies, cost)


def _compare(workload: str, ours: Reached, raw: Reached, *, has_goal: bool) -> Iterator[Figure]:
    goal = Goal(17, "≥", 0.8, of="ratio") if has_goal else None
    yield Figure(workload, "answers", ours.per_second, "/s", raw.per_second, goal)
    yield Figure(workload, "answered p50", ours.p50_ms, "ms", raw.p50_ms)
    yield Figure(workload, "answered p99", ours.p99_ms, "ms", raw.p99_ms)
    yield Figure(workload, "server CPU an answer", ours.cpu_micros, "µs", raw.cpu_micros)
    yield from ours.cost.figures(workload)
