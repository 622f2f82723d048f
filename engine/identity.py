"""Who asks, as a value.

Invariants
  1. An identity is immutable; two with equal claims, issuer and subject are equal.
  2. A tracked identity reports each part that is read before it gives it, and behaves like the plain one otherwise.

Results are shared by all callers for whom the parts that a run read are equal (`live/live_query.py`).
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NewType

import msgspec

# One part of an identity that a run can depend on: "present", "subject", "issuer", "claims" (all of them),
# or "claims.<name>".
Part = NewType("Part", str)

PRESENT, SUBJECT, ISSUER, ALL_CLAIMS = Part("present"), Part("subject"), Part("issuer"), Part("claims")


def claim_part(name: str) -> Part:
    return Part(f"claims.{name}")


class Identity:
    """A signed-in caller: `subject` at `issuer`, with the claims of the token.

    `Identity(subject="alice", issuer="https://login.example", claims={"role": "admin"})`
    """

    __slots__ = ("_claims", "_issuer", "_on_read", "_shown", "_subject", "_token_identifier")

    def __init__(
        self,
        *,
        subject: str,
        issuer: str,
        claims: Mapping[str, Any] | None = None,
        on_read: Callable[[Part], None] | None = None,
    ) -> None:
        self._subject, self._issuer = subject, issuer
        self._token_identifier = f"{issuer}|{subject}"
        self._claims = dict(claims or {})
        self._on_read = on_read  # only on the copy that a run sees
        self._shown: Identity | None = None  # made by `shown`

    @property
    def subject(self) -> str:
        """The user's name at the issuer (`sub`)."""
        self._read(SUBJECT)
        return self._subject

    @property
    def issuer(self) -> str:
        """Who vouches for the caller (`iss`)."""
        self._read(ISSUER)
        return self._issuer

    @property
    def token_identifier(self) -> str:
        """`issuer|subject`: unique over all issuers; the key to store a user under."""
        if self._on_read is not None:
            self._on_read(ISSUER)
            self._on_read(SUBJECT)
        return self._token_identifier

    @property
    def claims(self) -> Mapping[str, Any]:
        """Every claim of the token by its name; each is tracked on its own."""
        return _Claims(self._claims, self._on_read) if self._on_read else self._claims

    def tracked(self, on_read: Callable[[Part], None]) -> "Identity":
        """The same identity, reporting what is read of it."""
        return Identity(subject=self._subject, issuer=self._issuer, claims=self._claims, on_read=on_read)

    def shown(self) -> "Identity":
        """The same identity for all runs that nobody tracks: none can change its claims."""
        if self._shown is None:
            self._shown = self.tracked(lambda _: None)
        return self._shown

    def _read(self, part: Part) -> None:
        if self._on_read is not None:
            self._on_read(part)

    def _value(self) -> tuple[str, str, dict[str, Any]]:
        for part in (SUBJECT, ISSUER, ALL_CLAIMS):
            self._read(part)
        return self._subject, self._issuer, self._claims

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash((self.subject, self.issuer))

    def __repr__(self) -> str:
        return f"Identity(subject={self.subject!r}, issuer={self.issuer!r})"


class Caller(msgspec.Struct, frozen=True):
    """Who makes a call, and what holds for it."""

    identity: Identity | None = None
    is_restricted: bool = True  # policies apply: somebody outside asks, not the engine or its operator
    session_id: str | None = None  # of the WebSocket session that sent it


SYSTEM = Caller(is_restricted=False)  # the engine itself: jobs, crons, triggers


class _Claims(Mapping[str, Any]):
    """The claims of a tracked identity: a look-up depends on that claim, anything wider on all of them."""

    def __init__(self, claims: Mapping[str, Any], on_read: Callable[[Part], None]) -> None:
        self._claims, self._on_read = claims, on_read

    def __getitem__(self, name: str) -> Any:
        self._on_read(claim_part(name))
        return copy.deepcopy(self._claims[name])  # a run that changes a list in it changes its own copy

    def __contains__(self, name: object) -> bool:
        self._on_read(claim_part(str(name)))
        return name in self._claims

    def __iter__(self) -> Iterator[str]:
        self._on_read(ALL_CLAIMS)
        return iter(self._claims)

    def __len__(self) -> int:
        self._on_read(ALL_CLAIMS)
        return len(self._claims)


_ABSENT = "\x00absent"  # no claim holds it: JWT claims come from JSON text checked for control characters


def part_of(identity: Identity | None, part: Part) -> Any:
    """The value of one part, comparable with `==`; a missing claim differs from one that is null."""
    if part == PRESENT:
        return identity is not None
    if identity is None:
        return None
    plain = identity.tracked(lambda _: None) if identity._on_read else identity
    if part == SUBJECT:
        return plain._subject
    if part == ISSUER:
        return plain._issuer
    if part == ALL_CLAIMS:
        return plain._claims
    return plain._claims.get(part.removeprefix("claims."), _ABSENT)
