"""Whom this engine trusts to say who a caller is.

Invariants
  1. An algorithm belongs to one kind of key; `none` belongs to no kind, so it cannot be configured or matched.
  2. A provider has either public keys or a shared secret, never both: a public key is never an HMAC secret.
  3. An issuer holds no `|`, so `issuer|subject` reads back in one way (subjects may hold it: Auth0's do).

`config` builds these from `[[auth.providers]]`, `tokens` uses them.
"""

from collections.abc import Iterable

import msgspec

from engine.auth.jwks import ALGORITHMS_OF_PUBLIC_KEYS, KeySet
from engine.errors import ConfigError

DEFAULT_ALGORITHMS = ("RS256", "ES256", "EdDSA")
HMAC_ALGORITHM = "HS256"
SECRET_SIZE_BYTES_MIN = 32  # RFC 7518 section 3.2: as long as the hash


class FixedKeys(msgspec.Struct, frozen=True, tag=True):
    """Public keys that stand in the configuration or in a file beside it."""

    key_set: KeySet


class RemoteKeys(msgspec.Struct, frozen=True, tag=True):
    """Public keys that the issuer publishes."""

    url: str
    is_private_network_allowed: bool  # else an address inside a private network is refused (SSRF)


class SharedSecret(msgspec.Struct, frozen=True, tag=True):
    """A secret that issuer and engine share (HS256)."""

    secret: bytes

    def __repr__(self) -> str:
        return "SharedSecret(…)"


class AuthProvider(msgspec.Struct, frozen=True, kw_only=True):
    """One issuer, and what its tokens must look like."""

    issuer: str  # equals the claim `iss` to the letter
    audiences: tuple[str, ...]  # the claim `aud` must name one of them
    keys: FixedKeys | RemoteKeys | SharedSecret
    algorithms: tuple[str, ...] = DEFAULT_ALGORITHMS

    def __post_init__(self) -> None:
        if not self.issuer or "|" in self.issuer or not self.issuer.isprintable():
            raise ConfigError(f"issuer = {self.issuer!r}: expected the issuer's `iss` to the letter, without `|`")  # 3
        if not self.audiences or not all(self.audiences):
            raise ConfigError("audience = nothing: expected the `aud` that the issuer writes for this app")
        _check_algorithms(self.algorithms, is_secret=isinstance(self.keys, SharedSecret))
        if isinstance(self.keys, SharedSecret) and len(self.keys.secret) < SECRET_SIZE_BYTES_MIN:
            raise ConfigError(
                f"secret = ({len(self.keys.secret)} bytes): expected at least {SECRET_SIZE_BYTES_MIN} random bytes"
            )


def _check_algorithms(algorithms: Iterable[str], *, is_secret: bool) -> None:
    known = (HMAC_ALGORITHM,) if is_secret else tuple(ALGORITHMS_OF_PUBLIC_KEYS)
    wrong = [algorithm for algorithm in algorithms if algorithm not in known]
    if wrong or not algorithms:  # 1, 2
        reason = "with `secret`" if is_secret else "with `jwks`"
        raise ConfigError(f"algorithms = {list(algorithms)!r}: expected some of {', '.join(known)} {reason}")
