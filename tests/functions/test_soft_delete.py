"""Tables where deleted documents stay: absent from everything but `with_deleted()`, and precise in whom they wake."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from engine.errors import (
    DocumentNotFound,
    Forbidden,
    FunctionMisuse,
    InvalidCursor,
    InvalidDocument,
    UniqueViolation,
)
from engine.functions.pages import PaginationOptions
from tests.functions.apps import OpenApp, open_app
from tests.small_engine import person

SCHEMA = """
    from engine import *

    class Note(Table, name="notes"):
        author: str = ""
        text: str = ""
        slug: str | None = None
        points: int = 0
        deleted_at: DeletedAt = None
        by_author = index("author", "points")
        by_slug = unique("slug")
        totals = aggregate("author", sum=("points",))
        words = search_index("text")

    class Plain(Table, name="plains"):
        text: str = ""
"""

FUNCTIONS = """
    def show(note: Note | None) -> str | None:
        return None if note is None else note.text + ("" if note.deleted_at is None else " (deleted)")

    @mutation
    async def add(ctx, text: str, author: str = "ann", slug: str | None = None, points: int = 1) -> str:
        return await ctx.db.insert(Note(text=text, author=author, slug=slug, points=points))

    @mutation
    async def patch(ctx, id: Id[Note], fields: dict[str, Any], with_deleted: bool = False) -> None:
        await (ctx.db.with_deleted() if with_deleted else ctx.db).patch(id, **fields)

    @mutation
    async def replace(ctx, id: Id[Note], text: str) -> None:
        await ctx.db.replace(id, Note(text=text))

    @mutation
    async def delete(ctx, id: str) -> None:
        await ctx.db.delete(id)

    @mutation
    async def restore(ctx, id: str) -> None:
        await ctx.db.restore(id)

    @mutation
    async def purge(ctx, id: str) -> None:
        await ctx.db.purge(id)

    @query
    async def get(ctx, id: Id[Note]) -> str | None:
        return show(await ctx.db.get(id))

    @query
    async def get_any(ctx, id: Id[Note]) -> str | None:
        return show(await ctx.db.with_deleted().get(id))

    @query
    async def by_author(ctx, author: str = "ann") -> list[str]:
        return [show(note) async for note in ctx.db.query(Note.by_author, author=author)]

    @query
    async def by_author_any(ctx, author: str = "ann") -> list[str]:
        return [show(note) for note in await ctx.db.query(Note.by_author, author=author).with_deleted().collect()]

    @query
    async def newest(ctx, n: int) -> list[str]:
        return [show(note) for note in await ctx.db.query(Note).order("desc").take(n)]

    @query
    async def newest_any(ctx, n: int) -> list[str]:
        return [show(note) for note in await ctx.db.with_deleted().query(Note).order("desc").take(n)]

    @query
    async def best_any(ctx, n: int) -> list[str]:
        best = ctx.db.with_deleted().query(Note.by_author, author="ann", gte=1).order("desc")
        return [show(note) for note in await best.take(n)]

    @query
    async def count(ctx, author: str = "ann") -> int:
        return await ctx.db.query(Note.by_author, author=author).count()

    @query
    async def count_any(ctx, author: str = "ann") -> int:
        return await ctx.db.query(Note.by_author, author=author).with_deleted().count()

    @query
    async def total(ctx, author: str = "ann") -> list[int]:
        total = await ctx.db.total(Note.totals, author=author)
        return [total.count, total.sum("points")]

    @query
    async def with_slug(ctx, slug: str) -> str | None:
        return show(await ctx.db.query(Note.by_slug, slug=slug).unique())

    @query
    async def search(ctx, text: str) -> list[str]:
        return [show(note) for note in await ctx.db.search(Note.words, text).take(9)]

    @query
    async def page(ctx, pagination_opts: PaginationOptions, any: bool = False) -> Page[Note]:
        scan = ctx.db.query(Note.by_author, author="ann")
        return await (scan.with_deleted() if any else scan).paginate(pagination_opts)
