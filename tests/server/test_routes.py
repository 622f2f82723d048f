"""The app's own HTTP routes, by real requests to a real engine."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path
from textwrap import dedent

import msgspec
import pytest

from engine.errors import RegistryError
from engine.functions.http import ENGINE_PATHS, http
from engine.limits import Limits
from engine.server import development
from engine.server.app import make_app
from tests.functions.apps import SECONDS_MAX, UNHURRIED
from tests.server.fakes import FakeEngine
from tests.server.real import RealServer, serve_app

ROUTES = """
import msgspec
from typing import Annotated, Literal
from engine.errors import Overloaded

class Payment(msgspec.Struct):
    amount: int
    note: str | None = None

class Found(msgspec.Struct):
    key: str
    verbose: bool
    tags: list[str]
    ratio: float | None
    kind: str
    page: int
    big: Int64

@http.get("/app/find/{key}/{page}")
async def find(
    ctx: ActionCtx,
    key: str,
    page: Annotated[int, msgspec.Meta(ge=1)],
    tags: list[Annotated[str, msgspec.Meta(max_length=3)]],
    ratio: float | None,
    verbose: bool = False,
    sort_kind: Literal["new", "old"] = "new",
    big: Int64 = 2**60,
) -> Found:
    return Found(key, verbose, tags, ratio, sort_kind, page, big)

@mutation
async def add(ctx: MutationCtx, key: str) -> Id[Item]:
    if key == "refused":
        raise AppError({"code": "REFUSED", "when": 1})
    if key == "full":
        raise Overloaded("no room")
    if key == "forbidden":
        raise Forbidden("not you")
    identity = ctx.auth.identity()
    return await ctx.db.insert(Item(key=key, note="" if identity is None else identity.subject))

@query
async def notes(ctx: QueryCtx) -> list[str]:
    return [item.note for item in await ctx.db.query(Item).collect()]

@query
async def by_id(ctx: QueryCtx, item_id: Id[Item]) -> Item | None:
    return await ctx.db.get(item_id)

@http.get("/app/items/{item_id}")
async def get_item(ctx: ActionCtx, item_id: Id[Item]) -> Item | None:
    return await ctx.run_query(by_id, item_id=item_id)

@http.put("/app/items/{key}")
async def put_item(ctx: ActionCtx, key: str) -> Id[Item]:
    if key == "broken":
        raise ZeroDivisionError("the secret is 42")
    return await ctx.run_mutation(add, key=key)

@http.get("/app/items/mine")
async def mine(ctx: ActionCtx) -> list[str]:
    return await ctx.run_query(notes)

@http.post("/app/pay")
async def pay(ctx: ActionCtx, body: Payment, dry: bool = False) -> dict[str, Any]:
    return {"amount": body.amount, "dry": dry}

@http.post("/app/any")
async def take_anything(ctx: ActionCtx, body: Any = "nothing") -> Any:
    return [body, type(body).__name__]

@http.delete("/app/nothing")
def nothing(ctx: ActionCtx) -> None:
    pass

@http.get("/app/respond/{how}")
async def respond(ctx: ActionCtx, how: str) -> Response | None:
    match how:
        case "redirect":
            return Response(status=303, headers={"Location": "/app/items/mine"})
        case "text":
            return Response(body="naïve", headers={"Set-Cookie": ["a=1", "b=2"], "Vary": "Accept"})
        case "bytes":
            return Response(status=418, body=b"\\x00\\xff", headers={"content-type": "image/png"})
        case "json":
            return Response(status=201, body={"n": 1, "big": 2**60, "raw": b"\\x01"})
        case "injection":
            return Response(headers={"X": "a\\r\\nSet-Cookie: b"})

@action
async def seen(ctx: ActionCtx) -> list[Any] | None:
    return None if ctx.request is None else [ctx.request.client_address, ctx.request.body]

@http.patch("/app/request/{what}")
async def request(ctx: ActionCtx, what: str, q: list[str]) -> list[Any]:
    asked = ctx.request
    return [
        asked.method, asked.path, asked.headers["x-test"], asked.headers.get("X-TEST"), "x-none" in asked.headers,
        asked.query["q"], asked.body, await ctx.run_action(seen),
    ]

@http.get("/app/address")
async def address(ctx: ActionCtx) -> str | None:
    return ctx.request.client_address

gate = asyncio.Event()

@http.post("/app/slow")
async def slow(ctx: ActionCtx) -> None:
    await gate.wait()
    await ctx.run_mutation(add, key="slow")
