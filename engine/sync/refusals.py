"""What a session itself refuses: one request, or the whole connection."""

import msgspec

from engine.errors import FunctionNotFound, LimitExceeded, RequestError
from engine.limits import Limits
from engine.sync import protocol


class Close(msgspec.Struct, frozen=True):
    """The door is to close the connection once the outbox is written."""

    code: int
    reason: str  # at most 123 bytes; official clients log it unless it is empty


class Refusal(msgspec.Struct, frozen=True):
    """The failure of a request that went no further."""

    code: str
    message: str
    data: bytes | None = None


def refusal_of(error: RequestError) -> Refusal:
    return Refusal(error.code, f"{error.code}: {error}")


def arguments_of(message: protocol.AddQuery | protocol.Mutation | protocol.Action, kind: str, limits: Limits) -> bytes:
    """The arguments of a request that may be asked at all. Raises RequestError."""
    if message.component_path:  # components are for admins of the reference server; there are none here
        raise FunctionNotFound(f"{message.component_path}/{message.udf_path}", kind)
    arguments = protocol.unwrap_arguments(message.args)
    if len(arguments) > limits.arguments_size_bytes_max:
        raise LimitExceeded(
            "bytes of arguments",
            used=len(arguments),
            allowed=limits.arguments_size_bytes_max,
            remedy="Send less at once, or raise limits.arguments_size_bytes_max.",
        )
    return arguments
