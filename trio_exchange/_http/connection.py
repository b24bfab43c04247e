"""What connections have in common whatever they speak.

Theory of operation. A connection lives as long as its task, `run`, which is also what closes it. Other tasks
only *mark* it: `close_soon` is synchronous, can be called in any state and from any task, and is all that a
failing or cancelled request has to do. So there is exactly one place where the socket is closed, and it is
reached however a request ends.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from .._connect.attempt import Established
from .._connect.network_stream import NOT_RAW, NetworkStream
from .._connect.transport import Readiness, Transport
from .._models import Response
from .._trace import span, tracer_for
from .._urls import Origin
from .request import RequestContext
from .upload import Upload

# How long closing a connection may take before it is cut.
_CLOSE_TIMEOUT = 1.0


@dataclass(frozen=True)
class Settings:
    """A pool's settings for what it speaks.

    Attributes:
        max_header_bytes: The largest head of a response, in bytes.
        expect_continue_timeout: Seconds to wait for `100 (Continue)`.
        ping_interval: Seconds of silence after which an HTTP/2 connection is tested; None for never.
        ping_timeout: Seconds that the test may take.
    """

    max_header_bytes: int = 100 * 1024
    expect_continue_timeout: float = 1.0
    ping_interval: float | None = None
    ping_timeout: float = 15.0


@dataclass(frozen=True)
class Owner:
    """The pool's functions that a connection calls, synchronously.

    Attributes:
        released: A request has ended, so that the connection has a place more.
        capacity_changed: The number of requests that the connection can carry at once has changed.
        closing: The connection is marked for closing.
        start_upload: Starts an upload's task, which lives at most as long as the pool, in the caller's
            context.
    """

    released: Callable[[BaseConnection], None]
    capacity_changed: Callable[[BaseConnection, int], None]
    closing: Callable[[BaseConnection], None]
    start_upload: Callable[[Upload], None]


class PooledConnection(Protocol):
    """An established connection, as `ConnectionPool.connections` shows it.

    Its `repr` tells what it is doing. What else it may have is not for users.
    """

    @property
    def origin(self) -> Origin:
        """Scheme, host and port that it is to: a server's, or those of a proxy that forwards requests."""
        ...

    @property
    def http_version(self) -> str:
        """What it speaks: `HTTP/1.1`, `HTTP/2`, or `no HTTP` for a stream that was handed over."""
        ...

    @property
    def state(self) -> str:
        """One of `active`, `idle`, `closing` and `closed`."""
        ...

    @property
    def requests(self) -> int:
        """How many requests it has carried, those under way included."""
        ...


class BaseConnection(abc.ABC):
    """An established connection, and the task that closes it."""

    http_version: str

    def __init__(self, established: Established, origin: Origin, settings: Settings, owner: Owner) -> None:
        self.origin: Origin = origin
        self.settings: Settings = settings
        self.requests: int = 0
        self.closed: trio.Event = trio.Event()
        self.owner: Owner = owner
        self.transport: Transport = established.transport
        self.stream: trio.abc.Stream = established.stream
        self.info: NetworkStream = NetworkStream(self.stream, refusal=NOT_RAW)
        self.trio_token: trio.lowlevel.TrioToken = trio.lowlevel.current_trio_token()
        self._plain = self.stream is self.transport
        self._close_requested = trio.Event()

    def __repr__(self) -> str:
        about = ", ".join((self.http_version, self.state, *self._details()))
        return f"<{type(self).__name__} {str(self.origin)!r}, {about}>"

    def _details(self) -> tuple[str, ...]:
        return ()

    @property
    def state(self) -> str:
        """One of `active`, `idle`, `closing` and `closed`."""
        if self.closed.is_set():
            return "closed"
        if self._close_requested.is_set():
            return "closing"
        return "active" if self._is_active() else "idle"

    @property
    def will_close(self) -> bool:
        """Whether the connection is marked for closing, or closed."""
        return self._close_requested.is_set()

    async def run(self) -> None:
        """The connection's task: live until it is to be closed, and close it."""
        try:
            await self._live()
        finally:
            self.close_soon()
            try:
                async with span(tracer_for({}), "connection.close", {"connection": self}):
                    await self._close()
            except BaseException:
                # A logging handler of the program's may have failed before anything was closed.
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(self.stream)
                raise
            finally:
                self.closed.set()

    async def _close(self) -> None:
        # The socket is closed whatever fails here, and no request is left that the failure would matter to.
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
        """Mark the connection for closing. Ends whatever is done on it."""
        if not self._close_requested.is_set():
            self._close_requested.set()
            self.owner.closing(self)
            self._end_exchanges()

    def raw_stream(self, received: bytes = b"") -> NetworkStream:
        """The stream for a user of its own, beginning with what was received already."""
        if not self._plain:
            return NetworkStream(self.stream, received=received, on_close=self.close_soon)
        # Trio's own stream has the checks for misuse that the transport leaves out.
        received += self.transport.take_unread()
        return NetworkStream(self.transport.stream, received=received, on_close=self.close_soon)

    async def _live(self) -> None:
        """Do what the connection's task does while the connection is open."""
        await self._close_requested.wait()

    async def _say_goodbye(self) -> None:  # noqa: B027 - HTTP/1.1 has nothing to say
        """Send what the protocol sends before closing."""

    @abc.abstractmethod
    def _is_active(self) -> bool:
        """Whether it is being used."""

    def _end_exchanges(self) -> None:  # noqa: B027 - there may never be one
        """The connection has been marked for closing, maybe with exchanges under way."""


class RawConnection(BaseConnection):
    """A connection whose stream belongs to the user, and on which no HTTP is spoken."""

    http_version = "no HTTP"

    def _is_active(self) -> bool:
        return True


class HTTPConnection(BaseConnection):
    """An established connection that carries exchanges."""

    def __init__(self, established: Established, origin: Origin, settings: Settings, owner: Owner) -> None:
        super().__init__(established, origin, settings, owner)
        # An answer may come after sending has failed.
        self.transport.defer_errors = True

    def _details(self) -> tuple[str, ...]:
        return ("1 request" if self.requests == 1 else f"{self.requests} requests",)

    @abc.abstractmethod
    async def exchange(self, context: RequestContext) -> Response:
        """Send a request and receive the head of its response.

        The pool has granted this; in whatever way the exchange ends, the grant is given back.

        Raises:
            ExchangeFailed: The network or the server failed before the response began.
            ExchangeError: The request failed otherwise.
            Exception: What a callback or the content's iterator raised.
        """

    @abc.abstractmethod
    def readiness(self) -> Readiness:
        """Whether the connection can take the request that it was granted to."""

    @abc.abstractmethod
    async def still_open(self) -> bool:
        """Whether an idle connection is still usable after what has arrived on it."""

    @abc.abstractmethod
    def decline(self) -> None:
        """Give back a grant: the connection can't carry the request."""
