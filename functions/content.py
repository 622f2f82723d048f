"""Content to watch at any time."""

import builtins

from engine import AppError, Id, MutationCtx, QueryCtx, mutation, query
from schema import Content, WatchProgress

DELETE_COUNT_MAX = 500  # rows of progress that one run deletes, so that a crowd does not hold up other mutations

_CONTENT_COUNT_MAX = 200


@query
async def list(ctx: QueryCtx) -> builtins.list[Content]:
    """What there is to watch, by title."""
    return await ctx.db.query(Content.by_title).take(_CONTENT_COUNT_MAX)


@mutation(internal=True)
async def delete(ctx: MutationCtx, content_id: Id[Content]) -> None:
    """Delete a content with everybody's progress in it: `engine run content:delete '{"contentId": "…"}'`.

    Many of them go first, in several runs; then the content goes with the rest.
    """
    if await ctx.db.get(content_id) is None:
        raise AppError({"code": "CONTENT_NOT_FOUND", "message": "There is no such content."})
    watched = await ctx.db.query(WatchProgress.by_content, content_id=content_id).take(DELETE_COUNT_MAX)
    if len(watched) < DELETE_COUNT_MAX:
        await ctx.db.delete(content_id)  # and what is left of them: `on_delete="cascade"`
        return
    for progress in watched:
        await ctx.db.delete(progress.id)
    await ctx.scheduler.run_after(0, delete, content_id=content_id)
