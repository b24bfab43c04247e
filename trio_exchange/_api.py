"""TODO _api."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trio

from ._content import ContentTypes
from ._entrypoints import drop_own_frames
from ._exceptions import ExchangeError
from ._fields import HeaderTypes
from ._models import Request, Response
from ._pool import ConnectionPool, StreamContext
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
    """Send a request on a connection of its own, and read the whole response.

    Arguments, errors and what cancellation does are those of `ConnectionPool.request`.
    """
    try:
        async with ConnectionPool() as pool:
            return await pool.request(
                method, url, headers=headers, content=content, extensions=extensions, timeout=timeout
            )
    except ExchangeError as exc:
        drop_own_frames(exc)
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
    """Send a request on a connection of its own; the response is the `async with` block's.

    Arguments, errors and what cancellation does are those of `ConnectionPool.stream`.
    """
    extensions = with_timeout(extensions, timeout)
    return StreamContext(
        ConnectionPool(),
        Request(method, url, headers=headers, content=content, extensions=extensions),
        own_pool=True,
    )
