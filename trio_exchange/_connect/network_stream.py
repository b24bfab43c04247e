"""`NetworkStream`: the public stream of a connection, in the extension `network_stream` of a response.

After CONNECT and Upgrade it is the raw byte stream; on any other response it only gives information. It first
returns the bytes that were received together with the response's head.
"""

from __future__ import annotations

import select
import ssl
from collections.abc import Callable
from typing import Any

import trio

from .._exceptions import (
    ConnectTimeout,
    LocalProtocolError,
    ReadError,
    ReadTimeout,
    WriteError,
    WriteTimeout,
    without_frames,
)
from .._timeouts import check_seconds, timed
from .handshake import handshake
from .transport import (
    MAX_PROBES,
    RECEIVE_SIZE,
    Transport,
    WouldBlock,
    explain,
    is_alert,
    poll_for_reading,
    stream_below,
)
from .trio_internals import ssl_object

NOT_RAW = (
    "this network stream belongs to HTTP and only gives information; it can be read and written after a "
    "2xx answer to CONNECT or a 101 answer to Upgrade"
)


class NetworkStream(trio.abc.HalfCloseableStream):
    """The raw stream of a connection after CONNECT or Upgrade; else a source of information about it.

    It has two sets of methods. `read`, `write` and `start_tls` take timeouts and raise this library's
    exceptions. The others are those of `trio.abc.HalfCloseableStream` and raise Trio's exceptions, so that
    everything that accepts a Trio stream (`trio.SSLStream`, `trio.StapledStream`, protocol libraries)
    accepts this one.

    After a 2xx response to CONNECT or a 101 response to Upgrade, the program may read and write the stream
    until the response is closed. On any other response HTTP uses the connection: the stream then only gives
    information, and reading or writing it is an error.

    One task may read while another writes. A second task that reads, or writes, at the same time gets a
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
        # The transport below TLS, which keeps deferred send errors.
        below = stream.transport_stream if isinstance(stream, trio.SSLStream) else None
        self._transport = below if isinstance(below, Transport) else None
        # Exists while and after `write` looks for an alert; another task must not read before it is set.
        self._alert_probed: trio.Event | None = None

    def __repr__(self) -> str:
        return f"<NetworkStream over {self._stream!r}>"

    @trio.lowlevel.enable_ki_protection
    async def read(self, max_bytes: int | None = None, timeout: float | None = None) -> bytes:
        """Receive some bytes; `b""` is the end of the stream.

        Args:
            max_bytes: The maximum number of bytes to return, at least 1; None for no limit.
            timeout: Seconds to wait; None for no limit.

        Raises:
            ReadTimeout: Nothing was received within `timeout`.
            ReadError: The connection broke, or the stream is closed.
            LocalProtocolError: The stream belongs to an ordinary response.
            trio.BusyResourceError: Another task is reading.
            TypeError, ValueError: `timeout` is not a non-negative number, or `max_bytes` is less than 1.

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
            buffer: The bytes to send, in any bytes-like object; it may be empty.
            timeout: Seconds for the whole of `buffer`; None for no limit.

        Raises:
            WriteTimeout: Not all was accepted within `timeout`; the stream can no longer be used.
            WriteError: The connection broke, or the stream is closed.
            LocalProtocolError: The stream belongs to an ordinary response.
            trio.BusyResourceError: Another task is writing.
            TypeError, ValueError: `timeout` is not a non-negative number, or `buffer` is not bytes-like.

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
        """Return the error for a received TLS alert, which says why the peer accepts no more data."""
        transport = self._transport
        if transport is None or transport.send_error is None:
            return None
        self._alert_probed = trio.Event()
        transport.probing = MAX_PROBES
        try:
            data = await self._stream.receive_some(RECEIVE_SIZE)
        except trio.BrokenResourceError as exc:
            return exc if is_alert(exc) else None
        except (WouldBlock, trio.BusyResourceError, trio.ClosedResourceError):
            # A task that is reading gets the alert itself.
            return None
        finally:
            transport.probing = 0
            self._alert_probed.set()
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

        This stream must not be used afterwards. Bytes that were received already are taken as the beginning
        of the server's side of the handshake. Calling it on the result starts TLS inside TLS.

        Args:
            ssl_context: The TLS settings, including the ALPN offer.
            server_hostname: The name to ask for (SNI) and to verify; None for neither.
            timeout: Seconds for the handshake; None for no limit.

        Returns:
            The encrypted stream.

        Raises:
            ConnectError: The handshake failed; the message says why. The stream has been closed.
            ConnectTimeout: The handshake took longer than `timeout`. The stream has been closed.
            LocalProtocolError: The stream belongs to an ordinary response.
            ValueError: `ssl_context` checks host names, and `server_hostname` is None.
            TypeError, ValueError: An argument is of the wrong type, or `timeout` is negative.

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
            # `ssl` refuses this for sockets, but not for `MemoryBIO`s, and then verifies no name.
            raise ValueError("ssl_context checks host names, so that server_hostname must be given")
        transport = transport_over(self)
        transport.defer_errors = True
        tls = trio.SSLStream(transport, ssl_context, server_hostname=server_hostname, https_compatible=True)
        try:
            await timed(timeout, ConnectTimeout, handshake, tls, server_hostname)
        except BaseException:
            await trio.aclose_forcefully(self)
            raise
        return NetworkStream(tls)

    def get_extra_info(self, name: str) -> Any:
        """Return a piece of information about the connection.

        Args:
            name: One of

                - `"client_addr"`, `"server_addr"`: the address of the socket, and of its peer;
                - `"socket"`: the Trio socket;
                - `"ssl_object"`: the `ssl.SSLObject` of the outermost TLS;
                - `"is_readable"`: whether data has arrived at the socket, or the peer has closed it.

        Returns:
            The information; None if the name is unknown, or does not apply to this connection.
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
        """Receive some bytes, as `trio.abc.ReceiveStream` says; cancellation loses no data."""
        self._refuse_as_trio()
        if self._alert_probed is not None:
            await self._alert_probed.wait()
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
        """Tell the peer that no more data will be sent; receiving stays possible.

        Raises:
            NotImplementedError: The stream has no way to close one direction; Trio's TLS streams have none.

        When it is cancelled, the peer may or may not have been told.
        """
        self._refuse_as_trio()
        if not isinstance(self._stream, trio.abc.HalfCloseableStream):
            raise NotImplementedError("a TLS stream can't be closed one way only")
        await self._stream.send_eof()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the stream and its connection. On an ordinary response this does nothing.

        When it is cancelled, the stream is closed nevertheless.
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
                return ssl_object(stream)
            stream = _below(stream)
        return None

    def _socket(self) -> trio.socket.SocketType | None:
        stream: Any = self._stream
        while stream is not None:
            if isinstance(stream, trio.SocketStream):
                return stream.socket
            stream = _below(stream)
        return None


def transport_over(stream: trio.abc.Stream) -> Transport:
    """Make a transport on a stream; it takes over the unread bytes of a `NetworkStream`."""
    bottom, unread = stream, b""
    while isinstance(bottom, NetworkStream):
        unread += bottom._received
        bottom._received = b""
        bottom = bottom._stream
    return Transport(stream, bottom=bottom, unread=unread)


def _below(stream: Any) -> Any:
    return stream._stream if isinstance(stream, NetworkStream) else stream_below(stream)


def to_octets(data: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
    """Convert a buffer to one whose items are bytes, since streams count items; copy only if necessary.

    Raises:
        TypeError: `data` is not bytes-like.
    """
    if isinstance(data, (bytes, bytearray)):
        return data
    view = memoryview(data)
    # A view with a zero in its shape can't be cast.
    return view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()


def check_max_bytes(max_bytes: object) -> None:
    """Check the argument `max_bytes` of `receive_some`.

    Raises:
        TypeError: The value is neither an int nor None.
        ValueError: The value is less than 1.
    """
    if max_bytes is None:
        return
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes must be an int or None, not {max_bytes!r}")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be 1 or more, not {max_bytes}")


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
                return None  # The peer has reset the connection (ENOTCONN).
    return _is_readable(sock.fileno())


def _is_readable(descriptor: int) -> bool:
    poll = poll_for_reading(descriptor)
    if poll is None:
        return bool(select.select([descriptor], [], [], 0)[0])
    return bool(poll.poll(0))
