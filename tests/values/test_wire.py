"""The JSON itself."""

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given

from engine.values import decode_value, encode_value, json_with_decimal_points, to_lossy_json
from tests import strategies


@pytest.mark.parametrize(
    ("payload", "pointed"),
    [
        (b"1", b"1.0"),
        (b'{"a":[1,-2,2.5,1e300],"1":"1"}', b'{"a":[1.0,-2.0,2.5,1e300],"1":"1"}'),
        (b'[true,null,{"$integer":"BQAAAAAAAAA="}]', b'[true,null,{"$integer":"BQAAAAAAAAA="}]'),
        (b"9007199254740992", b"9007199254740992.0"),
        *[(b"[%b]" % (b"%d" % n), b"[%d.0]" % n) for n in (0, -7, 12)],
        (b'{"a":{"b":1}}', b'{"a":{"b":1.0}}'),
        (b"[0.5,[],3]", b"[0.5,[],3.0]"),
        (b'{"a":7,"b":0.5}', b'{"a":7.0,"b":0.5}'),
        (b'[0.5,1e300,"1:2,3","[4]"]', b'[0.5,1e300,"1:2,3","[4]"]'),
    ],
)
def test_every_plain_integer_gets_a_decimal_point_for_clients_that_look_for_it(payload: bytes, pointed: bytes) -> None:
    assert json_with_decimal_points(payload) == pointed


@given(strategies.values)
def test_decimal_points_change_no_value(value: Any) -> None:
    payload = encode_value(value)
    pointed = json_with_decimal_points(payload)
    assert strategies.are_same(decode_value(msgspec.json.decode(pointed)), decode_value(msgspec.json.decode(payload)))

    def no_integer(text: str) -> None:
        raise AssertionError(f"{text} has no point")

    json.loads(pointed, parse_int=no_integer)


@pytest.mark.parametrize(
    ("value", "lossy"),
    [
        (2**60, b'"1152921504606846976"'),
        (b"hi", b'"aGk="'),
        ([math.nan, math.inf, -math.inf, -0.0], b'["NaN","Infinity","-Infinity",-0.0]'),
        ({"a": {"b": [1, "x", None]}}, b'{"a":{"b":[1,"x",null]}}'),
        (['{"$bytes":"aGk="}', b"hi"], b'["{\\"$bytes\\":\\"aGk=\\"}","aGk="]'),
        ("$5", b'"$5"'),
    ],
)
def test_lossy_json_is_plain_json_for_people(value: Any, lossy: bytes) -> None:
    assert to_lossy_json(encode_value(value)) == lossy
