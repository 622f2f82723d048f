"""Whether a delivery is its sender's: signatures of each kind, age, and what a delivery is known by."""

import hashlib
import hmac
from base64 import b64encode
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from engine.errors import AuthenticationFailed, ConfigError, EngineError, InvalidArgument, RegistryError
from engine.functions.loader import load_app
from engine.functions.requests import Headers, Request
from engine.functions.webhooks import SignatureScheme, Webhook
from engine.limits import Limits
from tests.functions.apps import write_app

NOW = 1_614_265_330
BODY = b'{"id":"evt_1","amount":5}'


def request(body: bytes, **headers: str) -> Request:
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return Request("POST", "/hooks", Headers(pairs), MappingProxyType({}), None, body)


def hex_of(secret: str, signed: bytes) -> str:
    return hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


def stripe(body: bytes = BODY, at: int = NOW, secret: str = "secret") -> str:
    return f"t={at},v1={hex_of(secret, b'%d.%b' % (at, body))},v0=ignored"


STANDARD, STRIPE, GITHUB = (Webhook(secret="key", scheme=scheme) for scheme in ("standard", "stripe", "github"))


# -- examples that the senders themselves publish ----------------------------------------------------------------------


def test_the_example_of_standard_webhooks_is_accepted() -> None:
    asked = request(
        b'{"test": 2432232314}',
        webhook_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        webhook_timestamp="1614265330",
        webhook_signature="v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    )
    for secret in ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"):
        assert STANDARD.delivery_of(asked, secret, NOW) == "msg_p5jXN8AQM9LWM0D4loKWxJek"


def test_the_example_of_github_is_accepted() -> None:
    signature = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    asked = request(b"Hello, World!", x_hub_signature_256=f"sha256={signature}", x_github_delivery="not signed")
    assert GITHUB.delivery_of(asked, "It's a Secret to Everybody", NOW) == signature


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("webhook", "headers", "error"),
    [
        (GITHUB, {}, AuthenticationFailed),
        (GITHUB, {"x_hub_signature": "sha1=00"}, AuthenticationFailed),
        (GITHUB, {"x_hub_signature_256": ""}, AuthenticationFailed),
        (GITHUB, {"x_hub_signature_256": "sha256="}, AuthenticationFailed),
        (GITHUB, {"x_hub_signature_256": "sha256=zz"}, AuthenticationFailed),
        (GITHUB, {"x_hub_signature_256": "sha256=" + "0" * 64}, AuthenticationFailed),
        (GITHUB, {"x_hub_signature_256": hex_of("secret", BODY)}, AuthenticationFailed),
        (GITHUB, {"x_hub_signature_256": "sha256=" + hex_of("other", BODY)}, AuthenticationFailed),
        (GITHUB, {"x_hub_signature_256": "sha256=" + hex_of("secret", BODY + b" ")}, AuthenticationFailed),
        (STRIPE, {"stripe_signature": stripe(secret="other")}, AuthenticationFailed),
        (STRIPE, {"stripe_signature": stripe().replace("v1=", "v0=")}, AuthenticationFailed),
        (STRIPE, {"stripe_signature": stripe(at=NOW - 301)}, AuthenticationFailed),
        (STRIPE, {"stripe_signature": stripe(at=NOW + 301)}, AuthenticationFailed),
        (STRIPE, {"stripe_signature": stripe(at=NOW - 301).replace(str(NOW - 301), str(NOW))}, AuthenticationFailed),
        (STRIPE, {"stripe_signature": stripe().replace("t=", "s=")}, InvalidArgument),
        (STRIPE, {"stripe_signature": stripe().replace(f"t={NOW}", "t=now")}, InvalidArgument),
        (STRIPE, {"stripe_signature": stripe().replace(f"t={NOW}", "t=-1")}, InvalidArgument),
        (STANDARD, {"webhook_signature": "v1,AA=="}, InvalidArgument),
        (STANDARD, {"webhook_signature": "v1,AA==", "webhook_timestamp": str(NOW)}, InvalidArgument),
        (
            STANDARD,
            {"webhook_signature": "v1,AA==", "webhook_timestamp": str(NOW), "webhook_id": "a.b"},
            InvalidArgument,
        ),
        (
            STANDARD,
            {"webhook_signature": "v1,no base64 v1,AA== v2,AA==", "webhook_timestamp": str(NOW), "webhook_id": "a"},
            AuthenticationFailed,
        ),
    ],
)
def test_a_delivery_that_is_not_its_senders_is_refused_and_told_nothing(
    webhook: Webhook, headers: dict[str, str], error: type[EngineError]
) -> None:
    secret = b64encode(b"secret").decode() if webhook is STANDARD else "secret"
    with pytest.raises(error) as refusal:
        webhook.delivery_of(request(BODY, **headers), secret, NOW)
    assert secret not in str(refusal.value)
    assert hex_of("secret", BODY) not in str(refusal.value)


