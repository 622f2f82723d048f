import asyncio
import random

import pytest

from engine.config import Config
from engine.errors import InvalidArgument
from engine.limits import Limits
from tests.app.demo_app import TOMAS, DemoApp, missing, open_demo_app, person

JOIN, HEARTBEAT, LEAVE = "presence:join", "presence:heartbeat", "presence:leave"
COUNT, EXPIRE = "presence:get_viewer_count", "presence:expire_sessions"
STALE_SECONDS = 120


async def join(app: DemoApp, session_id: str, game_id: str | None = None) -> None:
    await app.mutation(JOIN, game_id=game_id or app.live_game, session_id=session_id, device_type="mobile")


async def heartbeat(app: DemoApp, session_id: str, game_id: str | None = None) -> None:
    await app.mutation(HEARTBEAT, session_id=session_id, game_id=game_id or app.live_game)


async def viewer_count(app: DemoApp, game_id: str | None = None) -> int:
    result = await app.query(COUNT, game_id=game_id or app.live_game)
    assert list(result) == ["viewerCount"]
    return int(result["viewerCount"])


async def test_viewers_come_and_go(app: DemoApp) -> None:
    async with app.subscribed(COUNT, game_id=app.live_game) as count:
        assert count.pushed == [{"viewerCount": 0}]
        await join(app, "a")
        assert await count.next() == {"viewerCount": 1}
        await app.mutation(JOIN, TOMAS, game_id=app.live_game, session_id="b", device_type="desktop", quality="1080p")
        assert await count.next() == {"viewerCount": 2}
        await app.mutation(LEAVE, session_id="a")
        assert await count.next() == {"viewerCount": 1}


async def test_one_who_is_signed_in_but_not_stored_watches_anonymously(app: DemoApp) -> None:
    await app.mutation(JOIN, person("zoe"), game_id=app.live_game, session_id="a", device_type="tablet")
    assert await viewer_count(app) == 1


async def test_a_game_counts_only_its_own_viewers(app: DemoApp) -> None:
    async with app.subscribed(COUNT, game_id=app.quiet_game):
        app.forget_events()
        await join(app, "a")
        await app.idle()
        assert app.run_count(COUNT) == 0
    assert (await viewer_count(app), await viewer_count(app, app.quiet_game)) == (1, 0)


async def test_a_heartbeat_re_runs_no_viewer_count(app: DemoApp) -> None:
    await join(app, "a")
    async with app.subscribed(COUNT, game_id=app.live_game):
        app.forget_events()
        for _ in range(3):
            app.clock.advance(30)
            await heartbeat(app, "a")
        await app.idle()
        assert app.run_count(COUNT) == 0


async def test_joining_twice_counts_once(app: DemoApp) -> None:
    await asyncio.gather(*(join(app, "a") for _ in range(5)))
    assert await viewer_count(app) == 1


async def test_joining_another_game_moves_the_session(app: DemoApp) -> None:
    await join(app, "a")
    await join(app, "a", app.quiet_game)
    assert (await viewer_count(app), await viewer_count(app, app.quiet_game)) == (0, 1)


async def test_leaving_twice_or_without_joining_is_no_error(app: DemoApp) -> None:
    await join(app, "a")
    for session_id in ("a", "a", "never joined"):
        await app.mutation(LEAVE, session_id=session_id)
    assert await viewer_count(app) == 0


async def test_a_session_that_never_joined_this_game_must_join_first(app: DemoApp) -> None:
    await join(app, "a")
    for session_id, game_id in (("b", app.live_game), ("a", app.quiet_game)):
        assert await app.refusal(HEARTBEAT, session_id=session_id, game_id=game_id) == "SESSION_NOT_FOUND"


async def test_a_game_that_does_not_exist_cannot_be_watched(app: DemoApp) -> None:
    arguments = {"game_id": missing(app.live_game), "session_id": "a", "device_type": "mobile"}
    assert await app.refusal(JOIN, **arguments) == "GAME_NOT_FOUND"


@pytest.mark.parametrize("session_id", ["", "x" * 129])
async def test_a_session_id_has_1_to_128_characters(app: DemoApp, session_id: str) -> None:
    with pytest.raises(InvalidArgument, match="session_id"):
        await join(app, session_id)


async def test_a_session_is_stale_after_exactly_two_minutes_of_silence(app: DemoApp) -> None:
    await join(app, "a")
    app.clock.advance(STALE_SECONDS - 0.001)
    assert await app.mutation(EXPIRE) == 0
    app.clock.advance(0.001)
    assert await app.mutation(EXPIRE) == 1
    assert await viewer_count(app) == 0


async def test_the_cron_ends_silent_sessions_within_three_minutes_and_tells_the_viewers(app: DemoApp) -> None:
    await join(app, "silent")
    await join(app, "alive")
    async with app.subscribed(COUNT, game_id=app.live_game) as count:
        for _ in range(6):  # three minutes of heartbeats
            await app.turn(30)
            await heartbeat(app, "alive")
        assert await count.next() == {"viewerCount": 1}


async def test_a_session_lives_while_no_two_minutes_pass_without_a_heartbeat(app: DemoApp) -> None:
    await join(app, "a")
    for _ in range(4):  # three of four heartbeats are lost
        await app.turn(STALE_SECONDS - 1)
        assert await viewer_count(app) == 1
        await heartbeat(app, "a")


async def test_a_heartbeat_after_an_outage_brings_the_session_back(app: DemoApp) -> None:
    await join(app, "a")
    async with app.subscribed(COUNT, game_id=app.live_game) as count:
        await app.turn(3 * 60)
        assert await count.next() == {"viewerCount": 0}
        await heartbeat(app, "a")
        assert await count.next() == {"viewerCount": 1}
        await app.turn(3 * 60)
        assert await count.next() == {"viewerCount": 0}


async def test_counts_hold_while_connections_come_and_go(app: DemoApp) -> None:
    chance = random.Random(7)
    games = (app.live_game, app.quiet_game)
    watched: dict[str, str] = {}  # session id → game
    async with app.subscribed(COUNT, game_id=games[0]) as first, app.subscribed(COUNT, game_id=games[1]) as second:
        for _ in range(300):
            session_id, game_id = f"session {chance.randrange(12)}", chance.choice(games)
            match chance.randrange(4):
                case 0:
                    await app.mutation(LEAVE, session_id=session_id)
                    watched.pop(session_id, None)
                case 1 if session_id in watched:
                    await heartbeat(app, session_id, watched[session_id])
                case _:
                    await join(app, session_id, game_id)
                    watched[session_id] = game_id
            counts = [list(watched.values()).count(game_id) for game_id in games]
            assert [await viewer_count(app, game_id) for game_id in games] == counts
        await first.until({"viewerCount": counts[0]})
        await second.until({"viewerCount": counts[1]})


async def test_a_mass_disconnect_is_swept_in_bounded_runs(app: DemoApp) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(1_100):
            group.create_task(join(app, f"session {number}"))
    assert await viewer_count(app) == 1_100
    app.clock.advance(STALE_SECONDS + 1)
    assert await app.mutation(EXPIRE) == 500
    await app.turn(1)
    assert await viewer_count(app) == 0


async def test_a_sweep_never_looks_at_sessions_that_are_inactive_already() -> None:
    async with open_demo_app(config=Config(limits=Limits(read_document_count_max=20))) as app:
        for number in range(30):
            await join(app, f"session {number}")
            await app.mutation(LEAVE, session_id=f"session {number}")
        await join(app, "silent")
        await app.turn(STALE_SECONDS + 60)
        assert await viewer_count(app) == 0
