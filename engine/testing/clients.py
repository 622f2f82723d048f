"""Those who use the engine under test: clients with an identity and a connection, and their subscriptions."""

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from engine.engine import Engine, ResultStream
from engine.errors import AppError, AppFault, FunctionNotFound, RequestError
from engine.functions.registry import FunctionKind
from engine.identity import Identity
from engine.live.live_query import Result

if TYPE_CHECKING:
    from engine.testing.harness import TestEngine

_TAB_CLOSED = 1001  # what browsers close with when a page is left (RFC 6455, section 7.4.1)
_SHOWN_LENGTH_MAX = 500
_REFUSALS = (RequestError, AppError, AppFault)


async def result_of(work: Awaitable[Any]) -> Any:
    """What a call gives or raises, without the engine's frames: they say nothing about the app."""
    __tracebackhide__ = True
    try:
        return await work
    except _REFUSALS as error:
        raise error.with_traceback(None)  # noqa: B904 - the same error; that of the app is its cause


class Client:
    """A client of the app, as the official ones are: it calls what is public, and has a session and a connection."""

    def __init__(self, engine: "TestEngine", identity: Identity | None) -> None:
        self.identity = identity
        """Who is signed in; None: nobody."""
        self._engine = engine
        self._session_id = engine.clock.entropy(16).hex()
        self._request_count = 0
        self._server: Engine | None = None  # that it is connected to
        self._subscriptions: list[Subscription] = []

    # -- calling functions: each connects, if need be

    async def query(self, path: str, /, **arguments: Any) -> Any:
        """What the query returns now. Raises AppError and the errors of `engine.errors`."""
        __tracebackhide__ = True
        return await result_of(self._connected_for(path, "query").query(path, identity=self.identity, **arguments))

    async def mutation(self, path: str, /, **arguments: Any) -> Any:
        """Run a mutation."""
        __tracebackhide__ = True
        server = self._connected_for(path, "mutation")
        self._request_count += 1
        return await result_of(
            server.session_mutation(self._session_id, self._request_count, path, identity=self.identity, **arguments)
        )

    async def action(self, path: str, /, **arguments: Any) -> Any:
        """Run an action to its end."""
        __tracebackhide__ = True
        return await result_of(self._connected_for(path, "action").action(path, identity=self.identity, **arguments))

    def subscribe(self, path: str, /, **arguments: Any) -> "Subscription":
        """Watch a query."""
        __tracebackhide__ = True
        self._connected_for(path, "query")
        self._subscriptions.append(self._engine.subscribe(path, identity=self.identity, **arguments))
        return self._subscriptions[-1]

    # -- the connection

    def connect(self) -> None:
        """Come back: after `close` or `drop`, or to an engine that was opened again."""
        server = self._engine.alive()
        if self._server is not server:
            self._server = server
            server.backend.session_connected(self._session_id)

    def close(self) -> None:
        """Close the tab: the server is told that the client has gone."""
        self._disconnect(_TAB_CLOSED)

    def drop(self) -> None:
        """Lose the network: the server only notices that the connection is gone."""
        self._disconnect(None)

    def _disconnect(self, close_code: int | None) -> None:
        for subscription in self._subscriptions:
            subscription.close()
        self._subscriptions.clear()
        if self._server is not None and self._server is self._engine.alive():
            self._server.backend.session_gone(self._session_id, close_code)
        self._server = None

    def _connected_for(self, path: str, kind: FunctionKind) -> Engine:
        __tracebackhide__ = True
        self.connect()
        server = self._engine.alive()
        try:
            server.registry.public(path, kind)
        except FunctionNotFound as error:  # as clients are told
            raise error.with_traceback(None)  # noqa: B904 - as in `result_of`
        return server

    def __repr__(self) -> str:
        return f"Client({self.identity!r})"


class Subscription:
    """The results of one query for one subscriber, from now on. It ends with the test, or at `close`."""

    def __init__(self, engine: "TestEngine", stream: ResultStream, asked: str) -> None:
        self._engine, self._stream, self._asked = engine, stream, asked
        self._newest: Result | None = None  # None until the first one was taken
        stream.open()

    async def next(self) -> Any:
        """The next result that differs from the one before; at first, the one that there is.

        One who is slower than the changes gets the newest. Raises what the query raises, and AssertionError once
        nothing is under way that could bring a result.
        """
        __tracebackhide__ = True
        while (result := self._stream.take()) is None:
            if not await self._engine.idle_unless(lambda: self._stream.is_ready):
                raise AssertionError(
                    f"{self._asked} has no new result, and nothing is under way that could bring one. "
                    f"The newest is still {self._shown()}. Write what the query reads, or let time pass "
                    "(`await engine.advance(…)`), before `next`; `settled` gives the newest one, new or not."
                )
        self._newest = result
        return self._value_of(result)

    async def settled(self) -> Any:
        """The newest result, once nothing is under way any more. Raises what the query raises."""
        __tracebackhide__ = True
        await self._engine.wait_until_idle()
        while (result := self._stream.take()) is not None or self._engine.alive().under_way:
            self._newest = result or self._newest
            await self._engine.wait_until_idle()
        assert self._newest is not None, "an engine that is idle has run every query"
        return self._value_of(self._newest)

    def close(self) -> None:
        """Watch no more."""
        self._stream.close()

    async def __aenter__(self) -> "Subscription":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _value_of(self, result: Result) -> Any:
        __tracebackhide__ = True
        try:
            return self._stream.value_of(result)
        except _REFUSALS as error:
            raise error.with_traceback(None)  # noqa: B904 - as in `result_of`

    def _shown(self) -> str:
        if self._newest is None:
            return "to come"
        try:
            shown = repr(self._stream.value_of(self._newest))
        except Exception as error:  # noqa: BLE001 - a result may be an error, of the app too
            shown = repr(error)
        return shown if len(shown) <= _SHOWN_LENGTH_MAX else f"{shown[:_SHOWN_LENGTH_MAX]}…"
