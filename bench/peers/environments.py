"""What peers need, installed beside them into directories that git ignores, anew when the list has changed."""

import shutil
import subprocess
import sys
from pathlib import Path


def python_environment(directory: Path) -> Path:
    """The programs of an environment with what `requirements.txt` lists."""
    wanted, place = directory / "requirements.txt", directory / ".venv"
    if _is_stale(wanted, place):
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        install = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--requirement", str(wanted)], check=True)
        shutil.copy(wanted, place)
    return place / "bin"


def node_environment(directory: Path) -> Path:
    """Node itself, with what `package.json` lists installed."""
    wanted, place = directory / "package.json", directory / "node_modules"
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise RuntimeError(f"{directory.name} needs Node 20 or newer, with npm")
    if _is_stale(wanted, place):
        install = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel", "error"]
        subprocess.run(install, cwd=directory, check=True)
        shutil.copy(wanted, place)
    return Path(node)


def _is_stale(wanted: Path, place: Path) -> bool:
    installed = place / wanted.name
    return not installed.exists() or installed.read_bytes() != wanted.read_bytes()
