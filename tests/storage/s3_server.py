"""A server that speaks the S3 protocol, in a process of its own: moto, which the makers of AWS clients test with."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import botocore.session

BUCKET = "live-files"
START_SECONDS_MAX = 30
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


class S3Server:
    """The running server, and what lies in its bucket."""

    def __init__(self, address: str, process: subprocess.Popen[bytes]) -> None:
        self.address, self._process = address, process
        self.client: Any = botocore.session.get_session().create_client("s3", endpoint_url=address)
        self.client.create_bucket(Bucket=BUCKET)

    def keys(self) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """A server with one empty bucket; whoever runs here finds its keys in the environment."""
    before = {name: os.environ.get(name) for name in KEYS}
    os.environ.update(KEYS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (directory / "s3.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
    )
    server: S3Server | None = None
    try:
        _wait_until_it_answers(port, process)
        server = S3Server(f"http://127.0.0.1:{port}", process)
        yield server
    finally:
        if server is not None:
            server.client.close()
        process.kill()
        process.wait()
        log.close()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _wait_until_it_answers(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5):
                return
        except OSError:
            assert process.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            try:
                process.wait(timeout=0.05)  # the pace of asking
            except subprocess.TimeoutExpired:
                continue
