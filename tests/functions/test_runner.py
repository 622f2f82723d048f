"""Runs as their callers meet them: faults stay with the one who made them, limits hold exactly, runs repeat."""

import asyncio
import re
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import msgspec
import pytest

from engine.errors import EngineError, FunctionFailed, FunctionMisuse, InvalidResult, LimitExceeded, RegistryError
from engine.events import ActionRan, FunctionFaulted, MutationRan
from engine.functions.registry import FunctionKind
from engine.identity import Identity
from engine.limits import Limits
from tests.functions.apps import UNHURRIED, open_app

KINDS: tuple[FunctionKind, ...] = ("query", "mutation", "action")
GOOD = """
@mutation
async def add(ctx, key: str = "k", count: int = 1) -> int:
    for rank in range(count):
        await ctx.db.insert(Item(key=key, rank=rank))
    return count

@query
async def count(ctx) -> int:
    return await ctx.db.query(Item).count()
"""


class Fault(NamedTuple):
    """A body that goes wrong, and how its caller is told."""

    body: str
    error: type[EngineError]
    message: str
    returns: str = "Any"


FAULTS = {
    "exception": Fault("raise ValueError('boom')", FunctionFailed, "m:fault raised ValueError: boom"),
    "assertion": Fault("assert 1 == 2, 'no'", FunctionFailed, "m:fault raised AssertionError: no"),
    "memory": Fault("raise MemoryError", FunctionFailed, "m:fault raised MemoryError"),
    "exit": Fault("raise SystemExit(3)", FunctionFailed, "m:fault raised SystemExit: 3"),
    "base exception": Fault("raise BaseException('odd')", FunctionFailed, "m:fault raised BaseException: odd"),
    "generator exit": Fault("raise GeneratorExit", FunctionFailed, "m:fault raised GeneratorExit"),
    "cancelled": Fault("raise asyncio.CancelledError", FunctionFailed, "m:fault raised asyncio.exceptions.Cancelled"),
    "timeout": Fault("raise TimeoutError('theirs')", FunctionFailed, "m:fault raised TimeoutError: theirs"),
    "no next": Fault("next(iter([]))", FunctionFailed, "StopIteration"),
    "recursion": Fault("def f(): return f()\nf()", FunctionFailed, "m:fault raised RecursionError"),
    "error without text": Fault(
        "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd", FunctionFailed, "m:fault raised"
    ),
    "text that is no UTF-8": Fault("raise ValueError('\\ud800')", FunctionFailed, "m:fault raised ValueError"),
    "wrong type": Fault("return 'x'", InvalidResult, "expected int, got 'x'", returns="int"),
    "wrong type inside": Fault("return [{'a': 'x'}]", InvalidResult, "[0].a", returns="list[dict[str, int]]"),
    "nothing": Fault("return None", InvalidResult, "expected int, got null", returns="int"),
    "object": Fault("return object()", InvalidResult, "object"),
    "function": Fault("return fault", InvalidResult, "function"),
    "generator": Fault("return (i for i in range(3))", InvalidResult, "generator"),
    "coroutine": Fault("c = ctx.run_query('m:count')\nc.close()\nreturn c", InvalidResult, "coroutine"),
    "itself inside": Fault("a = []\na.append(a)\nreturn a", InvalidResult, "nests deeper than 64 levels"),
    "text that is no UTF-8 returned": Fault("return '\\ud800'", InvalidResult, "lone surrogate"),
    "key of no object": Fault("return {'$x': 1}", InvalidResult, "$x"),
    "huge": Fault("return 'x' * (9 << 20)", LimitExceeded, "limits.result_size_bytes_max"),
    "unknown name": Fault("ctx.nothing", FunctionFailed, "ctx has no 'nothing'"),
    "unknown method": Fault("await ctx.db.nothing()", FunctionFailed, "ctx.db has no 'nothing'"),
    "action called": Fault("ctx.run_action('m:count')", FunctionMisuse, "ctx.run_action is there in actions only"),
}
WAITS = {
    "sleep": "await asyncio.sleep(1)",
    "sleep of no time": "await asyncio.sleep(0)",
    "foreign future": "await asyncio.get_running_loop().create_future()",
    "event": "await asyncio.Event().wait()",
    "task": "await asyncio.create_task(asyncio.sleep(0))",
    "future returned": "return asyncio.get_running_loop().create_future()",
    "thread": "await asyncio.to_thread(int)",
    "cleanup that fails": "try:\n    await asyncio.sleep(1)\nfinally:\n    raise SystemExit",
    "cleanup that waits": "try:\n    await asyncio.sleep(1)\nfinally:\n    await asyncio.sleep(1)",
}
FAULTS |= {
    f"wait: {name}": Fault(body, FunctionMisuse, "m:fault: a KIND waited for something that is not ctx.db")
    for name, body in WAITS.items()
    if name != "future returned"
}
ONLY_PLAIN = {
    "future returned": Fault(WAITS["future returned"], FunctionMisuse, "m:fault: a KIND waited for something"),
}
NOT_IN_ACTIONS = {name for name in FAULTS if name.startswith("wait: ")} | {
    "unknown method",
    "action called",
    "generator exit",
}


