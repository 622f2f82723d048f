"""Scheduled work over kills: the effect of a mutation is there exactly once, that of an action at most once.

Each life of the server is given jobs, half of them mutations that write a row, half of them actions that write a line
to a file outside the database; then it is killed, at a named point or at some moment. What was left is done by the
next one.

`REL_N` is the number of kills (10); `REL_SEED` their seed. More than 20 are told as several histories.
"""

import asyncio
import os
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.reliability.history import copy_database
from tests.reliability.server_process import SECONDS_MAX, Point, ServerProcess

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("REL_SEED", 20_263))
KILL_COUNT = int(os.environ.get("REL_N", 10))
KILL_COUNT_MAX = 20  # of one history
JOB_COUNT = 40  # of each life
DELAY_MS_MAX = 400
SECONDS_BEFORE_KILL = (0.05, 0.5)
CONTROL_KILL_COUNT = 3
STOPPED = "the server stopped while it ran"

SCHEMA = """
from engine import Table, index, unique

class Plan(Table, name="plans"):
    first: int
    by_first = unique("first")

class Effect(Table, name="effects"):
    number: int
    by_number = index("number")
"""

JOBS = """
import os
from pathlib import Path
from engine import ActionCtx, MutationCtx, QueryCtx, ScheduledJob, action, mutation, query
from schema import Effect, Plan

LINES = Path(__file__).parents[1] / "lines"

@mutation
async def plan(ctx: MutationCtx, first: int, delays: list[float]) -> None:
    if await ctx.db.query(Plan.by_first, first=first).unique() is not None:
        return
    await ctx.db.insert(Plan(first=first))
    for number, delay in enumerate(delays, first):
        await ctx.scheduler.run_after(delay, write if number % 2 else tell, number=number)

@mutation(internal=True)
async def write(ctx: MutationCtx, number: int) -> None:
    await ctx.db.insert(Effect(number=number))

@action(internal=True)
async def tell(ctx: ActionCtx, number: int) -> None:
    file = os.open(LINES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{number}\\n".encode())
    os.close(file)

@query
async def left(ctx: QueryCtx) -> int:
    return sum([
        await ctx.db.query(ScheduledJob.by_state_due, state=state).count() for state in ("pending", "running")
    ])
"""

PASS_COUNT_MAX = {  # by the points that a process of this app passes, often enough to die there in each life
    "the database is open": 1,
    "job.due": 20,
    "job.ran": 10,
    "action.claimed": 10,
    "action.ran": 10,
    "action.recorded": 10,
    "commit.begun": 5,
    "commit.before_sync": 5,
    "commit.after_sync": 5,
    "commit.published": 5,
}


class Stored(msgspec.Struct, frozen=True):
    """What there is when all is done."""

    effects: Counter[int]  # rows, by the number of their job
    lines: Counter[int]
    jobs: list[tuple[int, str, int, str | None]]  # number, state, attempts, error; one for each row


def violations(stored: Stored, planned: range) -> Iterator[str]:
    """Each broken promise, in words."""
    if sorted(number for number, *_ in stored.jobs) != [*planned]:
        yield f"jobs: {len(stored.jobs)} rows for {len(planned)}"
    for number, state, attempts, error in stored.jobs:
        effect_count = stored.effects[number] if number % 2 else stored.lines[number]
        match number % 2, state, effect_count:
            case 1, "succeeded", 1:
                is_kept = True
            case 0, "succeeded", 1:
                is_kept = attempts == 1
            case 0, "failed", 0 | 1:
                is_kept = attempts == 1 and error is not None and STOPPED in error
            case _:
                is_kept = False
        if not is_kept:
            kind = "mutation" if number % 2 else "action"
            yield f"{kind} {number} is {state} after {attempts} attempts with {effect_count} effects: {error}"


