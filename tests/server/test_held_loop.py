"""A serving process whose loop is held: what its log says, and how it ends. Real processes."""

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.cli import EXIT_INTERNAL

REPOSITORY = Path(__file__).parents[2]
SECONDS_MAX = 30
# neither the query's time nor the watchdog's exception ends a call that blocks
FUNCTIONS = """
import re, time
from engine import QueryCtx, query

@query
def blocked(ctx: QueryCtx, seconds: float) -> int:
    time.sleep(seconds)
    return 1

@query
def kept(ctx: QueryCtx) -> bool:
    return bool(re.match(r"(a+)+$", "a" * 60 + "b"))

@query
def one(ctx: QueryCtx) -> int:
    return 1
"""
LIMITS = """
[limits]
run_ms_max = 60_000
loop_held_dump_seconds = 1
loop_held_seconds_max = 3
"""


class Server:
    """`engine serve`, and its log."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log = process, log
        while (address := re.search(r"serving (http://\S+)", self.log())) is None:
            assert process.poll() is None, self.log()
        self._address = address[1]

    def log(self) -> str:
        return self._log.read_text()

    def ask(self, path: str, **arguments: float) -> object:
        body = json.dumps({"path": path, "args": arguments, "format": "json"}).encode()
        request = urllib.request.Request(f"{self._address}/api/query", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS_MAX) as response:
            return json.load(response)["value"]


@contextmanager
def serving(directory: Path, limits: str = LIMITS) -> Iterator[Server]:
    (directory / "functions").mkdir()
    (directory / "functions" / "m.py").write_text(FUNCTIONS)
    (directory / "schema.py").write_text("")
    (directory / "engine.toml").write_text(limits)
    log = directory / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", "serve", "--app", directory, "--port", "0"],
            cwd=REPOSITORY,
            stdout=stream,
            stderr=stream,
            text=True,
        )
    try:
        yield Server(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_held_loop_is_told_with_its_stack_and_then_ends_the_process(tmp_path: Path) -> None:
    with serving(tmp_path) as server, ThreadPoolExecutor() as threads:
        assert server.ask("m:one") == 1
        threads.submit(server.ask, "m:blocked", seconds=SECONDS_MAX)
        assert server.process.wait(SECONDS_MAX) == EXIT_INTERNAL
    log = server.log()
    assert re.search(r"ERROR engine: the event loop is held for 1 s, nobody is served\n", log)
    assert re.search(r'ERROR engine:   File ".*m\.py", line 7, in blocked\n', log)
    assert re.search(r"CRITICAL engine: the process ends: its event loop was held for 3 s", log)
    assert all(re.match(r"\d{4}-.* (INFO|ERROR|CRITICAL|WARNING) ", line) for line in log.splitlines())


@pytest.mark.slow
def test_one_that_goes_on_in_time_is_only_told(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert server.ask("m:blocked", seconds=2.2) == 1
        assert server.ask("m:one") == 1
        while "WARNING engine: the event loop goes on; it was held for about" not in server.log():
            assert server.process.poll() is None
        assert "in blocked" in server.log()
        server.process.terminate()
        assert server.process.wait(SECONDS_MAX) == 0


@pytest.mark.slow
def test_a_call_that_keeps_the_interpreter_ends_the_process_too(tmp_path: Path) -> None:
    limits = LIMITS.replace("loop_held_seconds_max = 3", "loop_held_seconds_max = 1")
    with serving(tmp_path, limits) as server, ThreadPoolExecutor() as threads:
        threads.submit(server.ask, "m:kept")
        assert server.process.wait(SECONDS_MAX) == 1
    assert re.search(r"Timeout \(0:00:06\)!\n", server.log())
    assert re.search(r'File ".*m\.py", line 12 in kept\n', server.log())
