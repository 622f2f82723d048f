"""How a function that does not end is stopped: on the loop, in an action's step, in a thread; and nothing else is."""

import asyncio
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import LimitExceeded
from engine.events import FunctionFaulted
from engine.functions import watchdog as module
from engine.functions.run import drive
from engine.functions.watchdog import RunStopped, RunTimedOut, StepTimedOut, ThreadCall, Watchdog
from engine.limits import Limits
from tests.functions.apps import open_app
from tests.functions.test_run import QUICK, run_of, wait_for

# a stop that lands in a callback of the garbage collector is dropped by Python, and comes again
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SECONDS_MAX = 20  # a test that waits longer hangs


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog(QUICK)
    yield watchdog
    watchdog.close()


def spin() -> None:
    while True:
        pass


# -- what is driven


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


def pass_for_the_engine() -> None:
    for _ in range(10_000):
        pass


MOSTLY_ENGINE = """
def loop():
    while True:
        for _ in range(1_000): pass
        into_the_engine()
"""


def stopped_in(watchdog: Watchdog) -> set[bool]:
    """Whether stops have landed in what passes for the engine, and in the rest."""
    app: dict[str, Any] = {"into_the_engine": pass_for_the_engine}
    exec(compile(MOSTLY_ENGINE, "app.py", "exec"), app)
    places = set()
    for _ in range(10):
        with pytest.raises(RunTimedOut) as stopped:
            drive(watchdog, run_of(), app["loop"])
        places.add(stopped.traceback[-1].name == "pass_for_the_engine")
    return places


@pytest.mark.slow
def test_a_stop_does_not_land_in_engine_code(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENGINE", __file__)
    assert stopped_in(watchdog) == {False}


@pytest.mark.slow
def test_the_control_without_the_look_at_the_frame_most_stops_do(watchdog: Watchdog) -> None:
    assert True in stopped_in(watchdog)


def test_an_app_beside_the_engine_is_not_taken_for_it(watchdog: Watchdog) -> None:
    app: dict[str, Any] = {}
    exec(compile("def loop():\n    while True: pass", f"{module._ENGINE[:-1]}_app/functions/m.py", "exec"), app)
    with pytest.raises(RunTimedOut):
        drive(watchdog, run_of(), app["loop"])


# -- an action's steps


async def test_an_actions_step_that_does_not_end_is_stopped_and_its_coroutine_closed(watchdog: Watchdog) -> None:
    log: list[str] = []

    async def function() -> None:
        try:
            await asyncio.sleep(0)
            spin()
        finally:
            log.append("closed")

    with pytest.raises(StepTimedOut):
        await watchdog.steps(function())
    assert log == ["closed"]


async def test_a_step_that_swallows_the_stop_has_failed_all_the_same(watchdog: Watchdog) -> None:
    async def function() -> int:
        try:
            spin()
        except BaseException:  # noqa: BLE001 - what an app may write
            return 5
        return 6

    with pytest.raises(StepTimedOut):
        await watchdog.steps(function())


@pytest.mark.slow
async def test_the_time_that_an_action_waits_does_not_count() -> None:
    async def function() -> int:
        for _ in range(3):
            await asyncio.sleep(0.4)
        return 5

    watchdog = Watchdog(Limits(run_ms_max=1_000))
    try:
        assert await watchdog.steps(function()) == 5
    finally:
        watchdog.close()


async def test_a_run_inside_of_a_step_leaves_the_step_watched(watchdog: Watchdog) -> None:
    async def function() -> None:
        assert drive(watchdog, run_of(), lambda: 5) == 5
        with pytest.raises(RunTimedOut):
            drive(watchdog, run_of(), spin)
        spin()

    with pytest.raises(StepTimedOut):
        await watchdog.steps(function())
    wait_for(0.15)  # nothing hits what comes after


async def test_what_is_thrown_into_an_action_reaches_it(watchdog: Watchdog) -> None:
    caught: list[type[BaseException]] = []

    async def function() -> str:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError as error:
            caught.append(type(error))
        await asyncio.sleep(0)
        try:
            await failing
        except ValueError as error:
            caught.append(type(error))
        return "ended"

    failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    failing.set_exception(ValueError())

    async def wait() -> Any:
        return await watchdog.steps(function())

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "ended"
    assert caught == [asyncio.CancelledError, ValueError]


# -- a thread


def test_a_function_in_a_thread_is_stopped_once_nobody_waits_for_it(watchdog: Watchdog) -> None:
    began, ended = threading.Event(), threading.Event()

    def stubborn() -> None:
        began.set()
        try:
            spin()
        except BaseException:  # noqa: BLE001 - what an app may write
            try:
                spin()
            finally:
                ended.set()

    def in_thread() -> None:
        with pytest.raises(RunStopped):
            call()

    call = ThreadCall(stubborn)
    thread = threading.Thread(target=in_thread)
    thread.start()
    assert began.wait(SECONDS_MAX)
    watchdog.abandon(call)
    assert ended.wait(SECONDS_MAX)
    thread.join(SECONDS_MAX)
    assert not thread.is_alive()


def test_a_call_that_has_ended_or_not_begun_is_not_stopped(watchdog: Watchdog) -> None:
    call = ThreadCall(lambda: 5)
    watchdog.abandon(call)
    assert call() == 5
    watchdog.abandon(call)
    wait_for(0.1)  # nothing hits us here


# -- in an engine

ACTIONS = """
import threading, time
began, ended = threading.Event(), threading.Event()

@action
async def spin(ctx) -> None:
    await asyncio.sleep(0)
    while True: pass

@action
async def spin_after_a_query(ctx) -> None:
    await ctx.run_query("m:one")
    while True: pass

@action
async def block(ctx) -> None:
    time.sleep(0.4)

@action
def spin_in_thread(ctx) -> None:
    try:
        began.set()
        while True: pass
    finally:
        ended.set()

@query
async def one(ctx) -> int: return 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["m:spin", "m:spin_after_a_query", "m:block"])
async def test_an_action_that_holds_the_loop_fails_and_says_what_to_do(tmp_path: Path, path: str) -> None:
    async with open_app(tmp_path, ACTIONS, limits=Limits(run_ms_max=200)) as app:
        failure = await app.failure(path)
        assert type(failure.error) is LimitExceeded
        assert f"run time in ms of {path} between two awaits: 200 used" in failure.message
        assert "Make it a plain `def`" in failure.message
        assert failure.error.__cause__ is None, "it is kept, and would keep the frames"
        (fault,) = [event for event in app.events if isinstance(event, FunctionFaulted)]
        assert f"in {path.removeprefix('m:')}" in "".join(traceback.format_exception(fault.error)), "the log says where"
        assert await app.call("m:one") == 1


@pytest.mark.slow
async def test_a_plain_action_past_its_time_is_stopped_in_its_thread(tmp_path: Path) -> None:
    async with open_app(tmp_path, ACTIONS, limits=Limits(action_seconds_max=60)) as app:
        names = app.engine.registry.by_path["m:spin_in_thread"].callable.__globals__
        failing = asyncio.ensure_future(app.failure("m:spin_in_thread"))
        assert await asyncio.to_thread(names["began"].wait, SECONDS_MAX)
        app.clock.advance(60)
        assert (await failing).code == "LimitExceeded"
        assert await asyncio.to_thread(names["ended"].wait, SECONDS_MAX)
