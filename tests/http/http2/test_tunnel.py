"""CONNECT (RFC 9113, 8.5) and extended CONNECT (RFC 8441): a stream of HTTP/2 becomes a stream of Trio."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import h2.events
import hpack
import pytest
import trio
import trio.testing
import wsproto.connection
import wsproto.events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, GoAwayFrame, HeadersFrame, RstStreamFrame, WindowUpdateFrame
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.harness.certificates import client_context, make_tls
from tests.harness.checks import assert_unharmed, internals
from tests.harness.h2link import LINKS, H2Server, answer, fetch, h2_server, multiplexed, send_data
from tests.harness.h2peer import H2Peer
from tests.harness.h2proxy import StreamScript
from tests.harness.h2server import Multiplexer, ServerStream
from tests.harness.peers import DELIVERIES, Script, respond
from tests.harness.servers import serve_tcp
from tests.harness.streams import read_exactly
from tests.harness.tunnels import TARGET, failing, network_stream, tunnel
from trio_exchange import (
    ConnectionPool,
    LocalProtocolError,
    NetworkStream,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    Request,
    WriteError,
    WriteTimeout,
)
from trio_exchange._connect.connector import Connector
from trio_exchange.testing import ScriptedPeer

PROXY = "http://proxy.example/"
WEBSOCKET = {"protocol": "websocket"}
EXTENDED = {SettingCodes.ENABLE_CONNECT_PROTOCOL: 1}
SMALL_WINDOW = {SettingCodes.INITIAL_WINDOW_SIZE: 10}

# The frame's header after its length.
HEADERS_OF_STREAM_1 = b"\1\4\0\0\0\1"

BOTH_KINDS = pytest.mark.parametrize("extensions", [TARGET, WEBSOCKET], ids=["connect", "extended"])


# -- Servers.


async def accept(peer: H2Peer) -> int:
    """Agree to a CONNECT; returns its stream."""
    stream_id, _ = await peer.head()
    await peer.respond(stream_id, end=False)
    return stream_id


async def start_and_accept(peer: H2Peer, settings: dict[SettingCodes, int] | None = None) -> int:
    """Agree to a CONNECT at the beginning of a connection; returns its stream."""
    await peer.start(settings)
    return await accept(peer)


async def silent(peer: H2Peer, stream_id: int) -> None:
    """Send nothing through a tunnel."""


async def echo(stream: ServerStream) -> None:
    """Agree to every CONNECT and send back what comes, its end included; answer other requests."""
    await stream.respond(200)
    if stream.headers[b":method"] != b"CONNECT":
        await stream.send_all(b"hello")
    while data := await stream.receive_some():
        await stream.send_all(data)


class Relay:
    """Joins each stream that is CONNECTed with the next one, as two ends of a TCP connection are."""

    def __init__(self, peer: H2Peer) -> None:
        self.peer = peer
        self.partner: dict[int, int] = {}
        self.unpaired: int | None = None
        self.waiting: dict[int, bytearray] = defaultdict(bytearray)
        # To which nothing more will come, to which the end was sent, and which were reset.
        self.ended: set[int] = set()
        self.finished: set[int] = set()
        self.gone: set[int] = set()

    async def run(self) -> None:
        await self.peer.start()
        self.peer.h2.increment_flow_control_window(2**20)
        while await self.peer.receive():
            for event in self.peer.events:
                self.take(event)
            self.peer.events.clear()
            for stream_id in list(self.partner):
                self.pump(stream_id)
            await self.peer.flush()

    def take(self, event: h2.events.Event) -> None:
        stream_id = getattr(event, "stream_id", None) or 0
        match event:
            case h2.events.RequestReceived():
                self.peer.h2.send_headers(stream_id, [(b":status", b"200")])
                if self.unpaired is None:
                    self.unpaired = stream_id
                else:
                    self.partner |= {stream_id: self.unpaired, self.unpaired: stream_id}
                    self.unpaired = None
            case h2.events.DataReceived(data=data) if data:
                self.peer.h2.increment_flow_control_window(len(data))
                self.waiting[self.partner[stream_id]] += data
            case h2.events.StreamEnded():
                self.ended.add(self.partner[stream_id])
            case h2.events.StreamReset():
                self.gone.add(stream_id)
                if self.waiting.pop(stream_id, None) and self.partner[stream_id] not in self.gone:
                    # As a TCP connection that is closed with something left to read.
                    with contextlib.suppress(ProtocolError):
                        self.peer.h2.reset_stream(self.partner[stream_id], ErrorCodes.CONNECT_ERROR)
                    self.gone.add(self.partner[stream_id])

    def pump(self, stream_id: int) -> None:
        """Send on what fits, and give credit for that much to where it comes from."""
        if stream_id in self.gone:
            return
        protocol, other = self.peer.h2, self.partner[stream_id]
        waiting = self.waiting[stream_id]
        if stream_id not in self.finished:
            while size := min(len(waiting), protocol.local_flow_control_window(stream_id), 16384):
                protocol.send_data(stream_id, bytes(waiting[:size]))
                del waiting[:size]
                with contextlib.suppress(ProtocolError):
                    protocol.increment_flow_control_window(size, other)
            if not waiting and (stream_id in self.ended or other in self.gone):
                protocol.end_stream(stream_id)
                self.finished.add(stream_id)
        if stream_id in self.finished and other in self.gone:
            # As the kernel tells senders that nobody is there any more.
            with contextlib.suppress(ProtocolError):
                protocol.reset_stream(stream_id, ErrorCodes.NO_ERROR)
            self.gone.add(stream_id)


@contextlib.asynccontextmanager
async def one_tunnel(
    script: Callable[[H2Peer, int], Awaitable[object]],
    link: str = "memory",
    settings: dict[SettingCodes, int] | None = None,
) -> AsyncIterator[tuple[ConnectionPool, H2Server, NetworkStream]]:
    """Enter a pool and its server, as `h2_server`, and a tunnel.

    Args:
        script: Plays the tunnel, by its stream; then the peer waits until the client closes the connection.
        link: As of `h2_server`.
        settings: What the server begins with.
    """

    async def serve(peer: H2Peer) -> None:
        await script(peer, await start_and_accept(peer, settings))
        # The script may have closed the connection.
        with contextlib.suppress(trio.ClosedResourceError):
            await peer.until_closed()

    async with h2_server(serve, link) as (pool, server), tunnel(pool, server.url) as stream:
        yield pool, server, stream


# -- The request.


@pytest.mark.parametrize("headers", [{}, {"Host": "proxy.example"}], ids=["no Host", "Host of the proxy"])
async def test_a_connect_on_the_wire(headers: dict[str, str]) -> None:
    """Two pseudo-headers, of which the target is the authority, and no end of the stream."""
    async with h2_server(multiplexed(echo)) as (pool, server):
        headers = {**headers, "Proxy-Authorization": "x"}
        async with pool.stream("CONNECT", PROXY, headers=headers, extensions=TARGET) as response:
            assert response.status == 200
            assert response.extensions["stream_id"] == 1
            assert response.extensions["http_version"] == b"HTTP/2"
        (frame,) = server.peer.sent(HeadersFrame)
        assert "END_STREAM" not in frame.flags
        assert server.peer.sent(DataFrame) == []
    assert decode(frame) == [
        (b":method", b"CONNECT"),
        (b":authority", b"example.com:443"),
        (b"proxy-authorization", b"x"),
    ]


def decode(frame: HeadersFrame) -> list[tuple[bytes, bytes]]:
    """The fields of the first head of a connection."""
    return [(name, value) for name, value in hpack.Decoder().decode(frame.data, raw=True)]


@pytest.mark.parametrize("scheme", ["http", "ws"])
@pytest.mark.parametrize("protocol", ["websocket", b"websocket", "connect-udp"])
async def test_an_extended_connect_on_the_wire(scheme: str, protocol: str | bytes) -> None:
    url = f"{scheme}://server.example/chat?a"
    headers = {"Sec-WebSocket-Version": "13"}
    async with h2_server(multiplexed(echo, EXTENDED)) as (pool, server):
        async with pool.stream(
            "CONNECT", url, headers=headers, extensions={"protocol": protocol}
        ) as response:
            assert response.status == 200
        fields = decode(server.peer.sent(HeadersFrame)[0])
    assert fields[-1][0] == b"sec-websocket-version"
    assert dict(fields) == {
        b":method": b"CONNECT",
        b":protocol": protocol.encode() if isinstance(protocol, str) else protocol,
        b":scheme": b"http",
        b":authority": b"server.example",
        b":path": b"/chat?a",
        b"sec-websocket-version": b"13",
    }


@BOTH_KINDS
async def test_only_an_extended_connect_waits_for_settings(extensions: dict[str, str]) -> None:
    async def serve(peer: H2Peer) -> None:
        await wait_all_tasks_blocked()
        sent = bytes(await peer.stream.receive_some(65536))
        assert (HEADERS_OF_STREAM_1 in sent) == (extensions is TARGET)
        await peer.start(EXTENDED)
        peer.events += peer.h2.receive_data(sent)
        await accept(peer)
        await peer.until_closed()

    async with (
        h2_server(serve) as (pool, server),
        pool.stream("CONNECT", server.url, extensions=extensions) as response,
    ):
        assert response.status == 200


async def test_settings_that_do_not_come(autojump_clock: MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        sent = b""
        while data := await peer.stream.receive_some(65536):
            sent += data
        assert HEADERS_OF_STREAM_1 not in sent

    async with h2_server(serve) as (pool, server):
        began = trio.current_time()
        with pytest.raises(ReadTimeout):
            await pool.request("CONNECT", server.url, extensions={**WEBSOCKET, "timeout": {"read": 3}})
        assert trio.current_time() - began == 3


async def test_extended_connect_that_the_server_has_not_enabled() -> None:
    async with h2_server(multiplexed(echo)) as (pool, server):
        for _ in range(2):
            with pytest.raises(LocalProtocolError, match=r"extended CONNECT \(RFC 8441\)"):
                await pool.request("CONNECT", server.url, extensions=WEBSOCKET)
        assert server.peer.sent(HeadersFrame) == []
        response = await pool.request("GET", server.url)
        assert response.content == b"hello"
        assert response.extensions["stream_id"] == 1
        assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1


async def test_extended_connect_that_the_server_enables_later() -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        peer.h2.update_settings({SettingCodes.ENABLE_CONNECT_PROTOCOL: 1})
        await peer.respond(stream_id)
        await accept(peer)
        await peer.until_closed()

    async with h2_server(serve) as (pool, server):
        with pytest.raises(LocalProtocolError):
            await pool.request("CONNECT", server.url, extensions=WEBSOCKET)
        await pool.request("GET", server.url)
        async with pool.stream("CONNECT", server.url, extensions=WEBSOCKET) as response:
            assert response.extensions["stream_id"] == 3


@pytest.mark.parametrize("secure", [False, True])
async def test_a_protocol_on_what_turns_out_to_be_http11(nursery: trio.Nursery, secure: bool) -> None:
    server = await serve_tcp(nursery, respond, tls=make_tls().server if secure else None)
    async with ConnectionPool(client_context(make_tls().ca), http2=True) as pool:
        for _ in range(2):
            with pytest.raises(LocalProtocolError, match=r"needs HTTP/2, but the connection is HTTP/1\.1"):
                await pool.request("CONNECT", server.url, extensions=WEBSOCKET)
            assert_unharmed(pool, idle=1)
        assert await fetch(pool, "PUT", server.url, content=b"abc") == b"abc"
        assert pool.statistics().connections_opened == 1


NO_TOKEN = (LocalProtocolError, "protocol extension must be a token")
NO_CONNECT = (LocalProtocolError, "needs the method CONNECT")
WRONG_TYPE = (TypeError, "protocol extension")


@pytest.mark.parametrize(
    ("method", "protocol", "refusal"),
    [
        *[("CONNECT", protocol, NO_TOKEN) for protocol in ("", "web socket", "web/socket", b"a\r\nb", "a,b")],
        *[(method, "websocket", NO_CONNECT) for method in ("GET", "connect")],
        *[("CONNECT", protocol, WRONG_TYPE) for protocol in (5, True, ["websocket"])],
    ],
)
async def test_a_protocol_that_can_not_be_sent(
    method: str, protocol: Any, refusal: tuple[type[Exception], str]
) -> None:
    error, message = refusal
    async with h2_server(multiplexed(echo)) as (pool, server):
        with pytest.raises(error, match=message):
            await pool.request(method, server.url, extensions={"protocol": protocol})
    assert server.dialled == 0


@BOTH_KINDS
@pytest.mark.parametrize("content", [b"abc", [b"abc"]], ids=["bytes", "iterable"])
async def test_a_connect_can_have_no_content(
    extensions: dict[str, str], content: bytes | Iterable[bytes]
) -> None:
    async with h2_server(multiplexed(echo, EXTENDED)) as (pool, server):
        with pytest.raises(LocalProtocolError, match="can't have content"):
            await pool.request("CONNECT", server.url, content=content, extensions=extensions)
        assert (await pool.request("GET", server.url)).extensions["stream_id"] == 1
        assert len(server.peer.sent(HeadersFrame)) == 1


async def test_an_empty_body_is_no_content() -> None:
    async with h2_server(multiplexed(echo)) as (pool, server):
        content: list[bytes] = []
        async with pool.stream("CONNECT", server.url, content=content, extensions=TARGET) as response:
            assert response.status == 200


async def test_extended_connect_to_a_server_that_is_not_http2() -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.stream.receive_some(1000)

    async with h2_server(serve) as (pool, server):
        with pytest.raises(RemoteProtocolError, match="does not speak HTTP/2"):
            await pool.request("CONNECT", server.url, extensions=WEBSOCKET)


# -- The answer.


@pytest.mark.parametrize("status", [300, 403, 502])
@BOTH_KINDS
async def test_any_other_answer_is_an_ordinary_response(status: int, extensions: dict[str, str]) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start(EXTENDED)
        for _ in range(2):
            stream_id, _ = await peer.head()
            length = (b"content-length", b"3")
            await peer.respond(stream_id, status, [length], b"abc", trailers=[(b"t", b"u")])
            assert await peer.body(stream_id) == b""
        await peer.until_closed()

    async with h2_server(serve) as (pool, server):
        async with pool.stream("CONNECT", server.url, extensions=extensions) as response:
            assert response.status == status
            stream = network_stream(response)
            with pytest.raises(LocalProtocolError, match="belongs to HTTP"):
                await stream.read()
            with pytest.raises(LocalProtocolError, match="belongs to HTTP"):
                await stream.write(b"x")
            await stream.aclose()
            assert await response.aread() == b"abc"
            assert response.extensions["trailing_headers"] == [(b"t", b"u")]
        assert (await pool.request("CONNECT", server.url, extensions=extensions)).content == b"abc"
        await wait_all_tasks_blocked()
        assert server.peer.sent(RstStreamFrame) == []
        assert_unharmed(pool, idle=1)


async def test_a_request_that_is_a_connect_does_not_keep_its_tunnel() -> None:
    async with h2_server(multiplexed(echo)) as (pool, server):
        response = await pool.request("CONNECT", server.url, extensions=TARGET)
        assert response.content == b""
        await wait_all_tasks_blocked()
        assert [frame.error_code for frame in server.peer.sent(RstStreamFrame, 1)] == [ErrorCodes.CANCEL]
        assert_unharmed(pool, idle=1)


# -- Reading and writing.


@LINKS
async def test_what_is_written_is_read(link: str) -> None:
    async with h2_server(multiplexed(echo), link) as (pool, server):
        async with tunnel(pool, server.url) as stream:
            assert "Tunnel on stream 1 over " in repr(stream)
            for data in (b"abc", b"", b"x" * 300_000):
                async with trio.open_nursery() as inner:
                    inner.start_soon(stream.write, data)
                    assert await read_exactly(stream, len(data)) == data
            assert await fetch(pool, url=server.url) == b"hello"
        assert {frame.stream_id for frame in server.peer.sent(DataFrame)} == {1}
        assert_unharmed(pool, idle=1)


@LINKS
async def test_other_streams_are_not_disturbed(link: str) -> None:
    """Tunnels come and go in every way, while others and ordinary requests carry on."""

    async def talk(index: int) -> None:
        async with tunnel(pool, server.url) as stream:
            data = b"%d" % index * 1000
            for _ in range(20):
                await stream.write(data)
                assert await read_exactly(stream, len(data)) == data
            await stream.send_eof()
            assert await stream.read() == b""

    async def leave(index: int) -> None:
        async with tunnel(pool, server.url) as stream:
            await stream.write(b"x" * index * 1000)

    async def get() -> None:
        assert await fetch(pool, url=server.url) == b"hello"

    async with h2_server(multiplexed(echo), link) as (pool, server):
        async with trio.open_nursery() as nursery:
            for index in range(10):
                nursery.start_soon(talk, index)
                nursery.start_soon(leave, index)
                nursery.start_soon(get)
        assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1


async def test_writing_waits_for_the_servers_window() -> None:
    written = False

    async def script(peer: H2Peer, stream_id: int) -> None:
        received = b""
        for more in (10, 10, 5):
            while len(received) % 10 or not received or more == 0:
                received += (await peer.event(h2.events.DataReceived, stream_id)).data or b""
            await wait_all_tasks_blocked()
            assert not written
            assert sum(len(frame.data) for frame in peer.sent(DataFrame)) == len(received)
            peer.h2.increment_flow_control_window(more, stream_id)
            await peer.flush()
            received += (await peer.event(h2.events.DataReceived, stream_id)).data or b""
        assert received == bytes(range(35))

    async with one_tunnel(script, settings=SMALL_WINDOW) as (_, _, stream):
        await wait_all_tasks_blocked()
        await stream.write(bytes(range(35)))
        written = True


@pytest.mark.parametrize("window", [1, 7])
async def test_writing_through_the_smallest_windows(window: int) -> None:
    serve = multiplexed(echo, {SettingCodes.INITIAL_WINDOW_SIZE: window})
    async with h2_server(serve) as (pool, server), tunnel(pool, server.url) as stream:
        # The server's settings have to be there before anything is sent.
        await wait_all_tasks_blocked()
        await stream.write(b"abc" * 50)
        assert await read_exactly(stream, 150) == b"abc" * 50
        assert max(len(frame.data) for frame in server.peer.sent(DataFrame)) <= window


async def test_a_tunnel_that_is_not_read_holds_one_window_and_no_other_stream(
    autojump_clock: MockClock,
) -> None:
    sent = 0

    async def script(peer: H2Peer, stream_id: int) -> None:
        nonlocal sent
        while size := min(peer.h2.local_flow_control_window(stream_id), 16384):
            await send_data(peer, stream_id, b"x" * size)
            sent += size
        for _ in range(3):
            await answer(peer, b"y" * 100_000)
        assert peer.sent(WindowUpdateFrame, stream_id) == []
        await peer.event(h2.events.WindowUpdated, stream_id)
        await send_data(peer, stream_id, b"z")

    async with one_tunnel(script) as (pool, server, stream):
        for _ in range(3):
            assert await fetch(pool, url=server.url) == b"y" * 100_000
        assert sent <= 1024 * 1024
        assert await read_exactly(stream, sent) == b"x" * sent
        assert await stream.read() == b"z"


@DELIVERIES
async def test_data_that_comes_with_the_answer(byte_by_byte: bool) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        peer.h2.send_headers(stream_id, [(b":status", b"200")])
        peer.h2.send_data(stream_id, b"ready", pad_length=5)
        peer.h2.send_data(stream_id, b"")
        peer.h2.end_stream(stream_id)
        await peer.send(peer.h2.data_to_send(), byte_by_byte=byte_by_byte)
        await peer.until_closed()

    async with h2_server(serve) as (pool, server), tunnel(pool, server.url) as stream:
        assert await stream.read(100) == b"ready"
        assert await stream.read(100) == b""
        assert await stream.read(100) == b""


# -- The end.


@LINKS
@pytest.mark.parametrize("first", ["we", "the server"])
async def test_both_sides_end_without_reset(link: str, first: str) -> None:
    async def serve(peer: H2Peer) -> None:
        stream_id = await start_and_accept(peer)
        if first == "we":
            assert await peer.body(stream_id) == b"abc"
            await send_data(peer, stream_id, b"def", end=True)
        else:
            await send_data(peer, stream_id, b"def", end=True)
            assert await peer.body(stream_id) == b"abc"
        await answer(peer)
        await peer.until_closed()

    async with h2_server(serve, link) as (pool, server):
        async with tunnel(pool, server.url) as stream:
            if first == "we":
                await stream.write(b"abc")
                await stream.send_eof()
                with pytest.raises(trio.ClosedResourceError, match="the end was sent already"):
                    await stream.send_all(b"x")
                with pytest.raises(WriteError, match="the end was sent already"):
                    await stream.write(b"x")
            assert await stream.read() == b"def"
            assert await stream.read() == b""
            if first != "we":
                await stream.write(b"abc")
                await stream.send_eof()
            # Nothing is left of it, though the response is not closed.
            assert_unharmed(pool, idle=1)
            await stream.send_eof()
        await pool.request("GET", server.url)
        assert "END_STREAM" in server.peer.sent(DataFrame, 1)[-1].flags
        assert server.peer.sent(RstStreamFrame) == []


@pytest.mark.parametrize("close", ["stream", "response"])
async def test_closing_after_the_server_ended_ends_our_side_too(close: str) -> None:
    async def serve(peer: H2Peer) -> None:
        stream_id = await start_and_accept(peer)
        await send_data(peer, stream_id, b"abc", end=True)
        assert await peer.body(stream_id) == b""
        await peer.until_closed()
        assert peer.sent(RstStreamFrame) == []

    async with (
        h2_server(serve) as (pool, server),
        pool.stream("CONNECT", server.url, extensions=TARGET) as response,
    ):
        stream = network_stream(response)
        assert await stream.read() == b"abc"
        assert await stream.read() == b""
        await (stream.aclose() if close == "stream" else response.aclose())
        assert_unharmed(pool, idle=1)
        await wait_all_tasks_blocked()


async def test_who_waits_to_write_to_a_tunnel_hears_that_it_is_broken(autojump_clock: MockClock) -> None:
    async def script(peer: H2Peer, stream_id: int) -> None:
        await wait_all_tasks_blocked()
        block = peer.h2.encoder.encode([(b"t", b"u")])
        await peer.send_frame(HeadersFrame(stream_id, block, flags=["END_HEADERS"]))
        reset = await peer.event(h2.events.StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.PROTOCOL_ERROR

    async with one_tunnel(script) as (_, _, stream):
        # More than the window, which is never opened.
        with trio.fail_after(10), pytest.raises(WriteError, match="trailers that do not end the stream"):
            await stream.write(bytes(100_000))


async def test_trailers_end_a_tunnel() -> None:
    async def script(peer: H2Peer, stream_id: int) -> None:
        await send_data(peer, stream_id, b"abc")
        peer.h2.send_headers(stream_id, [(b"t", b"u")], end_stream=True)
        await peer.flush()

    async with one_tunnel(script) as (_, _, stream):
        await wait_all_tasks_blocked()
        assert await stream.read() == b"abc"
        assert await stream.read() == b""


class Boom(Exception):
    pass


@LINKS
@pytest.mark.parametrize("how", ["stream", "response", "block", "error", "cancelled"])
@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half-closed"])
async def test_leaving_resets_the_stream_and_frees_its_place(link: str, how: str, half_closed: bool) -> None:
    async def serve(peer: H2Peer) -> None:
        stream_id = await start_and_accept(peer, {SettingCodes.MAX_CONCURRENT_STREAMS: 1})
        assert (await peer.event(h2.events.StreamReset, stream_id)).error_code == ErrorCodes.CANCEL
        await answer(peer, b"hello")
        await peer.until_closed()

    async with h2_server(serve, link, max_connections=1) as (pool, server):
        with contextlib.suppress(Boom), trio.CancelScope() as scope:
            async with pool.stream("CONNECT", server.url, extensions=TARGET) as response:
                stream = network_stream(response)
                if half_closed:
                    await stream.send_eof()
                match how:
                    case "stream":
                        await stream.aclose()
                    case "response":
                        await response.aclose()
                    case "error":
                        raise Boom
                    case "cancelled":
                        scope.cancel()
                        await stream.read()
                if how != "block":
                    assert_unharmed(pool, idle=1)
        assert scope.cancelled_caught == (how == "cancelled")
        assert await fetch(pool, url=server.url) == b"hello"
        assert len(server.peer.sent(RstStreamFrame)) == 1
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
        with pytest.raises(trio.ClosedResourceError):
            await stream.wait_send_all_might_not_block()
        with pytest.raises(ReadError):
            await stream.read()
        with pytest.raises(WriteError):
            await stream.write(b"x")
        await stream.aclose()
        await response.aclose()
        assert len(server.peer.sent(RstStreamFrame)) == 1


async def test_data_for_a_tunnel_that_was_left_is_credited() -> None:
    """More of it than the connection's window holds."""
    tunnels = 24 * 1024 * 1024 // (256 * 1024)

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        for _ in range(tunnels):
            stream_id = await accept(peer)
            await send_data(peer, stream_id, b"greeting")
            # The client leaves, but the server does not know yet.
            await wait_all_tasks_blocked()
            while room := min(peer.h2.local_flow_control_window(stream_id), 16384):
                await send_data(peer, stream_id, b"x" * room)
        await peer.until_closed()

    async with h2_server(serve) as (pool, server):
        for _ in range(tunnels):
            async with tunnel(pool, server.url) as stream:
                assert await stream.read() == b"greeting"
        assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1


