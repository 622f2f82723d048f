"""Webhooks by real requests: each delivery runs once, however often and however it comes."""

import asyncio
import hashlib
import hmac
import json
import sys
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.functions.webhooks import WebhookDelivery
from engine.schema import Table
from engine.testing import ManualClock
from tests.functions.apps import SECONDS_MAX, UNHURRIED
from tests.server.real import RealServer, Reply, serve_app

KEY = b"a key of 24 bytes at most"
SETTINGS = {"payments_secret": f"whsec_{b64encode(KEY).decode()}", "plain_secret": "plain"}

HOOKS = """
import msgspec

class Payment(msgspec.Struct):
    amount: int

gate = asyncio.Event()
gate.set()
started = 0

@mutation
async def keep(ctx: MutationCtx, amount: int) -> int:
    identity = ctx.auth.identity()
    await ctx.db.insert(Item(key="paid", rank=amount, note="" if identity is None else identity.subject))
    return len(await ctx.db.query(Item).collect())

@query
async def kept(ctx: QueryCtx) -> list[int]:
    return [item.rank for item in await ctx.db.query(Item).collect()]

@http.post("/hooks/payments", webhook=Webhook(secret="payments_secret"))
async def paid(ctx: ActionCtx, body: Payment) -> dict[str, int] | Response:
    global started
    started += 1
    await gate.wait()
    if body.amount == 13:
        raise AppError({"code": "UNLUCKY"})
    if body.amount == 0:
        raise ZeroDivisionError
    if body.amount < 0:
        return Response(status=503, body="later")
    return {"number": await ctx.run_mutation(keep, amount=body.amount)}

@http.post("/hooks/other", webhook=Webhook(secret="payments_secret"))
async def other(ctx: ActionCtx) -> str:
    return ctx.request.headers["webhook-id"]

@http.post("/hooks/github", webhook=Webhook(secret="plain_secret", scheme="github"))
async def pushed(ctx: ActionCtx, body: Payment) -> int:
    return await ctx.run_mutation(keep, amount=body.amount)

@http.post("/hooks/unset", webhook=Webhook(secret="nobody_set_it"))
async def unset(ctx: ActionCtx) -> None: ...

@http.post("/hooks/large", webhook=Webhook(secret="payments_secret"))
async def large(ctx: ActionCtx) -> str:
    return "x" * 70_000
"""


@pytest.fixture
async def real(tmp_path: Path) -> AsyncIterator[RealServer]:
    async with serve_app(tmp_path, HOOKS, settings=SETTINGS) as real:
        yield real


async def deliver(
    real: RealServer,
    amount: int = 5,
    *,
    delivery: str = "msg_1",
    to: str = "/hooks/payments",
    age: int = 0,
    **headers: str,
) -> Reply:
    """A delivery as its sender makes it, signed now."""
    body = json.dumps({"amount": amount}).encode()
    at = int(real.clock.wall_ns() / 1e9) - age
    digest = hmac.digest(KEY, b"%b.%d.%b" % (delivery.encode(), at, body), "sha256")
    signed = {
        "Webhook-Id": delivery,
        "Webhook-Timestamp": str(at),
        "Webhook-Signature": f"v1,{b64encode(digest).decode()}",
    }
    return await real.ask("POST", to, data=body, headers={**signed, **headers})


async def kept(real: RealServer) -> Any:
    return await real.app.call("m:kept")


async def stored(real: RealServer, table: type[Table], index: str) -> list[Any]:
    """All documents of a table, also of a hidden one."""
    return await real.engine.backend.write(lambda transaction, now: transaction.find(table, index))


async def rows(real: RealServer) -> list[tuple[int, bool]]:
    """The deliveries that are remembered: their numbers, and whether they have an answer."""
    found = await stored(real, WebhookDelivery, "by_number")
    return [(delivery.number, delivery.answer is not None) for delivery in found]


async def started(real: RealServer, count: int) -> None:
    """Until the route has been started so often."""
    async with asyncio.timeout(SECONDS_MAX):
        while sys.modules["functions.m"].started < count:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)


# -- who may deliver ---------------------------------------------------------------------------------------------------


