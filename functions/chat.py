"""The chat of a game.

Everybody gets the same messages, whoever they are, so all viewers of a game share one run of a query. A hidden
message keeps its place but not its text; a deleted one is gone. Moderators have a query of their own.

Invariants
  1. The queries for viewers read nothing of the caller.
  2. The text of a message that is not active leaves the server by `moderation_messages` only.
"""

from typing import Annotated

import msgspec

from engine import AppError, Id, MutationCtx, Page, PaginationOptions, QueryCtx, mutation, query
from functions._users import current_user, require_permission
from schema import ChatMessage, Game, MessageStatus

MESSAGE_LENGTH_MAX = 500


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
    """The newest messages, oldest of them first."""
    newest = await (
        ctx.db.query(ChatMessage.by_game, game_id=game_id)
        .order("desc")
        .filter(lambda message: message.status != "deleted")
        .take(limit)
    )
    return [_for_viewers(message) for message in reversed(newest)]


@query
async def list_messages(ctx: QueryCtx, game_id: Id[Game], pagination_opts: PaginationOptions) -> Page[ChatMessage]:
    """All messages, newest first, a page at a time."""
    page = await (
        ctx.db.query(ChatMessage.by_game, game_id=game_id)
        .order("desc")
        .filter(lambda message: message.status != "deleted")
        .paginate(pagination_opts)
    )
    return msgspec.structs.replace(page, page=[_for_viewers(message) for message in page.page])


@query
async def moderation_messages(
    ctx: QueryCtx, game_id: Id[Game], pagination_opts: PaginationOptions
) -> Page[ChatMessage]:
    """All messages with their text, hidden and deleted ones too, newest first; for moderators."""
    await require_permission(ctx, "write:chat")
    return await ctx.db.query(ChatMessage.by_game, game_id=game_id).order("desc").paginate(pagination_opts)


@mutation
async def moderate_message(ctx: MutationCtx, message_id: Id[ChatMessage], status: MessageStatus) -> None:
    """Hide, delete or restore ("active") a message; for moderators."""
    await require_permission(ctx, "write:chat")
    if await ctx.db.get(message_id) is None:
        raise AppError({"code": "MESSAGE_NOT_FOUND", "message": "There is no such message."})
    await ctx.db.patch(message_id, status=status)


def _for_viewers(message: ChatMessage) -> ChatMessage:
    """The message as viewers may see it (invariant 2)."""
    return message if message.status == "active" else msgspec.structs.replace(message, message="")
