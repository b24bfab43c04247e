"""The pool: its life, its limits, its connections while nobody uses them."""

# ruff: noqa: PT012 - what comes out of a whole block is often what is tested here

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import signal
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from trio.testing import MockClock

import trio_exchange
from tests.harness.checks import assert_settles, assert_unharmed, internals, open_sockets
from tests.harness.layers import TLSServer, a_client, answer_once, whole_response
from tests.harness.networks import Network, Sockets
from tests.harness.peers import Recorder, Script, mute, reset, respond, swallow
from tests.harness.servers import background_nursery, serve_tcp
from tests.harness.streams import Crash, Crashing, Wrapped, WrappingConnector
from tests.harness.traces import Events
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    Connector,
    ExchangeError,
    LocalProtocolError,
    PoolTimeout,
    ReadError,
    RemoteProtocolError,
    Request,
    UnsupportedProtocol,
    WriteError,
)
from trio_exchange._connect.transport import Readiness
from trio_exchange._http.connection import HTTPConnection
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "http://example.com/"


# -- Life.


async def test_a_pool_that_was_not_entered_says_how() -> None:
    pool = ConnectionPool()
    with pytest.raises(RuntimeError, match=r"async with trio_exchange\.ConnectionPool"):
        await pool.request("GET", URL)
    with pytest.raises(RuntimeError, match="async with"):
        await pool.handle_async_request(Request("GET", URL))
    assert repr(pool) == "<ConnectionPool new: 0 active, 0 idle, 0 connecting, 0 waiting>"


