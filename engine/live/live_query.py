"""One shared run behind every subscriber who asks the same.

    new ──run──> clean ──a commit writes into its read set──> dirty ──run──> clean …
                   └─ nobody watches: kept in the cache until a commit touches it or room is needed

Invariants
  1. `result` is what a fresh run at any timestamp from `result.ts` to the published one would give, unless `is_dirty`.
  2. It is listed in the invalidation index under the read set of the run that gave `result`.
  3. A result object is immutable; an unchanged re-run keeps the object, so `is` tells whether a watcher has it.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec

from engine.functions.calls import Call
from engine.functions.failures import Failure
from engine.identity import Identity, Part, part_of

if TYPE_CHECKING:
    from engine.live.view import View

__all__ = ["Ask", "Failure", "LiveQuery", "Result", "Variant"]


class Ask(msgspec.Struct, frozen=True):
    """What a subscriber sent."""

    path: str
    arguments: bytes  # JSON of the arguments object
    journal: str | None


# What the run read of the identity: the parts, and what they were (made comparable). Callers with the same share.
Variant = tuple[tuple[Part, str], ...]


class Result:
    """What a live query gave, as clients will see it. Exactly one of `value` and `failure` is there.

    When the cache needs room, the live query keeps an `evicted` one: without bytes, with their digest.
    """

    __slots__ = ("_digest", "encoded", "failure", "is_evicted", "journal", "log_lines", "ts", "value")

    def __init__(
        self, *, ts: int, value: bytes | None, failure: Failure | None, journal: str | None, log_lines: tuple[str, ...]
    ) -> None:
        self.ts = ts  # the snapshot of the run that first gave it
        self.value = value  # JSON
        self.failure = failure
        self.journal = journal
        self.log_lines = log_lines
        self.encoded: bytes | None = None  # the shared part of its wire form; set by sync.protocol on first use
        self.is_evicted = False
        self._digest: bytes | None = None

    @property
    def digest(self) -> bytes:
        """Equal for results that a client need not tell apart."""
        if self._digest is None:
            seen = msgspec.msgpack.encode(self._seen())
            self._digest = hashlib.blake2b(seen, digest_size=16).digest()
        return self._digest

    @property
    def size_bytes(self) -> int:
        return 2 * len(self.value or b"")  # `encoded` holds it once more

    def looks_like(self, other: "Result") -> bool:
        """Whether a client that has one need not be sent the other."""
        if self.is_evicted or other.is_evicted:
            return self.digest == other.digest
        return self is other or self._seen() == other._seen()

    def evicted(self) -> "Result":
        """The same without its bytes."""
        light = Result(ts=self.ts, value=None, failure=None, journal=self.journal, log_lines=())
        light.is_evicted, light._digest = True, self.digest
        return light

    def _seen(self) -> tuple[Any, ...]:
        return self.value, self.failure and self.failure.likeness, self.journal, self.log_lines


class LiveQuery:
    """A query, its newest result and who watches it."""

    __slots__ = ("ask", "call", "identity", "is_dirty", "keys", "new_key", "result", "variant", "watchers")

    def __init__(self, ask: Ask, call: Call | None, identity: Identity | None) -> None:
        self.ask = ask
        self.call = call  # None when no such function takes such arguments: `result` says why
        self.identity = identity  # whose run it is: any one watcher's, as all agree in what the run read
        self.is_dirty = True  # True until the first run, and from each commit that touches it to the next run
        self.result: Result | None = None  # set by publisher
        self.variant: Variant = ()  # of the run that gave `result`
        self.keys: set[tuple[Any, ...]] = set()  # where publisher lists it
        self.new_key: tuple[Any, ...] = ()  # where publisher finds it until it has run
        self.watchers: dict[View, set[int]] = {}  # the query ids under which each view holds it

    @property
    def path(self) -> str:
        return self.ask.path

    @property
    def journal(self) -> str | None:
        """Where the page ends, for the next run."""
        if self.result is not None and self.result.journal is not None:
            return self.result.journal
        return self.ask.journal

    def suits(self, identity: Identity | None) -> bool:
        """Whether the result is right for this caller too."""
        return self.variant == variant_of(identity, [part for part, _ in self.variant])


def variant_of(identity: Identity | None, parts: list[Part]) -> Variant:
    """These parts of an identity, comparable."""
    return tuple((part, repr(part_of(identity, part))) for part in parts)
