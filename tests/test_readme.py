"""What the README and its guide say is so: errors and refusals are listed, and the examples run.

A fenced block of Python that begins with the name of a file, as in `# schema.py`, `# functions/notes.py` or
`# tests/test_notes.py`, and one of TOML that begins with `# engine.toml`, are files of an app. The files under one
heading are one app: with a `schema.py` of its own it stands alone, without one it is laid over the README's first app.
Later blocks of one file go on where the earlier ones end. Its tests run with the pytest plugin; without tests it is
opened. A block of the console that begins with `$ engine` has what these commands print in that app (`…` is any text).
Other blocks of Python are only compiled.
"""

import ast
import asyncio
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import RegistryError, RequestError, SchemaError
from engine.testing import open_test_engine

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = README + (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")  # laid over the README's first app
CONSOLE = "console"  # the path of what is typed in an app

_HEADING = re.compile(r"#{1,6} +(.+?) *#*")
_FENCE = re.compile(r"(`{3,}) *(\w*).*")
_FILE = re.compile(r"# (schema\.py|functions/[\w/]+\.py|(?:tests/)?(?:test_\w+|conftest)\.py|engine\.toml)\b.*")

_COMMAND = "$ engine "

App = dict[str, str]  # contents by path


def blocks_of(markdown: str) -> Iterator[tuple[str, str, str]]:
    """Each fenced block: the heading above it, its language, and its text."""
    heading, fence, language, lines = "", "", "", list[str]()
    for line in markdown.splitlines():
        if fence:
            if line.rstrip() == fence:
                yield heading, language, "".join(f"{line}\n" for line in lines)
                fence, lines = "", []
            else:
                lines.append(line)
        elif opening := _FENCE.fullmatch(line):
            fence, language = opening.groups()
        elif title := _HEADING.fullmatch(line):
            heading = title[1]
    assert not fence, f"a block under {heading!r} has no end"


def apps_of(markdown: str) -> dict[str, App]:
    """The app under each heading that has one, whole."""
    apps: dict[str, App] = {}
    for heading, language, text in blocks_of(markdown):
        path = CONSOLE if language == "console" and text.startswith(_COMMAND) else None
        if language in ("python", "toml") and (name := _FILE.match(text)):
            path = name[1]
        if path is not None:
            app = apps.setdefault(heading, {})
            app[path] = app.get(path, "") + text
    apps = {heading: app for heading, app in apps.items() if app.keys() != {CONSOLE}}
    first: App = {path: text for path, text in next(iter(apps.values()), {}).items() if path != CONSOLE}
    return {heading: app if "schema.py" in app else {**first, **app} for heading, app in apps.items()}


def fragments_of(markdown: str) -> Iterator[str]:
    """Python that is no file."""
    for _, language, text in blocks_of(markdown):
        if language == "python" and not _FILE.match(text):
            yield text


def run_app(app: App, pytester: pytest.Pytester) -> None:
    """Its tests pass and its commands print what they should; or, if it has none, it opens.

    Raises DeveloperError, AssertionError.
    """
    for path, text in app.items():
        if path == CONSOLE:
            continue
        file = pytester.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    if any("test_" in path for path in app):
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
        assert result.ret == pytest.ExitCode.OK, "its tests fail"  # pytest shows their output
    else:
        asyncio.run(_open(pytester.path))
    for asked in app.get(CONSOLE, "").split(_COMMAND)[1:]:
        command, _, expected = asked.partition("\n")
        done = subprocess.run(
            [sys.executable, "-m", "engine", *shlex.split(command)], cwd=pytester.path, capture_output=True, text=True
        )
        pattern = ".*".join(map(re.escape, expected.strip().split("…")))
        printed = (done.stdout + done.stderr).strip()
        assert re.fullmatch(pattern, printed), f"{_COMMAND}{command}\n{printed}"


async def _open(app: Path) -> None:
    async with open_test_engine(app) as engine:
        await engine.wait_until_idle()


def codes_of(error: type[RequestError]) -> Iterator[str]:
    for kind in error.__subclasses__():
        yield kind.code
        yield from codes_of(kind)


def test_every_error_that_a_request_can_meet_is_in_the_readme() -> None:
    assert [code for code in codes_of(RequestError) if f"`{code}`" not in README] == []


def test_every_refusal_of_the_demo_app_is_in_the_readme() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "functions").glob("*.py")]
    codes = {code for source in sources for code in re.findall(r'"code": "([A-Z_]+)"', source)}
    assert len(codes) > 5
    assert sorted(code for code in codes if f"`{code}`" not in README) == []


