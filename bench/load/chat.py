"""1,000 different signed-in users watch one chat.

First 50 messages/s, then each message as soon as the last was delivered (each change at each viewer), then 32 at a time
(the newest state only). `run_multitude` has 10,000 viewers, and 50 messages/s.

A message is hidden among the newest ones, so the policy of the chat looks at everybody: each has a query of their own
behind the chat, which says whether they moderate it.

Invariants
  1. A delivery is one Transition with a newer result at one viewer: it counts once, however many messages it brings.
     Its latency, from sending, is taken for each message that it brings; its staleness is the age of the oldest of
     them. What it brings are at most the messages that the result holds.
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
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from bench.load.broadcast import MARK_DIGITS
from bench.load.client import Client, Crowd
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, Goal, percentile
from bench.load.processes import Server, Tokens, engine_server, ensure_files, listening
from bench.load.stretches import Cost, Options, Send, as_acknowledged, by_timetable, cost_of

MESSAGES_PER_SECOND = 50
MULTITUDE_COUNT = 10_000
_RESULT_COUNT = 50  # messages in a result
_IN_FLIGHT_COUNT = 32  # messages, where only the newest state is delivered
_FILL_COUNT = 60  # messages before measuring: the result has its full 50
_SETTLE_SECONDS_MAX = 30
_SEED = 20
_QUERY = "chat:get_messages"
T = TypeVar("T")


class Reached(msgspec.Struct, frozen=True):
    """What a stretch came to."""

    p50_ms: float
    p99_ms: float
    staleness_p99_ms: float
    deliveries_per_second: float
    changes_per_second: float  # messages seen, over all viewers
    cpu_microseconds: float  # of the server, for one delivery
    messages_per_second: float
    cost: Cost


class Deliveries:
    """What arrives at the viewers: numbered messages, each marked `~0000000~` in its text."""

    def __init__(self, viewer_count: int) -> None:
        self.newest_frame = b""  # of the delivery that completed the newest message
        self._viewer_count = viewer_count
        self._sent_at: list[float] = []  # by message number
        self._latencies = array("d")  # seconds; not taken for the newest state only, where there are too many
        self._staleness = array("d")  # seconds
        self._is_newest_only = False
        self._change_count = 0
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
            self._staleness.append(now - self._sent_at[newest + 1])
            self._change_count += min(number - newest, _RESULT_COUNT)
            if not self._is_newest_only:
                for each in range(newest + 1, number + 1):
                    self._latencies.append(now - self._sent_at[each])
            newest = number
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

    async def measure(
        self, server: Server, load: Awaitable[None], *, last: Send | None = None, is_newest_only: bool = False
    ) -> Reached:
        """Put the load on the server and wait for the end of the stretch.

        `last` sends one more when all else is over: of those on the way together, the last sent may not be the newest.
        """
        self._latencies, self._staleness, self._change_count = array("d"), array("d"), 0
        self._is_newest_only = is_newest_only
        sent_before = len(self._sent_at)
        with cost_of(server) as cost:
            await load
            if last is not None:
                await as_acknowledged(last, count=1)
            await asyncio.wait_for(self._is_complete.wait(), _SETTLE_SECONDS_MAX)
        latencies = self._staleness if is_newest_only else self._latencies
        delivery_count = len(self._staleness)
        return Reached(
            p50_ms=1_000 * percentile(latencies, 50),
            p99_ms=1_000 * percentile(latencies, 99),
            staleness_p99_ms=1_000 * percentile(self._staleness, 99),
            deliveries_per_second=delivery_count / cost.seconds,
            changes_per_second=self._change_count / cost.seconds,
            cpu_microseconds=1e6 * cost.server_cpu_seconds / delivery_count,
            messages_per_second=(len(self._sent_at) - sent_before) / cost.seconds,
            cost=cost,
        )


class Chat:
    """The engine's chat: its viewers, and how one of them, by chance, sends the next message."""

    def __init__(self, server: Server, viewer_count: int) -> None:
        self.server, self.crowd, self.deliveries = server, Crowd(server.port), Deliveries(viewer_count)
        self._viewer_count = viewer_count
        self._game_id = ""  # set by `fill`
        self._viewers: list[Client] = []  # set by `fill`
        self._randomness = random.Random(_SEED)

    async def fill(self, tokens: Tokens) -> None:
        """Let the viewers in and fill the chat."""
        self._game_id = await first_id(self.server, "games:list")

        async def prepare(client: Client) -> None:
            await client.mutate("users:store", {})
            await client.watch(_QUERY, {"game_id": self._game_id})
            client.on_result = self.deliveries.receiver()

        self._viewers = await self.crowd.join(subjects(self._viewer_count), tokens.sign, prepare)
        load = as_acknowledged(self.send, count=_FILL_COUNT)
        await self.crowd.unless_lost(self.deliveries.measure(self.server, load))

    def send(self, on_done: Callable[[], None]) -> None:
        """The next message; over where its sender's promise resolves."""
        viewer, arguments = self._next_message()
        viewer.start_mutation("chat:send_message", arguments, on_done)

    def send_durably(self, on_done: Callable[[], None]) -> None:
        """The next message; over when it is durable."""
        viewer, arguments = self._next_message()
        viewer.start_mutation("chat:send_message", arguments, on_answer=on_done)

    def _next_message(self) -> tuple[Client, dict[str, str]]:
        viewer = self._randomness.choice(self._viewers)
        text = f"What a save, did anyone else see that? ~{self.deliveries.next_number():0{MARK_DIGITS}d}~"
        return viewer, {"game_id": self._game_id, "message": text}


