"""Runs and who shares them: once a commit, split and joined by what is read of the identity, rounds, cache, reload."""

import asyncio
import gc
import sys
from pathlib import Path
from shutil import copytree

import pytest

from engine import Config, Engine, Limits
from engine.errors import RegistryError
from engine.events import CodeReloaded, Committed, MutationRan, QueryRan, ResultChanged, ResultUnchanged
from engine.schema.compiled import IndexSchema
from engine.testing import ManualClock
from tests.small_engine import APP, SmallEngine, person, small_engine

ALICE, BOB = person("alice", role="user"), person("bob", role="user")


async def test_a_commit_is_told_after_its_mutation_ran_and_before_its_queries_are_known() -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        await subscriber.catch_up()
        app.forget()
        await app.mutate("notes:add", room="a", text="x")
        ts = app.engine.backend.published_ts()
        assert app.events == [
            MutationRan("notes:add", committed=True),
            QueryRan("notes:count", ts),
            ResultChanged("notes:count", ts),
            Committed(ts, mutation_count=1, write_count=1),
        ]


async def test_equal_bytes_are_told_to_nobody() -> None:
    async with small_engine() as app:
        note = await app.mutate("notes:add", room="a", text="x", rank=1)
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:texts", room="a")
        await subscriber.catch_up()
        told_before = subscriber.told_count
        app.forget()
        await app.mutate("notes:move", id=note, room="a", rank=2)
        assert app.count_of(ResultUnchanged) == 1
        assert subscriber.told_count == told_before


async def test_a_range_ends_at_the_last_document_that_was_taken() -> None:
    async with small_engine() as app:
        for rank in (1, 2, 3):
            await app.mutate("notes:add", room="a", text=f"{rank}", rank=rank)
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:top", room="a", n=2)
        await subscriber.catch_up()
        app.forget()
        await app.mutate("notes:add", room="a", text="below", rank=1)
        assert not app.run_count()
        await app.mutate("notes:add", room="a", text="between", rank=2)
        assert app.run_count() == 1
        await subscriber.catch_up()
        assert subscriber.value() == ["3", "between"]


async def test_a_count_depends_on_keys_only() -> None:
    async with small_engine() as app:
        note = await app.mutate("notes:add", room="a", text="x")
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        await subscriber.catch_up()
        app.forget()
        await app.mutate("notes:edit", id=note, text="y")
        assert not app.run_count()
        await app.mutate("notes:move", id=note, room="b")
        assert app.run_count() == 1


async def test_a_missing_document_is_waited_for_by_its_id() -> None:
    async with small_engine() as app:
        note = await app.mutate("notes:add", room="a", text="x")
        other = await app.mutate("notes:add", room="a", text="y")
        await app.mutate("notes:remove", id=note)
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:get", id=note)
        await subscriber.catch_up()
        assert subscriber.value() is None
        app.forget()
        await app.mutate("notes:edit", id=other, text="z")
        assert not app.run_count()


async def test_a_query_that_failed_runs_again_when_what_it_had_read_changes() -> None:
    async with small_engine() as app:
        bad = await app.mutate("notes:add", room="a", text="bad")
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:until_bad", room="a")
        await subscriber.catch_up()
        assert subscriber.results[0].failure is not None
        app.forget()
        await app.mutate("notes:add", room="a", text="behind the bad one")
        assert not app.run_count()
        await app.mutate("notes:edit", id=bad, text="good")
        await subscriber.catch_up()
        assert subscriber.value() == ["good", "behind the bad one"]


async def test_a_query_that_read_too_much_runs_again_when_there_is_less() -> None:
    async with small_engine(read_document_count_max=2) as app:
        notes = [await app.mutate("notes:add", room="a", text=text) for text in "xyz"]
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:in_room", room="a")
        await subscriber.catch_up()
        assert subscriber.results[0].failure is not None
        assert subscriber.results[0].failure.code == "LimitExceeded"
        await app.mutate("notes:remove", id=notes[1])
        await subscriber.catch_up()
        assert [note["text"] for note in subscriber.value()] == ["x", "z"]


# -- sharing


