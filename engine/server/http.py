"""The door for requests that ask once: the HTTP API of the Convex clients.

Invariants
  1. What a function does, its failures included, is status 200 with `status`, `logLines`, and `value` or
     `errorMessage`; everything else is another status with a JSON body of `code` and `message`.
  2. Every plain number in a value has a decimal point or exponent: the PyPI HTTP client demands it.
  3. A mutation or action that was started goes on when the client goes away.
  4. The body of a shared result is made once, and kept with it.

HTTP mutations have no request id, so nothing makes a resent one apply once.
"""

import asyncio
import logging
from collections.abc import Awaitable
from typing import Literal, Protocol, TypeVar

import msgspec
from aiohttp import ClientPayloadError, web
from msgspec import Raw

from engine.errors import (
    AuthenticationFailed,
    EngineClosed,
    Forbidden,
    FunctionNotFound,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    Overloaded,
    RateLimited,
    RequestError,
    StorageFull,
)
from engine.identity import Identity
from engine.limits import Limits
from engine.server.answers import JsonAnswer
from engine.server.origins import Origins
from engine.sync import protocol
from engine.sync.backend import ActionOutcome, MutationOutcome, Verified
from engine.sync.protocol import Failure, Result
from engine.values import json_with_decimal_points, to_lossy_json

_log = logging.getLogger("engine.server")

Kind = Literal["query", "mutation", "action"]
_Body = TypeVar("_Body")

BROKEN_BODY = (web.RequestPayloadError, ClientPayloadError, ConnectionError)  # what aiohttp raises while it is read

_NO_ARGUMENTS = b"{}"
_CODE_BY_STATUS = {404: "NotFound", 405: "MethodNotAllowed", 408: "RequestTimeout", 413: "PayloadTooLarge"}
_RETRYABLE_BY_CODE = {kind.code: kind for kind in (Overloaded, StorageFull, EngineClosed)}


class HttpResult(Result, Protocol):
    """The result of a query; it may be shared, and asked for again."""

    http_plain: bytes | None  # the body of an answer in plain JSON; None until the first one
    http_encoded: bytes | None  # the same with special values encoded


class HttpBackend(Protocol):
    """What HTTP requests ask of the engine. Failures of functions are in the outcomes; refusals may be raised."""

    async def http_query(
        self,
        path: str,
        arguments: bytes,
        identity: Identity | None,
        at_ts: int | None = None,
        *,
        is_admin: bool = False,
    ) -> HttpResult:
        """At the published timestamp, or at one that `retain_snapshot` gave; `RequestError` if it is kept no more."""

    async def http_mutation(
        self, path: str, arguments: bytes, identity: Identity | None, *, is_admin: bool = False
    ) -> MutationOutcome:
        """Answered after its commit."""

    async def http_action(
        self, path: str, arguments: bytes, identity: Identity | None, *, is_admin: bool = False
    ) -> ActionOutcome: ...

    async def explain(self, path: str, arguments: bytes, identity: Identity | None) -> msgspec.Struct:
        """What one run of a query does; `FunctionNotFound`, `InvalidArgument`."""

    async def profile(self, seconds: float) -> msgspec.Struct:
        """Where the loop's time goes, from now on for so long; `Overloaded`."""

    def function_kind(self, path: str, *, is_admin: bool = False) -> Kind | None:
        """The kind of a function, for admins of internal ones too; None if there is none of this path."""

    def retain_snapshot(self) -> int:
        """The published timestamp, kept readable for `snapshot_retained_seconds`."""

    def authenticate_header(self, authorization: str) -> Awaitable[Verified]:
        """Who an `Authorization` header proves to be; raises `AuthenticationFailed`."""


class _Ask(msgspec.Struct, frozen=True, rename="camel"):
    """The body of a request that runs one function."""

    path: str
    args: Raw = Raw(_NO_ARGUMENTS)
    format: str | None = None
    ts: str | None = None
    component_path: str | None = None


