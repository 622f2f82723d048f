"""The server: its routes, what is the same for all of them, starting and stopping.

Invariants
  1. On one socket at most `authentication_failure_count_max` credentials are refused: then it is closed; once the
     client's address has had too many refused, none of its credentials are looked at for a while (`addresses.py`).
  2. Whatever goes wrong is answered with `code` and `message` as JSON, readable by the page that asked.
  3. A page of an origin that is not allowed reaches no handler.
  4. Stopping takes nobody in any more, lets each mutation that runs be answered, and tells all clients to come back.
"""

import asyncio
import logging
import resource
from collections.abc import AsyncIterator, Iterable, Mapping, MutableMapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Protocol

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.clock import Clock
from engine.config import Config, Mode
from engine.errors import AuthenticationFailed
from engine.limits import Limits
from engine.server.addresses import Addresses
from engine.server.answers import JsonAnswer
from engine.server.files import FileBackend, FileDoor
from engine.server.http import HttpBackend, HttpDoor, error_response
from engine.server.lagging import Lagging
from engine.server.origins import Origins
from engine.server.proxies import TrustedProxies
from engine.server.routes import RouteBackend, RouteDoor
from engine.server.sockets import HttpSocket, HttpSockets
from engine.server.websocket import WebSocketDoor
from engine.sync.backend import Backend

_log = logging.getLogger("engine.server")

