"""What an operator sets for an app: where it comes from, what it becomes, and that nothing secret is ever told."""

import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from engine.config import read_settings
from engine.errors import ConfigError, FunctionFailed, RegistryError
from engine.functions.settings import Given, Secret, Settings, make_settings, secret_named
from tests.functions.apps import open_app

PASSPHRASE = "open sesame"


class Shop(Settings):
    payment_key: Secret
    max_viewers: int = 10
    ratio: float = 0.5
    is_open: bool = True
    tags: tuple[str, ...] = ()
    mode: Literal["slow", "fast"] = "slow"
    port: Annotated[int, msgspec.Meta(ge=1)] = 80
    since: datetime | None = None
    keys: dict[str, Secret] = {}
    backup_key: Secret | None = None


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("APP_")]:
        monkeypatch.delenv(name)


def in_file(**values: Any) -> dict[str, Given]:
    return {name: Given(f"engine.toml: app.{name}", value) for name, value in values.items()}


def as_variables(**values: str) -> dict[str, Given]:
    return {name: Given(f"the variable APP_{name.upper()}", text, is_text=True) for name, text in values.items()}


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_settings(Shop, {**in_file(payment_key=PASSPHRASE), **values})
    return str(caught.value)


# -- where a value comes from


def test_a_variable_wins_over_the_file_and_an_option_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine.toml").write_text('[app]\npayment_key = "x"\nmax_viewers = 1\nratio = 0.1\nport = 1')
    monkeypatch.setenv("APP_MAX_VIEWERS", "2")
    monkeypatch.setenv("APP_RATIO", "0.2")
    shop = make_settings(Shop, read_settings(tmp_path, {"ratio": 0.3}))
    assert (shop.port, shop.max_viewers, shop.ratio, shop.is_open) == (1, 2, 0.3, True)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_viewers", "7", 7),
        ("ratio", "2", 2.0),
        ("is_open", "false", False),
        ("is_open", "0", False),
        ("mode", "fast", "fast"),
        ("tags", '["a", "b"]', ("a", "b")),
        ("since", "2026-01-02T03:04:05Z", datetime.fromisoformat("2026-01-02T03:04:05+00:00")),
        ("backup_key", PASSPHRASE, Secret(PASSPHRASE)),
        ("keys", '{"a": "b"}', {"a": Secret("b")}),
    ],
)
def test_the_text_of_a_variable_becomes_what_the_class_says(name: str, text: str, value: object) -> None:
    shop = make_settings(Shop, {**in_file(payment_key="x"), **as_variables(**{name: text})})
    assert getattr(shop, name) == value


def test_without_a_class_settings_are_what_was_written_and_cannot_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine.toml").write_text("[app]\nlimits = {viewers = [1, 2]}\nname = 'shop'")
    monkeypatch.setenv("APP_NAME", "5")
    settings = make_settings(None, read_settings(tmp_path, {}))
    assert (dict(settings["limits"]), settings["name"]) == ({"viewers": (1, 2)}, "5")
    for mapping in (settings, settings["limits"]):
        with pytest.raises(TypeError):
            mapping["name"] = "other"


# -- what is wrong is told, with its place and without its value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (in_file(max_viewers="12x"), "engine.toml: app.max_viewers: expected `int`, got `str`"),
        (in_file(max_viewers=1.5), "engine.toml: app.max_viewers: expected `int`, got `float`"),
        (as_variables(max_viewers="12x"), "the variable APP_MAX_VIEWERS: expected `int`, got `str`"),
        (in_file(payment_key=5), "engine.toml: app.payment_key: expected `str`, got `int`"),
        (in_file(port=0), "engine.toml: app.port: expected `int` >= 1"),
        (in_file(mode="12x"), "engine.toml: app.mode: expected Literal['slow', 'fast']"),
        (in_file(keys={"a": 12}), "engine.toml: app.keys[...]: expected `str`, got `int`"),
        (as_variables(tags="[12]"), "the variable APP_TAGS[0]: expected `str`, got `int`"),
        (as_variables(tags="[12"), "the variable APP_TAGS: expected `array`, got `str`"),
        (in_file(rato="12x"), "engine.toml: app.rato: there is no setting `rato`; did you mean `ratio`?"),
        (as_variables(ratios="12x"), "the variable APP_RATIOS: there is no setting `ratios`; did you mean `ratio`?"),
    ],
)  # fmt: skip
def test_a_wrong_setting_names_its_place_and_what_was_expected(values: dict[str, Given], message: str) -> None:
    assert refusal(**values) == message


