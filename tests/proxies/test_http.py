from __future__ import annotations

import base64
import contextlib
import itertools
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from trio.testing import MockClock

from tests.harness.certificates import make_tls
from tests.harness.checks import assert_unharmed, open_sockets
from tests.harness.peers import DELIVERIES, Script, reset, respond, swallow
from tests.harness.proxies import (
    ESTABLISHED,
    ORIGIN,
    PASSWORD,
    PROXY,
    SECURE_PROXY,
    USER,
    Net,
    assert_no_secrets,
    fail,
    in_turn,
    noting,
    proxied,
    proxy_tls,
    secure_proxy,
    secured,
)
from tests.harness.servers import serve_tcp
from tests.harness.streams import Wrapped, read_exactly
from tests.harness.traces import Events, both_ends
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    ConnectTimeout,
    LocalProtocolError,
    PoolTimeout,
    Proxy,
    ProxyError,
    ReadError,
    RemoteProtocolError,
    Response,
)
from trio_exchange.testing import Dialled, MemoryConnector, PeerRequest, ScriptedPeer

CREDENTIALS = base64.b64encode(b"aladdin:hunter2")
AUTHORIZATION = b"Proxy-Authorization: Basic " + CREDENTIALS + b"\r\n"


async def refused(pool: ConnectionPool, url: str = ORIGIN, **more: Any) -> ProxyError:
    with pytest.raises(ProxyError) as info:
        await pool.request("GET", url, **more)
    return info.value


def answer_of(error: ProxyError) -> Response:
    assert error.response is not None
    return error.response


# -- Arguments.


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("ftp://proxy", "a proxy's scheme must be one of http, https, .*, not 'ftp'"),
        ("proxy:3128", "a proxy's scheme must be one of .*, not 'proxy'"),
        ("//proxy", "a proxy's scheme must be one of .*, not ''"),
        ("ws://proxy", "a proxy's scheme must be one of .*, not 'ws'"),
        ("http://:3128", "a proxy's URL must have a host"),
        ("http:///", "a proxy's URL must have a host"),
        ("http://us%3Aer:hunter2@proxy", "can't have a colon"),
        ("http://aladdin:hunter2/x@proxy", "percent-encoded"),
        ("http://aladdin:hunter2#x@proxy", "percent-encoded"),
        # This would be sent, without a word, to a host called aladdin.
        ("http://aladdin:1234/x@proxy", "path"),
        ("http://proxy/path", "path"),
        ("http://proxy?query", "path"),
    ],
)
def test_a_url_that_is_no_proxys(url: str, error: str) -> None:
    with pytest.raises(ValueError, match=error) as info:
        Proxy(url)
    assert "hunter2" not in str(info.value)


LONG = "x" * 256


@pytest.mark.parametrize(
    ("scheme", "user", "password"),
    [
        ("http", "us:er", "hunter2"),
        ("https", "us:er", "hunter2"),
        ("socks5", "", "hunter2"),
        ("socks5h", LONG, "hunter2"),
        ("socks5", "user", "hunter2" + LONG),
        ("socks4", "user", "hunter2"),
        ("socks4a", "user", "hunter2"),
        ("socks4", "us\0er", ""),
    ],
)
def test_credentials_that_can_not_be_sent(scheme: str, user: str, password: str) -> None:
    with pytest.raises(ValueError, match="user name") as info:
        Proxy(f"{scheme}://proxy", (user, password))
    assert "hunter2" not in str(info.value)


@pytest.mark.parametrize(
    ("scheme", "user", "password"),
    [
        ("http", "", ""),
        ("https", LONG, "a:b" + LONG),
        ("socks5", "x" * 255, "y" * 255),
        ("socks5h", "user", ""),
        ("socks4", "user", ""),
        ("socks4a", LONG, ""),
    ],
)
def test_credentials_at_the_limits(scheme: str, user: str, password: str) -> None:
    assert Proxy(f"{scheme}://proxy", (user, password)).auth == (user.encode(), password.encode())


