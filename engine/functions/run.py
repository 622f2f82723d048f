"""One run of a function: its time, its tracked reads, its log lines; and how a run is driven and stopped.

    driven ──returns──> ended
       │ passes run_slow_ms at a `ctx.db` call: a query on the shared snapshot is abandoned (RanLong) and starts again
       │ cooperatively, where the same call pauses it instead
       │ waits for anything else: FunctionMisuse
       └ passes run_ms_max: RunTimedOut, at its next `ctx.db` call or injected by the watchdog into a pure loop

Invariants
  1. A run changes only its own state and its transaction, both thrown away whole when it is stopped.
  2. `ctx` is dead once its function has returned.
"""

import contextlib
from collections.abc import Awaitable, Callable, Generator
from inspect import isawaitable
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from engine.clock import cpu_clock
from engine.errors import FunctionMisuse
from engine.functions.outcomes import NestedQuery, Outcome, QueryRun
from engine.functions.pages import CursorSeal, fingerprint_of
from engine.functions.watchdog import RunStopped, RunTimedOut, Watchdog
from engine.identity import PRESENT, Caller, Identity, Part, part_of
from engine.limits import Limits
from engine.transaction.reading import ReadTransaction

if TYPE_CHECKING:
    from engine.functions.arguments import Arguments
    from engine.functions.policies import Guard
    from engine.functions.registry import Function
    from engine.functions.requests import Request

_cpu = cpu_clock()


class RanLong(RunStopped):
    """A query passed run_slow_ms on the shared snapshot: it starts again where it can pause."""


# What the engine knows already of a query that a run calls; None: nothing, run it.
Known = Callable[[NestedQuery], Outcome | None]


def knows_nothing(nested: NestedQuery) -> Outcome | None:
    return None


class Run:
    """The state of one run, shared by the nested queries and mutations in it."""

    # what is the same for most runs: as defaults of the class they cost a run nothing
    depth = 0
    schedule_count = schedule_size_bytes = 0  # of jobs, nested mutations included
    context_count = 0  # made for it: one, and one for each nested call
    read_now = False  # set by ctx
    has_page = False  # set by begin_page
    is_inside = False  # of a call that cannot wait; set by drive_inside
    guards: "tuple[Guard, ...]" = ()  # that have asked policies
    triggers: tuple[str, ...] = ()  # paths of those under way, the first that was set off first
    _is_open = True
    _transaction: ReadTransaction | None = None  # while it runs; set by begin
    _tracked_identity: Identity | None = None
    # set by the runner
    cursor_secret = b""
    settings: Any = None
    journal: str | None = None  # the end of the page; set anew by end_page
    known: Known = staticmethod(knows_nothing)
    request: "Request | None" = None  # of an action that a route is, or called

    def __init__(
        self,
        function: "Function",
        arguments: "Arguments",
        caller: Caller,
        limits: Limits,
        *,
        may_run_long: bool,
        is_cooperative: bool = False,
    ) -> None:
        self.function, self.arguments, self.limits = function, arguments, limits
        self._is_cooperative = is_cooperative
        self.caller = caller  # for passing on, never for showing to the function
        self.parts: dict[Part | NestedQuery, Any] = {}  # what a query read of who asks, and what it was
        self.nested: dict[NestedQuery, QueryRun] = {}  # the runs behind those of the parts that are queries
        self.log_lines: list[str] = []
        now = _cpu()
        self._deadline = now + limits.run_ms_max / 1000
        self._pause_at = now + limits.run_slow_ms / 1000
        self._slow_at = self._deadline if may_run_long else self._pause_at

    # -- time

    def check_deadline(self) -> None:
        """Called by the transaction at every operation."""
        now = _cpu()
        if now > self._slow_at:
            raise RunTimedOut if now > self._deadline else RanLong

    @property
    def wants_pause(self) -> bool:
        """Asked before every read; refuses it when the run has ended (invariant 2)."""
        if not self._is_open:
            self.check_open()
        return self._is_cooperative and _cpu() > self._pause_at and not self.is_inside

    async def pause(self) -> None:
        """Leave the loop to others; the time away does not count."""
        left_at = _cpu()
        await _Pause()
        now = _cpu()
        self._deadline += now - left_at
        self._slow_at += now - left_at
        self._pause_at = now + self.limits.run_slow_ms / 1000

    def check_open(self) -> None:
        """Invariant 2."""
        if not self._is_open:
            raise FunctionMisuse(
                f"{self.function.path}: ctx was used after the function had returned; await everything before."
            )

    def begin(self, transaction: ReadTransaction) -> None:
        """The transaction is this run's: its operations are bounded by the run's time and limits."""
        transaction.impose(self.limits, self.check_deadline)
        transaction.run = self
        self._transaction = transaction

    def rerun_by(self, when_ms: float) -> None:
        """The result is true until then at most."""
        self.check_open()
        assert self._transaction is not None, "begun"
        self._transaction.read_set.rerun_by(when_ms)

    def end(self, transaction: ReadTransaction | None = None) -> None:
        """The function has returned (invariant 2)."""
        self._is_open = False
        # each holds this run: all that it used would wait for the garbage collector
        self._tracked_identity = self._transaction = None
        for guard in self.guards:
            guard.forget()
        self.guards = ()
        if transaction is not None:
            transaction.lift_limits()
            transaction.run = None

    # -- identity

    def identity(self) -> Identity | None:
        """Who asks, tracked: what is read of it decides who shares the result."""
        if not self._is_open:
            self.check_open()
        identity = self.caller.identity
        if self._transaction is not None and not self._transaction.is_tracked:  # nobody asks what a mutation has read
            return None if identity is None else identity.shown()
        self.parts[PRESENT] = identity is not None
        if identity is not None and self._tracked_identity is None:
            self._tracked_identity = identity.tracked(self._read_part)
        return self._tracked_identity

    def _read_part(self, part: Part) -> None:
        if part not in self.parts:
            self.parts[part] = part_of(self.caller.identity, part)

    # -- pages

    def begin_page(self) -> str | None:
        """The journal for the one page of this run."""
        if self.has_page:
            raise FunctionMisuse(
                f"{self.function.path}: a second paginate in one run; a page's end is remembered per query. "
                "Make two queries of it."
            )
        self.has_page = True
        return self.journal

    def end_page(self, continue_cursor: str) -> None:
        self.journal = continue_cursor

    def cursor_seal(self, *source: Any) -> CursorSeal:
        """For the pages of this source: an index, a range and an order, or a search."""
        fingerprint = fingerprint_of(self.function.path, self.arguments.values, *source)
        return CursorSeal(self.cursor_secret, fingerprint)

    # -- log

    def log(self, level: str, parts: tuple[object, ...]) -> None:
        """Keep one line for the client (in development) and for whoever called."""
        limits = self.limits
        if len(self.log_lines) == limits.log_line_count_max:
            self.log_lines.append(f"[WARN] more than {limits.log_line_count_max} log lines; the rest is not kept")
        elif len(self.log_lines) < limits.log_line_count_max:
            line = f"[{level}] {' '.join(map(str, parts))}".encode(errors="backslashreplace")
            self.log_lines.append(line[: limits.log_line_size_bytes_max].decode(errors="ignore"))


