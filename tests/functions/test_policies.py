"""Row policies: what a caller sees and may write, who shares what, and what runs again when a role changes."""

from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine import Identity, PaginationOptions
from engine.errors import AppError, ConfigError, DocumentNotFound, Forbidden, FunctionMisuse, RegistryError
from engine.events import QueryRan
from tests.functions.apps import OpenApp, open_app
from tests.small_engine import Subscriber, person

SCHEMA = """
from typing import Literal
from engine import Id, Table, index, unique

class User(Table, name="users"):
    subject: str
    role: Literal["user", "moderator"] = "user"
    seen: float = 0.0
    by_subject = unique("subject")

class Message(Table, name="messages"):
    room: str
    author: str
    text: str = ""
    is_hidden: bool = False
    by_room = index("room")

class Note(Table, name="notes"):
    text: str
"""

FUNCTIONS = """
from msgspec import Struct
from engine import PaginationOptions, Page, Policy, policy
from schema import Message, Note, User

class Viewer(Struct, frozen=True):
    name: str | None = None
    is_moderator: bool = False

@query(internal=True)
async def role(ctx) -> bool:
    identity = ctx.auth.identity()
    if identity is None:
        return False
    user = await ctx.db.query(User.by_subject, subject=identity.subject).unique()
    return user is not None and user.role == "moderator"

@policy(Message, viewer=role)
class MessagePolicy(Policy[bool]):
    def read(self, message): return not message.is_hidden or self.viewer
    def insert(self, message): return self.identity is not None and message.author == self.identity.subject
    def update(self, old, new): return self.viewer and (old.author, old.room) == (new.author, new.room)
    def delete(self, message): return self.viewer

@query
async def all_of(ctx, room: str) -> list[Message]: return await ctx.db.query(Message.by_room, room=room).collect()
@query
async def texts(ctx, room: str, n: int = 9) -> list[str]:
    seen = ctx.db.query(Message.by_room, room=room).order("desc").filter(lambda m: len(m.text) < 9)
    return [m.text for m in await seen.take(n)]
@query
async def everything(ctx, room: str) -> int: return await ctx.db.unrestricted.query(Message.by_room, room=room).count()
@query
async def count(ctx, room: str) -> int: return await ctx.db.query(Message.by_room, room=room).count()
@query
async def first(ctx, room: str) -> Message | None: return await ctx.db.query(Message.by_room, room=room).first()
@query
async def get(ctx, id: Id[Message]) -> Message | None: return await ctx.db.get(id)
@query
async def nested(ctx, room: str) -> int: return len(await ctx.run_query(all_of, room=room))
@query
async def page(ctx, room: str, pagination_opts: PaginationOptions) -> Page[Message]:
    return await ctx.db.query(Message.by_room, room=room).paginate(pagination_opts)
@query
async def walk(ctx, room: str) -> list[str]: return [m.text async for m in ctx.db.query(Message.by_room, room=room)]

@mutation
async def send(ctx, room: str, author: str, text: str = "", is_hidden: bool = False) -> Id[Message]:
    return await ctx.db.insert(Message(room=room, author=author, text=text, is_hidden=is_hidden))
@mutation
async def patch(ctx, id: Id[Message], fields: dict[str, Any]) -> None: await ctx.db.patch(id, **fields)
@mutation
async def replace(ctx, id: Id[Message], room: str, author: str) -> None:
    await ctx.db.replace(id, Message(room=room, author=author))
@mutation
async def delete(ctx, id: Id[Message]) -> None: await ctx.db.delete(id)
@mutation
async def promote_and_delete(ctx, id: Id[Message], subject: str) -> None:
    user = await ctx.db.query(User.by_subject, subject=subject).unique()
    await ctx.db.patch(user.id, role="moderator")
    await ctx.db.delete(id)
@mutation
async def catches(ctx, id: Id[Message]) -> bool:
    try:
        await ctx.db.delete(id)
    except Forbidden:
        return await ctx.db.get(id) is not None
@mutation
async def nested_delete(ctx, id: Id[Message]) -> None: await ctx.run_mutation(delete, id=id)
@action
async def count_by_action(ctx, room: str) -> int: return await ctx.run_query(count, room=room)
@action
async def count_later(ctx, room: str) -> None: await ctx.scheduler.run_after(0, job, room=room)
@mutation(internal=True)
async def job(ctx, room: str) -> None:
    n = await ctx.db.query(Message.by_room, room=room).count()
    await ctx.db.insert(Note(text=f"{n} in {room}"))
@query
async def notes(ctx) -> list[str]: return [n.text for n in await ctx.db.query(Note).collect()]

@mutation(internal=True)
async def add_user(ctx, subject: str, role: str = "user") -> None:
    await ctx.db.insert(User(subject=subject, role=role))
@mutation(internal=True)
async def set_user(ctx, subject: str, fields: dict[str, Any]) -> None:
    user = await ctx.db.query(User.by_subject, subject=subject).unique()
    await ctx.db.patch(user.id, **fields)
@mutation(internal=True)
async def put(ctx, room: str, text: str, is_hidden: bool = False) -> Id[Message]:
    return await ctx.db.insert(Message(room=room, author="system", text=text, is_hidden=is_hidden))
@mutation(internal=True)
async def hide(ctx, id: Id[Message], is_hidden: bool = True) -> None: await ctx.db.patch(id, is_hidden=is_hidden)
"""

