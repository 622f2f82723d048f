"""Which app a test is about, and its modules.

Invariants
  1. In one process the modules of an app are imported once: a table class that a test module imports is the one that
     the engine under test gives out. (A process that has died is the exception: its modules went with it.)
  2. Several apps can be tested in one process, one at a time: `use` says whose modules `schema` and `functions` are.
"""

from pathlib import Path
from types import ModuleType

from engine.functions.loader import AppFinder, Installed, install, installed

_modules_by_app: dict[Path, dict[str, ModuleType]] = {}  # as `sys.modules`, one for the process


def find_app(path: Path) -> Path | None:
    """The nearest directory at or above a path that holds an app: `schema.py` and `functions/`."""
    for directory in (path, *path.parents):
        if (directory / "schema.py").is_file() and (directory / "functions").is_dir():
            return directory
    return None


def use(app: Path) -> Path:
    """From now on `schema` and `functions` are the modules of this app, imported on demand; gives its whole path."""
    app = app.resolve()
    install(Installed(AppFinder(app), _modules_by_app.get(app, {})))
    return app


def keep() -> None:
    """Remember what has been imported since `use`."""
    now = installed()
    assert now.finder is not None, "`use` comes first"
    _modules_by_app[now.finder.directory] = now.modules
