"""Numbered entries: the same list whole and in pages."""

from engine import MutationCtx, Page, PaginationOptions, QueryCtx, mutation, query
from schema import Entry


@query
async def numbers(ctx: QueryCtx, board: str) -> list[float]:
    """Every number of a board, in order: what all pages together must show."""
    return [entry.number for entry in await ctx.db.query(Entry.by_number, board=board).collect()]


@query
async def list_entries(ctx: QueryCtx, board: str, pagination_opts: PaginationOptions) -> Page[Entry]:
    return await ctx.db.query(Entry.by_number, board=board).paginate(pagination_opts)


@query
async def list_backwards(ctx: QueryCtx, board: str, pagination_opts: PaginationOptions) -> Page[Entry]:
    return await ctx.db.query(Entry.by_number, board=board).order("desc").paginate(pagination_opts)


@mutation
async def change(ctx: MutationCtx, board: str, insert: list[float], delete: list[float]) -> None:
    """Insert and delete numbers in one commit; deleting a number that is not there is no error."""
    for number in insert:
        await ctx.db.insert(Entry(board=board, number=number))
    for number in delete:
        entry = await ctx.db.query(Entry.by_number, board=board, number=number).unique()
        if entry is not None:
            await ctx.db.delete(entry.id)
