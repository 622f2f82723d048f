"""One attacker, at full speed: `python -m tests.reliability.attacks NAME PORT SECONDS` prints what became of it.

It is a process of its own, so that what it costs itself slows nobody else down. Each attack is a loop over plain
sockets until the time is up; it counts outcomes by name.
"""

import json
import socket
import sys
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import count

from tests.reliability.raw import CLOSE, TEXT, frame, message
from tests.sync.fakes import add, connect, mutation, query_set, remove

MIB = 1 << 20
MESSAGE_SIZE_MAX = 32 * MIB
_TIMEOUT_SECONDS = 10


class Peer:
    """One connection of the attacker."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = bytearray()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def upgrade(self, extension: str = "") -> None:
        self.send(
            b"GET /api/sync HTTP/1.1\r\nHost: e\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            + (f"Sec-WebSocket-Extensions: {extension}\r\n" if extension else "").encode()
            + b"\r\n"
        )
        head = self._until(b"\r\n\r\n")
        assert b" 101 " in head, head

    def join(self, extension: str = "") -> None:
        """A WebSocket that has said Connect."""
        self.upgrade(extension)
        self.send(message(connect(sessionId=str(uuid.uuid4()))))

    def ask(self, request: bytes) -> int:
        """The status of the answer to an HTTP request; its body is read."""
        self.send(request)
        head = self._until(b"\r\n\r\n").lower()
        size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(self._unread) < size:
            self._read()
        del self._unread[:size]
        return int(head.split()[1])

    def hear(self) -> tuple[int, bytes]:
        """The next frame."""
        while True:
            unread = self._unread
            if len(unread) >= 2:
                start, size = 2, unread[1] & 0x7F
                if size >= 126:
                    start = 4 if size == 126 else 10
                    size = int.from_bytes(unread[2:start])
                if len(unread) >= start + size:
                    found = unread[0], bytes(unread[start : start + size])
                    del unread[: start + size]
                    return found
            self._read()

    def close_code(self) -> int:
        """What the server closes with."""
        while True:
            first, payload = self.hear()
            if first == CLOSE:
                return int.from_bytes(payload[:2])

    def _until(self, end: bytes) -> bytes:
        while end not in self._unread:
            self._read()
        head, _, rest = bytes(self._unread).partition(end)
        self._unread = bytearray(rest)
        return head

    def _read(self) -> None:
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionResetError
        self._unread += data


def post(path: str, body: object, *headers: str) -> bytes:
    payload = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: e", f"Content-Length: {len(payload)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + payload


Attack = Callable[[int, float, "Counter[str]"], None]  # port, deadline, outcomes
ATTACKS: dict[str, Attack] = {}


def attack(run: Attack) -> Attack:
    ATTACKS[run.__name__] = run
    return run


@attack
def messages_one_past_the_bound(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    while time.monotonic() < deadline:
        for size in (MESSAGE_SIZE_MAX + 1, 1 << 30):
            with Peer(port) as peer:
                peer.join()
                peer.send(bytes((TEXT, 0x80 | 127)) + size.to_bytes(8) + bytes(4))  # announced, never sent
                outcomes[f"close {peer.close_code()}"] += 1


@attack
def deep_json(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    while time.monotonic() < deadline:
        for depth in (65, 1_024):  # the bound is 64
            text = json.dumps(mutation(0, "m:echo", {"value": "DEEP"})).replace('"DEEP"', "[" * depth + "]" * depth)
            with Peer(port) as peer:
                peer.join()
                peer.send(frame(text.encode()))
                answer = peer.hear()[1]
                is_refused = b'"success":false' in answer and b"InvalidArgument" in answer
                outcomes["refused" if is_refused or b"FatalError" in answer else "answered"] += 1


@attack
def a_hundred_thousand_subscriptions(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    while time.monotonic() < deadline:
        with Peer(port) as peer:
            peer.join()
            try:
                for version in range(34):
                    first = version * 3_000
                    adds = [add(first + index, "m:mine", {"who": f"{first + index}"}) for index in range(3_000)]
                    peer.send(message(query_set(version, *adds)))
            except OSError:
                outcomes["cut off"] += 1
                continue
            outcomes[f"close {peer.close_code()}"] += 1


@attack
def queries_that_come_and_go(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    """Adds and removes one query in each message, as fast as they are answered."""
    with Peer(port) as peer:
        peer.join()
        peer.send(message(query_set(0)))
        peer.socket.settimeout(0.5)
        for version in count(1):
            if time.monotonic() >= deadline:
                return
            peer.send(message(query_set(version, add(version, "m:mine", {"who": f"{version}"}), remove(version))))
            while time.monotonic() < deadline:
                try:
                    if f'"querySet":{version + 1}'.encode() in peer.hear()[1]:
                        outcomes["taken"] += 1
                        break
                except TimeoutError:
                    continue  # it is made to wait


@attack
def ten_thousand_mutations_at_once(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    while time.monotonic() < deadline:
        with Peer(port) as peer:
            peer.join()
            peer.send(message(query_set(0)))
            sent_count = answered_count = 0
            peer.socket.settimeout(0.2)
            while time.monotonic() < deadline and answered_count < 10_000:
                if sent_count < 10_000 and sent_count - answered_count < 2_000:
                    batch = [message(mutation(sent_count + index, "m:tick", {"who": "x"})) for index in range(100)]
                    peer.send(b"".join(batch))
                    sent_count += 100
                answered_count += b'"MutationResponse"' in peer.hear()[1]
            outcomes["answered"] += answered_count


@attack
def queries_that_nobody_asked_before(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    peers = [Peer(port) for _ in range(8)]
    for number in count():
        if time.monotonic() >= deadline:
            break
        asked = post("/api/query", {"path": "m:mine", "args": {"who": f"nobody {number}"}})
        outcomes[f"status {peers[number % 8].ask(asked)}"] += 1
    for peer in peers:
        peer.socket.close()


@attack
def large_results_for_small_requests(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    with Peer(port) as peer:
        for number in count():
            if time.monotonic() >= deadline:
                return
            asked = post("/api/query", {"path": "m:large", "args": {"size": 8 * MIB - 100 - number % 50}})
            outcomes[f"status {peer.ask(asked)}"] += 1


@attack
def large_results_that_nobody_reads(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    peers = []
    for number in range(60):
        peers.append(Peer(port))
        peers[-1].send(post("/api/query", {"path": "m:large", "args": {"size": 8 * MIB - 1_000 - number}}))
        if time.monotonic() >= deadline:
            break
    time.sleep(max(0.0, deadline - time.monotonic()))
    outcomes["left unread"] += len(peers)
    for peer in peers:
        peer.socket.close()


@attack
def bombs(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    """A message that unfolds to more than the bound."""
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    text = deflater.compress(b'"' + b"x" * (MESSAGE_SIZE_MAX + 1)) + deflater.flush(zlib.Z_SYNC_FLUSH)
    bomb = frame(text[:-4], TEXT | 0x40)
    while time.monotonic() < deadline:
        with Peer(port) as peer:
            peer.join("permessage-deflate")
            peer.send(bomb)
            outcomes[f"close {peer.close_code()}"] += 1


@attack
def sockets_that_say_nothing(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    peers = []
    for _ in range(5_000):
        if time.monotonic() >= deadline:
            break
        peers.append(Peer(port))
    time.sleep(max(0.0, deadline - time.monotonic()))
    with Peer(port) as last:  # sockets are accepted in their order: once this one is answered, all of them were
        last.ask(post("/api/query", {"path": "m:mine", "args": {"who": "x"}}))
    outcomes["connected"] += len(peers)
    for peer in peers:
        peer.socket.setblocking(False)
        try:
            outcomes["closed"] += peer.socket.recv(1) == b""
        except BlockingIOError:
            outcomes["open"] += 1
        except OSError:
            outcomes["closed"] += 1
        peer.socket.close()


@attack
def headers_a_byte_at_a_time(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    peers = [Peer(port) for _ in range(300)]
    for byte in b"GET /version HTTP/1.1\r\nX-Slow: " + b"x" * 1_000:
        if time.monotonic() >= deadline:
            break
        for peer in peers:
            try:
                peer.send(bytes((byte,)))
            except OSError:
                outcomes["cut off"] += 1
        time.sleep(0.2)
    for peer in peers:
        peer.socket.close()
    outcomes["slow"] += len(peers)


@attack
def bad_tokens(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    """Well-formed tokens of an unknown issuer, or with an unknown key."""
    _guess(port, deadline, outcomes, "/api/query", "Bearer eyJhbGciOiJFZERTQSIsImtpZCI6IngifQ.eyJpc3MiOiJ4In0.{:08}")


@attack
def guesses_of_the_admin_key(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    _guess(port, deadline, outcomes, "/api/function", "Convex adm_{:043}")


def _guess(port: int, deadline: float, outcomes: "Counter[str]", address: str, credential: str) -> None:
    """One credential after the other; the connection is closed now and then."""
    peer = Peer(port)
    for number in count():
        if time.monotonic() >= deadline:
            break
        header = f"Authorization: {credential.format(number)}"
        try:
            outcomes[f"status {peer.ask(post(address, {'path': 'm:mine', 'args': {'who': 'x'}}, header))}"] += 1
        except OSError:
            outcomes["closed"] += 1
            peer.socket.close()
            peer = Peer(port)
    peer.socket.close()


@attack
def connections_that_come_and_go(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    while time.monotonic() < deadline:
        with Peer(port) as peer:
            peer.join()
            peer.send(message(query_set(0, add(0, "m:mine", {"who": "x"}))))
            outcomes["answered"] += b'"Transition"' in peer.hear()[1]


@attack
def what_is_no_protocol(port: int, deadline: float, outcomes: "Counter[str]") -> None:
    """Each is logged, or would be."""
    while time.monotonic() < deadline:
        with Peer(port) as peer:
            peer.join()
            peer.send(message({"type": "Nonsense"}))
            outcomes[f"close {peer.close_code()}"] += 1
        with Peer(port) as peer:
            status = peer.ask(b"NO\r\n\r\n")
            outcomes[f"status {status}"] += 1


def main() -> None:
    name, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    outcomes: Counter[str] = Counter()
    ATTACKS[name](port, time.monotonic() + seconds, outcomes)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
