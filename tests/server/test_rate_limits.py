"""Rate limits as HTTP clients meet them: a status of its own on the app's routes, data in the functions' API."""

from pathlib import Path

import aiohttp

from engine.server.app import serving
from tests.functions.apps import open_app
from tests.server.fakes import Served

FUNCTIONS = """
from datetime import timedelta

KNOCK = fixed_window("knock", count=1, per=timedelta(seconds=10))

@mutation
async def knock(ctx) -> None: await ctx.limit(KNOCK)

@http.post("/knock")
async def knock_by_route(ctx) -> None: await ctx.run_mutation(knock)
"""


async def test_who_asks_too_often_over_http_is_told_when_to_come_back(tmp_path: Path) -> None:
    async with (
        open_app(tmp_path, FUNCTIONS) as app,
        serving(app.engine, "127.0.0.1", 0) as address,
        aiohttp.ClientSession() as session,
    ):
        server = Served(address, session)
        async with session.post(server.url("/knock")) as response:
            assert response.status == 204
        await app.turn(7.5)
        async with session.post(server.url("/knock")) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "3")
            assert (await response.json())["code"] == "RateLimited"
        status, answer = await server.post("/api/mutation", {"path": "m:knock", "args": {}})
        assert (status, answer["status"]) == (200, "error"), "official clients read no other status"
        assert answer["errorData"] == {"code": "RateLimited", "name": "knock", "retry_after_ms": 2_500}
        await app.turn(2.5)
        async with session.post(server.url("/knock")) as response:
            assert response.status == 204
