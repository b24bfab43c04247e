"""Waiting for something that another task does in a synchronous step."""

from __future__ import annotations

from typing import Any

import trio


class Wakeup:
    """A wait of one task at a time, which `set` ends. Unlike `trio.Event` it can be used again and again."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def wait(self) -> None:
        """Wait for `set`."""
        self._task = trio.lowlevel.current_task()

        def abort(_: Any) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def set(self) -> None:
        """Wake the task that waits, if one does."""
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)
