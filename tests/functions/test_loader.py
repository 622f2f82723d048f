"""From an app directory to its schema and registry, whole or not at all."""

import importlib
import os
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import DeveloperError, RegistryError, SchemaError
from engine.functions.loader import App, Installed, install, installed, load_app
from engine.limits import Limits
from tests.functions.apps import write_app


@pytest.fixture(autouse=True)
def _modules_as_before() -> Iterator[None]:
    """Other tests have an app of their own loaded."""
    modules, finders = dict(sys.modules), list(sys.meta_path)
    yield
    for name in [name for name in sys.modules if name not in modules]:
        del sys.modules[name]
    sys.modules.update(modules)
    sys.meta_path[:] = finders


def load(directory: Path) -> App:
    return load_app(directory, Limits())


def answer(app: App, path: str = "m:get") -> object:
    """What a plain function of the app returns."""
    return app.registry.by_path[path].callable(None)


def get(value: object) -> str:
    return f"@query\ndef get(ctx) -> Any: return {value!r}\n"


def test_an_app_is_its_tables_and_its_decorated_functions(tmp_path: Path) -> None:
    app = load(
        write_app(tmp_path, {"m": get(1), "live/quiz/show": get(2), "live/_helpers": get(3), "_drafts/x": get(4)})
    )
    assert sorted(app.registry.by_path) == ["live/quiz/show:get", "m:get"]
    assert {name for name in app.schema.tables_by_name if name[0] != "_"} == {"items", "names"}
    assert app.directory == tmp_path.resolve()


def test_modules_import_each_other_and_their_helpers_as_functions(tmp_path: Path) -> None:
    modules = {
        "m": "from functions._helpers import double\nfrom functions.live.quiz import TWO\n"
        "@query\ndef get(ctx) -> int: return double(TWO)\n",
        "_helpers": "def double(n): return 2 * n\n",
        "live/quiz": "TWO = 2\n",
    }
    assert answer(load(write_app(tmp_path, modules))) == 4


def test_a_function_may_import_a_module_of_the_app_when_it_runs(tmp_path: Path) -> None:
    modules = {
        "m": "@query\ndef get(ctx) -> int:\n    from functions._late import N\n    return N\n",
        "_late": "N = 1\n",
    }
    app = load(write_app(tmp_path, modules))
    assert str(tmp_path) not in sys.path
    assert answer(app) == 1


def test_a_reload_sees_an_edit_within_the_same_second_of_equal_size(tmp_path: Path) -> None:
    source = write_app(tmp_path, get("a")) / "functions" / "m.py"
    os.utime(source, (1e9, 1e9))
    py_compile.compile(str(source))  # as an editor or another run may leave it
    assert answer(load(tmp_path)) == "a"
    write_app(tmp_path, get("b"))
    os.utime(source, (1e9, 1e9))
    assert answer(load(tmp_path)) == "b"


def test_loading_leaves_no_byte_code_behind(tmp_path: Path) -> None:
    load(write_app(tmp_path, get(1)))
    assert not list(tmp_path.rglob("*.pyc"))


def test_a_reload_forgets_modules_that_are_gone_and_helpers_as_they_were(tmp_path: Path) -> None:
    load(write_app(tmp_path, {"m": "from functions._h import N\n" + get(1), "_h": "N = 1", "gone": get(2)}))
    app = load(
        write_app(tmp_path, {"m": "from functions._h import N\n@query\ndef get(ctx) -> int: return N", "_h": "N = 2"})
    )
    assert answer(app) == 2
    assert "functions.gone" not in sys.modules


BROKEN = {
    "syntax": ("def broken(:\n", "SyntaxError"),
    "name": ("nothing\n", "NameError: name 'nothing' is not defined"),
    "missing": ("import functions.nowhere\n", "No module named 'functions.nowhere'"),
    "exit": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "null bytes": ("\0\n", "null bytes"),
    "own error": ("raise AppError({'code': 'X'})\n", "AppError"),
    "signature": ("@query\ndef get(ctx, limit): ...\n", "parameter 'limit' has no annotation"),
    "names meet": (get(1) + "@query\ndef get_it(ctx): ...\n@query\ndef getIt(ctx): ...\n", "the same name to clients"),
    "second table": ("@query\ndef get(ctx, id: Id['Nobody']): ...\n", "Nobody"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_module_is_an_error_that_names_it_and_leaves_everything_as_it_was(tmp_path: Path, kind: str) -> None:
    source, message = BROKEN[kind]
    before = load(write_app(tmp_path, {"a": get("old"), "m": get("old")}))
    modules, path, finders = dict(sys.modules), list(sys.path), list(sys.meta_path)
    write_app(tmp_path, {"a": get("new"), "m": source})
    with pytest.raises(RegistryError) as refusal:
        load(tmp_path)
    assert message in str(refusal.value)
    assert "m" in str(refusal.value).split(":")[0]
    app_modules = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] in ("schema", "functions")
    }
    assert app_modules.items() <= modules.items()
    assert (sys.path, sys.meta_path) == (path, finders)
    assert answer(before) == "old"


