"""Servers on real sockets, and a nursery that outlives the main task."""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.harness.peers import Script
from trio_exchange.testing import ScriptedPeer


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
