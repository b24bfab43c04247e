"""A proxy that speaks HTTP/2, and origins behind its tunnels."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from h2.settings import SettingCodes

from tests.harness.certificates import alpn_server, client_context, make_tls
from tests.harness.h2link import memory_server
from tests.harness.h2server import Multiplexer, ServerStream
from trio_exchange import ConnectionPool, Proxy
from trio_exchange.testing import MemoryConnector, ScriptedPeer

StreamScript = Callable[[ServerStream], Awaitable[object]]


LARGE = bytes(range(256)) * 4000


class H2Proxy:
    """The script of a proxy that speaks HTTP/2 over TLS.

    Args:
        scripts: One for each request in the order of their arrival, the last one for all others.
        settings: That its connections begin with.
        then: Those that follow at once.

    Attributes:
        connector: The pool's connector, which leads to this proxy alone.
        connections: In the order of their beginning.
    """

    connector: MemoryConnector

    def __init__(
        self,
        *scripts: StreamScript,
        settings: dict[SettingCodes, int] | None = None,
        then: dict[SettingCodes, int] | None = None,
    ) -> None:
        self.connections: list[Multiplexer] = []
        self._scripts = list(scripts)
        self._settings = settings
        self._then = then

    async def __call__(self, peer: ScriptedPeer) -> None:
        """Serve a connection, TLS included."""
        await peer.start_tls(alpn_server("h2", "http/1.1"))
        connection = Multiplexer(peer.stream, self._play)
        self.connections.append(connection)
        await connection.serve(self._settings, self._then)

    async def _play(self, stream: ServerStream) -> None:
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        await script(stream)

    @property
    def streams(self) -> list[ServerStream]:
        """All that were opened."""
        return [stream for connection in self.connections for stream in connection.streams.values()]

    @property
    def streams_of_each(self) -> list[int]:
        """How many were opened on each connection."""
        return [len(connection.streams) for connection in self.connections]

    def sent(self, kind: type[Any]) -> list[Any]:
        """The frames of a type that the client has sent on the first connection."""
        return self.connections[0].peer.sent(kind)


@contextlib.asynccontextmanager
async def h2_proxy(
    *scripts: StreamScript,
    settings: dict[SettingCodes, int] | None = None,
    then: dict[SettingCodes, int] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[ConnectionPool, H2Proxy]]:
    """Enter a pool whose connections, in memory, lead to an HTTP/2 proxy.

    Args:
        scripts: As of `H2Proxy`.
        settings: As of `H2Proxy`.
        then: As of `H2Proxy`.
        options: The options of the pool.
    """
    proxy = H2Proxy(*scripts, settings=settings, then=then)
    async with memory_server(proxy, **{"proxy": multiplexing(), **options}) as (pool, proxy.connector):
        yield pool, proxy


def multiplexing(host: str = "proxy.example", **options: Any) -> Proxy:
    return Proxy(f"https://{host}", ssl_context=client_context(make_tls().ca), http2=True, **options)


async def accept_tls(stream: ServerStream, *protocols: str) -> ScriptedPeer:
    """Accept a tunnel; return the origin behind it, after its TLS handshake."""
    await stream.respond(200)
    peer = ScriptedPeer(stream)
    await peer.start_tls(alpn_server(*protocols))
    return peer


async def accept_tunnel(stream: ServerStream) -> None:
    """Accept, and be the origin; one whose name begins with h2 speaks HTTP/2."""
    http2 = stream.headers[b":authority"].startswith(b"h2")
    peer = await accept_tls(stream, *(["h2"] if http2 else []))
    if http2:
        await Multiplexer(peer.stream, naming_origin2).serve()
    else:
        await naming_origin(peer, stream.headers[b":authority"])


async def naming_origin(peer: ScriptedPeer, name: bytes = b"") -> None:
    """A server of HTTP/1.1, which tells its name, or how much it was sent."""
    async for request in peer:
        body = b"%d" % len(request.body) if request.body else name
        await peer.send_response(body=LARGE if request.target == b"/large" else body)


async def naming_origin2(stream: ServerStream) -> None:
    """The same in HTTP/2."""
    size = 0
    while data := await stream.receive_some():
        size += len(data)
    await stream.respond(200)
    await stream.send_all(b"%d" % size if size else stream.headers[b":authority"] + b":443")
