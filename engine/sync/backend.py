"""What a session asks of the engine, and what it is told: the seam between the protocol and everything behind it.

Invariants
  1. Of one commit, all `done` callbacks come before any view's `on_ready`, and both after it is published.
  2. `done` is called once, on the loop, perhaps before `start_…` has returned; errors of a request come through it.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec

from engine.identity import Identity
from engine.sync.protocol import Failure, Result


class UserToken(msgspec.Struct, frozen=True):
    """The signed token of an end user."""

    token: str


class AdminKey(msgspec.Struct, frozen=True):
    """An admin key, and the attributes of the user to act as."""

    key: str
    acting_as: Mapping[str, Any] | None


Credential = UserToken | AdminKey


class Verified(Protocol):
    """What a credential proved."""

    @property
    def identity(self) -> Identity | None: ...

    @property
    def expires_at_ms(self) -> float | None: ...  # of the wall clock; None: never

    @property
    def is_admin(self) -> bool: ...


class MutationOutcome(msgspec.Struct, frozen=True):
    """How a mutation ended: a value at a commit timestamp, or a failure."""

    ts: int | None  # None exactly if it failed
    value: bytes | None  # JSON
    failure: Failure | None = None
    log_lines: tuple[str, ...] = ()


class ActionOutcome(msgspec.Struct, frozen=True):
    value: bytes | None  # JSON; None exactly if it failed
    failure: Failure | None = None
    log_lines: tuple[str, ...] = ()


class ViewChange(Protocol):
    """The results that a subscriber has not taken yet, all at one timestamp."""

    @property
    def ts(self) -> int: ...

    @property
    def results(self) -> Mapping[int, Result]: ...  # by query id; only those that differ from what was taken before


class View(Protocol):
    """All that one client asks."""

    def set_identity(self, identity: Identity | None) -> None: ...

    def add(self, query_id: int, path: str, arguments: bytes, journal: str | None) -> None: ...

    def remove(self, query_id: int) -> None: ...

    def take(self) -> ViewChange | None:
        """The newest consistent state; None while some query has no result there (`on_ready` follows)."""

    def take_only(self, since_ts: int) -> tuple[int, Result] | None:
        """A query id and its result if that alone is new, at its `ts`; None: `take` tells.

        Of a subscriber whose state stands at `since_ts`; the result is a value, and not large.
        """

    def close(self) -> None: ...


class Running(Protocol):
    """A request that was started."""

    def cancel(self) -> object: ...


class Backend(Protocol):
    """The engine, as one session sees it."""

    def published_ts(self) -> int: ...

    def make_view(self, on_ready: Callable[[], None]) -> View: ...

    def recorded_outcome(
        self, session_id: str, request_id: int, identity: Identity | None, path: str, arguments: bytes
    ) -> MutationOutcome | None:
        """How this mutation ended when it came before; None if it did not, or is not known to have."""

    def start_mutation(
        self,
        path: str,
        arguments: bytes,
        identity: Identity | None,
        session_id: str,
        request_id: int,
        done: Callable[[MutationOutcome], None],
    ) -> None:
        """Run it, exactly once for this session id and request id; it goes on when the session closes."""

    def start_action(
        self, path: str, arguments: bytes, identity: Identity | None, done: Callable[[ActionOutcome], None]
    ) -> Running: ...

    def authenticate(self, credential: Credential) -> Awaitable[Verified]:
        """Raises `AuthenticationFailed`."""

    def session_connected(self, session_id: str) -> None:
        """A connection says that it belongs to this session; while a client reconnects there may be two."""

    def session_gone(self, session_id: str, close_code: int | None) -> None:
        """Such a connection is gone; the code is that of the client's close frame, None if it sent none."""

    def client_saw(self, session_id: str, up_to_request_id: int) -> None:
        """The client surely has the answers to all requests up to this one."""
