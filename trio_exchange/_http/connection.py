"""The base classes of connections.

Theory of operation. Only a connection's own task, `run`, closes it. Other tasks only *mark* the connection
for closing: `close_soon` is synchronous, and can be called in any state and from any task. A failing or
cancelled request has nothing else to do. So exactly one place closes the socket, and every way in which a
request can end leads there.

The task starts when it has something to do. That of an HTTP/2 connection, which reads and writes, starts with
the connection. Any other is started by `close_soon`: a task that only waits would take 2 KiB of memory for
each idle connection.
"""

from __future__ import annotations

import abc
import contextlib
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from .._connect.attempt import Established
from .._connect.network_stream import NOT_RAW, NetworkStream
from .._connect.tls_stream import TLSStream
from .._connect.transport import Readiness, Transport
from .._models import Response
from .._trace import span, tracer_for
from .._urls import Origin
from .request import RequestContext
from .upload import Upload

# Seconds that closing a connection may take before it is closed forcefully.
_CLOSE_TIMEOUT = 1.0


@dataclass(frozen=True)
class Settings:
    """A pool's settings for its connections.

    Attributes:
        max_header_bytes: The largest head of a response, in bytes.
        expect_continue_timeout: Seconds to wait for `100 (Continue)`.
        ping_interval: Seconds of silence after which an HTTP/2 connection sends a PING; None for never.
        ping_timeout: Seconds to wait for an answer to the PING.
    """

    max_header_bytes: int = 100 * 1024
    expect_continue_timeout: float = 1.0
    ping_interval: float | None = None
    ping_timeout: float = 15.0


@dataclass(frozen=True)
class Owner:
    """The pool's functions that a connection calls, synchronously.

    Attributes:
        released: Called when a request has ended, so that the connection has one more free place.
        capacity_changed: Called with the number of requests that the connection can now carry at once.
        closing: Called when the connection is marked for closing.
        closed: Called when the connection is closed.
        start_task: Starts the connection's task, in the context of the pool.
        start_upload: Starts an upload's task in the caller's context. The task lives at most as long as the
            pool.
    """

    released: Callable[[BaseConnection], None]
    capacity_changed: Callable[[BaseConnection, int], None]
    closing: Callable[[BaseConnection], None]
    closed: Callable[[BaseConnection], None]
    start_task: Callable[[BaseConnection], None]
    start_upload: Callable[[Upload], None]


class PooledConnection(Protocol):
    """An established connection, as `ConnectionPool.connections` shows it.

    Its `repr` shows its origin, protocol and state. Other attributes of the object are private.
    """

    @property
    def origin(self) -> Origin:
        """The scheme, host and port of the server, or of the proxy that forwards the requests."""
        ...

    @property
    def http_version(self) -> str:
        """The protocol: `HTTP/1.1`, `HTTP/2`, or `no HTTP` for a raw stream that belongs to the user."""
        ...

    @property
    def state(self) -> str:
        """The state: `active`, `idle`, `closing` or `closed`."""
        ...

    @property
    def requests(self) -> int:
        """The number of requests that it has carried, including current ones."""
        ...


class _Phase(enum.Enum):
    """How far the closing of a connection is."""

    OPEN = enum.auto()
    CLOSING = enum.auto()
    CLOSED = enum.auto()


# Looking a member up in its class takes Python 3.11 a quarter of a microsecond, for each request.
_OPEN, _CLOSING, _CLOSED = _Phase


