"""A server that is killed again and again under load keeps what it promised.

Eight clients write: four over raw sockets, two of the official npm client and two of the official Python client. One
more watches. Their server gets SIGKILL at seeded moments, or kills itself at a named point of the engine; after each
kill, and at the end, the database is held against what the clients were told. (The page cache outlives a process:
losing power is another test's business.)

`REL_N` is the number of kills (25); `REL_SEED` their seed. More than 25 are told as several histories.
"""

import asyncio
import os
import random
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec
import pytest

from engine.schema import TableSchema
from tests.reliability.clients import Crowd, Seen, Told
from tests.reliability.history import copy_database, read_stored, table_named, violations
from tests.reliability.server_process import Point, ServerProcess

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("REL_SEED", 20_261))
KILL_COUNT = int(os.environ.get("REL_N", 25))
KILL_COUNT_MAX = 25  # of one history: the database is read whole after each
SECONDS_BEFORE_KILL = (0.05, 0.35)
IN_FLIGHT_COUNTS = (1, 4, 16, 32)  # of each raw writer, at most
NPM_CLIENTS, PYTHON_CLIENTS = (4, 5), (6, 7)
PATIENT_KILL_COUNT = 4  # kills that wait until all official clients were answered: they take their time
DERIVED_PERIOD = 5
CONTROL_KILL_COUNT = 10

SCHEMA = """
from engine import Table, aggregate, index, search_index

class Entry(Table, name="entries"):
    client: int
    number: int
    position: int
    text: str
    by_client = index("client", "number")
    by_position = index("position", ranked=True)
    of_client = aggregate("client", sum=("position",))
    words = search_index("text")

class Mirror(Table, name="mirrors"):
    client: int
    number: int
    position: int

class Counted(Table, name="counters"):
    count: int
"""

PUTS = """
from engine import MutationCtx, QueryCtx, mutation, query
from schema import Counted, Entry, Mirror

@mutation
async def put(ctx: MutationCtx, client: int, number: int) -> int:
    counter = await ctx.db.query(Counted).unique()
    position = 1 if counter is None else counter.count + 1
    text = f"client{client} number{number % 10}"
    await ctx.db.insert(Entry(client=client, number=number, position=position, text=text))
    if counter is None:
        await ctx.db.insert(Counted(count=position))
    else:
        await ctx.db.patch(counter.id, count=position)
    await ctx.db.insert(Mirror(client=client, number=number, position=position))
    return position

@mutation
async def put_once(ctx: MutationCtx, client: int, number: int) -> int:
    entry = await ctx.db.query(Entry.by_client, client=client, number=number).unique()
    return await put(ctx, client, number) if entry is None else entry.position

@query
async def count(ctx: QueryCtx) -> int:
    counter = await ctx.db.query(Counted).unique()
    return 0 if counter is None else counter.count
"""

CONFIG = """
[limits]
wal_checkpoint_size_bytes = 262_144 # so that there are checkpoints to be killed in
"""

PASS_COUNT_MAX = {  # by the points that a process of this app passes, in the order it first does
    "the database is open": 1,
    "the schema is applied": 1,
    "session.received": 100,
    "commit.begun": 30,
    "one of several rows is written": 300,
    "mutation.ran": 100,
    "the outcomes are written": 30,
    "commit.before_sync": 30,
    "commit.after_sync": 30,
    "readers see a commit": 30,
    "session.answered": 100,
    "publish.begun": 30,
    "commit.published": 30,
    "a frame is to be sent": 50,
    "session.transition": 50,
    "a frame is sent": 50,
    "checkpoint.begun": 3,
    "a checkpoint is made": 3,
}


def write_app(directory: Path) -> Path:
    (directory / "functions").mkdir(parents=True)
    (directory / "schema.py").write_text(SCHEMA)
    (directory / "functions" / "puts.py").write_text(PUTS)
    (directory / "engine.toml").write_text(CONFIG)
    return directory


