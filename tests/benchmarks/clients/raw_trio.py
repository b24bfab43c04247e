"""The limit of Trio itself: the bytes of a request are sent, as many as a response has are received.

Neither is made or parsed, so no client on Trio can take less.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import trio

from ..cases import SMALL_SIZE, Work
from .bare_h11 import RECEIVE_SIZE, open_stream

LOOP = "trio"


class RawClient:
    def __init__(self, streams: list[trio.abc.Stream], request: bytes) -> None:
        self._streams = streams
        self._request = request
        self._size = 0

    async def learn(self) -> None:
        """Find out how long each response is."""
        await self._streams[0].send_all(self._request)
        received = b""
        while b"\r\n\r\n" not in received:
            received += await self._streams[0].receive_some(RECEIVE_SIZE)
        head = received[: received.index(b"\r\n\r\n") + 4]
        assert head.startswith(b"HTTP/1.1 200 ")
        assert f"\r\ncontent-length: {SMALL_SIZE}\r\n".encode() in head.lower()
        self._size = len(head) + SMALL_SIZE
        await self._receive(self._streams[0], self._size - len(received))

    async def get(self, lane: int) -> None:
        stream = self._streams[lane]
        await stream.send_all(self._request)
        await self._receive(stream, self._size)

    async def _receive(self, stream: trio.abc.Stream, left: int) -> None:
        while left:
            data = await stream.receive_some(RECEIVE_SIZE)
            assert data
            left -= len(data)


@asynccontextmanager
async def open_client(work: Work) -> AsyncIterator[RawClient]:
    url = urlsplit(work.url)
    fields = [(b"Host", url.netloc.encode()), *work.case.headers]
    lines = [f"GET {url.path} HTTP/1.1".encode(), *(b"%s: %s" % field for field in fields), b"", b""]
    client = RawClient([await open_stream(work) for _ in range(work.lanes)], b"\r\n".join(lines))
    await client.learn()
    yield client
    for stream in client._streams:
        await trio.aclose_forcefully(stream)
