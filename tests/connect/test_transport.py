"""Transports: over one stream, and what a connection knows of the layers below it."""

from __future__ import annotations

import contextlib
import gc
import select
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.certificates import client_context, make_tls
from tests.harness.checks import assert_unharmed
from tests.harness.layers import (
    KINDS,
    Far,
    Kind,
    LayeredNetwork,
    TLSServer,
    TunnelServer,
    a_client,
    answer_once,
    pool_through,
)
from tests.harness.networks import Network
from tests.harness.streams import Wrapped, clog, socket_streams
from trio_exchange import (
    ConnectionPool,
    Connector,
    NetworkStream,
    Proxy,
    ReadTimeout,
)
from trio_exchange._connect.network_stream import transport_over
from trio_exchange._connect.tls import TLSSettings, start_tls
from trio_exchange._connect.transport import Pollable, Readiness, Transport, WouldBlock, poll
from trio_exchange.testing import MemoryConnector, ScriptedPeer

QUIET, READABLE, CLOSED = Readiness.QUIET, Readiness.READABLE, Readiness.CLOSED


# -- An idle connection.


async def usable(pool: ConnectionPool) -> bool:
    """What the pool finds before it uses the idle connection again."""
    (connection,) = pool.connections
    found: Any = connection
    readiness = found.readiness()
    return readiness is QUIET or (readiness is READABLE and await found.still_open())


async def late_request(pool: ConnectionPool, far: Far) -> None:
    far.top.ask_for_certificate()
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
    far.streams[1].ask_for_certificate()
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


@contextlib.asynccontextmanager
async def idle_connection(kind: Kind) -> AsyncIterator[tuple[ConnectionPool, LayeredNetwork, Far]]:
    """A pool with a connection that has carried a request, and its far end."""
    ends: list[Far] = []

    async def first() -> None:
        ends.append(await connector.far())
        await answer_once(ends[0].top)

    async with trio.open_nursery() as nursery:
        connector = LayeredNetwork(nursery, kind)
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
            nursery.start_soon(answer_once, far.top)
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
            await answer_once((await connector.far()).top)

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
        settings = TLSSettings(a_client(), "example.com", ("x",), "example.com")
        tls.append((await start_tls(transport, settings)).trio_stream)

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
        with pytest.raises(trio.BrokenResourceError, match="unsolicited data"):
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


async def a_transport() -> tuple[Transport, trio.SocketStream]:
    one, other = socket_streams()
    return Transport(one), other


async def test_a_transport_over_a_socket() -> None:
    transport, other = await a_transport()
    await transport.send_all(b"abc")
    assert await other.receive_some() == b"abc"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.send_all, b"x" * 5_000_000)
        received = 0
        while received < 5_000_000:
            received += len(await other.receive_some())
    assert transport.bytes_sent == 5_000_003
    with trio.testing.assert_checkpoints():
        await transport.wait_send_all_might_not_block()
    await other.send_all(b"abc")
    assert await transport.receive_some(2) == b"ab"
    assert await transport.receive_some() == b"c"
    await other.aclose()
    assert await transport.receive_some() == b""
    await transport.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await transport.receive_some()
    with pytest.raises(trio.ClosedResourceError):
        await transport.send_all(b"x")


async def test_a_socket_is_closed_without_a_checkpoint() -> None:
    transport, other = await a_transport()
    with trio.testing.assert_no_checkpoints():
        assert transport.close_nowait()
    assert await other.receive_some() == b""
    with pytest.raises(trio.ClosedResourceError):
        transport.send_nowait(b"x")
    assert transport.close_nowait()
    await other.aclose()


async def test_a_socket_that_fails_to_close_counts_as_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, other = await a_transport()
    stream: Any = transport.stream

    def fail() -> None:
        raise OSError("closing failed")

    with monkeypatch.context() as patch:
        patch.setattr(stream.socket, "close", fail)
        assert transport.close_nowait()
    await transport.aclose()
    await other.aclose()


async def test_a_stream_that_may_wait_is_not_closed_without_a_checkpoint() -> None:
    one, other = socket_streams()
    transport = Transport(Wrapped(one))
    assert not transport.close_nowait()
    await transport.send_all(b"abc")
    assert await other.receive_some() == b"abc"
    await transport.aclose()
    await other.aclose()


async def test_a_transport_waits_for_data_and_can_be_cancelled(autojump_clock: MockClock) -> None:
    transport, other = await a_transport()
    with trio.move_on_after(1) as scope:
        await transport.receive_some()
    assert scope.cancelled_caught
    await other.send_all(b"abc")
    with trio.CancelScope() as scope:
        scope.cancel()
        await transport.receive_some()
    assert scope.cancelled_caught
    assert await transport.receive_some() == b"abc"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.send_all, b"def")
        assert await transport.receive_some() == b"def"
    await transport.aclose()
    await other.aclose()


async def test_probing_receives_what_is_there_and_never_waits() -> None:
    transport, other = await a_transport()
    transport.probing = 8
    with pytest.raises(WouldBlock):
        await transport.receive_some()
    await other.send_all(b"abc")
    assert await transport.receive_some() == b"abc"
    with pytest.raises(WouldBlock):
        await transport.receive_some()
    await other.aclose()
    assert await transport.receive_some() == b""
    await transport.aclose()


