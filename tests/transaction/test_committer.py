"""Group commit, timestamps, and what happens when storage refuses: on real files, counting what SQLite was told."""

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from engine.errors import (
    CommitUnknown,
    EngineClosed,
    InternalError,
    LimitExceeded,
    Overloaded,
    StorageFailed,
    StorageFull,
)
from engine.limits import Limits
from engine.schema import Table, compile_schema, index
from engine.storage.connections import TEMPORARY, Connection, Database, WriterConnection
from engine.storage.ddl import apply_schema
from engine.storage.rows import RowCodec
from engine.testing import ManualClock
from engine.transaction.committer import Committer, Execution, Group, Settled, Submission
from engine.transaction.ledger import Ledger, LedgerKey
from engine.transaction.reading import Catalog
from engine.transaction.snapshots import Snapshots
from engine.transaction.transaction import WriteTransaction
from tests.small_engine import SECONDS_MAX, small_engine

UNHURRIED_MS = 10_000  # a group ends when nobody waits, however busy the machine is
LARGE = "x" * 200_000
KEY = LedgerKey.of("session", 1, None, "things:add", b"{}")

Work = Callable[[WriteTransaction], bytes | None]


class Thing(Table, name="things"):
    name: str
    by_name = index("name")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - what is waited for knows nothing of its tests
            await asyncio.sleep(0)


class Sent:
    """A mutation that was submitted, and how it was settled: once, if all is well."""

    def __init__(self, log: list[str]) -> None:
        self.ticks: list[int] = []  # of `ctx.now`, one a run
        self.settled: list[Settled] = []
        self._log = log

    def settle(self, settled: Settled) -> None:
        self._log.append("settled")
        self.settled.append(settled)

    @property
    def run_count(self) -> int:
        return len(self.ticks)

    @property
    def one(self) -> Settled:
        (settled,) = self.settled
        return settled

    @property
    def has_succeeded(self) -> bool:
        return self.one.error is None and self.one.execution is not None and self.one.execution.value is not None


class OpenCommitter:
    """A committer, what it published, and a log of what SQLite was told and who was answered."""

    def __init__(self, database: Database, clock: ManualClock, limits: Limits) -> None:
        self.database, self.clock = database, clock
        self.groups: list[Group] = []
        self.fatal: list[InternalError] = []
        self.log: list[str] = []
        schema = compile_schema([Thing], limits)
        apply_schema(database.writer, schema)
        self.snapshots = Snapshots(database, limits, clock)
        self.committer = Committer(
            database.writer,
            Catalog([RowCodec(table) for table in schema.tables_by_name.values()]),
            Ledger.open(database.writer, limits),
            limits,
            clock,
            self._publish,
            self._refresh_readers,
            self.fatal.append,
        )
        database.writer._connection.set_trace_callback(self.log.append)

    def _refresh_readers(self) -> None:
        self.snapshots.advance()

    async def _publish(self, group: Group) -> None:
        assert self.snapshots.advance() == group.ts
        self.groups.append(group)
        for submission, settled in group.settled:
            submission.settle(settled)

    def submit(
        self,
        work: Work,
        key: LedgerKey | None = None,
        *,
        function: str = "",
        is_admin: bool = False,
        linger_seconds: float = 0,
    ) -> Sent:
        sent = Sent(self.log)

        def execute(transaction: WriteTransaction) -> Execution:
            sent.ticks.append(transaction.tick)
            return Execution(work(transaction), None)

        self.committer.submit(Submission(execute, sent.settle, key, function, is_admin, linger_seconds))
        return sent

    def add(self, *names: str, key: LedgerKey | None = None) -> Sent:
        def work(transaction: WriteTransaction) -> bytes | None:
            try:
                for name in names:
                    transaction.insert(Thing(name=name))
            except StorageFull:  # as the runner does: the function has failed
                return None
            return b'"added"'

        return self.submit(work, key)

    async def idle(self) -> None:
        await until(lambda: self.committer.is_idle)

    async def until_it_waits(self) -> None:
        """Until the committer sleeps on the clock."""
        await until(lambda: self.clock.seconds_to_next_timer is not None)

    async def until_fatal(self) -> InternalError:
        await until(lambda: bool(self.fatal))
        (error,) = self.fatal
        return error

    @property
    def commit_count(self) -> int:
        return self.log.count("COMMIT")

    @property
    def group_sizes(self) -> list[int]:
        return [len(group.settled) for group in self.groups]

    def names(self, connection: Connection | None = None) -> list[str]:
        rows = (connection or self.snapshots.reader).fetch_all('SELECT "name" FROM "things" ORDER BY "_creation"')
        return [name for (name,) in rows]


