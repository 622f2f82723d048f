"""Who is asking: the caller's row in `users`, and what it may do.

Each refusal is an `AppError` whose data has a `code`; the README lists them.
"""

from engine import AppError, Id, MutationCtx, QueryCtx
from schema import Permission, User

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


async def require_permission(ctx: ReadCtx, permission: Permission) -> User:
    """The caller's row, if it is an admin's or has the permission."""
    user = await current_user(ctx)
    if user.role != "admin" and permission not in user.permissions:
        raise AppError({"code": "FORBIDDEN", "message": f"This needs the permission {permission}."})
    return user


async def user_id_for(ctx: ReadCtx, user_id: Id[User] | None) -> Id[User]:
    """Whose data a call is about: the caller's own, or that of `user_id` if the caller may ask for it."""
    user = await current_user(ctx)
    if user_id is None or user_id == user.id:
        return user.id
    if user.role != "admin":
        raise AppError({"code": "FORBIDDEN", "message": "Only an admin may act for another user."})
    if await ctx.db.get(user_id) is None:
        raise AppError({"code": "USER_NOT_FOUND", "message": "There is no such user."})
    return user_id
