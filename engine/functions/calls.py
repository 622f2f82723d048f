"""Functions that call functions.

Inside a query or mutation a nested call shares the caller's run: its time, limits, identity and snapshot; a nested
mutation is a savepoint that can fail alone. An action's calls are transactions of their own.
"""

from collections.abc import Callable
from inspect import isawaitable
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from engine.errors import AppError, FunctionMisuse, LimitExceeded
from engine.functions.context import FunctionReference, QueryCtx
from engine.functions.outcomes import Call, NestedQuery, Outcome, QueryRun
from engine.functions.registry import Function
from engine.functions.run import Run
from engine.identity import Caller
from engine.transaction.moments import depend_on_time
from engine.transaction.reading import ReadTransaction
from engine.transaction.transaction import WriteTransaction

if TYPE_CHECKING:
    from engine.functions.runner import Runner

T = TypeVar("T")


class Transactions(Protocol):
    """What an action reaches the database through; the engine has it."""

    async def run_query(self, call: Call, caller: Caller) -> Outcome: ...
    async def run_mutation(self, call: Call, caller: Caller) -> Outcome: ...
    async def write(self, work: Callable[[WriteTransaction, float], T]) -> T:
        """Do the engine's own writes as a mutation, given the transaction and its `now`; durable on return."""


class NestedCalls:
    """`ctx.run_query` and `ctx.run_mutation` of a query or mutation."""

    def __init__(
        self, runner: "Runner", run: Run, transaction: ReadTransaction, now: float, *, is_restricted: bool
    ) -> None:
        self._runner, self._run, self._transaction, self._now = runner, run, transaction, now
        self._is_restricted = is_restricted  # those that are called are what their caller is

    async def run_query(self, function: FunctionReference, arguments: dict[str, Any]) -> Any:
        self._run.check_open()
        call = self._runner.call_of(function, ("query",), arguments)
        return await self.query(call, is_restricted=self._is_restricted)

    async def query(self, call: Call, *, is_restricted: bool) -> Any:
        """What the query returns; if it asks who asks, that is what the caller depends on, not what it read."""
        run, transaction = self._run, self._transaction
        if not transaction.is_tracked:
            return await self._enter(call, self._query_ctx(call, is_restricted=is_restricted))
        nested = NestedQuery(call, is_restricted=is_restricted)
        known = run.known(nested)
        if known is not None:
            run.parts[nested] = known.token
            run.log_lines += known.log_lines
            return value_of(call.function, known)
        with Apart(run, transaction) as apart:
            try:
                value = await self._enter(call, self._query_ctx(call, is_restricted=is_restricted))
            except AppError as error:
                failure = self._runner.failures.of(error, call.function.path)
                if apart.asks_who_asks and failure.error is error:  # else its data is not fit to be told
                    apart.end(nested, Outcome(None, failure, apart.log_lines))
                raise
            if not apart.asks_who_asks:
                return value
            outcome = Outcome(call.function.encode_result(value), None, apart.log_lines)
            apart.end(nested, outcome)
        return value_of(call.function, outcome)  # as it is when it is known already

    def _query_ctx(self, call: Call, *, is_restricted: bool) -> QueryCtx:
        return self._runner.query_ctx(call, self._run, self._transaction, self._now, is_restricted=is_restricted)

    async def run_mutation(self, function: FunctionReference, arguments: dict[str, Any]) -> Any:
        self._run.check_open()
        transaction = self._transaction
        if not isinstance(transaction, WriteTransaction) or self._run.function.kind != "mutation":
            raise FunctionMisuse(f"{self._run.function.path}: a query runs no mutation.")
        call = self._runner.call_of(function, ("mutation",), arguments)
        savepoint = transaction.begin_nested()
        try:
            ctx = self._runner.mutation_ctx(self._run, transaction, is_restricted=self._is_restricted)
            value = await self._enter(call, ctx)
        except BaseException:
            transaction.undo_nested(savepoint)
            raise
        transaction.end_nested(savepoint)
        return value

    async def run_action(self, function: FunctionReference, arguments: dict[str, Any]) -> Any:
        raise FunctionMisuse(f"{self._run.function.path}: only an action runs an action; schedule it instead.")

    async def _enter(self, call: Call, ctx: Any) -> Any:
        run = self._run
        if run.depth >= run.limits.nesting_depth_max:
            raise LimitExceeded(
                f"functions nested in {run.function.path}",
                used=run.depth + 1,
                allowed=run.limits.nesting_depth_max,
                remedy="Call a plain Python function instead, or raise limits.nesting_depth_max.",
            )
        run.depth += 1
        try:
            value = call.function.signature.call(call.function.callable, ctx, call.arguments)
            return await value if type(value) is CoroutineType or isawaitable(value) else value
        finally:
            run.depth -= 1