@asynccontextmanager
async def open_committer(
    path: Path | str = TEMPORARY, *, clock: ManualClock | None = None, **limits: int
) -> AsyncIterator[OpenCommitter]:
    bounds = Limits(**{"group_commit_ms_max": UNHURRIED_MS, **limits})
    with closing(Database.open(path, bounds)) as database:
        opened = OpenCommitter(database, clock or ManualClock(), bounds)
        run = asyncio.create_task(opened.committer.run())
        try:
            yield opened
        finally:
            opened.committer.close()
            async with asyncio.timeout(SECONDS_MAX):
                await run


# -- groups


async def test_mutations_that_wait_share_one_commit_and_are_settled_in_the_order_they_came() -> None:
    async with open_committer() as app:
        sent = [app.add(f"{number:03}") for number in range(200)]
        await app.idle()
        assert app.commit_count == 1
        assert app.group_sizes == [200]
        assert all(one.has_succeeded for one in sent)
        assert [settled for _, settled in app.groups[0].settled] == [one.one for one in sent]
        assert app.names() == [f"{number:03}" for number in range(200)]


async def test_a_group_has_a_bounded_count() -> None:
    async with open_committer(group_commit_count_max=10) as app:
        for number in range(25):
            app.add(str(number))
        await app.idle()
        assert app.group_sizes == [10, 10, 5]
        assert app.commit_count == 3


async def test_a_group_whose_time_is_over_leaves_the_others_to_the_next_one() -> None:
    async with open_committer(group_commit_ms_max=0) as app:
        for name in "abc":
            app.add(name)
        await app.idle()
        assert app.group_sizes == [1, 1, 1]


async def test_nobody_is_answered_before_the_commit_is_over() -> None:
    async with open_committer() as app:
        for name in "ab":
            app.add(name)
        await app.idle()
        assert [line for line in app.log if line in ("COMMIT", "settled")] == ["COMMIT", "settled", "settled"]


async def test_whoever_is_answered_can_read_the_write_and_nobody_before() -> None:
    async with open_committer() as app:
        seen: list[list[str]] = []

        def execute(transaction: WriteTransaction) -> Execution:
            document_id = transaction.insert(Thing(name="a"))
            seen.append(app.names())
            return Execution(document_id.encode(), None)

        app.committer.submit(Submission(execute, lambda settled: seen.append(app.names())))
        await app.idle()
        assert seen == [[], ["a"]]


async def test_a_mutation_sees_what_those_before_it_in_the_group_wrote() -> None:
    async with open_committer() as app:
        app.add("a")
        sent = app.submit(lambda transaction: str(len(app.names(app.database.writer))).encode())
        await app.idle()
        assert app.group_sizes == [2]
        assert sent.one.execution == Execution(b"1", None)


async def test_what_a_failed_mutation_wrote_is_undone_while_the_others_of_its_group_commit() -> None:
    async with open_committer() as app:
        before = app.add("before")

        def fail(transaction: WriteTransaction) -> None:
            transaction.insert(Thing(name="failed"))

        failed, after = app.submit(fail), app.add("after")
        await app.idle()
        assert app.names() == ["before", "after"]
        assert (before.has_succeeded, failed.has_succeeded, after.has_succeeded) == (True, False, True)
        assert [write.new.name for write in app.groups[0].write_set if isinstance(write.new, Thing)] == [
            "before",
            "after",
        ]
        assert app.commit_count == 1


async def test_a_group_that_wrote_nothing_needs_no_commit() -> None:
    async with open_committer() as app:
        app.add("a")
        await app.idle()
        ts = app.committer.published_ts
        sent = app.submit(lambda transaction: b"null")
        await app.idle()
        assert app.commit_count == 1
        assert sent.one.ts == ts == app.committer.published_ts