def test_modules_that_are_kept_are_taken_as_they_are_and_the_others_imported(tmp_path: Path) -> None:
    load(write_app(tmp_path, {"m": get("old")}))
    schema = sys.modules["schema"]
    write_app(tmp_path, {"m": get("new"), "n": get("new")})
    kept = load_app(tmp_path, Limits(), keeps_modules=True)
    assert (answer(kept), answer(kept, "n:get")) == ("old", "new")
    assert sys.modules["schema"] is schema


def test_an_app_that_is_installed_again_has_its_own_modules_and_finds_more_of_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_app(tmp_path / name, {"m": get(name), "later": f"name = {name!r}\n"})
    load(tmp_path / "one")
    one = installed()
    assert one.finder is not None
    load(tmp_path / "two")
    install(Installed(one.finder, {name: module for name, module in one.modules.items() if "later" not in name}))
    assert importlib.import_module("functions.m") is one.modules["functions.m"]
    assert importlib.import_module("functions.later").name == "one"


def test_the_message_shows_the_line_that_failed(tmp_path: Path) -> None:
    write_app(tmp_path, {"live/quiz": "from functions._h import N", "_h": "def f():\n    return 1 / 0\nN = f()\n"})
    with pytest.raises(RegistryError) as refusal:
        load(tmp_path)
    text = str(refusal.value)
    assert text.startswith("functions/live/quiz.py does not import: ZeroDivisionError: division by zero")
    assert "return 1 / 0" in text
    assert "importlib" not in text


def test_a_broken_schema_is_a_schema_error(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"schema\.py does not import: ZeroDivisionError"):
        load(write_app(tmp_path, get(1), schema="1 / 0"))
    with pytest.raises(SchemaError, match="nowhere"):
        load(
            write_app(
                tmp_path,
                get(1),
                schema="from engine import Table, index\nclass A(Table, name='as'):\n    by = index('nowhere')\n",
            )
        )


def test_a_directory_without_a_schema_is_no_app(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"has no schema\.py. An app is a directory with schema\.py and functions/"):
        load(tmp_path)


def test_an_app_without_functions_is_an_app(tmp_path: Path) -> None:
    app = load(write_app(tmp_path, {}))
    assert app.registry.by_path == {}


def test_ctrl_c_while_loading_goes_on_and_changes_nothing(tmp_path: Path) -> None:
    before = load(write_app(tmp_path, get("old")))
    write_app(tmp_path, "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert sys.modules["functions.m"].get is before.registry.by_path["m:get"].callable


@pytest.mark.parametrize("other", ["functions/__init__.py", "functions/m.py", "functions.py", "schema/__init__.py"])
def test_another_package_of_that_name_is_never_taken_for_the_app(
    tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / other).parent.mkdir(parents=True)
    (elsewhere / other).write_text("def get(ctx): return 'theirs'\n")
    monkeypatch.syspath_prepend(str(elsewhere))
    assert answer(load(write_app(tmp_path / "app", get("ours")))) == "ours"


def test_a_module_that_only_another_package_has_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere" / "functions").mkdir(parents=True)
    (tmp_path / "elsewhere" / "functions" / "_theirs.py").write_text("N = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    with pytest.raises(DeveloperError, match=r"No module named 'functions\._theirs'"):
        load(write_app(tmp_path / "app", "from functions._theirs import N\n"))


def test_a_package_file_of_the_app_is_run_and_is_no_module_of_functions(tmp_path: Path) -> None:
    app = load(
        write_app(
            tmp_path, {"__init__": "N = 7\n", "m": "from functions import N\n@query\ndef get(ctx) -> int: return N"}
        )
    )
    assert list(app.registry.by_path) == ["m:get"]
    assert answer(app) == 7
