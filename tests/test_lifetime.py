"""Where a pool lives: in a block, in a nursery, or for the whole `trio.run`; and what Ctrl-C does to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.harness.checks import assert_unharmed, open_sockets
from tests.harness.peers import mute, respond
from tests.harness.servers import background_nursery, serve_tcp
from tests.harness.streams import Crash, Crashing, WrappingConnector
from trio_exchange import ConnectionNotAvailable, ConnectionPool, ReadError, RemoteProtocolError
from trio_exchange.testing import MemoryConnector

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
