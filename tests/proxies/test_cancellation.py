"""As `tests.http.test_cancellation`, for every kind of tunnel: at any step, an interruption leaves nothing."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import h2.errors
import h2.events
import h2.exceptions
import pytest
import trio

from tests.harness.h2peer import PREFACE, H2Peer, Headers
from tests.harness.peers import client_context, make_tls
from tests.harness.sweep import Interruption, Run, Scenario, World, forgiving, sweep
from tests.http.test_cancellation import (
    DOWNLOAD,
    Handler,
    another_leads,
    begins_with,
    full_duplex,
    get,
    others_behind,
    upload,
)
from trio_exchange import Proxy, ProxyError
from trio_exchange.testing import ScriptedPeer

pytestmark = pytest.mark.sweep

# -- The network: every kind of proxy, and the origin. What is spoken to it says which it is.


async def play(peer: ScriptedPeer) -> None:
    """Be whoever the client takes us for, and once a tunnel is there, whoever is at its end."""
    match (await begins_with(peer))[:1]:
        case b"":
            return
        case b"\x16":
            await peer.start_tls(server_context())
            await play(peer)
        case b"\x05":
            if await socks5(peer):
                await play(peer)
        case b"\x04":
            await peer.receive_some()
            await peer.send(b"\x00\x5a" + bytes(6))
            await play(peer)
        case b"h":
            await echo(peer)
        case _:
            if (await begins_with(peer))[:3] == PREFACE[:3]:
                await Multiplexer(peer.stream, multiplexed).serve()
            else:
                await http1(peer)


network = forgiving(play)


@functools.cache
def server_context() -> ssl.SSLContext:
    """A context for proxies and origins that agree to whatever HTTP the client offers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    make_tls().ca.issue_cert("localhost", "example.com", "refused.example").configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


async def echo(peer: ScriptedPeer) -> None:
    while data := await peer.receive_some():
        await peer.send(data)


async def socks5(peer: ScriptedPeer) -> bool:
    greeting = await peer.receive_some()
    if 2 in greeting[2:]:
        await peer.send(b"\x05\x02")
        assert await peer.receive_some() in (b"\x01\x04user\x08password", b"")
        await peer.send(b"\x01\x00")
    else:
        await peer.send(b"\x05\x00")
    request = await peer.receive_some()
    refused = request[4:8] == socket.inet_aton(ADDRESSES[0])
    await peer.send(bytes((5, 5 if refused else 0, 0, 1)) + bytes(6))
    return not refused


async def http1(peer: ScriptedPeer) -> None:
    while True:
        head = await peer.receive_head()
        match head.method, head.target.removeprefix(b"http://example.com"):
            case b"CONNECT", b"refused.example:443":
                await peer.send_response(407, body=b"first log in")
            case b"CONNECT", _:
                await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await play(peer)
                return
            case _, b"/ws":
                await peer.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")
                await echo(peer)
                return
            case _, b"/download":
                await peer.send_response(body=DOWNLOAD)
            case _, b"/echo":
                await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while chunk := await peer.receive_chunk():
                    await peer.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                await peer.send(b"0\r\n\r\n")
            case _:
                await peer.receive_body()
                await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
                await trio.lowlevel.checkpoint()
                await peer.send(b"0123456789")


async def multiplexed(stream: ServerStream) -> None:
    match stream.headers:
        case {b":method": b"CONNECT", b":authority": b"refused.example:443"}:
            await stream.respond(407)
            await stream.send_all(b"first log in")
        case {b":method": b"CONNECT"}:
            await stream.respond(200)
            await play(ScriptedPeer(stream))
        case {b":path": b"/echo"}:
            await stream.respond(200)
            while data := await stream.receive_some():
                await stream.send_all(data)
        case _:
            while await stream.receive_some():
                pass
            await stream.respond(200)
            await trio.lowlevel.checkpoint()
            await stream.send_all(b"0123456789")


