"""The whole client gives the same with what this package does itself as with h2 and hpack alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h2.exceptions
import pytest
import trio
import trio._core._run
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import corpus
from tests.fuzz.inputs import Script, http2_script
from tests.fuzz.peer import Network, Replay
from trio_exchange import ConnectionPool, ExchangeError
from trio_exchange._fields import HeaderList
from trio_exchange._http.http2.connection import HTTP2Connection
from trio_exchange._http.http2.framer import RequestFramer
from trio_exchange._http.http2.header_blocks import BlockDecoder, BlockEncoder, DecodedBlock

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


def assert_same(data: bytes) -> None:
    script = http2_script(data)
    ours = outcome(script)
    with by_h2_alone():
        theirs = outcome(script)
    assert ours == theirs
    assert ours[0]
    assert ours[1]


@pytest.mark.parametrize("path", corpus.inputs("http2"), ids=lambda path: path.name)
def test_the_corpus_gives_the_same(path: Path) -> None:
    assert_same(path.read_bytes())


def frame(kind: int, *rest: int | bytes) -> bytes:
    """A frame for `http2_script`, and what follows it."""
    return bytes([kind]) + b"".join(part if isinstance(part, bytes) else bytes([part]) for part in rest)


IDS = st.sampled_from([0, 1, 1, 3, 3, 5, 5, 7, 9, 11, 2, 13])
FIELDS = st.lists(st.sampled_from([1, 2, 3, 10, 11, 15, 18, 23, 25, 27]), max_size=5)
BLOCKS = FIELDS.map(lambda fields: bytes([len(fields) + 1, 0, *fields]))
FRAMES: list[Callable[..., st.SearchStrategy[bytes]]] = [
    lambda: st.builds(frame, st.just(0), IDS, st.sampled_from([0, 1, 1]), BLOCKS),
    lambda: st.builds(frame, st.just(0), IDS, st.sampled_from([0, 1, 1]), BLOCKS),
    lambda: st.builds(
        frame, st.just(1), IDS, st.sampled_from([0, 1, 1]), st.sampled_from([b"\0\0", b"\0\5"])
    ),
    lambda: st.builds(frame, st.just(2), st.just(0), st.binary(max_size=14)),
    lambda: st.builds(frame, st.just(3), IDS, st.integers(0, 14)),
    lambda: st.builds(frame, st.just(4), IDS, st.binary(min_size=4, max_size=4)),
    lambda: st.builds(frame, st.just(8), IDS, BLOCKS, st.integers(0, 9)),
]
FOLLOWS = st.sampled_from([0, 0, 0, 1, 2, 3]).map(lambda kind: bytes([kind]))
SCRIPTS = st.builds(
    lambda ends, frames: bytes([0, ends]) + b"".join(after + each for each, after in frames),
    st.integers(0, 1),
    st.lists(st.tuples(st.one_of(*(each() for each in FRAMES)), FOLLOWS), max_size=14),
)


@settings(deadline=None)
@given(SCRIPTS | st.binary(max_size=60))
def test_every_script_gives_the_same(data: bytes) -> None:
    assert_same(data)
