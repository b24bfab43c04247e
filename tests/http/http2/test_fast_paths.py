"""The whole client gives the same with what this package does itself as with h2 and hpack alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h2.exceptions
import hpack
import pytest
import trio
import trio._core._run
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import corpus
from tests.fuzz.inputs import Script, frame, http2_script
from tests.fuzz.peer import Network, Replay
from trio_exchange import ConnectionPool, ExchangeError
from trio_exchange._fields import HeaderList
from trio_exchange._http.http2.connection import HTTP2Connection
from trio_exchange._http.http2.framer import RequestFramer
from trio_exchange._http.http2.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
)
from trio_exchange._http.http2.header_compression import BlockDecoder, BlockEncoder, DecodedBlock

#: What is seen of each request, what the client has sent on each connection, and how many are idle.
Outcome = tuple[list[Any], list[bytes], int]


def decode_by_hpack(self: BlockDecoder, data: bytes) -> DecodedBlock:
    fields: Any = self._decoder.decode(data, raw=True)
    return DecodedBlock(list(fields))


def encode_by_hpack(self: BlockEncoder, headers: HeaderList) -> bytes:
    return self._encoder.encode(headers)


def open_by_h2(self: RequestFramer, headers: HeaderList, body: bytes, *, end_stream: bool) -> int | None:
    try:
        stream_id = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream_id, headers, end_stream=end_stream and not body)
    except h2.exceptions.TooManyStreamsError:
        return None
    if body:
        self._h2.send_data(stream_id, body, end_stream=end_stream)
    return stream_id


def send_data_by_h2(
    self: HTTP2Connection, stream_id: int, data: bytes | memoryview, *, end_stream: bool
) -> None:
    self._h2.send_data(stream_id, data, end_stream=end_stream)
    self._flood_guard.earn()
    self.flush()


@contextmanager
def by_h2_alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockDecoder, "decode", decode_by_hpack)
        patch.setattr(BlockEncoder, "encode", encode_by_hpack)
        patch.setattr(RequestFramer, "open", open_by_h2)
        patch.setattr(HTTP2Connection, "send_data", send_data_by_h2)
        yield


async def play(script: Script) -> Outcome:
    """Send requests one after the other, and return all that can be seen of them."""
    seen: list[Any] = []
    network = Network(script)

    async def fetch(method: str, **more: Any) -> None:
        extensions = {"timeout": {"read": 5.0, "write": 5.0}}
        chunks: list[bytes] = []
        try:
            url = "http://example.com/"
            async with pool.stream(method, url, extensions=extensions, **more) as response:
                seen.append((response.status, list(response.headers)))
                async for chunk in response.aiter_stream():
                    chunks.append(chunk)
                seen.append(list(response.extensions["trailing_headers"]))
        except ExchangeError as exc:
            # hpack shows a view of the block, and so an address.
            seen.append((type(exc), str(exc).partition("<memory")[0]))
        seen.append(b"".join(chunks))

    async def pieces() -> Any:
        for size in (1, 5000):
            yield bytes(size)

    async with ConnectionPool(connector=network, http1=False, http2=True, max_header_bytes=4096) as pool:
        await fetch("GET")
        await fetch("POST", content=b"small", headers={"X": "Y"})
        await fetch("POST", content=pieces(), headers={"Content-Length": "5001"})
        for _ in range(3):
            await fetch("GET")
        await trio.testing.wait_all_tasks_blocked()
        idle = pool.statistics().idle
    return seen, [stream.everything for stream in network.streams if isinstance(stream, Recorded)], idle


class Recorded(Replay):
    """A connection that keeps what was sent on it."""

    everything = b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.everything += bytes(data)
        await super().send_all(data)


def outcome(script: Script) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fuzz.peer.Replay", Recorded)
        # Trio shuffles the tasks that run next.
        trio._core._run._r.seed(0)
        return trio.run(play, script, clock=trio.testing.MockClock(autojump_threshold=0))


def assert_same(script: Script) -> None:
    ours = outcome(script)
    with by_h2_alone():
        theirs = outcome(script)
    assert ours == theirs
    assert ours[0]
    assert ours[1]


@pytest.mark.parametrize("path", corpus.inputs("http2"), ids=lambda path: path.name)
def test_the_corpus_gives_the_same(path: Path) -> None:
    assert_same(http2_script(path.read_bytes()))


IDS = st.sampled_from([0, 1, 1, 3, 5, 7, 9, 11, 2, 13])
CODES = st.integers(0, 13)
# What a server may send besides the responses, most of it in the way of them.
NOISE = st.one_of(
    st.just(b""),
    st.builds(
        lambda sizes: frame(SETTINGS, 0, 0, sizes), st.sampled_from([b"\0\1\0\0\0\0", b"\0\3\0\0\0\1"])
    ),
    st.builds(lambda size: frame(SETTINGS, 0, 0, b"\0\4" + size.to_bytes(4, "big")), st.integers(0, 6000)),
    st.builds(lambda stream_id, code: frame(RST_STREAM, 0, stream_id, bytes([0, 0, 0, code])), IDS, CODES),
    st.builds(lambda stream_id: frame(WINDOW_UPDATE, 0, stream_id, bytes([0, 0, 9, 9])), IDS),
    st.builds(lambda stream_id, data: frame(DATA, 1, stream_id, data), IDS, st.binary(max_size=3)),
    st.builds(lambda stream_id, block: frame(HEADERS, 5, stream_id, block), IDS, st.binary(max_size=6)),
    st.builds(lambda last, code: frame(GOAWAY, 0, 0, bytes([0, 0, 0, last, 0, 0, 0, code])), IDS, CODES),
)
FIELDS = st.lists(
    st.sampled_from(
        [
            (b":status", b"103"),
            (b"Upper", b"case"),
            (b"content-length", b"0"),
            (b"content-length", b"5"),
            *[(b"x-%d" % number, b"value" * number) for number in range(8)],
            *[(b"date", b"Mon, 01 Jan 2026 00:00:0%d GMT" % number) for number in range(4)],
        ]
    ),
    max_size=6,
)
# `:status: 200`, and then fields that are not indexed, that are, and one of a wrong index.
LITERAL_BLOCKS = st.sampled_from([b"\x88\x00\x01a\x01b", b"\x88\x40\x01a\x01b", b"\x88\xbe", b"\x88\xff\x70"])


@st.composite
def responses(draw: st.DrawFn) -> Script:
    """Responses to all requests, well-formed or nearly so."""
    encoder = hpack.Encoder()
    lists = draw(st.lists(FIELDS, min_size=1, max_size=3))
    phases = []
    for number in range(6):
        stream_id = 2 * number + 1
        fields = [(b":status", b"200"), *draw(st.sampled_from(lists))]
        block = draw(LITERAL_BLOCKS) if draw(st.integers(0, 5)) == 5 else encoder.encode(fields)
        size = draw(st.sampled_from([0, 0, 5]))
        phase = [
            frame(SETTINGS, 0, 0, b"") if not number else b"",
            draw(NOISE) if draw(st.integers(0, 5)) == 5 else b"",
            frame(HEADERS, END_HEADERS | (0 if size else END_STREAM), stream_id, block),
            frame(DATA, END_STREAM, stream_id, bytes(size)) if size else b"",
        ]
        phases.append((b"".join(phase),))
    return Script(0, tuple(phases), draw(st.booleans()))


@settings(deadline=None)
@given(responses() | st.binary(max_size=60).map(http2_script))
def test_every_script_gives_the_same(script: Script) -> None:
    assert_same(script)
