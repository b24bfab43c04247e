"""HTTP/2 exchanges with a scripted peer: one request and its response, and that others don't notice."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import h2.errors
import h2.events
import hpack
import pytest
import trio
import trio.testing
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    ExtensionFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from tests.harness.certificates import TLS, alpn_server, client_context, make_tls
from tests.harness.checks import assert_settles, assert_unharmed, internals
from tests.harness.h2peer import H2Peer, Headers, h2_pool
from tests.harness.peers import DELIVERIES, reset
from tests.harness.servers import serve_tcp
from tests.harness.traces import Events, both_ends
from trio_exchange import (
    ConnectionNotAvailable,
    ConnectionPool,
    LocalProtocolError,
    NetworkError,
    PoolTimeout,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    Request,
    Response,
    WriteError,
    WriteTimeout,
)
from trio_exchange._connect.transport import Transport
from trio_exchange._http.http2 import reset_ledger as http2_resets
from trio_exchange._http.http2.connection import RECEIVE_SIZE
from trio_exchange._trace import Tracer
from trio_exchange.testing import MemoryConnector, ScriptedPeer
from trio_exchange.testing._http2 import StreamReset

E = TypeVar("E", bound=Exception)

URL = "http://example.com/"
KILOBYTE = 1024
MEGABYTE = 1024 * 1024
WINDOW = 256 * KILOBYTE
LARGEST_WINDOW = 8 * MEGABYTE
CONNECTION_WINDOW = 16 * MEGABYTE


class Running:
    """Something that runs in a task of its own."""

    def __init__(
        self, nursery: trio.Nursery, function: Callable[..., Awaitable[Any]], *args: Any, **more: Any
    ) -> None:
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.value: Any = None
        self.error: BaseException | None = None
        nursery.start_soon(self._run, functools.partial(function, *args, **more))

    async def _run(self, function: Callable[[], Awaitable[Any]]) -> None:
        with self.scope:
            try:
                self.value = await function()
            except Exception as exc:
                self.error = exc
        self.done.set()

    async def cancel(self) -> None:
        self.scope.cancel()
        await self.done.wait()

    async def result(self) -> Any:
        """What it returns or raises."""
        await self.done.wait()
        if self.error is not None:
            raise self.error
        return self.value

    async def fails(self, kind: type[E], match: str | None = None) -> E:
        """What it raises, which has to be this."""
        with pytest.raises(kind, match=match) as info:
            await self.result()
        return info.value

    async def answered(self, peer: H2Peer, stream_id: int, *args: Any, **more: Any) -> Any:
        """What it returns after the peer has responded."""
        await peer.respond(stream_id, *args, **more)
        return await self.result()

    async def succeeds(self, peer: H2Peer, stream_id: int) -> None:
        """Answer a request, and check that it gets the answer."""
        assert (await self.answered(peer, stream_id)).status == 200


class Client:
    """A pool, and requests on it that run in tasks of their own; the test itself plays the servers."""

    def __init__(self, nursery: trio.Nursery, **options: Any) -> None:
        self._nursery = nursery
        self._send_peer, self._peers = trio.open_memory_channel[H2Peer](100)
        self.pool, self.connector = h2_pool(nursery, self._meet, **options)
        # With a clock that jumps, what would wait for ever fails at once.
        self._flood_guard = trio.fail_after(1000)

    async def _meet(self, peer: H2Peer) -> None:
        await self._send_peer.send(peer)
        await trio.sleep_forever()

    async def __aenter__(self) -> Self:
        await self.pool.__aenter__()
        self._flood_guard.__enter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return self._flood_guard.__exit__(exc_type, exc_value, traceback)
        finally:
            await self.pool.__aexit__(None, None, None)

    async def peer(self, settings: dict[SettingCodes, int] | None = None) -> H2Peer:
        """The next connection's other end, which has sent its preface."""
        peer = await self._peers.receive()
        await peer.start(settings)
        return peer

    def request(self, method: str = "GET", path: str = "", **more: Any) -> Running:
        """Send a request and read the response."""
        return Running(self._nursery, self.pool.request, method, URL + path, **more)

    def open(self, method: str = "GET", path: str = "", **more: Any) -> Running:
        """Send a request; the result is the response, with its body to be read."""
        request = Request(method, URL + path, **more)
        return Running(self._nursery, self.pool.handle_async_request, request)

    async def requested(
        self, *args: str, on: H2Peer | None = None, **more: Any
    ) -> tuple[Running, H2Peer, int]:
        """Send a request; it, the peer, by default of a new connection, that has its head, and its stream."""
        return await self._received(self.request(*args, **more), on)

    async def opened(self, *args: str, on: H2Peer | None = None, **more: Any) -> tuple[Running, H2Peer, int]:
        """The same with `open`."""
        return await self._received(self.open(*args, **more), on)

    async def _received(self, request: Running, peer: H2Peer | None) -> tuple[Running, H2Peer, int]:
        peer = peer or await self.peer()
        return request, peer, (await peer.head())[0]

    async def is_served_on(self, peer: H2Peer) -> None:
        """Check that the connection is as good as new."""
        request = self.request("GET", "check")
        stream_id, headers = await peer.head()
        assert headers[b":path"] == b"/check"
        assert (await request.answered(peer, stream_id, 200, body=b"fine")).content == b"fine"


@pytest.fixture
def clock(autojump_clock: MockClock) -> MockClock:
    # pytest-trio uses only a clock that the test itself asks for.
    return autojump_clock


@pytest.fixture
async def client(nursery: trio.Nursery, clock: MockClock) -> AsyncIterator[Client]:
    nursery.start_soon(fail_in_the_end)
    async with Client(nursery) as client:
        yield client


async def fail_in_the_end() -> None:
    """With a clock that jumps, what would wait for ever fails at once."""
    await trio.sleep(1000)
    raise AssertionError("the test waits for ever")


def head(peer: H2Peer, stream_id: int, block: Headers, *flags: str) -> HeadersFrame:
    """A head past h2, which would check it."""
    return HeadersFrame(stream_id, peer.h2.encoder.encode(block), flags=["END_HEADERS", *flags])


def unknown_frame(stream_id: int) -> Frame:
    frame = ExtensionFrame(type=0xBE, flag_byte=0, stream_id=stream_id, body=b"grease")
    frame.body_len = 6
    return frame


def data(stream_id: int, content: bytes, *flags: str) -> DataFrame:
    return DataFrame(stream_id, content, flags=flags)


Frames = Callable[[H2Peer, int], list[Frame]]
OK: Headers = [(b":status", b"200")]
EARLY_HINTS: Headers = [(b":status", b"103")]
LENGTH_3 = (b"content-length", b"3")
END = "END_STREAM"


def frames(*parts: Headers | bytes | str) -> Frames:
    """Heads and data; a flag belongs to the frame before it."""

    def make(peer: H2Peer, stream_id: int) -> list[Frame]:
        made: list[Frame] = []
        for part in parts:
            if isinstance(part, str):
                made[-1].flags.add(part)
            else:
                made.append(data(stream_id, part) if isinstance(part, bytes) else head(peer, stream_id, part))
        return made

    return make


async def reset_of(peer: H2Peer, stream_id: int) -> ErrorCodes:
    """Wait for the client's RST_STREAM."""
    event = await peer.event(h2.events.StreamReset, stream_id)
    assert event.error_code is not None
    return ErrorCodes(event.error_code)


def connection_credit(peer: H2Peer) -> int:
    """What the client has let the server send in all, whatever the streams."""
    return 65_535 + sum(credit_of(peer, 0))


def credit_of(peer: H2Peer, stream_id: int) -> list[int]:
    """What the client has let the server send on a stream besides its first window."""
    return [frame.window_increment for frame in peer.sent(WindowUpdateFrame, stream_id)]


# -- Requests and responses.


async def test_a_get(autojump_clock: MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, headers, body = await peer.request()
        assert headers == {
            b":method": b"GET",
            b":authority": b"example.com",
            b":scheme": b"http",
            b":path": b"/a?b",
        }
        assert body == b""
        await peer.respond(stream_id, 200, [(b"x", b"y")], b"hello", trailers=[(b"t", b"u")])
        await peer.until_closed()

    async with trio.open_nursery() as nursery:
        pool, _ = h2_pool(nursery, serve)
        async with pool:
            response = await pool.request("GET", "http://example.com/a?b")
            assert response.status == 200
            assert response.headers == [(b"x", b"y")]
            assert response.content == b"hello"
            assert response.extensions["trailing_headers"] == [(b"t", b"u")]
            assert response.extensions["http_version"] == b"HTTP/2"


async def test_the_extensions_of_a_response(client: Client, clock: MockClock) -> None:
    peer: H2Peer | None = None
    for stream_id in (1, 3, 5):
        request = client.request()
        peer = peer or await client.peer()
        assert (await peer.head())[0] == stream_id
        await peer.respond(stream_id)
        extensions = (await request.result()).extensions
        assert extensions["stream_id"] == stream_id
        assert extensions["http_version"] == b"HTTP/2"
        assert extensions["trailing_headers"] == []
        assert "reason_phrase" not in extensions
        with pytest.raises(LocalProtocolError, match="belongs to HTTP"):
            await extensions["network_stream"].read()


async def test_trailers_are_complete_once_the_body_was_read(client: Client, clock: MockClock) -> None:
    opened, peer, stream_id = await client.opened()
    response = await opened.answered(
        peer, stream_id, body=b"body", trailers=[(b"a", b"1"), (b"b", b""), (b"a", b"2")]
    )
    trailers = response.extensions["trailing_headers"]
    assert trailers == []
    assert await response.aread() == b"body"
    assert trailers == [(b"a", b"1"), (b"b", b""), (b"a", b"2")]


async def test_leaving_when_all_has_arrived_resets_nothing(client: Client, clock: MockClock) -> None:
    opened, peer, stream_id = await client.opened()
    response = await opened.answered(peer, stream_id, body=b"body", trailers=[(b"a", b"1")])
    await wait_all_tasks_blocked()
    await response.aclose()
    await client.is_served_on(peer)
    assert peer.sent(RstStreamFrame) == []


async def test_a_small_body_goes_out_with_the_head(client: Client, clock: MockClock) -> None:
    request = client.request("POST", content=b"x" * 16_384)
    peer = await client.peer()
    stream_id, headers, body = await peer.request()
    assert body == b"x" * 16_384
    assert headers[b"content-length"] == b"16384"
    [frame] = peer.sent(DataFrame)
    assert "END_STREAM" in frame.flags
    assert "END_STREAM" not in peer.sent(HeadersFrame)[0].flags
    await request.succeeds(peer, stream_id)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_empty_body_is_the_end_of_the_head(client: Client, clock: MockClock, method: str) -> None:
    request = client.request(method, content=b"")
    peer = await client.peer()
    stream_id, headers, _ = await peer.request()
    assert headers.get(b"content-length") == (b"0" if method == "POST" else None)
    assert "END_STREAM" in peer.sent(HeadersFrame)[0].flags
    assert peer.sent(DataFrame) == []
    await request.succeeds(peer, stream_id)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_body_without_a_length_header(client: Client, clock: MockClock, method: str) -> None:
    request = client.request(method, content=[b"one", b"", b"two"])
    peer = await client.peer()
    stream_id, headers, body = await peer.request()
    assert body == b"onetwo"
    assert not {b"content-length", b"transfer-encoding"} & headers.keys()
    await request.succeeds(peer, stream_id)


async def test_a_stream_without_content_is_no_body(client: Client, clock: MockClock) -> None:
    request = client.request("GET", content=[b"", b""])
    peer = await client.peer()
    stream_id, _, _ = await peer.request()
    assert "END_STREAM" in peer.sent(HeadersFrame)[0].flags
    await request.succeeds(peer, stream_id)


# -- Transcripts.


@dataclass
class Case:
    frames: Frames
    body: bytes = b""
    status: int = 200
    headers: Headers = field(default_factory=list)
    trailers: Headers = field(default_factory=list)
    method: str = "GET"


def _continued(peer: H2Peer, stream_id: int) -> list[Frame]:
    # Never indexed, so that it is as long the second time.
    block = peer.h2.encoder.encode([*OK, hpack.NeverIndexedHeaderTuple(b"long", b"x" * 50)])
    pieces = [block[i : i + 7] for i in range(0, len(block), 7)]
    first = HeadersFrame(stream_id, pieces[0])
    rest = [ContinuationFrame(stream_id, piece) for piece in pieces[1:]]
    rest[-1].flags.add("END_HEADERS")
    return [first, *rest, data(stream_id, b"abc", "END_STREAM")]


def _padded(peer: H2Peer, stream_id: int) -> list[Frame]:
    first = head(peer, stream_id, OK, "PADDED", "PRIORITY")
    first.pad_length, first.depends_on, first.stream_weight = 5, 0, 15
    frames = [data(stream_id, content, "PADDED") for content in (b"a", b"", b"bc")]
    for frame in frames:
        frame.pad_length = 9
    frames[-1].flags.add("END_STREAM")
    return [first, *frames]


def _in_between(peer: H2Peer, stream_id: int) -> list[Frame]:
    return [
        PingFrame(0, b"01234567"),
        head(peer, stream_id, OK),
        SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 70_000}),
        data(stream_id, b"a"),
        unknown_frame(stream_id),
        WindowUpdateFrame(0, 10),
        WindowUpdateFrame(stream_id, 10),
        PriorityFrame(stream_id, depends_on=0, stream_weight=1, exclusive=False),
        data(stream_id, b"bc", "END_STREAM"),
    ]


