"""Runs jobs and crons when they are due.

    pending ──due, a mutation──> its effects and `succeeded`, one commit; if it raises, no effects and `failed`
       │    ──due, an action───> `running` (committed) ──> action ──> `succeeded` | `failed`
       └── cancelled             the server stopped meanwhile: `failed` at the next start, never run twice

Invariants
  1. A mutation job takes effect exactly once: the effects and the state of the job are one commit.
  2. An action job starts at most once.
  3. A cron has one row and so never two runs at a time; a time that was missed is made up for once.
  4. At most `scheduler_batch_count` jobs are under way, so a backlog starves nobody.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

from engine.clock import Clock, TimerHandle
from engine.errors import EngineClosed, EngineError, Overloaded, RequestError
from engine.events import Events, JobFinished
from engine.functions.calls import Call, Outcome, Transactions
from engine.functions.failures import Failure
from engine.functions.jobs import CronJob, ScheduledJob
from engine.functions.registry import Cron
from engine.functions.runner import Runner
from engine.identity import SYSTEM
from engine.ranges import IndexRange, after, before, key_prefix
from engine.schema import Table
from engine.transaction.committer import Committer, Execution, Settled, Submission
from engine.transaction.transaction import ReadTransaction, WriteTransaction
from engine.transaction.write_set import WriteSet

T = TypeVar("T")

_KEPT_MS = 7 * 86_400_000.0  # how long ended jobs can be looked at
_SWEEP_SECONDS = 600.0  # between two sweeps of old jobs and ledger rows
_SWEEP_COUNT = 1_000  # rows one sweep deletes at most, so that it stays short
_RETRY_SECONDS = 1.0  # after an overload
_TIMER_SECONDS_MAX = 3_600.0  # a wall clock may be set meanwhile
_ERROR_LENGTH_MAX = 4_096
_JOBS, _CRONS = ScheduledJob.__table_name__, CronJob.__table_name__
_NOTHING = b"null"


class JobScheduler:
    """The work of one engine that is to be done later."""

    def __init__(
        self,
        runner: Runner,
        committer: Committer,
        transactions: Transactions,
        read: Callable[[], ReadTransaction],
        clock: Clock,
        events: Events,
    ) -> None:
        self._runner, self._committer, self._transactions = runner, committer, transactions
        self._read, self._clock, self._events = read, clock, events
        self._under_way: set[str] = set()  # ids of jobs and crons that were started and are not recorded as ended
        self._tasks: set[asyncio.Task[None]] = set()  # actions
        self._timer: TimerHandle | None = None
        self._sweep_timer: TimerHandle | None = None
        self._look_is_due = False  # in the next turn of the loop
        self._is_closed = False

    async def start(self) -> None:
        """Take up what the last run of the server left, and wait for what is due."""
        await self._transactions.write(self._recover)
        await self.sync_crons()
        self._sweep_later()
        self._look()

    async def sync_crons(self) -> None:
        """Make the rows of crons match the functions of the registry."""
        wanted = {function.path: function.cron for function in self._runner.registry.by_path.values() if function.cron}
        await self._transactions.write(lambda transaction, now: _sync_crons(transaction, now, wanted))

    def committed(self, write_set: WriteSet) -> None:
        """A commit was published: if it changed jobs, look when the next is due."""
        if any(write.table.name in (_JOBS, _CRONS) for write in write_set):
            self._look()

    @property
    def is_idle(self) -> bool:
        """Whether no job is under way or due."""
        return not self._under_way and not self._look_is_due

    async def close(self) -> None:
        """Start nothing more; actions under way are cancelled and found as failed at the next start."""
        self._is_closed = True
        for timer in (self._timer, self._sweep_timer):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- finding what is due

    def _look(self) -> None:
        """Start what is due, and set the timer for what comes next."""
        self._look_is_due = False
        if self._is_closed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock.wall_ns() / 1_000_000
        transaction = self._read()
        next_due: list[float] = []
        for document in (
            *self._first(transaction, ScheduledJob, "by_state_due", "pending"),
            *self._first(transaction, CronJob, "by_state_next", "waiting"),
        ):
            due_at = document.due_at if isinstance(document, ScheduledJob) else cast(CronJob, document).next_at
            if document.id in self._under_way:
                continue
            if due_at > now:
                next_due.append(due_at)
            elif len(self._under_way) < self._runner.limits.scheduler_batch_count:
                self._under_way.add(document.id)
                self._start(document)
        if next_due:
            delay = min((min(next_due) - now) / 1000, _TIMER_SECONDS_MAX)
            self._timer = self._clock.call_later(max(delay, 0.001), self._look)

    def _first(self, transaction: ReadTransaction, table: type[Table], index_name: str, state: str) -> list[Any]:
        """The first documents in this state, by when they are due; more than can be under way."""
        transaction.lift_limits()
        codec = transaction.catalog.of_type(table)
        prefix = key_prefix([state])
        index_range = IndexRange(codec.table.name, index_name, before(prefix), after(prefix))
        count = self._runner.limits.scheduler_batch_count + len(self._under_way) + 1
        return transaction.scan(
            table, codec.table.indexes_by_name[index_name], index_range, descending=False, limit=count
        )

    def _start(self, document: ScheduledJob | CronJob) -> None:
        arguments = document.arguments if isinstance(document, ScheduledJob) else b"{}"
        try:
            call = self._runner.resolve_any(("mutation", "action"), document.path, arguments)
        except RequestError as error:  # the function is gone, or takes other arguments now
            failure = self._runner.failures.of(error, document.path)
            self._submit(
                document, lambda transaction, now: self._end(transaction, document.id, now, _error_of(failure))
            )
            return
        if call.function.kind == "action":
            task = asyncio.create_task(self._run_action(document, call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._submit_mutation(document, call)

    # -- running

    def _submit_mutation(self, document: ScheduledJob | CronJob, call: Call) -> None:
        failures: list[Failure | None] = []

        def execute(transaction: WriteTransaction) -> Execution:
            if not _is_still_due(transaction, document):
                return Execution(_NOTHING, None)
            savepoint = transaction.begin_nested()
            execution = self._runner.execute_mutation(call, SYSTEM, transaction)
            if execution.value is None:
                transaction.undo_nested(savepoint)
            else:
                transaction.end_nested(savepoint)
            if not transaction.is_open:
                return Execution(None, None)  # storage has undone the group: the committer sees it
            failure = execution.detail.failure
            failures.append(failure)
            self._end(transaction, document.id, self._clock.wall_ns() / 1_000_000, _error_of(failure))
            return Execution(_NOTHING, None)

        def settle(settled: Settled) -> None:
            self._settled(document, settled.error)
            if settled.error is None and failures:
                self._tell(document, failures[-1])

        self._try_submit(document, Submission(execute, settle))

    async def _run_action(self, document: ScheduledJob | CronJob, call: Call) -> None:
        try:
            is_due = await self._transactions.write(lambda transaction, now: _claim(transaction, document, now))
            if is_due:
                outcome: Outcome = await self._runner.run_action(call, SYSTEM, self._transactions)
                await self._record(document, _error_of(outcome.failure))
                self._tell(document, outcome.failure)
            self._settled(document, None)
        except (Overloaded, EngineClosed) as error:
            self._settled(document, error)

    async def _record(self, document: ScheduledJob | CronJob, error: str | None) -> None:
        """Write down how an action ended: it has run, so this is tried until it succeeds."""
        while True:
            try:
                await self._transactions.write(lambda transaction, now: self._end(transaction, document.id, now, error))
            except Overloaded:
                await self._clock.sleep(_RETRY_SECONDS)
            else:
                return

    def _submit(self, document: ScheduledJob | CronJob, work: Callable[[WriteTransaction, float], None]) -> None:
        def execute(transaction: WriteTransaction) -> Execution:
            if _is_still_due(transaction, document):
                work(transaction, self._clock.wall_ns() / 1_000_000)
            return Execution(_NOTHING, None)

        self._try_submit(document, Submission(execute, lambda settled: self._settled(document, settled.error)))

    def _try_submit(self, document: ScheduledJob | CronJob, submission: Submission) -> None:
        try:
            self._committer.submit(submission)
        except (Overloaded, EngineClosed) as error:
            self._settled(document, error)

    def _settled(self, document: ScheduledJob | CronJob, error: EngineError | None) -> None:
        """It is recorded as ended, or could not be for now."""
        self._under_way.discard(document.id)
        if error is None:
            # the next turn: the commit that has just ended this one is published then
            self._look_is_due = True
            asyncio.get_running_loop().call_soon(self._look)
        elif not self._is_closed:
            self._clock.call_later(_RETRY_SECONDS, self._look)

    def _tell(self, document: ScheduledJob | CronJob, failure: Failure | None) -> None:
        if self._events.listeners:
            self._events.emit(JobFinished(document.path, "failed" if failure else "succeeded"))

    # -- the rows

    def _end(self, transaction: WriteTransaction, document_id: str, now: float, error: str | None) -> None:
        transaction.lift_limits()
        document = transaction.get(document_id)
        if isinstance(document, ScheduledJob):
            state = "failed" if error is not None else "succeeded"
            transaction.patch(document_id, {"state": state, "error": error, "finished_at": now})
        elif isinstance(document, CronJob):
            function = self._runner.registry.by_path.get(document.path)
            if function is None or function.cron is None:
                transaction.delete(document_id)
                return
            next_at = function.cron.next_ms(now)
            transaction.patch(document_id, {"state": "waiting", "next_at": next_at, "last_error": error})

    def _recover(self, transaction: WriteTransaction, now: float) -> None:
        """What ran when the server stopped: an action job has failed, a cron waits for its next time."""
        for document in (
            *self._first(transaction, ScheduledJob, "by_state_due", "running"),
            *self._first(transaction, CronJob, "by_state_next", "running"),
        ):
            self._end(transaction, document.id, now, "the server stopped while it ran")

    def _sweep_later(self) -> None:
        self._sweep_timer = self._clock.call_later(_SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Delete jobs that ended long ago, and ledger rows past their days."""
        self._committer.forget_outcomes()
        oldest = self._clock.wall_ns() / 1_000_000 - _KEPT_MS

        def execute(transaction: WriteTransaction) -> Execution:
            transaction.lift_limits()
            codec = transaction.catalog.of_type(ScheduledJob)
            index = codec.table.indexes_by_name["by_state_finished"]
            for state in ("succeeded", "failed", "cancelled"):
                prefix = key_prefix([state])
                old = IndexRange(codec.table.name, index.name, before(prefix), before(prefix + key_prefix([oldest])))
                for job in transaction.scan(ScheduledJob, index, old, descending=False, limit=_SWEEP_COUNT):
                    transaction.delete(job.id)
            return Execution(_NOTHING, None)

        with contextlib.suppress(Overloaded, EngineClosed):  # the next sweep does it
            self._committer.submit(Submission(execute, lambda settled: None))
        self._sweep_later()


