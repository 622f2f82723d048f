"""`ctx.db.total`, counts, ranks and pages: what functions get, and which writes run a query that read them again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import AppFault, FunctionMisuse, InvalidDocument, InvalidResult, LimitExceeded, TotalOverflow
from engine.limits import Limits
from engine.values.wire import INT64_MAX
from tests.functions.apps import SECONDS_MAX, OpenApp, open_app

SCHEMA = """
    from engine import Id, Table, aggregate, index

    class Viewer(Table, name="viewers"):
        game: str
        active: bool = True
        seconds: int | None = 0
        seen_at: float = 0.0
        watching = aggregate("game", "active", sum=("seconds",))
        everybody = aggregate(sum=("seconds",))
        by_game = index("game", "active")
        by_seen = index("game", "active", "seen_at")

    class Score(Table, name="scores"):
        board: str
        points: int
        note: str = ""
        by_points = index("board", "points", ranked=True)
        by_note = index("note")
"""

FUNCTIONS = """
@query
async def watching(ctx, game: str) -> int:
    return await ctx.db.query(Viewer.by_game, game=game, active=True).count()

@query
async def watching_by_total(ctx, game: str) -> int:
    return (await ctx.db.total(Viewer.watching, active=True, game=game)).count

@query
async def seconds(ctx, game: str) -> int:
    return (await ctx.db.total(Viewer.watching, game=game, active=True)).sum("seconds")

@query
async def everybody(ctx) -> list[int]:
    total = await ctx.db.total(Viewer.everybody)
    return [total.count, total.sum("seconds"), await ctx.db.query(Viewer).count()]

@query
async def some_total(ctx, game: str) -> Any:
    return await ctx.db.total(Viewer.watching, game=game, active=True)

@query
async def nested(ctx, game: str) -> int:
    total = await ctx.run_query(some_total, game=game)
    return total.count

@mutation
async def join(ctx, game: str, seconds: int | None = 0, count: int = 1) -> list[Id[Viewer]]:
    return [await ctx.db.insert(Viewer(game=game, seconds=seconds)) for _ in range(count)]

@mutation
async def beat(ctx, viewer: Id[Viewer], seconds: int | None = None) -> None:
    await ctx.db.patch(viewer, seen_at=ctx.now, seconds=seconds)

@mutation
async def leave(ctx, viewer: Id[Viewer]) -> list[int]:
    await ctx.db.patch(viewer, active=False)
    viewers = ctx.db.query(Viewer.by_game, game=(await ctx.db.get(viewer)).game, active=True)
    total = await ctx.db.total(Viewer.everybody)
    return [await viewers.count(), total.count]

@mutation
async def join_and_fail(ctx, game: str) -> int:
    try:
        await ctx.run_mutation(join_badly, game=game)
    except ValueError:
        return await ctx.db.query(Viewer.by_game, game=game, active=True).count()

@mutation(internal=True)
async def join_badly(ctx, game: str) -> None:
    await ctx.db.insert(Viewer(game=game))
    raise ValueError

@mutation
async def join_within_64_bits(ctx, game: str, seconds: Int64) -> str:
    try:
        await ctx.db.insert(Viewer(game=game, seconds=seconds))
    except TotalOverflow as error:
        return f"{error.table}.{error.aggregate} {error.field}"
    return "joined"

# -- scores

@mutation
async def score(ctx, points: list[int], board: str = "a") -> list[Id[Score]]:
    return [await ctx.db.insert(Score(board=board, points=number)) for number in points]

@mutation
async def change(
    ctx, score: Id[Score], points: int | None = None, note: str | None = None, board: str | None = None
) -> None:
    fields = {"points": points, "note": note, "board": board}
    await ctx.db.patch(score, **{name: value for name, value in fields.items() if value is not None})

@mutation
async def delete(ctx, score: Id[Score]) -> None:
    await ctx.db.delete(score)

@query
async def rank(ctx, score: Id[Score], order: str = "desc", board: str = "a") -> int | None:
    return await ctx.db.query(Score.by_points, board=board).order(order).rank(score)

@query
async def page(ctx, number: int, size: int = 2, order: str = "desc", with_total: bool = False) -> RankedPage[Score]:
    scan = ctx.db.query(Score.by_points, board="a").order(order)
    return await scan.page(number, size, with_total=with_total)

@query
async def between(ctx, low: int, high: int) -> list[int]:
    scan = ctx.db.query(Score.by_points, board="a", gte=low, lt=high)
    return [await scan.count(), *[score.points for score in (await scan.page(0, 100)).page]]

