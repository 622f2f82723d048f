"""Functions that do whatever the model test asks, on whatever tables the schema beside them has.

Each query keeps in `ran` that it ran to its end: from that the test knows which of the equal-looking ones it was.
"""

from typing import Any

import msgspec

from engine import AppError, MutationCtx, Page, PaginationOptions, QueryCtx, Table, mutation, query
from engine.errors import EngineError
from functions._state import TABLES, begin_write, hold_the_loop, insert, mutation_under_way, recorded
from functions.people import role
from tests.model.plans import (
    Call,
    Each,
    Filter,
    Get,
    Period,
    Plan,
    Rank,
    RankedPage,
    Refuse,
    Role,
    ScanAsk,
    ScanSpec,
    TotalOf,
    When,
    Who,
    Write,
    pack,
    unpack_scan,
    unpack_steps,
    unpack_writes,
)

Reads = QueryCtx | MutationCtx


def plain(document: Table) -> dict[str, Any]:
    return msgspec.structs.asdict(document)


def build(ctx: Reads, spec: ScanSpec) -> Any:
    document_type = TABLES[spec.table]
    source = document_type if spec.index is None else getattr(document_type, spec.index)
    ago = {name: ctx.ago(milliseconds=ms) for name, ms in spec.ago.items()}
    database = ctx.db.unrestricted if spec.is_unrestricted else ctx.db
    scan = database.query(source, **spec.bounds, **ago, **spec.equal)
    if spec.is_descending:
        scan = scan.order("desc")
    if spec.with_deleted:
        scan = scan.with_deleted()
    if spec.filter is not None:
        scan = scan.filter(predicate(spec.filter))
    return scan


def predicate(spec: Filter) -> Any:
    def keeps(document: Table) -> bool:
        is_hit = getattr(document, spec.field) == spec.value
        if is_hit and spec.does == "raise":
            raise ValueError("this document is not liked")
        if is_hit and spec.does == "refuse":
            raise AppError({"refused": document.id})
        return is_hit if spec.does == "keep" else not is_hit

    return keeps


async def run_scan(scan: Any, end: str, n: int) -> Any:
    match end:
        case "take":
            return [plain(document) for document in await scan.take(n)]
        case "first":
            document = await scan.first()
            return document and plain(document)
        case "unique":
            document = await scan.unique()
            return document and plain(document)
        case "collect":
            return [plain(document) for document in await scan.collect()]
        case "count":
            return await scan.count()
    documents = []
    async for document in scan:
        documents.append(plain(document))
        if len(documents) == n:
            break
    return documents


async def follow(ctx: Reads, steps: list[Plan]) -> list[Any]:
    """What the steps give; of those of a `When`, too."""
    results: list[Any] = []
    for step in steps:
        if isinstance(step, When):
            if await ctx.db.get(step.id) is not None:
                results += await follow(ctx, step.steps)
        else:
            results.append(await do(ctx, step))
    return results


