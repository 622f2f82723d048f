"""What the server knows of the caller."""

from typing import Any

import msgspec

from engine import ActionCtx, AppError, Identity, MutationCtx, QueryCtx, action, mutation, query


class Caller(msgspec.Struct):
    subject: str
    token_identifier: str
    edition: Any  # a claim that differs from token to token: shows which one is in use


def _caller(identity: Identity | None) -> Caller | None:
    if identity is None:
        return None
    return Caller(identity.subject, identity.token_identifier, identity.claims.get("edition"))


@query
async def whoami(ctx: QueryCtx) -> Caller | None:
    return _caller(ctx.auth.identity())


@mutation
async def whoami_as_mutation(ctx: MutationCtx) -> Caller | None:
    return _caller(ctx.auth.identity())


@action
async def whoami_as_action(ctx: ActionCtx) -> Caller | None:
    return _caller(ctx.auth.identity())


@query
async def secret(ctx: QueryCtx) -> str:
    if ctx.auth.identity() is None:
        raise AppError({"code": "SIGNED_OUT"})
    return "for signed-in callers"
