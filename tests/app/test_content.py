import asyncio

import pytest

from engine.errors import FunctionNotFound
from engine.testing import Client, TestEngine
from tests.app.demo_app import Demo, missing, refusal

DELETE = "content:delete"
GET, CONTINUE = "watch_progress:get_progress", "watch_progress:get_continue_watching"


async def watch(client: Client, content_id: str) -> None:
    arguments = {"content_id": content_id, "position_seconds": 1.0, "duration_seconds": 9.0}
    await client.mutation("watch_progress:update_progress", **arguments)


async def test_a_content_goes_with_everybodys_progress_and_whoever_looks_is_told(
    engine: TestEngine, demo: Demo, guest: Client, tomas: Client, aiko: Client
) -> None:
    first, second, *_ = (content.id for content in demo.contents)
    for user in (tomas, aiko):
        await watch(user, first)
        await watch(user, second)
    contents = guest.subscribe("content:list")
    carousels = [user.subscribe(CONTINUE) for user in (tomas, aiko)]
    progress = aiko.subscribe(GET, content_id=first)
    assert len(await contents.next()) == 4
    assert [len(await carousel.next()) for carousel in carousels] == [2, 2]
    assert (await progress.next()).position_seconds == 1.0

    await engine.mutation(DELETE, content_id=first)
    assert first not in [content.id for content in await contents.next()]
    for carousel in carousels:
        assert [progress.content_id for progress in await carousel.next()] == [second]
    assert await progress.next() is None
    update = tomas.mutation(
        "watch_progress:update_progress", content_id=first, position_seconds=2.0, duration_seconds=9.0
    )
    assert await refusal(update) == "CONTENT_NOT_FOUND"


@pytest.mark.slow
async def test_what_very_many_have_watched_goes_in_several_runs(engine: TestEngine, demo: Demo, tomas: Client) -> None:
    first, second, *_ = (content.id for content in demo.contents)
    crowd = [engine.as_user(f"viewer {number}") for number in range(1_100)]
    await asyncio.gather(*(user.mutation("users:store") for user in crowd))
    await asyncio.gather(*(watch(user, first) for user in crowd))
    await watch(crowd[0], second)
    async with engine.count_runs() as runs:
        await engine.mutation(DELETE, content_id=first)
        await engine.advance(1)
    assert runs[DELETE] == 3
    assert [await user.query(GET, content_id=first) for user in (crowd[0], crowd[-1])] == [None, None]
    assert await crowd[0].query(GET, content_id=second) is not None
    assert len(await tomas.query("content:list")) == 3


async def test_contents_are_deleted_by_operators_only(
    engine: TestEngine, demo: Demo, guest: Client, maya: Client
) -> None:
    content_id = demo.contents[0].id
    for client in (guest, maya):
        with pytest.raises(FunctionNotFound):
            await client.mutation(DELETE, content_id=content_id)
    assert await refusal(engine.mutation(DELETE, content_id=missing(content_id))) == "CONTENT_NOT_FOUND"
    assert len(await guest.query("content:list")) == 4
