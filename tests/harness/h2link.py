"""Pools that speak HTTP/2 with scripted peers, and requests that run in the background."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest
import trio
import trio.testing
from h2.settings import SettingCodes

from tests.harness.certificates import alpn_server, make_tls
from tests.harness.h2peer import H2Peer
from tests.harness.h2server import Multiplexer, ServerStream
from tests.harness.peers import Script
from tests.harness.servers import serve_tcp
from tests.harness.traces import Events
from trio_exchange import ConnectionPool, ExchangeError, Response
from trio_exchange.testing import MemoryConnector, ScriptedPeer

Serve: TypeAlias = Callable[[H2Peer], Awaitable[object]]

URL = "http://example.com/"

#: What an HTTP/2 connection may run on; the value is for `h2_server`.
LINKS = pytest.mark.parametrize("link", ["memory", "plain", "tls"])
SOCKETS = pytest.mark.parametrize("link", ["plain", "tls"])


# -- Servers.


@contextlib.asynccontextmanager
async def memory_server(
    script: Script, **options: Any
) -> AsyncIterator[tuple[ConnectionPool, MemoryConnector]]:
    """Enter a pool whose connections, in memory, a script plays.

    At the end the pool is closed, and all scripts run to their end.

    Args:
        script: The script of each connection.
        options: The options of the pool, and `stream_pair` of the connector.
    """
    async with trio.open_nursery() as nursery:
        pair = options.pop("stream_pair", trio.testing.memory_stream_pair)
        connector = MemoryConnector(nursery, script, stream_pair=pair)
        async with ConnectionPool(make_tls().client, connector=connector, **options) as pool:
            yield pool, connector


@dataclass
class H2Server:
    """The server of a pool.

    Attributes:
        url: The URL to request.
        peers: The server's side of each connection so far, in order.
    """

    url: str
    peers: list[H2Peer]
    _connector: MemoryConnector | None = None

    @property
    def peer(self) -> H2Peer:
        """The server's side of the only connection."""
        [peer] = self.peers
        return peer

    @property
    def connector(self) -> MemoryConnector:
        """The pool's connector, in memory."""
        assert self._connector is not None
        return self._connector

    @property
    def dialled(self) -> int:
        """The number of connections that the pool has tried to make, in memory."""
        return len(self.connector.dialled)


@contextlib.asynccontextmanager
async def h2_server(
    serve: Serve, link: str = "memory", **options: Any
) -> AsyncIterator[tuple[ConnectionPool, H2Server]]:
    """Enter a pool that speaks HTTP/2 by prior knowledge, and its server.

    At the end the pool is closed, and all scripts run to their end.

    Args:
        serve: The script of each connection.
        link: What the connections run on: "memory", or TCP on loopback, "plain" or with "tls".
        options: The options of the pool, and in memory `stream_pair` of the connector.
    """
    running = 0
    all_ended = trio.Event()
    peers: list[H2Peer] = []

    async def play(scripted: ScriptedPeer) -> None:
        nonlocal running
        running += 1
        try:
            peers.append(H2Peer(scripted.stream))
            await serve(peers[-1])
        finally:
            running -= 1
            if not running:
                all_ended.set()

    options = {"http1": False, "http2": True, **options}
    if link == "memory":
        async with memory_server(play, **options) as (pool, connector):
            yield pool, H2Server(URL, peers, connector)
        return
    async with trio.open_nursery() as nursery:
        listener = await serve_tcp(nursery, play, tls=alpn_server("h2") if link == "tls" else None)
        async with ConnectionPool(make_tls().client, **options) as pool:
            yield pool, H2Server(f"{listener.url}/", peers)
        while running:
            all_ended = trio.Event()
            await all_ended.wait()
        listener.cancel_scope.cancel()


# -- Scripts.


class requests:
    """Iterate over the requests to a peer, with their bodies, until the client closes the connection."""

    def __init__(self, peer: H2Peer) -> None:
        self.peer = peer

    def __aiter__(self) -> requests:
        return self

    async def __anext__(self) -> tuple[int, dict[bytes, bytes], bytes]:
        try:
            return await self.peer.request()
        except EOFError:
            raise StopAsyncIteration from None


async def first_request(peer: H2Peer, settings: dict[SettingCodes, int] | None = None) -> int:
    """Begin the connection, and receive a request with its body; return its stream id."""
    await peer.start(settings)
    stream_id, _, _ = await peer.request()
    return stream_id


async def answer(peer: H2Peer, body: bytes = b"", **options: Any) -> int:
    """Receive a request and respond to it; return its stream id."""
    stream_id, _, _ = await peer.request()
    await peer.respond(stream_id, body=body, **options)
    return stream_id


async def send_data(peer: H2Peer, stream_id: int, data: bytes, *, end: bool = False) -> None:
    """Send one DATA frame."""
    peer.h2.send_data(stream_id, data, end_stream=end)
    await peer.flush()


async def set_stream_limit(peer: H2Peer, limit: int) -> None:
    """Change SETTINGS_MAX_CONCURRENT_STREAMS, and wait until the client has taken note."""
    peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: limit})
    await peer.flush()
    await trio.testing.wait_all_tasks_blocked()


