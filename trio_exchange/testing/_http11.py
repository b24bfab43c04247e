"""The server's side of an HTTP/1.1 connection, controlled by a test."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import h11
import trio
import trio.testing

from .._fields import Headers, HeaderTypes, to_headers
from ._tls import CLIENT_HELLO, server_context

# A ScriptedPeer parses HTTP/1.1 only.
ALPN = ("http/1.1",)

# The limit of h11 protects servers from clients; a test may send heads of any size.
_NO_LIMIT = 2**30

_WITHOUT_BODY = frozenset((204, 304))


@dataclass(frozen=True)
class PeerRequest:
    """A request that a peer has received.

    Attributes:
        method: Such as `b"GET"`.
        target: The request target, as sent; in HTTP/2 the `:path`, or the `:authority` of CONNECT.
        headers: The header fields, in the order of the wire, with names in lower case. In HTTP/2 the
            pseudo-header fields, such as `:authority`, are the first.
        body: The content, without its framing; empty from `receive_head`.
        stream_id: The number of the HTTP/2 stream; None in HTTP/1.1.
    """

    method: bytes
    target: bytes
    headers: Headers
    body: bytes = b""
    stream_id: int | None = None

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
        return server_context("localhost", ALPN)

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
            if self._h11.trailing_data[0].startswith(CLIENT_HELLO):
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
        await send_bytes(self.stream, data, byte_by_byte=byte_by_byte)

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


async def send_bytes(stream: trio.abc.Stream, data: bytes, *, byte_by_byte: bool) -> None:
    """Send bytes, as `ScriptedPeer.send` says."""
    if not byte_by_byte:
        await stream.send_all(data)
        return
    for index in range(len(data)):
        await stream.send_all(data[index : index + 1])
        await trio.testing.wait_all_tasks_blocked()


def _new_parser(received: bytes) -> h11.Connection:
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=_NO_LIMIT)
    if received:
        parser.receive_data(received)
    return parser


def _reason(status: int) -> bytes:
    with contextlib.suppress(ValueError):
        return HTTPStatus(status).phrase.encode("ascii")
    return b""
