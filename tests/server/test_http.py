"""The HTTP API over real sockets, on a fake engine."""

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.config import Config
from engine.errors import EngineClosed, Overloaded, RateLimited
from engine.identity import Identity
from engine.limits import Limits
from engine.sync.backend import ActionOutcome, MutationOutcome
from engine.sync.protocol import encode_timestamp
from tests.server.fakes import FakeEngine, Served, served
from tests.sync.fakes import FakeFailure, FakeResult

ENCODED = "convex_encoded_json"
ALICE = Identity(subject="alice", issuer="https://login.example")


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.backend.outcomes["chat:list"] = FakeResult(b'[{"n":1,"big":{"$integer":"BQAAAAAAAAA="},"s":"1"}]')
    engine.backend.outcomes["chat:send"] = MutationOutcome(ts=1000, value=b"null", log_lines=("[LOG] 'hi'",))
    engine.backend.outcomes["mail:send"] = ActionOutcome(value=b'"sent"')
    return engine


@pytest.fixture
async def server(engine: FakeEngine) -> AsyncIterator[Served]:
    async with served(engine) as server:
        yield server


@pytest.mark.parametrize("name", [ENCODED, "convex_json"])
async def test_numbers_have_a_decimal_point_and_special_values_stay_encoded(server: Served, name: str) -> None:
    body = json.dumps({"path": "chat:list", "format": name, "args": [{}]}).encode()
    async with server.session.post(server.url("/api/query"), data=body) as response:
        assert response.content_type == "application/json"
        text = await response.text()
    assert text == '{"status":"success","value":[{"n":1.0,"big":{"$integer":"BQAAAAAAAAA="},"s":"1"}],"logLines":[]}'


@pytest.mark.parametrize("format_", [{}, {"format": "json"}, {"format": None}])
async def test_the_default_format_is_plain_json(server: Served, format_: dict[str, Any]) -> None:
    status, answer = await server.post("/api/query", {"path": "chat:list", "args": {}, **format_})
    assert (status, answer["value"]) == (200, [{"n": 1.0, "big": "5", "s": "1"}])


@pytest.mark.parametrize("path", ["/api/mutation", "//api/mutation"])
async def test_a_mutation_answers_with_its_log_lines(server: Served, path: str) -> None:
    status, answer = await server.post(path, {"path": "chat:send", "args": [{}], "format": ENCODED})
    assert (status, answer) == (200, {"status": "success", "value": None, "logLines": ["[LOG] 'hi'"]})


async def test_an_action_answers(server: Served) -> None:
    assert (await server.post("/api/action", {"path": "mail:send", "args": {}}))[1]["value"] == "sent"


@pytest.mark.parametrize(
    ("args", "arguments"),
    [
        ({"args": [{"a": 1}]}, b'{"a": 1}'),
        ({"args": {"a": 1}}, b'{"a": 1}'),
        ({"args": None}, b"{}"),
        ({"args": {}}, b"{}"),
        ({}, b"{}"),
    ],
)
async def test_arguments_come_bare_or_in_an_array(
    engine: FakeEngine, server: Served, args: dict[str, Any], arguments: bytes
) -> None:
    await server.post("/api/query", {"path": "chat:list", **args})
    assert engine.backend.asked == [("query", "chat:list", arguments, None, None)]


async def test_a_failure_of_a_function_is_status_200(engine: FakeEngine, server: Served) -> None:
    failure = FakeFailure("[Request ID: 1f] Server Error", data=b'{"code":1}', code="AppError")
    engine.backend.outcomes["chat:send"] = MutationOutcome(ts=None, value=None, failure=failure)
    status, answer = await server.post("/api/mutation", {"path": "chat:send", "format": ENCODED})
    assert status == 200
    assert answer == {"status": "error", "errorMessage": failure.message, "errorData": {"code": 1.0}, "logLines": []}


async def test_an_unknown_function_is_a_failure_without_data(server: Served) -> None:
    status, answer = await server.post("/api/query", {"path": "no:such"})
    assert status == 200
    assert answer.keys() == {"status", "errorMessage", "logLines"}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"path":5}', b'{"path":"a:b","format":"xml"}', b'{"path":"a:b","args":[]}', b"\xff"],
)
async def test_a_malformed_body_is_an_error_with_code_and_message(server: Served, body: bytes) -> None:
    status, answer = await server.post("/api/query", body)
    assert (status, answer.keys()) == (400, {"code", "message"})


