"""The TLS handshake as a client, and what its failures mean."""

from __future__ import annotations

import ssl
from typing import Any

import trio

from .._exceptions import ConnectError
from .transport import explain, is_alert

# The content types that a TLS record may begin with (RFC 8446, section 5.1).
_TLS_RECORDS = range(20, 25)
# How many of the first received bytes are kept for an error message.
_BEGINNING = 20


class _RecordingStream:
    """Stands below TLS during the handshake, and keeps the first bytes received for an error message."""

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


async def handshake(tls: trio.SSLStream[Any], peer_name: str | None, plain_url: str | None = None) -> None:
    """Do the TLS handshake of a new `trio.SSLStream`, and explain its failure.

    Args:
        tls: The stream, on which nothing was sent or received yet.
        peer_name: The name of the server or proxy, for the error message.
        plain_url: The URL without TLS, for the error message if the server answers without TLS.

    Raises:
        ConnectError: The handshake failed; the message says why.
    """
    below: Any = _RecordingStream(tls.transport_stream)
    tls.transport_stream = below
    try:
        await tls.do_handshake()
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise ConnectError(_explain_handshake(exc, peer_name, plain_url, below.received)) from exc
    finally:
        tls.transport_stream = below.stream


def _explain_handshake(
    exc: trio.BrokenResourceError | trio.ClosedResourceError,
    peer_name: str | None,
    plain_url: str | None,
    received: bytes,
) -> str:
    reason = exc.__cause__ if exc.__cause__ is not None else exc
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"the certificate of {peer_name} could not be verified: {reason.verify_message}"
    detail: object = explain(exc) if is_alert(exc) else reason
    if received and received[0] not in _TLS_RECORDS:
        detail = f"the server does not speak TLS on this port: it sent {received[:_BEGINNING]!r}"
        # Some servers answer a ClientHello with an error page without a response head, as in HTTP/0.9.
        if plain_url is not None and received.startswith((b"HTTP/", b"<")):
            detail = f"{detail}; use {plain_url}"
    return f"the TLS handshake with {peer_name} failed: {detail}"
