"""Every kind of connection, through proxies and TLS of any depth, and the far ends of them."""

from __future__ import annotations

import contextlib
import functools
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h2.events
import pytest
import trio

from tests.harness.certificates import client_context, make_tls
from tests.harness.h2peer import H2Peer
from tests.harness.peers import respond
from tests.harness.streams import socket_streams
from trio_exchange import ConnectionPool, Proxy
from trio_exchange.testing import MemoryConnector, ScriptedPeer


class TLSServer(trio.abc.Stream):
    """The server's side of TLS, whose records leave when the test says so."""

    def __init__(self, stream: trio.abc.Stream, context: ssl.SSLContext | None = None) -> None:
        self.stream = stream
        # The beginning of what is to be sent next.
        self.kept = b""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = (context or server_context()).wrap_bio(self._incoming, self._outgoing, server_side=True)

    async def handshake(self) -> None:
        """Do the handshake, and keep back the session tickets that follow it."""
        await self._do(self.ssl.do_handshake)

    async def _do(self, function: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                return function(*args)
            except ssl.SSLWantReadError:
                await self.flush()
                self._incoming.write(received := await self.stream.receive_some(65536))
                if not received:
                    raise trio.BrokenResourceError("the client has gone") from None

    def take(self) -> bytes:
        """The records that were not sent yet."""
        kept, self.kept = self.kept, b""
        return kept + self._outgoing.read()

    async def flush(self) -> None:
        if records := self.take():
            await self.stream.send_all(records)

    async def read_once(self) -> bytes:
        """Receive something, and take note of it."""
        self._incoming.write(await self.stream.receive_some(65536))
        return bytes(self.ssl.read(65536))

    def ask_for_certificate(self) -> None:
        """Make a record without data (RFC 8446, 4.6.2), to which a client answers."""
        self.ssl.verify_client_post_handshake()
        self.ssl.do_handshake()

    def say_goodbye(self) -> None:
        """Make a close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.ssl.unwrap()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.ssl.write(data)
        await self.flush()

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            return bytes(await self._do(self.ssl.read, max_bytes or 65536))
        except (ssl.SSLZeroReturnError, trio.BrokenResourceError):
            return b""

    async def aclose(self) -> None:
        await self.stream.aclose()


def whole_response(body: bytes) -> bytes:
    """A whole response."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class TunnelServer(trio.abc.Stream):
    """The server's side of a tunnel through HTTP/2."""

    def __init__(self, peer: H2Peer, stream_id: int) -> None:
        self.peer = peer
        self.stream_id = stream_id

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.peer.h2.send_data(self.stream_id, bytes(data))
        await self.peer.flush()

    async def send_eof(self) -> None:
        self.peer.h2.end_stream(self.stream_id)
        await self.peer.flush()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        kinds = h2.events.DataReceived, h2.events.StreamEnded, h2.events.StreamReset
        event: h2.events.Event | None = None
        with contextlib.suppress(EOFError):
            while not isinstance(event, kinds):
                event = await self.peer.event(h2.events.Event, self.stream_id)
        if not isinstance(event, h2.events.DataReceived):
            return b""
        if event.flow_controlled_length:
            self.peer.h2.acknowledge_received_data(event.flow_controlled_length, self.stream_id)
            await self.peer.flush()
        return event.data or b""

    async def aclose(self) -> None:
        await self.peer.stream.aclose()


@dataclass
class Far:
    """The far end of a connection: the streams that the server sees, the last of which HTTP speaks on."""

    streams: list[Any]

    @property
    def top(self) -> Any:
        return self.streams[-1]


@functools.cache
def server_context(*alpn: str) -> ssl.SSLContext:
    """For a server that may ask for a certificate later."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    make_tls().ca.issue_cert("localhost", "example.com").configure_cert(context)
    make_tls().ca.configure_trust(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.post_handshake_auth = True
    context.set_alpn_protocols(alpn)
    return context


async def accept_connect(stream: trio.abc.Stream) -> None:
    peer = ScriptedPeer(stream)
    request = await peer.receive_request()
    assert request.method == b"CONNECT"
    await peer.send(b"HTTP/1.1 200 Connected\r\n\r\n")


async def accept_socks(stream: trio.abc.Stream) -> None:
    assert await stream.receive_some(3) == b"\5\1\0"
    await stream.send_all(b"\5\0")
    assert (await stream.receive_some())[:4] == b"\5\1\0\3"
    await stream.send_all(b"\5\0\0\1" + bytes(6))


@dataclass(frozen=True)
class Kind:
    """A way to an origin.

    Attributes:
        proxies: Their URLs; `h2:` stands for an `https` proxy that speaks HTTP/2.
        tls: Whether TLS is spoken with the origin.
    """

    proxies: tuple[str, ...]
    tls: bool

    @property
    def proxy(self) -> list[Proxy]:
        return [
            Proxy(f"https://localhost:{443 + number}", ssl_context=a_client(), http2=True)
            if scheme == "h2"
            else Proxy(f"{scheme}://localhost:{443 + number}", ssl_context=a_client())
            for number, scheme in enumerate(self.proxies)
        ]

    @property
    def url(self) -> str:
        # What is not encrypted is not forwarded if it is a CONNECT.
        return "https://example.com/" if self.tls else "ws://example.com/"

    async def accept(self, stream: trio.abc.Stream) -> Far:
        """Play the proxies, and the origin's handshake."""
        far = Far([stream])
        for scheme in self.proxies:
            if scheme in ("https", "h2"):
                far.streams.append(TLSServer(far.top, server_context("h2") if scheme == "h2" else None))
                await far.top.handshake()
            if scheme == "h2":
                peer = H2Peer(far.top)
                await peer.start()
                stream_id, _ = await peer.head()
                await peer.respond(stream_id, end=False)
                far.streams.append(TunnelServer(peer, stream_id))
            elif scheme == "socks5h":
                await accept_socks(far.top)
            else:
                await accept_connect(far.top)
        if self.tls:
            far.streams.append(TLSServer(far.top))
            await far.top.handshake()
        return far


def a_client() -> ssl.SSLContext:
    context = client_context(make_tls().ca)
    context.post_handshake_auth = True
    return context


KINDS = {
    "direct": Kind((), False),
    "TLS": Kind((), True),
    "through http": Kind(("http",), False),
    "through socks": Kind(("socks5h",), False),
    "TLS through http": Kind(("http",), True),
    "through TLS": Kind(("https",), False),
    "TLS in TLS": Kind(("https",), True),
    "TLS in TLS in TLS": Kind(("https", "https"), True),
    "TLS through socks in TLS": Kind(("https", "socks5h"), True),
    "through HTTP/2": Kind(("h2",), False),
    "TLS through HTTP/2": Kind(("h2",), True),
    "TLS through HTTP/2 in TLS": Kind(("https", "h2"), True),
}


every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


every_proxy = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if not kind.tls], ids=[n for n, k in KINDS.items() if not k.tls]
)


