"""Streams that were reset on this side, and what the server may still do about them."""

from __future__ import annotations

# How many of them are remembered.
MOST_REMEMBERED = 1000
# How many resets a server may not have read yet before each counts as a stream that is still open. To one
# that reads hundreds of requests and their resets at once, the client looks like an attacker.
_MOST_UNREAD = 10


class ResetLedger:
    """Keeps account of the streams of one connection that were reset or refused."""

    __slots__ = ("_asked_for", "_receivable", "_unread")

    def __init__(self) -> None:
        # How much may still arrive on each stream, in the order of their resets.
        self._receivable: dict[int, int] = {}
        # How many resets the server may not have read yet, and how many the answer to a PING will confirm.
        self._unread = 0
        self._asked_for = 0

    def remember(self, stream_id: int, receivable: int) -> None:
        """Expect data on a stream that was sent before its reset was seen.

        Args:
            stream_id: The stream.
            receivable: How much the server may send at most.
        """
        self._receivable[stream_id] = receivable
        if len(self._receivable) > MOST_REMEMBERED:
            del self._receivable[next(iter(self._receivable))]

    def __contains__(self, stream_id: int) -> bool:
        return stream_id in self._receivable

    def use(self, stream_id: int, size: int) -> bool:
        """Count data that has arrived on a stream that is remembered.

        Returns:
            Whether the server was allowed to send it, and it was not empty.
        """
        self._receivable[stream_id] -= size
        return bool(size) and self._receivable[stream_id] >= 0

    def count_reset(self) -> None:
        """Count a reset that was sent."""
        self._unread += 1

    @property
    def unread_beyond_limit(self) -> int:
        """How many resets count as streams that are still open."""
        return max(0, self._unread - _MOST_UNREAD)

    def ask(self) -> bool:
        """Whether to send a PING now, whose answer shows that the resets before it were read."""
        if self._asked_for or not self.unread_beyond_limit:
            return False
        self._asked_for = self._unread
        return True

    def confirm(self) -> None:
        """Take note of the answer to the PING."""
        self._unread -= self._asked_for
        self._asked_for = 0
