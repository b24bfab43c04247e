"""Faults of HTTP/2 that were found, each with a test that showed it."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, GoAwayFrame, HeadersFrame
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from tests.harness.h2peer import H2Peer, h2_pool
from trio_exchange import ReadError, Request, Response


async def serve(peer: H2Peer) -> None:
    """Answer every request until the client closes."""
    await peer.start()
    while True:
        try:
            stream_id, _, _ = await peer.request()
        except EOFError:
            return
        await peer.respond(stream_id)


async def test_small_frames_in_flight_to_streams_that_were_left_are_no_flood(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A server that had not seen the resets, and kept to its windows, lost the connection."""
    left = trio.Event()
    peers: list[H2Peer] = []

    async def send_and_serve(peer: H2Peer) -> None:
        peers.append(peer)
        await peer.start()
        ids = [(await peer.head())[0] for _ in range(60)]
        for stream_id in ids:
            await peer.respond(stream_id, end=False)
        await left.wait()
        for stream_id in ids:
            await peer.send_frame(*[DataFrame(stream_id, b"small") for _ in range(200)])
        stream_id, _ = await peer.head()
        await peer.respond(stream_id)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, send_and_serve)
    async with pool:
        responses: list[Response] = []

        async def request() -> None:
            responses.append(await pool.handle_async_request(Request("GET", "http://a.example")))

        async with trio.open_nursery() as requests:
            for _ in range(60):
                requests.start_soon(request)
        for response in responses:
            await response.aclose()
        left.set()
        assert (await pool.request("POST", "http://a.example")).status == 200
        assert len(peers) == 1
        assert not peers[0].sent(GoAwayFrame)


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


async def test_what_failed_while_the_body_was_read_is_not_waited_for_again(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A second read, after the iterator's error had come out of the first, waited for ever."""
    answered = trio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"begin"
        await answered.wait()
        raise KeyError("the iterator's own")

    async def answer_and_wait(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, end=False)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, answer_and_wait)
    async with pool:
        request = Request("POST", "http://a.example", content=content())
        response = await pool.handle_async_request(request)
        body = aiter(response.stream)
        answered.set()
        with pytest.raises(KeyError, match="the iterator's own"):
            await anext(body)
        with trio.fail_after(10):
            with pytest.raises(ReadError, match="the stream was closed"):
                await anext(body)
        await response.aclose()


@pytest.mark.parametrize("sizes", [[2**32 - 1], [65536, 100, 0, 8192], [0], [100, 50], [100, 100], [4096]])
async def test_the_table_of_sent_headers_is_bounded(
    nursery: trio.Nursery, autojump_clock: MockClock, sizes: list[int]
) -> None:
    """A server that offered a large one got one, and every request became slower than the one before."""
    updated: list[int] = []

    async def change_and_serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        for size in sizes:
            peer.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: size})
            await peer.flush()
        await peer.respond(stream_id)
        for _ in range(200):
            stream_id, headers, _ = await peer.request()
            assert headers[b"x-large"] == b"%d" % stream_id * 20
            updated.append(peer.h2.decoder.header_table_size)
            await peer.respond(stream_id)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, change_and_serve)
    async with pool:
        await pool.request("GET", "http://a.example")
        for number in range(200):
            stream_id = 2 * number + 3
            await pool.request("GET", "http://a.example", headers={"x-large": b"%d" % stream_id * 20})
    assert set(updated) == {min(sizes[-1], 4096)}


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

    pool, _ = h2_pool(nursery, serve)
    async with pool:
        request = Request("POST", "http://a.example", headers={"Content-Length": "3"}, content=content())
        response = await pool.handle_async_request(request)
        assert response.status == 200
        assert not ended.is_set()
        if how == "aclose":
            await pool.aclose()
    assert ended.is_set()
    await response.aclose()


async def test_resets_before_the_first_settings_allow_no_more_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """After a dozen of them the connection took requests as if the server had set no limit."""
    peers: list[H2Peer] = []

    async def say_nothing(peer: H2Peer) -> None:
        peers.append(peer)
        while await peer.listen():
            pass

    pool, _ = h2_pool(nursery, say_nothing, max_connections=1)
    async with pool:
        for _ in range(15):
            with trio.move_on_after(1):
                await pool.request("GET", "http://a.example")
        async with trio.open_nursery() as requests:
            for _ in range(3):
                requests.start_soon(pool.request, "GET", "http://a.example")
            await wait_all_tasks_blocked()
            assert len(peers[0].sent(HeadersFrame)) == 16
            requests.cancel_scope.cancel()


async def test_a_body_whose_connection_can_not_be_sent_on_is_a_read_error(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """It was a WriteError, which nobody expects of reading."""
    client: Any = None

    async def begin(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, body=b"beginning", end=False)
        client.send_stream.send_all_hook = fail
        # What the client would answer to this it can't send.
        peer.h2.ping(b"12345678")
        await peer.flush()
        await peer.until_closed()

    async def fail() -> None:
        raise trio.BrokenResourceError("it broke")

    def pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
        nonlocal client
        client, server = memory_stream_pair()
        return client, server

    pool, connector = h2_pool(nursery, begin)
    connector._stream_pair = pair
    async with pool, pool.stream("GET", "http://a.example") as response:
        with pytest.raises(ReadError, match=r"it broke, in the middle of the response") as info:
            await response.aread()
        assert isinstance(info.value.__cause__, trio.BrokenResourceError)
