"""Scripts of proxies that speak HTTP/1.1 or SOCKS, the network that leads to them, and pools behind them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import pytest
import trio
import trio.testing

from tests.harness.certificates import TLS, make_tls, new_tls
from tests.harness.checks import assert_unharmed
from tests.harness.peers import Script, respond
from tests.harness.streams import TrackedStream
from tests.harness.traces import Events
from trio_exchange import ConnectionPool, ExchangeError, Proxy, ProxyError
from trio_exchange.testing import MemoryConnector, PeerRequest, ScriptedPeer

ORIGIN = "https://example.com/"
PROXY = "http://proxy.example:3128"
SECURE_PROXY = "https://proxy.example:3129"

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"

#: Called by a peer before each of its steps, with the step's name; the step is as slow as the call.
Pace: TypeAlias = Callable[[str], Awaitable[object]]


async def at_once(_: str) -> None:
    """The pace of peers that do not wait."""


@functools.cache
def proxy_tls() -> TLS:
    """Certificates of proxies, by an authority that no origin's is trusted for."""
    return new_tls("proxy.example", "second.example", "127.0.0.1")


def secure_proxy(url: str = SECURE_PROXY, **more: Any) -> Proxy:
    return Proxy(url, ssl_context=proxy_tls().client, **more)


# -- Scripts.


def proxied(
    then: Script, *, seen: list[PeerRequest] | None = None, tls: bool = False, pace: Pace = at_once
) -> Script:
    """A proxy that grants every tunnel, in which `then` is played, and answers everything else itself."""

    async def script(peer: ScriptedPeer) -> None:
        if tls:
            await pace("TLS with the proxy")
            await peer.start_tls(proxy_tls().server)
        async for request in peer:
            if seen is not None:
                seen.append(request)
            if request.method == b"CONNECT":
                await pace("the proxy's answer")
                await peer.send(ESTABLISHED)
                await then(peer)
                return
            await peer.send_response(200, body=request.target + request.body)

    return script


async def expect(peer: ScriptedPeer, expected: bytes) -> None:
    """Receive exactly these bytes, unless the client has gone: then the script ends."""
    received = b""
    while len(received) < len(expected):
        data = await peer.receive_some(len(expected) - len(received))
        if not (data or received):
            raise trio.BrokenResourceError("the client has gone")
        assert expected.startswith(received + data), (expected, received, data)
        assert data, "the client has gone in the middle of a message"
        received += data


def socks(
    *talk: tuple[bytes, bytes], then: Script = respond, byte_by_byte: bool = False, pace: Pace = at_once
) -> Script:
    """A SOCKS proxy that is told exactly this, and answers so; after that, `then` is played."""

    async def script(peer: ScriptedPeer) -> None:
        for number, (request, reply) in enumerate(talk, 1):
            await expect(peer, request)
            await pace(f"reply {number}")
            await peer.send(reply, byte_by_byte=byte_by_byte)
        await then(peer)

    return script


def secured(then: Script, *, pace: Pace = at_once) -> Script:
    """An origin with TLS."""

    async def script(peer: ScriptedPeer) -> None:
        await pace("TLS with the origin")
        await peer.start_tls(make_tls().server)
        await then(peer)

    return script


def in_turn(*scripts: Script) -> Script:
    """Every connection gets the next script."""
    left = iter(scripts)

    async def script(peer: ScriptedPeer) -> None:
        await next(left)(peer)

    return script


def noting(seen: list[PeerRequest]) -> Script:
    """An origin that keeps what it is asked, and answers as `respond` does."""

    async def script(peer: ScriptedPeer) -> None:
        async for request in peer:
            seen.append(request)
            await peer.send_response(200, body=request.body)

    return script


# -- The network.


