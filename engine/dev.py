"""`engine dev`: new code on save, and what a newcomer sees first.

Invariants
  1. Saving swaps the app's code whole or not at all: with an error the old code goes on serving, and the error is shown.
  2. Only what is code or configuration counts as a save: not bytecode, not the database, not an editor's own files.
"""

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table as Columns
from rich.text import Text
from watchfiles import Change, awatch

from engine.config import CONFIG_FILE
from engine.errors import DeveloperError
from engine.functions.registry import Registry

FUNCTIONS_DIRECTORY = "functions"
_QUIET_MS = 30  # saves this close together are one: an editor writes, renames and touches
_GROUPED_MS_MAX = 200


def is_source(change: Change, path: str) -> bool:
    """Whether a changed file can change what the app does (2)."""
    name = Path(path).name
    return (name.endswith(".py") and not name.startswith(".")) or name == CONFIG_FILE


class Saves:
    """The saves of an app's sources, from entering the `async with` on.

    The app's own directory is not watched in depth: an environment or `node_modules` in it has 100,000 files.
    """

    def __init__(self, app: Path) -> None:
        self._app = app.resolve()
        self._stopped = asyncio.Event()
        self._paths: asyncio.Queue[frozenset[Path]] = asyncio.Queue()  # one item for each group of saves
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
        self._stopped.set()
        await asyncio.gather(*self._watchers)

    async def next(self) -> frozenset[str]:
        """What was saved since the last time, as paths below the app; waits for a save."""
        paths = await self._paths.get()
        while not self._paths.empty():
            paths |= self._paths.get_nowait()
        return frozenset(path.relative_to(self._app).as_posix() for path in paths)

    async def _watch(self, directory: Path, *, is_deep: bool) -> None:
        async for changes in awatch(
            directory,
            watch_filter=is_source,
            debounce=_GROUPED_MS_MAX,
            step=_QUIET_MS,
            stop_event=self._stopped,
            recursive=is_deep,
        ):
            self._paths.put_nowait(frozenset(Path(path) for _, path in changes))


async def reload_on_save(saves: Saves, reload: Callable[[], Awaitable[None]], console: Console) -> None:
    """Call `reload` at each save, for ever; it raises, and has changed nothing, if the code is wrong (1)."""
    while True:
        saved = await saves.next()
        names = ", ".join(sorted(saved))
        if saved == {CONFIG_FILE}:
            console.print(f"{names} was saved: stop and start again to use it.", style="yellow", markup=False)
            continue
        try:
            await reload()
        except Exception as error:  # noqa: BLE001 - a door: whatever the app's code raises is its author's to see
            console.print(f"{names} was not loaded; the old code goes on serving.", style="bold red", markup=False)
            console.print(explain(error), markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(f"{names} is live.", style="green", markup=False)


def explain(error: Exception) -> str:
    """An error in the app's code, for its author; the loader's errors say where by themselves."""
    return str(error) if isinstance(error, DeveloperError) else "".join(traceback.format_exception(error)).rstrip()


def banner(address: str, *, app: Path, database: Path, registry: Registry) -> Group:
    """What runs, and what to open and type next."""
    rows = Columns.grid(padding=(0, 2))
    sign_in = f"""curl {address}/dev/token -H 'Content-Type: application/json' -d '{{"subject": "alice"}}'"""
    for label, text in (
        ("serving", f"{app.resolve()} with {len(registry.by_path)} functions, data in {database}"),
        ("connect", f'new ConvexClient("{address}")  ·  ConvexClient("{address}") in Python'),
        ("call", f"engine run {_example_call(registry)}"),
        ("sign in", sign_in),
        ("edit", f"save a file in {FUNCTIONS_DIRECTORY}/ and every subscriber has the new code's results"),
        ("stop", "Ctrl-C"),
    ):
        rows.add_row(Text(label, style="dim"), Text(text, no_wrap=True, overflow="ignore"))
    return Group(Text(f"\n  {address}", style="bold green"), Padding(rows, (1, 2)))


def _example_call(registry: Registry) -> str:
    """A query of this app, rather one that needs no arguments."""
    queries = [function for function in registry.by_path.values() if function.kind == "query" and not function.is_internal]
    for function in queries:
        if function.signature.is_callable_without_arguments:
            return function.path
    return f"{queries[0].path} '{{…}}'" if queries else "module:function '{}'"
