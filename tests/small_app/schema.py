from engine import Table, index, unique


class Room(Table, name="rooms"):
    name: str
    is_private: bool = False
    by_name = unique("name")


class Note(Table, name="notes"):
    room: str
    text: str
    rank: int = 0
    by_room = index("room", "rank")