class Toll(msgspec.Struct):
    """What was on its way at the kills, summed over all of them."""

    unanswered_count: int = 0  # puts that were committed, and not answered when the server was dead
    unapplied_count: int = 0  # puts that were sent, and not committed


class Outcome(msgspec.Struct, frozen=True):
    """A history that is over: every put is answered, and the server is dead."""

    told: Told
    database: Path  # nobody has it open
    entries_table: TableSchema
    kill_count: int
    server_log: str
    repeat_count: int  # answers that confirmed an earlier one
    toll: Toll


class Moment(NamedTuple):
    """A kill after the first message of a process."""

    seconds: float
    waits_for_all: bool  # first until all official clients were answered


def make_plans(random_source: random.Random, kill_count: int) -> list[Point | Moment]:
    """The kills of one history: one at each point, and the others at some moment."""
    points = [Point(name, random_source.randint(1, count_max)) for name, count_max in PASS_COUNT_MAX.items()]
    moments = [
        Moment(random_source.uniform(*SECONDS_BEFORE_KILL), number < PATIENT_KILL_COUNT)
        for number in range(kill_count - len(points))
    ]
    plans = [*points[1:], *moments]
    random_source.shuffle(plans)
    return [points[0], *plans]  # the first leaves a database half made


def make_control_plans(point: str | None, random_source: random.Random) -> list[Point | Moment]:
    """The kills by which a broken promise must be found out."""
    if point is None:
        return [Moment(random_source.uniform(*SECONDS_BEFORE_KILL), False) for _ in range(CONTROL_KILL_COUNT)]
    return [Point(point, random_source.randint(20, 60)) for _ in range(CONTROL_KILL_COUNT)]


async def live_through_kills(
    directory: Path, seed: int, kill_count: int, *, broken: tuple[str, str | None] | None = None
) -> Outcome:
    """One history. Raises on what clients can see for themselves, and on what a killed server left behind.

    `broken`: a promise that the server breaks (of `BROKEN`), and the point where its processes die, if it is one.
    """
    random_source = random.Random(seed)
    plans = make_control_plans(broken[1], random_source) if broken else make_plans(random_source, kill_count)
    print(f"seed {seed}, {len(plans)} kills")
    app = write_app(directory / "app")
    server = ServerProcess(app, directory / "engine.db", broken=broken and broken[0])
    entries_table = table_named(app, "entries")
    officials = {} if broken else {"npm": NPM_CLIENTS, "python": PYTHON_CLIENTS}
    crowd, toll = Crowd(server, random_source, IN_FLIGHT_COUNTS, **officials), Toll()
    committed: set[tuple[int, int, int]] = set()
    try:
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
            crowd.start(http, tasks)
            for kill, plan in enumerate(plans):
                print(f"kill {kill}: {plan}")
                await server.start(plan if isinstance(plan, Point) else None)
                crowd.go_online()
                if not isinstance(plan, Point):
                    await crowd.watcher.heard_from(server.start_count)
                    if plan.waits_for_all:
                        await crowd.officials_answered_by(server.start_count)
                    await asyncio.sleep(plan.seconds)
                    server.kill()
                await server.ended()
                copy = copy_database(server.database, directory / f"kill-{server.start_count}.db")
                # what is derived stays wrong once it is, and to work it out takes time
                table = entries_table if kill % DERIVED_PERIOD == 0 else None
                stored = await asyncio.to_thread(read_stored, copy, table)
                told = crowd.told()  # after that: what official clients say comes a little late
                found = violations(told, stored)
                assert not found, f"seed {seed}, kill {kill}: {found[:5]}"
                assert committed <= set(stored.entries), f"seed {seed}, kill {kill}: a commit was undone"
                committed = set(stored.entries)
                toll.unanswered_count += len(stored.entries) - len(told.answers)
                toll.unapplied_count += crowd.sent_count - len(stored.entries)
                copy.unlink()
            await server.start()
            crowd.go_online()
            await crowd.finish()
    finally:
        await server.close()
    print(toll)
    return Outcome(
        told=crowd.told(),
        database=server.database,
        entries_table=entries_table,
        kill_count=kill_count,
        server_log=server.log(),
        repeat_count=sum(writer.repeat_count for writer in crowd.writers),
        toll=toll,
    )


