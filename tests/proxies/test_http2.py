"""Proxies that speak HTTP/2: tunnels that share a connection, and requests that are forwarded over it."""

from __future__ import annotations

from typing import Any

import hpack
import pytest
import trio
import trio.testing
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.harness.certificates import alpn_server, client_context, make_tls
from tests.harness.checks import internals
from tests.harness.h2link import BackgroundRequests, background, fetch, memory_server
from tests.harness.h2proxy import (
    LARGE,
    H2Proxy,
    StreamScript,
    accept_tls,
    accept_tunnel,
    h2_proxy,
    multiplexing,
    naming_origin,
    naming_origin2,
)
from tests.harness.h2server import Multiplexer, ServerStream
from tests.harness.layers import TLSServer, whole_response
from tests.harness.streams import read_exactly
from tests.harness.tunnels import read_all
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    ConnectTimeout,
    NetworkStream,
    Proxy,
    ProxyError,
    ReadError,
    RemoteProtocolError,
    Request,
)
from trio_exchange._connect.transport import Readiness
from trio_exchange.testing import ScriptedPeer

URL = "https://a.origin.example/"
LIMIT = SettingCodes.MAX_CONCURRENT_STREAMS


async def echo(stream: ServerStream) -> None:
    await stream.respond(200)
    while data := await stream.receive_some():
        await stream.send_all(data)


async def forever(_: ServerStream) -> None:
    await trio.sleep_forever()


def carriers(pool: ConnectionPool, hop: int = 1) -> list[str]:
    """The states of the connections that carry tunnels, to the last proxy or those before it."""
    return [connection.state for connection in pool._managers[hop]]


def origin(number: int) -> str:
    return f"https://{number}.origin.example/"


async def make_each(requests: BackgroundRequests, count: int) -> None:
    """Make requests to as many origins, which begin one after the other."""
    for number in range(count):
        await requests.make(1, origin(number))


async def assert_answers(pool: ConnectionPool, *names: str, **options: Any) -> None:
    """The origins of these names answer one request each, one after the other."""
    for name in names:
        content = await fetch(pool, url=f"https://{name}.origin.example/", **options)
        assert content == f"{name}.origin.example:443".encode()


async def assert_connect_timeout(pool: ConnectionPool) -> None:
    """A request ends with its connect timeout, on time."""
    start = trio.current_time()
    with pytest.raises(ConnectTimeout):
        await pool.request("GET", URL, extensions={"timeout": {"connect": 5}})
    assert trio.current_time() - start == 5


# -- What is spoken with the proxy.


@pytest.mark.parametrize(
    ("proxy", "offer"),
    [
        (multiplexing(), b"\x00\x0c\x02h2\x08http/1.1"),
        (Proxy("https://proxy.example", ssl_context=client_context(make_tls().ca)), b"\x00\x09\x08http/1.1"),
    ],
    ids=["http2", "http1"],
)
async def test_http2_is_offered_to_a_proxy_that_may_speak_it_alone(proxy: Proxy, offer: bytes) -> None:
    hellos = []

    async def listen(peer: ScriptedPeer) -> None:
        hellos.append(await peer.receive_some())

    async with memory_server(listen, proxy=proxy, http2=True) as (pool, _):
        with pytest.raises(ConnectError):
            await pool.request("GET", URL)
    assert offer in hellos[0]


async def test_a_proxy_without_tls_is_spoken_to_in_http1() -> None:
    async def refuse(peer: ScriptedPeer) -> None:
        request = await peer.receive_request()
        assert (request.method, request.target) == (b"CONNECT", b"a.origin.example:443")
        await peer.send_response(403)

    proxy = Proxy("http://proxy.example", http2=True)
    async with memory_server(refuse, proxy=proxy, http2=True) as (pool, _):
        with pytest.raises(ProxyError, match="403"):
            await pool.request("GET", URL)


async def test_a_proxy_that_prefers_http1_works_the_same() -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.start_tls(alpn_server("http/1.1"))
        request = await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.start_tls(alpn_server())
        await naming_origin(peer, request.target)

    async with memory_server(serve, proxy=multiplexing()) as (pool, connector):
        await assert_answers(pool, "a", "b", "a", "b")
    # Each tunnel needs a connection of its own.
    assert len(connector.dialled) == 2