async def test_half_a_surrogate_pair_is_an_error_of_its_request(server: Served) -> None:
    status, _ = await server.post("/api/query", b'{"path":"chat:list","args":{"a":"\\ud800"}}')
    assert status == 400


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("try again"), 503, "Overloaded"),
        (EngineClosed("closing"), 503, "EngineClosed"),
        (ZeroDivisionError("secret"), 500, "InternalServerError"),
    ],
)
async def test_what_is_not_the_functions_fault_has_a_status_of_its_own(
    engine: FakeEngine, server: Served, error: Exception, status: int, code: str
) -> None:
    engine.backend.outcomes["chat:list"] = error
    got, answer = await server.post("/api/query", {"path": "chat:list"})
    assert (got, answer["code"]) == (status, code)
    assert "secret" not in answer["message"]


async def test_who_asks_too_often_is_told_when_to_come_back(engine: FakeEngine, server: Served) -> None:
    engine.backend.outcomes["chat:list"] = RateLimited("chat:send", count=5, per_ms=10_000, retry_after_ms=1_001)
    async with server.session.post(server.url("/api/query"), data=b'{"path": "chat:list"}') as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "2")
        assert (await response.json())["code"] == "RateLimited"


@pytest.mark.parametrize(("code", "status"), [("Overloaded", 503), ("StorageFull", 503), ("InternalError", 500)])
async def test_failures_of_the_engine_are_no_function_failures(
    engine: FakeEngine, server: Served, code: str, status: int
) -> None:
    engine.backend.outcomes["chat:send"] = MutationOutcome(ts=None, value=None, failure=FakeFailure("no", code=code))
    assert (await server.post("/api/mutation", {"path": "chat:send"}))[0] == status


@pytest.mark.parametrize(("format_", "is_plain"), [("json", True), (ENCODED, False)])
@pytest.mark.parametrize("failure", [None, FakeFailure("no", data=b'{"code":1}')])
async def test_the_body_of_a_shared_result_is_made_once(
    engine: FakeEngine, server: Served, format_: str, is_plain: bool, failure: FakeFailure | None
) -> None:
    result = engine.backend.outcomes["chat:list"] = FakeResult(b"[1]" if failure is None else None, failure)
    asked = {"path": "chat:list", "format": format_}
    _, answer = await server.post("/api/query", asked)
    made, other = (result.http_plain, result.http_encoded)[:: 1 if is_plain else -1]
    assert made is not None
    assert (json.loads(made), other) == (answer, None)
    kept = b'{"was":"kept"}'
    result.http_plain, result.http_encoded = (kept, None) if is_plain else (None, kept)
    assert (await server.post("/api/query", asked))[1] == {"was": "kept"}


@pytest.mark.parametrize("path", ["/api/query", "//api/query"])
async def test_addresses_that_are_looked_up_answer_like_those_of_the_router(server: Served, path: str) -> None:
    wrong = await server.post(path, b"{")
    assert (wrong[0], wrong[1]["code"]) == (400, "InvalidArgument")
    async with server.session.put(server.url(path)) as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET,HEAD,POST")
    async with server.session.head(server.url(f"{path}?path=chat:list")) as response:
        assert (response.status, await response.read()) == (200, b"")
    status, answer = await server.post(path, {"path": "chat:list"}, expect100=True)
    assert (status, answer["status"]) == (200, "success")


async def test_a_body_past_the_bound_is_refused() -> None:
    engine = FakeEngine(Config(limits=Limits(http_body_size_bytes_max=1_000)))
    async with served(engine) as server:
        status, answer = await server.post("/api/query", {"path": "x" * 1_000})
        assert (status, answer["code"]) == (413, "PayloadTooLarge")


async def test_arguments_past_the_bound_are_refused() -> None:
    engine = FakeEngine(Config(limits=Limits(arguments_size_bytes_max=10)))
    async with served(engine) as server:
        status, answer = await server.post("/api/query", {"path": "chat:list", "args": {"a": "xxxxx"}})
        assert (status, answer["code"]) == (400, "LimitExceeded")


@pytest.mark.parametrize(("path", "status"), [("/api/nothing", 404), ("/", 405), ("/api/query/more", 404)])
async def test_what_is_not_there_is_an_error_in_json(server: Served, path: str, status: int) -> None:
    got, answer = await server.post(path, {})
    assert (got, answer.keys()) == (status, {"code", "message"})


# -- who asks ----------------------------------------------------------------------------------------------------------


