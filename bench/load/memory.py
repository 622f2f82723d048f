"""What an idle subscriber costs: growth of the server's resident memory by 10,000 signed-in viewers of one chat.

They are held for a while: all sockets must stay open.

The raw limit is the same number of idle sockets on the bare aiohttp server of `broadcast.py`.
"""

import asyncio
import tempfile
from pathlib import Path

from bench.load.client import Client, Crowd
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure, Goal
from bench.load.processes import Tokens, engine_server, ensure_files, listening
from bench.load.stretches import Options

SUBSCRIBER_COUNT = 10_000
_WARM_COUNT = 100  # clients before the first reading, so that pools and caches are there already
_REST_SECONDS = 1.0  # before a reading


async def run(options: Options) -> list[Figure]:
    subscriber_count = options.size(SUBSCRIBER_COUNT)
    ensure_files(_WARM_COUNT + subscriber_count)
    names = subjects(_WARM_COUNT + subscriber_count)
    tokens = Tokens()
    async with engine_server(tokens) as server:
        crowd = Crowd(server.port)
        game_id = await first_id(server, "games:list")

        async def prepare(client: Client) -> None:
            await client.watch("chat:get_messages", {"game_id": game_id})

        await crowd.join(names[:_WARM_COUNT], tokens.sign, prepare)
        await asyncio.sleep(_REST_SECONDS)
        before = server.usage.resident_bytes
        await crowd.join(names[_WARM_COUNT:], tokens.sign, prepare)
        await crowd.unless_lost(asyncio.sleep(max(_REST_SECONDS, options.seconds)))
        growth, held_count = server.usage.resident_bytes - before, crowd.open_count - _WARM_COUNT
        crowd.close()
    raw_growth = await _idle_sockets(subscriber_count)
    per_kibibyte, goal = 1024 * subscriber_count, Goal(10, "≤", 1.2, of="ratio")
    return [
        Figure("memory", "an idle subscriber", growth / per_kibibyte, "KiB", raw_growth / per_kibibyte, goal),
        Figure("memory", "subscribers held", held_count, "", subscriber_count, Goal(10, "≥", 1, of="ratio")),
        Figure("memory", f"server with {_WARM_COUNT} subscribers", before / 2**20, "MiB"),
    ]


async def _idle_sockets(socket_count: int) -> int:
    """How much the raw server grows, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        frame = Path(name) / "frame"
        frame.write_bytes(b"~0000000~")
        async with listening(["-m", "bench.load.broadcast", str(frame)], Path(name)) as server:
            crowd = Crowd(server.port)

            async def open_idle(count: int) -> int:
                for _ in range(count):
                    await crowd.connect(_ignore)
                await asyncio.sleep(_REST_SECONDS)
                return server.usage.resident_bytes

            before = await open_idle(_WARM_COUNT)
            growth = await open_idle(socket_count) - before
            crowd.close()
    return growth


def _ignore(buffer: bytearray, start: int, end: int) -> None:
    pass