ALICE, BOB, MOD = person("alice"), person("bob"), person("mod")


@asynccontextmanager
async def app_with_messages(directory: Path) -> AsyncIterator[tuple[OpenApp, list[str]]]:
    """alice and bob are users, mod is a moderator; in room r there is "open", "secret" (hidden) and "late"."""
    async with open_app(directory, FUNCTIONS, schema=SCHEMA) as app:
        for subject, role in (("alice", "user"), ("bob", "user"), ("mod", "moderator")):
            await app.engine.mutation("m:add_user", subject=subject, role=role)
        ids = [
            await app.engine.mutation("m:put", room="r", text=text, is_hidden=text == "secret")
            for text in ("open", "secret", "late")
        ]
        yield app, ids


def told(app: OpenApp) -> list[str]:
    """Paths of the queries that run from now on."""
    paths: list[str] = []
    app.engine.events.listen(lambda event: paths.append(event.path) if isinstance(event, QueryRan) else None)
    return paths


# -- reading


@pytest.mark.parametrize(("identity", "seen"), [(None, 2), (ALICE, 2), (MOD, 3)], ids=["nobody", "alice", "mod"])
async def test_a_hidden_row_is_absent_from_every_kind_of_read(
    tmp_path: Path, identity: Identity | None, seen: int
) -> None:
    async with app_with_messages(tmp_path) as (app, ids):
        engine = app.engine
        texts = ["open", "secret", "late"] if seen == 3 else ["open", "late"]
        assert [m.text for m in await engine.query("m:all_of", room="r", identity=identity)] == texts
        assert await engine.query("m:texts", room="r", identity=identity) == texts[::-1]
        assert await engine.query("m:texts", room="r", n=2, identity=identity) == texts[::-1][:2]
        assert await engine.query("m:walk", room="r", identity=identity) == texts
        assert await engine.query("m:count", room="r", identity=identity) == seen
        assert await engine.query("m:nested", room="r", identity=identity) == seen
        assert await engine.action("m:count_by_action", room="r", identity=identity) == seen
        assert (await engine.query("m:get", id=ids[1], identity=identity) is not None) == (seen == 3)
        options = PaginationOptions(num_items=2, cursor=None)
        page = await engine.query("m:page", room="r", pagination_opts=options, identity=identity)
        assert [m.text for m in page.page] == texts[:2]
        assert await engine.query("m:everything", room="r", identity=identity) == 3


async def test_the_engine_itself_sees_everything(tmp_path: Path) -> None:
    async with app_with_messages(tmp_path) as (app, _):
        await app.engine.action("m:count_later", room="r", identity=ALICE)
        await app.turn(1)
        assert await app.engine.query("m:notes") == ["3 in r"]


