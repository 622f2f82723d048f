"""Functions that call functions: one run inside a query or mutation, transactions of their own in an action."""

from pathlib import Path

import pytest

from engine.errors import AppError, FunctionFailed, FunctionMisuse, FunctionNotFound, InvalidArgument, LimitExceeded
from engine.events import Committed, FunctionFaulted
from engine.identity import Identity
from tests.functions.apps import open_app

ALICE = Identity(subject="alice", issuer="https://login.example")
FUNCTIONS = """
@query
async def keys(ctx, key: str | None = None) -> list[str]:
    items = ctx.db.query(Item) if key is None else ctx.db.query(Item.by_key, key=key)
    return [item.key async for item in items]

@mutation
async def add(ctx, key: str, fail: bool = False) -> Id[Item]:
    id = await ctx.db.insert(Item(key=key))
    if fail:
        raise AppError({"key": key})
    return id

@query(internal=True)
async def who(ctx) -> str | None:
    identity = ctx.auth.identity()
    return identity and identity.subject
"""


async def test_a_nested_query_reads_what_its_mutation_has_written(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@mutation
async def use(ctx) -> list[str]:
    await ctx.db.insert(Item(key="a"))
    return await ctx.run_query(keys)
"""
    )
    async with open_app(tmp_path, functions) as app:
        assert await app.call("m:use") == ["a"]


async def test_what_a_nested_query_reads_re_runs_its_caller(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@query
async def use(ctx) -> list[str]: return await ctx.run_query("m:keys", key="a")
"""
    )
    async with open_app(tmp_path, functions) as app, app.watched("m:use") as results:
        await app.call("m:add", key="b")
        assert app.run_count("m:use") == 0
        await app.call("m:add", key="a")
        assert await anext(results) == ["a"]
        assert app.run_count("m:keys") == 0, "it is not a run of its own"


async def test_a_nested_mutation_is_part_of_the_commit_of_its_caller(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@mutation
async def use(ctx, fail: bool = False) -> list[str]:
    ids = [await ctx.run_mutation(add, key=key) for key in "ab"]
    if fail:
        raise ValueError
    return ids
"""
    )
    async with open_app(tmp_path, functions) as app:
        app.forget_events()
        assert len(await app.call("m:use")) == 2
        await app.idle()
        (commit,) = [event for event in app.events if isinstance(event, Committed)]
        assert (commit.mutation_count, commit.write_count) == (1, 2)
        with pytest.raises(FunctionFailed):
            await app.call("m:use", fail=True)
        assert await app.call("m:keys") == ["a", "b"]


@pytest.mark.parametrize("why", ["fail=True", "key=5", "kye=''"])
async def test_a_nested_mutation_that_fails_undoes_its_own_writes_and_wakes_nobody(tmp_path: Path, why: str) -> None:
    functions = (
        FUNCTIONS
        + f"""
@mutation(internal=True)
async def twice(ctx) -> None:
    await ctx.db.insert(Item(key="inner"))
    await ctx.run_mutation(add, **(dict(key="inner") | dict({why})))

@mutation
async def use(ctx) -> list[str]:
    await ctx.db.insert(Item(key="before"))
    try:
        await ctx.run_mutation(twice)
    except EngineError:
        pass
    await ctx.db.insert(Item(key="after"))
    return await ctx.run_query(keys)
"""
    )
    async with (
        open_app(tmp_path, functions) as app,
        app.watched("m:keys", key="inner"),
        app.watched("m:keys", key="after") as results,
    ):
        app.forget_events()
        assert await app.call("m:use") == ["before", "after"]
        assert await anext(results) == ["after"]
        assert await app.call("m:keys") == ["before", "after"]
        assert app.run_count("m:keys") == 2, "the one who watches `inner` is not woken"


async def test_what_a_nested_mutation_changed_and_undid_is_as_it_was(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@mutation
async def change(ctx, id: Id[Item], other: Id[Item]) -> None:
    await ctx.db.patch(id, rank=9)
    await ctx.db.delete(other)
    raise ValueError

@mutation
async def use(ctx) -> list[int]:
    first, second = await ctx.run_mutation(add, key="a"), await ctx.run_mutation(add, key="b")
    await ctx.db.patch(first, rank=1)
    for _ in range(3):
        try:
            await ctx.run_mutation(change, id=first, other=second)
        except ValueError:
            pass
    await ctx.db.patch(second, rank=2)
    return [item.rank async for item in ctx.db.query(Item)]
"""
    )
    async with open_app(tmp_path, functions) as app, app.watched("m:keys") as results:
        assert await app.call("m:use") == [1, 2]
        assert await anext(results) == ["a", "b"]


@pytest.mark.parametrize("end", ["await asyncio.sleep(0)", "raise SystemExit", "while True: raise GeneratorExit"])
async def test_a_nested_mutation_that_cannot_be_caught_takes_all_writes_with_it(tmp_path: Path, end: str) -> None:
    functions = (
        FUNCTIONS
        + f"""
@mutation
async def inner(ctx) -> None:
    await ctx.db.insert(Item(key="inner"))
    {end}

@mutation
async def use(ctx) -> None:
    await ctx.db.insert(Item(key="outer"))
    try:
        await ctx.run_mutation(inner)
    except Exception:
        pass
"""
    )
    async with open_app(tmp_path, functions) as app:
        await app.failure("m:use")
        await app.call("m:add", key="next")
        assert await app.call("m:keys") == ["next"]


