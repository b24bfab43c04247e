"""A guard against two tasks that do the same with one object at once.

Trio's own streams use a class of the same name for this, which is private to Trio.
"""

from __future__ import annotations

import trio


class ConflictDetector:
    """A context manager that one task at a time may enter.

    The check is synchronous, and entering never waits: the second task gets an error, since its bytes and
    those of the first would be interleaved at random.

    Args:
        message: The message of the error that the second task gets.

    Attributes:
        busy: Whether a task is inside.

    Raises:
        trio.BusyResourceError: From entering, while another task is inside.
    """

    __slots__ = ("_message", "busy")

    def __init__(self, message: str) -> None:
        self._message = message
        self.busy = False

    def __enter__(self) -> None:
        if self.busy:
            raise trio.BusyResourceError(self._message)
        self.busy = True

    def __exit__(self, *_: object) -> None:
        self.busy = False
