"""The streams that CONNECT, Upgrade and `open_tcp_stream` give."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from trio_exchange import ConnectionPool, NetworkStream, Response

TARGET = {"target": "example.com:443"}


def network_stream(response: Response) -> NetworkStream:
    stream = response.extensions["network_stream"]
    assert isinstance(stream, NetworkStream)
    return stream


@contextlib.asynccontextmanager
async def tunnel(pool: ConnectionPool, url: str, extensions: Any = None) -> AsyncIterator[NetworkStream]:
    """Enter the response to a CONNECT, to `TARGET` unless `extensions` say more; give its stream."""
    async with pool.stream("CONNECT", url, extensions=extensions or TARGET) as response:
        yield network_stream(response)


@contextlib.asynccontextmanager
async def failing(error: type[Exception], operation: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run an operation, which blocks, in the background; what the block does makes it fail in time."""

    async def run() -> None:
        with pytest.raises(error), trio.fail_after(5):
            await operation()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        yield


async def read_all(stream: trio.abc.ReceiveStream | NetworkStream) -> bytes:
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return data
