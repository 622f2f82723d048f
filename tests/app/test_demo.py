from tests.app.demo_app import DemoApp


async def test_seeding_a_filled_database_changes_nothing(app: DemoApp) -> None:
    before = await app.query("games:list"), await app.query("chat:get_messages", game_id=app.live_game)
    assert await app.mutation("demo:seed") is False
    assert (await app.query("games:list"), await app.query("chat:get_messages", game_id=app.live_game)) == before


async def test_the_demo_chat_is_in_the_order_in_which_it_was_said(app: DemoApp) -> None:
    messages = await app.query("chat:get_messages", game_id=app.live_game)
    assert len(messages) == 9
    assert [message.created_at for message in messages] == sorted(message.created_at for message in messages)
    assert await app.query("chat:get_messages", game_id=app.quiet_game) == []


async def test_games_are_listed_newest_first_and_content_by_title(app: DemoApp) -> None:
    games = await app.query("games:list")
    assert [game.status for game in games] == ["scheduled", "live", "ended"]
    titles = [content.title for content in await app.query("content:list")]
    assert titles == sorted(titles)
    assert len(titles) == 4
