"""From an app directory to its schema and registry.

Invariants
  1. Loading changes nothing until it has succeeded: after a failure `sys.modules` is as it was.
  2. An app is loaded whole, from source: no module of an older version stays, no stale byte code is read.

The app's modules are `schema` and `functions.…`, as its own imports name them. One app at a time owns these names: the
last one that was loaded or installed.
"""

import importlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import msgspec

from engine.errors import ConfigError, DeveloperError, RegistryError, SchemaError
from engine.functions.http import routes_of
from engine.functions.jobs import SYSTEM_TABLES
from engine.functions.policies import deny_all, policies_of
from engine.functions.rate_limits import RateOverride, rate_limits_of
from engine.functions.registry import Registry, functions_of
from engine.functions.settings import settings_of
from engine.functions.triggers import triggers_of
from engine.limits import Limits
from engine.schema import Schema, Table, compile_schema

_SCHEMA, _FUNCTIONS = "schema", "functions"


class App(msgspec.Struct, frozen=True):
    """One version of an app."""

    directory: Path
    schema: Schema
    registry: Registry


class Installed(msgspec.Struct, frozen=True):
    """What the names of an app's modules stand for."""

    finder: "AppFinder | None"  # of modules that are missing; None: no app has been loaded
    modules: dict[str, ModuleType]  # by name


def load_app(
    directory: Path,
    limits: Limits,
    rate_overrides: Mapping[str, RateOverride] | None = None,
    *,
    keeps_modules: bool = False,
    denied: tuple[str, ...] = (),
) -> App:
    """Import `schema.py` and `functions/` and compile them. Raises DeveloperError that says where it is wrong.

    `denied` are tables that clients reach only by a policy, or "*" for all. `keeps_modules` takes the app's modules
    that are installed as they are, and imports the others.
    """
    directory = directory.resolve()
    if not (directory / f"{_SCHEMA}.py").is_file():
        raise SchemaError(
            f"{directory} has no {_SCHEMA}.py. An app is a directory with {_SCHEMA}.py and {_FUNCTIONS}/."
        )
    before = installed()
    install(Installed(AppFinder(directory), before.modules if keeps_modules else {}))
    sys.path.insert(0, str(directory))  # for what else lies there
    try:
        schema = _load_schema(directory, limits)
        modules = {
            name: _import(f"{_FUNCTIONS}.{name.replace('/', '.')}", directory)
            for name in _module_names(directory / _FUNCTIONS)
        }
        callable_modules = {name: module for name, module in modules.items() if not _holds_helpers(name)}
        functions = functions_of(callable_modules, limits=limits, tags=schema.tag_of_class)
        settings = settings_of([sys.modules[_SCHEMA], *modules.values()])
        registry = Registry(
            functions,
            rate_limits=rate_limits_of(modules, rate_overrides),
            routes=routes_of(modules, limits=limits, tags=schema.tag_of_class, settings=settings),
            settings=settings,
        )
        registry.policies = deny_all(_tables_named(denied, schema)) | policies_of(modules, schema.table_of, registry)
        registry.triggers = triggers_of(modules, schema.table_of, limits)
        return App(directory, schema, registry)
    except BaseException:
        install(before)
        raise
    finally:
        sys.path.remove(str(directory))


def installed() -> Installed:
    """The modules that have the names now."""
    finders = [finder for finder in sys.meta_path if isinstance(finder, AppFinder)]
    modules = {name: module for name, module in sys.modules.items() if _is_app_module(name)}
    return Installed(finders[0] if finders else None, modules)


def install(wanted: Installed) -> None:
    """Give the names to these modules."""
    for name in installed().modules:
        del sys.modules[name]
    sys.modules.update(wanted.modules)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, AppFinder)]
    if wanted.finder is not None:  # it stays: functions may import when they run
        sys.meta_path.insert(0, wanted.finder)


def _tables_named(names: tuple[str, ...], schema: Schema) -> list[str]:
    own = [name for name, table in schema.tables_by_name.items() if not table.is_system]
    for name in names:
        if name != "*" and name not in own:
            raise ConfigError(
                f"policies.deny: {name!r} is no table of this app, and not '*' for all. Its tables are "
                f"{', '.join(sorted(own))}."
            )
    return own if "*" in names else list(names)


def _load_schema(directory: Path, limits: Limits) -> Schema:
    module = _import(_SCHEMA, directory)
    tables = {
        value: None
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Table) and value is not Table
    }
    return compile_schema([*tables, *(table for table in SYSTEM_TABLES if table not in tables)], limits)


def _module_names(directory: Path) -> list[str]:
    """`live/quiz` for `functions/live/quiz.py`; all of them, so that no policy or trigger is missed."""
    names = []
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).with_suffix("").parts
        if not any(part.startswith((".", "__")) for part in parts):
            names.append("/".join(parts))
    return sorted(names, key=_holds_helpers)  # those first that can be called: errors name them


def _holds_helpers(module: str) -> bool:
    """Whether nothing in it can be called: it or a folder around it begins with `_`."""
    return any(part.startswith("_") for part in module.split("/"))


def _import(name: str, directory: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except DeveloperError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.filename.startswith(str(directory))]
        where = "".join(traceback.format_list(inside)).rstrip()
        text = "".join(traceback.format_exception_only(error)).rstrip()
        kind = SchemaError if name == _SCHEMA else RegistryError
        raise kind(f"{name.replace('.', '/')}.py does not import: {text}\n{where}") from error


class AppFinder(MetaPathFinder):
    """Finds the app's modules in its own directory, whatever other packages have their names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _is_app_module(name):
            return None
        folder = self.directory.joinpath(*name.split(".")[:-1])
        return FileFinder(str(folder), (_SourceLoader, [".py"])).find_spec(name)


class _SourceLoader(SourceFileLoader):
    """Neither reads nor writes byte code: it tells versions apart by whole seconds and sizes (invariant 2)."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError("byte code is not wanted")  # how `SourceLoader.get_code` is told


def _is_app_module(name: str) -> bool:
    return name in (_SCHEMA, _FUNCTIONS) or name.startswith(f"{_FUNCTIONS}.")
