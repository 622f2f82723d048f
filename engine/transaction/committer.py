"""The mutation queue, group commit, and the published timestamp.

    waiting ──run on the loop, each in a savepoint──> ran ──COMMIT in a thread──> durable ──publish──> settled
                │ fails: rolled back to its savepoint           │ disk full: rolled back, all fail
                └─ the whole transaction is gone:               └─ anything else: CommitUnknown, stop
                   the others run again

    little room on the disk (`free_size_bytes_min`): only an operator's deletes commit, and what the engine writes for
    itself; looked at once a second, so it ends by itself

Invariants
  1. Mutations run one after another; a group is one SQLite transaction, one fsync.
  2. Nothing is settled before its group is durable and readers see it; then all of a group is, in the order it ran.
  3. Commit timestamps strictly grow, over restarts too: `max(last + 1, wall clock in ns)`.
  4. Readers move only inside `publish`, never while a COMMIT is under way.
  5. After CommitUnknown nothing is answered and nothing runs: only a restart can tell what is on disk.
  6. The WAL is checkpointed between two groups, never during one; what readers hold back is tried again, also when
     nobody writes, and a WAL file beyond `wal_kept_size_bytes` is cut when all of it is checkpointed.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from engine import faults
from engine.clock import Clock, TimerHandle, cpu_clock
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
_ROOM_LOOK_SECONDS = 1.0  # how old it may be what is known of the room on the disk
_WAL_LOOK_SECONDS = 5.0  # when a large WAL is looked at again that readers have held back
_cpu = cpu_clock()


class Execution(msgspec.Struct, frozen=True):
    """What running a mutation's function gave; made by `functions/runner.py`, which catches the app's errors."""

    value: bytes | None  # the result as JSON; None when the function failed and must be rolled back
    detail: Any  # for whoever submitted it


class Settled(msgspec.Struct, frozen=True):
    """How a mutation ended. Exactly one of `execution`, `recorded`, `error` is there."""

    ts: int  # its commit timestamp; for one that committed nothing, the newest it could have read
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
    is_admin: bool = False  # an operator has called it
    linger_seconds: float = 0  # how long it may wait for others to share its commit


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
        self._wal_timer: TimerHandle | None = None  # set while a large WAL is held back
        self._room_looked_at = -_ROOM_LOOK_SECONDS
        self._is_short = False  # of room on the disk, when it was looked at
        self._is_told_short = False
        self.on_short: Callable[[bool], None] = lambda is_short: None  # told of each change; set by the engine
        self._kept = Kept(limits)  # of what the writer sees
        self._wake = asyncio.Event()  # set while what waits is to be committed now
        self._linger_timer: asyncio.TimerHandle | None = None  # sets it; there while all that waits may wait
        self._worker = Worker("engine-commit")
        self._is_closing = False
        self._has_failed = False  # for good
        self._between_groups = asyncio.Lock()

    def submit(self, submission: Submission) -> None:
        """Queue a mutation; it is settled after its commit. Raises Overloaded or EngineClosed at once."""
        if self._has_failed:
            return  # 5: a refusal would be an answer, and it may have been applied when it came first
        if self._is_closing:
            raise EngineClosed("the engine is closing; connect again and resend.")
        if len(self._queue) >= self._limits.mutation_pending_count_max:
            raise Overloaded(
                f"mutations waiting: {len(self._queue):,}, {self._limits.mutation_pending_count_max:,} allowed. "
                "Try again, or raise limits.mutation_pending_count_max."
            )
        self._queue.append(submission)
        if not submission.linger_seconds:
            self._wake.set()
        elif self._linger_timer is None:  # the first decides for those that come after it
            loop = asyncio.get_running_loop()
            self._linger_timer = loop.call_later(submission.linger_seconds, self._wake.set)

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
                if not self._wake.is_set() and self._writer.wal_size_bytes() <= self._checkpoint_above_bytes:
                    await self._wake.wait()
                self._wake.clear()
                self._end_lingering()
                async with self._between_groups:
                    if self._queue:
                        await self._commit_group()
                    if self._writer.wal_size_bytes() > self._checkpoint_above_bytes:
                        await self._checkpoint()
                if self._wake.is_set():
                    # those who were just answered may join: else half of the callers of a closed loop wait for the
                    # other half, and there are 1.8 × the commits
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - a bug of ours is no better than unknown storage: invariant 5
            self._is_closing = self._has_failed = True
            self._on_fatal(error if isinstance(error, InternalError) else _bug(error))
        finally:
            self._end_lingering()
            if self._wal_timer is not None:
                self._wal_timer.cancel()
            self._worker.close()

    def _end_lingering(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

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
        if faults.plan is not None:
            await faults.plan.pause("commit.begun")
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
                if faults.plan is not None:
                    await faults.plan.pause("commit.before_sync")
                await self._worker.run(self._writer.commit)
                if faults.plan is not None:
                    await faults.plan.pause("commit.after_sync")
                self._ledger.keep()
                self._tell_short(self._is_short)
            except StorageFull as error:  # nothing of the group happened
                self._writer.rollback()
                self._ledger.undo()
                self._kept.clear()
                group = Group(
                    self.published_ts,
                    [(submission, self._unless_known(settled, error)) for submission, settled in group.settled],
                    WriteSet(),
                )
                self._tell_short(True)
                self._checkpoint_above_bytes = 0  # a WAL that starts anew needs no more room
        else:
            self._writer.rollback()
        assert group.ts >= self.published_ts, "invariant 3: timestamps grow"
        self.published_ts = group.ts
        await self._publish(group)
        if faults.plan is not None:
            await faults.plan.pause("commit.published")

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
                    await self._publish(self._failed(waiting, error))
                    return False
            await self._clock.sleep(_LOCKED_RETRY_SECONDS)

    def _unless_known(self, settled: Settled, error: EngineError) -> Settled:
        """How a mutation of a group that did not happen ends: it failed, unless an earlier group has applied it."""
        if settled.recorded is not None and settled.ts <= self.published_ts:
            return settled
        return Settled(self.published_ts, error=error)

    def _failed(self, submissions: Iterable[Submission], error: EngineError) -> Group:
        """A group of which nothing happened. Who has been answered before, gets that answer again, no refusal."""
        settled = []
        for submission in submissions:
            outcome = Settled(self.published_ts, error=error)
            if submission.key is not None:
                try:
                    recorded = self._ledger.lookup(self._writer, submission.key)
                    if recorded is not None:
                        outcome = Settled(recorded.ts, recorded=recorded.value)
                except RequestIdReused as refusal:
                    outcome = Settled(self.published_ts, error=refusal)
            settled.append((submission, outcome))
        return Group(self.published_ts, settled, WriteSet())

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
        self._look_for_room()
        end = _cpu() + self._limits.group_commit_ms_max / 1000
        while self._queue and len(settled) < self._limits.group_commit_count_max:
            submission = self._queue.popleft()
            outcome = self._run_one(submission, write_set)
            if not self._writer.in_transaction:
                # SQLite rolled the whole transaction back (interrupt, FULL, NOMEM, IOERR): nobody of the group has
                # been answered, so the others run again in the next group and only this one fails. (Not in this one:
                # another program may hold the lock by now, and `_begin` waits for it.)
                self._queue.extendleft(other for other, _ in reversed(settled))
                self._wake.set()
                self._ledger.undo()
                self._kept.clear()
                if outcome.error is None:
                    outcome = Settled(self.published_ts, error=StorageFull("storage refused a write; try again."))
                self._tell_short(True)
                return Group(self.published_ts, [(submission, outcome)], WriteSet())
            settled.append((submission, outcome))
            if _cpu() > end:
                break
        if self._queue:
            self._wake.set()
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
            if faults.plan is not None:
                faults.plan.reach("mutation.ran")
            if not writer.in_transaction:
                return Settled(self.published_ts)
            if execution.value is None:
                writer.rollback_to()
                writer.release()
                transaction.undone()
                return Settled(self._last_ts, execution=execution)
            write_set = transaction.write_set
            # what wrote nothing is recorded too: sent again it might write, having been answered that it did not
            is_to_commit = key is not None or len(write_set) or transaction.has_hidden_writes
            if is_to_commit and self._is_short:
                self._check_room(submission, write_set)
            if key is not None:
                self._ledger.check_room()
            writer.release()
            if is_to_commit:
                self._last_ts = max(self._last_ts + 1, self._clock.wall_ns())
                group_writes.merge(write_set)
                if key is not None:
                    self._ledger.record(key, self._last_ts, execution.value)
            return Settled(self._last_ts, execution=execution, write_set=write_set)
        except RequestIdReused as error:  # from the look-up, before anything ran
            return Settled(self._last_ts, error=error)
        except Overloaded as error:  # there is no room for it, after the function ran; a full disk undoes the group
            if writer.in_transaction:
                writer.rollback_to()
                writer.release()
                transaction.undone()
            return Settled(self._last_ts, error=error)

    # -- room on the disk

    def _look_for_room(self) -> None:
        now = self._clock.monotonic()
        if now < self._room_looked_at + _ROOM_LOOK_SECONDS:
            return
        self._room_looked_at = now
        room_size_bytes = self._writer.room_size_bytes()
        self._is_short = room_size_bytes is not None and room_size_bytes < self._limits.free_size_bytes_min
        if self._is_short:
            self._tell_short(True)

    def _check_room(self, submission: Submission, write_set: WriteSet) -> None:
        """Raises StorageFull for what could take the room that is kept for making room."""
        if not submission.function or (submission.is_admin and all(write.new is None for write in write_set)):
            return
        raise StorageFull(
            f"the disk of the database has less than {self._limits.free_size_bytes_min:,} bytes left: nothing was "
            "written. Try again when there is room; an operator may delete documents, or lower "
            "limits.free_size_bytes_min."
        )

    def _tell_short(self, is_short: bool) -> None:
        if is_short is not self._is_told_short:
            self._is_told_short = is_short
            self.on_short(is_short)

    # -- the WAL

    async def _checkpoint(self) -> None:
        """Copy the WAL into the database file, then let the next write start the WAL anew.

        A reader that is pinned on frames of the WAL keeps it from starting anew (sqlite.org/wal.html), so the readers
        move before, to the newest commit, and after, off the WAL.
        """
        limits, writer = self._limits, self._writer
        with contextlib.suppress(StorageFull):  # it stays in the WAL for now
            if faults.plan is not None:
                await faults.plan.pause("checkpoint.begun")
            await self._worker.run(writer.checkpoint)
        self._refresh_readers()
        held_size_bytes = writer.wal_size_bytes()
        # what a pinned reader holds back is not tried again with every group
        self._checkpoint_above_bytes = held_size_bytes + limits.wal_checkpoint_size_bytes
        if held_size_bytes > limits.wal_kept_size_bytes:
            if self._wal_timer is None:
                self._wal_timer = self._clock.call_later(_WAL_LOOK_SECONDS, self._look_at_wal)
        elif not held_size_bytes and writer.wal_file_size_bytes() > limits.wal_kept_size_bytes:
            await self._worker.run(partial(writer.checkpoint, "TRUNCATE"))

    def _look_at_wal(self) -> None:
        self._wal_timer = None
        self._checkpoint_above_bytes = 0
        self._wake.set()


def _bug(error: Exception) -> InternalError:
    internal = InternalError(f"a group commit failed: {type(error).__name__}: {error}")
    internal.__cause__ = error
    return internal
