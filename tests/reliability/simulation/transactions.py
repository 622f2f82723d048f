"""Transactions of a few small operations: what clients ask, what an app does for them, and what it should have done.

An operation is `[name, *arguments]`; a transaction is a list of them, one mutation, and gives a list of results.

    append k v     to list k                        read k        the whole list, in order
    put k v        over register k                  range l h     [k, v] of the registers with l <= v < h, by an index
    claim n        a name that nobody else has      add k         1 to counter k; its new value
    transfer a b m from account a to b, if it has   sum           of all accounts
    leave t p      p is off call, unless it is the  join t p      p is on call
                   last of team t; how many are left
    seat r         take the next seat of room r     attempt ops   as a nested mutation: its results, or why it failed
    fail           and undo all of it

`claim` and `fail` end the whole transaction, or the `attempt` that they are in. The same `Model` replays transactions
and answers queries.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Operation = list[Any]

KEY_COUNT, COUNTER_COUNT, ACCOUNT_COUNT, ROOM_COUNT = 40, 6, 8, 6
TEAMS, TEAM_SIZE = 2, 3
BALANCE = 100  # of each account at first
LIST_LENGTH_MAX = 64  # then its place is taken by a new list: reading it is not to take longer and longer
VALUE_MAX = 1_000  # of a register
READS = ("read", "range", "sum", "names", "on_call", "seats", "counters")  # also as queries

SCHEMA = """
from engine import Table, index, unique

class Element(Table, name="elements"):
    key: int
    value: int
    by_key = index("key")

class Register(Table, name="registers"):
    key: int
    value: int
    by_key = unique("key")
    by_value = index("value", "key")

class Name(Table, name="names"):
    name: int
    by_name = unique("name")

class Counter(Table, name="counters"):
    key: int
    count: int
    by_key = unique("key")

class Account(Table, name="accounts"):
    number: int
    balance: int
    by_number = unique("number")

class Person(Table, name="people"):
    team: int
    number: int
    is_on_call: bool
    by_team = index("team", "is_on_call", "number")
    by_number = unique("team", "number")

class Seat(Table, name="seats"):
    room: int
    place: int
    by_room = index("room", "place")
"""

FUNCTIONS = f"""
import json
from engine import AppError, MutationCtx, QueryCtx, mutation, query
from engine.errors import AppFault
from schema import *
from tests.model import stopwatch

READS = {READS}
ACCOUNTS = range({ACCOUNT_COUNT})
PEOPLE = [(team, number) for team in range({TEAMS}) for number in range({TEAM_SIZE})]

@mutation
async def begin(ctx: MutationCtx) -> None:
    for number in ACCOUNTS:
        await ctx.db.insert(Account(number=number, balance={BALANCE}))
    for team, number in PEOPLE:
        await ctx.db.insert(Person(team=team, number=number, is_on_call=True))

@mutation
async def run(ctx: MutationCtx, client: int, number: int, operations: str) -> str:
    results = [await do(ctx, *operation) for operation in json.loads(operations)]
    return json.dumps([client, number, results])

@mutation(internal=True)
async def attempt(ctx: MutationCtx, operations: str) -> str:
    return json.dumps([await do(ctx, *operation) for operation in json.loads(operations)])

@query
async def look(ctx: QueryCtx, operation: str) -> str:
    name, *arguments = json.loads(operation)
    if name not in READS:
        raise AppError("not a read")
    return json.dumps(await do(ctx, name, *arguments))

@query
async def look_long(ctx: QueryCtx, operation: str) -> str:
    "The same, and it holds the loop for so long that it has to wait for a round."
    name, *arguments = json.loads(operation)
    stopwatch.hold(0.006)
    return json.dumps(await do(ctx, name, *arguments))

async def do(ctx, name, *arguments):
    return await globals()["do_" + name](ctx, *arguments)

async def do_append(ctx, key, value):
    await ctx.db.insert(Element(key=key, value=value))

async def do_read(ctx, key):
    return [element.value async for element in ctx.db.query(Element.by_key, key=key)]

async def do_put(ctx, key, value):
    register = await ctx.db.query(Register.by_key, key=key).unique()
    if register is None:
        await ctx.db.insert(Register(key=key, value=value))
    else:
        await ctx.db.patch(register.id, value=value)

async def do_range(ctx, low, high):
    return [[each.key, each.value] async for each in ctx.db.query(Register.by_value, gte=low, lt=high)]

async def do_claim(ctx, name):
    await ctx.db.insert(Name(name=name))

async def do_names(ctx):
    return sorted([each.name async for each in ctx.db.query(Name)])

async def do_add(ctx, key):
    counter = await ctx.db.query(Counter.by_key, key=key).unique()
    if counter is None:
        await ctx.db.insert(Counter(key=key, count=1))
        return 1
    await ctx.db.patch(counter.id, count=counter.count + 1)
    return counter.count + 1