def _error_of(failure: Failure | None) -> str | None:
    """What the row of a job keeps of it: data of an AppError may be larger than a document may be."""
    return failure.likeness[:_ERROR_LENGTH_MAX] if failure is not None else None


def _is_still_due(transaction: WriteTransaction, document: ScheduledJob | CronJob) -> bool:
    """Whether nobody has cancelled or changed it since it was found due."""
    transaction.lift_limits()
    found = transaction.get(document.id)
    if isinstance(found, ScheduledJob):
        return found.state == "pending"
    return isinstance(found, CronJob) and isinstance(document, CronJob) and found.next_at == document.next_at


def _claim(transaction: WriteTransaction, document: ScheduledJob | CronJob, now: float) -> bool:
    """Mark as running before an action starts, so that it starts at most once (invariant 2)."""
    if not _is_still_due(transaction, document):
        return False
    changes: dict[str, Any] = {"state": "running"}
    if isinstance(document, ScheduledJob):
        changes["started_at"] = now
    transaction.patch(document.id, changes)
    return True


def _sync_crons(transaction: WriteTransaction, now: float, wanted: dict[str, Cron]) -> None:
    transaction.lift_limits()
    codec = transaction.catalog.of_type(CronJob)
    index = codec.table.indexes_by_name["by_path"]
    everything = IndexRange(codec.table.name, index.name, before(()), after(()))
    found: dict[str, CronJob] = {
        row.path: row for row in transaction.scan(CronJob, index, everything, descending=False, limit=None)
    }
    for path, cron in wanted.items():
        row, spec = found.pop(path, None), repr(cron)
        if row is None:
            transaction.insert(CronJob(path=path, spec=spec, next_at=cron.next_ms(now)))
        elif row.spec != spec:
            transaction.patch(row.id, {"spec": spec, "next_at": cron.next_ms(now)})
    for row in found.values():
        if row.state != "running":  # else its end deletes it: were it back before that, two runs could overlap
            transaction.delete(row.id)
