import asyncio
import random
from collections.abc import Callable

import pytest

from engine.errors import InvalidArgument
from engine.testing import Client, TestEngine
from tests.app.demo_app import Demo, join_all, missing, refusal

JOIN, HEARTBEAT, LEAVE = "presence:join", "presence:heartbeat", "presence:leave"
COUNT, EXPIRE = "presence:get_viewer_count", "presence:expire_sessions"
STALE_SECONDS = 120
GRACE_SECONDS, GRACE_CLOSED_SECONDS = 10, 2  # after a lost connection, and after a closed tab


async def join(client: Client, game_id: str, session_id: str) -> None:
    await client.mutation(JOIN, game_id=game_id, session_id=session_id, device_type="mobile")


async def heartbeat(client: Client, game_id: str, session_id: str) -> None:
    await client.mutation(HEARTBEAT, game_id=game_id, session_id=session_id)


async def leave(client: Client, session_id: str) -> None:
    await client.mutation(LEAVE, session_id=session_id)


async def viewer_count(client: Client, game_id: str) -> int:
    result = await client.query(COUNT, game_id=game_id)
    assert list(result) == ["viewerCount"]
    return int(result["viewerCount"])


async def test_viewers_come_and_go(demo: Demo, guest: Client, tomas: Client) -> None:
    count = guest.subscribe(COUNT, game_id=demo.live_game)
    assert await count.next() == {"viewerCount": 0}
    await join(guest, demo.live_game, "a")
    assert await count.next() == {"viewerCount": 1}
    await tomas.mutation(JOIN, game_id=demo.live_game, session_id="b", device_type="desktop", quality="1080p")
    assert await count.next() == {"viewerCount": 2}
    await leave(guest, "a")
    assert await count.next() == {"viewerCount": 1}


async def test_one_who_is_signed_in_but_not_stored_watches_anonymously(demo: Demo, zoe: Client) -> None:
    await join(zoe, demo.live_game, "a")
    assert await viewer_count(zoe, demo.live_game) == 1


async def test_a_game_counts_only_its_own_viewers(engine: TestEngine, demo: Demo, guest: Client) -> None:
    await guest.subscribe(COUNT, game_id=demo.quiet_game).next()
    async with engine.count_runs() as runs:
        await join(guest, demo.live_game, "a")
    assert runs[COUNT] == 0
    assert [await viewer_count(guest, game_id) for game_id in (demo.live_game, demo.quiet_game)] == [1, 0]


async def test_a_heartbeat_re_runs_no_viewer_count(engine: TestEngine, demo: Demo, guest: Client) -> None:
    await join(guest, demo.live_game, "a")
    await guest.subscribe(COUNT, game_id=demo.live_game).next()
    async with engine.count_runs() as runs:
        for _ in range(3):
            await engine.advance(30)
            await heartbeat(guest, demo.live_game, "a")
    assert (runs[HEARTBEAT], runs[COUNT]) == (3, 0)


async def test_a_viewer_count_is_one_look_up_however_many_watch(
    engine: TestEngine, demo: Demo, as_user: Callable[..., Client]
) -> None:
    for group in range(3):
        await join_all(as_user, demo.live_game, [f"{group} {number}" for number in range(100)])
        arguments = b'{"game_id": "%b"}' % demo.live_game.encode()
        explained = await engine.running.backend.explain(COUNT, arguments, None)
        assert explained.reads == [f"the count of live_stream_sessions.viewers: {demo.live_game!r}, True"]
        assert explained.documents_read == 1
        assert explained.shared_by == []


async def test_joining_twice_counts_once(demo: Demo, guest: Client) -> None:
    await asyncio.gather(*(join(guest, demo.live_game, "a") for _ in range(5)))
    assert await viewer_count(guest, demo.live_game) == 1


async def test_joining_another_game_moves_the_session(demo: Demo, guest: Client) -> None:
    await join(guest, demo.live_game, "a")
    await join(guest, demo.quiet_game, "a")
    assert [await viewer_count(guest, game_id) for game_id in (demo.live_game, demo.quiet_game)] == [0, 1]


