import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from engine.errors import AppError, InvalidArgument, RateLimited
from engine.functions.pages import PaginationOptions
from engine.testing import Client, TestEngine
from tests.app.demo_app import Demo, missing, refusal, results_until

SEND, MODERATE = "chat:send_message", "chat:moderate_message"
GET, LIST = "chat:get_messages", "chat:list_messages"
as_fast_as_they_can = pytest.mark.engine(config={"rate_limits": {SEND: {"count": 1_000}}})


async def send(author: Client, demo: Demo, message: str) -> str:
    return str(await author.mutation(SEND, game_id=demo.quiet_game, message=message))


async def moderate(moderator: Client, message_id: str, status: str) -> None:
    await moderator.mutation(MODERATE, message_id=message_id, status=status)


async def texts(client: Client, demo: Demo, **arguments: Any) -> list[str]:
    return texts_in(await client.query(GET, game_id=demo.quiet_game, **arguments))


def texts_in(messages: list[Any]) -> list[str]:
    return [message.message for message in messages]


async def statuses(client: Client, demo: Demo) -> list[tuple[str, str]]:
    """Text and status of the messages that `list_messages` shows a client, newest first."""
    listed = await client.query(LIST, game_id=demo.quiet_game, pagination_opts=a_page(10))
    return [(message.message, message.status) for message in listed.page]


async def set_role(engine: TestEngine, client: Client, *permissions: str) -> None:
    """What an operator does to somebody who is no admin."""
    assert client.identity is not None
    token_identifier = client.identity.token_identifier
    await engine.mutation(
        "users:set_role", token_identifier=token_identifier, role="user", permissions=list(permissions)
    )


def a_page(size: int, cursor: str | None = None) -> PaginationOptions:
    return PaginationOptions(num_items=size, cursor=cursor)


async def test_a_message_carries_the_name_and_picture_of_its_author(
    demo: Demo, guest: Client, as_user: Callable[..., Client]
) -> None:
    zoe = as_user("zoe", name="Zoë Ek", picture="https://pictures.example/zoe.png")
    await zoe.mutation("users:store")
    message_id = await send(zoe, demo, "hello")
    await as_user("zoe", name="Renamed").mutation("users:store")
    (message,) = await guest.query(GET, game_id=demo.quiet_game)
    assert (message.id, message.message, message.status) == (message_id, "hello", "active")
    assert (message.user_name, message.user_avatar) == ("Zoë Ek", "https://pictures.example/zoe.png")


@pytest.mark.parametrize(
    ("written", "kept"), [("  hi\n", "hi"), ("x" * 500, "x" * 500), (f" {'🚆' * 500} ", "🚆" * 500)]
)
async def test_a_message_is_trimmed_and_has_up_to_500_characters(
    demo: Demo, tomas: Client, written: str, kept: str
) -> None:
    await send(tomas, demo, written)
    assert await texts(tomas, demo) == [kept]


@pytest.mark.parametrize(
    ("written", "code"), [("", "EMPTY_MESSAGE"), (" \n\t", "EMPTY_MESSAGE"), ("x" * 501, "MESSAGE_TOO_LONG")]
)
async def test_an_empty_or_long_message_is_refused(demo: Demo, tomas: Client, written: str, code: str) -> None:
    assert await refusal(send(tomas, demo, written)) == code
    assert await texts(tomas, demo) == []


async def test_the_refusal_of_a_long_message_says_the_bound(demo: Demo, tomas: Client) -> None:
    with pytest.raises(AppError) as refused:
        await send(tomas, demo, "x" * 501)
    assert refused.value.data["max"] == 500


async def test_only_stored_users_chat_and_only_about_games_that_exist(
    demo: Demo, guest: Client, zoe: Client, tomas: Client
) -> None:
    assert await refusal(send(guest, demo, "hi")) == "UNAUTHENTICATED"
    assert await refusal(send(zoe, demo, "hi")) == "USER_NOT_STORED"
    elsewhere = tomas.mutation(SEND, game_id=missing(demo.quiet_game), message="hi")
    assert await refusal(elsewhere) == "GAME_NOT_FOUND"


@as_fast_as_they_can
async def test_the_newest_messages_come_oldest_first(demo: Demo, tomas: Client) -> None:
    for number in range(60):
        await send(tomas, demo, str(number))
    assert await texts(tomas, demo) == [str(number) for number in range(10, 60)]
    assert await texts(tomas, demo, limit=3) == ["57", "58", "59"]


@pytest.mark.parametrize("limit", [0, -1, 201])
async def test_a_limit_is_1_to_200(demo: Demo, guest: Client, limit: int) -> None:
    with pytest.raises(InvalidArgument, match="limit"):
        await texts(guest, demo, limit=limit)


# -- moderation


