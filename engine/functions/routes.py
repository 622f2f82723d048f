"""HTTP routes of the app: which of them answers a request, and its arguments in that request.

    path parameters    the names in braces
    body               the parameter `body`, from JSON
    query parameters   all others; a list takes a name that is given several times

Invariants
  1. No two routes meet: the same method and shape.
  2. A literal segment goes before a parameter, from the left: `/users/me` is never the user `me`.
  3. Text becomes a value by its annotation alone, strictly: `1` is no bool, and `1.0` no int.

Declared in `http.py`. Knows nothing of sockets (`server/routes.py`) and runs nothing by itself.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import msgspec

from engine.errors import InvalidArgument, RegistryError
from engine.functions.arguments import Arguments, decode_json
from engine.functions.requests import Request
from engine.values.shapes import (
    Bool,
    Bytes,
    Constrained,
    Float,
    Int,
    Int64Shape,
    ListShape,
    LiteralShape,
    Null,
    Shape,
    Str,
    UnionShape,
    fields_by_spelling,
)
from engine.values.wire import Mismatch, WireValue, int_to_wire

if TYPE_CHECKING:
    from engine.functions.registry import Function
    from engine.functions.webhooks import Webhook

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]

_BODY = "body"
_METHODS_WITH_BODY = ("POST", "PUT", "PATCH")
_INT = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_SCALARS = (Bool, Int, Int64Shape, Float, Str, LiteralShape)


class Route:
    """One route, compiled. RegistryError for parameters that no request could fill."""

    def __init__(self, method: Method, path: str, function: "Function", webhook: "Webhook | None" = None) -> None:
        self.method, self.path, self.function, self.webhook = method, path, function, webhook
        self.segments = segments_of(path)
        self.field_by_name = {field.name: field for field in function.signature.fields}
        self.path_names = [segment[1:-1] for segment in self.segments if is_parameter(segment)]
        self.body = self.field_by_name.get(_BODY) if _BODY not in self.path_names else None
        self.query = [field for name, field in self.field_by_name.items() if name not in (*self.path_names, _BODY)]
        # what those without a default are when they are left out, as text could not say it
        self.query_defaults: dict[str, WireValue] = {
            field.name: [] if isinstance(_without_bounds(field.shape), ListShape) else None
            for field in self.query
            if field.is_required and isinstance(_without_bounds(field.shape), ListShape | UnionShape)
        }
        self._query_by_spelling = fields_by_spelling(self.query, where=function.path)
        _check_parameters(self)

    def values_at(self, segments: Sequence[str]) -> dict[str, str] | None:
        """The texts of the path parameters of an address; None if it is not one of this route."""
        if len(segments) != len(self.segments):
            return None
        texts: dict[str, str] = {}
        for own, given in zip(self.segments, segments, strict=True):
            if is_parameter(own) and given:
                texts[own[1:-1]] = given
            elif own != given:
                return None
        return texts

    def bind(self, path_texts: Mapping[str, str], request: Request) -> Arguments:
        """The arguments in a request. Raises InvalidArgument that names the wrong, missing or unknown one."""
        wire: dict[str, WireValue] = {}
        name = ""
        try:
            for name, text in path_texts.items():
                wire[name] = _wire_of(self.field_by_name[name].shape, text)
            for name, texts in request.query.items():
                wire[name] = self._wire_of_query(name, texts)
        except Mismatch as error:
            raise InvalidArgument(str(error.under(name))) from None
        for name, default in self.query_defaults.items():
            if wire.keys().isdisjoint(self.field_by_name[name].spellings):
                wire[name] = default
        if self.body is not None and (request.body or self.body.is_required):
            if not request.body:
                raise InvalidArgument(f"{_BODY}: missing, expected {self.body.shape} as JSON")
            wire[_BODY] = decode_json(request.body, "The values of the body")
        return self.function.signature.from_wire(wire)

    def _wire_of_query(self, name: str, texts: Sequence[str]) -> WireValue:
        field = self._query_by_spelling.get(name)
        if field is None:
            known = ", ".join(field.spellings[0] for field in self.query)
            raise Mismatch(f"unknown in the query of {self.path}, which has {known or 'none'}")
        if isinstance(shape := _without_bounds(field.shape), ListShape):
            return [_wire_of(shape.item, text) for text in texts]
        return _wire_of(shape, texts[0]) if len(texts) == 1 else list(texts)  # the decoder refuses several


class Found(msgspec.Struct, frozen=True):
    """What there is at an address."""

    methods: list[str]  # that are answered there
    route: Route | None  # None: not with the method that was asked for
    path_texts: Mapping[str, str]


class RouteTable:
    """The routes of one version of the app. Immutable."""

    def __init__(self, routes: Iterable[Route] = ()) -> None:
        self.routes = sorted(routes, key=lambda route: [is_parameter(segment) for segment in route.segments])  # 2
        route_by_shape: dict[tuple[str, ...], Route] = {}
        for route in self.routes:
            shape = (route.method, *("{}" if is_parameter(segment) else segment for segment in route.segments))
            other = route_by_shape.setdefault(shape, route)
            if other is not route:
                raise RegistryError(
                    f"{route.function.path} and {other.function.path} are both {route.method} {other.path}. "
                    "Give one of them another path."
                )

    def find(self, method: str, raw_path: str) -> Found | None:
        """What answers at an address, which is percent-encoded; None if nothing does."""
        try:
            segments = [unquote(segment, errors="strict") for segment in raw_path[1:].split("/")]
        except UnicodeDecodeError:
            return None
        at_address = [(route, texts) for route in self.routes if (texts := route.values_at(segments)) is not None]
        if not at_address:
            return None
        methods = {route.method for route, _ in at_address}
        allowed = sorted(methods | {"HEAD"} if "GET" in methods else methods)
        wanted = "GET" if method == "HEAD" else method
        for route, texts in at_address:
            if route.method == wanted:
                return Found(allowed, route, texts)
        return Found(allowed, None, {})


def _check_parameters(route: Route) -> None:
    where, field_by_name = route.function.path, route.field_by_name
    if len(set(route.path_names)) < len(route.path_names):
        raise RegistryError(f"{where}: {route.path!r} has a name twice.")
    for name in route.path_names:
        field = field_by_name.get(name)
        if field is None:
            raise RegistryError(f"{where}: {route.path!r} has {{{name}}}, and there is no parameter of that name.")
        if not field.is_required or not _is_scalar(field.shape):
            raise RegistryError(
                f"{where}: parameter {name!r} stands in the path: it has no default, and is a scalar "
                f"(str, int, float, bool, Literal, Id), not {field.shape}."
            )
    for field in route.query:
        shape = _without_bounds(field.shape)
        if not _is_scalar(shape.item if isinstance(shape, ListShape) else _without_null(shape)):
            raise RegistryError(
                f"{where}: parameter {field.name!r} comes as text in the query: it is a scalar (str, int, float, bool, "
                f"Literal, Id), a scalar or None, or a list of scalars, not {field.shape}. "
                f"What comes as JSON is named `{_BODY}`."
            )
    if route.body is not None and route.method not in _METHODS_WITH_BODY:
        raise RegistryError(f"{where}: a {route.method} request has no body. Rename the parameter `{_BODY}`.")
    if route.body is not None and isinstance(_without_bounds(route.body.shape), Bytes):
        raise RegistryError(f"{where}: the parameter `{_BODY}` comes as JSON. ctx.request.body has the bytes.")


# -- text


def _wire_of(shape: Shape, text: str) -> WireValue:
    """The wire value in a text; for a text that has none of the shape itself, which its decoder refuses (3)."""
    match _without_null(_without_bounds(shape)):
        case Bool():
            return {"true": True, "false": False}.get(text, text)
        case Int() | Int64Shape() if _INT.fullmatch(text):
            return int_to_wire(int(text))
        case LiteralShape(choices) if isinstance(choices[0], int) and _INT.fullmatch(text):
            return int(text)
        case Float() if _FLOAT.fullmatch(text):
            return float(text)
    return text


def _is_scalar(shape: Shape) -> bool:
    return isinstance(_without_bounds(shape), _SCALARS)


def _without_bounds(shape: Shape) -> Shape:
    return shape.inner if isinstance(shape, Constrained) else shape


def _without_null(shape: Shape) -> Shape:
    """The other alternative of a scalar or None; any other shape as it is."""
    if isinstance(shape, UnionShape):
        others = [alternative for alternative in shape.alternatives if not isinstance(alternative, Null)]
        if len(others) == 1:
            return _without_bounds(others[0])
    return shape


# -- paths


def segments_of(path: str) -> list[str]:
    return path[1:].split("/")


def is_parameter(segment: str) -> bool:
    return segment.startswith("{")