async def test_leaving_twice_or_without_joining_is_no_error(demo: Demo, guest: Client) -> None:
    await join(guest, demo.live_game, "a")
    for session_id in ("a", "a", "never joined"):
        await leave(guest, session_id)
    assert await viewer_count(guest, demo.live_game) == 0


async def test_a_session_that_never_joined_this_game_must_join_first(demo: Demo, guest: Client) -> None:
    await join(guest, demo.live_game, "a")
    for game_id, session_id in ((demo.live_game, "b"), (demo.quiet_game, "a")):
        assert await refusal(heartbeat(guest, game_id, session_id)) == "SESSION_NOT_FOUND"


async def test_a_game_that_does_not_exist_cannot_be_watched(demo: Demo, guest: Client) -> None:
    assert await refusal(join(guest, missing(demo.live_game), "a")) == "GAME_NOT_FOUND"


@pytest.mark.parametrize("session_id", ["", "x" * 129])
async def test_a_session_id_has_1_to_128_characters(demo: Demo, guest: Client, session_id: str) -> None:
    with pytest.raises(InvalidArgument, match="session_id"):
        await join(guest, demo.live_game, session_id)


async def test_a_session_is_stale_after_exactly_two_minutes_of_silence(
    engine: TestEngine, demo: Demo, guest: Client
) -> None:
    await join(guest, demo.live_game, "a")
    engine.clock.advance(STALE_SECONDS - 0.001)  # faster than the cron
    assert await engine.mutation(EXPIRE) == 0
    engine.clock.advance(0.001)
    assert await engine.mutation(EXPIRE) == 1
    assert await viewer_count(guest, demo.live_game) == 0


async def test_the_cron_ends_silent_sessions_within_three_minutes_and_tells_the_viewers(
    engine: TestEngine, demo: Demo, guest: Client
) -> None:
    await join(guest, demo.live_game, "silent")
    await join(guest, demo.live_game, "alive")
    count = guest.subscribe(COUNT, game_id=demo.live_game)
    assert await count.next() == {"viewerCount": 2}
    for _ in range(6):  # three minutes of heartbeats
        await engine.advance(30)
        await heartbeat(guest, demo.live_game, "alive")
    assert await count.next() == {"viewerCount": 1}


async def test_a_session_lives_while_no_two_minutes_pass_without_a_heartbeat(
    engine: TestEngine, demo: Demo, guest: Client
) -> None:
    await join(guest, demo.live_game, "a")
    for _ in range(4):  # three of four heartbeats are lost
        await engine.advance(STALE_SECONDS - 1)
        assert await viewer_count(guest, demo.live_game) == 1
        await heartbeat(guest, demo.live_game, "a")


async def test_a_heartbeat_after_an_outage_brings_the_session_back(
    engine: TestEngine, demo: Demo, guest: Client
) -> None:
    await join(guest, demo.live_game, "a")
    count = guest.subscribe(COUNT, game_id=demo.live_game)
    assert await count.next() == {"viewerCount": 1}
    await engine.advance(minutes=3)
    assert await count.next() == {"viewerCount": 0}
    await heartbeat(guest, demo.live_game, "a")
    assert await count.next() == {"viewerCount": 1}
    await engine.advance(minutes=3)
    assert await count.next() == {"viewerCount": 0}


async def test_viewers_who_do_not_come_back_after_a_crash_are_counted_out(
    engine: TestEngine, demo: Demo, guest: Client
) -> None:
    await join(guest, demo.live_game, "silent")
    await join(guest, demo.live_game, "alive")
    engine.crash()
    await engine.reopen()
    assert await viewer_count(guest, demo.live_game) == 2
    for _ in range(6):
        await engine.advance(30)
        await heartbeat(guest, demo.live_game, "alive")
    assert await viewer_count(guest, demo.live_game) == 1


