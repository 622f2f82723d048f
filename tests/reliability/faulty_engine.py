"""Engines whose storage fails or loses its power: a program that is started with `storage_faults.c` preloaded.

    stdin   an Order a line: each is carried out by a process of its own, forked from this one (an import of the engine
            takes longer than a crash)
    stdout  what its clients hear, a line each (`storage_faults.py` reads it): what is written there has been told, even
            if the power is lost right after; then `ended CODE`

Eight writers put numbers, each several at a time, and a watcher subscribes to their count, all inside of the engine's
process; one more client keeps files if it is told to.
"""

import asyncio
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterable

import msgspec

from engine.cli import exit_code_of, run_loop
from engine.config import Config
from engine.engine import Engine
from engine.errors import EngineError, StorageFailed, StorageFull
from engine.limits import Limits
from engine.live.view import View
from engine.server.process import end_on_failure
from engine.storage import connections, disk, files
from engine.storage.connections import WriterConnection
from engine.sync.backend import MutationOutcome

WRITER_COUNT = 8
SLOT_COUNT = 4  # puts of one writer under way


class Order(msgspec.Struct, frozen=True):
    """What one process is to do."""

    app: str
    database: str
    again: list[tuple[int, int]]  # client and number of what earlier processes were asked, in order; before any new one
    sent_counts: list[int]  # by client: new puts have numbers from here
    put_count: int  # new ones of each client
    file_count: int = 0  # files to keep, one after another
    synchronous: str = "FULL"
    limits: dict[str, int] = {}
    environment: dict[str, str] = {}  # that steers the faults
    broken: str = ""  # what the engine is to do wrong: a name of `BROKEN`


def say(*words: object) -> None:
    """Tell the test: one write, so that a crash loses it or does not."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Writer:
    """Puts its numbers, at most SLOT_COUNT at a time."""

    def __init__(self, engine: Engine, client: int, numbers: Iterable[int]) -> None:
        self._engine, self._client, self._numbers = engine, client, iter(numbers)
        self._under_way = 0
        self.is_done = asyncio.get_running_loop().create_future()

    def put_more(self) -> None:
        while self._under_way < SLOT_COUNT and (number := next(self._numbers, None)) is not None:
            self._under_way += 1
            say("sent", self._client, number)
            arguments = json.dumps({"client": self._client, "number": number}).encode()
            session = f"00000000-0000-4000-8000-{self._client:012}"

            def done(outcome: MutationOutcome, number: int = number) -> None:
                self._answered(number, outcome)

            self._engine.backend.start_mutation("puts:put", arguments, None, session, number, done)
        if not self._under_way and not self.is_done.done():
            self.is_done.set_result(None)

    def _answered(self, number: int, outcome: MutationOutcome) -> None:
        self._under_way -= 1
        if outcome.failure is not None:
            say("refused", self._client, number, outcome.failure.code)
        else:
            assert outcome.value is not None
            say("answer", self._client, number, outcome.ts, int(float(outcome.value)))
        asyncio.get_running_loop().call_soon(self.put_more)  # not from inside of `start_mutation`


class Watcher:
    """Subscribes to the count."""

    def __init__(self, engine: Engine) -> None:
        self._loop = asyncio.get_running_loop()
        self._view: View = engine.backend.make_view(lambda: self._loop.call_soon(self._look))
        self._count: int | None = None
        self._view.add(0, "puts:count", b"{}", None)
        self._look()

    def _look(self) -> None:
        change = self._view.take()
        if change is None:
            return
        result = change.results.get(0)
        if result is not None:
            assert result.value is not None, result.failure
            self._count = int(float(result.value))
        if self._count is not None:
            say("seen", change.ts, self._count)


async def keep_files(engine: Engine, count: int) -> None:
    for number in range(count):
        stored: str = await engine.action("files:keep", number=number)
        say("kept", stored, number)


async def carry_out(order: Order) -> None:
    config = Config(mode="production", limits=Limits(**order.limits))
    async with Engine.open(order.app, order.database, config=config) as engine:
        end_on_failure(engine, exit_code_of)
        engine.database.writer.execute(f"PRAGMA synchronous = {order.synchronous}")
        say("open")
        Watcher(engine)
        keeping = asyncio.create_task(keep_files(engine, order.file_count))
        writers: list[Writer] = []
        for client in range(WRITER_COUNT):
            again = [number for asked_by, number in order.again if asked_by == client]
            first = order.sent_counts[client]
            writers.append(Writer(engine, client, [*again, *range(first, first + order.put_count)]))
        for writer in writers:
            writer.put_more()
        for writer in writers:
            await writer.is_done
        await keeping
        await engine.wait_until_idle()
        say("done")


def forget_directories() -> None:
    """Names are not synced."""
    for module in (connections, disk, files):
        module.sync_directory = lambda path: None  # type: ignore[attr-defined]


def tell_unknown_as_failed() -> None:
    """A COMMIT that fails is rolled back and refused, whatever is on the disk."""

    def commit(writer: WriterConnection) -> None:
        try:
            writer.execute("COMMIT")
        except StorageFailed as error:
            writer.rollback()
            raise StorageFull("refused") from error

    WriterConnection.commit = commit  # type: ignore[method-assign]


BROKEN = {"directories": forget_directories, "commits": tell_unknown_as_failed}


def be_child(order: Order) -> None:
    """Carry it out, and end as `engine serve` does."""
    os.environ.update(order.environment)
    if order.broken:
        BROKEN[order.broken]()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    code = 1
    try:
        run_loop(carry_out(order))
        code = 0
    except EngineError as error:
        traceback.print_exc()
        code = exit_code_of(error)
    except BaseException:  # noqa: BLE001 - the last frame of this process
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    for line in sys.stdin:
        order = msgspec.json.decode(line, type=Order)
        pid = os.fork()
        if pid == 0:
            be_child(order)
        say("pid", pid)
        _, status = os.waitpid(pid, 0)
        say("ended", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
