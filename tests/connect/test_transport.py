"""Streams on streams: what a connection knows of what runs below it, and raw streams through proxies."""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h2.events
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.certificates import client_context, make_tls
from tests.harness.checks import assert_unharmed, internals, open_sockets
from tests.harness.h2peer import H2Peer
from tests.harness.peers import respond
from tests.harness.servers import serve_tcp
from tests.harness.streams import Wrapped
from tests.harness.traces import Events
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    Connector,
    ConnectTimeout,
    LocalProtocolError,
    NetworkStream,
    PoolTimeout,
    Proxy,
    ProxyError,
    ReadError,
    ReadTimeout,
    WriteError,
)
from trio_exchange._connect.network_stream import transport_over
from trio_exchange._connect.tls import TLSSettings, start_tls
from trio_exchange._connect.transport import Pollable, Readiness, Transport, WouldBlock, poll
from trio_exchange.testing import MemoryConnector, ScriptedPeer

QUIET, READABLE, CLOSED = Readiness.QUIET, Readiness.READABLE, Readiness.CLOSED


def socket_streams() -> tuple[trio.SocketStream, trio.SocketStream]:
    one, other = trio.socket.socketpair()
    return trio.SocketStream(one), trio.SocketStream(other)


# -- The server's side.


class TLSServer(trio.abc.Stream):
    """The server's side of TLS, whose records leave when the test says so."""

    def __init__(self, stream: trio.abc.Stream, context: ssl.SSLContext | None = None) -> None:
        self.stream = stream
        # The beginning of what is to be sent next.
        self.kept = b""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = (context or server_context()).wrap_bio(self._incoming, self._outgoing, server_side=True)

    async def handshake(self) -> None:
        """Do the handshake, and keep back the session tickets that follow it."""
        await self._do(self.ssl.do_handshake)

    async def _do(self, function: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                return function(*args)
            except ssl.SSLWantReadError:
                await self.flush()
                self._incoming.write(received := await self.stream.receive_some(65536))
                if not received:
                    raise trio.BrokenResourceError("the client has gone") from None

    def take(self) -> bytes:
        """The records that were not sent yet."""
        kept, self.kept = self.kept, b""
        return kept + self._outgoing.read()

    async def flush(self) -> None:
        if records := self.take():
            await self.stream.send_all(records)

    async def read_once(self) -> bytes:
        """Receive something, and take note of it."""
        self._incoming.write(await self.stream.receive_some(65536))
        return bytes(self.ssl.read(65536))

    def say_goodbye(self) -> None:
        """Make a close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.ssl.unwrap()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.ssl.write(data)
        await self.flush()

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            return bytes(await self._do(self.ssl.read, max_bytes or 65536))
        except (ssl.SSLZeroReturnError, trio.BrokenResourceError):
            return b""

    async def aclose(self) -> None:
        await self.stream.aclose()


class TunnelServer(trio.abc.Stream):
    """The server's side of a tunnel through HTTP/2."""

    def __init__(self, peer: H2Peer, stream_id: int) -> None:
        self.peer = peer
        self.stream_id = stream_id

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.peer.h2.send_data(self.stream_id, bytes(data))
        await self.peer.flush()

    async def send_eof(self) -> None:
        self.peer.h2.end_stream(self.stream_id)
        await self.peer.flush()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        kinds = h2.events.DataReceived, h2.events.StreamEnded, h2.events.StreamReset
        event: h2.events.Event | None = None
        with contextlib.suppress(EOFError):
            while not isinstance(event, kinds):
                event = await self.peer.event(h2.events.Event, self.stream_id)
        if not isinstance(event, h2.events.DataReceived):
            return b""
        if event.flow_controlled_length:
            self.peer.h2.acknowledge_received_data(event.flow_controlled_length, self.stream_id)
            await self.peer.flush()
        return event.data or b""

    async def aclose(self) -> None:
        await self.peer.stream.aclose()


@dataclass
class Far:
    """The far end of a connection: the streams that the server sees, the last of which HTTP speaks on."""

    streams: list[Any]

    @property
    def top(self) -> Any:
        return self.streams[-1]


@functools.cache
def server_context(*alpn: str) -> ssl.SSLContext:
    """For a server that may ask for a certificate later."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    make_tls().ca.issue_cert("localhost", "example.com").configure_cert(context)
    make_tls().ca.configure_trust(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.post_handshake_auth = True
    context.set_alpn_protocols(alpn)
    return context


async def accept_tunnel(stream: trio.abc.Stream) -> None:
    peer = ScriptedPeer(stream)
    request = await peer.receive_request()
    assert request.method == b"CONNECT"
    await peer.send(b"HTTP/1.1 200 Connected\r\n\r\n")


async def accept_socks(stream: trio.abc.Stream) -> None:
    assert await stream.receive_some(3) == b"\5\1\0"
    await stream.send_all(b"\5\0")
    assert (await stream.receive_some())[:4] == b"\5\1\0\3"
    await stream.send_all(b"\5\0\0\1" + bytes(6))


@dataclass(frozen=True)
class Kind:
    """A way to an origin.

    Attributes:
        proxies: Their URLs; `h2:` stands for an `https` proxy that speaks HTTP/2.
        tls: Whether TLS is spoken with the origin.
    """

    proxies: tuple[str, ...]
    tls: bool

    @property
    def proxy(self) -> list[Proxy]:
        return [
            Proxy(f"https://localhost:{443 + number}", ssl_context=a_client(), http2=True)
            if scheme == "h2"
            else Proxy(f"{scheme}://localhost:{443 + number}", ssl_context=a_client())
            for number, scheme in enumerate(self.proxies)
        ]

    @property
    def url(self) -> str:
        # What is not encrypted is not forwarded if it is a CONNECT.
        return "https://example.com/" if self.tls else "ws://example.com/"

    async def accept(self, stream: trio.abc.Stream) -> Far:
        """Play the proxies, and the origin's handshake."""
        far = Far([stream])
        for scheme in self.proxies:
            if scheme in ("https", "h2"):
                far.streams.append(TLSServer(far.top, server_context("h2") if scheme == "h2" else None))
                await far.top.handshake()
            if scheme == "h2":
                peer = H2Peer(far.top)
                await peer.start()
                stream_id, _ = await peer.head()
                await peer.respond(stream_id, end=False)
                far.streams.append(TunnelServer(peer, stream_id))
            elif scheme == "socks5h":
                await accept_socks(far.top)
            else:
                await accept_tunnel(far.top)
        if self.tls:
            far.streams.append(TLSServer(far.top))
            await far.top.handshake()
        return far


def a_client() -> ssl.SSLContext:
    context = client_context(make_tls().ca)
    context.post_handshake_auth = True
    return context


KINDS = {
    "direct": Kind((), False),
    "TLS": Kind((), True),
    "through http": Kind(("http",), False),
    "through socks": Kind(("socks5h",), False),
    "TLS through http": Kind(("http",), True),
    "through TLS": Kind(("https",), False),
    "TLS in TLS": Kind(("https",), True),
    "TLS in TLS in TLS": Kind(("https", "https"), True),
    "TLS through socks in TLS": Kind(("https", "socks5h"), True),
    "through HTTP/2": Kind(("h2",), False),
    "TLS through HTTP/2": Kind(("h2",), True),
    "TLS through HTTP/2 in TLS": Kind(("https", "h2"), True),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
every_proxy = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if not kind.tls], ids=[n for n, k in KINDS.items() if not k.tls]
)
every_tls = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.tls], ids=[n for n, k in KINDS.items() if k.tls]
)