async def test_a_group_whose_writes_cancel_out_is_committed_and_recorded(tmp_path: Path) -> None:
    made: list[str] = []

    def make(transaction: WriteTransaction) -> bytes:
        made.append(transaction.insert(Thing(name="a")))
        return b'"made"'

    def remove(transaction: WriteTransaction) -> bytes:
        transaction.delete(made[-1])
        return b'"removed"'

    async with open_committer(tmp_path / "engine.db") as app:
        sent = app.submit(make, KEY)
        app.submit(remove)
        await app.idle()
        assert app.group_sizes == [2]
        assert [write for write in app.groups[0].write_set if write.old or write.new] == []
        assert app.commit_count == 1
        assert app.names() == []
        acknowledged_ts = sent.one.ts
    async with open_committer(tmp_path / "engine.db") as app:
        again = app.submit(make, KEY)
        await app.idle()
        assert again.one == Settled(acknowledged_ts, recorded=b'"made"')
        assert again.run_count == 0


async def test_no_group_runs_between_groups() -> None:
    async with open_committer() as app:
        async with app.committer.between_groups() as writer:
            sent = app.add("a")
            for _ in range(10):
                await asyncio.sleep(0)
            assert not writer.in_transaction
            assert not sent.settled
        await app.idle()
        assert sent.has_succeeded


# -- timestamps


async def test_each_mutation_has_a_timestamp_of_its_own_and_they_grow_while_the_clock_stands() -> None:
    async with open_committer() as app:
        wall_ns = app.clock.wall_ns()
        sent = [app.add(name) for name in "abc"]
        await app.idle()
        sent.append(app.add("d"))
        await app.idle()
        assert [one.one.ts for one in sent] == [wall_ns, wall_ns + 1, wall_ns + 2, wall_ns + 3]
        assert [group.ts for group in app.groups] == [wall_ns + 2, wall_ns + 3]


async def test_who_was_just_answered_can_join_those_who_wait() -> None:
    async with open_committer(group_commit_ms_max=UNHURRIED_MS) as app:
        first = app.add("a")
        await until(lambda: first.run_count == 1)
        app.add("b")
        app.add("c")
        await until(lambda: bool(first.settled))
        app.add("d")
        await app.idle()
        assert [len(group.settled) for group in app.groups] == [1, 3]


async def test_timestamps_follow_the_clock_and_never_go_back_with_it() -> None:
    async with open_committer() as app:
        first = app.add("a")
        await app.idle()
        app.clock.advance(5)
        second = app.add("b")
        await app.idle()
        assert second.one.ts - first.one.ts == 5_000_000_000
        app.clock.set_wall(1_000)
        third = app.add("c")
        await app.idle()
        assert third.one.ts == second.one.ts + 1


async def test_timestamps_and_creation_times_grow_over_a_restart_with_the_clock_set_back(tmp_path: Path) -> None:
    stamps: list[int] = []
    ticks: list[int] = []
    for start_ms in (2_000_000_000_000, 1_000_000_000_000, 1_500_000_000_000):
        async with open_committer(tmp_path / "engine.db", clock=ManualClock(start_ms=start_ms)) as app:
            assert app.committer.published_ts == (stamps[-1] if stamps else 0)
            sent = [app.add(str(start_ms), name) for name in "ab"]
            await app.idle()
            stamps += [one.one.ts for one in sent]
            ticks += [one.ticks[0] for one in sent]
            in_order = [name for name in app.names() if len(name) > 1]
    assert stamps == sorted(set(stamps))
    assert ticks == sorted(set(ticks))
    assert in_order == ["2000000000000"] * 2 + ["1000000000000"] * 2 + ["1500000000000"] * 2  # by creation time


# -- a full disk


@contextmanager
def full_disk(writer: WriterConnection, *, free_page_count: int = 0) -> Iterator[None]:
    """The database may grow by so many pages and no further."""
    ((page_count,),) = writer.fetch_all("PRAGMA page_count")
    ((page_count_max,),) = writer.fetch_all("PRAGMA max_page_count")
    writer.fetch_all(f"PRAGMA max_page_count = {page_count + free_page_count}")
    try:
        yield
    finally:
        writer.fetch_all(f"PRAGMA max_page_count = {page_count_max}")


