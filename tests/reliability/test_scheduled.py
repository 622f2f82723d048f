"""Work that is scheduled is done exactly once, however often the process dies and whatever the clock says.

Each history schedules jobs on a simulated server (`simulation/`), which dies at one of the fault points again and
again while an operator sets the clock an hour back, an hour on, or ten years. At the end every job has ended, and what
each has done is held against how it ended. `REL_N` jobs from seed `REL_SEED` on.
"""

import asyncio
import os
import shutil
import sqlite3
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine import faults
from engine.errors import EngineClosed, EngineError, Overloaded
from engine.events import Committed, Event, MutationRan
from engine.functions.scheduler import JobScheduler
from engine.testing import ManualClock
from tests.functions.apps import UNHURRIED, OpenApp, open_app
from tests.reliability.simulation.world import START_MS, World, live

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("REL_SEED", "1"))
JOB_COUNT = int(os.environ.get("REL_N", "1400"))
HISTORY_LENGTH = 60  # jobs
BACKLOG_COUNT = 100_000
HOUR_MS, YEAR_MS = 3_600_000, 365 * 86_400_000
CRON_MS = 10 * 60_000

POINTS: tuple[faults.Point, ...] = (
    "commit.begun",
    "commit.before_sync",
    "commit.after_sync",
    "commit.published",
    "mutation.ran",
    "publish.begun",
    "job.due",
    "job.ran",
    "action.claimed",
    "action.ran",
    "action.recorded",
)
KINDS = ("write", "write_or_fail", "act", "act_or_fail")

SCHEMA = """
from engine import Table, index

class Planned(Table, name="planned"):
    number: int
    kind: str
    job: str

class Effect(Table, name="effects"):
    number: int
    half: int
    by_number = index("number")

class Tick(Table, name="ticks"):
    at: float
"""

FUNCTIONS = """
from engine import *
from schema import *

@mutation
async def plan(ctx: MutationCtx, number: int, kind: str, delay: float) -> str:
    job = await ctx.scheduler.run_after(delay, "jobs:" + kind, number=number)
    await ctx.db.insert(Planned(number=number, kind=kind, job=job))
    return job

@mutation
async def cancel(ctx: MutationCtx, job: str) -> None:
    await ctx.scheduler.cancel(job)

@mutation(internal=True)
async def write(ctx: MutationCtx, number: int) -> None:
    await ctx.db.insert(Effect(number=number, half=1))
    await ctx.db.insert(Effect(number=number, half=2))

@mutation(internal=True, retries=2)
async def write_or_fail(ctx: MutationCtx, number: int) -> None:
    await write_both(ctx, number)
    if ctx.random.random() < 0.5:
        raise ValueError("this time it fails")

async def write_both(ctx, number):
    await ctx.db.insert(Effect(number=number, half=1))
    await ctx.db.insert(Effect(number=number, half=2))

@action(internal=True)
async def act(ctx: ActionCtx, number: int) -> None:
    await ctx.run_mutation(write, number=number)

@action(internal=True, retries=2)
async def act_or_fail(ctx: ActionCtx, number: int) -> None:
    await ctx.run_mutation(write, number=number)
    if ctx.random.random() < 0.5:
        raise ValueError("this time it fails")

@cron(minutes=10)
@mutation(internal=True)
async def tick(ctx: MutationCtx) -> None:
    await ctx.db.insert(Tick(at=ctx.now))

@query
async def open_jobs(ctx: QueryCtx) -> int:
    return sum([await ctx.db.query(ScheduledJob.by_state_due, state=state).count() for state in ("pending", "running")])
"""


class Done(NamedTuple):
    """What a history left."""

    wrong: list[str]
    happened: Counter[str]
    job_count: int
    states: Counter[str]


def write_app(directory: Path) -> Path:
    (directory / "functions").mkdir(parents=True)
    (directory / "schema.py").write_text(SCHEMA)
    (directory / "functions" / "jobs.py").write_text(FUNCTIONS)
    return directory


