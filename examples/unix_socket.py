"""HTTP over a unix socket: the pool connects to its path, whatever host the URL names.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

from examples import _peers
from trio_exchange import ConnectionPool


async def main(path: str) -> None:
    async with ConnectionPool(uds=path) as pool:
        response = await pool.request("GET", "http://service/")
        print(response.status, response.content.decode(), end="")


if __name__ == "__main__":
    _peers.run(main, _peers.unix_site)
