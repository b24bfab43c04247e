from __future__ import annotations

import contextlib
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import h2.connection
import h2.events
import h11
import pytest
import trio
import trio.testing
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from trio.testing import MockClock

from tests.harness.certificates import TLS, make_tls, new_tls
from tests.harness.peers import respond
from trio_exchange import (
    ConnectError,
    ConnectionPool,
    Headers,
    Proxy,
    ReadTimeout,
    RemoteProtocolError,
)
from trio_exchange.testing import Dialled, HTTP2Peer, MemoryConnector, PeerRequest, ScriptedPeer

URL = "http://example.com/"


async def a_pair() -> tuple[trio.abc.HalfCloseableStream, ScriptedPeer]:
    client, server = trio.testing.memory_stream_pair()
    return client, ScriptedPeer(server)


# -- The peer's receiving.


async def test_a_request_is_received_whole() -> None:
    client, peer = await a_pair()
    await client.send_all(b"POST /a?b HTTP/1.1\r\nHost: x\r\nA: 1\r\na: 2\r\nContent-Length: 3\r\n\r\nabc")
    request = await peer.receive_request()
    headers = [(b"host", b"x"), (b"a", b"1"), (b"a", b"2"), (b"content-length", b"3")]
    assert request == PeerRequest(b"POST", b"/a?b", Headers(headers), b"abc")
    assert request.header(b"a") == b"1"
    assert request.header("A") == b"1"
    assert request.headers.get_all("A") == [b"1", b"2"]
    assert request.header(b"b") is None


