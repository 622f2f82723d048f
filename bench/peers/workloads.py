"""The peers, and what the engine is compared with them in.

    chat       1,000 users watch one chat of 50 messages: 50 messages/s
    writes     32 clients write their own progress, the next as soon as the last is acknowledged
    progress   1,000 users, then 50, each watch their own progress: 200 updates/s at random

The workloads are those of `bench.load.chat`, `writes` and `progress`; each has a fresh server and database.
"""

import asyncio
import random
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from bench.load.chat import MESSAGES_PER_SECOND
from bench.load.client import Crowd
from bench.load.demo import subjects
from bench.load.figures import Figure, percentile
from bench.load.processes import Server, ensure_files, listening
from bench.load.progress import UPDATES_PER_SECOND, Arrivals
from bench.load.stretches import Options, Send, as_acknowledged, by_timetable, cost_of
from bench.load.writes import WRITER_COUNT
from bench.peers.clients import PeerClient, PocketBaseClient, WebSocketClient
from bench.peers.environments import node_environment, python_environment
from bench.peers.messages import Messages

FEW_COUNT = 50  # users, beside 1,000: whether a write costs more when more watch something else
_HERE = Path(__file__).parent
_FILL_COUNT = 60  # messages before measuring: the result has its full 50
_SOCKET_COUNT = 2  # of a user of PocketBase
_OPENING_COUNT_MAX = 50  # clients that are between connecting and their first result at one time
_SEED = 4


class Peer(msgspec.Struct, frozen=True):
    """Something to compare with."""

    title: str
    client: Callable[[Crowd, int, str], PeerClient]
    command: Callable[[Path], list[str]]  # that serves on a database in this directory; installs what it needs

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Server]:
        """A server of it, on a database of its own."""
        with tempfile.TemporaryDirectory(prefix="engine-peer-") as name:
            directory = Path(name)
            command = ["-m", "bench.peers.launch", *self.command(directory)]
            async with listening(command, directory) as server:
                yield server


def _by_python(name: str) -> Callable[[Path], list[str]]:
    def command(directory: Path) -> list[str]:
        programs = python_environment(_HERE / name)
        return [str(programs / "python"), str(_HERE / name / "server.py"), str(directory / "peer.db"), "{port}"]

    return command


def _by_node(directory: Path) -> list[str]:
    node = node_environment(_HERE / "node_ws")
    return [str(node), str(_HERE / "node_ws" / "server.js"), str(directory / "peer.db"), "{port}"]


def _by_pocketbase(directory: Path) -> list[str]:
    home = _HERE / "pocketbase"
    places = ["--dir", str(directory / "data"), "--migrationsDir", str(home / "migrations"), "--automigrate=0"]
    return [str(python_environment(home) / "pocketbase"), "serve", "--http", "127.0.0.1:{port}", *places]


PEERS = {
    "aiohttp": Peer("aiohttp, asks again", WebSocketClient, _by_python("aiohttp_requery")),
    "fastapi": Peer("FastAPI + aiosqlite, asks again", WebSocketClient, _by_python("fastapi_aiosqlite")),
    "node": Peer("node + ws, new message only", WebSocketClient, _by_node),
    "pocketbase": Peer("PocketBase, new record only, no fsync", PocketBaseClient, _by_pocketbase),
}


async def run(options: Options, names: Iterable[str] = PEERS) -> list[Figure]:
    """All workloads of these peers."""
    ensure_files(_SOCKET_COUNT * options.viewer_count)
    figures: list[Figure] = []
    for name in names:
        peer = PEERS[name]
        figures += await _chat(peer, options)
        figures += await _writes(peer, options)
        figures += await _progress(peer, options)
    return figures


async def _chat(peer: Peer, options: Options) -> list[Figure]:
    messages, randomness = Messages(options.viewer_count), random.Random(_SEED)
    async with peer.serving() as server, _joined(peer, server, options.viewer_count) as (crowd, users):
        await _each(crowd, users, lambda user: user.watch_chat(messages.receiver()))

        def send(on_done: Callable[[], None]) -> None:
            randomness.choice(users).send_message(messages.text(), on_done)

        await crowd.unless_lost(messages.measure(server, as_acknowledged(send, count=_FILL_COUNT)))
        steady = by_timetable(send, per_second=MESSAGES_PER_SECOND, seconds=options.seconds)
        reached = await crowd.unless_lost(messages.measure(server, steady))
    workload = f"chat, {MESSAGES_PER_SECOND}/s: {peer.title}"
    return [
        Figure(workload, "latency p50", reached.p50_ms, "ms"),
        Figure(workload, "latency p99", reached.p99_ms, "ms"),
        Figure(workload, "server CPU a delivery", reached.cpu_micros, "µs"),
        Figure(workload, "size of a delivery", reached.size_bytes, "B"),
        *reached.cost.figures(workload),
    ]


