"""Making up values by choosing among what there is now.

Hypothesis spends most of its time on strategies that it sees for the first time: those of a schema and of the documents
that are there would be new in every step. So all is made up by plain functions, out of a few strategies that stay.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


@cache
def _indexes(count: int) -> st.SearchStrategy[int]:
    return st.integers(0, count - 1)


class Choices:
    """What functions choose with; what shrinks becomes the first of its options."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def index(self, count: int) -> int:
        """One of so many."""
        return self._draw(_indexes(count)) if count > 1 else 0

    def one(self, options: Sequence[T]) -> T:
        return options[self.index(len(options))]

    def chance(self, count: int) -> bool:
        """True once in so many times."""
        return self.index(count) == count - 1

    def between(self, least: int, most: int) -> int:
        return least + self.index(most - least + 1)

    def many(self, make: Callable[[], T], least: int, most: int) -> list[T]:
        return [make() for _ in range(self.between(least, most))]

    def some(self, options: Sequence[T], least: int, most: int) -> list[T]:
        """Different ones, in any order."""
        rest = list(options)
        count = self.between(min(least, len(rest)), min(most, len(rest)))
        return [rest.pop(self.index(len(rest))) for _ in range(count)]


@st.composite
def made(draw: st.DrawFn, make: Callable[[Choices], Any]) -> Any:
    """What a function makes up."""
    return make(Choices(draw))