def faulty(fault: Fault, kind: FunctionKind, *, plain: bool = False) -> str:
    """An app whose `m:fault` is this one; a mutation writes before."""
    write = "" if plain or kind != "mutation" else "    await ctx.db.insert(Item(key='lost'))\n"
    define = "def" if plain else "async def"
    return f"{GOOD}\n@{kind}\n{define} fault(ctx) -> {fault.returns}:\n{write}{indent(fault.body, '    ')}\n"


def is_awaiting(body: str) -> bool:
    return "await " in body


CASES = [(kind, name, False) for kind in KINDS for name in FAULTS if kind != "action" or name not in NOT_IN_ACTIONS] + [
    (kind, name, True)
    for kind in KINDS
    for name, fault in (FAULTS | ONLY_PLAIN).items()
    if name != "coroutine"  # a plain function that returns one is awaited
    and not is_awaiting(fault.body)
    and (kind != "action" or name not in (NOT_IN_ACTIONS | set(ONLY_PLAIN)))
]


@pytest.mark.parametrize(("kind", "name", "plain"), CASES)
@pytest.mark.filterwarnings("ignore:coroutine 'sleep' was never awaited")  # of the app
async def test_a_faulty_function_fails_alone(tmp_path: Path, kind: FunctionKind, name: str, plain: bool) -> None:
    fault = (FAULTS | ONLY_PLAIN)[name]
    async with open_app(tmp_path, faulty(fault, kind, plain=plain)) as app, app.watched("m:count") as counts:
        failure = await app.failure("m:fault")
        assert type(failure.error) is fault.error
        assert fault.message.replace("KIND", kind) in str(failure.error)
        assert failure.code == fault.error.code
        failure.message.encode()  # fit for a frame
        await app.idle()
        assert app.run_count("m:count") == 0, "what it wrote is gone, and nobody is told of it"
        assert await app.call("m:add") == 1
        assert await anext(counts) == 1
        assert not app.engine.failed.done()


async def test_a_plain_function_is_as_good_as_a_coroutine(tmp_path: Path) -> None:
    functions = "".join(f"@{kind}\ndef {kind}_plain(ctx, n: int) -> int: return n + 1\n" for kind in KINDS)
    async with open_app(tmp_path, functions) as app:
        for kind in KINDS:
            assert await app.call(f"m:{kind}_plain", n=1) == 2


