"""Why a request that failed may be sent again."""

from __future__ import annotations

import enum

from .._exceptions import ExchangeFailed


class Resend(enum.Enum):
    """Why a request that failed may be sent again. The reason decides how often.

    Attributes:
        UNSENT: Nothing was sent, since the connection took no more requests, or broke after it had carried
            others. Sending the request is no repetition.
        REFUSED: The server has promised that it did not act on the request.
        UNANSWERED: The connection may have been dead before the request, whose method is idempotent.
    """

    UNSENT = enum.auto()
    REFUSED = enum.auto()
    UNANSWERED = enum.auto()


def reason_to_resend(failed: ExchangeFailed, *, idempotent: bool, reused: bool) -> Resend | None:
    """Find out why a request that failed may be sent again.

    A request that the server has promised not to have acted on may be. Otherwise the failure matters only
    on a reused connection: a server closes an idle connection at a moment of its choosing, so a request can
    cross the closing on the wire. If nothing was sent, sending the request is no repetition. If something
    was sent but no response began, the server may have acted on it, and only an idempotent method
    (RFC 9110, 9.2.2) may be repeated without asking the user.

    Args:
        failed: What the connection raised.
        idempotent: Whether the request's method is idempotent.
        reused: Whether the connection had carried a request before.

    Returns:
        The reason, or None if the request may not be sent again.
    """
    if failed.unsent and (failed.refused or reused):
        return Resend.UNSENT
    if failed.refused:
        return Resend.REFUSED
    if reused and failed.unanswered and idempotent:
        return Resend.UNANSWERED
    return None
