"""Chat and watch progress by hand: aiohttp, the standard sqlite3, JSON over a WebSocket, on uvloop.

`python server.py DATABASE PORT`. After a write the server asks SQLite again what those who watch are shown, and sends
it to each of them: the 50 newest messages to everybody, a user's progress to that user's sockets.

Promised: a write is acknowledged when it is on the disk (WAL, synchronous=FULL, a commit for each write); everybody
gets every state, in order. Not promised: signing in, rules about who may see what, exactly once (who resends after a
lost connection writes twice), that the author of the next write remembers whom it concerns, bounds for a socket that
does not read.
"""

import asyncio
import json
import sqlite3
import sys
import time
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvloop
from aiohttp import WSMsgType, web

TABLES = """
CREATE TABLE IF NOT EXISTS messages (
    id TEXT PRIMARY KEY, game_id TEXT NOT NULL, user_id TEXT NOT NULL, message TEXT NOT NULL, user_name TEXT NOT NULL,
    user_avatar TEXT, status TEXT NOT NULL, created_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS messages_by_game ON messages (game_id, created_at);
CREATE TABLE IF NOT EXISTS progress (
    id TEXT PRIMARY KEY, user_id TEXT NOT NULL, content_id TEXT NOT NULL, position_seconds REAL NOT NULL,
    duration_seconds REAL NOT NULL, completion_percentage REAL NOT NULL, last_watched_at REAL NOT NULL,
    device_type TEXT, completed INTEGER NOT NULL, UNIQUE (user_id, content_id)
);
"""
NEWEST = """
SELECT * FROM (SELECT * FROM messages WHERE game_id = ? AND status = 'active' ORDER BY created_at DESC LIMIT 50)
ORDER BY created_at
"""
UPSERT = """
INSERT INTO progress VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (user_id, content_id) DO UPDATE SET
    position_seconds = excluded.position_seconds, duration_seconds = excluded.duration_seconds,
    completion_percentage = excluded.completion_percentage, last_watched_at = excluded.last_watched_at,
    device_type = excluded.device_type, completed = excluded.completed
"""


def connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


class Server:
    """One game's chat and everybody's progress."""

    def __init__(self, database: str) -> None:
        self.writer, self.reader = connect(database), connect(database)
        self.writer.executescript(TABLES)
        self.commits = ThreadPoolExecutor(1)  # a commit waits for the disk: not on the loop
        self.chatters: dict[str, set[web.WebSocketResponse]] = defaultdict(set)  # by game
        self.watchers: dict[str, set[web.WebSocketResponse]] = defaultdict(set)  # by user
        self.order = asyncio.Lock()  # of what is sent to a chat: the newest state last

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False, heartbeat=30)
        await socket.prepare(request)
        user = name = ""
        try:
            async for frame in socket:
                if frame.type is not WSMsgType.TEXT:
                    continue
                message = json.loads(frame.data)
                match message["type"]:
                    case "hello":
                        user, name = message["user"], message["name"]
                    case "watch_chat":
                        self.chatters[message["game"]].add(socket)
                        await socket.send_str(self.messages(message["game"]))
                    case "watch_progress":
                        self.watchers[user].add(socket)
                        await socket.send_str(self.progress(user))
                    case "send_message":
                        await self.write(self.insert_message, user, {**message, "name": name})
                        await socket.send_str(acknowledged(message))
                        await self.tell_chat(message["game"])
                    case "set_progress":
                        await self.write(self.upsert_progress, user, message)
                        await socket.send_str(acknowledged(message))
                        await self.tell(self.watchers[user], self.progress(user))
        finally:
            for sockets in (*self.chatters.values(), self.watchers[user]):
                sockets.discard(socket)
        return socket

    async def tell_chat(self, game: str) -> None:
        async with self.order:
            await self.tell(self.chatters[game], self.messages(game))

    async def tell(self, sockets: set[web.WebSocketResponse], text: str) -> None:
        for socket in list(sockets):
            try:
                await socket.send_str(text)
            except ConnectionError:
                sockets.discard(socket)

    # -- the database

    async def write(self, work: Any, user: str, message: dict[str, Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(self.commits, work, user, message)

    def insert_message(self, user: str, message: dict[str, Any]) -> None:
        author = (user, message["text"], message["name"], None)
        row = (str(uuid.uuid4()), message["game"], *author, "active", time.time() * 1000)
        self.writer.execute("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def upsert_progress(self, user: str, message: dict[str, Any]) -> None:
        position, duration = message["position_seconds"], message["duration_seconds"]
        percentage = 100 * position / duration
        row = (str(uuid.uuid4()), user, message["content"], position, duration, percentage, time.time() * 1000)
        self.writer.execute(UPSERT, (*row, "desktop", percentage >= 90))

    def messages(self, game: str) -> str:
        return encode({"type": "messages", "messages": [dict(row) for row in self.reader.execute(NEWEST, (game,))]})

    def progress(self, user: str) -> str:
        rows = self.reader.execute("SELECT * FROM progress WHERE user_id = ?", (user,))
        return encode({"type": "progress", "progress": [dict(row) for row in rows]})


def acknowledged(message: dict[str, Any]) -> str:
    return encode({"type": "ok", "id": message["id"]})


def encode(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    database, port = sys.argv[1], int(sys.argv[2])

    async def make_app() -> web.Application:
        app = web.Application()
        app.router.add_get("/{path:.*}", Server(database).handle)
        return app

    web.run_app(make_app(), host="127.0.0.1", port=port, print=None, access_log=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()
