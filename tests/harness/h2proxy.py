"""A proxy that speaks HTTP/2, and origins behind its tunnels."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from h2.settings import SettingCodes

from tests.harness.certificates import alpn_server, client_context, make_tls
from tests.harness.h2server import Multiplexer, ServerStream
from trio_exchange import ConnectionPool, Proxy
from trio_exchange.testing import MemoryConnector, ScriptedPeer

StreamScript = Callable[[ServerStream], Awaitable[object]]


LARGE = bytes(range(256)) * 4000


class H2Proxy:
    """A proxy that speaks HTTP/2 over TLS, and the network, which leads to nobody else.

    Args:
        nursery: In which it runs.
        script: Plays each request.
        settings: That its connections begin with.
        then: Those that follow at once.

    Attributes:
        connector: For the pool.
        script: As given.
        connections: In the order of their beginning.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        script: StreamScript,
        settings: dict[SettingCodes, int] | None = None,
        then: dict[SettingCodes, int] | None = None,
    ) -> None:
        self.connector = MemoryConnector(nursery, self._serve)
        self.script = script
        self.connections: list[Multiplexer] = []
        self._settings = settings
        self._then = then

    async def _serve(self, peer: ScriptedPeer) -> None:
        await peer.start_tls(alpn_server("h2", "http/1.1"))
        await self.serve(peer.stream)

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve a connection whose TLS has been done."""
        connection = Multiplexer(stream, lambda stream: self.script(stream))
        self.connections.append(connection)
        await connection.serve(self._settings, self._then)

    @property
    def streams(self) -> list[ServerStream]:
        """All that were opened."""
        return [stream for connection in self.connections for stream in connection.streams.values()]

    def pool(self, **options: Any) -> ConnectionPool:
        """A pool that has this proxy, if no other is given."""
        options.setdefault("proxy", multiplexing())
        return ConnectionPool(client_context(make_tls().ca), connector=self.connector, **options)


def multiplexing(host: str = "proxy.example", **options: Any) -> Proxy:
    return Proxy(f"https://{host}", ssl_context=client_context(make_tls().ca), http2=True, **options)


async def accept_tunnel(stream: ServerStream) -> None:
    """Accept, and be the origin; one whose name begins with h2 speaks HTTP/2."""
    await stream.respond(200)
    peer = ScriptedPeer(stream)
    http2 = stream.headers[b":authority"].startswith(b"h2")
    await peer.start_tls(alpn_server("h2") if http2 else alpn_server())
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
