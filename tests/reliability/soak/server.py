"""What `engine dev` serves, with doors for the soak: what is alive in the process, and a reload without a save.

`python -m tests.reliability.soak.server APP DATABASE WORKAROUNDS` prints the address once it serves. WORKAROUNDS is
JSON: periods that are days in earnest, and a way to be broken on purpose (`BREAKS`) for the control.
"""

import asyncio
import gc
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from engine.cli import EXIT_INTERNAL, configuration, exit_code_of, run_loop
from engine.clock import SystemClock
from engine.engine import Engine
from engine.functions import scheduler
from engine.live.view import View
from engine.observe.log import set_up_logging
from engine.server.held_loop import watched_loop
from engine.server.process import end_on_failure, serving_process, stop_signals
from engine.transaction.committer import Committer

CENSUS_PATH, RELOAD_PATH = "/soak/census", "/soak/reload"


def main() -> None:
    app, database, workarounds = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    scheduler._KEPT_MS = workarounds["jobs_kept_seconds"] * 1000
    scheduler.JobScheduler._sweep_later.__defaults__ = (workarounds["sweep_seconds"],)
    if workarounds["break"]:
        BREAKS[workarounds["break"]]()
    set_up_logging()
    run_loop(_serve(app, database))


async def _serve(app: Path, database: Path) -> None:
    engines: list[Engine] = []

    async def census(request: web.Request) -> web.Response:
        return web.json_response(_census(engines[0]))

    async def reload(request: web.Request) -> web.Response:
        await engines[0].reload()
        return web.json_response(None)

    config, clock = configuration(app, "development", "127.0.0.1", 0), SystemClock()
    routes = [web.get(CENSUS_PATH, census), web.post(RELOAD_PATH, reload)]
    with stop_signals() as stop:
        async with serving_process(app, database, config, clock, extra_routes=routes) as (engine, address):
            engines.append(engine)
            end_on_failure(engine, exit_code_of)
            sys.stdout.write(f"{address}\n")
            sys.stdout.flush()
            with watched_loop(config.limits, clock, exit_code=EXIT_INTERNAL):
                await stop.wait()


def _census(engine: Engine) -> dict[str, int]:
    """How many there are of what must not grow: tasks, threads, files, and instances of each class of the engine."""
    gc.collect()
    alive = Counter(
        f"{type(each).__module__}.{type(each).__qualname__}"
        for each in gc.get_objects()
        if type(each).__module__.startswith("engine.")
    )
    publisher = engine._publisher
    return {
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "views": len(publisher.views),
        "read sets": len(publisher._index),
        "cached results": len(publisher.cache._idle),
        "moments": len(publisher._moments),
        "sessions": len(engine._disconnects._connection_counts),
        **alive,
    }


def _keep_views() -> None:
    """A view that is closed goes on."""
    View.close = lambda self: None  # type: ignore[method-assign]


def _keep_bytes() -> None:
    """Each mutation leaves 100 kB behind."""
    kept: list[bytes] = []
    submit = Committer.submit

    def submit_and_keep(self: Committer, submission: Any) -> None:
        kept.append(os.urandom(100_000))
        submit(self, submission)

    Committer.submit = submit_and_keep  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {"views are kept": _keep_views, "bytes are kept": _keep_bytes}


if __name__ == "__main__":
    main()
