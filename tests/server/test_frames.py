"""Frames of RFC 6455: whatever the pieces they come in, the same messages; whatever breaks the rules, refused."""

import asyncio
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.server.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    BrokenRule,
    FrameReader,
    close_code,
    header,
)
from tests.server.fakes import FakeEngine, served

FINAL = 0x80
BOUND = 70_000

Message = str | tuple[int, bytes]


def frame(
    first: int, payload: bytes = b"", *, key: bytes = b"\x01\x9f\x00\xe3", length_size: int | None = None
) -> bytes:
    """One frame of a client; `length_size` chooses how many bytes say its length."""
    size = len(payload)
    if length_size is None:
        length_size = 0 if size < 126 else 2 if size < 1 << 16 else 8
    second = {0: size, 2: 126, 8: 127}[length_size]
    length = size.to_bytes(length_size) if length_size else b""
    masked = bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))
    return bytes((first, 0x80 | second)) + length + key + masked


def read(*pieces: bytes, bound: int = BOUND) -> list[Message]:
    reader = FrameReader(bound)
    return [message for piece in pieces for message in reader.read(piece)]


def refusal(*pieces: bytes, bound: int = BOUND) -> tuple[int, str]:
    with pytest.raises(BrokenRule) as broken:
        read(*pieces, bound=bound)
    return broken.value.code, broken.value.reason


def cut(data: bytes, places: list[int]) -> Iterator[bytes]:
    start = 0
    for place in sorted(min(place, len(data)) for place in places):
        yield data[start:place]
        start = place
    yield data[start:]


@st.composite
def conversations(draw: st.DrawFn) -> tuple[bytes, list[Message]]:
    """The bytes of some messages, many of them in several frames with control frames between, and the messages."""
    data, said = b"", list[Message]()
    keys = st.binary(min_size=4, max_size=4)
    for text in draw(st.lists(st.text(max_size=90) | st.integers(100, 400).map("é".__mul__), max_size=6)):
        payloads = list(cut(text.encode(), draw(st.lists(st.integers(0, 200), max_size=3))))
        for number, payload in enumerate(payloads):
            if draw(st.booleans()):
                control = draw(st.sampled_from([PING, PONG])), draw(st.binary(max_size=125))
                data += frame(FINAL | control[0], control[1], key=draw(keys))
                said.append(control)
            first = (TEXT if number == 0 else CONTINUATION) | (FINAL if number == len(payloads) - 1 else 0)
            data += frame(first, payload, key=draw(keys))
        said.append(text)
    return data, said


@settings(max_examples=50)
@given(conversations(), st.lists(st.integers(0, 2_000), max_size=8))
def test_messages_are_the_same_in_whatever_pieces_they_come(
    conversation: tuple[bytes, list[Message]], places: list[int]
) -> None:
    data, said = conversation
    assert read(data) == said
    assert read(*cut(data, places)) == said
    assert read(*[data[index : index + 1] for index in range(len(data))]) == said


@settings(max_examples=30)
@given(conversations(), st.integers(1, 3))
def test_what_is_not_taken_comes_with_the_next_read(conversation: tuple[bytes, list[Message]], count: int) -> None:
    data, said = conversation
    reader, taken = FrameReader(BOUND), list[Message]()
    reader.keep(data[:5])
    reader.keep(data[5:])
    while messages := list(islice(reader.read(b""), count)):
        taken += messages
    assert taken == said


@pytest.mark.parametrize("size", [0, 1, 2, 125, 126, 127, 4_096, 65_535, 65_536, BOUND])
@pytest.mark.parametrize("piece_size", [1 << 20, 4_001])
def test_messages_of_every_size_are_read(size: int, piece_size: int) -> None:
    data = frame(FINAL | TEXT, b"x" * size) * 2
    assert read(*[data[start : start + piece_size] for start in range(0, len(data), piece_size)]) == ["x" * size] * 2


