"""`engine explain`, and why each push was sent."""

from pathlib import Path

from engine.events import Reran
from engine.observe.explain import Explanation, text_of
from engine.observe.pushes import PushTrace
from engine.observe.pushes import text_of as push_text_of
from tests.functions.apps import OpenApp, open_app
from tests.small_engine import Subscriber, person

SCHEMA = """
from engine import Table, aggregate, index, search_index, unique

class User(Table, name="users"):
    subject: str
    by_subject = unique("subject")

class Message(Table, name="messages"):
    room: str
    at: float = 0.0
    text: str = ""
    by_room = index("room", "at")
    in_room = aggregate("room")
    words = search_index("text", filter=("room",))
"""

FUNCTIONS = """
from schema import Message, User

@query
async def newest(ctx, room: str, n: int = 2) -> list[Message]:
    return await ctx.db.query(Message.by_room, room=room).order("desc").filter(lambda m: m.text != "skip").take(n)
@query
async def total(ctx, room: str) -> int: return (await ctx.db.total(Message.in_room, room=room)).count
@query
async def keys(ctx, room: str) -> int: return await ctx.db.query(Message.by_room, room=room, gte=5).count()
@query
async def fresh(ctx, room: str) -> int:
    return await ctx.db.query(Message.by_room, room=room, gte=ctx.ago(minutes=1)).count()
@query
async def find(ctx, room: str) -> list[Message]:
    return await ctx.db.search(Message.words, "hello wor", room=room).take(9)
@query(internal=True)
async def name(ctx) -> str | None:
    identity = ctx.auth.identity()
    return identity.subject if identity else None
@query
async def mine(ctx, room: str) -> str | None: return await ctx.run_query(name)
@query
async def whose(ctx) -> str | None: return ctx.auth.identity().claims.get("tenant")
@query
async def get(ctx, id: Id[Message]) -> Message | None: return await ctx.db.get(id)
@query
async def far(ctx) -> None: ctx.rerun_at(1e300)
@query
async def fails(ctx) -> None: raise AppError("no")
@mutation
async def send(ctx, room: str, text: str = "", at: float | None = None) -> Id[Message]:
    return await ctx.db.insert(Message(room=room, text=text, at=ctx.now if at is None else at))
@mutation
async def edit(ctx, id: Id[Message], text: str) -> None: await ctx.db.patch(id, text=text)
"""


async def explain(
    app: OpenApp, path: str, arguments: bytes = b'{"room":"r"}', subject: str | None = None
) -> Explanation:
    identity = None if subject is None else person(subject, tenant="red")
    return await app.engine.backend.explain(path, arguments, identity)


