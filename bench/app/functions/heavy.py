"""Functions that take time: so many pieces of work, with a read of the database after each."""

import time

from engine import MutationCtx, QueryCtx, mutation, query
from schema import Item


def _work(piece_ms: float) -> None:
    end = time.perf_counter() + piece_ms / 1_000
    while time.perf_counter() < end:
        pass


@query
async def watched(ctx: QueryCtx, group: str, piece_count: int, piece_ms: float, asker: int) -> str:
    """Depends on one item of the group; each `asker` is a query of its own."""
    label = ""
    for _ in range(piece_count):
        _work(piece_ms)
        item = await ctx.db.query(Item.by_group, group=group).first()
        label = "" if item is None else item.label
    return label


@mutation
async def write(ctx: MutationCtx, group: str, piece_count: int, piece_ms: float) -> None:
    for _ in range(piece_count):
        _work(piece_ms)
        await ctx.db.query(Item.by_group, group=group).first()
    await ctx.db.insert(Item(group=f"{group} of writes", place=0.0, label=""))
