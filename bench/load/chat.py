"""1,000 different signed-in users watch one chat: 50 messages/s, then as many as are acknowledged.

A message is hidden among the newest ones, so the policy of the chat looks at everybody: each has a query of their own
behind the chat, which says whether they moderate it.

Invariants
  1. A delivery is one Transition with a newer result at one viewer: it counts once, however many messages it brings.
     Its latency, from sending, is taken for each message that it brings.
  2. A stretch ends when every viewer has the newest message.
  3. The raw limit sends the bytes of the last delivery, from a process that does nothing else.
  4. All share one run of the chat: there are no more runs than messages.
"""

import asyncio
import random
import tempfile
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec

from bench.load.broadcast import MARK_DIGITS
from bench.load.client import Client, Crowd
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, percentile
from bench.load.processes import Server, Tokens, engine_server, listening
from bench.load.stretches import Cost, Options, Send, as_acknowledged, by_timetable, cost_of

MESSAGES_PER_SECOND = 50
_FILL_COUNT = 60  # messages before measuring: the result has its full 50
_SETTLE_SECONDS_MAX = 30
_SEED = 20
_QUERY, _VIEWER = "chat:get_messages", "users:moderates_chat"


class Reached(msgspec.Struct, frozen=True):
    """What a stretch came to."""

    p50_ms: float
    p99_ms: float
    deliveries_per_second: float
    cpu_microseconds: float  # of the server, for one delivery
    messages_per_second: float
    cost: Cost


class Deliveries:
    """What arrives at the viewers: numbered messages, each marked `~0000000~` in its text."""

    def __init__(self, viewer_count: int) -> None:
        self.newest_frame = b""  # of the delivery that completed the newest message
        self._viewer_count = viewer_count
        self._sent_at: list[float] = []  # by message number
        self._latencies = array("d")  # seconds
        self._delivery_count = 0
        self._complete_count = 0  # viewers that have the newest message
        self._is_complete = asyncio.Event()  # all have it

    def receiver(self) -> Callable[[bytearray, int, int], None]:
        """What one viewer does with each frame."""
        newest = -1

        def receive(buffer: bytearray, start: int, end: int) -> None:
            nonlocal newest
            mark = buffer.rfind(b"~", start, end)
            number = int(buffer[mark - MARK_DIGITS : mark]) if mark >= 0 else -1
            if number <= newest:
                return
            now = time.perf_counter()
            for each in range(newest + 1, number + 1):
                self._latencies.append(now - self._sent_at[each])
            newest = number
            self._delivery_count += 1
            if number == len(self._sent_at) - 1:
                self._complete_count += 1
                if self._complete_count == self._viewer_count:
                    self.newest_frame = bytes(buffer[start:end])
                    self._is_complete.set()

        return receive

    @property
    def sent_count(self) -> int:
        """How many messages were sent so far."""
        return len(self._sent_at)

    def next_number(self) -> int:
        """The number of the message that is sent now."""
        self._sent_at.append(time.perf_counter())
        self._complete_count = 0
        self._is_complete.clear()
        return len(self._sent_at) - 1

    async def measure(self, server: Server, load: Awaitable[None]) -> Reached:
        """Put the load on the server and wait for the end of the stretch."""
        self._latencies, self._delivery_count = array("d"), 0
        sent_before = len(self._sent_at)
        with cost_of(server) as cost:
            await load
            await asyncio.wait_for(self._is_complete.wait(), _SETTLE_SECONDS_MAX)
        milliseconds = [1_000 * latency for latency in self._latencies]
        return Reached(
            p50_ms=percentile(milliseconds, 50),
            p99_ms=percentile(milliseconds, 99),
            deliveries_per_second=self._delivery_count / cost.seconds,
            cpu_microseconds=1e6 * cost.server_cpu_seconds / self._delivery_count,
            messages_per_second=(len(self._sent_at) - sent_before) / cost.seconds,
            cost=cost,
        )


