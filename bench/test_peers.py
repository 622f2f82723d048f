"""The comparison itself: peers can be installed as written; their users see and write what the workloads count."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.load.figures import Figure
from bench.load.processes import Usage
from bench.load.stretches import Options
from bench.peers import workloads
from bench.peers.clients import WebSocketClient
from bench.peers.messages import Messages
from bench.peers.workloads import PEERS, Peer, run

HERE = Path(workloads.__file__).parent


def _own_python(directory: Path) -> list[str]:
    """The peer by aiohttp, whose packages are ours too."""
    return [sys.executable, str(HERE / "aiohttp_requery" / "server.py"), str(directory / "peer.db"), "{port}"]


async def test_the_users_of_a_peer_see_and_write_all_that_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "own", Peer("own", WebSocketClient, _own_python))
    monkeypatch.setattr(workloads, "WRITER_COUNT", 3)
    monkeypatch.setattr(workloads, "FEW_COUNT", 2)
    figures = await run(Options(seconds=0.2, viewer_count=4), ["own"])
    by_name = {(figure.workload.partition(",")[0], figure.name): figure for figure in figures}
    assert by_name["chat", "latency p50"].value > 0
    assert by_name["chat", "size of a delivery"].value > 50 * 250, "50 messages"
    assert by_name["writes", "acknowledged"].value > 0
    assert by_name["progress", "latency p99"].value >= by_name["progress", "latency p50"].value > 0
    assert isinstance(by_name["progress", "server CPU a write (limit: with 2 users)"], Figure)


async def test_each_frame_is_a_delivery_and_each_message_counts_when_it_is_first_seen() -> None:
    messages = Messages(2)
    texts = [messages.text().encode() for _ in range(3)]
    lists, single = messages.receiver(), messages.receiver()

    async def arrive() -> None:
        for shown in ([1], [1, 0], [1, 0, 2]):  # as another server has ordered them
            frame = bytearray(b"".join(texts[number] for number in shown))
            lists(frame, 0, len(frame))
        for number in (0, 2, 1):
            single(bytearray(texts[number]), 0, len(texts[number]))

    class Idle:
        usage = Usage(0.0, 0)

    reached = await messages.measure(Idle(), arrive())  # type: ignore[arg-type]
    assert messages._delivery_count == 6
    assert len(messages._latencies_ms) == 6
    assert reached.size_bytes == len(texts[0])
    messages.text()
    assert not messages._is_complete.is_set()


@pytest.mark.parametrize("path", sorted(HERE.glob("*/requirements.txt")), ids=lambda path: path.parent.name)
def test_what_a_peer_needs_is_pinned(path: Path) -> None:
    for line in path.read_text().splitlines():
        assert re.fullmatch(r"[a-z-]+(\[\w+\])?==[\d.]+", line)


def test_what_node_needs_is_pinned() -> None:
    wanted = json.loads((HERE / "node_ws" / "package.json").read_text())
    assert all(re.fullmatch(r"[\d.]+", number) for number in wanted["dependencies"].values())


@pytest.mark.parametrize("make", [pytest.param(peer.command, id=name) for name, peer in PEERS.items()])
def test_a_peer_is_told_its_port(
    make: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "python_environment", lambda directory: directory / ".venv" / "bin")
    monkeypatch.setattr(workloads, "node_environment", lambda directory: Path("/usr/bin/node"))
    command = make(tmp_path)
    assert sum("{port}" in part for part in command) == 1
    assert any(str(tmp_path) in part for part in command), "its database is in the directory that goes away"
    assert all(Path(part).exists() for part in command if part.endswith((".py", ".js", "migrations")))
