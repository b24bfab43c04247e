"""What an exchange does in HTTP/1.1 and in HTTP/2 alike."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.harness.certificates import TLS, make_tls
from tests.harness.checks import assert_unharmed
from tests.harness.h2peer import H2Peer, h2_pool
from tests.harness.servers import serve_tcp
from trio_exchange import ConnectionPool, Connector, ReadError, Request
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "http://origin.example/"


async def test_closing_a_response_that_another_task_reads_ends_the_connection() -> None:
    """Else the other task would go on and read the answer to somebody else's request."""
    ours, theirs = socket.socketpair()

    class Paired(Connector):
        async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
            await trio.lowlevel.checkpoint()
            return trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    outcome: list[object] = []

    async def read(stream: AsyncIterator[bytes]) -> None:
        try:
            outcome.append(await anext(stream))
        except ReadError as exc:
            outcome.append(exc)

    with theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        async with ConnectionPool(connector=Paired()) as pool:
            response = await pool.handle_async_request(Request("GET", URL))
            async with trio.open_nursery() as readers:
                readers.start_soon(read, response.aiter_stream())
                await trio.testing.wait_all_tasks_blocked()
                # The kernel has it, and Trio has not told the reader yet.
                theirs.sendall(b"0123456789")
                await response.aclose()
                assert pool.statistics().idle == 0
    assert len(outcome) == 1


async def collect(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


@pytest.mark.parametrize("tls", [None, make_tls()], ids=["plain", "tls"])
@pytest.mark.parametrize("whole", [False, True])
async def test_a_read_that_another_task_ended_by_closing_says_so(
    whole: bool, tls: TLS | None, nursery: trio.Nursery
) -> None:
    """It said that another task had closed a file descriptor."""

    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await peer.receive_some()

    server = await serve_tcp(nursery, serve, tls=None if tls is None else tls.server)
    async with ConnectionPool(None if tls is None else tls.client) as pool:
        response = await pool.handle_async_request(Request("GET", server.url))

        async def read() -> None:
            with pytest.raises(ReadError, match="the response was closed while its body was being read"):
                await (response.aread() if whole else collect(response.aiter_stream()))

        async with trio.open_nursery() as readers:
            readers.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await response.aclose()
        with pytest.raises((ReadError, RuntimeError)):
            await anext(response.aiter_stream())


async def test_an_iteration_that_was_suspended_is_drained_by_another(nursery: trio.Nursery) -> None:
    """As the openai SDK does at the end of a stream of events."""

    async def serve(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc")
            await trio.testing.wait_all_tasks_blocked()
            await peer.send(b"def")

    async with ConnectionPool(connector=MemoryConnector(nursery, serve)) as pool:
        async with pool.stream("GET", URL) as response:
            events = response.aiter_stream()
            assert await anext(events) == b"abc"
            assert [chunk async for chunk in response.aiter_stream()] == [b"def"]
            assert [chunk async for chunk in events] == []
            with pytest.raises(RuntimeError, match="only once"):
                response.aiter_stream()
        assert_unharmed(pool, idle=1)


async def test_two_tasks_that_read_one_body_at_once_are_told(nursery: trio.Nursery) -> None:
    go = trio.Event()

    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        await go.wait()
        await peer.send(b"0123456789")

    async with ConnectionPool(connector=MemoryConnector(nursery, serve)) as pool:
        response = await pool.handle_async_request(Request("GET", URL))
        stream = response.aiter_stream()
        chunks = []

        async def read() -> None:
            chunks.append(await anext(stream))

        async with trio.open_nursery() as readers:
            readers.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError, match="another task is reading"):
                await anext(stream)
            go.set()
        assert chunks == [b"0123456789"]
        await response.aclose()


async def test_a_response_closed_by_another_task_ends_a_read(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """The read waited for ever."""

    async def answer_and_wait(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, end=False)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, answer_and_wait)
    async with pool:
        response = await pool.handle_async_request(Request("GET", "http://a.example"))

        async def read() -> None:
            with pytest.raises(ReadError, match="the response was closed while its body was being read"):
                await response._read_without_checkpoint()

        with trio.fail_after(10):
            async with trio.open_nursery() as readers:
                readers.start_soon(read)
                await wait_all_tasks_blocked()
                await response.aclose()
