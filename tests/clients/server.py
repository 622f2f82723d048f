"""A server process for the tests of the official clients: started, killed and started again at will.

Python tests use `Server`. The npm tests run this file as a process and speak to `main`, one JSON object a line.

Invariants
  1. A server keeps its port, its database and its key over every kill and restart; clients come back by themselves.
  2. Nothing is left behind: the process and the directory go when the `with` block, or the standard input, ends.
"""

import datetime
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

REPOSITORY = Path(__file__).resolve().parents[2]
APP = Path(__file__).resolve().parent / "app"
ISSUER, AUDIENCE, KEY_ID = "https://login.clients.test", "clients", "clients-test-key"
START_SECONDS_MAX, STOP_SECONDS_MAX = 20, 20

Mode = Literal["serve", "dev", "demo"]  # demo: `engine dev` over the demo app, with its demo data
DEMO_CONFIG = "[limits]\ndisconnect_grace_ms = 1_000  # tests wait for it\n"


class ServerFailed(Exception):
    """The server did not start, or ended by itself; the message has the end of its log."""


class Server:
    """One server process over an app and a database of its own."""

    def __init__(self, directory: Path, mode: Mode = "serve") -> None:
        self._mode = mode
        self._app = directory / "app"
        self._database = directory / "engine.db"
        self._log = directory / "server.log"
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None  # None while no server runs
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._foreign_key = ec.generate_private_key(ec.SECP256R1())  # the provider does not know it
        if mode == "demo":
            self._copy_demo()
        else:
            self._copy_app()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the process and wait until it answers."""
        assert self._process is None, "invariant 1: one process at a time has the port"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(
                    "serve" if self._mode == "serve" else "dev", "--host", "127.0.0.1", "--port", str(self._port)
                ),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self._answers():
            try:
                self._process.wait(timeout=0.02)  # the pace of asking, and the end of a server that cannot start
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
                self.kill()
            raise ServerFailed(f"the server ({self._mode}) did not start:\n{self.log()[-4000:]}")

    def seed(self) -> None:
        """Fill the demo app's database with what a newcomer finds there."""
        subprocess.run(self._command("run", "demo:seed"), cwd=REPOSITORY, check=True, capture_output=True)

    def kill(self) -> None:
        """SIGKILL: no goodbye to clients, nothing flushed."""
        self._end(subprocess.Popen.kill)

    def stop(self) -> None:
        """SIGTERM: a graceful stop."""
        self._end(subprocess.Popen.terminate)

    def restart(self) -> None:
        """Kill the server and start it again."""
        self.kill()
        self.start()

    def edit(self, file: str, old: str, new: str) -> None:
        """Change a file of the app as an editor does, which `engine dev` sees."""
        path = self._app / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file}: {old!r} is there {text.count(old)} times"
        path.write_text(text.replace(old, new))

    def log(self) -> str:
        """Everything that the server has printed, over all its restarts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def token(
        self,
        subject: str = "alice",
        *,
        lifetime_seconds: float = 3600,
        age_seconds: float = 0,
        is_forged: bool = False,
        **claims: Any,
    ) -> str:
        """A token of the test issuer, signed `age_seconds` ago; a forged one is signed by somebody else."""
        issued_at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_seconds)
        payload = {
            **claims,
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "iat": issued_at,
            "exp": issued_at + datetime.timedelta(seconds=lifetime_seconds),
        }
        key = self._foreign_key if is_forged else self._key
        return jwt.encode(payload, key, algorithm="ES256", headers={"kid": KEY_ID})

    def _copy_app(self) -> None:
        """The test app, with the key set that its provider names."""
        shutil.copytree(APP, self._app, ignore=shutil.ignore_patterns("__pycache__"))
        public_key = ECAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        key_set = {"keys": [{**public_key, "kid": KEY_ID, "alg": "ES256", "use": "sig"}]}
        (self._app / "jwks.json").write_text(json.dumps(key_set))

    def _copy_demo(self) -> None:
        shutil.copytree(REPOSITORY / "functions", self._app / "functions", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "schema.py", self._app)
        (self._app / "engine.toml").write_text(DEMO_CONFIG)

    def _command(self, command: str, *options: str) -> list[str]:
        paths = ["--app", str(self._app), "--database", str(self._database)]
        return [sys.executable, "-m", "engine", command, *paths, *options]

    def _end(self, signal_it: Callable[[subprocess.Popen[bytes]], None]) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            signal_it(process)
            try:
                process.wait(timeout=STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise ServerFailed(f"the server ({self._mode}) did not stop:\n{self.log()[-4000:]}") from None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/version", timeout=5):
                return True
        except urllib.error.HTTPError as answer:  # any answer shows that it serves
            answer.close()
            return True
        except OSError:
            return False


@contextmanager
def running_server(mode: Mode = "serve") -> Iterator[Server]:
    """A server that answers, with an empty database."""
    with tempfile.TemporaryDirectory(prefix="engine-clients-") as directory:
        server = Server(Path(directory), mode)
        server.start()
        try:
            if mode == "demo":
                server.seed()
            yield server
        finally:
            server.kill()


def main(mode: Mode) -> None:
    """Obey one command a line, `{"command": "token", "options": {…}}`, until the standard input ends.

    Every line is answered by one line: `{"result": …}` or `{"error": "…"}`. The first line says where the server is.
    """

    def say(**reply: Any) -> None:
        print(json.dumps(reply), flush=True)

    with running_server(mode) as server:
        say(result=server.address)
        commands: dict[str, Callable[..., Any]] = {
            "kill": server.kill,
            "start": server.start,
            "stop": server.stop,
            "edit": server.edit,
            "log": server.log,
            "token": server.token,
        }
        for line in sys.stdin:
            request = json.loads(line)
            try:
                say(result=commands[request["command"]](**request.get("options", {})))
            except ServerFailed as failure:
                say(error=str(failure))


def _free_port() -> int:
    """One below those that Linux gives to outgoing connections, which could take it while the server is down."""
    for port in random.Random(os.getpid()).sample(range(20_000, 32_000), 1_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port from 20,000 to 31,999 is free")


if __name__ == "__main__":
    requested: dict[str, Mode] = {"serve": "serve", "dev": "dev", "demo": "demo"}
    main(requested[sys.argv[1]])
