"""HTTP/1.1: a connection, and one exchange of a request and a response on it.

Theory of operation. After a response `_is_clean` decides about the connection: either both sides are done
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
from .._timeouts import Timeouts, timed
from .._trace import Tracer, traced
from .._urls import Origin, with_tls
from .connection import HTTPConnection, Owner, Settings
from .exchange import SMALL_BODY, Exchange, Head, ResponseBody, TracePoints
from .http11_errors import explain_received, explain_sent
from .request import PreparedRequest
from .retry import mark_unanswered

_RESPONSE_BEGINS = b"HTTP/1."
# How often an answer is waited for before it is looked for again without waiting.
_WAITS = 8


class HTTP11Connection(HTTPConnection):
    """A connection that speaks HTTP/1.1, one exchange at a time."""

    http_version = "HTTP/1.1"

    def __init__(self, established: Established, origin: Origin, settings: Settings, owner: Owner) -> None:
        super().__init__(established, origin, settings, owner)
        self.h11: h11.Connection = self._new_h11()
        self._exchange: HTTP11Exchange | None = None
        self._last_headers: HeaderList = []
        self._last_head: h11.Request | None = None
        self._waits = 0

    def _is_active(self) -> bool:
        return self._exchange is not None

    def _end_exchanges(self) -> None:
        # What the user does with the response no longer concerns the connection.
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.connection_closes()

    def _new_h11(self) -> h11.Connection:
        return h11.Connection(h11.CLIENT, max_incomplete_event_size=self.settings.max_header_bytes)

    async def exchange(
        self, prepared: PreparedRequest, timeouts: Timeouts, tracer: Tracer | None
    ) -> Response:
        """Send a request and receive the head of its response.

        When it raises, or is cancelled, the connection is marked for closing, unless the request can't
        be made over HTTP/1.1 at all.
        """
        if prepared.protocol is not None:
            self.owner.released(self)
            raise LocalProtocolError("the protocol extension needs HTTP/2, but the connection is HTTP/1.1")
        self.requests += 1
        self._exchange = HTTP11Exchange(self, prepared, timeouts, tracer)
        return await self._exchange.start()

    def exchange_done(self, *, reusable: bool) -> None:
        """The exchange has ended. Called by it, once."""
        self._exchange = None
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


class HTTP11Exchange(Exchange[HTTP11Connection]):
    """One request and its response over HTTP/1.1."""

    points = TracePoints("http11")

    def __init__(
        self,
        connection: HTTP11Connection,
        prepared: PreparedRequest,
        timeouts: Timeouts,
        tracer: Tracer | None,
    ) -> None:
        super().__init__(connection, prepared, timeouts, tracer)
        self._h11 = connection.h11
        self._sent_before = connection.transport.bytes_sent
        # How many bytes were received since the last head that was accepted, and those of the next head.
        self._received = 0
        self._head: list[bytes] = []
        # What is wrong with the response: h11 says it only once.
        self._violation = ""
        self._pending: Any = None
        # After a CONNECT that they refused, some proxies don't understand what follows.
        self._may_reuse = prepared.method != b"CONNECT"
        # A body of known length: how much is still to come, and what came together with the head.
        self._left: int | None = None
        self._buffered = b""

    def connection_closes(self) -> None:
        """The connection has been marked for closing under way."""
        if self._upload is not None:
            self._upload.cancel()

    # -- The request.

    async def _send_request(self) -> None:
        prepared, tracer = self._prepared, self._tracer
        info = {"request": prepared.request}
        data = self._connection.encode_head(prepared)
        body_follows = prepared.expects_continue or (prepared.body is None or len(prepared.body) > SMALL_BODY)
        if not body_follows:
            if prepared.body:
                data += _to_wire(self._h11, h11.Data(data=prepared.body), prepared)
            data += _to_wire(self._h11, _END, prepared)
        await traced(tracer, self.points.send_request_headers, info, self._send_or_note, data)
        if not body_follows:
            await self._trace_sent_body()
        else:
            await self._begin_upload(self._send_piece)

    async def _send_piece(self, piece: memoryview | None) -> None:
        body: Any = piece  # h11 takes whatever is like bytes.
        data = _to_wire(self._h11, _END if piece is None else h11.Data(data=body), self._prepared)
        if data:
            await self._connection.send(data, None)

    async def _send_or_note(self, data: bytes) -> None:
        """Send; where the connection breaks, the server's answer may be there all the same."""
        # The pool has checked a reused connection without an await since, other than for trace handlers,
        # which may take any time.
        if self._connection.requests == 1:
            await self._receive_early()
        elif self._tracer is not None:
            await self._check_still_usable()
        try:
            await self._connection.send(data, self._timeouts.write)
        except WriteError as exc:
            self._write_error = without_frames(exc)

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
            self._failure = exc
            raise
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
            self._failure = RemoteProtocolError(
                "before the request was sent, the server closed the idle connection or sent unsolicited data"
            )
            raise self._failure

    # -- Receiving.

    async def _receive(self, timeout: float | None) -> bytes:
        try:
            return await self._connection.receive(timeout)
        except ReadError as exc:
            self._failure = exc
            raise

    async def _next_event(self) -> Any:
        # A connection is reused only with nothing left in h11's buffer, so there is no need to ask.
        event = self._take_event() if self._answered else h11.NEED_DATA
        while event is h11.NEED_DATA:
            data = await self._wait()
            if data is not None:
                self._feed(data)
                event = self._take_event()
        return event

    def _feed(self, data: bytes) -> None:
        if not data and not self._response_begun:
            self._failure = RemoteProtocolError(
                "the server closed the connection in the middle of the response's head"
                if self._answered
                else "the server closed the connection without sending a response"
            )
            raise self._failure
        self._answered = True
        self._count(data)
        if not self._response_begun:
            self._head.append(data)
        self._h11.receive_data(data)

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
                self._violation = explain_received(str(exc), b"".join(self._head), limit)
            # h11 raises it in a method of its own, so that its traceback leads back to it.
            raise RemoteProtocolError(self._violation) from without_frames(exc)

    # -- The response's head.

    async def _next_head(self) -> Head:
        event = await self._next_event()
        self._check_head_size()
        headers = event.headers.raw_items()
        if event.status_code < 200 and event.status_code != 101:
            self._frame_body(event.status_code, headers)
            rest = self._h11.trailing_data[0]
            self._received = 0
            self._count(rest)
            self._head = [rest]
        else:
            self._head = []
        return Head(b"HTTP/" + event.http_version, event.status_code, event.reason, Headers(headers))

    def _check_head_size(self) -> None:
        """Hold the limit exactly: h11 does not, for a head that arrives together with its end."""
        limit = self._connection.settings.max_header_bytes
        if self._received > limit:
            rest = len(self._h11.trailing_data[0])
            if self._received - rest > limit:
                raise RemoteProtocolError(f"the response's head is larger than {limit} bytes")

    async def _receive_response(self) -> Response:
        head = await self._receive_head()
        status = head.status
        self._handed_over = status == 101 or (self._prepared.method == b"CONNECT" and status < 300)
        if self._handed_over:
            await self._complete_request(status)
        return self._to_response(head)

    async def _complete_request(self, status: int) -> None:
        """Nothing of the request may get between what the stream's user sends."""
        if self._upload is not None:
            # The last bytes may have been sent, but their sending not have returned yet.
            await self._let_end(self._upload)
        if self._h11.our_state is not h11.SWITCHED_PROTOCOL:
            raise RemoteProtocolError(f"the server answered {status} before the request was sent whole")

    def _to_response(self, head: Head) -> Response:
        version, status, reason, headers = head
        raw = self._handed_over
        if raw:
            self._response_complete = True
        else:
            self._frame_body(status, headers)
        response = Response(status)
        response.headers = headers
        response.stream = ResponseBody(self)
        response.extensions = {
            "http_version": version,
            "reason_phrase": reason,
            "network_stream": self._network_stream(raw),
            "trailing_headers": self._trailers,
        }
        return response

    def _network_stream(self, raw: bool) -> NetworkStream:
        if not raw:
            return self._connection.info
        # The bytes beyond HTTP are its user's.
        return self._connection.raw_stream(self._h11.trailing_data[0])

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

    async def _next_chunk(self, checkpoint: bool) -> bytes | None:
        if self._left is None:
            return await self._read_parsed(checkpoint)
        return await self._read_directly(self._left, checkpoint)

    async def _read_directly(self, left: int, checkpoint: bool) -> bytes | None:
        if left and not self._buffered:
            received = None
            while received is None:
                received = await self._wait()
            return self._take(left, received)
        # What is here was received before, so that this has to be the checkpoint.
        if checkpoint:
            await trio.lowlevel.checkpoint()
        if not left:
            self._end_response([])
            return None
        return self._take(left, self._take_buffered())

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

    async def _read_parsed(self, checkpoint: bool) -> bytes | None:
        if self._pending is None:
            self._pending = self._take_event()
        if self._pending is h11.NEED_DATA:
            self._pending = None
            event = await self._next_event()
        else:
            if checkpoint:
                await trio.lowlevel.checkpoint()
            event, self._pending = self._pending, None
        if isinstance(event, h11.Data):
            return bytes(event.data)
        self._end_response(event.headers.raw_items())
        return None

    # -- The end.

    async def _skip_rest(self) -> None:
        """Read the rest of the body if it has arrived, and is little."""
        with contextlib.suppress(WouldBlock, ReadError, RemoteProtocolError):
            if self._left is None:
                await self._skip_parsed()
                return
            if self._left and self._buffered:
                self._take(self._left, self._take_buffered())
            if self._left:
                self._take(self._left, await self._connection.receive_available())
            if not self._left:
                self._end_response([])

    async def _skip_parsed(self) -> None:
        event = self._skip_data()
        if event is h11.NEED_DATA:
            self._feed(await self._connection.receive_available())
            event = self._skip_data()
        if isinstance(event, h11.EndOfMessage):
            self._end_response(event.headers.raw_items())

    def _skip_data(self) -> Any:
        event, self._pending = self._pending, None
        while event is None or isinstance(event, h11.Data):
            event = self._take_event()
        return event

    def _release(self, *, clean: bool) -> None:
        self._connection.exchange_done(reusable=clean)
        self._was_last = self._connection.will_close

    def _is_clean(self) -> bool:
        if not (self._may_reuse and self._response_complete and self._h11.our_state is h11.DONE):
            return False
        # h11 is done when it has given out the request's last bytes, which is before they are sent.
        if self._write_error is not None or (self._upload is not None and not self._upload.succeeded):
            return False
        if self._left is not None:
            return not self._buffered
        # Neither bytes beyond the response, nor the connection's end.
        return self._h11.their_state is h11.DONE and self._h11.trailing_data == (b"", False)

    def _explain(self, exc: ExchangeError) -> ExchangeError:
        if self._answered or exc is not self._failure:
            return exc
        # An alert says more than that sending failed after it.
        error = exc if is_alert(exc.__cause__) else self._write_error or exc
        self._write_error = None
        mark_unanswered(error, unsent=self._connection.transport.bytes_sent == self._sent_before)
        self._prepared.failure = error
        return error
