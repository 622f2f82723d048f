"""`ctx.db`: scans read what they say, and depend on exactly what they looked at."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.errors import (
    AppFault,
    DocumentNotFound,
    FunctionFailed,
    FunctionMisuse,
    InvalidDocument,
    LimitExceeded,
    NotUnique,
    UniqueViolation,
)
from tests.functions.apps import UNHURRIED, OpenApp, open_app

# `scan` is eval'ed in the app: a test says in one line what is read and how
FUNCTIONS = """
def built(ctx, source: str):
    return eval(source, globals(), {"ctx": ctx, "q": ctx.db.query})

@query
async def read(ctx, source: str, end: str) -> Any:
    scan = built(ctx, source)
    match end:
        case "iterate":
            return [f"{item.key}{item.rank}" async for item in scan]
        case "iterate to a2":
            read = []
            async for item in scan:
                read.append(f"{item.key}{item.rank}")
                if read[-1] == "a2":
                    break
            return read
    value = await eval(f"scan.{end}", globals(), {"scan": scan})
    if isinstance(value, list):
        return [f"{item.key}{item.rank}" for item in value]
    return value if isinstance(value, int | None) else f"{value.key}{value.rank}"

@query
async def get(ctx, id: Id[Item]) -> str | None:
    item = await ctx.db.get(id)
    return item and item.key

@mutation
async def add(ctx, key: str, rank: int = 0, score: float | None = None, note: str = "") -> Id[Item]:
    return await ctx.db.insert(Item(key=key, rank=rank, score=score, note=note))

@mutation
async def patch(ctx, id: Id[Item], rank: int | None = None, note: str | None = None) -> None:
    fields = {"rank": rank, "note": note}
    await ctx.db.patch(id, **{name: value for name, value in fields.items() if value is not None})

@mutation
async def delete(ctx, id: Id[Item]) -> None:
    await ctx.db.delete(id)

@mutation
async def write(ctx, source: str, id: str = "") -> Any:
    return await eval(source, globals(), {"ctx": ctx, "db": ctx.db, "id": id})
