from __future__ import annotations

import contextlib
import select
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.certificates import client_context, make_tls
from tests.harness.checks import open_sockets
from tests.harness.networks import Network, Sockets
from tests.harness.peers import DELIVERIES, Script, reset, respond, stall
from tests.harness.servers import serve_unix
from tests.harness.streams import Wrapped, clog, socket_streams
from trio_exchange import (
    ConnectError,
    ConnectionPool,
    LocalProtocolError,
    NetworkStream,
    ReadError,
    RemoteProtocolError,
    Request,
    Response,
    WriteError,
    WriteTimeout,
)
from trio_exchange.testing import ScriptedPeer

URL = "http://example.com/"
UPGRADE = [("Connection", "upgrade"), ("Upgrade", "echo")]
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"


def network_stream(response: Response) -> NetworkStream:
    stream = response.extensions["network_stream"]
    assert isinstance(stream, NetworkStream)
    return stream


async def echo(peer: ScriptedPeer) -> None:
    while data := await peer.receive_some():
        await peer.send(data)
    if isinstance(peer.stream, trio.abc.HalfCloseableStream):
        await peer.send_eof()


def switching(then: Script = echo, *, along: bytes = b"") -> Script:
    """A server that agrees to whatever is asked of it, and then speaks another protocol."""

    async def script(peer: ScriptedPeer) -> None:
        request = await peer.receive_request()
        answer = b"HTTP/1.1 200 Connected\r\n\r\n" if request.method == b"CONNECT" else SWITCH
        await peer.send(answer + along)
        await then(peer)

    return script


@asynccontextmanager
async def switched(
    network: Network | Sockets, then: Script = echo, *, along: bytes = b"", **options: Any
) -> AsyncIterator[NetworkStream]:
    """A stream that was switched to the other protocol, which the server speaks as `then` says."""
    async with network.pool(switching(then, along=along), **options) as pool:
        url = network.url if isinstance(network, Sockets) else URL
        async with pool.stream("GET", url, headers=UPGRADE) as response:
            yield network_stream(response)


# -- CONNECT and Upgrade.


@pytest.mark.parametrize("along", [b"", b"hello"], ids=["alone", "with bytes"])
@pytest.mark.parametrize("method", ["CONNECT", "GET"])
async def test_the_raw_stream(sockets: Sockets, along: bytes, method: str) -> None:
    before = open_sockets()
    async with sockets.pool(switching(along=along)) as pool:
        extensions = {"target": "example.com:443"} if method == "CONNECT" else {}
        headers = None if method == "CONNECT" else UPGRADE
        async with pool.stream(method, sockets.url, headers=headers, extensions=extensions) as response:
            assert response.status == (200 if method == "CONNECT" else 101)
            assert await response.aread() == b""
            numbers = pool.statistics()
            assert (numbers.open, numbers.active, numbers.idle) == (1, 1, 0)
            stream = network_stream(response)
            if along:
                assert await stream.read(2) == along[:2]
                assert await stream.read() == along[2:]
            for data in (b"abc", b"", b"x" * 30_000):
                await stream.write(data)
                received = b""
                while len(received) < len(data):
                    received += await stream.read(65536)
                assert received == data
            assert "NetworkStream" in repr(stream)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.connections == []
        with pytest.raises(ReadError):
            await stream.read()
        with pytest.raises(WriteError):
            await stream.write(b"x")
    sockets.server.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert open_sockets() <= before


@pytest.mark.parametrize("then", ["stream", "response"])
async def test_closing_the_stream_frees_its_place_at_once(network: Network, then: str) -> None:
    async with network.pool(switching(), max_connections=1) as pool:
        async with pool.stream("GET", URL, headers=UPGRADE) as response:
            assert pool.statistics().active == 1
            if then == "stream":
                await network_stream(response).aclose()
            else:
                await response.aclose()
            async with pool.stream("GET", URL, headers=UPGRADE) as second:
                assert second.status == 101
        assert pool.statistics().connections_opened == 2


