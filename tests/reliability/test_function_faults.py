"""Functions that go wrong in every way that is known: the caller is told in time, all is undone, nobody else notices.

Each fault alone, as a query, a mutation and an action; then a thousand at random, after which nothing is left of them.
More by the environment: REL_N faults, REL_SEED. What a run may use up to its limits is `functions/test_runner.py`'s.
"""

import asyncio
import gc
import os
import random
import resource
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import msgspec
import pytest

from engine.clock import cpu_clock
from engine.functions import watchdog
from engine.functions.registry import FunctionKind
from engine.functions.run import Run
from engine.limits import Limits
from engine.storage.connections import WriterConnection
from tests.functions.apps import OpenApp, open_app

# a stop that lands in a callback of the garbage collector is dropped by Python, and comes again
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FAULT_COUNT = int(os.environ.get("REL_N", 1_000))
SEED = int(os.environ.get("REL_SEED", 1))
RUN_MS_MAX = 100
OVERRUN_SECONDS_MAX = 0.2  # from the limit to the answer
TRY_COUNT = 3  # on a busy machine one of them is in time
GROWTH_BYTES_MAX = 8 << 20
KINDS: tuple[FunctionKind, ...] = ("query", "mutation", "action")
READ_WRITE: tuple[FunctionKind, ...] = ("query", "mutation")
cpu = cpu_clock()


class Fault(NamedTuple):
    """A body that goes wrong, and the code of the error that its caller gets."""

    body: str
    code: str
    kinds: tuple[FunctionKind, ...] = KINDS


IN_TIME = {  # stopped while they run
    "endless loop": Fault("while True: pass", "LimitExceeded"),
    "endless loop that swallows": Fault(
        "while True:\n    try:\n        while True: pass\n    except Exception: pass", "LimitExceeded"
    ),
    "endless generator": Fault("sum(1 for _ in iter(int, 1))", "LimitExceeded"),
    "endless recursion that swallows": Fault(
        "def f():\n    while True:\n        try: f()\n        except RecursionError: pass\nf()", "LimitExceeded"
    ),
    "endless logging": Fault("while True: ctx.log('again')", "LimitExceeded"),
    "endless building of scans": Fault("while True: ctx.db.query(Item.by_key, key='a')", "LimitExceeded", READ_WRITE),
    "endless reading": Fault("while True: await ctx.db.query(Item).first()", "LimitExceeded", READ_WRITE),
    "endless nesting": Fault("while True: await ctx.run_query('m:count')", "LimitExceeded", READ_WRITE),
    "endless cleanup": Fault("try:\n    while True: pass\nfinally:\n    while True: pass", "LimitExceeded"),
}
LATE = {  # what blocks ends by itself, and has failed then
    "sleep": Fault("time.sleep(0.2)", "LimitExceeded"),
    "silent socket": Fault(
        "a, b = socket.socketpair()\nwith a, b:\n    a.settimeout(0.2)\n    a.recv(1)", "LimitExceeded"
    ),
    "sleep that is caught": Fault("try: time.sleep(0.2)\nexcept BaseException: return 1", "LimitExceeded"),
}
AT_ONCE = {
    "exception": Fault("raise ValueError('boom')", "FunctionFailed"),
    "exception of the app": Fault("raise AppError({'why': 'because'})", "AppError"),
    "exit": Fault("raise SystemExit(3)", "FunctionFailed"),
    "exit by the system": Fault("sys.exit()", "FunctionFailed"),
    "base exception": Fault("raise BaseException", "FunctionFailed"),
    "cancelled by itself": Fault("raise asyncio.CancelledError", "FunctionFailed"),
    "group of exceptions": Fault("raise BaseExceptionGroup('many', [SystemExit(), ValueError()])", "FunctionFailed"),
    "deep recursion": Fault("def f(): return f()\nf()", "FunctionFailed"),
    "deep value": Fault("v = []\nfor _ in range(5_000): v = [v]\nreturn v", "InvalidResult"),
    "huge result": Fault("return 'x' * (9 << 20)", "LimitExceeded"),
    "unserialisable result": Fault("return object()", "InvalidResult"),
    "result that contains itself": Fault("v = {}\nv['v'] = v\nreturn v", "InvalidResult"),
    "generator returned": Fault("return (n for n in range(3))", "InvalidResult"),
    "async generator returned": Fault("async def g():\n    yield 1\nreturn g()", "InvalidResult"),
    "memory": Fault("return len(b'x' * (1 << 40))", "FunctionFailed"),
    "wait for what never comes": Fault("await asyncio.Event().wait()", "FunctionMisuse", READ_WRITE),
    "wait for a task": Fault("await asyncio.create_task(asyncio.sleep(0))", "FunctionMisuse", READ_WRITE),
    "task leaked": Fault(
        "async def later():\n    try: await ctx.run_query('m:count')\n    except Exception: pass\n"
        "tasks.add(task := asyncio.create_task(later()))\ntask.add_done_callback(tasks.discard)\nraise ValueError",
        "FunctionFailed",
    ),
    "ctx kept": Fault("kept.append(ctx)\nif len(kept) > 3: kept.clear()\nraise ValueError", "FunctionFailed"),
    "error with a large cycle": Fault("e = ValueError()\ne.me = [e, 'x' * 10_000]\nraise e", "FunctionFailed"),
}
FAULTS = IN_TIME | LATE | AT_ONCE
CASES = [(kind, name) for name, fault in FAULTS.items() for kind in fault.kinds]
GOOD = """
import socket, sys, time
kept, tasks = [], set()

@mutation
async def add(ctx, key: str = "k") -> int:
    await ctx.db.insert(Item(key=key))
    return await ctx.db.query(Item).count()

@query
async def count(ctx) -> int: return await ctx.db.query(Item).count()

@mutation
async def lose(ctx) -> None: await ctx.db.insert(Item(key="lost"))
"""
LIMITS = Limits(
    run_ms_max=RUN_MS_MAX,
    run_slow_ms=RUN_MS_MAX // 2,
    read_range_count_max=1 << 40,
    read_document_count_max=1 << 40,
    group_commit_ms_max=10_000,  # what is called at once is in one commit
)
LENIENT = msgspec.structs.replace(LIMITS, run_ms_max=1_000, run_slow_ms=500)  # a busy machine is no fault
PATIENT = msgspec.structs.replace(LIMITS, run_ms_max=10_000, run_slow_ms=10_000)