async def test_probing_is_not_done_for_ever() -> None:
    transport, other = await a_transport()
    await other.send_all(b"x" * 100)
    transport.probing = 3
    for _ in range(2):
        assert await transport.receive_some(10) == b"x" * 10
    with pytest.raises(trio.BrokenResourceError, match="unsolicited data"):
        await transport.receive_some(10)
    await transport.aclose()
    await other.aclose()


@pytest.mark.parametrize("poll", [True, False], ids=["poll", "none"])
async def test_peeking(poll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not poll:
        monkeypatch.delattr(select, "poll")
    transport, other = await a_transport()
    assert transport.peek() is Readiness.QUIET
    await other.send_all(b"a")
    assert transport.peek() is Readiness.READABLE
    assert transport.peek() is Readiness.READABLE
    await transport.receive_some()
    await other.aclose()
    assert transport.peek() is Readiness.CLOSED
    await transport.aclose()
    assert transport.peek() is Readiness.CLOSED


async def test_a_stream_that_is_no_socket() -> None:
    stream, other = trio.testing.memory_stream_pair()
    transport = Transport(stream)
    await other.send_all(b"abc")
    assert transport.peek() is Readiness.QUIET
    assert transport.send_nowait(b"x") == 0
    transport.probing = 8
    with pytest.raises(WouldBlock):
        await transport.receive_some()
    transport.probing = 0
    assert await transport.receive_some() == b"abc"
    await transport.send_all(b"def")
    assert await other.receive_some() == b"def"
    await transport.aclose()


async def test_a_transport_that_is_full_or_reset() -> None:
    one, other = socket_streams()
    transport = Transport(one)
    clog(one.socket)
    with trio.testing.assert_no_checkpoints():
        assert transport.send_nowait(b"x") == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.send_all, b"last")
        received = b""
        while not received.endswith(b"last"):
            received = await other.receive_some()
    # A unix socket that is closed with something left to read is reset.
    await transport.send_all(b"unread")
    await other.aclose()
    with pytest.raises(trio.BrokenResourceError, match="receiving failed"):
        await transport.receive_some()
    with pytest.raises(trio.BrokenResourceError, match="sending failed"):
        transport.send_nowait(b"x")
    await transport.aclose()


async def test_what_the_kernel_has_refused_is_sent_after_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket_streams()
    transport = Transport(one)
    clog(one.socket)
    attempts: list[int] = []
    send_nowait = transport.send_nowait

    def count(data: bytes | memoryview) -> int:
        attempts.append(send_nowait(data))
        return attempts[-1]

    monkeypatch.setattr(transport, "send_nowait", count)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.send_later, memoryview(b"last"))
        await trio.testing.wait_all_tasks_blocked()
        assert not attempts
        received = b""
        while not received.endswith(b"last"):
            received = await other.receive_some()
    assert attempts == [4]
    await transport.aclose()
    await other.aclose()


async def test_a_deferred_send_error_is_kept_once() -> None:
    transport, other = await a_transport()
    transport.defer_errors = True
    await other.aclose()
    await transport.send_all(b"a")
    first = transport.send_error
    assert isinstance(first, trio.BrokenResourceError)
    await transport.send_all(b"a")
    assert transport.send_error is first
    await transport.aclose()


async def test_a_transport_never_touches_a_descriptor_that_is_not_its_own_any_more() -> None:
    transport, other = await a_transport()
    await transport.stream.aclose()
    # The kernel gives the lowest free number, which is the one just closed.
    one, two = socket.socketpair()
    for sock in (one, two):
        sock.setblocking(False)
    with pytest.raises(trio.ClosedResourceError):
        transport.send_nowait(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await transport.receive_some()
    assert transport.peek() is Readiness.CLOSED
    await transport.aclose()
    del transport
    one.send(b"still open")
    assert two.recv(100) == b"still open"
    for sock in (one, two):
        sock.close()
    await other.aclose()


def test_a_transport_left_to_garbage_collection_closes_its_descriptor_once() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            transport = Transport(stream)
            assert "SocketStream" in repr(transport)
            del transport
            gc.collect()
            await stream.send_all(b"still open")
            assert theirs.recv(100) == b"still open"
            await stream.aclose()

    trio.run(main)


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
async def test_unread_bytes_are_in_the_raw_stream(network: Network, along: bytes) -> None:
    """The second tunnel's first bytes come with the answer to the first CONNECT."""

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        switch = b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
        await peer.send(b"HTTP/1.1 200 Connected\r\n\r\n" + switch + along)
        while data := await peer.receive_some():
            await peer.send(data)

    async with (
        network.pool(script, pair=socket_streams, proxy=Proxy("http://proxy.example")) as pool,
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


async def test_collecting_a_transport_closes_no_descriptor_of_others() -> None:
    """A transport that was not closed itself, in a reference cycle as `trio.SSLStream` makes them."""
    one, other = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(one))
    kind: Any = type(transport_over(stream)._socket)
    descriptor = one.fileno()
    # Made before the transport, so that the collector finalizes it first.
    borrowed = kind(fileno=descriptor)
    transport: Any = transport_over(stream)
    transport._socket.detach()
    transport._socket = borrowed
    cycle: list[Any] = [borrowed, transport]
    transport.cycle = cycle
    await stream.aclose()
    reused, far = socket.socketpair()
    assert reused.fileno() == descriptor
    del transport, cycle, borrowed
    gc.collect()
    far.send(b"still open")
    assert reused.recv(100) == b"still open"
    for sock in (other, reused, far):
        sock.close()