class BaseConnection(abc.ABC):
    """An established connection, and the task that closes it.

    Attributes:
        http_version: The protocol.
        multiplexed: Whether it carries several requests at once.
    """

    http_version: str
    multiplexed: bool = False

    def __init__(self, established: Established, origin: Origin, settings: Settings, owner: Owner) -> None:
        self.origin: Origin = origin
        self.settings: Settings = settings
        self.requests: int = 0
        self.owner: Owner = owner
        self.transport: Transport = established.transport
        self.stream: trio.abc.Stream = established.stream
        self.info: NetworkStream = NetworkStream(self._shown(), refusal=NOT_RAW)
        self.trio_token: trio.lowlevel.TrioToken = trio.lowlevel.current_trio_token()
        self._plain = self.stream is self.transport
        self._phase = _OPEN
        # Made for the first task that waits: an event takes a quarter of a KiB.
        self._closed: trio.Event | None = None

    def __repr__(self) -> str:
        about = ", ".join((self.http_version, self.state, *self._details()))
        return f"<{type(self).__name__} {str(self.origin)!r}, {about}>"

    def _details(self) -> tuple[str, ...]:
        return ()

    @property
    def state(self) -> str:
        """The state: `active`, `idle`, `closing` or `closed`."""
        if self._phase is _OPEN:
            return "active" if self._is_active() else "idle"
        return "closing" if self._phase is _CLOSING else "closed"

    @property
    def will_close(self) -> bool:
        """Whether the connection is marked for closing or closed."""
        return self._phase is not _OPEN

    def start(self) -> None:  # noqa: B027 - HTTP/1.1 has nothing to do
        """Start the connection's task, if it has something to do before the connection is to be closed."""

    async def run(self) -> None:
        """Run the connection's task: close the connection, which is marked for closing."""
        try:
            async with span(tracer_for({}), "connection.close", {"connection": self}):
                await self._close()
        except BaseException:
            # A logging handler of the program may have failed before the stream was closed.
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self.stream)
            raise
        finally:
            self._phase = _CLOSED
            if self._closed is not None:
                self._closed.set()
            self.owner.closed(self)

    async def wait_closed(self) -> None:
        """Wait until the connection is closed."""
        if self._closed is None:
            self._closed = trio.Event()
            if self._phase is _CLOSED:
                self._closed.set()
        await self._closed.wait()

    async def _close(self) -> None:
        # Any failure here still closes the socket, and no request is left to raise it in.
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            with trio.move_on_after(_CLOSE_TIMEOUT) as scope:
                scope.shield = True
                try:
                    await self._say_goodbye()
                finally:
                    await self.stream.aclose()
            if scope.cancelled_caught:
                await trio.aclose_forcefully(self.stream)

    def close_soon(self) -> None:
        """Mark the connection for closing, and end its exchanges."""
        if self._phase is _OPEN:
            self._phase = _CLOSING
            self._begin_closing()
            self.owner.closing(self)
            self._end_exchanges()

    def _begin_closing(self) -> None:
        """Have the connection's task close it."""
        self.owner.start_task(self)

    def raw_stream(self, received: bytes = b"") -> NetworkStream:
        """Return the raw stream for the user. It starts with the bytes that were already received."""
        if self._plain:
            received += self.transport.take_unread()
            # Trio's own stream has the checks for misuse that the transport omits.
            return NetworkStream(self.transport.stream, received=received, on_close=self.close_soon)
        return NetworkStream(self._shown(), received=received, on_close=self.close_soon)

    def _shown(self) -> trio.abc.Stream:
        """Return the stream for the user to see: with TLS Trio's own, which has the checks for misuse."""
        return self.stream.trio_stream if isinstance(self.stream, TLSStream) else self.stream

    async def _say_goodbye(self) -> None:  # noqa: B027 - HTTP/1.1 has nothing to say
        """Send the protocol's last message before closing."""

    @abc.abstractmethod
    def _is_active(self) -> bool:
        """Return whether the connection is in use."""

    def _end_exchanges(self) -> None:  # noqa: B027 - there may never be one
        """End the exchanges under way, since the connection was marked for closing."""


class RawConnection(BaseConnection):
    """A connection whose stream belongs to the user, and on which no HTTP is spoken."""

    http_version = "no HTTP"

    def _is_active(self) -> bool:
        return True


class HTTPConnection(BaseConnection):
    """An established connection that carries exchanges."""

    def __init__(self, established: Established, origin: Origin, settings: Settings, owner: Owner) -> None:
        super().__init__(established, origin, settings, owner)
        # A response may still arrive after sending has failed.
        self.transport.defer_errors = True

    def _details(self) -> tuple[str, ...]:
        return ("1 request" if self.requests == 1 else f"{self.requests} requests",)

    @abc.abstractmethod
    def exchange(self, context: RequestContext) -> Awaitable[Response]:
        """Send a request and receive the head of its response.

        The pool has granted a place for the request. The end of the exchange always returns the grant.

        Raises:
            ExchangeFailed: The network or the server failed before the response began.
            ExchangeError: The request failed in another way.
            Exception: A callback or the content's iterator raised it.
        """

    @abc.abstractmethod
    def readiness(self) -> Readiness:
        """Check without waiting whether the connection can take the granted request."""

    @abc.abstractmethod
    async def still_open(self) -> bool:
        """Process what has arrived on an idle connection, and return whether it is still usable."""

    @abc.abstractmethod
    def decline(self) -> None:
        """Return a grant because the connection can't carry the request."""
