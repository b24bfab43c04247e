from __future__ import annotations

import itertools
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.harness.certificates import make_tls
from tests.harness.checks import assert_unharmed, open_sockets
from tests.harness.networks import Network, Sockets
from tests.harness.peers import Recorder, respond
from tests.harness.servers import serve_tcp, serve_unix
from tests.harness.traces import Events
from trio_exchange import (
    ConnectError,
    ConnectionPool,
    Connector,
    ConnectTimeout,
    PoolTimeout,
    RemoteProtocolError,
)
from trio_exchange._connect.attempt import Attempt, backoff
from trio_exchange._connect.connector import SocketOption
from trio_exchange._connect.dialers import DirectDialer
from trio_exchange._timeouts import TimeBudget
from trio_exchange._trace import Tracer
from trio_exchange.testing import Dialled, MemoryConnector, ScriptedPeer

URL = "http://example.com/"
NO_DELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# -- What the connector is asked for.


LOCAL = {"local_address": "127.0.0.2"}
NO_DELAY_GIVEN = {"socket_options": (NO_DELAY,)}


@pytest.mark.parametrize(
    ("url", "settings", "address", "options"),
    [
        (URL, {}, ("example.com", 80), {}),
        ("http://example.com:8000/", {}, ("example.com", 8000), {}),
        (URL, LOCAL, ("example.com", 80), LOCAL),
        (URL, {"socket_options": [NO_DELAY]}, ("example.com", 80), NO_DELAY_GIVEN),
        ("http://[::1]/", {**LOCAL, "socket_options": [NO_DELAY]}, ("::1", 80), {**LOCAL, **NO_DELAY_GIVEN}),
        (URL, {"uds": "/run/x"}, "/run/x", {}),
        (URL, {"uds": "/run/x", "socket_options": [NO_DELAY]}, "/run/x", NO_DELAY_GIVEN),
        (URL, {"uds": "/run/x", **LOCAL}, "/run/x", {}),
    ],
)
async def test_what_a_connector_is_given(
    network: Network, url: str, settings: dict[str, Any], address: Any, options: dict[str, Any]
) -> None:
    async with network.pool(**settings) as pool:
        await pool.request("GET", url)
    assert network.dialled == [Dialled(address, options)]


async def test_a_connector_need_not_know_of_options_that_the_pool_has_not(nursery: trio.Nursery) -> None:
    inner = MemoryConnector(nursery, respond)

    class Plain(Connector):
        async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
            assert options == {}
            return await inner.connect_tcp("elsewhere", 1)

    async with ConnectionPool(connector=Plain()) as pool:
        assert (await pool.request("GET", URL)).status == 200
    assert inner.dialled == [Dialled(("elsewhere", 1), {})]


@pytest.mark.parametrize("uds", [{}, {"uds": "/run/x", **LOCAL}], ids=["tcp", "unix"])
async def test_socket_options_given_as_an_iterator_are_set_on_every_connection(
    network: Network, uds: dict[str, Any]
) -> None:
    options: Iterable[SocketOption] = iter([NO_DELAY])
    async with network.pool(socket_options=options, **uds) as pool:
        for host in ("a", "b"):
            await pool.request("GET", f"http://{host}/")
    assert [dialled.options for dialled in network.dialled] == [NO_DELAY_GIVEN] * 2


# -- What goes wrong.


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError("no route"), "no route"),
        (ConnectionRefusedError(), "ConnectionRefusedError"),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "unknown"),
        (UnicodeError("label too long"), "label too long"),
        (trio.BrokenResourceError("gone"), "gone"),
    ],
)
@pytest.mark.parametrize(("uds", "where"), [(None, "example.com:80"), ("/run/x", "/run/x")])
async def test_failures_to_dial_are_connect_errors(
    network: Network, failure: Exception, reason: str, uds: str | None, where: str
) -> None:
    network.failures.append(failure)
    async with network.pool(uds=uds) as pool:
        with pytest.raises(ConnectError, match=f"could not connect to {where}: .*{reason}") as info:
            await pool.request("GET", URL)
        assert info.value.__cause__ is failure
        assert_unharmed(pool)
        assert (await pool.request("GET", URL)).status == 200


