"""Whether a history of appends and reads can have come of a database that ran transactions one after another.

Nothing is known but what clients sent and were told. Each value is appended to one list once, and a read shows a whole
list; so reads tell the order of the appends (Kingsbury and Alvaro, "Elle", VLDB 2020). From that order follows who must
have come before whom; where that goes in a circle, no order of transactions explains what was seen.

    ww  the other one appended right behind what one appended        a circle of these: G0
    wr  the other one read what one appended                         of ww and wr: G1c
    rw  the other one appended right behind what one read            with rw: G2 (a lost update, write skew, …)
    rt  one was answered before the other one was sent               with rt: realtime (a stale read)

An `info` may have happened or not: whoever reads what it appended says that it did.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

Status = Literal["ok", "fail", "info"]
Edge = Literal["ww", "wr", "rw", "rt"]


class Append(NamedTuple):
    key: int
    value: int


class Read(NamedTuple):
    key: int
    values: tuple[int, ...]


class Transaction(NamedTuple):
    """One transaction as its client knows it."""

    operations: Sequence[Append | Read]  # in order; without the reads if the client was not told
    sent_at: int  # a place in the order in which things happened to clients
    answered_at: int | None  # None: never
    status: Status


class Anomaly(NamedTuple):
    """What no serial order explains."""

    kind: str
    what: str


def anomalies(history: Sequence[Transaction]) -> list[Anomaly]:
    """All that was found, the cheapest first; empty if a serial order in real time may explain the history."""
    return list(_Check(history).run())


class _Check:
    def __init__(self, history: Sequence[Transaction]) -> None:
        self.history = history
        self.writer: dict[Append, int] = {}  # the transaction that appended it
        self.reads: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)  # of a key: who, what was there
        self.order: dict[int, tuple[int, ...]] = {}  # of the values of a key: the longest read
        self.edges: dict[int, dict[int, Edge]] = defaultdict(dict)  # by who comes first; others than `rt` stand first

    def run(self) -> Iterator[Anomaly]:
        yield from self._note_appends()
        yield from self._note_reads()
        for key, order in self.order.items():
            yield from self._check_values(key, order)
            yield from self._connect(key, order)
        yield from self._find_lost()
        self._connect_in_real_time()
        yield from self._find_circles()

    # -- what each says by itself

    def _note_appends(self) -> Iterator[Anomaly]:
        for number, transaction in enumerate(self.history):
            for operation in transaction.operations:
                if isinstance(operation, Append):
                    if operation in self.writer:
                        yield Anomaly("appended twice", f"{operation} by {self.writer[operation]} and {number}")
                    self.writer[operation] = number

    def _note_reads(self) -> Iterator[Anomaly]:
        """A transaction sees what it has appended itself, behind what it saw before."""
        for number, transaction in enumerate(self.history):
            if transaction.status != "ok":
                continue
            own: dict[int, tuple[int, ...]] = defaultdict(tuple)
            seen: dict[int, tuple[int, ...]] = {}  # without its own
            for operation in transaction.operations:
                key = operation.key
                if isinstance(operation, Append):
                    own[key] += (operation.value,)
                    continue
                values, base = operation.values, operation.values
                if own[key]:
                    base = values[: -len(own[key])]
                    if values[len(base) :] != own[key]:
                        yield Anomaly("internal", f"{number} read {values} of {key}, having appended {own[key]}")
                if seen.setdefault(key, base) != base:
                    yield Anomaly("unrepeatable read", f"{number} read {seen[key]}, then {base} of {key}")
                self.reads[key].append((number, base))
                if len(values) > len(self.order.get(key, ())):
                    self.order[key] = values

    # -- what they say of each other

    def _check_values(self, key: int, order: tuple[int, ...]) -> Iterator[Anomaly]:
        if len(set(order)) != len(order):
            yield Anomaly("duplicate", f"list {key}: {order}")
        for value in order:
            writer = self.writer.get(Append(key, value))
            if writer is None:
                yield Anomaly("garbage", f"list {key} has {value}, which nobody appended")
            elif self.history[writer].status == "fail":
                yield Anomaly("G1a", f"list {key} has {value} of {writer}, which failed")

    def _connect(self, key: int, order: tuple[int, ...]) -> Iterator[Anomaly]:
        writers = [self.writer.get(Append(key, value)) for value in order]
        for first, second in pairwise(writers):
            self._edge(first, second, "ww")
        for reader, base in self.reads[key]:
            if base != order[: len(base)]:
                yield Anomaly("incompatible order", f"{reader} read {base} of {key}, others {order}")
                continue
            if base:
                writer = writers[len(base) - 1]
                self._edge(writer, reader, "wr")
                if writer is not None and writer != reader and self._last_append(writer, key) != base[-1]:
                    yield Anomaly("G1b", f"{reader} read {base} of {key}, in the middle of {writer}")
            if len(base) < len(order):
                self._edge(reader, writers[len(base)], "rw")

    def _last_append(self, number: int, key: int) -> int:
        operations = self.history[number].operations
        return [each.value for each in operations if isinstance(each, Append) and each.key == key][-1]

    def _find_lost(self) -> Iterator[Anomaly]:
        """What was acknowledged is in every later read."""
        last_read_at = {key: max(self.history[who].sent_at for who, _ in reads) for key, reads in self.reads.items()}
        known = {key: set(order) for key, order in self.order.items()}
        for append, number in self.writer.items():
            transaction = self.history[number]
            if transaction.status != "ok" or append.value in known.get(append.key, ()):
                continue
            assert transaction.answered_at is not None
            if last_read_at.get(append.key, -1) > transaction.answered_at:
                yield Anomaly("lost", f"{append} of {number} was acknowledged, and a later read has it not")

    def _edge(self, first: int | None, second: int | None, kind: Edge) -> None:
        if first is not None and second is not None and first != second:
            self.edges[first].setdefault(second, kind)

    def _connect_in_real_time(self) -> None:
        """By a chain of moments, of which each comes after the one before: few edges tell who was before whom."""
        count = len(self.history)
        answered = sorted(
            (each.answered_at, number)
            for number, each in enumerate(self.history)
            if each.status == "ok" and each.answered_at is not None
        )
        moments = [at for at, _ in answered]  # the n-th is the node `count + n`
        for place, (_, number) in enumerate(answered):
            self._edge(number, count + place, "rt")
            if place:
                self._edge(count + place - 1, count + place, "rt")
        for number, each in enumerate(self.history):
            place = bisect_left(moments, each.sent_at)
            if place and each.status != "fail":
                self._edge(count + place - 1, number, "rt")

    # -- circles

    def _find_circles(self) -> Iterator[Anomaly]:
        for component in _strongly_connected(self.edges):
            members = set(component)
            kinds = {kind for one in component for other, kind in self.edges[one].items() if other in members}
            transactions = sorted(number for number in component if number < len(self.history))
            yield Anomaly(_name_of(kinds), f"{len(transactions)} in a circle: {transactions[:8]}")


def _name_of(kinds: set[Edge]) -> str:
    if "rt" in kinds:
        return "realtime"
    if "rw" in kinds:
        return "G2"
    return "G1c" if "wr" in kinds else "G0"


def _strongly_connected(edges: dict[int, dict[int, Edge]]) -> Iterator[list[int]]:
    """The components of more than one node: Tarjan's algorithm, with a stack of its own."""
    index: dict[int, int] = {}
    lowest: dict[int, int] = {}
    waiting: list[int] = []
    is_waiting: set[int] = set()
    for root in list(edges):
        if root in index:
            continue
        path: list[tuple[int, Iterator[int]]] = []
        _enter(root, edges, index, lowest, waiting, is_waiting, path)
        while path:
            node, rest = path[-1]
            for other in rest:
                if other not in index:
                    _enter(other, edges, index, lowest, waiting, is_waiting, path)
                    break
                if other in is_waiting:
                    lowest[node] = min(lowest[node], index[other])
            else:
                path.pop()
                if path:
                    lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[node])
                if lowest[node] == index[node]:
                    component = []
                    while not component or component[-1] != node:
                        component.append(waiting.pop())
                        is_waiting.discard(component[-1])
                    if len(component) > 1:
                        yield component


def _enter(
    node: int,
    edges: dict[int, dict[int, Edge]],
    index: dict[int, int],
    lowest: dict[int, int],
    waiting: list[int],
    is_waiting: set[int],
    path: list[tuple[int, Iterator[int]]],
) -> None:
    index[node] = lowest[node] = len(index)
    waiting.append(node)
    is_waiting.add(node)
    path.append((node, iter(edges.get(node, {}))))
