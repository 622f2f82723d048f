"""The counted skip list against sorting all keys: ranks, places, counts, and nodes that do not depend on history."""

from collections.abc import Iterator
from itertools import product
from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.ids import creation_time_of, make_id
from engine.limits import Limits
from engine.ranges import IndexRange, OrderKey, after, before, full_key, key_prefix
from engine.schema import Table, compile_schema, index
from engine.storage import ddl, ranked, shadows
from engine.storage.connections import TEMPORARY, Database
from engine.storage.ranked import _level_of, encode_key
from engine.storage.rows import RowCodec
from tests.strategies import int64s, texts


class Score(Table, name="scores"):
    board: str | None
    points: int | float | bytes | None
    note: str = ""
    by_points = index("board", "points", ranked=True)


SCORES = compile_schema([Score], Limits()).tables_by_name["scores"]
BY_POINTS = SCORES.indexes_by_name["by_points"]


def ticks_of_level(level: int, count: int) -> list[int]:
    """The first creation ticks of which the documents have nodes up to this level."""
    found: list[int] = []
    tick = 0
    while len(found) < count:
        tick += 1
        if _level_of(full_key((), tick)) == level:
            found.append(tick)
    return found


TICKS = [tick for level, count in ((0, 12), (1, 8), (2, 4), (3, 2)) for tick in ticks_of_level(level, count)]


class Store:
    """A database with scores, of which the ranks are kept."""

    def __init__(self) -> None:
        self.database = Database.open(TEMPORARY, Limits())
        self.writer = self.database.writer
        ddl.apply_schema(self.writer, compile_schema([Score], Limits()))
        self.codec: RowCodec[Score] = RowCodec(SCORES)
        self.documents: dict[int, Score] = {}  # by tick

    def clear(self) -> None:
        self.writer.execute("DELETE FROM scores")
        self.writer.execute('DELETE FROM "scores.by_points.ranks"')
        self.documents.clear()

    def insert(self, tick: int, board: str | None, points: Any) -> None:
        document = Score(
            id=make_id(SCORES.id_tag, tick, b"123456789"),
            creation_time=creation_time_of(tick),
            board=board,
            points=points,
        )
        self.codec.insert(self.writer, self.codec.encode(document))
        self.documents[tick] = self.codec.decode(self.codec.encode(document))
        ranked.insert(self.writer, SCORES, BY_POINTS, BY_POINTS.key_of(self.documents[tick]))

    def move(self, tick: int, board: str | None, points: Any) -> None:
        old = self.documents[tick]
        new = msgspec.structs.replace(old, board=board, points=points)
        self.codec.update(self.writer, self.codec.encode(new), self.codec.encode(old))
        self.documents[tick] = self.codec.decode(self.codec.encode(new))
        ranked.remove(self.writer, SCORES, BY_POINTS, BY_POINTS.key_of(old))
        ranked.insert(self.writer, SCORES, BY_POINTS, BY_POINTS.key_of(self.documents[tick]))

    def remove(self, tick: int) -> None:
        document = self.documents.pop(tick)
        self.codec.delete(self.writer, document.id)
        ranked.remove(self.writer, SCORES, BY_POINTS, BY_POINTS.key_of(document))

    @property
    def keys(self) -> list[OrderKey]:
        return sorted(map(BY_POINTS.key_of, self.documents.values()))

    def nodes(self) -> list[Any]:
        return self.writer.fetch_all('SELECT * FROM "scores.by_points.ranks" ORDER BY level, key')

    def rank(self, cut: OrderKey) -> int:
        return ranked.rank(self.writer, SCORES, BY_POINTS, cut)


STORE = Store()  # for all tests of this file, emptied by each

boards = st.sampled_from([None, "", "a", "a\0", "b"])
points = st.sampled_from([None, -inf, -1, 0, 0.5, 1, 2**53, 2**53 + 1, 2.0**53, 2**63 - 1, inf, b"", b"\0"])


@st.composite
def cuts(draw: st.DrawFn) -> OrderKey:
    columns = [boards, points, st.sampled_from(TICKS)]
    prefix = key_prefix([draw(column) for column in columns[: draw(st.integers(0, 3))]])
    return draw(st.sampled_from([before, after]))(prefix)


class RanksAreThoseOfTheSortedKeys(RuleBasedStateMachine):
    ticks = Bundle("ticks")

    def __init__(self) -> None:
        super().__init__()
        STORE.clear()

    @rule(target=ticks, tick=st.sampled_from(TICKS), board=boards, number=points)
    def insert(self, tick: int, board: str | None, number: Any) -> int:
        if tick in STORE.documents:
            STORE.move(tick, board, number)
        else:
            STORE.insert(tick, board, number)
        return tick

    @rule(tick=consumes(ticks))
    def remove(self, tick: int) -> None:
        if tick in STORE.documents:
            STORE.remove(tick)

    @rule(cut=cuts(), other=cuts())
    def ask(self, cut: OrderKey, other: OrderKey) -> None:
        keys = STORE.keys
        assert STORE.rank(cut) == sum(key < cut for key in keys)
        start, end = sorted((cut, other))
        index_range = IndexRange("scores", "by_points", start, end)
        assert ranked.count(STORE.writer, SCORES, BY_POINTS, index_range) == sum(map(index_range.holds, keys))

    @invariant()
    def every_place_is_found(self) -> None:
        keys = STORE.keys
        for place, key in enumerate(keys):
            assert STORE.rank(before(key[:-1])) == place
            cut, passed = ranked.seek(STORE.writer, SCORES, BY_POINTS, place)
            assert [k for k in keys if cut <= k][passed] == key

    @invariant()
    def the_nodes_are_those_of_an_index_that_is_built_at_once(self) -> None:
        shadows.verify(STORE.writer, SCORES)