async def test_a_query_that_reads_no_identity_is_shared_by_all() -> None:
    async with small_engine() as app:
        for identity in (None, ALICE, BOB):
            subscriber = app.subscriber(identity)
            subscriber.ask(0, "notes:count", room="a")
            await subscriber.catch_up()
        assert app.run_count() == 1


async def test_a_query_is_shared_by_those_who_agree_in_what_it_read() -> None:
    async with small_engine() as app:
        for identity in (ALICE, BOB, person("carol", role="admin"), person("dave"), None):
            subscriber = app.subscriber(identity)
            subscriber.ask(0, "notes:role")
            await subscriber.catch_up()
        assert app.run_count() == 4


async def test_a_run_that_reads_more_of_the_identity_splits_its_subscribers_and_one_that_reads_less_joins() -> None:
    async with small_engine() as app:
        subscribers = {name: app.subscriber(person(name)) for name in ("alice", "bob")}
        for subscriber in subscribers.values():
            subscriber.ask(0, "notes:greeting", room="a")
            await subscriber.catch_up()
        assert app.run_count() == 1
        await app.mutate("notes:open_room", name="a", is_private=True)
        for name, subscriber in subscribers.items():
            await subscriber.catch_up()
            assert subscriber.value() == f"hello {name}"
        app.forget()
        await app.mutate("notes:open_room", name="a", is_private=False)
        assert app.run_count() == 2
        for subscriber in subscribers.values():
            await subscriber.catch_up()
            assert subscriber.value() == "hello"
        app.forget()
        await app.mutate("notes:open_room", name="a", is_private=True)
        assert app.run_count() == 1


async def test_whoever_sees_a_page_after_it_changed_shares_its_next_runs() -> None:
    async with small_engine() as app:
        notes = [await app.mutate("notes:add", room="a", text=text) for text in "xyz"]
        options = {"numItems": 2, "cursor": None}
        first, second = app.subscriber(), app.subscriber()
        first.ask(0, "notes:page", room="a", paginationOpts=options)
        await first.catch_up()
        await app.mutate("notes:edit", id=notes[0], text="changed")
        second.ask(0, "notes:page", room="a", paginationOpts=options)
        await second.catch_up()
        app.forget()
        await app.mutate("notes:edit", id=notes[0], text="changed again")
        assert app.run_count() == 1
        for subscriber in (first, second):
            await subscriber.catch_up()
            assert [note["text"] for note in subscriber.value()["page"]] == ["changed again", "y"]


async def test_who_asks_for_a_page_that_has_grown_gets_one_of_the_size_asked_for() -> None:
    async with small_engine() as app:
        first = app.subscriber()
        await app.mutate("notes:add", room="a", text="1", rank=1)
        await app.mutate("notes:add", room="a", text="9", rank=9)
        options = {"numItems": 2, "cursor": None}
        first.ask(0, "notes:page", room="a", paginationOpts=options)
        await first.catch_up()
        await app.mutate("notes:add", room="a", text="5", rank=5)
        await first.catch_up()
        late = app.subscriber()
        late.ask(0, "notes:page", room="a", paginationOpts=options)
        await late.catch_up()
        texts = [[note["text"] for note in subscriber.value()["page"]] for subscriber in (first, late)]
        assert texts == [["1", "5", "9"], ["1", "5"]]


async def test_a_page_keeps_its_end_while_documents_come_and_go() -> None:
    async with small_engine() as app:
        for rank in (1, 3, 5):
            await app.mutate("notes:add", room="a", text=f"{rank}", rank=rank)
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:page", room="a", paginationOpts={"numItems": 2, "cursor": None})
        await subscriber.catch_up()
        cursor = subscriber.value()["continueCursor"]
        subscriber.ask(1, "notes:page", room="a", paginationOpts={"numItems": 2, "cursor": cursor})
        await subscriber.catch_up()
        for rank in (2, 4, 6):
            await app.mutate("notes:add", room="a", text=f"{rank}", rank=rank)
        await subscriber.catch_up()
        pages = [[note["text"] for note in subscriber.value(query_id)["page"]] for query_id in (0, 1)]
        assert pages == [["1", "2", "3"], ["4", "5", "6"]]