async def test_tunnels_share_a_connection() -> None:
    hosts = [f"{'h2-' * (i % 2)}{i}.origin.example" for i in range(20)]
    async with h2_proxy(accept_tunnel, http2=True, max_connections=20) as (pool, proxy):
        async with background(pool) as requests:
            for host in hosts:
                requests.start(f"https://{host}/")
        assert len(pool.connections) == 20
        assert carriers(pool) == ["active"]
    answers = {
        request.url: (request.response.content, request.response.extensions["http_version"])
        for request in requests.ended
        if request.response is not None
    }
    assert answers == {
        f"https://{host}/": (f"{host}:443".encode(), b"HTTP/2" if host.startswith("h2") else b"HTTP/1.1")
        for host in hosts
    }
    assert len(proxy.connector.dialled) == 1
    assert sorted(stream.id for stream in proxy.streams) == list(range(1, 40, 2))


def assert_only_credentials_are_never_indexed(proxy: H2Proxy) -> None:
    """In the heads of all requests on the first connection (RFC 7541, 7.1.3)."""
    decoder = hpack.Decoder()
    for frame in proxy.sent(HeadersFrame):
        fields: Any = decoder.decode(frame.data, raw=True)
        assert [field[0] for field in fields if not field.indexable] == [b"proxy-authorization"]


async def test_connect_has_no_more_fields_than_it_may() -> None:
    given = multiplexing(auth=("user", "secret"), headers={"X-Who": "me"})
    async with h2_proxy(accept_tunnel, proxy=given) as (pool, proxy):
        await assert_answers(pool, "a", "b", headers={"X-Mine": "not the proxy's"})
    for stream, name in zip(proxy.streams, (b"a", b"b"), strict=True):
        assert stream.fields == [
            (b":method", b"CONNECT"),
            (b":authority", name + b".origin.example:443"),
            (b"proxy-authorization", b"Basic dXNlcjpzZWNyZXQ="),
            (b"x-who", b"me"),
        ]
    assert not any("END_STREAM" in frame.flags for frame in proxy.sent(HeadersFrame))
    assert_only_credentials_are_never_indexed(proxy)


async def test_what_is_forwarded_has_the_origin_in_its_pseudo_headers() -> None:
    given = multiplexing(auth=("user", "secret"), headers={"X-Who": "me", "X-Both": "proxy"})
    async with h2_proxy(naming_origin2, proxy=given) as (pool, proxy):
        url = "http://a.origin.example:8080/path?query"
        content = await fetch(pool, url=url, headers={"X-Both": "own"})
        assert content == b"a.origin.example:8080:443"
        assert await fetch(pool, "POST", "http://b.origin.example/", content=b"12345") == b"5"
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
    assert_only_credentials_are_never_indexed(proxy)


async def test_the_scheme_of_an_absolute_target_is_in_lower_case_over_http2() -> None:
    async with h2_proxy(naming_origin2) as (pool, proxy):
        await pool.request("GET", "http://example.com/", extensions={"target": "HTTP://example.com/"})
    assert [stream.headers[b":scheme"] for stream in proxy.streams] == [b"http"]


# -- Who establishes the connection.


async def test_one_establishes_the_connection_and_others_share_it() -> None:
    async with h2_proxy(accept_tunnel) as (pool, proxy):
        proxy.connector.gate = trio.Event()
        async with background(pool) as requests:
            await make_each(requests, 5)
            assert len(proxy.connector.dialled) == 1
            proxy.connector.gate.set()
        assert requests.outcomes == [200] * 5
    assert len(proxy.connector.dialled) == 1


@pytest.mark.parametrize(
    ("how", "outcome"), [("fails", ConnectError), ("cancelled", None), ("times out", ConnectTimeout)]
)
async def test_when_the_leader_ends_the_next_one_leads(
    autojump_clock: MockClock, how: str, outcome: type[Exception] | None
) -> None:
    async with h2_proxy(accept_tunnel) as (pool, proxy):
        proxy.connector.gate = trio.Event()
        if how == "fails":
            proxy.connector.failures = [OSError("no route")]
        async with background(pool) as requests:
            await requests.make(1, URL, extensions={"timeout": {"connect": 5} if how == "times out" else {}})
            await make_each(requests, 2)
            if how != "fails":
                if how == "cancelled":
                    requests.made[0].scope.cancel()
                    await wait_all_tasks_blocked()
                else:
                    await trio.sleep(6)
                assert requests.outcomes == [outcome, None, None]
                assert len(proxy.connector.dialled) == 2
            proxy.connector.gate.set()
        assert requests.outcomes == [outcome, 200, 200]
    assert len(proxy.connector.dialled) == 2
    assert len(proxy.connections) == 1