@pytest.mark.slow
async def test_many_faults_leave_no_task_behind(tmp_path: Path) -> None:
    functions = (
        GOOD
        + """
@mutation
async def fault(ctx, n: int) -> int:
    await ctx.db.insert(Item(key="lost"))
    match n % 4:
        case 0: raise ValueError
        case 1: raise SystemExit
        case 2: await asyncio.sleep(1)
        case _: await ctx.run_mutation("m:fault", n=n + 1)
"""
    )
    async with open_app(tmp_path, functions) as app:
        await app.failure("m:fault", n=0)
        tasks = len(asyncio.all_tasks())
        for n in range(400):
            await app.failure("m:fault", n=n)
        await app.idle()
        assert len(asyncio.all_tasks()) == tasks
        assert await app.call("m:count") == 0


# -- endless functions

# a stop that lands in a callback of the garbage collector is dropped by Python, and comes again
STOPPED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ENDLESS = {
    "loop": "while True: pass",
    "loop that swallows": "while True:\n    try:\n        while True: pass\n    except Exception: pass",
    "loop over ctx.db": "while True: await ctx.db.query(Item).first()",
    "loop over ctx.db that swallows": (
        "while True:\n    try: await ctx.db.query(Item).first()\n    except Exception: pass"
    ),
    "stop swallowed": "try:\n    while True: pass\nexcept BaseException: return 1",
    "nested": "await ctx.run_query('m:spin')",
}


@pytest.mark.slow
@STOPPED
@pytest.mark.parametrize("kind", ["query", "mutation"])
@pytest.mark.parametrize("name", ENDLESS)
async def test_a_function_that_does_not_end_is_stopped(tmp_path: Path, kind: FunctionKind, name: str) -> None:
    fault = Fault(ENDLESS[name], LimitExceeded, "")
    spin = "\n@query\nasync def spin(ctx) -> None:\n    while True: pass\n"
    limits = Limits(run_ms_max=200, run_slow_ms=100, read_range_count_max=1 << 40, read_document_count_max=1 << 40)
    async with open_app(tmp_path, faulty(fault, kind) + spin, limits=limits) as app:
        failure = await app.failure("m:fault")
        assert type(failure.error) is LimitExceeded
        assert "run time in ms of m:fault" in str(failure.error)
        assert "limits.run_ms_max" in str(failure.error)
        assert await app.call("m:add") == 1
        assert await app.call("m:count") == 1


@pytest.mark.slow
@STOPPED
async def test_a_nested_mutation_that_does_not_end_takes_its_callers_writes_with_it(tmp_path: Path) -> None:
    functions = (
        GOOD
        + """
@mutation(internal=True)
async def inner(ctx) -> None:
    await ctx.db.insert(Item(key="inner"))
    while True: pass

@mutation
async def outer(ctx) -> None:
    await ctx.db.insert(Item(key="outer"))
    await ctx.run_mutation(inner)
"""
    )
    async with open_app(tmp_path, functions, limits=Limits(run_ms_max=200)) as app:
        failing = asyncio.ensure_future(app.failure("m:outer"))
        beside = asyncio.ensure_future(app.call("m:add"))  # in the same group commit
        assert (await failing).code == "LimitExceeded"
        await beside
        assert await app.call("m:count") == 1


# -- ctx after the return

LEAKS = """
leaked = []

@{kind}
async def leak(ctx) -> None:
    async def later():
        {use}
    leaked.append(asyncio.create_task(later()))
"""


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("query", "await ctx.db.query(Item).collect()"),
        ("query", "await ctx.db.query(Item).count()"),
        ("query", "[item async for item in ctx.db.query(Item)]"),
        ("query", "await ctx.run_query('m:count')"),
        ("query", "ctx.auth.identity()"),
        ("mutation", "await ctx.db.insert(Item(key='x'))"),
        ("mutation", "await ctx.db.query(Item).first()"),
        ("mutation", "await ctx.run_mutation('m:add')"),
        ("mutation", "await ctx.scheduler.run_after(0, 'm:add')"),
        ("mutation", "await ctx.scheduler.cancel('x')"),
        ("action", "await ctx.run_query('m:count')"),
        ("action", "await ctx.run_mutation('m:add')"),
        ("action", "await ctx.run_action('m:leak')"),
        ("action", "await ctx.scheduler.run_after(0, 'm:add')"),
        ("action", "await ctx.scheduler.cancel('x')"),
    ],
)
async def test_a_leaked_task_finds_ctx_dead(tmp_path: Path, kind: FunctionKind, use: str) -> None:
    async with open_app(tmp_path, GOOD + LEAKS.format(kind=kind, use=use)) as app:
        await app.call("m:leak")
        leaked = app.engine.registry.by_path["m:leak"].callable.__globals__["leaked"]
        with pytest.raises(FunctionMisuse, match="m:leak: ctx was used after the function had returned"):
            await leaked[0]
        await app.idle()
        assert await app.call("m:count") == 0


