"""`ctx.scheduler`: work that is to be done later, as part of the commit that asks for it."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.errors import FunctionFailed, FunctionMisuse, FunctionNotFound, InvalidArgument, InvalidDocument
from tests.functions.apps import UNHURRIED, OpenApp, open_app

FUNCTIONS = """
from datetime import timedelta
from engine.functions.jobs import ScheduledJob

@mutation
async def add(ctx, key: str = "k", rank: int = 0) -> Id[Item]:
    return await ctx.db.insert(Item(key=key, rank=rank, score=ctx.now))

@action(internal=True)
async def fetch(ctx, key: str) -> None:
    await ctx.run_mutation(add, key=f"fetched {key}")

@query
async def items(ctx) -> list[Item]: return await ctx.db.query(Item).collect()

@query
async def jobs(ctx) -> list[ScheduledJob]: return await ctx.db.query(ScheduledJob).collect()

@mutation
async def schedule(ctx, source: str, fail: bool = False) -> Any:
    result = await eval(source, globals(), {"s": ctx.scheduler, "now": ctx.now})
    if fail:
        raise ValueError
    return result

@action
async def schedule_from_action(ctx, source: str, fail: bool = False) -> Any:
    result = await eval(source, globals(), {"s": ctx.scheduler, "now": ctx.now})
    if fail:
        raise ValueError
    return result

@mutation
async def cancel(ctx, id: str) -> None: await ctx.scheduler.cancel(id)

@mutation
async def nested(ctx) -> None:
    for fail in (True, False):
        try:
            await ctx.run_mutation(schedule, source=f"s.run_after(0, add, key='{fail}')", fail=fail)
        except ValueError:
            pass
"""
FROM = ["m:schedule", "m:schedule_from_action"]


async def keys(app: OpenApp) -> list[str]:
    return [item.key for item in await app.call("m:items")]


@pytest.mark.parametrize("path", FROM)
@pytest.mark.parametrize(
    ("source", "seconds"),
    [
        ("s.run_after(0, add)", 0),
        ("s.run_after(1500, add)", 1.5),
        ("s.run_after(1500.5, 'm:add')", 1.5005),
        ("s.run_after(timedelta(minutes=2), add)", 120),
        ("s.run_at(now + 60_000, add)", 60),
        ("s.run_at(now - 60_000, add)", 0),
        ("s.run_at(0, add)", 0),
        ("s.run_after(2 * 86_400_000, add)", 2 * 86_400),
    ],
)
async def test_a_job_runs_when_it_is_due_and_not_before(tmp_path: Path, path: str, source: str, seconds: float) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        began = app.clock.wall_ns() / 1e6
        await app.call(path, source=source)
        if seconds:
            await app.turn(seconds - 0.001)
            assert await keys(app) == []
        await app.turn(0.003)  # `ctx.now` is a little past the hour by which timers go
        (item,) = await app.call("m:items")
        assert began + seconds * 1000 <= item.score <= began + seconds * 1000 + 3


@pytest.mark.parametrize("function", ["add", "'m:add'", "'m:fetch'", "fetch"])
async def test_a_job_is_given_its_arguments(tmp_path: Path, function: str) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        await app.call("m:schedule", source=f"s.run_after(0, {function}, key='mine')")
        await app.turn(0.01)
        assert await keys(app) == ["mine" if "add" in function else "fetched mine"]


async def test_jobs_are_part_of_the_commit_so_a_failed_mutation_has_scheduled_nothing(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        with pytest.raises(FunctionFailed):
            await app.call("m:schedule", source="s.run_after(0, add)", fail=True)
        assert await app.call("m:jobs") == []
        await app.turn(1)
        assert await keys(app) == []


async def test_jobs_of_a_nested_mutation_that_fails_go_with_it(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        await app.call("m:nested")
        await app.turn(1)
        assert await keys(app) == ["False"]


async def test_a_failed_action_has_scheduled_what_it_scheduled(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        with pytest.raises(FunctionFailed):
            await app.call("m:schedule_from_action", source="s.run_after(0, add)", fail=True)
        await app.turn(1)
        assert await keys(app) == ["k"]


@pytest.mark.parametrize("cancel", ["m:cancel", "m:schedule_from_action"])
async def test_a_cancelled_job_does_not_run(tmp_path: Path, cancel: str) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        job_id = await app.call("m:schedule", source="s.run_after(5_000, add)")
        app.clock.advance(1)
        arguments = {"id": job_id} if cancel == "m:cancel" else {"source": f"s.cancel({job_id!r})"}
        for _ in range(2):  # the second time there is nothing to do
            await app.call(cancel, **arguments)
        await app.turn(10)
        (job,) = await app.call("m:jobs")
        assert (await keys(app), job.state) == ([], "cancelled")
        assert job.finished_at < job.due_at, "it ended when it was cancelled"


async def test_cancelling_what_has_run_or_is_gone_does_nothing(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        job_id = await app.call("m:schedule", source="s.run_after(0, add)")
        await app.turn(1)
        await app.call("m:cancel", id=job_id)
        assert [job.state for job in await app.call("m:jobs")] == ["succeeded"]
        await app.call("m:cancel", id=job_id[:-1] + ("0" if job_id[-1] != "0" else "1"))


async def test_only_jobs_can_be_cancelled(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        item_id = await app.call("m:add")
        with pytest.raises(FunctionMisuse, match="is no id of a job"):
            await app.call("m:cancel", id=item_id)
        with pytest.raises(InvalidDocument, match="'x' is not an id of any table"):
            await app.call("m:cancel", id="x")


@pytest.mark.parametrize("path", FROM)
@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("s.run_after(-1, add)", FunctionMisuse, "a delay of -1; 0 ms or more"),
        ("s.run_after(timedelta(days=-1), add)", FunctionMisuse, "0 ms or more"),
        ("s.run_after(float('nan'), add)", FunctionMisuse, "a delay of nan"),
        ("s.run_after(float('inf'), add)", FunctionMisuse, "a delay of inf"),
        ("s.run_at(float('nan'), add)", InvalidDocument, "NaN"),
        ("s.run_after(0, items)", FunctionNotFound, "mutation or action function for 'items'"),
        ("s.run_after(0, 'm:nothing')", FunctionNotFound, "'m:nothing'"),
        ("s.run_after(0, len)", FunctionNotFound, "'len'"),
        ("s.run_after(0, add, kye='x')", InvalidArgument, "kye: unknown"),
        ("s.run_after(0, add, rank='x')", InvalidArgument, "rank: expected int"),
        ("s.run_after(0, fetch)", InvalidArgument, "key: missing"),
    ],
)
async def test_a_job_that_cannot_run_is_refused_at_once(
    tmp_path: Path, path: str, source: str, error: type[Exception], message: str
) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        with pytest.raises(error) as refusal:
            await app.call(path, source=source)
        assert message in str(refusal.value)
        assert await app.call("m:jobs") == []


async def test_arguments_larger_than_a_document_are_refused(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, document_size_bytes_max=2_000)
    async with open_app(tmp_path, FUNCTIONS, limits=limits) as app:
        with pytest.raises(Exception, match="document of _scheduled_jobs"):
            await app.call("m:schedule", source="s.run_after(0, add, key='x' * 2_000)")


async def test_functions_may_look_at_jobs_and_subscribers_see_them_change(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app, app.watched("m:jobs") as results:

        async def next_state() -> Any:
            (job,) = await anext(results)
            return job.path, job.state, msgspec.json.decode(job.arguments)

        await app.call("m:schedule", source="s.run_after(1_000, add, key='x')")
        assert await next_state() == ("m:add", "pending", {"key": "x", "rank": 0})
        await app.turn(2)
        assert (await next_state())[1] == "succeeded"


ERRANDS_SCHEMA = """
from engine import Id, ScheduledJob, Table, unique

