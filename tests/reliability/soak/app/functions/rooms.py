"""What the clients of the soak call. All that is stored stays bounded, so what grows is the engine's."""

from datetime import timedelta

from engine import (
    ActionCtx,
    AppError,
    MutationCtx,
    Page,
    PaginationOptions,
    QueryCtx,
    action,
    cron,
    mutation,
    query,
)
from schema import Message, Presence, User, Wall

KEPT_COUNT = 40  # messages of a room
WALL_SIZE = 100_000
PRESENT_SECONDS = 3


@query
async def latest(ctx: QueryCtx, room: int) -> list[str]:
    newest = await ctx.db.query(Message.by_room, room=room).order("desc").take(20)
    return [message.text for message in newest]


@query
async def page(ctx: QueryCtx, room: int, pagination_opts: PaginationOptions) -> Page[Message]:
    return await ctx.db.query(Message.by_room, room=room).order("desc").paginate(pagination_opts)


@query
async def online(ctx: QueryCtx, room: int) -> int:
    seen = ctx.db.query(Presence.by_room_seen, room=room, gte=ctx.ago(seconds=PRESENT_SECONDS))
    return await seen.count()


@query
async def mine(ctx: QueryCtx) -> int:
    identity = ctx.auth.identity()
    if identity is None:
        return 0
    user = await ctx.db.query(User.by_subject, subject=identity.subject).first()
    return user.post_count if user is not None else 0


@query
async def wall(ctx: QueryCtx) -> str:
    painted = await ctx.db.query(Wall).first()
    return painted.text if painted is not None else ""


@mutation
async def post(ctx: MutationCtx, room: int, text: str) -> int:
    identity = ctx.auth.identity()
    if identity is None:
        raise AppError("sign in first")
    await ctx.db.insert(Message(room=room, text=text))
    excess_count = await ctx.db.query(Message.by_room, room=room).count() - KEPT_COUNT
    if excess_count > 0:
        for old in await ctx.db.query(Message.by_room, room=room).take(excess_count):
            await ctx.db.delete(old.id)
    user = await ctx.db.query(User.by_subject, subject=identity.subject).first()
    if user is None:
        await ctx.db.insert(User(subject=identity.subject, post_count=1))
        return 1
    await ctx.db.patch(user.id, post_count=user.post_count + 1)
    if user.post_count % 10 == 0:
        await ctx.scheduler.run_after(timedelta(seconds=1), "rooms:welcome", room=room)
    return user.post_count + 1


@mutation
async def beat(ctx: MutationCtx, room: int) -> None:
    identity = ctx.auth.identity()
    if identity is None:
        raise AppError("sign in first")
    present = await ctx.db.query(Presence.by_subject, subject=identity.subject).first()
    if present is None:
        await ctx.db.insert(Presence(room=room, subject=identity.subject, seen_at=ctx.now))
    else:
        await ctx.db.patch(present.id, room=room, seen_at=ctx.now)
    if ctx.session.is_open:
        await ctx.session.on_disconnect(leave)


@mutation
async def leave(ctx: MutationCtx) -> None:
    identity = ctx.auth.identity()
    if identity is not None:
        present = await ctx.db.query(Presence.by_subject, subject=identity.subject).first()
        if present is not None:
            await ctx.db.delete(present.id)


@mutation
async def refuse(ctx: MutationCtx) -> None:
    await ctx.db.insert(Wall(text="never to be seen"))
    raise AppError({"code": "REFUSED"})


@mutation
async def paint(ctx: MutationCtx, number: int) -> None:
    text = f"{number:08}" * (WALL_SIZE // 8)
    painted = await ctx.db.query(Wall).first()
    if painted is None:
        await ctx.db.insert(Wall(text=text))
    else:
        await ctx.db.patch(painted.id, text=text)


@mutation
async def touch_all(ctx: MutationCtx, room_count: int) -> None:
    """Write where anything is read: results that nobody watches go."""
    for presence in await ctx.db.query(Presence).collect():
        await ctx.db.delete(presence.id)
    for room in range(room_count):
        await ctx.db.insert(Presence(room=room, subject=f"touch {room}", seen_at=ctx.now))
        await ctx.db.insert(Message(room=room, text="touched"))
    for user in await ctx.db.query(User).collect():
        await ctx.db.patch(user.id, post_count=user.post_count + 1)
    for painted in await ctx.db.query(Wall).collect():
        await ctx.db.patch(painted.id, text=painted.text[::-1])


@mutation(internal=True)
async def welcome(ctx: MutationCtx, room: int) -> None:
    await ctx.db.insert(Message(room=room, text="welcome"))


@action
async def relay(ctx: ActionCtx, room: int, text: str) -> int:
    newest = await ctx.run_query(latest, room=room)
    await ctx.run_mutation(post, room=room, text=f"{text}, after {len(newest)}")
    return len(newest)


@action
def count(ctx: ActionCtx, texts: list[str]) -> int:
    return sum(len(text) for text in texts)


@cron(seconds=2)
@mutation(internal=True)
async def sweep(ctx: MutationCtx) -> None:
    for old in await ctx.db.query(Presence.by_room_seen).take(5):
        if old.seen_at < ctx.now - 60_000:
            await ctx.db.delete(old.id)