async def test_when_sqlite_undid_the_whole_transaction_the_others_run_again_and_only_the_culprit_fails() -> None:
    async with open_committer() as app:
        with full_disk(app.database.writer, free_page_count=5):
            first, second, culprit, after = (app.add(name) for name in ("first", "second", LARGE, "after"))
            await app.idle()
        assert isinstance(culprit.one.error, StorageFull)
        assert [sent.has_succeeded for sent in (first, second, after)] == [True, True, True]
        assert [sent.run_count for sent in (first, second, culprit, after)] == [2, 2, 1, 1]
        assert first.one.ts < second.one.ts < after.one.ts
        assert app.names() == ["first", "second", "after"]
        assert not app.fatal


async def test_what_was_kept_of_documents_in_an_undone_group_is_read_anew() -> None:
    ids: list[str] = []
    names: list[str] = []

    def insert(transaction: WriteTransaction) -> bytes:
        ids.append(transaction.insert(Thing(name="old")))
        return b"null"

    def rename_once(transaction: WriteTransaction) -> bytes:
        thing = transaction.get(ids[0])
        assert isinstance(thing, Thing)
        names.append(thing.name)
        if len(names) == 1:
            transaction.patch(ids[0], {"name": "new"})
        return b"null"

    async with open_committer() as app:
        app.submit(insert)
        await app.idle()
        with full_disk(app.database.writer, free_page_count=5):
            app.submit(rename_once)
            culprit = app.add(LARGE)
            await app.idle()
        assert isinstance(culprit.one.error, StorageFull)
        assert names == ["old", "old"]
        assert app.names() == ["old"]


async def test_what_was_recorded_in_an_undone_group_is_forgotten_and_recorded_again() -> None:
    async with open_committer() as app:
        with full_disk(app.database.writer, free_page_count=5):
            first, again, culprit = app.add("first", key=KEY), app.add("first", key=KEY), app.add(LARGE)
            await app.idle()
        assert isinstance(culprit.one.error, StorageFull)
        assert [sent.run_count for sent in (first, again)] == [2, 0]
        assert again.one.recorded == b'"added"'
        assert again.one.ts == first.one.ts
        assert app.names() == ["first"]
        assert app.database.writer.read_ledger_row_count() == 1


async def test_a_culprit_that_hides_the_error_and_writes_on_commits_nothing() -> None:
    async with open_committer() as app:
        refused: list[StorageFull] = []

        def work(transaction: WriteTransaction) -> bytes:
            for name in (LARGE, "behind it"):
                try:
                    transaction.insert(Thing(name=name))
                except StorageFull as error:
                    refused.append(error)
            return b"null"

        with full_disk(app.database.writer, free_page_count=5):
            sent = app.submit(work)
            await app.idle()
        assert isinstance(sent.one.error, StorageFull)
        assert len(refused) == 2
        assert app.names() == []


async def test_a_culprit_that_hides_the_error_in_a_savepoint_fails_alone() -> None:
    async with open_committer() as app:

        def work(transaction: WriteTransaction) -> bytes:
            with transaction.nested(), contextlib.suppress(StorageFull):
                transaction.insert(Thing(name=LARGE))
            return b"null"

        with full_disk(app.database.writer, free_page_count=5):
            before, culprit, after = app.add("before"), app.submit(work), app.add("after")
            await app.idle()
        assert isinstance(culprit.one.error, StorageFull)
        assert before.has_succeeded
        assert after.has_succeeded
        assert app.names() == ["before", "after"]
        assert not app.fatal


async def test_the_lock_that_another_program_takes_when_sqlite_undid_a_group_is_waited_for(tmp_path: Path) -> None:
    async with open_committer(tmp_path / "engine.db") as app:
        with closing(sqlite3.connect(app.database.path, isolation_level=None)) as other:

            def work(transaction: WriteTransaction) -> None:
                with pytest.raises(StorageFull):
                    transaction.insert(Thing(name=LARGE))
                other.execute("BEGIN IMMEDIATE")

            before = app.add("before")
            with full_disk(app.database.writer, free_page_count=5):
                culprit = app.submit(work)
                await app.until_it_waits()
            assert isinstance(culprit.one.error, StorageFull)
            assert not before.settled
            other.execute("ROLLBACK")
            app.clock.advance(0.1)
            await app.idle()
        assert before.has_succeeded
        assert not app.fatal


