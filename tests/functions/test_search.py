"""Searches as an app writes them: what they find and in which order, what wakes them, and what they cost."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.functions.pages import PaginationOptions
from engine.values.words import relevance, terms_of, words_of
from tests.functions.apps import UNHURRIED, OpenApp, open_app
from tests.small_engine import Subscriber

SCHEMA = """
    from engine import DeletedAt, Table, index, search_index

    class Game(Table, name="games"):
        title: str

    class Message(Table, name="messages"):
        game: str
        body: str | None
        rank: int = 0
        level: float | None = None
        is_open: bool = True
        deleted_at: DeletedAt = None
        search = search_index("body", filter=("game", "level", "is_open"))
        by_game = index("game")

    class Plain(Table, name="plains"):
        body: str
        search = search_index("body")
"""

FUNCTIONS = """
@query
async def find(ctx, text: str, fixed: dict[str, Any] = {}, even: bool = False, n: int = 100) -> list[str]:
    search = ctx.db.search(Message.search, text, **fixed)
    if even:
        search = search.filter(lambda message: message.rank % 2 == 0)
    return [message.body for message in await search.take(n)]

@query
async def find_ids(ctx, text: str, fixed: dict[str, Any] = {}) -> list[str]:
    return [message.id for message in await ctx.db.search(Message.search, text, **fixed).collect()]

@query
async def first(ctx, text: str) -> str | None:
    message = await ctx.db.search(Message.search, text).first()
    return message and message.body

@query
async def pages(ctx, pagination_opts: PaginationOptions, text: str, game: str | None = None) -> Page[str]:
    fixed = {} if game is None else {"game": game}
    page = await ctx.db.search(Message.search, text, **fixed).paginate(pagination_opts)
    return Page(page=[m.body for m in page.page], is_done=page.is_done, continue_cursor=page.continue_cursor)

@query
async def everything(ctx) -> list[Message]:
    return await ctx.db.query(Message).collect()

@mutation
async def add(
    ctx, *, bodies: list[str | None], game: str = "a", level: float | None = None, rank: int = 0
) -> list[str]:
    return [await ctx.db.insert(Message(game=game, body=b, level=level, rank=rank)) for b in bodies]

@mutation
async def change(ctx, id: str, fields: dict[str, Any]) -> None:
    await ctx.db.patch(id, **plain(fields))

def plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: int(value) if name == "rank" else value for name, value in fields.items()}

@mutation
async def remove(ctx, id: str) -> None:
    await ctx.db.delete(id)

@mutation
async def write(ctx, steps: list[dict[str, Any]]) -> None:
    await run(ctx, steps)

async def run(ctx, steps):
    for step in steps:
        messages = await ctx.db.query(Message).collect()
        chosen = messages[int(step["place"]) % len(messages)] if messages else None
        match step["kind"]:
            case "add":
                await ctx.db.insert(Message(**plain(step["fields"])))
            case "change" if chosen:
                await ctx.db.patch(chosen.id, **plain(step["fields"]))
            case "remove" if chosen:
                await ctx.db.delete(chosen.id)
            case "nest":
                try:
                    await ctx.run_mutation(nested, steps=step["steps"], fails=step["fails"])
                except AppError:
                    pass
        found = await ctx.db.search(Message.search, "g").collect()
        assert {m.id for m in found} == {
            m.id for m in await ctx.db.query(Message).collect() if any(w[:1] == "g" for w in (m.body or "").split())
        }, "a mutation sees its own writes"

@mutation(internal=True)
async def nested(ctx, steps: list[dict[str, Any]], fails: bool) -> None:
    await run(ctx, steps)
    if fails:
        raise AppError("undone")
