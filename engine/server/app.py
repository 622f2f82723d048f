"""The server: its routes, what is the same for all of them, starting and stopping.

Invariants
  1. A socket that has not sent a whole request header in time is closed (aiohttp has no timer for that).
  2. Whatever goes wrong is answered with `code` and `message` as JSON, readable by the page that asked.
  3. A page of an origin that is not allowed reaches no handler.
  4. Stopping takes nobody in any more, lets each mutation that runs be answered, and tells all clients to come back.
"""

import asyncio
import logging
import resource
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.clock import Clock, TimerHandle
from engine.config import Config, Mode
from engine.limits import Limits
from engine.server.files import FileBackend, FileDoor
from engine.server.http import HttpBackend, HttpDoor, error_response
from engine.server.origins import Origins
from engine.server.proxies import TrustedProxies
from engine.server.routes import RouteBackend, RouteDoor
from engine.server.websocket import WebSocketDoor
from engine.sync.backend import Backend

_log = logging.getLogger("engine.server")

_KEEP_ALIVE_SECONDS: Final = 75  # longer than usual proxies wait
_HEADER_FIELD_SIZE_BYTES_MAX: Final = 17 << 10  # an admin key with an identity to act as
_STOP_SECONDS_MAX: Final = 10
_SPARE_FILE_COUNT: Final = 128  # descriptors for the database, for HTTP and for the app's own use
_BACKLOG_COUNT: Final = 1_024  # after a restart all clients come back at once


class Doors(Backend, HttpBackend, RouteBackend, FileBackend, Protocol):
    """What sessions and HTTP requests ask."""


class ServedEngine(Protocol):
    """What a server needs of an engine."""

    @property
    def backend(self) -> Doors: ...

    @property
    def config(self) -> Config: ...

    @property
    def clock(self) -> Clock: ...


_WEB_SOCKET_DOOR: Final = web.AppKey("web_socket_door", WebSocketDoor)
_HEADER_TIMERS: Final = web.AppKey("header_timers", dict[asyncio.BaseProtocol, TimerHandle])


class _Front:
    """What is the same for all requests: it stands before aiohttp's application.

    The addresses that clients ask most are looked up here: by aiohttp's router and middlewares such a request takes
    1.35 × the CPU.
    """

    def __init__(
        self,
        origins: Origins,
        timers: dict[asyncio.BaseProtocol, TimerHandle],
        handler_by_address: Mapping[tuple[str, str], Handler],
    ) -> None:
        self._origins, self._timers, self._handler_by_address = origins, timers, handler_by_address

    def stand_before(self, server: web.Server) -> None:
        self._app, server.request_handler = server.request_handler, self._handle

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(request, web.Request), "the application's server makes them"
        timer = self._timers.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()
        response: web.StreamResponse
        try:
            self._origins.check(request)  # 3
            handler = self._handler_by_address.get((request.method, request.rel_url.raw_path))
            if handler is None or "Expect" in request.headers:  # the application answers that first
                response = await self._app(request)
            else:
                response = await handler(request)
        except Exception as error:  # noqa: BLE001 - the door: each becomes one answer
            response = error_response(error)
        if not response.prepared:
            self._origins.mark(request, response.headers)
            response.headers["X-Content-Type-Options"] = "nosniff"
        return response


_FRONT: Final = web.AppKey("front", _Front)


def make_app(
    engine: ServedEngine, *, extra_routes: Iterable[web.RouteDef] = (), connection_count_max: int | None = None
) -> web.Application:
    """The application of one engine; `extra_routes` are for commands that serve more than the API."""
    config = engine.config
    limits, origins = config.limits, Origins(config.allowed_origins)
    http = HttpDoor(engine.backend, limits, origins)
    files = FileDoor(engine.backend, limits, origins)
    routes = RouteDoor(engine.backend, http, limits, TrustedProxies(config.trusted_proxies))
    sync = WebSocketDoor(
        engine.backend,
        limits,
        engine.clock,
        origins,
        connection_count_max=limits.connection_count_max if connection_count_max is None else connection_count_max,
    )
    app = web.Application(client_max_size=limits.http_body_size_bytes_max, middlewares=[_app_routes(origins, routes)])
    app[_WEB_SOCKET_DOOR] = sync
    app[_HEADER_TIMERS] = {}
    app[_FRONT] = _Front(
        origins,
        app[_HEADER_TIMERS],
        {
            ("POST", "/api/query"): http.query,
            ("GET", "/api/query"): http.query_by_address,
            ("POST", "/api/mutation"): http.mutation,
            ("POST", "/api/action"): http.action,
        },
    )
    app.add_routes(
        [
            web.get(_api("sync"), sync.handle),
            web.get(_api("{version}/sync"), sync.handle),
            web.post(_api("query"), http.query),
            web.get(_api("query"), http.query_by_address),
            web.post(_api("mutation"), http.mutation),
            web.post(_api("action"), http.action),
            web.post(_api("query_ts"), http.query_ts),
            web.post(_api("query_at_ts"), http.query_at_ts),
            web.post(_api("query_batch"), http.query_batch),
            web.post(_api("function"), http.function),
            web.post(_api("explain"), http.explain),
            web.post(_api("profile"), http.profile),
            web.post(_api("run/{path:.+}"), http.run),
            web.post(_api("debug_event"), http.debug_event),
            web.post(_api("storage/upload"), files.upload),
            web.get(_api("storage/{key}"), files.serve),
            web.get("/openapi.json", routes.openapi),
            web.get("/", _front_page(config.mode)),
            web.get("/version", _version),
            web.get("/instance_version", _version),
            web.get("/instance_name", _instance_name),
            *extra_routes,
        ]
    )
    return app