async def test_a_pool_is_entered_once() -> None:
    async with ConnectionPool() as pool:
        with pytest.raises(RuntimeError, match="only once"):
            await pool.__aenter__()
    with pytest.raises(RuntimeError, match="only once"):
        await pool.__aenter__()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        ExceptionGroup("mine", [ValueError(), KeyError()]),
        KeyboardInterrupt(),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_the_block_raises_comes_out_as_itself(network: Network, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        async with network.pool() as pool:
            await pool.request("GET", URL)
            raise error
    assert caught.value is error
    assert_unharmed(pool)


async def test_what_the_block_raises_is_not_lost_to_a_cancellation(tcp: Sockets) -> None:
    with trio.CancelScope() as scope, pytest.raises(ValueError, match="mine"):
        async with tcp.pool() as pool, pool.stream("GET", tcp.url):
            scope.cancel()
            raise ValueError("mine")
    assert not scope.cancelled_caught
    with trio.CancelScope() as scope, pytest.raises(ValueError, match="mine"):
        async with trio_exchange.stream("GET", tcp.url):
            scope.cancel()
            raise ValueError("mine")
    assert not scope.cancelled_caught


async def test_a_pool_can_be_entered_while_cancelled() -> None:
    pool = ConnectionPool()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with pool:
            pytest.fail("it must not get here")
    assert scope.cancelled_caught
    with pytest.raises(ConnectionNotAvailable):
        await pool.request("GET", URL)


async def test_a_pool_works_in_an_exit_stack(network: Network) -> None:
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(network.pool())
        two = await stack.enter_async_context(network.pool())
        await one.request("GET", URL)
        response = await stack.enter_async_context(two.stream("POST", URL, content=b"body"))
        assert await response.aread() == b"body"
    assert_unharmed(one)
    assert_unharmed(two)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_closing_comes_out_as_itself() -> None:
    class Interrupting(Wrapped):
        async def aclose(self) -> None:
            await trio.testing.wait_all_tasks_blocked()
            signal.raise_signal(signal.SIGINT)
            await super().aclose()

    pools: list[ConnectionPool] = []

    async def main() -> None:
        connector = WrappingConnector(await background_nursery(), respond, Interrupting)
        async with ConnectionPool(connector=connector) as pool:
            pools.append(pool)
            await pool.request("GET", URL)

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert_unharmed(pools[0])


async def test_the_crash_of_a_connection_is_reported_at_the_end(network: Network) -> None:
    ended = False
    with pytest.raises(Crash):
        async with network.pool(wrap=Crashing, max_keepalive_connections=0) as pool:
            for _ in range(3):
                await pool.request("GET", URL)
                await trio.testing.wait_all_tasks_blocked()
            assert_unharmed(pool)
            ended = True
    assert ended


async def test_a_crash_does_not_hide_what_the_block_raised(network: Network) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with network.pool(wrap=Crashing) as pool:
            await pool.request("GET", URL)
            raise ValueError("mine")
    assert_unharmed(pool)


async def test_a_stream_that_fails_to_close_is_closed_all_the_same(network: Network) -> None:
    class Failing(Wrapped):
        async def aclose(self) -> None:
            await super().aclose()
            raise OSError("too late")

    async with network.pool(wrap=Failing) as pool:
        await pool.request("GET", URL)
    assert_unharmed(pool)


class Mute(Wrapped):
    """A stream whose peer never lets it close in good order; `closed` says how it was."""

    def __init__(self, stream: trio.abc.Stream, *, error: BaseException | None = None) -> None:
        super().__init__(stream)
        self.error = error
        self.attempts = 0

    async def aclose(self) -> None:
        self.attempts += 1
        try:
            await trio.sleep_forever()
        finally:
            await trio.aclose_forcefully(self.stream)
            if self.error is not None:
                raise self.error


@pytest.mark.parametrize("error", [None, OSError("broken"), trio.BrokenResourceError()])
@pytest.mark.parametrize("by", ["aclose", "block"])
async def test_closing_does_not_wait_for_a_mute_peer(
    network: Network, autojump_clock: MockClock, error: BaseException | None, by: str
) -> None:
    async with network.pool(wrap=functools.partial(Mute, error=error)) as pool:
        for path in "abc":
            await pool.request("GET", f"http://{path}.example/")
        started = trio.current_time()
        if by == "aclose":
            await pool.aclose()
            assert_unharmed(pool)
    assert trio.current_time() - started <= 1
    assert_unharmed(pool)


async def test_a_shielded_clean_up_can_use_the_pool(network: Network) -> None:
    with trio.CancelScope() as scope:
        async with network.pool() as pool:
            await pool.request("GET", URL)
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    response = await pool.request("POST", URL, content=b"bye")
                    another = await pool.request("POST", "http://another.example/", content=b"bye")
                assert pool.statistics().connections_opened == 2
    assert response.content == another.content == b"bye"
    assert_unharmed(pool)


async def test_a_response_closed_while_cancelled(network: Network) -> None:
    async with network.pool() as pool:
        with trio.CancelScope() as scope:
            async with pool.stream("GET", URL):
                scope.cancel()
        assert scope.cancelled_caught
        await assert_settles(pool, idle=pool.statistics().idle)


async def test_a_stream_that_fails_to_begin(network: Network) -> None:
    network.failures = [OSError("refused")]
    async with network.pool() as pool:
        with pytest.raises(ConnectError):
            async with pool.stream("GET", URL):
                pytest.fail("it must not get here")
        assert_unharmed(pool)


async def test_a_stream_is_entered_once(network: Network) -> None:
    async with network.pool() as pool:
        context = pool.stream("GET", URL)
        async with context as response:
            with pytest.raises(RuntimeError, match="entered only once"):
                async with context:
                    pytest.fail("it must not get here")
            assert pool.statistics().connections_opened == 1
            assert await response.aread() == b""
        with pytest.raises(RuntimeError, match="entered only once"):
            await context.__aenter__()
        assert_unharmed(pool, idle=1)


async def test_a_one_shot_stream_is_entered_once(nursery: trio.Nursery) -> None:
    server = await serve_tcp(nursery, respond)
    context = trio_exchange.stream("GET", server.url)
    async with context:
        pass
    with pytest.raises(RuntimeError, match=r"call stream\(\) again"):
        await context.__aenter__()


async def test_a_stream_that_is_awaited_says_how_it_is_used() -> None:
    contexts: list[tuple[Any, str]] = [
        (ConnectionPool().stream("GET", URL), "pool"),
        (trio_exchange.stream("GET", URL), "trio_exchange"),
    ]
    for context, owner in contexts:
        with pytest.raises(TypeError, match=rf"use 'async with {owner}\.stream\(\.\.\.\) as response:'"):
            await context


async def test_pools_can_be_nested(network: Network) -> None:
    async with network.pool() as outer:
        async with network.pool() as inner:
            await inner.request("GET", URL)
            await outer.request("GET", URL)
        assert_unharmed(inner)
        await outer.request("GET", URL)
        assert_unharmed(outer, idle=1)


async def test_closing_ends_everything_with_an_error(network: Network, autojump_clock: MockClock) -> None:
    errors: dict[str, BaseException] = {}

    async def ask(name: str, url: str) -> None:
        with pytest.raises(ExchangeError) as caught:
            await pool.request("GET", url)
        errors[name] = caught.value

    async with network.pool(mute, max_connections=2) as pool, trio.open_nursery() as tasks:
        tasks.start_soon(ask, "under way", URL)
        await trio.testing.wait_all_tasks_blocked()
        network.gate = trio.Event()
        tasks.start_soon(ask, "dialling", "http://dialled.example/")
        await trio.testing.wait_all_tasks_blocked()
        tasks.start_soon(ask, "waiting", URL)
        tasks.start_soon(ask, "waiting too", "http://another.example/")
        await trio.testing.wait_all_tasks_blocked()
        assert pool.statistics().waiting == 2
        await pool.aclose()
        assert_unharmed(pool)
        network.gate.set()
        await ask("late", URL)
    assert isinstance(errors.pop("under way"), ReadError)
    assert {type(error) for error in errors.values()} == {ConnectionNotAvailable}
    assert all("closed" in str(error) for error in errors.values())
    assert len(errors) == 4
    assert len(network.dialled) == 2
    assert len(network.peers) == 1
    assert repr(pool) == "<ConnectionPool closed: 0 active, 0 idle, 0 connecting, 0 waiting>"


async def test_closing_twice_is_allowed(network: Network) -> None:
    async with network.pool() as pool:
        await pool.request("GET", URL)
        await pool.aclose()
        await pool.aclose()
    await pool.aclose()


async def test_closing_goes_on_when_its_waiting_is_cancelled(
    network: Network, autojump_clock: MockClock
) -> None:
    async with network.pool(wrap=Mute) as pool:
        await pool.request("GET", URL)
        with trio.move_on_after(0.25) as scope:
            await pool.aclose()
        assert scope.cancelled_caught
        assert pool.statistics().closing == 1
        assert "closing" in repr(pool.connections[0])
    assert_unharmed(pool)


async def test_a_connection_established_too_late_is_closed(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A connector that ignores cancellation gives a connection to a pool that is no more."""

    class Deaf(Connector):
        async def connect_tcp(self, *_: Any, **__: Any) -> trio.abc.Stream:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
            return client

    client, server = trio.testing.memory_stream_pair()

    async def ask() -> None:
        with pytest.raises(ConnectionNotAvailable):
            await pool.request("GET", URL)

    async with trio.open_nursery() as tasks, ConnectionPool(connector=Deaf()) as pool:
        tasks.start_soon(ask)
        await trio.sleep(1)
    assert trio.current_time() >= 5
    assert_unharmed(pool)
    assert await server.receive_some() == b""


async def test_dialling_that_fails_because_the_pool_is_closed_says_so(autojump_clock: MockClock) -> None:
    class Failing(Connector):
        async def connect_tcp(self, *_: Any, **__: Any) -> trio.abc.Stream:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.5)
            raise OSError("given up")

    async def ask() -> None:
        with pytest.raises(ConnectionNotAvailable, match="closed") as info:
            await pool.request("GET", URL)
        assert isinstance(info.value.__cause__, ConnectError)

    async with trio.open_nursery() as tasks, ConnectionPool(connector=Failing()) as pool:
        tasks.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
    assert_unharmed(pool)


@pytest.mark.parametrize("event", ["headers.complete", "body.started"])
async def test_an_upload_that_begins_too_late_ends(
    network: Network, autojump_clock: MockClock, event: str
) -> None:
    """A slow trace handler takes a request past the end of the pool."""

    async def slow(name: str, _: dict[str, Any]) -> None:
        if name == f"http11.send_request_{event}":
            await trio.sleep(5)

    async def ask() -> None:
        with pytest.raises(ExchangeError):
            await pool.request("POST", URL, content=iter([b"a", b"b"]), extensions={"trace": slow})

    async with trio.open_nursery() as tasks:
        async with network.pool(swallow) as pool:
            tasks.start_soon(ask)
            await trio.sleep(1)
        assert trio.current_time() < 3
    assert_unharmed(pool)


# -- Context variables.

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


async def test_context_variables_stay_where_they_belong(network: Network) -> None:
    seen: dict[str, str] = {}

    class Observed(Wrapped):
        async def aclose(self) -> None:
            seen["connection"] = variable.get()
            await super().aclose()

    async def body() -> AsyncIterator[bytes]:
        seen["body"] = variable.get()
        yield b"body"

    async def handler(event: str, _: dict[str, Any]) -> None:
        seen["trace"] = variable.get()

    async def ask() -> None:
        variable.set("requester's")
        await pool.request("POST", URL, content=body(), extensions={"trace": handler})

    variable.set("pool's")
    async with network.pool(wrap=Observed) as pool:
        variable.set("later")
        async with trio.open_nursery() as tasks:
            tasks.start_soon(ask)
    assert seen == {"connection": "pool's", "body": "requester's", "trace": "requester's"}


# -- Limits.


class Gauge:
    """A script that counts how many requests are being served at once; it serves them when told."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.order: list[bytes] = []
        self.go = trio.Event()

    async def __call__(self, peer: ScriptedPeer) -> None:
        async for request in peer:
            self.order.append(request.target)
            self.now += 1
            self.most = max(self.most, self.now)
            await self.go.wait()
            await trio.sleep(0.1)
            self.now -= 1
            await peer.send_response()


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"max_connections": 3}, 3),
        ({"max_connections": None}, 12),
        ({}, 10),
        ({"max_connections_per_origin": 2}, 4),
        ({"max_connections": 3, "max_connections_per_origin": 2}, 3),
    ],
)
async def test_no_more_connections_than_allowed(
    network: Network, autojump_clock: MockClock, limits: dict[str, Any], most: int
) -> None:
    gauge = Gauge()
    async with network.pool(gauge, **limits) as pool:
        async with trio.open_nursery() as tasks:
            for number in range(12):
                tasks.start_soon(pool.request, "GET", f"http://{'ab'[number % 2]}.example/")
            await trio.testing.wait_all_tasks_blocked()
            gauge.go.set()
        assert gauge.most == most
        assert len(gauge.order) == 12
        assert pool.statistics().requests_served == 12
        assert pool.statistics().waiting == 0


