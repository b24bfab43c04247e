"""Where a pool lives: in a block, in a nursery, or for the whole `trio.run`; and what Ctrl-C does to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.harness.checks import assert_unharmed, internals, open_sockets
from tests.harness.peers import mute, respond
from tests.harness.servers import background_nursery, serve_tcp
from tests.harness.streams import Crash, Crashing, WrappingConnector
from trio_exchange import (
    ConnectionNotAvailable,
    ConnectionPool,
    NetworkError,
    ReadError,
    RemoteProtocolError,
    Request,
)
from trio_exchange._connect.transport import Readiness
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "http://example.com/"


async def memory_pool(**options: Any) -> ConnectionPool:
    return ConnectionPool(connector=MemoryConnector(await background_nursery(), respond), **options)


# -- Blocks that are entered and left in unusual ways.


async def test_pools_are_left_in_the_order_of_their_entry() -> None:
    first, second = await memory_pool(), await memory_pool()
    await first.__aenter__()
    await second.__aenter__()
    await first.request("GET", URL)
    await second.request("GET", URL)
    await first.__aexit__(None, None, None)
    assert_unharmed(first)
    await second.request("GET", URL)
    await second.__aexit__(None, None, None)
    assert_unharmed(second)


async def test_a_pool_outlives_the_scope_that_it_was_entered_in() -> None:
    pool = await memory_pool()
    with trio.move_on_after(60) as scope:
        await pool.__aenter__()
    scope.cancel()
    assert (await pool.request("GET", URL)).status == 200
    await pool.__aexit__(None, None, None)
    assert_unharmed(pool)


async def test_a_pool_outlives_the_task_that_entered_it() -> None:
    pool = await memory_pool()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.__aenter__)
    assert (await pool.request("GET", URL)).status == 200
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.__aexit__, None, None, None)
    assert_unharmed(pool)


async def test_a_nursery_inside_which_a_pool_was_entered_ends_first() -> None:
    pool = await memory_pool()
    async with trio.open_nursery() as nursery:
        await pool.__aenter__()
        nursery.cancel_scope.cancel()
    assert (await pool.request("GET", URL)).status == 200
    await pool.__aexit__(None, None, None)
    assert_unharmed(pool)


# -- `serve`.


async def test_a_pool_in_a_nursery() -> None:
    pool = await memory_pool()
    async with trio.open_nursery() as nursery:
        assert await nursery.start(pool.serve) is pool
        assert (await pool.request("GET", URL)).status == 200
        nursery.cancel_scope.cancel()
    assert_unharmed(pool)
    with pytest.raises(ConnectionNotAvailable):
        await pool.request("GET", URL)


async def test_a_pool_in_a_nursery_that_is_closed_ends_its_task() -> None:
    pool = await memory_pool()
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.serve)
        await pool.request("GET", URL)
        await pool.aclose()
    assert_unharmed(pool)


async def test_serving_without_a_nursery_start() -> None:
    pool = await memory_pool()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.serve)
        await trio.testing.wait_all_tasks_blocked()
        await pool.request("GET", URL)
        await pool.aclose()


# -- `open`.


async def test_a_pool_without_a_block() -> None:
    pool = await memory_pool()
    await pool.open()
    assert (await pool.request("GET", URL)).status == 200
    await pool.aclose()
    assert_unharmed(pool)
    with pytest.raises(ConnectionNotAvailable):
        await pool.request("GET", URL)
    with pytest.raises(ConnectionNotAvailable):
        await pool.open()


async def test_opened_inside_a_time_limit_and_in_a_child_task() -> None:
    pool = await memory_pool()

    async def first_use() -> None:
        with trio.fail_after(60):
            await pool.open()
            await pool.request("GET", URL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first_use)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.request, "GET", URL)
    assert_unharmed(pool, idle=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.aclose)
    assert_unharmed(pool)


async def test_opened_by_several_tasks_at_once() -> None:
    pool = await memory_pool()

    async def use() -> None:
        await pool.open()
        assert (await pool.request("GET", URL)).status == 200

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(use)
    await pool.aclose()
    assert_unharmed(pool)


async def test_a_cancelled_opening_leaves_the_pool_open() -> None:
    pool = await memory_pool()
    with trio.CancelScope() as scope:
        scope.cancel()
        await pool.open()
    assert scope.cancelled_caught
    assert (await pool.request("GET", URL)).status == 200
    await pool.aclose()


async def test_a_cancelled_first_request_does_no_harm() -> None:
    connector = MemoryConnector(await background_nursery(), mute)
    pool = ConnectionPool(connector=connector)
    with trio.CancelScope() as scope:
        await pool.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.request, "GET", URL)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert_unharmed(pool)
    await pool.aclose()


async def test_opening_a_pool_in_its_block_changes_nothing() -> None:
    async with await memory_pool() as pool:
        await pool.open()
        await pool.request("GET", URL)
    assert_unharmed(pool)


async def test_a_pool_that_was_opened_cannot_be_entered() -> None:
    pool = await memory_pool()
    await pool.open()
    with pytest.raises(RuntimeError, match="only once"):
        await pool.__aenter__()
    assert (await pool.request("GET", URL)).status == 200
    await pool.aclose()


async def test_closing_a_pool_that_was_never_opened() -> None:
    pool = await memory_pool()
    await pool.aclose()
    with pytest.raises(ConnectionNotAvailable):
        await pool.open()


def test_a_pool_that_is_never_closed_ends_with_its_run() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await serve_tcp(nursery, respond)
            await pool.open()
            for _ in range(3):
                await pool.request("GET", server.url)
            async with pool.stream("GET", server.url) as response:
                pools.append(response)
            nursery.cancel_scope.cancel()

    pools: list[object] = []
    pool = ConnectionPool()
    before = open_sockets()
    trio.run(main)
    assert open_sockets() == before
    assert_unharmed(pool)


@pytest.mark.parametrize("http2", [False, True])
def test_one_pool_in_two_runs_one_after_the_other(http2: bool) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await serve_tcp(nursery, respond)
            await pool.open()
            # This one is under way when the run ends.
            trio.lowlevel.spawn_system_task(ask_and_wait)
            assert (await pool.request("GET", server.url)).status == 200
            nursery.cancel_scope.cancel()

    async def ask_and_wait() -> None:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            port = listener.socket.getsockname()[1]
            await pool.request("GET", f"http://127.0.0.1:{port}/")

    pool = ConnectionPool(http2=http2)
    for _ in range(2):
        trio.run(main)
        assert_unharmed(pool)
        assert repr(pool).startswith("<ConnectionPool new:")

    async def too_early() -> None:
        with pytest.raises(RuntimeError, match=r"await pool\.open\(\)"):
            await pool.request("GET", URL)

    trio.run(too_early)


def test_one_pool_in_two_runs_at_once() -> None:
    pool = ConnectionPool()
    opened, looked = threading.Event(), threading.Event()

    async def hold() -> None:
        async with pool:
            opened.set()
            await trio.to_thread.run_sync(looked.wait)
            assert (await pool.request("GET", URL)).status == 200

    async def look() -> None:
        uses: list[Callable[[], Awaitable[object]]] = [
            lambda: pool.request("GET", URL),
            lambda: pool.open_tcp_stream("example.com", 80),
            pool.open,
            pool.aclose,
            lambda: pool.__aexit__(None, None, None),
        ]
        for use in uses:
            with pytest.raises(RuntimeError, match=r"open in another trio\.run"):
                await use()

    async def main() -> None:
        nonlocal pool
        pool = await memory_pool()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
            await trio.to_thread.run_sync(opened.wait)
            await trio.to_thread.run_sync(trio.run, look)
            looked.set()

    trio.run(main)


def test_a_pool_cannot_be_opened_by_a_finalizer_when_the_run_has_ended() -> None:
    async def generate() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            for use in (pool.open, pool.__aenter__):
                try:
                    await use()
                except RuntimeError as exc:
                    errors.append(str(exc))

    async def leave_unfinished() -> None:
        generators.append(generate())
        await anext(generators[0])

    async def use_later() -> None:
        await pool.open()
        await pool.aclose()

    pool = ConnectionPool()
    generators: list[AsyncGenerator[None]] = []
    errors: list[str] = []
    trio.run(leave_unfinished)
    assert errors == ["the pool can't be opened any more: this trio.run is ending"] * 2
    trio.run(use_later)


async def test_a_crash_that_cannot_be_logged_is_raised_all_the_same() -> None:
    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise ValueError("disk full")

    pool = ConnectionPool(connector=WrappingConnector(await background_nursery(), respond, Crashing))
    await pool.open()
    await pool.request("GET", URL)
    logger, handler = logging.getLogger("trio_exchange"), Failing()
    logger.addHandler(handler)
    try:
        with pytest.raises(Crash) as caught:
            await pool.aclose()
    finally:
        logger.removeHandler(handler)
    assert caught.value.__notes__ == ["Crash() could not be logged: ValueError('disk full')"]


async def test_a_crash_is_logged_at_once_and_raised_by_whoever_closes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    connector = WrappingConnector(await background_nursery(), respond, Crashing)
    pool = ConnectionPool(connector=connector, max_keepalive_connections=0)
    await pool.open()
    await pool.request("GET", URL)
    await trio.testing.wait_all_tasks_blocked()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "Crash" in caplog.text
    assert (await pool.request("GET", URL)).status == 200
    with pytest.raises(Crash):
        await pool.aclose()
    await pool.aclose()
    assert_unharmed(pool)


def test_a_crash_at_the_end_of_the_run_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        pool = ConnectionPool(connector=WrappingConnector(await background_nursery(), respond, Crashing))
        await pool.open()
        await pool.request("GET", URL)

    trio.run(main)
    assert "Crash" in caplog.text


def test_the_end_of_a_block_raises_a_crash_though_the_pool_was_opened_without_one_before() -> None:
    made: list[tuple[ConnectionPool, MemoryConnector]] = []

    async def without_block() -> None:
        connector = WrappingConnector(await background_nursery(), respond, Crashing)
        made.append((ConnectionPool(connector=connector), connector))
        await made[0][0].open()

    async def with_block() -> None:
        pool, connector = made[0]
        connector._nursery = await background_nursery()
        async with pool:
            await pool.request("GET", URL)
            await pool.aclose()
            closed.append(pool)

    closed: list[ConnectionPool] = []
    trio.run(without_block)
    with pytest.raises(Crash):
        trio.run(with_block)
    assert closed == [made[0][0]]


async def test_closing_ends_requests_of_other_tasks() -> None:
    pool = ConnectionPool(connector=MemoryConnector(await background_nursery(), mute), max_connections=1)

    async def ask() -> None:
        with pytest.raises((ReadError, RemoteProtocolError, ConnectionNotAvailable)):
            await pool.request("GET", URL)

    await pool.open()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        await pool.aclose()
    assert_unharmed(pool)


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_closing_under_a_request_that_waits_for_a_socket_says_so(begin: bytes) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(begin)
        answered.set()
        await peer.receive_some()

    answered = trio.Event()
    server = await serve_tcp(await background_nursery(), serve)
    pool = ConnectionPool()
    await pool.open()

    async def ask() -> None:
        with pytest.raises(ReadError, match=r"^the connection was closed$"):
            await pool.request("GET", server.url)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await answered.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await pool.aclose()


async def test_a_body_that_leaves_the_pool_does_not_wait_for_itself() -> None:
    async def content() -> AsyncGenerator[bytes]:
        yield b"first"
        await pool.__aexit__(None, None, None)

    async def listen(peer: ScriptedPeer) -> None:
        while await peer.receive_some():
            pass

    pool = ConnectionPool(connector=MemoryConnector(await background_nursery(), listen))
    await pool.__aenter__()
    with pytest.raises(NetworkError):
        await pool.request("POST", URL, content=content())
    await pool.aclose()
    assert_unharmed(pool)


async def test_a_connection_is_closed_though_its_closing_cannot_be_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise ValueError("disk full")

    logger = logging.getLogger("trio_exchange.connection")
    server = await serve_tcp(await background_nursery(), respond)
    pool = ConnectionPool()
    await pool.open()
    await pool.request("GET", server.url)
    [connection] = internals(pool)
    monkeypatch.setattr(logger, "filters", [fail])
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="disk full"):
        await pool.aclose()
    monkeypatch.undo()
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert connection.transport.peek() is Readiness.CLOSED


async def test_ctrl_c_in_the_clean_up_of_a_body_that_was_given_up_is_not_lost() -> None:
    async def content() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"piece"
                await trio.sleep(0.01)
        finally:
            raise KeyboardInterrupt

    async def answer_early(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        while await peer.receive_some():
            pass

    pool = ConnectionPool(connector=MemoryConnector(await background_nursery(), answer_early))
    await pool.open()
    response = await pool.handle_async_request(Request("POST", URL, content=content()))
    with pytest.warns(ResourceWarning):
        del response
    await trio.testing.wait_all_tasks_blocked(0.01)
    with pytest.raises(KeyboardInterrupt):
        await pool.aclose()
