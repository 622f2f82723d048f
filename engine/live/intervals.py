"""Half-open intervals by the points inside them: a treap whose nodes know the largest end below them. Pure.

Invariants
  1. Nodes are in order of (start, end); intervals that are equal share a node.
  2. `end_max` of a node is the largest end in its subtree, so a search leaves out every subtree that ends too early.
  3. Priorities are a heap, and hashes of the interval: the tree is balanced in expectation.

`find` costs O(log n + what it finds); `add` and `discard` O(log n).
"""

from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class _Node:
    __slots__ = ("end", "end_max", "left", "priority", "right", "start", "values")

    def __init__(self, start: Any, end: Any, value: Any) -> None:
        self.start, self.end, self.end_max = start, end, end
        self.priority = hash((start, end, "treap"))
        self.values = {value}
        self.left: _Node | None = None
        self.right: _Node | None = None

    def update(self) -> None:
        """Invariant 2, from the children's."""
        end_max = self.end
        if self.left is not None and self.left.end_max > end_max:
            end_max = self.left.end_max
        if self.right is not None and self.right.end_max > end_max:
            end_max = self.right.end_max
        self.end_max = end_max


class IntervalTree(Generic[K, V]):
    """Values under intervals `start <= point < end`."""

    def __init__(self) -> None:
        self._root: _Node | None = None

    def __bool__(self) -> bool:
        return self._root is not None

    def add(self, start: K, end: K, value: V) -> None:
        """Put a value under an interval that is not empty."""
        self._root = _add(self._root, start, end, value)

    def discard(self, start: K, end: K, value: V) -> None:
        """Take a value away from an interval; nothing happens if it is not there."""
        self._root = _discard(self._root, start, end, value)

    def find(self, point: K, found: set[V]) -> None:
        """Add the values of all intervals that hold the point to `found`."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            if node is None or not point < node.end_max:
                continue
            stack.append(node.left)
            if not point < node.start:
                if point < node.end:
                    found |= node.values
                stack.append(node.right)


def _add(node: _Node | None, start: Any, end: Any, value: Any) -> _Node:
    if node is None:
        return _Node(start, end, value)
    if start == node.start and end == node.end:
        node.values.add(value)
        return node
    if (start, end) < (node.start, node.end):
        node.left = _add(node.left, start, end, value)
        if node.left.priority > node.priority:
            node = _rotate_right(node, node.left)
    else:
        node.right = _add(node.right, start, end, value)
        if node.right.priority > node.priority:
            node = _rotate_left(node, node.right)
    node.update()
    return node


def _discard(node: _Node | None, start: Any, end: Any, value: Any) -> _Node | None:
    if node is None:
        return None
    if start == node.start and end == node.end:
        node.values.discard(value)
        return node if node.values else _merge(node.left, node.right)
    if (start, end) < (node.start, node.end):
        node.left = _discard(node.left, start, end, value)
    else:
        node.right = _discard(node.right, start, end, value)
    node.update()
    return node


def _merge(left: _Node | None, right: _Node | None) -> _Node | None:
    """One tree of two, of which all of `left` comes before all of `right`."""
    if left is None or right is None:
        return left or right
    if left.priority > right.priority:
        left.right = _merge(left.right, right)
        left.update()
        return left
    right.left = _merge(left, right.left)
    right.update()
    return right


def _rotate_right(node: _Node, child: _Node) -> _Node:
    node.left, child.right = child.right, node
    node.update()
    return child


def _rotate_left(node: _Node, child: _Node) -> _Node:
    node.right, child.left = child.left, node
    node.update()
    return child
