"""Every limit is documented, and there is a test that goes to it and past it.

Both lists are made of the structs, so a limit that is added without its reason, its place in `docs/limits.md` or a test
fails here. `test_runner.py` has a table for what one run may use; other tests name the limit that they are about, or
are named here where they rely on its default.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from engine import errors
from engine.limits import Limits, PerIp
from tests.functions.test_runner import RUN_LIMITS

TESTS = Path(__file__).parent
ROOT = TESTS.parent
STRUCTS = (("limits", Limits), ("per_ip", PerIp))
NAMES = [(table, name) for table, struct in STRUCTS for name in struct.__struct_fields__]

# Tests that go by the default of a limit, and so do not name it.
BY_DEFAULT = {
    "field_name_length_max": "test_schema.py::test_a_wrong_declaration_is_refused_with_its_place",
    "close_seconds_max": "server/test_connection.py::test_a_peer_that_never_answers_a_close_is_dropped",
    "ping_interval_seconds": "sync/test_session.py::test_a_silent_connection_is_pinged_from_the_start",
    "connect_wait_seconds_max": "sync/test_session.py::test_a_connection_without_connect_ends_after_five_minutes",
    "ledger_days": "transaction/test_ledger.py::test_an_outcome_that_nobody_saw_goes_after_14_days",
    "ledger_seconds_after_seen": (
        "transaction/test_ledger.py::test_an_outcome_goes_an_hour_after_its_client_has_seen_it"
    ),
    "snapshot_retained_seconds": "transaction/test_snapshots.py::test_a_retained_snapshot_is_there_for_30_seconds",
    "snapshot_retained_interval_seconds": (
        "transaction/test_snapshots.py::test_of_many_askers_at_a_time_the_late_ones_share_the_newest_that_is_kept"
    ),
    "refusal_seconds": (
        "server/test_addresses.py::test_after_so_many_refusals_no_credential_of_an_address_is_looked_at_for_a_while"
    ),
}
# Of errors, which a comment may name.
CODES = {error.code for error in vars(errors).values() if isinstance(error, type) and hasattr(error, "code")}


def documentation() -> ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("limits_page", ROOT / "docs" / "limits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """The test files, by path."""
    paths = [path for path in TESTS.rglob("test_*.py") if path.name not in ("test_limits.py", "test_config.py")]
    return {path.relative_to(TESTS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def is_gone_to(name: str, texts: dict[str, str]) -> bool:
    """Whether some test goes to this limit."""
    if name in BY_DEFAULT:
        file, _, test = BY_DEFAULT[name].partition("::")
        return re.search(rf"^(async )?def {test}\b", texts[file], re.MULTILINE) is not None
    return name in RUN_LIMITS or any(re.search(rf"\b{name}\b", text) for text in texts.values())


@pytest.mark.parametrize(("table", "name"), NAMES)
def test_a_limit_has_a_test(texts: dict[str, str], table: str, name: str) -> None:
    assert is_gone_to(name, texts), f"[{table}] {name}: write a test that goes to it and one past it"


def test_a_limit_without_a_test_would_be_found(texts: dict[str, str]) -> None:
    assert not is_gone_to("limit_of_nothing_max", texts)


def test_the_page_is_up_to_date() -> None:
    page = documentation()
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run `python docs/limits.py`"


def test_each_limit_is_on_the_page_with_its_reason() -> None:
    entries = list(documentation().entries())
    assert [(entry.table, entry.name) for entry in entries] == NAMES
    assert [entry.name for entry in entries if not entry.reason] == []


def test_a_refusal_on_the_page_is_a_code_that_there_is() -> None:
    for entry in documentation().entries():
        for word in re.findall(r"\b[A-Z]\w+", entry.past_it):
            assert word in (*CODES, "Ping", "Transitions"), f"{entry.name}: {word}"


def test_the_readme_leads_to_the_page() -> None:
    assert "(docs/limits.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
