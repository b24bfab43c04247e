"""GET: a whole response at once, then one piece by piece as it arrives.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

from examples import _peers
from trio_exchange import ConnectionPool


async def main(url: str) -> None:
    async with ConnectionPool() as pool:
        response = await pool.request("GET", url)
        print(response.status, response.extensions["reason_phrase"].decode())
        for name, value in response.headers:
            print(f"{name.decode()}: {value.decode()}")
        print()
        print(response.content.decode())

        async with pool.stream("GET", f"{url}/story") as response:
            async for chunk in response.aiter_stream():
                print(f"{len(chunk):3} bytes: {chunk.decode()}", end="")


if __name__ == "__main__":
    _peers.run(main, _peers.https_site)