@pytest.mark.parametrize(
    ("auth", "headers", "error"),
    [
        (None, [("X", "a\r\nY: b")], None),
        (None, [("X", "a\nb")], None),
        (None, [("X", "a\0b")], None),
        (None, [("X", " a")], None),
        (None, [("X Y", "a")], None),
        (None, [("X:", "a")], None),
        (None, [("", "a")], None),
        (None, [("Content-Length", "5")], None),
        (None, [("transfer-encoding", "chunked")], None),
        (("user", "password"), {"proxy-authorization": "Basic x"}, "only one header"),
        (None, [("Proxy-Authorization", "a"), ("Proxy-Authorization", "b")], "only one header"),
        (None, [("Host", "a"), ("host", "b")], "only one header"),
    ],
)
def test_proxy_headers_that_can_not_be_sent(auth: Any, headers: Any, error: str | None) -> None:
    with pytest.raises(LocalProtocolError, match=error):
        Proxy(PROXY, auth, headers)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("http2", value, "http2 must be True or False") for value in (1, 0, None, "yes")]
    + [
        ("ssl_context", value, r"ssl_context must be an ssl\.SSLContext or None")
        for value in (True, "context", ssl.SSLContext)
    ],
)
def test_an_option_of_the_wrong_type(name: str, value: Any, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        Proxy(PROXY, **{name: value})


SECRET_URL = "http://aladdin:hunter2@proxy.example"


@pytest.mark.parametrize(
    "value",
    [
        *(PROXY, PROXY.encode(), [PROXY], [Proxy(PROXY), PROXY], {"http": Proxy(PROXY)}, {}, 1, {PROXY}),
        # An empty text is not the absence of proxies.
        *("", b"", bytearray()),
        *(SECRET_URL, [SECRET_URL], {"https": SECRET_URL}),
    ],
)
def test_a_pools_proxy_of_the_wrong_type(value: Any) -> None:
    with pytest.raises(TypeError, match="proxy must be a Proxy, a sequence of them, or None") as info:
        ConnectionPool(proxy=value)
    assert "hunter2" not in str(info.value)


@pytest.mark.parametrize("proxy", [None, [], ()])
async def test_no_proxies_is_the_direct_way(nursery: trio.Nursery, proxy: Any) -> None:
    connector = MemoryConnector(nursery, respond)
    async with ConnectionPool(proxy=proxy, connector=connector) as pool:
        await pool.request("GET", "http://example.com/")
        assert len(pool._managers) == 1
    assert connector.dialled == [Dialled(("example.com", 80), {})]


@pytest.mark.parametrize("make", [lambda proxy: proxy, lambda proxy: [proxy], lambda proxy: (proxy,)])
async def test_one_proxy_is_a_chain_of_one(nursery: trio.Nursery, make: Callable[[Proxy], Any]) -> None:
    connector = MemoryConnector(nursery, proxied(respond))
    async with ConnectionPool(proxy=make(Proxy(PROXY)), connector=connector) as pool:
        await pool.request("GET", "http://example.com/")
    assert connector.dialled == [Dialled(("proxy.example", 3128), {})]


# -- Forwarding: what is sent.


async def forwarded_head(nursery: trio.Nursery, proxy: Proxy, method: str, url: str, **more: Any) -> bytes:
    """A forwarded request, as the proxy gets it."""
    heads = []

    async def serve(peer: ScriptedPeer) -> None:
        heads.append(await peer.receive_some())
        await peer.send_response(200)

    async with Net(nursery, serve).pool(proxy) as pool:
        assert (await pool.request(method, url, **more)).status == 200
    [head] = heads
    return head


@pytest.mark.parametrize(
    ("method", "url", "given", "target", "host"),
    [
        ("GET", "http://example.com", None, b"http://example.com/", b"example.com"),
        ("GET", "http://Example.com:80/", None, b"http://example.com/", b"example.com"),
        (
            "GET",
            "http://example.com:81/a/b?c=d&e",
            None,
            b"http://example.com:81/a/b?c=d&e",
            b"example.com:81",
        ),
        ("GET", "http://example.com?q", None, b"http://example.com/?q", b"example.com"),
        ("GET", "http://[::1]/", None, b"http://[::1]/", b"[::1]"),
        ("GET", "http://[::1]:81/x", None, b"http://[::1]:81/x", b"[::1]:81"),
        ("GET", "http://[fe80::1%25eth0]/", None, b"http://[fe80::1]/", b"[fe80::1]"),
        ("GET", "http://[fe80::1%25eth0]:81/", None, b"http://[fe80::1]:81/", b"[fe80::1]:81"),
        (
            "GET",
            "http://b\u00fccher.example/",
            None,
            b"http://xn--bcher-kva.example/",
            b"xn--bcher-kva.example",
        ),
        # RFC 9112, 3.2.4: without path and query, not even a slash.
        ("OPTIONS", "http://example.com:81/", "*", b"http://example.com:81", b"example.com:81"),
        ("GET", "http://a:81/", "/path?query", b"http://a:81/path?query", b"a:81"),
        ("GET", "http://a:81/", "//host/path", b"http://a:81//host/path", b"a:81"),
        ("GET", "http://a:81/", "http://other.example/x", b"http://other.example/x", b"other.example"),
        ("GET", "http://a:81/", "ftp://other.example/x", b"ftp://other.example/x", b"other.example"),
        ("GET", "http://a:81/", "opaque", b"opaque", b"a:81"),
    ],
)
async def test_a_forwarded_request(
    nursery: trio.Nursery, method: str, url: str, given: str | None, target: bytes, host: bytes
) -> None:
    extensions = {} if given is None else {"target": given}
    head = await forwarded_head(nursery, Proxy(PROXY), method, url, extensions=extensions)
    assert head == b"%b %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (method.encode(), target, host)


TWICE = [("X-One", "1"), ("x-one", "2"), ("X-Two", "3")]


@pytest.mark.parametrize(
    ("proxy", "own", "sent"),
    [
        # A Host of the request's own goes first, as any does.
        (
            Proxy(PROXY, headers={"Host": "proxy"}),
            [("A", "b"), ("host", "other")],
            b"host: other\r\nA: b\r\n\r\n",
        ),
        (
            Proxy(PROXY, (USER, PASSWORD), TWICE),
            {"A": "b"},
            b"Host: example.com\r\nA: b\r\n" + AUTHORIZATION + b"X-One: 1\r\nx-one: 2\r\nX-Two: 3\r\n\r\n",
        ),
        (
            Proxy(PROXY, (USER, PASSWORD), {"X-One": "proxy", "X-Two": "proxy"}),
            {"proxy-authorization": "mine", "x-ONE": "mine"},
            b"Host: example.com\r\nproxy-authorization: mine\r\nx-ONE: mine\r\nX-Two: proxy\r\n\r\n",
        ),
    ],
    ids=["own host", "proxy's after", "own instead of proxy's"],
)
async def test_the_headers_of_request_and_proxy(
    nursery: trio.Nursery, proxy: Proxy, own: Any, sent: bytes
) -> None:
    head = await forwarded_head(nursery, proxy, "GET", "http://example.com/", headers=own)
    assert head == b"GET http://example.com/ HTTP/1.1\r\n" + sent


@pytest.mark.parametrize(
    ("proxy", "credentials"),
    [
        (Proxy(PROXY, (b"\xff", b"\x00:")), b"\xff:\x00:"),
        (Proxy("http://us%40er:p%3Aa%2Fss@proxy.example:3128"), b"us@er:p:a/ss"),
        (Proxy("http://user@proxy.example:3128"), b"user:"),
    ],
)
async def test_forwarded_credentials(nursery: trio.Nursery, proxy: Proxy, credentials: bytes) -> None:
    head = await forwarded_head(nursery, proxy, "GET", "http://example.com/")
    [value] = [line for line in head.split(b"\r\n") if line.startswith(b"Proxy-Authorization: Basic ")]
    assert base64.b64decode(value.rpartition(b" ")[2]) == credentials


async def test_forwarding_over_tls(nursery: trio.Nursery) -> None:
    seen: list[PeerRequest] = []
    net = Net(nursery, proxied(respond, seen=seen, tls=True))
    async with net.pool(secure_proxy(auth=(USER, PASSWORD))) as pool:
        response = await pool.request("GET", "http://example.com/x")
    assert response.content == b"http://example.com/x"
    assert seen[0].header(b"proxy-authorization") == b"Basic " + CREDENTIALS
    assert net.dialled == [Dialled(("proxy.example", 3129), {})]


LARGE = b"0123456789" * 20_000


async def generated() -> AsyncIterator[bytes]:
    for start in range(0, len(LARGE), 30_000):
        yield LARGE[start : start + 30_000]


@pytest.mark.parametrize(
    ("content", "body"),
    [(b"small", b"small"), (LARGE, LARGE), ([b"a", b"", LARGE], b"a" + LARGE), (generated(), LARGE)],
    ids=["small", "large", "list", "generator"],
)
async def test_forwarded_bodies(nursery: trio.Nursery, content: Any, body: bytes) -> None:
    net = Net(nursery, respond)
    async with net.pool() as pool:
        async with pool.stream("POST", "http://example.com/", content=content) as response:
            assert b"".join([piece async for piece in response.aiter_stream()]) == body
        await net.settles(pool, forwarding=1)


# -- Forwarding: connections.


async def test_requests_to_all_http_origins_share_the_connections_to_the_proxy(nursery: trio.Nursery) -> None:
    net = Net(nursery, proxied(respond))
    async with net.pool() as pool:
        for host in ("a", "b", "a:81", "[::1]"):
            response = await pool.request("GET", f"http://{host}/")
            assert response.content == b"http://%b/" % host.encode()
        assert pool.statistics().connections_opened == 1
        [connection] = pool.connections
        assert str(connection.origin) == PROXY
    assert len(net.dialled) == 1


async def test_the_limit_per_origin_is_then_about_the_proxy(nursery: trio.Nursery) -> None:
    go = trio.Event()

    async def serve(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await go.wait()
            await peer.send_response(200)

    net = Net(nursery, serve)
    async with net.pool(max_connections_per_origin=1) as pool, trio.open_nursery() as requests:
        for host in ("a", "b"):
            requests.start_soon(pool.request, "GET", f"http://{host}/")
        await trio.testing.wait_all_tasks_blocked()
        assert (pool.statistics().active, pool.statistics().waiting) == (1, 1)
        go.set()
    assert len(net.dialled) == 1


async def test_tunnels_are_limited_by_origin(nursery: trio.Nursery) -> None:
    net = Net(nursery, proxied(respond))
    async with net.pool(max_connections_per_origin=1) as pool, trio.open_nursery() as requests:
        for host in ("a", "b", "a"):
            requests.start_soon(pool.request, "GET", f"ws://{host}/")
    assert len(net.dialled) == 2


@pytest.mark.parametrize("status", [407, 403, 502])
async def test_a_refusal_to_forward_is_an_ordinary_response(nursery: trio.Nursery, status: int) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send_response(status, [(b"Proxy-Authenticate", b"Basic realm=x")], b"no")

    net = Net(nursery, serve)
    async with net.pool() as pool:
        for _ in range(2):
            response = await pool.request("GET", "http://example.com/")
            assert (response.status, response.content) == (status, b"no")
            assert response.headers[0] == (b"Proxy-Authenticate", b"Basic realm=x")
    assert len(net.dialled) == 1


# -- What is not forwarded, though its origin is not secure.


async def test_connect_to_an_http_url_is_sent_through_a_tunnel(nursery: trio.Nursery) -> None:
    asked: list[PeerRequest] = []
    inner: list[PeerRequest] = []

    async def echo(peer: ScriptedPeer) -> None:
        await peer.send(await peer.receive_some())

    net = Net(nursery, proxied(proxied(echo, seen=inner), seen=asked))
    async with net.pool(Proxy(PROXY, (USER, PASSWORD))) as pool:
        extensions = {"target": "far.example:22"}
        async with pool.stream("CONNECT", "http://near.example:8080", extensions=extensions) as response:
            stream = response.extensions["network_stream"]
            await stream.write(b"ping")
            assert await stream.read() == b"ping"
    assert [request.target for request in (*asked, *inner)] == [b"near.example:8080", b"far.example:22"]
    assert inner[0].headers == [(b"host", b"far.example:22")]


# -- Tunnels: what is asked for.


async def asked_for(nursery: trio.Nursery, proxy: Proxy, url: str) -> bytes:
    """What a proxy gets before it has answered."""
    heads = []

    async def serve(peer: ScriptedPeer) -> None:
        heads.append(await peer.receive_some())

    async with Net(nursery, serve).pool(proxy) as pool:
        with pytest.raises(ProxyError):
            await pool.request("GET", url, headers={"Authorization": "secret"})
    [head] = heads
    return head


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("https://Example.com/path?query", b"example.com:443"),
        ("https://example.com:8443/", b"example.com:8443"),
        ("wss://example.com/", b"example.com:443"),
        ("ws://example.com/", b"example.com:80"),
        ("https://[::1]/", b"[::1]:443"),
        ("https://[fe80::1%25eth0]:444/", b"[fe80::1]:444"),
        ("https://192.0.2.1/", b"192.0.2.1:443"),
        ("https://b\u00fccher.example/", b"xn--bcher-kva.example:443"),
    ],
)
async def test_what_a_tunnel_is_asked_for_with(nursery: trio.Nursery, url: str, authority: bytes) -> None:
    head = await asked_for(nursery, Proxy(PROXY), url)
    assert head == b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (authority, authority)


