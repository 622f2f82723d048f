"""From an app directory to its schema and registry.

Invariants
  1. Loading changes nothing until it has succeeded: after a failure `sys.modules` is as it was.
  2. An app is loaded whole, from source: no module of an older version stays, no stale byte code is read.

The app's modules are `schema` and `functions.…`, as its own imports name them. One app is loaded at a time; the last
one that was loaded owns these names.
"""

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

import msgspec

from engine.errors import DeveloperError, RegistryError, SchemaError
from engine.functions.jobs import SYSTEM_TABLES
from engine.functions.registry import Registry, functions_of
from engine.limits import Limits
from engine.schema import Schema, Table, compile_schema

_SCHEMA, _FUNCTIONS = "schema", "functions"


class App(msgspec.Struct, frozen=True):
    """One version of an app."""

    directory: Path
    schema: Schema
    registry: Registry


def load_app(directory: Path, limits: Limits) -> App:
    """Import `schema.py` and `functions/` and compile them. Raises DeveloperError that says where it is wrong."""
    directory = directory.resolve()
    if not (directory / f"{_SCHEMA}.py").is_file():
        raise SchemaError(
            f"{directory} has no {_SCHEMA}.py. An app is a directory with {_SCHEMA}.py and {_FUNCTIONS}/."
        )
    replaced = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_app_module(name)}
    writes_byte_code, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # invariant 2
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        schema = _load_schema(directory, limits)
        modules = {
            name: _import(f"{_FUNCTIONS}.{name.replace('/', '.')}", directory)
            for name in _function_modules(directory / _FUNCTIONS)
        }
        functions = functions_of(modules, limits=limits, tags=schema.tag_of_class)
        return App(directory, schema, Registry(functions))
    except BaseException:
        for name in [name for name in sys.modules if _is_app_module(name)]:
            del sys.modules[name]
        sys.modules.update(replaced)
        raise
    finally:
        sys.path.remove(str(directory))
        sys.dont_write_bytecode = writes_byte_code


def _load_schema(directory: Path, limits: Limits) -> Schema:
    module = _import(_SCHEMA, directory)
    tables = {
        value: None
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Table) and value is not Table
    }
    return compile_schema([*tables, *(table for table in SYSTEM_TABLES if table not in tables)], limits)


def _function_modules(directory: Path) -> list[str]:
    """`live/quiz` for `functions/live/quiz.py`; modules and folders that begin with `_` hold helpers."""
    names = []
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).with_suffix("").parts
        if not any(part.startswith(("_", ".")) for part in parts):
            names.append("/".join(parts))
    return names


def _import(name: str, directory: Path) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except DeveloperError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.filename.startswith(str(directory))]
        where = "".join(traceback.format_list(inside)).rstrip()
        text = "".join(traceback.format_exception_only(error)).rstrip()
        kind = SchemaError if name == _SCHEMA else RegistryError
        raise kind(f"{name.replace('.', '/')}.py does not import: {text}\n{where}") from error
    source = getattr(module, "__file__", None) or ""
    if not Path(source).resolve().is_relative_to(directory):
        raise RegistryError(
            f"{name} was imported from {source or 'somewhere else'}, not from {directory}. "
            f"Another package has that name: rename it or uninstall it."
        )
    return module


def _is_app_module(name: str) -> bool:
    return name in (_SCHEMA, _FUNCTIONS) or name.startswith(f"{_FUNCTIONS}.")
