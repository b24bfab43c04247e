"""WebSocket: an Upgrade by trio_exchange, then wsproto on the network stream.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

import base64
import os

import trio

from examples import _peers
from examples._needs import needed
from trio_exchange import ConnectionPool, NetworkStream, Response

with needed():
    from wsproto.connection import Connection, ConnectionState, ConnectionType
    from wsproto.events import CloseConnection, Event, Ping, TextMessage
    from wsproto.utilities import generate_accept_token


def handshake(key: bytes) -> dict[str, str | bytes]:
    """The headers that ask for a WebSocket (RFC 6455, 4.1)."""
    return {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": key,
        "Sec-WebSocket-Version": "13",
    }


def upgraded(response: Response, key: bytes) -> NetworkStream:
    """The stream that a response to `handshake` has become."""
    if response.status != 101:
        raise RuntimeError(f"the server refused the WebSocket: {response.status}")
    headers = {name.lower(): value for name, value in response.headers}
    if headers.get(b"sec-websocket-accept") != generate_accept_token(key):
        raise RuntimeError("the server did not understand that it was asked for a WebSocket")
    stream: NetworkStream = response.extensions["network_stream"]
    return stream


class WebSocket:
    """Text messages over a stream on which both sides have agreed to speak WebSocket."""

    def __init__(self, stream: NetworkStream) -> None:
        self._stream = stream
        self._protocol = Connection(ConnectionType.CLIENT)
        # Kept here, so that a cancelled `receive` can be called again.
        self._parts: list[str] = []
        # A pong must not go out in the middle of a message.
        self._sending = trio.Lock()

    async def send(self, text: str) -> None:
        await self._send(TextMessage(data=text))

    async def receive(self) -> str | None:
        """The next message, or None when the server has closed the WebSocket."""
        while True:
            for event in self._protocol.events():
                match event:
                    case TextMessage():
                        self._parts.append(event.data)
                        if event.message_finished:
                            text = "".join(self._parts)
                            self._parts.clear()
                            return text
                    case Ping():
                        await self._send(event.response())
                    case CloseConnection():
                        if self._protocol.state is ConnectionState.REMOTE_CLOSING:
                            await self._send(event.response())
                        return None
            self._protocol.receive_data(await self._stream.read() or None)

    async def close(self) -> None:
        """Say that no more will be sent. The server answers with the end of its messages."""
        await self._send(CloseConnection(code=1000))

    async def _send(self, event: Event) -> None:
        async with self._sending:
            await self._stream.write(self._protocol.send(event))


async def main(url: str) -> None:
    key = base64.b64encode(os.urandom(16))
    async with (
        ConnectionPool() as pool,
        pool.stream("GET", url, headers=handshake(key)) as response,
        trio.open_nursery() as nursery,
    ):
        websocket = WebSocket(upgraded(response, key))
        nursery.start_soon(talk, websocket)
        while (text := await websocket.receive()) is not None:
            print(f"received: {text}")
        print("closed")


async def talk(websocket: WebSocket) -> None:
    for text in ("Hello!", "Is anybody there?", "Good-bye."):
        print(f"sent:     {text}")
        await websocket.send(text)
    await websocket.close()


if __name__ == "__main__":
    _peers.run(main, _peers.websocket_echo)