async def run(options: Options) -> list[Figure]:
    tokens, deliveries = Tokens(), Deliveries(options.viewer_count)
    async with engine_server(tokens, "hidden_message:place") as server:
        crowd = Crowd(server.port)
        send = await _fill(server, crowd, tokens, deliveries, options)
        if await server.run_count(_VIEWER) < options.viewer_count / 2:  # some run as a part of the chat
            raise RuntimeError(f"{_VIEWER} has hardly run: the policy looks at nobody")
        runs_before, sent_before = await server.run_count(_QUERY), deliveries.sent_count
        steady, saturated = await crowd.unless_lost(_stretches(server, deliveries, send, options))
        run_count, sent_count = await server.run_count(_QUERY) - runs_before, deliveries.sent_count - sent_before
        crowd.close()
    if run_count > sent_count:
        raise RuntimeError(f"{_QUERY} ran {run_count:,} times for {sent_count:,} messages: it is not shared")
    raw_steady, raw_saturated = await _broadcast(deliveries.newest_frame, options)
    return [
        Figure("chat, 50/s", "size of a delivery", len(deliveries.newest_frame), "B"),
        Figure("chat", "runs of the query for a message", run_count / sent_count, ""),
        *_compare("chat, 50/s", steady, raw_steady),
        *_compare("chat, saturated", saturated, raw_saturated),
    ]


async def _fill(server: Server, crowd: Crowd, tokens: Tokens, deliveries: Deliveries, options: Options) -> Send:
    """Let the viewers in and fill the chat; how one of them, by chance, sends the next message."""
    game_id = await first_id(server, "games:list")

    async def prepare(client: Client) -> None:
        await client.mutate("users:store", {})
        await client.watch(_QUERY, {"game_id": game_id})
        client.on_result = deliveries.receiver()

    viewers = await crowd.join(subjects(options.viewer_count), tokens.sign, prepare)
    randomness = random.Random(_SEED)

    def send(on_done: Callable[[], None]) -> None:
        viewer = randomness.choice(viewers)
        while viewer.is_busy:
            viewer = randomness.choice(viewers)
        text = f"What a save, did anyone else see that? ~{deliveries.next_number():0{MARK_DIGITS}d}~"
        viewer.start_mutation("chat:send_message", {"game_id": game_id, "message": text}, on_done)

    await crowd.unless_lost(deliveries.measure(server, as_acknowledged(send, count=_FILL_COUNT)))
    return send


async def _stretches(server: Server, deliveries: Deliveries, send: Send, options: Options) -> tuple[Reached, Reached]:
    steady = by_timetable(send, per_second=MESSAGES_PER_SECOND, seconds=options.seconds)
    reached = await deliveries.measure(server, steady)
    return reached, await deliveries.measure(server, as_acknowledged(send, seconds=options.seconds))


async def _broadcast(frame: bytes, options: Options) -> tuple[Reached, Reached]:
    """The raw limit: the same stretches on `broadcast.py`."""
    deliveries = Deliveries(options.viewer_count)
    on_echo: list[Callable[[], None]] = []  # who waits for the broadcast to come back to its sender

    def echo(buffer: bytearray, start: int, end: int) -> None:
        on_echo.pop()()

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "frame"
        path.write_bytes(frame)
        async with listening(["-m", "bench.load.broadcast", str(path)], Path(name)) as server:
            crowd = Crowd(server.port)
            sender = await crowd.connect(echo)

            def send(on_done: Callable[[], None]) -> None:
                on_echo.insert(0, on_done)
                sender.send(b"%d" % deliveries.next_number())

            for _ in range(options.viewer_count):
                await crowd.connect(deliveries.receiver())
            reached = await crowd.unless_lost(_stretches(server, deliveries, send, options))
            crowd.close()
    return reached


def _compare(workload: str, engine: Reached, raw: Reached) -> Iterator[Figure]:
    yield Figure(workload, "latency p50", engine.p50_ms, "ms", raw.p50_ms)
    yield Figure(workload, "latency p99", engine.p99_ms, "ms", raw.p99_ms)
    yield Figure(workload, "deliveries", engine.deliveries_per_second, "/s", raw.deliveries_per_second)
    yield Figure(workload, "messages", engine.messages_per_second, "/s", raw.messages_per_second)
    yield Figure(workload, "server CPU a delivery", engine.cpu_microseconds, "µs", raw.cpu_microseconds)
    yield from engine.cost.figures(workload)
    yield Figure(workload, "anything else during the raw limit", raw.cost.other_percent, "%")