"""


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[OpenApp]:
    async with open_app(tmp_path, FUNCTIONS) as app:
        yield app


async def fill(app: OpenApp, *items: str, **fields: Any) -> dict[str, str]:
    """Add `a1`, `b2`, …; their ids by these names."""
    return {item: await app.call("m:add", key=item[0], rank=int(item[1:]), **fields) for item in items}


READS = [
    ("q(Item)", "collect()", ["b2", "a1", "a3", "a2", "c1"]),
    ("q(Item).order('desc')", "collect()", ["c1", "a2", "a3", "a1", "b2"]),
    ("q(Item).order('asc')", "collect()", ["b2", "a1", "a3", "a2", "c1"]),
    ("q(Item.by_key)", "collect()", ["a1", "a2", "a3", "b2", "c1"]),
    ("q(Item.by_key).order('desc')", "collect()", ["c1", "b2", "a3", "a2", "a1"]),
    ("q(Item.by_key, key='a')", "collect()", ["a1", "a2", "a3"]),
    ("q(Item.by_key, key='x')", "collect()", []),
    ("q(Item.by_key, key='a', rank=2)", "collect()", ["a2"]),
    ("q(Item.by_key, gt='a')", "collect()", ["b2", "c1"]),
    ("q(Item.by_key, gte='a', lt='c')", "collect()", ["a1", "a2", "a3", "b2"]),
    ("q(Item.by_key, key='a', gt=1)", "collect()", ["a2", "a3"]),
    ("q(Item.by_key, key='a', gte=2, lte=2)", "collect()", ["a2"]),
    ("q(Item.by_key, key='a', lt=2)", "collect()", ["a1"]),
    ("q(Item.by_key, key='a', gt=2, lt=2)", "collect()", []),
    ("q(Item.by_key, key='a', gt=3, lt=1)", "collect()", []),
    ("q(Item.by_key, key='a', gt=-2**63, lte=2**63-1)", "count()", 3),
    ("q(Item, gt=0)", "count()", 5),
    ("q(Item, lt=0)", "count()", 0),
    ("q(Item, lt=float('inf'), gt=-float('inf'))", "count()", 5),
    ("q(Item.by_key, key='a', rank=1, lte=9e15)", "count()", 1),
    ("q(Item.by_key)", "take(0)", []),
    ("q(Item.by_key)", "take(2)", ["a1", "a2"]),
    ("q(Item.by_key)", "take(2**70)", ["a1", "a2", "a3", "b2", "c1"]),
    ("q(Item.by_key)", "first()", "a1"),
    ("q(Item.by_key, key='x')", "first()", None),
    ("q(Item.by_key, key='b')", "unique()", "b2"),
    ("q(Item.by_key, key='x')", "unique()", None),
    ("q(Item.by_key)", "iterate", ["a1", "a2", "a3", "b2", "c1"]),
    ("q(Item.by_key, key='x')", "iterate", []),
    ("q(Item.by_key).filter(lambda i: i.rank > 1)", "collect()", ["a2", "a3", "b2"]),
    ("q(Item.by_key).filter(lambda i: i.rank > 1)", "take(2)", ["a2", "a3"]),
    ("q(Item.by_key).filter(lambda i: i.rank > 1).filter(lambda i: i.key != 'a')", "take(2)", ["b2"]),
    ("q(Item.by_key).filter(lambda i: i.rank > 1).order('desc')", "first()", "b2"),
    ("q(Item.by_key).filter(lambda i: i.rank > 1)", "count()", 3),
    ("q(Item.by_key).filter(lambda i: i.rank > 1)", "iterate", ["a2", "a3", "b2"]),
    ("q(Item.by_key).filter(lambda i: i.rank == 3)", "unique()", "a3"),
]


@pytest.mark.parametrize(("source", "end", "expected"), READS)
async def test_a_scan_gives_the_documents_of_its_range_in_order(
    app: OpenApp, source: str, end: str, expected: Any
) -> None:
    await fill(app, "b2", "a1", "a3", "a2", "c1")
    assert await app.call("m:read", source=source, end=end) == expected


async def test_a_long_scan_goes_on_chunk_by_chunk(app: OpenApp) -> None:
    await app.rewrite(FUNCTIONS + WALK)
    await app.call("m:fill", count=3_000)
    expected = [f"a{n}" for n in range(3_000)]
    assert await app.call("m:read", source="q(Item.by_key, key='a')", end="iterate") == expected
    assert await app.call("m:read", source="q(Item.by_key).order('desc')", end="iterate") == expected[::-1]
    source = "q(Item.by_key).filter(lambda i: i.rank % 100 == 99)"
    assert await app.call("m:read", source=source, end="take(25)") == expected[99:2_500:100]


async def test_bounds_never_match_null_and_equality_does(app: OpenApp) -> None:
    for rank, score in enumerate([None, -1.0, 0.0, 2.5, None]):
        await app.call("m:add", key="s", rank=rank, score=score)

    async def ranks(source: str) -> Any:
        return await app.call("m:read", source=source, end="collect()")

    assert await ranks("q(Item.by_score)") == ["s0", "s4", "s1", "s2", "s3"]
    assert await ranks("q(Item.by_score, score=None)") == ["s0", "s4"]
    assert await ranks("q(Item.by_score, lt=1)") == ["s1", "s2"]
    assert await ranks("q(Item.by_score, gte=-float('inf'))") == ["s1", "s2", "s3"]
    assert await ranks("q(Item.by_score, score=-0.0)") == ["s2"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("q(Item.by_key, rank=1)", FunctionMisuse, "'rank' is not among the first 1 field(s) of the index (key, rank)"),
        ("q(Item.by_key, nothing=1)", FunctionMisuse, "query items.by_key: 'nothing' is not among the first 1"),
        ("q(Item, key='a')", FunctionMisuse, "query items.by_creation_time: 'key' is not among"),
        ("q(Item.by_key, key=5)", InvalidDocument, "query items.by_key: key=5 cannot be in that field: expected str"),
        ("q(Item.by_key, key='a', gt='b')", InvalidDocument, "rank='b' cannot be in that field: expected int"),
        ("q(Item.by_key, key='a', gt=1.5)", InvalidDocument, "rank=1.5 cannot be in that field: expected int"),
        ("q(Item.by_key, key='a', gt=2**63)", InvalidDocument, "expected an integer of 64 bits"),
        ("q(Item.by_score, gt=float('nan'))", InvalidDocument, "NaN"),
        ("q(Item.by_key, key='\\ud800')", InvalidDocument, "lone surrogate"),
        ("q(Item.by_key, gt='a', gte='b')", FunctionMisuse, "two bounds of one side; give gt or gte, and lt or lte"),
        ("q(Item.by_key, lt='a', lte='b')", FunctionMisuse, "two bounds of one side"),
        ("q(Item.by_score, gt=None)", FunctionMisuse, "None matches nothing; leave it out, or ask for score=None"),
        ("q(Item, gt='yesterday')", FunctionMisuse, "gt='yesterday' is no creation time; give ms since the epoch"),
        ("q(Item, gt=float('nan'))", FunctionMisuse, "gt=nan is no creation time"),
        ("q(Item, gt=True)", FunctionMisuse, "gt=True is no creation time"),
        ("q(Item).order('down')", FunctionMisuse, "order: 'down' is no direction"),
        ("q('items')", InvalidDocument, "'items' is not a table of schema.py"),
        ("q(int)", InvalidDocument, "'int' is not a table of schema.py"),
    ],
)  # fmt: skip
async def test_a_scan_that_cannot_be_is_refused_in_clear_words(
    app: OpenApp, source: str, error: type[AppFault], message: str
) -> None:
    with pytest.raises(error) as refusal:
        await app.call("m:read", source=source, end="collect()")
    assert message in str(refusal.value)


@pytest.mark.parametrize("n", ["-1", "2.5", "'2'", "None"])
async def test_only_a_whole_number_of_documents_can_be_taken(app: OpenApp, n: str) -> None:
    with pytest.raises(FunctionMisuse, match=r"take: .* documents; a whole number from 0 on"):
        await app.call("m:read", source="q(Item)", end=f"take({n})")


async def test_unique_refuses_a_second_document_and_names_both(app: OpenApp) -> None:
    ids = await fill(app, "a1", "a2")
    with pytest.raises(NotUnique) as refusal:
        await app.call("m:read", source="q(Item.by_key, key='a')", end="unique()")
    assert all(id in str(refusal.value) for id in ids.values())


# -- writes


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("db.patch(id, rank='x')", InvalidDocument, "items.rank: expected int, got 'x'"),
        ("db.patch(id, nothing=1)", InvalidDocument, "patch items: there is no field 'nothing' to change"),
        ("db.patch(id, id='x')", InvalidDocument, "there is no field 'id'"),
        ("db.patch(id, creation_time=1.0)", InvalidDocument, "there is no field 'creation_time'"),
        ("db.replace(id, Name(name='x'))", InvalidDocument, "is an id of items, the document is a Name"),
        ("db.insert(Item(key=5))", InvalidDocument, "items.key: expected str, got 5"),
        ("db.insert(5)", InvalidDocument, "'int' is not a table"),
        ("db.get('nonsense')", InvalidDocument, "'nonsense' is not an id of any table"),
        ("db.delete('nonsense')", InvalidDocument, "'nonsense' is not an id of any table"),
        ("db.delete(id[:-1] + '~')", InvalidDocument, "is not an id of any table"),
    ],
)
async def test_a_wrong_write_names_table_field_and_value(
    app: OpenApp, source: str, error: type[AppFault], message: str
) -> None:
    ids = await fill(app, "a1")
    with pytest.raises(error) as refusal:
        await app.call("m:write", source=source, id=ids["a1"])
    assert message in str(refusal.value)


@pytest.mark.parametrize("operation", ["patch(id, rank=1)", "replace(id, Item(key='x'))", "delete(id)"])
async def test_a_document_that_is_gone_cannot_be_written(app: OpenApp, operation: str) -> None:
    ids = await fill(app, "a1")
    await app.call("m:delete", id=ids["a1"])
    with pytest.raises(DocumentNotFound, match=f"{operation.split('(')[0]} items: there is no document '{ids['a1']}'"):
        await app.call("m:write", source=f"db.{operation}", id=ids["a1"])


async def test_a_unique_index_refuses_a_second_document_and_the_function_may_go_on(app: OpenApp) -> None:
    await app.rewrite(FUNCTIONS + """
