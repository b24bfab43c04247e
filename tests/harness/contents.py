"""Request contents that misbehave or take their time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any


class Pieces:
    """Content whose pieces are made one by one, and may be waited for, or raise."""

    def __init__(self, *pieces: Any) -> None:
        self._pieces: Iterator[Any] = iter(pieces)
        self.taken = 0

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            self.taken += 1
            if isinstance(piece, BaseException):
                raise piece
            if callable(piece):
                piece = await piece()
            return piece if piece is not None else b""
        raise StopAsyncIteration


async def stream_of(size: int, piece: int = 60_000) -> AsyncIterator[bytes]:
    while size > 0:
        yield b"x" * min(piece, size)
        size -= piece
