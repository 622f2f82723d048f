from collections.abc import Callable

import pytest

from engine.errors import FunctionNotFound
from engine.testing import Client, TestEngine
from tests.app.demo_app import Demo, join_all, missing, refusal

DELETE, CHAT, COUNT = "games:delete", "chat:get_messages", "presence:get_viewer_count"


async def test_a_game_goes_with_its_chat_and_its_viewers_and_whoever_looks_is_told(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client
) -> None:
    for game_id, session_id in ((demo.live_game, "a"), (demo.quiet_game, "b")):
        await tomas.mutation("presence:join", game_id=game_id, session_id=session_id, device_type="mobile")
    await tomas.mutation("chat:send_message", game_id=demo.quiet_game, message="hi")
    games = guest.subscribe("games:list")
    views = [
        (guest.subscribe(CHAT, game_id=game_id), guest.subscribe(COUNT, game_id=game_id))
        for game_id in (demo.live_game, demo.quiet_game)
    ]
    assert len(await games.next()) == 3
    for (chat, count), message_count in zip(views, (9, 1), strict=True):
        assert len(await chat.next()) == message_count
        assert await count.next() == {"viewerCount": 1}

    await engine.mutation(DELETE, game_id=demo.live_game)
    assert demo.live_game not in [game.id for game in await games.next()]
    (chat, count), (other_chat, other_count) = views
    assert await chat.next() == []
    assert await count.next() == {"viewerCount": 0}
    assert len(await other_chat.settled()) == 1
    assert await other_count.settled() == {"viewerCount": 1}


async def test_what_players_of_a_deleted_game_still_send_is_refused_or_harmless(
    engine: TestEngine, demo: Demo, tomas: Client
) -> None:
    arguments = {"game_id": demo.live_game, "session_id": "a"}
    await tomas.mutation("presence:join", **arguments, device_type="mobile")
    await engine.mutation(DELETE, game_id=demo.live_game)
    assert await refusal(tomas.mutation("presence:heartbeat", **arguments)) == "SESSION_NOT_FOUND"
    assert await refusal(tomas.mutation("presence:join", **arguments, device_type="mobile")) == "GAME_NOT_FOUND"
    chat = tomas.mutation("chat:send_message", game_id=demo.live_game, message="hi")
    assert await refusal(chat) == "GAME_NOT_FOUND"
    await tomas.mutation("presence:leave", session_id="a")


@pytest.mark.slow
@pytest.mark.engine(
    config={"limits": {"write_document_count_max": 1_200}, "rate_limits": {"chat:send_message": {"count": 1_000}}}
)
async def test_a_crowded_game_goes_in_several_runs(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client, as_user: Callable[..., Client]
) -> None:
    await join_all(as_user, demo.live_game, [f"session {number}" for number in range(1_100)])
    await join_all(as_user, demo.quiet_game, ["elsewhere"])
    for number in range(300):
        await tomas.mutation("chat:send_message", game_id=demo.live_game, message=str(number))
    async with engine.count_runs() as runs:
        await engine.mutation(DELETE, game_id=demo.live_game)
        await engine.advance(1)
    assert runs[DELETE] == 3
    assert demo.live_game not in [game.id for game in await guest.query("games:list")]
    assert await guest.query(CHAT, game_id=demo.live_game) == []
    counts = [await guest.query(COUNT, game_id=game_id) for game_id in (demo.live_game, demo.quiet_game)]
    assert counts == [{"viewerCount": 0}, {"viewerCount": 1}]


async def test_games_are_deleted_by_operators_only(engine: TestEngine, demo: Demo, guest: Client, maya: Client) -> None:
    for client in (guest, maya):
        with pytest.raises(FunctionNotFound):
            await client.mutation(DELETE, game_id=demo.live_game)
    assert await refusal(engine.mutation(DELETE, game_id=missing(demo.live_game))) == "GAME_NOT_FOUND"
    assert len(await guest.query("games:list")) == 3
