"""`ctx.scheduler`: putting work into the job table. `scheduler.py` takes it from there."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from engine.errors import FunctionMisuse, LimitExceeded
from engine.functions.calls import Transactions
from engine.functions.context import FunctionReference
from engine.functions.jobs import ScheduledJob
from engine.functions.outcomes import Call
from engine.functions.run import Run
from engine.ids import Id
from engine.transaction.transaction import WriteTransaction

if TYPE_CHECKING:
    from engine.functions.runner import Runner


class _Scheduler:
    def __init__(self, runner: "Runner", run: Run) -> None:
        self._runner, self._run = runner, run

    def _job(self, function: FunctionReference, arguments: dict[str, Any], due_at: float) -> ScheduledJob:
        self._run.check_open()
        call: Call = self._runner.call_of(function, ("mutation", "action"), arguments)
        encoded = call.function.signature.to_wire_bytes(call.arguments)
        run, limits = self._run, self._run.limits
        run.schedule_count += 1
        run.schedule_size_bytes += len(encoded)
        for what, used, allowed, name in (
            ("jobs scheduled by one run", run.schedule_count, limits.schedule_count_max, "schedule_count_max"),
            ("bytes of arguments of one job", len(encoded), limits.schedule_job_size_bytes_max,
             "schedule_job_size_bytes_max"),
            ("bytes of arguments scheduled by one run", run.schedule_size_bytes, limits.schedule_size_bytes_max,
             "schedule_size_bytes_max"),
        ):  # fmt: skip
            if used > allowed:
                remedy = f"Schedule a job that schedules more, or raise limits.{name}."
                raise LimitExceeded(what, used=used, allowed=allowed, remedy=remedy)
        return ScheduledJob(path=call.function.path, arguments=encoded, due_at=due_at)

    def _due_after(self, delay: float | timedelta) -> float:
        """By the wall clock, as the scheduler looks at it: `ctx.now` stands still where that was set back."""
        return self._runner.clock.wall_ns() / 1_000_000 + _delay_ms(delay)

    def _insert(self, transaction: WriteTransaction, job: ScheduledJob) -> Id[ScheduledJob]:
        return cast("Id[ScheduledJob]", transaction.insert(job))


class MutationScheduler(_Scheduler):
    """Of a mutation: jobs are rows of the same transaction."""

    def __init__(self, runner: "Runner", run: Run, transaction: WriteTransaction) -> None:
        super().__init__(runner, run)
        self._transaction = transaction

    async def run_after(
        self, delay: float | timedelta, function: FunctionReference, /, **arguments: Any
    ) -> Id[ScheduledJob]:
        return await self.run_at(self._due_after(delay), function, **arguments)

    async def run_at(self, when_ms: float, function: FunctionReference, /, **arguments: Any) -> Id[ScheduledJob]:
        return self._insert(self._transaction, self._job(function, arguments, float(when_ms)))

    async def cancel(self, job_id: str) -> None:
        self._run.check_open()
        cancel_job(self._transaction, job_id, self._transaction.now)


class ActionScheduler(_Scheduler):
    """Of an action: each call is a commit of its own."""

    def __init__(self, runner: "Runner", run: Run, transactions: Transactions) -> None:
        super().__init__(runner, run)
        self._transactions = transactions

    async def run_after(
        self, delay: float | timedelta, function: FunctionReference, /, **arguments: Any
    ) -> Id[ScheduledJob]:
        return await self.run_at(self._due_after(delay), function, **arguments)

    async def run_at(self, when_ms: float, function: FunctionReference, /, **arguments: Any) -> Id[ScheduledJob]:
        job = self._job(function, arguments, float(when_ms))
        return await self._transactions.write(lambda transaction, now: self._insert(transaction, job))

    async def cancel(self, job_id: str) -> None:
        self._run.check_open()
        await self._transactions.write(lambda transaction, now: cancel_job(transaction, job_id, now))


def cancel_job(transaction: WriteTransaction, job_id: str, now: float) -> None:
    """Cancel a job that is still to come, or an action that runs: `scheduler.py` stops it after the commit."""
    job = transaction.get(job_id)
    if job is not None and not isinstance(job, ScheduledJob):
        raise FunctionMisuse(f"cancel: {job_id!r} is no id of a job; run_after and run_at give one.")
    if job is not None and job.state in ("pending", "running"):
        transaction.patch(job_id, {"state": "cancelled", "finished_at": now})


def _delay_ms(delay: float | timedelta) -> float:
    delay_ms = delay / timedelta(milliseconds=1) if isinstance(delay, timedelta) else float(delay)
    if not 0 <= delay_ms < 1e15:
        raise FunctionMisuse(f"run_after: a delay of {delay!r}; 0 ms or more.")
    return delay_ms
