"""A server that is killed again and again under load keeps what it promised.

Eight writers and a watcher speak to a real process over raw sockets. It gets SIGKILL at seeded moments, counted in
acknowledgements; after each kill, and at the end, the database is held against what the clients were told. (The page
cache outlives a process: losing power is another test's business.)
"""

import asyncio
import random
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import aiohttp
import msgspec
import pytest

from tests.reliability.clients import Seen, Watcher, Writer
from tests.reliability.history import Told, copy_database, read_stored, violations
from tests.reliability.server_process import ServerProcess

pytestmark = pytest.mark.slow

SEED = 20_261
KILL_COUNT = 16
ANSWERS_BEFORE_KILL = (5, 300)  # at most: in the rush after the start, or later
IN_FLIGHT_COUNTS = (1, 2, 4, 8, 16, 16, 32, 32)  # of each writer, at most

SCHEMA = """
from engine import Table, index

class Entry(Table, name="entries"):
    client: int
    number: int
    position: int
    by_client = index("client", "number")

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
    await ctx.db.insert(Entry(client=client, number=number, position=position))
    if counter is None:
        await ctx.db.insert(Counted(count=position))
    else:
        await ctx.db.patch(counter.id, count=position)
    await ctx.db.insert(Mirror(client=client, number=number, position=position))
    return position

@query
async def count(ctx: QueryCtx) -> int:
    counter = await ctx.db.query(Counted).unique()
    return 0 if counter is None else counter.count
"""


def write_app(directory: Path) -> Path:
    (directory / "functions").mkdir(parents=True)
    (directory / "schema.py").write_text(SCHEMA)
    (directory / "functions" / "puts.py").write_text(PUTS)
    return directory


class Toll(msgspec.Struct):
    """What was on its way at the kills, summed over all of them."""

    unanswered_count: int = 0  # puts that were committed, and not answered when the server was dead
    unapplied_count: int = 0  # puts that were sent, and not committed


class Outcome(msgspec.Struct, frozen=True):
    """A history that is over: every put is answered, and the server is dead."""

    told: Told
    database: Path  # nobody has it open
    server_log: str
    repeat_count: int  # answers that confirmed an earlier one
    toll: Toll


class Trigger:
    """Kills the server in the middle of an answer's handling, the n-th from when it was set."""

    def __init__(self, server: ServerProcess) -> None:
        self.missing_count = 0  # answers; 0 while it is not set
        self._server = server

    def pull(self) -> None:
        if self.missing_count and self._server.is_up.is_set():  # not for what a dead server had said before
            self.missing_count -= 1
            if not self.missing_count:
                self._server.kill()


class Crowd:
    """The writers and the watcher."""

    def __init__(self, server: ServerProcess, random_source: random.Random, on_answer: Callable[[], None]) -> None:
        self.writers = [
            Writer(server, random_source, client, in_flight_count_max, on_answer)
            for client, in_flight_count_max in enumerate(IN_FLIGHT_COUNTS)
        ]
        self.watcher = Watcher(server, random_source)

    def told(self) -> Told:
        answers = {
            (client, number): answer
            for client, writer in enumerate(self.writers)
            for number, answer in writer.answers.items()
        }
        return Told([writer.sent_count for writer in self.writers], answers, list(self.watcher.seen))

    @property
    def sent_count(self) -> int:
        return sum(writer.sent_count for writer in self.writers)

    async def finish(self) -> None:
        """Put nothing new; wait until every put is answered and the watcher has seen the last."""
        for writer in self.writers:
            await writer.finish()
        await self.watcher.until(lambda: bool(self.watcher.seen) and self.watcher.seen[-1].count == self.sent_count)


