"""Where secrets may lie: in the configuration and with clients, never in the database or beside it."""

import base64
import json
import stat
import urllib.parse
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from engine.auth.admin import AdminKeys, digest_of, make_admin_key
from engine.auth.providers import AuthProvider, SharedSecret
from engine.clock import SystemClock
from engine.config import Config
from engine.errors import AuthenticationFailed, ConfigError
from engine.server.process import check_exposure, serving_process
from tests.functions.apps import UNHURRIED, write_app
from tests.server.fakes import Served, SocketClient
from tests.sync.fakes import connect, query_set

FUNCTIONS = """
@query
async def who(ctx) -> str | None:
    identity = ctx.auth.identity()
    return None if identity is None else identity.subject
@mutation
async def keep(ctx, key: str) -> str:
    assert ctx.auth.identity() is not None
    await ctx.scheduler.run_after(3_600_000, later, key="later")
    await ctx.db.insert(Item(key=key))
    return await ctx.storage.generate_upload_url()
@mutation
async def later(ctx, key: str) -> None: pass
@mutation
async def watch(ctx) -> None: await ctx.session.on_disconnect(later, key="gone")
"""
SECRET = b"the secret that issuer and engine share"
KEPT = "kept on purpose: 9f1c"


class Serving:
    """A served app with everything that could leave a secret behind."""

    def __init__(self, directory: Path) -> None:
        clock = SystemClock()
        self.admin_key, self.second_key = make_admin_key(clock), make_admin_key(clock)
        self.directory, self.database = directory, directory / "engine.db"
        provider = AuthProvider(
            issuer="https://login.test", audiences=("app",), keys=SharedSecret(SECRET), algorithms=("HS256",)
        )
        now = clock.wall_ns() // 1_000_000_000
        claims = {"iss": "https://login.test", "aud": "app", "sub": "alice", "exp": now + 3_600}
        self.token = jwt.encode(claims, SECRET, algorithm="HS256")
        config = Config(
            port=0, limits=UNHURRIED, admin_key_digests=(digest_of(self.admin_key), digest_of(self.second_key))
        )
        write_app(directory / "app", FUNCTIONS)
        self.process = serving_process(directory / "app", self.database, config, clock, providers=(provider,))

    @property
    def secrets(self) -> dict[str, bytes]:
        return {
            "the token": self.token.encode(),
            "its signature": self.token.rpartition(".")[2].encode(),
            "its payload": self.token.split(".")[1].encode(),
            "the issuer's secret": SECRET,
            "the admin key": self.admin_key.encode(),
            "the other admin key": self.second_key.encode(),
            "the admin key without its prefix": self.admin_key.removeprefix("adm_").encode(),
            "the bits of the admin key": base64.urlsafe_b64decode(self.admin_key.removeprefix("adm_") + "="),
        }

    def files(self) -> dict[Path, bytes]:
        """All that the engine has written."""
        paths = [path for path in self.directory.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in paths if not path.is_relative_to(self.directory / "app")}

    def found(self, needles: dict[str, bytes]) -> list[tuple[str, str]]:
        return [
            (path.name, name)
            for path, content in self.files().items()
            for name, needle in needles.items()
            if needle in content
            or base64.b64encode(needle)[:-4] in content
            or needle.hex().encode() in content
            or urllib.parse.quote(needle).encode() in content
        ]


async def use_everything(serving: Serving, address: str) -> None:
    """Each way in that takes a credential, and a write behind each."""
    bearer, admin = {"Authorization": f"Bearer {serving.token}"}, {"Authorization": f"Convex {serving.admin_key}"}
    acting = base64.b64encode(json.dumps({"issuer": "https://login.test", "subject": "bob"}).encode()).decode()
    async with aiohttp.ClientSession() as session:
        server = Served(address, session)
        keep = {"path": "m:keep", "args": {"key": KEPT}}
        status, answer = await server.post("/api/mutation", keep, headers=bearer)
        assert answer["status"] == "success", answer
        async with session.post(answer["value"], data=b"a file", headers=bearer | {"Cookie": serving.token}) as reply:
            assert reply.status == 200
        for key in (serving.admin_key, serving.second_key):
            headers = {"Authorization": f"Convex prod:name|{key}:{acting}"}
            status, answer = await server.post("/api/function", keep, headers=headers)
            assert (status, answer["status"]) == (200, "success"), answer
        assert (await server.post("/api/function", {"path": "m:who", "args": {}}, headers=admin))[0] == 200
        async with server.connected() as socket:
            await on_a_socket(serving, socket)


