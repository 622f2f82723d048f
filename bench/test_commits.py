"""What a group commit costs: seconds for 100 mutations that each insert one message, until the last is settled.

Fixed: one group, one fsync (on the disk of the temporary directory), a ledger row each. Nobody watches.
"""

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bench.tables import Chat
from engine.errors import InternalError
from engine.transaction.committer import Committer, Execution, Group, Settled, Submission
from engine.transaction.ledger import Ledger, LedgerKey
from engine.transaction.transaction import WriteTransaction

Benchmark = Callable[..., Any]
MUTATION_COUNT = 100


def test_100_mutations_are_committed_in_one_group(benchmark: Benchmark, tmp_path: Path) -> None:
    chat, numbers = Chat(tmp_path), itertools.count()
    limits = msgspec.structs.replace(chat.limits, group_commit_ms_max=1_000)  # never the reason to end a group here
    groups: list[Group] = []

    async def publish(group: Group) -> None:
        groups.append(group)
        for submission, settled in group.settled:
            submission.settle(settled)

    def fail(error: InternalError) -> None:
        raise error

    committer = Committer(
        chat.database.writer,
        chat.catalog,
        Ledger.open(chat.database.writer, chat.limits),
        limits,
        chat.clock,
        publish,
        refresh_readers=lambda: None,
        on_fatal=fail,
    )

    def execute(transaction: WriteTransaction) -> Execution:
        return Execution(transaction.insert(chat.message(transaction.tick)).encode(), None)

    async def commit() -> int:
        loop, left = asyncio.get_running_loop(), MUTATION_COUNT
        done = loop.create_future()

        def settle(settled: Settled) -> None:
            nonlocal left
            left -= 1
            if not left:
                done.set_result(settled.ts)

        for _ in range(MUTATION_COUNT):
            committer.submit(Submission(execute, settle, LedgerKey("session", next(numbers), bytes(16))))
        ts: int = await done
        return ts

    with asyncio.Runner() as runner:
        running = runner.get_loop().create_task(committer.run())
        ts = benchmark(lambda: runner.run(commit()))
        committer.close()
        runner.run(asyncio.wait_for(running, 10))
    assert ts == groups[-1].ts
    assert {len(group.settled) for group in groups} == {MUTATION_COUNT}
    chat.database.close()