async def test_every_address_that_was_tried_is_in_the_message(network: Network) -> None:
    failure = OSError("all attempts failed")
    failure.__cause__ = ExceptionGroup("", [OSError("first refused"), OSError("second unreachable")])
    network.failures.append(failure)
    async with network.pool() as pool:
        with pytest.raises(ConnectError, match="first refused; second unreachable"):
            await pool.request("GET", URL)


@pytest.mark.parametrize(
    ("failure", "retries"),
    [
        (ConnectError("a proxy of theirs"), 0),
        *(
            (failure, retries)
            for failure in (LookupError(), trio.TooSlowError(), PoolTimeout())
            for retries in (0, 3)
        ),
    ],
)
async def test_whatever_else_a_connector_raises_is_its_own_and_not_tried_again(
    network: Network, failure: Exception, retries: int
) -> None:
    network.failures.append(failure)
    async with network.pool(retries=retries) as pool:
        with pytest.raises(type(failure)) as info:
            await pool.request("GET", URL)
        assert info.value is failure
        assert_unharmed(pool)
    assert len(network.dialled) == 1


# -- Trying again.


def test_the_delays_between_attempts() -> None:
    assert list(itertools.islice(backoff(), 7)) == [0, 0.5, 1, 2, 4, 8, 16]


@pytest.mark.parametrize("failure", [OSError("refused"), trio.BrokenResourceError("gone")])
@pytest.mark.parametrize("delays", [[], [0], [0, 0.5], [0, 0.5, 1], [0, 0.5, 1, 2]], ids=len)
async def test_connecting_is_tried_again_and_traced(
    network: Network, autojump_clock: MockClock, delays: list[float], failure: Exception
) -> None:
    network.failures += [failure] * len(delays)
    trace = Events()
    async with network.pool(retries=4) as pool:
        assert (await pool.request("GET", URL, extensions={"trace": trace})).status == 200
        assert pool.statistics().connections_opened == 1
    assert trio.current_time() == sum(delays)
    assert len(network.dialled) == len(delays) + 1
    failed = [info["exception"] for info in trace.infos("connection.connect_tcp.failed")]
    assert {type(error) for error in failed} <= {ConnectError}
    assert trace.infos("connection.retry.started") == [
        {"attempt": number, "delay": delay, "exception": error}
        for number, (delay, error) in enumerate(zip(delays, failed, strict=True), 1)
    ]
    assert trace.infos("connection.retry.complete") == [{"return_value": None}] * len(delays)
    assert len(trace.infos("connection.connect_tcp.complete")) == 1


@pytest.mark.parametrize("retries", [0, 1, 3])
async def test_the_last_attempts_error_is_raised(
    network: Network, autojump_clock: MockClock, retries: int
) -> None:
    network.failures += [OSError(f"attempt {number}") for number in range(retries + 1)]
    async with network.pool(retries=retries) as pool:
        with pytest.raises(ConnectError, match=f"to example.com:80: attempt {retries}") as info:
            await pool.request("GET", URL)
        assert isinstance(info.value.__cause__, OSError)
        assert_unharmed(pool)
    assert len(network.dialled) == retries + 1


async def test_each_attempt_has_the_whole_connect_timeout(
    network: Network, autojump_clock: MockClock
) -> None:
    network.gate = trio.Event()
    async with network.pool(retries=2) as pool:
        with pytest.raises(ConnectTimeout, match="within 5 seconds"):
            await pool.request("GET", URL, extensions={"timeout": {"connect": 5, "pool": 1}})
        assert_unharmed(pool)
    assert len(network.dialled) == 3
    assert trio.current_time() == 5 + 0 + 5 + 0.5 + 5


