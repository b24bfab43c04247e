"""Tests without a network: an in-memory connector, and scripted servers for its connections.

The script is an async function that is called with a `ScriptedPeer` for every new connection::

    async def serve(peer: ScriptedPeer) -> None:
        async for request in peer:
            await peer.send_response(200, body=b"hello " + request.target)

    async def test_hello() -> None:
        async with trio.open_nursery() as nursery:
            connector = MemoryConnector(nursery, serve)
            async with ConnectionPool(connector=connector, ssl_context=connector.ssl_context) as pool:
                response = await pool.request("GET", "https://example.com/world")
            assert response.content == b"hello /world"

With `MemoryConnector.ssl_context` the peers also accept TLS, for `https` and `wss` URLs of any host. This
needs the package trustme: `pip install trio-exchange[testing]`. Tests without TLS don't need it.

With Trio's `MockClock` such a test is deterministic, and its timeouts take no time. A `ScriptedPeer` also
works on any other Trio stream, such as those that `trio.serve_tcp` passes to its handler.
"""

from __future__ import annotations

import contextlib
import functools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import h11
import trio
import trio.testing

from ._connect.connector import Connector, SocketOption
from ._fields import Headers, HeaderTypes, to_headers

if TYPE_CHECKING:
    import trustme

__all__ = ["Dialled", "MemoryConnector", "PeerRequest", "ScriptedPeer"]


def __dir__() -> list[str]:
    """The public names, without what this module imports."""
    return [name for name in globals() if name.startswith("__") or name in __all__]


# The limit of h11 protects servers from clients; a test may send heads of any size.
_NO_LIMIT = 2**30

_WITHOUT_BODY = frozenset((204, 304))

# A ClientHello record begins with the type `handshake` and the version 3.x (RFC 8446, section 5.1). Neither
# an HTTP/1.1 request nor the preface of HTTP/2 begins with a control character.
_CLIENT_HELLO = b"\x16\x03"

# A ScriptedPeer parses HTTP/1.1 only.
_ALPN = ("http/1.1",)


@dataclass(frozen=True)
class PeerRequest:
    """A request that a peer has received.

    Attributes:
        method: Such as `b"GET"`.
        target: The request target, as sent.
        headers: The header fields, in the order of the wire, with names in lower case.
        body: The content, without its framing; empty from `receive_head`.
    """

    method: bytes
    target: bytes
    headers: Headers
    body: bytes = b""

    def header(self, name: bytes | str) -> bytes | None:
        """Return the value of the first header of a name.

        Args:
            name: The header's name, in any case.

        Returns:
            The value, None if there is no such header.

        Raises:
            TypeError: The name is neither bytes nor str.
        """
        return self.headers.get(name)


