"""The command line, as people and supervisors meet it: real processes, exit codes, and what they print."""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engine.auth.admin import digest_of
from engine.cli import _LATER_COMMANDS, describe, exit_code_of, main
from engine.errors import (
    AppError,
    CommitUnknown,
    ConfigError,
    EngineError,
    FunctionFailed,
    InternalError,
    InvalidArgument,
    Overloaded,
    SchemaError,
    StorageFull,
)
from engine.functions.loader import load_app
from engine.limits import Limits
from engine.storage.lock import lock_holder

REPOSITORY = Path(__file__).parents[1]
START_SECONDS_MAX, RUN_SECONDS_MAX = 20, 60

SCHEMA = """
from engine import Table, index

class Note(Table, name="notes"):
    text: str
    rank: int = 0
    by_rank = index("rank")
"""

NOTES = """
from datetime import timedelta
from typing import Literal
from engine import (ActionCtx, AppError, Id, Int64, MutationCtx, QueryCtx, action, cron, mutation, query)
from schema import Note

@query
async def list_all(ctx: QueryCtx, limit: int = 10) -> list[Note]:
    return await ctx.db.query(Note.by_rank).take(limit)

@query
def me(ctx: QueryCtx) -> str | None:
    identity = ctx.auth.identity()
    return identity.subject if identity else None

@query
def broken(ctx: QueryCtx) -> None:
    raise ValueError("the combination is 1234")

@mutation
async def add(ctx: MutationCtx, text: str, kind: Literal["a", "b"] = "a", note_id: Id[Note] | None = None) -> float:
    ctx.log.info("adding")
    if not text:
        raise AppError({"code": "EMPTY"})
    await ctx.db.insert(Note(text=text))
    return 2.0

@action
async def double(ctx: ActionCtx, number: int, factors: dict[str, float] | None = None) -> int:
    return 2 * number

@cron("0 0 1 1 *")
@mutation(internal=True)
async def wipe(ctx: MutationCtx) -> Int64:
    notes = await ctx.db.query(Note).collect()
    for note in notes:
        await ctx.db.delete(note.id)
    return len(notes)
"""

