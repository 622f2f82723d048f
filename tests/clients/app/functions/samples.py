"""Values that JSON does not have, there and back: through arguments, results, columns and nested values."""

from typing import Any

from engine import ActionCtx, Id, Int64, MutationCtx, QueryCtx, action, mutation, query
from schema import Sample


@query
async def echo(ctx: QueryCtx, value: Any) -> Any:
    return value


@query
async def echo_int64(ctx: QueryCtx, value: Int64) -> Int64:
    return value


@query
async def double_integer(ctx: QueryCtx, value: int) -> int:
    """An `int` comes from a plain number and goes out as one while a double holds it exactly."""
    return value * 2


@query
async def pad(ctx: QueryCtx, letter: str, size: int) -> str:
    """A result of so many bytes."""
    return letter * size


@action
async def echo_by_action(ctx: ActionCtx, value: Any) -> Any:
    return value


@mutation
async def keep(ctx: MutationCtx, whole: Int64, payload: bytes, ratio: float, anything: dict[str, Any]) -> Id[Sample]:
    return await ctx.db.insert(Sample(whole=whole, payload=payload, ratio=ratio, anything=anything))


@query
async def kept(ctx: QueryCtx, sample_id: Id[Sample]) -> Sample | None:
    return await ctx.db.get(sample_id)
