"""Functions that do whatever the model test asks, on whatever tables the schema beside them has.

Each query keeps in `ran` that it ran to its end: from that the test knows which of the equal-looking ones it was.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

import schema
from engine import AppError, MutationCtx, Page, PaginationOptions, QueryCtx, Table, mutation, query
from engine.functions.reader import Scan
from engine.ids import make_id, table_tag

TABLES: dict[str, type[Table]] = {
    name: value
    for name, value in vars(schema).items()
    if isinstance(value, type) and issubclass(value, Table) and value is not Table
}
SLOW_SECONDS = 0.0015  # longer than `run_slow_ms` of the engine under test

ran: list[str] = []  # keys of the queries that ran, in order; nested ones have none


class Filter(msgspec.Struct):
    field: str
    does: Literal["keep", "drop", "raise", "refuse"]  # the documents with this value
    value: Any


class ScanSpec(msgspec.Struct):
    table: str
    index: str | None = None  # None: the table itself
    equal: dict[str, Any] = {}
    bounds: dict[str, Any] = {}
    is_descending: bool = False
    filter: Filter | None = None


class ScanAsk(msgspec.Struct):
    scan: ScanSpec
    end: Literal["take", "first", "unique", "collect", "count", "loop"]
    n: int = 0  # of take and loop


class Write(msgspec.Struct):
    does: Literal["insert", "patch", "replace", "delete", "delete_newest"]
    table: str
    id: str = ""
    fields: dict[str, Any] = {}


@contextmanager
def recorded(key: str) -> Iterator[None]:
    """Keep that a query ran; one that is abandoned, to start again in a round, has not."""
    try:
        yield
    except Exception:
        ran.append(key)
        raise
    ran.append(key)


def plain(document: Table) -> dict[str, Any]:
    return msgspec.structs.asdict(document)


def build(ctx: QueryCtx | MutationCtx, spec: ScanSpec) -> Scan[Any]:
    document_type = TABLES[spec.table]
    source = document_type if spec.index is None else getattr(document_type, spec.index)
    scan = ctx.db.query(source, **spec.bounds, **spec.equal)
    if spec.is_descending:
        scan = scan.order("desc")
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


async def run_scan(ctx: QueryCtx | MutationCtx, ask: ScanAsk) -> Any:
    scan = build(ctx, ask.scan)
    match ask.end:
        case "take":
            return [plain(document) for document in await scan.take(ask.n)]
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
        case "loop":
            documents = []
            async for document in scan:
                documents.append(plain(document))
                if len(documents) == ask.n:
                    break
            return documents


async def hold_the_loop(ctx: QueryCtx) -> None:
    """Run long: pause, in a round, twice."""
    nobody = make_id(table_tag(next(iter(TABLES.values())).__table_name__), 1, bytes(9))
    for _ in range(2):
        end = time.perf_counter() + SLOW_SECONDS
        while time.perf_counter() < end:
            pass
        await ctx.db.get(nobody)


@query
async def scan(ctx: QueryCtx, key: str, ask: ScanAsk) -> Any:
    with recorded(key):
        return await run_scan(ctx, ask)


@query
async def slow_scan(ctx: QueryCtx, key: str, ask: ScanAsk) -> Any:
    with recorded(key):
        await hold_the_loop(ctx)
        return await run_scan(ctx, ask)


@query(internal=True)
async def inner_scan(ctx: QueryCtx, ask: bytes) -> Any:
    return await run_scan(ctx, msgspec.msgpack.decode(ask, type=ScanAsk))


@query
async def get(ctx: QueryCtx, key: str, ids: list[str]) -> list[Any]:
    with recorded(key):
        documents = [await ctx.db.get(id) for id in ids]
        return [document and plain(document) for document in documents]


@query
async def page(ctx: QueryCtx, key: str, scan: ScanSpec, pagination_opts: PaginationOptions) -> Page[Any]:
    with recorded(f"{key} {pagination_opts.num_items} {pagination_opts.cursor} {pagination_opts.end_cursor}"):
        page = await build(ctx, scan).paginate(pagination_opts)
        return msgspec.structs.replace(page, page=[plain(document) for document in page.page])


@query
async def nested(ctx: QueryCtx, key: str, asks: list[ScanAsk], does_catch: bool) -> list[Any]:
    with recorded(key):
        results = []
        for ask in asks:
            try:
                results.append(await ctx.run_query(inner_scan, ask=msgspec.msgpack.encode(ask)))
            except Exception:
                if not does_catch:
                    raise
                results.append("caught")
        return results


@query
async def who(ctx: QueryCtx, key: str, parts: list[str], when: str, more: list[str]) -> Any:
    """Parts of the caller's identity; more of them while the document `when` is there."""
    with recorded(key):
        identity = ctx.auth.identity()
        if identity is None:
            return None
        wanted = [*parts, *(more if await ctx.db.get(when) is not None else [])]
        shown = {"subject": lambda: identity.subject, "role": lambda: identity.claims.get("role")}
        return {part: shown[part]() for part in wanted}


async def write_all(ctx: MutationCtx, writes: list[Write]) -> list[Any]:
    """Each document as it is after its write."""
    results = []
    for write in writes:
        id = write.id
        match write.does:
            case "insert":
                id = await ctx.db.insert(TABLES[write.table](**write.fields))
            case "patch":
                await ctx.db.patch(id, **write.fields)
            case "replace":
                await ctx.db.replace(id, TABLES[write.table](**write.fields))
            case "delete":
                await ctx.db.delete(id)
            case "delete_newest":
                newest = await ctx.db.query(TABLES[write.table]).order("desc").first()
                if newest is not None:
                    await ctx.db.delete(newest.id)
        document = await ctx.db.get(id) if id else None
        results.append(document and plain(document))
    return results


@mutation
async def write(ctx: MutationCtx, writes: list[Write], reads: list[ScanAsk], does_fail: bool) -> list[Any]:
    results = await write_all(ctx, writes)
    for ask in reads:
        results.append(await run_scan(ctx, ask))
    if does_fail:
        raise AppError("failed on purpose")
    return results


@mutation(internal=True)
async def inner_write(ctx: MutationCtx, writes: bytes, does_fail: bool) -> list[Any]:
    return await write(ctx, msgspec.msgpack.decode(writes, type=list[Write]), [], does_fail)


@mutation
async def write_nested(
    ctx: MutationCtx, before: list[Write], inside: list[Write], after: list[Write], does_fail: bool
) -> list[Any]:
    """The writes of a nested mutation between others; when it fails, only its own are undone."""
    results = await write_all(ctx, before)
    try:
        # as bytes: an argument of any type takes a plain int for the double that it is to JavaScript
        results += await ctx.run_mutation(inner_write, writes=msgspec.msgpack.encode(inside), does_fail=does_fail)
    except AppError:
        results.append("undone")
    return results + await write_all(ctx, after)
