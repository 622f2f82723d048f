"""A served app in its own process, to be killed at any moment and started again.

Invariants
  1. App, database and address stay the same over every kill.
  2. `is_up` is cleared before the signal is sent: a connection that ends while it is set was ended by a living server.
"""

import asyncio
import os
import random
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS_MAX = 30  # a server that takes longer to start or to die hangs
_CONNECT_PACE_SECONDS = 0.02
_LOG_TAIL_LENGTH = 4_000

# Below the ports that Linux gives to outgoing connections: one of those could be the server's own while it is down, and
# a client that connects from the very port it connects to would talk to itself.
_PORTS = range(20_000, 32_000)


class ServerProcess:
    """`python -m engine serve` over one app and one database."""

    def __init__(self, app: Path, database: Path) -> None:
        self.database = database
        self.is_up = asyncio.Event()
        self.start_count = 0
        self._app, self._log_file, self._port = app, database.with_suffix(".log"), _free_port()
        self._process: asyncio.subprocess.Process | None = None  # None while none runs

    @property
    def sync_address(self) -> str:
        return f"http://127.0.0.1:{self._port}/api/1.48.0/sync"

    def log(self) -> str:
        """What all the processes so far have printed."""
        return self._log_file.read_text(errors="replace")

    def log_tail(self) -> str:
        return f"the server's log ends:\n{self.log()[-_LOG_TAIL_LENGTH:]}"

    async def start(self) -> None:
        """Start a process and wait until it takes connections."""
        assert self._process is None, "invariant 1: one process at a time has the address"
        self.start_count += 1
        paths = ["--app", str(self._app), "--database", str(self.database)]
        with self._log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "engine", "serve", *paths, "--host", "127.0.0.1", "--port", str(self._port)),
                cwd=REPOSITORY,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
            )
        async with asyncio.timeout(SECONDS_MAX):
            while not await self._takes_connections():
                with suppress(TimeoutError):
                    code = await asyncio.wait_for(self._process.wait(), _CONNECT_PACE_SECONDS)
                    raise AssertionError(f"the server ended with {code} at start {self.start_count}; {self.log_tail()}")
        self.is_up.set()

    def kill(self) -> None:
        """SIGKILL, now: it says no goodbye and flushes nothing."""
        assert self._process is not None
        self.is_up.clear()  # invariant 2
        with suppress(ProcessLookupError):  # it has ended by itself: `ended` says so
            self._process.kill()

    async def ended(self) -> None:
        """Wait until the process is gone, by `kill` and by nothing else."""
        assert self._process is not None
        try:
            code = await asyncio.wait_for(self._process.wait(), SECONDS_MAX)
        except TimeoutError:
            raise AssertionError(f"nothing has killed the server in {SECONDS_MAX} s; {self.log_tail()}") from None
        self._process = None
        self.is_up.clear()
        assert code == -signal.SIGKILL, f"the server ended by itself with {code}; {self.log_tail()}"

    async def close(self) -> None:
        """Leave no process behind."""
        if self._process is not None:
            self.kill()
            await self._process.wait()
            self._process = None

    async def _takes_connections(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except ConnectionRefusedError:
            return False
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        return True


def _free_port() -> int:
    first = random.Random(os.getpid()).randrange(len(_PORTS))  # test processes side by side look in different places
    for offset in range(len(_PORTS)):
        port = _PORTS[(first + offset) % len(_PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no port of {_PORTS} is free")
