"""WebSocket over HTTP/2 (RFC 8441): every one is a stream, so that many of them share one connection.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from examples import _peers
from examples.websocket import WebSocket
from trio_exchange import ConnectionPool


@asynccontextmanager
async def open_websocket(pool: ConnectionPool, url: str) -> AsyncIterator[WebSocket]:
    # An extended CONNECT takes the place of the Upgrade, and nothing needs a key.
    headers = {"Sec-WebSocket-Version": "13"}
    async with pool.stream(
        "CONNECT", url, headers=headers, extensions={"protocol": b"websocket"}
    ) as response:
        if response.status != 200:
            raise RuntimeError(f"the server refused the WebSocket: {response.status}")
        print(f"open on stream {response.extensions['stream_id']}")
        yield WebSocket(response.extensions["network_stream"])


async def main(url: str) -> None:
    async with (
        ConnectionPool(http2=True) as pool,
        open_websocket(pool, f"{url}/chat") as ann,
        open_websocket(pool, f"{url}/chat") as ben,
    ):
        await ann.send("Hello, I am Ann.")
        await ben.send("Hello, I am Ben.")
        for websocket in (ben, ann):
            print(f"received: {await websocket.receive()}")
        print(f"connections opened: {pool.statistics().connections_opened}")
        await ann.close()
        print("closed" if await ann.receive() is None else "still open")
        await ben.send("Are you still there?")
        print(f"received: {await ben.receive()}")


if __name__ == "__main__":
    _peers.run(main, _peers.secure_websocket_echo)
