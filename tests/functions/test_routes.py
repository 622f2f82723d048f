"""Routes as declared and as found: what is refused at load, which route answers, what a response may say."""

from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidResult, LimitExceeded, RegistryError
from engine.functions.loader import load_app
from engine.functions.requests import Answer, Headers, Response, compile_answer_encoder, decode_answer
from engine.functions.routes import RouteTable
from engine.limits import Limits
from tests.functions.apps import write_app

LIMITS = Limits()


def table_of(directory: Path, functions: str) -> RouteTable:
    return load_app(write_app(directory, functions), LIMITS).registry.routes


def route(declared: str, parameters: str = "", returns: str = "None", name: str = "route") -> str:
    return f"@http.{declared}\nasync def {name}(ctx: ActionCtx, {parameters}) -> {returns}: ...\n"


# -- at load -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("functions", "problem"),
    [
        (route('get("no/slash")'), "a path begins with a slash"),
        (route('get("/a/")'), "'' is no segment of a path"),
        (route('get("/")'), "'' is no segment of a path"),
        (route('get("/a//b")'), "'' is no segment of a path"),
        (route('get("/a/../b")'), "'..' is no segment of a path"),
        (route('get("/a/b c")'), "'b c' is no segment of a path"),
        (route('get("/a/%20")'), "'%20' is no segment of a path"),
        (route('get("/a/{userId}")', "userId: str"), "'{userId}' is no segment of a path"),
        (route('get("/a/{b}.json")', "b: str"), "'{b}.json' is no segment of a path"),
        (route('get("/version")'), "the engine itself answers at /version"),
        (route('put("/api/query")'), "the engine itself answers at /api/query"),
        (route('get("/api/v1/sync")'), "the engine itself answers at /api/{version}/sync"),
        (route('get("/api/{x}/sync")', "x: str"), "the engine itself answers at /api/{version}/sync"),
        (route('post("/api/run/chat/send")'), "the engine itself answers at /api/run/*"),
        (route('get("/openapi.json")'), "the engine itself answers at /openapi.json"),
        (route('get("/a/{b}")'), "has {b}, and there is no parameter of that name"),
        (route('get("/a/{b}/{b}")', "b: str"), "has a name twice"),
        (route('get("/a/{b}")', "b: str = 'x'"), "parameter 'b' stands in the path: it has no default"),
        (route('get("/a/{b}")', "b: list[str]"), "is a scalar (str, int, float, bool, Literal, Id), not list[str]"),
        (route('get("/a/{b}")', "b: str | None"), "parameter 'b' stands in the path"),
        (route('get("/a")', "b: dict[str, int]"), "parameter 'b' comes as text in the query"),
        (route('get("/a")', "b: int | str"), "parameter 'b' comes as text in the query"),
        (route('get("/a")', "b: list[list[int]]"), "parameter 'b' comes as text in the query"),
        (route('get("/a")', "b: Any"), "parameter 'b' comes as text in the query"),
        (route('get("/a")', "b: bytes"), "parameter 'b' comes as text in the query"),
        (route('get("/a")', "body: int"), "a GET request has no body"),
        (route('delete("/a")', "body: int"), "a DELETE request has no body"),
        (route('post("/a")', "body: bytes"), "ctx.request.body has the bytes"),
        (route('get("/a")', "b"), "parameter 'b' has no annotation"),
        (route('get("/a")', returns="set[int]"), "what it returns"),
        (route('get("/a")', returns="list[Response]"), "what it returns"),
        (route('get("/a")') + route('get("/a")', name="other"), "m:other and m:route are both GET /a"),
        (
            route('get("/a/{b}/c")', "b: str") + route('get("/a/{d}/c")', "d: int", name="other"),
            "m:other and m:route are both GET /a/{b}/c",
        ),
        ("http.get('/a')(5)", "stands above a function, not above 5"),
        ("@http.get\nasync def route(ctx: ActionCtx) -> None: ...", "a path begins with a slash"),
        ("http.post('/a', webhook='payments')", "webhook='payments'; Webhook(secret="),
        ("@query\n" + route('get("/a")'), "m:route: @http.get and @query stand above one function"),
        ("@http.get('/a')\n@action\nasync def route(ctx: ActionCtx) -> None: ...", "leave @action out"),
    ],
)
def test_a_route_that_nobody_could_reach_is_refused_at_load(tmp_path: Path, functions: str, problem: str) -> None:
    with pytest.raises(RegistryError) as refusal:
        table_of(tmp_path, functions)
    assert problem in str(refusal.value)


def test_routes_stand_in_any_module_once_however_often_they_are_imported(tmp_path: Path) -> None:
    modules = {
        "_hooks": route('post("/a")'),
        "live/status": "from functions._hooks import route\n" + route('get("/a")', name="status"),
    }
    app = load_app(write_app(tmp_path, modules), LIMITS)
    assert sorted((route.method, route.function.path) for route in app.registry.routes.routes) == [
        ("GET", "live/status:status"),
        ("POST", "_hooks:route"),
    ]
    assert app.registry.by_path == {}, "a route is no function that clients call by its path"


