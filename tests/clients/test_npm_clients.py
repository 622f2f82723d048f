"""The official npm clients: runs the test files beside this one in Node, each over a server of its own.

`npm test` in this directory runs the same ones (with `PYTHON` naming the interpreter that has the engine's packages).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).resolve().parent
TEST_FILES = sorted(path.name for pattern in ("*.test.ts", "*.test.tsx") for path in DIRECTORY.glob(pattern))
INSTALL_SECONDS_MAX, RUN_SECONDS_MAX = 300, 120

pytestmark = pytest.mark.slow


def run(command: Sequence[str], *, seconds_max: float) -> None:
    """Run a command here; fails with all that it printed."""
    environment = {**os.environ, "PYTHON": sys.executable, "NO_COLOR": "1"}
    with subprocess.Popen(
        command,
        cwd=DIRECTORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a run that hangs can be ended with everything that it started
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds_max)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"{' '.join(command)} took more than {seconds_max} s:\n{output}", pytrace=False)
    if process.returncode != 0:
        pytest.fail(f"{' '.join(command)} ended with code {process.returncode}:\n{output}", pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """What `package-lock.json` names, installed; again when it has changed."""
    installed = DIRECTORY / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (DIRECTORY / "package-lock.json").stat().st_mtime:
        run(["npm", "ci"], seconds_max=INSTALL_SECONDS_MAX)


@pytest.mark.parametrize("file", TEST_FILES)
def test_the_npm_clients_work_with_the_server(file: str) -> None:
    run(
        ["node", "--enable-source-maps", "--import", "tsx", "--test", "--test-reporter=spec", file],
        seconds_max=RUN_SECONDS_MAX,
    )


def test_the_npm_tests_have_no_type_errors() -> None:
    run(["npm", "run", "--silent", "types"], seconds_max=RUN_SECONDS_MAX)


def test_the_lock_file_names_no_registry() -> None:
    """It installs from whichever registry the machine uses; the hashes say that it is the same package."""
    lock = (DIRECTORY / "package-lock.json").read_text()
    assert '"resolved"' not in lock
    assert '"integrity"' in lock
