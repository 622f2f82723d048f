"""The oracle of the crash tests: what clients were told, held against what the database has.

A `put` adds one row to each of two tables and 1 to a counter; the counter's new value is the put's position, stored in
both rows and answered to the client. So positions are the order of all puts, and timestamps must tell the same order.
What the engine derives from the rows (totals, ranks, words) is worked out again from the rows, and compared.
"""

import shutil
import sqlite3
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import msgspec

from engine.functions.loader import install, installed, load_app
from engine.limits import Limits
from engine.schema import TableSchema
from engine.storage import shadows
from engine.storage.connections import Connection
from engine.storage.search import search_sql_name
from tests.reliability.clients import Answer, Told


class Stored(msgspec.Struct, frozen=True):
    """What the database has."""

    entries: list[tuple[int, int, int]]  # client, number, position; sorted
    mirrors: list[tuple[int, int, int]]  # the same, if nothing is torn
    count: int
    integrity: str  # `ok`, or what is wrong
    derived: str  # `ok`, or what does not follow from the rows


def copy_database(database: Path, to: Path) -> Path:
    """The file and its WAL as they lie there; nobody may have them open."""
    for suffix in ("", "-wal", "-shm"):
        source, target = database.with_name(database.name + suffix), to.with_name(to.name + suffix)
        target.unlink(missing_ok=True)
        if source.exists() and suffix != "-shm":  # SQLite makes the index of the WAL anew
            shutil.copyfile(source, target)
    return to


def table_named(app: Path, name: str) -> TableSchema:
    """A table of an app, whose modules do not stay."""
    before = installed()
    try:
        return load_app(app, Limits()).schema.tables_by_name[name]
    finally:
        install(before)


def read_stored(database: Path, entries_table: TableSchema | None) -> Stored:
    """Changes the file: SQLite takes the WAL in. Read a copy. Without the table nothing derived is looked at."""
    with closing(sqlite3.connect(database)) as connection:
        if ("entries",) not in connection.execute("SELECT name FROM sqlite_schema").fetchall():
            return Stored([], [], 0, "ok", "ok")  # killed before the schema was applied for the first time
        entries, mirrors = (
            connection.execute(f"SELECT client, number, position FROM {table} ORDER BY 1, 2, 3").fetchall()
            for table in ("entries", "mirrors")
        )
        ((count,),) = connection.execute("SELECT total(count) FROM counters")
        findings = connection.execute("PRAGMA integrity_check").fetchall()
        derived = "\n".join(_not_derived(connection, entries_table) if entries_table else ()) or "ok"
    return Stored(entries, mirrors, int(count), "\n".join(text for (text,) in findings), derived)


def _not_derived(connection: sqlite3.Connection, table: TableSchema) -> Iterator[str]:
    try:
        shadows.verify(Connection(connection), table)  # works them out from the rows
    except AssertionError as error:
        yield f"totals or ranks: {error}"
    for index in table.search_indexes_by_name.values():
        name, ticks_of_word = search_sql_name(table.name, index.name), defaultdict(set)
        for tick, text in connection.execute(f"SELECT _creation, {index.field} FROM {table.name}"):
            for word in text.split():
                ticks_of_word[word].add(tick)
        sql = f"SELECT rowid FROM {name} WHERE {name} MATCH ?"
        for word, ticks in ticks_of_word.items():
            found = {tick for (tick,) in connection.execute(sql, (f'"{word}"',))}
            if found != ticks:
                yield f"search: {word!r} is in {len(ticks)} rows, found in {len(found)}"


def violations(told: Told, stored: Stored) -> list[str]:
    """Each broken promise, in words; empty if all were kept."""
    return [*_broken_in_storage(told, stored), *_broken_in_order(told), *_broken_to_watcher(told, stored)]


def _broken_in_storage(told: Told, stored: Stored) -> Iterator[str]:
    if stored.integrity != "ok":
        yield f"integrity: {stored.integrity}"
    if stored.derived != "ok":
        yield f"derived: {stored.derived}"
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
        if put[0] == next_put[0] and not _is_before(answer, next_answer):
            yield f"order of one client: {put} {answer}, then {next_put} {next_answer}"
        if answer.position <= answer.floor:
            yield f"real time: {put} {answer}"
    by_position = sorted(told.answers.values(), key=lambda answer: answer.position)
    for answer, next_answer in pairwise(by_position):
        if answer.position == next_answer.position:
            yield f"order of all: {answer}, then {next_answer}"
    for answer, next_answer in pairwise([answer for answer in by_position if answer.ts is not None]):
        if not _is_before(answer, next_answer):
            yield f"order of all: {answer}, then {next_answer}"


def _is_before(answer: Answer, other: Answer) -> bool:
    is_ts_before = answer.ts is None or other.ts is None or answer.ts < other.ts
    return answer.position < other.position and is_ts_before


def _broken_to_watcher(told: Told, stored: Stored) -> Iterator[str]:
    for before, after in pairwise(told.seen):
        if after.ts < before.ts or after.count < before.count:
            yield f"watcher went back: {before}, then {after}"
    for put, answer in told.answers.items():
        if answer.count is not None and not answer.position <= answer.count <= stored.count:
            yield f"put {put} and its own watch: {answer}, of {stored.count}"
    by_ts = sorted((answer.ts, answer) for answer in told.answers.values() if answer.ts is not None)
    timestamps, answers = [ts for ts, _ in by_ts], [answer for _, answer in by_ts]
    for seen in told.seen:
        known = bisect_right(timestamps, seen.ts)  # answers up to what it saw; it saw all of those, and none after
        at_least = answers[known - 1].position if known else 0
        below = answers[known].position if known < len(answers) else stored.count + 1
        if not at_least <= seen.count < below:
            yield f"watcher: {seen}, expected a count from {at_least} to {below - 1}"
