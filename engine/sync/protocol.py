"""The wire messages of the Convex sync protocol, as tagged structs; only this module knows their names on the wire.

Invariants
  1. What leaves is strict JSON, and every protocol integer is printed as an integer.
  2. A message that official clients can send is never malformed to us because of its arguments: those stay raw, and
     what cannot be decoded in them is the failure of their own request.
  3. A result is encoded once, into a fragment that every subscriber's Transition shares: all that follows
     `{"queryId":N`. The fragment lies in `Result.encoded`.
  4. `errorData` is there exactly if the failure has data (an `AppError`, a rate limit, a cursor that is void),
     `logLines` always, `null` never where clients tell it from absence.

Decoding happens on the loop whatever the size: msgspec holds the interpreter lock, so a thread would not free the
loop, and as arguments are only skipped over, 8 MiB take 5 to 25 ms.
"""

import binascii
import json
import re
from base64 import b64decode
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import UNSET, Raw, UnsetType

from engine.errors import InvalidArgument

CLOSE_NORMAL, CLOSE_GOING_AWAY, CLOSE_PROTOCOL_ERROR, CLOSE_UNSUPPORTED_DATA = 1000, 1001, 1002, 1003
CLOSE_INTERNAL_ERROR, CLOSE_TRY_AGAIN_LATER = 1011, 1013
CLOSE_TOO_BIG = 1009

TIMESTAMP_MAX = 2**63 - 1  # the PyPI client refuses larger ones
_TIMESTAMP_SIZE_BYTES = 8

# Above this a Transition goes to npm clients in parts, so that their 60 s inactivity timer is fed on slow links.
CHUNKED_TRANSITION_SIZE_BYTES = 5_000_000
_CHUNK_LENGTH = 1 << 20  # characters of the Transition in one part
_CHUNKS_SINCE_NPM = (1, 28, 0)

# Past this a message that msgspec refused is not looked at again: the worst JSON of this length takes 45 ms.
_SECOND_LOOK_LENGTH_MAX = 512 << 10

MODIFICATION_COUNT_MAX = 20_000  # of one message, which takes 40 ms; more than a session may ask and give up
_ATTRIBUTES_SIZE_BYTES_MAX = 16 << 10  # as in the header of a request
_NULL = Raw(b"null")

UnsignedInt = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
SessionId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")]


# -- client → server --------------------------------------------------------------------------------------------------


class ClientMessage(msgspec.Struct, frozen=True, tag_field="type", rename="camel"):
    """The base of what clients send; members that we do not know are ignored."""


class Connect(ClientMessage, frozen=True):
    session_id: SessionId
    connection_count: int = 0
    last_close_reason: str | None = None
    max_observed_timestamp: str | None = None
    client_ts: int | float | None = None  # ms; clients send 0 and times that are hours off


class _Modification(ClientMessage, frozen=True):
    """Counted while a message is decoded: one that has too many is given up before it holds the loop."""

    def __post_init__(self) -> None:
        global _modification_count
        _modification_count += 1
        if _modification_count > MODIFICATION_COUNT_MAX:
            raise ValueError(f"more than {MODIFICATION_COUNT_MAX:,} modifications")


class AddQuery(_Modification, tag="Add", frozen=True):
    query_id: UnsignedInt
    udf_path: str
    args: Raw
    journal: str | None = None
    component_path: str | None = None


class RemoveQuery(_Modification, tag="Remove", frozen=True):
    query_id: UnsignedInt


class ModifyQuerySet(ClientMessage, frozen=True):
    base_version: UnsignedInt
    new_version: UnsignedInt
    modifications: list[AddQuery | RemoveQuery]


class Mutation(ClientMessage, frozen=True):
    request_id: UnsignedInt
    udf_path: str
    args: Raw
    component_path: str | None = None


class Action(ClientMessage, frozen=True):
    request_id: UnsignedInt
    udf_path: str
    args: Raw
    component_path: str | None = None


class Authenticate(ClientMessage, frozen=True):
    base_version: UnsignedInt
    token_type: Literal["User", "Admin", "None"]
    value: str | None = None
    impersonating: Raw = _NULL
    acting_as: Raw = msgspec.field(name="acting_as", default=_NULL)  # as the Rust family spells it


class Event(ClientMessage, frozen=True):
    """Telemetry of the client; never answered."""


Message = Connect | ModifyQuerySet | Mutation | Action | Authenticate | Event