@LINKS
@pytest.mark.parametrize("code", [ErrorCodes.CONNECT_ERROR, ErrorCodes.CANCEL, ErrorCodes.REFUSED_STREAM])
async def test_the_server_resets_a_tunnel(link: str, code: ErrorCodes) -> None:
    """What came before is read; a writer that waits for a window is woken; others go on."""
    go = trio.Event()

    async def serve(peer: H2Peer) -> None:
        stream_id = await start_and_accept(peer, SMALL_WINDOW)
        await send_data(peer, stream_id, b"abc")
        await peer.event(h2.events.DataReceived, stream_id)
        await go.wait()
        peer.h2.reset_stream(stream_id, code)
        await peer.flush()
        await answer(peer, b"hello")
        await peer.until_closed()

    async with h2_server(serve, link) as (pool, server):
        async with tunnel(pool, server.url) as stream:
            with trio.fail_after(5):
                async with failing(WriteError, lambda: stream.write(b"x" * 100_000)):
                    go.set()
                assert await stream.read() == b"abc"
                with pytest.raises(ReadError, match=code.name):
                    await stream.read()
                with pytest.raises(trio.BrokenResourceError, match=code.name):
                    await stream.receive_some()
                with pytest.raises(trio.BrokenResourceError, match=code.name):
                    await stream.send_all(b"x")
                await stream.wait_send_all_might_not_block()
                # There is no end to send any more, and what is sent afterwards fails as before.
                await stream.send_eof()
                with pytest.raises(trio.BrokenResourceError, match=code.name):
                    await stream.send_all(b"x")
        assert await fetch(pool, url=server.url) == b"hello"
        assert server.peer.sent(RstStreamFrame) == []


