"""The tables of the bench's own app: what the demo app has no workload for."""

from engine import Table, index


class Account(Table, name="accounts"):
    """Money, for the transfer benchmark."""

    balance: int  # never below 0


class Item(Table, name="items"):
    """Something of a group, at a place in it: enough for points, ranges and pages."""

    group: str
    place: float
    label: str
    by_group = index("group", "place")
