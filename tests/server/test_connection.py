"""One connection over a transport that a test holds: what it reads, when it is silent, how it ends."""

import asyncio
import json
from typing import Any, cast

import pytest

from engine.limits import Limits
from engine.server import frames
from engine.server.addresses import Addresses
from engine.server.connection import Connection
from engine.server.lagging import Lagging
from engine.server.origins import Origins
from engine.server.proxies import TrustedProxies
from engine.server.websocket import WebSocketDoor
from engine.testing import ManualClock
from tests.server.fakes import ServedBackend
from tests.server.test_frames import FINAL, frame
from tests.sync.fakes import add, authenticate, connect, mutation, query_set

PING, PONG, CLOSE = FINAL | frames.PING, FINAL | frames.PONG, FINAL | frames.CLOSE


class FakeTransport:
    """Keeps what is written, and what its reader wants."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_reading = True
        self.is_closed = self.is_aborted = self.has_written_eof = False

    def write(self, data: bytes) -> None:
        assert not self.has_written_eof
        self.written.append(data)

    def writelines(self, pieces: list[bytes]) -> None:
        self.write(b"".join(pieces))

    def write_eof(self) -> None:
        self.has_written_eof = True

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def is_closing(self) -> bool:
        return self.is_closed or self.is_aborted

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = True

    def get_extra_info(self, name: str) -> Any:
        return ("203.0.113.1", 4711) if name == "peername" else None

    def set_write_buffer_limits(self, high: int) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 1


class Opened:
    """A connection, its door and its transport."""

    def __init__(self, **limits: Any) -> None:
        self.backend, self.clock, self.transport = ServedBackend(), ManualClock(), FakeTransport()
        self.backend.show("chat:list", "hi")
        given = Limits(**limits)
        lagging, addresses = Lagging(given, self.clock), Addresses(None, TrustedProxies(()), self.clock)
        self.door = WebSocketDoor(self.backend, given, self.clock, Origins(()), lagging, addresses)
        self.connection = Connection(
            self.door, cast(asyncio.Transport, self.transport), accepts_chunks=False, may_use_admin_key=True
        )

    @property
    def mutation_count(self) -> int:
        """How many of its mutations came as far as the session."""
        return len(self.connection.session._mutations) + len(self.backend.mutations)

    def say(self, *messages: dict[str, Any]) -> None:
        """In one go."""
        self.connection.data_received(b"".join(frame(0x81, json.dumps(message).encode()) for message in messages))

    def take_written(self) -> list[bytes]:
        written, self.transport.written = self.transport.written, []
        return written

    def sweep(self, count: int) -> None:
        for _ in range(count):
            self.connection.sweep()


async def turn(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
async def opened() -> Opened:
    opened = Opened()
    opened.say(connect(), query_set(0, add(0, "chat:list")))
    assert [b'"Transition"' in data for data in opened.take_written()] == [True]
    return opened


async def test_what_comes_in_one_go_is_answered_in_the_same_turn_and_at_once() -> None:
    opened = Opened()
    opened.say(connect(), *[query_set(number, add(number, "chat:list")) for number in range(20)])
    assert [data.count(b'"QueryUpdated"') for data in opened.transport.written] == [20]


async def test_a_connection_keeps_no_task_and_no_timer_of_its_own(opened: Opened) -> None:
    tasks = asyncio.all_tasks()
    opened.say(mutation(0))
    opened.backend.commit(*opened.backend.mutations)
    await turn()
    assert asyncio.all_tasks() == tasks
    opened.connection.connection_lost(None)
    assert opened.clock.seconds_to_next_timer is None


# -- reading -----------------------------------------------------------------------------------------------------------


async def test_others_have_their_turn_between_two_long_messages_of_one_read(opened: Opened) -> None:
    """Compressed, 32 MiB may be 32 KiB: several of them in one go would hold the loop for a second."""
    opened.say(*[mutation(number, "chat:send", {"text": "x" * (1 << 20)}) for number in range(3)])
    seen = []
    for _ in range(4):
        seen.append(opened.mutation_count)
        await turn(1)
    assert seen == [1, 2, 3, 3]
    assert opened.transport.is_reading


async def test_reading_rests_while_the_session_is_full() -> None:
    opened = Opened(mutation_queue_count_max=3)
    opened.say(connect(), query_set(0))
    opened.say(*[mutation(number) for number in range(3)])
    assert opened.transport.is_reading
    opened.say(mutation(3))
    assert not opened.transport.is_reading
    opened.say(mutation(4))  # was on its way already
    assert opened.mutation_count == 4
    opened.backend.commit(*opened.backend.mutations)
    await turn()
    assert opened.mutation_count == 4, "one answered, one more taken"
    for _ in range(4):
        opened.backend.commit(*opened.backend.mutations)
        await turn()
    assert (opened.mutation_count, opened.transport.is_reading) == (0, True)


async def test_nothing_is_taken_while_a_credential_is_verified(opened: Opened) -> None:
    opened.say(authenticate(0, "good"), mutation(0))
    assert (opened.mutation_count, opened.transport.is_reading) == (0, False)
    assert opened.connection.session._inbox == []
    await turn(5)
    assert (opened.mutation_count, opened.transport.is_reading) == (1, True)
    assert opened.backend.mutations[0].identity is not None


async def test_a_long_burst_leaves_others_their_turn(opened: Opened) -> None:
    opened.connection.data_received(frame(PING) * 300)
    assert (len(opened.take_written()), opened.transport.is_reading) == (256, False)
    await turn()
    assert (len(opened.take_written()), opened.transport.is_reading) == (44, True)


async def test_before_connect_less_is_held() -> None:
    opened = Opened(message_before_connect_size_bytes_max=1_000)
    opened.connection.data_received(frame(0x81, b"x" * 1_001)[:20])
    assert opened.take_written()[-1][2:] == (1009).to_bytes(2) + b"MessageTooLarge"
    opened = Opened(message_before_connect_size_bytes_max=1_000)
    opened.say(connect(), query_set(0, *[add(number, "chat:list") for number in range(50)]))
    assert opened.connection.session.closing is None


# -- the heartbeat -----------------------------------------------------------------------------------------------------


async def test_who_is_silent_is_pinged_after_a_heartbeat_and_dropped_after_half_of_one_more(opened: Opened) -> None:
    opened.sweep(3)
    assert opened.transport.written == []
    opened.sweep(1)
    assert opened.take_written() == [frames.header(frames.PING, 0)]
    opened.sweep(1)
    assert not opened.transport.is_aborted
    opened.sweep(1)
    assert opened.transport.is_aborted


async def test_whoever_says_anything_lives(opened: Opened) -> None:
    for _ in range(5):
        opened.sweep(5)
        opened.connection.data_received(frame(PONG)[:3])
        opened.connection.data_received(frame(PONG)[3:])
    assert opened.take_written() == [frames.header(frames.PING, 0)] * 5
    assert not opened.transport.is_aborted


async def test_the_heartbeat_rests_while_nothing_is_read(opened: Opened) -> None:
    opened.sweep(3)
    opened.say(authenticate(0, "good"))
    opened.sweep(10)
    await turn(5)
    opened.take_written()
    opened.sweep(3)
    assert (opened.take_written(), opened.transport.is_aborted) == ([], False)


async def test_the_heartbeat_rests_while_the_peer_has_much_to_read(opened: Opened) -> None:
    opened.sweep(3)
    opened.connection.pause_writing()
    opened.sweep(10)
    opened.connection.resume_writing()
    opened.sweep(3)
    assert (opened.take_written(), opened.transport.is_aborted) == ([], False)
    opened.sweep(3)
    assert opened.transport.is_aborted


async def test_all_connections_are_swept_by_one_timer_that_ends_with_the_last(opened: Opened) -> None:
    opened.door._connections.add(opened.connection)
    for _ in range(4):
        opened.door._sweep()
    assert opened.take_written() == [frames.header(frames.PING, 0)]
    timer = opened.door._sweep_timer
    assert timer is not None
    assert not timer.cancelled()
    opened.connection.connection_lost(None)
    assert timer.cancelled()


async def test_who_does_not_read_gets_no_pong(opened: Opened) -> None:
    opened.connection.pause_writing()
    opened.connection.data_received(frame(PING))
    assert opened.take_written() == []


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_peer_that_closes_is_answered_and_left(opened: Opened) -> None:
    opened.connection.data_received(frame(CLOSE, (1001).to_bytes(2)))
    assert (opened.take_written(), opened.transport.is_closed) == ([b"\x88\x02\x03\xe8"], True)
    assert opened.backend.connections[-1][1] == 1001


async def test_our_close_waits_for_that_of_the_peer(opened: Opened) -> None:
    opened.connection.session.close(1013, "TryAgain")
    await turn()
    assert opened.take_written() == [b"\x88\x0a\x03\xf5TryAgain"]
    opened.say(mutation(0))
    opened.connection.data_received(frame(PING))
    assert (opened.take_written(), opened.mutation_count, opened.transport.is_closed) == ([], 0, False)
    opened.connection.data_received(frame(CLOSE, (1013).to_bytes(2)))
    assert opened.transport.is_closed
    opened.connection.connection_lost(None)
    assert opened.clock.seconds_to_next_timer is None


async def test_the_close_of_a_peer_is_seen_behind_what_was_held_back(opened: Opened) -> None:
    closing = frame(CLOSE, (1000).to_bytes(2))
    opened.say(authenticate(0, "good"))
    opened.connection.data_received(frame(0x81, json.dumps(mutation(0)).encode()) + closing)
    opened.connection.session.close(1001, "")
    await turn()
    assert (opened.transport.is_closed, opened.transport.is_reading, opened.mutation_count) == (True, True, 0)
    assert opened.take_written() == [b"\x88\x02\x03\xe9"]


async def test_a_peer_that_never_answers_a_close_is_dropped(opened: Opened) -> None:
    opened.connection.session.close(1001, "")
    await turn()
    opened.clock.advance(1.9)
    assert not opened.transport.is_aborted
    opened.clock.advance(0.2)
    assert opened.transport.is_aborted


async def test_who_breaks_the_rules_is_told_and_not_read_any_more(opened: Opened) -> None:
    opened.connection.data_received(frame(FINAL | 3, b"x") + frame(CLOSE))
    assert opened.take_written() == [b"\x88\x0e\x03\xeaInvalidFrame"]
    assert opened.transport.has_written_eof
    opened.connection.data_received(b"whatever")
    opened.sweep(10)
    opened.clock.advance(2)
    assert opened.transport.is_aborted


async def test_a_peer_that_ends_without_a_word_has_two_seconds_to_read_the_rest(opened: Opened) -> None:
    opened.connection.eof_received()
    assert (opened.transport.is_closed, opened.backend.connections[-1][1]) == (True, None)
    opened.clock.advance(2)
    assert opened.transport.is_aborted


async def test_a_connection_that_is_lost_lets_go_of_its_session(opened: Opened) -> None:
    opened.connection.pause_writing()
    opened.say(authenticate(0, "good"))
    opened.connection.connection_lost(ConnectionResetError())
    await turn(5)
    assert opened.backend.views[0].is_closed
    assert opened.clock.seconds_to_next_timer is None


async def test_a_ready_frame_that_cannot_be_written_closes_its_connection_alone(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(data: bytes) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(opened.transport, "write", fail)
    opened.connection.session._write(b"ready")
    assert opened.connection.session.closing is not None
    assert opened.connection.session.closing.reason == "InternalServerError"
    assert "broken on purpose" in caplog.text
