"""Chat at 50 messages/s to browsers, which offer permessage-deflate, against the same without: bytes and CPU.

1,000 signed-in users watch; the messages are the lines of a real-looking chat (`bench/fixtures/chat.txt`). Some of the
users send them, and inflate what they get to check it; the others only count it, so that the load generator is not
what is measured.

Invariants
  1. At the end of a stretch everybody who inflates has the last message.
  2. Bytes are those of the frames that bring results, as they are on the wire; how many results they are is known from
     those who inflate, since all get the same.
"""

import asyncio
import random
import zlib
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import msgspec

from bench.load.chat import MESSAGES_PER_SECOND
from bench.load.client import Client, Crowd
from bench.load.connection import Connection
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, Goal
from bench.load.processes import Tokens, engine_server
from bench.load.stretches import Cost, Options, as_acknowledged, by_timetable, cost_of

_LINES = Path(__file__).parents[1] / "fixtures" / "chat.txt"
_SENDER_COUNT = 50
_FILL_COUNT = 60  # messages before measuring: the result has its full 50
_RESULT_SIZE_BYTES_MIN = 150  # on the wire; what is smaller is a ping
_REST_SECONDS = 0.5
_SEED = 13
_FINAL, _COMPRESSED, _OPCODE = 0x80, 0x40, 0x0F  # of a frame's first byte
_CONTINUATION, _TEXT_OPCODE = 0x0, 0x1
_BLOCK_END = b"\0\0\xff\xff"  # RFC 7692, section 7.2.2


class DeflateConnection(Connection):
    """A connection that offers permessage-deflate, as browsers do; it sends uncompressed, which is always allowed."""

    offer = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"

    def __init__(self, on_frame: Callable[[bytearray, int, int], None], on_lost: Callable[[str], None]) -> None:
        super().__init__(on_frame, on_lost)
        self._on_size: Callable[[int], None] | None = None  # set by `only_count`
        self._keeps_context = True
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._message = b""  # the fragments of a message that has not come whole
        self._is_compressed = False  # that message

    def only_count(self, on_size: Callable[[int], None]) -> None:
        super().only_count(on_size)
        self._on_size = on_size

    def refusal(self, answer: bytes) -> str | None:
        answer = answer.lower()
        self._keeps_context = b"server_no_context_takeover" not in answer
        return None if b"permessage-deflate" in answer else "not negotiated: the server takes no permessage-deflate"

    def _other_frame(self, first: int, buffer: bytearray, start: int, end: int) -> None:
        opcode = first & _OPCODE
        if opcode not in (_CONTINUATION, _TEXT_OPCODE):
            super()._other_frame(first, buffer, start, end)
            return
        if self._on_size is not None:
            self._on_size(end - start)
            return
        if opcode == _TEXT_OPCODE:
            self._message, self._is_compressed = b"", bool(first & _COMPRESSED)
        self._message += buffer[start:end]
        if first & _FINAL:
            message = self._message
            if self._is_compressed:
                if not self._keeps_context:
                    self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
                message = self._inflate.decompress(message + _BLOCK_END)
            self.on_frame(bytearray(message), 0, len(message))


class Reached(msgspec.Struct, frozen=True):
    bytes_each: float  # of a delivery, on the wire
    cpu_micros: float  # of the server, for a delivery
    delivery_count: int
    cost: Cost


async def run(options: Options) -> list[Figure]:
    deflated = await _measure(DeflateConnection, options)
    plain = await _measure(Connection, options)
    workload = "chat, 50/s, to browsers"
    return [
        Figure(
            workload,
            "bytes of a delivery",
            deflated.bytes_each,
            "B",
            plain.bytes_each,
            Goal(13, "≤", 1 / 3, of="ratio"),
        ),
        Figure(
            workload,
            "server CPU a delivery",
            deflated.cpu_micros,
            "µs",
            plain.cpu_micros,
            Goal(13, "≤", 1.3, of="ratio"),
        ),
        Figure(workload, "deliveries", deflated.delivery_count, "", plain.delivery_count),
        *deflated.cost.figures(workload),
    ]


async def _measure(connection_class: type[Connection], options: Options) -> Reached:
    tokens, lines, randomness = Tokens(), cycle(_LINES.read_text().splitlines()), random.Random(_SEED)
    async with engine_server(tokens) as server:
        crowd = Crowd(server.port, connection_class)
        game_id = await first_id(server, "games:list")
        newest_by_client: dict[Client, bytes] = {}

        async def prepare(client: Client) -> None:
            await client.mutate("users:store", {})
            await client.watch("chat:get_messages", {"game_id": game_id})

        users = await crowd.join(subjects(options.viewer_count), tokens.sign, prepare)
        senders, counters, last_line = users[:_SENDER_COUNT], users[_SENDER_COUNT:], ""
        size_bytes = 0  # of what the counters got

        def keep(client: Client) -> Callable[[bytearray, int, int], None]:
            def receive(buffer: bytearray, start: int, end: int) -> None:
                newest_by_client[client] = bytes(buffer[start:end])

            return receive

        for sender in senders:
            sender.on_result = keep(sender)

        def count(frame_size_bytes: int) -> None:
            nonlocal size_bytes
            if frame_size_bytes >= _RESULT_SIZE_BYTES_MIN:
                size_bytes += frame_size_bytes

        def send(on_done: Callable[[], None]) -> None:
            nonlocal last_line
            sender = randomness.choice(senders)
            while sender.is_busy:
                sender = randomness.choice(senders)
            last_line = next(lines)
            sender.start_mutation("chat:send_message", {"game_id": game_id, "message": last_line}, on_done)

        await crowd.unless_lost(as_acknowledged(send, count=_FILL_COUNT))
        await asyncio.sleep(_REST_SECONDS)
        for client in counters:
            client.only_count(count)
        load = by_timetable(send, per_second=MESSAGES_PER_SECOND, seconds=options.seconds)
        before = sum(sender.transition_count for sender in senders)
        with cost_of(server) as cost:
            await crowd.unless_lost(load)
            await asyncio.sleep(_REST_SECONDS)
        deliveries_each = (sum(sender.transition_count for sender in senders) - before) / len(senders)
        last = msgspec.json.encode(last_line)
        if any(last not in newest_by_client[sender] for sender in senders):
            raise RuntimeError("a user has not got the last message")
        crowd.close()
    delivery_count = deliveries_each * len(users)
    return Reached(
        bytes_each=size_bytes / (deliveries_each * len(counters)),
        cpu_micros=1e6 * cost.server_cpu_seconds / delivery_count,
        delivery_count=round(delivery_count),
        cost=cost,
    )
