"""HTTP/2: many requests at once on one connection. One of them is cancelled, and the others don't notice.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

from typing import Any

import trio

from examples import _peers
from trio_exchange import ConnectionPool


async def get_story(pool: ConnectionPool, url: str) -> None:
    response = await pool.request("GET", f"{url}/story")
    stream_id = response.extensions["stream_id"]
    print(f"stream {stream_id:2}: {response.status}, {len(response.content)} bytes")


async def wait_in_vain(pool: ConnectionPool, url: str) -> None:
    scope = trio.CancelScope()

    async def cancel_when_sent(event: str, info: dict[str, Any]) -> None:
        if event == "http2.receive_response_headers.started":
            print(f"stream {info['stream_id']:2}: cancelled while it waits for its answer")
            scope.cancel()

    with scope:
        await pool.request("GET", f"{url}/silence", extensions={"trace": cancel_when_sent})


async def main(url: str) -> None:
    # HTTP/2 is used with servers that choose it in the TLS handshake, HTTP/1.1 with others.
    async with ConnectionPool(http2=True) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(9):
                nursery.start_soon(get_story, pool, url)
            nursery.start_soon(wait_in_vain, pool, url)
        print(f"connections opened: {pool.statistics().connections_opened}")
        print(pool.connections[0])


if __name__ == "__main__":
    _peers.run(main, _peers.https_site)
