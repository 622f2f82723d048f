"""The public keys of an issuer (JWKS, RFC 7517): parsed, chosen, asked for and cached.

Invariants
  1. A key is usable only for algorithms of its own type and curve, and of its own `alg` if it names one, so neither
     a token nor an issuer can have an RSA key read as an HMAC secret. Symmetric and private keys are never usable.
  2. A source serves no key set that was fetched more than 24 hours ago, and asks again after 10 minutes.
  3. At most one fetch of a source runs at a time. An unknown `kid` causes at most one each 30 seconds: tokens are
     written by strangers.

The fetch itself is `fetching`'s. Which algorithms a provider allows is its own business (`providers`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import jwt
import msgspec

from engine.clock import Clock
from engine.errors import AuthenticationFailed

ALGORITHMS_OF_PUBLIC_KEYS = {
    "RS256": "RSA",
    "RS384": "RSA",
    "RS512": "RSA",
    "PS256": "RSA",
    "PS384": "RSA",
    "PS512": "RSA",
    "ES256": "P-256",
    "ES384": "P-384",
    "ES512": "P-521",
    "EdDSA": "Ed25519",
}
_RSA_SIZE_BITS_MIN = 2048  # NIST SP 800-131A; RFC 7518 section 3.3
_RSA_SIZE_BITS_MAX = 8192  # one verification of more would hold the loop
_KEY_COUNT_MAX = 64
_CANDIDATE_COUNT_MAX = 4  # signatures tried for one token that names no `kid`

FRESH_SECONDS = 600
LAST_GOOD_SECONDS = 24 * 3_600
UNKNOWN_KID_SECONDS = 30
RETRY_SECONDS = 5  # after a failed fetch: log-ins come back soon, and the issuer is not flooded

Fetch = Callable[[str], Awaitable[bytes]]
_log = logging.getLogger("engine.auth")


class Key(msgspec.Struct, frozen=True, eq=False):
    """One key that checks signatures."""

    kid: str | None
    algorithms: frozenset[str]
    material: bytes  # the JWK as canonical JSON: what makes two keys one
    public_key: Any  # of the cryptography package; a shared secret's bytes for HS256


class KeySet(msgspec.Struct, frozen=True, eq=False):
    """The usable keys of one issuer at one moment, in the order given; may be empty."""

    keys: tuple[Key, ...]
    refused: tuple[str, ...] = ()  # why each of the other keys is not usable
    is_kid_ignored: bool = False  # a shared secret is the only key there is

    def candidates(self, kid: str | None, algorithm: str) -> tuple[Key, ...]:
        """The keys that may have signed a token with this header; without a `kid`, all of its algorithm."""
        fitting = tuple(
            key
            for key in self.keys
            if algorithm in key.algorithms and (kid is None or kid == key.kid or self.is_kid_ignored)
        )
        return fitting if len(fitting) <= _CANDIDATE_COUNT_MAX else ()

    def holds(self, key: Key) -> bool:
        """Whether the key is still one of these: after a rotation it is not."""
        return key in self.keys or any(known.material == key.material for known in self.keys)


def parse_key_set(text: bytes | str) -> KeySet:
    """The usable keys of a JWKS document. Keys of other types and uses are left out (RFC 7517 section 5)."""
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as cause:
        raise ValueError(f"not JSON: {cause}") from cause
    return key_set_of(document)


def key_set_of(document: object) -> KeySet:
    """The same for a document that is decoded already."""
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError('not a JWKS: expected {"keys": [...]}')
    if len(entries) > _KEY_COUNT_MAX:
        raise ValueError(f"{len(entries)} keys, {_KEY_COUNT_MAX} allowed")
    keys, refused = [], []
    for entry in entries:
        try:
            keys.append(_key_of(entry))
        except (ValueError, TypeError, jwt.PyJWTError) as cause:
            name = entry.get("kid") if isinstance(entry, dict) else None
            refused.append(f"key {name!r}: {cause}")
    return KeySet(tuple(keys), tuple(refused))


def _key_of(entry: object) -> Key:
    if not isinstance(entry, dict):
        raise ValueError("expected an object")
    if "d" in entry or "k" in entry:
        raise ValueError("it is secret; publish the public half and replace this key")  # 1
    kind = entry.get("kty") if entry.get("kty") == "RSA" else entry.get("crv")
    algorithms = frozenset(name for name, of_kind in ALGORITHMS_OF_PUBLIC_KEYS.items() if of_kind == kind)
    if "alg" in entry:
        algorithms &= {entry["alg"]}  # 1
    if not algorithms:
        raise ValueError(f"kty {entry.get('kty')!r}, crv {entry.get('crv')!r}, alg {entry.get('alg')!r} is not usable")
    if entry.get("use", "sig") != "sig" or "verify" not in entry.get("key_ops", ["verify"]):
        raise ValueError("it is not for signatures")
    kid = entry.get("kid")
    if kid is not None and not isinstance(kid, str):
        raise ValueError("kid is not text")
    # `from_jwk` checks that kty and crv belong together and that the point lies on the curve
    public_key = jwt.PyJWK.from_dict(entry, algorithm=min(algorithms)).key
    size_bits = public_key.key_size if kind == "RSA" else None
    if size_bits is not None and not _RSA_SIZE_BITS_MIN <= size_bits <= _RSA_SIZE_BITS_MAX:
        raise ValueError(f"{size_bits} bits, {_RSA_SIZE_BITS_MIN} to {_RSA_SIZE_BITS_MAX} allowed")
    return Key(kid, algorithms, msgspec.json.encode(entry, order="deterministic"), public_key)


class KeySource(Protocol):
    """Where the verifier gets the keys of a provider."""

    async def current(self) -> KeySet:
        """The keys now; raises `AuthenticationFailed` if there are none fresh enough."""

    def fresh(self) -> KeySet | None:
        """The same; None if they have to be fetched first."""

    async def after_unknown_kid(self) -> KeySet:
        """The keys after asking again, if that is allowed now: a token named a `kid` that is not among `current`."""


class FixedKeySource:
    """Keys that do not change while the engine runs."""

    def __init__(self, key_set: KeySet) -> None:
        self._key_set = key_set

    async def current(self) -> KeySet:
        return self._key_set

    def fresh(self) -> KeySet:
        return self._key_set

    async def after_unknown_kid(self) -> KeySet:
        return self._key_set


class RemoteKeySource:
    """Keys fetched from the issuer, kept for a while, and kept longer while the issuer cannot be reached."""

    def __init__(self, url: str, clock: Clock, fetch: Fetch) -> None:
        self._url, self._clock, self._fetch = url, clock, fetch
        self._key_set = KeySet(())  # the last good one; set by _load
        self._fetched_at: float | None = None  # clock.monotonic() of the last good fetch; None until then
        self._attempted_at: float | None = None  # of the last attempt, good or not
        self._loading: asyncio.Task[None] | None = None  # the one fetch that runs (3)

    async def current(self) -> KeySet:
        if (key_set := self.fresh()) is not None:
            return key_set
        await self._load_unless_tried_within(RETRY_SECONDS)
        return self._last_good()

    def fresh(self) -> KeySet | None:
        age = self._age()
        return self._key_set if age is not None and age <= FRESH_SECONDS else None

    async def after_unknown_kid(self) -> KeySet:
        await self._load_unless_tried_within(UNKNOWN_KID_SECONDS)
        return self._last_good()

    def close(self) -> None:
        """Give up a fetch that is under way."""
        if self._loading is not None:
            self._loading.cancel()

    def _age(self) -> float | None:
        return None if self._fetched_at is None else self._clock.monotonic() - self._fetched_at

    def _last_good(self) -> KeySet:
        age = self._age()
        if age is None or age > LAST_GOOD_SECONDS:  # 2
            raise AuthenticationFailed("The issuer's public keys cannot be fetched at the moment. Try again later.")
        return self._key_set

    async def _load_unless_tried_within(self, seconds: float) -> None:
        if self._loading is None:
            now = self._clock.monotonic()
            if self._attempted_at is not None and now - self._attempted_at < seconds:
                return
            self._attempted_at = now
            self._loading = asyncio.get_running_loop().create_task(self._load())
        await asyncio.shield(self._loading)  # a caller that goes away does not take the others' fetch with it

    async def _load(self) -> None:
        try:
            key_set = parse_key_set(await self._fetch(self._url))
            if not key_set.keys:
                raise ValueError(f"no usable key: {'; '.join(key_set.refused) or 'the list is empty'}")
        except (OSError, ValueError) as cause:
            _log.warning("the keys at %s cannot be used, the last good ones stay: %s", self._url, cause)
        else:
            self._key_set, self._fetched_at = key_set, self._clock.monotonic()
        finally:
            self._loading = None
