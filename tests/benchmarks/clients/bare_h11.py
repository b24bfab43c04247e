"""A plain loop over h11, with a socket for each task, and neither a pool nor models.

It is not the least that HTTP/1.1 on Trio can cost: a client may do with less than h11 does.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import h11
import trio

from ..cases import (
    DOWNLOAD_SIZE,
    SMALL_SIZE,
    UPLOAD_BODY,
    UPLOAD_CHUNK,
    UPLOAD_HEADERS,
    UPLOAD_SIZE,
    Work,
)

LOOP = "trio"
RECEIVE_SIZE = 65536


class BareClient:
    def __init__(self, work: Work) -> None:
        url = urlsplit(work.url)
        self._work = work
        self._host = url.netloc.encode()
        self._target = url._replace(scheme="", netloc="").geturl().encode()
        self._lanes: list[tuple[trio.abc.Stream, h11.Connection]] = []

    async def open(self) -> None:
        """Open a connection for each lane, unless each request is to have its own."""
        if not self._work.case.connect_each:
            for _ in range(self._work.lanes):
                self._lanes.append(await self._connect())

    async def close(self) -> None:
        for stream, _ in self._lanes:
            await trio.aclose_forcefully(stream)

    async def _connect(self) -> tuple[trio.abc.Stream, h11.Connection]:
        return await open_stream(self._work), h11.Connection(h11.CLIENT)

    async def get(self, lane: int) -> None:
        if not self._work.case.connect_each:
            await self._fetch(*self._lanes[lane], SMALL_SIZE)
            return
        stream, connection = await self._connect()
        async with stream:
            await self._fetch(stream, connection, SMALL_SIZE)

    async def download(self, lane: int) -> None:
        await self._fetch(*self._lanes[lane], DOWNLOAD_SIZE)

    async def _fetch(self, stream: trio.abc.Stream, connection: h11.Connection, size: int) -> None:
        head = connection.send(self._request(b"GET", self._work.case.headers)) or b""
        await stream.send_all(head + (connection.send(h11.EndOfMessage()) or b""))
        await receive_response(stream, connection, 200, size)

    async def upload(self, lane: int) -> None:
        await self._upload(lane, UPLOAD_CHUNK, UPLOAD_SIZE // len(UPLOAD_CHUNK))

    async def upload_bytes(self, lane: int) -> None:
        await self._upload(lane, UPLOAD_BODY, 1)

    async def _upload(self, lane: int, chunk: bytes, count: int) -> None:
        stream, connection = self._lanes[lane]
        await stream.send_all(connection.send(self._request(b"POST", UPLOAD_HEADERS)) or b"")
        for _ in range(count):
            await stream.send_all(connection.send(h11.Data(data=chunk)) or b"")
        connection.send(h11.EndOfMessage())
        await receive_response(stream, connection, 204, 0)

    def _request(self, method: bytes, headers: list[tuple[bytes, bytes]]) -> h11.Request:
        return h11.Request(method=method, target=self._target, headers=[(b"Host", self._host), *headers])


async def receive_response(
    stream: trio.abc.Stream, connection: h11.Connection, status: int, size: int
) -> None:
    received = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(RECEIVE_SIZE)))
        elif type(event) is h11.Data:
            received += len(event.data)
        elif type(event) is h11.Response:
            assert event.status_code == status
        elif type(event) is h11.EndOfMessage:
            break
    assert received == size
    if connection.our_state is h11.DONE:
        connection.start_next_cycle()


@asynccontextmanager
async def open_client(work: Work) -> AsyncIterator[BareClient]:
    client = BareClient(work)
    await client.open()
    yield client
    await client.close()


async def open_stream(work: Work) -> trio.abc.Stream:
    url = urlsplit(work.url)
    host = url.hostname or ""
    stream = await trio.open_tcp_stream(host, url.port or 0)
    if not work.case.tls:
        return stream
    secured = trio.SSLStream(stream, _ssl_context(work.ca_file), server_hostname=host, https_compatible=True)
    await secured.do_handshake()
    return secured


@functools.cache
def _ssl_context(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)
