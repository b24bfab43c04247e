"""From a request to its route: which connections can carry it, and how a new one is made.

A `Route` is the key under which connections are shared. An `Endpoint` is what all routes of one kind have
in common, to origins or to a proxy: how to get there, with which TLS, and what may be spoken there.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import NamedTuple

import trio

from .._exceptions import InvalidURL, UnsupportedProtocol
from .._models import Proxy, Request
from .._urls import DEFAULT_PORTS, Origin, scheme_hint, unless_secret, without_tls
from .attempt import Attempt, Connection
from .dialers import Dialer
from .tls import TLSSettings, default_context_for, encrypt

#: The scheme of routes for who speaks something else than HTTP.
TCP = b"tcp"

_SECURE = frozenset((b"https", b"wss"))


class ConnectionKey(NamedTuple):
    """What makes a connection another connection; requests with equal routes share connections."""

    scheme: bytes
    host: bytes
    port: int
    server_hostname: str | None
    to_proxy: bool = False

    @property
    def origin(self) -> Origin:
        """Whom the connection is to."""
        return Origin(self.scheme, self.host, self.port)


def key_for(request: Request) -> ConnectionKey:
    """The route of a request, if it is sent to its origin.

    Raises:
        UnsupportedProtocol: The URL's scheme is missing or unknown.
        InvalidURL: The URL has no host.
        ValueError: The `sni_hostname` extension is empty.
        TypeError: The `sni_hostname` extension is not text.
    """
    url = request.url
    default_port = DEFAULT_PORTS.get(url.scheme)
    if default_port is None:
        shown = unless_secret(f", not {url.scheme.decode('latin-1')!r}{scheme_hint(url)}", bytes(url))
        raise UnsupportedProtocol(f"the URL's scheme must be http, https, ws or wss{shown}")
    if not url.host:
        shown = unless_secret(f": {str(url)!r}", bytes(url))
        raise InvalidURL(f"the URL has no host{shown}")
    server_hostname = None
    if url.scheme in _SECURE:
        server_hostname = _server_hostname(url.host, request.extensions.get("sni_hostname"))
    return ConnectionKey(url.scheme, url.host, url.port or default_port, server_hostname)


def key_to_proxy(proxy: Proxy) -> ConnectionKey:
    """The route of what is sent to a proxy itself."""
    origin = proxy.url.origin
    server_hostname = _server_hostname(origin.host) if origin.scheme in _SECURE else None
    return ConnectionKey(origin.scheme, origin.host, origin.port, server_hostname, to_proxy=True)


def _server_hostname(host: bytes, sni_hostname: object = None) -> str:
    """The name to ask for and verify: without the root's dot and a zone, which are not part of it."""
    name = host.partition(b"%")[0] if sni_hostname is None else sni_hostname
    if isinstance(name, bytes):
        name = name.decode("latin-1")
    if not isinstance(name, str):
        raise TypeError(f"the sni_hostname extension must be str or bytes, but got {type(name).__name__}")
    name = name.removesuffix(".")
    if not name:
        raise ValueError(f"TLS needs a host name, not {name!r}")
    return name


@dataclass(frozen=True)
class ConnectionFactory:
    """What routes of one kind lead to.

    Attributes:
        way: How to get there.
        ssl_context: For TLS, None for the default. The offer is written to it.
        http1: Whether to speak HTTP/1.1 there.
        http2: Whether to speak HTTP/2 there.
        tls_trace_point: What the TLS handshake is called in traces.
    """

    dialer: Dialer
    ssl_context: ssl.SSLContext | None = None
    http1: bool = True
    http2: bool = False
    tls_trace_point: str = "connection.start_tls"

    @property
    def alpn(self) -> tuple[str, ...]:
        """What is offered to servers (RFC 7301), by the registered names, the best first."""
        return ("h2",) * self.http2 + ("http/1.1",) * self.http1

    def tls_settings(self, key: ConnectionKey) -> TLSSettings | None:
        """The TLS of a new connection, None for none."""
        if key.server_hostname is None:
            return None
        ssl_context = self.ssl_context
        if ssl_context is None:
            ssl_context = default_context_for(self.alpn)
        whom = f"the proxy {key.origin}" if key.to_proxy else key.server_hostname
        return TLSSettings(
            ssl_context, key.server_hostname, self.alpn, whom, plain_url=str(without_tls(key.origin))
        )

    async def connect(self, key: ConnectionKey, attempt: Attempt) -> Connection:
        """Establish a connection, TLS included.

        Raises:
            ConnectError: It could not be established.
            ConnectTimeout: The attempt has no time left.
            ProxyError: A proxy on the way refused or failed.
        """
        tls = self.tls_settings(key)
        transport = await self.dialer.connect(key.host.decode("ascii"), key.port, attempt)
        if tls is None:
            return Connection(transport, transport)
        return await encrypt(transport, tls, self.tls_trace_point, attempt)

    def may_share(self, key: ConnectionKey) -> bool:
        """Whether connections might turn out to carry several requests at once."""
        if key.scheme == TCP:
            return False
        return self.http2 and (not self.http1 or key.server_hostname is not None)

    def speaks_http2(self, connection: Connection) -> bool:
        """Whether HTTP/2 is spoken on a new connection."""
        if not (self.http1 and self.http2):
            return self.http2
        tls = connection.stream
        return isinstance(tls, trio.SSLStream) and tls.selected_alpn_protocol() == "h2"
