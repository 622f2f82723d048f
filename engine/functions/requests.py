"""What a route is given and what it gives back: `ctx.request`, `Response`, and the bytes of an answer.

Invariants
  1. An answer is whole and checked before any of it is sent: a status that HTTP knows, headers that cannot break out of
     their line or contradict the body.
  2. Values go out as plain JSON: ids as text, int64 as decimal text, bytes as base64.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

import msgspec

from engine.errors import AppError, InvalidResult, LimitExceeded, RequestError
from engine.limits import Limits
from engine.values import compile_encoder, encode_value, to_lossy_json

if TYPE_CHECKING:
    from engine.functions.outcomes import Outcome

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t -~]*")
_HEADERS_OF_THE_SERVER = frozenset(
    ("connection", "content-length", "keep-alive", "trailer", "transfer-encoding", "upgrade")
)
_JSON, _TEXT, _BYTES = "application/json", "text/plain; charset=utf-8", "application/octet-stream"
_BODILESS_STATUSES = (204, 304)


class Headers(Mapping[str, str]):
    """The headers of a request, by name in any case; one that came several times is joined by ", "."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._value_by_name: dict[str, str] = {}
        for name, value in pairs:
            name = name.lower()
            before = self._value_by_name.get(name)
            self._value_by_name[name] = value if before is None else f"{before}, {value}"

    def __getitem__(self, name: str) -> str:
        return self._value_by_name[name.lower()]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._value_by_name

    def __iter__(self) -> Iterator[str]:
        """The names, in lower case."""
        return iter(self._value_by_name)

    def __len__(self) -> int:
        return len(self._value_by_name)


class Request(msgspec.Struct, frozen=True, eq=False):
    """The HTTP request that a route answers."""

    method: str  # GET, POST, …; HEAD where a `http.get` answers it
    path: str  # decoded
    headers: Headers
    query: Mapping[str, tuple[str, ...]]  # the texts of each name, in order
    client_address: str | None  # an IP address, through `trusted_proxies`; None if it cannot be known
    body: bytes  # as it came


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What a route returns to say more than a value: `Response(status=303, headers={"Location": "/"})`.

    `body`: text, bytes, or any other value, which goes out as JSON; None for nothing. A header that is to be sent
    several times (`Set-Cookie`) has a list of values.
    """

    status: int = 200
    headers: Mapping[str, str | list[str]] = {}
    body: Any = None


class Answer(msgspec.Struct, frozen=True):
    """A response as it is sent, and kept for a delivery that comes again."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


def compile_answer_encoder(annotation: Any, *, limits: Limits, size_limit: str) -> Callable[[Any], bytes]:
    """From what a route returns to its encoded answer; `annotation` is that of its return value.

    It raises InvalidResult for what does not fit, LimitExceeded past the limit of this name.
    """
    size_bytes_max = getattr(limits, size_limit)
    values, may_respond = split_response(annotation)
    encode = _refuse_value if values is NO_VALUES else compile_encoder(values, limits=limits)

    def encode_answer(value: Any) -> bytes:
        if isinstance(value, Response) and may_respond:
            answer = _checked(value, limits)
        else:
            payload = encode(value)
            answer = (
                Answer(204, [], b"")
                if value is None
                else Answer(200, [("Content-Type", _JSON)], to_lossy_json(payload))
            )
        encoded = msgspec.msgpack.encode(answer)
        if len(encoded) > size_bytes_max:
            raise LimitExceeded(
                "size of an answer in bytes",
                used=len(encoded),
                allowed=size_bytes_max,
                remedy=f"Answer with less, or raise limits.{size_limit}.",
            )
        return encoded

    return encode_answer


def decode_answer(encoded: bytes) -> Answer:
    return msgspec.msgpack.decode(encoded, type=Answer)


def answer_of(outcome: "Outcome") -> Answer:
    """How the run of a route is answered; raises the RequestError that it ended with."""
    failure = outcome.failure
    if failure is None:
        assert outcome.value is not None
        return decode_answer(outcome.value)
    if isinstance(failure.error, RequestError):
        raise failure.error.with_traceback(None)
    body: dict[str, Any] = {"code": "InternalServerError", "message": failure.message}
    if isinstance(failure.error, AppError):
        assert failure.data is not None, "an AppError has data"
        body |= {"code": failure.code, "data": msgspec.Raw(to_lossy_json(failure.data))}
    status = 400 if "data" in body else 500
    return Answer(status, [("Content-Type", _JSON)], msgspec.json.encode(body))


NO_VALUES = object()


def split_response(annotation: Any) -> tuple[Any, bool]:
    """The annotation of the values that are no Response (or NO_VALUES), and whether it may be a Response."""
    if annotation is Response:
        return NO_VALUES, True
    if annotation is Any or get_origin(annotation) not in (Union, UnionType):
        return annotation, annotation is Any
    parts = get_args(annotation)
    values = tuple(part for part in parts if part is not Response)
    return Union[values], len(values) < len(parts)  # noqa: UP007 - its parts are known at run time only


def _refuse_value(value: Any) -> bytes:
    raise InvalidResult(f"expected a Response, got a {type(value).__name__}")


def _checked(response: Response, limits: Limits) -> Answer:
    """Invariant 1."""
    status, body = response.status, response.body
    if type(status) is not int or not 200 <= status <= 599:
        raise InvalidResult(f"Response: status={status!r}; 200 to 599 can be answered.")
    if body is not None and status in _BODILESS_STATUSES:
        raise InvalidResult(f"Response: status={status} has no body; leave `body` out, or answer with another status.")
    headers: list[tuple[str, str]] = []
    for name, given in response.headers.items():
        for value in given if isinstance(given, list) else [given]:
            _check_header(name, value)
            headers.append((name, value))
    match body:
        case None:
            content_type, raw = None, b""
        case str():
            content_type, raw = _TEXT, body.encode(errors="backslashreplace")
        case bytes():
            content_type, raw = _BYTES, body
        case _:
            content_type, raw = _JSON, to_lossy_json(encode_value(body, limits))
    if content_type is not None and not any(name.lower() == "content-type" for name, _ in headers):
        headers.append(("Content-Type", content_type))
    return Answer(status, headers, raw)


def _check_header(name: object, value: object) -> None:
    if not isinstance(name, str) or _HEADER_NAME.fullmatch(name) is None:
        raise InvalidResult(f"Response: {name!r} is no name of a header.")
    if name.lower() in _HEADERS_OF_THE_SERVER:
        raise InvalidResult(f"Response: the header {name} is the server's to set.")
    if not isinstance(value, str) or _HEADER_VALUE.fullmatch(value) is None:
        raise InvalidResult(f"Response: the header {name} has a value that is not printable ASCII; percent-encode it.")
