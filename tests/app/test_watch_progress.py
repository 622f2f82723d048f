import asyncio
import math
from typing import Any

import pytest

from engine.testing import Client, ManualClock, TestEngine
from tests.app.demo_app import Demo, missing, refusal, results_until

UPDATE, GET = "watch_progress:update_progress", "watch_progress:get_progress"
CONTINUE = "watch_progress:get_continue_watching"


async def watch(client: Client, content: Any, position: float, **options: Any) -> str:
    """Somebody gets to `position` of 100 seconds."""
    arguments = {"content_id": content.id, "position_seconds": position, "duration_seconds": 100.0, **options}
    return str(await client.mutation(UPDATE, **arguments))


async def continue_watching(client: Client, **arguments: Any) -> list[str]:
    return [progress.content_id for progress in await client.query(CONTINUE, **arguments)]


async def test_progress_is_made_once_and_then_updated(demo: Demo, clock: ManualClock, tomas: Client) -> None:
    content = demo.contents[0]
    assert await tomas.query(GET, content_id=content.id) is None
    first = await watch(tomas, content, 10.0, device_type="desktop")
    clock.advance(5)
    assert await watch(tomas, content, 15.0, device_type="mobile") == first
    progress = await tomas.query(GET, content_id=content.id)
    assert (progress.position_seconds, progress.completion_percentage, progress.device_type) == (15.0, 15.0, "mobile")
    assert progress.last_watched_at - progress.creation_time == pytest.approx(5_000, abs=1)
    assert not progress.completed


async def test_the_last_of_three_devices_wins_on_all_of_them(demo: Demo, tomas: Client) -> None:
    content = demo.contents[0]
    devices = ("desktop", "mobile", "tablet")
    subscriptions = [tomas.subscribe(GET, content_id=content.id) for _ in devices]
    seen = [[await subscription.next()] for subscription in subscriptions]
    for round_number in range(10):
        writes = [watch(tomas, content, float(10 * i + round_number), device_type=devices[i]) for i in range(3)]
        row_ids = await asyncio.gather(*writes)
        assert len(set(row_ids)) == 1
        held_by_all = await tomas.query(GET, content_id=content.id)
        assert (held_by_all.device_type, held_by_all.position_seconds) == ("tablet", 20.0 + round_number)
        for subscription, results in zip(subscriptions, seen, strict=True):
            results += await results_until(subscription, held_by_all)
    for results in seen:
        written_at = [progress.last_watched_at for progress in results if progress]
        assert written_at == sorted(set(written_at)), "nobody goes back to an earlier write"


@pytest.mark.parametrize(
    ("position", "percentage", "completed"),
    [(0.0, 0.0, False), (89.999, 89.999, False), (90.0, 90.0, True), (100.0, 100.0, True), (130.0, 100.0, True)],
)
async def test_ninety_percent_is_completed(
    demo: Demo, tomas: Client, position: float, percentage: float, completed: bool
) -> None:
    await watch(tomas, demo.contents[0], position)
    progress = await tomas.query(GET, content_id=demo.contents[0].id)
    assert progress.completion_percentage == pytest.approx(percentage)
    assert progress.completed is completed
    assert progress.position_seconds == min(position, 100.0)


async def test_watching_again_from_the_start_is_unfinished_again(demo: Demo, tomas: Client) -> None:
    await watch(tomas, demo.contents[0], 100.0)
    assert await continue_watching(tomas) == []
    await watch(tomas, demo.contents[0], 3.0)
    assert await continue_watching(tomas) == [demo.contents[0].id]


async def test_continue_watching_lists_the_unfinished_last_watched_first(
    demo: Demo, clock: ManualClock, tomas: Client
) -> None:
    for index, position in ((0, 10.0), (1, 95.0), (2, 20.0), (3, 30.0)):
        await watch(tomas, demo.contents[index], position)
        clock.advance(60)
    await watch(tomas, demo.contents[0], 11.0)
    unfinished = [demo.contents[index].id for index in (0, 3, 2)]
    assert await continue_watching(tomas) == unfinished
    assert await continue_watching(tomas, limit=2) == unfinished[:2]


async def test_finishing_something_takes_it_off_the_list_at_once(demo: Demo, tomas: Client) -> None:
    await watch(tomas, demo.contents[0], 50.0)
    carousel = tomas.subscribe(CONTINUE)
    assert len(await carousel.next()) == 1
    await watch(tomas, demo.contents[0], 99.0)
    assert await carousel.next() == []


