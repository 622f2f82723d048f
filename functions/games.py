"""Games to watch live."""

import builtins

from engine import AppError, Id, MutationCtx, QueryCtx, mutation, query
from schema import ChatMessage, Game, StreamSession

DELETE_COUNT_MAX = 500  # messages, and sessions, that one run deletes, so that a crowd does not hold up other mutations

_GAME_COUNT_MAX = 200


@query
async def list(ctx: QueryCtx) -> builtins.list[Game]:
    """The newest games, those that start last first."""
    return await ctx.db.query(Game.by_starts_at).order("desc").take(_GAME_COUNT_MAX)


@mutation(internal=True)
async def delete(ctx: MutationCtx, game_id: Id[Game]) -> None:
    """Delete a game with its chat and its viewers' sessions: `engine run games:delete '{"gameId": "…"}'`.

    Many of them go first, in several runs; then the game goes with the rest.
    """
    if await ctx.db.get(game_id) is None:
        raise AppError({"code": "GAME_NOT_FOUND", "message": "There is no such game."})
    messages = await ctx.db.query(ChatMessage.by_game, game_id=game_id).take(DELETE_COUNT_MAX)
    sessions = await ctx.db.query(StreamSession.by_game, game_id=game_id).take(DELETE_COUNT_MAX)
    if max(len(messages), len(sessions)) < DELETE_COUNT_MAX:
        await ctx.db.delete(game_id)  # and what is left of them: `on_delete="cascade"`
        return
    for document in (*messages, *sessions):
        await ctx.db.delete(document.id)
    await ctx.scheduler.run_after(0, delete, game_id=game_id)