async def test_a_token_gives_the_caller_an_identity(engine: FakeEngine, server: Served) -> None:
    await server.post("/api/query", {"path": "chat:list"}, headers={"Authorization": "Bearer good"})
    assert engine.backend.asked[0][3] == ALICE


async def test_a_bad_token_is_refused_and_nothing_runs(engine: FakeEngine, server: Served) -> None:
    status, answer = await server.post(
        "/api/mutation", {"path": "chat:send"}, headers={"Authorization": "Bearer forged"}
    )
    assert (status, answer["code"]) == (401, "AuthenticationFailed")
    assert engine.backend.asked == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Convex key"}, 200),
        ({"Authorization": "Convex wrong"}, 401),
        ({"Authorization": "Bearer good"}, 403),
        ({}, 403),
        ({"Authorization": "Convex key", "Origin": "https://evil.example"}, 401),
    ],
)
async def test_any_function_may_be_run_by_admins_only(
    engine: FakeEngine, server: Served, headers: dict[str, str], status: int
) -> None:
    engine.backend.kinds["mail:send"] = "action"
    got, _ = await server.post("/api/function", {"path": "mail:send", "args": {}}, headers=headers)
    assert got == status
    assert [asked[0] for asked in engine.backend.asked] == (["action"] if status == 200 else [])
    assert all(engine.backend.asked_as_admin)


async def test_component_paths_are_refused(engine: FakeEngine, server: Served) -> None:
    status, answer = await server.post("/api/query", {"path": "chat:list", "componentPath": "x"})
    assert (status, answer["status"], engine.backend.asked) == (200, "error", [])


# -- snapshots, batches and addresses ----------------------------------------------------------------------------------


async def test_several_queries_see_one_snapshot(engine: FakeEngine, server: Served) -> None:
    _, answer = await server.post("/api/query_ts", b"", headers={"Content-Type": "application/json"})
    assert answer == {"ts": encode_timestamp(1000)}
    status, answer = await server.post("/api/query_at_ts", {"path": "chat:list", "args": [{}], **answer})
    assert (status, answer["status"]) == (200, "success")
    assert engine.backend.asked[0][4] == 1000


@pytest.mark.parametrize("ts", [{"ts": encode_timestamp(5)}, {"ts": "soon"}, {"ts": "AAAA"}, {}])
async def test_a_snapshot_that_is_not_there_is_an_error(server: Served, ts: dict[str, str]) -> None:
    status, answer = await server.post("/api/query_at_ts", {"path": "chat:list", **ts})
    assert (status, answer.keys()) == (400, {"code", "message"})


async def test_a_batch_is_answered_in_order_at_one_snapshot(engine: FakeEngine, server: Served) -> None:
    queries = [{"path": "chat:list", "args": {}, "format": ENCODED}, {"path": "no:such", "args": {}}]
    _, answer = await server.post("/api/query_batch", {"queries": queries})
    assert [result["status"] for result in answer["results"]] == ["success", "error"]
    assert {asked[4] for asked in engine.backend.asked} == {1000}


async def test_a_batch_past_the_bound_is_refused() -> None:
    async with served(FakeEngine(Config(limits=Limits(query_count_max=1)))) as server:
        status, answer = await server.post("/api/query_batch", {"queries": [{"path": "a:b"}] * 2})
        assert (status, answer["code"]) == (400, "LimitExceeded")


async def test_a_query_may_be_asked_by_address(engine: FakeEngine, server: Served) -> None:
    status, text = await server.get("/api/query?path=chat:list&format=json&args=%7B%22a%22%3A1%7D")
    assert (status, json.loads(text)["status"]) == (200, "success")
    assert engine.backend.asked[0][:3] == ("query", "chat:list", b'{"a":1}')
    assert (await server.get("/api/query"))[0] == 400
    assert (await server.get("/api/query?path=a:b&args=%7B"))[0] == 400


@pytest.mark.parametrize(
    ("address", "path"), [("live/quiz/join", "live/quiz:join"), ("chat/send", "chat:send"), ("chat", "chat")]
)
async def test_a_function_may_be_run_by_its_address(
    engine: FakeEngine, server: Served, address: str, path: str
) -> None:
    engine.backend.kinds[path] = "mutation"
    await server.post(f"/api/run/{address}", {"args": {"a": 1}, "format": "json"})
    assert engine.backend.asked == [("mutation", path, b'{"a": 1}', None, None)]


