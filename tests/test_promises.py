"""The promises of the engine, one test each, told by what ran and who was told."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from engine.engine import Engine
from engine.errors import EngineError
from engine.events import Committed, Event, MutationRan, QueryRan, ResultChanged
from engine.sync.protocol import decode_timestamp
from engine.testing import ManualClock
from tests.small_engine import APP, SmallEngine, Subscriber, small_engine
from tests.sync.fakes import FakeBackend, FakeClient, add, connect, mutation, query_set

MUTATION_COUNT = 200
SUBSCRIBER_COUNT = 1_000


def client_of(app: SmallEngine) -> FakeClient:
    """A client of the real engine, through a real session; it checks every message as official clients would."""
    client = FakeClient(cast(FakeBackend, app.engine.backend), clock=app.clock)
    client.say(connect())
    return client


async def messages_of(app: SmallEngine, client: FakeClient) -> list[dict[str, Any]]:
    """What the session says once nothing is under way."""
    await app.idle()
    return client.hear()


async def test_1_serializable_mutations_of_one_document_run_one_after_another_each_on_what_the_last_one_left() -> None:
    async with small_engine() as app:
        await app.mutate("notes:add", room="a", text="")
        app.forget()
        sent = [app.send("notes:append_to_first", number, room="a", text="x") for number in range(MUTATION_COUNT)]
        await app.idle()
        assert [one.outcome.value for one in sent] == [b'"%b"' % (b"x" * n) for n in range(1, MUTATION_COUNT + 1)]
        assert app.count_of(MutationRan) == MUTATION_COUNT  # no conflicts, no retries
        assert [len(text) for text in await app.engine.query("notes:texts", room="a")] == [MUTATION_COUNT]


async def test_2_durable_a_mutation_is_answered_and_its_subscribers_told_only_after_its_commit(tmp_path: Path) -> None:
    path = tmp_path / "engine.db"
    log: list[str] = []
    async with small_engine(path) as app:
        assert app.engine.database.writer.fetch_all("PRAGMA synchronous") == [(2,)]  # FULL
        app.engine.database.writer._connection.set_trace_callback(log.append)
        view = app.engine.backend.make_view(lambda: log.append("subscriber told"))
        view.add(0, "notes:count", b'{"room": "a"}', None)
        view.take()
        arguments = b'{"room": "a", "text": "x"}'
        for number in range(3):
            app.engine.backend.start_mutation(
                "notes:add", arguments, None, "session", number, lambda outcome: log.append("answered")
            )
        await app.idle()
        moments = [line for line in log if line in ("COMMIT", "answered", "subscriber told")]
        assert moments == ["COMMIT", "answered", "answered", "answered", "subscriber told"]
        with closing(sqlite3.connect(path)) as other:
            assert other.execute("SELECT count(*) FROM notes").fetchall() == [(3,)]


async def test_3_exactly_once_what_is_sent_again_after_a_reconnect_is_not_applied_twice(tmp_path: Path) -> None:
    path, request = tmp_path / "engine.db", mutation(0, "notes:add", {"room": "a", "text": "x"})
    answers: list[dict[str, Any]] = []
    async with small_engine(path) as app:
        client_of(app).say(request)  # its connection breaks before the answer
        for _ in range(2):
            client = client_of(app)
            answers += client.say(request) + await messages_of(app, client)
        assert app.count_of(MutationRan) == 1
    async with small_engine(path) as app:
        client = client_of(app)
        answers += client.say(request) + await messages_of(app, client)
        assert app.count_of(MutationRan) == 0
        assert await app.engine.query("notes:texts", room="a") == ["x"]
    told = [(answer["ts"], answer["result"]) for answer in answers if answer["type"] == "MutationResponse"]
    assert len(told) == 3
    assert len(set(told)) == 1


async def test_4_consistent_a_caller_sees_its_own_write_with_its_acknowledgement_and_all_at_one_timestamp() -> None:
    async with small_engine() as app:
        client = client_of(app)
        client.say(query_set(0, add(0, "notes:count", {"room": "a"}), add(1, "notes:texts", {"room": "a"})))
        await messages_of(app, client)
        assert client.state == {0: 0, 1: []}
        for number in range(3):
            texts = [str(n) for n in range(number + 1)]
            before = client.ts
            client.say(mutation(number, "notes:add", {"room": "a", "text": str(number)}))
            response, transition = await messages_of(app, client)
            assert (response["type"], transition["type"]) == ("MutationResponse", "Transition")
            # an official client completes the mutation when it has a Transition at or past this timestamp
            assert decode_timestamp(response["ts"]) == client.ts > before
            assert {modification["queryId"] for modification in transition["modifications"]} == {0, 1}
            assert client.state == {0: number + 1, 1: texts}


async def test_5_precise_of_1000_live_queries_a_commit_runs_the_one_that_read_what_it_wrote() -> None:
    async with small_engine() as app:
        subscribers: list[Subscriber] = []
        for number in range(SUBSCRIBER_COUNT):
            subscribers.append(app.subscriber())
            subscribers[-1].ask(0, "notes:texts", room=f"room {number}")
            await subscribers[-1].catch_up()
        told_before = [subscriber.told_count for subscriber in subscribers]
        app.forget()
        await app.mutate("notes:add", room="room 500", text="x")
        assert app.count_of(QueryRan) == 1
        told = [subscriber.told_count - before for subscriber, before in zip(subscribers, told_before, strict=True)]
        assert [number for number, count in enumerate(told) if count] == [500]
        app.forget()
        await app.mutate("notes:add", room="room that nobody reads", text="x")
        assert app.count_of(QueryRan) == 0


async def test_6_shared_a_query_with_1000_subscribers_runs_once_a_commit_and_all_hold_the_same_bytes() -> None:
    events: list[Event] = []
    async with Engine.open(APP, ":memory:", clock=ManualClock()) as engine:
        subscribers = [Subscriber(engine, None) for _ in range(SUBSCRIBER_COUNT)]
        for subscriber in subscribers:
            subscriber.ask(0, "notes:texts", room="a")
            await subscriber.catch_up()
        engine.events.listen(events.append)
        for text in "xyz":
            events.clear()
            await engine.mutation("notes:add", room="a", text=text)
            await engine.wait_until_idle()
            ts = engine.backend.published_ts()
            assert [event for event in events if not isinstance(event, MutationRan)] == [
                QueryRan("notes:texts", ts),
                ResultChanged("notes:texts", ts),
                Committed(ts, mutation_count=1, write_count=1),
            ]
            for subscriber in subscribers:
                await subscriber.catch_up()
            assert len({id(subscriber.results[0]) for subscriber in subscribers}) == 1  # encoded once
        assert subscribers[-1].value() == ["x", "y", "z"]


async def test_7_bounded_what_passes_a_limit_fails_clearly_and_harms_nobody_else() -> None:
    async with small_engine(
        run_ms_max=200, write_document_count_max=10, read_document_count_max=100, mutation_pending_count_max=4
    ) as app:
        watching = app.subscriber()
        watching.ask(0, "notes:count", room="a")
        await watching.catch_up()
        too_many = ["x"] * 11
        sent = [
            app.send("notes:add", 1, room="a", text="before"),
            app.send("notes:add_all", 2, room="a", texts=too_many),
            app.send("notes:add_and_fail", 3, room="a", text="x"),
            app.send("notes:add", 4, room="a", text="after"),
            app.send("notes:add", 5, room="a", text="one too many"),
        ]
        assert [len(one.answers) for one in sent] == [0, 0, 0, 0, 1]  # an overload is told at once
        failing: list[EngineError] = []
        try:
            await app.engine.query("notes:endless")
        except EngineError as error:
            failing.append(error)
        await app.idle()
        codes = [one.outcome.failure.code if one.outcome.failure else None for one in sent]
        assert codes == [None, "LimitExceeded", "AppError", None, "Overloaded"]
        assert [error.code for error in failing] == ["LimitExceeded"]
        assert "documents written by one mutation: 11 used, 10 allowed" in _message(sent[1].outcome.failure)
        await watching.catch_up()
        assert watching.value() == 2


def _message(failure: Any) -> str:
    return str(failure.message)
