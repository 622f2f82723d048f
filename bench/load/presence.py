"""1,000 players watch one game and its viewer count: 12,000 heartbeats a minute, then people come and go besides.

Invariants
  1. Heartbeats run the viewer count not once and push it to nobody, as long as nobody comes or goes; else the run ends.
  2. First people leave, one after the other, then they come back: no count comes twice on the way down, nor on the way
     up, so an arriving count tells which change it shows. It shows those before it, too.
  3. Who sends heartbeats meanwhile stays, and nobody is silent for as long as the app takes for gone.

A push's latency is from sending a change until the first count that shows it arrives, at each player.
"""

import asyncio
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import cycle

import msgspec

from bench.load.client import Client, Crowd
from bench.load.connection import Receiver
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, percentile
from bench.load.processes import Server, Tokens, engine_server
from bench.load.stretches import Cost, Options, Send, by_timetable, cost_of

HEARTBEATS_PER_SECOND = 200
CHANGES_PER_SECOND = 20
_QUERY = "presence:get_viewer_count"
_FIELD = b'"viewerCount":'
_SETTLE_SECONDS_MAX = 30


class Counts:
    """What arrives at the players: viewer counts."""

    def __init__(self) -> None:
        self.push_count = 0
        self.latencies_ms = array("d")
        self._sent_at: dict[int, float] = {}  # by the count that it makes, of the changes on the way
        self._step = 0  # -1 on the way down, 1 on the way up
        self._end = 0  # the last count of the way
        self._left = 0  # players that have not seen it
        self._arrived = asyncio.Event()  # all have

    def receiver(self, shown: int) -> Receiver:
        """What one player does with each frame, who sees this count now."""

        def receive(buffer: bytearray, start: int, end: int) -> None:
            nonlocal shown
            field = buffer.find(_FIELD, start, end)
            if field < 0:
                return
            self.push_count += 1
            now, before = time.perf_counter(), shown
            shown = int(float(buffer[field + len(_FIELD) : buffer.index(b"}", field)]))
            if self._step:
                for count in range(before + self._step, shown + self._step, self._step):
                    self.latencies_ms.append(1_000 * (now - self._sent_at[count]))
                if shown == self._end:
                    self._left -= 1
                    if not self._left:
                        self._arrived.set()

        return receive

    async def follow(self, changes: Awaitable[None], start: int, end: int, player_count: int) -> None:
        """Until all players have seen the counts from `start` to `end` that the changes make."""
        self._sent_at.clear()
        self._step, self._end, self._left = 1 if end > start else -1, end, player_count
        self._arrived.clear()
        await changes
        await asyncio.wait_for(self._arrived.wait(), _SETTLE_SECONDS_MAX)

    def changing(self, count: int) -> None:
        """What makes this count is sent now."""
        self._sent_at[count] = time.perf_counter()


class Game:
    """The game, and who is there."""

    def __init__(self, server: Server, game_id: str, players: list[Client]) -> None:
        self.server, self.players = server, players
        self.counts, self.heartbeats_ms = Counts(), array("d")
        self._place = {"game_id": game_id}

    async def watch(self) -> None:
        """All see the viewer count from now on."""
        for player in self.players:
            await player.watch(_QUERY, self._place)
            player.on_result = self.counts.receiver(len(self.players))

    async def beat(self, players: list[Client], seconds: float) -> None:
        """These send heartbeats, in turn."""
        turns = cycle(players)

        def send(on_done: Callable[[], None]) -> None:
            player = next(turns)
            while player.is_busy:
                player = next(turns)
            sent_at = time.perf_counter()

            def finish() -> None:
                self.heartbeats_ms.append(1_000 * (time.perf_counter() - sent_at))
                on_done()

            player.start_mutation("presence:heartbeat", session_of(player) | self._place, finish)

        await by_timetable(send, per_second=HEARTBEATS_PER_SECOND, seconds=seconds)

    def leaving(self) -> Send:
        """How the first player leaves, then the second, and so on."""
        leaving = iter(enumerate(self.players, 1))

        def leave(on_done: Callable[[], None]) -> None:
            number, player = next(leaving)
            self.counts.changing(len(self.players) - number)
            player.start_mutation("presence:leave", session_of(player), on_done)

        return leave

    def returning(self, gone_count: int) -> Send:
        """How so many come back, the first one first."""
        returning = iter(enumerate(self.players[:gone_count], 1))

        def come(on_done: Callable[[], None]) -> None:
            number, player = next(returning)
            self.counts.changing(len(self.players) - gone_count + number)
            player.start_mutation("presence:join", joining(player) | self._place, on_done)

        return come


