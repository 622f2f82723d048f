"""Rooms with messages, who is in them, and what is painted on a wall that everybody could watch."""

from engine import Table, aggregate, index, unique


class User(Table, name="users"):
    subject: str
    post_count: int = 0
    by_subject = unique("subject")


class Message(Table, name="messages"):
    room: int
    text: str
    by_room = index("room")
    count_by_room = aggregate("room")


class Presence(Table, name="presences"):
    room: int
    subject: str
    seen_at: float
    by_room_seen = index("room", "seen_at")
    by_subject = unique("subject")


class Wall(Table, name="walls"):
    text: str