@asynccontextmanager
async def serving(
    engine: ServedEngine, host: str, port: int, *, extra_routes: Iterable[web.RouteDef] = ()
) -> AsyncIterator[str]:
    """A running server, as the address that clients are given; stops gracefully on the way out (4)."""
    connection_count_max = _connection_count_max(engine.config.limits)
    app = make_app(engine, extra_routes=extra_routes, connection_count_max=connection_count_max)
    runner = web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=_KEEP_ALIVE_SECONDS,
        max_field_size=_HEADER_FIELD_SIZE_BYTES_MAX,
        shutdown_timeout=_STOP_SECONDS_MAX,
    )
    await runner.setup()
    assert runner.server is not None, "the runner was set up"
    app[_FRONT].stand_before(runner.server)
    try:
        listener = await asyncio.get_running_loop().create_server(
            _timed(runner, app, engine), host, port, backlog=_BACKLOG_COUNT
        )
        try:
            bound_port = listener.sockets[0].getsockname()[1]
            yield f"http://{f'[{host}]' if ':' in host else host}:{bound_port}"
        finally:
            listener.close()
            door = app[_WEB_SOCKET_DOOR]
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS_MAX):
                    await door.close()
            door.abort()
    finally:
        await runner.cleanup()


def _api(path: str) -> str:
    """The route of an endpoint; an address that ends in a slash makes clients ask for `//api/…`."""
    return "/{slashes:/*}api/" + path


def _app_routes(origins: Origins, routes: RouteDoor) -> Middleware:
    """Looks up in the app's code what aiohttp's router does not know."""

    @web.middleware
    async def find(request: web.Request, handler: Handler) -> web.StreamResponse:
        found = routes.find(request)
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return origins.preflight(request) if found is None else origins.preflight(request, found.methods)
        return await (handler(request) if found is None else routes.handle(found, request))

    return find


def _timed(runner: web.AppRunner, app: web.Application, engine: ServedEngine) -> Callable[[], asyncio.BaseProtocol]:
    """Makes the protocol of each accepted socket, with a timer for its first header (1)."""
    server, timers = runner.server, app[_HEADER_TIMERS]
    assert server is not None, "the runner was set up"

    def expire(protocol: web.RequestHandler) -> None:
        del timers[protocol]
        protocol.force_close()

    def make_protocol() -> asyncio.BaseProtocol:
        protocol = server()
        seconds = engine.config.limits.http_header_seconds_max
        timers[protocol] = engine.clock.call_later(seconds, partial(expire, protocol))
        return protocol

    return make_protocol


def _connection_count_max(limits: Limits) -> int:
    """How many connections the process may hold: the limit, or what the system lets it open."""
    spare_count = _SPARE_FILE_COUNT + limits.file_download_count_max + limits.file_upload_count_max
    wanted = limits.connection_count_max + spare_count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            count_max = max(1, soft - spare_count)
            _log.warning("%d connections at most: the system allows %d open files (ulimit -n)", count_max, soft)
            return count_max
    return limits.connection_count_max


async def _version(request: web.Request) -> web.Response:
    return web.Response(text=_engine_version())


async def _instance_name(request: web.Request) -> web.Response:
    return web.Response(text="reactive-engine")


def _engine_version() -> str:
    try:
        return version("reactive-engine")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _front_page(mode: Mode) -> Handler:
    async def front_page(request: web.Request) -> web.Response:
        if mode == "production":
            return web.Response(text="reactive-engine is running.\n")
        address = f"{request.scheme}://{request.host}"
        return web.Response(
            text=f"""reactive-engine {_engine_version()} is running.

Point any official Convex client at {address}:

    import {{ ConvexClient }} from "convex/browser";
    const client = new ConvexClient("{address}");
    client.onUpdate("chat:getMessages", {{ gameId }}, (messages) => console.log(messages));

    from convex import ConvexClient
    client = ConvexClient("{address}")

Or ask once, by HTTP:

    curl {address}/api/query -d '{{"path": "games:list", "args": {{}}, "format": "json"}}'

`engine functions` lists what can be called.
"""
        )

    return front_page
