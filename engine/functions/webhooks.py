"""Webhooks: deliveries that their sender has signed, each run once.

    request ──signature, age──> verified ──claim: a commit──> run ──answer below 500: a commit──> recorded, answered
                                   │ the same is under way: its answer  └─ 5xx: answered, and not recorded
                                   └ it is recorded: that answer

Invariants
  1. Nothing of a request is believed, parsed or kept before its signature fits: HMAC-SHA256, compared in constant time.
  2. A delivery is known by what is signed of it: its id, or the signature itself where the sender signs no id.
  3. A delivery whose answer is recorded never runs again while it is kept, also after a restart. One whose run was
     interrupted or answered 5xx runs again when its sender sends it again.
  4. At most `webhook_delivery_count_max` deliveries are kept, and each for `webhook_delivery_seconds_kept`.
"""

import asyncio
import binascii
import hashlib
import hmac
import logging
import re
from base64 import b64decode
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal

import msgspec

from engine.errors import AuthenticationFailed, ConfigError, EngineClosed, InvalidArgument, Overloaded, RegistryError
from engine.functions.requests import Answer, Request, decode_answer
from engine.functions.settings import Settings
from engine.limits import Limits
from engine.ranges import IndexRange, after, before
from engine.schema import Table, unique
from engine.transaction.transaction import WriteTransaction

if TYPE_CHECKING:
    from engine.functions.calls import Transactions

_log = logging.getLogger("engine.functions")

_SIGNED = re.compile(r"\{(body|timestamp|id)\}")
_ID = re.compile(r"[A-Za-z0-9_:/+=~-]{1,256}")  # no dot, which parts what is signed
_SECONDS = re.compile(r"[0-9]{1,12}")
_SETTING = re.compile(r"[a-z][a-z0-9_]*")
_SIGNATURE_COUNT_MAX = 16  # of one request: a sender that changes its secret signs with both
_SWEEP_COUNT = 10  # deliveries that one more removes: more than one, so that fewer are kept after a burst
_TOLERANCE_SECONDS_MAX = 86_400


class SignatureScheme(msgspec.Struct, frozen=True, kw_only=True):
    """How a sender signs: where the signatures stand, what they are of, and what tells a delivery from another."""

    header: str  # with one signature or several
    prefix: str = ""  # before each signature
    separator: str | None = None  # between the parts of the header; None: it is one signature
    encoding: Literal["hex", "base64"] = "hex"
    signed: str = "{body}"  # what is signed, of {id}, {timestamp} and {body}
    timestamp_header: str | None = None  # when it was sent, in seconds since the epoch
    timestamp_prefix: str | None = None  # or: of a part of `header`
    id_header: str | None = None
    id_field: str | None = None  # or: of the JSON object that is the body
    is_secret_base64: bool = False  # after `whsec_`; else its text is the key

    def __post_init__(self) -> None:
        signed = _SIGNED.findall(self.signed)
        if signed.count("body") != 1 or len(set(signed)) < len(signed):
            raise RegistryError(f"SignatureScheme: signed={self.signed!r}; {{body}} is needed, and nothing twice.")
        has_timestamp = self.timestamp_header is not None or self.timestamp_prefix is not None
        for part, has_source, source in (
            ("timestamp", has_timestamp, "timestamp_header or timestamp_prefix"),
            ("id", self.id_header is not None, "id_header"),
        ):
            if (part in signed) != has_source:  # what is not signed can be changed on the way
                raise RegistryError(
                    f"SignatureScheme: signed={self.signed!r} has {{{part}}} exactly if there is {source}."
                )