"""


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[OpenApp]:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        yield app


# -- what is found


async def test_the_most_relevant_documents_come_first_and_the_newest_of_equal_ones(app: OpenApp) -> None:
    await app.call(
        "m:add",
        bodies=["goal oka", "what a long text about one goal, oka", "goal okay", "GOAL! Oka?", "goal", "oka", None, ""],
    )
    found = await app.call("m:find", text="goal oka")
    assert found == ["GOAL! Oka?", "goal oka", "what a long text about one goal, oka", "goal okay"]
    assert await app.call("m:find", text="goal oka", n=1) == found[:1]
    assert await app.call("m:find", text="goal oka", n=0) == []
    assert await app.call("m:first", text="goal oka") == found[0]
    assert await app.call("m:first", text="nothing of it") is None


async def test_how_relevant_a_document_is_does_not_depend_on_others(app: OpenApp) -> None:
    await app.call("m:add", bodies=["rare goal goal", "rare rare goal"])
    before = await app.call("m:find", text="rare goal")
    await app.call("m:add", bodies=["rare"] * 50)
    assert await app.call("m:find", text="rare goal") == before


async def test_filter_fields_narrow_a_search(app: OpenApp) -> None:
    await app.call("m:add", bodies=["goal a"], game="a", level=1)
    await app.call("m:add", bodies=["goal b"], game="b", level=1)
    await app.call("m:add", bodies=["goal c"], game="b", rank=1)
    for fixed, expected in (
        ({"game": "b"}, ["goal c", "goal b"]),
        ({"level": 1}, ["goal b", "goal a"]),
        ({"level": None, "game": "b"}, ["goal c"]),
        ({"is_open": False}, []),
        ({"game": ""}, []),
    ):
        assert await app.call("m:find", text="goal", fixed=fixed) == expected
    assert await app.call("m:find", text="goal", even=True) == ["goal b", "goal a"]


@pytest.mark.parametrize("text", ["", " ", '""', "*", "…", "()", "\n\t", "+-^:"])
async def test_a_text_without_words_finds_nothing_and_depends_on_nothing(app: OpenApp, text: str) -> None:
    await app.call("m:add", bodies=["goal", "", text])
    async with app.watched("m:find", text=text):
        await app.call("m:add", bodies=["goal", text])
        await app.idle()
        assert not app.run_count("m:find")
    assert await app.call("m:find", text=text) == []


@pytest.mark.parametrize(
    "text",
    ['"goal', "goal AND NOT oka", "goal OR", "NEAR(goal oka, 2)", "goal*", "body:goal", "{body} : goal", "-goal",
     "^goal", "goal + oka", "'; DROP TABLE messages; --", "goal\x00oka", "gòâl", "ＧＯＡＬ", "goal \ud800",
     "👍 goal", "東京 goal"],
    ids=ascii,
)  # fmt: skip
async def test_what_a_user_types_is_plain_text(app: OpenApp, text: str) -> None:
    bodies = ["goal", "oka", "goal oka", "goal 👍", "東京タワー goal", "goal AND NOT oka", "near goal oka 2",
              "body goal", "goal or oka", "drop table messages goal"]  # fmt: skip
    await app.call("m:add", bodies=bodies)
    terms = terms_of(text)
    expected = {body for body in bodies if relevance(terms, words_of(body)) is not None}
    assert set(await _found(app, text)) == expected
    assert expected or "DROP" in text


async def _found(app: OpenApp, text: str) -> list[str]:
    """As a client that asks in JSON, but for what JSON cannot say."""
    if text.isprintable() or "\x00" in text:
        return list(await app.call("m:find", text=text))
    await app.rewrite(
        FUNCTIONS + f"\n@query\nasync def odd(ctx) -> list[str]:\n    return await find(ctx, {text!r})\n", schema=SCHEMA
    )
    return list(await app.call("m:odd"))


async def test_deleted_documents_are_absent(app: OpenApp) -> None:
    (kept, gone) = await app.call("m:add", bodies=["goal one", "goal two"])
    await app.call("m:remove", id=gone)
    assert await app.call("m:find_ids", text="goal") == [kept]


async def test_a_search_over_a_table_with_one_text_field_needs_no_filter(tmp_path: Path) -> None:
    functions = """
    @mutation
    async def add(ctx, body: str) -> None:
        await ctx.db.insert(Plain(body=body))

    @query
    async def find(ctx, text: str) -> list[Plain]:
        return await ctx.db.search(Plain.search, text).collect()
    """
    async with open_app(tmp_path, functions, schema=SCHEMA) as app:
        await app.call("m:add", body="x")
        assert [plain.body for plain in await app.call("m:find", text="X")] == ["x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"text": "x", "fixed": {"rank": 1}},
            "search messages.search: 'rank' is none of its filter fields (game, level",
        ),
        ({"text": "x", "fixed": {"level": "high"}}, "search messages.search: level='high' cannot be in that field"),
        ({"text": "x", "n": -1}, "take: -1 documents"),
        ({"text": "x" * 1_025}, "search messages.search: characters: 1,025 used, 1,024 allowed."),
    ],
)
async def test_a_search_that_cannot_be_is_refused(app: OpenApp, arguments: Any, message: str) -> None:
    failure = await app.failure("m:find", **arguments)
    assert message in f"{failure.message} {failure.error}"


# -- what it costs


async def test_every_document_that_is_ranked_is_read(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, read_document_count_max=4)
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA, limits=limits) as app:
        await app.call("m:add", bodies=["goal"] * 4 + ["other"] * 10)
        assert len(await app.call("m:find", text="goal", n=1)) == 1
        await app.call("m:add", bodies=["goal"])
        failure = await app.failure("m:find", text="goal", n=1)
        assert (failure.code, "limits.read_document_count_max" in failure.message) == ("LimitExceeded", True)


async def test_the_newest_matches_are_ranked_and_older_ones_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, search_match_count_max=700)
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA, limits=limits) as app:
        await app.call("m:add", bodies=["goal goal goal"])
        await app.call("m:add", bodies=["goal odd"] * 600, rank=1)
        await app.call("m:add", bodies=["goal even"] * 699)
        found = await app.call("m:find", text="goal", n=1_000)
        assert found == ["goal even"] * 699 + ["goal odd"]
        # what a filter drops takes nobody's place
        assert await app.call("m:find", text="goal", even=True, n=1_000) == ["goal goal goal"] + ["goal even"] * 699
        async with app.watched("m:find", text="goal", n=1):
            await app.call("m:add", bodies=["goal even"])
            await app.idle()
            assert app.run_count("m:find") == 1
        assert await app.call("m:find", text="goal", n=1_000) == ["goal even"] * 700


# -- what wakes it


async def test_a_search_runs_again_only_for_documents_that_match_or_did(app: OpenApp) -> None:
    (goal, other) = await app.call("m:add", bodies=["goal oka", "something else"])
    async with app.watched("m:find", text="oka go", fixed={"game": "a"}) as results:

        async def runs(path: str, **arguments: Any) -> int:
            app.forget_events()
            await app.call(path, **arguments)
            await app.idle()
            return app.run_count("m:find")

        assert await runs("m:add", bodies=["goal", "oka", "okay go", None, ""]) == 0
        assert await runs("m:add", bodies=["oka goal"], game="b") == 0
        assert await runs("m:change", id=other, fields={"body": "goal"}) == 0
        assert await runs("m:change", id=other, fields={"body": "gold for oka"}) == 1  # it matches now
        assert await anext(results) == ["goal oka", "gold for oka"]
        assert await runs("m:change", id=other, fields={"rank": 7}) == 1  # as all of a document that matches
        assert await runs("m:change", id=other, fields={"game": "b"}) == 1  # it did match
        assert await runs("m:change", id=other, fields={"rank": 8}) == 0
        assert await runs("m:add", bodies=["golden oka"] * 3) == 1
        assert await runs("m:remove", id=goal) == 1
        assert await runs("m:remove", id=other) == 0


async def test_a_write_wakes_the_searches_it_answers_of_many(app: OpenApp) -> None:
    async with (
        app.watched("m:find", text="goal"),
        app.watched("m:first", text="goal o"),
        app.watched("m:find_ids", text="oka"),
        app.watched("m:everything"),
    ):
        app.forget_events()
        await app.call("m:add", bodies=["no goal"])
        await app.idle()
        assert [app.run_count(f"m:{name}") for name in ("find", "first", "find_ids", "everything")] == [1, 0, 0, 1]


bodies = st.none() | st.lists(st.sampled_from(["goal", "goals", "go", "oka", "okay", "gol"]), max_size=3).map(" ".join)
fields = st.fixed_dictionaries(
    {"body": bodies, "game": st.sampled_from("ab")},
    optional={"rank": st.integers(0, 2), "level": st.sampled_from([None, 0.5, 1.0]), "is_open": st.booleans()},
)
changes = st.fixed_dictionaries({}, optional={"body": bodies, "game": st.sampled_from("ab"), "rank": st.integers(0, 2)})
simple_steps = st.fixed_dictionaries({"kind": st.just("add"), "place": st.just(0), "fields": fields}) | (
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["change", "remove"]), "place": st.integers(0, 5), "fields": changes}
    )
)
steps = simple_steps | st.fixed_dictionaries(
    {
        "kind": st.just("nest"),
        "place": st.just(0),
        "steps": st.lists(simple_steps, max_size=3),
        "fails": st.booleans(),
    }
)
asks = st.fixed_dictionaries(
    {
        "text": st.sampled_from(["goal", "go", "oka goal", "goals oka", "gol o", "x"]),
        "fixed": st.fixed_dictionaries({}, optional={"game": st.sampled_from("ab"), "level": st.just(1.0)}),
    }
)


def expected(messages: list[Any], ask: dict[str, Any]) -> list[str]:
    """What a search finds, by looking at every document."""
    ranked = []
    for message in messages:
        if message.body is not None and all(getattr(message, n) == v for n, v in ask["fixed"].items()):
            found = relevance(terms_of(ask["text"]), words_of(message.body))
            if found is not None:
                ranked.append((found, message.creation_time, message.id))
    return [document_id for _, _, document_id in sorted(ranked, reverse=True)]


@pytest.mark.slow
@settings(max_examples=max(25, settings().max_examples // 4))
@given(st.lists(asks, min_size=1, max_size=3), st.lists(st.lists(steps, max_size=4), max_size=5))
def test_subscribers_hold_what_a_fresh_run_finds_and_run_when_a_match_was_written(
    asked: list[dict[str, Any]], commits: list[list[dict[str, Any]]]
) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with open_app(Path(directory), FUNCTIONS, schema=SCHEMA) as app:
                subscribers = [Subscriber(app.engine, None) for _ in asked]
                for subscriber, ask in zip(subscribers, asked, strict=True):
                    subscriber.ask(0, "m:find_ids", **ask)
                    await subscriber.catch_up()
                before: list[Any] = []
                for commit in commits:
                    app.forget_events()
                    await app.call("m:write", steps=commit)
                    await app.idle()
                    run_count = app.run_count("m:find_ids")
                    after = await app.call("m:everything")
                    written = _changed(before, after)
                    assert run_count == sum(bool(expected(written, ask)) for ask in distinct)
                    for subscriber, ask in zip(subscribers, asked, strict=True):
                        await subscriber.catch_up()
                        assert subscriber.value() == expected(after, ask)
                        assert await app.call("m:find_ids", **ask) == expected(after, ask)
                    before = after

    distinct = {msgspec.json.encode(ask, order="sorted"): ask for ask in asked}.values()
    asyncio.run(run())


def _changed(before: list[Any], after: list[Any]) -> list[Any]:
    """Every old and every new state of what was written."""
    old, new = {m.id: m for m in before}, {m.id: m for m in after}
    return [
        state
        for document_id in old.keys() | new.keys()
        if old.get(document_id) != new.get(document_id)
        for state in (old.get(document_id), new.get(document_id))
        if state is not None
    ]


async def test_a_subscriber_is_told_as_the_user_types_on(app: OpenApp) -> None:
    async with app.engine.subscribe("m:find", text="ok") as typed, app.engine.subscribe("m:find", text="oka") as more:
        assert [await anext(typed), await anext(more)] == [[], []]
        await app.call("m:add", bodies=["ok then"])
        assert await anext(typed) == ["ok then"]
        await app.call("m:add", bodies=["goal, okay"])
        assert await anext(typed) == ["ok then", "goal, okay"]
        assert await anext(more) == ["goal, okay"]


POLICY = """
from engine import Policy, policy

