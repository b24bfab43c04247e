"""An HTTP/2 stream that carries one request and its response (RFC 9113, 5.1).

Theory of operation. The connection's reader puts heads, data, trailers and the end into the stream's inbox
and wakes the waiting task. The requester's task takes them out. The reader never waits for that task, since
it would then delay all other streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import trio
from h2.errors import ErrorCodes

from ..._connect.network_stream import NetworkStream
from ..._connect.transport import Readiness
from ..._exceptions import (
    ExchangeError,
    ExchangeFailed,
    LocalProtocolError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    WriteError,
    WriteTimeout,
    copied,
)
from ..._fields import HeaderList
from ..._timeouts import timed
from ..._trace import span
from ..exchange import MAX_INFORMATIONAL
from ..message_stream import (
    CLOSED,
    HALF_CLOSED_LOCAL,
    HALF_CLOSED_REMOTE,
    OPEN,
    Head,
    StreamState,
    TracePoints,
)
from ..request import RequestContext
from .frames import Violation, name_of, window_update
from .header_compression import DecodedBlock
from .headers import check_trailers, content_length, head_of, request_headers
from .receive_windows import ReceiveWindow
from .tunnel import Tunnel, TunnelState
from .wakeup import Wakeup

if TYPE_CHECKING:
    from .connection import HTTP2Connection


# Bytes below which received data is appended to unread data.
_TINY = 1024


class HTTP2Stream:
    """One request and its response over HTTP/2; see `MessageStream`.

    Args:
        connection: The connection that carries the stream.
        context: The request.
    """

    trace_points = TracePoints("http2", lambda head: (head.status, head.headers))
    #: The end of a stream never ends the connection.
    ends_connection = False

    def __init__(self, connection: HTTP2Connection, context: RequestContext) -> None:
        self.state: StreamState = OPEN
        self.stream_id: int | None = None
        self.answered: bool = False
        self.released: bool = False
        self.trailers: HeaderList = []
        self.stop_sending: Callable[[], None] | None = None
        self.window = ReceiveWindow()
        self._connection = connection
        self._context = context
        self._prepared = context.prepared
        # The error that ended the stream, and whether the server promised that it did not act on the
        # request.
        self._failure: ExchangeError | None = None
        self._refused = False
        # The error code of the reset if the stream is released before both sides have ended.
        self._reset_code = ErrorCodes.CANCEL
        # Sending: the number of bytes still to send, if the request has a Content-Length.
        self._to_send: int | None = None
        # Receiving, set by the reader. The inbox holds heads, data, trailers, and None for the end. `_left`
        # is the number of bytes still to arrive, if the response has a content-length.
        self._inbox: deque[Head | bytes | bytearray | HeaderList | None] = deque()
        self._arrived = Wakeup()
        self._has_head = False
        self._informational = 0
        self._left: int | None = None
        # The tunnel's state, kept here by the tunnel, since a reference to the tunnel would make a cycle.
        self.tunnel: TunnelState = TunnelState.NONE

    @property
    def id_on_wire(self) -> int:
        """The id of a stream that has been opened."""
        assert self.stream_id is not None
        return self.stream_id

    @property
    def failed(self) -> bool:
        """Whether receiving will fail once all items in the inbox have been taken."""
        return self._failure is not None

    @property
    def trace_info(self) -> dict[str, Any]:
        """The stream's id, for trace events."""
        return {"stream_id": self.stream_id}

    # -- The request.

    async def prepare(self, content: bytes | None) -> bool:
        """Open the stream: allocate its id, make HEADERS, and make DATA if all of the content fits."""
        connection = self._connection
        if connection.requests == 1 and self._context.tracer is not None:
            info = {"request": self._prepared.request}
            async with span(self._context.tracer, "http2.send_connection_init", info):
                await self.send_head()
        headers = request_headers(self._prepared)
        if self._prepared.protocol is not None:
            await self._check_extended_connect()
        whole = content is not None and connection.fits(len(content))
        end = whole and self._prepared.method != b"CONNECT"
        self.stream_id = connection.open(self, headers, content if whole and content else b"", end_stream=end)
        if self.stream_id is None:
            error = (
                _own(connection.failure, "before the request was sent")
                if connection.will_close
                else RemoteProtocolError("the server takes no more requests on this connection")
            )
            raise ExchangeFailed(error, unanswered=True, unsent=True, refused=True)
        if end:
            self.state = self.state.after_local_end()
        if not whole:
            self._to_send = content_length(headers)
        return whole

    async def _check_extended_connect(self) -> None:
        """Wait for the server's SETTINGS, and check that they allow extended CONNECT (RFC 8441, 3)."""
        connection = self._connection
        # A server may wait for the client's preface before it sends SETTINGS.
        connection.flush()
        await timed(self._context.timeouts.read, ReadTimeout, connection.settings_received.wait)
        if connection.will_close:
            error = _own(connection.failure, "before the request was sent")
            raise ExchangeFailed(error, unanswered=True, unsent=True)
        if not connection.extended_connect_enabled:
            raise LocalProtocolError(
                "the protocol extension needs a server that takes extended CONNECT (RFC 8441), "
                "which this one does not"
            )

    async def send_head(self) -> None:
        """Send the prepared bytes, and wait until the output queue has drained far enough."""
        self._connection.flush()
        await self._connection.outbound.drained(self._context.timeouts.write)

    def check_open(self) -> None:
        """Raise `ExchangeFailed` if the connection was closed."""
        if self._connection.will_close:
            self._failure = self._failure or WriteError("the connection was closed")
            raise self._exception(self._failure)

    async def send_data(self, data: memoryview) -> int:
        """Send as much of `data` as there is room for.

        It executes a checkpoint only if it has to wait, or if there is not room for all of `data` and other
        tasks are waiting to send too.
        """
        size = len(data)
        if self._to_send is not None and size > self._to_send:
            raise LocalProtocolError("the content is longer than its Content-Length")
        if data:
            size = await self._wait_for_room(size)
        ends = self._to_send == size
        if self._to_send is not None:
            self._to_send -= size
        if data or (ends and not self._request_ended):
            self._send(data[:size], end=ends)
        if size < len(data) and self._connection.outbound.is_contended:
            await trio.lowlevel.checkpoint()
        return size

    async def _wait_for_room(self, most: int) -> int:
        """Wait until data can be sent, and return how many bytes of it: from 1 to `most`."""
        while True:
            self._check_sendable()
            size = min(most, self._connection.room(self.id_on_wire))
            if size:
                return size
            await self._connection.outbound.wait_for_progress()

    async def send_end(self) -> None:
        """Send END_STREAM unless the last DATA frame carried it."""
        if self._to_send:
            raise LocalProtocolError(f"the content is {self._to_send} bytes shorter than its Content-Length")
        if not self._request_ended:
            self._send(b"", end=True)

    @property
    def _request_ended(self) -> bool:
        """Whether END_STREAM was sent."""
        if self.state is CLOSED:
            return self._failure is None
        return self.state is HALF_CLOSED_LOCAL

    def _send(self, data: bytes | memoryview, *, end: bool = False) -> None:
        self._check_sendable()
        if end:
            self.state = self.state.after_local_end()
        self._connection.send_data(self.id_on_wire, data, end_stream=end)
        if self.state is CLOSED:
            self._leave()

    def _check_sendable(self) -> None:
        if self._is_over:
            raise WriteError(str(self._failure or "the stream was closed"))

    @property
    def _is_over(self) -> bool:
        """Whether nothing can be sent or received any more."""
        return self.state is CLOSED or self._failure is not None or self._connection.will_close

    def end_request(self) -> bool:
        """Send END_STREAM if it is still missing and can be sent.

        Returns:
            Whether END_STREAM was sent, now or before.
        """
        if self._request_ended or self._is_over:
            return self._request_ended
        self._send(b"", end=True)
        return True

    async def wait_for_room(self) -> None:
        """Wait until there is room for data, or the stream can send no more."""
        while not (self._is_over or self._connection.room(self.id_on_wire)):
            await self._connection.outbound.wait_for_progress()

    # -- Called by the connection's reader. None of these methods waits.

    @property
    def receives(self) -> bool:
        """Whether heads, data and trailers may arrive."""
        state = self.state
        return state is HALF_CLOSED_LOCAL or state is OPEN

    def take_block(self, block: DecodedBlock, *, ends: bool) -> None:
        """Take an interim head, the final head or the trailers.

        Args:
            block: The header block.
            ends: Whether the block ends the stream. If so, the reader calls `take_end` next.
        """
        if not self.receives:
            # RFC 9113, 5.1, half-closed (remote): the response ended while the request is still being sent.
            self._reset_code = ErrorCodes.STREAM_CLOSED
            self._leave()
            return
        try:
            if self._has_head:
                check_trailers(block.fields, ends=ends)
                self._put(list(block.fields))
            else:
                self._take_head(head_of(block), ends=ends)
        except RemoteProtocolError as exc:
            self._malformed(exc)

    def _take_head(self, head: Head, *, ends: bool) -> None:
        if head.status < 200:
            if ends:
                raise RemoteProtocolError(
                    f"the server ended the stream with an informational response: {head.status}"
                )
            self._count_informational()
        elif self._is_tunnel(head.status):
            self._left = None
        else:
            self._left = content_length(head.headers)
            if self._prepared.method == b"HEAD" or head.status in (204, 304):
                self._left = 0
        self.answered = True
        self._has_head = head.status >= 200
        self._put(head)

    def _count_informational(self) -> None:
        self._informational += 1
        if self._informational > MAX_INFORMATIONAL:
            self._reset_code = ErrorCodes.ENHANCE_YOUR_CALM
            raise RemoteProtocolError(
                f"the server sent more than {MAX_INFORMATIONAL} informational responses"
            )

    def take_data(self, data: bytes, size: int) -> None:
        """Take a piece of the body, which has used `size` bytes of the stream's window."""
        if not self.window.use(size):
            raise Violation(ErrorCodes.FLOW_CONTROL_ERROR, "the server sent more data than it may")
        received = len(data)
        if size > received:
            # Padding is never read by the user, so it is credited to the server at once.
            self._open_window(self.window.credit(size - received))
        if not self._has_head:
            self._malformed(RemoteProtocolError("the server sent a body before the response's head"))
        elif self._left is not None and received > self._left:
            self._malformed(RemoteProtocolError("the response's body is longer than its content-length"))
        elif received:
            if self._left is not None:
                self._left -= received
            if received < _TINY and self._inbox:
                self._put_tiny(data)
            else:
                self._put(data)

    def take_end(self) -> None:
        """Take the end of the response."""
        if self._left:
            self._malformed(RemoteProtocolError(f"the response's body ends {self._left} bytes early"))
            return
        self.state = self.state.after_remote_end()
        self._put(None)
        if self.state is CLOSED:
            self._leave()

    def take_reset(self, code: int, *, by_server: bool | None) -> None:
        """Take a reset of the stream."""
        complete = self.state is HALF_CLOSED_REMOTE
        self.state = CLOSED
        # A task that writes to a tunnel would otherwise wait for a window for ever.
        self._connection.outbound.wake_senders()
        if complete:
            # The response is complete, and the server does not need the rest of the request (RFC 9113, 8.1).
            self._fail(ReadError("the stream was closed"))
            self._leave()
        elif code == ErrorCodes.REFUSED_STREAM:
            self.refused("the server refused the request (REFUSED_STREAM)")
        else:
            # A reset counts as an answer: the server may have acted on the request.
            self.answered = True
            what = "the server reset the stream" if by_server else "the server broke HTTP/2 on the stream"
            self._fail(RemoteProtocolError(f"{what}: {name_of(code)}"))

    def refused(self, reason: str) -> None:
        """Fail the stream because the server promised that it did not act on the request (RFC 9113, 8.7)."""
        self.state = CLOSED
        self._refused = True
        self._fail(RemoteProtocolError(reason))

    def connection_failed(self, failure: ExchangeError) -> None:
        """Close the stream because its connection has ended."""
        complete = self.state is HALF_CLOSED_REMOTE
        self.state = CLOSED
        if complete:
            # The response is complete and can be read, but END_STREAM was not sent and never will be.
            self._fail(ReadError("the stream was closed"))
        elif not self.answered:
            self._fail(_own(failure, "without a response"))
        else:
            # For this exchange a write error of the connection is a failure to read the response.
            kind = ReadError if isinstance(failure, WriteError) else type(failure)
            self._fail(_own(failure, "in the middle of the response", kind))

    def _malformed(self, failure: RemoteProtocolError) -> None:
        self.answered = True
        if self._reset_code is ErrorCodes.CANCEL:
            self._reset_code = ErrorCodes.PROTOCOL_ERROR
        self._fail(failure)
        self._leave()

    def _fail(self, failure: ExchangeError) -> None:
        self._failure = self._failure or failure
        if self.stop_sending is not None:
            self.stop_sending()
        self._arrived.set()

    def _put(self, item: Head | bytes | bytearray | HeaderList | None) -> None:
        self._inbox.append(item)
        self._arrived.set()

    def _put_tiny(self, data: bytes) -> None:
        """Append data to the last unread data: an object for each tiny frame would take far more memory."""
        last = self._inbox[-1]
        if isinstance(last, bytearray):
            last += data
        elif isinstance(last, bytes):
            self._inbox[-1] = bytearray(last) + data
        else:
            self._put(data)

    # -- Receiving.

    def has_arrived(self) -> bool:
        """Return whether the next receive completes without waiting."""
        return bool(self._inbox)

    async def wait_until_answered(self, timeout: float | None) -> None:
        """Wait for the response's first head, or raise the failure that comes instead."""
        while not self.answered:
            await self._wait(timeout)

    async def _wait(self, timeout: float | None) -> None:
        if self._failure is not None:
            raise self._exception(self._failure)
        await timed(timeout, ReadTimeout, self._arrived.wait)

    async def _next(self, timeout: float | None) -> Any:
        self.window.awaited = not self._inbox
        while not self._inbox:
            await self._wait(timeout)
        return self._inbox.popleft()

    async def receive_head(self, timeout: float | None) -> Head:
        """Receive the next head, interim or final."""
        head: Head = await self._next(timeout)
        return head

    def extensions(self, head: Head) -> dict[str, Any]:
        """Return the stream's id."""
        return self.trace_info

    def hand_over(self, head: Head) -> NetworkStream:
        """Turn the stream into a tunnel."""
        return NetworkStream(Tunnel(self, self._connection.stream))

    def begin_body(self, head: Head) -> None:
        """End the request if it is a CONNECT that the server has refused, since no tunnel follows."""
        if self._prepared.method == b"CONNECT":
            self.end_request()

    def _is_tunnel(self, status: int) -> bool:
        return self._prepared.method == b"CONNECT" and 200 <= status < 300

    async def receive_data(self, timeout: float | None) -> bytes | None:
        """Receive a chunk of the body, or None at its end."""
        item = await self._next(timeout)
        if isinstance(item, list):
            self.trailers = item
            item = await self._next(timeout)
        if item is None:
            return None
        data = self._join(item, None)
        self._consumed(len(data))
        return data

    def take_whole(self) -> bytes | None:
        """Take the rest of the body if all of it has arrived, else nothing."""
        inbox = self._inbox
        if not inbox or inbox[-1] is not None:
            return None
        data = self._join(b"", None)
        if isinstance(inbox[0], list):
            self.trailers = inbox[0]
        inbox.clear()
        return data

    def _join(self, data: bytes | bytearray, most: int | None) -> bytes:
        """Return `data` and the data that follows it in the inbox, if both have at most `most` bytes."""
        inbox = self._inbox
        pieces, size = [data], len(data)
        while inbox and isinstance(following := inbox[0], (bytes, bytearray)):
            size += len(following)
            if most is not None and size > most:
                break
            pieces.append(following)
            inbox.popleft()
        return b"".join(pieces)

    def _consumed(self, size: int) -> None:
        """Return credit to the server. The window grows if the user reads faster than the server sends."""
        if self.receives and self._failure is None:
            self._open_window(self.window.consume(size))

    def _open_window(self, increments: Iterable[int]) -> None:
        for increment in increments:
            self._connection.flush(window_update(self.id_on_wire, increment))

    async def receive_some(self, max_bytes: int | None) -> bytes:
        """Receive some bytes from the other end of a tunnel. Return `b""` at its end.

        Raises:
            ExchangeError: The stream has failed or was closed.
        """
        self.window.awaited = not self._inbox
        while True:
            while not self._inbox:
                if self._failure is not None:
                    # Raise a copy: the traceback of the raised error refers to the stream.
                    raise copied(self._failure)
                await self._arrived.wait()
            if self._inbox[0] is None:
                return b""
            item = self._inbox.popleft()
            if isinstance(item, (bytes, bytearray)):
                if max_bytes is None or len(item) <= max_bytes:
                    data = self._join(item, max_bytes)
                else:
                    data = bytes(item[:max_bytes])
                    rest = bytearray(item) if isinstance(item, bytes) else item
                    del rest[:max_bytes]
                    self._inbox.appendleft(rest)
                self._consumed(len(data))
                return data

    def peek(self) -> Readiness:
        """Return the state that the next `receive_some` would find."""
        if self._inbox:
            return Readiness.CLOSED if self._inbox[0] is None else Readiness.READABLE
        if self._failure is not None or self._connection.transport.peek() is Readiness.CLOSED:
            return Readiness.CLOSED
        return Readiness.QUIET

    # -- The end.

    async def discard_rest(self) -> bool:
        """Discard the rest of the response if all of it has arrived, or end the tunnel."""
        if self.tunnel is not TunnelState.NONE:
            self.end_tunnel()
            return False
        if not self._inbox or self._inbox[-1] is not None:
            return False
        self.trailers = next((item for item in self._inbox if isinstance(item, list)), self.trailers)
        self._inbox.clear()
        return True

    def end_tunnel(self) -> None:
        """End the stream under a tunnel. Reset the stream if the other side has not ended."""
        if self.tunnel is TunnelState.CLOSED:
            return
        self.tunnel = TunnelState.CLOSED
        if self.state is HALF_CLOSED_REMOTE:
            self.end_request()
        self._leave()
        self._inbox.clear()
        self._fail(ReadError("the stream was closed"))
        self._connection.outbound.wake_senders()

    def release(self, *, reusable: bool) -> bool:
        """Release the connection. Reset the stream if one side has not ended."""
        return self._leave()

    def _leave(self) -> bool:
        if self.released:
            return True
        self.released = True
        reset = None if self.state is CLOSED else self._reset_code
        clean = reset is None and self._failure is None
        self.state = CLOSED
        if not clean:
            # A task that is receiving, or receives later, gets this error once the inbox is empty.
            self._fail(ReadError("the stream was closed"))
        self._connection.leave(self, reset)
        if not clean:
            # A task that writes to a tunnel would otherwise wait for a window for ever.
            self._connection.outbound.wake_senders()
        return clean

    # -- Errors.

    def _exception(self, failure: ExchangeError) -> ExchangeError | ExchangeFailed:
        """Return a copy of a failure to raise: the traceback of the raised error refers to the stream."""
        if self.answered:
            return copied(failure)
        return ExchangeFailed(
            copied(failure), unanswered=True, unsent=self.stream_id is None, refused=self._refused
        )

    def explain(self, error: ExchangeError, write_error: WriteError | WriteTimeout | None) -> ExchangeError:
        """Return `error`, not `write_error`: sending failed only because the stream had ended."""
        return error


def _own(failure: ExchangeError, when: str, kind: type[ExchangeError] | None = None) -> ExchangeError:
    """Return a new error for one exchange, about the failure that all of the connection's exchanges share."""
    own = (kind or type(failure))(f"{failure}, {when}")
    own.__cause__ = failure.__cause__
    return own
