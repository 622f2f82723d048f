"""Pages: gapless and reactive while data changes, and cursors that only their own query can open."""

import asyncio
import base64
import tempfile
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import FunctionMisuse, InvalidArgument, InvalidCursor, LimitExceeded
from engine.functions.pages import CursorSeal, PaginationOptions
from tests.functions.apps import OpenApp, open_app

FUNCTIONS = """
@query
async def ranks(
    ctx, pagination_opts: PaginationOptions, key: str = "a", order: str = "asc", even: bool = False, gte: int = -99
) -> Page[int]:
    scan = ctx.db.query(Item.by_key, key=key, gte=gte).order(order)
    if even:
        scan = scan.filter(lambda item: item.rank % 2 == 0)
    page = await scan.paginate(pagination_opts)
    return Page(
        page=[item.rank for item in page.page],
        is_done=page.is_done,
        continue_cursor=page.continue_cursor,
        split_cursor=page.split_cursor,
        page_status=page.page_status,
    )

@query
async def others(ctx, pagination_opts: PaginationOptions, key: str = "a") -> Page[Item]:
    return await ctx.db.query(Item.by_key, key=key).paginate(pagination_opts)

@query
async def scores(ctx, pagination_opts: PaginationOptions) -> Page[Item]:
    return await ctx.db.query(Item.by_score).paginate(pagination_opts)

@query
async def twice(ctx, pagination_opts: PaginationOptions) -> None:
    for _ in range(2):
        await ctx.db.query(Item).paginate(pagination_opts)

@mutation
async def add(ctx, ranks: list[int], key: str = "a", score: float | None = None) -> None:
    for rank in ranks:
        await ctx.db.insert(Item(key=key, rank=rank, score=score))

@mutation
async def remove(ctx, rank: int) -> None:
    item = await ctx.db.query(Item.by_key, key="a", rank=rank).first()
    if item is not None:
        await ctx.db.delete(item.id)
"""


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[OpenApp]:
    async with open_app(tmp_path, FUNCTIONS) as app:
        yield app


def options(num_items: int = 3, cursor: str | None = None, **more: Any) -> PaginationOptions:
    return PaginationOptions(num_items=num_items, cursor=cursor, **more)


class Pages:
    """What a client's hook holds: pages one after another, each with its cursor and its newest journal."""

    def __init__(self, app: OpenApp, num_items: int, **arguments: Any) -> None:
        self._app, self._num_items, self._arguments = app, num_items, arguments
        self.cursors: list[str | None] = []
        self._journals: list[str | None] = []
        self.pages: list[Any] = []

    async def more(self) -> None:
        """Load the page after the last one."""
        self.cursors.append(self.pages[-1].continue_cursor if self.pages else None)
        self._journals.append(None)
        self.pages.append(None)
        await self.refresh(from_index=len(self.pages) - 1)

    async def refresh(self, from_index: int = 0) -> None:
        """Each page as it is now."""
        for index in range(from_index, len(self.pages)):
            asked = options(self._num_items, self.cursors[index])
            page, journal = await self._app.page(
                "m:ranks", self._journals[index], pagination_opts=asked, **self._arguments
            )
            assert journal == page.continue_cursor
            self.pages[index], self._journals[index] = page, journal

    @property
    def is_done(self) -> bool:
        return bool(self.pages[-1].is_done)

    @property
    def ranks(self) -> list[int]:
        return [rank for page in self.pages for rank in page.page]


async def ranks_of(app: OpenApp, **arguments: Any) -> list[int]:
    """All of it, in one page."""
    page, _ = await app.page("m:ranks", None, pagination_opts=options(1_000), **arguments)
    assert page.is_done
    return list(page.page)


async def test_pages_follow_each_other_to_the_end(app: OpenApp) -> None:
    await app.call("m:add", ranks=[5, 1, 3, 2, 4, 6, 7])
    pages = Pages(app, 3)
    for _ in range(3):
        await pages.more()
    assert [page.page for page in pages.pages] == [[1, 2, 3], [4, 5, 6], [7]]
    assert [page.is_done for page in pages.pages] == [False, False, True]


async def test_a_page_that_takes_exactly_all_is_followed_by_an_empty_one(app: OpenApp) -> None:
    await app.call("m:add", ranks=[1, 2, 3])
    pages = Pages(app, 3)
    await pages.more()
    await pages.more()
    assert [(page.page, page.is_done) for page in pages.pages] == [([1, 2, 3], False), ([], True)]


