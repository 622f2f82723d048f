"""The plugin as projects meet it: pytest in a directory with an app and its tests, where it matters as a process."""

import re

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow

SCHEMA = """
    from engine import Table, index

    class Note(Table, name="notes"):
        room: str
        text: str
        by_room = index("room")
"""
FUNCTIONS = """
    from engine import AppError, Id, MutationCtx, QueryCtx, cron, mutation, query
    from schema import Note

    @query
    async def texts(ctx: QueryCtx, room: str) -> list[str]:
        return [note.text for note in await ctx.db.query(Note.by_room, room=room).collect()]

    @query
    async def notes(ctx: QueryCtx, room: str) -> list[Note]:
        return await ctx.db.query(Note.by_room, room=room).collect()

    @mutation
    async def add(ctx: MutationCtx, room: str, text: str) -> Id[Note]:
        if ctx.auth.identity() is None:
            raise AppError({"code": "UNAUTHENTICATED"})
        return await ctx.db.insert(Note(room=room, text=text))

    @cron(minutes=1)
    @mutation(internal=True)
    async def tick(ctx: MutationCtx) -> None:
        await ctx.db.insert(Note(room="clock", text="tick"))
"""


def make_app(pytester: pytest.Pytester, directory: str = ".") -> None:
    for path, source in (("schema.py", SCHEMA), ("functions/notes.py", FUNCTIONS)):
        write(pytester, f"{directory}/{path}", source)


def write(pytester: pytest.Pytester, path: str, source: str) -> None:
    file = pytester.path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = source.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    file.write_text("\n".join(line[indent:] for line in lines) + "\n")


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


def run_process(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """As the user of the project types it: nothing is imported, and the plugin is found by its entry point."""
    return pytester.runpytest_subprocess(*arguments, timeout=60)


def test_an_app_without_any_configuration_has_async_tests_fixtures_and_its_own_modules(
    pytester: pytest.Pytester,
) -> None:
    make_app(pytester)
    write(
        pytester,
        "tests/conftest.py",
        """
        import pytest
        from functions.notes import add

        @pytest.fixture
        async def room(as_user):
            await as_user("alice", role="admin").mutation("notes:add", room="a", text=add.__name__)
            return "a"
        """,
    )
    write(
        pytester,
        "tests/test_notes.py",
        """
        import asyncio
        import pytest
        from engine import AppError
        from engine.testing import TestEngine
        from schema import Note

        async def test_notes_are_those_of_the_schema(engine, room):
            (note,) = await engine.query("notes:notes", room=room)
            assert type(note) is Note
            assert note.text == "add"

        async def test_each_test_has_a_database_of_its_own(engine):
            assert await engine.query("notes:texts", room="a") == []

        async def test_subscribers_follow(engine, as_user):
            alice, texts = as_user("alice"), engine.subscribe("notes:texts", room="a")
            assert await texts.next() == []
            await alice.mutation("notes:add", room="a", text="hello")
            assert await texts.next() == await texts.settled() == ["hello"]
            with pytest.raises(AppError, match="UNAUTHENTICATED"):
                await as_user().mutation("notes:add", room="a", text="hello")

        async def test_time_is_turned_by_hand(engine, clock):
            assert engine.clock is clock
            await engine.advance(minutes=10)
            assert len(await engine.query("notes:texts", room="clock")) == 10

        async def test_a_crash_loses_nothing(engine, as_user):
            await as_user("alice").mutation("notes:add", room="a", text="kept")
            engine.crash()
            await engine.reopen()
            assert await engine.query("notes:texts", room="a") == ["kept"]

        class TestInAClass:
            async def test_async_tests_need_no_engine(self):
                await asyncio.sleep(0)

        def test_plain_tests_are_as_they_were(clock):
            assert clock.monotonic() == 0
        """,
    )
    run_process(pytester, "-W", "error").assert_outcomes(passed=7)


def test_ids_and_randomness_are_the_same_in_every_run(pytester: pytest.Pytester) -> None:
    make_app(pytester)
    write(
        pytester,
        "test_ids.py",
        """
        import pytest

        async def test_ids(as_user, clock):
            print("id", await as_user("alice").mutation("notes:add", room="a", text="x"), clock.entropy(4).hex())

        @pytest.mark.engine(seed=7)
        async def test_others(as_user, clock):
            print("id", await as_user("alice").mutation("notes:add", room="a", text="x"), clock.entropy(4).hex())
        """,
    )
    printed = [re.findall(r"id (\w+ \w+)", run(pytester, "-s").stdout.str()) for _ in range(2)]
    assert printed[0] == printed[1]
    assert len(set(printed[0])) == 2


def test_a_test_that_fails_says_what_the_engine_knows(pytester: pytest.Pytester) -> None:
    make_app(pytester)
    write(
        pytester,
        "test_failing.py",
        """
        import sqlite3
        import pytest

        async def test_waits_for_nothing(engine):
            texts = engine.subscribe("notes:texts", room="a")
            await texts.next()
            await texts.next()

        async def test_is_refused(as_user):
            await as_user().mutation("notes:add", room="a", text="x")

        async def test_calls_what_clients_may_not(as_user):
            await as_user("alice").mutation("notes:tick")

        async def test_asks_the_dead(engine):
            engine.crash()
            await engine.query("notes:texts", room="a")

        async def test_hides_that_the_engine_failed(engine):
            with sqlite3.connect(engine.running.database.path) as other:
                other.execute("CREATE TABLE x (y)")
            other.close()
            with pytest.raises(Exception):
                await engine.mutation("notes:tick")

        @pytest.mark.engine(config={"limits": {"run_ms": 1}})
        async def test_configures_what_is_not_there(engine):
            pass

        @pytest.mark.engine(sead=1)
        async def test_marks_what_is_not_there(engine):
            pass

        @pytest.mark.engine("app")
        async def test_marks_without_names(engine):
            pass
        """,
    )
    result = run(pytester)
    result.assert_outcomes(failed=4, passed=1, errors=4)
    for line in (
        "E *AssertionError: notes:texts(room='a') has no new result, and nothing is under way that could bring one. *",
        ">       await texts.next()",
        "E *AppError: {'code': 'UNAUTHENTICATED'}",
        "E *FunctionNotFound: Could not find public mutation function for 'notes:tick'. *",
        "E *EngineClosed: the engine has crashed: `await engine.reopen()` starts it again.",
        "E *InternalError: another process wrote to this database *",
        "ConfigError: options: limits.run_ms: unknown key; did you mean `limits.run_ms_max`?",
        "@pytest.mark.engine: Object contains unknown field `sead`",
        "@pytest.mark.engine takes its options by name: app=…, config={…}, settings={…}, seed=….",
    ):
        result.stdout.fnmatch_lines([line.replace("[", "[[]") if "[" in line else line])


def test_an_app_that_is_wrong_says_where(pytester: pytest.Pytester) -> None:
    make_app(pytester)
    write(pytester, "functions/broken.py", "from schema import Nothing\n")
    write(
        pytester,
        "test_it.py",
        """
        async def test_it(engine):
            pass

        def test_without_engine():
            from schema import Note
        """,
    )
    result = run(pytester)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["RegistryError: functions/broken.py does not import: ImportError: *'Nothing'*"])


