"""Certificates for scripted peers, issued by an authority that each process makes for itself."""

from __future__ import annotations

import functools
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trustme

# A ClientHello record begins with the type `handshake` and the version 3.x (RFC 8446, section 5.1). Neither
# an HTTP/1.1 request nor the preface of HTTP/2 begins with a control character.
CLIENT_HELLO = b"\x16\x03"


@functools.cache
def authority() -> trustme.CA:
    """The certificate authority of this process."""
    try:
        import trustme
    except ImportError as exc:
        raise ImportError(
            "TLS in trio_exchange.testing needs the trustme package: pip install 'trio-exchange[testing]'",
            name=exc.name,
        ) from exc
    return trustme.CA()


@functools.lru_cache(maxsize=256)
def server_context(host: str, alpn_protocols: tuple[str, ...]) -> ssl.SSLContext:
    """Make the TLS settings for a server: for the name that the client asks for (SNI), else for `host`."""

    def select_certificate(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name is not None:
            tls.context = server_context(name, alpn_protocols)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(alpn_protocols)
    context.sni_callback = select_certificate
    authority().issue_cert(host).configure_cert(context)
    return context