class Network(MemoryConnector):
    """Connections over pairs of sockets, whose far ends the test gets."""

    def __init__(
        self, nursery: trio.Nursery, kind: Kind, then: Callable[[Far], Awaitable[object]] | None = None
    ) -> None:
        super().__init__(nursery, self._script, stream_pair=socket_streams)
        self._kind = kind
        self._then = then
        self._accepted, self._ends = trio.open_memory_channel[Far](100)

    async def _script(self, peer: ScriptedPeer) -> None:
        far = await self._kind.accept(peer.stream)
        await self._accepted.send(far)
        if self._then is None:
            await trio.sleep_forever()
        else:
            await self._then(far)

    async def far(self) -> Far:
        """The far end of the next connection."""
        return await self._ends.receive()


def pool_through(kind: Kind, connector: MemoryConnector, **options: Any) -> ConnectionPool:
    return ConnectionPool(a_client(), proxy=kind.proxy, connector=connector, **options)


async def answer(far: Far) -> None:
    """Answer requests on top of it all."""
    await respond(ScriptedPeer(far.top))


# -- An idle connection.


async def usable(pool: ConnectionPool) -> bool:
    """What the pool finds before it uses the idle connection again."""
    (connection,) = pool.connections
    found: Any = connection
    readiness = found.readiness()
    return readiness is QUIET or (readiness is READABLE and await found.still_open())


def ask_for_certificate(stream: TLSServer) -> None:
    """Make a record without data (RFC 8446, 4.6.2), to which a client answers."""
    stream.ssl.verify_client_post_handshake()
    stream.ssl.do_handshake()


async def late_request(pool: ConnectionPool, far: Far) -> None:
    ask_for_certificate(far.top)
    await far.top.flush()


async def late_tickets(pool: ConnectionPool, far: Far) -> None:
    """Session tickets (RFC 8446, 4.6.1), which the server sends after having seen the certificate."""
    await keep_tickets(pool, far)
    await far.top.flush()


async def keep_tickets(pool: ConnectionPool, far: Far) -> None:
    await late_request(pool, far)
    assert await usable(pool)
    with pytest.raises(ssl.SSLWantReadError):
        await far.top.read_once()


async def half_a_record(pool: ConnectionPool, far: Far) -> None:
    await keep_tickets(pool, far)
    records = far.top.take()
    assert len(records) > 200
    await far.top.stream.send_all(records[:150])
    far.top.kept = records[150:]


async def outer_record(pool: ConnectionPool, far: Far) -> None:
    ask_for_certificate(far.streams[1])
    await far.streams[1].flush()


async def nothing(pool: ConnectionPool, far: Far) -> None:
    pass


async def data(pool: ConnectionPool, far: Far) -> None:
    await far.top.send_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n")


async def goodbye(pool: ConnectionPool, far: Far) -> None:
    far.top.say_goodbye()
    await far.top.flush()


async def outer_goodbye(pool: ConnectionPool, far: Far) -> None:
    far.streams[1].say_goodbye()
    await far.streams[1].flush()


async def end(pool: ConnectionPool, far: Far) -> None:
    await far.streams[0].send_eof()


async def cut(pool: ConnectionPool, far: Far) -> None:
    await far.streams[0].aclose()


async def end_of_tunnel(pool: ConnectionPool, far: Far) -> None:
    await next(stream for stream in far.streams if isinstance(stream, TunnelServer)).send_eof()


