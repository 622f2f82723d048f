"""An engine for server tests: `tests/sync/fakes.py` behind the doors, and a client that speaks over a real socket."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from yarl import URL

from engine.config import Config
from engine.errors import AuthenticationFailed, RequestError
from engine.functions.registry import Registry
from engine.functions.requests import Request
from engine.functions.routes import Route
from engine.identity import Identity
from engine.server.app import serving
from engine.server.http import Kind
from engine.sync.backend import ActionOutcome, AdminKey, Credential, MutationOutcome, UserToken
from engine.testing import ManualClock
from tests.sync.fakes import FakeBackend, FakeFailure, FakeResult, FakeVerified


class ServedBackend(FakeBackend):
    """Verifies the token `good` and the admin key `key`, at once; HTTP requests get what is in `outcomes`."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, FakeResult | MutationOutcome | ActionOutcome | Exception] = {}
        self.kinds: dict[str, Kind] = {}
        self.asked: list[tuple[str, str, bytes, Identity | None, int | None]] = []
        self.asked_as_admin: list[bool] = []
        self.registry = Registry(())

    async def authenticate(self, credential: Credential) -> FakeVerified:
        match credential:
            case UserToken("good"):
                return FakeVerified(Identity(subject="alice", issuer="https://login.example"))
            case UserToken("bug"):
                raise ZeroDivisionError
            case AdminKey("key", _):
                return FakeVerified(None, is_admin=True)
            case _:
                raise AuthenticationFailed("The token is not good.")

    async def authenticate_header(self, authorization: str) -> FakeVerified:
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "convex":
            return await self.authenticate(AdminKey(value, None))
        return await self.authenticate(UserToken(value))

    async def http_query(
        self,
        path: str,
        arguments: bytes,
        identity: Identity | None,
        at_ts: int | None = None,
        *,
        is_admin: bool = False,
    ) -> Any:
        if at_ts not in (None, self.ts):
            raise RequestError("this snapshot is not kept any more.")
        return self._outcome("query", path, arguments, identity, at_ts, is_admin)

    async def http_mutation(
        self, path: str, arguments: bytes, identity: Identity | None, *, is_admin: bool = False
    ) -> Any:
        return self._outcome("mutation", path, arguments, identity, None, is_admin)

    async def http_action(
        self, path: str, arguments: bytes, identity: Identity | None, *, is_admin: bool = False
    ) -> Any:
        return self._outcome("action", path, arguments, identity, None, is_admin)

    def function_kind(self, path: str, *, is_admin: bool = False) -> Kind | None:
        return self.kinds.get(path)

    async def run_route(
        self, route: Route, path_texts: Mapping[str, str], request: Request, identity: Identity | None
    ) -> Any:
        raise AssertionError("an app without routes is asked for none")

    def retain_snapshot(self) -> int:
        return self.ts

    def _outcome(
        self, kind: str, path: str, arguments: bytes, identity: Identity | None, at_ts: int | None, is_admin: bool
    ) -> Any:
        self.asked.append((kind, path, arguments, identity, at_ts))
        self.asked_as_admin.append(is_admin)
        outcome = self.outcomes.get(path)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            failure = FakeFailure(f"Could not find public {kind} function for '{path}'.", code="FunctionNotFound")
            return FakeResult(None, failure)
        return outcome


class FakeEngine:
    """What `make_app` needs of an engine."""

    def __init__(self, config: Config | None = None) -> None:
        self.backend = ServedBackend()
        self.config = config or Config()
        self.clock = ManualClock()


class Served:
    """A running server, as a client sees it."""

    def __init__(self, address: str, session: aiohttp.ClientSession) -> None:
        self.address, self.session = address, session

    def url(self, path: str) -> URL:
        return URL(self.address + path, encoded=True)  # `//api` stays as it is

    @asynccontextmanager
    async def connected(self, path: str = "/api/1.48.0/sync", **options: Any) -> AsyncIterator["SocketClient"]:
        """One WebSocket, closed at the end."""
        async with self.session.ws_connect(self.url(path), max_msg_size=0, **options) as socket:
            yield SocketClient(socket)

    async def post(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """The status and the JSON of a response."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(self.url(path), data=data, **options) as response:
            return response.status, await response.json()

    async def get(self, path: str, **options: Any) -> tuple[int, str]:
        """The status and the text of a response."""
        async with self.session.get(self.url(path), **options) as response:
            return response.status, await response.text()


@asynccontextmanager
async def served(engine: FakeEngine, **options: Any) -> AsyncIterator[Served]:
    async with serving(engine, "127.0.0.1", 0, **options) as address, aiohttp.ClientSession() as session:
        yield Served(address, session)


class SocketClient:
    """One WebSocket of the official protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def say(self, *messages: dict[str, Any]) -> None:
        for message in messages:
            await self.socket.send_str(json.dumps(message))

    async def hear(self) -> dict[str, Any]:
        message = await self.socket.receive()
        assert message.type is aiohttp.WSMsgType.TEXT, message
        heard = json.loads(message.data)
        assert isinstance(heard, dict)
        return heard

    async def closed(self) -> tuple[int | None, str]:
        """The code and reason of the close frame that comes next."""
        message = await self.socket.receive()
        assert message.type is aiohttp.WSMsgType.CLOSE, message
        return message.data, message.extra