async def schedule(world: World, point: faults.Point | None, job_count: int) -> list[int]:
    """Schedule jobs while the process dies at the point; wait until all have ended. The commit timestamps, in order."""
    timestamps: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, Committed):
            timestamps.append(event.ts)

    world.on_event = note
    world.plan.armed = {each: each == point for each in faults.POINTS}
    world.plan.is_quiet = False
    random = world.random
    jobs: list[str] = []
    for number in range(job_count):
        await world.is_up.wait()
        try:  # whether it was scheduled when the process dies meanwhile, the database knows
            kind, delay = random.choice(KINDS), random.choice((0, 0, 10, 60_000, 2 * HOUR_MS)) * random.random()
            jobs.append(await world.engine.mutation("jobs:plan", number=number, kind=kind, delay=delay))
            if jobs and random.random() < 0.1:
                await world.engine.mutation("jobs:cancel", job=random.choice(jobs))
        except EngineError as error:
            if not isinstance(error, EngineClosed | Overloaded):
                raise
        if random.random() < 0.1:
            jump = random.choice((-HOUR_MS, HOUR_MS))
            world.tell(f"clock set by {jump} ms")
            world.set_wall(world.wall_ns / 1e6 + jump)
        await asyncio.sleep(random.choice((0, 0.001, 0.01, 600)))
    world.set_wall(world.wall_ns / 1e6 + 10 * YEAR_MS)
    await asyncio.sleep(120)
    world.set_wall(world.wall_ns / 1e6 - 10 * YEAR_MS)
    for _ in range(2_000):
        world.plan.is_quiet = True
        await asyncio.sleep(60)
        await world.is_up.wait()
        if not await world.engine.query("jobs:open_jobs"):
            break
    await asyncio.sleep(5 * CRON_MS / 1000)  # crons go on by the time that is right again
    return timestamps


def judge(database: Path, timestamps: list[int], wall_ms: float) -> tuple[list[str], Counter[str]]:
    """What is wrong, in words; and how the jobs ended."""
    wrong: list[str] = []
    with closing(sqlite3.connect(database)) as connection:

        def rows(sql: str) -> list[Any]:
            return connection.execute(sql).fetchall()

        planned = rows("SELECT number, kind, job FROM planned")
        jobs = {id: ended for id, *ended in rows("SELECT id, state, attempts FROM _scheduled_jobs")}
        halves: dict[int, Counter[int]] = defaultdict(Counter)
        for number, half in rows("SELECT number, half FROM effects"):
            halves[number][half] += 1
        ticks = [at for (at,) in rows("SELECT at FROM ticks ORDER BY _creation")]
        ((next_at,),) = rows("SELECT next_at FROM _cron_jobs")
    if len(jobs) != len(planned):
        wrong.append(f"{len(planned)} jobs were scheduled, {len(jobs)} are there")
    for number, kind, job in planned:
        state, attempts = jobs[job]
        first, second = halves[number][1], halves[number][2]
        if state not in ("succeeded", "failed", "cancelled"):
            wrong.append(f"{kind} {number} is {state}")
        if first != second:
            wrong.append(f"{kind} {number} was torn: {first} and {second}")
        if kind.startswith("write"):
            expected = range(1, 2) if state == "succeeded" else range(1)
        else:  # each attempt writes once, or was cut off before
            expected = range(int(state == "succeeded"), attempts + 1)
        if first not in expected:
            wrong.append(f"{kind} {number} {state} after {attempts} attempts, and took effect {first} times")
    if unplanned := set(halves) - {number for number, *_ in planned}:
        wrong.append(f"done, never scheduled: {unplanned}")
    wrong += [f"commit timestamps: {before}, then {after}" for before, after in pairwise(timestamps) if before >= after]
    wrong += [f"ticks: {before}, then {after}" for before, after in pairwise(ticks) if before >= after]
    if not wall_ms < next_at <= wall_ms + CRON_MS + HOUR_MS:
        wrong.append(f"the cron comes next in {(next_at - wall_ms) / 60_000} minutes")
    return wrong, Counter(state for state, _ in jobs.values())


