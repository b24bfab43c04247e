"""This client."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio_exchange

from ..cases import (
    DOWNLOAD_SIZE,
    HEADERS,
    SMALL_SIZE,
    TIMEOUT_SECONDS,
    UPLOAD_CHUNK,
    UPLOAD_HEADERS,
    UPLOAD_SIZE,
    Work,
)

LOOP = "trio"
TIMEOUTS = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_SECONDS)


class TrioExchangeClient:
    def __init__(self, pool: trio_exchange.ConnectionPool, work: Work) -> None:
        self._pool = pool
        self._url = work.url
        self._extensions: dict[str, Any] | None = {"timeout": TIMEOUTS} if work.case.timeouts else None

    async def get(self, lane: int) -> None:
        response = await self._pool.request("GET", self._url, headers=HEADERS, extensions=self._extensions)
        assert response.status == 200
        assert len(response.content) == SMALL_SIZE

    async def download(self, lane: int) -> None:
        received = 0
        async with self._pool.stream(
            "GET", self._url, headers=HEADERS, extensions=self._extensions
        ) as response:
            assert response.status == 200
            async for chunk in response.aiter_stream():
                received += len(chunk)
        assert received == DOWNLOAD_SIZE

    async def upload(self, lane: int) -> None:
        response = await self._pool.request(
            "POST",
            self._url,
            headers=UPLOAD_HEADERS,
            content=upload_chunks(),
            extensions=self._extensions,
        )
        assert response.status == 204


async def upload_chunks() -> AsyncIterator[bytes]:
    for _ in range(UPLOAD_SIZE // len(UPLOAD_CHUNK)):
        yield UPLOAD_CHUNK


@asynccontextmanager
async def open_client(work: Work) -> AsyncIterator[TrioExchangeClient]:
    context = ssl.create_default_context(cafile=work.ca_file)
    async with trio_exchange.ConnectionPool(
        ssl_context=context, max_connections=work.case.connections
    ) as pool:
        yield TrioExchangeClient(pool, work)