async def _writes(peer: Peer, options: Options) -> list[Figure]:
    latencies_ms, randomness = array("d"), random.Random(_SEED)
    async with peer.serving() as server, _joined(peer, server, WRITER_COUNT) as (crowd, users):
        await _each(crowd, users, _with_own_record)

        def sender(user: PeerClient) -> Send:
            def send(on_done: Callable[[], None]) -> None:
                sent_at = time.perf_counter()

                def finish() -> None:
                    latencies_ms.append(1_000 * (time.perf_counter() - sent_at))
                    on_done()

                user.set_progress(randomness.randrange(1_000_000), finish)

            return send

        with cost_of(server) as cost:
            work = [as_acknowledged(sender(user), seconds=options.seconds) for user in users]
            await crowd.unless_lost(asyncio.gather(*work))
    workload = f"writes, {WRITER_COUNT} clients: {peer.title}"
    return [
        Figure(workload, "acknowledged", len(latencies_ms) / cost.seconds, "/s"),
        Figure(workload, "acknowledged p50", percentile(latencies_ms, 50), "ms"),
        Figure(workload, "acknowledged p99", percentile(latencies_ms, 99), "ms"),
        *cost.figures(workload),
    ]


async def _progress(peer: Peer, options: Options) -> list[Figure]:
    cpu_micros: dict[int, float] = {}
    figures: list[Figure] = []
    for user_count in (FEW_COUNT, options.viewer_count):
        arrivals, randomness = Arrivals(), random.Random(_SEED)
        async with peer.serving() as server, _joined(peer, server, user_count) as (crowd, users):
            await _each(crowd, users, partial(_watch_progress, arrivals))

            def send(
                on_done: Callable[[], None],
                users: list[PeerClient] = users,
                randomness: random.Random = randomness,
                arrivals: Arrivals = arrivals,
            ) -> None:
                randomness.choice(users).set_progress(arrivals.next_number(), on_done)

            async def stretch(send: Send = send, arrivals: Arrivals = arrivals) -> None:
                await by_timetable(send, per_second=UPDATES_PER_SECOND, seconds=options.seconds)
                await arrivals.complete()

            with cost_of(server) as cost:
                await crowd.unless_lost(stretch())
        cpu_micros[user_count] = 1e6 * cost.server_cpu_seconds / len(arrivals.latencies_ms)
        workload = f"progress, {UPDATES_PER_SECOND}/s: {peer.title}"
        if user_count != FEW_COUNT:
            figures = [
                Figure(workload, "latency p50", percentile(arrivals.latencies_ms, 50), "ms"),
                Figure(workload, "latency p99", percentile(arrivals.latencies_ms, 99), "ms"),
                *cost.figures(workload),
            ]
    few, many = cpu_micros[FEW_COUNT], cpu_micros[options.viewer_count]
    cpu = Figure(workload, f"server CPU a write (limit: with {FEW_COUNT} users)", many, "µs", few)
    return [*figures[:2], cpu, *figures[2:]]


@asynccontextmanager
async def _joined(peer: Peer, server: Server, count: int) -> AsyncIterator[tuple[Crowd, list[PeerClient]]]:
    crowd = Crowd(server.port)
    users = [peer.client(crowd, server.port, subject) for subject in subjects(count)]
    await _each(crowd, users, lambda user: user.open())
    try:
        yield crowd, users
    finally:
        for user in users:
            user.close()


async def _watch_progress(arrivals: Arrivals, user: PeerClient) -> None:
    await user.watch_progress(arrivals.receive)


async def _with_own_record(user: PeerClient) -> None:
    """PocketBase changes a record by its id: it is there before the load, as it is for all others after one write."""
    if isinstance(user, PocketBaseClient):
        await user.prepare_progress()


async def _each(crowd: Crowd, users: list[PeerClient], prepare: Callable[[PeerClient], Awaitable[None]]) -> None:
    gate = asyncio.Semaphore(_OPENING_COUNT_MAX)

    async def enter(user: PeerClient) -> None:
        async with gate:
            await prepare(user)

    await crowd.unless_lost(asyncio.gather(*[enter(user) for user in users]))
