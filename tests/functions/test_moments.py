"""Time as a dependency: a live query runs again at the exact moment when its result changes, and not before."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import FunctionMisuse
from engine.events import ClockRead, Committed
from engine.transaction.moments import MovingBound
from tests.functions.apps import OpenApp, open_app
from tests.small_engine import Subscriber

SCHEMA = """
from engine import Table, index

class Session(Table, name="sessions"):
    room: str = "r"
    seen: float = 0.0
    seen_ms: int = 0
    name: str = ""
    by_seen = index("room", "seen")
    by_seen_ms = index("seen_ms")
    by_room = index("room")
    by_place = index("seen", ranked=True)
"""

FUNCTIONS = """
from schema import Session

@query
async def names(ctx, room: str = "r") -> list[str]:
    return [s.name for s in await ctx.db.query(Session.by_seen, room=room, gte=ctx.ago(minutes=2)).collect()]
@query
async def names_gt(ctx) -> list[str]:
    return [s.name for s in await ctx.db.query(Session.by_seen, room="r", gt=ctx.ago(minutes=2)).collect()]
@query
async def lapsed(ctx) -> list[str]:
    return [s.name for s in await ctx.db.query(Session.by_seen, room="r", lt=ctx.ago(minutes=2)).collect()]
@query
async def lapsed_lte(ctx) -> list[str]:
    return [s.name for s in await ctx.db.query(Session.by_seen, room="r", lte=ctx.ago(minutes=2)).collect()]
@query
async def count(ctx) -> int: return await ctx.db.query(Session.by_seen, room="r", gte=ctx.ago(seconds=120)).count()
@query
async def whole_ms(ctx) -> int: return await ctx.db.query(Session.by_seen_ms, gte=ctx.ago(minutes=2)).count()
@query
async def young(ctx) -> int: return await ctx.db.query(Session.by_room, room="r", gte=ctx.ago(minutes=2)).count()
@query
async def newest(ctx) -> list[str]:
    seen = ctx.db.query(Session.by_seen, room="r", gte=ctx.ago(minutes=2)).order("desc")
    return [s.name for s in await seen.take(1)]
@query
async def walk(ctx) -> list[str]:
    return [s.name async for s in ctx.db.query(Session.by_seen, room="r", gte=ctx.ago(minutes=2))]
@query
async def place(ctx) -> list[str]:
    page = await ctx.db.query(Session.by_place, gte=ctx.ago(minutes=2)).page(0, 9)
    return [s.name for s in page.page]
@query
async def rank_of_b(ctx) -> int | None:
    b = await ctx.db.query(Session.by_room, room="r").filter(lambda s: s.name == "b").first()
    return None if b is None else await ctx.db.query(Session.by_place, gte=ctx.ago(minutes=2)).rank(b)