async def test_a_failed_handshake_is_tried_again_on_a_new_connection(
    network: Network, autojump_clock: MockClock, server_context: ssl.SSLContext
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        if len(network.peers) > 1:
            await peer.start_tls(server_context)
            await respond(peer)

    async with network.pool(serve, retries=1) as pool:
        assert (await pool.request("GET", "https://example.com/")).status == 200
    assert len(network.peers) == 2


async def test_what_happens_after_connecting_is_not_tried_again(network: Network) -> None:
    async def hang_up(peer: ScriptedPeer) -> None:
        await peer.receive_request()

    async with network.pool(hang_up, retries=3) as pool:
        with pytest.raises(RemoteProtocolError):
            await pool.request("GET", URL)
    assert len(network.dialled) == 1


async def test_trying_again_can_be_cancelled(network: Network, autojump_clock: MockClock) -> None:
    network.failures += [OSError() for _ in range(20)]
    async with network.pool(retries=20) as pool:
        with trio.move_on_after(3) as scope:
            await pool.request("GET", URL)
        assert scope.cancelled_caught
        assert_unharmed(pool)
    assert len(network.dialled) == 4


@pytest.mark.parametrize("retries", [-1, True, 1.0, "1", None])
def test_retries_are_checked(retries: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="retries"):
        ConnectionPool(retries=retries)


# -- Nothing is left behind.


@pytest.mark.parametrize(
    "event",
    [
        "connection.connect_tcp.started",
        "connection.connect_tcp.complete",
        "connection.start_tls.started",
        "connection.start_tls.complete",
    ],
)
@pytest.mark.parametrize("how", ["raise", "cancel"])
async def test_a_handler_that_ends_the_connecting_leaves_no_socket(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext, event: str, how: str
) -> None:
    before = open_sockets()

    async def handler(name: str, info: dict[str, Any]) -> None:
        if name == event:
            if how == "raise":
                raise LookupError(name)
            scope.cancel()
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as servers:
        server = await serve_tcp(servers, respond, tls=server_context)
        async with ConnectionPool(client_context) as pool:
            with trio.CancelScope() as scope:
                try:
                    await pool.request("GET", server.url, extensions={"trace": handler})
                except LookupError:
                    assert how == "raise"
            assert scope.cancelled_caught == (how == "cancel")
            assert_unharmed(pool)
        servers.cancel_scope.cancel()
    assert open_sockets() == before


async def test_the_traced_streams_only_inform(tls: Sockets) -> None:
    streams = []

    async def handler(name: str, info: dict[str, Any]) -> None:
        if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            streams.append(info["return_value"])
            with pytest.raises(trio.ClosedResourceError):
                await streams[-1].receive_some()

    async with tls.pool() as pool:
        await pool.request("GET", tls.url, extensions={"trace": handler})
        assert [stream.get_extra_info("ssl_object") is None for stream in streams] == [True, False]
        addresses = {stream.get_extra_info("server_addr") for stream in streams}
        assert addresses == {("127.0.0.1", tls.server.port)}


async def test_dialling_without_a_pool(nursery: trio.Nursery) -> None:
    connector = MemoryConnector(nursery, respond)
    attempt = Attempt(TimeBudget(None, ConnectTimeout), Tracer(None, log=False))
    transport = await DirectDialer(connector).connect("h", 1, attempt)
    await transport.aclose()
    assert connector.dialled == [Dialled(("h", 1), {})]


# -- Real sockets.


async def test_local_address_and_socket_options(tcp: Sockets) -> None:
    peers = []

    async def serve(peer: ScriptedPeer) -> None:
        assert isinstance(peer.stream, trio.SocketStream)
        peers.append(peer.stream.socket.getpeername()[0])
        await respond(peer)

    options: list[SocketOption] = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_LINGER, b"\0" * 8),
    ]
    async with tcp.pool(serve, socket_options=options, **LOCAL) as pool:
        stream = (await pool.request("GET", tcp.url)).extensions["network_stream"]
        assert stream.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert stream.get_extra_info("client_addr")[0] == "127.0.0.2"
    assert peers == ["127.0.0.2"]