@query
async def evaluate(ctx, source: str, id: str = "") -> Any:
    return await eval(source, globals(), {"ctx": ctx, "q": ctx.db.query, "db": ctx.db, "id": id})
"""


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[OpenApp]:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        yield app


async def newest(results: AsyncIterator[Any]) -> Any:
    async with asyncio.timeout(SECONDS_MAX):
        return await anext(results)


# -- totals


async def test_a_total_is_count_and_sums_of_its_key(app: OpenApp) -> None:
    assert await app.call("m:watching_by_total", game="a") == 0
    first, _ = await app.call("m:join", game="a", seconds=20, count=2)
    await app.call("m:join", game="a", seconds=None)
    await app.call("m:join", game="b", seconds=7)
    assert await app.call("m:watching_by_total", game="a") == 3
    assert await app.call("m:watching", game="a") == 3
    assert await app.call("m:seconds", game="a") == 40
    assert await app.call("m:everybody") == [4, 47, 4]
    # a mutation sees what it has just written
    assert await app.call("m:leave", viewer=first) == [2, 4]
    assert await app.call("m:seconds", game="a") == 20


async def test_what_a_nested_mutation_wrote_goes_with_it(app: OpenApp) -> None:
    await app.call("m:join", game="a")
    assert await app.call("m:join_and_fail", game="a") == 1
    assert await app.call("m:watching_by_total", game="a") == 1


async def test_a_sum_that_gets_too_large_refuses_the_write_and_the_function_may_go_on(app: OpenApp) -> None:
    assert await app.call("m:join_within_64_bits", game="a", seconds=INT64_MAX) == "joined"
    assert await app.call("m:join_within_64_bits", game="a", seconds=1) == "viewers.watching seconds"
    assert await app.call("m:watching", game="a") == 1
    with pytest.raises(TotalOverflow):
        await app.call("m:join", game="b", seconds=1)
    assert await app.call("m:everybody") == [1, INT64_MAX, 1]


async def test_a_heartbeat_runs_no_viewer_count_but_the_sum_that_it_changes(app: OpenApp) -> None:
    (viewer,) = await app.call("m:join", game="a")
    paths = ("m:watching", "m:watching_by_total", "m:nested")
    async with (
        app.watched(paths[0], game="a") as counts,
        app.watched(paths[1], game="a"),
        app.watched(paths[2], game="a") as nested,
        app.watched("m:seconds", game="a") as sums,
    ):
        await app.call("m:beat", viewer=viewer)
        await app.idle()
        assert [app.run_count(path) for path in (*paths, "m:seconds")] == [0, 0, 0, 0]
        await app.call("m:beat", viewer=viewer, seconds=60)
        assert await newest(sums) == 60
        assert [app.run_count(path) for path in (*paths, "m:seconds")] == [0, 0, 0, 1]
        await app.call("m:join", game="a")
        assert await newest(counts) == 2
        assert await newest(nested) == 2
        assert [app.run_count(path) for path in (*paths, "m:seconds")] == [1, 1, 1, 1]


async def test_another_key_runs_nothing(app: OpenApp) -> None:
    (viewer,) = await app.call("m:join", game="b")
    async with app.watched("m:watching", game="a"), app.watched("m:seconds", game="a"):
        await app.call("m:join", game="b", seconds=5)
        await app.call("m:leave", viewer=viewer)
        await app.idle()
        assert not app.run_count("m:watching")
        assert not app.run_count("m:seconds")


async def test_a_count_is_one_look_up_where_a_total_has_it(tmp_path: Path) -> None:
    limits = Limits(read_document_count_max=3, run_slow_ms=10_000, run_ms_max=10_000)
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA, limits=limits) as app:
        await app.call("m:join", game="a", count=10)
        assert await app.call("m:watching", game="a") == 10
        assert await app.call("m:evaluate", source="q(Viewer.by_seen, game='a', active=True).count()") == 10
        assert await app.call("m:evaluate", source="q(Viewer).count()") == 10
        for scanned in (
            "q(Viewer.by_game, game='a').count()",
            "q(Viewer.by_game, game='a', gte=True).count()",
            "q(Viewer.by_seen, game='a', active=True, gte=0.0).count()",
            "q(Viewer.by_seen, game='a', active=True, seen_at=0.0).count()",
            "q(Viewer.by_game, game='a', active=True).filter(lambda viewer: True).count()",
        ):
            with pytest.raises(LimitExceeded, match="documents read by one run"):
                await app.call("m:evaluate", source=scanned)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("db.total(Viewer.watching, game='a')", FunctionMisuse,
         "total viewers.watching: it has the fields (game, active), not (game). Give each of them one value"),
        ("db.total(Viewer.watching, game='a', active=True, seconds=1)", FunctionMisuse, "not (game, active, seconds)"),
        ("db.total(Viewer.everybody, game='a')", FunctionMisuse, "it has the fields (), not (game)"),
        ("db.total(Viewer.watching, game=5, active=True)", InvalidDocument, "game=5 cannot be in that field"),
        ("total_of('game')", FunctionMisuse,
         "total viewers.everybody: it has no sum of 'game'. Declare aggregate(…, sum=('seconds', 'game',))."),
        ("q(Score.by_note).rank(id)", FunctionMisuse, "rank scores.by_note: places in it are not kept"),
        ("q(Score).page(0, 5)", FunctionMisuse, "page scores.by_creation_time: places in it are not kept"),
        ("q(Score.by_points).filter(lambda score: True).page(0, 5)", FunctionMisuse, "a filter or a policy hides some"),
        ("q(Score.by_points).filter(lambda score: True).rank(id)", FunctionMisuse, "a filter or a policy hides some"),
        ("q(Score.by_points).page(-1, 5)", FunctionMisuse, "page: number=-1; it is a whole number from 0 on"),
        ("q(Score.by_points).page(0, 0)", FunctionMisuse, "page: size=0; it is a whole number from 1 on"),
        ("q(Score.by_points).page(1.0, 5)", FunctionMisuse, "page: number=1.0; it is a whole number"),
        ("q(Score.by_points).rank('nonsense')", InvalidDocument, "'nonsense' is not an id of any table"),
        ("q(Score.by_points).rank(id)", InvalidDocument, "is an id of viewers"),
        ("db.total(Viewer.everybody)", InvalidResult, "Total"),
    ],
)  # fmt: skip
async def test_what_cannot_be_asked_is_refused_in_clear_words(
    app: OpenApp, source: str, error: type[AppFault], message: str
) -> None:
    await app.rewrite(
        FUNCTIONS
        + """