def test_a_function_may_be_several_routes(tmp_path: Path) -> None:
    routes = table_of(tmp_path, '@http.put("/a")\n@http.post("/b")\nasync def save(ctx: ActionCtx) -> None: ...')
    assert sorted((route.method, route.path) for route in routes.routes) == [("POST", "/b"), ("PUT", "/a")]


# -- which route answers -----------------------------------------------------------------------------------------------


def found(routes: RouteTable, method: str, path: str) -> tuple[str | None, dict[str, str], list[str]] | None:
    at_address = routes.find(method, path)
    if at_address is None:
        return None
    name = None if at_address.route is None else at_address.route.function.path
    return name, dict(at_address.path_texts), at_address.methods


def test_the_most_literal_route_that_has_the_method_answers(tmp_path: Path) -> None:
    routes = table_of(
        tmp_path,
        route('get("/u/{user_id}")', "user_id: str", name="user")
        + route('get("/u/me")', name="me")
        + route('delete("/u/{user_id}")', "user_id: str", name="remove")
        + route('get("/{kind}/me")', "kind: str", name="any_me")
        + route('get("/u/{user_id}/posts")', "user_id: str", name="posts")
        + route('get("/u/me/likes")', name="likes"),
    )
    assert found(routes, "GET", "/u/me") == ("m:me", {}, ["DELETE", "GET", "HEAD"])
    assert found(routes, "HEAD", "/u/x") == ("m:user", {"user_id": "x"}, ["DELETE", "GET", "HEAD"])
    assert found(routes, "DELETE", "/u/me") == ("m:remove", {"user_id": "me"}, ["DELETE", "GET", "HEAD"])
    assert found(routes, "POST", "/u/me") == (None, {}, ["DELETE", "GET", "HEAD"])
    assert found(routes, "GET", "/v/me") == ("m:any_me", {"kind": "v"}, ["GET", "HEAD"])
    assert found(routes, "GET", "/u/me/posts") == ("m:posts", {"user_id": "me"}, ["GET", "HEAD"])
    assert found(routes, "GET", "/u/a%2Fb%25") == ("m:user", {"user_id": "a/b%"}, ["DELETE", "GET", "HEAD"])
    for path in ("/u", "/u/", "/u/me/", "/", "//", "/u/%ff", ""):
        assert found(routes, "GET", path) is None, path


# -- what goes in and out ----------------------------------------------------------------------------------------------


def test_headers_have_names_in_any_case_and_join_what_came_several_times() -> None:
    headers = Headers([("Accept", "a"), ("X-One", "1"), ("ACCEPT", "b")])
    assert (headers["accept"], headers["x-ONE"], len(headers)) == ("a, b", "1", 2)
    assert "X-One" in headers
    assert 5 not in headers
    assert headers.get("none") is None
    assert list(headers) == ["accept", "x-one"]


def answer(annotation: Any, value: Any, limits: Limits = LIMITS) -> Answer:
    return decode_answer(compile_answer_encoder(annotation, limits=limits, size_limit="result_size_bytes_max")(value))


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (int, 2**60, (200, b'"1152921504606846976"')),
        (float, 1.0, (200, b"1.0")),
        (bytes, b"\x01", (200, b'"AQ=="')),
        (str | None, "x", (200, b'"x"')),
        (str | None, None, (204, b"")),
        (None, None, (204, b"")),
        (Any, [1, None], (200, b"[1,null]")),
        (Any, Response(status=202), (202, b"")),
        (Response, Response(body="x"), (200, b"x")),
        (int | Response, 5, (200, b"5")),
        (int | Response | None, None, (204, b"")),
        (Response | None, None, (204, b"")),
    ],
)
def test_a_value_none_or_a_response_becomes_an_answer(annotation: Any, value: Any, expected: tuple[int, bytes]) -> None:
    given = answer(annotation, value)
    assert (given.status, given.body) == expected


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "x"),
        (int, None),
        (int, Response()),
        (Response, 5),
        (Response, None),
        (Response, Response(status=199)),
        (Response, Response(status=600)),
        (Response, Response(status=True)),
        (Response, Response(status=204, body="x")),
        (Response, Response(status=304, body=b"")),
        (Response, Response(body={1, 2})),
        (Response, Response(headers={"Bad Name": "x"})),
        (Response, Response(headers={"X": "a\nb"})),
        (Response, Response(headers={"X": "a\r\n"})),
        (Response, Response(headers={"X": ["a", "é"]})),
        (Response, Response(headers={"X": 5})),  # type: ignore[dict-item]
        (Response, Response(headers={"content-LENGTH": "5"})),
        (Response, Response(headers={"Transfer-Encoding": "chunked"})),
    ],
)
def test_an_answer_that_contradicts_its_annotation_or_http_is_refused(annotation: Any, value: Any) -> None:
    with pytest.raises(InvalidResult):
        answer(annotation, value)


def test_an_answer_past_its_bound_is_refused() -> None:
    limits = Limits(result_size_bytes_max=200)
    assert answer(Response, Response(body=b"x" * 100), limits).status == 200
    with pytest.raises(LimitExceeded, match=r"limits\.result_size_bytes_max"):
        answer(Response, Response(body=b"x" * 200), limits)