async def test_the_connect_timeout_goes_on_behind_a_leader(autojump_clock: MockClock) -> None:
    async with h2_proxy(accept_tunnel) as (pool, proxy):
        proxy.connector.gate = trio.Event()
        async with background(pool) as requests:
            await make_each(requests, 1)
            await assert_connect_timeout(pool)
            proxy.connector.gate.set()
        assert requests.outcomes == [200]


async def test_the_connect_timeout_goes_on_until_the_proxy_tells_its_limit(autojump_clock: MockClock) -> None:
    async def mute(peer: ScriptedPeer) -> None:
        await peer.start_tls(alpn_server("h2"))
        async for _ in peer.stream:
            pass

    async with memory_server(mute, proxy=multiplexing()) as (pool, connector), background(pool) as requests:
        await make_each(requests, 1)
        await assert_connect_timeout(pool)
        requests.made[0].scope.cancel()
    assert len(connector.dialled) == 1


async def test_the_connect_timeout_goes_on_until_the_proxy_answers(autojump_clock: MockClock) -> None:
    async with h2_proxy(forever, accept_tunnel) as (pool, proxy):
        await assert_connect_timeout(pool)
        await wait_all_tasks_blocked()
        assert proxy.streams[0].was_reset
        await fetch(pool, url=URL)
    assert len(proxy.connector.dialled) == 1


# -- How many tunnels a connection carries.


@pytest.mark.parametrize(("limit", "connections"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (3, [1, 3])])
async def test_a_proxy_says_how_many_tunnels_there_may_be_on_a_connection(
    limit: int, connections: list[int]
) -> None:
    async with h2_proxy(accept_tunnel, settings={LIMIT: limit}) as (pool, proxy):
        async with background(pool) as requests:
            await make_each(requests, 4)
        assert requests.outcomes == [200] * 4
        assert len(pool.connections) == 4
    assert sorted(proxy.streams_of_each) == connections


async def test_a_limit_that_is_lowered_to_nothing_ends_no_tunnel() -> None:
    async with h2_proxy(accept_tunnel) as (pool, proxy):
        await fetch(pool, url=URL)
        await proxy.connections[0].peer.send_frame(SettingsFrame(settings={LIMIT: 0}))
        await wait_all_tasks_blocked()
        await assert_answers(pool, "b", "a")
        assert pool.statistics().connections_opened == 2
    assert proxy.streams_of_each == [1, 1]


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


async def refusal(pool: ConnectionPool, match: str | None = None) -> ProxyError:
    """The error of a request whose tunnel the proxy refuses; the next one has its tunnel."""
    with pytest.raises(ProxyError, match=match) as caught:
        await pool.request("GET", URL)
    await fetch(pool, url=URL)
    return caught.value


@pytest.mark.parametrize("refuse", [not_acted_on, reset_as_refused])
async def test_a_tunnel_that_was_not_acted_on_is_asked_for_again_once(refuse: StreamScript) -> None:
    async with h2_proxy(refuse, accept_tunnel) as (pool, proxy):
        await assert_answers(pool, "a")
    assert len(proxy.streams) == 2


@pytest.mark.parametrize("traced", [False, True])
async def test_tunnels_that_were_not_asked_for_yet_wait_for_another_place(
    autojump_clock: MockClock, traced: bool
) -> None:
    """The proxy lowers its limit at once, when many tunnels have been granted a place."""

    async def slowly(event: str, _: dict[str, Any]) -> None:
        if event == "proxy.connect.started":
            await trio.sleep(0.01)

    async with h2_proxy(accept_tunnel, settings={LIMIT: 100}, then={LIMIT: 2}) as (pool, proxy):
        async with background(pool) as requests:
            for number in range(10):
                requests.start(origin(number), extensions={"trace": slowly} if traced else {})
        assert pool.statistics().idle == 10
    assert len(requests.contents) == len(set(requests.contents)) == 10
    # No tunnel was asked for twice.
    assert proxy.streams_of_each == [2] * 5


