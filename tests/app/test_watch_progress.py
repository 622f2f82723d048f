import asyncio
import math
from typing import Any

import pytest

from tests.app.demo_app import AIKO, MAYA, TOMAS, DemoApp, missing, person

UPDATE, GET = "watch_progress:update_progress", "watch_progress:get_progress"
CONTINUE = "watch_progress:get_continue_watching"


async def watch(app: DemoApp, content_index: int, position: float, **options: Any) -> Any:
    """TOMAS gets to `position` of 100 seconds."""
    content_id = app.contents[content_index].id
    arguments = {"content_id": content_id, "position_seconds": position, "duration_seconds": 100.0, **options}
    return await app.mutation(UPDATE, arguments.pop("identity", TOMAS), **arguments)


async def continue_watching(app: DemoApp, **arguments: Any) -> list[str]:
    return [progress.content_id for progress in await app.query(CONTINUE, TOMAS, **arguments)]


async def test_progress_is_made_once_and_then_updated(app: DemoApp) -> None:
    content_id = app.contents[0].id
    assert await app.query(GET, TOMAS, content_id=content_id) is None
    first = await watch(app, 0, 10.0, device_type="desktop")
    app.clock.advance(5)
    assert await watch(app, 0, 15.0, device_type="mobile") == first
    progress = await app.query(GET, TOMAS, content_id=content_id)
    assert (progress.position_seconds, progress.completion_percentage, progress.device_type) == (15.0, 15.0, "mobile")
    assert progress.last_watched_at - progress.creation_time == pytest.approx(5_000, abs=1)
    assert not progress.completed


async def test_the_last_of_three_devices_wins_on_all_of_them(app: DemoApp) -> None:
    content_id = app.contents[0].id
    devices = ("desktop", "mobile", "tablet")
    async with (
        app.subscribed(GET, TOMAS, content_id=content_id) as desktop,
        app.subscribed(GET, TOMAS, content_id=content_id) as mobile,
        app.subscribed(GET, TOMAS, content_id=content_id) as tablet,
    ):
        for round_number in range(10):
            writes = [watch(app, 0, float(10 * i + round_number), device_type=devices[i]) for i in range(3)]
            row_ids = await asyncio.gather(*writes)
            assert len(set(row_ids)) == 1
            held_by_all = await app.query(GET, TOMAS, content_id=content_id)
            assert (held_by_all.device_type, held_by_all.position_seconds) == ("tablet", 20.0 + round_number)
            for subscriber in (desktop, mobile, tablet):
                await subscriber.until(held_by_all)
        for subscriber in (desktop, mobile, tablet):
            seen = [progress.last_watched_at for progress in subscriber.pushed if progress]
            assert seen == sorted(set(seen)), "nobody goes back to an earlier write"


@pytest.mark.parametrize(
    ("position", "percentage", "completed"),
    [(0.0, 0.0, False), (89.999, 89.999, False), (90.0, 90.0, True), (100.0, 100.0, True), (130.0, 100.0, True)],
)
async def test_ninety_percent_is_completed(app: DemoApp, position: float, percentage: float, completed: bool) -> None:
    await watch(app, 0, position)
    progress = await app.query(GET, TOMAS, content_id=app.contents[0].id)
    assert progress.completion_percentage == pytest.approx(percentage)
    assert progress.completed is completed
    assert progress.position_seconds == min(position, 100.0)


async def test_watching_again_from_the_start_is_unfinished_again(app: DemoApp) -> None:
    await watch(app, 0, 100.0)
    assert await continue_watching(app) == []
    await watch(app, 0, 3.0)
    assert await continue_watching(app) == [app.contents[0].id]


async def test_continue_watching_lists_the_unfinished_last_watched_first(app: DemoApp) -> None:
    for content_index, position in ((0, 10.0), (1, 95.0), (2, 20.0), (3, 30.0)):
        await watch(app, content_index, position)
        app.clock.advance(60)
    await watch(app, 0, 11.0)
    unfinished = [app.contents[index].id for index in (0, 3, 2)]
    assert await continue_watching(app) == unfinished
    assert await continue_watching(app, limit=2) == unfinished[:2]


