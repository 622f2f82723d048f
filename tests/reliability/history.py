"""The oracle of the crash tests: what clients were told, held against what the database has.

A `put` adds one row to each of two tables and 1 to a counter; the counter's new value is the put's position, stored in
both rows and answered to the client. So positions are the order of all puts, and timestamps must tell the same order.
"""

import shutil
import sqlite3
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import msgspec

from tests.reliability.clients import Answer, Seen

Put = tuple[int, int]  # client, number


class Told(msgspec.Struct, frozen=True):
    """What the clients know, at some moment."""

    sent_counts: Sequence[int]  # by client; it has sent the numbers below
    answers: Mapping[Put, Answer]
    seen: Sequence[Seen]  # by the watcher, in order


class Stored(msgspec.Struct, frozen=True):
    """What the database has."""

    entries: list[tuple[int, int, int]]  # client, number, position; sorted
    mirrors: list[tuple[int, int, int]]  # the same, if nothing is torn
    count: int
    integrity: str  # `ok`, or what is wrong


def copy_database(database: Path, to: Path) -> Path:
    """The file and its WAL as they lie there; nobody may have them open."""
    for suffix in ("", "-wal"):
        source = database.with_name(database.name + suffix)
        if source.exists():
            shutil.copyfile(source, to.with_name(to.name + suffix))
    return to


def read_stored(database: Path) -> Stored:
    """Changes the file: SQLite takes the WAL in. Read a copy."""
    with closing(sqlite3.connect(database)) as connection:
        entries, mirrors = (
            connection.execute(f"SELECT client, number, position FROM {table} ORDER BY 1, 2, 3").fetchall()
            for table in ("entries", "mirrors")
        )
        ((count,),) = connection.execute("SELECT total(count) FROM counters")
        findings = connection.execute("PRAGMA integrity_check").fetchall()
    return Stored(entries, mirrors, int(count), "\n".join(text for (text,) in findings))


def violations(told: Told, stored: Stored) -> list[str]:
    """Each broken promise, in words; empty if all were kept."""
    return [*_broken_in_storage(told, stored), *_broken_in_order(told), *_broken_to_watcher(told, stored)]


def _broken_in_storage(told: Told, stored: Stored) -> Iterator[str]:
    if stored.integrity != "ok":
        yield f"integrity: {stored.integrity}"
    if stored.entries != stored.mirrors:
        torn = set(stored.entries).symmetric_difference(stored.mirrors)
        yield f"torn: {len(stored.entries)} entries, {len(stored.mirrors)} mirrors, in one only: {sorted(torn)[:5]}"
    if stored.count != len(stored.entries):
        yield f"counter: {stored.count} for {len(stored.entries)} entries"
    if sorted(position for _, _, position in stored.entries) != [*range(1, len(stored.entries) + 1)]:
        yield "positions: not each of 1, 2, 3, … once"
    times = Counter((client, number) for client, number, _ in stored.entries)
    if twice := [put for put, count in times.items() if count > 1]:
        yield f"applied more than once: {twice[:5]}"
    if unsent := [put for put in times if not 0 <= put[1] < told.sent_counts[put[0]]]:
        yield f"applied, never sent: {unsent[:5]}"
    if lost := [put for put in told.answers if put not in times]:
        yield f"acknowledged and lost: {len(lost)} puts, {lost[:5]}"
    position_of = {(client, number): position for client, number, position in stored.entries}
    for put, answer in told.answers.items():
        if put in position_of and position_of[put] != answer.position:
            yield f"put {put}: answered {answer}, stored at {position_of[put]}"


def _broken_in_order(told: Told) -> Iterator[str]:
    for (put, answer), (next_put, next_answer) in pairwise(sorted(told.answers.items())):
        if put[0] == next_put[0] and not (answer.ts < next_answer.ts and answer.position < next_answer.position):
            yield f"order of one client: {put} {answer}, then {next_put} {next_answer}"
    by_position = sorted(told.answers.values(), key=lambda answer: answer.position)
    for answer, next_answer in pairwise(by_position):
        if not (answer.position < next_answer.position and answer.ts < next_answer.ts):
            yield f"order of all: {answer}, then {next_answer}"


def _broken_to_watcher(told: Told, stored: Stored) -> Iterator[str]:
    for before, after in pairwise(told.seen):
        if after.ts < before.ts or after.count < before.count:
            yield f"watcher went back: {before}, then {after}"
    answers = sorted(told.answers.values(), key=lambda answer: answer.ts)
    timestamps = [answer.ts for answer in answers]
    for seen in told.seen:
        known = bisect_right(timestamps, seen.ts)  # answers up to what it saw; it saw all of those, and none after
        at_least = answers[known - 1].position if known else 0
        below = answers[known].position if known < len(answers) else stored.count + 1
        if not at_least <= seen.count < below:
            yield f"watcher: {seen}, expected a count from {at_least} to {below - 1}"
