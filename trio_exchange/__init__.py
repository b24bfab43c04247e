"""An HTTP client for Trio: HTTP/1.1 and HTTP/2, from connection pools that own their connections.

A single request, on a new connection:

    response = await trio_exchange.request("GET", "https://www.example.com/")

Any number of requests, on connections that a pool keeps and shares:

    async with trio_exchange.ConnectionPool() as pool:
        response = await pool.request("GET", "https://www.example.com/")
        print(response.status, response.headers.get("Content-Type"), response.content)
        async with pool.stream("GET", "https://www.example.com/large") as response:
            async for chunk in response.aiter_stream():
                print(len(chunk))

The other public types are `Request`, `Response`, `Headers`, `URL` and `Proxy`. Every error is an
`ExchangeError`, except errors about arguments. Features that have no place in HTTP's model of requests and
responses, such as timeouts and traces, use the `extensions` of requests and responses; the README describes
them. `trio_exchange.testing` has servers for tests.
"""

from ._api import request, stream
from ._connect.connector import Connector
from ._connect.network_stream import NetworkStream
from ._connect.tls import default_ssl_context
from ._exceptions import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectTimeout,
    ExchangeError,
    InvalidURL,
    LocalProtocolError,
    NetworkError,
    PoolTimeout,
    ProtocolError,
    ProxyError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    TimeoutException,
    UnsupportedProtocol,
    WriteError,
    WriteTimeout,
)
from ._fields import Headers
from ._http.connection import PooledConnection
from ._models import Proxy, Request, Response
from ._pool import ConnectionPool, PoolStatistics
from ._proxies.environment import proxy_from_environment
from ._urls import URL, Origin

__version__ = "0.1.0"

__all__ = [
    "URL",
    "ConnectError",
    "ConnectTimeout",
    "ConnectionNotAvailable",
    "ConnectionPool",
    "Connector",
    "ExchangeError",
    "Headers",
    "InvalidURL",
    "LocalProtocolError",
    "NetworkError",
    "NetworkStream",
    "Origin",
    "PoolStatistics",
    "PoolTimeout",
    "PooledConnection",
    "ProtocolError",
    "Proxy",
    "ProxyError",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "Request",
    "Response",
    "TimeoutException",
    "UnsupportedProtocol",
    "WriteError",
    "WriteTimeout",
    "default_ssl_context",
    "proxy_from_environment",
    "request",
    "stream",
]

# Let tracebacks and pickles name `trio_exchange.ConnectError`, not the private module that defines it.
for _name in __all__:
    globals()[_name].__module__ = __name__


def __dir__() -> list[str]:
    """List the public names, without the private modules."""
    return [name for name in globals() if name.startswith("__") or not name.startswith("_")]