@query
async def nested(ctx) -> int: return len(await ctx.run_query(names))
@query
async def minute(ctx) -> int:
    ctx.rerun_at((ctx.now // 60_000 + 1) * 60_000)
    return int(ctx.now // 60_000)
@query
async def in_a_while(ctx) -> float:
    ctx.rerun_at(ctx.ago(minutes=-5))
    return ctx.now
@query
async def misuse(ctx) -> bool: return ctx.ago(minutes=2) < 5
@query
async def now(ctx) -> float: return ctx.now
@mutation
async def see(ctx, name: str, ago_ms: float = 0, room: str = "r") -> None:
    session = await ctx.db.query(Session).filter(lambda s: s.name == name).first()
    seen = ctx.now - ago_ms
    if session is None:
        await ctx.db.insert(Session(name=name, seen=seen, seen_ms=int(seen), room=room))
    else:
        await ctx.db.patch(session.id, seen=seen, seen_ms=int(seen))
@mutation
async def forget(ctx, name: str) -> None:
    await ctx.db.delete((await ctx.db.query(Session).filter(lambda s: s.name == name).first()).id)
@mutation
async def stale(ctx) -> int: return await ctx.db.query(Session.by_seen, room="r", lt=ctx.ago(minutes=2)).count()
"""


@asynccontextmanager
async def subscribed(directory: Path, *paths: str) -> AsyncIterator[tuple[OpenApp, Subscriber]]:
    async with open_app(directory, FUNCTIONS, schema=SCHEMA) as app:
        subscriber = Subscriber(app.engine, None)
        for number, path in enumerate(paths):
            subscriber.ask(number, path)
        await subscriber.catch_up()
        yield app, subscriber


async def holds(app: OpenApp, subscriber: Subscriber, number: int = 0) -> object:
    await app.idle()
    await subscriber.catch_up()
    return subscriber.value(number)


@pytest.mark.parametrize("path", ["m:names", "m:names_gt", "m:walk", "m:newest", "m:place"])
async def test_a_row_falls_out_at_its_moment_and_nothing_runs_before(tmp_path: Path, path: str) -> None:
    async with subscribed(tmp_path, path) as (app, subscriber):
        await app.engine.mutation("m:see", name="a")
        assert await holds(app, subscriber) == ["a"]
        app.forget_events()
        await app.turn(119.9)
        assert app.events == [], "no polling"
        await app.turn(0.2)
        assert await holds(app, subscriber) == []
        assert app.run_count(path) == 1
        commits = [event for event in app.events if isinstance(event, Committed)]
        assert [commit.write_count for commit in commits] == [0], "an empty commit gives it a timestamp"
        await app.turn(3_600)
        assert app.run_count(path) == 1


@pytest.mark.parametrize("path", ["m:lapsed", "m:lapsed_lte"])
async def test_a_row_comes_in_at_its_moment(tmp_path: Path, path: str) -> None:
    async with subscribed(tmp_path, path) as (app, subscriber):
        await app.engine.mutation("m:see", name="a")
        await app.turn(60)
        await app.engine.mutation("m:see", name="b")
        assert await holds(app, subscriber) == []
        await app.turn(60.1)
        assert await holds(app, subscriber) == ["a"]
        await app.turn(60)
        assert await holds(app, subscriber) == ["a", "b"]


@pytest.mark.parametrize("path", ["m:count", "m:whole_ms", "m:young"])
async def test_a_count_follows_time_too(tmp_path: Path, path: str) -> None:
    async with subscribed(tmp_path, path) as (app, subscriber):
        for name in "abc":
            await app.engine.mutation("m:see", name=name)
            await app.turn(10)
        assert await holds(app, subscriber) == 3
        for seconds, left in ((89.9, 3), (0.2, 2), (10, 1), (10, 0)):
            await app.turn(seconds)
            assert await holds(app, subscriber) == left


async def test_a_heartbeat_puts_the_moment_off_and_wakes_no_count(tmp_path: Path) -> None:
    async with subscribed(tmp_path, "m:count") as (app, subscriber):
        await app.engine.mutation("m:see", name="a")
        await holds(app, subscriber)
        app.forget_events()
        for _ in range(40):
            await app.turn(30)
            await app.engine.mutation("m:see", name="a")
        assert await holds(app, subscriber) == 1
        assert app.run_count("m:count") <= 20, "at most once in a minute, to find the next moment"
        await app.turn(121)
        assert await holds(app, subscriber) == 0


async def test_a_row_that_is_set_back_falls_out_earlier(tmp_path: Path) -> None:
    async with subscribed(tmp_path, "m:count", "m:lapsed") as (app, subscriber):
        for name in "ab":
            await app.engine.mutation("m:see", name=name)
        await app.engine.mutation("m:see", name="b", ago_ms=110_000)
        assert await holds(app, subscriber) == 2
        await app.turn(10.1)
        assert await holds(app, subscriber) == 1
        assert await holds(app, subscriber, 1) == ["b"]


async def test_a_row_that_is_gone_does_not_matter(tmp_path: Path) -> None:
    async with subscribed(tmp_path, "m:names", "m:lapsed") as (app, subscriber):
        await app.engine.mutation("m:see", name="a")
        await app.engine.mutation("m:see", name="b", room="elsewhere")
        await app.engine.mutation("m:forget", name="a")
        await app.turn(300)
        assert await holds(app, subscriber) == await holds(app, subscriber, 1) == []


async def test_a_place_in_a_range_that_moves_follows_time(tmp_path: Path) -> None:
    async with subscribed(tmp_path, "m:rank_of_b") as (app, subscriber):
        for name in "ab":
            await app.engine.mutation("m:see", name=name)
            await app.turn(60)
        assert await holds(app, subscriber) == 1
        await app.turn(1)
        assert await holds(app, subscriber) == 0
        await app.turn(60)
        assert await holds(app, subscriber) is None


async def test_a_query_inside_of_another_one_follows_time(tmp_path: Path) -> None:
    async with subscribed(tmp_path, "m:nested") as (app, subscriber):
        await app.engine.mutation("m:see", name="a")
        assert await holds(app, subscriber) == 1
        await app.turn(121)
        assert await holds(app, subscriber) == 0


async def test_a_query_runs_again_when_it_says_so(tmp_path: Path) -> None:
    async with subscribed(tmp_path, "m:minute", "m:in_a_while") as (app, subscriber):
        first, start = subscriber.value(0), subscriber.value(1)
        app.forget_events()
        await app.turn(600)
        assert await holds(app, subscriber) == first + 10
        assert app.run_count("m:minute") == 10
        assert await holds(app, subscriber, 1) == start + 600_000
        assert app.run_count("m:in_a_while") == 2


async def test_queries_that_are_due_at_one_moment_share_one_commit(tmp_path: Path) -> None:
    async with subscribed(tmp_path, "m:minute", "m:names", "m:count") as (app, subscriber):
        app.clock.advance(60 - app.clock.wall_ns() / 1e9 % 60)
        await app.engine.mutation("m:see", name="a")
        await holds(app, subscriber)
        app.forget_events()
        await app.turn(120.02)
        commits = [event for event in app.events if isinstance(event, Committed)]
        assert len(commits) == 3, "after one minute; after two; and when the row is older than two"
        assert await holds(app, subscriber, 1) == []


async def test_nobody_who_watches_means_no_commit(tmp_path: Path) -> None:
    async with subscribed(tmp_path, "m:minute", "m:names") as (app, subscriber):
        await app.engine.mutation("m:see", name="a")
        await holds(app, subscriber)
        subscriber.view.close()
        app.forget_events()
        await app.turn(600)
        assert app.events == []
        assert await app.engine.query("m:names") == []


async def test_a_mutation_bounds_by_time_once(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        await app.engine.mutation("m:see", name="a")
        assert await app.engine.mutation("m:stale") == 0
        await app.turn(121)
        assert await app.engine.mutation("m:stale") == 1


async def test_a_moment_is_no_number(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        with pytest.raises(FunctionMisuse, match="not a number"):
            await app.engine.query("m:misuse")


async def test_the_time_of_a_query_is_warned_of_in_development_unless_it_says_when_to_run_again(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        await app.engine.query("m:now")
        await app.engine.query("m:minute")
        await app.engine.query("m:names")
        assert [event.path for event in app.events if isinstance(event, ClockRead)] == ["m:now"]


VALUES = st.floats(min_value=-1e15, max_value=1e15)


@given(value=VALUES, ago_ms=st.floats(min_value=-1e9, max_value=1e12), name=st.sampled_from(["gt", "gte", "lt", "lte"]))
def test_a_moment_is_the_first_float_at_which_the_row_is_on_the_other_side(
    value: float, ago_ms: float, name: str
) -> None:
    def is_beyond(now: float) -> bool:
        bound = now - ago_ms
        return bound >= value if name in ("gt", "lte") else bound > value

    moment = MovingBound(name, ago_ms, 0).moment_for(value)
    assert is_beyond(moment)
    assert moment <= math.nextafter(math.nextafter(value + ago_ms, math.inf), math.inf) or not is_beyond(
        math.nextafter(moment, -math.inf)
    )
