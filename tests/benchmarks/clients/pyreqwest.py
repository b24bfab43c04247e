"""pyreqwest, which is reqwest in Rust, under asyncio; its own threads do the work.

It is given what the others are: the same limits, no redirects, decompression or cookies.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from urllib.parse import urljoin

from pyreqwest.client import Client, ClientBuilder

from ..cases import (
    DOWNLOAD_SIZE,
    SMALL_SIZE,
    TIMEOUT_SECONDS,
    UPLOAD_BODY,
    UPLOAD_HEADERS,
    Work,
)
from .aiohttp import KEEPALIVE_SECONDS, decode, upload_chunks
from .bare_h2 import WINDOW

LOOP = "asyncio"


class PyreqwestClient:
    def __init__(self, client: Client, work: Work) -> None:
        self._client = client
        self._url = work.url
        self._headers = decode(work.case.headers)
        self._upload_headers = decode(UPLOAD_HEADERS)

    async def get(self, lane: int) -> None:
        response = await self._client.get(self._url).headers(self._headers).build().send()
        assert response.status == 200
        assert len(await response.bytes()) == SMALL_SIZE

    async def download(self, lane: int) -> None:
        received = 0
        async with self._client.get(self._url).headers(self._headers).build_streamed() as response:
            assert response.status == 200
            reader = response.body_reader
            while (chunk := await reader.read_chunk()) is not None:
                received += len(chunk)
        assert received == DOWNLOAD_SIZE

    async def upload(self, lane: int) -> None:
        request = self._client.post(self._url).headers(self._upload_headers).body_stream(upload_chunks())
        response = await request.build().send()
        assert response.status == 204

    async def upload_bytes(self, lane: int) -> None:
        request = self._client.post(self._url).headers(self._upload_headers).body_bytes(UPLOAD_BODY)
        response = await request.build().send()
        assert response.status == 204

    async def connect(self, url: str, count: int) -> None:
        """Open that many connections: receive as many heads before the first body is read.

        Left to itself it would open fewer, since it prefers a connection that becomes idle to a new one.
        """
        async with AsyncExitStack() as stack:
            requests = (self._client.get(url).build_streamed() for _ in range(count))
            responses = [await stack.enter_async_context(request) for request in requests]
            for response in responses:
                await response.bytes()


@asynccontextmanager
async def open_client(work: Work) -> AsyncIterator[PyreqwestClient]:
    case = work.case
    with open(work.ca_file, "rb") as file:  # noqa: ASYNC230 - before anything else runs
        authority = file.read()
    builder = ClientBuilder().no_proxy().follow_redirects(False).referer(False)
    builder = builder.gzip(False).brotli(False).zstd(False).deflate(False)
    builder = builder.add_root_certificate_pem(authority)
    builder = builder.pool_max_idle_per_host(case.connections)
    builder = builder.pool_idle_timeout(timedelta(seconds=KEEPALIVE_SECONDS))
    if case.http2:
        # All requests are on one connection, as they are by the others.
        builder = builder.http2_prior_knowledge()
        builder = builder.http2_initial_stream_window_size(WINDOW)
        builder = builder.http2_initial_connection_window_size(WINDOW)
    else:
        builder = builder.max_connections(case.connections)
    if case.timeouts:
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        builder = builder.connect_timeout(timeout).read_timeout(timeout).pool_timeout(timeout)
    async with builder.build() as client:
        opened = PyreqwestClient(client, work)
        if not (case.http2 or case.connect_each):
            # A response that is larger than what is read ahead, so that each keeps its connection.
            await opened.connect(urljoin(work.url, "/1m"), case.connections)
        yield opened
