"""HTTP/1.1: a connection, and the stream of one request and its response on it.

Theory of operation. After a response `release` decides about the connection: either both sides have ended
and the connection can take another request, or it is marked for closing. Whatever is ambiguous (bytes
after the response, both lengths, a request that was not sent whole) means closing.

*Sending.* Head and small body go out in one write. A body that is large, streamed, or waits for
`100 (Continue)` is sent by an `Upload`, see there.

*Receiving.* h11 parses heads, and bodies that have to be parsed. A body of known length has not, and is
passed from the stream to the user past h11, which saves a small response a tenth of its cost and a large
one half. h11 has then not seen the response's end, but tells by the state of the request's side whether
the connection may persist, and another `h11.Connection` takes over for the next exchange.
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
# How often an answer is waited for before it is looked for again without waiting.
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
        # The exchange goes on without the connection until its user closes the response.
        stream, self._stream = self._stream, None
        if stream is not None and stream.stop_sending is not None:
            stream.stop_sending()

    def _new_h11(self) -> h11.Connection:
        return h11.Connection(h11.CLIENT, max_incomplete_event_size=self.settings.max_header_bytes)

    async def exchange(self, context: RequestContext) -> Response:
        """Send a request and receive the head of its response.

        When it raises, or is cancelled, the connection is marked for closing, unless the request can't
        be made over HTTP/1.1 at all.
        """
        if context.prepared.protocol is not None:
            self.owner.released(self)
            raise LocalProtocolError("the protocol extension needs HTTP/2, but the connection is HTTP/1.1")
        self.requests += 1
        stream = self._stream = HTTP11Stream(self, context)
        return await Exchange(self, stream, context).start()

    def stream_done(self, *, reusable: bool) -> None:
        """The stream has ended. Called by it, once."""
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
        """What is known about the idle connection without waiting."""
        readiness = poll(self.stream)
        if readiness is Readiness.READABLE and self._plain and self.transport.below is None:
            # Nothing may come before a request was sent. Of TLS below a proxy this is not sure to be data.
            return Readiness.CLOSED
        return readiness

    def decline(self) -> None:
        """Give back a grant: the connection is dead."""
        self.close_soon()

    async def still_open(self) -> bool:
        """Whether what has arrived on an idle TLS connection is harmless.

        Session tickets (RFC 8446, 4.6.1) may come at any time; a closing or data may not.
        """
        try:
            await self.receive_available()
        except WouldBlock:
            return True
        except ReadError:
            pass
        return False

    def encode_head(self, prepared: PreparedRequest) -> bytes:
        """The head of a request on the wire."""
        # On one connection a request's head, or at least its headers, are often those of the request
        # before, and h11 takes what it has checked as it is.
        headers: Any = prepared.headers
        last = self._last_head
        if last is not None and headers == self._last_headers:
            if last.target == prepared.target and last.method == prepared.method:
                return _to_wire(self.h11, last, prepared)
            headers = last.headers
        # It finds nothing that was not found when the request was prepared.
        self._last_head = h11.Request(method=prepared.method, target=prepared.target, headers=headers)
        self._last_headers = prepared.headers
        return _to_wire(self.h11, self._last_head, prepared)

    async def receive(self, timeout: float | None) -> bytes:
        """Wait for data; none is the end.

        Raises:
            ReadTimeout: None came within `timeout` seconds.
            ReadError: The connection broke, or was closed.
        """
        try:
            if not self._plain:
                return bytes(await timed(timeout, ReadTimeout, self.stream.receive_some, RECEIVE_SIZE))
            # In a busy program the answer has often come by the time that others have had their turn, and
            # asking for it is much cheaper than waiting for it. Where it had not, it is not tried again
            # at once, as it would cost the more.
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
        """Receive without waiting.

        Raises:
            WouldBlock: Nothing is there.
            ReadError: The connection broke, or was closed.
        """
        self.transport.probing = MAX_PROBES
        try:
            return bytes(await self.stream.receive_some(RECEIVE_SIZE))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ReadError(explain(exc)) from exc
        finally:
            self.transport.probing = 0

    async def send(self, data: bytes | memoryview, timeout: float | None) -> None:
        """Send everything. It is a checkpoint only if it has to wait.

        Raises:
            WriteTimeout: Not everything was accepted within `timeout` seconds.
            WriteError: The connection broke, or was closed.
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
        connection: What it runs on.
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
        # Sending. An error does not end the exchange, since the server may have answered all the same.
        self._to_send = b""
        self._sent_before = connection.transport.bytes_sent
        self._write_error: WriteError | None = None
        # Receiving a head: how many bytes since the last head that was accepted, and these bytes; None
        # after the final head.
        self._received = 0
        self._head: list[bytes] | None = []
        # The next event if it was looked for; `h11.NEED_DATA` if it has not arrived.
        self._event: Any = None
        # What is wrong with the response: h11 says it only once.
        self._violation = ""
        # A body of known length: how much is still to come, and what came together with the head.
        self._left: int | None = None
        self._buffered = b""
        # After a CONNECT that they refused, some proxies don't understand what follows.
        self._may_reuse = context.prepared.method != b"CONNECT"

    @property
    def failed(self) -> bool:
        """A failure closes the connection, so that there is no other sign of it."""
        return False

    @property
    def trace_info(self) -> dict[str, Any]:
        """Nothing: a connection has one stream at a time."""
        return {}

    # -- The request.

    async def prepare(self, content: bytes | None) -> bool:
        """Make the head, with the content if it is small."""
        data = self._connection.encode_head(self._prepared)
        if content is None:
            self._to_send = data
            return False
        if content:
            data += _to_wire(self._h11, h11.Data(data=content), self._prepared)
        self._to_send = data + _to_wire(self._h11, _END, self._prepared)
        return True

    async def send_head(self) -> None:
        """Send the head; where the connection breaks, the server's answer may be there all the same."""
        # The pool has checked a reused connection without an await since, other than for trace handlers,
        # which may take any time.
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
        """Receive what the server has sent on a new connection before the request.

        It is taken for the response: a server may refuse a connection in HTTP (408, 503) without reading
        from it. A response to the request may still follow and be taken for the next one's, so there is no
        next request on this connection.
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
        """Refuse to send on a pooled connection that was closed, or on which unsolicited data has arrived."""
        connection = self._connection
        readiness = connection.readiness()
        if readiness is Readiness.READABLE and await connection.still_open():
            readiness = Readiness.QUIET
        # Reading may have made TLS send something (RFC 8446, 4.6).
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
        body: Any = data  # h11 takes whatever is like bytes.
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
        """Whether the next receive need not wait."""
        if self._left is not None:
            return not self._left or bool(self._buffered)
        # A connection is reused only with nothing left in h11's buffer, so there is no need to ask.
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
        """Take note of bytes received, and refuse what is not HTTP: it may never end as a head does."""
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
            # h11 raises it in a method of its own, so that its traceback leads back to it.
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
        """Hold the limit exactly: h11 does not, for a head that arrives together with its end."""
        limit = self._connection.settings.max_header_bytes
        if self._received > limit:
            rest = len(self._h11.trailing_data[0])
            if self._received - rest > limit:
                raise RemoteProtocolError(f"the response's head is larger than {limit} bytes")

    def extensions(self, head: Head) -> dict[str, Any]:
        """The reason phrase, which HTTP/2 does not have."""
        return {"reason_phrase": head.reason}

    def hand_over(self, head: Head) -> NetworkStream:
        """The connection's stream, beginning with the bytes that came after the head."""
        if self._h11.our_state is not h11.SWITCHED_PROTOCOL:
            # Nothing of the request may get between what the stream's user sends.
            raise RemoteProtocolError(f"the server answered {head.status} before the request was sent whole")
        return self._connection.raw_stream(self._h11.trailing_data[0])

    def begin_body(self, head: Head) -> None:
        """Find out how the body ends."""
        self._frame_body(head.status, head.headers)

    def _frame_body(self, status: int, headers: HeaderList) -> None:
        """Find out whether the body is of known length (RFC 9112, 6.3)."""
        length, coded = None, False
        for name, value in headers:
            match name.lower():
                case b"content-length":
                    length = int(value)
                case b"transfer-encoding":
                    coded = True
        if status < 200 or status == 204:
            # These have no body and may not announce one (RFC 9110, 8.6; RFC 9112, 6.1). A server that
            # does may send it all the same, and it must not be taken for the next response.
            self._may_reuse = self._may_reuse and not (length or coded)
        elif coded:
            # With both an attempt at smuggling, or a server that can't be understood.
            self._may_reuse = self._may_reuse and length is None
        elif length is not None and self._prepared.method != b"HEAD" and status != 304:
            self._left = length
            self._buffered = self._h11.trailing_data[0]

    # -- The response's body.

    async def receive_data(self, timeout: float | None) -> bytes | None:
        """Receive a piece of the body, None for its end."""
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
        """Count data as part of a body of which `left` bytes are to come."""
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
        """Drop the rest of the body if it has arrived, and is little: at most one more receive."""
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
        # It is another state where the request asks for the connection's end.
        if self._h11.our_state is not h11.DONE:
            return False
        if self._left is not None:
            return not self._buffered
        # Neither bytes beyond the response, nor the connection's end.
        return self._h11.their_state is h11.DONE and self._h11.trailing_data == (b"", False)

    # -- Errors.

    def _failure(self, error: ExchangeError) -> ExchangeError | ExchangeFailed:
        """The exception to raise for an error of the network or the server."""
        if self.answered:
            return error
        unsent = self._connection.transport.bytes_sent == self._sent_before
        return ExchangeFailed(error, unanswered=True, unsent=unsent)

    def explain(self, error: ExchangeError, write_error: WriteError | WriteTimeout | None) -> ExchangeError:
        """Choose the error that says most about why no response began."""
        # An alert says more than that sending failed after it.
        return error if is_alert(error.__cause__) else write_error or self._write_error or error