# -- writes in queries, and who has what


@pytest.mark.parametrize(
    ("kind", "use", "message"),
    [
        ("query", "await ctx.db.insert(Item(key='x'))", r"m:f: ctx\.db\.insert in a query; .* Make it a @mutation"),
        ("query", "await ctx.db.patch('x', rank=1)", r"ctx\.db\.patch in a query"),
        ("query", "await ctx.db.replace('x', Item(key='x'))", r"ctx\.db\.replace in a query"),
        ("query", "await ctx.db.delete('x')", r"ctx\.db\.delete in a query"),
        ("query", "ctx.scheduler", r"ctx\.scheduler is there in mutations and actions only"),
        ("query", "await ctx.run_mutation('m:add')", r"ctx\.run_mutation is there in mutations and actions only"),
        ("mutation", "await ctx.run_action('m:f')", r"ctx\.run_action is there in actions only"),
        ("action", "await ctx.db.get('x')", r"ctx\.db is there in queries and mutations"),
    ],
)
async def test_what_a_kind_of_function_may_not_is_said_clearly(
    tmp_path: Path, kind: FunctionKind, use: str, message: str
) -> None:
    async with open_app(tmp_path, f"{GOOD}\n@{kind}\nasync def f(ctx) -> None:\n    {use}\n") as app:
        with pytest.raises(FunctionMisuse, match=message):
            await app.call("m:f")


async def test_changing_a_document_or_an_argument_changes_nobody_elses(tmp_path: Path) -> None:
    functions = """
@query
async def spoil(ctx, numbers: list[int] = [1]) -> list[int]:
    numbers.append(2)
    return numbers

@mutation
async def frozen(ctx) -> None:
    id = await ctx.db.insert(Item(key="a"))
    (await ctx.db.get(id)).key = "b"
"""
    async with open_app(tmp_path, functions) as app:
        for _ in range(2):
            assert await app.call("m:spoil") == [1, 2]
            assert await app.call("m:spoil", numbers=[1]) == [1, 2]
            await app.engine.reload()  # what was shared is gone
        with pytest.raises(FunctionFailed, match="immutable"):
            await app.call("m:frozen")


# -- determinism

DRAWS = """
@query
async def draw(ctx, n: int = 0) -> float: return ctx.random.random()
@mutation
async def stamp(ctx) -> list[float]: return [ctx.now, ctx.random.random()]
@mutation
async def nested(ctx) -> list[float]: return [ctx.random.random(), *[await ctx.run_query(draw, n=n) for n in range(2)]]
@action
async def act(ctx) -> float: return ctx.random.random()
"""


async def test_a_query_draws_the_same_numbers_for_the_same_arguments_in_every_engine(tmp_path: Path) -> None:
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        async with open_app(tmp_path / name, DRAWS) as app:
            drawn.append([await app.call("m:draw", n=n) for n in range(3)])
            await app.engine.reload()
            drawn.append([await app.call("m:draw", n=n) for n in range(3)])
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]
    assert len(set(drawn[0])) == 3