Action = Callable[[ConnectionPool, Far], Awaitable[None]]


def cases(*actions: Action) -> pytest.MarkDecorator:
    """All kinds of ways on which these can be done."""
    found = []
    for name, kind in KINDS.items():
        for action in actions:
            if action in (late_request, late_tickets, half_a_record, goodbye) and not kind.tls:
                continue
            if action in (outer_record, outer_goodbye) and kind.proxies[:1] not in (("https",), ("h2",)):
                continue
            if action is end_of_tunnel and "h2" not in kind.proxies:
                continue
            found.append(pytest.param(kind, action, id=f"{name}-{action.__name__}"))
    return pytest.mark.parametrize(("kind", "action"), found)


async def one_request(far: Far) -> None:
    await ScriptedPeer(far.top).receive_request()
    await far.top.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@contextlib.asynccontextmanager
async def idle_connection(kind: Kind) -> AsyncIterator[tuple[ConnectionPool, Network, Far]]:
    """A pool with a connection that has carried a request, and its far end."""
    ends: list[Far] = []

    async def first() -> None:
        ends.append(await connector.far())
        await one_request(ends[0])

    async with trio.open_nursery() as nursery:
        connector = Network(nursery, kind)
        async with pool_through(kind, connector) as pool:
            nursery.start_soon(first)
            assert (await pool.request("GET", kind.url)).status == 200
            await trio.testing.wait_all_tasks_blocked()
            assert_unharmed(pool, idle=1)
            yield pool, connector, ends[0]
        nursery.cancel_scope.cancel()


@cases(nothing, late_request, late_tickets, half_a_record, outer_record)
async def test_what_is_harmless_to_an_idle_connection(kind: Kind, action: Action) -> None:
    async with idle_connection(kind) as (pool, connector, far):
        await action(pool, far)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            assert await usable(pool)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_request, far)
            assert (await pool.request("GET", kind.url)).status == 200
        assert pool.connections[0].requests == 2
        assert len(connector.peers) == 1
        assert_unharmed(pool, idle=1)


@cases(data, goodbye, outer_goodbye, end, cut, end_of_tunnel)
async def test_what_ends_an_idle_connection(kind: Kind, action: Action) -> None:
    async with idle_connection(kind) as (pool, connector, far):
        await action(pool, far)
        await trio.testing.wait_all_tasks_blocked()
        if "h2" in kind.proxies:
            # A new tunnel may be on the same connection to the proxy, so that there is no other far end.
            assert not await usable(pool)
            return

        async def second() -> None:
            await one_request(await connector.far())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(second)
            assert (await pool.request("GET", kind.url)).status == 200
        assert len(connector.peers) == 2
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool, idle=1)


# -- A send that fails.