async def test_a_cursor_tells_nothing_of_the_row_that_it_stands_at(tmp_path: Path) -> None:
    functions = """
from engine import Policy, policy
from schema import User
@policy(User)
class P(Policy[None]):
    def read(self, user): return user.role == "user"
@query
async def page(ctx, pagination_opts: PaginationOptions) -> Page[User]:
    return await ctx.db.query(User.by_subject).paginate(pagination_opts)
@mutation(internal=True)
async def add(ctx, subject: str, role: str) -> None: await ctx.db.insert(User(subject=subject, role=role))
"""
    async with open_app(tmp_path, functions, schema=SCHEMA) as app:
        for subject in ("a", "secret", "z"):
            await app.engine.mutation("m:add", subject=subject, role="moderator" if subject == "secret" else "user")
        options = PaginationOptions(num_items=9, maximum_rows_read=2)
        page = await app.engine.query("m:page", pagination_opts=options)
        assert [user.subject for user in page.page] == ["a"]
        assert b"secret" not in b64decode(page.continue_cursor, altchars=b"-_")
        rest = PaginationOptions(num_items=9, cursor=page.continue_cursor)
        assert [user.subject for user in (await app.engine.query("m:page", pagination_opts=rest)).page] == ["z"]


# -- writing


async def test_what_a_policy_refuses_is_forbidden_with_operation_and_table_and_changes_nothing(tmp_path: Path) -> None:
    async with app_with_messages(tmp_path) as (app, ids):
        engine = app.engine
        for path, arguments, operation in (
            ("m:send", {"room": "r", "author": "bob"}, "insert"),
            ("m:patch", {"id": ids[0], "fields": {"text": "changed"}}, "update"),
            ("m:replace", {"id": ids[0], "room": "r", "author": "alice"}, "update"),
            ("m:delete", {"id": ids[0]}, "delete"),
            ("m:nested_delete", {"id": ids[0]}, "delete"),
        ):
            with pytest.raises(Forbidden, match=f"^{operation} messages: its policy, MessagePolicy, "):
                await engine.mutation(path, identity=ALICE, **arguments)
        assert await engine.mutation("m:catches", id=ids[0], identity=ALICE) is True
        assert await engine.query("m:texts", room="r", identity=MOD) == ["late", "secret", "open"]


async def test_what_a_policy_allows_is_written(tmp_path: Path) -> None:
    async with app_with_messages(tmp_path) as (app, ids):
        engine = app.engine
        own = await engine.mutation("m:send", room="r", author="alice", text="mine", identity=ALICE)
        await engine.mutation("m:patch", id=own, fields={"text": "ours"}, identity=MOD)
        await engine.mutation("m:delete", id=ids[0], identity=MOD)
        with pytest.raises(Forbidden):
            await engine.mutation("m:patch", id=own, fields={"room": "elsewhere"}, identity=MOD)
        assert await engine.query("m:texts", room="r", identity=ALICE) == ["ours", "late"]


@pytest.mark.parametrize("path", ["m:patch", "m:replace", "m:delete"])
async def test_a_hidden_row_is_not_there_to_be_written(tmp_path: Path, path: str) -> None:
    arguments: dict[str, Any] = {
        "m:patch": {"fields": {"text": "x"}},
        "m:replace": {"room": "r", "author": "alice"},
        "m:delete": {},
    }[path]
    async with app_with_messages(tmp_path) as (app, ids):
        with pytest.raises(DocumentNotFound):
            await app.engine.mutation(path, id=ids[1], identity=ALICE, **arguments)


async def test_a_mutation_is_judged_by_what_it_has_written_so_far(tmp_path: Path) -> None:
    async with app_with_messages(tmp_path) as (app, ids):
        await app.engine.mutation("m:promote_and_delete", id=ids[0], subject="alice", identity=ALICE)
        assert await app.engine.query("m:texts", room="r", identity=ALICE) == ["late", "secret"]


# -- pushes


