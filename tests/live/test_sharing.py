"""Who shares which result, where queries call queries that ask who asks."""

import asyncio
from pathlib import Path

import pytest

from engine import Limits
from engine.live.invalidation import InvalidationIndex
from engine.live.live_query import LiveQuery
from engine.transaction.write_set import WriteSet
from tests.functions.apps import SECONDS_MAX, open_app
from tests.small_engine import Subscriber, person

ALICE = person("alice")


async def test_a_query_goes_by_what_it_saw_itself_where_the_one_that_it_calls_was_cut_short_alone(
    tmp_path: Path,
) -> None:
    functions = """
IS_CUT = []

@query
async def name(ctx) -> str:
    await ctx.db.query(Name).collect()
    while IS_CUT: pass
    return ctx.auth.identity().subject
@query
async def greeting(ctx) -> str: return "hello " + await ctx.run_query(name)
@mutation
async def cut(ctx) -> None:
    IS_CUT.append(1)
    await ctx.db.insert(Name(name="cut"))
@action
async def cut_no_more(ctx) -> None: IS_CUT.clear()
"""
    limits = Limits(run_slow_ms=10_000, run_ms_max=200)
    async with open_app(tmp_path, functions, limits=limits) as app, asyncio.timeout(SECONDS_MAX):
        first, second = Subscriber(app.engine, ALICE), Subscriber(app.engine, ALICE)
        first.ask(0, "m:name")
        await first.catch_up()
        await app.engine.mutation("m:cut")
        await first.catch_up()
        assert first.results[0].failure is not None, "its run was stopped"
        await app.engine.action("m:cut_no_more")
        second.ask(0, "m:greeting")
        await second.catch_up()
        assert second.value() == "hello alice"
        await first.catch_up()
        assert first.value() == "alice", "what was cut short has been made good by the way"


async def test_a_page_inside_of_a_query_keeps_its_end_also_where_somebody_watches_that_page(tmp_path: Path) -> None:
    functions = """
@query
async def mine(ctx, pagination_opts: PaginationOptions) -> Page[Item]:
    ctx.auth.identity().subject
    return await ctx.db.query(Item.by_key, key="a").paginate(pagination_opts)
@query
async def ranks(ctx, pagination_opts: PaginationOptions) -> list[int]:
    return [item.rank for item in (await ctx.run_query(mine, pagination_opts=pagination_opts)).page]
@mutation
async def add(ctx, rank: int) -> None: await ctx.db.insert(Item(key="a", rank=rank))
"""
    async with open_app(tmp_path, functions) as app:
        for rank in (0, 10, 20, 30):
            await app.engine.mutation("m:add", rank=rank)
        subscriber = Subscriber(app.engine, ALICE)
        for query_id, path in enumerate(("m:mine", "m:ranks")):
            subscriber.ask(query_id, path, paginationOpts={"numItems": 2, "cursor": None})
            await subscriber.catch_up()
        for rank in (1, 2, 3):
            await app.engine.mutation("m:add", rank=rank)
            await subscriber.catch_up()
        assert subscriber.value(1) == [0, 1, 2, 3, 10]


async def test_a_query_runs_once_where_one_that_it_calls_waits_for_a_round(tmp_path: Path) -> None:
    functions = """
import time

IS_SLOW, IS_HELD = [1], [1]

async def while_any(ctx, reasons) -> None:
    while reasons:
        end = time.perf_counter() + 0.012
        while time.perf_counter() < end: pass
        await ctx.db.query(Name).first()
@query
async def mine(ctx) -> list[str]:
    await while_any(ctx, IS_SLOW)
    return [ctx.auth.identity().subject] * await ctx.db.query(Item).count()
@query
async def held(ctx) -> None: await while_any(ctx, IS_HELD)
@query
async def greeting(ctx) -> str: return f"hello {await ctx.run_query(mine)}"
@mutation
async def add(ctx) -> None: await ctx.db.insert(Item(key="a"))
@action
async def release(ctx, slow: bool) -> None: (IS_SLOW if slow else IS_HELD).clear()
"""
    limits = Limits(run_slow_ms=10, run_ms_max=60_000)
    async with open_app(tmp_path, functions, limits=limits) as app, asyncio.timeout(SECONDS_MAX):
        first, second, third = (Subscriber(app.engine, ALICE) for _ in range(3))
        first.ask(0, "m:mine")
        assert first.take() is None
        for _ in range(5):
            await asyncio.sleep(0)  # it runs long in its round, too
        await app.engine.action("m:release", slow=True)
        await first.catch_up()
        second.ask(0, "m:held")
        assert second.take() is None
        await app.engine.mutation("m:add")  # what ran long the last time waits for the next round
        third.ask(0, "m:greeting")
        assert third.take() is None
        await app.engine.action("m:release", slow=False)
        await third.catch_up()
        assert third.value() == "hello ['alice']"
        assert app.run_count("m:greeting") == 1


