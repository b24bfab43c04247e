"""Proxies that speak HTTP/2: tunnels that share a connection, and requests that are forwarded over it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hpack
import pytest
import trio
import trio.testing
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame
from trio.testing import MockClock

from tests.harness.certificates import alpn_server, client_context, make_tls
from tests.harness.checks import internals
from tests.harness.h2proxy import (
    LARGE,
    H2Proxy,
    StreamScript,
    accept_tunnel,
    multiplexing,
    naming_origin,
    naming_origin2,
)
from tests.harness.h2server import Multiplexer, ServerStream
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    ConnectTimeout,
    ExchangeError,
    NetworkStream,
    Proxy,
    ProxyError,
    ReadError,
    RemoteProtocolError,
    Request,
)
from trio_exchange.testing import MemoryConnector, ScriptedPeer


async def echo(stream: ServerStream) -> None:
    await stream.respond(200)
    while data := await stream.receive_some():
        await stream.send_all(data)


async def forever(_: ServerStream) -> None:
    await trio.sleep_forever()


def scripts(*several: StreamScript) -> StreamScript:
    """One script after the other, and the last for all others."""
    left = list(several)

    async def play(stream: ServerStream) -> None:
        script = left.pop(0) if len(left) > 1 else left[0]
        await script(stream)

    return play


def carriers(pool: ConnectionPool, hop: int = 1) -> list[str]:
    """The states of the connections that carry tunnels, to the last proxy or those before it."""
    return [connection.state for connection in pool._managers[hop]]


URL = "https://a.origin.example/"


# -- What is spoken with the proxy.


@pytest.mark.parametrize(
    ("proxy", "offer"),
    [
        (multiplexing(), b"\x00\x0c\x02h2\x08http/1.1"),
        (Proxy("https://proxy.example", ssl_context=client_context(make_tls().ca)), b"\x00\x09\x08http/1.1"),
    ],
    ids=["http2", "http1"],
)
async def test_http2_is_offered_to_a_proxy_that_may_speak_it_alone(
    nursery: trio.Nursery, proxy: Proxy, offer: bytes
) -> None:
    hellos = []

    async def listen(peer: ScriptedPeer) -> None:
        hellos.append(await peer.receive_some())

    connector = MemoryConnector(nursery, listen)
    async with ConnectionPool(connector=connector, proxy=proxy, http2=True) as pool:
        with pytest.raises(ConnectError):
            await pool.request("GET", URL)
    assert offer in hellos[0]


async def test_a_proxy_without_tls_is_spoken_to_in_http1(nursery: trio.Nursery) -> None:
    async def refuse(peer: ScriptedPeer) -> None:
        request = await peer.receive_request()
        assert (request.method, request.target) == (b"CONNECT", b"a.origin.example:443")
        await peer.send_response(403)

    connector = MemoryConnector(nursery, refuse)
    proxy = Proxy("http://proxy.example", http2=True)
    async with ConnectionPool(connector=connector, proxy=proxy, http2=True) as pool:
        with pytest.raises(ProxyError, match="403"):
            await pool.request("GET", URL)


async def test_a_proxy_that_prefers_http1_works_the_same(nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.start_tls(alpn_server("http/1.1"))
        request = await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.start_tls(alpn_server())
        await naming_origin(peer, request.target)

    connector = MemoryConnector(nursery, serve)
    async with ConnectionPool(
        client_context(make_tls().ca), connector=connector, proxy=multiplexing()
    ) as pool:
        for _ in range(2):
            for host in (b"a.origin.example", b"b.origin.example"):
                response = await pool.request("GET", b"https://%b/" % host)
                assert response.content == host + b":443"
    # Each tunnel needs a connection of its own.
    assert len(connector.dialled) == 2


async def test_tunnels_share_a_connection(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    hosts = [f"{'h2-' * (i % 2)}{i}.origin.example" for i in range(20)]
    answers = {}

    async def get(pool: ConnectionPool, host: str) -> None:
        response = await pool.request("GET", f"https://{host}/")
        answers[host] = (response.content, response.extensions["http_version"])

    async with proxy.pool(http2=True, max_connections=20) as pool:
        async with trio.open_nursery() as requests:
            for host in hosts:
                requests.start_soon(get, pool, host)
        assert len(pool.connections) == 20
        assert carriers(pool) == ["active"]
    assert answers == {
        host: (f"{host}:443".encode(), b"HTTP/2" if host.startswith("h2") else b"HTTP/1.1") for host in hosts
    }
    assert len(proxy.connector.dialled) == 1
    assert sorted(stream.id for stream in proxy.streams) == list(range(1, 40, 2))


async def test_connect_has_no_more_fields_than_it_may(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    given = multiplexing(auth=("user", "secret"), headers={"X-Who": "me"})
    async with proxy.pool(proxy=given) as pool:
        for host in ("a.origin.example", "b.origin.example"):
            await pool.request("GET", f"https://{host}/", headers={"X-Mine": "not the proxy's"})
    credentials = b"Basic dXNlcjpzZWNyZXQ="
    for stream, name in zip(proxy.streams, (b"a", b"b"), strict=True):
        assert stream.fields == [
            (b":method", b"CONNECT"),
            (b":authority", name + b".origin.example:443"),
            (b"proxy-authorization", credentials),
            (b"x-who", b"me"),
        ]
    decoder = hpack.Decoder()
    for frame in proxy.connections[0].peer.sent(HeadersFrame):
        assert "END_STREAM" not in frame.flags
        fields: Any = decoder.decode(frame.data, raw=True)
        assert [field[0] for field in fields if not field.indexable] == [b"proxy-authorization"]


async def test_what_is_forwarded_has_the_origin_in_its_pseudo_headers(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, naming_origin2)
    given = multiplexing(auth=("user", "secret"), headers={"X-Who": "me", "X-Both": "proxy"})
    async with proxy.pool(proxy=given) as pool:
        response = await pool.request(
            "GET", "http://a.origin.example:8080/path?query", headers={"X-Both": "own"}
        )
        assert response.content == b"a.origin.example:8080:443"
        response = await pool.request("POST", "http://b.origin.example/", content=b"12345")
        assert response.content == b"5"
        await pool.request("OPTIONS", "http://c.origin.example", extensions={"target": b"*"})
        # They share the connection to the proxy, whatever their origins.
        assert [connection.state for connection in pool.connections] == ["idle"]
    first, second, third = (stream.fields for stream in proxy.streams)
    assert first == [
        (b":method", b"GET"),
        (b":authority", b"a.origin.example:8080"),
        (b":scheme", b"http"),
        (b":path", b"/path?query"),
        (b"x-both", b"own"),
        (b"proxy-authorization", b"Basic dXNlcjpzZWNyZXQ="),
        (b"x-who", b"me"),
    ]
    assert second[:4] == [
        (b":method", b"POST"),
        (b":authority", b"b.origin.example"),
        (b":scheme", b"http"),
        (b":path", b"/"),
    ]
    assert third[:4] == [
        (b":method", b"OPTIONS"),
        (b":authority", b"c.origin.example"),
        (b":scheme", b"http"),
        (b":path", b"*"),
    ]
    decoder = hpack.Decoder()
    for frame in proxy.connections[0].peer.sent(HeadersFrame):
        fields: Any = decoder.decode(frame.data, raw=True)
        assert [field[0] for field in fields if not field.indexable] == [b"proxy-authorization"]


# -- Who establishes the connection.


class Crowd:
    """Requests that begin one after the other; what becomes of each."""

    def __init__(self, pool: ConnectionPool, nursery: trio.Nursery) -> None:
        self.scopes: list[trio.CancelScope] = []
        self.results: dict[int, Any] = {}
        self._pool = pool
        self._nursery = nursery

    async def join(self, **timeouts: float) -> None:
        number = len(self.scopes)
        self.scopes.append(trio.CancelScope())
        self._nursery.start_soon(self._request, number, timeouts)
        await trio.testing.wait_all_tasks_blocked()

    async def _request(self, number: int, timeouts: dict[str, float]) -> None:
        with self.scopes[number]:
            try:
                response = await self._pool.request(
                    "GET", f"https://{number}.origin.example/", extensions={"timeout": timeouts}
                )
                self.results[number] = response.status
            except ExchangeError as exc:
                self.results[number] = type(exc)


async def test_one_establishes_the_connection_and_others_share_it(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    proxy.connector.gate = trio.Event()
    async with proxy.pool() as pool:
        async with trio.open_nursery() as requests:
            crowd = Crowd(pool, requests)
            for _ in range(5):
                await crowd.join()
            assert len(proxy.connector.dialled) == 1
            proxy.connector.gate.set()
        assert crowd.results == dict.fromkeys(range(5), 200)
    assert len(proxy.connector.dialled) == 1


async def test_when_the_leader_fails_the_next_one_leads(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    proxy.connector.gate = trio.Event()
    proxy.connector.failures = [OSError("no route")]
    async with proxy.pool() as pool:
        async with trio.open_nursery() as requests:
            crowd = Crowd(pool, requests)
            for _ in range(3):
                await crowd.join()
            proxy.connector.gate.set()
        assert crowd.results == {0: ConnectError, 1: 200, 2: 200}
    assert len(proxy.connector.dialled) == 2


async def test_when_the_leader_is_cancelled_the_next_one_leads(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    proxy.connector.gate = trio.Event()
    async with proxy.pool() as pool:
        async with trio.open_nursery() as requests:
            crowd = Crowd(pool, requests)
            for _ in range(3):
                await crowd.join()
            crowd.scopes[0].cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert len(proxy.connector.dialled) == 2
            proxy.connector.gate.set()
        assert crowd.results == {1: 200, 2: 200}
    assert len(proxy.connections) == 1


async def test_when_the_leader_times_out_the_next_one_leads(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    proxy.connector.gate = trio.Event()
    async with proxy.pool() as pool:
        async with trio.open_nursery() as requests:
            crowd = Crowd(pool, requests)
            await crowd.join(connect=5)
            await crowd.join()
            await trio.sleep(6)
            assert crowd.results == {0: ConnectTimeout}
            assert len(proxy.connector.dialled) == 2
            proxy.connector.gate.set()
        assert crowd.results == {0: ConnectTimeout, 1: 200}


async def test_the_connect_timeout_goes_on_behind_a_leader(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    proxy.connector.gate = trio.Event()
    async with proxy.pool() as pool:
        async with trio.open_nursery() as requests:
            crowd = Crowd(pool, requests)
            await crowd.join()
            start = trio.current_time()
            with pytest.raises(ConnectTimeout):
                await pool.request("GET", URL, extensions={"timeout": {"connect": 5}})
            assert trio.current_time() - start == 5
            proxy.connector.gate.set()
        assert crowd.results == {0: 200}


async def test_the_connect_timeout_goes_on_until_the_proxy_tells_its_limit(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    async def mute(peer: ScriptedPeer) -> None:
        await peer.start_tls(alpn_server("h2"))
        async for _ in peer.stream:
            pass

    connector = MemoryConnector(nursery, mute)
    async with (
        ConnectionPool(connector=connector, proxy=multiplexing()) as pool,
        trio.open_nursery() as requests,
    ):
        crowd = Crowd(pool, requests)
        await crowd.join()
        start = trio.current_time()
        with pytest.raises(ConnectTimeout):
            await pool.request("GET", URL, extensions={"timeout": {"connect": 5}})
        assert trio.current_time() - start == 5
        crowd.scopes[0].cancel()
    assert len(connector.dialled) == 1


async def test_the_connect_timeout_goes_on_until_the_proxy_answers(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    proxy = H2Proxy(nursery, scripts(forever, accept_tunnel))
    async with proxy.pool() as pool:
        start = trio.current_time()
        with pytest.raises(ConnectTimeout):
            await pool.request("GET", URL, extensions={"timeout": {"connect": 5}})
        assert trio.current_time() - start == 5
        await trio.testing.wait_all_tasks_blocked()
        assert proxy.streams[0].was_reset
        assert (await pool.request("GET", URL)).status == 200
    assert len(proxy.connector.dialled) == 1


# -- How many tunnels a connection carries.


@pytest.mark.parametrize(("limit", "connections"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (3, [1, 3])])
async def test_a_proxy_says_how_many_tunnels_there_may_be_on_a_connection(
    nursery: trio.Nursery, limit: int, connections: list[int]
) -> None:
    proxy = H2Proxy(nursery, accept_tunnel, {SettingCodes.MAX_CONCURRENT_STREAMS: limit})
    async with proxy.pool() as pool:
        async with trio.open_nursery() as requests:
            crowd = Crowd(pool, requests)
            for _ in range(4):
                await crowd.join()
        assert crowd.results == dict.fromkeys(range(4), 200)
        assert len(pool.connections) == 4
    assert sorted(len(connection.streams) for connection in proxy.connections) == connections


async def test_a_limit_that_is_lowered_to_nothing_ends_no_tunnel(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    async with proxy.pool() as pool:
        await pool.request("GET", URL)
        await proxy.connections[0].peer.send_frame(
            SettingsFrame(settings={SettingCodes.MAX_CONCURRENT_STREAMS: 0})
        )
        await trio.testing.wait_all_tasks_blocked()
        assert (await pool.request("GET", "https://b.origin.example/")).content == b"b.origin.example:443"
        assert (await pool.request("GET", URL)).content == b"a.origin.example:443"
        assert pool.statistics().connections_opened == 2
    assert [len(connection.streams) for connection in proxy.connections] == [1, 1]


# -- A proxy that does not want to.


async def goaway(stream: ServerStream, last_stream_id: int) -> None:
    await stream.server.peer.send_frame(GoAwayFrame(last_stream_id=last_stream_id))


async def not_acted_on(stream: ServerStream) -> None:
    stream.break_off()
    await goaway(stream, 0)


async def going_away(stream: ServerStream) -> None:
    stream.break_off()
    await goaway(stream, stream.id)
    await stream.server.peer.stream.aclose()


async def reset_as_refused(stream: ServerStream) -> None:
    await stream.reset(ErrorCodes.REFUSED_STREAM)


@pytest.mark.parametrize("refuse", [not_acted_on, reset_as_refused])
async def test_a_tunnel_that_was_not_acted_on_is_asked_for_again_once(
    nursery: trio.Nursery, refuse: StreamScript
) -> None:
    proxy = H2Proxy(nursery, scripts(refuse, accept_tunnel))
    async with proxy.pool() as pool:
        assert (await pool.request("GET", URL)).content == b"a.origin.example:443"
    assert len(proxy.streams) == 2


@pytest.mark.parametrize("traced", [False, True])
async def test_tunnels_that_were_not_asked_for_yet_wait_for_another_place(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, traced: bool
) -> None:
    """The proxy lowers its limit at once, when many tunnels have been granted a place."""
    limit = SettingCodes.MAX_CONCURRENT_STREAMS
    proxy = H2Proxy(nursery, accept_tunnel, {limit: 100}, {limit: 2})
    answers: list[bytes | None] = []

    async def slowly(event: str, _: dict[str, Any]) -> None:
        if event == "proxy.connect.started":
            await trio.sleep(0.01)

    async def get(number: int) -> None:
        extensions = {"trace": slowly} if traced else {}
        response = await pool.request("GET", f"https://{number}.origin.example/", extensions=extensions)
        answers.append(response.content)

    async with proxy.pool() as pool:
        async with trio.open_nursery() as requests:
            for number in range(10):
                requests.start_soon(get, number)
        assert pool.statistics().idle == 10
    assert len(answers) == len(set(answers)) == 10
    # No tunnel was asked for twice.
    assert [len(connection.streams) for connection in proxy.connections] == [2] * 5


async def test_a_proxy_that_goes_away_again_and_again_refuses_no_tunnel(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    async def twice(stream: ServerStream) -> None:
        if stream.id > 3:
            stream.break_off()
            return
        if stream.id == 3:
            await goaway(stream, 3)
        await accept_tunnel(stream)

    proxy = H2Proxy(nursery, twice)
    statuses: list[int] = []

    async def get(number: int) -> None:
        statuses.append((await pool.request("GET", f"https://{number}.origin.example/")).status)

    async with proxy.pool() as pool, trio.open_nursery() as requests:
        for number in range(15):
            requests.start_soon(get, number)
    assert statuses == [200] * 15


@pytest.mark.parametrize("refuse", [not_acted_on, reset_as_refused])
async def test_a_tunnel_that_is_refused_six_times_is_a_proxy_error(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, refuse: StreamScript
) -> None:
    proxy = H2Proxy(nursery, scripts(*[refuse] * 6, accept_tunnel))
    async with proxy.pool() as pool:
        with pytest.raises(ProxyError, match=r"a\.origin\.example:443") as caught:
            await pool.request("GET", URL)
        assert caught.value.response is None
        assert (await pool.request("GET", URL)).status == 200
    assert len(proxy.streams) == 7


async def test_a_proxy_that_goes_away_without_an_answer_is_a_proxy_error(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, scripts(going_away, accept_tunnel))
    async with proxy.pool() as pool:
        with pytest.raises(ProxyError):
            await pool.request("GET", URL)
        assert len(proxy.streams) == 1
        assert (await pool.request("GET", URL)).status == 200
    assert len(proxy.connections) == 2


async def test_a_tunnel_without_an_answer_on_a_used_connection_is_asked_for_again(
    nursery: trio.Nursery,
) -> None:
    proxy = H2Proxy(nursery, scripts(accept_tunnel, going_away, accept_tunnel))
    async with proxy.pool() as pool:
        await pool.request("GET", URL)
        response = await pool.request("GET", "https://b.origin.example/")
        assert response.content == b"b.origin.example:443"
    assert [len(connection.streams) for connection in proxy.connections] == [2, 1]


async def test_tunnels_outlive_the_announcement_that_the_proxy_goes_away(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    async with proxy.pool() as pool:
        await pool.request("GET", URL)
        await goaway(proxy.streams[0], 1)
        await trio.testing.wait_all_tasks_blocked()
        assert (await pool.request("GET", URL)).content == b"a.origin.example:443"
        assert (await pool.request("GET", "https://b.origin.example/")).status == 200
        assert pool.statistics().connections_opened == 2
        assert carriers(pool) == ["active", "active"]
    assert [len(connection.streams) for connection in proxy.connections] == [1, 1]


@pytest.mark.parametrize("code", [ErrorCodes.CANCEL, ErrorCodes.CONNECT_ERROR, ErrorCodes.INTERNAL_ERROR])
async def test_a_reset_is_a_proxy_error_and_the_connection_goes_on(
    nursery: trio.Nursery, code: ErrorCodes
) -> None:
    async def reset(stream: ServerStream) -> None:
        await stream.reset(code)

    proxy = H2Proxy(nursery, scripts(reset, accept_tunnel))
    async with proxy.pool() as pool:
        with pytest.raises(ProxyError, match=code.name) as caught:
            await pool.request("GET", URL)
        assert caught.value.response is None
        assert (await pool.request("GET", URL)).status == 200
    assert len(proxy.connections) == 1


@pytest.mark.parametrize("status", [407, 502])
async def test_a_refusal_comes_with_its_response(nursery: trio.Nursery, status: int) -> None:
    async def refuse(stream: ServerStream) -> None:
        await stream.respond(status, [(b"proxy-authenticate", b"Basic")])
        await stream.send_all(b"because ")
        await stream.send_all(b"of that")
        await stream.trail([(b"x-trailer", b"1")])

    proxy = H2Proxy(nursery, scripts(refuse, accept_tunnel))
    async with proxy.pool() as pool:
        with pytest.raises(ProxyError, match=str(status)) as caught:
            await pool.request("GET", URL)
        response = caught.value.response
        assert response is not None
        assert response.status == status
        assert response.headers == [(b"proxy-authenticate", b"Basic")]
        assert response.content == b"because of that"
        assert response.extensions["stream_id"] == 1
        assert response.extensions["http_version"] == b"HTTP/2"
        assert (await pool.request("GET", URL)).status == 200
    assert len(proxy.connections) == 1
    assert proxy.streams[0].received_end


async def test_of_a_long_refusal_the_beginning_is_kept(nursery: trio.Nursery) -> None:
    async def refuse(stream: ServerStream) -> None:
        await stream.respond(403)
        # In pieces that don't come to the limit exactly.
        for start in range(0, len(LARGE), 10_000):
            await stream.send_all(LARGE[start : start + 10_000])

    proxy = H2Proxy(nursery, scripts(refuse, accept_tunnel))
    async with proxy.pool() as pool:
        with pytest.raises(ProxyError) as caught:
            await pool.request("GET", URL)
        assert caught.value.response is not None
        assert caught.value.response.content == LARGE[: 64 * 1024]
        assert (await pool.request("GET", URL)).status == 200
    assert len(proxy.connections) == 1


async def test_a_refusal_whose_end_does_not_come_is_not_waited_for(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    async def refuse(stream: ServerStream) -> None:
        await stream.respond(403)
        await stream.send_all(b"because")
        await trio.sleep_forever()

    proxy = H2Proxy(nursery, scripts(refuse, accept_tunnel))
    async with proxy.pool() as pool:
        with pytest.raises(ProxyError) as caught:
            await pool.request("GET", URL)
        assert caught.value.response is not None
        assert caught.value.response.content == b"because"
        assert (await pool.request("GET", URL)).status == 200
    assert len(proxy.connections) == 1


async def test_informational_responses_come_before_the_tunnel(nursery: trio.Nursery) -> None:
    async def inform(stream: ServerStream) -> None:
        for status in (102, 103):
            await stream.inform(status)
        await accept_tunnel(stream)

    proxy = H2Proxy(nursery, inform)
    async with proxy.pool() as pool:
        assert (await pool.request("GET", URL)).content == b"a.origin.example:443"


async def test_a_content_length_means_nothing_for_a_tunnel(nursery: trio.Nursery) -> None:
    async def serve(stream: ServerStream) -> None:
        await stream.respond(200, [(b"content-length", b"3")])
        assert await stream.receive_some() == b"hello"
        await stream.send_all(b"longer than that")

    proxy = H2Proxy(nursery, serve)
    async with proxy.pool() as pool:
        stream = await pool.open_tcp_stream("a.origin.example", 7)
        await stream.write(b"hello")
        assert await stream.read() == b"longer than that"
        assert await stream.read() == b""
        await stream.aclose()


# -- Tunnels that end.


async def test_a_tunnel_that_ends_at_once_is_an_error_and_the_pool_goes_on(nursery: trio.Nursery) -> None:
    async def end(stream: ServerStream) -> None:
        await stream.respond(200, end=True)

    proxy = H2Proxy(nursery, scripts(end, end, accept_tunnel))
    async with proxy.pool() as pool:
        with pytest.raises(ConnectError):
            await pool.request("GET", URL)
        stream = await pool.open_tcp_stream("a.origin.example", 7)
        assert await stream.read() == b""
        await stream.aclose()
        assert (await pool.request("GET", URL)).status == 200
    assert len(proxy.connections) == 1
    assert [stream.received_end or stream.was_reset for stream in proxy.streams] == [True] * 3


@pytest.mark.parametrize("kind", ["closed", "goaway"])
async def test_a_connection_that_dies_takes_its_own_tunnels_along(nursery: trio.Nursery, kind: str) -> None:
    go_on = trio.Event()

    async def serve(stream: ServerStream) -> None:
        await stream.respond(200)
        peer = ScriptedPeer(stream)
        await peer.start_tls(alpn_server())
        async for _ in peer:
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n01234")
            await go_on.wait()
            await peer.send(b"56789")

    proxy = H2Proxy(nursery, serve, {SettingCodes.MAX_CONCURRENT_STREAMS: 2})
    async with proxy.pool() as pool:
        responses = [
            await pool.handle_async_request(Request("GET", f"https://{i}.origin.example/")) for i in range(3)
        ]
        assert [len(connection.streams) for connection in proxy.connections] == [2, 1]
        if kind == "goaway":
            await goaway(proxy.streams[0], 3)
        for stream in proxy.connections[0].streams.values():
            stream.break_off()
        await proxy.connections[0].peer.stream.aclose()
        for response in responses[:2]:
            with pytest.raises((ReadError, RemoteProtocolError)):
                await response.aread()
            await response.aclose()
        go_on.set()
        assert await responses[2].aread() == b"0123456789"
        assert len(pool.connections) == 1
        assert (await pool.request("GET", URL)).content == b"0123456789"
        assert carriers(pool) == ["active"]


async def test_a_tunnel_that_is_closed_leaves_the_connection_idle_until_it_expires(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    proxy = H2Proxy(nursery, scripts(echo, accept_tunnel))
    async with proxy.pool(keepalive_expiry=30) as pool:
        stream = await pool.open_tcp_stream("a.origin.example", 7)
        assert carriers(pool) == ["active"]
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert proxy.streams[0].was_reset
        assert carriers(pool) == ["idle"]
        await trio.sleep(20)
        assert (await pool.request("GET", URL)).status == 200
        assert len(proxy.connections) == 1
        # First what is in the tunnel expires, and with it the tunnel; the connection 30 seconds later.
        await trio.sleep(29)
        assert (carriers(pool), len(pool.connections)) == (["active"], 1)
        await trio.sleep(3)
        assert (carriers(pool), len(pool.connections)) == (["idle"], 0)
        await trio.sleep(26)
        assert carriers(pool) == ["idle"]
        await trio.sleep(6)
        assert carriers(pool) == []
        assert proxy.connections[0].peer.sent(GoAwayFrame)


async def test_what_is_in_a_tunnel_says_goodbye_before_the_connection_ends(nursery: trio.Nursery) -> None:
    inner: list[Multiplexer] = []

    async def serve(stream: ServerStream) -> None:
        await stream.respond(200)
        peer = ScriptedPeer(stream)
        await peer.start_tls(alpn_server("h2"))
        inner.append(Multiplexer(peer.stream, naming_origin2))
        await inner[0].serve()

    proxy = H2Proxy(nursery, serve)
    async with proxy.pool(http2=True) as pool:
        await pool.request("GET", URL)
    await trio.testing.wait_all_tasks_blocked()
    assert len(inner[0].peer.sent(GoAwayFrame)) == 1
    # Its last frame got to the proxy before the tunnel's end, and that before the connection's.
    kinds = [type(frame).__name__ for frame in proxy.connections[0].peer.frames]
    assert kinds[-3:] == ["DataFrame", "RstStreamFrame", "GoAwayFrame"]


@pytest.mark.parametrize("how", ["ended", "reset", "after close_notify"])
async def test_an_idle_connection_whose_tunnel_has_ended_is_not_used_for_a_post(
    nursery: trio.Nursery, how: str
) -> None:
    ends = trio.Event()

    async def end_when_told(stream: ServerStream) -> None:
        await stream.respond(200)
        peer = ScriptedPeer(stream)
        await peer.start_tls(alpn_server())
        await peer.receive_request()
        await peer.send_response()
        await ends.wait()
        match how:
            case "ended":
                await stream.aclose()
            case "reset":
                await stream.reset(ErrorCodes.CONNECT_ERROR)
            case _:
                await peer.aclose()

    proxy = H2Proxy(nursery, scripts(end_when_told, accept_tunnel))
    async with proxy.pool() as pool:
        await pool.request("GET", URL)
        ends.set()
        await trio.testing.wait_all_tasks_blocked()
        assert [connection.state for connection in pool.connections] == ["idle"]
        assert (await pool.request("POST", URL, content=b"12345")).content == b"5"
        assert pool.statistics().connections_opened == 2
        assert len(pool.connections) == 1
    assert len(proxy.connections) == 1


async def test_http2_in_a_tunnel_that_has_ended_is_gone_at_once(nursery: trio.Nursery) -> None:
    proxy = H2Proxy(nursery, accept_tunnel)
    async with proxy.pool(http2=True) as pool:
        await pool.request("GET", "https://h2.origin.example/")
        await proxy.streams[0].reset(ErrorCodes.CONNECT_ERROR)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.connections == []
        assert carriers(pool) == ["idle"]
        response = await pool.request("POST", "https://h2.origin.example/", content=b"12345")
        assert response.content == b"5"
    assert len(proxy.connections) == 1


async def test_http2_without_tls_is_spoken_in_a_tunnel(nursery: trio.Nursery) -> None:
    async def serve(stream: ServerStream) -> None:
        assert stream.headers[b":method"] == b"CONNECT"
        await stream.respond(200)
        await Multiplexer(stream, naming_origin2).serve()

    proxy = H2Proxy(nursery, serve)
    async with proxy.pool(http1=False, http2=True) as pool:
        for _ in range(2):
            response = await pool.request("GET", "http://a.origin.example/")
            assert response.content == b"a.origin.example:443"
    assert len(proxy.streams) == 1


# -- Flow control.


@pytest.mark.parametrize("window", [100, 16384])
async def test_large_bodies_go_both_ways_through_tunnels_at_once(nursery: trio.Nursery, window: int) -> None:
    proxy = H2Proxy(nursery, accept_tunnel, {SettingCodes.INITIAL_WINDOW_SIZE: window})
    size = len(LARGE) if window > 1000 else 50_000
    results: Counter[str] = Counter()

    async def download(pool: ConnectionPool, host: str) -> None:
        response = await pool.request("GET", f"https://{host}/large")
        assert response.content == LARGE
        results["download"] += 1

    async def upload(pool: ConnectionPool, host: str) -> None:
        response = await pool.request("POST", f"https://{host}/", content=LARGE[:size])
        assert response.content == b"%d" % size
        results["upload"] += 1

    async with proxy.pool() as pool, trio.open_nursery() as requests:
        for host in ("a.origin.example", "b.origin.example"):
            requests.start_soon(download, pool, host)
            requests.start_soon(upload, pool, host)
    assert results == {"download": 2, "upload": 2}
    assert len(proxy.connections) == 1


async def test_an_unread_tunnel_does_not_block_another(nursery: trio.Nursery) -> None:
    blocked = trio.Event()

    async def flood(stream: ServerStream) -> None:
        await stream.respond(200)
        await stream.send_all(LARGE)
        blocked.set()

    proxy = H2Proxy(nursery, scripts(flood, accept_tunnel))
    async with proxy.pool() as pool:
        stream = await pool.open_tcp_stream("flood.origin.example", 7)
        await trio.testing.wait_all_tasks_blocked()
        assert not blocked.is_set()
        assert (await pool.request("GET", f"{URL}large")).content == LARGE
        received = b""
        while len(received) < len(LARGE):
            received += await stream.read()
        assert received == LARGE
        assert await stream.read() == b""
        await stream.aclose()
    assert len(proxy.connections) == 1


async def test_either_side_may_end_before_the_other(nursery: trio.Nursery) -> None:
    async def proxy_first(stream: ServerStream) -> None:
        await stream.respond(200)
        await stream.send_all(b"that is all")
        await stream.send_eof()
        received.append(await read_all(stream))

    async def client_first(stream: ServerStream) -> None:
        await stream.respond(200)
        received.append(await read_all(stream))
        await stream.send_all(b"so was that")

    received: list[bytes] = []
    proxy = H2Proxy(nursery, scripts(proxy_first, client_first))
    async with proxy.pool() as pool:
        stream = await pool.open_tcp_stream("a.origin.example", 7)
        assert await read_all(stream) == b"that is all"
        await stream.write(b"but not here")
        await stream.send_eof()
        await stream.aclose()

        stream = await pool.open_tcp_stream("a.origin.example", 7)
        await stream.write(b"nothing more")
        await stream.send_eof()
        assert await read_all(stream) == b"so was that"
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert carriers(pool) == ["idle"]
    assert received == [b"but not here", b"nothing more"]
    assert proxy.connections[0].peer.sent(RstStreamFrame) == []


async def read_all(stream: NetworkStream | ServerStream) -> bytes:
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return data


# -- Behind other proxies.


async def test_an_http2_proxy_behind_socks(nursery: trio.Nursery) -> None:
    second = H2Proxy(nursery, accept_tunnel)

    async def socks(peer: ScriptedPeer) -> None:
        assert await peer.receive_some() == b"\x05\x01\x00"
        await peer.send(b"\x05\x00")
        assert await peer.receive_some() == b"\x05\x01\x00\x03\x0dproxy.example\x01\xbb"
        await peer.send(b"\x05\x00\x00\x01" + bytes(6))
        await peer.start_tls(alpn_server("h2"))
        await second.serve(peer.stream)

    connector = MemoryConnector(nursery, socks)
    proxies = [Proxy("socks5h://socks.example"), multiplexing()]
    async with ConnectionPool(client_context(make_tls().ca), connector=connector, proxy=proxies) as pool:
        for host in ("a.origin.example", "b.origin.example"):
            response = await pool.request("GET", f"https://{host}/")
            assert response.content == f"{host}:443".encode()
    assert len(connector.dialled) == 1
    assert connector.dialled[0].address == ("socks.example", 1080)
    assert len(second.connections) == 1


async def test_an_http2_proxy_behind_another(nursery: trio.Nursery) -> None:
    async def relay(stream: ServerStream) -> None:
        assert stream.headers[b":authority"] == b"second.example:443"
        await stream.respond(200)
        peer = ScriptedPeer(stream)
        await peer.start_tls(alpn_server("h2"))
        await second.serve(peer.stream)

    second = H2Proxy(nursery, accept_tunnel)
    first = H2Proxy(nursery, relay)
    proxies = [multiplexing(), multiplexing("second.example")]
    hosts = [f"{kind}{i}.origin.example" for i in range(3) for kind in ("h2-", "")]
    answers = {}

    async def get(pool: ConnectionPool, host: str) -> None:
        answers[host] = (await pool.request("GET", f"https://{host}/")).content

    async with first.pool(proxy=proxies, http2=True) as pool:
        async with trio.open_nursery() as requests:
            for host in hosts:
                requests.start_soon(get, pool, host)
        assert carriers(pool, 1) == carriers(pool, 2) == ["active"]
        # A long body fits through all the windows.
        assert (await pool.request("GET", "https://0.origin.example/large")).content == LARGE
    assert answers == {host: f"{host}:443".encode() for host in hosts}
    assert (len(first.connections), len(first.streams)) == (1, 1)
    assert (len(second.connections), len(second.streams)) == (1, 6)


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


async def test_the_scheme_of_an_absolute_target_is_in_lower_case_over_http2(nursery: trio.Nursery) -> None:
    schemes: list[bytes] = []

    async def script(stream: ServerStream) -> None:
        schemes.append(stream.headers[b":scheme"])
        await stream.respond(200, end=True)

    async with H2Proxy(nursery, script).pool() as pool:
        await pool.request("GET", "http://example.com/", extensions={"target": "HTTP://example.com/"})
    assert schemes == [b"http"]
