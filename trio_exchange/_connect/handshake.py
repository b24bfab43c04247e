"""The TLS handshake as a client, and what its failures mean."""

from __future__ import annotations

import ssl
from typing import Any

import trio

from .._exceptions import ConnectError
from .transport import explain, is_alert

# What a record may begin with (RFC 8446, 5.1).
_TLS_RECORDS = range(20, 25)
# How much is kept of what is received instead of TLS.
_BEGINNING = 20


class _Beginning:
    """Below TLS during the handshake: keeps the first bytes that were received, for an error's message."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.received = b""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.stream.receive_some(max_bytes)
        if len(self.received) < _BEGINNING:
            self.received += data[:_BEGINNING]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)


async def handshake(tls: trio.SSLStream[Any], host: str | None, plain_url: str | None = None) -> None:
    """Do the TLS handshake.

    Args:
        tls: A fresh stream.
        host: Whom it is with, for the error's message.
        plain_url: The URL to use instead if there is no TLS, for the error's message.

    Raises:
        ConnectError: The handshake failed.
    """
    below: Any = _Beginning(tls.transport_stream)
    tls.transport_stream = below
    try:
        await tls.do_handshake()
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise ConnectError(_explain_handshake(exc, host, plain_url, below.received)) from exc
    finally:
        tls.transport_stream = below.stream


def _explain_handshake(
    exc: trio.BrokenResourceError | trio.ClosedResourceError,
    host: str | None,
    plain_url: str | None,
    received: bytes,
) -> str:
    reason = exc.__cause__ if exc.__cause__ is not None else exc
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"the certificate of {host} could not be verified: {reason.verify_message}"
    said: object = explain(exc) if is_alert(exc) else reason
    if received and received[0] not in _TLS_RECORDS:
        said = f"the server does not speak TLS on this port: it sent {received[:_BEGINNING]!r}"
        # Some servers answer what is no request by a page without a head, as in HTTP/0.9.
        if plain_url is not None and received.startswith((b"HTTP/", b"<")):
            said = f"{said}; use {plain_url}"
    return f"the TLS handshake with {host} failed: {said}"
