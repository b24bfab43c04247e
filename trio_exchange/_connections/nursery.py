"""The nursery of a pool, and how long it lives.

Theory of operation. A pool's tasks run in a nursery that a system task of Trio holds. The system task is
started when the pool is opened, and ends when the pool is closed, at the latest with its `trio.run`. What
follows from that:

- A pool can be opened and closed in any task, in any order with other pools, and under cancel scopes that
  end before it does: nothing of it lies on the cancel scopes of the task that opens it.
- An error or a cancellation in the program reaches connections only through `stop`, so that a clean-up that
  the program shields can still use them. A crash in a connection's task can't cancel the program.
- Trio delivers Ctrl-C as a KeyboardInterrupt in the main task, at a checkpoint. No nursery of the pool is
  open there, so it comes out as itself, not in a group.

*Ctrl-C.* The pool's tasks are protected from KeyboardInterrupt (`_guard`, and
`trio.lowlevel.enable_ki_protection` on the tasks that a connection starts), because it would end the wrong
task and leave half-made state behind. So are the public entry points, in every task: a KeyboardInterrupt is
raised at a checkpoint, where a cancellation may be raised as well, or in the program's own code. A body
iterator and a callback are the program's code, and are not protected.

*Crashes* are bugs here or in a connector's stream. They are logged at once, and the first is raised when the
pool has been closed.
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
    """What runs in a pool's nursery, and has to be stopped before that ends."""

    async def keep_house(self) -> None:
        """The service's own task, which never returns."""

    def stop(self) -> None:
        """Refuse new work, and begin to end what is under way."""

    async def stopped(self) -> None:
        """Wait until what `stop` has begun is done."""


class State(enum.Enum):
    """How far a pool has come."""

    NEW = "new"
    STARTING = "starting"
    OPEN = "open"
    # Its `trio.run` is ending. The pool can be opened in another one.
    ENDING = "ending"
    CLOSED = "closed"


class PoolNursery:
    """The tasks of a pool."""

    def __init__(self) -> None:
        self._state = State.NEW
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
    def state(self) -> State:
        """How far the pool has come."""
        return self._state

    @property
    def stopping(self) -> bool:
        """Whether no new connection has a nursery any more."""
        return self._state is not State.OPEN

    def check_open(self) -> None:
        """Check that requests can be made, here.

        Raises:
            RuntimeError: The pool is not open, or open in another `trio.run`.
            ConnectionNotAvailable: It is closed.
        """
        self.check_run()
        if self._state is not State.OPEN:
            if self._state in (State.NEW, State.STARTING):
                raise RuntimeError(f"the pool was not entered; {_HOW_TO_OPEN}")
            raise pool_closed()

    def check_run(self) -> None:
        """Check that the pool is not open in another `trio.run`.

        Raises:
            RuntimeError: It is.
        """
        if self._token is not None and self._token is not trio.lowlevel.current_trio_token():
            raise RuntimeError("the pool is open in another trio.run; a pool serves one of them at a time")

    # -- The beginning.

    async def start(self, *services: Service) -> None:
        """Start the pool's tasks, and wait until they run.

        When it is cancelled, the tasks run all the same: call `leave`.

        Args:
            services: They are stopped in this order.

        Raises:
            RuntimeError: It was started before, or no task can be started any more, as `trio.run` is ending.
        """
        if self._state is not State.NEW:
            hint = (
                "was closed, make another one" if self._state is State.CLOSED else "is open, use it as it is"
            )
            raise RuntimeError(f"a pool can be entered only once; this one {hint}")
        self._state = State.STARTING
        self._services = services
        self._token = trio.lowlevel.current_trio_token()
        self._context = contextvars.copy_context()
        self._started, self._stop_requested, self._ended = trio.Event(), trio.Event(), trio.Event()
        try:
            trio.lowlevel.spawn_system_task(
                self._run, name="trio_exchange.ConnectionPool", context=self._context.copy()
            )
        except RuntimeError:
            # Trio finalizes asynchronous generators when its system tasks have ended.
            self._state, self._token = State.NEW, None
            self._ended.set()
            raise RuntimeError("the pool can't be opened any more: this trio.run is ending") from None
        await self.started()

    async def started(self) -> None:
        """Wait until the pool's tasks run, which takes no longer than a turn of the scheduler."""
        with trio.CancelScope(shield=True):
            await self._started.wait()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _run(self) -> None:
        """The system task. What it raises would be the end of the program, so that nothing may be raised."""
        try:
            async with trio.open_nursery() as self._nursery:
                if self._state is State.STARTING:
                    self._state = State.OPEN
                self._started.set()
                for service in self._services:
                    self.start_soon(service.keep_house)
                try:
                    # It is cancelled when the main task has ended.
                    await self._stop_requested.wait()
                finally:
                    if self._state is State.OPEN:
                        self._state = State.ENDING
                    with trio.CancelScope(shield=True):
                        await self._guard(self._stop_services)
                    self._nursery.cancel_scope.cancel()
        finally:
            self._nursery = self._token = None
            if self._state is State.ENDING:
                self._state = State.NEW
            self._ended.set()

    # -- Tasks.

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Start a task in the context of the caller."""
        assert self._nursery is not None
        self._nursery.start_soon(self._guard, function, *args)

    def start_in_pool_context(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Start a task that must not see, nor keep alive, the caller's context variables."""
        self._context.run(self.start_soon, function, *args)

    @trio.lowlevel.enable_ki_protection
    async def _guard(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
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
            # A handler of the program's may fail, as it may have done to cause the crash.
            self._crash.add_note(f"{crash!r} could not be logged: {exc!r}")

    # -- The end.

    def stop(self) -> None:
        """Let no more requests begin, end those that wait or are under way, and close the connections."""
        if self._state in (State.STARTING, State.OPEN):
            self._services[0].stop()
            self._stop_requested.set()
        self._state = State.CLOSED

    async def _stop_services(self) -> None:
        for service in self._services:
            service.stop()
            await service.stopped()

    async def stop_requested(self) -> None:
        """Wait until the pool is told to close."""
        await self._stop_requested.wait()

    async def ended(self) -> None:
        """Wait until all tasks have ended."""
        await self._ended.wait()

    async def leave(self) -> None:
        """End all tasks and wait for them, also when cancelled.

        A task of the pool itself, which may run a body's iterator, does not wait.
        """
        self.stop()
        if self._nursery is not None and trio.lowlevel.current_task().parent_nursery is self._nursery:
            await trio.lowlevel.checkpoint()
            return
        with trio.CancelScope(shield=True):
            try:
                await self.ended()
            except BaseException:
                # A KeyboardInterrupt is not held up by the shield. The second one need not wait.
                await self.ended()
                raise

    def take_crash(self) -> BaseException | None:
        """The first crash, once."""
        crash, self._crash = self._crash, None
        return crash


def pool_closed() -> ConnectionNotAvailable:
    """The error of requests that come too late."""
    return ConnectionNotAvailable("the connection pool is closed")
