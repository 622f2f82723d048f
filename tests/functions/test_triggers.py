"""Triggers: told of every write, by whomever, in the same transaction; what they refuse is undone."""

from pathlib import Path
from textwrap import dedent
from typing import Any

import msgspec
import pytest

from engine.errors import AppError, ForeignKeyViolation, FunctionFailed, FunctionMisuse, LimitExceeded, RegistryError
from engine.events import FunctionFaulted
from engine.transaction.transaction import WriteTransaction
from tests.functions.apps import UNHURRIED, OpenApp, open_app
from tests.small_engine import person

SCHEMA = """
    from engine import *

    class Room(Table, name="rooms"):
        title: str = ""
        count: int = 0

    class Message(Table, name="messages"):
        room_id: Id[Room]
        text: str
        deleted_at: DeletedAt = None
        by_room = index("room_id")
        room = foreign_key("room_id", on_delete="cascade")

    class Told(Table, name="told"):
        what: str

    class Link(Table, name="links"):
        rest: int
"""

FUNCTIONS = """
    @mutation
    async def add_room(ctx) -> str:
        return await ctx.db.insert(Room())

    @mutation
    async def add(ctx, room: Id[Room], text: str = "a") -> str:
        return await ctx.db.insert(Message(room_id=room, text=text))

    @mutation
    async def edit(ctx, id: Id[Message], text: str) -> None:
        await ctx.db.patch(id, text=text)

    @mutation
    async def replace(ctx, id: Id[Message], text: str) -> None:
        message = await ctx.db.get(id)
        await ctx.db.replace(id, Message(room_id=message.room_id, text=text))

    @mutation
    async def delete(ctx, id: str) -> None:
        await ctx.db.delete(id)

    @mutation
    async def restore(ctx, id: str) -> None:
        await ctx.db.restore(id)

    @query
    async def told(ctx) -> list[str]:
        return [told.what async for told in ctx.db.query(Told)]

    @query
    async def count(ctx, room: Id[Room]) -> int:
        return (await ctx.db.get(room)).count
"""

TELLING = """
    @trigger(Message)
    async def tell(ctx: MutationCtx, change: Change[Message]) -> None:
        old, new = (document and document.text for document in (change.old, change.new))
        await ctx.db.insert(Told(what=f"{change.operation} {old} {new}"))

    @trigger(Message)
    async def keep_count(ctx: MutationCtx, change: Change[Message]) -> None:
        message = change.new or change.old
        room = await ctx.db.get(message.room_id)
        await ctx.db.patch(room.id, count=room.count + (change.old is None) - (change.new is None))
"""

REFUSING = """
    @trigger(Message)
    async def refuse(ctx: MutationCtx, change: Change[Message]) -> None:
        message = change.new or change.old
        await ctx.db.insert(Told(what="never kept"))
        if message.text == "app error":
            raise AppError({"code": "NO"})
        if message.text == "bug":
            raise ValueError("a bug")
"""


def code(*parts: str) -> str:
    """One module of these parts, each indented in its own way."""
    return "\n".join(map(dedent, parts))


async def told(app: OpenApp) -> list[str]:
    found: list[str] = await app.call("m:told")
    return found


# -- what they are told