def source() -> str:
    """An app with a function for each fault and kind: `m:query_0`, …; a mutation writes before it fails."""
    functions = [GOOD]
    for number, fault in enumerate(FAULTS.values()):
        for kind in fault.kinds:
            write = "    await ctx.db.insert(Item(key='lost'))\n" if kind == "mutation" else ""
            functions.append(f"@{kind}\nasync def {kind}_{number}(ctx) -> Any:\n{write}{indent(fault.body, '    ')}\n")
    return "\n".join(functions)


def path_of(kind: FunctionKind, name: str) -> str:
    return f"m:{kind}_{list(FAULTS).index(name)}"


@contextmanager
def memory_limited() -> Iterator[None]:
    """As on a machine that has little left: what asks for more gets MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@asynccontextmanager
async def faulty_app(directory: Path, limits: Limits) -> AsyncIterator[OpenApp]:
    async with open_app(directory, source(), limits=limits) as app:
        await app.call("m:add", key="first")
        yield app


async def fail(app: OpenApp, kind: FunctionKind, name: str) -> float:
    """Let a fault happen, and check all that is promised of it but the time, which is given."""
    count, task_count = await app.call("m:count"), len(asyncio.all_tasks())
    began = cpu()
    with memory_limited():
        failing = asyncio.ensure_future(app.failure(path_of(kind, name)))
        beside = asyncio.ensure_future(app.call("m:add"))  # of a mutation: in the same commit
        failure = await failing
    seconds = cpu() - began
    await beside
    assert failure.code == FAULTS[name].code, failure.message
    await app.idle()
    assert not app.engine.failed.done(), "the engine goes on"
    assert await app.call("m:count") == count + 1, "what it wrote is gone"
    with closing(sqlite3.connect(app.directory.parent / "engine.db", timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")  # the lock is released
        other.execute("ROLLBACK")
    for _ in range(3):
        await asyncio.sleep(0)  # a task that the function has left may run to its end
    assert len(asyncio.all_tasks()) <= task_count, "no task is left"
    assert await app.call("m:add") == count + 2, "the next call is well"
    return seconds


async def overrun(app: OpenApp, kind: FunctionKind, name: str) -> float:
    """How long after its limit a fault was stopped, in seconds; the best of some tries."""
    return min([await fail(app, kind, name) for _ in range(TRY_COUNT)]) - RUN_MS_MAX / 1000


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[OpenApp]:
    async with faulty_app(tmp_path, PATIENT) as app:
        yield app


@pytest.fixture
async def strict_app(tmp_path: Path) -> AsyncIterator[OpenApp]:
    async with faulty_app(tmp_path, LIMITS) as app:
        yield app


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_a_function_that_does_not_end_is_stopped_in_time(strict_app: OpenApp, kind: FunctionKind) -> None:
    for name, fault in IN_TIME.items():
        if kind in fault.kinds:
            assert await overrun(strict_app, kind, name) <= OVERRUN_SECONDS_MAX, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_what_blocks_has_failed_when_it_returns(strict_app: OpenApp, kind: FunctionKind) -> None:
    for name in LATE:
        assert await fail(strict_app, kind, name) >= 0.2, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_what_fails_at_once_fails_alone(app: OpenApp, kind: FunctionKind) -> None:
    for name, fault in AT_ONCE.items():
        if kind in fault.kinds:
            await fail(app, kind, name)


async def test_an_async_generator_is_no_function_and_its_caller_is_told(tmp_path: Path) -> None:
    functions = "".join(f"@{kind}\nasync def {kind}_it(ctx) -> Any:\n    yield 1\n" for kind in KINDS)
    async with open_app(tmp_path, functions, limits=LIMITS) as app:
        for kind in KINDS:
            assert (await app.failure(f"m:{kind}_it")).code == "InvalidResult"


async def test_changing_what_was_returned_changes_nobodys_result(tmp_path: Path) -> None:
    functions = """