@LINKS
async def test_the_connection_ends_after_the_other_end_of_a_tunnel(link: str) -> None:
    """There is no end to send any more, and what is sent afterwards fails as before."""
    go = trio.Event()

    async def script(peer: H2Peer, stream_id: int) -> None:
        await send_data(peer, stream_id, b"", end=True)
        await go.wait()
        await peer.stream.aclose()

    async with one_tunnel(script, link) as (pool, _, stream):
        with trio.fail_after(5):
            assert await stream.receive_some() == b""
            [connection] = internals(pool)
            go.set()
            await connection.wait_closed()
            assert await stream.receive_some() == b""
            for _ in range(2):
                with pytest.raises(trio.BrokenResourceError, match="the stream was closed"):
                    await stream.send_all(b"x")
                await stream.send_eof()


async def test_the_server_resets_while_the_window_is_waited_for(autojump_clock: MockClock) -> None:
    async def script(peer: H2Peer, stream_id: int) -> None:
        await trio.sleep(1)
        peer.h2.reset_stream(stream_id)
        await peer.flush()

    async with one_tunnel(script, settings={SettingCodes.INITIAL_WINDOW_SIZE: 0}) as (_, _, stream):
        await wait_all_tasks_blocked()
        with trio.fail_after(2):
            await stream.wait_send_all_might_not_block()