async def test_a_disk_that_is_full_at_commit_fails_the_group_and_the_next_one_is_as_good_as_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_committer() as app:
        app.add("before")
        await app.idle()
        ts = app.committer.published_ts
        with monkeypatch.context() as patch:
            fail_commit(patch, app.database.writer, sqlite3.SQLITE_FULL)
            failed = [app.add("a", key=KEY), app.add("b")]
            await app.idle()
        assert [type(sent.one.error) for sent in failed] == [StorageFull, StorageFull]
        assert app.committer.published_ts == ts
        assert app.names() == ["before"]
        again = app.add("a", key=KEY)
        await app.idle()
        assert again.has_succeeded
        assert again.one.ts > ts
        assert app.names() == ["before", "a"]


async def test_with_a_full_disk_reads_and_subscriptions_go_on_and_writes_do_when_there_is_room() -> None:
    async with small_engine() as app:
        await app.mutate("notes:add", room="a", text="before")
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        await subscriber.catch_up()
        with full_disk(app.engine.database.writer):
            sent = app.send("notes:add", 1, room="a", text=LARGE)
            await app.idle()
            assert sent.outcome.failure is not None
            assert sent.outcome.failure.code == "StorageFull"
            assert await app.engine.query("notes:texts", room="a") == ["before"]
            late = app.subscriber()
            late.ask(0, "notes:texts", room="a")
            await late.catch_up()
            assert late.value() == ["before"]
        resent = app.send("notes:add", 1, room="a", text=LARGE)
        await app.idle()
        assert resent.outcome.failure is None
        await subscriber.catch_up()
        await late.catch_up()
        assert (subscriber.value(), late.value()) == (2, ["before", LARGE])
        assert not app.engine.failed.done()


# -- storage that cannot be trusted


def fail_commit(patch: pytest.MonkeyPatch, writer: WriterConnection, code: int) -> None:
    """COMMIT fails with the given code; everything else is SQLite."""
    execute = writer._execute

    def failing(sql: str, *parameters: object) -> sqlite3.Cursor:
        if sql == "COMMIT":
            error = sqlite3.OperationalError("injected")
            error.sqlite_errorcode = code
            raise error
        return execute(sql, *parameters)  # type: ignore[arg-type]

    patch.setattr(writer, "_execute", failing)


async def test_after_an_unknown_commit_nothing_is_answered_and_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_committer(group_commit_count_max=2) as app:
        fail_commit(monkeypatch, app.database.writer, sqlite3.SQLITE_IOERR_FSYNC)
        sent = [app.add(name) for name in "abc"]
        assert isinstance(await app.until_fatal(), CommitUnknown)
        assert [one.settled for one in sent] == [[], [], []]
        assert [one.run_count for one in sent] == [1, 1, 0]
        assert app.names() == []
        again = app.add("a")  # a refusal would say that it is not applied
        await asyncio.sleep(0)
        assert (again.settled, again.run_count) == ([], 0)


async def test_an_unknown_commit_fails_the_engine_and_whoever_waits_in_its_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "engine.db"
    async with small_engine(path) as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        await subscriber.catch_up()
        told_before = subscriber.told_count
        fail_commit(monkeypatch, app.engine.database.writer, sqlite3.SQLITE_IOERR_FSYNC)
        sent = app.send("notes:add", 1, room="a", text="x")
        async with asyncio.timeout(SECONDS_MAX):
            with pytest.raises(CommitUnknown):
                await app.engine.mutation("notes:add", room="a", text="y")
            assert isinstance(await app.engine.failed, CommitUnknown)
            with pytest.raises(CommitUnknown):
                await app.engine.mutation("notes:add", room="a", text="z")
        assert sent.answers == []
        assert subscriber.told_count == told_before
    monkeypatch.undo()
    async with small_engine(path) as app:  # here nothing was on disk: the ledger knows, and it is applied once
        sent, again = (app.send("notes:add", 1, room="a", text="x") for _ in range(2))
        await app.idle()
        assert sent.outcome.value == again.outcome.value
        assert await app.engine.query("notes:texts", room="a") == ["x"]


