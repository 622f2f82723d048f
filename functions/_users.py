"""Who is asking: the caller's row in `users`.

Each refusal is an `AppError` whose data has a `code`; the README lists them.
"""

from engine import AppError, Id, MutationCtx, QueryCtx
from schema import User

ReadCtx = QueryCtx | MutationCtx  # either reads


async def find_user(ctx: ReadCtx) -> User | None:
    """The caller's row; None for an anonymous caller, and for one who never called `users:store`."""
    identity = ctx.auth.identity()
    if identity is None:
        return None
    return await ctx.db.query(User.by_token_identifier, token_identifier=identity.token_identifier).unique()


async def current_user(ctx: ReadCtx) -> User:
    """The caller's row, or a refusal that says what to do first."""
    user = await find_user(ctx)
    if user is not None:
        return user
    if ctx.auth.identity() is None:
        raise AppError({"code": "UNAUTHENTICATED", "message": "Sign in first."})
    raise AppError({"code": "USER_NOT_STORED", "message": "Call users:store once after signing in."})


async def user_id_for(ctx: ReadCtx, user_id: Id[User] | None) -> Id[User]:
    """Whose data a call is about: the caller's own, or that of `user_id`. Policies say who may ask for whom."""
    if user_id is None:
        return (await current_user(ctx)).id
    if await ctx.db.get(user_id) is None:
        raise AppError({"code": "USER_NOT_FOUND", "message": "There is no such user, or none that you may see."})
    return user_id
