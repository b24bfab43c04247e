"""`Transport`: the byte stream that a connection runs on.

Theory of operation. A connection reads and writes through a `Transport`, which adds to a Trio stream three
things that HTTP needs:

- *Non-blocking attempts.* `send_nowait` avoids the scheduler pass that `send_all` costs even when the
  kernel accepts everything at once. `peek` asks the kernel for the state of an idle connection. Both use a
  second `socket` object for the same file descriptor. It is detached before the descriptor is closed, and
  every use checks that the descriptor is still open, since the kernel reuses descriptor numbers.
- *Probing.* While `probing` is set, `receive_some` raises `WouldBlock` where it would wait. With a
  `trio.SSLStream` on top, this reads only the data that has arrived, and leaves the TLS stream intact:
  `SSLStream` stays usable after a receive that failed, but not after a send that failed.
- *Deferred send errors.* `trio.SSLStream` refuses to read after a failed send. But a server may respond
  and close before it has read the whole request; then the response, or the TLS alert with the reason, is
  still to be read. While `defer_errors` is set, a failed send is kept in `send_error` instead of raised.

Through proxies a transport may run on top of another, with TLS or an HTTP/2 stream in between. The upper
transport passes these requests down to the lower one (`poll`, `_probe_below`, `send_error`, `defer_errors`).
"""

from __future__ import annotations

import abc
import contextlib
import enum
import re
import select
import socket
import ssl
from typing import Any

import trio

from .._exceptions import without_frames
from .trio_internals import has_undecrypted

# The most bytes of one receive. With 64 KiB a large download costs a fifth more CPU time. With 256 KiB or
# more, glibc's malloc often returns the buffer's memory to the system where less arrives, as through a proxy,
# and the page faults of the next receive double the system time.
RECEIVE_SIZE = 192 * 1024
# How many times in a row a probe may receive, less one: a limit for a peer that never stops sending.
MAX_PROBES = 8

# The first bytes of a TLS alert: the content type and the major version (RFC 8446, section 5.1).
TLS_ALERT = b"\x15\x03"


class WouldBlock(Exception):
    """Nothing has arrived, and the transport is probing and must not wait."""


# OpenSSL's reasons for received alerts (RFC 8446, section 6), with the protocol that introduced the alert.
_ALERT = re.compile(r"(?:SSLV3_ALERT|TLSV1_ALERT|TLSV13_ALERT|TLSV1)_(\w+)")


# The messages of Trio's `ClosedResourceError`, which are replaced because they speak of sockets.
_CLOSED_SAYS_TRIO = ("", "another task closed this fd", "this socket was already closed")


def explain(error: trio.BrokenResourceError | trio.ClosedResourceError) -> str:
    """Return the message of a stream's error; without one, a message by its type or cause."""
    if isinstance(error, trio.ClosedResourceError) and str(error) in _CLOSED_SAYS_TRIO:
        return "the connection was closed"
    if str(error):
        return str(error)
    if isinstance(error.__cause__, ssl.SSLError):
        return _explain_tls(error.__cause__)
    return "the connection broke"


def is_alert(error: BaseException | None) -> bool:
    """Return whether a stream's error was caused by a TLS alert from the server."""
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) else None
    return isinstance(cause, ssl.SSLError) and _ALERT.fullmatch(cause.reason or "") is not None


def _explain_tls(error: ssl.SSLError) -> str:
    reason = error.reason or str(error)
    alert = _ALERT.fullmatch(reason)
    words = (reason if alert is None else alert[1]).lower().replace("_", " ")
    return f"TLS failed: {words}" if alert is None else f"the server sent the TLS alert '{words}'"


class Readiness(enum.Enum):
    """The state of the receiving side of a stream, determined without receiving."""

    QUIET = enum.auto()
    READABLE = enum.auto()
    CLOSED = enum.auto()


class Pollable(trio.abc.Stream):
    """A stream whose receiving side can be inspected without receiving."""

    @abc.abstractmethod
    def peek(self) -> Readiness:
        """Return what receiving would find, without waiting."""


