"""The measured processes: starting them, what they use, stopping them.

The engine under load is what `engine serve` runs (`served.py`), on the demo app and the shipped defaults: its
`engine.toml` names the bench's own identity provider, lets users chat as fast as the load has them (each message is
counted all the same), and nothing else. Everything lives in a temporary directory and goes with it.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from bench.load.served import RUNS_PATH

REPOSITORY = Path(__file__).resolve().parents[2]
ISSUER, AUDIENCE, _KEY_ID = "https://bench.example", "bench", "bench-1"
_START_SECONDS_MAX = 30
_STOP_SECONDS_MAX = 30
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


class Server:
    """A process of ours that listens on 127.0.0.1, with a directory of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, directory: Path) -> None:
        self._process = process
        self.port = port
        self.directory = directory

    @property
    def usage(self) -> Usage:
        return usage_of(self._process.pid)

    @property
    def database(self) -> Path:
        return self.directory / "bench.db"

    async def run_count(self, path: str) -> int:
        """How often a query of the engine has run."""
        address = f"http://127.0.0.1:{self.port}{RUNS_PATH}"
        async with aiohttp.ClientSession() as session, session.get(address) as response:
            counts: dict[str, int] = await response.json()
        return counts.get(path, 0)

    async def stop(self) -> None:
        """SIGTERM, then wait; does nothing when the process has ended."""
        if self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_SECONDS_MAX)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


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
async def engine_server(tokens: Tokens, *mutations: str) -> AsyncIterator[Server]:
    """An engine on an app and a database of its own, filled with the demo data, then by these mutations."""
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as name:
        directory = Path(name)
        write_app(directory, tokens)
        place = ["--app", name, "--database", str(directory / "bench.db")]
        await _python("-m", "engine", "run", *place, "demo:seed", json.dumps({"issuer": ISSUER}))
        for mutation in mutations:
            await _python("-m", "engine", "run", *place, mutation)
        async with listening(["-m", "bench.load.served", name, str(directory / "bench.db")], directory) as server:
            yield server


def write_app(directory: Path, tokens: Tokens) -> None:
    """The demo app and a function of the bench, with the bench as its only identity provider."""
    shutil.copy(REPOSITORY / "schema.py", directory)
    shutil.copytree(REPOSITORY / "functions", directory / "functions", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("hidden_message.py"), directory / "functions")
    (directory / "jwks.json").write_text(json.dumps(tokens.jwks()))
    (directory / "engine.toml").write_text(
        f'[[auth.providers]]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\n'
        'jwks = "jwks.json"\nalgorithms = ["EdDSA"]\n'
        '[rate_limits."chat:send_message"]\ncount = 1_000_000\n'
    )


@asynccontextmanager
async def listening(arguments: list[str], directory: Path) -> AsyncIterator[Server]:
    """Run `python ARGUMENTS PORT` and wait until it listens; its output is shown when the block fails."""
    port, log_path = _free_port(), directory / "server.log"
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, str(port), stdout=log, stderr=log, env=_ENVIRONMENT
        )
    server = Server(process, port, directory)
    try:
        await _wait_until_listening(process, port)
        yield server
    except BaseException:
        sys.stderr.write(log_path.read_text(errors="replace")[-4_000:])
        raise
    finally:
        await server.stop()


async def _python(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=_ENVIRONMENT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {process.returncode}: {output.decode()[-2_000:]}")


async def _wait_until_listening(process: asyncio.subprocess.Process, port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    while time.monotonic() < deadline:
        if process.returncode is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it listened")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise TimeoutError(f"the server does not listen after {_START_SECONDS_MAX} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
