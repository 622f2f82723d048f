"""Jobs and crons: each takes effect once, whatever stops in between, and a backlog starves nobody."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.errors import Overloaded
from engine.events import Committed, FunctionFaulted
from engine.functions.scheduler import JobScheduler
from engine.testing import ManualClock
from engine.transaction.committer import Committer, Submission
from tests.functions.apps import SCHEMA, UNHURRIED, OpenApp, open_app

BASE = """
from engine.functions.jobs import CronJob, ScheduledJob

@mutation
async def add(ctx, key: str = "k", rank: int = 0) -> None:
    await ctx.db.insert(Item(key=key, rank=rank, score=ctx.now))

@query
async def keys(ctx) -> list[str]: return [item.key async for item in ctx.db.query(Item)]

@query
async def times(ctx) -> list[float]: return [item.score async for item in ctx.db.query(Item)]

@query
async def jobs(ctx) -> list[ScheduledJob]: return await ctx.db.query(ScheduledJob).collect()

@query
async def crons(ctx) -> list[CronJob]: return await ctx.db.query(CronJob).collect()

@mutation
async def later(ctx, path: str, delay: float = 0, count: int = 1) -> None:
    for _ in range(count):
        await ctx.scheduler.run_after(delay, path)
"""
START_MS = 1_790_812_800_000  # of the clock: midnight, UTC
MINUTE = 60_000


async def later(app: OpenApp, path: str, **arguments: Any) -> None:
    """Schedule jobs, and let the little time pass that `ctx.now` may be ahead of the clock."""
    function = app.engine.registry.by_path["m:later"]
    raw = function.signature.to_wire_bytes(function.signature.from_python({"path": path, **arguments}))
    outcome = await app.engine.backend.http_mutation("m:later", raw, None)
    assert outcome.failure is None
    app.clock.advance(0.01)


async def states(app: OpenApp) -> list[str]:
    return [job.state for job in await app.call("m:jobs")]


# -- jobs


async def test_jobs_outlive_the_server(tmp_path: Path) -> None:
    clock = ManualClock()
    async with open_app(tmp_path, BASE, clock=clock) as app:
        await later(app, "m:add", delay=5_000)
        await later(app, "m:add", delay=60_000)
    clock.advance(30)  # the first comes due while nobody is there
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(0)
        assert await app.call("m:keys") == ["k"]
        await app.turn(60)
        assert await app.call("m:keys") == ["k", "k"]
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(3_600)
        assert await app.call("m:keys") == ["k", "k"]


async def test_a_job_and_its_effects_are_one_commit(tmp_path: Path) -> None:
    async with open_app(tmp_path, BASE) as app:
        await later(app, "m:add", delay=1_000)
        await app.idle()
        app.forget_events()
        await app.turn(2)
        (commit,) = [event for event in app.events if isinstance(event, Committed)]
        assert (commit.mutation_count, commit.write_count) == (1, 2)
        assert app.jobs_finished == [("m:add", "succeeded")]


FAILING = {
    "raises": "raise ValueError('oh')",
    "exits": "raise SystemExit",
    "waits": "await asyncio.sleep(1)",
    "app error": "raise AppError({'code': 'FULL'})",
    "app error of megabytes": "raise AppError('x' * 2_000_000)",
    "error of megabytes": "raise ValueError('x' * 2_000_000)",
    "past the limit of writes": "for _ in range(60): await ctx.db.insert(Item(key='lost'))",
    "past the limit of reads": "await ctx.db.query(Item).collect()\nfor _ in range(50): await ctx.run_query(keys)",
    "nested and stopped": "await ctx.run_mutation('m:inner')",
}


@pytest.mark.parametrize("name", FAILING)
async def test_a_job_that_fails_has_no_effects_and_is_recorded_with_its_error(tmp_path: Path, name: str) -> None:
    body = "\n    ".join(FAILING[name].split("\n"))
    functions = (
        BASE
        + f"""
@mutation(internal=True)
async def inner(ctx) -> None:
    await ctx.db.insert(Item(key="lost"))
    await asyncio.sleep(1)

@mutation(internal=True)
async def bad(ctx) -> None:
    await ctx.db.insert(Item(key="lost"))
    {body}
