"""WebSocket through a proxy: TLS with the proxy, a tunnel in it, and TLS with the server in that.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

import base64
import os
import ssl
from typing import Any

import trio

from examples import _peers
from examples.websocket import WebSocket, handshake, talk, upgraded
from trio_exchange import ConnectionPool, Proxy


async def show_way(event: str, info: dict[str, Any]) -> None:
    if event.startswith(("connection.", "proxy.")) and event.endswith(".complete"):
        print(event.removesuffix(".complete"))


async def main(proxy_url: str, url: str) -> None:
    # Its own settings, as a proxy often has a certificate that is not everybody's, or asks for one.
    proxy = Proxy(proxy_url, ssl_context=ssl.create_default_context())
    key = base64.b64encode(os.urandom(16))
    async with (
        ConnectionPool(proxy=proxy) as pool,
        pool.stream("GET", url, headers=handshake(key), extensions={"trace": show_way}) as response,
        trio.open_nursery() as nursery,
    ):
        websocket = WebSocket(upgraded(response, key))
        nursery.start_soon(talk, websocket)
        while (text := await websocket.receive()) is not None:
            print(f"received: {text}")
        print("closed")


if __name__ == "__main__":
    _peers.run(main, _peers.https_proxy, _peers.secure_websocket_echo)
