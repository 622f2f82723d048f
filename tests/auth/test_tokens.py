"""Good tokens pass, forged ones do not, whatever is tried."""

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization

from engine.auth.jwks import key_set_of, parse_key_set
from engine.auth.providers import AuthProvider, FixedKeys, SharedSecret
from engine.auth.tokens import TOKEN_SIZE_BYTES_MAX, TokenVerifier
from engine.errors import AuthenticationFailed, ConfigError
from engine.testing import ManualClock
from tests.auth.issuers import (
    AUDIENCE,
    ISSUER,
    NOW,
    claims,
    encoded,
    handmade,
    jwk,
    jwks,
    private_key,
    provider,
    token,
)

SECRET = b"a secret of thirty-two bytes or more"
SECRET_ISSUER = "https://secret.example"


def verifier(*providers: AuthProvider, clock: ManualClock | None = None) -> TokenVerifier:
    with_secret = provider(
        issuer=SECRET_ISSUER, keys=SharedSecret(SECRET), algorithms=("HS256",), audiences=(AUDIENCE,)
    )
    return TokenVerifier(providers or (provider(), with_secret), clock or ManualClock())


def hs256(key: bytes, payload: dict[str, Any], **header: Any) -> str:
    """Signed by hand: PyJWT refuses to use a public key as a secret."""
    signed = f"{encoded({'alg': 'HS256', 'typ': 'JWT', **header})}.{encoded(payload)}"
    return f"{signed}.{encoded(hmac.digest(key, signed.encode(), hashlib.sha256))}"


def pem(key: str) -> bytes:
    public = private_key(key).public_key()
    encoded_pem: bytes = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded_pem


def resigned(good: str, **changes: Any) -> str:
    """Other claims under the signature of a good token."""
    header, _, signature = good.split(".")
    return f"{header}.{encoded(claims(**changes))}.{signature}"


GOOD = {
    "RS256": lambda: token("RS256"),
    "ES256": lambda: token("ES256"),
    "EdDSA": lambda: token("EdDSA"),
    "HS256 of a provider with a secret": lambda: jwt.encode(claims(iss=SECRET_ISSUER), SECRET, algorithm="HS256"),
    "HS256 with any kid": lambda: hs256(SECRET, claims(iss=SECRET_ISSUER), kid="k1"),
    "no kid where one key fits": lambda: handmade({"alg": "ES256"}, claims()),
    "an access token": lambda: token(headers={"typ": "at+jwt"}),
    "several audiences": lambda: token(aud=["other", AUDIENCE]),
    "no iat": lambda: token(iat=None),
    "expired within the leeway": lambda: token(exp=NOW - 29),
    "not yet valid within the leeway": lambda: token(nbf=NOW + 30),
    "times with fractions": lambda: token(exp=NOW + 0.5, iat=NOW - 0.5),
    "a subject with a bar, as Auth0's": lambda: token(sub="auth0|123"),
    "a subject in any script": lambda: token(sub="Алиса"),
}