shared = ["a"]
@query
async def show(ctx) -> list[str]: return shared
@mutation
async def spoil(ctx) -> None: shared.append("b")
"""
    async with open_app(tmp_path, functions, limits=LIMITS) as app, app.engine.subscribe("m:show") as results:
        assert await anext(results) == ["a"]
        await app.call("m:spoil")
        assert await app.call("m:show") == ["a"], "nothing that it read was written"
        (await app.call("m:show")).append("c")
        assert await app.call("m:show") == ["a"]


# -- cancelled at each wait

STEPS = """
import time
step, log = 0, []

@query
async def count(ctx) -> int: return await ctx.db.query(Item).count()
@mutation
async def add_two(ctx) -> None:
    for _ in range(2): await ctx.db.insert(Item(key="k"))
@action
async def inner(ctx) -> None: await asyncio.sleep(0)
@action
def plain(ctx) -> None: time.sleep(0.001)

def passing():
    global step
    step += 1

@action
async def walk(ctx) -> None:
    try:
        passing(); await ctx.run_query("m:count")
        passing(); await ctx.run_mutation("m:add_two")
        passing(); await ctx.run_action("m:inner")
        passing(); await ctx.run_action("m:plain")
        passing(); await ctx.scheduler.run_after(9e9, "m:add_two")
        passing(); await asyncio.gather(*[ctx.run_mutation("m:add_two") for _ in range(3)])
        passing(); await asyncio.sleep(0)
        passing(); await asyncio.to_thread(time.sleep, 0.001)
        passing()
    finally:
        log.append(step)
