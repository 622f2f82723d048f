"""How far each user got in each content, the same on all devices.

Invariants
  1. A user has at most one row for a content (`by_user_content` is unique); the last write wins, whole.
  2. `0 <= position_seconds <= duration_seconds`, and `completed` is `completion_percentage >= 90`.
"""

import math
from typing import Annotated

from msgspec import Meta

from engine import AppError, Id, MutationCtx, QueryCtx, mutation, query
from functions._users import ReadCtx, user_id_for
from schema import Content, DeviceType, User, WatchProgress

_COMPLETED_PERCENTAGE = 90.0


@mutation
async def update_progress(
    ctx: MutationCtx,
    content_id: Id[Content],
    position_seconds: float,
    duration_seconds: float,
    device_type: DeviceType | None = None,
    user_id: Id[User] | None = None,
) -> Id[WatchProgress]:
    """Remember where the user is. Players call it every few seconds, when they pause and at the end."""
    owner_id = await user_id_for(ctx, user_id)
    if not (math.isfinite(duration_seconds) and duration_seconds > 0):
        raise AppError({"code": "INVALID_DURATION", "message": "duration_seconds must be a number above 0."})
    if not (math.isfinite(position_seconds) and position_seconds >= 0):
        raise AppError({"code": "INVALID_POSITION", "message": "position_seconds must be a number of at least 0."})
    if await ctx.db.get(content_id) is None:
        raise AppError({"code": "CONTENT_NOT_FOUND", "message": "There is no such content."})

    position_seconds = min(position_seconds, duration_seconds)  # players report a little more at the end
    completion_percentage = position_seconds / duration_seconds * 100
    progress = WatchProgress(
        user_id=owner_id,
        content_id=content_id,
        position_seconds=position_seconds,
        duration_seconds=duration_seconds,
        completion_percentage=completion_percentage,
        last_watched_at=ctx.now,
        device_type=device_type,
        completed=completion_percentage >= _COMPLETED_PERCENTAGE,
    )
    earlier = await _progress_of(ctx, owner_id, content_id)
    if earlier is None:
        return await ctx.db.insert(progress)
    await ctx.db.replace(earlier.id, progress)
    return earlier.id


@query
async def get_progress(ctx: QueryCtx, content_id: Id[Content], user_id: Id[User] | None = None) -> WatchProgress | None:
    """Where to resume; null when the user never watched it."""
    return await _progress_of(ctx, await user_id_for(ctx, user_id), content_id)


@query
async def get_continue_watching(
    ctx: QueryCtx, limit: Annotated[int, Meta(ge=1, le=100)] = 10, user_id: Id[User] | None = None
) -> list[WatchProgress]:
    """What the user began and did not finish, last watched first."""
    owner_id = await user_id_for(ctx, user_id)
    unfinished = ctx.db.query(WatchProgress.by_user_completed, user_id=owner_id, completed=False)
    return await unfinished.order("desc").take(limit)


async def _progress_of(ctx: ReadCtx, user_id: Id[User], content_id: Id[Content]) -> WatchProgress | None:
    return await ctx.db.query(WatchProgress.by_user_content, user_id=user_id, content_id=content_id).unique()