CASES = {
    "nothing": Case(frames(OK, END)),
    "headers": Case(
        frames([*OK, (b"b", b"1"), (b"a", b"2  \t3"), (b"b", b"\xff")], END),
        headers=[(b"b", b"1"), (b"a", b"2  \t3"), (b"b", b"\xff")],
    ),
    "a body": Case(frames(OK, b"abc", END), b"abc"),
    "an end on its own": Case(frames(OK, b"a", b"", b"bc", b"", END), b"abc"),
    "its length": Case(frames([*OK, LENGTH_3], b"ab", b"c", END), b"abc", headers=[LENGTH_3]),
    "the same length twice": Case(
        frames([*OK, LENGTH_3, LENGTH_3], b"abc", END), b"abc", headers=[LENGTH_3, LENGTH_3]
    ),
    "an error": Case(frames([(b":status", b"599")], b"abc", END), b"abc", status=599),
    "trailers": Case(
        frames(OK, b"abc", [(b"x-sum", b"6"), (b"y", b"")], END),
        b"abc",
        trailers=[(b"x-sum", b"6"), (b"y", b"")],
    ),
    "trailers alone": Case(frames(OK, [(b"x", b"1")], END), trailers=[(b"x", b"1")]),
    "informational": Case(
        frames([(b":status", b"103"), (b"link", b"x")], [(b":status", b"100")], OK, b"abc", END), b"abc"
    ),
    "HEAD": Case(frames([*OK, LENGTH_3], END), headers=[LENGTH_3], method="HEAD"),
    "HEAD, its end on its own": Case(frames([*OK, LENGTH_3], b"", END), headers=[LENGTH_3], method="HEAD"),
    "204": Case(frames([(b":status", b"204")], b"", END), status=204),
    "304": Case(frames([(b":status", b"304"), LENGTH_3], b"", END), status=304, headers=[LENGTH_3]),
    "continued": Case(_continued, b"abc", headers=[(b"long", b"x" * 50)]),
    "padded": Case(_padded, b"abc"),
    "in between": Case(_in_between, b"abc"),
}
all_cases = pytest.mark.parametrize("name", CASES)


async def check_case(client: Client, peer: H2Peer | None, name: str, send: Any, *trailing: Frame) -> H2Peer:
    """Answer a request with a transcript, sent by `send`, and check the response."""
    case = CASES[name]
    request = client.request(case.method)
    if peer is None:
        peer = await client.peer()
    stream_id, _ = await peer.head()
    frames = [*case.frames(peer, stream_id), *trailing]
    await send(peer, b"".join(frame.serialize() for frame in frames))
    response = await request.result()
    assert (response.status, response.headers, response.content) == (case.status, case.headers, case.body)
    assert response.extensions["trailing_headers"] == case.trailers
    return peer


@DELIVERIES
@all_cases
async def test_transcripts(client: Client, clock: MockClock, name: str, byte_by_byte: bool) -> None:
    send = functools.partial(H2Peer.send, byte_by_byte=byte_by_byte)
    peer = await check_case(client, None, name, send)
    await check_case(client, peer, name, send)
    await wait_all_tasks_blocked()
    assert_unharmed(client.pool, idle=1)
    assert peer.sent(RstStreamFrame) == []


@pytest.mark.parametrize(
    "trailing",
    [
        PingFrame(0, b"01234567"),
        WindowUpdateFrame(1, 10),
        WindowUpdateFrame(0, 10),
        PriorityFrame(1, depends_on=0, stream_weight=1, exclusive=False),
        RstStreamFrame(1, ErrorCodes.NO_ERROR),
        SettingsFrame(0),
        unknown_frame(0),
    ],
    ids=lambda frame: type(frame).__name__,
)
@all_cases
async def test_transcripts_with_trailing_frames(
    client: Client, clock: MockClock, name: str, trailing: Frame
) -> None:
    peer = await check_case(client, None, name, H2Peer.send, trailing)
    await check_case(client, peer, name, H2Peer.send)


@pytest.mark.parametrize("size", [1, 9, 16])
async def test_transcripts_with_a_piece_of_the_next_frame(
    client: Client, clock: MockClock, size: int
) -> None:
    ping = PingFrame(0, b"01234567").serialize()

    async def send(peer: H2Peer, transcript: bytes) -> None:
        await peer.send(transcript + ping[:size])

    peer = await check_case(client, None, "trailers", send)
    await peer.send(ping[size:])
    await client.is_served_on(peer)
    assert [frame.opaque_data for frame in peer.sent(PingFrame)] == [b"01234567"]


# -- Cleanliness on the wire.


async def sent_by(client: Client, method: str = "GET", **more: Any) -> list[Any]:
    """The header block of a request, as it was on the wire."""
    _, peer, _ = await client.requested(method, **more)
    [frame] = peer.sent(HeadersFrame)
    # Not as h2 gives it, which joins cookies.
    return list(hpack.Decoder().decode(frame.data, raw=True))


async def test_the_host_is_the_authority_and_headers_are_lower_case(client: Client, clock: MockClock) -> None:
    headers = [("Host", "other.example:81"), ("X-One", "A"), ("x-two", "b"), ("X-ONE", "c")]
    block = await sent_by(client, headers=headers)
    assert block == [
        (b":method", b"GET"),
        (b":authority", b"other.example:81"),
        (b":scheme", b"http"),
        (b":path", b"/"),
        (b"x-one", b"A"),
        (b"x-two", b"b"),
        (b"x-one", b"c"),
    ]


OF_THE_CONNECTION = {
    "Connection": "close, x-hop",
    "Keep-Alive": "timeout=5",
    "Proxy-Connection": "keep-alive",
    "Transfer-Encoding": "chunked",
    "Upgrade": "h2c",
    "TE": "gzip",
}


@pytest.mark.parametrize(
    ("headers", "sent"),
    [
        *(([field, ("x", "y")], [(b"x", b"y")]) for field in OF_THE_CONNECTION.items()),
        *(([("TE", value)], [(b"te", b"trailers")]) for value in ("trailers", "gzip, Trailers;q=0.5")),
        ([("cookie", "a=1"), ("cookie", "b=2; c=3")], [(b"cookie", b"a=1"), (b"cookie", b"b=2; c=3")]),
    ],
    ids=[*OF_THE_CONNECTION, "TE: trailers", "TE: also trailers", "cookies stay apart"],
)
async def test_headers_of_the_connection_are_not_sent_and_others_are(
    client: Client, clock: MockClock, headers: Any, sent: Headers
) -> None:
    assert (await sent_by(client, headers=headers))[4:] == sent


@pytest.mark.parametrize("name", ["Authorization", "Proxy-Authorization", "Cookie"])
async def test_credentials_are_never_indexed(client: Client, clock: MockClock, name: str) -> None:
    secret = (name.lower().encode(), b"secret")
    block = await sent_by(client, headers=[(name, "secret"), ("x", "y")])
    assert block[4:] == [secret, (b"x", b"y")]
    assert [pair for pair in block if isinstance(pair, hpack.NeverIndexedHeaderTuple)] == [secret]


@pytest.mark.parametrize("sizes", [[2**32 - 1], [65536, 100, 0, 8192], [0], [100, 50], [100, 100], [4096]])
async def test_the_table_of_sent_headers_is_bounded(
    nursery: trio.Nursery, autojump_clock: MockClock, sizes: list[int]
) -> None:
    """A server that offered a large one got one, and every request became slower than the one before."""
    updated: list[int] = []

    async def change_and_serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        for size in sizes:
            await peer.send_settings({SettingCodes.HEADER_TABLE_SIZE: size})
        await peer.respond(stream_id)
        for _ in range(200):
            stream_id, headers, _ = await peer.request()
            assert headers[b"x-large"] == b"%d" % stream_id * 20
            updated.append(peer.h2.decoder.header_table_size)
            await peer.respond(stream_id)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, change_and_serve)
    async with pool:
        await pool.request("GET", "http://a.example")
        for number in range(200):
            stream_id = 2 * number + 3
            await pool.request("GET", "http://a.example", headers={"x-large": b"%d" % stream_id * 20})
    assert set(updated) == {min(sizes[-1], 4096)}


async def test_the_target_extension(client: Client, clock: MockClock) -> None:
    block = await sent_by(client, "OPTIONS", extensions={"target": b"*"})
    assert dict(block)[b":path"] == b"*"


@pytest.mark.parametrize("target", [b"example.com:443", b"x"])
async def test_a_target_that_is_no_path_is_refused(client: Client, clock: MockClock, target: bytes) -> None:
    await client.request(extensions={"target": target}).fails(LocalProtocolError, "must be a path")
    peer = await client.peer()
    await client.is_served_on(peer)
    assert len(peer.sent(HeadersFrame)) == 1


UNSENDABLE: list[Any] = [
    *({"headers": [field]} for field in (("a b", "c"), ("a\r", "c"), (":path", "/"), ("", "c"))),
    *({"headers": [("a", value)]} for value in ("b\r\nc: d", "b\n", "b\x00c", " b", "b\t")),
    *({"extensions": {"target": target}} for target in (b"/a b", b"/\r\nx: y", b"/\x00", b"/#f", b"")),
]


@pytest.mark.parametrize("options", UNSENDABLE, ids=repr)
async def test_headers_and_targets_that_can_t_be_sent(client: Client, clock: MockClock, options: Any) -> None:
    await client.request(**options).fails(LocalProtocolError)
    assert client.connector.dialled == []


# -- Malformed responses.


def malformed(*headers: tuple[bytes, bytes]) -> Frames:
    return frames([*OK, *headers])


