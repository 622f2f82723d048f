"""Functions that log, and one whose source changes: what a developer sees in development."""

from engine import MutationCtx, QueryCtx, mutation, query


@query
async def greet(ctx: QueryCtx) -> str:
    return "hello"


@query
async def speak(ctx: QueryCtx, word: str) -> str:
    ctx.log("heard", word)
    return word


@mutation
async def speak_up(ctx: MutationCtx, word: str) -> str:
    answer = word.upper()
    ctx.log.info("heard", word, answer)
    return answer
