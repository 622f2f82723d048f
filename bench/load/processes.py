"""The measured processes: starting them, what they use, stopping them.

The engine under load is what `engine serve` runs (`served.py`), on the demo app or on the bench's own (`bench/app`), on
the shipped defaults: its `engine.toml` names the bench's own identity provider, lets users chat as fast as the load has
them (each message is counted all the same), and nothing else. Everything lives in a temporary directory and goes with
it.
"""

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from bench.load.served import CALLS_PATH, RUNS_PATH

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_APP, BENCH_APP = REPOSITORY, REPOSITORY / "bench" / "app"
ISSUER, AUDIENCE, _KEY_ID = "https://bench.example", "bench", "bench-1"
_START_SECONDS_MAX = 30
_STOP_SECONDS_MAX = 30
_SPARE_FILE_COUNT = 300  # descriptors of either process for all but the clients' sockets
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}  # for `-m engine` and `-m bench.load.broadcast`


class Usage(msgspec.Struct, frozen=True):
    """What a process has used so far."""

    cpu_seconds: float  # user and system, all threads
    resident_bytes: int


def usage_of(pid: int) -> Usage:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks, pages = int(fields[11]) + int(fields[12]), int(fields[21])
    return Usage(ticks / _TICKS_PER_SECOND, pages * os.sysconf("SC_PAGE_SIZE"))


def busy_cpu_seconds() -> float:
    """What all processes of the machine have used so far; the machine's owner too, if it is a virtual one."""
    user, nice, system, _idle, _iowait, *others = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, *others))) / _TICKS_PER_SECOND


def ensure_files(connection_count: int) -> None:
    """Let this process and those that it starts have so many sockets; `RuntimeError` if the system does not."""
    needed = connection_count + _SPARE_FILE_COUNT
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(f"needs {needed:,} open files, the system allows {hard:,}: ulimit -Hn {needed}")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Server:
    """A process of ours that listens on 127.0.0.1, with a directory of its own."""

    def __init__(self, arguments: list[str], directory: Path) -> None:
        self.directory = directory
        self.port = _free_port()
        self.log_path = directory / "server.log"
        self.start_seconds = 0.0  # from starting the process until it listened; set by `start`
        self._arguments = arguments
        self._process: asyncio.subprocess.Process  # set by `start`

    async def start(self) -> None:
        """Start it, again too, on the same port."""
        started = time.perf_counter()
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *self._arguments, str(self.port), stdout=log, stderr=log, env=_ENVIRONMENT
            )
        await _wait_until_listening(self._process, self.port)
        self.start_seconds = time.perf_counter() - started

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def usage(self) -> Usage:
        return usage_of(self.pid)

    @property
    def database(self) -> Path:
        return self.directory / "bench.db"

    async def run_count(self, path: str) -> int:
        """How often a query of the engine has run since this was first asked."""
        return (await self.run_counts()).get(path, 0)

    async def run_counts(self) -> dict[str, int]:
        """How often each query of the engine has run since this was first asked."""
        counts: dict[str, int] = await self._ask(RUNS_PATH)
        return counts

    async def call_count(self) -> int:
        """How many functions the event loop's thread has called since this was last asked.

        Counting, which makes everything slow, begins with the first asking, pauses at the second, and so on.
        """
        count: int = await self._ask(CALLS_PATH)
        return count

    async def _ask(self, path: str) -> Any:
        address = f"http://127.0.0.1:{self.port}{path}"
        async with aiohttp.ClientSession() as session, session.get(address) as response:
            return await response.json()

    async def kill(self) -> None:
        """SIGKILL: it has no time for anything."""
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, then wait; does nothing when the process has ended."""
        if self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_SECONDS_MAX)
        except TimeoutError:
            await self.kill()


class Tokens:
    """The bench's identity provider: a fresh key, its JWKS, and a signed token for any user."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    def jwks(self) -> dict[str, Any]:
        public: dict[str, Any] = OKPAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return {"keys": [public | {"kid": _KEY_ID, "alg": "EdDSA", "use": "sig"}]}

    def sign(self, subject: str) -> str:
        issued = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "name": subject, "iat": issued, "exp": issued + 7200}
        return jwt.encode(claims, self._key, algorithm="EdDSA", headers={"kid": _KEY_ID})


@asynccontextmanager
async def engine_server(
    tokens: Tokens, *mutations: str, app: Path = DEMO_APP, fill: Callable[[Path], object] | None = None
) -> AsyncIterator[Server]:
    """An engine on an app and a database of its own.

    The database is filled with the app's demo data, then by these mutations, then by `fill`, which gets its path.
    """
    async with prepared_app(tokens, *mutations, app=app) as directory:
        database = directory / "bench.db"
        if fill is not None:
            fill(database)
        async with listening(["-m", "bench.load.served", str(directory), str(database)], directory) as server:
            yield server


@asynccontextmanager
async def prepared_app(tokens: Tokens, *mutations: str, app: Path = DEMO_APP) -> AsyncIterator[Path]:
    """A directory with an app and its database, `bench.db`, filled with its demo data, then by these mutations."""
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as name:
        directory = Path(name)
        write_app(directory, tokens, app)
        place = ["--app", name, "--database", str(directory / "bench.db")]
        await python("-m", "engine", "run", *place, "demo:seed", json.dumps({"issuer": ISSUER}))
        for mutation in mutations:
            await python("-m", "engine", "run", *place, mutation)
        yield directory


def write_app(directory: Path, tokens: Tokens, app: Path = DEMO_APP) -> None:
    """An app, the demo one with a function of the bench, with the bench as its only identity provider."""
    shutil.copy(app / "schema.py", directory)
    shutil.copytree(app / "functions", directory / "functions", ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "jwks.json").write_text(json.dumps(tokens.jwks()))
    config = (
        f'[[auth.providers]]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\n'
        'jwks = "jwks.json"\nalgorithms = ["EdDSA"]\n'
    )
    if app == DEMO_APP:
        shutil.copy(Path(__file__).with_name("hidden_message.py"), directory / "functions")
        config += '[rate_limits."chat:send_message"]\ncount = 1_000_000\n'
    (directory / "engine.toml").write_text(config)


@asynccontextmanager
async def listening(arguments: list[str], directory: Path) -> AsyncIterator[Server]:
    """Run `python ARGUMENTS PORT` and wait until it listens; its output is shown when the block fails."""
    server = Server(arguments, directory)
    try:
        await server.start()
        yield server
    except BaseException:
        sys.stderr.write(server.log_path.read_text(errors="replace")[-4_000:])
        raise
    finally:
        await server.stop()


async def python(*arguments: str) -> str:
    """What `python ARGUMENTS` says, when it has ended well."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_ENVIRONMENT,
    )
    output, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {process.returncode}: {errors.decode()[-2_000:]}")
    return output.decode()


async def _wait_until_listening(process: asyncio.subprocess.Process, port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    while time.monotonic() < deadline:
        if process.returncode is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it listened")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return
    raise TimeoutError(f"the server does not listen after {_START_SECONDS_MAX} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
