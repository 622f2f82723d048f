"""Schemas for the model test: what tables may look like and what watches over them, as values and as source text.

The values of fields are few, so that documents meet at index keys, filters hit, and moments come.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.ids import make_id, table_tag
from tests.model.choices import Choices

START_MS = 1_790_812_800_000  # where the clock begins
PEOPLE = ("alice", "bob", "carol")
_TEXTS = ["", "a", "\uffff", "\U0001f600"]  # the last two: by code point, not by UTF-16
_INTS = [-1, 0, 2**53, 2**53 + 1]
_FLOATS = [-math.inf, 0.0, 1.5, 2.0**53]
_BYTES = [b"", b"\x00", b"a"]
_OFFSETS = [-60_000.0, -10_000.0, -1_000.5, -1_000.0, -0.5, 0.0, 1.0, 1_000.0, 10_000.0, math.inf]  # from now, in ms

KINDS: Mapping[str, Sequence[Any]] = {  # kind of field → values
    "str": _TEXTS,
    "int": _INTS,
    "float": _FLOATS,
    "bytes": _BYTES,
    "bool": [False, True],
    "str | None": [None, *_TEXTS],
    "int | None": [None, *_INTS],
    "float | None": [None, *_FLOATS],
    "bytes | None": [None, *_BYTES],
    "bool | None": [None, False, True],
    "str | int": [*_TEXTS, *_INTS],
    "str | float | None": [None, *_TEXTS, *_FLOATS],
    "list[Any]": [[], ["a"], [None, True], [1.5, b"\x00"], [{"k": [0.5]}]],
    "person": PEOPLE,
    "role": ["user", "user", "mod", "mod", "banned"],
    "status": ["shown", "shown", "hidden"],
    "amount": [0, 1, 3, 2**62],  # two of the last are too many
    "amount | None": [None, 1, 3],
    "time": [],  # near now: `TableSpec.values`
}
SCALAR_KINDS = sorted(set(KINDS) - {"list[Any]", "person", "role", "status", "amount", "amount | None", "time"})
_ANNOTATIONS = {
    "person": "str",
    "role": "str",
    "status": "str",
    "amount": "int",
    "amount | None": "int | None",
    "time": "float",
}  # of the kinds that are no annotations themselves

OnDelete = Literal["restrict", "cascade", "set_null"]


class Pool(NamedTuple):
    """What values may be about."""

    ids: Mapping[str, Sequence[str]] = {}  # of documents that were made, by class name, the oldest first
    creation_times: Sequence[float] = ()  # of the newest documents
    now: float = START_MS  # ms since the epoch


class IndexSpec(NamedTuple):
    fields: tuple[str, ...]
    is_unique: bool = False
    is_ranked: bool = False


class KeySpec(NamedTuple):
    """A foreign key: the field is an id."""

    parent: str  # class name
    on_delete: OnDelete = "restrict"
    is_optional: bool = True


class AggregateSpec(NamedTuple):
    fields: tuple[str, ...]
    sums: tuple[str, ...] = ()
    is_public: bool = False


class PolicySpec(NamedTuple):
    """Who may do what with the rows of a table: what `POLICIES` has under `kind`, about this field."""

    kind: str
    field: str = ""
    value: Any = None
    parent_field: str = ""  # of the document that the field names


class TriggerSpec(NamedTuple):
    """What is done after each write of a table: what `TRIGGERS` has under `kind`, about this field."""

    kind: Literal["log", "count", "refuse", "touch"]
    field: str = ""
    value: Any = None


class TableSpec(NamedTuple):
    kinds: Mapping[str, str]  # by field, without foreign keys
    indexes: Mapping[str, IndexSpec]
    keys: Mapping[str, KeySpec] = {}  # by field
    aggregates: Mapping[str, AggregateSpec] = {}
    keeps_deleted: bool = False
    has_updated: bool = False
    policy: PolicySpec | None = None
    triggers: tuple[TriggerSpec, ...] = ()

    @property
    def fields(self) -> list[str]:
        """Those that an app sets."""
        return [*self.kinds, *self.keys]

    def values(self, field: str, pool: Pool) -> Sequence[Any]:
        """Some values for the field."""
        key = self.keys.get(field)
        if key is not None:
            ids = pool.ids.get(key.parent, ())
            # the oldest more often, so that many name the same one; and one that is not there
            return [*ids[:2], *ids[:2], *ids, nobody(key.parent), *([None] if key.is_optional else [])]
        kind = self.kinds[field]
        return [pool.now + offset for offset in _OFFSETS] if kind == "time" else KINDS[kind]


class SchemaSpec(NamedTuple):
    tables: Mapping[str, TableSpec]  # by class name
    has_slow_role: bool = False  # whether the query runs long that policies judge by

    def source(self) -> Mapping[str, str]:
        """The modules of the app that follow from it, by path."""
        return {
            "schema.py": _schema_source(self.tables),
            "functions/_policies.py": _policies_source(self.tables),
            "functions/_triggers.py": _triggers_source(self.tables),
            "functions/_options.py": f"ROLE_IS_SLOW = {self.has_slow_role}\n",
        }

    def write(self, directory: Path) -> None:
        for name, text in self.source().items():
            (directory / name).write_text(text)


def nobody(class_name: str) -> str:
    """An id of the table that no document has."""
    return make_id(table_tag(table_name(class_name)), 2, bytes(9))


def table_name(class_name: str) -> str:
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in class_name).lstrip("_")


# -- as source text


def _schema_source(tables: Mapping[str, TableSpec]) -> str:
    lines = ["from typing import Any", "", "from engine import *", ""]
    for class_name, table in tables.items():
        lines += ["", f"class {class_name}(Table):"]
        lines += [f"    {field}: {_ANNOTATIONS.get(kind, kind)}" for field, kind in table.kinds.items()]
        for field, key in table.keys.items():
            lines.append(f'    {field}: Id["{key.parent}"]{" | None" if key.is_optional else ""}')
            lines.append(f"    names_by_{field} = foreign_key({field!r}, on_delete={key.on_delete!r})")
        if table.keeps_deleted:
            lines.append("    deleted_at: DeletedAt = None")
        if table.has_updated:
            lines.append("    updated_at: UpdatedAt = 0.0")
        for name, index in table.indexes.items():
            declare = "unique" if index.is_unique else "index"
            ranked = ["ranked=True"] if index.is_ranked else []
            lines.append(f"    {name} = {declare}({', '.join([*map(repr, index.fields), *ranked])})")
        for name, aggregate in table.aggregates.items():
            options = [f"sum={aggregate.sums!r}", f"public={aggregate.is_public}"]
            lines.append(f"    {name} = aggregate({', '.join([*map(repr, aggregate.fields), *options])})")
        lines.append("")
    return "\n".join(lines)


POLICIES = {
    # by what the row says, or who asks
    "role": """
    def read(self, row): return row.{field} == {value!r} or self.viewer == "mod"
    def insert(self, row): return self.viewer != "stranger"
    def update(self, old, new): return self.viewer == "mod" or old.{field} == new.{field}
    def delete(self, row): return row.{field} == {value!r}