async def test_nothing_at_all_is_one_page_that_is_done_and_grows(app: OpenApp) -> None:
    pages = Pages(app, 3)
    await pages.more()
    assert (pages.ranks, pages.is_done) == ([], True)
    await app.call("m:add", ranks=[1, 2, 3, 4, 5])
    await pages.refresh()
    assert (pages.ranks, pages.is_done) == ([1, 2, 3, 4, 5], True)


async def test_a_page_keeps_its_range_and_not_its_length(app: OpenApp) -> None:
    await app.call("m:add", ranks=[10, 20, 30, 40, 50, 60])
    pages = Pages(app, 3)
    await pages.more()
    await pages.more()
    await app.call("m:add", ranks=[15, 35])
    await pages.refresh()
    assert [page.page for page in pages.pages] == [[10, 15, 20, 30], [35, 40, 50, 60]]


async def test_a_row_that_a_cursor_names_may_go(app: OpenApp) -> None:
    await app.call("m:add", ranks=[10, 20, 30, 40, 50])
    pages = Pages(app, 2)
    await pages.more()
    await pages.more()
    await app.call("m:remove", rank=20)
    await pages.refresh()
    assert [page.page for page in pages.pages] == [[10], [30, 40]]
    await app.call("m:add", ranks=[20])
    await pages.refresh()
    assert sorted(pages.ranks) == [10, 20, 30, 40], "the same rank again, on one of its sides"


rank_numbers = st.integers(0, 12)
steps = st.lists(st.tuples(st.sampled_from(["add", "remove", "more"]), rank_numbers), max_size=14)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    initial=st.lists(rank_numbers, max_size=12),
    steps=steps,
    num_items=st.integers(1, 4),
    order=st.sampled_from(["asc", "desc"]),
    even=st.booleans(),
)
@example([1, 2, 3, 4], [("more", 0), ("more", 0), ("remove", 2), ("add", 2), ("remove", 3)], 2, "asc", False)
@example([1, 2, 3, 4], [("more", 0), ("remove", 3), ("more", 0), ("add", 3)], 2, "desc", False)
def test_pages_are_gapless_and_show_each_document_once_whatever_is_written(
    initial: list[int], steps: list[tuple[str, int]], num_items: int, order: str, even: bool
) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with open_app(Path(directory), FUNCTIONS) as app:
                await app.call("m:add", ranks=initial)
                pages = Pages(app, num_items, order=order, even=even)
                await pages.more()
                for act, rank in steps:
                    match act:
                        case "more":
                            if not pages.is_done:
                                await pages.more()
                        case "add":
                            await app.call("m:add", ranks=[rank])
                        case _:
                            await app.call("m:remove", rank=rank)
                    await pages.refresh()
                    everything = await ranks_of(app, order=order, even=even)
                    held = pages.ranks
                    assert held == everything[: len(held)]
                    if pages.is_done:
                        assert held == everything
                for page in pages.pages:
                    await _check_split(app, page, pages, order=order, even=even)
                while not pages.is_done:
                    await pages.more()
                assert pages.ranks == await ranks_of(app, order=order, even=even)

    asyncio.run(run())


async def _check_split(app: OpenApp, page: Any, pages: Pages, **arguments: Any) -> None:
    """Both halves of a page together are the page."""
    if page.split_cursor is None:
        return
    start = pages.cursors[pages.pages.index(page)]
    halves = []
    for cursor, end_cursor in ((start, page.split_cursor), (page.split_cursor, page.continue_cursor)):
        asked = options(1, cursor, end_cursor=end_cursor)
        half, journal = await app.page("m:ranks", None, pagination_opts=asked, **arguments)
        assert half.continue_cursor == end_cursor == journal
        halves.append(half)
    assert halves[0].page + halves[1].page == page.page
    assert halves[1].is_done is page.is_done


async def test_a_page_with_few_rows_is_not_split(app: OpenApp) -> None:
    for count, has_split in ((0, False), (1, False), (2, False), (3, True)):
        await app.rewrite(FUNCTIONS)
        await app.call("m:add", ranks=list(range(count)), key=f"k{count}")
        page, _ = await app.page("m:ranks", None, pagination_opts=options(10), key=f"k{count}")
        assert (page.split_cursor is not None) is has_split


async def test_a_split_cursor_lies_inside_the_page(app: OpenApp) -> None:
    await app.call("m:add", ranks=list(range(9)))
    whole, _ = await app.page("m:ranks", None, pagination_opts=options(9))
    first, _ = await app.page("m:ranks", None, pagination_opts=options(1, end_cursor=whole.split_cursor))
    assert first.page == [0, 1, 2, 3]


