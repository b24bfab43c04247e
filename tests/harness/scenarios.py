"""The scenarios of the cancellation sweeps: requests, what goes on beside them, and the peers of both."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from typing import Any

import h2.events
import pytest
import trio

from tests.harness.certificates import alpn_server, client_context, make_tls
from tests.harness.h2peer import PREFACE
from tests.harness.h2server import Multiplexer, ServerStream
from tests.harness.peers import begins_with
from tests.harness.resolver import set_resolver
from tests.harness.sweep import Scenario, World, forgiving
from trio_exchange import Proxy, ProxyError
from trio_exchange.testing import ScriptedPeer

PIECE = b"x" * 20_000
# More than a stream's window at first.
DOWNLOAD = bytes(range(256)) * 1600
ANSWER = b"0123456789"

REFUSED_ADDRESS, GOOD_ADDRESS = "192.0.2.1", "192.0.2.2"


# -- The network: every kind of proxy, and the origin.


@forgiving
async def network(peer: ScriptedPeer) -> None:
    """Be the server that the client takes this for, and the one at the far end of a tunnel after that."""
    await play(peer)


async def play(peer: ScriptedPeer) -> None:
    first = await begins_with(peer)
    match first[:1]:
        case b"":
            return
        case b"\x16":
            await peer.start_tls(alpn_server("h2", "http/1.1"))
            await play(peer)
        case b"\x05":
            if await accept_socks5(peer):
                await play(peer)
        case b"\x04":
            await peer.receive_some()
            await peer.send(b"\x00\x5a" + bytes(6))
            await play(peer)
        case b"h":
            await echo(peer)
        case _ if first[:3] == PREFACE[:3]:
            # A tunnel through HTTP/2 is a user's own, unless the client speaks TLS, as it does to proxies.
            kind = GenerousServer if isinstance(peer.stream, trio.SSLStream) else ServerOfUsersTunnels
            await kind(peer.stream, serve_stream).serve()
        case _:
            await serve_http1(peer)


class GenerousServer(Multiplexer):
    """It gives credit for all that arrives: a stream that is reset takes no part of the window with it."""

    def _take(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        if isinstance(event, h2.events.DataReceived) and event.data:
            assert event.stream_id is not None
            self.peer.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            self.streams[event.stream_id].take(event.data, 0)
        else:
            super()._take(event, nursery)


class ServerOfUsersTunnels(GenerousServer):
    """The end of the connection may be that of a tunnel, too: a pool that closes does not end one by one."""

    def _take(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            for stream in self.streams.values():
                stream.break_off()
        super()._take(event, nursery)


async def echo(peer: ScriptedPeer) -> None:
    while data := await peer.receive_some():
        await peer.send(data)


async def accept_socks5(peer: ScriptedPeer) -> bool:
    greeting = await peer.receive_some()
    if 2 in greeting[2:]:
        await peer.send(b"\x05\x02")
        assert await peer.receive_some() in (b"\x01\x04user\x08password", b"")
        await peer.send(b"\x01\x00")
    else:
        await peer.send(b"\x05\x00")
    request = await peer.receive_some()
    refused = request[4:8] == socket.inet_aton(REFUSED_ADDRESS)
    await peer.send(bytes((5, 5 if refused else 0, 0, 1)) + bytes(6))
    return not refused


async def serve_http1(peer: ScriptedPeer) -> None:
    """Answer requests; the target says how."""
    for served in itertools.count():
        head = await peer.receive_head()
        match head.method, head.target.removeprefix(b"http://example.com"):
            case b"CONNECT", b"refused.example:443":
                await peer.send_response(407, body=b"first log in")
            case b"CONNECT", _:
                await peer.send_response(200, [(b"Content-Length", b"0")])
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
            case _, b"/informed":
                await peer.send_response(102)
                await peer.send_response(100)
                await peer.receive_body()
                await peer.send_response(103, [(b"Link", b"</a>")])
                await peer.send_response()
            case _, b"/endless":
                await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
            case _, b"/dies" if served:
                return
            case _:
                await peer.receive_body()
                await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
                await trio.lowlevel.checkpoint()
                await peer.send(ANSWER)


async def serve_stream(stream: ServerStream) -> None:
    """The same in HTTP/2."""
    if stream.headers[b":method"] == b"CONNECT":
        if stream.headers[b":authority"] == b"refused.example:443":
            await stream.respond(407)
            await stream.send_all(b"first log in")
        else:
            await stream.respond(200)
            await play(ScriptedPeer(stream))
        return
    target = stream.headers[b":path"]
    others = [other for other in stream.server.streams.values() if other is not stream]
    if target == b"/after":
        assert all(other.was_reset or other.sent_end for other in others), "a stream was left open"
    if target in (b"/endless", b"/echo"):
        await stream.respond(200)
    if target == b"/endless":
        await stream.send_all(b"first")
        await trio.sleep_forever()
    if target == b"/informed":
        await stream.inform(102)
        await stream.inform(100)
    size = 0
    while data := await stream.receive_some():
        size += len(data)
        if target == b"/echo":
            await stream.send_all(data)
    if target == b"/echo":
        return
    if target == b"/informed":
        await stream.inform(103)
    await stream.respond(200)
    # The head travels alone, so that there is a step between it and what follows.
    for _ in range(5):
        await trio.lowlevel.checkpoint()
    answers = {b"/download": DOWNLOAD, b"/count": b"%d" % size}
    await stream.send_all(answers.get(target, ANSWER))


# -- The requests to be interrupted.


class Body:
    """A body in pieces, each of which takes a checkpoint to come."""

    def __init__(self, pieces: int = 3) -> None:
        self.pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.pieces:
            raise StopAsyncIteration
        self.pieces -= 1
        return PIECE


async def get(world: World, path: str = "/") -> None:
    response = await world.pool.request("GET", f"{world.origin}{path}", extensions=world.extensions)
    assert response.content == ANSWER


async def dies(world: World) -> None:
    await get(world, "/dies")


async def upload(world: World) -> None:
    response = await world.pool.request(
        "POST", f"{world.origin}/", content=Body(), extensions=world.extensions
    )
    assert response.content == ANSWER


async def full_duplex(world: World) -> None:
    async with world.pool.stream(
        "POST", f"{world.origin}/echo", content=Body(), extensions=world.extensions
    ) as response:
        received = 0
        async for chunk in response.aiter_stream():
            received += len(chunk)
        assert received == 3 * len(PIECE)


async def half_read(world: World) -> None:
    async with world.pool.stream("GET", f"{world.origin}/endless", extensions=world.extensions) as response:
        async for chunk in response.aiter_stream():
            assert chunk == b"first"
            break


async def expect_continue(world: World) -> None:
    headers = {"Expect": "100-continue"}
    response = await world.pool.request(
        "POST", f"{world.origin}/informed", headers=headers, content=Body(), extensions=world.extensions
    )
    assert response.status == 200


async def connect(world: World, *, tls: bool = False) -> None:
    extensions = {**world.extensions, "target": b"example.com:443"}
    async with world.pool.stream("CONNECT", world.origin, extensions=extensions) as response:
        stream = response.extensions["network_stream"]
        if tls:
            stream = await stream.start_tls(make_tls().client, "example.com")
        await stream.write(b"hello")
        assert await stream.read(100) == b"hello"
        if tls:
            await stream.aclose()


async def connect_tls(world: World) -> None:
    await connect(world, tls=True)


async def refused(world: World) -> None:
    with pytest.raises(ProxyError) as caught:
        await world.pool.request("GET", "https://refused.example/", extensions=world.extensions)
    assert caught.value.response is not None
    assert caught.value.response.content == b"first log in"


async def websocket(world: World) -> None:
    headers = {"Connection": "upgrade", "Upgrade": "websocket"}
    async with world.pool.stream(
        "GET", "ws://example.com/ws", headers=headers, extensions=world.extensions
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


# -- What the pool is like meanwhile.


async def get_beside(world: World, path: str, served: trio.Event) -> None:
    """A request of others."""
    with contextlib.suppress(*world.tolerated):
        response = await world.pool.request("GET", f"{world.origin}/{path}")
        assert response.status == 200
    served.set()


@contextlib.asynccontextmanager
async def others_behind(world: World) -> AsyncIterator[None]:
    """The request leads, and others wait for what becomes of its connection."""

    async def follow(done: trio.Event) -> None:
        await trio.lowlevel.checkpoint()
        await get_beside(world, "follower", done)

    served = [trio.Event(), trio.Event()]
    for done in served:
        world.outside.start_soon(follow, done)
    yield
    if not world.tolerated:
        for done in served:
            await done.wait()


@contextlib.asynccontextmanager
async def another_leads(world: World) -> AsyncIterator[None]:
    """The request waits for what becomes of the connection that another one dials."""
    served = trio.Event()
    world.outside.start_soon(get_beside, world, "leader", served)
    while not (world.pool.statistics().connecting or world.pool.connections):
        await trio.lowlevel.checkpoint()
    yield
    if not world.tolerated:
        await served.wait()


@contextlib.asynccontextmanager
async def a_full_pool(world: World) -> AsyncIterator[None]:
    """Others use its only connection for a while, and others wait behind."""
    served = trio.Event()

    async def occupy(response: Any) -> None:
        await trio.sleep(world.pause)
        with contextlib.suppress(*world.tolerated):
            await response.aread()
        await response.aclose()

    async def wait_behind() -> None:
        await trio.sleep(world.pause / 2)
        await get_beside(world, "bystander", served)

    context = world.pool.stream("GET", f"{world.origin}/")
    world.outside.start_soon(occupy, await context.__aenter__())
    world.outside.start_soon(wait_behind)
    yield
    await served.wait()


@contextlib.asynccontextmanager
async def another_origin_idle(world: World) -> AsyncIterator[None]:
    await world.pool.request("GET", "http://another.example/")
    yield


@contextlib.asynccontextmanager
async def an_idle_connection(world: World) -> AsyncIterator[None]:
    await world.pool.request("GET", f"{world.origin}/")
    yield


class Transfer:
    """A request that goes on beside the scenario's, until that is over, and must not notice it."""

    def __init__(self, world: World) -> None:
        self.begun, self.over, self.done = trio.Event(), trio.Event(), trio.Event()
        self._world = world
        self._sent = 0

    async def pause(self) -> None:
        await trio.sleep(self._world.pause / 100)

    async def download(self, origin: str) -> None:
        """Receive half of it, and the rest when it is over."""
        with contextlib.suppress(*self._world.tolerated):
            async with self._world.pool.stream("GET", f"{origin}/download") as response:
                data = b""
                async for chunk in response.aiter_stream():
                    data += chunk
                    self.begun.set()
                    if len(data) > len(DOWNLOAD) // 2:
                        await self.over.wait()
                    elif not self.over.is_set():
                        await self.pause()
            assert data == DOWNLOAD
        self.done.set()

    async def upload(self, origin: str) -> None:
        """Send until it is over."""
        with contextlib.suppress(*self._world.tolerated):
            response = await self._world.pool.request("POST", f"{origin}/count", content=self)
            assert response.content == b"%d" % self._sent
        self.done.set()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await self.pause()
        if self.over.is_set():
            raise StopAsyncIteration
        self.begun.set()
        self._sent += 1000
        return PIECE[:1000]

    async def end(self) -> None:
        self.over.set()
        if not self._world.tolerated:
            await self.done.wait()