async def on_a_socket(serving: Serving, socket: SocketClient) -> None:
    def authenticate(version: int, kind: str, value: str) -> dict[str, Any]:
        return {"type": "Authenticate", "baseVersion": version, "tokenType": kind, "value": value}

    add = {"type": "Add", "queryId": 0, "udfPath": "m:who", "args": [{}]}
    await socket.say(connect(), authenticate(0, "User", serving.token), query_set(0, add))
    assert (await socket.hear())["modifications"][0]["value"] == "alice"
    for number, (path, args) in enumerate([("m:keep", {"key": KEPT}), ("m:watch", {})]):
        await socket.say({"type": "Mutation", "requestId": number, "udfPath": path, "args": [args]})
        while (answer := await socket.hear())["type"] != "MutationResponse":
            pass
        assert answer["success"], answer


async def test_no_credential_is_in_any_file_of_the_database(tmp_path: Path) -> None:
    serving = Serving(tmp_path)
    async with serving.process as (_, address):
        await use_everything(serving, address)
        assert serving.found(serving.secrets) == []
        assert ("engine.db-wal", "control") in serving.found({"control": KEPT.encode()}), (
            "the search finds what is there"
        )
        assert {stat.S_IMODE(path.stat().st_mode) for path in serving.files()} == {0o600}
        lock = json.loads((tmp_path / "engine.db.lock").read_bytes())
        assert AdminKeys([digest_of(lock["key"])]).accepts(lock["key"]), "the key of this process, while it runs"
    assert serving.found(serving.secrets | {"the key of the process": lock["key"].encode()}) == []
    assert serving.found({"control": KEPT.encode()}) != []


async def test_an_admin_key_in_an_address_or_a_body_is_no_credential(tmp_path: Path) -> None:
    serving = Serving(tmp_path)
    async with serving.process as (_, address), aiohttp.ClientSession() as session:
        server, key = Served(address, session), serving.admin_key
        who = {"path": "m:who", "args": {}, "adminKey": key, "key": key, "authorization": f"Convex {key}"}
        names = ("key", "adminKey", "admin_key", "token", "access_token", "authorization", "Authorization")
        for name in names:
            for value in (key, f"Convex {key}", f"Convex%20{key}"):
                status, _ = await server.post(f"/api/function?{name}={value.replace(' ', '+')}", who)
                assert status == 403, name
        assert (await server.post("/api/function", who, headers={"Cookie": f"adminKey={key}"}))[0] == 403
        user_info = address.replace("//", f"//convex:{key}@")
        async with session.post(f"{user_info}/api/function", json=who) as reply:
            assert reply.status == 401  # a client makes `Basic` of it, which is not taken


def test_a_key_has_256_bits_and_only_its_digest_lets_it_in() -> None:
    keys = {make_admin_key(SystemClock()) for _ in range(1_000)}
    assert len(keys) == 1_000
    assert all(key.startswith("adm_") and len(base64.urlsafe_b64decode(key[4:] + "=")) == 32 for key in keys)
    old, new, *_ = keys
    rotating = AdminKeys([digest_of(old), digest_of(new)])
    assert rotating.accepts(old)
    assert rotating.accepts(new)
    assert not AdminKeys([digest_of(new)]).accepts(old), "after the change the old one is nothing"
    assert not rotating.accepts(digest_of(new)), "who reads the configuration has no key"
    with pytest.raises(AuthenticationFailed):
        rotating.verify(old.swapcase())


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "10.0.0.1", "example.org", "localhost.example", "127.1"]
)
def test_a_public_address_without_an_admin_key_is_refused_before_anything_starts(host: str) -> None:
    with pytest.raises(ConfigError, match="other machines can reach it"):
        check_exposure(Config(host=host))
    check_exposure(Config(host=host, admin_key_digests=(digest_of("a key"),)))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    check_exposure(Config(host=host))


async def test_the_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    write_app(tmp_path / "app", FUNCTIONS)
    database, config = tmp_path / "data" / "engine.db", Config(host="0.0.0.0", port=0)
    with pytest.raises(ConfigError, match="engine admin-key"):
        async with serving_process(tmp_path / "app", database, config, SystemClock()):
            raise AssertionError("it serves")
    assert not database.parent.exists()