async def test_now_strictly_grows_over_mutations_even_when_no_time_passes_or_the_clock_is_set_back(
    tmp_path: Path,
) -> None:
    stamps = []
    for _ in range(2):
        async with open_app(tmp_path, DRAWS) as app:
            stamps += await asyncio.gather(*[app.call("m:stamp") for _ in range(20)])
            app.clock.advance(1)
            stamps.append(await app.call("m:stamp"))
            app.clock.set_wall(1_000)
            stamps.append(await app.call("m:stamp"))
    times = [now for now, _ in stamps]
    assert times[:22] == sorted(set(times[:22]))
    assert len({drawn for _, drawn in stamps[:22]}) == 22, "each mutation draws numbers of its own"


async def test_functions_in_one_run_draw_different_numbers_and_a_query_those_that_are_its_own(tmp_path: Path) -> None:
    async with open_app(tmp_path, DRAWS) as app:
        drawn = await app.call("m:nested")
        assert len(set(drawn)) == 3
        assert drawn[1:] == [await app.call("m:draw", n=n) for n in range(2)]
        assert await app.call("m:act") != await app.call("m:act")


# -- what is shown

TALKING = """
@{kind}
async def talk(ctx, data: Any = None) -> None:
    ctx.log("it's", 5)
    ctx.log.warn("careful")
    {end}
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["", "raise ValueError"])
async def test_log_lines_reach_the_client_in_development_only(tmp_path: Path, kind: FunctionKind, end: str) -> None:
    functions = TALKING.format(kind=kind, end=end)
    async with open_app(tmp_path, functions) as app:
        assert (await app.outcome("m:talk")).log_lines == ("[LOG] it's 5", "[WARN] careful")
    async with open_app(tmp_path, functions, mode="production") as app:
        assert (await app.outcome("m:talk")).log_lines == ()


@pytest.mark.parametrize("kind", KINDS)
async def test_production_hides_the_error_and_tells_it_under_the_request_id(tmp_path: Path, kind: FunctionKind) -> None:
    functions = TALKING.format(kind=kind, end="raise ValueError('the password is secret')")
    async with open_app(tmp_path, functions, mode="production") as app:
        failure = await app.failure("m:talk")
        found = re.fullmatch(r"\[Request ID: ([0-9a-f]{16})\] Server Error", failure.message)
        assert found is not None
        assert failure.data is None
        (fault,) = [event for event in app.events if isinstance(event, FunctionFaulted)]
        assert (fault.path, fault.request_id, str(fault.error)) == ("m:talk", found[1], "the password is secret")
        assert fault.error.__traceback__ is not None


@pytest.mark.parametrize("kind", KINDS)
async def test_development_shows_the_traceback_of_the_app_alone(tmp_path: Path, kind: FunctionKind) -> None:
    functions = TALKING.format(kind=kind, end="raise ValueError('oh')")
    async with open_app(tmp_path, functions) as app:
        message = (await app.failure("m:talk")).message
    assert re.match(r"\[Request ID: [0-9a-f]{16}\] Server Error\nUncaught ValueError: oh\n", message)
    assert "raise ValueError('oh')" in message
    assert "m.py" in message
    assert "engine/functions" not in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["development", "production"])
async def test_data_of_an_app_error_passes_in_either_mode(tmp_path: Path, kind: FunctionKind, mode: Any) -> None:
    async with open_app(tmp_path, TALKING.format(kind=kind, end="raise AppError(data)"), mode=mode) as app:
        failure = await app.failure("m:talk", data={"code": "FULL", "seats": 2**60})
        assert failure.code == "AppError"
        assert failure.data is not None
        assert msgspec.json.decode(failure.data) == {"code": "FULL", "seats": {"$integer": "AAAAAAAAABA="}}
        assert not [event for event in app.events if isinstance(event, FunctionFaulted)], "it is no fault"


async def test_data_that_the_wire_does_not_know_is_the_functions_fault(tmp_path: Path) -> None:
    async with open_app(tmp_path, TALKING.format(kind="query", end="raise AppError(object())")) as app:
        assert (await app.failure("m:talk")).code == "InvalidResult"


async def test_each_run_is_told_as_an_event(tmp_path: Path) -> None:
    functions = (
        GOOD + "@action\nasync def act(ctx, n: int) -> float: return 1 / n\n@mutation\nasync def bad(ctx): 1 / 0\n"
    )
    async with open_app(tmp_path, functions) as app:
        await app.call("m:add")
        await app.failure("m:bad")
        await app.call("m:act", n=1)
        await app.failure("m:act", n=0)
        told = [event for event in app.events if isinstance(event, MutationRan | ActionRan)]
    assert told == [
        MutationRan("m:add", True),
        MutationRan("m:bad", False),
        ActionRan("m:act", True),
        ActionRan("m:act", False),
    ]


async def test_the_identity_reaches_each_kind_of_function(tmp_path: Path) -> None:
    body = (
        "(ctx) -> str | None:\n    identity = ctx.auth.identity()\n    return identity and identity.token_identifier\n"
    )
    functions = "".join(f"@{kind}\nasync def {kind}_who{body}" for kind in KINDS)
    alice = Identity(subject="alice", issuer="https://login.example")
    async with open_app(tmp_path, functions) as app:
        for kind in KINDS:
            assert await app.call(f"m:{kind}_who") is None
            assert await app.call(f"m:{kind}_who", identity=alice) == "https://login.example|alice"


# -- actions


WAITING = """
from datetime import timedelta
began, log = asyncio.Event(), []

