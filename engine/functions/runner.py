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
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from engine.clock import Clock, cpu_clock, give_way
from engine.errors import EngineError, InternalError, InvalidArgument, LimitExceeded, RequestError
from engine.events import ActionRan, ClockRead, Events, MutationRan
from engine.functions.arguments import Arguments
from engine.functions.calls import ActionCalls, NestedCalls, Transactions
from engine.functions.context import ActionCtx, FunctionReference, MutationCtx, QueryCtx
from engine.functions.disconnects import MutationSession
from engine.functions.failures import Failure, Failures
from engine.functions.files import Files
from engine.functions.outcomes import Call, Outcome, QueryRun
from engine.functions.policies import Guard
from engine.functions.rate_limits import Limiter
from engine.functions.reader import DatabaseReader, DatabaseWriter
from engine.functions.registry import Function, FunctionKind, Registry
from engine.functions.requests import Request
from engine.functions.routes import Route
from engine.functions.run import (
    Known,
    RanLong,
    Run,
    drive,
    drive_cooperatively,
    knows_nothing,
)
from engine.functions.scheduling import ActionScheduler, MutationScheduler
from engine.functions.storage import ActionStorage, MutationStorage, QueryStorage
from engine.functions.triggers import Triggers
from engine.functions.watchdog import RunStopped, RunTimedOut, ThreadCall, Watchdog
from engine.identity import SYSTEM, Caller
from engine.limits import Limits
from engine.transaction.committer import Execution
from engine.transaction.moments import depend_on_time
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import WriteTransaction

T = TypeVar("T")

