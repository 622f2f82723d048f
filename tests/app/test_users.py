from collections.abc import Callable

import pytest

from engine.auth.development import DEVELOPMENT_ISSUER
from engine.functions.pages import PaginationOptions
from engine.testing import Client, TestEngine
from tests.app.demo_app import Demo, missing, refusal

DELETE = "users:delete_account"

pytestmark = pytest.mark.usefixtures("demo")


async def test_the_first_log_in_makes_a_user_from_the_token(as_user: Callable[..., Client]) -> None:
    zoe = as_user("zoe", name=" Zoë Ek ", picture="https://pictures.example/zoe.png")
    user_id = await zoe.mutation("users:store")
    me = await zoe.query("users:me")
    assert (me.id, me.name, me.avatar) == (user_id, "Zoë Ek", "https://pictures.example/zoe.png")
    assert (me.token_identifier, me.role, me.permissions) == (f"{DEVELOPMENT_ISSUER}|zoe", "user", [])


async def test_a_user_without_a_name_is_called_by_the_subject(as_user: Callable[..., Client]) -> None:
    zoe = as_user("zoe", name="  ")
    await zoe.mutation("users:store")
    assert (await zoe.query("users:me")).name == "zoe"


async def test_a_later_log_in_refreshes_the_same_user(as_user: Callable[..., Client]) -> None:
    first = await as_user("zoe", name="Zoe").mutation("users:store")
    zoe = as_user("zoe", name="Zoe Ek")
    assert await zoe.mutation("users:store") == first
    assert (await zoe.query("users:me")).name == "Zoe Ek"


async def test_what_a_token_does_not_say_stays_as_it_was(maya: Client) -> None:
    before = await maya.query("users:me")
    await maya.mutation("users:store")
    assert await maya.query("users:me") == before
    assert before.role == "admin"


async def test_a_log_in_that_changes_nothing_re_runs_nothing(engine: TestEngine, tomas: Client) -> None:
    await tomas.subscribe("users:me").next()
    async with engine.count_runs() as runs:
        await tomas.mutation("users:store")
    assert runs["users:me"] == 0


async def test_a_very_long_name_is_cut(as_user: Callable[..., Client]) -> None:
    zoe = as_user("zoe", name="z" * 101)
    await zoe.mutation("users:store")
    assert (await zoe.query("users:me")).name == "z" * 100


async def test_me_is_null_before_the_first_log_in_and_for_anonymous_callers(zoe: Client, guest: Client) -> None:
    assert await zoe.query("users:me") is None
    assert await guest.query("users:me") is None


async def test_an_anonymous_caller_cannot_be_stored(guest: Client) -> None:
    assert await refusal(guest.mutation("users:store")) == "UNAUTHENTICATED"


async def test_an_operator_gives_and_takes_permissions(engine: TestEngine, tomas: Client) -> None:
    assert tomas.identity is not None
    arguments = {"token_identifier": tomas.identity.token_identifier, "role": "user"}
    await engine.mutation("users:set_role", **arguments, permissions=["write:chat"])
    assert (await tomas.query("users:me")).permissions == ["write:chat"]
    await engine.mutation("users:set_role", **arguments)
    assert (await tomas.query("users:me")).permissions == []


async def test_only_a_stored_user_can_get_a_role(engine: TestEngine) -> None:
    nobody = f"{DEVELOPMENT_ISSUER}|nobody"
    assert await refusal(engine.mutation("users:set_role", token_identifier=nobody, role="admin")) == "USER_NOT_FOUND"


# -- deleting an account