async def live_through_kills(directory: Path, seed: int) -> Outcome:
    """One history. Raises on what clients can see for themselves, and on what a killed server left behind."""
    random_source = random.Random(seed)
    answer_counts = [random_source.randint(0, random_source.choice(ANSWERS_BEFORE_KILL)) for _ in range(KILL_COUNT)]
    print(f"seed {seed}, kills after {answer_counts} answers")
    server = ServerProcess(write_app(directory / "app"), directory / "engine.db")
    trigger, toll = Trigger(server), Toll()
    crowd = Crowd(server, random_source, on_answer=trigger.pull)
    committed: set[tuple[int, int, int]] = set()
    try:
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(client.run(http)) for client in (*crowd.writers, crowd.watcher)]
            for answer_count in answer_counts:
                trigger.missing_count = answer_count
                await server.start()
                if not answer_count:
                    server.kill()
                await server.ended()
                told = crowd.told()
                stored = read_stored(copy_database(server.database, directory / f"kill-{server.start_count}.db"))
                assert not (broken := violations(told, stored)), f"kill {server.start_count}: {broken[:5]}"
                assert committed <= set(stored.entries), f"kill {server.start_count}: a commit was undone"
                committed = set(stored.entries)
                toll.unanswered_count += len(stored.entries) - len(told.answers)
                toll.unapplied_count += crowd.sent_count - len(stored.entries)
            await server.start()
            await crowd.finish()
            for task in running:
                task.cancel()
    finally:
        await server.close()
    print(toll)
    return Outcome(
        told=crowd.told(),
        database=server.database,
        server_log=server.log(),
        repeat_count=sum(writer.repeat_count for writer in crowd.writers),
        toll=toll,
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return asyncio.run(live_through_kills(tmp_path_factory.mktemp("kill"), SEED))


@pytest.fixture
def database(outcome: Outcome, tmp_path: Path) -> Path:
    """A copy to read, and to tamper with."""
    return copy_database(outcome.database, tmp_path / "copy.db")


def test_every_acknowledged_mutation_is_there_exactly_once(outcome: Outcome, database: Path) -> None:
    stored = read_stored(database)
    assert violations(outcome.told, stored) == []
    assert len(stored.entries) == len(outcome.told.answers) == sum(outcome.told.sent_counts)
    assert outcome.told.seen[-1].count == len(stored.entries)


def test_the_kills_came_where_they_hurt(outcome: Outcome) -> None:
    """Else the history shows nothing."""
    assert outcome.toll.unanswered_count > 0, "nothing was committed and not answered: no answer came from the ledger"
    assert outcome.toll.unapplied_count > 0, "nothing was lost on the way: no put had to be sent again to be applied"
    assert outcome.repeat_count > KILL_COUNT
    assert len(outcome.told.seen) > KILL_COUNT


def test_the_server_had_nothing_to_complain_of(outcome: Outcome) -> None:
    assert outcome.server_log.count(" serving http") == KILL_COUNT + 1
    for word in ("ERROR", "CRITICAL", "Traceback"):
        assert word not in outcome.server_log, outcome.server_log


# the checks above show something only if they fail where a promise was broken

TABLES = ("entries", "mirrors")
DELETE = "DELETE FROM {} WHERE client = 3 AND number = 7"
REPEAT = """
INSERT INTO {0} (_creation, id, client, number, position)
SELECT (SELECT max(_creation) + 1 FROM {0}), id, client, number, position
FROM {0} WHERE client = 3 AND number = 7"""
RENUMBER = "UPDATE {} SET number = 1000000 WHERE client = 3 AND number = 7"
SHIFT = "UPDATE {} SET position = position + 1"
COUNT = "UPDATE counters SET count = count {}"


@pytest.mark.parametrize(
    ("statements", "complaint"),
    [
        ([DELETE.format("entries")], "acknowledged and lost: 1 puts, [(3, 7)]"),
        ([DELETE.format("mirrors")], "torn: "),
        ([*map(DELETE.format, TABLES), COUNT.format("- 1")], "acknowledged and lost: 1 puts, [(3, 7)]"),
        ([REPEAT.format("entries")], "applied more than once: [(3, 7)]"),
        ([REPEAT.format("mirrors")], "torn: "),
        ([*map(REPEAT.format, TABLES), COUNT.format("+ 1")], "applied more than once: [(3, 7)]"),
        ([COUNT.format("+ 1")], "counter: "),
        ([*map(RENUMBER.format, TABLES)], "applied, never sent: [(3, 1000000)]"),
        ([*map(SHIFT.format, TABLES)], "positions: "),
        ([*map(SHIFT.format, TABLES)], "put (3, 7): answered "),
    ],
)
def test_a_database_that_was_tampered_with_is_found_out(
    statements: Sequence[str], complaint: str, outcome: Outcome, database: Path
) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0, statement
    assert complaint in "\n".join(violations(outcome.told, read_stored(database)))


def test_a_damaged_index_is_found_out(outcome: Outcome, database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        ((index,),) = connection.execute("SELECT name FROM sqlite_schema WHERE tbl_name = 'entries' AND type = 'index'")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_schema SET sql = replace(sql, 'number', 'position') WHERE name = ?", (index,))
    assert "integrity: " in "\n".join(violations(outcome.told, read_stored(database)))


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
        (lambda told: saw_besides(told, lambda last: Seen(last.ts - 1, last.count)), "watcher went back: "),
        (lambda told: saw_besides(told, lambda last: Seen(last.ts, last.count - 1)), "watcher went back: "),
        (lambda told: saw_besides(told, lambda last: Seen(last.ts + 1, last.count + 1)), "watcher: Seen("),
        (lambda told: saw_besides(told, lambda last: Seen(last.ts, last.count - 1)), "watcher: Seen("),
    ],
)
def test_a_client_that_was_told_something_else_is_found_out(
    told_otherwise: Callable[[Told], Told], complaint: str, outcome: Outcome, database: Path
) -> None:
    assert complaint in "\n".join(violations(told_otherwise(outcome.told), read_stored(database)))
