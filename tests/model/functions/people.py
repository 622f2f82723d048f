"""Who asks, for the policies of the model test."""

from engine import AppError, QueryCtx, query
from functions._options import ROLE_IS_SLOW
from functions._state import TABLES, hold_the_loop, note_judged


@query(internal=True)
async def role(ctx: QueryCtx) -> str | None:
    """The caller's role while it is valid; None for nobody, "stranger" for whom we do not know."""
    identity = ctx.auth.identity()
    if ROLE_IS_SLOW:
        await hold_the_loop(ctx)
    if identity is None:
        note_judged(None)
        return None
    subject = identity.subject
    users = TABLES.get("User")
    valid = users and await ctx.db.query(users.by_until, subject=subject, gt=ctx.ago()).first()
    note_judged(subject)
    if not valid:
        return "stranger"
    if valid.role == "banned":
        raise AppError("banned")
    return valid.role
