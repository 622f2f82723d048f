"""The raw limit of delivery: aiohttp sends the same bytes to every socket, and does nothing else.

`python -m bench.load.broadcast PAYLOAD PORT`. Every text frame that comes in holds a number: it is put in the place of
the payload's mark (`~0000000~`, the last of them) and the payload goes out to all sockets.
"""

import sys
from pathlib import Path

import uvloop
from aiohttp import WSMsgType, web

MARK_DIGITS = 7


def main() -> None:
    payload = Path(sys.argv[1]).read_bytes()
    end = payload.rindex(b"~")
    head, tail = payload[: end - MARK_DIGITS], payload[end:]
    sockets: list[web.WebSocketResponse] = []

    async def sync(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        sockets.append(socket)
        async for message in socket:
            frame = head + b"%0*d" % (MARK_DIGITS, int(message.data)) + tail
            for other in sockets:
                await other.send_frame(frame, WSMsgType.TEXT)
        return socket

    app = web.Application()
    app.router.add_get("/api/{version}/sync", sync)
    loop, port = uvloop.new_event_loop(), int(sys.argv[2])
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, shutdown_timeout=0.1, loop=loop)


if __name__ == "__main__":
    main()
