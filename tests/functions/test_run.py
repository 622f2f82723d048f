"""One run: its deadline, its log, its identity; and how a function that does not end is stopped."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from engine.clock import cpu_clock
from engine.errors import FunctionMisuse
from engine.functions.registry import Function, functions_of, query
from engine.functions.run import Escaped, Run, RunTimedOut, Watchdog, drive, drive_cooperatively
from engine.identity import Caller, Identity
from engine.limits import Limits
from tests.functions.test_registry import module_of

# a stop that lands in a callback of the garbage collector is dropped by Python, and comes again
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
QUICK = Limits(run_ms_max=50)


def function_of() -> Function:
    async def get(ctx: object) -> None: ...

    (function,) = functions_of({"m": module_of("m", query(get))}, limits=Limits(), tags=lambda name: "0000")
    return function


def run_of(limits: Limits = QUICK, identity: Identity | None = None, *, is_cooperative: bool = False) -> Run:
    function = function_of()
    arguments = function.signature.from_python({})
    return Run(function, arguments, Caller(identity), limits, may_run_long=True, is_cooperative=is_cooperative)


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog(QUICK)
    yield watchdog
    watchdog.close()


def spin() -> None:
    while True:
        pass


def wait_for(seconds: float) -> None:
    """Hold the thread in Python code."""
    now = cpu_clock()
    end = now() + seconds
    while now() < end:
        pass


# -- the watchdog


def test_an_endless_loop_is_stopped_and_the_next_run_is_not(watchdog: Watchdog) -> None:
    for _ in range(2):
        with pytest.raises(RunTimedOut):
            drive(watchdog, run_of(), spin)
        assert drive(watchdog, run_of(), lambda: 5) == 5


def test_a_loop_that_swallows_exceptions_is_stopped(watchdog: Watchdog) -> None:
    def stubborn() -> None:
        while True:
            try:
                spin()
            except Exception:  # noqa: BLE001 - what an app may write
                continue

    with pytest.raises(RunTimedOut):
        drive(watchdog, run_of(), stubborn)


def test_a_run_that_swallows_the_stop_itself_has_failed_all_the_same(watchdog: Watchdog) -> None:
    def stubborn() -> int:
        try:
            spin()
        except BaseException:  # noqa: BLE001 - what an app may write
            return 5
        return 6

    with pytest.raises(RunTimedOut):
        drive(watchdog, run_of(), stubborn)


def test_a_second_loop_after_the_stop_is_stopped_too(watchdog: Watchdog) -> None:
    def stubborn() -> None:
        try:
            spin()
        finally:
            spin()

    with pytest.raises(RunTimedOut):
        drive(watchdog, run_of(), stubborn)


def test_a_stop_that_python_drops_is_repeated(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", dropped.append)

    class Dropping:
        def __del__(self) -> None:
            spin()

    def function() -> None:
        Dropping()
        spin()

    with pytest.raises(RunTimedOut):
        drive(watchdog, run_of(), function)
    assert {hook.exc_type for hook in dropped} == {RunTimedOut}


@pytest.mark.slow
def test_what_is_not_delivered_is_withdrawn(watchdog: Watchdog) -> None:
    for _ in range(8):  # each run ends just when the watchdog may look
        try:
            drive(watchdog, run_of(), lambda: wait_for(0.0503))
        except RunTimedOut:
            continue
    wait_for(0.1)  # nothing hits us here


def test_the_code_outside_of_runs_may_take_its_time(watchdog: Watchdog) -> None:
    drive(watchdog, run_of(), lambda: None)
    wait_for(0.15)


def test_the_coroutine_of_a_stopped_run_is_closed(watchdog: Watchdog) -> None:
    log: list[str] = []

    async def function() -> None:
        try:
            spin()
        finally:
            log.append("closed")

    with pytest.raises(RunTimedOut):
        drive(watchdog, run_of(), function)
    assert log == ["closed"]


def test_its_thread_ends_when_it_is_closed() -> None:
    def threads() -> int:
        return sum(thread.name == "engine-watchdog" for thread in threading.enumerate())

    before = threads()
    watchdog = Watchdog(QUICK)
    assert threads() == before + 1
    watchdog.close()
    assert threads() == before


# -- driving


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), BaseException("odd")], ids=repr)
async def test_what_is_no_exception_does_not_get_out_as_it_is(watchdog: Watchdog, error: BaseException) -> None:
    def plain() -> None:
        raise error

    async def coroutine() -> None:
        raise error

    async def turn() -> None: ...

    for function in (plain, coroutine):
        with pytest.raises(Escaped) as escaped:
            drive(watchdog, run_of(), function)
        assert escaped.value.__cause__ is error
        with pytest.raises(Escaped) as escaped:
            await drive_cooperatively(watchdog, run_of(), function, turn)
        assert escaped.value.__cause__ is error


async def test_ctrl_c_goes_through(watchdog: Watchdog) -> None:
    def function() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(watchdog, run_of(), function)


async def test_a_pause_gives_the_loop_a_turn_and_its_time_does_not_count(watchdog: Watchdog) -> None:
    run, turns = run_of(is_cooperative=True), []

    async def function() -> int:
        for _ in range(3):
            await run.pause()
            run.check_deadline()
        return 5

    async def turn() -> None:
        turns.append(1)
        wait_for(0.06)  # longer than a run may take

    assert await drive_cooperatively(watchdog, run, function, turn) == 5
    assert len(turns) == 3


async def test_a_run_whose_turn_is_cancelled_is_closed(watchdog: Watchdog) -> None:
    run, log = run_of(is_cooperative=True), []

    async def function() -> None:
        try:
            await run.pause()
        finally:
            log.append("closed")

    async def turn() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        await drive_cooperatively(watchdog, run, function, turn)
    assert log == ["closed"]


# -- what a run keeps


def test_log_lines_are_bounded_in_number_and_size() -> None:
    run = run_of(Limits(log_line_count_max=3, log_line_size_bytes_max=20))
    for text in ("short", "é" * 20, "\ud800", "fourth", "fifth"):
        run.log("LOG", (text, 5))
    assert run.log_lines == [
        "[LOG] short 5",
        "[LOG] ééééééé",
        "[LOG] \\ud800 5",
        "[WARN] more than 3 log lines; the rest is not kept",
    ]
    assert all(len(line.encode()) <= 20 for line in run.log_lines[:3])


def test_what_is_read_of_the_identity_is_kept_and_nothing_else() -> None:
    alice = Identity(subject="alice", issuer="https://login.example", claims={"role": "admin", "name": "Alice"})
    run = run_of(identity=alice)
    assert run.parts == {}
    identity = run.identity()
    assert run.parts == {"present": True}
    assert identity is not None
    assert (identity.subject, identity.claims["role"]) == ("alice", "admin")
    assert run.parts == {"present": True, "subject": "alice", "claims.role": "admin"}
    assert run.identity() is identity


def test_nobody_is_a_part_too() -> None:
    run = run_of()
    assert run.identity() is None
    assert run.parts == {"present": False}


def test_a_run_that_has_ended_gives_nothing_more() -> None:
    run = run_of()
    run.end()
    for use in (run.identity, run.check_open, lambda: run.wants_pause):
        with pytest.raises(FunctionMisuse, match="m:get: ctx was used after the function had returned"):
            use()