FORGED: dict[str, Callable[[], str]] = {
    # -- no signature, or somebody else's
    "alg none": lambda: f"{encoded({'alg': 'none'})}.{encoded(claims())}.",
    "alg none with a signature": lambda: f"{encoded({'alg': 'none'})}.{encoded(claims())}.{encoded(b'x')}",
    "alg nOnE": lambda: f"{encoded({'alg': 'nOnE'})}.{encoded(claims())}.{encoded(b'x')}",
    "alg empty": lambda: handmade({"alg": ""}, claims()),
    "alg missing": lambda: handmade({"typ": "JWT"}, claims()),
    "alg not text": lambda: handmade({"alg": ["ES256"]}, claims()),
    "a key that is not the issuer's": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(), key="ES256-other"),
    "claims changed after signing": lambda: resigned(token(), sub="admin"),
    "signature cut off": lambda: token()[:-8],
    "signature of zeros": lambda: token().rpartition(".")[0] + "." + encoded(bytes(64)),
    "signature in DER": lambda: token().rpartition(".")[0] + "." + encoded(bytes.fromhex("3006020101020101")),
    # -- algorithms and keys mixed up
    "HS256 keyed with the RSA public key in PEM": lambda: hs256(pem("RS256"), claims(), kid="RS256"),
    "HS256 keyed with the EC public key in PEM": lambda: hs256(pem("ES256"), claims(), kid="ES256"),
    "HS256 keyed with the modulus": lambda: hs256(jwk("RS256")["n"].encode(), claims(), kid="RS256"),
    "HS256 keyed with nothing": lambda: hs256(b"", claims()),
    "HS256 with the secret of another provider": lambda: hs256(SECRET, claims()),
    "RS256 at a provider with a secret": lambda: token("RS256", iss=SECRET_ISSUER),
    "HS512 at a provider with HS256": lambda: jwt.encode(claims(iss=SECRET_ISSUER), SECRET * 2, algorithm="HS512"),
    "kid of a key of another type": lambda: token("ES256", headers={"kid": "RS256"}),
    "alg of another key type": lambda: handmade({"alg": "RS256", "kid": "ES256"}, claims()),
    "an algorithm that is not allowed here": lambda: handmade({"alg": "ES384", "kid": "ES384"}, claims(), key="ES384"),
    "RS512 by a key for RS256": lambda: jwt.encode(
        claims(), private_key("RS256"), algorithm="RS512", headers={"kid": "RS256"}
    ),
    "kid unknown": lambda: token(headers={"kid": "nobody"}),
    "kid is a path": lambda: token(headers={"kid": "../../../dev/null"}),
    "kid is SQL": lambda: token(headers={"kid": "' UNION SELECT 'key"}),
    "kid not text": lambda: handmade({"alg": "ES256", "kid": 7}, claims()),
    # -- keys and extensions that the token brings along
    "jwk embedded": lambda: token("ES256-other", headers={"jwk": jwk("ES256-other")}),
    "jwk embedded, well signed": lambda: token(headers={"jwk": jwk("ES256")}),
    "jku": lambda: token(headers={"jku": "https://evil.example/jwks.json"}),
    "x5u": lambda: token(headers={"x5u": "https://evil.example/certificate"}),
    "crit": lambda: handmade({"alg": "ES256", "kid": "ES256", "crit": ["exp"]}, claims()),
    "b64 false": lambda: handmade({"alg": "ES256", "kid": "ES256", "b64": False}, claims()),
    "a logout token": lambda: token(headers={"typ": "logout+jwt"}),
    # -- who and for whom
    "another issuer": lambda: token(iss="https://evil.example"),
    "issuer without its slash": lambda: token(iss=ISSUER.rstrip("/")),
    "issuer in other case": lambda: token(iss=ISSUER.upper()),
    "issuer missing": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(iss=None)),
    "issuer a list": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(iss=[ISSUER])),
    "another audience": lambda: token(aud="other"),
    "audience missing": lambda: token(aud=None),
    "audience that contains ours": lambda: token(aud=f"{AUDIENCE}-evil"),
    "audience an object": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(aud={AUDIENCE: 1})),
    "subject missing": lambda: token(sub=None),
    "subject empty": lambda: token(sub=""),
    "subject a number": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(sub=7)),
    "subject with a line break": lambda: token(sub="alice\nbob"),
    # -- when
    "expired": lambda: token(exp=NOW - 30),
    "no expiry": lambda: token(exp=None),
    "expiry as text": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(exp=str(NOW + 60))),
    "expiry true": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(exp=True)),
    "expiry beyond all time": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(exp=1e300)),
    "expiry negative": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(exp=-1)),
    "not yet valid": lambda: token(nbf=NOW + 31),
    "issued in the future": lambda: token(iat=NOW + 31),
    "nbf as text": lambda: handmade({"alg": "ES256", "kid": "ES256"}, claims(nbf="now")),
    # -- not a token at all
    "empty": lambda: "",
    "words": lambda: "let me in",
    "two parts": lambda: ".".join(token().split(".")[:2]),
    "four parts": lambda: token() + ".x",
    "five parts, as an encrypted token": lambda: "a.b.c.d.e",
    "a space after it": lambda: token() + " ",
    "a line break after it": lambda: token() + "\n",
    "padding": lambda: token() + "==",
    "letters outside of base64url": lambda: token().replace(".", "+.", 1),
    "characters outside of ASCII": lambda: token() + "é",
    "a lone surrogate": lambda: token() + "\ud800",
    "header not JSON": lambda: handmade(b"{", claims()),
    "header a list": lambda: handmade(["alg", "ES256"], claims()),
    "payload not JSON": lambda: handmade({"alg": "ES256", "kid": "ES256"}, b"sub=alice"),
    "payload a list": lambda: handmade({"alg": "ES256", "kid": "ES256"}, [claims()]),
    "payload not UTF-8": lambda: handmade({"alg": "ES256", "kid": "ES256"}, b'{"sub":"\xff"}'),
    "payload nested too deep": lambda: handmade({"alg": "ES256", "kid": "ES256"}, b"[" * 5_000),
    "issuer nested deep": lambda: handmade({"alg": "ES256"}, b'{"iss":' + b"[" * 900 + b"]" * 900 + b"}"),
    "expiry of 5,000 digits": lambda: handmade({"alg": "ES256"}, b'{"iss":"x","exp":' + b"9" * 5_000 + b"}"),
    "claims nested deep": lambda: token(roles=[[[[[[[[[[[[[[[[["admin"]]]]]]]]]]]]]]]]]),
    "a NUL in a claim": lambda: token(role="\0absent"),
    "larger than a token may be": lambda: token(padding="x" * TOKEN_SIZE_BYTES_MAX),
}


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(FORGED) >= 40
    assert len(GOOD) >= 6


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
async def test_a_good_token_gives_its_identity(make: Callable[[], str]) -> None:
    good = make()
    payload = jwt.decode(good, options={"verify_signature": False})
    verified = await verifier().verify(good)
    assert verified.identity is not None
    assert verified.identity.token_identifier == f"{payload['iss']}|{payload['sub']}"
    assert not verified.is_admin