SCHEME_BY_NAME = {
    "standard": SignatureScheme(  # standardwebhooks.com
        header="webhook-signature",
        prefix="v1,",
        separator=" ",
        encoding="base64",
        signed="{id}.{timestamp}.{body}",
        timestamp_header="webhook-timestamp",
        id_header="webhook-id",
        is_secret_base64=True,
    ),
    "stripe": SignatureScheme(
        header="stripe-signature",
        prefix="v1=",
        separator=",",
        signed="{timestamp}.{body}",
        timestamp_prefix="t=",
        id_field="id",  # of the event: sent again it has another timestamp, so another signature
    ),
    "github": SignatureScheme(header="x-hub-signature-256", prefix="sha256="),  # its delivery id is not signed
}


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """Whose deliveries a route takes: `@http.post("/hooks/payments", webhook=Webhook(secret="payments_secret"))`."""

    secret: str  # the name of the setting that holds it, as in `ctx.settings`
    scheme: Literal["standard", "stripe", "github"] | SignatureScheme = "standard"
    tolerance_seconds: int = 300  # how old a delivery may be, and how far in the future

    def check(self, path: str, limits: Limits, settings: type[Settings] | None) -> None:
        """RegistryError, beginning with the function's path, for what cannot be kept."""
        if not isinstance(self.scheme, SignatureScheme) and self.scheme not in SCHEME_BY_NAME:
            raise RegistryError(
                f"{path}: Webhook: scheme={self.scheme!r}; there are {', '.join(map(repr, SCHEME_BY_NAME))}, "
                "or a SignatureScheme of your own."
            )
        if _SETTING.fullmatch(self.secret) is None:
            raise RegistryError(
                f"{path}: Webhook: `secret` is the name of a setting, in snake_case, never the secret itself."
            )
        if settings is not None and self.secret not in settings.__struct_fields__:
            raise RegistryError(
                f"{path}: Webhook: {settings.__name__} has no {self.secret!r}. Declare `{self.secret}: Secret` there."
            )
        tolerance_max = min(_TOLERANCE_SECONDS_MAX, limits.webhook_delivery_seconds_kept // 2)
        if not 1 <= self.tolerance_seconds <= tolerance_max:
            raise RegistryError(
                f"{path}: Webhook: tolerance_seconds={self.tolerance_seconds}; 1 to {tolerance_max:,}, so that "
                "whatever is young enough is still known (limits.webhook_delivery_seconds_kept)."
            )

    def delivery_of(self, request: Request, secret: str, now_seconds: float) -> str:
        """What names the delivery (2).

        Raises AuthenticationFailed, InvalidArgument for what is no delivery, ConfigError for a secret that is no key.
        """
        scheme = scheme_of(self)
        parts = _parts_of(scheme, request)
        timestamp, delivery_id = _timestamp_of(scheme, request, parts), _id_of(scheme, request)
        text = {"timestamp": timestamp or "", "id": delivery_id or ""}
        start, end = (
            _SIGNED.sub(lambda found: text[found[1]], piece).encode() for piece in scheme.signed.split("{body}")
        )
        key = self._key_of(secret) if scheme.is_secret_base64 else secret.encode()
        expected = hmac.digest(key, start + request.body + end, "sha256")
        is_signed = False
        for part in parts[:_SIGNATURE_COUNT_MAX]:
            if part.startswith(scheme.prefix):
                is_signed |= hmac.compare_digest(expected, _decoded(part.removeprefix(scheme.prefix), scheme))
        if not is_signed:
            raise AuthenticationFailed(f"The signature in the header {scheme.header} does not fit this delivery.")
        if timestamp is not None and abs(now_seconds - int(timestamp)) > self.tolerance_seconds:
            raise AuthenticationFailed(
                f"The delivery is of another time: it was signed at {timestamp} (seconds since the epoch), and may be "
                f"{self.tolerance_seconds} s old."
            )
        if scheme.id_field is not None:
            delivery_id = _id_in_body(scheme.id_field, request.body)
        return delivery_id or expected.hex()

    def _key_of(self, secret: str) -> bytes:
        """The key in a secret that is written in base64."""
        try:
            key = b64decode(secret.removeprefix("whsec_"), validate=True)
        except ValueError:
            key = b""
        if not key:  # anybody could sign with an empty one
            raise ConfigError(f"the setting `{self.secret}`: expected a key in base64, perhaps after `whsec_`.")
        return key


def scheme_of(webhook: Webhook) -> SignatureScheme:
    return SCHEME_BY_NAME[webhook.scheme] if isinstance(webhook.scheme, str) else webhook.scheme


class WebhookDelivery(Table, name="_webhook_deliveries", system=True, hidden=True):
    """A delivery that was claimed, and how it was answered."""

    key: str  # a digest of its route and its name
    number: int  # grows by one; the oldest are removed by it
    claimed_at: float  # ms since the epoch
    answer: bytes | None = None  # None: no run has ended with one that is to stay
    by_key = unique("key")
    by_number = unique("number")


class Deliveries:
    """The deliveries of one engine."""

    def __init__(self, transactions: "Transactions", limits: Limits) -> None:
        self._transactions, self._limits = transactions, limits
        self._under_way: dict[str, asyncio.Task[Answer]] = {}

    async def answer_once(self, route: str, delivery: str, run: Callable[[], Awaitable[Answer]]) -> Answer:
        """What `run` gives, or what it gave when this delivery came before (3)."""
        key = hashlib.sha256(f"{route}\n{delivery}".encode()).hexdigest()
        task = self._under_way.get(key)
        if task is None:
            # its own, so that it goes on when the sender hangs up
            task = self._under_way[key] = asyncio.create_task(self._run(key, run))
            task.add_done_callback(lambda _: self._under_way.pop(key))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Cancel what is under way: it runs again when it is sent again."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, key: str, run: Callable[[], Awaitable[Answer]]) -> Answer:
        recorded = await self._transactions.write(lambda transaction, now: self._claim(transaction, key, now))
        if recorded is not None:
            return decode_answer(recorded)
        answer = await run()
        if answer.status < 500:
            encoded = msgspec.msgpack.encode(answer)
            try:
                await self._transactions.write(lambda transaction, now: _record(transaction, key, encoded))
            except (Overloaded, EngineClosed) as error:  # it has run: its sender shall not send it again
                _log.warning("the answer to a webhook's delivery is not recorded: %s", error)
        return answer

    def _claim(self, transaction: WriteTransaction, key: str, now: float) -> bytes | None:
        """The recorded answer, or a row to record it in."""
        found = transaction.find(WebhookDelivery, "by_key", key)
        if found:
            return found[0].answer
        number = _newest_number(transaction) + 1
        transaction.insert(WebhookDelivery(key=key, number=number, claimed_at=now))
        oldest_ms = now - self._limits.webhook_delivery_seconds_kept * 1000
        for old in transaction.find(WebhookDelivery, "by_number", limit=_SWEEP_COUNT):
            if old.claimed_at < oldest_ms or old.number <= number - self._limits.webhook_delivery_count_max:
                transaction.delete(old.id)
        return None


def _record(transaction: WriteTransaction, key: str, answer: bytes) -> None:
    for row in transaction.find(WebhookDelivery, "by_key", key):  # none: so many came since that it was removed
        transaction.patch(row.id, {"answer": answer})


def _newest_number(transaction: WriteTransaction) -> int:
    """0 if there is none."""
    table = transaction.catalog.of_type(WebhookDelivery).table
    index = table.indexes_by_name["by_number"]
    everything = IndexRange(table.name, index.name, before(()), after(()))
    newest: list[WebhookDelivery] = transaction.scan(WebhookDelivery, index, everything, descending=True, limit=1)
    return newest[0].number if newest else 0


# -- what a request says


def _parts_of(scheme: SignatureScheme, request: Request) -> list[str]:
    given = request.headers.get(scheme.header)
    if given is None:
        raise AuthenticationFailed(f"The delivery is not signed: there is no header {scheme.header}.")
    return [part.strip() for part in given.split(scheme.separator)] if scheme.separator is not None else [given.strip()]


def _timestamp_of(scheme: SignatureScheme, request: Request, parts: list[str]) -> str | None:
    if scheme.timestamp_header is not None:
        where, found = f"the header {scheme.timestamp_header}", request.headers.get(scheme.timestamp_header, "")
    elif scheme.timestamp_prefix is not None:
        prefix = scheme.timestamp_prefix
        where = f"`{prefix}` in the header {scheme.header}"
        found = next((part.removeprefix(prefix) for part in parts if part.startswith(prefix)), "")
    else:
        return None
    if _SECONDS.fullmatch(found) is None:
        raise InvalidArgument(f"{where}: expected seconds since the epoch")
    return found


def _id_of(scheme: SignatureScheme, request: Request) -> str | None:
    if scheme.id_header is None:
        return None
    found = request.headers.get(scheme.id_header, "")
    if _ID.fullmatch(found) is None:
        raise InvalidArgument(f"the header {scheme.id_header}: expected the id of the delivery, {_ID.pattern}")
    return found


def _id_in_body(field: str, body: bytes) -> str:
    try:
        found = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        found = None
    delivery_id = found.get(field) if isinstance(found, dict) else None
    if not isinstance(delivery_id, str) or not delivery_id:
        raise InvalidArgument(f"the body: expected a JSON object with the id of the delivery as text in {field!r}")
    return delivery_id


def _decoded(signature: str, scheme: SignatureScheme) -> bytes:
    """The bytes of a signature; none that fit for what is no signature."""
    try:
        return bytes.fromhex(signature) if scheme.encoding == "hex" else b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        return b""
