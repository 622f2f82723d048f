"""What happens when a client goes away: once, as who registered it, and only if nobody is back in time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.errors import FunctionMisuse, FunctionNotFound, InvalidArgument, Overloaded, SessionRequired
from engine.events import Committed, DisconnectRan, FunctionFaulted
from engine.functions.failures import Failure
from engine.identity import Identity
from engine.sync.backend import MutationOutcome
from engine.testing import ManualClock
from engine.transaction.committer import Committer, Submission
from tests.functions.apps import UNHURRIED, OpenApp, open_app

FUNCTIONS = """
@mutation
async def leave(ctx, key: str) -> None:
    identity = ctx.auth.identity()
    who = identity and f"{identity.token_identifier} {identity.claims.get('role')}"
    await ctx.db.insert(Item(key=key, note=str(who), score=ctx.now))

@mutation
async def join(ctx, key: str = "k", fail: bool = False) -> None:
    await ctx.session.on_disconnect(leave, key=key)
    if fail:
        raise ValueError("after all not")

@mutation
async def stay(ctx, key: str = "k") -> None:
    await ctx.session.cancel_on_disconnect(leave, key=key)

@mutation
async def whether(ctx) -> bool:
    return ctx.session.is_open

@query
async def left(ctx) -> list[Item]: return await ctx.db.query(Item).collect()
"""
ALICE = Identity(subject="alice", issuer="https://login.example", claims={"role": "admin", "teams": ["a", {"b": 1}]})
BOB = Identity(subject="bob", issuer="https://login.example")
TAB_CLOSED = 1001


class Tab:
    """One connection of a session."""

    def __init__(self, app: OpenApp, session_id: str) -> None:
        self.session_id = session_id
        self._backend, self._request_count = app.engine.backend, 0
        self._backend.session_connected(session_id)

    async def call(self, path: str, identity: Identity | None = None, /, **arguments: Any) -> Any:
        """What the mutation returns. Raises what it raises."""
        outcome = await self.outcome(path, identity, **arguments)
        if outcome.failure is not None:
            assert isinstance(outcome.failure, Failure)
            raise outcome.failure.error
        assert outcome.value is not None
        return msgspec.json.decode(outcome.value)

    async def outcome(self, path: str, identity: Identity | None = None, /, **arguments: Any) -> MutationOutcome:
        done: asyncio.Future[MutationOutcome] = asyncio.get_running_loop().create_future()
        self._request_count += 1
        raw = msgspec.json.encode(arguments)
        self._backend.start_mutation(path, raw, identity, self.session_id, self._request_count, done.set_result)
        async with asyncio.timeout(20):
            return await done

    def close(self, code: int | None = None) -> None:
        self._backend.session_gone(self.session_id, code)


async def left(app: OpenApp) -> list[str]:
    """The keys that somebody has left with, in order."""
    return [item.key for item in await app.call("m:left")]


def registered_count(app: OpenApp) -> int:
    ((count,),) = app.engine.database.writer.fetch_all("SELECT count(*) FROM _disconnects")
    return int(count)


def runs(app: OpenApp) -> list[DisconnectRan]:
    return [event for event in app.events if isinstance(event, DisconnectRan)]


@asynccontextmanager
async def opened(directory: Path, functions: str = FUNCTIONS, **options: Any) -> AsyncIterator[OpenApp]:
    async with open_app(directory, functions, **options) as app:
        yield app


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[OpenApp]:
    async with open_app(tmp_path, FUNCTIONS) as app:
        yield app


# -- when


@pytest.mark.parametrize(("code", "grace"), [(None, 10), (1006, 10), (1000, 10), (1005, 10), (TAB_CLOSED, 2)])
async def test_the_mutation_runs_when_the_client_is_gone_for_the_grace(
    app: OpenApp, code: int | None, grace: float
) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join")
    await app.turn(3_600)
    assert await left(app) == [], "it is there"
    gone_at = app.clock.wall_ns() / 1e6
    tab.close(code)
    await app.turn(grace - 0.001)
    assert await left(app) == []
    await app.turn(0.001)
    (item,) = await app.call("m:left")
    assert gone_at + grace * 1000 <= item.score < gone_at + grace * 1000 + 2
    await app.turn(3_600)
    assert (await left(app), registered_count(app)) == (["k"], 0)
    assert runs(app) == [DisconnectRan("m:leave", True)]


@pytest.mark.parametrize("code", [None, TAB_CLOSED])
async def test_a_session_that_is_back_in_time_has_not_left(app: OpenApp, code: int | None) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join")
    for _ in range(3):
        tab.close(code)
        await app.turn(1.999)
        tab = Tab(app, "one")
        await app.turn(60)
    assert (await left(app), registered_count(app)) == ([], 1)
    tab.close()
    await app.turn(10)
    assert await left(app) == ["k"]


async def test_while_a_session_reconnects_it_may_have_two_connections(app: OpenApp) -> None:
    old = Tab(app, "one")
    await old.call("m:join")
    new = Tab(app, "one")
    old.close()
    await app.turn(60)
    assert await left(app) == []
    new.close(TAB_CLOSED)
    await app.turn(2)
    assert await left(app) == ["k"]


async def test_the_grace_is_that_of_the_connection_that_closed_last(app: OpenApp) -> None:
    tabs = [Tab(app, "one"), Tab(app, "one")]
    await tabs[0].call("m:join")
    tabs[0].close(TAB_CLOSED)
    tabs[1].close()
    await app.turn(9.999)
    assert await left(app) == []
    await app.turn(0.001)
    assert await left(app) == ["k"]


async def test_a_client_that_comes_back_too_late_registers_again(app: OpenApp) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join")
    tab.close()
    await app.turn(11)
    again = Tab(app, "one")
    await app.turn(60)
    assert await left(app) == ["k"]
    await again.outcome("m:join")  # the request id is used; a real client counts on
    await again.call("m:join")
    again.close()
    await app.turn(10)
    assert await left(app) == ["k", "k"]


async def test_who_is_gone_before_its_mutation_commits_has_left_too(app: OpenApp) -> None:
    tab = Tab(app, "one")
    joining = asyncio.ensure_future(tab.outcome("m:join"))
    await asyncio.sleep(0)
    tab.close()
    assert (await joining).failure is None
    await app.turn(10.001)
    assert await left(app) == ["k"]


async def test_who_is_back_before_the_mutation_runs_has_not_left(app: OpenApp) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join")
    tab.close()
    await app.idle()
    app.clock.advance(10)  # the mutation waits for its turn
    tab = Tab(app, "one")
    await app.turn(60)
    assert (await left(app), registered_count(app), runs(app)) == ([], 1, [])
    tab.close()
    app.clock.advance(10)
    Tab(app, "one").close()  # here and gone again: another grace
    await app.turn(9)
    assert await left(app) == []
    await app.turn(1)
    assert await left(app) == ["k"]


async def test_each_session_leaves_by_itself(app: OpenApp) -> None:
    tabs = {name: Tab(app, name) for name in ("one", "two", "three")}
    for name, tab in tabs.items():
        await tab.call("m:join", key=name)
    tabs["two"].close()
    await app.turn(5)
    tabs["one"].close()
    await app.turn(5)
    assert await left(app) == ["two"]
    await app.turn(5)
    assert await left(app) == ["two", "one"]
    await app.turn(60)
    assert (await left(app), registered_count(app)) == (["two", "one"], 1)


async def test_all_that_a_session_registered_runs_in_its_order(app: OpenApp) -> None:
    tab = Tab(app, "one")
    for key in "abcde":
        await tab.call("m:join", key=key)
    tab.close()
    await app.turn(10)
    assert await left(app) == list("abcde")


# -- what, and as whom


async def test_registering_the_same_call_again_changes_nothing(app: OpenApp) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join")
    await app.idle()
    rows = app.engine.database.writer.fetch_all("SELECT * FROM _disconnects")
    for _ in range(5):
        await tab.call("m:join")
    assert app.engine.database.writer.fetch_all("SELECT * FROM _disconnects") == rows
    assert len(rows) == 1
    tab.close()
    await app.turn(10)
    assert await left(app) == ["k"]


async def test_it_runs_as_the_caller_who_registered_it_with_all_claims(app: OpenApp) -> None:
    for identity in (ALICE, BOB, None):
        tab = Tab(app, str(identity))
        await tab.call("m:join", identity)
        tab.close()
    await app.turn(10)
    notes = sorted(item.note for item in await app.call("m:left"))
    assert notes == ["None", "https://login.example|alice admin", "https://login.example|bob None"]


async def test_who_registers_again_has_the_newest_claims(app: OpenApp) -> None:
    tab = Tab(app, "one")
    for identity in (Identity(subject="alice", issuer=ALICE.issuer, claims={"role": "guest"}), ALICE):
        await tab.call("m:join", identity)
    tab.close()
    await app.turn(10)
    assert [item.note for item in await app.call("m:left")] == ["https://login.example|alice admin"]


async def test_nobody_takes_over_what_another_caller_of_the_session_registered(app: OpenApp) -> None:
    tab = Tab(app, "one")
    for identity in (ALICE, BOB, None):  # each signs out, and the next one signs in
        await tab.call("m:join", identity)
    await tab.call("m:stay", BOB)
    tab.close()
    await app.turn(10)
    assert [item.note for item in await app.call("m:left")] == ["https://login.example|alice admin", "None"]


async def test_a_rolled_back_mutation_has_registered_nothing(app: OpenApp) -> None:
    tab = Tab(app, "one")
    assert (await tab.outcome("m:join", fail=True)).failure is not None
    tab.close()
    await app.turn(60)
    assert await left(app) == []


async def test_what_is_taken_back_does_not_run(app: OpenApp) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join", key="a")
    await tab.call("m:join", key="b")
    for _ in range(2):  # the second time there is nothing to do
        await tab.call("m:stay", key="a")
    tab.close()
    await app.turn(10)
    assert await left(app) == ["b"]


async def test_what_is_taken_back_while_the_grace_runs_does_not_run(app: OpenApp) -> None:
    tab, straggler = Tab(app, "one"), Tab(app, "one")
    await tab.call("m:join")
    tab.close()
    straggler.close()
    await app.turn(5)
    await straggler.outcome("m:whether")  # a request id that is used already
    await straggler.call("m:stay")  # it was on its way
    await app.turn(60)
    assert (await left(app), runs(app)) == ([], [])


# -- other tabs


async def test_nobody_leaves_who_still_has_another_tab(app: OpenApp) -> None:
    tabs = [Tab(app, name) for name in ("one", "two", "three")]
    for tab in tabs:
        await tab.call("m:join", ALICE)
    tabs[1].close(TAB_CLOSED)
    await app.turn(60)
    tabs[0].close()
    await app.turn(60)
    assert (await left(app), registered_count(app)) == ([], 1)
    tabs[2].close(TAB_CLOSED)
    await app.turn(2)
    assert await left(app) == ["k"]


async def test_a_page_that_is_loaded_again_in_time_has_not_left(app: OpenApp) -> None:
    first = Tab(app, "before")
    await first.call("m:join", ALICE)
    first.close(TAB_CLOSED)
    await app.turn(1.9)
    second = Tab(app, "after")  # a new page is a new session
    await second.call("m:join", ALICE)
    await app.turn(60)
    assert await left(app) == []
    second.close(TAB_CLOSED)
    await app.turn(2)
    assert await left(app) == ["k"]


async def test_tabs_that_close_together_leave_once(app: OpenApp) -> None:
    tabs = [Tab(app, str(number)) for number in range(10)]
    for tab in tabs:
        await tab.call("m:join")
    for tab in tabs:
        tab.close()
    await app.turn(60)
    assert (await left(app), registered_count(app)) == (["k"], 0)
    assert runs(app) == [DisconnectRan("m:leave", True)]


async def test_the_same_call_of_somebody_else_is_another_one(app: OpenApp) -> None:
    alice, bob = Tab(app, "one"), Tab(app, "two")
    await alice.call("m:join", ALICE)
    await bob.call("m:join", BOB)
    alice.close()
    await app.turn(10)
    assert [item.note for item in await app.call("m:left")] == ["https://login.example|alice admin"]
    assert registered_count(app) == 1


# -- the server's own end


async def test_after_a_crash_the_grace_counts_from_the_servers_start(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(tmp_path, clock=clock) as app:
        for name in ("gone", "back", "other"):
            await Tab(app, name).call("m:join", ALICE if name == "gone" else None, key=name)
        app.engine.abandon()
    clock.advance(3_600)
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(5)
        Tab(app, "back")
        await app.turn(4.999)
        assert await left(app) == []
        await app.turn(0.001)
        assert sorted(await left(app)) == ["gone", "other"]
        assert [item.note for item in await app.call("m:left") if item.key == "gone"] == [
            "https://login.example|alice admin"
        ]
        await app.turn(60)
        assert (len(await left(app)), registered_count(app)) == (2, 1)


async def test_a_server_that_stops_in_the_grace_runs_it_after_the_next_start(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(tmp_path, clock=clock) as app:
        tab = Tab(app, "one")
        await tab.call("m:join")
        tab.close()
        await app.turn(9)
    clock.advance(60)
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(9.999)
        assert await left(app) == []
        await app.turn(0.001)
        assert await left(app) == ["k"]
    async with open_app(tmp_path, clock=clock) as app:
        await app.turn(60)
        assert await left(app) == ["k"]


async def test_the_run_and_the_end_of_the_registration_are_one_commit(app: OpenApp) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join")
    tab.close()
    await app.turn(9.999)
    app.forget_events()
    await app.turn(0.001)
    (commit,) = [event for event in app.events if isinstance(event, Committed)]
    assert (commit.mutation_count, commit.write_count) == (1, 2)


async def test_it_runs_later_while_there_is_no_room(app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join")
    tab.close()
    submit = Committer.submit

    def full(self: Committer, submission: Submission) -> None:
        raise Overloaded("full")

    monkeypatch.setattr(Committer, "submit", full)
    await app.turn(15)
    monkeypatch.setattr(Committer, "submit", submit)
    assert await left(app) == []
    await app.turn(1)
    assert await left(app) == ["k"]


async def test_it_runs_once_there_is_room_on_the_disk(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("note=str(who)", "note=str(who) * 20_000")
    async with opened(tmp_path, functions) as app:
        tab = Tab(app, "one")
        await tab.call("m:join")
        tab.close()
        await app.turn(9)
        writer = app.engine.database.writer
        ((page_count,),) = writer.fetch_all("PRAGMA page_count")
        writer.fetch_all(f"PRAGMA max_page_count = {page_count + 4}")
        await app.turn(5)
        assert (await left(app), registered_count(app)) == ([], 1)
        writer.fetch_all("PRAGMA max_page_count = 100000")
        await app.turn(1)
        assert (await left(app), registered_count(app)) == (["k"], 0)
        assert runs(app) == [DisconnectRan("m:leave", True)]


async def test_a_connection_that_ends_after_the_engine_leaves_nothing_behind(tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(tmp_path, clock=clock) as app:
        tab = Tab(app, "one")
        await tab.call("m:join")
    tab.close()
    clock.advance(3_600)
    assert clock.seconds_to_next_timer is None


async def test_a_crowd_that_leaves_is_worked_off_a_bounded_number_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = msgspec.structs.replace(UNHURRIED, scheduler_batch_count=7)
    async with opened(tmp_path, limits=limits) as app:
        tabs = [Tab(app, str(number)) for number in range(60)]
        for tab in tabs:
            await tab.call("m:join", key=tab.session_id)
        for tab in tabs:
            tab.close()
        waiting_counts = []
        submit = Committer.submit

        def counted(self: Committer, submission: Submission) -> None:
            submit(self, submission)
            waiting_counts.append(len(self._queue))

        monkeypatch.setattr(Committer, "submit", counted)
        await app.turn(10)
        assert sorted(await left(app)) == sorted(str(number) for number in range(60))
        assert max(waiting_counts) <= 7


# -- what goes wrong


async def test_a_mutation_that_fails_is_tried_once_and_its_fault_is_told(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace(
        "async def leave(ctx, key: str) -> None:", "async def leave(ctx, key: str):\n    1 / 0"
    )
    async with opened(tmp_path, functions) as app:
        tab = Tab(app, "one")
        await tab.call("m:join")
        tab.close()
        await app.turn(3_600)
        assert (await left(app), registered_count(app)) == ([], 0)
        assert runs(app) == [DisconnectRan("m:leave", False)]
        assert [event.path for event in app.events if isinstance(event, FunctionFaulted)] == ["m:leave"]


async def test_a_function_that_is_gone_by_then_ends_the_registration(app: OpenApp) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join")
    await app.rewrite("@query\nasync def left(ctx) -> list[Item]: return await ctx.db.query(Item).collect()\n")
    tab.close()
    await app.turn(60)
    assert (runs(app), registered_count(app)) == ([DisconnectRan("m:leave", False)], 0)


async def test_the_code_of_the_day_runs(app: OpenApp) -> None:
    tab = Tab(app, "one")
    await tab.call("m:join")
    await app.rewrite(FUNCTIONS.replace("Item(key=key,", "Item(key='new ' + key,"))
    tab.close()
    await app.turn(10)
    assert await left(app) == ["new k"]


NO_SESSION = (
    FUNCTIONS
    + """
