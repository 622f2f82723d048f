"""Triggers: functions of the app that run right after each write of a table, whoever wrote.

    @trigger(ChatMessage)
    async def count_messages(ctx: MutationCtx, change: Change[ChatMessage]) -> None: ...

Invariants
  1. Every change of a document of the table is told to each of its triggers, in the order of their paths, before the
     write returns: those of functions, jobs, cascades, other triggers and the engine itself. Nothing goes around it.
  2. A trigger that raises undoes the write that set it off, and all that this write did.
  3. Inside a run a trigger shares its time, limits and caller, and is restricted by no policy. Where the engine itself
     writes, it is a run of its own.
  4. Triggers that set off each other are at most `trigger_depth_max` deep.

The transaction calls `Triggers.fire`; what may be undone, and how, is its business (`transaction/rules.py`).
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from inspect import Parameter, iscoroutinefunction, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from engine.errors import LimitExceeded, RegistryError
from engine.functions.arguments import compile_signature
from engine.functions.context import MutationCtx
from engine.functions.outcomes import Call
from engine.functions.registry import Function
from engine.functions.run import Run, drive_inside
from engine.limits import Limits
from engine.schema import Table, TableSchema
from engine.transaction.rules import Change
from engine.transaction.transaction import WriteTransaction
from engine.values import compile_encoder

if TYPE_CHECKING:
    from engine.functions.runner import Runner

T = TypeVar("T", bound=Table)
Told = Callable[[MutationCtx, Change[T]], Awaitable[None]]  # a function that is told of each change of a T

_DECLARED = "__engine_trigger__"


class Declared(msgspec.Struct, frozen=True):
    """What the decorator says."""

    table: type[Table]


class Trigger(msgspec.Struct, frozen=True, eq=False):
    """A trigger of one table."""

    path: str  # `chat:count_messages`
    callable: Told[Any]
    call: Call  # what a run is of in which no function runs but triggers


def trigger(table: type[T]) -> Callable[[Told[T]], Told[T]]:
    """Run this after each insert, patch, replace and delete of a document of the table, in the same transaction.

    It is given a `MutationCtx` that no policy restricts, and the `Change`. What it raises undoes the write.
    """

    def mark(function: Told[T]) -> Told[T]:
        is_async = iscoroutinefunction(function)
        if not is_async:
            raise RegistryError(f"@trigger stands above an `async def …(ctx, change)`, not above {function!r}.")
        if hasattr(function, _DECLARED):
            raise RegistryError(f"@trigger stands above {function!r} already; write one function for each table.")
        setattr(function, _DECLARED, Declared(table))
        return function

    return mark


def triggers_of(
    modules: Mapping[str, ModuleType], table_of: Callable[[type[Table]], TableSchema], limits: Limits
) -> dict[str, tuple[Trigger, ...]]:
    """The triggers in an app's modules, by table name, in the order of their paths."""
    found: list[tuple[str, str, Any]] = []
    for module_path, module in modules.items():
        for name, value in vars(module).items():
            declared = getattr(value, _DECLARED, None)
            # one that another module imports is found where it is defined
            if isinstance(declared, Declared) and value.__module__ == module.__name__:
                path, table = f"{module_path}:{name}", table_of(declared.table)
                if table.is_system:
                    raise RegistryError(f"{path}: {table.name} is the engine's own table; triggers are for the app's.")
                _check_parameters(path, value)
                found.append((path, table.name, value))
    triggers: dict[str, tuple[Trigger, ...]] = {}
    for path, table_name, function in sorted(found, key=lambda entry: entry[0]):
        made = Trigger(path, function, _call_of(path, function, limits))
        triggers[table_name] = (*triggers.get(table_name, ()), made)
    return triggers


def _check_parameters(path: str, function: Callable[..., Any]) -> None:
    parameters = list(signature(function).parameters.values())
    required = [parameter for parameter in parameters if parameter.default is Parameter.empty]
    if len(required) != 2 or any(parameter.kind is Parameter.KEYWORD_ONLY for parameter in required):
        raise RegistryError(f"{path}: a trigger is given the context and the change, `async def …(ctx, change)`.")


def _call_of(path: str, function: Callable[..., Any], limits: Limits) -> Call:
    def takes_nothing(ctx: MutationCtx) -> None: ...

    arguments = compile_signature(takes_nothing, limits=limits, tags=_no_tags)
    run_as = Function(
        path=path,
        kind="mutation",
        is_internal=True,
        callable=function,
        signature=arguments,
        encode_result=compile_encoder(None, limits=limits),
        decode_result=msgspec.json.decode,
        cron=None,
    )
    return Call(run_as, arguments.from_python({}))


def _no_tags(class_name: str) -> str:
    raise KeyError(class_name)


class Triggers:
    """Runs the triggers of a runner's registry."""

    def __init__(self, runner: "Runner") -> None:
        self._runner = runner

    def fire(self, transaction: WriteTransaction, table: TableSchema, change: Change[Any]) -> None:
        """Tell each trigger of the table what was just written (invariant 1). Raises what it raises."""
        for found in self._runner.registry.triggers[table.name]:
            if isinstance(transaction.run, Run):
                self._tell(found, transaction, change, transaction.run)
            else:  # no function runs: the engine itself writes
                self._runner.run_by_itself(found.call, transaction, partial(self._tell, found, transaction, change))

    def _tell(self, found: Trigger, transaction: WriteTransaction, change: Change[Any], run: Run) -> None:
        depth, allowed = len(run.triggers), run.limits.trigger_depth_max
        if depth >= allowed:
            raise LimitExceeded(
                f"triggers that set off each other ({' → '.join([*run.triggers, found.path])})",
                used=depth + 1,
                allowed=allowed,
                remedy="Write only what is to change, or raise limits.trigger_depth_max.",
            )
        try:
            run.triggers = (*run.triggers, found.path)
            ctx = self._runner.mutation_ctx(run, transaction, is_restricted=False)
            drive_inside(run, found.callable(ctx, change))
        finally:
            run.triggers = run.triggers[:depth]
