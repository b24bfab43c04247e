"""HTTP/1.1: a connection, and the stream of one request and its response on it.

Theory of operation. After a response, `release` decides what happens to the connection. If both sides have
ended, the connection can take another request; otherwise it is marked for closing. Ambiguity means closing:
bytes after the response, both a Content-Length and a Transfer-Encoding, or an incomplete request.

*Sending.* The head and a small body go out in one write. An `Upload` sends a body that is large, streamed,
or waits for `100 (Continue)`.

*Receiving.* h11 parses heads, and the bodies that need parsing. A body of known length needs none: it goes
from the stream to the user without h11, which saves a tenth of the cost of a small response and half the
cost of a large one. h11 has then not seen the response's end. Its state for the request's side still tells
whether the connection may persist, and a new `h11.Connection` serves the next exchange.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import h11
import trio

from .._connect.attempt import Established
from .._connect.network_stream import NetworkStream
from .._connect.transport import (
    MAX_PROBES,
    RECEIVE_SIZE,
    TLS_ALERT,
    Readiness,
    WouldBlock,
    explain,
    is_alert,
    poll,
)
from .._exceptions import (
    ExchangeError,
    ExchangeFailed,
    LocalProtocolError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    WriteError,
    WriteTimeout,
    without_frames,
)
from .._fields import HeaderList, Headers
from .._models import Response
from .._timeouts import timed
from .._urls import Origin, with_tls
from .connection import HTTPConnection, Owner, Settings
from .exchange import Exchange
from .http11_errors import explain_received, explain_sent
from .message_stream import CLOSED, OPEN, Head, StreamState, TracePoints
from .request import PreparedRequest, RequestContext

_RESPONSE_BEGINS = b"HTTP/1."
# The number of receives that wait before the next attempt to receive without waiting.
_WAITS = 8


class HTTP11Connection(HTTPConnection):
    """A connection that speaks HTTP/1.1, one exchange at a time."""

    http_version = "HTTP/1.1"

    def __init__(self, established: Established, origin: Origin, settings: Settings, owner: Owner) -> None:
        super().__init__(established, origin, settings, owner)
        self.h11: h11.Connection = self._new_h11()
        self._stream: HTTP11Stream | None = None
        self._last_headers: HeaderList = []
        self._last_head: h11.Request | None = None
        self._waits = 0

    def _is_active(self) -> bool:
        return self._stream is not None

    def _end_exchanges(self) -> None:
        # The exchange outlives the connection until the user closes the response.
        stream, self._stream = self._stream, None
        if stream is not None and stream.stop_sending is not None:
            stream.stop_sending()

    def _new_h11(self) -> h11.Connection:
        return h11.Connection(h11.CLIENT, max_incomplete_event_size=self.settings.max_header_bytes)

    async def exchange(self, context: RequestContext) -> Response:
        """Send a request and receive the head of its response.

        An error or a cancellation marks the connection for closing, unless HTTP/1.1 can't express the
        request at all.
        """
        if context.prepared.protocol is not None:
            self.owner.released(self)
            raise LocalProtocolError("the protocol extension needs HTTP/2, but the connection is HTTP/1.1")
        self.requests += 1
        stream = self._stream = HTTP11Stream(self, context)
        return await Exchange(self, stream, context).start()

    def stream_done(self, *, reusable: bool) -> None:
        """Take note that the stream has ended. The stream calls this once."""
        self._stream = None
        if self._close_requested.is_set():
            return
        if reusable:
            if self.h11.their_state is h11.DONE:
                self.h11.start_next_cycle()
            else:
                self.h11 = self._new_h11()
            self.owner.released(self)
        else:
            self.close_soon()

    def readiness(self) -> Readiness:
        """Check the idle connection without waiting."""
        readiness = poll(self.stream)
        if readiness is Readiness.READABLE and self._plain and self.transport.below is None:
            # A server may send nothing before a request. With TLS below, it may be TLS records only.
            return Readiness.CLOSED
        return readiness

    def decline(self) -> None:
        """Return a grant because the connection is dead."""
        self.close_soon()

    async def still_open(self) -> bool:
        """Check that only harmless TLS records have arrived on an idle TLS connection.

        Session tickets (RFC 8446, 4.6.1) may come at any time. A closure or data makes the connection
        unusable.
        """
        try:
            await self.receive_available()
        except WouldBlock:
            return True
        except ReadError:
            pass
        return False

    def encode_head(self, prepared: PreparedRequest) -> bytes:
        """Encode the head of a request."""
        # Consecutive requests on a connection often have the same head, or at least the same headers.
        # h11 does not check again what it has already checked.
        headers: Any = prepared.headers
        last = self._last_head
        if last is not None and headers == self._last_headers:
            if last.target == prepared.target and last.method == prepared.method:
                return _to_wire(self.h11, last, prepared)
            headers = last.headers
        # h11's checks can't fail here: preparing the request has already made them.
        self._last_head = h11.Request(method=prepared.method, target=prepared.target, headers=headers)
        self._last_headers = prepared.headers
        return _to_wire(self.h11, self._last_head, prepared)

    async def receive(self, timeout: float | None) -> bytes:
        """Wait for data. Return `b""` at the end of the stream.

        Raises:
            ReadTimeout: No data came within `timeout` seconds.
            ReadError: The connection broke or was closed.
        """
        try:
            if not self._plain:
                return bytes(await timed(timeout, ReadTimeout, self.stream.receive_some, RECEIVE_SIZE))
            # In a busy program the response has often arrived once other tasks have run, and a receive
            # without waiting is much cheaper than a wait. After a miss, `_WAITS` receives (this one
            # included) wait directly, since each further miss would only add its cost.
            if not self._waits:
                await trio.lowlevel.checkpoint()
                data = self.transport.receive_nowait(RECEIVE_SIZE)
                if data is not None:
                    return data
                self._waits = _WAITS
            self._waits -= 1
            return await timed(timeout, ReadTimeout, self.transport.receive_later, RECEIVE_SIZE)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ReadError(explain(exc)) from exc

    async def receive_available(self) -> bytes:
        """Receive data without waiting.

        Raises:
            WouldBlock: No data has arrived.
            ReadError: The connection broke or was closed.
        """
        self.transport.probing = MAX_PROBES
        try:
            return bytes(await self.stream.receive_some(RECEIVE_SIZE))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ReadError(explain(exc)) from exc
        finally:
            self.transport.probing = 0

    async def send(self, data: bytes | memoryview, timeout: float | None) -> None:
        """Send all of `data`. This is a checkpoint only if it has to wait.

        Raises:
            WriteTimeout: The transport did not accept all of `data` within `timeout` seconds.
            WriteError: The connection broke or was closed.
        """
        try:
            if self._plain:
                sent = self.transport.send_nowait(data)
                if sent == len(data):
                    return
                data = memoryview(data)[sent:]
            await timed(timeout, WriteTimeout, self.stream.send_all, data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise WriteError(explain(exc)) from exc
        if self.transport.send_error is not None:
            raise WriteError(str(self.transport.send_error)) from self.transport.send_error


_END = h11.EndOfMessage()


def _to_wire(connection: h11.Connection, event: h11.Event, prepared: PreparedRequest) -> bytes:
    try:
        return connection.send(event) or b""
    except h11.LocalProtocolError as exc:
        raise LocalProtocolError(explain_sent(str(exc), prepared.headers)) from exc


class HTTP11Stream:
    """One request and its response over HTTP/1.1; see `MessageStream`.

    Args:
        connection: The connection that carries the stream.
        context: The request.
    """

    trace_points = TracePoints("http11", tuple)

    def __init__(self, connection: HTTP11Connection, context: RequestContext) -> None:
        self.state: StreamState = OPEN
        self.answered: bool = False
        self.released: bool = False
        self.ends_connection: bool = False
        self.trailers: HeaderList = []
        self.stop_sending: Callable[[], None] | None = None
        self._connection = connection
        self._context = context
        self._prepared = context.prepared
        self._h11 = connection.h11
        # Sending. A write error does not end the exchange, since the server may still have answered.
        self._to_send = b""
        self._sent_before = connection.transport.bytes_sent
        self._write_error: WriteError | None = None
        # Receiving a head: the number of bytes since the last accepted head, and these bytes. `_head` is
        # None after the final head.
        self._received = 0
        self._head: list[bytes] | None = []
        # The next event, once h11 was asked for it: `h11.NEED_DATA` if it is incomplete.
        self._event: Any = None
        # The explanation of h11's error, kept because h11 gives the reason only once.
        self._violation = ""
        # A body of known length: the number of bytes to come, and the bytes that came with the head.
        self._left: int | None = None
        self._buffered = b""
        # Some proxies can't parse a further request after a CONNECT that they refused.
        self._may_reuse = context.prepared.method != b"CONNECT"

    @property
    def failed(self) -> bool:
        """Always False: a failure closes the connection, and `will_close` shows that."""
        return False

    @property
    def trace_info(self) -> dict[str, Any]:
        """Always empty: a connection has one stream at a time."""
        return {}

    # -- The request.

    async def prepare(self, content: bytes | None) -> bool:
        """Encode the head, with the content if it is small."""
        data = self._connection.encode_head(self._prepared)
        if content is None:
            self._to_send = data
            return False
        if content:
            data += _to_wire(self._h11, h11.Data(data=content), self._prepared)
        self._to_send = data + _to_wire(self._h11, _END, self._prepared)
        return True

    async def send_head(self) -> None:
        """Send the head. Keep a write error for later, since the server may still have answered."""
        # The pool has just checked a reused connection. Only trace handlers, which may take any time, are
        # awaited between that check and this call.
        if self._connection.requests == 1:
            await self._receive_early()
        elif self._context.tracer is not None:
            await self._check_still_usable()
        try:
            await self._connection.send(self._to_send, self._context.timeouts.write)
        except WriteError as exc:
            self._write_error = without_frames(exc)
        else:
            if self._h11.our_state is not h11.SEND_BODY:
                self.state = self.state.after_local_end()
        self._to_send = b""

    async def _receive_early(self) -> None:
        """Receive data that the server has sent on a new connection before the request.

        The data counts as the response: a server may refuse a connection with an HTTP response (408, 503)
        without reading from it. The response to this request could then be mistaken for the response to
        the next one, so the connection is not reused.
        """
        connection = self._connection
        if poll(connection.stream) is not Readiness.READABLE:
            return
        try:
            data = await connection.receive_available()
        except WouldBlock:
            return
        except ReadError as exc:
            raise self._failure(exc) from None
        self._may_reuse = False
        self._feed(data)

    async def _check_still_usable(self) -> None:
        """Raise if the reused connection was closed or has received unsolicited data."""
        connection = self._connection
        readiness = connection.readiness()
        if readiness is Readiness.READABLE and await connection.still_open():
            readiness = Readiness.QUIET
        # TLS may have sent records in answer to what was read (RFC 8446, 4.6).
        self._sent_before = connection.transport.bytes_sent
        if readiness is not Readiness.QUIET:
            raise self._failure(
                RemoteProtocolError(
                    "before the request was sent, the server closed the idle connection "
                    "or sent unsolicited data"
                )
            )

    def check_open(self) -> None:
        """Raise `ExchangeFailed` if the connection was closed."""
        if self._connection.will_close:
            raise self._failure(WriteError("the connection was closed"))

    async def send_data(self, data: memoryview) -> int:
        """Send all of `data`."""
        body: Any = data  # h11 accepts any bytes-like object.
        await self._send_event(h11.Data(data=body))
        return len(data)

    async def send_end(self) -> None:
        """Send the end of the request."""
        await self._send_event(_END)
        self.state = self.state.after_local_end()

    async def _send_event(self, event: h11.Event) -> None:
        data = _to_wire(self._h11, event, self._prepared)
        if data:
            await self._connection.send(data, None)

    # -- Receiving.

    def has_arrived(self) -> bool:
        """Return whether the next receive completes without waiting."""
        if self._left is not None:
            return not self._left or bool(self._buffered)
        # Before the first bytes h11 has no event: a connection is reused only with an empty h11 buffer.
        if self._event is None and self.answered:
            self._event = self._take_event()
        return self._event is not None and self._event is not h11.NEED_DATA

    async def wait_until_answered(self, timeout: float | None) -> None:
        """Wait for the first bytes of the response."""
        while not self.answered:
            self._feed(await self._receive(timeout))

    async def _receive(self, timeout: float | None) -> bytes:
        try:
            return await self._connection.receive(timeout)
        except ReadError as exc:
            if self.answered:
                raise
            raise self._failure(exc) from None

    async def _next_event(self, timeout: float | None) -> Any:
        while not self.has_arrived():
            self._feed(await self._receive(timeout))
        event, self._event = self._event, None
        return event

    def _feed(self, data: bytes) -> None:
        if self._head is not None:
            if not data:
                raise self._failure(
                    RemoteProtocolError(
                        "the server closed the connection in the middle of the response's head"
                        if self.answered
                        else "the server closed the connection without sending a response"
                    )
                )
            self._head.append(data)
        self.answered = True
        self._count(data)
        self._h11.receive_data(data)
        self._event = None

    def _count(self, data: bytes) -> None:
        """Count received bytes of a head. Raise early if they are not HTTP, since no head might ever end."""
        if not data.startswith(_RESPONSE_BEGINS[self._received : self._received + len(data)]):
            secure = with_tls(self._connection.origin)
            if secure is not None and TLS_ALERT.startswith(data[:2]):
                said = f"the server does not speak HTTP/1 on this port, but TLS (use {secure})"
            else:
                said = f"the server does not speak HTTP/1: it sent {data[:20]!r}"
            raise RemoteProtocolError(said)
        self._received += len(data)

    def _take_event(self) -> Any:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as exc:
            if not self._violation:
                limit = self._connection.settings.max_header_bytes
                self._violation = explain_received(str(exc), b"".join(self._head or ()), limit)
            # The frames of h11's traceback refer to the h11 connection.
            raise RemoteProtocolError(self._violation) from without_frames(exc)

    # -- The response's head.

    async def receive_head(self, timeout: float | None) -> Head:
        """Receive the next head, interim or final."""
        event = await self._next_event(timeout)
        self._check_head_size()
        headers = event.headers.raw_items()
        if event.status_code < 200 and event.status_code != 101:
            self._frame_body(event.status_code, headers)
            rest = self._h11.trailing_data[0]
            self._received = 0
            self._count(rest)
            self._head = [rest]
        else:
            self._head = None
        return Head(b"HTTP/" + event.http_version, event.status_code, event.reason, Headers(headers))

    def _check_head_size(self) -> None:
        """Enforce the limit exactly: h11 does not check a head that arrives complete in one piece."""
        limit = self._connection.settings.max_header_bytes
        if self._received > limit:
            rest = len(self._h11.trailing_data[0])
            if self._received - rest > limit:
                raise RemoteProtocolError(f"the response's head is larger than {limit} bytes")

    def extensions(self, head: Head) -> dict[str, Any]:
        """Return the reason phrase, which HTTP/2 does not have."""
        return {"reason_phrase": head.reason}

    def hand_over(self, head: Head) -> NetworkStream:
        """Return the connection's stream, starting with the bytes that came after the head."""
        if self._h11.our_state is not h11.SWITCHED_PROTOCOL:
            # The rest of the request must not mix with the data that the stream's user sends.
            raise RemoteProtocolError(f"the server answered {head.status} before the request was sent whole")
        return self._connection.raw_stream(self._h11.trailing_data[0])

    def begin_body(self, head: Head) -> None:
        """Determine the framing of the body."""
        self._frame_body(head.status, head.headers)

    def _frame_body(self, status: int, headers: HeaderList) -> None:
        """Determine whether the body is of known length (RFC 9112, 6.3)."""
        length, coded = None, False
        for name, value in headers:
            match name.lower():
                case b"content-length":
                    length = int(value)
                case b"transfer-encoding":
                    coded = True
        if status < 200 or status == 204:
            # These responses have no body and must not announce one (RFC 9110, 8.6; RFC 9112, 6.1). A
            # server that announces one may also send it, and it must not be parsed as the next response.
            self._may_reuse = self._may_reuse and not (length or coded)
        elif coded:
            # A Content-Length beside it may be an attempt at smuggling (RFC 9112, 6.3).
            self._may_reuse = self._may_reuse and length is None
        elif length is not None and self._prepared.method != b"HEAD" and status != 304:
            self._left = length
            self._buffered = self._h11.trailing_data[0]

    # -- The response's body.

    async def receive_data(self, timeout: float | None) -> bytes | None:
        """Receive a chunk of the body, or None at its end."""
        left = self._left
        if left is not None:
            if left:
                return self._take(left, self._take_buffered() or await self._receive(timeout))
            self._end_response([])
            return None
        event = await self._next_event(timeout)
        if isinstance(event, h11.Data):
            return bytes(event.data)
        self._end_response(event.headers.raw_items())
        return None

    def _take_buffered(self) -> bytes:
        data, self._buffered = self._buffered, b""
        return data

    def _take(self, left: int, data: bytes) -> bytes:
        """Count data as part of a body of which `left` bytes are still to come."""
        if not data:
            raise RemoteProtocolError(
                f"the server closed the connection {left} bytes before the end of the body"
            )
        if len(data) > left:
            self._may_reuse = False
            data = data[:left]
        self._left = left - len(data)
        return data

    def _end_response(self, trailers: HeaderList) -> None:
        self.trailers = trailers
        self.state = self.state.after_remote_end()

    # -- The end.

    async def discard_rest(self) -> bool:
        """Discard the rest of the body if it has arrived and takes at most one more receive."""
        with contextlib.suppress(WouldBlock, ReadError, RemoteProtocolError):
            if self._left is None:
                return await self._discard_parsed()
            if self._left and self._buffered:
                self._take(self._left, self._take_buffered())
            if self._left:
                self._take(self._left, await self._connection.receive_available())
            if not self._left:
                self._end_response([])
                return True
        return False

    async def _discard_parsed(self) -> bool:
        event = self._skip_data()
        if event is h11.NEED_DATA:
            self._feed(await self._connection.receive_available())
            event = self._skip_data()
        if not isinstance(event, h11.EndOfMessage):
            return False
        self._end_response(event.headers.raw_items())
        return True

    def _skip_data(self) -> Any:
        event, self._event = self._event, None
        while event is None or isinstance(event, h11.Data):
            event = self._take_event()
        return event

    def release(self, *, reusable: bool) -> bool:
        """Release the connection, for reuse if both sides finished cleanly."""
        if not self.released:
            self.released = True
            clean = reusable and self._is_clean()
            self._connection.stream_done(reusable=clean)
            self.ends_connection = self._connection.will_close
            return clean
        return True

    def _is_clean(self) -> bool:
        if self.state is not CLOSED or not self._may_reuse or self._write_error is not None:
            return False
        # h11 is in MUST_CLOSE instead if the request asked for the connection's end.
        if self._h11.our_state is not h11.DONE:
            return False
        if self._left is not None:
            return not self._buffered
        # h11 has seen neither bytes after the response nor the end of the stream.
        return self._h11.their_state is h11.DONE and self._h11.trailing_data == (b"", False)

    # -- Errors.

    def _failure(self, error: ExchangeError) -> ExchangeError | ExchangeFailed:
        """Return the exception to raise for an error of the network or the server."""
        if self.answered:
            return error
        unsent = self._connection.transport.bytes_sent == self._sent_before
        return ExchangeFailed(error, unanswered=True, unsent=unsent)

    def explain(self, error: ExchangeError, write_error: WriteError | WriteTimeout | None) -> ExchangeError:
        """Choose the error that best explains why no response began."""
        # A TLS alert explains more than the write error that followed it.
        return error if is_alert(error.__cause__) else write_error or self._write_error or error