SLOW = """
import asyncio
import sys
from engine import ActionCtx, action

@action
async def wait(ctx: ActionCtx) -> None:
    print("it waits", file=sys.stderr, flush=True)
    await asyncio.sleep(60)
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    directory = tmp_path / "app"
    (directory / "functions").mkdir(parents=True)
    (directory / "schema.py").write_text(SCHEMA)
    (directory / "functions" / "notes.py").write_text(NOTES)
    return directory


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "engine", *map(str, arguments)]


def call(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    done = subprocess.run(
        command(*arguments), cwd=REPOSITORY, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


class Server:
    """A server process that has said where it is."""

    def __init__(self, process: "subprocess.Popen[str]", database: Path) -> None:
        self.process, self.database = process, database
        self.said: list[str] = []  # lines of its standard error

    @property
    def address(self) -> str:
        holder = lock_holder(self.database)
        assert holder is not None
        assert holder.address is not None
        return holder.address

    def wait_for_line(self, part: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if part in line:
                return line
        raise AssertionError(f"it ended without saying {part!r}:\n{''.join(self.said)}")

    def post(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        request = urllib.request.Request(
            f"{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        )
        with urllib.request.urlopen(request, timeout=START_SECONDS_MAX) as response:
            return json.load(response)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(START_SECONDS_MAX)


@contextmanager
def running(mode: str, app: Path, *options: str, sign: str) -> Iterator[Server]:
    """A server on a free port, from when it says `sign` on."""
    with subprocess.Popen(
        command(mode, "--app", app, "--port", "0", *options), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    ) as process:
        server = Server(process, app / "data" / "engine.db")
        hung = threading.Timer(RUN_SECONDS_MAX, process.kill)  # a server that says nothing fails the test, not its run
        hung.start()
        try:
            server.wait_for_line(sign)
            yield server
        finally:
            hung.cancel()
            process.kill()


# -- run


@pytest.mark.slow
def test_run_opens_the_database_itself_when_nobody_serves_it(app: Path) -> None:
    assert call("run", "--app", app, "notes:add", '{"text": "hi"}') == (0, "2\n", "[INFO] adding\n")
    code, output, _ = call("run", "--app", app, "notes:listAll", '{"limit": 5}')
    assert code == 0
    (note,) = json.loads(output)
    assert (note["text"], note["rank"]) == ("hi", 0)
    assert "\n    " in output, "it is indented"
    assert call("run", "--app", app, "notes:wipe") == (0, "1\n", "")  # internal
    assert call("run", "--app", app, "notes:double", "-", stdin='{"number": 21}') == (0, "42\n", "")
    assert call("run", "--app", app, "notes:me", "--identity", "alice") == (0, '"alice"\n', "")
    assert lock_holder(app / "data" / "engine.db") is None


@pytest.mark.slow
def test_explain_says_what_a_query_reads_here_and_in_the_process_that_serves(app: Path) -> None:
    def explained() -> str:
        code, output, error = call("explain", "--app", app, "notes:listAll", '{"limit": 5}')
        assert code == 0, error
        return output

    call("run", "--app", app, "notes:add", '{"text": "hi"}')
    here = explained()
    assert here.startswith("notes:list_all: ")
    assert "documents of notes.by_rank: all" in here
    with running("serve", app, sign="serving http://127.0.0.1:"):
        assert explained().partition("read")[2] == here.partition("read")[2]
    code, _, error = call("explain", "--app", app, "notes:add", '{"text": "hi"}')
    assert code != 0
    assert "public query" in error


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "sign"), [("serve", "serving http://127.0.0.1:"), ("dev", "Ctrl-C")])
def test_profile_says_where_the_time_of_a_server_goes(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, sign: str
) -> None:
    code, _, error = call("profile", "--app", app)
    assert (code, "nobody serves" in error) == (69, True)
    monkeypatch.setenv("ENGINE_PROFILE", "1")
    with running(mode, app, sign=sign) as server:
        code, output, error = call("profile", "--app", app, "--seconds", "0.3", "--output", tmp_path / "stacks")
        assert code == 0, error
        assert "\nfunctions  " in output
        assert re.search(r"\nidle +\d+\.\d % ", output)
        assert re.search(r";idle \d+\n", (tmp_path / "stacks").read_text())
        call("run", "--app", app, "notes:add", '{"text": "hi"}')
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("The loop was held")
        assert any(re.match(r"idle +\d", line) for line in server.said), "it was recorded from its start on, too"
        assert server.process.wait(START_SECONDS_MAX) == 0


@pytest.mark.slow
def test_run_acts_through_the_process_that_serves(app: Path) -> None:
    with running("serve", app, sign="serving http://127.0.0.1:") as server:
        code, output, error = call("run", "--app", app, "notes:add", '{"text": "hi"}')
        assert (code, output) == (0, "2\n"), error
        answer = server.post("/api/query", {"path": "notes:list_all", "args": {}})
        assert [note["text"] for note in answer["value"]] == ["hi"]
        attributes = json.dumps({"issuer": "https://i.example", "subject": "bob"})
        assert call("run", "--app", app, "notes:me", "--identity", attributes)[:2] == (0, '"bob"\n')
        assert call("run", "--app", app, "notes:me")[:2] == (0, "null\n")
        assert call("run", "--app", app, "notes:wipe")[:2] == (0, "1\n")  # internal
        code, output, error = call("run", "--app", app, "notes:add", '{"text": ""}')
        assert (code, output) == (1, "")
        assert '"code": "EMPTY"' in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("notes:broken",), 1, "ValueError: the combination is 1234"),
        (("notes:add", '{"text": ""}'), 1, '"code": "EMPTY"'),
        (("notes:add", '{"txt": ""}'), 1, "txt"),
        (("notes:nothing",), 1, "notes:nothing"),
    ],
)
def test_what_a_function_refuses_is_exit_code_1(app: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    ended, output, error = call("run", "--app", app, *arguments)
    assert (ended, output) == (code, "")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run",), "Missing argument 'PATH'"),
        (("run", "notes:list_all", "{"), "not JSON"),
        (("run", "notes:list_all", "[1]"), "expected an object of arguments by name"),
        (("run", "notes:list_all", "--identity", "{}"), "issuer"),
        (("run", "notes:list_all", "--identity", ""), "--identity"),
        (("run", "notes:list_all", "--identity", '{"issuer"'), "--identity"),
        (("run", "notes:list_all", "--app", "/nowhere"), "does not exist"),
        (("serve", "--port", "70000"), "70000"),
        (("dance",), "No such command 'dance'"),
    ],
)
def test_what_is_typed_wrong_is_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.output


# -- serve


@pytest.mark.slow
def test_serve_says_where_it_is_and_stops_on_sigterm(app: Path) -> None:
    with running("serve", app, sign="serving http://127.0.0.1:") as server:
        holder = lock_holder(server.database)
        assert holder is not None
        assert holder.pid == server.process.pid
        assert (server.database.with_name("engine.db.lock").stat().st_mode & 0o777) == 0o600
        answer = server.post("/api/query", {"path": "notes:broken", "args": {}})
        assert "1234" not in answer["errorMessage"], "errors are redacted"
        server.wait_for_line("the combination is 1234")
        assert server.end() == 0
    assert lock_holder(server.database) is None


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(app: Path) -> None:
    (app / "functions" / "slow.py").write_text(SLOW)
    with running("serve", app, sign="serving http://127.0.0.1:") as server, ThreadPoolExecutor() as threads:
        asked = threads.submit(server.post, "/api/action", {"path": "slow:wait", "args": {}})
        server.wait_for_line("it waits")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("SIGTERM: stopping; once more ends it at once")
        assert server.end() == -signal.SIGTERM
        assert isinstance(asked.exception(), OSError)


@pytest.mark.slow
def test_a_database_in_use_is_exit_code_69(app: Path) -> None:
    with running("serve", app, sign="serving http://127.0.0.1:") as server:
        code, _, error = call("serve", "--app", app, "--port", "0")
        assert code == 69
        assert f"is in use by process {server.process.pid}, which serves at {server.address}" in error
        port = server.address.rpartition(":")[2]
        code, _, error = call("serve", "--app", app, "--port", port, "--database", app / "other.db")
        assert code == 69
        assert f"127.0.0.1:{port} cannot be used" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("engine.toml", "prt = 1", "prt: unknown key; did you mean `port`?"),
        ("engine.toml", "host = '0.0.0.0'", "there is no [admin] key_sha256"),
        ("schema.py", "from engine import Table\nclass A(Table):\n    _x: int", "_x"),
        ("functions/notes.py", "import nothing_of_that_name", "nothing_of_that_name"),
    ],
)
def test_what_is_wrong_in_the_app_is_exit_code_78(app: Path, file: str, text: str, message: str) -> None:
    (app / file).write_text(text)
    code, output, error = call("serve", "--app", app, "--port", "0")
    assert (code, output) == (78, "")
    assert message in error
    assert not (app / "data").exists(), "nothing was changed"


@pytest.mark.slow
def test_an_admin_key_opens_the_server_to_other_machines_and_to_admins(app: Path) -> None:
    key = call("admin-key")[1].strip()
    (app / "engine.toml").write_text(f'host = "0.0.0.0"\n[admin]\nkey_sha256 = ["{digest_of(key)}"]')
    with running("serve", app, sign="serving http://127.0.0.1:") as server:
        assert any("any web page may connect" in line for line in server.said)
        ask = {"path": "notes:wipe", "args": {}, "format": "json"}
        assert server.post("/api/function", ask, Authorization=f"Convex {key}")["value"] == "0"


# -- dev


@pytest.mark.slow
def test_dev_reloads_on_save_and_keeps_the_old_code_when_the_new_is_wrong(app: Path) -> None:
    with running("dev", app, sign="Ctrl-C") as server:
        assert any("engine run notes:" in line for line in server.said)
        ask = {"path": "notes:answer", "args": {}}
        (app / "functions" / "more.py").write_text("import schema")
        notes = app / "functions" / "notes.py"
        notes.write_text(f"{NOTES}\n@query\ndef answer(ctx: QueryCtx) -> int:\n    return 1\n")
        server.wait_for_line("functions/notes.py: the new code is live.")
        assert server.post("/api/query", ask)["value"] == 1
        notes.write_text("def answer(")
        server.wait_for_line("functions/notes.py: not loaded, the old code goes on serving.")
        server.wait_for_line("SyntaxError")
        assert server.post("/api/query", ask)["value"] == 1
        notes.write_text(f"{NOTES}\n@query\ndef answer(ctx: QueryCtx) -> int:\n    return 2\n")
        server.wait_for_line("the new code is live.")
        assert server.post("/api/query", ask)["value"] == 2
        (app / "engine.toml").write_text("port = 1")
        server.wait_for_line("What is not under [app] needs a new start: stop and start again.")
        assert server.end(signal.SIGINT) == 0


@pytest.mark.slow
def test_dev_signs_anybody_in_and_shows_errors_whole(app: Path) -> None:
    with running("dev", app, sign="Ctrl-C") as server:
        token = server.post("/dev/token", {"subject": "alice"})["token"]
        ask = {"path": "notes:me", "args": {}}
        assert server.post("/api/query", ask, Authorization=f"Bearer {token}")["value"] == "alice"
        assert call("run", "--app", app, "notes:me", "--identity", "alice")[:2] == (0, '"alice"\n')
        assert "1234" in server.post("/api/query", {"path": "notes:broken", "args": {}})["errorMessage"]
    with running("serve", app, sign="serving http://127.0.0.1:") as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.post("/api/query", ask, Authorization=f"Bearer {token}")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            server.post("/dev/token", {"subject": "alice"})


# -- functions, help, codes


def test_functions_are_listed_as_they_were_written(app: Path) -> None:
    result = CliRunner().invoke(main, ["functions", "--app", str(app)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "notes:add       mutation  (text: str, kind: 'a' | 'b' = 'a', note_id: Id[Note] | None = None) -> float",
        "notes:broken    query     () -> None",
        "notes:double    action    (number: int, factors: dict[str, float] | None = None) -> int",
        "notes:list_all  query     (limit: int = 10) -> list[Note]",
        "notes:me        query     () -> str | None",
        "notes:wipe      mutation  () -> Int64  [internal, cron 0 0 1 1 *]",
    ]
    public = CliRunner().invoke(main, ["functions", "--app", str(app), "--no-internal"])
    assert "notes:wipe" not in public.output


def test_routes_are_listed_after_the_functions(app: Path) -> None:
    (app / "functions" / "later.py").write_text(
        "from engine import ActionCtx, Response, http\n"
        '@http.get("/app/{name}")\nasync def show(ctx: ActionCtx, name: str) -> Response | None: ...\n'
    )
    result = CliRunner().invoke(main, ["functions", "--app", str(app)])
    assert result.output.splitlines()[-1] == "/app/{name}     GET       (name: str) -> Response | None"


def test_when_jobs_come_is_shown(app: Path) -> None:
    (app / "functions" / "later.py").write_text(
        "from engine import ActionCtx, action, cron\n"
        '@cron("0 3 * * *")\n@action(internal=True)\nasync def night(ctx: ActionCtx) -> None: ...\n'
        "@cron(minutes=1)\n@action(internal=True)\nasync def tick(ctx: ActionCtx) -> None: ...\n"
    )
    registry = load_app(app, Limits()).registry
    assert describe(registry.by_path["later:night"]) == "() -> None  [internal, cron 0 3 * * *]"
    assert describe(registry.by_path["later:tick"]) == "() -> None  [internal, each 60 s]"


@pytest.mark.parametrize("name", [*_LATER_COMMANDS, *main.commands])
def test_each_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert f"Usage: main {name}" in result.output
    summary = next(
        line for line in CliRunner().invoke(main, ["-h"]).output.splitlines() if line.startswith(f"  {name} ")
    )
    assert summary.endswith("."), "the first sentence fits"


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("engine, version ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgument("x"), 1),
        (AppError("x"), 1),
        (FunctionFailed("x"), 1),
        (Overloaded("x"), 69),
        (StorageFull("x"), 69),
        (InternalError("x"), 70),
        (CommitUnknown("x"), 75),
        (ConfigError("x"), 78),
        (SchemaError("x"), 78),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: EngineError, code: int) -> None:
    assert exit_code_of(error) == code
