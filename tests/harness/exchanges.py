"""One exchange, played by a script that does not know the version of HTTP, and clients to run it on."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import h11
import trio
import trio.testing
from h2.errors import ErrorCodes

from tests.harness.certificates import alpn_server, make_tls
from tests.harness.checks import assert_unharmed
from tests.harness.h2server import Multiplexer, ServerStream
from tests.harness.peers import reset
from tests.harness.servers import serve_tcp
from tests.harness.traces import Events
from trio_exchange import ConnectionPool
from trio_exchange.testing import MemoryConnector, PeerRequest, ScriptedPeer

Fields: TypeAlias = Sequence[tuple[bytes, bytes]]
ExchangeScript: TypeAlias = "Callable[[ServerExchange], Awaitable[object]]"


class ServerExchange(abc.ABC):
    """The server's side of a request and its response.

    Attributes:
        method: The request's method.
        target: Its target; in HTTP/2 its path, or of a CONNECT its authority.
        headers: Its headers, by their names in lower case.
    """

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]

    @abc.abstractmethod
    async def receive(self) -> bytes:
        """Receive a piece of the request's body; none is its end."""

    async def receive_all(self) -> bytes:
        """Receive what is left of the request's body."""
        body = b""
        while piece := await self.receive():
            body += piece
        return body

    @abc.abstractmethod
    async def drain(self) -> bytes:
        """Receive what the client sends until it gives the request up."""

    @abc.abstractmethod
    async def inform(self, status: int, headers: Fields = ()) -> None:
        """Send an informational response."""

    @abc.abstractmethod
    async def respond(
        self, status: int = 200, headers: Fields = (), body: bytes | None = b"", *, begin: bytes = b""
    ) -> None:
        """Send a response; without a body, that is sent piece by piece, `begin` with the head, and ended."""

    @abc.abstractmethod
    async def send(self, data: bytes) -> None:
        """Send a piece of the response's body."""

    @abc.abstractmethod
    async def end(self, trailers: Fields = ()) -> None:
        """End the response's body."""

    @abc.abstractmethod
    async def accept(self, status: int = 200, headers: Fields = ()) -> ScriptedPeer:
        """Agree to a CONNECT; returns what is at the end of the tunnel."""

    @abc.abstractmethod
    async def break_off(self) -> None:
        """End the response in the middle: close the connection, or reset the stream."""

    @abc.abstractmethod
    async def send_garbage(self) -> None:
        """Send what breaks the protocol."""

    @abc.abstractmethod
    def reset_connection(self) -> None:
        """Close the TCP connection with an RST."""


class HTTP11Exchange(ServerExchange):
    """The server's side in HTTP/1.1, where a body without Content-Length is chunked."""

    def __init__(self, peer: ScriptedPeer, head: PeerRequest) -> None:
        self.method, self.target = head.method, head.target
        self.headers = {name.lower(): value for name, value in head.headers}
        self.is_tunnel = False
        self._peer = peer
        self._chunked = False

    async def receive(self) -> bytes:
        return await self._peer.receive_chunk()

    async def drain(self) -> bytes:
        received = b""
        while data := await self._peer.receive_some():
            received += data
        return received

    async def inform(self, status: int, headers: Fields = ()) -> None:
        await self._peer.send_response(status, list(headers))

    async def respond(
        self, status: int = 200, headers: Fields = (), body: bytes | None = b"", *, begin: bytes = b""
    ) -> None:
        self._chunked = body is None and all(name.lower() != b"content-length" for name, _ in headers)
        framing = [(b"Transfer-Encoding", b"chunked")] if self._chunked else []
        await self._peer.send_response(status, [*headers, *framing], body or self._framed(begin))

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if data and self._chunked else data

    async def send(self, data: bytes) -> None:
        await self._peer.send(self._framed(data))

    async def end(self, trailers: Fields = ()) -> None:
        if self._chunked:
            await self._peer.send(b"0\r\n%b\r\n" % b"".join(b"%b: %b\r\n" % field for field in trailers))

    async def accept(self, status: int = 200, headers: Fields = ()) -> ScriptedPeer:
        self.is_tunnel = True
        fields = b"".join(b"%b: %b\r\n" % field for field in headers)
        await self._peer.send(b"HTTP/1.1 %d Connected\r\n%b\r\n" % (status, fields))
        return self._peer

    async def break_off(self) -> None:
        await self._peer.stream.aclose()

    async def send_garbage(self) -> None:
        await self._peer.send(b"HTTP/1.1 xyz\r\n\r\n")

    def reset_connection(self) -> None:
        reset(self._peer.stream)


