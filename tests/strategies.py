"""Hypothesis strategies for what flows through the engine: texts, values, and annotations with values that fit them."""

import math
from typing import Annotated, Any, Literal, NamedTuple, Required, TypedDict, Union

import msgspec
from hypothesis import strategies as st

from engine.values import Int64
from engine.values.wire import EXACT_INT_MAX, INT64_MAX, INT64_MIN


class Typed(NamedTuple):
    """An annotation, and a strategy of values that fit it."""

    annotation: Any
    values: st.SearchStrategy[Any]


# integers where doubles or 64 bits end, and special floats, come up far too rarely by chance
int64s = st.integers(INT64_MIN, INT64_MAX) | st.sampled_from(
    [near + step for near in (-EXACT_INT_MAX, 0, EXACT_INT_MAX) for step in (-1, 0, 1)] + [INT64_MIN, INT64_MAX]
)
floats = st.floats() | st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, 1e16, 2.0**53, 1.7e308])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["", "$integer", "é", "\u2028"])
any_texts = texts | st.sampled_from(["\ud800", "a\udfff", "\ud83d"])  # those have no UTF-8 form
keys = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=6).filter(lambda key: key[:1] != "$")

scalars = st.none() | st.booleans() | int64s | floats | texts | st.binary(max_size=9)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))

# what a hostile client can make the JSON decoder give us
_wire_scalars = st.none() | st.booleans() | st.integers() | floats | any_texts | st.just(10**4000) | st.just(-(10**400))
_special_objects = st.builds(
    lambda key, inner: {key: inner},
    st.sampled_from(["$integer", "$bytes", "$float", "$commitTs", "$undefined", "$"]),
    _wire_scalars | st.binary(max_size=9).map(lambda raw: msgspec.to_builtins(raw)),
)
_any_keys = keys | any_texts | st.sampled_from(["$integer", "game_id", "gameId", "__proto__", "id", "_id"])
wire_values = st.recursive(
    _wire_scalars | _special_objects,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_any_keys, inner, max_size=4),
)

_SCALARS = {  # by the form on the wire: a union takes at most one of each
    "null": [Typed(None, st.none())],
    "bool": [Typed(bool, st.booleans())],
    "int": [
        Typed(int, int64s),
        Typed(Int64, int64s),
        Typed(Literal[1, 2, 3], st.sampled_from([1, 2, 3])),
        Typed(Annotated[int, msgspec.Meta(ge=0, le=9)], st.integers(0, 9)),
    ],
    "float": [Typed(float, floats)],
    "str": [
        Typed(str, texts),
        Typed(Literal["a", "é"], st.sampled_from(["a", "é"])),
        Typed(Annotated[str, msgspec.Meta(max_length=2)], st.text("ab", max_size=2)),
    ],
    "bytes": [Typed(bytes, st.binary(max_size=9))],
}
typed_scalars = st.sampled_from([typed for same_form in _SCALARS.values() for typed in same_form])


@st.composite
def typed_unions(draw: st.DrawFn) -> Typed:
    forms = draw(st.lists(st.sampled_from(sorted(_SCALARS)), min_size=2, max_size=4, unique=True))
    chosen = [draw(st.sampled_from(_SCALARS[form])) for form in forms]
    annotations = tuple(typed.annotation for typed in chosen)
    return Typed(Union[annotations], st.one_of([typed.values for typed in chosen]))  # noqa: UP007 - of a tuple


@st.composite
def _structs(draw: st.DrawFn, inner: st.SearchStrategy[Typed]) -> Typed:
    fields = draw(st.dictionaries(st.sampled_from(["game_id", "x", "is_done", "position_2"]), inner, max_size=3))
    struct_type = msgspec.defstruct(
        "Struct",
        [(name, typed.annotation) for name, typed in fields.items()],
        rename=draw(st.sampled_from([None, "camel"])),
        tag=draw(st.sampled_from([None, "made"])),
        frozen=draw(st.booleans()),
    )
    return Typed(struct_type, st.builds(struct_type, **{name: typed.values for name, typed in fields.items()}))


@st.composite
def _typed_dicts(draw: st.DrawFn, inner: st.SearchStrategy[Typed]) -> Typed:
    always, perhaps = draw(inner), draw(inner)
    fields = {"always": Required[always.annotation], "per_haps": perhaps.annotation}
    annotation = TypedDict("Window", fields, total=False)
    return Typed(annotation, st.fixed_dictionaries({"always": always.values}, optional={"per_haps": perhaps.values}))


def _holders(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    return (
        inner.map(lambda typed: Typed(list[typed.annotation], st.lists(typed.values, max_size=4)))
        | inner.map(lambda typed: Typed(dict[str, typed.annotation], st.dictionaries(keys, typed.values, max_size=4)))
        | inner.map(lambda typed: Typed(Union[typed.annotation, None], st.none() | typed.values))  # noqa: UP007
        | _structs(inner)
        | _typed_dicts(inner)
    )


typed = st.recursive(typed_scalars | typed_unions() | st.just(Typed(Any, values)), _holders, max_leaves=6)


def are_same(left: Any, right: Any) -> bool:
    """Equal, of equal types at every depth, NaN equal to itself and -0.0 different from 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return repr(left) == repr(right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(are_same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(are_same(left[key], right[key]) for key in left)
    if isinstance(left, msgspec.Struct):
        return all(are_same(getattr(left, name), getattr(right, name)) for name in left.__struct_fields__)
    return bool(left == right)