async def test_a_caller_in_the_process_that_is_cancelled_stops_waiting_and_its_mutation_goes_on() -> None:
    async with small_engine() as app:
        caller = asyncio.create_task(app.engine.mutation("notes:add", room="a", text="x"))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await app.idle()
        assert await app.engine.query("notes:texts", room="a") == ["x"]


async def test_when_the_engine_ends_a_caller_gets_the_reason_and_its_task_may_go_on() -> None:
    async with small_engine() as app:

        async def call() -> int:
            with pytest.raises(EngineClosed):
                await app.engine.mutation("notes:add", room="a", text="x")
            await asyncio.sleep(0)  # raises in a task that is still being cancelled
            task = asyncio.current_task()
            assert task is not None
            return task.cancelling()

        caller = asyncio.create_task(call())
        await asyncio.sleep(0)
        app.engine.abandon()
        assert await caller == 0


async def test_a_bug_of_ours_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_committer() as app:

        async def publish(group: Group) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(app.committer, "_publish", publish)
        sent = app.add("a")
        error = await app.until_fatal()
        assert isinstance(error.__cause__, ZeroDivisionError)
        assert not sent.settled


# -- other programs


@contextmanager
def lock_of_another_program(database: Database) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


async def test_a_lock_of_another_program_is_waited_for_while_the_loop_serves_others() -> None:
    async with open_committer() as app:
        with lock_of_another_program(app.database) as other:
            sent = app.add("a")
            await app.until_it_waits()
            app.clock.advance(4.9)
            await app.until_it_waits()
            assert not sent.settled
            assert app.names() == []
            other.execute("ROLLBACK")
        app.clock.advance(0.02)
        await app.idle()
        assert sent.has_succeeded


async def test_a_lock_that_is_kept_is_overload_for_all_who_wait_and_later_mutations_run() -> None:
    async with open_committer() as app:
        with lock_of_another_program(app.database):
            sent = [app.add(name) for name in "ab"]
            await app.until_it_waits()
            app.clock.advance(5)
            await app.idle()
            assert [type(one.one.error) for one in sent] == [Overloaded, Overloaded]
            assert [one.run_count for one in sent] == [0, 0]
        later = app.add("c")
        await app.idle()
        assert later.has_succeeded
        assert app.names() == ["c"]


async def test_a_commit_of_another_program_ends_it_before_anything_else_runs() -> None:
    async with open_committer() as app:
        with lock_of_another_program(app.database) as other:
            other.execute("CREATE TABLE theirs (number)")
            other.execute("COMMIT")
        sent = app.add("a")
        assert "another process wrote to this database" in str(await app.until_fatal())
        assert (sent.run_count, sent.settled) == (0, [])


async def test_so_does_one_that_was_made_under_the_lock_that_was_waited_for() -> None:
    async with open_committer() as app:
        with lock_of_another_program(app.database) as other:
            sent = app.add("a")
            await app.until_it_waits()
            other.execute("CREATE TABLE theirs (number)")
            other.execute("COMMIT")
        app.clock.advance(0.02)
        assert "another process wrote to this database" in str(await app.until_fatal())
        assert (sent.run_count, sent.settled) == (0, [])


# -- bounds and the end


async def test_past_the_bound_a_mutation_is_refused_at_once_and_those_that_wait_are_not_harmed() -> None:
    async with open_committer(mutation_pending_count_max=3) as app:
        sent = [app.add(name) for name in "abc"]
        with pytest.raises(Overloaded, match=r"mutations waiting: 3, 3 allowed\. Try again"):
            app.add("d")
        await app.idle()
        assert all(one.has_succeeded for one in sent)
        app.add("e")


async def test_closing_refuses_new_mutations_and_settles_those_that_wait() -> None:
    async with open_committer(group_commit_count_max=1) as app:
        sent = [app.add(name) for name in "abc"]
        app.committer.close()
        with pytest.raises(EngineClosed):
            app.add("d")
        await app.idle()
        assert all(one.has_succeeded for one in sent)


