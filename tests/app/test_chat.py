import asyncio
from typing import Any

import pytest

from engine.errors import AppError, InvalidArgument
from engine.functions.pages import PaginationOptions
from tests.app.demo_app import AIKO, MAYA, SAM, TOMAS, DemoApp, missing, person

SEND, GET, LIST = "chat:send_message", "chat:get_messages", "chat:list_messages"
MODERATE, ALL = "chat:moderate_message", "chat:moderation_messages"


async def send(app: DemoApp, message: str, identity: Any = TOMAS) -> str:
    return str(await app.mutation(SEND, identity, game_id=app.quiet_game, message=message))


async def moderate(app: DemoApp, message_id: str, status: str) -> None:
    await app.mutation(MODERATE, SAM, message_id=message_id, status=status)


async def texts(app: DemoApp, **arguments: Any) -> list[str]:
    messages = await app.query(GET, game_id=app.quiet_game, **arguments)
    return [message.message for message in messages]


def a_page(size: int, cursor: str | None = None) -> PaginationOptions:
    return PaginationOptions(num_items=size, cursor=cursor)


async def test_a_message_carries_the_name_and_picture_of_its_author(app: DemoApp) -> None:
    zoe = person("zoe", name="Zoë Ek", picture="https://pictures.example/zoe.png")
    await app.mutation("users:store", zoe)
    message_id = await send(app, "hello", zoe)
    await app.mutation("users:store", person("zoe", name="Renamed"))
    (message,) = await app.query(GET, game_id=app.quiet_game)
    assert (message.id, message.message, message.status) == (message_id, "hello", "active")
    assert (message.user_name, message.user_avatar) == ("Zoë Ek", "https://pictures.example/zoe.png")


@pytest.mark.parametrize(
    ("written", "kept"), [("  hi\n", "hi"), ("x" * 500, "x" * 500), (f" {'🚆' * 500} ", "🚆" * 500)]
)
async def test_a_message_is_trimmed_and_has_up_to_500_characters(app: DemoApp, written: str, kept: str) -> None:
    await send(app, written)
    assert await texts(app) == [kept]


@pytest.mark.parametrize(
    ("written", "code"), [("", "EMPTY_MESSAGE"), (" \n\t", "EMPTY_MESSAGE"), ("x" * 501, "MESSAGE_TOO_LONG")]
)
async def test_an_empty_or_long_message_is_refused(app: DemoApp, written: str, code: str) -> None:
    assert await app.refusal(SEND, TOMAS, game_id=app.quiet_game, message=written) == code
    assert await texts(app) == []


async def test_the_refusal_of_a_long_message_says_the_bound(app: DemoApp) -> None:
    with pytest.raises(AppError) as refusal:
        await send(app, "x" * 501)
    assert refusal.value.data["max"] == 500


async def test_only_stored_users_chat_and_only_about_games_that_exist(app: DemoApp) -> None:
    arguments = {"game_id": app.quiet_game, "message": "hi"}
    assert await app.refusal(SEND, **arguments) == "UNAUTHENTICATED"
    assert await app.refusal(SEND, person("zoe"), **arguments) == "USER_NOT_STORED"
    arguments["game_id"] = missing(app.quiet_game)
    assert await app.refusal(SEND, TOMAS, **arguments) == "GAME_NOT_FOUND"


async def test_the_newest_messages_come_oldest_first(app: DemoApp) -> None:
    for number in range(60):
        await send(app, str(number))
    assert await texts(app) == [str(number) for number in range(10, 60)]
    assert await texts(app, limit=3) == ["57", "58", "59"]


@pytest.mark.parametrize("limit", [0, -1, 201])
async def test_a_limit_is_1_to_200(app: DemoApp, limit: int) -> None:
    with pytest.raises(InvalidArgument, match="limit"):
        await texts(app, limit=limit)


async def test_a_hidden_message_loses_its_text_and_a_deleted_one_its_place(app: DemoApp) -> None:
    _, rude, spam = [await send(app, text) for text in ("fine", "rude", "spam")]
    await moderate(app, rude, "hidden")
    await moderate(app, spam, "deleted")
    messages = await app.query(GET, game_id=app.quiet_game)
    assert [(message.message, message.status) for message in messages] == [("fine", "active"), ("", "hidden")]
    page = await app.query(LIST, game_id=app.quiet_game, pagination_opts=a_page(10))
    assert [(message.message, message.status) for message in page.page] == [("", "hidden"), ("fine", "active")]
    everything = await app.query(ALL, SAM, game_id=app.quiet_game, pagination_opts=a_page(10))
    assert [(message.message, message.status) for message in everything.page] == [
        ("spam", "deleted"),
        ("rude", "hidden"),
        ("fine", "active"),
    ]


