"""Running functions: what a run is given, how it ends, and what becomes of its errors.

    query     reads one snapshot; its result, read set and the identity parts it read make a live query
    mutation  runs inside its savepoint on the writer; the committer decides what becomes of it
    action    runs as a task of its own, outside any transaction

Invariants
  1. Whatever a function raises ends as a `Failure`; only errors of the engine itself (InternalError) go on.
  2. A nested query or mutation shares the run of its caller: its time, limits, identity and snapshot.
"""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from engine.clock import Clock, cpu_clock
from engine.errors import EngineError, InternalError, InvalidArgument, LimitExceeded
from engine.events import ActionRan, Events, MutationRan
from engine.functions.arguments import Arguments
from engine.functions.calls import ActionCalls, Call, NestedCalls, Outcome, Transactions
from engine.functions.context import ActionCtx, FunctionReference, MutationCtx, QueryCtx
from engine.functions.failures import Failure, Failures
from engine.functions.reader import DatabaseReader, DatabaseWriter
from engine.functions.registry import Function, FunctionKind, Registry
from engine.functions.run import RanLong, Run, RunStopped, Watchdog, drive, drive_cooperatively
from engine.functions.scheduling import ActionScheduler, MutationScheduler
from engine.identity import Caller, Part
from engine.limits import Limits
from engine.transaction.committer import Execution
from engine.transaction.read_set import ReadSet
from engine.transaction.transaction import ReadTransaction, WriteTransaction

T = TypeVar("T")

_cpu = cpu_clock()


class QueryRun(msgspec.Struct, frozen=True):
    """What one run of a query gave. Exactly one of `value` and `failure` is there."""

    value: bytes | None
    failure: Failure | None
    read_set: ReadSet
    parts: dict[Part, Any]  # what it read of the identity, and what it was
    journal: str | None
    log_lines: tuple[str, ...]
    duration_seconds: float


