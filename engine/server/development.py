"""`POST /dev/token`: log-ins for made-up users while an app is being written; only `engine dev` serves it.

    curl http://127.0.0.1:3210/dev/token -H 'Content-Type: application/json' -d '{"subject": "alice", "name": "Alice"}'

Who may ask is `auth.development`'s to say; here it is only spoken over HTTP. The content type is asked for because a
browser then asks us first (CORS) before a foreign page may send anything.
"""

from collections.abc import Sequence

from aiohttp import web

from engine.auth.development import DevelopmentIssuer, may_issue, parse_token_request
from engine.errors import Forbidden, InvalidArgument, RequestError

Routes = Sequence[web.RouteDef]

TOKEN_PATH = "/dev/token"  # noqa: S105 - an address
_STATUS_BY_CODE = {Forbidden.code: 403, InvalidArgument.code: 400}


def development_routes(issuer: DevelopmentIssuer) -> Routes:
    """The routes that `engine dev` adds."""

    async def give_token(request: web.Request) -> web.Response:
        try:
            may_issue(_peer_of(request), request.headers)
            if request.content_type != "application/json":
                raise InvalidArgument("Send JSON, with the header `Content-Type: application/json`.")
            token = issuer.issue(parse_token_request(await request.read()))
        except RequestError as error:
            body = {"code": error.code, "message": str(error)}
            return web.json_response(body, status=_STATUS_BY_CODE.get(error.code, 400))
        return web.json_response({"token": token}, headers={"Cache-Control": "no-store"})

    return [web.post(TOKEN_PATH, give_token)]


def _peer_of(request: web.Request) -> str | None:
    """The address at the other end of the socket, never one from a header."""
    peer = None if request.transport is None else request.transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else None
