"""The door for files, over real sockets: uploads, downloads, parts, and what a browser is told of what it gets."""

import asyncio
import hashlib
import os
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from yarl import URL

from engine.config import Config
from engine.engine import Engine
from engine.limits import Limits
from engine.server.app import serving
from engine.server.process import serving_process
from engine.storage.s3 import S3Location
from engine.testing import ManualClock
from tests.functions.apps import SECONDS_MAX, write_app
from tests.storage.s3_server import BUCKET, s3_server

FUNCTIONS = """
    @mutation
    async def upload_address(ctx: MutationCtx) -> str:
        return await ctx.storage.generate_upload_url()

    @query
    async def url(ctx: QueryCtx, file: Id[StoredFile]) -> str | None:
        return await ctx.storage.get_url(file)

    @query
    async def metadata(ctx: QueryCtx, file: Id[StoredFile]) -> FileMetadata | None:
        return await ctx.storage.get_metadata(file)

    @mutation
    async def remove(ctx: MutationCtx, file: Id[StoredFile]) -> None:
        await ctx.storage.delete(file)
"""

HELLO = b"hello, world"
HELLO_SHA256 = hashlib.sha256(HELLO).hexdigest()


class Served:
    """An engine behind its server, and a client of it."""

    def __init__(self, engine: Engine, clock: ManualClock, address: str, session: aiohttp.ClientSession) -> None:
        self.engine, self.clock, self.address, self.session = engine, clock, address, session

    async def upload_url(self) -> str:
        return self._here(await self.engine.mutation("m:upload_address"))

    async def url(self, file: str) -> str:
        return self._here(await self.engine.query("m:url", file=file))

    async def post(self, body: Any = HELLO, url: str | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and answer of an upload."""
        target = url if url is not None else await self.upload_url()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        skipped = [] if "Content_Type" in headers else ["Content-Type"]
        async with self.session.post(target, data=body, headers=named, skip_auto_headers=skipped) as response:
            return response.status, await response.json()

    async def upload(self, body: bytes | BytesIO = HELLO, **headers: str) -> str:
        status, answer = await self.post(body, **headers)
        assert status == 200, answer
        assert list(answer) == ["storageId"]
        return str(answer["storageId"])

    async def get(self, file: str, method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
        """Status, body and headers of the file."""
        return await self.ask(await self.url(file), method, **headers)

    async def ask(self, url: str, method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, URL(url, encoded=True), headers=named) as response:
            return response.status, await response.read(), response.headers

    def left_on_disk(self) -> list[str]:
        directory = Path(f"{self.engine.database.path}.files")
        return [path.name for path in directory.rglob("*") if path.is_file()]

    def _here(self, url: str) -> str:
        """The engine does not know the port that the test's server got."""
        return self.address + url.removeprefix("http://127.0.0.1:3210")


@asynccontextmanager
async def serve(directory: Path, config: Config | None = None, **limits: int) -> AsyncIterator[Served]:
    app = write_app(directory / "app", FUNCTIONS)
    config = config or Config(mode="development", limits=Limits(run_slow_ms=1_000, **limits))
    clock = ManualClock()
    async with (
        Engine.open(app, directory / "engine.db", config=config, clock=clock) as engine,
        serving(engine, "127.0.0.1", 0) as address,
        aiohttp.ClientSession() as session,
    ):
        yield Served(engine, clock, address, session)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what happens on a thread, or in the machine's network."""
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as running:
        yield running


# -- uploads


async def test_a_file_comes_back_as_it_was_sent(served: Served) -> None:
    content = os.urandom(300_000)
    file = await served.upload(content, Content_Type="image/png")
    metadata = await served.engine.query("m:metadata", file=file)
    assert (metadata.size, metadata.content_type) == (300_000, "image/png")
    assert metadata.sha256 == hashlib.sha256(content).hexdigest()
    status, body, headers = await served.get(file)
    assert (status, body) == (200, content)
    assert (headers["Content-Type"], headers["Content-Length"]) == ("image/png", "300000")
    assert headers["Digest"] == f"sha-256={b64encode(hashlib.sha256(content).digest()).decode()}"


async def test_an_empty_file_and_one_without_a_type_are_files(served: Served) -> None:
    file = await served.upload(b"")
    status, body, headers = await served.get(file)
    assert (status, body, headers["Content-Type"]) == (200, b"", "application/octet-stream")
    assert (await served.engine.query("m:metadata", file=file)).content_type is None
    assert (await served.get(file, Range="bytes=0-"))[0] == 416


async def test_an_address_takes_files_until_its_time_is_over(served: Served) -> None:
    url = await served.upload_url()
    assert [(await served.post(url=url))[0] for _ in range(2)] == [200, 200]
    served.clock.advance(3_601)
    assert await served.post(url=url) == (
        403,
        {
            "code": "Forbidden",
            "message": "This upload address is not valid, or not any more. Ask the app for a new one.",
        },
    )


async def test_without_an_address_that_was_given_nothing_is_taken(served: Served) -> None:
    for query in ("", "?token=", "?token=1-2", f"?token=99999999999999-{'0' * 32}", "?tok=%00", "?token=%C3%A9-%C3%A9"):
        status, answer = await served.post(url=f"{served.address}/api/storage/upload{query}")
        assert (status, answer["code"]) == (403, "Forbidden"), query
    assert served.left_on_disk() == []


async def test_a_digest_that_is_sent_along_is_checked(served: Served) -> None:
    right = b64encode(hashlib.sha256(HELLO).digest()).decode()
    wrong = b64encode(hashlib.sha256(b"other").digest()).decode()
    assert (await served.post(Digest=f"sha-256={right}"))[0] == 200
    status, answer = await served.post(Digest=f"sha-256={wrong}")
    assert (status, answer["code"]) == (400, "InvalidArgument")
    assert f"has the SHA-256 {HELLO_SHA256}" in answer["message"]
    for odd in ("", "sha-256=", "sha-256=é".encode().decode("latin-1"), f"md5={right}", "sha-256=aGVsbG8="):
        status, answer = await served.post(Digest=odd)
        assert (status, answer["code"]) == (400, "InvalidArgument"), odd
    await served.engine.wait_until_idle()
    assert len(served.left_on_disk()) == 1


async def test_a_content_type_that_is_none_is_refused(served: Served) -> None:
    for content_type in ("html", "/", "text/", "te xt/plain", "text/plain, text/html", f"{'a' * 200}/{'b' * 60}"):
        status, answer = await served.post(Content_Type=content_type)
        assert (status, answer["code"]) == (400, "InvalidArgument"), content_type


async def test_a_file_that_is_too_large_is_refused_before_and_while_it_arrives(tmp_path: Path) -> None:
    async def unannounced() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x"

    async with serve(tmp_path, file_size_bytes_max=10) as served:
        assert (await served.post(b"x" * 10))[0] == 200
        for body in (b"x" * 11, unannounced()):
            status, answer = await served.post(body)
            assert (status, answer["code"]) == (413, "PayloadTooLarge")
            assert "bytes of one file: 11 used, 10 allowed" in answer["message"]
        await served.engine.wait_until_idle()
        assert len(served.left_on_disk()) == 1


async def test_a_file_that_comes_too_slowly_is_refused(tmp_path: Path) -> None:
    async with serve(tmp_path, file_upload_seconds_max=0) as served:
        url = await served.upload_url()
        reader, writer = await asyncio.open_connection("127.0.0.1", URL(served.address).port)
        path = url.removeprefix(served.address)
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhel".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        await served.engine.wait_until_idle()
        assert served.left_on_disk() == []


async def test_a_sender_that_goes_away_leaves_nothing(served: Served) -> None:
    url = await served.upload_url()
    _, writer = await asyncio.open_connection("127.0.0.1", URL(served.address).port)
    path = url.removeprefix(served.address)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{'x' * 50_000}".encode())
    await writer.drain()
    await until(served.left_on_disk)
    assert served.engine.under_way == ["files"]
    writer.close()
    await writer.wait_closed()
    await served.engine.wait_until_idle()
    await until(lambda: not served.left_on_disk())


# -- downloads


async def test_a_deleted_file_is_gone(served: Served) -> None:
    file = await served.upload()
    url = await served.url(file)
    await served.engine.mutation("m:remove", file=file)
    status, body, _ = await served.ask(url)
    assert (status, b'"NotFound"' in body) == (404, True)
    await served.engine.wait_until_idle()
    assert served.left_on_disk() == []


TRAVERSALS = [
    "..%2f..%2fengine.db", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%5c..%5cengine.db", "..", "%2e%2e", "etc%2fpasswd",
    "%252e%252e%252f", "..%c0%af..%c0%af", "%ef%bc%8e%ef%bc%8e", "~root", "con", "incoming", "upload", "%00", "-",
    "{file}", "{file}-", "{file}%00", "{file}-" + "0" * 32, "{name}", "{upper}", "{key}%00", "{key}/", "{key}-x",
    "{key}%20", "a" * 5_000,
]  # fmt: skip


async def test_only_the_address_that_was_given_finds_a_file(served: Served) -> None:
    file = await served.upload()
    right = (await served.url(file)).rpartition("/")[2]
    (name,) = served.left_on_disk()
    for form in TRAVERSALS:
        asked = form.format(file=file, key=right, name=name, upper=right.upper())
        status, body, _ = await served.ask(f"{served.address}/api/storage/{asked}")
        assert status in (400, 404), asked
        assert HELLO not in body, asked


async def test_an_address_of_any_bytes_is_answered(served: Served) -> None:
    for method, path in ((b"GET", b"/api/storage/\xff-\xff"), (b"POST", b"/api/storage/upload?token=\xff-\xff")):
        reader, writer = await asyncio.open_connection("127.0.0.1", URL(served.address).port)
        writer.write(b"%b %b HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" % (method, path))
        assert (await reader.readline()).split()[1] in (b"400", b"403", b"404")
        writer.close()


async def test_its_head_is_the_file_without_its_bytes(served: Served) -> None:
    file = await served.upload(Content_Type="text/plain")
    _, _, headers = await served.get(file)
    status, body, head = await served.get(file, "HEAD", Range="bytes=0-1")
    assert (status, body) == (200, b"")
    compared = ("Content-Length", "Content-Type", "ETag", "Digest", "Accept-Ranges", "Cache-Control")
    assert [head[name] for name in compared] == [headers[name] for name in compared]
    assert head["Content-Length"] == "12"


async def test_a_part_is_sent_as_it_is_asked_for(served: Served) -> None:
    file = await served.upload()
    for asked, start, end in (
        ("bytes=0-4", 0, 5),
        ("bytes=7-", 7, 12),
        ("bytes=-5", 7, 12),
        ("bytes=0-0", 0, 1),
        ("bytes=11-11", 11, 12),
        ("bytes=5-99999", 5, 12),
        ("bytes=-99999", 0, 12),
        ("bytes=0-999999999999999999", 0, 12),
    ):
        status, body, headers = await served.get(file, Range=asked)
        assert (status, body) == (206, HELLO[start:end]), asked
        assert headers["Content-Range"] == f"bytes {start}-{end - 1}/12"
        assert (headers["Content-Length"], "Digest" in headers) == (str(end - start), False)


async def test_a_part_that_is_not_there_is_refused_with_the_size(served: Served) -> None:
    file = await served.upload()
    for asked in ("bytes=12-", "bytes=12-20", "bytes=999-", "bytes=-0"):
        status, body, headers = await served.get(file, Range=asked)
        assert (status, body, headers["Content-Range"]) == (416, b"", "bytes */12"), asked


async def test_what_is_no_range_or_several_is_answered_with_all(served: Served) -> None:
    file, huge = await served.upload(), "bytes=" + "9" * 5_000
    for asked in ("bytes=5-2", "bytes=-", "bytes=a-b", "lines=0-1", "bytes=0-1,3-4", "bytes 0-1", huge):
        assert (await served.get(file, Range=asked))[:2] == (200, HELLO), asked


async def test_a_part_is_sent_only_of_the_version_that_was_begun(served: Served) -> None:
    file = await served.upload()
    _, _, headers = await served.get(file)
    assert headers["ETag"] == f'"{HELLO_SHA256}"'
    assert (await served.get(file, Range="bytes=0-4", If_Range=headers["ETag"]))[0] == 206
    for other in ('"other"', f"W/{headers['ETag']}", "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert (await served.get(file, Range="bytes=0-4", If_Range=other))[:2] == (200, HELLO)


async def test_who_has_the_file_is_told_so(served: Served) -> None:
    file = await served.upload()
    tag = (await served.get(file))[2]["ETag"]
    for held, method in product((tag, f"W/{tag}", f'"x", {tag}', "*"), ("GET", "HEAD")):
        status, body, headers = await served.get(file, method, If_None_Match=held, Range="bytes=0-1")
        assert (status, body, headers["ETag"]) == (304, b"", tag), (held, method)
    assert (await served.get(file, If_None_Match='"other"'))[0] == 200


INLINE = [
    "image/png", "IMAGE/PNG", "video/mp4", "audio/ogg; codecs=opus", "text/plain; charset=utf-8", "application/pdf",
]  # fmt: skip
DOWNLOADS = [
    "text/html", "Text/HTML; charset=utf-8", "image/svg+xml", "image/SVG+XML", "application/xhtml+xml", "text/xml",
    "text/javascript", "application/octet-stream", "x/y", "image/png;a=b,text/html", "text/plain; charset=x, text/html",
]  # fmt: skip


async def test_what_a_browser_could_run_is_a_download(served: Served) -> None:
    for content_type in INLINE + DOWNLOADS:
        file = await served.upload(Content_Type=content_type)
        for asked in ({}, {"Range": "bytes=0-1"}):
            _, _, headers = await served.get(file, **asked)
            assert headers["Content-Type"] == content_type
            assert headers["Content-Disposition"] == ("inline" if content_type in INLINE else "attachment")
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cache-Control"] == "private, max-age=2592000, immutable"


async def test_pages_of_other_origins_may_upload_and_read(served: Served) -> None:
    origin = "https://app.example"
    asked = {"Origin": origin, "Access_Control_Request_Method": "POST"}
    status, _, headers = await served.ask(
        await served.upload_url(), "OPTIONS", **asked, Access_Control_Request_Headers="content-type,digest"
    )
    assert (status, headers["Access-Control-Allow-Headers"]) == (204, "content-type,digest")
    file = await served.upload(Origin=origin)
    for more in ({}, {"Range": "bytes=0-1"}, {"Range": "bytes=99-"}, {"If_None_Match": "*"}):
        _, _, headers = await served.get(file, Origin=origin, **more)
        assert headers["Access-Control-Allow-Origin"] == origin
        assert {"Content-Range", "ETag", "Digest"} <= set(re.split(", ", headers["Access-Control-Expose-Headers"]))


async def test_one_who_does_not_read_holds_a_file_open_for_so_long_only(tmp_path: Path) -> None:
    async with serve(tmp_path, send_stuck_seconds_max=0) as served:
        file = await served.upload(BytesIO(bytes(16 << 20)))
        path = (await served.url(file)).removeprefix(served.address)
        reader, writer = await asyncio.open_connection("127.0.0.1", URL(served.address).port, limit=1)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until(lambda: served.engine.files._opened_count == 1)
        await until(lambda: served.engine.files._opened_count == 0)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(16 << 20)
        writer.close()


async def test_a_file_that_breaks_while_it_is_sent_ends_the_connection(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever was sent after its first bytes would be taken for the file."""
    file = await served.upload(os.urandom(1 << 20))
    (name,) = served.left_on_disk()
    directory = f"{served.engine.database.path}.files"
    os.truncate(f"{directory}/{name[:2]}/{name[2:4]}/{name}", 100_000)
    with pytest.raises(aiohttp.ClientPayloadError):
        await served.get(file)
    assert f"file {file} was sent in part only" in caplog.text


# -- the address of the server


@pytest.mark.parametrize("public_url", [None, "https://api.example"])
async def test_addresses_say_where_clients_reach_the_server(tmp_path: Path, public_url: str | None) -> None:
    app = write_app(tmp_path / "app", FUNCTIONS)
    config = Config(mode="development", port=0, public_url=public_url)
    async with serving_process(app, tmp_path / "engine.db", config, ManualClock()) as (engine, address):
        url = urlsplit(await engine.mutation("m:upload_address"))
        assert f"{url.scheme}://{url.netloc}" == (public_url or address)


# -- in a bucket


@pytest.mark.slow
async def test_files_in_a_bucket_are_served_in_parts_and_deleted(tmp_path: Path) -> None:
    with s3_server(tmp_path) as bucket:
        location = S3Location(bucket=BUCKET, endpoint=bucket.address, region="us-east-1", prefix="live/")
        config = Config(mode="development", storage=location, limits=Limits(run_slow_ms=1_000))
        async with serve(tmp_path, config) as served:
            content = os.urandom(200_000)
            file = await served.upload(content, Content_Type="video/mp4")
            assert (len(bucket.keys()), served.left_on_disk()) == (1, [])
            assert (await served.get(file))[:2] == (200, content)
            assert (await served.get(file, Range="bytes=100000-100009"))[:2] == (206, content[100_000:100_010])
            await served.engine.mutation("m:remove", file=file)
            await served.engine.wait_until_idle()
            assert bucket.keys() == []
            bucket.stop()
            status, answer = await served.post()
            assert (status, answer["code"]) == (503, "Overloaded")