def block_of(*headers: tuple[bytes, bytes]) -> Frames:
    return frames(list(headers))


def trailer(name: bytes, value: bytes) -> Frames:
    return frames(OK, [(name, value)], END)


def body_of(length: bytes, *content: bytes, end: bool = True) -> Frames:
    return frames([*OK, (b"content-length", length)], *content, *[END] * end)


MALFORMED: dict[str, tuple[Frames, str]] = {
    "upper case": (malformed((b"X-a", b"b")), "invalid header name"),
    "name with space": (malformed((b"x a", b"b")), "invalid header name"),
    "name with colon": (malformed((b"x:a", b"b")), "invalid header name"),
    "name with high byte": (malformed((b"x\xe4", b"b")), "invalid header name"),
    "empty name": (malformed((b"", b"b")), "invalid header name"),
    "CR": (malformed((b"a", b"b\rc")), "invalid value"),
    "LF": (malformed((b"a", b"b\nc: d")), "invalid value"),
    "NUL": (malformed((b"a", b"b\x00")), "invalid value"),
    "leading space": (malformed((b"a", b" b")), "invalid value"),
    "trailing tab": (malformed((b"a", b"b\t")), "invalid value"),
    "only space": (malformed((b"a", b" ")), "invalid value"),
    "connection": (malformed((b"connection", b"close")), "HTTP/2 does not have"),
    "keep-alive": (malformed((b"keep-alive", b"x")), "HTTP/2 does not have"),
    "proxy-connection": (malformed((b"proxy-connection", b"x")), "HTTP/2 does not have"),
    "transfer-encoding": (malformed((b"transfer-encoding", b"chunked")), "HTTP/2 does not have"),
    "upgrade": (malformed((b"upgrade", b"x")), "HTTP/2 does not have"),
    "no status": (block_of((b"a", b"b")), "no valid status"),
    "nothing at all": (block_of(), "no valid status"),
    "status twice": (malformed((b":status", b"200")), "invalid header name"),
    "late status": (block_of((b"a", b"b"), (b":status", b"200")), "no valid status"),
    "late second status": (malformed((b"a", b"b"), (b":status", b"200")), "invalid header name"),
    "another pseudo-header": (malformed((b":path", b"/")), "invalid header name"),
    "request's pseudo-header first": (block_of((b":path", b"/"), *OK), "no valid status"),
    "status 99": (block_of((b":status", b"099")), "no valid status"),
    "status 20": (block_of((b":status", b"20")), "no valid status"),
    "status 2000": (block_of((b":status", b"2000")), "no valid status"),
    "status in words": (block_of((b":status", b"200 OK")), "no valid status"),
    "101": (block_of((b":status", b"101")), "answered 101"),
    "informational upper case": (block_of((b":status", b"103"), (b"X", b"y")), "invalid header name"),
    "no number": (malformed((b"content-length", b"x")), "content-length"),
    "negative": (malformed((b"content-length", b"-1")), "content-length"),
    "two lengths": (malformed((b"content-length", b"1"), (b"content-length", b"2")), "content-length"),
    "too long": (body_of(b"3", b"ab", b"cd", end=False), "longer than its content-length"),
    "too long at once": (body_of(b"0", b"a", end=False), "longer than its content-length"),
    "too long, ended": (body_of(b"3", b"abcd"), "longer than its content-length"),
    "too short": (body_of(b"3", b"ab"), "ends 1 bytes early"),
    "too short by all": (frames([*OK, LENGTH_3], END), "ends 3 bytes early"),
    "too short, trailers": (frames([*OK, LENGTH_3], [(b"a", b"b")], END), "ends 3 bytes early"),
    "204 with a body": (frames([(b":status", b"204")], b"a"), "longer than its content-length"),
    "304 with a body": (
        frames([(b":status", b"304"), (b"content-length", b"1")], b"a"),
        "longer than its content-length",
    ),
    "DATA first": (frames(b"a"), "before the response's head"),
    "the end first": (frames(b"", END), "before the response's head"),
    "DATA after informational": (frames(EARLY_HINTS, b"a"), "before the response's head"),
    "trailer upper case": (trailer(b"X", b"y"), "invalid header name"),
    "trailer with LF": (trailer(b"x", b"y\nz"), "invalid value"),
    "trailer of the connection": (trailer(b"connection", b"close"), "HTTP/2 does not have"),
    "pseudo-header in trailers": (trailer(b":status", b"200"), "invalid header name"),
    "pseudo-header late in trailers": (
        frames(OK, [(b"a", b"b"), (b":path", b"/")], END),
        "invalid header name",
    ),
    "status 1000": (block_of((b":status", b"1000")), "no valid status"),
    "status 1": (block_of((b":status", b"1")), "no valid status"),
    "informational with the end": (
        frames(EARLY_HINTS, END),
        "ended the stream with an informational response: 103",
    ),
    "status 1000 with the end": (frames([(b":status", b"1000")], END), "no valid status"),
    "informational after the head": (
        frames(OK, EARLY_HINTS),
        "an informational response after the response's head",
    ),
    "informational after the head, with the end": (frames(OK, EARLY_HINTS, END), "invalid header name"),
    "informational after data": (
        frames(OK, b"a", [(b":status", b"100")]),
        "an informational response after the response's head",
    ),
    "second head": (frames(OK, OK), "a second head after the response's head"),
    "trailers without the end": (frames(OK, [(b"a", b"b")]), "trailers that do not end the stream"),
    "empty trailers without the end": (frames(OK, []), "trailers that do not end the stream"),
    "trailers without the end, then data": (
        frames(OK, [(b"a", b"b")], b"late", END),
        "trailers that do not end the stream",
    ),
    "malformed in pieces": (
        lambda peer, id_: in_pieces(head(peer, id_, [*OK, (b"X-a", b"b" * 100)])),
        "invalid header name",
    ),
}


def in_pieces(frame: HeadersFrame) -> list[Frame]:
    """The same header block in three frames, of which the first has none of it."""
    frame.flags.discard("END_HEADERS")
    block, frame.data = frame.data, b""
    pieces = [ContinuationFrame(frame.stream_id, piece) for piece in (block[:50], block[50:])]
    pieces[-1].flags.add("END_HEADERS")
    return [frame, *pieces]


@DELIVERIES
@pytest.mark.parametrize("streamed", [False, True], ids=["half-closed", "open"])
@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_response_concerns_its_stream_alone(
    client: Client, clock: MockClock, name: str, streamed: bool, byte_by_byte: bool
) -> None:
    frames, message = MALFORMED[name]
    unending = Gated(b"begun")
    other = client.open(path="other")
    peer = await client.peer()
    other_id, _ = await peer.head()
    await peer.respond(other_id, body=b"first", end=False)
    response = await other.result()

    request, _, stream_id = await client.requested(
        "POST" if streamed else "GET", content=unending if streamed else None, on=peer
    )
    transcript = frames(peer, stream_id)
    await peer.send(b"".join(frame.serialize() for frame in transcript), byte_by_byte=byte_by_byte)
    await request.fails(RemoteProtocolError, message)
    ended = any("END_STREAM" in frame.flags for frame in transcript)
    if streamed or not ended:
        assert await reset_of(peer, stream_id) is ErrorCodes.PROTOCOL_ERROR

    await peer.send_data(other_id, b", second", end=True)
    assert await response.aread() == b"first, second"
    await client.is_served_on(peer)
    assert len(client.connector.dialled) == 1
    assert {frame.stream_id for frame in peer.sent(RstStreamFrame)} <= {stream_id}


@pytest.mark.parametrize(
    "name", ["informational with the end", "informational after the head", "second head"]
)
async def test_a_malformed_head_leaves_header_compression_in_step(
    client: Client, clock: MockClock, name: str
) -> None:
    request, peer, stream_id = await client.requested()
    frames = MALFORMED[name][0](peer, stream_id)
    malformed = frames[-1]
    assert isinstance(malformed, HeadersFrame)
    malformed.data += peer.h2.encoder.encode([(b"x-indexed", b"by the malformed")])
    await peer.send_frame(*frames)
    await request.fails(RemoteProtocolError)
    # Even where the server has ended the stream.
    assert await reset_of(peer, stream_id) is ErrorCodes.PROTOCOL_ERROR
    request, _, stream_id = await client.requested(on=peer)
    assert (await request.answered(peer, stream_id, 200, [(b"x-indexed", b"by the malformed")])).headers == [
        (b"x-indexed", b"by the malformed")
    ]


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
async def test_padding_and_priority_of_heads(
    client: Client, clock: MockClock, pieces: bool, priority: bool
) -> None:
    request, peer, stream_id = await client.requested()
    frame = head(peer, stream_id, [*OK, (b"a", b"b" * 100)])
    # Where the block is in pieces, the padding fills all of the first frame (RFC 9113, 6.2).
    first, *rest = in_pieces(frame) if pieces else [frame]
    assert isinstance(first, HeadersFrame)
    first.flags.add("PADDED")
    first.pad_length = 20
    if priority:
        first.flags.add("PRIORITY")
    await peer.send_frame(first, *rest, data(stream_id, b"", "END_STREAM"))
    response = await request.result()
    assert response.headers == [(b"a", b"b" * 100)]


async def test_a_request_given_up_between_the_pieces_of_its_head(client: Client, clock: MockClock) -> None:
    request, peer, stream_id = await client.requested()
    first, *rest = in_pieces(head(peer, stream_id, [*OK, (b"x-indexed", b"a" * 50)]))
    await peer.send_frame(first)
    await trio.testing.wait_all_tasks_blocked()
    await request.cancel()
    await peer.send_frame(*rest)
    # Header compression has stayed in step.
    request, _, stream_id = await client.requested(on=peer)
    assert (await request.answered(peer, stream_id, 200, [(b"x-indexed", b"a" * 50)])).headers == [
        (b"x-indexed", b"a" * 50)
    ]


@pytest.mark.parametrize("late", ["head", "trailers", "informational", "data"])
async def test_what_comes_after_the_end_of_an_open_stream_resets_it(
    client: Client, clock: MockClock, late: str
) -> None:
    """The server has answered, and the request is still being sent (RFC 9113, 5.1, half-closed (remote))."""
    unending = Gated(b"begun")
    upload, peer, stream_id = await client.opened("POST", content=unending)
    response = await upload.answered(peer, stream_id, 200)
    blocks = {"head": OK, "trailers": [(b"a", b"b")], "informational": [(b":status", b"103")]}
    frame = data(stream_id, b"x") if late == "data" else head(peer, stream_id, blocks[late])
    await peer.send_frame(frame)
    assert await reset_of(peer, stream_id) is ErrorCodes.STREAM_CLOSED
    # The response was whole.
    assert await response.aread() == b""
    await client.is_served_on(peer)
    assert len(client.connector.dialled) == 1


async def test_head_with_a_body(client: Client, clock: MockClock) -> None:
    request, peer, stream_id = await client.requested("HEAD")
    await peer.send_frame(head(peer, stream_id, [*OK, (b"content-length", b"1")]), data(stream_id, b"a"))
    await request.fails(RemoteProtocolError, "longer")
    assert await reset_of(peer, stream_id) is ErrorCodes.PROTOCOL_ERROR
    await client.is_served_on(peer)


async def test_what_came_before_the_malformed_part_can_be_read(client: Client, clock: MockClock) -> None:
    opened, peer, stream_id = await client.opened()
    await peer.respond(stream_id, body=b"good", end=False)
    await peer.send_frame(head(peer, stream_id, [(b"BAD", b"")], "END_STREAM"))
    response = await opened.result()
    body = aiter(response.aiter_stream())
    assert await anext(body) == b"good"
    with pytest.raises(RemoteProtocolError, match="BAD"):
        await anext(body)
    await response.aclose()
    await client.is_served_on(peer)


