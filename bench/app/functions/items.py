"""Queries that read a point, a range, a page or the newest of a group, and the write that touches them."""

from engine import MutationCtx, Page, PaginationOptions, QueryCtx, mutation, query
from schema import Item

LATEST_COUNT = 50


@query
async def point(ctx: QueryCtx, group: str, place: float) -> Item | None:
    return await ctx.db.query(Item.by_group, group=group, place=place).first()


@query
async def one(ctx: QueryCtx, group: str, place: float, asker: str) -> Item | None:
    """The item at a place: the same for all, but a query of its own for each `asker`."""
    return await ctx.db.query(Item.by_group, group=group, place=place).first()


@query
async def between(ctx: QueryCtx, group: str, start: float, end: float) -> list[Item]:
    return await ctx.db.query(Item.by_group, group=group, gte=start, lt=end).collect()


@query
async def page(ctx: QueryCtx, group: str, pagination_opts: PaginationOptions) -> Page[Item]:
    return await ctx.db.query(Item.by_group, group=group).paginate(pagination_opts)


@query
async def latest(ctx: QueryCtx, group: str, asker: str) -> list[Item]:
    """The same for all, but a query of its own for each `asker`."""
    return await ctx.db.query(Item.by_group, group=group).order("desc").take(LATEST_COUNT)


@mutation
async def put(ctx: MutationCtx, group: str, place: float, label: str) -> None:
    """Write the item at a place."""
    item = await ctx.db.query(Item.by_group, group=group, place=place).first()
    if item is None:
        await ctx.db.insert(Item(group=group, place=place, label=label))
    else:
        await ctx.db.patch(item.id, label=label)
