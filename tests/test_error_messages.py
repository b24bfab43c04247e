"""What somebody who is new to this library reads when something goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from trio_exchange import (
    ConnectionPool,
    PoolTimeout,
)
from trio_exchange.testing import MemoryConnector

from .peers import respond

URL = "http://example.com/"


# -- Near misses.


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("timeouts", "timeout"),
        ("Timeout", "timeout"),
        ("TIMEOUT", "timeout"),
        ("time_out", "timeout"),
        ("sni", "sni_hostname"),
        ("SNI", "sni_hostname"),
        ("sni_host_name", "sni_hostname"),
        ("sni_host", "sni_hostname"),
        ("server_hostname", "sni_hostname"),
        ("tracer", "trace"),
        ("on_trace", "trace"),
        ("targets", "target"),
        ("info", "informational"),
        ("protocols", "protocol"),
    ],
)
async def test_an_extension_that_was_nearly_named_right(
    nursery: trio.Nursery, given: str, meant: str
) -> None:
    connector = MemoryConnector(nursery, respond)
    extensions = {"timeout": {"read": 1}, given: None}
    expected = f"unknown extension '{given}', did you mean '{meant}'"
    async with ConnectionPool(connector=connector) as pool:
        with pytest.raises(ValueError, match=expected):
            await pool.request("GET", URL, extensions=extensions)
        with pytest.raises(ValueError, match=expected):
            await pool.open_tcp_stream("example.com", 80, extensions=extensions)
    assert connector.dialled == []


@pytest.mark.parametrize(
    "name",
    [
        "trace_id",
        "retries",
        "cache",
        "user",
        "id",
        "x",
        "follow_redirects",
        "http_version",
        "network_stream",
        "reason_phrase",
        "stream_id",
        "trailing_headers",
        b"timeouts",
        5,
        None,
    ],
)
async def test_other_names_are_the_callers_own(nursery: trio.Nursery, name: Any) -> None:
    async with ConnectionPool(connector=MemoryConnector(nursery, respond)) as pool:
        response = await pool.request("GET", URL, extensions={name: 1, "timeout": None})
        assert response.status == 200
        await (await pool.open_tcp_stream("example.com", 80, extensions={name: 1})).aclose()


# -- What a pool was doing.


async def test_a_pool_timeout_says_what_the_pool_was_doing(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    connector = MemoryConnector(nursery, respond)
    async with (
        ConnectionPool(connector=connector, max_connections=4) as pool,
        trio.open_nursery() as tasks,
        pool.stream("GET", URL),
    ):
        await trio.sleep(30)
        async with pool.stream("GET", "http://other.example/"):
            connector.gate = trio.Event()
            for host in ("a", "b", "c"):
                tasks.start_soon(pool.request, "GET", f"http://{host}/")
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(PoolTimeout) as info:
                await pool.request("GET", URL, timeout={"pool": 2.5})
            connector.gate.set()
    assert str(info.value) == (
        "no connection became available within 2.5 seconds; connections: 4 of at most 4 "
        "(2 active, the longest for 32.5 seconds, 2 connecting), to http://example.com:80: 1; "
        "other requests waiting: 1"
    )
    assert info.value.__suppress_context__


async def test_a_pool_timeout_tells_of_the_limit_for_an_origin(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    connector = MemoryConnector(nursery, respond)
    async with ConnectionPool(connector=connector, max_connections=9, max_connections_per_origin=1) as pool:
        await pool.request("GET", "http://idle.example/")
        async with pool.stream("GET", URL):
            with pytest.raises(PoolTimeout) as info:
                await pool.request("GET", URL, timeout={"pool": 0})
    assert str(info.value) == (
        "no connection became available within 0 seconds; connections: 2 of at most 9 "
        "(1 active, the longest for 0.0 seconds, 1 idle, 0 connecting), to http://example.com:80: "
        "1 of at most 1; other requests waiting: 0"
    )


async def test_a_pool_timeout_without_a_limit(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Requests wait for the one that finds out whether the server speaks HTTP/2."""
    connector = MemoryConnector(nursery, respond)
    connector.gate = trio.Event()
    async with (
        ConnectionPool(connector=connector, max_connections=None, http2=True) as pool,
        trio.open_nursery() as tasks,
    ):
        tasks.start_soon(pool.request, "GET", "https://example.com/")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(PoolTimeout) as info:
            await pool.request("GET", "https://example.com/", timeout={"pool": 1})
        tasks.cancel_scope.cancel()
    assert str(info.value) == (
        "no connection became available within 1 seconds; connections: 1 (0 active, 1 connecting), "
        "to https://example.com:443: 1; other requests waiting: 0"
    )


async def test_how_long_a_connection_has_been_active(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    async with ConnectionPool(connector=MemoryConnector(nursery, respond)) as pool:
        assert pool.statistics().longest_active is None
        async with pool.stream("GET", URL):
            assert pool.statistics().longest_active == 0
            await trio.sleep(10)
            async with pool.stream("GET", URL):
                await trio.sleep(5)
                assert pool.statistics().longest_active == 15
        assert pool.statistics().longest_active is None
        # Every request on a kept connection counts anew.
        async with pool.stream("GET", URL):
            await trio.sleep(3)
            assert pool.statistics().longest_active == 3


async def test_a_pool_can_be_shown_where_there_is_no_clock(nursery: trio.Nursery) -> None:
    async with ConnectionPool(connector=MemoryConnector(nursery, respond)) as pool, pool.stream("GET", URL):
        shown = await trio.to_thread.run_sync(repr, pool)
    assert shown == "<ConnectionPool open: 1 active, 0 idle, 0 connecting, 0 waiting>"