# -- rounds


async def test_a_query_that_was_written_into_while_it_ran_long_runs_once_more() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:slow_count", room="a", turns=20)
        await subscriber.catch_up()
        app.forget()
        for text in "xyz":
            await app.engine.mutation("notes:add", room="a", text=text)
        await subscriber.catch_up()
        assert subscriber.value() == 3
        assert 2 <= app.run_count("notes:slow_count") <= 3


async def test_all_who_ask_a_long_query_before_it_has_run_share_its_first_run() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscribers = [app.subscriber(person(f"{number}")) for number in range(50)]
        for subscriber in subscribers:
            subscriber.ask(0, "notes:slow_count", room="a")
            assert subscriber.take() is None
        for subscriber in subscribers:
            await subscriber.catch_up()
            assert subscriber.value() == 0
        assert app.run_count("notes:slow_count") == 1


async def test_callers_of_a_long_query_who_differ_in_what_it_reads_cost_one_run_each() -> None:
    async with small_engine(run_slow_ms=0) as app:
        await app.mutate("notes:open_room", name="a", is_private=True)
        subscribers = [app.subscriber(person(f"{number % 5}")) for number in range(20)]
        for subscriber in subscribers:
            subscriber.ask(0, "notes:greeting", room="a")
            assert subscriber.take() is None
        for number, subscriber in enumerate(subscribers):
            await subscriber.catch_up()
            assert subscriber.value() == f"hello {number % 5}"
        assert app.run_count("notes:greeting") == 5


async def test_mutations_are_answered_while_a_long_query_runs() -> None:
    async with small_engine(run_slow_ms=1, run_ms_max=60_000) as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:held_count", room="a")
        assert subscriber.take() is None
        await app.engine.mutation("notes:add", room="a", text="x")
        assert not app.run_count("notes:held_count")
        sys.modules["functions.notes"].gate["is_open"] = True
        await subscriber.catch_up()
        assert subscriber.value() == 1


async def test_a_function_that_is_quick_again_runs_at_once_again() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:slow_count", room="a")
        await subscriber.catch_up()
        subscriber.ask(1, "notes:slow_count", room="a", turns=1)
        quick = subscriber.take()
        assert quick is None, "a function that ran long waits for a round"
        await subscriber.catch_up()
        assert subscriber.value(1) == 0


async def test_two_callers_of_one_long_query_that_reads_their_identity_each_get_their_own() -> None:
    async with small_engine(run_slow_ms=0) as app:  # every query runs in rounds
        subscribers = {name: app.subscriber(person(name)) for name in ("alice", "bob")}
        await app.mutate("notes:open_room", name="a", is_private=True)
        for subscriber in subscribers.values():
            subscriber.ask(0, "notes:greeting", room="a")
            assert subscriber.take() is None
        for name, subscriber in subscribers.items():
            await subscriber.catch_up()
            assert subscriber.value() == f"hello {name}"


# -- the cache


async def test_a_result_that_nobody_watches_serves_the_next_until_a_write_touches_it() -> None:
    async with small_engine() as app:
        for _ in range(3):
            assert await app.engine.query("notes:count", room="a") == 0
        assert app.run_count() == 1
        await app.mutate("notes:add", room="a", text="x")
        assert app.run_count() == 1, "nobody watches"
        assert await app.engine.query("notes:count", room="a") == 1


async def test_results_that_nobody_watches_are_bounded_in_number() -> None:
    async with small_engine(result_cache_count_max=2) as app:
        for room in "abc":
            await app.engine.query("notes:count", room=room)
        app.forget()
        await app.engine.query("notes:count", room="c")
        await app.engine.query("notes:count", room="b")
        assert not app.run_count()
        await app.engine.query("notes:count", room="a")
        assert app.run_count() == 1
        assert len(app.engine._publisher._index) == 2