async def test_finished_contents_cost_continue_watching_nothing(engine: TestEngine, demo: Demo, tomas: Client) -> None:
    await watch(tomas, demo.contents[0], 50.0)
    await watch(tomas, demo.contents[1], 95.0)
    await tomas.subscribe(CONTINUE).next()
    async with engine.count_runs() as runs:
        await watch(tomas, demo.contents[1], 99.0)
    assert runs[CONTINUE] == 0


async def test_progress_of_one_user_re_runs_nothing_of_another(
    engine: TestEngine, demo: Demo, tomas: Client, aiko: Client
) -> None:
    await aiko.subscribe(GET, content_id=demo.contents[0].id).next()
    await aiko.subscribe(CONTINUE).next()
    async with engine.count_runs() as runs:
        await watch(tomas, demo.contents[0], 50.0)
    assert runs == {UPDATE: 1}


@pytest.mark.parametrize("position", [-0.001, math.nan, math.inf, -math.inf])
async def test_an_impossible_position_is_refused(demo: Demo, tomas: Client, position: float) -> None:
    assert await refusal(watch(tomas, demo.contents[0], position)) == "INVALID_POSITION"


@pytest.mark.parametrize("duration", [0.0, -1.0, math.nan, math.inf])
async def test_an_impossible_duration_is_refused(demo: Demo, tomas: Client, duration: float) -> None:
    assert await refusal(watch(tomas, demo.contents[0], 0.0, duration_seconds=duration)) == "INVALID_DURATION"


async def test_the_user_id_is_the_callers_own_unless_an_admin_asks(
    demo: Demo, guest: Client, zoe: Client, sam: Client, maya: Client, tomas: Client, aiko: Client
) -> None:
    tomas_id, aiko_id = (await tomas.query("users:me")).id, (await aiko.query("users:me")).id
    content = demo.contents[0]
    await watch(tomas, content, 1.0, user_id=tomas_id)
    for caller in (guest, zoe, tomas, sam):
        assert await refusal(watch(caller, content, 1.0, user_id=aiko_id)) == "USER_NOT_FOUND"
        assert await refusal(caller.query(GET, content_id=content.id, user_id=aiko_id)) == "USER_NOT_FOUND"
        assert await refusal(caller.query(CONTINUE, user_id=aiko_id)) == "USER_NOT_FOUND"
    assert await tomas.query(GET, content_id=content.id, user_id=tomas_id) == await tomas.query(
        GET, content_id=content.id
    )
    assert (await maya.query(GET, content_id=content.id, user_id=tomas_id)).user_id == tomas_id
    await watch(maya, content, 1.0, user_id=aiko_id)
    assert len(await maya.query(CONTINUE, user_id=aiko_id)) == 1
    assert await maya.query(GET, content_id=content.id) is None


@pytest.mark.usefixtures("demo")
async def test_an_admin_who_asks_for_nobody_is_told_so(maya: Client, tomas: Client) -> None:
    nobody = missing((await tomas.query("users:me")).id)
    assert await refusal(maya.query(CONTINUE, user_id=nobody)) == "USER_NOT_FOUND"


async def test_an_admin_who_is_demoted_loses_the_view_of_others_at_once(
    engine: TestEngine, demo: Demo, maya: Client, tomas: Client
) -> None:
    tomas_id = (await tomas.query("users:me")).id
    await watch(tomas, demo.contents[0], 1.0)
    view = maya.subscribe(CONTINUE, user_id=tomas_id)
    assert len(await view.next()) == 1
    assert maya.identity is not None
    await engine.mutation("users:set_role", token_identifier=maya.identity.token_identifier, role="user")
    assert await refusal(view.next()) == "USER_NOT_FOUND"


async def test_progress_needs_a_stored_user_and_an_existing_content(
    demo: Demo, guest: Client, zoe: Client, tomas: Client
) -> None:
    content_id = demo.contents[0].id
    assert await refusal(guest.query(GET, content_id=content_id)) == "UNAUTHENTICATED"
    assert await refusal(zoe.query(GET, content_id=content_id)) == "USER_NOT_STORED"
    update = tomas.mutation(UPDATE, content_id=missing(content_id), position_seconds=1.0, duration_seconds=100.0)
    assert await refusal(update) == "CONTENT_NOT_FOUND"
