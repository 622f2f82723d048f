"""Whatever a client, a backend and a socket do, the promises of `engine/sync/session.py` hold.

The machine plays all three. The oracle: once nothing is under way, the client holds what the backend has for exactly
the queries it asks, every request has one answer, and what it was answered is what it sees.
"""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.identity import Identity
from engine.sync.protocol import decode_timestamp
from engine.sync.shared_frames import SharedFrames
from engine.testing import ManualClock
from tests.sync.fakes import (
    FakeBackend,
    FakeClient,
    FakeFailure,
    FakeVerified,
    action,
    add,
    authenticate,
    connect,
    mutation,
    query_set,
    remove,
)

PATHS = ("a:list", "b:list", "c:list")


class SessionKeepsItsPromises(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.backend = FakeBackend()
        for path in PATHS:
            self.backend.show(path, 0)
        clock = ManualClock()
        self.client = FakeClient(self.backend, clock=clock, shared=SharedFrames(b"".join, clock))
        self.query_set_version = 0
        self.identity_version = 0
        self.asked: dict[int, str] = {}
        self.next_query_id = 0
        self.next_request_id = 0
        self.mutation_ids: list[int] = []  # in the order they were sent
        self.action_ids: set[int] = set()
        self.answered: list[int] = []
        self.committed_ts: dict[int, int] = {}  # by request id, of own mutations that succeeded
        self.newest_answered_ts = 0
        self.is_lagging = False
        self.value = 0

    def hear(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            match message["type"]:
                case "MutationResponse" | "ActionResponse":
                    self.answered.append(message["requestId"])
                    if "ts" in message:
                        self.newest_answered_ts = decode_timestamp(message["ts"])
                case "Transition":
                    ts = decode_timestamp(message["endVersion"]["ts"])
                    for request_id, committed_ts in self.committed_ts.items():
                        assert request_id in self.answered or committed_ts > ts, "revealed before it was answered"

    @initialize()
    def connects(self) -> None:
        self.hear(self.client.say(connect()))

    @rule(count=st.integers(0, 3), data=st.data())
    def asks(self, count: int, data: st.DataObject) -> None:
        modifications = []
        for _ in range(count):
            if self.asked and data.draw(st.booleans()):
                query_id = data.draw(st.sampled_from(sorted(self.asked)))
                del self.asked[query_id]
                modifications.append(remove(query_id))
            else:
                path = data.draw(st.sampled_from(PATHS))
                self.asked[self.next_query_id] = path
                modifications.append(add(self.next_query_id, path))
                self.next_query_id += 1
        self.query_set_version += 1
        self.hear(self.client.say(query_set(self.query_set_version - 1, *modifications)))

    @rule()
    def mutates(self) -> None:
        self.mutation_ids.append(self.next_request_id)
        self.hear(self.client.say(mutation(self.next_request_id)))
        self.next_request_id += 1

    @rule()
    def acts(self) -> None:
        self.action_ids.add(self.next_request_id)
        self.hear(self.client.say(action(self.next_request_id)))
        self.next_request_id += 1

    @rule(is_signed_in=st.booleans())
    def authenticates(self, is_signed_in: bool) -> None:
        self.hear(self.client.say(authenticate(self.identity_version, "token" if is_signed_in else None)))
        self.identity_version += 1

    @rule()
    @precondition(lambda self: self.client.session.unverified is not None)
    def is_verified(self) -> None:
        self.client.session.accept(FakeVerified(Identity(subject="alice", issuer="i")))
        self.hear(self.client.hear())

    @rule(path=st.sampled_from(PATHS), is_own=st.booleans(), is_flushed=st.booleans())
    def commits(self, path: str, is_own: bool, is_flushed: bool) -> None:
        self.value += 1
        running = self.backend.mutations[:1] if is_own else []
        if running:
            request_id = running[0].request_id
            assert request_id is not None
            self.committed_ts[request_id] = self.backend.ts + 1
        self.backend.commit(*running, **{path: self.value})
        if is_flushed:
            self.hear(self.client.hear())

    @rule(is_of_the_app=st.booleans())
    @precondition(lambda self: self.backend.mutations)
    def refuses(self, is_of_the_app: bool) -> None:
        self.backend.refuse(self.backend.mutations[0], FakeFailure("no", data=b"1" if is_of_the_app else None))
        self.hear(self.client.hear())

    @rule()
    @precondition(lambda self: self.backend.actions)
    def ends_an_action(self) -> None:
        self.backend.end(self.backend.actions[0])
        self.hear(self.client.hear())

    @rule(path=st.sampled_from(PATHS))
    def runs_long(self, path: str) -> None:
        self.backend.slow_paths ^= {path}
        self.backend.tell()
        self.hear(self.client.hear())

    @rule()
    def lags_or_not(self) -> None:
        self.is_lagging = not self.is_lagging
        self.client.session.set_lagging(self.is_lagging)
        self.hear(self.client.hear())

    @rule(seconds=st.sampled_from([0.3, 16]))
    def waits(self, seconds: float) -> None:
        self.client.clock.advance(seconds)
        self.hear(self.client.hear())

    @invariant()
    def requests_are_answered_once_and_mutations_in_order(self) -> None:
        assert len(self.answered) == len(set(self.answered))
        mutations = [request_id for request_id in self.answered if request_id in self.mutation_ids]
        assert mutations == sorted(mutations)
        assert len(self.backend.mutations) <= 1

    @rule()
    def everything_comes_to_rest(self) -> None:
        """Let all that is under way end; then the client holds exactly what a fresh run would give."""
        while self.client.session.unverified is not None:
            self.client.session.accept(FakeVerified(None))
        if self.is_lagging:
            self.lags_or_not()
        self.backend.slow_paths.clear()
        self.backend.tell()
        self.hear(self.client.hear())
        while self.backend.mutations:
            self.commits("a:list", is_own=True, is_flushed=True)
        while self.backend.actions:
            self.ends_an_action()
        assert self.client.state == {
            query_id: int(self.backend.results[path].value or b"") for query_id, path in self.asked.items()
        }
        assert sorted(self.answered) == sorted([*self.mutation_ids, *self.action_ids])
        assert self.client.ts >= self.newest_answered_ts, "an answer without its Transition"
        if self.query_set_version > 0:
            assert self.client.version["querySet"] == self.query_set_version
            assert self.client.version["identity"] == self.identity_version


SessionKeepsItsPromises.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSession = pytest.mark.slow(SessionKeepsItsPromises.TestCase)