async def test_a_signed_delivery_runs(real: RealServer) -> None:
    reply = await deliver(real, 5)
    assert (reply.status, reply.json) == (200, {"number": 1})
    assert await kept(real) == [5]


async def test_a_delivery_that_nobody_signed_runs_nothing(real: RealServer) -> None:
    forged = {"Webhook-Signature": f"v1,{b64encode(bytes(32)).decode()}"}
    assert (await deliver(real, **forged)).refusal == (401, "AuthenticationFailed")
    assert (await real.ask("POST", "/hooks/payments", json={"amount": 5})).refusal == (401, "AuthenticationFailed")
    assert (await real.ask("POST", "/hooks/payments", data=b"{")).refusal == (401, "AuthenticationFailed")
    assert await kept(real) == []
    assert await rows(real) == []


async def test_an_old_delivery_runs_nothing(real: RealServer) -> None:
    assert (await deliver(real, age=301)).refusal == (401, "AuthenticationFailed")
    assert (await deliver(real, age=-301)).refusal == (401, "AuthenticationFailed")
    assert (await deliver(real, age=300)).status == 200
    reply = await deliver(real, **{"Webhook-Timestamp": "yesterday"})
    assert reply.refusal == (400, "InvalidArgument")
    assert await kept(real) == [5]


async def test_the_signature_stands_for_the_sender_and_no_token_is_looked_at(real: RealServer) -> None:
    assert (await deliver(real, Authorization="Basic eDp5")).status == 200
    assert (await deliver(real, delivery="msg_2", **real.token("alice"))).status == 200
    assert (await deliver(real, delivery="msg_3", Authorization="Bearer forged")).status == 200
    items = await stored(real, sys.modules["schema"].Item, "by_key")
    assert [item.note for item in items] == ["", "", ""]


async def test_a_secret_that_is_not_set_is_a_fault_of_the_server(tmp_path: Path) -> None:
    async with serve_app(tmp_path, HOOKS, settings=SETTINGS) as real:
        reply = await deliver(real, to="/hooks/unset")
        assert reply.refusal == (500, "InternalServerError")
        assert "APP_NOBODY_SET_IT" in reply.json["message"]
    async with serve_app(tmp_path, settings=SETTINGS, mode="production") as real:
        reply = await deliver(real, to="/hooks/unset")
        assert reply.refusal == (500, "InternalServerError")
        assert "APP_" not in reply.json["message"]


# -- once --------------------------------------------------------------------------------------------------------------


async def test_a_delivery_that_comes_again_is_answered_as_the_first_was_and_runs_nothing(real: RealServer) -> None:
    first = await deliver(real, 5)
    again = await deliver(real, 5)
    real.clock.advance(3_600)
    later = await deliver(real, 5)  # as senders do it: the same id, signed anew
    assert [(reply.status, reply.body) for reply in (first, again, later)] == [(200, b'{"number":1}')] * 3
    assert await kept(real) == [5]
    assert (await deliver(real, 5, delivery="msg_2")).json == {"number": 2}


async def test_the_same_delivery_at_once_runs_once(real: RealServer) -> None:
    gate = sys.modules["functions.m"].gate
    gate.clear()
    deliveries = [asyncio.create_task(deliver(real, 5)) for _ in range(5)]
    await started(real, 1)
    for _ in range(100):
        await asyncio.sleep(0)
    gate.set()
    assert {(reply.status, reply.body) for reply in await asyncio.gather(*deliveries)} == {(200, b'{"number":1}')}
    assert await kept(real) == [5]
    assert sys.modules["functions.m"].started == 1


