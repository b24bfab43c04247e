"""One place to make pools: over streams in memory, and over sockets on loopback."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio
import trio.testing

from tests.harness.certificates import make_tls
from tests.harness.peers import Script, respond
from tests.harness.servers import Server, serve_tcp
from trio_exchange import ConnectionPool
from trio_exchange.testing import MemoryConnector


class Network(MemoryConnector):
    """The connector of pools whose connections all lead to the same scripted peer, in memory.

    Args:
        nursery: For the peers.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery, lambda peer: self._script(peer), stream_pair=lambda: self._make_pair())
        self._script: Script = respond
        self._make_pair: Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]]

    def pool(
        self,
        script: Script = respond,
        *,
        wrap: Callable[[Any], trio.abc.Stream] | None = None,
        pair: Callable[[], tuple[Any, Any]] = trio.testing.memory_stream_pair,
        lockstep: bool = False,
        **options: Any,
    ) -> ConnectionPool:
        """Make a pool, which trusts the authority of `make_tls`.

        Args:
            script: What the peer of every connection plays from now on.
            wrap: Called with the client's end of a new connection; returns the stream that the pool gets.
            pair: Makes the two ends of a connection.
            lockstep: Whether sending waits until the other end receives.
            options: For the pool.
        """
        make_pair = trio.testing.lockstep_stream_pair if lockstep else pair

        def wrapped_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
            client, server = make_pair()
            return client if wrap is None else wrap(client), server

        self._script, self._make_pair = script, wrapped_pair
        return ConnectionPool(**{"ssl_context": make_tls().client, "connector": self, **options})


class Sockets:
    """Pools and the servers on loopback that they lead to.

    Args:
        nursery: For the servers.
        tls: The settings of the servers, if they speak TLS.

    Attributes:
        server: The server of the pool that was made last.
    """

    server: Server

    def __init__(self, nursery: trio.Nursery, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self._nursery = nursery

    @property
    def url(self) -> str:
        """The server's."""
        return self.server.url

    @contextlib.asynccontextmanager
    async def pool(self, script: Script = respond, **options: Any) -> AsyncIterator[ConnectionPool]:
        """Start a server that plays `script`, and enter a pool that trusts the authority of `make_tls`."""
        self.server = await serve_tcp(self._nursery, script, tls=self.tls)
        async with ConnectionPool(**{"ssl_context": make_tls().client, **options}) as pool:
            yield pool
