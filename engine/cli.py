"""The command line: `engine dev | serve | run | explain | profile | functions | admin-key`.

Exit codes, those above 63 from `sysexits.h`, so that a supervisor knows what helps:

     0  it worked
     1  a function failed, or refused its arguments
     2  the command was typed wrong
    69  the database or the port is used by somebody else, or the server cannot answer now
    70  a bug of the engine, or a function that blocked it for 30 s; the log says where
    75  storage is in an unknown state: start again, and what was committed is there
    78  `engine.toml`, `schema.py` or `functions/` is wrong; nothing was changed
   130  interrupted

Results go to standard output, everything else to standard error.

The commands are click's: it has no dependencies, is stable since 2014 and kept by Pallets; Typer is a layer over a copy
of it that brings pydantic along and is not at 1.0.
"""

import asyncio
import importlib
import inspect
import json
import logging
import sys
import traceback
import urllib.error
import urllib.request
from base64 import b64decode, b64encode
from collections.abc import Callable, Coroutine
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click
import msgspec
import uvloop

from engine.auth.admin import digest_of, identity_of_attributes, make_admin_key
from engine.auth.development import DEVELOPMENT_ISSUER
from engine.backend import EngineBackend
from engine.clock import SystemClock
from engine.config import CONFIG_FILE, Config, Mode, load_config
from engine.engine import Engine
from engine.errors import (
    AuthenticationFailed,
    DeveloperError,
    EngineError,
    FunctionFailed,
    FunctionNotFound,
    InternalError,
    Overloaded,
    RequestError,
    StorageFailed,
)
from engine.functions.loader import load_app
from engine.functions.registry import Function
from engine.identity import Identity
from engine.ids import IdOf
from engine.live.live_query import Result
from engine.observe.explain import Explanation, text_of
from engine.observe.log import set_up_logging
from engine.observe.profile import Profile, profile_text, stacks_of
from engine.server.held_loop import watched_loop
from engine.server.process import check_free, end_on_failure, serving_process, stop_signals
from engine.storage.lock import lock_holder
from engine.sync.backend import ActionOutcome, MutationOutcome
from engine.values import Int64

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 69
EXIT_INTERNAL = 70
EXIT_STORAGE_UNKNOWN = 75
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130

_ANSWER_SECONDS = 30  # beyond the longest action
DEFAULT_DATABASE = Path("data") / "engine.db"
_LATER_COMMANDS = {"dev": "engine.dev"}  # command → the module that has it under this name

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")
_log = logging.getLogger("engine")


