"""TLS settings, the default SSL context, and starting TLS on a transport."""

from __future__ import annotations

import functools
import os
import ssl
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import trio

from .._exceptions import ConnectError
from .attempt import Attempt, Established
from .handshake import handshake
from .network_stream import NOT_RAW, NetworkStream
from .tls_sessions import Resumption, TLSSessions, verifies_alone
from .tls_stream import TLSStream
from .transport import Transport


def default_ssl_context() -> ssl.SSLContext:
    """Return the TLS settings that are used where no `ssl_context` is given.

    They verify the server's certificate and name, against the system's trust store, or against the file and
    directory in the environment variables SSL_CERT_FILE and SSL_CERT_DIR. On macOS OpenSSL cannot read the
    trust store: there it is used only if the `truststore` package is installed (the extra
    `trio-exchange[truststore]`).

    Returns:
        A shared context, made anew only when those variables change. Do not modify it; for other settings
        start from `ssl.create_default_context()`.

    Raises:
        OSError: The file or directory that SSL_CERT_FILE or SSL_CERT_DIR names can't be read.
        ssl.SSLError: It contains no certificates.
    """
    return default_context_for(())


def default_context_for(alpn: Sequence[str]) -> ssl.SSLContext:
    """Return the default settings, in a context for the ALPN offer `alpn` (RFC 7301).

    The offer is part of the context, so that each offer needs its own. With a single context a program that
    calls `default_ssl_context()` to speak another protocol would send a pool's offer of HTTP.
    """
    return _make_context(tuple(alpn), os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=16)
def _make_context(alpn: tuple[str, ...], cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:
    if cert_file or cert_dir:
        return ssl.create_default_context(cafile=cert_file or None, capath=cert_dir or None)
    return _system_context()


def _system_context() -> ssl.SSLContext:
    if sys.platform == "darwin":
        # OpenSSL can't read the Keychain.
        try:
            import truststore
        except ImportError:
            pass
        else:
            return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return ssl.create_default_context()


@dataclass(frozen=True)
class TLSSettings:
    """The settings for one TLS handshake.

    Attributes:
        context: The SSL context; the ALPN offer is written to it.
        server_hostname: The name to ask for (SNI) and to verify.
        alpn: The protocols to offer.
        peer_name: The name of the server or proxy, for error messages.
        plain_url: The URL of the same port without TLS, for error messages.
        peer: Identifies the server or proxy, including `server_hostname`, to resume sessions with it.
        sessions: The sessions to resume; None to resume none.
    """

    context: ssl.SSLContext
    server_hostname: str
    alpn: tuple[str, ...]
    peer_name: str
    plain_url: str | None = None
    peer: Hashable = None
    sessions: TLSSessions | None = None

    def resumption(self) -> Resumption | None:
        """Look for a session to resume; None if no sessions are used."""
        if self.sessions is None or not verifies_alone(self.context):
            return None
        return Resumption(self.sessions, self.peer, self.context, self.alpn)


async def start_tls(transport: Transport, settings: TLSSettings) -> TLSStream:
    """Do a TLS handshake as the client.

    Args:
        transport: The transport to start TLS on; the caller closes it if this fails.
        settings: The settings of the handshake.

    Returns:
        The encrypted stream.

    Raises:
        ConnectError: The handshake failed, or the server name is not a valid host name.
    """
    try:
        # No await between these two: another pool may write its own offer to the same context.
        settings.context.set_alpn_protocols(settings.alpn)
        tls = trio.SSLStream(
            transport,
            settings.context,
            server_hostname=settings.server_hostname,
            https_compatible=True,
        )
    except (TypeError, ValueError) as exc:
        # ssl raises TypeError for a NUL byte in the name.
        raise ConnectError(f"TLS can't be started for {settings.server_hostname!r}: {exc}") from exc
    resumption = settings.resumption()
    if resumption is not None and resumption.offered is not None:
        tls.session = resumption.offered
    try:
        await handshake(tls, settings.peer_name, settings.plain_url)
    except BaseException:
        if resumption is not None:
            resumption.failed()
        raise
    return TLSStream(tls, resumption)


async def establish_tls(
    transport: Transport, tls: TLSSettings, trace_point: str, attempt: Attempt
) -> Established:
    """Start TLS on a transport, as a step of an attempt.

    Args:
        transport: The transport, which the attempt owns.
        tls: The settings of the handshake.
        trace_point: The name of the step in traces.
        attempt: The attempt that this is a step of.

    Raises:
        ConnectError: The handshake failed.
        ConnectTimeout: The attempt's budget is exhausted.
    """
    info = {"ssl_context": tls.context, "server_hostname": tls.server_hostname}
    async with attempt.step(f"in the TLS handshake with {tls.peer_name}", trace_point, info) as step:
        encrypted = await attempt.budget.spend(start_tls, transport, tls)
        step.result = NetworkStream(encrypted.trio_stream, refusal=NOT_RAW)
    return Established(transport, encrypted)
