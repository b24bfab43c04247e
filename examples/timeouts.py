"""The four timeouts of a request, and a limit on everything at once.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

from typing import Any

import trio

from examples import _peers
from trio_exchange import ConnectionPool, TimeoutException


async def attempt(
    pool: ConnectionPool, method: str, url: str, seconds: dict[str, float], **more: Any
) -> None:
    try:
        response = await pool.request(method, url, extensions={"timeout": seconds}, **more)
    except TimeoutException as exc:
        print(f"{type(exc).__name__}: {exc}")
    else:
        print(response.status)


async def main(url: str, mute: str) -> None:
    async with ConnectionPool(max_connections=1) as pool:
        # Each of them says how long to wait for one thing. What is left out has no limit.
        await attempt(pool, "GET", url, {"connect": 5, "write": 5, "read": 5, "pool": 5})

        # This server accepts the connection, but leaves the TLS handshake to itself.
        await attempt(pool, "GET", f"https://{mute}", {"connect": 0.1})

        # It reads nothing either, and more than the sockets' buffers can't be sent.
        await attempt(pool, "PUT", f"http://{mute}", {"write": 0.1}, content=bytes(32 * 1024 * 1024))

        # The request is sent, and no answer comes.
        await attempt(pool, "GET", f"{url}/silence", {"read": 0.1})

        # The only connection that this pool may have is busy.
        async with pool.stream("GET", f"{url}/story"):
            await attempt(pool, "GET", url, {"pool": 0.01})

        # How long all of it may take, is said as everywhere in Trio.
        with trio.move_on_after(0.1) as scope:
            await pool.request("GET", f"{url}/silence")
        if scope.cancelled_caught:
            print("Cancelled: it took longer than 0.1 seconds in all")

        await attempt(pool, "GET", url, {})


if __name__ == "__main__":
    _peers.run(main, _peers.site, _peers.mute)
