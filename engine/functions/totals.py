"""What `ctx.db.total` gives, and the pages of a ranked index."""

from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from engine.errors import FunctionMisuse
from engine.ranges import OrderKey
from engine.schema import AggregateSchema
from engine.transaction.read_set import CellEntry
from engine.transaction.reading import ReadTransaction

if TYPE_CHECKING:
    from engine.functions.run import Run

T = TypeVar("T")


class Total:
    """Count and sums of the documents under one key. A query depends on those numbers of it that it looks at."""

    __slots__ = ("_aggregate", "_key", "_numbers", "_run", "_table", "_transaction")

    def __init__(
        self,
        transaction: ReadTransaction,
        run: "Run",
        table: str,
        aggregate: AggregateSchema,
        key: OrderKey,
        numbers: tuple[int, ...],
    ) -> None:
        self._transaction, self._run = transaction, run
        self._table, self._aggregate, self._key = table, aggregate, key
        self._numbers = numbers  # the count, then the sums

    @property
    def count(self) -> int:
        """How many documents there are."""
        return self._look_at(0, None)

    def sum(self, field: str) -> int:
        """What this field adds up to; a None counts as 0."""
        sums = self._aggregate.sums
        if field not in sums:
            raise FunctionMisuse(
                f"total {self._table}.{self._aggregate.name}: it has no sum of {field!r}. "
                f"Declare aggregate(…, sum=({', '.join(map(repr, (*sums, field)))},))."
            )
        return self._look_at(1 + sums.index(field), field)

    def _look_at(self, place: int, field: str | None) -> int:
        self._run.check_open()
        # of the function that looks, also when a query that it called has given it the total
        read_set = self._transaction.read_set
        read_set.add_cell(CellEntry(self._table, self._aggregate.name, self._key, field))
        return self._numbers[place]


class RankedPage(msgspec.Struct, Generic[T], kw_only=True, frozen=True):
    """The documents at the places `number * size` and following of a ranked index."""

    page: list[T]
    number: int  # 0 is the first page; rank // size is the one that a document is on
    size: int  # how many documents a full page has
    total: int | None = None  # documents on all pages together; None unless asked for
