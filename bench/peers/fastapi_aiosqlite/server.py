"""Chat and watch progress on FastAPI and aiosqlite, JSON over a WebSocket, served by uvicorn on uvloop.

`python server.py DATABASE PORT`. As FastAPI's own guide does it: a manager holds the sockets and sends to each in turn.
After a write the server asks SQLite again what those who watch are shown, and sends it: the 50 newest messages to
everybody, a user's progress to that user's sockets.

Promised: a write is acknowledged when it is on the disk (WAL, synchronous=FULL, a commit for each write); everybody
gets every state, in order. Not promised: signing in, rules about who may see what, exactly once (who resends after a
lost connection writes twice), that the author of the next write remembers whom it concerns, bounds for a socket that
does not read.
"""

import asyncio
import json
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiosqlite
import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

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
DATABASE = sys.argv[1]


class Store:
    """The tables."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str) -> AsyncIterator["Store"]:
        async with aiosqlite.connect(path, isolation_level=None) as connection:
            connection.row_factory = aiosqlite.Row
            await connection.execute("PRAGMA journal_mode = WAL")
            await connection.execute("PRAGMA synchronous = FULL")
            await connection.executescript(TABLES)
            yield cls(connection)

    async def add_message(self, user: str, name: str, game: str, text: str) -> None:
        row = (str(uuid.uuid4()), game, user, text, name, None, "active", time.time() * 1000)
        await self._connection.execute("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    async def set_progress(self, user: str, content: str, position: float, duration: float) -> None:
        percentage = 100 * position / duration
        row = (str(uuid.uuid4()), user, content, position, duration, percentage, time.time() * 1000)
        await self._connection.execute(UPSERT, (*row, "desktop", percentage >= 90))

    async def messages(self, game: str) -> list[dict[str, Any]]:
        return [dict(row) for row in await self._connection.execute_fetchall(NEWEST, (game,))]

    async def progress(self, user: str) -> list[dict[str, Any]]:
        rows = await self._connection.execute_fetchall("SELECT * FROM progress WHERE user_id = ?", (user,))
        return [dict(row) for row in rows]


class ConnectionManager:
    """Who watches what."""

    def __init__(self) -> None:
        self._sockets: dict[str, set[WebSocket]] = defaultdict(set)  # by topic
        self.order = asyncio.Lock()  # of what is sent to many: the newest state last

    def subscribe(self, topic: str, socket: WebSocket) -> None:
        self._sockets[topic].add(socket)

    def disconnect(self, socket: WebSocket) -> None:
        for sockets in self._sockets.values():
            sockets.discard(socket)

    async def broadcast(self, topic: str, message: dict[str, Any]) -> None:
        text = encode(message)
        for socket in list(self._sockets[topic]):
            try:
                await socket.send_text(text)
            except (RuntimeError, WebSocketDisconnect):
                self.disconnect(socket)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with Store.open(DATABASE) as store:
        app.state.store, app.state.manager = store, ConnectionManager()
        yield


def encode(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


app = FastAPI(lifespan=lifespan)


@app.websocket("/{path:path}")
async def serve(socket: WebSocket) -> None:
    store: Store = socket.app.state.store
    manager: ConnectionManager = socket.app.state.manager
    await socket.accept()
    user = name = ""
    try:
        while True:
            message = await socket.receive_json()
            match message["type"]:
                case "hello":
                    user, name = message["user"], message["name"]
                case "watch_chat":
                    manager.subscribe(f"chat {message['game']}", socket)
                    await socket.send_json({"type": "messages", "messages": await store.messages(message["game"])})
                case "watch_progress":
                    manager.subscribe(f"progress {user}", socket)
                    await socket.send_json({"type": "progress", "progress": await store.progress(user)})
                case "send_message":
                    game = message["game"]
                    await store.add_message(user, name, game, message["text"])
                    await socket.send_json({"type": "ok", "id": message["id"]})
                    async with manager.order:
                        newest = {"type": "messages", "messages": await store.messages(game)}
                        await manager.broadcast(f"chat {game}", newest)
                case "set_progress":
                    position, duration = message["position_seconds"], message["duration_seconds"]
                    await store.set_progress(user, message["content"], position, duration)
                    await socket.send_json({"type": "ok", "id": message["id"]})
                    own = {"type": "progress", "progress": await store.progress(user)}
                    await manager.broadcast(f"progress {user}", own)
    except WebSocketDisconnect:
        pass
    finally:
        manager.disconnect(socket)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
