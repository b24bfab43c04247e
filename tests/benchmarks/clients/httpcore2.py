"""httpcore2, whose asynchronous API finds out by itself that it runs on Trio."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpcore2

from ..cases import Work
from .pooled import PooledClient

LOOP = "trio"


@asynccontextmanager
async def open_client(work: Work) -> AsyncIterator[PooledClient]:
    context = ssl.create_default_context(cafile=work.ca_file)
    proxy = None if work.proxy_url is None else httpcore2.Proxy(work.proxy_url)
    async with httpcore2.AsyncConnectionPool(
        ssl_context=context,
        proxy=proxy,
        max_connections=work.case.connections,
        http1=not work.case.http2,
        http2=work.case.http2,
    ) as pool:
        yield PooledClient(pool, work)
