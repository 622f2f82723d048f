"""Written anew by each reload of the soak, with another number."""

from engine import QueryCtx, query

NUMBER = 0


@query
async def number(ctx: QueryCtx) -> int:
    return NUMBER
