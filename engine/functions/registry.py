"""The decorators, and the app's functions by their paths.

Invariants
  1. A registry is immutable: a reload makes another one and swaps it whole.
  2. `snake_case` and `camelCase` name the same function; no two functions of an app meet in one name.
  3. A path from a client is only ever looked up in a dict, never imported.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import msgspec
from cronsim import CronSim, CronSimError

from engine.errors import FunctionNotFound, InvalidArgument, RegistryError
from engine.functions.arguments import Signature, compile_signature
from engine.functions.rate_limits import RateLimit
from engine.functions.routes import Route, RouteTable
from engine.functions.settings import Settings
from engine.limits import Limits
from engine.values import camel_case, compile_decoder, compile_encoder

if TYPE_CHECKING:
    from engine.functions.policies import TablePolicy
    from engine.functions.triggers import Trigger

FunctionKind = Literal["query", "mutation", "action"]
F = TypeVar("F", bound=Callable[..., Any])

_DECLARED = "__engine_function__"
_CRON = "__engine_cron__"
_RETRY_COUNT_MAX = 100  # of a job; the last ones are an hour apart
_LINGER_MAX = timedelta(seconds=1)  # what the same client sends next waits as well


class Declared(msgspec.Struct, frozen=True):
    """What a decorator says of a function; the registry does the rest when the module is loaded."""

    kind: FunctionKind
    is_internal: bool
    timeout: timedelta | None = None  # of an action
    retry_count: int = 0  # as a job
    linger: timedelta = timedelta(0)  # of a mutation


class Cron(msgspec.Struct, frozen=True):
    """When a function runs by itself: every so many ms, or at the times of an expression (UTC)."""

    interval_ms: int | None = None
    expression: str | None = None

    def next_ms(self, after_ms: float) -> float:
        """The first time to run strictly after the given one; intervals are counted from the epoch."""
        if self.interval_ms is not None:
            return (after_ms // self.interval_ms + 1) * self.interval_ms
        assert self.expression is not None
        return next(CronSim(self.expression, _utc(after_ms))).timestamp() * 1000


class Function(msgspec.Struct, frozen=True, eq=False):
    """One function of the app, compiled."""

    path: str  # `chat:get_messages`
    kind: FunctionKind
    is_internal: bool
    callable: Callable[..., Any]
    signature: Signature
    encode_result: Callable[[Any], bytes]  # checks the return annotation; raises InvalidResult
    decode_result: Callable[[bytes], Any]  # the inverse, for callers in this process
    cron: Cron | None
    timeout_seconds: float | None = None  # of an action; None: what the limits allow
    retry_count: int = 0  # how often it is run again as a job, if it fails
    linger_seconds: float = 0  # of a mutation: how long its commit may wait for others


@overload
def query(function: F, /) -> F: ...
@overload
def query(*, internal: bool = False) -> Callable[[F], F]: ...
def query(function: F | None = None, /, *, internal: bool = False) -> F | Callable[[F], F]:
    """A function that reads: its subscribers always hold what it would return now. It must be deterministic."""
    return _declare(function, Declared("query", internal))


@overload
def mutation(function: F, /) -> F: ...
@overload
def mutation(*, internal: bool = False, retries: int = 0, linger: timedelta = timedelta(0)) -> Callable[[F], F]: ...
def mutation(
    function: F | None = None, /, *, internal: bool = False, retries: int = 0, linger: timedelta = timedelta(0)
) -> F | Callable[[F], F]:
    """A function that reads and writes as one transaction: all of it happens, exactly once, or nothing.

    `retries`: how often a job that runs it is tried again when it fails with anything but an AppError. `linger`: how
    long a client's call may wait for others to share its commit, and with it the client's later ones. For what many
    send all the time and nobody waits for (heartbeats), 100 ms save most of what each costs.
    """
    return _declare(function, Declared("mutation", internal, retry_count=retries, linger=linger))


@overload
def action(function: F, /) -> F: ...
@overload
def action(*, internal: bool = False, timeout: timedelta | None = None, retries: int = 0) -> Callable[[F], F]: ...
def action(
    function: F | None = None, /, *, internal: bool = False, timeout: timedelta | None = None, retries: int = 0
) -> F | Callable[[F], F]:
    """A function that may talk to the world; it reaches the database through queries and mutations.

    `timeout`: when it is stopped (default: limits.action_seconds_max). `retries`: how often a job that runs it is tried
    again when it fails with anything but an AppError, or the server stops meanwhile: it may then do its work twice.
    """
    return _declare(function, Declared("action", internal, timeout, retries))


def cron(
    expression: str | None = None, /, *, seconds: float = 0, minutes: float = 0, hours: float = 0
) -> Callable[[F], F]:
    """Run an internal mutation or action by itself: `@cron(minutes=1)`, or `@cron("0 3 * * *")` in UTC."""
    interval_ms = round(timedelta(seconds=seconds, minutes=minutes, hours=hours) / timedelta(milliseconds=1))
    if (expression is None) == (interval_ms == 0) or interval_ms < 0:
        raise RegistryError('cron takes an expression ("0 3 * * *") or an interval (minutes=1), and one of them.')
    if expression is None and interval_ms < 1000:
        raise RegistryError(f"cron: an interval of {interval_ms} ms; at least 1,000 ms are needed.")
    if expression is not None:
        try:
            next(CronSim(expression, _utc(0)))
        except CronSimError as error:
            raise RegistryError(f"cron: {expression!r} is not a 5-field cron expression: {error}.") from error
        except StopIteration as error:
            raise RegistryError(f"cron: {expression!r} never comes.") from error
    when = Cron(expression=expression) if expression is not None else Cron(interval_ms=interval_ms)

    def mark(function: F) -> F:
        setattr(function, _CRON, when)
        return function

    return mark


class Registry:
    """Every function of one version of the app."""

    def __init__(
        self,
        functions: Iterable[Function],
        *,
        rate_limits: Iterable[RateLimit] = (),
        routes: Iterable[Route] = (),
        settings: type[Settings] | None = None,
    ) -> None:
        self.policies: dict[str, TablePolicy] = {}  # by table; set by the loader, once all functions are known
        self.triggers: dict[str, tuple[Trigger, ...]] = {}  # by table; set by the loader
        self.settings = settings  # the class that the app declares for them
        self.routes = RouteTable(routes)
        self.rate_limits = {limit.name: limit for limit in rate_limits}
        self.by_path: dict[str, Function] = {}
        self._by_name: dict[str, Function] = {}  # both spellings
        self._by_definition: dict[tuple[str, str], Function] = {}
        for function in functions:
            for name in {function.path, camel_path(function.path)}:
                if (other := self._by_name.setdefault(name, function)) is not function:
                    raise RegistryError(
                        f"{function.path} and {other.path} are the same name to clients ({name}). Rename one of them."
                    )
            self.by_path[function.path] = function
            self._by_definition[_definition_of(function.callable)] = function

    def public(self, path: str, kind: FunctionKind) -> Function:
        """The function that a client may call by this path, in any spelling of section 10 of the protocol page."""
        function = self._find(path)
        if function is None or function.kind != kind or function.is_internal:
            raise FunctionNotFound(path, kind)
        return function

    def any(self, target: str | Callable[..., Any], kinds: tuple[FunctionKind, ...]) -> Function:
        """The function that app code or an operator names by itself or by its path; internal ones too."""
        function = self._find(target) if isinstance(target, str) else self._by_definition.get(_definition_of(target))
        if function is None or function.kind not in kinds:
            name = target if isinstance(target, str) else getattr(target, "__qualname__", repr(target))
            raise FunctionNotFound(name, " or ".join(kinds))
        return function

    def _find(self, path: str) -> Function | None:
        if (function := self._by_name.get(path)) is not None:
            return function
        module, _, name = path.rpartition(":")
        if not module:
            module, name = path, "default"
        return self._by_name.get(camel_path(f"{module.removesuffix('.js')}:{name}"))


def functions_of(modules: Mapping[str, ModuleType], *, limits: Limits, tags: Callable[[str], str]) -> list[Function]:
    """The decorated functions of the app's modules; `modules` maps `live/quiz` to the module."""
    found = []
    for module_path, module in modules.items():
        for name, value in vars(module).items():
            declared = getattr(value, _DECLARED, None)
            # a function that another module imports is registered where it is defined
            if not isinstance(declared, Declared) or value.__module__ != module.__name__:
                continue
            found.append(_compile(f"{module_path}:{name}", value, declared, limits, tags))
    return found


