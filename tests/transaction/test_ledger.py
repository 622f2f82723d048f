"""Exactly once: what a resent mutation is answered, who is refused, and when outcomes are forgotten."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine.errors import Overloaded, RequestIdReused
from engine.events import MutationRan
from engine.limits import Limits
from engine.storage.connections import TEMPORARY, Database, WriterConnection
from engine.transaction.ledger import Ledger, LedgerKey, RecordedOutcome
from tests.small_engine import SmallEngine, person, small_engine

HOUR, DAY = 3_600, 86_400
ALICE, BOB = person("alice"), person("bob")


def kept_count(app: SmallEngine) -> int:
    """Outcomes in the ledger."""
    ((count,),) = app.engine.database.writer.fetch_all("SELECT count(*) FROM _engine_ledger")
    return int(count)


async def let_go(app: SmallEngine, seconds: float) -> None:
    """Let time pass, sweeps included; what they let go, goes with the next commit."""
    app.clock.advance(seconds)
    await app.idle()
    await app.mutate("notes:add", room="elsewhere", text="the next commit")


# -- the same request again


async def test_a_request_that_comes_again_is_answered_what_was_recorded_and_not_run() -> None:
    async with small_engine() as app:
        first = app.send("notes:add", 1, room="a", text="x")
        await app.idle()
        app.clock.advance(5)
        await app.mutate("notes:add", room="b", text="a later commit")
        app.forget()
        again = app.send("notes:add", 1, room="a", text="x")
        await app.idle()
        assert first.outcome.failure is None
        assert (again.outcome.ts, again.outcome.value) == (first.outcome.ts, first.outcome.value)
        assert app.events == []
        assert await app.engine.query("notes:texts", room="a") == ["x"]


async def test_so_it_is_after_a_restart(tmp_path: Path) -> None:
    async with small_engine(tmp_path / "engine.db") as app:
        first = app.send("notes:add", 1, room="a", text="x", identity=ALICE)
        await app.idle()
    async with small_engine(tmp_path / "engine.db") as app:
        again = app.send("notes:add", 1, room="a", text="x", identity=ALICE)
        await app.idle()
        assert (again.outcome.ts, again.outcome.value) == (first.outcome.ts, first.outcome.value)
        assert app.count_of(MutationRan) == 0
        assert await app.engine.query("notes:texts", room="a") == ["x"]


async def test_two_of_one_request_at_the_same_time_run_once() -> None:
    async with small_engine() as app:
        both = [app.send("notes:add", 1, room="a", text="x") for _ in range(2)]
        await app.idle()
        assert app.count_of(MutationRan) == 1
        assert both[0].outcome.ts == both[1].outcome.ts is not None
        assert both[0].outcome.value == both[1].outcome.value is not None
        assert await app.engine.query("notes:texts", room="a") == ["x"]


async def test_request_ids_belong_to_their_session() -> None:
    async with small_engine() as app:
        for session in ("one", "other"):
            app.send("notes:add", 1, session=session, room="a", text=session)
        await app.idle()
        assert await app.engine.query("notes:texts", room="a") == ["one", "other"]


async def test_a_session_can_ask_how_a_request_ended_without_running_it() -> None:
    async with small_engine() as app:
        arguments = b'{"room": "a", "text": "x"}'
        backend = app.engine.backend
        assert backend.recorded_outcome("session", 1, None, "notes:add", arguments) is None
        sent = app.send("notes:add", 1, room="a", text="x")
        assert backend.recorded_outcome("session", 1, None, "notes:add", arguments) is None  # it is not durable yet
        await app.idle()
        recorded = backend.recorded_outcome("session", 1, None, "notes:add", arguments)
        assert recorded is not None
        assert (recorded.ts, recorded.value) == (sent.outcome.ts, sent.outcome.value)
        refused = backend.recorded_outcome("session", 1, BOB, "notes:add", arguments)
        assert refused is not None
        assert refused.failure is not None
        assert refused.failure.code == "RequestIdReused"
        assert refused.value is None


# -- the same key for something else


@pytest.mark.parametrize(
    ("path", "text", "identity"),
    [
        pytest.param("notes:add", "x", BOB, id="another identity"),
        pytest.param("notes:add", "x", None, id="no identity"),
        pytest.param("notes:add", "y", ALICE, id="other arguments"),
        pytest.param("notes:add_and_fail", "x", ALICE, id="another function"),
    ],
)
async def test_another_request_under_a_recorded_key_is_refused_and_not_run(
    path: str, text: str, identity: object
) -> None:
    async with small_engine() as app:
        app.send("notes:add", 1, room="a", text="x", identity=ALICE)
        await app.idle()
        app.forget()
        sent = app.send(path, 1, room="a", text=text, identity=identity)  # type: ignore[arg-type]
        await app.idle()
        assert sent.outcome.failure is not None
        assert sent.outcome.failure.code == "RequestIdReused"
        assert (sent.outcome.ts, sent.outcome.value) == (None, None)
        assert app.events == []
        assert await app.engine.query("notes:texts", room="a") == ["x"]


def test_what_was_asked_cannot_be_shifted_between_identity_path_and_arguments() -> None:
    digests = {
        LedgerKey.of("s", 1, *parts).digest
        for parts in ((None, "ab", b"c"), (None, "a", b"bc"), ("a", "b", b"c"), ("ab", "", b"c"), (None, "", b"abc"))
    }
    assert len(digests) == 5


# -- what is recorded, and what not


async def test_a_mutation_that_wrote_nothing_is_recorded_too_and_never_runs_again() -> None:
    """Else it might write when it is sent again: official clients send what was answered until they are shown it."""
    async with small_engine() as app:
        sent = app.send("notes:nothing", 1)
        await app.idle()
        assert kept_count(app) == 1
        again = app.send("notes:nothing", 1)
        await app.idle()
        assert app.count_of(MutationRan) == 1
        assert again.outcome.value == sent.outcome.value == b"7"
        assert again.outcome.ts == sent.outcome.ts


async def test_a_mutation_that_failed_is_not_recorded_and_runs_again() -> None:
    async with small_engine() as app:
        for _ in range(2):
            sent = app.send("notes:add_and_fail", 1, room="a", text="x")
            await app.idle()
            assert sent.outcome.failure is not None
        assert app.count_of(MutationRan) == 2
        assert kept_count(app) == 0
        corrected = app.send("notes:add", 1, room="a", text="x")
        await app.idle()
        assert corrected.outcome.failure is None


# -- forgetting


async def test_an_outcome_goes_an_hour_after_its_client_has_seen_it() -> None:
    async with small_engine() as app:
        for request_id in (1, 2, 3):
            app.send("notes:add", request_id, room="a", text="x")
        await app.idle()
        app.engine.backend.client_saw("session", 2)
        await let_go(app, HOUR - 1)
        assert kept_count(app) == 3
        await let_go(app, 601)  # the next sweep
        assert kept_count(app) == 1
        again = app.send("notes:add", 3, room="a", text="x")
        await app.idle()
        assert again.outcome.failure is None
        assert await app.engine.query("notes:count", room="a") == 3


async def test_what_was_seen_later_goes_an_hour_later() -> None:
    async with small_engine() as app:
        app.send("notes:add", 1, room="a", text="x")
        app.send("notes:add", 2, room="a", text="y")
        await app.idle()
        app.engine.backend.client_saw("session", 1)
        app.clock.advance(HOUR / 2)
        app.engine.backend.client_saw("session", 2)
        await let_go(app, HOUR / 2 + 600)
        assert kept_count(app) == 1
        await let_go(app, HOUR + 600)
        assert kept_count(app) == 0


async def test_an_outcome_that_nobody_saw_goes_after_14_days() -> None:
    async with small_engine() as app:
        app.send("notes:add", 1, room="a", text="x")
        await app.idle()
        await let_go(app, 14 * DAY - HOUR)
        assert kept_count(app) == 1
        again = app.send("notes:add", 1, room="a", text="x")
        await app.idle()
        assert await app.engine.query("notes:texts", room="a") == ["x"]
        assert again.outcome.failure is None
        await let_go(app, HOUR + 601)
        assert kept_count(app) == 0


# -- bounded


async def test_a_full_ledger_is_overload_and_what_cannot_be_recorded_is_undone() -> None:
    async with small_engine(ledger_row_count_max=2) as app:
        sent = [app.send("notes:add", request_id, room="a", text=f"{request_id}") for request_id in (1, 2, 3)]
        unrecorded = app.mutate("notes:add", room="a", text="by nobody who resends")
        await unrecorded
        assert [one.outcome.failure and one.outcome.failure.code for one in sent] == [None, None, "Overloaded"]
        assert await app.engine.query("notes:texts", room="a") == ["1", "2", "by nobody who resends"]
        app.engine.backend.client_saw("session", 1)
        await let_go(app, HOUR + 600)
        again = app.send("notes:add", 3, room="a", text="3")
        await app.idle()
        assert again.outcome.failure is None


async def test_a_full_ledger_still_answers_what_it_has() -> None:
    async with small_engine(ledger_row_count_max=1) as app:
        first = app.send("notes:add", 1, room="a", text="x")
        await app.idle()
        again = app.send("notes:add", 1, room="a", text="x")
        await app.idle()
        assert again.outcome.value == first.outcome.value is not None


# -- by itself


@pytest.fixture
def writer() -> Iterator[WriterConnection]:
    with closing(Database.open(TEMPORARY, Limits())) as database:
        yield database.writer


def key_of(request_id: int, session_id: str = "s") -> LedgerKey:
    return LedgerKey.of(session_id, request_id, None, "f", b"{}")


def record(ledger: Ledger, writer: WriterConnection, *keys: LedgerKey) -> None:
    """One group with an outcome for each key, whose timestamp is its request id."""
    for key in keys:
        ledger.check_room()
        ledger.record(key, key.request_id, b"null")
    writer.write_meta(1, 1, ledger.write(writer))
    ledger.keep()


def outcome(key: LedgerKey) -> RecordedOutcome:
    return RecordedOutcome(key.request_id, b"null")


def test_its_rows_are_in_the_transaction_that_is_open(writer: WriterConnection) -> None:
    ledger, key = Ledger.open(writer, Limits()), key_of(1)
    writer.begin()
    ledger.record(key, 1, b"null")
    assert ledger.find(writer, key) == outcome(key)
    assert ledger.lookup(writer, key) is None
    assert ledger.write(writer) == 1
    assert ledger.lookup(writer, key) == outcome(key)
    writer.rollback()
    ledger.undo()
    assert ledger.find(writer, key) is ledger.lookup(writer, key) is None
    assert ledger.write(writer) == 0


@pytest.mark.parametrize("is_written", [False, True])
def test_another_digest_is_refused(writer: WriterConnection, is_written: bool) -> None:
    ledger = Ledger.open(writer, Limits())
    ledger.record(key_of(1), 5, b"null")
    if is_written:
        record(ledger, writer)
    with pytest.raises(RequestIdReused, match="request id 1 of this session was used for another request"):
        ledger.find(writer, LedgerKey.of("s", 1, "somebody", "f", b"{}"))


def test_only_a_request_that_may_have_come_before_is_looked_up(writer: WriterConnection) -> None:
    ledger = Ledger.open(writer, Limits())
    for request_id in range(10):
        assert ledger.find(writer, key_of(request_id)) is None
        record(ledger, writer, key_of(request_id))
    assert ledger.lookup_count == 1  # for the session's newest request
    assert ledger.find(writer, key_of(4)) == outcome(key_of(4))
    assert ledger.lookup_count == 2


def test_requests_of_one_session_that_come_out_of_order_are_found(writer: WriterConnection) -> None:
    ledger = Ledger.open(writer, Limits())
    keys = [key_of(request_id) for request_id in (7, 3, 9, 8)]  # of two connections
    for key in keys:
        assert ledger.find(writer, key) is None
        record(ledger, writer, key)
    for known in (ledger, Ledger.open(writer, Limits())):
        assert [known.find(writer, key) for key in keys] == [outcome(key) for key in keys]


def test_a_session_that_is_not_noted_any_more_is_looked_up_again(writer: WriterConnection) -> None:
    ledger = Ledger.open(writer, Limits(ledger_session_count_max=2))
    keys = [key_of(5, session_id) for session_id in "abc"]
    for key in keys:
        assert ledger.find(writer, key) is None
        record(ledger, writer, key)
    assert [ledger.find(writer, key) for key in keys] == [outcome(key) for key in keys]
    in_open_group = key_of(6, "a")
    assert ledger.find(writer, in_open_group) is None
    ledger.record(in_open_group, 6, b"null")
    for key in keys[1:]:
        ledger.find(writer, key)  # makes room: `a` goes
    assert ledger.find(writer, in_open_group) == outcome(in_open_group)


def test_what_is_kept_counts_over_a_restart(writer: WriterConnection) -> None:
    limits = Limits(ledger_row_count_max=1)
    record(Ledger.open(writer, limits), writer, key_of(1))
    with pytest.raises(Overloaded, match=r"exactly-once ledger: 1 outcomes kept, 1 allowed"):
        Ledger.open(writer, limits).check_room()


def test_the_rows_of_an_older_engine_are_counted_once(writer: WriterConnection) -> None:
    record(Ledger.open(writer, Limits()), writer, key_of(1), key_of(2))
    writer.execute("UPDATE _engine_meta SET ledger_row_count = NULL")
    record(Ledger.open(writer, Limits()), writer, key_of(3))
    assert writer.read_ledger_row_count() == 3


def test_an_undone_group_leaves_the_count_as_it_was(writer: WriterConnection) -> None:
    ledger = Ledger.open(writer, Limits(ledger_row_count_max=2))
    record(ledger, writer, key_of(1))
    for undone in ("a group", "another one"):
        ledger.check_room()
        ledger.record(key_of(2), 2, undone.encode())
        with pytest.raises(Overloaded):
            ledger.check_room()
        ledger.undo()
    writer.begin()
    assert ledger.forget(writer, 15 * DAY * 1_000_000_000, 0.0)
    writer.rollback()
    ledger.undo()
    record(ledger, writer, key_of(2))
    with pytest.raises(Overloaded):
        ledger.check_room()


def test_many_old_outcomes_go_a_bounded_number_at_a_time(writer: WriterConnection) -> None:
    ledger = Ledger.open(writer, Limits())
    record(ledger, writer, *[key_of(number, f"session {number % 7}") for number in range(1_200)])
    counts, is_done = [1_200], False
    while not is_done:
        is_done = ledger.forget(writer, 15 * DAY * 1_000_000_000, 0.0)
        ((count,),) = writer.fetch_all("SELECT count(*) FROM _engine_ledger")
        counts.append(count)
    assert counts == [1_200, 700, 200, 0]
