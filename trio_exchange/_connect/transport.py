"""The byte stream that a connection runs on.

Theory of operation. A connection reads and writes through a `Transport`, which adds to the dialled Trio
stream what HTTP needs and Trio's streams don't offer:

- *Attempts that don't wait.* `send_nowait` saves the scheduler pass that `send_all` costs even when the
  kernel takes everything at once. `peek` asks the kernel about an idle connection. Both work on a second
  `socket` object for the same file descriptor; it is detached before the descriptor is closed, and every
  use checks that the descriptor is still open, since the kernel reuses the numbers.
- *Probing.* While `probing` is set, `receive_some` raises `WouldBlock` where it would wait. Below a
  `trio.SSLStream` this reads what has arrived, and only that, without damage: the stream tolerates a
  receive that fails, which it doesn't of a send.
- *Remembered send errors.* `trio.SSLStream` refuses to read after a failed send. But a server may answer
  and close before it has read a request whole; the answer is there to be read, or the alert that says why
  it closed. So while `defer_errors` is set, a failing send is kept in `send_error` instead of being raised.

Through proxies one transport may lie on top of another, with TLS or a stream of HTTP/2 between. What is asked
of the upper one it asks of what is below (`poll`, `_probe_below`, `send_error`, `defer_errors`).
"""

from __future__ import annotations

import abc
import enum
import re
import select
import socket
import ssl
from typing import Any

import trio

from .._exceptions import without_frames
from .trio_internals import undecrypted_bytes

RECEIVE_SIZE = 65536
# In how many pieces may be received without waiting what nobody asked for.
MOST_PROBES = 8

# How an alert begins (RFC 8446, 5.1).
TLS_ALERT = b"\x15\x03"


class WouldBlock(Exception):
    """Nothing has arrived, and the transport is only probing."""


# How OpenSSL names the alerts that it receives (RFC 8446, 6), by the protocol that introduced them.
_ALERT = re.compile(r"(?:SSLV3_ALERT|TLSV1_ALERT|TLSV13_ALERT|TLSV1)_(\w+)")


def explain(error: trio.BrokenResourceError | trio.ClosedResourceError) -> str:
    """What a stream's error says, or means by its type or its cause."""
    if str(error):
        return str(error)
    if isinstance(error, trio.ClosedResourceError):
        return "the connection was closed"
    if isinstance(error.__cause__, ssl.SSLError):
        return _explain_tls(error.__cause__)
    return "the connection broke"


def is_alert(error: BaseException | None) -> bool:
    """Whether a stream's error is a TLS alert from the server."""
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) else None
    return isinstance(cause, ssl.SSLError) and _ALERT.fullmatch(cause.reason or "") is not None


def _explain_tls(error: ssl.SSLError) -> str:
    reason = error.reason or str(error)
    alert = _ALERT.fullmatch(reason)
    words = (reason if alert is None else alert[1]).lower().replace("_", " ")
    return f"TLS failed: {words}" if alert is None else f"the server sent the TLS alert '{words}'"


class Readiness(enum.Enum):
    """What the kernel knows of a connection without reading from it."""

    QUIET = enum.auto()
    READABLE = enum.auto()
    CLOSED = enum.auto()


class Pollable(trio.abc.Stream):
    """A stream that knows what has arrived."""

    @abc.abstractmethod
    def peek(self) -> Readiness:
        """What receiving would find, without waiting."""


def poll(stream: trio.abc.Stream) -> Readiness:
    """What receiving from a stream would find, or in the layers below; quiet is also what is not known."""
    match stream:
        case Pollable():
            return stream.peek()
        case trio.SSLStream() if _pollable_below(stream) is not None:
            readiness = poll(stream.transport_stream)
            pending = readiness is Readiness.QUIET and undecrypted_bytes(stream)
            return Readiness.READABLE if pending else readiness
    return Readiness.QUIET