""",
    # the same the other way round: who asks is asked first
    "viewer": """
    def read(self, row): return self.viewer == "mod" or row.{field} == {value!r}
    def insert(self, row): return self.viewer == "mod"
    def update(self, old, new): return self.read(new)
    def delete(self, row): return self.viewer != "stranger"
""",
    "owner": """
    def read(self, row): return self.identity is not None and row.{field} == self.identity.subject
    def insert(self, row): return self.read(row)
    def update(self, old, new): return self.read(new)
    def delete(self, row): return True
""",
    "claim": """
    def read(self, row):
        return row.{field} == {value!r} or (self.identity is not None and self.identity.claims.get("role") == "admin")
    def insert(self, row): return True
    def update(self, old, new): return self.identity is not None
""",
    # by another table, for each row
    "linked": """
    async def read(self, row):
        if row.{field} is None:
            return self.viewer == "mod"
        parent = await self.db.get(row.{field})
        return parent is not None and parent.{parent_field} == {value!r}
    async def insert(self, row): return await self.read(row)
    async def update(self, old, new): return await self.read(new)
    async def delete(self, row): return self.viewer == "mod"
""",
    # by whether somebody has such a role at all
    "granted": """
    async def read(self, row):
        found = await self.db.query(User.by_role, role="mod").filter(lambda user: user.subject == row.{field}).first()
        return found is not None
    def insert(self, row): return True
    def update(self, old, new): return True
    def delete(self, row): return self.viewer is not None
