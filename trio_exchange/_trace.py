"""Trace points: the `trace` request extension and the debug log.

A trace point is an operation that reports its beginning as `NAME.started`, and its end as `NAME.complete` or
`NAME.failed`. The handler is awaited inline, in the requester's task and its cancel scopes, without a
shield. So the request waits while the handler waits. A handler that is called while the request is being
cancelled runs up to its first checkpoint. An exception from the handler ends the request.

Untraced requests pay almost nothing. Without a handler and with logging off, a request has no `Tracer`, and
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

#: The type of the `trace` extension: an asynchronous function of the event's name and its info.
TraceHandler: TypeAlias = Callable[[str, dict[str, Any]], Awaitable[None]]

_LOGGER = logging.getLogger("trio_exchange")
_LOGGERS = {name: _LOGGER.getChild(name) for name in ("connection", "proxy", "socks", "http11", "http2")}

_SECRET_HEADERS = frozenset(
    (b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"set-cookie2")
)


class Tracer:
    """A reporter of events to a handler, to the log, or to both."""

    __slots__ = ("_handler", "_log")

    def __init__(self, handler: TraceHandler | None, *, log: bool) -> None:
        self._handler = handler
        self._log = log

    async def report(self, event: str, info: dict[str, Any]) -> None:
        """Report one event to the log, then to the handler.

        Raises:
            TypeError: The handler is not asynchronous.
            Exception: The handler raised it.
        """
        if self._log:
            _log(event, info)
        if self._handler is not None:
            await call_async("the trace extension", self._handler, event, info)

    def without_log(self) -> Tracer | None:
        """Return a tracer for the handler alone, for events that another task logs; or None."""
        return Tracer(self._handler, log=False) if self._handler is not None else None


def tracer_for(extensions: Mapping[str, Any]) -> Tracer | None:
    """Return the tracer of a request, or None without a handler and with logging off.

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
    """Return whether any of the library's loggers accepts debug messages."""
    if _LOGGER.isEnabledFor(logging.DEBUG):
        return True
    for logger in _LOGGERS.values():  # noqa: SIM110 - a generator costs every request half a microsecond
        # A logger without a level of its own has the parent's.
        if logger.level and logger.isEnabledFor(logging.DEBUG):
            return True
    return False


class Span:
    """An operation that reports no events, as an asynchronous context manager.

    Attributes:
        result: The `return_value` of the `complete` event, set by the code inside the block. This class
            discards it: all requests share one object, which would keep the result alive.
    """

    __slots__ = ()

    @property
    def result(self) -> Any:
        return None

    @result.setter
    def result(self, value: Any) -> None:
        pass

    async def start(self) -> None:
        """Report the beginning, for operations that are not a single block of code."""

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
    """Return a span that reports the code in an `async with` block as the trace point `name`.

    Args:
        tracer: The tracer to report to, or None for no reports.
        name: The trace point's name, such as `http11.send_request_headers`.
        info: The info of the `started` event.
    """
    return _NOT_TRACED if tracer is None else _TracedSpan(tracer, name, info)


@trio.lowlevel.disable_ki_protection
async def call_async(name: str, function: Callable[..., Any], *args: Any) -> None:
    """Call a user's asynchronous function.

    Args:
        name: The origin of the function, for the error message.
        function: The function to call.
        args: The arguments of the function.

    Raises:
        TypeError: The function is not asynchronous.
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
    """Return a copy of a value of an event's info, with the values of secret headers hidden."""
    match value:
        case (bytes() as name, bytes()) if name.lower() in _SECRET_HEADERS:
            return (name, b"[hidden]")
        case tuple():
            return tuple(map(_without_secrets, value))
        case list():
            return list(map(_without_secrets, value))
    return value
