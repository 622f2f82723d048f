"""A call, and how it ended."""

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from engine.functions.arguments import Arguments
from engine.functions.registry import Function
from engine.identity import Part
from engine.transaction.read_set import ReadSet

if TYPE_CHECKING:
    from engine.functions.failures import Failure


class Call(msgspec.Struct, frozen=True):
    """A function and its decoded arguments."""

    function: Function
    arguments: Arguments


class NestedQuery:
    """A query that another one calls, and that asks who asks: its caller depends on what it *returned*.

    All for whom it returns the same share the caller's result. Equal for equal asks.
    """

    __slots__ = ("_wire_arguments", "call", "is_restricted", "key")

    def __init__(self, call: Call, *, is_restricted: bool) -> None:
        self.call, self.is_restricted = call, is_restricted
        self.key = (call.function.path, call.arguments.canonical, is_restricted)
        self._wire_arguments: bytes | None = None

    @property
    def wire_arguments(self) -> bytes:
        """JSON, as a client would send them."""
        if self._wire_arguments is None:
            self._wire_arguments = self.call.function.signature.to_wire_bytes(self.call.arguments)
        return self._wire_arguments

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NestedQuery) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended for its caller. Exactly one of `value` and `failure` is there."""

    value: bytes | None  # JSON
    failure: "Failure | None"
    log_lines: tuple[str, ...]

    @property
    def token(self) -> bytes:
        """Equal for outcomes that a caller cannot tell apart."""
        seen = self.value if self.failure is None else self.failure.likeness.encode()
        assert seen is not None
        return blake2b(seen, digest_size=16, person=b"value" if self.failure is None else b"failure").digest()


class QueryRun(msgspec.Struct, frozen=True):
    """What one run of a query gave."""

    outcome: Outcome
    read_set: ReadSet
    parts: "dict[Part | NestedQuery, Any]"  # what it read of who asks, and what it was
    nested: "dict[NestedQuery, QueryRun]"  # of those parts
    journal: str | None
    duration_seconds: float