async def test_a_proxy_that_goes_away_again_and_again_refuses_no_tunnel(autojump_clock: MockClock) -> None:
    async def twice(stream: ServerStream) -> None:
        if stream.id > 3:
            stream.break_off()
            return
        if stream.id == 3:
            await goaway(stream, 3)
        await accept_tunnel(stream)

    async with h2_proxy(twice) as (pool, _), background(pool) as requests:
        for number in range(15):
            requests.start(origin(number))
    assert requests.statuses == [200] * 15


@pytest.mark.parametrize("refuse", [not_acted_on, reset_as_refused])
async def test_a_tunnel_that_is_refused_six_times_is_a_proxy_error(
    autojump_clock: MockClock, refuse: StreamScript
) -> None:
    async with h2_proxy(*[refuse] * 6, accept_tunnel) as (pool, proxy):
        error = await refusal(pool, r"a\.origin\.example:443")
        assert error.response is None
    assert len(proxy.streams) == 7


async def test_a_proxy_that_goes_away_without_an_answer_is_a_proxy_error() -> None:
    async with h2_proxy(going_away, accept_tunnel) as (pool, proxy):
        await refusal(pool)
    assert proxy.streams_of_each == [1, 1]


async def test_a_tunnel_without_an_answer_on_a_used_connection_is_asked_for_again() -> None:
    async with h2_proxy(accept_tunnel, going_away, accept_tunnel) as (pool, proxy):
        await assert_answers(pool, "a", "b")
    assert proxy.streams_of_each == [2, 1]


async def test_tunnels_outlive_the_announcement_that_the_proxy_goes_away() -> None:
    async with h2_proxy(accept_tunnel) as (pool, proxy):
        await fetch(pool, url=URL)
        await goaway(proxy.streams[0], 1)
        await wait_all_tasks_blocked()
        await assert_answers(pool, "a", "b")
        assert pool.statistics().connections_opened == 2
        assert carriers(pool) == ["active", "active"]
    assert proxy.streams_of_each == [1, 1]


@pytest.mark.parametrize("code", [ErrorCodes.CANCEL, ErrorCodes.CONNECT_ERROR, ErrorCodes.INTERNAL_ERROR])
async def test_a_reset_is_a_proxy_error_and_the_connection_goes_on(code: ErrorCodes) -> None:
    async def reset(stream: ServerStream) -> None:
        await stream.reset(code)

    async with h2_proxy(reset, accept_tunnel) as (pool, proxy):
        error = await refusal(pool, code.name)
        assert error.response is None
    assert len(proxy.connections) == 1


@pytest.mark.parametrize("status", [407, 502])
async def test_a_refusal_comes_with_its_response(status: int) -> None:
    async def refuse(stream: ServerStream) -> None:
        await stream.respond(status, [(b"proxy-authenticate", b"Basic")])
        await stream.send_all(b"because ")
        await stream.send_all(b"of that")
        await stream.trail([(b"x-trailer", b"1")])

    async with h2_proxy(refuse, accept_tunnel) as (pool, proxy):
        response = (await refusal(pool, str(status))).response
        assert response is not None
        assert response.status == status
        assert response.headers == [(b"proxy-authenticate", b"Basic")]
        assert response.content == b"because of that"
        assert response.extensions["stream_id"] == 1
        assert response.extensions["http_version"] == b"HTTP/2"
    assert len(proxy.connections) == 1
    assert proxy.streams[0].received_end


async def refuse_at_length(stream: ServerStream) -> None:
    await stream.respond(403)
    # In pieces that don't come to the limit exactly.
    for start in range(0, len(LARGE), 10_000):
        await stream.send_all(LARGE[start : start + 10_000])


async def refuse_without_end(stream: ServerStream) -> None:
    await stream.respond(403)
    await stream.send_all(b"because")
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("refuse", "content"), [(refuse_at_length, LARGE[: 64 * 1024]), (refuse_without_end, b"because")]
)
async def test_of_a_refusal_the_beginning_is_kept_and_no_end_waited_for(
    autojump_clock: MockClock, refuse: StreamScript, content: bytes
) -> None:
    async with h2_proxy(refuse, accept_tunnel) as (pool, proxy):
        response = (await refusal(pool)).response
        assert response is not None
        assert response.content == content
    assert len(proxy.connections) == 1