def test_every_section_that_is_linked_to_is_there() -> None:
    titles = [title[1] for line in GUIDE.splitlines() if (title := _HEADING.fullmatch(line))]
    sections = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    linked = re.findall(r"\]\((?:docs/guide\.md)?#([^)]+)\)", GUIDE)
    assert len(linked) > 20
    assert [section for section in linked if section not in sections] == []


@pytest.mark.slow
@pytest.mark.parametrize("heading", apps_of(GUIDE))
def test_the_app_of_each_section_of_the_guide_runs(heading: str, pytester: pytest.Pytester) -> None:
    run_app(apps_of(GUIDE)[heading], pytester)


@pytest.mark.parametrize("fragment", list(fragments_of(GUIDE)), ids=lambda fragment: fragment.splitlines()[0])
def test_each_other_example_of_the_guide_is_python(fragment: str) -> None:
    compile(fragment, "the guide", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


EXAMPLE = """
# An app

```python
# schema.py: what it has
from engine import Table, index

class Note(Table, name="notes"):
    text: str
```

```python
# functions/notes.py
from engine import MutationCtx, QueryCtx, mutation, query
from schema import Note

@mutation
async def add(ctx: MutationCtx, text: str) -> str:
    return await ctx.db.insert(Note(text=text))
```

```sh
# functions/no_app.py
```

```console
$ engine functions
notes:add  mutation  (text: str) -> …
$ engine run notes:add '{"text": "hello"}'
"…"
```

## A longer one ##

````python
# functions/more.py
from engine import QueryCtx, query
from schema import Note
````

```python
# functions/more.py
@query
async def count(ctx: QueryCtx) -> int:
    return await ctx.db.query(Note).count()
```

```toml
# engine.toml
[limits]
read_document_count_max = 1
```

```python
# tests/test_more.py
import pytest
from engine import LimitExceeded
from schema import Note

async def test_notes_are_counted_up_to_the_limit(engine, as_user):
    count = engine.subscribe("more:count")
    assert await count.next() == 0
    await as_user("alice").mutation("notes:add", text="hello")
    assert await count.next() == 1
    assert Note(text="hello").text == "hello"
```

### Another app

```python
# schema.py
from engine import Table
```

```python
ctx.db.query(Note)  # only a fragment
```
"""


def test_an_app_is_what_stands_under_one_heading() -> None:
    apps = apps_of(EXAMPLE)
    assert {heading: list(app) for heading, app in apps.items()} == {
        "An app": ["schema.py", "functions/notes.py", "console"],
        "A longer one": [
            "schema.py",
            "functions/notes.py",
            "functions/more.py",
            "engine.toml",
            "tests/test_more.py",
        ],
        "Another app": ["schema.py"],
    }
    assert apps["A longer one"]["functions/more.py"].count("# functions/more.py") == 2
    assert list(fragments_of(EXAMPLE)) == ["ctx.db.query(Note)  # only a fragment\n"]


@pytest.mark.slow
@pytest.mark.parametrize("heading", apps_of(EXAMPLE))
def test_examples_that_are_right_pass(heading: str, pytester: pytest.Pytester) -> None:
    run_app(apps_of(EXAMPLE)[heading], pytester)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heading", "right", "wrong", "error"),
    [
        ("An app", "mutation, query", "mutation, no_such_name", RegistryError),
        ("An app", "(text: str) -> …", "(text: int) -> …", AssertionError),
        ("Another app", "import Table", "import NoTable", SchemaError),
        ("A longer one", "read_document_count_max", "no_such_limit", AssertionError),
        ("A longer one", "next() == 1", "next() == 2", AssertionError),
        ("A longer one", "async def test_", "async def no_test_", AssertionError),
    ],
)
def test_examples_that_are_wrong_fail(
    heading: str, right: str, wrong: str, error: type[Exception], pytester: pytest.Pytester
) -> None:
    assert right in EXAMPLE
    with pytest.raises(error):
        run_app(apps_of(EXAMPLE.replace(right, wrong))[heading], pytester)
