"""A history held against the engine's own record of it: what was committed, in the order of commit timestamps.

The record is complete, so everything that anybody was told must come out again when a model replays it: the results of
each transaction, each result of a query at its timestamp, and at the end what the database holds.
"""

import json
import sqlite3
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tests.reliability.simulation.clients import History, Request, Sight
from tests.reliability.simulation.list_append import Append, Read, Transaction
from tests.reliability.simulation.transactions import ACCOUNT_COUNT, BALANCE, Model, Refused, flat, keys_of


class Committed(NamedTuple):
    """One transaction that is in the database."""

    ts: int
    client: int
    number: int
    results: list[Any]


def read_ledger(database: Path) -> list[Committed]:
    """What the engine recorded with the effects, of all that wrote."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT ts, value FROM _engine_ledger").fetchall()
    return [Committed(ts, *json.loads(json.loads(value))) for ts, value in rows]


def read_state(database: Path) -> dict[str, Any]:
    """What the tables hold, as `state_of` shows a model."""
    with closing(sqlite3.connect(database)) as connection:

        def rows(sql: str) -> list[Any]:
            return connection.execute(sql).fetchall()

        lists: dict[int, list[int]] = {}
        for key, value in rows("SELECT key, value FROM elements ORDER BY _creation"):
            lists.setdefault(key, []).append(value)
        on_call: dict[int, set[int]] = {}
        for team, number in rows("SELECT team, number FROM people WHERE is_on_call"):
            on_call.setdefault(team, set()).add(number)
        seats = rows("SELECT room, count(*), max(place) FROM seats GROUP BY room")
        assert all(count == last + 1 for _, count, last in seats), f"seats with gaps: {seats}"
        ((integrity,),) = rows("PRAGMA integrity_check")
        assert integrity == "ok", integrity
        return {
            "lists": lists,
            "registers": dict(rows("SELECT key, value FROM registers")),
            "names": {name for (name,) in rows("SELECT name FROM names")},
            "counters": dict(rows("SELECT key, count FROM counters")),
            "balances": dict(rows("SELECT number, balance FROM accounts")),
            "on call": on_call,
            "seats": {room: count for room, count, _ in seats},
        }


def state_of(model: Model) -> dict[str, Any]:
    return {
        "lists": {key: values for key, values in model.lists.items() if values},
        "registers": model.registers,
        "names": model.names,
        "counters": model.counters,
        "balances": model.balances,
        "on call": model.on_call,
        "seats": model.seat_counts,
    }


class Replay:
    """The committed transactions of a history, in order, and what is wrong with what was told of them."""

    def __init__(self, history: History, committed: Iterable[Committed]) -> None:
        self.requests = {(each.client, each.number): each for each in history.requests}
        self.sights = history.sights
        self.committed = sorted(committed)
        self.model = Model()
        self.conflict_count = 0  # transactions that met a write of another one which was under way with them
        self.checked_count = 0

    def violations(self) -> list[str]:
        """Each broken promise, in words; empty if all were kept."""
        return [*self._broken_records(), *self._broken_order(), *self._broken_results(), *self._broken_counts()]

    def _broken_records(self) -> Iterator[str]:
        """What was acknowledged is there once, as it was told; what failed, or was never sent, is not."""
        times = Counter((each.client, each.number) for each in self.committed)
        if twice := [key for key, count in times.items() if count > 1]:
            yield f"applied more than once: {twice[:5]}"
        if unsent := [key for key in times if key not in self.requests]:
            yield f"applied, never sent: {unsent[:5]}"
        if failed := [key for key in times if key in self.requests and self.requests[key].status == "fail"]:
            yield f"failed, and applied: {failed[:5]}"
        told = [key for key, request in self.requests.items() if request.ts is not None]
        if lost := [key for key in told if key not in times]:
            yield f"acknowledged and lost: {lost[:5]}"
        for before, after in pairwise(self.committed):
            if before.ts == after.ts:
                yield f"two commits at one timestamp: {before}, {after}"
        for each in self.committed:
            request = self.requests.get((each.client, each.number))
            if request is not None and request.status == "ok" and request.results != each.results:
                yield f"answered {request.results}, recorded {each}"
            if request is not None and request.ts not in (None, each.ts):
                yield f"answered at {request.ts}, recorded {each}"

    def _broken_order(self) -> Iterator[str]:
        """What was answered before something else was sent has the smaller timestamp."""
        answered = sorted(
            (each.answered_at, each.ts) for each in self.requests.values() if each.ts and each.answered_at is not None
        )
        moments = [at for at, _ in answered]
        newest = list(accumulate((ts for _, ts in answered), max))  # of all that were answered up to then
        for request in self.requests.values():
            place = bisect_left(moments, request.sent_at)
            if request.ts and place and newest[place - 1] > request.ts:
                yield f"real time: {request} at {request.ts}, after {newest[place - 1]} was answered"

    def _broken_results(self) -> Iterator[str]:
        """Each result is what the model gives at that timestamp."""
        timeline: list[tuple[int, int, Committed | Sight]] = [(each.ts, 0, each) for each in self.committed]
        timeline += [(sight.ts, 1, sight) for sight in self.sights]
        timeline.sort(key=lambda entry: entry[:2])
        last_writer: dict[object, int | None] = {}  # by what it wrote: when it was answered; None: nobody knows
        shown: dict[str, str] = {}  # by query: what the model shows; until it changes
        for ts, _, entry in timeline:
            match entry:
                case Committed():
                    shown.clear()
                    request = self.requests.get((entry.client, entry.number))
                    if request is not None:
                        yield from self._run(request, entry.results, ts)
                        self._note_conflict(request, last_writer)
                case Sight():
                    for operation, held in entry.held:
                        if operation not in shown:
                            name, *arguments = json.loads(operation)
                            shown[operation] = json.dumps(self.model.do(name, *arguments))
                        if held != shown[operation]:
                            yield f"client {entry.client} at {ts}: {operation} is {held}, expected {shown[operation]}"

    def _run(self, request: Request, results: list[Any], ts: int) -> Iterator[str]:
        self.checked_count += 1
        try:
            expected = self.model.run(request.operations)
        except Refused as refused:
            yield f"at {ts}: {request} was to be refused: {refused}"
            return
        if expected != results:
            yield f"at {ts}: {request.operations} gave {results}, expected {expected}"

    def _note_conflict(self, request: Request, last_writer: dict[object, int | None]) -> None:
        touched = list(keys_of(request.operations))
        infinite = 1 << 62
        if any((last_writer.get(key, -1) or infinite) > request.sent_at for key, _ in touched):
            self.conflict_count += 1
        last_writer.update({key: request.answered_at for key, is_written in touched if is_written})

    def _broken_counts(self) -> Iterator[str]:
        """What needs no order: sums, counters, teams, seats."""
        added: Counter[int] = Counter()
        perhaps: Counter[int] = Counter()
        seats: dict[int, list[int]] = {}
        for request in self.requests.values():
            if request.status == "info":
                perhaps.update(operation[1] for operation in _plain(request.operations) if operation[0] == "add")
            if request.status != "ok":
                continue
            for (name, *arguments), result in flat(request.operations, request.results):
                match name:
                    case "sum" if result != ACCOUNT_COUNT * BALANCE:
                        yield f"money was made or lost: {request}"
                    case "leave" if result < 1:
                        yield f"nobody is on call: {request}"
                    case "add":
                        added[arguments[0]] += 1
                    case "seat":
                        seats.setdefault(arguments[0], []).append(result)
        for key, count in self.model.counters.items():
            if not added[key] <= count <= added[key] + perhaps[key]:
                yield f"counter {key}: {count} for {added[key]} additions, and perhaps {perhaps[key]}"
        for room, places in seats.items():
            if len(set(places)) != len(places):
                yield f"a seat was given twice in room {room}: {sorted(places)}"


def black_box(history: Sequence[Request]) -> list[Transaction]:
    """What the checker of appends may know of it."""
    transactions: list[Transaction] = []
    for request in history:
        sent_at, answered_at = request.sent_at, request.answered_at
        appends = list(_appends(request.operations))
        if request.status == "ok":
            operations = list(_list_operations(flat(request.operations, request.results)))
            others = [each for each in appends if each not in operations]  # of attempts that failed
            transactions.append(Transaction(operations, sent_at, answered_at, "ok"))
            transactions.append(Transaction(others, sent_at, answered_at, "fail"))
        else:  # what became of its attempts is not known even if it happened
            outside = list(_appends([each for each in request.operations if each[0] != "attempt"]))
            others = [each for each in appends if each not in outside]
            transactions.append(Transaction(outside, sent_at, answered_at, request.status))
            transactions.append(Transaction(others, sent_at, answered_at, request.status))
    return [each for each in transactions if each.operations]


def _list_operations(took_effect: Iterable[tuple[Any, Any]]) -> Iterator[Append | Read]:
    for (name, *arguments), result in took_effect:
        if name == "append":
            yield Append(*arguments)
        elif name == "read":
            yield Read(arguments[0], tuple(result))


def _appends(operations: list[Any]) -> Iterator[Append]:
    for name, *arguments in _plain(operations):
        if name == "append":
            yield Append(*arguments)


def _plain(operations: list[Any]) -> Iterator[Any]:
    for operation in operations:
        if operation[0] == "attempt":
            yield from _plain(operation[1])
        else:
            yield operation
