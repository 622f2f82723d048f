"""Who is on a board: a note for each visitor, gone when the visitor is."""

from datetime import timedelta

from engine import MutationCtx, mutation, token_bucket
from schema import Note

KNOCK = token_bucket("visits:knock", count=1, per=timedelta(hours=1))


@mutation
async def enter(ctx: MutationCtx, board: str, name: str) -> None:
    await ctx.db.insert(Note(board=board, text=name))
    await ctx.session.on_disconnect(leave, board=board, name=name)


@mutation(internal=True)
async def leave(ctx: MutationCtx, board: str, name: str) -> None:
    for note in await ctx.db.query(Note.by_board, board=board).collect():
        if note.text == name:
            await ctx.db.delete(note.id)


@mutation
async def knock(ctx: MutationCtx, board: str) -> None:
    """Once an hour on each board."""
    await ctx.limit(KNOCK, key=board)
