"""Responses that are dropped without being read to their end or closed."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.harness.checks import assert_unharmed, internals
from tests.harness.h2peer import H2Peer
from tests.harness.networks import Network
from trio_exchange import ConnectionPool, ReadTimeout, Request, Response
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "http://example.com/path"
HALF = "http://example.com/half"
LEAKED = "was neither read to its end nor closed"
#: Where the body is whole; the second does not wait for the request's own.
WHOLE = (b"/path", b"/at-once")


async def serve_http11(peer: ScriptedPeer) -> None:
    with contextlib.suppress(EOFError):
        while True:
            request = await peer.receive_head()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")
            await peer.send(b"body" if request.target in WHOLE else b"ha")
            if request.target != b"/path":
                while await peer.receive_some():
                    pass


async def serve_http2(scripted: ScriptedPeer) -> None:
    peer = H2Peer(scripted.stream)
    await peer.start()
    with contextlib.suppress(EOFError):
        while True:
            stream_id, headers = await peer.head()
            whole = headers[b":path"] in WHOLE
            await peer.respond(stream_id, body=b"body" if whole else b"ha", end=whole)


@pytest.fixture(params=["http1", "http2"])
def pool(request: pytest.FixtureRequest, nursery: trio.Nursery) -> ConnectionPool:
    http2 = request.param == "http2"
    connector = MemoryConnector(nursery, serve_http2 if http2 else serve_http11)
    return ConnectionPool(connector=connector, http1=not http2, http2=http2)


async def get(pool: ConnectionPool, url: str = URL, **options: Any) -> Response:
    return await pool.handle_async_request(Request("GET", url, **options))


async def drop(pool: ConnectionPool, url: str = URL, **options: Any) -> None:
    assert (await get(pool, url, **options)).status == 200


async def assert_nothing_active(pool: ConnectionPool) -> None:
    """Once what was dropped has been given back."""
    await settled()
    assert pool.statistics().active == 0


async def settled() -> None:
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("target", ["/path", "/half"])
async def test_a_dropped_response_gives_a_warning_and_its_connection_back(
    pool: ConnectionPool, target: str
) -> None:
    url = f"http://example.com{target}"
    async with pool:
        with pytest.warns(ResourceWarning, match=LEAKED) as caught:
            await drop(pool, url)
        [warning] = caught
        assert str(warning.message).startswith("the response to GET ")
        assert str(Request("GET", url).url) in str(warning.message)
        await assert_nothing_active(pool)
        response = await pool.request("GET", URL)
        assert response.content == b"body"


async def test_with_tracemalloc_the_warning_knows_where_the_response_was_made(pool: ConnectionPool) -> None:
    tracemalloc.start(25)
    try:
        async with pool:
            with pytest.warns(ResourceWarning, match=LEAKED) as caught:
                await drop(pool)
            [warning] = caught
            made = tracemalloc.get_object_traceback(warning.source)
            assert made is not None
            assert any(frame.filename == __file__ for frame in made)
    finally:
        tracemalloc.stop()


async def test_a_response_in_a_cycle_is_found_by_the_collector(pool: ConnectionPool) -> None:
    async with pool:
        response = await get(pool, HALF)
        cycle: list[Any] = [response]
        cycle.append(cycle)
        del response, cycle
        with pytest.warns(ResourceWarning, match=LEAKED):
            gc.collect()
        await assert_nothing_active(pool)


async def test_a_response_may_be_dropped_by_another_thread(pool: ConnectionPool) -> None:
    async with pool:
        responses = [await get(pool, HALF)]
        with pytest.warns(ResourceWarning, match=LEAKED):
            await trio.to_thread.run_sync(responses.clear)
        await assert_nothing_active(pool)


async def test_a_response_that_is_dropped_after_the_end_of_its_run(
    pool: ConnectionPool,
) -> None:
    async def token() -> trio.lowlevel.TrioToken:
        return trio.lowlevel.current_trio_token()

    async with pool:
        response = await get(pool, HALF)
        [connection] = internals(pool)
        connection.trio_token = await trio.to_thread.run_sync(trio.run, token)
        with pytest.warns(ResourceWarning, match=LEAKED):
            del response
        await settled()
        assert pool.statistics().active == 1
    assert_unharmed(pool)


async def test_an_upload_of_a_dropped_response_ends(pool: ConnectionPool) -> None:
    ended: list[str] = []

    async def content() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await trio.sleep_forever()
        finally:
            ended.append("ended")

    async with pool:
        with pytest.warns(ResourceWarning, match=LEAKED):
            await drop(pool, "http://example.com/early", content=content())
        assert not ended
        await settled()
        assert ended == ["ended"]
        assert pool.statistics().active == 0


async def read_early_answer(pool: ConnectionPool, go_on: trio.Event, ended: list[str]) -> Response:
    async def content() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await go_on.wait()
        finally:
            ended.append("ended")

    request = Request("POST", "http://example.com/at-once", content=content())
    response = await pool.handle_async_request(request)
    assert [chunk async for chunk in response.aiter_stream()] == [b"body"]
    assert not ended
    return response


async def test_a_response_that_was_read_before_its_request_was_sent_is_dropped(pool: ConnectionPool) -> None:
    ended: list[str] = []
    async with pool:
        response = await read_early_answer(pool, trio.Event(), ended)
        with pytest.warns(
            ResourceWarning, match="came before the request was sent whole, and was not closed"
        ):
            del response
        await settled()
        assert ended == ["ended"]
        assert pool.statistics().active == 0


async def test_a_response_that_was_read_is_dropped_when_its_request_was_sent(pool: ConnectionPool) -> None:
    go_on = trio.Event()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with pool:
            response = await read_early_answer(pool, go_on, [])
            go_on.set()
            await settled()
            del response
            await settled()
            assert pool.statistics().idle == 1


async def test_reading_a_response_to_its_end_frees_the_connection_whatever_its_request_was(
    network: Network,
) -> None:
    async with network.pool() as pool:
        request = Request("POST", URL, content=bytes(100_000))
        response = await pool.handle_async_request(request)
        assert len(b"".join([chunk async for chunk in response.aiter_stream()])) == 100_000
        assert_unharmed(pool, idle=1)


async def closed(pool: ConnectionPool) -> Response:
    response = await get(pool, HALF)
    await response.aclose()
    return response


async def read(pool: ConnectionPool) -> Response:
    response = await get(pool)
    await response.aread()
    return response


async def iterated(pool: ConnectionPool) -> Response:
    response = await get(pool)
    async for chunk in response.aiter_stream():
        assert chunk == b"body"
    return response


async def failed(pool: ConnectionPool) -> Response:
    response = await get(pool, HALF, extensions={"timeout": {"read": 0.01}})
    with pytest.raises(ReadTimeout):
        async for _ in response.aiter_stream():
            pass
    return response


async def streamed(pool: ConnectionPool) -> Response:
    async with pool.stream("GET", HALF) as response:
        return response


async def of_a_closed_pool(pool: ConnectionPool) -> Response:
    response = await get(pool, HALF)
    await pool.aclose()
    return response


@pytest.mark.parametrize("make", [closed, read, iterated, failed, streamed, of_a_closed_pool])
async def test_a_response_that_holds_nothing_gives_no_warning(
    pool: ConnectionPool, make: Callable[[ConnectionPool], Any]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with pool:
            response = await make(pool)
            del response
            gc.collect()
    assert caught == []


async def test_the_iterator_alone_keeps_a_response_open(pool: ConnectionPool) -> None:
    async def iterator() -> AsyncIterator[bytes]:
        return (await get(pool)).aiter_stream()

    async with pool:
        assert [chunk async for chunk in await iterator()] == [b"body"]
        await settled()
        assert_unharmed(pool, idle=1)
