"""Which web pages may use this server: cross-origin rules.

Invariants
  1. No cookie and no other ambient credential ever authenticates anybody here, so any origin may connect until
     `allowed_origins` is set; then only those do, compared whole (scheme, host, port).
  2. A request without an Origin comes from no page: always allowed.
  3. An admin key is taken from a page only if it is listed, or was served by this server itself.
"""

from collections.abc import Iterable, MutableMapping

from aiohttp import web

from engine.errors import Forbidden


class Origins:
    """The rules of one server."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(allowed)  # scheme://host[:port], lower case; empty: any

    def check(self, request: web.Request) -> None:
        """Raises `Forbidden` for a page that is not allowed."""
        if not self._allows(request.headers.get("Origin")):
            raise Forbidden(f"Pages of {request.headers['Origin'][:80]} may not connect: see allowed_origins.")

    def may_use_admin_key(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        if origin is None or origin.lower() in self._allowed:
            return True
        return origin.lower() == f"{request.scheme}://{request.host}".lower()

    def preflight(self, request: web.Request, methods: Iterable[str] = ("GET", "POST")) -> web.Response:
        """The answer to what a browser asks before it sends the request itself."""
        headers = {
            "Access-Control-Allow-Methods": ", ".join((*methods, "OPTIONS")),
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
            "Access-Control-Max-Age": "86400",
        }
        return web.Response(status=204, headers=headers)

    def mark(self, request: web.Request, headers: MutableMapping[str, str]) -> None:
        """Let the page that asked read the response, errors included."""
        origin = request.headers.get("Origin")
        if origin is not None and self._allows(origin):
            headers["Access-Control-Allow-Origin"] = origin
            headers["Vary"] = f"{headers['Vary']}, Origin" if "Vary" in headers else "Origin"

    def _allows(self, origin: str | None) -> bool:
        return origin is None or not self._allowed or origin.lower() in self._allowed
