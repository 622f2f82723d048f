"""Row policies: who may read, insert, update and delete which document.

    @policy(ChatMessage, viewer=viewer)
    class MessagePolicy(Policy[Viewer]):
        def read(self, message: ChatMessage) -> bool:
            return message.status == "active" or self.viewer.is_moderator

Invariants
  1. In a restricted run every document that `ctx.db` hands out has passed `read` of its table's policy, and every
     write has passed `insert`, `update` or `delete` before it happened. What a policy does not allow is refused.
  2. What a policy reads is part of what the run depends on: the viewer by what its query returned, documents by their
     rows.
  3. A table without a policy costs nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypeVar

import msgspec

from engine.errors import AppError, Forbidden, FunctionNotFound, InvalidArgument, RegistryError
from engine.functions.outcomes import Call
from engine.functions.reader import DatabaseReader
from engine.functions.registry import Registry
from engine.functions.run import Run, drive_inside
from engine.identity import Identity
from engine.schema import Table, TableSchema
from engine.transaction.reading import ReadTransaction

if TYPE_CHECKING:
    from engine.functions.calls import NestedCalls

V = TypeVar("V")
C = TypeVar("C", bound="type[Policy[Any]]")

_DECLARED = "__engine_policy__"
_MISSING: Any = object()


class Policy(Generic[V]):
    """The base of policies; an instance is the context of one run. What a policy does not define is refused.

    Predicates may be async and read `self.db`, which no policy restricts.
    """

    __engine_policy__: ClassVar["Declared"]

    def __init__(self, guard: "Guard", viewer: Call | None) -> None:
        self._guard, self._viewer = guard, viewer

    @property
    def viewer(self) -> V:
        """What the query that the policy names as its `viewer` returns for the caller."""
        if self._viewer is None:
            raise RegistryError(f"{type(self).__name__} asks for self.viewer: name its query, @policy(…, viewer=…).")
        viewer: V = self._guard.viewer(self._viewer)
        return viewer

    @property
    def db(self) -> DatabaseReader:
        """Reads whatever is there."""
        return self._guard.db

    @property
    def identity(self) -> Identity | None:
        """The signed-in caller. A result that depends on all of it is shared by nobody: judge by a viewer."""
        return self._guard.run.identity()

    # What is not overridden is refused.

    def read(self, document: Any) -> Any:
        """Whether the caller may see the document."""
        return False

    def insert(self, document: Any) -> Any:
        """Whether the caller may add the document; its id is not given yet."""
        return False

    def update(self, old: Any, new: Any) -> Any:
        """Whether the caller may make the one of the other."""
        return False

    def delete(self, document: Any) -> Any:
        """Whether the caller may delete the document."""
        return False


class Declared(msgspec.Struct, frozen=True):
    """What the decorator says."""

    table: type[Table]
    viewer: Callable[..., Any] | None


class TablePolicy(msgspec.Struct, frozen=True):
    """The policy of one table, and the call of its viewer query."""

    policy: type[Policy[Any]]
    viewer: Call | None


def policy(table: type[Table], *, viewer: Callable[..., Any] | None = None) -> Callable[[C], C]:
    """Functions that a client called see and write only what this class allows of the table.

    `viewer` is a query without arguments. It runs without policies, and results are shared by all callers for whom it
    returns the same: let it return little (a role, a tenant).
    """

    def mark(declared: C) -> C:
        if not issubclass(declared, Policy):
            raise RegistryError(f"@policy stands above a class, `class …(Policy[…])`, not above {declared!r}.")
        setattr(declared, _DECLARED, Declared(table, viewer))
        return declared

    return mark


def policies_of(
    modules: Mapping[str, ModuleType],
    table_of: Callable[[type[Table]], TableSchema],
    registry: Registry,
) -> dict[str, TablePolicy]:
    """The policies in an app's modules, by table name."""
    found: dict[str, TablePolicy] = {}
    where: dict[str, str] = {}
    for module_path, module in modules.items():
        for name, value in vars(module).items():
            declared = vars(value).get(_DECLARED) if isinstance(value, type) else None
            if not isinstance(declared, Declared) or value.__module__ != module.__name__:
                continue
            place = f"{module_path}:{name}"
            table = table_of(declared.table)
            if table.is_system:
                raise RegistryError(f"{place}: {table.name} is the engine's own table; policies are for the app's.")
            other = where.setdefault(table.name, place)
            if other != place:
                raise RegistryError(f"{place}: {table.name} has a policy, {other}. Make one of them.")
            viewer = None if declared.viewer is None else _call_of_viewer(declared.viewer, registry, place)
            found[table.name] = TablePolicy(value, viewer)
    return found


