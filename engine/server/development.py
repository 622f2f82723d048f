"""What only `engine dev` serves: log-ins for made-up users, and why queries ran again.

    curl http://127.0.0.1:3210/dev/token -H 'Content-Type: application/json' -d '{"subject": "alice", "name": "Alice"}'

Who may ask is `auth.development`'s to say; here it is only spoken over HTTP. The content type is asked for because a
browser then asks us first (CORS) before a foreign page may send anything.
"""

import json
from collections.abc import Sequence

import msgspec
from aiohttp import web

from engine.auth.development import DevelopmentIssuer, may_issue, parse_token_request
from engine.errors import Forbidden, InvalidArgument, RequestError
from engine.observe.pushes import PushTrace
from engine.server.proxies import peer_of

Routes = Sequence[web.RouteDef]

TOKEN_PATH = "/dev/token"  # noqa: S105 - an address
PUSHES_PATH = "/dev/pushes"
_STATUS_BY_CODE = {Forbidden.code: 403, InvalidArgument.code: 400}


def development_routes(issuer: DevelopmentIssuer, trace: PushTrace) -> Routes:
    """The routes that `engine dev` adds."""

    async def give_token(request: web.Request) -> web.Response:
        try:
            may_issue(peer_of(request), request.headers)
            if request.content_type != "application/json":
                raise InvalidArgument("Send JSON, with the header `Content-Type: application/json`.")
            token = issuer.issue(parse_token_request(await request.read()))
        except RequestError as error:
            return _refusal(error)
        return web.json_response({"token": token}, headers={"Cache-Control": "no-store"})

    async def tell_pushes(request: web.Request) -> web.Response:
        try:
            may_issue(peer_of(request), request.headers)
        except RequestError as error:
            return _refusal(error)
        pushes = [
            {"query": push.path, "arguments": json.loads(push.arguments), "isChanged": push.is_changed}
            | msgspec.to_builtins(push.cause)
            for push in trace.pushes
        ]
        return web.json_response(pushes, headers={"Cache-Control": "no-store"})

    return [web.post(TOKEN_PATH, give_token), web.get(PUSHES_PATH, tell_pushes)]


def _refusal(error: RequestError) -> web.Response:
    body = {"code": error.code, "message": str(error)}
    return web.json_response(body, status=_STATUS_BY_CODE.get(error.code, 400))