class _Batch(msgspec.Struct, frozen=True):
    queries: list[_Ask]


class _Run(msgspec.Struct, frozen=True):
    """The body of `/api/run/…`, which has the path in its address."""

    args: Raw = Raw(_NO_ARGUMENTS)
    format: str | None = None


class _Span(msgspec.Struct, frozen=True):
    """The body of `/api/profile`."""

    seconds: float


class HttpDoor:
    """The handlers under `/api/`."""

    def __init__(self, backend: HttpBackend, limits: Limits, origins: Origins) -> None:
        self._backend, self._limits, self._origins = backend, limits, origins

    async def query(self, request: web.Request) -> web.Response:
        return await self._one(request, "query")

    async def mutation(self, request: web.Request) -> web.Response:
        return await self._one(request, "mutation")

    async def action(self, request: web.Request) -> web.Response:
        return await self._one(request, "action")

    async def function(self, request: web.Request) -> web.Response:
        """Any kind of function, for admins."""
        ask = _decode(await self.body(request), _Ask)
        verified = await self._verify_admin(request)
        kind = self._kind_of(ask.path, is_admin=True)
        return JsonAnswer(await self._answer(ask, kind, verified.identity, is_admin=True))

    async def explain(self, request: web.Request) -> web.Response:
        """What one run of a query does, for admins."""
        ask = _decode(await self.body(request), _Ask)
        verified = await self._verify_admin(request)
        explanation = await self._backend.explain(ask.path, self._arguments(ask.args), verified.identity)
        return JsonAnswer(msgspec.json.encode(explanation))

    async def profile(self, request: web.Request) -> web.Response:
        """Where the loop's time goes, for admins; answered when the span is over."""
        await self._verify_admin(request)
        seconds, seconds_max = _decode(await self.body(request), _Span).seconds, self._limits.profile_seconds_max
        if not 0 < seconds <= seconds_max:
            raise InvalidArgument(
                f"seconds: {seconds:g}; more than 0 and at most {seconds_max} are possible. "
                "Ask for less at once, or raise limits.profile_seconds_max."
            )
        return JsonAnswer(msgspec.json.encode(await self._backend.profile(seconds)))

    async def run(self, request: web.Request) -> web.Response:
        """A function whose path is in the address: `/api/run/live/quiz/join` is `live/quiz:join`."""
        run = _decode(await self.body(request) or b"{}", _Run)
        module, _, name = request.match_info["path"].rpartition("/")
        path = f"{module}:{name}" if module else name
        ask = _Ask(path=path, args=run.args, format=run.format)
        return JsonAnswer(await self._answer(ask, self._kind_of(path), await self.identity(request)))

    async def query_by_address(self, request: web.Request) -> web.Response:
        """`GET /api/query?path=…&args=…&format=…`"""
        parameters = request.query
        if "path" not in parameters:
            raise InvalidArgument("path: missing. Ask for /api/query?path=chat:get_messages&args={…}.")
        args = _decode(parameters.get("args", "{}").encode(), Raw)
        ask = _Ask(path=parameters["path"], args=args, format=parameters.get("format"))
        return JsonAnswer(await self._answer(ask, "query", await self.identity(request)))

    async def query_ts(self, request: web.Request) -> web.Response:
        """A timestamp for several queries that are to see one snapshot."""
        return web.json_response({"ts": protocol.encode_timestamp(self._backend.retain_snapshot())})

    async def query_at_ts(self, request: web.Request) -> web.Response:
        ask = _decode(await self.body(request), _Ask)
        if ask.ts is None:
            raise InvalidArgument("ts: missing. Ask /api/query_ts for one.")
        at_ts = protocol.decode_timestamp(ask.ts)
        return JsonAnswer(await self._answer(ask, "query", await self.identity(request), at_ts))

    async def query_batch(self, request: web.Request) -> web.Response:
        """Several queries at one snapshot."""
        batch = _decode(await self.body(request), _Batch)
        count_max = self._limits.query_count_max
        if len(batch.queries) > count_max:
            raise LimitExceeded(
                "queries of one batch",
                used=len(batch.queries),
                allowed=count_max,
                remedy="Ask for fewer at once, or raise limits.query_count_max.",
            )
        identity = await self.identity(request)
        at_ts = self._backend.retain_snapshot()
        answers = [await self._answer(ask, "query", identity, at_ts) for ask in batch.queries]
        return JsonAnswer(b'{"results":[' + b",".join(answers) + b"]}")

    async def debug_event(self, request: web.Request) -> web.Response:
        """Telemetry of clients: accepted, not kept."""
        return web.Response()

    # -- one function ----------------------------------------------------------------------------------------------

    async def _one(self, request: web.Request, kind: Kind) -> web.Response:
        ask = _decode(await self.body(request), _Ask)
        return JsonAnswer(await self._answer(ask, kind, await self.identity(request)))

    async def _answer(
        self, ask: _Ask, kind: Kind, identity: Identity | None, at_ts: int | None = None, *, is_admin: bool = False
    ) -> bytes:
        """The response body of one function that was run."""
        is_lossy = _is_lossy(ask.format)
        if ask.component_path:  # components are for admins of the reference server; there are none here
            error = FunctionNotFound(f"{ask.component_path}/{ask.path}", kind)
            return _failed(f"{error.code}: {error}", None, ())
        arguments = self._arguments(ask.args)
        outcome: MutationOutcome | ActionOutcome
        if kind == "query":
            result = await self._backend.http_query(ask.path, arguments, identity, at_ts, is_admin=is_admin)
            return _body_of_result(result, is_lossy=is_lossy)
        if kind == "mutation":
            outcome = await self._backend.http_mutation(ask.path, arguments, identity, is_admin=is_admin)
        else:
            outcome = await self._backend.http_action(ask.path, arguments, identity, is_admin=is_admin)
        return _body_of(outcome, is_lossy=is_lossy)

    def _kind_of(self, path: str, *, is_admin: bool = False) -> Kind:
        return self._backend.function_kind(path, is_admin=is_admin) or "query"  # as a query it is then not found

    def _arguments(self, args: Raw) -> bytes:
        """The JSON of the arguments object, which clients send bare (PyPI) or in an array (npm)."""
        text = bytes(args)
        if text.startswith(b"["):
            text = protocol.unwrap_arguments(text)
        if len(text) > self._limits.arguments_size_bytes_max:
            raise LimitExceeded(
                "bytes of arguments",
                used=len(text),
                allowed=self._limits.arguments_size_bytes_max,
                remedy="Send less at once, or raise limits.arguments_size_bytes_max.",
            )
        return _NO_ARGUMENTS if text == b"null" else text

    # -- the request -----------------------------------------------------------------------------------------------

    async def body(self, request: web.Request) -> bytes:
        """The whole body, which arrives in time."""
        content = request.content
        try:
            if content.is_eof():  # it came with the header, as most do: a timer and the task's turns are saved
                body = content.read_nowait()
                if len(body) > request.client_max_size:
                    raise web.HTTPRequestEntityTooLarge(request.client_max_size)
                return body
            async with asyncio.timeout(self._limits.http_body_seconds_max):
                return await request.read()
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(text="The body took too long to arrive.") from error
        except BROKEN_BODY as error:
            raise web.HTTPBadRequest(text="The body did not arrive whole, or is not encoded as it says.") from error

    async def identity(self, request: web.Request) -> Identity | None:
        """Who asks, by the header `Authorization`; None without one. Raises AuthenticationFailed."""
        verified = await self._verify(request)
        return None if verified is None else verified.identity

    async def _verify_admin(self, request: web.Request) -> Verified:
        verified = await self._verify(request)
        if verified is None or not verified.is_admin:
            raise Forbidden(f"{request.path} is for admins: send `Authorization: Convex <admin key>`.")
        return verified

    async def _verify(self, request: web.Request) -> Verified | None:
        authorization = request.headers.get("Authorization")
        if authorization is None:
            return None
        verified = await self._backend.authenticate_header(authorization)
        if verified.is_admin and not self._origins.may_use_admin_key(request):
            raise AuthenticationFailed("Admin keys are not accepted from pages of this origin.")
        return verified