async def test_an_account_goes_with_its_chat_and_progress_and_whoever_looks_is_told(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client, aiko: Client, maya: Client
) -> None:
    tomas_id = (await tomas.query("users:me")).id
    content_id = demo.contents[0].id
    for user in (tomas, aiko):
        await user.mutation("chat:send_message", game_id=demo.quiet_game, message="hi")
        await user.mutation(
            "watch_progress:update_progress", content_id=content_id, position_seconds=1.0, duration_seconds=9.0
        )
    chats = [guest.subscribe("chat:get_messages", game_id=game) for game in (demo.live_game, demo.quiet_game)]
    of_tomas = maya.subscribe("watch_progress:get_continue_watching", user_id=tomas_id)
    of_aiko = aiko.subscribe("watch_progress:get_continue_watching")
    me = tomas.subscribe("users:me")
    assert [len(await view.next()) for view in (*chats, of_tomas, of_aiko)] == [9, 2, 1, 1]
    assert (await me.next()).id == tomas_id

    await tomas.mutation(DELETE)
    assert await me.next() is None
    assert {message.user_name for chat in chats for message in await chat.next()} == {
        "Aiko Tanaka",
        "Maya Okafor",
        "Sam Whitfield",
    }
    assert await refusal(of_tomas.next()) == "USER_NOT_FOUND"
    assert len(await of_aiko.settled()) == 1
    for table in ("live_chat_messages", "user_watch_progress"):
        left = engine.running.database.writer.fetch_all(f"SELECT DISTINCT user_id FROM {table}")
        assert (tomas_id,) not in left
        assert left != []


async def test_one_who_deletes_the_account_while_watching_goes_on_watching_anonymously(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client
) -> None:
    def watchers() -> list[tuple[str | None]]:
        return engine.running.database.writer.fetch_all("SELECT user_id FROM live_stream_sessions")

    count = guest.subscribe("presence:get_viewer_count", game_id=demo.live_game)
    await tomas.mutation("presence:join", game_id=demo.live_game, session_id="a", device_type="mobile")
    assert watchers() == [((await tomas.query("users:me")).id,)]
    assert await count.next() == {"viewerCount": 1}
    async with engine.count_runs() as runs:
        await tomas.mutation(DELETE)
    assert watchers() == [(None,)]
    assert runs == {DELETE: 1}, "no screen shows who watches"
    tomas.close()
    await engine.advance(2)
    assert await count.next() == {"viewerCount": 0}


async def test_one_who_comes_back_after_that_begins_anew(maya: Client) -> None:
    before = await maya.query("users:me")
    await maya.mutation(DELETE)
    assert await refusal(maya.query("watch_progress:get_continue_watching")) == "USER_NOT_STORED"
    assert await maya.mutation("users:store") != before.id
    assert (await maya.query("users:me")).role == "user"


async def test_an_account_is_deleted_by_its_user_and_by_admins_only(
    guest: Client, zoe: Client, tomas: Client, aiko: Client, sam: Client, maya: Client
) -> None:
    tomas_id = (await tomas.query("users:me")).id
    for caller in (guest, zoe, aiko, sam):
        assert await refusal(caller.mutation(DELETE, user_id=tomas_id)) == "USER_NOT_FOUND"
    assert await refusal(guest.mutation(DELETE)) == "UNAUTHENTICATED"
    assert await refusal(zoe.mutation(DELETE)) == "USER_NOT_STORED"
    assert await refusal(maya.mutation(DELETE, user_id=missing(tomas_id))) == "USER_NOT_FOUND"
    await maya.mutation(DELETE, user_id=tomas_id)
    assert await tomas.query("users:me") is None
    for user in (aiko, sam, maya):
        assert await user.query("users:me") is not None


async def test_an_operator_deletes_an_account(engine: TestEngine, tomas: Client) -> None:
    arguments = b'{"userId": "%b"}' % (await tomas.query("users:me")).id.encode()
    outcome = await engine.running.backend.http_mutation(DELETE, arguments, None, is_admin=True)  # as `engine run` does
    assert outcome.failure is None
    assert await tomas.query("users:me") is None


async def test_an_admin_without_an_account_is_none(engine: TestEngine, demo: Demo, maya: Client, sam: Client) -> None:
    message_id = await sam.mutation("chat:send_message", game_id=demo.quiet_game, message="rude")
    await sam.mutation("chat:moderate_message", message_id=message_id, status="hidden")
    options = PaginationOptions(num_items=10, cursor=None)
    view = maya.subscribe("chat:list_messages", game_id=demo.quiet_game, pagination_opts=options)
    assert len((await view.next()).page) == 1
    await maya.mutation(DELETE)
    assert (await view.next()).page == []