async def total_of(field):
    return (await CTX.db.total(Viewer.everybody)).sum(field)

@query
async def refused(ctx, source: str, id: str) -> Any:
    global CTX
    CTX = ctx
    return await eval(source, globals(), {"q": ctx.db.query, "db": ctx.db, "id": id})
""",
        schema=SCHEMA,
    )
    (viewer,) = await app.call("m:join", game="a")
    with pytest.raises(error) as refusal:
        await app.call("m:refused", source=source, id=viewer)
    assert message in str(refusal.value)


# -- ranks and pages


async def test_a_rank_is_the_place_in_the_order_of_the_scan(app: OpenApp) -> None:
    ids = await app.call("m:score", points=[10, 30, 20, 20])
    (other,) = await app.call("m:score", points=[99], board="b")
    assert [await app.call("m:rank", score=id) for id in ids] == [3, 0, 2, 1]
    assert [await app.call("m:rank", score=id, order="asc") for id in ids] == [0, 3, 1, 2]
    assert await app.call("m:rank", score=other) is None
    assert await app.call("m:rank", score=other, board="b") == 0
    await app.call("m:delete", score=ids[1])
    assert [await app.call("m:rank", score=id) for id in ids] == [2, None, 1, 0]
    assert await app.call("m:evaluate", source="q(Score.by_points).rank(id)", id=other) == 3  # of all boards


async def test_a_document_stands_for_its_id_as_it_is_now(app: OpenApp) -> None:
    await app.call("m:score", points=[10, 30, 20])
    await app.rewrite(
        FUNCTIONS
        + """
@mutation
async def overtake(ctx) -> list[int]:
    ranking = ctx.db.query(Score.by_points, board="a").order("desc")
    last = (await ranking.page(2, 1)).page[0]
    ranks = [await ranking.rank(last)]
    await ctx.db.patch(last.id, points=40)
    return [*ranks, await ranking.rank(last), await ranking.rank(last.id)]
