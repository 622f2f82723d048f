"""Queries that are run twice in development: a difference is told with the function's name, and nothing else."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine import PaginationOptions
from engine.config import Config
from engine.engine import Engine
from engine.events import ResultsDiffered
from engine.functions.repeating import _RUNS_PER_REPEAT
from engine.observe.log import log_events
from tests.functions.apps import UNHURRIED, ManualClock, OpenApp, write_app

FUNCTIONS = """
import random, time, uuid
kept = []

@query
async def by_chance(ctx) -> float: return random.random()
@query
async def by_hour(ctx) -> int: return time.perf_counter_ns()
@query
async def by_uuid(ctx) -> str: return str(uuid.uuid4())
@query
async def by_what_is_kept(ctx) -> int:
    kept.append(1)
    return len(kept)
@query
async def by_nested(ctx) -> float: return await ctx.run_query("m:by_chance")
@query
async def fails_the_second_time(ctx) -> int:
    kept.append(1)
    if len(kept) % 2 == 0: raise ValueError("again")
    return 1

@query
async def good(ctx, n: int = 0) -> list[Any]:
    ctx.log("good")
    return [ctx.now, ctx.random.random(), await ctx.db.query(Item).count(), ctx.auth.identity() is None]
@query
async def page(ctx, pagination_opts: PaginationOptions) -> Page[Item]:
    return await ctx.db.query(Item.by_key).paginate(pagination_opts)
@query
async def fails(ctx) -> None: raise AppError("no")
@query
async def count_runs(ctx, n: int) -> None: kept.append(n)
@mutation
async def add(ctx) -> None: await ctx.db.insert(Item(key="k"))
"""
BAD = ["by_chance", "by_hour", "by_uuid", "by_what_is_kept", "by_nested", "fails_the_second_time"]


@asynccontextmanager
async def open_repeating(directory: Path, *, repeats_queries: bool = True) -> AsyncIterator[OpenApp]:
    write_app(directory / "app", FUNCTIONS)
    clock = ManualClock()
    config = Config(mode="development", limits=UNHURRIED)
    async with Engine.open(
        directory / "app", ":memory:", config=config, clock=clock, repeats_queries=repeats_queries
    ) as engine:
        yield OpenApp(directory / "app", engine, clock)


def differing(app: OpenApp) -> list[str]:
    return [event.path for event in app.events if isinstance(event, ResultsDiffered)]


@pytest.mark.parametrize("name", BAD)
async def test_what_depends_on_something_else_is_told_by_its_name(tmp_path: Path, name: str) -> None:
    async with open_repeating(tmp_path) as app:
        await app.call(f"m:{name}")
        assert differing(app) == [f"m:{name}"]


async def test_what_depends_on_what_it_reads_is_not(tmp_path: Path) -> None:
    async with open_repeating(tmp_path) as app:
        await app.call("m:add")
        result = await app.outcome("m:good")
        assert result.log_lines == ("[LOG] good",), "one run is shown"
        value, _ = await app.page("m:page", pagination_opts=PaginationOptions(num_items=1, cursor=None))
        assert len(value.page) == 1
        assert (await app.failure("m:fails")).code == "AppError"
        async with app.watched("m:good") as results:
            await app.call("m:add")
            assert (await anext(results))[2] == 2
        assert differing(app) == []


async def test_the_first_run_of_new_code_and_each_sixteenth_are_repeated(tmp_path: Path) -> None:
    async with open_repeating(tmp_path) as app:
        for _ in range(2):
            kept = app.engine.registry.by_path["m:count_runs"].callable.__globals__["kept"]
            for n in range(2 * _RUNS_PER_REPEAT):
                await app.call("m:count_runs", n=n)
            assert kept == sorted([*range(2 * _RUNS_PER_REPEAT), 0, _RUNS_PER_REPEAT])
            await app.engine.reload()


async def test_nothing_is_repeated_unless_it_is_asked_for(tmp_path: Path) -> None:
    async with open_repeating(tmp_path, repeats_queries=False) as app:
        await app.call("m:count_runs", n=1)
        assert app.engine.registry.by_path["m:count_runs"].callable.__globals__["kept"] == [1]


async def test_the_log_says_it_once_until_the_code_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with open_repeating(tmp_path) as app:
        log_events(app.engine.events)
        for _ in range(2):
            caplog.clear()
            for _ in range(_RUNS_PER_REPEAT + 1):
                await app.call("m:by_what_is_kept")
                await app.call("m:add")  # results that nobody watches are made anew
                await app.engine.query("m:by_what_is_kept")
            (message,) = [record.getMessage() for record in caplog.records]
            assert message.startswith("m:by_what_is_kept returned something else when it ran again on the same data")
            await app.engine.reload()
