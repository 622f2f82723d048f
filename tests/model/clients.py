"""What the clients of the model test send, ask and hold."""

import itertools
from typing import Any

import msgspec

from engine import Engine, Identity
from engine.live.live_query import Result
from engine.sync.backend import MutationOutcome
from tests.model.asks import PageQuery, Query, encode
from tests.model.plans import Plan, Write, pack
from tests.model.scans import Position

ISSUER = "https://issuer.example"
IDENTITIES = (
    None,
    Identity(subject="alice", issuer=ISSUER, claims={"role": "admin"}),
    Identity(subject="alice", issuer=ISSUER, claims={"role": "user"}),
    Identity(subject="bob", issuer=ISSUER, claims={"role": "user"}),
    Identity(subject="carol", issuer=ISSUER, claims={}),
)


class Mutation(msgspec.Struct):
    """What one mutation is asked to do."""

    writes: list[Write]
    reads: list[Plan] = []
    inside: list[Write] | None = None  # a nested mutation between `writes` and `after`
    after: list[Write] = []
    does_fail: bool = False
    identity_index: int = 0  # who asks: of IDENTITIES

    @property
    def path(self) -> str:
        return "model:write" if self.inside is None else "model:write_nested"

    @property
    def identity(self) -> Identity | None:
        return IDENTITIES[self.identity_index]

    @property
    def all_writes(self) -> list[Write]:
        return [*self.writes, *(self.inside or []), *self.after]

    def arguments(self, key: str) -> bytes:
        if self.inside is None:
            parts = {"writes": pack(self.writes), "reads": pack(self.reads)}
        else:
            parts = {"before": pack(self.writes), "inside": pack(self.inside), "after": pack(self.after)}
        return encode({"key": key, **parts, "does_fail": self.does_fail})


class Request(msgspec.Struct):
    """A mutation that was sent, and how it ended."""

    mutation: Mutation
    request_id: int
    outcome: MutationOutcome | None = None


class Subscription:
    """One query that a subscriber asks, and what it holds of it."""

    def __init__(self, query: Query, asked_ts: int) -> None:
        self.query, self.asked_ts = query, asked_ts
        self.journal: str | None = None
        self.result: Result | None = None  # the newest that was given
        self.seen: Any = None  # what it says
        self.until: Position | None = None  # where its page ends, once it has had one
        self.has_shown_end = False  # whether that is the end of a page that was given

    @property
    def page(self) -> Any:
        """Of a page that has a value: as the client sees it."""
        return page_of(self.query, self.seen)


class Subscriber:
    """A view, and what its client knows."""

    def __init__(self, engine: Engine) -> None:
        self.identity: Identity | None = None
        self.subscriptions: dict[int, Subscription] = {}
        self.ts = 0  # of the newest change
        self.is_lagging = False  # takes nothing for now
        self.is_settled = False  # took everything since it last asked for something else
        self.is_told = False
        self._backend = engine.backend
        self.view = self._backend.make_view(self._told)
        self._next_id = itertools.count()

    def add(self, query: Query, *, resumes: Subscription | None = None) -> Subscription:
        """Ask from now on; with an earlier subscription's journal, as a client does that connects again."""
        query_id, subscription = next(self._next_id), Subscription(query, self._backend.published_ts())
        if resumes is not None and resumes.journal is not None:
            subscription.journal, subscription.until = resumes.journal, resumes.until
            subscription.has_shown_end = True
        self.subscriptions[query_id] = subscription
        self.view.add(query_id, query.path, query.arguments(), subscription.journal)
        self.is_settled = False
        return subscription

    def remove(self, query_id: int) -> None:
        self.view.remove(query_id)
        del self.subscriptions[query_id]

    def set_identity(self, identity: Identity | None) -> None:
        self.identity = identity
        self.view.set_identity(identity)
        self.is_settled = False

    def _told(self) -> None:
        self.is_told = True


def page_of(query: Query, seen: Any) -> Any:
    return seen[1] if isinstance(query, PageQuery) and seen is not None and seen[0] == "value" else None


def without_cursors(query: Query, seen: Any) -> Any:
    """Of a page, what can be known beforehand; all of anything else."""
    page = page_of(query, seen)
    return seen if page is None else ("value", (page["page"], page["isDone"]))
