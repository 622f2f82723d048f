"""One serving process: what it refuses to begin, and how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import Config
from engine.errors import ConfigError, Overloaded
from engine.limits import Limits
from engine.server.process import check_exposure, check_free, local_address
from engine.storage.connections import Database

DIGEST = "0" * 64


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "app.example"])
def test_other_machines_are_let_in_only_with_an_admin_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"no \[admin\] key_sha256"):
        check_exposure(Config(host=host))
    check_exposure(Config(host=host, admin_key_digests=(DIGEST,)))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    check_exposure(Config(host=host))


def test_what_a_public_server_should_have_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    origins, url = ("https://app.example",), "https://api.example"
    check_exposure(Config(host="0.0.0.0", admin_key_digests=(DIGEST,), allowed_origins=origins, public_url=url))
    assert caplog.messages == []
    check_exposure(Config(host="0.0.0.0", admin_key_digests=(DIGEST,)))
    assert len(caplog.messages) == 2
    assert "allowed_origins" in caplog.messages[0]
    assert "public_url" in caplog.messages[1]


def test_a_database_that_is_open_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "engine.db"
    check_free(path)
    database = Database.open(path, Limits())
    try:
        with pytest.raises(Overloaded, match=r"is in use by process \d+\. Stop"):
            check_free(path)
        database.announce(address="http://127.0.0.1:3210", key="adm_secret")
        with pytest.raises(Overloaded, match=r"which serves at http://127\.0\.0\.1:3210\.") as refusal:
            check_free(path)
        assert "adm_secret" not in str(refusal.value)
    finally:
        database.close()
    check_free(path)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("http://0.0.0.0:3210", "http://127.0.0.1:3210"),
        ("http://[::]:3210", "http://[::1]:3210"),
        ("http://127.0.0.1:3210", "http://127.0.0.1:3210"),
        ("http://app.example:3210", "http://app.example:3210"),
    ],
)
def test_commands_on_this_machine_find_the_server(address: str, local: str) -> None:
    assert local_address(address) == local


FAILING = """
import asyncio, sys
from types import SimpleNamespace
from engine.cli import exit_code_of
from engine.errors import CommitUnknown
from engine.observe.log import set_up_logging
from engine.server.process import end_on_failure

async def main():
    engine = SimpleNamespace(failed=asyncio.get_running_loop().create_future())
    asyncio.get_running_loop().call_soon(engine.failed.set_result, CommitUnknown("fsync failed"))
    try:
        end_on_failure(engine, exit_code_of)
        await asyncio.Event().wait()
    finally:
        print("closed in good order")

set_up_logging()
asyncio.run(main())
"""


@pytest.mark.slow
def test_when_storage_is_unknown_the_process_ends_without_touching_it() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FAILING], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 75
    assert "CRITICAL engine: the process ends: fsync failed" in ended.stderr
    assert ended.stdout == "", "no `finally` ran: closing the database would write to it"