# -- Isolation.


class Gated:
    """Content whose first piece is there, and whose end has to be asked for."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self.go = trio.Event()
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for piece in self._pieces:
                yield piece
            await self.go.wait()
            yield b"last"
        finally:
            self.closed = True


@pytest.mark.parametrize("begun", [False, True], ids=["before the head", "in the body"])
@pytest.mark.parametrize("how", ["cancelled", "timeout", "left"])
async def test_what_is_given_up_is_reset_and_others_go_on(
    nursery: trio.Nursery, autojump_clock: MockClock, how: str, begun: bool
) -> None:
    async with Client(nursery, max_connections=1) as client:
        other = client.open(path="other")
        # One stream more, and the next request would have to wait.
        peer = await client.peer({SettingCodes.MAX_CONCURRENT_STREAMS: 2})
        other_id, _ = await peer.head()
        await peer.respond(other_id, body=b"first", end=False)
        response = await other.result()

        timeout = {"read": 5} if how == "timeout" else {}
        request, _, stream_id = await client.requested(extensions={"timeout": timeout}, on=peer)
        if begun:
            await peer.respond(stream_id, body=b"some", end=False)
        await wait_all_tasks_blocked()
        if how == "timeout":
            await request.fails(ReadTimeout)
        else:
            await request.cancel()
        # At once: the server has heard nothing yet.
        with trio.fail_after(1):
            [next_one] = [client.request(path="next", extensions={"timeout": {"pool": 0}})]
            next_id, headers = await peer.head()
            assert headers[b":path"] == b"/next"
            await peer.respond(next_id)
            assert (await next_one.result()).status == 200
        assert await reset_of(peer, stream_id) is ErrorCodes.CANCEL
        assert [frame.stream_id for frame in peer.sent(RstStreamFrame)] == [stream_id]

        await peer.send_data(other_id, b", second", end=True)
        assert await response.aread() == b"first, second"
        await wait_all_tasks_blocked()
        assert_unharmed(client.pool, idle=1)


@pytest.mark.parametrize(
    "code", [ErrorCodes.INTERNAL_ERROR, ErrorCodes.NO_ERROR, ErrorCodes.CANCEL, 0xABCDEF]
)
@pytest.mark.parametrize("begun", [False, True], ids=["before the head", "in the body"])
async def test_a_reset_by_the_server_concerns_its_stream_alone(
    client: Client, clock: MockClock, code: int, begun: bool
) -> None:
    name = "error 0xabcdef" if code == 0xABCDEF else ErrorCodes(code).name
    requests = [client.request(path=str(index)) for index in range(3)]
    peer = await client.peer()
    ids = {(await peer.head())[1][b":path"]: 1 + 2 * index for index in range(3)}
    broken = ids[b"/1"]
    if begun:
        await peer.respond(broken, body=b"some", end=False)
    await peer.send_frame(RstStreamFrame(broken, code))
    await requests[1].fails(RemoteProtocolError, f"the server reset the stream: {name}")
    for index in (0, 2):
        await peer.respond(ids[b"/%d" % index], body=b"%d" % index)
        assert (await requests[index].result()).content == b"%d" % index
    await wait_all_tasks_blocked()
    assert_unharmed(client.pool, idle=1)
    assert peer.sent(RstStreamFrame) == []
    assert len(client.connector.dialled) == 1


async def test_a_reset_is_an_answer_and_nothing_is_sent_again(client: Client, clock: MockClock) -> None:
    first, peer, stream_id = await client.requested()
    await first.answered(peer, stream_id)
    request, _, stream_id = await client.requested(on=peer)
    await peer.send_frame(RstStreamFrame(stream_id, ErrorCodes.INTERNAL_ERROR))
    await request.fails(RemoteProtocolError, "INTERNAL_ERROR")
    await wait_all_tasks_blocked()
    assert len(client.connector.dialled) == 1


async def test_the_iterators_error_concerns_its_stream_alone(client: Client, clock: MockClock) -> None:
    class Mine(Exception):
        pass

    async def content() -> AsyncIterator[bytes]:
        yield b"some"
        raise Mine

    other = client.request()
    peer = await client.peer()
    other_id, _ = await peer.head()
    request, _, stream_id = await client.requested("POST", content=content(), on=peer)
    await request.fails(Mine)
    assert await reset_of(peer, stream_id) is ErrorCodes.CANCEL
    assert [bytes(frame.data) for frame in peer.sent(DataFrame)] == [b"some"]
    await peer.respond(other_id, body=b"fine")
    assert (await other.result()).content == b"fine"
    await client.is_served_on(peer)


async def test_content_of_the_declared_length_ends_with_its_last_byte(
    client: Client, clock: MockClock
) -> None:
    content = Gated(b"abc", b"", b"de", b"")
    request = client.request("POST", headers={"Content-Length": "5"}, content=content)
    peer = await client.peer()
    # The iterator has not ended.
    stream_id, headers, body = await peer.request()
    assert headers[b"content-length"] == b"5"
    assert body == b"abcde"
    assert peer.sent(DataFrame)[-1].data == b"de"
    content.go.set()
    await request.fails(LocalProtocolError, "longer")
    await client.is_served_on(peer)
    assert stream_id == 1


# -- What arrives for streams that were left.


class RawSender:
    """Sends data past h2 as a server does that has not heard of the reset, as fast as the client allows."""

    def __init__(self, peer: H2Peer) -> None:
        self._peer = peer
        self.sent = 0

    async def send(self, stream_id: int, size: int, *, padding: int = 0) -> None:
        while size:
            piece = min(size, 16_384 - (padding + 1 if padding else 0))
            frame = data(stream_id, bytes(piece))
            if padding:
                frame.flags.add("PADDED")
                frame.pad_length = padding
            cost = piece + (padding + 1 if padding else 0)
            while connection_credit(self._peer) - self.sent < cost:
                await self._peer.receive()
            await self._peer.send_frame(frame)
            self.sent += cost
            size -= piece


@pytest.mark.parametrize("padding", [0, 100])
async def test_late_data_of_many_cancelled_streams_never_stalls_the_connection(
    client: Client, clock: MockClock, padding: int
) -> None:
    peer: H2Peer | None = None
    for _ in range(80):
        opened = client.open()
        if peer is None:
            peer = await client.peer()
            sender = RawSender(peer)
        stream_id, _ = await peer.head()
        await peer.send_frame(head(peer, stream_id, OK))
        await (await opened.result()).aclose()
        with trio.fail_after(60):
            await sender.send(stream_id, WINDOW - 20_000, padding=padding)
    assert peer is not None
    assert sender.sent > CONNECTION_WINDOW
    await client.is_served_on(peer)
    # What is not credited yet is less than a step.
    assert connection_credit(peer) > sender.sent + CONNECTION_WINDOW - MEGABYTE
    # It is told once, not for every frame.
    assert len(peer.sent(RstStreamFrame)) == 80
    assert [frame for frame in peer.sent(WindowUpdateFrame) if frame.stream_id] == []


async def test_late_heads_and_trailers_of_a_stream_that_was_left(client: Client, clock: MockClock) -> None:
    request, peer, stream_id = await client.requested()
    await request.cancel()
    for block in ([(b":status", b"103")], [*OK, (b"x-indexed", b"to be")], [(b"x", b"y")]):
        flags = ["END_STREAM"] if block == [(b"x", b"y")] else []
        await peer.send_frame(head(peer, stream_id, block, *flags))
    # Header compression has stayed in step.
    request, _, stream_id = await client.requested(on=peer)
    assert (await request.answered(peer, stream_id, 200, [(b"x-indexed", b"to be")])).headers == [
        (b"x-indexed", b"to be")
    ]


async def test_data_for_a_stream_left_long_ago(
    client: Client, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http2_resets, "MOST_REMEMBERED", 3)
    peer = await ready(client)
    ids = []
    for _ in range(5):
        request = client.request()
        ids.append((await peer.head())[0])
        await request.cancel()
    sender = RawSender(peer)
    for stream_id in ids:
        await sender.send(stream_id, 20_000)
        await client.is_served_on(peer)
    # Those that are not remembered are told once more, which does no harm.
    told = [frame.stream_id for frame in peer.sent(RstStreamFrame)]
    assert [told.count(stream_id) for stream_id in ids] == [3, 3, 1, 1, 1]


async def test_small_frames_in_flight_to_streams_that_were_left_are_no_flood(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A server that had not seen the resets, and kept to its windows, lost the connection."""
    left = trio.Event()
    peers: list[H2Peer] = []

    async def send_and_serve(peer: H2Peer) -> None:
        peers.append(peer)
        await peer.start()
        ids = [(await peer.head())[0] for _ in range(60)]
        for stream_id in ids:
            await peer.respond(stream_id, end=False)
        await left.wait()
        for stream_id in ids:
            await peer.send_frame(*[DataFrame(stream_id, b"small") for _ in range(200)])
        stream_id, _ = await peer.head()
        await peer.respond(stream_id)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, send_and_serve)
    async with pool:
        responses: list[Response] = []

        async def request() -> None:
            responses.append(await pool.handle_async_request(Request("GET", "http://a.example")))

        async with trio.open_nursery() as requests:
            for _ in range(60):
                requests.start_soon(request)
        for response in responses:
            await response.aclose()
        left.set()
        assert (await pool.request("POST", "http://a.example")).status == 200
        assert len(peers) == 1
        assert not peers[0].sent(GoAwayFrame)


async def serve_and_ignore(peer: H2Peer, *, served: bytes) -> None:
    """A server that answers requests for one path only."""
    await peer.start()
    while True:
        try:
            stream_id, headers = await peer.head()
        except EOFError:
            return
        if headers[b":path"] == served:
            await peer.respond(stream_id, body=b"fine")


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
async def test_a_hundred_cancelled_requests(
    nursery: trio.Nursery, autojump_clock: MockClock, at_once: bool
) -> None:
    peers = []

    async def serve(peer: H2Peer) -> None:
        peers.append(peer)
        await serve_and_ignore(peer, served=b"/served")

    pool, connector = h2_pool(nursery, serve, max_connections=1)
    async with pool:
        await pool.request("GET", URL + "served")
        await cancel_a_hundred(pool, URL, at_once=at_once)
        with trio.fail_after(0.001):
            response = await pool.request("GET", URL + "served", extensions={"timeout": {"pool": 0}})
        assert response.content == b"fine"
        assert len(connector.dialled) == 1
        assert_unharmed(pool, idle=1)
    resets = peers[0].sent(RstStreamFrame)
    assert len(resets) == 100
    assert {frame.error_code for frame in resets} == {ErrorCodes.CANCEL}


async def cancel_a_hundred(pool: ConnectionPool, url: str, *, at_once: bool) -> None:
    for _ in range(1 if at_once else 100):
        async with trio.open_nursery() as nursery:
            for index in range(100 if at_once else 1):
                nursery.start_soon(pool.request, "GET", f"{url}{index}")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


both_schemes = pytest.mark.parametrize("secure", [False, True], ids=["tcp", "tls"])


def h2_tls() -> TLS:
    """As the other tests' TLS, with a server that chooses HTTP/2."""
    tls = make_tls()
    return TLS(tls.ca, alpn_server("h2"), client_context(tls.ca))