async def test_each_change_is_told_with_the_old_and_the_new_document(tmp_path: Path) -> None:
    async with open_app(tmp_path, code(FUNCTIONS, TELLING), schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        message = await app.call("m:add", room=room)
        await app.call("m:edit", id=message, text="b")
        await app.call("m:edit", id=message, text="b")  # changes nothing
        await app.call("m:replace", id=message, text="c")
        await app.call("m:delete", id=message)
        await app.call("m:restore", id=message)
        assert await told(app) == ["insert None a", "patch a b", "replace b c", "delete c None", "insert None c"]
        assert await app.call("m:count", room=room) == 1
        await app.call("m:delete", id=room)
        assert (await told(app))[5:] == ["delete c None"]


async def test_several_triggers_of_a_table_run_in_the_order_of_their_paths_wherever_they_stand(tmp_path: Path) -> None:
    def telling(name: str) -> str:
        return f"""
            @trigger(Message)
            async def {name}(ctx, change) -> None:
                await ctx.db.insert(Told(what="{name}"))
        """

    modules = {
        "m": code(FUNCTIONS, telling("second")),
        "_helpers": telling("first"),
        "n": code("from functions._helpers import first", telling("fourth")),
        "deep/er/_er": telling("zero"),
        "z": telling("third"),
    }
    async with open_app(tmp_path, modules, schema=SCHEMA) as app:
        await app.call("m:add", room=await app.call("m:add_room"))
        assert await told(app) == ["first", "zero", "second", "fourth", "third"]


async def test_a_trigger_sees_the_write_and_its_effects_are_seen_at_once(tmp_path: Path) -> None:
    functions = """
        @trigger(Message)
        async def shout(ctx, change) -> None:
            if change.new is not None:
                assert await ctx.db.get(change.new.id) == change.new
                await ctx.db.patch(change.new.id, text=change.new.text.upper())

        @mutation
        async def add_and_read(ctx) -> list[str]:
            room = await ctx.db.insert(Room())
            for text in ("a", "b"):
                await ctx.db.insert(Message(room_id=room, text=text))
            return [message.text async for message in ctx.db.query(Message)]
    """
    async with open_app(tmp_path, functions, schema=SCHEMA) as app:
        assert await app.call("m:add_and_read") == ["A", "B"]


async def test_the_work_of_triggers_wakes_subscribers_in_the_same_commit(tmp_path: Path) -> None:
    async with open_app(tmp_path, code(FUNCTIONS, TELLING), schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        async with app.watched("m:told") as told, app.watched("m:count", room=room) as count:
            await app.call("m:add", room=room)
            assert (await anext(told), await anext(count)) == (["insert None a"], 1)


async def test_a_trigger_has_the_caller_and_the_time_of_its_run_and_no_policy_restricts_it(tmp_path: Path) -> None:
    functions = """
        @trigger(Message)
        async def tell(ctx, change) -> None:
            await ctx.db.insert(Told(what=f"{ctx.auth.identity().subject} {repr(ctx.now) == change.new.text}"))
            assert await ctx.db.query(Told).count() == 1
            ctx.log("told")
            await ctx.run_mutation(nested)
            await ctx.scheduler.run_after(0, nested)

        @mutation(internal=True)
        async def nested(ctx) -> None:
            await ctx.db.insert(Told(what=f"nested {ctx.auth.identity() is not None}"))

        @policy(Told)
        class Hidden(Policy[None]):
            pass

        @mutation
        async def add_now(ctx, room: Id[Room]) -> None:
            await ctx.db.insert(Message(room_id=room, text=repr(ctx.now)))

        @mutation
        async def try_itself(ctx) -> None:
            await ctx.db.insert(Told(what="itself"))
    """
    async with open_app(tmp_path, code(FUNCTIONS, functions), schema=SCHEMA) as app:
        ann = person("ann")
        room = await app.engine.mutation("m:add_room", identity=ann)
        outcome = await app.engine.backend.http_mutation("m:add_now", msgspec.json.encode({"room": room}), ann)
        assert outcome.failure is None
        assert outcome.log_lines == ("[LOG] told",)
        await app.turn(1)
        assert await app.engine.query("m:told", identity=ann) == []
        rows = app.engine.database.writer.fetch_all("SELECT what FROM told ORDER BY _creation")
        assert rows == [("ann True",), ("nested True",), ("nested False",)]
        assert (await app.failure("m:try_itself")).code == "Forbidden"


# -- who cannot go around them


async def test_nobody_writes_without_them(tmp_path: Path) -> None:
    functions = """
        @mutation(internal=True)
        async def add_text(ctx, room: Id[Room], text: str) -> None:
            await ctx.db.insert(Message(room_id=room, text=text))

        @mutation
        async def add_nested(ctx, room: Id[Room]) -> None:
            await ctx.run_mutation(add_text, room=room, text="nested")

        @mutation
        async def add_later(ctx, room: Id[Room]) -> None:
            await ctx.scheduler.run_after(0, add_text, room=room, text="job")

        @action
        async def add_from_outside(ctx, room: Id[Room]) -> None:
            await ctx.run_mutation(add_text, room=room, text="action")

        @cron(seconds=60)
        @mutation(internal=True)
        async def sweep(ctx) -> None:
            async for room in ctx.db.query(Room):
                await ctx.db.insert(Message(room_id=room.id, text="cron"))
    """
    async with open_app(tmp_path, code(FUNCTIONS, TELLING, functions), schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        for path in ("m:add_nested", "m:add_later", "m:add_from_outside"):
            await app.call(path, room=room)
            await app.turn(1)

        def write(transaction: WriteTransaction, now: float) -> None:
            message = app.engine._app.schema.tables_by_name["messages"].document_type
            transaction.insert(message(room_id=room, text="engine"))  # type: ignore[call-arg]

        await app.engine.backend.write(write)
        await app.turn(60)
        texts = ("nested", "job", "action", "engine", "cron")
        assert await told(app) == [f"insert None {text}" for text in texts]
        assert await app.call("m:count", room=room) == 5


async def test_a_write_of_the_engine_itself_that_a_trigger_refuses_fails_alone(tmp_path: Path) -> None:
    async with open_app(tmp_path, code(FUNCTIONS, REFUSING), schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        message = app.engine._app.schema.tables_by_name["messages"].document_type

        def writing(text: str) -> Any:
            def write(transaction: WriteTransaction, now: float) -> str:
                transaction.insert(message(room_id=room, text=text))  # type: ignore[call-arg]
                return "written"

            return write

        with pytest.raises(AppError) as refused:
            await app.engine.backend.write(writing("app error"))
        assert refused.value.data == {"code": "NO"}
        app.forget_events()
        with pytest.raises(FunctionFailed, match="m:refuse raised ValueError: a bug"):
            await app.engine.backend.write(writing("bug"))
        assert [event.path for event in app.events if isinstance(event, FunctionFaulted)] == ["m:refuse"]
        assert await told(app) == []
        assert await app.engine.backend.write(writing("fine")) == "written"
        assert not app.engine.failed.done()


@pytest.mark.slow
async def test_an_endless_trigger_is_stopped_where_the_engine_itself_writes(tmp_path: Path) -> None:
    functions = """
        @trigger(Message)
        async def hang(ctx, change) -> None:
            while True: pass
    """
    limits = msgspec.structs.replace(UNHURRIED, run_ms_max=100)
    async with open_app(tmp_path, code(FUNCTIONS, functions), schema=SCHEMA, limits=limits) as app:
        room = await app.call("m:add_room")
        message = app.engine._app.schema.tables_by_name["messages"].document_type
        with pytest.raises(LimitExceeded, match="run time in ms of m:hang"):
            await app.engine.backend.write(
                lambda transaction, now: transaction.insert(message(room_id=room, text="a"))  # type: ignore[call-arg]
            )
        assert (await app.failure("m:add", room=room)).code == "LimitExceeded"
        assert await app.call("m:count", room=room) == 0


# -- what they refuse


@pytest.mark.parametrize("text", ["app error", "bug"])
async def test_what_a_trigger_raises_is_what_the_write_raises_and_nothing_of_it_is_kept(
    tmp_path: Path, text: str
) -> None:
    functions = """
        @mutation
        async def add_anyway(ctx, room: Id[Room], text: str) -> str:
            await ctx.db.insert(Message(room_id=room, text="before"))
            try:
                await ctx.db.insert(Message(room_id=room, text=text))
            except (AppError, ValueError) as error:
                await ctx.db.insert(Message(room_id=room, text="after"))
                return f"{error}"

        @query
        async def texts(ctx) -> list[str]:
            return [message.text async for message in ctx.db.query(Message)]
    """
    async with open_app(tmp_path, code(FUNCTIONS, REFUSING, functions), schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        failure = await app.failure("m:add", room=room, text=text)
        assert failure.code == ("AppError" if text == "app error" else "FunctionFailed")
        assert "functions/m.py" in failure.message or text == "app error"
        assert await app.call("m:texts") == []
        expected = "{'code': 'NO'}" if text == "app error" else "a bug"
        assert await app.call("m:add_anyway", room=room, text=text) == expected
        assert await app.call("m:texts") == ["before", "after"]
        assert await told(app) == ["never kept"] * 2


async def test_a_cascade_that_a_trigger_refuses_is_undone_whole(tmp_path: Path) -> None:
    functions = """
        @trigger(Message)
        async def keep_one(ctx, change) -> None:
            if change.operation == "delete":
                await ctx.db.insert(Told(what=change.old.text))
                if change.old.text == "last":
                    raise AppError("keep one")

        @mutation
        async def try_delete(ctx, room: Id[Room]) -> str:
            try:
                await ctx.db.delete(room)
            except AppError as error:
                return error.data
    """
    async with open_app(tmp_path, code(FUNCTIONS, functions), schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        for text in ("last", "a", "b"):
            await app.call("m:add", room=room, text=text)
        async with app.watched("m:told"):
            assert await app.call("m:try_delete", room=room) == "keep one"
            await app.idle()
            assert app.run_count("m:told") == 0
        assert (await app.failure("m:delete", id=room)).code == "AppError"
        assert await told(app) == []
        assert await app.call("m:count", room=room) == 0  # it is there


async def test_a_nested_mutation_that_fails_takes_what_its_triggers_did_with_it(tmp_path: Path) -> None:
    functions = """
        @mutation
        async def add_and_fail(ctx, room: Id[Room]) -> None:
            await ctx.db.insert(Message(room_id=room, text="a"))
            raise AppError("no")

        @mutation
        async def outer(ctx, room: Id[Room]) -> None:
            try:
                await ctx.run_mutation(add_and_fail, room=room)
            except AppError:
                await ctx.db.insert(Message(room_id=room, text="b"))
    """
    async with open_app(tmp_path, code(FUNCTIONS, TELLING, functions), schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        await app.call("m:outer", room=room)
        assert await told(app) == ["insert None b"]
        assert await app.call("m:count", room=room) == 1


# -- chains

CHAIN = """
    @mutation
    async def start(ctx, rest: int) -> None:
        await ctx.db.insert(Link(rest=rest))

    @trigger(Link)
    async def continue_it(ctx, change) -> None:
        if change.new.rest:
            await ctx.db.insert(Link(rest=change.new.rest - 1))

    @query
    async def length(ctx) -> int:
        return await ctx.db.query(Link).count()
"""


async def test_triggers_set_off_triggers_up_to_a_bound_that_names_the_chain(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, trigger_depth_max=3)
    async with open_app(tmp_path, CHAIN, schema=SCHEMA, limits=limits) as app:
        await app.call("m:start", rest=2)
        assert await app.call("m:length") == 3
        for _ in range(2):  # a failure leaves no depth behind
            failure = await app.failure("m:start", rest=3)
            assert failure.code == "LimitExceeded"
            chain = " → ".join(["m:continue_it"] * 4)
            assert f"triggers that set off each other ({chain}): 4 used, 3 allowed" in failure.message
        await app.call("m:start", rest=2)
        assert await app.call("m:length") == 6


async def test_the_default_bound_lets_a_long_chain_through_and_stops_an_endless_one(tmp_path: Path) -> None:
    async with open_app(tmp_path, CHAIN, schema=SCHEMA) as app:
        await app.call("m:start", rest=15)
        assert (await app.failure("m:start", rest=10**6)).code == "LimitExceeded"
        assert await app.call("m:length") == 16


async def test_triggers_share_the_limits_of_the_run(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, write_document_count_max=3)
    async with open_app(tmp_path, CHAIN, schema=SCHEMA, limits=limits) as app:
        await app.call("m:start", rest=2)
        assert "limits.write_document_count_max" in (await app.failure("m:start", rest=3)).message


async def test_a_trigger_does_no_io(tmp_path: Path) -> None:
    functions = """
        @trigger(Message)
        async def wait(ctx, change) -> None:
            await asyncio.sleep(0)
    """
    async with open_app(tmp_path, code(FUNCTIONS, functions), schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        with pytest.raises(FunctionMisuse, match="m:wait: a trigger waited for"):
            await app.call("m:add", room=room)


async def test_a_trigger_cannot_break_a_foreign_key(tmp_path: Path) -> None:
    functions = """
        @trigger(Room)
        async def revive(ctx, change) -> None:
            if change.operation == "delete":
                await ctx.db.insert(Message(room_id=change.old.id, text="too late"))
    """
    async with open_app(tmp_path, code(FUNCTIONS, functions), schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        with pytest.raises(ForeignKeyViolation, match="there is no document"):
            await app.call("m:delete", id=room)
        assert await app.call("m:count", room=room) == 0


async def test_a_reload_swaps_triggers_with_the_functions(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        room = await app.call("m:add_room")
        await app.call("m:add", room=room)
        assert await told(app) == []
        await app.rewrite(code(FUNCTIONS, TELLING), schema=SCHEMA)
        await app.call("m:add", room=room)
        assert await told(app) == ["insert None a"]
        await app.rewrite(FUNCTIONS, schema=SCHEMA)
        await app.call("m:add", room=room)
        assert await told(app) == ["insert None a"]


# -- declaring


@pytest.mark.parametrize(
    ("functions", "told"),
    [
        (
            "from engine.functions.jobs import ScheduledJob\n@trigger(ScheduledJob)\nasync def t(ctx, change): ...",
            "m:t: _scheduled_jobs is the engine's own table; triggers are for the app's.",
        ),
        ("@trigger(Message)\ndef t(ctx, change): ...", "@trigger stands above an `async def …(ctx, change)`"),
        ("@trigger(Message)\nclass T: ...", "@trigger stands above an `async def …(ctx, change)`"),
        ("@trigger(Message)\nasync def t(ctx): ...", "m:t: a trigger is given the context and the change"),
        ("@trigger(Message)\nasync def t(ctx, a, b): ...", "m:t: a trigger is given the context and the change"),
        ("@trigger(Message)\nasync def t(ctx, *, change): ...", "m:t: a trigger is given the context and the change"),
        ("@trigger(Message)\n@trigger(Room)\nasync def t(ctx, change): ...", "stands above"),
    ],
)
async def test_what_cannot_be_a_trigger_is_refused(tmp_path: Path, functions: str, told: str) -> None:
    with pytest.raises(RegistryError) as refused:
        async with open_app(tmp_path, functions, schema=SCHEMA):
            pass
    assert told in str(refused.value)