class HTTP2Exchange(ServerExchange):
    """The server's side in HTTP/2."""

    def __init__(self, stream: ServerStream) -> None:
        self.method = stream.headers[b":method"]
        self.target = stream.headers.get(b":path", stream.headers[b":authority"])
        self.headers = stream.headers
        self.stream = stream

    async def receive(self) -> bytes:
        return await self.stream.receive_some()

    async def drain(self) -> bytes:
        received = b""
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await self.stream.receive_some():
                received += data
            while not self.stream.was_reset:
                await self.stream.server.progress.wait()
        return received

    async def inform(self, status: int, headers: Fields = ()) -> None:
        await self.stream.inform(status, list(headers))

    async def respond(
        self, status: int = 200, headers: Fields = (), body: bytes | None = b"", *, begin: bytes = b""
    ) -> None:
        await self.stream.respond(status, list(headers), end=body == b"")
        if begin:
            await self.stream.send_all(begin)
        if body:
            await self.stream.send_all(body)
            await self.stream.send_eof()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def end(self, trailers: Fields = ()) -> None:
        if trailers:
            await self.stream.trail(list(trailers))
        else:
            await self.stream.send_eof()

    async def accept(self, status: int = 200, headers: Fields = ()) -> ScriptedPeer:
        await self.stream.respond(status, list(headers))
        return ScriptedPeer(self.stream)

    async def break_off(self) -> None:
        await self.stream.reset(ErrorCodes.INTERNAL_ERROR)

    async def send_garbage(self) -> None:
        # A WINDOW_UPDATE by nothing.
        await self.stream.server.peer.send(b"\0\0\4\x08\0\0\0\0\0\0\0\0\0")
        await trio.sleep_forever()

    def reset_connection(self) -> None:
        reset(self.stream.server.peer.stream)


class Client:
    """Pools of one version of HTTP, and the servers that they lead to, in memory or on sockets.

    Args:
        nursery: For the servers.
        http2: The version.
        tls: Whether it is spoken through TLS.

    Attributes:
        url: To be asked for.
        prefix: Of the version's trace events.
        exchanges: All that a script has played, in the order of their beginning.
    """

    def __init__(self, nursery: trio.Nursery, *, http2: bool, tls: bool) -> None:
        self.http2 = http2
        self.url = "https://example.com/" if tls else "http://example.com/"
        self.prefix = "http2." if http2 else "http11."
        self.exchanges: list[ServerExchange] = []
        self._nursery = nursery
        self._tls = alpn_server("h2" if http2 else "http/1.1") if tls else None

    @contextlib.asynccontextmanager
    async def pool(
        self,
        script: ExchangeScript,
        *,
        sockets: bool = False,
        lockstep: bool = False,
        deaf: bool = False,
        **options: Any,
    ) -> AsyncIterator[ConnectionPool]:
        """Enter a pool whose requests `script` answers.

        Args:
            script: It plays each request but those of `assert_reusable` and `assert_given_up`.
            sockets: Whether the connections are no streams in memory.
            lockstep: Whether sending waits until the peer receives.
            deaf: Whether the peers receive nothing, but what TLS needs to start.
            options: For the pool.
        """

        async def play(exchange: ServerExchange) -> None:
            if exchange.target == b"/check":
                await exchange.respond(200, body=b"fine")
                return
            self.exchanges.append(exchange)
            await script(exchange)

        async def serve(peer: ScriptedPeer) -> None:
            if self.http2:
                await Multiplexer(peer.stream, lambda stream: play(HTTP2Exchange(stream))).serve()
                return
            # The client closes the connection where it gives a request up, and so does `break_off`.
            ends = EOFError, h11.RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError
            with contextlib.suppress(*ends):
                while True:
                    exchange = HTTP11Exchange(peer, await peer.receive_head())
                    await play(exchange)
                    if exchange.is_tunnel:
                        return
                    await peer.receive_body()

        async def serve_tls(peer: ScriptedPeer) -> None:
            if self._tls is not None:
                await peer.start_tls(self._tls)
            if deaf:
                await trio.sleep_forever()
            await serve(peer)

        if sockets:
            server = await serve_tcp(self._nursery, serve, tls=self._tls)
            self.url = f"{server.url}/"
        else:
            pair = trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair
            options["connector"] = MemoryConnector(self._nursery, serve_tls, stream_pair=pair)
        if self.http2:
            options["http2"] = True
            options["http1"] = self._tls is not None
        async with ConnectionPool(make_tls().client, **options) as pool:
            yield pool

    def names(self, trace: Events) -> list[str]:
        """The names of an exchange's events, without the prefix, from its head on."""
        start = trace.names.index(f"{self.prefix}send_request_headers.started")
        return [name.removeprefix(self.prefix) for name in trace.names[start:]]

    async def assert_reusable(self, pool: ConnectionPool) -> None:
        """The exchange has ended well: the only connection there was serves the next request."""
        assert not any(stream.was_reset for stream in self._streams)
        await self._check(pool, kept=True)

    async def assert_given_up(self, pool: ConnectionPool, code: ErrorCodes = ErrorCodes.CANCEL) -> None:
        """The exchange was given up: HTTP/1.1 closes its connection, HTTP/2 resets its stream with `code`."""
        if self.http2:
            await trio.testing.wait_all_tasks_blocked()
            assert self._streams[-1].reset_code == code
        await self._check(pool, kept=self.http2)

    @property
    def _streams(self) -> list[ServerStream]:
        return [exchange.stream for exchange in self.exchanges if isinstance(exchange, HTTP2Exchange)]

    async def _check(self, pool: ConnectionPool, *, kept: bool) -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert_unharmed(pool, idle=int(kept))
        opened = pool.statistics().connections_opened
        assert (await pool.request("GET", f"{self.url}check")).content == b"fine"
        assert pool.statistics().connections_opened == opened + (not kept)
