"""The people who use the app. A row is made at log-in; nobody but an operator changes roles."""

from typing import Any, Literal

from msgspec import Struct

from engine import AppError, Id, MutationCtx, QueryCtx, mutation, query
from functions._users import find_user, user_id_for
from schema import Permission, User

_NAME_LENGTH_MAX = 100  # it is copied into every chat message


class Viewer(Struct, frozen=True):
    """What policies judge by."""

    user_id: Id[User] | None
    is_admin: bool


@query(internal=True)
async def viewer(ctx: QueryCtx) -> Viewer:
    """Who asks."""
    user = await find_user(ctx)
    return Viewer(None, False) if user is None else Viewer(user.id, user.role == "admin")


@query(internal=True)
async def is_admin(ctx: QueryCtx) -> bool:
    """Whether an admin asks."""
    user = await find_user(ctx)
    return user is not None and user.role == "admin"


@query(internal=True)
async def moderates_chat(ctx: QueryCtx) -> bool:
    """Whether somebody asks who may hide and delete chat messages."""
    user = await find_user(ctx)
    return user is not None and (user.role == "admin" or "write:chat" in user.permissions)


@query
async def me(ctx: QueryCtx) -> User | None:
    """The caller's row; null before `users:store`, and for an anonymous caller."""
    return await find_user(ctx)


@mutation
async def store(ctx: MutationCtx) -> Id[User]:
    """Make or refresh the caller's row from the token's `name` and `picture`; clients call it after each log-in.

    What a token does not say stays as it was: access tokens often carry no profile.
    """
    identity = ctx.auth.identity()
    if identity is None:
        raise AppError({"code": "UNAUTHENTICATED", "message": "Sign in first."})
    name, avatar = _text_claim(identity.claims.get("name")), _text_claim(identity.claims.get("picture"))
    user = await find_user(ctx)
    if user is None:
        name = (name or identity.subject)[:_NAME_LENGTH_MAX]
        return await ctx.db.insert(User(token_identifier=identity.token_identifier, name=name, avatar=avatar))
    name, avatar = (name or user.name)[:_NAME_LENGTH_MAX], avatar or user.avatar
    if (name, avatar) != (user.name, user.avatar):
        await ctx.db.patch(user.id, name=name, avatar=avatar)
    return user.id


@mutation
async def delete_account(ctx: MutationCtx, user_id: Id[User] | None = None) -> None:
    """Delete the caller's account, or as an admin or operator that of `user_id`, with its chat and watch progress.

    Who is watching goes on watching, anonymously.
    """
    await ctx.db.delete(await user_id_for(ctx, user_id))


@mutation(internal=True)
async def set_role(
    ctx: MutationCtx, token_identifier: str, role: Literal["user", "admin"], permissions: list[Permission] | None = None
) -> Id[User]:
    """What a user may do from now on: `engine run users:set_role '{"tokenIdentifier": "…", "role": "admin"}'`."""
    user = await ctx.db.query(User.by_token_identifier, token_identifier=token_identifier).unique()
    if user is None:
        raise AppError({"code": "USER_NOT_FOUND", "message": "There is no such user; users:store makes one at log-in."})
    await ctx.db.patch(user.id, role=role, permissions=permissions or [])
    return user.id


def _text_claim(value: Any) -> str | None:
    """A claim that should be text; issuers differ in what they leave out or leave empty."""
    return value.strip() or None if isinstance(value, str) else None
