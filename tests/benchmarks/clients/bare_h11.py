"""The least that HTTP/1.1 on Trio can cost: h11 and a socket for each task, no pool, no models."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import h11
import trio

from ..cases import (
    DOWNLOAD_SIZE,
    HEADERS,
    SMALL_SIZE,
    UPLOAD_CHUNK,
    UPLOAD_HEADERS,
    UPLOAD_SIZE,
    Work,
)

LOOP = "trio"
RECEIVE_SIZE = 65536


class BareClient:
    def __init__(self, host: str, path: str, streams: list[trio.abc.Stream]) -> None:
        self._host = host.encode()
        self._path = path.encode()
        self._lanes = [(stream, h11.Connection(h11.CLIENT)) for stream in streams]

    async def get(self, lane: int) -> None:
        await self._fetch(lane, SMALL_SIZE)

    async def download(self, lane: int) -> None:
        await self._fetch(lane, DOWNLOAD_SIZE)

    async def _fetch(self, lane: int, size: int) -> None:
        stream, connection = self._lanes[lane]
        head = connection.send(self._request(b"GET", HEADERS)) or b""
        await stream.send_all(head + (connection.send(h11.EndOfMessage()) or b""))
        await receive_response(stream, connection, 200, size)

    async def upload(self, lane: int) -> None:
        stream, connection = self._lanes[lane]
        await stream.send_all(connection.send(self._request(b"POST", UPLOAD_HEADERS)) or b"")
        for _ in range(UPLOAD_SIZE // len(UPLOAD_CHUNK)):
            await stream.send_all(connection.send(h11.Data(data=UPLOAD_CHUNK)) or b"")
        connection.send(h11.EndOfMessage())
        await receive_response(stream, connection, 204, 0)

    def _request(self, method: bytes, headers: list[tuple[bytes, bytes]]) -> h11.Request:
        return h11.Request(method=method, target=self._path, headers=[(b"Host", self._host), *headers])


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
    connection.start_next_cycle()


@asynccontextmanager
async def open_client(work: Work) -> AsyncIterator[BareClient]:
    url = urlsplit(work.url)
    streams = [await open_stream(url.hostname or "", url.port or 0, work) for _ in range(work.lanes)]
    yield BareClient(url.netloc, url.path, streams)
    for stream in streams:
        await trio.aclose_forcefully(stream)


async def open_stream(host: str, port: int, work: Work) -> trio.abc.Stream:
    stream = await trio.open_tcp_stream(host, port)
    if not work.case.tls:
        return stream
    context = ssl.create_default_context(cafile=work.ca_file)
    secured = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
    await secured.do_handshake()
    return secured
