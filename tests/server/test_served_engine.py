"""The whole way, socket to disk and back: a real engine behind the doors."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from engine.auth.providers import AuthProvider, SharedSecret
from engine.engine import Engine
from engine.events import Event, QueryRan
from engine.server.app import serving
from engine.testing import ManualClock
from tests.server.fakes import Served, SocketClient
from tests.sync.fakes import action, add, authenticate, connect, mutation, query_set, remove, types

SCHEMA = """
from engine import Table, index

class Note(Table, name="notes"):
    board: str
    text: str
    by_board = index("board")
"""

NOTES = """
from engine import ActionCtx, AppError, MutationCtx, QueryCtx, action, mutation, query
from schema import Note

@query
async def texts(ctx: QueryCtx, board: str) -> list[str]:
    return [note.text for note in await ctx.db.query(Note.by_board, board=board).collect()]

@query
async def whoami(ctx: QueryCtx) -> str | None:
    identity = ctx.auth.identity()
    return None if identity is None else identity.subject

@mutation
async def write(ctx: MutationCtx, board: str, text: str) -> int:
    if not text:
        raise AppError({"code": "EMPTY"})
    await ctx.db.insert(Note(board=board, text=text))
    return len(text)

@mutation
async def look(ctx: MutationCtx) -> int:
    return await ctx.db.query(Note).count()

@mutation(internal=True)
async def clear(ctx: MutationCtx) -> None:
    for note in await ctx.db.query(Note).collect():
        await ctx.db.delete(note.id)

@action
async def relay(ctx: ActionCtx, board: str, text: str) -> int:
    return await ctx.run_mutation(write, board=board, text=text)
