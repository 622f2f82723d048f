"""Notes on a board: the plain reads and writes that most tests watch."""

from engine import AppError, Id, MutationCtx, QueryCtx, mutation, query
from schema import Note


@query
async def list_notes(ctx: QueryCtx, board: str) -> list[Note]:
    """All notes of a board, oldest first."""
    return await ctx.db.query(Note.by_board, board=board).collect()


@query
async def count_notes(ctx: QueryCtx, board: str) -> int:
    return await ctx.db.query(Note.by_board, board=board).count()


@query
async def count_patiently(ctx: QueryCtx, board: str, rounds: int) -> int:
    """Count a board again and again: a query that is slow, without waiting for anything but the database."""
    total = 0
    for _ in range(rounds):
        total = len(await ctx.db.query(Note.by_board, board=board).collect())
    return total


@mutation
async def add(ctx: MutationCtx, board: str, text: str) -> Id[Note]:
    identity = ctx.auth.identity()
    author = identity.token_identifier if identity else None
    return await ctx.db.insert(Note(board=board, text=text, author=author))


@mutation
async def add_then_refuse(ctx: MutationCtx, board: str, text: str) -> None:
    """Write, then fail: nothing of it may be seen by anybody."""
    await ctx.db.insert(Note(board=board, text=text))
    raise AppError({"code": "REFUSED", "text": text})


@mutation
async def add_later(ctx: MutationCtx, board: str, text: str, delay_ms: float) -> str:
    return await ctx.scheduler.run_after(delay_ms, add, board=board, text=text)


@mutation
async def rename(ctx: MutationCtx, note_id: Id[Note], text: str) -> None:
    await ctx.db.patch(note_id, text=text)


@mutation
async def remove(ctx: MutationCtx, note_id: Id[Note]) -> None:
    await ctx.db.delete(note_id)