_VALUE = re.compile(r"value (['\"]).*\1", re.DOTALL)  # as `repr` writes it
_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
_decode_one = msgspec.json.Decoder(tuple[Raw]).decode  # ends at the second element, however many there are
_decode_attributes = msgspec.json.Decoder(dict[str, Any] | None).decode
_modification_count = 0  # of the message that is being decoded


def decode_message(text: str | bytes) -> Message:
    """Raises `InvalidArgument` for what no official client sends."""
    global _modification_count
    _modification_count = 0
    try:
        return _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = _decode_around_arguments(text)
        if message is None:
            # a value that it quotes may be anything, a credential too, and as long as a message
            raise InvalidArgument(f"not a message of the sync protocol: {_VALUE.sub('value', str(error))}") from error
        return message


def unwrap_arguments(args: Raw | bytes) -> bytes:
    """The JSON of the one object that the array `args` holds; raises `InvalidArgument`."""
    try:
        return bytes(_decode_one(args)[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(
            "arguments: expected one object of valid JSON values. (A string with half of a surrogate pair is not one.)"
        ) from error


def attributes_of(message: Authenticate) -> dict[str, Any] | None:
    """Those of the user that an admin acts as; raises `InvalidArgument`."""
    raw = message.acting_as if bytes(message.impersonating) == b"null" else message.impersonating
    if len(bytes(raw)) > _ATTRIBUTES_SIZE_BYTES_MAX:
        raise InvalidArgument(f"impersonating: more than {_ATTRIBUTES_SIZE_BYTES_MAX:,} bytes")
    try:
        return _decode_attributes(raw) or None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument("impersonating: expected the attributes of a user") from error


def _decode_around_arguments(text: str | bytes) -> Message | None:
    """A message whose arguments alone are not to be decoded (npm sends lone surrogates): those are left out (2)."""
    if len(text) > _SECOND_LOOK_LENGTH_MAX:
        return None
    try:
        message = json.loads(text, parse_constant=_refuse)
        for part in [message, *message.get("modifications", ())]:
            if "args" in part and not _is_decodable(part["args"]):
                part["args"] = []
        return _decoder.decode(json.dumps(message, ensure_ascii=False).encode())
    except (ValueError, TypeError, AttributeError, RecursionError, msgspec.DecodeError):
        return None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_decodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


# -- server → client --------------------------------------------------------------------------------------------------


class _ServerMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", rename="camel"):
    """The base of what we send; what goes out most is joined by hand: a third of the time."""


class _MutationFailed(_ServerMessage, tag="MutationResponse", frozen=True, kw_only=True):
    request_id: int
    success: Literal[False] = False
    result: str
    error_data: Raw | UnsetType = UNSET
    log_lines: tuple[str, ...]


class _ActionSucceeded(_ServerMessage, tag="ActionResponse", frozen=True, kw_only=True):
    request_id: int
    success: Literal[True] = True
    result: Raw
    log_lines: tuple[str, ...]


class _ActionFailed(_ServerMessage, tag="ActionResponse", frozen=True, kw_only=True):
    request_id: int
    success: Literal[False] = False
    result: str
    error_data: Raw | UnsetType = UNSET
    log_lines: tuple[str, ...]


class _AuthError(_ServerMessage, tag="AuthError", frozen=True, kw_only=True):
    error: str
    base_version: int
    auth_update_attempted: bool


class _FatalError(_ServerMessage, tag="FatalError", frozen=True, kw_only=True):
    error: str


class _TransitionChunk(_ServerMessage, tag="TransitionChunk", frozen=True, kw_only=True):
    transition_id: str
    part_number: int
    total_parts: int
    chunk: str


class _QueryFailed(_ServerMessage, tag="QueryFailed", frozen=True, kw_only=True):
    error_message: str
    error_data: Raw | UnsetType = UNSET
    log_lines: tuple[str, ...]
    journal: str | UnsetType = UNSET  # absent: the client keeps the one it has; null would make it forget


class Failure(Protocol):
    """Why a function failed, as its caller may know it."""

    @property
    def code(self) -> str: ...  # stable: the code of the error

    @property
    def message(self) -> str: ...

    @property
    def data(self) -> bytes | None: ...  # JSON of `AppError.data`; None: not the app's own error


class Result(Protocol):
    """What one query gave; shared by all who ask it."""

    encoded: bytes | None  # the fragment (3); None until the first subscriber's Transition

    @property
    def ts(self) -> int: ...  # a commit timestamp from which on it is right

    @property
    def value(self) -> bytes | None: ...  # JSON; None exactly if it failed

    @property
    def failure(self) -> Failure | None: ...

    @property
    def log_lines(self) -> tuple[str, ...]: ...

    @property
    def journal(self) -> str | None: ...


# One text message, in pieces that are written one after the other. Those at odd places are the fragments (3), which
# many clients share and nobody copies; the others are the few bytes around them that are this client's own.
Frame = tuple[bytes, ...]

# What is new of one query: its id, and the fragment (3) that follows it.
Modification = tuple[int, bytes]

PING: Frame = (b'{"type":"Ping"}',)
REMOVED = b',"type":"QueryRemoved"}'

_encode = msgspec.json.Encoder().encode


def mutation_succeeded(request_id: int, value: bytes, ts: int, log_lines: tuple[str, ...]) -> Frame:
    return (
        b'{"type":"MutationResponse","requestId":%d,"success":true,"result":%b,"ts":"%b","logLines":%b}'
        % (request_id, value, _encode_timestamp_bytes(ts), _encode(log_lines) if log_lines else b"[]"),
    )


def mutation_failed(request_id: int, failure: Failure, log_lines: tuple[str, ...]) -> Frame:
    data = _error_data_of(failure)
    message = _MutationFailed(request_id=request_id, result=failure.message, error_data=data, log_lines=log_lines)
    return (_encode(message),)


def action_succeeded(request_id: int, value: bytes, log_lines: tuple[str, ...]) -> Frame:
    return (_encode(_ActionSucceeded(request_id=request_id, result=Raw(value), log_lines=log_lines)),)


def action_failed(request_id: int, failure: Failure, log_lines: tuple[str, ...]) -> Frame:
    data = _error_data_of(failure)
    message = _ActionFailed(request_id=request_id, result=failure.message, error_data=data, log_lines=log_lines)
    return (_encode(message),)


def auth_error(error: str, base_version: int, *, is_attempt: bool) -> Frame:
    """`is_attempt`: an `Authenticate` was refused; else the identity that was current has ended."""
    return (_encode(_AuthError(error=error, base_version=base_version, auth_update_attempted=is_attempt)),)


def fatal_error(error: str) -> Frame:
    """Makes npm clients stop for good: only for what no official client sends."""
    return (_encode(_FatalError(error=error)),)


def fragment_of(result: Result) -> bytes:
    """What follows the query id in the modification that brings this result; encoded but once (3)."""
    fragment = result.encoded
    if fragment is None:
        fragment = result.encoded = _encode_result(result)
    return fragment


def refusal(failure: Failure) -> bytes:
    """The fragment for a query that was refused before it became one."""
    return _encode_failed(failure, (), None)


def _encode_result(result: Result) -> bytes:
    if result.failure is not None:
        return _encode_failed(result.failure, result.log_lines, result.journal)
    assert result.value is not None, "a result has a value or a failure"
    return b',"type":"QueryUpdated","value":%b,"logLines":%b,"journal":%b}' % (
        result.value,
        _encode(result.log_lines) if result.log_lines else b"[]",
        b"null" if result.journal is None else _encode(result.journal),
    )


def _encode_failed(failure: Failure, log_lines: tuple[str, ...], journal: str | None) -> bytes:
    modification = _QueryFailed(
        error_message=failure.message,
        error_data=_error_data_of(failure),
        log_lines=log_lines,
        journal=UNSET if journal is None else journal,
    )
    return b"," + _encode(modification)[1:]


def _error_data_of(failure: Failure) -> Raw | UnsetType:
    return UNSET if failure.data is None else Raw(failure.data)  # 4


class StateVersion:
    """Where a client's state stands: the versions it announced, and the commit timestamp of its results. Immutable."""

    __slots__ = ("identity", "query_set", "text", "ts")

    def __init__(self, query_set: int, identity: int, ts: int) -> None:
        self.query_set, self.identity, self.ts = query_set, identity, ts
        # on the wire, where it ends one Transition and starts the next
        self.text = b'{"querySet":%d,"identity":%d,"ts":"%b"}' % (query_set, identity, _encode_timestamp_bytes(ts))


class Stamp(msgspec.Struct, frozen=True):
    """Times that a Transition carries when it announces something: npm schedules token refreshes by those that confirm
    an identity, and looks at no other but to log how long it was under way. All else can be the same for many clients.
    """

    client_clock_skew_ms: int  # client minus server, as it was at Connect
    server_ts: int  # ns since the epoch


def encode_transition(
    start: StateVersion,
    end: StateVersion,
    modifications: Sequence[Modification],
    stamp: Stamp | None,
    *,
    frame_size_bytes_max: int,
    accepts_chunks: bool,
) -> list[Frame]:
    """The frames of one Transition: one, unless it is too large for this client."""
    frame = transition(start, end, modifications, stamp)
    size_bytes = sum(map(len, frame))
    if size_bytes <= (CHUNKED_TRANSITION_SIZE_BYTES if accepts_chunks else frame_size_bytes_max):
        return [frame]
    if accepts_chunks:
        return _cut(b"".join(frame), end)
    groups = _groups_by_size(modifications, frame_size_bytes_max)
    return [
        *(transition(start, start, group, stamp) for group in groups[:-1]),
        transition(start, end, groups[-1], stamp),
    ]


def transition(
    start: StateVersion, end: StateVersion, modifications: Sequence[Modification], stamp: Stamp | None
) -> Frame:
    """A Transition as one message, whatever its size."""
    times = b""
    if stamp is not None:
        times = b'"clientClockSkew":%d,"serverTs":%d,' % (stamp.client_clock_skew_ms, stamp.server_ts)
    text = b'{"type":"Transition","startVersion":%b,"endVersion":%b,%b"modifications":[' % (start.text, end.text, times)
    if not modifications:
        return (text + b"]}",)
    pieces: list[bytes] = []
    for query_id, fragment in modifications:
        pieces += (b'%b{"queryId":%d' % (text, query_id), fragment)
        text = b","
    pieces.append(b"]}")
    return tuple(pieces)


def _groups_by_size(modifications: Sequence[Modification], frame_size_bytes_max: int) -> list[list[Modification]]:
    room = frame_size_bytes_max - 512  # for the versions around the modifications
    groups: list[list[Modification]] = [[]]
    group_size_bytes = 0
    for modification in modifications:
        size_bytes = len(modification[1]) + 32  # for the query id before the fragment
        group_size_bytes += size_bytes
        if group_size_bytes > room and groups[-1]:
            groups.append([])
            group_size_bytes = size_bytes
        groups[-1].append(modification)
    return groups


def _cut(frame: bytes, end: StateVersion) -> list[Frame]:
    """The parts of a Transition, cut between characters; nothing but a Ping may come between them."""
    text = frame.decode()
    chunks = [text[start : start + _CHUNK_LENGTH] for start in range(0, len(text), _CHUNK_LENGTH)]
    transition_id = f"{end.ts}-{end.query_set}-{end.identity}"
    return [
        (
            _encode(
                _TransitionChunk(transition_id=transition_id, part_number=number, total_parts=len(chunks), chunk=chunk)
            ),
        )
        for number, chunk in enumerate(chunks)
    ]


# -- timestamps and client versions -----------------------------------------------------------------------------------


def encode_timestamp(ts: int) -> str:
    """Base64 of 64 bits, little-endian; 0 is `AAAAAAAAAAA=`."""
    return _encode_timestamp_bytes(ts).decode()


@lru_cache(maxsize=256)  # one commit is told to every subscriber
def _encode_timestamp_bytes(ts: int) -> bytes:
    assert 0 <= ts <= TIMESTAMP_MAX, ts
    return binascii.b2a_base64(ts.to_bytes(_TIMESTAMP_SIZE_BYTES, "little"), newline=False)


def decode_timestamp(text: str) -> int:
    try:
        raw = b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument(f"ts: expected base64 of 8 bytes, got {text[:40]!r}") from error
    if len(raw) != _TIMESTAMP_SIZE_BYTES:
        raise InvalidArgument(f"ts: expected base64 of 8 bytes, got {len(raw)}")
    return int.from_bytes(raw, "little")


_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def accepts_chunks(path_version: str | None, convex_client: str | None) -> bool:
    """Whether this client knows `TransitionChunk`: npm from 1.28.0 on, which tells its version in the path only."""
    if convex_client is not None:
        name, _, version = convex_client.partition("-")
        if name != "npm":
            return False
    else:
        version = path_version or ""
    match = _VERSION.match(version)
    return match is not None and tuple(int(part[:9]) for part in match.groups()) >= _CHUNKS_SINCE_NPM