async def test_a_refusal_is_final_when_the_connection_can_not_be_sent_to(autojump_clock: MockClock) -> None:
    clients: list[trio.testing.MemorySendStream] = []

    def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = trio.testing.memory_stream_pair()
        clients.append(client.send_stream)
        return client, server

    async def fail() -> None:
        # The data is lost. Kept in the stream, it would arrive in place of the end.
        clients[0].get_data_nowait()
        raise trio.BrokenResourceError("it broke")

    async def refuse(stream: ServerStream) -> None:
        await stream.respond(407)
        clients[0].send_all_hook = fail
        stream.server.peer.h2.ping(b"12345678")
        await stream.server.peer.flush()
        await trio.sleep_forever()

    async with h2_proxy(refuse, stream_pair=pair) as (pool, _):
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", URL)
    assert info.value.response is not None
    assert info.value.response.status == 407


async def test_informational_responses_come_before_the_tunnel() -> None:
    async def inform(stream: ServerStream) -> None:
        for status in (102, 103):
            await stream.inform(status)
        await accept_tunnel(stream)

    async with h2_proxy(inform) as (pool, _):
        await assert_answers(pool, "a")


async def test_a_content_length_means_nothing_for_a_tunnel() -> None:
    async def serve(stream: ServerStream) -> None:
        await stream.respond(200, [(b"content-length", b"3")])
        assert await stream.receive_some() == b"hello"
        await stream.send_all(b"longer than that")

    async with h2_proxy(serve) as (pool, _):
        stream = await pool.open_tcp_stream("a.origin.example", 7)
        await stream.write(b"hello")
        assert await stream.read() == b"longer than that"
        assert await stream.read() == b""
        await stream.aclose()


# -- Tunnels that end.


async def test_a_tunnel_that_ends_at_once_is_an_error_and_the_pool_goes_on() -> None:
    async def end(stream: ServerStream) -> None:
        await stream.respond(200, end=True)

    async with h2_proxy(end, end, accept_tunnel) as (pool, proxy):
        with pytest.raises(ConnectError):
            await pool.request("GET", URL)
        stream = await pool.open_tcp_stream("a.origin.example", 7)
        assert await stream.read() == b""
        await stream.aclose()
        await fetch(pool, url=URL)
    assert len(proxy.connections) == 1
    assert [stream.received_end or stream.was_reset for stream in proxy.streams] == [True] * 3


@pytest.mark.parametrize("kind", ["closed", "goaway"])
async def test_a_connection_that_dies_takes_its_own_tunnels_along(kind: str) -> None:
    go_on = trio.Event()

    async def serve(stream: ServerStream) -> None:
        peer = await accept_tls(stream)
        async for _ in peer:
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n01234")
            await go_on.wait()
            await peer.send(b"56789")

    async with h2_proxy(serve, settings={LIMIT: 2}) as (pool, proxy):
        responses = [await pool.handle_async_request(Request("GET", origin(i))) for i in range(3)]
        assert proxy.streams_of_each == [2, 1]
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
        assert await fetch(pool, url=URL) == b"0123456789"
        assert carriers(pool) == ["active"]


async def test_a_tunnel_that_is_closed_leaves_the_connection_idle_until_it_expires(
    autojump_clock: MockClock,
) -> None:
    async with h2_proxy(echo, accept_tunnel, keepalive_expiry=30) as (pool, proxy):
        stream = await pool.open_tcp_stream("a.origin.example", 7)
        assert carriers(pool) == ["active"]
        await stream.aclose()
        await wait_all_tasks_blocked()
        assert proxy.streams[0].was_reset
        assert carriers(pool) == ["idle"]
        await trio.sleep(20)
        await fetch(pool, url=URL)
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
        assert proxy.sent(GoAwayFrame)


async def test_what_is_in_a_tunnel_says_goodbye_before_the_connection_ends() -> None:
    inner: list[Multiplexer] = []

    async def serve(stream: ServerStream) -> None:
        peer = await accept_tls(stream, "h2")
        inner.append(Multiplexer(peer.stream, naming_origin2))
        await inner[0].serve()

    async with h2_proxy(serve, http2=True) as (pool, proxy):
        await pool.request("GET", URL)
    assert len(inner[0].peer.sent(GoAwayFrame)) == 1
    # Its last frame got to the proxy before the tunnel's end, and that before the connection's.
    kinds = [type(frame).__name__ for frame in proxy.connections[0].peer.frames]
    assert kinds[-3:] == ["DataFrame", "RstStreamFrame", "GoAwayFrame"]