@contextlib.asynccontextmanager
async def other_streams(world: World) -> AsyncIterator[None]:
    """On the same connection others receive and send."""
    download, upload = Transfer(world), Transfer(world)
    world.outside.start_soon(download.download, world.origin)
    world.outside.start_soon(upload.upload, world.origin)
    await download.begun.wait()
    await upload.begun.wait()
    assert len(world.pool.connections) == 1
    yield
    upload.over.set()
    await download.end()
    await upload.end()
    if not world.tolerated:
        # The connection on which they were is whole.
        assert world.pool.statistics().connections_opened == 1


@contextlib.asynccontextmanager
async def beside_a_download(world: World) -> AsyncIterator[None]:
    """Through another tunnel of the same connection others receive."""
    download = Transfer(world)
    world.outside.start_soon(download.download, "https://localhost")
    await download.begun.wait()
    yield
    await download.end()
    if not world.tolerated:
        assert world.pool._managers[-1].opened == 1


@contextlib.asynccontextmanager
async def several_addresses(_: World) -> AsyncIterator[None]:
    """The first of them the proxy refuses."""
    set_resolver(REFUSED_ADDRESS, GOOD_ADDRESS)
    yield


# -- The table.

# What a scenario's way is made of: trace events, without their ends, and the statuses of interim responses.
DIAL, TLS, RETRY = "connection.connect_tcp", "connection.start_tls", "connection.retry"
PROXY_TLS, CONNECT = "proxy.start_tls", "proxy.connect"
LOOK_UP, SOCKS = "socks.getaddrinfo", "socks.connect"
HTTP1, HTTP2, INIT = "http11.send_request_headers", "http2.send_request_headers", "http2.send_connection_init"
MARKS = (DIAL, TLS, RETRY, PROXY_TLS, CONNECT, LOOK_UP, SOCKS, HTTP1, HTTP2, INIT)