@pytest.mark.slow
class TestRanksAreThoseOfTheSortedKeys(RanksAreThoseOfTheSortedKeys.TestCase):  # type: ignore[misc]  # made at run time
    settings = settings(stateful_step_count=40)


def test_levels_come_and_go_with_their_nodes() -> None:
    STORE.clear()
    (high,), (low, *_) = ticks_of_level(3, 1), ticks_of_level(0, 1)
    STORE.insert(low, "a", 1)
    assert STORE.nodes() == []
    STORE.insert(high, "a", 2)
    assert [(level, count) for level, _, _, count in STORE.nodes()] == [(1, 1), (1, 1), (2, 1), (2, 1), (3, 1), (3, 1)]
    STORE.remove(high)
    assert STORE.nodes() == []
    assert STORE.rank(after(())) == 1


def test_a_document_in_sixteen_has_a_node_and_one_in_256_has_two() -> None:
    levels = [_level_of(full_key((), 4096 * tick)) for tick in range(100_000)]  # ticks a millisecond apart
    assert 5_900 < sum(level >= 1 for level in levels) < 6_600
    assert 330 < sum(level >= 2 for level in levels) < 460
    assert max(levels) <= 8


# -- keys as bytes

NEAR = [  # what may be taken for each other
    *(None, False, True, 0, 1, -1, 0.5, 5e-324, inf, -inf),
    *(2**53 - 1, 2**53, 2.0**53, 2**53 + 1, 2**53 + 2, 2**60, 2**60 + 1, 2**60 - 1),
    *(-(2**53) - 1, -(2**53), -(2**63), 1 - 2**63, -(2.0**63), 2**63 - 1, 2**63 - 512, 2**63 - 513, 2.0**63),
    *("", "\0", "\0\0", "\0\xff", "a", "a\0", "a\0b", "ab", "\uffff", "\U0001f600"),
    *(b"", b"\0", b"\0\0", b"\0\xff", b"\xff", b"\xff\xff", b"a", b"a\0", b"ab"),
]  # fmt: skip
scalars = (
    st.sampled_from(NEAR)
    | int64s
    | st.floats(allow_nan=False).map(lambda number: number + 0.0)  # -0.0 is stored as 0.0
    | texts
    | st.binary(max_size=3)
)


def test_values_have_the_same_order_as_bytes() -> None:
    for one, other in product(NEAR, repeat=2):
        left, right = full_key([one], 1), full_key([other], 1)
        assert (encode_key(left) < encode_key(right)) == (left < right), (one, other)
        assert (encode_key(left) == encode_key(right)) == (left == right), (one, other)


@given(st.lists(scalars, max_size=3), st.lists(scalars, max_size=3), st.integers(0, 2**62), st.integers(0, 2**62))
def test_keys_have_the_same_order_as_bytes(one: list[Any], other: list[Any], tick: int, other_tick: int) -> None:
    left, right = full_key(one, tick), full_key((other + one)[: len(one)], other_tick)
    assert (encode_key(left) < encode_key(right)) == (left < right)
    assert (encode_key(left) == encode_key(right)) == (left == right)


@given(st.lists(scalars, max_size=3), st.lists(scalars, max_size=4), st.integers(0, 2**62))
def test_cuts_lie_between_the_same_keys_as_bytes(columns: list[Any], prefix: list[Any], tick: int) -> None:
    key = full_key(columns, tick)
    shared = key[:-1]
    for cut in (
        *(before(shared[: 2 * size]) for size in range(len(columns) + 2)),
        *(after(shared[: 2 * size]) for size in range(len(columns) + 2)),
        before(key_prefix(prefix[: len(columns)])),
        after(key_prefix(prefix[: len(columns)])),
    ):
        assert (encode_key(key) < encode_key(cut)) == (key < cut)


# -- cost


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """What runs on the writer."""
    STORE.clear()
    traced: list[str] = []
    STORE.writer._connection.set_trace_callback(traced.append)
    yield traced
    STORE.writer._connection.set_trace_callback(None)


@pytest.mark.slow
def test_a_count_of_a_thousand_times_as_many_costs_a_few_statements_more(statements: list[str]) -> None:
    index_range = IndexRange("scores", "by_points", before(key_prefix(["a", 3])), after(key_prefix(["a", 500])))
    costs = []
    STORE.writer.begin()
    for number in range(1, 20_001):
        STORE.insert(number, "a", number % 997)
        if number in (20, 20_000):
            del statements[:]
            ranked.count(STORE.writer, SCORES, BY_POINTS, index_range)
            costs.append(len(statements))
    assert STORE.rank(after(())) == 20_000
    shadows.verify(STORE.writer, SCORES)
    STORE.writer.rollback()
    few, many = costs
    assert many <= few + 2 * 4  # two ranks, each on at most four levels more


def test_every_statement_looks_up_a_level_and_a_key() -> None:
    parameters = {
        "between": (1, b"", b""),
        "sum_between": (1, b"", b""),
        "next": (1, b""),
        "remove": (1, b""),
        "add": (1, 1, b""),
    }
    for name, values in parameters.items():
        sql = getattr(ranked._sql("scores", "by_points"), name)
        plan = [row[3] for row in STORE.writer.fetch_all(f"EXPLAIN QUERY PLAN {sql}", values)]
        searches = [step for step in plan if not step.startswith("SCALAR SUBQUERY")]
        assert searches, name
        assert all("SEARCH" in step and "(level=? AND key" in step for step in searches), f"{name}: {plan}"