@LINKS
async def test_the_server_ends_and_resets(link: str) -> None:
    """As a proxy may whose other side does not listen any more: what it sent is whole."""
    go = trio.Event()

    async def script(peer: H2Peer, stream_id: int) -> None:
        await send_data(peer, stream_id, b"abc", end=True)
        await go.wait()
        peer.h2.reset_stream(stream_id, ErrorCodes.NO_ERROR)
        await peer.flush()

    async with one_tunnel(script, link, settings=SMALL_WINDOW) as (_, server, stream):
        async with failing(trio.BrokenResourceError, lambda: stream.send_all(b"x" * 100_000)):
            go.set()
        assert await stream.read() == b"abc"
        assert await stream.read() == b""
        with pytest.raises(WriteError):
            await stream.write(b"x")
        assert server.peer.sent(RstStreamFrame) == []


@LINKS
async def test_a_connection_that_breaks(link: str) -> None:
    go = trio.Event()

    async def script(peer: H2Peer, stream_id: int) -> None:
        await send_data(peer, stream_id, b"abc")
        await go.wait()
        await peer.stream.aclose()

    async with one_tunnel(script, link, settings=SMALL_WINDOW) as (pool, _, stream):
        async with failing(trio.BrokenResourceError, lambda: stream.send_all(b"x" * 100_000)):
            go.set()
        assert await stream.read() == b"abc"
        # A socket that is closed with something left to read is reset.
        with pytest.raises(trio.BrokenResourceError, match=r"closed the connection|receiving failed|reset"):
            await stream.receive_some()
        with pytest.raises(ReadError):
            await stream.read()
        with pytest.raises(WriteError):
            await stream.write(b"x")
        await stream.aclose()
        for connection in internals(pool):
            await connection.wait_closed()
        assert_unharmed(pool)