@mutation
async def name(ctx, name: str) -> str:
    await ctx.db.insert(Item(key=name))
    try:
        await ctx.db.insert(Name(name=name))
    except UniqueViolation as error:
        return str(error)
    return "new"
""")  # fmt: skip
    assert await app.call("m:name", name="x") == "new"
    assert "names.by_name: a document with {'name': 'x'} is there already" in await app.call("m:name", name="x")
    assert await app.call("m:read", source="q(Item)", end="count()") == 2
    with pytest.raises(UniqueViolation):
        await app.call("m:write", source="db.insert(Name(name='x'))")


async def test_the_engines_own_tables_are_not_written_by_functions(app: OpenApp) -> None:
    await app.rewrite(FUNCTIONS + """
from engine.functions.jobs import ScheduledJob
@mutation
async def forge(ctx) -> None:
    await ctx.db.insert(ScheduledJob(path="m:delete", arguments=b"{}", due_at=0.0))
@mutation
async def drop(ctx) -> None:
    await ctx.db.delete(await ctx.scheduler.run_after(0, "m:add", key="x"))
""")  # fmt: skip
    for path in ("m:forge", "m:drop"):
        with pytest.raises(FunctionMisuse, match="_scheduled_jobs is the engine's own table"):
            await app.call(path)


# -- writes while a scan goes on

WALK = """
@mutation
async def walk(ctx, act: str, descending: bool = False) -> list[str]:
    seen = []
    async for item in ctx.db.query(Item.by_key, key="a").order("desc" if descending else "asc"):
        seen.append(f"{item.rank}{item.note}")
        match act:
            case "insert next" if item.rank < 5:
                await ctx.db.insert(Item(key="a", rank=item.rank + 1))
            case "insert before":
                await ctx.db.insert(Item(key="a", rank=item.rank - 100))
            case "delete next":
                async for other in ctx.db.query(Item.by_key, key="a", gt=item.rank):
                    await ctx.db.delete(other.id)
                    break
            case "delete":
                await ctx.db.delete(item.id)
            case "patch all":
                for other in await ctx.db.query(Item.by_key, key="a").collect():
                    await ctx.db.patch(other.id, note="!")
    return seen

