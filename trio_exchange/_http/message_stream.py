"""What an exchange needs of a protocol: a stream that carries one request and its response.

HTTP/1.1 and HTTP/2 implement it, in `http11` and in `http2.stream`. A message stream knows the wire, its
states and its limits. It calls nothing of the user's, and reports nothing to traces.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from .._connect.network_stream import NetworkStream
from .._exceptions import ExchangeError, WriteError, WriteTimeout
from .._fields import HeaderList, Headers


class Head(NamedTuple):
    """The head of a response.

    Attributes:
        version: Such as `b"HTTP/1.1"`.
        status: The status code.
        reason: The reason phrase.
        headers: In the order and case of the wire.
    """

    version: bytes
    status: int
    reason: bytes
    headers: Headers


class StreamState(enum.Enum):
    """How far both sides have come, in the terms of RFC 9113, 5.1.

    Attributes:
        OPEN: Neither side has ended.
        HALF_CLOSED_LOCAL: The request was sent to its end.
        HALF_CLOSED_REMOTE: The response has arrived to its end.
        CLOSED: Both sides have ended, or the stream was reset.
    """

    OPEN = enum.auto()
    HALF_CLOSED_LOCAL = enum.auto()
    HALF_CLOSED_REMOTE = enum.auto()
    CLOSED = enum.auto()

    def after_local_end(self) -> StreamState:
        """The state once the request was sent to its end."""
        return HALF_CLOSED_LOCAL if self is OPEN else CLOSED

    def after_remote_end(self) -> StreamState:
        """The state once the response has arrived to its end."""
        return HALF_CLOSED_REMOTE if self is OPEN else CLOSED


# Looking a member up in its class takes Python 3.11 a quarter of a microsecond, each time.
OPEN, HALF_CLOSED_LOCAL, HALF_CLOSED_REMOTE, CLOSED = StreamState


class TracePoints:
    """The names of one protocol's trace points, and what they tell of a response's head.

    Args:
        protocol: The first part of the names.
        describe: Makes an event's `return_value` of a head.
    """

    def __init__(self, protocol: str, describe: Callable[[Head], Any]) -> None:
        self.describe = describe
        self.send_request_headers: str = f"{protocol}.send_request_headers"
        self.send_request_body: str = f"{protocol}.send_request_body"
        self.receive_informational_response: str = f"{protocol}.receive_informational_response"
        self.receive_response_headers: str = f"{protocol}.receive_response_headers"
        self.receive_response_body: str = f"{protocol}.receive_response_body"
        self.response_closed: str = f"{protocol}.response_closed"


class MessageStream(Protocol):
    """A stream that carries one request and its response.

    All methods that receive can be cancelled and called again: nothing that has arrived is lost.
    A failure of the network or the server is raised as `ExchangeFailed` before the response begins, and as an
    `ExchangeError` of its own after that.

    Attributes:
        trace_points: The protocol's.
        trailers: What followed the body; empty before the body was received to its end.
        stop_sending: Called when the stream takes no more data, which ends the upload. None without one.
    """

    trace_points: TracePoints
    trailers: HeaderList
    stop_sending: Callable[[], None] | None

    @property
    def state(self) -> StreamState:
        """How far both sides have come."""
        ...

    @property
    def answered(self) -> bool:
        """Whether the first bytes of the response have arrived."""
        ...

    @property
    def failed(self) -> bool:
        """Whether the next receive that has to wait will fail."""
        ...

    @property
    def released(self) -> bool:
        """Whether the connection was released."""
        ...

    @property
    def trace_info(self) -> dict[str, Any]:
        """What trace points tell of the stream."""
        ...

    async def prepare(self, content: bytes | None) -> bool:
        """Make the head, and wait until the request may be sent.

        Args:
            content: The request's content if it is small and need not wait; else None.

        Returns:
            Whether the content goes out with the head, so that nothing follows.

        Raises:
            LocalProtocolError: The protocol can't express the request.
        """
        ...

    async def send_head(self) -> None:
        """Send what `prepare` made."""
        ...

    def check_open(self) -> None:
        """Raise `ExchangeFailed` if the connection was closed."""
        ...

    async def send_data(self, data: memoryview) -> int:
        """Send the beginning of `data`, waiting until that is possible.

        Returns:
            How many bytes were accepted.

        Raises:
            WriteError: The stream takes no more data.
            LocalProtocolError: The content is longer than its Content-Length.
        """
        ...

    async def send_end(self) -> None:
        """Send the end of the request.

        Raises:
            WriteError: The stream takes no more data.
            LocalProtocolError: The content is shorter than its Content-Length.
        """
        ...

    def has_arrived(self) -> bool:
        """Whether the next receive need not wait."""
        ...

    async def wait_until_answered(self, timeout: float | None) -> None:
        """Wait for the first bytes of the response, each time for at most `timeout` seconds."""
        ...

    async def receive_head(self, timeout: float | None) -> Head:
        """Receive the next head, interim or final, waiting each time for at most `timeout` seconds."""
        ...

    def begin_body(self, head: Head) -> None:
        """Take up the body after the final head."""
        ...

    def hand_over(self, head: Head) -> NetworkStream:
        """Give up HTTP after the final head, and return the stream of bytes that follows it.

        Raises:
            RemoteProtocolError: The request was not sent whole.
        """
        ...

    def extensions(self, head: Head) -> dict[str, Any]:
        """What the response's extensions tell of this protocol alone."""
        ...

    async def receive_data(self, timeout: float | None) -> bytes | None:
        """Receive a piece of the body, None for its end, waiting each time for at most `timeout` seconds."""
        ...

    async def discard_rest(self) -> bool:
        """Drop what is left of the response if it has arrived, and is little.

        Returns:
            Whether the response has ended.
        """
        ...

    def explain(self, error: ExchangeError, write_error: WriteError | WriteTimeout | None) -> ExchangeError:
        """Choose the error that says most about why no response began.

        Args:
            error: What was raised.
            write_error: Why the content was not sent whole; None if it was.
        """
        ...

    def release(self, *, reusable: bool) -> bool:
        """Release the connection, for reuse if both sides finished cleanly. Calling it again does nothing.

        Args:
            reusable: False if the caller knows that they did not.

        Returns:
            Whether they did.
        """
        ...

    @property
    def ends_connection(self) -> bool:
        """Whether the connection is closed because of how the stream was released."""
        ...