@pytest.mark.parametrize("how", ["ended", "reset", "after close_notify"])
async def test_an_idle_connection_whose_tunnel_has_ended_is_not_used_for_a_post(how: str) -> None:
    ends = trio.Event()

    async def end_when_told(stream: ServerStream) -> None:
        peer = await accept_tls(stream)
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

    async with h2_proxy(end_when_told, accept_tunnel) as (pool, proxy):
        await pool.request("GET", URL)
        ends.set()
        await wait_all_tasks_blocked()
        assert [connection.state for connection in pool.connections] == ["idle"]
        assert await fetch(pool, "POST", URL, content=b"12345") == b"5"
        assert pool.statistics().connections_opened == 2
        assert len(pool.connections) == 1
    assert len(proxy.connections) == 1


@pytest.mark.parametrize("ends_tls", [False, True])
@pytest.mark.parametrize("ends_stream", [False, True])
async def test_a_connection_that_ended_together_with_its_response_is_not_used_for_a_post(
    ends_tls: bool, ends_stream: bool
) -> None:
    async def end_with_the_response(stream: ServerStream) -> None:
        await stream.respond(200)
        origin = TLSServer(stream, alpn_server())
        await origin.handshake()
        await origin.receive_some()
        origin.ssl.write(whole_response(b"ok"))
        if ends_tls:
            origin.say_goodbye()
        stream._h2.send_data(stream.id, origin.take(), end_stream=ends_stream)
        stream.sent_end = ends_stream
        await stream.server.peer.flush()
        if not ends_stream:
            await read_all(stream)

    async with h2_proxy(end_with_the_response, accept_tunnel) as (pool, _):
        assert await fetch(pool, "GET", URL) == b"ok"
        if not (ends_tls or ends_stream):
            assert [connection.readiness() for connection in internals(pool)] == [Readiness.QUIET]
            return
        assert await fetch(pool, "POST", URL, content=b"12345") == b"5"
        assert pool.statistics().connections_opened == 2


async def test_http2_in_a_tunnel_that_has_ended_is_gone_at_once() -> None:
    url = "https://h2.origin.example/"
    async with h2_proxy(accept_tunnel, http2=True) as (pool, proxy):
        await pool.request("GET", url)
        await proxy.streams[0].reset(ErrorCodes.CONNECT_ERROR)
        await wait_all_tasks_blocked()
        assert pool.connections == []
        assert carriers(pool) == ["idle"]
        assert await fetch(pool, "POST", url, content=b"12345") == b"5"
    assert len(proxy.connections) == 1


async def test_http2_without_tls_is_spoken_in_a_tunnel() -> None:
    async def serve(stream: ServerStream) -> None:
        assert stream.headers[b":method"] == b"CONNECT"
        await stream.respond(200)
        await Multiplexer(stream, naming_origin2).serve()

    async with h2_proxy(serve, http1=False, http2=True) as (pool, proxy):
        for _ in range(2):
            assert await fetch(pool, url="http://a.origin.example/") == b"a.origin.example:443"
    assert len(proxy.streams) == 1


# -- Flow control.


@pytest.mark.parametrize("window", [100, 16384])
async def test_large_bodies_go_both_ways_through_tunnels_at_once(window: int) -> None:
    size = len(LARGE) if window > 1000 else 50_000
    settings = {SettingCodes.INITIAL_WINDOW_SIZE: window}
    async with h2_proxy(accept_tunnel, settings=settings) as (pool, proxy), background(pool) as requests:
        for number in range(2):
            requests.start(f"{origin(number)}large")
            requests.start(origin(number), method="POST", content=LARGE[:size])
    assert requests.statuses == [200] * 4
    downloads = {f"{origin(number)}large": LARGE for number in range(2)}
    assert requests.answers == {**downloads, **{origin(number): b"%d" % size for number in range(2)}}
    assert len(proxy.connections) == 1


async def test_an_unread_tunnel_does_not_block_another() -> None:
    blocked = trio.Event()

    async def flood(stream: ServerStream) -> None:
        await stream.respond(200)
        await stream.send_all(LARGE)
        blocked.set()

    async with h2_proxy(flood, accept_tunnel) as (pool, proxy):
        stream = await pool.open_tcp_stream("flood.origin.example", 7)
        await wait_all_tasks_blocked()
        assert not blocked.is_set()
        assert await fetch(pool, url=f"{URL}large") == LARGE
        assert await read_exactly(stream, len(LARGE)) == LARGE
        assert await stream.read() == b""
        await stream.aclose()
    assert len(proxy.connections) == 1


