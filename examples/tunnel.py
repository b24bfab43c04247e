"""A tunnel through a proxy: CONNECT, TLS with the origin behind it, and a request over that.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

from examples import _peers
from trio_exchange import URL, ConnectionPool, NetworkStream, default_ssl_context


async def main(proxy: str, url: str) -> None:
    origin = URL(url).origin
    authority = b"%b:%d" % (origin.host, origin.port)
    async with (
        ConnectionPool() as pool,
        pool.stream("CONNECT", proxy, extensions={"target": authority}) as response,
    ):
        if response.status != 200:
            raise RuntimeError(f"the proxy refused the tunnel: {response.status}")
        tunnel: NetworkStream = response.extensions["network_stream"]
        stream = await tunnel.start_tls(default_ssl_context(), server_hostname=origin.host, timeout=5)
        print("TLS with", stream.get_extra_info("ssl_object").server_hostname, "behind the proxy")

        # From here on it is a Trio stream like any other.
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % authority)
        async for data in stream:
            print(data.decode(), end="")


if __name__ == "__main__":
    _peers.run(main, _peers.proxy, _peers.https_site)
