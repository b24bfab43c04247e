"""Functions that send one request each, with a pool that is opened for it and closed after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trio

from ._content import ContentTypes
from ._exceptions import ExchangeError
from ._fields import HeaderTypes
from ._models import Request, Response
from ._pool import ConnectionPool
from ._public_calls import drop_library_frames
from ._stream_context import StreamContext
from ._timeouts import TimeoutTypes, with_timeout
from ._urls import URL


@trio.lowlevel.enable_ki_protection
async def request(
    method: bytes | str,
    url: URL | bytes | str,
    *,
    headers: HeaderTypes | None = None,
    content: ContentTypes | None = None,
    extensions: Mapping[str, Any] | None = None,
    timeout: TimeoutTypes | None = None,
) -> Response:
    """Send a request on a new connection, and read the whole response.

    The arguments, the errors and the effect of cancellation are those of `ConnectionPool.request`.
    """
    try:
        async with ConnectionPool() as pool:
            return await pool.request(
                method, url, headers=headers, content=content, extensions=extensions, timeout=timeout
            )
    except ExchangeError as exc:
        drop_library_frames(exc)
        raise


def stream(
    method: bytes | str,
    url: URL | bytes | str,
    *,
    headers: HeaderTypes | None = None,
    content: ContentTypes | None = None,
    extensions: Mapping[str, Any] | None = None,
    timeout: TimeoutTypes | None = None,
) -> StreamContext:
    """Send a request on a new connection, and give its response to an `async with` block.

    The arguments, the errors and the effect of cancellation are those of `ConnectionPool.stream`.
    """
    extensions = with_timeout(extensions, timeout)
    return StreamContext(
        ConnectionPool(),
        Request(method, url, headers=headers, content=content, extensions=extensions),
        opens_pool=True,
    )
