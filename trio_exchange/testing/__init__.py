"""Tests without a network: an in-memory connector, and scripted servers for its connections.

The script is an async function that is called with a `ScriptedPeer` for every new connection::

    async def serve(peer: ScriptedPeer) -> None:
        async for request in peer:
            await peer.send_response(200, body=b"hello " + request.target)

    async def test_hello() -> None:
        async with trio.open_nursery() as nursery:
            connector = MemoryConnector(nursery, serve)
            async with ConnectionPool(connector=connector, ssl_context=connector.ssl_context) as pool:
                response = await pool.request("GET", "https://example.com/world")
            assert response.content == b"hello /world"

With `MemoryConnector.ssl_context` the peers also accept TLS, for `https` and `wss` URLs of any host. This
needs the package trustme: `pip install trio-exchange[testing]`. Tests without TLS don't need it.

For HTTP/2 the script makes an `HTTP2Peer` of the connection. It may answer requests in any order, and do what
only HTTP/2 has: reset a stream, send GOAWAY, SETTINGS and PING::

    async def serve(connection: ScriptedPeer) -> None:
        peer = HTTP2Peer(connection.stream)
        first, second = await peer.receive_request(), await peer.receive_request()
        await peer.send_response(second, 200, body=b"hello")
        await peer.send_reset(first, ErrorCodes.INTERNAL_ERROR)
        async for request in peer:
            await peer.send_response(request, 404)

    async def test_a_reset() -> None:
        async with trio.open_nursery() as nursery:
            connector = MemoryConnector(nursery, serve, alpn_protocols=["h2"])
            context = connector.ssl_context
            async with ConnectionPool(http2=True, connector=connector, ssl_context=context) as pool:
                ...

For `http` URLs give `http1=False, http2=True` to the pool.

With Trio's `MockClock` such a test is deterministic, and its timeouts take no time. A `ScriptedPeer` and an
`HTTP2Peer` also work on any other Trio stream, such as those that `trio.serve_tcp` passes to its handler.
"""

from ._connector import Dialled, MemoryConnector
from ._http2 import HTTP2Peer
from ._http11 import PeerRequest, ScriptedPeer

__all__ = ["Dialled", "HTTP2Peer", "MemoryConnector", "PeerRequest", "ScriptedPeer"]

# Let tracebacks and pickles name `trio_exchange.testing.PeerRequest`, not the private module that defines it.
for _name in __all__:
    globals()[_name].__module__ = __name__


def __dir__() -> list[str]:
    """List the public names, without the private modules."""
    return [name for name in globals() if name.startswith("__") or name in __all__]