async def test_a_message_that_is_hidden_or_deleted_is_there_for_moderators_only(
    demo: Demo, guest: Client, zoe: Client, tomas: Client, aiko: Client, sam: Client, maya: Client
) -> None:
    _, rude, spam = [await send(tomas, demo, text) for text in ("fine", "rude", "spam")]
    await moderate(sam, rude, "hidden")
    await moderate(sam, spam, "deleted")
    for client in (guest, zoe, tomas, aiko):
        assert await statuses(client, demo) == [("fine", "active")]
    for moderator in (sam, maya):
        assert await statuses(moderator, demo) == [("spam", "deleted"), ("rude", "hidden"), ("fine", "active")]
    for client in (guest, zoe, tomas, aiko, sam, maya):
        assert await texts(client, demo) == ["fine"], "the screen of the chat is the same for everybody"


async def test_messages_that_are_hidden_leave_no_gap_among_the_newest(demo: Demo, tomas: Client, sam: Client) -> None:
    for number in range(5):
        message_id = await send(tomas, demo, str(number))
        if number % 2:
            await moderate(sam, message_id, "hidden")
    assert await texts(tomas, demo, limit=3) == ["0", "2", "4"]


async def test_a_message_can_be_restored(demo: Demo, guest: Client, tomas: Client, sam: Client) -> None:
    message_id = await send(tomas, demo, "a misunderstanding")
    for status, shown in (("hidden", []), ("deleted", []), ("active", ["a misunderstanding"])):
        await moderate(sam, message_id, status)
        assert await texts(guest, demo) == shown


async def test_moderation_is_for_admins_and_for_those_with_the_permission(
    demo: Demo, guest: Client, zoe: Client, tomas: Client, aiko: Client, maya: Client, sam: Client
) -> None:
    shown, hidden = [await send(tomas, demo, text) for text in ("shown", "hidden")]
    for moderator in (maya, sam):
        for status in ("deleted", "active", "hidden"):
            await moderate(moderator, hidden, status)
    for client in (guest, zoe, tomas, aiko):
        assert await refusal(moderate(client, shown, "deleted")) == "Forbidden"
        assert await refusal(moderate(client, hidden, "active")) == "MESSAGE_NOT_FOUND"
    assert await statuses(sam, demo) == [("hidden", "hidden"), ("shown", "active")]


async def test_a_moderator_who_loses_the_permission_loses_hidden_messages_at_once(
    engine: TestEngine, demo: Demo, tomas: Client, sam: Client
) -> None:
    rude, fine = await send(tomas, demo, "rude"), await send(tomas, demo, "fine")
    await moderate(sam, rude, "hidden")
    view = sam.subscribe(LIST, game_id=demo.quiet_game, pagination_opts=a_page(10))
    assert texts_in((await view.next()).page) == ["fine", "rude"]
    await set_role(engine, sam)
    assert texts_in((await view.next()).page) == ["fine"]
    assert await refusal(moderate(sam, fine, "hidden")) == "Forbidden"
    await send(tomas, demo, "more")
    assert texts_in((await view.next()).page) == ["more", "fine"]
    await set_role(engine, sam, "write:chat")
    assert texts_in((await view.next()).page) == ["more", "fine", "rude"]


async def test_a_message_that_does_not_exist_cannot_be_moderated(demo: Demo, tomas: Client, sam: Client) -> None:
    message_id = await send(tomas, demo, "hi")
    assert await refusal(moderate(sam, missing(message_id), "hidden")) == "MESSAGE_NOT_FOUND"


# -- who shares, and what runs


async def test_all_who_watch_a_chat_without_hidden_messages_share_one_run(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client, sam: Client
) -> None:
    views = [viewer.subscribe(GET, game_id=demo.quiet_game) for viewer in (guest, tomas, sam)]
    for view in views:
        assert await view.next() == []
    async with engine.count_runs() as runs:
        await send(tomas, demo, "hi all")
        for view in views:
            assert texts_in(await view.next()) == ["hi all"]
    assert runs[GET] == 1


@pytest.mark.parametrize("path", [GET, LIST])
async def test_with_a_hidden_message_viewers_share_one_run_and_moderators_another(
    engine: TestEngine, demo: Demo, path: str, as_user: Callable[..., Client], tomas: Client, sam: Client, maya: Client
) -> None:
    viewers = [as_user(), *[as_user(f"viewer {number}") for number in range(10)], tomas]
    for viewer in viewers[1:-1]:
        await viewer.mutation("users:store")
    await moderate(sam, await send(tomas, demo, "rude"), "hidden")
    arguments = {"pagination_opts": a_page(10)} if path == LIST else {}
    views = [client.subscribe(path, game_id=demo.quiet_game, **arguments) for client in (*viewers, sam, maya)]
    for view in views:
        await view.next()
    async with engine.count_runs() as runs:
        await send(tomas, demo, "hi all")
        shown = [await view.next() for view in views]
    assert runs[path] == 2
    if path == LIST:
        assert [texts_in(page.page) for page in shown] == [["hi all"]] * len(viewers) + [["hi all", "rude"]] * 2
    else:
        assert [texts_in(messages) for messages in shown] == [["hi all"]] * len(views)


