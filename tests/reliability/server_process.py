"""A served app in its own process, to be killed at any moment, by itself at a named point too, and started again.

Invariants
  1. App, database and address stay the same over every kill.
  2. `gone` is set for each process once it has ended: a connection that ends, and no `gone` soon after, was ended by
     a living server.

As a program this file is the engine's command in a process that kills itself as it passes the point that
`REL_DIES_AT` names (`10 a group is committed`), and that breaks the promise that `REL_BROKEN` names.
"""

import asyncio
import importlib
import inspect
import os
import random
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from engine import faults
from engine.backend import EngineBackend
from engine.cli import main
from engine.functions import scheduler
from engine.functions.runner import Runner
from engine.storage.connections import WriterConnection
from engine.transaction.committer import Committer, Group, Submission
from engine.transaction.ledger import Ledger
from engine.transaction.transaction import WriteTransaction
from tests.reliability.broken_doors import BROKEN_DOORS

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS_MAX = 30  # a server that takes longer to start or to die hangs
DEATH_SECONDS_MAX = 5  # from the end of its connections to that of the process
_CONNECT_PACE_SECONDS = 0.02
_LOG_TAIL_LENGTH = 4_000

# Below the ports that Linux gives to outgoing connections: one of those could be the server's own while it is down, and
# a client that connects from the very port it connects to would talk to itself.
_PORTS = range(20_000, 32_000)

# Where a process can kill itself: at the fault points of the engine, and before or after it runs these functions.
_WRAPPED = {
    "the database is open": ("after", "engine.storage.connections:Database.open"),
    "the schema is applied": ("after", "engine.engine:apply_schema"),
    "one of several rows is written": ("after", "engine.transaction.transaction:WriteTransaction.insert"),
    "the outcomes are written": ("after", "engine.transaction.ledger:Ledger.write"),
    "readers see a commit": ("after", "engine.transaction.snapshots:Snapshots.advance"),
    "a frame is to be sent": ("before", "engine.server.outgoing:Outgoing.write"),
    "a frame is sent": ("after", "engine.server.outgoing:Outgoing.write"),
    "a checkpoint is made": ("after", "engine.storage.connections:WriterConnection.checkpoint"),
}
POINTS = (*_WRAPPED, *faults.POINTS)


class Point(NamedTuple):
    """Where a process is to kill itself."""

    name: str  # of `POINTS`
    pass_count: int  # from 1