async def test_null_numbers_and_ties_are_positions_like_any_other(app: OpenApp) -> None:
    for score in (None, 1.5, -1.0, None, 1.5):
        await app.call("m:add", ranks=[0], score=score)
    scores, cursor = [], None
    for _ in range(6):
        page, _ = await app.page("m:scores", None, pagination_opts=options(1, cursor))
        scores += [item.score for item in page.page]
        cursor = page.continue_cursor
    assert scores == [None, None, -1.0, 1.5, 1.5]
    assert page.is_done


# -- subscriptions


async def test_a_page_runs_again_for_writes_inside_its_range_only(app: OpenApp) -> None:
    await app.call("m:add", ranks=[10, 20, 30])
    async with app.watched("m:ranks", pagination_opts=options(2)) as results:
        for rank in (25, 35):
            await app.call("m:add", ranks=[rank])
        await app.call("m:add", ranks=[15], key="b")
        await app.idle()
        assert app.run_count("m:ranks") == 0
        await app.call("m:add", ranks=[15])
        assert (await anext(results)).page == [10, 15, 20]
        await app.call("m:add", ranks=[22])
        await app.idle()
        assert app.run_count("m:ranks") == 1, "its end stays where it was"
        await app.call("m:remove", rank=20)
        assert (await anext(results)).page == [10, 15]


async def test_the_last_page_gets_what_is_appended(app: OpenApp) -> None:
    await app.call("m:add", ranks=[10])
    async with app.watched("m:ranks", pagination_opts=options(2)) as results:
        for rank in (20, 30, 40):
            await app.call("m:add", ranks=[rank])
            assert (await anext(results)).page[-1] == rank


