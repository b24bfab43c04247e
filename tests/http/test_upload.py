"""Uploads: what iterators may do, and when a connection is used again after one."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.certificates import TLS, make_tls
from tests.harness.checks import assert_unharmed
from tests.harness.h2peer import H2Peer, h2_pool
from tests.harness.peers import respond
from tests.harness.servers import serve_tcp
from tests.harness.streams import Wrapped
from trio_exchange import (
    ConnectionPool,
    ReadError,
    RemoteProtocolError,
    Request,
    Response,
    WriteError,
    WriteTimeout,
)
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "http://origin.example/"


async def _then_wait(first: bytes) -> AsyncIterator[bytes]:
    yield first
    await trio.sleep_forever()


async def test_a_pool_ends_an_upload_whose_response_failed_and_was_never_closed(
    nursery: trio.Nursery,
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n")
        await trio.sleep_forever()

    with trio.fail_after(10):
        async with ConnectionPool(connector=MemoryConnector(nursery, serve)) as pool:
            response = await pool.handle_async_request(Request("POST", URL, content=_then_wait(b"x")))
            with pytest.raises(RemoteProtocolError):
                await anext(response.aiter_stream())


@pytest.mark.parametrize("error", [WriteError("its own"), WriteTimeout("its own")])
async def test_an_iterator_may_raise_what_the_library_raises(
    nursery: trio.Nursery, error: WriteError | WriteTimeout
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        await trio.sleep_forever()

    async def content() -> AsyncIterator[bytes]:
        yield b"x"
        raise error

    with trio.fail_after(10):
        async with ConnectionPool(connector=MemoryConnector(nursery, serve)) as pool:
            with pytest.raises(type(error)) as caught:
                await pool.request("POST", URL, content=content())
    assert caught.value is error


@pytest.mark.parametrize("tls", [None, make_tls()], ids=["tcp", "tls"])
async def test_a_body_that_was_sent_without_waiting_for_100_any_longer_is_sent_whole(
    nursery: trio.Nursery, tls: TLS | None
) -> None:
    content = b"x" * 8_000_000

    async def echo(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        chunk = await peer.receive_chunk()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content))
        while chunk:
            await peer.send(chunk)
            chunk = await peer.receive_chunk()

    server = await serve_tcp(nursery, echo, tls=None if tls is None else tls.server)
    async with ConnectionPool(None if tls is None else tls.client, expect_continue_timeout=0) as pool:
        with trio.fail_after(20):
            response = await pool.request(
                "POST", server.url, content=content, headers={"Expect": "100-continue"}
            )
    assert response.content == content


async def test_a_generator_that_was_only_looked_into_is_closed(nursery: trio.Nursery) -> None:
    closed = False

    class Content:
        async def __aiter__(self) -> AsyncIterator[bytes]:
            nonlocal closed
            try:
                yield b"x"
                yield b"y"
            finally:
                closed = True

    async def refuse(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send_response(417)
        await trio.sleep_forever()

    async with ConnectionPool(connector=MemoryConnector(nursery, refuse)) as pool:
        response = await pool.request("GET", URL, content=Content(), headers={"Expect": "100-continue"})
        assert (response.status, closed) == (417, True)
    gc.collect()


async def test_a_connection_is_not_reused_before_the_bodys_last_chunk_was_sent(
    nursery: trio.Nursery,
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.receive_chunk()
        # Nobody takes the terminating chunk, for which the sender has to wait with this kind of stream.
        await peer.send_response()
        await trio.sleep_forever()

    async def content() -> AsyncIterator[bytes]:
        yield b"x"

    connector = MemoryConnector(nursery, serve, stream_pair=trio.testing.lockstep_stream_pair)
    async with ConnectionPool(connector=connector) as pool:
        await pool.request("POST", URL, content=content())
        assert pool.statistics().idle == 0


async def test_a_connection_on_which_sending_failed_is_not_reused(nursery: trio.Nursery) -> None:
    class Deaf(Wrapped):
        """It accepts nothing, but has an answer."""

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            await trio.lowlevel.checkpoint()
            raise trio.BrokenResourceError

        async def wait_send_all_might_not_block(self) -> None:
            raise NotImplementedError

    async def serve(peer: ScriptedPeer) -> None:
        await peer.send_response(408)
        await trio.sleep_forever()

    def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = trio.testing.memory_stream_pair()
        return Deaf(client), server

    async with ConnectionPool(connector=MemoryConnector(nursery, serve, stream_pair=pair)) as pool:
        assert (await pool.request("GET", URL)).status == 408
        assert pool.statistics().idle == 0


async def test_an_iterator_of_empty_pieces_lets_other_tasks_run(nursery: trio.Nursery) -> None:
    others_ran = False

    async def other() -> None:
        nonlocal others_ran
        others_ran = True

    async def content() -> AsyncIterator[bytes]:
        nursery.start_soon(other)
        for _ in range(10):
            yield b""
        assert others_ran

    async with ConnectionPool(connector=MemoryConnector(nursery, respond)) as pool:
        assert (await pool.request("POST", URL, content=content())).content == b""


async def test_an_iterator_may_close_the_response_to_its_own_request(nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        await trio.sleep_forever()

    responses: list[Response] = []
    closed = trio.Event()

    async def content() -> AsyncIterator[bytes]:
        while not responses:
            yield b"x"
        await responses[0].aclose()
        closed.set()
        yield b"y"

    async with ConnectionPool(connector=MemoryConnector(nursery, serve)) as pool:
        responses.append(await pool.handle_async_request(Request("POST", URL, content=content())))
        with pytest.raises(ReadError), trio.fail_after(10):
            await responses[0].aread()
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
    assert not closed.is_set()


@pytest.mark.parametrize("method", ["GET", "DELETE", "POST"])
async def test_a_generator_with_a_cancel_scope_around_its_yields_runs_in_one_task(
    method: str, nursery: trio.Nursery
) -> None:
    async def content() -> AsyncIterator[bytes]:
        with trio.fail_after(5):
            yield b"one "
            await trio.lowlevel.checkpoint()
            yield b"two"

    bodies = []

    async def answer(peer: ScriptedPeer) -> None:
        async for request in peer:
            bodies.append(request.body)
            await peer.send_response()

    async with ConnectionPool(connector=MemoryConnector(nursery, answer)) as pool:
        for _ in range(2):
            assert (await pool.request(method, "http://example.com/", content=content())).status == 200
    assert bodies == [b"one two"] * 2


async def serve_http2(peer: H2Peer) -> None:
    """Answer every request until the client closes."""
    await peer.start()
    while True:
        try:
            stream_id, _, _ = await peer.request()
        except EOFError:
            return
        await peer.respond(stream_id)


@pytest.mark.parametrize("how", ["end of the block", "aclose"])
async def test_an_iterator_that_goes_on_after_its_last_byte_does_not_hold_the_pool(
    nursery: trio.Nursery, autojump_clock: MockClock, how: str
) -> None:
    """Leaving the pool waited for it for ever."""
    ended = trio.Event()

    async def content() -> AsyncIterator[bytes]:
        try:
            yield b"all"
            await trio.sleep_forever()
        finally:
            ended.set()

    pool, _ = h2_pool(nursery, serve_http2)
    async with pool:
        request = Request("POST", "http://a.example", headers={"Content-Length": "3"}, content=content())
        response = await pool.handle_async_request(request)
        assert response.status == 200
        assert not ended.is_set()
        if how == "aclose":
            await pool.aclose()
    assert ended.is_set()
    await response.aclose()


async def test_pieces_that_are_taken_at_once_share_a_turn(nursery: trio.Nursery) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async def content() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield b"x" * 1024
        measured.append(turns - before)

    server = await serve_tcp(nursery, respond)
    measured: list[int] = []
    async with ConnectionPool() as pool:
        await pool.request("GET", server.url)
        nursery.start_soon(count)
        before = turns
        response = await pool.request("POST", server.url, content=content())
        assert len(response.content) == 160 * 1024
    # Each piece counts as 32 KiB more, and other tasks run after 256 KiB.
    assert 16 <= measured[0] <= 30
    nursery.cancel_scope.cancel()
