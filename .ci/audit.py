"""Look the locked dependencies up among the known vulnerabilities, and say what came of it.

Exit 0: nothing is known of any of them; or no service could be asked, which is said in so many words.
Exit 1: something is known (each with its fix); or no service could be asked, and `AUDIT_REQUIRED` is set.

pip-audit calls it success when its service knows none of the packages, as a mirror that has nothing but the files does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parents[1] / "requirements-dev.lock"  # all of `requirements.lock` is in it
SERVICES = ("pypi", "osv")  # where the first is not reachable the next is asked
ACCEPTED: dict[str, str] = {}  # id of a vulnerability → why it cannot be used against us; to be emptied at each fix
_SECONDS_MAX = 90  # for all of them; a network that swallows what it is sent costs this much and no more


def ask(service: str, lock: Path = LOCK) -> str:
    """What pip-audit reports; not JSON if it could not ask."""
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service, "--requirement", str(lock)]
    command += ["--require-hashes", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_MAX).stdout  # noqa: S603
    except subprocess.TimeoutExpired:
        return ""


def read(report: str) -> tuple[list[str], list[str], list[str]]:
    """The names that were looked up, those that were not, and what is known and not accepted."""
    try:
        dependencies: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError):
        return [], [], []
    asked = [dependency for dependency in dependencies if "skip_reason" not in dependency]
    known = [
        f"{dependency['name']} {dependency['version']}: {vulnerability['id']}, "
        f"fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for dependency in asked
        for vulnerability in dependency["vulns"]
        if vulnerability["id"] not in ACCEPTED
    ]
    skipped = [dependency["name"] for dependency in dependencies if "skip_reason" in dependency]
    return [dependency["name"] for dependency in asked], skipped, known


def main() -> int:
    for service in SERVICES:
        asked, skipped, known = read(ask(service))
        if asked:
            for line in known:
                print(f"audit: {line}")
            print(f"audit: {len(asked)} dependencies looked up ({service}), {len(known)} known vulnerabilities")
            if skipped:
                print(f"audit: NOT LOOKED UP, as {service} does not know them: {', '.join(skipped)}")
            return 1 if known else 0
    print(f"audit: NOT DONE. None of {', '.join(SERVICES)} could be asked; this is no all-clear.")
    return 1 if os.environ.get("AUDIT_REQUIRED") else 0


if __name__ == "__main__":
    sys.exit(main())
