"""Gives each request a connection, and keeps the pool's connections.

Theory of operation.

*Decisions* are the scheduler's. This module carries them out: it waits for grants, establishes connections,
runs exchanges, and closes the connections that the scheduler tells it to close. A waiting request is either
granted a connection or cancelled, never both: the grant itself reschedules the waiting task, and Trio then no
longer calls the task's abort function.

*Ownership.* A connection has a task, which alone closes it; requests only mark it for closing. The task is
started in the pool's context, at the latest in the same synchronous step that marks the connection. While a
connection is being established, it belongs to the task of the request, in a cancel scope that the manager
keeps so that `stop` can cancel it.

*Idle connections* are checked by one task, once a second while there are connections. It closes those that
have expired and those that the peer has closed.

A pool has one manager for its requests, and one for each proxy that opens tunnels. A tunnel is the response
to a CONNECT request, and the connection that carries it is managed like any other.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import trio

from .._connect.attempt import (
    Attempt,
    Establish,
    Established,
    close_forcefully,
    establish_once,
    establish_persistently,
)
from .._connect.factory import TCP, ConnectionFactory, ConnectionKey
from .._connect.transport import Readiness
from .._exceptions import ConnectionNotAvailable, ExchangeError, ExchangeFailed, PoolTimeout, copied
from .._http.connection import BaseConnection, HTTPConnection, Owner, RawConnection, Settings
from .._http.request import RequestContext
from .._http.retry import Resend, reason_to_resend
from .._http.upload import Upload
from .._models import Response
from .._timeouts import NO_TIMEOUTS, TimeBudget, Timeouts
from .._trace import Tracer, span
from .nursery import PoolNursery, pool_closed
from .protocols import connection_class
from .scheduler import DIAL, Limits, Scheduler, Waiter

# Seconds between two checks of the idle connections.
_IDLE_CHECK_INTERVAL = 1.0
# Seconds for which closing waits for cancelled dialling to end.
_DIALLING_GRACE = 1.0
# The most times that a refused request is sent again, and the length of the first pause in seconds.
_MOST_REFUSALS = 5
_FIRST_PAUSE = 0.1
# After this many refusals by connections that had received GOAWAY, a request needs a new connection.
_SHARED_REFUSALS = 2


class Checkout(Waiter[BaseConnection]):
    """The search of one request for a connection. It may take several grants.

    Args:
        key: The key of the connections that the request can use.
        tracer: The tracer of the request, if it has one.
        timeouts: How long the request may wait for grants, and each attempt to connect may take.
        retries: How many further attempts to connect are made after failures.
        within: For a CONNECT request, the attempt to connect to an origin that the tunnel is a part of. Its
            budget replaces `timeouts` and `retries`.
    """

    __slots__ = (
        "_retries",
        "_timeouts",
        "_waiting",
        "_within",
        "asked_before",
        "refusals",
        "resends",
        "resent_unanswered",
        "tracer",
    )

    key: ConnectionKey

    def __init__(
        self,
        key: ConnectionKey,
        tracer: Tracer | None,
        timeouts: Timeouts = NO_TIMEOUTS,
        retries: int = 0,
        within: Attempt | None = None,
    ) -> None:
        super().__init__(key)
        self.tracer = tracer
        self._timeouts = timeouts
        self._retries = retries
        self._within = within
        self._waiting: TimeBudget | None = None if within is None else within.budget
        # Whether the request has asked the scheduler for a connection before.
        self.asked_before = False
        # How many times the request was tried again. How many of these tries followed a refusal, or a new
        # connection that took no request. Whether it was sent again although the server may have acted on it.
        self.resends = 0
        self.refusals = 0
        self.resent_unanswered = False

    @property
    def waiting(self) -> TimeBudget:
        """How long the request may wait for grants."""
        # Most requests don't wait.
        if self._waiting is None:
            self._waiting = TimeBudget(self._timeouts.pool, PoolTimeout)
        return self._waiting

    def establish(self, connect: Establish) -> Awaitable[Established]:
        """Establish a connection by a function that makes one attempt."""
        if self._within is not None:
            return establish_once(self._within.budget, self.tracer, connect)
        return establish_persistently(self._retries, self._timeouts.connect, self.tracer, connect)

    def pause_before(
        self, reason: Resend | None, connection: HTTPConnection, *, reused: bool
    ) -> float | None:
        """Count a failure, and decide when the request is sent again, and whether on a new connection.

        Args:
            reason: Why the request may be sent again, None if it may not.
            connection: The connection that it failed on.
            reused: Whether the connection had carried a request before.

        Returns:
            How many seconds to wait before it is sent again, None if it is not.
        """
        pause = 0.0
        # Another idle HTTP/1.1 connection may be dead too. The reader of HTTP/2 would have noticed that.
        self.fresh = not connection.multiplexed
        match reason:
            case None:
                return None
            case Resend.UNANSWERED:
                if self.resent_unanswered:
                    return None
                self.resent_unanswered = True
            case Resend.REFUSED:
                self.refusals += 1
                goes_away = connection.readiness() is Readiness.CLOSED
                # A server may end each connection after a few requests. On a shared connection these might
                # be other requests each time; on a new one, this request is the first.
                self.fresh = goes_away and self.refusals > _SHARED_REFUSALS
                if self.refusals > 1 or not goes_away:
                    # Random, so that requests that were refused together are not sent again together.
                    pause = _FIRST_PAUSE * 2 ** (self.refusals - 1) * random.uniform(0.5, 1.5)
                    if pause >= self.waiting.remaining:
                        return None
            case Resend.UNSENT if not reused:
                # Counted, since a server that accepts only connections would be dialled for ever.
                self.refusals += 1
        if self.refusals > _MOST_REFUSALS:
            return None
        self.resends += 1
        return pause

    async def pause(self, seconds: float) -> None:
        """Wait before the request is sent again. The time counts as waiting for a grant."""
        if seconds:
            await self.waiting.spend(trio.sleep, seconds)
        else:
            await trio.lowlevel.checkpoint()


class ConnectionManager:
    """A set of connections with common limits, and the requests that wait for one of them.

    Args:
        factory_for: Returns the factory that makes the connections with a key.
        limits: The limits of this set.
        settings: The settings of each connection.
        pool_nursery: Runs the tasks of the connections.

    Attributes:
        scheduler: Knows the connections and the waiting requests.
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
            released=self._released,
            capacity_changed=self._capacity_changed,
            closing=self._closing,
            closed=self._closed,
            start_task=self._start_task,
            start_upload=self._start_upload,
        )
        # The cancel scope of each dialling, and an event that is set when the dialling has ended.
        self._diallings: dict[trio.CancelScope, trio.Event] = {}
        # An upload may outlast its exchange: a body iterator may go on after the last byte of the content.
        self._uploads: set[Upload] = set()
        # Set when there is a connection to check.
        self._has_connections = trio.Event()

    def __iter__(self) -> Iterator[BaseConnection]:
        """The established connections, oldest first."""
        return iter(self.scheduler)

    # -- Closing.

    def stop(self) -> None:
        """Refuse all waiting requests, cancel all dialling and all uploads, and close all connections.

        The pool's nursery refuses new requests from now on.
        """
        self.scheduler.refuse_all(pool_closed)
        for scope in self._diallings:
            scope.cancel()
        for connection in list(self):
            connection.close_soon()
        for upload in self._uploads:
            upload.cancel()
        self._has_connections.set()

    async def wait_stopped(self) -> None:
        """Wait until all connections are closed.

        Wait for cancelled dialling too, so that its sockets are closed, but only for a limited time: it may
        run the user's code.
        """
        with trio.move_on_after(_DIALLING_GRACE):
            for ended in list(self._diallings.values()):
                await ended.wait()
        for connection in list(self):
            await connection.wait_closed()

    # -- Requests.

    async def exchange(
        self,
        context: RequestContext,
        checkout: Checkout,
        begin: Callable[[HTTPConnection, RequestContext], Awaitable[Response]],
    ) -> Response:
        """Send a request on a connection, and again where that can do no harm.

        When `begin` raises, the failed request no longer counts as using its connection. If it may be sent
        again, it waits for a connection ahead of new requests. A request that the server refused is sent
        again a few times. A request that may have reached the server, which did not answer, is sent again
        once.

        Args:
            context: The request.
            checkout: The search for a connection.
            begin: Sends the request on a connection and returns the response.
        """
        while True:
            connection: Any = await self.obtain(checkout)
            reused = connection.requests > 0
            try:
                return await begin(connection, context)
            except ExchangeFailed as exc:
                failed = exc
            # After the `except` clause: in it, `failed` would be the context of its own `error` (a cycle).
            try:
                pause = self._pause_after(failed, context, checkout, connection, reused=reused)
                if pause is None:
                    raise failed.error
                info = {"attempt": checkout.resends, "delay": pause, "exception": failed.error}
            finally:
                # Avoid a reference cycle: the traceback of `failed.error` refers to this frame.
                del failed
            try:
                async with span(checkout.tracer, "connection.retry", info):
                    await checkout.pause(pause)
            finally:
                # Avoid a reference cycle: the handler may raise an error from `info["exception"]`.
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
        """Get a connection for an exchange. The caller must begin the exchange without a checkpoint before.

        Raises:
            ConnectionNotAvailable: The pool is closed, or was closed meanwhile.
            PoolTimeout: The request waited too long for a grant.
            ExchangeError: The connection could not be established.

        When it is cancelled, a grant is given back and a connection being established is closed.
        """
        while True:
            self._ask(checkout)
            if checkout.grant is None:
                await self._wait(checkout)
            grant: Any = checkout.grant
            if grant is DIAL:
                return await self._connect(checkout)
            if isinstance(grant, ConnectionNotAvailable):
                # Raise a copy. The checkout keeps the original, whose traceback would refer to the checkout.
                raise copied(grant)
            connection: HTTPConnection = grant
            readiness = connection.readiness()
            if readiness is Readiness.QUIET:
                return connection
            if readiness is Readiness.READABLE and await self._still_open(connection):
                return connection
            connection.decline()

    def _ask(self, checkout: Checkout) -> None:
        """Ask the scheduler for a grant."""
        if self._pool_nursery.stopping:
            raise pool_closed()
        self._close_all(self.scheduler.request(checkout, trio.current_time(), first=checkout.asked_before))
        checkout.asked_before = True

    async def _wait(self, checkout: Checkout) -> None:
        """Wait for the grant, for as long as the request may wait."""
        try:
            await checkout.waiting.spend(self._wait_for_grant, checkout)
        except PoolTimeout as exc:
            raise PoolTimeout(f"{exc}; {self._describe(checkout.key)}") from None

    async def _wait_for_grant(self, checkout: Checkout) -> None:
        checkout.granted = functools.partial(trio.lowlevel.reschedule, trio.lowlevel.current_task())

        def abort(_: Any) -> trio.lowlevel.Abort:
            self.scheduler.abandon(checkout)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _describe(self, key: ConnectionKey) -> str:
        """Describe why a request for this key has to wait."""
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
        to_origin = _of_at_most(scheduler.slots_of(key), limits.per_key)
        return (
            f"connections: {in_all} ({', '.join(parts)}), to {key.origin}: {to_origin}; "
            f"other requests waiting: {scheduler.waiting}"
        )

    def longest_active(self) -> float | None:
        """How many seconds ago the longest active connection became active, None if none is active."""
        times = (
            self.scheduler.active_since(connection) for connection in self if connection.state == "active"
        )
        earliest = min((since for since in times if since is not None), default=None)
        return None if earliest is None else trio.current_time() - earliest

    async def _still_open(self, connection: HTTPConnection) -> bool:
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
        self._diallings[scope] = trio.Event()
        try:
            # The pool may have been closed after the grant.
            self._pool_nursery.check_open()
            established: Established | None = None
            with scope:
                established = await self._establish(checkout, connect)
            if established is None:
                raise pool_closed()
            if self._pool_nursery.stopping:
                # The dialling ignored its cancellation. The pool's nursery may run no more tasks.
                await close_forcefully(established.transport)
                raise pool_closed()
        except BaseException:
            self._close_all(self.scheduler.not_connected(key))
            raise
        finally:
            self._diallings.pop(scope).set()
        connection = self._kind(key, factory, established)(
            established, key.origin, self._settings, self._owner
        )
        now = trio.current_time()
        self._close_all(self.scheduler.connected(key, connection, now, shared=connection.multiplexed))
        self.opened += 1
        connection.start()
        self._has_connections.set()
        return connection

    async def _establish(self, checkout: Checkout, connect: Establish) -> Established:
        try:
            return await checkout.establish(connect)
        except ExchangeError as exc:
            if self._pool_nursery.stopping:
                # The closing of the pool is the cause of any failure.
                raise pool_closed() from exc
            raise

    def _kind(
        self, key: ConnectionKey, factory: ConnectionFactory, established: Established
    ) -> type[BaseConnection]:
        if key.scheme == TCP:
            return RawConnection
        return connection_class(http2=factory.speaks_http2(established))

    def _may_share(self, key: ConnectionKey) -> bool:
        return self._factory_for(key).may_share(key)

    def _close_all(self, connections: list[BaseConnection]) -> None:
        """Close the connections that the scheduler has decided to close."""
        for connection in connections:
            connection.close_soon()

    # -- Called by connections (see `Owner`).

    def _start_upload(self, upload: Upload) -> None:
        self._uploads.add(upload)
        self._pool_nursery.start_soon(self._run_upload, upload)

    async def _run_upload(self, upload: Upload) -> None:
        try:
            await upload.run()
        finally:
            self._uploads.discard(upload)

    def _released(self, connection: BaseConnection) -> None:
        self._close_all(self.scheduler.released(connection, trio.current_time()))

    def _capacity_changed(self, connection: BaseConnection, capacity: int) -> None:
        self._close_all(self.scheduler.capacity_changed(connection, capacity, trio.current_time()))

    def _closing(self, connection: BaseConnection) -> None:
        self._close_all(self.scheduler.closing(connection))

    def _closed(self, connection: BaseConnection) -> None:
        self._close_all(self.scheduler.closed(connection))

    def _start_task(self, connection: BaseConnection) -> None:
        self._pool_nursery.start_in_pool_context(connection.run)

    # -- Idle connections.

    async def run(self) -> None:
        """Check the idle connections once a second. This never returns."""
        while True:
            if not len(self.scheduler):
                self._has_connections = trio.Event()
                await self._has_connections.wait()
            await trio.sleep(_IDLE_CHECK_INTERVAL)
            await self._check_idle_connections()

    async def _check_idle_connections(self) -> None:
        # A separate function, so that no local variable keeps a connection alive during the sleep.
        self._close_all(self.scheduler.expired(trio.current_time()))
        for connection in self.scheduler.idle:
            await self._check_idle(connection)

    async def _check_idle(self, connection: Any) -> None:
        readiness = connection.readiness()
        since = self.scheduler.idle_since(connection)
        if readiness is Readiness.QUIET or since is None:
            return
        self.scheduler.reserve(connection)
        if readiness is Readiness.READABLE and await connection.still_open():
            # Received data is not a use of the connection, and does not delay its expiry.
            self._close_all(self.scheduler.released(connection, since))
        else:
            connection.decline()


def _of_at_most(number: int, limit: int) -> str:
    return str(number) if limit == sys.maxsize else f"{number} of at most {limit}"
