"""TODO _http.retry."""

from __future__ import annotations

import enum

from .._exceptions import ExchangeError


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
