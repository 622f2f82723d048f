"""Functions that call functions.

Inside a query or mutation a nested call shares the caller's run: its time, limits, identity and snapshot; a nested
mutation is a savepoint that can fail alone. An action's calls are transactions of their own.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from engine.errors import FunctionMisuse, LimitExceeded
from engine.functions.arguments import Arguments
from engine.functions.context import FunctionReference
from engine.functions.failures import Failure
from engine.functions.registry import Function
from engine.functions.run import Run
from engine.identity import Caller
from engine.transaction.transaction import ReadTransaction, WriteTransaction

if TYPE_CHECKING:
    from engine.functions.runner import Runner

T = TypeVar("T")


class Call(msgspec.Struct, frozen=True):
    """A function and its decoded arguments."""

    function: Function
    arguments: Arguments


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended for its caller. Exactly one of `value` and `failure` is there."""

    value: bytes | None  # JSON
    failure: Failure | None
    log_lines: tuple[str, ...]


class Transactions(Protocol):
    """What an action reaches the database through; the engine has it."""

    async def run_query(self, call: Call, caller: Caller) -> Outcome: ...
    async def run_mutation(self, call: Call, caller: Caller) -> Outcome: ...
    async def write(self, work: Callable[[WriteTransaction, float], T]) -> T:
        """Do the engine's own writes as a mutation, given the transaction and its `now`; durable on return."""


class NestedCalls:
    """`ctx.run_query` and `ctx.run_mutation` of a query or mutation."""

    def __init__(self, runner: "Runner", run: Run, transaction: ReadTransaction, now: float) -> None:
        self._runner, self._run, self._transaction, self._now = runner, run, transaction, now

    async def run_query(self, function: FunctionReference, arguments: dict[str, Any]) -> Any:
        self._run.check_open()
        call = self._runner.call_of(function, ("query",), arguments)
        return await self._enter(call, self._runner.query_ctx(self._run, self._transaction, self._now))

    async def run_mutation(self, function: FunctionReference, arguments: dict[str, Any]) -> Any:
        self._run.check_open()
        transaction = self._transaction
        if not isinstance(transaction, WriteTransaction) or self._run.function.kind != "mutation":
            raise FunctionMisuse(f"{self._run.function.path}: a query runs no mutation.")
        call = self._runner.call_of(function, ("mutation",), arguments)
        savepoint = transaction.begin_nested()
        try:
            value = await self._enter(call, self._runner.mutation_ctx(self._run, transaction))
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
            return await value if inspect.isawaitable(value) else value
        finally:
            run.depth -= 1


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
        outcome = await self._runner.run_action(call, self._run.caller, self._transactions)
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
