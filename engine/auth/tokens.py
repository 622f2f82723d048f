"""From a signed token (JWT) to a verified identity.

Invariants
  1. Nothing of a token is believed before its signature is checked by a key of the provider that its `iss` names;
     before that, `iss`, `aud`, `alg` and `kid` only choose among what is configured.
  2. `alg` is one of the provider's, and the key is chosen by kid and algorithm and key type together.
  3. Times are checked by the engine's clock, with 30 seconds of leeway for the issuer's.
  4. A token is not kept: the cache is keyed by its digest, and an entry counts only while the provider still
     publishes the key that signed it and the token has not expired.

Signatures are PyJWT's: a small, well-kept library with no dependency beyond `cryptography`; Authlib and joserfc bring
OAuth or all of JOSE along. Its checks of time and audience are not used: they read the machine's clock.

Checking a token takes about 0.1 ms whatever the algorithm, on the loop; one seen before takes 2 µs.
"""

import binascii
import hashlib
import re
from base64 import urlsafe_b64decode
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, assert_never

import jwt
import msgspec

from engine.auth.jwks import (
    ALGORITHMS_OF_PUBLIC_KEYS,
    Fetch,
    FixedKeySource,
    Key,
    KeySet,
    KeySource,
    RemoteKeySource,
)
from engine.auth.providers import HMAC_ALGORITHM, AuthProvider, FixedKeys, RemoteKeys, SharedSecret
from engine.clock import Clock
from engine.errors import AuthenticationFailed
from engine.identity import Identity

TOKEN_SIZE_BYTES_MAX = 8 << 10
LEEWAY_SECONDS = 30
_CLAIM_DEPTH_MAX = 16
_CACHE_COUNT_MAX = 4_096  # about 3 KiB each
_YEAR_10000 = 253_402_300_800
_SHOWN_LENGTH_MAX = 120

_SIGNATURES = jwt.PyJWS(algorithms=[*ALGORITHMS_OF_PUBLIC_KEYS, HMAC_ALGORITHM])
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
# Keys, extensions and encodings that a token brings along: never believed, and a sign of an attack (RFC 8725, 3.10).
_REFUSED_HEADERS = ("crit", "jku", "jwk", "x5u", "b64")
# A logout token or a security event is signed by the same key for the same audience (RFC 8725, 3.11).
_TYPES = ("jwt", "at+jwt", "application/jwt", "application/at+jwt")
# Of one token, not of its user: a refreshed token is the same identity, and results stay shared.
_CLAIMS_OF_ONE_TOKEN = frozenset(("exp", "nbf", "iat", "jti", "nonce", "at_hash", "c_hash"))


class Verified(msgspec.Struct, frozen=True):
    """What a credential proves."""

    identity: Identity | None  # None: an admin who acts as nobody
    expires_at_ms: float | None = None  # drop the identity then (the leeway is counted in); None: never
    is_admin: bool = False  # may call internal functions


class _Cached(msgspec.Struct, frozen=True):
    verified: Verified
    source: KeySource
    key: Key
    not_before: float  # seconds, leeway counted in
    expires_at: float  # seconds, leeway counted in


