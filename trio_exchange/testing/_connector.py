"""A connector whose connections end at scripted peers in the same process."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import trio
import trio.testing

from .._connect.connector import Connector, SocketOption
from ._http11 import ALPN, ScriptedPeer
from ._tls import CLIENT_HELLO, authority, server_context


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
        self._begin(starts_tls=bytes(data[:2]) == CLIENT_HELLO)
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


class _MemoryPeer(ScriptedPeer):
    """A peer whose default certificate is for the host that its connection was made to."""

    def __init__(self, stream: trio.abc.Stream, host: str, alpn_protocols: tuple[str, ...]) -> None:
        super().__init__(stream)
        self._host = host
        self._alpn_protocols = alpn_protocols

    def _make_ssl_context(self) -> ssl.SSLContext:
        return server_context(self._host, self._alpn_protocols)


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
            first. A `ScriptedPeer` parses HTTP/1.1 only; for `"h2"` the script makes an `HTTP2Peer` of the
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
        alpn_protocols: Sequence[str] = ALPN,
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
            authority().configure_trust(context)
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