async def test_requests_to_an_origin_are_served_first_come_first_served(
    network: Network, autojump_clock: MockClock
) -> None:
    gauge = Gauge()
    async with network.pool(gauge, max_connections=1) as pool, trio.open_nursery() as tasks:
        for number in range(10):
            tasks.start_soon(pool.request, "GET", f"{URL}{number}")
            await trio.testing.wait_all_tasks_blocked()
        gauge.go.set()
    assert gauge.order == [b"/%d" % number for number in range(10)]


async def test_the_connection_idle_longest_makes_room(network: Network) -> None:
    async with network.pool(max_connections=2) as pool:
        for host in ("a", "b", "a", "c"):
            await pool.request("GET", f"http://{host}.example/")
        assert [str(connection.origin) for connection in pool.connections] == [
            "http://a.example:80",
            "http://c.example:80",
        ]


async def test_no_origin_starves_another(network: Network, autojump_clock: MockClock) -> None:
    gauge = Gauge()
    gauge.go.set()
    async with network.pool(gauge, max_connections=2) as pool:

        async def busy(worker: str) -> None:
            while True:
                await pool.request("GET", f"http://busy.example/{worker}")

        async with trio.open_nursery() as tasks:
            for worker in "1234":
                tasks.start_soon(busy, worker)
            await trio.sleep(1.05)
            for _ in range(3):
                await pool.request("GET", "http://other.example/other", extensions={"timeout": {"pool": 0.5}})
            tasks.cancel_scope.cancel()
    assert gauge.order.count(b"/other") == 3


