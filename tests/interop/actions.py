"""What the tests against real servers share: timeouts, uploads, requests side by side, websockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio
import wsproto

import trio_exchange
from trio_exchange import ConnectionPool
from trio_exchange.testing import ScriptedPeer

from .nginx import KIB

TIMEOUTS = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), 20.0)}


@dataclass(frozen=True)
class Transport:
    """A way to reach the server."""

    url: str
    options: dict[str, Any]

    def pool(self, **options: Any) -> ConnectionPool:
        return ConnectionPool(**{**self.options, **options})


def header(response: trio_exchange.Response, name: bytes) -> bytes | None:
    values = [value for key, value in response.headers if key.lower() == name.lower()]
    return b", ".join(values) if values else None


async def served_by(pool: ConnectionPool, url: str) -> tuple[bytes, bytes, int]:
    """The server's worker, its name for the connection, and the count of requests on that."""
    response = await pool.request("GET", url, extensions=TIMEOUTS)
    assert response.status == 200
    worker, connection, requests = response.content.split()
    return worker, connection, int(requests)


async def in_parallel(count: int, work: Callable[[int], Any]) -> None:
    async with trio.open_nursery() as nursery:
        for index in range(count):
            nursery.start_soon(work, index)


async def until_all_closed(pool: ConnectionPool, seconds: float) -> None:
    """Without any traffic of ours: the pool has to notice by itself."""
    with trio.fail_after(seconds):
        while pool.connections:  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.01)


async def pieces(content: bytes, size: int = 64 * KIB) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def serve(nursery: trio.Nursery, play: Callable[[ScriptedPeer], Awaitable[None]]) -> int:
    """A server on loopback that speaks HTTP/1.1, for nghttpx to connect to."""

    async def handle(stream: trio.SocketStream) -> None:
        async with ScriptedPeer(stream) as peer:
            await play(peer)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, handle, listeners)
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def shout(peer: ScriptedPeer) -> None:
    websocket = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
    while data := await peer.receive_some():
        websocket.receive_data(data)
        for event in websocket.events():
            match event:
                case wsproto.events.Request():
                    await peer.send(websocket.send(wsproto.events.AcceptConnection()))
                case wsproto.events.TextMessage():
                    answer = wsproto.events.TextMessage(
                        event.data.upper(), message_finished=event.message_finished
                    )
                    await peer.send(websocket.send(answer))
                case wsproto.events.CloseConnection():
                    await peer.send(websocket.send(event.response()))
                    return


async def next_text(websocket: wsproto.connection.Connection, stream: Any) -> str:
    return "".join([part async for part in _parts(websocket, stream)])


async def _parts(websocket: wsproto.connection.Connection, stream: Any) -> AsyncIterator[str]:
    while True:
        for event in websocket.events():
            assert isinstance(event, wsproto.events.TextMessage)
            yield event.data
            if event.message_finished:
                return
        websocket.receive_data(await stream.read(timeout=10))
