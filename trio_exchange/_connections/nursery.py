"""The nursery of a pool, and its lifetime.

Theory of operation. A pool's tasks run in a nursery inside a Trio system task. The system task is started
when the pool is opened. It ends when the pool is closed, or at the latest with `trio.run`. Hence:

- A pool can be opened and closed in any task, in any order with other pools, and inside cancel scopes that
  end before the pool does: the pool adds nothing to the cancel scopes of the task that opens it.
- An error or a cancellation in the program reaches connections only through `stop`, so that clean-up code
  that the program shields can still use them. A crash in a connection's task can't cancel the program.
- Trio delivers Ctrl-C as a KeyboardInterrupt in the main task, at a checkpoint. No nursery of the pool is
  open there, so the KeyboardInterrupt is not wrapped in an exception group.

*Ctrl-C.* The pool's tasks are protected from KeyboardInterrupt (`_run_guarded`, and
`trio.lowlevel.enable_ki_protection` on the tasks that a connection starts), because it would end the wrong
task and leave an inconsistent state behind. The public entry points are protected too, in every task: a
KeyboardInterrupt is raised at a checkpoint, where a cancellation might be raised as well, or in the program's
own code. Body iterators and callbacks are the program's code and are not protected.

*Crashes* are bugs in this library or in a connector's stream. Each is logged at once. The first is raised
when the pool has been closed.
"""

from __future__ import annotations

import contextvars
import enum
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from .._exceptions import ConnectionNotAvailable, bare

_LOGGER = logging.getLogger("trio_exchange")

_HOW_TO_OPEN = (
    "use it as 'async with trio_exchange.ConnectionPool() as pool:', or open it with 'await pool.open()' or "
    "'await nursery.start(pool.serve)'"
)


class Service(Protocol):
    """A part of the pool that runs in its nursery and has to be stopped before the nursery is cancelled."""

    async def run(self) -> None:
        """Run the service's background task. This never returns."""

    def stop(self) -> None:
        """Refuse waiting work, and begin to end the work that is under way."""

    async def wait_stopped(self) -> None:
        """Wait until all work has ended. Called after `stop`."""


class PoolState(enum.Enum):
    """The phase of a pool's life."""

    NEW = "new"
    STARTING = "starting"
    OPEN = "open"
    # The `trio.run` is ending. The pool can be opened again in another one.
    ENDING = "ending"
    CLOSED = "closed"


# Looking a member up in its class takes Python 3.11 a quarter of a microsecond, for each request.
_OPEN = PoolState.OPEN


