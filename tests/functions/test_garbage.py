"""What a run makes is freed by reference counts as soon as it is over.

What is left in reference cycles waits for the garbage collector, which looks at everything that is there and stops
everybody meanwhile: the 60 objects of one mutation took a tenth of its time, and 100 ms now and then.
"""

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functions.apps import SECONDS_MAX, OpenApp, open_app
from tests.small_engine import Subscriber, person

SCHEMA = """
    from engine import Id, Table, aggregate, foreign_key, index, search_index, unique

    class Owner(Table, name="owners"):
        name: str
        by_name = unique("name")

    class Item(Table, name="items"):
        owner_id: Id[Owner]
        rank: int
        text: str = "some words"
        by_rank = index("rank")
        by_owner = index("owner_id")
        per_owner = aggregate("owner_id")
        words = search_index("text")
        owner = foreign_key("owner_id", on_delete="cascade")
"""

FUNCTIONS = """
from datetime import timedelta
LIMIT = token_bucket("m:limited", count=1_000_000, per=timedelta(seconds=1))

@query(internal=True)
async def viewer(ctx) -> str:
    owner = await ctx.db.unrestricted.query(Owner).first()
    return ctx.auth.identity().subject + owner.name

@policy(Item, viewer=viewer)
class ItemPolicy(Policy[str]):
    def read(self, item): return item.rank >= 0 and bool(self.viewer)
    async def insert(self, item): return await self.db.get(item.owner_id) is not None
    def update(self, old, new): return self.viewer == "aliceann"

@trigger(Item)
async def told(ctx, change) -> None:
    await ctx.db.query(Owner).first()

@query
async def newest(ctx) -> list[Item]: return await ctx.db.query(Item.by_rank).order("desc").take(3)
@query
async def filtered(ctx) -> list[Item]:
    return await ctx.db.query(Item.by_rank, gt=0).filter(lambda item: item.rank > 1).collect()
@query
async def looped(ctx) -> int: return sum([item.rank async for item in ctx.db.query(Item)])
@query
async def page(ctx, pagination_opts: PaginationOptions) -> Page[Item]:
    return await ctx.db.query(Item.by_rank).paginate(pagination_opts)
@query
async def found(ctx) -> list[Item]: return await ctx.db.search(Item.words, "words").take(3)
@query
async def counted(ctx) -> int:
    owner = await ctx.db.query(Owner).first()
    return (await ctx.db.unrestricted.total(Item.per_owner, owner_id=owner.id)).count
@query
async def nested(ctx) -> int: return len(await ctx.run_query(newest))
@query
async def refused(ctx) -> None: raise AppError("no")
@query
async def broken(ctx) -> None: raise ValueError("no")

async def _add(ctx) -> None:
    owner = await ctx.db.query(Owner.by_name, name="ann").unique()
    await ctx.db.insert(Item(owner_id=owner.id, rank=1))
@mutation
async def begin(ctx) -> None: await ctx.db.insert(Owner(name="ann"))
@mutation
async def add(ctx) -> None: await _add(ctx)
@mutation
async def change(ctx) -> None:
    item = await ctx.db.query(Item.by_rank).first()
    await ctx.db.patch(item.id, rank=item.rank + 1)
@mutation
async def limited(ctx) -> None: await ctx.limit(LIMIT, key="a")
@mutation
async def calls(ctx) -> None: await ctx.run_mutation(add)
@mutation
async def catches(ctx) -> None:
    try: await ctx.run_mutation(fails)
    except AppError: pass
@mutation
async def fails(ctx) -> None:
    await _add(ctx)
    raise AppError("no")
@mutation
async def breaks(ctx) -> None:
    await _add(ctx)
    raise ValueError("no")
@mutation
async def misuses(ctx) -> None: await ctx.db.patch("nothing", rank=1)
@mutation
async def later(ctx) -> None: await ctx.scheduler.run_after(0, add)
@action
async def acts(ctx) -> int: return await ctx.run_query(nested)
"""

ALICE = person("alice")


@contextlib.contextmanager
def nothing_left(*, by: str) -> Iterator[None]:
    """What is done here leaves nothing to the garbage collector."""
    gc.collect()
    classes = [each for each in gc.get_objects() if isinstance(each, type)]  # those of other tests go meanwhile
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        left = [type(each).__qualname__ for each in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    del classes
    assert not left, f"{by} leaves {len(left)} objects in cycles: {sorted(left)}"


async def call(app: OpenApp, path: str) -> None:
    """As a client does, who is told how it went."""
    function = app.engine.registry.any(path, ("query", "mutation", "action"))
    arguments = b'{"paginationOpts": {"numItems": 2, "cursor": null}}' if path == "m:page" else b"{}"
    await getattr(app.engine.backend, f"http_{function.kind}")(path, arguments, ALICE)
    await app.engine.wait_until_idle()


@pytest.mark.parametrize(
    "name",
    [
        *("newest", "filtered", "looped", "page", "found", "counted", "nested", "refused", "broken"),
        *("add", "change", "limited", "calls", "catches", "fails", "breaks", "misuses", "later", "acts"),
    ],
)
async def test_a_run_leaves_nothing_to_the_garbage_collector(tmp_path: Path, name: str) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app, asyncio.timeout(SECONDS_MAX):
        subscriber = Subscriber(app.engine, ALICE)
        for path in ("m:begin", "m:add", "m:add", f"m:{name}", f"m:{name}"):
            await call(app, path)
        for query_id, path in enumerate(("newest", "nested", "counted")):
            subscriber.ask(query_id, f"m:{path}")
        await subscriber.catch_up()
        with nothing_left(by=name):
            for _ in range(10):
                await call(app, "m:add" if name in ("newest", "filtered", "looped", "page") else f"m:{name}")
                await call(app, f"m:{name}")
                subscriber.take()
