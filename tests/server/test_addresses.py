"""`[per_ip]`: off until it is set, never on this machine, exact for each client address."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_network
from typing import Any

import aiohttp
import pytest

from engine.config import Config
from engine.limits import PerIp
from tests.server.fakes import FakeEngine, Served, SocketClient, served
from tests.sync.fakes import authenticate, connect, query_set

LOOPBACK = (ip_network("127.0.0.0/8"),)  # as a proxy: it says who asks


def client(address: str) -> dict[str, str]:
    return {"X-Forwarded-For": address}


@asynccontextmanager
async def bounded(is_on: bool = True, **per_ip: Any) -> AsyncIterator[tuple[FakeEngine, Served]]:
    engine = FakeEngine(Config(per_ip=PerIp(**per_ip) if is_on else None, trusted_proxies=LOOPBACK))
    async with served(engine) as server:
        yield engine, server


async def refusal(server: Served, headers: dict[str, str]) -> int:
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await server.session.ws_connect(server.url("/api/sync"), headers=headers)
    return refused.value.status


async def query(server: Served, headers: dict[str, str], token: str | None = None) -> tuple[int, str]:
    """Status and code of a request."""
    if token is not None:
        headers = headers | {"Authorization": f"Bearer {token}"}
    async with server.session.post(server.url("/api/query"), json={"path": "m:q"}, headers=headers) as response:
        return response.status, (await response.json()).get("code", "")


async def test_an_address_has_so_many_connections_and_its_neighbour_as_many() -> None:
    async with bounded(connection_count_max=2) as (_, server), AsyncExitStack() as stack:
        for address in ("203.0.113.1", "203.0.113.2"):
            for _ in range(2):
                await stack.enter_async_context(server.connected(headers=client(address)))
            assert await refusal(server, client(address)) == 503


async def test_a_connection_that_ends_makes_room() -> None:
    async with bounded(connection_count_max=1) as (engine, server):
        for _ in range(3):
            async with server.connected(headers=client("203.0.113.1")):
                pass
            async with asyncio.timeout(10):
                while not all(view.is_closed for view in engine.backend.views):  # noqa: ASYNC110
                    await asyncio.sleep(0)


async def test_so_many_new_connections_a_second() -> None:
    async with bounded(connection_rate_per_second=3) as (engine, server), AsyncExitStack() as stack:
        for _ in range(2):
            for _ in range(3):
                await stack.enter_async_context(server.connected(headers=client("203.0.113.1")))
            assert await refusal(server, client("203.0.113.1")) == 429
            engine.clock.advance(1)


async def test_the_addresses_of_one_customer_count_together() -> None:
    async with bounded(connection_count_max=1) as (_, server), server.connected(headers=client("2001:db8:0:1::1")):
        assert await refusal(server, client("2001:db8:0:1:ffff::2")) == 503
        async with server.connected(headers=client("2001:db8:0:2::1")):
            pass


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_this_machine_is_never_bounded(address: str) -> None:
    strict = {"connection_count_max": 1, "connection_rate_per_second": 1, "authentication_failure_count_max": 1}
    async with bounded(**strict) as (_, server), AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(server.connected(headers=client(address)))
            assert await query(server, client(address), "bad") == (401, "AuthenticationFailed")


async def test_nobody_is_bounded_without_the_table() -> None:
    async with bounded(is_on=False) as (_, server):
        for _ in range(40):
            assert (await query(server, client("203.0.113.1"), "bad"))[0] == 401


async def test_after_so_many_refusals_no_credential_of_an_address_is_looked_at_for_a_while() -> None:
    near, far = client("203.0.113.1"), client("203.0.113.2")
    async with bounded() as (engine, server):
        for _ in range(30):
            assert await query(server, near, "bad") == (401, "AuthenticationFailed")
        asked_count = len(engine.backend.asked)
        assert await query(server, near, "bad") == (429, "RateLimited")
        assert await query(server, near, "good") == (429, "RateLimited")
        assert len(engine.backend.asked) == asked_count
        assert (await query(server, near))[0] == 200, "who shows none is served"
        assert (await query(server, far, "good"))[0] == 200
        engine.clock.advance(59.9)
        assert (await query(server, near, "good"))[0] == 429
        engine.clock.advance(0.2)
        assert (await query(server, near, "good"))[0] == 200


async def test_refusals_that_are_far_apart_are_forgiven() -> None:
    async with bounded() as (engine, server):
        for _ in range(3):
            for _ in range(29):
                assert (await query(server, client("203.0.113.1"), "bad"))[0] == 401
            engine.clock.advance(60)


async def test_connections_count_too_and_are_told_to_come_back_with_what_they_have() -> None:
    near = client("203.0.113.1")
    async with bounded(authentication_failure_count_max=2) as (engine, server):
        for _ in range(2):
            async with server.connected(headers=near) as sync:
                await sync.say(connect(), authenticate(0, "bad"), query_set(0))
                assert (await sync.hear())["type"] == "AuthError"
        async with server.connected(headers=near) as sync:
            await sync.say(connect(), authenticate(0, "good"), query_set(0))
            assert await sync.closed() == (1013, "TooManyConcurrentRequests")
        engine.clock.advance(61)
        async with server.connected(headers=near) as sync:
            await sync.say(connect(), authenticate(0, "good"), query_set(0))
            assert (await heard(sync))["endVersion"]["identity"] == 1


async def heard(sync: SocketClient) -> dict[str, Any]:
    """The next message that is no Ping."""
    while (message := await sync.hear())["type"] == "Ping":
        pass
    return message


async def test_what_is_kept_of_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.server.addresses._KEPT_COUNT_MAX", 5)
    async with bounded(authentication_failure_count_max=1) as (_, server):
        for number in range(8):
            assert (await query(server, client(f"203.0.113.{number}"), "bad"))[0] == 401
        assert (await query(server, client("203.0.113.7"), "good"))[0] == 429
        assert (await query(server, client("203.0.113.0"), "good"))[0] == 200, "it was forgotten"
