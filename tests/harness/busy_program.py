"""A busy program that is interrupted (SIGINT) at random moments, and has to end each time.

    python tests/harness/busy_program.py {http1|http2} {plain|tls} TIMES

Its server runs in another thread, where no interrupt arrives. It prints what `trio.run` raised.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import trio
import trio.lowlevel

from tests.harness.certificates import make_tls
from tests.harness.h2peer import H2Peer
from trio_exchange import ConnectionPool
from trio_exchange.testing import ScriptedPeer

BODY = b"x" * 300_000


async def serve_http1(stream: trio.abc.Stream) -> None:
    peer = ScriptedPeer(stream)
    async for _ in peer:
        await peer.send_response(200, body=BODY)


async def serve_http2(stream: trio.abc.Stream) -> None:
    peer = H2Peer(stream)
    await peer.start()
    while True:
        stream_id, _, _ = await peer.request()
        # The client's windows are large enough for one of these at a time.
        await peer.respond(stream_id, body=BODY[:60_000])


def serve(sock: socket.socket, protocol: str, context: ssl.SSLContext | None) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        # Its client ends at any moment.
        try:
            server: trio.abc.Stream = stream
            if context is not None:
                server = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
            await (serve_http2 if protocol == "http2" else serve_http1)(server)
        except Exception:
            await trio.aclose_forcefully(stream)

    async def run() -> None:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        await trio.serve_listeners(handle, [listener])

    trio.run(run)


async def upload() -> AsyncIterator[bytes]:
    for _ in range(20):
        yield b"y" * 5000
        await trio.lowlevel.checkpoint()


async def be_busy(url: str, options: dict[str, Any], timer: threading.Timer) -> None:
    timer.start()

    async def ask() -> None:
        while True:
            await pool.request("GET", url)
            await pool.request("POST", url, content=upload())
            async with pool.stream("GET", url) as response:
                async for _ in response.aiter_stream():
                    break

    async with ConnectionPool(**options) as pool:
        await ask()


def main(protocol: str, tls: str, times: int) -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    certificates = make_tls() if tls == "tls" else None
    server = threading.Thread(
        target=serve, args=(sock, protocol, certificates and certificates.server), daemon=True
    )
    server.start()
    http2 = protocol == "http2"
    options: dict[str, Any] = {"http2": http2, "http1": not http2}
    if certificates is not None:
        options["ssl_context"] = certificates.client
    url = f"{'http' if certificates is None else 'https'}://127.0.0.1:{port}/"
    ends: collections.Counter[str] = collections.Counter()
    for _ in range(times):
        timer = threading.Timer(random.uniform(0.005, 0.06), os.kill, (os.getpid(), signal.SIGINT))
        try:
            trio.run(be_busy, url, options, timer)
        except BaseException as exc:
            ends[type(exc).__name__ if isinstance(exc, KeyboardInterrupt) else repr(exc)] += 1
        timer.join()
    for end, count in ends.items():
        print(f"{count} times {end}")


if __name__ == "__main__":
    # A shell may have started this with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
