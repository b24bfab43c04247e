"""What somebody who is new to this library reads when something goes wrong."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import trio_exchange
from tests.harness.networks import Network
from tests.harness.peers import swallow
from trio_exchange import (
    ConnectError,
    ConnectionPool,
    Connector,
    ConnectTimeout,
    PoolTimeout,
    Proxy,
    ProxyError,
    RemoteProtocolError,
    Request,
)
from trio_exchange.testing import ScriptedPeer

URL = "http://example.com/"


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken, but not listened on, at 127.0.0.1 and at ::1."""
    with socket.socket() as sock, socket.socket(socket.AF_INET6) as sock6:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        try:
            sock6.bind(("::1", port))
        except OSError:
            pytest.skip("this machine has no IPv6")
        yield port


class Resolver(trio.abc.HostnameResolver):
    """Every name has these addresses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Any:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in self.addresses
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


def frames_of(error: BaseException) -> list[str]:
    """The functions in a traceback, outermost first."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


async def error_of(pool: ConnectionPool, url: str = URL, **more: Any) -> ConnectError:
    """What a request raises that reaches no server."""
    async with pool:
        with pytest.raises(ConnectError) as info:
            await pool.request("GET", url, **more)
    return info.value


# -- Tracebacks.


def test_a_refused_connection_is_told_in_a_few_lines(closed_port: int) -> None:
    async def main() -> None:
        await trio_exchange.request("GET", f"http://127.0.0.1:{closed_port}/")

    with pytest.raises(ConnectError) as info:
        trio.run(main)
    printed = "".join(traceback.format_exception(info.value)).splitlines()
    # How many of the source lines are underlined depends on the version of CPython.
    lines = [line for line in printed if not line or line.strip(" ~^")]
    # The cause, a blank line on each side of what links it, this function, Trio's `run`, and `main`.
    assert len(lines) <= 12
    assert not [line for line in lines if "/trio_exchange/" in line]
    error = f"Error connecting to ('127.0.0.1', {closed_port}): Connection refused"
    assert lines[0] == f"ConnectionRefusedError: [Errno 111] {error}"
    assert lines[-2].strip().startswith("await trio_exchange.request(")
    assert lines[-1].endswith(
        f"ConnectError: could not connect to 127.0.0.1:{closed_port}: Connection refused"
    )


async def in_request(pool: ConnectionPool) -> None:
    await pool.request("GET", URL)


async def in_stream(pool: ConnectionPool) -> None:
    async with pool.stream("GET", URL):
        pytest.fail("it must not get here")


async def in_handle_async_request(pool: ConnectionPool) -> None:
    await pool.handle_async_request(Request("GET", URL))


async def in_open_tcp_stream(pool: ConnectionPool) -> None:
    await pool.open_tcp_stream("example.com", 80)


ENTRIES = pytest.mark.parametrize(
    "entry", [in_request, in_stream, in_handle_async_request, in_open_tcp_stream]
)


@ENTRIES
async def test_a_traceback_ends_where_the_library_was_called(
    network: Network, entry: Callable[[ConnectionPool], Awaitable[None]]
) -> None:
    network.failures.append(OSError("refused"))
    async with network.pool() as pool:
        with pytest.raises(ConnectError) as info:
            await entry(pool)
    assert frames_of(info.value)[1:] == [entry.__name__]
    assert info.value.__suppress_context__


async def test_so_does_that_of_a_function_of_the_module(closed_port: int) -> None:
    url = f"http://127.0.0.1:{closed_port}/"
    with pytest.raises(ConnectError) as info:
        await trio_exchange.request("GET", url)
    assert len(frames_of(info.value)) == 1
    with pytest.raises(ConnectError) as info:
        async with trio_exchange.stream("GET", url):
            pytest.fail("it must not get here")
    assert len(frames_of(info.value)) == 1