class Cuttable(Wrapped):
    """A stream whose sending a test lets fail."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self.is_cut = False
        self.has_failed = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_cut:
            self.has_failed.set()
            raise trio.BrokenResourceError("the cable was cut")
        await self.stream.send_all(data)


# With a connection to an HTTP/2 proxy that can't be sent on, all its tunnels fail.
@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if "h2" not in kind.proxies])
async def test_an_answer_that_comes_after_a_send_has_failed(nursery: trio.Nursery, kind: Kind) -> None:
    cuttable: list[Cuttable] = []

    def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = trio.testing.memory_stream_pair()
        cuttable.append(Cuttable(client))
        return cuttable[0], server

    async def content() -> AsyncIterator[bytes]:
        yield b"first"
        cuttable[0].is_cut = True
        yield b"second"

    async def script(peer: ScriptedPeer) -> None:
        far = await kind.accept(peer.stream)
        await ScriptedPeer(far.top).receive_head()
        await cuttable[0].has_failed.wait()
        await far.top.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nabc")
        await trio.sleep_forever()

    connector = MemoryConnector(nursery, script, stream_pair=pair)
    async with pool_through(kind, connector) as pool:
        response = await pool.request("POST", kind.url, content=content())
        assert (response.status, response.content) == (413, b"abc")
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
    nursery.cancel_scope.cancel()


# -- Transports in layers, without a pool.


async def encrypt(transport: Transport, far: trio.abc.Stream) -> tuple[trio.SSLStream[Transport], TLSServer]:
    """TLS on a transport, and its far end, which keeps back its session tickets."""
    server = TLSServer(far)
    tls: list[trio.SSLStream[Transport]] = []

    async def client() -> None:
        tls.append(await start_tls(transport, TLSSettings(a_client(), "example.com", ("x",), "example.com")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client)
        await server.handshake()
    return tls[0], server


@contextlib.asynccontextmanager
async def tls_layers(depth: int) -> AsyncIterator[tuple[list[Transport], list[trio.abc.Stream], list[Any]]]:
    """Transports with TLS between, the bottom first; the streams on them; and their far ends."""
    client, server = socket_streams()
    transports, streams, far = [transport_over(client)], list[trio.abc.Stream](), list[Any]([server])
    for _ in range(depth):
        tls, server_tls = await encrypt(transports[-1], far[-1])
        streams.append(tls)
        far.append(server_tls)
        await server_tls.flush()
        transports.append(transport_over(NetworkStream(tls)))
    try:
        yield transports, streams, far
    finally:
        await trio.aclose_forcefully(transports[-1])
        await trio.aclose_forcefully(server)


async def probe(transport: Transport) -> bytes:
    """Receive without waiting."""
    transport.probing = 16
    try:
        return await transport.receive_some()
    finally:
        transport.probing = 0


@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_probing_through_tls(depth: int) -> None:
    async with tls_layers(depth) as (transports, _, far):
        top = transports[-1]
        # The tickets are there.
        assert top.peek() is READABLE
        with pytest.raises(WouldBlock):
            await probe(top)
        assert top.peek() is QUIET
        with pytest.raises(WouldBlock):
            await probe(top)
        await far[-1].send_all(b"abc")
        assert top.peek() is READABLE
        assert await probe(top) == b"abc"
        assert [transport.probing for transport in transports] == [0] * (depth + 1)
        assert top.peek() is QUIET
        await top.send_all(b"def")
        assert await far[-1].receive_some() == b"def"


@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_half_a_record_is_no_data_until_the_rest_is_there(depth: int) -> None:
    async with tls_layers(depth) as (transports, _, far):
        top = transports[-1]
        far[-1].ssl.write(b"x" * 1000)
        records = far[-1].take()
        for byte in (records[:3], records[3:500], records[500:-1]):
            await far[-1].stream.send_all(byte)
            assert top.peek() is READABLE
            for _ in range(2):
                with pytest.raises(WouldBlock):
                    await probe(top)
        await far[-1].stream.send_all(records[-1:])
        assert await probe(top) == b"x" * 1000
        # Nor does it harm who waits.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(far[-1].send_all, b"abc")
            assert await top.receive_some() == b"abc"


async def test_half_a_record_of_the_outer_tls() -> None:
    async with tls_layers(2) as (transports, _, far):
        far[2].ssl.write(b"x" * 1000)
        far[1].ssl.write(far[2].take())
        records = far[1].take()
        await far[0].send_all(records[:600])
        with pytest.raises(WouldBlock):
            await probe(transports[-1])
        await far[0].send_all(records[600:])
        assert await probe(transports[-1]) == b"x" * 1000


@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_records_that_have_been_received_but_not_decrypted(depth: int) -> None:
    async with tls_layers(depth) as (transports, _, far):
        for data in (b"abc", b"def"):
            far[-1].ssl.write(data)
        await far[-1].flush()
        top = transports[-1]
        # Both come along with the tickets.
        assert await top.receive_some() == b"abc"
        assert top.peek() is READABLE
        assert await probe(top) == b"def"
        assert top.peek() is QUIET


@pytest.mark.parametrize(
    ("depth", "layer"), [(depth, layer) for depth in (1, 2, 3) for layer in range(depth + 1)]
)
async def test_probing_finds_the_end(depth: int, layer: int) -> None:
    async with tls_layers(depth) as (transports, _, far):
        top = transports[-1]
        with pytest.raises(WouldBlock):
            await probe(top)
        if layer:
            far[layer].say_goodbye()
            await far[layer].flush()
            assert top.peek() is READABLE
        else:
            await far[0].send_eof()
            assert top.peek() is CLOSED
        assert await probe(top) == b""


@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_probing_through_tls_is_not_done_for_ever(depth: int) -> None:
    async with tls_layers(depth) as (transports, _, far):
        top = transports[-1]
        with pytest.raises(WouldBlock):
            await probe(top)
        top.probing = 8
        # A layer is given what is left to the one above it, which has counted already.
        for _ in range(7 - depth):
            await far[-1].send_all(b"x")
            assert await top.receive_some() == b"x"
        await far[-1].send_all(b"x")
        with pytest.raises(trio.BrokenResourceError, match="nobody asked for"):
            await top.receive_some()
        assert [transport.probing for transport in transports[:-1]] == [0] * depth


class Chatty(Pollable):
    """A stream that always has something to say."""

    def __init__(self, readiness: Readiness) -> None:
        self.readiness = readiness

    def peek(self) -> Readiness:
        return self.readiness

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return b"" if self.readiness is CLOSED else b"x"

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        raise trio.BrokenResourceError("nothing to listen")

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_watchable_stream_is_probed_where_it_has_something(wrapped: bool) -> None:
    chatty = Chatty(QUIET)
    transport = transport_over(NetworkStream(chatty) if wrapped else chatty)
    assert transport.peek() is QUIET
    with pytest.raises(WouldBlock):
        await probe(transport)
    chatty.readiness = READABLE
    assert transport.peek() is READABLE
    assert await probe(transport) == b"x"
    chatty.readiness = CLOSED
    assert transport.peek() is CLOSED
    assert await probe(transport) == b""


async def test_what_is_not_known_is_quiet() -> None:
    one, _ = trio.testing.memory_stream_pair()
    assert poll(one) is QUIET
    assert poll(NetworkStream(one)) is QUIET
    assert poll(transport_over(NetworkStream(one))) is QUIET


async def test_the_first_failure_of_a_send_in_any_layer() -> None:
    chatty = Chatty(QUIET)
    bottom = transport_over(chatty)
    top = transport_over(NetworkStream(bottom))

    def errors() -> list[Any]:
        return [transport.send_error for transport in (bottom, top)]

    with pytest.raises(trio.BrokenResourceError, match="nothing to listen"):
        await top.send_all(b"x")
    assert errors() == [None, None]
    top.defer_errors = True
    assert bottom.defer_errors
    await top.send_all(b"x")
    first, same = errors()
    assert isinstance(first, trio.BrokenResourceError)
    assert same is first
    # What failed at the top is what was sent there.
    bottom.defer_errors = False
    assert top.defer_errors
    await top.send_all(b"x")
    below, above = errors()
    assert below is first
    assert isinstance(above, trio.BrokenResourceError)
    assert above is not first
    top.defer_errors = False
    assert not bottom.defer_errors


async def test_the_repr_shows_the_layers() -> None:
    one, _ = trio.testing.memory_stream_pair()
    assert repr(transport_over(NetworkStream(one))) == f"<Transport over <NetworkStream over {one!r}>>"


# -- What had been received before the stream was taken over.

UNREAD = b"abcdef"


def taken_over(stream: trio.abc.Stream) -> Transport:
    """A transport over streams of which two had received something."""
    inner = NetworkStream(stream, received=UNREAD[2:])
    return transport_over(NetworkStream(inner, received=UNREAD[:2]))


@pytest.mark.parametrize("pair", [socket_streams, trio.testing.memory_stream_pair])
@pytest.mark.parametrize("way", ["receive_some", "receive_later", "receive_nowait", "probing"])
async def test_unread_bytes_come_first(pair: Any, way: str) -> None:
    stream, other = pair()
    transport = taken_over(stream)
    await other.send_all(b"ghi")

    async def receive(size: int) -> bytes | None:
        match way:
            case "receive_some":
                return await transport.receive_some(size)
            case "receive_later":
                with trio.testing.assert_checkpoints():
                    return await transport.receive_later(size)
            case "receive_nowait":
                return transport.receive_nowait(size)
        transport.probing = 8
        return await transport.receive_some(size)

    assert transport.peek() is READABLE
    assert poll(transport_over(NetworkStream(transport))) is READABLE
    assert [await receive(size) for size in (1, 2, 100)] == [b"a", b"bc", b"def"]
    transport.probing = 0
    assert await transport.receive_some() == b"ghi"
    assert transport.peek() is QUIET
    await transport.aclose()
    await other.aclose()


async def test_unread_bytes_can_be_taken_once() -> None:
    stream, _ = trio.testing.memory_stream_pair()
    transport = taken_over(stream)
    assert await transport.receive_some(1) == b"a"
    assert transport.take_unread() == b"bcdef"
    assert transport.take_unread() == b""
    assert transport.receive_nowait(10) is None


async def test_those_who_had_the_stream_have_nothing_any_more(autojump_clock: MockClock) -> None:
    stream, other = trio.testing.memory_stream_pair()
    before = NetworkStream(stream, received=UNREAD)
    transport = transport_over(before)
    await other.send_all(b"ghi")
    assert await before.receive_some() == b"ghi"
    assert await transport.receive_some() == UNREAD


@pytest.mark.parametrize("along", [b"", b"along"])
async def test_unread_bytes_are_in_the_raw_stream(nursery: trio.Nursery, along: bytes) -> None:
    """The second tunnel's first bytes come with the answer to the first CONNECT."""

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        switch = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
        await peer.send(b"HTTP/1.1 200 Connected\r\n\r\n" + switch + along)
        while data := await peer.receive_some():
            await peer.send(data)

    connector = MemoryConnector(nursery, script, stream_pair=socket_streams)
    async with (
        ConnectionPool(proxy=Proxy("http://proxy.example"), connector=connector) as pool,
        pool.stream(
            "GET", "ws://example.com/", headers={"Connection": "upgrade", "Upgrade": "x"}
        ) as response,
    ):
        stream = response.extensions["network_stream"]
        if along:
            assert await stream.read(2) == along[:2]
            assert await stream.read() == along[2:]
        # The request that was answered before it was made.
        assert (await stream.read()).startswith(b"GET / HTTP/1.1\r\n")