"""
    )
    limits = msgspec.structs.replace(UNHURRIED, write_document_count_max=50, read_document_count_max=40)
    async with open_app(tmp_path, functions, limits=limits) as app:
        await later(app, "m:bad")
        await later(app, "m:add", delay=1)
        await app.turn(1)
        assert not app.engine.failed.done()
        failed, succeeded = await app.call("m:jobs")
        assert (failed.state, succeeded.state) == ("failed", "succeeded")
        assert failed.error is not None
        assert len(failed.error) < 5_000
        assert await app.call("m:keys") == ["k"]
        assert app.jobs_finished == [("m:bad", "failed"), ("m:add", "succeeded")]


async def test_a_job_that_spends_all_its_reads_and_writes_is_recorded_too(tmp_path: Path) -> None:
    functions = (
        BASE
        + """
@mutation
async def spend(ctx) -> None:
    for _ in range(50): await ctx.db.insert(Item(key="k"))
    await ctx.db.query(Item).take(40)
"""
    )
    limits = msgspec.structs.replace(UNHURRIED, write_document_count_max=50, read_document_count_max=40)
    async with open_app(tmp_path, functions, limits=limits) as app:
        await later(app, "m:spend")
        await app.turn(1)
        assert not app.engine.failed.done()
        assert await states(app) == ["succeeded"]


async def test_a_job_whose_function_is_gone_has_failed(tmp_path: Path) -> None:
    async with open_app(tmp_path, BASE + "\n@mutation\nasync def gone(ctx): ...\n") as app:
        await later(app, "m:gone", delay=1_000)
        await app.rewrite(BASE)
        await app.turn(2)
        (job,) = await app.call("m:jobs")
        assert job.state == "failed"
        assert "m:gone" in job.error


async def test_a_job_runs_the_code_of_the_day_it_is_due(tmp_path: Path) -> None:
    async with open_app(tmp_path, BASE) as app:
        await later(app, "m:add", delay=1_000)
        await app.rewrite(BASE.replace("Item(key=key,", "Item(key='new ' + key,"))
        await app.turn(2)
        assert await app.call("m:keys") == ["new k"]


ACTIONS = (
    BASE
    + """
runs, go_on = [], asyncio.Event()

@action(internal=True)
async def act(ctx) -> None:
    runs.append("began")
    await go_on.wait()
    await ctx.run_mutation(add)
    runs.append("ended")

@action(internal=True)
async def bad(ctx) -> None:
    await ctx.run_mutation(add)
    raise ValueError("oh")
"""
)


def names_of(app: OpenApp) -> dict[str, Any]:
    """The globals of the app's module."""
    names: dict[str, Any] = app.engine.registry.by_path["m:add"].callable.__globals__
    return names


async def until(app: OpenApp, *expected: str) -> None:
    """Until an action under way has come so far."""
    async with asyncio.timeout(20):
        while names_of(app)["runs"] != list(expected):  # noqa: ASYNC110 - the app tells nobody
            await asyncio.sleep(0)


async def test_an_action_job_is_marked_before_it_starts_and_after_it_ends(tmp_path: Path) -> None:
    async with open_app(tmp_path, ACTIONS) as app:
        await later(app, "m:act")
        await until(app, "began")
        assert await states(app) == ["running"]
        names_of(app)["go_on"].set()
        await app.idle()
        (job,) = await app.call("m:jobs")
        assert (job.state, job.started_at <= job.finished_at) == ("succeeded", True)


async def test_an_action_job_that_fails_keeps_what_its_mutations_did(tmp_path: Path) -> None:
    async with open_app(tmp_path, ACTIONS) as app:
        await later(app, "m:bad")
        await app.turn(1)
        assert (await app.call("m:keys"), await states(app)) == (["k"], ["failed"])
        assert [event.path for event in app.events if isinstance(event, FunctionFaulted)] == ["m:bad"]


async def test_an_action_job_that_ran_when_the_server_stopped_is_never_run_twice(tmp_path: Path) -> None:
    clock = ManualClock()
    async with open_app(tmp_path, ACTIONS, clock=clock) as app:
        await later(app, "m:act")
        await until(app, "began")
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(3_600)
        (job,) = await app.call("m:jobs")
        assert (job.state, job.error) == ("failed", "the server stopped while it ran")
        assert names_of(app)["runs"] == []