async def test_a_delivery_goes_on_when_its_sender_hangs_up(real: RealServer) -> None:
    gate = sys.modules["functions.m"].gate
    gate.clear()
    first = asyncio.create_task(deliver(real, 5))
    await started(real, 1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gate.set()
    assert (await deliver(real, 5)).json == {"number": 1}
    assert (await kept(real), sys.modules["functions.m"].started) == ([5], 1)


async def test_an_answer_is_remembered_over_a_restart(tmp_path: Path) -> None:
    clock = ManualClock()
    async with serve_app(tmp_path, HOOKS, settings=SETTINGS, clock=clock) as real:
        assert (await deliver(real, 5)).json == {"number": 1}
    async with serve_app(tmp_path, settings=SETTINGS, clock=clock) as real:
        assert (await deliver(real, 5)).json == {"number": 1}
        assert await kept(real) == [5]


async def test_a_delivery_whose_run_was_interrupted_runs_again(tmp_path: Path) -> None:
    clock = ManualClock()
    async with serve_app(tmp_path, HOOKS, settings=SETTINGS, clock=clock) as real:
        sys.modules["functions.m"].gate.clear()
        first = asyncio.create_task(deliver(real, 5))
        await started(real, 1)
        assert await rows(real) == [(1, False)]
        await real.engine.backend.close()  # what a stop does once its time is over
        await asyncio.gather(first, return_exceptions=True)
    async with serve_app(tmp_path, settings=SETTINGS, clock=clock) as real:
        assert await rows(real) == [(1, False)]
        assert (await deliver(real, 5)).json == {"number": 1}
        assert await rows(real) == [(1, True)]


@pytest.mark.parametrize(("amount", "status"), [(0, 500), (-1, 503)])
async def test_a_delivery_that_failed_runs_again_when_it_is_sent_again(
    real: RealServer, amount: int, status: int
) -> None:
    assert [(await deliver(real, amount)).status for _ in range(2)] == [status, status]
    assert sys.modules["functions.m"].started == 2


async def test_what_the_app_refuses_stays_refused(real: RealServer) -> None:
    first, again = [await deliver(real, 13) for _ in range(2)]
    assert first.refusal == (400, "AppError")
    assert first.json["data"] == {"code": "UNLUCKY"}
    assert (again.status, again.body) == (400, first.body)
    assert sys.modules["functions.m"].started == 1


async def test_wrong_arguments_of_a_signed_delivery_are_refused_each_time(real: RealServer) -> None:
    body = b'{"amount":"5"}'
    signature = hmac.new(b"plain", body, hashlib.sha256).hexdigest()
    headers = {"X-Hub-Signature-256": f"sha256={signature}"}
    for _ in range(2):
        reply = await real.ask("POST", "/hooks/github", data=body, headers=headers)
        assert reply.refusal == (400, "InvalidArgument")
        assert "body.amount: expected int" in reply.json["message"]


async def test_without_a_signed_id_the_signature_is_what_a_delivery_is_known_by(real: RealServer) -> None:
    async def push(amount: int, delivery: str) -> Reply:
        body = json.dumps({"amount": amount}).encode()
        signature = f"sha256={hmac.new(b'plain', body, hashlib.sha256).hexdigest()}"
        headers = {"X-Hub-Signature-256": signature, "X-GitHub-Delivery": delivery}
        return await real.ask("POST", "/hooks/github", data=body, headers=headers)

    assert [(await push(5, "a")).json, (await push(5, "b")).json, (await push(6, "a")).json] == [1, 1, 2]
    assert await kept(real) == [5, 6]


async def test_an_id_is_of_one_route_only(real: RealServer) -> None:
    assert (await deliver(real, 5)).json == {"number": 1}
    assert (await deliver(real, 5, to="/hooks/other")).json == "msg_1"


# -- bounds ------------------------------------------------------------------------------------------------------------


async def test_deliveries_are_forgotten_after_their_time(real: RealServer) -> None:
    for number in range(3):
        await deliver(real, number + 1, delivery=f"msg_{number}")
    real.clock.advance(real.engine.config.limits.webhook_delivery_seconds_kept + 1)
    await deliver(real, 9, delivery="msg_new")
    assert await rows(real) == [(4, True)]


async def test_no_more_deliveries_are_remembered_than_allowed(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(UNHURRIED, webhook_delivery_count_max=3)
    async with serve_app(tmp_path, HOOKS, settings=SETTINGS, limits=limits) as real:
        for number in range(5):
            await deliver(real, number + 1, delivery=f"msg_{number}")
        assert [number for number, _ in await rows(real)] == [3, 4, 5]


async def test_an_answer_that_is_too_large_to_keep_is_refused(real: RealServer) -> None:
    reply = await deliver(real, to="/hooks/large")
    assert reply.refusal == (400, "LimitExceeded")
    assert "limits.webhook_answer_size_bytes_max" in reply.json["message"]