# -- Raw streams through proxies.


async def echo(far: Far) -> None:
    while received := await far.top.receive_some():
        await far.top.send_all(received)


@every_proxy
async def test_a_raw_stream(nursery: trio.Nursery, kind: Kind) -> None:
    connector = Network(nursery, kind, echo)
    async with pool_through(kind, connector) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        assert isinstance(stream, NetworkStream)
        for data in (b"abc", b"x" * 30_000):
            await stream.write(data)
            received = b""
            while len(received) < len(data):
                received += await stream.read(65536, timeout=10)
            assert received == data
        numbers = pool.statistics()
        assert (numbers.open, numbers.active, numbers.idle, numbers.connections_opened) == (1, 1, 0, 1)
        assert numbers.requests_served == 0
        (connection,) = internals(pool)
        assert connection.state == "active"
        assert connection.http_version == "no HTTP"
        assert repr(connection) == "<RawConnection 'tcp://example.com:443', no HTTP, active>"
        await stream.aclose()
        assert connection.state == "closing"
        await connection.closed.wait()
        assert connection.state == "closed"
        assert repr(connection) == "<RawConnection 'tcp://example.com:443', no HTTP, closed>"
        assert_unharmed(pool)
        with pytest.raises(ReadError):
            await stream.read()
        with pytest.raises(WriteError):
            await stream.write(b"x")
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("then_socks", [False, True])
async def test_what_comes_along_with_a_tunnel_is_in_its_stream(
    nursery: trio.Nursery, scheme: str, then_socks: bool
) -> None:
    """In one packet, and in one record of TLS."""
    along = b"\5\0" + b"\5\0\0\1" + bytes(6) if then_socks else b""

    async def script(peer: ScriptedPeer) -> None:
        top = (await Kind((), tls=scheme == "https").accept(peer.stream)).top
        await ScriptedPeer(top).receive_request()
        await top.send_all(b"HTTP/1.1 200 Connected\r\n\r\n" + along + b"ready")
        await trio.sleep_forever()

    connector = MemoryConnector(nursery, script, stream_pair=socket_streams)
    proxies = [Proxy(f"{scheme}://localhost", ssl_context=a_client())]
    if then_socks:
        proxies.append(Proxy("socks5h://inner.example"))
    async with ConnectionPool(proxy=proxies, connector=connector) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        assert await stream.read(2) == b"re"
        assert await stream.read() == b"ady"
    nursery.cancel_scope.cancel()


