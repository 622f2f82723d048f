"""The chat of a game.

Messages that are hidden or deleted are there for moderators only: `ChatMessagePolicy` says so, for every function here.
"""

from datetime import timedelta
from typing import Annotated

import msgspec

from engine import AppError, Id, MutationCtx, Page, PaginationOptions, QueryCtx, mutation, query, token_bucket
from functions._users import current_user
from schema import ChatMessage, Game, MessageStatus

MESSAGE_LENGTH_MAX = 500
SEND = token_bucket("chat:send_message", count=5, per=timedelta(seconds=10))  # of one user


@mutation
async def send_message(ctx: MutationCtx, game_id: Id[Game], message: str) -> Id[ChatMessage]:
    """Say something in a game's chat."""
    user = await current_user(ctx)
    text = message.strip()
    if not text:
        raise AppError({"code": "EMPTY_MESSAGE", "message": "A message has at least one character."})
    if len(text) > MESSAGE_LENGTH_MAX:
        raise AppError(
            {
                "code": "MESSAGE_TOO_LONG",
                "message": f"A message has at most {MESSAGE_LENGTH_MAX} characters, this one has {len(text)}.",
                "max": MESSAGE_LENGTH_MAX,
            }
        )
    if await ctx.db.get(game_id) is None:
        raise AppError({"code": "GAME_NOT_FOUND", "message": "There is no such game."})
    await ctx.limit(SEND, key=user.id)
    return await ctx.db.insert(
        ChatMessage(
            game_id=game_id,
            user_id=user.id,
            message=text,
            user_name=user.name,
            user_avatar=user.avatar,
            created_at=ctx.now,
        )
    )


@query
async def get_messages(
    ctx: QueryCtx, game_id: Id[Game], limit: Annotated[int, msgspec.Meta(ge=1, le=200)] = 50
) -> list[ChatMessage]:
    """The newest messages that are shown, oldest of them first."""
    newest = await (
        ctx.db.query(ChatMessage.by_game, game_id=game_id)
        .order("desc")
        .filter(lambda message: message.status == "active")
        .take(limit)
    )
    return newest[::-1]


@query
async def list_messages(ctx: QueryCtx, game_id: Id[Game], pagination_opts: PaginationOptions) -> Page[ChatMessage]:
    """All messages that the caller may see, newest first, a page at a time; moderators see hidden and deleted ones."""
    return await ctx.db.query(ChatMessage.by_game, game_id=game_id).order("desc").paginate(pagination_opts)


@mutation
async def moderate_message(ctx: MutationCtx, message_id: Id[ChatMessage], status: MessageStatus) -> None:
    """Hide, delete or restore ("active") a message; for moderators."""
    if await ctx.db.get(message_id) is None:
        raise AppError({"code": "MESSAGE_NOT_FOUND", "message": "There is no such message."})
    await ctx.db.patch(message_id, status=status)
