import asyncio

import pytest

from engine.testing import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def test_no_time_passes_by_itself(clock: ManualClock) -> None:
    before = clock.wall_ns(), clock.monotonic()
    assert (clock.wall_ns(), clock.monotonic()) == before
    clock.advance(1.5)
    assert (clock.wall_ns(), clock.monotonic()) == (before[0] + 1_500_000_000, before[1] + 1.5)


def test_timers_fire_in_the_order_of_their_due_times_each_at_its_time(clock: ManualClock) -> None:
    fired: list[tuple[str, float]] = []
    for name, delay in (("c", 3), ("a", 1), ("b", 2), ("b again", 2), ("later", 4)):
        clock.call_later(delay, lambda name=name: fired.append((name, clock.monotonic())))  # type: ignore[misc]
    clock.advance(3)
    assert fired == [("a", 1), ("b", 2), ("b again", 2), ("c", 3)]


def test_a_timer_made_by_a_timer_fires_in_the_same_turn_if_it_is_due(clock: ManualClock) -> None:
    fired: list[float] = []

    def tick() -> None:
        fired.append(clock.monotonic())
        clock.call_later(10, tick)

    clock.call_later(10, tick)
    clock.advance(35)
    assert fired == [10, 20, 30]


def test_waiting_again_for_next_to_nothing_lets_time_pass(clock: ManualClock) -> None:
    fired: list[float] = []

    def wait_again() -> None:
        fired.append(clock.monotonic())
        if clock.monotonic() < 1.000000002:
            clock.call_later(1e-10, wait_again)

    clock.call_later(1, wait_again)
    clock.advance(2)
    assert fired == [1.0, 1.000000001, 1.000000002]


def test_a_cancelled_timer_does_not_fire(clock: ManualClock) -> None:
    fired: list[int] = []
    clock.call_later(1, lambda: fired.append(1)).cancel()
    clock.call_later(2, lambda: fired.append(2))
    assert clock.seconds_to_next_timer == 2
    clock.advance(2)
    assert fired == [2]
    assert clock.seconds_to_next_timer is None


def test_the_wall_clock_can_be_set_back_without_a_timer_noticing(clock: ManualClock) -> None:
    fired: list[int] = []
    clock.call_later(1, lambda: fired.append(1))
    clock.advance(0.5)
    clock.set_wall(1_000)
    assert clock.wall_ns() == 1_000_000_000
    clock.advance(0.5)
    assert fired == [1]
    assert clock.wall_ns() == 1_500_000_000


def test_time_does_not_pass_backwards(clock: ManualClock) -> None:
    with pytest.raises(AssertionError, match="forward"):
        clock.advance(-1)


async def test_a_sleeper_wakes_when_its_time_has_come(clock: ManualClock) -> None:
    sleeper = asyncio.ensure_future(clock.sleep(5))
    await asyncio.sleep(0)
    clock.advance(4.999)
    await asyncio.sleep(0)
    assert not sleeper.done()
    clock.advance(0.001)
    await sleeper


async def test_a_sleeper_that_is_cancelled_leaves_no_timer(clock: ManualClock) -> None:
    sleeper = asyncio.ensure_future(clock.sleep(5))
    await asyncio.sleep(0)
    sleeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeper
    assert clock.seconds_to_next_timer is None


def test_the_same_seed_gives_the_same_entropy() -> None:
    assert ManualClock(seed=1).entropy(9) == ManualClock(seed=1).entropy(9) != ManualClock(seed=2).entropy(9)
