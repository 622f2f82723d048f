"""Functions that fail, each in its own way."""

from engine import ActionCtx, AppError, MutationCtx, QueryCtx, action, mutation, query
from schema import Note

REFUSAL = {"code": "FULL", "limit": 3, "retry": None, "payload": b"\x00\xff", "seats": [1, 2.5]}


@query
async def refuse_query(ctx: QueryCtx) -> None:
    raise AppError(REFUSAL)


@mutation
async def refuse_mutation(ctx: MutationCtx) -> None:
    raise AppError(REFUSAL)


@action
async def refuse_action(ctx: ActionCtx) -> None:
    raise AppError(REFUSAL)


@query
async def refuse_while_empty(ctx: QueryCtx, board: str) -> int:
    """An error that a write turns into a result, and back."""
    count = await ctx.db.query(Note.by_board, board=board).count()
    if count == 0:
        raise AppError("EMPTY")
    return count


@query
async def break_query(ctx: QueryCtx) -> None:
    raise RuntimeError("the combination is 1234")


@mutation
async def break_mutation(ctx: MutationCtx) -> None:
    raise RuntimeError("the combination is 1234")


@action
async def break_action(ctx: ActionCtx) -> None:
    raise RuntimeError("the combination is 1234")


@query
async def return_forbidden_key(ctx: QueryCtx) -> dict[str, int]:
    """A result that official clients cannot read; sent to them as it is, it would wedge them."""
    return {"$price": 1}


@query(internal=True)
async def hidden(ctx: QueryCtx) -> str:
    return "nobody outside sees this"