class Reached(msgspec.Struct, frozen=True):
    """What a stretch came to."""

    run_count: int  # of the viewer count
    push_count: int  # of it, at all players
    heartbeats_ms: Sequence[float]
    cost: Cost


def session_of(player: Client) -> dict[str, str]:
    return {"session_id": f"session of {player.subject}"}


def joining(player: Client) -> dict[str, str]:
    return session_of(player) | {"device_type": "desktop"}


async def run(options: Options) -> list[Figure]:
    tokens = Tokens()
    async with engine_server(tokens) as server:
        crowd = Crowd(server.port)
        game_id = await first_id(server, "games:list")

        async def prepare(player: Client) -> None:
            await player.mutate("users:store", {})
            await player.mutate("presence:join", joining(player) | {"game_id": game_id})

        game = Game(server, game_id, await crowd.join(subjects(options.viewer_count), tokens.sign, prepare))
        await crowd.unless_lost(game.watch())
        alone = await crowd.unless_lost(_measure(game, game.beat(game.players, options.seconds)))
        if alone.run_count or alone.push_count:
            raise RuntimeError(f"heartbeats ran {_QUERY} {alone.run_count:,} times, {alone.push_count:,} pushes")
        gone_count = min(round(CHANGES_PER_SECOND * options.seconds / 2), options.viewer_count // 2)
        besides = await crowd.unless_lost(_measure(game, _come_and_go(game, gone_count)))
        crowd.close()
    return [*_heartbeats(alone), *_changes(besides, game.counts, 2 * gone_count)]


async def _come_and_go(game: Game, gone_count: int) -> None:
    """So many leave, and come back; the others send heartbeats meanwhile."""
    player_count = len(game.players)
    beating = asyncio.ensure_future(game.beat(game.players[gone_count:], 2 * gone_count / CHANGES_PER_SECOND))
    for send, start, end in (
        (game.leaving(), player_count, player_count - gone_count),
        (game.returning(gone_count), player_count - gone_count, player_count),
    ):
        changes = by_timetable(send, per_second=CHANGES_PER_SECOND, seconds=gone_count / CHANGES_PER_SECOND)
        await game.counts.follow(changes, start, end, player_count)
    await beating


async def _measure(game: Game, load: Awaitable[None]) -> Reached:
    runs_before, pushes_before = await game.server.run_count(_QUERY), game.counts.push_count
    game.heartbeats_ms = array("d")
    with cost_of(game.server) as cost:
        await load
    run_count = await game.server.run_count(_QUERY) - runs_before
    return Reached(run_count, game.counts.push_count - pushes_before, game.heartbeats_ms, cost)


def _heartbeats(reached: Reached) -> Iterator[Figure]:
    workload, count = f"heartbeats, {HEARTBEATS_PER_SECOND}/s", len(reached.heartbeats_ms)
    yield Figure(workload, "heartbeats", count / reached.cost.seconds, "/s")
    yield Figure(workload, "acknowledged p50", percentile(reached.heartbeats_ms, 50), "ms")
    yield Figure(workload, "acknowledged p99", percentile(reached.heartbeats_ms, 99), "ms")
    yield Figure(workload, "server CPU a heartbeat", 1e6 * reached.cost.server_cpu_seconds / count, "µs")
    yield Figure(workload, "runs of the viewer count", reached.run_count, "")
    yield Figure(workload, "pushes of the viewer count", reached.push_count, "")
    yield from reached.cost.figures(workload)


def _changes(reached: Reached, counts: Counts, change_count: int) -> Iterator[Figure]:
    workload = f"{CHANGES_PER_SECOND}/s come or go besides"
    yield Figure(workload, "push latency p50", percentile(counts.latencies_ms, 50), "ms")
    yield Figure(workload, "push latency p99", percentile(counts.latencies_ms, 99), "ms")
    yield Figure(workload, "pushes", reached.push_count / reached.cost.seconds, "/s")
    yield Figure(workload, "runs of the viewer count for a change", reached.run_count / change_count, "")
    yield Figure(workload, "heartbeats acknowledged p99", percentile(reached.heartbeats_ms, 99), "ms")
    yield from reached.cost.figures(workload)
