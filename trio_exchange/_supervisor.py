"""The nurseries of a pool.

Theory of operation. `start` opens a nursery in the caller's task, in which a single task runs: the
supervisor's. It holds a nursery of its own for the connections, within a shielded scope. So an error or a
cancellation of the user's block reaches the connections only through `leave` (a clean-up that the
user shields can still use them), a connection's crash can't cancel the user's block, and since the outer
nursery is always left as if nothing had happened, the user's exception comes out as itself, not in a
group. A crash, which is a bug here or in a connector's stream, is kept and raised at the end.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import trio

from ._exceptions import ConnectionNotAvailable


class Supervisor:
    """The tasks of a pool."""

    def __init__(self) -> None:
        self.stopping = False
        self._scope = trio.CancelScope(shield=True)
        self._outer: Any = None
        self._inner: trio.Nursery | None = None
        self._context: contextvars.Context | None = None
        self._crash: BaseException | None = None

    @property
    def state(self) -> str:
        """One of `new`, `open` and `closed`."""
        if self.stopping:
            return "closed"
        return "new" if self._inner is None else "open"

    async def start(self, *housekeepers: Callable[[], Any]) -> None:
        """Start the supervisor's task, with others in its nursery.

        Raises:
            RuntimeError: It was started before.
        """
        if self._outer is not None:
            raise RuntimeError("a pool can be entered only once; make another one")
        self._context = contextvars.copy_context()
        self._outer = trio.open_nursery()
        nursery = await self._outer.__aenter__()
        started = trio.Event()
        # Not by `start`: cancelled, that would wait for ever for a task that is shielded.
        nursery.start_soon(self._supervise, housekeepers, started)
        try:
            await started.wait()
        except BaseException:
            self.stopping = True
            self._scope.cancel()
            await self._outer.__aexit__(None, None, None)
            raise

    async def _supervise(self, housekeepers: tuple[Callable[[], Any], ...], started: trio.Event) -> None:
        with self._scope:
            async with trio.open_nursery() as self._inner:
                for housekeeper in housekeepers:
                    self.start_soon(housekeeper)
                started.set()
                await trio.sleep_forever()

    def check_open(self) -> None:
        """Check that requests can be made.

        Raises:
            RuntimeError: The pool was not entered.
            ConnectionNotAvailable: It is closed.
        """
        if self.state == "new":
            raise RuntimeError(
                "the pool was not entered; use it as 'async with trio_exchange.ConnectionPool() as pool:'"
            )
        if self.stopping:
            raise pool_closed()

    def start_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Start a task in the context of the caller; what it raises is kept for the end."""
        assert self._inner is not None
        self._inner.start_soon(self._guard, function, *args)

    def start_in_pool_context(self, function: Callable[..., Any], *args: Any) -> None:
        """Start a task that must not see, nor keep alive, the caller's context variables."""
        assert self._context is not None
        self._context.run(self.start_soon, function, *args)

    async def _guard(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            await function(*args)
        except trio.Cancelled:
            raise
        except BaseExceptionGroup as exc:
            cancelled, crash = exc.split(trio.Cancelled)
            self._crash = self._crash or _bare(crash)
            if cancelled is not None:
                raise cancelled from None
        except BaseException as exc:
            self._crash = self._crash or exc

    async def leave(self, user_error: BaseException | None) -> None:
        """End all tasks and wait for them. Raises a crash, unless the user's block raised already."""
        self._scope.cancel()
        await self._outer.__aexit__(None, None, None)
        if self._crash is not None and user_error is None:
            raise self._crash


def _bare(error: BaseException | None) -> BaseException | None:
    """An exception that is alone in its groups, without them."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def pool_closed() -> ConnectionNotAvailable:
    """The error of those who come too late."""
    return ConnectionNotAvailable("the connection pool is closed")
