"""A local port that leads to a far host, through any proxies.

Without arguments it shows itself at work; with them it is at work until it is interrupted:

    python -m examples.port_forwarder 2525 mail.example.com:25 socks5h://gate:1080 http://proxy:3128

This example needs socksio, trustme and wsproto: pip install socksio trustme wsproto
"""

from __future__ import annotations

import os
import sys
from hashlib import sha256
from typing import Any

import trio

from examples import _peers
from examples._needs import needed
from trio_exchange import ConnectionPool, ExchangeError, Proxy

with needed():
    # The pool imports it when a proxy speaks SOCKS.
    import socksio  # noqa: F401


async def relay(left: trio.abc.HalfCloseableStream, right: trio.abc.HalfCloseableStream) -> None:
    """Copy both ways, until both sides have said all they have, and close them."""
    async with left, right:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, left, right)
                nursery.start_soon(copy, right, left)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            # One of them broke, or could be closed in both directions only: that is the end of both.
            pass


async def copy(source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream) -> None:
    """Copy until the source ends, and pass that on. The other direction may have more to say."""
    async for data in source:
        # It waits while the sink takes no more, so that no more than this is ever kept.
        await sink.send_all(data)
    try:
        await sink.send_eof()
    except NotImplementedError:
        # TLS, as it is in an https proxy's tunnel over HTTP/1.1.
        await sink.aclose()


async def log(event: str, info: dict[str, Any]) -> None:
    """Tell which way a connection takes."""
    match event:
        case "connection.connect_tcp.started":
            print(f"connecting to {info['host']}:{info['port']}")
        case "socks.connect.started":
            print(f"{info['proxy'].url.origin}: connect to {info['host']}:{info['port']}")
        case "proxy.connect.started":
            print(f"{info['proxy'].url.origin}: CONNECT {info['target'].decode()}")


async def forward(
    pool: ConnectionPool,
    port: int,
    target: str,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen on a port of the loopback interface, and connect whoever comes to the target."""
    host, _, target_port = target.rpartition(":")
    extensions = {"timeout": {"connect": 30.0}, "trace": log}

    async def serve(client: trio.SocketStream) -> None:
        try:
            far = await pool.open_tcp_stream(host, int(target_port), extensions=extensions)
        except ExchangeError as exc:
            print(f"{target}: {exc}", file=sys.stderr)
        else:
            await relay(client, far)

    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(serve, listeners)


async def main(port: int, target: str, *proxies: str) -> None:
    # Every connection through the port is one of the pool's.
    async with (
        ConnectionPool(proxy=[Proxy(url) for url in proxies], max_connections=None) as pool,
        trio.open_nursery() as nursery,
    ):
        port = await nursery.start(forward, pool, port, target)
        print(f"localhost:{port} leads to {target}", flush=True)


async def demonstrate(socks_proxy: str, http_proxy: str, target: str) -> None:
    """Send something through the port, say that it was all, and receive the answer to that."""
    content = os.urandom(1024 * 1024)
    async with (
        ConnectionPool(proxy=[Proxy(socks_proxy), Proxy(http_proxy)]) as pool,
        trio.open_nursery() as nursery,
    ):
        port = await nursery.start(forward, pool, 0, target)
        async with await trio.open_tcp_stream("localhost", port) as stream:
            await stream.send_all(content)
            await stream.send_eof()
            answer = b"".join([data async for data in stream]).decode()
        nursery.cancel_scope.cancel()
    print(f"sent:     {len(content)} bytes, SHA-256 {sha256(content).hexdigest()}")
    print(f"received: {answer}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            _peers.run(demonstrate, _peers.socks_proxy, _peers.proxy, _peers.digest)
        case [listen, target, *proxies]:
            trio.run(main, int(listen), target, *proxies)
        case _:
            sys.exit(__doc__)