def error_response(error: BaseException) -> web.Response:
    """What a request is told that did not come as far as a function (1)."""
    match error:
        case web.HTTPException():
            code = _CODE_BY_STATUS.get(error.status, "BadRequest")
            response = _error(error.status, code, error.text or error.reason)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            return response
        case AuthenticationFailed():
            return _error(401, error.code, str(error))
        case Forbidden():
            return _error(403, error.code, str(error))
        case RateLimited():
            response = _error(429, error.code, str(error))
            response.headers["Retry-After"] = str(-(-error.retry_after_ms // 1000))  # whole seconds, rounded up
            return response
        case Overloaded() | EngineClosed():
            return _error(503, error.code, str(error))
        case RequestError():
            return _error(400, error.code, str(error))
        case ConnectionError():  # who asked is gone, and reads no answer
            return _error(400, "BadRequest", "The connection broke.")
        case _:
            _log.error("a request failed", exc_info=error)
            return _error(500, "InternalServerError", "The server failed; its log says why.")


def _body_of_result(result: HttpResult, *, is_lossy: bool) -> bytes:
    """The same as `_body_of`, made once (4)."""
    body = result.http_plain if is_lossy else result.http_encoded
    if body is None:
        body = _body_of(result, is_lossy=is_lossy)
        if is_lossy:
            result.http_plain = body
        else:
            result.http_encoded = body
    return body


def _body_of(outcome: Result | MutationOutcome | ActionOutcome, *, is_lossy: bool) -> bytes:
    """What is told of a function that was run. Raises for what is no affair of the function's."""
    log_lines = msgspec.json.encode(outcome.log_lines)
    if outcome.failure is None:
        assert outcome.value is not None, "a function that succeeded has a value"
        value = _in_format(outcome.value, is_lossy=is_lossy)
        return b'{"status":"success","value":%b,"logLines":%b}' % (value, log_lines)
    _raise_unless_of_function(outcome.failure)
    data = outcome.failure.data
    data = None if data is None else _in_format(data, is_lossy=is_lossy)
    return _failed(outcome.failure.message, data, outcome.log_lines)


def _raise_unless_of_function(failure: Failure) -> None:
    """Failures that are not the function's have a status of their own (1)."""
    if failure.code in _RETRYABLE_BY_CODE:
        raise _RETRYABLE_BY_CODE[failure.code](failure.message)
    if failure.code == InternalError.code:
        raise InternalError(failure.message)


def _is_lossy(name: str | None) -> bool:
    match name:
        case None | "json":
            return True
        case "convex_encoded_json" | "convex_json":
            return False
        case _:
            raise InvalidArgument(f"format: expected json or convex_encoded_json, got {name[:40]!r}")


def _in_format(payload: bytes, *, is_lossy: bool) -> bytes:
    return json_with_decimal_points(to_lossy_json(payload) if is_lossy else payload)  # 2


def _failed(message: str, data: bytes | None, log_lines: tuple[str, ...]) -> bytes:
    return b'{"status":"error","errorMessage":%b,%b"logLines":%b}' % (
        msgspec.json.encode(message),
        b"" if data is None else b'"errorData":%b,' % data,
        msgspec.json.encode(log_lines),
    )


def _decode(body: bytes, body_type: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(body, type=body_type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"the body is not what was expected: {error}") from error


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"code": code, "message": message}, status=status)