async def test_an_explanation_says_what_was_read_and_what_came_of_it(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        for number in range(5):
            await app.engine.mutation("m:send", room="r", text="skip" if number == 4 else "", at=float(number))
        told = await explain(app, "m:newest")
        assert (told.documents_read, told.documents_returned) == (5, 2)
        assert told.reads[0].startswith("documents of messages.by_room: room='r', from at 2.0, creation ")
        assert told.bytes_read > 0
        assert told.result_bytes > 0
        assert told.shared_by == []
        assert told.failure is None


async def test_each_kind_of_read_is_named(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        id = await app.engine.mutation("m:send", room="r", text="hello world")
        assert (await explain(app, "m:total")).reads == ["the count of messages.in_room: 'r'"]
        assert (await explain(app, "m:keys")).reads == ["keys of messages.by_room: room='r', from at 5.0"]
        assert (await explain(app, "m:find")).reads == ["matches of messages.words: hello wor…, room='r'"]
        assert (await explain(app, "m:get", b'{"id":"%b"}' % id.encode())).reads == [f"the document messages/{id}"]
        told = await explain(app, "m:fresh")
        assert told.rerun_at_ms is not None
        assert told.rerun_at_ms > app.clock.wall_ns() / 1e6 + 59_000
        assert "or at 2026-10-01T00:01:00" in text_of(told)


async def test_who_shares_is_told_by_what_was_asked_of_who_asks(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        assert (await explain(app, "m:mine", subject="alice")).shared_by == ["what m:name returns"]
        told = await explain(app, "m:whose", b"{}", "alice")
        assert told.shared_by == ["present = True", "claims.tenant = 'red'"]
        assert "by callers with the same\n              present = True" in text_of(told)
        assert "shared    by all" in text_of(await explain(app, "m:total"))


async def test_a_failure_is_told(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        told = await explain(app, "m:fails", b"{}")
        assert told.failure is not None
        assert "AppError" in text_of(told)


async def test_each_push_is_traced_to_commit_function_document_and_read(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        printed: list[Reran] = []
        trace = PushTrace(app.engine.events, printed.append)
        subscriber = Subscriber(app.engine, None)
        for number, path in enumerate(("m:newest", "m:total", "m:find", "m:fresh")):
            subscriber.ask(number, path, room="r")
        subscriber.ask(9, "m:total", room="elsewhere")
        await subscriber.catch_up()
        assert printed == [], "a first run has no cause"

        id = await app.engine.mutation("m:send", room="r", text="hello world")
        ts = app.engine.backend.published_ts()
        pushes = {push.path: push for push in printed}
        assert pushes.keys() == {"m:newest", "m:total", "m:find", "m:fresh"}
        for push in pushes.values():
            assert (push.cause.ts, push.cause.function, push.cause.write) == (ts, "m:send", f"messages/{id}")
            assert push.is_changed
        assert pushes["m:total"].cause.read == "the count of messages.in_room: 'r'"
        assert pushes["m:find"].cause.read == "matches of messages.words: hello wor…, room='r'"
        assert push_text_of(pushes["m:total"]) == (
            f'push m:total {{"room": "r"}} <- commit {ts}: m:send wrote messages/{id}, in the count of '
            "messages.in_room: 'r'"
        )

        printed.clear()
        await app.turn(61)
        (push,) = printed
        assert (push.path, push.cause.write, push.cause.read) == ("m:fresh", "", "a moment that it declared has come")
        assert list(trace.pushes)[-1] is push

        printed.clear()
        await app.engine.mutation("m:send", room="r", text="skip", at=-1.0)
        told = {(push.path, push.is_changed) for push in printed}
        assert told == {("m:newest", False), ("m:total", True)}, "a run that changed nothing is told as such"


async def test_a_push_to_one_who_sees_something_else_now_is_traced_too(tmp_path: Path) -> None:
    functions = """
from engine import Policy, policy
from schema import Message, User
@query(internal=True)
async def is_user(ctx) -> bool:
    identity = ctx.auth.identity()
    return identity is not None and await ctx.db.query(User.by_subject, subject=identity.subject).unique() is not None
@policy(Message, viewer=is_user)
class MessagePolicy(Policy[bool]):
    def read(self, message): return self.viewer
@query
async def texts(ctx) -> list[str]: return [message.text async for message in ctx.db.query(Message)]
@mutation(internal=True)
async def send(ctx, text: str) -> None: await ctx.db.insert(Message(room="r", text=text))
@mutation(internal=True)
async def add(ctx, subject: str) -> Id[User]: return await ctx.db.insert(User(subject=subject))
"""
    async with open_app(tmp_path, functions, schema=SCHEMA) as app:
        await app.engine.mutation("m:send", text="hello")
        printed: list[Reran] = []
        PushTrace(app.engine.events, printed.append)
        subscriber = Subscriber(app.engine, person("alice"))
        subscriber.ask(0, "m:texts")
        await subscriber.catch_up()
        assert subscriber.value() == []
        id = await app.engine.mutation("m:add", subject="alice")
        await subscriber.catch_up()
        assert subscriber.value() == ["hello"]
        assert [(push.path, push.arguments, push.cause.write) for push in printed] == [
            ("m:is_user", b"{}", f"users/{id}"),
            ("m:texts", b"{}", f"users/{id}"),
        ]
        assert printed[1].cause.read.endswith("; so m:is_user returned something else")


async def test_nobody_who_traces_means_no_reasons_are_looked_for(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app, app.watched("m:total", room="r"):
        await app.engine.mutation("m:send", room="r")
        await app.idle()
        assert app.run_count("m:total") == 1
        assert not any(isinstance(event, Reran) for event in app.events)


async def test_a_moment_that_no_calendar_has_is_told_as_a_number(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        assert "or at 1e+300 ms since the epoch" in text_of(await explain(app, "m:far", b"{}"))
