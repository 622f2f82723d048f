"""64 clients move money between 100,000 accounts: uniformly (alpha 0), then most of them a few (zipf, alpha 1.5).

First each client's next transfer follows when the last is durable, then each has 40 in flight. The limit is the same
SQLite statements in grouped commits (`commits.py`), on a copy of the database.

Invariant: no transfer fails, and the sum of all balances is the same at the end; else the workload fails.
"""

import asyncio
import random
import shutil
import sqlite3
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import accumulate, cycle
from pathlib import Path

from bench.load.client import Client, Crowd
from bench.load.commits import RawCommits, raw_commits
from bench.load.commits import transfers as raw_transfers
from bench.load.demo import subjects
from bench.load.figures import Figure, Goal
from bench.load.filling import fill
from bench.load.processes import BENCH_APP, Server, Tokens, engine_server
from bench.load.stretches import Options, Reached, Send, as_acknowledged, cost_of

CLIENT_COUNT = 64
ACCOUNT_COUNT = 100_000
ALPHAS = (0.0, 1.5)
_BALANCE = 1_000_000  # of each account: nobody runs dry
_PICK_COUNT = 100_000  # pairs that are picked before a stretch; they come again after that
_GROUP_COUNT_BY_IN_FLIGHT = {1: CLIENT_COUNT, 40: 512}  # in flight a client; the engine's bound is 512 in a group
_SEED = 14

Pair = tuple[str, str]


async def run(options: Options) -> list[Figure]:
    tokens, account_ids = Tokens(), list[str]()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "raw.db"

        def open_accounts(database: Path) -> None:
            account_ids.extend(fill(database, "accounts", "balance", [(_BALANCE,)] * ACCOUNT_COUNT))

        async with engine_server(tokens, app=BENCH_APP, fill=open_accounts) as server:
            crowd = Crowd(server.port)
            clients = await crowd.join(subjects(CLIENT_COUNT), tokens.sign, _nothing_to_prepare)
            reached = {
                (in_flight, alpha): await crowd.unless_lost(
                    _stretch(server, clients, picks(account_ids, alpha), in_flight, options.seconds)
                )
                for in_flight in _GROUP_COUNT_BY_IN_FLIGHT
                for alpha in ALPHAS
            }
            crowd.close()
            await server.stop()
            shutil.copy(server.database, copy)
        _check_sum(copy)
        raw = {
            in_flight: raw_commits(copy, group_count, options.seconds / 4, raw_transfers)
            for in_flight, group_count in _GROUP_COUNT_BY_IN_FLIGHT.items()
        }
    return list(_figures(reached, raw))


async def _nothing_to_prepare(client: Client) -> None:
    pass


def picks(account_ids: list[str], alpha: float) -> list[Pair]:
    """Pairs of different accounts: the account of rank k with a chance in proportion to 1 / k ** alpha."""
    randomness = random.Random(_SEED)
    weights = list(accumulate(1 / rank**alpha for rank in range(1, len(account_ids) + 1)))
    chosen = iter(randomness.choices(account_ids, cum_weights=weights, k=3 * _PICK_COUNT))
    pairs = ((payer, payee) for payer, payee in zip(chosen, chosen, strict=False) if payer != payee)
    return [pair for pair, _ in zip(pairs, range(_PICK_COUNT), strict=False)]


async def _stretch(server: Server, clients: list[Client], pairs: list[Pair], in_flight: int, seconds: float) -> Reached:
    latencies, turns = array("d"), cycle(pairs)

    def sender(client: Client) -> Send:
        def send(on_done: Callable[[], None]) -> None:
            sent_at = time.perf_counter()

            def finish() -> None:
                latencies.append(1_000 * (time.perf_counter() - sent_at))
                on_done()

            from_id, to_id = next(turns)
            arguments = {"from_id": from_id, "to_id": to_id, "amount": 1}
            client.start_mutation("accounts:transfer", arguments, on_answer=finish)

        return send

    with cost_of(server) as cost:
        loads = [as_acknowledged(sender(client), seconds=seconds, in_flight_count=in_flight) for client in clients]
        await asyncio.gather(*loads)
    return Reached.of(latencies, cost)


def _check_sum(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        ((total, poorest),) = connection.execute("SELECT sum(balance), min(balance) FROM accounts").fetchall()
    if total != _BALANCE * ACCOUNT_COUNT or poorest < 0:
        raise RuntimeError(f"the accounts hold {total:,}, at least {poorest:,} each: money was made or lost")


def _figures(reached: dict[tuple[int, float], Reached], raw: dict[int, RawCommits]) -> Iterator[Figure]:
    for (in_flight, alpha), each in reached.items():
        workload = f"transfers, {in_flight} in flight, alpha {alpha:g}"
        limit, even = raw[in_flight], reached[in_flight, ALPHAS[0]]
        yield Figure(workload, "durable transfers", each.per_second, "/s", limit.per_second, Goal(14, "≥", 12_000))
        yield Figure(workload, "acknowledged p50", each.p50_ms, "ms", limit.p50_ms)
        yield Figure(workload, "acknowledged p99", each.p99_ms, "ms", limit.p99_ms)
        if alpha != ALPHAS[0]:
            goal = Goal(14, "≥", 0.95, of="ratio")
            yield Figure(workload, "contended (limit: alpha 0)", each.per_second, "/s", even.per_second, goal)
        yield from each.cost.figures(workload)