async def do_counters(ctx):
    return [[each.key, each.count] async for each in ctx.db.query(Counter.by_key)]

async def do_transfer(ctx, source, target, amount):
    giving = await ctx.db.query(Account.by_number, number=source).unique()
    taking = await ctx.db.query(Account.by_number, number=target).unique()
    if giving.balance < amount or source == target:
        return False
    await ctx.db.patch(giving.id, balance=giving.balance - amount)
    await ctx.db.patch(taking.id, balance=taking.balance + amount)
    return True

async def do_sum(ctx):
    return sum([account.balance async for account in ctx.db.query(Account)])

async def do_leave(ctx, team, number):
    on_call = await ctx.db.query(Person.by_team, team=team, is_on_call=True).collect()
    leaving = [person for person in on_call if person.number == number]
    if len(on_call) > 1 and leaving:
        await ctx.db.patch(leaving[0].id, is_on_call=False)
        return len(on_call) - 1
    return len(on_call)

async def do_join(ctx, team, number):
    person = await ctx.db.query(Person.by_number, team=team, number=number).unique()
    await ctx.db.patch(person.id, is_on_call=True)

async def do_on_call(ctx, team):
    return [person.number async for person in ctx.db.query(Person.by_team, team=team, is_on_call=True)]

async def do_seat(ctx, room):
    place = await ctx.db.query(Seat.by_room, room=room).count()
    await ctx.db.insert(Seat(room=room, place=place))
    return place

async def do_seats(ctx, room):
    return [seat.place async for seat in ctx.db.query(Seat.by_room, room=room)]

async def do_attempt(ctx, operations):
    try:
        return json.loads(await ctx.run_mutation(attempt, operations=json.dumps(operations)))
    except (AppError, AppFault) as error:
        return error.code

async def do_fail(ctx):
    raise AppError("fails on purpose")
