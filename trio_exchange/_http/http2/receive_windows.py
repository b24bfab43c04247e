"""HTTP/2 receive windows (RFC 9113, 5.2): how much a server may send before the user reads it."""

from __future__ import annotations

# The initial and the largest window of a stream, and the window of the connection. The last must be well
# above the others.
INITIAL_WINDOW = 256 * 1024
LARGEST_WINDOW = 8 * 1024 * 1024
CONNECTION_WINDOW = 2 * LARGEST_WINDOW
# The number of received bytes after which the connection's window is opened again.
_CREDIT_STEP = 1024 * 1024


class ReceiveWindow:
    """The receive window of one stream.

    The window is opened as the user takes the data, so an unread body occupies at most one window of memory.
    The window grows while the user keeps up, so that latency does not slow down a fast reader.

    Attributes:
        receivable: The number of bytes that the server may still send.
        awaited: Whether the user was already waiting when the last item arrived.
    """

    __slots__ = ("_size", "_uncredited", "awaited", "receivable")

    def __init__(self) -> None:
        self.receivable = INITIAL_WINDOW
        self.awaited = False
        self._size = INITIAL_WINDOW
        # The number of bytes that are free again, but not yet credited to the server.
        self._uncredited = 0

    def use(self, size: int) -> bool:
        """Count data that has arrived, padding included.

        Returns:
            Whether the server was allowed to send it.
        """
        self.receivable -= size
        return self.receivable >= 0

    def consume(self, size: int) -> list[int]:
        """Count data that the user took. The window grows if the user was faster than the server.

        Returns:
            The increments of the WINDOW_UPDATE frames to send.
        """
        increments = self.credit(size)
        if increments and self.awaited and self._size < LARGEST_WINDOW:
            self._size *= 2
            increments += self.credit(self._size // 2)
        return increments

    def credit(self, size: int) -> list[int]:
        """Credit `size` bytes, in one increment once at least half of the window is free.

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
    """The receive window of a connection.

    Data of any stream is credited as soon as it has arrived, so that no stream can block others. Since
    all data is soon credited, the window is never used up, and the rest of it need not be counted.
    """

    __slots__ = ("_uncredited",)

    def __init__(self) -> None:
        self._uncredited = 0

    def use(self, size: int) -> None:
        """Count data that has arrived, padding included."""
        self._uncredited += size

    def take_increment(self) -> int:
        """Return the increment of the WINDOW_UPDATE frame to send now, 0 for none."""
        if self._uncredited < _CREDIT_STEP:
            return 0
        increment, self._uncredited = self._uncredited, 0
        return increment
