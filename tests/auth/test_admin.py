"""Admin keys, the `Authorization` header, and acting as somebody."""

import base64
import json
from typing import Any

import pytest

from engine.auth.admin import (
    AdminKeys,
    Authenticator,
    digest_of,
    make_admin_key,
    parse_admin_key,
    parse_authorization,
)
from engine.auth.tokens import TokenVerifier, Verified
from engine.errors import AuthenticationFailed
from engine.identity import Identity
from engine.sync.backend import AdminKey
from engine.testing import ManualClock
from tests.auth.issuers import provider, token

KEY = make_admin_key(ManualClock())
OTHER = make_admin_key(ManualClock(seed=1))
ALICE = {"issuer": "https://i.example", "subject": "alice"}


def authenticator(*keys: str) -> Authenticator:
    admin_keys = AdminKeys(digest_of(key) for key in keys or (KEY,))
    return Authenticator(TokenVerifier([provider()], ManualClock()), admin_keys)


async def verified_header(header: str, *keys: str) -> Verified:
    return await authenticator(*keys).authenticate(parse_authorization(header))


def encoded(attributes: object) -> str:
    return base64.b64encode(json.dumps(attributes).encode()).decode()


def test_a_key_has_256_bits_and_a_prefix_that_scanners_know() -> None:
    assert KEY.startswith("adm_")
    assert len(base64.urlsafe_b64decode(KEY.removeprefix("adm_") + "=")) == 32
    assert KEY != OTHER


async def test_only_a_token_that_was_checked_before_is_known() -> None:
    checks, good = authenticator(), token()
    header = f"Bearer {good}"
    assert checks.known(header) is None
    verified = await checks.authenticate(parse_authorization(header))
    assert checks.known(header) is verified
    others = [f"Bearer {good}x", f"Bearer {good[:-1]}", f"bearer {good}", good, f"Convex {KEY}", "", "Bearer \udc80"]
    assert [checks.known(other) for other in others] == [None] * len(others)


async def test_while_keys_rotate_both_are_accepted() -> None:
    for key in (KEY, OTHER):
        verified = await verified_header(f"Convex {key}", KEY, OTHER)
        assert (verified.is_admin, verified.identity, verified.expires_at_ms) == (True, None, None)


@pytest.mark.parametrize("key", ["", "adm_", KEY[:-1], KEY + "=", KEY.lower(), digest_of(KEY), OTHER, "é", "\ud800"])
async def test_any_other_key_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(AuthenticationFailed) as refusal:
        await authenticator().authenticate(AdminKey(key, None))
    assert len(key) < 5 or key not in str(refusal.value)


async def test_without_keys_nobody_is_admin() -> None:
    with pytest.raises(AuthenticationFailed):
        AdminKeys(()).verify("")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
async def test_a_bearer_is_a_user(scheme: str) -> None:
    verified = await verified_header(f"{scheme} {token()}")
    assert verified.identity is not None
    assert verified.identity.subject == "alice"
    assert not verified.is_admin


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Basic YWxpY2U6cHc=", KEY, f"Bearer {KEY}", f"Convex {token()}", "x" * 99_999]
)
async def test_any_other_header_is_refused(header: str) -> None:
    with pytest.raises(AuthenticationFailed):
        await verified_header(header)


@pytest.mark.parametrize("name", ["", "happy-otter-1|", "prod:happy-otter-1|", "preview:team:project|"])
async def test_an_admin_acts_as_a_user(name: str) -> None:
    verified = await verified_header(f"convex {name}{KEY}:{encoded(ALICE)}")
    assert verified.is_admin
    assert verified.identity == Identity(
        subject="alice", issuer="https://i.example", claims={"iss": "https://i.example", "sub": "alice"}
    )


@pytest.mark.parametrize(
    ("attributes", "claims"),
    [
        ({"tokenIdentifier": "https://i.example|alice"}, {}),
        ({**ALICE, "name": "Alice", "email": "a@b.c"}, {"name": "Alice", "email": "a@b.c"}),
        ({**ALICE, "givenName": "A", "emailVerified": True}, {"given_name": "A", "email_verified": True}),
        ({**ALICE, "role": ["admin"], "tokenIdentifier": "x|y"}, {"role": ["admin"]}),
    ],
)
async def test_attributes_become_the_claims_of_a_token(attributes: dict[str, Any], claims: dict[str, Any]) -> None:
    identity = (await authenticator().authenticate(AdminKey(KEY, attributes))).identity
    assert identity is not None
    assert identity.token_identifier == "https://i.example|alice"
    assert identity.claims == {"iss": "https://i.example", "sub": "alice", **claims}


@pytest.mark.parametrize(
    "attributes", [{}, {"issuer": "i"}, {"subject": "s"}, {"tokenIdentifier": "i"}, {**ALICE, "subject": 7}]
)
async def test_attributes_that_name_nobody_are_refused(attributes: dict[str, Any]) -> None:
    with pytest.raises(AuthenticationFailed, match="To act as a user"):
        await authenticator().authenticate(AdminKey(KEY, attributes))


@pytest.mark.parametrize("identity", ["", "!", "e30", encoded([]), encoded("alice"), "/w==", encoded(ALICE)[:-3]])
def test_an_identity_that_cannot_be_read_is_refused(identity: str) -> None:
    with pytest.raises(AuthenticationFailed, match="The identity after the admin key"):
        parse_admin_key(f"{KEY}:{identity}")


async def test_the_key_is_checked_before_whom_it_acts_as_is_believed() -> None:
    with pytest.raises(AuthenticationFailed, match="The admin key"):
        await verified_header(f"Convex {OTHER}:{encoded(ALICE)}")