@pytest.mark.parametrize("status", [199, 300])
async def test_connect_does_not_switch_without_a_2xx(network: Network, status: int) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        if status < 200:
            await peer.send_response(status)
            await peer.send_response(502)
        else:
            await peer.send_response(status, body=b"abc")
        await echo(peer)

    async with (
        network.pool(script) as pool,
        pool.stream("CONNECT", URL, extensions={"target": "x:1"}) as response,
    ):
        with pytest.raises(LocalProtocolError):
            await network_stream(response).read()
        assert await response.aread() == (b"abc" if status == 300 else b"")


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 3\r\n",
        b"Content-Length: 3, 3\r\nContent-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
    ],
    ids=["length", "repeated", "coding", "both"],
)
@pytest.mark.parametrize("method", ["CONNECT", "GET"])
@DELIVERIES
async def test_a_switch_has_no_body_whatever_it_announces(
    network: Network, method: str, framing: bytes, byte_by_byte: bool
) -> None:
    """RFC 9112, 6.3: what follows a 101, or a 2xx to CONNECT, belongs to the stream's user."""

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        line = b"HTTP/1.1 200 OK\r\n" if method == "CONNECT" else SWITCH[:-2]
        await peer.send(line + framing + b"\r\nabcdef", byte_by_byte=byte_by_byte)
        await trio.sleep_forever()

    async with network.pool(script) as pool:
        extensions = {"target": "x:1"} if method == "CONNECT" else {}
        async with pool.stream(method, URL, headers=UPGRADE, extensions=extensions) as response:
            assert await response.aread() == b""
            received = b""
            while len(received) < 6:
                received += await network_stream(response).read()
            assert received == b"abcdef"
        await trio.testing.wait_all_tasks_blocked()
        assert pool.connections == []


async def test_a_switch_that_nobody_asked_for(network: Network) -> None:
    async with network.pool(switching()) as pool:
        with pytest.raises(RemoteProtocolError):
            await pool.request("GET", URL)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.connections == []


async def test_a_switch_before_the_request_was_sent_whole(network: Network) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send(SWITCH)
        await peer.receive_some()
        await trio.sleep_forever()

    class Endless:
        def __aiter__(self) -> Endless:
            return self

        async def __anext__(self) -> bytes:
            return await trio.sleep_forever()

    async with network.pool(script) as pool:
        with pytest.raises(RemoteProtocolError, match="before the request was sent whole"):
            await pool.request("POST", URL, headers=UPGRADE, content=Endless())
        await trio.testing.wait_all_tasks_blocked()
        assert pool.connections == []


@pytest.mark.parametrize("size", [3, 100_000])
async def test_an_upgrade_with_a_body(network: Network, size: int) -> None:
    async with (
        network.pool(switching()) as pool,
        pool.stream("POST", URL, headers=UPGRADE, content=b"x" * size) as response,
    ):
        await network_stream(response).write(b"abc")
        assert await network_stream(response).read() == b"abc"