class TokenVerifier:
    """Checks tokens of the given providers."""

    def __init__(
        self,
        providers: Sequence[AuthProvider],
        clock: Clock,
        *,
        fetch: Callable[[RemoteKeys], Fetch] | None = None,
    ) -> None:
        self._clock = clock
        self._remote_sources: dict[RemoteKeys, RemoteKeySource] = {}  # one per address, however many providers use it
        self._trusted: dict[str, list[tuple[AuthProvider, KeySource]]] = {}  # by issuer
        self._cache: OrderedDict[bytes, _Cached] = OrderedDict()  # by the token's digest, least recently used first
        for provider in providers:
            source = self._source_of(provider, fetch or _fetch_over_http)
            self._trusted.setdefault(provider.issuer, []).append((provider, source))

    def close(self) -> None:
        """Give up fetches that are under way."""
        for source in self._remote_sources.values():
            source.close()

    def known(self, token: str) -> Verified | None:
        """What a token proves that was checked before; None if `verify` has more to do, or to say what is wrong."""
        if len(token) > TOKEN_SIZE_BYTES_MAX:
            return None
        digest = _digest_of(token)
        cached = self._cache.get(digest)
        key_set = None if cached is None else cached.source.fresh()
        if cached is None or key_set is None or not key_set.holds(cached.key):
            return None
        if not cached.not_before <= self._clock.wall_ns() / 1e9 < cached.expires_at:  # 3
            return None
        self._cache.move_to_end(digest)
        return cached.verified

    async def verify(self, token: str) -> Verified:
        """The identity that the token proves; raises `AuthenticationFailed` with the reason."""
        if (known := self.known(token)) is not None:
            return known
        if len(token) > TOKEN_SIZE_BYTES_MAX:
            raise AuthenticationFailed(f"The token has {len(token):,} bytes, {TOKEN_SIZE_BYTES_MAX:,} allowed.")
        if _COMPACT.fullmatch(token) is None:
            raise AuthenticationFailed("The token is not a signed JWT: expected three parts of base64url.")
        digest = _digest_of(token)
        cached = self._cache.get(digest)
        if cached is None or not (await cached.source.current()).holds(cached.key):
            cached = await self._verify_anew(token)
        self._check_times(cached)
        self._keep(digest, cached)
        return cached.verified

    async def _verify_anew(self, token: str) -> _Cached:
        encoded_header, encoded_payload, _ = token.split(".")
        algorithm, kid = _read_header(_decode_part(encoded_header, "header"))
        claims = _decode_part(encoded_payload, "payload")
        provider, source = self._provider_of(claims)  # 1
        if algorithm not in provider.algorithms:  # 2
            raise AuthenticationFailed(
                f"The token is signed with {algorithm!r}; {provider.issuer} may use {', '.join(provider.algorithms)}."
            )
        key = await self._signing_key(token, algorithm, kid, source)
        subject = claims.get("sub")
        if not isinstance(subject, str) or not subject or not subject.isprintable():
            raise AuthenticationFailed("The token's `sub` is not a text that names a user.")
        _check_claim(claims, depth=0)
        expires_at = _time_of(claims, "exp")
        if expires_at is None:
            raise AuthenticationFailed("The token has no `exp`: it would be valid for ever.")
        starts = (_time_of(claims, "nbf"), _time_of(claims, "iat"))
        identity = Identity(
            subject=subject,
            issuer=provider.issuer,
            claims={name: value for name, value in claims.items() if name not in _CLAIMS_OF_ONE_TOKEN},
        )
        return _Cached(
            Verified(identity, (expires_at + LEEWAY_SECONDS) * 1_000),
            source,
            key,
            max((start for start in starts if start is not None), default=0.0) - LEEWAY_SECONDS,
            expires_at + LEEWAY_SECONDS,
        )

    def _provider_of(self, claims: dict[str, Any]) -> tuple[AuthProvider, KeySource]:
        issuer = claims.get("iss")
        trusted = self._trusted.get(issuer, []) if isinstance(issuer, str) else []
        if not trusted:
            raise AuthenticationFailed(f"The token's `iss` {_shown(issuer)} is not among the [[auth.providers]].")
        audience = claims.get("aud")
        named = audience if isinstance(audience, list) else [audience]
        for provider, source in trusted:
            if any(name in provider.audiences for name in named):
                return provider, source
        raise AuthenticationFailed(f"The token's `aud` {_shown(audience)} is not an audience of this app.")

    async def _signing_key(self, token: str, algorithm: str, kid: str | None, source: KeySource) -> Key:
        candidates = (await source.current()).candidates(kid, algorithm)
        if not candidates:
            candidates = (await source.after_unknown_kid()).candidates(kid, algorithm)
        if not candidates:
            raise AuthenticationFailed(f"The token's key (kid {_shown(kid)}, {algorithm}) is not one of the issuer's.")
        for key in candidates:
            try:
                _SIGNATURES.decode(token, key.public_key, algorithms=[algorithm])
            except jwt.PyJWTError:
                continue
            return key
        raise AuthenticationFailed("The token's signature is wrong.")

    def _check_times(self, cached: _Cached) -> None:
        now = self._clock.wall_ns() / 1e9  # 3
        if now >= cached.expires_at:
            late = now - cached.expires_at + LEEWAY_SECONDS
            raise AuthenticationFailed(f"The token expired {late:,.0f} s ago ({LEEWAY_SECONDS} s are forgiven).")
        if now < cached.not_before:
            early = cached.not_before - now + LEEWAY_SECONDS
            raise AuthenticationFailed(f"The token is valid in {early:,.0f} s only ({LEEWAY_SECONDS} s are forgiven).")

    def _keep(self, digest: bytes, cached: _Cached) -> None:
        self._cache.pop(digest, None)
        now = self._clock.wall_ns() / 1e9
        while self._cache and (
            len(self._cache) >= _CACHE_COUNT_MAX or next(iter(self._cache.values())).expires_at <= now
        ):
            self._cache.popitem(last=False)
        self._cache[digest] = cached

    def _source_of(self, provider: AuthProvider, fetch: Callable[[RemoteKeys], Fetch]) -> KeySource:
        match provider.keys:
            case FixedKeys(key_set):
                return FixedKeySource(key_set)
            case RemoteKeys() as remote:
                if remote not in self._remote_sources:
                    self._remote_sources[remote] = RemoteKeySource(remote.url, self._clock, fetch(remote))
                return self._remote_sources[remote]
            case SharedSecret(secret):
                key = Key(kid=None, algorithms=frozenset(provider.algorithms), material=b"", public_key=secret)
                return FixedKeySource(KeySet((key,), is_kid_ignored=True))
            case _:
                assert_never(provider.keys)


