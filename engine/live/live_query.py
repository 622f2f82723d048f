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

from engine.errors import AppError
from engine.events import Cause
from engine.functions.outcomes import Call, NestedQuery, Outcome
from engine.identity import Identity, Part

if TYPE_CHECKING:
    from engine.live.view import View


class Ask(msgspec.Struct, frozen=True):
    """What a subscriber sent."""

    path: str
    arguments: bytes  # JSON of the arguments object
    journal: str | None


# What the run read of who asks: the parts, and what they were (made comparable). Callers with the same share.
SharedPart = Part | NestedQuery
Variant = tuple[tuple[SharedPart, object], ...]

_DIGEST_ABOVE_SIZE_BYTES = 512

QueryIds = tuple[int, ...]  # not empty; nearly always one, so a set would be ten times as large


class Result:
    """What a live query gave, as clients will see it. Exactly one of `value` and `failure` is there.

    When the cache needs room, the live query keeps an `evicted` one: without bytes, with their digest.
    """

    __slots__ = (
        "_digest",
        "_token",
        "encoded",
        "failure",
        "http_encoded",
        "http_plain",
        "is_evicted",
        "journal",
        "log_lines",
        "ts",
        "value",
    )

    def __init__(self, ts: int, outcome: Outcome | None, journal: str | None) -> None:
        self.ts = ts  # the snapshot of the run that first gave it
        self.value = outcome.value if outcome is not None else None  # JSON
        self.failure = outcome.failure if outcome is not None else None
        self.log_lines = outcome.log_lines if outcome is not None else ()
        self.journal = journal
        self.encoded: bytes | None = None  # the shared part of its wire form; set by sync.protocol on first use
        self.http_plain: bytes | None = None  # the body of an HTTP answer; set by server.http on first use
        self.http_encoded: bytes | None = None  # the same in the other format
        self.is_evicted = outcome is None
        self._digest: bytes | None = None
        self._token: bytes | None = None

    @property
    def is_repeatable(self) -> bool:
        """Whether another run on the same data gives the same: a value or the app's refusal, not a run that was cut."""
        return self.is_evicted or self.failure is None or self.failure.code == AppError.code

    @property
    def outcome(self) -> Outcome:
        assert not self.is_evicted
        return Outcome(self.value, self.failure, self.log_lines)

    @property
    def token(self) -> bytes:
        """Equal for results that a query which calls this one cannot tell apart."""
        if self._token is None:
            self._token = self.outcome.token
        return self._token

    @property
    def digest(self) -> bytes:
        """Equal for results that a client need not tell apart."""
        if self._digest is None:
            value, is_bare = self.value, self.journal is None and not self.log_lines
            if is_bare and value is not None and len(value) <= _DIGEST_ABOVE_SIZE_BYTES:
                self._digest = value  # a fifth of the time; JSON, so equal to no digest
            else:
                seen = msgspec.msgpack.encode(self._seen())
                self._digest = hashlib.blake2b(seen, digest_size=16).digest()
        return self._digest

    @property
    def size_bytes(self) -> int:
        """It grows with the bodies of HTTP answers. `encoded` is counted before it is made: nearly all get it."""
        return 2 * len(self.value or b"") + len(self.http_plain or b"") + len(self.http_encoded or b"")

    def looks_like(self, other: "Result") -> bool:
        """Whether a client that has one need not be sent the other."""
        if self.is_evicted or other.is_evicted:
            return self.digest == other.digest
        return self is other or self._seen() == other._seen()

    def evicted(self) -> "Result":
        """The same without its bytes."""
        light = Result(self.ts, None, self.journal)
        light._digest, light._token = self.digest, self.token
        return light

    def _seen(self) -> tuple[Any, ...]:
        return self.value, self.failure and self.failure.likeness, self.journal, self.log_lines


class LiveQuery:
    """A query, its newest result and who watches it."""

    __slots__ = (
        "ask",
        "call",
        "cause",
        "dependents",
        "identity",
        "is_dirty",
        "is_restricted",
        "keys",
        "last_place",
        "new_key",
        "result",
        "variant",
        "watchers",
    )

    def __init__(self, ask: Ask, call: Call | None, identity: Identity | None, *, is_restricted: bool) -> None:
        self.ask = ask
        self.call = call  # None when no such function takes such arguments: `result` says why
        self.identity = identity  # whose run it is: any one watcher's, as all agree in what the run read
        self.is_restricted = is_restricted  # policies apply; not to queries that policies themselves ask
        self.is_dirty = True  # True until the first run, and from each commit that touches it to the next run
        self.cause: Cause | None = None  # why it runs again; only while somebody traces
        self.result: Result | None = None  # set by publisher
        self.variant: Variant = ()  # of the run that gave `result`
        self.keys: set[tuple[Any, ...]] = set()  # where `sharing` lists it
        self.new_key: tuple[Any, ...] = ()  # where `sharing` finds it until it has run
        self.watchers: dict[View, QueryIds] = {}  # the query ids under which each view holds it
        self.dependents: dict[View, QueryIds] = {}  # those of queries that call it, and share by what it returns
        self.last_place = 0  # in the queue of `deliveries`, of the watcher that is told last of `result`

    @property
    def path(self) -> str:
        return self.ask.path

    @property
    def is_watched(self) -> bool:
        return bool(self.watchers or self.dependents)

    @property
    def journal(self) -> str | None:
        """Where the page ends, for the next run."""
        if self.result is not None and self.result.journal is not None:
            return self.result.journal
        return self.ask.journal

    @property
    def nested(self) -> list[NestedQuery]:
        """The queries that its run called and that asked who asks."""
        return [part for part, _ in self.variant if isinstance(part, NestedQuery)]