async def test_no_more_connections_are_kept_than_allowed(network: Network) -> None:
    async with network.pool(max_keepalive_connections=2) as pool:
        async with trio.open_nursery() as tasks:
            for _ in range(5):
                tasks.start_soon(pool.request, "GET", URL)
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool, idle=2)


async def test_a_connection_that_has_expired_is_not_used(network: Network, autojump_clock: MockClock) -> None:
    async with network.pool(keepalive_expiry=0.5) as pool:
        await pool.request("GET", URL)
        await trio.sleep(0.25)
        await pool.request("GET", URL)
        assert pool.statistics().connections_opened == 1
        await trio.sleep(0.5)
        await pool.request("GET", URL)
        assert pool.statistics().connections_opened == 2


async def test_an_expired_connection_is_closed_without_traffic(
    network: Network, autojump_clock: MockClock
) -> None:
    async with network.pool(keepalive_expiry=5) as pool:
        for _ in range(2):
            await pool.request("GET", URL)
            await trio.sleep(4.9)
            assert_unharmed(pool, idle=1)
            await trio.sleep(1.2)
            assert_unharmed(pool)
            await trio.sleep(100)


async def test_a_waiting_request_times_out_and_leaves_its_place(
    network: Network, autojump_clock: MockClock
) -> None:
    async with network.pool(max_connections=1) as pool:
        async with pool.stream("GET", URL):
            for limit in (0, 3):
                started = trio.current_time()
                with pytest.raises(PoolTimeout, match=f"no connection became available within {limit} sec"):
                    await pool.request("GET", URL, extensions={"timeout": {"pool": limit}})
                assert trio.current_time() - started == limit
                assert pool.statistics().waiting == 0
        await pool.request("GET", URL, extensions={"timeout": {"pool": 0}})


