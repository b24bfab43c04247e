"""For tests without a network: a connector in memory, and peers that follow a script.

A peer's script is an async function, called with a `ScriptedPeer` for every connection that is dialled::

    async def serve(peer: ScriptedPeer) -> None:
        async for request in peer:
            await peer.send_response(200, body=b"hello " + request.target)

    async def test_hello() -> None:
        async with trio.open_nursery() as nursery:
            connector = MemoryConnector(nursery, serve)
            async with ConnectionPool(connector=connector, ssl_context=connector.ssl_context) as pool:
                response = await pool.request("GET", "https://example.com/world")
            assert response.content == b"hello /world"

With `MemoryConnector.ssl_context` the peers answer `https` and `wss` URLs of any host. This needs the package
trustme: `pip install trio-exchange[testing]`. Tests without TLS don't need it.

With Trio's `MockClock` such a test is deterministic, and its timeouts take no time. A `ScriptedPeer` can
also be put on any other Trio stream, such as those that `trio.serve_tcp` hands to its handler.
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


# A script is trusted, its client is under test: let no limit of the peer's own be in the way.
_NO_LIMIT = 2**30

_WITHOUT_BODY = frozenset((204, 304))

# A record with a ClientHello begins with the type handshake and the version 3.x (RFC 8446, 5.1). Neither a
# request nor the preface of HTTP/2 begins with a control character.
_CLIENT_HELLO = b"\x16\x03"

# A ScriptedPeer speaks HTTP/1.1.
_ALPN = ("http/1.1",)


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
    headers: Headers
    body: bytes = b""

    def header(self, name: bytes | str) -> bytes | None:
        """The value of the first header of that name, in any case; None if there is none."""
        return self.headers.get(name)


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
        self._make_ssl_context = functools.partial(_server_context, "localhost", _ALPN)

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
        headers: HeaderTypes = (),
        body: bytes = b"",
    ) -> None:
        """Send a whole response, with a Content-Length if it has no framing of its own.

        Args:
            status: The status code.
            headers: A mapping or pairs, of bytes or ASCII str. Sent as they are.
            body: Sent as it is.

        Raises:
            TypeError: The headers are of another type.
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
        """Do a TLS handshake as the server; from then on the peer speaks TLS.

        Connections of a `MemoryConnector` whose `ssl_context` is used don't need it: their peers answer a
        TLS handshake before the script begins. It is for TLS that begins later, such as in a tunnel after
        CONNECT. It is also for certificates of your own, on connections whose connector is not asked for its
        `ssl_context`.

        Args:
            ssl_context: The server's settings. None for a certificate that `MemoryConnector.ssl_context`
                trusts. It is made for the name that the client asks for (SNI). For a client that asks for
                none, as it connects to an address, it is made for the host that was dialled.

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
    """The settings of a server called `host`, which answers to every other name too (RFC 6066, 3)."""

    def answer_to(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name is not None:
            tls.context = _server_context(name, alpn_protocols)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(alpn_protocols)
    context.sni_callback = answer_to
    _authority().issue_cert(host).configure_cert(context)
    return context


class _ClientEnd(trio.abc.HalfCloseableStream):
    """The client's end of a connection, on which its peer sees whether the client starts TLS.

    The peer learns this from what the client does first, without receiving anything. So a peer that has to
    speak first, on a connection without TLS, is not kept waiting for bytes that never come.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._begun = trio.Event()
        self._starts_tls = False

    async def starts_tls(self) -> bool:
        """Wait until the client sends, receives or closes. Returns whether it sent a ClientHello."""
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

    For `https` and `wss` URLs give `ssl_context` to the pool. Whether a connection has TLS is decided by what
    the client sends first, not by the port. On connections that are dialled after `ssl_context` was asked
    for, the script therefore begins when the client first sends, receives or closes, with the TLS handshake
    done if there is one. If that fails, the connection is closed, and the script does not run.

    Args:
        nursery: In which the peers run. What a script raises ends it, so that an assertion in a script
            fails the test; but a script that sends to a client which has gone just ends.
        serve: The script. When it returns, the connection is closed.
        stream_pair: Makes the two ends of a connection. The default buffers without limit;
            `trio.testing.lockstep_stream_pair` lets every sender wait for its receiver.
        alpn_protocols: What the peers choose from in TLS handshakes (RFC 7301), the best first. A
            `ScriptedPeer` parses HTTP/1.1; for `"h2"` the script has to speak HTTP/2 on the peer's `stream`.

    Attributes:
        dialled: Whom it was asked to connect to, in order.
        failures: Exceptions for the next calls, each raised once, in order. Append to it.
        gate: Calls wait for it. Replace it with a fresh `trio.Event` to hold them up.
        peers: The peers connected to, in order.
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
        """A client's TLS settings that trust the peers, for the pool's argument `ssl_context`.

        They trust nothing but an authority that each process makes for itself. It certifies the peers for
        every IP address and every host name that IDNA allows, which excludes names with an underscore. A peer
        behind a unix socket is certified for names alone.

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
        # A zone is no part of an address in a certificate.
        host = address[0].partition("%")[0] if isinstance(address, tuple) else "localhost"
        peer._make_ssl_context = functools.partial(_server_context, host, self._alpn_protocols)
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
