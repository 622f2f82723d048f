"""Key sets over HTTP, from a server on loopback."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from engine.auth.fetching import FETCH_SECONDS_MAX, FETCH_SIZE_BYTES_MAX, FetchRefused, fetch_key_set

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(answer: Answer) -> AsyncIterator[str]:
    """A server on loopback whose every path gives this answer."""
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def fetch(url: str, **options: Any) -> bytes:
    return await fetch_key_set(url, is_private_network_allowed=True, **options)


async def test_a_key_set_is_fetched_over_http() -> None:
    async def answer(request: web.Request) -> web.Response:
        assert request.headers["Accept"] == "application/json"
        assert "Authorization" not in request.headers
        return web.Response(body=b"{}" + b" " * (FETCH_SIZE_BYTES_MAX - 2))

    async with served(answer) as address:
        assert len(await fetch(f"{address}/jwks.json")) == FETCH_SIZE_BYTES_MAX


async def test_a_redirect_on_the_same_host_is_followed() -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/old":
            raise web.HTTPFound("/new")
        return web.Response(text=request.path)

    async with served(answer) as address:
        assert await fetch(f"{address}/old") == b"/new"


@pytest.mark.parametrize(
    "location",
    [
        "http://localhost/jwks.json",
        "https://127.0.0.1/jwks.json",
        "//evil.example/x",
        "file:///etc/passwd",
        "",
        "http://[",
    ],
)
async def test_a_redirect_elsewhere_is_refused(location: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": location})

    async with served(answer) as address:
        with pytest.raises(FetchRefused, match="redirect"):
            await fetch(address)


async def test_a_circle_of_redirects_ends() -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        raise web.HTTPFound("/again")

    async with served(answer) as address:
        with pytest.raises(FetchRefused, match="more than 3 redirects"):
            await fetch(address)
    assert len(asked) == 4


@pytest.mark.parametrize("is_length_told", [True, False])
async def test_an_answer_that_is_too_long_is_not_read_to_its_end(is_length_told: bool) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if is_length_told:
            return web.Response(body=bytes(FETCH_SIZE_BYTES_MAX + 1))
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1_000):
            await response.write(bytes(1_000))
        return response

    async with served(answer) as address:
        with pytest.raises(FetchRefused, match="more than 65536 bytes"):
            await fetch(address)


async def test_an_answer_that_does_not_come_is_given_up() -> None:
    async def answer(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with served(answer) as address:
        with pytest.raises(FetchRefused, match="no answer within"):
            await fetch(address, seconds_max=0.05)


@pytest.mark.parametrize("status", [204, 404, 500])
async def test_a_status_other_than_200_is_refused(status: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with served(answer) as address:
        with pytest.raises(FetchRefused, match=f"status {status}"):
            await fetch(address)


async def test_nobody_listening_is_a_refusal_too() -> None:
    with pytest.raises(FetchRefused, match="no connection"):
        await fetch("http://127.0.0.1:1/jwks.json")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::1]",
        "localhost",
        "10.0.0.8",
        "192.168.1.1",
        "169.254.169.254",
        "[::ffff:127.0.0.1]",
        "[fd00::1]",
    ],
)
async def test_an_address_inside_a_private_network_is_not_reached(host: str) -> None:
    with pytest.raises(FetchRefused, match=r"private network|not a public address"):
        await fetch_key_set(f"https://{host}/jwks.json", is_private_network_allowed=False)


def test_bounds_are_those_that_are_promised() -> None:
    assert (FETCH_SECONDS_MAX, FETCH_SIZE_BYTES_MAX) == (5, 65_536)


@pytest.mark.slow
def test_who_fetches_nothing_and_serves_nothing_has_no_http_client() -> None:
    code = "import engine, sys; assert 'engine.engine' in sys.modules; assert 'aiohttp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