def simulate(
    seed: int, point: faults.Point | None, job_count: int, breaking: Callable[[pytest.MonkeyPatch], None] | None = None
) -> tuple[Done, list[str]]:
    """One history, and its trace."""
    directory = Path(tempfile.mkdtemp(prefix="engine-simulation-"))
    worlds: list[World] = []
    try:
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr("engine.functions.scheduler._KEPT_MS", 100 * YEAR_MS)  # they are looked at in the end
            if breaking is not None:
                breaking(patches)

            async def lived(world: World) -> list[int]:
                worlds.append(world)
                return await schedule(world, point, job_count)

            app, data = write_app(directory / "app"), directory / "data"
            timestamps = live(app, data, seed, lived, crash_chance=0.1, error_chance=0)
        (world,) = worlds
        wrong, states = judge(world.database, timestamps, world.wall_ns / 1e6)
        wrong += world.errors
        return Done(wrong, world.happened, sum(states.values()), states), world.trace
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("point", POINTS)
def test_each_job_takes_effect_once_though_the_process_dies_at(point: faults.Point) -> None:
    happened: Counter[str] = Counter()
    count = 0
    for seed in range(SEED, SEED + max(1, JOB_COUNT // len(POINTS) // HISTORY_LENGTH)):
        done, _ = simulate(seed, point, HISTORY_LENGTH)
        assert not done.wrong, "\n".join([f"REL_SEED={seed} -k {point}", *done.wrong[:5]])
        happened += done.happened
        count += done.job_count
    print(f"{point}: {count} jobs, {dict(happened)}")
    assert happened[f"crash: {point}"], "it died there"


def test_jobs_of_all_kinds_and_ends_are_in_the_histories_and_the_same_seed_gives_the_same_events() -> None:
    done, trace = simulate(SEED, None, 2 * HISTORY_LENGTH)
    assert not done.wrong, done.wrong[:5]
    assert set(done.states) == {"succeeded", "failed", "cancelled"}
    assert simulate(SEED, None, 2 * HISTORY_LENGTH)[1] == trace


# -- these show something only if they fail where a promise was broken


def run_twice(patches: pytest.MonkeyPatch) -> None:
    """How a mutation job ended is recorded in a commit of its own, after its effects: 1 in 10 times it dies between."""
    honest, count = JobScheduler._end, iter(range(1 << 30))

    def end(scheduler: Any, transaction: Any, *args: Any) -> Any:
        return "succeeded" if next(count) % 10 == 0 else honest(scheduler, transaction, *args)

    patches.setattr(JobScheduler, "_end", end)


def forget_claims(patches: pytest.MonkeyPatch) -> None:
    """An action that ran when the process died starts again, as if nobody had written down that it began."""

    def recover(scheduler: Any, transaction: Any, _: float) -> None:
        from engine.functions.jobs import ScheduledJob

        for job in transaction.find(ScheduledJob, "by_state_due", "running"):
            transaction.patch(job.id, {"state": "pending", "attempts": 0})

    patches.setattr(JobScheduler, "_recover", recover)


@pytest.mark.parametrize("breaking", [run_twice, forget_claims])
def test_a_scheduler_that_does_work_twice_is_found_out(breaking: Callable[[pytest.MonkeyPatch], None]) -> None:
    for seed in range(1, 10):
        done, _ = simulate(seed, "action.ran", HISTORY_LENGTH, breaking)
        if any("took effect" in each for each in done.wrong):
            return
    raise AssertionError("not found")


# -- a clock that is set, and a backlog


BASE = """
@mutation
async def add(ctx, key: str = "k") -> None:
    await ctx.db.insert(Item(key=key, score=ctx.now))

@query
async def keys(ctx) -> list[str]: return [item.key async for item in ctx.db.query(Item)]

@mutation
async def later(ctx, delay: float) -> None: await ctx.scheduler.run_after(delay, add)

@mutation
async def later_many(ctx, delay: float, count: int) -> None:
    for _ in range(count): await ctx.scheduler.run_after(delay, add)

@action
async def later_from_action(ctx, delay: float) -> None: await ctx.scheduler.run_after(delay, add)
"""

TICKING = """
@cron({when})
@mutation(internal=True)
async def tick(ctx) -> None:
    await ctx.db.insert(Item(key="tick", score=ctx.now))
"""


@pytest.mark.parametrize("scheduling", ["m:later", "m:later_from_action"])
async def test_a_delay_is_a_delay_though_the_clock_was_wrong_before(tmp_path: Path, scheduling: str) -> None:
    async with open_app(tmp_path, BASE) as app:
        app.clock.set_wall(START_MS + 10 * YEAR_MS)
        await app.call("m:add", key="in ten years")
        app.clock.set_wall(START_MS)
        await app.call(scheduling, delay=60_000)
        await app.turn(59)
        assert await app.call("m:keys") == ["in ten years"]
        await app.turn(2)
        assert await app.call("m:keys") == ["in ten years", "k"]


async def test_a_clock_that_is_set_on_is_noticed_within_ten_minutes(tmp_path: Path) -> None:
    """Also when the machine has slept: its monotonic clock stood meanwhile."""
    async with open_app(tmp_path, BASE) as app:
        await app.call("m:later", delay=HOUR_MS)
        await app.idle()
        app.clock.set_wall(START_MS + 2 * HOUR_MS)
        await app.turn(600)
        assert await app.call("m:keys") == ["k"]


@pytest.mark.parametrize(
    ("jump_ms", "tick_count"),  # and how often it ticks in the 22 minutes after that
    [
        (HOUR_MS, 1 + 1),  # the last of the times that were missed, and the next one
        (10 * YEAR_MS, 1 + 1),
        (-HOUR_MS, 0),  # those times have come already: the cron goes on where it was
        (-2 * HOUR_MS, 0),
        (-5 * HOUR_MS, 1),  # the clock was wrong before: the cron goes by the new time
        (-10 * YEAR_MS, 1),
    ],
)
async def test_a_cron_goes_on_when_the_clock_is_set(tmp_path: Path, jump_ms: int, tick_count: int) -> None:
    async with open_app(tmp_path, BASE + TICKING.format(when="minutes=20")) as app:
        await app.turn(5 * 60 + 20 * 60)
        assert await app.call("m:keys") == ["tick"]
        app.clock.set_wall(app.clock.wall_ns() // 1_000_000 + jump_ms)
        await app.turn(2 * 60 + 20 * 60)
        assert len(await app.call("m:keys")) == 1 + tick_count


async def test_summer_time_is_nothing_to_a_cron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        before = 1_792_800_000_000  # 2026-10-24 00:00 UTC; the clocks go back on the 25th at 01:00 UTC
        async with open_app(
            tmp_path, BASE + TICKING.format(when="'30 1 * * *'"), clock=ManualClock(start_ms=before)
        ) as app:
            await app.turn(3 * 86_400)
            assert len(await app.call("m:keys")) == 3
    finally:
        monkeypatch.undo()
        time.tzset()


def waiting_count(app: OpenApp) -> int:
    ((count,),) = app.engine.database.writer.fetch_all("SELECT count(*) FROM _scheduled_jobs WHERE state = 'pending'")
    return int(count)


async def test_with_a_backlog_of_100_000_jobs_the_server_is_up_at_once_and_clients_wait_behind_few(
    tmp_path: Path,
) -> None:
    clock = ManualClock()
    async with open_app(tmp_path, BASE, clock=clock) as app:
        app.engine.database.writer.execute("PRAGMA synchronous = OFF")
        for _ in range(BACKLOG_COUNT // 1_000):
            await app.call("m:later_many", delay=HOUR_MS, count=1_000)
    clock.advance(2 * 3_600)
    began = time.monotonic()
    async with open_app(tmp_path, clock=clock, limits=UNHURRIED) as app:
        assert time.monotonic() - began < 5
        app.engine.database.writer.execute("PRAGMA synchronous = OFF")
        assert waiting_count(app) > BACKLOG_COUNT - 1_000
        behind: list[int] = []
        for number in range(50):
            app.forget_events()
            await app.call("m:add", key=f"canary {number}")
            behind.append(sum(isinstance(event, MutationRan) for event in app.events) - 1)
        assert max(behind) <= 2 * UNHURRIED.scheduler_mutation_count, behind
        assert waiting_count(app) < BACKLOG_COUNT - 50, "the backlog is worked off meanwhile"
        while JOB_COUNT >= BACKLOG_COUNT and waiting_count(app):  # noqa: ASYNC110 - it is the database that knows
            await asyncio.sleep(0.1)
    print(f"ready within 5 s; a client waited behind {max(behind)} jobs at most")
