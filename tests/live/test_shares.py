"""Turns between subscribers: who asks much has his share of each pass, and of each turn of the loop.

Functions hold the loop by the clock of the test, so that no count depends on how busy the machine is.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.events import Committed, Event, QueryRan
from engine.limits import Limits
from engine.live.live_query import Ask, LiveQuery
from engine.live.shares import Shares
from engine.live.view import View
from engine.testing import ManualClock
from tests.functions.apps import OpenApp, open_app
from tests.model import stopwatch
from tests.small_engine import Subscriber

QUERY_MS = 2
FUNCTIONS = f"""
from tests.model.stopwatch import hold

@query
async def watched(ctx, group: str, asker: int) -> int:
    hold({QUERY_MS / 1_000})
    return await ctx.db.query(Item.by_key, key=group).count()

held_ms = []

@query
async def unlucky(ctx) -> int:
    hold((held_ms.pop() if held_ms else 0) / 1_000)
    return await ctx.db.query(Item.by_key, key="b").count()

@mutation
async def add(ctx, group: str) -> None:
    await ctx.db.insert(Item(key=group))
"""
LIMITS = Limits(run_slow_ms=5, pass_share_ms=20, run_ms_max=60_000)
SHARE_COUNT = LIMITS.pass_share_ms // QUERY_MS + 3 * (LIMITS.run_slow_ms // QUERY_MS) + 4  # a share and three slices


@asynccontextmanager
async def opened(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenApp]:
    for module in ("functions.run", "functions.runner", "live.deliveries", "live.publisher"):
        monkeypatch.setattr(f"engine.{module}._cpu", stopwatch.cpu)
    async with open_app(directory, FUNCTIONS, limits=LIMITS, clock=ManualClock()) as app:
        yield app


async def subscriber(app: OpenApp, count: int, group: str, first: int = 0) -> Subscriber:
    """One with so many queries of its own, all taken."""
    made = Subscriber(app.engine, None)
    for asker in range(first, first + count):
        made.view.add(asker, "m:watched", json.dumps({"group": group, "asker": asker}).encode(), None)
    await made.catch_up()
    return made


class Order:
    """What happened, in order: a name for each run and each telling."""

    def __init__(self, app: OpenApp) -> None:
        self.names: list[str] = []
        app.engine.events.listen(self._ran)

    def _ran(self, event: Event) -> None:
        if isinstance(event, QueryRan | Committed):
            self.names.append("ran" if isinstance(event, QueryRan) else "committed")

    def note(self, name: str) -> Any:
        return lambda: self.names.append(name)


async def test_who_watches_little_waits_for_the_share_of_who_watches_much_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, monkeypatch) as app:
        greedy = await subscriber(app, 200, "a")
        other = await subscriber(app, 1, "a", first=1_000)
        order = Order(app)
        other.view.on_ready = order.note("told")
        await app.engine.mutation("m:add", group="a")
        await app.idle()
        before = order.names.index("told")
        assert before <= SHARE_COUNT, f"{before} of 200 queries ran before the other one was told"
        await greedy.catch_up()
        await other.catch_up()
        assert order.names.count("ran") == 201, "each once"
        assert {greedy.value(asker) for asker in range(200)} == {other.value(1_000)} == {1}


async def test_the_next_commit_does_not_wait_for_all_that_one_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, monkeypatch) as app:
        greedy = await subscriber(app, 200, "a")
        order = Order(app)
        await app.engine.mutation("m:add", group="a")
        await app.idle()
        before = order.names.index("committed")  # the pass is over
        assert before <= SHARE_COUNT, f"{before} of 200 queries ran before the next commit could be published"
        await greedy.catch_up()
        assert order.names.count("ran") == 200
        assert {greedy.value(asker) for asker in range(200)} == {1}


async def test_first_runs_leave_others_several_turns_after_each_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, monkeypatch) as app:
        order = Order(app)
        greedy = Subscriber(app.engine, None)
        for asker in range(60):
            greedy.view.add(asker, "m:watched", json.dumps({"group": "a", "asker": asker}).encode(), None)
        while greedy.take() is None:
            order.names.append("turn")
            await asyncio.sleep(0)
        slices = "".join("r" if name == "ran" else "." for name in order.names).strip(".").split("." * 8)
        assert len(slices) >= 60 // 3, order.names
        assert max(each.count("r") for each in slices) <= 3, "at most a slice at a time"


@pytest.mark.parametrize(("held_ms", "is_long"), [([], False), ([6], False), ([6, 6], True)])
async def test_a_short_query_that_the_machine_held_up_does_not_wait_for_the_round_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_ms: list[int], is_long: bool
) -> None:
    async with opened(tmp_path, monkeypatch) as app:
        greedy, other = await subscriber(app, 100, "a"), Subscriber(app.engine, None)
        order = Order(app)
        await app.engine.mutation("m:add", group="a")
        while "ran" not in order.names or app.engine._publisher._round is None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        app.engine.registry.by_path["m:unlucky"].callable.__globals__["held_ms"].extend(held_ms)
        other.view.add(0, "m:unlucky", b"{}", None)
        change = other.take()
        assert (change is None) is is_long
        assert app.engine._publisher._round is not None, "that of the other one is under way"
        await other.catch_up()
        assert other.value() == 0
        await greedy.catch_up()


def test_a_result_that_many_share_is_run_in_the_pass() -> None:
    shares = Shares(0.0)
    shared, own = (LiveQuery(Ask("m:q", b"{}", None), None, None, is_restricted=True) for _ in range(2))
    views = [Watcher() for _ in range(9)]
    own.watchers[views[0]] = (0,)
    shared.watchers.update(dict.fromkeys(views, (0,)))
    assert not shares.are_used_up(own)
    for each in (own, shared):
        shares.add(each, 1.0)
    assert shares.are_used_up(own)
    assert not shares.are_used_up(shared)


class Watcher(View):
    """One who never takes."""

    def __init__(self) -> None:
        pass
