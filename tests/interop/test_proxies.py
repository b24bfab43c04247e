"""The client through real proxies, of each kind, and through chains of them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import wsproto
import wsproto.events

from tests.harness.checks import assert_unharmed, open_sockets
from trio_exchange import ConnectError, ConnectionPool, ExchangeError, Proxy, ProxyError, Response

from .actions import TIMEOUTS, header, in_parallel, next_text, pieces, serve, served_by, shout
from .nginx import KIB, MIB, Nginx, free_ports
from .process import running_again
from .proxies import (
    FORBIDDEN_HOST,
    FORBIDDEN_PORT,
    HTTP2_WAYS,
    HTTP_WAYS,
    PERSISTENT_WAYS,
    USER,
    USERINFO,
    WAYS,
    Running,
    Servers,
    proxy_at,
    running_haproxy,
    running_microsocks,
    running_squid,
    running_tinyproxy,
)

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]


@pytest.fixture(scope="session")
def servers(require: Callable[[str], None]) -> Iterator[Servers]:
    with contextlib.ExitStack() as stack:
        yield Servers(stack, require)


@pytest.fixture(params=WAYS)
def proxy(request: pytest.FixtureRequest, servers: Servers) -> Proxy:
    return WAYS[request.param](servers)


def a_pool(nginx: Nginx, proxy: Proxy | Sequence[Proxy], **options: Any) -> ConnectionPool:
    return ConnectionPool(nginx.client_ssl_context(), proxy=proxy, **options)


def forwards(proxy: Proxy) -> bool:
    return proxy.url.scheme in (b"http", b"https")


def connections_to(port: int) -> int:
    """How many connections this process has to a port of loopback (Linux)."""
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        if path.is_socket():
            with (
                socket.fromfd(int(path.name), socket.AF_INET, socket.SOCK_STREAM) as sock,
                contextlib.suppress(OSError),
            ):
                count += sock.getpeername() == ("127.0.0.1", port)
    return count


async def get(pool: ConnectionPool, nginx: Nginx, url: str, name: str) -> Response:
    response = await pool.request("GET", f"{url}/{name}", extensions=TIMEOUTS)
    assert response.status == 200
    assert response.content == nginx.file(name).read_bytes()
    return response


async def put(pool: ConnectionPool, nginx: Nginx, url: str, content: bytes, *, whole: bool = True) -> None:
    sent: Any = content if whole else pieces(content)
    name = f"store/{os.urandom(8).hex()}"
    response = await pool.request("PUT", f"{url}/{name}", content=sent, extensions=TIMEOUTS)
    assert response.status == 201
    assert nginx.file(name).read_bytes() == content
    nginx.file(name).unlink()


async def refused(
    pool: ConnectionPool, url: str, match: str | None = None, *, status: int | None = None
) -> ProxyError:
    """The error with which a proxy refuses a tunnel, by an HTTP response of a status, or else without one."""
    with pytest.raises(ProxyError, match=match) as info:
        await pool.request("GET", url, extensions=TIMEOUTS)
    response = info.value.response
    assert (response.status if response else None) == status
    return info.value


# Each proxy


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_http(nginx: Nginx, proxy: Proxy, host: str) -> None:
    """Forwarded by what is an HTTP proxy."""
    url = f"http://{host}:{nginx.http_port}"
    async with a_pool(nginx, proxy) as pool:
        # First, as a POST is not sent again: tinyproxy closes connections without saying that it will.
        names = await pool.request("POST", f"{url}/names", content=b"?", extensions=TIMEOUTS)
        assert names.content.split()[:2] == [host.encode(), url.removeprefix("http://").encode()]
        await get(pool, nginx, url, "1k")
        await get(pool, nginx, url, "1m")
        head = await pool.request("HEAD", f"{url}/1m", extensions=TIMEOUTS)
        assert (head.status, head.content, header(head, b"content-length")) == (200, b"", b"%d" % MIB)
        await put(pool, nginx, url, os.urandom(2 * MIB))
        assert forwards(proxy) or connections_to(proxy.url.port or 0) == 1
        missing = await pool.request("GET", f"{url}/missing", extensions=TIMEOUTS)
        assert missing.status == 404


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_https(nginx: Nginx, proxy: Proxy, host: str, http2: bool) -> None:
    """In a tunnel, which serves one request after the other."""
    url = f"https://{host}:{nginx.https_port}"
    async with a_pool(nginx, proxy, http2=http2) as pool:
        response = await get(pool, nginx, url, "1k")
        assert response.extensions["http_version"] == (b"HTTP/2" if http2 else b"HTTP/1.1")
        await get(pool, nginx, url, "1m")
        await put(pool, nginx, url, os.urandom(2 * MIB))
        await put(pool, nginx, url, os.urandom(MIB), whole=False)
        seen = [await served_by(pool, f"{url}/connection") for _ in range(5)]
        assert {connection for _, connection, _ in seen} == {seen[0][1]}
        assert connections_to(proxy.url.port or 0) == 1


async def test_a_stream_of_bytes(nginx: Nginx, proxy: Proxy) -> None:
    async with a_pool(nginx, proxy) as pool:
        stream = await pool.open_tcp_stream("localhost", nginx.http_port, extensions=TIMEOUTS)
        for _ in range(3):
            await stream.write(b"GET /empty HTTP/1.1\r\nHost: localhost\r\n\r\n", timeout=10)
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                data = await stream.read(timeout=10)
                assert data
                answer += data
            assert answer.startswith(b"HTTP/1.1 204 ")
        await stream.aclose()


async def test_many_concurrent_requests(nginx: Nginx, proxy: Proxy) -> None:
    async def ask(index: int) -> None:
        tunnel = index % 2 == 1
        url = nginx.https_url if tunnel else nginx.http_url
        if index % 5 == 0:
            # In a tunnel a body that can't be sent again: tinyproxy would close a connection under it.
            await put(pool, nginx, url, os.urandom(100 * KIB), whole=not tunnel)
        else:
            await get(pool, nginx, url, ("1k", "1m", "text")[index % 3])

    async with a_pool(nginx, proxy, max_connections=25) as pool:
        await in_parallel(50, ask)
        assert_unharmed(pool, idle=pool.statistics().idle)


async def test_cancelled_requests_beside_others(nginx: Nginx, proxy: Proxy) -> None:
    """At any moment: while a tunnel is opened, too."""
    chance = random.Random(7)

    async def give_up(_: int) -> None:
        with trio.move_on_after(chance.uniform(0, 0.1)):
            url = chance.choice([nginx.http_url, nginx.https_url])
            await pool.request("GET", f"{url}/{chance.choice(['1k', '1m', '100m'])}", extensions=TIMEOUTS)

    async def ask(index: int) -> None:
        await get(pool, nginx, (nginx.http_url, nginx.https_url)[index % 2], ("1k", "1m")[index % 3 == 0])

    before = open_sockets()
    async with a_pool(nginx, proxy, max_connections=50) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_parallel, 25, give_up)
            nursery.start_soon(in_parallel, 25, ask)
        await in_parallel(5, ask)
        numbers = pool.statistics()
        assert (numbers.active, numbers.connecting, numbers.waiting) == (0, 0, 0)
    assert open_sockets() == before


async def test_an_origin_that_closes_connections(nginx: Nginx, proxy: Proxy) -> None:
    """After three requests: the tunnel is over then."""
    async with a_pool(nginx, proxy) as pool:
        for _ in range(3):
            requests = [(await served_by(pool, f"{nginx.https_url}/few-requests"))[2] for _ in range(3)]
            assert requests == [1, 2, 3]


# HTTP proxies


@pytest.mark.parametrize("way", PERSISTENT_WAYS)
async def test_what_is_forwarded_shares_a_connection(nginx: Nginx, servers: Servers, way: str) -> None:
    proxy = WAYS[way](servers)
    async with a_pool(nginx, proxy) as pool:
        for host in ("127.0.0.1", "localhost", "127.0.0.1"):
            await get(pool, nginx, f"http://{host}:{nginx.http_port}", "1k")
        await put(pool, nginx, nginx.http_url, os.urandom(MIB), whole=False)
        assert connections_to(proxy.url.port or 0) == 1


@pytest.mark.parametrize("way", HTTP2_WAYS)
async def test_tunnels_share_a_connection(nginx: Nginx, servers: Servers, way: str) -> None:
    proxy = WAYS[way](servers)

    async def ask(_: int) -> None:
        for _ in range(5):
            await get(pool, nginx, nginx.https_url, "1k")

    async with a_pool(nginx, proxy, max_connections=40) as pool, contextlib.AsyncExitStack() as stack:
        # As long as these are open, nobody else can have their tunnels.
        for _ in range(10):
            response = await stack.enter_async_context(
                pool.stream("GET", f"{nginx.https_url}/100m", extensions=TIMEOUTS)
            )
            assert response.status == 200
        await in_parallel(10, ask)
        assert connections_to(proxy.url.port or 0) == 1


@pytest.mark.parametrize(
    ("way", "tunnels", "connections"),
    [("nghttpx-http2", 20, 1), ("haproxy-http2", 20, 1), ("haproxy-http2", 60, 3)],
)
async def test_a_burst_of_tunnels(
    nginx: Nginx, servers: Servers, way: str, tunnels: int, connections: int
) -> None:
    """All of them are wanted before there is any connection, and haproxy takes 25 on each."""
    proxy = WAYS[way](servers)
    content = nginx.file("1m").read_bytes()

    async def ask(_: int) -> None:
        stream = await pool.open_tcp_stream("127.0.0.1", nginx.http_port, extensions=TIMEOUTS)
        opened.release()
        await everybody.wait()
        await stream.write(b"GET /1m HTTP/1.0\r\n\r\n", timeout=10)
        answer = b""
        while data := await stream.read(timeout=10):
            answer += data
        assert answer.partition(b"\r\n\r\n")[2] == content
        await stream.aclose()

    opened, everybody = trio.Semaphore(0), trio.Event()
    async with a_pool(nginx, proxy, max_connections=tunnels) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(in_parallel, tunnels, ask)
        for _ in range(tunnels):
            await opened.acquire()
        assert connections_to(proxy.url.port or 0) == connections
        everybody.set()


@pytest.mark.parametrize("way", ["squid", "tinyproxy", "haproxy-tls", "nghttpx-http2", "danted-socks5"])
async def test_a_websocket(nursery: trio.Nursery, nginx: Nginx, servers: Servers, way: str) -> None:
    port = await serve(nursery, shout)
    headers = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    async with (
        a_pool(nginx, WAYS[way](servers)) as pool,
        pool.stream("GET", f"ws://127.0.0.1:{port}/chat", headers=headers, extensions=TIMEOUTS) as response,
    ):
        assert response.status == 101
        stream = response.extensions["network_stream"]
        websocket = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
        await stream.write(websocket.send(wsproto.events.TextMessage("hello")), timeout=10)
        assert await next_text(websocket, stream) == "HELLO"
        await stream.write(websocket.send(wsproto.events.CloseConnection(1000)), timeout=10)
        while data := await stream.read(timeout=10):
            websocket.receive_data(data)
        assert [type(event) for event in websocket.events()] == [wsproto.events.CloseConnection]


@pytest.mark.parametrize("way", ["squid-tls", "haproxy-tls"])
async def test_http2_is_wanted_of_a_proxy_that_has_none(nginx: Nginx, servers: Servers, way: str) -> None:
    port, userinfo = {"squid-tls": (3, None), "haproxy-tls": (1, USERINFO)}[way]
    server = servers.squid if way == "squid-tls" else servers.haproxy
    proxy = proxy_at(server, port=port, scheme="https", userinfo=userinfo, http2=True)
    async with a_pool(nginx, proxy) as pool:
        await get(pool, nginx, nginx.http_url, "1k")
        await get(pool, nginx, nginx.https_url, "1k")


async def test_proxies_and_origins_are_trusted_apart(nginx: Nginx, servers: Servers) -> None:
    """Each has an authority of its own."""
    url = f"https://127.0.0.1:{servers.squid.ports[2]}"
    of_proxy, of_origin = servers.squid.client_ssl_context(), nginx.client_ssl_context()
    for proxy_context, origin_context in (
        (of_origin, of_origin),
        (of_proxy, of_proxy),
        (of_origin, of_proxy),
    ):
        proxy = Proxy(url, ssl_context=proxy_context)
        async with ConnectionPool(origin_context, proxy=proxy) as pool:
            with pytest.raises(ConnectError, match="certificate"):
                await pool.request("GET", f"{nginx.https_url}/1k", extensions=TIMEOUTS)
            assert pool.statistics().open == 0


# What proxies refuse

#: tinyproxy's word for a wrong password is that of an origin.
LOCKED: dict[str, tuple[Callable[[Servers, str | None], Proxy], int]] = {
    "squid": (lambda servers, user: proxy_at(servers.squid, port=2, userinfo=user), 407),
    "tinyproxy": (lambda servers, user: proxy_at(servers.tinyproxy_password, userinfo=user), 401),
    "haproxy-tls": (lambda servers, user: proxy_at(servers.haproxy, userinfo=user), 407),
    "haproxy-http2": (
        lambda servers, user: proxy_at(servers.haproxy, port=2, userinfo=user, http2=True),
        407,
    ),
}


@pytest.mark.parametrize("userinfo", [None, f"{USER}:wrong"], ids=["none", "wrong"])
@pytest.mark.parametrize("way", LOCKED)
async def test_no_or_wrong_credentials(
    nginx: Nginx, servers: Servers, way: str, userinfo: str | None
) -> None:
    make, status = LOCKED[way]
    status = status if userinfo else 407
    challenge = b"proxy-authenticate" if status == 407 else b"www-authenticate"
    async with a_pool(nginx, make(servers, userinfo)) as pool:
        for _ in range(2):
            error = await refused(pool, f"{nginx.https_url}/1k", str(status), status=status)
            assert error.response is not None
            forwarded = await pool.request("GET", f"{nginx.http_url}/1k", extensions=TIMEOUTS)
            for response in (error.response, forwarded):
                assert response.status == status
                assert (header(response, challenge) or b"").startswith(b"Basic ")
                assert b"<" in response.content
            assert (error.reply_code, error.meaning) == (None, None)
        numbers = pool.statistics()
        assert (numbers.active, numbers.connecting, numbers.waiting) == (0, 0, 0)


async def test_credentials_are_for_the_proxy_alone(nursery: trio.Nursery, servers: Servers) -> None:
    """What is forwarded, and what goes through a tunnel, comes without them."""
    heads: list[bytes] = []

    async def note(peer: Any) -> None:
        async for request in peer:
            heads.extend(name.lower() for name, _ in request.headers)
            await peer.send_response(200, body=request.body)

    port = await serve(nursery, note)
    for way in ("squid-password", "tinyproxy-password", "haproxy-tls", "haproxy-http2"):
        async with ConnectionPool(proxy=WAYS[way](servers)) as pool:
            response = await pool.request(
                "POST", f"http://127.0.0.1:{port}/", content=b"forwarded", extensions=TIMEOUTS
            )
            assert response.content == b"forwarded"
            stream = await pool.open_tcp_stream("127.0.0.1", port, extensions=TIMEOUTS)
            await stream.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", timeout=10)
            assert (await stream.read(timeout=10)).startswith(b"HTTP/1.1 200")
    assert heads.count(b"host") == 8
    assert b"proxy-authorization" not in heads


@pytest.mark.parametrize("rules", [True, False], ids=["forbidden", "unreachable"])
@pytest.mark.parametrize("way", HTTP_WAYS)
async def test_an_origin_that_an_http_proxy_does_not_connect_to(
    nginx: Nginx, servers: Servers, way: str, rules: bool
) -> None:
    """Its rules forbid the host, or nobody listens at the port."""
    origin = FORBIDDEN_HOST if rules else f"127.0.0.1:{free_ports(1)[0]}"
    unreachable = 500 if way.startswith("tinyproxy") else 503
    status = 403 if rules else unreachable
    async with a_pool(nginx, WAYS[way](servers)) as pool:
        error = await refused(pool, f"https://{origin}/", str(status), status=status)
        assert error.response is not None
        assert not rules or b"<html" in error.response.content.lower()
        forwarded = await pool.request("GET", f"http://{origin}/", extensions=TIMEOUTS)
        assert forwarded.status == status
        await get(pool, nginx, nginx.https_url, "1k")


@pytest.mark.parametrize(
    ("way", "host", "port", "code"),
    [
        ("danted-socks4", "127.0.0.1", None, 91),
        ("danted-socks5", "127.0.0.1", None, 5),
        ("danted-socks5h", "localhost", None, 5),
        ("microsocks-password", "localhost", None, 5),
        ("danted-socks4", "127.0.0.1", FORBIDDEN_PORT, 91),
        ("danted-socks5", "127.0.0.1", FORBIDDEN_PORT, 2),
        ("danted-socks5h", "localhost", FORBIDDEN_PORT, 2),
        ("danted-socks5h", "unknown.test", 443, 4),
        ("microsocks-password", "unknown.test", 443, 1),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_what_a_socks_proxy_refuses(
    nginx: Nginx, servers: Servers, way: str, host: str, port: int | None, code: int, scheme: str
) -> None:
    """Without a port: one where nobody listens."""
    port = free_ports(1)[0] if port is None else port
    async with a_pool(nginx, WAYS[way](servers)) as pool:
        error = await refused(pool, f"{scheme}://{host}:{port}/")
        assert error.reply_code == code
        assert error.meaning
        assert error.meaning in str(error)
        await get(pool, nginx, nginx.https_url, "1k")


@pytest.mark.parametrize(
    ("server", "userinfo", "code", "message"),
    [
        ("microsocks", None, 255, "wants a user name and a password"),
        ("v2ray", None, 255, "wants a user name and a password"),
        ("microsocks", f"{USER}:nonsense", 2, "refused"),
        ("v2ray", f"{USER}:nonsense", 255, "refused"),
    ],
)
async def test_no_or_wrong_credentials_for_socks(
    nginx: Nginx, servers: Servers, server: str, userinfo: str | None, code: int, message: str
) -> None:
    if server == "microsocks":
        proxy = proxy_at(servers.microsocks_password, userinfo=userinfo)
    else:
        proxy = proxy_at(servers.v2ray, port=2, scheme="socks5h", userinfo=userinfo)
    async with a_pool(nginx, proxy) as pool:
        for url in (nginx.http_url, nginx.https_url):
            error = await refused(pool, f"{url}/1k", message)
            assert error.reply_code == code
            assert "nonsense" not in str(error)
        assert_unharmed(pool)


@pytest.mark.parametrize("way", ["v2ray-socks4a", "v2ray-password"])
async def test_a_proxy_that_agrees_before_it_has_connected(nginx: Nginx, servers: Servers, way: str) -> None:
    """Then there is nothing but the end of the connection to tell that it did not."""
    (port,) = free_ports(1)
    async with a_pool(nginx, WAYS[way](servers)) as pool:
        for scheme in ("http", "https"):
            with pytest.raises(ExchangeError) as failed:
                await pool.request("GET", f"{scheme}://127.0.0.1:{port}/", extensions=TIMEOUTS)
            assert not isinstance(failed.value, ProxyError)
        assert_unharmed(pool)
        await get(pool, nginx, nginx.https_url, "1k")


# Chains

CHAINS = [
    ("squid", "danted-socks5h"),
    ("danted-socks4", "squid-tls"),
    ("squid-tls", "haproxy-http2"),
    ("haproxy-http2", "nghttpx-http2"),
    ("nghttpx-http2", "v2ray-socks4a"),
    ("v2ray-password", "squid-password"),
    ("danted-socks5", "tinyproxy-password"),
    ("microsocks-password", "nghttpx-http2"),
    ("tinyproxy", "haproxy-tls", "microsocks-password"),
]


@pytest.mark.parametrize("ways", CHAINS, ids="+".join)
async def test_a_chain(nginx: Nginx, servers: Servers, ways: tuple[str, ...]) -> None:
    async def ask(index: int) -> None:
        tunnel = index % 2 == 1
        url = nginx.https_url if tunnel else nginx.http_url
        await get(pool, nginx, url, ("1k", "1m")[index % 3 == 0])
        await put(pool, nginx, url, os.urandom(100 * KIB), whole=not tunnel)

    before = open_sockets()
    proxies = [WAYS[way](servers) for way in ways]
    async with a_pool(nginx, proxies, http2=True, max_connections=8) as pool:
        response = await get(pool, nginx, f"https://localhost:{nginx.https_port}", "1m")
        assert response.extensions["http_version"] == b"HTTP/2"
        await in_parallel(16, ask)
        # Nobody but the first is spoken with directly.
        assert connections_to(proxies[0].url.port or 0) > 0
        assert [connections_to(proxy.url.port or 0) for proxy in proxies[1:]] == [0] * (len(proxies) - 1)
    assert open_sockets() == before


@pytest.mark.parametrize("first", ["squid", "haproxy-http2", "danted-socks5"])
@pytest.mark.parametrize(("second", "status"), [("tinyproxy", 401), ("microsocks", None)])
async def test_what_the_second_of_a_chain_refuses(
    nginx: Nginx, servers: Servers, first: str, second: str, status: int | None
) -> None:
    server = servers.tinyproxy_password if second == "tinyproxy" else servers.microsocks_password
    proxies = [WAYS[first](servers), proxy_at(server, userinfo=f"{USER}:wrong")]
    async with a_pool(nginx, proxies) as pool:
        await refused(pool, f"{nginx.https_url}/1k", status=status)


# Proxies that go away

STOPPED: dict[str, tuple[Callable[[Servers], Running], dict[str, Any]]] = {
    "squid-tls": (lambda _: running_squid(), {"port": 3, "scheme": "https"}),
    "tinyproxy": (lambda _: running_tinyproxy(), {}),
    "microsocks": (lambda _: running_microsocks(), {}),
    "haproxy-tls": (lambda servers: running_haproxy(servers.squid.ports[1]), {"userinfo": USERINFO}),
    "haproxy-http2": (
        lambda servers: running_haproxy(servers.squid.ports[1]),
        {"port": 2, "userinfo": USERINFO, "http2": True},
    ),
}


@pytest.mark.parametrize("name", STOPPED)
async def test_a_proxy_that_stops_and_starts_again(nginx: Nginx, servers: Servers, name: str) -> None:
    start, options = STOPPED[name]

    async def read(body: AsyncIterator[bytes]) -> None:
        async for _ in body:
            pass

    async def lose(url: str) -> None:
        async with pool.stream("GET", f"{url}/100m", extensions=TIMEOUTS) as response:
            body = response.aiter_stream()
            await anext(body)
            started.release()
            await stopped.wait()
            with pytest.raises(ExchangeError):
                await read(body)

    with start(servers) as server:
        started, stopped = trio.Semaphore(0), trio.Event()
        async with a_pool(nginx, proxy_at(server, **options)) as pool:
            with trio.fail_after(40):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lose, nginx.http_url)
                    nursery.start_soon(lose, nginx.https_url)
                    await started.acquire()
                    await started.acquire()
                    await trio.to_thread.run_sync(server.stop)
                    stopped.set()
            for url in (nginx.http_url, nginx.https_url):
                with pytest.raises(ExchangeError):
                    await pool.request("GET", f"{url}/1k", extensions=TIMEOUTS)
            with running_again(server):
                for url in (nginx.http_url, nginx.https_url):
                    await get(pool, nginx, url, "1m")
                await in_parallel(10, lambda index: get(pool, nginx, nginx.https_url, "1k"))
