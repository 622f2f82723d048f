"""Histories of transactions: clients come, go and die until enough was asked, then all that is left is answered.

In a world, an operator meanwhile loads the code again and sets the clock, and the process dies at points of its own.
"""

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from engine import faults
from engine.errors import EngineError
from tests.reliability.simulation.clients import Client, History, Sight, Socket
from tests.reliability.simulation.list_append import Anomaly, anomalies
from tests.reliability.simulation.replay import Committed, Replay, black_box, read_ledger, read_state, state_of
from tests.reliability.simulation.transactions import write_app
from tests.reliability.simulation.world import World, live

CLIENT_COUNT = 16
IN_FLIGHT_COUNTS = (1, 2, 4)  # of a client, at most
AT_THE_END = 1 << 62  # a timestamp after all others
SECONDS_MAX = 120  # of virtual or real time, and more for many transactions: what takes longer hangs
_LOOK_SECONDS = 0.02
_HOUR_MS = 3_600_000

Break = Callable[[pytest.MonkeyPatch, World], None]


class Findings(NamedTuple):
    """What a history came to."""

    violations: list[str]  # by the engine's own record
    complaints: list[str]  # of clients, by the rules of the protocol
    anomalies: list[Anomaly]  # by what clients saw of lists
    checked_count: int  # transactions that were replayed
    conflict_count: int  # those that met a write of another one which was under way with them
    happened: Counter[str]  # what went wrong on the way
    passed: set[faults.Point]  # fault points where the engine was

    @property
    def all(self) -> list[str]:
        return [*self.violations, *self.complaints, *map(str, self.anomalies)]


async def have_all_done(
    history: History,
    open_socket: Callable[[], Awaitable[Socket]],
    settle: Callable[[], Awaitable[None]],
    *,
    death_chance: float,
) -> None:
    """Let clients ask until the history is over, all is answered, and all hold the newest state."""
    living: dict[int, Client] = {}
    seconds_max = SECONDS_MAX + history.length / 20

    async def take_turns(place: int) -> None:
        try:
            while True:
                living[place] = Client(
                    history,
                    open_socket,
                    in_flight_count_max=history.random.choice(IN_FLIGHT_COUNTS),
                    death_chance=0 if history.is_over else death_chance,
                )
                await living[place].run()
        except AssertionError as complaint:
            history.complaints.append(str(complaint))

    async def until(is_reached: Callable[[], bool]) -> None:
        while not is_reached() and not history.complaints:  # noqa: ASYNC110 - of many clients
            await asyncio.sleep(_LOOK_SECONDS)

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(take_turns(place)) for place in range(CLIENT_COUNT)]
        try:
            async with asyncio.timeout(seconds_max):
                await until(lambda: len(living) == CLIENT_COUNT and all(each.is_done for each in living.values()))
                await settle()
                await until(lambda: all(each.is_shown for each in living.values()))
        except TimeoutError:
            history.complaints.append(f"after {seconds_max:g} s somebody still waits")
        for client in living.values():
            history.sights.append(Sight(client.number, AT_THE_END, tuple(client.held.items())))
        for task in running:
            task.cancel()


async def _operate(world: World) -> None:
    """Load the code again, and set the clock."""
    while True:
        await asyncio.sleep(world.random.random())
        if not world.is_up.is_set():
            continue
        if world.random.random() < 0.7:
            hours = world.random.choice((-1, 1))
            world.tell(f"clock set by {hours} h")
            world.set_wall(world.wall_ns / 1e6 + hours * _HOUR_MS)
        else:
            world.tell("reload")
            try:
                await world.engine.reload()
            except EngineError:
                world.tell("died meanwhile")


async def _transact(world: World, transaction_count: int) -> History:
    await world.engine.mutation("tx:begin")
    world.plan.is_quiet = False
    history = History(world.random, transaction_count)

    async def settle() -> None:
        operating.cancel()
        await asyncio.wait((operating,))
        world.calm()
        await asyncio.sleep(1)
        await world.is_up.wait()
        while world.engine.under_way:  # noqa: ASYNC110 - it must not spin: then no time passes
            await asyncio.sleep(_LOOK_SECONDS)

    operating = asyncio.create_task(_operate(world))
    await have_all_done(history, world.connect, settle, death_chance=0.002)
    operating.cancel()
    return history


def simulate(seed: int, transaction_count: int, breaking: Break | None = None) -> tuple[Findings, list[str]]:
    """One history in a world of its own, judged; and the trace of all that happened.

    `breaking` has the engine break a promise.
    """
    directory = Path(tempfile.mkdtemp(prefix="engine-simulation-"))
    worlds: list[World] = []
    try:
        with pytest.MonkeyPatch.context() as patches:

            async def lived(world: World) -> History:
                worlds.append(world)
                if breaking is not None:
                    breaking(patches, world)
                return await _transact(world, transaction_count)

            history = live(write_app(directory / "app"), directory / "data", seed, lived)
        (world,) = worlds
        history.complaints += world.errors
        findings = judge(history, read_ledger(world.database), world.database)
        return findings._replace(happened=world.happened, passed=world.plan.passed), world.trace
    finally:
        shutil.rmtree(directory)


def judge(history: History, committed: Iterable[Committed], database: Path) -> Findings:
    """Hold it against the database that it left, which nobody has open."""
    replay = Replay(history, committed)
    violations = replay.violations()
    found, expected = read_state(database), state_of(replay.model)
    violations += [
        f"stored {name}: {found[name]}, expected {expected[name]}" for name in found if found[name] != expected[name]
    ]
    return Findings(
        violations,
        history.complaints,
        anomalies(black_box(history.requests)),
        replay.checked_count,
        replay.conflict_count,
        Counter(),
        set(),
    )
