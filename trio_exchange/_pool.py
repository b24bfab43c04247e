"""The connection pool.

Theory of operation.

*The nurseries.* `__aenter__` opens a nursery in the caller's task, in which a single task runs: the
supervisor. It holds a nursery of its own for the connections, within a shielded scope. So an error or a
cancellation of the user's block reaches the connections only through `__aexit__` (a clean-up that the
user shields can still use them), a connection's crash can't cancel the user's block, and since the outer
nursery is always left as if nothing had happened, the user's exception comes out as itself, not in a
group. A crash, which is a bug here or in a connector's stream, is kept and raised at the end.

*Ownership.* A connection is closed by its own task and by nobody else; requests only mark it. Its task is
started, in the pool's context, in the same step that creates it. While it is being dialled it belongs to
the requester's task, in a scope that the pool knows so that closing the pool can end it.

*Decisions* are the scheduler's. All that this module adds is waiting: for a ticket's grant, for dialling,
for the exchange. A ticket's grant and its cancellation exclude each other, because the waiting task is
woken by the grant itself.

*Housekeeping* is one task, once a second while there are connections: it closes idle connections that
have expired, or that the kernel knows to be closed.
"""

from __future__ import annotations

import contextvars
import functools
import ssl
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import trio

from ._connectors import Connection, Connector, Dialling, SocketOption, dial
from ._exceptions import ConnectionNotAvailable, ExchangeError, PoolTimeout, may_resend
from ._exchange import HTTPConnection, Owner, Settings
from ._http2 import HTTP2Connection
from ._http11 import HTTP11Connection
from ._models import URL, ContentTypes, HeaderTypes, Prepared, Proxy, Request, Response
from ._routes import Route, route_for, tls_settings
from ._scheduler import CONNECT, Limits, Scheduler, Ticket
from ._streams import Readiness
from ._timeouts import Budget, Timeouts, check_seconds, parse_timeouts
from ._trace import Tracer, traced, tracer_for
from ._uploads import Upload

_HOUSEKEEPING_INTERVAL = 1.0
# How long closing waits for those who dial to notice.
_DIALLING_GRACE = 1.0


@dataclass(frozen=True)
class PoolStatistics:
    """What a pool is doing, as `ConnectionPool.statistics` found it.

    Attributes:
        open: Established connections, including those that are being closed.
        active: Those of them that carry a request, or were handed over to its user.
        idle: Those of them that wait for a request.
        closing: Those of them that are being closed.
        connecting: Connections that are being established.
        waiting: Requests that wait for a connection.
        connections_opened: Connections established since the pool was entered.
        requests_served: Requests that got a response since the pool was entered.
    """

    open: int
    active: int
    idle: int
    closing: int
    connecting: int
    waiting: int
    connections_opened: int
    requests_served: int


