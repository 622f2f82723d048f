"""Python value ↔ wire value ↔ column: the public names of this layer.

annotation ─ shapes ─┬─ decoder   wire value → Python value
                     ├─ encoder   Python value → wire JSON; `plain` tells when msgspec alone makes it
                     └─ columns   Python value ↔ SQLite column
wire: what the JSON itself looks like
"""

from engine.values.columns import Column, compile_column, size_of
from engine.values.decoder import Decoder, compile_decoder, decode_value
from engine.values.encoder import compile_encoder, encode_value, to_wire
from engine.values.shapes import Int64, camel_case
from engine.values.wire import WireValue, json_with_decimal_points, to_lossy_json

__all__ = [
    "Column",
    "Decoder",
    "Int64",
    "WireValue",
    "camel_case",
    "compile_column",
    "compile_decoder",
    "compile_encoder",
    "decode_value",
    "encode_value",
    "json_with_decimal_points",
    "size_of",
    "to_lossy_json",
    "to_wire",
]
