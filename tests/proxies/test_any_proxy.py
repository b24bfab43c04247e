"""What holds on every way to an origin: through HTTP proxies, SOCKS proxies, and chains of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.certificates import alpn_server, make_tls
from tests.harness.checks import assert_unharmed, open_sockets
from tests.harness.h2peer import H2Peer
from tests.harness.peers import Script, respond, swallow
from tests.harness.proxies import (
    ORIGIN,
    PASSWORD,
    PROXY,
    USER,
    Net,
    Pace,
    assert_no_secrets,
    at_once,
    fail,
    proxied,
    proxy_tls,
    secure_proxy,
    secured,
    socks,
)
from tests.harness.resolver import set_resolver
from tests.harness.servers import serve_tcp
from tests.harness.streams import read_exactly
from tests.harness.traces import Events, both_ends
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    ConnectTimeout,
    NetworkStream,
    Proxy,
    ProxyError,
)
from trio_exchange.testing import Dialled, PeerRequest, ScriptedPeer

HTTP_URL = "http://example.com/"
PLAIN_TUNNEL_URL = "ws://example.com/"
SECOND = "http://second.example:3130"
SECURE_SECOND = "https://second.example:3130"

AUTH = (USER, PASSWORD)
SUBNEGOTIATION = b"\1\7aladdin\7hunter2"
BOUND = b"\5\0\0\1" + bytes(6)
SOCKS5_TO_ADDRESS = (b"\5\2\0\2", b"\5\2"), (SUBNEGOTIATION, b"\1\0"), (b"\5\1\0\1\xc0\0\2\7\1\xbb", BOUND)
SOCKS5H_TO_NAME = (b"\5\1\0", b"\5\0"), (b"\5\1\0\3\x0bexample.com\1\xbb", BOUND)
SOCKS4A_TO_NAME = ((b"\4\1\1\xbb\0\0\0\xffaladdin\0example.com\0", b"\0\x5a" + bytes(6)),)

DIAL = both_ends("connection.connect_tcp")
PROXY_TLS = both_ends("proxy.start_tls")
CONNECT = both_ends("proxy.connect")
LOOK_UP = both_ends("socks.getaddrinfo")
SOCKS = both_ends("socks.connect")
ORIGIN_TLS = both_ends("connection.start_tls")
EXCHANGE = both_ends(
    "http11.send_request_headers",
    "http11.send_request_body",
    "http11.receive_response_headers",
    "http11.receive_response_body",
    "http11.response_closed",
)

# What the peers, and `Net`, call the steps of those events.
STEPS = {
    LOOK_UP[0]: ("look-up",),
    DIAL[0]: ("dialling",),
    PROXY_TLS[0]: ("TLS with the proxy",),
    CONNECT[0]: ("the proxy's answer",),
    ORIGIN_TLS[0]: ("TLS with the origin",),
}


class Hop:
    """A proxy on a way, and the peer that plays it."""

    def __init__(self, proxy: Proxy, *talk: tuple[bytes, bytes]) -> None:
        self.proxy = proxy
        self.talk = talk

    def play(self, then: Script, pace: Pace) -> Script:
        if self.talk:
            return socks(*self.talk, then=then, pace=pace)
        return proxied(then, tls=self.proxy.url.scheme == b"https", pace=pace)


class Way:
    """A way to an origin.

    Attributes:
        proxies: The pool's.
        events: Those before the exchange's own.
        steps: What takes time, in order.
        url: Asked for.
    """

    def __init__(self, *hops: Hop, events: list[str], url: str = ORIGIN) -> None:
        self.proxies = [hop.proxy for hop in hops]
        self.events = events
        replies = tuple(f"reply {number}" for hop in hops for number in range(1, len(hop.talk) + 1))
        self.steps = [step for event in events for step in (STEPS | {SOCKS[0]: replies}).get(event, ())]
        self.url = url
        self._hops = hops

    def script(self, origin: Script = respond, pace: Pace = at_once) -> Script:
        """All the peers."""
        return self.play(secured(origin, pace=pace) if self.url == ORIGIN else origin, pace)

    def play(self, then: Script, pace: Pace = at_once) -> Script:
        """The proxies alone."""
        for hop in reversed(self._hops):
            then = hop.play(then, pace)
        return then

    async def settles(self, net: Net, pool: ConnectionPool) -> None:
        """Check that nothing is left; a connection to an HTTP proxy with tunnels may be closed afterwards."""
        if CONNECT[0] not in self.events:
            net.assert_settled(pool)
        await net.settles(pool)


HTTP, HTTPS = Hop(Proxy(PROXY, AUTH)), Hop(secure_proxy(auth=AUTH))
HTTP_SECOND, HTTPS_SECOND = Hop(Proxy(SECOND, AUTH)), Hop(secure_proxy(SECURE_SECOND, auth=AUTH))
SOCKS4A = Hop(Proxy("socks4a://proxy.example", (USER, "")), *SOCKS4A_TO_NAME)
SOCKS5 = Hop(Proxy("socks5://proxy.example", AUTH), *SOCKS5_TO_ADDRESS)
SOCKS5H = Hop(Proxy("socks5h://proxy.example"), *SOCKS5H_TO_NAME)

WAYS = {
    "forwarding": Way(HTTP, events=DIAL, url=HTTP_URL),
    "forwarding over TLS": Way(HTTPS, events=DIAL + PROXY_TLS, url=HTTP_URL),
    "tunnel": Way(HTTP, events=DIAL + CONNECT + ORIGIN_TLS),
    "plain tunnel": Way(HTTP, events=DIAL + CONNECT, url=PLAIN_TUNNEL_URL),
    "tunnel over TLS": Way(HTTPS, events=DIAL + PROXY_TLS + CONNECT + ORIGIN_TLS),
    "chain": Way(HTTPS, HTTPS_SECOND, events=DIAL + (PROXY_TLS + CONNECT) * 2 + ORIGIN_TLS),
    "chain of three": Way(
        *(HTTP, HTTP_SECOND, Hop(Proxy("http://third.example"))), events=DIAL + CONNECT * 3 + ORIGIN_TLS
    ),
    "forwarding at a chain's end": Way(
        *(HTTPS, HTTP_SECOND), events=DIAL + PROXY_TLS + CONNECT, url=HTTP_URL
    ),
    "socks4a": Way(SOCKS4A, events=DIAL + SOCKS + ORIGIN_TLS),
    "socks5": Way(SOCKS5, events=LOOK_UP + DIAL + SOCKS + ORIGIN_TLS),
    "socks5h": Way(SOCKS5H, events=DIAL + SOCKS + ORIGIN_TLS),
    "socks5h behind an HTTP proxy": Way(HTTP, SOCKS5H, events=DIAL + CONNECT + SOCKS + ORIGIN_TLS),
}

every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_step = pytest.mark.parametrize(
    ("way", "step"),
    [pytest.param(w, s, id=f"{n}, {s}") for n, w in WAYS.items() for s in dict.fromkeys(w.steps)],
)


class Steps:
    """The pace of a way: each step takes so many seconds, a silent one for ever.

    It is the pace of look-ups, too.
    """

    def __init__(self, seconds: float = 0, *, silent: str | None = None) -> None:
        self.seconds = seconds
        self.silent = silent

    async def __call__(self, step: str) -> None:
        if step == self.silent:
            await trio.sleep_forever()
        await trio.sleep(self.seconds)


@pytest.fixture
async def net(nursery: trio.Nursery) -> Callable[..., Net]:
    """Makes networks with the far ends of a way; names are found there as well."""

    def make(way: Way, pace: Pace = at_once, *, origin: Script = respond) -> Net:
        set_resolver("192.0.2.7").pace = pace
        return Net(nursery, way.script(origin, pace), pace=pace)

    return make


def connect_within(seconds: float, **more: Any) -> dict[str, Any]:
    return {"timeout": {"connect": seconds}, **more}


# -- Time.


@every_way
@pytest.mark.parametrize("others", [{}, {"pool": 1, "read": 1, "write": 1}])
async def test_the_steps_of_the_way_within_the_time(
    net: Callable[..., Net], autojump_clock: MockClock, way: Way, others: dict[str, float]
) -> None:
    """The timeouts other than `connect` are about something else."""
    total = 2 * len(way.steps)
    for timeout in (others, {"connect": total + 1, **others}):
        started = trio.current_time()
        async with net(way, Steps(2)).pool(*way.proxies) as pool:
            assert (await pool.request("GET", way.url, extensions={"timeout": timeout})).status == 200
            assert trio.current_time() - started == total


@every_way
async def test_the_connect_timeout_is_for_the_whole_way(
    net: Callable[..., Net], autojump_clock: MockClock, way: Way
) -> None:
    network = net(way, Steps(2))
    async with network.pool(*way.proxies, max_connections=1) as pool:
        for limit in range(1, 2 * len(way.steps), 2):
            started = trio.current_time()
            with pytest.raises(ConnectTimeout, match=f"within {limit} seconds"):
                await pool.request("GET", way.url, extensions=connect_within(limit))
            assert trio.current_time() - started == limit
            await way.settles(network, pool)
        limit = 2 * len(way.steps) + 1
        assert (await pool.request("GET", way.url, extensions=connect_within(limit))).status == 200


@every_step
async def test_a_step_that_never_ends(
    net: Callable[..., Net], autojump_clock: MockClock, way: Way, step: str
) -> None:
    pace = Steps(silent=step)
    network = net(way, pace)
    async with network.pool(*way.proxies, max_connections=1, retries=1) as pool:
        with pytest.raises(ConnectTimeout, match="within 5 seconds"):
            await pool.request("GET", way.url, extensions=connect_within(5))
        # The way is tried again, as a whole.
        assert trio.current_time() == 10
        assert len(network.dialled) == (0 if step in ("look-up", "dialling") else 2)
        await way.settles(network, pool)
        pace.silent = None
        assert (await pool.request("GET", way.url)).status == 200


@every_step
async def test_without_a_timeout_a_step_is_waited_for_until_it_is_cancelled(
    net: Callable[..., Net], autojump_clock: MockClock, way: Way, step: str
) -> None:
    pace = Steps(silent=step)
    network = net(way, pace)
    async with network.pool(*way.proxies, max_connections=1) as pool:
        with trio.move_on_after(9_000) as scope:
            await pool.request("GET", way.url)
        assert scope.cancelled_caught
        await way.settles(network, pool)
        pace.silent = None
        assert (await pool.request("GET", way.url)).status == 200


@every_step
async def test_a_pool_that_closes_ends_every_step(
    net: Callable[..., Net], autojump_clock: MockClock, way: Way, step: str
) -> None:
    network = net(way, Steps(silent=step))
    async with network.pool(*way.proxies) as pool, trio.open_nursery() as requests:

        async def ask() -> None:
            with pytest.raises(ConnectionNotAvailable):
                await pool.request("GET", way.url)

        requests.start_soon(ask)
        await trio.sleep(1)
        await pool.aclose()
        assert trio.current_time() == 1
        assert network.open == 0


# -- Dialling.


@every_way
async def test_a_proxy_that_can_not_be_dialled(net: Callable[..., Net], way: Way) -> None:
    network = net(way)
    network.failures.append(OSError("refused"))
    error = await fail(network, *way.proxies, url=way.url, error=ConnectError)
    assert f"could not connect to the proxy {way.proxies[0].url.origin}: refused" in str(error)


@every_way
@pytest.mark.parametrize(("failures", "time"), [(1, 0), (2, 0.5), (3, 1.5)])
async def test_dialling_the_proxy_is_tried_again(
    net: Callable[..., Net], autojump_clock: MockClock, way: Way, failures: int, time: float
) -> None:
    network = net(way)
    network.failures += [OSError("refused")] * failures
    async with network.pool(*way.proxies, retries=3) as pool:
        assert (await pool.request("GET", way.url)).status == 200
        assert trio.current_time() == time
    first = way.proxies[0].url
    assert network.dialled == [Dialled((first.host.decode(), first.port or 1080), {})] * (failures + 1)


# -- Traces.


@every_way
async def test_the_events_of_a_way(net: Callable[..., Net], way: Way) -> None:
    async with net(way).pool(*way.proxies) as pool:
        for expected in (way.events + EXCHANGE, EXCHANGE):
            events = Events()
            assert (await pool.request("GET", way.url, extensions={"trace": events})).status == 200
            assert events.names == expected


async def test_what_the_events_of_a_way_tell(net: Callable[..., Net]) -> None:
    way = WAYS["chain"]
    first, second = way.proxies
    events = Events()
    async with net(way).pool(first, second) as pool:
        await pool.request("GET", ORIGIN, extensions=connect_within(7, trace=events))
    assert events.infos("connection.connect_tcp.started") == [
        {"host": "proxy.example", "port": 3129, "local_address": None, "timeout": 7, "socket_options": None}
    ]
    assert events.infos("proxy.start_tls.started") == [
        {"ssl_context": proxy_tls().client, "server_hostname": name, "timeout": 7}
        for name in ("proxy.example", "second.example")
    ]
    assert events.infos("proxy.connect.started") == [
        {"proxy": first, "target": b"second.example:3130", "timeout": 7},
        {"proxy": second, "target": b"example.com:443", "timeout": 7},
    ]
    granted: dict[str, Any] = {"return_value": (b"HTTP/1.1", 200, b"Connection established", [])}
    assert events.infos("proxy.connect.complete") == [granted] * 2
    assert events.infos("connection.start_tls.started") == [
        {"ssl_context": make_tls().client, "server_hostname": "example.com", "timeout": 7}
    ]
    for name in ("connection.connect_tcp", "proxy.start_tls", "connection.start_tls"):
        for info in events.infos(f"{name}.complete"):
            assert isinstance(info["return_value"], NetworkStream)


async def test_the_events_of_a_step_that_takes_too_long(
    net: Callable[..., Net], autojump_clock: MockClock
) -> None:
    events = Events()
    way = WAYS["tunnel over TLS"]
    async with net(way, Steps(silent="the proxy's answer")).pool(*way.proxies) as pool:
        with pytest.raises(ConnectTimeout) as info:
            await pool.request("GET", ORIGIN, extensions=connect_within(3, trace=events))
    assert events.names == [*DIAL, *PROXY_TLS, "proxy.connect.started", "proxy.connect.failed"]
    assert events.infos("proxy.connect.failed") == [{"exception": info.value}]


async def test_the_events_of_a_stream(net: Callable[..., Net]) -> None:
    events = Events()
    way = WAYS["tunnel over TLS"]
    async with net(way).pool(*way.proxies) as pool:
        stream = await pool.open_tcp_stream("mail.example", 25, extensions={"trace": events})
        await stream.aclose()
    assert events.names == DIAL + PROXY_TLS + CONNECT


@pytest.mark.parametrize("how", ["raises", "cancels"])
@pytest.mark.parametrize(
    ("way", "index"),
    [
        pytest.param(way, index, id=f"{name}-{index}")
        for name, way in WAYS.items()
        for index in range(len(way.events + EXCHANGE))
    ],
)
async def test_a_handler_that_ends_the_request_leaves_nothing(
    net: Callable[..., Net], way: Way, index: int, how: str
) -> None:
    expected = (way.events + EXCHANGE)[index]
    told: list[str] = []

    async def handler(event: str, info: dict[str, Any]) -> None:
        told.append(event)
        if len(told) == index + 1:
            if how == "raises":
                raise LookupError(event)
            scope.cancel()
            await trio.lowlevel.checkpoint()

    network = net(way)
    async with network.pool(*way.proxies, max_connections=1) as pool:
        raising = pytest.raises(LookupError, match=expected)
        with trio.CancelScope() as scope, raising if how == "raises" else contextlib.nullcontext():
            await pool.request("GET", way.url, extensions={"trace": handler})
        assert scope.cancelled_caught == (how == "cancels")
        assert told[index] == expected
        if not expected.startswith("http11"):
            await way.settles(network, pool)
        await trio.testing.wait_all_tasks_blocked()
        idle = pool.statistics().idle
        network.assert_settled(pool, idle=idle)
        assert idle == 0 or expected.startswith("http11")
        assert (await pool.request("GET", way.url)).status == 200
        await trio.testing.wait_all_tasks_blocked()
        network.assert_settled(pool, idle=1)


@every_way
@pytest.mark.parametrize("seconds", [0, 1])
async def test_slow_handlers_use_up_no_time(
    net: Callable[..., Net], autojump_clock: MockClock, way: Way, seconds: float
) -> None:
    async def handler(event: str, info: dict[str, Any]) -> None:
        await trio.sleep(100)

    async with net(way, Steps(seconds)).pool(*way.proxies) as pool:
        timeout = {"read": 1, "write": 1, "pool": 1, "connect": seconds * len(way.steps) + 1}
        extensions = {"trace": handler, "timeout": timeout}
        assert (await pool.request("GET", way.url, extensions=extensions)).status == 200
        # Peers that take their time do so while the handler is slow, too.
        assert seconds or trio.current_time() == 100 * len(way.events + EXCHANGE)


# -- The log, and other places where credentials don't belong.


@every_way
async def test_the_log_of_a_way_has_no_credentials(
    net: Callable[..., Net], caplog: pytest.LogCaptureFixture, way: Way
) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange")
    async with net(way).pool(*way.proxies) as pool:
        response = await pool.request("GET", way.url)
        shown = [pool, pool.connections, response, [list(manager) for manager in pool._managers]]
        assert_no_secrets(shown, *way.proxies)
    logged = [message.partition(" ")[0] for message in caplog.messages]
    assert [event for event in logged if event in way.events] == way.events
    for record in caplog.records:
        assert record.name == "trio_exchange." + record.getMessage().partition(".")[0]
    assert_no_secrets(caplog.text)
    if way is WAYS["socks5"]:
        assert USER not in caplog.text


async def test_how_a_proxy_is_asked_is_in_the_log_alone(
    net: Callable[..., Net], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange")
    way = WAYS["tunnel"]
    events = Events()
    async with net(way).pool(*way.proxies) as pool:
        await pool.request("GET", way.url, extensions={"trace": events})
    logged = [message.partition(" ")[0] for message in caplog.messages]
    started = logged.index("proxy.connect.started")
    complete = logged.index("proxy.connect.complete")
    assert logged[started + 1 : complete] == EXCHANGE[:6]
    assert events.names == way.events + EXCHANGE
    assert_no_secrets(caplog.text)


# -- What is spoken inside.


@pytest.mark.parametrize("name", ["tunnel", "tunnel over TLS", "socks5h"])
async def test_http2_in_a_tunnel(nursery: trio.Nursery, name: str) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.start_tls(alpn_server("h2"))
        h2 = H2Peer(peer.stream)
        await h2.start()
        waiting = [await h2.request() for _ in range(3)]
        for stream_id, headers, _ in waiting:
            await h2.respond(stream_id, body=b"%d %b" % (stream_id, headers[b":authority"]))
        await h2.until_closed()

    way = WAYS[name]
    network = Net(nursery, way.play(serve))
    bodies = []
    async with network.pool(*way.proxies, http2=True) as pool:

        async def get() -> None:
            response = await pool.request("GET", ORIGIN)
            assert response.extensions["http_version"] == b"HTTP/2"
            bodies.append(response.content)

        async with trio.open_nursery() as requests:
            for _ in range(3):
                requests.start_soon(get)
        await network.settles(pool, tunnels=1)
    assert sorted(bodies) == [b"1 example.com", b"3 example.com", b"5 example.com"]
    assert len(network.dialled) == 1


SOCKS_TO_PLAIN = (b"\5\1\0", b"\5\0"), (b"\5\1\0\3\x0bexample.com\0\x50", BOUND)


@pytest.mark.parametrize("kind", ["http", "socks5h"])
async def test_http2_by_prior_knowledge_is_tunnelled(nursery: trio.Nursery, kind: str) -> None:
    asked: list[PeerRequest] = []
    heads = []

    async def serve(peer: ScriptedPeer) -> None:
        h2 = H2Peer(peer.stream)
        await h2.start()
        for _ in range(2):
            stream_id, headers, _ = await h2.request()
            heads.append(headers)
            await h2.respond(stream_id, body=b"two")
        await h2.until_closed()

    network = Net(
        nursery, proxied(serve, seen=asked) if kind == "http" else socks(*SOCKS_TO_PLAIN, then=serve)
    )
    proxy = Proxy(PROXY, AUTH) if kind == "http" else Proxy("socks5h://proxy.example")
    async with network.pool(proxy, http1=False, http2=True) as pool:
        for _ in range(2):
            response = await pool.request("GET", "http://example.com/x")
            assert (response.content, response.extensions["http_version"]) == (b"two", b"HTTP/2")
    assert len(network.dialled) == 1
    assert [request.target for request in asked] == [b"example.com:80"] * (kind == "http")
    expected = {b":method": b"GET", b":scheme": b"http", b":authority": b"example.com", b":path": b"/x"}
    assert heads == [expected] * 2


@pytest.mark.parametrize("kind", ["http", "socks5h"])
async def test_a_websocket_is_tunnelled_without_tls(nursery: trio.Nursery, kind: str) -> None:
    asked: list[PeerRequest] = []
    inner: list[PeerRequest] = []

    async def upgrade(peer: ScriptedPeer) -> None:
        inner.append(await peer.receive_request())
        await peer.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\nhello")
        assert await peer.receive_some() == b"bye"

    network = Net(
        nursery, proxied(upgrade, seen=asked) if kind == "http" else socks(*SOCKS_TO_PLAIN, then=upgrade)
    )
    proxy = Proxy(PROXY, AUTH, {"X": "y"}) if kind == "http" else Proxy("socks5h://proxy.example")
    async with network.pool(proxy) as pool:
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        async with pool.stream("GET", "ws://example.com/chat", headers=headers) as response:
            assert response.status == 101
            stream = response.extensions["network_stream"]
            assert await read_exactly(stream, 5) == b"hello"
            await stream.write(b"bye")
        await network.settles(pool)
    assert [request.target for request in asked] == [b"example.com:80"] * (kind == "http")
    assert inner[0].target == b"/chat"
    assert inner[0].header(b"host") == b"example.com"
    assert inner[0].header(b"proxy-authorization") is None
    assert inner[0].header(b"x") is None


@every_way
async def test_tls_is_spoken_with_the_origin(net: Callable[..., Net], way: Way) -> None:
    async with net(way).pool(*way.proxies) as pool:
        for body in (b"hello", b"again"):
            response = await pool.request("PUT", way.url, content=body)
            assert response.content.endswith(body)
            if way.url == ORIGIN:
                ssl_object = response.extensions["network_stream"].get_extra_info("ssl_object")
                assert (ssl_object.version(), ssl_object.server_hostname) == ("TLSv1.3", "example.com")
        assert pool.statistics().connections_opened == 1


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.url == ORIGIN])
async def test_an_origin_that_breaks_tls_in_the_tunnel(nursery: trio.Nursery, name: str) -> None:
    async def no_tls(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await swallow(peer)

    way = WAYS[name]
    set_resolver("192.0.2.7")
    network = Net(nursery, way.play(no_tls))
    async with network.pool(*way.proxies) as pool:
        with pytest.raises(ConnectError, match=r"the TLS handshake with example\.com failed"):
            await pool.request("GET", ORIGIN)
        await network.settles(pool)


# -- A proxy that ends its own direction and goes on reading (over sockets, where this is no closing).


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
            await swallow(peer)
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
