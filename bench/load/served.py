"""What `engine serve` runs; besides, it counts for the load, once it is asked to.

`python -m bench.load.served APP DATABASE PORT`. `GET /bench/runs` gives how often each query ran since it was first
asked: `{"chat:…": 12}`; counting costs a look-up for each run. `GET /bench/calls` gives how many functions the event
loop's thread has called since it was last asked: it turns that counting, which makes all slow, on and off in turn.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from aiohttp import web

from engine.cli import configuration, exit_code_of, run_loop
from engine.clock import SystemClock
from engine.config import Config
from engine.events import Event, Events, QueryRan
from engine.observe.log import set_up_logging
from engine.server.process import end_on_failure, serving_process, stop_signals

RUNS_PATH, CALLS_PATH = "/bench/runs", "/bench/calls"


def main() -> None:
    app, database, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    set_up_logging()
    run_loop(_serve(app, database, configuration(app, "production", "127.0.0.1", port)))


class _Counts:
    """What is counted, for those who ask."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._run_counts: Counter[str] | None = None  # None until it is asked for
        self._call_count = 0
        self._is_counting_calls = False

    async def runs(self, request: web.Request) -> web.Response:
        if self._run_counts is None:
            self._run_counts = Counter()
            self._events.listen(self._ran)
        return web.json_response(self._run_counts)

    async def calls(self, request: web.Request) -> web.Response:
        self._is_counting_calls = not self._is_counting_calls
        sys.setprofile(self._called if self._is_counting_calls else None)
        count, self._call_count = self._call_count, 0
        return web.json_response(count)

    def _ran(self, event: Event) -> None:
        if isinstance(event, QueryRan):
            assert self._run_counts is not None
            self._run_counts[event.path] += 1

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        self._call_count += event in ("call", "c_call")


async def _serve(app: Path, database: Path, config: Config) -> None:
    events = Events()
    counts = _Counts(events)
    routes = [web.get(RUNS_PATH, counts.runs), web.get(CALLS_PATH, counts.calls)]
    process = serving_process(app, database, config, SystemClock(), events=events, extra_routes=routes)
    with stop_signals() as stop:
        async with process as (engine, _):
            end_on_failure(engine, exit_code_of)
            await stop.wait()


if __name__ == "__main__":
    main()