@pytest.fixture(scope="module", params=range(0, KILL_COUNT, KILL_COUNT_MAX))
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    kill_count = min(KILL_COUNT_MAX, KILL_COUNT - request.param)
    return asyncio.run(live_through_kills(tmp_path_factory.mktemp("kill"), SEED + request.param, kill_count))


@pytest.fixture
def database(outcome: Outcome, tmp_path: Path) -> Path:
    """A copy to read, and to tamper with."""
    return copy_database(outcome.database, tmp_path / "copy.db")


def test_every_acknowledged_mutation_is_there_exactly_once(outcome: Outcome, database: Path) -> None:
    stored = read_stored(database, outcome.entries_table)
    assert violations(outcome.told, stored) == []
    assert len(stored.entries) == len(outcome.told.answers) == sum(outcome.told.sent_counts)
    assert outcome.told.seen[-1].count == len(stored.entries)


def test_the_kills_came_where_they_hurt(outcome: Outcome) -> None:
    """Else the history shows nothing."""
    assert outcome.toll.unanswered_count > 0, "nothing was committed and not answered: no answer came from the ledger"
    assert outcome.toll.unapplied_count > 0, "nothing was lost on the way: no put had to be sent again to be applied"
    assert outcome.repeat_count > outcome.kill_count
    assert len(outcome.told.seen) > outcome.kill_count
    for client in (*NPM_CLIENTS, *PYTHON_CLIENTS):
        assert sum(put[0] == client for put in outcome.told.answers) > PATIENT_KILL_COUNT


def test_the_server_had_nothing_to_complain_of(outcome: Outcome) -> None:
    assert outcome.server_log.count(" serving http") > outcome.kill_count // 2
    for word in ("ERROR", "CRITICAL", "Traceback"):
        assert word not in outcome.server_log, outcome.server_log


# the checks above show something only if they fail where a promise was broken


