"""The local issuer: any made-up user, but only for this machine."""

import stat
from pathlib import Path

import jwt
import pytest

from engine.auth.development import (
    DEVELOPMENT_ISSUER,
    DevelopmentIssuer,
    TokenRequest,
    key_path_of,
    may_issue,
    parse_token_request,
)
from engine.auth.tokens import TokenVerifier
from engine.errors import AuthenticationFailed, ConfigError, Forbidden, InvalidArgument
from engine.testing import ManualClock

LOCAL = {"Host": "127.0.0.1:3210"}


async def test_a_made_up_user_signs_in(tmp_path: Path) -> None:
    clock = ManualClock()
    issuer = DevelopmentIssuer.open(tmp_path / "engine.db", clock)
    token = issuer.issue(TokenRequest("alice", "Alice", {"role": "admin"}))
    verified = await TokenVerifier([issuer.provider], clock).verify(token)
    assert verified.identity is not None
    assert verified.identity.token_identifier == f"{DEVELOPMENT_ISSUER}|alice"
    assert verified.identity.claims["name"] == "Alice"
    assert verified.identity.claims["role"] == "admin"
    payload = jwt.decode(token, options={"verify_signature": False})
    assert payload["exp"] - payload["iat"] == 3_600


async def test_a_token_outlives_a_restart_but_not_another_database(tmp_path: Path) -> None:
    clock = ManualClock()
    first = DevelopmentIssuer.open(tmp_path / "a" / "engine.db", clock)
    again = DevelopmentIssuer.open(tmp_path / "a" / "engine.db", clock)
    other = DevelopmentIssuer.open(tmp_path / "b" / "engine.db", clock)
    token = first.issue(TokenRequest("alice"))
    await TokenVerifier([again.provider], clock).verify(token)
    with pytest.raises(AuthenticationFailed, match="signature is wrong"):
        await TokenVerifier([other.provider], clock).verify(token)


def test_only_the_owner_reads_the_key(tmp_path: Path) -> None:
    DevelopmentIssuer.open(tmp_path / "engine.db", ManualClock())
    path = key_path_of(tmp_path / "engine.db")
    assert path.name == "engine.db.development-key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_key_says_what_to_do(tmp_path: Path) -> None:
    path = key_path_of(tmp_path / "engine.db")
    path.write_text("not a key")
    with pytest.raises(ConfigError, match="Delete the file"):
        DevelopmentIssuer.open(tmp_path / "engine.db", ManualClock())


@pytest.mark.parametrize("subject", ["", "a\nb", "x" * 257])
def test_a_subject_that_no_token_may_have_is_refused(tmp_path: Path, subject: str) -> None:
    with pytest.raises(InvalidArgument, match="subject"):
        DevelopmentIssuer.open(tmp_path / "engine.db", ManualClock()).issue(TokenRequest(subject))


@pytest.mark.parametrize("claim", ["iss", "sub", "aud", "exp", "iat", "nbf"])
def test_the_claims_of_the_issuer_cannot_be_chosen(tmp_path: Path, claim: str) -> None:
    with pytest.raises(InvalidArgument, match=claim):
        DevelopmentIssuer.open(tmp_path / "engine.db", ManualClock()).issue(TokenRequest("alice", claims={claim: 1}))


def test_a_request_needs_a_subject_only() -> None:
    assert parse_token_request(b'{"subject": "alice"}') == TokenRequest("alice")


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"subject": 1}', b'{"subject": "a", "admin": true}', b"[" * 9_999]
)
def test_a_request_that_is_wrong_shows_a_right_one(body: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r'Send {"subject": "alice"'):
        parse_token_request(body)


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["127.0.0.1:3210", "localhost:3210", "[::1]:3210", "app.localhost"])
@pytest.mark.parametrize("origin", [None, "http://localhost:5173", "http://127.0.0.1:3210"])
def test_this_machine_may_ask(peer: str, host: str, origin: str | None) -> None:
    may_issue(peer, {"Host": host, **({} if origin is None else {"Origin": origin})})


@pytest.mark.parametrize(
    ("peer", "headers", "reason"),
    [
        (None, LOCAL, "this machine only"),
        ("192.168.1.20", LOCAL, "this machine only"),
        ("::ffff:10.0.0.1", LOCAL, "this machine only"),
        ("127.0.0.1", {**LOCAL, "X-Forwarded-For": "127.0.0.1"}, "proxy"),
        ("127.0.0.1", {**LOCAL, "Forwarded": "for=127.0.0.1"}, "proxy"),
        ("127.0.0.1", {}, "http://127.0.0.1"),
        ("127.0.0.1", {"Host": "rebound.evil.example:3210"}, "http://127.0.0.1"),
        ("127.0.0.1", {"Host": "localhost.evil.example"}, "http://127.0.0.1"),
        ("127.0.0.1", {"Host": "["}, "http://127.0.0.1"),
        ("127.0.0.1", {**LOCAL, "Origin": "https://evil.example"}, "A page of"),
        ("127.0.0.1", {**LOCAL, "Origin": "https://localhost.evil.example"}, "A page of"),
        ("127.0.0.1", {**LOCAL, "Origin": "null"}, "A page of"),
        ("127.0.0.1", {**LOCAL, "Origin": "http://["}, "A page of"),
    ],
)
def test_others_may_not(peer: str | None, headers: dict[str, str], reason: str) -> None:
    with pytest.raises(Forbidden, match=reason):
        may_issue(peer, headers)