async def test_an_error_of_a_nested_function_is_caught_as_it_was_raised(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@query
async def bad(ctx) -> None: raise KeyError("oh")

@mutation
async def use(ctx) -> Any:
    try:
        await ctx.run_query(bad)
    except KeyError:
        pass
    try:
        await ctx.run_mutation(add, key="a", fail=True)
    except AppError as error:
        return error.data
"""
    )
    async with open_app(tmp_path, functions) as app:
        assert await app.call("m:use") == {"key": "a"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("run_query('m:nothing')", FunctionNotFound, "'m:nothing'"),
        ("run_query('m:add', key='a')", FunctionNotFound, "query function for 'm:add'"),
        ("run_mutation(keys)", FunctionNotFound, "mutation function for 'keys'"),
        ("run_query(len)", FunctionNotFound, "'len'"),
        ("run_query(keys, kye='a')", InvalidArgument, "kye: unknown"),
        ("run_query(keys, 5)", FunctionFailed, "positional"),
    ],
)
@pytest.mark.parametrize("kind", ["mutation", "action"])
async def test_a_wrong_call_says_what_is_wrong(
    tmp_path: Path, kind: str, call: str, error: type[Exception], message: str
) -> None:
    async with open_app(tmp_path, FUNCTIONS + f"\n@{kind}\nasync def use(ctx): return await ctx.{call}\n") as app:
        with pytest.raises(error, match=message):
            await app.call("m:use")


async def test_a_query_runs_no_mutation_not_even_from_a_mutation(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@query
async def sly(ctx) -> None: await ctx._calls.run_mutation(add, {"key": "a"})
"""
    )
    async with open_app(tmp_path, functions) as app:
        with pytest.raises(FunctionMisuse, match="a query runs no mutation"):
            await app.call("m:sly")


async def test_nesting_has_an_end_and_siblings_do_not_count(tmp_path: Path) -> None:
    functions = """
@query
async def down(ctx, depth: int) -> int:
    return 0 if not depth else 1 + await ctx.run_query(down, depth=depth - 1)

@query
async def wide(ctx, count: int) -> int:
    return sum([await ctx.run_query(down, depth=1) for _ in range(count)])
"""
    async with open_app(tmp_path, functions) as app:
        assert await app.call("m:down", depth=8) == 8
        assert await app.call("m:wide", count=50) == 50
        with pytest.raises(LimitExceeded, match="functions nested in m:down: 9 used, 8 allowed"):
            await app.call("m:down", depth=9)


# -- actions

ACTIONS = (
    FUNCTIONS
    + """
@action
async def use(ctx, fail: bool = False) -> list[str]:
    before = await ctx.run_query(keys)
    await ctx.run_mutation(add, key="a")
    between = await ctx.run_query("m:keys")
    if fail:
        await ctx.run_mutation(add, key="b", fail=True)
    return [*before, "|", *between]

@action(internal=True)
async def asking(ctx) -> list[str | None]:
    ctx.log("asked")
    return [await ctx.run_query(who), await ctx.run_action(asking_inside)]

@action(internal=True)
async def asking_inside(ctx) -> str | None:
    ctx.log("asked inside")
    return await ctx.run_query(who)

@action
async def outside(ctx) -> list[str | None]: return await ctx.run_action("m:asking")
"""
)


async def test_each_call_of_an_action_is_a_transaction_of_its_own(tmp_path: Path) -> None:
    async with open_app(tmp_path, ACTIONS) as app:
        assert await app.call("m:use") == ["|", "a"]
        with pytest.raises(AppError) as refusal:
            await app.call("m:use", fail=True)
        assert refusal.value.data == {"key": "b"}
        assert await app.call("m:keys") == ["a", "a"], "what was committed before stays"


async def test_values_come_back_as_python_values(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@query
async def items(ctx) -> list[Item]: return await ctx.db.query(Item).collect()
@action
async def use(ctx) -> list[str]:
    await ctx.run_mutation(add, key="a")
    return [f"{type(item).__name__} {item.key} {item.id[:4]}" for item in await ctx.run_query(items)]
"""
    )
    async with open_app(tmp_path, functions) as app:
        (text,) = await app.call("m:use")
        assert text.startswith("Item a ")


async def test_identity_and_log_go_through_all_calls_of_an_action(tmp_path: Path) -> None:
    async with open_app(tmp_path, ACTIONS) as app:
        assert await app.call("m:outside", identity=ALICE) == ["alice", "alice"]
        assert (await app.outcome("m:outside")).log_lines == ("[LOG] asked", "[LOG] asked inside")


async def test_an_action_outlives_a_reload_and_reaches_the_functions_of_today(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
began, go_on = asyncio.Event(), asyncio.Event()
@action
async def use(ctx) -> None:
    began.set()
    await go_on.wait()
    await ctx.run_mutation(add, key="a")
"""
    )
    async with open_app(tmp_path, functions) as app:
        names = app.engine.registry.by_path["m:use"].callable.__globals__
        done: list[object] = []
        task = app.engine.backend.start_action("m:use", b"{}", None, done.append)
        await names["began"].wait()
        await app.rewrite(FUNCTIONS.replace("Item(key=key)", "Item(key='new ' + key)"))
        names["go_on"].set()
        await task
        assert done[0].failure is None  # type: ignore[attr-defined]
        assert await app.call("m:keys") == ["new a"]


async def test_an_unexpected_error_of_a_mutation_reaches_its_action_as_a_failed_function(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
@mutation
async def bad(ctx) -> None: raise KeyError("oh")
@action
async def use(ctx) -> str:
    try:
        await ctx.run_mutation(bad)
    except EngineError as error:
        return f"{error.code} {type(error.__cause__).__name__}"
"""
    )
    async with open_app(tmp_path, functions) as app:
        assert await app.call("m:use") == "FunctionFailed KeyError"
        assert [event.path for event in app.events if isinstance(event, FunctionFaulted)] == ["m:bad"]
