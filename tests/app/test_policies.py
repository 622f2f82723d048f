"""Who may see and change which row, whatever the function: here functions that would let everybody do everything."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.auth.development import DEVELOPMENT_ISSUER
from engine.errors import AppError, DocumentNotFound, Forbidden, FunctionNotFound
from engine.testing import Client, ManualClock, TestEngine, open_test_engine
from tests.app.demo_app import Demo

ROOT = Path(__file__).parents[2]
OPEN_TO_ALL = """
from typing import Any
from engine import AppError, MutationCtx, QueryCtx, mutation, query
from schema import ChatMessage, User, WatchProgress

TABLES = {table.__name__: table for table in (User, WatchProgress, ChatMessage)}

@query
async def ids(ctx: QueryCtx, table: str) -> list[str]:
    return [document.id for document in await ctx.db.query(TABLES[table]).collect()]

@query
async def is_there(ctx: QueryCtx, id: str) -> bool:
    return await ctx.db.get(id) is not None

@mutation
async def insert(ctx: MutationCtx, table: str, fields: dict[str, Any]) -> str:
    return await ctx.db.insert(TABLES[table](**fields))

@mutation
async def patch(ctx: MutationCtx, id: str, fields: dict[str, Any]) -> None:
    await ctx.db.patch(id, **fields)

@mutation
async def delete(ctx: MutationCtx, id: str) -> None:
    await ctx.db.delete(id)

@mutation
async def attempt(ctx: MutationCtx, path: str, arguments: dict[str, Any]) -> None:
    await ctx.run_mutation(path, **arguments)
    raise AppError("allowed, and undone")

@mutation(internal=True)
async def put(ctx: MutationCtx, table: str, fields: dict[str, Any]) -> str:
    return await insert(ctx, table, fields)
"""
CALLERS = ("guest", "zoe", "tomas", "aiko", "sam", "maya")  # zoe has signed in and is not stored, sam moderates
OWNER, ADMIN, MODERATORS, STORED = {"tomas"}, {"maya"}, {"sam", "maya"}, {"tomas", "aiko", "sam", "maya"}


class World:
    """What there is to see and to change: all of it tomas's."""

    def __init__(self, engine: TestEngine, demo: Demo, users: dict[str, str]) -> None:
        self.engine, self.demo, self.users = engine, demo, users  # ids of users by subject
        self.clients = {
            subject: engine.as_user() if subject == "guest" else engine.as_user(subject) for subject in CALLERS
        }

    def fields_of(self, row: str, subject: str) -> tuple[str, dict[str, Any]]:
        """The table and the fields of a new row of this kind that belongs to somebody."""
        user_id = self.users.get(subject, "")
        match row:
            case "user":
                return "User", {"token_identifier": f"{DEVELOPMENT_ISSUER}|{subject}", "name": subject}
            case "progress":
                numbers = dict.fromkeys(("position_seconds", "completion_percentage", "last_watched_at"), 1.0)
                content_id = self.demo.contents[0].id
                more = {"user_id": user_id, "content_id": content_id, "duration_seconds": 100.0, "completed": False}
                return "WatchProgress", numbers | more
            case _:
                fields = {"game_id": self.demo.quiet_game, "user_id": user_id, "message": "hi", "user_name": subject}
                return "ChatMessage", {**fields, "status": row, "created_at": 1.0}

    async def stored(self, row: str) -> str:
        """The id of tomas's row of this kind."""
        if row == "user":
            return self.users["tomas"]
        table, fields = self.fields_of(row, "tomas")
        return str(await self.engine.mutation("open_to_all:put", table=table, fields=fields))

    async def who(self, path: str, **arguments: Any) -> set[str]:
        """Who may do that; to everybody else it is Forbidden, or what it is about is not there."""
        allowed = set()
        for subject, client in self.clients.items():
            with pytest.raises((AppError, Forbidden, DocumentNotFound)) as ended:
                await client.mutation("open_to_all:attempt", path=path, arguments=arguments)
            if ended.type is AppError:
                allowed.add(subject)
        return allowed