def poll(stream: trio.abc.Stream) -> Readiness:
    """Return what receiving from a stream, or from the layers below it, would find; QUIET if unknown."""
    match stream:
        case Pollable():
            return stream.peek()
        case trio.SSLStream() if _pollable_below(stream) is not None:
            readiness = poll(stream.transport_stream)
            pending = readiness is Readiness.QUIET and has_undecrypted(stream)
            return Readiness.READABLE if pending else readiness
    return Readiness.QUIET


class _BorrowedSocket(socket.socket):
    """A socket object for a file descriptor that another object owns.

    Collecting it must not close the descriptor, which may belong to another connection by then. This object
    has to see to that itself: in a reference cycle it may be finalized before the transport.
    """

    def __del__(self) -> None:
        self.detach()


class Transport(Pollable):
    """The stream that a connection runs on, with non-blocking attempts if it is a socket.

    Args:
        stream: The stream to send to and receive from.
        bottom: The stream below `stream` to ask what has arrived; None for `stream` itself.
        unread: Bytes that were received from the stream before, and that are received first.

    Attributes:
        stream: The stream from the connector, or from a proxy's tunnel.
        probing: If not 0, `receive_some` does not wait, and fails when called this often. Without the
            limit, a peer that never stops sending would keep the probe going for ever.
        below: The next transport below, None if there is none.
        bytes_sent: An upper bound of the number of bytes that the stream has accepted.
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
        self._socket = _BorrowedSocket(inner.family, inner.type, inner.proto, fileno=inner.fileno())
        self._socket.setblocking(False)
        self._poll = poll_for_reading(inner.fileno())

    def __repr__(self) -> str:
        return f"<Transport over {self.stream!r}>"

    @property
    def defer_errors(self) -> bool:
        """Whether a failed send is kept in `send_error`, in this transport and those below."""
        return self._defer_errors

    @defer_errors.setter
    def defer_errors(self, value: bool) -> None:
        self._defer_errors = value
        if self.below is not None:
            self.below.defer_errors = value

    @property
    def send_error(self) -> trio.BrokenResourceError | None:
        """The first deferred error of a send, of this transport or one below; None if there is none."""
        if self._send_error is None and self.below is not None:
            return self.below.send_error
        return self._send_error

    @property
    def is_socket(self) -> bool:
        """Whether the stream is a socket, so that `send_nowait` and `receive_nowait` have an effect."""
        return self._socket is not None

    def take_unread(self) -> bytes:
        """Return the bytes that were received before this transport was made, and forget them."""
        unread, self._unread = self._unread, b""
        return unread

    def _open_socket(self) -> socket.socket:
        """Return the second socket object, if its file descriptor is still open."""
        assert self._socket is not None
        if self._trio_socket.fileno() < 0:
            self._forget_socket()
            raise trio.ClosedResourceError("the connection was closed")
        return self._socket

    def _forget_socket(self) -> None:
        if self._socket is not None:
            self._socket.detach()

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send as much as the kernel accepts at once.

        Returns:
            The number of bytes accepted; 0 if sending would have to wait, or if the stream is not a socket.

        Raises:
            trio.BrokenResourceError: The connection is broken.
            trio.ClosedResourceError: The connection was closed on this side.
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

    def send_or_defer(self, data: bytes | memoryview) -> int:
        """Do as `send_nowait`, and take all of `data` if it fails while `defer_errors` is set."""
        try:
            return self.send_nowait(data)
        except trio.BrokenResourceError as exc:
            self._defer(exc)
            return len(data)

    def _defer(self, error: trio.BrokenResourceError) -> None:
        if not self._defer_errors:
            raise error
        self._send_error = self._send_error or without_frames(error)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, waiting only where the kernel does not accept it at once.

        Raises:
            trio.BrokenResourceError: The connection is broken, and `defer_errors` is not set.
            trio.ClosedResourceError: The connection was closed on this side.

        When it is cancelled, an unknown part of `data` has been sent.
        """
        view = memoryview(data)
        try:
            sent = self.send_nowait(view)
        except trio.BrokenResourceError as exc:
            self._defer(exc)
        else:
            await self.send_later(view[sent:])

    async def send_later(self, rest: memoryview) -> None:
        """Do as `send_all`, for a caller whose `send_nowait` has just left `rest`: wait before sending it."""
        try:
            while rest and self._socket is not None:
                await trio.lowlevel.wait_writable(self._open_socket())
                rest = rest[self.send_nowait(rest) :]
            if rest:
                # Counted before, since a send that fails may have sent any part of it.
                self.bytes_sent += len(rest)
                await self.stream.send_all(rest)
        except trio.BrokenResourceError as exc:
            self._defer(exc)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the stream may accept data."""
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive some bytes, waiting if there are none and `probing` is not set.

        It is a checkpoint only if it waits; a pending cancellation is always delivered.

        Args:
            max_bytes: The maximum number of bytes to return.

        Raises:
            WouldBlock: Receiving would have to wait while `probing` is set.
            trio.BrokenResourceError: The connection is broken.
            trio.ClosedResourceError: The connection was closed on this side.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.probing:
            self.probing -= 1
            if not self.probing:
                raise trio.BrokenResourceError("the peer keeps sending unsolicited data")
        size = max_bytes or RECEIVE_SIZE
        data = self.receive_nowait(size)
        if data is not None:
            return data
        if self.probing:
            return await self._probe_below(size)
        return await self.receive_later(size)

    async def _probe_below(self, size: int) -> bytes:
        # Receiving from a stream whose state is unknown might wait.
        if self._socket is not None or self._polled is None or poll(self._bottom) is Readiness.QUIET:
            raise WouldBlock
        if self.below is None:
            return bytes(await self.stream.receive_some(size))
        # The bytes that have arrived below may be less than a TLS record, or hold no data.
        self.below.probing = self.probing
        try:
            return bytes(await self.stream.receive_some(size))
        finally:
            self.below.probing = 0

    def receive_nowait(self, size: int) -> bytes | None:
        """Receive without waiting.

        Returns:
            The bytes; `b""` at the end of the stream; None if nothing has arrived, or if the stream is not
            a socket.

        Raises:
            trio.BrokenResourceError: The connection is broken.
            trio.ClosedResourceError: The connection was closed on this side.
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
        """Receive after waiting for data, for a caller whose `receive_nowait` has just found none."""
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
        """Return what receiving would find: from the kernel for a socket, else from the layers below."""
        if self._unread:
            return Readiness.READABLE
        if self._socket is None:
            return poll(self._bottom)
        try:
            sock = self._open_socket()
            # Polling is cheaper than a `recv` that raises BlockingIOError.
            if self._poll is not None and not self._poll.poll(0):
                return Readiness.QUIET
            data = sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return Readiness.QUIET
        except (OSError, trio.ClosedResourceError):
            return Readiness.CLOSED
        return Readiness.READABLE if data else Readiness.CLOSED

    def close_nowait(self) -> bool:
        """Close the connection without a checkpoint if the stream is a socket, and return whether it is.

        Trio's `SocketStream.aclose` does the same, and then a checkpoint.
        """
        if not isinstance(self.stream, trio.SocketStream):
            return False
        self._forget_socket()
        with contextlib.suppress(OSError):
            self.stream.socket.close()
        return True

    async def aclose(self) -> None:
        """Close the stream, and so the connection."""
        self._forget_socket()
        await self.stream.aclose()


def _pollable_below(stream: Any) -> Pollable | None:
    """Return the first stream, from this one downwards, that can be polled; None if there is none."""
    while not (stream is None or isinstance(stream, Pollable)):
        stream = stream_below(stream)
    return stream


def stream_below(stream: Any) -> Any:
    """Return the stream that `stream` runs on, None if it runs on no other."""
    if isinstance(stream, Transport):
        return stream.stream
    # The attribute's name in trio.SSLStream and in the tunnels of HTTP/2.
    return getattr(stream, "transport_stream", None)


def poll_for_reading(descriptor: int) -> select.poll | None:
    """Return a poll object that waits for a descriptor to be readable, None where there is no `poll`."""
    if not hasattr(select, "poll"):  # Windows
        return None
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return poll
