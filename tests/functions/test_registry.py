"""Decorators and paths: which function an asker gets by which spelling, and which declarations are refused."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from engine.errors import FunctionNotFound, RegistryError
from engine.functions.registry import (
    Cron,
    FunctionKind,
    Registry,
    action,
    camel_path,
    cron,
    functions_of,
    mutation,
    query,
)
from engine.limits import Limits

MS_PER_DAY = 86_400_000


def module_of(path: str, *functions: Callable[..., Any]) -> ModuleType:
    """A module that defines these functions, as if they had been written there."""
    module = ModuleType(f"functions.{path.replace('/', '.')}")
    for function in functions:
        function.__module__ = module.__name__
        setattr(module, function.__name__, function)
    return module


def registry_of(**functions_by_module: list[Callable[..., Any]]) -> Registry:
    """A registry; `__` in the name of a module stands for the `/` of its path."""
    paths = {name.replace("__", "/"): functions for name, functions in functions_by_module.items()}
    modules = {path: module_of(path, *functions) for path, functions in paths.items()}
    return Registry(functions_of(modules, limits=Limits(), tags=lambda name: "0000"))


def named(name: str, decorate: Callable[..., Any] = query) -> Callable[..., Any]:
    async def function(ctx: object, limit: int = 5) -> None: ...

    function.__name__ = function.__qualname__ = name
    return decorate(function)  # type: ignore[no-any-return]


@pytest.fixture
def registry() -> Registry:
    return registry_of(
        watch_progress=[named("get_progress"), named("default")],
        live__quiz_show=[named("join_now", mutation)],
        chat=[named("purge", mutation(internal=True)), named("fetch", action)],
    )


@pytest.mark.parametrize(
    "spelling",
    [
        "watch_progress:get_progress",
        "watchProgress:getProgress",
        "watch_progress:getProgress",
        "watchProgress:get_progress",
        "watch_progress.js:get_progress",
        "watchProgress.js:getProgress",
    ],
)
def test_a_function_is_found_in_snake_and_camel_case_in_each_segment_and_with_js(
    registry: Registry, spelling: str
) -> None:
    assert registry.public(spelling, "query").path == "watch_progress:get_progress"


@pytest.mark.parametrize("spelling", ["live/quiz_show:join_now", "live/quizShow:joinNow", "live/quizShow.js:join_now"])
def test_a_module_in_a_folder_has_the_folder_in_its_path(registry: Registry, spelling: str) -> None:
    assert registry.public(spelling, "mutation").path == "live/quiz_show:join_now"


@pytest.mark.parametrize("spelling", ["watch_progress", "watchProgress", "watch_progress.js", "watchProgress:default"])
def test_a_path_without_a_function_means_the_one_named_default(registry: Registry, spelling: str) -> None:
    assert registry.public(spelling, "query").path == "watch_progress:default"


@pytest.mark.parametrize(
    "path",
    [
        "",
        ":",
        "chat",
        "chat:",
        ":purge",
        "chat:nothing",
        "chat:fetch:fetch",
        "functions/chat:fetch",
        "functions.chat:fetch",
        "../chat:fetch",
        "chat.js.js:fetch",
        "chat.py:fetch",
        "chat:fetch.js",
        "chat:__class__",
        "chat:__init__",
        "builtins:eval",
        "os:system",
        "CHAT:FETCH",
        "Chat:fetch",
        "chat:fetch\0",
        " chat:fetch",
        "сhat:fetch",  # a Cyrillic letter
        "chat:" + "a_" * 10_000,
    ],
)
def test_any_other_text_names_no_function(registry: Registry, path: str) -> None:
    with pytest.raises(FunctionNotFound):
        registry.public(path, "action")


def test_unknown_internal_and_wrong_kind_are_told_by_the_same_words(registry: Registry) -> None:
    messages = set()
    for path, kind in (("chat:nothing", "mutation"), ("chat:purge", "mutation"), ("chat:fetch", "mutation")):
        with pytest.raises(FunctionNotFound) as refusal:
            registry.public(path, kind)  # type: ignore[arg-type]
        messages.add(str(refusal.value).replace(path, "PATH"))
    assert len(messages) == 1
    assert "Could not find public mutation function for 'PATH'" in messages.pop()


def test_code_in_the_process_reaches_internal_functions_by_path_or_by_themselves(registry: Registry) -> None:
    purge = registry.any("chat:purge", ("mutation",))
    assert purge.is_internal
    assert registry.any(purge.callable, ("query", "mutation")) is purge


@pytest.mark.parametrize("kinds", [("query",), ("action",), ("query", "action")])
def test_code_in_the_process_asks_for_the_right_kind_too(registry: Registry, kinds: tuple[FunctionKind, ...]) -> None:
    with pytest.raises(FunctionNotFound, match=f"{' or '.join(kinds)} function for 'chat:purge'"):
        registry.any("chat:purge", kinds)


def test_a_function_that_is_not_decorated_is_not_registered() -> None:
    def plain(ctx: object) -> None: ...

    registry = registry_of(chat=[plain, named("shown")])
    assert list(registry.by_path) == ["chat:shown"]
    with pytest.raises(FunctionNotFound, match="plain"):
        registry.any(plain, ("query",))


def test_a_function_of_an_older_version_of_the_code_names_the_one_of_today() -> None:
    old, new = registry_of(chat=[named("send", mutation)]), registry_of(chat=[named("send", mutation)])
    assert new.any(old.by_path["chat:send"].callable, ("mutation",)) is new.by_path["chat:send"]


def test_a_function_that_another_module_imports_is_registered_where_it_is_defined() -> None:
    shared = named("shared")
    modules = {"a": module_of("a", shared), "b": module_of("b", named("own"))}
    modules["b"].shared = shared  # type: ignore[attr-defined]
    functions = functions_of(modules, limits=Limits(), tags=lambda name: "0000")
    assert [function.path for function in functions] == ["a:shared", "b:own"]


def test_two_functions_whose_names_meet_in_one_spelling_are_refused() -> None:
    with pytest.raises(RegistryError, match=r"m:get_it and m:getIt|m:getIt and m:get_it") as refusal:
        registry_of(m=[named("get_it"), named("getIt")])
    assert "Rename one of them" in str(refusal.value)


def test_two_modules_whose_names_meet_are_refused_only_if_functions_meet() -> None:
    assert registry_of(my_chat=[named("send")], myChat=[named("receive")]).public("myChat:send", "query")
    with pytest.raises(RegistryError, match="are the same name to clients"):
        registry_of(my_chat=[named("send")], myChat=[named("send")])


def test_camel_path_changes_only_words() -> None:
    assert camel_path("a_b/c_d:e_f") == "aB/cD:eF"
    assert camel_path(camel_path("live/quiz_show:join_now")) == "live/quizShow:joinNow"


def test_decorators_keep_the_function_and_mark_its_kind() -> None:
    async def function(ctx: object) -> None: ...

    for decorate, kind in ((query, "query"), (mutation, "mutation"), (action, "action")):
        for is_internal in (False, True):
            assert decorate(internal=is_internal)(function) is function
            (registered,) = functions_of({"m": module_of("m", function)}, limits=Limits(), tags=lambda name: "0000")
            assert (registered.kind, registered.is_internal) == (kind, is_internal)
        assert decorate(function) is function  # without parentheses: public
        (registered,) = functions_of({"m": module_of("m", function)}, limits=Limits(), tags=lambda name: "0000")
        assert (registered.kind, registered.is_internal) == (kind, False)


def test_a_decorator_above_something_else_says_so() -> None:
    with pytest.raises(RegistryError, match="@query stands above a function, not above 5"):
        query(5)  # type: ignore[call-overload]


def test_a_wrong_signature_names_the_function_and_the_parameter() -> None:
    async def get(ctx: object, limit) -> None: ...  # type: ignore[no-untyped-def]

    with pytest.raises(RegistryError, match=r"functions\.m\..*get: parameter 'limit' has no annotation"):
        registry_of(m=[query(get)])


# -- crons


def test_an_interval_is_counted_from_the_epoch() -> None:
    assert Cron(interval_ms=60_000).next_ms(0) == 60_000
    assert Cron(interval_ms=60_000).next_ms(59_999.9) == 60_000
    assert Cron(interval_ms=60_000).next_ms(60_000) == 120_000


def test_an_expression_is_in_utc_and_the_next_time_lies_strictly_after() -> None:
    three = Cron(expression="0 3 * * *")
    assert three.next_ms(0) == 3 * 3_600_000
    assert three.next_ms(3 * 3_600_000) == 3 * 3_600_000 + MS_PER_DAY
    assert three.next_ms(3 * 3_600_000 - 1) == 3 * 3_600_000


@pytest.mark.parametrize(
    ("expression", "interval", "message"),
    [
        (None, {}, "takes an expression"),
        ("* * * * *", {"minutes": 1}, "one of them"),
        (None, {"minutes": -1}, "takes an expression"),
        (None, {"seconds": 0.5}, "an interval of 500 ms; at least 1,000 ms"),
        ("every day", {}, "'every day' is not a 5-field cron expression"),
        ("61 * * * *", {}, "not a 5-field cron expression"),
        ("0 0 31 2 *", {}, "'0 0 31 2 *'"),
    ],
)
def test_a_cron_that_cannot_be_is_refused_where_it_stands(
    expression: str | None, interval: dict[str, float], message: str
) -> None:
    with pytest.raises(RegistryError, match="cron") as refusal:
        cron(expression, **interval)
    assert message in str(refusal.value)


@pytest.mark.parametrize("decorate", [query(internal=True), mutation, action], ids=["query", "public", "action"])
def test_a_cron_stands_above_an_internal_mutation_or_action(decorate: Callable[..., Any]) -> None:
    with pytest.raises(RegistryError, match="m:tick: @cron stands above an internal mutation or action"):
        registry_of(m=[cron(minutes=1)(named("tick", decorate))])


def test_a_cron_needs_a_function_that_can_be_called_without_arguments() -> None:
    async def tick(ctx: object, game_id: str) -> None: ...

    with pytest.raises(RegistryError, match="m:tick: @cron calls it without arguments: game_id: missing"):
        registry_of(m=[cron(minutes=1)(mutation(internal=True)(tick))])
    assert registry_of(m=[cron(hours=1)(named("tick", action(internal=True)))]).by_path["m:tick"].cron == Cron(
        interval_ms=3_600_000
    )
