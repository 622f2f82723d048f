"""One run: its deadline, its log, its identity, and how it is driven."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator

import pytest

from engine.clock import cpu_clock
from engine.errors import FunctionMisuse
from engine.functions.registry import Function, functions_of, query
from engine.functions.run import Run, drive, drive_cooperatively
from engine.functions.watchdog import Escaped, Watchdog
from engine.identity import Caller, Identity
from engine.limits import Limits
from tests.functions.test_registry import module_of

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


def wait_for(seconds: float) -> None:
    """Hold the thread in Python code."""
    now = cpu_clock()
    end = now() + seconds
    while now() < end:
        pass


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


async def test_a_run_that_is_abandoned_in_an_async_for_leaves_nothing_that_runs(watchdog: Watchdog) -> None:
    run = run_of(is_cooperative=True)

    async def documents() -> AsyncIterator[int]:
        yield 1
        await run.pause()
        yield 2

    async def function() -> list[int]:
        return [document async for document in documents()]

    async def turn() -> None:
        raise asyncio.CancelledError

    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    with pytest.raises(asyncio.CancelledError):
        await drive_cooperatively(watchdog, run, function, turn)
    gc.collect()
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert not errors, "its generator was closed"


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
