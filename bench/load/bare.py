"""The raw limit of an HTTP query: a bare aiohttp handler that returns the same bytes.

`python -m bench.load.bare PAYLOAD PORT`.
"""

import sys
from pathlib import Path

import uvloop
from aiohttp import web


def main() -> None:
    payload = Path(sys.argv[1]).read_bytes()

    async def query(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=payload, content_type="application/json")

    app = web.Application()
    app.router.add_post("/api/query", query)
    loop, port = uvloop.new_event_loop(), int(sys.argv[2])
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, shutdown_timeout=0.1, loop=loop)


if __name__ == "__main__":
    main()