class ServerProcess:
    """`python -m engine serve` over one app and one database."""

    def __init__(
        self, app: Path, database: Path, *, broken: str | None = None, memory_bytes_max: int | None = None
    ) -> None:
        self.database = database
        self._memory_bytes_max = memory_bytes_max  # of addresses, as `ulimit -v` counts them
        self._broken = broken  # of `BROKEN`: the promise that every process breaks
        self.is_up = asyncio.Event()
        self.gone = asyncio.Event()  # of the newest process; another object for each
        self.start_count = 0
        self.environment: dict[str, str] = {}  # of the processes to come, besides this one's
        self._app, self._log_file, self._port = app, database.with_suffix(".log"), _free_port()
        self._process: asyncio.subprocess.Process | None = None  # None while none runs
        self._watching: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """What official clients are given."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def sync_address(self) -> str:
        return f"{self.address}/api/1.48.0/sync"

    def log(self) -> str:
        """What all the processes so far have printed."""
        return self._log_file.read_text(errors="replace")

    def log_tail(self) -> str:
        return f"the server's log ends:\n{self.log()[-_LOG_TAIL_LENGTH:]}"

    async def start(self, dies_at: Point | None = None) -> None:
        """Start a process and wait until it takes connections, or has killed itself."""
        assert self._process is None, "invariant 1: one process at a time has the address"
        self.start_count += 1
        environment = {**os.environ, **self.environment}
        if dies_at is not None:
            environment["REL_DIES_AT"] = f"{dies_at.pass_count} {dies_at.name}"
        if self._broken is not None:
            environment["REL_BROKEN"] = self._broken
        module = "engine" if dies_at is None and self._broken is None else __name__
        paths = ["--app", str(self._app), "--database", str(self.database)]
        with self._log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", module, "serve", *paths, "--host", "127.0.0.1", "--port", str(self._port)),
                cwd=REPOSITORY,
                env=environment,
                preexec_fn=self._limit_memory if self._memory_bytes_max is not None else None,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
            )
        self.gone = asyncio.Event()
        self._watching = asyncio.create_task(self._watch(self._process, self.gone))
        async with asyncio.timeout(SECONDS_MAX):
            while not await self._takes_connections():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.gone.wait(), _CONNECT_PACE_SECONDS)
                    if dies_at is not None:
                        return  # `ended` looks how
                    code = self._process.returncode
                    raise AssertionError(f"the server ended with {code} at start {self.start_count}; {self.log_tail()}")
        if not self.gone.is_set():
            self.is_up.set()

    def kill(self) -> None:
        """SIGKILL, now: it says no goodbye and flushes nothing."""
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):  # it has ended by itself: `ended` says so
            self._process.send_signal(number)

    async def ended(self, code: int = -signal.SIGKILL) -> None:
        """Wait until the process is gone, in this way and in no other."""
        assert self._process is not None
        try:
            await asyncio.wait_for(self.gone.wait(), SECONDS_MAX)
        except TimeoutError:
            raise AssertionError(f"nothing has ended the server in {SECONDS_MAX} s; {self.log_tail()}") from None
        process, self._process = self._process, None
        assert process.returncode == code, f"the server ended with {process.returncode}; {self.log_tail()}"

    async def close(self) -> None:
        """Leave no process behind."""
        if self._process is not None:
            self.kill()
            await self.gone.wait()
            self._process = None

    def _limit_memory(self) -> None:
        assert self._memory_bytes_max is not None
        resource.setrlimit(resource.RLIMIT_AS, (self._memory_bytes_max, self._memory_bytes_max))

    async def _watch(self, process: asyncio.subprocess.Process, gone: asyncio.Event) -> None:
        await process.wait()
        self.is_up.clear()
        gone.set()  # invariant 2

    async def _takes_connections(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except ConnectionError:
            return False
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        return True


def die_at(point: Point) -> None:
    """From now on, SIGKILL to this process when it passes there for the n-th time."""
    death = _Death(point)
    if point.name not in _WRAPPED:
        faults.plan = death
        return
    when, place = _WRAPPED[point.name]
    module_name, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for part in owners:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, name)
    run = found.__func__ if isinstance(found, classmethod) else found

    def call(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            death.reach(point.name)
        result = run(*args, **kwargs)
        if when == "after":
            death.reach(point.name)
        return result

    setattr(owner, name, classmethod(call) if isinstance(found, classmethod) else call)


class _Death:
    """A plan of faults that is a death."""

    def __init__(self, point: Point) -> None:
        self._point, self._pass_count = point, 0

    async def pause(self, point: str) -> None:
        self.reach(point)

    def reach(self, point: str) -> None:
        self._pass_count += point == self._point.name
        if self._pass_count == self._point.pass_count:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()


def _free_port() -> int:
    first = random.Random(os.getpid()).randrange(len(_PORTS))  # test processes side by side look in different places
    for offset in range(len(_PORTS)):
        port = _PORTS[(first + offset) % len(_PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no port of {_PORTS} is free")


# -- engines that break a promise, for checks that must find it out


def _forget_outcomes() -> None:
    """What comes again is applied again."""
    Ledger.record = lambda *_: None


def _answer_before_the_commit() -> None:
    run_group, commit = Committer._run_group, WriterConnection.commit

    def answer(committer: Committer) -> Group:
        group = run_group(committer)
        for submission, settled in group.settled:
            submission.settle(settled)
        answered = [(Submission(one.execute, lambda _: None, one.key), settled) for one, settled in group.settled]
        return Group(group.ts, answered, group.write_set)

    def commit_slowly(writer: WriterConnection) -> None:
        time.sleep(0.02)
        commit(writer)

    Committer._run_group, WriterConnection.commit = answer, commit_slowly


def _commit_in_the_middle_of_a_mutation() -> None:
    insert = WriteTransaction.insert

    def insert_durably(transaction: WriteTransaction, document: Any) -> str:
        document_id = insert(transaction, document)
        _commit_and_go_on(transaction)
        return document_id

    WriteTransaction.insert = insert_durably


def _commit_and_go_on(transaction: WriteTransaction) -> None:
    writer = transaction._writer
    writer.commit()
    writer.begin()
    writer.savepoint()


def _serve_clients_that_saw_more() -> None:
    EngineBackend.published_ts = lambda _: 2**63 - 1


def _commit_between_a_job_and_its_end() -> None:
    execute = Runner.execute_apart

    def execute_durably(runner: Runner, call: Any, caller: Any, transaction: WriteTransaction) -> Any:
        execution = execute(runner, call, caller, transaction)
        _commit_and_go_on(transaction)
        return execution

    Runner.execute_apart = execute_durably


def _start_actions_unclaimed() -> None:
    scheduler._claim = lambda *_: True


BROKEN = {
    "outcomes are not recorded": _forget_outcomes,
    "answers come before the commit": _answer_before_the_commit,
    "a mutation is two commits": _commit_in_the_middle_of_a_mutation,
    "a job and its end are two commits": _commit_between_a_job_and_its_end,
    "actions start unclaimed": _start_actions_unclaimed,
    "clients that saw more are served": _serve_clients_that_saw_more,
    **BROKEN_DOORS,
}


if __name__ == "__main__":
    pass_count, _, point_name = os.environ.get("REL_DIES_AT", "").partition(" ")
    if point_name:
        die_at(Point(point_name, int(pass_count)))
    if "REL_BROKEN" in os.environ:
        BROKEN[os.environ["REL_BROKEN"]]()
    main(prog_name="engine")