class _Pause:
    """Awaiting it hands PAUSE to whoever drives the coroutine."""

    def __await__(self) -> Generator[Any, None, None]:
        yield PAUSE


PAUSE = object()


def drive(watchdog: Watchdog, run: Run, start: Callable[[], Any]) -> Any:
    """Call a function and run what it returns to its end, without a task: `ctx.db` never really waits."""
    coroutine: Any = None
    try:
        with watchdog:
            coroutine = start()
            if type(coroutine) is CoroutineType:  # nearly always
                coroutine.send(None)
            elif isawaitable(coroutine):
                coroutine = coroutine.__await__()
                next(coroutine)
            else:
                return coroutine
    except StopIteration as stop:
        return stop.value
    _abandon(watchdog, coroutine)
    raise _waited(run)


def drive_inside(run: Run, value: Any) -> Any:
    """What a coroutine returns that is called where nobody can wait: a policy's or a trigger's, inside of a run."""
    # a predicate's, often: asking is slower than it
    if value is True or value is False or not (type(value) is CoroutineType or isawaitable(value)):
        return value
    was_inside, run.is_inside = run.is_inside, True
    coroutine: Any = value if type(value) is CoroutineType else value.__await__()
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    finally:
        run.is_inside = was_inside
    coroutine.close()
    raise _waited(run)


async def drive_cooperatively(
    watchdog: Watchdog, run: Run, start: Callable[[], Any], turn: Callable[[], Awaitable[None]]
) -> Any:
    """As `drive`, but each pause of the run gives the loop a turn."""
    coroutine: Any = None
    try:
        with watchdog:
            coroutine = start()
            if not isawaitable(coroutine):
                return coroutine
            coroutine = coroutine.__await__()
        while True:
            with watchdog:
                yielded = next(coroutine)
            if yielded is not PAUSE:
                break
            await turn()
    except StopIteration as stop:
        return stop.value
    except BaseException:
        _abandon(watchdog, coroutine)
        raise
    _abandon(watchdog, coroutine)
    raise _waited(run)


def _abandon(watchdog: Watchdog, coroutine: Any) -> None:
    """Close a coroutine that will not be driven on; what its `finally` blocks raise is part of the abandoned run."""
    if not hasattr(coroutine, "close"):
        return
    # the run has failed already, with a better error
    with contextlib.suppress(Exception, RunStopped), watchdog:
        coroutine.throw(RunStopped())  # `close` leaves an `async for` that paused "running" before Python 3.13
    with contextlib.suppress(Exception, RunStopped), watchdog:
        coroutine.close()


def _waited(run: Run) -> FunctionMisuse:
    path, kind = (run.triggers[-1], "trigger") if run.triggers else (run.function.path, run.function.kind)
    return FunctionMisuse(
        f"{path}: a {kind} waited for something that is not ctx.db (I/O, a sleep, another task). "
        "Queries and mutations are deterministic and do no I/O of their own; an @action may."
    )
