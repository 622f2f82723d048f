import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engine.errors import AppError, EngineClosed, FunctionNotFound, InternalError
from engine.events import JobFinished
from engine.testing import ManualClock, TestEngine, open_test_engine
from engine.testing.modules import find_app
from tests.functions.apps import write_app

FUNCTIONS = """
    heard = []  # what the process remembers
    may_end = asyncio.Event()

    @query
    async def keys(ctx: QueryCtx) -> list[str]:
        return [item.key for item in await ctx.db.query(Item).collect()]

    @query
    async def keys_unless_empty(ctx: QueryCtx) -> list[str]:
        if await ctx.db.query(Item).first() is None:
            raise AppError({"code": "EMPTY"})
        return [item.key for item in await ctx.db.query(Item).collect()]

    @query
    async def count_slowly(ctx: QueryCtx) -> int:
        for _ in range(500):
            count = await ctx.db.query(Item).count()
        return count

    @query
    async def role(ctx: QueryCtx) -> Any:
        identity = ctx.auth.identity()
        return None if identity is None else [identity.subject, identity.claims["role"], identity.claims["sub"]]

    @mutation
    async def add(ctx: MutationCtx, key: str) -> str:
        heard.append(key)
        return await ctx.db.insert(Item(key=key, note=str(ctx.random.random())))

    @mutation(internal=True)
    async def add_now(ctx: MutationCtx) -> None:
        await ctx.db.insert(Item(key=f"{ctx.now:.0f}"))

    @mutation
    async def add_later(ctx: MutationCtx, delay_ms: float) -> None:
        await ctx.scheduler.run_after(delay_ms, add_now)

    @mutation
    async def again_and_again(ctx: MutationCtx) -> None:
        await ctx.scheduler.run_after(0, again_and_again)

    @mutation
    async def see(ctx: MutationCtx, key: str) -> None:
        await ctx.db.insert(Item(key=key, score=ctx.now))

    @query
    async def seen_lately(ctx: QueryCtx) -> list[str]:
        items = ctx.db.query(Item.by_score, gte=ctx.ago(minutes=2))
        return [item.key async for item in items]

    @mutation
    async def join(ctx: MutationCtx, name: str) -> None:
        await ctx.session.on_disconnect(add, key=f"{name} left")

    @query
    async def memory(ctx: QueryCtx) -> list[str]:
        return heard

    @action
    async def add_when_told(ctx: ActionCtx, key: str) -> None:
        heard.append("begun")
        await may_end.wait()
        heard.append("goes on")
        await ctx.run_mutation(add, key=key)

    @mutation
    async def start_action(ctx: MutationCtx) -> None:
        await ctx.scheduler.run_after(0, add_when_told, key="told")
"""
EVERY_MINUTE = """
    @cron(minutes=1)
    @mutation(internal=True)
    async def tick(ctx: MutationCtx) -> None:
        await ctx.db.insert(Item(key="tick"))

    @query
    async def tick_count(ctx: QueryCtx) -> int:
        return await ctx.db.query(Item).count()
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return write_app(tmp_path / "app", {"m": FUNCTIONS})


@pytest.fixture
async def engine(app: Path, clock: ManualClock) -> AsyncIterator[TestEngine]:
    async with open_test_engine(app, clock=clock) as engine:
        yield engine


def functions_of(app: Path) -> Any:
    """The module that the engine runs."""
    module = sys.modules["functions.m"]
    assert module.__file__ == str(app / "functions" / "m.py")
    return module


# -- ManualClock


def test_no_time_passes_by_itself(clock: ManualClock) -> None:
    before = clock.wall_ns(), clock.monotonic()
    assert (clock.wall_ns(), clock.monotonic()) == before
    clock.advance(1.5)
    assert (clock.wall_ns(), clock.monotonic()) == (before[0] + 1_500_000_000, before[1] + 1.5)


def test_timers_fire_in_the_order_of_their_due_times_each_at_its_time(clock: ManualClock) -> None:
    fired: list[tuple[str, float]] = []
    for name, delay in (("c", 3), ("a", 1), ("b", 2), ("b again", 2), ("later", 4)):
        clock.call_later(delay, lambda name=name: fired.append((name, clock.monotonic())))  # type: ignore[misc]
    clock.advance(3)
    assert fired == [("a", 1), ("b", 2), ("b again", 2), ("c", 3)]


def test_time_passes_in_any_unit(clock: ManualClock) -> None:
    clock.advance(1, minutes=2, hours=3, days=4)
    assert clock.monotonic() == 1 + 120 + 3 * 3_600 + 4 * 86_400


def test_a_timer_made_by_a_timer_fires_in_the_same_turn_if_it_is_due(clock: ManualClock) -> None:
    fired: list[float] = []

    def tick() -> None:
        fired.append(clock.monotonic())
        clock.call_later(10, tick)

    clock.call_later(10, tick)
    clock.advance(35)
    assert fired == [10, 20, 30]


def test_waiting_again_for_next_to_nothing_lets_time_pass(clock: ManualClock) -> None:
    fired: list[float] = []

    def wait_again() -> None:
        fired.append(clock.monotonic())
        if clock.monotonic() < 1.000000002:
            clock.call_later(1e-10, wait_again)

    clock.call_later(1, wait_again)
    clock.advance(2)
    assert fired == [1.0, 1.000000001, 1.000000002]


def test_a_cancelled_timer_does_not_fire(clock: ManualClock) -> None:
    fired: list[int] = []
    clock.call_later(1, lambda: fired.append(1)).cancel()
    clock.call_later(2, lambda: fired.append(2))
    assert clock.seconds_to_next_timer == 2
    clock.advance(2)
    assert fired == [2]
    assert clock.seconds_to_next_timer is None


def test_the_wall_clock_can_be_set_back_without_a_timer_noticing(clock: ManualClock) -> None:
    fired: list[int] = []
    clock.call_later(1, lambda: fired.append(1))
    clock.advance(0.5)
    clock.set_wall(1_000)
    assert clock.wall_ns() == 1_000_000_000
    clock.advance(0.5)
    assert fired == [1]
    assert clock.wall_ns() == 1_500_000_000


def test_time_does_not_pass_backwards(clock: ManualClock) -> None:
    with pytest.raises(AssertionError, match="forward"):
        clock.advance(-1)


async def test_a_sleeper_wakes_when_its_time_has_come(clock: ManualClock) -> None:
    sleeper = asyncio.ensure_future(clock.sleep(5))
    await asyncio.sleep(0)
    clock.advance(4.999)
    await asyncio.sleep(0)
    assert not sleeper.done()
    clock.advance(0.001)
    await sleeper


async def test_a_sleeper_that_is_cancelled_leaves_no_timer(clock: ManualClock) -> None:
    sleeper = asyncio.ensure_future(clock.sleep(5))
    await asyncio.sleep(0)
    sleeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeper
    assert clock.seconds_to_next_timer is None


def test_the_same_seed_gives_the_same_entropy() -> None:
    assert ManualClock(seed=1).entropy(9) == ManualClock(seed=1).entropy(9) != ManualClock(seed=2).entropy(9)


# -- subscriptions


async def test_next_gives_each_result_that_differs_and_first_the_one_that_there_is(engine: TestEngine) -> None:
    keys = engine.subscribe("m:keys")
    assert await keys.next() == []
    for key in "ab":
        await engine.mutation("m:add", key=key)
        assert (await keys.next())[-1] == key


async def test_next_fails_when_nothing_is_under_way_that_could_bring_a_result(engine: TestEngine) -> None:
    await engine.mutation("m:add", key="a")
    keys = engine.subscribe("m:keys")
    await keys.next()
    with pytest.raises(AssertionError, match=r"m:keys\(\) has no new result, .* is still \['a'\]\."):
        await keys.next()
    await engine.mutation("m:add", key="b")
    assert await keys.next() == ["a", "b"]


async def test_next_waits_for_what_another_task_is_about_to_write(engine: TestEngine) -> None:
    keys = engine.subscribe("m:keys")
    await keys.next()
    result, _ = await asyncio.gather(keys.next(), engine.mutation("m:add", key="a"))
    assert result == ["a"]


async def test_next_waits_for_an_action_of_a_job_however_long_it_takes(app: Path, engine: TestEngine) -> None:
    keys = engine.subscribe("m:keys")
    await keys.next()
    await engine.mutation("m:start_action")
    result = asyncio.ensure_future(keys.next())
    while functions_of(app).heard != ["begun"]:  # noqa: ASYNC110 - the app's own list
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not result.done()
    functions_of(app).may_end.set()
    assert await result == ["told"]


async def test_an_action_that_somebody_waits_for_is_under_way(app: Path, engine: TestEngine) -> None:
    action = asyncio.ensure_future(engine.as_user("alice").action("m:add_when_told", key="told"))
    idle = asyncio.ensure_future(engine.wait_until_idle())
    for _ in range(100):
        await asyncio.sleep(0)
    assert engine.running.under_way == ["actions"]
    assert not idle.done()
    functions_of(app).may_end.set()
    await idle
    assert action.done()
    await action


async def test_next_and_settled_raise_what_the_query_raises_and_the_subscription_goes_on(engine: TestEngine) -> None:
    keys = engine.subscribe("m:keys_unless_empty")
    for ask in (keys.next, keys.settled, keys.settled):
        with pytest.raises(AppError, match="EMPTY"):
            await ask()
    with pytest.raises(AssertionError, match="still AppError"):
        await keys.next()
    await engine.mutation("m:add", key="a")
    assert await keys.next() == ["a"]


async def test_settled_gives_the_newest_result_new_or_not(engine: TestEngine) -> None:
    keys = engine.subscribe("m:keys")
    assert await keys.settled() == []
    writes = [asyncio.ensure_future(engine.mutation("m:add", key=key)) for key in "abc"]
    assert await keys.settled() == await keys.settled() == ["a", "b", "c"]
    await asyncio.gather(*writes)


async def test_long_queries_settle_as_well(app: Path) -> None:
    async with open_test_engine(app, config={"limits": {"run_slow_ms": 1}}) as engine:
        counts = engine.subscribe("m:count_slowly"), engine.subscribe("m:count_slowly")
        assert [await count.next() for count in counts] == [0, 0]
        await engine.mutation("m:add", key="a")
        assert [await count.settled() for count in counts] == [1, 1]


async def test_a_subscription_that_is_closed_says_so_and_costs_no_run(engine: TestEngine) -> None:
    async with engine.subscribe("m:keys") as keys:
        await keys.next()
    async with engine.count_runs() as runs:
        await engine.mutation("m:add", key="a")
    assert runs == {"m:add": 1}
    with pytest.raises(EngineClosed, match="not open"):
        await keys.next()


# -- time


async def test_a_cron_of_every_minute_runs_ten_times_in_ten_minutes(tmp_path: Path) -> None:
    async with open_test_engine(write_app(tmp_path / "app", EVERY_MINUTE)) as engine:
        count = engine.subscribe("m:tick_count")
        await engine.advance(minutes=10)
        assert await count.settled() == 10
        engine.clock.advance(600)  # all at once, as for a machine that slept: made up for once
        assert await count.settled() == 11


async def test_what_is_due_happens_at_exactly_its_time_while_time_passes(
    engine: TestEngine, clock: ManualClock
) -> None:
    start_ms = clock.wall_ns() / 1_000_000
    for delay_ms in (90_000, 30_000, 60_000, 91_000):
        await engine.mutation("m:add_later", delay_ms=delay_ms)
    await engine.advance(minutes=1.5)
    ran_at = [float(key) - start_ms for key in await engine.query("m:keys")]
    assert ran_at == pytest.approx([30_000, 60_000, 90_000], abs=2)
    assert clock.monotonic() == pytest.approx(90, abs=0.001)
    await engine.advance(1)
    assert len(await engine.query("m:keys")) == 4


async def test_ranges_of_time_follow_by_themselves(engine: TestEngine) -> None:
    lately = engine.subscribe("m:seen_lately")
    assert await lately.next() == []
    for key in "ab":
        await engine.mutation("m:see", key=key)
        assert (await lately.next())[-1] == key
        await engine.advance(30)
    async with engine.count_runs() as runs:
        await engine.advance(59)
        assert await lately.settled() == ["a", "b"]
        await engine.advance(1)
        assert await lately.next() == ["b"]
        await engine.advance(30)
        assert await lately.next() == []
        await engine.advance(hours=1)
    assert runs["m:seen_lately"] == 2


async def test_a_sleeper_of_the_test_runs_between_the_timers(engine: TestEngine, clock: ManualClock) -> None:
    async def write_now_and_then() -> None:
        for key in "abc":
            await clock.sleep(10)
            await engine.mutation("m:add", key=f"{key} at {clock.monotonic():.0f}")

    writer = asyncio.ensure_future(write_now_and_then())
    await engine.advance(30)
    assert await engine.query("m:keys") == ["a at 10", "b at 20", "c at 30"]
    await writer


async def test_what_never_settles_fails_with_what_it_is(engine: TestEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.testing.harness._IDLE_SECONDS_MAX", 0.1)
    await engine.mutation("m:again_and_again")
    with pytest.raises(AssertionError, match=r"after 0\.1 s there still are (mutations|jobs|timers)"):
        await engine.wait_until_idle()


# -- clients


async def test_a_user_has_the_claims_that_a_token_would_have(engine: TestEngine) -> None:
    assert await engine.as_user("alice", role="admin").query("m:role") == ["alice", "admin", "alice"]
    assert await engine.as_user().query("m:role") is None
    assert await engine.as_user("bob", role="user").subscribe("m:role").next() == ["bob", "user", "bob"]


async def test_clients_call_what_is_public_and_the_test_calls_everything(engine: TestEngine) -> None:
    alice = engine.as_user("alice")
    for call in (alice.mutation("m:add_now"), alice.query("m:add"), alice.action("m:unknown")):
        with pytest.raises(FunctionNotFound):
            await call
    await engine.mutation("m:add_now")
    assert len(await alice.query("m:keys")) == 1


async def test_a_client_is_gone_soon_after_its_tab_is_closed_and_later_after_its_network_is_lost(
    engine: TestEngine,
) -> None:
    alice, bob, carol = clients = [engine.as_user(name) for name in ("alice", "bob", "carol")]
    for client in clients:
        assert client.identity is not None
        await client.mutation("m:join", name=client.identity.subject)
    alice.close()
    bob.drop()
    carol.drop()
    await engine.advance(1.9)
    assert await engine.query("m:keys") == []
    await engine.advance(0.2)
    assert await engine.query("m:keys") == ["alice left"]
    carol.connect()
    await engine.advance(minutes=1)
    assert await engine.query("m:keys") == ["alice left", "bob left"]


async def test_after_a_crash_clients_come_back_with_their_next_call(engine: TestEngine) -> None:
    alice, bob = engine.as_user("alice"), engine.as_user("bob")
    await alice.mutation("m:join", name="alice")
    await bob.mutation("m:join", name="bob")
    engine.crash()
    await engine.reopen()
    await alice.query("m:keys")
    await engine.advance(minutes=1)
    assert await engine.query("m:keys") == ["bob left"]
    alice.close()
    await engine.advance(minutes=1)
    assert await engine.query("m:keys") == ["bob left", "alice left"]


async def test_subscriptions_end_with_the_connection(engine: TestEngine) -> None:
    alice = engine.as_user("alice")
    keys = alice.subscribe("m:keys")
    assert await keys.next() == []
    alice.drop()
    async with engine.count_runs() as runs:
        await engine.mutation("m:add", key="a")
    assert runs == {"m:add": 1}
    with pytest.raises(EngineClosed, match="not open"):
        await keys.next()
    assert await alice.subscribe("m:keys").next() == ["a"]


async def test_runs_are_counted_with_all_that_they_set_off(engine: TestEngine) -> None:
    for _ in range(2):
        await engine.subscribe("m:keys").next()
    async with engine.count_runs() as runs:
        await engine.mutation("m:add_later", delay_ms=0)
    assert runs == {"m:add_later": 1, "m:add_now": 1, "m:keys": 1}


async def test_ids_and_randomness_are_the_same_each_time_and_others_with_another_seed(app: Path) -> None:
    made: list[tuple[str, str]] = []
    for seed in (0, 0, 1):
        async with open_test_engine(app, clock=ManualClock(seed=seed)) as engine:
            item_id = await engine.as_user("alice").mutation("m:add", key="a")
            with closing(sqlite3.connect(engine.running.database.path)) as database:
                ((note,),) = database.execute("SELECT note FROM items").fetchall()
            made.append((item_id, note))
    assert made[0] == made[1]
    assert made[0][0] != made[2][0]


async def test_the_classes_of_the_app_are_those_that_tests_import(app: Path) -> None:
    tables = []
    for _ in range(2):
        async with open_test_engine(app):
            tables.append(sys.modules["schema"].Item)
    assert tables[0] is tables[1]


def test_the_app_of_a_test_is_the_nearest_directory_above_it(app: Path) -> None:
    (app / "tests" / "deep").mkdir(parents=True)
    (app / "tests" / "schema.py").touch()  # no app: it has no functions
    assert find_app(app / "tests" / "deep" / "test_x.py") == app
    assert find_app(app) == app
    assert find_app(app.parent) is None


# -- death


async def test_what_was_acknowledged_survives_a_crash_and_a_stop(engine: TestEngine) -> None:
    await engine.mutation("m:add", key="a")
    engine.crash()
    await engine.reopen()
    await engine.mutation("m:add", key="b")
    await engine.reopen()
    engine.crash()
    await engine.reopen()
    assert await engine.query("m:keys") == ["a", "b"]


async def test_who_waits_while_the_process_dies_is_not_answered_and_the_write_is_there_whole_or_not_at_all(
    engine: TestEngine,
) -> None:
    outcomes = set()
    for turn_count in range(20):
        write = asyncio.ensure_future(engine.mutation("m:add", key=str(turn_count)))
        for _ in range(turn_count):
            await asyncio.sleep(0)
        if turn_count == 19:
            await write
        engine.crash()
        try:
            await write
            is_answered = True
        except EngineClosed:
            is_answered = False
        await engine.reopen()
        is_there = str(turn_count) in await engine.query("m:keys")
        assert is_there or not is_answered
        outcomes.add((is_answered, is_there))
    assert {(False, False), (True, True)} <= outcomes


async def test_nothing_is_answered_between_a_crash_and_the_reopening(engine: TestEngine) -> None:
    alice, keys = engine.as_user("alice"), engine.subscribe("m:keys")
    await keys.next()
    engine.crash()
    for ask in (engine.query, engine.mutation, engine.action, alice.query, alice.mutation):
        with pytest.raises(EngineClosed, match=r"reopen\(\)"):
            await ask("m:keys")
    for again in (engine.wait_until_idle, engine.advance, keys.settled):
        with pytest.raises(EngineClosed, match=r"reopen\(\)"):
            await again()
    with pytest.raises(EngineClosed, match="died"):
        await keys.next()
    await engine.reopen()
    with pytest.raises(EngineClosed, match="died"):
        await keys.next()
    assert await alice.subscribe("m:keys").next() == []


async def test_a_process_that_died_remembers_nothing(engine: TestEngine) -> None:
    await engine.mutation("m:add", key="a")
    assert await engine.query("m:memory") == ["a"]
    await engine.reopen()
    assert await engine.query("m:memory") == []


async def test_jobs_wait_on_disk_and_an_action_that_had_begun_is_not_begun_again(app: Path, engine: TestEngine) -> None:
    finished: list[JobFinished] = []
    engine.events.listen(lambda event: finished.append(event) if isinstance(event, JobFinished) else None)
    await engine.mutation("m:add_later", delay_ms=60_000)
    await engine.mutation("m:start_action")
    idle = asyncio.ensure_future(engine.wait_until_idle())
    while functions_of(app).heard != ["begun"]:  # noqa: ASYNC110 - the app's own list
        await asyncio.sleep(0)
    engine.crash()
    dead = functions_of(app)
    dead.may_end.set()
    with pytest.raises(EngineClosed):
        await idle
    for _ in range(100):
        await asyncio.sleep(0)
    assert dead.heard == ["begun"]
    await engine.reopen()
    functions_of(app).may_end.set()
    await engine.advance(30)
    assert await engine.query("m:keys") == []
    await engine.advance(30)
    assert len(await engine.query("m:keys")) == 1
    assert finished == [JobFinished("m:add_now", "succeeded")]


async def test_a_request_of_a_session_that_comes_again_is_not_applied_twice(engine: TestEngine) -> None:
    first = await engine.running.session_mutation("session", 1, "m:add", key="a")
    assert await engine.running.session_mutation("session", 1, "m:add", key="a") == first
    engine.crash()
    await engine.reopen()
    assert await engine.running.session_mutation("session", 1, "m:add", key="a") == first
    assert await engine.running.session_mutation("session", 2, "m:add", key="a") != first
    assert await engine.query("m:keys") == ["a", "a"]


async def test_timers_of_a_dead_process_do_not_fire_and_those_of_the_test_do(
    engine: TestEngine, clock: ManualClock
) -> None:
    sleeper = asyncio.ensure_future(clock.sleep(60))
    await engine.mutation("m:add_later", delay_ms=60_000)
    engine.crash()
    clock.advance(120)
    await sleeper
    await engine.reopen()
    await engine.wait_until_idle()
    assert len(await engine.query("m:keys")) == 1


async def test_an_engine_that_failed_says_why_instead_of_never_becoming_idle(app: Path) -> None:
    async def meet_another_writer() -> None:
        async with open_test_engine(app) as engine:
            with closing(sqlite3.connect(engine.running.database.path)) as other:
                other.execute("CREATE TABLE foreign_table (x)")
            write = asyncio.ensure_future(engine.mutation("m:add", key="a"))
            for wait in (engine.wait_until_idle, engine.running.wait_until_idle):
                with pytest.raises(InternalError, match="another process wrote"):
                    await wait()
            with pytest.raises(InternalError, match="another process wrote"):
                await write

    with pytest.raises(InternalError, match="another process wrote"):  # and no test passes with it
        await meet_another_writer()
