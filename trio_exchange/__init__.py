"""The HTTP client for Trio programs: low level, structured, with nothing hidden.

The pool sends requests and gives responses; what belongs to a request and has no place in HTTP's own
model travels in `extensions`, both ways. The README describes them.
"""

from ._connectors import Connector
from ._environment import proxy_from_environment
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
from ._models import URL, Headers, Origin, Proxy, Request, Response
from ._pool import ConnectionPool, PoolStatistics, request, stream
from ._streams import NetworkStream
from ._tls import default_ssl_context

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
