"""What a new database starts with: nothing."""

from engine import MutationCtx, mutation


@mutation(internal=True)
async def seed(ctx: MutationCtx, issuer: str) -> None:
    pass