async def test_how_an_action_ended_is_recorded_even_if_there_is_no_room_for_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_app(tmp_path, ACTIONS) as app:
        await later(app, "m:act")
        await until(app, "began")
        submit, refused = Committer.submit, []

        def full_twice(self: Committer, submission: Submission) -> None:
            if names_of(app)["runs"][-1] == "ended" and len(refused) < 2:
                refused.append(submission)
                raise Overloaded("full")
            submit(self, submission)

        monkeypatch.setattr(Committer, "submit", full_twice)
        names_of(app)["go_on"].set()
        await until(app, "began", "ended")
        for _ in range(3):
            await asyncio.sleep(0)
            app.clock.advance(1)
        await app.idle()
        assert (await states(app), len(refused)) == (["succeeded"], 2)


# -- tried again


FAILS = (
    ACTIONS
    + """
tries = []

async def attempt(ctx, failures: int) -> None:
    tries.append(ctx.now)
    if len(tries) <= failures:
        raise ValueError(f"failure {len(tries)}")

@mutation(internal=True, retries=3)
async def write(ctx, failures: int = 2) -> None:
    await ctx.db.insert(Item(key="written"))
    await attempt(ctx, failures)

@action(internal=True, retries=3)
async def fetch(ctx, failures: int = 2) -> None:
    await attempt(ctx, failures)
    await ctx.run_mutation(add, key="written")

@mutation(internal=True, retries=3)
async def give_up(ctx) -> None: await ctx.scheduler.run_after(0, "m:write", failures=99)

@mutation(internal=True, retries=3)
async def refuse(ctx) -> None:
    tries.append(ctx.now)
    raise AppError("no")
"""
)


def tries_of(app: OpenApp) -> list[int]:
    """When it was tried, in seconds since the start."""
    return [round((now - START_MS) / 1000) for now in names_of(app)["tries"]]


@pytest.mark.parametrize("path", ["m:write", "m:fetch"])
async def test_a_job_with_retries_is_tried_again_after_longer_and_longer(tmp_path: Path, path: str) -> None:
    async with open_app(tmp_path, FAILS) as app:
        await later(app, path)
        await app.turn(0)
        (job,) = await app.call("m:jobs")
        assert (job.state, job.attempts, "failure 1" in job.error) == ("pending", 1, True)
        assert (await app.call("m:keys"), app.jobs_finished) == ([], [])
        await app.turn(60)
        (job,) = await app.call("m:jobs")
        assert (job.state, job.attempts, job.error) == ("succeeded", 3, None)
        assert tries_of(app) == [0, 1, 3]
        assert (await app.call("m:keys"), app.jobs_finished) == (["written"], [(path, "succeeded")])


async def test_a_job_that_fails_to_the_last_has_failed(tmp_path: Path) -> None:
    async with open_app(tmp_path, FAILS) as app:
        await later(app, "m:give_up")
        await app.turn(3_600)
        job = (await app.call("m:jobs"))[-1]
        assert (job.state, job.attempts, "failure 4" in job.error) == ("failed", 4, True)
        assert tries_of(app) == [0, 1, 3, 7]
        assert (await app.call("m:keys"), app.jobs_finished[-1]) == ([], ("m:write", "failed"))


async def test_what_the_app_refuses_is_not_tried_again(tmp_path: Path) -> None:
    async with open_app(tmp_path, FAILS) as app:
        await later(app, "m:refuse")
        await app.turn(60)
        (job,) = await app.call("m:jobs")
        assert (job.state, job.attempts, tries_of(app)) == ("failed", 1, [0])


async def test_the_retries_of_a_job_are_at_most_an_hour_apart(tmp_path: Path) -> None:
    async with open_app(tmp_path, FAILS.replace("retries=3", "retries=20")) as app:
        await later(app, "m:give_up")
        await app.turn(20 * 3_600)
        tries = tries_of(app)
        assert len(tries) == 21
        assert [after - before for before, after in pairwise(tries)][10:] == [1_024, 2_048, *[3_600] * 8]


