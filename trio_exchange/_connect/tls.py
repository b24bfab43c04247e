"""TLS settings, and TLS as a client on a dialled stream."""

from __future__ import annotations

import functools
import os
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from .._exceptions import ConnectError
from .attempt import Attempt, Connection
from .handshake import handshake
from .network_stream import NOT_RAW, NetworkStream
from .transport import Transport


def default_ssl_context() -> ssl.SSLContext:
    """The TLS settings for those who have none of their own.

    They verify the server's certificate and name, against the system's trust store, or against what the
    environment variables SSL_CERT_FILE and SSL_CERT_DIR name. On macOS the trust store can be reached
    only with the `truststore` package (the extra `trio-exchange[truststore]`), and is used if that is
    installed.

    Returns:
        A context that is made once, while those variables stay as they are, and shared by all callers.
        Don't change it; for other settings start from `ssl.create_default_context()`.

    Raises:
        OSError: SSL_CERT_FILE or SSL_CERT_DIR names what can't be read.
        ssl.SSLError: What it names is not a certificate store.
    """
    return default_context_for(())


def default_context_for(alpn: Sequence[str]) -> ssl.SSLContext:
    """The default settings, in a context for those who offer the protocols `alpn` (RFC 7301).

    The offer is part of a context, so that every offer needs a context of its own: were there only one,
    a pool's offer of HTTP would also be made by whoever starts TLS for another protocol.
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
    """How to start TLS with an origin.

    Attributes:
        context: The settings. The pool's offer is written to it.
        server_hostname: The name to ask for (SNI) and to verify.
        alpn: The protocols to offer.
        whom: Whom it is with, for errors' messages.
        plain_url: The URL of the same port without TLS, for errors' messages.
    """

    context: ssl.SSLContext
    server_hostname: str
    alpn: tuple[str, ...]
    whom: str
    plain_url: str | None = None


async def start_tls(transport: Transport, settings: TLSSettings) -> trio.SSLStream[Transport]:
    """Do a TLS handshake as the client.

    Args:
        transport: The connection so far; the caller closes it if this fails.
        settings: What to ask for, and what to accept.

    Raises:
        ConnectError: The handshake failed, or the name can't be one.
    """
    try:
        # With no await between, so that another pool's offer on the same context does no harm.
        settings.context.set_alpn_protocols(settings.alpn)
        tls = trio.SSLStream(
            transport,
            settings.context,
            server_hostname=settings.server_hostname,
            https_compatible=True,
        )
    except (TypeError, ValueError) as exc:
        # A zero byte is a TypeError.
        raise ConnectError(f"TLS can't be started for {settings.server_hostname!r}: {exc}") from exc
    await handshake(tls, settings.whom, settings.plain_url)
    return tls


async def encrypt(transport: Transport, tls: TLSSettings, trace_point: str, attempt: Attempt) -> Connection:
    """Start TLS.

    Args:
        transport: The connection so far; the attempt owns it.
        tls: What to ask for, and what to accept.
        trace_point: The step's name.
        attempt: Of which this is a step.

    Raises:
        ConnectError: The handshake failed.
        ConnectTimeout: The attempt has no time left.
    """
    info = {"ssl_context": tls.context, "server_hostname": tls.server_hostname}
    async with attempt.step(f"in the TLS handshake with {tls.whom}", trace_point, info) as step:
        encrypted = await attempt.budget.spend(start_tls, transport, tls)
        step.result = NetworkStream(encrypted, refusal=NOT_RAW)
    return Connection(transport, encrypted)
