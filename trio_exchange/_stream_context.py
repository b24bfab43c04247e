"""The asynchronous context manager that `stream` returns."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import trio

from ._exceptions import ExchangeError
from ._models import Request, Response
from ._public_calls import drop_library_frames

if TYPE_CHECKING:
    from ._pool import ConnectionPool


class StreamContext:
    """An asynchronous context manager that sends a request, and closes its response at the end.

    Args:
        pool: Sends the request.
        request: The request.
        opens_pool: Whether to open the pool for this request, and close it at the end.
    """

    def __init__(self, pool: ConnectionPool, request: Request, *, opens_pool: bool = False) -> None:
        self._pool = pool
        self._request = request
        self._opens_pool = opens_pool
        self._entered = False
        self._response: Response | None = None

    # It returns None, which no awaitable does, so that type checkers report the mistake too.
    def __await__(self) -> None:
        receiver = "trio_exchange" if self._opens_pool else "pool"
        raise TypeError(f"use 'async with {receiver}.stream(...) as response:'")

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Response:
        """Send the request and receive the head of the response.

        Raises:
            RuntimeError: The context was entered before.
        """
        if self._entered:
            raise RuntimeError("a stream context can be entered only once; call stream() again")
        self._entered = True
        if self._opens_pool:
            await self._pool.__aenter__()
        try:
            self._response = await self._pool.handle_async_request(self._request)
        except BaseException as exc:
            if self._opens_pool:
                await self._pool.__aexit__(type(exc), exc, exc.__traceback__)
            if isinstance(exc, ExchangeError):
                drop_library_frames(exc)
            raise
        return self._response

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the response, and the pool if the context opened it."""
        assert self._response is not None
        try:
            await self._response.aclose()
        except trio.Cancelled:
            # An exception of the block comes out rather than the cancellation.
            if exc_value is None:
                raise
        finally:
            if self._opens_pool:
                await self._pool.__aexit__(exc_type, exc_value, traceback)
