"""What trio_exchange and httpcore2 do: both have the same API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

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

TIMEOUTS = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_SECONDS)


class PooledClient:
    """Measures a pool; the two pools have the same API."""

    def __init__(self, pool: Any, work: Work) -> None:
        self._pool = pool
        self._url = work.url
        self._headers = work.case.headers
        self._extensions: dict[str, Any] | None = {"timeout": TIMEOUTS} if work.case.timeouts else None

    async def get(self, lane: int) -> None:
        response = await self._pool.request(
            "GET", self._url, headers=self._headers, extensions=self._extensions
        )
        assert response.status == 200
        assert len(response.content) == SMALL_SIZE

    async def download(self, lane: int) -> None:
        received = 0
        async with self._pool.stream(
            "GET", self._url, headers=self._headers, extensions=self._extensions
        ) as response:
            assert response.status == 200
            async for chunk in response.aiter_stream():
                received += len(chunk)
        assert received == DOWNLOAD_SIZE

    async def upload(self, lane: int) -> None:
        await self._upload(upload_chunks())

    async def upload_bytes(self, lane: int) -> None:
        await self._upload(UPLOAD_BODY)

    async def _upload(self, content: AsyncIterator[bytes] | bytes) -> None:
        response = await self._pool.request(
            "POST",
            self._url,
            headers=UPLOAD_HEADERS,
            content=content,
            extensions=self._extensions,
        )
        assert response.status == 204

    async def hold(self, count: int) -> None:
        async with AsyncExitStack() as stack:
            responses = [
                await stack.enter_async_context(self._pool.stream("GET", self._url, headers=self._headers))
                for _ in range(count)
            ]
            for response in responses:
                assert len(await response.aread()) == SMALL_SIZE


async def upload_chunks() -> AsyncIterator[bytes]:
    for _ in range(UPLOAD_SIZE // len(UPLOAD_CHUNK)):
        yield UPLOAD_CHUNK
