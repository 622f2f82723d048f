"""What one subscriber sees: one timestamp, each result once, and to be told when there is more."""

import asyncio
import sys
from typing import Any

from engine.events import QueryRan
from engine.functions.failures import Failure
from tests.small_engine import person, small_engine, value_of


async def test_all_queries_of_a_change_are_at_its_timestamp() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        subscriber.ask(1, "notes:texts", room="a")
        change = subscriber.take()
        assert change is not None
        assert {query_id: value_of(result) for query_id, result in change.results.items()} == {0: 0, 1: []}
        await app.mutate("notes:add", room="a", text="x")
        change = subscriber.take()
        assert change is not None
        assert {query_id: value_of(result) for query_id, result in change.results.items()} == {0: 1, 1: ["x"]}
        assert change.ts == app.engine.backend.published_ts()


async def test_only_changed_results_are_given_and_each_once() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        for query_id, room in enumerate("ab"):
            subscriber.ask(query_id, "notes:count", room=room)
        await subscriber.catch_up()
        await app.mutate("notes:add", room="b", text="x")
        change = subscriber.take()
        assert change is not None
        assert set(change.results) == {1}
        again = subscriber.take()
        assert again is not None
        assert (again.ts, again.results) == (change.ts, {})


async def test_a_result_that_is_back_at_what_was_taken_is_not_given() -> None:
    async with small_engine() as app:
        note = await app.mutate("notes:add", room="a", text="x")
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:texts", room="a")
        await subscriber.catch_up()
        await app.mutate("notes:edit", id=note, text="y")
        await app.mutate("notes:edit", id=note, text="x")
        change = subscriber.take()
        assert change is not None
        assert not change.results


async def test_a_subscriber_is_told_once_for_all_that_it_did_not_take() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        await subscriber.catch_up()
        told_before = subscriber.told_count
        await app.mutate("notes:add", room="b", text="no business of its")
        assert subscriber.told_count == told_before
        await app.mutate("notes:add", room="a", text="x")
        assert subscriber.told_count == told_before + 1


async def test_a_lagging_subscriber_skips_to_the_newest_state() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:texts", room="a")
        await subscriber.catch_up()
        for text in "xyz":
            await app.mutate("notes:add", room="a", text=text)
        change = subscriber.take()
        assert change is not None
        assert value_of(change.results[0]) == ["x", "y", "z"]


async def test_two_query_ids_of_one_query_are_both_given_its_result() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        subscriber.ask(1, "notes:count", room="a")
        change = subscriber.take()
        assert change is not None
        assert set(change.results) == {0, 1}
        subscriber.view.remove(0)
        await app.mutate("notes:add", room="a", text="x")
        change = subscriber.take()
        assert change is not None
        assert set(change.results) == {1}


async def test_a_removed_query_is_not_given_and_does_not_run() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        await subscriber.catch_up()
        subscriber.view.remove(0)
        app.forget()
        await app.mutate("notes:add", room="a", text="x")
        change = subscriber.take()
        assert change is not None
        assert not change.results
        assert not app.run_count()


async def test_a_wrong_ask_is_answered_by_its_failure() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:no_such_query")
        subscriber.ask(1, "notes:count")
        subscriber.ask(2, "notes:count", room="a")
        change = subscriber.take()
        assert change is not None
        failures: list[Any] = [change.results[0].failure, change.results[1].failure, change.results[2].failure]
        assert [failure and failure.code for failure in failures] == ["FunctionNotFound", "InvalidArgument", None]
        assert isinstance(failures[0], Failure)


# -- identity


async def test_another_identity_is_asked_for_only_where_it_was_read() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber(person("alice", role="admin"))
        subscriber.ask(0, "notes:count", room="a")
        subscriber.ask(1, "notes:role")
        await subscriber.catch_up()
        app.forget()
        subscriber.view.set_identity(person("bob", role="user"))
        change = subscriber.take()
        assert change is not None
        assert {query_id: value_of(result) for query_id, result in change.results.items()} == {1: "user"}
        assert app.run_count() == 1


async def test_another_identity_with_the_same_claims_runs_nothing() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber(person("alice", role="admin"))
        subscriber.ask(0, "notes:role")
        await subscriber.catch_up()
        app.forget()
        subscriber.view.set_identity(person("bob", role="admin"))
        change = subscriber.take()
        assert change is not None
        assert not change.results
        assert not app.run_count()


# -- long queries


async def test_while_a_long_query_runs_the_view_gives_nothing_and_then_one_state() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:slow_count", room="a")
        subscriber.ask(1, "notes:count", room="a")
        assert subscriber.take() is None
        assert subscriber.told_count == 0
        await app.idle()
        assert subscriber.told_count >= 1
        given = await subscriber.catch_up()
        assert {query_id: value_of(result) for query_id, result in given.items()} == {0: 0, 1: 0}