def test_no_wrong_value_is_part_of_a_message() -> None:
    """A secret may have been given under the wrong name."""
    for name in Shop.__struct_fields__:
        for given in (in_file(**{name: [PASSPHRASE]}), as_variables(**{name: f"[{PASSPHRASE!r}]"})):
            try:
                made = make_settings(Shop, {**in_file(payment_key="x"), **given})
            except ConfigError as error:
                made = error
            assert name == "tags" or PASSPHRASE not in f"{made} {given}"
    assert PASSPHRASE not in refusal(**in_file(sesame=PASSPHRASE))


def test_a_missing_setting_says_how_to_set_it() -> None:
    with pytest.raises(ConfigError) as caught:
        make_settings(Shop, {})
    assert str(caught.value) == (
        "the setting `payment_key` is missing: expected Secret. "
        "Set `payment_key` under [app] in engine.toml, or the variable APP_PAYMENT_KEY."
    )


def test_an_app_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engine.toml").write_text(f"app = '{PASSPHRASE}'")
    with pytest.raises(ConfigError, match=r"app: expected a table, \[app\]$"):
        read_settings(tmp_path, {})


def test_what_the_class_refuses_by_itself_is_an_error_of_the_configuration() -> None:
    class Picky(Settings):
        low: int = 0
        high: int = 0

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("low is above high")

    with pytest.raises(ConfigError, match="Picky refuses its values: low is above high"):
        make_settings(Picky, in_file(low=1))


def test_a_type_that_no_setting_can_have_is_named() -> None:
    class Odd(Settings):
        path: Path

    with pytest.raises(ConfigError, match=r"app\.path: `(Posix)?Path` is no type of a setting"):
        make_settings(Odd, in_file(path="/"))


# -- secrets


