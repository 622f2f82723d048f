"""What strangers present is compared in constant time on every path: on the code path, as time itself is no test."""

import ast
import hashlib
import hmac
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from engine.auth.admin import AdminKeys, digest_of
from engine.errors import EngineError
from engine.functions.pages import CursorSeal
from engine.functions.settings import Secret
from engine.functions.storage import FileAddresses
from tests.server.real import serve_app

ENGINE = Path(__file__).parents[2] / "engine"
ADDRESSES = FileAddresses(b"secret", "http://x")
UPLOAD = ADDRESSES.of_upload(10**13).rpartition("=")[2]
FILE = ADDRESSES.of_file("abc").rpartition("/")[2]


def bent(text: str) -> str:
    """The same but for its last character."""
    return text[:-1] + ("0" if text[-1] != "0" else "1")


PATHS: dict[str, Callable[[], object]] = {
    "an admin key": lambda: AdminKeys([digest_of("key")]).accepts("kex"),
    "each of two admin keys, also when the first fits": lambda: AdminKeys([digest_of("a"), digest_of("b")]).accepts(
        "a"
    ),
    "a cursor": lambda: CursorSeal(b"secret", b"query").open(bent(CursorSeal(b"secret", b"query").seal((1,)))),
    "the address of an upload": lambda: ADDRESSES.check_upload(bent(UPLOAD), 0),
    "the address of a file": lambda: ADDRESSES.storage_id_of(bent(FILE)),
    "a secret setting": lambda: Secret("abc") == Secret("abd"),
}


@pytest.mark.parametrize(("name", "compare"), PATHS.items(), ids=PATHS.keys())
def test_a_wrong_one_is_compared_in_constant_time(
    monkeypatch: pytest.MonkeyPatch, name: str, compare: Callable[[], object]
) -> None:
    compared: list[tuple[object, object]] = []
    real = hmac.compare_digest

    def record(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", record)
    with suppress(EngineError):
        compare()
    assert len(compared) == (2 if "two" in name else 1)


async def test_the_signature_of_a_webhook_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    functions = """
class Mine(Settings):
    hook: Secret = Secret("a secret of a webhook")
@http.post("/hook", webhook=Webhook(secret="hook", scheme="github"))
async def hook(ctx, body: dict[str, Any]) -> None: pass
"""
    compared: list[tuple[object, object]] = []
    real = hmac.compare_digest
    async with serve_app(tmp_path, functions) as server:
        signature = hmac.digest(b"a secret of a webhook", b"{}", "sha256").hex()
        monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(compared.append((a, b))) or real(a, b))
        for given, status in ((signature, 200), (bent(signature), 401)):
            headers = {"x-hub-signature-256": f"sha256={given}"}
            assert (await server.ask("POST", "/hook", data=b"{}", headers=headers)).status in (status, 204), given
    assert len(compared) == 2


def test_no_module_that_checks_secrets_compares_digests_otherwise() -> None:
    """`==` beside something that is named for a digest, a seal or a signature."""
    found = []
    for name in ("auth/admin.py", "functions/pages.py", "functions/storage.py", "functions/webhooks.py"):
        for node in ast.walk(ast.parse((ENGINE / name).read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq | ast.In | ast.NotIn):
                text = ast.unparse(node)
                if any(word in text for word in ("digest", "seal", "mac", "signature", "key")) and "key ==" not in text:
                    found.append(f"{name}: {text}")
    assert found == []


def test_a_digest_is_never_the_built_in_hash() -> None:
    assert digest_of("a") == hashlib.sha256(b"a").hexdigest()