async def test_so_does_that_of_reading_a_response(network: Network) -> None:
    async def cut_off(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

    async with network.pool(cut_off) as pool:
        with pytest.raises(RemoteProtocolError) as info:
            await pool.request("GET", URL)
        assert len(frames_of(info.value)) == 1
        async with pool.stream("GET", URL) as response:
            with pytest.raises(RemoteProtocolError) as info:
                await response.aread()
            assert len(frames_of(info.value)) == 1
        async with pool.stream("GET", URL) as response:
            with pytest.raises(RemoteProtocolError) as info:
                _ = [chunk async for chunk in response.aiter_stream()]
            assert frames_of(info.value)[1:] in (["<listcomp>"], [])


class Mine(ConnectError):
    pass


def raise_mine() -> None:
    raise Mine("of a callback")


async def test_a_connectors_own_error_keeps_its_traceback() -> None:
    class Failing(Connector):
        async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
            if host == "example.com":
                raise_mine()
            raise OSError("mine")

    error = await error_of(ConnectionPool(connector=Failing()))
    assert type(error) is Mine
    assert frames_of(error)[1:] == ["connect_tcp", "raise_mine"]
    # So does the cause of an error of the library.
    error = await error_of(ConnectionPool(connector=Failing()), "http://other.example/")
    assert error.__cause__ is not None
    assert frames_of(error.__cause__) == ["connect_tcp"]


@pytest.mark.parametrize("error", [Mine, KeyError])
async def test_so_does_what_a_trace_handler_raises(network: Network, error: type[Exception]) -> None:
    async def handler(event: str, info: dict[str, Any]) -> None:
        if error is Mine:
            raise_mine()
        raise KeyError

    async with network.pool() as pool:
        with pytest.raises(error) as info:
            await pool.request("GET", URL, extensions={"trace": handler})
    frames = frames_of(info.value)
    assert "handler" in frames
    # What is no error of this library is left as it is.
    assert (frames[1:] == ["handler", "raise_mine"]) == (error is Mine)


async def test_so_does_what_a_body_raises(network: Network) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"1"
        raise_mine()

    async with network.pool(swallow) as pool:
        with pytest.raises(Mine) as info:
            await pool.request("POST", URL, content=body())
    assert frames_of(info.value)[-2:] == ["body", "raise_mine"]


async def test_a_failed_request_leaves_no_reference_cycle(closed_port: int) -> None:
    """Neither with one address, nor with several."""
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.1", "::1"))
    async with ConnectionPool() as pool:
        for host in ("127.0.0.1", "example.com"):
            await refused(pool, f"http://{host}:{closed_port}/")
            gc.collect()
            gc.disable()
            try:
                await refused(pool, f"http://{host}:{closed_port}/")
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                left = [thing for thing in gc.garbage if isinstance(thing, BaseException)]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()
            assert left == []


async def refused(pool: ConnectionPool, url: str) -> None:
    try:
        await pool.request("GET", url)
    except ConnectError:
        return
    pytest.fail("it must be refused")


# -- Addresses.


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_an_address_is_named_once(closed_port: int, host: str) -> None:
    error = await error_of(ConnectionPool(), f"http://{host}:{closed_port}/")
    assert str(error) == f"could not connect to {host}:{closed_port}: Connection refused"
    cause = error.__cause__
    assert type(cause) is ConnectionRefusedError
    assert cause.__cause__ is cause.__context__ is None


@pytest.mark.parametrize("addresses", [("::1",), ("127.0.0.1", "::1"), ("127.0.0.1", "::1", "127.0.0.1")])
async def test_each_address_of_a_name_is_named_once(closed_port: int, addresses: tuple[str, ...]) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(*addresses))
    error = await error_of(ConnectionPool(), f"http://example.com:{closed_port}/")
    shown = ["127.0.0.1", "[::1]"] if len(addresses) > 1 else ["[::1]"]
    reasons = "; ".join(f"Connection refused ({address}:{closed_port})" for address in shown)
    assert str(error) == f"could not connect to example.com:{closed_port}: {reasons}"
    cause = error.__cause__
    assert type(cause) is ConnectionRefusedError
    if len(addresses) > 1:
        assert str(cause) == f"[Errno 111] {reasons}"
        assert cause.__cause__ is cause.__context__ is None


async def test_addresses_that_failed_for_different_reasons(closed_port: int) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.1", "::1"))
    pool = ConnectionPool(local_address="127.0.0.1")
    error = await error_of(pool, f"http://example.com:{closed_port}/")
    assert type(error.__cause__) is OSError
    assert str(error) == f"could not connect to example.com:{closed_port}: {error.__cause__}"
    # A failure that the kernel reports at once comes from Trio without the address.
    reasons = f"Connection refused (127.0.0.1:{closed_port}); Address family not supported by protocol"
    assert str(error.__cause__) == reasons