async def test_a_connection_that_breaks_after_the_server_has_ended_the_tunnel() -> None:
    async def script(peer: H2Peer, stream_id: int) -> None:
        await send_data(peer, stream_id, b"abc", end=True)
        await wait_all_tasks_blocked()
        await peer.stream.aclose()

    async with one_tunnel(script, settings=SMALL_WINDOW) as (_, _, stream):
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x" * 100)
        assert await stream.read() == b"abc"
        assert await stream.read() == b""


@LINKS
async def test_closing_the_pool_ends_reads_and_writes(link: str) -> None:
    async with (
        one_tunnel(silent, link, settings=SMALL_WINDOW) as (pool, _, stream),
        failing(ReadError, stream.read),
        failing(WriteError, lambda: stream.write(b"x" * 100_000)),
    ):
        await pool.aclose()


async def test_a_tunnel_goes_on_after_goaway() -> None:
    async def script(peer: H2Peer, stream_id: int) -> None:
        await peer.send_frame(GoAwayFrame(last_stream_id=1))
        await send_data(peer, stream_id, b"abc")
        assert (await peer.event(h2.events.DataReceived, stream_id)).data == b"def"
        await send_data(peer, stream_id, b"", end=True)

    async with one_tunnel(script) as (pool, _, stream):
        assert await stream.read() == b"abc"
        await stream.write(b"def")
        assert await stream.read() == b""
        assert pool.statistics().active == 1
        await stream.aclose()
        await wait_all_tasks_blocked()
        assert pool.connections == []


