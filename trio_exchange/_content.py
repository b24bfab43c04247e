"""TODO _content."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, SupportsBytes, TypeAlias

import trio

from ._exceptions import LocalProtocolError

ContentTypes: TypeAlias = bytes | bytearray | memoryview | AsyncIterable[bytes] | Iterable[bytes]


def check_chunk(chunk: object) -> None:
    """Check what the content's iterator gave.

    Raises:
        LocalProtocolError: It is not bytes, nor like them.
    """
    if not isinstance(chunk, (bytes, bytearray, memoryview)):
        raise LocalProtocolError(f"the content's iterator must give bytes, but gave {type(chunk).__name__}")


class ByteStream:
    """Content that is there as a whole; it can be iterated any number of times."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __bytes__(self) -> bytes:
        return self.data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _SyncIterator(iter((self.data,)))

    def __repr__(self) -> str:
        return f"<ByteStream [{len(self.data)} bytes]>"


class IterableStream:
    """Content from an ordinary iterable of bytes, shown as an asynchronous one."""

    __slots__ = ("iterable",)

    def __init__(self, iterable: Iterable[bytes]) -> None:
        self.iterable = iterable

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _SyncIterator(iter(self.iterable))


class _SyncIterator:
    """An ordinary iterator as an asynchronous one, each step a checkpoint."""

    __slots__ = ("_iterator",)

    def __init__(self, iterator: Iterator[bytes]) -> None:
        self._iterator = iterator

    def __aiter__(self) -> _SyncIterator:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        for chunk in self._iterator:
            return chunk
        raise StopAsyncIteration


def to_stream(content: ContentTypes | None) -> AsyncIterable[bytes]:
    if content is None:
        return ByteStream(b"")
    if isinstance(content, (bytes, bytearray, memoryview)):
        return ByteStream(bytes(content))
    iterable: Any = content
    is_async = isinstance(iterable, AsyncIterable)
    if is_async or (isinstance(iterable, Iterable) and not isinstance(iterable, (str, Mapping))):
        if isinstance(iterable, SupportsBytes):
            return ByteStream(bytes(iterable))
        return iterable if is_async else IterableStream(iterable)
    raise TypeError(
        f"content must be bytes or an (asynchronous) iterable of bytes, but got {type(content).__name__}"
    )


class CollectableStream:
    """The base of bodies that can be had whole for less than a checkpoint for every piece of them.

    Such a body is its own iterator.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        def __aiter__(self) -> AsyncIterator[bytes]:
            """The body itself."""
            raise NotImplementedError

        @property
        def ended(self) -> bool:
            """Whether it was read to its end."""
            raise NotImplementedError

        async def __anext__(self) -> bytes:
            """The next piece of it."""
            raise NotImplementedError

        async def collect(self) -> bytes:
            """Read all that is left of the body, and close it."""
            raise NotImplementedError


class ContentIterator:
    """An asynchronous iterator that knows whether it has come to its end."""

    __slots__ = ("_iterator", "ended")

    def __init__(self, content: AsyncIterable[bytes]) -> None:
        self._iterator = aiter(content)
        self.ended: bool = False

    def __aiter__(self) -> ContentIterator:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._iterator)
        except StopAsyncIteration:
            self.ended = True
            raise


READ_ONLY_ONCE = "the body can be read only once; it was read before, at least in part"
# Of a body that was read as a whole.
SPENT = ContentIterator(ByteStream(b""))
SPENT.ended = True
