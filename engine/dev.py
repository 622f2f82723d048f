"""`engine dev`: new code on save, and what a newcomer sees first.

Invariants
  1. Saving swaps the app's code whole, or not at all: then the error is shown and the old code goes on serving.
  2. Only what is code or configuration counts as a save: not bytecode, not the database, not an editor's own files.
"""

import asyncio
import inspect
import logging
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType

import click
from rich.console import Console
from rich.text import Text
from watchfiles import Change, awatch

from engine.auth.development import DevelopmentIssuer
from engine.cli import (
    address_options,
    app_option,
    configuration,
    database_option,
    database_path,
    exit_code_of,
    run_loop,
)
from engine.clock import SystemClock
from engine.config import CONFIG_FILE, Config
from engine.errors import DeveloperError
from engine.events import Events, Reran
from engine.functions.registry import Registry
from engine.observe.log import set_up_logging
from engine.observe.pushes import PushTrace, text_of
from engine.server.development import development_routes
from engine.server.held_loop import watched_loop
from engine.server.process import check_free, end_on_failure, serving_process, stop_signals

FUNCTIONS_DIRECTORY = "functions"
_QUIET_MS = 30  # saves this close together are one: an editor writes, renames and touches
_GROUPED_MS_MAX = 200


def is_source(change: Change, path: str) -> bool:
    """Whether a changed file can change what the app does (2)."""
    name = Path(path).name
    return (name.endswith(".py") and not name.startswith(".")) or name == CONFIG_FILE


def is_source_or_new_directory(change: Change, path: str) -> bool:
    """The same, and a directory that has appeared: its first files may have come before it was watched."""
    if is_source(change, path):
        return True
    is_ours = not Path(path).name.startswith((".", "__pycache__"))
    return change is Change.added and is_ours and Path(path).is_dir()


class Saves:
    """The saves of an app's sources, from entering the `async with` on until `stop`.

    The app's own directory is not watched in depth: an environment or `node_modules` in it has 100,000 files.
    """

    def __init__(self, app: Path, stop: asyncio.Event) -> None:
        self._app, self._stop = app.resolve(), stop
        self._paths: asyncio.Queue[frozenset[Path]] = asyncio.Queue()  # an item each group of saves; empty: no more
        self._watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Saves":
        directories = [(self._app, False), (self._app / FUNCTIONS_DIRECTORY, True)]
        self._watchers = [
            asyncio.create_task(self._watch(directory, is_deep=is_deep))
            for directory, is_deep in directories
            if directory.is_dir()
        ]
        await asyncio.sleep(0)  # each sets its watch up when it first runs: a save from now on is seen
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        await asyncio.gather(*self._watchers)

    async def next(self) -> frozenset[str]:
        """What was saved since the last time, as paths below the app; waits for a save. Empty: there are no more."""
        if any(watcher.done() for watcher in self._watchers):  # stopped; or broken, which `__aexit__` raises
            return frozenset()
        paths = await self._paths.get()
        while not self._paths.empty():
            paths |= self._paths.get_nowait()
        return frozenset(path.relative_to(self._app).as_posix() for path in paths)

    async def _watch(self, directory: Path, *, is_deep: bool) -> None:
        try:
            async for changes in awatch(
                directory,
                watch_filter=is_source_or_new_directory if is_deep else is_source,
                debounce=_GROUPED_MS_MAX,
                step=_QUIET_MS,
                stop_event=self._stop,
                recursive=is_deep,
            ):
                self._paths.put_nowait(frozenset(Path(path) for _, path in changes))
        finally:
            self._paths.put_nowait(frozenset())