"""


@pytest.fixture
async def real(tmp_path: Path) -> AsyncIterator[RealServer]:
    async with serve_app(tmp_path, ROUTES) as real:
        yield real


async def running(real: RealServer) -> None:
    """Until a route runs."""
    async with asyncio.timeout(SECONDS_MAX):
        while real.engine.backend.is_idle:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)


# -- arguments ---------------------------------------------------------------------------------------------------------


async def test_arguments_come_from_the_path_and_the_query(real: RealServer) -> None:
    reply = await real.ask("GET", "/app/find/a%2Fb%20%C3%A9/7?tags=x&tags=y&ratio=0.5&verbose=true&sortKind=old&big=-3")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
    assert reply.json == {
        "key": "a/b é",
        "verbose": True,
        "tags": ["x", "y"],
        "ratio": 0.5,
        "kind": "old",
        "page": 7,
        "big": "-3",
    }


async def test_what_is_left_out_has_its_default_or_is_none_or_empty(real: RealServer) -> None:
    reply = await real.ask("GET", "/app/find/a/1")
    assert reply.body == (
        b'{"key":"a","verbose":false,"tags":[],"ratio":null,"kind":"new","page":1,"big":"1152921504606846976"}'
    )


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("/app/find/a/0", "page: expected int (>= 1), got 0"),
        ("/app/find/a/1.0", "page: expected int, got '1.0'"),
        ("/app/find/a/+1", "page: expected int, got '+1'"),
        ("/app/find/a/%D9%A1", "page: expected int, got '١'"),
        ("/app/find/a/99999999999999999999", "page: expected int, got '99999999999999999999'"),
        ("/app/find/a/1?verbose=1", "verbose: expected bool, got '1'"),
        ("/app/find/a/1?verbose=true&verbose=true", "verbose: expected bool, got a list of 2 items"),
        ("/app/find/a/1?ratio=NaN", "ratio: expected float, got 'NaN'"),
        ("/app/find/a/1?ratio=1e999", "ratio: expected float, got inf"),
        ("/app/find/a/1?ratio=", "ratio: expected float, got ''"),
        ("/app/find/a/1?sort_kind=best", "sort_kind: expected one of 'new', 'old', got 'best'"),
        ("/app/find/a/1?sort_kind=new&sortKind=old", "spelled in two ways"),
        ("/app/find/a/1?tags=abc&tags=abcd", "tags[1]: expected str (length <= 3), got 'abcd'"),
        ("/app/find/a/1?big=9223372036854775808", "big: expected an integer of 64 bits"),
        ("/app/find/a/1?colour=red", "colour: unknown in the query of /app/find/{key}/{page}, which has tags,"),
        ("/app/find/a/1?key=b", "key: unknown in the query"),
        ("/app/items/not-an-id", "item_id: expected Id[Item], got 'not-an-id'"),
    ],
)
async def test_a_wrong_or_unknown_argument_is_refused_by_its_name(real: RealServer, address: str, problem: str) -> None:
    reply = await real.ask("GET", address)
    assert reply.refusal == (400, "InvalidArgument")
    assert problem in reply.json["message"]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "body: missing, expected Payment as JSON"),
        (b"{", "The values of the body are not valid JSON"),
        (b"\xff", "The values of the body are not valid JSON"),
        (b"[" * 100_000, "The values of the body nest too deep"),
        (b"[]", "body: expected Payment, got a list"),
        (b"{}", "body.amount: missing, expected int"),
        (b'{"amount":"1"}', "body.amount: expected int, got '1'"),
        (b'{"amount":1.5}', "body.amount: expected int, got 1.5"),
        (b'{"amount":1,"extra":2}', "body.extra: unknown"),
    ],
)
async def test_a_wrong_body_is_refused_by_what_is_wrong_in_it(real: RealServer, body: bytes, problem: str) -> None:
    reply = await real.ask("POST", "/app/pay", data=body)
    assert reply.refusal == (400, "InvalidArgument")
    assert problem in reply.json["message"]


async def test_a_body_is_json_and_its_ints_stay_ints(real: RealServer) -> None:
    assert (await real.ask("POST", "/app/pay?dry=true", json={"amount": 3})).json == {"amount": 3, "dry": True}
    for body, kind in ((b"1", "int"), (b"1.0", "float"), (b"{}", "dict"), (b"null", "NoneType")):
        assert (await real.ask("POST", "/app/any", data=body)).json[1] == kind
    assert (await real.ask("POST", "/app/any")).json == ["nothing", "str"]


async def test_a_body_past_the_bound_is_refused_before_anything_runs(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, route_body_size_bytes_max=100)
    async with serve_app(tmp_path, ROUTES, limits=limits) as real:
        assert (await real.ask("POST", "/app/any", data=b'"%b"' % (b"x" * 98))).status == 200

        async def chunks() -> AsyncIterator[bytes]:
            yield b"1" * 101

        for body in (b"1" * 101, chunks()):
            reply = await real.ask("POST", "/app/any", data=body)
            assert reply.refusal == (413, "PayloadTooLarge")
            assert "limits.route_body_size_bytes_max" in reply.json["message"]


async def test_a_body_that_does_not_arrive_in_time_is_refused(tmp_path: Path) -> None:
    async with serve_app(tmp_path, ROUTES, limits=msgspec.structs.replace(UNHURRIED, http_body_seconds_max=0)) as real:

        async def endless() -> AsyncIterator[bytes]:
            yield b"1"
            await asyncio.Event().wait()

        assert (await real.ask("POST", "/app/any", data=endless())).refusal == (408, "RequestTimeout")


@pytest.mark.parametrize("path", ["/app/any", "/api/query"])
async def test_a_body_that_is_not_encoded_as_it_says_is_refused_and_nobody_is_alarmed(
    real: RealServer, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    reply = await real.ask("POST", path, data=b"not gzip", headers={"Content-Encoding": "gzip"})
    assert reply.refusal == (400, "BadRequest")
    assert [record for record in caplog.records if record.name == "engine.server"] == []


# -- answers -----------------------------------------------------------------------------------------------------------


async def test_a_document_goes_out_as_json_and_none_as_no_content(real: RealServer) -> None:
    item_id = (await real.ask("PUT", "/app/items/a")).json
    reply = await real.ask("GET", f"/app/items/{item_id}")
    assert (reply.status, reply.json["_id"], reply.json["key"], reply.json["rank"]) == (200, item_id, "a", 0)
    missing = item_id[:-1] + ("0" if item_id[-1] != "0" else "1")
    reply = await real.ask("GET", f"/app/items/{missing}")
    assert (reply.status, reply.body) == (204, b"")
    assert (await real.ask("DELETE", "/app/nothing")).status == 204


async def test_a_response_says_status_headers_and_body(real: RealServer) -> None:
    reply = await real.ask("GET", "/app/respond/redirect")
    assert (reply.status, reply.headers["Location"], reply.body) == (303, "/app/items/mine", b"")
    reply = await real.ask("GET", "/app/respond/text", headers={"Origin": "https://app.example"})
    assert (reply.status, reply.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert reply.body == "naïve".encode()
    assert reply.headers.getall("Set-Cookie") == ["a=1", "b=2"]  # type: ignore[attr-defined]
    assert reply.headers["Vary"] == "Accept, Origin"
    reply = await real.ask("GET", "/app/respond/bytes")
    assert (reply.status, reply.headers["Content-Type"], reply.body) == (418, "image/png", b"\x00\xff")
    reply = await real.ask("GET", "/app/respond/json")
    assert (reply.status, reply.json) == (201, {"n": 1, "big": str(2**60), "raw": "AQ=="})
    assert (await real.ask("GET", "/app/respond/none")).status == 204


async def test_a_header_cannot_break_out_of_its_line(real: RealServer) -> None:
    reply = await real.ask("GET", "/app/respond/injection")
    assert reply.status == 500
    assert "Set-Cookie" not in reply.headers
    assert "the header X has a value that is not printable ASCII" in reply.json["message"]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "refusal"),
    [("refused", (400, "AppError")), ("full", (503, "Overloaded")), ("forbidden", (403, "Forbidden"))],
)
async def test_a_refusal_of_the_app_or_the_engine_has_its_own_status(
    real: RealServer, key: str, refusal: tuple[int, str]
) -> None:
    assert (await real.ask("PUT", f"/app/items/{key}")).refusal == refusal


async def test_the_data_of_an_app_error_reaches_the_client(tmp_path: Path) -> None:
    async with serve_app(tmp_path, ROUTES, mode="production") as real:
        reply = await real.ask("PUT", "/app/items/refused")
        assert reply.json["data"] == {"code": "REFUSED", "when": 1}
        assert re.fullmatch(r"\[Request ID: [0-9a-f]{16}\] Server Error", reply.json["message"])


async def test_a_fault_is_shown_in_development_and_redacted_in_production(tmp_path: Path) -> None:
    async with serve_app(tmp_path, ROUTES) as real:
        reply = await real.ask("PUT", "/app/items/broken")
        assert reply.refusal == (500, "InternalServerError")
        assert "ZeroDivisionError: the secret is 42" in reply.json["message"]
    async with serve_app(tmp_path, mode="production") as real:
        reply = await real.ask("PUT", "/app/items/broken")
        assert reply.refusal == (500, "InternalServerError")
        assert re.fullmatch(r"\[Request ID: [0-9a-f]{16}\] Server Error", reply.json["message"])


async def test_a_route_has_the_time_limit_of_an_action(real: RealServer) -> None:
    asking = asyncio.create_task(real.ask("POST", "/app/slow"))
    await running(real)
    real.clock.advance(real.engine.config.limits.action_seconds_max)
    reply = await asking
    assert reply.refusal == (400, "LimitExceeded")
    assert "limits.action_seconds_max" in reply.json["message"]


async def test_a_result_past_the_bound_is_refused(tmp_path: Path) -> None:
    routes = """
        @http.get("/app/large/{count}")
        async def large(ctx: ActionCtx, count: int) -> Response:
            return Response(body="x" * count)
    """
    async with serve_app(tmp_path, routes, limits=Limits(result_size_bytes_max=1_000)) as real:
        assert (await real.ask("GET", "/app/large/900")).status == 200
        assert (await real.ask("GET", "/app/large/1000")).refusal == (400, "LimitExceeded")


# -- who asks ----------------------------------------------------------------------------------------------------------


async def test_the_bearer_token_says_who_asks(real: RealServer) -> None:
    assert (await real.ask("PUT", "/app/items/a", headers=real.token("alice"))).status == 200
    assert (await real.ask("PUT", "/app/items/b")).status == 200
    assert (await real.ask("GET", "/app/items/mine")).json == ["alice", ""]


async def test_a_bad_token_is_refused_and_nothing_runs(real: RealServer) -> None:
    for headers in (real.token("alice", seconds=-60), {"Authorization": "Basic eDp5"}):
        assert (await real.ask("PUT", "/app/items/a", headers=headers)).refusal == (401, "AuthenticationFailed")
    assert (await real.ask("GET", "/app/items/mine")).json == []


async def test_a_route_is_given_the_request_and_so_are_actions_that_it_runs(real: RealServer) -> None:
    reply = await real.ask("PATCH", "/app/request/a%20b?q=1&q=+2", data=b"\x00raw", headers={"X-Test": "yes"})
    raw = "AHJhdw=="
    seen = ["127.0.0.1", raw]
    assert reply.json == ["PATCH", "/app/request/a b", "yes", "yes", False, ["1", " 2"], raw, seen]


async def test_policies_hold_for_whoever_asks_by_a_route(real: RealServer) -> None:
    private = """
        @policy(Item)
        class Private(Policy[None]):
            def read(self, item: Item) -> bool:
                return False
    """
    assert (await real.ask("PUT", "/app/items/a")).status == 200
    assert (await real.ask("GET", "/app/items/mine")).json == [""]
    await real.app.rewrite(dedent(ROUTES) + dedent(private))
    assert (await real.ask("PUT", "/app/items/b")).refusal == (403, "Forbidden")
    assert (await real.ask("GET", "/app/items/mine")).json == []


async def test_an_action_that_no_route_called_has_no_request(real: RealServer) -> None:
    assert await real.engine.action("m:seen") is None
    assert (await real.ask("POST", "/api/action", json={"path": "m:seen"})).json["value"] is None


async def test_an_address_in_a_header_is_not_believed_when_nobody_trusts_its_writer(tmp_path: Path) -> None:
    spoofed = {"X-Forwarded-For": "203.0.113.9"}
    async with serve_app(tmp_path, ROUTES) as real:
        assert (await real.ask("GET", "/app/address", headers=spoofed)).json == "127.0.0.1"
    async with serve_app(tmp_path, trusted_proxies=(ip_network("10.0.0.0/8"),)) as real:
        assert (await real.ask("GET", "/app/address", headers=spoofed)).json == "127.0.0.1"


@pytest.mark.parametrize(
    ("forwarded_for", "address"),
    [
        ([], "127.0.0.1"),
        (["203.0.113.9"], "203.0.113.9"),
        (["6.6.6.6, 203.0.113.9"], "203.0.113.9"),
        (["6.6.6.6", "203.0.113.9, 10.1.2.3"], "203.0.113.9"),
        (["203.0.113.9:4711"], "203.0.113.9"),
        (["[2001:db8::1]:4711"], "2001:db8::1"),
        (["2001:db8::1"], "2001:db8::1"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        (["10.0.0.1, 10.0.0.2"], "10.0.0.1"),
        (["6.6.6.6, nonsense"], None),
        (["6.6.6.6, , 203.0.113.9,"], "203.0.113.9"),
    ],
)
async def test_the_address_of_a_client_is_the_last_that_a_trusted_proxy_wrote(
    tmp_path: Path, forwarded_for: list[str], address: str | None
) -> None:
    trusted = (ip_network("127.0.0.1"), ip_network("10.0.0.0/8"))
    async with serve_app(tmp_path, ROUTES, trusted_proxies=trusted) as real:
        headers = [("X-Forwarded-For", text) for text in forwarded_for]
        reply = await real.ask("GET", "/app/address", headers=headers)
        assert (None if reply.status == 204 else reply.json) == address


# -- addresses and methods ---------------------------------------------------------------------------------------------


async def test_a_method_that_is_not_there_is_refused_with_those_that_are(real: RealServer) -> None:
    reply = await real.ask("POST", "/app/items/a")
    assert reply.refusal == (405, "MethodNotAllowed")
    assert reply.headers["Allow"] == "GET,HEAD,PUT"
    reply = await real.ask("DELETE", "/api/query")
    assert (reply.status, set(reply.headers["Allow"].split(","))) == (405, {"GET", "HEAD", "POST"})


@pytest.mark.parametrize(
    "path", ["/app", "/app/items", "/app/items/", "/app/items/a/", "//app/items/a", "/App/address"]
)
async def test_an_address_that_is_nobodys_is_not_found(real: RealServer, path: str) -> None:
    assert (await real.ask("GET", path)).refusal == (404, "NotFound")


async def test_head_gives_the_headers_of_get(real: RealServer) -> None:
    reply = await real.ask("HEAD", "/app/address")
    assert (reply.status, reply.headers["Content-Length"], reply.body) == (200, str(len('"127.0.0.1"')), b"")


async def test_a_literal_goes_before_a_parameter_and_other_methods_fall_through(real: RealServer) -> None:
    assert (await real.ask("GET", "/app/items/mine")).json == []
    assert (await real.ask("PUT", "/app/items/mine")).status == 200
    assert (await real.ask("GET", "/app/items/other")).refusal == (400, "InvalidArgument")


async def test_pages_may_use_routes_by_the_rules_of_the_server(tmp_path: Path) -> None:
    asking = {"Origin": "https://app.example", "Access-Control-Request-Method": "PUT"}
    async with serve_app(tmp_path, ROUTES, allowed_origins=("https://app.example",)) as real:
        reply = await real.ask("OPTIONS", "/app/items/a", headers=asking)
        assert reply.status == 204
        assert reply.headers["Access-Control-Allow-Methods"] == "GET, HEAD, PUT, OPTIONS"
        assert reply.headers["Access-Control-Allow-Origin"] == "https://app.example"
        reply = await real.ask("PUT", "/app/items/a", headers={"Origin": "https://evil.example"})
        assert reply.refusal == (403, "Forbidden")
        for path in ("/app/items/mine", "/app/items/other"):
            reply = await real.ask("GET", path, headers={"Origin": "https://app.example"})
            assert reply.headers["Access-Control-Allow-Origin"] == "https://app.example"


async def test_routes_follow_a_reload(real: RealServer) -> None:
    route = '@http.get("/app/address")\nasync def address(ctx: ActionCtx) -> str:\n    return "here"\n'
    await real.app.rewrite(route + '@http.post("/app/new")\nasync def new(ctx: ActionCtx) -> None: ...\n')
    assert (await real.ask("GET", "/app/address")).json == "here"
    assert (await real.ask("POST", "/app/new")).status == 204
    assert (await real.ask("POST", "/app/pay", json={"amount": 1})).refusal == (404, "NotFound")


async def test_a_route_goes_on_when_its_client_goes_away(real: RealServer) -> None:
    asking = asyncio.create_task(real.ask("POST", "/app/slow"))
    await running(real)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    sys.modules["functions.m"].gate.set()
    await real.app.idle()
    assert len(await real.app.call("m:notes")) == 1


def test_the_addresses_that_apps_may_not_take_are_those_of_the_server() -> None:
    served = {
        re.sub(r"/\{path\}$", "/*", resource.canonical.replace("/{slashes}api", "/api"))
        for resource in make_app(FakeEngine(), Limits()).router.resources()
    }
    assert served - {"/"} == set(ENGINE_PATHS) - {"/dev/*"}  # no route of an app can be `/`
    for path in [value for name, value in vars(development).items() if name.endswith("_PATH")]:
        with pytest.raises(RegistryError):
            http.get(path)


async def test_a_reload_that_breaks_a_route_changes_nothing(real: RealServer) -> None:
    with pytest.raises(RegistryError):
        await real.app.rewrite('@http.get("/version")\nasync def version(ctx: ActionCtx) -> None: ...')
    assert (await real.ask("GET", "/app/address")).status == 200
