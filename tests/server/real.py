"""A small app behind a real server: what a test of the doors says over HTTP is answered by a real engine."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import msgspec

from engine.auth.providers import AuthProvider, SharedSecret
from engine.config import Config
from engine.engine import Engine
from engine.server.app import serving
from engine.testing import ManualClock
from tests.functions.apps import SCHEMA, UNHURRIED, OpenApp, write_app
from tests.server.fakes import Served

_KEY = b"a secret that is used in tests only"
_PROVIDER = AuthProvider(
    issuer="https://login.test", audiences=("app",), keys=SharedSecret(_KEY), algorithms=("HS256",)
)


class Reply(msgspec.Struct):
    """A response, whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def refusal(self) -> tuple[int, str]:
        """The status and the code of what was refused."""
        assert self.json.keys() >= {"code", "message"}
        return self.status, self.json["code"]


class RealServer:
    """An engine, and the server before it."""

    def __init__(self, app: OpenApp, server: Served) -> None:
        self.app, self.engine, self.clock, self.server = app, app.engine, app.clock, server

    async def ask(self, method: str, path: str, **options: Any) -> Reply:
        async with self.server.session.request(
            method, self.server.url(path), allow_redirects=False, **options
        ) as response:
            return Reply(response.status, response.headers, await response.read())

    def token(self, subject: str, *, seconds: float = 3_600) -> dict[str, str]:
        """The header that signs somebody in."""
        now = self.clock.wall_ns() / 1e9
        claims = {"iss": "https://login.test", "aud": "app", "sub": subject, "iat": now, "exp": now + seconds}
        return {"Authorization": f"Bearer {jwt.encode(claims, _KEY, algorithm='HS256')}"}


@asynccontextmanager
async def serve_app(
    directory: Path,
    functions: str | Mapping[str, str] | None = None,
    *,
    schema: str = SCHEMA,
    clock: ManualClock | None = None,
    settings: Mapping[str, Any] | None = None,
    **config: Any,
) -> AsyncIterator[RealServer]:
    """Write an app (None: serve what is there) and serve it; its database lies beside it and stays."""
    if functions is not None:
        write_app(directory / "app", functions, schema=schema)
    clock = clock or ManualClock()
    configuration = Config(**{"mode": "development", "limits": UNHURRIED, **config})
    async with (
        Engine.open(
            directory / "app",
            directory / "engine.db",
            config=configuration,
            clock=clock,
            providers=(_PROVIDER,),
            settings=settings,
        ) as engine,
        serving(engine, "127.0.0.1", 0) as address,
        aiohttp.ClientSession() as session,
    ):
        yield RealServer(OpenApp(directory / "app", engine, clock), Served(address, session))
