"""Streams around streams, and connectors that dial them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from trio_exchange import NetworkStream
from trio_exchange.testing import MemoryConnector, ScriptedPeer


class Wrapped(trio.abc.Stream):
    """A stream to be derived from, for those that misbehave."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.stream.aclose()


class WrappedHalfCloseable(Wrapped, trio.abc.HalfCloseableStream):
    """The same of a stream whose sending side can be closed alone."""

    stream: trio.abc.HalfCloseableStream

    async def send_eof(self) -> None:
        await self.stream.send_eof()


class TrackedStream(WrappedHalfCloseable):
    """A stream that knows whether it was closed."""

    def __init__(self, stream: trio.StapledStream[Any, Any]) -> None:
        super().__init__(stream)
        self.closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data: bytes | bytearray = await self.stream.receive_some(max_bytes)
        return data

    async def aclose(self) -> None:
        self.closed = True
        await self.stream.aclose()


class WrappingConnector(MemoryConnector):
    """A memory connector whose streams are wrapped."""

    def __init__(
        self,
        nursery: trio.Nursery,
        serve: Callable[[ScriptedPeer], Awaitable[object]],
        wrap: Callable[[trio.abc.Stream], trio.abc.Stream],
    ) -> None:
        super().__init__(nursery, serve)
        self.wrap = wrap

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> trio.abc.Stream:
        return self.wrap(await super().connect_tcp(*args, **kwargs))


class Crash(Exception):
    """What the closing of a `Crashing` stream raises."""


class Crashing(Wrapped):
    async def aclose(self) -> None:
        await super().aclose()
        raise Crash


class Prefixed(WrappedHalfCloseable):
    """A stream with something before what is received from it."""

    def __init__(self, stream: trio.abc.Stream, first: bytes) -> None:
        super().__init__(stream)
        self.first = first

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self.first:
            return await self.stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        data, self.first = self.first[:max_bytes], self.first[max_bytes or len(self.first) :]
        return data

    async def send_eof(self) -> None:
        raise NotImplementedError


class OneSender(Wrapped):
    """A stream to which several tasks may send."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self._lock = trio.Lock()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # What HTTP/2 has made has to be sent, also by a task that is cancelled.
        with trio.CancelScope(shield=True):
            async with self._lock:
                await self.stream.send_all(data)


def socket_streams() -> tuple[trio.SocketStream, trio.SocketStream]:
    one, other = trio.socket.socketpair()
    return trio.SocketStream(one), trio.SocketStream(other)


def clog(sock: trio.socket.SocketType) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(sock.fileno(), b"x" * 65536)


async def read_exactly(stream: NetworkStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        received = await stream.read(size - len(data), timeout=10)
        assert received
        data += received
    return data
