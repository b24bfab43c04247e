"""aiohttp on asyncio, without what the others lack: cookies, decompression, a total timeout."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from ..cases import (
    DOWNLOAD_SIZE,
    SMALL_SIZE,
    TIMEOUT_SECONDS,
    UPLOAD_BODY,
    UPLOAD_CHUNK,
    UPLOAD_HEADERS,
    UPLOAD_SIZE,
    Work,
)

LOOP = "asyncio"
NO_TIMEOUTS = aiohttp.ClientTimeout(total=None, sock_connect=None)
TIMEOUTS = aiohttp.ClientTimeout(
    total=None, connect=TIMEOUT_SECONDS, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS
)
# An idle connection has to outlive the rounds of the other clients.
KEEPALIVE_SECONDS = 3600


class AiohttpClient:
    def __init__(self, session: aiohttp.ClientSession, work: Work) -> None:
        self._session = session
        self._url = work.url
        self._headers = decode(work.case.headers)
        self._upload_headers = decode(UPLOAD_HEADERS)

    async def get(self, lane: int) -> None:
        async with self._session.get(self._url, headers=self._headers) as response:
            assert response.status == 200
            assert len(await response.read()) == SMALL_SIZE

    async def download(self, lane: int) -> None:
        received = 0
        async with self._session.get(self._url, headers=self._headers) as response:
            assert response.status == 200
            async for chunk in response.content.iter_any():
                received += len(chunk)
        assert received == DOWNLOAD_SIZE

    async def upload(self, lane: int) -> None:
        await self._upload(upload_chunks())

    async def upload_bytes(self, lane: int) -> None:
        await self._upload(UPLOAD_BODY)

    async def _upload(self, data: AsyncIterator[bytes] | bytes) -> None:
        async with self._session.post(self._url, headers=self._upload_headers, data=data) as response:
            assert response.status == 204


def decode(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode(), value.decode()) for name, value in headers]


async def upload_chunks() -> AsyncIterator[bytes]:
    for _ in range(UPLOAD_SIZE // len(UPLOAD_CHUNK)):
        yield UPLOAD_CHUNK


@asynccontextmanager
async def open_client(work: Work) -> AsyncIterator[AiohttpClient]:
    context = ssl.create_default_context(cafile=work.ca_file)
    connector = aiohttp.TCPConnector(
        limit=work.case.connections,
        keepalive_timeout=KEEPALIVE_SECONDS,
        ssl=context if work.case.tls else True,
    )
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=TIMEOUTS if work.case.timeouts else NO_TIMEOUTS,
    ) as session:
        yield AiohttpClient(session, work)
