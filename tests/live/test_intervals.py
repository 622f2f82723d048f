"""`IntervalTree` against looking at every interval."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.live.intervals import IntervalTree, _Node

points = st.integers(0, 12)
intervals = st.tuples(points, points).map(sorted).filter(lambda ends: ends[0] < ends[1]).map(tuple)
values = st.integers(0, 3)


class FindsWhatHoldsThePoint(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree: IntervalTree[int, int] = IntervalTree()
        self.listed: set[tuple[int, int, int]] = set()

    @rule(interval=intervals, value=values)
    def add(self, interval: tuple[int, int], value: int) -> None:
        self.tree.add(*interval, value)
        self.listed.add((*interval, value))

    @rule(interval=intervals, value=values)
    def discard(self, interval: tuple[int, int], value: int) -> None:
        self.tree.discard(*interval, value)
        self.listed.discard((*interval, value))

    @invariant()
    def every_point_finds_the_same(self) -> None:
        for point in range(-1, 14):
            found: set[int] = set()
            self.tree.find(point, found)
            assert found == {value for start, end, value in self.listed if start <= point < end}

    @invariant()
    def the_tree_is_in_order(self) -> None:
        nodes = in_order(self.tree._root)
        places = [(node.start, node.end) for node in nodes]
        assert places == sorted({(start, end) for start, end, _ in self.listed})  # invariant 1
        assert bool(self.tree) == bool(nodes)
        for node in nodes:
            children = [child for child in (node.left, node.right) if child is not None]
            assert node.end_max == max([node.end, *(child.end_max for child in children)])  # invariant 2
            assert all(child.priority <= node.priority for child in children)  # invariant 3


@pytest.mark.slow
class TestFindsWhatHoldsThePoint(FindsWhatHoldsThePoint.TestCase):  # type: ignore[misc]  # made at run time
    settings = settings(stateful_step_count=20)


def in_order(node: _Node | None) -> list[_Node]:
    return [] if node is None else [*in_order(node.left), node, *in_order(node.right)]


def depth_of(node: _Node | None) -> int:
    return 0 if node is None else 1 + max(depth_of(node.left), depth_of(node.right))


def test_intervals_in_ascending_order_do_not_make_a_list() -> None:
    tree: IntervalTree[int, int] = IntervalTree()
    for start in range(2_000):
        tree.add(start, start + 1, start)
    assert depth_of(tree._root) < 60  # 11 at best, about 25 in expectation


@given(st.lists(intervals))
def test_a_search_adds_to_what_was_found_before(listed: list[tuple[int, int]]) -> None:
    tree: IntervalTree[int, str] = IntervalTree()
    for start, end in listed:
        tree.add(start, end, "here")
    found = {"earlier"}
    tree.find(6, found)
    assert found == {"earlier", "here"} if any(start <= 6 < end for start, end in listed) else found == {"earlier"}