async def test_a_name_without_address(network: Network) -> None:
    network.failures.append(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    error = await error_of(network.pool())
    assert str(error) == "could not connect to example.com:80: Name or service not known"


async def test_trios_words_without_an_error_number(network: Network) -> None:
    failure = OSError()
    failure.strerror = "Error connecting to ('192.0.2.1', 80): gone"
    network.failures.append(failure)
    assert "example.com:80: Error connecting to ('192" in str(await error_of(network.pool()))


@pytest.mark.parametrize(
    ("url", "proxy", "where"),
    [
        ("http://[::1]:8080/", None, r"\[::1\]:8080$"),
        (URL, Proxy("http://first.example:3128"), "the proxy http://first.example:3128"),
    ],
    ids=["address in brackets", "proxy"],
)
async def test_a_connect_timeout_says_where(
    network: Network, autojump_clock: MockClock, url: str, proxy: Proxy | None, where: str
) -> None:
    network.gate = trio.Event()
    async with network.pool(proxy=proxy) as pool:
        with pytest.raises(ConnectTimeout, match=f"at last connecting to {where}"):
            await pool.request("GET", url, timeout={"connect": 1})


# -- Proxies.

FIRST = "http://first.example:3128"


@pytest.mark.parametrize("url", ["http://example.com/", "https://example.com/"])
@pytest.mark.parametrize(
    "proxies",
    [[FIRST], ["https://first.example:3128"], [FIRST, "http://second.example"]]
    + [[f"{scheme}://first.example:1080"] for scheme in ("socks4a", "socks5", "socks5h")],
    ids=str,
)
async def test_a_proxy_that_can_not_be_reached_is_called_one(
    network: Network, proxies: list[str], url: str
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver("192.0.2.1"))
    network.failures.append(ConnectionRefusedError(111, "Connection refused"))
    error = await error_of(network.pool(proxy=[Proxy(proxy) for proxy in proxies]), url)
    assert str(error) == f"could not connect to the proxy {proxies[0]}: Connection refused"


async def test_a_proxy_on_a_unix_socket_that_can_not_be_reached(network: Network) -> None:
    network.failures.append(FileNotFoundError(2, "No such file or directory"))
    error = await error_of(network.pool(proxy=Proxy(FIRST), uds="/run/x"))
    assert str(error) == f"could not connect to the proxy {FIRST} at /run/x: No such file or directory"


async def test_the_second_proxy_of_a_chain_is_called_one_by_a_socks_proxy(network: Network) -> None:
    async def refuse(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        await peer.send(b"\5\0")
        await peer.receive_some()
        await peer.send(b"\5\5\0\1\0\0\0\0\0\0")

    proxies = [Proxy("socks5h://first.example"), Proxy("http://second.example:3128")]
    async with network.pool(refuse, proxy=proxies) as pool:
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", URL)
    assert str(info.value) == (
        "the proxy socks5h://first.example:1080 refused to connect to the proxy http://second.example:3128: "
        "connection refused (5)"
    )


async def test_a_tls_handshake_with_a_proxy_names_the_proxy(
    network: Network, client_context: ssl.SSLContext
) -> None:
    async def close(peer: ScriptedPeer) -> None:
        await peer.receive_some()

    proxy = Proxy("https://first.example:3128", ssl_context=client_context)
    async with network.pool(close, proxy=proxy) as pool:
        with pytest.raises(ConnectError, match=r"with the proxy https://first\.example:3128 failed"):
            await pool.request("GET", URL)


# -- Near misses.


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("timeouts", "timeout"),
        ("Timeout", "timeout"),
        ("TIMEOUT", "timeout"),
        ("time_out", "timeout"),
        ("sni", "sni_hostname"),
        ("SNI", "sni_hostname"),
        ("sni_host_name", "sni_hostname"),
        ("sni_host", "sni_hostname"),
        ("server_hostname", "sni_hostname"),
        ("tracer", "trace"),
        ("on_trace", "trace"),
        ("targets", "target"),
        ("info", "informational"),
        ("protocols", "protocol"),
    ],
)
async def test_an_extension_that_was_nearly_named_right(network: Network, given: str, meant: str) -> None:
    extensions = {"timeout": {"read": 1}, given: None}
    expected = f"unknown extension '{given}', did you mean '{meant}'"
    async with network.pool() as pool:
        with pytest.raises(ValueError, match=expected):
            await pool.request("GET", URL, extensions=extensions)
        with pytest.raises(ValueError, match=expected):
            await pool.open_tcp_stream("example.com", 80, extensions=extensions)
    assert network.dialled == []


@pytest.mark.parametrize(
    "name",
    [
        "trace_id",
        "retries",
        "cache",
        "user",
        "id",
        "x",
        "follow_redirects",
        "http_version",
        "network_stream",
        "reason_phrase",
        "stream_id",
        "trailing_headers",
        b"timeouts",
        5,
        None,
    ],
)
async def test_other_names_are_the_callers_own(network: Network, name: Any) -> None:
    async with network.pool() as pool:
        response = await pool.request("GET", URL, extensions={name: 1, "timeout": None})
        assert response.status == 200
        await (await pool.open_tcp_stream("example.com", 80, extensions={name: 1})).aclose()


# -- What a pool was doing.