"""


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[OpenApp]:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        yield app


async def add(app: OpenApp, *texts: str, **fields: Any) -> list[str]:
    return [await app.call("m:add", text=text, **fields) for text in texts]


async def read_all(app: OpenApp, note: str) -> dict[str, Any]:
    """What every way of reading gives."""
    return {
        "get": await app.call("m:get", id=note),
        "by_author": await app.call("m:by_author"),
        "newest": await app.call("m:newest", n=9),
        "count": await app.call("m:count"),
        "total": await app.call("m:total"),
        "with_slug": await app.call("m:with_slug", slug="a"),
        "search": await app.call("m:search", text="apple"),
    }


async def test_a_deleted_document_is_absent_from_every_read_and_restored_it_is_back_in_each(app: OpenApp) -> None:
    (note,) = await add(app, "apple", slug="a", points=3)
    there = {
        "get": "apple",
        "by_author": ["apple"],
        "newest": ["apple"],
        "count": 1,
        "total": [1, 3],
        "with_slug": "apple",
        "search": ["apple"],
    }
    assert await read_all(app, note) == there
    await app.call("m:delete", id=note)
    assert await read_all(app, note) == {
        "get": None,
        "by_author": [],
        "newest": [],
        "count": 0,
        "total": [0, 0],
        "with_slug": None,
        "search": [],
    }
    await app.call("m:restore", id=note)
    assert await read_all(app, note) == there
    await app.call("m:purge", id=note)
    assert (await read_all(app, note))["get"] is None
    assert await app.call("m:get_any", id=note) is None


async def test_with_deleted_reads_every_document_where_it_stands(app: OpenApp) -> None:
    first, _, third, _ = await add(app, "one", "two", "three", "four")
    for note in (first, third):
        await app.call("m:delete", id=note)
    assert await app.call("m:get_any", id=first) == "one (deleted)"
    assert await app.call("m:by_author_any") == ["one (deleted)", "two", "three (deleted)", "four"]
    assert await app.call("m:newest_any", n=3) == ["four", "three (deleted)", "two"]
    assert await app.call("m:best_any", n=2) == ["four", "three (deleted)"]
    assert await app.call("m:count_any") == 4


async def test_pages_of_both_kinds_go_on_where_they_stopped_and_do_not_take_each_others_cursors(app: OpenApp) -> None:
    notes = await add(app, *"abcdef")
    for note in notes[1::2]:
        await app.call("m:delete", id=note)
    for any_, expected in ((False, "ace"), (True, "abcdef")):
        seen, cursor = "", None
        while True:
            options = PaginationOptions(num_items=2, cursor=cursor)
            page, _ = await app.page("m:page", any=any_, pagination_opts=options)
            seen, cursor = seen + "".join(note.text for note in page.page), page.continue_cursor
            if page.is_done:
                break
            with pytest.raises(InvalidCursor):
                await app.page("m:page", any=not any_, pagination_opts=PaginationOptions(num_items=2, cursor=cursor))
        assert seen == expected


async def test_who_reads_without_deleted_is_woken_when_one_is_deleted_or_restored_and_by_nothing_between(
    app: OpenApp,
) -> None:
    (note,) = await add(app, "a")
    queries = ["m:by_author", "m:count", "m:total", "m:get"]

    async def ran(path: str, **arguments: Any) -> list[str]:
        app.forget_events()
        await app.call(path, **arguments)
        await app.idle()
        return [query for query in queries if app.run_count(query)]

    async with AsyncExitStack() as stack:
        for path in queries:
            await stack.enter_async_context(app.watched(path, **({"id": note} if path == "m:get" else {})))
        assert await ran("m:delete", id=note) == queries
        # who read the document by its id depends on its row, whatever becomes of it
        assert await ran("m:patch", id=note, fields={"text": "b"}, with_deleted=True) == ["m:get"]
        assert await ran("m:restore", id=note) == queries
        assert await ran("m:patch", id=note, fields={"text": "c"}) == ["m:by_author", "m:get"]
        assert await ran("m:delete", id=note) == queries
        assert await ran("m:purge", id=note) == ["m:get"]


async def test_who_reads_with_deleted_is_woken_by_each_change_and_a_count_of_them_by_none_that_keeps_them(
    app: OpenApp,
) -> None:
    (note,) = await add(app, "a")
    async with app.watched("m:by_author_any") as all_, app.watched("m:count_any") as count:
        for path, arguments, expected in (
            ("m:delete", {}, ["a (deleted)"]),
            ("m:patch", {"fields": {"text": "b"}, "with_deleted": True}, ["b (deleted)"]),
            ("m:restore", {}, ["b"]),
            ("m:delete", {}, ["b (deleted)"]),
        ):
            await app.call(path, id=note, **arguments)
            assert await anext(all_) == expected
        await app.idle()
        assert app.run_count("m:count_any") == 0
        await app.call("m:purge", id=note)
        assert await anext(all_) == []
        assert await anext(count) == 0


async def test_who_searches_is_woken_when_one_is_deleted_and_when_it_is_back(app: OpenApp) -> None:
    (note,) = await add(app, "red apple")
    async with app.watched("m:search", text="apple") as found:
        await app.call("m:delete", id=note)
        assert await anext(found) == []
        app.forget_events()
        await app.call("m:patch", id=note, fields={"text": "green apple"}, with_deleted=True)
        await app.idle()
        assert app.run_count("m:search") == 0
        await app.call("m:restore", id=note)
        assert await anext(found) == ["green apple"]


async def test_deleted_documents_cost_a_scan_nothing(app: OpenApp) -> None:
    """They lie in indexes of their own: SQLite does not step over them one by one."""
    for number in range(20):
        (note,) = await add(app, str(number))
        await app.call("m:delete", id=note)
    await add(app, "there")
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    connection = app.engine._snapshots.reader._connection
    costs = []
    for path, arguments in (("m:by_author", {}), ("m:newest", {"n": 9}), ("m:count", {})):
        steps = 0
        connection.set_progress_handler(step, 1)  # called at each instruction of SQLite
        assert await app.call(path, **arguments) in (["there"], 1)
        connection.set_progress_handler(None, 1)
        costs.append(steps)
    assert 0 < min(costs) <= max(costs) < 20 * 3  # to step over a row takes more than three instructions


@pytest.mark.parametrize("path", ["m:patch", "m:replace", "m:delete"])
async def test_a_deleted_document_cannot_be_written(app: OpenApp, path: str) -> None:
    (note,) = await add(app, "a")
    await app.call("m:delete", id=note)
    arguments = {"m:patch": {"fields": {"text": "b"}}, "m:replace": {"text": "b"}, "m:delete": {}}[path]
    with pytest.raises(DocumentNotFound):
        await app.call(path, id=note, **arguments)
    assert await app.call("m:get_any", id=note) == "a (deleted)"


async def test_the_field_is_not_for_functions_to_set(app: OpenApp) -> None:
    (note,) = await add(app, "a")
    with pytest.raises(InvalidDocument, match=r"patch notes\.deleted_at: the engine sets this field") as refused:
        await app.call("m:patch", id=note, fields={"deleted_at": 5.0})
    assert (refused.value.table, refused.value.field, refused.value.value) == ("notes", "deleted_at", 5.0)


async def test_a_place_in_a_unique_index_is_free_again(app: OpenApp) -> None:
    (first,) = await add(app, "first", slug="a")
    await app.call("m:delete", id=first)
    await add(app, "second", slug="a")
    assert await app.call("m:with_slug", slug="a") == "second"
    with pytest.raises(UniqueViolation):
        await app.call("m:restore", id=first)


async def test_a_table_without_the_field_has_nothing_to_restore(tmp_path: Path) -> None:
    functions = """
        @mutation
        async def restore(ctx) -> None: await ctx.db.restore(await ctx.db.insert(Plain()))
        @mutation
        async def purge(ctx) -> None: await ctx.db.purge(await ctx.db.insert(Plain()))
        @query
        async def scan(ctx) -> Any: return await ctx.db.query(Plain).with_deleted().collect()
        @query
        async def read(ctx) -> Any: return await ctx.db.with_deleted().query(Plain).collect()
    """
    async with open_app(tmp_path, functions, schema=SCHEMA) as app:
        for path in ("m:restore", "m:purge", "m:scan"):
            with pytest.raises(FunctionMisuse, match=r"plains.*DeletedAt"):
                await app.call(path)
        assert await app.call("m:read") == []  # what is asked of the whole database is asked of such tables too


async def test_a_query_restores_nothing(tmp_path: Path) -> None:
    functions = """
        @query
        async def restore(ctx) -> None: await ctx.db.restore("x")
        @query
        async def purge(ctx) -> None: await ctx.db.with_deleted().purge("x")
    """
    async with open_app(tmp_path, functions, schema=SCHEMA) as app:
        for path in ("m:restore", "m:purge"):
            with pytest.raises(FunctionMisuse, match=r"in a query; a query only reads"):
                await app.call(path)


POLICY = """
    @query(internal=True)
    async def viewer(ctx) -> str:
        identity = ctx.auth.identity()
        return "" if identity is None else identity.subject

    @policy(Note, viewer=viewer)
    class NotePolicy(Policy[str]):
        def read(self, note: Note) -> bool: return note.author == self.viewer
        def insert(self, note: Note) -> bool: return note.author == self.viewer
        def update(self, old: Note, new: Note) -> bool: return old.deleted_at is None
        def delete(self, note: Note) -> bool: return note.points < 5

    @query
    async def unrestricted_any(ctx) -> list[str]:
        one = [show(note) for note in await ctx.db.unrestricted.with_deleted().query(Note).collect()]
        other = [show(note) for note in await ctx.db.with_deleted().unrestricted.query(Note).collect()]
        assert one == other
        return one