@action
async def wait(ctx) -> None:
    began.set()
    await asyncio.get_running_loop().create_future()

@action(timeout=timedelta(seconds=2.5))
async def wait_briefly(ctx) -> None:
    try:
        await ctx.run_action(wait)
    finally:
        log.append("ended")

@action
async def call(ctx) -> str:
    try:
        await ctx.run_action(wait_briefly)
    except LimitExceeded as error:
        return f"caught: {error}"
"""


@pytest.mark.parametrize(
    ("path", "seconds", "told"),
    [
        ("m:wait", 60, "LimitExceeded: run time in s of m:wait: 60 used, 60 allowed."),
        ("m:wait_briefly", 2.5, "LimitExceeded: run time in s of m:wait_briefly: 2.5 used, 2.5 allowed."),
        ("m:call", 2.5, "caught: run time in s of m:wait_briefly: 2.5 used, 2.5 allowed."),
    ],
)
async def test_an_action_past_its_time_fails_and_the_time_of_its_caller_is_another(
    tmp_path: Path, path: str, seconds: float, told: str
) -> None:
    async with open_app(tmp_path, WAITING, limits=Limits(action_seconds_max=60)) as app:
        names = app.engine.registry.by_path["m:wait"].callable.__globals__
        waiting = asyncio.ensure_future(app.outcome(path))
        await names["began"].wait()
        app.clock.advance(seconds - 0.001)
        await asyncio.sleep(0)
        assert not waiting.done()
        app.clock.advance(0.001)
        outcome = await waiting
        text = outcome.failure.message if outcome.failure is not None else (outcome.value or b"").decode()
        assert told in text
        assert "raise its @action(timeout=…) or limits.action_seconds_max" in text
        assert names["log"] == (["ended"] if path != "m:wait" else [])
        assert app.engine.under_way == []


@pytest.mark.parametrize(
    "decorator",
    [
        "@action(timeout=30)",
        "@action(timeout=timedelta(0))",
        "@action(timeout=timedelta(minutes=11))",
        "@action(retries=-1)",
        "@action(retries=101)",
        "@mutation(retries=1.5)",
        "@mutation(linger=0.1)",
        "@mutation(linger=timedelta(seconds=-1))",
        "@mutation(linger=timedelta(seconds=1.1))",
    ],
)
async def test_times_and_retries_that_cannot_be_are_refused(tmp_path: Path, decorator: str) -> None:
    functions = f"from datetime import timedelta\n{decorator}\nasync def bad(ctx) -> None: ...\n"
    with pytest.raises(RegistryError, match=r"m:bad: (timeout|retries|linger)="):
        async with open_app(tmp_path, functions):
            pass


async def test_an_action_that_is_cancelled_from_outside_ends(tmp_path: Path) -> None:
    functions = """
