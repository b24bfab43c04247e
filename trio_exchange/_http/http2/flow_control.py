"""The windows of HTTP/2 (RFC 9113, 5.2): how much a server may send before it is read."""

from __future__ import annotations

# A stream's window at first, and at most; and the connection's, which has to be well above.
INITIAL_WINDOW = 256 * 1024
LARGEST_WINDOW = 8 * 1024 * 1024
CONNECTION_WINDOW = 2 * LARGEST_WINDOW
# How much data is credited to the connection at once.
_CREDIT_STEP = 1024 * 1024


class ReceiveWindow:
    """The window of one stream.

    It is opened as the user takes the data, so that an unread body holds at most one window. It grows while
    the user keeps up, so that a fast reader isn't held down over a link with latency.

    Attributes:
        receivable: How much of it the server has not used.
        awaited: Whether the user was there before what was taken last.
    """

    __slots__ = ("_size", "_uncredited", "awaited", "receivable")

    def __init__(self) -> None:
        self.receivable = INITIAL_WINDOW
        self.awaited = False
        self._size = INITIAL_WINDOW
        # How much is free again, and the server was not told.
        self._uncredited = 0

    def use(self, size: int) -> bool:
        """Count data that has arrived, padding included. Whether the server was allowed to send it."""
        self.receivable -= size
        return self.receivable >= 0

    def consume(self, size: int) -> list[int]:
        """Count data that was taken; if the user was faster than the server, let the window grow.

        Returns:
            The increments of the WINDOW_UPDATE frames to send.
        """
        increments = self.credit(size)
        if increments and self.awaited and self._size < LARGEST_WINDOW:
            self._size *= 2
            increments += self.credit(self._size // 2)
        return increments

    def credit(self, size: int) -> list[int]:
        """Open the window by `size`, once this is not too little.

        Returns:
            The increments of the WINDOW_UPDATE frames to send.
        """
        self._uncredited += size
        if self._uncredited < self._size // 2:
            return []
        increment, self._uncredited = self._uncredited, 0
        self.receivable += increment
        return [increment]


class ConnectionWindow:
    """The window of a connection.

    It is opened again as soon as data has arrived, whichever stream it is for, so that no stream can block
    others. Since all data is soon credited, the window is never used up, and need not be counted.
    """

    __slots__ = ("_uncredited",)

    def __init__(self) -> None:
        self._uncredited = 0

    def use(self, size: int) -> None:
        """Count data that has arrived, padding included."""
        self._uncredited += size

    def take_increment(self) -> int:
        """The increment of the WINDOW_UPDATE frame to send now, 0 for none."""
        if self._uncredited < _CREDIT_STEP:
            return 0
        increment, self._uncredited = self._uncredited, 0
        return increment