def test_a_secret_shows_itself_to_nobody_who_does_not_ask(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(PASSPHRASE)
    shop = make_settings(Shop, in_file(payment_key=PASSPHRASE))
    logging.getLogger("app").warning("%s %r %s", secret, secret, shop)
    for text in (str(secret), repr(secret), f"{secret}", f"{secret!s:>40}", repr(shop), caplog.text):
        assert PASSPHRASE not in text
    assert secret.reveal() == PASSPHRASE
    assert secret == Secret(PASSPHRASE) != Secret("other")
    assert secret != PASSPHRASE
    assert (bool(secret), bool(Secret("")), len({secret, Secret(PASSPHRASE)})) == (True, False, 1)
    with pytest.raises(TypeError):
        msgspec.json.encode(secret)


def test_a_secret_is_found_by_the_name_that_a_declaration_gives() -> None:
    shop = make_settings(Shop, in_file(payment_key=PASSPHRASE))
    assert secret_named(shop, "payment_key") == PASSPHRASE
    assert secret_named(make_settings(None, in_file(hook=PASSPHRASE)), "hook") == PASSPHRASE
    for settings, name in ((shop, "backup_key"), (shop, "none"), (shop, "port"), (make_settings(None, {}), "hook")):
        with pytest.raises(ConfigError, match=f"the setting `{name}` is needed.* APP_{name.upper()}"):
            secret_named(settings, name)


# -- in an app

FUNCTIONS = """
    class AppSettings(Settings):
        greeting: str = "hello"
        key: Secret = Secret("none")

    @query
    async def greet(ctx: QueryCtx) -> str:
        return ctx.settings.greeting

    @mutation
    async def greet_in_mutation(ctx: MutationCtx) -> str:
        return ctx.settings.greeting + await ctx.run_query(greet)

    @action
    async def greet_in_action(ctx: ActionCtx) -> str:
        return ctx.settings.greeting + await ctx.run_query(greet)

    @query
    async def fail(ctx: QueryCtx) -> str:
        raise KeyError(ctx.settings.key)

    @query
    async def leak(ctx: QueryCtx) -> Any:
        return ctx.settings.key
"""


async def test_every_kind_of_function_has_them(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        for path, result in (
            ("greet", "hello"),
            ("greet_in_mutation", "hellohello"),
            ("greet_in_action", "hellohello"),
        ):
            assert await app.call(f"m:{path}") == result


async def test_a_reload_reads_them_anew_and_runs_the_queries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app, app.watched("m:greet") as results:
        (app.directory / "engine.toml").write_text("[app]\ngreeting = 'good day'")
        await app.engine.reload()
        assert await anext(results) == "good day"
        monkeypatch.setenv("APP_GREETING", "hi")
        await app.engine.reload()
        assert await anext(results) == "hi"


async def test_a_reload_with_wrong_settings_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_app(tmp_path, FUNCTIONS) as app:
        monkeypatch.setenv("APP_GREATING", "hi")
        with pytest.raises(ConfigError, match=r"APP_GREATING: there is no setting `greating`; did you mean `greeting`"):
            await app.rewrite(FUNCTIONS.replace('"hello"', '"new"'))
        assert await app.call("m:greet") == "hello"


async def test_an_engine_does_not_start_with_wrong_settings_and_has_made_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APP_KEY", "")
    monkeypatch.setenv("APP_GREETINGS", PASSPHRASE)
    with pytest.raises(ConfigError) as caught:
        async with open_app(tmp_path, FUNCTIONS):
            pass
    assert PASSPHRASE not in str(caught.value)
    assert not (tmp_path / "engine.db").exists()


async def test_a_secret_stays_hidden_when_a_function_fails_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APP_KEY", PASSPHRASE)
    async with open_app(tmp_path, FUNCTIONS) as app:
        for path in ("m:fail", "m:leak"):
            failure = await app.failure(path)
            assert PASSPHRASE not in f"{failure} {failure.error!r} {failure.message}"
        assert isinstance((await app.failure("m:fail")).error, FunctionFailed)


async def test_the_class_may_stand_in_the_schema_or_in_a_module_of_helpers(tmp_path: Path) -> None:
    declared = "class Mine(Settings):\n    word: str = 'here'\n"
    uses = "@query\nasync def word(ctx: QueryCtx) -> str:\n    return ctx.settings.word\n"
    schema = f"from engine import Settings, Table\n{declared}\nclass Item(Table):\n    key: str\n"
    async with open_app(tmp_path, uses, schema=schema) as app:
        assert await app.call("m:word") == "here"
    async with open_app(tmp_path, {"m": f"from functions._own import *\n{uses}", "_own": declared}) as app:
        assert await app.call("m:word") == "here"


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"a": "class A(Settings): ...", "b": "class B(Settings): ..."}, r"functions\.b\.B and functions\.a\.A both"),
        ({"a": "class A(Settings):\n    maxViewers: int = 1"}, r"functions\.a\.A\.maxViewers: .* snake_case"),
        ({"a": "class A(Settings):\n    key: Secret = 'told'"}, r"functions\.a\.A\.key: a text is no Secret"),
        ({"a": "class A(Settings):\n    word: 'Missing'"}, r"functions\.a\.A: name 'Missing' is not defined"),
    ],
)
async def test_a_class_that_cannot_be_used_is_refused_when_it_is_loaded(
    tmp_path: Path, functions: dict[str, str], message: str
) -> None:
    with pytest.raises(RegistryError, match=message):
        async with open_app(tmp_path, functions):
            pass
