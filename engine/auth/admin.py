"""Admin keys, the `Authorization` header, and acting as somebody.

Invariants
  1. Only the SHA-256 of a key is stored; keys are compared as digests in constant time, each with every stored one.
  2. A key is read from the header (or the `Authenticate` message) only, never from an address.

The key in `DATABASE.lock` (`storage/connections.py`) is one more admin key, valid while that process runs: who can read
the file can read the database too. Whether an admin key is welcome from a browser's origin is the door's to say.
"""

import binascii
import hashlib
import hmac
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from typing import Any, assert_never

import msgspec

from engine.auth.tokens import TOKEN_SIZE_BYTES_MAX, TokenVerifier, Verified
from engine.clock import Clock
from engine.errors import AuthenticationFailed
from engine.identity import Identity
from engine.sync.backend import AdminKey, Credential, UserToken

ADMIN_KEY_PREFIX = "adm_"  # lets secret scanners find a key that was committed by mistake
_KEY_SIZE_BYTES = 32
_HEADER_SIZE_BYTES_MAX = 2 * TOKEN_SIZE_BYTES_MAX
_BEARER = "Bearer "  # as clients write it; other spellings are looked at each time

# Attributes of a user as Convex clients spell them → the claim of OpenID Connect that a token would carry.
_CLAIM_BY_ATTRIBUTE = {
    "givenName": "given_name",
    "familyName": "family_name",
    "preferredUsername": "preferred_username",
    "profileUrl": "profile",
    "pictureUrl": "picture",
    "websiteUrl": "website",
    "emailVerified": "email_verified",
    "birthday": "birthdate",
    "timezone": "zoneinfo",
    "language": "locale",
    "phoneNumber": "phone_number",
    "phoneNumberVerified": "phone_number_verified",
    "updatedAt": "updated_at",
}


def make_admin_key(clock: Clock) -> str:
    """A new admin key: 256 bits that nobody can guess."""
    return ADMIN_KEY_PREFIX + urlsafe_b64encode(clock.entropy(_KEY_SIZE_BYTES)).rstrip(b"=").decode()


def digest_of(key: str) -> str:
    """What `[admin] key_sha256` holds for a key."""
    return hashlib.sha256(key.encode(errors="backslashreplace")).hexdigest()


class AdminKeys:
    """The admin keys that this engine accepts; there may be none."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = tuple(digests)  # lower-case hexadecimal

    def accepts(self, key: str) -> bool:
        given = digest_of(key)
        is_known = False
        for digest in self._digests:
            is_known |= hmac.compare_digest(given, digest)  # 1: no early end
        return is_known

    def verify(self, key: str, acting_as: Mapping[str, Any] | None = None) -> Verified:
        """An admin, as nobody or as the user that the attributes describe; raises `AuthenticationFailed`."""
        if not self.accepts(key):
            raise AuthenticationFailed("The admin key is not one of [admin] key_sha256.")
        identity = None if acting_as is None else identity_of_attributes(acting_as)
        return Verified(identity, expires_at_ms=None, is_admin=True)


def identity_of_attributes(attributes: Mapping[str, Any]) -> Identity:
    """The identity that an admin acts as: `tokenIdentifier`, or `issuer` and `subject`, and any claims."""
    issuer, subject, token_identifier = (_text(attributes, name) for name in ("issuer", "subject", "tokenIdentifier"))
    if token_identifier and not (issuer and subject):
        issuer, _, subject = token_identifier.partition("|")  # an issuer holds no `|`: providers, invariant 3
    if not issuer or not subject:
        raise AuthenticationFailed("To act as a user, give `issuer` and `subject`, or `tokenIdentifier`.")
    claims = {
        _CLAIM_BY_ATTRIBUTE.get(name, name): value
        for name, value in attributes.items()
        if name not in ("issuer", "subject", "tokenIdentifier")
    }
    return Identity(subject=subject, issuer=issuer, claims={**claims, "iss": issuer, "sub": subject})


def _text(attributes: Mapping[str, Any], name: str) -> str:
    value = attributes.get(name, "")
    if not isinstance(value, str):
        raise AuthenticationFailed(f"To act as a user, `{name}` must be text.")
    return value


class Authenticator:
    """Checks every kind of credential, for all doors."""

    def __init__(self, tokens: TokenVerifier, admin_keys: AdminKeys) -> None:
        self._tokens, self._admin_keys = tokens, admin_keys

    def known(self, header: str) -> Verified | None:
        """Who an `Authorization` header proves to be that was seen before; None if it has to be looked at.

        With it a request costs 0.85 × what it does with `authenticate` alone.
        """
        return self._tokens.known(header[len(_BEARER) :]) if header.startswith(_BEARER) else None

    async def authenticate(self, credential: Credential) -> Verified:
        """Who the credential proves to be; raises `AuthenticationFailed` with the reason."""
        match credential:
            case UserToken(token):
                return await self._tokens.verify(token)
            case AdminKey(key, acting_as):
                return self._admin_keys.verify(key, acting_as)
            case _:
                assert_never(credential)


def parse_authorization(header: str) -> Credential:
    """The value of an `Authorization` header:

    `Bearer <token>`, `Convex <admin key>`, or `Convex <admin key>:<base64 of a JSON identity>`.
    """
    if len(header) > _HEADER_SIZE_BYTES_MAX:
        raise AuthenticationFailed(f"The Authorization header has more than {_HEADER_SIZE_BYTES_MAX:,} bytes.")
    scheme, _, value = header.strip().partition(" ")
    match scheme.lower():
        case "bearer":
            return UserToken(value.strip())
        case "convex":
            return parse_admin_key(value.strip())
        case _:
            raise AuthenticationFailed("The Authorization header is not `Bearer <token>` or `Convex <key>`.")


def parse_admin_key(value: str) -> AdminKey:
    """A key, and the attributes of the user to act as.

    A key may stand as `name|key` or `prod:name|key`, as deploy keys of Convex do: the name is for people.
    """
    _, _, last = value.rpartition("|")
    key, colon, encoded = last.partition(":")
    if not colon:
        return AdminKey(key, None)
    try:
        attributes = msgspec.json.decode(b64decode(encoded, validate=True))
    except (binascii.Error, ValueError, RecursionError, msgspec.DecodeError) as cause:
        raise AuthenticationFailed("The identity after the admin key is not JSON in base64.") from cause
    if not isinstance(attributes, dict):
        raise AuthenticationFailed("The identity after the admin key is not a JSON object.")
    return AdminKey(key, attributes)
