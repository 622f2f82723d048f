"""permessage-deflate: what comes out is what went in, and what many are sent is compressed once."""

import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.limits import Limits
from engine.server import deflate, frames
from engine.server.deflate import Deflater, is_offered
from engine.server.frames import FrameReader
from engine.server.outgoing import ready
from tests.server.test_frames import BOUND, FINAL, frame, refusal

COMPRESSED_TEXT = FINAL | frames.COMPRESSED | frames.TEXT


def inflated(data: bytes) -> tuple[bool, bytes]:
    """Whether one frame of the server is compressed, and what it says."""
    length, start = data[1], 2
    if length > 125:
        start += 2 if length == 126 else 8
        length = int.from_bytes(data[2:start])
    payload = data[start:]
    assert len(payload) == length
    if data[0] == FINAL | frames.TEXT:
        return False, payload
    assert data[0] == COMPRESSED_TEXT
    inflator = zlib.decompressobj(-15)
    said = inflator.decompress(payload + b"\0\0\xff\xff")
    assert not inflator.unused_data
    return True, said


def deflated(text: bytes) -> bytes:
    """As a browser does it."""
    deflater = zlib.compressobj(wbits=-15)
    return (deflater.compress(text) + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\0\0\xff\xff")


def read(*pieces: bytes, bound: int = BOUND) -> list[str | tuple[int, bytes]]:
    reader = FrameReader(bound, inflates=True)
    return [message for piece in pieces for message in reader.read(piece)]


@pytest.fixture
def compressed_count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many pieces were compressed so far."""
    count, make = 0, zlib.compressobj

    def counted(*args: int, **options: int) -> object:
        nonlocal count
        count += 1
        return make(*args, **options)

    monkeypatch.setattr(deflate.zlib, "compressobj", counted)
    return lambda: count


# -- out ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.sampled_from([0, 1, 200, 1_023, 1_024, 5_000, 70_000, (1 << 20) + 1]), min_size=1, max_size=4))
def test_what_is_sent_is_what_was_said(sizes: list[int]) -> None:
    message = tuple((bytes(range(32, 127)) * (size // 95 + 1))[:size] for size in sizes)
    is_compressed, said = inflated(Deflater(ready, Limits()).ready(message))
    assert said == b"".join(message)
    assert is_compressed is (sum(sizes) >= 1_024)


def test_a_large_piece_is_compressed_once_for_all_who_get_it(compressed_count: Callable[[], int]) -> None:
    deflater, result = Deflater(ready, Limits()), b'"a page of chat"' * 1_000
    sizes = set()
    for number in range(100):
        head = b'{"start":%d,' % number
        data = deflater.ready((head, result, b"]}"))
        assert inflated(data) == (True, head + result + b"]}")
        sizes.add(len(data))
    assert compressed_count() == 1
    assert max(sizes) < len(result) / 20


def test_what_is_kept_is_bounded(compressed_count: Callable[[], int]) -> None:
    deflater = Deflater(ready, Limits(deflated_cache_size_bytes=40_000))
    results = [b"%d" % number * 10_000 for number in range(10)]
    for _ in range(2):
        for result in results:
            assert inflated(deflater.ready((result,)))[1] == result
    assert compressed_count() == 20, "each was let go before it came again"
    assert len(deflater._kept) == 3
    assert deflater._kept_size_bytes == sum(len(piece) + len(block) for piece, block in deflater._kept.values())


def test_a_piece_past_the_bound_goes_as_it_is(compressed_count: Callable[[], int]) -> None:
    deflater = Deflater(ready, Limits(deflated_piece_size_bytes_max=5_000))
    for size, count in ((5_000, 1), (5_001, 1)):
        assert inflated(deflater.ready((b"x" * size,))) == (True, b"x" * size)
        assert compressed_count() == count


@pytest.mark.parametrize(
    ("offers", "is_taken"),
    [
        ([], False),
        ([""], False),
        (["permessage-deflate"], True),
        (["permessage-deflate; client_max_window_bits"], True),
        (["permessage-deflate; client_max_window_bits=12;server_no_context_takeover"], True),
        (["x-webkit-deflate-frame, permessage-deflate"], True),
        (["x-webkit-deflate-frame", "permessage-deflate; client_no_context_takeover"], True),
        (["permessage-deflate; server_max_window_bits=10"], False),
        (["permessage-deflate; server_max_window_bits=10, permessage-deflate"], True),
        (["permessage-deflate; later_invention"], False),
        (["permessage-bzip2"], False),
    ],
)
def test_an_offer_is_taken_if_all_of_it_can_be_kept(offers: list[str], is_taken: bool) -> None:
    assert is_offered(offers) is is_taken


# -- in ----------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=300), st.integers(0, 40))
def test_what_a_client_compressed_is_read(text: str, place: int) -> None:
    payload = deflated(text.encode())
    assert read(frame(COMPRESSED_TEXT, payload), frame(FINAL | frames.TEXT, text.encode())) == [text, text]
    pieces = [frame(frames.COMPRESSED | frames.TEXT, payload[:place]), frame(FINAL, payload[place:])]
    assert read(*pieces, frame(FINAL | frames.TEXT, b"plain")) == [text, "plain"]


def test_a_bomb_is_not_unfolded() -> None:
    bomb = deflated(b"x" * 1_000_000)
    assert len(bomb) < 2_000
    assert refusal_of(frame(COMPRESSED_TEXT, bomb), bound=999_999) == (1009, "MessageTooLarge")
    assert read(frame(COMPRESSED_TEXT, bomb), bound=1_000_000) == ["x" * 1_000_000]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(COMPRESSED_TEXT, b"\xff\xff\xff"), 1002),
        (frame(COMPRESSED_TEXT, deflated(b"\xff")), 1007),
        (frame(COMPRESSED_TEXT | 0x20, deflated(b"x")), 1002),
        (frame(FINAL | frames.COMPRESSED | frames.PING), 1002),
        (frame(frames.TEXT, b"a") + frame(FINAL | frames.COMPRESSED, b"b"), 1002),
    ],
)
def test_what_is_compressed_wrongly_is_refused(data: bytes, code: int) -> None:
    assert refusal_of(data)[0] == code


def test_nothing_compressed_is_read_unless_it_was_agreed_on() -> None:
    assert refusal(frame(COMPRESSED_TEXT, deflated(b"x"))) == (1002, "InvalidFrame")


def refusal_of(data: bytes, *, bound: int = BOUND) -> tuple[int, str]:
    with pytest.raises(frames.BrokenRule) as broken:
        read(data, bound=bound)
    return broken.value.code, broken.value.reason