async def test_pages_go_on_over_a_restart(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        await app.call("m:add", ranks=[10, 20, 30, 40])
        page, journal = await app.page("m:ranks", None, pagination_opts=options(2))
    async with open_app(tmp_path) as app:
        await app.call("m:add", ranks=[15])
        again, _ = await app.page("m:ranks", journal, pagination_opts=options(2))
        after, _ = await app.page("m:ranks", None, pagination_opts=options(2, page.continue_cursor))
        assert (again.page, after.page) == ([10, 15, 20], [30, 40])


# -- cursors


async def cursor_of(app: OpenApp, path: str = "m:ranks", **arguments: Any) -> str:
    page, _ = await app.page(path, None, pagination_opts=options(1), **arguments)
    return str(page.continue_cursor)


@pytest.mark.parametrize("place", ["cursor", "end_cursor", "journal"])
@pytest.mark.parametrize(
    "foreign",
    [
        {"path": "m:others"},
        {"key": "b"},
        {"order": "desc"},
        {"even": True},
        {"gte": 0},
    ],
    ids=str,
)
async def test_a_cursor_of_another_query_or_other_arguments_is_refused(
    app: OpenApp, place: str, foreign: dict[str, Any]
) -> None:
    await app.call("m:add", ranks=[1, 2, 3])
    await app.call("m:add", ranks=[1, 2, 3], key="b")
    cursor = await cursor_of(app, **foreign)
    if place == "journal":
        with pytest.raises(InvalidCursor, match="InvalidCursor: the cursor belongs to another query"):
            await app.page("m:ranks", cursor, pagination_opts=options())
    else:
        with pytest.raises(InvalidCursor, match="belongs to another query"):
            await app.page("m:ranks", None, pagination_opts=options(**{place: cursor}))
    mine = await cursor_of(app)
    await app.page("m:ranks", mine, pagination_opts=options(cursor=mine, end_cursor=mine))


async def test_a_cursor_of_another_database_is_refused(tmp_path: Path) -> None:
    cursors = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        async with open_app(tmp_path / name, FUNCTIONS) as app:
            if name == "b":  # the clock of a test gives both the same secret
                app.engine.database.writer.execute("UPDATE _engine_meta SET secret = zeroblob(32)")
        async with open_app(tmp_path / name) as app:
            await app.call("m:add", ranks=[1, 2])
            cursors.append(await cursor_of(app))
            with pytest.raises(InvalidCursor) if len(cursors) == 2 else nullcontext():
                await app.page("m:ranks", None, pagination_opts=options(cursor=cursors[0]))


@pytest.mark.parametrize("cursor", ["", "x", "null", "AAAA", "é", "\0", "A" * 100_000, "=" * 8, "_-_-_-_-" * 4])
async def test_a_damaged_cursor_is_refused_as_the_clients_want_it(app: OpenApp, cursor: str) -> None:
    await app.call("m:add", ranks=[1, 2])
    failure = await app.failure("m:ranks", pagination_opts=options(cursor=cursor))
    assert (failure.code, failure.data is not None) == ("InvalidCursor", True)
    assert "InvalidCursor" in failure.message


@pytest.mark.parametrize(
    "position", [None, (), (2, "a", 1, 7), (0, 0, 1, -5), (1, 2.5, 3, b"\xff", 1, 1 << 52), (2, "ä\0🦀" * 50, 1, 1)]
)
def test_a_seal_opens_what_it_sealed_and_nothing_that_was_changed(position: tuple[Any, ...] | None) -> None:
    seal = CursorSeal(b"secret", b"query")
    cursor = seal.seal(position)
    assert seal.open(cursor) == position
    for stranger in (CursorSeal(b"secret", b"other"), CursorSeal(b"public", b"query")):
        with pytest.raises(InvalidCursor):
            stranger.open(cursor)
    raw = base64.urlsafe_b64decode(cursor)
    for place in range(len(raw)):
        for change in (1, 128, 255):
            changed = bytearray(raw)
            changed[place] ^= change
            with pytest.raises(InvalidCursor):
                seal.open(base64.urlsafe_b64encode(changed).decode())
    with pytest.raises(InvalidCursor):
        seal.open(base64.urlsafe_b64encode(raw[:16] + msgspec.msgpack.encode((2, "b", 1, 8))).decode())


# -- limits


@pytest.mark.parametrize("num_items", [0, -1, -(2**53)])
async def test_a_page_has_at_least_one_item(app: OpenApp, num_items: int) -> None:
    with pytest.raises(LimitExceeded, match="numItems"):
        await app.page("m:ranks", None, pagination_opts=options(num_items))


async def test_as_many_items_as_there_are_may_be_asked_for(app: OpenApp) -> None:
    await app.call("m:add", ranks=[1, 2])
    page, _ = await app.page("m:ranks", None, pagination_opts=options(2**53))
    assert page.page == [1, 2]


@pytest.mark.parametrize("wrong", ['"numItems":1.5', '"numItems":"3"', '"numItems":3,"cursor":5', '"cursor":null'])
async def test_wrong_options_are_wrong_arguments(app: OpenApp, wrong: str) -> None:
    raw = f'{{"paginationOpts":{{{wrong}}}}}'.encode()
    result = await app.engine.backend.http_query("m:ranks", raw, None)
    assert result.failure is not None
    assert type(result.failure.error) is InvalidArgument
    assert "paginationOpts" in result.failure.message


async def test_what_the_hooks_of_the_clients_send_is_taken(app: OpenApp) -> None:
    raw = b'{"paginationOpts":{"numItems":2,"cursor":null,"id":7,"endCursor":null,"maximumBytesRead":1000}}'
    assert (await app.engine.backend.http_query("m:ranks", raw, None)).failure is None


async def test_maximum_rows_read_cuts_a_first_page_short_and_nothing_is_lost(app: OpenApp) -> None:
    await app.call("m:add", ranks=list(range(20)))
    ranks, cursor, count = [], None, 0
    while True:
        asked = options(100, cursor, maximum_rows_read=4)
        page, _ = await app.page("m:ranks", None, pagination_opts=asked, even=True)
        ranks += page.page
        count += 1
        if page.is_done:
            break
        assert page.page_status == "SplitRecommended"
        cursor = page.continue_cursor
    assert ranks == list(range(0, 20, 2))
    assert count == 6


async def test_a_page_that_outgrew_the_rows_it_may_read_asks_to_be_split_and_its_halves_are_whole(
    app: OpenApp,
) -> None:
    await app.call("m:add", ranks=[0, 100])
    asked = options(2, maximum_rows_read=6)
    page, journal = await app.page("m:ranks", None, pagination_opts=asked)
    await app.call("m:add", ranks=list(range(1, 10)))
    page, _ = await app.page("m:ranks", journal, pagination_opts=asked)
    assert (page.page_status, page.continue_cursor) == ("SplitRequired", journal)
    found, todo = [], [(None, page.split_cursor), (page.split_cursor, page.continue_cursor)]
    while todo:
        cursor, end_cursor = todo.pop(0)
        half, _ = await app.page(
            "m:ranks", None, pagination_opts=options(2, cursor, end_cursor=end_cursor, maximum_rows_read=6)
        )
        if half.page_status == "SplitRequired":
            todo = [(cursor, half.split_cursor), (half.split_cursor, end_cursor), *todo]
        else:
            found += half.page
    assert found == [*range(10), 100]


async def test_one_run_has_one_page(app: OpenApp) -> None:
    with pytest.raises(FunctionMisuse, match="m:twice: a second paginate in one run"):
        await app.call("m:twice", pagination_opts=options())
