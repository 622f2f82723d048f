"""The pytest plugin: the engine under test as fixtures.

    async def test_a_message_reaches_the_room(engine, as_user):
        alice = as_user("alice", role="admin")
        messages = alice.subscribe("chat:get_messages", game_id=game)
        ...

The app is the nearest directory at or above the test's file that has `schema.py` and `functions/`; the option
`engine_app` or the marker `@pytest.mark.engine(app="…")` name another one, from pytest's root directory.

Invariants
  1. Each test has an engine, a database and a clock of its own; ids and randomness are the same in every run.
  2. Nothing changes for a project that has no app; and what it says itself (`asyncio_mode`) always holds.
"""

from collections.abc import AsyncIterator, Callable, Generator
from contextlib import AsyncExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import pytest

from engine.errors import DeveloperError
from engine.testing import Client, ManualClock, TestEngine, modules, open_test_engine

F = TypeVar("F", bound=Callable[..., Any])

_MARKER = (
    "engine(app=…, config={…}, settings={…}, seed=0): of the app in this directory, with these over its engine.toml "
    "and its settings, and with ids and randomness of this seed; those of the test stand over those of its module"
)


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    """What the markers of one test say."""

    app: str | None = None
    config: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    seed: int = 0


def _async_fixture(function: F) -> F:
    """A fixture that pytest-asyncio runs in each of its modes; `clock` says so where it is not installed."""
    module = import_module("pytest_asyncio" if find_spec("pytest_asyncio") else "pytest")
    return cast(F, module.fixture(function))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("engine_app", "the directory of the app under test, from the root directory", default="")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser) -> None:
    """In an app, async tests and fixtures run without any configuration."""
    app = _app_of(early_config, early_config.rootpath)
    if app is None:
        return
    modules.use(app)  # for what a conftest.py imports
    if early_config.pluginmanager.hasplugin("asyncio"):
        # other defaults for the options of pytest-asyncio: what the project says holds (invariant 2)
        parser.addini("asyncio_mode", "default value for --asyncio-mode", default="auto")
        parser.addini(
            "asyncio_default_fixture_loop_scope",
            "default scope of the asyncio event loop used to execute async fixtures",
            default="function",
        )


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module of tests imports the `schema` and `functions` of its app."""
    app = _app_of(collector.config, collector.path) if isinstance(collector, pytest.Module) else None
    if app is not None:
        modules.use(app)
    report = yield
    if app is not None:
        modules.keep()
    return report


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> ManualClock:
    """The time of the engine under test: it passes by `await engine.advance(…)`, or by `clock.advance(…)`."""
    if not request.config.pluginmanager.hasplugin("asyncio"):
        pytest.fail("Tests of an engine need pytest-asyncio: pip install 'reactive-engine[test]'.", pytrace=False)
    return ManualClock(seed=_options_of(request.node).seed)


@_async_fixture
async def engine(request: pytest.FixtureRequest, clock: ManualClock) -> AsyncIterator[TestEngine]:
    """The app under test on a new database."""
    options = _options_of(request.node)
    app = request.config.rootpath / options.app if options.app else _app_of(request.config, request.path)
    if app is None:
        pytest.fail(
            f"There is no app (schema.py and functions/) in {request.path.parent} or above it. Name its directory: "
            "`engine_app = …` in pytest's configuration, or @pytest.mark.engine(app=…).",
            pytrace=False,
        )
    async with AsyncExitStack() as stack:
        try:
            engine = await stack.enter_async_context(
                open_test_engine(app, clock=clock, config=options.config, settings=options.settings)
            )
        except DeveloperError as error:
            pytest.fail(f"{error.code}: {error}", pytrace=False)
        yield engine


@pytest.fixture
def as_user(engine: TestEngine) -> Callable[..., Client]:
    """`as_user("alice", role="admin")`: somebody who is signed in, with these claims."""
    return engine.as_user


def _app_of(config: pytest.Config, path: Path) -> Path | None:
    """The directory of the app that a test in this file or directory is about."""
    named = config.getini("engine_app")
    return config.rootpath / named if named else modules.find_app(path)


def _options_of(test: pytest.Item) -> _Options:
    values: dict[str, Any] = {}
    for marker in reversed(list(test.iter_markers("engine"))):  # the closest last
        values |= marker.kwargs
        if marker.args:
            pytest.fail(
                "@pytest.mark.engine takes its options by name: app=…, config={…}, settings={…}, seed=….", pytrace=False
            )
    try:
        return msgspec.convert(values, _Options)
    except msgspec.ValidationError as error:
        pytest.fail(f"@pytest.mark.engine: {error}", pytrace=False)