@pytest.mark.parametrize("make", FORGED.values(), ids=FORGED.keys())
async def test_a_forged_token_is_refused(make: Callable[[], str]) -> None:
    forged, checks = make(), verifier()
    for _ in range(2):  # the second time is no easier
        with pytest.raises(AuthenticationFailed) as refusal:
            await checks.verify(forged)
        message = str(refusal.value)
        assert message.isprintable()
        assert len(message) < 400
        assert len(forged) < 20 or forged not in message


async def test_the_identity_has_the_claims_of_the_user_but_not_those_of_one_token() -> None:
    checks = verifier()
    first = await checks.verify(token(role="admin", groups=["a"], jti="1", nonce="n"))
    refreshed = await checks.verify(token(role="admin", groups=["a"], jti="2", iat=NOW - 5, exp=NOW + 4_000))
    assert first.identity == refreshed.identity
    assert first.identity is not None
    assert first.identity.claims == {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "role": "admin", "groups": ["a"]}


async def test_the_identity_ends_with_the_leeway_after_the_expiry() -> None:
    clock = ManualClock()
    checks, good = verifier(clock=clock), token(exp=NOW + 60)
    verified = await checks.verify(good)
    assert verified.expires_at_ms == (NOW + 90) * 1_000
    clock.advance(89)
    assert await checks.verify(good) == verified
    clock.advance(1)
    with pytest.raises(AuthenticationFailed, match="expired 30 s ago"):
        await checks.verify(good)


async def test_a_cached_token_is_checked_against_a_clock_that_was_set_back() -> None:
    clock = ManualClock()
    checks, good = verifier(clock=clock), token(iat=NOW)
    await checks.verify(good)
    clock.set_wall((NOW - 60) * 1_000)
    with pytest.raises(AuthenticationFailed, match="valid in 60 s only"):
        await checks.verify(good)


async def test_a_token_seen_before_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, good = verifier(), token()
    first = await checks.verify(good)
    monkeypatch.setattr(jwt.PyJWS, "decode", None)
    assert await checks.verify(good) is first


async def test_tokens_are_kept_until_they_expire() -> None:
    clock = ManualClock()
    checks = verifier(clock=clock)
    for number in range(5):
        await checks.verify(token(exp=NOW + 60, jti=str(number)))
    assert len(checks._cache) == 5
    clock.advance(90)
    await checks.verify(token(iat=NOW + 90, exp=NOW + 150))
    assert len(checks._cache) == 1