_cpu = cpu_clock()


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
        self.settings: Any = None  # of the app; set by the engine at start and reload
        self.files: Files  # set by the engine, once
        self.triggers = Triggers(self)

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

    def call_of_route(self, route: Route, path_texts: Mapping[str, str], request: Request) -> Call:
        """What an HTTP request asks of a route of the app. Raises InvalidArgument."""
        return Call(route.function, _refusing(route.function, partial(route.bind, path_texts), request))

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
        self,
        call: Call,
        caller: Caller,
        transaction: ReadTransaction,
        now: float,
        journal: str | None,
        known: Known = knows_nothing,
    ) -> QueryRun:
        """Run a query at once. Raises RanLong when it holds the loop for run_slow_ms."""
        run = self._new_run(call, caller, transaction, journal=journal, may_run_long=False, known=known)
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
        known: Known = knows_nothing,
    ) -> QueryRun:
        """Run a query that pauses every run_slow_ms, so that the loop serves others meanwhile."""
        run = self._new_run(
            call, caller, transaction, journal=journal, may_run_long=True, is_cooperative=True, known=known
        )
        start = self._start_query(call, run, transaction, now)
        began = _cpu()
        try:
            value = await drive_cooperatively(self._watchdog, run, start, give_way)
            return self._ended(call, run, transaction, value, began)
        except (Exception, RunStopped) as error:  # noqa: BLE001 - invariant 1
            return self._query_failed(call, run, transaction, error, began)
        finally:
            run.end(transaction)

    def _start_query(self, call: Call, run: Run, transaction: ReadTransaction, now: float) -> Callable[[], Any]:
        ctx = self.query_ctx(call, run, transaction, now, is_restricted=run.caller.is_restricted)
        return partial(call.function.signature.call, call.function.callable, ctx, call.arguments)

    def _ended(self, call: Call, run: Run, transaction: ReadTransaction, value: Any, began: float) -> QueryRun:
        outcome = Outcome(call.function.encode_result(value), None, self._shown_log(run))
        if transaction.read_set.moving:
            depend_on_time(transaction)
        if run.read_now and not self._is_production and transaction.read_set.rerun_at_ms is None:
            self.events.emit(ClockRead(call.function.path))
        return QueryRun(outcome, transaction.read_set, run.parts, run.nested, run.journal, _cpu() - began)

    def _query_failed(
        self, call: Call, run: Run, transaction: ReadTransaction, error: BaseException, began: float
    ) -> QueryRun:
        outcome = Outcome(None, self._failure_of(error, call), self._shown_log(run))
        with suppress(LimitExceeded, RunTimedOut):  # it fails for that anyway
            depend_on_time(transaction)
        return QueryRun(outcome, transaction.read_set, run.parts, run.nested, run.journal, _cpu() - began)

    # -- mutations

    def execute_mutation(self, call: Call, caller: Caller, transaction: WriteTransaction) -> Execution:
        """Run a mutation in the savepoint that is open; the committer keeps or undoes what it wrote."""
        run = Run(call.function, call.arguments, caller, self.limits, may_run_long=True)
        run.cursor_secret, run.settings = self._cursor_secret, self.settings
        run.begin(transaction)
        try:
            ctx = self.mutation_ctx(run, transaction, is_restricted=caller.is_restricted)
            function = call.function
            value = drive(self._watchdog, run, partial(function.signature.call, function.callable, ctx, call.arguments))
            outcome = Outcome(function.encode_result(value), None, self._shown_log(run))
        except (Exception, RunStopped) as error:  # noqa: BLE001 - invariant 1
            outcome = Outcome(None, self._failure_of(error, call), self._shown_log(run))
        finally:
            run.end(transaction)
        if self.events.listeners:
            self.events.emit(MutationRan(call.function.path, outcome.failure is None))
        return Execution(outcome.value, outcome)

    def execute_apart(self, call: Call, caller: Caller, transaction: WriteTransaction) -> Execution:
        """Run a mutation in a savepoint of its own: if it fails, what was written before stays."""
        savepoint = transaction.begin_nested()
        execution = self.execute_mutation(call, caller, transaction)
        if execution.value is None:
            transaction.undo_nested(savepoint)
        else:
            transaction.end_nested(savepoint)
        return execution

    def execute_stored(
        self, path: str, arguments: bytes, caller: Caller, transaction: WriteTransaction
    ) -> Failure | None:
        """Run, apart, a mutation that was written down for later, by the code that is the newest now; how it failed."""
        try:
            call = self.resolve_any(("mutation",), path, arguments)
        except RequestError as error:  # the function is gone, or takes other arguments now
            return self.failures.of(error, path)
        failure: Failure | None = self.execute_apart(call, caller, transaction).detail.failure
        return failure

    def run_by_itself(self, call: Call, transaction: WriteTransaction, work: Callable[[Run], None]) -> None:
        """Run code of the app where the engine itself writes, bounded as any run is. Raises what became of an error."""
        run = self._new_run(call, SYSTEM, transaction, may_run_long=True)
        try:
            drive(self._watchdog, run, lambda: work(run))
        except (Exception, RunStopped) as error:
            failure = self._failure_of(error, call)
            if failure.error is error:
                raise
            raise failure.error from error
        finally:
            run.end(transaction)

    # -- actions

    async def run_action(
        self, call: Call, caller: Caller, transactions: Transactions, request: Request | None = None
    ) -> Outcome:
        """Run an action to its end or its time limit; a plain `def` runs in a thread, as it may block."""
        run = Run(
            call.function,
            call.arguments,
            caller,
            self.limits,
            may_run_long=True,
        )
        run.request, run.settings = request, self.settings
        calls = ActionCalls(self, run, transactions)
        now = self.clock.wall_ns() / 1_000_000
        storage = ActionStorage(run, self.files, transactions)
        scheduler = ActionScheduler(self, run, transactions)
        ctx = ActionCtx(run, now, lambda: self.clock.entropy(16), calls, storage, scheduler)

        def invoke() -> Any:
            return call.function.signature.call(call.function.callable, ctx, call.arguments)

        seconds_max = call.function.timeout_seconds or self.limits.action_seconds_max
        timeout = asyncio.timeout(None)
        timer = self.clock.call_later(seconds_max, lambda: timeout.reschedule(asyncio.get_running_loop().time()))
        try:
            async with timeout:
                if inspect.iscoroutinefunction(call.function.callable):
                    value = await self._watchdog.steps(invoke())
                else:
                    in_thread = ThreadCall(invoke)
                    try:
                        value = await asyncio.to_thread(in_thread)
                    finally:
                        self._watchdog.abandon(in_thread)  # unless it has ended
                    if inspect.isawaitable(value):
                        value = await self._watchdog.steps(value.__await__())
            outcome = Outcome(call.function.encode_result(value), None, self._shown_log(run))
        except BaseException as error:
            if _is_from_outside(error):
                raise
            cause: BaseException = error
            if timeout.expired() and isinstance(error, TimeoutError):  # not the function's own
                cause = LimitExceeded(
                    f"run time in s of {call.function.path}",
                    used=seconds_max,
                    allowed=seconds_max,
                    remedy="Do less in one action, or raise its @action(timeout=…) or limits.action_seconds_max.",
                )
                cause.__cause__ = error
            outcome = Outcome(None, self._failure_of(cause, call), self._shown_log(run))
        finally:
            timer.cancel()
            run.end()
        if self.events.listeners:
            self.events.emit(ActionRan(call.function.path, outcome.failure is None))
        return outcome

    # -- contexts, also for nested calls

    def query_ctx(
        self, call: Call, run: Run, transaction: ReadTransaction, now: float, *, is_restricted: bool
    ) -> QueryCtx:
        calls = NestedCalls(self, run, transaction, now, is_restricted=is_restricted)
        policies = self.registry.policies
        guard = Guard(policies, run, transaction, calls) if is_restricted and policies else None
        db = DatabaseReader(transaction, run, guard)
        return QueryCtx(run, now, partial(_seed_of_query, call), calls, db, self, transaction)

    def mutation_ctx(self, run: Run, transaction: WriteTransaction, *, is_restricted: bool) -> MutationCtx:
        now, number = transaction.now, run.context_count
        run.context_count += 1
        calls = NestedCalls(self, run, transaction, now, is_restricted=is_restricted)
        policies = self.registry.policies
        guard = Guard(policies, run, transaction, calls) if is_restricted and policies else None
        db = DatabaseWriter(transaction, run, guard)
        return MutationCtx(run, now, partial(_seed_of_mutation, run, now, number), calls, db, self, transaction)

    # what few functions ask their context for

    def query_storage(self, run: Run, transaction: ReadTransaction) -> QueryStorage:
        return QueryStorage(run, self.files, transaction)

    def mutation_storage(self, run: Run, transaction: WriteTransaction) -> MutationStorage:
        return MutationStorage(run, self.files, transaction)

    def scheduler(self, run: Run, transaction: WriteTransaction) -> MutationScheduler:
        return MutationScheduler(self, run, transaction)

    def limiter(self, run: Run, transaction: WriteTransaction) -> Limiter:
        return Limiter(self, run, transaction)

    def session(self, run: Run, transaction: WriteTransaction) -> MutationSession:
        return MutationSession(self, run, transaction)

    # -- inside

    def _new_run(
        self,
        call: Call,
        caller: Caller,
        transaction: ReadTransaction,
        *,
        may_run_long: bool,
        journal: str | None = None,
        is_cooperative: bool = False,
        known: Known = knows_nothing,
    ) -> Run:
        run = Run(
            call.function,
            call.arguments,
            caller,
            self.limits,
            may_run_long=may_run_long,
            is_cooperative=is_cooperative,
        )
        run.cursor_secret, run.settings = self._cursor_secret, self.settings
        run.journal, run.known = journal, known
        run.begin(transaction)
        return run

    def _failure_of(self, error: BaseException, call: Call) -> Failure:
        if isinstance(error, InternalError):
            raise error
        return self.failures.of(error, call.function.path)

    def _shown_log(self, run: Run) -> tuple[str, ...]:
        return () if self._is_production or not run.log_lines else tuple(run.log_lines)


def _refusing(function: Function, decode: Callable[[T], Arguments], given: T) -> Arguments:
    """Arguments, which a `__post_init__` of the app may refuse with any exception."""
    try:
        return decode(given)
    except EngineError:
        raise
    except Exception as error:
        raise InvalidArgument(f"{function.path} refuses its arguments: {type(error).__name__}: {error}") from error


def _seed_of_query(call: Call) -> bytes:
    """By its own path and arguments: it draws the same numbers whoever calls it."""
    return b"%b|%b" % (call.function.path.encode(), call.arguments.canonical)


def _seed_of_mutation(run: Run, now: float, number: int) -> bytes:
    return b"%b|%b|%r|%d" % (run.function.path.encode(), run.arguments.canonical, now, number)


def _is_from_outside(error: BaseException) -> bool:
    """Whether somebody stops the task that an action runs in; what the action raises by itself is its failure."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return isinstance(error, KeyboardInterrupt | GeneratorExit)