async def test_results_are_bounded_in_size_and_a_watched_one_is_told_apart_without_its_bytes() -> None:
    async with small_engine(result_cache_size_bytes=50) as app:
        await app.mutate("notes:add", room="a", text="x" * 100)
        note = await app.mutate("notes:add", room="b", text="y" * 100, rank=1)
        subscribers = {room: app.subscriber() for room in "ab"}
        for room, subscriber in subscribers.items():
            subscriber.ask(0, "notes:texts", room=room)
            await subscriber.catch_up()
        told_before = subscribers["a"].told_count
        await app.mutate("notes:move", id=note, room="b", rank=2)
        assert subscribers["a"].told_count == told_before
        late = app.subscriber()
        late.ask(0, "notes:texts", room="a")
        await late.catch_up()
        assert late.value() == ["x" * 100]


# -- asked once


async def test_who_asks_once_shares_what_is_there_and_needs_no_view(monkeypatch: pytest.MonkeyPatch) -> None:
    async with small_engine() as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        await subscriber.catch_up()
        monkeypatch.setattr("engine.live.publisher.View", None)
        ask_once = app.engine._publisher.ask_once
        assert await ask_once("notes:count", b'{"room":"a"}', None) is subscriber.results[0]
        other = await ask_once("notes:count", b'{"room":"b"}', None)
        assert await ask_once("notes:count", b'{ "room": "b" }', ALICE) is other
        assert app.run_count() == 2
        assert (await ask_once("notes:no_such", b"{}", None)).failure is not None


async def test_who_asks_once_gets_what_is_right_for_them() -> None:
    async with small_engine() as app:
        await app.mutate("notes:open_room", name="a", is_private=True)
        for _ in range(2):
            for name in ("alice", "bob"):
                assert await app.engine.query("notes:greeting", room="a", identity=person(name)) == f"hello {name}"
        assert app.run_count() == 2
        await app.mutate("notes:open_room", name="b", is_private=False)
        assert {await app.engine.query("notes:greeting", room="b", identity=each) for each in (ALICE, BOB)} == {"hello"}


