"""TODO _http.http2.stream."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import trio
from h2.errors import ErrorCodes

from ..._connect.network_stream import NetworkStream
from ..._connect.transport import Readiness
from ..._exceptions import (
    ExchangeError,
    LocalProtocolError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    WriteError,
    copied,
)
from ..._fields import HeaderList
from ..._models import Response
from ..._timeouts import Timeouts, timed
from ..._trace import Tracer, traced
from ..exchange import MAX_INFORMATIONAL, SMALL_BODY, Exchange, Head, ResponseBody, TracePoints
from ..request import PreparedRequest
from ..retry import mark_refused, mark_unanswered
from .flow_control import INITIAL_WINDOW, LARGEST_WINDOW
from .frames import Violation, name_of, window_update
from .headers import check_trailers, content_length, request_headers, response_head
from .tunnel import Tunnel
from .wakeup import Wakeup

if TYPE_CHECKING:
    from .connection import HTTP2Connection


class HTTP2Exchange(Exchange["HTTP2Connection"]):
    """One request and its response on a stream of HTTP/2."""

    points = TracePoints("http2")

    def __init__(
        self,
        connection: HTTP2Connection,
        prepared: PreparedRequest,
        timeouts: Timeouts,
        tracer: Tracer | None,
        *,
        is_first: bool,
    ) -> None:
        super().__init__(connection, prepared, timeouts, tracer)
        self.stream_id: int | None = None
        self._is_first = is_first
        # What has arrived and was not taken: heads, pieces of the body, trailers, and None for the end.
        self._inbox: deque[Head | bytes | bytearray | HeaderList | None] = deque()
        self._arrived = Wakeup()
        # How far each side has come on the wire, and how the stream is to be reset if they don't get to the
        # end. Once it `is_over` there is nothing left to reset.
        self.sent_end: bool = False
        self.received_end: bool = False
        self.is_over: bool = False
        self.was_closed: bool = False
        self._has_head = False
        self._reset_code = ErrorCodes.CANCEL
        self._informational = 0
        # The body's declared length, and how much of it is to come; the same for the request's.
        self._left: int | None = None
        self._to_send: int | None = None
        # The stream's window: its size, how much of it the server has not used, and how much is free again.
        self._window = INITIAL_WINDOW
        self.receivable = INITIAL_WINDOW
        # Whether the user was there before what was taken last.
        self._was_awaited = False
        self._uncredited = 0

    @property
    def id_on_wire(self) -> int:
        """The stream's id; it has been opened."""
        assert self.stream_id is not None
        return self.stream_id

    def _info(self) -> dict[str, Any]:
        return {"request": self._prepared.request, "stream_id": self.stream_id}

    def _closing_info(self) -> dict[str, Any]:
        return {"stream_id": self.stream_id}

    def _traced_head(self, head: Head) -> Any:
        return (head.status, head.headers)

    # -- The request.

    async def _send_request(self) -> None:
        prepared, tracer = self._prepared, self._tracer
        if self._is_first and tracer is not None:
            info = {"request": prepared.request}
            await traced(tracer, "http2.send_connection_init", info, self._flush)
        headers = request_headers(prepared)
        if prepared.protocol is not None:
            await self._check_extended_connect()
        body = prepared.body
        tunnel = prepared.method == b"CONNECT"
        body_follows = prepared.expects_continue or (
            body is None or len(body) > SMALL_BODY or not self._connection.fits(len(body))
        )
        self._open(headers, b"" if body_follows or body is None else body, end=not (tunnel or body_follows))
        if tracer is None:
            await self._flush()
        else:
            await traced(tracer, self.points.send_request_headers, self._info(), self._flush)
        if body_follows:
            self._to_send = content_length(headers)
            await self._begin_upload(self._send_piece)
        else:
            await self._trace_sent_body()

    def _open(self, headers: HeaderList, body: bytes, *, end: bool) -> None:
        self.stream_id = self._connection.open(self, headers, body, end_stream=end)
        if self.stream_id is None:
            self._failure = (
                _own(self._connection.failure, "before the request was sent")
                if self._connection.will_close
                else RemoteProtocolError("the server takes no more requests on this connection")
            )
            mark_refused(self._failure)
            raise self._failure
        self.sent_end = end

    async def _flush(self) -> None:
        self._connection.flush()
        await self._connection.drained(self._timeouts.write)

    async def _check_extended_connect(self) -> None:
        """RFC 8441, 3: not before the server has said that it takes it."""
        connection = self._connection
        # A server may wait for the connection's first bytes before it says anything.
        connection.flush()
        await timed(self._timeouts.read, ReadTimeout, connection.settings_received.wait)
        if connection.will_close:
            self._failure = _own(connection.failure, "before the request was sent")
            raise self._failure
        if not connection.extended_connect_enabled:
            raise LocalProtocolError(
                "the protocol extension needs a server that takes extended CONNECT (RFC 8441), "
                "which this one does not"
            )

    async def _send_piece(self, piece: memoryview | None) -> None:
        if piece is None:
            await self._end_body()
            return
        if self._to_send is not None:
            if len(piece) > self._to_send:
                raise LocalProtocolError("the content is longer than its Content-Length")
            self._to_send -= len(piece)
        await self.send(piece, end=self._to_send == 0)

    async def _end_body(self) -> None:
        if self._to_send:
            raise LocalProtocolError(f"the content is {self._to_send} bytes shorter than its Content-Length")
        if not self.sent_end:
            await self.send(b"", end=True)

    async def send(self, data: bytes | bytearray | memoryview, *, end: bool = False) -> None:
        """Send data when there is room for it, and maybe the end. A checkpoint only if it has to wait.

        Raises:
            WriteError: The stream has ended.
        """
        connection = self._connection
        data = memoryview(data)
        while data or (end and not self.sent_end):
            self._check_sendable()
            size = min(len(data), connection.room(self.id_on_wire))
            if data and not size:
                await connection.wait_for_progress()
                continue
            last = end and size == len(data)
            self.sent_end = last
            connection.send_data(self.id_on_wire, data[:size], end_stream=last)
            if self._upload is not None:
                self._upload.progressed()
            data = data[size:]
            if data and connection.is_contended():
                await trio.lowlevel.checkpoint()
        if self.sent_end and self.received_end:
            self._finish()

    async def wait_for_room(self) -> None:
        """Wait until there is room for data, or never will be."""
        while not (self.is_over or self._done or self._connection.room(self.id_on_wire)):
            await self._connection.wait_for_progress()

    def _check_sendable(self) -> None:
        if self.is_over or self._done or self._failure is not None or self._connection.will_close:
            raise WriteError(str(self._failure or "the stream was closed"))

    # -- What the connection's reader tells. Nothing here waits.

    def take_block(self, block: HeaderList, *, ends: bool) -> None:
        """A head of whatever kind, or the trailers; the end follows if it `ends` the stream."""
        if self.received_end:
            # The request is still being sent (RFC 9113, 5.1, half-closed (remote)).
            self._reset_code = ErrorCodes.STREAM_CLOSED
            self._finish(clean=False)
            return
        try:
            if self._has_head:
                check_trailers(block, ends=ends)
                self._put(list(block))
            else:
                self._take_head(response_head(block), ends=ends)
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
        self._answered = True
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
        """A piece of the body, and by how much it has used the stream's window."""
        self.receivable -= size
        if self.receivable < 0:
            raise Violation(ErrorCodes.FLOW_CONTROL_ERROR, "the server sent more data than it may")
        if size > len(data):
            # Nobody will take the padding.
            self._credit(size - len(data))
        if not self._has_head:
            self._malformed(RemoteProtocolError("the server sent a body before the response's head"))
        elif self._left is not None and len(data) > self._left:
            self._malformed(RemoteProtocolError("the response's body is longer than its content-length"))
        elif data:
            if self._left is not None:
                self._left -= len(data)
            self._put_data(data)

    def take_end(self) -> None:
        """The end of the response."""
        self.received_end = True
        if self._left:
            self._malformed(RemoteProtocolError(f"the response's body ends {self._left} bytes early"))
            return
        self._put(None)
        if self.sent_end:
            self._finish()

    def take_reset(self, code: int, *, by_server: bool | None) -> None:
        """The stream has been reset."""
        self.is_over = True
        # Lest one that writes to a tunnel waits for a window for ever.
        self._connection.wake_senders()
        if self.received_end:
            # The response is whole, and the server does not want the rest of the request (8.1).
            self._finish(clean=False)
        elif code == ErrorCodes.REFUSED_STREAM:
            self.refused("the server refused the request (REFUSED_STREAM)")
        else:
            # This is an answer, of which nobody knows what the server did before it.
            self._answered = True
            what = "the server reset the stream" if by_server else "the server broke HTTP/2 on the stream"
            self._fail(RemoteProtocolError(f"{what}: {name_of(code)}"))

    def refused(self, reason: str) -> None:
        """The server has promised not to have acted on the request (RFC 9113, 8.7)."""
        self.is_over = True
        failure = RemoteProtocolError(reason)
        mark_refused(failure)
        self._fail(failure)

    def connection_failed(self, failure: ExchangeError) -> None:
        """The connection has ended, and with it the stream."""
        self.is_over = True
        if self.received_end:
            if self._upload is not None:
                self._upload.cancel()
            return
        if not self._answered:
            self._fail(_own(failure, "without a response"))
            return
        # Whatever the connection failed of, here it is reading that does.
        kind = ReadError if isinstance(failure, WriteError) else type(failure)
        self._fail(_own(failure, "in the middle of the response", kind))

    def _malformed(self, failure: RemoteProtocolError) -> None:
        self._answered = True
        if self._reset_code is ErrorCodes.CANCEL:
            self._reset_code = ErrorCodes.PROTOCOL_ERROR
        self._fail(failure)
        self._finish(clean=False)

    def _fail(self, failure: ExchangeError) -> None:
        self._failure = self._failure or failure
        if self._upload is not None:
            self._upload.cancel()
        self._arrived.set()

    def _put(self, item: Head | bytes | bytearray | HeaderList | None) -> None:
        self._inbox.append(item)
        self._arrived.set()

    def _put_data(self, data: bytes) -> None:
        """Join data to what is unread: many tiny pieces would take many times their size in memory."""
        last = self._inbox[-1] if self._inbox else None
        if isinstance(last, bytearray):
            last += data
        elif isinstance(last, bytes):
            self._inbox[-1] = bytearray(last) + data
        else:
            self._put(data)

    # -- Receiving.

    async def _receive(self, timeout: float | None) -> Any:
        if self._failure is not None:
            raise self._failure
        await timed(timeout, ReadTimeout, self._arrived.wait)
        return True

    def _feed(self, data: Any) -> None:
        """What arrives is in the inbox already."""

    async def _next(self) -> Any:
        self._was_awaited = not self._inbox
        while not self._inbox:
            await self._wait()
        return self._inbox.popleft()

    async def _next_head(self) -> Head:
        head: Head = await self._next()
        return head

    async def _receive_response(self) -> Response:
        head = await self._receive_head()
        raw = self._handed_over = self._is_tunnel(head.status)
        if raw:
            self._response_complete = True
            stream = NetworkStream(Tunnel(self, self._connection.stream))
        else:
            stream = self._connection.info
            if self._prepared.method == b"CONNECT":
                self.end_request()
        response = Response(head.status)
        response.headers = head.headers
        response.stream = ResponseBody(self)
        response.extensions = {
            "http_version": head.version,
            "stream_id": self.stream_id,
            "network_stream": stream,
            "trailing_headers": self._trailers,
        }
        return response

    def _is_tunnel(self, status: int) -> bool:
        return self._prepared.method == b"CONNECT" and 200 <= status < 300

    def end_request(self) -> None:
        """Say that nothing more will be sent, where that is still to be said."""
        if not (self.sent_end or self.is_over or self._done):
            self.sent_end = True
            self._connection.send_data(self.id_on_wire, b"", end_stream=True)
            if self.received_end:
                self._finish()

    async def _next_chunk(self, checkpoint: bool) -> bytes | None:
        if self._inbox and checkpoint:
            await trio.lowlevel.checkpoint()
        item = await self._next()
        if isinstance(item, (bytes, bytearray)):
            self._consumed(len(item))
            return bytes(item)
        trailers: HeaderList = []
        while item is not None:
            trailers = item
            item = await self._next()
        self._end_response(trailers)
        return None

    def _consumed(self, size: int) -> None:
        """Let the server send on; if the user was faster than the server, more than before."""
        grows = self._was_awaited and self._window < LARGEST_WINDOW
        if self._credit(size) and grows:
            self._window *= 2
            self._credit(self._window // 2)

    def _credit(self, size: int) -> bool:
        """Open the window by so much, unless it is little or of no use. Whether it was done."""
        self._uncredited += size
        if self.received_end or self.is_over or self._uncredited < self._window // 2:
            return False
        self.receivable += self._uncredited
        self._connection.flush(window_update(self.id_on_wire, self._uncredited))
        self._uncredited = 0
        return True

    # -- The end.

    async def _skip_rest(self) -> None:
        if self.received_end and self._failure is None:
            trailers = next((item for item in self._inbox if isinstance(item, list)), [])
            self._inbox.clear()
            self._end_response(trailers)

    async def _settle(self) -> None:
        if self._handed_over:
            self.end_tunnel()
        else:
            await super()._settle()

    async def receive(self, max_bytes: int | None) -> bytes:
        """Receive some bytes from the other end of a tunnel; none is the end.

        Raises:
            ExchangeError: The stream has failed, or was closed.
        """
        self._was_awaited = not self._inbox
        while True:
            while not self._inbox:
                if self._failure is not None:
                    # A copy, since the traceback of what is raised leads to the exchange.
                    raise copied(self._failure)
                await self._arrived.wait()
            if self._inbox[0] is None:
                return b""
            item = self._inbox.popleft()
            if isinstance(item, (bytes, bytearray)):
                data = bytes(item[:max_bytes])
                if len(data) < len(item):
                    rest = bytearray(item) if isinstance(item, bytes) else item
                    del rest[: len(data)]
                    self._inbox.appendleft(rest)
                self._consumed(len(data))
                return data

    def peek(self) -> Readiness:
        """What the next `receive` would find."""
        if self._inbox:
            return Readiness.CLOSED if self._inbox[0] is None else Readiness.READABLE
        if self._failure is not None or self._connection.transport.peek() is Readiness.CLOSED:
            return Readiness.CLOSED
        return Readiness.QUIET

    def end_tunnel(self) -> None:
        """End a tunnel, by resetting it if the other side has not ended."""
        if not self.was_closed:
            self.was_closed = True
            if self.received_end:
                self.end_request()
            self._finish()
            self._inbox.clear()
            self._fail(ReadError("the stream was closed"))
            self._connection.wake_senders()

    def _is_clean(self) -> bool:
        return self.sent_end and self.received_end

    def _release(self, *, clean: bool) -> None:
        reset = None if clean or self.is_over else self._reset_code
        self.is_over = True
        if not clean:
            # Nothing will arrive for a task that waits, or asks again.
            self._fail(ReadError("the stream was closed"))
        self._connection.leave(self.stream_id, reset)
        if not clean:
            # Lest one that writes to a tunnel waits for a window for ever.
            self._connection.wake_senders()

    def _explain(self, exc: ExchangeError) -> ExchangeError:
        if exc is self._failure and not self._answered:
            mark_unanswered(exc, unsent=self.stream_id is None)
            self._prepared.failure = exc
        return exc


def _own(failure: ExchangeError, when: str, kind: type[ExchangeError] | None = None) -> ExchangeError:
    """A failure of the connection as one exchange's own error."""
    own = (kind or type(failure))(f"{failure}, {when}")
    own.__cause__ = failure.__cause__
    return own
