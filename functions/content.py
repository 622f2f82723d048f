"""Content to watch at any time."""

import builtins

from engine import QueryCtx, query
from schema import Content

_CONTENT_COUNT_MAX = 200


@query
async def list(ctx: QueryCtx) -> builtins.list[Content]:
    """What there is to watch, by title."""
    return await ctx.db.query(Content.by_title).take(_CONTENT_COUNT_MAX)
