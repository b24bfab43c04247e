"""Checks of what a pool has left behind."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import trio
import trio.testing

from trio_exchange import ConnectionPool


def open_sockets() -> set[str]:
    """The sockets that this process has open, by inode (Linux)."""
    sockets = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if target.startswith("socket:"):
                sockets.add(target)
    return sockets


def assert_unharmed(pool: ConnectionPool, *, idle: int = 0) -> None:
    """The pool has no connection but `idle` ones, and nothing under way."""
    numbers = pool.statistics()
    assert (numbers.open, numbers.idle, numbers.connecting, numbers.waiting) == (idle, idle, 0, 0)


def internals(pool: ConnectionPool) -> list[Any]:
    """The pool's connections, with what is not for users."""
    return [*pool.connections]


async def assert_settles(pool: ConnectionPool, *, idle: int = 0) -> None:
    """As `assert_unharmed`, after those connections that are to be closed had their time."""
    await trio.testing.wait_all_tasks_blocked(0.005)
    assert_unharmed(pool, idle=idle)
