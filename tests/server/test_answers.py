"""The ready head beside the one that aiohttp makes, over real sockets."""

import asyncio
import re
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from engine.server.answers import JsonAnswer

LAST = "GET /answer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
BODY = b'{"a":"\xc3\xa9"}'
MADE_ANEW = {"Content-Type": "application/json; charset=utf-8", "X-Content-Type-Options": "nosniff"}


async def ready(request: web.Request) -> web.Response:
    return marked(request, JsonAnswer(BODY))


async def made_anew(request: web.Request) -> web.Response:
    return marked(request, web.Response(body=BODY, headers=MADE_ANEW))


def marked(request: web.Request, response: web.Response) -> web.Response:
    if "Origin" in request.headers:
        response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
    return response


@pytest.fixture
async def server() -> AsyncIterator[TestServer]:
    app = web.Application()
    for path, handler in (("/answer", ready), ("/expect", made_anew)):
        app.router.add_route("*", path, handler)
    async with TestServer(app) as server:
        yield server


async def said(server: TestServer, text: str) -> bytes:
    """All that the server answers until it closes; dates are left out: a second may begin in between."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(text.encode())
    answer = await reader.read()
    writer.close()
    dates = re.findall(rb"\r\nDate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n", answer)
    assert len(dates) == answer.count(b"HTTP/1.")
    return re.sub(rb"\r\nDate: [^\r]*", b"", answer)


@pytest.mark.parametrize(
    "request_text",
    [
        LAST,
        "GET /answer HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + LAST,
        "POST /answer HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" * 2 + LAST,
        "HEAD /answer HTTP/1.1\r\nHost: x\r\n\r\n" + LAST,
        "GET /answer HTTP/1.1\r\nHost: x\r\nOrigin: https://app.example\r\n\r\n" * 2 + LAST,
        "GET /answer HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2 + LAST,
        "GET /answer HTTP/1.0\r\n\r\n",
    ],
)
async def test_it_is_what_aiohttp_sends(server: TestServer, request_text: str) -> None:
    answer = await said(server, request_text)
    assert answer == await said(server, request_text.replace("/answer", "/expect"))
    assert answer.startswith((b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\n"))
    assert answer.endswith(BODY)


async def test_the_connection_is_kept(server: TestServer) -> None:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    for _ in range(3):
        writer.write(b"GET /answer HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(BODY)).count(b"HTTP/1.1 200 OK") == 1
    writer.close()


async def test_a_client_that_does_not_read_is_sent_no_more_than_it_can_take() -> None:
    size, count = 1 << 20, 0

    async def large(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        return JsonAnswer(bytes(size))

    app = web.Application()
    app.router.add_get("/", large)
    async with TestServer(app) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        seen = -1
        while seen < count:  # until it stands still
            seen = count
            await asyncio.sleep(0.05)
        assert count < 100
        while count < 200:
            await reader.read(1 << 20)
        writer.close()