def only_one(**more: Any) -> dict[str, Any]:
    return {"options": {"max_connections": 1, **more}}


PRIOR: dict[str, Any] = {"options": {"http2": True, "http1": False}}
ALPN: dict[str, Any] = {"options": {"http2": True}, "origin": "https://example.com"}

DIRECT = {
    "get": Scenario(get, way=(DIAL, HTTP1)),
    "get reused": Scenario(get, an_idle_connection, way=(HTTP1,)),
    "upload": Scenario(upload, way=(DIAL, HTTP1)),
    "full duplex": Scenario(full_duplex, way=(DIAL, HTTP1)),
    "tls": Scenario(get, origin="https://example.com", way=(DIAL, TLS, HTTP1)),
    "retries": Scenario(
        get,
        failures=[OSError, OSError],
        options={"retries": 3},
        way=(DIAL, RETRY, DIAL, RETRY, DIAL, HTTP1),
    ),
    "waiting": Scenario(get, a_full_pool, **only_one(), way=(HTTP1,)),
    "eviction": Scenario(get, another_origin_idle, **only_one(), way=(DIAL, HTTP1)),
    "half read": Scenario(half_read, way=(DIAL, HTTP1)),
    "connect": Scenario(connect, way=(DIAL, HTTP1)),
    "connect and start_tls": Scenario(connect_tls, way=(DIAL, HTTP1)),
    "expect": Scenario(expect_continue, way=(DIAL, HTTP1, 102, 100, 103)),
    "silent retry": Scenario(dies, an_idle_connection, **only_one(), way=(HTTP1, RETRY, DIAL, HTTP1)),
    "h2 first": Scenario(get, others_behind, **PRIOR, way=(DIAL, INIT, HTTP2)),
    "h2 first, tls": Scenario(get, others_behind, **ALPN, way=(DIAL, TLS, INIT, HTTP2)),
    "h2 first upload": Scenario(upload, others_behind, **PRIOR, way=(DIAL, INIT, HTTP2)),
    "h2 alone": Scenario(full_duplex, **PRIOR, way=(DIAL, INIT, HTTP2)),
    "h2 get": Scenario(get, other_streams, **PRIOR, way=(HTTP2,)),
    "h2 get, tls": Scenario(get, other_streams, **ALPN, way=(HTTP2,)),
    "h2 upload": Scenario(upload, other_streams, **PRIOR, way=(HTTP2,)),
    "h2 upload, tls": Scenario(upload, other_streams, **ALPN, way=(HTTP2,)),
    "h2 full duplex": Scenario(full_duplex, other_streams, **PRIOR, way=(HTTP2,)),
    "h2 full duplex, tls": Scenario(full_duplex, other_streams, **ALPN, way=(HTTP2,)),
    "h2 half read": Scenario(half_read, other_streams, **PRIOR, way=(HTTP2,)),
    "h2 expect": Scenario(expect_continue, other_streams, **PRIOR, way=(HTTP2, 102, 100, 103)),
    "h2 connect": Scenario(connect, other_streams, **PRIOR, way=(HTTP2,)),
    "h2 behind": Scenario(get, another_leads, **PRIOR, way=(HTTP2,)),
    "h2 behind, tls": Scenario(get, another_leads, **ALPN, way=(HTTP2,)),
}


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

