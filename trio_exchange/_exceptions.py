"""The exception tree, and which failures leave a request safe to send again.

Every error that this library raises for something that happened on the way to, or at, a server is an
`ExchangeError`. Errors about wrong arguments are Python's own (`TypeError`, `ValueError`), raised
before anything is sent; one about a URL is both. Whatever a user's own code raises (a body iterator,
a trace handler) passes through unchanged.
"""

from __future__ import annotations

import copy
import enum
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

    #: Set by the connection that raised the error, read by the pool: no byte of an answer arrived.
    _unanswered = False
    #: Set with `_unanswered`: not even one byte of the request was accepted for sending.
    _unsent = False
    #: Set by the connection: the server has promised that it did not act on the request.
    _refused = False


class ConnectionNotAvailable(ExchangeError):
    """No connection can be had: the pool is closed, or it closed while the request was waiting."""


class ProxyError(ExchangeError):
    """A proxy refused or failed to open a tunnel.

    Attributes:
        response: The answer of an HTTP proxy that refused, with the first 64 KiB of its content; else None.
        reply_code: The code of a SOCKS proxy that refused, else None.
        meaning: What that code means, else None.
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
    """A URL is not one that a request can be sent to, or that a proxy can have.

    Its message shows nothing of a URL that has an `@`, since what stands before that may be a password.
    """


class UnsupportedProtocol(InvalidURL):
    """The URL's scheme is missing or is none that this library speaks."""


class RemoteProtocolError(ProtocolError):
    """The server broke HTTP, or closed the connection in the middle of its answer."""


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
    """The connection could not be established: name, route, refusal, or TLS."""


class ReadError(NetworkError):
    """The connection broke, or was closed, while reading from it."""


class WriteError(NetworkError):
    """The connection broke, or was closed, while writing to it."""


def bare(error: BaseException) -> BaseException:
    """The exception that is alone in `error` if that is a group, however deep; else `error` as it is."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


E = TypeVar("E", bound=BaseException)


def without_frames(error: E) -> E:
    """Drop the tracebacks of an error that is kept, and of those that led to it.

    The frames of a traceback keep their local variables alive: among them a request's body, and often the
    object that keeps the error.
    """
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def copied(error: E) -> E:
    """An error of the same type, with the same arguments and marks, that was not raised yet.

    Its causes are copies too, since from CPython 3.12 on the frames of a cause's traceback keep those above
    them alive. A cause that can't be copied is left out.
    """
    other = copy.copy(error)
    cause = error.__cause__
    if cause is not None:
        try:
            other.__cause__ = copied(cause)
        except Exception:
            # An exception with arguments of its own kind. The message tells of it.
            other.__suppress_context__ = True
    return other


def mark_unanswered(error: ExchangeError, *, unsent: bool) -> None:
    """Note on `error` that the server had not begun to answer when it was raised.

    Args:
        error: The failure that ends the exchange.
        unsent: True if not one byte of the request was accepted by the transport.
    """
    error._unanswered = True
    error._unsent = unsent


def mark_refused(error: ExchangeError) -> None:
    """Note on `error` that the server did not act on the request (RFC 9113, 8.7)."""
    error._refused = True


def mark_alike(error: ExchangeError, other: ExchangeError) -> None:
    """Note on `error` what was noted on `other`, in whose place it is raised."""
    error._unanswered = other._unanswered
    error._unsent = other._unsent
    error._refused = other._refused


class Resend(enum.Enum):
    """Why a request that failed may be sent again, which decides how often.

    Attributes:
        UNSENT: Nothing was sent, since the connection took no more requests, or broke after it had carried
            others. Sending the request is no repetition.
        REFUSED: The server has promised that it did not act on the request.
        UNANSWERED: The connection may have been dead before the request, whose method is idempotent.
    """

    UNSENT = enum.auto()
    REFUSED = enum.auto()
    UNANSWERED = enum.auto()


def reason_to_resend(error: ExchangeError, *, idempotent: bool, reused: bool) -> Resend | None:
    """Why the request that failed with `error` may be sent again, None if it may not.

    Where the server has promised that it did not act, it can. Else the failure matters only on a reused
    connection: a server closes an idle connection at a moment of its choosing, so a request can meet the
    closing half-way. Where nothing was sent, sending it is not a repetition. Where something was sent but
    no answer began, the server may have acted on it, and only an idempotent method (RFC 9110, 9.2.2) may
    be repeated without asking the user.

    Args:
        error: What the exchange raised.
        idempotent: Whether the request's method is idempotent.
        reused: Whether the connection had carried a request before.
    """
    if error._unsent and (error._refused or reused):
        return Resend.UNSENT
    if error._refused:
        return Resend.REFUSED
    if reused and error._unanswered and idempotent:
        return Resend.UNANSWERED
    return None
