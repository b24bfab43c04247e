"""The reasons to send a failed request again."""

from __future__ import annotations

import enum

from .._exceptions import ExchangeFailed


class Resend(enum.Enum):
    """The reason to send a failed request again. It decides how often that may happen.

    Attributes:
        UNSENT: No byte was sent: the connection took no more requests, or it broke after it had carried
            others. Sending the request is not a repetition.
        REFUSED: The server has promised that it did not act on the request.
        UNANSWERED: The connection may have been dead before the request. Its method is idempotent.
    """

    UNSENT = enum.auto()
    REFUSED = enum.auto()
    UNANSWERED = enum.auto()


def reason_to_resend(failed: ExchangeFailed, *, idempotent: bool, reused: bool) -> Resend | None:
    """Return the reason to send a failed request again, if there is one.

    A request may be sent again if the server promised that it did not act on it. Otherwise it may be sent
    again only if the connection was reused: a server may close an idle connection at any time, so the
    request and the closure can cross on the wire. If no byte was sent, sending the request is not a
    repetition. If bytes were sent but no response began, the server may have acted on the request, and only
    an idempotent method (RFC 9110, 9.2.2) may be repeated without asking the user.

    Args:
        failed: The exception that the connection raised.
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