async def test_finishing_something_takes_it_off_the_list_at_once(app: DemoApp) -> None:
    await watch(app, 0, 50.0)
    async with app.subscribed(CONTINUE, TOMAS) as carousel:
        assert len(carousel.pushed[-1]) == 1
        await watch(app, 0, 99.0)
        assert await carousel.next() == []


async def test_finished_contents_cost_continue_watching_nothing(app: DemoApp) -> None:
    await watch(app, 0, 50.0)
    await watch(app, 1, 95.0)
    async with app.subscribed(CONTINUE, TOMAS):
        app.forget_events()
        await watch(app, 1, 99.0)
        await app.idle()
        assert app.run_count(CONTINUE) == 0


async def test_progress_of_one_user_re_runs_nothing_of_another(app: DemoApp) -> None:
    content_id = app.contents[0].id
    async with app.subscribed(GET, AIKO, content_id=content_id), app.subscribed(CONTINUE, AIKO):
        app.forget_events()
        await watch(app, 0, 50.0)
        await app.idle()
        assert (app.run_count(GET), app.run_count(CONTINUE)) == (0, 0)


@pytest.mark.parametrize("position", [-0.001, math.nan, math.inf, -math.inf])
async def test_an_impossible_position_is_refused(app: DemoApp, position: float) -> None:
    arguments = {"content_id": app.contents[0].id, "position_seconds": position, "duration_seconds": 100.0}
    assert await app.refusal(UPDATE, TOMAS, **arguments) == "INVALID_POSITION"


@pytest.mark.parametrize("duration", [0.0, -1.0, math.nan, math.inf])
async def test_an_impossible_duration_is_refused(app: DemoApp, duration: float) -> None:
    arguments = {"content_id": app.contents[0].id, "position_seconds": 0.0, "duration_seconds": duration}
    assert await app.refusal(UPDATE, TOMAS, **arguments) == "INVALID_DURATION"


async def test_the_user_id_is_the_callers_own_unless_an_admin_asks(app: DemoApp) -> None:
    tomas, aiko = await app.query("users:me", TOMAS), await app.query("users:me", AIKO)
    content_id = app.contents[0].id
    update = {"content_id": content_id, "position_seconds": 1.0, "duration_seconds": 100.0}
    await app.mutation(UPDATE, TOMAS, **update, user_id=tomas.id)
    for path, arguments in ((UPDATE, update), (GET, {"content_id": content_id}), (CONTINUE, {})):
        assert await app.refusal(path, TOMAS, **arguments, user_id=aiko.id) == "FORBIDDEN"
    assert (await app.query(GET, MAYA, content_id=content_id, user_id=tomas.id)).user_id == tomas.id
    await app.mutation(UPDATE, MAYA, **update, user_id=aiko.id)
    assert len(await app.query(CONTINUE, MAYA, user_id=aiko.id)) == 1
    assert await app.query(GET, MAYA, content_id=content_id) is None


async def test_an_admin_who_asks_for_nobody_is_told_so(app: DemoApp) -> None:
    tomas = await app.query("users:me", TOMAS)
    nobody = missing(tomas.id)
    assert await app.refusal(CONTINUE, MAYA, user_id=nobody) == "USER_NOT_FOUND"


async def test_an_admin_who_is_demoted_loses_the_view_of_others_at_once(app: DemoApp) -> None:
    tomas = await app.query("users:me", TOMAS)
    assert await app.query(CONTINUE, MAYA, user_id=tomas.id) == []
    await app.mutation("users:set_role", token_identifier=MAYA.token_identifier, role="user")
    assert await app.refusal(CONTINUE, MAYA, user_id=tomas.id) == "FORBIDDEN"


async def test_progress_needs_a_stored_user_and_an_existing_content(app: DemoApp) -> None:
    content_id = app.contents[0].id
    assert await app.refusal(GET, content_id=content_id) == "UNAUTHENTICATED"
    assert await app.refusal(GET, person("zoe"), content_id=content_id) == "USER_NOT_STORED"
    arguments = {"content_id": missing(content_id), "position_seconds": 1.0, "duration_seconds": 100.0}
    assert await app.refusal(UPDATE, TOMAS, **arguments) == "CONTENT_NOT_FOUND"