""",
        schema=SCHEMA,
    )
    assert await app.call("m:overtake") == [2, 0, 0]


async def test_pages_follow_each_other_in_the_order_of_the_scan(app: OpenApp) -> None:
    await app.call("m:score", points=[10, 30, 20, 50, 40])
    await app.call("m:score", points=[99], board="b")
    pages = [await app.call("m:page", number=number) for number in range(4)]
    assert [[score.points for score in page.page] for page in pages] == [[50, 40], [30, 20], [10], []]
    ascending = [await app.call("m:page", number=number, order="asc") for number in range(3)]
    assert [[score.points for score in page.page] for page in ascending] == [[10, 20], [30, 40], [50]]
    page = await app.call("m:page", number=1, with_total=True)
    assert (page.number, page.size, page.total) == (1, 2, 5)
    assert pages[1].total is None
    assert (await app.call("m:page", number=2**60, size=2**60)).page == []
    assert await app.call("m:between", low=20, high=50) == [3, 20, 30, 40]


async def test_who_enters_below_runs_nobody_above(app: OpenApp) -> None:
    ids = await app.call("m:score", points=[50, 40, 30, 20, 10])
    paths: dict[str, dict[str, Any]] = {
        "m:rank": {"score": ids[2]},
        "m:page": {"number": 0},
        "m:between": {"low": 20, "high": 45},
    }
    async with app.watched("m:rank", **paths["m:rank"]) as ranks, app.watched("m:page", **paths["m:page"]):
        for points in (29, 1):
            await app.call("m:score", points=[points])
        await app.call("m:change", score=ids[4], points=25)
        await app.call("m:change", score=ids[3], note="below")
        await app.call("m:change", score=ids[2], note="beside its key")
        await app.call("m:score", points=[100], board="b")
        await app.idle()
        assert not app.run_count("m:rank")
        assert not app.run_count("m:page")
        await app.call("m:change", score=ids[0], points=45)  # still above, and still the first
        await app.idle()
        assert not app.run_count("m:rank")
        assert app.run_count("m:page") == 1
        await app.call("m:score", points=[35])
        assert await newest(ranks) == 3
        await app.call("m:change", score=ids[2], points=60)
        assert await newest(ranks) == 0
        await app.call("m:delete", score=ids[2])
        assert await newest(ranks) is None


async def test_who_is_not_ranked_waits_for_its_document(app: OpenApp) -> None:
    first, other = await app.call("m:score", points=[50, 40])
    async with app.watched("m:rank", score=other, board="b") as ranks:
        await app.call("m:change", score=first, board="b")
        await app.idle()
        assert not app.run_count("m:rank")
        await app.call("m:change", score=other, board="b")
        assert await newest(ranks) == 1


async def test_a_page_runs_again_when_a_row_above_comes_or_goes_not_when_one_changes(app: OpenApp) -> None:
    ids = await app.call("m:score", points=[50, 40, 30, 20, 10, 5])
    async with app.watched("m:page", number=1) as pages:
        await app.call("m:change", score=ids[0], note="above")
        await app.call("m:change", score=ids[0], points=35)  # from one place above to another
        await app.call("m:score", points=[7])
        await app.idle()
        assert not app.run_count("m:page")
        await app.call("m:change", score=ids[2], note="on it")
        assert [score.note for score in (await newest(pages)).page] == ["on it", ""]
        await app.call("m:score", points=[99])
        assert [score.points for score in (await newest(pages)).page] == [35, 30]


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_the_first_page_runs_again_when_a_row_enters_above_all_others(app: OpenApp, order: str) -> None:
    await app.call("m:score", points=[50, 40, 30])
    async with app.watched("m:page", number=0, order=order) as pages:
        points = 99 if order == "desc" else 1
        await app.call("m:score", points=[points])
        assert [score.points for score in (await newest(pages)).page] == [points, 50 if order == "desc" else 30]
        await app.call("m:score", points=[45])
        await app.idle()
        assert app.run_count("m:page") == 1


async def test_a_page_that_is_not_full_waits_for_more(app: OpenApp) -> None:
    await app.call("m:score", points=[50, 40, 30])
    async with app.watched("m:page", number=1) as second, app.watched("m:page", number=2) as third:
        await app.call("m:score", points=[20])
        assert [score.points for score in (await newest(second)).page] == [30, 20]
        await app.call("m:score", points=[10])
        assert [score.points for score in (await newest(third)).page] == [10]


async def test_only_who_asks_for_the_total_waits_for_every_row(app: OpenApp) -> None:
    await app.call("m:score", points=[50, 40, 30])
    async with app.watched("m:page", number=0), app.watched("m:page", number=0, with_total=True) as pages:
        await app.call("m:score", points=[1])
        page = await newest(pages)
        assert page.total == 4
        assert app.run_count("m:page") == 1


async def test_a_page_costs_the_documents_that_it_has_and_a_few(tmp_path: Path) -> None:
    limits = Limits(read_document_count_max=200, run_slow_ms=10_000, run_ms_max=10_000)
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA, limits=limits) as app:
        for start in range(0, 2_000, 500):
            await app.call("m:score", points=list(range(start, start + 500)))
        page = await app.call("m:page", number=100, size=10, with_total=True)
        assert [score.points for score in page.page] == list(range(999, 989, -1))
        assert page.total == 2_000
        with pytest.raises(LimitExceeded, match="documents read by one run"):
            await app.call("m:page", number=0, size=250)
