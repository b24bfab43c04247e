"""HTTP/2 with a scripted peer."""

import pytest
import trio

from tests.h2peer import H2Peer, h2_pool


async def test_a_get(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, headers, body = await peer.request()
        assert headers == {
            b":method": b"GET",
            b":authority": b"example.com",
            b":scheme": b"http",
            b":path": b"/a?b",
        }
        assert body == b""
        await peer.respond(stream_id, 200, [(b"x", b"y")], b"hello", trailers=[(b"t", b"u")])
        await peer.until_closed()

    async with trio.open_nursery() as nursery:
        pool, connector = h2_pool(nursery, serve)
        async with pool:
            response = await pool.request("GET", "http://example.com/a?b")
            assert response.status == 200
            assert response.headers == [(b"x", b"y")]
            assert response.content == b"hello"
            assert response.extensions["trailing_headers"] == [(b"t", b"u")]
            assert response.extensions["http_version"] == b"HTTP/2"
            assert response.extensions["stream_id"] == 1
            assert "reason_phrase" not in response.extensions
        assert len(connector.dialled) == 1