async def test_a_message_in_one_game_re_runs_no_chat_of_another(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client
) -> None:
    await guest.subscribe(GET, game_id=demo.live_game).next()
    async with engine.count_runs() as runs:
        await send(tomas, demo, "elsewhere")
    assert runs[GET] == 0


@as_fast_as_they_can
async def test_a_message_that_is_moderated_while_others_send_is_never_seen_again(
    demo: Demo, guest: Client, tomas: Client, aiko: Client, sam: Client
) -> None:
    view = guest.subscribe(GET, game_id=demo.quiet_game, limit=200)
    seen = [await view.next()]
    for round_number in range(15):
        rude = await send(tomas, demo, f"rude {round_number}")
        seen.append(await view.next())
        await asyncio.gather(
            send(aiko, demo, f"before {round_number}"),
            moderate(sam, rude, "hidden" if round_number % 2 else "deleted"),
            send(tomas, demo, f"after {round_number}"),
            send(aiko, demo, f"still here {round_number}"),
        )
        seen += await results_until(view, await guest.query(GET, game_id=demo.quiet_game, limit=200))
    assert len(seen[-1]) == 45
    assert not any(message.message.startswith("rude") for message in seen[-1])
    gone: set[str] = set()
    for earlier, later in pairwise(seen):
        gone |= {message.id for message in earlier} - {message.id for message in later}
        assert gone.isdisjoint(message.id for message in later)
    assert len(gone) == 15


async def test_an_author_who_is_moderated_goes_on_chatting(demo: Demo, tomas: Client, sam: Client) -> None:
    first = await send(tomas, demo, "rude")
    await asyncio.gather(moderate(sam, first, "hidden"), send(tomas, demo, "sorry"))
    assert await texts(tomas, demo) == ["sorry"]


# -- pages


@as_fast_as_they_can
async def test_pages_lead_each_through_all_that_they_may_see_newest_first(
    demo: Demo, guest: Client, tomas: Client, sam: Client
) -> None:
    sent = [await send(tomas, demo, str(number)) for number in range(25)]
    await moderate(sam, sent[12], "deleted")
    await moderate(sam, sent[5], "hidden")
    for client in (guest, sam):
        found: list[str] = []
        options = a_page(10)
        while True:
            page = await client.query(LIST, game_id=demo.quiet_game, pagination_opts=options)
            found += [message.id for message in page.page]
            if page.is_done:
                break
            options = a_page(10, page.continue_cursor)
        absent = () if client is sam else (sent[5], sent[12])
        assert found == [message_id for message_id in reversed(sent) if message_id not in absent]


# -- how often


async def test_a_user_sends_five_messages_in_ten_seconds(engine: TestEngine, demo: Demo, tomas: Client) -> None:
    for number in range(5):
        await send(tomas, demo, str(number))
    with pytest.raises(RateLimited) as refused:
        await send(tomas, demo, "one too many")
    assert refused.value.retry_after_ms == 2_000
    await engine.advance(1.9)
    assert await refusal(send(tomas, demo, "too early")) == "RateLimited"
    await engine.advance(0.1)
    await send(tomas, demo, "in time")
    assert await refusal(send(tomas, demo, "one too many again")) == "RateLimited"
    await engine.advance(10)
    for number in range(5, 10):
        await send(tomas, demo, str(number))
    assert await refusal(send(tomas, demo, "and again")) == "RateLimited"
    assert await texts(tomas, demo) == [*"01234", "in time", *"56789"]


async def test_the_limit_is_a_users_on_all_screens_and_in_all_games_and_nobody_elses(
    demo: Demo, as_user: Callable[..., Client], tomas: Client, aiko: Client
) -> None:
    other_screen = as_user("tomas")
    for number in range(2):
        await send(tomas, demo, str(number))
        await other_screen.mutation(SEND, game_id=demo.live_game, message=str(number))
    await send(other_screen, demo, "the fifth")
    for client in (tomas, other_screen):
        for game_id in (demo.live_game, demo.quiet_game):
            assert await refusal(client.mutation(SEND, game_id=game_id, message="hi")) == "RateLimited"
    for number in range(5):
        await send(aiko, demo, str(number))


async def test_a_message_that_is_refused_does_not_count(demo: Demo, tomas: Client) -> None:
    for text in ("", "x" * 501) * 5:
        await refusal(send(tomas, demo, text))
    for _ in range(5):
        await refusal(tomas.mutation(SEND, game_id=missing(demo.quiet_game), message="hi"))
    for number in range(5):
        await send(tomas, demo, str(number))


@pytest.mark.engine(config={"rate_limits": {SEND: {"count": 2, "seconds": 60}}})
async def test_an_operator_sets_the_limit(engine: TestEngine, demo: Demo, tomas: Client) -> None:
    for number in range(2):
        await send(tomas, demo, str(number))
    await engine.advance(29)
    assert await refusal(send(tomas, demo, "too early")) == "RateLimited"
    await engine.advance(1)
    await send(tomas, demo, "in time")
