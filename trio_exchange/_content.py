"""Bodies: the content of a request as an asynchronous iterable, and iterators over the content of a response.

A request's content is given as bytes, as an ordinary iterable or as an asynchronous one, and becomes an
asynchronous iterable of bytes. Content that can be iterated again allows the request to be sent again.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, SupportsBytes, TypeAlias

import trio

from ._exceptions import LocalProtocolError

ContentTypes: TypeAlias = bytes | bytearray | memoryview | AsyncIterable[bytes] | Iterable[bytes]


def check_chunk(chunk: object) -> None:
    """Check an item that the content's iterator yielded.

    Raises:
        LocalProtocolError: It is not bytes-like.
    """
    if not isinstance(chunk, (bytes, bytearray, memoryview)):
        raise LocalProtocolError(f"the content's iterator must give bytes, but gave {type(chunk).__name__}")


class ByteStream:
    """Content that is wholly in memory; it can be iterated any number of times."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __bytes__(self) -> bytes:
        return self.data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _SyncIterator(iter((self.data,)))

    def __repr__(self) -> str:
        return f"<ByteStream [{len(self.data)} bytes]>"


_NO_CONTENT = ByteStream(b"")


class IterableStream:
    """Content from an ordinary iterable of bytes, as an asynchronous iterable."""

    __slots__ = ("iterable",)

    def __init__(self, iterable: Iterable[bytes]) -> None:
        self.iterable = iterable

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _SyncIterator(iter(self.iterable))


class _SyncIterator:
    """An ordinary iterator as an asynchronous one, with a checkpoint before each item."""

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
    """Convert a caller's content to an asynchronous iterable of bytes; None is empty content.

    Raises:
        TypeError: The content is neither bytes-like nor an iterable, or is a str or a mapping.
    """
    if content is None:
        return _NO_CONTENT
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
    """The base class of a response's body that `collect` reads faster than iteration does.

    Iteration has a checkpoint for every item, `collect` only where it waits. The body is its own iterator.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        def __aiter__(self) -> AsyncIterator[bytes]:
            """Return the body itself."""
            raise NotImplementedError

        @property
        def ended(self) -> bool:
            """Whether the body has been read to its end."""
            raise NotImplementedError

        async def __anext__(self) -> bytes:
            """Receive the next part of the body."""
            raise NotImplementedError

        async def collect(self) -> bytes:
            """Receive the rest of the body, and close it."""
            raise NotImplementedError


class ContentIterator:
    """An asynchronous iterator over a body, with a flag for its end.

    Attributes:
        ended: Whether the iterator is exhausted.
    """

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
# The iterator of a response whose whole body was read.
SPENT = ContentIterator(ByteStream(b""))
SPENT.ended = True
