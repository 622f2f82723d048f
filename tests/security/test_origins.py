"""Whose pages may use this server: 12 origins before every door; and no cookie opens any of them."""

from pathlib import Path

import aiohttp
import pytest

from tests.server.fakes import SocketClient
from tests.server.real import RealServer, serve_app
from tests.sync.fakes import connect, query_set

FUNCTIONS = """
@query
async def who(ctx) -> str | None:
    identity = ctx.auth.identity()
    return None if identity is None else identity.subject
@http.get("/hello")
async def hello(ctx) -> str: return "hello"
"""

LISTED = ("https://app.example", "https://xn--bcher-kva.example:8443")
ORIGINS = {
    None: True,  # no page at all: a native client
    "https://app.example": True,
    "https://APP.EXAMPLE": True,  # no browser sends it, and it is the same origin
    "https://xn--bcher-kva.example:8443": True,
    "null": False,  # a sandboxed frame, a file
    "http://app.example": False,
    "https://app.example:444": False,
    "https://app.example.evil.example": False,
    "https://evilapp.example": False,
    "https://sub.app.example": False,
    "https://app.example@evil.example": False,
    "https://bücher.example:8443": False,  # browsers send punycode
}
DOORS = [
    ("POST", "/api/query"),
    ("POST", "/api/mutation"),
    ("GET", "/api/query?path=m:who"),
    ("POST", "/api/run/m/who"),
    ("POST", "/api/storage/upload?token=x"),
    ("GET", "/hello"),
    ("GET", "/openapi.json"),
    ("GET", "/version"),
    ("GET", "/no/such/address"),
    ("OPTIONS", "/api/query"),
]


def header(origin: str | None) -> dict[str, str]:
    return {} if origin is None else {"Origin": origin}


async def handshake(real: RealServer, headers: dict[str, str]) -> int:
    try:
        async with real.server.connected(headers=headers):
            return 101
    except aiohttp.WSServerHandshakeError as refused:
        return refused.status


async def test_once_there_is_a_list_each_of_12_origins_is_let_in_or_refused_at_every_door(tmp_path: Path) -> None:
    assert len(ORIGINS) == 12
    async with serve_app(tmp_path, FUNCTIONS, allowed_origins=LISTED) as real:
        for origin, is_allowed in ORIGINS.items():
            assert await handshake(real, header(origin)) == (101 if is_allowed else 403), origin
            for method, path in DOORS:
                reply = await real.ask(method, path, headers=header(origin), data=b'{"path":"m:who","args":{}}')
                assert (reply.status != 403) is is_allowed or "token=x" in path, (origin, method, path)
                readable_by = reply.headers.get("Access-Control-Allow-Origin")
                assert readable_by == (origin if is_allowed else None), (origin, method, path)


async def test_without_a_list_any_page_may_ask_and_nothing_ambient_says_who_it_is(tmp_path: Path) -> None:
    """Cross-site hijacking needs something that the browser adds by itself; here there is nothing."""
    async with serve_app(tmp_path, FUNCTIONS) as real:
        bearer = real.token("victim")["Authorization"]
        ambient = {
            "Origin": "https://evil.example",
            "Cookie": f"Authorization={bearer}; token={bearer.split()[1]}; session=1; convex={bearer}",
            "Proxy-Authorization": bearer,
            "X-Forwarded-User": "victim",
        }
        assert await handshake(real, ambient) == 101
        for method, path in DOORS[:4]:
            body = b'{"path":"m:who","args":{}}'
            assert (await real.ask(method, path, headers=ambient, data=body)).json.get("value") is None
            reply = await real.ask(method, path, headers=ambient | {"Authorization": bearer}, data=body)
            assert reply.json.get("value") == ("victim" if "mutation" not in path else None)
            assert "Access-Control-Allow-Credentials" not in reply.headers
            assert "Set-Cookie" not in reply.headers
        async with real.server.connected(headers=ambient) as socket:
            add = {"type": "Add", "queryId": 0, "udfPath": "m:who", "args": [{}]}
            assert await first_value(socket, add) is None


async def first_value(socket: SocketClient, add: dict[str, object]) -> object:
    await socket.say(connect(), query_set(0, add))
    return (await socket.hear())["modifications"][0]["value"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost:1"])
async def test_a_name_that_was_rebound_to_this_machine_is_another_origin(tmp_path: Path, host: str) -> None:
    async with serve_app(tmp_path, FUNCTIONS, allowed_origins=LISTED) as real:
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert await handshake(real, headers) == 403
        assert (await real.ask("POST", "/api/query", headers=headers, data=b"{}")).refusal == (403, "Forbidden")