async def test_a_role_that_is_given_or_taken_away_shows_and_hides_at_once(tmp_path: Path) -> None:
    async with app_with_messages(tmp_path) as (app, _):
        subscriber = Subscriber(app.engine, ALICE)
        subscriber.ask(0, "m:walk", room="r")
        await subscriber.catch_up()
        assert subscriber.value() == ["open", "late"]
        await app.engine.mutation("m:set_user", subject="alice", fields={"role": "moderator"})
        await subscriber.catch_up()
        assert subscriber.value() == ["open", "secret", "late"]
        await app.engine.mutation("m:set_user", subject="alice", fields={"role": "user"})
        await subscriber.catch_up()
        assert subscriber.value() == ["open", "late"]


async def test_callers_with_the_same_viewer_share_one_run(tmp_path: Path) -> None:
    async with app_with_messages(tmp_path) as (app, _):
        subscribers = []
        for number in range(20):
            await app.engine.mutation("m:add_user", subject=f"u{number}", role="moderator" if number < 5 else "user")
            subscriber = Subscriber(app.engine, person(f"u{number}"))
            subscriber.ask(0, "m:walk", room="r")
            await subscriber.catch_up()
            subscribers.append(subscriber)
        ran = told(app)
        await app.engine.mutation("m:put", room="r", text="news", is_hidden=True)
        for subscriber in subscribers:
            await subscriber.catch_up()
        assert ran == ["m:walk"] * 2, "moderators and users"
        assert [subscriber.value()[-1] for subscriber in subscribers] == ["news"] * 5 + ["late"] * 15
        assert len({id(subscriber.results[0]) for subscriber in subscribers}) == 2


async def test_who_changes_groups_alone_runs_nothing_for_the_others(tmp_path: Path) -> None:
    async with app_with_messages(tmp_path) as (app, _):
        subscribers = {}
        for identity in (ALICE, BOB, MOD):
            subscribers[identity.subject] = subscriber = Subscriber(app.engine, identity)
            subscriber.ask(0, "m:walk", room="r")
            await subscriber.catch_up()
        ran = told(app)
        await app.engine.mutation("m:set_user", subject="alice", fields={"role": "moderator"})
        for subscriber in subscribers.values():
            await subscriber.catch_up()
        assert ran == ["m:role"], "alice joins the moderators, who have the result"
        assert subscribers["alice"].results[0] is subscribers["mod"].results[0]
        ran.clear()
        await app.engine.mutation("m:set_user", subject="bob", fields={"seen": 1})
        assert ran == ["m:role"], "it returns the same: nobody else runs"


async def test_a_result_that_holds_nothing_to_judge_is_shared_by_all(tmp_path: Path) -> None:
    async with app_with_messages(tmp_path) as (app, _):
        results = set()
        for identity in (None, ALICE, MOD):
            subscriber = Subscriber(app.engine, identity)
            subscriber.ask(0, "m:walk", room="empty")
            await subscriber.catch_up()
            results.add(id(subscriber.results[0]))
        assert len(results) == 1


async def test_signing_in_and_out_is_judged_again(tmp_path: Path) -> None:
    async with app_with_messages(tmp_path) as (app, _):
        subscriber = Subscriber(app.engine, None)
        subscriber.ask(0, "m:walk", room="r")
        for identity, seen in ((None, 2), (MOD, 3), (ALICE, 2), (MOD, 3), (None, 2)):
            subscriber.view.set_identity(identity)
            await subscriber.catch_up()
            assert len(subscriber.value()) == seen


# -- declaring


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ("@policy(Note)\nclass A(Policy[None]): pass\n@policy(Note)\nclass B(Policy[None]): pass",
         "notes has a policy"),
        ("@policy(Note, viewer=len)\nclass A(Policy[None]): pass", "its viewer is a @query"),
        ("@query\nasync def v(ctx, n: int) -> int: return n\n@policy(Note, viewer=v)\nclass A(Policy[int]): pass",
         "takes no arguments"),
        ("@policy(Note)\nclass A: pass", "stands above a class"),
    ],
)  # fmt: skip
async def test_a_policy_that_cannot_be_is_refused_at_start(tmp_path: Path, functions: str, message: str) -> None:
    head = "from engine import Policy, policy\nfrom schema import Note\n"
    with pytest.raises(RegistryError, match=message):
        async with open_app(tmp_path, head + functions, schema=SCHEMA):
            pass


