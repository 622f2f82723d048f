"""Runs engines on storage that fails, and keeps what their clients were told (`faulty_engine.py`, `storage_faults.c`).

with faulty_engines(directory) as engines:
    clients = Clients(database)
    code = engines.run(clients, environment={"IOF_CRASH_AT": "37"})    # -9: the power was lost
    assert clients.violations() == []
"""

import errno
import hashlib
import os
import select
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from engine.schema import TableSchema
from tests.reliability.clients import Answer, Put, Seen, Told
from tests.reliability.faulty_engine import WRITER_COUNT, Order
from tests.reliability.history import copy_database, read_stored, table_named, violations
from tests.reliability.server_process import REPOSITORY
from tests.reliability.test_kill import write_app

SOURCE = Path(__file__).with_name("storage_faults.c")
POWER_LOST = -9  # how a process ends then
SECONDS_MAX = 30  # a process that takes longer hangs
_REPEATED_COUNT = 2  # answered requests of each client that go again, so that the ledger is asked
ERRNOS = {name: str(getattr(errno, name)) for name in ("EIO", "ENOSPC", "EDQUOT")}

FILES = """
from engine import ActionCtx, Id, StoredFile, action

@action
async def keep(ctx: ActionCtx, number: int) -> Id[StoredFile]:
    return await ctx.storage.store(f"file {number} ".encode() * 1000)
"""


def content_of_file(number: int) -> bytes:
    """What `files:keep` stores."""
    return f"file {number} ".encode() * 1000


