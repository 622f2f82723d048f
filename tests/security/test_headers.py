"""What every kind of answer tells a browser not to do with it; what a value in an address may become."""

from pathlib import Path
from typing import Any

import pytest

from tests.server.real import serve_app

FUNCTIONS = """
@query
async def one(ctx) -> int: return 1
@mutation
async def address(ctx) -> str: return await ctx.storage.generate_upload_url()
@http.get("/page")
async def page(ctx) -> Response:
    return Response(body="<p>", headers={"Content-Type": "text/html", "Referrer-Policy": "origin"})
"""
ASK = b'{"path":"m:one","args":{}}'
ANSWERS = [
    ("GET", "/", 200),
    ("GET", "/version", 200),
    ("GET", "/page", 200),
    ("GET", "/openapi.json", 200),
    ("POST", "/api/query_ts", 200),
    ("OPTIONS", "/api/query", 204),
    ("GET", "/api/sync", 400),
    ("POST", "/api/function", 403),
    ("GET", "/no/such", 404),
    ("GET", "/api/storage/none", 404),
    ("PUT", "/api/query", 405),
]
PREFLIGHT = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}


@pytest.mark.parametrize("public_url", ["https://api.example", "http://api.example", None])
async def test_no_answer_is_guessed_at_followed_or_asked_for_in_plain_text(
    tmp_path: Path, public_url: str | None
) -> None:
    options: dict[str, Any] = {"public_url": public_url}
    async with serve_app(tmp_path, FUNCTIONS, **options) as real:
        for method, path, status in ANSWERS:
            headers = PREFLIGHT if method == "OPTIONS" else {}
            reply = await real.ask(method, path, headers=headers, data=ASK if method != "GET" else None)
            assert reply.status == status, path
            assert reply.headers["X-Content-Type-Options"] == "nosniff", path
            assert reply.headers["Referrer-Policy"] == ("origin" if path == "/page" else "no-referrer"), path
            is_encrypted = public_url == "https://api.example"
            assert reply.headers.get("Strict-Transport-Security") == ("max-age=31536000" if is_encrypted else None)
        answer = await real.ask("POST", "/api/query", data=ASK)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Type"].startswith("application/json")


async def test_the_front_page_is_text_and_runs_nothing_whatever_the_address_holds(tmp_path: Path) -> None:
    async with serve_app(tmp_path, FUNCTIONS) as real:
        reply = await real.ask("GET", "/?<script>alert(1)</script>", headers={"Host": "<script>alert(1)</script>"})
        assert reply.headers["Content-Type"].startswith("text/plain")
        assert reply.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


@pytest.mark.parametrize(
    ("content_type", "is_shown"),
    [
        ("image/png", True),
        ("text/html", False),
        ("image/svg+xml", False),
        ("application/xhtml+xml", False),
        ("text/javascript", False),
        ("text/html;image/png", False),
    ],
)
async def test_an_upload_never_becomes_a_page_of_this_server(tmp_path: Path, content_type: str, is_shown: bool) -> None:
    async with serve_app(tmp_path, FUNCTIONS) as real:
        upload = (await real.app.call("m:address")).partition("/api/")[2]
        body = b"<script>alert(document.domain)</script>"
        kept = await real.ask("POST", f"/api/{upload}", data=body, headers={"Content-Type": content_type})
        storage_id = kept.json["storageId"]
        address = real.engine.files.addresses.of_file(storage_id).partition("/api/")[2]
        reply = await real.ask("GET", f"/api/{address}")
        assert (reply.status, reply.body) == (200, body)
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Referrer-Policy"] == "no-referrer"
        assert reply.headers["Content-Disposition"] == ("inline" if is_shown else "attachment")
