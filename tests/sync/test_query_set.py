"""How fast a client may ask more: the burst passes, what follows is paid for with time in which nothing is read."""

import pytest

from engine.limits import Limits
from engine.testing import ManualClock
from tests.sync.fakes import FakeBackend, FakeClient, add, connect, query_set, remove

LIMITS = Limits(subscription_burst_count=5, subscription_rate_per_second=10, query_count_max=50)


@pytest.fixture
def client() -> FakeClient:
    """Connected, with a query set that counts for nothing."""
    backend = FakeBackend()
    backend.show("chat:list", "hi")
    client = FakeClient(backend, limits=LIMITS, clock=ManualClock())
    client.say(connect(), query_set(0, *[add(number, "chat:list") for number in range(20)]))
    assert not client.session.is_reading_paused, "all come back at once after a restart"
    return client


def test_a_burst_passes_and_one_query_more_pauses_reading_until_it_is_paid_for(client: FakeClient) -> None:
    client.say(query_set(1, *[add(number, "chat:list") for number in range(20, 25)]))
    assert not client.session.is_reading_paused
    client.say(query_set(2, add(25, "chat:list")))
    assert client.session.is_reading_paused
    assert 25 in client.state, "it is answered: it is what comes after it that waits"
    client.clock.advance(0.099)
    assert client.session.is_reading_paused
    client.clock.advance(0.002)
    assert not client.session.is_reading_paused
    assert client.wake_count, "the door reads again"


def test_the_burst_is_there_again_after_a_while(client: FakeClient) -> None:
    client.say(query_set(1, *[add(number, "chat:list") for number in range(20, 25)]))
    client.clock.advance(0.5)
    client.say(query_set(2, *[add(number, "chat:list") for number in range(25, 30)]))
    assert not client.session.is_reading_paused


def test_a_query_that_is_removed_again_counts_too(client: FakeClient) -> None:
    for version in range(1, 6):
        client.say(query_set(version, add(100 + version, "chat:list"), remove(100 + version)))
        assert not client.session.is_reading_paused
    client.say(query_set(6, add(107, "chat:list"), remove(107)))
    assert client.session.is_reading_paused


def test_more_of_a_burst_that_was_read_already_makes_the_pause_longer(client: FakeClient) -> None:
    client.say(*[query_set(version, add(100 + version, "chat:list")) for version in range(1, 11)])
    client.clock.advance(0.499)
    assert client.session.is_reading_paused
    client.clock.advance(0.002)
    assert not client.session.is_reading_paused


def test_a_session_that_ends_while_it_pauses_leaves_no_timer(client: FakeClient) -> None:
    client.say(query_set(1, *[add(number, "chat:list") for number in range(20, 40)]))
    assert client.session.is_reading_paused
    client.session.close(1000, "")
    assert client.clock.seconds_to_next_timer is None


def test_a_message_that_adds_and_removes_without_end_ends_the_connection() -> None:
    backend = FakeBackend()
    backend.show("chat:list", "hi")
    for count, is_taken in ((100, True), (101, False)):
        client = FakeClient(backend, limits=LIMITS, clock=ManualClock())
        pairs = [change for number in range(count) for change in (add(number, "chat:list"), remove(number))]
        client.say(connect(), query_set(0, *pairs))
        closing = client.session.closing
        assert (closing is None) is is_taken
        if closing is not None:
            assert (closing.code, closing.reason) == (1013, "TooManyQueries")