async def test_a_tunnel_is_asked_for_with_the_proxys_headers(nursery: trio.Nursery) -> None:
    proxy = Proxy(PROXY, (USER, PASSWORD), [("X-One", "1"), ("x-one", "2")])
    assert await asked_for(nursery, proxy, ORIGIN) == (
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n"
        + AUTHORIZATION
        + b"X-One: 1\r\nx-one: 2\r\n\r\n"
    )


async def test_a_stream_is_asked_for_by_host_and_port(nursery: trio.Nursery) -> None:
    asked: list[PeerRequest] = []

    async def greet(peer: ScriptedPeer) -> None:
        await peer.send(b"220 ready")
        assert await peer.receive_some() == b"QUIT"

    net = Net(nursery, proxied(greet, seen=asked))
    async with net.pool() as pool:
        stream = await pool.open_tcp_stream("mail.example", 25)
        assert await read_exactly(stream, 9) == b"220 ready"
        await stream.write(b"QUIT")
        assert pool.statistics().active == 1
        await stream.aclose()
        await net.settles(pool)
    assert [request.target for request in asked] == [b"mail.example:25"]


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_nothing_for_the_proxy_goes_to_the_origin(nursery: trio.Nursery, tls: bool) -> None:
    asked: list[PeerRequest] = []
    inner: list[PeerRequest] = []
    net = Net(nursery, proxied(secured(noting(inner)), seen=asked, tls=tls))
    auth, headers = (USER, PASSWORD), {"X": "y"}
    proxy = secure_proxy(auth=auth, headers=headers) if tls else Proxy(PROXY, auth, headers)
    async with net.pool(proxy) as pool:
        own = {"Authorization": "for the origin"}
        response = await pool.request("POST", "https://example.com/x", headers=own, content=b"body")
    assert response.content == b"body"
    assert asked[0].headers == [
        (b"host", b"example.com:443"),
        (b"proxy-authorization", b"Basic " + CREDENTIALS),
        (b"x", b"y"),
    ]
    assert inner[0].target == b"/x"
    assert inner[0].headers == [
        (b"host", b"example.com"),
        (b"authorization", b"for the origin"),
        (b"content-length", b"4"),
    ]


# -- Tunnels: TLS.


