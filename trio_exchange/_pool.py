"""The connection pool: what a program sees of all this.

Here arguments are checked and the parts put together; the tasks are the `Supervisor`'s, and requests are
brought to connections by a `Dispatcher`, which has its own share of the limits and of the housekeeping.
"""

from __future__ import annotations

import functools
import ssl
import sys
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import trio

from ._connect.attempt import establish_persistently
from ._connect.connector import Connector, SocketOption
from ._connect.dialers import DirectDialer
from ._connect.factory import TCP, ConnectionFactory, ConnectionKey, key_for
from ._connect.network_stream import NetworkStream
from ._connections.manager import Checkout, ConnectionManager
from ._connections.nursery import PoolNursery, State
from ._connections.scheduler import Limits
from ._content import ContentTypes
from ._entrypoints import check_runs_under_trio, drop_own_frames
from ._exceptions import ExchangeError, PoolTimeout
from ._fields import HeaderTypes
from ._http.connection import HTTPConnection, PooledConnection, Settings
from ._http.request import PreparedRequest, RequestBody, RequestContext
from ._models import (
    Proxy,
    Request,
    Response,
    check_extension_names,
    check_ssl_context,
    check_yes_or_no,
    to_extensions,
)
from ._proxies.chain import chain
from ._timeouts import TimeBudget, Timeouts, TimeoutTypes, check_seconds, parse_timeouts, with_timeout
from ._trace import Tracer, tracer_for
from ._urls import URL


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
        longest_active: Seconds since the active connection that has been so longest became active: over
            HTTP/1.1 by its present request, over HTTP/2 by the first of those that overlapped since. None
            if no connection is active.
    """

    open: int
    active: int
    idle: int
    closing: int
    connecting: int
    waiting: int
    connections_opened: int
    requests_served: int
    longest_active: float | None


class ConnectionPool:
    """Connections to any number of origins, kept and shared by requests.

    Use it with `async with`. When the block ends every socket is closed and no task is left, whatever the
    block did, and an exception of the block comes out unchanged.

    Args:
        ssl_context: TLS settings for origins; None for `default_ssl_context()`. The pool writes its ALPN
            offer to it.
        proxy: A `Proxy`, or a sequence of them, which is a chain: the first is connected to, and connects to
            the second, and so on. `local_address`, `uds`, `connector` and `socket_options` are then about the
            connection to the first.
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
        timeout: For every request: a mapping of `connect`, `read`, `write` and `pool` to seconds, or a number
            of seconds for each of the four. A request's own timeout replaces it name by name. What is
            left out, or None, has no limit.
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
        ValueError: A number is too small or too large, a timeout's name is unknown, or neither `http1` nor
            `http2` is True.
        ImportError: A SOCKS proxy needs the `socksio` package, which is not installed.
    """

    def __init__(
        self,
        ssl_context: ssl.SSLContext | None = None,
        *,
        proxy: Proxy | Sequence[Proxy] | None = None,
        max_connections: int | None = 10,
        max_connections_per_origin: int | None = None,
        max_keepalive_connections: int | None = None,
        keepalive_expiry: float | None = None,
        http1: bool = True,
        http2: bool = False,
        retries: int = 0,
        timeout: TimeoutTypes | None = None,
        local_address: str | None = None,
        uds: str | None = None,
        connector: Connector | None = None,
        socket_options: Iterable[SocketOption] | None = None,
        expect_continue_timeout: float = 1.0,
        max_header_bytes: int = 100 * 1024,
        http2_ping_interval: float | None = None,
        http2_ping_timeout: float = 15.0,
    ) -> None:
        check_ssl_context(ssl_context)
        check_yes_or_no("http1", http1)
        check_yes_or_no("http2", http2)
        if not (http1 or http2):
            raise ValueError("http1 or http2 must be True, else there is nothing to speak")
        check_seconds("keepalive_expiry", keepalive_expiry)
        check_seconds("http2_ping_interval", http2_ping_interval)
        if http2_ping_interval == 0:
            raise ValueError("http2_ping_interval must be more than 0 seconds, or None for never")
        if connector is not None and not isinstance(connector, Connector):
            raise TypeError(f"connector must be a Connector or None, not {connector!r}")
        self._retries = _at_least(0, "retries", retries)
        self._timeouts = parse_timeouts(with_timeout(None, timeout) or {})
        direct = DirectDialer(
            Connector() if connector is None else connector,
            local_address=_text("local_address", local_address),
            uds=_text("uds", uds),
            socket_options=_options(socket_options),
        )
        settings = Settings(
            _at_least(1, "max_header_bytes", max_header_bytes),
            _seconds("expect_continue_timeout", expect_continue_timeout),
            http2_ping_interval,
            _seconds("http2_ping_timeout", http2_ping_timeout),
        )
        limits = Limits(
            connections=_limit(1, "max_connections", max_connections),
            per_lane=_limit(1, "max_connections_per_origin", max_connections_per_origin),
            idle=_limit(0, "max_keepalive_connections", max_keepalive_connections),
            expiry=keepalive_expiry,
        )
        self._pool_nursery = PoolNursery()
        # See `_proxies` why the connections that carry tunnels have no limit of their own.
        carriers = Limits(idle=limits.idle, expiry=limits.expiry)
        proxies = chain(
            _to_proxies(proxy),
            direct,
            lambda to: ConnectionManager(to, carriers, settings, self._pool_nursery),
        )
        self._origins = ConnectionFactory(proxies.dialer, ssl_context, http1, http2)
        # What speaks HTTP/2 only can't be forwarded by a proxy that may not.
        self._forwarding = proxies.forwarding if http1 else None
        self._manager = ConnectionManager(self._factory_for, limits, settings, self._pool_nursery)
        # In the order of their closing: what runs through a tunnel may have something to say at its end.
        self._managers = [self._manager, *proxies.managers]
        self._served = 0
        self._closer_gets_crash = False

    def _factory_for(self, key: ConnectionKey) -> ConnectionFactory:
        if key.to_proxy and self._forwarding is not None:
            return self._forwarding.factory
        return self._origins

    # -- Life.

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Self:
        """Open the pool.

        Raises:
            RuntimeError: It was opened before, or Trio is not running.
        """
        check_runs_under_trio()
        try:
            await self._pool_nursery.start(*self._managers)
        except trio.Cancelled:
            await self._pool_nursery.leave()
            raise
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the pool, as `aclose` does, and let an exception of the block pass unchanged."""
        await self._pool_nursery.leave()
        crash = self._pool_nursery.take_crash()
        if crash is not None and exc_value is None:
            raise crash

    async def serve(self, *, task_status: trio.TaskStatus[ConnectionPool] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the pool, and close it when this is cancelled: `pool = await nursery.start(pool.serve)`.

        It returns when `aclose` has been called and everything is closed.

        Args:
            task_status: Is told when the pool is open, with the pool as the value of `nursery.start`.

        Raises:
            RuntimeError: The pool was opened before.
        """
        async with self:
            task_status.started(self)
            await self._pool_nursery.stop_requested()

    @trio.lowlevel.enable_ki_protection
    async def open(self) -> None:
        """Open the pool without a block, for programs that have no place for one.

        It stays open until `aclose`, which any task may call, and is closed at the latest when the main
        task of this `trio.run` has ended. Then it can be opened in another `trio.run`. Where it is open
        already this does nothing.

        Raises:
            RuntimeError: It is open in another `trio.run`, or Trio is not running.
            ConnectionNotAvailable: It was closed.

        When it is cancelled the pool is open all the same.
        """
        check_runs_under_trio()
        pool_nursery = self._pool_nursery
        pool_nursery.check_run()
        if pool_nursery.state is State.NEW:
            self._closer_gets_crash = True
            await pool_nursery.start(*self._managers)
        elif pool_nursery.state is State.STARTING:
            # Another task has just called this.
            await pool_nursery.started()
        else:
            pool_nursery.check_open()
            await trio.lowlevel.checkpoint()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close every connection, and end every request that waits or is under way with an error.

        Requests made later get a `ConnectionNotAvailable`. It waits for the closing, which takes no
        longer than about a second even if a peer is mute, and a second more for each proxy; a body's iterator
        that is being ended is waited for. When it is cancelled, the closing goes on, and the end of the
        `async with` block waits for it.

        Any task may call it, any number of times.

        Raises:
            RuntimeError: The pool is open in another `trio.run`, or Trio is not running.
            Exception: A bug in this library or in a connector's stream crashed a task of the pool, and it was
                opened with `open`. Where it was opened otherwise, its block raises this.
        """
        check_runs_under_trio()
        self._pool_nursery.check_run()
        self._pool_nursery.stop()
        await trio.lowlevel.checkpoint()
        await self._pool_nursery.ended()
        crash = self._pool_nursery.take_crash() if self._closer_gets_crash else None
        if crash is not None:
            raise crash

    # -- Requests.

    @trio.lowlevel.enable_ki_protection
    async def request(
        self,
        method: bytes | str,
        url: URL | bytes | str,
        *,
        headers: HeaderTypes | None = None,
        content: ContentTypes | None = None,
        extensions: Mapping[str, Any] | None = None,
        timeout: TimeoutTypes | None = None,
    ) -> Response:
        """Send a request and read the whole response.

        Args:
            method: Such as `"GET"`.
            url: Whole, as str, bytes or `URL`.
            headers: A mapping or a sequence of pairs. Host, Content-Length and Transfer-Encoding are
                added where they are missing.
            content: The body: bytes, or an asynchronous or ordinary iterable of bytes. An iterable that has
                a `__bytes__` method is asked for the whole, and sent as bytes are.
            extensions: See the README: `timeout`, `trace`, `sni_hostname`, `target`, `informational`,
                `protocol`.
            timeout: The `timeout` extension, in place of that, or a number of seconds for each of its names.
                What it leaves out is as the pool's own `timeout` says.

        Returns:
            The response with its `content`; it is closed.

        Raises:
            RuntimeError: The pool was not entered, or Trio is not running.
            TypeError, ValueError, LocalProtocolError, InvalidURL, UnsupportedProtocol: The request can't be
                sent as it is; nothing was sent, unless it is the content that turns out so under way.
            ConnectionNotAvailable: The pool is closed, or was closed meanwhile.
            PoolTimeout, ConnectTimeout, WriteTimeout, ReadTimeout: See the README.
            ConnectError, WriteError, ReadError: The network failed.
            ProxyError: A proxy refused or failed to open a tunnel.
            RemoteProtocolError: The server broke HTTP.
            Exception: What the content's iterator or a callback raised.

        When it is cancelled nothing is left behind: if the request had begun, its stream is reset over
        HTTP/2, and the connection is closed over HTTP/1.1.
        """
        extensions = with_timeout(extensions, timeout)
        request = Request(method, url, headers=headers, content=content, extensions=extensions)
        try:
            response = await self.handle_async_request(request)
            await response._read_without_checkpoint()
            if response.status == 101 or request.method == b"CONNECT":
                # Reading does not end what was handed over.
                await response.aclose()
        except ExchangeError as exc:
            drop_own_frames(exc)
            raise
        return response

    def stream(
        self,
        method: bytes | str,
        url: URL | bytes | str,
        *,
        headers: HeaderTypes | None = None,
        content: ContentTypes | None = None,
        extensions: Mapping[str, Any] | None = None,
        timeout: TimeoutTypes | None = None,
    ) -> StreamContext:
        """Send a request and give its response before its body is read, as an `async with` block.

        The arguments, errors and what cancellation does are those of `request`. At the end of the block
        the response is closed. If what is left of the body has arrived already, and is little, the
        connection is kept, else it is closed; over HTTP/2 this is the stream, and the connection goes on.
        """
        extensions = with_timeout(extensions, timeout)
        return StreamContext(
            self, Request(method, url, headers=headers, content=content, extensions=extensions)
        )

    @trio.lowlevel.enable_ki_protection
    async def handle_async_request(self, request: Request) -> Response:
        """Send a request and return its response, whose body is still to be read.

        The caller closes the response: `await response.aclose()`. Errors and what cancellation does are
        those of `request`.

        Args:
            request: The request; it is not changed. What its `timeout` extension leaves out is as the
                pool's own `timeout` says.
        """
        check_runs_under_trio()
        if not isinstance(request, Request):
            raise TypeError(f"request must be a trio_exchange.Request, not {request!r}")
        self._pool_nursery.check_open()
        key, prepared = self._address(PreparedRequest(request))
        timeouts = parse_timeouts(request.extensions, self._timeouts)
        tracer = tracer_for(request.extensions)
        body = RequestBody(request.stream)
        try:
            context = RequestContext(await body.peek(prepared), body, key, timeouts, tracer)

            def begin(connection: HTTPConnection) -> Awaitable[Response]:
                return connection.exchange(context)

            response = await self._manager.exchange(context, self._checkout(key, timeouts, tracer), begin)
        except BaseException as exc:
            await body.close()
            if isinstance(exc, ExchangeError):
                drop_own_frames(exc)
            raise
        self._served += 1
        return response

    @trio.lowlevel.enable_ki_protection
    async def open_tcp_stream(
        self,
        host: bytes | str,
        port: int,
        *,
        extensions: Mapping[str, Any] | None = None,
        timeout: TimeoutTypes | None = None,
    ) -> NetworkStream:
        """Open a stream of bytes to a host, through the pool's proxies if it has any.

        It counts among the pool's connections. Close it with `aclose`; the pool does so at its end at the
        latest.

        Args:
            host: Name or address.
            port: Port number.
            extensions: Of those of a request, `timeout` and `trace`. The time is limited by `connect`, and by
                `pool` for the waiting.
            timeout: As in `request`.

        Returns:
            The stream, without TLS; see `NetworkStream.start_tls`.

        Raises:
            RuntimeError: The pool was not entered, or Trio is not running.
            TypeError, ValueError, InvalidURL: Host or port can't be such, or an extension is wrong.
            ConnectionNotAvailable: The pool is closed, or was closed meanwhile.
            PoolTimeout, ConnectTimeout: It took too long.
            ConnectError: The connection could not be established.
            ProxyError: A proxy refused or failed.

        When it is cancelled nothing is left behind.
        """
        check_runs_under_trio()
        self._pool_nursery.check_open()
        origin = URL(scheme=TCP, host=host, port=port).origin
        if not (origin.host and origin.port):
            raise ValueError(f"a stream needs a host and a port, not {host!r} and {port!r}")
        given = to_extensions(with_timeout(extensions, timeout))
        check_extension_names(given)
        key = ConnectionKey(origin.scheme, origin.host, origin.port, None)
        checkout = self._checkout(key, parse_timeouts(given, self._timeouts), tracer_for(given))
        try:
            connection = await self._manager.obtain(checkout)
        except ExchangeError as exc:
            drop_own_frames(exc)
            raise
        return connection.raw_stream()

    def _address(self, prepared: PreparedRequest) -> tuple[ConnectionKey, PreparedRequest]:
        """Find out where a request is sent, and give it the form that it takes there."""
        key = key_for(prepared.request)
        # A tunnel can't be forwarded.
        if self._forwarding is None or key.scheme != b"http" or prepared.method == b"CONNECT":
            return key, prepared
        return self._forwarding.key, self._forwarding.rewrite(prepared)

    def _checkout(self, key: ConnectionKey, timeouts: Timeouts, tracer: Tracer | None) -> Checkout:
        establish = functools.partial(establish_persistently, self._retries, timeouts.connect, tracer)
        return Checkout(key, TimeBudget(timeouts.pool, PoolTimeout), establish, tracer)

    # -- What there is to see.

    @property
    def connections(self) -> list[PooledConnection]:
        """The established connections, oldest first; their `repr` tells what they are doing.

        Those that carry tunnels through proxies are not among them, but what runs through the tunnels.
        """
        return [*self._manager]

    def statistics(self) -> PoolStatistics:
        """Count what the pool is doing now."""
        states = [connection.state for connection in self._manager]
        scheduler = self._manager.scheduler
        return PoolStatistics(
            open=len(states),
            active=states.count("active"),
            idle=states.count("idle"),
            closing=states.count("closing") + states.count("closed"),
            connecting=scheduler.connecting,
            waiting=scheduler.waiting,
            connections_opened=self._manager.opened,
            requests_served=self._served,
            longest_active=self._manager.longest_active(),
        )

    def __repr__(self) -> str:
        # Not from `statistics`, which needs Trio's clock.
        states = [connection.state for connection in self._manager]
        scheduler = self._manager.scheduler
        return (
            f"<{type(self).__name__} {self._pool_nursery.state.value}: {states.count('active')} active, "
            f"{states.count('idle')} idle, {scheduler.connecting} connecting, {scheduler.waiting} waiting>"
        )


class StreamContext:
    """What `stream` returns: an asynchronous context manager around a response."""

    def __init__(self, pool: ConnectionPool, request: Request, *, own_pool: bool = False) -> None:
        self._pool = pool
        self._request = request
        self._own_pool = own_pool
        self._entered = False
        self._response: Response | None = None

    # Its type is none of an awaitable, so that type checkers report the mistake too.
    def __await__(self) -> None:
        owner = "trio_exchange" if self._own_pool else "pool"
        raise TypeError(f"use 'async with {owner}.stream(...) as response:'")

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Response:
        """Send the request and receive the response's head.

        Raises:
            RuntimeError: It was entered before.
        """
        if self._entered:
            raise RuntimeError("a stream context can be entered only once; call stream() again")
        self._entered = True
        if self._own_pool:
            await self._pool.__aenter__()
        try:
            self._response = await self._pool.handle_async_request(self._request)
        except BaseException as exc:
            if self._own_pool:
                await self._pool.__aexit__(type(exc), exc, exc.__traceback__)
            if isinstance(exc, ExchangeError):
                drop_own_frames(exc)
            raise
        return self._response

    @trio.lowlevel.enable_ki_protection
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


def _to_proxies(proxy: Proxy | Sequence[Proxy] | None) -> Sequence[Proxy]:
    if proxy is None:
        return ()
    if isinstance(proxy, Proxy):
        return (proxy,)
    given: Any = proxy
    is_text = isinstance(given, (str, bytes, bytearray))
    if is_text or not isinstance(given, Sequence) or not all(isinstance(hop, Proxy) for hop in given):
        # What it is may have a password in it.
        raise TypeError(f"proxy must be a Proxy, a sequence of them, or None, not {type(given).__name__}")
    return tuple(proxy)


def _at_least(least: int, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")
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