def test_one_project_may_have_several_apps(pytester: pytest.Pytester) -> None:
    for name in ("one", "two"):
        make_app(pytester, name)
        write(
            pytester,
            f"{name}/functions/who.py",
            f"from engine import QueryCtx, query\n@query\ndef who(ctx: QueryCtx) -> str: return {name!r}\n",
        )
    test = """
        import pytest
        from functions.who import who

        async def test_it(engine):
            assert await engine.query("who:who") == who(None) == "{}"
        """
    for name in ("one", "two"):
        write(pytester, f"{name}/tests/test_{name}.py", test.format(name))
    write(
        pytester,
        "test_marked.py",
        """
        import pytest

        @pytest.mark.engine(app="one")
        class TestMarked:
            async def test_one(self, engine):
                assert await engine.query("who:who") == "one"

            @pytest.mark.engine(app="two", seed=1)
            async def test_two(self, engine):
                assert await engine.query("who:who") == "two"

        async def test_unmarked(engine):
            pass
        """,
    )
    # no app at the root: nothing is configured by itself
    result = run(pytester, "-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(["There is no app (schema.py and functions/) in * or above it. *`engine_app = …`*"])
    result = run(pytester, "-o", "engine_app=two", "-k", "test_unmarked or test_two")
    result.assert_outcomes(passed=3, deselected=2)


def test_what_a_project_says_of_asyncio_holds(pytester: pytest.Pytester) -> None:
    make_app(pytester)
    pytester.makeini("[pytest]\nasyncio_mode = strict\n")
    write(
        pytester,
        "test_strict.py",
        """
        import pytest

        @pytest.mark.asyncio
        async def test_marked(engine):
            assert await engine.query("notes:texts", room="a") == []

        async def test_unmarked():
            pass
        """,
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["async def functions are not natively supported."])


def test_a_project_without_an_app_is_left_alone(pytester: pytest.Pytester) -> None:
    write(pytester, "schema.py", "NAME = 'its own'\n")
    write(
        pytester,
        "test_it.py",
        """
        import pytest
        from schema import NAME

        @pytest.fixture
        def engine():
            return "its own"

        def test_it(engine):
            assert engine == NAME

        async def test_async():
            pass
        """,
    )
    result = run_process(pytester)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["asyncio: mode=Mode.STRICT, *"])


def test_without_pytest_asyncio_the_fixtures_say_what_to_install(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_app(pytester)
    write(pytester, "test_it.py", "async def test_it(engine):\n    pass\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    result = run_process(pytester, "-p", "engine.pytest_plugin")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["Tests of an engine need pytest-asyncio: pip install 'reactive-engine[[]test]'."])