_STOP_SECONDS_MAX: Final = 10
_SPARE_FILE_COUNT: Final = 128  # descriptors for the database and for the app's own use
_BACKLOG_COUNT: Final = 1_024  # after a restart all clients come back at once
_HSTS_SECONDS: Final = 365 * 86_400
_PAGE_HEADERS: Final = {"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}


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
_SOCKETS: Final = web.AppKey("sockets", HttpSockets)


class _Front:
    """What is the same for all requests: it stands before aiohttp's application.

    The addresses that clients ask most are looked up here: by aiohttp's router and middlewares such a request takes
    1.35 × the CPU.
    """

    def __init__(
        self,
        origins: Origins,
        sockets: HttpSockets,
        addresses: Addresses,
        limits: Limits,
        handler_by_address: Mapping[tuple[str, str], Handler],
        *,
        is_encrypted: bool,
    ) -> None:
        self._origins, self._sockets, self._addresses, self._limits = origins, sockets, addresses, limits
        self._handler_by_address = handler_by_address
        self._is_encrypted = is_encrypted  # clients come by https, through a proxy that ends it

    def stand_before(self, server: web.Server) -> None:
        self._app, server.request_handler = server.request_handler, self._handle

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(request, web.Request), "the application's server makes them"
        socket = request.protocol
        assert isinstance(socket, HttpSocket), "the server's sockets are"
        self._sockets.heard(socket)
        socket.is_asking, socket.body = True, request.content
        response: web.StreamResponse
        try:
            self._origins.check(request)  # 3
            if self._addresses.are_bounded and "Authorization" in request.headers:
                self._addresses.check_credential(self._addresses.name_of(request))  # 1
            handler = self._handler_by_address.get((request.method, request.rel_url.raw_path))
            expectation = request.headers.get("Expect")
            if expectation is not None and expectation.lower() != "100-continue":
                # aiohttp would quote it, and fail where it is no text
                raise web.HTTPExpectationFailed(text="Only `Expect: 100-continue` can be expected here.")
            if handler is None or expectation is not None:  # the application answers that first
                response = await self._app(request)
            else:
                response = await handler(request)
        except Exception as error:  # noqa: BLE001 - the door: each becomes one answer
            response = error_response(error)
            if isinstance(error, AuthenticationFailed):
                self._count_failure(request, socket, response)
        socket.is_asking = False
        if not response.prepared:
            self._origins.mark(request, response.headers)
            if not isinstance(response, JsonAnswer):  # which has its head ready, and is no page
                self._secure(response.headers)
        return response

    def _count_failure(self, request: web.Request, socket: HttpSocket, response: web.StreamResponse) -> None:
        """A credential was refused (1)."""
        socket.failure_count += 1
        if socket.failure_count >= self._limits.authentication_failure_count_max:
            response.force_close()
        self._addresses.credential_failed(self._addresses.name_of(request))

    def _secure(self, headers: MutableMapping[str, str]) -> None:
        """What keeps a browser from making more of an answer than it is."""
        headers["X-Content-Type-Options"] = "nosniff"
        headers.setdefault("Referrer-Policy", "no-referrer")  # addresses of files are capabilities
        if self._is_encrypted:
            headers.setdefault("Strict-Transport-Security", f"max-age={_HSTS_SECONDS}")


_FRONT: Final = web.AppKey("front", _Front)


def make_app(engine: ServedEngine, limits: Limits, *, extra_routes: Iterable[web.RouteDef] = ()) -> web.Application:
    """The application of one engine; `extra_routes` are for commands that serve more than the API."""
    config = engine.config
    origins = Origins(config.allowed_origins)
    http = HttpDoor(engine.backend, limits, origins)
    files = FileDoor(engine.backend, limits, origins)
    proxies = TrustedProxies(config.trusted_proxies)
    routes = RouteDoor(engine.backend, http, limits, proxies)
    lagging = Lagging(limits, engine.clock)
    addresses = Addresses(config.per_ip, proxies, engine.clock)
    sync = WebSocketDoor(engine.backend, limits, engine.clock, origins, lagging, addresses)
    app = web.Application(client_max_size=limits.http_body_size_bytes_max, middlewares=[_app_routes(origins, routes)])
    app[_WEB_SOCKET_DOOR] = sync
    app[_SOCKETS] = HttpSockets(limits, engine.clock, lagging)
    app[_FRONT] = _Front(
        origins,
        app[_SOCKETS],
        addresses,
        limits,
        {
            ("POST", "/api/query"): http.query,
            ("GET", "/api/query"): http.query_by_address,
            ("POST", "/api/mutation"): http.mutation,
            ("POST", "/api/action"): http.action,
        },
        is_encrypted=(config.public_url or "").startswith("https:"),
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
    limits = _within_the_system(engine.config.limits)
    app = make_app(engine, limits, extra_routes=extra_routes)
    runner = web.AppRunner(app, shutdown_timeout=_STOP_SECONDS_MAX)
    await runner.setup()
    assert runner.server is not None, "the runner was set up"
    app[_FRONT].stand_before(runner.server)
    make_socket = partial(
        HttpSocket,
        runner.server,
        app[_SOCKETS],
        access_log=None,
        keepalive_timeout=limits.http_keep_alive_seconds,
        max_field_size=limits.http_header_field_size_bytes_max,
        max_headers=limits.http_header_field_count_max,
    )
    try:
        listener = await asyncio.get_running_loop().create_server(make_socket, host, port, backlog=_BACKLOG_COUNT)
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


def _within_the_system(limits: Limits) -> Limits:
    """The same with as many sockets as the system lets the process open, which is told."""
    spare_count = _SPARE_FILE_COUNT + limits.file_download_count_max + limits.file_upload_count_max
    wanted = limits.connection_count_max + limits.http_connection_count_max + spare_count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= wanted:
        return limits
    socket_count = max(soft // 2, soft - spare_count)
    http_count = min(limits.http_connection_count_max, max(1, socket_count // 4))
    count = min(limits.connection_count_max, max(1, socket_count - http_count))
    _log.warning("%d connections at most: the system allows %d open files (ulimit -n)", count, soft)
    return msgspec.structs.replace(limits, connection_count_max=count, http_connection_count_max=http_count)


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
            return web.Response(text="reactive-engine is running.\n", headers=_PAGE_HEADERS)
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
""",
            headers=_PAGE_HEADERS,
        )

    return front_page