# -- Cancellation and timeouts.


async def test_a_cancelled_write_tears_nothing() -> None:
    """What was sent is a beginning of the data, and the stream can be used and ended."""
    body = b""

    async def serve(peer: H2Peer) -> None:
        nonlocal body
        stream_id = await start_and_accept(peer)
        await cancelled.wait()
        body = await peer.body(stream_id)
        await answer(peer, b"hello")
        await peer.until_closed()

    content, cancelled = bytes(range(251)) * 4000, trio.Event()
    async with h2_server(serve) as (pool, server):
        async with tunnel(pool, server.url) as stream:
            async with trio.open_nursery() as inner:
                inner.start_soon(stream.write, content)
                await wait_all_tasks_blocked()
                inner.cancel_scope.cancel()
            cancelled.set()
            await stream.write(b"after")
            await stream.send_eof()
        # Left before the server had ended, but its end was sent.
        assert await fetch(pool, url=server.url) == b"hello"
    assert body.endswith(b"after")
    assert 0 < len(body) < len(content)
    assert content.startswith(body[:-5])


async def test_timeouts(autojump_clock: MockClock) -> None:
    async def script(peer: H2Peer, stream_id: int) -> None:
        await trio.sleep(10)
        await send_data(peer, stream_id, b"abc")

    async with one_tunnel(script, settings=SMALL_WINDOW) as (_, _, stream):
        began = trio.current_time()
        with pytest.raises(ReadTimeout):
            await stream.read(timeout=3)
        assert trio.current_time() - began == 3
        with pytest.raises(WriteTimeout):
            await stream.write(b"x" * 11, timeout=4)
        assert trio.current_time() - began == 7
        assert await stream.read(timeout=5) == b"abc"