"""


async def test_policies_hold_for_deleted_documents_as_for_others(tmp_path: Path) -> None:
    ann, bob = person("ann"), person("bob")
    async with open_app(tmp_path, FUNCTIONS + POLICY, schema=SCHEMA) as app:
        note = await app.engine.mutation("m:add", text="a", identity=ann)
        costly = await app.engine.mutation("m:add", text="b", points=5, identity=ann)
        await app.engine.mutation("m:delete", id=note, identity=ann)
        assert await app.engine.query("m:by_author_any", identity=ann) == ["a (deleted)", "b"]
        assert await app.engine.query("m:by_author_any", identity=bob) == []
        assert await app.engine.query("m:unrestricted_any", identity=bob) == ["a (deleted)", "b"]
        for path, document, identity, error in (
            ("m:restore", note, bob, DocumentNotFound),  # what he may not see is not there for him
            ("m:restore", note, ann, Forbidden),  # the policy can tell that it was deleted
            ("m:purge", note, bob, DocumentNotFound),
            ("m:purge", costly, ann, Forbidden),
        ):
            with pytest.raises(error):
                await app.engine.mutation(path, id=document, identity=identity)
        await app.engine.mutation("m:purge", id=note, identity=ann)
        assert await app.engine.query("m:unrestricted_any", identity=ann) == ["b"]
