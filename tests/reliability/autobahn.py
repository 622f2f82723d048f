"""The Autobahn test suite against our connections: a server that sends back each text, under its own frame code.

    python2.7 -m virtualenv V && V/bin/pip install autobahntestsuite
    python -m tests.reliability.autobahn V/bin/wstest          # cases 1 to 7 and 10
    python -m tests.reliability.autobahn V/bin/wstest "*"      # all; 9, 12 and 13 take minutes

The suite needs Python 2.7, so it is run by hand; `tests/server/test_frames.py` has the same cases as tests of ours.
Exits with 1 if a case fails that is not one of `BINARY`.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine.server.connection
from engine.config import Config
from engine.limits import Limits
from engine.server.app import serving
from engine.sync import protocol
from engine.sync.refusals import Close
from tests.server.fakes import FakeEngine

CASES = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"]

# Cases that end otherwise than the suite wants, as they should: they send binary messages, which are refused with 1003,
# as the protocol has none.
BINARY = ("1.2.", "9.2.", "9.4.", "9.6.", "9.8.", "12.2.", "12.3.", "12.5.")
GOOD = ("OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED")


class EchoSession:
    """In the place of a session: says what it hears."""

    session_id = "echo"
    unverified = None
    is_reading_paused = False
    ping_payload: bytes | None = None

    def __init__(self, *_: Any, wake: Callable[[], None], **__: Any) -> None:
        self._wake = wake
        self.outbox: list[protocol.Frame] = []
        self.closing: Close | None = None

    def receive(self, text: str) -> None:
        if self.closing is None:
            self.outbox.append((text.encode(),))

    def close(self, code: int, reason: str) -> None:
        if self.closing is None:
            self.closing = Close(code, reason)
            self._wake()

    def peer_closed(self, code: int) -> None:
        self.close(protocol.CLOSE_NORMAL, "")

    def flush(self) -> None: ...
    def pong(self, payload: bytes) -> None: ...
    def set_lagging(self, is_lagging: bool) -> None: ...
    def end(self) -> None: ...


async def run(wstest: str, cases: list[str]) -> int:
    """How many cases failed that should not have."""
    engine.server.connection.Session = EchoSession  # type: ignore[assignment, misc]
    limits = Limits(message_before_connect_size_bytes_max=32 << 20)
    with tempfile.TemporaryDirectory() as directory:
        async with serving(FakeEngine(Config(limits=limits)), "127.0.0.1", 0) as address:
            url = f"{address.replace('http', 'ws')}/api/sync"
            servers = [{"agent": "engine", "url": url, "options": {"version": 18}}]
            spec = {"outdir": directory, "servers": servers, "cases": cases, "exclude-cases": []}
            written = Path(directory) / "spec.json"
            written.write_text(json.dumps(spec))
            process = await asyncio.create_subprocess_exec(
                wstest, "--mode", "fuzzingclient", "--spec", written, stdout=asyncio.subprocess.DEVNULL
            )
            await process.wait()
            results = json.loads((Path(directory) / "index.json").read_text())["engine"]
    return report(results)


def report(results: dict[str, dict[str, Any]]) -> int:
    failed = {
        case: result
        for case, result in results.items()
        if result["behavior"] not in GOOD or result["behaviorClose"] not in GOOD
    }
    unexpected = sorted(case for case in failed if not case.startswith(BINARY))
    kinds = [result["behavior"] for result in results.values()]
    print(f"{len(results)} cases:", {kind: kinds.count(kind) for kind in sorted(set(kinds))})
    print(f"{len(failed) - len(unexpected)} of those that failed send binary messages, which are refused on purpose")
    for case in unexpected:
        print(f"  {case}: {failed[case]['behavior']}, close {failed[case]['behaviorClose']}")
    return len(unexpected)


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1], sys.argv[2:] or CASES)) > 0)
