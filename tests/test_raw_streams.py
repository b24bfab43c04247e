"""Raw streams (`open_tcp_stream`): through proxies, and among a pool's connections."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.certificates import make_tls
from tests.harness.checks import assert_unharmed, internals, open_sockets
from tests.harness.layers import (
    KINDS,
    Far,
    Kind,
    LayeredNetwork,
    a_client,
    answer,
    every_kind,
    every_proxy,
    pool_through,
)
from tests.harness.networks import Network, Sockets
from tests.harness.peers import respond
from tests.harness.streams import socket_streams
from tests.harness.traces import Events
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    ConnectTimeout,
    LocalProtocolError,
    NetworkStream,
    PoolTimeout,
    Proxy,
    ProxyError,
    ReadError,
    WriteError,
)
from trio_exchange.testing import MemoryConnector, ScriptedPeer

# -- Through proxies.


async def echo(far: Far) -> None:
    while received := await far.top.receive_some():
        await far.top.send_all(received)


@contextlib.asynccontextmanager
async def raw_stream(
    kind: Kind, play: Callable[[Far], Awaitable[object]]
) -> AsyncIterator[tuple[ConnectionPool, NetworkStream]]:
    """A pool, and a raw stream of it, whose far end is played by `play`."""
    async with trio.open_nursery() as nursery:
        async with pool_through(kind, LayeredNetwork(nursery, kind, play)) as pool:
            yield pool, await pool.open_tcp_stream("example.com", 443)
        nursery.cancel_scope.cancel()


@every_proxy
async def test_a_raw_stream(kind: Kind) -> None:
    async with raw_stream(kind, echo) as (pool, stream):
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
        await connection.wait_closed()
        assert connection.state == "closed"
        assert repr(connection) == "<RawConnection 'tcp://example.com:443', no HTTP, closed>"
        assert_unharmed(pool)
        with pytest.raises(ReadError):
            await stream.read()
        with pytest.raises(WriteError):
            await stream.write(b"x")


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("then_socks", [False, True])
async def test_what_comes_along_with_a_tunnel_is_in_its_stream(
    network: Network, nursery: trio.Nursery, scheme: str, then_socks: bool
) -> None:
    """In one packet, and in one record of TLS."""
    along = b"\5\0" + b"\5\0\0\1" + bytes(6) if then_socks else b""

    async def script(peer: ScriptedPeer) -> None:
        top = (await Kind((), tls=scheme == "https").accept(peer.stream)).top
        await ScriptedPeer(top).receive_request()
        await top.send_all(b"HTTP/1.1 200 Connected\r\n\r\n" + along + b"ready")
        await trio.sleep_forever()

    proxies = [Proxy(f"{scheme}://localhost", ssl_context=a_client())]
    if then_socks:
        proxies.append(Proxy("socks5h://inner.example"))
    async with network.pool(script, pair=socket_streams, proxy=proxies) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        assert await stream.read(2) == b"re"
        assert await stream.read() == b"ady"
    nursery.cancel_scope.cancel()


@every_proxy
async def test_tls_on_a_raw_stream(kind: Kind) -> None:
    async def play(far: Far) -> None:
        peer = ScriptedPeer(far.top)
        await peer.start_tls(make_tls().server)
        await respond(peer)

    async with raw_stream(kind, play) as (pool, stream):
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
async def test_a_raw_stream_ends_with_its_pool(kind: Kind, who: str) -> None:
    async def read() -> None:
        with pytest.raises(ReadError):
            await stream.read()

    before = open_sockets()
    async with raw_stream(kind, echo) as (pool, stream):
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
async def test_half_closing_a_raw_stream(kind: Kind) -> None:
    async def play(far: Far) -> None:
        received = b""
        while data := await far.top.receive_some():
            received += data
        await far.top.send_all(b"got " + received)
        await far.top.send_eof()
        await trio.sleep_forever()

    async with raw_stream(kind, play) as (pool, stream):
        await stream.write(b"abc")
        await stream.send_eof()
        with pytest.raises(WriteError):
            await stream.write(b"x")
        assert b"".join([chunk async for chunk in stream]) == b"got abc"
        assert await stream.read() == b""
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)


async def test_the_far_side_of_a_raw_stream_may_end_first() -> None:
    got: list[bytes] = []

    async def play(far: Far) -> None:
        await far.top.send_eof()
        while data := await far.top.receive_some():
            got.append(data)
        done.set()

    done = trio.Event()
    async with raw_stream(KINDS["through http"], play) as (pool, stream):
        assert await stream.read() == b""
        await stream.write(b"still here")
        assert pool.statistics().active == 1
        await stream.send_eof()
        await done.wait()
    assert b"".join(got) == b"still here"


async def test_a_raw_stream_through_tls_can_not_be_half_closed() -> None:
    async with raw_stream(KINDS["through TLS"], echo) as (_, stream):
        with pytest.raises(NotImplementedError, match="TLS"):
            await stream.send_eof()
        await stream.write(b"abc")
        assert await stream.read() == b"abc"


# -- Among a pool's connections.


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
    network: Network, host: Any, port: Any, error: type[Exception], message: str
) -> None:
    async with network.pool() as pool:
        with pytest.raises(error, match=message):
            await pool.open_tcp_stream(host, port)
        assert_unharmed(pool)
    assert network.dialled == []


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
    network: Network, extensions: Any, error: type[Exception], message: str
) -> None:
    async with network.pool() as pool:
        with pytest.raises(error, match=message):
            await pool.open_tcp_stream("h", 1, extensions=extensions)
        assert_unharmed(pool)


async def test_a_pool_that_was_not_entered() -> None:
    with pytest.raises(RuntimeError, match="not entered"):
        await ConnectionPool().open_tcp_stream("h", 1)


async def test_a_raw_stream_takes_a_place(
    network: Network, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async with network.pool(echo_in_memory, max_connections=2) as pool:
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
        assert [dialled.address for dialled in network.dialled] == [("h", 1)] * 3


async def test_the_limit_of_an_origin_holds_too(network: Network, autojump_clock: MockClock) -> None:
    async with network.pool(echo_in_memory, max_connections_per_origin=1) as pool:
        await pool.open_tcp_stream("h", 1)
        with pytest.raises(PoolTimeout):
            await pool.open_tcp_stream("h", 1, extensions={"timeout": {"pool": 3}})
        await pool.open_tcp_stream("h", 2, extensions={"timeout": {"pool": 3}})
        await pool.open_tcp_stream("other", 1, extensions={"timeout": {"pool": 3}})


async def test_an_idle_connection_gives_way(network: Network, autojump_clock: MockClock) -> None:
    async with network.pool(max_connections=1) as pool:
        await pool.request("GET", "http://h/")
        stream = await pool.open_tcp_stream("h", 80, extensions={"timeout": {"pool": 3}})
        assert len(network.dialled) == 2
        await stream.aclose()
        await pool.request("GET", "http://h/")
        assert len(network.dialled) == 3


async def test_raw_streams_do_not_wait_for_one_another(
    network: Network, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """As requests would, that might share a connection of HTTP/2."""
    network.gate = trio.Event()
    async with network.pool(echo_in_memory, http1=False, http2=True) as pool:
        for _ in range(3):
            nursery.start_soon(pool.open_tcp_stream, "h", 1)
        await trio.testing.wait_all_tasks_blocked()
        assert len(network.dialled) == 3
        assert pool.statistics().connecting == 3
        network.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert pool.statistics().active == 3


@pytest.mark.parametrize("retries", [0, 1])
async def test_connecting_a_raw_stream_is_limited(
    network: Network, autojump_clock: MockClock, retries: int
) -> None:
    network.gate = trio.Event()
    async with network.pool(echo_in_memory, max_connections=1, retries=retries) as pool:
        with pytest.raises(ConnectTimeout):
            await pool.open_tcp_stream("h", 1, extensions={"timeout": {"connect": 5}})
        assert trio.current_time() == 5 * (1 + retries)
        assert_unharmed(pool)
        network.gate.set()
        network.failures.append(OSError("refused"))
        if retries:
            await (await pool.open_tcp_stream("h", 1)).aclose()
        else:
            with pytest.raises(ConnectError, match="could not connect to h:1: refused"):
                await pool.open_tcp_stream("h", 1)
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
        await pool.open_tcp_stream("h", 1)


async def test_cancelling_the_opening(network: Network, autojump_clock: MockClock) -> None:
    network.gate = trio.Event()
    async with network.pool(echo_in_memory, max_connections=1) as pool:
        for waiting in (False, True):
            async with trio.open_nursery() as inner:
                for _ in range(1 + waiting):
                    inner.start_soon(pool.open_tcp_stream, "h", 1)
                await trio.testing.wait_all_tasks_blocked()
                assert pool.statistics().waiting == waiting
                inner.cancel_scope.cancel()
            assert_unharmed(pool)
        network.gate.set()
        await pool.open_tcp_stream("h", 1)


async def test_closing_the_pool_ends_the_opening(network: Network, nursery: trio.Nursery) -> None:
    async def opening() -> None:
        with pytest.raises(ConnectionNotAvailable):
            await pool.open_tcp_stream("h", 1)

    network.gate = trio.Event()
    async with network.pool(echo_in_memory, max_connections=1) as pool:
        for _ in range(2):
            nursery.start_soon(opening)
        await trio.testing.wait_all_tasks_blocked()
        await pool.aclose()
        assert_unharmed(pool)


async def test_opening_is_traced(nursery: trio.Nursery) -> None:
    trace = Events()
    kind = KINDS["through http"]
    connector = LayeredNetwork(nursery, kind, echo)
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


async def test_a_proxy_that_refuses_a_raw_stream(network: Network) -> None:
    async def refuse(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send_response(403, body=b"no")

    proxy = Proxy("http://proxy.example")
    async with network.pool(refuse, proxy=proxy, max_connections=1) as pool:
        for _ in range(2):
            with pytest.raises(ProxyError) as info:
                await pool.open_tcp_stream("example.com", 443)
            assert info.value.response is not None
            assert (info.value.response.status, info.value.response.content) == (403, b"no")
            assert_unharmed(pool)


async def test_an_ipv6_address(network: Network) -> None:
    async with network.pool(echo_in_memory) as pool:
        for host in ("::1", "[::1]"):
            await pool.open_tcp_stream(host, 1)
            assert str(pool.connections[-1].origin) == "tcp://[::1]:1"
    assert [dialled.address for dialled in network.dialled] == [("::1", 1)] * 2


async def test_a_raw_stream_over_tcp(tcp: Sockets) -> None:
    async with tcp.pool(echo_in_memory) as pool:
        stream = await pool.open_tcp_stream("127.0.0.1", tcp.server.port)
        await stream.write(b"abc")
        await stream.send_eof()
        assert await stream.read() == b"abc"
        assert await stream.read() == b""
        assert stream.get_extra_info("socket").family == socket.AF_INET
        assert stream.get_extra_info("ssl_object") is None
