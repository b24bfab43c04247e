"""Byte streams: what a connection runs on, and what a user gets in `network_stream`.

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
of the upper one it asks of what is below (`watch`, `_probe_below`, `send_error`, `defer_errors`).

`NetworkStream` is the public face of a stream after CONNECT and Upgrade, and the source of information
about any connection. It carries the bytes that were read along with the response's head.
"""

from __future__ import annotations

import abc
import enum
import re
import select
import socket
import ssl
from collections.abc import Callable
from typing import Any

import trio

from ._exceptions import (
    ConnectError,
    ConnectTimeout,
    LocalProtocolError,
    ReadError,
    ReadTimeout,
    WriteError,
    WriteTimeout,
    without_frames,
)
from ._timeouts import check_seconds, timed

RECEIVE_SIZE = 65536
# In how many pieces may be received without waiting what nobody asked for.
MOST_PROBES = 8

# How an alert begins, and what a record may begin with (RFC 8446, 5.1).
TLS_ALERT = b"\x15\x03"
_TLS_RECORDS = range(20, 25)
# How much is kept of what is received instead of TLS.
_BEGINNING = 20

NOT_RAW = (
    "this network stream belongs to HTTP and only gives information; it can be read and written after a "
    "2xx answer to CONNECT or a 101 answer to Upgrade"
)


class WouldBlock(Exception):
    """Nothing has arrived, and the transport is only probing."""


# How OpenSSL names the alerts that it receives (RFC 8446, 6), by the protocol that introduced them.
_ALERT = re.compile(r"(?:SSLV3_ALERT|TLSV1_ALERT|TLSV13_ALERT|TLSV1)_(\w+)")


# Trio's words for what was closed on this side, which speak of sockets.
_CLOSED_SAYS_TRIO = ("", "another task closed this fd", "this socket was already closed")


def explain(error: trio.BrokenResourceError | trio.ClosedResourceError) -> str:
    """What a stream's error says, or means by its type or its cause."""
    if isinstance(error, trio.ClosedResourceError) and str(error) in _CLOSED_SAYS_TRIO:
        return "the connection was closed"
    if str(error):
        return str(error)
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


class Watchable(trio.abc.Stream):
    """A stream that knows what has arrived."""

    @abc.abstractmethod
    def peek(self) -> Readiness:
        """What receiving would find, without waiting."""


def watch(stream: trio.abc.Stream) -> Readiness:
    """What receiving from a stream would find, or in the layers below; quiet is also what is not known."""
    match stream:
        case Watchable():
            return stream.peek()
        case NetworkStream():
            return watch(stream._stream)
        case trio.SSLStream() if _watchable_below(stream) is not None:
            readiness = watch(stream.transport_stream)
            # What was received and not decrypted yet, Trio has no name for.
            pending = readiness is Readiness.QUIET and stream._incoming.pending
            return Readiness.READABLE if pending else readiness
    return Readiness.QUIET


