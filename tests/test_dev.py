"""New code on save: what counts as a save, and what the author is told."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rich.console import Console
from watchfiles import Change

from engine.dev import _GROUPED_MS_MAX, _QUIET_MS, Saves, banner, explain, is_source, reload_on_save
from engine.errors import RegistryError
from engine.functions.registry import Registry

WAIT_SECONDS_MAX = 10  # for the file system to tell us


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "functions" / "live").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.fixture
async def saves(app: Path) -> AsyncIterator[Saves]:
    async with Saves(app, asyncio.Event()) as watching:
        yield watching


async def saved(saves: Saves) -> frozenset[str]:
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        return await saves.next()


@pytest.mark.parametrize("path", ["schema.py", "functions/chat.py", "functions/live/quiz.py", "engine.toml"])
def test_code_and_configuration_count(path: str) -> None:
    assert is_source(Change.modified, f"/app/{path}")


@pytest.mark.parametrize(
    "path",
    "data/engine.db data/engine.db-wal data/engine.db.lock functions/__pycache__/chat.cpython-311.pyc "
    "functions/.chat.py.swp functions/.#chat.py functions/chat.py~ functions/4913 README.md".split(),
)
def test_other_files_do_not(path: str) -> None:
    assert not is_source(Change.modified, f"/app/{path}")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["schema.py", "functions/chat.py", "functions/live/quiz.py"])
async def test_a_save_is_noticed(app: Path, saves: Saves, path: str) -> None:
    (app / "data" / "engine.db").write_bytes(b"x")
    (app / path).write_text("x = 1")
    assert await saved(saves) == {path}


@pytest.mark.slow
async def test_a_new_directory_is_noticed_with_what_is_in_it(app: Path, saves: Saves) -> None:
    for name in ("__pycache__", ".git", "new"):
        (app / "functions" / name).mkdir()
        (app / "other").mkdir(exist_ok=True)
    (app / "functions" / "new" / "more.py").write_text("x = 1")
    assert {"functions/new"} <= await saved(saves) <= {"functions/new", "functions/new/more.py"}


@pytest.mark.slow
async def test_an_editor_that_renames_over_the_file_is_noticed(app: Path, saves: Saves) -> None:
    (app / "functions" / "chat.py.tmp").write_text("x = 1")
    (app / "functions" / "chat.py.tmp").rename(app / "functions" / "chat.py")
    assert await saved(saves) == {"functions/chat.py"}


def test_a_save_is_live_within_a_second() -> None:
    assert _QUIET_MS < _GROUPED_MS_MAX <= 250, "the rest is loading and re-running"


@pytest.mark.slow
async def test_there_are_no_more_saves_once_it_stops(app: Path) -> None:
    stop = asyncio.Event()
    async with asyncio.timeout(WAIT_SECONDS_MAX), Saves(app, stop) as watching:
        waiting = asyncio.create_task(watching.next())
        await asyncio.sleep(0)
        stop.set()
        assert await waiting == frozenset()
        assert await watching.next() == frozenset()


class FakeSaves(Saves):
    """Saves that a test makes up."""

    def __init__(self, *saved: frozenset[str]) -> None:
        self._saved = list(saved)

    async def next(self) -> frozenset[str]:
        return self._saved.pop(0) if self._saved else frozenset()


async def said_on(names: set[str], error: Exception | None = None) -> tuple[str, int]:
    """What the author reads after a save, and how often the engine reloaded."""
    reloaded: list[None] = []

    async def reload() -> None:
        reloaded.append(None)
        if error is not None:
            raise error

    console = Console(file=io.StringIO(), width=40)
    await reload_on_save(FakeSaves(frozenset(names)), reload, console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split()), len(reloaded)


async def test_new_code_is_announced() -> None:
    said, reload_count = await said_on({"schema.py", "functions/chat.py"})
    assert said == "functions/chat.py, schema.py: the new code is live."
    assert reload_count == 1


async def test_an_error_of_the_app_is_shown_as_it_is_and_does_not_end_the_watch() -> None:
    said, _ = await said_on(
        {"functions/chat.py"}, RegistryError("functions/chat.py does not import: [bold] SyntaxError")
    )
    assert said == (
        "functions/chat.py: not loaded, the old code goes on serving. "
        "functions/chat.py does not import: [bold] SyntaxError"
    )


async def test_any_other_error_is_shown_with_its_traceback() -> None:
    said, _ = await said_on({"functions/chat.py"}, ZeroDivisionError("by zero"))
    assert "Traceback" in said
    assert "ZeroDivisionError: by zero" in said
    assert explain(RegistryError("short")) == "short"


async def test_a_change_of_the_configuration_is_live_as_far_as_it_is_the_apps_own() -> None:
    said, reload_count = await said_on({"engine.toml"})
    assert said == (
        "engine.toml: the new settings are live. What is not under [app] needs a new start: stop and start again."
    )
    assert reload_count == 1


def test_the_banner_says_what_to_open_and_type(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    database = tmp_path / "engine.db"
    text = banner("http://127.0.0.1:3210", app=tmp_path, database=database, registry=Registry(()))
    console.print(text, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert any(line.strip() == "http://127.0.0.1:3210" for line in lines)
    assert any('new ConvexClient("http://127.0.0.1:3210")' in line for line in lines)
    assert any("http://127.0.0.1:3210/dev/token" in line and "alice" in line for line in lines), "in one line, to copy"
