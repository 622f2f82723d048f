"""What an idle subscriber costs: growth of the server's resident memory by 1,000 signed-in viewers of one chat.

The raw limit is the same number of idle sockets on the bare aiohttp server of `broadcast.py`.
"""

import asyncio
import tempfile
from pathlib import Path

from bench.load.client import Client, Crowd
from bench.load.demo import first_id, subjects
from bench.load.figures import Figure
from bench.load.processes import Tokens, engine_server, listening
from bench.load.stretches import Options

_WARM_COUNT = 100  # clients before the first reading, so that pools and caches are there already
_REST_SECONDS = 1.0  # before a reading


async def run(options: Options) -> list[Figure]:
    names = subjects(_WARM_COUNT + options.viewer_count)
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
        await asyncio.sleep(_REST_SECONDS)
        growth = server.usage.resident_bytes - before
        crowd.close()
    raw_growth = await _idle_sockets(options)
    per_kibibyte = 1024 * options.viewer_count
    return [
        Figure("memory", "an idle subscriber", growth / per_kibibyte, "KiB", raw_growth / per_kibibyte),
        Figure("memory", f"server with {_WARM_COUNT} subscribers", before / 2**20, "MiB"),
    ]


async def _idle_sockets(options: Options) -> int:
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
            growth = await open_idle(options.viewer_count) - before
            crowd.close()
    return growth


def _ignore(buffer: bytearray, start: int, end: int) -> None:
    pass
