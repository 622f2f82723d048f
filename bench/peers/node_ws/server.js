// Chat and watch progress on Node: better-sqlite3 and ws, JSON over a WebSocket. `node server.js DATABASE PORT`.
//
// Who comes gets the 50 newest messages; after that only each new message is sent, and the browser keeps the list.
//
// Promised: a write is acknowledged when it is on the disk (WAL, synchronous=FULL, a commit for each write); everybody
// gets every message, in order. Not promised: that a browser's list is the server's (a message that is hidden or edited
// needs code of its own, in both), signing in, rules about who may see what, exactly once, bounds for a socket that
// does not read.

import { randomUUID } from "node:crypto";
import { createServer } from "node:http";
import Database from "better-sqlite3";
import { WebSocket, WebSocketServer } from "ws";

const [database, port] = process.argv.slice(2);
const db = new Database(database);
db.pragma("journal_mode = WAL");
db.pragma("synchronous = FULL");
db.exec(`
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
`);
const newest = db.prepare(`
SELECT * FROM (SELECT * FROM messages WHERE game_id = ? AND status = 'active' ORDER BY created_at DESC LIMIT 50)
ORDER BY created_at`);
const insert = db.prepare(`INSERT INTO messages VALUES
    (@id, @game_id, @user_id, @message, @user_name, @user_avatar, @status, @created_at)`);
const upsert = db.prepare(`
INSERT INTO progress VALUES (@id, @user_id, @content_id, @position_seconds, @duration_seconds, @completion_percentage,
    @last_watched_at, @device_type, @completed)
ON CONFLICT (user_id, content_id) DO UPDATE SET
    position_seconds = excluded.position_seconds, duration_seconds = excluded.duration_seconds,
    completion_percentage = excluded.completion_percentage, last_watched_at = excluded.last_watched_at,
    device_type = excluded.device_type, completed = excluded.completed`);
const own = db.prepare("SELECT * FROM progress WHERE user_id = ?");

const chatters = new Map(); // game → sockets
const watchers = new Map(); // user → sockets

function subscribe(topics, topic, socket) {
  if (!topics.has(topic)) topics.set(topic, new Set());
  topics.get(topic).add(socket);
  socket.on("close", () => topics.get(topic).delete(socket));
}

function tell(sockets, message) {
  const text = JSON.stringify(message);
  for (const socket of sockets ?? []) if (socket.readyState === WebSocket.OPEN) socket.send(text);
}

const server = createServer();
new WebSocketServer({ server, perMessageDeflate: false }).on("connection", (socket) => {
  let user = "";
  let name = "";
  const reply = (message) => socket.send(JSON.stringify(message));
  socket.on("error", () => socket.terminate());
  socket.on("message", (data) => {
    const message = JSON.parse(data);
    switch (message.type) {
      case "hello":
        ({ user, name } = message);
        break;
      case "watch_chat":
        subscribe(chatters, message.game, socket);
        reply({ type: "messages", messages: newest.all(message.game) });
        break;
      case "watch_progress":
        subscribe(watchers, user, socket);
        reply({ type: "progress", progress: own.all(user) });
        break;
      case "send_message": {
        const row = {
          id: randomUUID(),
          game_id: message.game,
          user_id: user,
          message: message.text,
          user_name: name,
          user_avatar: null,
          status: "active",
          created_at: Date.now(),
        };
        insert.run(row);
        reply({ type: "ok", id: message.id });
        tell(chatters.get(message.game), { type: "message", message: row });
        break;
      }
      case "set_progress": {
        const { position_seconds, duration_seconds } = message;
        const completion_percentage = (100 * position_seconds) / duration_seconds;
        upsert.run({
          id: randomUUID(),
          user_id: user,
          content_id: message.content,
          position_seconds,
          duration_seconds,
          completion_percentage,
          last_watched_at: Date.now(),
          device_type: "desktop",
          completed: completion_percentage >= 90 ? 1 : 0,
        });
        reply({ type: "ok", id: message.id });
        tell(watchers.get(user), { type: "progress", progress: own.all(user) });
        break;
      }
    }
  });
});
server.listen(Number(port), "127.0.0.1");
process.on("SIGTERM", () => process.exit(0));
