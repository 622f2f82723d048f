"""An engine whose machine loses its power, again and again, keeps what it promised.

A killed process leaves its writes to the page cache; a machine without power does not. So storage is simulated
(`storage_faults.c`): at the n-th operation each one that was not synced is kept, undone or torn, and the process dies.
After each crash the files are held against what clients were told, then the next process serves the same clients.

REL_N: how many crashes; REL_SEED: which.
"""

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest

from tests.reliability.storage_faults import POWER_LOST, Clients, FaultyEngines, faulty_engines

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("REL_SEED", 20_261))
CRASH_COUNT = int(os.environ.get("REL_N", 60))
BLOCK_COUNT = 60  # crashes of one test: it has a time limit
CONTROL_COUNT = 25  # crashes of an engine that is broken on purpose
HISTORY_LENGTH = 15  # crashes of one database: it is read whole after each
OPERATION_COUNTS = (30, 400, 1_500)  # up to where the crash comes: while the database is opened, or any time
PUT_COUNTS = (2, 200)  # of each writer and process: it comes to its end in good order, or does not
FILE_COUNT = 10
LIMITS = {"wal_checkpoint_size_bytes": 256 << 10}  # so that there are checkpoints to crash in


class Losses(msgspec.Struct):
    """What many crashes did."""

    crash_count: int = 0
    broken: list[str] = []  # promises, each with the crash that broke it
    answer_count: int = 0
    repeat_count: int = 0  # answers that confirmed an earlier one
    unanswered_count: int = 0  # requests that a crash left unanswered
    file_count: int = 0


def lose_power(
    engines: FaultyEngines,
    directory: Path,
    crashes: range,
    *,
    synchronous: str = "FULL",
    environment: Mapping[str, str] | None = None,
    broken: str = "",
) -> Losses:
    """These crashes; a database has HISTORY_LENGTH of them, or as many as it survives."""
    losses = Losses()
    clients = Clients(directory / "first" / "engine.db")
    for crash in crashes:
        seed = SEED * 100_000 + crash
        random_source = random.Random(seed)
        at = random_source.randint(1, random_source.choice(OPERATION_COUNTS))
        code = engines.run(
            clients,
            put_count=random_source.choice(PUT_COUNTS),
            environment={"IOF_CRASH_AT": str(at), "IOF_SEED": str(seed % 2**31), **(environment or {})},
            limits=LIMITS,
            synchronous=synchronous,
            file_count=FILE_COUNT,
            broken=broken,
        )
        losses.crash_count += code == POWER_LOST
        losses.unanswered_count += clients.unanswered_count
        found = clients.violations()
        if code not in (POWER_LOST, 0):
            found.append(f"exit code {code}; {engines.log_tail()}")
        if not found and crash % HISTORY_LENGTH < HISTORY_LENGTH - 1 and crash != crashes[-1]:
            continue
        if not found:
            code = engines.run(clients, put_count=1, limits=LIMITS)
            found = clients.violations(engines.entries_table)
            if code or clients.unanswered_count or clients.refused:
                found.append(f"code {code}, {clients.unanswered_count} unanswered, refused: {clients.refused}")
        losses.broken += [f"seed {seed}, operation {at}: {line}" for line in found[:3]]
        losses.answer_count += len(clients.answers)
        losses.repeat_count += clients.repeat_count
        losses.file_count += len(clients.kept)
        clients = Clients(directory / f"after-{crash}" / "engine.db")
    print(losses)
    return losses


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyEngines]:
    with faulty_engines(tmp_path_factory.mktemp("power")) as engines:
        yield engines


@pytest.mark.parametrize("first", range(0, CRASH_COUNT, BLOCK_COUNT))
def test_nothing_that_was_acknowledged_is_lost_or_applied_twice(
    engines: FaultyEngines, tmp_path: Path, first: int
) -> None:
    crashes = range(first, min(CRASH_COUNT, first + BLOCK_COUNT))
    losses = lose_power(engines, tmp_path, crashes)
    assert losses.broken == []
    assert losses.crash_count > len(crashes) / 2
    counts = (losses.answer_count, losses.repeat_count, losses.unanswered_count, 10 * losses.file_count)
    assert min(counts) > len(crashes), f"the crashes came where they do not hurt: {losses}"


# the above shows something only if an engine that breaks the promise is found out


def test_commits_that_are_not_synced_are_found_out(engines: FaultyEngines, tmp_path: Path) -> None:
    losses = lose_power(engines, tmp_path, range(CONTROL_COUNT), synchronous="NORMAL")
    assert any("acknowledged and lost" in line for line in losses.broken)


def test_an_answer_before_the_sync_is_found_out(engines: FaultyEngines, tmp_path: Path) -> None:
    losses = lose_power(engines, tmp_path, range(CONTROL_COUNT), environment={"IOF_LAZY": "1"})
    assert any("acknowledged and lost" in line for line in losses.broken)


def test_directories_that_are_not_synced_are_found_out(engines: FaultyEngines, tmp_path: Path) -> None:
    losses = lose_power(engines, tmp_path, range(CONTROL_COUNT), broken="directories")
    assert any("the database is gone" in line for line in losses.broken)
    assert any("bytes of it are there" in line for line in losses.broken)
