"""What `engine serve` runs; besides, it tells how often each query ran: `GET /bench/runs` gives `{"chat:…": 12}`.

`python -m bench.load.served APP DATABASE PORT`. Counting costs a look-up for each run of a query.
"""

import sys
from collections import Counter
from pathlib import Path

from aiohttp import web

from engine.cli import configuration, exit_code_of, run_loop
from engine.clock import SystemClock
from engine.config import Config
from engine.events import Event, Events, QueryRan
from engine.observe.log import set_up_logging
from engine.server.process import end_on_failure, serving_process, stop_signals

RUNS_PATH = "/bench/runs"


def main() -> None:
    app, database, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    set_up_logging()
    run_loop(_serve(app, database, configuration(app, "production", "127.0.0.1", port)))


async def _serve(app: Path, database: Path, config: Config) -> None:
    events, run_counts = Events(), Counter[str]()

    def count(event: Event) -> None:
        if isinstance(event, QueryRan):
            run_counts[event.path] += 1

    async def tell(request: web.Request) -> web.Response:
        return web.json_response(run_counts)

    events.listen(count)
    process = serving_process(
        app, database, config, SystemClock(), events=events, extra_routes=[web.get(RUNS_PATH, tell)]
    )
    with stop_signals() as stop:
        async with process as (engine, _):
            end_on_failure(engine, exit_code_of)
            await stop.wait()


if __name__ == "__main__":
    main()
