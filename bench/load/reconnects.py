"""2,000 users with 5 queries each lose their server, by SIGKILL, and are all back at once as soon as it listens again.

Four of the queries are the same for all, the fifth is each user's own. Whom the server turns away comes back later, as
the official npm client does.

The limit is `broadcast.py`, which accepts as many sockets and does nothing else.

Invariants
  1. Time runs from the first attempt to connect until the last user has the results of all five.
  2. Each distinct query runs once, whoever else asks for it meanwhile.
"""

import asyncio
import random
import tempfile
import time
from pathlib import Path

import msgspec

from bench.load.client import Client, Crowd, Query
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, Goal, percentile
from bench.load.processes import Server, Tokens, engine_server, ensure_files, listening
from bench.load.stretches import Options, cost_of

USER_COUNT = 2_000
_SETTLE_SECONDS_MAX = 60
_BACKOFF_SECONDS = 3.0  # what the npm client waits, more or less by half, when there are too many
_SEED = 12
_RESULT = b'"QueryUpdated"'


async def run(options: Options) -> list[Figure]:
    tokens, user_count = Tokens(), options.size(USER_COUNT)
    ensure_files(user_count)
    names = subjects(user_count)
    async with engine_server(tokens) as server:
        queries = await _queries(server)
        await _first_time(server, tokens, names, queries)
        await server.kill()
        await server.start()
        await server.run_counts()
        signed = [tokens.sign(name) for name in names]
        with cost_of(server) as cost:
            back = await asyncio.wait_for(_all_back(server, names, signed, queries), _SETTLE_SECONDS_MAX)
        counts = await server.run_counts()
    with tempfile.TemporaryDirectory() as name:
        raw_seconds = await _raw_seconds(Path(name), user_count)
    distinct_count = len(queries) - 1 + user_count
    run_count = sum(counts.get(path, 0) for path, _ in queries)
    workload = f"{user_count:,} users reconnect"
    return [
        Figure(workload, "until all are current", max(back.seconds), "s", raw_seconds, Goal(12, "≤", 5)),
        Figure(workload, "until half are current", percentile(back.seconds, 50), "s"),
        Figure(workload, "runs of queries", run_count, "", distinct_count, Goal(12, "≤", 1, of="ratio")),
        Figure(workload, "turned away, and back later", back.turned_away_count, ""),
        Figure(workload, "restart, until it listens", server.start_seconds, "s"),
        Figure(workload, "server CPU a user", 1_000 * cost.server_cpu_seconds / user_count, "ms"),
        *cost.figures(workload),
    ]


async def _raw_seconds(directory: Path, socket_count: int) -> float:
    """Until the raw server has accepted as many sockets at once."""
    frame = directory / "frame"
    frame.write_bytes(b"~0000000~")
    async with listening(["-m", "bench.load.broadcast", str(frame)], directory) as server:
        crowd, started = Crowd(server.port), time.perf_counter()
        await asyncio.gather(*[crowd.connect(lambda buffer, start, end: None) for _ in range(socket_count)])
        seconds = time.perf_counter() - started
        crowd.close()
    return seconds


async def _queries(server: Server) -> list[Query]:
    game, content = await first_id(server, "games:list"), await first_id(server, "content:list")
    return [
        ("games:list", {}),
        ("content:list", {}),
        ("chat:get_messages", {"game_id": game}),
        ("presence:get_viewer_count", {"game_id": game}),
        ("watch_progress:get_progress", {"content_id": content}),  # the own one
    ]


async def _first_time(server: Server, tokens: Tokens, names: list[str], queries: list[Query]) -> None:
    """All sign in, have some progress, and watch."""
    crowd = Crowd(server.port)
    progress = queries[-1][1] | {"position_seconds": 60.0, "duration_seconds": 3_600.0}

    async def prepare(client: Client) -> None:
        await client.mutate("users:store", {})
        await client.mutate("watch_progress:update_progress", progress)
        await client.watch_all(queries)

    await crowd.join(names, tokens.sign, prepare)
    crowd.close()


class _Return(msgspec.Struct):
    """How all came back."""

    seconds: list[float] = []  # when each was current
    turned_away_count: int = 0


async def _all_back(server: Server, names: list[str], signed: list[str], queries: list[Query]) -> _Return:
    back, started, randomness = _Return(), time.perf_counter(), random.Random(_SEED)

    async def come_back(name: str, token: str) -> None:
        while True:
            crowd = Crowd(server.port)  # of one: the others go on when it is turned away
            try:
                await crowd.unless_lost(_current(Client(crowd, name), token, queries))
                back.seconds.append(time.perf_counter() - started)
                return
            except (RuntimeError, ConnectionError):
                back.turned_away_count += 1
                crowd.close()
            await asyncio.sleep(_BACKOFF_SECONDS * randomness.uniform(0.5, 1.5))

    await asyncio.gather(*[come_back(name, token) for name, token in zip(names, signed, strict=True)])
    return back


async def _current(client: Client, token: str, queries: list[Query]) -> None:
    """Open it, and wait for all results."""
    missing, is_current = len(queries), asyncio.Event()

    def receive(buffer: bytearray, start: int, end: int) -> None:
        nonlocal missing
        missing -= buffer.count(_RESULT, start, end)
        if missing == 0:
            is_current.set()

    client.on_result = receive
    await client.open(token, queries)
    await is_current.wait()