@every_proxy
async def test_tls_on_a_raw_stream(nursery: trio.Nursery, kind: Kind) -> None:
    async def play(far: Far) -> None:
        peer = ScriptedPeer(far.top)
        await peer.start_tls(make_tls().server)
        await respond(peer)

    connector = Network(nursery, kind, play)
    async with pool_through(kind, connector) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        below = stream.get_extra_info("ssl_object")
        assert (below is None) == (not {"https", "h2"} & {*kind.proxies})
        stream = await stream.start_tls(a_client(), "example.com", timeout=10)
        await stream.write(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
        assert (await stream.read(timeout=10)).endswith(b"\r\n\r\nabc")
        ssl_object = stream.get_extra_info("ssl_object")
        assert ssl_object is not below
        assert ssl_object.getpeercert() is not None
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
    nursery.cancel_scope.cancel()


@every_kind
async def test_information_through_layers(nursery: trio.Nursery, kind: Kind) -> None:
    async def play(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, EOFError):
            await answer(await kind.accept(stream))

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, play, listeners)
    address = listeners[0].socket.getsockname()

    class Redirecting(MemoryConnector):
        async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
            return await trio.open_tcp_stream(*address)

    async with pool_through(kind, Redirecting(nursery, respond)) as pool:
        response = await pool.request("GET", kind.url)
        ask = response.extensions["network_stream"].get_extra_info
        assert ask("server_addr") == address
        assert ask("client_addr") == ask("socket").getsockname()
        assert ask("socket").getpeername() == address
        assert ask("is_readable") in (True, False)
        ssl_object = ask("ssl_object")
        encrypted = kind.tls or bool({"https", "h2"} & {*kind.proxies})
        name = ("example.com" if kind.tls else "localhost") if encrypted else None
        assert getattr(ssl_object, "server_hostname", None) == name
        assert isinstance(ssl_object, ssl.SSLObject if encrypted else type(None))
    # Another pool, since the far end knows only one tunnel of HTTP/2.
    async with pool_through(kind, Redirecting(nursery, respond)) as pool:
        raw = await pool.open_tcp_stream("example.com", 443)
        assert raw.get_extra_info("server_addr") == address
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("who", ["pool's end", "aclose", "another pool.aclose while reading"])
@every_proxy
async def test_a_raw_stream_ends_with_its_pool(nursery: trio.Nursery, kind: Kind, who: str) -> None:
    async def read() -> None:
        with pytest.raises(ReadError):
            await stream.read()

    before = open_sockets()
    connector = Network(nursery, kind, echo)
    async with pool_through(kind, connector) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        if who == "aclose":
            await pool.aclose()
        elif who.startswith("another"):
            async with trio.open_nursery() as inner:
                inner.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                await pool.aclose()
    await read()
    with pytest.raises(WriteError):
        await stream.write(b"x")
    with pytest.raises(ConnectionNotAvailable):
        await pool.open_tcp_stream("example.com", 443)
    await trio.testing.wait_all_tasks_blocked()
    assert open_sockets() == before


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if not k.tls and "https" not in k.proxies])
async def test_half_closing_a_raw_stream(nursery: trio.Nursery, kind: Kind) -> None:
    async def play(far: Far) -> None:
        received = b""
        while data := await far.top.receive_some():
            received += data
        await far.top.send_all(b"got " + received)
        await far.top.send_eof()
        await trio.sleep_forever()

    connector = Network(nursery, kind, play)
    async with pool_through(kind, connector) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        await stream.write(b"abc")
        await stream.send_eof()
        with pytest.raises(WriteError):
            await stream.write(b"x")
        assert b"".join([chunk async for chunk in stream]) == b"got abc"
        assert await stream.read() == b""
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
    nursery.cancel_scope.cancel()


async def test_the_far_side_of_a_raw_stream_may_end_first(nursery: trio.Nursery) -> None:
    got: list[bytes] = []

    async def play(far: Far) -> None:
        await far.top.send_eof()
        while data := await far.top.receive_some():
            got.append(data)
        done.set()

    done = trio.Event()
    connector = Network(nursery, KINDS["through http"], play)
    async with pool_through(KINDS["through http"], connector) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        assert await stream.read() == b""
        await stream.write(b"still here")
        assert pool.statistics().active == 1
        await stream.send_eof()
        await done.wait()
    assert b"".join(got) == b"still here"


async def test_a_raw_stream_through_tls_can_not_be_half_closed(nursery: trio.Nursery) -> None:
    connector = Network(nursery, KINDS["through TLS"], echo)
    async with pool_through(KINDS["through TLS"], connector) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        with pytest.raises(NotImplementedError, match="TLS"):
            await stream.send_eof()
        await stream.write(b"abc")
        assert await stream.read() == b"abc"
    nursery.cancel_scope.cancel()


# -- Raw streams among a pool's connections.


async def echo_in_memory(peer: ScriptedPeer) -> None:
    while received := await peer.receive_some():
        await peer.send(received)


