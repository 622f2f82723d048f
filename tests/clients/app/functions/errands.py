"""Actions: they wait, and reach the database only through functions."""

import asyncio

from engine import ActionCtx, action


@action
async def add_twice(ctx: ActionCtx, board: str, text: str) -> int:
    """Write in two mutations and tell how many notes the board has then."""
    await asyncio.sleep(0)
    await ctx.run_mutation("notes:add", board=board, text=f"{text} 1")
    await ctx.run_mutation("notes:add", board=board, text=f"{text} 2")
    count: int = await ctx.run_query("notes:count_notes", board=board)
    return count


@action
async def linger(ctx: ActionCtx, board: str) -> None:
    """Say that it has begun, then take longer than any test waits."""
    await ctx.run_mutation("notes:add", board=board, text="lingering")
    await asyncio.sleep(600)