"""
STEP_COUNT = 9


async def test_an_action_that_is_cancelled_at_any_wait_leaves_whole_mutations_and_nothing_else(tmp_path: Path) -> None:
    async with open_app(tmp_path, STEPS) as app:
        names = app.engine.registry.by_path["m:walk"].callable.__globals__
        await app.call("m:walk")
        assert names["step"] == STEP_COUNT
        task_count = len(asyncio.all_tasks())
        for step in range(1, STEP_COUNT):
            names["step"], answers = 0, []
            before = await app.call("m:count")
            task = app.engine.backend.start_action("m:walk", b"{}", None, answers.append)
            while names["step"] < step:  # noqa: ASYNC110 - the loop's turns are what is counted
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await app.idle()
            assert answers == []
            assert names["log"][-1] >= step, "it was cancelled where it waited, and cleaned up"
            assert (await app.call("m:count") - before) % 2 == 0, "mutations are whole"
            assert len(asyncio.all_tasks()) == task_count
            await app.call("m:add_two")
        assert not app.engine.failed.done()


async def test_a_mutation_whose_caller_leaves_is_whole_and_the_next_is_well(tmp_path: Path) -> None:
    async with open_app(tmp_path, STEPS) as app:
        for turn_count in range(6):
            before = await app.call("m:count")
            call = asyncio.create_task(app.engine.mutation("m:add_two"))
            for _ in range(turn_count):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await app.idle()
            assert (await app.call("m:count") - before) in (0, 2)


# -- a thousand


async def census(app: OpenApp) -> dict[str, int]:
    await app.idle()
    gc.collect()
    classes = [type(each) for each in gc.get_objects()]
    alive = Counter(each.__qualname__ for each in classes if str(each.__module__).startswith("engine."))
    del alive["_Timer"]  # those of the test's clock stay until their time has come, cancelled or not
    return {"tasks": len(asyncio.all_tasks()), "threads": threading.active_count(), **alive}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def leftovers(app: OpenApp, fault_count: int) -> dict[str, Any]:
    """What there is more of after so many faults than after the first fifth of them, by kind; and bytes."""
    choices, random_source = [case for case in CASES if case[1] in AT_ONCE], random.Random(SEED)
    costly = [case for case in CASES if case[1] in IN_TIME]
    app.engine.events.listeners.clear()  # they keep what they are told
    baseline: dict[str, int] = {}
    resident = 0
    for number in range(fault_count):
        if number == fault_count // 5:
            baseline, resident = await census(app), resident_bytes()
        kind, name = random_source.choice(costly if number % 200 == 199 else choices)
        code = (await app.failure(path_of(kind, name))).code
        assert code in (FAULTS[name].code, "LimitExceeded"), "on a busy machine anything may take too long"
        if number % 10 == 0:
            await app.call("m:add")
    names = app.engine.registry.by_path["m:count"].callable.__globals__
    names["kept"].clear()
    left = {name: count - baseline.get(name, 0) for name, count in (await census(app)).items()}
    growth = resident_bytes() - resident
    more = {name: count for name, count in left.items() if count > 10}
    return more | ({"bytes": growth} if growth > GROWTH_BYTES_MAX else {})


@pytest.mark.slow
async def test_after_a_thousand_faults_nothing_is_left_of_them(tmp_path: Path) -> None:
    async with faulty_app(tmp_path, LENIENT) as app:
        assert await leftovers(app, FAULT_COUNT) == {}, f"seed {SEED}"
        assert not app.engine.failed.done()


# -- controls


async def test_the_control_without_the_watchdog_a_loop_is_not_stopped_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = (
        GOOD
        + "@query\nasync def query_0(ctx) -> None:\n    end = time.time() + 0.6\n    while time.time() < end: pass\n"
    )
    monkeypatch.setattr(watchdog, "_inject", lambda thread_id, error: None)
    async with open_app(tmp_path, functions, limits=LIMITS) as app:
        await app.call("m:add")
        assert path_of("query", "endless loop") == "m:query_0"
        assert await overrun(app, "query", "endless loop") > OVERRUN_SECONDS_MAX


async def test_the_control_an_engine_that_does_not_undo_is_found(app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WriterConnection, "rollback_to", lambda self: None)
    with pytest.raises(AssertionError, match="what it wrote is gone"):
        await fail(app, "mutation", "exception")


async def test_the_control_an_engine_that_keeps_each_run_is_found(
    app: OpenApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Run] = []
    end = Run.end

    def end_and_keep(self: Run, *arguments: Any) -> None:
        kept.append(self)
        end(self, *arguments)

    monkeypatch.setattr(Run, "end", end_and_keep)
    assert (await leftovers(app, 100))["Run"] > 10
