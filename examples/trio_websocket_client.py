"""The trio-websocket library through a proxy: what it needs is a stream, and the pool opens one.

This example needs trio-websocket, trustme and wsproto: pip install trio-websocket trustme wsproto
"""

from __future__ import annotations

from typing import Any

import trio

from examples import _peers
from examples._needs import needed
from trio_exchange import URL, ConnectionPool, Proxy, default_ssl_context

with needed():
    from trio_websocket import wrap_client_stream


async def main(proxy: str, url: str) -> None:
    address = URL(url)
    host, port = address.origin.host.decode(), address.origin.port
    async with ConnectionPool(proxy=Proxy(proxy)) as pool, trio.open_nursery() as nursery:
        tunnel = await pool.open_tcp_stream(host, port, extensions={"timeout": {"connect": 5}})
        # Its signature names two classes of Trio's, but any stream will do.
        stream: Any = await tunnel.start_tls(default_ssl_context(), host, timeout=5)
        websocket = await wrap_client_stream(nursery, stream, f"{host}:{port}", address.target.decode())
        for text in ("Hello!", "Is anybody there?", "Good-bye."):
            print(f"sent:     {text}")
            await websocket.send_message(text)
            print("received:", await websocket.get_message())
        await websocket.aclose()
        print(websocket.closed)


if __name__ == "__main__":
    _peers.run(main, _peers.proxy, _peers.secure_websocket_echo)
