"""The mutation queue, group commit, and the published timestamp.

    waiting ──run on the loop, each in a savepoint──> ran ──COMMIT in a thread──> durable ──publish──> settled
                │ fails: rolled back to its savepoint           │ disk full: rolled back, all fail
                └─ the whole transaction is gone:               └─ anything else: CommitUnknown, stop
                   the others run again

Invariants
  1. Mutations run one after another; a group is one SQLite transaction, one fsync.
  2. Nothing is settled before its group is durable and readers see it; then all of a group is, in the order it ran.
  3. Commit timestamps strictly grow, over restarts too: `max(last + 1, wall clock in ns)`.
  4. Readers move only inside `publish`, never while a COMMIT is under way.
  5. After CommitUnknown nothing is answered and nothing runs: only a restart can tell what is on disk.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from engine.clock import Clock, cpu_clock
from engine.errors import EngineClosed, EngineError, InternalError, Overloaded, RequestIdReused, StorageFull
from engine.limits import Limits
from engine.storage.connections import WriterConnection
from engine.transaction.kept import Kept
from engine.transaction.ledger import Ledger, LedgerKey
from engine.transaction.reading import Catalog
from engine.transaction.transaction import TickSource, WriteTransaction
from engine.transaction.worker import Worker
from engine.transaction.write_set import WriteSet

_LOCKED_SECONDS_MAX = 5.0  # how long mutations wait for another program (an SQL shell) to let go of the database
_LOCKED_RETRY_SECONDS = 0.02
_cpu = cpu_clock()


class Execution(msgspec.Struct, frozen=True):
    """What running a mutation's function gave; made by `functions/runner.py`, which catches the app's errors."""

    value: bytes | None  # the result as JSON; None when the function failed and must be rolled back
    detail: Any  # for whoever submitted it


class Settled(msgspec.Struct, frozen=True):
    """How a mutation ended. Exactly one of `execution`, `recorded`, `error` is there."""

    ts: int  # its commit timestamp; for one that wrote nothing, the newest it could have read
    execution: Execution | None = None
    recorded: bytes | None = None  # the result of the first time this request came
    error: EngineError | None = None  # the engine's refusal, not the function's
    write_set: WriteSet | None = None  # of the execution, if it wrote


class Submission(msgspec.Struct, frozen=True):
    """A mutation in the queue."""

    execute: Callable[[WriteTransaction], Execution]
    settle: Callable[[Settled], None]  # called once, on the loop; never when the storage state is unknown
    key: LedgerKey | None = None
    function: str = ""  # its path, for whoever asks what wrote; empty: the engine itself


class Group(msgspec.Struct, frozen=True):
    """A durable group commit, about to be published."""

    ts: int
    settled: list[tuple[Submission, Settled]]
    write_set: WriteSet


class Committer:
    """The one writer of a database."""

    def __init__(
        self,
        writer: WriterConnection,
        catalog: Catalog,
        ledger: Ledger,
        limits: Limits,
        clock: Clock,
        publish: Callable[[Group], Awaitable[None]],
        refresh_readers: Callable[[], None],
        on_fatal: Callable[[InternalError], None],
    ) -> None:
        self._writer, self.catalog, self._ledger = writer, catalog, ledger
        self._limits, self._clock = limits, clock
        self._publish, self._refresh_readers, self._on_fatal = publish, refresh_readers, on_fatal
        writer.stop_waiting()
        self.published_ts, last_tick = writer.read_meta()
        self._last_ts = self.published_ts  # newest handed out; above `published_ts` while a group is open
        self._ticks = TickSource(clock, last_tick)
        self._queue: deque[Submission] = deque()
        self._is_forgetting = False
        self._checkpoint_above_bytes = limits.wal_checkpoint_size_bytes
        self._kept = Kept(limits)  # of what the writer sees
        self._wake = asyncio.Event()
        self._worker = Worker("engine-commit")
        self._is_closing = False
        self._between_groups = asyncio.Lock()

    def submit(self, submission: Submission) -> None:
        """Queue a mutation; it is settled after its commit. Raises Overloaded or EngineClosed at once."""
        if self._is_closing:
            raise EngineClosed("the engine is closing; connect again and resend.")
        if len(self._queue) >= self._limits.mutation_pending_count_max:
            raise Overloaded(
                f"mutations waiting: {len(self._queue):,}, {self._limits.mutation_pending_count_max:,} allowed. "
                "Try again, or raise limits.mutation_pending_count_max."
            )
        self._queue.append(submission)
        self._wake.set()

    def forget_outcomes(self) -> None:
        """Let ledger rows go that are no longer needed, with the next group that writes."""
        self._is_forgetting = True

    @asynccontextmanager
    async def between_groups(self) -> AsyncIterator[WriterConnection]:
        """The writer for something that is no mutation (a schema change); no group runs meanwhile."""
        async with self._between_groups:
            try:
                yield self._writer
            finally:
                self._kept.clear()  # it was not told

    async def run(self) -> None:
        """Commit groups until closed; ends at once, having told `on_fatal`, when storage cannot be trusted."""
        try:
            while self._queue or not self._is_closing:
                if not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                async with self._between_groups:
                    await self._commit_group()
                if self._queue:
                    # those who were just answered may join: else half of the callers of a closed loop wait for the
                    # other half, and there are 1.8 × the commits
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - a bug of ours is no better than unknown storage: invariant 5
            self._is_closing = True
            self._on_fatal(error if isinstance(error, InternalError) else _bug(error))
        finally:
            self._worker.close()

    @property
    def is_idle(self) -> bool:
        """Whether no mutation waits, runs or is being published."""
        return not self._queue and not self._between_groups.locked()

    def close(self) -> None:
        """Refuse new mutations; `run` ends when those that wait are settled."""
        self._is_closing = True
        self._wake.set()

    async def _commit_group(self) -> None:
        if not await self._begin():
            return
        if self._writer.foreign_commit_seen():  # also one that `_begin` waited for; from here on there can be none
            raise InternalError(
                "another process wrote to this database while it was being served. "
                "Stop that process: one engine is the only writer of its file."
            )
        group = self._run_group()
        # not by the writes: what one mutation made and the next one deleted was acknowledged all the same
        if group.ts > self.published_ts:
            try:
                self._close_group()
                await self._worker.run(self._writer.commit)
                self._ledger.keep()
            except StorageFull as error:  # nothing of the group happened
                self._writer.rollback()
                self._ledger.undo()
                self._kept.clear()
                group = Group(
                    self.published_ts,
                    [(submission, Settled(self.published_ts, error=error)) for submission, _ in group.settled],
                    WriteSet(),
                )
        else:
            self._writer.rollback()
        assert group.ts >= self.published_ts, "invariant 3: timestamps grow"
        self.published_ts = group.ts
        await self._publish(group)
        if self._writer.wal_size_bytes() > self._checkpoint_above_bytes:
            await self._checkpoint()

    async def _begin(self) -> bool:
        """Open the transaction; False when another program kept the database locked: then all that wait fail."""
        deadline = self._clock.monotonic() + _LOCKED_SECONDS_MAX
        while True:
            try:
                self._writer.begin()
                return True
            except Overloaded as error:
                if self._clock.monotonic() >= deadline:
                    waiting, self._queue = self._queue, deque()
                    failed = [(submission, Settled(self.published_ts, error=error)) for submission in waiting]
                    await self._publish(Group(self.published_ts, failed, WriteSet()))
                    return False
            await self._clock.sleep(_LOCKED_RETRY_SECONDS)

    def _close_group(self) -> None:
        """What goes into the group's transaction besides the mutations."""
        if self._is_forgetting:
            self._is_forgetting = not self._ledger.forget(self._writer, self._clock.wall_ns(), self._clock.monotonic())
        row_count = self._ledger.write(self._writer)
        self._writer.write_meta(self._last_ts, self._ticks.last_tick, row_count)

    def _run_group(self) -> Group:
        """Run mutations that wait, back to back, into one open transaction."""
        settled: list[tuple[Submission, Settled]] = []
        write_set = WriteSet()
        self._last_ts = self.published_ts
        end = _cpu() + self._limits.group_commit_ms_max / 1000
        while self._queue and len(settled) < self._limits.group_commit_count_max:
            submission = self._queue.popleft()
            outcome = self._run_one(submission, write_set)
            if not self._writer.in_transaction:
                # SQLite rolled the whole transaction back (interrupt, FULL, NOMEM, IOERR): nobody of the group has
                # been answered, so the others run again in the next group and only this one fails. (Not in this one:
                # another program may hold the lock by now, and `_begin` waits for it.)
                self._queue.extendleft(other for other, _ in reversed(settled))
                self._ledger.undo()
                self._kept.clear()
                if outcome.error is None:
                    outcome = Settled(self.published_ts, error=StorageFull("storage refused a write; try again."))
                return Group(self.published_ts, [(submission, outcome)], WriteSet())
            settled.append((submission, outcome))
            if _cpu() > end:
                break
        return Group(self._last_ts, settled, write_set)

    def _run_one(self, submission: Submission, group_writes: WriteSet) -> Settled:
        """Run one mutation in its savepoint; add its writes to the group's when it succeeds."""
        writer, key = self._writer, submission.key
        try:
            if key is not None and (recorded := self._ledger.find(writer, key)) is not None:
                return Settled(recorded.ts, recorded=recorded.value)
            writer.savepoint()
            transaction = WriteTransaction(writer, self.catalog, self._limits, self._ticks, self._clock, self._kept)
            execution = submission.execute(transaction)
            if not writer.in_transaction:
                return Settled(self.published_ts)
            if execution.value is None:
                writer.rollback_to()
                writer.release()
                transaction.undone()
                return Settled(self._last_ts, execution=execution)
            write_set = transaction.write_set
            has_written = len(write_set) or transaction.has_hidden_writes
            if has_written and key is not None:
                self._ledger.check_room()
            writer.release()
            if has_written:
                self._last_ts = max(self._last_ts + 1, self._clock.wall_ns())
                group_writes.merge(write_set)
                if key is not None:
                    self._ledger.record(key, self._last_ts, execution.value)
            return Settled(self._last_ts, execution=execution, write_set=write_set)
        except RequestIdReused as error:  # from the look-up, before anything ran
            return Settled(self._last_ts, error=error)
        except Overloaded as error:  # from the ledger, after the function ran; a full disk undoes the whole group
            if writer.in_transaction:
                writer.rollback_to()
                writer.release()
                transaction.undone()
            return Settled(self._last_ts, error=error)

    async def _checkpoint(self) -> None:
        """Copy the WAL into the database file, then let the next write start the WAL anew.

        A reader that is pinned on frames of the WAL keeps it from starting anew (sqlite.org/wal.html), so the readers
        move before, to the newest commit, and after, off the WAL.
        """
        with contextlib.suppress(StorageFull):  # it stays in the WAL for now
            await self._worker.run(self._writer.checkpoint)
        self._refresh_readers()
        # what a pinned reader holds back is not tried again with every group
        self._checkpoint_above_bytes = self._writer.wal_size_bytes() + self._limits.wal_checkpoint_size_bytes


def _bug(error: Exception) -> InternalError:
    internal = InternalError(f"a group commit failed: {type(error).__name__}: {error}")
    internal.__cause__ = error
    return internal