@pytest.mark.parametrize("length_size", [2, 8])
def test_a_length_may_be_said_at_length(length_size: int) -> None:
    assert read(frame(FINAL | TEXT, b"ab", length_size=length_size)) == ["ab"]


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b"\x81\x02ab" + b"xxxx"], 1002),  # no mask
        ([b"\x81\x7e\x01\x00" + b"a" * 256], 1002),
        *[([frame(FINAL | bit | TEXT, b"x" * size)], 1002) for bit in (0x10, 0x20, 0x40) for size in (1, 200)],
        *[([frame(FINAL | opcode)], 1002) for opcode in (3, 4, 5, 6, 7, 0xB, 0xC, 0xD, 0xE, 0xF)],
        *[([frame(opcode)], 1002) for opcode in (CLOSE, PING, PONG)],  # in pieces
        *[([frame(FINAL | opcode, b"x" * 126)], 1002) for opcode in (CLOSE, PING, PONG)],
        *[([frame(FINAL | PING, b"x", length_size=size)], 1002) for size in (2, 8)],
        ([frame(FINAL | CONTINUATION, b"x")], 1002),
        ([frame(CONTINUATION, b"x")], 1002),
        *[([frame(TEXT, b"a"), frame(FINAL | TEXT, b"b" * size)], 1002) for size in (1, 200)],
        ([frame(TEXT, b"a"), frame(TEXT, b"b")], 1002),
        ([frame(TEXT, b"a"), frame(FINAL | BINARY, b"b")], 1002),
        ([frame(TEXT, b"a"), frame(FINAL | CONTINUATION, b"b"), frame(FINAL | CONTINUATION, b"c")], 1002),
        ([frame(FINAL | BINARY, b"x")], 1003),
        ([frame(BINARY, b"")], 1003),
        ([frame(FINAL | TEXT, b"\xff")], 1007),
        ([frame(FINAL | TEXT, b"x" * 200 + b"\xed\xa0\x80")], 1007),  # half of a surrogate pair
        ([frame(TEXT, b"\xc3"), frame(FINAL | CONTINUATION, b"")], 1007),
    ],
)
def test_what_breaks_the_rules_is_refused(frames: list[bytes], code: int) -> None:
    data = b"".join(frames)
    assert refusal(data)[0] == code
    assert refusal(*[data[index : index + 1] for index in range(len(data))])[0] == code


def test_a_character_may_be_split_between_frames() -> None:
    assert read(frame(TEXT, b"\xc3"), frame(FINAL | CONTINUATION, b"\xa9")) == ["é"]


def test_what_came_before_a_broken_rule_is_taken() -> None:
    messages = FrameReader(BOUND).read(frame(FINAL | TEXT, b"a") + frame(FINAL | 3))
    assert next(messages) == "a"
    with pytest.raises(BrokenRule):
        next(messages)


@pytest.mark.parametrize("size", [200, 66_000])
def test_a_message_past_the_bound_is_refused_when_it_is_announced(size: int) -> None:
    data = frame(FINAL | TEXT, b"x" * size)
    assert read(data, bound=size) == ["x" * size]
    assert refusal(data[:14], bound=size - 1) == (1009, "MessageTooLarge")
    assert refusal(data, bound=size - 1) == (1009, "MessageTooLarge")
    assert refusal(b"\x81\xff" + b"\xff" * 8 + bytes(4)) == (1009, "MessageTooLarge")


def test_the_bound_is_one_of_the_whole_message() -> None:
    pieces = [frame(TEXT, b"x" * 60), frame(CONTINUATION, b"x" * 30)]
    assert read(*pieces, frame(FINAL | CONTINUATION, b"x" * 10), bound=100) == ["x" * 100]
    assert refusal(*pieces, frame(FINAL | CONTINUATION, b"x" * 11)[:6], bound=100)[0] == 1009
    assert read(*pieces, frame(FINAL | PING, b"y" * 50), bound=100) == [(PING, b"y" * 50)]


def test_the_bound_may_change_between_two_messages_of_one_read() -> None:
    reader, taken = FrameReader(10), list[Message]()
    for message in reader.read(frame(FINAL | TEXT, b"Connect") + frame(FINAL | TEXT, b"x" * 1_000)):
        taken.append(message)
        reader.message_size_bytes_max = BOUND
    assert taken == ["Connect", "x" * 1_000]


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", 1005),
        *[(code.to_bytes(2), code) for code in (1000, 1001, 1011, 1014, 3000, 4999)],
        ((1000).to_bytes(2) + "tschüß".encode(), 1000),
    ],
)
def test_the_code_of_a_close_frame_is_read(payload: bytes, code: int) -> None:
    assert close_code(payload) == code


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"\x03", 1002),
        *[(code.to_bytes(2), 1002) for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535)],
        ((1000).to_bytes(2) + b"\xff", 1007),
    ],
)
def test_a_close_frame_that_may_not_be_sent_is_refused(payload: bytes, code: int) -> None:
    with pytest.raises(BrokenRule) as broken:
        close_code(payload)
    assert broken.value.code == code


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "8100"),
        (125, "817d"),
        (126, "817e007e"),
        (65_535, "817effff"),
        (65_536, "817f0000000000010000"),
    ],
)
def test_headers_say_the_size_as_shortly_as_they_can(size: int, expected: str) -> None:
    assert header(TEXT, size).hex() == expected


# -- the cases of the Autobahn suite that are not above: what is text, pieces, and what comes after the end