def _digest_of(token: str) -> bytes:
    """Invariant 4. What has no UTF-8 form is never kept, whatever its digest."""
    # SHA-256 takes 1.1 × the CPU of a whole request: OpenSSL looks for an implementation each time
    return hashlib.blake2b(token.encode(errors="replace"), digest_size=32).digest()


def _fetch_over_http(remote: RemoteKeys) -> Fetch:
    from engine.auth.fetching import fetch_key_set  # only for who fetches: see there

    return partial(fetch_key_set, is_private_network_allowed=remote.is_private_network_allowed)


def _decode_part(encoded: str, what: str) -> dict[str, Any]:
    try:
        part = msgspec.json.decode(urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    except (binascii.Error, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as cause:
        raise AuthenticationFailed(f"The token's {what} is not JSON in base64url.") from cause
    if not isinstance(part, dict):
        raise AuthenticationFailed(f"The token's {what} is not a JSON object.")
    return part


def _read_header(header: dict[str, Any]) -> tuple[str, str | None]:
    for name in _REFUSED_HEADERS:
        if name in header:
            raise AuthenticationFailed(f"The token's header has `{name}`, which this engine never follows.")
    algorithm, kid, kind = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
    if not isinstance(algorithm, str):
        raise AuthenticationFailed("The token's header has no `alg`.")
    if kid is not None and not isinstance(kid, str):
        raise AuthenticationFailed("The token's `kid` is not text.")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise AuthenticationFailed(f"The token's `typ` {_shown(kind)} is not that of an identity or access token.")
    return algorithm, kid


def _time_of(claims: dict[str, Any], name: str) -> float | None:
    """Seconds since the epoch; None if the token does not say."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _YEAR_10000:
        raise AuthenticationFailed(f"The token's `{name}` {_shown(value)} is not a time in seconds since 1970.")
    return float(value)


def _check_claim(value: object, depth: int) -> None:
    """Bounded in depth, and without NUL: `identity.part_of` marks a missing claim with it."""
    if depth > _CLAIM_DEPTH_MAX:
        raise AuthenticationFailed(f"The token's claims are nested deeper than {_CLAIM_DEPTH_MAX}.")
    if isinstance(value, str):
        if "\0" in value:
            raise AuthenticationFailed("The token's claims hold a NUL character.")
    elif isinstance(value, dict):
        for name, member in value.items():
            _check_claim(name, depth + 1)
            _check_claim(member, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_claim(item, depth + 1)


def _shown(value: object) -> str:
    """A stranger's value in a message: on one line, and short."""
    if not isinstance(value, str):
        return "(missing)" if value is None else f"({type(value).__name__})"
    return repr(value) if len(value) <= _SHOWN_LENGTH_MAX else f"{value[:_SHOWN_LENGTH_MAX]!r}…"
