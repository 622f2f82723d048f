"""The tables of the demo app: a sports streaming service with watch progress, live viewer counts and chat.

Times are milliseconds since the epoch. What belongs to a user, a game or a content is deleted with it (`foreign_key`).
Who may see and change which row is in `functions/_policies.py`.
"""

from typing import Literal

from engine import Id, Table, aggregate, foreign_key, index, unique

DeviceType = Literal["desktop", "mobile", "tablet"]
Quality = Literal["auto", "360p", "480p", "720p", "1080p", "1440p", "2160p"]
MessageStatus = Literal["active", "hidden", "deleted"]
Permission = Literal["write:chat"]  # hide, delete and restore chat messages


class User(Table, name="users"):
    """Somebody who has signed in at least once; made and refreshed by `users:store`."""

    token_identifier: str  # `issuer|subject`: who the credential says this is
    name: str
    avatar: str | None = None  # address of a picture
    role: Literal["user", "admin"] = "user"  # an admin has every permission
    permissions: list[Permission] = []
    by_token_identifier = unique("token_identifier")


class Game(Table, name="games"):
    """A match that is or will be streamed live."""

    title: str
    league: str
    starts_at: float
    status: Literal["scheduled", "live", "ended"] = "scheduled"
    by_starts_at = index("starts_at")


class Content(Table, name="content"):
    """Something to watch at any time."""

    title: str
    kind: Literal["replay", "highlights", "interview", "documentary"]
    duration_seconds: float
    by_title = index("title")


class WatchProgress(Table, name="user_watch_progress"):
    """How far one user got in one content: one row for each pair, written by whichever device wrote last."""

    user_id: Id[User]
    content_id: Id[Content]
    position_seconds: float  # 0 <= position_seconds <= duration_seconds
    duration_seconds: float  # > 0
    completion_percentage: float  # 0 to 100
    last_watched_at: float
    device_type: DeviceType | None = None  # of that write
    completed: bool  # completion_percentage >= 90
    by_user = index("user_id")
    by_user_content = unique("user_id", "content_id")
    by_last_watched = index("user_id", "last_watched_at")
    # "Continue watching" reads only unfinished rows, however many a user has finished.
    by_user_completed = index("user_id", "completed", "last_watched_at")
    by_content = index("content_id")
    user = foreign_key("user_id", on_delete="cascade")
    content = foreign_key("content_id", on_delete="cascade")


class StreamSession(Table, name="live_stream_sessions"):
    """One player on one game. `session_id` is the client's own secret: who knows it speaks for the session."""

    game_id: Id[Game]
    user_id: Id[User] | None = None  # None: an anonymous viewer
    session_id: str
    joined_at: float  # start of the present stay in this game
    last_heartbeat: float
    active: bool
    device_type: DeviceType
    quality: Quality | None = None
    by_game = index("game_id")
    by_user = index("user_id")
    # A viewer count is one look-up in this, however many watch; heartbeats do not touch it.
    viewers = aggregate("game_id", "active")
    by_session = unique("session_id")
    # Stale sessions are `active=True` up to some heartbeat: those that are inactive already are never looked at.
    by_active_heartbeat = index("active", "last_heartbeat")
    game = foreign_key("game_id", on_delete="cascade")
    user = foreign_key("user_id", on_delete="set_null")


class ChatMessage(Table, name="live_chat_messages"):
    """One line of a game's chat, with the author's name and picture as they were when it was sent."""

    game_id: Id[Game]
    user_id: Id[User]
    message: str
    user_name: str
    user_avatar: str | None = None
    status: MessageStatus = "active"
    created_at: float
    by_game = index("game_id", "created_at")
    by_user = index("user_id")
    game = foreign_key("game_id", on_delete="cascade")
    user = foreign_key("user_id", on_delete="cascade")