async def test_either_side_may_end_before_the_other() -> None:
    async def proxy_first(stream: ServerStream) -> None:
        await stream.respond(200)
        await stream.send_all(b"that is all")
        await stream.send_eof()
        received.append(await read_all(stream))

    async def client_first(stream: ServerStream) -> None:
        await stream.respond(200)
        received.append(await read_all(stream))
        await stream.send_all(b"so was that")

    async def say(stream: NetworkStream, data: bytes) -> None:
        await stream.write(data)
        await stream.send_eof()

    received: list[bytes] = []
    async with h2_proxy(proxy_first, client_first) as (pool, proxy):
        stream = await pool.open_tcp_stream("a.origin.example", 7)
        assert await read_all(stream) == b"that is all"
        await say(stream, b"but not here")
        await stream.aclose()

        stream = await pool.open_tcp_stream("a.origin.example", 7)
        await say(stream, b"nothing more")
        assert await read_all(stream) == b"so was that"
        await stream.aclose()
        await wait_all_tasks_blocked()
        assert carriers(pool) == ["idle"]
    assert received == [b"but not here", b"nothing more"]
    assert proxy.sent(RstStreamFrame) == []


# -- Behind other proxies.


async def test_an_http2_proxy_behind_socks() -> None:
    second = H2Proxy(accept_tunnel)

    async def socks(peer: ScriptedPeer) -> None:
        assert await peer.receive_some() == b"\x05\x01\x00"
        await peer.send(b"\x05\x00")
        assert await peer.receive_some() == b"\x05\x01\x00\x03\x0dproxy.example\x01\xbb"
        await peer.send(b"\x05\x00\x00\x01" + bytes(6))
        await second(peer)

    proxies = [Proxy("socks5h://socks.example"), multiplexing()]
    async with memory_server(socks, proxy=proxies) as (pool, connector):
        await assert_answers(pool, "a", "b")
    assert [dialled.address for dialled in connector.dialled] == [("socks.example", 1080)]
    assert len(second.connections) == 1


async def test_an_http2_proxy_behind_another() -> None:
    second = H2Proxy(accept_tunnel)

    async def relay(stream: ServerStream) -> None:
        assert stream.headers[b":authority"] == b"second.example:443"
        await stream.respond(200)
        await second(ScriptedPeer(stream))

    proxies = [multiplexing(), multiplexing("second.example")]
    hosts = [f"{kind}{i}.origin.example" for i in range(3) for kind in ("h2-", "")]
    async with h2_proxy(relay, proxy=proxies, http2=True) as (pool, first):
        async with background(pool) as requests:
            for host in hosts:
                requests.start(f"https://{host}/")
        assert carriers(pool, 1) == carriers(pool, 2) == ["active"]
        # A long body fits through all the windows.
        assert await fetch(pool, url="https://0.origin.example/large") == LARGE
    assert requests.answers == {f"https://{host}/": f"{host}:443".encode() for host in hosts}
    assert first.streams_of_each == [1]
    assert second.streams_of_each == [6]


# -- Closing the pool.


async def assert_all_closed(pool: ConnectionPool) -> None:
    await trio.sleep(60)
    assert [list(manager) for manager in pool._managers] == [[], []]


@pytest.mark.parametrize("tunnels", [1, 0])
async def test_closing_that_is_cancelled_goes_on_for_connections_to_proxies(
    autojump_clock: MockClock, tunnels: int
) -> None:
    async with h2_proxy(accept_tunnel, max_keepalive_connections=None) as (pool, _):
        await pool.request("GET", URL)
        if not tunnels:
            internals(pool)[0].close_soon()
            await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.aclose()
        await assert_all_closed(pool)


@pytest.mark.parametrize("event", ["proxy.connect.complete", "connection.start_tls.started"])
async def test_a_pool_that_a_handler_closes_while_connecting_closes_connections_to_proxies(
    autojump_clock: MockClock, event: str
) -> None:
    async def trace(name: str, info: dict[str, Any]) -> None:
        if name == event:
            await pool.aclose()

    async with h2_proxy(accept_tunnel) as (pool, _):
        with pytest.raises(ConnectionNotAvailable):
            await pool.request("GET", URL, extensions={"trace": trace})
        await assert_all_closed(pool)