# -- Information.


@LINKS
async def test_information_through_a_tunnel(link: str) -> None:
    async with h2_server(multiplexed(echo), link) as (pool, server), tunnel(pool, server.url) as stream:
        ask = stream.get_extra_info
        if link == "memory":
            for name in ("client_addr", "server_addr", "socket", "ssl_object", "is_readable"):
                assert ask(name) is None
            return
        assert ask("server_addr") == ask("socket").getpeername()
        assert server.url.endswith(f":{ask('server_addr')[1]}/")
        assert ask("client_addr") == ask("socket").getsockname()
        assert ask("is_readable") is False
        if link == "tls":
            assert ask("ssl_object").selected_alpn_protocol() == "h2"
        else:
            assert ask("ssl_object") is None


# -- TLS on the stream.


def behind_tls(then: Script, *, depth: int) -> StreamScript:
    """A proxy that has an HTTP/1.1 server within so many layers of TLS behind it."""

    async def script(stream: ServerStream) -> None:
        await stream.respond(200)
        inner = ScriptedPeer(stream)
        for _ in range(depth):
            await inner.start_tls(make_tls().server)
        await then(inner)

    return script


@LINKS
@pytest.mark.parametrize("depth", [1, 2])
async def test_start_tls(link: str, depth: int) -> None:
    """In a stream of HTTP/2, which may be in TLS itself, and once more in that."""
    async with h2_server(multiplexed(behind_tls(respond, depth=depth)), link) as (pool, server):
        async with tunnel(pool, server.url) as stream:
            outer = stream.get_extra_info("ssl_object")
            for _ in range(depth):
                stream = await stream.start_tls(client_context(make_tls().ca), "example.com", timeout=5)
            for content in (b"abc", b"x" * 200_000):
                head = b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
                await stream.write(head + content)
                received = b""
                while len(received) < len(content) or not received.endswith(content):
                    received += await stream.read(timeout=5)
                assert received.startswith(b"HTTP/1.1 200 OK\r\n")
            ssl_object = stream.get_extra_info("ssl_object")
            assert ssl_object is not outer
            assert ssl_object.getpeercert()["subjectAltName"]
            assert (stream.get_extra_info("server_addr") is None) == (link == "memory")
            with pytest.raises(NotImplementedError):
                await stream.send_eof()
            await stream.aclose()
            assert_unharmed(pool, idle=1)
        await wait_all_tasks_blocked()
        assert [frame.error_code for frame in server.peer.sent(RstStreamFrame)] == [ErrorCodes.CANCEL]


class ThroughTunnel(Connector):
    """Connects through a proxy that speaks HTTP/2, as a user of the library can."""

    def __init__(self, pool: ConnectionPool, proxy: str) -> None:
        self.pool = pool
        self.proxy = proxy

    async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
        request = Request("CONNECT", self.proxy, extensions={"target": f"{host}:{port}"})
        return network_stream(await self.pool.handle_async_request(request))


