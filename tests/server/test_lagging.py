"""Who does not read: dropped when nothing goes for long, or when all of them together hold too much."""

import asyncio
from typing import Any, cast

import pytest

from engine.limits import Limits
from engine.server.lagging import Lagging
from engine.testing import ManualClock

LIMITS = Limits(send_stuck_seconds_max=30, send_unsent_size_bytes_max=1_000)


class Transport:
    """Holds as much as a test says."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.size_bytes

    def get_extra_info(self, name: str) -> Any:
        return None

    def abort(self) -> None:
        self.is_aborted = True


class Kept:
    """What lags, by the clock of a test."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.lagging = Lagging(LIMITS, self.clock)

    def began(self, size_bytes: int) -> Transport:
        transport = Transport(size_bytes)
        self.lagging.began(cast(asyncio.Transport, transport))
        return transport

    def ended(self, transport: Transport) -> None:
        self.lagging.ended(cast(asyncio.Transport, transport))


@pytest.fixture
def kept() -> Kept:
    return Kept()


def test_one_that_gets_rid_of_nothing_is_aborted_in_time(kept: Kept) -> None:
    stuck = kept.began(100)
    kept.clock.advance(29.9)
    assert not stuck.is_aborted
    kept.clock.advance(0.1)
    assert stuck.is_aborted
    assert kept.clock.seconds_to_next_timer is None


def test_one_that_gets_rid_of_anything_lives_on(kept: Kept) -> None:
    slow = kept.began(100)
    kept.clock.advance(29)
    slow.size_bytes = 99
    kept.clock.advance(30)
    assert not slow.is_aborted
    slow.size_bytes = 98
    kept.clock.advance(1)  # it is looked at every 7.5 s
    kept.clock.advance(29.9)
    assert not slow.is_aborted
    kept.clock.advance(0.1)
    assert slow.is_aborted


def test_one_that_has_caught_up_is_watched_no_more(kept: Kept) -> None:
    transport = kept.began(100)
    kept.ended(transport)
    kept.ended(transport)
    assert kept.clock.seconds_to_next_timer is None


def test_together_they_hold_what_is_allowed_and_past_it_the_largest_goes(kept: Kept) -> None:
    transports = [kept.began(size) for size in (300, 500, 200)]
    assert [each.is_aborted for each in transports] == [False, False, False]
    last = kept.began(1)
    assert [each.is_aborted for each in (*transports, last)] == [False, True, False, False]
    assert not kept.began(499).is_aborted
    kept.ended(transports[0])
    assert not kept.began(300).is_aborted
    assert kept.began(1_001).is_aborted, "alone it is too much"
