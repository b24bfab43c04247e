"""The streams that this side has reset, and the frames that the server may still send on them."""

from __future__ import annotations

# The most streams that a ledger remembers.
MOST_REMEMBERED = 1000
# The number of unconfirmed resets above which each further one counts as an open stream. To a server that
# reads hundreds of requests and their resets at once, the client would look like an attacker.
_MOST_UNREAD = 10


class ResetLedger:
    """The ledger of one connection's streams that were reset or refused."""

    __slots__ = ("_asked_for", "_receivable", "_unread")

    def __init__(self) -> None:
        # The number of bytes that may still arrive on each stream, in the order of their resets.
        self._receivable: dict[int, int] = {}
        # The number of unconfirmed resets, and how many of them the answer to the current PING will confirm.
        self._unread = 0
        self._asked_for = 0

    def remember(self, stream_id: int, receivable: int) -> None:
        """Expect data on a stream, sent by the server before it saw the reset.

        Args:
            stream_id: The id of the stream.
            receivable: The most bytes that the server may still send.
        """
        self._receivable[stream_id] = receivable
        if len(self._receivable) > MOST_REMEMBERED:
            del self._receivable[next(iter(self._receivable))]

    def __contains__(self, stream_id: int) -> bool:
        return stream_id in self._receivable

    def use(self, stream_id: int, size: int) -> bool:
        """Count data that has arrived on a remembered stream.

        Returns:
            Whether the data was not empty and the server was allowed to send it.
        """
        self._receivable[stream_id] -= size
        return bool(size) and self._receivable[stream_id] >= 0

    def count_reset(self) -> None:
        """Count a reset that was sent."""
        self._unread += 1

    @property
    def unread_beyond_limit(self) -> int:
        """The number of resets that count as open streams."""
        return max(0, self._unread - _MOST_UNREAD)

    def ask(self) -> bool:
        """Decide whether to send a PING now. Its answer confirms that the server has read earlier resets."""
        if self._asked_for or not self.unread_beyond_limit:
            return False
        self._asked_for = self._unread
        return True

    def confirm(self) -> None:
        """Confirm the resets that were sent before the PING, since its answer has arrived."""
        self._unread -= self._asked_for
        self._asked_for = 0
