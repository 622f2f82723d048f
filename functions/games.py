"""Games to watch live."""

import builtins

from engine import QueryCtx, query
from schema import Game

_GAME_COUNT_MAX = 200


@query
async def list(ctx: QueryCtx) -> builtins.list[Game]:
    """The newest games, those that start last first."""
    return await ctx.db.query(Game.by_starts_at).order("desc").take(_GAME_COUNT_MAX)