async def test_counts_hold_while_connections_come_and_go(demo: Demo, guest: Client) -> None:
    chance = random.Random(7)
    games = (demo.live_game, demo.quiet_game)
    watched: dict[str, str] = {}  # session id → game
    subscriptions = [guest.subscribe(COUNT, game_id=game_id) for game_id in games]
    for _ in range(300):
        session_id, game_id = f"session {chance.randrange(12)}", chance.choice(games)
        match chance.randrange(4):
            case 0:
                await leave(guest, session_id)
                watched.pop(session_id, None)
            case 1 if session_id in watched:
                await heartbeat(guest, watched[session_id], session_id)
            case _:
                await join(guest, game_id, session_id)
                watched[session_id] = game_id
        counts = [list(watched.values()).count(game_id) for game_id in games]
        assert [await viewer_count(guest, game_id) for game_id in games] == counts
    assert [await count.settled() for count in subscriptions] == [{"viewerCount": count} for count in counts]


@pytest.mark.slow
async def test_a_mass_disconnect_is_swept_in_bounded_runs(
    engine: TestEngine, demo: Demo, guest: Client, as_user: Callable[..., Client]
) -> None:
    await join_all(as_user, demo.live_game, [f"session {number}" for number in range(1_100)])
    assert await viewer_count(guest, demo.live_game) == 1_100
    engine.clock.advance(STALE_SECONDS + 1)
    assert await engine.mutation(EXPIRE) == 500
    await engine.advance(1)
    assert await viewer_count(guest, demo.live_game) == 0


@pytest.mark.engine(config={"limits": {"read_document_count_max": 20}})
async def test_a_sweep_never_looks_at_sessions_that_are_inactive_already(
    engine: TestEngine, demo: Demo, guest: Client
) -> None:
    for number in range(30):
        await join(guest, demo.live_game, f"session {number}")
        await leave(guest, f"session {number}")
    await join(guest, demo.live_game, "silent")
    await engine.advance(STALE_SECONDS + 60)
    assert await viewer_count(guest, demo.live_game) == 0


# -- connections


@pytest.mark.parametrize(
    ("goes", "seconds"), [(Client.close, GRACE_CLOSED_SECONDS), (Client.drop, GRACE_SECONDS)], ids=["closed", "lost"]
)
async def test_a_connection_that_is_gone_leaves_the_count_within_seconds(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client, goes: Callable[[Client], None], seconds: float
) -> None:
    await join(tomas, demo.live_game, "a")
    count = guest.subscribe(COUNT, game_id=demo.live_game)
    assert await count.next() == {"viewerCount": 1}
    goes(tomas)
    await engine.advance(seconds - 0.01)
    assert await viewer_count(guest, demo.live_game) == 1
    await engine.advance(0.01)
    assert await count.next() == {"viewerCount": 0}


async def test_one_who_is_back_in_time_never_leaves_the_count(engine: TestEngine, demo: Demo, guest: Client) -> None:
    screen = engine.as_user()
    await join(guest, demo.live_game, "a")
    await screen.subscribe(COUNT, game_id=demo.live_game).next()
    async with engine.count_runs() as runs:
        for _ in range(5):
            guest.drop()
            await engine.advance(GRACE_SECONDS - 1)
            guest.connect()
            await engine.advance(GRACE_SECONDS)
            await heartbeat(guest, demo.live_game, "a")
    assert (runs[LEAVE], runs[COUNT]) == (0, 0)
    assert await viewer_count(guest, demo.live_game) == 1


async def test_one_who_comes_back_later_is_counted_again_with_the_next_heartbeat_and_leaves_as_before(
    engine: TestEngine, demo: Demo, guest: Client
) -> None:
    screen = engine.as_user()
    count = screen.subscribe(COUNT, game_id=demo.live_game)
    await join(guest, demo.live_game, "a")
    assert await count.settled() == {"viewerCount": 1}
    for _ in range(2):
        guest.drop()
        await engine.advance(GRACE_SECONDS)
        assert await count.next() == {"viewerCount": 0}
        await heartbeat(guest, demo.live_game, "a")
        assert await count.next() == {"viewerCount": 1}