async def test_the_default_context_is_for_the_proxy_too(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "ca.pem"
    proxy_tls().ca.cert_pem.write_to_path(str(path))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    net = Net(nursery, proxied(secured(respond), tls=True))
    async with net.pool(SECURE_PROXY) as pool:
        assert (await pool.request("GET", ORIGIN)).status == 200


@pytest.mark.parametrize("url", [ORIGIN, "http://example.com/"])
async def test_a_proxy_that_is_not_trusted(nursery: trio.Nursery, url: str) -> None:
    asked: list[PeerRequest] = []
    net = Net(nursery, proxied(secured(respond), seen=asked, tls=True))
    async with net.pool(Proxy(SECURE_PROXY, (USER, PASSWORD), ssl_context=make_tls().client)) as pool:
        with pytest.raises(
            ConnectError, match=f"certificate of the proxy {SECURE_PROXY}.* could not be verified"
        ):
            await pool.request("GET", url)
        await net.settles(pool)
    assert asked == []


async def test_an_origin_that_only_the_proxys_context_trusts(nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.start_tls(proxy_tls().server)

    net = Net(nursery, proxied(serve, tls=True))
    async with net.pool(secure_proxy()) as pool:
        with pytest.raises(ConnectError, match=r"certificate of second\.example could not be verified"):
            await pool.request("GET", "https://second.example/")
        await net.settles(pool)


@pytest.mark.parametrize("url", [ORIGIN, "http://example.com/", "ws://example.com/"])
async def test_the_sni_name_is_about_the_origin_alone(nursery: trio.Nursery, url: str) -> None:
    names: list[tuple[str, str | None]] = []

    def context(who: str, ca: trustme.CA, *hosts: str) -> ssl.SSLContext:
        def note(sock: object, name: str | None, context: ssl.SSLContext) -> None:
            names.append((who, name))

        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert(*hosts).configure_cert(server)
        server.sni_callback = note
        return server

    to_proxy = context("proxy", proxy_tls().ca, "proxy.example")
    to_origin = context("origin", make_tls().ca, "other.example")

    async def origin(peer: ScriptedPeer) -> None:
        if url.startswith("https"):
            await peer.start_tls(to_origin)
        await respond(peer)

    async def serve(peer: ScriptedPeer) -> None:
        await peer.start_tls(to_proxy)
        await proxied(origin)(peer)

    async with Net(nursery, serve).pool(secure_proxy()) as pool:
        response = await pool.request("GET", url, extensions={"sni_hostname": "other.example"})
    assert response.status == 200
    assert names == [("proxy", "proxy.example"), ("origin", "other.example")][: 1 + url.startswith("https")]


class Trickle(Wrapped):
    """A stream that sends byte by byte, each worked on before the next."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        for index in range(len(data)):
            await self.stream.send_all(data[index : index + 1])
            await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_everything_from_the_proxy_and_the_origin_comes_byte_by_byte(
    nursery: trio.Nursery, tls: bool
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        peer.stream = Trickle(peer.stream)
        await proxied(secured(respond), tls=tls)(peer)

    net = Net(nursery, serve)
    async with net.pool(secure_proxy() if tls else PROXY) as pool:
        for body in (b"a", b"bc"):
            assert (await pool.request("POST", ORIGIN, content=body)).content == body
        await net.settles(pool, tunnels=1)


# -- Tunnels: how they are shared and closed.


async def test_a_tunnel_is_kept_for_its_origin(nursery: trio.Nursery) -> None:
    asked: list[PeerRequest] = []
    net = Net(nursery, proxied(secured(respond), seen=asked))
    async with net.pool() as pool:
        for url in (ORIGIN, "https://localhost/", ORIGIN + "other", "https://localhost/", ORIGIN):
            await pool.request("GET", url)
        await net.settles(pool, tunnels=2)
        assert pool.statistics().connections_opened == 2
    assert [request.target for request in asked] == [b"example.com:443", b"localhost:443"]


async def test_an_idle_tunnel_makes_room_for_another(nursery: trio.Nursery) -> None:
    asked: list[PeerRequest] = []
    net = Net(nursery, proxied(secured(respond), seen=asked))
    async with net.pool(max_connections=1) as pool:
        for url in (ORIGIN, "https://localhost/", ORIGIN):
            assert (await pool.request("GET", url)).status == 200
            await net.settles(pool, tunnels=1)
    assert [request.target for request in asked] == [b"example.com:443", b"localhost:443", b"example.com:443"]


async def test_a_busy_tunnel_lets_another_wait(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    net = Net(nursery, proxied(secured(respond)))
    async with net.pool(max_connections=1) as pool:
        async with pool.stream("GET", ORIGIN):
            with pytest.raises(PoolTimeout, match="within 3 seconds"):
                await pool.request("GET", "https://localhost/", extensions={"timeout": {"pool": 3}})
        assert (await pool.request("GET", "https://localhost/")).status == 200


async def test_an_expired_tunnel_is_closed_with_its_connection(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    net = Net(nursery, proxied(secured(respond), tls=True))
    async with net.pool(secure_proxy(), keepalive_expiry=5) as pool:
        await pool.request("GET", ORIGIN)
        await trio.sleep(4)
        await net.settles(pool, tunnels=1)
        await trio.sleep(2)
        await net.settles(pool)


async def test_no_tunnel_is_kept_where_nothing_is(nursery: trio.Nursery) -> None:
    net = Net(nursery, proxied(secured(respond)))
    async with net.pool(max_keepalive_connections=0) as pool:
        await pool.request("GET", ORIGIN)
        await net.settles(pool)


async def test_a_response_that_is_left_early_closes_the_tunnel(nursery: trio.Nursery) -> None:
    async def stop_midway(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        await swallow(peer)

    net = Net(nursery, proxied(secured(stop_midway), tls=True))
    async with net.pool(secure_proxy()) as pool:
        async with pool.stream("GET", ORIGIN):
            pass
        await net.settles(pool)


LAYERS = {
    "tls through http": (False, True),
    "plain through http": (False, False),
    "plain through https": (True, False),
    "tls in tls": (True, True),
}
every_layers = pytest.mark.parametrize("layers", LAYERS)


def url_of(layers: str) -> str:
    return "https://example.com/" if LAYERS[layers][1] else "ws://example.com/"


@contextlib.asynccontextmanager
async def on_sockets(layers: str, origin: Script) -> AsyncIterator[ConnectionPool]:
    """A pool behind a proxy on loopback; neither leaves a socket."""
    before = open_sockets()
    proxy_secure, origin_secure = LAYERS[layers]
    async with trio.open_nursery() as servers:
        script = proxied(secured(origin) if origin_secure else origin)
        server = await serve_tcp(servers, script, tls=proxy_tls().server if proxy_secure else None)
        proxy = Proxy(server.url, ssl_context=proxy_tls().client)
        async with ConnectionPool(make_tls().client, proxy=proxy) as pool:
            yield pool
        servers.cancel_scope.cancel()
    assert open_sockets() == before


async def say_goodbye(peer: ScriptedPeer) -> None:
    """End the innermost TLS, and leave the connection open."""
    assert isinstance(peer.stream, trio.SSLStream)
    with contextlib.suppress(trio.BrokenResourceError):
        await peer.stream.unwrap()
    await trio.sleep_forever()


async def hang_up(peer: ScriptedPeer) -> None:
    """End the connection."""


async def say_too_much(peer: ScriptedPeer) -> None:
    """Send unsolicited data."""
    await peer.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
    await swallow(peer)


@pytest.mark.parametrize(
    ("layers", "end"),
    [(layers, end) for layers in LAYERS for end in (hang_up, say_too_much)]
    + [(layers, say_goodbye) for layers in LAYERS if layers != "plain through http"],
)
async def test_what_befalls_an_idle_tunnel_is_noticed_before_a_request_is_sent(
    layers: str, end: Script
) -> None:
    """A POST that is sent on a connection that is closed would not be sent again."""
    ending = trio.Event()
    bodies: list[bytes] = []

    async def serve(peer: ScriptedPeer) -> None:
        request = await peer.receive_request()
        bodies.append(request.body)
        await peer.send_response(200)
        await ending.wait()
        await end(peer)

    async with on_sockets(layers, serve) as pool:
        response = await pool.request("POST", url_of(layers), content=b"first")
        ending.set()
        sock = response.extensions["network_stream"].get_extra_info("socket")
        await trio.lowlevel.wait_readable(sock)
        await pool.request("POST", url_of(layers), content=b"second")
        assert pool.statistics().connections_opened == 2
    assert bodies == [b"first", b"second"]


class Corked(Wrapped):
    """A stream that keeps what it is to send while it is corked."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.corked = False
        super().__init__(stream)
        self._kept = b""

    async def uncork(self, size: int | None = None) -> None:
        """Send what was kept, or the beginning of it."""
        data, self._kept = self._kept[:size], self._kept[size:] if size else b""
        await self.stream.send_all(data)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.corked:
            self._kept += data
        else:
            await self.stream.send_all(data)


@pytest.mark.parametrize("layers", [layers for layers in LAYERS if layers != "plain through http"])
async def test_a_goodbye_that_comes_together_with_the_response_is_noticed(
    nursery: trio.Nursery, layers: str
) -> None:
    """It is in memory then, where the kernel knows nothing of it."""
    proxy_secure, origin_secure = LAYERS[layers]
    bodies: list[bytes] = []

    async def serve(peer: ScriptedPeer) -> None:
        bottom = peer.stream = Corked(peer.stream)

        async def origin(peer: ScriptedPeer) -> None:
            bodies.append((await peer.receive_request()).body)
            bottom.corked = True
            await peer.send_response(200)
            assert isinstance(peer.stream, trio.SSLStream)
            async with trio.open_nursery() as goodbye:
                goodbye.start_soon(say_goodbye, peer)
                await trio.testing.wait_all_tasks_blocked()
                await bottom.uncork()

        await proxied(secured(origin) if origin_secure else origin, tls=proxy_secure)(peer)

    net = Net(nursery, serve)
    async with net.pool(secure_proxy(SECURE_PROXY if proxy_secure else PROXY)) as pool:
        for body in (b"first", b"second"):
            await pool.request("POST", url_of(layers), content=body)
    assert bodies == [b"first", b"second"]
    assert len(net.dialled) == 2


async def test_less_than_a_record_of_the_outer_tls_is_not_waited_for(nursery: trio.Nursery) -> None:
    """Nor is it reason to give the tunnel up."""
    early = trio.Event()

    async def serve(peer: ScriptedPeer) -> None:
        bottom = peer.stream = Corked(peer.stream)

        async def origin(peer: ScriptedPeer) -> None:
            await peer.receive_request()
            await peer.send_response(200)
            await early.wait()
            bottom.corked = True
            await peer.send_response(200, body=b"second")
            await bottom.uncork(3)
            await peer.receive_request()
            # Until the client waits for the rest.
            await trio.testing.wait_all_tasks_blocked()
            await bottom.uncork()
            await swallow(peer)

        await proxied(secured(origin), tls=True)(peer)

    server = await serve_tcp(nursery, serve)
    proxy = secure_proxy(server.url.replace("http", "https"))
    async with ConnectionPool(make_tls().client, proxy=proxy) as pool:
        response = await pool.request("POST", ORIGIN)
        early.set()
        await trio.lowlevel.wait_readable(response.extensions["network_stream"].get_extra_info("socket"))
        assert (await pool.request("POST", ORIGIN)).content == b"second"
        assert pool.statistics().connections_opened == 1


@every_layers
async def test_an_idle_tunnel_on_a_socket_is_used_again(layers: str) -> None:
    async with on_sockets(layers, respond) as pool:
        for _ in range(3):
            assert (await pool.request("POST", url_of(layers), content=b"x")).content == b"x"
        assert pool.statistics().connections_opened == 1


@every_layers
async def test_an_answer_that_comes_before_the_request_was_sent_whole(layers: str) -> None:
    """The origin closes without having read it, so that sending fails below all layers."""

    async def refuse(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send_response(413, [(b"Connection", b"close")], b"too much")

    async with on_sockets(layers, refuse) as pool:
        response = await pool.request("POST", url_of(layers), content=LARGE * 20)
        assert (response.status, response.content) == (413, b"too much")
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)


async def test_information_about_a_connection_in_a_tunnel() -> None:
    async with on_sockets("tls in tls", respond) as pool:
        stream = (await pool.request("GET", ORIGIN)).extensions["network_stream"]
        [proxy] = pool._managers[1]
        assert stream.get_extra_info("server_addr") == ("127.0.0.1", proxy.origin.port)
        assert stream.get_extra_info("ssl_object").server_hostname == "example.com"
        assert stream.get_extra_info("is_readable") is False


async def test_connect_through_tls_in_a_tunnel(nursery: trio.Nursery) -> None:
    async def echo(peer: ScriptedPeer) -> None:
        await peer.send(b"echo " + await peer.receive_some())

    net = Net(nursery, proxied(secured(proxied(echo)), tls=True))
    async with net.pool(secure_proxy()) as pool:
        async with pool.stream("CONNECT", ORIGIN, extensions={"target": "far.example:1"}) as response:
            stream = response.extensions["network_stream"]
            await stream.write(b"x")
            assert await read_exactly(stream, 6) == b"echo x"
        await net.settles(pool)


async def test_a_user_starts_tls_on_a_stream(nursery: trio.Nursery) -> None:
    net = Net(nursery, proxied(secured(respond), tls=True))
    async with net.pool(secure_proxy()) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        encrypted = await stream.start_tls(make_tls().client, "example.com")
        await encrypted.write(b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n")
        assert await read_exactly(encrypted, 15) == b"HTTP/1.1 200 OK"
        await encrypted.aclose()
        await net.settles(pool)


async def test_a_pool_that_closes_closes_its_streams(nursery: trio.Nursery) -> None:
    net = Net(nursery, proxied(swallow, tls=True))
    async with net.pool(secure_proxy()) as pool:
        stream = await pool.open_tcp_stream("example.com", 443)
        await pool.aclose()
        assert net.open == 0
        with pytest.raises(ReadError, match="the connection was closed"):
            await stream.read()


# -- Chains.


FIRST = "http://first.example:3128"
SECOND = "http://second.example:3130"


@pytest.mark.parametrize("first_tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("second_tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("url", [ORIGIN, "http://example.com/"])
async def test_a_chain_of_two(nursery: trio.Nursery, first_tls: bool, second_tls: bool, url: str) -> None:
    first: list[PeerRequest] = []
    second: list[PeerRequest] = []
    last: list[PeerRequest] = []
    origin = secured(noting(last))
    net = Net(nursery, proxied(proxied(origin, seen=second, tls=second_tls), seen=first, tls=first_tls))
    scheme = {False: "http", True: "https"}
    proxies = (
        secure_proxy(f"{scheme[first_tls]}://proxy.example:1", auth=("one", "1"), headers={"X-One": "1"}),
        secure_proxy(f"{scheme[second_tls]}://second.example:2", auth=("two", "2"), headers={"X-Two": "2"}),
    )
    async with net.pool(*proxies) as pool:
        for body in (b"a", b"b"):
            response = await pool.request("POST", url, content=body)
            assert response.content.endswith(body)
        assert pool.statistics().connections_opened == 1
    assert net.dialled == [Dialled(("proxy.example", 1), {})]
    assert [(request.method, request.target) for request in first] == [(b"CONNECT", b"second.example:2")]
    assert first[0].headers == [
        (b"host", b"second.example:2"),
        (b"proxy-authorization", b"Basic " + base64.b64encode(b"one:1")),
        (b"x-one", b"1"),
    ]
    for_second = [(b"proxy-authorization", b"Basic " + base64.b64encode(b"two:2")), (b"x-two", b"2")]
    if url == ORIGIN:
        assert [(request.method, request.target) for request in second] == [(b"CONNECT", b"example.com:443")]
        assert second[0].headers == [(b"host", b"example.com:443"), *for_second]
        assert [request.headers for request in last] == [
            [(b"host", b"example.com"), (b"content-length", b"1")]
        ] * 2
    else:
        assert [(request.method, request.target) for request in second] == [
            (b"POST", b"http://example.com/")
        ] * 2
        assert second[0].headers == [(b"host", b"example.com"), (b"content-length", b"1"), *for_second]
        assert last == []


async def test_a_chain_of_three(nursery: trio.Nursery) -> None:
    seen: list[PeerRequest] = []
    script: Script = secured(noting(seen))
    for tls in (True, False, True):
        script = proxied(script, seen=seen, tls=tls)
    proxies = (
        secure_proxy("https://proxy.example", auth=("one", "1")),
        Proxy("http://[::1]:8080", ("two", "2")),
        secure_proxy("https://second.example", auth=("three", "3")),
    )
    net = Net(nursery, script)
    async with net.pool(*proxies) as pool:
        assert (await pool.request("GET", ORIGIN)).status == 200
        assert [len(list(manager)) for manager in pool._managers] == [1, 1, 1, 1]
        assert [str(next(iter(manager)).origin) for manager in pool._managers] == [
            "https://example.com:443",
            "https://second.example:443",
            "http://[::1]:8080",
            "https://proxy.example:443",
        ]
    assert [request.target for request in seen] == [
        b"[::1]:8080",
        b"second.example:443",
        b"example.com:443",
        b"/",
    ]
    assert [request.header(b"proxy-authorization") for request in seen] == [
        *(b"Basic " + base64.b64encode(auth) for auth in (b"one:1", b"two:2", b"three:3")),
        None,
    ]


async def test_the_second_hop_refuses(nursery: trio.Nursery) -> None:
    first: list[PeerRequest] = []

    async def refuse(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send_response(403, body=b"not there")

    net = Net(nursery, proxied(refuse, seen=first))
    async with net.pool(FIRST, SECOND, max_connections=1) as pool:
        for _ in range(2):
            error = await refused(pool)
            assert str(error) == f"no tunnel to example.com:443 through the proxy {SECOND}: 403 Forbidden"
            assert answer_of(error).content == b"not there"
        await net.settles(pool)
    assert len(first) == 2


async def test_the_first_hop_refuses(nursery: trio.Nursery) -> None:
    async def refuse(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send_response(502)

    net = Net(nursery, refuse)
    async with net.pool(FIRST, SECOND) as pool:
        for url in (ORIGIN, "http://example.com/"):
            error = await refused(pool, url)
            assert str(error) == f"no tunnel to the proxy {SECOND} through the proxy {FIRST}: 502 Bad Gateway"
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
        assert [len(list(manager)) for manager in pool._managers] == [0, 0, 0]


NO_DELAY = (6, 1, 1)


@pytest.mark.parametrize(
    ("settings", "address", "options"),
    [
        ({}, ("first.example", 3128), {}),
        ({"local_address": "127.0.0.2"}, ("first.example", 3128), {"local_address": "127.0.0.2"}),
        ({"socket_options": [NO_DELAY]}, ("first.example", 3128), {"socket_options": (NO_DELAY,)}),
        ({"uds": "/run/x"}, "/run/x", {}),
    ],
)
@pytest.mark.parametrize("url", [ORIGIN, "http://example.com/"])
async def test_dialling_is_about_the_first_hop_alone(
    nursery: trio.Nursery, settings: dict[str, Any], address: Any, options: dict[str, Any], url: str
) -> None:
    net = Net(nursery, proxied(proxied(secured(respond))))
    async with net.pool(FIRST, SECOND, **settings) as pool:
        assert (await pool.request("GET", url)).status == 200
    assert net.dialled == [Dialled(address, options)]


# -- Answers to CONNECT that grant the tunnel.


# RFC 9110, 9.3.6: a 2xx has no content, whatever its head says of one.
GRANTS = {
    "200": ESTABLISHED,
    "200 with a length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    "200 with a coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "200 with both": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "200 with Connection: close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nProxy-Agent: x\r\n\r\n",
    "200 without reason": b"HTTP/1.1 200\r\n\r\n",
    "201": b"HTTP/1.1 201 Created\r\n\r\n",
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "299": b"HTTP/1.1 299 Whatever\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 Connection established\r\n\r\n",
    "HTTP/1.0 with a length": b"HTTP/1.0 200 Connection established\r\nContent-Length: 0\r\n\r\n",
    "1xx before": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    + ESTABLISHED,
}


def answering(answer: bytes, then: Script, *, tls: bool = False, byte_by_byte: bool = False) -> Script:
    """A proxy that answers a CONNECT so; `then` goes on."""

    async def script(peer: ScriptedPeer) -> None:
        if tls:
            await peer.start_tls(proxy_tls().server)
        await peer.receive_request()
        await peer.send(answer, byte_by_byte=byte_by_byte)
        await then(peer)

    return script


@pytest.mark.parametrize("way", ["http", "https", "chain"])
@pytest.mark.parametrize("name", GRANTS)
@DELIVERIES
async def test_a_grant_and_what_follows_it_at_once(
    nursery: trio.Nursery, way: str, name: str, byte_by_byte: bool
) -> None:
    async def answer_quit(peer: ScriptedPeer) -> None:
        assert await peer.receive_some() == b"QUIT"
        await peer.send(b"221")

    said = GRANTS[name] + b"220 ready\r\n"
    script = answering(said, answer_quit, tls=way != "http", byte_by_byte=byte_by_byte)
    secure = secure_proxy()
    proxies = {"http": [Proxy(PROXY)], "https": [secure], "chain": [Proxy(FIRST), secure]}[way]
    net = Net(nursery, proxied(script) if way == "chain" else script)
    async with net.pool(*proxies) as pool:
        stream = await pool.open_tcp_stream("mail.example", 25)
        assert await read_exactly(stream, 11) == b"220 ready\r\n"
        await stream.write(b"QUIT")
        assert await read_exactly(stream, 3) == b"221"
        if way == "http":
            assert await stream.read() == b""
        await stream.aclose()
        await net.settles(pool)


@pytest.mark.parametrize("name", GRANTS)
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@DELIVERIES
async def test_a_grant_and_tls_in_the_tunnel(
    nursery: trio.Nursery, name: str, tls: bool, byte_by_byte: bool
) -> None:
    net = Net(nursery, answering(GRANTS[name], secured(respond), tls=tls, byte_by_byte=byte_by_byte))
    async with net.pool(secure_proxy() if tls else PROXY) as pool:
        for body in (b"a", b"b"):
            assert (await pool.request("POST", ORIGIN, content=body)).content == body
        await net.settles(pool, tunnels=1)


async def test_an_http_origin_that_speaks_before_it_is_asked(nursery: trio.Nursery) -> None:
    """What came with the grant is the beginning of the first response; after that there is no other one.

    The request may still get an answer of its own, which must not be taken for the next one's.
    """

    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(ESTABLISHED + b"HTTP/1.1 200 OK\r\nContent-")
        await peer.receive_request()
        await peer.send(b"Length: 5\r\n\r\nhello")
        await swallow(peer)

    net = Net(nursery, serve)
    async with net.pool() as pool:
        assert (await pool.request("GET", "ws://example.com/")).content == b"hello"
        await net.settles(pool)


# -- Answers that don't.


def first_answer(
    nursery: trio.Nursery, data: bytes, *, byte_by_byte: bool = False, then_close: bool = False
) -> Net:
    """A proxy that answers the first CONNECT so, and grants all others."""

    answer = answering(data, hang_up if then_close else swallow, byte_by_byte=byte_by_byte)
    return Net(nursery, in_turn(answer, *itertools.repeat(proxied(secured(respond)), 3)))


NO_TUNNEL = f"no tunnel to example.com:443 through the proxy {PROXY}: "


async def fail_to_connect(net: Net, proxy: Proxy | str = PROXY, **options: Any) -> ProxyError:
    """The error with which a proxy refuses a tunnel, or breaks HTTP instead."""
    error = await fail(net, proxy, **options)
    assert isinstance(error, ProxyError)
    assert (error.reply_code, error.meaning) == (None, None)
    assert str(error).startswith(NO_TUNNEL)
    return error


@dataclass
class Refusal:
    data: bytes
    status: int
    content: bytes = b""
    reason: bytes = b""
    version: bytes = b"HTTP/1.1"
    then_close: bool = False


REFUSALS = {
    "407 with a length": Refusal(
        b"HTTP/1.1 407 Proxy Authentication Required\r\n"
        b"Proxy-Authenticate: Basic realm=x\r\nContent-Length: 5\r\n\r\nhello",
        407,
        b"hello",
        b"Proxy Authentication Required",
    ),
    "407 chunked": Refusal(
        b"HTTP/1.1 407 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\nA: b\r\n\r\n",
        407,
        b"hello",
        b"No",
    ),
    "407 till the close": Refusal(b"HTTP/1.1 407 No\r\n\r\nhello", 407, b"hello", b"No", then_close=True),
    "407 with Connection: close": Refusal(
        b"HTTP/1.1 407 No\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
        407,
        b"hello",
        b"No",
        then_close=True,
    ),
    "407 that ends early": Refusal(
        b"HTTP/1.1 407 No\r\nContent-Length: 10\r\n\r\nhello",
        407,
        b"hello",
        b"No",
        then_close=True,
    ),
    "407 with broken chunks": Refusal(
        b"HTTP/1.1 407 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nx\r\n",
        407,
        b"hello",
        b"No",
    ),
    "407 of HTTP/1.0": Refusal(
        b"HTTP/1.0 407 No\r\n\r\nhello", 407, b"hello", b"No", b"HTTP/1.0", then_close=True
    ),
    "407 after a 100": Refusal(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n", 407, reason=b"No"
    ),
    "302": Refusal(
        b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\nContent-Length: 0\r\n\r\n",
        302,
        reason=b"Found",
    ),
    "304": Refusal(b"HTTP/1.1 304 Not Modified\r\n\r\n", 304, reason=b"Not Modified"),
    "400 without reason": Refusal(b"HTTP/1.1 400\r\nContent-Length: 0\r\n\r\n", 400),
    "502": Refusal(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 1\r\n\r\n!", 502, b"!", b"Bad Gateway"),
    "999": Refusal(b"HTTP/1.1 999 \xff\r\nContent-Length: 0\r\n\r\n", 999, reason=b"\xff"),
}


@pytest.mark.parametrize("name", REFUSALS)
@DELIVERIES
async def test_a_refusal(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, name: str, byte_by_byte: bool
) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange")
    case = REFUSALS[name]
    net = first_answer(nursery, case.data, byte_by_byte=byte_by_byte, then_close=case.then_close)
    error = await fail_to_connect(net, f"http://{USER}:{PASSWORD}@proxy.example:3128")
    response = answer_of(error)
    assert response.status == case.status
    assert response.content == case.content
    assert response.extensions == {"http_version": case.version, "reason_phrase": case.reason}
    assert error.__cause__ is None
    assert str(error) == f"{NO_TUNNEL}{case.status} {case.reason.decode('latin-1')}".rstrip()
    assert str(case.status) in caplog.text
    assert_no_secrets(caplog.text)


async def test_a_refusals_headers(nursery: trio.Nursery) -> None:
    error = await fail_to_connect(first_answer(nursery, REFUSALS["407 with a length"].data))
    assert answer_of(error).headers == [
        (b"Proxy-Authenticate", b"Basic realm=x"),
        (b"Content-Length", b"5"),
    ]


async def test_a_refusal_to_a_stream(nursery: trio.Nursery) -> None:
    net = first_answer(nursery, REFUSALS["502"].data)
    async with net.pool(max_connections=1) as pool:
        with pytest.raises(ProxyError, match=r"no tunnel to mail\.example:25 .*: 502 Bad Gateway"):
            await pool.open_tcp_stream("mail.example", 25)
        await net.settles(pool)
        assert (await pool.request("GET", ORIGIN)).status == 200
        await net.settles(pool, tunnels=1)


@pytest.mark.parametrize("size", [65535, 65536, 65537, 100_000, 1_000_000])
@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
async def test_64_kib_of_a_refusal_are_kept(nursery: trio.Nursery, size: int, framing: str) -> None:
    body = b"0123456789" * (size // 10 + 1)
    body = body[:size]
    data = {
        "length": b"Content-Length: %d\r\n\r\n%b" % (size, body),
        "chunks": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (size, body),
        "close": b"\r\n" + body,
    }[framing]
    net = first_answer(nursery, b"HTTP/1.1 403 No\r\n" + data, then_close=framing == "close")
    assert answer_of(await fail_to_connect(net)).content == body[:65536]


@pytest.mark.parametrize(
    ("length", "content", "time"),
    [
        pytest.param(10, b"hello", 2, id="not all comes"),
        pytest.param(100_000, b"x" * 65536, 0, id="no more is waited for than is kept"),
    ],
)
async def test_a_refusal_whose_body_does_not_come(
    nursery: trio.Nursery, autojump_clock: MockClock, length: int, content: bytes, time: float
) -> None:
    error = await fail_to_connect(
        first_answer(nursery, b"HTTP/1.1 403 No\r\nContent-Length: %d\r\n\r\n%b" % (length, content))
    )
    assert trio.current_time() == time
    assert str(error).endswith(": 403 No")
    assert answer_of(error).content == content


@pytest.mark.parametrize(("pause", "size", "kept", "time"), [(0.3, 1, 7, 2), (0, 1000, 65536, 0)])
async def test_a_refusal_whose_body_never_ends(
    nursery: trio.Nursery, autojump_clock: MockClock, pause: float, size: int, kept: int, time: float
) -> None:
    async def refuse(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await peer.send(b"%x\r\n%b\r\n" % (size, b"x" * size))
            await trio.sleep(pause)

    error = await fail_to_connect(Net(nursery, in_turn(refuse, proxied(secured(respond)))))
    assert trio.current_time() == time
    assert answer_of(error).status == 403
    assert answer_of(error).content == b"x" * kept


@dataclass
class Broken:
    data: bytes
    reason: str
    then_close: bool = False


BROKEN = {
    "closed at once": Broken(b"", "closed the connection without sending a response", then_close=True),
    "closed within the head": Broken(
        b"HTTP/1.1 200 OK\r\nA: b\r\n", "closed the connection in the middle", then_close=True
    ),
    "closed after a 100": Broken(b"HTTP/1.1 100 Continue\r\n\r\n", "closed the connection", then_close=True),
    "not HTTP": Broken(b"220 ready\r\n", "does not speak HTTP/1"),
    "a TLS alert": Broken(b"\x15\x03\x03\x00\x02\x02\x46", "does not speak HTTP/1"),
    "another version": Broken(b"HTTP/2 200 OK\r\n\r\n", "does not speak HTTP/1"),
    "a bad status line": Broken(b"HTTP/1.1 abc\r\n\r\n", ""),
    "a bad header": Broken(b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n", ""),
    "a bad length": Broken(b"HTTP/1.1 407 No\r\nContent-Length: x\r\n\r\n", ""),
    "an endless head": Broken(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 1000, ""),
    "an endless head of many headers": Broken(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200, ""),
    "101 informational": Broken(
        b"HTTP/1.1 100 Continue\r\n\r\n" * 101 + ESTABLISHED, "more than 100 informational responses"
    ),
    "switching protocols": Broken(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", ""),
}


@pytest.mark.parametrize("name", BROKEN)
@DELIVERIES
async def test_a_proxy_that_breaks_http(nursery: trio.Nursery, name: str, byte_by_byte: bool) -> None:
    case = BROKEN[name]
    net = first_answer(nursery, case.data, byte_by_byte=byte_by_byte, then_close=case.then_close)
    error = await fail_to_connect(net, f"http://{USER}:{PASSWORD}@proxy.example:3128", max_header_bytes=500)
    assert error.response is None
    assert isinstance(error.__cause__, RemoteProtocolError)
    assert str(error) == f"{NO_TUNNEL}{error.__cause__}"
    assert case.reason in str(error)


async def test_100_informational_answers_are_no_harm(nursery: trio.Nursery) -> None:
    net = first_answer(nursery, b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + REFUSALS["502"].data)
    assert answer_of(await fail_to_connect(net)).status == 502


async def test_a_proxy_that_resets_the_connection(nursery: trio.Nursery) -> None:
    before = open_sockets()

    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        reset(peer)

    async with trio.open_nursery() as servers:
        server = await serve_tcp(servers, serve)
        async with ConnectionPool(make_tls().client, proxy=Proxy(server.url)) as pool:
            error = await refused(pool)
            assert error.response is None
            assert error.__cause__ is not None
            await trio.testing.wait_all_tasks_blocked()
            assert_unharmed(pool)
        servers.cancel_scope.cancel()
    assert open_sockets() == before


# -- After a refusal.


async def test_a_refusals_connection_is_not_used_again(nursery: trio.Nursery) -> None:
    """Some proxies would not understand what follows."""
    net = first_answer(nursery, REFUSALS["407 with a length"].data)
    async with net.pool() as pool:
        await refused(pool)
        await net.settles(pool)
        await pool.request("GET", ORIGIN)
        await net.settles(pool, tunnels=1)
    assert len(net.dialled) == 2


async def test_a_refusal_gives_its_slot_to_who_waits(nursery: trio.Nursery) -> None:
    net = first_answer(nursery, REFUSALS["502"].data)
    statuses = []
    async with net.pool(max_connections=1) as pool:

        async def ask() -> None:
            try:
                statuses.append((await pool.request("GET", ORIGIN)).status)
            except ProxyError as exc:
                statuses.append(answer_of(exc).status)

        async with trio.open_nursery() as requests:
            for _ in range(3):
                requests.start_soon(ask)
        await net.settles(pool, tunnels=1)
    assert statuses == [502, 200, 200]
    assert len(net.dialled) == 2


async def test_an_origins_failed_handshake_repeats_the_whole_way(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    asked: list[PeerRequest] = []

    async def origin(peer: ScriptedPeer) -> None:
        if len(asked) > 1:
            await secured(respond)(peer)

    net = Net(nursery, proxied(origin, seen=asked, tls=True))
    async with net.pool(secure_proxy(), retries=1) as pool:
        assert (await pool.request("GET", ORIGIN)).status == 200
        await net.settles(pool, tunnels=1)
    assert len(asked) == len(net.dialled) == 2


# -- Traces.


async def test_the_events_of_a_proxy_that_is_not_trusted(nursery: trio.Nursery) -> None:
    events = Events()
    net = Net(nursery, proxied(respond, tls=True))
    async with net.pool(Proxy(SECURE_PROXY, ssl_context=make_tls().client)) as pool:
        with pytest.raises(ConnectError) as info:
            await pool.request("GET", ORIGIN, extensions={"trace": events})
    dialled = both_ends("connection.connect_tcp")
    assert events.names == [*dialled, "proxy.start_tls.started", "proxy.start_tls.failed"]
    assert events.infos("proxy.start_tls.failed") == [{"exception": info.value}]


async def test_the_events_of_a_refusal(nursery: trio.Nursery) -> None:
    events = Events()
    for answer in (REFUSALS["502"].data, BROKEN["not HTTP"].data):
        events.seen.clear()
        async with first_answer(nursery, answer).pool() as pool:
            error = await refused(pool, extensions={"trace": events})
        assert events.names == [
            *both_ends("connection.connect_tcp"),
            "proxy.connect.started",
            "proxy.connect.failed",
        ]
        assert events.infos("proxy.connect.failed") == [{"exception": error}]


@pytest.mark.parametrize("name", REFUSALS)
async def test_a_handler_that_raises_about_a_refusal(nursery: trio.Nursery, name: str) -> None:
    case = REFUSALS[name]

    async def handler(event: str, info: dict[str, Any]) -> None:
        if event == "proxy.connect.failed":
            raise LookupError(event)

    net = first_answer(nursery, case.data, then_close=case.then_close)
    async with net.pool(max_connections=1) as pool:
        with pytest.raises(LookupError) as info:
            await pool.request("GET", ORIGIN, extensions={"trace": handler})
        assert isinstance(info.value.__context__, ProxyError)
        await net.settles(pool)
        assert (await pool.request("GET", ORIGIN)).status == 200
        await net.settles(pool, tunnels=1)
    assert len(net.dialled) == 2


async def test_a_refusal_is_final_even_if_its_content_takes_too_long(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    asked = []

    async def serve(peer: ScriptedPeer) -> None:
        asked.append(await peer.receive_request())
        await trio.sleep(1)
        await peer.send(b"HTTP/1.1 407 No\r\nContent-Length: 10\r\n\r\nhello")
        await swallow(peer)

    async with Net(nursery, serve).pool(retries=2) as pool:
        started = trio.current_time()
        answer = answer_of(await refused(pool, extensions={"timeout": {"connect": 1.5}}))
        assert trio.current_time() - started == 1.5
        assert (answer.status, answer.content) == (407, b"hello")
    assert len(asked) == 1


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
