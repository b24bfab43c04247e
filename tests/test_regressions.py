"""Ways in which servers, iterators and callbacks once broke a promise."""

from __future__ import annotations

import gc
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from tests.harness.certificates import TLS, make_tls
from tests.harness.checks import assert_unharmed
from tests.harness.peers import respond
from tests.harness.servers import serve_tcp
from tests.harness.streams import Wrapped
from trio_exchange import (
    ConnectionPool,
    Connector,
    ReadError,
    RemoteProtocolError,
    Request,
    Response,
    WriteError,
    WriteTimeout,
)
from trio_exchange._connect.transport import Transport
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "http://origin.example/"


async def _then_wait(first: bytes) -> AsyncIterator[bytes]:
    yield first
    await trio.sleep_forever()


# -- Uploads.


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


# -- Answers.


@pytest.mark.parametrize("byte_by_byte", [False, True])
@pytest.mark.parametrize("informed", [b"", b"HTTP/1.1 102 Processing\r\n\r\n"])
@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/2.0 200 OK\r\n", b"HELO", b"\x15\x03\x01\x00"]
)
async def test_what_is_not_http_is_refused_without_waiting_for_its_end(
    nursery: trio.Nursery, answer: bytes, informed: bytes, byte_by_byte: bool
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(informed + answer, byte_by_byte=byte_by_byte)
        await trio.sleep_forever()

    async with ConnectionPool(connector=MemoryConnector(nursery, serve)) as pool:
        with pytest.raises(RemoteProtocolError), trio.fail_after(10):
            await pool.request("GET", URL)


# -- Callbacks.


@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_a_trace_handlers_network_error_does_not_repeat_the_request(
    nursery: trio.Nursery, method: str
) -> None:
    seen = []

    async def serve(peer: ScriptedPeer) -> None:
        async for request in peer:
            if request.target == b"/dies":
                return
            seen.append(request.method)
            await peer.send_response()

    async def handler(event: str, info: dict[str, Any]) -> None:
        if event == "http11.receive_response_headers.started":
            await pool.request("GET", "http://other.example/dies")

    async with ConnectionPool(connector=MemoryConnector(nursery, serve)) as pool:
        await pool.request("GET", URL)
        with pytest.raises(RemoteProtocolError, match="without sending a response"):
            await pool.request(method, URL, content=b"once", extensions={"trace": handler})
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
    assert seen.count(method.encode()) <= 1


# -- Several tasks on one response.


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


def test_a_transport_left_to_garbage_collection_closes_its_descriptor_once() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            transport = Transport(stream)
            assert "SocketStream" in repr(transport)
            del transport
            gc.collect()
            await stream.send_all(b"still open")
            assert theirs.recv(100) == b"still open"
            await stream.aclose()

    trio.run(main)