log, began = [], asyncio.Event()
@action
async def wait(ctx) -> None:
    try:
        began.set()
        await asyncio.get_running_loop().create_future()
    finally:
        log.append("ended")
"""
    async with open_app(tmp_path, functions) as app:
        names = app.engine.registry.by_path["m:wait"].callable.__globals__
        done: list[Any] = []
        task = app.engine.backend.start_action("m:wait", b"{}", None, done.append)
        await names["began"].wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (names["log"], done) == (["ended"], [])


# -- limits


class RunLimit(NamedTuple):
    """A limit that a run may reach: the function that uses `n` of it, and what one more is."""

    allowed: int
    function: str
    error: str = "LimitExceeded"
    what: str = ""  # in the message; the setting's name for LimitExceeded


def using(kind: FunctionKind, body: str, returns: str = "Any", arguments: str = "n: int") -> str:
    return f"@{kind}\nasync def use(ctx, {arguments}) -> {returns}:\n{indent(body, '    ')}\n"


NESTING = """
@query
async def use(ctx, n: int) -> int:
    return await ctx.run_query(use, n=n - 1) if n else 0
"""
TRIGGERS = """
@mutation
async def use(ctx, n: int) -> None:
    await ctx.db.insert(Free(value=n))

@trigger(Free)
async def insert_again(ctx, change) -> None:
    if change.new.value > 1: await ctx.db.insert(Free(value=change.new.value - 1))
"""
RATE = "from datetime import timedelta\nRATE = token_bucket('r', count=9, per=timedelta(1))\n"
RUN_LIMITS = {
    "read_document_count_max": RunLimit(3, using("query", "await ctx.db.query(Item).take(n)")),
    "read_size_bytes_max": RunLimit(
        20_000, using("mutation", "id = await ctx.db.insert(Item(key='k', note='x' * n))\nawait ctx.db.get(id)")
    ),
    "read_range_count_max": RunLimit(4, using("query", "for _ in range(n): await ctx.db.query(Item.by_key).first()")),
    "write_document_count_max": RunLimit(
        5, using("mutation", "for rank in range(n): await ctx.db.insert(Item(key='k', rank=rank))")
    ),
    "write_size_bytes_max": RunLimit(20_000, using("mutation", "await ctx.db.insert(Item(key='k', note='x' * n))")),
    "document_size_bytes_max": RunLimit(9_000, using("mutation", "await ctx.db.insert(Item(key='k', note='x' * n))")),
    "schedule_count_max": RunLimit(
        4, using("mutation", "for _ in range(n): await ctx.scheduler.run_after(9e9, 'm:add')")
    ),
    "schedule_size_bytes_max": RunLimit(
        500, using("mutation", "await ctx.scheduler.run_after(9e9, 'm:add', key='x' * n)")
    ),
    "schedule_job_size_bytes_max": RunLimit(
        400, using("mutation", "await ctx.scheduler.run_after(9e9, 'm:add', key='x' * n)")
    ),
    "nesting_depth_max": RunLimit(3, NESTING),
    "trigger_depth_max": RunLimit(3, TRIGGERS),
    "rate_limit_key_length_max": RunLimit(20, RATE + using("mutation", "await ctx.limit(RATE, key='k' * n)")),
    "search_text_length_max": RunLimit(20, using("query", "await ctx.db.search(Item.search, '!' * n).first()")),
    "search_word_count_max": RunLimit(
        5, using("query", "await ctx.db.search(Item.search, ' '.join(map(str, range(n)))).first()")
    ),
    "arguments_size_bytes_max": RunLimit(300, using("query", "pass", arguments="n: str")),
    "result_size_bytes_max": RunLimit(500, using("query", "return 'x' * n")),
    "value_depth_max": RunLimit(
        10, using("query", "value = 0\nfor _ in range(n): value = [value]\nreturn value"), "InvalidResult", "10 levels"
    ),
    "array_item_count_max": RunLimit(20, using("query", "return [0] * n"), "InvalidResult", "21 items, 20 allowed"),
    "object_field_count_max": RunLimit(
        20, using("query", "return {str(i): i for i in range(n)}"), "InvalidResult", "21 fields, 20 allowed"
    ),
    "object_key_length_max": RunLimit(30, using("query", "return {'k' * n: 1}"), "InvalidResult", "30 characters"),
    "document_depth_max": RunLimit(
        5,
        using(
            "mutation",
            "value = 0\nfor _ in range(n - 1): value = [value]\nawait ctx.db.insert(Free(value=value))",
        ),
        "InvalidDocument",
        "levels",
    ),
}
FREE_SCHEMA = """
from typing import Any
from engine import Table, index, search_index