class Transport(Pollable):
    """The stream that a connection runs on, with attempts that don't wait where it is a socket.

    Args:
        stream: What to send on and receive from.
        bottom: The stream below it that is asked what has arrived, if that is another one.
        unread: What was received already.

    Attributes:
        stream: The stream as it was dialled, or as a proxy handed it over.
        probing: If not 0, receiving may not wait, nor be done so many times: a peer that always has more
            to say would otherwise be listened to for ever.
        below: The next transport below, if there is one.
        bytes_sent: How many bytes the stream has accepted, at most.
    """

    def __init__(
        self, stream: trio.abc.Stream, *, bottom: trio.abc.Stream | None = None, unread: bytes = b""
    ) -> None:
        self.stream: trio.abc.Stream = stream
        self.probing: int = 0
        self.bytes_sent: int = 0
        self._defer_errors = False
        self._send_error: trio.BrokenResourceError | None = None
        self._unread = unread
        self._socket: socket.socket | None = None
        self._trio_socket: Any = None
        self._poll: select.poll | None = None
        self._bottom = stream if bottom is None else bottom
        self._polled = _pollable_below(self._bottom)
        self.below: Transport | None = self._polled if isinstance(self._polled, Transport) else None
        if isinstance(self._bottom, trio.SocketStream) and self._bottom.socket.fileno() >= 0:
            self._use_socket(self._bottom.socket)

    def _use_socket(self, inner: trio.socket.SocketType) -> None:
        self._trio_socket = inner
        self._socket = socket.socket(inner.family, inner.type, inner.proto, fileno=inner.fileno())
        self._socket.setblocking(False)
        self._poll = poll_for_reading(inner.fileno())

    def __repr__(self) -> str:
        return f"<Transport over {self.stream!r}>"

    def __del__(self) -> None:
        # Lest both socket objects close the same descriptor, which may be another's by then.
        self._forget_socket()

    @property
    def defer_errors(self) -> bool:
        """Whether a failed send is kept in `send_error`, here and below."""
        return self._defer_errors

    @defer_errors.setter
    def defer_errors(self, value: bool) -> None:
        self._defer_errors = value
        if self.below is not None:
            self.below.defer_errors = value

    @property
    def send_error(self) -> trio.BrokenResourceError | None:
        """The first failure of a send, here or below, if it was kept."""
        if self._send_error is None and self.below is not None:
            return self.below.send_error
        return self._send_error

    def take_unread(self) -> bytes:
        """What was received by whoever had the stream before, and is still to be read."""
        unread, self._unread = self._unread, b""
        return unread

    def _open_socket(self) -> socket.socket:
        """The second socket object, if its file descriptor still is what it was made for."""
        assert self._socket is not None
        if self._trio_socket.fileno() < 0:
            self._forget_socket()
            raise trio.ClosedResourceError("the connection was closed")
        return self._socket

    def _forget_socket(self) -> None:
        if self._socket is not None:
            self._socket.detach()

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what can be sent at once.

        Returns:
            The number of bytes accepted, 0 if sending would have to wait.

        Raises:
            trio.BrokenResourceError: The connection is broken.
            trio.ClosedResourceError: It was closed on this side.
        """
        if self._socket is None:
            return 0
        try:
            sent = self._open_socket().send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise trio.BrokenResourceError(f"sending failed: {exc}") from exc
        self.bytes_sent += sent
        return sent

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything, waiting where necessary."""
        view = memoryview(data)
        try:
            rest = view[self.send_nowait(view) :]
            if rest:
                # Should it fail, nobody knows how much of it was sent.
                self.bytes_sent += len(rest)
                await self.stream.send_all(rest)
        except trio.BrokenResourceError as exc:
            if not self._defer_errors:
                raise
            self._send_error = self._send_error or without_frames(exc)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the stream may accept data."""
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive something, waiting where necessary and allowed. It is a checkpoint only if it waits.

        Raises:
            WouldBlock: It would have to wait while probing.
            trio.BrokenResourceError: The connection is broken.
            trio.ClosedResourceError: It was closed on this side.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.probing:
            self.probing -= 1
            if not self.probing:
                raise trio.BrokenResourceError("the peer keeps sending what nobody asked for")
        size = max_bytes or RECEIVE_SIZE
        data = self.receive_nowait(size)
        if data is not None:
            return data
        if self.probing:
            return await self._probe_below(size)
        return await self.receive_later(size)

    async def _probe_below(self, size: int) -> bytes:
        # Of a stream that nothing is known of, receiving might wait.
        if self._socket is not None or self._polled is None or poll(self._bottom) is Readiness.QUIET:
            raise WouldBlock
        if self.below is None:
            return bytes(await self.stream.receive_some(size))
        # What has arrived there may be no data, or less than a record.
        self.below.probing = self.probing
        try:
            return bytes(await self.stream.receive_some(size))
        finally:
            self.below.probing = 0

    def receive_nowait(self, size: int) -> bytes | None:
        """Receive what is there, `b""` at the end of the stream, None if nothing is there or known.

        Raises:
            trio.BrokenResourceError: The connection is broken.
            trio.ClosedResourceError: It was closed on this side.
        """
        if self._unread:
            return self._read_unread(size)
        if self._socket is None:
            return None
        try:
            return self._open_socket().recv(size)
        except BlockingIOError:
            return None
        except OSError as exc:
            raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc

    async def receive_later(self, size: int) -> bytes:
        """Receive, waiting before it is tried."""
        if self._unread:
            await trio.lowlevel.checkpoint()
            return self._read_unread(size)
        if self._socket is None:
            return bytes(await self.stream.receive_some(size))
        data = None
        while data is None:
            await trio.lowlevel.wait_readable(self._open_socket())
            data = self.receive_nowait(size)
        return data

    def _read_unread(self, size: int) -> bytes:
        data = self._unread[:size]
        self._unread = self._unread[size:]
        return data

    def peek(self) -> Readiness:
        """What the kernel knows of the connection, or the layers below."""
        if self._unread:
            return Readiness.READABLE
        if self._socket is None:
            return poll(self._bottom)
        try:
            sock = self._open_socket()
            # A poll that finds nothing is cheaper than a receive that is refused.
            if self._poll is not None and not self._poll.poll(0):
                return Readiness.QUIET
            data = sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return Readiness.QUIET
        except (OSError, trio.ClosedResourceError):
            return Readiness.CLOSED
        return Readiness.READABLE if data else Readiness.CLOSED

    async def aclose(self) -> None:
        """Close the stream."""
        self._forget_socket()
        await self.stream.aclose()


def _pollable_below(stream: Any) -> Pollable | None:
    """The nearest stream, this one or below, that knows what has arrived."""
    while not (stream is None or isinstance(stream, Pollable)):
        stream = stream_below(stream)
    return stream


def stream_below(stream: Any) -> Any:
    """The stream that `stream` runs on, if it is one of those that run on another."""
    if isinstance(stream, Transport):
        return stream.stream
    # As it is called by Trio's SSLStream, and by the tunnels of HTTP/2.
    return getattr(stream, "transport_stream", None)


def poll_for_reading(descriptor: int) -> select.poll | None:
    if not hasattr(select, "poll"):  # Windows
        return None
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return poll
