"""Turns of the queue, and queries that are not run for states that nobody would be given."""

import asyncio
import random
from typing import Any

import pytest

from engine.live import deliveries
from engine.testing import ManualClock
from tests.small_engine import SmallEngine, Subscriber, person, small_engine, value_of

FOR_EVER_MS = 3_600_000
COUNT = "notes:count"


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> "Turns":
    return Turns(monkeypatch)


class Turns:
    """How many views are told in one turn: none while stopped."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def stop(self) -> None:
        self._patch.setattr(deliveries, "_TURN_COUNT_MAX", 0)

    def go_on(self, count: int = 256) -> None:
        self._patch.setattr(deliveries, "_TURN_COUNT_MAX", count)


async def add(app: SmallEngine, room: str) -> int:
    """Add a note, wait for the pass only, and give its timestamp."""
    await app.engine.mutation("notes:add", room=room, text="x")
    return app.engine.backend.published_ts()


async def watching(app: SmallEngine, *rooms: str) -> Subscriber:
    subscriber = app.subscriber()
    for query_id, room in enumerate(rooms):
        subscriber.ask(query_id, COUNT, room=room)
    await subscriber.catch_up()
    await app.idle()
    return subscriber


async def test_a_query_is_not_run_again_while_its_last_result_is_on_its_way(turns: Turns) -> None:
    async with small_engine(rerun_wait_ms_max=FOR_EVER_MS) as app:
        first, second = await watching(app, "a"), await watching(app, "a")
        app.forget()
        turns.stop()
        for _ in range(4):
            await add(app, "a")
        assert app.run_count(COUNT) == 1
        assert not app.engine._publisher.is_idle
        turns.go_on()
        await app.idle()
        assert app.run_count(COUNT) == 2
        for subscriber in (first, second):
            assert await subscriber.catch_up()
            assert subscriber.value() == 4


async def test_it_waits_no_longer_than_its_bound(turns: Turns) -> None:
    async with small_engine(rerun_wait_ms_max=0) as app:
        await watching(app, "a")
        app.forget()
        turns.stop()
        for _ in range(4):
            await add(app, "a")
            for _ in range(3):
                await asyncio.sleep(0)
        assert app.run_count(COUNT) == 4
        turns.go_on()


async def test_a_view_that_takes_meanwhile_gets_the_last_state_at_which_it_was_right(turns: Turns) -> None:
    async with small_engine(rerun_wait_ms_max=FOR_EVER_MS) as app:
        subscriber = await watching(app, "a", "b")
        turns.stop()
        first_ts = await add(app, "a")
        await add(app, "a")
        change = subscriber.take()
        assert change is not None
        assert (change.ts, subscriber.value(0)) == (first_ts, 1)
        told_before = subscriber.told_count
        turns.go_on()
        await app.idle()
        assert subscriber.told_count > told_before
        await subscriber.catch_up()
        assert subscriber.value(0) == 2


async def test_it_runs_at_once_for_a_view_that_holds_something_newer(turns: Turns) -> None:
    async with small_engine(rerun_wait_ms_max=FOR_EVER_MS) as app:
        subscriber = await watching(app, "a", "b")
        app.forget()
        turns.stop()
        await add(app, "a")
        await add(app, "a")
        ts = await add(app, "b")
        change = subscriber.take()
        assert change is not None
        assert (change.ts, subscriber.value(0), subscriber.value(1)) == (ts, 2, 1)
        assert app.run_count(COUNT) == 3
        turns.go_on()


async def test_it_runs_at_once_for_a_new_subscriber(turns: Turns) -> None:
    async with small_engine(rerun_wait_ms_max=FOR_EVER_MS) as app:
        await watching(app, "a")
        turns.stop()
        await add(app, "a")
        ts = await add(app, "a")
        newcomer = app.subscriber()
        newcomer.ask(0, COUNT, room="a")
        change = newcomer.take()
        assert change is not None
        assert (change.ts, newcomer.value()) == (ts, 2)
        assert await app.engine.query(COUNT, room="a") == 2
        turns.go_on()


async def test_what_nobody_watches_any_more_is_not_run(turns: Turns) -> None:
    async with small_engine(rerun_wait_ms_max=FOR_EVER_MS) as app:
        subscriber = await watching(app, "a")
        turns.stop()
        await add(app, "a")
        await add(app, "a")
        app.forget()
        subscriber.view.close()
        turns.go_on()
        await app.idle()
        assert not app.run_count()


async def test_reloaded_code_is_not_kept_waiting(turns: Turns) -> None:
    async with small_engine(rerun_wait_ms_max=FOR_EVER_MS) as app:
        subscriber = await watching(app, "a")
        turns.stop()
        await add(app, "a")
        await add(app, "a")
        await app.engine.reload()
        turns.go_on()
        await app.idle()
        await subscriber.catch_up()
        assert subscriber.value() == 2


async def test_a_run_that_was_put_off_may_split_its_subscribers(turns: Turns) -> None:
    async with small_engine(rerun_wait_ms_max=FOR_EVER_MS) as app:
        subscribers = {name: app.subscriber(person(name)) for name in ("alice", "bob")}
        await app.mutate("notes:open_room", name="a", is_private=True)
        for subscriber in subscribers.values():
            subscriber.ask(0, "notes:greeting", room="a")
            subscriber.ask(1, COUNT, room="a")
            await subscriber.catch_up()
        await app.mutate("notes:open_room", name="a", is_private=False)
        turns.stop()
        for is_private in (False, True):
            await app.engine.mutation("notes:open_room", name="a", is_private=is_private)
            await app.engine.mutation("notes:add", room="a", text="x")
            for subscriber in subscribers.values():
                subscriber.take()
        turns.go_on()
        await app.idle()
        for name, subscriber in subscribers.items():
            await subscriber.catch_up()
            assert (subscriber.value(0), subscriber.value(1)) == (f"hello {name}", 2)


async def test_a_turn_tells_so_many_and_the_next_goes_on_where_it_ended(turns: Turns) -> None:
    async with small_engine() as app:
        subscribers = [await watching(app, "a") for _ in range(5)]
        told_before = [subscriber.told_count for subscriber in subscribers]
        turns.stop()
        await add(app, "a")
        turns.go_on(2)
        told_counts = []
        for _ in range(5):
            told = [subscriber.told_count - before for subscriber, before in zip(subscribers, told_before, strict=True)]
            told_counts.append(sum(told))
            assert told == sorted(told, reverse=True)
            await asyncio.sleep(0)
        assert set(told_counts) <= {0, 2, 4, 5}
        assert told_counts[-1] == 5


async def test_a_subscriber_whose_door_breaks_costs_the_others_nothing() -> None:
    async with small_engine() as app:
        broken = await watching(app, "a")
        other = await watching(app, "a")
        reported: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))

        def fail() -> None:
            raise ZeroDivisionError

        broken.view.on_ready = fail
        told_before = other.told_count
        await app.mutate("notes:add", room="a", text="x")
        assert other.told_count == told_before + 1
        assert [type(error) for error in reported] == [ZeroDivisionError]


async def test_the_only_news_is_taken_once_at_the_timestamp_of_its_run() -> None:
    async with small_engine() as app:
        subscriber = await watching(app, "a", "b")
        await app.mutate("notes:add", room="a", text="x")
        ts = app.engine.backend.published_ts()
        await app.mutate("notes:add", room="elsewhere", text="x")
        only = subscriber.view.take_only(subscriber.ts)
        assert only is not None
        assert (only[0], value_of(only[1]), only[1].ts) == (0, 1, ts)
        assert subscriber.view.take_only(ts) is None
        change = subscriber.view.take()
        assert change is not None
        assert not change.results


async def test_what_is_not_alone_or_older_than_what_was_taken_is_left_for_all_of_it() -> None:
    async with small_engine() as app:
        subscriber = await watching(app, "a", "b")
        await app.mutate("notes:add", room="a", text="x")
        assert subscriber.view.take_only(app.engine.backend.published_ts() + 1) is None
        await app.mutate("notes:add", room="b", text="x")
        assert subscriber.view.take_only(0) is None
        change = subscriber.take()
        assert change is not None
        assert set(change.results) == {0, 1}


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_is_put_off_a_subscriber_holds_one_moment(seed: int, turns: Turns) -> None:
    """All that a subscriber holds is what was true at its timestamp; in the end that is now."""
    randomness = random.Random(seed)
    rooms = "abc"
    async with small_engine(rerun_wait_ms_max=randomness.choice([0, FOR_EVER_MS])) as app:
        counts = dict.fromkeys(rooms, 0)
        counts_by_ts = {app.engine.backend.published_ts(): dict(counts)}
        asked = [randomness.sample(rooms, randomness.randint(1, 3)) for _ in range(8)]
        subscribers = [await watching(app, *each) for each in asked]

        def take(subscriber: Subscriber) -> None:
            only = subscriber.view.take_only(subscriber.ts) if randomness.random() < 0.7 else None
            if only is not None:
                subscriber.results[only[0]], subscriber.ts = only[1], only[1].ts
            else:
                subscriber.take()

        for _ in range(60):
            turns.go_on(randomness.choice([0, 0, 1, 4, 256]))
            match randomness.randrange(4):
                case 0 | 1:
                    room = randomness.choice(rooms)
                    ts = await add(app, room)
                    counts[room] += 1
                    counts_by_ts[ts] = dict(counts)
                case 2:
                    take(randomness.choice(subscribers))
                case _:
                    await asyncio.sleep(0)
            for subscriber, its_rooms in zip(subscribers, asked, strict=True):
                held = {room: subscriber.value(query_id) for query_id, room in enumerate(its_rooms)}
                assert held == {room: counts_by_ts[subscriber.ts][room] for room in its_rooms}
        turns.go_on()
        for subscriber, its_rooms in zip(subscribers, asked, strict=True):
            await subscriber.catch_up()
            assert [subscriber.value(query_id) for query_id in range(len(its_rooms))] == [
                counts[room] for room in its_rooms
            ]


async def test_an_engine_that_was_closed_runs_nothing_that_was_put_off(turns: Turns) -> None:
    async with small_engine(rerun_wait_ms_max=FOR_EVER_MS) as app:
        await watching(app, "a")
        turns.stop()
        await add(app, "a")
        await add(app, "a")
        app.forget()
    turns.go_on()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not app.run_count(COUNT)


async def test_a_clock_that_stands_still_keeps_nobody_waiting(turns: Turns) -> None:
    """The bound is of real time: a test that turns the clock by hand would else wait for ever."""
    async with small_engine(rerun_wait_ms_max=1) as app:
        assert isinstance(app.clock, ManualClock)
        await watching(app, "a")
        app.forget()
        turns.stop()
        await add(app, "a")
        await add(app, "a")
        async with asyncio.timeout(10):
            while app.run_count(COUNT) < 2:  # noqa: ASYNC110 - what it waits for knows nothing of tests
                await asyncio.sleep(0)
        turns.go_on()
