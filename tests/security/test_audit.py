"""The audit of dependencies says what it did, also when it could not; and what is installed is what the locks say."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def load_audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLEAN = {"name": "aiohttp", "version": "3.14.5", "vulns": []}
SKIPPED = {"name": "yarl", "skip_reason": "Dependency not found and could not be audited: yarl (1.25.1)"}
KNOWN = {"name": "jinja2", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["3.1"], "aliases": []}]}


def report(*dependencies: object) -> str:
    return json.dumps({"dependencies": dependencies, "fixes": []})


@pytest.mark.parametrize(
    ("reports", "is_required", "code", "said"),
    [
        ({"pypi": report(CLEAN)}, False, 0, "1 dependencies looked up (pypi), 0 known"),
        ({"pypi": report(CLEAN, SKIPPED)}, False, 0, "NOT LOOKED UP, as pypi does not know them: yarl"),
        ({"pypi": report(CLEAN, KNOWN)}, False, 1, "jinja2 2.0: CVE-1, fixed in 3.1"),
        ({"pypi": report(SKIPPED), "osv": report(KNOWN)}, False, 1, "1 dependencies looked up (osv), 1 known"),
        ({"pypi": report(SKIPPED)}, False, 0, "NOT DONE"),
        ({"pypi": "Traceback (most recent call last)"}, False, 0, "NOT DONE"),
        ({}, False, 0, "this is no all-clear"),
        ({}, True, 1, "NOT DONE"),
    ],
)
def test_the_audit_says_what_it_did(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reports: dict[str, str],
    is_required: bool,
    code: int,
    said: str,
) -> None:
    audit = load_audit()
    monkeypatch.setattr(audit, "ask", lambda service: reports.get(service, ""))
    monkeypatch.setenv("AUDIT_REQUIRED", "1" if is_required else "")
    assert audit.main() == code
    assert said in capsys.readouterr().out


def locked(name: str) -> dict[str, Version]:
    """Each package that a lock file names, all of them with hashes."""
    text = (ROOT / name).read_text(encoding="utf-8")
    entries = re.findall(
        r"(?m)^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^ ;]+)[^\n]*\\\n((?: +--hash=sha256:[0-9a-f]{64}[ \\]*\n)+)", text
    )
    requirements = re.findall(r"(?m)^[A-Za-z0-9].*", text)
    assert len(entries) == len(requirements), "each is pinned, and has hashes"
    return {canonicalize_name(package): Version(version) for package, version, _ in entries}


def test_the_locks_name_every_dependency_at_a_version_that_is_allowed_with_its_hashes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    run, develop = locked("requirements.lock"), locked("requirements-dev.lock")
    assert run.items() <= develop.items(), "what is tested is what runs"
    wanted = [(run, text) for text in (*project["project"]["dependencies"], *project["dependency-groups"]["build"])]
    for extra in ("s3", "test", "dev", "bench"):
        wanted += [(develop, text) for text in project["project"]["optional-dependencies"][extra]]
    for lock, text in wanted:
        requirement = Requirement(text)
        if requirement.name != project["project"]["name"]:
            version = lock[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, f"{text}: {version} is locked; run `make lock`"


def test_the_locks_name_no_place_to_take_packages_from() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?:|file:|index|find-links| @ |^-e|^--(?!hash)", text, re.MULTILINE), name