class Item(Table, name="items"):
    key: str

class Errand(Table, name="errands"):
    name: str
    job_id: Id["ScheduledJob"]
    by_name = unique("name")
"""
ERRANDS = """
@mutation
async def run(ctx, name: str) -> None:
    if name == "bad":
        raise AppError("no")

@mutation
async def begin(ctx: MutationCtx, name: str) -> Id[ScheduledJob]:
    job_id = await ctx.scheduler.run_after(1_000, run, name=name)
    await ctx.db.insert(Errand(name=name, job_id=job_id))
    return job_id

@query
async def state(ctx: QueryCtx, name: str) -> str | None:
    errand = await ctx.db.query(Errand.by_name, name=name).unique()
    job = errand and await ctx.db.get(errand.job_id)
    return job and f"{job.state} after {job.attempts}"

@query
async def failed(ctx: QueryCtx) -> list[str]:
    return [job.path async for job in ctx.db.query(ScheduledJob.by_state_due, state="failed")]

@mutation
async def meddle(ctx, id: Id[ScheduledJob]) -> None:
    await ctx.db.patch(id, state="succeeded")
"""


async def test_documents_may_hold_ids_of_jobs_and_what_becomes_of_a_job_is_pushed(tmp_path: Path) -> None:
    async with open_app(tmp_path, ERRANDS, schema=ERRANDS_SCHEMA) as app:
        for name in ("good", "bad"):
            await app.call("m:begin", name=name)
        async with app.watched("m:state", name="good") as good, app.watched("m:failed") as failed:
            assert await app.call("m:state", name="good") == "pending after 0"
            await app.turn(2)
            assert await anext(good) == "succeeded after 1"
            assert await anext(failed) == ["m:run"]
        assert await app.call("m:state", name="bad") == "failed after 1"


async def test_only_the_scheduler_changes_jobs(tmp_path: Path) -> None:
    async with open_app(tmp_path, ERRANDS, schema=ERRANDS_SCHEMA) as app:
        job_id = await app.call("m:begin", name="good")
        with pytest.raises(FunctionMisuse, match="_scheduled_jobs is the engine's own table"):
            await app.call("m:meddle", id=job_id)


@pytest.mark.slow
async def test_many_jobs_of_one_mutation_run_in_the_order_of_their_times(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@mutation
async def many(ctx) -> None:
    for n in range(250):
        await ctx.scheduler.run_after((n * 7) % 250, add, rank=(n * 7) % 250)
"""
    )
    async with open_app(tmp_path, functions) as app:
        await app.call("m:many")
        await app.turn(1)
        assert [item.rank for item in await app.call("m:items")] == list(range(250))
        assert math.isclose(app.clock.monotonic(), 1)
