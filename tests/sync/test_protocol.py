"""The wire messages: what is printed, what is understood, what is refused."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from engine.errors import InvalidArgument
from engine.sync import protocol
from engine.sync.protocol import (
    MODIFICATION_COUNT_MAX,
    Authenticate,
    Connect,
    ModifyQuerySet,
    Mutation,
    Stamp,
    StateVersion,
    attributes_of,
    decode_message,
    encode_timestamp,
    unwrap_arguments,
)
from tests.sync.fakes import SESSION_ID, FakeFailure, FakeResult, add, authenticate, connect, mutation, query_set

ZERO = StateVersion(0, 0, 0)


@pytest.mark.parametrize(("ts", "text"), [(0, "AAAAAAAAAAA="), (1, "AQAAAAAAAAA="), (1000, "6AMAAAAAAAA=")])
def test_a_timestamp_is_base64_of_eight_bytes_little_endian(ts: int, text: str) -> None:
    assert encode_timestamp(ts) == text
    assert protocol.decode_timestamp(text) == ts


@given(st.integers(0, 2**63 - 1))
def test_every_timestamp_comes_back(ts: int) -> None:
    assert protocol.decode_timestamp(encode_timestamp(ts)) == ts


@pytest.mark.parametrize("ts", [-1, 2**63])
def test_a_timestamp_that_clients_refuse_is_never_sent(ts: int) -> None:
    with pytest.raises(AssertionError):
        encode_timestamp(ts)


@pytest.mark.parametrize("text", ["", "AAAAAAAAAAA", "AAAA", "AAAAAAAAAAAA", "%%%%%%%%%%%=", "é"])
def test_other_texts_are_no_timestamps(text: str) -> None:
    with pytest.raises(InvalidArgument):
        protocol.decode_timestamp(text)


@pytest.mark.parametrize(
    ("path_version", "convex_client", "is_accepted"),
    [
        ("1.28.0", None, True),
        ("1.48.0", None, True),
        ("2.0.0", None, True),
        ("1.28.0-alpha.1", None, True),
        ("1.27.9", None, False),
        ("0.99.0", None, False),
        ("nonsense", None, False),
        (None, None, False),
        (None, "python-0.8.1", False),
        (None, "python-1.30.0", False),
        ("1.48.0", "rust-1.30.0", False),
        (None, "npm-1.48.0", True),
        (None, "npm-cli-1.48.0", False),
        ("9" * 5_000 + ".0.0", None, True),
    ],
)
def test_only_new_npm_clients_are_sent_parts(
    path_version: str | None, convex_client: str | None, is_accepted: bool
) -> None:
    assert protocol.accepts_chunks(path_version, convex_client) is is_accepted


def test_a_transition_is_printed_to_the_letter() -> None:
    result = FakeResult(b'{"a":1}', log_lines=("[LOG] 'x'",), journal="end")
    modifications = [(3, protocol.fragment_of(result)), (4, protocol.REMOVED)]
    (frame,) = protocol.encode_transition(
        ZERO, StateVersion(1, 2, 1000), modifications, Stamp(-5, 7), frame_size_bytes_max=1 << 20, accepts_chunks=False
    )
    assert b"".join(frame).decode() == (
        '{"type":"Transition","startVersion":{"querySet":0,"identity":0,"ts":"AAAAAAAAAAA="},'
        '"endVersion":{"querySet":1,"identity":2,"ts":"6AMAAAAAAAA="},'
        '"clientClockSkew":-5,"serverTs":7,"modifications":['
        '{"queryId":3,"type":"QueryUpdated","value":{"a":1},"logLines":["[LOG] \'x\'"],"journal":"end"},'
        '{"queryId":4,"type":"QueryRemoved"}]}'
    )


def test_times_are_left_out_together() -> None:
    (frame,) = protocol.encode_transition(ZERO, ZERO, [], None, frame_size_bytes_max=1 << 20, accepts_chunks=False)
    assert json.loads(b"".join(frame)).keys() == {"type", "startVersion", "endVersion", "modifications"}


@given(st.lists(st.integers(10, 400), max_size=30), st.integers(1_000, 3_000))
def test_a_spread_transition_keeps_the_chain_the_bound_and_every_modification(sizes: list[int], bound: int) -> None:
    end = StateVersion(1, 1, 9)
    modifications = [
        (number, protocol.fragment_of(FakeResult(b'"' + b"x" * size + b'"'))) for number, size in enumerate(sizes)
    ]
    frames = protocol.encode_transition(
        ZERO, end, modifications, Stamp(0, 0), frame_size_bytes_max=bound, accepts_chunks=False
    )
    texts = [b"".join(frame) for frame in frames]
    heard = [json.loads(text) for text in texts]
    assert all(len(text) <= bound for text in texts)
    assert [message["endVersion"]["querySet"] for message in heard] == [0] * (len(heard) - 1) + [1]
    assert all(message["startVersion"]["querySet"] == 0 for message in heard)
    ids = [modification["queryId"] for message in heard for modification in message["modifications"]]
    assert ids == list(range(len(sizes)))


def test_error_data_that_is_null_is_still_error_data() -> None:
    with_null = json.loads(protocol.mutation_failed(1, FakeFailure("x", data=b"null"), ())[0])
    without = json.loads(protocol.mutation_failed(1, FakeFailure("x"), ())[0])
    assert with_null["errorData"] is None
    assert "errorData" not in without
    assert with_null["logLines"] == without["logLines"] == []


def test_members_that_are_not_known_are_ignored() -> None:
    message = decode_message(json.dumps(connect(somethingNew={"a": [1]})))
    assert isinstance(message, Connect)


def test_a_message_with_arguments_that_cannot_be_decoded_keeps_its_request() -> None:
    message = decode_message('{"type":"Mutation","requestId":5,"udfPath":"a:b","args":[{"x":"\\udead"}]}')
    assert isinstance(message, Mutation)
    assert (message.request_id, message.udf_path, bytes(message.args)) == (5, "a:b", b"[]")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
MESSAGES = [
    connect(maxObservedTimestamp="6AMAAAAAAAA=", clientTs=5),
    query_set(0, add(1, "a:b", {"x": [1, "y"]}, journal=None)),
    mutation(3, "a:b", {"x": {"$integer": "BQAAAAAAAAA="}}),
    authenticate(0),
    {"type": "Event", "eventType": "x", "event": 1},
]


@pytest.mark.slow
@given(st.text() | JSON.map(json.dumps) | st.binary())
def test_no_text_breaks_the_decoder(text: str | bytes) -> None:
    with pytest.raises(InvalidArgument):
        decode_message(text)


@given(st.data())
def test_no_change_of_a_message_breaks_the_decoder(data: st.DataObject) -> None:
    message: Any = json.loads(json.dumps(data.draw(st.sampled_from(MESSAGES))))
    part = message
    while True:
        key = data.draw(st.sampled_from(list(part)) if isinstance(part, dict) else st.integers(0, len(part) - 1))
        if not isinstance(part[key], dict | list) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    if data.draw(st.booleans()):
        part[key] = data.draw(JSON)
    else:
        del part[key]
    with suppress(InvalidArgument):
        decode_message(json.dumps(message))


@pytest.mark.parametrize("name", ["type", "tokenType"])
def test_what_a_refused_message_says_is_not_repeated(name: str) -> None:
    message = {**authenticate(0, "token"), name: "it's a 'secret'\n" * 1_000}
    with pytest.raises(InvalidArgument) as refusal:
        decode_message(json.dumps(message))
    assert str(refusal.value).startswith("not a message of the sync protocol: Invalid ")
    assert "secret" not in str(refusal.value)
    assert len(str(refusal.value)) < 200


def test_session_ids_are_uuids() -> None:
    assert isinstance(decode_message(json.dumps(connect(sessionId=SESSION_ID.upper()))), Connect)
    for session_id in ("", SESSION_ID + "x", SESSION_ID + "\n", "x" * 36):
        with pytest.raises(InvalidArgument):
            decode_message(json.dumps(connect(sessionId=session_id)))


def message_of(count: int) -> str:
    return json.dumps(query_set(0, *[{"type": "Remove", "queryId": number} for number in range(count)]))


def test_a_message_with_too_many_modifications_is_given_up_where_there_are_too_many() -> None:
    for _ in range(2):
        assert isinstance(decode_message(message_of(MODIFICATION_COUNT_MAX)), ModifyQuerySet)
        with pytest.raises(InvalidArgument, match="more than 20,000 modifications"):
            decode_message(message_of(MODIFICATION_COUNT_MAX + 1))


def test_what_is_in_arguments_is_skipped_and_not_looked_at_before_it_is_needed() -> None:
    text = '{"type":"Mutation","requestId":5,"udfPath":"a:b","args":[' + "{}," * 1_000_000 + "{}]}"
    message = decode_message(text)
    assert isinstance(message, Mutation)
    assert isinstance(message.args, Raw), "two million bytes, and not a million objects"
    with pytest.raises(InvalidArgument, match="expected one object"):
        unwrap_arguments(message.args)


def test_attributes_of_a_user_are_bounded() -> None:
    def attributes(size: int) -> Authenticate:
        text = '{"type":"Authenticate","baseVersion":0,"tokenType":"Admin","value":"k","impersonating":%s}'
        message = decode_message(text % ('{"name":"' + "x" * (size - 11) + '"}'))
        assert isinstance(message, Authenticate)
        return message

    assert attributes_of(attributes(16 << 10)) == {"name": "x" * ((16 << 10) - 11)}
    with pytest.raises(InvalidArgument, match="impersonating: more than 16,384 bytes"):
        attributes_of(attributes((16 << 10) + 1))
