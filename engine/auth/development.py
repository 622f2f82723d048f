"""A local issuer, so that made-up users can sign in while an app is being written.

Invariants
  1. The private key stays in one file beside the database (mode 0600); it survives restarts, and tokens with it.
  2. Who may ask for a token is decided by `may_issue`: the peer and the host it asked for are loopback, no proxy stands
     between, and a web page that asks is itself served from loopback.

`engine dev` opens it; a served engine neither makes the key nor trusts it.
"""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.auth.jwks import key_set_of
from engine.auth.providers import AuthProvider, FixedKeys
from engine.clock import Clock
from engine.errors import ConfigError, Forbidden, InvalidArgument

DEVELOPMENT_ISSUER = "https://development.localhost"  # stays the same whatever the port: users are stored under it
DEVELOPMENT_AUDIENCE = "development"
TOKEN_SECONDS = 3_600
_SUBJECT_LENGTH_MAX = 256
_RESERVED_CLAIMS = frozenset(("iss", "sub", "aud", "exp", "iat", "nbf"))


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /dev/token`."""

    subject: str
    name: str | None = None
    claims: dict[str, Any] = {}


class DevelopmentIssuer:
    """Signs tokens for any subject with a key of its own."""

    def __init__(self, private_key: Ed25519PrivateKey, clock: Clock) -> None:
        self._private_key, self._clock = private_key, clock
        public = jwt.algorithms.OKPAlgorithm.to_jwk(private_key.public_key(), as_dict=True)
        self.provider = AuthProvider(
            issuer=DEVELOPMENT_ISSUER,
            audiences=(DEVELOPMENT_AUDIENCE,),
            keys=FixedKeys(key_set_of({"keys": [{**public, "alg": "EdDSA", "use": "sig"}]})),
            algorithms=("EdDSA",),
        )

    @classmethod
    def open(cls, database: Path, clock: Clock) -> "DevelopmentIssuer":
        """With the key beside the database, which is made if it is not there."""
        path = key_path_of(database)
        try:
            pem = path.read_bytes()
        except FileNotFoundError:
            pem = _write_new_key(path)
        try:
            private_key = serialization.load_pem_private_key(pem, password=None)
        except ValueError as cause:
            raise ConfigError(f"{path}: not a private key. Delete the file: `engine dev` makes a new one.") from cause
        if not isinstance(private_key, Ed25519PrivateKey):
            raise ConfigError(f"{path}: not an Ed25519 key. Delete the file: `engine dev` makes a new one.")
        return cls(private_key, clock)

    def issue(self, request: TokenRequest) -> str:
        """A token for one hour; official clients refresh it by its `iat` and `exp`."""
        subject = request.subject
        if not subject or len(subject) > _SUBJECT_LENGTH_MAX or not subject.isprintable():
            raise InvalidArgument(
                f"subject: expected 1 to {_SUBJECT_LENGTH_MAX} printable characters, got {subject[:80]!r}"
            )
        reserved = _RESERVED_CLAIMS.intersection(request.claims)
        if reserved:
            raise InvalidArgument(f"claims: {', '.join(sorted(reserved))} are set by the issuer")
        now = self._clock.wall_ns() // 1_000_000_000
        claims = {
            **({} if request.name is None else {"name": request.name}),
            **request.claims,
            "iss": DEVELOPMENT_ISSUER,
            "sub": subject,
            "aud": DEVELOPMENT_AUDIENCE,
            "iat": now,
            "exp": now + TOKEN_SECONDS,
        }
        return jwt.encode(claims, self._private_key, algorithm="EdDSA")


def key_path_of(database: Path) -> Path:
    return database.with_name(f"{database.name}.development-key")


def _write_new_key(path: Path) -> bytes:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # 1
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    return pem


def parse_token_request(body: bytes) -> TokenRequest:
    try:
        return msgspec.json.decode(body, type=TokenRequest)
    except (msgspec.DecodeError, RecursionError) as cause:
        raise InvalidArgument(
            f'{cause}. Send {{"subject": "alice", "name": "Alice", "claims": {{}}}}; only subject is needed.'
        ) from cause


def may_issue(peer: str | None, headers: Mapping[str, str]) -> None:
    """Raises `Forbidden` unless the request comes from this machine, and not from a page of somewhere else (2)."""
    if peer is None or not _is_loopback(peer):
        raise Forbidden("Development tokens are handed out on this machine only.")
    if any(name in headers for name in ("Forwarded", "X-Forwarded-For", "X-Real-IP")):
        raise Forbidden("Development tokens are not handed out through a proxy.")
    if not _is_loopback(_host_of(f"//{headers.get('Host', '')}")):  # a name rebound to 127.0.0.1
        raise Forbidden("Ask for development tokens at http://127.0.0.1 or http://localhost.")
    origin = headers.get("Origin")
    if origin is not None and not _is_loopback(_host_of(origin)):
        raise Forbidden(f"A page of {origin[:80]} may not ask for development tokens; one served from localhost may.")


def _host_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