async def test_head_and_body_apart() -> None:
    client, peer = await a_pair()
    await client.send_all(b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert (await peer.receive_head()).body == b""
    await client.send_all(b"1\r\na\r\n")
    assert await peer.receive_chunk() == b"a"
    await client.send_all(b"2\r\nbc\r\n1\r\nd\r\n0\r\n\r\n")
    assert await peer.receive_body() == b"bcd"
    assert await peer.receive_chunk() == b""


async def test_requests_one_after_another_until_the_client_closes() -> None:
    client, peer = await a_pair()
    await client.send_all(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % 1 + b"GET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
    await client.send_eof()
    assert [request.target async for request in peer] == [b"/1", b"/2"]
    with pytest.raises(EOFError):
        await peer.receive_request()


@pytest.mark.parametrize(
    "nonsense",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHo", b"PUT / HTTP/1.0\r\nContent-Length: 9\r\n\r\nab"],
)
async def test_a_request_that_is_none(nonsense: bytes) -> None:
    client, peer = await a_pair()
    await client.send_all(nonsense)
    await client.send_eof()
    with pytest.raises(h11.RemoteProtocolError):
        await peer.receive_request()


async def test_raw_bytes_begin_with_those_that_came_along_with_a_request() -> None:
    client, peer = await a_pair()
    await client.send_all(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\nabcde")
    await peer.receive_request()
    assert await peer.receive_some(2) == b"ab"
    assert await peer.receive_some() == b"cde"
    await client.send_all(b"f")
    assert await peer.receive_some() == b"f"
    await client.aclose()
    assert await peer.receive_some() == b""


async def test_a_head_of_any_size_is_received() -> None:
    client, peer = await a_pair()
    await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 2_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.receive_request)
        await trio.testing.wait_all_tasks_blocked()
        await client.send_all(b"\r\n\r\n")


# -- Its sending.


@pytest.mark.parametrize(
    ("status", "headers", "body", "sent"),
    [
        (200, [], b"abc", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"),
        (404, [(b"A", b"b")], b"", b"HTTP/1.1 404 Not Found\r\nA: b\r\nContent-Length: 0\r\n\r\n"),
        (200, [(b"content-Length", b"9")], b"", b"HTTP/1.1 200 OK\r\ncontent-Length: 9\r\n\r\n"),
        (
            200,
            [(b"Transfer-Encoding", b"chunked")],
            b"0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (204, [], b"", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (304, [], b"", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
        (103, [], b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (799, [], b"", b"HTTP/1.1 799 \r\nContent-Length: 0\r\n\r\n"),
        (404, [("A", "b")], b"", b"HTTP/1.1 404 Not Found\r\nA: b\r\nContent-Length: 0\r\n\r\n"),
        (200, {"content-length": "9"}, b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"),
    ],
)
async def test_responses(status: int, headers: Any, body: bytes, sent: bytes) -> None:
    client, peer = await a_pair()
    await peer.send_response(status, headers, body)
    await peer.aclose()
    assert await client.receive_some() == sent


async def test_headers_of_a_response_that_are_none() -> None:
    _, peer = await a_pair()
    with pytest.raises(TypeError, match="headers must be a mapping or a sequence of pairs, but got bytes"):
        await peer.send_response(200, b"body")  # type: ignore[arg-type]


async def test_byte_by_byte_every_byte_arrives_alone() -> None:
    client, peer = await a_pair()
    received = []

    async def receive() -> None:
        async for chunk in client:
            received.append(chunk)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await peer.send(b"abc", byte_by_byte=True)
        await peer.send(b"def")
        await peer.send_eof()
    assert received == [b"a", b"b", b"c", b"def"]


async def test_tls(nursery: trio.Nursery) -> None:
    tls = make_tls()

    async def script(peer: ScriptedPeer) -> None:
        await peer.start_tls(tls.server)
        with pytest.raises(NotImplementedError):
            await peer.send_eof()
        await respond(peer)

    connector = MemoryConnector(nursery, script)
    async with ConnectionPool(connector=connector, ssl_context=tls.client) as pool:
        response = await pool.request("PUT", "https://example.com/", content=b"abc")
    assert response.content == b"abc"
    assert connector.dialled == [Dialled(("example.com", 443), {})]


def test_certificates_are_made_once() -> None:
    assert isinstance(make_tls(), TLS)
    assert make_tls() is make_tls()


# -- The connector.


async def test_it_records_whom_it_was_asked_for(nursery: trio.Nursery) -> None:
    connector = MemoryConnector(nursery, respond)
    options = [(1, 2, 3)]
    async with ConnectionPool(connector=connector, local_address="127.0.0.2", socket_options=options) as pool:
        await pool.request("GET", "http://one.example/")
        await pool.request("GET", "http://two.example:81/")
    async with ConnectionPool(connector=connector, uds="/a/b", socket_options=options) as pool:
        await pool.request("GET", URL)
    given = {"local_address": "127.0.0.2", "socket_options": ((1, 2, 3),)}
    assert connector.dialled == [
        Dialled(("one.example", 80), given),
        Dialled(("two.example", 81), given),
        Dialled("/a/b", {"socket_options": ((1, 2, 3),)}),
    ]
    assert len(connector.peers) == 3


async def test_failures_are_raised_in_order_then_it_connects(nursery: trio.Nursery) -> None:
    connector = MemoryConnector(nursery, respond)
    connector.failures = [OSError("first"), KeyError("second")]
    async with ConnectionPool(connector=connector) as pool:
        with pytest.raises(ConnectError, match="first"):
            await pool.request("GET", URL)
        with pytest.raises(KeyError, match="second"):
            await pool.request("GET", URL)
        assert (await pool.request("GET", URL)).status == 200
    assert len(connector.dialled) == 3
    assert len(connector.peers) == 1


async def test_a_gate_holds_it_up(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    connector = MemoryConnector(nursery, respond)
    connector.gate = trio.Event()
    async with ConnectionPool(connector=connector) as pool:
        with trio.move_on_after(5) as scope:
            await pool.request("GET", URL)
        assert scope.cancelled_caught
        connector.gate.set()
        await pool.request("GET", URL)
    assert len(connector.dialled) == 2


async def test_the_connection_ends_with_the_script(nursery: trio.Nursery) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.send(b"bye")

    stream = await MemoryConnector(nursery, script).connect_tcp("x", 1)
    await trio.testing.wait_all_tasks_blocked()
    assert await stream.receive_some() == b"bye"
    assert await stream.receive_some() == b""


async def test_a_script_that_sends_to_nobody_just_ends() -> None:
    ended = []

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        try:
            await peer.send(b"anybody there?")
        finally:
            ended.append(True)

    async with trio.open_nursery() as nursery:
        stream = await MemoryConnector(nursery, script).connect_tcp("x", 1)
        await stream.aclose()
    assert ended == [True]


async def test_what_a_script_raises_ends_the_nursery() -> None:
    async def script(peer: ScriptedPeer) -> None:
        raise AssertionError("the client did something wrong")

    with pytest.RaisesGroup(pytest.RaisesExc(AssertionError, match="something wrong")):
        async with trio.open_nursery() as nursery:
            await MemoryConnector(nursery, script).connect_tcp("x", 1)
            await trio.sleep_forever()


async def test_another_pair_of_streams(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await trio.sleep_forever()

    connector = MemoryConnector(nursery, script, stream_pair=trio.testing.lockstep_stream_pair)
    stream = await connector.connect_unix_socket("x")
    with trio.move_on_after(1) as scope:
        await stream.send_all(b"nobody receives this")
    assert scope.cancelled_caught


# -- TLS of the connector's own.


async def tell_tls(peer: ScriptedPeer) -> None:
    """Answer with the scheme that the connection is for."""
    async for _ in peer:
        body = b"https" if isinstance(peer.stream, trio.SSLStream) else b"http"
        await peer.send_response(200, body=body)


def trusting_pool(connector: MemoryConnector, **options: Any) -> ConnectionPool:
    return ConnectionPool(connector=connector, ssl_context=connector.ssl_context, **options)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/",
        "http://example.com/",
        "https://example.com:80/",
        "http://example.com:443/",
        "https://b\u00fccher.example/",
        "https://example.com./",
        "https://localhost:8443/",
        "https://192.0.2.7/",
        "https://[2001:db8::7]/",
        "https://[fe80::7%25eth0]/",
    ],
)
async def test_tls_is_answered_where_the_client_starts_it(nursery: trio.Nursery, url: str) -> None:
    connector = MemoryConnector(nursery, tell_tls)
    async with trusting_pool(connector) as pool:
        response = await pool.request("GET", url)
    assert response.content == url.encode().partition(b":")[0]


async def test_one_connector_is_many_servers(nursery: trio.Nursery) -> None:
    connector = MemoryConnector(nursery, tell_tls)
    async with trusting_pool(connector) as pool:
        for url in ("https://one.example/", "http://one.example/", "https://two.example/"):
            assert (await pool.request("GET", url)).status == 200
        sni = {"sni_hostname": "three.example"}
        assert (await pool.request("GET", "https://192.0.2.7/", extensions=sni)).content == b"https"
    assert connector.ssl_context is connector.ssl_context


async def test_wss(nursery: trio.Nursery) -> None:
    async def upgrade(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send_response(101, [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")])
        await peer.send(await peer.receive_some())

    headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
    async with (
        trusting_pool(MemoryConnector(nursery, upgrade)) as pool,
        pool.stream("GET", "wss://chat.example.com/", headers=headers) as response,
    ):
        stream = response.extensions["network_stream"]
        await stream.write(b"abc")
        assert await stream.read() == b"abc"


async def test_a_pool_without_the_connectors_ssl_context(client_context: ssl.SSLContext) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            connector = MemoryConnector(nursery, serve)
            async with ConnectionPool(client_context, connector=connector) as pool:
                await pool.request("GET", "https://example.com/")

    with pytest.raises(ExceptionGroup) as info:
        await run()
    (error,) = info.value.exceptions
    assert isinstance(error, h11.RemoteProtocolError)
    assert str(error).startswith("the client begins with TLS: give the connector's ssl_context to the pool")


async def test_https_over_a_unix_socket(nursery: trio.Nursery) -> None:
    async with trusting_pool(MemoryConnector(nursery, tell_tls), uds="/run/x") as pool:
        assert (await pool.request("GET", "https://example.com/")).content == b"https"


async def test_who_does_not_trust_the_authority_gets_no_connection(nursery: trio.Nursery) -> None:
    played: list[ScriptedPeer] = []

    async def script(peer: ScriptedPeer) -> None:
        played.append(peer)

    connector = MemoryConnector(nursery, script)
    assert connector.ssl_context.check_hostname
    async with ConnectionPool(connector=connector, ssl_context=new_tls("x").client) as pool:
        with pytest.raises(ConnectError, match=r"certificate of example\.com could not be verified"):
            await pool.request("GET", "https://example.com/")
    await trio.testing.wait_all_tasks_blocked()
    assert not played


async def test_a_name_that_no_certificate_can_have() -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(UnicodeError, match="my_service"), flatten_subgroups=True):
        async with trio.open_nursery() as nursery, trusting_pool(MemoryConnector(nursery, respond)) as pool:
            await pool.request("GET", "https://my_service/")


async def test_the_peer_chooses_http11_where_http2_is_offered_too(nursery: trio.Nursery) -> None:
    async with trusting_pool(MemoryConnector(nursery, tell_tls), http2=True) as pool:
        response = await pool.request("GET", "https://example.com/")
        assert response.extensions["http_version"] == b"HTTP/1.1"
        tls = response.extensions["network_stream"].get_extra_info("ssl_object")
        assert tls.selected_alpn_protocol() == "http/1.1"


async def test_the_peer_chooses_what_it_is_told_to(nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        server = HTTP2Peer(peer.stream)
        async for request in server:
            await server.send_response(request, body=b"abc")

    connector = MemoryConnector(nursery, serve, alpn_protocols=["h2", "http/1.1"])
    async with trusting_pool(connector, http2=True) as pool:
        response = await pool.request("GET", "https://example.com/")
    assert response.extensions["http_version"] == b"HTTP/2"
    assert response.content == b"abc"


async def test_a_script_that_answers_before_it_receives(nursery: trio.Nursery) -> None:
    async def refuse(peer: ScriptedPeer) -> None:
        await peer.send_response(503, [(b"Connection", b"close")])
        await peer.receive_request()

    connector = MemoryConnector(nursery, refuse)
    async with trusting_pool(connector) as pool:
        for url in ("https://example.com/", URL):
            assert (await pool.request("GET", url)).status == 503


async def test_a_script_that_never_answers_does_not_keep_the_handshake_waiting(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def hang(peer: ScriptedPeer) -> None:
        await trio.sleep(1000)

    timeout = {"connect": 5, "read": 60}
    async with trusting_pool(MemoryConnector(nursery, hang)) as pool:
        start = trio.current_time()
        with pytest.raises(ReadTimeout):
            await pool.request("GET", "https://example.com/", extensions={"timeout": timeout})
        assert trio.current_time() - start == 60


async def test_without_tls_the_server_may_speak_first(nursery: trio.Nursery) -> None:
    async def greet(peer: ScriptedPeer) -> None:
        await peer.send(b"220 ready\r\n")
        assert await peer.receive_some() == b"QUIT\r\n"

    async with (
        trusting_pool(MemoryConnector(nursery, greet)) as pool,
        await pool.open_tcp_stream("mail.example.com", 25) as stream,
    ):
        assert await stream.read() == b"220 ready\r\n"
        await stream.write(b"QUIT\r\n")
        assert await stream.read() == b""


async def test_the_clients_end_can_be_closed_one_way(nursery: trio.Nursery) -> None:
    async def script(peer: ScriptedPeer) -> None:
        assert await peer.receive_some() == b""
        await peer.send(b"bye")

    connector = MemoryConnector(nursery, script)
    assert connector.ssl_context is not None
    stream = await connector.connect_tcp("x", 1)
    assert isinstance(stream, trio.abc.HalfCloseableStream)
    await stream.wait_send_all_might_not_block()
    await stream.send_eof()
    assert await stream.receive_some() == b"bye"
    # The next connection is closed before anything else happens on it.
    async with await connector.connect_tcp("x", 1):
        pass


async def test_the_clients_end_can_be_closed_one_way_only_if_the_stream_can(nursery: trio.Nursery) -> None:
    def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = trio.testing.memory_stream_pair()
        return trio.SSLStream(client, make_tls().client, server_hostname="localhost"), server

    async def script(peer: ScriptedPeer) -> None:
        pass

    connector = MemoryConnector(nursery, script, stream_pair=pair)
    assert connector.ssl_context is not None
    stream = await connector.connect_tcp("x", 1)
    assert isinstance(stream, trio.abc.HalfCloseableStream)
    with pytest.raises(NotImplementedError):
        await stream.send_eof()
    await trio.aclose_forcefully(stream)


async def test_tls_in_a_tunnel(nursery: trio.Nursery) -> None:
    async def proxy(peer: ScriptedPeer) -> None:
        assert (await peer.receive_request()).target == b"example.com:443"
        await peer.send_response(200, [(b"Content-Length", b"0")])
        await peer.start_tls()
        await tell_tls(peer)

    connector = MemoryConnector(nursery, proxy)
    for proxy_url in ("http://proxy.example.com:3128", "https://proxy.example.com"):
        own = connector.ssl_context if proxy_url.startswith("https") else None
        async with trusting_pool(connector, proxy=Proxy(proxy_url, ssl_context=own)) as pool:
            assert (await pool.request("GET", "https://example.com/")).content == b"https"


async def test_a_peer_without_a_connector_has_a_certificate_too() -> None:
    async with trio.open_nursery() as nursery:
        context = MemoryConnector(nursery, respond).ssl_context
        client, peer = await a_pair()
        nursery.start_soon(peer.start_tls)
        tls = trio.SSLStream(client, context, server_hostname="localhost")
        await tls.do_handshake()


def test_without_trustme_there_is_a_hint_once_tls_is_asked_for() -> None:
    code = """
import sys
sys.modules["trustme"] = None
import trio
from trio_exchange.testing import MemoryConnector

async def main():
    async with trio.open_nursery() as nursery:
        connector = MemoryConnector(nursery, None)
        try:
            connector.ssl_context
        except ImportError as exc:
            print(exc)

trio.run(main)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("pip install 'trio-exchange[testing]'")


# -- The HTTP/2 peer.

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@contextlib.asynccontextmanager
async def http2_client(
    nursery: trio.Nursery,
    script: Callable[[HTTP2Peer], Awaitable[object]],
    settings: dict[SettingCodes, int] | None = None,
    **options: Any,
) -> AsyncIterator[ConnectionPool]:
    """A pool whose connections are HTTP/2 peers, by prior knowledge."""

    async def serve(peer: ScriptedPeer) -> None:
        await script(HTTP2Peer(peer.stream, settings))

    connector = MemoryConnector(nursery, serve, **options)
    # What would wait for ever fails, at once where the clock jumps.
    with trio.fail_after(100):
        async with ConnectionPool(http1=False, http2=True, connector=connector) as pool:
            yield pool


async def respond_http2(peer: HTTP2Peer) -> None:
    async for request in peer:
        await peer.send_response(request, body=request.body)


async def test_http2_requests_are_received_whole(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    requests: list[PeerRequest] = []

    async def script(peer: HTTP2Peer) -> None:
        async for request in peer:
            requests.append(request)
            trailers = [(b"c", b"d")]
            await peer.send_response(request, 201, {"A": "b"}, request.body, trailers=trailers)

    async with http2_client(nursery, script) as pool:
        for content in (b"", b"abc" * 100_000):
            response = await pool.request("POST", URL + "a?b", headers={"X": "y"}, content=content)
            assert (response.status, response.headers) == (201, [(b"a", b"b")])
            assert response.content == content
            assert response.extensions["trailing_headers"] == [(b"c", b"d")]
            assert response.extensions["http_version"] == b"HTTP/2"
    assert [request.stream_id for request in requests] == [1, 3]
    pseudo = [(b":method", b"POST"), (b":authority", b"example.com"), (b":scheme", b"http")]
    fields = [(b":path", b"/a?b"), (b"x", b"y"), (b"content-length", b"0")]
    assert requests[0] == PeerRequest(b"POST", b"/a?b", Headers([*pseudo, *fields]), b"", 1)
    assert requests[1].header(":authority") == b"example.com"


async def test_http2_over_the_connectors_tls(nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await respond_http2(HTTP2Peer(peer.stream))

    connector = MemoryConnector(nursery, serve, alpn_protocols=["h2"])
    async with trusting_pool(connector, http2=True) as pool:
        response = await pool.request("PUT", "https://example.com/", content=b"abc")
        assert (response.content, response.extensions["http_version"]) == (b"abc", b"HTTP/2")


async def test_http2_requests_are_answered_in_any_order(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def script(peer: HTTP2Peer) -> None:
        requests = [await peer.receive_request() for _ in range(3)]
        for request in reversed(requests):
            await peer.send_response(request, body=request.target)
        await respond_http2(peer)

    answered: list[bytes | None] = []

    async def request(path: str) -> None:
        response = await pool.request("GET", f"http://example.com/{path}")
        assert response.content == f"/{path}".encode()
        answered.append(response.content)

    async with http2_client(nursery, script) as pool, trio.open_nursery() as requests:
        for path in "abc":
            requests.start_soon(request, path)
            await trio.testing.wait_all_tasks_blocked()
    assert answered == [b"/c", b"/b", b"/a"]


@pytest.mark.parametrize("pair", [trio.testing.memory_stream_pair, trio.testing.lockstep_stream_pair])
async def test_an_http2_peer_may_answer_each_request_in_a_task(
    nursery: trio.Nursery, autojump_clock: MockClock, pair: Any
) -> None:
    """Their sends, and their waits for larger windows, come together."""
    large = bytes(range(256)) * 4000

    async def script(peer: HTTP2Peer) -> None:
        async def answer(request: PeerRequest) -> None:
            await peer.send_response(request, end=False)
            assert await peer.receive_body(request) == large
            await peer.send_data(request, large)
            await peer.send_data(request, b"", end=True)

        async with trio.open_nursery() as answers:
            with contextlib.suppress(EOFError):
                while True:
                    answers.start_soon(answer, await peer.receive_head())

    async def request() -> None:
        assert (await pool.request("POST", URL, content=large)).content == large

    async with http2_client(nursery, script, stream_pair=pair) as pool, trio.open_nursery() as requests:
        for _ in range(5):
            requests.start_soon(request)


async def test_an_http2_response_piece_by_piece(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def script(peer: HTTP2Peer) -> None:
        request = await peer.receive_head()
        await peer.send_interim(request, 103, [(b"link", b"x")])
        await peer.send_response(request, end=False)
        while chunk := await peer.receive_chunk(request):
            await peer.send_data(request, chunk.upper())
        assert await peer.receive_chunk(request) == b""
        await peer.send_trailers(request, {"a": "b"})
        await respond_http2(peer)

    async with http2_client(nursery, script) as pool:
        response = await pool.request("POST", URL, content=[b"abc", b"", b"def"])
        assert response.content == b"ABCDEF"
        assert response.extensions["trailing_headers"] == [(b"a", b"b")]


async def test_an_http2_tunnel(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def script(peer: HTTP2Peer) -> None:
        request = await peer.receive_head()
        assert (request.method, request.target) == (b"CONNECT", b"other.example:22")
        await peer.send_response(request, end=False)
        await peer.send_data(request, await peer.receive_chunk(request), end=True)
        assert await peer.receive_chunk(request) == b""
        await respond_http2(peer)

    async with http2_client(nursery, script) as pool:
        target = {"target": "other.example:22"}
        async with pool.stream("CONNECT", URL, extensions=target) as response:
            stream = response.extensions["network_stream"]
            await stream.write(b"ping")
            assert await stream.read() == b"ping"
            assert await stream.read() == b""


async def test_an_http2_peer_resets_and_refuses(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def script(peer: HTTP2Peer) -> None:
        await peer.send_reset(await peer.receive_request())
        await peer.send_reset(await peer.receive_request(), ErrorCodes.REFUSED_STREAM)
        await respond_http2(peer)

    async with http2_client(nursery, script) as pool:
        with pytest.raises(RemoteProtocolError, match="INTERNAL_ERROR"):
            await pool.request("GET", URL)
        # A refused request is sent again.
        assert (await pool.request("POST", URL, content=b"again")).content == b"again"
        assert pool.statistics().connections_opened == 1


async def test_an_http2_peer_answers_what_it_has_after_goaway(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    first = True

    async def script(peer: HTTP2Peer) -> None:
        nonlocal first
        if first:
            first = False
            request = await peer.receive_request()
            await peer.send_goaway(debug_data=b"maintenance")
            await trio.testing.wait_all_tasks_blocked()
            await peer.send_response(request, body=b"the last")
        await respond_http2(peer)

    async with http2_client(nursery, script) as pool:
        assert (await pool.request("GET", URL)).content == b"the last"
        assert (await pool.request("PUT", URL, content=b"a")).content == b"a"
        assert pool.statistics().connections_opened == 2


async def test_http2_requests_that_goaway_leaves_out_are_sent_elsewhere(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    served: list[bytes] = []

    async def script(peer: HTTP2Peer) -> None:
        request = await peer.receive_request()
        served.append(request.target)
        if len(served) == 1:
            await peer.send_goaway(ErrorCodes.ENHANCE_YOUR_CALM, last_stream_id=0)
        else:
            await peer.send_response(request)

    async with http2_client(nursery, script) as pool:
        assert (await pool.request("POST", URL)).status == 200
    assert served == [b"/", b"/"]


async def test_settings_and_pings_of_an_http2_peer(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def script(peer: HTTP2Peer) -> None:
        request = await peer.receive_request()
        # Those that the peer began with.
        await peer.receive_event(h2.events.SettingsAcknowledged)
        assert peer.h2.local_settings.max_concurrent_streams == 1
        await peer.send_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 2})
        changed = await peer.receive_event(h2.events.SettingsAcknowledged)
        assert changed.changed_settings[SettingCodes.MAX_CONCURRENT_STREAMS].new_value == 2
        await peer.send_ping(b"12345678")
        assert (await peer.receive_event(h2.events.PingAckReceived)).ping_data == b"12345678"
        await peer.send_response(request)
        with pytest.raises(EOFError):
            await peer.receive_request()

    async with http2_client(nursery, script, {SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as pool:
        assert (await pool.request("GET", URL)).status == 200


async def test_an_http2_peer_sends_any_bytes(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async def script(peer: HTTP2Peer) -> None:
        request = await peer.receive_request()
        # A response with an invalid header, which h2 refuses to send.
        block = peer.h2.encoder.encode([(b":status", b"200"), (b"UPPER", b"x")])
        frame = b"%b\1\5%b%b" % (len(block).to_bytes(3, "big"), (1).to_bytes(4, "big"), block)
        await peer.send(frame, byte_by_byte=True)
        reset = await peer.receive_event(h2.events.StreamReset, request)
        assert reset.error_code == ErrorCodes.PROTOCOL_ERROR

    async with http2_client(nursery, script) as pool:
        with pytest.raises(RemoteProtocolError, match="UPPER"):
            await pool.request("POST", URL)


async def test_http2_requests_that_the_client_has_reset_are_left_out(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    received: list[bytes] = []

    async def script(peer: HTTP2Peer) -> None:
        async for request in peer:
            received.append(request.target)
            # The next one has come and gone when this one is answered.
            await trio.sleep(10)
            await peer.send_response(request)

    async def endless() -> AsyncIterator[bytes]:
        yield b"x"
        await trio.sleep_forever()

    async def give_up(method: str, content: Any) -> None:
        with trio.move_on_after(1) as scope:
            await pool.request(method, URL + "short", content=content)
        assert scope.cancelled_caught

    async with http2_client(nursery, script) as pool, trio.open_nursery() as requests:
        requests.start_soon(pool.request, "GET", URL + "long")
        await trio.testing.wait_all_tasks_blocked()
        requests.start_soon(give_up, "GET", b"")
        requests.start_soon(give_up, "POST", endless())
        await trio.sleep(5)
        assert (await pool.request("GET", URL + "last")).status == 200
        assert pool.statistics().connections_opened == 1
    assert received == [b"/long", b"/last"]


async def test_what_an_http2_peer_sends_to_a_client_that_has_given_up(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def script(peer: HTTP2Peer) -> None:
        request = await peer.receive_head()
        with pytest.raises(trio.BrokenResourceError, match="has reset stream 1, with error code 8"):
            await peer.send_response(request, body=bytes(1_000_000))
        for send in (
            peer.send_response(request),
            peer.send_data(request, b""),
            peer.send_data(request, b"", end=True),
            peer.send_trailers(1, ()),
            peer.send_interim(request, 103),
            peer.send_reset(request),
        ):
            with pytest.raises(trio.BrokenResourceError, match="has reset stream 1"):
                await send
        large = await peer.receive_request()
        with pytest.raises(trio.BrokenResourceError, match="the client has closed the connection"):
            await peer.send_response(large, body=bytes(1_000_000))
        with pytest.raises(trio.BrokenResourceError, match="the client has closed the connection"):
            await peer.send_trailers(large, ())

    async with http2_client(nursery, script) as pool:
        async with pool.stream("GET", URL) as response:
            assert response.status == 200
        async with pool.stream("GET", URL) as response:
            assert response.status == 200
            await pool.aclose()


async def test_an_http2_peer_receives_empty_frames_and_the_end_of_the_connection() -> None:
    client, server = trio.testing.memory_stream_pair()
    peer = HTTP2Peer(server)
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    fields = [(":method", "PUT"), (":authority", "x"), (":scheme", "http"), (":path", "/")]
    connection.send_headers(1, fields)
    for data in (b"", b"a", b"", b"b"):
        connection.send_data(1, data, end_stream=data == b"b")
    await client.send_all(connection.data_to_send())
    await client.send_eof()
    request = await peer.receive_request()
    assert request.body == b"ab"
    with pytest.raises(trio.BrokenResourceError, match="the client has closed the connection"):
        await peer.send_response(request, body=bytes(100_000))
    assert [request async for request in peer] == []


async def test_a_client_that_violates_http2_fails_the_script() -> None:
    client, server = trio.testing.memory_stream_pair()
    peer = HTTP2Peer(server)
    await client.send_all(PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\1\0\0\0\0\0\1x")
    with pytest.raises(ProtocolError):
        await peer.receive_request()


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01"])
async def test_a_client_that_does_not_speak_http2(first: bytes) -> None:
    client, server = trio.testing.memory_stream_pair()
    await client.send_all(first)
    with pytest.raises(ProtocolError, match=r"does not speak HTTP/2, but begins with b'.*give http2=True"):
        await HTTP2Peer(server).receive_request()


async def test_an_http2_peer_closes_its_connection() -> None:
    client, server = trio.testing.memory_stream_pair()
    async with HTTP2Peer(server) as peer:
        await peer.send_ping()
    received = await client.receive_some()
    assert received[3:5] == b"\4\0"
    assert received[-17:] == b"\0\0\x08\6\0\0\0\0\0" + bytes(8)
    assert await client.receive_some() == b""


async def test_a_request_of_http11_has_no_stream() -> None:
    _, server = trio.testing.memory_stream_pair()
    request = PeerRequest(b"GET", b"/", Headers())
    with pytest.raises(TypeError, match="it was not received over HTTP/2"):
        await HTTP2Peer(server).send_response(request)
