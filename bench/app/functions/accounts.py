"""Transfers between two accounts, as the public benchmark has them: read both, check, debit, credit."""

from engine import AppError, Id, MutationCtx, mutation
from schema import Account


@mutation
async def transfer(ctx: MutationCtx, from_id: Id[Account], to_id: Id[Account], amount: int) -> None:
    payer, payee = await ctx.db.get(from_id), await ctx.db.get(to_id)
    if payer is None or payee is None or from_id == to_id or amount <= 0:
        raise AppError({"code": "INVALID_TRANSFER"})
    if payer.balance < amount:
        raise AppError({"code": "INSUFFICIENT_FUNDS"})
    await ctx.db.patch(from_id, balance=payer.balance - amount)
    await ctx.db.patch(to_id, balance=payee.balance + amount)
