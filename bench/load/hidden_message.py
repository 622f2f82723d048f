"""A function that the bench adds to the demo app."""

from datetime import timedelta

from engine import MutationCtx, mutation
from schema import ChatMessage, Game, User

_DAY_MS = timedelta(days=1) / timedelta(milliseconds=1)


@mutation(internal=True)
async def place(ctx: MutationCtx) -> None:
    """Hide a message that stays the newest: so the chat's policy looks at who asks, whatever is sent meanwhile."""
    game = await ctx.db.query(Game.by_starts_at).order("desc").first()
    author = await ctx.db.query(User).first()
    assert game is not None
    assert author is not None
    await ctx.db.insert(
        ChatMessage(
            game_id=game.id,
            user_id=author.id,
            message="Not for everybody",
            user_name=author.name,
            status="hidden",
            created_at=ctx.now + _DAY_MS,
        )
    )