class Transport(Watchable):
    """The stream that a connection runs on, with attempts that don't wait where it is a socket.

    Attributes:
        stream: The stream as it was dialled, or as a proxy handed it over.
        probing: If not 0, receiving may not wait, nor be done so many times: a peer that always has more
            to say would otherwise be listened to for ever.
        below: The next transport below, if there is one.
        bytes_sent: How many bytes the stream has accepted, at most.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream: trio.abc.Stream = stream
        self.probing: int = 0
        self.bytes_sent: int = 0
        self._defer_errors = False
        self._send_error: trio.BrokenResourceError | None = None
        self._unread = b""
        self._socket: socket.socket | None = None
        self._trio_socket: Any = None
        self._poll: select.poll | None = None
        bottom = stream
        while isinstance(bottom, NetworkStream):
            self._unread += bottom._received
            bottom._received = b""
            bottom = bottom._stream
        self._watched = _watchable_below(bottom)
        self.below: Transport | None = self._watched if isinstance(self._watched, Transport) else None
        if isinstance(bottom, trio.SocketStream) and bottom.socket.fileno() >= 0:
            self._use_socket(bottom.socket)

    def _use_socket(self, inner: trio.socket.SocketType) -> None:
        self._trio_socket = inner
        self._socket = socket.socket(inner.family, inner.type, inner.proto, fileno=inner.fileno())
        self._socket.setblocking(False)
        self._poll = _poll_for_reading(inner.fileno())

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
        if self._socket is not None or self._watched is None or watch(self.stream) is Readiness.QUIET:
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
            return watch(self.stream)
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


class NetworkStream(trio.abc.HalfCloseableStream):
    """The raw stream of a connection, for CONNECT, Upgrade and for information.

    It has two sets of methods. `read`, `write` and `start_tls` take timeouts and raise this library's
    exceptions. The others are those of `trio.abc.HalfCloseableStream` and raise Trio's, so that whatever
    works on a Trio stream (`trio.SSLStream`, `trio.StapledStream`, protocol libraries) works on this.

    After a 2xx to CONNECT or a 101 to an Upgrade the stream is the user's until the response is closed.
    On any other response the connection is busy with HTTP: then the stream gives information, and reading
    or writing it is an error.

    One task may read while another writes. Two tasks that do the same at once get a
    `trio.BusyResourceError`.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        received: bytes = b"",
        refusal: str | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> None:
        self._stream = stream
        self._received = received
        self._refusal = refusal
        self._on_close = on_close
        # Below TLS, the transport that keeps the errors of sending.
        below = stream.transport_stream if isinstance(stream, trio.SSLStream) else None
        self._transport = below if isinstance(below, Transport) else None
        # Set when `write` has looked for an alert, while which another task must not read.
        self._looked: trio.Event | None = None

    def __repr__(self) -> str:
        return f"<NetworkStream over {self._stream!r}>"

    @trio.lowlevel.enable_ki_protection
    async def read(self, max_bytes: int | None = None, timeout: float | None = None) -> bytes:
        """Receive some bytes; `b""` is the end of the stream.

        Args:
            max_bytes: The most to return, at least 1; None for whatever is convenient.
            timeout: Seconds to wait, None for ever.

        Raises:
            ReadTimeout: Nothing came within `timeout`.
            ReadError: The connection broke, or the stream is closed.
            LocalProtocolError: The stream belongs to an ordinary response.
            trio.BusyResourceError: Another task is reading.
            TypeError, ValueError: `timeout` is not a non-negative number, or `max_bytes` less than 1.

        Cancellation loses no data.
        """
        self._refuse_if_http()
        check_seconds("timeout", timeout)
        check_max_bytes(max_bytes)
        try:
            return await timed(timeout, ReadTimeout, self.receive_some, max_bytes)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            # Without frames: from CPython 3.12 on those of Trio's are part of a reference cycle.
            raise ReadError(explain(exc)) from without_frames(exc)

    @trio.lowlevel.enable_ki_protection
    async def write(self, buffer: bytes | bytearray | memoryview, timeout: float | None = None) -> None:
        """Send all of `buffer`.

        Args:
            buffer: The bytes to send, in any object like bytes; none is allowed.
            timeout: Seconds to wait in all, None for ever.

        Raises:
            WriteTimeout: Not all was accepted within `timeout`; the stream is unusable then.
            WriteError: The connection broke, or the stream is closed.
            LocalProtocolError: The stream belongs to an ordinary response.
            trio.BusyResourceError: Another task is writing.
            TypeError, ValueError: `timeout` is not a non-negative number, or `buffer` not like bytes.

        When it is cancelled, an unknown part of `buffer` has been sent.
        """
        self._refuse_if_http()
        check_seconds("timeout", timeout)
        try:
            await timed(timeout, WriteTimeout, self.send_all, buffer)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            reason = await self._received_alert() or exc
            raise WriteError(explain(reason)) from without_frames(reason)

    async def _received_alert(self) -> trio.BrokenResourceError | None:
        """The TLS alert that says why the peer takes no more data, if it has arrived."""
        transport = self._transport
        if transport is None or transport.send_error is None:
            return None
        self._looked = trio.Event()
        transport.probing = MOST_PROBES
        try:
            data = await self._stream.receive_some(RECEIVE_SIZE)
        except trio.BrokenResourceError as exc:
            return exc if is_alert(exc) else None
        except (WouldBlock, trio.BusyResourceError, trio.ClosedResourceError):
            # Where another task is reading, it gets the alert.
            return None
        finally:
            transport.probing = 0
            self._looked.set()
        self._received += data
        return None

    @trio.lowlevel.enable_ki_protection
    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | bytes | None = None,
        timeout: float | None = None,
    ) -> NetworkStream:
        """Start TLS on the stream, as its client, and return the encrypted stream.

        This stream must not be used any more. Bytes that had been received already are the beginning of
        the TLS handshake. May be called on the result again: TLS in TLS.

        Args:
            ssl_context: Settings; also says which protocols ALPN offers.
            server_hostname: For SNI and to verify the certificate.
            timeout: Seconds for the handshake, None for ever.

        Raises:
            ConnectError: The handshake failed; the message says why. The stream is closed then.
            ConnectTimeout: It took longer than `timeout`. The stream is closed then.
            LocalProtocolError: The stream belongs to an ordinary response.
            ValueError: `ssl_context` checks host names and there is none to check.
            TypeError, ValueError: An argument is of the wrong type, or `timeout` negative.

        When it is cancelled, the stream is closed.
        """
        self._refuse_if_http()
        check_seconds("timeout", timeout)
        if not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError(f"ssl_context must be an ssl.SSLContext, not {ssl_context!r}")
        if isinstance(server_hostname, bytes):
            server_hostname = server_hostname.decode("ascii")
        if server_hostname is not None and not isinstance(server_hostname, str):
            raise TypeError(f"server_hostname must be str, bytes or None, not {server_hostname!r}")
        if server_hostname is None and ssl_context.check_hostname:
            # Unlike for its sockets, Python's ssl lets this pass, and then checks nothing.
            raise ValueError("ssl_context checks host names, so that server_hostname must be given")
        transport = Transport(self)
        transport.defer_errors = True
        tls = trio.SSLStream(transport, ssl_context, server_hostname=server_hostname, https_compatible=True)
        try:
            await timed(timeout, ConnectTimeout, handshake, tls, server_hostname)
        except BaseException:
            await trio.aclose_forcefully(self)
            raise
        return NetworkStream(tls)

    def get_extra_info(self, name: str) -> Any:
        """Information about the connection below.

        Args:
            name: One of

                - `"client_addr"`, `"server_addr"`: the socket's own address and its peer's;
                - `"socket"`: the Trio socket;
                - `"ssl_object"`: the `ssl.SSLObject` of the outermost TLS;
                - `"is_readable"`: whether the socket has something to read, or is closed.

        Returns:
            The information, or None where there is none, and for any other name.
        """
        match name:
            case "ssl_object":
                return self._ssl_object()
            case "socket":
                return self._socket()
            case "client_addr" | "server_addr" | "is_readable":
                sock = self._socket()
                return None if sock is None else _ask_socket(name, sock)
        return None

    @trio.lowlevel.enable_ki_protection
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive some bytes, as `trio.abc.ReceiveStream` says. Cancellation loses no data."""
        self._refuse_as_trio()
        if self._looked is not None:
            await self._looked.wait()
        if not self._received:
            return bytes(await self._stream.receive_some(max_bytes))
        check_max_bytes(max_bytes)
        await trio.lowlevel.checkpoint()
        data = self._received[:max_bytes]
        self._received = self._received[len(data) :]
        return data

    @trio.lowlevel.enable_ki_protection
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, as `trio.abc.SendStream` says."""
        self._refuse_as_trio()
        await self._stream.send_all(to_octets(data))
        error = None if self._transport is None else self._transport.send_error
        if error is not None:
            raise trio.BrokenResourceError(str(error)) from error

    @trio.lowlevel.enable_ki_protection
    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` might not block, as `trio.abc.SendStream` says."""
        self._refuse_as_trio()
        await self._stream.wait_send_all_might_not_block()

    @trio.lowlevel.enable_ki_protection
    async def send_eof(self) -> None:
        """Tell the peer that nothing more will be sent; reading goes on.

        Raises:
            NotImplementedError: The stream can't be closed one way only, as TLS can't in Trio.

        When it is cancelled, it may or may not have been told.
        """
        self._refuse_as_trio()
        if not isinstance(self._stream, trio.abc.HalfCloseableStream):
            raise NotImplementedError("a TLS stream can't be closed one way only")
        await self._stream.send_eof()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the stream and its connection. On an ordinary response it does nothing.

        When it is cancelled, the stream is closed all the same.
        """
        if self._refusal is not None:
            await trio.lowlevel.checkpoint()
            return
        self._received = b""
        if self._on_close is not None:
            self._on_close()
        await self._stream.aclose()

    def _refuse_if_http(self) -> None:
        if self._refusal is not None:
            raise LocalProtocolError(self._refusal)

    def _refuse_as_trio(self) -> None:
        if self._refusal is not None:
            raise trio.ClosedResourceError(self._refusal)

    def _ssl_object(self) -> Any:
        stream: Any = self._stream
        while stream is not None:
            if isinstance(stream, trio.SSLStream):
                # Trio shows the methods of the object, but has no public name for the object itself.
                return getattr(stream, "_ssl_object", stream)
            stream = _below(stream)
        return None

    def _socket(self) -> trio.socket.SocketType | None:
        stream: Any = self._stream
        while stream is not None:
            if isinstance(stream, trio.SocketStream):
                return stream.socket
            stream = _below(stream)
        return None


def to_octets(data: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
    """A buffer as one of bytes, since streams count items; it is copied only if it is not contiguous.

    Raises:
        TypeError: It is no buffer.
    """
    if isinstance(data, (bytes, bytearray)):
        return data
    view = memoryview(data)
    # A view of nothing can't be cast.
    return view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()


def check_max_bytes(max_bytes: object) -> None:
    """Check the argument of `receive_some`.

    Raises:
        TypeError: It is neither an int nor None.
        ValueError: It is less than 1.
    """
    if max_bytes is None:
        return
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes must be an int or None, not {max_bytes!r}")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be 1 or more, not {max_bytes}")


def _watchable_below(stream: Any) -> Watchable | None:
    """The nearest stream, this one or below, that knows what has arrived."""
    while not (stream is None or isinstance(stream, Watchable)):
        stream = _below(stream)
    return stream


def _below(stream: Any) -> Any:
    """The stream that `stream` runs on, if it is one of those that run on another."""
    if isinstance(stream, Transport):
        return stream.stream
    if isinstance(stream, NetworkStream):
        return stream._stream
    # As it is called by Trio's SSLStream, and by the tunnels of HTTP/2.
    return getattr(stream, "transport_stream", None)


def _ask_socket(name: str, sock: trio.socket.SocketType) -> Any:
    if sock.fileno() < 0:
        return True if name == "is_readable" else None
    match name:
        case "client_addr":
            return sock.getsockname()
        case "server_addr":
            try:
                return sock.getpeername()
            except OSError:
                return None  # The peer has reset the connection.
    return _is_readable(sock.fileno())


def _is_readable(descriptor: int) -> bool:
    poll = _poll_for_reading(descriptor)
    if poll is None:
        return bool(select.select([descriptor], [], [], 0)[0])
    return bool(poll.poll(0))


def _poll_for_reading(descriptor: int) -> select.poll | None:
    if not hasattr(select, "poll"):  # Windows
        return None
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return poll


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
