"""The interface between an exchange and a protocol: a stream that carries one request and its response.

`http11` and `http2.stream` implement it. A message stream handles the bytes on the wire, the protocol's
states and its limits. It calls no user code and reports no trace events.
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
        version: The protocol version, such as `b"HTTP/1.1"`.
        status: The status code.
        reason: The reason phrase.
        headers: The headers, in the order and case of the wire.
    """

    version: bytes
    status: int
    reason: bytes
    headers: Headers


class StreamState(enum.Enum):
    """The state of both sides, in the terms of RFC 9113, 5.1.

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
        """Return the state after the request was sent to its end."""
        return HALF_CLOSED_LOCAL if self is OPEN else CLOSED

    def after_remote_end(self) -> StreamState:
        """Return the state after the response has arrived to its end."""
        return HALF_CLOSED_REMOTE if self is OPEN else CLOSED


# Python 3.11 takes a quarter of a microsecond for each lookup of a member in its class.
OPEN, HALF_CLOSED_LOCAL, HALF_CLOSED_REMOTE, CLOSED = StreamState


class TracePoints:
    """The names of one protocol's trace points, and the `return_value` of a response's head.

    Args:
        protocol: The first part of the names.
        describe: Makes an event's `return_value` from a head.
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

    All methods that receive can be cancelled and called again without losing data. A failure of the network
    or the server raises `ExchangeFailed` before the response begins, and an `ExchangeError` after that.

    Attributes:
        trace_points: The protocol's trace points.
        trailers: The trailer fields. Empty before the body was received to its end.
        stop_sending: Called when the stream takes no more data, to end the upload. None without an upload.
    """

    trace_points: TracePoints
    trailers: HeaderList
    stop_sending: Callable[[], None] | None

    @property
    def state(self) -> StreamState:
        """The state of both sides."""
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
        """The entries that the stream adds to the info of trace events."""
        ...

    async def prepare(self, content: bytes | None) -> bool:
        """Encode the head, and wait until the request may be sent.

        Args:
            content: The request's content if it is small and can be sent at once, else None.

        Returns:
            Whether the content goes out with the head, so that no upload is needed.

        Raises:
            LocalProtocolError: The protocol can't express the request.
        """
        ...

    async def send_head(self) -> None:
        """Send the bytes that `prepare` made."""
        ...

    def check_open(self) -> None:
        """Raise `ExchangeFailed` if the connection was closed."""
        ...

    async def send_data(self, data: memoryview) -> int:
        """Wait until `data` can be sent at least in part, and send that part.

        Returns:
            The number of bytes that were accepted.

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
        """Return whether the next receive completes without waiting."""
        ...

    async def wait_until_answered(self, timeout: float | None) -> None:
        """Wait for the first bytes of the response. Each wait takes at most `timeout` seconds."""
        ...

    async def receive_head(self, timeout: float | None) -> Head:
        """Receive the next head, interim or final. Each wait takes at most `timeout` seconds."""
        ...

    def begin_body(self, head: Head) -> None:
        """Prepare to receive the body after the final head."""
        ...

    def hand_over(self, head: Head) -> NetworkStream:
        """Leave HTTP after the final head, and return the raw byte stream that follows it.

        Raises:
            RemoteProtocolError: The request was not sent to its end.
        """
        ...

    def extensions(self, head: Head) -> dict[str, Any]:
        """Return the response extensions that are specific to the protocol."""
        ...

    async def receive_data(self, timeout: float | None) -> bytes | None:
        """Receive a chunk of the body, or None at its end. Each wait takes at most `timeout` seconds."""
        ...

    def take_whole(self) -> bytes | None:
        """Take the rest of the body if all of it has arrived, its end included; else None, and take nothing.

        It is what calls of `receive_data` would do, in one synchronous step.
        """
        ...

    async def discard_rest(self) -> bool:
        """Discard the rest of the response if it has arrived and is small.

        Returns:
            Whether the response has ended.
        """
        ...

    def explain(self, error: ExchangeError, write_error: WriteError | WriteTimeout | None) -> ExchangeError:
        """Choose the error that best explains why no response began.

        Args:
            error: The error that was raised.
            write_error: The error that ended the upload, or None.
        """
        ...

    def release(self, *, reusable: bool) -> bool:
        """Release the connection, for reuse if both sides finished cleanly. Further calls do nothing.

        Args:
            reusable: False if the caller knows that a side did not finish cleanly.

        Returns:
            Whether both sides finished cleanly; True for further calls.
        """
        ...

    @property
    def ends_connection(self) -> bool:
        """Whether releasing the stream closed the connection."""
        ...
