"""What once went wrong with proxies."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.certificates import client_context, make_tls
from tests.harness.checks import assert_unharmed, internals, open_sockets
from tests.harness.h2proxy import H2Proxy, accept_tunnel
from tests.harness.h2server import ServerStream
from tests.harness.peers import respond
from tests.harness.proxies import Net, proxied, secure_proxy, secured
from tests.harness.servers import serve_tcp
from tests.harness.streams import Wrapped
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    Connector,
    ConnectTimeout,
    Proxy,
    ProxyError,
    ReadTimeout,
)
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "https://0.origin.example/"


# -- A stream of TLS that a connector dialled.


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


# -- Closing that is cancelled.


@pytest.mark.parametrize("tunnels", [1, 0])
async def test_closing_that_is_cancelled_goes_on_for_connections_to_proxies(
    nursery: trio.Nursery, autojump_clock: MockClock, tunnels: int
) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    async with proxy.pool(max_keepalive_connections=None) as pool:
        await pool.request("GET", URL)
        if not tunnels:
            internals(pool)[0].close_soon()
            await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.aclose()
        await trio.sleep(60)
        assert [list(manager) for manager in pool._managers] == [[], []]


@pytest.mark.parametrize("event", ["proxy.connect.complete", "connection.start_tls.started"])
async def test_a_pool_that_a_handler_closes_while_connecting_closes_connections_to_proxies(
    nursery: trio.Nursery, autojump_clock: MockClock, event: str
) -> None:
    async def trace(name: str, info: dict[str, Any]) -> None:
        if name == event:
            await pool.aclose()

    proxy = H2Proxy(nursery, accept_tunnel)
    async with proxy.pool() as pool:
        with pytest.raises(ConnectionNotAvailable):
            await pool.request("GET", URL, extensions={"trace": trace})
        await trio.sleep(60)
        assert [list(manager) for manager in pool._managers] == [[], []]


async def test_a_pool_that_was_closed_under_way_is_not_the_proxys_fault(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def trace(name: str, info: dict[str, Any]) -> None:
        if name == "proxy.connect.started":
            with trio.CancelScope(shield=True):
                await pool.aclose()

    async with Net(nursery, proxied(secured(respond), tls=True)).pool(secure_proxy()) as pool:
        with pytest.raises(ConnectionNotAvailable):
            await pool.request("GET", "https://example.com/", extensions={"trace": trace})


# -- A proxy that is given as text.


@pytest.mark.parametrize("value", ["", b"", bytearray()])
def test_an_empty_text_is_not_no_proxy(value: Any) -> None:
    with pytest.raises(TypeError, match="proxy must be a Proxy"):
        ConnectionPool(proxy=value)


@pytest.mark.parametrize("wrap", [lambda url: url, lambda url: [url], lambda url: {"https": url}])
def test_an_error_about_a_pools_proxy_shows_no_credentials(wrap: Any) -> None:
    with pytest.raises(TypeError, match="proxy must be a Proxy") as info:
        ConnectionPool(proxy=wrap("http://aladdin:hunter2@proxy.example"))
    assert "hunter2" not in str(info.value)


@pytest.mark.parametrize("url", ["http://aladdin:hunter2/x@proxy", "http://aladdin:hunter2#x@proxy"])
def test_an_error_about_a_proxys_url_shows_no_credentials(url: str) -> None:
    with pytest.raises(ValueError, match="percent-encoded") as info:
        Proxy(url)
    assert "hunter2" not in str(info.value)


@pytest.mark.parametrize("url", ["http://aladdin:1234/x@proxy", "http://proxy/path", "http://proxy?query"])
def test_a_proxys_url_has_no_path(url: str) -> None:
    # The first is sent, without a word, to a host called aladdin.
    with pytest.raises(ValueError, match="path"):
        Proxy(url)


# -- A refusal over a connection of HTTP/2 to which nothing can be sent any more.


async def test_a_refusal_is_final_when_the_connection_can_not_be_sent_to(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    clients: list[trio.testing.MemorySendStream] = []

    def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = trio.testing.memory_stream_pair()
        clients.append(client.send_stream)
        return client, server

    async def fail() -> None:
        raise trio.BrokenResourceError("it broke")

    async def refuse(stream: ServerStream) -> None:
        await stream.respond(407)
        clients[0].send_all_hook = fail
        stream.server.peer.h2.ping(b"12345678")
        await stream.server.peer.flush()
        await trio.sleep_forever()

    proxy = H2Proxy(nursery, refuse)
    proxy.connector._stream_pair = pair
    async with proxy.pool() as pool:
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", URL)
    assert info.value.response is not None
    assert info.value.response.status == 407


# -- Errors of handlers that look like the library's own.


async def test_a_handlers_own_proxy_error_about_a_refused_address_comes_out(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def getaddrinfo(*_: object, **__: object) -> Any:
        await trio.lowlevel.checkpoint()
        return [(2, 1, 6, "", (f"192.0.2.{i}", 443)) for i in (1, 2)]

    async def socks(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        await peer.send(b"\x05\x00")
        await peer.receive_some()
        await peer.send(b"\x05\x05\x00\x01" + bytes(6))

    async def trace(name: str, info: dict[str, Any]) -> None:
        events.append(name)
        if name == "socks.connect.failed":
            raise error

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    events: list[str] = []
    error = ProxyError("of a request that the handler made")
    connector = MemoryConnector(nursery, socks)
    async with ConnectionPool(proxy=Proxy("socks5://socks.example"), connector=connector) as pool:
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", URL, extensions={"trace": trace})
    assert info.value is error
    assert events.count("socks.connect.failed") == 1


@pytest.mark.parametrize("error", [ConnectError("the handler's"), ConnectTimeout("the handler's")])
async def test_a_handlers_own_connect_error_is_not_tried_again(
    nursery: trio.Nursery, autojump_clock: MockClock, error: Exception
) -> None:
    calls = 0

    async def trace(name: str, info: dict[str, Any]) -> None:
        nonlocal calls
        if name == "proxy.connect.started":
            calls += 1
            raise error

    async with Net(nursery, proxied(secured(respond))).pool(retries=2) as pool:
        with pytest.raises(type(error)) as info:
            await pool.request("GET", "https://example.com/", extensions={"trace": trace})
    assert info.value is error
    assert calls == 1


# -- An address that means something else in SOCKS4A (0.0.0.x announces a name).


async def test_an_address_that_socks4a_has_another_use_for(nursery: trio.Nursery) -> None:
    asked: list[bytes] = []

    async def socks(peer: ScriptedPeer) -> None:
        asked.append(bytes(await peer.receive_some()))
        await peer.send(b"\0\x5a" + bytes(6))
        await respond(peer)

    connector = MemoryConnector(nursery, socks)
    async with ConnectionPool(proxy=Proxy("socks4a://socks.example"), connector=connector) as pool:
        with pytest.raises(ConnectError):
            await pool.request("GET", "http://0.0.0.5/")
    assert asked == []


# -- An absolute target whose scheme is in upper case (RFC 9110, 4.2.3).


async def test_the_scheme_of_an_absolute_target_is_in_lower_case_over_http2(nursery: trio.Nursery) -> None:
    schemes: list[bytes] = []

    async def script(stream: ServerStream) -> None:
        schemes.append(stream.headers[b":scheme"])
        await stream.respond(200, end=True)

    async with H2Proxy(nursery, script).pool() as pool:
        await pool.request("GET", "http://example.com/", extensions={"target": "HTTP://example.com/"})
    assert schemes == [b"http"]


# -- A proxy that ends its own direction, and goes on reading (over sockets, where this is not a closing).


HALF_CLOSED_AFTER = {
    "http": b"HTTP/1.1 200 OK\r\n\r\n",
    "socks4a": b"\0\x5a" + bytes(6),
    "socks5": b"\5\0\5\0\0\1",
    "socks5h": b"\5\0\5\0\0\1",
}


@pytest.mark.parametrize("scheme", HALF_CLOSED_AFTER)
@pytest.mark.parametrize("said", [0, 1, 3, 11])
async def test_a_proxy_that_half_closes(nursery: trio.Nursery, scheme: str, said: int) -> None:
    send_left, receive_left = trio.open_memory_channel[None](2)

    async def serve(peer: ScriptedPeer) -> None:
        try:
            if said:
                await peer.receive_some(1)
                await peer.send(HALF_CLOSED_AFTER[scheme][:said])
            await peer.send_eof()
            while await peer.receive_some():
                pass
        finally:
            send_left.send_nowait(None)

    before = open_sockets()
    async with trio.open_nursery() as servers:
        server = await serve_tcp(servers, serve)
        proxy = Proxy(f"{scheme}://127.0.0.1:{server.port}")
        async with ConnectionPool(proxy=proxy, max_connections=1) as pool:
            for _ in range(2):
                # SOCKS4A is granted with eight bytes, and then it is the origin's TLS that ends early.
                with pytest.raises((ProxyError, ConnectError)) as info:
                    await pool.request("GET", "https://127.0.0.1/")
                assert isinstance(info.value, ProxyError) or (scheme, said) == ("socks4a", 11)
                # The pool has closed the connection without waiting for the proxy to do so.
                await receive_left.receive()
                assert_unharmed(pool)
        servers.cancel_scope.cancel()
    assert open_sockets() == before
