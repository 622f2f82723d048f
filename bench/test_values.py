"""What the border to the clients costs: seconds to decode the arguments of one call, to encode one result."""

from collections.abc import Callable
from typing import Any

import msgspec

from bench.tables import Chat, Message
from engine.functions.arguments import compile_signature
from engine.ids import Id
from engine.values import compile_encoder

Benchmark = Callable[..., Any]


def test_the_arguments_of_a_mutation_are_decoded(benchmark: Benchmark, chat: Chat) -> None:
    """Four arguments in camelCase; whole numbers for floats, as JavaScript sends them."""

    def update(
        ctx: object, message_id: Id[Message], position_seconds: float, duration_seconds: float, device_type: str = "tv"
    ) -> None: ...

    signature = compile_signature(update, limits=chat.limits, tags=chat.schema.tag_of_class)
    wire = {"messageId": chat.message_ids[0], "positionSeconds": 812, "durationSeconds": 5400, "deviceType": "mobile"}
    arguments = benchmark(signature.decode, msgspec.json.encode(wire))
    assert arguments.values["position_seconds"] == 812.0


def test_a_result_of_50_documents_is_encoded(benchmark: Benchmark, chat: Chat) -> None:
    """Documents of 7 fields; the check against the return annotation is part of it."""
    result = [chat.message(number) for number in range(50)]
    encoded = benchmark(compile_encoder(list[Message], limits=chat.limits), result)
    assert len(msgspec.json.decode(encoded)) == 50
