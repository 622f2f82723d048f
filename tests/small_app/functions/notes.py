import time
from typing import Any

from engine import AppError, Id, MutationCtx, Page, PaginationOptions, QueryCtx, mutation, query
from schema import Note, Room

SLOW_SECONDS = 0.0015  # longer than `run_slow_ms` of the tests that call `slow_count`


@query
async def in_room(ctx: QueryCtx, room: str) -> list[Note]:
    return await ctx.db.query(Note.by_room, room=room).collect()


@query
async def texts(ctx: QueryCtx, room: str) -> list[str]:
    return [note.text async for note in ctx.db.query(Note.by_room, room=room)]


@query
async def top(ctx: QueryCtx, room: str, n: int) -> list[str]:
    return [note.text for note in await ctx.db.query(Note.by_room, room=room).order("desc").take(n)]


@query
async def count(ctx: QueryCtx, room: str) -> int:
    return await ctx.db.query(Note.by_room, room=room).count()


@query
async def count_up_to(ctx: QueryCtx, room: str, rank: int) -> int:
    return await ctx.db.query(Note.by_room, room=room, lte=rank).count()


@query
async def get(ctx: QueryCtx, id: Id[Note]) -> Note | None:
    return await ctx.db.get(id)


@query
async def page(ctx: QueryCtx, room: str, pagination_opts: PaginationOptions) -> Page[Note]:
    return await ctx.db.query(Note.by_room, room=room).paginate(pagination_opts)


@query
async def until_bad(ctx: QueryCtx, room: str) -> list[str]:
    def is_good(note: Note) -> bool:
        if note.text == "bad":
            raise ValueError("a bad note")
        return True

    return [note.text for note in await ctx.db.query(Note.by_room, room=room).filter(is_good).take(100)]


@query
async def greeting(ctx: QueryCtx, room: str) -> str:
    """In a private room everybody is called by name."""
    found = await ctx.db.query(Room.by_name, name=room).unique()
    if found is None or not found.is_private:
        return "hello"
    identity = ctx.auth.identity()
    return "hello stranger" if identity is None else f"hello {identity.subject}"


@query
async def role(ctx: QueryCtx) -> Any:
    identity = ctx.auth.identity()
    return identity and identity.claims.get("role")


@query
async def slow_count(ctx: QueryCtx, room: str, turns: int = 3) -> int:
    """Long enough to be run in a round, where it pauses this often."""
    for _ in range(turns):
        end = time.perf_counter() + SLOW_SECONDS
        while time.perf_counter() < end:
            pass
        count = await ctx.db.query(Note.by_room, room=room).count()
    return count


gate = {"is_open": False}


@query
async def held_count(ctx: QueryCtx, room: str) -> int:
    """Runs in a round, until the test opens the gate."""
    while True:
        end = time.perf_counter() + SLOW_SECONDS
        while time.perf_counter() < end:
            pass
        count = await ctx.db.query(Note.by_room, room=room).count()
        if gate["is_open"]:
            return count


@query
async def endless(ctx: QueryCtx) -> None:
    while True:
        pass


@query
async def read_one_by_one(ctx: QueryCtx, room: str) -> int:
    """A range of its own for each rank."""
    return sum([await ctx.db.query(Note.by_room, room=room, rank=rank).count() for rank in range(100)])


@mutation
async def add(ctx: MutationCtx, room: str, text: str, rank: int = 0) -> Id[Note]:
    return await ctx.db.insert(Note(room=room, text=text, rank=rank))


@mutation
async def add_all(ctx: MutationCtx, room: str, texts: list[str]) -> list[Id[Note]]:
    return [await ctx.db.insert(Note(room=room, text=text)) for text in texts]


@mutation
async def add_and_fail(ctx: MutationCtx, room: str, text: str) -> None:
    await ctx.db.insert(Note(room=room, text=text))
    raise AppError({"code": "CHANGED_MY_MIND"})


@mutation
async def append_to_first(ctx: MutationCtx, room: str, text: str) -> str:
    """Read, then write what was read and more: what two at once would lose."""
    first = await ctx.db.query(Note.by_room, room=room).first()
    assert first is not None
    await ctx.db.patch(first.id, text=first.text + text)
    return first.text + text


@mutation
async def edit(ctx: MutationCtx, id: Id[Note], text: str) -> None:
    await ctx.db.patch(id, text=text)


@mutation
async def move(ctx: MutationCtx, id: Id[Note], room: str, rank: int = 0) -> None:
    await ctx.db.patch(id, room=room, rank=rank)


@mutation
async def remove(ctx: MutationCtx, id: Id[Note]) -> None:
    await ctx.db.delete(id)


@mutation
async def open_room(ctx: MutationCtx, name: str, is_private: bool) -> None:
    """Make a room, or open or close one that is there."""
    found = await ctx.db.query(Room.by_name, name=name).unique()
    if found is None:
        await ctx.db.insert(Room(name=name, is_private=is_private))
    else:
        await ctx.db.patch(found.id, is_private=is_private)


@mutation
async def nothing(ctx: MutationCtx) -> int:
    return 7