async def test_a_local_address_that_is_not_ours(tcp: Sockets) -> None:
    async with tcp.pool(local_address="192.0.2.1") as pool:
        with pytest.raises(ConnectError, match="could not connect to 127"):
            await pool.request("GET", tcp.url)
        assert_unharmed(pool)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ((9999, 9999, 1), ConnectError),
        ((socket.SOL_SOCKET, -1, 1), ConnectError),
        (("a", 1, 1), TypeError),
    ],
)
async def test_a_bad_socket_option_leaves_no_socket(option: Any, error: type[Exception]) -> None:
    before = open_sockets()
    async with trio.open_nursery() as servers:
        server = await serve_tcp(servers, respond)
        async with ConnectionPool(socket_options=[option]) as pool:
            with pytest.raises(error):
                await pool.request("GET", server.url)
            assert_unharmed(pool)
        servers.cancel_scope.cancel()
    assert open_sockets() == before


async def test_a_port_where_nobody_listens(free_tcp_port: int) -> None:
    async with ConnectionPool() as pool:
        with pytest.raises(ConnectError, match=f"could not connect to 127.0.0.1:{free_tcp_port}: .*refused"):
            await pool.request("GET", f"http://127.0.0.1:{free_tcp_port}/")
        assert_unharmed(pool)


@pytest.fixture
def free_tcp_port() -> Iterable[int]:
    """A port that is taken, but not listened on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


async def test_a_unix_socket_stands_for_every_host(nursery: trio.Nursery, tmp_path: Path) -> None:
    recorder = Recorder()
    server = await serve_unix(nursery, recorder, tmp_path / "socket")
    trace = Events()
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    async with ConnectionPool(uds=server.uds, socket_options=options) as pool:
        await pool.request("GET", "http://example.com/", extensions={"trace": trace})
        await pool.request("GET", "http://other.example:81/")
        assert len(pool.connections) == 2
    hosts = [request.header(b"host") for request in recorder.requests]
    assert hosts == [b"example.com", b"other.example:81"]
    assert trace.seen[0] == (
        "connection.connect_unix_socket.started",
        {"path": server.uds, "timeout": None, "socket_options": tuple(options)},
    )


@pytest.mark.parametrize("tls", [None, make_tls().server], ids=["plain", "tls"])
async def test_a_unix_socket(nursery: trio.Nursery, tmp_path: Path, tls: ssl.SSLContext | None) -> None:
    server = await serve_unix(nursery, respond, tmp_path / "socket", tls=tls)
    async with ConnectionPool(make_tls().client, uds=server.uds) as pool:
        response = await pool.request("POST", f"{server.scheme}://example.com/", content=b"hello")
        assert (response.status, response.content) == (200, b"hello")


async def test_a_unix_socket_that_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    async with ConnectionPool(uds=path) as pool:
        with pytest.raises(ConnectError, match=f"could not connect to {path}"):
            await pool.request("GET", URL)


async def test_ipv6(nursery: trio.Nursery) -> None:
    try:
        listeners = await trio.open_tcp_listeners(0, host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")

    async def handle(stream: trio.SocketStream) -> None:
        async with ScriptedPeer(stream) as peer:
            async for request in peer:
                await peer.send_response(body=request.header(b"host") or b"")

    port = listeners[0].socket.getsockname()[1]
    nursery.start_soon(trio.serve_listeners, handle, listeners)
    async with ConnectionPool() as pool:
        response = await pool.request("GET", f"http://[::1]:{port}/")
    assert response.content == b"[::1]:%d" % port