class _Commands(click.Group):
    """The commands, as they are defined; `dev`, a layer above this one, is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_LATER_COMMANDS, *self.commands]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _LATER_COMMANDS:
            command: click.Command = getattr(importlib.import_module(_LATER_COMMANDS[name]), name)
            return command
        return super().get_command(ctx, name)

    def invoke(self, ctx: click.Context) -> Any:
        """The door of the command line: every error becomes a message and a code, here."""
        try:
            return super().invoke(ctx)
        except EngineError as error:
            click.echo(f"engine: {error}", err=True)
            ctx.exit(exit_code_of(error))
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own way to end
        except Exception:  # noqa: BLE001 - the door
            click.echo(f"engine: a bug of the engine\n{traceback.format_exc()}", err=True)
            ctx.exit(EXIT_INTERNAL)


def exit_code_of(error: EngineError) -> int:
    match error:
        case StorageFailed():
            return EXIT_STORAGE_UNKNOWN
        case InternalError():
            return EXIT_INTERNAL
        case DeveloperError():
            return EXIT_CONFIG
        case Overloaded():
            return EXIT_UNAVAILABLE
        case _:
            return EXIT_FAILED


def app_option(command: Command) -> Command:
    kind = click.Path(exists=True, file_okay=False, path_type=Path)
    return click.option(
        "--app", type=kind, default=".", help="The directory of schema.py and functions/.  [default: this one]"
    )(command)


def database_option(command: Command) -> Command:
    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option("--database", type=kind, help="The SQLite file.  [default: data/engine.db in the app]")(command)


def address_options(command: Command) -> Command:
    host = click.option("--host", help=f"Where to listen.  [default: 127.0.0.1, or that of {CONFIG_FILE}]")
    port = click.option("--port", type=click.IntRange(0, 65_535), help="The port; 0 takes a free one.  [default: 3210]")
    return host(port(command))


def database_path(app: Path, database: Path | None) -> Path:
    return database if database is not None else app / DEFAULT_DATABASE


def _installed_version() -> str:
    try:
        return version("reactive-engine")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `engine dev` in a directory that has schema.py and functions/.",
)
@click.version_option(_installed_version(), prog_name="engine")
def main() -> None:
    """A reactive backend: typed tables in SQLite, Python functions, live queries."""


@main.command()
@app_option
@database_option
@address_options
def serve(app: Path, database: Path | None, host: str | None, port: int | None) -> None:
    """Serve an app to its users.

    Errors are redacted, and the app's code stays as it was at the start.

    SIGTERM and Ctrl-C stop gracefully: what was accepted is answered, clients come back by themselves.

    \b
    engine serve --app . --database /var/lib/app/engine.db --port 3210
    """
    set_up_logging()
    config = configuration(app, "production", host, port)
    run_loop(_serve(app, database_path(app, database), config))


async def _serve(app: Path, database: Path, config: Config) -> None:
    with stop_signals() as stop:
        async with serving_process(app, database, config, SystemClock()) as (engine, address):
            end_on_failure(engine, exit_code_of)
            _log.info("serving %s with %d functions, data in %s", address, len(engine.registry.by_path), database)
            with watched_loop(config.limits, engine.clock, exit_code=EXIT_INTERNAL):
                await stop.wait()


def configuration(app: Path, mode: Mode, host: str | None, port: int | None) -> Config:
    """That of the app, with what was typed over it."""
    typed = {"mode": mode, "host": host, "port": port}
    return load_config(app, {name: value for name, value in typed.items() if value is not None})


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@main.command()
@app_option
@database_option
@click.option(
    "--identity", metavar="USER", help='Act as a user: a development subject, or JSON {"issuer", "subject", …}.'
)
@click.argument("path")
@click.argument("arguments", default="{}", metavar="[JSON]")
def run(app: Path, database: Path | None, identity: str | None, path: str, arguments: str) -> None:
    """Call a function and print its result.

    PATH names it; its arguments are an object in JSON, `-` reads them from standard input. It runs in the process that
    serves the database, if one does, else here. Internal functions may be called too.

    \b
    engine run games:list
    engine run chat:get_messages '{"gameId": "…", "limit": 5}'
    engine run users:me --identity alice
    """
    asked = _Asked(path, _parse_arguments(arguments), _parse_identity(identity))
    database = database_path(app, database)
    server = _server_of(database)
    if server is not None:
        outcome = _run_there(server, asked, seconds_max=load_config(app).limits.action_seconds_max)
    else:
        outcome = run_loop(_run_here(app, database, asked))
    for line in outcome.log_lines:
        click.echo(line, err=True)
    if outcome.error_message is not None:
        data = "" if outcome.value is None else f"\n{_pretty(outcome.value)}"
        raise FunctionFailed(outcome.error_message + data)
    assert outcome.value is not None, "a function that succeeded has a value"
    click.echo(_pretty(outcome.value))


@main.command()
@app_option
@database_option
@click.option("--identity", metavar="USER", help="Ask as a user; without, nobody is signed in.")
@click.argument("path")
@click.argument("arguments", default="{}", metavar="[JSON]")
def explain(app: Path, database: Path | None, identity: str | None, path: str, arguments: str) -> None:
    """Run a query, and say what it read, what it cost, who shares it and what would run it again.

    \b
    engine explain games:list
    engine explain chat:get_messages '{"gameId": "…"}' --identity alice
    """
    asked = _Asked(path, _parse_arguments(arguments), _parse_identity(identity))
    database = database_path(app, database)
    server = _server_of(database)
    explanation = (
        msgspec.convert(_call_there(server, "explain", asked, seconds_max=_ANSWER_SECONDS), Explanation)
        if server is not None
        else run_loop(_explain_here(app, database, asked))
    )
    click.echo(text_of(explanation))


@main.command()
@app_option
@database_option
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=10.0, help="For how long.  [default: 10]")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A file for the stacks: a flame graph.")
def profile(app: Path, database: Path | None, seconds: float, output: Path | None) -> None:
    """Say where the time of a running server goes.

    By stage and by function, in the process that serves the database (`engine serve` or `engine dev`), while it serves:
    that costs it about 1 %. The file is for speedscope.app or flamegraph.pl: a stack and its microseconds a line.

    \b
    engine profile
    engine profile --seconds 60 --output stacks.txt
    """
    database = database_path(app, database)
    server = _server_of(database)
    if server is None:
        raise Overloaded(f"nobody serves {database}: start `engine serve` or `engine dev`, and ask while it works.")
    body = msgspec.json.encode({"seconds": seconds})
    told = msgspec.convert(_ask_there(server, "profile", body, f"Convex {server.key}", seconds_max=seconds), Profile)
    if output is not None:
        output.write_text(stacks_of(told))
    click.echo(profile_text(told))


async def _explain_here(app: Path, database: Path, asked: "_Asked") -> Explanation:
    async with Engine.open(app, database, mode="development") as engine:
        end_on_failure(engine, exit_code_of)
        return await engine.backend.explain(asked.path, asked.arguments, _identity_of(asked))


class _Server(msgspec.Struct, frozen=True):
    """The process that serves a database, and the key that it listens to."""

    address: str
    key: str


def _server_of(database: Path) -> _Server | None:
    """None when nobody serves the database: then it is free to be opened here."""
    holder = lock_holder(database)
    if holder is not None and holder.address is not None and holder.key is not None:
        return _Server(holder.address, holder.key)
    check_free(database)
    set_up_logging(level=logging.WARNING)
    return None


class _Asked(msgspec.Struct, frozen=True):
    """One call."""

    path: str
    arguments: bytes  # JSON of an object, in wire form
    acting_as: dict[str, Any] | None  # attributes of a user


class _Outcome(msgspec.Struct, frozen=True):
    """What one call gave."""

    value: bytes | None  # JSON in wire form; with an error its data, None if it has none
    error_message: str | None
    log_lines: tuple[str, ...]


def _parse_arguments(text: str) -> bytes:
    try:
        arguments = json.loads(sys.stdin.read() if text == "-" else text)
    except (ValueError, RecursionError) as cause:
        raise click.BadParameter(f"not JSON: {cause}", param_hint="JSON") from cause
    if not isinstance(arguments, dict):
        raise click.BadParameter('expected an object of arguments by name: {"limit": 5}', param_hint="JSON")
    return json.dumps(arguments).encode()


def _parse_identity(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        attributes = json.loads(text) if text.startswith("{") else {"issuer": DEVELOPMENT_ISSUER, "subject": text}
        identity_of_attributes(attributes)
    except (ValueError, RecursionError, AuthenticationFailed) as cause:
        raise click.BadParameter(str(cause), param_hint="--identity") from cause
    return dict(attributes)


def _pretty(value: bytes) -> str:
    """Indented, and with numbers as people write them: `1`, neither `1.0` nor `{"$integer": "AQAAAAAAAAA="}`."""
    return json.dumps(_with_plain_numbers(json.loads(value)), indent=2, ensure_ascii=False)


def _with_plain_numbers(value: Any) -> Any:
    match value:
        case float() if value.is_integer() and abs(value) <= 2**53:
            return int(value)
        case {"$integer": str(encoded), **others} if not others:
            return int.from_bytes(b64decode(encoded), "little", signed=True)
        case dict():
            return {name: _with_plain_numbers(member) for name, member in value.items()}
        case list():
            return [_with_plain_numbers(item) for item in value]
        case _:
            return value


async def _run_here(app: Path, database: Path, asked: _Asked) -> _Outcome:
    """On the database itself, which nobody serves."""
    async with Engine.open(app, database, mode="development") as engine:
        end_on_failure(engine, exit_code_of)
        outcome = await _call(engine.backend, asked)
    failure = outcome.failure
    if failure is None:
        return _Outcome(outcome.value, None, outcome.log_lines)
    return _Outcome(failure.data, failure.message, outcome.log_lines)


async def _call(backend: EngineBackend, asked: _Asked) -> Result | MutationOutcome | ActionOutcome:
    identity = _identity_of(asked)
    match backend.function_kind(asked.path, is_admin=True):
        case "query":
            return await backend.http_query(asked.path, asked.arguments, identity, is_admin=True)
        case "mutation":
            return await backend.http_mutation(asked.path, asked.arguments, identity, is_admin=True)
        case "action":
            return await backend.http_action(asked.path, asked.arguments, identity, is_admin=True)
        case None:
            raise FunctionNotFound(asked.path, "query, mutation or action")


def _identity_of(asked: _Asked) -> Identity | None:
    return None if asked.acting_as is None else identity_of_attributes(asked.acting_as)


def _run_there(server: _Server, asked: _Asked, *, seconds_max: float) -> _Outcome:
    """By the process that serves the database."""
    answer = _call_there(server, "function", asked, seconds_max=seconds_max)
    log_lines = tuple(answer.get("logLines", ()))
    if answer["status"] == "success":
        return _Outcome(json.dumps(answer["value"]).encode(), None, log_lines)
    data = json.dumps(answer["errorData"]).encode() if "errorData" in answer else None
    return _Outcome(data, answer["errorMessage"], log_lines)


def _call_there(server: _Server, endpoint: str, asked: _Asked, *, seconds_max: float) -> Any:
    """What an endpoint of that process answers about a call."""
    authorization = f"Convex {server.key}"
    if asked.acting_as is not None:
        authorization += f":{b64encode(json.dumps(asked.acting_as).encode()).decode()}"
    body = b'{"path":%b,"format":"convex_encoded_json","args":%b}' % (json.dumps(asked.path).encode(), asked.arguments)
    return _ask_there(server, endpoint, body, authorization, seconds_max=seconds_max)


def _ask_there(server: _Server, endpoint: str, body: bytes, authorization: str, *, seconds_max: float) -> Any:
    request = urllib.request.Request(  # noqa: S310 - the address stands in our own lock file
        f"{server.address}/api/{endpoint}", body, {"Content-Type": "application/json", "Authorization": authorization}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business on this machine
    try:
        with opener.open(request, timeout=seconds_max + _ANSWER_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as refusal:
        with refusal:
            raise _refused(refusal.code, refusal.read()) from refusal
    except OSError as cause:
        raise Overloaded(f"{server.address} does not answer: {cause}") from cause


def _refused(status: int, body: bytes) -> EngineError:
    """What the server says about a request that did not come as far as a function."""
    try:
        message = f"{json.loads(body)['message']} ({status})"
    except (ValueError, TypeError, KeyError):
        message = f"{body[:200].decode(errors='replace')} ({status})"
    match status:
        case 400 | 413:
            return RequestError(message)
        case 500:
            return InternalError(message)
        case _:
            return Overloaded(message)


@main.command()
@app_option
@click.option("--internal/--no-internal", "with_internal", default=True, help="Also those that clients cannot call.")
def functions(app: Path, with_internal: bool) -> None:
    """List the functions of an app.

    Path, kind, and arguments with their types, then the HTTP routes likewise. No database is opened; this also checks
    that schema.py and functions/ are in order.

    \b
    engine functions
    engine functions --app examples/chat --no-internal
    """
    registry = load_app(app, load_config(app).limits).registry
    shown = [function for function in registry.by_path.values() if with_internal or not function.is_internal]
    listed = sorted(shown, key=lambda function: function.path)
    rows: list[tuple[str, str, str]] = [(function.path, function.kind, describe(function)) for function in listed]
    rows += [(route.path, route.method, describe(route.function)) for route in registry.routes.routes]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for path, kind, text in rows:
        click.echo(f"{path:{widths[0]}}  {kind:{widths[1]}}  {text}")


def describe(function: Function) -> str:
    """`(game_id: Id[Game], limit: int = 50) -> list[ChatMessage]  [internal, each 60 s]`"""
    hints = get_type_hints(function.callable, include_extras=True)
    parameters = list(inspect.signature(function.callable).parameters.values())[1:]
    arguments = ", ".join(
        f"{parameter.name}: {type_name(hints[parameter.name])}"
        + ("" if parameter.default is parameter.empty else f" = {parameter.default!r}")
        for parameter in parameters
    )
    result = f" -> {type_name(hints['return'])}" if "return" in hints else ""
    marks = ["internal"] if function.is_internal else []
    if function.cron is not None:
        interval_ms = function.cron.interval_ms
        marks.append(f"cron {function.cron.expression}" if interval_ms is None else f"each {interval_ms / 1_000:g} s")
    return f"({arguments}){result}" + (f"  [{', '.join(marks)}]" if marks else "")


def type_name(annotation: Any) -> str:
    """An annotation as its author wrote it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation == Int64:
        return "Int64"
    if annotation in (None, NoneType):
        return "None"
    if origin is Annotated:
        ids = [repr(mark) for mark in parts[1:] if isinstance(mark, IdOf)]
        return ids[0] if ids else type_name(parts[0])
    if origin is Literal:
        return " | ".join(repr(part) for part in parts)
    if origin in (Union, UnionType):
        return " | ".join(type_name(part) for part in parts)
    if origin is not None:
        return f"{origin.__name__}[{', '.join('…' if part is ... else type_name(part) for part in parts)}]"
    return getattr(annotation, "__name__", str(annotation))


@main.command("admin-key")
def admin_key() -> None:
    """Make an admin key.

    The key comes on standard output, the line of engine.toml that accepts it beside it. It is shown once: the engine
    keeps only its SHA-256. To replace a key, list the new digest beside the old one, start again, change over, and take
    the old one out.
    """
    key = make_admin_key(SystemClock())
    click.echo("Keep this key; clients send it as `Authorization: Convex <key>`:\n", err=True)
    click.echo(key)
    click.echo(f'\nand put this into {CONFIG_FILE}:\n\n[admin]\nkey_sha256 = ["{digest_of(key)}"]', err=True)
