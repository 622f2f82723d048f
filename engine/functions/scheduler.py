"""Runs jobs and crons when they are due.

    pending ──due, a mutation──> its effects and `succeeded`, one commit; if it raises, no effects and `failed`
       │    ──due, an action───> `running` (committed) ──> action ──> `succeeded` | `failed`
       │                            │                    the server stopped meanwhile: `failed` at the next start
       └── cancelled <── cancel ────┘
    instead of `failed`: `pending` again, later, if the function has retries left and did not fail with an AppError

Invariants
  1. A mutation job takes effect exactly once: the effects and the state of the job are one commit.
  2. An action job starts at most once, and once more for each retry that its function declares.
  3. A cron has one row and so never two runs at a time; of the times that were missed only the last is made up for,
     and none comes twice, though the clock be set back.
  4. At most `scheduler_batch_count` jobs are under way, and at most `scheduler_mutation_count` of them in the queue of
     the committer, so a backlog starves nobody.

When something is due is a matter of the wall clock, not of `ctx.now`: that stands still where the clock was set back.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from engine import faults
from engine.clock import Clock, TimerHandle
from engine.errors import AppError, EngineClosed, EngineError, Overloaded, RequestError
from engine.events import Events, JobFinished
from engine.functions.calls import Transactions
from engine.functions.failures import Failure
from engine.functions.jobs import CronJob, ScheduledJob
from engine.functions.outcomes import Call, Outcome
from engine.functions.runner import Runner
from engine.identity import SYSTEM
from engine.ranges import IndexRange, before, key_prefix
from engine.transaction.committer import Committer, Execution, Settled, Submission
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import WriteTransaction
from engine.transaction.write_set import WriteSet

_KEPT_MS = 7 * 86_400_000.0  # how long ended jobs can be looked at
_SWEEP_SECONDS = 600.0  # between two sweeps of old jobs and ledger rows
_SWEEP_COUNT = 1_000  # rows one sweep deletes at most, so that it stays short
_RETRY_SECONDS = 1.0  # after an overload
_BACKOFF_MS, _BACKOFF_MS_MAX = 1_000.0, 3_600_000.0  # before the first retry of a job; doubled before each other one
_TIMER_SECONDS_MAX = 600.0  # the wall clock may be set meanwhile, or the machine sleep, and timers notice neither
_SET_BACK_MS_MAX = 3 * 3_600_000.0  # a clock that is set back further was wrong before: crons go by the new time
_ERROR_LENGTH_MAX = 4_096
_JOBS, _CRONS = ScheduledJob.__table_name__, CronJob.__table_name__
_NOTHING = b"null"


class _Ending(msgspec.Struct, frozen=True):
    """How one attempt ended."""

    error: str | None  # None: it succeeded
    is_final: bool  # trying again would change nothing


_STOPPED = _Ending("the server stopped while it ran", is_final=False)


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
        self._task_by_id: dict[str, asyncio.Task[None]] = {}  # actions under way, by job or cron
        self._mutations: deque[tuple[ScheduledJob | CronJob, Submission]] = deque()  # under way, not in the queue yet
        self._queued_count = 0  # mutations under way that are
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
        await self._transactions.write(lambda transaction, _: self._sync_crons(transaction))

    def committed(self, write_set: WriteSet) -> None:
        """A commit was published: if it changed jobs, stop those that it cancelled, and look when the next is due."""
        written = [write for write in write_set if write.table.name in (_JOBS, _CRONS)]
        for write in written:
            task = self._task_by_id.get(write.document_id)
            if task is not None and isinstance(write.new, ScheduledJob) and write.new.state == "cancelled":
                task.cancel()
        if written:
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
        tasks = list(self._task_by_id.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- finding what is due

    def _look(self) -> None:
        """Start what is due, and set the timer for what comes next."""
        self._look_is_due = False
        if self._is_closed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._wall_ms
        transaction = self._read()
        next_due: list[float] = []
        count = self._runner.limits.scheduler_batch_count + 1  # what is under way, what can be started, what comes next
        waiting: list[ScheduledJob | CronJob] = [
            *transaction.find(ScheduledJob, "by_state_due", "pending", limit=count),
            *transaction.find(CronJob, "by_state_next", "waiting", limit=count),
        ]
        for document in waiting:
            due_at = document.due_at if isinstance(document, ScheduledJob) else document.next_at
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

    def _start(self, document: ScheduledJob | CronJob) -> None:
        if faults.plan is not None:
            faults.plan.reach("job.due")
        arguments = document.arguments if isinstance(document, ScheduledJob) else b"{}"
        try:
            call = self._runner.resolve_any(("mutation", "action"), document.path, arguments)
        except RequestError as error:  # the function is gone, or takes other arguments now
            failure = self._runner.failures.of(error, document.path)
            self._submit(document, lambda transaction: failure)
            return
        if call.function.kind == "action":
            task = self._task_by_id[document.id] = asyncio.create_task(self._run_action(document, call))
            task.add_done_callback(lambda task: self._forget(document.id, task))
        else:
            self._submit(
                document,
                lambda transaction: self._runner.execute_stored(document.path, arguments, SYSTEM, transaction),
            )

    # -- running

    def _submit(self, document: ScheduledJob | CronJob, run: Callable[[WriteTransaction], Failure | None]) -> None:
        """Have a mutation run, and how it ended recorded, as one commit."""
        states: list[str] = []  # of each time that it ran: again, if storage undid its group

        def execute(transaction: WriteTransaction) -> Execution:
            if not _is_still_due(transaction, document):
                return Execution(_NOTHING, None)
            failure = run(transaction)
            if faults.plan is not None:
                faults.plan.reach("job.ran")
            if not transaction.is_open:
                return Execution(None, None)  # storage has undone the group: the committer sees it
            states.append(self._end(transaction, document.id, _ending_of(failure)))
            return Execution(_NOTHING, None)

        def settle(settled: Settled) -> None:
            self._queued_count -= 1
            self._settled(document, settled.error)
            if settled.error is None and states:
                self._tell(document, states[-1])
            self._submit_more()

        self._mutations.append((document, Submission(execute, settle, function=document.path)))
        self._submit_more()

    def _submit_more(self) -> None:
        """Put mutations into the queue as far as invariant 4 goes."""
        while self._mutations and self._queued_count < self._runner.limits.scheduler_mutation_count:
            document, submission = self._mutations.popleft()
            try:
                self._committer.submit(submission)
                self._queued_count += 1
            except (Overloaded, EngineClosed) as error:
                self._settled(document, error)

    async def _run_action(self, document: ScheduledJob | CronJob, call: Call) -> None:
        try:
            is_due = await self._transactions.write(lambda transaction, now: _claim(transaction, document, now))
            if is_due:
                if faults.plan is not None:
                    await faults.plan.pause("action.claimed")
                outcome: Outcome = await self._runner.run_action(call, SYSTEM, self._transactions)
                if faults.plan is not None:
                    await faults.plan.pause("action.ran")
                self._tell(document, await self._record(document, _ending_of(outcome.failure)))
                if faults.plan is not None:
                    await faults.plan.pause("action.recorded")
            self._settled(document, None)
        except (Overloaded, EngineClosed) as error:
            self._settled(document, error)
        except asyncio.CancelledError:
            self._settled(document, None)  # the job was cancelled, and its row says so; or the server stops
            raise

    async def _record(self, document: ScheduledJob | CronJob, ending: _Ending) -> str:
        """Write down how an action ended: it has run, so this is tried until it succeeds. Gives the new state."""
        while True:
            try:
                return await self._transactions.write(
                    lambda transaction, _: self._end(transaction, document.id, ending)
                )
            except Overloaded:
                await self._clock.sleep(_RETRY_SECONDS)

    def _forget(self, document_id: str, task: "asyncio.Task[None]") -> None:
        if self._task_by_id.get(document_id) is task:
            del self._task_by_id[document_id]

    def _settled(self, document: ScheduledJob | CronJob, error: EngineError | None) -> None:
        """It is recorded as ended, or could not be for now."""
        self._under_way.discard(document.id)
        if error is None:
            # the next turn: the commit that has just ended this one is published then; once for all that it ended
            if not self._look_is_due:
                self._look_is_due = True
                asyncio.get_running_loop().call_soon(self._look)
        elif not self._is_closed:
            self._clock.call_later(_RETRY_SECONDS, self._look)

    def _tell(self, document: ScheduledJob | CronJob, state: str) -> None:
        if self._events.listeners and state != "pending":
            self._events.emit(JobFinished(document.path, state))

    # -- the rows

    def _end(self, transaction: WriteTransaction, document_id: str, ending: _Ending) -> str:
        """Write down how one attempt ended; gives the state of the job now, of a cron that of the attempt."""
        transaction.lift_limits()
        now = self._wall_ms
        document = transaction.get(document_id)
        state = "succeeded" if ending.error is None else "failed"
        if isinstance(document, ScheduledJob):
            if document.state == "cancelled":
                return document.state
            attempts = document.attempts + (document.state == "pending")  # an action was counted when it started
            changes: dict[str, Any] = {"attempts": attempts, "error": ending.error, "finished_at": now}
            function = self._runner.registry.by_path.get(document.path)
            if not ending.is_final and function is not None and attempts <= function.retry_count:
                state = "pending"
                changes |= {"due_at": now + min(_BACKOFF_MS * 2 ** (attempts - 1), _BACKOFF_MS_MAX)}
            transaction.patch(document_id, {"state": state, **changes})
        elif isinstance(document, CronJob):
            function = self._runner.registry.by_path.get(document.path)
            if function is None or function.cron is None:
                transaction.delete(document_id)
            else:
                next_at = function.cron.next_ms(max(now, document.next_at))  # 3
                transaction.patch(document_id, {"state": "waiting", "next_at": next_at, "last_error": ending.error})
        return state

    def _recover(self, transaction: WriteTransaction, _: float) -> None:
        """What ran when the server stopped: an action job has failed, a cron waits for its next time."""
        for document in (
            *transaction.find(ScheduledJob, "by_state_due", "running"),
            *transaction.find(CronJob, "by_state_next", "running"),
        ):
            self._end(transaction, document.id, _STOPPED)

    def _sync_crons(self, transaction: WriteTransaction) -> None:
        transaction.lift_limits()
        now = self._wall_ms
        wanted = {function.path: function.cron for function in self._runner.registry.by_path.values() if function.cron}
        found = {row.path: row for row in transaction.find(CronJob, "by_path")}
        for path, cron in wanted.items():
            row, spec, next_at = found.pop(path, None), repr(cron), cron.next_ms(now)
            if row is None:
                transaction.insert(CronJob(path=path, spec=spec, next_at=next_at))
            elif row.spec != spec or row.next_at > next_at + _SET_BACK_MS_MAX:
                transaction.patch(row.id, {"spec": spec, "next_at": next_at})
        for row in found.values():
            if row.state != "running":  # else its end deletes it: were it back before that, two runs could overlap
                transaction.delete(row.id)

    @property
    def _wall_ms(self) -> float:
        return self._clock.wall_ns() / 1_000_000

    def _sweep_later(self, seconds: float = _SWEEP_SECONDS) -> None:
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._sweep_timer = self._clock.call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        """Delete jobs that ended long ago, and ledger rows past their days; see to it that crons go by the clock."""
        self._committer.forget_outcomes()
        oldest = self._wall_ms - _KEPT_MS
        is_all = True

        def execute(transaction: WriteTransaction) -> Execution:
            nonlocal is_all
            transaction.lift_limits()
            self._sync_crons(transaction)
            for state in ("succeeded", "failed", "cancelled"):
                document_type, index, ended = transaction.range_of(ScheduledJob, "by_state_finished", state)
                old = IndexRange(ended.table, ended.index, ended.start, before(key_prefix([state, oldest])))
                jobs = transaction.scan(document_type, index, old, descending=False, limit=_SWEEP_COUNT)
                for job in jobs:
                    transaction.delete(job.id)
                is_all = is_all and len(jobs) < _SWEEP_COUNT
            return Execution(_NOTHING, None)

        def settle(settled: Settled) -> None:
            if not is_all and not self._is_closed:
                self._sweep_later(_RETRY_SECONDS)

        self._sweep_later()
        with contextlib.suppress(Overloaded, EngineClosed):  # the next sweep does it
            self._committer.submit(Submission(execute, settle))


def _ending_of(failure: Failure | None) -> _Ending:
    """What the row of a job keeps of it: data of an AppError may be larger than a document may be."""
    if failure is None:
        return _Ending(None, is_final=True)
    return _Ending(failure.likeness[:_ERROR_LENGTH_MAX], is_final=failure.code == AppError.code)


def _is_still_due(transaction: WriteTransaction, document: ScheduledJob | CronJob) -> bool:
    """Whether nobody has cancelled or changed it since it was found due."""
    transaction.lift_limits()
    found = transaction.get(document.id)
    if isinstance(found, ScheduledJob):
        return found.state == "pending"
    return isinstance(found, CronJob) and isinstance(document, CronJob) and found.next_at == document.next_at


def _claim(transaction: WriteTransaction, document: ScheduledJob | CronJob, now: float) -> bool:
    """Mark as running before an action starts, so that nobody starts it again meanwhile (invariant 2)."""
    if not _is_still_due(transaction, document):
        return False
    changes: dict[str, Any] = {"state": "running"}
    if isinstance(document, ScheduledJob):
        changes |= {"started_at": now, "attempts": document.attempts + 1}
    transaction.patch(document.id, changes)
    return True