class _InOrder(list[LiveQuery]):
    """As the set that it stands for is used."""

    def __or__(self, other: set[LiveQuery]) -> list[LiveQuery]:
        return [*self, *other]


@pytest.mark.parametrize("is_newest_first", [False, True])
async def test_pages_that_come_to_end_at_one_place_share_their_runs_whichever_of_them_runs_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_newest_first: bool
) -> None:
    functions = """
@query
async def page(ctx, pagination_opts: PaginationOptions) -> Page[Item]:
    if (await ctx.db.query(Item.by_key, key="a").first()).rank == 0: raise AppError("there are none")
    return await ctx.db.query(Item.by_key, key="a").paginate(pagination_opts)
@mutation
async def set(ctx, rank: int) -> None:
    item = await ctx.db.query(Item.by_key, key="a").first()
    if item is None: await ctx.db.insert(Item(key="a", rank=rank))
    else: await ctx.db.patch(item.id, rank=rank)
"""
    affected = InvalidationIndex.affected
    async with open_app(tmp_path, functions) as app, asyncio.timeout(SECONDS_MAX):
        await app.engine.mutation("m:set", rank=1)
        first, second = Subscriber(app.engine, None), Subscriber(app.engine, None)
        first.ask(0, "m:page", paginationOpts={"numItems": 2, "cursor": None})
        await first.catch_up()
        await app.engine.mutation("m:set", rank=0)
        await first.catch_up()
        second.ask(0, "m:page", paginationOpts={"numItems": 2, "cursor": None})
        await second.catch_up()
        assert second.results[0].failure is not None
        made = [first.view.held(0), second.view.held(0)]
        assert made[0] is not made[1], "where the page of the second ends is not known yet"

        def in_order(index: InvalidationIndex[LiveQuery], writes: WriteSet) -> _InOrder:
            return _InOrder(sorted(affected(index, writes), key=made.index, reverse=is_newest_first))

        with monkeypatch.context() as patch:
            patch.setattr(InvalidationIndex, "affected", in_order)
            await app.engine.mutation("m:set", rank=2)
        for subscriber in (first, second):
            await subscriber.catch_up()
            assert [item["rank"] for item in subscriber.value()["page"]] == [2]
        assert first.view.held(0) is second.view.held(0)


async def test_long_queries_inside_of_each_other_are_found_again_though_the_cache_holds_hardly_anything(
    tmp_path: Path,
) -> None:
    functions = """
@query
async def name(ctx) -> str:
    await ctx.db.query(Item).collect()
    return "guest" if ctx.auth.identity().subject else ""
@query
async def age(ctx) -> int:
    await ctx.db.query(Item).collect()
    return 40 if ctx.auth.identity().subject else 0
@query
async def both(ctx) -> str: return f"{await ctx.run_query(name)}, {await ctx.run_query(age)}"
@query
async def greeting(ctx) -> str: return "hello " + await ctx.run_query(both)
"""
    limits = Limits(run_slow_ms=0, result_cache_size_bytes=1, result_cache_count_max=1)  # every query runs in rounds
    async with open_app(tmp_path, functions, limits=limits) as app, asyncio.timeout(SECONDS_MAX):
        for name in ("alice", "bob", "carol"):
            subscriber = Subscriber(app.engine, person(name))
            subscriber.ask(0, "m:greeting")
            await subscriber.catch_up()
            assert subscriber.value() == "hello guest, 40"
