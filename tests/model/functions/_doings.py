"""What the triggers of the model test do."""

from typing import Any

from engine import AppError, Change, MutationCtx
from functions._state import TABLES, insert


async def log(ctx: MutationCtx, change: Change[Any], table: str, field: str, value: Any) -> None:
    document = change.new or change.old
    await insert(ctx, "Log", {"about": document.id, "operation": change.operation, "kind": table})


async def count(ctx: MutationCtx, change: Change[Any], table: str, field: str, value: Any) -> None:
    """How many changes there have been of the table."""
    counter = TABLES["Counter"]
    row = await ctx.db.query(counter.by_name, name=table).unique()
    if row is None:
        await insert(ctx, "Counter", {"name": table, "n": 1})
    else:
        await ctx.db.patch(row.id, n=row.n + 1)


async def refuse(ctx: MutationCtx, change: Change[Any], table: str, field: str, value: Any) -> None:
    if change.new is not None and getattr(change.new, field) == value:
        raise AppError({"refused": table})


async def touch(ctx: MutationCtx, change: Change[Any], table: str, field: str, value: Any) -> None:
    """Change the document that is named; which may set off the same."""
    parent_id = None if change.new is None else getattr(change.new, field)
    parent = None if parent_id is None else await ctx.db.get(parent_id)
    if parent is not None:
        await ctx.db.patch(parent.id, touched=parent.touched + 1)
