"""Everything that this package uses of Trio and that Trio does not document.

Checked on Trio 0.31 and 0.35. `tests/connect/test_trio_internals.py` fails when a release of Trio changes
one of these.
"""

from __future__ import annotations

import re
import ssl
from typing import Any

import trio

#: The `strerror` that `trio.open_tcp_stream` gives to a failed attempt: the address as a tuple, the reason.
FAILED_ATTEMPT = re.compile(r"Error connecting to \('([^']*)', ([0-9]+)[^)]*\): .*")


def ssl_object(stream: trio.SSLStream[Any]) -> Any:
    """Return the `ssl.SSLObject` of a TLS stream, or the stream, which forwards the object's methods.

    `trio.SSLStream` offers no public name for the object itself, which is what `get_extra_info("ssl_object")`
    returns in httpcore.
    """
    return getattr(stream, "_ssl_object", stream)


def has_undecrypted(stream: trio.SSLStream[Any]) -> bool:
    """Return whether a TLS stream has received bytes that it has not decrypted yet.

    Without this, an idle connection that has received a whole record, such as one with a close_notify,
    would look quiet: the bytes are in the `ssl.MemoryBIO` and no longer in the socket.
    """
    return bool(stream._incoming.pending)


class TLSInternals:
    """The parts of a TLS stream that a `TLSStream` shares with it.

    Attributes:
        ssl_object: The `ssl.SSLObject`.
        incoming: The `ssl.MemoryBIO` of received bytes that are not decrypted yet.
        outgoing: The `ssl.MemoryBIO` of encrypted bytes that are not sent yet.
        receive_lock: Held by a task that receives from the transport in the stream's own methods.
    """

    __slots__ = ("_send_lock", "_state", "_stream", "incoming", "outgoing", "receive_lock", "ssl_object")

    def __init__(self, stream: Any) -> None:
        self.ssl_object: Any = stream._ssl_object
        self.incoming: ssl.MemoryBIO = stream._incoming
        self.outgoing: ssl.MemoryBIO = stream._outgoing
        self.receive_lock: trio.Lock = stream._inner_recv_lock
        self._send_lock = stream._inner_send_lock
        self._stream = stream
        # The stream's state after the handshake. A failed or cancelled send changes it.
        self._state = stream._state

    def may_send(self) -> bool:
        """Return whether no other task is sending, and no send has failed."""
        return not self._send_lock.locked() and self._stream._state is self._state

    async def flush(self) -> None:
        """Send what is in `outgoing`. A cancelled or failed send leaves the stream unusable."""
        await self._stream._retry(_nothing)


def _nothing() -> None:
    pass


_USED = (
    "_ssl_object",
    "_incoming",
    "_outgoing",
    "_inner_recv_lock",
    "_inner_send_lock",
    "_state",
    "_retry",
)


def tls_internals(stream: trio.SSLStream[Any]) -> TLSInternals | None:
    """Return the parts of a TLS stream whose handshake is complete, None if this Trio has other ones."""
    if all(hasattr(stream, name) for name in _USED):
        return TLSInternals(stream)
    return None