async def test_one_who_moved_to_another_game_is_missed_there(engine: TestEngine, demo: Demo, guest: Client) -> None:
    screen = engine.as_user()
    for game_id in (demo.live_game, demo.quiet_game):
        await join(guest, game_id, "a")
    guest.close()
    await engine.advance(GRACE_CLOSED_SECONDS)
    assert [await viewer_count(screen, game_id) for game_id in (demo.live_game, demo.quiet_game)] == [0, 0]


async def test_each_session_of_a_connection_goes_with_it(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client
) -> None:
    for session_id in ("a", "b", "c"):
        await join(tomas, demo.live_game, session_id)
    await join(guest, demo.live_game, "d")
    await leave(tomas, "b")
    tomas.close()
    await engine.advance(GRACE_CLOSED_SECONDS)
    assert await viewer_count(guest, demo.live_game) == 1


async def test_a_tab_that_left_a_session_does_not_end_it_when_it_closes(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client
) -> None:
    await join(tomas, demo.live_game, "a")
    await leave(tomas, "a")
    await join(guest, demo.live_game, "a")  # after signing out, say
    tomas.close()
    await engine.advance(GRACE_CLOSED_SECONDS)
    assert await viewer_count(guest, demo.live_game) == 1


async def test_a_session_in_two_tabs_leaves_with_the_last_of_them(
    engine: TestEngine, demo: Demo, guest: Client, as_user: Callable[..., Client]
) -> None:
    tabs = as_user("tomas"), as_user("tomas")
    for tab in tabs:
        await join(tab, demo.live_game, "a")
    for tab, count_after in zip(tabs, (1, 0), strict=True):
        tab.close()
        await engine.advance(GRACE_CLOSED_SECONDS)
        assert await viewer_count(guest, demo.live_game) == count_after


async def test_a_heartbeat_over_another_connection_takes_the_session_over(
    engine: TestEngine, demo: Demo, guest: Client, as_user: Callable[..., Client]
) -> None:
    old, new = as_user("tomas"), as_user("tomas")
    await join(old, demo.live_game, "a")
    await heartbeat(new, demo.live_game, "a")
    for client, count_after in ((old, 1), (new, 0)):
        client.drop()
        await engine.advance(GRACE_SECONDS)
        assert await viewer_count(guest, demo.live_game) == count_after


async def test_viewers_who_do_not_come_back_after_a_crash_leave_within_seconds(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client, aiko: Client
) -> None:
    for client, session_id in ((tomas, "gone"), (aiko, "back")):
        await join(client, demo.live_game, session_id)
    engine.crash()
    await engine.reopen()
    aiko.connect()
    count = guest.subscribe(COUNT, game_id=demo.live_game)
    assert await count.next() == {"viewerCount": 2}
    await engine.advance(GRACE_SECONDS)
    assert await count.next() == {"viewerCount": 1}
    await leave(aiko, "back")
    assert await count.next() == {"viewerCount": 0}


async def test_a_crowd_that_vanishes_at_once_is_off_the_count_within_seconds(
    engine: TestEngine, demo: Demo, guest: Client, as_user: Callable[..., Client]
) -> None:
    crowd = await join_all(as_user, demo.live_game, [f"session {number}" for number in range(300)])
    assert await viewer_count(guest, demo.live_game) == 300
    for client in crowd:
        client.drop()
    await engine.advance(GRACE_SECONDS)
    assert await viewer_count(guest, demo.live_game) == 0


async def test_one_who_only_speaks_http_is_counted_until_two_minutes_of_silence(
    engine: TestEngine, demo: Demo, guest: Client
) -> None:
    arguments = {"session_id": "a", "game_id": demo.live_game}
    await engine.mutation(JOIN, **arguments, device_type="mobile")
    await engine.advance(STALE_SECONDS - 60)
    await engine.mutation(HEARTBEAT, **arguments)
    await engine.advance(STALE_SECONDS - 1)
    assert await viewer_count(guest, demo.live_game) == 1
    await engine.advance(61)  # to the next sweep
    assert await viewer_count(guest, demo.live_game) == 0
    await engine.mutation(JOIN, **arguments, device_type="mobile")
    await engine.mutation(LEAVE, session_id="a")
    assert await viewer_count(guest, demo.live_game) == 0