class ScriptedPeer(trio.abc.AsyncResource):
    """The server's side of one HTTP/1.1 connection, controlled by a test.

    It parses the requests that it receives, and sends any bytes, valid HTTP or not. Iteration yields whole
    requests until the client closes the connection.

    When `receive_head`, `receive_chunk` or `receive_some` is cancelled, no data is lost; the other methods
    that receive lose what they have received. After a cancelled `send` an unknown part has been sent.

    Args:
        stream: The stream of the connection.

    Attributes:
        stream: The stream of the connection; the encrypted one after `start_tls`.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream: trio.abc.Stream = stream
        self._h11 = _new_parser(b"")
        self._body_done = True

    def _make_ssl_context(self) -> ssl.SSLContext:
        return _server_context("localhost", _ALPN)

    # -- Receiving.

    def __aiter__(self) -> AsyncIterator[PeerRequest]:
        return self

    async def __anext__(self) -> PeerRequest:
        try:
            return await self.receive_request()
        except EOFError:
            raise StopAsyncIteration from None

    async def receive_request(self) -> PeerRequest:
        """Receive a whole request.

        Returns:
            The request, with its body.

        Raises:
            EOFError: The client closed the connection before it sent another request.
            h11.RemoteProtocolError: The request is invalid, or the client closed the connection within it.
            trio.BrokenResourceError: The connection broke.
        """
        request = await self.receive_head()
        return replace(request, body=await self.receive_body())

    async def receive_head(self) -> PeerRequest:
        """Receive the head of a request; then `receive_chunk` or `receive_body` receives its body.

        Returns:
            The request, with an empty body.

        Raises:
            EOFError: The client closed the connection before it sent another request.
            h11.RemoteProtocolError: The client did not send a valid request.
            trio.BrokenResourceError: The connection broke.
        """
        # A new parser for each request, since this one is not told of the responses that the script sends.
        self._h11 = _new_parser(self._h11.trailing_data[0])
        try:
            event = await self._next_event()
        except h11.RemoteProtocolError as exc:
            if self._h11.trailing_data[0].startswith(_CLIENT_HELLO):
                raise h11.RemoteProtocolError(
                    "the client begins with TLS: give the connector's ssl_context to the pool, "
                    "or let the script call 'await peer.start_tls()'"
                ) from exc
            raise
        if not isinstance(event, h11.Request):
            raise EOFError("the client closed the connection")
        self._body_done = False
        return PeerRequest(event.method, event.target, Headers(event.headers))

    async def receive_chunk(self) -> bytes:
        """Receive some bytes of the body of the current request.

        Returns:
            The bytes; `b""` at the end of the body.

        Raises:
            h11.RemoteProtocolError: The body is malformed or ends early.
            trio.BrokenResourceError: The connection broke.
        """
        if not self._body_done:
            event = await self._next_event()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            self._body_done = True
        return b""

    async def receive_body(self) -> bytes:
        """Receive the rest of the body of the current request.

        Raises:
            h11.RemoteProtocolError: The body is malformed or ends early.
            trio.BrokenResourceError: The connection broke.
        """
        chunks = []
        while chunk := await self.receive_chunk():
            chunks.append(chunk)
        return b"".join(chunks)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive bytes without parsing them, after CONNECT or Upgrade.

        Bytes that arrived together with the last request are returned first.

        Args:
            max_bytes: The maximum number of bytes to return; None for no limit.

        Returns:
            The bytes; `b""` if the client has closed the connection.

        Raises:
            trio.BrokenResourceError: The connection broke.
        """
        received = self._h11.trailing_data[0]
        if not received:
            return bytes(await self.stream.receive_some(max_bytes))
        self._h11 = _new_parser(received[max_bytes:] if max_bytes else b"")
        return received[:max_bytes]

    async def _next_event(self) -> Any:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._h11.receive_data(bytes(await self.stream.receive_some()))
        return event

    # -- Sending.

    async def send(self, data: bytes, *, byte_by_byte: bool = False) -> None:
        """Send bytes unchanged.

        Args:
            data: The bytes.
            byte_by_byte: Whether to send each byte alone, and to let all tasks run until they block before
                the next.

        Raises:
            trio.BrokenResourceError: The client has closed the connection.
        """
        if not byte_by_byte:
            await self.stream.send_all(data)
            return
        for index in range(len(data)):
            await self.stream.send_all(data[index : index + 1])
            await trio.testing.wait_all_tasks_blocked()

    async def send_response(
        self,
        status: int = 200,
        headers: HeaderTypes = (),
        body: bytes = b"",
    ) -> None:
        """Send a whole response. A Content-Length is added if the response may have a body and no framing.

        Args:
            status: The status code.
            headers: A mapping or a sequence of pairs, of bytes or ASCII str; sent unchanged.
            body: The body, sent unchanged.

        Raises:
            TypeError: The headers are of another type.
            trio.BrokenResourceError: The client has closed the connection.
        """
        fields = to_headers(headers)
        framing = fields.get_all("Content-Length") + fields.get_all("Transfer-Encoding")
        if not framing and status >= 200 and status not in _WITHOUT_BODY:
            fields.append((b"Content-Length", b"%d" % len(body)))
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, _reason(status))]
        lines += [b"%b: %b\r\n" % field for field in fields]
        await self.send(b"".join((*lines, b"\r\n", body)))

    # -- The connection.

    async def start_tls(self, ssl_context: ssl.SSLContext | None = None) -> None:
        """Start TLS as the server; the peer then sends and receives through TLS.

        A script whose `MemoryConnector.ssl_context` is used need not call this: the handshake is done before
        the script begins. Call it for TLS that starts later, such as in a tunnel after CONNECT, or to use
        another certificate on connections of a connector whose `ssl_context` is not used.

        Args:
            ssl_context: The server's TLS settings. None for a certificate that `MemoryConnector.ssl_context`
                trusts, for the name that the client asks for (SNI), or for the host of the connection if it
                asks for none.

        Raises:
            ImportError: `ssl_context` is None, and the package trustme is not installed.
            trio.BrokenResourceError: The handshake failed.
        """
        if ssl_context is None:
            ssl_context = self._make_ssl_context()
        stream = trio.SSLStream(self.stream, ssl_context, server_side=True, https_compatible=True)
        await stream.do_handshake()
        self.stream = stream

    async def send_eof(self) -> None:
        """Tell the client that no more data will be sent; receiving stays possible.

        Raises:
            NotImplementedError: The stream is a TLS stream, which can't close one direction in Trio.
        """
        if not isinstance(self.stream, trio.abc.HalfCloseableStream):
            raise NotImplementedError("a TLS stream can't be closed one way only")
        await self.stream.send_eof()

    async def aclose(self) -> None:
        """Close the connection."""
        await self.stream.aclose()


