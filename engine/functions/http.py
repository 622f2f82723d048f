"""The decorators of HTTP routes, `@http.get("/api/v1/live/status/{stream_id}")`, and the app's routes in its modules.

No route of an app stands behind an address of the engine itself. What a route is: `routes.py`.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import msgspec

from engine.errors import RegistryError, SchemaError
from engine.functions.arguments import compile_signature
from engine.functions.registry import Function, kind_of
from engine.functions.requests import compile_answer_encoder, decode_answer
from engine.functions.routes import Method, Route, is_parameter, segments_of
from engine.functions.settings import Settings
from engine.functions.webhooks import Webhook
from engine.limits import Limits

F = TypeVar("F", bound=Callable[..., Any])

# The engine's own addresses; a last `*` stands for one segment or more. tests/server/test_routes.py holds it complete.
ENGINE_PATHS = (
    "/api/query",
    "/api/query_ts",
    "/api/query_at_ts",
    "/api/query_batch",
    "/api/mutation",
    "/api/action",
    "/api/function",
    "/api/explain",
    "/api/profile",
    "/api/run/*",
    "/api/sync",
    "/api/{version}/sync",
    "/api/debug_event",
    "/api/storage/upload",
    "/api/storage/{key}",
    "/version",
    "/instance_version",
    "/instance_name",
    "/openapi.json",
    "/dev/*",
)
_DECLARED = "__engine_routes__"
_LITERAL = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@-]+")
_PARAMETER = re.compile(r"\{([a-z][a-z0-9_]*)\}")


class DeclaredRoute(msgspec.Struct, frozen=True):
    """What a decorator says of a route."""

    method: Method
    path: str
    webhook: Webhook | None


class Http:
    """The decorators of routes. A route is given an `ActionCtx` with `ctx.request`.

    What it returns goes out as JSON, None as status 204, and a `Response` as it says.
    """

    def get(self, path: str, /) -> Callable[[F], F]:
        """Answers HEAD too."""
        return _declare("GET", path)

    def post(self, path: str, /, *, webhook: Webhook | None = None) -> Callable[[F], F]:
        """`webhook`: only deliveries that their sender has signed come through, each once."""
        return _declare("POST", path, webhook)

    def put(self, path: str, /) -> Callable[[F], F]:
        return _declare("PUT", path)

    def patch(self, path: str, /) -> Callable[[F], F]:
        return _declare("PATCH", path)

    def delete(self, path: str, /) -> Callable[[F], F]:
        return _declare("DELETE", path)


http = Http()


def routes_of(
    modules: Mapping[str, ModuleType],
    *,
    limits: Limits,
    tags: Callable[[str], str],
    settings: type[Settings] | None = None,
) -> list[Route]:
    """The routes of the app's modules; `modules` maps `live/quiz` to the module. `settings` is the app's class."""
    routes = []
    for module_path, module in modules.items():
        for name, value in vars(module).items():
            # a function that another module imports is a route where it is defined
            if not inspect.isfunction(value) or value.__module__ != module.__name__:
                continue
            for declared in getattr(value, _DECLARED, ()):
                path = f"{module_path}:{name}"
                if (kind := kind_of(value)) is not None:
                    raise RegistryError(
                        f"{path}: @http.{declared.method.lower()} and @{kind} stand above one function. A route is an "
                        f"action by itself: leave @{kind} out, or write a route that calls it."
                    )
                if declared.webhook is not None:
                    declared.webhook.check(path, limits, settings)
                routes.append(_compile(path, value, declared, limits, tags))
    return routes


def _declare(method: Method, path: str, webhook: Webhook | None = None) -> Callable[[F], F]:
    declared = DeclaredRoute(method, path, webhook)
    _check_path(declared)

    def mark(function: F) -> F:
        if not callable(function):
            raise RegistryError(f"@http.{method.lower()}({path!r}) stands above a function, not above {function!r}.")
        setattr(function, _DECLARED, (*getattr(function, _DECLARED, ()), declared))
        return function

    return mark


def _check_path(declared: DeclaredRoute) -> None:
    where = f"@http.{declared.method.lower()}({declared.path!r})"
    if type(declared.path) is not str or not declared.path.startswith("/"):
        raise RegistryError(f"{where}: a path begins with a slash, as in '/hooks/payments'.")
    if declared.webhook is not None and not isinstance(declared.webhook, Webhook):
        raise RegistryError(f'{where}: webhook={declared.webhook!r}; Webhook(secret="payments_secret") is one.')
    segments = segments_of(declared.path)
    for segment in segments:
        if _PARAMETER.fullmatch(segment) is None and (_LITERAL.fullmatch(segment) is None or segment in (".", "..")):
            raise RegistryError(
                f"{where}: {segment!r} is no segment of a path. It is a name in braces, in snake_case, or text of "
                "letters, digits and -._~!$&'()*+,;=:@; nothing stands after the last slash."
            )
    for path in ENGINE_PATHS:
        if _is_behind(segments, segments_of(path)):
            raise RegistryError(
                f"{where}: the engine itself answers at {path}. Choose another path, for example under /app/."
            )


def _is_behind(segments: Sequence[str], engine_segments: Sequence[str]) -> bool:
    """Whether the engine's own route takes every address of an app's route."""
    if engine_segments[-1] == "*":
        engine_segments = engine_segments[:-1]
        if len(segments) <= len(engine_segments):
            return False
        segments = segments[: len(engine_segments)]
    return len(segments) == len(engine_segments) and all(
        is_parameter(own) or own == segment for own, segment in zip(engine_segments, segments, strict=True)
    )


def _compile(
    path: str, function: Callable[..., Any], declared: DeclaredRoute, limits: Limits, tags: Callable[[str], str]
) -> Route:
    signature = compile_signature(function, limits=limits, tags=tags, keeps_ints=True)
    size_limit = "result_size_bytes_max" if declared.webhook is None else "webhook_answer_size_bytes_max"
    try:
        encode = compile_answer_encoder(signature.return_type, limits=limits, size_limit=size_limit)
    except SchemaError as error:
        raise RegistryError(f"{path}: what it returns: {error}") from error
    compiled = Function(
        path=path,
        kind="action",
        is_internal=False,
        callable=function,
        signature=signature,
        encode_result=encode,
        decode_result=decode_answer,
        cron=None,
    )
    return Route(declared.method, declared.path, compiled, declared.webhook)
