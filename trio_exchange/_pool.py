"""The connection pool, the library's main public class.

It checks arguments and puts the parts together. A `PoolNursery` runs the tasks, and a `ConnectionManager`
gives each request a connection within the pool's limits.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import trio

from ._connect.connector import Connector, SocketOption
from ._connect.dialers import DirectDialer
from ._connect.factory import TCP, ConnectionFactory, ConnectionKey
from ._connect.network_stream import NetworkStream
from ._connect.tls_sessions import TLSSessions
from ._connections.manager import Checkout, ConnectionManager
from ._connections.nursery import PoolNursery, PoolState
from ._connections.protocols import import_protocols
from ._connections.scheduler import Limits
from ._content import ContentTypes
from ._exceptions import ExchangeError, show_public_contexts
from ._fields import HeaderTypes
from ._http.connection import HTTPConnection, PooledConnection, Settings
from ._http.request import HeaderChecker, PreparedRequest, RequestBody, RequestContext
from ._models import (
    Proxy,
    Request,
    Response,
    check_bool,
    check_extension_names,
    check_ssl_context,
    to_extensions,
)
from ._options import (
    at_least,
    interval,
    limit,
    seconds,
    text_or_none,
    to_connector,
    to_proxies,
    to_socket_options,
)
from ._proxies.chain import chain
from ._public_calls import check_runs_under_trio, drop_library_frames
from ._stream_context import StreamContext
from ._timeouts import TimeoutTypes, check_seconds, parse_timeouts, with_timeout
from ._trace import tracer_for
from ._urls import URL


@dataclass(frozen=True)
class PoolStatistics:
    """The state of a pool at the moment when `ConnectionPool.statistics` was called.

    Attributes:
        open: How many connections are established, including those that are being closed.
        active: How many of them carry a request or are used as a stream of bytes.
        idle: How many of them carry no request.
        closing: How many of them are being closed.
        connecting: How many connections are being established.
        waiting: How many requests wait for a connection.
        connections_opened: How many connections were established since the pool was entered.
        requests_served: How many requests got a response since the pool was entered.
        longest_active: For how many seconds the longest active connection has been active, None if none is
            active. An HTTP/1.1 connection is active for one request, an HTTP/2 connection as long as it
            carries any request.
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
    """A pool of connections to any number of origins, which requests share.

    Use it with `async with`. When the block ends, every socket is closed and no task is left running. An
    exception of the block propagates unchanged.

    Args:
        ssl_context: TLS settings for origins; None for `default_ssl_context()`. The pool writes its ALPN
            offer to it.
        proxy: A `Proxy`, or a sequence of them, which forms a chain: the pool connects to the first proxy,
            that one connects to the second, and so on. `local_address`, `uds`, `connector` and
            `socket_options` then apply to the connection to the first proxy.
        max_connections: The most connections at once, including those being established or closed; None
            for no limit. Further requests wait, in the order of their arrival.
        max_connections_per_origin: The most connections with the same scheme, host, port and SNI name; None
            for no limit.
        max_keepalive_connections: The most idle connections to keep; None for no limit.
        keepalive_expiry: Seconds for which to keep an idle connection; None for no limit.
        http1: Whether to speak HTTP/1.1.
        http2: Whether to speak HTTP/2. With `http1` too, the pool speaks HTTP/2 if the server chooses it in
            TLS (ALPN). Without `http1` it always speaks HTTP/2; without TLS the server must be known to.
        retries: How many times to try again to establish a connection after a `ConnectError` or a
            `ConnectTimeout`. The pauses before are 0, 0.5, 1, 2, 4 ... seconds.
        timeout: The default timeouts of requests: a mapping of `connect`, `read`, `write` and `pool` to
            seconds, or one number of seconds for each of the four. A request's `timeout` replaces them name
            by name. A name that is missing or None has no limit.
        local_address: The address to connect from.
        uds: The path of a unix socket to connect to instead of any host.
        connector: Opens connections in place of Trio's functions.
        socket_options: Tuples of arguments for `setsockopt` on every connected socket.
        expect_continue_timeout: Seconds for which a body with `Expect: 100-continue` waits for an interim
            response before it is sent anyway.
        max_header_bytes: The largest response head to accept, in bytes.
        http2_ping_interval: Seconds of silence after which to test an HTTP/2 connection with a PING; None
            for never.
        http2_ping_timeout: Seconds for which to wait for any data after the PING before giving up the
            connection.
        tls_session_resumption: Whether a new TLS connection may resume the session of an earlier one of
            this pool, for the same host, port, SNI name and `ssl_context`. This saves most of the CPU time
            of the handshake; neither side then sends or verifies a certificate again.

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
        tls_session_resumption: bool = True,
    ) -> None:
        check_ssl_context(ssl_context)
        check_bool("http1", http1)
        check_bool("http2", http2)
        check_bool("tls_session_resumption", tls_session_resumption)
        if not (http1 or http2):
            raise ValueError("http1 or http2 must be True, else there is nothing to speak")
        check_seconds("keepalive_expiry", keepalive_expiry)
        self._retries = at_least(0, "retries", retries)
        self._timeouts = parse_timeouts(with_timeout(None, timeout) or {})
        direct = DirectDialer(
            to_connector(connector),
            local_address=text_or_none("local_address", local_address),
            uds=text_or_none("uds", uds),
            socket_options=to_socket_options(socket_options),
        )
        settings = Settings(
            at_least(1, "max_header_bytes", max_header_bytes),
            seconds("expect_continue_timeout", expect_continue_timeout),
            interval("http2_ping_interval", http2_ping_interval),
            seconds("http2_ping_timeout", http2_ping_timeout),
        )
        limits = Limits(
            connections=limit(1, "max_connections", max_connections),
            per_key=limit(1, "max_connections_per_origin", max_connections_per_origin),
            idle=limit(0, "max_keepalive_connections", max_keepalive_connections),
            expiry=keepalive_expiry,
        )
        self._pool_nursery = PoolNursery()
        sessions = TLSSessions() if tls_session_resumption else None
        # Connections that carry tunnels need no limit on their number: the tunnels themselves are limited.
        tunnel_limits = Limits(idle=limits.idle, expiry=limits.expiry)
        proxies = chain(
            to_proxies(proxy),
            direct,
            lambda to: ConnectionManager(to, tunnel_limits, settings, self._pool_nursery),
            sessions,
        )
        self._origins = ConnectionFactory(proxies.dialer, ssl_context, http1, http2, sessions=sessions)
        import_protocols(self._origins)
        # A proxy that forwards requests may speak HTTP/1.1 only, so an HTTP/2-only pool uses tunnels.
        self._forwarding = proxies.forwarding if http1 else None
        self._manager = ConnectionManager(self._factory_for, limits, settings, self._pool_nursery)
        # In the order in which they are closed. A connection through a tunnel may send something when it is
        # closed, so the connection that carries the tunnel is closed later.
        self._managers = [self._manager, *proxies.managers]
        self._header_checker = HeaderChecker()
        self._served = 0
        # Whether `open` opened the pool, so that there is no block whose end could raise a crash.
        self._opened_without_block = False

    def _factory_for(self, key: ConnectionKey) -> ConnectionFactory:
        if key.to_proxy and self._forwarding is not None:
            return self._forwarding.factory
        return self._origins

    # -- Opening and closing.

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Self:
        """Open the pool.

        Raises:
            RuntimeError: The pool was opened before, Trio is not running, or `trio.run` is ending.
        """
        check_runs_under_trio()
        try:
            await self._pool_nursery.start(*self._managers)
        except trio.Cancelled:
            await self._pool_nursery.stop_and_wait()
            raise
        self._opened_without_block = False
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the pool, as `aclose` does, and let an exception of the block propagate unchanged.

        Raises:
            RuntimeError: The pool is open in another `trio.run`.
        """
        self._pool_nursery.check_run()
        await self._pool_nursery.stop_and_wait()
        crash = self._pool_nursery.take_crash()
        if crash is not None and exc_value is None:
            raise crash

    async def serve(self, *, task_status: trio.TaskStatus[ConnectionPool] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the pool, and close it when this is cancelled: `pool = await nursery.start(pool.serve)`.

        Return when `aclose` has been called and everything is closed.

        Args:
            task_status: Set by `nursery.start`, which returns the pool as soon as it is open.

        Raises:
            RuntimeError: The pool was opened before.
        """
        async with self:
            task_status.started(self)
            await self._pool_nursery.wait_stop_requested()

    @trio.lowlevel.enable_ki_protection
    async def open(self) -> None:
        """Open the pool without a block, for programs that have no place for one.

        The pool stays open until any task calls `aclose`, at the latest until the main task of this
        `trio.run` has ended. In the latter case it can be opened again in another `trio.run`. If the pool is
        open already, this does nothing.

        Raises:
            RuntimeError: The pool is open in another `trio.run`, or Trio is not running.
            ConnectionNotAvailable: The pool was closed.

        When this is cancelled, the pool is open all the same.
        """
        check_runs_under_trio()
        pool_nursery = self._pool_nursery
        pool_nursery.check_run()
        if pool_nursery.state is PoolState.NEW:
            self._opened_without_block = True
            await pool_nursery.start(*self._managers)
        elif pool_nursery.state is PoolState.STARTING:
            # Another task is opening the pool.
            await pool_nursery.wait_started()
        else:
            pool_nursery.check_open()
            await trio.lowlevel.checkpoint()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close every connection, and end every request that waits or is under way with an error.

        Later requests raise `ConnectionNotAvailable`. Closing takes about a second at most, even if a peer
        does not respond, and another second for each proxy; in addition, this waits for body iterators to
        end. When this is cancelled, the closing goes on, and the end of the `async with` block waits for it.

        Any task may call this, any number of times.

        Raises:
            RuntimeError: The pool is open in another `trio.run`, or Trio is not running.
            Exception: A bug in this library or in a connector's stream crashed a task of the pool, and the
                pool was opened with `open`. A pool that was opened otherwise raises this at the end of its
                block, unless the block raises an exception itself. The crash is logged in any case.
        """
        check_runs_under_trio()
        self._pool_nursery.check_run()
        self._pool_nursery.stop()
        await trio.lowlevel.checkpoint()
        await self._pool_nursery.wait_ended()
        crash = self._pool_nursery.take_crash() if self._opened_without_block else None
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
            url: An absolute URL, as str, bytes or `URL`.
            headers: A mapping or a sequence of pairs. Host, Content-Length and Transfer-Encoding are
                added if they are missing.
            content: The body: bytes, or an asynchronous or ordinary iterable of bytes. An iterable that has
                a `__bytes__` method is converted by `bytes()` first, and sent like bytes.
            extensions: See the README: `timeout`, `trace`, `sni_hostname`, `target`, `informational`,
                `protocol`.
            timeout: Replaces the `timeout` extension: the same mapping, or one number of seconds for each of
                its names. The pool's `timeout` applies to the names that are missing.

        Returns:
            The response with its `content`; it is closed.

        Raises:
            RuntimeError: The pool was not entered, or Trio is not running.
            TypeError, ValueError, LocalProtocolError, InvalidURL, UnsupportedProtocol: The request is not
                valid. Nothing was sent, unless the fault is in the content and appeared while it was sent.
            ConnectionNotAvailable: The pool is closed, or was closed before the response.
            PoolTimeout, ConnectTimeout, WriteTimeout, ReadTimeout: See the README.
            ConnectError, WriteError, ReadError: The network failed.
            ProxyError: A proxy refused or failed to open a tunnel.
            RemoteProtocolError: The server broke HTTP.
            Exception: The content's iterator or a callback raised it.

        When this is cancelled after the request has begun, an HTTP/2 stream is reset, and an HTTP/1.1
        connection is closed.
        """
        extensions = with_timeout(extensions, timeout)
        request = Request(method, url, headers=headers, content=content, extensions=extensions)
        try:
            response = await self.handle_async_request(request)
            await response._read_without_checkpoint()
            if response.status == 101 or request.method == b"CONNECT":
                # Reading does not close a stream that was handed over.
                await response.aclose()
        except ExchangeError as exc:
            drop_library_frames(exc)
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
        """Send a request and give its response, before its body is read, to an `async with` block.

        The arguments, the errors and the effect of cancellation are those of `request`. At the end of the
        block the response is closed. An HTTP/1.1 connection is then kept if the unread rest of the body is
        small and has arrived already, and closed if not. An HTTP/2 connection is kept in any case; the stream
        is reset if the rest has not arrived.
        """
        extensions = with_timeout(extensions, timeout)
        return StreamContext(
            self, Request(method, url, headers=headers, content=content, extensions=extensions)
        )

    @trio.lowlevel.enable_ki_protection
    async def handle_async_request(self, request: Request) -> Response:
        """Send a request and return its response, before its body is read.

        The caller must close the response: `await response.aclose()`. The errors and the effect of
        cancellation are those of `request`.

        Args:
            request: The request; it is not changed. The pool's `timeout` applies to the names that are
                missing in its `timeout` extension.
        """
        check_runs_under_trio()
        if not isinstance(request, Request):
            raise TypeError(f"request must be a trio_exchange.Request, not {request!r}")
        self._pool_nursery.check_open()
        key, prepared = self._address(PreparedRequest(request, self._header_checker))
        timeouts = parse_timeouts(request.extensions, self._timeouts)
        tracer = tracer_for(request.extensions)
        body = RequestBody(request.stream)
        try:
            context = RequestContext(await body.peek(prepared), body, key, timeouts, tracer)
            checkout = Checkout(key, tracer, timeouts, self._retries)
            response = await self._manager.exchange(context, checkout, _begin)
        except BaseException as exc:
            show_public_contexts(exc)
            await body.close()
            if isinstance(exc, ExchangeError):
                drop_library_frames(exc)
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

        The stream counts as one of the pool's connections. Close it with `aclose`; closing the pool closes
        it too.

        Args:
            host: A name or an address.
            port: A port number.
            extensions: The `timeout` and `trace` extensions of a request. The `pool` timeout limits waiting,
                and the `connect` timeout limits connecting.
            timeout: As in `request`.

        Returns:
            The stream, without TLS; see `NetworkStream.start_tls`.

        Raises:
            RuntimeError: The pool was not entered, or Trio is not running.
            TypeError, ValueError, InvalidURL: The host, the port or an extension is not valid.
            ConnectionNotAvailable: The pool is closed, or was closed before the stream was open.
            PoolTimeout, ConnectTimeout: Waiting for a connection, or connecting, took too long.
            ConnectError: The connection could not be established.
            ProxyError: A proxy refused or failed.

        When this is cancelled, the stream is closed if it was open already.
        """
        check_runs_under_trio()
        self._pool_nursery.check_open()
        origin = URL(scheme=TCP, host=host, port=port).origin
        if not (origin.host and origin.port):
            raise ValueError(f"a stream needs a host and a port, not {host!r} and {port!r}")
        given = to_extensions(with_timeout(extensions, timeout))
        check_extension_names(given)
        key = ConnectionKey(origin.scheme, origin.host, origin.port, None)
        timeouts = parse_timeouts(given, self._timeouts)
        checkout = Checkout(key, tracer_for(given), timeouts, self._retries)
        try:
            connection = await self._manager.obtain(checkout)
        except ExchangeError as exc:
            drop_library_frames(exc)
            raise
        return connection.raw_stream()

    def _address(self, prepared: PreparedRequest) -> tuple[ConnectionKey, PreparedRequest]:
        """Find out where a request is sent, and give it the form that it takes there."""
        key = ConnectionKey.for_request(prepared.request)
        # A tunnel can't be forwarded.
        if self._forwarding is None or key.scheme != b"http" or prepared.method == b"CONNECT":
            return key, prepared
        return self._forwarding.key, self._forwarding.rewrite(prepared)

    # -- Inspection.

    @property
    def connections(self) -> list[PooledConnection]:
        """The established connections, oldest first. The `repr` of each shows its state.

        They include connections through the tunnels of proxies, but not the connections that carry the
        tunnels.
        """
        return [*self._manager]

    def statistics(self) -> PoolStatistics:
        """Count the pool's connections and requests by what they are doing now."""
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
        # `statistics` needs Trio's clock, and a `repr` must work outside of `trio.run`.
        states = [connection.state for connection in self._manager]
        scheduler = self._manager.scheduler
        return (
            f"<{type(self).__name__} {self._pool_nursery.state.value}: {states.count('active')} active, "
            f"{states.count('idle')} idle, {scheduler.connecting} connecting, {scheduler.waiting} waiting>"
        )


def _begin(connection: HTTPConnection, context: RequestContext) -> Awaitable[Response]:
    return connection.exchange(context)
