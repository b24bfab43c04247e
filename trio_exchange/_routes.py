"""From a request to its route: which connections can carry it, and how a new one is made."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from ._exceptions import UnsupportedProtocol
from ._models import DEFAULT_PORTS, Origin, Request
from ._tls import TLSSettings, default_context_for

_SECURE = frozenset((b"https", b"wss"))


class Route(NamedTuple):
    """What makes a connection another connection; requests with equal routes share connections."""

    scheme: bytes
    host: bytes
    port: int
    server_hostname: str | None

    @property
    def origin(self) -> Origin:
        """Whom the connection is to."""
        return Origin(self.scheme, self.host, self.port)


def route_for(request: Request) -> Route:
    """The route of a request.

    Raises:
        UnsupportedProtocol: The URL's scheme is missing or unknown.
        ValueError: The URL has no host, or the `sni_hostname` extension is empty.
        TypeError: The `sni_hostname` extension is not text.
    """
    url = request.url
    default_port = DEFAULT_PORTS.get(url.scheme)
    if default_port is None:
        raise UnsupportedProtocol(
            f"the URL's scheme must be http, https, ws or wss, not {url.scheme.decode('latin-1')!r}"
        )
    if not url.host:
        raise ValueError(f"the URL has no host: {bytes(url)!r}")
    server_hostname = None
    if url.scheme in _SECURE:
        server_hostname = _server_hostname(request)
    return Route(url.scheme, url.host, url.port or default_port, server_hostname)


def _server_hostname(request: Request) -> str:
    """The name to ask for and verify: without the root's dot and a zone, which are not part of it."""
    name = request.extensions.get("sni_hostname")
    if name is None:
        name = request.url.host.partition(b"%")[0]
    if isinstance(name, bytes):
        name = name.decode("latin-1")
    if not isinstance(name, str):
        raise TypeError(f"the sni_hostname extension must be str or bytes, but got {type(name).__name__}")
    name = name.removesuffix(".")
    if not name:
        raise ValueError(f"TLS needs a host name, not {name!r}")
    return name


def tls_settings(
    route: Route, ssl_context: ssl.SSLContext | None, alpn: tuple[str, ...]
) -> TLSSettings | None:
    """The TLS of a new connection, None for none.

    Args:
        route: Where to.
        ssl_context: The pool's, or None for the default.
        alpn: The protocols that the pool speaks.
    """
    if route.server_hostname is None:
        return None
    if ssl_context is None:
        ssl_context = default_context_for(alpn)
    return TLSSettings(ssl_context, route.server_hostname, alpn)