async def test_the_wal_is_bounded_under_load_while_readers_are_pinned() -> None:
    checkpoint_size_bytes = 1 << 20
    async with open_committer(wal_checkpoint_size_bytes=checkpoint_size_bytes) as app:
        sizes = []
        for _ in range(60):
            app.add(LARGE)
            await app.idle()
            assert app.snapshots.reader.in_transaction
            sizes.append(app.database.writer.wal_size_bytes())
        commit_size_bytes = max(sizes[0], *(after - before for before, after in pairwise(sizes)))
        assert max(sizes) <= checkpoint_size_bytes + commit_size_bytes
        assert os.stat(f"{app.database.path}-wal").st_size <= 2 * (checkpoint_size_bytes + commit_size_bytes)
        assert len(app.names()) == 60


async def test_a_snapshot_that_is_lent_keeps_its_state_and_the_wal_starts_anew_once_it_is_given_back() -> None:
    async with open_committer(wal_checkpoint_size_bytes=1 << 20) as app:
        app.add("a")
        await app.idle()
        reader = app.snapshots.lend(app.snapshots.ts)
        assert reader is not None
        for _ in range(20):
            app.add(LARGE)
            await app.idle()
        assert app.names(reader) == ["a"]
        held_size_bytes = app.database.writer.wal_size_bytes()
        assert held_size_bytes > 4_000_000
        app.snapshots.give_back(reader)
        for _ in range(10):
            app.add(LARGE)
            await app.idle()
        assert app.database.writer.wal_size_bytes() < held_size_bytes / 2


async def test_a_large_wal_is_cut_once_readers_let_go_though_nobody_writes() -> None:
    async with open_committer(wal_checkpoint_size_bytes=1 << 20, wal_kept_size_bytes=2 << 20) as app:
        app.add("a")
        await app.idle()
        reader = app.snapshots.lend(app.snapshots.ts)
        assert reader is not None
        for _ in range(20):
            app.add(LARGE)
            await app.idle()
        assert app.database.writer.wal_file_size_bytes() > 4_000_000
        app.clock.advance(5)
        await app.idle()
        assert app.database.writer.wal_file_size_bytes() > 4_000_000, "the reader needs it"
        app.snapshots.give_back(reader)
        app.clock.advance(5)
        await until(lambda: app.database.writer.wal_file_size_bytes() == 0)
        assert app.clock.seconds_to_next_timer is None
        app.add("b")
        await app.idle()
        assert app.names(app.database.writer)[-1] == "b"


async def test_a_run_that_holds_an_old_snapshot_too_long_is_stopped_and_the_wal_stays_bounded() -> None:
    bounds = {
        "wal_checkpoint_size_bytes": 1 << 20,
        "wal_pinned_size_bytes_max": 3 << 20,
        "wal_kept_size_bytes": 1 << 20,
    }
    async with open_committer(**bounds) as app:
        app.add("a")
        await app.idle()
        reader = app.snapshots.lend(app.snapshots.ts)
        assert reader is not None
        sizes = []
        for _ in range(40):
            app.add(LARGE)
            await app.idle()
            sizes.append(app.database.writer.wal_file_size_bytes())
        assert max(sizes) < (4 << 20) + len(LARGE) * 3
        with pytest.raises(LimitExceeded, match=r"raise limits\.wal_pinned_size_bytes_max"):
            app.names(reader)
        app.snapshots.give_back(reader)


# -- room on the disk


async def test_with_little_room_only_an_operators_deletes_commit_and_what_the_engine_writes_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_committer(free_size_bytes_min=1_000) as app:
        room = {"size_bytes": 1_000}
        monkeypatch.setattr(app.database.writer, "room_size_bytes", lambda: room["size_bytes"])
        told: list[bool] = []
        app.committer.on_short = told.append
        ids: list[str] = []

        def insert(transaction: WriteTransaction) -> bytes:
            ids.append(transaction.insert(Thing(name="a")))
            return b"null"

        def delete(transaction: WriteTransaction) -> bytes:
            transaction.delete(ids[0])
            return b"null"

        def replace(transaction: WriteTransaction) -> bytes:
            delete(transaction)
            return insert(transaction)

        def look(transaction: WriteTransaction) -> bytes:
            return b"null"

        app.submit(insert, function="things:add")
        await app.idle()
        assert told == []
        room["size_bytes"] = 999
        app.clock.advance(1)
        refused = [
            app.submit(insert, function="things:add"),
            app.submit(delete, function="things:delete"),
            app.submit(replace, function="things:replace", is_admin=True),
        ]
        looked = app.submit(look, function="things:look")
        await app.idle()
        assert [type(sent.one.error) for sent in refused] == [StorageFull] * 3
        assert "less than 1,000 bytes left" in str(refused[0].one.error)
        assert looked.has_succeeded
        assert told == [True]
        assert app.names() == ["a"]
        deleted = app.submit(delete, function="things:delete", is_admin=True)
        own = app.submit(insert)
        await app.idle()
        assert deleted.has_succeeded
        assert own.has_succeeded
        room["size_bytes"] = 1_000
        app.clock.advance(1)
        taken = app.submit(insert, function="things:add")
        await app.idle()
        assert taken.has_succeeded
        assert told == [True, False]


