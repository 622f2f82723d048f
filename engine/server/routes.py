"""The door for the app's own HTTP routes: what the engine's router does not know is looked up in the newest code.

Invariants
  1. Routes follow a reload: each request finds the routes of the code that is live when it comes.
  2. A body is read whole before anything runs: in time, and not past `route_body_size_bytes_max`.
  3. A route that was started goes on when the client goes away.

`/openapi.json` describes them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from aiohttp import web

from engine.functions.openapi import openapi_document
from engine.functions.registry import Registry
from engine.functions.requests import Answer, Headers, Request
from engine.functions.routes import Found, Route
from engine.identity import Identity
from engine.limits import Limits
from engine.server.http import HttpDoor
from engine.server.proxies import TrustedProxies


class RouteBackend(Protocol):
    """What requests to the app's routes ask of the engine."""

    @property
    def registry(self) -> Registry:
        """The functions and routes of the newest code."""

    async def run_route(
        self, route: Route, path_texts: Mapping[str, str], request: Request, identity: Identity | None
    ) -> Answer:
        """Raises `RequestError`; what else goes wrong in a route is its answer."""


class RouteDoor:
    """The app's routes on one server."""

    def __init__(self, backend: RouteBackend, http: HttpDoor, limits: Limits, proxies: TrustedProxies) -> None:
        self._backend, self._http, self._limits, self._proxies = backend, http, limits, proxies
        self._document: tuple[Registry, bytes] | None = None  # as it was last asked for, and of which code

    def find(self, request: web.Request) -> Found | None:
        """What the app has at the address of a request; None if the address is the engine's, or nobody's."""
        if not isinstance(request.match_info.http_exception, web.HTTPNotFound):
            return None
        return self._backend.registry.routes.find(request.method, request.rel_url.raw_path)  # 1

    async def handle(self, found: Found, request: web.Request) -> web.Response:
        """Answer a request to one of the app's addresses."""
        route = found.route
        if route is None:
            raise web.HTTPMethodNotAllowed(request.method, found.methods)
        # a sender that signs has no token, and what it puts into this header is its own affair
        identity = None if route.webhook is not None else await self._http.identity(request)
        query: dict[str, tuple[str, ...]] = {name: tuple(request.query.getall(name)) for name in request.query}
        asked = Request(
            method=request.method,
            path=request.path,
            headers=Headers(request.headers.items()),
            query=MappingProxyType(query),
            client_address=self._proxies.client_address(request),
            body=await self._body(request),
        )
        answer = await self._backend.run_route(route, found.path_texts, asked, identity)
        response = web.Response(status=answer.status, body=answer.body)
        for name, value in answer.headers:
            response.headers.add(name, value)
        return response

    async def _body(self, request: web.Request) -> bytes:
        allowed = self._limits.route_body_size_bytes_max
        try:
            return await self._http.body(request.clone(client_max_size=allowed))  # 2
        except web.HTTPRequestEntityTooLarge as error:
            error.text = (
                f"The body has more than {allowed:,} bytes. Send less, or raise limits.route_body_size_bytes_max."
            )
            raise

    async def openapi(self, request: web.Request) -> web.Response:
        """The description of the app's routes and public functions."""
        registry = self._backend.registry
        if self._document is None or self._document[0] is not registry:
            self._document = (registry, openapi_document(registry))
        return web.Response(body=self._document[1], content_type="application/json")