class ConnectionPool:
    """Connections to any number of origins, kept and shared by requests.

    Use it with `async with`. When the block ends every socket is closed and no task is left, whatever the
    block did, and an exception of the block comes out unchanged.

    Args:
        ssl_context: TLS settings for origins; None for `default_ssl_context()`. The pool writes its ALPN
            offer to it.
        proxy: Reserved; None.
        max_connections: The most connections at once, those being established or closed included; None
            for no limit. Further requests wait, in the order of their arrival.
        max_connections_per_origin: The most of them with the same scheme, host, port and SNI name.
        max_keepalive_connections: The most connections kept without a request.
        keepalive_expiry: Seconds for which a connection is kept without a request; None for ever.
        http1: Whether to speak HTTP/1.1.
        http2: Whether to speak HTTP/2: over TLS where the server chooses it (ALPN); without `http1` always,
            which without TLS takes a server that is known to speak it.
        retries: How often establishing a connection is tried again after a `ConnectError` or
            `ConnectTimeout`, after 0, 0.5, 1, 2, 4 ... seconds.
        local_address: The address to connect from.
        uds: The path of a unix socket to connect to instead of any host.
        connector: Dials in place of Trio's own functions.
        socket_options: Tuples of arguments for `setsockopt` on every connected socket.
        expect_continue_timeout: Seconds that a body with `Expect: 100-continue` waits for the server's
            word before it is sent without.
        max_header_bytes: The largest response head accepted, in bytes.
        http2_ping_interval: Seconds of silence after which an HTTP/2 connection is tested with a PING; None
            for never.
        http2_ping_timeout: Seconds for which anything may arrive then, before the connection is given up.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A number is too small, neither `http1` nor `http2` is True, or a reserved argument is
            not what it has to be.
    """

    def __init__(
        self,
        ssl_context: ssl.SSLContext | None = None,
        *,
        proxy: Proxy | None = None,
        max_connections: int | None = 10,
        max_connections_per_origin: int | None = None,
        max_keepalive_connections: int | None = None,
        keepalive_expiry: float | None = None,
        http1: bool = True,
        http2: bool = False,
        retries: int = 0,
        local_address: str | None = None,
        uds: str | None = None,
        connector: Connector | None = None,
        socket_options: Iterable[SocketOption] | None = None,
        expect_continue_timeout: float = 1.0,
        max_header_bytes: int = 100 * 1024,
        http2_ping_interval: float | None = None,
        http2_ping_timeout: float = 15.0,
    ) -> None:
        if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError(f"ssl_context must be an ssl.SSLContext or None, not {ssl_context!r}")
        if proxy is not None:
            raise ValueError(f"this version does not use proxies: proxy must be None, not {proxy!r}")
        self._http1 = _yes_or_no("http1", http1)
        self._http2 = _yes_or_no("http2", http2)
        if not (http1 or http2):
            raise ValueError("http1 or http2 must be True, else there is nothing to speak")
        check_seconds("keepalive_expiry", keepalive_expiry)
        check_seconds("http2_ping_interval", http2_ping_interval)
        if http2_ping_interval == 0:
            raise ValueError("http2_ping_interval must be more than 0 seconds, or None for never")
        if connector is not None and not isinstance(connector, Connector):
            raise TypeError(f"connector must be a Connector or None, not {connector!r}")
        self._ssl_context = ssl_context
        self._dialling = Dialling(
            Connector() if connector is None else connector,
            _at_least(0, "retries", retries),
            _text("local_address", local_address),
            _text("uds", uds),
            _options(socket_options),
        )
        self._settings = Settings(
            _at_least(1, "max_header_bytes", max_header_bytes),
            _seconds("expect_continue_timeout", expect_continue_timeout),
            http2_ping_interval,
            _seconds("http2_ping_timeout", http2_ping_timeout),
        )
        # What is offered to servers (RFC 7301), by the registered names, the best first.
        self._alpn = ("h2",) * http2 + ("http/1.1",) * http1
        limits = Limits(
            connections=_limit(1, "max_connections", max_connections),
            per_lane=_limit(1, "max_connections_per_origin", max_connections_per_origin),
            idle=_limit(0, "max_keepalive_connections", max_keepalive_connections),
            expiry=keepalive_expiry,
        )
        self._scheduler: Scheduler[HTTPConnection] = Scheduler(limits, self._may_share)
        self._supervisor = _Supervisor()
        self._owner = Owner(
            self._released, self._capacity_changed, self._scheduler.closing, self._start_upload
        )
        # Those who dial: the scope that ends it, and what is set when it has ended.
        self._diallers: dict[trio.CancelScope, trio.Event] = {}
        # One may outlast its exchange, where the iterator has more to do after the content's last byte.
        self._uploads: set[Upload] = set()
        self._work = trio.Event()
        self._opened = 0
        self._served = 0

    # -- Life.

    async def __aenter__(self) -> Self:
        """Open the pool.

        Raises:
            RuntimeError: It was entered before.
        """
        await self._supervisor.start(self._keep_house)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the pool, as `aclose` does, and let an exception of the block pass unchanged."""
        self._stop()
        with trio.CancelScope(shield=True):
            await self._dialling_ended()
        await self._supervisor.leave(exc_value)

    async def aclose(self) -> None:
        """Close every connection, and end every request that waits or is under way with an error.

        Requests made later get a `ConnectionNotAvailable`. It waits for the closing, which takes no
        longer than about a second even if a peer is mute. When it is cancelled, the closing goes on,
        and the end of the `async with` block waits for it.
        """
        self._stop()
        await trio.lowlevel.checkpoint()
        await self._dialling_ended()
        for connection in list(self._scheduler):
            await connection.closed.wait()

    def _stop(self) -> None:
        self._supervisor.stopping = True
        self._scheduler.refuse_all(_pool_closed)
        for scope in self._diallers:
            scope.cancel()
        for connection in list(self._scheduler):
            connection.close_soon()
        for upload in self._uploads:
            upload.cancel()
        self._work.set()

    async def _dialling_ended(self) -> None:
        """Let those who dial close their sockets; but they may run the user's code, which takes its time."""
        with trio.move_on_after(_DIALLING_GRACE):
            for ended in list(self._diallers.values()):
                await ended.wait()

    # -- Requests.

    async def request(
        self,
        method: bytes | str,
        url: URL | bytes | str,
        *,
        headers: HeaderTypes | None = None,
        content: ContentTypes | None = None,
        extensions: Mapping[str, Any] | None = None,
    ) -> Response:
        """Send a request and read the whole response.

        Args:
            method: Such as `"GET"`.
            url: Whole, as str, bytes or `URL`.
            headers: A mapping or a sequence of pairs. Host, Content-Length and Transfer-Encoding are
                added where they are missing.
            content: The body: bytes, or an asynchronous or ordinary iterable of bytes.
            extensions: See the README: `timeout`, `trace`, `sni_hostname`, `target`, `informational`,
                `protocol`.

        Returns:
            The response with its `content`; it is closed.

        Raises:
            RuntimeError: The pool was not entered.
            TypeError, ValueError, LocalProtocolError, UnsupportedProtocol: The request can't be sent as
                it is; nothing was sent, unless it is the content that turns out so under way.
            ConnectionNotAvailable: The pool is closed, or was closed meanwhile.
            PoolTimeout, ConnectTimeout, WriteTimeout, ReadTimeout: See the README.
            ConnectError, WriteError, ReadError: The network failed.
            RemoteProtocolError: The server broke HTTP.
            Exception: What the content's iterator or a callback raised.

        When it is cancelled nothing is left behind: if the request had begun, its stream is reset over
        HTTP/2, and the connection is closed over HTTP/1.1.
        """
        request = Request(method, url, headers=headers, content=content, extensions=extensions)
        response = await self.handle_async_request(request)
        await response.read_without_checkpoint()
        if response.status == 101 or request.method == b"CONNECT":
            # Reading does not end what was handed over.
            await response.aclose()
        return response

    def stream(
        self,
        method: bytes | str,
        url: URL | bytes | str,
        *,
        headers: HeaderTypes | None = None,
        content: ContentTypes | None = None,
        extensions: Mapping[str, Any] | None = None,
    ) -> StreamContext:
        """Send a request and give its response before its body is read, as an `async with` block.

        The arguments, errors and what cancellation does are those of `request`. At the end of the block
        the response is closed. If what is left of the body has arrived already, and is little, the
        connection is kept, else it is closed; over HTTP/2 this is the stream, and the connection goes on.
        """
        return StreamContext(
            self, Request(method, url, headers=headers, content=content, extensions=extensions)
        )

    async def handle_async_request(self, request: Request) -> Response:
        """Send a request and return its response, whose body is still to be read.

        The caller closes the response: `await response.aclose()`. Errors and what cancellation does are
        those of `request`.

        Args:
            request: The request; it is not changed.
        """
        if not isinstance(request, Request):
            raise TypeError(f"request must be a trio_exchange.Request, not {request!r}")
        self._check_open()
        prepared = Prepared(request)
        route = route_for(request)
        timeouts = parse_timeouts(request.extensions)
        tracer = tracer_for(request.extensions)
        try:
            await prepared.peek_body()
            response = await self._exchange(prepared, route, timeouts, tracer)
        except BaseException:
            await prepared.close_body()
            raise
        self._served += 1
        return response

    async def _exchange(
        self, prepared: Prepared, route: Route, timeouts: Timeouts, tracer: Tracer | None
    ) -> Response:
        turn = _Turn(route, timeouts)
        connection = await self._obtain(turn, tracer)
        reused = connection.requests > 0
        try:
            return await connection.exchange(prepared, timeouts, tracer)
        except ExchangeError as exc:
            # A callback's error may have been marked by the request that the callback made.
            is_its_own = exc is prepared.failure
            if not (is_its_own and may_resend(exc, idempotent=prepared.idempotent, reused=reused)):
                raise
            if not prepared.body_can_be_sent_again:
                raise
            info = {"attempt": 1, "delay": 0.0, "exception": exc}
        # A shared connection is read all the time, so that no other one can be dead and idle.
        turn.ticket.fresh = isinstance(connection, HTTP11Connection)
        await traced(tracer, "connection.retry", info, trio.lowlevel.checkpoint)
        connection = await self._obtain(turn, tracer)
        return await connection.exchange(prepared, timeouts, tracer)

    # -- Connections.

    async def _obtain(self, turn: _Turn, tracer: Tracer | None) -> HTTPConnection:
        """Get a connection that is ready for an exchange, which must begin without an await between."""
        while True:
            grant = await self._grant(turn)
            if grant is CONNECT:
                return await self._connect(turn, tracer)
            connection: HTTPConnection = grant
            if await self._is_usable(connection):
                return connection
            connection.decline()

    async def _grant(self, turn: _Turn) -> Any:
        self._check_open()
        ticket = turn.ticket
        self._scheduler.request(ticket, trio.current_time(), first=turn.begun)
        turn.begun = True
        if ticket.grant is None:
            await turn.budget.spend(self._wait_for_grant, turn)
        if isinstance(ticket.grant, ConnectionNotAvailable):
            raise ticket.grant
        return ticket.grant

    async def _wait_for_grant(self, turn: _Turn) -> None:
        def abort(_: Any) -> trio.lowlevel.Abort:
            self._scheduler.abandon(turn.ticket)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

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

    async def _connect(self, turn: _Turn, tracer: Tracer | None) -> HTTPConnection:
        route = turn.route
        scope = trio.CancelScope()
        self._diallers[scope] = trio.Event()
        try:
            # The pool may have been closed since the grant.
            self._check_open()
            established: Connection | None = None
            with scope:
                established = await dial(
                    self._dialling,
                    route.host.decode("ascii"),
                    route.port,
                    tls_settings(route, self._ssl_context, self._alpn),
                    turn.connect_timeout,
                    tracer,
                )
            if established is None:
                raise _pool_closed()
            if self._supervisor.stopping:
                # It was established all the same, and there may be no task left to own it.
                await trio.aclose_forcefully(established.transport)
                raise _pool_closed()
        except BaseException:
            self._scheduler.not_connected(route)
            raise
        finally:
            self._diallers.pop(scope).set()
        http2 = self._speaks_http2(established)
        kind = HTTP2Connection if http2 else HTTP11Connection
        connection = kind(established, route.origin, self._settings, self._owner)
        self._scheduler.connected(route, connection, shared=http2)
        self._opened += 1
        self._supervisor.start_in_pool_context(self._own, connection)
        self._work.set()
        return connection

    def _may_share(self, route: Route) -> bool:
        return self._http2 and (not self._http1 or route.server_hostname is not None)

    def _speaks_http2(self, established: Connection) -> bool:
        if not (self._http1 and self._http2):
            return self._http2
        tls = established.stream
        return isinstance(tls, trio.SSLStream) and tls.selected_alpn_protocol() == "h2"

    async def _own(self, connection: HTTPConnection) -> None:
        try:
            await connection.run()
        finally:
            self._scheduler.closed(connection)

    # -- What connections tell.

    def _start_upload(self, upload: Upload) -> None:
        self._uploads.add(upload)
        self._supervisor.start_soon(self._carry, upload)

    async def _carry(self, upload: Upload) -> None:
        try:
            await upload.run()
        finally:
            self._uploads.discard(upload)

    def _released(self, connection: HTTPConnection) -> None:
        self._scheduler.released(connection, trio.current_time())

    def _capacity_changed(self, connection: HTTPConnection, capacity: int) -> None:
        self._scheduler.capacity_changed(connection, capacity, trio.current_time())

    # -- Housekeeping.

    async def _keep_house(self) -> None:
        while True:
            if not len(self._scheduler):
                self._work = trio.Event()
                await self._work.wait()
            await trio.sleep(_HOUSEKEEPING_INTERVAL)
            for connection in self._scheduler.expired(trio.current_time()):
                self._scheduler.close(connection)
            for connection in self._scheduler.idle:
                await self._look_after(connection)

    async def _look_after(self, connection: HTTPConnection) -> None:
        readiness = connection.readiness()
        since = self._scheduler.idle_since(connection)
        if readiness is Readiness.QUIET or since is None:
            return
        self._scheduler.hold(connection)
        if readiness is Readiness.READABLE and await connection.still_open():
            # What it was sent is no use of it, and does not put off its expiry.
            self._scheduler.released(connection, since)
        else:
            connection.decline()

    # -- What there is to see.

    @property
    def connections(self) -> list[HTTPConnection]:
        """The established connections, oldest first; their `repr` tells what they are doing."""
        return list(self._scheduler)

    def statistics(self) -> PoolStatistics:
        """Count what the pool is doing now."""
        states = [connection.state for connection in self._scheduler]
        return PoolStatistics(
            open=len(states),
            active=states.count("active"),
            idle=states.count("idle"),
            closing=states.count("closing") + states.count("closed"),
            connecting=self._scheduler.connecting,
            waiting=self._scheduler.waiting,
            connections_opened=self._opened,
            requests_served=self._served,
        )

    def __repr__(self) -> str:
        numbers = self.statistics()
        return (
            f"<{type(self).__name__} {self._supervisor.state}: {numbers.active} active, "
            f"{numbers.idle} idle, {numbers.connecting} connecting, {numbers.waiting} waiting>"
        )

    def _check_open(self) -> None:
        if self._supervisor.state == "new":
            raise RuntimeError(
                "the pool was not entered; use it as 'async with trio_exchange.ConnectionPool() as pool:'"
            )
        if self._supervisor.stopping:
            raise _pool_closed()


