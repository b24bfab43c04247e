"""Connection keys and connection factories: which requests may share a connection, and how one is made.

A `ConnectionKey` identifies a set of interchangeable connections. A `ConnectionFactory` holds the settings
that all keys of one kind have in common, to origins or to one proxy: the dialer, the TLS settings and the
versions of HTTP. It makes the byte stream; the manager makes the connection that speaks HTTP on it.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import NamedTuple

from .._exceptions import InvalidURL, UnsupportedProtocol
from .._models import Proxy, Request
from .._urls import DEFAULT_PORTS, Origin, scheme_hint, unless_secret, without_tls
from .attempt import Attempt, Established
from .dialers import Dialer
from .tls import TLSSettings, default_context_for, establish_tls
from .tls_sessions import TLSSessions
from .tls_stream import TLSStream

#: The scheme of the keys of connections that carry another protocol than HTTP.
TCP = b"tcp"

_SECURE = frozenset((b"https", b"wss"))


class ConnectionKey(NamedTuple):
    """Identifies interchangeable connections: requests with equal keys share them.

    Attributes:
        scheme: Such as `b"https"`, or `TCP`.
        host: Name or address, without brackets.
        port: Port number.
        server_hostname: The name to ask for (SNI) and to verify; None for a connection without TLS.
        to_proxy: Whether the connection is to a proxy, which forwards requests or opens tunnels.
    """

    scheme: bytes
    host: bytes
    port: int
    server_hostname: str | None
    to_proxy: bool = False

    @property
    def origin(self) -> Origin:
        """The origin, or the proxy's, that the connection is to."""
        return Origin(self.scheme, self.host, self.port)

    @classmethod
    def for_request(cls, request: Request) -> ConnectionKey:
        """Make the key of a connection to a request's origin.

        Raises:
            UnsupportedProtocol: The URL's scheme is missing or unknown.
            InvalidURL: The URL has no host.
            ValueError: The `sni_hostname` extension is empty.
            TypeError: The `sni_hostname` extension is neither str nor bytes.
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
        return cls(url.scheme, url.host, url.port or default_port, server_hostname)

    @classmethod
    def for_proxy(cls, proxy: Proxy) -> ConnectionKey:
        """Make the key of a connection to a proxy, for requests that are sent to the proxy itself."""
        origin = proxy.url.origin
        server_hostname = _server_hostname(origin.host) if origin.scheme in _SECURE else None
        return cls(origin.scheme, origin.host, origin.port, server_hostname, to_proxy=True)


def _server_hostname(host: bytes, sni_hostname: object = None) -> str:
    """Return the name for SNI and verification, without an IPv6 zone and without the dot of the DNS root."""
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
    """Makes connections, to origins or to one proxy.

    Attributes:
        dialer: Opens the byte stream.
        ssl_context: The TLS settings, None for the default; the ALPN offer is written to it.
        http1: Whether HTTP/1.1 may be spoken.
        http2: Whether HTTP/2 may be spoken.
        tls_trace_point: The name of the TLS handshake in traces.
        sessions: The TLS sessions to resume; None to resume none.
    """

    dialer: Dialer
    ssl_context: ssl.SSLContext | None = None
    http1: bool = True
    http2: bool = False
    tls_trace_point: str = "connection.start_tls"
    sessions: TLSSessions | None = None

    @property
    def alpn(self) -> tuple[str, ...]:
        """The protocols to offer (RFC 7301), the preferred first."""
        return ("h2",) * self.http2 + ("http/1.1",) * self.http1

    def tls_settings(self, key: ConnectionKey) -> TLSSettings | None:
        """Return the TLS settings for a new connection, None for a connection without TLS."""
        if key.server_hostname is None:
            return None
        ssl_context = self.ssl_context
        if ssl_context is None:
            ssl_context = default_context_for(self.alpn)
        peer_name = f"the proxy {key.origin}" if key.to_proxy else key.server_hostname
        return TLSSettings(
            ssl_context,
            key.server_hostname,
            self.alpn,
            peer_name,
            plain_url=str(without_tls(key.origin)),
            peer=key,
            sessions=self.sessions,
        )

    async def connect(self, key: ConnectionKey, attempt: Attempt) -> Established:
        """Establish a connection, including TLS.

        Args:
            key: The key of the new connection.
            attempt: The attempt that this is; it owns what is opened.

        Raises:
            ConnectError: The connection could not be established.
            ConnectTimeout: The attempt's budget is exhausted.
            ProxyError: A proxy on the way refused or failed.
        """
        tls = self.tls_settings(key)
        transport = await self.dialer.connect(key.host.decode("ascii"), key.port, attempt)
        if tls is None:
            return Established(transport, transport)
        return await establish_tls(transport, tls, self.tls_trace_point, attempt)

    def may_share(self, key: ConnectionKey) -> bool:
        """Return whether a new connection may turn out to carry concurrent requests (HTTP/2)."""
        if key.scheme == TCP:
            return False
        return self.http2 and (not self.http1 or key.server_hostname is not None)

    def speaks_http2(self, established: Established) -> bool:
        """Return whether to speak HTTP/2 on a new connection: by ALPN, or because only HTTP/2 is allowed."""
        if not (self.http1 and self.http2):
            return self.http2
        tls = established.stream
        return isinstance(tls, TLSStream) and tls.trio_stream.selected_alpn_protocol() == "h2"