def compiled_faults(directory: Path) -> Path:
    """The library to preload, made by the C compiler of this machine."""
    library = directory / "storage_faults.so"
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    subprocess.run(["gcc", *flags, "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    return library


class Clients:
    """What the clients of one database have asked and heard, over all the processes that served it."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.sent_counts = [0] * WRITER_COUNT
        self.answers: dict[Put, Answer] = {}
        self.refused: dict[Put, str] = {}  # by put: the code; final, as for an official client
        self.seen: list[Seen] = []
        self.kept: dict[str, int] = {}  # files: number by id
        self.repeat_count = 0  # answers that confirmed an earlier one
        self.contradictions: list[str] = []  # answers that did not

    def asked_again(self, *, is_all: bool = False) -> list[Put]:
        """What goes to the next process before anything new, in order: what has no answer, and some of what has."""
        again: list[Put] = []
        for client, sent_count in enumerate(self.sent_counts):
            numbers = range(sent_count)
            unanswered = [n for n in numbers if (client, n) not in self.answers and (client, n) not in self.refused]
            answered = [n for n in numbers if (client, n) in self.answers]
            answered = answered if is_all else answered[-_REPEATED_COUNT:]
            again += [(client, number) for number in sorted((*unanswered, *answered))]
        return again

    @property
    def unanswered_count(self) -> int:
        return sum(self.sent_counts) - len(self.answers) - len(self.refused)

    def hear(self, line: str) -> None:
        match line.split():
            case ["sent", client, number]:
                self.sent_counts[int(client)] = max(self.sent_counts[int(client)], int(number) + 1)
            case ["answer", client, number, ts, position]:
                put, answer = (int(client), int(number)), Answer(int(ts), int(position))
                earlier = self.answers.setdefault(put, answer)
                self.repeat_count += earlier is not answer
                if earlier != answer:
                    self.contradictions.append(f"put {put}: {earlier} became {answer}")
            case ["refused", client, number, code]:
                self.refused[int(client), int(number)] = code
            case ["seen", ts, count]:
                self.seen.append(Seen(int(ts), int(count)))
            case ["kept", storage_id, number]:
                self.kept[storage_id] = int(number)
            case ["open"] | ["done"]:
                pass
            case _:
                raise AssertionError(f"a process said {line!r}")

    def violations(self, entries_table: TableSchema | None = None) -> list[str]:
        """Each broken promise, in words; of a database that nobody has open. With the table: what is derived, too."""
        copy = self.database.with_suffix(".copy")
        if not self.database.exists():
            return [f"the database is gone with {len(self.answers)} answers"] if self.answers else []
        copy_database(self.database, copy)
        try:
            stored = read_stored(copy, entries_table)
            rows = file_rows(copy) if self.kept else {}
        except sqlite3.DatabaseError as error:
            return [f"the database cannot be read: {error}"] if self.answers or self.kept else []
        found = violations(Told(self.sent_counts, self.answers, self.seen), stored)
        if refused := [(client, number) for client, number, _ in stored.entries if (client, number) in self.refused]:
            found.append(f"refused and applied: {refused[:5]}")
        return [*self.contradictions, *found, *self._broken_files(rows)]

    def _broken_files(self, rows: Mapping[str, tuple[str, str]]) -> Iterator[str]:
        for storage_id, number in self.kept.items():
            if storage_id not in rows:
                yield f"file {number}: acknowledged, and its row is lost"
                continue
            sha256, name = rows[storage_id]
            path = Path(f"{self.database}.files", name[:2], name[2:4], name)
            content = path.read_bytes() if path.exists() else b""
            if not hashlib.sha256(content).hexdigest() == sha256 == hashlib.sha256(content_of_file(number)).hexdigest():
                yield f"file {number}: acknowledged, and {len(content)} bytes of it are there"


def file_rows(database: Path) -> dict[str, tuple[str, str]]:
    """By id: the SHA-256 and the name of the bytes."""
    with closing(sqlite3.connect(database)) as connection:
        return {row[0]: row[1:] for row in connection.execute('SELECT "id", "sha256", "file" FROM "_storage"')}


class FaultyEngines:
    """The program `faulty_engine.py`, waiting for orders."""

    def __init__(self, app: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.entries_table = table_named(app, "entries")
        self._app, self._process, self._log = app, process, log
        self._unread = b""
        self.slowest_end_seconds = 0.0  # of a process that did not end in good order, from its first fault
        # of the newest run
        self.fault_count = 0  # operations that failed on purpose
        self.seconds_after_fault = 0.0  # from the first of them to the end
        self._failed_at = 0.0

    def run(
        self,
        clients: Clients,
        *,
        put_count: int,
        environment: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        synchronous: str = "FULL",
        file_count: int = 0,
        broken: str = "",
        again_all: bool = False,
    ) -> int:
        """Serve the clients once: to the end of their requests, or of the process; its exit code."""
        order = Order(
            app=str(self._app),
            database=str(clients.database),
            again=clients.asked_again(is_all=again_all),
            sent_counts=clients.sent_counts,
            put_count=put_count,
            file_count=file_count,
            synchronous=synchronous,
            limits=dict(limits or {}),
            environment={"IOF_MATCH": str(clients.database.parent), **(environment or {})},
            broken=broken,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()
        deadline = time.monotonic() + SECONDS_MAX
        pid, self.fault_count, self._failed_at = 0, 0, 0.0
        while True:
            line = self._read_line(deadline)
            if line is None:
                if pid:
                    os.kill(pid, 9)
                raise AssertionError(f"a process hangs with {order.environment}; {self.log_tail()}")
            match line.split():
                case ["pid", number]:
                    pid = int(number)
                case ["fault"]:
                    self.fault_count += 1
                    self._failed_at = self._failed_at or time.monotonic()
                case ["ended", code]:
                    self.seconds_after_fault = time.monotonic() - self._failed_at if self._failed_at else 0.0
                    if code != "0":
                        self.slowest_end_seconds = max(self.slowest_end_seconds, self.seconds_after_fault)
                    return int(code)
                case _:
                    clients.hear(line)

    def log_tail(self) -> str:
        return f"the log ends:\n{self._log.read_text(errors='replace')[-3000:]}"

    def _read_line(self, deadline: float) -> str | None:
        """None: none has come in time."""
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            assert read, f"the program has ended; {self.log_tail()}"
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()


@contextmanager
def faulty_engines(directory: Path) -> Iterator[FaultyEngines]:
    """Start the program; its files lie in the directory."""
    app = write_app(directory / "app")
    (app / "functions" / "files.py").write_text(FILES)
    log = directory / "engines.log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.faulty_engine"],
            cwd=REPOSITORY,
            env={**os.environ, "LD_PRELOAD": str(compiled_faults(directory))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        ) as process,
    ):
        try:
            yield FaultyEngines(app, process, log)
        finally:
            assert process.stdin is not None
            process.stdin.close()