async def serve_h2(
    nursery: trio.Nursery, script: Callable[[H2Peer], Awaitable[None]], *, secure: bool
) -> tuple[ConnectionPool, str]:
    """A server on a real socket, and a pool for it."""

    async def play(scripted: ScriptedPeer) -> None:
        await script(H2Peer(scripted.stream))

    if secure:
        tls = h2_tls()
        server = await serve_tcp(nursery, play, tls=tls.server)
        pool = ConnectionPool(tls.client, http1=False, http2=True, max_connections=1)
    else:
        server = await serve_tcp(nursery, play)
        pool = ConnectionPool(http1=False, http2=True, max_connections=1)
    return pool, f"{server.url}/"


@both_schemes
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
async def test_a_hundred_cancelled_requests_on_a_real_socket(
    nursery: trio.Nursery, secure: bool, at_once: bool
) -> None:
    pool, url = await serve_h2(nursery, functools.partial(serve_and_ignore, served=b"/served"), secure=secure)
    async with pool:
        await pool.request("GET", url + "served")
        await cancel_a_hundred(pool, url, at_once=at_once)
        response = await pool.request("GET", url + "served", extensions={"timeout": {"pool": 0}})
        assert response.content == b"fine"
        assert response.extensions["stream_id"] == 203
        assert pool.statistics().connections_opened == 1


@both_schemes
async def test_a_cancelled_upload_never_tears_a_frame(nursery: trio.Nursery, secure: bool) -> None:
    """The peer reads nothing until the upload was cancelled; h2 refuses whatever does not add up."""
    read_on = trio.Event()
    report = Outbox()

    async def serve(peer: H2Peer) -> None:
        await peer.start(
            {SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1, SettingCodes.MAX_FRAME_SIZE: 2**24 - 1}
        )
        await peer.credit(2**30)
        stream_id, _ = await peer.head()
        await peer.respond(stream_id)
        await peer.head()
        report.begun.set()
        await read_on.wait()
        report.code = await reset_of(peer, 3)
        stream_id, _, body = await peer.request()
        await peer.respond(stream_id, body=body)
        report.frames = peer.sent(DataFrame, 3)
        await peer.until_closed()

    pool, url = await serve_h2(nursery, serve, secure=secure)
    async with pool:
        await pool.request("GET", url)
        upload = Running(nursery, pool.request, "POST", url, content=bytes(64 * MEGABYTE))
        await report.begun.wait()
        # Until neither side can do anything more.
        await wait_all_tasks_blocked(0.01)
        await upload.cancel()
        after = Running(nursery, pool.request, "POST", url, content=b"after")
        await wait_all_tasks_blocked(0.01)
        read_on.set()
        assert (await after.result()).content == b"after"
        assert pool.statistics().connections_opened == 1
    assert report.code is ErrorCodes.CANCEL
    assert 0 < sum(len(frame.data) for frame in report.frames) < 64 * MEGABYTE


class Outbox:
    """What a script tells the test."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.code: ErrorCodes | None = None
        self.frames: list[DataFrame] = []


# -- Flow control: uploads.


def pattern(size: int) -> bytes:
    """Bytes that would show if some were lost, doubled or exchanged."""
    return b"".join(b"%07d " % index for index in range(0, size, 8))[:size]


async def ready(client: Client, settings: dict[SettingCodes, int] | None = None) -> H2Peer:
    """The peer of a connection on which the client knows the server's settings."""
    request = client.request()
    peer = await client.peer(settings)
    await peer.respond((await peer.head())[0])
    await request.result()
    return peer


async def received_on(peer: H2Peer, stream_id: int, size: int) -> None:
    """Receive until a stream has brought so many bytes in all; credit is not given."""
    while sum(len(frame.data) for frame in peer.sent(DataFrame, stream_id)) < size:
        await peer.receive()


@pytest.mark.parametrize("whole", [True, False], ids=["bytes", "pieces"])
@pytest.mark.parametrize(
    ("window", "size"), [(1, 300), (7, 3000), (1000, 100_000), (65_535, 300_000), (2**31 - 1, 300_000)]
)
async def test_uploads_through_windows_of_any_size(
    client: Client, clock: MockClock, window: int, size: int, whole: bool
) -> None:
    content = pattern(size)
    peer = await ready(client, {SettingCodes.INITIAL_WINDOW_SIZE: window})
    pieces = [content[i : i + 33_333] for i in range(0, size, 33_333)]
    request = client.request("POST", content=content if whole else pieces)
    stream_id, _, body = await peer.request()
    assert body == content
    sizes = [len(frame.data) for frame in peer.sent(DataFrame)]
    assert max(sizes) == min(window, 16_384)
    await request.succeeds(peer, stream_id)


@pytest.mark.parametrize("window", [1, 1000, 40_000])
async def test_several_uploads_share_the_windows_without_stall(
    client: Client, clock: MockClock, window: int
) -> None:
    contents = {b"/%d" % index: pattern(window * 10 + index) for index in range(8)}
    peer = await ready(client, {SettingCodes.INITIAL_WINDOW_SIZE: window})
    requests = [
        client.request("POST", path.decode()[1:], content=content) for path, content in contents.items()
    ]
    paths = {}
    for _ in requests:
        stream_id, headers = await peer.head()
        paths[stream_id] = headers[b":path"]
    bodies = dict.fromkeys(paths, b"")
    unfinished = set(paths)
    while unfinished:
        event: Any = await peer.event(h2.events.Event)
        if isinstance(event, h2.events.DataReceived):
            bodies[event.stream_id] += event.data
            peer.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            await peer.flush()
        elif isinstance(event, h2.events.StreamEnded) and event.stream_id in unfinished:
            unfinished.remove(event.stream_id)
            await peer.respond(event.stream_id)
    assert {paths[stream_id]: body for stream_id, body in bodies.items()} == contents
    for request in requests:
        assert (await request.result()).status == 200


@pytest.mark.parametrize("frame_size", [16_384, 20_000, 65_536, 2**24 - 1])
async def test_frames_are_as_large_as_allowed_but_no_larger_than_is_fair(
    client: Client, clock: MockClock, frame_size: int
) -> None:
    content = pattern(MEGABYTE)
    settings = {SettingCodes.MAX_FRAME_SIZE: frame_size, SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1}
    peer = await ready(client, settings)
    await peer.credit(2 * MEGABYTE)
    request = client.request("POST", content=content)
    stream_id, _, body = await peer.request()
    assert body == content
    assert max(len(frame.data) for frame in peer.sent(DataFrame)) == min(frame_size, 65_536)
    await request.succeeds(peer, stream_id)


