"""An issuer for the tests: keys of every kind, made once, and tokens as good or as bad as asked for."""

import json
from base64 import urlsafe_b64encode
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from engine.auth.jwks import key_set_of
from engine.auth.providers import AuthProvider, FixedKeys
from engine.testing import ManualClock

ISSUER, AUDIENCE = "https://login.example/", "app"
NOW = ManualClock().wall_ns() // 1_000_000_000


@cache
def private_key(name: str) -> Any:
    """A private key by the name of its algorithm, with a suffix for another of its kind: "RS256", "RS256-new"."""
    match name.split("-")[0]:
        case "RS256":
            return rsa.generate_private_key(public_exponent=65537, key_size=2048)
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case "ES384":
            return ec.generate_private_key(ec.SECP384R1())
        case "EdDSA":
            return ed25519.Ed25519PrivateKey.generate()
        case _:
            raise ValueError(name)


def jwk(name: str, **changes: Any) -> dict[str, Any]:
    """The public half as a JWK whose `kid` is the name; a change to None leaves the member out."""
    algorithm = jwt.get_algorithm_by_name(name.split("-")[0])
    public = algorithm.to_jwk(private_key(name).public_key(), as_dict=True)
    entry = {**public, "kid": name, "alg": name.split("-")[0], "use": "sig", **changes}
    return {member: value for member, value in entry.items() if value is not None}


def jwks(*names: str) -> dict[str, Any]:
    return {"keys": [jwk(name) for name in names]}


def provider(*names: str, **changes: Any) -> AuthProvider:
    parts: dict[str, Any] = {
        "issuer": ISSUER,
        "audiences": (AUDIENCE,),
        "keys": FixedKeys(key_set_of(jwks(*(names or ("RS256", "ES256", "EdDSA"))))),
    }
    return AuthProvider(**{**parts, **changes})


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a good token; a change to None leaves the claim out."""
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": NOW, "exp": NOW + 3_600, **changes}
    return {name: value for name, value in good.items() if value is not None}


def token(key: str = "ES256", *, headers: dict[str, Any] | None = None, **changes: Any) -> str:
    """A token signed by the key of that name; `changes` are to its claims."""
    algorithm = key.split("-")[0]
    return jwt.encode(claims(**changes), private_key(key), algorithm=algorithm, headers={"kid": key, **(headers or {})})


def encoded(part: object) -> str:
    """One part of a token; bytes as they are, anything else as JSON."""
    content = part if isinstance(part, bytes) else json.dumps(part).encode()
    return urlsafe_b64encode(content).rstrip(b"=").decode()


def handmade(header: object, payload: object, *, key: str = "ES256") -> str:
    """A token with any header and payload, signed well by the key."""
    algorithm = jwt.get_algorithm_by_name(key.split("-")[0])
    signed = f"{encoded(header)}.{encoded(payload)}"
    return f"{signed}.{encoded(algorithm.sign(signed.encode(), private_key(key)))}"