class Lives:
    """One server, killed again and again, and what it was given to do."""

    def __init__(self, directory: Path, random_source: random.Random, broken: str | None) -> None:
        app = directory / "app"
        (app / "functions").mkdir(parents=True)
        (app / "schema.py").write_text(SCHEMA)
        (app / "functions" / "jobs.py").write_text(JOBS)
        self.server = ServerProcess(app, directory / "engine.db", broken=broken)
        self.planned_count = 0
        self._lines, self._copy = app / "lines", directory / "copy.db"
        self._random = random_source

    async def live(self, http: aiohttp.ClientSession, point: Point | None) -> None:
        """Start, take new jobs, and die."""
        await self.server.start(point)
        delays = [self._random.uniform(0, DELAY_MS_MAX) for _ in range(JOB_COUNT)]
        if await self._call(http, "mutation", "jobs:plan", first=self.planned_count, delays=delays) is not None:
            self.planned_count += JOB_COUNT
        if point is None:
            await asyncio.sleep(self._random.uniform(*SECONDS_BEFORE_KILL))
            self.server.kill()
        await self.server.ended()

    async def finish(self, http: aiohttp.ClientSession) -> Stored:
        """Start once more, and wait until nothing is left to do."""
        await self.server.start()
        async with asyncio.timeout(SECONDS_MAX):
            while await self._call(http, "query", "jobs:left") != {"value": 0}:  # noqa: ASYNC110 - it is elsewhere
                await asyncio.sleep(0.02)
        self.server.kill()
        await self.server.ended()
        lines = self._lines.read_text().split() if self._lines.exists() else []
        with closing(sqlite3.connect(copy_database(self.server.database, self._copy))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            effects = Counter(number for (number,) in connection.execute("SELECT number FROM effects"))
            jobs = [
                (int(msgspec.json.decode(arguments)["number"]), *rest)
                for arguments, *rest in connection.execute(
                    "SELECT arguments, state, attempts, error FROM _scheduled_jobs"
                )
            ]
        return Stored(effects, Counter(map(int, lines)), jobs)

    async def _call(self, http: aiohttp.ClientSession, kind: str, path: str, **arguments: Any) -> dict[str, Any] | None:
        """What was answered; None when the server died before. A plan that was not answered is made again."""
        body = {"path": path, "args": arguments, "format": "json"}
        try:
            async with http.post(f"{self.server.address}/api/{kind}", json=body) as response:
                answer = await response.json()
        except aiohttp.ClientError:
            return None
        assert answer["status"] == "success", answer
        return {"value": answer["value"]}


async def live_through_kills(
    directory: Path, points: list[Point | None], random_source: random.Random, broken: str | None = None
) -> tuple[Stored, range]:
    lives = Lives(directory, random_source, broken)
    try:
        async with aiohttp.ClientSession() as http:
            for number, point in enumerate(points):
                print(f"kill {number}: {point}")
                await lives.live(http, point)
            stored = await lives.finish(http)
    finally:
        await lives.server.close()
    for word in ("ERROR", "Traceback"):
        assert word not in lives.server.log(), lives.server.log_tail()
    return stored, range(lives.planned_count)


def make_points(random_source: random.Random, kill_count: int) -> list[Point | None]:
    names = random_source.sample(list(PASS_COUNT_MAX), len(PASS_COUNT_MAX))
    points = (Point(name, random_source.randint(1, PASS_COUNT_MAX[name])) for name in cycle(names))
    return [None if kill % 3 == 0 else next(points) for kill in range(kill_count)]


@pytest.mark.parametrize("first", range(0, KILL_COUNT, KILL_COUNT_MAX))
async def test_mutations_take_effect_exactly_once_and_actions_at_most_once(first: int, tmp_path: Path) -> None:
    random_source, kill_count = random.Random(SEED + first), min(KILL_COUNT_MAX, KILL_COUNT - first)
    print(f"seed {SEED + first}, {kill_count} kills")
    stored, planned = await live_through_kills(tmp_path, make_points(random_source, kill_count), random_source)
    assert list(violations(stored, planned)) == []
    failed_count = sum(state == "failed" for _, state, *_ in stored.jobs)
    print(f"{len(planned)} jobs, {failed_count} actions were cut off")
    assert len(planned) >= JOB_COUNT * kill_count // 3  # those are surely answered that no point kills
    assert failed_count > 0, "no kill came while an action ran"


@pytest.mark.parametrize(
    ("broken", "point", "kind"),
    [
        ("a job and its end are two commits", "job.ran", "mutation"),
        ("actions start unclaimed", "action.ran", "action"),
    ],
)
async def test_a_scheduler_that_breaks_a_promise_is_found_out(
    broken: str, point: str, kind: str, tmp_path: Path
) -> None:
    random_source = random.Random(SEED)
    points: list[Point | None] = [Point(point, random_source.randint(3, 6)) for _ in range(CONTROL_KILL_COUNT)]
    stored, planned = await live_through_kills(tmp_path, points, random_source, broken)
    assert re.search(rf"^{kind} .* with [2-9] effects", "\n".join(violations(stored, planned)), re.MULTILINE)
