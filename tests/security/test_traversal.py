"""200 ways to name a file that is not for clients; what the process opens meanwhile is watched."""

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import quote, urlsplit

from tests.server.real import RealServer, serve_app

FUNCTIONS = """
@query
async def one(ctx) -> int: return 1
@mutation
async def address(ctx) -> str: return await ctx.storage.generate_upload_url()
@mutation
async def kept(ctx) -> list[str]:
    return [await ctx.storage.get_url(file.id) for file in await ctx.db.query(StoredFile).collect()]
@http.get("/pages/{name}")
async def page(ctx, name: str) -> str: return "a page"
"""
CANARY = b"canary-7f3a-nobody-may-read-this"

UPWARD = ["../canary", "../../canary", "..", "../", ".", "./canary", "a/../../canary", "....//canary", "..;/canary"]
SPELLINGS = [
    lambda path: path,
    lambda path: path.replace(".", "%2e"),
    lambda path: path.replace("/", "%2f"),
    lambda path: quote(path, safe="").replace(".", "%2E"),
    lambda path: path.replace(".", "%252e").replace("/", "%252f"),
    lambda path: path.replace("/", "\\"),
    lambda path: path.replace("/", "%5c"),
    lambda path: path + "%00",
    lambda path: path + "%00.png",
    lambda path: path.replace(".", "%c0%ae"),  # overlong UTF-8
    lambda path: path.replace("/", "%ef%bc%8f"),  # a full-width solidus
]
BASES = ["/api/storage/", "/api/run/", "/pages/", "/"]


def corpus(root: Path) -> list[str]:
    """Request targets, as they go over the wire."""
    absolute = [str(root / "canary"), "/etc/passwd", "//etc/passwd", "/proc/self/environ", "file:///etc/passwd", "C:/x"]
    beside = ["engine.db", "engine.db-wal", "engine.db.lock", "engine.db.files/incoming", "app/schema.py", "app/link"]
    targets = [base + spell(path) for base in BASES[:2] for path in UPWARD for spell in SPELLINGS]
    targets += [base + quote(path, safe="") for base in BASES for path in (*absolute, *beside)]
    targets += [base + "../" * depth + "canary" for base in BASES for depth in (1, 3, 8, 40)]
    targets += ["/functions/m.py", "/schema.py", "/static/../canary", "/.git/config", "/.env", "/engine.toml"]
    return list(dict.fromkeys(targets))


class Opened:
    """Which files this process opens while it is watched; a hook cannot be taken out again."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.paths is not None and event in ("open", "os.listdir", "os.scandir", "import"):
            self.paths.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")

    @contextmanager
    def watched(self) -> Iterator[list[str]]:
        self.paths = paths = []
        try:
            yield paths
        finally:
            self.paths = None


@cache
def opened() -> Opened:
    """Made by the first test that needs it: the hook stays in the process."""
    return Opened()


async def exchange(real: RealServer, method: str, target: str) -> bytes:
    """One request exactly as written: clients that put addresses in order would spoil them."""
    host = urlsplit(real.server.address)
    reader, writer = await asyncio.open_connection(host.hostname, host.port)
    head = f"{method} {target} HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
    writer.write(head.encode())
    async with asyncio.timeout(10):
        reply = await reader.read()
    writer.close()
    return reply


def plant(root: Path) -> None:
    """A file that nobody may read, and links to it where files are looked for."""
    (root / "canary").write_bytes(CANARY)
    links = root / "engine.db.files" / "ab" / "cd"
    links.mkdir(parents=True)
    (links / ("abcd" + "0" * 28)).symlink_to(root / "canary")


async def test_200_addresses_reach_no_file_and_open_none(tmp_path: Path) -> None:
    async with serve_app(tmp_path, FUNCTIONS) as real:
        plant(tmp_path)
        (tmp_path / "app" / "link").symlink_to(tmp_path / "canary")
        targets = [*corpus(tmp_path), "/api/storage/" + "abcd" + "0" * 28]
        assert len(targets) >= 200
        with opened().watched() as paths:
            replies = {target: await exchange(real, "GET", target) for target in targets}
            replies |= {f"POST {target}": await exchange(real, "POST", target) for target in targets[::3]}
        for target, reply in replies.items():
            status = int(reply.split(b" ", 2)[1])
            assert CANARY not in reply, target
            assert b"root:" not in reply, target
            assert status in (200, 400, 403, 404, 405), (target, reply[:200])
            if status == 200:  # a function that is not there, or the app's own route
                assert b'"status":"error"' in reply or b"a page" in reply or target == "/", target
        assert paths == [], "nothing was opened, listed or imported"


async def test_the_watch_sees_a_file_that_is_served(tmp_path: Path) -> None:
    """The control: an upload that is fetched by its own address is opened, and where it lies."""
    async with serve_app(tmp_path, FUNCTIONS) as real:
        upload = "/api/" + (await real.app.call("m:address")).partition("/api/")[2]
        assert (await real.ask("POST", upload, data=b"mine")).status == 200
        (address,) = await real.app.call("m:kept")
        with opened().watched() as paths:
            reply = await real.ask("GET", "/api/" + address.partition("/api/")[2])
        assert reply.body == b"mine"
        assert [Path(path).is_relative_to(tmp_path / "engine.db.files") for path in paths] == [True]


async def test_the_address_of_one_file_opens_no_other_however_it_is_bent(tmp_path: Path) -> None:
    async with serve_app(tmp_path, FUNCTIONS) as real:
        plant(tmp_path)
        upload = "/api/" + (await real.app.call("m:address")).partition("/api/")[2]
        await real.ask("POST", upload, data=b"mine")
        (address,) = await real.app.call("m:kept")
        target = "/api/" + address.partition("/api/")[2]
        bent = [
            target + end for end in ("/../canary", "%00", "/", "%2f..%2fcanary", ".", "-", "%20", "\\..\\canary", "x")
        ]
        bent += [
            target.replace("/storage/", f"/storage/{start}") for start in ("../", "./", "%2e%2e%2f", "x", "0", "-")
        ]
        for target in bent:
            reply = await exchange(real, "GET", target)
            assert reply.split(b" ", 2)[1] in (b"400", b"404"), target