def _new_parser(received: bytes) -> h11.Connection:
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=_NO_LIMIT)
    if received:
        parser.receive_data(received)
    return parser


def _reason(status: int) -> bytes:
    with contextlib.suppress(ValueError):
        return HTTPStatus(status).phrase.encode("ascii")
    return b""


# -- TLS.


@functools.cache
def _authority() -> trustme.CA:
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
def _server_context(host: str, alpn_protocols: tuple[str, ...]) -> ssl.SSLContext:
    """Make the TLS settings for a server: for the name that the client asks for (SNI), else for `host`."""

    def select_certificate(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name is not None:
            tls.context = _server_context(name, alpn_protocols)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(alpn_protocols)
    context.sni_callback = select_certificate
    _authority().issue_cert(host).configure_cert(context)
    return context


class _ClientEnd(trio.abc.HalfCloseableStream):
    """The client's end of a connection, which reports whether the client starts TLS.

    The first operation of the client tells, so that the peer need not receive to find out: it may be a
    server that sends first, on a connection without TLS, and would wait for ever.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._begun = trio.Event()
        self._starts_tls = False

    async def starts_tls(self) -> bool:
        """Wait until the client sends, receives or closes; return whether it has sent a ClientHello."""
        await self._begun.wait()
        return self._starts_tls

    def _begin(self, *, starts_tls: bool = False) -> None:
        if not self._begun.is_set():
            self._starts_tls = starts_tls
            self._begun.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._begin(starts_tls=bytes(data[:2]) == _CLIENT_HELLO)
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        self._begin()
        if not isinstance(self._stream, trio.abc.HalfCloseableStream):
            raise NotImplementedError("the stream can't be closed one way only")
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self._begin()
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        self._begin()
        await self._stream.aclose()


# -- The connector.


class _MemoryPeer(ScriptedPeer):
    """A peer whose default certificate is for the host that its connection was made to."""

    def __init__(self, stream: trio.abc.Stream, host: str, alpn_protocols: tuple[str, ...]) -> None:
        super().__init__(stream)
        self._host = host
        self._alpn_protocols = alpn_protocols

    def _make_ssl_context(self) -> ssl.SSLContext:
        return _server_context(self._host, self._alpn_protocols)


@dataclass(frozen=True)
class Dialled:
    """One call of a `MemoryConnector`.

    Attributes:
        address: Host and port, or the path of a unix socket.
        options: The keyword arguments of the call, without those that are None.
    """

    address: tuple[str, int] | str
    options: dict[str, Any]


class MemoryConnector(Connector):
    """A connector whose connections end at scripted peers in the same process.

    For `https` and `wss` URLs give `ssl_context` to the pool. The client's first bytes decide whether a
    connection has TLS, not the port. So, on connections that are made after `ssl_context` was read, the
    script begins when the client first sends, receives or closes, after the TLS handshake if there is one.
    If the handshake fails, the connection is closed, and the script is not called.

    Cancelling a call of the connector opens no connection.

    Args:
        nursery: The nursery that the peers run in. An exception of a script ends it, so that a failed
            assertion fails the test; only a `trio.BrokenResourceError`, from a client that has closed the
            connection, just ends the script.
        serve: The script. When it returns, the connection is closed.
        stream_pair: Makes the two ends of a connection. The default buffers without limit; with
            `trio.testing.lockstep_stream_pair` every send waits until the data is received.
        alpn_protocols: The protocols that the peers select from in TLS handshakes (RFC 7301), the preferred
            first. A `ScriptedPeer` parses HTTP/1.1 only; for `"h2"` the script must speak HTTP/2 on the
            peer's `stream`.

    Attributes:
        dialled: The calls so far, in order.
        failures: Exceptions to raise from the next calls, one for each, in order; append to it.
        gate: An event that every call waits for; replace it by a new `trio.Event` to delay calls.
        peers: The peers of the connections so far, in order.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        serve: Callable[[ScriptedPeer], Awaitable[object]],
        *,
        stream_pair: Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]] = trio.testing.memory_stream_pair,
        alpn_protocols: Sequence[str] = _ALPN,
    ) -> None:
        self.dialled: list[Dialled] = []
        self.failures: list[BaseException] = []
        self.gate: trio.Event = trio.Event()
        self.gate.set()
        self.peers: list[ScriptedPeer] = []
        self._nursery = nursery
        self._serve = serve
        self._stream_pair = stream_pair
        self._alpn_protocols = tuple(alpn_protocols)
        self._ssl_context: ssl.SSLContext | None = None

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """TLS settings for a client that trusts the peers, for the argument `ssl_context` of the pool.

        They trust only a certificate authority that each process makes for itself. It issues certificates
        for every IP address and every host name that IDNA allows, which excludes names with an underscore.
        The peer of a unix socket has certificates for host names only.

        Raises:
            ImportError: The package trustme is not installed.
        """
        if self._ssl_context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            _authority().configure_trust(context)
            self._ssl_context = context
        return self._ssl_context

    async def connect_tcp(
        self,
        host: str,
        port: int,
        *,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> trio.abc.Stream:
        """Record the call in `dialled`, and connect to a new peer.

        Args:
            host: The host, recorded.
            port: The port, recorded.
            local_address: Recorded.
            socket_options: Recorded.

        Returns:
            The client's end of the connection.

        Raises:
            BaseException: The first of `failures`, if there is one.
        """
        options = {"local_address": local_address, "socket_options": socket_options}
        return await self._connect((host, port), options)

    async def connect_unix_socket(
        self, path: str, *, socket_options: Iterable[SocketOption] | None = None
    ) -> trio.abc.Stream:
        """Record the call in `dialled`, and connect to a new peer.

        Args:
            path: The path, recorded.
            socket_options: Recorded.

        Returns:
            The client's end of the connection.

        Raises:
            BaseException: The first of `failures`, if there is one.
        """
        return await self._connect(path, {"socket_options": socket_options})

    async def _connect(self, address: tuple[str, int] | str, options: dict[str, Any]) -> trio.abc.Stream:
        given = {name: value for name, value in options.items() if value is not None}
        self.dialled.append(Dialled(address, given))
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        client, server = self._stream_pair()
        # A certificate has an address without its zone.
        host = address[0].partition("%")[0] if isinstance(address, tuple) else "localhost"
        peer = _MemoryPeer(server, host, self._alpn_protocols)
        self.peers.append(peer)
        if self._ssl_context is None:
            self._nursery.start_soon(self._play, peer)
            return client
        end = _ClientEnd(client)
        self._nursery.start_soon(self._play, peer, end)
        return end

    async def _play(self, peer: ScriptedPeer, client: _ClientEnd | None = None) -> None:
        async with peer:
            with contextlib.suppress(trio.BrokenResourceError):
                if client is not None and await client.starts_tls():
                    await peer.start_tls()
                await self._serve(peer)