class OneSender(trio.abc.Stream):
    """A stream to which several tasks may send."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._lock = trio.Lock()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # What HTTP/2 has made has to be sent, also by a task that is cancelled.
        with trio.CancelScope(shield=True):
            async with self._lock:
                await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


class Multiplexer:
    """A server of HTTP/2 where every request is played by a script, in a task of its own.

    Args:
        stream: The connection.
        script: Called with a `ServerStream` for every request. When it returns, the stream is ended.

    Attributes:
        peer: The connection's state.
        streams: All that were opened, by id.
        progress: Set, and replaced, when more may be sent than before.
    """

    def __init__(self, stream: trio.abc.Stream, script: Callable[[ServerStream], Awaitable[object]]) -> None:
        self.peer = H2Peer(OneSender(stream))
        self.streams: dict[int, ServerStream] = {}
        self.progress = trio.Event()
        self._script = script

    async def serve(self, settings: Any = None, then: Any = None) -> None:
        """Serve until the client has gone, which must have ended all tunnels before it says so."""
        async with trio.open_nursery() as nursery:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self.peer.start(settings, then=then)
                while data := bytes(await self.peer.stream.receive_some(65536)):
                    self._receive(data, nursery)
                    await self.peer.flush()
            nursery.cancel_scope.cancel()

    def _receive(self, data: bytes, nursery: trio.Nursery) -> None:
        self.peer.note(data)
        for event in self.peer.h2.receive_data(data):
            self._take(event, nursery)

    def _take(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=int(stream_id)):
                self.streams[stream_id] = ServerStream(self, stream_id, list(event.headers or []))
                nursery.start_soon(self._play, self.streams[stream_id])
            case h2.events.DataReceived(stream_id=int(stream_id)):
                self.streams[stream_id].take(event.data or b"", event.flow_controlled_length or 0)
            case h2.events.StreamEnded(stream_id=int(stream_id)):
                self.streams[stream_id].end()
            case h2.events.StreamReset(stream_id=int(stream_id)):
                self.streams[stream_id].break_off()
            case h2.events.ConnectionTerminated():
                open_tunnels = [stream for stream in self.streams.values() if stream.is_open_tunnel]
                assert open_tunnels == [], "the client has left tunnels open"
                for stream in self.streams.values():
                    stream.break_off()
        self.progress.set()
        self.progress = trio.Event()

    async def _play(self, stream: ServerStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            await self._script(stream)
            await stream.aclose()


class ServerStream(trio.abc.HalfCloseableStream):
    """The server's side of one stream of HTTP/2.

    Attributes:
        server: Of its connection.
        id: Its number.
        fields: The request's head, as it came.
        headers: The same, to look things up.
        received_end: Whether the client has ended its side.
        was_reset: Whether the client has reset it.
        sent_end: Whether this side has ended.
    """

    def __init__(self, server: Multiplexer, stream_id: int, fields: Headers) -> None:
        self.id = stream_id
        self.fields = fields
        self.headers = dict(fields)
        self.received_end = False
        self.was_reset = False
        self.sent_end = False
        self.server = server
        self._h2 = server.peer.h2
        self._arrived, self._inbox = trio.open_memory_channel[tuple[bytes, int]](math.inf)
        self._rest = b""

    def take(self, data: bytes, size: int) -> None:
        """What has arrived, and by how much it has used the windows."""
        self._arrived.send_nowait((data, size))

    def end(self) -> None:
        """The client has ended its side."""
        self.received_end = True
        self._arrived.close()

    def break_off(self) -> None:
        """The client has no more use for the stream."""
        self.was_reset = True
        self._arrived.close()

    @property
    def is_open_tunnel(self) -> bool:
        """Whether it is a tunnel that the client has not ended."""
        return self.headers[b":method"] == b"CONNECT" and not (self.received_end or self.was_reset)

    async def respond(self, status: int, headers: Headers | None = None, *, end: bool = False) -> None:
        """Send a head."""
        self._check()
        self._h2.send_headers(self.id, [(b":status", b"%d" % status), *(headers or [])], end_stream=end)
        self.sent_end = end
        await self.server.peer.flush()

    async def inform(self, status: int) -> None:
        """Send the head of an informational response."""
        self._check()
        self._h2.send_headers(self.id, [(b":status", b"%d" % status)])
        await self.server.peer.flush()

    async def trail(self, fields: Headers) -> None:
        """End this side, with trailers."""
        self._check()
        self.sent_end = True
        self._h2.send_headers(self.id, fields, end_stream=True)
        await self.server.peer.flush()

    async def reset(self, code: h2.errors.ErrorCodes) -> None:
        """Reset the stream."""
        self._check()
        self._h2.reset_stream(self.id, code)
        self.was_reset = self.sent_end = True
        await self.server.peer.flush()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send data as the windows allow."""
        rest = bytes(data)
        while rest:
            self._check()
            room = min(self._h2.local_flow_control_window(self.id), self._h2.max_outbound_frame_size)
            if room <= 0:
                await self.server.progress.wait()
                continue
            self._h2.send_data(self.id, rest[:room])
            rest = rest[room:]
            await self.server.peer.flush()

    def _check(self) -> None:
        if self.was_reset:
            raise trio.BrokenResourceError("the client has reset the stream")
        if self.sent_end:
            raise trio.ClosedResourceError("this side has ended")

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive data, which the client may send again then."""
        if not self._rest:
            try:
                self._rest, size = await self._inbox.receive()
            except trio.EndOfChannel:
                if self.was_reset:
                    raise trio.BrokenResourceError("the client has reset the stream") from None
                return b""
            if size and not self.was_reset:
                self._h2.acknowledge_received_data(size, self.id)
                await self.server.peer.flush()
        size = len(self._rest) if max_bytes is None else max_bytes
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    async def send_eof(self) -> None:
        """End this side."""
        self._check()
        self.sent_end = True
        self._h2.end_stream(self.id)
        await self.server.peer.flush()

    async def aclose(self) -> None:
        """End this side, if that is still to be done."""
        if not (self.was_reset or self.sent_end):
            await self.send_eof()


# -- What is done.


async def refused(world: World) -> None:
    with pytest.raises(ProxyError) as caught:
        await world.pool.request("GET", "https://refused.example/", extensions=world.extensions)
    assert caught.value.response is not None
    assert caught.value.response.content == b"first log in"


async def websocket(world: World) -> None:
    async with world.pool.stream(
        "GET",
        "ws://example.com/ws",
        headers={"Connection": "upgrade", "Upgrade": "websocket"},
        extensions=world.extensions,
    ) as response:
        stream = response.extensions["network_stream"]
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"


async def raw(world: World) -> None:
    stream = await world.pool.open_tcp_stream("example.com", 7, extensions=world.extensions)
    try:
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"
    finally:
        await stream.aclose()


# -- Where.


@contextlib.asynccontextmanager
async def beside_a_download(world: World) -> AsyncIterator[None]:
    """Through another tunnel of the same connection others receive, and must not notice."""
    begun, over, received = trio.Event(), trio.Event(), trio.Event()

    async def download() -> None:
        with contextlib.suppress(*world.tolerated):
            async with world.pool.stream("GET", "https://localhost/download") as response:
                data = b""
                async for chunk in response.aiter_stream():
                    data += chunk
                    begun.set()
                    if len(data) > len(DOWNLOAD) // 2:
                        await over.wait()
                    elif not over.is_set():
                        await trio.sleep(world.pause / 100)
            assert data == DOWNLOAD
        received.set()

    world.outside.start_soon(download)
    await begun.wait()
    yield
    over.set()
    if not world.tolerated:
        await received.wait()
        assert world.pool._managers[-1].opened == 1


@contextlib.asynccontextmanager
async def several_addresses(_: World) -> AsyncIterator[None]:
    """The first of them the proxy refuses."""
    trio.socket.set_custom_hostname_resolver(Resolver())
    yield


class Resolver(trio.abc.HostnameResolver):
    async def getaddrinfo(self, host: Any, port: Any, *_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ADDRESSES]

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


ADDRESSES = ["192.0.2.1", "192.0.2.2"]


def through(*proxies: Proxy, http2: bool = False) -> dict[str, Any]:
    return {"options": {"proxy": proxies, "http2": http2}, "origin": "https://example.com"}


def forwarded(proxy: Proxy) -> dict[str, Any]:
    return {"options": {"proxy": proxy}, "origin": "http://example.com"}


HTTP = Proxy("http://localhost:3128")
HTTPS = Proxy("https://localhost:3129", ssl_context=client_context(make_tls().ca))
MULTIPLEXING = Proxy("https://localhost:3130", ssl_context=client_context(make_tls().ca), http2=True)
SOCKS4A = Proxy("socks4a://localhost")
SOCKS5 = Proxy("socks5://localhost")
SOCKS5H = Proxy("socks5h://user:password@localhost")

SCENARIOS = {
    "forwarded get": Scenario(get, **forwarded(HTTP)),
    "forwarded upload": Scenario(upload, **forwarded(HTTP)),
    "forwarded, h2": Scenario(upload, **forwarded(MULTIPLEXING)),
    "connect": Scenario(get, **through(HTTP)),
    "connect, tls in tls": Scenario(upload, **through(HTTPS)),
    "refused": Scenario(refused, **through(HTTP)),
    "refused, h2": Scenario(refused, **through(MULTIPLEXING)),
    "h2 first": Scenario(get, others_behind, **through(MULTIPLEXING)),
    "h2 behind": Scenario(get, another_leads, **through(MULTIPLEXING)),
    "h2 second": Scenario(upload, beside_a_download, **through(MULTIPLEXING)),
    "socks5": Scenario(get, several_addresses, **through(SOCKS5)),
    "http to socks5": Scenario(get, **through(HTTP, SOCKS5H)),
    "https, h2 to http": Scenario(get, **through(MULTIPLEXING, HTTP)),
    "h2 inside": Scenario(full_duplex, **through(HTTP, http2=True)),
    "h2 inside h2": Scenario(full_duplex, **through(MULTIPLEXING, http2=True)),
    "websocket": Scenario(websocket, **forwarded(HTTP)),
    "raw": Scenario(raw, origin="https://example.com"),
    "raw, http": Scenario(raw, **through(HTTP)),
    "raw, h2": Scenario(raw, beside_a_download, **through(MULTIPLEXING)),
    "raw, socks5": Scenario(raw, **through(SOCKS5H)),
    "raw, https to socks4a": Scenario(raw, **through(HTTPS, SOCKS4A)),
}
OVER_SOCKETS = ("forwarded upload", "connect, tls in tls", "h2 second", "http to socks5")

# Where another task is what interrupts, it takes its turn, so that before and after are much the same.
MOMENTS = {
    Interruption.CANCEL: (False, True),
    Interruption.CLOSE: (False,),
    Interruption.LEAVE: (True,),
}

scenarios = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
interruptions = pytest.mark.parametrize("interruption", Interruption)


@scenarios
@interruptions
def test_interrupted_at_any_step(scenario: Scenario, interruption: Interruption) -> None:
    steps = sweep(scenario, network, make_tls().client, interruption, moments=MOMENTS[interruption])
    assert steps >= 4


@pytest.mark.parametrize("name", OVER_SOCKETS)
def test_cancelled_at_any_step_over_sockets(name: str) -> None:
    steps = sweep(SCENARIOS[name], network, make_tls().client, Interruption.CANCEL, sockets=True)
    assert steps >= 4


@scenarios
@pytest.mark.parametrize("interruption", [Interruption.CANCEL, Interruption.LEAVE])
def test_interrupted_at_any_step_with_handlers_that_wait(
    scenario: Scenario, interruption: Interruption
) -> None:
    extensions = {"trace": Handler()}
    steps = sweep(
        scenario,
        network,
        make_tls().client,
        interruption,
        extensions=extensions,
        moments=MOMENTS[interruption],
    )
    assert steps >= 6


@scenarios
def test_a_handler_that_raises_at_any_call(scenario: Scenario) -> None:
    for call in itertools.count(1):
        handler = Handler(failing=call)
        error = Run(scenario, network, make_tls().client, {"trace": handler}).uninterrupted()
        if len(handler.calls) < call:
            assert error is None
            break
        assert error is handler.error
    assert call > 2


def test_the_scenarios_are_what_they_are_said_to_be() -> None:
    """They could take another way than the one that is to be interrupted."""
    told: dict[str, list[object]] = {}
    for name, scenario in SCENARIOS.items():
        handler = Handler()
        assert Run(scenario, network, make_tls().client, {"trace": handler}).uninterrupted() is None
        told[name] = [str(call).removesuffix(".started") for call in handler.calls if "started" in str(call)]
    tcp, tls, proxy_tls = "connection.connect_tcp", "connection.start_tls", "proxy.start_tls"
    asked, socks = "proxy.connect", "socks.connect"
    ways = {
        name: [call for call in calls if call in (tcp, tls, proxy_tls, asked, socks)]
        for name, calls in told.items()
    }
    assert ways == {
        "forwarded get": [tcp],
        "forwarded upload": [tcp],
        "forwarded, h2": [tcp, proxy_tls],
        "connect": [tcp, asked, tls],
        "connect, tls in tls": [tcp, proxy_tls, asked, tls],
        "refused": [tcp, asked],
        "refused, h2": [tcp, proxy_tls, asked],
        "h2 first": [tcp, proxy_tls, asked, tls],
        "h2 behind": [asked, tls],
        "h2 second": [asked, tls],
        "socks5": [tcp, socks, tcp, socks, tls],
        "http to socks5": [tcp, asked, socks, tls],
        "https, h2 to http": [tcp, proxy_tls, asked, asked, tls],
        "h2 inside": [tcp, asked, tls],
        "h2 inside h2": [tcp, proxy_tls, asked, tls],
        "websocket": [tcp, asked],
        "raw": [tcp],
        "raw, http": [tcp, asked],
        "raw, h2": [asked],
        "raw, socks5": [tcp, socks],
        "raw, https to socks4a": [tcp, proxy_tls, asked, socks],
    }
    for name, calls in told.items():
        assert ("http2.send_request_headers" in calls) == (
            name in ("forwarded, h2", "h2 inside", "h2 inside h2")
        )
