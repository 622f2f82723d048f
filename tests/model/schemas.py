"""Schemas for the model test: what a table may look like, as source text, and values that fit its fields.

The values are few, so that documents meet at index keys and filters hit.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hypothesis import strategies as st

_TEXTS = ["", "a", "\uffff", "\U0001f600"]  # the last two: by code point, not by UTF-16
_INTS = [-1, 0, 2**53, 2**53 + 1]
_FLOATS = [-math.inf, 0.0, 1.5, 2.0**53]
_BYTES = [b"", b"\x00", b"a"]

KINDS: Mapping[str, st.SearchStrategy[Any]] = {  # annotation → values
    "str": st.sampled_from(_TEXTS),
    "int": st.sampled_from(_INTS),
    "float": st.sampled_from(_FLOATS),
    "bytes": st.sampled_from(_BYTES),
    "bool": st.booleans(),
    "str | None": st.sampled_from([None, *_TEXTS]),
    "int | None": st.sampled_from([None, *_INTS]),
    "float | None": st.sampled_from([None, *_FLOATS]),
    "bytes | None": st.sampled_from([None, *_BYTES]),
    "bool | None": st.sampled_from([None, False, True]),
    "str | int": st.sampled_from([*_TEXTS, *_INTS]),
    "str | float | None": st.sampled_from([None, *_TEXTS, *_FLOATS]),
    "list[Any]": st.lists(st.sampled_from([None, True, 1.5, "a", b"\x00", {"k": [0.5]}]), max_size=2),
}
SCALAR_KINDS = sorted(set(KINDS) - {"list[Any]"})


class IndexSpec(NamedTuple):
    fields: tuple[str, ...]
    is_unique: bool = False


class TableSpec(NamedTuple):
    kinds: Mapping[str, str]  # by field
    indexes: Mapping[str, IndexSpec]

    def values(self, field: str) -> st.SearchStrategy[Any]:
        return KINDS[self.kinds[field]]

    def documents(self) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({field: self.values(field) for field in self.kinds})


SchemaSpec = Mapping[str, TableSpec]  # by class name

RICH: SchemaSpec = {
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
}


@st.composite
def schema_specs(draw: st.DrawFn) -> SchemaSpec:
    """Any tables, fields and indexes."""
    spec = {}
    for class_name in ("Alpha", "BetaGamma", "Delta")[: draw(st.integers(1, 3))]:
        kinds = {f"field_{i}": draw(st.sampled_from(SCALAR_KINDS)) for i in range(draw(st.integers(1, 4)))}
        choices = st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3, unique=True).map(tuple)
        chosen = draw(st.lists(choices, max_size=4, unique=True))
        indexes = {f"by_{i}": IndexSpec(fields, draw(st.integers(0, 4)) == 0) for i, fields in enumerate(chosen)}
        spec[class_name] = TableSpec(kinds, indexes)
    return spec


def source_of(spec: SchemaSpec) -> str:
    """`schema.py` of an app with these tables."""
    lines = ["from typing import Any", "", "from engine import Table, index, unique", ""]
    for class_name, table in spec.items():
        lines += ["", f"class {class_name}(Table):"]
        lines += [f"    {field}: {kind}" for field, kind in table.kinds.items()]
        for name, index in table.indexes.items():
            declare = "unique" if index.is_unique else "index"
            lines.append(f"    {name} = {declare}({', '.join(map(repr, index.fields))})")
        lines.append("")
    return "\n".join(lines)