"""


def write_app(directory: Path) -> Path:
    (directory / "functions").mkdir(parents=True)
    (directory / "schema.py").write_text(SCHEMA)
    (directory / "functions" / "tx.py").write_text(FUNCTIONS)
    return directory


class Refused(Exception):
    """The transaction, or the attempt, is undone."""


class Model:
    """What the database should hold, in a few dicts."""

    def __init__(self) -> None:
        self.lists: dict[int, list[int]] = {}
        self.registers: dict[int, int] = {}
        self.names: set[int] = set()
        self.counters: dict[int, int] = {}
        self.balances = dict.fromkeys(range(ACCOUNT_COUNT), BALANCE)
        self.on_call = {team: set(range(TEAM_SIZE)) for team in range(TEAMS)}
        self.seat_counts: dict[int, int] = {}
        self._undo: list[Callable[[], object]] = []  # of what is being run, in order

    def run(self, operations: list[Operation]) -> list[Any]:
        """What a transaction gives. Raises Refused, and nothing has changed."""
        self._undo.clear()
        return self._run(operations)

    def _run(self, operations: list[Operation]) -> list[Any]:
        start = len(self._undo)
        try:
            return [self.do(*operation) for operation in operations]
        except Refused:
            while len(self._undo) > start:
                self._undo.pop()()
            raise

    def do(self, name: str, *arguments: Any) -> Any:
        return getattr(self, f"_{name}")(*arguments)

    def _append(self, key: int, value: int) -> None:
        values = self.lists.setdefault(key, [])
        values.append(value)
        self._undo.append(values.pop)

    def _read(self, key: int) -> list[int]:
        return list(self.lists.get(key, ()))

    def _put(self, key: int, value: int) -> None:
        self._set(self.registers, key, value)

    def _range(self, low: int, high: int) -> list[list[int]]:
        found = [(value, key) for key, value in self.registers.items() if low <= value < high]
        return [[key, value] for value, key in sorted(found)]

    def _claim(self, name: int) -> None:
        if name in self.names:
            raise Refused("UniqueViolation")
        self.names.add(name)
        self._undo.append(lambda: self.names.discard(name))

    def _names(self) -> list[int]:
        return sorted(self.names)

    def _add(self, key: int) -> int:
        self._set(self.counters, key, self.counters.get(key, 0) + 1)
        return self.counters[key]

    def _counters(self) -> list[list[int]]:
        return [[key, count] for key, count in sorted(self.counters.items())]

    def _transfer(self, source: int, target: int, amount: int) -> bool:
        if self.balances[source] < amount or source == target:
            return False
        self._set(self.balances, source, self.balances[source] - amount)
        self._set(self.balances, target, self.balances[target] + amount)
        return True

    def _sum(self) -> int:
        return sum(self.balances.values())

    def _leave(self, team: int, number: int) -> int:
        on_call = self.on_call[team]
        if len(on_call) > 1 and number in on_call:
            on_call.discard(number)
            self._undo.append(lambda: on_call.add(number))
        return len(on_call)

    def _join(self, team: int, number: int) -> None:
        on_call = self.on_call[team]
        if number not in on_call:
            on_call.add(number)
            self._undo.append(lambda: on_call.discard(number))

    def _on_call(self, team: int) -> list[int]:
        return sorted(self.on_call[team])

    def _seat(self, room: int) -> int:
        place = self.seat_counts.get(room, 0)
        self._set(self.seat_counts, room, place + 1)
        return place

    def _seats(self, room: int) -> list[int]:
        return list(range(self.seat_counts.get(room, 0)))

    def _attempt(self, operations: list[Operation]) -> list[Any] | str:
        try:
            return self._run(operations)
        except Refused as refused:
            return str(refused)

    def _fail(self) -> None:
        raise Refused("AppError")

    def _set(self, numbers: dict[int, int], key: int, value: int) -> None:
        old = numbers.get(key)
        if old == value:
            return
        numbers[key] = value
        self._undo.append(lambda: numbers.pop(key) if old is None else numbers.__setitem__(key, old))


class Mill:
    """Makes transactions up: each value of a list is appended once, and few keys are in most of them."""

    def __init__(self, random_source: Random) -> None:
        self._random = random_source
        self._value = 0  # newest
        self._lists = list(range(KEY_COUNT))  # the list that is in each place now
        self._append_counts = [0] * KEY_COUNT
        self._weights = [1 / (place + 1) for place in range(KEY_COUNT)]  # Zipf's

    def transaction(self) -> list[Operation]:
        operations = [self._operation() for _ in range(self._random.randint(1, 4))]
        if self._random.random() < 0.1:
            inner = [self._operation() for _ in range(self._random.randint(1, 3))]
            if self._random.random() < 0.5:
                inner.append(["fail"])
            operations.insert(self._random.randrange(len(operations) + 1), ["attempt", inner])
        if self._random.random() < 0.05:
            operations.append(["fail"])
        return operations

    def query(self) -> Operation:
        """What somebody may watch."""
        match self._random.randrange(8):
            case 0 | 1:
                return ["read", self._lists[self._place()]]
            case 2 | 3:
                return self._range()
            case 4:
                return ["counters"]
            case 5:
                return ["on_call", self._random.randrange(TEAMS)]
            case 6:
                return ["seats", self._random.randrange(ROOM_COUNT)]
            case _:
                return ["sum"]

    def _operation(self) -> Operation:
        draw, choose = self._random.random(), self._random.randrange
        if draw < 0.28:
            return self._append()
        if draw < 0.5:
            return ["read", self._lists[self._place()]]
        if draw < 0.6:
            return ["put", self._place(), choose(VALUE_MAX)]
        if draw < 0.68:
            return self._range()
        if draw < 0.72:
            return ["claim", choose(1 << 20) if choose(4) else choose(20)]
        if draw < 0.78:
            return ["add", choose(COUNTER_COUNT)]
        if draw < 0.85:
            return ["transfer", choose(ACCOUNT_COUNT), choose(ACCOUNT_COUNT), choose(BALANCE)]
        if draw < 0.88:
            return ["sum"]
        if draw < 0.96:
            return [self._random.choice(("leave", "join")), choose(TEAMS), choose(TEAM_SIZE)]
        return ["seat", choose(ROOM_COUNT)]

    def _append(self) -> Operation:
        place = self._place()
        if self._append_counts[place] == LIST_LENGTH_MAX:
            self._append_counts[place] = 0
            self._lists[place] = max(self._lists) + 1
        self._append_counts[place] += 1
        self._value += 1
        return ["append", self._lists[place], self._value]

    def _range(self) -> Operation:
        low = self._random.randrange(VALUE_MAX)
        return ["range", low, low + self._random.choice((50, 200, VALUE_MAX))]

    def _place(self) -> int:
        return self._random.choices(range(KEY_COUNT), self._weights)[0]


def flat(operations: list[Operation], results: list[Any]) -> Iterator[tuple[Operation, Any]]:
    """Each operation that took effect, with its result; those of attempts too."""
    for operation, result in zip(operations, results, strict=True):
        if operation[0] != "attempt":
            yield operation, result
        elif isinstance(result, list):
            yield from flat(operation[1], result)


def keys_of(operations: list[Operation]) -> Iterator[tuple[object, bool]]:
    """What they touch, and whether they write it: coarse, and good enough to tell who is in whose way."""
    for name, *arguments in operations:
        match name:
            case "append" | "read":
                yield ("list", arguments[0]), name == "append"
            case "put":
                yield ("register", arguments[0]), True
            case "add":
                yield ("counter", arguments[0]), True
            case "transfer":
                yield ("account", arguments[0]), True
                yield ("account", arguments[1]), True
            case "leave" | "join":
                yield ("team", arguments[0]), True
            case "seat":
                yield ("room", arguments[0]), True
            case "attempt":
                yield from keys_of(arguments[0])


def encode(operations: Operation | list[Operation]) -> str:
    return json.dumps(operations, separators=(",", ":"))
