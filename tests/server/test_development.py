"""`POST /dev/token` over a real socket."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from engine.auth.development import DevelopmentIssuer
from engine.auth.tokens import TokenVerifier
from engine.events import Cause, Events, Reran
from engine.observe.pushes import PushTrace
from engine.server.development import development_routes
from engine.testing import ManualClock


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
async def address(issuer: DevelopmentIssuer, events: Events) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes(development_routes(issuer, PushTrace(events)))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
def issuer(tmp_path: Path) -> DevelopmentIssuer:
    return DevelopmentIssuer.open(tmp_path / "engine.db", ManualClock())


async def ask(address: str, **options: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as client, client.post(f"{address}/dev/token", **options) as response:
        return response.status, await response.json()


async def test_this_machine_gets_a_token_that_is_good(address: str, issuer: DevelopmentIssuer) -> None:
    status, body = await ask(address, json={"subject": "alice", "claims": {"role": "admin"}})
    assert status == 200
    verified = await TokenVerifier([issuer.provider], ManualClock()).verify(body["token"])
    assert verified.identity is not None
    assert (verified.identity.subject, verified.identity.claims["role"]) == ("alice", "admin")


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"json": {"subject": ""}}, 400, "InvalidArgument"),
        ({"json": {"name": "Alice"}}, 400, "InvalidArgument"),
        ({"data": '{"subject": "alice"}', "headers": {"Content-Type": "text/plain"}}, 400, "InvalidArgument"),
        ({"json": {"subject": "alice"}, "headers": {"Origin": "https://evil.example"}}, 403, "Forbidden"),
        ({"json": {"subject": "alice"}, "headers": {"Host": "evil.example"}}, 403, "Forbidden"),
        ({"json": {"subject": "alice"}, "headers": {"X-Forwarded-For": "127.0.0.1"}}, 403, "Forbidden"),
    ],
)
async def test_what_is_wrong_or_from_elsewhere_gets_none(
    address: str, options: dict[str, Any], status: int, code: str
) -> None:
    answered, body = await ask(address, **options)
    assert (answered, body["code"]) == (status, code)
    assert "token" not in body


async def test_why_queries_ran_again_can_be_asked_from_this_machine(address: str, events: Events) -> None:
    events.emit(Reran("chat:list", b'{"room": "r"}', Cause(5, "chat:send", "messages/x", "keys of messages"), True))
    async with aiohttp.ClientSession() as session, session.get(f"{address}/dev/pushes") as response:
        assert await response.json() == [
            {
                "query": "chat:list",
                "arguments": {"room": "r"},
                "isChanged": True,
                "ts": 5,
                "function": "chat:send",
                "write": "messages/x",
                "read": "keys of messages",
            }
        ]
    async with aiohttp.ClientSession() as session:
        headers = {"Origin": "https://elsewhere.example", "Host": "elsewhere.example"}
        async with session.get(f"{address}/dev/pushes", headers=headers) as response:
            assert response.status == 403