class PoolNursery:
    """The tasks of a pool."""

    def __init__(self) -> None:
        self._state = PoolState.NEW
        self._services: tuple[Service, ...] = ()
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._context = contextvars.Context()
        self._started = trio.Event()
        self._stop_requested = trio.Event()
        self._ended = trio.Event()
        self._ended.set()
        self._crash: BaseException | None = None

    @property
    def state(self) -> PoolState:
        """The phase of the pool's life."""
        return self._state

    @property
    def stopping(self) -> bool:
        """Whether no more connections can be started."""
        return self._state is not _OPEN

    def check_open(self) -> None:
        """Check that the pool is open in this `trio.run`.

        Raises:
            RuntimeError: The pool has not been opened, or is open in another `trio.run`.
            ConnectionNotAvailable: The pool is closed.
        """
        self.check_run()
        if self._state is not _OPEN:
            if self._state in (PoolState.NEW, PoolState.STARTING):
                raise RuntimeError(f"the pool was not entered; {_HOW_TO_OPEN}")
            raise pool_closed()

    def check_run(self) -> None:
        """Check that the pool is not open in another `trio.run`.

        Raises:
            RuntimeError: The pool is open in another `trio.run`.
        """
        if self._token is not None and self._token is not trio.lowlevel.current_trio_token():
            raise RuntimeError("the pool is open in another trio.run; a pool serves one of them at a time")

    # -- Opening.

    async def start(self, *services: Service) -> None:
        """Start the pool's tasks, and wait until they run.

        When this is cancelled, the tasks run all the same: call `stop_and_wait` to end them.

        Args:
            services: The services to run. They are stopped in this order.

        Raises:
            RuntimeError: The pool was opened before, or `trio.run` is ending and runs no more tasks.
        """
        if self._state is not PoolState.NEW:
            closed = self._state is PoolState.CLOSED
            hint = "was closed, make another one" if closed else "is open, use it as it is"
            raise RuntimeError(f"a pool can be entered only once; this one {hint}")
        self._state = PoolState.STARTING
        self._services = services
        self._token = trio.lowlevel.current_trio_token()
        self._context = contextvars.copy_context()
        self._started, self._stop_requested, self._ended = trio.Event(), trio.Event(), trio.Event()
        try:
            trio.lowlevel.spawn_system_task(
                self._run, name="trio_exchange.ConnectionPool", context=self._context.copy()
            )
        except RuntimeError:
            # Trio finalizes asynchronous generators after its system tasks have ended.
            self._state, self._token = PoolState.NEW, None
            self._ended.set()
            raise RuntimeError("the pool can't be opened any more: this trio.run is ending") from None
        await self.wait_started()

    async def wait_started(self) -> None:
        """Wait until the pool's tasks run, which takes one pass of Trio's run loop."""
        with trio.CancelScope(shield=True):
            await self._started.wait()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _run(self) -> None:
        """Run the system task.

        This must not raise: Trio ends the program when a system task crashes.
        """
        try:
            async with trio.open_nursery() as self._nursery:
                if self._state is PoolState.STARTING:
                    self._state = PoolState.OPEN
                self._started.set()
                for service in self._services:
                    self.start_soon(service.run)
                try:
                    # Trio cancels this when the main task has ended.
                    await self._stop_requested.wait()
                finally:
                    if self._state is PoolState.OPEN:
                        self._state = PoolState.ENDING
                    with trio.CancelScope(shield=True):
                        for service in self._services:
                            # A crash in one must not keep the others' connections open.
                            await self._run_guarded(self._stop_service, service)
                    self._nursery.cancel_scope.cancel()
        finally:
            self._nursery = self._token = None
            if self._state is PoolState.ENDING:
                self._state = PoolState.NEW
            self._ended.set()

    # -- Tasks.

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Start a task with the caller's context variables."""
        assert self._nursery is not None
        self._nursery.start_soon(self._run_guarded, function, *args)

    def start_in_pool_context(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Start a task that must neither see nor keep alive the caller's context variables."""
        self._context.run(self.start_soon, function, *args)

    @trio.lowlevel.enable_ki_protection
    async def _run_guarded(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        try:
            await function(*args)
        except trio.Cancelled:
            raise
        except BaseExceptionGroup as exc:
            cancelled, crash = exc.split(trio.Cancelled)
            if crash is not None:
                self._note_crash(bare(crash))
            if cancelled is not None:
                raise cancelled from None
        except BaseException as exc:
            self._note_crash(exc)

    def _note_crash(self, crash: BaseException) -> None:
        self._crash = self._crash or crash
        try:
            _LOGGER.error("a task of a connection pool crashed", exc_info=crash)
        except Exception as exc:
            # A logging handler of the program failed. It may have caused the crash as well.
            self._crash.add_note(f"{crash!r} could not be logged: {exc!r}")

    # -- Closing.

    def stop(self) -> None:
        """Refuse new requests, end those that wait or are under way, and begin to close the connections."""
        if self._state in (PoolState.STARTING, PoolState.OPEN):
            self._services[0].stop()
            self._stop_requested.set()
        self._state = PoolState.CLOSED

    async def _stop_service(self, service: Service) -> None:
        service.stop()
        await service.wait_stopped()

    async def wait_stop_requested(self) -> None:
        """Wait until the pool is told to close."""
        await self._stop_requested.wait()

    async def wait_ended(self) -> None:
        """Wait until all tasks have ended."""
        await self._ended.wait()

    async def stop_and_wait(self) -> None:
        """End all tasks and wait for them, even when cancelled.

        A task of the pool itself, which may run a body iterator that closes the pool, does not wait.
        """
        self.stop()
        if self._nursery is not None and trio.lowlevel.current_task().parent_nursery is self._nursery:
            await trio.lowlevel.checkpoint()
        else:
            with trio.CancelScope(shield=True):
                try:
                    await self.wait_ended()
                except BaseException:
                    # The shield does not stop a KeyboardInterrupt. A second one ends the waiting.
                    await self.wait_ended()
                    raise

    def take_crash(self) -> BaseException | None:
        """Return the first crash, and forget it."""
        crash, self._crash = self._crash, None
        return crash


def pool_closed() -> ConnectionNotAvailable:
    """Make the error of requests to a pool that is closed."""
    return ConnectionNotAvailable("the connection pool is closed")
