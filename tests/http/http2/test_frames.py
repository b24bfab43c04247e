"""Taking HTTP/2 apart into frames, and what is refused there already."""

import itertools
import struct
from collections.abc import Callable
from typing import Any

import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import Frame as ReferenceFrame
from hyperframe.frame import GoAwayFrame, WindowUpdateFrame
from hypothesis import given
from hypothesis import strategies as st

from trio_exchange._http.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    GOAWAY,
    HEADERS,
    MAX_FRAME_SIZE,
    MOST_FRAMES_IN_BLOCK,
    PADDED,
    PING,
    PRIORITIZED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    FloodGuard,
    Frame,
    FrameSplitter,
    Goaway,
    Violation,
    content_of,
    fragment_of,
    name_of,
    parse_goaway,
    window_update,
)


def raw(kind: int, flags: int = 0, stream_id: int = 0, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + struct.pack(">BBL", kind, flags, stream_id) + body


PREFACE = raw(SETTINGS)


def split(*pieces: bytes, highest: int = 5) -> tuple[list[Frame], Violation | None]:
    """The frames found, and what ended the search."""
    splitter = FrameSplitter()
    frames: list[Frame] = []
    try:
        for piece in pieces:
            frames.extend(iter(splitter.split(piece, highest)))
    except Violation as exc:
        return frames, exc
    return frames, None


def refused(*pieces: bytes, highest: int = 5) -> tuple[ErrorCodes, str]:
    """What ends the search: its code, and what it says."""
    _, violation = split(*pieces, highest=highest)
    assert violation is not None
    return violation.code, str(violation)


def refused_by(function: Callable[..., object], *args: object) -> ErrorCodes:
    with pytest.raises(Violation) as caught:
        function(*args)
    return caught.value.code


def collect(pieces: list[bytes]) -> tuple[list[Frame], tuple[ErrorCodes, str] | None]:
    """As `split`, frame by frame, so that those before a violation count."""
    splitter = FrameSplitter()
    frames: list[Frame] = []
    try:
        for piece in pieces:
            for frame in splitter.split(piece, 5):
                frames.append(frame)
    except Violation as exc:
        return frames, (exc.code, str(exc))
    return frames, None


FRAMES = st.builds(
    raw,
    st.integers(0, 12),
    st.integers(0, 255),
    st.sampled_from([0, 1, 1, 3, 5, 7, 2, 2**31 - 1]),
    st.binary(max_size=30),
)


@given(st.lists(FRAMES, max_size=8), st.binary(max_size=20), st.lists(st.integers(0, 400), max_size=12))
def test_however_it_is_split_it_gives_the_same(frames: list[bytes], tail: bytes, cuts: list[int]) -> None:
    data = PREFACE + b"".join(frames) + tail
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(places)]
    whole = collect([data])
    assert collect(pieces) == whole
    assert collect([data[i : i + 1] for i in range(len(data))]) == whole


@given(st.lists(FRAMES, max_size=8))
def test_what_is_accepted_is_what_was_sent(frames: list[bytes]) -> None:
    found, violation = collect([PREFACE, *frames])
    sent = [PREFACE, *frames]
    assert [frame.raw for frame in found] == sent[: len(found)]
    assert violation is not None or len(found) == len(sent)
    for frame in found:
        length = int.from_bytes(frame.raw[:3], "big")
        assert frame.length == length == len(frame.raw) - 9
        assert frame.kind == frame.raw[3]
        assert frame.flags == frame.raw[4]
        assert frame.stream_id == int.from_bytes(frame.raw[5:9], "big") & 0x7FFFFFFF


@given(st.binary(max_size=200))
def test_nothing_but_a_violation_is_raised(noise: bytes) -> None:
    collect([noise])
    collect([PREFACE + noise])


def test_the_reserved_bit_is_ignored() -> None:
    frames, violation = split(PREFACE, raw(DATA, 0, 0x80000001, b"x"))
    assert violation is None
    assert frames[-1].stream_id == 1


@pytest.mark.parametrize("kind", [DATA, HEADERS, RST_STREAM, PUSH_PROMISE, WINDOW_UPDATE, PING, GOAWAY])
@pytest.mark.parametrize("stream_id", [2, 4, 7, 2**31 - 1])
def test_a_stream_that_was_never_opened(kind: int, stream_id: int) -> None:
    frames, violation = split(PREFACE, raw(kind, END_HEADERS, stream_id))
    assert len(frames) == 1
    assert violation is not None
    assert violation.code == ErrorCodes.PROTOCOL_ERROR
    assert f"stream {stream_id}, which was never opened" in str(violation)


@pytest.mark.parametrize("kind", [PRIORITY, CONTINUATION + 1, 0xFA])
def test_some_frames_may_come_on_any_stream(kind: int) -> None:
    frames, violation = split(PREFACE, raw(kind, 0, 8), raw(kind, 0, 99))
    assert violation is None
    assert len(frames) == 3


