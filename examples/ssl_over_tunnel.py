"""Trio's own TLS in a tunnel that is a stream of HTTP/2: a network stream is used as any other of Trio's.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

import ssl
from typing import Any

import trio

from examples import _peers
from trio_exchange import URL, ConnectionPool, Proxy


async def show_answer(event: str, info: dict[str, Any]) -> None:
    if event == "proxy.connect.complete":
        http_version, status, *_ = info["return_value"]
        print(f"the proxy answered {status} over {http_version.decode()}")


async def main(proxy: str, url: str) -> None:
    origin = URL(url).origin
    host = origin.host.decode()
    async with ConnectionPool(proxy=Proxy(proxy, http2=True)) as pool:
        tunnel = await pool.open_tcp_stream(host, origin.port, extensions={"trace": show_answer})
        async with trio.SSLStream(
            tunnel, ssl.create_default_context(), server_hostname=host, https_compatible=True
        ) as stream:
            await stream.do_handshake()
            print(stream.version(), "with", stream.server_hostname)
            await stream.send_all(f"GET / HTTP/1.0\r\nHost: {host}:{origin.port}\r\n\r\n".encode())
            async for data in stream:
                print(data.decode(), end="")


if __name__ == "__main__":
    _peers.run(main, _peers.https_proxy, _peers.https_site)