class _Turn:
    """One request's way to a connection, over however many grants it takes."""

    __slots__ = ("begun", "budget", "connect_timeout", "route", "ticket")

    def __init__(self, route: Route, timeouts: Timeouts) -> None:
        self.route = route
        self.connect_timeout = timeouts.connect
        self.budget = Budget(timeouts.pool, PoolTimeout)
        wake = functools.partial(trio.lowlevel.reschedule, trio.lowlevel.current_task())
        self.ticket: Ticket[HTTPConnection] = Ticket(route, wake)
        self.begun = False


class _Supervisor:
    """The pool's tasks: see the module's theory of operation."""

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

    async def start(self, housekeeper: Callable[[], Any]) -> None:
        """Start the supervisor's task, with another one in its nursery.

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
        nursery.start_soon(self._supervise, housekeeper, started)
        try:
            await started.wait()
        except BaseException:
            self.stopping = True
            self._scope.cancel()
            await self._outer.__aexit__(None, None, None)
            raise

    async def _supervise(self, housekeeper: Callable[[], Any], started: trio.Event) -> None:
        with self._scope:
            async with trio.open_nursery() as self._inner:
                self.start_soon(housekeeper)
                started.set()
                await trio.sleep_forever()

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


class StreamContext:
    """What `stream` returns: an asynchronous context manager around a response."""

    def __init__(self, pool: ConnectionPool, request: Request, *, own_pool: bool = False) -> None:
        self._pool = pool
        self._request = request
        self._own_pool = own_pool
        self._response: Response | None = None

    async def __aenter__(self) -> Response:
        """Send the request and receive the response's head."""
        if self._own_pool:
            await self._pool.__aenter__()
        try:
            self._response = await self._pool.handle_async_request(self._request)
        except BaseException as exc:
            if self._own_pool:
                await self._pool.__aexit__(type(exc), exc, exc.__traceback__)
            raise
        return self._response

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the response, and the pool if it is its own."""
        assert self._response is not None
        try:
            await self._response.aclose()
        except trio.Cancelled:
            # Where the block raised something of its own, that is what comes out.
            if exc_value is None:
                raise
        finally:
            if self._own_pool:
                await self._pool.__aexit__(exc_type, exc_value, traceback)


async def request(
    method: bytes | str,
    url: URL | bytes | str,
    *,
    headers: HeaderTypes | None = None,
    content: ContentTypes | None = None,
    extensions: Mapping[str, Any] | None = None,
) -> Response:
    """Send a request on a connection of its own, and read the whole response.

    Arguments, errors and what cancellation does are those of `ConnectionPool.request`.
    """
    async with ConnectionPool() as pool:
        return await pool.request(method, url, headers=headers, content=content, extensions=extensions)


def stream(
    method: bytes | str,
    url: URL | bytes | str,
    *,
    headers: HeaderTypes | None = None,
    content: ContentTypes | None = None,
    extensions: Mapping[str, Any] | None = None,
) -> StreamContext:
    """Send a request on a connection of its own; the response is the `async with` block's.

    Arguments, errors and what cancellation does are those of `ConnectionPool.stream`.
    """
    return StreamContext(
        ConnectionPool(),
        Request(method, url, headers=headers, content=content, extensions=extensions),
        own_pool=True,
    )


def _bare(error: BaseException | None) -> BaseException | None:
    """An exception that is alone in its groups, without them."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _pool_closed() -> ConnectionNotAvailable:
    return ConnectionNotAvailable("the connection pool is closed")


def _at_least(least: int, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")
    return value


def _yes_or_no(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def _seconds(name: str, value: float) -> float:
    check_seconds(name, value)
    if value is None:
        raise TypeError(f"{name} must be a number of seconds, not None")
    return value


def _text(name: str, value: str | None) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str or None, not {value!r}")
    return value


def _options(options: Iterable[SocketOption] | None) -> tuple[SocketOption, ...] | None:
    if options is None:
        return None
    if not isinstance(options, Iterable):
        raise TypeError(f"socket_options must be an iterable of tuples, not {options!r}")
    options = tuple(options)
    given: tuple[Any, ...] = options
    for option in given:
        if not isinstance(option, tuple) or len(option) not in (3, 4):
            raise TypeError(
                f"each of socket_options must be a tuple of 3 or 4 for setsockopt, not {option!r}"
            )
    return options


def _limit(least: int, name: str, value: int | None) -> int:
    """A limit of the scheduler's; None is none."""
    return sys.maxsize if value is None else _at_least(least, name, value)
