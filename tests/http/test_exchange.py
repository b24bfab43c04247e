"""What an exchange does in HTTP/1.1 and in HTTP/2 alike, without and with TLS."""

from __future__ import annotations

import gc
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
import trio
import trio.testing
from h2.errors import ErrorCodes
from hyperframe.frame import DataFrame, RstStreamFrame
from trio.testing import MockClock

from tests.harness.checks import assert_settles, assert_unharmed
from tests.harness.contents import Pieces, stream_of
from tests.harness.exchanges import Client, ExchangeScript, HTTP2Exchange, ServerExchange
from tests.harness.networks import Network
from tests.harness.peers import BUFFERS
from tests.harness.traces import Events, both_ends
from trio_exchange import (
    ConnectionPool,
    Connector,
    LocalProtocolError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    Request,
    WriteError,
    WriteTimeout,
)
from trio_exchange.testing import ScriptedPeer

URL = "http://origin.example/"
MEGABYTE = 1024 * 1024
FIVE = [(b"Content-Length", b"5")]

#: A body of six bytes, with a Content-Length and without.
framings = pytest.mark.parametrize(
    "framing", [[(b"Content-Length", b"6")], []], ids=["content-length", "no content-length"]
)


async def echo(exchange: ServerExchange) -> None:
    await exchange.respond(200, body=await exchange.receive_all())


async def drain(exchange: ServerExchange) -> None:
    await exchange.drain()


async def stall(exchange: ServerExchange) -> None:
    await trio.sleep_forever()


def answering(
    headers: Sequence[tuple[bytes, bytes]] = (), body: bytes | None = None, *, begin: bytes = b""
) -> ExchangeScript:
    """A script that sends a response, or its beginning, and then receives until the client gives up."""

    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(200, headers, body=body)
        if begin:
            await exchange.send(begin)
        await exchange.drain()

    return script


async def talk(exchange: ServerExchange) -> None:
    """Answer each piece of the request with one of the response."""
    await exchange.respond(200, body=None)
    while piece := await exchange.receive():
        await exchange.send(piece.swapcase())
    await exchange.end()


def sent_data(exchange: ServerExchange) -> bytes:
    """What the client has sent of a request's body in HTTP/2."""
    assert isinstance(exchange, HTTP2Exchange)
    frames = exchange.stream.server.peer.sent(DataFrame, exchange.stream.id)
    return b"".join(frame.data for frame in frames)


def resets(client: Client) -> list[RstStreamFrame]:
    """The resets that the client has sent in HTTP/2."""
    exchange = client.exchanges[0]
    return exchange.stream.server.peer.sent(RstStreamFrame) if isinstance(exchange, HTTP2Exchange) else []


# -- Reading.


async def test_after_the_end_there_is_nothing_more(client: Client) -> None:
    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(200, body=b"body")

    async with client.pool(script) as pool:
        response = await pool.handle_async_request(Request("GET", client.url))
        stream: Any = response.stream
        assert [chunk async for chunk in stream] == [b"body"]
        with trio.testing.assert_checkpoints():
            assert [chunk async for chunk in stream] == []
        assert await stream.collect() == b""
        await client.assert_reusable(pool)


async def test_closing_twice_and_reading_after(client: Client) -> None:
    async with client.pool(answering(FIVE, begin=b"ab")) as pool:
        response = await pool.handle_async_request(Request("GET", client.url))
        for _ in range(2):
            with trio.testing.assert_checkpoints():
                await response.aclose()
        with pytest.raises(ReadError, match="closed before its body was read"):
            await response.aread()
        await client.assert_given_up(pool)
        await response.aclose()
        assert len(resets(client)) == client.http2


@framings
async def test_a_cancelled_read_can_be_taken_up_again(
    client: Client, autojump_clock: MockClock, framing: list[tuple[bytes, bytes]]
) -> None:
    go = trio.Event()

    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(200, framing, body=None, begin=b"abc")
        await go.wait()
        await exchange.send(b"def")
        await exchange.end([] if framing else [(b"a", b"b")])

    async with client.pool(script) as pool:
        async with pool.stream("GET", client.url) as response:
            chunks = response.aiter_stream()
            with trio.CancelScope() as scope:
                scope.cancel()
                await anext(chunks)
            assert scope.cancelled_caught
            assert await anext(chunks) == b"abc"
            with trio.move_on_after(1) as scope:
                await anext(chunks)
            assert scope.cancelled_caught
            go.set()
            assert [chunk async for chunk in chunks] == [b"def"]
        await client.assert_reusable(pool)