async def test_a_message_can_be_restored(app: DemoApp) -> None:
    message_id = await send(app, "a misunderstanding")
    for status, shown in (("hidden", [""]), ("deleted", []), ("active", ["a misunderstanding"])):
        await moderate(app, message_id, status)
        assert await texts(app) == shown


async def test_moderation_is_for_admins_and_for_those_with_the_permission(app: DemoApp) -> None:
    message_id = await send(app, "hi")
    for identity in (MAYA, SAM):
        await app.mutation(MODERATE, identity, message_id=message_id, status="hidden")
        await app.query(ALL, identity, game_id=app.quiet_game, pagination_opts=a_page(10))
    for caller, code in ((TOMAS, "FORBIDDEN"), (person("zoe"), "USER_NOT_STORED"), (None, "UNAUTHENTICATED")):
        assert await app.refusal(MODERATE, caller, message_id=message_id, status="active") == code
        assert await app.refusal(ALL, caller, game_id=app.quiet_game, pagination_opts=a_page(10)) == code
    assert await texts(app) == [""]


async def test_a_moderator_who_loses_the_permission_loses_the_view(app: DemoApp) -> None:
    async with app.subscribed(ALL, SAM, game_id=app.quiet_game, pagination_opts=a_page(10)) as view:
        await app.mutation("users:set_role", token_identifier=SAM.token_identifier, role="user")
        with pytest.raises(AppError, match="FORBIDDEN"):
            await view.next()


async def test_a_message_that_does_not_exist_cannot_be_moderated(app: DemoApp) -> None:
    message_id = await send(app, "hi")
    assert await app.refusal(MODERATE, SAM, message_id=missing(message_id), status="hidden") == "MESSAGE_NOT_FOUND"


async def test_all_viewers_of_a_game_share_one_run(app: DemoApp) -> None:
    async with (
        app.subscribed(GET, game_id=app.quiet_game) as anonymous,
        app.subscribed(GET, TOMAS, game_id=app.quiet_game) as tomas,
        app.subscribed(GET, SAM, game_id=app.quiet_game) as moderator,
    ):
        app.forget_events()
        await send(app, "hi all")
        for viewer in (anonymous, tomas, moderator):
            (message,) = await viewer.next()
            assert message.message == "hi all"
        await app.idle()
        assert app.run_count(GET) == 1


async def test_a_message_in_one_game_re_runs_no_chat_of_another(app: DemoApp) -> None:
    async with app.subscribed(GET, game_id=app.live_game):
        app.forget_events()
        await send(app, "elsewhere")
        await app.idle()
        assert app.run_count(GET) == 0


async def test_a_message_that_is_moderated_while_others_send_is_never_seen_again(app: DemoApp) -> None:
    async with app.subscribed(GET, game_id=app.quiet_game, limit=200) as viewer:
        for round_number in range(15):
            rude = await send(app, f"rude {round_number}")
            await asyncio.gather(
                send(app, f"before {round_number}", AIKO),
                moderate(app, rude, "deleted"),
                send(app, f"after {round_number}", TOMAS),
                send(app, f"still here {round_number}", AIKO),
            )
        final = await app.query(GET, game_id=app.quiet_game, limit=200)
        await viewer.until(final)
    assert len(final) == 45
    assert not any(message.message.startswith("rude") for message in final)
    gone: set[str] = set()
    for earlier, later in zip(viewer.pushed, viewer.pushed[1:], strict=False):
        gone |= {message.id for message in earlier} - {message.id for message in later}
        assert gone.isdisjoint(message.id for message in later)


async def test_an_author_who_is_moderated_goes_on_chatting(app: DemoApp) -> None:
    first = await send(app, "rude")
    await asyncio.gather(moderate(app, first, "hidden"), send(app, "sorry"))
    assert await texts(app) == ["", "sorry"]


async def test_pages_lead_through_all_messages_newest_first(app: DemoApp) -> None:
    sent = [await send(app, str(number)) for number in range(25)]
    await moderate(app, sent[12], "deleted")
    found: list[str] = []
    options = a_page(10)
    while True:
        page = await app.query(LIST, game_id=app.quiet_game, pagination_opts=options)
        found += [message.id for message in page.page]
        if page.is_done:
            break
        options = a_page(10, page.continue_cursor)
    assert found == [message_id for message_id in reversed(sent) if message_id != sent[12]]