async def test_a_request_that_was_answered_before_gets_its_answer_when_its_group_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refusal would tell its client that it was not applied."""
    async with open_committer() as app:
        first = app.add("a", key=KEY)
        await app.idle()
        with monkeypatch.context() as patch:
            fail_commit(patch, app.database.writer, sqlite3.SQLITE_FULL)
            again, other = app.add("a", key=KEY), app.add("b")
            await app.idle()
        assert again.one == Settled(first.one.ts, recorded=b'"added"')
        assert isinstance(other.one.error, StorageFull)
        with lock_of_another_program(app.database):
            again, other = app.add("a", key=KEY), app.add("b")
            await app.until_it_waits()
            app.clock.advance(5)
            await app.idle()
        assert again.one == Settled(first.one.ts, recorded=b'"added"')
        assert isinstance(other.one.error, Overloaded)
        assert app.names() == ["a"]


async def test_what_a_full_disk_refused_is_told_once_and_so_is_the_end_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_committer() as app:
        told: list[bool] = []
        app.committer.on_short = told.append
        with monkeypatch.context() as patch:
            fail_commit(patch, app.database.writer, sqlite3.SQLITE_FULL)
            for name in "abc":
                app.add(name)
                await app.idle()
        assert told == [True]
        app.add("d")
        await app.idle()
        assert told == [True, False]


async def test_a_checkpoint_that_the_disk_refuses_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_committer(wal_checkpoint_size_bytes=1) as app:

        def fail(mode: str = "PASSIVE") -> None:
            raise StorageFailed("injected")

        monkeypatch.setattr(app.database.writer, "checkpoint", fail)
        app.add("a")
        assert isinstance(await app.until_fatal(), StorageFailed)


# -- lingering


def insert_one(transaction: WriteTransaction) -> bytes:
    transaction.insert(Thing(name="a"))
    return b"null"


async def test_mutations_that_linger_share_a_commit_when_the_first_has_waited_long_enough() -> None:
    async with open_committer() as app:
        sent = [app.submit(insert_one, linger_seconds=linger_seconds) for linger_seconds in (0.02, 60, 60)]
        await asyncio.sleep(0)
        sent.append(app.submit(insert_one, linger_seconds=60))
        assert not any(each.settled for each in sent)
        await app.idle()
        assert all(each.has_succeeded for each in sent)
        assert [len(group.settled) for group in app.groups] == [4]


async def test_a_mutation_that_cannot_wait_takes_those_that_linger_along() -> None:
    async with open_committer() as app:
        lingering = app.submit(insert_one, linger_seconds=60)
        await asyncio.sleep(0)
        assert not lingering.settled
        app.submit(insert_one)
        await app.idle()
        late = app.submit(insert_one, linger_seconds=0.01)
        await app.idle()
        assert lingering.has_succeeded
        assert late.has_succeeded
        assert [len(group.settled) for group in app.groups] == [2, 1]


async def test_what_lingers_is_committed_when_the_engine_closes() -> None:
    async with open_committer() as app:
        lingering = app.submit(insert_one, linger_seconds=60)
        app.committer.close()
        await app.idle()
        assert lingering.has_succeeded


async def test_those_that_found_no_room_in_a_group_do_not_wait_for_anybody() -> None:
    async with open_committer(group_commit_count_max=2) as app:
        sent = [app.submit(insert_one, linger_seconds=0.01) for _ in range(5)]
        await app.idle()
        assert all(each.has_succeeded for each in sent)
        assert [len(group.settled) for group in app.groups] == [2, 2, 1]