async def test_two_tasks_that_read_one_body_at_once_are_told(client: Client) -> None:
    go = trio.Event()

    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(200, [(b"Content-Length", b"10")], body=None)
        await go.wait()
        await exchange.send(b"0123456789")

    async with client.pool(script) as pool:
        response = await pool.handle_async_request(Request("GET", client.url))
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


async def collect(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


@pytest.mark.parametrize("sockets", [False, True], ids=["memory", "sockets"])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("whole", [False, True])
async def test_a_read_that_another_task_ended_by_closing_says_so(
    client: Client, whole: bool, begun: bool, sockets: bool
) -> None:
    """The read says that the response was closed, not that a file descriptor was, and waits no longer."""

    async with client.pool(answering(begin=b"a" if begun else b""), sockets=sockets) as pool:
        response = await pool.handle_async_request(Request("GET", client.url))

        async def read() -> None:
            with pytest.raises(ReadError, match="the response was closed while its body was being read"):
                await (response.aread() if whole else collect(response.aiter_stream()))

        with trio.fail_after(10):
            async with trio.open_nursery() as readers:
                readers.start_soon(read)
                await trio.testing.wait_all_tasks_blocked(0.01)
                await response.aclose()
        with pytest.raises((ReadError, RuntimeError)):
            await anext(response.aiter_stream())


async def test_trailers_are_there_once_the_body_was_read(client: Client) -> None:
    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(200, body=None)
        await exchange.send(b"body")
        await exchange.end([(b"a", b"b")])

    async with client.pool(script) as pool:
        async with pool.stream("GET", client.url) as response:
            assert await response.aread() == b"body"
            assert response.extensions["trailing_headers"] == [(b"a", b"b")]
        await client.assert_reusable(pool)


# -- Uploads while the response is read.


async def test_a_dialogue_within_one_exchange(client: Client) -> None:
    """Each piece of the request depends on the piece of the response before it."""

    send, receive = trio.open_memory_channel[bytes](0)
    async with client.pool(talk) as pool:
        async with pool.stream("POST", client.url, content=receive) as response:
            chunks = response.aiter_stream()
            for piece in (b"one", b"two", b"three"):
                await send.send(piece)
                assert await anext(chunks) == piece.swapcase()
            await send.aclose()
            assert [chunk async for chunk in chunks] == []
        await client.assert_reusable(pool)


@pytest.mark.parametrize("streamed", [False, True])
async def test_large_bodies_both_ways_at_once(client: Client, streamed: bool) -> None:
    # More than sockets' buffers hold in HTTP/1.1, and than the first windows in HTTP/2, whose peer is slow.
    size = (4 if client.http2 else 12) * MEGABYTE
    whole = bytes(range(256)) * (size // 256)
    content: Any = stream_of(size, 100_000) if streamed else whole
    async with client.pool(talk, sockets=True) as pool:
        with trio.fail_after(30):
            async with pool.stream("POST", client.url, content=content) as response:
                received = [chunk async for chunk in response.aiter_stream()]
        assert b"".join(received) == (b"X" * size if streamed else whole.swapcase())
        await client.assert_reusable(pool)


async def test_a_response_that_is_left_ends_the_upload(client: Client, autojump_clock: MockClock) -> None:
    ended = trio.Event()

    async def wait() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with client.pool(answering(FIVE)) as pool:
        async with pool.stream("POST", client.url, content=Pieces(b"x", wait)) as response:
            assert response.status == 200
        assert ended.is_set()
        await client.assert_given_up(pool)


@pytest.mark.parametrize("sockets", [False, True], ids=["memory", "sockets"])
async def test_an_early_answer_to_a_client_that_waits(client: Client, sockets: bool) -> None:
    """The iterator has nothing to give, and never will."""

    async with client.pool(answering(body=b"enough"), sockets=sockets) as pool:
        content = Pieces(b"x", trio.sleep_forever)
        assert (await pool.request("POST", client.url, content=content)).content == b"enough"
        await client.assert_given_up(pool)


async def test_an_abandoned_generator_is_closed(client: Client) -> None:
    """Otherwise its clean-up would be left to the garbage collector, with a warning."""

    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(413)
        await exchange.drain()

    closed = []

    async def generate() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 1000
        finally:
            await trio.lowlevel.cancel_shielded_checkpoint()
            closed.append(True)

    async with client.pool(script) as pool:
        await pool.request("POST", client.url, content=generate())
        assert closed == [True]
    gc.collect()


# -- Content that is not what it should be.


@pytest.mark.parametrize("declared", [0, 3, 5, 100])
@pytest.mark.parametrize("content", [[b"ab", b"cd"], [b"x" * 100_000]], ids=["streamed", "huge"])
async def test_content_of_another_length_than_declared(
    client: Client, declared: int, content: list[bytes]
) -> None:
    async with client.pool(echo) as pool:
        headers = {"Content-Length": str(declared)}
        with pytest.raises(LocalProtocolError) as info:
            await pool.request("POST", client.url, content=Pieces(*content), headers=headers)
        size = sum(map(len, content))
        relation = "longer" if declared < size else "shorter"
        if client.http2:
            assert relation in str(info.value)
            assert relation == "longer" or f"{declared - size} bytes shorter" in str(info.value)
        else:
            assert str(info.value) == f"the content is {relation} than its Content-Length, {declared}"
            assert info.value.__cause__ is None
        await client.assert_given_up(pool)
        if client.http2:
            # Pieces are sent until one exceeds the length.
            fits = b"".join(content[:1] if len(content[0]) <= declared < size else content)
            assert sent_data(client.exchanges[0]) == (fits if len(content[0]) <= declared else b"")


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("name", BUFFERS)
async def test_pieces_are_counted_in_bytes(client: Client, name: str, method: str, declared: bool) -> None:
    buffer: Any
    buffer, content = BUFFERS[name]
    headers = {"Content-Length": str(len(content) + 2)} if declared else {}
    async with client.pool(echo) as pool:
        response = await pool.request(method, client.url, content=[b"<", buffer, b">"], headers=headers)
        assert response.content == b"<" + content + b">"
        # As the first piece, and the only one.
        assert (await pool.request(method, client.url, content=[buffer])).content == content
        assert (await pool.request(method, client.url, content=buffer)).content == content
        wrong = {"Content-Length": str(len(content) + 1)}
        with pytest.raises(LocalProtocolError, match="shorter"):
            await pool.request(method, client.url, content=[buffer], headers=wrong)


async def test_the_iterators_own_error_before_the_response(client: Client) -> None:
    error = KeyError("user")

    async with client.pool(echo) as pool:
        for content in (Pieces(error), Pieces(b"x", error), Pieces(b"x", trio.lowlevel.checkpoint, error)):
            with pytest.raises(KeyError) as info:
                await pool.request("POST", client.url, content=content)
            assert info.value is error
            await client.assert_given_up(pool)


@pytest.mark.parametrize("reading", [True, False])
async def test_the_iterators_own_error_during_the_response(client: Client, reading: bool) -> None:
    go = trio.Event()
    error = KeyError("user")
    async with client.pool(answering(FIVE, begin=b"ab")) as pool:
        request = Request("POST", client.url, content=Pieces(b"x", go.wait, error))
        response = await pool.handle_async_request(request)
        chunks = response.aiter_stream()
        assert await anext(chunks) == b"ab"
        go.set()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(KeyError) as info:
            await (anext(chunks) if reading else response.aclose())
        assert info.value is error
        await response.aclose()
        await client.assert_given_up(pool)


@pytest.mark.parametrize("trailers", [[], [(b"a", b"b")]], ids=["no trailers", "trailers"])
@pytest.mark.parametrize("read", [True, False])
async def test_the_iterators_own_error_after_the_response(
    client: Client, read: bool, trailers: list[tuple[bytes, bytes]]
) -> None:
    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(200, body=None)
        await exchange.send(b"abc")
        await exchange.end(trailers)
        await exchange.drain()

    go = trio.Event()
    error = KeyError("user")
    async with client.pool(script) as pool:
        request = Request("POST", client.url, content=Pieces(b"x", go.wait, error))
        response = await pool.handle_async_request(request)
        if read:
            assert b"".join([chunk async for chunk in response.aiter_stream()]) == b"abc"
        go.set()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(KeyError) as info:
            await response.aclose()
        assert info.value is error
        # In HTTP/1.1 those of an unread body are not received.
        if read or client.http2:
            assert response.extensions.get("trailing_headers", []) == trailers
        await client.assert_given_up(pool)


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("piece", ["text", 7, [b"x"], 0, ""])
async def test_pieces_that_are_not_bytes(client: Client, piece: Any, method: str) -> None:
    async with client.pool(echo) as pool:
        for first in (b"", b"some"):
            with pytest.raises(LocalProtocolError, match=f"must give bytes, but gave {type(piece).__name__}"):
                await pool.request(method, client.url, content=Pieces(first, piece, b"x"))
            if client.exchanges:
                await client.assert_given_up(pool)


# -- Expect: 100-continue.

EXPECT = {"Expect": "100-continue"}


@pytest.mark.parametrize(
    "content", [b"body", [b"bo", b"dy"], b"x" * 100_000], ids=["bytes", "pieces", "large"]
)
async def test_the_body_waits_for_100(client: Client, autojump_clock: MockClock, content: Any) -> None:
    sent_before = []

    async def script(exchange: ServerExchange) -> None:
        assert exchange.headers[b"expect"] == b"100-continue"
        with trio.move_on_after(7):
            sent_before.append(await exchange.receive())
        await exchange.inform(102)
        with trio.move_on_after(2):
            sent_before.append(await exchange.receive())
        await exchange.inform(100)
        await exchange.respond(200, body=await exchange.receive_all())

    async with client.pool(script, expect_continue_timeout=10) as pool:
        began = trio.current_time()
        response = await pool.request("POST", client.url, content=content, headers=EXPECT)
        assert trio.current_time() - began == pytest.approx(9)
        assert response.content == (content if isinstance(content, bytes) else b"body")
        assert sent_before == []
        await client.assert_reusable(pool)


@pytest.mark.parametrize("timeout", [None, 0.25, 10, 0])
async def test_the_body_waits_no_longer_than_the_option_says(
    client: Client, autojump_clock: MockClock, timeout: float | None
) -> None:
    options: dict[str, Any] = {} if timeout is None else {"expect_continue_timeout": timeout}
    async with client.pool(echo, **options) as pool:
        began = trio.current_time()
        response = await pool.request("POST", client.url, content=b"abc", headers=EXPECT)
        assert response.content == b"abc"
        assert trio.current_time() - began == pytest.approx(1 if timeout is None else timeout)
        await client.assert_reusable(pool)


@pytest.mark.parametrize("status", [417, 401, 200])
@pytest.mark.parametrize("traced", [False, True])
async def test_an_answer_instead_of_100_means_that_the_body_is_not_sent(
    client: Client, autojump_clock: MockClock, status: int, traced: bool
) -> None:
    received = []

    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(status, body=b"no")
        received.append(await exchange.drain())

    trace = Events()
    content = Pieces(b"abc")
    async with client.pool(script) as pool:
        began = trio.current_time()
        extensions = {"trace": trace} if traced else {}
        response = await pool.request(
            "POST", client.url, content=content, headers=EXPECT, extensions=extensions
        )
        assert (response.status, response.content) == (status, b"no")
        assert trio.current_time() == began
        await client.assert_given_up(pool)
    await trio.testing.wait_all_tasks_blocked()
    assert received == [b""]
    assert content.taken == 0
    assert (f"{client.prefix}send_request_body.failed" in trace.names) is traced


async def test_without_a_body_nothing_waits(client: Client, autojump_clock: MockClock) -> None:
    async with client.pool(echo) as pool:
        began = trio.current_time()
        await pool.request("POST", client.url, headers=EXPECT)
        assert trio.current_time() == began
        await client.assert_reusable(pool)


# -- Informational responses.


async def test_the_informational_callback_sees_each(client: Client) -> None:
    seen = []
    # HTTP/1.1 keeps the case of names.
    links = [(b"link" if client.http2 else b"Link", b"</a>"), (b"link", b"</b>")]

    async def callback(status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await trio.lowlevel.checkpoint()
        seen.append((status, headers))

    async def script(exchange: ServerExchange) -> None:
        await exchange.inform(103, links)
        await exchange.inform(100)
        await exchange.inform(199)
        await exchange.respond(200)

    trace = Events()
    async with client.pool(script) as pool:
        extensions = {"informational": callback, "trace": trace}
        assert (await pool.request("GET", client.url, extensions=extensions)).status == 200
        await client.assert_reusable(pool)
    assert seen == [(103, links), (100, []), (199, [])]
    name = f"{client.prefix}receive_informational_response"
    shown = [info["return_value"] for info in trace.infos(f"{name}.complete")]
    if client.http2:
        assert shown == [(103, links), (100, []), (199, [])]
        assert [info["stream_id"] for info in trace.infos(f"{name}.started")] == [1, 1, 1]
    else:
        assert [(status, headers) for _, status, _, headers in shown] == seen


async def test_what_the_informational_callback_raises_comes_out(client: Client) -> None:
    error = KeyError("user")

    async def callback(status: int, headers: list[tuple[bytes, bytes]]) -> None:
        raise error

    def not_async(status: int, headers: list[tuple[bytes, bytes]]) -> None:
        pass

    async def script(exchange: ServerExchange) -> None:
        await exchange.inform(103)
        await exchange.drain()

    async with client.pool(script) as pool:
        with pytest.raises(KeyError) as info:
            await pool.request("GET", client.url, extensions={"informational": callback})
        assert info.value is error
        await client.assert_given_up(pool)
        with pytest.raises(TypeError, match="informational extension must be an async function"):
            await pool.request("GET", client.url, extensions={"informational": not_async})


@pytest.mark.parametrize("slowly", [False, True])
@pytest.mark.parametrize(("count", "works"), [(100, True), (101, False)])
async def test_the_number_of_informational_responses(
    client: Client, count: int, works: bool, slowly: bool
) -> None:
    async def script(exchange: ServerExchange) -> None:
        for _ in range(count):
            await exchange.inform(103)
            if slowly:
                await trio.testing.wait_all_tasks_blocked()
        if works:
            await exchange.respond(200)
        else:
            await exchange.drain()

    async with client.pool(script) as pool:
        if works:
            for _ in range(2):
                assert (await pool.request("GET", client.url)).status == 200
            await client.assert_reusable(pool)
        else:
            with pytest.raises(RemoteProtocolError, match="more than 100 informational"):
                await pool.request("GET", client.url)
            await client.assert_given_up(pool, ErrorCodes.ENHANCE_YOUR_CALM)


# -- Timeouts.


def timeouts(**seconds: float) -> dict[str, Any]:
    return {"timeout": seconds}


async def test_the_read_timeout_for_the_head(client: Client, autojump_clock: MockClock) -> None:
    async with client.pool(drain) as pool:
        began = trio.current_time()
        with pytest.raises(ReadTimeout):
            await pool.request("GET", client.url, extensions=timeouts(read=3))
        assert trio.current_time() - began == pytest.approx(3)
        await client.assert_given_up(pool)


@framings
async def test_the_read_timeout_for_the_body_limits_each_wait(
    client: Client, autojump_clock: MockClock, framing: list[tuple[bytes, bytes]]
) -> None:
    async def script(exchange: ServerExchange) -> None:
        await trio.sleep(2)
        await exchange.respond(200, framing, body=None)
        for piece in (b"a", b"b", b"c"):
            await trio.sleep(2)
            await exchange.send(piece)
        await exchange.drain()

    async with client.pool(script) as pool:
        began = trio.current_time()
        async with pool.stream("GET", client.url, extensions=timeouts(read=3)) as response:
            chunks = response.aiter_stream()
            for piece in (b"a", b"b", b"c"):
                assert await anext(chunks) == piece
            with pytest.raises(ReadTimeout, match="within 3 seconds"):
                await anext(chunks)
        assert trio.current_time() - began == pytest.approx(2 + 3 * 2 + 3)
        await client.assert_given_up(pool)


@pytest.mark.parametrize("traced", [False, True])
async def test_the_read_timeout_does_not_run_during_the_upload(
    client: Client, autojump_clock: MockClock, traced: bool
) -> None:
    async def wait() -> None:
        await trio.sleep(10)

    async with client.pool(echo) as pool:
        extensions = timeouts(read=3, write=3)
        if traced:
            extensions["trace"] = Events()
        content = Pieces(b"a", wait, b"b", wait, b"c")
        response = await pool.request("POST", client.url, content=content, extensions=extensions)
        assert response.content == b"abc"


async def test_the_read_timeout_runs_when_the_upload_has_ended(
    client: Client, autojump_clock: MockClock
) -> None:
    async def wait() -> None:
        await trio.sleep(100)

    async with client.pool(drain) as pool:
        began = trio.current_time()
        with pytest.raises(ReadTimeout):
            await pool.request("POST", client.url, content=Pieces(b"a", wait), extensions=timeouts(read=3))
        assert trio.current_time() - began == pytest.approx(103)
        await client.assert_given_up(pool)


async def test_the_read_timeout_runs_once_the_response_has_begun(
    client: Client, autojump_clock: MockClock
) -> None:
    async with client.pool(answering()) as pool:
        began = trio.current_time()
        with pytest.raises(ReadTimeout):
            await pool.request(
                "POST", client.url, content=Pieces(trio.sleep_forever), extensions=timeouts(read=3)
            )
        assert trio.current_time() - began == pytest.approx(3)
        await client.assert_given_up(pool)


async def test_the_write_timeout_for_the_head(client: Client, autojump_clock: MockClock) -> None:
    # In HTTP/2 only a large head waits until it was taken.
    headers = {"x": "y" * 100_000} if client.http2 else {}
    async with client.pool(drain, lockstep=True, deaf=True) as pool:
        began = trio.current_time()
        with pytest.raises(WriteTimeout, match="accepted no data within 3 seconds"):
            await pool.request("GET", client.url, headers=headers, extensions=timeouts(write=3))
        assert trio.current_time() - began == pytest.approx(3)
        if not client.http2:
            await assert_settles(pool)


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_write_timeout_for_the_body(
    client: Client, autojump_clock: MockClock, streamed: bool
) -> None:
    # In HTTP/2 the first window takes what is small.
    size = 1 if streamed and not client.http2 else 100_000
    content = [b"x" * size] if streamed else b"x" * size
    async with client.pool(stall, lockstep=True) as pool:
        began = trio.current_time()
        with pytest.raises(WriteTimeout, match="accepted no data within 3 seconds"):
            await pool.request("POST", client.url, content=content, extensions=timeouts(write=3, read=1))
        assert trio.current_time() - began == pytest.approx(3)
        await client.assert_given_up(pool)


async def test_the_write_timeout_ends_when_the_response_begins(
    client: Client, autojump_clock: MockClock
) -> None:
    received = []

    async def script(exchange: ServerExchange) -> None:
        await trio.sleep(2)
        await exchange.respond(200, body=None)
        for _ in range(5):
            await trio.sleep(2)
            await exchange.send(b"a")
        if not client.http2:
            await exchange.end()
        received.append(await exchange.receive_all())
        if client.http2:
            await exchange.end()

    async with client.pool(script, lockstep=True) as pool:
        extensions = timeouts(write=3, read=3)
        response = await pool.request("POST", client.url, content=b"x" * 100_000, extensions=extensions)
        assert response.content == b"aaaaa"
        await client.assert_reusable(pool)
    assert received == [b"x" * 100_000]


# -- Ends from elsewhere.


async def test_cancelling_an_upload_leaves_nothing(client: Client, autojump_clock: MockClock) -> None:
    async with client.pool(stall, lockstep=True) as pool:
        for content in (b"x" * 100_000, Pieces(b"x", trio.sleep_forever)):
            with trio.move_on_after(1) as scope:
                await pool.request("POST", client.url, content=content)
            assert scope.cancelled_caught
            await client.assert_given_up(pool)


async def test_closing_the_pool_ends_an_upload(client: Client) -> None:
    async def script(exchange: ServerExchange) -> None:
        await exchange.receive()
        await pool.aclose()

    async with client.pool(script) as pool:
        with pytest.raises(ReadError if client.http2 else WriteError):
            await pool.request("POST", client.url, content=Pieces(b"x", trio.sleep_forever))
    assert_unharmed(pool)


async def test_closing_the_pool_before_an_upload_begins(client: Client) -> None:
    async def close(event: str, info: dict[str, Any]) -> None:
        if event == f"{client.prefix}send_request_body.started":
            await pool.aclose()

    async with client.pool(drain) as pool:
        with pytest.raises(ReadError if client.http2 else WriteError, match="the connection was closed"):
            await pool.request("POST", client.url, content=Pieces(b"x"), extensions={"trace": close})


@pytest.mark.parametrize("by", ["aclose", "block"])
async def test_a_response_whose_pool_was_closed(client: Client, by: str) -> None:
    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(200, FIVE, body=None, begin=b"some")
        await exchange.drain()

    async with client.pool(script) as pool:
        response = await pool.handle_async_request(Request("GET", client.url))
        await trio.testing.wait_all_tasks_blocked(0.01)
        if by == "aclose":
            await pool.aclose()
    body = response.aiter_stream()
    assert await anext(body) == b"some"
    with pytest.raises(ReadError, match="in the middle of the response" if client.http2 else "closed"):
        await anext(body)
    await response.aclose()


# -- Trace.


async def test_the_order_of_an_upload_and_its_response(client: Client) -> None:
    trace = Events()
    async with client.pool(echo) as pool:
        await pool.request("POST", client.url, content=Pieces(b"a", b"b"), extensions={"trace": trace})
    assert client.names(trace) == both_ends(
        "send_request_headers",
        "send_request_body",
        "receive_response_headers",
        "receive_response_body",
        "response_closed",
    )


@pytest.mark.parametrize("stuck", [False, True])
async def test_the_order_of_an_early_answer(client: Client, stuck: bool) -> None:
    async def script(exchange: ServerExchange) -> None:
        await exchange.inform(103, [(b"a", b"b")])
        await exchange.respond(413)
        await (exchange.drain() if stuck else exchange.receive_all())

    trace, go = Events(), trio.Event()
    async with client.pool(script) as pool:
        content = Pieces(b"a", trio.sleep_forever if stuck else go.wait)
        request = Request("POST", client.url, content=content, extensions={"trace": trace})
        response = await pool.handle_async_request(request)
        if not stuck:
            go.set()
            await trio.testing.wait_all_tasks_blocked()
        await response.aread()
        names = client.names(trace)
    assert names[:7] == [
        *both_ends("send_request_headers"),
        "send_request_body.started",
        "receive_response_headers.started",
        *both_ends("receive_informational_response"),
        "receive_response_headers.complete",
    ]
    sent = "send_request_body.failed" if stuck else "send_request_body.complete"
    ends = [*both_ends("receive_response_body", "response_closed"), sent]
    if client.http2 or not stuck:
        assert sorted(names[7:]) == sorted(ends)
    else:
        assert names[7:] == [*ends, *both_ends("connection.close")]
        informed = trace.info("http11.receive_informational_response.complete")["return_value"]
        assert informed == (b"HTTP/1.1", 103, b"Early Hints", [(b"a", b"b")])
        assert isinstance(trace.info("http11.send_request_body.failed")["exception"], WriteError)


@pytest.mark.parametrize("kind", ["first piece", "second piece", "not asynchronous"])
async def test_the_iterators_error_is_in_the_trace(client: Client, kind: str) -> None:
    error = KeyError("user")
    trace = Events()

    def generate() -> Iterator[bytes]:
        yield b"x"
        raise error

    contents = {"first piece": Pieces(error), "second piece": Pieces(b"x", error)}
    content: Any = contents.get(kind) or generate()
    async with client.pool(drain) as pool:
        with pytest.raises(KeyError) as info:
            await pool.request("POST", client.url, content=content, extensions={"trace": trace})
        assert info.value is error
    assert trace.info(f"{client.prefix}send_request_body.failed") == {"exception": error}


async def test_a_body_that_fails_is_in_the_trace(client: Client) -> None:
    async def script(exchange: ServerExchange) -> None:
        await exchange.respond(200, [(b"Content-Length", b"5")], body=None)
        await exchange.send(b"ab")
        await exchange.break_off()

    trace = Events()
    async with client.pool(script) as pool:
        with pytest.raises(RemoteProtocolError) as info:
            await pool.request("GET", client.url, extensions={"trace": trace})
    assert client.names(trace)[6:] == [
        "receive_response_body.started",
        "receive_response_body.failed",
        *both_ends("response_closed"),
        *([] if client.http2 else both_ends("connection.close")),
    ]
    assert trace.info(f"{client.prefix}receive_response_body.failed") == {"exception": info.value}


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


async def test_an_iteration_that_was_suspended_is_drained_by_another(network: Network) -> None:
    """As the openai SDK does at the end of a stream of events."""

    async def serve(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc")
            await trio.testing.wait_all_tasks_blocked()
            await peer.send(b"def")

    async with network.pool(serve) as pool:
        async with pool.stream("GET", URL) as response:
            events = response.aiter_stream()
            assert await anext(events) == b"abc"
            assert [chunk async for chunk in response.aiter_stream()] == [b"def"]
            assert [chunk async for chunk in events] == []
            with pytest.raises(RuntimeError, match="only once"):
                response.aiter_stream()
        assert_unharmed(pool, idle=1)