async def test_what_is_committed_while_a_long_query_runs_is_seen_by_none_of_the_view_and_then_by_all() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:slow_count", room="a", turns=20)
        subscriber.ask(1, "notes:count", room="a")
        await subscriber.catch_up()
        states: list[dict[int, Any]] = []

        def take() -> None:
            if subscriber.take() is not None:
                states.append({query_id: subscriber.value(query_id) for query_id in subscriber.results})

        for text in "xyz":
            await app.engine.mutation("notes:add", room="a", text=text)
            take()
        while not states or states[-1] != {0: 3, 1: 3}:
            await app.idle()
            take()
        assert all(state[0] == state[1] for state in states)


async def test_news_that_come_while_a_long_query_finds_no_change_are_not_lost() -> None:
    async with small_engine(run_slow_ms=1) as app:
        gate = sys.modules["functions.notes"].gate
        gate["is_open"] = True
        note = await app.mutate("notes:add", room="a", text="x", rank=1)
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:held_count", room="a")
        subscriber.ask(1, "notes:count", room="b")
        await subscriber.catch_up()
        gate["is_open"] = False
        await asyncio.gather(  # one commit: one comes for one that goes
            app.engine.mutation("notes:move", id=note, room="c"), app.engine.mutation("notes:add", room="a", text="y")
        )
        await app.engine.mutation("notes:add", room="b", text="while that runs")
        assert not app.engine._publisher.is_idle
        gate["is_open"] = True
        await subscriber.catch_up()
        assert (subscriber.value(0), subscriber.value(1)) == (1, 1)


async def test_a_query_added_while_a_long_one_runs_is_in_the_next_change() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:slow_count", room="a")
        assert subscriber.take() is None
        subscriber.ask(1, "notes:count", room="a")
        change = None
        while change is None:
            await app.idle()
            change = subscriber.take()
        assert set(change.results) == {0, 1}


async def test_an_identity_changed_while_a_long_query_runs_is_that_of_the_next_change() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscriber = app.subscriber(person("alice", role="admin"))
        subscriber.ask(0, "notes:role")
        subscriber.ask(1, "notes:slow_count", room="a")
        assert subscriber.take() is None
        subscriber.view.set_identity(person("bob", role="user"))
        await subscriber.catch_up()
        assert subscriber.value(0) == "user"


async def test_a_long_query_that_is_removed_lets_the_others_go() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscriber = app.subscriber()
        subscriber.ask(1, "notes:count", room="a")
        subscriber.ask(0, "notes:slow_count", room="a")
        assert subscriber.take() is None
        subscriber.view.remove(0)
        change = subscriber.take()
        assert change is not None
        assert set(change.results) == {1}
        await app.idle()


async def test_two_subscribers_of_one_long_query_share_its_run() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscribers = [app.subscriber(person("alice")), app.subscriber(person("bob"))]
        for subscriber in subscribers:
            subscriber.ask(0, "notes:slow_count", room="a")
            await subscriber.catch_up()
        app.forget()
        await app.mutate("notes:add", room="a", text="x")
        for subscriber in subscribers:
            await subscriber.catch_up()
            assert subscriber.value() == 1
        assert app.run_count("notes:slow_count") == 1
        assert app.count_of(QueryRan) == 1


# -- ends


async def test_a_closed_view_holds_nothing_and_hears_nothing() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        await subscriber.catch_up()
        told_before = subscriber.told_count
        subscriber.view.close()
        app.forget()
        await app.mutate("notes:add", room="a", text="x")
        assert subscriber.told_count == told_before
        assert not app.run_count()
        assert not app.engine._publisher.views


async def test_a_view_that_is_larger_than_the_cache_comes_to_an_end_with_long_queries_in_it() -> None:
    async with small_engine(run_slow_ms=1, result_cache_size_bytes=1) as app:
        subscriber = app.subscriber()
        for number in range(6):
            path = "notes:slow_count" if number % 2 else "notes:texts"
            subscriber.ask(number, path, room=f"{number}")
        await subscriber.catch_up()
        for number in range(6):
            await app.engine.mutation("notes:add", room=f"{number}", text="x")
        await subscriber.catch_up()
        assert [subscriber.value(number) for number in range(6)] == [["x"], 1, ["x"], 1, ["x"], 1]


async def test_results_that_the_cache_has_no_room_for_are_given_with_their_bytes() -> None:
    async with small_engine(result_cache_size_bytes=100) as app:
        texts = [f"a long text, number {number}" for number in range(5)]
        for number in range(10):
            await app.mutate("notes:add_all", room=f"{number}", texts=texts)
        subscriber = app.subscriber()
        for number in range(10):
            subscriber.ask(number, "notes:texts", room=f"{number}")
        await subscriber.catch_up()
        assert all(subscriber.value(number) == texts for number in range(10))
        lagging = app.subscriber()
        for number in range(10):
            lagging.ask(number, "notes:texts", room=f"{number}")
        for number in range(10):
            await app.mutate("notes:add", room=f"{number}", text="one more")
        await lagging.catch_up()
        await subscriber.catch_up()
        assert all(lagging.value(number) == [*texts, "one more"] for number in range(10))
        assert all(subscriber.value(number) == [*texts, "one more"] for number in range(10))