@mutation
async def fill(ctx, count: int) -> None:
    for rank in range(count):
        await ctx.db.insert(Item(key="a", rank=rank))
"""


@pytest.mark.parametrize(
    ("act", "descending", "expected"),
    [
        ("insert next", False, ["0", "1", "1", "2", "2", "2"]),
        ("insert before", False, ["0", "1", "2", "3"]),
        ("delete next", False, ["0", "2"]),
        ("delete", False, ["0", "1", "2", "3"]),
        ("delete", True, ["3", "2", "1", "0"]),
        ("patch all", False, ["0", "1!", "2!", "3!"]),
        ("patch all", True, ["3", "2!", "1!", "0!"]),
    ],
)
async def test_an_iteration_sees_what_its_body_writes_further_on(
    app: OpenApp, act: str, descending: bool, expected: list[str]
) -> None:
    await app.rewrite(FUNCTIONS + WALK)
    await app.call("m:fill", count=4)
    seen = await app.call("m:walk", act=act, descending=descending)
    assert seen[: len(expected)] == expected
    assert act == "insert next" or seen == expected


@pytest.mark.slow
async def test_an_iteration_that_writes_each_document_reads_each_about_once(app: OpenApp) -> None:
    await app.rewrite(FUNCTIONS + WALK)
    await app.call("m:fill", count=8_000)  # each is read twice: by the scan and by the delete
    assert len(await app.call("m:walk", act="delete")) == 8_000
    assert await app.call("m:read", source="q(Item)", end="count()") == 0


# -- what a scan depends on: a write just past what it consumed re-runs nothing, one inside does

A = "q(Item.by_key, key='a')"
EXACT = [  # with a1 a2 a4 b1 there: source, end, writes that must not re-run it, writes that must
    (A, "take(2)", ["a2", "a3", "a5", "b0"], ["a0", "a1"]),  # a second a2 comes after the first one
    (A, "take(9)", ["b0"], ["a0", "a3", "a9"]),
    (A, "take(0)", ["a0", "a1"], []),
    (A, "first()", ["a3", "a1"], ["a0"]),
    (A, "iterate to a2", ["a3", "a5"], ["a0", "a1"]),
    (A, "iterate", ["b0"], ["a9"]),
    (A, "collect()", ["b0"], ["a3", "a9"]),
    (A, "count()", ["b0"], ["a3", "a9"]),
    (A + ".order('desc')", "take(2)", ["a1", "a0", "b0"], ["a3", "a5", "a2"]),
    (A + ".order('desc')", "first()", ["a3"], ["a4", "a5"]),
    (A + ".filter(lambda i: i.rank > 1)", "first()", ["a3"], ["a0", "a1"]),  # a2 was looked at, and a1 before it
    (A + ".filter(lambda i: i.rank > 9)", "first()", ["b0"], ["a0", "a7"]),
    (A + ".filter(lambda i: i.rank > 1)", "count()", ["b0"], ["a0"]),
    ("q(Item.by_key, key='a', gt=1, lt=4)", "collect()", ["a1", "a4", "a0", "a5"], ["a2", "a3"]),
    ("q(Item.by_key, key='a', gte=1, lte=4)", "count()", ["a0", "a5"], ["a1", "a4"]),
    ("q(Item.by_key, key='a', rank=3)", "unique()", ["a2", "a4"], ["a3"]),
    ("q(Item.by_key, key='a', gt=3, lt=2)", "collect()", ["a2", "a3"], []),
    ("q(Item.by_key, gt='a')", "first()", ["a9", "b2", "c0"], ["b0"]),
    ("q(Item)", "take(2)", ["a0", "z9"], []),  # new documents come last
    ("q(Item).order('desc')", "first()", [], ["a0"]),
    ("q(Item)", "count()", [], ["a0"]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "end", "outside", "inside"), EXACT)
async def test_a_scan_depends_on_exactly_what_it_consumed(
    app: OpenApp, source: str, end: str, outside: list[str], inside: list[str]
) -> None:
    await fill(app, "a1", "a2", "a4", "b1")
    async with app.watched("m:read", source=source, end=end):
        for item in outside:
            ids = await fill(app, item)
            await app.idle()
            assert app.run_count("m:read") == 0, f"{item} lies outside"
            await app.call("m:patch", id=ids[item], note="changed")
            await app.call("m:delete", id=ids[item])
            await app.idle()
            assert app.run_count("m:read") == 0, f"{item} lies outside"
        for item in inside:
            ids = await fill(app, item)
            await app.idle()
            assert app.run_count("m:read") == 1, f"{item} lies inside"
            await app.call("m:delete", id=ids[item])
            await app.idle()
            assert app.run_count("m:read") == 2, f"{item} lay inside"
            app.forget_events()


async def test_a_count_depends_on_keys_only(app: OpenApp) -> None:
    ids = await fill(app, "a1", "a2")
    async with app.watched("m:read", source=A, end="count()"):
        await app.call("m:patch", id=ids["a1"], note="changed")
        await app.idle()
        assert app.run_count("m:read") == 0
        await app.call("m:patch", id=ids["a1"], rank=7)
        await app.idle()
        assert app.run_count("m:read") <= 1
    async with app.watched("m:read", source=A, end="collect()"):
        await app.call("m:patch", id=ids["a1"], note="again")
        await app.idle()
        assert app.run_count("m:read") == 1


async def test_get_depends_on_that_document_alone_also_while_it_is_missing(app: OpenApp) -> None:
    ids = await fill(app, "a1", "a2")
    async with app.watched("m:get", id=ids["a1"]) as results:
        await app.call("m:patch", id=ids["a2"], rank=9)
        await app.call("m:delete", id=ids["a2"])
        await app.idle()
        assert app.run_count("m:get") == 0
        await app.call("m:delete", id=ids["a1"])
        assert await anext(results) is None


async def test_a_predicate_that_raises_depends_on_the_document_that_it_met(app: OpenApp) -> None:
    ids = await fill(app, "a0", "a1", "a2")
    source = "q(Item.by_key).filter(lambda i: 1 / i.rank)"
    for end in ("collect()", "take(5)", "first()", "iterate"):
        async with app.engine.subscribe("m:read", source=source, end=end) as results:
            with pytest.raises(FunctionFailed, match="division by zero"):
                await anext(results)
            await app.call("m:patch", id=ids["a0"], rank=1)
            assert await anext(results)
            await app.call("m:patch", id=ids["a0"], rank=0)


async def test_a_scan_that_reads_too_much_runs_again_when_there_is_less(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, read_document_count_max=2)
    async with open_app(tmp_path, FUNCTIONS, limits=limits) as app:
        ids = await fill(app, "a1", "a2", "a3")
        for end in ("collect()", "count()", "iterate", "take(5)"):
            async with app.engine.subscribe("m:read", source=A, end=end) as results:
                with pytest.raises(LimitExceeded, match="documents read by one run: 3 used, 2 allowed"):
                    await anext(results)
                await app.call("m:delete", id=ids["a3"])
                assert await anext(results)
                ids |= await fill(app, "a3")
