"""What HTTP/1.1 recognizes without h11, h11 accepts; and requests are written as h11 would write them."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import h11
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.inputs import Script
from tests.fuzz.reference import LIMIT, chunks, chunks_by_h11, h11_alone, head_by_h11, heads
from tests.fuzz.targets import _run, _witness
from tests.harness.checks import internals
from tests.harness.contents import Pieces
from tests.harness.peers import respond, transcript
from trio_exchange import ConnectionPool, LocalProtocolError, RemoteProtocolError, Request
from trio_exchange._http.http11_bodies import ChunkedBody
from trio_exchange._http.http11_fallback import HeadJudge
from trio_exchange._http.http11_heads import ReceivedHead, framing_of, may_persist, recognize
from trio_exchange._http.http11_sending import ContentWriter, EncodedFields, frame_content
from trio_exchange._http.request import PreparedRequest
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "http://example.com/"
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
KIB = 1024

examples = settings(deadline=None, max_examples=500)


# -- Heads.


STATUS_LINES = st.sampled_from(
    [
        OK,
        b"HTTP/1.1 404 Not Found\r\n",
        b"HTTP/1.1 204 No Content\r\n",
        b"HTTP/1.1 304 \r\n",
        b"HTTP/1.1 999 \xe9\t x \r\n",
        b"HTTP/1.1 200\r\n",
        b"HTTP/1.1 100 Continue\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n",
        b"HTTP/1.1 099 \r\n",
        b"HTTP/1.1  200 OK\r\n",
        b"HTTP/1.0 200 OK\r\n",
        b"HTTP/1.2 200 OK\r\n",
        b"HTTP/1.1 200 OK\n",
        b"http/1.1 200 OK\r\n",
        b"HTTP/1.1 200 O\x00K\r\n",
        b"HTTP/1.1 200 O\x01K\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n",
    ]
)
NAMES = st.one_of(
    st.sampled_from(
        [
            b"Content-Length",
            b"content-length",
            b"Transfer-Encoding",
            b"TRANSFER-ENCODING",
            b"Connection",
            b"cOnNection",
            b"Upgrade",
            b"Date",
            b"X-A!#$%&'*+.^_`|~",
            b"Content-Length ",
            b" folded",
            b"",
            b"n\xe4me",
            b"a\x7f",
        ]
    ),
    st.binary(max_size=4),
)
VALUES = st.one_of(
    st.sampled_from(
        [
            b"5",
            b"0",
            b"005",
            b"5, 5",
            b"5, 6",
            b"+5",
            b"-1",
            b"1" * 20,
            b"1" * 21,
            b"\xb2",
            b"chunked",
            b"Chunked",
            b"gzip, chunked",
            b"close",
            b"Close, x",
            b"x,\tclose",
            b"keep-alive",
            b"closed",
            b"",
            b"a \t b",
            b"a:b",
            b"\xe9\xff",
            b"a\x00",
            b"a\x0b",
            b"a\x7f",
            b"a\x85b",
            b"a\rb",
        ]
    ),
    st.binary(max_size=6),
)
LINES = st.builds(
    lambda name, colon, value, end: name + colon + value + end,
    NAMES,
    st.sampled_from([b": "] * 6 + [b":", b":  ", b":\t", b" : ", b""]),
    VALUES,
    st.sampled_from([b"\r\n"] * 8 + [b"\n", b" \r\n", b"\t\r\n", b"\r\n ", b"\r\r\n"]),
)
ENDS = st.sampled_from([b"\r\n"] * 6 + [b"\n", b"", b"\r"])
AFTER = st.one_of(st.just(b""), st.binary(max_size=20), st.sampled_from([OK, b"\r\n\r\n", b"a\r\n\r\n"]))


@st.composite
def responses(draw: st.DrawFn) -> bytes:
    """A head, well-formed or odd, and anything after it; some with bytes changed anywhere."""
    lines = draw(st.lists(LINES, max_size=4))
    data = bytearray(draw(STATUS_LINES) + b"".join(lines) + draw(ENDS) + draw(AFTER))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


@given(responses())
@examples
def test_h11_accepts_what_is_recognized(data: bytes) -> None:
    found, expected = heads(data)
    assert found == expected


TOKENS = st.text("!#$%&'*+-.^_`|~09AZaz", min_size=1, max_size=12).map(str.encode)
TEXT = st.lists(st.sampled_from([b"a", b"~", b"!", b"\x80", b"\xff", b" ", b"\t", b":"]), max_size=8).map(
    lambda parts: b"".join(parts).strip()
)
FRAMING = st.sampled_from(
    [(), ((b"content-LENGTH", b"0123"),), ((b"Transfer-encoding", b"chunked"),), ((b"Connection", b"close"),)]
)


@given(
    st.integers(200, 999),
    TEXT,
    st.lists(st.tuples(TOKENS.map(lambda name: b"X-" + name), TEXT), max_size=6),
    FRAMING,
    AFTER,
)
@examples
def test_what_is_common_is_recognized(
    status: int, reason: bytes, fields: list[tuple[bytes, bytes]], framing: Any, after: bytes
) -> None:
    headers = [*fields, *framing]
    lines = b"".join(name + (b": " if value else b":") + value + b"\r\n" for name, value in headers)
    data = b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (status, reason, lines, after)
    found, expected = heads(data)
    assert found is not None
    assert found == expected
    assert found.head == (b"HTTP/1.1", status, reason, headers)
    assert found.rest == after


@pytest.mark.parametrize(
    "data",
    [
        b"",
        OK,
        OK + b"\r",
        OK + b"\n",
        b"HTTP/1.1 200 OK\n\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 \r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n",
        OK + b"Content-Length: 5, 5\r\n\r\n",
        OK + b"Content-Length: " + b"1" * 21 + b"\r\n\r\n",
        OK + b"Content-Length: +1\r\n\r\n",
        OK + b"Content-Length: \xb2\r\n\r\n",
        OK + b"Content-Length:\r\n\r\n",
        OK + b"Transfer-Encoding: Chunked\r\n\r\n",
        OK + b"Transfer-Encoding: gzip\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        OK + b"A : b\r\n\r\n",
        OK + b"A:  b\r\n\r\n",
        OK + b"A: b \r\n\r\n",
        OK + b"A: \r\n\r\n",
        OK + b"A: b\r\n c\r\n\r\n",
        OK + b"A: b\nC: d\r\n\r\n",
        OK + b"A: \x00\r\n\r\n",
        OK + b"A: \x01\r\n\r\n",
        OK + b"A: \x7f\r\n\r\n",
        OK + b"A: b\rc\r\n\r\n",
        OK + b"\xe4: b\r\n\r\n",
        OK + b": b\r\n\r\n",
        OK + b"A\r\n\r\n",
        b"\r\n" + OK + b"\r\n",
        OK + b"A: " + b"x" * LIMIT + b"\r\n\r\n",
    ],
)
def test_what_is_uncommon_is_left_to_h11(data: bytes) -> None:
    assert recognize(data, LIMIT) is None


def test_the_limit_is_that_of_the_head_alone() -> None:
    data = OK + b"A: b\r\n\r\n"
    assert recognize(data + b"x" * 100, len(data)) is not None
    assert recognize(data + b"x" * 100, len(data) - 1) is None


def _judge_head(pieces: list[bytes]) -> ReceivedHead | None:
    judge = HeadJudge(PREPARED, KIB * KIB)
    head = None
    for piece in pieces:
        assert head is None
        judge.feed(piece)
        try:
            head = judge.next_head()
        except RemoteProtocolError as exc:
            with pytest.raises(RemoteProtocolError, match=re.escape(str(exc))):
                judge.next_head()
            raise
    return head


def _cpu(function: Callable[[], object]) -> float:
    def once() -> float:
        start = time.thread_time()
        function()
        return time.thread_time() - start

    return min(once() for _ in range(5))


SHAPES: dict[str, tuple[bytes, bytes, bytes]] = {
    "short lines": (b"", b"A:b\r\n", b"\r\n"),
    "short lines, the last malformed": (b"", b"A:b\r\n", b"A\r\n\r\n"),
    "empty values": (b"", b"A:\r\n", b"\r\n"),
    "a long value": (b"A: ", b"x", b"\r\n\r\n"),
    "a long value with a control character": (b"A: ", b"x", b"\0\r\n\r\n"),
    "a long value of words": (b"A: ", b"x \t", b"x\r\n\r\n"),
    "a long value of words with a control character": (b"A: ", b"x \t", b"\0\r\n\r\n"),
    "white space after a value": (b"A: x", b" ", b"\r\n\r\n"),
    "white space only": (b"A:", b" \t", b"\r\n\r\n"),
    "white space before a control character": (b"A:", b" ", b"\0\r\n\r\n"),
    "a folded value with a control character": (b"A:", b"\r\n ", b"\0\r\n\r\n"),
    "a long name": (b"", b"a", b": b\r\n\r\n"),
    "a long name without a colon": (b"", b"a", b"\r\n\r\n"),
    "colons": (b"A", b":", b"\r\n\r\n"),
    "lengths": (b"", b"Content-Length: 5\r\n", b"\r\n"),
    "a long number": (b"Content-Length: ", b"9", b"\r\n\r\n"),
    "a long option": (b"Connection: ", b"close,", b"x\r\n\r\n"),
    "a head without an end": (b"", b"A:b\r\n", b""),
    "carriage returns": (b"A: ", b"\r", b"\r\n\r\n"),
}
PREPARED = PreparedRequest(Request("GET", URL))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_head_costs_no_more_than_with_the_judge(shape: str) -> None:
    first, repeated, last = SHAPES[shape]

    def head(size: int) -> bytes:
        return OK + first + repeated * (size // len(repeated)) + last

    def judge(data: bytes) -> None:
        with contextlib.suppress(RemoteProtocolError):
            _judge_head([data])

    small, large = head(25 * KIB), head(100 * KIB)
    cost = _cpu(lambda: recognize(large, KIB * KIB))
    # The machine may be busy, hence the slack. A quadratic cost would be seconds.
    assert cost <= _cpu(lambda: judge(large)) + 0.02
    assert cost <= 8 * _cpu(lambda: recognize(small, KIB * KIB)) + 0.02


# -- The reuse of the connection.


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("asked", [None, "close", "keep-alive", "x, CLOSE", "closed", "x,,close"])
@pytest.mark.parametrize("said", [None, b"close", b"Keep-Alive", b"x ,\tClose", b"closed", b",close,"])
def test_h11_closes_what_must_not_persist(
    version: bytes, method: str, asked: str | None, said: bytes | None
) -> None:
    head = b"HTTP/%b 200 OK\r\nContent-Length: 0\r\n" % version
    if said is not None:
        head += b"Connection: %b\r\n" % said
    headers = [("Host", "a")] if asked is None else [("Host", "a"), ("connection", asked)]
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=headers))
    connection.send(h11.EndOfMessage())
    connection.receive_data(head + b"\r\n")
    connection.next_event()
    connection.next_event()
    received = head_by_h11(head + b"\r\n")
    assert received is not None
    fields = EncodedFields([(name.encode(), value.encode()) for name, value in headers])
    persists = may_persist(fields.closes, method.encode(), received.head, framing_of(received.head.headers))
    assert persists is (connection.our_state is h11.DONE)
    assert persists is (connection.their_state is h11.DONE)


@pytest.mark.parametrize(
    ("method", "data", "persists"),
    [
        (b"GET", OK + b"Content-Length: 5\r\n\r\n", True),
        (b"GET", b"HTTP/1.2 200 OK\r\nContent-Length: 5\r\n\r\n", True),
        (b"GET", OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", False),
        (b"HEAD", OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", False),
        (b"GET", b"HTTP/1.1 204 \r\nContent-Length: 5\r\n\r\n", False),
        (b"GET", b"HTTP/1.1 204 \r\nContent-Length: 0\r\n\r\n", True),
        (b"GET", b"HTTP/1.1 204 \r\nTransfer-Encoding: chunked\r\n\r\n", False),
        (b"GET", b"HTTP/1.1 304 \r\nContent-Length: 5\r\n\r\n", True),
        (b"CONNECT", b"HTTP/1.1 407 \r\nContent-Length: 5\r\n\r\n", False),
    ],
)
def test_ambiguity_means_closing(method: bytes, data: bytes, persists: bool) -> None:
    received = head_by_h11(data)
    assert received is not None
    assert may_persist(False, method, received.head, framing_of(received.head.headers)) is persists


# -- Chunks.


CHUNK = st.one_of(
    st.builds(
        lambda size, data: size % len(data) + b"\r\n" + data + b"\r\n",
        st.sampled_from([b"%x", b"%X", b"00%x", b"%015x"]),
        st.binary(min_size=1, max_size=40),
    ),
    st.sampled_from(
        [
            b"3;x=y\r\nabc\r\n",
            b"3 \r\nabc\r\n",
            b"%020x\r\nabc\r\n" % 3,
            b"%021x\r\nabc\r\n" % 3,
            b"3\nabc\r\n",
            b"3\r\nabc\n",
            b"3\r\nabcd\r\n",
            b"-3\r\nabc\r\n",
            b"0x3\r\nabc\r\n",
            b"\r\nabc\r\n",
            b"3\r\nab",
        ]
    ),
)
LAST = st.sampled_from(
    [
        b"0\r\n\r\n",
        b"000\r\n\r\n",
        b"0;x\r\n\r\n",
        b"0\r\nA: b\r\n\r\n",
        b"0\r\n\n",
        b"0\n\r\n",
        b"0\r\n",
        b"",
    ]
)


@given(st.lists(CHUNK, max_size=5), LAST, AFTER, st.lists(st.integers(0, 250), max_size=8), st.booleans())
@examples
def test_chunks_are_what_they_are_to_h11(
    parts: list[bytes], last: bytes, after: bytes, cuts: list[int], ends: bool
) -> None:
    data = b"".join(parts) + last + after
    for places in (sorted(cuts), range(len(data))):
        pieces = [
            data[start:end] for start, end in itertools.pairwise((0, *places, len(data))) if start < end
        ]
        if ends:
            pieces.append(b"")
        assert chunks(pieces) == chunks_by_h11(pieces)


@pytest.mark.parametrize("whole", [b"5\r\nhello\r\n00A\r\n0123456789\r\n0\r\n\r\n", b"0\r\n\r\n"])
def test_plain_chunks_need_no_judge(whole: bytes) -> None:
    for cut in range(len(whole)):
        body = ChunkedBody(whole[:cut], LIMIT)
        received = b""
        while piece := body.take():
            received += piece
        assert piece is None
        body.feed(whole[cut:])
        while body.has_arrived() and (piece := body.take()):
            received += piece
        assert piece == b""
        assert body.is_clean
        assert body._judge is None
        assert received == b"hello0123456789"[: 15 if len(whole) > 5 else 0]


def test_a_piece_of_a_chunk_is_not_waited_for() -> None:
    body = ChunkedBody(b"ff\r\nhel", LIMIT)
    assert body.has_arrived()
    assert body.has_arrived()
    assert body.take() == b"hel"
    assert not body.has_arrived()
    body.feed(b"lo")
    assert body.take() == b"lo"


def test_the_judge_of_a_body_is_called_once() -> None:
    body = ChunkedBody(b"1;x\r\na\r\n", LIMIT)
    assert body.take() == b"a"
    judge = body._judge
    assert judge is not None
    assert body.take() is None
    body.feed(b"")
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="before the end of the body"):
            body.take()
    assert body._judge is judge


# -- Long runs of white space, for which h11 would take quadratic time.


TOO_MUCH_SPACE = "1024 characters of white space in a row"
SIZES = pytest.mark.parametrize("size", [1, 7, 1023, 1024, 1025, 100_000])


def _split(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> bytearray:
    """What the h11 connections receive."""
    received = bytearray()
    receive = h11.Connection.receive_data

    def note(connection: h11.Connection, data: bytes) -> None:
        received.extend(data)
        receive(connection, data)

    monkeypatch.setattr(h11.Connection, "receive_data", note)
    return received


def _longest_run(data: bytes | bytearray) -> int:
    return max(map(len, re.findall(rb"[ \t\r\n]+", data)))


LONG_LINES = pytest.mark.parametrize(
    "line",
    [
        b"A:" + b" " * 3000 + b"\0\r\n",
        b"A:" + b"\t " * 1500 + b"b\x0bc\r\n",
        b"A: b" + b" " * 3000 + b"\x0c\r\n",
        b"A:" + b"\r" * 3000 + b"\r\n",
        b"A:" + b"\r\n " * 3000 + b"\0\r\n",
        b"A:" + b"\n\t" * 3000 + b"\0\r\n",
        b"A:" + b" " * 1024 + b"b\r\n",
        b"B: c\r\nA: b" + b" " * 1022 + b"\r\nB: c\r\n",
    ],
    ids=["NUL", "VT", "FF", "CR", "folded", "folded with LF", "before a value", "after a value"],
)


@LONG_LINES
@SIZES
def test_a_long_run_of_white_space_in_a_head_is_refused(parsed: bytearray, line: bytes, size: int) -> None:
    with pytest.raises(RemoteProtocolError, match=TOO_MUCH_SPACE):
        _judge_head(_split(OK + line + b"\r\n", size))
    assert _longest_run(parsed) == 1024


@LONG_LINES
@SIZES
def test_a_long_run_of_white_space_in_trailers_is_refused(parsed: bytearray, line: bytes, size: int) -> None:
    seen = chunks(_split(b"1\r\nx\r\n0\r\n" + line + b"\r\n", size))
    assert TOO_MUCH_SPACE in seen[-1]
    assert _longest_run(parsed) == 1024


@pytest.mark.parametrize(
    "line",
    [b";" + b" " * 3000 + b"\n\r\n", b" " * 1024 + b"\r\n", b"\n" * 3000],
    ids=["extension", "spaces", "LF"],
)
@SIZES
def test_a_long_run_of_white_space_in_the_size_of_a_chunk_is_refused(
    parsed: bytearray, line: bytes, size: int
) -> None:
    seen = chunks(_split(b"1" + line + b"x\r\n0\r\n\r\n", size))
    assert TOO_MUCH_SPACE in seen[-1]
    assert _longest_run(parsed) == 1024


def test_the_error_of_a_body_is_the_same_again() -> None:
    body = ChunkedBody(b"0\r\nA:" + b" " * 3000 + b"\0\r\n\r\n", LIMIT)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match=TOO_MUCH_SPACE):
            body.take()


SPACED_LINES = pytest.mark.parametrize(
    "line",
    [
        b"A:" + b" " * 1000 + b"b\r\n",
        b"A:" + b"\t" * 1023 + b"b\r\n",
        b"A: b" + b" \t" * 500 + b"c" + b" " * 1000 + b"d\r\n",
        b"A: b" + b" " * 1019 + b"\r\n",
        b"A: b" + b"\r\n " * 300 + b"c\r\n",
        b"A:" + b" " * 1000 + b"\0\r\n",
    ],
    ids=["before a value", "tabs", "in a value", "after a value", "folded", "NUL"],
)


@SPACED_LINES
@SIZES
def test_less_white_space_in_a_head_is_what_it_is_to_h11(line: bytes, size: int) -> None:
    data = OK + line + b"\r\n"
    expected = head_by_h11(data)
    if expected is None:
        with pytest.raises(RemoteProtocolError, match="header line"):
            _judge_head(_split(data, size))
    else:
        assert _judge_head(_split(data, size)) == expected


@SPACED_LINES
@SIZES
def test_less_white_space_in_trailers_is_what_it_is_to_h11(line: bytes, size: int) -> None:
    pieces = _split(b"1;" + b" " * 1000 + b"\r\nx\r\n0\r\n" + line + b"\r\n", size)
    assert chunks(pieces) == chunks_by_h11(pieces)


def test_what_follows_a_judged_head_may_be_white_space() -> None:
    rest = b" " * 3000
    head = _judge_head([b"HTTP/1.1 100 \r\n\r\n" + rest])
    assert head is not None
    assert head.rest == rest


SPACE = st.builds(
    lambda space, count, more: (space * count)[:3000] + more,
    st.sampled_from([b" ", b"\t", b"\r\n", b"\n ", b"\r\n\r\n", b"0\r\n"]),
    st.sampled_from([1, 500, 1022, 1023, 1024, 1025, 2048, 3000]),
    st.sampled_from([b"", b" ", b"x", b"\r"]),
)


@given(
    st.lists(SPACE, min_size=1, max_size=3),
    st.sampled_from([b"", b";x"]),
    st.sampled_from([b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"", b" "]),
    st.sampled_from([b"", b" " * 3000]),
    st.lists(st.integers(0, 9000), max_size=8),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_chunks_of_white_space_are_what_they_are_to_h11(
    parts: list[bytes], extension: bytes, last: bytes, after: bytes, cuts: list[int], ends: bool
) -> None:
    data = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts) + last
    if last.startswith(b"0"):
        data += after
    places = (0, *sorted(cut for cut in cuts if cut < len(data)), len(data))
    pieces = [data[start:end] for start, end in itertools.pairwise(places) if start < end]
    for sent in (pieces, _split(data, 7)):
        if ends:
            sent = [*sent, b""]
        assert chunks(sent) == chunks_by_h11(sent)


@given(
    st.integers(1, 150),
    st.lists(st.sampled_from([b" " * 511, b" " * 512, b"\r\n ", b"\t", b"b"]), max_size=8),
    st.lists(st.integers(0, 4000), max_size=8),
)
@examples
def test_white_space_is_refused_however_it_arrives(name: int, parts: list[bytes], cuts: list[int]) -> None:
    def verdict(pieces: list[bytes]) -> ReceivedHead | str | None:
        try:
            return _judge_head(pieces)
        except RemoteProtocolError as exc:
            return str(exc)

    data = OK + b"A" * name + b":" + b"".join(parts) + b"\0\r\n\r\n"
    places = (0, *sorted(cut for cut in cuts if cut < len(data)), len(data))
    pieces = [data[start:end] for start, end in itertools.pairwise(places) if start < end]
    seen = verdict([data])
    assert verdict(pieces) == seen
    assert isinstance(seen, str)
    assert (TOO_MUCH_SPACE in seen) is (_longest_run(data) >= 1024)


@pytest.mark.parametrize(
    "data",
    [
        OK + b"A:" + b" " * 100_000 + b"\0\r\n\r\n",
        OK + b"A:" + b"\r\n " * 30_000 + b"\0\r\n\r\n",
        CHUNKED + b"0\r\nA:" + b" " * 90_000 + b"\0\r\n\r\n",
        CHUNKED + b"1;" + b" " * 90_000 + b"\n\r\n",
    ],
    ids=["head", "folded head", "trailers", "size of a chunk"],
)
async def test_a_client_refuses_long_runs_of_white_space(
    nursery: trio.Nursery, parsed: bytearray, data: bytes
) -> None:
    async with ConnectionPool(connector=MemoryConnector(nursery, transcript(data))) as pool:
        with pytest.raises(RemoteProtocolError, match=TOO_MUCH_SPACE):
            await pool.request("GET", URL)
    assert _longest_run(parsed) == 1024


# -- The client with the recognizers, and without them.


BODIES = st.sampled_from(
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"content-length: 5\r\nConnection: close\r\n\r\nhello",
        b"Content-Length: 0\r\n\r\n",
        b"Content-Length: 5, 5\r\n\r\nhello",
        b"Content-Length: 9\r\n\r\nhello",
        b"Content-Length: 3\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n5;x\r\nworld\r\n0\r\nSum: 1\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n5\r\nworld+\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nmore",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"\r\nhello",
    ]
)
ANSWERS = st.builds(
    lambda interim, line, fields, body: interim + line + fields + body,
    st.sampled_from(
        [b""] * 4 + [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 \r\nContent-Length: 1\r\n\r\n"]
    ),
    STATUS_LINES,
    st.lists(LINES, max_size=1).map(b"".join),
    BODIES,
)


@given(
    st.lists(st.one_of(ANSWERS, responses()), min_size=1, max_size=2),
    st.lists(st.lists(st.integers(0, 150), max_size=4), min_size=2, max_size=2),
    st.integers(0, 63),
    st.booleans(),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=150)
def test_a_client_sees_the_same_with_h11_alone(
    answers: list[bytes], cuts: list[list[int]], options: int, ends: bool, variant: int
) -> None:
    phases = tuple(
        tuple(
            answer[start:end]
            for start, end in itertools.pairwise((0, *sorted(places), len(answer)))
            if start < end
        )
        for answer, places in zip(answers, cuts, strict=False)
    )
    script = Script(options, phases, ends, variant)
    seen = _run(_witness, script)
    with h11_alone():
        assert seen == _run(_witness, script)


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> list[h11.Connection]:
    """The h11 connections that clients make."""
    made: list[h11.Connection] = []
    make = h11.Connection.__init__

    def note(connection: h11.Connection, our_role: Any, **options: Any) -> None:
        if our_role is h11.CLIENT:
            made.append(connection)
        make(connection, our_role, **options)

    monkeypatch.setattr(h11.Connection, "__init__", note)
    return made


async def test_ordinary_exchanges_need_no_h11(nursery: trio.Nursery, judges: list[h11.Connection]) -> None:
    async def script(peer: ScriptedPeer) -> None:
        for data in (
            OK + b"Content-Length: 5\r\n\r\nhello",
            CHUNKED + b"5\r\nhello\r\n0\r\n\r\n",
            b"HTTP/1.1 204 No Content\r\n\r\n",
            OK + b"Content-Length: 5\r\n\r\n",
        ):
            await peer.receive_request()
            await peer.send(data)
        await respond(peer)

    async with ConnectionPool(connector=MemoryConnector(nursery, script)) as pool:
        for method in ("GET", "GET", "DELETE", "HEAD"):
            await pool.request(method, URL)
        await pool.request("POST", URL, content=b"small")
        await pool.request("POST", URL, content=Pieces(b"in", b"pieces"))
        (connection,) = internals(pool)
        assert connection.requests == 6
    assert not judges


async def test_each_head_and_body_that_needs_it_has_one_judge(
    nursery: trio.Nursery, judges: list[h11.Connection]
) -> None:
    data = b"HTTP/1.1 103 Early Hints\r\n\r\n" + CHUNKED + b"1;x\r\na\r\n1;x\r\nb\r\n0\r\nA: b\r\n\r\n"
    async with ConnectionPool(connector=MemoryConnector(nursery, transcript(data))) as pool:
        response = await pool.request("GET", URL)
        assert response.content == b"ab"
        assert response.extensions["trailing_headers"] == [(b"A", b"b")]
    assert len(judges) == 2


# -- What is written.


def _by_h11(prepared: PreparedRequest, pieces: list[bytes]) -> bytes | str:
    connection = h11.Connection(h11.CLIENT)
    headers: Any = prepared.headers
    events: list[Any] = [h11.Request(method=prepared.method, target=prepared.target, headers=headers)]
    events += [h11.Data(data=piece) for piece in pieces]
    try:
        return b"".join(connection.send(event) or b"" for event in [*events, h11.EndOfMessage()])
    except h11.LocalProtocolError as exc:
        return "longer" if "Too much" in str(exc) else "shorter"


def _by_us(prepared: PreparedRequest, pieces: list[bytes]) -> bytes | str:
    fields = EncodedFields(prepared.headers)
    head = b"%b %b HTTP/1.1\r\n%b" % (prepared.method, prepared.target, fields.encoded)
    if prepared.body is not None:
        return head + frame_content(fields, prepared.body)
    writer = ContentWriter(fields)
    try:
        return b"".join([head, *(writer.frame(memoryview(piece)) for piece in pieces), writer.end()])
    except LocalProtocolError as exc:
        return str(exc).split()[3]


@given(
    st.sampled_from(["GET", "POST", "CONNECT", "x-y"]),
    st.lists(st.tuples(TOKENS.map(lambda name: b"X-" + name), TEXT), max_size=4),
    st.booleans(),
    st.sampled_from(
        [(), ((b"Content-Length", b"004"),), ((b"transfer-encoding", b"Chunked"),), ((b"HOST", b"a"),)]
    ),
    st.lists(st.sampled_from([b"", b"ab", b"cd", b"x" * 20]), max_size=3),
    st.booleans(),
)
@examples
def test_requests_are_written_as_by_h11(
    method: str,
    fields: list[tuple[bytes, bytes]],
    first: bool,
    framing: Any,
    pieces: list[bytes],
    streamed: bool,
) -> None:
    headers = [*framing, *fields] if first else [*fields, *framing]
    if not streamed:
        pieces = [b"".join(pieces)]
        headers = [field for field in headers if field[0] != b"Content-Length"]
    content: Any = Pieces(*pieces) if streamed else pieces[0]
    prepared = PreparedRequest(Request(method, "http://example.com/a?b", headers=headers, content=content))
    assert _by_us(prepared, pieces) == _by_h11(prepared, pieces)


async def test_field_lines_are_encoded_once_for_a_connection(nursery: trio.Nursery) -> None:
    async with ConnectionPool(connector=MemoryConnector(nursery, respond)) as pool:
        await pool.request("GET", URL, headers={"A": "b"})
        (connection,) = internals(pool)
        fields: Any = connection._last_fields
        await pool.request("HEAD", URL + "other", headers={"A": "b"})
        assert connection._last_fields is fields
        await pool.request("GET", URL, headers={"A": "c"})
        assert connection._last_fields is not fields