class Apart:
    """Keeps what a nested query reads apart from what its caller reads.

    A query that asks who asks ends by `end`: its caller depends on the outcome. What any other one read is its
    caller's, too.
    """

    def __init__(self, run: Run, transaction: ReadTransaction) -> None:
        self._run, self._transaction = run, transaction
        self._outer = transaction.read_set, run.parts, run.nested
        self._log_start, self._had_page = len(run.log_lines), run.has_page
        self._is_part = False

    def __enter__(self) -> "Apart":
        self._transaction.read_set, self._run.parts, self._run.nested = self._transaction.read_set.fresh(), {}, {}
        return self

    def __exit__(self, *_: object) -> None:
        run, transaction = self._run, self._transaction
        inner = transaction.read_set, run.parts, run.nested
        transaction.read_set, run.parts, run.nested = self._outer
        if not self._is_part:
            read_set, parts, nested = inner
            run.parts |= parts
            run.nested |= nested
            transaction.read_set.merge(read_set)

    @property
    def asks_who_asks(self) -> bool:
        """Whether it is to be shared on its own. A page is not: its end is remembered for the whole run."""
        return bool(self._run.parts) and self._run.has_page == self._had_page

    @property
    def log_lines(self) -> tuple[str, ...]:
        return tuple(self._run.log_lines[self._log_start :])

    def end(self, query: NestedQuery, outcome: Outcome) -> None:
        """It is over, and its caller knows of it no more than this outcome."""
        run, (_, parts, nested) = self._run, self._outer
        depend_on_time(self._transaction)
        parts[query] = outcome.token
        nested[query] = QueryRun(outcome, self._transaction.read_set, run.parts, run.nested, None, 0.0)
        self._is_part = True


class ActionCalls:
    """`ctx.run_query`, `ctx.run_mutation` and `ctx.run_action` of an action."""

    def __init__(self, runner: "Runner", run: Run, transactions: Transactions) -> None:
        self._runner, self._run, self._transactions = runner, run, transactions

    async def run_query(self, function: FunctionReference, arguments: dict[str, Any]) -> Any:
        call = self._call(function, "query", arguments)
        return self._value_of(call, await self._transactions.run_query(call, self._run.caller))

    async def run_mutation(self, function: FunctionReference, arguments: dict[str, Any]) -> Any:
        call = self._call(function, "mutation", arguments)
        return self._value_of(call, await self._transactions.run_mutation(call, self._run.caller))

    async def run_action(self, function: FunctionReference, arguments: dict[str, Any]) -> Any:
        call = self._call(function, "action", arguments)
        outcome = await self._runner.run_action(call, self._run.caller, self._transactions, self._run.request)
        return self._value_of(call, outcome)

    def _call(self, function: FunctionReference, kind: Any, arguments: dict[str, Any]) -> Call:
        self._run.check_open()
        return self._runner.call_of(function, (kind,), arguments)

    def _value_of(self, call: Call, outcome: Outcome) -> Any:
        self._run.log_lines += outcome.log_lines
        return value_of(call.function, outcome)


def value_of(function: Function, outcome: Outcome) -> Any:
    """The Python value of an outcome, or its failure raised as the error that it was."""
    if outcome.failure is None:
        assert outcome.value is not None
        return function.decode_result(outcome.value)
    raise outcome.failure.error.with_traceback(None)  # shared: each raise would lengthen it