async def test_a_job_may_be_cancelled_between_two_attempts(tmp_path: Path) -> None:
    async with open_app(
        tmp_path, FAILS + "\n@mutation\nasync def cancel(ctx, id: str): await ctx.scheduler.cancel(id)\n"
    ) as app:
        await later(app, "m:write")
        await app.turn(1.5)
        (job,) = await app.call("m:jobs")
        await app.call("m:cancel", id=job.id)
        await app.turn(60)
        (job,) = await app.call("m:jobs")
        assert (job.state, job.attempts, tries_of(app)) == ("cancelled", 2, [0, 1])


async def test_retries_outlive_the_server_and_count_an_action_that_it_interrupted(tmp_path: Path) -> None:
    clock, functions = ManualClock(), ACTIONS.replace("@action(internal=True)", "@action(internal=True, retries=1)")
    for attempts, state in ((1, "running"), (2, "running")):
        async with open_app(tmp_path, functions, clock=clock) as app:
            if attempts == 1:
                await later(app, "m:act")
            else:
                assert [(job.state, job.error) for job in await app.call("m:jobs")] == [
                    ("pending", "the server stopped while it ran")
                ]
                app.clock.advance(1.01)
            await until(app, "began")
            (job,) = await app.call("m:jobs")
            assert (job.state, job.attempts) == (state, attempts)
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(3_600)
        (job,) = await app.call("m:jobs")
        assert (job.state, job.attempts, names_of(app)["runs"]) == ("failed", 2, [])


# -- cancelled while it runs


CANCELLING = (
    ACTIONS
    + """
@action(internal=True)
async def tidy(ctx) -> None:
    try:
        await ctx.run_mutation(add)
        runs.append("began")
        await go_on.wait()
        runs.append("went on")
    finally:
        runs.append("tidied up")

@action(internal=True)
async def stubborn(ctx) -> None:
    runs.append("began")
    try:
        await go_on.wait()
    except asyncio.CancelledError:
        runs.append("ended all the same")

@mutation
async def cancel(ctx, id: str, fail: bool = False) -> None:
    await ctx.scheduler.cancel(id)
    if fail:
        raise ValueError("after all not")

@action(internal=True)
async def cancel_itself(ctx) -> None:
    (job,) = await ctx.run_query(jobs)
    await ctx.scheduler.cancel(job.id)
    await go_on.wait()
"""
)


async def begin(app: OpenApp, path: str) -> str:
    """The id of a job that runs."""
    await later(app, path)
    await until(app, "began")
    (job,) = await app.call("m:jobs")
    assert (job.state, job.attempts) == ("running", 1)
    return str(job.id)


async def test_cancelling_a_job_stops_its_action(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, scheduler_batch_count=1)
    async with open_app(tmp_path, CANCELLING, limits=limits) as app:
        await app.call("m:cancel", id=await begin(app, "m:tidy"))
        await app.idle()
        (job,) = await app.call("m:jobs")
        assert (job.state, job.error, job.finished_at is not None) == ("cancelled", None, True)
        assert names_of(app)["runs"] == ["began", "tidied up"]
        assert await app.call("m:keys") == ["k"], "what it did before stays"
        await later(app, "m:add")  # its place is free again
        await app.turn(1)
        assert await states(app) == ["cancelled", "succeeded"]


async def test_a_cancellation_that_is_rolled_back_stops_nothing(tmp_path: Path) -> None:
    async with open_app(tmp_path, CANCELLING) as app:
        await app.failure("m:cancel", id=await begin(app, "m:tidy"), fail=True)
        names_of(app)["go_on"].set()
        await app.idle()
        assert await states(app) == ["succeeded"]
        assert names_of(app)["runs"] == ["began", "went on", "tidied up"]


async def test_an_action_that_ends_well_although_it_was_cancelled_stays_cancelled(tmp_path: Path) -> None:
    async with open_app(tmp_path, CANCELLING) as app:
        await app.call("m:cancel", id=await begin(app, "m:stubborn"))
        await app.idle()
        assert await states(app) == ["cancelled"]
        assert names_of(app)["runs"] == ["began", "ended all the same"]


async def test_an_action_may_cancel_its_own_job(tmp_path: Path) -> None:
    async with open_app(tmp_path, CANCELLING) as app:
        await later(app, "m:cancel_itself")
        await app.idle()
        assert await states(app) == ["cancelled"]