async def test_a_denied_table_without_a_policy_is_closed_to_clients(tmp_path: Path) -> None:
    functions = """
from schema import Note
@mutation
async def add(ctx) -> None: await ctx.db.insert(Note(text="x"))
@mutation(internal=True)
async def seed(ctx) -> None: await ctx.db.insert(Note(text="x"))
@query
async def count(ctx) -> int: return await ctx.db.query(Note).count()
"""
    async with open_app(tmp_path, functions, schema=SCHEMA, denied_tables=("*",)) as app:
        await app.engine.mutation("m:seed")
        with pytest.raises(Forbidden, match="insert notes"):
            await app.engine.mutation("m:add")
        assert await app.engine.query("m:count") == 0
    with pytest.raises(ConfigError, match="'nots' is no table"):
        async with open_app(tmp_path, functions, schema=SCHEMA, denied_tables=("nots",)):
            pass


async def test_a_predicate_may_read_and_what_it_read_is_depended_on(tmp_path: Path) -> None:
    functions = """
from engine import AppError, Policy, policy
from schema import Message, Note
@policy(Message)
class P(Policy[None]):
    async def read(self, message):
        return await self.db.query(Note).filter(lambda note: note.text == message.room).first() is not None
    def insert(self, message): return True
@query
async def texts(ctx) -> list[str]: return [m.text for m in await ctx.db.query(Message).collect()]
@mutation
async def open_room(ctx, room: str) -> None: await ctx.db.insert(Note(text=room))
@mutation
async def send(ctx, room: str, text: str) -> None: await ctx.db.insert(Message(room=room, author="a", text=text))
"""
    async with open_app(tmp_path, functions, schema=SCHEMA) as app:
        await app.engine.mutation("m:send", room="r", text="hello")
        subscriber = Subscriber(app.engine, None)
        subscriber.ask(0, "m:texts")
        await subscriber.catch_up()
        assert subscriber.value() == []
        await app.engine.mutation("m:open_room", room="r")
        await subscriber.catch_up()
        assert subscriber.value() == ["hello"]


async def test_a_viewer_that_refuses_refuses_the_caller_until_it_no_longer_does(tmp_path: Path) -> None:
    functions = """
from engine import AppError, Policy, policy
from schema import Message, User
@query(internal=True)
async def viewer(ctx) -> str:
    identity = ctx.auth.identity()
    user = identity and await ctx.db.query(User.by_subject, subject=identity.subject).unique()
    if not user:
        raise AppError({"code": "UNKNOWN"})
    return user.role
@policy(Message, viewer=viewer)
class P(Policy[str]):
    def read(self, message): return self.viewer == "moderator"
@query
async def texts(ctx) -> list[str]: return [m.text for m in await ctx.db.query(Message).collect()]
@mutation(internal=True)
async def setup(ctx) -> None: await ctx.db.insert(Message(room="r", author="a", text="hello"))
@mutation(internal=True)
async def add_user(ctx, subject: str) -> None: await ctx.db.insert(User(subject=subject, role="moderator"))
"""
    async with open_app(tmp_path, functions, schema=SCHEMA) as app:
        await app.engine.mutation("m:setup")
        subscriber = Subscriber(app.engine, ALICE)
        subscriber.ask(0, "m:texts")
        await subscriber.catch_up()
        failure = subscriber.results[0].failure
        assert failure is not None
        assert isinstance(failure.error, AppError)
        await app.engine.mutation("m:add_user", subject="alice")
        await subscriber.catch_up()
        assert subscriber.value() == ["hello"]


