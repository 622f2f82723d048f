"""Who is watching which game right now.

A player joins, sends a heartbeat every 30 seconds and leaves. One whose connection is gone leaves by itself, within
seconds (`on_disconnect`). The net under that, for players that speak HTTP: `expire_sessions` marks those inactive that
were silent for two minutes. A heartbeat that comes after that brings a session back, so a viewer who was offline for a
while is counted again.

Invariants
  1. A session id has one row (`by_session` is unique), so a player is counted in one game at most.
  2. A heartbeat of an active session changes no number that a viewer count reads.
"""

from datetime import timedelta
from typing import Annotated

from msgspec import Meta

from engine import AppError, Id, MutationCtx, QueryCtx, cron, mutation, query
from functions._users import find_user
from schema import DeviceType, Game, Quality, StreamSession

STALE_AFTER_MS = 2 * 60 * 1000  # four heartbeats of 30 seconds
EXPIRE_COUNT_MAX = 500  # sessions in one run, so that a mass disconnect does not hold up other mutations

SessionId = Annotated[str, Meta(min_length=1, max_length=128)]


@mutation
async def join(
    ctx: MutationCtx, game_id: Id[Game], session_id: SessionId, device_type: DeviceType, quality: Quality | None = None
) -> None:
    """Start watching a game; a session that watches another one moves. Sending it again does no harm."""
    if await ctx.db.get(game_id) is None:
        raise AppError({"code": "GAME_NOT_FOUND", "message": "There is no such game."})
    user = await find_user(ctx)
    earlier = await _session(ctx, session_id)
    stays = earlier is not None and earlier.active and earlier.game_id == game_id
    session = StreamSession(
        game_id=game_id,
        user_id=user.id if user else None,
        session_id=session_id,
        joined_at=earlier.joined_at if earlier and stays else ctx.now,
        last_heartbeat=ctx.now,
        active=True,
        device_type=device_type,
        quality=quality,
    )
    if earlier is None:
        await ctx.db.insert(session)
    else:
        await ctx.db.replace(earlier.id, session)
    if ctx.session.is_open:
        await ctx.session.on_disconnect(leave, session_id=session_id)


@mutation(linger=timedelta(milliseconds=100))
async def heartbeat(ctx: MutationCtx, session_id: SessionId, game_id: Id[Game]) -> None:
    """Still watching; brings back a session that had lapsed. A client that gets SESSION_NOT_FOUND joins."""
    session = await _session(ctx, session_id)
    if session is None or session.game_id != game_id:
        raise AppError({"code": "SESSION_NOT_FOUND", "message": "This session has not joined this game."})
    await ctx.db.patch(session.id, last_heartbeat=ctx.now, active=True)
    if ctx.session.is_open:  # again: a client that connected anew may have another session
        await ctx.session.on_disconnect(leave, session_id=session_id)


@mutation
async def leave(ctx: MutationCtx, session_id: SessionId) -> None:
    """Stop watching. Leaving twice, or a session that never joined, is no error: a closing page sends it blindly."""
    session = await _session(ctx, session_id)
    if session is not None and session.active:
        await ctx.db.patch(session.id, active=False)
    if ctx.session.is_open:
        await ctx.session.cancel_on_disconnect(leave, session_id=session_id)


@query
async def get_viewer_count(ctx: QueryCtx, game_id: Id[Game]) -> dict[str, int]:
    """`{"viewerCount": n}`: it runs again when somebody comes or goes, not at heartbeats."""
    viewers = await ctx.db.total(StreamSession.viewers, game_id=game_id, active=True)
    return {"viewerCount": viewers.count}


@cron(minutes=1)
@mutation(internal=True)
async def expire_sessions(ctx: MutationCtx) -> int:
    """Mark sessions inactive that were silent for two minutes; says how many."""
    silent = ctx.db.query(StreamSession.by_active_heartbeat, active=True, lte=ctx.now - STALE_AFTER_MS)
    stale = await silent.take(EXPIRE_COUNT_MAX)
    for session in stale:
        await ctx.db.patch(session.id, active=False)
    if len(stale) == EXPIRE_COUNT_MAX:
        await ctx.scheduler.run_after(0, expire_sessions)
    return len(stale)


async def _session(ctx: MutationCtx, session_id: str) -> StreamSession | None:
    return await ctx.db.query(StreamSession.by_session, session_id=session_id).unique()