@action
async def act(ctx) -> None: await ctx.run_mutation(join)

@mutation
async def schedule(ctx) -> None: await ctx.scheduler.run_after(0, join)

@mutation
async def nested(ctx) -> None: await ctx.run_mutation(join)

@mutation
async def leave_and_join(ctx) -> None:
    await ctx.session.on_disconnect(join)
"""
)


@pytest.mark.parametrize("path", ["m:join", "m:stay", "m:act", "m:nested"])
async def test_who_does_not_stay_connected_is_told_so(tmp_path: Path, path: str) -> None:
    async with opened(tmp_path, NO_SESSION, mode="production") as app:
        failure = await app.failure(path)
        assert failure.code == "SessionRequired"
        assert "Call it over a WebSocket (ConvexClient, ConvexReactClient), not over HTTP" in failure.message
        assert await app.call("m:whether") is False
        assert await Tab(app, "one").call("m:whether") is True


async def test_jobs_and_what_runs_at_the_end_have_no_session(tmp_path: Path) -> None:
    async with opened(tmp_path, NO_SESSION) as app:
        await app.call("m:schedule")
        await app.turn(1)
        (job,) = app.jobs_finished
        assert job == ("m:join", "failed")
        tab = Tab(app, "one")
        await tab.call("m:leave_and_join")
        tab.close()
        await app.turn(60)
        assert (runs(app), registered_count(app)) == ([DisconnectRan("m:join", False)], 0)


async def test_a_nested_mutation_has_the_session_of_its_caller(tmp_path: Path) -> None:
    async with opened(tmp_path, NO_SESSION) as app:
        tab = Tab(app, "one")
        await tab.call("m:nested")
        tab.close()
        await app.turn(10)
        assert await left(app) == ["k"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("ctx.session.on_disconnect(left)", FunctionNotFound, "'left'"),
        ("ctx.session.on_disconnect('m:nothing')", FunctionNotFound, "'m:nothing'"),
        ("ctx.session.on_disconnect(leave)", InvalidArgument, "key: missing"),
        ("ctx.session.on_disconnect(leave, key=7)", InvalidArgument, "key: expected str"),
        ("ctx.session.cancel_on_disconnect(leave, kye='x')", InvalidArgument, "kye"),
    ],
)
async def test_a_call_that_cannot_be_is_refused_at_once(
    tmp_path: Path, source: str, error: type[Exception], message: str
) -> None:
    async with opened(tmp_path, f"{FUNCTIONS}\n@mutation\nasync def bad(ctx) -> None: await {source}\n") as app:
        with pytest.raises(error) as refusal:
            await Tab(app, "one").call("m:bad")
        assert message in str(refusal.value)


async def test_an_internal_mutation_may_be_registered(tmp_path: Path) -> None:
    functions = FUNCTIONS.replace("@mutation\nasync def leave", "@mutation(internal=True)\nasync def leave")
    async with opened(tmp_path, functions) as app:
        tab = Tab(app, "one")
        await tab.call("m:join")
        tab.close()
        await app.turn(10)
        assert await left(app) == ["k"]


@pytest.mark.parametrize("kind", ["query", "action"])
async def test_only_mutations_have_a_session(tmp_path: Path, kind: str) -> None:
    functions = f"{FUNCTIONS}\n@{kind}\nasync def bad(ctx) -> bool: return ctx.session.is_open\n"
    async with opened(tmp_path, functions) as app:
        with pytest.raises(FunctionMisuse, match=r"ctx\.session is there in mutations only"):
            await app.call("m:bad")


async def test_what_one_session_may_register_is_bounded(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, disconnect_count_max=3)
    async with opened(tmp_path, limits=limits) as app:
        tab, other = Tab(app, "one"), Tab(app, "two")
        for key in "abc":
            await tab.call("m:join", key=key)
        failure = (await tab.outcome("m:join", key="d")).failure
        assert failure is not None
        assert failure.code == "LimitExceeded"
        assert "4 used, 3 allowed" in failure.message
        await tab.call("m:join", key="a")
        await other.call("m:join", key="d")
        await tab.call("m:stay", key="a")
        await tab.call("m:join", key="d")


async def test_the_graces_are_settings(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, disconnect_grace_ms=500, disconnect_grace_closed_ms=100)
    async with opened(tmp_path, limits=limits) as app:
        tabs = [Tab(app, "one"), Tab(app, "two")]
        for tab in tabs:
            await tab.call("m:join", key=tab.session_id)
        tabs[0].close()
        tabs[1].close(TAB_CLOSED)
        await app.turn(0.1)
        assert await left(app) == ["two"]
        await app.turn(0.4)
        assert await left(app) == ["two", "one"]


async def test_a_context_that_is_used_too_late_registers_nothing(tmp_path: Path) -> None:
    functions = (
        FUNCTIONS
        + """
kept = []
@mutation
async def keep(ctx) -> None: kept.append(ctx.session)
@mutation
async def use(ctx) -> None: await kept[0].on_disconnect(leave, key="late")
"""
    )
    async with opened(tmp_path, functions) as app:
        tab = Tab(app, "one")
        await tab.call("m:keep")
        with pytest.raises(FunctionMisuse, match="after the function had returned"):
            await tab.call("m:use")
        with pytest.raises(SessionRequired):
            await app.call("m:join")
