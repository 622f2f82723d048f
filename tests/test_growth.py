"""What the cost of a write must not grow with: counted (look-ups, runs, SQLite's steps), never timed."""

import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.live.intervals import IntervalTree
from engine.storage import connections
from tests.small_engine import SmallEngine, Subscriber, small_engine

FEW, MANY = 10, 400


class Work(msgspec.Struct, frozen=True):
    """What doing something took."""

    steps: int  # of SQLite's programs: each row that it looks at is one at least
    lookups: int  # for the live queries that it touched
    runs: int  # of queries


async def work_of(app: SmallEngine, do: Callable[[], Awaitable[object]]) -> Work:
    steps = 0

    def count_step() -> None:
        nonlocal steps
        steps += 1

    sqlite = [app.engine.database.writer._connection, app.engine._snapshots.reader._connection]
    index = app.engine._publisher._index
    lookups_before, runs_before = index.lookup_count, app.run_count()
    for connection in sqlite:
        connection.set_progress_handler(count_step, 1)
    try:
        await do()
    finally:
        for connection in sqlite:
            connection.set_progress_handler(None, 1)
    return Work(steps, index.lookup_count - lookups_before, app.run_count() - runs_before)


async def work_of_a_write(app: SmallEngine) -> Work:
    """The second of two that are alike: what is made once is there."""
    await app.mutate("notes:add", room="a", text="x", rank=1_000_000)
    return await work_of(app, lambda: app.mutate("notes:add", room="a", text="x", rank=1_000_000))


def ask_for_documents(app: SmallEngine, subscriber: Subscriber, ids: list[str]) -> None:
    for number, note in enumerate(ids):
        subscriber.ask(number, "notes:get", id=note)


def ask_for_ranges(app: SmallEngine, subscriber: Subscriber, ids: list[str]) -> None:
    for rank in range(len(ids)):  # of the room that is written to
        subscriber.ask(rank, "notes:count_up_to", room="a", rank=rank)


def ask_for_pages(app: SmallEngine, subscriber: Subscriber, ids: list[str]) -> None:
    for number in range(len(ids)):
        subscriber.ask(number, "notes:top", room=f"room {number}", n=5)


@pytest.mark.parametrize("ask", [ask_for_documents, ask_for_ranges, ask_for_pages])
async def test_a_write_costs_the_same_with_more_unrelated_subscriptions(
    ask: Callable[[SmallEngine, Subscriber, list[str]], None],
) -> None:
    works = []
    for count in (FEW, MANY):
        async with small_engine(query_count_max=MANY) as app:
            ids = await app.mutate("notes:add_all", room="elsewhere", texts=["x"] * count)
            subscriber = app.subscriber()
            ask(app, subscriber, ids)
            await subscriber.catch_up()
            works.append(await work_of_a_write(app))
    assert works[0] == works[1]
    assert works[0].runs == 0


async def test_a_write_costs_the_same_with_more_sessions() -> None:
    works = []
    for count in (FEW, MANY):
        async with small_engine() as app:
            sessions = [app.subscriber() for _ in range(count)]
            for number, session in enumerate(sessions):
                session.ask(0, "notes:count", room="a" if number == 0 else f"room {number}")
                await session.catch_up()
            works.append(await work_of_a_write(app))
            assert sum(session.told_count > 1 for session in sessions) == 1
    assert works[0] == works[1]
    assert works[0].runs == 1


async def test_a_write_costs_the_same_with_more_documents() -> None:
    works = []
    for count in (FEW, MANY):
        async with small_engine() as app:
            await app.mutate("notes:add_all", room="a", texts=["x"] * count)
            subscriber = app.subscriber()
            subscriber.ask(0, "notes:top", room="a", n=5)
            await subscriber.catch_up()
            works.append(await work_of_a_write(app))
    assert works[0] == works[1]
    assert works[0].runs == 1


async def test_a_request_of_a_session_costs_the_same_with_more_outcomes_kept() -> None:
    async with small_engine() as app:
        works, lookup_counts = [], []

        async def send(request_id: int) -> None:
            sent = app.send("notes:add", request_id, room="a", text="x")
            await app.idle()
            assert sent.outcome.failure is None

        for request_id in range(FEW + 1):
            works.append(await work_of(app, lambda request_id=request_id: send(request_id)))  # type: ignore[misc]
            lookup_counts.append(app.engine._ledger.lookup_count)
        assert works[1] == works[FEW]
        assert lookup_counts == [1] * (FEW + 1)  # when the session came


@pytest.mark.parametrize("touched_count", [1, FEW, 100])
async def test_a_write_runs_what_it_touches_and_finds_it_with_as_many_lookups(touched_count: int) -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        for number in range(100):
            room = "a" if number < touched_count else "elsewhere"
            subscriber.ask(number, "notes:count_up_to", room=room, rank=2_000_000 + number)
        await subscriber.catch_up()
        work = await work_of_a_write(app)
        assert work.runs == touched_count
        async with small_engine() as alone:
            subscriber = alone.subscriber()
            subscriber.ask(0, "notes:count_up_to", room="a", rank=2_000_000)
            await subscriber.catch_up()
            assert work.lookups == (await work_of_a_write(alone)).lookups


async def test_opening_costs_the_same_with_more_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, step_counts, statements = connections._connect, [], list[str]()

    def count_step() -> None:
        step_counts[-1] += 1

    def connect_counted(path: Path, mode: Any) -> Any:
        connection = connect(path, mode)
        connection.set_progress_handler(count_step, 1)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(connections, "_connect", connect_counted)
    for count in (FEW, MANY):
        path = tmp_path / f"{count}.db"
        step_counts.append(0)
        async with small_engine(path) as app:
            await app.mutate("notes:add_all", room="a", texts=["x"] * count)
        step_counts.append(0)
        statements.clear()
        async with small_engine(path):
            pass
        assert len(statements) > FEW
        assert not any("count(" in statement for statement in statements)  # one step of SQLite's, through all pages
    assert step_counts[1] == step_counts[3] > 0


class Point(int):
    """Counts how often it is compared."""

    count = 0

    def __lt__(self, other: int) -> bool:
        Point.count += 1
        return super().__lt__(other)


def test_finding_an_interval_looks_at_a_logarithm_of_them() -> None:
    tree: IntervalTree[int, str] = IntervalTree()
    count = 4_096
    for number in range(count):
        tree.add(10 * number, 10 * number + 5, f"{number}")
    for number in (0, count // 3, count - 1):
        found: set[str] = set()
        Point.count = 0
        tree.find(Point(10 * number + 1), found)
        assert found == {f"{number}"}
        assert Point.count < 3 * 3 * math.log2(count)  # three a node; a treap is at most so deep
