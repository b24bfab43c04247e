"""Refusing the second of two tasks that use something at once."""

from __future__ import annotations

import trio


class ConflictDetector:
    """A context manager that only one task at a time may be inside of.

    Args:
        message: Of the error that the second task gets.

    Attributes:
        busy: Whether a task is inside.

    Raises:
        trio.BusyResourceError: On entering, if another task is inside.
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
