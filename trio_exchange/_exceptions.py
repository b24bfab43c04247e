"""The exception tree, and the failures that leave a request safe to send again.

Every error about the way to a server, or about the server itself, is an `ExchangeError`. Wrong arguments
raise Python's own errors (`TypeError`, `ValueError`) before anything is sent. `InvalidURL` is both an
`ExchangeError` and a `ValueError`. Exceptions from user code, such as a body iterator or a trace handler,
propagate unchanged.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ._models import Response


__all__ = [
    "ConnectError",
    "ConnectTimeout",
    "ConnectionNotAvailable",
    "ExchangeError",
    "InvalidURL",
    "LocalProtocolError",
    "NetworkError",
    "PoolTimeout",
    "ProtocolError",
    "ProxyError",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "TimeoutException",
    "UnsupportedProtocol",
    "WriteError",
    "WriteTimeout",
]


class ExchangeError(Exception):
    """The base of every error that this library raises about an exchange."""


class ConnectionNotAvailable(ExchangeError):
    """No connection is available: the pool is closed, or it closed while the request was waiting."""


class ProxyError(ExchangeError):
    """A proxy refused or failed to open a tunnel.

    Attributes:
        response: The response of an HTTP proxy that refused, with the first 64 KiB of its content; else None.
        reply_code: The reply code of a SOCKS proxy that refused, else None.
        meaning: The meaning of the reply code, else None.
    """

    def __init__(
        self,
        *args: object,
        response: Response | None = None,
        reply_code: int | None = None,
        meaning: str | None = None,
    ) -> None:
        super().__init__(*args)
        self.response: Response | None = response
        self.reply_code: int | None = reply_code
        self.meaning: str | None = meaning


class ProtocolError(ExchangeError):
    """The base of errors about HTTP itself."""


class LocalProtocolError(ProtocolError):
    """The request, as the caller made it, can't be expressed in HTTP."""


class InvalidURL(LocalProtocolError, ValueError):
    """The URL is not valid for a request or for a proxy.

    The message shows no part of a URL that contains an `@`, since the text before the `@` may be a password.
    """


class UnsupportedProtocol(InvalidURL):
    """The URL's scheme is missing or not supported."""


class RemoteProtocolError(ProtocolError):
    """The server broke HTTP, or closed the connection before its response was complete."""


class TimeoutException(ExchangeError):
    """The base of the timeouts that the `timeout` request extension sets."""


class PoolTimeout(TimeoutException):
    """No connection became free within the `pool` timeout."""


class ConnectTimeout(TimeoutException):
    """The connection, TLS included, was not established within the `connect` timeout."""


class ReadTimeout(TimeoutException):
    """The server sent nothing for as long as the `read` timeout."""


class WriteTimeout(TimeoutException):
    """The server accepted nothing for as long as the `write` timeout."""


class NetworkError(ExchangeError):
    """The base of failures of the network below HTTP."""


class ConnectError(NetworkError):
    """The connection could not be established: name resolution, routing, a refusal, or TLS failed."""


class ReadError(NetworkError):
    """The connection broke or was closed while the library was reading from it."""


class WriteError(NetworkError):
    """The connection broke or was closed while the library was writing to it."""


class ExchangeFailed(Exception):
    """The network or the server failed before the response began. Private: users get its `error`.

    Only the `exchange` method of connections raises it. So it can't be confused with an error from a
    callback, which may be an `ExchangeError` of a request that the callback made.

    Args:
        error: The error to raise unless the request is sent again.
        unsent: The transport accepted no byte of the request.
        unanswered: No byte of a response arrived.
        refused: The server has promised that it did not act on the request (RFC 9113, 8.7).
    """

    def __init__(
        self, error: ExchangeError, *, unsent: bool = False, unanswered: bool = False, refused: bool = False
    ) -> None:
        super().__init__(error)
        self.error = error
        self.unsent = unsent
        self.unanswered = unanswered
        self.refused = refused


def show_public_contexts(error: BaseException) -> None:
    """Replace each `ExchangeFailed` among an error's contexts by the public error that it carries.

    A trace handler or a body iterator may raise while the exchange fails. The context of its exception is
    part of the traceback that the user sees.
    """
    seen = set()
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.add(link)
        if isinstance(link.__context__, ExchangeFailed):
            link.__context__ = link.__context__.error
        link = link.__context__


def bare(error: BaseException) -> BaseException:
    """Unwrap nested exception groups that contain a single exception. Return other errors unchanged."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


E = TypeVar("E", bound=BaseException)


def without_frames(error: E) -> E:
    """Drop the tracebacks of an error to keep, and of its causes and contexts.

    The frames of a traceback keep their local variables alive. Among them are the request's body, and often
    the object that keeps the error.
    """
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def copied(error: E) -> E:
    """Return an error of the same type, with the same arguments, that was not raised yet.

    Its causes are copies too: from CPython 3.12 on, the frames of a cause's traceback keep the frames above
    them alive. A cause that can't be copied is omitted.
    """
    other = copy.copy(error)
    cause = error.__cause__
    if cause is not None:
        try:
            other.__cause__ = copied(cause)
        except Exception:
            # The cause's constructor takes other arguments. The error's message describes the cause.
            other.__suppress_context__ = True
    return other