@pytest.mark.parametrize(
    ("host", "port", "error", "message"),
    [
        ("", 1, ValueError, "a stream needs a host and a port"),
        ("h", None, ValueError, "a stream needs a host and a port"),
        ("h", 0, ValueError, "port"),
        ("h", 65536, ValueError, "port"),
        ("h", -1, ValueError, "port"),
        ("h", "80", TypeError, "port"),
        ("h", True, TypeError, "port"),
        (5, 1, TypeError, "host"),
        (None, 1, TypeError, "host"),
        ("a b", 1, LocalProtocolError, "host"),
        ("a\nb", 1, LocalProtocolError, "host"),
    ],
)
async def test_host_and_port_are_checked(
    nursery: trio.Nursery, host: Any, port: Any, error: type[Exception], message: str
) -> None:
    connector = MemoryConnector(nursery, respond)
    async with ConnectionPool(connector=connector) as pool:
        with pytest.raises(error, match=message):
            await pool.open_tcp_stream(host, port)
        assert_unharmed(pool)
    assert connector.dialled == []


@pytest.mark.parametrize(
    ("extensions", "error", "message"),
    [
        ({"timeout": 5}, TypeError, "timeout"),
        ({"timeout": {"connect": -1}}, ValueError, "connect timeout"),
        ({"timeout": {"all": 1}}, ValueError, "unknown timeout 'all'"),
        ({"trace": 5}, TypeError, "trace"),
    ],
)
async def test_extensions_are_checked(
    nursery: trio.Nursery, extensions: Any, error: type[Exception], message: str
) -> None:
    async with ConnectionPool(connector=MemoryConnector(nursery, respond)) as pool:
        with pytest.raises(error, match=message):
            await pool.open_tcp_stream("h", 1, extensions=extensions)
        assert_unharmed(pool)


async def test_a_pool_that_was_not_entered() -> None:
    with pytest.raises(RuntimeError, match="not entered"):
        await ConnectionPool().open_tcp_stream("h", 1)


