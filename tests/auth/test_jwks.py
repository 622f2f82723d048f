"""Keys that an issuer publishes: kept, asked for again, rotated, and fetched within bounds."""

import asyncio
import json
import logging
from typing import Any

import pytest

from engine.auth import jwks as subject
from engine.auth.fetching import FetchRefused
from engine.auth.jwks import RemoteKeySource
from engine.auth.providers import RemoteKeys
from engine.auth.tokens import TokenVerifier
from engine.errors import AuthenticationFailed
from engine.testing import ManualClock
from tests.auth.issuers import jwks, provider, token

URL = "https://login.example/jwks.json"
MINUTE, HOUR = 60, 3_600


class Issuer:
    """What stands at the address; counts who asks."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.asked_count = 0
        self.is_down = False
        self.answers = asyncio.Event()  # a fetch waits for it
        self.answers.set()

    async def fetch(self, url: str) -> bytes:
        assert url == URL
        self.asked_count += 1
        await self.answers.wait()
        if self.is_down:
            raise FetchRefused("status 503, expected 200")
        return json.dumps(jwks(*self.names)).encode()


def verifier(issuer: Issuer, clock: ManualClock, count: int = 1) -> TokenVerifier:
    """One that trusts `count` providers which publish at the same address."""
    remote = RemoteKeys(URL, is_private_network_allowed=False)
    providers = [provider(keys=remote, audiences=("app", f"app-{index}")) for index in range(count)]
    return TokenVerifier(providers, clock, fetch=lambda keys: issuer.fetch)


async def is_accepted(checks: TokenVerifier, credential: str) -> bool:
    try:
        await checks.verify(credential)
    except AuthenticationFailed:
        return False
    return True


def long_token(key: str, **changes: Any) -> str:
    return token(key, exp=ManualClock().wall_ns() // 1_000_000_000 + 100 * HOUR, **changes)


async def test_keys_are_fetched_at_the_first_token_and_again_after_ten_minutes() -> None:
    issuer, clock = Issuer("ES256"), ManualClock()
    checks = verifier(issuer, clock, count=2)
    assert issuer.asked_count == 0
    for _ in range(3):
        assert await is_accepted(checks, long_token("ES256"))
        clock.advance(5 * MINUTE)
    assert issuer.asked_count == 1
    clock.advance(1)
    assert await is_accepted(checks, long_token("ES256"))
    assert issuer.asked_count == 2


async def test_rotation_fails_no_log_in() -> None:
    issuer, clock = Issuer("ES256-1"), ManualClock()
    checks = verifier(issuer, clock)
    for generation in range(1, 6):
        old, new = f"ES256-{generation}", f"ES256-{generation + 1}"
        assert await is_accepted(checks, long_token(old, jti=str(generation)))
        issuer.names = (old, new)
        clock.advance(31)
        assert await is_accepted(checks, long_token(new))  # unknown here: asked for at once
        assert await is_accepted(checks, long_token(old))
        issuer.names = (new,)
        clock.advance(10 * MINUTE + 1)
        assert not await is_accepted(checks, long_token(old)), "its key was withdrawn, though the token was seen before"
    assert issuer.asked_count == 11


async def test_unknown_kids_cannot_flood_the_issuer() -> None:
    issuer, clock = Issuer("ES256"), ManualClock()
    checks = verifier(issuer, clock, count=2)
    assert await is_accepted(checks, long_token("ES256"))
    for number in range(40):
        clock.advance(1)
        assert not await is_accepted(checks, long_token("ES256", jti=str(number), aud=f"app-{number % 2}") + "x")
        assert not await is_accepted(checks, token("ES256-other"))
    assert issuer.asked_count == 2


async def test_the_last_good_keys_serve_for_a_day_while_the_issuer_is_down(caplog: pytest.LogCaptureFixture) -> None:
    issuer, clock = Issuer("ES256"), ManualClock()
    checks = verifier(issuer, clock)
    assert await is_accepted(checks, long_token("ES256"))
    issuer.is_down = True
    clock.advance(24 * HOUR)
    with caplog.at_level(logging.WARNING, "engine.auth"):
        assert await is_accepted(checks, long_token("ES256"))
    assert "status 503" in caplog.text
    clock.advance(1)
    with pytest.raises(AuthenticationFailed, match="cannot be fetched at the moment"):
        await checks.verify(long_token("ES256"))
    issuer.is_down = False
    clock.advance(5)
    assert await is_accepted(checks, long_token("ES256"))


async def test_an_issuer_that_is_down_is_asked_each_five_seconds_at_most() -> None:
    issuer, clock = Issuer("ES256"), ManualClock()
    issuer.is_down = True
    checks = verifier(issuer, clock)
    for _ in range(10):
        assert not await is_accepted(checks, token("ES256"))
        clock.advance(1)
    assert issuer.asked_count == 2


async def test_an_answer_without_a_usable_key_does_not_replace_the_last_good_one() -> None:
    issuer, clock = Issuer("ES256"), ManualClock()
    checks = verifier(issuer, clock)
    assert await is_accepted(checks, long_token("ES256"))
    issuer.names = ()
    clock.advance(11 * MINUTE)
    assert await is_accepted(checks, long_token("ES256"))


async def test_many_tokens_at_once_cause_one_fetch_and_none_depends_on_another() -> None:
    issuer, clock = Issuer("ES256"), ManualClock()
    issuer.answers.clear()
    checks = verifier(issuer, clock)
    waiting = [asyncio.create_task(checks.verify(token("ES256", jti=str(number)))) for number in range(20)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    issuer.answers.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert not any(isinstance(result, BaseException) for result in results[1:])
    assert issuer.asked_count == 1


async def test_closing_gives_up_a_fetch() -> None:
    issuer = Issuer("ES256")
    issuer.answers.clear()
    checks = verifier(issuer, ManualClock())
    waiting = asyncio.create_task(checks.verify(token("ES256")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    checks.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_an_error_of_ours_in_a_fetch_is_not_hidden() -> None:
    async def broken(url: str) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await RemoteKeySource(URL, ManualClock(), broken).current()


def test_bounds_are_those_that_are_promised() -> None:
    assert (subject.FRESH_SECONDS, subject.UNKNOWN_KID_SECONDS, subject.LAST_GOOD_SECONDS) == (600, 30, 86_400)