async def test_the_pool_timeout_is_one_for_all_waits(network: Network, autojump_clock: MockClock) -> None:
    """A request that has to go back to the queue does not get its time anew."""

    async def first_request_only(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send_response()
        await peer.receive_head()

    waited: list[float] = []

    async def ask() -> None:
        started = trio.current_time()
        with pytest.raises(PoolTimeout):
            await pool.request("GET", URL, extensions={"timeout": {"pool": 3}})
        waited.append(trio.current_time() - started)

    # The connection that ends under the request takes a second to close, during which its slot is taken.
    async with (
        network.pool(first_request_only, wrap=Mute, max_connections=1) as pool,
        trio.open_nursery() as tasks,
    ):
        async with pool.stream("GET", URL) as response:
            tasks.start_soon(ask)
            await trio.sleep(2.5)
            await response.aread()
        await trio.testing.wait_all_tasks_blocked()
    assert waited == [3]


# -- TLS.


async def serve_records(nursery: trio.Nursery, play: Callable[[TLSServer], Awaitable[None]]) -> str:
    """Start a server whose TLS records leave when `play` says so; it may ask for a certificate.

    Session tickets are what a server usually says late, but OpenSSL sends them no later than the first
    response. To ask for a client's certificate is just as harmless.
    """

    async def handler(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(EOFError, trio.BrokenResourceError):
                far = TLSServer(stream)
                await far.handshake()
                await play(far)

    listeners = await nursery.start(trio.serve_tcp, handler, 0)
    return f"https://localhost:{listeners[0].socket.getsockname()[1]}/"


@dataclass(frozen=True)
class Late:
    """A server that asks for a certificate after its first response, when `say` is set."""

    url: str
    say: trio.Event


async def late_server(nursery: trio.Nursery) -> Late:
    say = trio.Event()

    async def play(far: TLSServer) -> None:
        # OpenSSL sends new tickets after the client's certificate unless it is asked for before.
        far.ssl.verify_client_post_handshake()
        await far.flush()
        await answer_once(far)
        await say.wait()
        far.ssl.do_handshake()
        await far.flush()
        while True:
            await answer_once(far)

    return Late(await serve_records(nursery, play), say)


@pytest.mark.parametrize("pause", [0, 1.2], ids=["checkout", "housekeeping"])
async def test_what_tls_says_while_idle_does_no_harm(nursery: trio.Nursery, pause: float) -> None:
    late = await late_server(nursery)
    async with ConnectionPool(a_client()) as pool:
        await pool.request("GET", late.url)
        [connection] = pool.connections
        assert isinstance(connection, HTTPConnection)
        late.say.set()
        await until_noticed(pool)
        assert connection.readiness() is Readiness.READABLE
        await trio.sleep(pause)
        if pause:
            assert connection.readiness() is Readiness.QUIET
        await pool.request("GET", late.url)
        assert pool.connections == [connection]
    nursery.cancel_scope.cancel()


async def test_a_request_cancelled_while_it_looks_at_its_connection(nursery: trio.Nursery) -> None:
    late = await late_server(nursery)
    async with ConnectionPool(a_client(), max_connections=1) as pool:
        await pool.request("GET", late.url)
        late.say.set()
        await until_noticed(pool)
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.request("GET", late.url)
        assert scope.cancelled_caught
        await pool.request("GET", late.url)
        assert_unharmed(pool, idle=1)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["data", "close"])
async def test_what_comes_along_with_a_response_over_tls_is_noticed(nursery: trio.Nursery, what: str) -> None:
    """It is in a record of its own, already received, so that the kernel doesn't know of it."""

    async def play(far: TLSServer) -> None:
        await ScriptedPeer(far).receive_request()
        far.ssl.write(whole_response(b"right"))
        if what == "data":
            far.ssl.write(whole_response(b"wrong"))
        else:
            far.say_goodbye()
        await far.flush()
        await trio.sleep_forever()

    url = await serve_records(nursery, play)
    async with ConnectionPool(a_client()) as pool:
        for _ in range(3):
            response = await pool.request("POST", url, content=b"written once")
            assert response.content == b"right"
        assert pool.statistics().connections_opened == 3
    nursery.cancel_scope.cancel()


# -- Idle connections.


async def after_first(event: trio.Event, action: Script, peer: ScriptedPeer) -> None:
    """A script: on the event, do something to a connection which has had one request, then serve on."""
    await peer.receive_request()
    await peer.send_response()
    await event.wait()
    await action(peer)
    with contextlib.suppress(trio.ClosedResourceError):
        await respond(peer)


async def close_it(peer: ScriptedPeer) -> None:
    await peer.aclose()


async def reset_it(peer: ScriptedPeer) -> None:
    reset(peer)


async def stray_bytes(peer: ScriptedPeer) -> None:
    await peer.send(b"HTTP/1.1 408 Too late\r\nContent-Length: 0\r\n\r\n")


ENDINGS = pytest.mark.parametrize("action", [close_it, reset_it, stray_bytes])


@ENDINGS
async def test_a_connection_that_ends_while_idle_is_not_used(sockets: Sockets, action: Script) -> None:
    event, trace = trio.Event(), Events()
    async with sockets.pool(functools.partial(after_first, event, action)) as pool:
        await pool.request("POST", sockets.url, content=b"one")
        event.set()
        await until_noticed(pool)
        response = await pool.request("POST", sockets.url, content=b"two", extensions={"trace": trace})
        assert response.status == 200
        assert pool.statistics().connections_opened == 2
        assert trace.infos("connection.retry.started") == []


async def test_what_tls_says_during_a_trace_does_no_harm(nursery: trio.Nursery) -> None:
    """The session tickets before the first request, a request for a certificate before the second."""
    second = trio.Event()

    async def play(far: TLSServer) -> None:
        await far.flush()
        await answer_once(far, b"ok")
        await second.wait()
        far.ask_for_certificate()
        await far.flush()
        await answer_once(far, b"ok")

    async def wait(event: str, _: dict[str, Any]) -> None:
        if event == "http11.send_request_headers.started":
            if pool.statistics().requests_served:
                second.set()
            await until_noticed(pool)

    url = await serve_records(nursery, play)
    async with ConnectionPool(a_client()) as pool:
        for _ in range(2):
            assert (await pool.request("GET", url, extensions={"trace": wait})).content == b"ok"
        assert pool.statistics().connections_opened == 1


async def until_noticed(pool: ConnectionPool) -> None:
    """Wait until the kernel has something to say about the pool's only connection."""
    [connection] = internals(pool)
    sock = connection.info.get_extra_info("socket")
    if sock.fileno() >= 0:
        with trio.fail_after(5), contextlib.suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(sock)


@ENDINGS
async def test_a_connection_that_ends_while_idle_is_closed_without_traffic(
    sockets: Sockets, action: Script
) -> None:
    event = trio.Event()
    async with sockets.pool(functools.partial(after_first, event, action)) as pool:
        await pool.request("GET", sockets.url)
        [connection] = internals(pool)
        event.set()
        with trio.fail_after(1.5):
            await connection.wait_closed()
        assert_unharmed(pool)


async def test_housekeeping_keeps_no_connection_that_is_closed(
    network: Network, autojump_clock: MockClock
) -> None:
    async with network.pool(keepalive_expiry=2.5) as pool:
        await pool.request("GET", URL)
        connection = weakref.ref(internals(pool)[0])
        await trio.sleep(10)
        gc.collect()
        assert connection() is None


async def test_housekeeping_spares_a_quiet_connection(tls: Sockets) -> None:
    """Also one on which TLS has something to say that is no end: it looks, and keeps it."""
    async with tls.pool() as pool:
        await pool.request("GET", tls.url)
        async with pool.stream("GET", tls.url):
            await trio.sleep(1.1)
        await trio.sleep(1.1)
        assert_unharmed(pool, idle=1)
        await pool.request("GET", tls.url)
        assert pool.statistics().connections_opened == 1


# -- The silent retry.


class Flaky:
    """A script whose first connection ends, unanswered, on its second request."""

    def __init__(self, answer: bytes = b"") -> None:
        self.bodies: list[bytes] = []
        self.answer = answer
        self.connections = 0

    async def __call__(self, peer: ScriptedPeer) -> None:
        self.connections += 1
        first = self.connections == 1
        served = 0
        async for request in peer:
            self.bodies.append(request.method + b" " + request.body)
            served += 1
            if first and served == 2:
                await peer.send(self.answer)
                return
            await peer.send_response()


async def body() -> AsyncIterator[bytes]:
    yield b"body"


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"])
@pytest.mark.parametrize("content", [b"body", [b"bo", b"dy"], (b"body",)])
async def test_an_idempotent_request_is_sent_again(
    network: Network, method: str, content: bytes | list[bytes]
) -> None:
    flaky, trace = Flaky(), Events()
    async with network.pool(flaky) as pool:
        await pool.request("GET", URL)
        response = await pool.request(method, URL, content=content, extensions={"trace": trace})
        assert response.status == 200
        assert flaky.bodies == [b"GET ", *[method.encode() + b" body"] * 2]
        assert_unharmed(pool, idle=1)
        [told] = trace.infos("connection.retry.started")
        assert told["attempt"] == 1
        assert isinstance(told["exception"], RemoteProtocolError)
        assert len(trace.infos("connection.connect_tcp.complete")) == 1


@pytest.mark.parametrize("method", ["POST", "PATCH", "FOO"])
async def test_what_a_server_may_have_acted_on_is_not_sent_again(network: Network, method: str) -> None:
    flaky = Flaky()
    async with network.pool(flaky) as pool:
        await pool.request("GET", URL)
        with pytest.raises(RemoteProtocolError, match="without sending a response"):
            await pool.request(method, URL, content=b"body")
        assert flaky.bodies == [b"GET ", method.encode() + b" body"]
        await assert_settles(pool)


@pytest.mark.parametrize("content", [body, lambda: iter([b"body"])], ids=["asynchronous", "ordinary"])
async def test_a_body_that_was_taken_is_not_sent_again(network: Network, content: Callable[[], Any]) -> None:
    flaky = Flaky()
    async with network.pool(flaky) as pool:
        await pool.request("GET", URL)
        with pytest.raises(RemoteProtocolError):
            await pool.request("PUT", URL, content=content())
        assert flaky.bodies == [b"GET ", b"PUT body"]
        await assert_settles(pool)


async def test_a_request_whose_answer_began_is_not_sent_again(network: Network) -> None:
    flaky = Flaky(answer=b"H")
    async with network.pool(flaky) as pool:
        await pool.request("GET", URL)
        with pytest.raises(RemoteProtocolError):
            await pool.request("GET", URL)
        assert len(flaky.bodies) == 2


async def test_a_request_on_a_new_connection_is_not_sent_again(network: Network) -> None:
    async def rude(peer: ScriptedPeer) -> None:
        await peer.receive_request()

    async with network.pool(rude) as pool:
        with pytest.raises(RemoteProtocolError):
            await pool.request("GET", URL)
        assert len(network.dialled) == 1
        await assert_settles(pool)


async def test_it_is_sent_again_once(network: Network) -> None:
    received = 0

    async def one_each(peer: ScriptedPeer) -> None:
        nonlocal received
        async for _ in peer:
            received += 1
            if received in (1, 2):
                await peer.send_response()
            else:
                return

    async with network.pool(one_each) as pool:
        async with pool.stream("GET", URL), pool.stream("GET", URL):
            pass
        assert_unharmed(pool, idle=2)
        with pytest.raises(RemoteProtocolError):
            await pool.request("GET", URL)
        assert received == 4
        # The other one of the two idle connections was not tried.
        await assert_settles(pool, idle=1)


async def test_a_retry_waits_its_turn_at_the_head_of_the_queue(
    network: Network, autojump_clock: MockClock
) -> None:
    flaky = Flaky()
    order: list[str] = []

    async def ask(path: str) -> None:
        await pool.request("GET", URL + path)
        order.append(path)

    async with network.pool(flaky, max_connections=1) as pool:
        await pool.request("GET", URL)
        async with trio.open_nursery() as tasks:
            tasks.start_soon(ask, "first")
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            tasks.start_soon(ask, "second")
    assert order == ["first", "second"]


async def test_a_post_of_which_nothing_was_sent_is_sent_again(tcp: Sockets) -> None:
    """The connection broke between the look at it and the sending."""
    recorder = Recorder()

    async def sabotage(event: str, _: dict[str, Any]) -> None:
        if event == "http11.send_request_headers.started" and pool.statistics().connections_opened == 1:
            [connection] = internals(pool)
            connection.info.get_extra_info("socket").shutdown(socket.SHUT_WR)

    async with tcp.pool(recorder) as pool:
        await pool.request("POST", tcp.url, content=b"one")
        response = await pool.request("POST", tcp.url, content=b"two", extensions={"trace": sabotage})
        assert response.status == 200
        assert pool.statistics().connections_opened == 2
    assert recorder.bodies == [b"one", b"two"]


async def test_a_post_whose_sending_failed_half_way_is_not_sent_again(network: Network) -> None:
    recorder = Recorder()

    class SendsThenFails(Wrapped):
        sends = 0

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            self.sends += 1
            await super().send_all(data)
            if self.sends == 2:
                await trio.aclose_forcefully(self.stream)
                raise trio.BrokenResourceError("nobody knows what was sent")

    async with network.pool(recorder, wrap=SendsThenFails) as pool:
        await pool.request("POST", URL, content=b"one")
        with pytest.raises(WriteError, match="nobody knows"):
            await pool.request("POST", URL, content=b"two")
        await trio.testing.wait_all_tasks_blocked()
        assert recorder.bodies == [b"one", b"two"]
        await assert_settles(pool)


# -- What it shows.


async def test_statistics_and_reprs(network: Network, autojump_clock: MockClock) -> None:
    async with network.pool(max_connections=3) as pool:
        await pool.request("GET", "http://idle.example/")
        async with trio.open_nursery() as tasks, pool.stream("GET", "http://[::1]:8080/"):
            network.gate = trio.Event()
            tasks.start_soon(pool.request, "GET", "http://dialled.example/")
            await trio.testing.wait_all_tasks_blocked()
            assert [repr(connection) for connection in pool.connections] == [
                "<HTTP11Connection 'http://idle.example:80', HTTP/1.1, idle, 1 request>",
                "<HTTP11Connection 'http://[::1]:8080', HTTP/1.1, active, 1 request>",
            ]
            assert pool.statistics() == trio_exchange.PoolStatistics(
                open=2,
                active=1,
                idle=1,
                closing=0,
                connecting=1,
                waiting=0,
                connections_opened=2,
                requests_served=2,
                longest_active=0,
            )
            assert repr(pool) == "<ConnectionPool open: 1 active, 1 idle, 1 connecting, 0 waiting>"
            network.gate.set()
        await pool.request("GET", "http://idle.example/")
        assert (
            repr(pool.connections[0])
            == "<HTTP11Connection 'http://idle.example:80', HTTP/1.1, idle, 2 requests>"
        )
        [closed, *_] = pool.connections
    assert "closed" in repr(closed)
    with pytest.raises(AttributeError):
        pool.statistics().open = 5  # type: ignore[misc]


# -- Ways to ask.


async def test_the_one_shot_functions_leave_nothing(nursery: trio.Nursery) -> None:
    server = await serve_tcp(nursery, respond)
    response = await trio_exchange.request("POST", server.url, content=b"hello")
    assert response.content == b"hello"
    async with trio_exchange.stream("POST", server.url, content=b"hello") as response:
        assert await response.aread() == b"hello"
        sock = response.extensions["network_stream"].get_extra_info("socket")
    assert sock.fileno() == -1


async def test_a_one_shot_stream_that_fails_leaves_nothing(nursery: trio.Nursery) -> None:
    server = await serve_tcp(nursery, mute)
    before = open_sockets()
    with pytest.raises(trio_exchange.ReadTimeout):
        async with trio_exchange.stream("GET", server.url, extensions={"timeout": {"read": 0.01}}):
            pytest.fail("it must not get here")
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert open_sockets() <= before


async def test_a_connection_handed_over_to_nobody_is_closed(network: Network) -> None:
    async def switch(peer: ScriptedPeer) -> None:
        request = await peer.receive_request()
        await peer.send_response(200 if request.method == b"CONNECT" else 101)
        await swallow(peer)

    async with network.pool(switch) as pool:
        response = await pool.request("CONNECT", URL, extensions={"target": b"example.com:443"})
        assert response.content == b""
        headers = {"Connection": "upgrade", "Upgrade": "something"}
        assert (await pool.request("GET", URL, headers=headers)).status == 101
        await assert_settles(pool)


async def test_handle_async_request(network: Network) -> None:
    async with network.pool() as pool:
        request = Request("POST", URL, content=b"hello")
        response = await pool.handle_async_request(request)
        assert pool.statistics().active == 1
        assert await response.aread() == b"hello"
        await response.aclose()
        assert_unharmed(pool, idle=1)
        assert request.headers == []


@pytest.mark.parametrize("url", ["ftp://example.com/", "/path", "//example.com/", "httpx://a/"])
async def test_a_scheme_that_is_not_spoken(nursery: trio.Nursery, url: str) -> None:
    async with ConnectionPool() as pool:
        with pytest.raises(UnsupportedProtocol, match="must be http, https, ws or wss"):
            await pool.request("GET", url)
        assert_unharmed(pool)


@pytest.mark.parametrize("url", ["http:///path", "http:path", "https://:443/"])
async def test_a_url_without_host(url: str) -> None:
    async with ConnectionPool() as pool:
        with pytest.raises(ValueError, match="no host"):
            await pool.request("GET", url)


async def test_websocket_schemes_connect_like_their_http_ones(network: Network) -> None:
    async with network.pool() as pool:
        await pool.request("GET", "ws://example.com/")
    assert [dialled.address for dialled in network.dialled] == [("example.com", 80)]


@pytest.mark.parametrize(
    ("extensions", "error", "message"),
    [
        ({"timeout": {"total": 1}}, ValueError, "unknown timeout 'total'"),
        ({"timeout": {"read": -1}}, ValueError, "read timeout"),
        ({"timeout": {"pool": "1"}}, TypeError, "pool timeout"),
        ({"timeout": 5}, TypeError, "mapping"),
        ({"trace": "loud"}, TypeError, "trace"),
        ({"trace": lambda *_: None}, TypeError, "trace extension must be an async function"),
        ({"sni_hostname": 5}, TypeError, "sni_hostname"),
        ({"sni_hostname": ""}, ValueError, "TLS needs a host name, not ''"),
        (
            {"informational": "loud"},
            TypeError,
            "informational extension must be an async function, not 'loud'",
        ),
        ({"target": 5}, TypeError, "target"),
        ({"target": b"/a b"}, LocalProtocolError, "target"),
    ],
)
async def test_extensions_are_checked_before_anything_is_opened(
    network: Network, extensions: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with network.pool() as pool:
        with pytest.raises(error, match=message):
            await pool.request("GET", "https://example.com/", extensions=extensions)
        assert network.dialled == []
        assert_unharmed(pool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ssl_context": "secure"}, TypeError, "ssl_context must be an ssl.SSLContext or None, not 'secure'"),
        ({"max_connections": 0}, ValueError, "max_connections must be 1 or more, not 0"),
        ({"max_connections": 1.5}, TypeError, "max_connections must be an int, not 1.5"),
        ({"max_connections": True}, TypeError, "max_connections must be an int, not True"),
        ({"max_connections_per_origin": 0}, ValueError, "max_connections_per_origin must be 1 or more"),
        ({"max_keepalive_connections": -1}, ValueError, "max_keepalive_connections must be 0 or more"),
        ({"keepalive_expiry": -1}, ValueError, "keepalive_expiry must be zero or more"),
        ({"keepalive_expiry": "1"}, TypeError, "keepalive_expiry must be a number"),
        ({"expect_continue_timeout": float("nan")}, ValueError, "expect_continue_timeout"),
        ({"expect_continue_timeout": None}, TypeError, "expect_continue_timeout must be a number"),
        ({"local_address": 5}, TypeError, "local_address must be a str or None, not 5"),
        ({"uds": b"/socket"}, TypeError, "uds must be a str or None, not b'/socket'"),
        ({"connector": MemoryConnector}, TypeError, "connector must be a Connector or None, not <class"),
        ({"socket_options": 5}, TypeError, "socket_options must be an iterable of tuples, not 5"),
        ({"socket_options": [(1, 2)]}, TypeError, r"each of socket_options must be .*, not \(1, 2\)"),
        ({"socket_options": "abc"}, TypeError, "each of socket_options must be .*, not 'a'"),
        ({"retries": -1}, ValueError, "retries must be 0 or more"),
        ({"retries": None}, TypeError, "retries must be an int"),
        ({"max_header_bytes": 0}, ValueError, "max_header_bytes must be 1 or more"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ConnectionPool(**arguments)


async def test_only_a_request_can_be_handled() -> None:
    wrong: Any = "GET"
    async with ConnectionPool() as pool:
        with pytest.raises(TypeError, match=r"must be a trio_exchange\.Request, not 'GET'"):
            await pool.handle_async_request(wrong)


def test_unlimited() -> None:
    ConnectionPool(
        max_connections=None,
        max_connections_per_origin=None,
        max_keepalive_connections=None,
        keepalive_expiry=None,
    )
