"""Pictures on a board: files that a client uploads, and shows by their addresses."""

import msgspec

from engine import ActionCtx, Id, MutationCtx, QueryCtx, StoredFile, action, mutation, query
from schema import Picture


class Shown(msgspec.Struct):
    picture_id: Id[Picture]
    url: str | None  # none: the file is gone


@mutation
async def upload_url(ctx: MutationCtx) -> str:
    return await ctx.storage.generate_upload_url()


@mutation
async def add(ctx: MutationCtx, board: str, file: Id[StoredFile]) -> Id[Picture]:
    return await ctx.db.insert(Picture(board=board, file=file))


@query
async def shown(ctx: QueryCtx, board: str) -> list[Shown]:
    """All pictures of a board, oldest first."""
    pictures = await ctx.db.query(Picture.by_board, board=board).collect()
    return [Shown(picture.id, await ctx.storage.get_url(picture.file)) for picture in pictures]


@mutation
async def remove_file(ctx: MutationCtx, file: Id[StoredFile]) -> None:
    await ctx.storage.delete(file)


@action
async def copy(ctx: ActionCtx, file: Id[StoredFile]) -> Id[StoredFile] | None:
    """The same bytes once more, as another file."""
    content = await ctx.storage.get(file)
    metadata = await ctx.storage.get_metadata(file)
    if content is None or metadata is None:
        return None
    return await ctx.storage.store(content, metadata.content_type)
