"""Scripts of proxies that speak HTTP/1.1, and connections in memory to them."""

from __future__ import annotations

import functools
from typing import Any

import trio
import trio.testing

from tests.harness.certificates import TLS, make_tls, new_tls
from tests.harness.peers import Script
from trio_exchange import ConnectionPool, Proxy
from trio_exchange.testing import MemoryConnector, PeerRequest, ScriptedPeer

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


SECURE_PROXY = "https://proxy.example:3129"


PROXY = "http://proxy.example:3128"


@functools.cache
def proxy_tls() -> TLS:
    """Certificates of proxies, by an authority that no origin's is trusted for."""
    return new_tls("proxy.example", "second.example", "127.0.0.1")


def secure_proxy(url: str = SECURE_PROXY, **more: Any) -> Proxy:
    return Proxy(url, ssl_context=proxy_tls().client, **more)


def proxied(then: Script, *, seen: list[PeerRequest] | None = None, tls: bool = False) -> Script:
    """A proxy that grants every tunnel, in which `then` is played, and answers everything else itself."""

    async def script(peer: ScriptedPeer) -> None:
        if tls:
            await peer.start_tls(proxy_tls().server)
        async for request in peer:
            if seen is not None:
                seen.append(request)
            if request.method == b"CONNECT":
                await peer.send(ESTABLISHED)
                await then(peer)
                return
            await peer.send_response(200, body=request.target + request.body)

    return script


def secured(then: Script) -> Script:
    """An origin with TLS."""

    async def script(peer: ScriptedPeer) -> None:
        await peer.start_tls(make_tls().server)
        await then(peer)

    return script


class Net:
    """Connections in memory that lead to a script, and how many of them the client has open."""

    def __init__(self, nursery: trio.Nursery, script: Script) -> None:
        self.connector = MemoryConnector(nursery, script, stream_pair=self._pair)
        self._open: set[object] = set()

    @property
    def open(self) -> int:
        return len(self._open)

    def _pair(self) -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = trio.testing.memory_stream_pair()
        tell_peer: Any = client.send_stream.close_hook

        def closed() -> None:
            self._open.discard(client)
            tell_peer()

        client.send_stream.close_hook = closed
        self._open.add(client)
        return client, server

    def pool(self, *proxies: Proxy | str, **options: Any) -> ConnectionPool:
        chain = [Proxy(proxy) if isinstance(proxy, str) else proxy for proxy in proxies or (PROXY,)]
        return ConnectionPool(make_tls().client, proxy=chain, connector=self.connector, **options)