class LayeredNetwork(MemoryConnector):
    """Connections over pairs of sockets, whose far ends the test gets."""

    def __init__(
        self, nursery: trio.Nursery, kind: Kind, then: Callable[[Far], Awaitable[object]] | None = None
    ) -> None:
        super().__init__(nursery, self._script, stream_pair=socket_streams)
        self._kind = kind
        self._then = then
        self._accepted, self._ends = trio.open_memory_channel[Far](100)

    async def _script(self, peer: ScriptedPeer) -> None:
        far = await self._kind.accept(peer.stream)
        await self._accepted.send(far)
        if self._then is None:
            await trio.sleep_forever()
        else:
            await self._then(far)

    async def far(self) -> Far:
        """The far end of the next connection."""
        return await self._ends.receive()


def pool_through(kind: Kind, connector: MemoryConnector, **options: Any) -> ConnectionPool:
    return ConnectionPool(a_client(), proxy=kind.proxy, connector=connector, **options)


async def answer_once(stream: trio.abc.Stream, body: bytes = b"") -> None:
    """Answer the next request."""
    await ScriptedPeer(stream).receive_request()
    await stream.send_all(whole_response(body))


async def answer(far: Far) -> None:
    """Answer requests on top of it all."""
    await respond(ScriptedPeer(far.top))
