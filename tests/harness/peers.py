"""What only our own tests need of servers: real sockets, certificates, transcripts, counting sockets."""

from __future__ import annotations

import array
import contextlib
import ctypes
import functools
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import trio
import trio.testing
import trustme

from trio_exchange import ConnectionPool
from trio_exchange.testing import ScriptedPeer

Script: TypeAlias = Callable[[ScriptedPeer], Awaitable[object]]

#: The ways in which the same bytes may arrive.
DELIVERIES = pytest.mark.parametrize("byte_by_byte", [False, True], ids=["whole", "bytewise"])


#: Buffers of which an item is more than one byte, or that have gaps, and what they amount to.
BUFFERS: dict[str, tuple[memoryview, bytes]] = {
    "items of four bytes": (
        memoryview(array.array("I", range(10_000))),
        array.array("I", range(10_000)).tobytes(),
    ),
    "every other byte": (memoryview(bytes(range(256)) * 250)[::2], (bytes(range(256)) * 250)[::2]),
    "backwards": (memoryview(array.array("H", range(9)))[::-1], array.array("H", range(8, -1, -1)).tobytes()),
    "two dimensions": (memoryview(bytes(range(24))).cast("B", (4, 6)), bytes(range(24))),
    "no dimension": (memoryview(ctypes.c_uint32(1)), bytes(ctypes.c_uint32(1))),
    "nothing": (memoryview(array.array("I")), b""),
}


# -- Servers on real sockets.


@dataclass(frozen=True)
class Server:
    """A running server; `uds` is the path of its socket if it is no TCP server."""

    scheme: str
    port: int
    uds: str | None
    cancel_scope: trio.CancelScope

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"


async def serve_tcp(nursery: trio.Nursery, script: Script, *, tls: ssl.SSLContext | None = None) -> Server:
    """Start a server on loopback that plays `script` on every connection, until the nursery ends."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    scope = _start(nursery, script, listeners[0], tls)
    return Server("http" if tls is None else "https", port, None, scope)


async def serve_unix(
    nursery: trio.Nursery, script: Script, path: Path, *, tls: ssl.SSLContext | None = None
) -> Server:
    """As `serve_tcp`, on a unix socket."""
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()
    scope = _start(nursery, script, trio.SocketListener(sock), tls)
    return Server("http" if tls is None else "https", 80, str(path), scope)


def _start(
    nursery: trio.Nursery, script: Script, listener: trio.SocketListener, tls: ssl.SSLContext | None
) -> trio.CancelScope:
    scope = trio.CancelScope()

    async def serve() -> None:
        with scope:
            await trio.serve_listeners(functools.partial(_play, script, tls), [listener])

    nursery.start_soon(serve)
    return scope


async def _play(script: Script, tls: ssl.SSLContext | None, stream: trio.SocketStream) -> None:
    async with ScriptedPeer(stream) as peer:
        # The client may go away, or refuse our certificate, at any time.
        with contextlib.suppress(trio.BrokenResourceError):
            if tls is not None:
                await peer.start_tls(tls)
            await script(peer)


async def background_nursery() -> trio.Nursery:
    """A nursery that a system task holds until the main task has ended.

    What is raised in the main task, such as a KeyboardInterrupt, is not put into a group by it.
    """
    opened = trio.Event()

    async def hold() -> None:
        async with trio.open_nursery() as nursery:
            nurseries.append(nursery)
            opened.set()
            await trio.sleep_forever()

    nurseries: list[trio.Nursery] = []
    trio.lowlevel.spawn_system_task(hold)
    await opened.wait()
    return nurseries[0]


async def respond(peer: ScriptedPeer) -> None:
    """The script of an ordinary server: it answers every request with the request's own body."""
    async for request in peer:
        await peer.send_response(200, body=request.body)


def reset(peer: ScriptedPeer) -> None:
    """Close a peer's TCP connection with an RST."""
    stream: object = peer.stream
    while isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    assert isinstance(stream, trio.SocketStream)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


# -- TLS.


@dataclass(frozen=True)
class TLS:
    """A certificate authority, a server that it has certified, and a client that trusts it."""

    ca: trustme.CA
    server: ssl.SSLContext
    client: ssl.SSLContext


@functools.cache
def make_tls() -> TLS:
    """Certificates of origins for all tests of a run."""
    return new_tls("127.0.0.1", "localhost", "example.com")


def new_tls(*names: str) -> TLS:
    """A certificate for a server of these names."""
    ca = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(server)
    return TLS(ca, server, client_context(ca))


def client_context(ca: trustme.CA) -> ssl.SSLContext:
    """A fresh context that trusts `ca` alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(context)
    return context


async def fail_handshake(stream: trio.abc.Stream, context: ssl.SSLContext) -> None:
    """Play the server of a TLS handshake that fails, and send the alert, which Trio's stream does not."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    failed = False
    while not failed:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await stream.send_all(outgoing.read())
            incoming.write(await stream.receive_some())
        except ssl.SSLError:
            failed = True
        else:
            raise AssertionError("the handshake has not failed")
    await stream.send_all(outgoing.read())


def demanding_context(ca: trustme.CA, *names: str) -> ssl.SSLContext:
    """A server's context that demands a certificate from its clients."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(context)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


# -- Scripts.


def transcript(data: bytes, *, byte_by_byte: bool = False, then_close: bool = False) -> Script:
    """A script that answers every request with the same bytes.

    Args:
        data: The answer.
        byte_by_byte: As of `ScriptedPeer.send`.
        then_close: Whether the connection ends after the first answer.
    """

    async def script(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send(data, byte_by_byte=byte_by_byte)
            if then_close:
                return

    return script


# -- Traces.


class Events:
    """A trace handler that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, event: str, info: dict[str, Any]) -> None:
        self.seen.append((event, info))

    @property
    def names(self) -> list[str]:
        return [event for event, _ in self.seen]

    def infos(self, event: str) -> list[dict[str, Any]]:
        """What was told of an event, each time."""
        return [info for name, info in self.seen if name == event]

    def info(self, event: str) -> dict[str, Any]:
        """What was told of an event that came once."""
        [info] = self.infos(event)
        return info


# -- Leaks.


def open_sockets() -> set[str]:
    """The sockets that this process has open, by inode (Linux)."""
    sockets = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if target.startswith("socket:"):
                sockets.add(target)
    return sockets


def assert_unharmed(pool: ConnectionPool, *, idle: int = 0) -> None:
    """The pool has no connection but `idle` ones, and nothing under way."""
    numbers = pool.statistics()
    assert (numbers.open, numbers.idle, numbers.connecting, numbers.waiting) == (idle, idle, 0, 0)


def internals(pool: ConnectionPool) -> list[Any]:
    """The pool's connections, with what is not for users."""
    return [*pool.connections]