@pytest.fixture(scope="module")
def open_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo app, and functions that leave everything to its policies."""
    directory = tmp_path_factory.mktemp("open_app")
    shutil.copy(ROOT / "schema.py", directory)
    shutil.copytree(ROOT / "functions", directory / "functions", ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "functions" / "open_to_all.py").write_text(OPEN_TO_ALL)
    return directory


@pytest.fixture
async def engine(open_app: Path, clock: ManualClock) -> AsyncIterator[TestEngine]:
    async with open_test_engine(open_app, clock=clock) as engine:
        yield engine


@pytest.fixture
async def world(engine: TestEngine, demo: Demo) -> World:
    users = {subject: (await engine.as_user(subject).query("users:me")).id for subject in STORED}
    return World(engine, demo, users)


# -- reading


@pytest.mark.parametrize(
    ("row", "readers"),
    [
        ("user", OWNER | ADMIN),
        ("progress", OWNER | ADMIN),
        ("active", set(CALLERS)),
        ("hidden", MODERATORS),
        ("deleted", MODERATORS),
    ],
)
async def test_a_row_is_there_for_those_who_may_read_it_only(world: World, row: str, readers: set[str]) -> None:
    row_id = await world.stored(row)
    table, _ = world.fields_of(row, "tomas")
    for subject, client in world.clients.items():
        may_read = subject in readers
        assert await client.query("open_to_all:is_there", id=row_id) is may_read, subject
        assert (row_id in await client.query("open_to_all:ids", table=table)) is may_read, subject


# -- inserting


@pytest.mark.parametrize("row", ["progress", "active", "hidden"])
async def test_nobody_but_an_admin_adds_a_row_for_somebody_else_and_nobody_speaks_for_others(
    world: World, row: str
) -> None:
    for subject in STORED:
        table, fields = world.fields_of(row, subject)
        others = ADMIN if row == "progress" else set()
        assert await world.who("open_to_all:insert", table=table, fields=fields) == {subject} | others


async def test_a_user_is_added_by_its_own_token_only_and_without_any_role(world: World) -> None:
    table, fields = world.fields_of("user", "zoe")
    assert await world.who("open_to_all:insert", table=table, fields=fields) == {"zoe"}
    for more in ({"role": "admin"}, {"permissions": ["write:chat"]}):
        assert await world.who("open_to_all:insert", table=table, fields=fields | more) == set()


# -- updating


@pytest.mark.parametrize(
    ("row", "changes", "allowed"),
    [
        ("user", {"name": "Tom"}, OWNER),
        ("user", {"role": "admin"}, set()),
        ("user", {"permissions": ["write:chat"]}, set()),
        ("user", {"token_identifier": "https://elsewhere.example|tomas"}, set()),
        ("progress", {"position_seconds": 2.0}, OWNER | ADMIN),
        ("progress", {"user_id": "aiko"}, set()),
        ("active", {"status": "hidden"}, MODERATORS),
        ("deleted", {"status": "active"}, MODERATORS),
        ("active", {"message": "what others shall believe that tomas said"}, set()),
        ("active", {"user_id": "aiko"}, set()),
        ("hidden", {"status": "active", "user_name": "Tom"}, set()),
    ],
)
async def test_a_row_is_changed_by_those_who_may_and_as_they_may(
    world: World, row: str, changes: dict[str, Any], allowed: set[str]
) -> None:
    row_id = await world.stored(row)
    if "user_id" in changes:
        changes = {"user_id": world.users[changes["user_id"]]}
    assert await world.who("open_to_all:patch", id=row_id, fields=changes) == allowed


# -- deleting


@pytest.mark.parametrize(
    ("row", "allowed"),
    [
        ("user", OWNER | ADMIN),
        ("progress", OWNER | ADMIN),
        ("active", set()),
        ("hidden", set()),
    ],
)
async def test_a_row_is_deleted_by_those_who_may_only(world: World, row: str, allowed: set[str]) -> None:
    assert await world.who("open_to_all:delete", id=await world.stored(row)) == allowed


# -- beside the rules of each table


async def test_a_refusal_names_operation_and_table(world: World) -> None:
    tomas, maya = world.clients["tomas"], world.clients["maya"]
    user, message = await world.stored("user"), await world.stored("active")
    table, progress_of_aiko = world.fields_of("progress", "aiko")
    for client, path, arguments, named in (
        (tomas, "insert", {"table": table, "fields": progress_of_aiko}, "insert user_watch_progress"),
        (tomas, "patch", {"id": user, "fields": {"role": "admin"}}, "update users"),
        (maya, "delete", {"id": message}, "delete live_chat_messages"),
    ):
        with pytest.raises(Forbidden, match=f"^{named}: its policy, "):
            await client.mutation(f"open_to_all:{path}", **arguments)


async def test_a_role_counts_from_its_commit_on(world: World, engine: TestEngine) -> None:
    progress, hidden = await world.stored("progress"), await world.stored("hidden")
    aiko = world.clients["aiko"]
    for role, permissions, sees_progress, sees_hidden in (
        ("user", ["write:chat"], False, True),
        ("admin", [], True, True),
        ("user", [], False, False),
    ):
        token_identifier = f"{DEVELOPMENT_ISSUER}|aiko"
        await engine.mutation(
            "users:set_role", token_identifier=token_identifier, role=role, permissions=list(permissions)
        )
        seen = [await aiko.query("open_to_all:is_there", id=row_id) for row_id in (progress, hidden)]
        assert seen == [sees_progress, sees_hidden]


async def test_what_no_policy_guards_is_written_by_no_function_that_clients_can_call(
    demo: Demo, maya: Client, tomas: Client
) -> None:
    for path, arguments in (
        ("games:delete", {"game_id": demo.live_game}),
        ("content:delete", {"content_id": demo.contents[0].id}),
        ("presence:expire_sessions", {}),
        ("demo:seed", {}),
        ("users:set_role", {"token_identifier": f"{DEVELOPMENT_ISSUER}|tomas", "role": "admin"}),
    ):
        for client in (tomas, maya):
            with pytest.raises(FunctionNotFound):
                await client.mutation(path, **arguments)
