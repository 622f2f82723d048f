"""`ctx.ago(minutes=2)`: a time that moves with now, as bounds of queries take it."""

import math
from datetime import timedelta
from typing import Any, NoReturn

from engine.errors import FunctionMisuse


class Moment:
    """A time that moves with now. Bounds of queries take it, and `ctx.rerun_at`."""

    __slots__ = ("ago_ms", "ms")

    def __init__(self, now: float, ago: timedelta) -> None:
        self.ago_ms = ago / timedelta(milliseconds=1)
        self.ms = now - self.ago_ms  # at this run

    def as_bound(self, name: str, *, is_int: bool) -> float | int:
        """What bounds a column at this run: between two integers, the next one that the bound means."""
        if not is_int:
            return self.ms
        return math.floor(self.ms) if name in ("gt", "lte") else math.ceil(self.ms)

    def _refuse(self, *_: Any) -> NoReturn:
        raise FunctionMisuse(
            "ctx.ago(…) is not a number: nobody would know when a comparison with it changes. Give it to a query as a "
            "bound (gte=ctx.ago(minutes=2)), or compare with ctx.now and say by ctx.rerun_at(ms) when that changes."
        )

    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = __float__ = __int__ = _refuse

    def __repr__(self) -> str:
        return f"ctx.ago({timedelta(milliseconds=self.ago_ms)!r})"