async def test_a_pool_timeout_says_what_the_pool_was_doing(
    network: Network, autojump_clock: MockClock
) -> None:
    async with (
        network.pool(max_connections=4) as pool,
        trio.open_nursery() as tasks,
        pool.stream("GET", URL),
    ):
        await trio.sleep(30)
        async with pool.stream("GET", "http://other.example/"):
            network.gate = trio.Event()
            for host in ("a", "b", "c"):
                tasks.start_soon(pool.request, "GET", f"http://{host}/")
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(PoolTimeout) as info:
                await pool.request("GET", URL, timeout={"pool": 2.5})
            network.gate.set()
    assert str(info.value) == (
        "no connection became available within 2.5 seconds; connections: 4 of at most 4 "
        "(2 active, the longest for 32.5 seconds, 2 connecting), to http://example.com:80: 1; "
        "other requests waiting: 1"
    )
    assert info.value.__suppress_context__


async def test_a_pool_timeout_tells_of_the_limit_for_an_origin(
    network: Network, autojump_clock: MockClock
) -> None:
    async with network.pool(max_connections=9, max_connections_per_origin=1) as pool:
        await pool.request("GET", "http://idle.example/")
        async with pool.stream("GET", URL):
            with pytest.raises(PoolTimeout) as info:
                await pool.request("GET", URL, timeout={"pool": 0})
    assert str(info.value) == (
        "no connection became available within 0 seconds; connections: 2 of at most 9 "
        "(1 active, the longest for 0.0 seconds, 1 idle, 0 connecting), to http://example.com:80: "
        "1 of at most 1; other requests waiting: 0"
    )


async def test_a_pool_timeout_without_a_limit(network: Network, autojump_clock: MockClock) -> None:
    """Requests wait for the one that finds out whether the server speaks HTTP/2."""
    network.gate = trio.Event()
    async with (
        network.pool(max_connections=None, http2=True) as pool,
        trio.open_nursery() as tasks,
    ):
        tasks.start_soon(pool.request, "GET", "https://example.com/")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(PoolTimeout) as info:
            await pool.request("GET", "https://example.com/", timeout={"pool": 1})
        tasks.cancel_scope.cancel()
    assert str(info.value) == (
        "no connection became available within 1 seconds; connections: 1 (0 active, 1 connecting), "
        "to https://example.com:443: 1; other requests waiting: 0"
    )


async def test_how_long_a_connection_has_been_active(network: Network, autojump_clock: MockClock) -> None:
    async with network.pool() as pool:
        assert pool.statistics().longest_active is None
        async with pool.stream("GET", URL):
            assert pool.statistics().longest_active == 0
            await trio.sleep(10)
            async with pool.stream("GET", URL):
                await trio.sleep(5)
                assert pool.statistics().longest_active == 15
        assert pool.statistics().longest_active is None
        # Every request on a kept connection counts anew.
        async with pool.stream("GET", URL):
            await trio.sleep(3)
            assert pool.statistics().longest_active == 3


async def test_a_pool_can_be_shown_where_there_is_no_clock(network: Network) -> None:
    async with network.pool() as pool, pool.stream("GET", URL):
        shown = await trio.to_thread.run_sync(repr, pool)
    assert shown == "<ConnectionPool open: 1 active, 0 idle, 0 connecting, 0 waiting>"


# -- Without Trio.


async def own_request() -> None:
    await trio_exchange.request("GET", URL)


async def own_stream() -> None:
    async with trio_exchange.stream("GET", URL):
        pass


async def enter_pool() -> None:
    async with ConnectionPool():
        pass


async def request_of_pool() -> None:
    await ConnectionPool().request("GET", URL)


async def stream_of_pool() -> None:
    async with ConnectionPool().stream("GET", URL):
        pass


async def handle() -> None:
    await ConnectionPool().handle_async_request(Request("GET", URL))


async def open_tcp_stream() -> None:
    await ConnectionPool().open_tcp_stream("example.com", 80)


async def close() -> None:
    await ConnectionPool().aclose()


WITHOUT_TRIO = pytest.mark.parametrize(
    "function",
    [
        own_request,
        own_stream,
        enter_pool,
        request_of_pool,
        stream_of_pool,
        handle,
        open_tcp_stream,
        close,
    ],
)


@WITHOUT_TRIO
def test_under_asyncio(function: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"^trio_exchange needs trio\.run: this code runs under asyncio"):
        asyncio.run(function())


@WITHOUT_TRIO
@pytest.mark.parametrize("imported", [True, False])
def test_without_an_event_loop(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any], imported: bool
) -> None:
    if not imported:
        monkeypatch.delitem(sys.modules, "asyncio")
    with pytest.raises(RuntimeError, match=r"^trio_exchange needs trio\.run: this code runs outside of it"):
        function().send(None)


async def test_under_trio_a_pool_that_was_not_entered_says_so() -> None:
    with pytest.raises(RuntimeError, match="the pool was not entered"):
        await ConnectionPool().request("GET", URL)
