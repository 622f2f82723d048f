"""The folder is the architecture: which module may import what."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "engine"

ORDER = (
    "errors limits clock events faults ids ranges values identity schema storage transaction functions live sync "
    "auth config observe backend engine operate client server dashboard codegen cli dev testing pytest_plugin"
).split()

IO = "asyncio aiohttp socket selectors ssl sqlite3 threading"

# Which module must not import what; a path may match several lines. `errors` of ours is written `engine.errors`.
MUST_NOT_IMPORT = [
    ("errors.py limits.py clock.py events.py", "engine"),
    ("values* ids.py identity.py ranges.py schema*", "sqlite3 asyncio"),
    ("storage/connections.py storage/ddl.py storage/rows.py storage/scans.py storage/search.py", "asyncio"),
    ("storage/*", "engine.transaction"),
    ("transaction/read_set.py transaction/write_set.py", "sqlite3 asyncio"),
    ("transaction/*", "engine.functions engine.live"),
    ("functions/*", "engine.live engine.sync aiohttp watchfiles"),
    ("live/invalidation.py live/search_entries.py", "asyncio sqlite3"),
    ("live/*", "engine.sync aiohttp"),
    ("sync/*", f"{IO} engine.storage engine.transaction engine.functions"),
    ("auth/*", "sqlite3 engine.functions"),
    ("config.py backend.py engine.py operate/*", "aiohttp"),
    ("dashboard/* codegen.py", "engine.storage engine.transaction"),
    ("server/*", "sqlite3"),
]

# What only some modules may import.
ONLY_IN = [
    ("time uuid", "clock.py"),
    ("random", "clock.py functions/context.py"),  # there as the type of `ctx.random`
    ("sqlite3", "storage/*"),
    ("aiosqlite", "storage/maintenance.py"),
    ("aiohttp", "server/* auth/fetching.py"),
    ("watchfiles", "dev.py"),
    ("engine.observe", "observe/* backend.py engine.py operate/* server/* dashboard/* cli.py dev.py"),
    ("engine.testing", "testing/* pytest_plugin.py"),
    ("pytest pytest_asyncio", "pytest_plugin.py"),
]

CLIENT_MAY_IMPORT = "engine.client engine.errors engine.values engine.sync.protocol"


def modules() -> list[str]:
    """Every module of the engine, as its path below `engine/`; the package root and `__main__` are not in a layer."""
    paths = [path.relative_to(ENGINE) for path in ENGINE.rglob("*.py")]
    return sorted(path.as_posix() for path in paths if path.as_posix() not in ("__init__.py", "__main__.py"))


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Each imported module with its line; for `from a import b` both `a` and `a.b`, as `b` may be a module."""
    path = ENGINE / module
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name, `from engine.x import`"
            if node.module != "engine":
                yield str(node.module), node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def matches(module: str, patterns: str) -> bool:
    return any(fnmatch(module, pattern) for pattern in patterns.split())


def is_within(name: str, packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages.split())


def layer_of(module: str) -> str:
    layer = re.split(r"[/.]", module)[0]
    assert layer in ORDER, f"place it: {layer} is not in ORDER"
    return layer


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_the_layers_before_it(module: str) -> None:
    layer = layer_of(module)
    for name, line in imports(module):
        if name.startswith("engine."):
            imported = name.split(".")[1]
            assert imported in ORDER, f"line {line}: import from the module that owns {imported!r}, not from the root"
            assert ORDER.index(imported) <= ORDER.index(layer), f"line {line}: {imported} comes after {layer}"


@pytest.mark.parametrize("module", modules())
def test_a_module_does_not_import_what_is_not_its_business(module: str) -> None:
    forbidden = " ".join(packages for patterns, packages in MUST_NOT_IMPORT if matches(module, patterns))
    is_client = matches(module, "client/*")
    for name, line in imports(module):
        assert not is_within(name, forbidden), f"line {line}: {name}"
        if is_client and is_within(name, "engine"):
            assert is_within(name, CLIENT_MAY_IMPORT), f"line {line}: a client knows only the protocol, not {name}"


@pytest.mark.parametrize("module", modules())
def test_time_storage_and_sockets_each_have_one_place(module: str) -> None:
    for name, line in imports(module):
        for packages, patterns in ONLY_IN:
            if is_within(name, packages):
                assert matches(module, patterns), f"line {line}: {name} is only for {patterns or 'apps and tests'}"