def _call_of_viewer(viewer: Callable[..., Any], registry: Registry, place: str) -> Call:
    try:
        function = registry.any(viewer, ("query",))
        return Call(function, function.signature.from_python({}))
    except (FunctionNotFound, InvalidArgument) as error:
        raise RegistryError(
            f"{place}: its viewer is a @query (internal or not) of a module whose name does not begin with '_', and "
            f"takes no arguments: {error}"
        ) from error


class Guard:
    """The policies as they bind one function of a restricted run."""

    def __init__(
        self,
        policies: Mapping[str, TablePolicy],
        run: Run,
        transaction: ReadTransaction,
        calls: "NestedCalls",
    ) -> None:
        self._policies, self._transaction, self._calls = policies, transaction, calls
        self.run = run
        self._instances: dict[str, Policy[Any]] = {}  # by table
        self._may_read: dict[str, Callable[[Any], bool]] = {}
        self._viewers: dict[str, tuple[Any, int]] = {}  # by path: the value, and the writes before it

    @property
    def db(self) -> DatabaseReader:
        """What the policies themselves read by."""
        return DatabaseReader(self._transaction, self.run)

    def covers(self, table: str) -> bool:
        """Whether a policy decides about its documents."""
        return table in self._policies

    def may_read(self, document: Table) -> bool:
        return self.reads(document.__table_name__)(document)

    def reads(self, table: str) -> Callable[[Any], bool]:
        """Whether the caller may read a document of the table."""
        may_read = self._may_read.get(table)
        if may_read is None:
            may_read = self._may_read[table] = self._make_may_read(table)
        return may_read

    def _make_may_read(self, table: str) -> Callable[[Any], bool]:
        read, run = self._policy(table).read, self.run

        def may_read(document: Any) -> bool:
            answer = read(document)
            if answer is True or answer is False:  # nearly always
                return answer
            return bool(drive_inside(run, answer))

        return may_read

    def reads_alike(self, table: str, values: Mapping[str, Any]) -> bool | None:
        """Whether the caller may see any document with these values; None if that is not all that `read` looks at."""
        probe = _Probe(values)
        try:
            return bool(drive_inside(self.run, self._policy(table).read(probe)))
        except _LooksFurther:
            return None
        except AppError:  # of the viewer
            raise
        except Exception:  # noqa: BLE001 - what cannot judge a probe judges each document, and raises there
            return None

    def check(self, operation: str, *documents: Table) -> None:
        """Raises Forbidden when the caller may not do that."""
        table = documents[0].__table_name__
        policy = self._policy(table)
        if not drive_inside(self.run, getattr(policy, operation)(*documents)):
            raise Forbidden(f"{operation} {table}: its policy, {type(policy).__name__}, does not allow this caller to.")

    def forget(self) -> None:
        """The run is over. Policies hold their guard: all that it knows would wait for the garbage collector."""
        self._instances.clear()
        self._may_read.clear()

    def viewer(self, call: Call) -> Any:
        """What the viewer query returns: asked once, and again after each write of a mutation."""
        write_count = self._transaction.write_count
        known = self._viewers.get(call.function.path)
        if known is not None and known[1] == write_count:
            return known[0]
        value = drive_inside(self.run, self._calls.query(call, is_restricted=False))
        self._viewers[call.function.path] = value, write_count
        return value

    def _policy(self, table: str) -> Policy[Any]:
        instance = self._instances.get(table)
        if instance is None:
            if not self._instances:
                self.run.guards = (*self.run.guards, self)
            declared = self._policies[table]
            instance = self._instances[table] = declared.policy(self, declared.viewer)
        return instance


def deny_all(tables: Iterable[str]) -> dict[str, TablePolicy]:
    """For tables that nobody may touch until they have a policy."""
    return {table: TablePolicy(Policy, None) for table in tables}


class _LooksFurther(BaseException):
    """A predicate asked a probe for what it does not hold. Not an Exception: a predicate shall not swallow it."""


class _Probe:
    """Any document with these values: whatever else of it a predicate looks at, it cannot know."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_values", values)

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, "_values").get(name, _MISSING)
        if value is _MISSING:
            raise _LooksFurther
        return value

    def _refuse(self, *_: object) -> NoReturn:
        raise _LooksFurther

    __eq__ = __hash__ = __repr__ = __str__ = _refuse