async def do(ctx: Reads, step: Plan) -> Any:
    match step:
        case ScanAsk(spec, end, n):
            result = await run_scan(build(ctx, spec), end, n)
            return {"unrestricted": result} if spec.is_unrestricted else result
        case Get(ids, with_deleted):
            database = ctx.db.with_deleted() if with_deleted else ctx.db
            documents = [await database.get(id) for id in ids]
            return [document and plain(document) for document in documents]
        case Who(part):
            identity = ctx.auth.identity()
            if identity is None or part == "nothing":
                return identity is not None
            return identity.subject if part == "subject" else identity.claims.get("role")
        case Role():
            return await ctx.run_query(role)
        case Call(steps, does_catch):
            try:
                return await ctx.run_query(inner, steps=pack(steps))
            except AppError as error:
                if not does_catch:
                    raise
                return {"caught": error.data}
            except Exception:
                if not does_catch:
                    raise
                return "caught"
        case Each(spec, steps):
            return [await ctx.run_query(inner, steps=pack(steps)) async for _ in build(ctx, spec)]
        case Refuse():
            raise AppError("refused")
        case TotalOf(table, aggregate, key, numbers):
            total = await ctx.db.total(getattr(TABLES[table], aggregate), **key)
            return [total.count if field is None else total.sum(field) for field in numbers]
        case Rank(spec, id):
            return await build(ctx, spec).rank(id)
        case RankedPage(spec, number, size, with_total):
            page = await build(ctx, spec).page(number, size, with_total=with_total)
            result = {"page": [plain(document) for document in page.page], "total": page.total}
            return {"unrestricted": result} if spec.is_unrestricted else result
        case Period(ms):
            if isinstance(ctx, QueryCtx):
                ctx.rerun_at((ctx.now // ms + 1) * ms)
            return ctx.now // ms
    raise AssertionError(step)


@query
async def plan(ctx: QueryCtx, key: str, steps: bytes) -> Any:
    with recorded(key):
        return await follow(ctx, unpack_steps(steps))


@query
async def slow_plan(ctx: QueryCtx, key: str, steps: bytes) -> Any:
    with recorded(key):
        await hold_the_loop(ctx)
        return await follow(ctx, unpack_steps(steps))


@query(internal=True)
async def inner(ctx: QueryCtx, steps: bytes) -> Any:
    return await follow(ctx, unpack_steps(steps))


@query
async def page(ctx: QueryCtx, key: str, scan: bytes, pagination_opts: PaginationOptions) -> Page[Any]:
    with recorded(f"{key} {pagination_opts.num_items} {pagination_opts.cursor} {pagination_opts.end_cursor}"):
        page = await build(ctx, unpack_scan(scan)).paginate(pagination_opts)
        return msgspec.structs.replace(page, page=[plain(document) for document in page.page])


async def write_one(ctx: MutationCtx, write: Write) -> Any:
    """The document as it is after its write."""
    id = write.id
    database = ctx.db.unrestricted if write.is_unrestricted else ctx.db
    if write.with_deleted:
        database = database.with_deleted()
    match write.does:
        case "insert":
            id = await insert(ctx, write.table, write.fields, is_unrestricted=write.is_unrestricted)
        case "patch":
            await database.patch(id, **write.fields)
        case "replace":
            await database.replace(id, TABLES[write.table](**write.fields))
        case "delete":
            await database.delete(id)
        case "restore":
            await database.restore(id)
        case "purge":
            await database.purge(id)
        case "delete_newest":
            newest = await database.query(TABLES[write.table]).order("desc").first()
            if newest is not None:
                await database.delete(newest.id)
    document = await ctx.db.unrestricted.with_deleted().get(id) if id else None
    return document and plain(document)


async def write_all(ctx: MutationCtx, writes: list[Write]) -> list[Any]:
    results = []
    for write in writes:
        begin_write()
        try:
            results.append(await write_one(ctx, write))
        except EngineError as error:
            if not write.does_catch:
                raise
            results.append(error.code)
    return results


@mutation
async def write(ctx: MutationCtx, key: str, writes: bytes, reads: bytes, does_fail: bool) -> list[Any]:
    with mutation_under_way(ctx, key):
        results = [*await write_all(ctx, unpack_writes(writes)), *await follow(ctx, unpack_steps(reads))]
        if does_fail:
            raise AppError("failed on purpose")
        return results


@mutation(internal=True)
async def inner_write(ctx: MutationCtx, writes: bytes, does_fail: bool) -> list[Any]:
    results = await write_all(ctx, unpack_writes(writes))
    if does_fail:
        raise AppError("failed on purpose")
    return results


@mutation
async def write_nested(
    ctx: MutationCtx, key: str, before: bytes, inside: bytes, after: bytes, does_fail: bool
) -> list[Any]:
    """The writes of a nested mutation between others; when it fails, only its own are undone."""
    with mutation_under_way(ctx, key):
        results = await write_all(ctx, unpack_writes(before))
        try:
            results += await ctx.run_mutation(inner_write, writes=inside, does_fail=does_fail)
        except EngineError as error:
            results.append(error.code)
        return results + await write_all(ctx, unpack_writes(after))