"""

SECRET = b"a secret that is used in tests only"
PROVIDER = AuthProvider(
    issuer="https://login.test", audiences=("app",), keys=SharedSecret(SECRET), algorithms=("HS256",)
)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    directory = tmp_path / "app"
    (directory / "functions").mkdir(parents=True)
    (directory / "schema.py").write_text(SCHEMA)
    (directory / "functions" / "notes.py").write_text(NOTES)
    return directory


class Running:
    """An engine, the server before it, and what ran."""

    def __init__(self, engine: Engine, server: Served, clock: ManualClock) -> None:
        self.engine, self.server, self.clock = engine, server, clock
        self.events: list[Event] = []
        engine.events.listen(self.events.append)

    def token(self, subject: str, *, seconds: float = 3_600) -> str:
        now = self.clock.wall_ns() / 1e9
        claims = {"iss": "https://login.test", "aud": "app", "sub": subject, "iat": now, "exp": now + seconds}
        return jwt.encode(claims, SECRET, algorithm="HS256")


@asynccontextmanager
async def run(app: Path, clock: ManualClock | None = None) -> AsyncIterator[Running]:
    clock = clock or ManualClock()
    async with (
        Engine.open(app, app.parent / "engine.db", clock=clock, providers=(PROVIDER,)) as engine,
        serving(engine, "127.0.0.1", 0) as address,
        aiohttp.ClientSession() as session,
    ):
        yield Running(engine, Served(address, session), clock)


@pytest.fixture
async def running(app: Path) -> AsyncIterator[Running]:
    async with run(app) as running:
        yield running


def write(request_id: int, text: str, *, board: str = "b") -> dict[str, Any]:
    return mutation(request_id, "notes:write", {"board": board, "text": text})


def texts(query_id: int, board: str = "b") -> dict[str, Any]:
    return add(query_id, "notes:texts", {"board": board})


async def hear(sync: SocketClient, count: int) -> list[dict[str, Any]]:
    return [await sync.hear() for _ in range(count)]


def value_of(transition: dict[str, Any], query_id: int = 0) -> Any:
    by_id = {modification["queryId"]: modification for modification in transition["modifications"]}
    return by_id[query_id]["value"]


async def test_two_clients_see_each_others_writes(running: Running) -> None:
    async with running.server.connected() as alice, running.server.connected("/api/sync") as bob:
        for sync in (alice, bob):
            await sync.say(connect(), query_set(0, texts(0)))
            assert value_of(await sync.hear()) == []
        await alice.say(write(0, "hi"))
        response, transition = await hear(alice, 2)
        assert (response["result"], value_of(transition)) == (2, ["hi"])
        assert transition["endVersion"]["ts"] == response["ts"]
        assert value_of(await bob.hear()) == ["hi"]


async def test_a_result_is_run_once_for_all_who_ask_it(running: Running) -> None:
    async with running.server.connected() as first, running.server.connected() as second:
        for sync in (first, second):
            await sync.say(connect(), query_set(0, texts(0), texts(1)))
            await sync.hear()
        await first.say(write(0, "x"))
        await hear(first, 2)
        await second.hear()
        await first.say(write(1, "y", board="elsewhere"))
        assert types(await hear(first, 2)) == ["MutationResponse", "Transition"]
    assert [event.path for event in running.events if isinstance(event, QueryRan)] == ["notes:texts"] * 2


async def test_a_mutation_that_comes_again_is_answered_and_not_applied(app: Path) -> None:
    clock = ManualClock()
    async with run(app, clock) as running, running.server.connected() as sync:
        await sync.say(connect(), query_set(0), write(7, "once"))
        _, response, _ = await hear(sync, 3)
    async with run(app, clock) as restarted, restarted.server.connected() as sync:
        observed = response["ts"]
        await sync.say(
            connect(connectionCount=1, maxObservedTimestamp=observed), query_set(0, texts(0)), write(7, "once")
        )
        again, transition = await hear(sync, 2)
        assert again == response
        assert value_of(transition) == ["once"]


async def test_a_request_id_of_somebody_else_is_refused(running: Running) -> None:
    async with running.server.connected() as sync:
        await sync.say(connect(), query_set(0), write(7, "mine"))
        await hear(sync, 3)
    async with running.server.connected() as sync:
        await sync.say(connect(), query_set(0, texts(0)), write(7, "theirs"))
        transition, response = await hear(sync, 2)
        assert (value_of(transition), response["success"]) == (["mine"], False)
        assert "RequestIdReused" in response["result"]


async def test_what_a_mutation_only_read_is_answered_with_a_timestamp_and_a_transition(running: Running) -> None:
    async with running.server.connected() as sync:
        await sync.say(connect(), query_set(0))
        await sync.hear()
        await sync.say(mutation(0, "notes:look"))
        response, transition = await hear(sync, 2)
        assert response["result"] == 0
        assert transition["endVersion"]["ts"] == response["ts"]


async def test_errors_of_functions_and_arguments_are_answered_per_request(running: Running) -> None:
    async with running.server.connected() as sync:
        await sync.say(connect(), query_set(0, add(0, "notes:texts", {"bord": "b"}), add(1, "no:such")))
        (transition,) = await hear(sync, 1)
        assert types(transition["modifications"]) == ["QueryFailed", "QueryFailed"]
        assert all("errorData" not in modification for modification in transition["modifications"])
        await sync.say(write(0, ""), mutation(1, "notes:clear"), action(2, "notes:write"))
        heard = [message for message in await hear(sync, 4) if message["type"] != "Transition"]
        assert [message["success"] for message in heard] == [False] * 3
        by_id = {message["requestId"]: message for message in heard}
        assert by_id[0]["errorData"] == {"code": "EMPTY"}
        assert "Could not find public mutation function for 'notes:clear'" in by_id[1]["result"]
        assert "Could not find public action function for 'notes:write'" in by_id[2]["result"]


async def test_an_action_writes_and_its_subscriber_sees_it(running: Running) -> None:
    async with running.server.connected() as sync:
        await sync.say(connect(), query_set(0, texts(0)))
        await sync.hear()
        await sync.say({**action(0, "notes:relay"), "args": [{"board": "b", "text": "sent"}]})
        heard = await hear(sync, 2)
        assert sorted(types(heard)) == ["ActionResponse", "Transition"]


async def test_whoever_signs_in_and_out_is_who_asks(running: Running) -> None:
    async with running.server.connected() as sync:
        await sync.say(connect(), authenticate(0, running.token("alice")), query_set(0, add(0, "notes:whoami")))
        assert value_of(await sync.hear()) == "alice"
        await sync.say(authenticate(1, running.token("bob")))
        assert value_of(await sync.hear()) == "bob"
        await sync.say(authenticate(2, None))
        assert value_of(await sync.hear()) is None


async def test_an_identity_ends_with_its_token(running: Running) -> None:
    async with running.server.connected() as sync:
        await sync.say(connect(), authenticate(0, running.token("alice", seconds=60)), query_set(0))
        await sync.hear()
        running.clock.advance(120)  # thirty seconds are forgiven
        while (message := await sync.hear())["type"] == "Ping":
            pass
        assert (message["type"], message["authUpdateAttempted"], message["baseVersion"]) == ("AuthError", False, 1)
        assert await sync.closed() == (1000, "")


async def test_a_client_that_saw_more_than_there_is_is_sent_away(running: Running) -> None:
    async with running.server.connected() as sync:
        await sync.say(connect(maxObservedTimestamp="////////fwA="), query_set(0))
        assert await sync.closed() == (1011, "InternalServerError")


async def test_what_is_not_asked_any_more_is_not_run(running: Running) -> None:
    async with running.server.connected() as sync:
        await sync.say(connect(), query_set(0, texts(0)), query_set(1, remove(0)))
        await sync.hear()
        running.events.clear()
        await sync.say(write(0, "x"))
        await hear(sync, 2)
    assert [event for event in running.events if isinstance(event, QueryRan)] == []


async def test_http_asks_and_writes_what_subscribers_see(running: Running) -> None:
    server = running.server
    async with server.connected() as sync:
        await sync.say(connect(), query_set(0, texts(0)))
        await sync.hear()
        body = {"path": "notes:write", "args": {"board": "b", "text": "four"}, "format": "convex_encoded_json"}
        status, answer = await server.post("/api/mutation", body)
        assert (status, answer) == (200, {"status": "success", "value": 4.0, "logLines": []})
        assert value_of(await sync.hear()) == ["four"]
    _, answer = await server.post("/api/query", {"path": "notes:texts", "args": [{"board": "b"}]})
    assert answer["value"] == ["four"]
    _, answer = await server.post("/api/action", {"path": "notes:relay", "args": {"board": "b", "text": "x"}})
    assert answer["value"] == 1
    _, answer = await server.post("/api/mutation", {"path": "notes:write", "args": {"board": "b", "text": ""}})
    assert (answer["status"], answer["errorData"]) == ("error", {"code": "EMPTY"})


async def test_a_snapshot_stays_as_it_was(running: Running) -> None:
    server = running.server
    await server.post("/api/mutation", {"path": "notes:write", "args": {"board": "b", "text": "before"}})
    _, snapshot = await server.post("/api/query_ts", b"")
    await server.post("/api/mutation", {"path": "notes:write", "args": {"board": "b", "text": "after"}})
    _, answer = await server.post("/api/query_at_ts", {"path": "notes:texts", "args": {"board": "b"}, **snapshot})
    assert answer["value"] == ["before"]
    queries = [{"path": "notes:texts", "args": {"board": "b"}}, {"path": "notes:look"}]
    _, answer = await server.post("/api/query_batch", {"queries": queries})
    assert [result["status"] for result in answer["results"]] == ["success", "error"]
    assert answer["results"][0]["value"] == ["before", "after"]


async def test_http_knows_the_caller(running: Running) -> None:
    headers = {"Authorization": f"Bearer {running.token('alice')}"}
    _, answer = await running.server.post("/api/query", {"path": "notes:whoami", "args": {}}, headers=headers)
    assert answer["value"] == "alice"
    headers = {"Authorization": f"Bearer {running.token('alice', seconds=-60)}"}
    status, answer = await running.server.post("/api/query", {"path": "notes:whoami"}, headers=headers)
    assert (status, answer["code"]) == (401, "AuthenticationFailed")