GOOD_TEXTS = [
    "κόσμε",
    "Hello-µ@ßöäüàá-UTF-8!!",
    "\x7f",
    "\x80",
    "\u07ff",
    "\u0800",
    "\ud7ff",
    "\ue000",
    "\ufffd",
    "\ufffe",  # no character, and yet it may be sent
    "\uffff",
    "\U00010000",
    "\U0010fffd",
    "\U0010ffff",
    "\0",
]
BAD_TEXTS = [
    "80",  # a continuation that continues nothing
    "bf",
    "8080",
    "c3",  # cut off
    "ce",
    "e282",
    "f09f98",
    "c328",  # not continued
    "e28220",
    "c080",  # overlong: NUL
    "c1bf",
    "e08080",
    "e09fbf",
    "f0808080",
    "f08fbfbf",
    "eda080",  # halves of surrogate pairs
    "edbfbf",
    "eda080edb080",
    "f4908080",  # past the last code point
    "f5808080",
    "f888808080",  # five and six bytes, of an older definition
    "fc8480808080",
    "fe",
    "ff",
    "fffe",
    "cebae1bdb9cf83cebcceb5eda080656469746564",
]


@pytest.mark.parametrize("text", GOOD_TEXTS, ids=ascii)
@pytest.mark.parametrize("filling", ["", "x" * 200])
def test_every_character_may_be_sent_whole_or_in_pieces(text: str, filling: str) -> None:
    payload = (filling + text).encode()
    pieces = [frame(TEXT)] + [frame(CONTINUATION, payload[n : n + 1]) for n in range(len(payload))]
    assert read(frame(FINAL | TEXT, payload)) == [filling + text]
    assert read(*pieces, frame(FINAL | CONTINUATION)) == [filling + text]


@pytest.mark.parametrize("sequence", BAD_TEXTS)
@pytest.mark.parametrize(("before", "behind"), [(b"", b""), (b"x" * 200, b""), ("é".encode(), b"x"), (b"", b"x" * 200)])
def test_what_is_no_text_is_refused_whole_or_in_pieces(sequence: str, before: bytes, behind: bytes) -> None:
    payload = before + bytes.fromhex(sequence) + behind
    pieces = [frame(TEXT)] + [frame(CONTINUATION, payload[n : n + 1]) for n in range(len(payload))]
    assert refusal(frame(FINAL | TEXT, payload)) == (1007, "InvalidText")
    assert refusal(*pieces, frame(FINAL | CONTINUATION)) == (1007, "InvalidText")
    assert code_of_refusal((1000).to_bytes(2) + payload) == 1007


def code_of_refusal(close_payload: bytes) -> int | None:
    try:
        close_code(close_payload)
    except BrokenRule as broken:
        return broken.code
    return None


@pytest.mark.parametrize("piece_size", [1_300, 4_001, 65_536])
def test_a_long_message_may_come_in_any_number_of_frames(piece_size: int) -> None:
    payload = b"*" * 65_536
    places = range(0, len(payload), piece_size)
    frames = [
        frame(
            (TEXT if place == 0 else CONTINUATION) | (FINAL if place == places[-1] else 0), payload[place:][:piece_size]
        )
        for place in places
    ]
    assert read(*frames) == [payload.decode()]
    with_pings = [piece for each in frames for piece in (each, frame(FINAL | PING, b"?"))]
    assert read(*with_pings)[-2:] == [payload.decode(), (PING, b"?")]


@pytest.mark.parametrize("payload", [b"", b"Hello", bytes(range(125)), b"\xfe" * 125])
@pytest.mark.parametrize("opcode", [PING, PONG])
def test_pings_and_pongs_hold_any_bytes(opcode: int, payload: bytes) -> None:
    assert read(frame(FINAL | opcode, payload) * 10) == [(opcode, payload)] * 10


def test_every_code_of_a_close_frame_is_one_that_may_be_sent_or_refused() -> None:
    taken = [code for code in range(1 << 16) if code_of_refusal(code.to_bytes(2)) is None]
    reserved = {1004, 1005, 1006}  # 1015 and up are not given to anybody below 3000
    assert taken == [*sorted(set(range(1000, 1015)) - reserved), *range(3000, 5000)]


@pytest.mark.parametrize(
    "behind", [frame(FINAL | TEXT, b"{}"), frame(FINAL | PING, b"x"), frame(FINAL | 3), b"\xff" * 99]
)
@pytest.mark.parametrize("code", [b"", (1000).to_bytes(2), (4000).to_bytes(2) + b"bye"])
async def test_nothing_is_answered_after_the_peers_close_frame(behind: bytes, code: bytes) -> None:
    async with served(FakeEngine()) as server:
        url = server.url("")
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(
            b"GET /api/sync HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        writer.write(frame(FINAL | CLOSE, code) + behind)
        async with asyncio.timeout(10):
            assert await reader.read() == bytes((FINAL | CLOSE, 2)) + (1000).to_bytes(2)
        writer.close()