class Runner:
    """Runs the functions of one registry; the registry is swapped whole at a reload."""

    def __init__(
        self,
        registry: Registry,
        limits: Limits,
        clock: Clock,
        events: Events,
        *,
        cursor_secret: bytes,
        is_production: bool,
    ) -> None:
        self.registry = registry
        self.limits, self.clock, self.events = limits, clock, events
        self.failures = Failures(limits, clock, events, is_production=is_production)
        self._cursor_secret = cursor_secret
        self._is_production = is_production
        self._watchdog = Watchdog(limits)

    def close(self) -> None:
        self._watchdog.close()

    def resolve(self, kind: FunctionKind, path: str, arguments: bytes) -> Call:
        """What a client asks for. Raises FunctionNotFound, InvalidArgument, LimitExceeded."""
        return self._call(self.registry.public(path, kind), arguments)

    def resolve_any(self, kinds: tuple[FunctionKind, ...], path: str, arguments: bytes) -> Call:
        """What an operator or the scheduler asks for: internal functions too."""
        return self._call(self.registry.any(path, kinds), arguments)

    def call_of(self, target: FunctionReference, kinds: tuple[FunctionKind, ...], arguments: dict[str, Any]) -> Call:
        """What app code asks for, with Python values."""
        function = self.registry.any(target, kinds)
        return Call(function, _refusing(function, function.signature.from_python, arguments))

    def _call(self, function: Function, arguments: bytes) -> Call:
        if len(arguments) > self.limits.arguments_size_bytes_max:
            raise LimitExceeded(
                f"arguments of {function.path} in bytes",
                used=len(arguments),
                allowed=self.limits.arguments_size_bytes_max,
                remedy="Send less at once, or raise limits.arguments_size_bytes_max.",
            )
        return Call(function, _refusing(function, function.signature.decode, arguments))

    # -- queries

    def run_query(
        self, call: Call, caller: Caller, transaction: ReadTransaction, now: float, journal: str | None
    ) -> QueryRun:
        """Run a query at once. Raises RanLong when it holds the loop for run_slow_ms."""
        run = self._new_run(call, caller, transaction, journal=journal, may_run_long=False)
        start = self._start_query(call, run, transaction, now)
        began = _cpu()
        try:
            value = drive(self._watchdog, run, start)
            return self._ended(call, run, transaction, value, began)
        except RanLong:
            raise
        except (Exception, RunStopped) as error:  # noqa: BLE001 - invariant 1
            return self._query_failed(call, run, transaction, error, began)
        finally:
            run.end(transaction)

    async def run_long_query(
        self,
        call: Call,
        caller: Caller,
        transaction: ReadTransaction,
        now: float,
        journal: str | None,
    ) -> QueryRun:
        """Run a query that pauses every run_slow_ms, so that the loop serves others meanwhile."""
        run = self._new_run(call, caller, transaction, journal=journal, may_run_long=True, is_cooperative=True)
        start = self._start_query(call, run, transaction, now)
        began = _cpu()
        try:
            value = await drive_cooperatively(self._watchdog, run, start, lambda: asyncio.sleep(0))
            return self._ended(call, run, transaction, value, began)
        except (Exception, RunStopped) as error:  # noqa: BLE001 - invariant 1
            return self._query_failed(call, run, transaction, error, began)
        finally:
            run.end(transaction)

    def _start_query(self, call: Call, run: Run, transaction: ReadTransaction, now: float) -> Callable[[], Any]:
        ctx = self.query_ctx(run, transaction, now)
        return lambda: call.function.signature.call(call.function.callable, ctx, call.arguments)

    def _ended(self, call: Call, run: Run, transaction: ReadTransaction, value: Any, began: float) -> QueryRun:
        encoded = call.function.encode_result(value)
        return QueryRun(
            encoded, None, transaction.read_set, run.parts, run.journal, self._shown_log(run), _cpu() - began
        )

    def _query_failed(
        self, call: Call, run: Run, transaction: ReadTransaction, error: BaseException, began: float
    ) -> QueryRun:
        failure = self._failure_of(error, call)
        return QueryRun(
            None, failure, transaction.read_set, run.parts, run.journal, self._shown_log(run), _cpu() - began
        )

    # -- mutations

    def execute_mutation(self, call: Call, caller: Caller, transaction: WriteTransaction) -> Execution:
        """Run a mutation in the savepoint that is open; the committer keeps or undoes what it wrote."""
        run = self._new_run(call, caller, transaction, may_run_long=True)
        try:
            ctx = self.mutation_ctx(run, transaction)
            value = drive(
                self._watchdog,
                run,
                lambda: call.function.signature.call(call.function.callable, ctx, call.arguments),
            )
            encoded = call.function.encode_result(value)
            outcome = Outcome(encoded, None, self._shown_log(run))
        except (Exception, RunStopped) as error:  # noqa: BLE001 - invariant 1
            outcome = Outcome(None, self._failure_of(error, call), self._shown_log(run))
        finally:
            run.end(transaction)
        if self.events.listeners:
            self.events.emit(MutationRan(call.function.path, outcome.failure is None))
        return Execution(outcome.value, outcome)

    # -- actions

    async def run_action(self, call: Call, caller: Caller, transactions: Transactions) -> Outcome:
        """Run an action to its end or its time limit; a plain `def` runs in a thread, as it may block."""
        run = Run(call.function, call.arguments, caller, self.limits, may_run_long=True)
        calls = ActionCalls(self, run, transactions)
        now = self.clock.wall_ns() / 1_000_000
        ctx = ActionCtx(run, now, lambda: self.clock.entropy(16), calls, ActionScheduler(self, run, transactions))

        def invoke() -> Any:
            return call.function.signature.call(call.function.callable, ctx, call.arguments)

        timeout = asyncio.timeout(self.limits.action_seconds_max)
        try:
            async with timeout:
                if inspect.iscoroutinefunction(call.function.callable):
                    value = await invoke()
                else:
                    value = await asyncio.to_thread(invoke)
                    if inspect.isawaitable(value):
                        value = await value
            outcome = Outcome(call.function.encode_result(value), None, self._shown_log(run))
        except BaseException as error:
            if _is_from_outside(error):
                raise
            cause: BaseException = error
            if timeout.expired() and isinstance(error, TimeoutError):  # not the function's own
                cause = LimitExceeded(
                    f"run time in s of {call.function.path}",
                    used=self.limits.action_seconds_max,
                    allowed=self.limits.action_seconds_max,
                    remedy="Do less in one action, or raise limits.action_seconds_max.",
                )
                cause.__cause__ = error
            outcome = Outcome(None, self._failure_of(cause, call), self._shown_log(run))
        finally:
            run.end()
        if self.events.listeners:
            self.events.emit(ActionRan(call.function.path, outcome.failure is None))
        return outcome

    # -- contexts, also for nested calls

    def query_ctx(self, run: Run, transaction: ReadTransaction, now: float) -> QueryCtx:
        return QueryCtx(
            run, now, self._seed_of(run), NestedCalls(self, run, transaction, now), DatabaseReader(transaction, run)
        )

    def mutation_ctx(self, run: Run, transaction: WriteTransaction) -> MutationCtx:
        now = transaction.now
        return MutationCtx(
            run,
            now,
            self._seed_of(run, now),
            NestedCalls(self, run, transaction, now),
            DatabaseWriter(transaction, run),
            MutationScheduler(self, run, transaction),
        )

    def _seed_of(self, run: Run, now: float | None = None) -> Callable[[], bytes]:
        number = run.context_count
        run.context_count += 1
        return lambda: b"%b|%b|%r|%d" % (run.function.path.encode(), run.arguments.canonical, now, number)

    def _new_run(
        self,
        call: Call,
        caller: Caller,
        transaction: ReadTransaction,
        *,
        may_run_long: bool,
        journal: str | None = None,
        is_cooperative: bool = False,
    ) -> Run:
        run = Run(
            call.function,
            call.arguments,
            caller,
            self.limits,
            cursor_secret=self._cursor_secret,
            journal=journal,
            may_run_long=may_run_long,
            is_cooperative=is_cooperative,
        )
        run.begin(transaction)
        return run

    def _failure_of(self, error: BaseException, call: Call) -> Failure:
        if isinstance(error, InternalError):
            raise error
        return self.failures.of(error, call.function.path)

    def _shown_log(self, run: Run) -> tuple[str, ...]:
        return () if self._is_production else tuple(run.log_lines)


def _refusing(function: Function, decode: Callable[[T], Arguments], given: T) -> Arguments:
    """Arguments, which a `__post_init__` of the app may refuse with any exception."""
    try:
        return decode(given)
    except EngineError:
        raise
    except Exception as error:
        raise InvalidArgument(f"{function.path} refuses its arguments: {type(error).__name__}: {error}") from error


def _is_from_outside(error: BaseException) -> bool:
    """Whether somebody stops the task that an action runs in; what the action raises by itself is its failure."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return isinstance(error, KeyboardInterrupt | GeneratorExit)