async def reload_on_save(saves: Saves, reload: Callable[[], Awaitable[None]], console: Console) -> None:
    """Call `reload` at each save; it raises, and has changed nothing, if the code is wrong (1)."""
    while saved := await saves.next():
        names = ", ".join(sorted(saved))
        try:
            await reload()
        except Exception as error:  # noqa: BLE001 - a door: whatever the app's code raises is its author's to see
            console.print(f"{names}: not loaded, the old code goes on serving.", style="bold red", markup=False)
            console.print(explain(error), markup=False, highlight=False, soft_wrap=True)
        else:
            what = "settings are" if saved == {CONFIG_FILE} else "code is"
            console.print(f"{names}: the new {what} live.", style="green", markup=False)
            if CONFIG_FILE in saved:
                rest = "What is not under [app] needs a new start: stop and start again."
                console.print(rest, style="yellow", markup=False)


def explain(error: Exception) -> str:
    """An error in the app's code, for its author; the loader's errors say where by themselves."""
    return str(error) if isinstance(error, DeveloperError) else "".join(traceback.format_exception(error)).rstrip()


def banner(address: str, *, app: Path, database: Path, registry: Registry) -> Text:
    """What runs, and what to open and type next."""
    lines = {
        "serving": f"{app.resolve()}, {len(registry.by_path)} functions, data in {database}",
        "connect": f'new ConvexClient("{address}")',
        "call": f"engine run {_example_call(registry)}",
        "sign in": f"""curl {address}/dev/token -H 'Content-Type: application/json' -d '{{"subject": "alice"}}'""",
        "edit": f"save a file in {FUNCTIONS_DIRECTORY}/ and every subscriber has the results of the new code",
        "stop": "Ctrl-C",
    }
    text = Text(f"\n  {address}\n\n", style="bold green")
    for label, line in lines.items():
        text.append(f"  {label:9}", style="not bold dim default").append(f"{line}\n", style="not bold default")
    return text


def _example_call(registry: Registry) -> str:
    """A query of this app, rather one that needs no arguments."""
    queries = [
        function for function in registry.by_path.values() if function.kind == "query" and not function.is_internal
    ]
    for query in queries:
        parameters = list(inspect.signature(query.callable).parameters.values())[1:]
        if all(parameter.default is not parameter.empty for parameter in parameters):
            return query.path
    return f"{queries[0].path} '{{…}}'" if queries else "MODULE:FUNCTION"


@click.command()
@app_option
@database_option
@address_options
@click.option("--trace", is_flag=True, help="Print why each query runs again; GET /dev/pushes has it in any case.")
def dev(app: Path, database: Path | None, host: str | None, port: int | None, trace: bool) -> None:
    """Serve an app while you write it.

    Save a file and it is live; errors are shown whole; anybody can log in:
    POST /dev/token hands out tokens for made-up users, on this machine only.

    \b
    engine dev
    engine dev --app examples/chat --port 3211
    """
    set_up_logging(level=logging.WARNING)
    config = configuration(app, "development", host, port)
    run_loop(_serve(app, database_path(app, database), config, does_print_pushes=trace))


async def _serve(app: Path, database: Path, config: Config, *, does_print_pushes: bool) -> None:
    console, clock, events = Console(stderr=True), SystemClock(), Events()

    def print_push(push: Reran) -> None:
        if does_print_pushes:
            console.print(text_of(push), style="dim", markup=False, highlight=False, soft_wrap=True)

    trace = PushTrace(events, print_push)
    check_free(database)
    issuer = DevelopmentIssuer.open(database, clock)
    with stop_signals() as stop:
        async with (
            serving_process(
                app,
                database,
                config,
                clock,
                providers=[issuer.provider],
                extra_routes=development_routes(issuer, trace),
                events=events,
                repeats_queries=True,
            ) as (engine, address),
            Saves(app, stop) as saves,
        ):
            for change in engine.schema_changes:
                console.print(f"schema: {change}", style="dim", markup=False)
            console.print(banner(address, app=app, database=database, registry=engine.registry), soft_wrap=True)
            end_on_failure(engine, exit_code_of)
            with watched_loop(config.limits, clock, exit_code=None):
                await reload_on_save(saves, engine.reload, console)