async def test_a_job_that_was_cancelled_while_it_ran_stays_so_over_a_restart(tmp_path: Path) -> None:
    clock = ManualClock()
    async with open_app(
        tmp_path, CANCELLING.replace("@action(internal=True)", "@action(retries=5)"), clock=clock
    ) as app:
        await app.call("m:cancel", id=await begin(app, "m:tidy"))
        app.engine.abandon()
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(60)
        assert (await states(app), names_of(app)["runs"]) == (["cancelled"], [])


# -- room


async def test_jobs_wait_while_there_is_no_room_and_run_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_app(tmp_path, BASE) as app:
        await later(app, "m:add", delay=1_000)
        submit = Committer.submit

        def full(self: Committer, submission: Submission) -> None:
            raise Overloaded("full")

        monkeypatch.setattr(Committer, "submit", full)
        await app.turn(5)
        monkeypatch.setattr(Committer, "submit", submit)
        assert await app.call("m:keys") == []
        await app.turn(2)
        assert (await app.call("m:keys"), await states(app)) == (["k"], ["succeeded"])


@pytest.mark.slow
async def test_a_backlog_is_worked_off_a_bounded_number_at_a_time_and_lets_others_in(tmp_path: Path) -> None:
    functions = (
        BASE
        + """
most = now = 0
@action(internal=True)
async def act(ctx) -> None:
    global most, now
    now += 1
    most = max(most, now)
    await ctx.run_mutation(add)
    now -= 1
"""
    )
    clock = ManualClock()
    limits = msgspec.structs.replace(UNHURRIED, scheduler_batch_count=7)
    async with open_app(tmp_path, functions, clock=clock) as app:
        for path in ("m:act", "m:add"):
            await later(app, path, delay=10_000, count=100)
    clock.advance(20)
    async with open_app(tmp_path, limits=limits, clock=clock) as app:
        await app.call("m:add", key="mine")
        assert len(await app.call("m:keys")) < 100, "it did not wait for the backlog"
        await app.idle()
        assert len(await app.call("m:keys")) == 201
        assert set(await states(app)) == {"succeeded"}
        assert 1 < names_of(app)["most"] <= 7


async def test_a_client_waits_behind_few_jobs_of_a_backlog(tmp_path: Path) -> None:
    clock = ManualClock()
    async with open_app(tmp_path, BASE, clock=clock) as app:
        await later(app, "m:add", delay=10_000, count=60)
    clock.advance(20)
    limits = msgspec.structs.replace(UNHURRIED, scheduler_mutation_count=5)
    async with open_app(tmp_path, limits=limits, clock=clock) as app:  # the first jobs are in the queue by now
        await app.call("m:add", key="mine")
        await app.idle()
        keys = await app.call("m:keys")
        assert len(keys) == 61
        assert keys.index("mine") == 5


async def test_a_backlog_is_looked_through_once_for_each_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each job that ends: that took most of the time of all who waited."""
    clock, looks = ManualClock(), []
    async with open_app(tmp_path, BASE, clock=clock) as app:
        await later(app, "m:add", delay=10_000, count=60)
    clock.advance(20)
    look = JobScheduler._look
    monkeypatch.setattr(JobScheduler, "_look", lambda scheduler: (looks.append(None), look(scheduler)))
    async with open_app(tmp_path, clock=clock) as app:
        await app.idle()
        assert len(await app.call("m:keys")) == 60
        assert len(looks) <= 2 * sum(isinstance(event, Committed) for event in app.events) + 3


async def test_jobs_that_ended_are_kept_for_a_week(tmp_path: Path) -> None:
    functions = BASE + "\n@mutation\nasync def bad(ctx): raise ValueError\n"
    limits = msgspec.structs.replace(UNHURRIED, write_document_count_max=1, read_document_count_max=5)
    async with open_app(tmp_path, functions, limits=limits) as app:
        for path in ("m:add", "m:bad", "m:add", "m:add"):
            await later(app, path)
        await later(app, "m:add", delay=30 * 86_400_000)
        await app.turn(86_400 * 6.9)
        assert len(await states(app)) == 5
        await app.turn(86_400 * 0.2)
        assert await states(app) == ["pending"]
        assert not app.engine.failed.done()


async def test_more_old_jobs_than_one_sweep_deletes_go_soon_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.functions.scheduler._SWEEP_COUNT", 3)
    clock = ManualClock()
    async with open_app(tmp_path, BASE, clock=clock) as app:
        await later(app, "m:add", count=10)
        await app.turn(1)
    clock.advance(8 * 86_400)
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(600)
        assert len(await states(app)) == 7
        await app.turn(1)
        assert len(await states(app)) == 4
        await app.turn(2)
        assert await states(app) == []


async def test_a_clock_that_is_set_forward_runs_what_is_due_once(tmp_path: Path) -> None:
    async with open_app(tmp_path, BASE) as app:
        await later(app, "m:add", delay=3_600_000)
        app.clock.set_wall(START_MS + 2 * 3_600_000)
        await app.turn(600)  # the wall clock is looked at every ten minutes at least
        assert await app.call("m:keys") == ["k"]
        app.clock.set_wall(START_MS)
        await app.turn(3 * 3_600)
        assert await app.call("m:keys") == ["k"]


# -- crons

TICK = """
@cron({when})
@mutation(internal=True)
async def tick(ctx) -> None:
    await ctx.db.insert(Item(key="tick", score=ctx.now))
