"""The class of connection for each protocol, imported when a pool is made that may speak the protocol.

`import trio_exchange` would take twice its CPU time with both: the modules of HTTP/2, with h2, hpack
and hyperframe, take about 12 ms, and those of HTTP/1.1, with h11, about 8 ms. Most pools never speak HTTP/2.
The constructors of pools do the import, so that no request waits for it.
"""

from __future__ import annotations

import functools

import trio

from .._connect.factory import ConnectionFactory
from .._http.connection import HTTPConnection


@functools.cache
def connection_class(*, http2: bool) -> type[HTTPConnection]:
    """Return the class of connections that speak HTTP/2 or HTTP/1.1. The first call imports it."""
    if http2:
        from .._http.http2.connection import HTTP2Connection

        return HTTP2Connection
    from .._http.http11 import HTTP11Connection

    return HTTP11Connection


@trio.lowlevel.enable_ki_protection
def import_protocols(factory: ConnectionFactory) -> None:
    """Import the protocols that the connections of a factory may speak.

    Ctrl-C takes effect after the import: in a callback of a weak reference, which may run during an import,
    Python would discard a KeyboardInterrupt.
    """
    if factory.http1:
        connection_class(http2=False)
    if factory.http2:
        connection_class(http2=True)