@query
async def may_see_all(ctx) -> bool:
    return await ctx.db.query(Game).first() is not None

@policy(Message, viewer=may_see_all)
class MessagePolicy(Policy[bool]):
    def read(self, message):
        return message.is_open or self.viewer

@mutation(internal=True)
async def put(ctx, body: str, is_open: bool) -> None:
    await ctx.db.insert(Message(game="a", body=body, is_open=is_open))

@mutation(internal=True)
async def open_all(ctx) -> None:
    await ctx.db.insert(Game(title="x"))
"""


async def test_what_a_policy_hides_is_not_found_and_takes_nobodys_place(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, search_match_count_max=2)
    async with open_app(tmp_path, FUNCTIONS + POLICY, schema=SCHEMA, limits=limits) as app:
        for body, is_open in (("goal one", True), ("goal two", True), ("goal three", False), ("goal four", False)):
            await app.call("m:put", body=body, is_open=is_open)
        subscriber = Subscriber(app.engine, None)
        subscriber.ask(0, "m:find", text="goal")
        subscriber.ask(1, "m:pages", text="goal", paginationOpts={"numItems": 9, "cursor": None})
        await subscriber.catch_up()
        assert subscriber.value(0) == subscriber.value(1)["page"] == ["goal two", "goal one"]
        await app.call("m:open_all")
        await subscriber.catch_up()
        assert subscriber.value(0) == subscriber.value(1)["page"] == ["goal four", "goal three"]
        subscriber.view.close()


# -- pages


async def read_pages(
    app: OpenApp, journals: list[str | None] | None = None, **arguments: Any
) -> tuple[list[list[str]], list[Any]]:
    """All pages to the end, and the journals to read them again with."""
    pages: list[list[str]] = []
    new_journals: list[str | None] = []
    cursor: str | None = None
    while True:
        journal = journals[len(pages)] if journals and len(pages) < len(journals) else None
        options = PaginationOptions(num_items=2, cursor=cursor)
        page, new_journal = await app.page("m:pages", journal, pagination_opts=options, **arguments)
        pages.append(page.page)
        new_journals.append(new_journal)
        if page.is_done:
            return pages, new_journals
        cursor = page.continue_cursor


async def test_pages_follow_each_other_and_stay_gapless_while_documents_come_and_go(app: OpenApp) -> None:
    ids = await app.call("m:add", bodies=[f"goal {'x ' * number}" for number in range(5)] + ["other"])
    in_order = await app.call("m:find", text="goal")
    pages, journals = await read_pages(app, text="goal")
    assert pages == [in_order[:2], in_order[2:4], in_order[4:]]
    await app.call("m:add", bodies=["goal goal", "goal x x x x x x x x"])
    await app.call("m:remove", id=ids[2])
    pages, _ = await read_pages(app, journals, text="goal")
    assert [body for page in pages for body in page] == await app.call("m:find", text="goal")
    assert [len(page) for page in pages] == [3, 1, 2]


async def test_a_page_of_nothing_is_done_and_grows(app: OpenApp) -> None:
    pages, journals = await read_pages(app, text="goal")
    assert pages == [[]]
    await app.call("m:add", bodies=["goal"])
    assert (await read_pages(app, journals, text="goal"))[0] == [["goal"]]


async def test_a_cursor_of_another_search_is_refused(app: OpenApp) -> None:
    await app.call("m:add", bodies=["goal oka"] * 3)
    page = await app.call("m:pages", pagination_opts=PaginationOptions(num_items=1), text="goal")
    options = PaginationOptions(num_items=1, cursor=page.continue_cursor)
    assert len((await app.call("m:pages", pagination_opts=options, text="goal")).page) == 1
    for other in ({"text": "oka"}, {"text": "goal", "game": "a"}):
        assert (await app.failure("m:pages", pagination_opts=options, **other)).code == "InvalidCursor"


# -- the schema changes under it


async def test_an_index_is_filled_when_it_is_added_and_goes_on_over_reloads_and_restarts(tmp_path: Path) -> None:
    add_only = FUNCTIONS[FUNCTIONS.index("@mutation\nasync def add") : FUNCTIONS.index("@mutation\nasync def change")]
    without = "\n".join(line for line in SCHEMA.splitlines() if "search_index(" not in line)
    async with open_app(tmp_path, add_only, schema=without) as app:
        await app.call("m:add", bodies=["goal before"])
        await app.rewrite(FUNCTIONS, schema=SCHEMA)
        await app.call("m:add", bodies=["goal after"])
        assert await app.call("m:find", text="goal") == ["goal after", "goal before"]
    async with open_app(tmp_path) as app:
        await app.call("m:add", bodies=["goal later"])
        assert await app.call("m:find", text="goal") == ["goal later", "goal after", "goal before"]