class Item(Table, name="items"):
    key: str
    rank: int = 0
    note: str = ""
    by_key = index("key", "rank")
    search = search_index("note")

class Free(Table, name="frees"):
    value: Any
"""


@pytest.mark.parametrize("name", RUN_LIMITS)
async def test_a_run_may_use_all_that_is_allowed_and_nothing_more(tmp_path: Path, name: str) -> None:
    limit = RUN_LIMITS[name]
    is_text = name == "arguments_size_bytes_max"
    limits = msgspec.structs.replace(UNHURRIED, **{name: limit.allowed})

    def argument(n: int) -> Any:
        return "x" * n if is_text else n

    async with open_app(tmp_path, GOOD + limit.function, schema=FREE_SCHEMA) as app:
        await app.call("m:add", count=10)
    async with open_app(tmp_path, GOOD + limit.function, schema=FREE_SCHEMA, limits=limits) as app:
        at_limit = limit.allowed
        if "size_bytes" in name:  # what else is counted: a first try tells
            failure = await app.failure("m:use", n=argument(limit.allowed + 1_000))
            used = int(re.search(r"([\d,]+) used", failure.message)[1].replace(",", ""))  # type: ignore[index]
            at_limit = limit.allowed - (used - limit.allowed - 1_000)
        before = await app.call("m:count") if name != "read_document_count_max" else 10
        await app.call("m:use", n=argument(at_limit))
        failure = await app.failure("m:use", n=argument(at_limit + 1))
        assert failure.code == limit.error
        assert (limit.what or f"limits.{name}") in failure.message
        if limit.error == "LimitExceeded":
            assert f"{limit.allowed + 1:,} used, {limit.allowed:,} allowed" in failure.message
        if name != "read_document_count_max":
            assert await app.call("m:count") <= before + limit.allowed


async def test_nested_functions_share_the_limits_of_their_caller(tmp_path: Path) -> None:
    functions = (
        GOOD
        + """
@mutation
async def later(ctx) -> None: await ctx.scheduler.run_after(9e9, "m:add")
@mutation
async def use(ctx, name: str, n: int) -> None:
    for _ in range(n): await ctx.run_mutation(name)
"""
    )
    limits = msgspec.structs.replace(UNHURRIED, write_document_count_max=3, schedule_count_max=2)
    async with open_app(tmp_path, functions, limits=limits) as app:
        await app.call("m:use", name="m:add", n=3)
        await app.call("m:use", name="m:later", n=2)
        for name, n, limit in (("m:add", 4, "write_document_count_max"), ("m:later", 3, "schedule_count_max")):
            with pytest.raises(LimitExceeded, match=limit):
                await app.call("m:use", name=name, n=n)
        assert await app.call("m:count") == 3