async def run(options: Options) -> list[Figure]:
    tokens = Tokens()
    async with engine_server(tokens, "hidden_message:place") as server:
        await server.run_counts()
        chat = Chat(server, options.viewer_count)
        await chat.fill(tokens)
        deliveries = chat.deliveries
        runs_before, sent_before = await server.run_count(_QUERY), deliveries.sent_count
        steady, saturated = await chat.crowd.unless_lost(_stretches(server, deliveries, chat.send, options))
        many = as_acknowledged(chat.send_durably, seconds=options.seconds, in_flight_count=_IN_FLIGHT_COUNT)
        newest = await chat.crowd.unless_lost(deliveries.measure(server, many, last=chat.send, is_newest_only=True))
        run_count, sent_count = await server.run_count(_QUERY) - runs_before, deliveries.sent_count - sent_before
        chat.crowd.close()
    if run_count > sent_count:
        raise RuntimeError(f"{_QUERY} ran {run_count:,} times for {sent_count:,} messages: it is not shared")
    raw_steady, raw_saturated = await _broadcast(
        deliveries.newest_frame,
        options.viewer_count,
        lambda server, raw, send: _stretches(server, raw, send, replace(options, flames=None)),
    )
    return [
        Figure("chat, 50/s", "size of a delivery", len(deliveries.newest_frame), "B"),
        Figure("chat", "runs of the query for a message", run_count / sent_count, ""),
        *_compare("chat, 50/s", steady, raw_steady, _STEADY_GOALS),
        *_compare("chat, saturated", saturated, raw_saturated, _SATURATED_GOALS),
        *_newest("chat, newest state", newest, raw_saturated),
    ]


async def run_multitude(options: Options) -> list[Figure]:
    """10,000 viewers, 50 messages/s: each sees the newest state as often as the server manages."""
    tokens, viewer_count = Tokens(), options.size(MULTITUDE_COUNT)
    ensure_files(viewer_count)
    async with engine_server(tokens, "hidden_message:place") as server:
        chat = Chat(server, viewer_count)
        await chat.fill(tokens)
        load = by_timetable(chat.send, per_second=MESSAGES_PER_SECOND, seconds=options.seconds)
        reached = await chat.crowd.unless_lost(
            chat.deliveries.measure(server, load, last=chat.send, is_newest_only=True)
        )
        chat.crowd.close()
    raw = await _broadcast(
        chat.deliveries.newest_frame,
        viewer_count,
        lambda server, raw, send: raw.measure(server, as_acknowledged(send, seconds=options.seconds)),
    )
    workload = f"chat, {viewer_count:,} viewers, 50/s"
    return [
        Figure(workload, "staleness p99", reached.staleness_p99_ms, "ms", raw.staleness_p99_ms, Goal(16, "≤", 500)),
        Figure(workload, "server, of one core", reached.cost.server_percent, "%", goal=Goal(16, "≤", 100)),
        Figure(workload, "deliveries", reached.deliveries_per_second, "/s", raw.deliveries_per_second),
        Figure(workload, "server CPU a delivery", reached.cpu_microseconds, "µs", raw.cpu_microseconds),
        Figure(workload, "anything else, of one core", reached.cost.other_percent, "%"),
    ]


async def _stretches(server: Server, deliveries: Deliveries, send: Send, options: Options) -> tuple[Reached, Reached]:
    steady = by_timetable(send, per_second=MESSAGES_PER_SECOND, seconds=options.seconds)
    reached = await deliveries.measure(server, steady, last=send)
    async with options.flame(server, "chat"):
        return reached, await deliveries.measure(server, as_acknowledged(send, seconds=options.seconds))


async def _broadcast(
    frame: bytes, viewer_count: int, stretches: Callable[[Server, Deliveries, Send], Awaitable[T]]
) -> T:
    """The raw limit: stretches on `broadcast.py`."""
    deliveries = Deliveries(viewer_count)
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

            for _ in range(viewer_count):
                await crowd.connect(deliveries.receiver())
            reached = await crowd.unless_lost(stretches(server, deliveries, send))
            crowd.close()
    return reached


_STEADY_GOALS = {
    "latency p50": Goal(3, "≤", 10),
    "latency p99": Goal(3, "≤", 50),
    "server CPU a delivery": Goal(3, "≤", 11),
}
_SATURATED_GOALS = {"deliveries": Goal(1, "≥", 0.85, of="ratio")}


def _compare(workload: str, engine: Reached, raw: Reached, goals: dict[str, Goal]) -> Iterator[Figure]:
    for name, value, unit, limit in (
        ("latency p50", engine.p50_ms, "ms", raw.p50_ms),
        ("latency p99", engine.p99_ms, "ms", raw.p99_ms),
        ("deliveries", engine.deliveries_per_second, "/s", raw.deliveries_per_second),
        ("messages", engine.messages_per_second, "/s", raw.messages_per_second),
        ("server CPU a delivery", engine.cpu_microseconds, "µs", raw.cpu_microseconds),
    ):
        yield Figure(workload, name, value, unit, limit, goals.get(name))
    yield from engine.cost.figures(workload)
    yield Figure(workload, "anything else during the raw limit", raw.cost.other_percent, "%")


def _newest(workload: str, engine: Reached, raw: Reached) -> Iterator[Figure]:
    """The limit: one write for each frame, each with one change."""
    goal, stale = Goal(2, "≥", 1.5, of="ratio"), Goal(2, "≤", 100)
    yield Figure(workload, "changes seen", engine.changes_per_second, "/s", raw.changes_per_second, goal)
    yield Figure(workload, "staleness p99", engine.staleness_p99_ms, "ms", raw.staleness_p99_ms, stale)
    yield Figure(workload, "deliveries", engine.deliveries_per_second, "/s", raw.deliveries_per_second)
    yield Figure(workload, "messages", engine.messages_per_second, "/s", raw.messages_per_second)
    yield from engine.cost.figures(workload)
