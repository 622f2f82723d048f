"""What tests of the demo app ask again and again."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest

from engine.errors import AppError, RequestError
from engine.limits import Limits
from engine.testing import Client, Subscription, TestEngine


class Demo(msgspec.Struct, frozen=True):
    """What `demo:seed` made."""

    contents: list[Any]  # by title
    live_game: str  # with the demo chat
    quiet_game: str  # without any

    @classmethod
    async def seeded(cls, engine: TestEngine) -> "Demo":
        assert await engine.mutation("demo:seed")
        games = {game.status: game.id for game in await engine.query("games:list")}
        return cls(await engine.query("content:list"), games["live"], games["scheduled"])


def missing(document_id: str) -> str:
    """An id of the same table that no document has."""
    return document_id[:-1] + ("0" if document_id[-1] != "0" else "1")


async def refusal(call: Awaitable[Any]) -> str:
    """The code with which the app refuses a call, as `USER_NOT_STORED`, or the engine, as `Forbidden`."""
    with pytest.raises((AppError, RequestError)) as refused:
        await call
    error = refused.value
    return str(error.data["code"]) if isinstance(error, AppError) else error.code


async def results_until(subscription: Subscription, expected: Any) -> list[Any]:
    """What the subscriber is given from now on, up to the result that is expected."""
    results = [await subscription.next()]
    while results[-1] != expected:
        results.append(await subscription.next())
    return results


async def join_all(as_user: Callable[..., Client], game_id: str, session_ids: Sequence[str]) -> list[Client]:
    """As many anonymous viewers of a game, over as few connections as can be."""
    size = Limits().disconnect_count_max
    clients = [as_user() for _ in range(0, len(session_ids), size)]
    await asyncio.gather(
        *(
            clients[number // size].mutation(
                "presence:join", game_id=game_id, session_id=session_id, device_type="mobile"
            )
            for number, session_id in enumerate(session_ids)
        )
    )
    return clients