PROXIED = {
    "forwarded get": Scenario(get, **forwarded(HTTP), way=(DIAL, HTTP1)),
    "forwarded upload": Scenario(upload, **forwarded(HTTP), way=(DIAL, HTTP1)),
    "forwarded by h2": Scenario(upload, **forwarded(MULTIPLEXING), way=(DIAL, PROXY_TLS, INIT, HTTP2)),
    "tunnel": Scenario(get, **through(HTTP), way=(DIAL, CONNECT, TLS, HTTP1)),
    "tls in tls": Scenario(upload, **through(HTTPS), way=(DIAL, PROXY_TLS, CONNECT, TLS, HTTP1)),
    "refused tunnel": Scenario(refused, **through(HTTP), way=(DIAL, CONNECT)),
    "refused h2 tunnel": Scenario(refused, **through(MULTIPLEXING), way=(DIAL, PROXY_TLS, CONNECT)),
    "h2 tunnel first": Scenario(
        get, others_behind, **through(MULTIPLEXING), way=(DIAL, PROXY_TLS, CONNECT, TLS, HTTP1)
    ),
    "h2 tunnel behind": Scenario(get, another_leads, **through(MULTIPLEXING), way=(CONNECT, TLS, HTTP1)),
    "h2 tunnel second": Scenario(
        upload, beside_a_download, **through(MULTIPLEXING), way=(CONNECT, TLS, HTTP1)
    ),
    "socks5": Scenario(
        get, several_addresses, **through(SOCKS5), way=(LOOK_UP, DIAL, SOCKS, DIAL, SOCKS, TLS, HTTP1)
    ),
    "http to socks5": Scenario(get, **through(HTTP, SOCKS5H), way=(DIAL, CONNECT, SOCKS, TLS, HTTP1)),
    "h2 to http": Scenario(
        get, **through(MULTIPLEXING, HTTP), way=(DIAL, PROXY_TLS, CONNECT, CONNECT, TLS, HTTP1)
    ),
    "h2 in a tunnel": Scenario(
        full_duplex, **through(HTTP, http2=True), way=(DIAL, CONNECT, TLS, INIT, HTTP2)
    ),
    "h2 in an h2 tunnel": Scenario(
        full_duplex, **through(MULTIPLEXING, http2=True), way=(DIAL, PROXY_TLS, CONNECT, TLS, INIT, HTTP2)
    ),
    "websocket": Scenario(websocket, **forwarded(HTTP), way=(DIAL, CONNECT, HTTP1)),
    "raw": Scenario(raw, origin="https://example.com", way=(DIAL,)),
    "raw, http": Scenario(raw, **through(HTTP), way=(DIAL, CONNECT)),
    "raw, h2": Scenario(raw, beside_a_download, **through(MULTIPLEXING), way=(CONNECT,)),
    "raw, socks5": Scenario(raw, **through(SOCKS5H), way=(DIAL, SOCKS)),
    "raw, https to socks4a": Scenario(raw, **through(HTTPS, SOCKS4A), way=(DIAL, PROXY_TLS, CONNECT, SOCKS)),
}

SCENARIOS = DIRECT | PROXIED
# Those whose layers sockets could make a difference to.
OVER_SOCKETS = (*DIRECT, "forwarded upload", "tls in tls", "h2 tunnel second", "http to socks5")


class Handler:
    """A trace handler, or informational callback, that waits; the call with a given number it fails."""

    def __init__(self, failing: int = 0) -> None:
        self.failing = failing
        self.error = LookupError("the handler's own")
        self.calls: list[object] = []

    async def __call__(self, *args: object) -> None:
        self.calls.append(args[0])
        await trio.lowlevel.checkpoint()
        if len(self.calls) == self.failing:
            raise self.error