async def test_who_asks_once_while_a_commit_is_published_is_told_when_that_is_over() -> None:
    async with small_engine() as app:
        await app.engine.query("notes:count", room="a")
        publisher = app.engine._publisher
        publisher.is_passing = True
        publisher.deliveries.hold()
        asking = asyncio.create_task(app.engine.query("notes:count", room="a"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not asking.done()
        publisher.is_passing = False
        publisher.deliveries.release()
        assert await asking == 0


async def test_who_asks_once_waits_when_others_had_the_time_of_this_turn() -> None:
    async with small_engine() as app:
        publisher = app.engine._publisher
        assert publisher.first_runs.has_time()
        publisher.first_runs._end = 0.0
        assert publisher._result_now("notes:count", b'{"room":"a"}', None) is None
        assert not publisher._sharing._new, "nothing is left behind"
        assert await app.engine.query("notes:count", room="a") == 0
        assert app.run_count() == 1


async def test_who_asks_once_gets_no_run_that_turns_out_to_be_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    async with small_engine() as app:
        await app.mutate("notes:open_room", name="a", is_private=False)
        alice = app.subscriber(ALICE)
        alice.ask(0, "notes:greeting", room="a")
        await alice.catch_up()
        with monkeypatch.context() as patch:
            patch.setattr(app.engine._publisher.deliveries, "try_to_put_off", lambda *_: True)
            await app.engine.mutation("notes:open_room", name="a", is_private=True)
        assert await app.engine.query("notes:greeting", room="a", identity=BOB) == "hello bob"
        await alice.catch_up()
        assert alice.value() == "hello alice"


async def test_all_who_ask_a_long_query_once_share_its_run() -> None:
    async with small_engine(run_slow_ms=1) as app:
        asking = [app.engine.query("notes:slow_count", room="a", identity=person(f"{number}")) for number in range(10)]
        assert await asyncio.gather(*asking) == [0] * 10
        assert app.run_count("notes:slow_count") == 1
        assert not app.engine._publisher.views


async def test_what_is_made_of_a_result_counts_from_its_next_use() -> None:
    async with small_engine(result_cache_size_bytes=100) as app:
        result = await app.engine.backend.http_query("notes:count", b'{"room":"a"}', None)
        result.http_plain = bytes(100)
        assert await app.engine.query("notes:count", room="b") == 0
        assert await app.engine.query("notes:count", room="b") == 0
        assert app.run_count() == 2
        assert await app.engine.query("notes:count", room="a") == 0  # now it has no room for both
        assert await app.engine.query("notes:count", room="a") == 0
        assert app.run_count() == 2
        assert await app.engine.query("notes:count", room="b") == 0
        assert app.run_count() == 3


# -- reload


@pytest.fixture
def app_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "app"
    copytree(APP, directory)
    return directory


async def test_after_a_reload_subscribers_hold_what_the_new_code_returns(app_directory: Path, tmp_path: Path) -> None:
    clock = ManualClock()
    config = Config(mode="development", limits=Limits(run_slow_ms=1_000))
    async with Engine.open(app_directory, tmp_path / "engine.db", config=config, clock=clock) as engine:
        app = SmallEngine(engine, clock)
        await app.mutate("notes:add", room="a", text="x")
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        subscriber.ask(1, "notes:texts", room="a")
        await subscriber.catch_up()
        functions = app_directory / "functions" / "notes.py"
        functions.write_text(functions.read_text().replace("room=room).count()", "room=room).count() + 100"))
        told_before = subscriber.told_count
        await engine.reload()
        await app.idle()
        assert subscriber.told_count > told_before
        assert set(await subscriber.catch_up()) == {0}, "what is as before is not given again"
        assert subscriber.value(0) == 101
        await app.mutate("notes:add", room="a", text="y")
        await subscriber.catch_up()
        assert (subscriber.value(0), subscriber.value(1)) == (102, ["x", "y"])


async def test_a_reload_keeps_nothing_of_the_old_schema(app_directory: Path, tmp_path: Path) -> None:
    def index_count() -> int:
        gc.collect()
        return sum(type(each) is IndexSchema for each in gc.get_objects())

    async with Engine.open(app_directory, tmp_path / "engine.db", clock=ManualClock()) as engine:
        counts = []
        for _ in range(3):
            await engine.reload()
            await engine.mutation("notes:add", room="a", text="x")
            assert await engine.query("notes:texts", room="a")
            assert await engine.query("notes:count", room="a")
            counts.append(index_count())
    assert counts[1] == counts[2] <= counts[0]


async def test_code_that_does_not_load_changes_nothing(app_directory: Path, tmp_path: Path) -> None:
    clock = ManualClock()
    async with Engine.open(app_directory, tmp_path / "engine.db", clock=clock) as engine:
        app = SmallEngine(engine, clock)
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:count", room="a")
        await subscriber.catch_up()
        (app_directory / "functions" / "notes.py").write_text("def broken(:\n")
        app.forget()
        with pytest.raises(RegistryError, match=r"notes\.py"):
            await engine.reload()
        await app.mutate("notes:add", room="a", text="x")
        await subscriber.catch_up()
        assert subscriber.value() == 1
        assert not app.count_of(CodeReloaded)


async def test_a_reload_while_a_long_query_runs_ends_with_the_new_code() -> None:
    async with small_engine(run_slow_ms=1) as app:
        subscriber = app.subscriber()
        subscriber.ask(0, "notes:slow_count", room="a", turns=20)
        subscriber.ask(1, "notes:count", room="a")
        assert subscriber.take() is None
        await app.engine.reload()
        await app.mutate("notes:add", room="a", text="x")
        await subscriber.catch_up()
        assert (subscriber.value(0), subscriber.value(1)) == (1, 1)


async def test_when_a_round_has_lost_its_snapshot_those_that_are_left_run_in_the_next_one() -> None:
    async with small_engine(run_slow_ms=1, run_ms_max=60_000) as app:
        first, second = app.subscriber(), app.subscriber()
        first.ask(0, "notes:held_count", room="a")
        assert first.take() is None
        second.ask(0, "notes:slow_count", room="a")
        assert second.take() is None
        await app.engine.mutation("notes:add", room="b", text="x")
        app.clock.advance(6)
        await app.engine.mutation("notes:add", room="b", text="y")
        await first.catch_up()
        await second.catch_up()
        failure = first.results[0].failure
        assert failure is not None
        assert failure.code == "LimitExceeded"
        assert second.value() == 0
