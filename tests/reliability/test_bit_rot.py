"""One bit of what lies on the disk is another one: that is found out, or harms nobody; no promise is broken silently.

Bits are flipped in the WAL that a dead process has left, and in the pages of the database that hold what the engine
keeps its promises with: the ledger, and the row about the database. All requests are sent again then. (Rows of the
app's tables have no checksums, and nor has SQLite; a file system may have.)

REL_N: how many bits of each; REL_SEED: which.
"""

import copy
import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.reliability.storage_faults import POWER_LOST, Clients, FaultyEngines, faulty_engines

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("REL_SEED", 20_261))
FLIP_COUNT = int(os.environ.get("REL_N", 40))
BLOCK_COUNT = 100  # of one test: it has a time limit
BLOCKS = [(SEED + first, min(BLOCK_COUNT, FLIP_COUNT - first)) for first in range(0, FLIP_COUNT, BLOCK_COUNT)]
STORAGE_FAILED = 75
FOUND_OUT, HARMLESS = "found out", "harmless"
SYSTEM_TABLES = ("_engine_ledger", "_engine_meta")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyEngines]:
    with faulty_engines(tmp_path_factory.mktemp("rot")) as engines:
        yield engines


@pytest.fixture(scope="module")
def crashed(engines: FaultyEngines, tmp_path_factory: pytest.TempPathFactory) -> Clients:
    """With a WAL that has many commits."""
    clients = Clients(tmp_path_factory.mktemp("crashed") / "engine.db")
    crash = {"IOF_CRASH_AT": "40", "IOF_CRASH_OP": "sync"}
    assert engines.run(clients, put_count=1_000, environment=crash) == POWER_LOST
    return clients


@pytest.fixture(scope="module")
def closed(engines: FaultyEngines, tmp_path_factory: pytest.TempPathFactory) -> Clients:
    """All is in the database."""
    clients = Clients(tmp_path_factory.mktemp("closed") / "engine.db")
    assert engines.run(clients, put_count=100) == 0
    return clients


def with_flipped_bit(clients: Clients, directory: Path, suffix: str, bit: int) -> Clients:
    """The same clients, on a copy of their database."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(clients.database.parent, directory)
    copied = copy.deepcopy(clients)
    copied.database = directory / clients.database.name
    file = copied.database.with_name(copied.database.name + suffix)
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return copied


def outcome_of(engines: FaultyEngines, clients: Clients) -> str:
    """What became of it when everything was asked again."""
    code = engines.run(clients, put_count=1, again_all=True)
    if code == STORAGE_FAILED:
        return FOUND_OUT
    if code or clients.unanswered_count:
        return f"exit code {code}, {clients.unanswered_count} unanswered; {engines.log_tail()}"
    return "; ".join(clients.violations()) or HARMLESS


def last_commit_start(wal: bytes) -> int:
    """Where the frames of the last commit begin: a bit in these looks as if a crash had torn them."""
    frame_size = 24 + int.from_bytes(wal[8:12])
    salts = wal[16:24]
    commit_ends = [
        start + frame_size
        for start in range(32, len(wal) - frame_size + 1, frame_size)
        if wal[start + 8 : start + 16] == salts and int.from_bytes(wal[start + 4 : start + 8])
    ]
    assert len(commit_ends) > 10, "a WAL of many commits"
    return commit_ends[-2]


def system_bits(database: Path) -> list[tuple[int, int]]:
    """The pages of the tables of the engine: the first bit, and the bit behind the last."""
    with closing(sqlite3.connect(database)) as connection:
        pages = connection.execute(
            "SELECT pgoffset, pgsize FROM dbstat WHERE name IN (?, ?) AND pagetype != 'overflow'", SYSTEM_TABLES
        ).fetchall()
    return [(8 * offset, 8 * (offset + size)) for offset, size in pages]


def flip_each(engines: FaultyEngines, clients: Clients, directory: Path, suffix: str, bits: list[int]) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for bit in bits:
        outcome = outcome_of(engines, with_flipped_bit(clients, directory / "copy", suffix, bit))
        assert outcome in (FOUND_OUT, HARMLESS), f"bit {bit} of {suffix or 'the database'}: {outcome}"
        outcomes[outcome] += 1
    print(outcomes)
    return outcomes


@pytest.mark.parametrize(("seed", "count"), BLOCKS)
def test_a_damaged_wal_is_refused(
    engines: FaultyEngines, crashed: Clients, tmp_path: Path, seed: int, count: int
) -> None:
    wal = crashed.database.with_name(crashed.database.name + "-wal").read_bytes()
    random_source = random.Random(seed)
    in_header = [random_source.randrange(32 * 8) for _ in range(count // 4)]
    in_frames = [random_source.randrange(32 * 8, last_commit_start(wal) * 8) for _ in range(count)]
    outcomes = flip_each(engines, crashed, tmp_path, "-wal", [*in_header, *in_frames])
    assert outcomes[FOUND_OUT] > outcomes[HARMLESS]


@pytest.mark.parametrize(("seed", "count"), BLOCKS)
def test_damaged_rows_of_the_engine_are_found_out(
    engines: FaultyEngines, closed: Clients, tmp_path: Path, seed: int, count: int
) -> None:
    random_source = random.Random(seed)
    pages = system_bits(closed.database)
    bits = [random_source.randrange(*random_source.choice(pages)) for _ in range(count)]
    outcomes = flip_each(engines, closed, tmp_path, "", bits)
    assert outcomes[FOUND_OUT] > count / 4


def test_rows_that_nobody_checks_are_found_out(engines: FaultyEngines, closed: Clients, tmp_path: Path) -> None:
    """The control: without checksums a damaged row is believed."""
    clients = copy.deepcopy(closed)
    shutil.copytree(closed.database.parent, tmp_path / "control")
    clients.database = tmp_path / "control" / closed.database.name
    with closing(sqlite3.connect(clients.database)) as connection, connection:
        connection.execute("UPDATE _engine_ledger SET checksum = NULL, request_id = request_id + 1000")
    assert "applied more than once" in outcome_of(engines, clients)
