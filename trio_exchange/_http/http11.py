"""HTTP/1.1: a connection, and the stream of one request and its response on it.

Theory of operation. After a response, `release` decides what happens to the connection. If both sides have
ended, the connection can take another request; otherwise it is marked for closing. Ambiguity means closing:
bytes after the response, both a Content-Length and a Transfer-Encoding, or an incomplete request.

*Sending.* The head and a small body go out in one write. An `Upload` sends a body that is large, streamed,
or waits for `100 (Continue)`. `http11_sending` frames both.

*Receiving.* A stream first receives heads, up to the final one, and then a `Body` (`http11_bodies`). A head
of the common form is recognized here, and any other goes to a judge, which is h11 (`http11_fallback`). So h11
takes part only in exchanges that need it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from .._connect.attempt import Established
from .._connect.network_stream import NetworkStream
from .._connect.tls_stream import TLSStream
from .._connect.transport import (
    MAX_PROBES,
    RECEIVE_SIZE,
    TLS_ALERT,
    Readiness,
    Transport,
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
from .._fields import HeaderList
from .._models import Response
from .._timeouts import timed
from .._urls import Origin, with_tls
from .connection import HTTPConnection, Owner, Settings
from .exchange import Exchange
from .http11_bodies import Body, body_of
from .http11_fallback import HeadJudge
from .http11_heads import ReceivedHead, announces_body, may_persist, recognize
from .http11_sending import ContentWriter, EncodedFields, frame_content
from .message_stream import CLOSED, OPEN, Head, StreamState, TracePoints
from .request import RequestContext

_RESPONSE_BEGINS = b"HTTP/1."
# The number of receives that wait before the next attempt to receive without waiting.
_WAITS = 8
_NO_FIELDS = EncodedFields([])


class HTTP11Connection(HTTPConnection):
    """A connection that speaks HTTP/1.1, one exchange at a time."""

    http_version = "HTTP/1.1"

    def __init__(self, established: Established, origin: Origin, settings: Settings, owner: Owner) -> None:
        super().__init__(established, origin, settings, owner)
        self._stream: HTTP11Stream | None = None
        # Consecutive requests on a connection often have the same headers.
        self._last_fields = _NO_FIELDS
        self._waits = 0

    def _is_active(self) -> bool:
        return self._stream is not None

    def _end_exchanges(self) -> None:
        # The exchange outlives the connection until the user closes the response.
        stream, self._stream = self._stream, None
        if stream is not None and stream.stop_sending is not None:
            stream.stop_sending()

    def exchange(self, context: RequestContext) -> Awaitable[Response]:
        """Send a request and receive the head of its response.

        An error or a cancellation marks the connection for closing, unless HTTP/1.1 can't express the
        request at all.
        """
        if context.prepared.protocol is not None:
            self.owner.released(self)
            raise LocalProtocolError("the protocol extension needs HTTP/2, but the connection is HTTP/1.1")
        self.requests += 1
        stream = self._stream = HTTP11Stream(self, context)
        return Exchange(self, stream, context).start()

    async def _close(self) -> None:
        # Closing a socket takes no time that would have to be limited.
        stream = self.stream
        if not (isinstance(stream, (Transport, TLSStream)) and stream.close_nowait()):
            await super()._close()

    def stream_done(self, *, reusable: bool) -> None:
        """Take note that the stream has ended. The stream calls this once."""
        self._stream = None
        if self.will_close:
            return
        if reusable:
            self.owner.released(self)
        else:
            self.close_soon()

    def readiness(self) -> Readiness:
        """Check the idle connection without waiting."""
        readiness = self.transport.peek() if self._plain else poll(self.stream)
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

    def encode_fields(self, headers: HeaderList) -> EncodedFields:
        """Encode the header fields of a request."""
        fields = self._last_fields
        if fields.headers != headers:
            fields = self._last_fields = EncodedFields(headers)
        return fields

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
                await timed(timeout, WriteTimeout, self.transport.send_later, memoryview(data)[sent:])
            else:
                await timed(timeout, WriteTimeout, self.stream.send_all, data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise WriteError(explain(exc)) from exc
        if self.transport.send_error is not None:
            raise WriteError(str(self.transport.send_error)) from self.transport.send_error


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
        self._prepared = prepared = context.prepared
        # Sending. A write error does not end the exchange, since the server may still have answered.
        self._fields = connection.encode_fields(prepared.headers)
        self._to_send = b""
        self._sent_before = connection.transport.bytes_sent
        self._write_error: WriteError | None = None
        # Frames the content that an upload sends. None once all of the request was framed.
        self._writer: ContentWriter | None = None
        # Receiving heads: the bytes that have arrived and the number of them, the judge if they need one, and
        # the next head once it was found. After the final head, `_body` is set.
        self._arrived = b""
        self._received = 0
        self._judge: HeadJudge | None = None
        self._found: ReceivedHead | None = None
        self._body: Body | None = None
        self._may_reuse = True

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
        prepared, fields = self._prepared, self._fields
        head = b"%b %b HTTP/1.1\r\n%b" % (prepared.method, prepared.target, fields.encoded)
        if content is None:
            self._writer = ContentWriter(fields)
            self._to_send = head
            return False
        self._to_send = head + frame_content(fields, content)
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
            if self._writer is None:
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
        self._feed_head(data)

    async def _check_still_usable(self) -> None:
        """Raise if the reused connection was closed or has received unsolicited data."""
        connection = self._connection
        readiness = connection.readiness()
        if readiness is Readiness.READABLE and await connection.still_open():
            readiness = Readiness.QUIET
        # `still_open` may have sent TLS records, such as an answer to a KeyUpdate (RFC 8446, 4.6).
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
        assert self._writer is not None
        await self._send(self._writer.frame(data))
        return len(data)

    async def send_end(self) -> None:
        """Send the end of the request."""
        assert self._writer is not None
        end = self._writer.end()
        self._writer = None
        await self._send(end)
        self.state = self.state.after_local_end()

    async def _send(self, data: bytes | memoryview) -> None:
        if data:
            await self._connection.send(data, None)

    # -- Receiving.

    def has_arrived(self) -> bool:
        """Return whether the next receive completes without waiting."""
        return self._head_has_arrived() if self._body is None else self._body.has_arrived()

    async def wait_until_answered(self, timeout: float | None) -> None:
        """Wait for the first bytes of the response."""
        while not self.answered:
            await self._receive_of_head(timeout)

    async def _receive_of_head(self, timeout: float | None) -> None:
        try:
            data = await self._connection.receive(timeout)
        except ReadError as exc:
            if self.answered:
                raise
            raise self._failure(exc) from None
        self._feed_head(data)

    # -- The response's head.

    async def receive_head(self, timeout: float | None) -> Head:
        """Receive the next head, interim or final."""
        while not self._head_has_arrived():
            await self._receive_of_head(timeout)
        received = self._found
        assert received is not None
        head, framing, rest = received
        if head.status < 200 and head.status != 101:
            self._may_reuse = self._may_reuse and not announces_body(framing)
            self._found = self._judge = None
            self._received, self._arrived = 0, rest
            self._check_beginning(rest)
        return head

    def _feed_head(self, data: bytes) -> None:
        if not data:
            raise self._failure(
                RemoteProtocolError(
                    "the server closed the connection in the middle of the response's head"
                    if self.answered
                    else "the server closed the connection without sending a response"
                )
            )
        self.answered = True
        if not self._received:
            # The usual case: the first piece has the whole head.
            self._found = recognize(data, self._connection.settings.max_header_bytes)
            if self._found is not None:
                return
        self._check_beginning(data)
        if self._judge is None:
            self._arrived += data
        else:
            self._judge.feed(data)

    def _check_beginning(self, data: bytes) -> None:
        """Raise early if the bytes of a head are not HTTP, since no head might ever end."""
        if not data.startswith(_RESPONSE_BEGINS[self._received : self._received + len(data)]):
            secure = with_tls(self._connection.origin)
            if secure is not None and TLS_ALERT.startswith(data[:2]):
                said = f"the server does not speak HTTP/1 on this port, but TLS (use {secure})"
            else:
                said = f"the server does not speak HTTP/1: it sent {data[:20]!r}"
            raise RemoteProtocolError(said)
        self._received += len(data)

    def _head_has_arrived(self) -> bool:
        if self._found is None and self._arrived:
            limit = self._connection.settings.max_header_bytes
            if self._judge is None:
                self._found = recognize(self._arrived, limit)
                if self._found is not None:
                    return True
                self._judge = HeadJudge(self._prepared, limit)
                self._judge.feed(self._arrived)
            self._found = self._judge.next_head()
        return self._found is not None

    def extensions(self, head: Head) -> dict[str, Any]:
        """Return the reason phrase, which HTTP/2 does not have."""
        return {"reason_phrase": head.reason}

    def hand_over(self, head: Head) -> NetworkStream:
        """Return the connection's stream, starting with the bytes that came after the head."""
        if self._writer is not None:
            # The rest of the request must not mix with the data that the stream's user sends.
            raise RemoteProtocolError(f"the server answered {head.status} before the request was sent whole")
        assert self._found is not None
        return self._connection.raw_stream(self._found.rest)

    def begin_body(self, head: Head) -> None:
        """Determine the framing of the body, and whether the connection may persist."""
        received, self._found, self._arrived = self._found, None, b""
        assert received is not None
        method = self._prepared.method
        self._body = body_of(received, method, self._connection.settings.max_header_bytes)
        if not may_persist(self._fields.closes, method, head, received.framing):
            self._may_reuse = False

    # -- The response's body.

    async def receive_data(self, timeout: float | None) -> bytes | None:
        """Receive a chunk of the body, or None at its end."""
        body = self._body
        assert body is not None
        while (data := body.take()) is None:
            body.feed(await self._connection.receive(timeout))
        if data:
            return data
        self._end_response(body.trailers)
        return None

    def take_whole(self) -> bytes | None:
        """Take the rest of the body if all of it has arrived, else nothing."""
        assert self._body is not None
        data = self._body.take_whole()
        if data is not None:
            self._end_response(self._body.trailers)
        return data

    def _end_response(self, trailers: HeaderList) -> None:
        self.trailers = trailers
        self.state = self.state.after_remote_end()

    # -- The end.

    async def discard_rest(self) -> bool:
        """Discard the rest of the body if it has arrived and takes at most one more receive."""
        body = self._body
        if body is None:
            return False
        with contextlib.suppress(WouldBlock, ReadError, RemoteProtocolError):
            if not _discard_arrived(body):
                body.feed(await self._connection.receive_available())
                if not _discard_arrived(body):
                    return False
            self._end_response(body.trailers)
            return True
        return False

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
        return (
            self.state is CLOSED
            and self._may_reuse
            and self._write_error is None
            and self._body is not None
            and self._body.is_clean
        )

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


def _discard_arrived(body: Body) -> bool:
    """Discard what has arrived of a body, and return whether that was all of it."""
    while data := body.take():
        pass
    return data is not None
