"""The modules of a protocol are imported with the first pool that may speak it, and not before."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import sys
import trio_exchange
{before}
protocols = ("h11", "h2", "hpack", "trio_exchange._http.http11", "trio_exchange._http.http2.connection")
print(*(name for name in protocols if name in sys.modules))
"""
HTTP11 = ["h11", "trio_exchange._http.http11"]
HTTP2 = ["h2", "hpack", "trio_exchange._http.http2.connection"]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", []),
        ("trio_exchange.Proxy('https://proxy', http2=True)", []),
        ("trio_exchange.ConnectionPool()", HTTP11),
        ("trio_exchange.ConnectionPool(http1=False, http2=True)", HTTP2),
        ("trio_exchange.ConnectionPool(http2=True)", HTTP11 + HTTP2),
        (
            "trio_exchange.ConnectionPool("
            "http1=False, http2=True, proxy=trio_exchange.Proxy('socks5://proxy'))",
            HTTP2,
        ),
        # HTTP/1.1 to an HTTP proxy is always possible.
        (
            "trio_exchange.ConnectionPool(proxy=trio_exchange.Proxy('https://proxy', http2=True))",
            HTTP11 + HTTP2,
        ),
        (
            "trio_exchange.ConnectionPool("
            "http1=False, http2=True, proxy=trio_exchange.Proxy('http://proxy'))",
            HTTP11 + HTTP2,
        ),
    ],
)
def test_a_pool_imports_the_protocols_that_it_may_speak(before: str, expected: list[str]) -> None:
    command = [sys.executable, "-c", _PROGRAM.format(before=before)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sorted(result.stdout.split()) == sorted(expected)