def test_the_age_of_a_delivery_is_bounded_on_both_sides() -> None:
    for at in (NOW - 300, NOW, NOW + 300):
        assert STRIPE.delivery_of(request(BODY, stripe_signature=stripe(at=at)), "secret", NOW) == "evt_1"
    patient = Webhook(secret="key", scheme="stripe", tolerance_seconds=3_600)
    assert patient.delivery_of(request(BODY, stripe_signature=stripe(at=NOW - 3_600)), "secret", NOW) == "evt_1"


def test_one_signature_of_several_is_enough_but_not_of_too_many() -> None:
    good = f"v1={hex_of('secret', b'%d.%b' % (NOW, BODY))}"
    bad = f"v1={'0' * 64}"
    for parts in ([bad, good], [good, bad], [bad] * 14 + [good]):
        asked = request(BODY, stripe_signature=", ".join([f"t={NOW}", *parts]))
        assert STRIPE.delivery_of(asked, "secret", NOW) == "evt_1"
    with pytest.raises(AuthenticationFailed):
        STRIPE.delivery_of(request(BODY, stripe_signature=", ".join([f"t={NOW}"] + [bad] * 15 + [good])), "secret", NOW)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"{}", b'{"id":5}', b'{"id":""}', b"[" * 100_000])
def test_a_signed_body_without_the_id_that_it_should_have_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidArgument):
        STRIPE.delivery_of(request(body, stripe_signature=stripe(body)), "secret", NOW)


@pytest.mark.parametrize("secret", ["whsec_no base64", "whsec_"])
def test_a_secret_that_is_no_key_is_a_mistake_of_the_operator(secret: str) -> None:
    signature = b64encode(hmac.digest(b"", b"a.%d.%b" % (NOW, BODY), "sha256")).decode()
    asked = request(BODY, webhook_signature=f"v1,{signature}", webhook_timestamp=str(NOW), webhook_id="a")
    with pytest.raises(ConfigError) as refusal:
        STANDARD.delivery_of(asked, secret, NOW)
    assert "`key`" in str(refusal.value)
    assert "no base64" not in str(refusal.value)


# -- a scheme of one's own ---------------------------------------------------------------------------------------------


def test_a_scheme_of_ones_own_says_where_everything_stands() -> None:
    slack = SignatureScheme(
        header="X-Slack-Signature",
        prefix="v0=",
        signed="v0:{timestamp}:{body}",
        timestamp_header="X-Slack-Request-Timestamp",
    )
    webhook = Webhook(secret="key", scheme=slack)
    signature = hex_of("secret", b"v0:%d:%b" % (NOW, BODY))
    asked = request(BODY, x_slack_signature=f"v0={signature}", x_slack_request_timestamp=str(NOW))
    assert webhook.delivery_of(asked, "secret", NOW) == signature


def test_what_is_signed_is_put_in_once() -> None:
    scheme = SignatureScheme(header="S", signed="{id}|{body}", id_header="I")
    sneaky = "id"
    asked = request(b"{id}", s=hex_of("secret", b"id|{id}"), i=sneaky)
    assert Webhook(secret="key", scheme=scheme).delivery_of(asked, "secret", NOW) == "id"


@pytest.mark.parametrize(
    "options",
    [
        {"signed": "{id}.{timestamp}"},
        {"signed": "{body}{body}"},
        {"signed": "{timestamp}.{body}"},
        {"signed": "{body}", "timestamp_header": "T"},
        {"signed": "{body}", "timestamp_prefix": "t="},
        {"signed": "{id}{body}"},
        {"signed": "{body}", "id_header": "I"},
    ],
)
def test_a_scheme_that_believes_what_is_not_signed_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RegistryError):
        SignatureScheme(header="S", **options)


@pytest.mark.parametrize(
    ("webhook", "problem"),
    [
        ('Webhook(secret="whsec_MfKQ9r8GKYqr")', "never the secret itself"),
        ('Webhook(secret="unknown")', "AppSettings has no 'unknown'"),
        ('Webhook(secret="payments_secret", scheme="paypal")', "scheme='paypal'"),
        ('Webhook(secret="payments_secret", tolerance_seconds=0)', "tolerance_seconds=0; 1 to 86,400"),
        ('Webhook(secret="payments_secret", tolerance_seconds=90_000)', "1 to 86,400"),
    ],
)
def test_a_webhook_that_could_not_be_kept_is_refused_at_load(tmp_path: Path, webhook: str, problem: str) -> None:
    functions = f"""
        from engine.functions.settings import Secret, Settings

        class AppSettings(Settings):
            payments_secret: Secret

        @http.post("/hooks", webhook={webhook})
        async def paid(ctx: ActionCtx) -> None: ...
    """
    with pytest.raises(RegistryError) as refusal:
        load_app(write_app(tmp_path, functions), Limits())
    assert problem in str(refusal.value)
    assert "MfKQ9r8GKYqr" not in str(refusal.value)