async def test_a_window_lowered_below_zero_in_mid_flight(client: Client, clock: MockClock) -> None:
    content = pattern(3000)
    peer = await ready(client, {SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    request, _, stream_id = await client.requested("POST", content=content, on=peer)
    await received_on(peer, stream_id, 1000)
    await peer.send_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    await peer.event(h2.events.SettingsAcknowledged)
    await peer.event(h2.events.SettingsAcknowledged)
    # It is at -1000 now.
    for increment, sent in ((999, 1000), (1, 1000), (1, 1001), (1999, 3000)):
        await peer.credit(increment, stream_id)
        await received_on(peer, stream_id, sent)
        await wait_all_tasks_blocked()
    assert await peer.body(stream_id) == content
    sizes = [len(frame.data) for frame in peer.sent(DataFrame, stream_id)]
    assert sizes == [1000, 1, 1999]
    await request.succeeds(peer, stream_id)


async def test_a_window_raised_by_settings_lets_uploads_go_on(client: Client, clock: MockClock) -> None:
    peer = await ready(client, {SettingCodes.INITIAL_WINDOW_SIZE: 0})
    request, _, stream_id = await client.requested("POST", content=b"abc", on=peer)
    await wait_all_tasks_blocked()
    assert peer.sent(DataFrame) == []
    await peer.send_settings({SettingCodes.INITIAL_WINDOW_SIZE: 3})
    assert await peer.body(stream_id) == b"abc"
    await request.succeeds(peer, stream_id)


async def test_an_upload_without_window_blocks_nobody(client: Client, clock: MockClock) -> None:
    peer = await ready(client, {SettingCodes.INITIAL_WINDOW_SIZE: 0})
    upload, _, stream_id = await client.requested("POST", content=b"abc", on=peer)
    await client.is_served_on(peer)
    await upload.cancel()
    assert await reset_of(peer, stream_id) is ErrorCodes.CANCEL
    await client.is_served_on(peer)


# -- Flow control: downloads.


async def send_when_allowed(peer: H2Peer, stream_id: int, size: int, **options: Any) -> None:
    """Send data as far as the client's windows allow, waiting for them."""
    while size:
        padding = options.get("pad_length")
        room = min(peer.h2.local_flow_control_window(stream_id), 16_384) - (padding + 1 if padding else 0)
        if room <= 0:
            await peer.receive()
            continue
        peer.h2.send_data(stream_id, bytes(min(room, size)), **options)
        size -= min(room, size)
        await peer.flush()


async def test_unread_bodies_are_bounded_and_block_nobody(
    client: Client, clock: MockClock, nursery: trio.Nursery
) -> None:
    """All of them together are more than the connection's window."""
    peer: H2Peer | None = None
    responses: list[Response] = []
    for _ in range(CONNECTION_WINDOW // WINDOW + 6):
        opened = client.open()
        peer = peer or await client.peer()
        stream_id, _ = await peer.head()
        peer.h2.send_headers(stream_id, OK)
        await send_when_allowed(peer, stream_id, WINDOW)
        responses.append(await opened.result())
    assert peer is not None
    await wait_all_tasks_blocked()
    await client.is_served_on(peer)
    # Nothing more is let in, for any of them.
    assert [frame for frame in peer.sent(WindowUpdateFrame) if frame.stream_id] == []
    # But if one is read it goes on, to its end.
    stream_id = responses[3].extensions["stream_id"]
    reading = Running(nursery, responses[3].aread)
    await send_when_allowed(peer, stream_id, MEGABYTE)
    await peer.send_data(stream_id, b"", end=True)
    assert len(await reading.result()) == WINDOW + MEGABYTE
    assert {frame.stream_id for frame in peer.sent(WindowUpdateFrame)} == {0, stream_id}
    for response in responses:
        await response.aclose()
    await client.is_served_on(peer)


async def test_credit_is_given_as_the_body_is_consumed(client: Client, clock: MockClock) -> None:
    opened, peer, stream_id = await client.opened()
    response = await opened.answered(peer, stream_id, end=False)
    body = aiter(response.aiter_stream())
    # It is given for half a window at a time, and only for what was consumed.
    steps: list[tuple[list[int], list[int]]] = [
        ([], []),
        ([], [200_000]),
        ([200_000], [200_000]),
        ([200_000], [200_000, 200_000]),
    ]
    for before, after in steps:
        await send_when_allowed(peer, stream_id, 100_000)
        await client.is_served_on(peer)
        assert credit_of(peer, stream_id) == before
        consumed = 0
        while consumed < 100_000:
            consumed += len(await anext(body))
        await client.is_served_on(peer)
        assert credit_of(peer, stream_id) == after
    await response.aclose()
    # RST_STREAM has not been sent yet.
    await client.pool.aclose()


async def widest_window(
    nursery: trio.Nursery, client: Client, read: Callable[[AsyncIterator[bytes]], Awaitable[None]]
) -> int:
    """The most that the client ever lets the server send, when it reads a body in a certain way."""
    opened, peer, stream_id = await client.opened()
    peer.h2.send_headers(stream_id, OK)
    await peer.flush()
    response = await opened.result()
    widest = 0

    async def send() -> None:
        nonlocal widest
        while True:
            widest = max(widest, peer.h2.local_flow_control_window(stream_id))
            await send_when_allowed(peer, stream_id, max(1, peer.h2.local_flow_control_window(stream_id)))

    sending = Running(nursery, send)
    await read(aiter(response.aiter_stream()))
    await sending.cancel()
    await response.aclose()
    return widest


async def test_the_window_grows_while_the_reader_keeps_up(
    client: Client, clock: MockClock, nursery: trio.Nursery
) -> None:
    async def read(body: AsyncIterator[bytes]) -> None:
        size = 0
        while size < 32 * MEGABYTE:
            size += len(await anext(body))

    assert LARGEST_WINDOW // 2 < await widest_window(nursery, client, read) <= LARGEST_WINDOW


async def test_the_window_does_not_grow_for_a_reader_who_is_slow(
    client: Client, clock: MockClock, nursery: trio.Nursery
) -> None:
    async def read(body: AsyncIterator[bytes]) -> None:
        size = 0
        while size < 4 * MEGABYTE:
            size += len(await anext(body))
            # There is always something that waits to be read.
            await wait_all_tasks_blocked()

    assert await widest_window(nursery, client, read) == WINDOW


async def test_padding_is_credited(client: Client, clock: MockClock) -> None:
    """More padding than fits a window."""
    request, peer, stream_id = await client.requested()
    peer.h2.send_headers(stream_id, OK)
    for _ in range(2500):
        await send_when_allowed(peer, stream_id, 10, pad_length=255)
    await peer.send_data(stream_id, b"", end=True)
    assert len((await request.result()).content) == 25_000


# -- Full duplex.


@pytest.mark.parametrize("size", [0, 5, 200_000])
@pytest.mark.parametrize("how", ["left open", "NO_ERROR", "NO_ERROR at once", "CANCEL"])
async def test_an_early_answer_is_delivered_whole_and_ends_the_upload(
    client: Client, clock: MockClock, how: str, size: int
) -> None:
    content = Gated(pattern(300_000))
    opened, peer, stream_id = await client.opened("POST", content=content)
    # The upload is stuck, for want of a window.
    await received_on(peer, stream_id, 65_535)
    if how == "NO_ERROR at once":
        frames: list[Frame] = [
            head(peer, stream_id, OK),
            *[data(stream_id, pattern(10_000)) for _ in range(size // 10_000)],
            data(stream_id, pattern(size % 10_000), "END_STREAM"),
            RstStreamFrame(stream_id, ErrorCodes.NO_ERROR),
        ]
        await peer.send_frame(*frames)
    else:
        await peer.respond(stream_id, body=pattern(size))
        if how != "left open":
            await wait_all_tasks_blocked()
            await peer.send_frame(RstStreamFrame(stream_id, ErrorCodes[how]))
    response = await opened.result()
    await wait_all_tasks_blocked()
    assert content.closed == (how != "left open")
    body = await response.aread()
    assert len(body) == size
    assert content.closed
    if how == "left open":
        assert await reset_of(peer, stream_id) is ErrorCodes.CANCEL
    # The connection's window is used up, which h2 does not open by itself.
    peer.h2.increment_flow_control_window(100_000)
    await client.is_served_on(peer)
    assert len(peer.sent(RstStreamFrame)) == (how == "left open")
    assert_unharmed(client.pool, idle=1)


async def test_an_upload_that_ends_just_after_its_answer_is_no_reset(
    client: Client, clock: MockClock, nursery: trio.Nursery
) -> None:
    content = Gated(b"first")
    opened, peer, stream_id = await client.opened("POST", content=content)
    response = await opened.answered(peer, stream_id, body=b"early")
    reading = Running(nursery, response.aread)
    await wait_all_tasks_blocked()
    content.go.set()
    assert await reading.result() == b"early"
    assert await peer.body(stream_id) == b"firstlast"
    await client.is_served_on(peer)
    assert peer.sent(RstStreamFrame) == []


async def test_the_rest_of_a_response_that_is_left_is_taken_if_it_has_arrived(
    client: Client, clock: MockClock
) -> None:
    """The upload has failed, the response has not."""
    content = Gated(b"x" * 100_000)
    opened, peer, stream_id = await client.opened("POST", content=content)
    response = await opened.answered(peer, stream_id, body=b"whole", trailers=[(b"a", b"b")])
    await wait_all_tasks_blocked()
    await response.aclose()
    assert await reset_of(peer, stream_id) is ErrorCodes.CANCEL
    peer.h2.increment_flow_control_window(100_000)
    await client.is_served_on(peer)


# -- Reading.


async def test_what_failed_while_the_body_was_read_is_not_waited_for_again(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A second read, after the iterator's error had come out of the first, waited for ever."""
    answered = trio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"begin"
        await answered.wait()
        raise KeyError("the iterator's own")

    async def answer_and_wait(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, end=False)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, answer_and_wait)
    async with pool:
        request = Request("POST", "http://a.example", content=content())
        response = await pool.handle_async_request(request)
        body = aiter(response.stream)
        answered.set()
        with pytest.raises(KeyError, match="the iterator's own"):
            await anext(body)
        with trio.fail_after(10):
            with pytest.raises(ReadError, match="the stream was closed"):
                await anext(body)
        await response.aclose()


# -- Timeouts. That a timed-out stream is reset, and others go on, is shown above.


async def test_the_write_timeout_while_the_window_is_closed(client: Client, clock: MockClock) -> None:
    peer = await ready(client, {SettingCodes.INITIAL_WINDOW_SIZE: 0})
    request, _, stream_id = await client.requested(
        "POST", content=b"abc", extensions={"timeout": {"write": 5, "read": 1}}, on=peer
    )
    for _ in range(2):
        await trio.sleep(4)
        await peer.credit(1, stream_id)
    started = trio.current_time()
    await request.fails(WriteTimeout, "accepted no data within 5 seconds")
    assert trio.current_time() - started == pytest.approx(5)
    assert await reset_of(peer, stream_id) is ErrorCodes.CANCEL
    await client.is_served_on(peer)


def lockstep_pool(nursery: trio.Nursery, serve: Callable[[H2Peer], Awaitable[None]]) -> ConnectionPool:
    """A pool whose sends wait until the peer receives."""

    async def play(scripted: ScriptedPeer) -> None:
        await serve(H2Peer(scripted.stream))

    connector = MemoryConnector(nursery, play, stream_pair=trio.testing.lockstep_stream_pair)
    return ConnectionPool(http1=False, http2=True, connector=connector)


LARGE_HEADER = {"x": "y" * 100_000}


async def test_a_large_head_waits_until_it_was_taken(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def slow(peer: H2Peer) -> None:
        await trio.sleep(4)
        peer.h2.decoder.max_header_list_size = 2**20
        await peer.start()
        stream_id, headers, _ = await peer.request()
        assert headers[b"x"] == LARGE_HEADER["x"].encode()
        await peer.respond(stream_id)
        await peer.until_closed()

    async with lockstep_pool(nursery, slow) as pool:
        response = await pool.request(
            "GET", URL, headers=LARGE_HEADER, extensions={"timeout": {"write": 5, "read": 1}}
        )
        assert response.status == 200


async def test_data_waits_while_too_much_waits_to_be_sent(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """The windows are wide, but nobody reads."""
    content = pattern(2 * MEGABYTE)
    read_on = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
        await peer.respond((await peer.head())[0])
        await peer.credit(2**30)
        await read_on.wait()
        stream_id, _, body = await peer.request()
        await peer.respond(stream_id, body=body[:5])
        await peer.until_closed()

    async with lockstep_pool(nursery, serve) as pool:
        await pool.request("GET", URL)
        upload = Running(nursery, pool.request, "POST", URL, content=content)
        await wait_all_tasks_blocked()
        connection: Any = pool.connections[0]
        assert connection.outbound.size < 256 * KILOBYTE
        read_on.set()
        assert (await upload.result()).content == content[:5]


async def test_the_pool_timeout_where_the_server_takes_no_more_streams(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async with Client(nursery, max_connections=1) as client:
        peer = await ready(client, {SettingCodes.MAX_CONCURRENT_STREAMS: 1})
        request, _, stream_id = await client.requested(on=peer)
        await client.request(extensions={"timeout": {"pool": 3}}).fails(PoolTimeout)
        await request.succeeds(peer, stream_id)
        await client.is_served_on(peer)
        assert len(peer.sent(HeadersFrame)) == 3


# -- Errors of the connection.


@pytest.mark.parametrize("begun", [False, True], ids=["before the head", "in the body"])
async def test_when_the_server_closes_each_request_gets_an_error_of_its_own(
    client: Client, clock: MockClock, begun: bool
) -> None:
    requests = [client.request("POST") for _ in range(3)]
    peer = await client.peer()
    for _ in requests:
        stream_id, _ = await peer.head()
        if begun:
            await peer.respond(stream_id, body=b"some", end=False)
    await peer.stream.aclose()
    when = "in the middle of the response" if begun else "without a response"
    for request in requests:
        await request.fails(RemoteProtocolError, f"the server closed the connection, {when}")
    assert len({request.error for request in requests}) == 3
    await wait_all_tasks_blocked()
    assert_unharmed(client.pool)


async def test_what_has_arrived_whole_can_be_read_though_the_connection_has_ended(
    client: Client, clock: MockClock
) -> None:
    content = Gated(b"x")
    opened = [client.open("POST"), client.open("POST", content=content)]
    peer = await client.peer()
    for _ in opened:
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, body=b"whole", trailers=[(b"a", b"b")])
    responses = [await each.result() for each in opened]
    await peer.stream.aclose()
    await wait_all_tasks_blocked()
    assert content.closed
    for response in responses:
        assert await response.aread() == b"whole"
        assert response.extensions["trailing_headers"] == [(b"a", b"b")]
    assert_unharmed(client.pool)


@both_schemes
async def test_a_connection_that_breaks_gives_each_error_its_cause(
    nursery: trio.Nursery, secure: bool
) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        for _ in range(3):
            await peer.head()
        reset(ScriptedPeer(peer.stream))

    pool, url = await serve_h2(nursery, serve, secure=secure)
    async with pool:
        requests = [Running(nursery, functools.partial(pool.request, "POST", url)) for _ in range(3)]
        errors = set()
        for request in requests:
            error = await request.fails(ReadError, "without a response")
            assert isinstance(error.__cause__, trio.BrokenResourceError)
            errors.add(error)
        assert len(errors) == 3


async def test_a_body_whose_connection_can_not_be_sent_on_is_a_read_error(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """It was a WriteError, which nobody expects of reading."""
    client: Any = None

    async def begin(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, body=b"beginning", end=False)
        client.send_stream.send_all_hook = fail
        # What the client would answer to this it can't send.
        await peer.send_ping(b"12345678")
        await peer.until_closed()

    async def fail() -> None:
        raise trio.BrokenResourceError("it broke")

    def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        nonlocal client
        client, server = memory_stream_pair()
        return client, server

    pool, connector = h2_pool(nursery, begin)
    connector._stream_pair = pair
    async with pool, pool.stream("GET", "http://a.example") as response:
        with pytest.raises(ReadError, match=r"it broke, in the middle of the response") as info:
            await response.aread()
        assert isinstance(info.value.__cause__, trio.BrokenResourceError)


async def test_a_get_on_a_reused_connection_is_sent_again(client: Client, clock: MockClock) -> None:
    events = Events()
    first = await ready(client)
    get = client.request(extensions={"trace": events})
    post = client.request("POST")
    for _ in range(2):
        await first.head()
    await first.stream.aclose()
    second = await client.peer()
    await post.fails(RemoteProtocolError, "without a response")
    stream_id, headers = await second.head()
    assert (stream_id, headers[b":method"]) == (1, b"GET")
    await second.respond(stream_id)
    assert (await get.result()).status == 200
    assert len(client.connector.dialled) == 2
    await client.pool.aclose()
    assert events.names.count("connection.retry.started") == 1


async def test_it_is_sent_again_only_once(client: Client, clock: MockClock) -> None:
    peer = await ready(client)
    request = client.request()
    for _ in range(2):
        await peer.head()
        await peer.stream.aclose()
        if len(client.connector.dialled) == 1:
            peer = await client.peer()
    await request.fails(RemoteProtocolError, "without a response")
    assert len(client.connector.dialled) == 2


async def test_a_request_whose_response_has_begun_is_not_sent_again(client: Client, clock: MockClock) -> None:
    peer = await ready(client)
    request, _, stream_id = await client.requested(on=peer)
    peer.h2.send_headers(stream_id, [(b":status", b"103")])
    await peer.flush()
    await peer.stream.aclose()
    await request.fails(RemoteProtocolError, "in the middle of the response")
    assert len(client.connector.dialled) == 1


def stop_receiving(peer: H2Peer) -> None:
    """From now on the client's sends fail, while it is still being sent to."""
    stream: Any = peer.stream
    stream.receive_stream.close()


async def test_an_answer_is_read_though_the_request_could_not_be_sent(
    client: Client, clock: MockClock
) -> None:
    content = Gated(b"first")
    request = client.request("POST", content=content)
    waiting = client.request("POST")
    peer = await client.peer()
    for _ in range(2):
        stream_id, headers = await peer.head()
        if b"content-length" not in headers:
            upload_id = stream_id
    stop_receiving(peer)
    content.go.set()
    await wait_all_tasks_blocked()
    await peer.respond(upload_id, 413, body=b"too much")
    response = await request.result()
    assert (response.status, response.content) == (413, b"too much")
    # The connection takes nothing more.
    error = await waiting.fails(WriteError)
    assert isinstance(error.__cause__, trio.BrokenResourceError)
    await trio.sleep(2)
    assert_unharmed(client.pool)


async def test_last_words_are_waited_for_only_a_moment(client: Client, clock: MockClock) -> None:
    content = Gated(b"first")
    request = client.request("POST", content=content)
    peer = await client.peer()
    await peer.head()
    stop_receiving(peer)
    content.go.set()
    started = trio.current_time()
    await request.fails(WriteError, "without a response")
    assert trio.current_time() - started == pytest.approx(1)
    await wait_all_tasks_blocked()
    assert_unharmed(client.pool)


@pytest.mark.parametrize("traced", [False, True])
async def test_an_upload_that_waits_gets_the_error_of_the_connection(
    client: Client, clock: MockClock, traced: bool
) -> None:
    content = Gated(b"x")
    events = Events() if traced else None
    request = client.request("POST", content=content, extensions={"trace": events})
    peer = await client.peer()
    await received_on(peer, (await peer.head())[0], 1)
    await peer.stream.aclose()
    await request.fails(RemoteProtocolError, "without a response")
    assert content.closed
    await client.pool.aclose()
    if events is not None:
        assert "http2.send_request_body.failed" in events.names


async def test_a_request_that_is_refused_while_its_handler_takes_its_time_is_sent_again(
    client: Client,
    autojump_clock: MockClock,
) -> None:
    async def handler(name: str, info: dict[str, Any]) -> None:
        if name == "http2.send_request_body.started":
            await trio.sleep(5)

    request, peer, stream_id = await client.requested(
        "POST", content=b"x" * 100_000, extensions={"trace": handler}
    )
    await peer.send_frame(RstStreamFrame(stream_id, ErrorCodes.REFUSED_STREAM))
    stream_id, _, body = await peer.request()
    assert len(body) == 100_000
    assert (await request.answered(peer, stream_id)).extensions["stream_id"] == 3


async def test_a_socket_that_is_found_broken_while_sending(nursery: trio.Nursery) -> None:
    peers = []

    async def serve(peer: H2Peer) -> None:
        peers.append(peer)
        await peer.start()
        await peer.respond((await peer.head())[0], end=False)
        await trio.sleep_forever()

    pool, url = await serve_h2(nursery, serve, secure=False)
    async with pool:
        response = await pool.handle_async_request(Request("GET", url))
        while not pool.connections[0].settings_received.is_set():  # type: ignore[attr-defined]
            await trio.lowlevel.checkpoint()
        # The next request is sent before anybody could have read that there is nobody any more.
        reset(ScriptedPeer(peers[0].stream))
        with pytest.raises((NetworkError, RemoteProtocolError), match="without a response"):
            await pool.request("POST", url)
        with pytest.raises((NetworkError, RemoteProtocolError), match="in the middle of the response"):
            await response.aread()
        await response.aclose()


async def test_a_socket_that_is_found_broken_while_a_lone_request_is_sent(nursery: trio.Nursery) -> None:
    peers = []

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        peers.append(peer)
        await trio.sleep_forever()

    async def pieces() -> AsyncIterator[bytes]:
        while not peers:
            await trio.lowlevel.checkpoint()
        # The piece is sent before the reader runs.
        reset(ScriptedPeer(peers[0].stream))
        yield b"piece"

    pool, url = await serve_h2(nursery, serve, secure=False)
    async with pool:
        with pytest.raises((NetworkError, RemoteProtocolError), match="without a response"):
            await pool.request("POST", url, content=pieces())
        await assert_settles(pool)


async def test_frames_on_a_stream_that_was_refused_do_no_harm(client: Client, clock: MockClock) -> None:
    kept = client.request()
    first = await client.peer()
    kept_id, _ = await first.head()
    refused = client.request(path="refused")
    refused_id, _ = await first.head()
    # In one piece: the request has not noticed yet.
    early = head(first, refused_id, [(b":status", b"103")])
    await first.send_frame(GoAwayFrame(0, kept_id), early, head(first, refused_id, OK))
    second = await client.peer()
    stream_id, headers = await second.head()
    assert headers[b":path"] == b"/refused"
    # And again, now that it has.
    await first.send_frame(data(refused_id, b"x"), head(first, refused_id, [(b"a", b"b")], "END_STREAM"))
    await first.send_frame(head(first, kept_id, OK), data(kept_id, b"kept", "END_STREAM"))
    assert (await kept.result()).content == b"kept"
    await second.respond(stream_id, body=b"again")
    assert (await refused.result()).content == b"again"


# -- Latency.


async def test_a_download_over_a_link_with_latency_is_not_held_down_by_windows(
    autojump_clock: MockClock,
) -> None:
    """With the window of the beginning it would take 128 round trips."""
    round_trip, size = 0.2, 32 * 2**20

    async def serve(scripted: ScriptedPeer) -> None:
        peer = H2Peer(scripted.stream)
        await peer.start()
        stream_id, _, _ = await peer.request()
        await peer.respond(stream_id, end=False)
        left = size
        while left:
            room = min(left, peer.h2.local_flow_control_window(stream_id), peer.h2.max_outbound_frame_size)
            if room:
                left -= room
                peer.h2.send_data(stream_id, bytes(room), end_stream=not left)
                await peer.flush()
            else:
                await peer.receive()
        await peer.until_closed()

    def distant_pair() -> tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]:
        ours, near = trio.testing.memory_stream_pair()
        far, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(carry, near, far, round_trip / 2)
        nursery.start_soon(carry, far, near, round_trip / 2)
        return ours, theirs

    async with trio.open_nursery() as nursery:
        connector = MemoryConnector(nursery, serve, stream_pair=distant_pair)
        async with ConnectionPool(http1=False, http2=True, connector=connector) as pool:
            response = await pool.request("GET", URL)
            assert len(response.content) == size
            assert trio.current_time() < 16 * round_trip


async def carry(source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream, delay: float) -> None:
    """Hand on what arrives, each piece so much later."""
    arrived, due = trio.open_memory_channel[tuple[float, bytes]](math.inf)

    async def take() -> None:
        async with arrived:
            async for data in source:
                arrived.send_nowait((trio.current_time() + delay, bytes(data)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        async for when, data in due:
            await trio.sleep_until(when)
            with contextlib.suppress(trio.BrokenResourceError):
                await sink.send_all(data)
        await sink.send_eof()


# -- Closing the pool.


async def test_closing_the_pool_ends_what_is_under_way(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    content = Gated(b"first")
    async with Client(nursery, max_connections=1) as client:
        upload = client.open("POST", content=content)
        peer = await client.peer({SettingCodes.MAX_CONCURRENT_STREAMS: 3})
        await peer.head()
        mute = client.request("POST")
        await peer.head()
        reading, _, stream_id = await client.requested("POST", on=peer)
        await peer.respond(stream_id, body=b"some", end=False)
        waiting = client.request("POST")
        await wait_all_tasks_blocked()
        assert client.pool.statistics().waiting == 1
        await client.pool.aclose()
        for request, when in (
            (upload, "without"),
            (mute, "without"),
            (reading, "in the middle of"),
        ):
            await request.fails(ReadError, f"the connection was closed, {when}")
        await waiting.fails(ConnectionNotAvailable)
        assert content.closed
        assert client.pool.connections == []
        await peer.until_closed()
        assert peer.sent(RstStreamFrame) == []


# -- What there is to see.


async def test_connections_and_statistics(client: Client, clock: MockClock) -> None:
    def seen() -> tuple[int, int, int, int]:
        numbers = client.pool.statistics()
        return numbers.open, numbers.active, numbers.idle, numbers.requests_served

    peer = await ready(client)
    [connection] = client.pool.connections
    start = "<HTTP2Connection 'http://example.com:80', HTTP/2"
    assert repr(connection) == f"{start}, idle, 0 streams, 1 request>"
    assert seen() == (1, 0, 1, 1)
    requests, ids = [], []
    for _ in range(2):
        requests.append(client.open())
        ids.append((await peer.head())[0])
    assert repr(connection) == f"{start}, active, 2 streams, 3 requests>"
    assert seen() == (1, 1, 0, 1)
    await peer.respond(ids[0])
    await (await requests[0].result()).aclose()
    assert repr(connection) == f"{start}, active, 1 stream, 3 requests>"
    assert seen() == (1, 1, 0, 2)
    await peer.respond(ids[1])
    await (await requests[1].result()).aclose()
    assert seen() == (1, 0, 1, 3)
    await client.pool.aclose()
    assert repr(connection) == f"{start}, closed, 0 streams, 3 requests>"
    assert seen() == (0, 0, 0, 3)


# -- Trace.


EXCHANGE = both_ends(
    "http2.send_request_headers",
    "http2.send_request_body",
    "http2.receive_response_headers",
    "http2.receive_response_body",
    "http2.response_closed",
)
FIRST_EXCHANGE = both_ends("connection.connect_tcp", "http2.send_connection_init") + EXCHANGE


async def serve_all(peer: H2Peer) -> None:
    """An ordinary server, which answers with the request's body, but for requests that are given up."""
    await peer.start()
    while not peer.ended:
        with contextlib.suppress(EOFError, AssertionError, StreamReset):
            stream_id, _, body = await peer.request()
            await peer.respond(stream_id, body=body)


async def test_the_events_of_a_request(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    pool, _ = h2_pool(nursery, serve_all)
    async with pool:
        first, second = Events(), Events()
        for events in (first, second):
            await pool.request("POST", URL, content=b"abc", extensions={"trace": events})
    assert first.names == FIRST_EXCHANGE
    assert second.names == EXCHANGE
    for events, stream_id in ((first, 1), (second, 3)):
        for name in ("send_request_headers", "send_request_body", "receive_response_headers"):
            info = events.info(f"http2.{name}.started")
            assert info.keys() == {"request", "stream_id"}
            assert info["stream_id"] == stream_id
        assert events.info("http2.receive_response_body.started")["stream_id"] == stream_id
        assert events.info("http2.response_closed.started") == {"stream_id": stream_id}
        assert events.info("http2.receive_response_headers.complete") == {"return_value": (200, [])}
        for name in ("send_request_headers", "send_request_body", "receive_response_body", "response_closed"):
            assert events.info(f"http2.{name}.complete") == {"return_value": None}
    assert first.info("http2.send_connection_init.started").keys() == {"request"}


async def test_concurrent_requests_with_a_handler_that_awaits_get_streams_of_their_own(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    class Slow(Events):
        async def __call__(self, event: str, info: dict[str, Any]) -> None:
            await super().__call__(event, info)
            await trio.sleep(1)

    handlers = [Slow(), Slow(), Slow()]
    pool, connector = h2_pool(nursery, serve_all)
    async with pool:
        await pool.request("GET", URL)
        requests = [
            Running(
                nursery,
                functools.partial(
                    pool.request, "POST", URL, content=b"%d" % index, extensions={"trace": handler}
                ),
            )
            for index, handler in enumerate(handlers)
        ]
        for index, request in enumerate(requests):
            assert (await request.result()).content == b"%d" % index
        assert len(connector.dialled) == 1
    ids = [{info["stream_id"] for _, info in handler.seen if "stream_id" in info} for handler in handlers]
    assert sorted(map(list, ids)) == [[3], [5], [7]]


@pytest.mark.parametrize("event", FIRST_EXCHANGE)
async def test_a_handler_that_raises_ends_its_request_alone(
    nursery: trio.Nursery, autojump_clock: MockClock, event: str
) -> None:
    async def handler(name: str, info: dict[str, Any]) -> None:
        if name == event:
            raise LookupError(name)

    pool, connector = h2_pool(nursery, serve_all)
    async with pool:
        with pytest.raises(LookupError, match=event):
            await pool.request("POST", URL, content=b"a", extensions={"trace": handler})
        await wait_all_tasks_blocked()
        # What was dialled is of use to the next request.
        assert_unharmed(pool, idle=int(not event.startswith("connection.")))
        assert (await pool.request("POST", URL, content=b"b")).content == b"b"
        assert_unharmed(pool, idle=1)
    assert len(connector.dialled) == 1 + (event.startswith("connection.connect_tcp.complete"))


@pytest.mark.parametrize("event", FIRST_EXCHANGE)
async def test_a_slow_handler_uses_up_no_timeout(
    nursery: trio.Nursery, autojump_clock: MockClock, event: str
) -> None:
    async def handler(name: str, info: dict[str, Any]) -> None:
        if name == event:
            await trio.sleep(100)

    timeout = {"connect": 1, "read": 1, "write": 1, "pool": 1}
    pool, _ = h2_pool(nursery, serve_all)
    async with pool:
        response = await pool.request("GET", URL, extensions={"trace": handler, "timeout": timeout})
        assert response.status == 200


@pytest.mark.parametrize("before", ["send_request_headers.complete", "send_request_body.started"])
async def test_the_connection_ends_while_a_handler_takes_its_time(
    client: Client, clock: MockClock, before: str
) -> None:
    async def handler(name: str, info: dict[str, Any]) -> None:
        if name == f"http2.{before}":
            await trio.sleep(5)

    content = Gated(b"x")
    request = client.request("POST", content=content, extensions={"trace": handler})
    peer = await client.peer()
    await peer.head()
    await peer.stream.aclose()
    await request.fails(RemoteProtocolError, "without a response")
    assert_unharmed(client.pool)


async def test_failures_are_in_the_trace(client: Client, clock: MockClock) -> None:
    events = Events()
    request = client.request(extensions={"trace": events})
    peer = await client.peer()
    await peer.send_frame(head(peer, (await peer.head())[0], [(b":status", b"0")]))
    error = await request.fails(RemoteProtocolError)
    assert events.info("http2.receive_response_headers.failed") == {"exception": error}

    events = Events()
    request, _, stream_id = await client.requested(extensions={"trace": events}, on=peer)
    await peer.respond(stream_id, body=b"some", end=False)
    await peer.send_frame(RstStreamFrame(stream_id, ErrorCodes.CANCEL))
    error = await request.fails(RemoteProtocolError)
    assert events.info("http2.receive_response_body.failed") == {"exception": error}
    assert events.names[-2:] == both_ends("http2.response_closed")


async def test_the_log_hides_secrets(
    client: Client, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange.http2")
    request, peer, stream_id = await client.requested()
    await request.answered(peer, stream_id, 200, [(b"set-cookie", b"private"), (b"a", b"public")])
    await client.pool.aclose()
    messages = [record.getMessage() for record in caplog.records]
    assert {record.name for record in caplog.records} == {"trio_exchange.http2"}
    assert len([message for message in messages if message.startswith("http2.")]) == len(EXCHANGE) + 2
    assert any("public" in message for message in messages)
    assert not any("private" in message for message in messages)


async def test_where_nobody_looks_nothing_is_reported(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def report(*args: Any) -> None:
        raise AssertionError("reported")

    monkeypatch.setattr(Tracer, "report", report)
    pool, _ = h2_pool(nursery, serve_all)
    async with pool:
        assert (await pool.request("POST", URL, content=[b"a"])).content == b"a"


# -- What is gathered, and what is remembered.


class Sends:
    """The bytes that each call of `Transport.send_nowait` got, and the task that called it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[trio.lowlevel.Task, bytes]] = []
        send_nowait = Transport.send_nowait

        def record(transport: Transport, data: bytes | memoryview) -> int:
            self.made.append((trio.lowlevel.current_task(), bytes(data)))
            return send_nowait(transport, data)

        monkeypatch.setattr(Transport, "send_nowait", record)


def count_frames(sent: bytes) -> int:
    count = 0
    while sent:
        sent = sent[9 + int.from_bytes(sent[:3], "big") :]
        count += 1
    return count


async def answer_all_at_once(peer: H2Peer, size: int) -> None:
    """Answer the first request, and then `size` requests once all of them have arrived."""
    await peer.start()
    await peer.respond((await peer.head())[0])
    while True:
        for stream_id in [(await peer.head())[0] for _ in range(size)]:
            peer.h2.send_headers(stream_id, OK, end_stream=True)
        await peer.flush()


async def test_requests_of_one_turn_leave_in_one_system_call(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, url = await serve_h2(nursery, functools.partial(answer_all_at_once, size=20), secure=False)
    async with pool:
        await pool.request("GET", url)
        await wait_all_tasks_blocked()
        sends = Sends(monkeypatch)
        for _ in range(3):
            async with trio.open_nursery() as requests:
                for _ in range(20):
                    requests.start_soon(pool.request, "GET", url)
        # The first head does not wait for others. The peer of h2 does not send by `send_nowait`.
        assert [count_frames(data) for _, data in sends.made] == [1, 19] * 3
        nursery.cancel_scope.cancel()


async def test_a_lone_request_is_sent_in_its_own_task(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, url = await serve_h2(nursery, functools.partial(answer_all_at_once, size=1), secure=False)
    async with pool:
        await pool.request("GET", url)
        await wait_all_tasks_blocked()
        sends = Sends(monkeypatch)
        await pool.request("GET", url)
        assert [task for task, _ in sends.made] == [trio.lowlevel.current_task()]
        nursery.cancel_scope.cancel()


def full_buffer(stream_id: int) -> bytes:
    """As many bytes of DATA frames as one receive takes."""
    frames = data(stream_id, bytes(16384 - 9)).serialize() * 4
    assert len(frames) == RECEIVE_SIZE
    return frames


async def test_what_has_arrived_is_received_before_the_user_wakes(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Client(nursery) as client:
        opened = client.open()
        peer = await client.peer()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, end=False)
        response = await opened.result()
        more = [full_buffer(stream_id)] * 4
        monkeypatch.setattr(Transport, "receive_nowait", lambda *_: more.pop() if more else None)
        chunks = aiter(response.aiter_stream())
        nursery.start_soon(peer.send, full_buffer(stream_id))
        # Other tasks run after three more.
        assert len(await anext(chunks)) == 4 * 4 * (16384 - 9)
        assert len(more) == 1
        nursery.start_soon(peer.send, full_buffer(stream_id))
        assert len(await anext(chunks)) == 2 * 4 * (16384 - 9)
        nursery.start_soon(peer.send_frame, data(stream_id, b"end", "END_STREAM"))
        assert await anext(chunks) == b"end"
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)


async def test_a_connection_that_breaks_while_more_is_received(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise trio.BrokenResourceError("it broke")

    async with Client(nursery) as client:
        opened = client.open()
        peer = await client.peer()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, end=False)
        response = await opened.result()
        monkeypatch.setattr(Transport, "receive_nowait", fail)
        await peer.send(full_buffer(stream_id))
        chunks = aiter(response.aiter_stream())
        assert len(await anext(chunks)) == 4 * (16384 - 9)
        with pytest.raises(ReadError, match="it broke, in the middle of the response"):
            await anext(chunks)


async def test_unread_data_is_neither_many_objects_nor_many_copies(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    pieces = [b"a", b"b" * 5000, b"c", b"d" * 5000, b"e" * 1024, *[b"f"] * 3000, b"g" * 2000]
    async with Client(nursery) as client:
        opened = client.open()
        peer = await client.peer()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, end=False)
        response = await opened.result()
        await peer.send_frame(*[data(stream_id, piece) for piece in pieces])
        await wait_all_tasks_blocked()
        (connection,) = internals(client.pool)
        inbox = connection._streams[stream_id]._inbox
        assert len(inbox) == 5
        await peer.send_frame(data(stream_id, b"", "END_STREAM"))
        assert [chunk async for chunk in response.aiter_stream()] == [b"".join(pieces)]


async def test_a_head_that_repeats_gives_each_response_headers_of_its_own(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    # `:status: 200` and a field that is not indexed, so that each block has the same bytes.
    block = b"\x88\x00\x01a\x01b"
    async with Client(nursery) as client:
        request = client.request()
        peer = await client.peer()
        for number in range(3):
            stream_id, _ = await peer.head()
            await peer.send_frame(HeadersFrame(stream_id, block, flags=["END_HEADERS", "END_STREAM"]))
            response = await request.result()
            assert response.headers == [(b"a", b"b")]
            response.headers.append((b"changed", b"%d" % number))
            request = client.request()
        # As trailers the same block is malformed, whatever it was before.
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, body=b"body", end=False)
        await peer.send_frame(HeadersFrame(stream_id, block, flags=["END_HEADERS", "END_STREAM"]))
        with pytest.raises(RemoteProtocolError, match="invalid header name: b':status'"):
            await request.result()


async def test_a_malformed_head_that_repeats_is_refused_each_time(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async with Client(nursery) as client:
        request = client.request()
        peer = await client.peer()
        for _ in range(3):
            stream_id, _ = await peer.head()
            await peer.send_frame(HeadersFrame(stream_id, b"\x88\x00\x01A\x01b", flags=["END_HEADERS"]))
            with pytest.raises(RemoteProtocolError, match="invalid header name: b'A'"):
                await request.result()
            assert await reset_of(peer, stream_id) == ErrorCodes.PROTOCOL_ERROR
            request = client.request()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id)
        assert (await request.result()).status == 200
