"""CONNECT (RFC 9113, 8.5) and extended CONNECT (RFC 8441): a stream of HTTP/2 becomes a stream of Trio."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeAlias

import h2.events
import pytest
import trio
import trio.testing
import wsproto.connection
import wsproto.events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError, StreamClosedError
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, HeadersFrame, RstStreamFrame, WindowUpdateFrame
from trio.testing import MockClock

from tests.harness.certificates import alpn_server, client_context, make_tls
from tests.harness.checks import assert_unharmed, internals
from tests.harness.h2peer import H2Peer, h2_pool
from tests.harness.peers import respond
from tests.harness.servers import serve_tcp
from trio_exchange import (
    ConnectionPool,
    LocalProtocolError,
    NetworkStream,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    Request,
    Response,
    WriteError,
    WriteTimeout,
)
from trio_exchange._connect.connector import Connector
from trio_exchange.testing import ScriptedPeer

URL = "http://proxy.example/"
TARGET = {"target": "example.com:443"}
WEBSOCKET = {"protocol": "websocket"}
EXTENDED = {SettingCodes.ENABLE_CONNECT_PROTOCOL: 1}

# The frame's header after its length.
HEADERS_OF_STREAM_1 = b"\1\4\0\0\0\1"

Serve: TypeAlias = Callable[[H2Peer], Awaitable[object]]


def network_stream(response: Response) -> NetworkStream:
    stream = response.extensions["network_stream"]
    assert isinstance(stream, NetworkStream)
    return stream


def a_tunnel(pool: ConnectionPool, url: str = URL) -> contextlib.AbstractAsyncContextManager[Response]:
    return pool.stream("CONNECT", url, extensions=TARGET)


async def accept(peer: H2Peer) -> int:
    """Agree to a CONNECT; returns its stream."""
    stream_id, _ = await peer.head()
    await peer.respond(stream_id, end=False)
    return stream_id


async def send(peer: H2Peer, stream_id: int, data: bytes, *, end: bool = False) -> None:
    peer.h2.send_data(stream_id, data, end_stream=end)
    await peer.flush()


async def receive(peer: H2Peer, stream_id: int, size: int) -> bytes:
    """Receive at least so many bytes on a stream, giving credit."""
    data = b""
    while len(data) < size:
        event = await peer.event(h2.events.DataReceived, stream_id)
        data += event.data or b""
        if event.flow_controlled_length:
            with contextlib.suppress(StreamClosedError):
                peer.h2.acknowledge_received_data(event.flow_controlled_length, stream_id)
            await peer.flush()
    return data


async def read_exactly(stream: NetworkStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        received = await stream.read(size - len(data), timeout=10)
        assert received
        data += received
    return data


# -- Peers.


async def echo(peer: H2Peer, settings: dict[SettingCodes, int] | None = None) -> None:
    """Agree to every CONNECT and send back what comes, its end included; answer other requests."""
    await peer.start(settings)
    await answer(peer, {})


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


async def answer(peer: H2Peer, bodies: dict[int, bytes]) -> None:
    unsent: dict[int, bytearray] = {}
    ended: set[int] = set()
    while await peer.receive():
        for event in peer.events:
            stream_id = getattr(event, "stream_id", None) or 0
            match event:
                case h2.events.RequestReceived(headers=headers):
                    if dict(headers or [])[b":method"] == b"CONNECT":
                        unsent[stream_id] = bytearray()
                        peer.h2.send_headers(stream_id, [(b":status", b"200")])
                    else:
                        await peer.respond(stream_id, body=bodies.get(stream_id, b"hello"))
                case h2.events.DataReceived(data=data):
                    if data:
                        peer.h2.acknowledge_received_data(len(data), stream_id)
                        unsent[stream_id] += data
                case h2.events.StreamEnded():
                    ended.add(stream_id)
                case h2.events.StreamReset():
                    unsent.pop(stream_id, None)
        peer.events.clear()
        for stream_id, waiting in list(unsent.items()):
            while size := min(len(waiting), peer.h2.local_flow_control_window(stream_id), 16384):
                peer.h2.send_data(stream_id, bytes(waiting[:size]))
                del waiting[:size]
            if not waiting and stream_id in ended:
                del unsent[stream_id]
                peer.h2.end_stream(stream_id)
        await peer.flush()


# -- Ways to reach them.


@contextlib.asynccontextmanager
async def a_pool(via: str, serve: Serve, **options: Any) -> AsyncIterator[tuple[ConnectionPool, str, H2Peer]]:
    """A pool, the URL to ask it for, and the only peer that it may connect to."""
    peers: list[H2Peer] = []

    class Later:
        """The peer exists once there is a connection."""

        def __getattr__(self, name: str) -> Any:
            (peer,) = peers
            return getattr(peer, name)

    async def note(peer: H2Peer) -> None:
        peers.append(peer)
        await serve(peer)

    async def play(scripted: ScriptedPeer) -> None:
        await note(H2Peer(scripted.stream))

    later: Any = Later()
    async with trio.open_nursery() as nursery:
        if via == "memory":
            pool, _ = h2_pool(nursery, note, **options)
            url = URL
        else:
            server = await serve_tcp(nursery, play, tls=alpn_server("h2") if via == "tls" else None)
            context = client_context(make_tls().ca) if via == "tls" else None
            pool = ConnectionPool(context, http1=via == "tls", http2=True, **options)
            url = server.url
        async with pool:
            yield pool, url, later
        nursery.cancel_scope.cancel()


everywhere = pytest.mark.parametrize("via", ["memory", "tcp", "tls"])


# -- The request.


@pytest.mark.parametrize("headers", [{}, {"Host": "proxy.example"}], ids=["no Host", "Host of the proxy"])
async def test_a_connect_on_the_wire(headers: dict[str, str]) -> None:
    """Two pseudo-headers, and no end of the stream."""
    async with a_pool("memory", echo) as (pool, _, peer):
        headers = {**headers, "Proxy-Authorization": "x"}
        async with pool.stream("CONNECT", URL, headers=headers, extensions=TARGET) as response:
            assert response.status == 200
            assert response.extensions["stream_id"] == 1
            assert response.extensions["http_version"] == b"HTTP/2"
        (frame,) = peer.sent(HeadersFrame)
        assert "END_STREAM" not in frame.flags
        assert peer.sent(DataFrame) == []


@pytest.mark.parametrize("headers", [{}, {"Host": "proxy.example"}], ids=["no Host", "Host of the proxy"])
async def test_the_target_of_a_connect_is_its_authority(
    nursery: trio.Nursery, headers: dict[str, str]
) -> None:
    seen: list[list[tuple[bytes, bytes]]] = []

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        event = await peer.event(h2.events.RequestReceived)
        seen.append(list(event.headers or []))
        await peer.respond(1, 403)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool:
        headers = {**headers, "Proxy-Authorization": "x"}
        await pool.request("CONNECT", URL, headers=headers, extensions=TARGET)
    assert seen == [
        [(b":method", b"CONNECT"), (b":authority", b"example.com:443"), (b"proxy-authorization", b"x")]
    ]


@pytest.mark.parametrize(("scheme", "on_wire"), [("http", b"http"), ("ws", b"http")])
@pytest.mark.parametrize("protocol", ["websocket", b"websocket", "connect-udp"])
async def test_an_extended_connect_on_the_wire(
    nursery: trio.Nursery, scheme: str, on_wire: bytes, protocol: str | bytes
) -> None:
    seen: list[list[tuple[bytes, bytes]]] = []

    async def serve(peer: H2Peer) -> None:
        await peer.start(EXTENDED)
        event = await peer.event(h2.events.RequestReceived)
        seen.append(list(event.headers or []))
        await peer.respond(1, end=False)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with (
        pool,
        pool.stream(
            "CONNECT",
            f"{scheme}://server.example/chat?a",
            headers={"Sec-WebSocket-Version": "13"},
            extensions={"protocol": protocol},
        ) as response,
    ):
        assert response.status == 200
    assert [name for name, _ in seen[0]][-1] == b"sec-websocket-version"
    assert dict(seen[0]) == {
        b":method": b"CONNECT",
        b":protocol": protocol.encode() if isinstance(protocol, str) else protocol,
        b":scheme": on_wire,
        b":authority": b"server.example",
        b":path": b"/chat?a",
        b"sec-websocket-version": b"13",
    }


@pytest.mark.parametrize("extended", [True, False])
async def test_only_an_extended_connect_waits_for_settings(nursery: trio.Nursery, extended: bool) -> None:
    async def serve(peer: H2Peer) -> None:
        await trio.testing.wait_all_tasks_blocked()
        sent = bytes(await peer.stream.receive_some(65536))
        assert (HEADERS_OF_STREAM_1 in sent) == (not extended)
        await peer.start(EXTENDED)
        peer.events += peer.h2.receive_data(sent)
        await accept(peer)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    extensions = WEBSOCKET if extended else TARGET
    async with pool, pool.stream("CONNECT", URL, extensions=extensions) as response:
        assert response.status == 200


async def test_settings_that_do_not_come(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        sent = b""
        while data := await peer.stream.receive_some(65536):
            sent += data
        assert HEADERS_OF_STREAM_1 not in sent

    pool, _ = h2_pool(nursery, serve)
    async with pool:
        began = trio.current_time()
        with pytest.raises(ReadTimeout):
            await pool.request("CONNECT", URL, extensions={**WEBSOCKET, "timeout": {"read": 3}})
        assert trio.current_time() - began == 3


async def test_extended_connect_that_the_server_has_not_enabled() -> None:
    async with a_pool("memory", echo) as (pool, _, peer):
        for _ in range(2):
            with pytest.raises(LocalProtocolError, match=r"extended CONNECT \(RFC 8441\)"):
                await pool.request("CONNECT", URL, extensions=WEBSOCKET)
        assert peer.sent(HeadersFrame) == []
        response = await pool.request("GET", URL)
        assert response.content == b"hello"
        assert response.extensions["stream_id"] == 1
        assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1


async def test_extended_connect_that_the_server_enables_later(nursery: trio.Nursery) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        peer.h2.update_settings({SettingCodes.ENABLE_CONNECT_PROTOCOL: 1})
        await peer.respond(stream_id)
        await accept(peer)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool:
        with pytest.raises(LocalProtocolError):
            await pool.request("CONNECT", URL, extensions=WEBSOCKET)
        await pool.request("GET", URL)
        async with pool.stream("CONNECT", URL, extensions=WEBSOCKET) as response:
            assert response.extensions["stream_id"] == 3


@pytest.mark.parametrize("secure", [False, True])
async def test_a_protocol_on_what_turns_out_to_be_http11(nursery: trio.Nursery, secure: bool) -> None:
    server = await serve_tcp(nursery, respond, tls=make_tls().server if secure else None)
    async with ConnectionPool(client_context(make_tls().ca), http2=True) as pool:
        for _ in range(2):
            with pytest.raises(LocalProtocolError, match=r"needs HTTP/2, but the connection is HTTP/1\.1"):
                await pool.request("CONNECT", server.url, extensions=WEBSOCKET)
            assert_unharmed(pool, idle=1)
        response = await pool.request("PUT", server.url, content=b"abc")
        assert response.content == b"abc"
        assert pool.statistics().connections_opened == 1


@pytest.mark.parametrize("protocol", ["", "web socket", "web/socket", b"a\r\nb", "a,b"])
async def test_a_protocol_that_is_no_token(nursery: trio.Nursery, protocol: str | bytes) -> None:
    pool, connector = h2_pool(nursery, echo)
    async with pool:
        with pytest.raises(LocalProtocolError, match="protocol extension must be a token"):
            await pool.request("CONNECT", URL, extensions={"protocol": protocol})
    assert connector.dialled == []


@pytest.mark.parametrize("method", ["GET", "connect"])
async def test_a_protocol_with_another_method(nursery: trio.Nursery, method: str) -> None:
    pool, connector = h2_pool(nursery, echo)
    async with pool:
        with pytest.raises(LocalProtocolError, match="needs the method CONNECT"):
            await pool.request(method, URL, extensions=WEBSOCKET)
    assert connector.dialled == []


@pytest.mark.parametrize("protocol", [5, True, ["websocket"]])
async def test_a_protocol_of_the_wrong_type(nursery: trio.Nursery, protocol: Any) -> None:
    pool, connector = h2_pool(nursery, echo)
    async with pool:
        with pytest.raises(TypeError, match="protocol extension"):
            await pool.request("CONNECT", URL, extensions={"protocol": protocol})
    assert connector.dialled == []


@pytest.mark.parametrize("extensions", [TARGET, WEBSOCKET], ids=["connect", "extended"])
@pytest.mark.parametrize("content", [b"abc", [b"abc"]], ids=["bytes", "iterable"])
async def test_a_connect_can_have_no_content(
    extensions: dict[str, str], content: bytes | Iterable[bytes]
) -> None:
    async with a_pool("memory", functools.partial(echo, settings=EXTENDED)) as (pool, _, peer):
        with pytest.raises(LocalProtocolError, match="can't have content"):
            await pool.request("CONNECT", URL, content=content, extensions=extensions)
        assert (await pool.request("GET", URL)).extensions["stream_id"] == 1
        assert len(peer.sent(HeadersFrame)) == 1


async def test_an_empty_body_is_no_content() -> None:
    async with a_pool("memory", echo) as (pool, _, _):
        content: list[bytes] = []
        async with pool.stream("CONNECT", URL, content=content, extensions=TARGET) as response:
            assert response.status == 200


async def test_extended_connect_to_a_server_that_is_not_http2(nursery: trio.Nursery) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.stream.receive_some(1000)

    pool, _ = h2_pool(nursery, serve)
    async with pool:
        with pytest.raises(RemoteProtocolError, match="does not speak HTTP/2"):
            await pool.request("CONNECT", URL, extensions=WEBSOCKET)


# -- The answer.


@pytest.mark.parametrize("status", [300, 403, 502])
@pytest.mark.parametrize("extensions", [TARGET, WEBSOCKET], ids=["connect", "extended"])
async def test_any_other_answer_is_an_ordinary_response(status: int, extensions: dict[str, str]) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start(EXTENDED)
        for _ in range(2):
            stream_id, _ = await peer.head()
            await peer.respond(
                stream_id, status, [(b"content-length", b"3")], b"abc", trailers=[(b"t", b"u")]
            )
            assert await peer.body(stream_id) == b""
        await peer.until_closed()

    async with a_pool("memory", serve) as (pool, _, peer):
        async with pool.stream("CONNECT", URL, extensions=extensions) as response:
            assert response.status == status
            stream = network_stream(response)
            with pytest.raises(LocalProtocolError, match="belongs to HTTP"):
                await stream.read()
            with pytest.raises(LocalProtocolError, match="belongs to HTTP"):
                await stream.write(b"x")
            await stream.aclose()
            assert await response.aread() == b"abc"
            assert response.extensions["trailing_headers"] == [(b"t", b"u")]
        assert (await pool.request("CONNECT", URL, extensions=extensions)).content == b"abc"
        await trio.testing.wait_all_tasks_blocked()
        assert peer.sent(RstStreamFrame) == []
        assert_unharmed(pool, idle=1)


async def test_a_request_that_is_a_connect_does_not_keep_its_tunnel() -> None:
    async with a_pool("memory", echo) as (pool, _, peer):
        response = await pool.request("CONNECT", URL, extensions=TARGET)
        assert response.content == b""
        await trio.testing.wait_all_tasks_blocked()
        assert [frame.error_code for frame in peer.sent(RstStreamFrame, 1)] == [ErrorCodes.CANCEL]
        assert_unharmed(pool, idle=1)


# -- Reading and writing.


@everywhere
async def test_what_is_written_is_read(via: str) -> None:
    async with a_pool(via, echo) as (pool, url, peer):
        async with a_tunnel(pool, url) as response:
            stream = network_stream(response)
            assert "Tunnel on stream 1 over " in repr(stream)
            for data in (b"abc", b"", b"x" * 300_000):
                async with trio.open_nursery() as inner:
                    inner.start_soon(stream.write, data)
                    assert await read_exactly(stream, len(data)) == data
            assert (await pool.request("GET", url)).content == b"hello"
        assert {frame.stream_id for frame in peer.sent(DataFrame)} == {1}
        assert_unharmed(pool, idle=1)


@everywhere
async def test_other_streams_are_not_disturbed(via: str) -> None:
    """Tunnels come and go in every way, while others and ordinary requests carry on."""

    async def talk(index: int) -> None:
        async with a_tunnel(pool, url) as response:
            stream = network_stream(response)
            data = b"%d" % index * 1000
            for _ in range(20):
                await stream.write(data)
                assert await read_exactly(stream, len(data)) == data
            await stream.send_eof()
            assert await stream.read() == b""

    async def leave(index: int) -> None:
        async with a_tunnel(pool, url) as response:
            await network_stream(response).write(b"x" * index * 1000)

    async def get() -> None:
        assert (await pool.request("GET", url)).content == b"hello"

    async with a_pool(via, echo) as (pool, url, _):
        async with trio.open_nursery() as nursery:
            for index in range(10):
                nursery.start_soon(talk, index)
                nursery.start_soon(leave, index)
                nursery.start_soon(get)
        assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1


async def test_writing_waits_for_the_servers_window(nursery: trio.Nursery) -> None:
    written = False

    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        stream_id = await accept(peer)
        received = b""
        for more in (10, 10, 5):
            while len(received) % 10 or not received or more == 0:
                received += (await peer.event(h2.events.DataReceived, stream_id)).data or b""
            await trio.testing.wait_all_tasks_blocked()
            assert not written
            assert sum(len(frame.data) for frame in peer.sent(DataFrame)) == len(received)
            peer.h2.increment_flow_control_window(more, stream_id)
            await peer.flush()
            received += (await peer.event(h2.events.DataReceived, stream_id)).data or b""
        assert received == bytes(range(35))
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        await trio.testing.wait_all_tasks_blocked()
        await network_stream(response).write(bytes(range(35)))
        written = True


@pytest.mark.parametrize("window", [1, 7])
async def test_writing_through_the_smallest_windows(window: int) -> None:
    serve = functools.partial(echo, settings={SettingCodes.INITIAL_WINDOW_SIZE: window})
    async with a_pool("memory", serve) as (pool, url, peer), a_tunnel(pool, url) as response:
        # The server's settings have to be there before anything is sent.
        await trio.testing.wait_all_tasks_blocked()
        stream = network_stream(response)
        await stream.write(b"abc" * 50)
        assert await read_exactly(stream, 150) == b"abc" * 50
        assert max(len(frame.data) for frame in peer.sent(DataFrame)) <= window


async def test_a_tunnel_that_is_not_read_holds_one_window_and_no_other_stream(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    sent = 0

    async def serve(peer: H2Peer) -> None:
        nonlocal sent
        await peer.start()
        stream_id = await accept(peer)
        while size := min(peer.h2.local_flow_control_window(stream_id), 16384):
            await send(peer, stream_id, b"x" * size)
            sent += size
        for _ in range(3):
            other, _, _ = await peer.request()
            await peer.respond(other, body=b"y" * 100_000)
        assert peer.sent(WindowUpdateFrame, stream_id) == []
        await peer.event(h2.events.WindowUpdated, stream_id)
        await send(peer, stream_id, b"z")
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        stream = network_stream(response)
        for _ in range(3):
            assert (await pool.request("GET", URL)).content == b"y" * 100_000
        assert sent <= 1024 * 1024
        assert await read_exactly(stream, sent) == b"x" * sent
        assert await stream.read() == b"z"


@pytest.mark.parametrize("byte_by_byte", [False, True], ids=["whole", "bytewise"])
async def test_data_that_comes_with_the_answer(nursery: trio.Nursery, byte_by_byte: bool) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        peer.h2.send_headers(stream_id, [(b":status", b"200")])
        peer.h2.send_data(stream_id, b"ready", pad_length=5)
        peer.h2.send_data(stream_id, b"")
        peer.h2.end_stream(stream_id)
        await peer.send(peer.h2.data_to_send(), byte_by_byte=byte_by_byte)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        stream = network_stream(response)
        assert await stream.read(100) == b"ready"
        assert await stream.read(100) == b""
        assert await stream.read(100) == b""


# -- The end.


@everywhere
@pytest.mark.parametrize("first", ["we", "the server"])
async def test_both_sides_end_without_reset(via: str, first: str) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id = await accept(peer)
        if first == "we":
            assert await peer.body(stream_id) == b"abc"
            await send(peer, stream_id, b"def", end=True)
        else:
            await send(peer, stream_id, b"def", end=True)
            assert await peer.body(stream_id) == b"abc"
        other, _, _ = await peer.request()
        await peer.respond(other)
        await peer.until_closed()

    async with a_pool(via, serve) as (pool, url, peer):
        async with a_tunnel(pool, url) as response:
            stream = network_stream(response)
            if first == "we":
                await stream.write(b"abc")
                await stream.send_eof()
                with pytest.raises(trio.ClosedResourceError, match="the end was sent already"):
                    await stream.send_all(b"x")
                with pytest.raises(WriteError, match="the end was sent already"):
                    await stream.write(b"x")
                assert await stream.read() == b"def"
                assert await stream.read() == b""
            else:
                assert await stream.read() == b"def"
                assert await stream.read() == b""
                await stream.write(b"abc")
                await stream.send_eof()
            # Nothing is left of it, though the response is not closed.
            assert_unharmed(pool, idle=1)
            await stream.send_eof()
        await pool.request("GET", url)
        assert "END_STREAM" in peer.sent(DataFrame, 1)[-1].flags
        assert peer.sent(RstStreamFrame) == []


@pytest.mark.parametrize("close", ["stream", "response"])
async def test_closing_after_the_server_ended_ends_our_side_too(nursery: trio.Nursery, close: str) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id = await accept(peer)
        await send(peer, stream_id, b"abc", end=True)
        assert await peer.body(stream_id) == b""
        await peer.until_closed()
        assert peer.sent(RstStreamFrame) == []

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        stream = network_stream(response)
        assert await stream.read() == b"abc"
        assert await stream.read() == b""
        await (stream.aclose() if close == "stream" else response.aclose())
        assert_unharmed(pool, idle=1)
        await trio.testing.wait_all_tasks_blocked()


async def test_who_waits_to_write_to_a_tunnel_hears_that_it_is_broken(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id = await accept(peer)
        await trio.testing.wait_all_tasks_blocked()
        await peer.send_frame(
            HeadersFrame(stream_id, peer.h2.encoder.encode([(b"t", b"u")]), flags=["END_HEADERS"])
        )
        reset = await peer.event(h2.events.StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.PROTOCOL_ERROR
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        # More than the window, which is never opened.
        with trio.fail_after(10), pytest.raises(WriteError, match="trailers that do not end the stream"):
            await network_stream(response).write(bytes(100_000))


async def test_trailers_end_a_tunnel(nursery: trio.Nursery) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id = await accept(peer)
        await send(peer, stream_id, b"abc")
        peer.h2.send_headers(stream_id, [(b"t", b"u")], end_stream=True)
        await peer.flush()
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        stream = network_stream(response)
        await trio.testing.wait_all_tasks_blocked()
        assert await stream.read() == b"abc"
        assert await stream.read() == b""


class Boom(Exception):
    pass


@everywhere
@pytest.mark.parametrize("how", ["stream", "response", "block", "error", "cancelled"])
@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half-closed"])
async def test_leaving_resets_the_stream_and_frees_its_place(via: str, how: str, half_closed: bool) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
        stream_id = await accept(peer)
        assert (await peer.event(h2.events.StreamReset, stream_id)).error_code == ErrorCodes.CANCEL
        other, _, _ = await peer.request()
        await peer.respond(other, body=b"hello")
        await peer.until_closed()

    async with a_pool(via, serve, max_connections=1) as (pool, url, peer):
        with contextlib.suppress(Boom), trio.CancelScope() as scope:
            async with a_tunnel(pool, url) as response:
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
        assert (await pool.request("GET", url)).content == b"hello"
        assert len(peer.sent(RstStreamFrame)) == 1
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
        assert len(peer.sent(RstStreamFrame)) == 1


async def test_data_for_a_tunnel_that_was_left_is_credited(nursery: trio.Nursery) -> None:
    """More of it than the connection's window holds."""
    size, left = 24 * 1024 * 1024, trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        for _ in range(size // (256 * 1024)):
            stream_id = await accept(peer)
            await send(peer, stream_id, b"greeting")
            # The client leaves, but the server does not know yet.
            await trio.testing.wait_all_tasks_blocked()
            while room := min(peer.h2.local_flow_control_window(stream_id), 16384):
                await send(peer, stream_id, b"x" * room)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool:
        for _ in range(size // (256 * 1024)):
            async with a_tunnel(pool) as response:
                assert await network_stream(response).read() == b"greeting"
        left.set()
        assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1


@everywhere
@pytest.mark.parametrize("code", [ErrorCodes.CONNECT_ERROR, ErrorCodes.CANCEL, ErrorCodes.REFUSED_STREAM])
async def test_the_server_resets_a_tunnel(via: str, code: ErrorCodes) -> None:
    """What came before is read; a writer that waits for a window is woken; others go on."""
    written: list[type[Exception]] = []
    go = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        stream_id = await accept(peer)
        await send(peer, stream_id, b"abc")
        await peer.event(h2.events.DataReceived, stream_id)
        await go.wait()
        peer.h2.reset_stream(stream_id, code)
        await peer.flush()
        other, _, _ = await peer.request()
        await peer.respond(other, body=b"hello")
        await peer.until_closed()

    async def write(operation: Callable[[], Awaitable[object]], error: type[Exception]) -> None:
        with pytest.raises(error):
            await operation()
        written.append(error)

    async with a_pool(via, serve) as (pool, url, peer):
        async with a_tunnel(pool, url) as response:
            stream = network_stream(response)
            with trio.fail_after(5):
                async with trio.open_nursery() as inner:
                    inner.start_soon(write, lambda: stream.write(b"x" * 100_000), WriteError)
                    await trio.testing.wait_all_tasks_blocked()
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
            assert written == [WriteError]
        assert (await pool.request("GET", url)).content == b"hello"
        assert peer.sent(RstStreamFrame) == []


@everywhere
async def test_the_connection_ends_after_the_other_end_of_a_tunnel(via: str) -> None:
    """There is no end to send any more, and what is sent afterwards fails as before."""
    go = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        await send(peer, await accept(peer), b"", end=True)
        await go.wait()
        await peer.stream.aclose()

    async with a_pool(via, serve) as (pool, url, _), a_tunnel(pool, url) as response:
        stream = network_stream(response)
        with trio.fail_after(5):
            assert await stream.receive_some() == b""
            [connection] = internals(pool)
            go.set()
            await connection.closed.wait()
            assert await stream.receive_some() == b""
            for _ in range(2):
                with pytest.raises(trio.BrokenResourceError, match="the stream was closed"):
                    await stream.send_all(b"x")
                await stream.send_eof()


async def test_the_server_resets_while_the_window_is_waited_for(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        stream_id = await accept(peer)
        await trio.sleep(1)
        peer.h2.reset_stream(stream_id)
        await peer.flush()
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(2):
            await network_stream(response).wait_send_all_might_not_block()


@everywhere
async def test_the_server_ends_and_resets(via: str) -> None:
    """As a proxy may whose other side does not listen any more: what it sent is whole."""
    go = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        stream_id = await accept(peer)
        await send(peer, stream_id, b"abc", end=True)
        await go.wait()
        peer.h2.reset_stream(stream_id, ErrorCodes.NO_ERROR)
        await peer.flush()
        await peer.until_closed()

    async with a_pool(via, serve) as (pool, url, peer), a_tunnel(pool, url) as response:
        stream = network_stream(response)
        async with trio.open_nursery() as inner:

            @inner.start_soon
            async def write() -> None:
                with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
                    await stream.send_all(b"x" * 100_000)

            await trio.testing.wait_all_tasks_blocked()
            go.set()
        assert await stream.read() == b"abc"
        assert await stream.read() == b""
        with pytest.raises(WriteError):
            await stream.write(b"x")
        assert peer.sent(RstStreamFrame) == []


@everywhere
async def test_a_connection_that_breaks(via: str) -> None:
    go = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        stream_id = await accept(peer)
        await send(peer, stream_id, b"abc")
        await go.wait()

    async with a_pool(via, serve) as (pool, url, _), a_tunnel(pool, url) as response:
        stream = network_stream(response)
        async with trio.open_nursery() as inner:

            @inner.start_soon
            async def write() -> None:
                with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
                    await stream.send_all(b"x" * 100_000)

            await trio.testing.wait_all_tasks_blocked()
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
            await connection.closed.wait()
        assert_unharmed(pool)


async def test_a_connection_that_breaks_after_the_server_has_ended_the_tunnel(nursery: trio.Nursery) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        stream_id = await accept(peer)
        await send(peer, stream_id, b"abc", end=True)
        await trio.testing.wait_all_tasks_blocked()

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        stream = network_stream(response)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x" * 100)
        assert await stream.read() == b"abc"
        assert await stream.read() == b""


@everywhere
async def test_closing_the_pool_ends_reads_and_writes(via: str) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        await accept(peer)
        await peer.until_closed()

    async with a_pool(via, serve) as (pool, url, _), a_tunnel(pool, url) as response:
        stream = network_stream(response)

        async def expect(error: type[Exception], operation: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(error):
                await operation()

        async with trio.open_nursery() as inner:
            inner.start_soon(expect, ReadError, stream.read)
            inner.start_soon(expect, WriteError, lambda: stream.write(b"x" * 100_000))
            await trio.testing.wait_all_tasks_blocked()
            await pool.aclose()


async def test_a_tunnel_goes_on_after_goaway(nursery: trio.Nursery) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id = await accept(peer)
        await peer.send(b"\0\0\x08\x07\0\0\0\0\0" + b"\0\0\0\x01" + b"\0\0\0\0")
        await send(peer, stream_id, b"abc")
        assert await receive(peer, stream_id, 3) == b"def"
        await send(peer, stream_id, b"", end=True)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        stream = network_stream(response)
        assert await stream.read() == b"abc"
        await stream.write(b"def")
        assert await stream.read() == b""
        assert pool.statistics().active == 1
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert pool.connections == []


# -- One task at a time, cancellation, timeouts.


async def test_a_cancelled_write_tears_nothing(nursery: trio.Nursery) -> None:
    """What was sent is a beginning of the data, and the stream can be used and ended."""
    body = b""

    async def serve(peer: H2Peer) -> None:
        nonlocal body
        await peer.start()
        stream_id = await accept(peer)
        await cancelled.wait()
        body = await peer.body(stream_id)
        other, _, _ = await peer.request()
        await peer.respond(other, body=b"hello")
        await peer.until_closed()

    content, cancelled = bytes(range(251)) * 4000, trio.Event()
    pool, _ = h2_pool(nursery, serve)
    async with pool:
        async with a_tunnel(pool) as response:
            stream = network_stream(response)
            async with trio.open_nursery() as inner:
                inner.start_soon(stream.write, content)
                await trio.testing.wait_all_tasks_blocked()
                inner.cancel_scope.cancel()
            cancelled.set()
            await stream.write(b"after")
            await stream.send_eof()
        # Left before the server had ended, but its end was sent.
        assert (await pool.request("GET", URL)).content == b"hello"
    assert body.endswith(b"after")
    assert 0 < len(body) < len(content)
    assert content.startswith(body[:-5])


async def test_timeouts(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        stream_id = await accept(peer)
        await trio.sleep(10)
        await send(peer, stream_id, b"abc")
        await peer.until_closed()

    pool, _ = h2_pool(nursery, serve)
    async with pool, a_tunnel(pool) as response:
        stream = network_stream(response)
        began = trio.current_time()
        with pytest.raises(ReadTimeout):
            await stream.read(timeout=3)
        assert trio.current_time() - began == 3
        with pytest.raises(WriteTimeout):
            await stream.write(b"x" * 11, timeout=4)
        assert trio.current_time() - began == 7
        assert await stream.read(timeout=5) == b"abc"


# -- Information.


@everywhere
async def test_information_through_a_tunnel(via: str) -> None:
    async with a_pool(via, echo) as (pool, url, _), a_tunnel(pool, url) as response:
        ask = network_stream(response).get_extra_info
        if via == "memory":
            for name in ("client_addr", "server_addr", "socket", "ssl_object", "is_readable"):
                assert ask(name) is None
        else:
            assert ask("server_addr") == ask("socket").getpeername()
            assert url.endswith(f":{ask('server_addr')[1]}")
            assert ask("client_addr") == ask("socket").getsockname()
            assert ask("is_readable") is False
            if via == "tls":
                assert ask("ssl_object").selected_alpn_protocol() == "h2"
            else:
                assert ask("ssl_object") is None


# -- TLS on the stream.


class ServerStream(trio.abc.Stream):
    """The server's end of one stream of a peer that has no other."""

    def __init__(self, peer: H2Peer, stream_id: int) -> None:
        self.peer = peer
        self.stream_id = stream_id

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            while not (size := min(len(view), self.peer.h2.local_flow_control_window(self.stream_id), 16384)):
                await self.peer.event(h2.events.WindowUpdated, self.stream_id)
            await send(self.peer, self.stream_id, bytes(view[:size]))
            view = view[size:]

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while True:
            event = await self.peer.event(h2.events.Event, self.stream_id)
            if isinstance(event, h2.events.DataReceived) and event.data:
                self.peer.h2.acknowledge_received_data(len(event.data), self.stream_id)
                await self.peer.flush()
                return event.data
            if isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                return b""

    async def aclose(self) -> None:
        with contextlib.suppress(ProtocolError):
            self.peer.h2.end_stream(self.stream_id)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.peer.flush()


def behind_a_proxy(then: Callable[[ScriptedPeer], Awaitable[object]], *, depth: int) -> Serve:
    """A proxy that has an HTTP/1.1 server within so many layers of TLS behind it."""

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        inner = ScriptedPeer(ServerStream(peer, await accept(peer)))
        for _ in range(depth):
            await inner.start_tls(make_tls().server)
        await then(inner)
        await peer.until_closed()

    return serve


@everywhere
@pytest.mark.parametrize("depth", [1, 2])
async def test_start_tls(via: str, depth: int) -> None:
    """In a stream of HTTP/2, which may be in TLS itself, and once more in that."""
    async with a_pool(via, behind_a_proxy(respond, depth=depth)) as (pool, url, peer):
        async with a_tunnel(pool, url) as response:
            stream = network_stream(response)
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
            assert (stream.get_extra_info("server_addr") is None) == (via == "memory")
            with pytest.raises(NotImplementedError):
                await stream.send_eof()
            await stream.aclose()
            assert_unharmed(pool, idle=1)
        await trio.testing.wait_all_tasks_blocked()
        assert [frame.error_code for frame in peer.sent(RstStreamFrame)] == [ErrorCodes.CANCEL]


class ThroughTunnel(Connector):
    """Connects through a proxy that speaks HTTP/2, as a user of the library can."""

    def __init__(self, pool: ConnectionPool, proxy: str) -> None:
        self.pool = pool
        self.proxy = proxy

    async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
        request = Request("CONNECT", self.proxy, extensions={"target": f"{host}:{port}"})
        return network_stream(await self.pool.handle_async_request(request))


@everywhere
async def test_http11_through_the_inner_tls(via: str) -> None:
    async with a_pool(via, behind_a_proxy(respond, depth=1)) as (outer, url, peer):
        context = client_context(make_tls().ca)
        async with ConnectionPool(context, connector=ThroughTunnel(outer, url)) as pool:
            for content in (b"abc", b"x" * 500_000):
                response = await pool.request("PUT", "https://example.com/", content=content)
                assert response.extensions["http_version"] == b"HTTP/1.1"
                assert response.content == content
            assert_unharmed(pool, idle=1)
            assert outer.statistics().active == 1
        assert_unharmed(outer, idle=1)
        assert len(peer.sent(HeadersFrame)) == 1


@everywhere
async def test_http2_in_a_tunnel_of_http2(via: str) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        inner = H2Peer(ServerStream(peer, await accept(peer)))
        await echo(inner)
        await peer.until_closed()

    async with a_pool(via, serve) as (outer, url, _):
        connector = ThroughTunnel(outer, url)
        async with ConnectionPool(http1=False, http2=True, connector=connector) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(pool.request, "GET", "http://example.com/")
            async with a_tunnel(pool, "http://example.com/") as response:
                await network_stream(response).write(b"abc")
                assert await network_stream(response).read() == b"abc"
            assert pool.statistics().connections_opened == 1


async def nothing(peer: ScriptedPeer) -> None:
    await trio.sleep_forever()


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


@everywhere
async def test_a_websocket(via: str) -> None:
    """RFC 8441, 5: the framing is that of RFC 6455, without its handshake; END_STREAM closes it."""
    closed = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start(EXTENDED)
        stream_id, headers = await peer.head()
        assert headers[b":protocol"] == b"websocket"
        assert headers[b":path"] == b"/chat"
        assert headers[b"sec-websocket-version"] == b"13"
        await peer.respond(stream_id, 200, [(b"sec-websocket-protocol", b"chat")], end=False)
        stream = ServerStream(peer, stream_id)
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
        await stream.aclose()
        closed.set()
        await peer.until_closed()

    headers = {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Protocol": "chat"}
    async with a_pool(via, serve) as (pool, url, peer):
        async with pool.stream(
            "CONNECT", f"{url.rstrip('/')}/chat", headers=headers, extensions=WEBSOCKET
        ) as response:
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
            await closed.wait()
        assert answers == [
            (wsproto.events.TextMessage, "olleh"),
            (wsproto.events.Pong, b"ping"),
            (wsproto.events.BytesMessage, b"ba" * 5000),
            (wsproto.events.CloseConnection, "bye"),
        ]
        assert peer.sent(RstStreamFrame) == []
        assert_unharmed(pool, idle=1)


# -- Trio's own checks.


async def test_trios_checks(nursery: trio.Nursery) -> None:
    async def serve(peer: H2Peer) -> None:
        await Relay(peer).run()

    pool, _ = h2_pool(nursery, serve)
    async with pool:

        async def make_pair() -> tuple[NetworkStream, NetworkStream]:
            streams = []
            for _ in range(2):
                request = Request("CONNECT", URL, extensions=TARGET)
                streams.append(network_stream(await pool.handle_async_request(request)))
            return streams[0], streams[1]

        async def make_clogged_pair() -> tuple[NetworkStream, NetworkStream]:
            streams = await make_pair()
            async with trio.open_nursery() as inner:
                for stream in streams:
                    inner.start_soon(stream.send_all, b"x" * 2**24)
                await trio.testing.wait_all_tasks_blocked()
                inner.cancel_scope.cancel()
            return streams

        await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)
        assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1
