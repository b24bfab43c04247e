"""For tests without a network: a connector in memory, and peers that follow a script.

A peer's script is an async function, called with a `ScriptedPeer` for every connection that is dialled::

    async def serve(peer: ScriptedPeer) -> None:
        async for request in peer:
            await peer.send_response(200, body=b"hello " + request.target)

    async def test_hello() -> None:
        async with trio.open_nursery() as nursery:
            connector = MemoryConnector(nursery, serve)
            async with ConnectionPool(connector=connector) as pool:
                response = await pool.request("GET", "http://example.com/world")
            assert response.content == b"hello /world"

With Trio's `MockClock` such a test is deterministic, and its timeouts take no time. A `ScriptedPeer` can
also be put on any other Trio stream, such as those that `trio.serve_tcp` hands to its handler.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import h11
import trio
import trio.testing

from ._connectors import Connector, SocketOption

__all__ = ["Dialled", "MemoryConnector", "PeerRequest", "ScriptedPeer"]

# A script is trusted, its client is under test: let no limit of the peer's own be in the way.
_NO_LIMIT = 2**30

_WITHOUT_BODY = frozenset((204, 304))


@dataclass(frozen=True)
class PeerRequest:
    """A request, as a peer received it.

    Attributes:
        method: Such as `b"GET"`.
        target: As sent.
        headers: In the order of the wire, names lower-cased.
        body: What was received of the body, without its framing.
    """

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""

    def header(self, name: bytes) -> bytes | None:
        """The value of the first header of that (lower-case) name, None if there is none."""
        return next((value for key, value in self.headers if key == name), None)


class ScriptedPeer(trio.abc.AsyncResource):
    """The server's side of one HTTP/1.1 connection, played by a test.

    It parses what it receives, and sends whatever it is told, sense or nonsense. Iterating over it gives
    request after request, until the client closes the connection.

    Args:
        stream: The connection.

    Attributes:
        stream: The connection, with TLS after `start_tls`.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream: trio.abc.Stream = stream
        self._h11 = _new_parser(b"")
        self._body_done = True

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

        Raises:
            EOFError: The client closed the connection before it began one.
            h11.RemoteProtocolError: What came is no request, or ends early.
        """
        request = await self.receive_head()
        return replace(request, body=await self.receive_body())

    async def receive_head(self) -> PeerRequest:
        """Receive a request up to the end of its head.

        Raises:
            EOFError: The client closed the connection before it began one.
            h11.RemoteProtocolError: What came is no request.
        """
        # A fresh parser for each request: what the script answers is no concern of the parser's.
        self._h11 = _new_parser(self._h11.trailing_data[0])
        event = await self._next_event()
        if not isinstance(event, h11.Request):
            raise EOFError("the client closed the connection")
        self._body_done = False
        return PeerRequest(event.method, event.target, list(event.headers))

    async def receive_chunk(self) -> bytes:
        """Receive a piece of the body of the request whose head was received; none is its end."""
        if not self._body_done:
            event = await self._next_event()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            self._body_done = True
        return b""

    async def receive_body(self) -> bytes:
        """Receive what is left of the body of the request whose head was received."""
        chunks = []
        while chunk := await self.receive_chunk():
            chunks.append(chunk)
        return b"".join(chunks)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive bytes as they are, those first that came along with a request; none is the end."""
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
        """Send bytes as they are.

        Args:
            data: What to send.
            byte_by_byte: Let every single byte arrive, and be worked on, before the next is sent.
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
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: bytes = b"",
    ) -> None:
        """Send a whole response, with a Content-Length if it has no framing of its own.

        Args:
            status: The status code.
            headers: Sent as they are.
            body: Sent as it is.
        """
        headers = list(headers)
        framed = {b"content-length", b"transfer-encoding"} & {name.lower() for name, _ in headers}
        if not framed and status >= 200 and status not in _WITHOUT_BODY:
            headers.append((b"Content-Length", b"%d" % len(body)))
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, _reason(status))]
        lines += [b"%b: %b\r\n" % header for header in headers]
        await self.send(b"".join((*lines, b"\r\n", body)))

    # -- The connection.

    async def start_tls(self, ssl_context: ssl.SSLContext) -> None:
        """Do a TLS handshake as the server; from then on the peer speaks TLS."""
        stream = trio.SSLStream(self.stream, ssl_context, server_side=True, https_compatible=True)
        await stream.do_handshake()
        self.stream = stream

    async def send_eof(self) -> None:
        """End the sending; receiving goes on. Not possible with TLS."""
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


@dataclass(frozen=True)
class Dialled:
    """A call of a connector.

    Attributes:
        address: Host and port, or the path of a unix socket.
        options: The keyword arguments that it was given.
    """

    address: tuple[str, int] | str
    options: dict[str, Any]


class MemoryConnector(Connector):
    """A connector whose connections lead to scripted peers in the same process.

    Args:
        nursery: In which the peers run. What a script raises ends it, so that an assertion in a script
            fails the test; but a script that sends to a client which has gone just ends.
        serve: The script. When it returns, the connection is closed.
        stream_pair: Makes the two ends of a connection. The default buffers without limit;
            `trio.testing.lockstep_stream_pair` lets every sender wait for its receiver.

    Attributes:
        dialled: Whom it was asked to connect to, in order.
        failures: Exceptions for the next calls, each raised once, first things first.
        gate: Calls wait for it. Replace it with a fresh `trio.Event` to hold them up.
        peers: The peers connected to, in order.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        serve: Callable[[ScriptedPeer], Awaitable[object]],
        *,
        stream_pair: Callable[[], tuple[trio.abc.Stream, trio.abc.Stream]] = trio.testing.memory_stream_pair,
    ) -> None:
        self.dialled: list[Dialled] = []
        self.failures: list[BaseException] = []
        self.gate: trio.Event = trio.Event()
        self.gate.set()
        self.peers: list[ScriptedPeer] = []
        self._nursery = nursery
        self._serve = serve
        self._stream_pair = stream_pair

    async def connect_tcp(
        self,
        host: str,
        port: int,
        *,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> trio.abc.Stream:
        """Note host and port, and connect to a peer."""
        options = {"local_address": local_address, "socket_options": socket_options}
        return await self._connect((host, port), options)

    async def connect_unix_socket(
        self, path: str, *, socket_options: Iterable[SocketOption] | None = None
    ) -> trio.abc.Stream:
        """Note the path, and connect to a peer."""
        return await self._connect(path, {"socket_options": socket_options})

    async def _connect(self, address: tuple[str, int] | str, options: dict[str, Any]) -> trio.abc.Stream:
        given = {name: value for name, value in options.items() if value is not None}
        self.dialled.append(Dialled(address, given))
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        client, server = self._stream_pair()
        peer = ScriptedPeer(server)
        self.peers.append(peer)
        self._nursery.start_soon(self._play, peer)
        return client

    async def _play(self, peer: ScriptedPeer) -> None:
        async with peer:
            with contextlib.suppress(trio.BrokenResourceError):
                await self._serve(peer)