class Net(MemoryConnector):
    """Connections in memory that lead to a script, all of which the client has to close.

    Args:
        nursery: For the script.
        script: Played on every connection.
        pace: Also that of dialling.
        wrap: Makes the client's end of a connection of a stream in memory.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        script: Script,
        *,
        pace: Pace = at_once,
        wrap: Callable[[Any], TrackedStream] = TrackedStream,
    ) -> None:
        super().__init__(nursery, script, stream_pair=self._pair)
        self.streams: list[TrackedStream] = []
        self._pace = pace
        self._wrap = wrap

    def _pair(self) -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = trio.testing.memory_stream_pair()
        self.streams.append(self._wrap(client))
        return self.streams[-1], server

    async def connect_tcp(self, *args: Any, **options: Any) -> trio.abc.Stream:
        await self._pace("dialling")
        return await super().connect_tcp(*args, **options)

    @property
    def open(self) -> int:
        """How many connections the client has open."""
        return sum(not stream.closed for stream in self.streams)

    @contextlib.asynccontextmanager
    async def pool(self, *proxies: Proxy | str, **options: Any) -> AsyncIterator[ConnectionPool]:
        """Enter a pool behind these proxies, or else `PROXY`; it leaves no connection open."""
        chain = [Proxy(proxy) if isinstance(proxy, str) else proxy for proxy in proxies or (PROXY,)]
        async with ConnectionPool(make_tls().client, proxy=chain, connector=self, **options) as pool:
            yield pool
        assert self.open == 0

    def assert_settled(self, pool: ConnectionPool, *, idle: int = 0) -> None:
        """The pool has no connection but `idle` ones, each on one to the proxy, and nothing under way."""
        assert_unharmed(pool, idle=idle)
        assert self.open == idle

    async def settles(self, pool: ConnectionPool, *, tunnels: int = 0, forwarding: int = 0) -> None:
        """As `assert_settled`, once every closing has been done; what goes through tunnels is counted too."""
        await trio.testing.wait_all_tasks_blocked()
        self.assert_settled(pool, idle=tunnels + forwarding)
        for manager in pool._managers[1:]:
            assert len(list(manager)) == tunnels


# -- What holds wherever a tunnel is not granted.

USER, PASSWORD = "aladdin", "hunter2"
#: Those in an HTTP header and in the user name and password of SOCKS, as bytes that a log could show.
SECRETS = (PASSWORD, "YWxhZGRpbjpodW50ZXIy", b"YWxhZGRpbjpodW50ZXIy".hex(), PASSWORD.encode().hex())


def assert_no_secrets(*shown: object) -> None:
    """Neither the text of anything shown has a password in it, nor its representation."""
    for value in shown:
        for secret in SECRETS:
            assert secret not in str(value)
            assert secret not in repr(value)


async def fail(
    net: Net,
    *proxies: Proxy | str,
    url: str = ORIGIN,
    error: type[ExchangeError] = ProxyError,
    next_url: str | None = None,
    **options: Any,
) -> Any:
    """Let a request fail on the way to its origin, and check that it does no harm.

    The pool has one slot. The first connection fails, without a second attempt; the next one, which a second
    request needs, does not. What is traced ends with the failure, and shows no credentials.

    Args:
        net: Where the proxies are.
        proxies: The pool's.
        url: Of the first request.
        error: Its exact type.
        next_url: Of the second request, if it is another.
        options: The pool's. What a proxy refuses is not tried again, whatever the number of retries.

    Returns:
        The error.
    """
    trace = Events()
    options.setdefault("retries", 3 if error is ProxyError else 0)
    async with net.pool(*proxies, max_connections=1, **options) as pool:
        with pytest.raises(error) as info:
            await pool.request("GET", url, extensions={"trace": trace})
        assert type(info.value) is error
        event, told = trace.seen[-1]
        assert event.endswith(".failed")
        # What is raised may be a copy, which refers to fewer frames.
        assert {name: repr(value) for name, value in told.items()} == {"exception": repr(info.value)}
        assert_no_secrets(info.value, trace.seen, pool, pool.connections)
        if all(isinstance(proxy, Proxy) and proxy.url.scheme.startswith(b"socks") for proxy in proxies):
            net.assert_settled(pool)
        await net.settles(pool)
        assert len(net.dialled) == 1
        assert (await pool.request("POST", next_url or url, content=b"next")).content.endswith(b"next")
        assert len(net.dialled) == 2
        if url.startswith("http:"):
            await trio.testing.wait_all_tasks_blocked()
            net.assert_settled(pool, idle=1)
        else:
            await net.settles(pool, tunnels=1)
    return info.value