@pytest.mark.parametrize(
    ("broken", "point", "complaint"),
    [
        ("outcomes are not recorded", "publish.begun", " became Answer("),
        ("answers come before the commit", None, "acknowledged and lost"),
        ("a mutation is two commits", "one of several rows is written", "torn: "),
    ],
)
async def test_a_server_that_breaks_a_promise_is_found_out(
    broken: str, point: str | None, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        await live_through_kills(tmp_path, SEED, CONTROL_KILL_COUNT, broken=(broken, point))
    found = raised.value.subgroup(AssertionError)
    assert found is not None
    assert complaint in "".join(map(str, found.exceptions))


TABLES = ("entries", "mirrors")
DELETE = "DELETE FROM {} WHERE client = 3 AND number = 7"
REPEAT = """
INSERT INTO {0} ({1})
SELECT (SELECT max(_creation) + 1 FROM {0}), {2}
FROM {0} WHERE client = 3 AND number = 7"""
COLUMNS = {"entries": "id, client, number, position, text", "mirrors": "id, client, number, position"}
REPEAT_BY_TABLE = {name: REPEAT.format(name, f"_creation, {columns}", columns) for name, columns in COLUMNS.items()}
RENUMBER = "UPDATE {} SET number = 1000000 WHERE client = 3 AND number = 7"
SHIFT = "UPDATE {} SET position = position + 1"
TOTAL = """UPDATE "entries.of_client.totals" SET sum_position = sum_position - 1 WHERE key = '[3]'"""
RANK = """UPDATE "entries.by_position.ranks" SET count = count + 1 WHERE level = 1"""
WORDS = """
INSERT INTO "entries.words.words" ("entries.words.words", rowid, tokens)
SELECT 'delete', _creation, text FROM entries WHERE client = 3 AND number = 7"""
COUNT = "UPDATE counters SET count = count {}"


@pytest.mark.parametrize(
    ("statements", "complaint"),
    [
        ([DELETE.format("entries")], "acknowledged and lost: 1 puts, [(3, 7)]"),
        ([DELETE.format("mirrors")], "torn: "),
        ([*map(DELETE.format, TABLES), COUNT.format("- 1")], "acknowledged and lost: 1 puts, [(3, 7)]"),
        ([REPEAT_BY_TABLE["entries"]], "applied more than once: [(3, 7)]"),
        ([REPEAT_BY_TABLE["mirrors"]], "torn: "),
        ([*REPEAT_BY_TABLE.values(), COUNT.format("+ 1")], "applied more than once: [(3, 7)]"),
        ([COUNT.format("+ 1")], "counter: "),
        ([*map(RENUMBER.format, TABLES)], "applied, never sent: [(3, 1000000)]"),
        ([*map(SHIFT.format, TABLES)], "positions: "),
        ([*map(SHIFT.format, TABLES)], "derived: "),
        ([TOTAL], "derived: totals or ranks: entries.of_client: invariant 1"),
        ([RANK], "derived: totals or ranks: entries.by_position: invariant 1"),
        ([WORDS], "derived: search: 'client3' is in "),
        ([*map(SHIFT.format, TABLES)], "put (3, 7): answered "),
    ],
)
def test_a_database_that_was_tampered_with_is_found_out(
    statements: Sequence[str], complaint: str, outcome: Outcome, database: Path
) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0, statement
    assert complaint in "\n".join(violations(outcome.told, read_stored(database, outcome.entries_table)))


def test_a_damaged_index_is_found_out(outcome: Outcome, database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        ((index,),) = connection.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'index' AND name LIKE '%by_client'"
        )
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_schema SET sql = replace(sql, 'number', 'position') WHERE name = ?", (index,))
    assert "integrity: " in "\n".join(violations(outcome.told, read_stored(database, outcome.entries_table)))


def answered_otherwise(told: Told, **changes: int) -> Told:
    answer = told.answers[3, 7]
    changed = {name: getattr(answer, name) + change for name, change in changes.items()}
    return msgspec.structs.replace(told, answers={**told.answers, (3, 7): msgspec.structs.replace(answer, **changed)})


def saw_besides(told: Told, seen: Callable[[Seen], Seen]) -> Told:
    return msgspec.structs.replace(told, seen=[*told.seen, seen(told.seen[-1])])


@pytest.mark.parametrize(
    ("told_otherwise", "complaint"),
    [
        (lambda told: answered_otherwise(told, ts=10**12), "order of one client: (3, 7)"),
        (lambda told: answered_otherwise(told, ts=10**12), "order of all: "),
        (lambda told: answered_otherwise(told, position=1), "put (3, 7): answered "),
        (lambda told: answered_otherwise(told, floor=10**6), "real time: (3, 7) "),
        (lambda told: saw_besides(told, lambda last: Seen(last.ts - 1, last.count)), "watcher went back: "),
        (lambda told: saw_besides(told, lambda last: Seen(last.ts, last.count - 1)), "watcher went back: "),
        (lambda told: saw_besides(told, lambda last: Seen(last.ts + 1, last.count + 1)), "watcher: Seen("),
        (lambda told: saw_besides(told, lambda last: Seen(last.ts, last.count - 1)), "watcher: Seen("),
    ],
)
def test_a_client_that_was_told_something_else_is_found_out(
    told_otherwise: Callable[[Told], Told], complaint: str, outcome: Outcome, database: Path
) -> None:
    assert complaint in "\n".join(
        violations(told_otherwise(outcome.told), read_stored(database, outcome.entries_table))
    )
