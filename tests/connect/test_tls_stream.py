"""`TLSStream`: the same TLS as that of the `trio.SSLStream` below, with fewer steps."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.harness.certificates import make_tls
from tests.harness.checks import assert_unharmed, internals
from tests.harness.layers import TLSServer, a_client
from tests.harness.peers import respond
from tests.harness.servers import serve_tcp
from tests.harness.streams import clog, socket_streams
from trio_exchange import ConnectionPool
from trio_exchange._connect import trio_internals
from trio_exchange._connect.network_stream import transport_over
from trio_exchange._connect.tls import TLSSettings, start_tls
from trio_exchange._connect.tls_stream import TLSStream
from trio_exchange._connect.transport import Readiness, WouldBlock

QUIET, READABLE = Readiness.QUIET, Readiness.READABLE


@contextlib.asynccontextmanager
async def linked(*, sockets: bool = True) -> AsyncIterator[tuple[TLSStream, TLSServer]]:
    """A stream and its server, which has sent its session tickets."""
    near, far = socket_streams() if sockets else trio.testing.memory_stream_pair()
    server = TLSServer(far)
    streams: list[TLSStream] = []

    async def connect() -> None:
        settings = TLSSettings(a_client(), "example.com", ("http/1.1",), "example.com")
        streams.append(await start_tls(transport_over(near), settings))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect)
        await server.handshake()
    await server.flush()
    with trio.fail_after(10):
        try:
            yield streams[0], server
        finally:
            await trio.aclose_forcefully(streams[0])
            await trio.aclose_forcefully(server)


SOCKETS = pytest.mark.parametrize("sockets", [True, False], ids=["sockets", "memory"])


def internals_of(stream: TLSStream) -> Any:
    return stream._internals


# -- Receiving.


@SOCKETS
async def test_all_records_that_have_arrived_come_at_once(sockets: bool) -> None:
    async with linked(sockets=sockets) as (stream, server):
        for number in range(5):
            server.ssl.write(bytes([number]) * 1000)
        await server.flush()
        with trio.testing.assert_checkpoints():
            data = await stream.receive_some()
        assert data == b"".join(bytes([number]) * 1000 for number in range(5))
        assert stream.peek() is QUIET


async def test_what_is_larger_than_asked_for_comes_in_parts() -> None:
    async with linked() as (stream, server):
        server.ssl.write(b"a" * 10)
        server.ssl.write(b"b" * 10)
        await server.flush()
        assert await stream.receive_some(7) == b"a" * 7
        assert stream.peek() is READABLE
        assert await stream.receive_some(7) == b"a" * 3
        assert stream.peek() is READABLE
        assert await stream.receive_some(10) == b"b" * 10
        assert stream.peek() is QUIET


@pytest.mark.parametrize("waits", [0, 8])
async def test_a_record_in_two_parts(waits: int) -> None:
    async with linked() as (stream, server):
        stream._waits = waits
        server.ssl.write(b"x" * 1000)
        record = server.take()
        await server.stream.send_all(record[:500])

        async def send_the_rest() -> None:
            await trio.testing.wait_all_tasks_blocked()
            await server.stream.send_all(record[500:])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_the_rest)
            assert await stream.receive_some() == b"x" * 1000


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with linked() as (stream, server):
        for waits in (0, 8):
            stream._waits = waits
            with trio.CancelScope() as scope:
                scope.cancel()
                await stream.receive_some()
            assert scope.cancelled_caught
        await server.send_all(b"abc")
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.receive_some()
        assert await stream.receive_some() == b"abc"


async def close_notify(server: TLSServer) -> None:
    server.say_goodbye()
    await server.flush()


async def cut(server: TLSServer) -> None:
    await server.stream.aclose()


@pytest.mark.parametrize("end", [close_notify, cut])
@pytest.mark.parametrize("waits", [0, 8])
async def test_the_end_comes_after_the_data(end: Callable[[TLSServer], Any], waits: int) -> None:
    async with linked() as (stream, server):
        stream._waits = waits
        server.ssl.write(b"abc")
        await server.flush()
        await end(server)
        await trio.testing.wait_all_tasks_blocked()
        assert await stream.receive_some() == b"abc"
        assert stream.peek() is not QUIET
        for _ in range(2):
            assert await stream.receive_some() == b""


async def test_what_comes_after_the_data_is_not_forgotten() -> None:
    async with linked() as (stream, server):
        server.ssl.write(b"abc")
        server.say_goodbye()
        await server.flush()
        assert await stream.receive_some() == b"abc"
        assert stream.peek() is READABLE
        stream.trio_stream.transport_stream.probing = 8
        assert await stream.receive_some() == b""


async def test_an_error_comes_after_the_data() -> None:
    async with linked() as (stream, server):
        server.ssl.write(b"abc")
        await server.stream.send_all(server.take() + b"\x17\x03\x03\x00\x20" + b"x" * 32)
        assert await stream.receive_some() == b"abc"
        assert stream.peek() is READABLE
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError) as info:
                await stream.receive_some()
            assert isinstance(info.value.__cause__, ssl.SSLError)


async def test_a_probe_waits_for_nothing() -> None:
    async with linked() as (stream, server):
        transport = stream.trio_stream.transport_stream
        for _ in range(2):
            transport.probing = 8
            with pytest.raises(WouldBlock):
                await stream.receive_some()
        for number in b"ab":
            server.ssl.write(bytes([number]))
        await server.flush()
        transport.probing = 8
        assert await stream.receive_some() == b"a"
        transport.probing = 0
        assert stream.peek() is READABLE
        assert await stream.receive_some() == b"b"


# -- Sending, and both at once.


@SOCKETS
async def test_sending(sockets: bool) -> None:
    async with linked(sockets=sockets) as (stream, server):
        for data in (b"abc", bytearray(b"def"), memoryview(b"ghi")):
            await stream.send_all(data)
            assert await server.receive_some() == data
        await stream.send_all(b"")
        await stream.wait_send_all_might_not_block()


async def test_sending_what_the_kernel_takes_at_once_is_no_checkpoint() -> None:
    async with linked() as (stream, server):
        with trio.testing.assert_no_checkpoints():
            await stream.send_all(b"abc")
        assert await server.receive_some() == b"abc"


async def receive(server: TLSServer, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await server.receive_some()
    return data


async def test_sending_more_than_the_kernel_takes_at_once() -> None:
    data = bytes(range(256)) * 8192
    received = []
    async with linked() as (stream, server), trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        await trio.testing.wait_all_tasks_blocked()
        # Another task receives meanwhile.
        await server.send_all(b"abc")
        assert await stream.receive_some() == b"abc"
        received.append(await receive(server, len(data)))
    assert received == [data]


async def test_after_a_cancelled_send_nothing_more_is_sent() -> None:
    async with linked() as (stream, _):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(2**24))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"more")


@SOCKETS
@pytest.mark.parametrize("waits", [0, 8])
async def test_what_tls_answers_itself_is_sent(sockets: bool, waits: int) -> None:
    async with linked(sockets=sockets) as (stream, server):
        stream._waits = waits
        server.ssl.verify_client_post_handshake()
        server.ssl.do_handshake()
        await server.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_some)
            with pytest.raises(ssl.SSLWantReadError):
                await server.read_once()
            assert server.ssl.getpeercert() is None
            await server.send_all(b"abc")


async def test_an_answer_waits_while_another_task_is_sending() -> None:
    async with linked() as (stream, server), trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, bytes(2**22))
        await trio.testing.wait_all_tasks_blocked()
        server.ssl.verify_client_post_handshake()
        server.ssl.do_handshake()
        server.ssl.write(b"abc")
        await server.flush()
        assert await stream.receive_some() == b"abc"
        assert internals_of(stream).outgoing.pending
        assert await receive(server, 2**22) == bytes(2**22)
        nursery.start_soon(stream.receive_some)
        with pytest.raises(ssl.SSLWantReadError):
            await server.read_once()
        assert not internals_of(stream).outgoing.pending
        await server.send_all(b"abc")


async def test_a_failed_send_is_deferred() -> None:
    async with linked() as (stream, server):
        transport = stream.trio_stream.transport_stream
        await server.stream.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"abc")
        assert transport.send_error is None
        transport.defer_errors = True
        await stream.send_all(b"abc")
        assert transport.send_error is not None


async def test_a_closed_stream() -> None:
    async with linked() as (stream, _):
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"abc")
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()


@SOCKETS
async def test_closing_a_socket_is_no_checkpoint(sockets: bool) -> None:
    async with linked(sockets=sockets) as (stream, _):
        with trio.testing.assert_no_checkpoints():
            assert stream.close_nowait() == sockets
        if not sockets:
            await stream.send_all(b"still open")
            return
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"abc")
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()
        with pytest.raises(trio.ClosedResourceError):
            await stream.trio_stream.receive_some()


# -- What is left to Trio's stream.


class Renegotiating:
    """An `ssl.SSLObject` whose write has to wait for a handshake at first, or fails."""

    def __init__(self, inner: Any, error: ssl.SSLError) -> None:
        self._inner = inner
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, data: bytes) -> int:
        raise self._error


async def test_sending_during_a_renegotiation_leaves_it_to_trio() -> None:
    async with linked() as (stream, server):
        shared = internals_of(stream)
        shared.ssl_object = Renegotiating(shared.ssl_object, ssl.SSLWantReadError())
        await stream.send_all(b"abc")
        assert await server.receive_some() == b"abc"


@pytest.mark.parametrize("cancelled", [True, False])
async def test_sending_during_a_renegotiation_waits_for_the_task_that_receives(cancelled: bool) -> None:
    async with linked() as (stream, server), trio.open_nursery() as nursery:
        shared = internals_of(stream)
        shared.ssl_object = Renegotiating(shared.ssl_object, ssl.SSLWantReadError())
        receiving = trio.CancelScope()

        async def receive() -> None:
            with receiving:
                assert await stream.receive_some() == b"def"

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(stream.send_all, b"abc")
        await trio.testing.wait_all_tasks_blocked()
        if cancelled:
            receiving.cancel()
        else:
            await server.send_all(b"def")
        assert await server.receive_some() == b"abc"


async def test_an_error_of_encrypting() -> None:
    async with linked() as (stream, _):
        shared = internals_of(stream)
        shared.ssl_object = Renegotiating(shared.ssl_object, ssl.SSLError("no"))
        with pytest.raises(trio.BrokenResourceError) as info:
            await stream.send_all(b"abc")
        assert isinstance(info.value.__cause__, ssl.SSLError)


@pytest.mark.parametrize("waits", [0, 8])
async def test_receiving_while_trios_stream_receives(waits: int) -> None:
    async with linked() as (stream, server), trio.open_nursery() as nursery:
        stream._waits = waits
        holding = trio.Event()

        async def hold() -> None:
            async with internals_of(stream).receive_lock:
                await holding.wait()

        nursery.start_soon(hold)
        await trio.testing.wait_all_tasks_blocked()

        async def receive() -> None:
            assert await stream.receive_some() == b"abc"

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        holding.set()
        await server.send_all(b"abc")


async def test_trios_stream_goes_on_where_this_one_stops() -> None:
    async with linked() as (stream, server):
        server.ssl.write(b"abc")
        server.ssl.write(b"def")
        await server.flush()
        assert await stream.receive_some(1) == b"a"
        trio_stream = stream.trio_stream
        assert await trio_stream.receive_some() == b"bc"
        assert await trio_stream.receive_some() == b"def"
        await stream.send_all(b"one")
        await trio_stream.send_all(b"two")
        await stream.send_all(b"three")
        assert await receive(server, 11) == b"onetwothree"
        assert "TLSStream over <Transport" in repr(stream)


async def test_without_trios_internals_trios_stream_does_all(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio_internals, "_USED", ("_renamed",))
    server = await serve_tcp(nursery, respond, tls=make_tls().server)
    async with ConnectionPool(make_tls().client) as pool:
        for _ in range(2):
            response = await pool.request("POST", server.url, content=b"x" * 100_000)
            assert response.content == b"x" * 100_000
            for connection in internals(pool):
                assert connection.readiness() is QUIET
        assert_unharmed(pool, idle=1)


async def test_a_full_socket_is_waited_for() -> None:
    async with linked() as (stream, server):
        sock = stream.trio_stream.transport_stream.stream
        assert isinstance(sock, trio.SocketStream)
        clog(sock.socket)
        with trio.move_on_after(0.05) as scope:
            await stream.send_all(b"abc")
        assert scope.cancelled_caught
        assert server.kept == b""
