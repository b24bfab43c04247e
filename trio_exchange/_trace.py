"""Trace points: the `trace` request extension and the debug log.

A trace point is an operation that reports its beginning and its end, as `NAME.started`, then
`NAME.complete` or `NAME.failed`. The handler is awaited inline, in the requester's task and in its cancel
scopes, without a shield: what a handler waits for, the request waits for, and a handler called while the
request is being cancelled runs to its first checkpoint. An exception that it raises ends the request.

Untraced requests pay next to nothing: without a handler and with logging off a request has no `Tracer`, and
all its spans are one shared object that does nothing.

The log shows the same events, on one logger for each protocol (`trio_exchange.connection`,
`trio_exchange.proxy`, `trio_exchange.socks`, `trio_exchange.http11`, `trio_exchange.http2`), with the values
of headers that carry credentials hidden.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

import trio

from ._exceptions import ExchangeFailed

#: What the `trace` extension holds: an asynchronous function of the event's name and its info.
TraceHandler: TypeAlias = Callable[[str, dict[str, Any]], Awaitable[None]]

_LOGGERS = {
    name: logging.getLogger(f"trio_exchange.{name}")
    for name in ("connection", "proxy", "socks", "http11", "http2")
}

_SECRET_HEADERS = frozenset(
    (b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"set-cookie2")
)


class Tracer:
    """Reports events to a handler, to the log, or to both."""

    __slots__ = ("_handler", "_log")

    def __init__(self, handler: TraceHandler | None, *, log: bool) -> None:
        self._handler = handler
        self._log = log

    async def report(self, event: str, info: dict[str, Any]) -> None:
        """Tell the log, then the handler, about one event.

        Raises:
            TypeError: The handler is not asynchronous.
            Exception: Whatever the handler raises.
        """
        if self._log:
            _log(event, info)
        if self._handler is not None:
            await call_async("the trace extension", self._handler, event, info)

    def without_log(self) -> Tracer | None:
        """The same handler, for events that another task already writes to the log."""
        return Tracer(self._handler, log=False) if self._handler is not None else None


def tracer_for(extensions: Mapping[str, Any]) -> Tracer | None:
    """The tracer of a request, or None where nobody is looking.

    Args:
        extensions: The request's extensions.

    Raises:
        TypeError: The `trace` extension is not callable.
    """
    handler = extensions.get("trace")
    if handler is not None and not callable(handler):
        raise TypeError(f"the trace extension must be an async function, not {handler!r}")
    log = log_enabled()
    return Tracer(cast("TraceHandler | None", handler), log=log) if handler is not None or log else None


def log_enabled() -> bool:
    """Whether any of the library's loggers takes debug messages."""
    for logger in _LOGGERS.values():  # noqa: SIM110 - a generator costs every request a microsecond
        if logger.isEnabledFor(logging.DEBUG):
            return True
    return False


class Span:
    """An operation of which nothing is reported, as an asynchronous context manager.

    Attributes:
        result: What the `complete` event tells. The code inside sets it. (A property here, since one object
            is shared by all requests, which would keep the result alive.)
    """

    __slots__ = ()

    @property
    def result(self) -> Any:
        return None

    @result.setter
    def result(self, value: Any) -> None:
        pass

    async def start(self) -> None:
        """Report the beginning, for operations that are no block of code."""

    async def complete(self) -> None:
        """Report the end."""

    async def fail(self, error: BaseException) -> None:
        """Report that `error` ended the operation."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


class _TracedSpan(Span):
    """An operation that reports its beginning and its end."""

    __slots__ = ("_info", "_name", "_tracer", "result")

    def __init__(self, tracer: Tracer, name: str, info: dict[str, Any]) -> None:
        self._tracer = tracer
        self._name = name
        self._info = info
        self.result: Any = None

    async def start(self) -> None:
        await self._tracer.report(f"{self._name}.started", self._info)

    async def complete(self) -> None:
        await self._tracer.report(f"{self._name}.complete", {"return_value": self.result})

    async def fail(self, error: BaseException) -> None:
        reported = error.error if isinstance(error, ExchangeFailed) else error
        await self._tracer.report(f"{self._name}.failed", {"exception": reported})

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await (self.complete() if exc_value is None else self.fail(exc_value))


_NOT_TRACED = Span()


def span(tracer: Tracer | None, name: str, info: dict[str, Any]) -> Span:
    """Make the trace point `name` of the code in an `async with` block.

    Args:
        tracer: Reports the events; None for no reports.
        name: The trace point's name, such as `http11.send_request_headers`.
        info: What the `started` event tells.
    """
    return _NOT_TRACED if tracer is None else _TracedSpan(tracer, name, info)


@trio.lowlevel.disable_ki_protection
async def call_async(name: str, function: Callable[..., Any], *args: Any) -> None:
    """Call a user's asynchronous function.

    Args:
        name: Where the function came from, for the error's message.
        function: The function.
        args: Its arguments.

    Raises:
        TypeError: It is not asynchronous.
    """
    result = function(*args)
    if not inspect.isawaitable(result):
        raise TypeError(f"{name} must be an async function, not {function!r}")
    await result


def _log(event: str, info: dict[str, Any]) -> None:
    logger = _LOGGERS[event.partition(".")[0]]
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s %s", event, {name: _without_secrets(value) for name, value in info.items()})


def _without_secrets(value: Any) -> Any:
    """Copy the tuples and lists of an event's info with the secret headers' values hidden."""
    match value:
        case (bytes() as name, bytes()) if name.lower() in _SECRET_HEADERS:
            return (name, b"[hidden]")
        case tuple():
            return tuple(map(_without_secrets, value))
        case list():
            return list(map(_without_secrets, value))
    return value