def test_a_frame_may_have_the_largest_size_and_no_more() -> None:
    frames, violation = split(PREFACE, raw(DATA, 0, 1, bytes(MAX_FRAME_SIZE)))
    assert violation is None
    assert frames[-1].length == MAX_FRAME_SIZE
    # Only its header has arrived.
    assert refused(PREFACE, raw(DATA, 0, 1, bytes(MAX_FRAME_SIZE + 1))[:9])[0] == ErrorCodes.FRAME_SIZE_ERROR


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (raw(PING, 0, 0, bytes(8)), "instead of SETTINGS"),
        (raw(SETTINGS, ACK), "instead of SETTINGS"),
        (b"HTTP/1.1 400 Bad Request\r\nX: y\r\n", "it sent b'HTTP/1.1 400 Bad Request'"),
        (b"HTTP/1.1 " + b"x" * 100_000, "it sent b'HTTP/1.1 xxx"),
        (b"\xff" * 9, "instead of SETTINGS"),
    ],
)
def test_what_comes_first_must_be_settings(first: bytes, message: str) -> None:
    frames, violation = split(first)
    assert not frames
    assert violation is not None
    assert violation.code == ErrorCodes.PROTOCOL_ERROR
    assert message in str(violation)
    assert len(str(violation)) < 200


def test_a_header_block_in_pieces() -> None:
    pieces = [raw(HEADERS, 0, 1), raw(CONTINUATION, 0, 1), raw(CONTINUATION, END_HEADERS, 1)]
    frames, violation = split(PREFACE, *pieces, raw(DATA, 0, 1), *pieces)
    assert violation is None
    assert len(frames) == 8


@pytest.mark.parametrize("start", [HEADERS, PUSH_PROMISE])
@pytest.mark.parametrize(
    "intruder",
    [*(raw(kind, 0xFF & ~ACK, 1) for kind in range(13) if kind != CONTINUATION), raw(CONTINUATION, 0, 3)],
)
def test_nothing_comes_between_the_pieces_of_a_header_block(start: int, intruder: bytes) -> None:
    frames, violation = split(PREFACE, raw(start, 0, 1), intruder)
    assert len(frames) == 0 or violation is not None
    assert violation is not None
    assert violation.code == ErrorCodes.PROTOCOL_ERROR
    assert "in the middle of a header block" in str(violation)


@pytest.mark.parametrize("before", [b"", raw(HEADERS, END_HEADERS, 1), raw(DATA, 0, 1)])
@pytest.mark.parametrize("stream_id", [0, 1])
def test_a_continuation_of_nothing(before: bytes, stream_id: int) -> None:
    code, message = refused(PREFACE + before + raw(CONTINUATION, END_HEADERS, stream_id))
    assert code == ErrorCodes.PROTOCOL_ERROR
    assert "outside of a header block" in message


def test_a_header_block_has_a_limited_number_of_frames() -> None:
    block = raw(HEADERS, 0, 1) + raw(CONTINUATION, 0, 1) * (MOST_FRAMES_IN_BLOCK - 2)
    assert split(PREFACE, block + raw(CONTINUATION, END_HEADERS, 1))[1] is None
    assert refused(PREFACE, block + raw(CONTINUATION, 0, 1) * 2)[0] == ErrorCodes.ENHANCE_YOUR_CALM


def test_a_settings_ack_is_empty() -> None:
    assert split(PREFACE, raw(SETTINGS, ACK))[1] is None
    assert refused(PREFACE, raw(SETTINGS, ACK, 0, bytes(6)))[0] == ErrorCodes.FRAME_SIZE_ERROR


# -- DATA.


@given(st.binary(max_size=50), st.none() | st.integers(0, 255))
def test_the_content_of_data(content: bytes, padding: int | None) -> None:
    flags = 0 if padding is None else PADDED
    body = content if padding is None else bytes([padding]) + content + bytes(padding)
    assert content_of(Frame(DATA, flags, 1, raw(DATA, flags, 1, body))) == content


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", ErrorCodes.FRAME_SIZE_ERROR),
        (b"\x01", ErrorCodes.PROTOCOL_ERROR),
        (b"\x05four", ErrorCodes.PROTOCOL_ERROR),
        (b"\xfffour", ErrorCodes.PROTOCOL_ERROR),
    ],
)
def test_bad_padding(body: bytes, code: ErrorCodes) -> None:
    assert refused_by(content_of, Frame(DATA, PADDED, 1, raw(DATA, PADDED, 1, body))) == code


# -- Header blocks.