async def test_a_raw_stream_takes_a_place(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    connector = MemoryConnector(nursery, echo_in_memory)
    async with ConnectionPool(connector=connector, max_connections=2) as pool:
        streams = [await pool.open_tcp_stream(b"h", 1) for _ in range(2)]
        with pytest.raises(PoolTimeout):
            await pool.open_tcp_stream("h", 1, extensions={"timeout": {"pool": 3}})
        with pytest.raises(PoolTimeout):
            await pool.request("GET", "http://h/", extensions={"timeout": {"pool": 3}})
        assert trio.current_time() == 6

        async def close_later() -> None:
            await trio.sleep(2)
            await streams[0].aclose()

        nursery.start_soon(close_later)
        third = await pool.open_tcp_stream("h", 1, extensions={"timeout": {"pool": 3}})
        assert trio.current_time() == 8
        await third.write(b"abc")
        assert await third.read() == b"abc"
        assert pool.statistics().active == 2
        assert [dialled.address for dialled in connector.dialled] == [("h", 1)] * 3


async def test_the_limit_of_an_origin_holds_too(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    connector = MemoryConnector(nursery, echo_in_memory)
    async with ConnectionPool(connector=connector, max_connections_per_origin=1) as pool:
        await pool.open_tcp_stream("h", 1)
        with pytest.raises(PoolTimeout):
            await pool.open_tcp_stream("h", 1, extensions={"timeout": {"pool": 3}})
        await pool.open_tcp_stream("h", 2, extensions={"timeout": {"pool": 3}})
        await pool.open_tcp_stream("other", 1, extensions={"timeout": {"pool": 3}})


async def test_an_idle_connection_gives_way(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    connector = MemoryConnector(nursery, respond)
    async with ConnectionPool(connector=connector, max_connections=1) as pool:
        await pool.request("GET", "http://h/")
        stream = await pool.open_tcp_stream("h", 80, extensions={"timeout": {"pool": 3}})
        assert len(connector.dialled) == 2
        await stream.aclose()
        await pool.request("GET", "http://h/")
        assert len(connector.dialled) == 3


async def test_raw_streams_do_not_wait_for_one_another(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """As requests would, that might share a connection of HTTP/2."""
    connector = MemoryConnector(nursery, echo_in_memory)
    connector.gate = trio.Event()
    async with ConnectionPool(connector=connector, http1=False, http2=True) as pool:
        for _ in range(3):
            nursery.start_soon(pool.open_tcp_stream, "h", 1)
        await trio.testing.wait_all_tasks_blocked()
        assert len(connector.dialled) == 3
        assert pool.statistics().connecting == 3
        connector.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert pool.statistics().active == 3


@pytest.mark.parametrize("retries", [0, 1])
async def test_connecting_a_raw_stream_is_limited(
    nursery: trio.Nursery, autojump_clock: MockClock, retries: int
) -> None:
    connector = MemoryConnector(nursery, echo_in_memory)
    connector.gate = trio.Event()
    async with ConnectionPool(connector=connector, max_connections=1, retries=retries) as pool:
        with pytest.raises(ConnectTimeout):
            await pool.open_tcp_stream("h", 1, extensions={"timeout": {"connect": 5}})
        assert trio.current_time() == 5 * (1 + retries)
        assert_unharmed(pool)
        connector.gate.set()
        connector.failures.append(OSError("refused"))
        if retries:
            await (await pool.open_tcp_stream("h", 1)).aclose()
        else:
            with pytest.raises(ConnectError, match="could not connect to h:1: refused"):
                await pool.open_tcp_stream("h", 1)
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
        await pool.open_tcp_stream("h", 1)


async def test_cancelling_the_opening(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    connector = MemoryConnector(nursery, echo_in_memory)
    connector.gate = trio.Event()
    async with ConnectionPool(connector=connector, max_connections=1) as pool:
        for waiting in (False, True):
            async with trio.open_nursery() as inner:
                for _ in range(1 + waiting):
                    inner.start_soon(pool.open_tcp_stream, "h", 1)
                await trio.testing.wait_all_tasks_blocked()
                assert pool.statistics().waiting == waiting
                inner.cancel_scope.cancel()
            assert_unharmed(pool)
        connector.gate.set()
        await pool.open_tcp_stream("h", 1)


async def test_closing_the_pool_ends_the_opening(nursery: trio.Nursery) -> None:
    async def opening() -> None:
        with pytest.raises(ConnectionNotAvailable):
            await pool.open_tcp_stream("h", 1)

    connector = MemoryConnector(nursery, echo_in_memory)
    connector.gate = trio.Event()
    async with ConnectionPool(connector=connector, max_connections=1) as pool:
        for _ in range(2):
            nursery.start_soon(opening)
        await trio.testing.wait_all_tasks_blocked()
        await pool.aclose()
        assert_unharmed(pool)


async def test_opening_is_traced(nursery: trio.Nursery) -> None:
    trace = Events()
    kind = KINDS["through http"]
    connector = Network(nursery, kind, echo)
    async with pool_through(kind, connector) as pool:
        extensions = {"trace": trace, "timeout": {"connect": 5}}
        await pool.open_tcp_stream("example.com", 443, extensions=extensions)
    assert trace.names == [
        "connection.connect_tcp.started",
        "connection.connect_tcp.complete",
        "proxy.connect.started",
        "proxy.connect.complete",
    ]
    assert trace.seen[2][1]["target"] == b"example.com:443"
    assert trace.seen[2][1]["timeout"] == 5
    nursery.cancel_scope.cancel()


async def test_a_proxy_that_refuses_a_raw_stream(nursery: trio.Nursery) -> None:
    async def refuse(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send_response(403, body=b"no")

    connector = MemoryConnector(nursery, refuse)
    proxy = Proxy("http://proxy.example")
    async with ConnectionPool(proxy=proxy, connector=connector, max_connections=1) as pool:
        for _ in range(2):
            with pytest.raises(ProxyError) as info:
                await pool.open_tcp_stream("example.com", 443)
            assert info.value.response is not None
            assert (info.value.response.status, info.value.response.content) == (403, b"no")
            assert_unharmed(pool)


async def test_an_ipv6_address(nursery: trio.Nursery) -> None:
    connector = MemoryConnector(nursery, echo_in_memory)
    async with ConnectionPool(connector=connector) as pool:
        for host in ("::1", "[::1]"):
            await pool.open_tcp_stream(host, 1)
            assert str(pool.connections[-1].origin) == "tcp://[::1]:1"
    assert [dialled.address for dialled in connector.dialled] == [("::1", 1)] * 2


async def test_a_raw_stream_over_tcp(nursery: trio.Nursery) -> None:
    server = await serve_tcp(nursery, echo_in_memory)
    async with ConnectionPool() as pool:
        stream = await pool.open_tcp_stream("127.0.0.1", server.port)
        await stream.write(b"abc")
        await stream.send_eof()
        assert await stream.read() == b"abc"
        assert await stream.read() == b""
        assert stream.get_extra_info("socket").family == socket.AF_INET
        assert stream.get_extra_info("ssl_object") is None


class Held(Wrapped):
    """A stream whose sending can be held back."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self.held: bytes | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.held is None:
            await self.stream.send_all(data)
        else:
            self.held += bytes(data)


class TLSConnector(Connector):
    """Dials, and starts a TLS of its own, as for a proxy."""

    def __init__(self, below: Connector) -> None:
        self.stream_below = below

    async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
        stream = await self.stream_below.connect_tcp(host, port)
        context = client_context(make_tls().ca)
        tls = trio.SSLStream(stream, context, server_hostname="example.com", https_compatible=True)
        await tls.do_handshake()
        return tls


@pytest.mark.parametrize("idle", [0, 10])
async def test_less_than_a_record_of_a_connectors_tls_is_not_waited_for(
    nursery: trio.Nursery, autojump_clock: MockClock, idle: float
) -> None:
    async def script(peer: ScriptedPeer) -> None:
        peer.stream = bottom = Held(peer.stream)
        await peer.start_tls(make_tls().server)
        await peer.start_tls(make_tls().server)
        async for _ in peer:
            bottom.held = b""
            await peer.send_response(200)
            answer, bottom.held = bottom.held, None
            # The beginning of another record comes along with the answer.
            await bottom.stream.send_all(answer + b"\x17\x03\x03")

    connector = TLSConnector(MemoryConnector(nursery, script))
    timeouts = {"connect": 1, "read": 1, "write": 1, "pool": 1}
    async with ConnectionPool(client_context(make_tls().ca), connector=connector, max_connections=1) as pool:
        await pool.request("GET", "https://example.com/")
        # While it is idle, it is the housekeeping that looks.
        await trio.sleep(idle)
        with trio.fail_after(1000), pytest.raises(ReadTimeout):
            await pool.request("GET", "https://example.com/", extensions={"timeout": timeouts})