class Reluctant(Wrapped):
    """A stream whose sending returns a while after everything has been sent, as that of TLS may."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)
        await trio.testing.wait_all_tasks_blocked()


async def test_a_switch_that_overtakes_the_end_of_sending(network: Network) -> None:
    def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = trio.testing.memory_stream_pair()
        return Reluctant(client), server

    async with (
        network.pool(switching(), pair=pair) as pool,
        pool.stream("POST", URL, headers=UPGRADE, content=b"x" * 100_000) as response,
    ):
        await network_stream(response).write(b"abc")
        assert await network_stream(response).read() == b"abc"


async def test_a_switch_instead_of_100(network: Network) -> None:
    """The body was never sent, so that what follows would be taken for it."""

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send(SWITCH)
        await trio.sleep_forever()

    headers = [*UPGRADE, ("Expect", "100-continue")]
    async with network.pool(script) as pool:
        with pytest.raises(RemoteProtocolError, match="before the request was sent whole"):
            await pool.request("POST", URL, headers=headers, content=b"abc")


async def test_closing_the_pool_ends_a_read(tcp: Sockets) -> None:
    async def read(stream: NetworkStream) -> None:
        with pytest.raises(ReadError):
            await stream.read()

    async with (
        tcp.pool(switching()) as pool,
        pool.stream("GET", tcp.url, headers=UPGRADE) as response,
        trio.open_nursery() as inner,
    ):
        inner.start_soon(read, network_stream(response))
        await trio.testing.wait_all_tasks_blocked()
        await pool.aclose()


async def test_half_closing(tcp: Sockets) -> None:
    async with switched(tcp) as stream:
        await stream.write(b"abc")
        await stream.send_eof()
        received = [chunk async for chunk in stream]
        assert b"".join(received) == b"abc"
        assert await stream.read() == b""
        with pytest.raises(WriteError):
            await stream.write(b"x")


async def test_tls_can_not_be_half_closed(tls: Sockets) -> None:
    async with switched(tls) as stream:
        with pytest.raises(NotImplementedError, match="TLS"):
            await stream.send_eof()


# -- TLS on the stream.


def tls_server(then: Script, *, depth: int = 1) -> Script:
    async def script(peer: ScriptedPeer) -> None:
        for _ in range(depth):
            await peer.start_tls(make_tls().server)
        await then(peer)

    return script


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["example.com", b"example.com"])
async def test_start_tls(sockets: Sockets, depth: int, name: str | bytes) -> None:
    """On plain TCP, in the connection's own TLS, and once more in that."""
    async with (
        sockets.pool(switching(tls_server(respond, depth=depth))) as pool,
        pool.stream("CONNECT", sockets.url, extensions={"target": "example.com:443"}) as response,
    ):
        stream = network_stream(response)
        outer = stream.get_extra_info("ssl_object")
        for _ in range(depth):
            stream = await stream.start_tls(client_context(make_tls().ca), name, timeout=5)
        await stream.write(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
        received = b""
        while not received.endswith(b"abc"):
            received += await stream.read(timeout=5)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        ssl_object = stream.get_extra_info("ssl_object")
        assert ssl_object is not outer
        assert ssl_object.version() == "TLSv1.3"
        assert stream.get_extra_info("server_addr") == ("127.0.0.1", sockets.server.port)
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert pool.connections == []


async def test_start_tls_after_a_greeting_that_came_along(sockets: Sockets) -> None:
    async with switched(sockets, tls_server(echo), along=b"ready") as stream:
        assert await stream.read(5) == b"ready"
        stream = await stream.start_tls(make_tls().client, "localhost")
        await stream.write(b"abc")
        assert await stream.read() == b"abc"


async def test_bytes_already_read_are_the_handshakes_beginning(network: Network) -> None:
    async with switched(network, stall, along=b"this is no TLS") as stream:
        with pytest.raises(
            ConnectError, match=r"handshake with example\.com failed: .*sent b'this is no TLS'$"
        ):
            await stream.start_tls(make_tls().client, "example.com")


async def test_start_tls_needs_a_name_to_check(network: Network) -> None:
    async with switched(network, tls_server(echo)) as stream:
        with pytest.raises(ValueError, match="server_hostname must be given"):
            await stream.start_tls(make_tls().client)
        context = client_context(make_tls().ca)
        context.check_hostname = False
        stream = await stream.start_tls(context)
        await stream.write(b"abc")
        assert await stream.read() == b"abc"


async def test_arguments_are_checked(network: Network) -> None:
    text: Any = "5"
    number: Any = 5
    async with switched(network) as stream:
        with pytest.raises(TypeError, match="max_bytes must be an int or None, not '5'"):
            await stream.read(text)
        with pytest.raises(TypeError, match="max_bytes must be an int or None, not True"):
            await stream.read(True)
        with pytest.raises(ValueError, match="max_bytes must be 1 or more, not 0"):
            await stream.read(0)
        with pytest.raises(TypeError, match=r"ssl_context must be an ssl\.SSLContext, not '5'"):
            await stream.start_tls(text)
        with pytest.raises(TypeError, match="server_hostname must be str, bytes or None, not 5"):
            await stream.start_tls(make_tls().client, number)
        await stream.write(memoryview(b"abc"))
        assert await stream.read() == b"abc"


async def test_the_errors_of_a_closed_stream_say_so(network: Network) -> None:
    async with switched(network, tls_server(echo)) as stream:
        stream = await stream.start_tls(make_tls().client, "localhost")
        await stream.aclose()
        with pytest.raises(ReadError, match="the connection was closed"):
            await stream.read()
        with pytest.raises(WriteError, match="the connection was closed"):
            await stream.write(b"x")


async def test_start_tls_on_a_closed_stream(network: Network) -> None:
    async with switched(network) as stream:
        await stream.aclose()
        with pytest.raises(ConnectError):
            await stream.start_tls(make_tls().client, "localhost")


# -- Arguments, timeouts and errors.


@pytest.mark.parametrize("seconds", [-1, "1", float("nan"), True])
async def test_timeouts_that_are_none(network: Network, seconds: Any) -> None:
    async with switched(network) as stream:
        operations: list[Callable[[], Awaitable[object]]] = [
            lambda: stream.read(1, timeout=seconds),
            lambda: stream.write(b"", timeout=seconds),
            lambda: stream.start_tls(make_tls().client, "localhost", timeout=seconds),
        ]
        for operation in operations:
            with pytest.raises((TypeError, ValueError), match="timeout"):
                await operation()


async def test_a_write_timeout(network: Network, autojump_clock: MockClock) -> None:
    pair = trio.testing.lockstep_stream_pair
    async with switched(network, stall, pair=pair) as stream:
        began = trio.current_time()
        with pytest.raises(WriteTimeout):
            await stream.write(b"abc", timeout=3)
        assert trio.current_time() - began == 3


async def test_a_connection_that_is_reset(tcp: Sockets) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        reset(peer)

    async with switched(tcp, script) as stream:
        await stream.write(b"abc")
        with pytest.raises(ReadError) as info:
            await stream.read()
        assert isinstance(info.value.__cause__, trio.BrokenResourceError)
        with pytest.raises(WriteError):
            await stream.write(b"abc")
        assert stream.get_extra_info("server_addr") is None
        assert stream.get_extra_info("client_addr")[0] == "127.0.0.1"


# -- The stream of an ordinary response.


async def test_an_ordinary_responses_stream_only_informs(tcp: Sockets) -> None:
    async with tcp.pool() as pool:
        async with pool.stream("PUT", tcp.url, content=b"abc") as response:
            stream = network_stream(response)
            contract: list[Callable[[], Awaitable[object]]] = [
                lambda: stream.read(1),
                lambda: stream.write(b"x"),
                lambda: stream.start_tls(make_tls().client, "x"),
            ]
            for operation in contract:
                with pytest.raises(LocalProtocolError, match="belongs to HTTP"):
                    await operation()
            abstract: list[Callable[[], Awaitable[object]]] = [
                stream.receive_some,
                lambda: stream.send_all(b"x"),
                stream.wait_send_all_might_not_block,
                stream.send_eof,
            ]
            for operation in abstract:
                with pytest.raises(trio.ClosedResourceError, match="belongs to HTTP"):
                    await operation()
            with trio.testing.assert_checkpoints():
                await stream.aclose()
            assert await response.aread() == b"abc"
        assert pool.statistics().idle == 1


# -- Information.


async def test_information_on_tcp(sockets: Sockets) -> None:
    async with sockets.pool() as pool:
        response = await pool.handle_async_request(Request("PUT", sockets.url, content=b"abc"))
        async with contextlib.aclosing(response):
            ask = network_stream(response).get_extra_info
            assert ask("server_addr") == ("127.0.0.1", sockets.server.port)
            sock = ask("socket")
            assert ask("client_addr") == sock.getsockname()
            assert sock.getpeername() == ("127.0.0.1", sockets.server.port)
            ssl_object = ask("ssl_object")
            assert (ssl_object is None) == (sockets.tls is None)
            if sockets.tls is not None:
                assert isinstance(ssl_object, ssl.SSLObject)
                assert ssl_object.selected_alpn_protocol() is None
                assert ssl_object.getpeercert() is not None
            for unknown in ("", "peername", "SOCKET"):
                assert ask(unknown) is None
            await response.aread()
    assert ask("is_readable") is True
    for name in ("client_addr", "server_addr"):
        assert ask(name) is None


@pytest.mark.parametrize("poll", [True, False], ids=["poll", "select"])
async def test_is_readable(tcp: Sockets, monkeypatch: pytest.MonkeyPatch, poll: bool) -> None:
    if not poll:
        monkeypatch.delattr(select, "poll")
    go = trio.Event()

    async def script(peer: ScriptedPeer) -> None:
        await go.wait()
        await peer.send(b"x")
        await trio.sleep_forever()

    async with switched(tcp, script) as stream:
        assert stream.get_extra_info("is_readable") is False
        go.set()
        await trio.lowlevel.wait_readable(stream.get_extra_info("socket"))
        assert stream.get_extra_info("is_readable") is True
        await stream.read()
        assert stream.get_extra_info("is_readable") is False


async def test_information_on_a_unix_socket(nursery: trio.Nursery, tmp_path: Any) -> None:
    server = await serve_unix(nursery, respond, tmp_path / "socket")
    async with ConnectionPool(uds=server.uds) as pool:
        response = await pool.request("GET", URL)
        assert network_stream(response).get_extra_info("server_addr") == server.uds


async def test_no_information_without_a_socket(network: Network) -> None:
    async with network.pool(respond) as pool:
        response = await pool.request("GET", URL)
        for name in ("client_addr", "server_addr", "socket", "ssl_object", "is_readable"):
            assert network_stream(response).get_extra_info(name) is None


# -- Trio's own checks.


def memory_streams() -> tuple[NetworkStream, NetworkStream]:
    one, other = trio.testing.memory_stream_pair()
    return NetworkStream(one), NetworkStream(other)


def lockstep_streams() -> tuple[NetworkStream, NetworkStream]:
    one, other = trio.testing.lockstep_stream_pair()
    return NetworkStream(one), NetworkStream(other)


@pytest.mark.parametrize("make", [memory_streams, lockstep_streams])
async def test_trios_checks_in_memory(make: Callable[[], tuple[NetworkStream, NetworkStream]]) -> None:
    async def make_pair() -> tuple[NetworkStream, NetworkStream]:
        return make()

    # A clogged pair of Trio's own fails the check of closing one half while sending.
    await trio.testing.check_half_closeable_stream(make_pair, None)


@pytest.mark.parametrize("along", [b"", b"x"], ids=["alone", "after a byte that came along"])
async def test_trios_checks_of_the_stream_handed_over(network: Network, along: bytes) -> None:
    handed_over: list[trio.SocketStream] = []

    async def hand_over(peer: ScriptedPeer) -> None:
        assert isinstance(peer.stream, trio.SocketStream)
        handed_over.append(peer.stream)
        await trio.sleep_forever()

    async with network.pool(
        switching(hand_over, along=along), pair=socket_streams, max_connections=None
    ) as pool:

        async def make_pair() -> tuple[NetworkStream, trio.SocketStream]:
            request = Request("GET", URL, headers=UPGRADE)
            stream = network_stream(await pool.handle_async_request(request))
            if along:
                assert await stream.receive_some() == along
            await trio.testing.wait_all_tasks_blocked()
            return stream, handed_over.pop()

        async def make_clogged_pair() -> tuple[NetworkStream, trio.SocketStream]:
            stream, other = await make_pair()
            for sock in (stream.get_extra_info("socket"), other.socket):
                clog(sock)
            return stream, other

        await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)