@given(st.binary(max_size=50), st.none() | st.integers(0, 255), st.booleans())
def test_the_fragment_of_headers(fragment: bytes, padding: int | None, prioritized: bool) -> None:
    flags = (0 if padding is None else PADDED) | (PRIORITIZED if prioritized else 0)
    body = (b"prior" if prioritized else b"") + fragment
    if padding is not None:
        body = bytes([padding]) + body + bytes(padding)
    assert fragment_of(Frame(HEADERS, flags, 1, raw(HEADERS, flags, 1, body))) == fragment


@given(st.binary(max_size=50), st.integers(0, 255))
def test_a_continuation_has_neither_padding_nor_priority(fragment: bytes, flags: int) -> None:
    assert fragment_of(Frame(CONTINUATION, flags, 1, raw(CONTINUATION, flags, 1, fragment))) == fragment


@pytest.mark.parametrize(
    ("flags", "body", "code"),
    [
        (PADDED, b"", ErrorCodes.FRAME_SIZE_ERROR),
        (PADDED, b"\x01", ErrorCodes.PROTOCOL_ERROR),
        (PADDED, b"\x05four", ErrorCodes.PROTOCOL_ERROR),
        (PRIORITIZED, b"four", ErrorCodes.FRAME_SIZE_ERROR),
        (PADDED | PRIORITIZED, b"\x01fourX", ErrorCodes.FRAME_SIZE_ERROR),
    ],
)
def test_headers_without_room_for_what_they_announce(flags: int, body: bytes, code: ErrorCodes) -> None:
    assert refused_by(fragment_of, Frame(HEADERS, flags, 1, raw(HEADERS, flags, 1, body))) == code


# -- GOAWAY, WINDOW_UPDATE, names.


def goaway_frame(stream_id: int, body: bytes) -> Frame:
    return Frame(GOAWAY, 0, stream_id, raw(GOAWAY, 0, stream_id, body))


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=50))
def test_goaway_is_read_as_it_was_written(last: int, code: int, debug: bytes) -> None:
    data = GoAwayFrame(last_stream_id=last, error_code=code, additional_data=debug).serialize()
    frames, violation = split(PREFACE, data)
    assert violation is None
    assert parse_goaway(frames[1]) == Goaway(last, code, debug)


def test_the_reserved_bit_of_goaway_is_ignored() -> None:
    assert parse_goaway(goaway_frame(0, b"\x80\0\0\x05" + bytes(4))).last_stream_id == 5


@pytest.mark.parametrize(
    ("stream_id", "length", "code"),
    [
        (0, 7, ErrorCodes.FRAME_SIZE_ERROR),
        (0, 0, ErrorCodes.FRAME_SIZE_ERROR),
        (1, 8, ErrorCodes.PROTOCOL_ERROR),
    ],
)
def test_a_malformed_goaway(stream_id: int, length: int, code: ErrorCodes) -> None:
    assert refused_by(parse_goaway, goaway_frame(stream_id, bytes(length))) == code


@given(st.sampled_from([0, 1, 2**31 - 1]), st.integers(1, 2**31 - 1))
def test_a_window_update_is_one(stream_id: int, increment: int) -> None:
    data = window_update(stream_id, increment)
    frame, length = ReferenceFrame.parse_frame_header(memoryview(data[:9]))
    frame.parse_body(memoryview(data[9:]))
    update: Any = frame
    assert isinstance(frame, WindowUpdateFrame)
    assert (length, frame.stream_id, update.window_increment) == (4, stream_id, increment)


def test_the_names_of_errors() -> None:
    assert name_of(ErrorCodes.REFUSED_STREAM) == "REFUSED_STREAM"
    assert name_of(0xBAD) == "error 0xbad"


# -- Patience.


def test_patience_comes_to_an_end() -> None:
    flood_guard = FloodGuard(0.0)
    for _ in range(FloodGuard.LIMIT):
        flood_guard.spend(1.0)
    assert refused_by(flood_guard.spend, 9.9) == ErrorCodes.ENHANCE_YOUR_CALM


def test_patience_is_renewed_after_a_while() -> None:
    flood_guard = FloodGuard(0.0)
    for _ in range(FloodGuard.LIMIT):
        flood_guard.spend(1.0)
    flood_guard.spend(FloodGuard.SECONDS)
    for _ in range(FloodGuard.LIMIT):
        flood_guard.spend(FloodGuard.SECONDS + 1)
    with pytest.raises(Violation):
        flood_guard.spend(2 * FloodGuard.SECONDS - 0.1)


def test_what_serves_a_request_earns_patience() -> None:
    flood_guard = FloodGuard(0.0)
    for _ in range(10 * FloodGuard.LIMIT):
        flood_guard.spend(1.0, FloodGuard.EARNED)
        flood_guard.earn()


def test_patience_is_not_saved() -> None:
    flood_guard = FloodGuard(0.0)
    for _ in range(100):
        flood_guard.earn()
    flood_guard.spend(1.0, FloodGuard.LIMIT)
    with pytest.raises(Violation):
        flood_guard.spend(1.0)
