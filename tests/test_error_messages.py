"""What somebody who is new to this library reads when something goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from trio_exchange import (
    ConnectionPool,
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