async def listen_to_the_end(peer: H2Peer) -> None:
    """Record what the client sends until it closes the connection; neither check nor answer it."""
    while await peer.listen():
        pass


async def ordinary(peer: H2Peer) -> None:
    """Answer every request with its method and body."""
    await peer.start()
    async for stream_id, headers, body in requests(peer):
        await peer.respond(stream_id, body=headers[b":method"] + b" " + body)


def in_turn(*scripts: Serve) -> Serve:
    """Play the first script on the first connection, and so on; there must not be more connections."""
    left: Iterator[Serve] = iter(scripts)

    async def serve(peer: H2Peer) -> None:
        script = next(left, None)
        assert script is not None, "one connection too many"
        await script(peer)

    return serve


def multiplexed(
    script: Callable[[ServerStream], Awaitable[object]], settings: dict[SettingCodes, int] | None = None
) -> Serve:
    """Play a script for each stream of the connection, at the same time."""

    async def serve(peer: H2Peer) -> None:
        await Multiplexer(peer, script).serve(settings)

    return serve


# -- Requests.


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until the condition holds."""
    with trio.fail_after(10):
        while not condition():
            await trio.testing.wait_all_tasks_blocked()


async def fetch(pool: ConnectionPool, method: str = "GET", url: str = URL, **options: Any) -> bytes:
    """Make a request whose response must be 200; return its content."""
    response = await pool.request(method, url, **options)
    assert response.status == 200
    assert response.content is not None
    return response.content


@dataclass(eq=False)
class BackgroundRequest:
    """A request that runs in a task of its own; `scope` cancels it.

    Attributes:
        outcome: The status of its response, or the type of its error; None before it has ended, or if it
            was cancelled.
    """

    url: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    response: Response | None = None
    error: ExchangeError | None = None

    @property
    def outcome(self) -> int | type[ExchangeError] | None:
        if self.response is not None:
            return self.response.status
        return type(self.error) if self.error is not None else None


class BackgroundRequests:
    """Requests that run at the same time, and what has become of them.

    Attributes:
        made: All of them, in the order of their beginning.
        ended: Those that have a response or an error, in the order of their end.
    """

    def __init__(self, pool: ConnectionPool, nursery: trio.Nursery) -> None:
        self.made: list[BackgroundRequest] = []
        self.ended: list[BackgroundRequest] = []
        self._pool = pool
        self._nursery = nursery

    async def make(self, count: int = 1, url: str = URL, **arguments: Any) -> None:
        """Make requests, and wait until nothing more happens."""
        for _ in range(count):
            self.start(url, **arguments)
        await trio.testing.wait_all_tasks_blocked()

    def start(self, url: str = URL, **arguments: Any) -> None:
        """Make a request."""
        self._nursery.start_soon(self._new(url, arguments))

    async def make_here(self, url: str = URL, **arguments: Any) -> None:
        """Make a request in this task, to its end."""
        await self._new(url, arguments)()

    def _new(self, url: str, arguments: dict[str, Any]) -> Callable[[], Awaitable[None]]:
        request = BackgroundRequest(url)
        self.made.append(request)

        async def run() -> None:
            with request.scope:
                try:
                    request.response = await self._pool.request(url=url, **{"method": "GET", **arguments})
                except ExchangeError as exc:
                    request.error = exc
                self.ended.append(request)

        return run

    @property
    def outcomes(self) -> list[int | type[ExchangeError] | None]:
        """The outcomes, in the order of the requests' beginning."""
        return [request.outcome for request in self.made]

    @property
    def statuses(self) -> list[int]:
        return [request.response.status for request in self.ended if request.response is not None]

    @property
    def contents(self) -> list[bytes | None]:
        return [request.response.content for request in self.ended if request.response is not None]

    @property
    def answers(self) -> dict[str, bytes | None]:
        """The content of the response from each URL."""
        return dict(zip(self.order, self.contents, strict=True))

    @property
    def errors(self) -> list[ExchangeError]:
        return [request.error for request in self.ended if request.error is not None]

    @property
    def error_types(self) -> list[type[ExchangeError]]:
        return [type(error) for error in self.errors]

    @property
    def order(self) -> list[str]:
        """The URLs that were answered, in that order."""
        return [request.url for request in self.ended if request.response is not None]


@contextlib.asynccontextmanager
async def background(pool: ConnectionPool) -> AsyncIterator[BackgroundRequests]:
    """Make requests in the background; at the end wait for all of them."""
    async with trio.open_nursery() as nursery:
        yield BackgroundRequests(pool, nursery)


class Paused(Events):
    """A trace handler that waits at an event until it is told to go on.

    Attributes:
        reached: Set at the event.
        go_on: Set it to end the pause, and to have none afterwards.
    """

    def __init__(self, event: str = "http2.send_connection_init.started") -> None:
        super().__init__()
        self.reached = trio.Event()
        self.go_on = trio.Event()
        self._event = event

    async def __call__(self, event: str, info: dict[str, Any]) -> None:
        await super().__call__(event, info)
        if event == self._event:
            self.reached.set()
            await self.go_on.wait()

    async def resume(self) -> None:
        """End the pause, and wait until nothing more happens."""
        self.go_on.set()
        await trio.testing.wait_all_tasks_blocked()
