"""Bringing requests to connections.

Theory of operation.

*Decisions* are the scheduler's. All that this module adds is waiting: for a ticket's grant, for the
establishing of a connection, for the exchange. A ticket's grant and its cancellation exclude each other,
because the waiting task is woken by the grant itself.

*Ownership.* A connection is closed by its own task and by nobody else; requests only mark it. Its task is
started, in the pool's context, in the same step that creates it. While it is being established it belongs
to the requester's task, in a scope that the dispatcher knows so that `stop` can end it.

*Housekeeping* is one task, once a second while there are connections: it closes idle connections that
have expired, or that the kernel knows to be closed.

A pool has one dispatcher for its requests, and one for each proxy that is asked for tunnels: a tunnel is the
answer to a request, and what carries it a connection like any other.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio

from .._connect.attempt import Connection, Establish, close_forcefully
from .._connect.factory import TCP, ConnectionFactory, ConnectionKey
from .._connect.transport import Readiness
from .._exceptions import ConnectionNotAvailable, ExchangeError, ExchangeFailed, PoolTimeout, copied
from .._http.connection import BaseConnection, HTTPConnection, Owner, RawConnection, Settings
from .._http.http2.connection import HTTP2Connection
from .._http.http11 import HTTP11Connection
from .._http.request import RequestContext
from .._http.retry import Resend, reason_to_resend
from .._http.upload import Upload
from .._models import Response
from .._timeouts import TimeBudget
from .._trace import Tracer, span
from .nursery import PoolNursery, pool_closed
from .scheduler import DIAL, Limits, Scheduler, Waiter

_HOUSEKEEPING_INTERVAL = 1.0
# How long closing waits for those who dial to notice.
_DIALLING_GRACE = 1.0
# How often a request is sent again that the server has refused, and the first pause before that.
_MOST_REFUSALS = 5
_FIRST_PAUSE = 0.1
# After so many refusals by connections that went away, a request is only sent as the first of a new one.
_SHARED_REFUSALS = 2


class Checkout:
    """One request's way to a connection, over however many grants it takes.

    Args:
        route: Where to.
        waiting: The time that it may wait for a grant.
        establish: How a connection is established where it has to be.
        tracer: Who is told.
    """

    __slots__ = (
        "begun",
        "establish",
        "key",
        "refusals",
        "repeated",
        "repetitions",
        "tracer",
        "waiter",
        "waiting",
    )

    def __init__(
        self,
        key: ConnectionKey,
        waiting: TimeBudget,
        establish: Callable[[Establish], Awaitable[Connection]],
        tracer: Tracer | None,
    ) -> None:
        self.key = key
        self.waiting = waiting
        self.establish = establish
        self.tracer = tracer
        wake = functools.partial(trio.lowlevel.reschedule, trio.lowlevel.current_task())
        self.waiter: Waiter[BaseConnection] = Waiter(key, wake)
        self.begun = False
        # How often the request was sent again, or waited again; how often the server had refused it; and
        # whether it was repeated though the server may have acted on it.
        self.repetitions = 0
        self.refusals = 0
        self.repeated = False

    def pause_before(
        self, reason: Resend | None, connection: HTTPConnection, *, reused: bool
    ) -> float | None:
        """How many seconds to wait before the request is sent again, None if it is not.

        It also settles what connections the request can be sent on.

        Args:
            reason: Why it may be sent again.
            connection: What it failed on.
            reused: Whether that had carried a request before.
        """
        pause = 0.0
        # A shared connection is read all the time, so that no other one can be dead and idle.
        self.waiter.fresh = isinstance(connection, HTTP11Connection)
        match reason:
            case None:
                return None
            case Resend.UNANSWERED:
                if self.repeated:
                    return None
                self.repeated = True
            case Resend.REFUSED:
                self.refusals += 1
                goes_away = connection.readiness() is Readiness.CLOSED
                # Else those before it might always be as many as such connections take.
                self.waiter.fresh = goes_away and self.refusals > _SHARED_REFUSALS
                if self.refusals > 1 or not goes_away:
                    # Random, lest those that were refused together come back together.
                    pause = _FIRST_PAUSE * 2 ** (self.refusals - 1) * random.uniform(0.5, 1.5)
                    if pause >= self.waiting.left:
                        return None
            case Resend.UNSENT if not reused:
                # Else a server that takes no request at all would be dialled for ever.
                self.refusals += 1
        if self.refusals > _MOST_REFUSALS:
            return None
        self.repetitions += 1
        return pause

    async def pause(self, seconds: float) -> None:
        """Wait before the request is sent again. It counts as waiting for a connection."""
        if seconds:
            await self.waiting.spend(trio.sleep, seconds)
        else:
            await trio.lowlevel.checkpoint()


class ConnectionManager:
    """The connections of a pool to one end, and the requests that want one.

    Args:
        endpoint_for: What a route leads to.
        limits: How many connections there may be.
        settings: For them.
        supervisor: Whose tasks they are.

    Attributes:
        scheduler: The connections, and who waits for them.
        opened: How many connections were established.
    """

    def __init__(
        self,
        factory_for: Callable[[ConnectionKey], ConnectionFactory],
        limits: Limits,
        settings: Settings,
        pool_nursery: PoolNursery,
    ) -> None:
        self._factory_for = factory_for
        self._settings = settings
        self._pool_nursery = pool_nursery
        self.scheduler: Scheduler[BaseConnection] = Scheduler(limits, self._may_share)
        self.opened: int = 0
        self._owner = Owner(
            self._released, self._capacity_changed, self.scheduler.closing, self._start_upload
        )
        # Those who dial: the scope that ends it, and what is set when it has ended.
        self._diallers: dict[trio.CancelScope, trio.Event] = {}
        # One may outlast its exchange, where the iterator has more to do after the content's last byte.
        self._uploads: set[Upload] = set()
        self._work = trio.Event()

    def __iter__(self) -> Iterator[BaseConnection]:
        """The established connections, oldest first."""
        return iter(self.scheduler)

    # -- The end.

    def stop(self) -> None:
        """Refuse all requests, and close all connections. The supervisor is stopping."""
        self.scheduler.refuse_all(pool_closed)
        for scope in self._diallers:
            scope.cancel()
        for connection in list(self):
            connection.close_soon()
        for upload in self._uploads:
            upload.cancel()
        self._work.set()

    async def stopped(self) -> None:
        """Wait until all connections are closed.

        Those who dial close their sockets; but they may run the user's code, which takes its time.
        """
        with trio.move_on_after(_DIALLING_GRACE):
            for ended in list(self._diallers.values()):
                await ended.wait()
        for connection in list(self):
            await connection.closed.wait()

    # -- Requests.

    async def exchange(
        self,
        context: RequestContext,
        checkout: Checkout,
        begin: Callable[[HTTPConnection], Awaitable[Response]],
    ) -> Response:
        """Send a request on a connection, and again where that can do no harm.

        A request of which nothing was sent has given its grant back when `begin` raises, and waits again at
        the head of the queue. One that the server refused is sent again a few times, one that it did not
        answer once.

        Args:
            context: The request.
            checkout: Its way to a connection.
            begin: Makes the exchange on it.
        """
        while True:
            connection: Any = await self.obtain(checkout)
            reused = connection.requests > 0
            try:
                return await begin(connection)
            except ExchangeFailed as exc:
                failed = exc
            # Not in the `except` clause: the error would have `failed` as its context, which refers to it.
            try:
                pause = self._pause_after(failed, context, checkout, connection, reused=reused)
                if pause is None:
                    raise failed.error
                info = {"attempt": checkout.repetitions, "delay": pause, "exception": failed.error}
            finally:
                # The traceback of the error leads back to this frame.
                del failed
            try:
                async with span(checkout.tracer, "connection.retry", info):
                    await checkout.pause(pause)
            finally:
                # What a handler raises may have the exception as its cause.
                del info

    def _pause_after(
        self,
        failed: ExchangeFailed,
        context: RequestContext,
        checkout: Checkout,
        connection: HTTPConnection,
        *,
        reused: bool,
    ) -> float | None:
        """How many seconds to wait before the request is sent again, None if it is not."""
        if not context.can_be_sent_again:
            return None
        reason = reason_to_resend(failed, idempotent=context.prepared.idempotent, reused=reused)
        return checkout.pause_before(reason, connection, reused=reused)

    async def obtain(self, checkout: Checkout) -> BaseConnection:
        """Get a connection that is ready for an exchange, which must begin without an await between."""
        while True:
            grant = await self._grant(checkout)
            if grant is DIAL:
                return await self._connect(checkout)
            connection: HTTPConnection = grant
            if await self._is_usable(connection):
                return connection
            connection.decline()

    async def _grant(self, checkout: Checkout) -> Any:
        self._pool_nursery.check_open()
        waiter = checkout.waiter
        self.scheduler.request(waiter, trio.current_time(), first=checkout.begun)
        checkout.begun = True
        if waiter.grant is None:
            try:
                await checkout.waiting.spend(self._wait_for_grant, checkout)
            except PoolTimeout as exc:
                raise PoolTimeout(f"{exc}; {self._describe(checkout.key)}") from None
        if isinstance(waiter.grant, ConnectionNotAvailable):
            # A copy, since the traceback of what is raised leads to the ticket.
            raise copied(waiter.grant)
        return waiter.grant

    async def _wait_for_grant(self, checkout: Checkout) -> None:
        def abort(_: Any) -> trio.lowlevel.Abort:
            self.scheduler.abandon(checkout.waiter)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _describe(self, key: ConnectionKey) -> str:
        """What keeps a request for this route waiting."""
        scheduler = self.scheduler
        limits = scheduler.limits
        states = [connection.state for connection in self]
        parts = [f"{states.count('active')} active"]
        longest = self.longest_active()
        if longest is not None:
            parts.append(f"the longest for {longest:.1f} seconds")
        for state in ("idle", "closing"):
            if state in states:
                parts.append(f"{states.count(state)} {state}")
        parts.append(f"{scheduler.connecting} connecting")
        in_all = _of_at_most(scheduler.slots, limits.connections)
        to_origin = _of_at_most(scheduler.slots_of(key), limits.per_lane)
        return (
            f"connections: {in_all} ({', '.join(parts)}), to {key.origin}: {to_origin}; "
            f"other requests waiting: {scheduler.waiting}"
        )

    def longest_active(self) -> float | None:
        """Seconds since the connection that has been in use longest came into use, None if none is."""
        times = (
            self.scheduler.active_since(connection) for connection in self if connection.state == "active"
        )
        earliest = min((since for since in times if since is not None), default=None)
        return None if earliest is None else trio.current_time() - earliest

    async def _is_usable(self, connection: HTTPConnection) -> bool:
        match connection.readiness():
            case Readiness.QUIET:
                return True
            case Readiness.CLOSED:
                return False
        try:
            return await connection.still_open()
        except BaseException:
            connection.decline()
            raise

    # -- Connections.

    async def _connect(self, checkout: Checkout) -> BaseConnection:
        key = checkout.key
        factory = self._factory_for(key)
        connect = functools.partial(factory.connect, key)
        scope = trio.CancelScope()
        self._diallers[scope] = trio.Event()
        try:
            # The pool may have been closed since the grant.
            self._pool_nursery.check_open()
            established: Connection | None = None
            with scope:
                established = await self._establish(checkout, connect)
            if established is None:
                raise pool_closed()
            if self._pool_nursery.stopping:
                # It was established all the same, and there may be no task left to own it.
                await close_forcefully(established.transport)
                raise pool_closed()
        except BaseException:
            self.scheduler.not_connected(key)
            raise
        finally:
            self._diallers.pop(scope).set()
        connection = self._kind(key, factory, established)(
            established, key.origin, self._settings, self._owner
        )
        shared = isinstance(connection, HTTP2Connection)
        self.scheduler.connected(key, connection, trio.current_time(), shared=shared)
        self.opened += 1
        self._pool_nursery.start_in_pool_context(self._own, connection)
        self._work.set()
        return connection

    async def _establish(self, checkout: Checkout, connect: Establish) -> Connection:
        try:
            return await checkout.establish(connect)
        except ExchangeError as exc:
            if self._pool_nursery.stopping:
                # Whatever failed, this is why.
                raise pool_closed() from exc
            raise

    def _kind(
        self, key: ConnectionKey, factory: ConnectionFactory, established: Connection
    ) -> type[BaseConnection]:
        if key.scheme == TCP:
            return RawConnection
        return HTTP2Connection if factory.speaks_http2(established) else HTTP11Connection

    def _may_share(self, key: ConnectionKey) -> bool:
        return self._factory_for(key).may_share(key)

    async def _own(self, connection: BaseConnection) -> None:
        try:
            await connection.run()
        finally:
            self.scheduler.closed(connection)

    # -- What connections tell.

    def _start_upload(self, upload: Upload) -> None:
        self._uploads.add(upload)
        self._pool_nursery.start_soon(self._carry, upload)

    async def _carry(self, upload: Upload) -> None:
        try:
            await upload.run()
        finally:
            self._uploads.discard(upload)

    def _released(self, connection: BaseConnection) -> None:
        self.scheduler.released(connection, trio.current_time())

    def _capacity_changed(self, connection: BaseConnection, capacity: int) -> None:
        self.scheduler.capacity_changed(connection, capacity, trio.current_time())

    # -- Housekeeping.

    async def keep_house(self) -> None:
        """The task that looks after idle connections."""
        while True:
            if not len(self.scheduler):
                self._work = trio.Event()
                await self._work.wait()
            await trio.sleep(_HOUSEKEEPING_INTERVAL)
            await self._look_after_idle()

    async def _look_after_idle(self) -> None:
        # A function of its own, so that no local variable keeps a connection while there is nothing to do.
        for connection in self.scheduler.expired(trio.current_time()):
            self.scheduler.close(connection)
        for connection in self.scheduler.idle:
            await self._look_after(connection)

    async def _look_after(self, connection: Any) -> None:
        readiness = connection.readiness()
        since = self.scheduler.idle_since(connection)
        if readiness is Readiness.QUIET or since is None:
            return
        self.scheduler.hold(connection)
        if readiness is Readiness.READABLE and await connection.still_open():
            # What it was sent is no use of it, and does not put off its expiry.
            self.scheduler.released(connection, since)
        else:
            connection.decline()


def _of_at_most(number: int, limit: int) -> str:
    return str(number) if limit == sys.maxsize else f"{number} of at most {limit}"
