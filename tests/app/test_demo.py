from engine.testing import Client, TestEngine
from tests.app.demo_app import Demo


async def test_seeding_a_filled_database_changes_nothing(engine: TestEngine, demo: Demo) -> None:
    before = await engine.query("games:list"), await engine.query("chat:get_messages", game_id=demo.live_game)
    assert await engine.mutation("demo:seed") is False
    assert (await engine.query("games:list"), await engine.query("chat:get_messages", game_id=demo.live_game)) == before


async def test_the_demo_chat_is_in_the_order_in_which_it_was_said(guest: Client, demo: Demo) -> None:
    messages = await guest.query("chat:get_messages", game_id=demo.live_game)
    assert len(messages) == 9
    assert [message.created_at for message in messages] == sorted(message.created_at for message in messages)
    assert await guest.query("chat:get_messages", game_id=demo.quiet_game) == []


async def test_games_are_listed_newest_first_and_content_by_title(guest: Client, demo: Demo) -> None:
    games = await guest.query("games:list")
    assert [game.status for game in games] == ["scheduled", "live", "ended"]
    titles = [content.title for content in await guest.query("content:list")]
    assert titles == sorted(titles)
    assert len(titles) == 4