def kind_of(function: Callable[..., Any]) -> FunctionKind | None:
    """What it is declared as; None if it is neither a query nor a mutation nor an action."""
    declared = getattr(function, _DECLARED, None)
    return declared.kind if isinstance(declared, Declared) else None


def camel_path(path: str) -> str:
    """`watch_progress:get_progress` as JavaScript writes it."""
    return re.sub(r"\w+", lambda word: camel_case(word[0]), path)


def _compile(
    path: str, function: Callable[..., Any], declared: Declared, limits: Limits, tags: Callable[[str], str]
) -> Function:
    when = getattr(function, _CRON, None)
    if when is not None and (declared.kind == "query" or not declared.is_internal):
        raise RegistryError(f"{path}: @cron stands above an internal mutation or action: @mutation(internal=True).")
    signature = compile_signature(function, limits=limits, tags=tags)
    if when is not None:
        try:
            signature.from_python({})
        except InvalidArgument as error:
            raise RegistryError(f"{path}: @cron calls it without arguments: {error}") from error
    timeout, retry_count = declared.timeout, declared.retry_count
    timeout_max = timedelta(seconds=limits.action_seconds_max)
    if timeout is not None and (type(timeout) is not timedelta or not timedelta(0) < timeout <= timeout_max):
        raise RegistryError(
            f"{path}: timeout={timeout!r}; a timedelta of more than 0 s and at most {limits.action_seconds_max:,} s is "
            "needed (limits.action_seconds_max)."
        )
    if type(retry_count) is not int or not 0 <= retry_count <= _RETRY_COUNT_MAX:
        raise RegistryError(f"{path}: retries={retry_count!r}; 0 to {_RETRY_COUNT_MAX} are possible.")
    linger = declared.linger
    if type(linger) is not timedelta or not timedelta(0) <= linger <= _LINGER_MAX:
        raise RegistryError(f"{path}: linger={linger!r}; a timedelta of at most {_LINGER_MAX} is needed.")
    decode = compile_decoder(signature.return_type, limits=limits, tags=tags, is_stored=True)
    return Function(
        path=path,
        kind=declared.kind,
        is_internal=declared.is_internal,
        callable=function,
        signature=signature,
        encode_result=compile_encoder(signature.return_type, limits=limits),
        decode_result=lambda payload: decode(msgspec.json.decode(payload)),
        cron=when,
        timeout_seconds=None if timeout is None else timeout.total_seconds(),
        retry_count=retry_count,
        linger_seconds=linger.total_seconds(),
    )


def _definition_of(function: Callable[..., Any]) -> tuple[str, str]:
    """Where it is defined: an action that outlives a reload names functions by what they were before."""
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", "")


def _declare(function: F | None, declared: Declared) -> F | Callable[[F], F]:
    def mark(target: F) -> F:
        if not callable(target):
            raise RegistryError(f"@{declared.kind} stands above a function, not above {target!r}.")
        setattr(target, _DECLARED, declared)
        return target

    return mark if function is None else mark(function)


def _utc(ms: float) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
