"""Frames that many clients are sent alike: made once, and only for those to whom they say the truth."""

import json
from typing import Any

from engine.sync.protocol import Frame, StateVersion
from engine.sync.shared_frames import SharedFrames
from engine.testing import ManualClock
from tests.sync.fakes import FakeBackend, FakeClient, FakeFailure, FakeResult, add, connect, mutation, query_set, types


class Frames(SharedFrames):
    """Counts what is made."""

    def __init__(self) -> None:
        self.made_count = 0
        super().__init__(self._join, ManualClock())

    def _join(self, frame: Frame) -> bytes:
        self.made_count += 1
        return b"".join(frame)


class Crowd:
    """Clients of one backend that share frames, each with one query under an id of its own."""

    def __init__(self, *query_ids: int, **connect_with: Any) -> None:
        self.backend, self.frames = FakeBackend(), Frames()
        self.backend.show("chat:list", "first")
        self.clients: list[FakeClient] = []
        for query_id in query_ids:
            client = FakeClient(self.backend, shared=self.frames)
            client.say(connect(**connect_with), query_set(0, add(query_id, "chat:list")))
            self.clients.append(client)

    def show(self, value: str) -> None:
        """A commit changes the result."""
        self.backend.ts += 1
        self.backend.show("chat:list", value)
        self.backend.tell()


def test_clients_in_step_are_sent_the_same_bytes_at_once() -> None:
    crowd = Crowd(0, 0, 0)
    for number in range(3):
        crowd.show(f"v{number}")
        frames = [client.written[0] for client in crowd.clients]
        assert frames[0] is frames[1] is frames[2]
        for client in crowd.clients:
            assert types(client.hear()) == ["Transition"]
            assert client.state == {0: f"v{number}"}
    assert crowd.frames.made_count == 3


def test_other_query_ids_and_other_starts_get_frames_of_their_own() -> None:
    crowd = Crowd(0, 7, 0)
    crowd.clients[2].say(query_set(1))  # its version is another one
    for number in range(2):
        crowd.show(f"v{number}")
        for client, query_id in zip(crowd.clients, (0, 7, 0), strict=True):
            client.hear()  # checks the chain of versions
            assert client.state == {query_id: f"v{number}"}
    assert crowd.frames.made_count == 6


def test_times_of_a_client_are_in_what_confirms_an_announcement_only() -> None:
    crowd = Crowd(0, 0, clientTs=5)
    crowd.show("second")
    (heard,) = crowd.clients[0].hear()
    assert "serverTs" not in heard
    (heard,) = crowd.clients[0].say(query_set(1))
    assert "serverTs" in heard


def test_a_client_that_waits_for_something_else_is_not_in_step() -> None:
    crowd = Crowd(0, 0)
    lagging, waiting = crowd.clients
    lagging.session.set_lagging(True)
    waiting.say(mutation(0))
    crowd.backend.ts += 1
    crowd.backend.commit(crowd.backend.mutations[0], **{"chat:list": "second"})
    assert not lagging.written
    assert not waiting.written
    assert types(waiting.hear()) == ["MutationResponse", "Transition"]
    crowd.show("third")
    assert waiting.written, "it is in step again"
    lagging.session.set_lagging(False)
    assert types(lagging.hear()) == ["Transition"]
    assert lagging.state == waiting.state | {0: "third"}


def test_a_failure_goes_the_long_way() -> None:
    crowd = Crowd(0)
    crowd.backend.ts += 1
    crowd.backend.fail("chat:list", FakeFailure("no"))
    crowd.backend.tell()
    assert not crowd.clients[0].written
    crowd.clients[0].hear()
    assert crowd.clients[0].state == {0: "no"}


def test_a_client_that_hears_shared_frames_needs_no_pings() -> None:
    crowd = Crowd(0)
    (client,) = crowd.clients
    clock = client.clock
    crowd.frames._clock = clock
    for number in range(4):
        clock.advance(10)
        crowd.show(f"v{number}")
        assert types(client.hear()) == ["Transition"]
    clock.advance(15)
    assert types(client.hear()) == ["Ping"]


def test_frames_of_few_starts_of_one_result_are_kept() -> None:
    frames = Frames()
    first, second = FakeResult(b"1", ts=1_000), FakeResult(b"2", ts=1_000)
    for number in range(1_000):
        text, end, _ = frames.get(StateVersion(1, 0, number), 0, first)
        assert json.loads(text)["modifications"][0]["value"] == 1
        assert end.text == StateVersion(1, 0, 1_000).text
    assert len(frames._by_start) < 100
    frames.get(StateVersion(1, 0, 0), 0, second)
    assert len(frames._by_start) == 1