KEYED = """
from msgspec import Struct
from engine import Policy, policy
from schema import Item
JUDGED = []

class Viewer(Struct, frozen=True):
    tenant: str | None

@query(internal=True)
async def viewer(ctx) -> Viewer:
    identity = ctx.auth.identity()
    return Viewer(tenant=identity.claims.get("tenant") if identity else None)

@policy(Item, viewer=viewer)
class ItemPolicy(Policy[Viewer]):
    def read(self, item):
        JUDGED.append(item)
        return {rule}

@query
async def count(ctx, tenant: str) -> int: return await ctx.db.query(Item.by_tenant, tenant=tenant).count()
@query
async def taken(ctx, tenant: str) -> list[int]: return [
    i.n for i in await ctx.db.query(Item.by_tenant, tenant=tenant).take(99)]
@query
async def total(ctx, tenant: str) -> int: return (await ctx.db.total(Item.{total}, tenant=tenant)).count
@mutation(internal=True)
async def fill(ctx, tenant: str, count: int = 50) -> None:
    for n in range(count): await ctx.db.insert(Item(tenant=tenant, n=n))
@mutation(internal=True)
async def touch(ctx, n: int) -> None:
    for item in await ctx.db.query(Item).filter(lambda i: i.n == n).collect(): await ctx.db.patch(item.id, note="x")
@query(internal=True)
async def judged(ctx) -> int: return len(JUDGED)
"""
KEYED_SCHEMA = """
from engine import Table, aggregate, index

class Item(Table, name="items"):
    tenant: str
    n: int
    note: str = ""
    by_tenant = index("tenant")
    in_tenant = aggregate("tenant")
    for_all = aggregate("tenant", "note", public=True)
"""


async def test_a_policy_that_looks_at_the_key_alone_is_asked_once_for_a_range(tmp_path: Path) -> None:
    functions = KEYED.format(rule="item.tenant == self.viewer.tenant", total="in_tenant")
    async with open_app(tmp_path, functions, schema=KEYED_SCHEMA) as app:
        for tenant in "ab":
            await app.engine.mutation("m:fill", tenant=tenant)
        for path, all_of_it in (("m:count", 50), ("m:taken", list(range(50))), ("m:total", 50)):
            before = await app.engine.query("m:judged")
            assert await app.engine.query(path, tenant="a", identity=person("alice", tenant="a")) == all_of_it
            assert await app.engine.query("m:judged") == before + 1
        for path, nothing in (("m:count", 0), ("m:taken", [])):
            assert await app.engine.query(path, tenant="b", identity=person("alice", tenant="a")) == nothing
        with pytest.raises(FunctionMisuse, match="public=True"):
            await app.engine.query("m:total", tenant="b", identity=person("alice", tenant="a"))


async def test_a_count_under_such_a_policy_depends_on_the_total_alone(tmp_path: Path) -> None:
    functions = KEYED.format(rule="item.tenant == self.viewer.tenant", total="in_tenant")
    async with open_app(tmp_path, functions, schema=KEYED_SCHEMA) as app:
        await app.engine.mutation("m:fill", tenant="a")
        async with app.watched("m:count", tenant="a", identity=person("alice", tenant="a")):
            await app.engine.mutation("m:touch", n=7)
            await app.idle()
            assert app.run_count("m:count") == 0
            await app.engine.mutation("m:fill", tenant="a", count=1)
            await app.idle()
            assert app.run_count("m:count") == 1


@pytest.mark.parametrize(
    "rule",
    [
        "item.tenant == self.viewer.tenant and item.n < 25",
        "isinstance(item, Item) and item.n < 25",
        "item in [i for i in [item] if i.n < 25]",
        "{item: item.n < 25}[item]",
        "any(value == 24 or item.n < 24 for value in [item.n])",
    ],
)
async def test_a_policy_that_looks_further_judges_each_document(tmp_path: Path, rule: str) -> None:
    functions = KEYED.format(rule=rule, total="in_tenant")
    async with open_app(tmp_path, functions, schema=KEYED_SCHEMA) as app:
        await app.engine.mutation("m:fill", tenant="a")
        alice = person("alice", tenant="a")
        assert await app.engine.query("m:count", tenant="a", identity=alice) == 25
        assert await app.engine.query("m:taken", tenant="a", identity=alice) == list(range(25))
        with pytest.raises(FunctionMisuse, match="public=True"):
            await app.engine.query("m:total", tenant="a", identity=alice)


async def test_a_public_total_is_for_everybody(tmp_path: Path) -> None:
    functions = KEYED.format(rule="item.n < 25", total='for_all, note=""')
    async with open_app(tmp_path, functions, schema=KEYED_SCHEMA) as app:
        await app.engine.mutation("m:fill", tenant="a")
        assert await app.engine.query("m:total", tenant="a") == 50