""",
    # one that fails itself
    "strict": """
    def read(self, row):
        if row.{field} == {value!r}:
            raise AppError("nobody may look at this")
        return self.viewer != "stranger"
    def insert(self, row): return row.{field} != {value!r}
    def update(self, old, new): return new.{field} != {value!r}
    def delete(self, row): return True
""",
    "closed": """
    pass
""",
}

_POLICIES_HEAD = """from engine import AppError, Policy, policy
from functions.people import role
from schema import *
"""


def _policies_source(tables: Mapping[str, TableSpec]) -> str:
    text = _POLICIES_HEAD
    for class_name, table in tables.items():
        if table.policy is not None:
            text += f"\n@policy({class_name}, viewer=role)\nclass {class_name}Policy(Policy):"
            text += POLICIES[table.policy.kind].format(**table.policy._asdict())
    return text


_TRIGGERS_HEAD = """from engine import trigger
from functions._doings import count, log, refuse, touch
from schema import *
"""


def _triggers_source(tables: Mapping[str, TableSpec]) -> str:
    text = _TRIGGERS_HEAD
    for class_name, table in tables.items():
        for number, (kind, field, value) in enumerate(table.triggers):
            text += f"\n@trigger({class_name})\nasync def t{number}_{kind}_{class_name}(ctx, change):\n"
            text += f"    await {kind}(ctx, change, {class_name!r}, {field!r}, {value!r})\n"
    return text


# -- some schemas

USER = TableSpec(
    {"subject": "person", "role": "role", "until": "time"},
    {
        "by_subject": IndexSpec(("subject",), is_unique=True),
        "by_until": IndexSpec(("subject", "until")),
        "by_role": IndexSpec(("role",)),
    },
)
LOG = TableSpec({"about": "str", "operation": "str", "kind": "str"}, {"by_operation": IndexSpec(("kind", "operation"))})
COUNTER = TableSpec({"name": "str", "n": "int"}, {"by_name": IndexSpec(("name",), is_unique=True)})

RICH = SchemaSpec({
    "Thing": TableSpec(
        {
            "text": "str",
            "number": "int",
            "maybe": "int | None",
            "real": "float",
            "mixed": "str | int",
            "blob": "bytes",
            "flag": "bool",
            "nested": "list[Any]",
        },
        {
            "by_text": IndexSpec(("text",)),
            "by_text_number": IndexSpec(("text", "number")),
            "by_maybe_real": IndexSpec(("maybe", "real")),
            "by_mixed": IndexSpec(("mixed", "flag", "blob")),
        },
    ),
    "Slot": TableSpec(
        {"code": "str | None", "number": "int", "owner": "str"},
        {
            "by_code": IndexSpec(("code",), is_unique=True),
            "by_owner": IndexSpec(("owner", "number")),
        },
    ),
})  # fmt: skip

POLICED = SchemaSpec({
    # which the query that policies judge by does not heed, but everybody else who asks for a role
    "User": USER._replace(policy=PolicySpec("claim", "role", "mod")),
    "Post": TableSpec(
        {"room": "status", "status": "status", "number": "int"},
        {"by_room": IndexSpec(("room", "status")), "by_number": IndexSpec(("number",), is_ranked=True)},
        aggregates={"kept": AggregateSpec(("status",)), "shown": AggregateSpec(("room",), is_public=True)},
        policy=PolicySpec("role", "status", "shown"),
    ),
    "Letter": TableSpec(
        {"to": "person", "flag": "bool"},
        {"by_to": IndexSpec(("to", "flag")), "by_flag": IndexSpec(("flag",))},
        policy=PolicySpec("owner", "to"),
    ),
    "Room": TableSpec({"status": "status", "title": "str"}, {}, policy=PolicySpec("viewer", "title", "a")),
    "Item": TableSpec(
        {"number": "int"},
        {"by_room": IndexSpec(("room_id", "number"))},
        keys={"room_id": KeySpec("Room", "cascade")},
        policy=PolicySpec("linked", "room_id", "shown", "status"),
    ),
})  # fmt: skip

OTHER_POLICIES: Mapping[str, PolicySpec] = {  # of the same tables, after a reload; users have none
    "Post": PolicySpec("claim", "status", "shown"),
    "Letter": PolicySpec("granted", "to"),
    "Room": PolicySpec("strict", "title", "a"),
    "Item": PolicySpec("closed"),
}

RULED = SchemaSpec({
    "Room": TableSpec(
        {"title": "str", "touched": "int"},
        {"by_parent": IndexSpec(("parent_id",))},
        keys={"parent_id": KeySpec("Room", "set_null")},
        triggers=(TriggerSpec("log"), TriggerSpec("touch", "parent_id")),
    ),
    "Post": TableSpec(
        {"slug": "str | None", "status": "status", "points": "amount"},
        {
            "by_room": IndexSpec(("room_id", "status")),
            "by_answered": IndexSpec(("answered_id",)),
            "by_slug": IndexSpec(("slug",), is_unique=True),
            "by_points": IndexSpec(("status", "points"), is_ranked=True),
        },
        keys={"room_id": KeySpec("Room", "cascade", is_optional=False), "answered_id": KeySpec("Post", "cascade")},
        aggregates={
            "in_room": AggregateSpec(("room_id", "status"), ("points",)),
            "all": AggregateSpec((), ("points",)),
        },
        keeps_deleted=True,
        has_updated=True,
        triggers=(TriggerSpec("count"), TriggerSpec("touch", "room_id"), TriggerSpec("refuse", "slug", "\uffff")),
    ),
    "Pin": TableSpec(
        {"number": "amount | None"},
        {
            "by_post": IndexSpec(("post_id", "number"), is_ranked=True),
            "by_room": IndexSpec(("room_id",)),
        },
        keys={"post_id": KeySpec("Post", "restrict"), "room_id": KeySpec("Room", "cascade")},
        aggregates={"of_post": AggregateSpec(("post_id",), ("number",))},
        has_updated=True,
        triggers=(TriggerSpec("log"), TriggerSpec("refuse", "number", 3)),
    ),
    "Log": LOG,
    "Counter": COUNTER,
})  # fmt: skip

TIMED = SchemaSpec({
    "User": USER,
    "Session": TableSpec(
        {"room": "status", "seen": "time", "flag": "bool"},
        {
            "by_seen": IndexSpec(("seen",), is_ranked=True),
            "by_room": IndexSpec(("room", "seen")),
            "by_flag": IndexSpec(("flag",)),
        },
        aggregates={"in_room": AggregateSpec(("room",))},
    ),
    "Mixed": TableSpec(
        {"when": "str | float | None"}, {"by_when": IndexSpec(("when",))}, policy=PolicySpec("viewer", "when", "a")
    ),
})  # fmt: skip


def any_schema(choices: Choices) -> SchemaSpec:
    """Any tables, fields and indexes, and any rules between them."""
    class_names = ("Alpha", "BetaGamma", "Delta")[: choices.between(1, 3)]
    # triggers that touch and keys that let go, together, would make the order matter in which keys let go
    does_touch = choices.chance(2)
    tables = {name: _any_table(choices, class_names, place, does_touch) for place, name in enumerate(class_names)}
    if any(table.policy for table in tables.values()):
        tables["User"] = USER
    if any(table.triggers for table in tables.values()):
        tables |= {"Log": LOG, "Counter": COUNTER}
    return SchemaSpec(_with_parents_that_can_be_touched(tables), choices.chance(4))


def _any_table(choices: Choices, class_names: Sequence[str], place: int, does_touch: bool) -> TableSpec:
    kinds = {f"field_{i}": choices.one(SCALAR_KINDS) for i in range(choices.between(1, 4))}
    keys = {
        f"key_{i}": _any_key(choices, class_names, place, lets_go=not does_touch)
        for i in range(choices.one([0, 0, 1, 2]))
    }
    extra: dict[str, Any] = {}
    if keys or choices.chance(2):
        kinds |= {"touched": "int", "amount": "amount", "when": "time"}
        fields = sorted({*kinds, *keys})
        cells = {frozenset(choices.some(fields, 0, 2)) for _ in range(choices.between(0, 2))}
        triggers = [TriggerSpec("log"), TriggerSpec("count"), TriggerSpec("refuse", "amount", 3)]
        triggers += [TriggerSpec("touch", field) for field in keys if does_touch]
        extra = {
            "aggregates": {
                f"total_{i}": AggregateSpec(tuple(sorted(key)), choices.one([(), ("amount",)]), choices.chance(2))
                for i, key in enumerate(sorted(cells, key=sorted))
            },
            "keeps_deleted": choices.chance(2),
            "has_updated": choices.chance(2),
            "policy": _any_policy(choices, kinds, keys),
            "triggers": tuple(choices.some(triggers, 0, 2)),
        }
    indexes: dict[tuple[str, ...], IndexSpec] = {(field,): IndexSpec((field,)) for field in keys}
    for _ in range(choices.between(0, 4)):
        chosen = tuple(choices.some(sorted({*kinds, *keys}), 1, 3))
        kind = choices.one(["plain", "plain", "plain", "unique", "ranked"])
        indexes[chosen] = IndexSpec(chosen, kind == "unique", kind == "ranked")
    return TableSpec(kinds, {f"by_{i}": index for i, index in enumerate(indexes.values())}, keys, **extra)


def _any_key(choices: Choices, class_names: Sequence[str], place: int, *, lets_go: bool) -> KeySpec:
    if place and choices.chance(2):  # one that must be there is of an earlier table, so that there can be a first
        return KeySpec(choices.one(class_names[:place]), choices.one(["cascade", "restrict"]), is_optional=False)
    return KeySpec(choices.one(class_names), choices.one(["cascade", "restrict", "set_null" if lets_go else "cascade"]))


def _any_policy(choices: Choices, kinds: Mapping[str, str], keys: Mapping[str, KeySpec]) -> PolicySpec | None:
    kind = choices.one([None, *POLICIES])
    if kind == "linked":
        return PolicySpec(kind, choices.one(sorted(keys)), 0, "touched") if keys else None
    field = choices.one([field for field in kinds if kinds[field] in ("str", "int", "bool", "amount")])
    return None if kind is None else PolicySpec(kind, field, choices.one(KINDS[kinds[field]]))


def _with_parents_that_can_be_touched(tables: Mapping[str, TableSpec]) -> dict[str, TableSpec]:
    """With a field for what triggers and policies of children are about."""
    made = dict(tables)
    for table in tables.values():
        for key in table.keys.values():
            parent = made[key.parent]
            made[key.parent] = parent._replace(kinds={**parent.kinds, "touched": "int"})
    return made