async def test_two_providers_of_one_issuer_are_told_apart_by_audience() -> None:
    checks = verifier(provider("ES256", audiences=("web",)), provider("EdDSA", audiences=("phone", "tablet")))
    assert (await checks.verify(token("ES256", aud="web"))).identity is not None
    assert (await checks.verify(token("EdDSA", aud="tablet"))).identity is not None
    with pytest.raises(AuthenticationFailed, match=r"may use|is not one of the issuer's"):
        await checks.verify(token("ES256", aud="phone"))


async def test_without_a_kid_the_keys_of_the_algorithm_are_tried_but_not_many() -> None:
    entries = [jwk("ES256-old", kid=None), jwk("ES256", kid=None)]
    without_kid = handmade({"alg": "ES256"}, claims())
    few = provider(keys=FixedKeys(key_set_of({"keys": entries})))
    assert (await verifier(few).verify(without_kid)).identity is not None
    many = provider(keys=FixedKeys(key_set_of({"keys": entries * 3})))
    with pytest.raises(AuthenticationFailed, match="is not one of the issuer's"):
        await verifier(many).verify(without_kid)


async def test_a_key_for_one_algorithm_does_not_serve_another_of_its_type() -> None:
    of_rs256 = jwt.encode(claims(), private_key("RS256"), algorithm="RS512", headers={"kid": "RS256"})
    with pytest.raises(AuthenticationFailed, match="is not one of the issuer's"):
        await verifier(provider("RS256", algorithms=("RS256", "RS512"))).verify(of_rs256)


async def test_no_provider_trusts_nobody() -> None:
    with pytest.raises(AuthenticationFailed, match=r"not among the \[\[auth.providers\]\]"):
        await TokenVerifier((), ManualClock()).verify(token())


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (jwk("RS256", kty="EC"), "kty"),
        (jwk("ES256", alg="RS256"), "alg 'RS256'"),
        (jwk("ES256", alg="none"), "alg 'none'"),
        (jwk("ES256", use="enc"), "not for signatures"),
        (jwk("ES256", key_ops=["sign"]), "not for signatures"),
        (jwk("ES256", d="c2VjcmV0"), "it is secret"),
        ({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}, "it is secret"),
        (jwk("ES256", kid=7), "kid is not text"),
        (jwk("ES256", x="AAAA"), "key 'ES256'"),
        (jwk("ES256", crv="secp256k1"), "crv 'secp256k1'"),
        ({**jwk("RS256"), "n": "sXch"}, "key 'RS256'"),
        ("a key", "expected an object"),
    ],
)
def test_a_key_that_is_not_for_this_is_left_out_and_says_why(entry: object, reason: str) -> None:
    key_set = key_set_of({"keys": [entry, jwk("EdDSA")]})
    assert [key.kid for key in key_set.keys] == ["EdDSA"]
    assert reason in key_set.refused[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"keys": {}}', "[" * 100_000, b"\xff"])
def test_what_is_no_key_set_is_refused_whole(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"not JSON|not a JWKS"):
        parse_key_set(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"issuer": ""}, "issuer"),
        ({"issuer": "https://a|b"}, "issuer"),
        ({"audiences": ()}, "audience"),
        ({"algorithms": ("none",)}, "algorithms"),
        ({"algorithms": ("HS256",)}, "algorithms"),
        ({"algorithms": ()}, "algorithms"),
        ({"keys": SharedSecret(SECRET), "algorithms": ("RS256",)}, "algorithms"),
        ({"keys": SharedSecret(SECRET[:31]), "algorithms": ("HS256",)}, "secret = .31 bytes."),
    ],
)
def test_a_provider_that_could_be_forged_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        provider(**changes)
    assert SECRET[:31].decode() not in str(refusal.value)


def test_all_algorithms_of_a_key_set_are_those_of_its_keys() -> None:
    by_kid = {key.kid: key.algorithms for key in key_set_of(jwks("RS256", "ES384")).keys}
    assert by_kid == {"RS256": {"RS256"}, "ES384": {"ES384"}}
    (any_rsa,) = key_set_of({"keys": [jwk("RS256", alg=None)]}).keys
    assert any_rsa.algorithms == {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