async def test_an_unknown_function_by_its_address_looks_like_any_other(server: Served) -> None:
    status, answer = await server.post("/api/run/no/such", b"")
    assert (status, answer["status"]) == (200, "error")


# -- browsers and people -----------------------------------------------------------------------------------------------


async def test_a_preflight_is_answered_with_what_was_asked_for(server: Served) -> None:
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, convex-client",
    }
    async with server.session.options(server.url("//api/mutation"), headers=headers) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert response.headers["Access-Control-Allow-Headers"] == headers["Access-Control-Request-Headers"]
        assert response.headers["Access-Control-Allow-Methods"] == "GET, POST, OPTIONS"


@pytest.mark.parametrize("body", [{"path": "chat:list"}, {}])
async def test_pages_may_read_answers_and_errors(server: Served, body: dict[str, str]) -> None:
    headers = {"Origin": "https://app.example"}
    async with server.session.post(server.url("/api/query"), json=body, headers=headers) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"


async def test_pages_of_other_origins_may_not_ask_once_there_is_a_list() -> None:
    engine = FakeEngine(Config(allowed_origins=("https://app.example",)))
    async with served(engine) as server:
        for origin, expected in [("https://app.example", 200), ("https://evil.example", 403), (None, 200)]:
            headers = {} if origin is None else {"Origin": origin}
            status, _ = await server.post("/api/mutation", {"path": "chat:send"}, headers=headers)
            assert status == expected, origin


async def test_tools_get_short_plain_text(server: Served) -> None:
    for path in ("/version", "/instance_name", "/instance_version"):
        status, text = await server.get(path)
        assert status == 200
        assert 0 < len(text) < 100
    async with server.session.post(server.url("/api/debug_event"), json={"event": "LongWebsocketDisconnect"}) as reply:
        assert reply.status == 200


async def test_the_front_page_tells_a_developer_how_to_connect() -> None:
    async with served(FakeEngine(Config(mode="development"))) as server:
        status, text = await server.get("/")
        assert status == 200
        assert f'new ConvexClient("{server.address}")' in text
    async with served(FakeEngine(Config(mode="production"))) as server:
        assert "ConvexClient" not in (await server.get("/"))[1]


async def test_a_long_credential_fits_into_the_header(engine: FakeEngine, server: Served) -> None:
    acting_as = b64encode(b"x" * 11_000).decode()
    status, _ = await server.post(
        "/api/query", {"path": "chat:list"}, headers={"Authorization": f"Convex key:{acting_as}"}
    )
    assert status == 401, "it was looked at"


# -- who breaks off


async def broken_off(server: Served, request: bytes, *, is_answered: bool) -> None:
    """Send a request that is not whole, perhaps wait for the answer, and go."""
    url = server.url("")
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(request)
    if is_answered:
        await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("expected", [b"200-ok", b"100-continue-not", b"\x81", b"\xff" * 99, b""])
@pytest.mark.parametrize("path", ["/no/such", "/api/query", "/version", "/api/sync"])
async def test_what_cannot_be_expected_is_refused_whatever_it_is(
    server: Served, caplog: pytest.LogCaptureFixture, path: str, expected: bytes
) -> None:
    url = server.url("")
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: %b\r\n\r\n" % (path.encode(), expected))
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 417 ")
    assert json.loads(body).keys() == {"code", "message"}
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("is_answered", [True, False])
@pytest.mark.parametrize("path", ["/no/such", "/api/query", "/version"])
async def test_a_request_that_is_broken_off_leaves_nothing_that_waits_for_its_rest(
    server: Served, path: str, is_answered: bool
) -> None:
    task_count = len(asyncio.all_tasks())
    request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc".encode()
    await broken_off(server, request, is_answered=is_answered and path != "/api/query")
    async with asyncio.timeout(5):  # aiohttp alone waits for 10 s
        while len(asyncio.all_tasks()) > task_count:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("headers", "is_answered"),
    [("Content-Encoding: gzip", True), ("Content-Encoding: deflate", True), ("Expect: 100-continue", False)],
)
@pytest.mark.parametrize("path", ["/no/such", "/api/query", "/version"])
async def test_a_broken_body_and_a_client_that_is_gone_are_no_errors_of_ours(
    server: Served, caplog: pytest.LogCaptureFixture, path: str, headers: str, is_answered: bool
) -> None:
    request = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\nContent-Length: 9\r\n\r\nno such.."
    await broken_off(server, request.encode(), is_answered=is_answered)
    assert (await server.get("/version"))[0] == 200
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