@LINKS
async def test_http11_through_the_inner_tls(link: str) -> None:
    async with h2_server(multiplexed(behind_tls(respond, depth=1)), link) as (outer, server):
        connector = ThroughTunnel(outer, server.url)
        async with ConnectionPool(client_context(make_tls().ca), connector=connector) as pool:
            for content in (b"abc", b"x" * 500_000):
                response = await pool.request("PUT", "https://example.com/", content=content)
                assert response.extensions["http_version"] == b"HTTP/1.1"
                assert response.content == content
            assert_unharmed(pool, idle=1)
            assert outer.statistics().active == 1
        assert_unharmed(outer, idle=1)
        assert len(server.peer.sent(HeadersFrame)) == 1


@LINKS
async def test_http2_in_a_tunnel_of_http2(link: str) -> None:
    async def script(stream: ServerStream) -> None:
        await stream.respond(200)
        await Multiplexer(stream, echo).serve()

    async with h2_server(multiplexed(script), link) as (outer, server):
        connector = ThroughTunnel(outer, server.url)
        async with ConnectionPool(http1=False, http2=True, connector=connector) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(fetch, pool)
            async with tunnel(pool, "http://example.com/") as stream:
                await stream.write(b"abc")
                assert await stream.read() == b"abc"
            assert pool.statistics().connections_opened == 1


# -- WebSocket.


async def next_message(
    websocket: wsproto.connection.Connection, stream: NetworkStream
) -> tuple[type[wsproto.events.Event], Any]:
    """The next message, and what it says."""
    content: Any = None
    while True:
        for event in websocket.events():
            match event:
                case wsproto.events.Message():
                    content = event.data if content is None else content + event.data
                    if event.message_finished:
                        return type(event), content
                case wsproto.events.Pong():
                    return type(event), bytes(event.payload)
                case wsproto.events.CloseConnection():
                    return type(event), event.reason
        websocket.receive_data(await stream.read(timeout=5))


async def websocket_server(stream: ServerStream) -> None:
    """Agree to a WebSocket, send messages back the other way round, and answer pings."""
    assert stream.headers[b":protocol"] == b"websocket"
    assert stream.headers[b":path"] == b"/chat"
    assert stream.headers[b"sec-websocket-version"] == b"13"
    await stream.respond(200, [(b"sec-websocket-protocol", b"chat")])
    websocket = wsproto.connection.Connection(wsproto.connection.ConnectionType.SERVER)
    while data := await stream.receive_some():
        websocket.receive_data(data)
        for event in websocket.events():
            if isinstance(event, wsproto.events.TextMessage):
                await stream.send_all(websocket.send(wsproto.events.TextMessage(event.data[::-1])))
            elif isinstance(event, wsproto.events.BytesMessage):
                await stream.send_all(websocket.send(wsproto.events.BytesMessage(event.data[::-1])))
            elif isinstance(event, wsproto.events.Ping | wsproto.events.CloseConnection):
                await stream.send_all(websocket.send(event.response()))


@LINKS
async def test_a_websocket(link: str) -> None:
    """RFC 8441, 5: the framing is that of RFC 6455, without its handshake; END_STREAM closes it."""
    headers = {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Protocol": "chat"}
    async with h2_server(multiplexed(websocket_server, EXTENDED), link) as (pool, server):
        url = f"{server.url}chat"
        async with pool.stream("CONNECT", url, headers=headers, extensions=WEBSOCKET) as response:
            assert (b"sec-websocket-protocol", b"chat") in response.headers
            stream = network_stream(response)
            websocket = wsproto.connection.Connection(wsproto.connection.ConnectionType.CLIENT)
            answers: list[tuple[type[wsproto.events.Event], Any]] = []
            for event in (
                wsproto.events.TextMessage("hello"),
                wsproto.events.Ping(b"ping"),
                wsproto.events.BytesMessage(b"ab" * 5000),
                wsproto.events.CloseConnection(1000, "bye"),
            ):
                await stream.write(websocket.send(event), timeout=5)
                answers.append(await next_message(websocket, stream))
            await stream.send_eof()
            assert await stream.read(timeout=5) == b""
        assert answers == [
            (wsproto.events.TextMessage, "olleh"),
            (wsproto.events.Pong, b"ping"),
            (wsproto.events.BytesMessage, b"ba" * 5000),
            (wsproto.events.CloseConnection, "bye"),
        ]
        assert server.peer.sent(RstStreamFrame) == []
        assert_unharmed(pool, idle=1)


# -- Trio's own checks.


async def test_trios_checks() -> None:
    async with h2_server(lambda peer: Relay(peer).run()) as (pool, server):

        async def make_pair() -> tuple[NetworkStream, NetworkStream]:
            streams = []
            for _ in range(2):
                request = Request("CONNECT", server.url, extensions=TARGET)
                streams.append(network_stream(await pool.handle_async_request(request)))
            return streams[0], streams[1]

        async def make_clogged_pair() -> tuple[NetworkStream, NetworkStream]:
            streams = await make_pair()
            async with trio.open_nursery() as inner:
                for stream in streams:
                    inner.start_soon(stream.send_all, b"x" * 2**24)
                await wait_all_tasks_blocked()
                inner.cancel_scope.cancel()
            return streams

        await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)
        assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1