"""


def ticking(when: str) -> str:
    return BASE + TICK.format(when=when)


async def ticks(app: OpenApp) -> list[float]:
    """When the cron ran, in ms since the start; `ctx.now` lies less than a ms after."""
    return [int(time) - START_MS for time in await app.call("m:times")]


@pytest.mark.parametrize(
    ("when", "seconds", "expected"),
    [
        ("minutes=1", 200, [MINUTE, 2 * MINUTE, 3 * MINUTE]),
        ("seconds=1.5", 5, [1_500, 3_000, 4_500]),
        ("hours=1, minutes=30", 4 * 3_600, [90 * MINUTE, 180 * MINUTE]),
        ("'*/20 * * * *'", 3_700, [20 * MINUTE, 40 * MINUTE, 60 * MINUTE]),
        ("'0 3 * * *'", 30 * 3_600, [180 * MINUTE, 27 * 60 * MINUTE]),
        ("'0 0 * * MON'", 8 * 86_400, [4 * 1_440 * MINUTE]),  # the clock starts on a Thursday
    ],
)
async def test_a_cron_runs_at_its_times(tmp_path: Path, when: str, seconds: float, expected: list[int]) -> None:
    async with open_app(tmp_path, ticking(when)) as app:
        await app.turn(seconds)
        assert await ticks(app) == expected


async def test_times_that_were_missed_are_made_up_for_once(tmp_path: Path) -> None:
    clock = ManualClock()
    async with open_app(tmp_path, ticking("minutes=1"), clock=clock):
        pass
    clock.advance(10 * 60 + 30)
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(0)
        assert await ticks(app) == [10 * MINUTE + 30_000]
        await app.turn(60)
        assert await ticks(app) == [10 * MINUTE + 30_000, 11 * MINUTE]


async def test_a_cron_that_fails_says_so_and_goes_on(tmp_path: Path) -> None:
    functions = ticking("minutes=1").replace("async def tick(ctx) -> None:", "async def tick(ctx) -> None:\n    1 / 0")
    async with open_app(tmp_path, functions) as app:
        await app.turn(150)
        (row,) = await app.call("m:crons")
        assert "ZeroDivisionError" in row.last_error
        assert app.jobs_finished == [("m:tick", "failed")] * 2
        await app.rewrite(ticking("minutes=1"))
        await app.turn(60)
        (row,) = await app.call("m:crons")
        assert (row.last_error, await ticks(app)) == (None, [3 * MINUTE])


async def test_a_job_that_waits_in_the_queue_while_the_code_is_loaded_anew_runs_the_new_code(tmp_path: Path) -> None:
    async with open_app(tmp_path, BASE) as app:
        await later(app, "m:add", delay=MINUTE)
        await app.idle()
        async with app.engine._committer.between_groups():
            loading = asyncio.create_task(app.rewrite(BASE.replace("key=key", "key='new'")))
            await asyncio.sleep(0)  # it waits for this block to end, and the job behind it
            app.clock.advance(61)
            for _ in range(10):
                await asyncio.sleep(0)
            assert app.engine._scheduler._queued_count == 1
        await loading
        await app.idle()
        assert (await states(app), await app.call("m:keys")) == (["succeeded"], ["new"])


async def test_a_cron_keeps_its_time_over_a_reload_that_does_not_change_it(tmp_path: Path) -> None:
    async with open_app(tmp_path, ticking("minutes=1")) as app:
        await app.turn(59)
        await app.rewrite(ticking("minutes=1") + "\n# edited\n")
        await app.turn(2)
        assert await ticks(app) == [MINUTE]


async def test_a_cron_that_changes_goes_by_its_new_times(tmp_path: Path) -> None:
    async with open_app(tmp_path, ticking("hours=1")) as app:
        await app.rewrite(ticking("minutes=1"))
        await app.turn(61)
        assert await ticks(app) == [MINUTE]
        await app.rewrite(ticking("'30 * * * *'"))
        await app.turn(40 * 60)
        assert await ticks(app) == [MINUTE, 30 * MINUTE]
        assert len(await app.call("m:crons")) == 1


async def test_a_cron_that_is_removed_runs_no_more_and_one_that_is_added_does(tmp_path: Path) -> None:
    async with open_app(tmp_path, ticking("minutes=1")) as app:
        await app.rewrite(BASE)
        assert await app.call("m:crons") == []
        await app.turn(300)
        assert await ticks(app) == []
        await app.rewrite(ticking("minutes=1"))
        await app.turn(60)
        assert await ticks(app) == [6 * MINUTE]


SLOW_CRON = ACTIONS.replace(
    "@action(internal=True)\nasync def act", "@cron(minutes=1)\n@action(internal=True)\nasync def act"
)


async def begin_slow_cron(app: OpenApp) -> None:
    await app.idle()
    app.clock.advance(60)
    await until(app, "began")


async def test_two_runs_of_one_cron_never_overlap(tmp_path: Path) -> None:
    async with open_app(tmp_path, SLOW_CRON) as app:
        await begin_slow_cron(app)
        for _ in range(5):
            app.clock.advance(60)
            await asyncio.sleep(0)
        assert names_of(app)["runs"] == ["began"]
        names_of(app)["go_on"].set()
        await app.idle()
        assert names_of(app)["runs"] == ["began", "ended"], "the times meanwhile are over"
        await app.turn(60)
        assert names_of(app)["runs"] == ["began", "ended"] * 2


async def test_a_cron_that_is_removed_and_added_while_it_runs_does_not_overlap_either(tmp_path: Path) -> None:
    async with open_app(tmp_path, SLOW_CRON) as app:
        await begin_slow_cron(app)
        old = names_of(app)
        await app.rewrite(BASE)
        assert [row.state for row in await app.call("m:crons")] == ["running"]
        await app.rewrite(SLOW_CRON)
        app.clock.advance(60)
        await asyncio.sleep(0)
        assert names_of(app)["runs"] == []
        old["go_on"].set()
        await app.idle()
        app.clock.advance(60)
        await until(app, "began")


async def test_a_cron_that_is_removed_while_it_runs_is_gone_when_it_ends(tmp_path: Path) -> None:
    async with open_app(tmp_path, SLOW_CRON) as app:
        await begin_slow_cron(app)
        old = names_of(app)
        await app.rewrite(BASE)
        old["go_on"].set()
        await app.idle()
        assert await app.call("m:crons") == []


async def test_a_cron_that_ran_when_the_server_stopped_waits_for_its_next_time(tmp_path: Path) -> None:
    clock = ManualClock()
    async with open_app(tmp_path, SLOW_CRON, clock=clock) as app:
        await begin_slow_cron(app)
    clock.advance(10)
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(0)
        assert names_of(app)["runs"] == [], "it may have done its work already"
        (row,) = await app.call("m:crons")
        assert (row.state, row.next_at, row.last_error) == (
            "waiting",
            START_MS + 2 * MINUTE,
            "the server stopped while it ran",
        )
        app.clock.advance(50)
        await until(app, "began")


async def test_each_time_of_a_cron_is_one_commit(tmp_path: Path) -> None:
    async with open_app(tmp_path, ticking("minutes=1"), schema=SCHEMA) as app:
        await app.idle()
        app.forget_events()
        await app.turn(60)
        (commit,) = [event for event in app.events if isinstance(event, Committed)]
        assert (commit.mutation_count, commit.write_count) == (1, 2)
