"""HTTP/1.1: a connection, and one exchange of a request and a response on it.

Theory of operation. An `HTTP11Connection` lives as long as its task, `run`, which does nothing but close
it. Everybody else only *marks*: `close_soon` is synchronous, can be called in any state and from any
task, and is all that a failing or cancelled request has to do. So there is always exactly one place
where the socket is closed, and it is reached however a request ends.

An `HTTP11Exchange` runs in the requester's task. It is also the response's body, so what happens to the
connection after a response is decided in one place, `_finish`, synchronously: either both sides are done
and the connection is released to the pool, or it is marked for closing. Whatever is ambiguous (bytes
after the response, both lengths, a request that was not sent whole) means closing.

*Sending.* Head and small body go out in one write. A body that is large, streamed, or waits for
`100 (Continue)` is sent by an `Upload`, see there.

*Receiving.* h11 parses heads, and bodies that have to be parsed. A body of known length has not, and is
passed from the stream to the user past h11, which saves a small response a tenth of its cost and a large
one half. h11 has then not seen the response's end, but tells by the state of the request's side whether
the connection may persist, and another `h11.Connection` takes over for the next exchange.

*Cancellation.* Every await is inside a `try` that ends in `_abandon` or `_finish`. The only wait that is
shielded is for the upload's task after it has been cancelled; this ends as soon as the user's iterator
honours cancellation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h11
import trio

from ._connectors import Connection
from ._exceptions import (
    ExchangeError,
    LocalProtocolError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    WriteError,
    WriteTimeout,
    mark_unanswered,
)
from ._models import CollectableStream, Headers, Origin, Prepared, Response
from ._streams import (
    NOT_RAW,
    RECEIVE_SIZE,
    NetworkStream,
    Readiness,
    Transport,
    WouldBlock,
    explain,
)
from ._timeouts import Timeouts, timed
from ._trace import Tracer, call_async, log_enabled, traced
from ._uploads import Upload

# A body up to this size goes out with the head, in the requester's task.
_SMALL_BODY = 16 * 1024
_RESPONSE_BEGINS = b"HTTP/1."
# How many informational responses one request may get before it is an attack.
_MAX_INFORMATIONAL = 100
# In how many pieces an idle connection may receive what nobody asked for, before it is closed for that.
_MOST_PROBES = 8
# How often an answer is waited for before it is looked for again without waiting.
_WAITS = 8
# How long closing a connection may take before it is cut.
_CLOSE_TIMEOUT = 1.0
# How long an upload may still take once the response is complete, before the connection is given up: it
# may be just about to end.
_UPLOAD_GRACE = 0.05


@dataclass(frozen=True)
class HTTP11Settings:
    """A pool's settings for HTTP/1.1.

    Attributes:
        max_header_bytes: The largest head of a response, in bytes.
        expect_continue_timeout: Seconds to wait for `100 (Continue)`.
    """

    max_header_bytes: int = 100 * 1024
    expect_continue_timeout: float = 1.0


@dataclass(frozen=True)
class Owner:
    """What a connection tells the pool, synchronously.

    Attributes:
        released: The connection can take another request.
        closing: The connection is marked for closing.
        start_soon: Starts a task that lives at most as long as the pool, in the caller's context.
    """

    released: Callable[[HTTP11Connection], None]
    closing: Callable[[HTTP11Connection], None]
    start_soon: Callable[[Callable[[], Awaitable[None]]], None]


class HTTP11Connection:
    """A connection that speaks HTTP/1.1, one exchange at a time."""

    http_version = "HTTP/1.1"

    def __init__(
        self, connection: Connection, origin: Origin, settings: HTTP11Settings, owner: Owner
    ) -> None:
        self.origin: Origin = origin
        self.settings: HTTP11Settings = settings
        self.requests: int = 0
        self.closed: trio.Event = trio.Event()
        # The last failure of the network, as opposed to errors that users' callbacks raise.
        self.failure: ExchangeError | None = None
        self.owner: Owner = owner
        self.transport: Transport = connection.transport
        self.stream: trio.abc.Stream = connection.stream
        self.h11: h11.Connection = self._new_h11()
        self.info: NetworkStream = NetworkStream(self.stream, refusal=NOT_RAW)
        self._plain = self.stream is self.transport
        self._close_requested = trio.Event()
        self._exchange: HTTP11Exchange | None = None
        self._last_headers: Headers = []
        self._last_head: h11.Request | None = None
        self._waits = 0

    def __repr__(self) -> str:
        requests = "1 request" if self.requests == 1 else f"{self.requests} requests"
        return f"<{type(self).__name__} {str(self.origin)!r}, {self.http_version}, {self.state}, {requests}>"

    @property
    def state(self) -> str:
        """One of `active`, `idle`, `closing` and `closed`."""
        if self.closed.is_set():
            return "closed"
        if self._close_requested.is_set():
            return "closing"
        return "idle" if self._exchange is None else "active"

    async def run(self) -> None:
        """The connection's task: wait until it is to be closed, and close it."""
        try:
            await self._close_requested.wait()
        finally:
            self.close_soon()
            tracer = Tracer(None, log=True) if log_enabled() else None
            try:
                await traced(tracer, "connection.close", {"connection": self}, self._close)
            finally:
                self.closed.set()

    async def _close(self) -> None:
        # It is closed all the same, and nobody is left to whom a failure would matter.
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            with trio.move_on_after(_CLOSE_TIMEOUT) as scope:
                scope.shield = True
                await self.stream.aclose()
            if scope.cancelled_caught:
                await trio.aclose_forcefully(self.stream)

    def close_soon(self) -> None:
        """Mark the connection for closing. Ends whatever is done on it."""
        if not self._close_requested.is_set():
            self._close_requested.set()
            if self._exchange is not None:
                self._exchange.connection_closes()
            self.owner.closing(self)

    def _new_h11(self) -> h11.Connection:
        return h11.Connection(h11.CLIENT, max_incomplete_event_size=self.settings.max_header_bytes)

    @property
    def will_close(self) -> bool:
        """Whether the connection is marked for closing, or closed."""
        return self._close_requested.is_set()

    async def exchange(self, prepared: Prepared, timeouts: Timeouts, tracer: Tracer | None) -> Response:
        """Send a request and receive the head of its response.

        When it raises, or is cancelled, the connection is marked for closing.
        """
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
        """What the kernel knows about the idle connection."""
        readiness = self.transport.peek()
        if self._plain and readiness is Readiness.READABLE:
            # Nothing may come before a request was sent.
            return Readiness.CLOSED
        if isinstance(self.stream, trio.SSLStream) and readiness is Readiness.QUIET:
            # What came along with the last response and was not decrypted yet, Trio has no name for.
            return Readiness.READABLE if self.stream._incoming.pending else Readiness.QUIET
        return readiness

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

    def encode_head(self, prepared: Prepared) -> bytes:
        """The head of a request on the wire."""
        # On one connection a request's head, or at least its headers, are often those of the request
        # before, and h11 takes what it has checked as it is.
        headers: Any = prepared.headers
        last = self._last_head
        if last is not None and headers == self._last_headers:
            if last.target == prepared.target and last.method == prepared.method:
                return _to_wire(self.h11, last)
            headers = last.headers
        # It finds nothing that was not found when the request was prepared.
        self._last_head = h11.Request(method=prepared.method, target=prepared.target, headers=headers)
        self._last_headers = prepared.headers
        return _to_wire(self.h11, self._last_head)

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
            self.failure = ReadError(explain(exc))
            raise self.failure from exc

    async def receive_available(self) -> bytes:
        """Receive without waiting.

        Raises:
            WouldBlock: Nothing is there.
            ReadError: The connection broke, or was closed.
        """
        self.transport.probing = _MOST_PROBES
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

    def raw_stream(self) -> NetworkStream:
        """The stream, with the bytes beyond HTTP, for its user."""
        self.transport.defer_errors = False
        return NetworkStream(
            # Trio's own stream has the checks for misuse that the transport leaves out.
            self.transport.stream if self._plain else self.stream,
            received=self.h11.trailing_data[0],
            on_close=self.close_soon,
        )


_END = h11.EndOfMessage()


def _to_wire(connection: h11.Connection, event: h11.Event) -> bytes:
    try:
        return connection.send(event) or b""
    except h11.LocalProtocolError as exc:
        raise LocalProtocolError(str(exc)) from exc


class HTTP11Exchange(CollectableStream):
    """One request and its response; also the response's body, an asynchronous iterator of bytes."""

    def __init__(
        self,
        connection: HTTP11Connection,
        prepared: Prepared,
        timeouts: Timeouts,
        tracer: Tracer | None,
    ) -> None:
        self._connection = connection
        self._h11 = connection.h11
        self._prepared = prepared
        self._timeouts = timeouts
        self._tracer = tracer
        self._upload: Upload | None = None
        self._write_error: WriteError | WriteTimeout | None = None
        self._sent_before = connection.transport.bytes_sent
        # Bytes received since the last head that was taken note of.
        self._received = 0
        self._pending: Any = None
        self._trailers: Headers = []
        # How far it has come. All but the last two only ever go from False to True.
        self._answered = False
        self._response_begun = False
        self._response_complete = False
        self._handed_over = False
        self._closed = False
        self._left_early = False
        self._done = False
        self._was_last = False
        self._reading_body = False
        # Whether a task is in the middle of reading the body.
        self._busy = False
        self._may_reuse = True
        # A body of known length: how much is still to come, and what came together with the head.
        self._left: int | None = None
        self._buffered = b""

    async def start(self) -> Response:
        """Send the request, and receive the response's head."""
        try:
            await self._send_request()
            head = await self._receive_head()
            if self._is_handed_over(head):
                await self._complete_request(head)
            return self._to_response(head)
        except ExchangeError as exc:
            error = self._explain(exc)
            await self._abandon()
            await self._trace_closing()
            if error is exc:
                raise
            raise error  # noqa: B904 - it keeps the cause that it has
        except BaseException:
            await self._abandon()
            raise

    def connection_closes(self) -> None:
        """The connection has been marked for closing under way."""
        if self._upload is not None:
            self._upload.cancel()

    # -- The request.

    async def _send_request(self) -> None:
        prepared, tracer = self._prepared, self._tracer
        info = {"request": prepared.request}
        data = self._connection.encode_head(prepared)
        body_follows = prepared.expects_continue or (
            prepared.body is None or len(prepared.body) > _SMALL_BODY
        )
        if not body_follows:
            if prepared.body:
                data += _to_wire(self._h11, h11.Data(data=prepared.body))
            data += _to_wire(self._h11, _END)
        await traced(tracer, "http11.send_request_headers", info, self._send_or_note, data)
        if not body_follows:
            await traced(tracer, "http11.send_request_body", info, _nothing)
        else:
            if tracer is not None:
                await tracer.report("http11.send_request_body.started", info)
            if self._connection.will_close:
                # Its owner's tasks may have ended meanwhile.
                self._connection.failure = WriteError("the connection was closed")
                raise self._connection.failure
            self._upload = Upload(
                prepared,
                self._encode_body,
                functools.partial(self._connection.send, timeout=None),
                write_timeout=self._timeouts.write,
                continue_timeout=self._connection.settings.expect_continue_timeout,
            )
            self._connection.owner.start_soon(self._upload.run)

    def _encode_body(self, piece: memoryview | None) -> bytes:
        if piece is None:
            return _to_wire(self._h11, _END)
        data: Any = piece  # h11 takes whatever is like bytes.
        return _to_wire(self._h11, h11.Data(data=data))

    async def _send_or_note(self, data: bytes) -> None:
        """Send; where the connection breaks, the server's answer may be there all the same."""
        try:
            await self._connection.send(data, self._timeouts.write)
        except WriteError as exc:
            self._write_error = exc

    # -- Receiving.

    async def _wait(self) -> bytes | None:
        """Wait for data, or for the end of the upload, for which it returns None."""
        upload, timeouts = self._upload, self._timeouts
        if upload is None or upload.reported:
            return await self._connection.receive(timeouts.read)
        if not upload.done.is_set():
            limit = timeouts.read if self._response_begun else None
            with trio.CancelScope() as upload.wake:
                return await self._connection.receive(limit)
        await self._report_upload(upload)
        return None

    async def _report_upload(self, upload: Upload) -> None:
        """Take note of an upload's end, and raise what it has to be raised for."""
        upload.reported = True
        error, failure = upload.error, upload.failure
        if self._tracer is not None:
            if error is None and failure is None:
                await self._tracer.report("http11.send_request_body.complete", {"return_value": None})
            else:
                await self._tracer.report("http11.send_request_body.failed", {"exception": error or failure})
        if error is not None:
            raise error
        if isinstance(failure, WriteTimeout) and not self._response_begun:
            raise failure
        self._write_error = failure

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
            self._connection.failure = RemoteProtocolError(
                "the server closed the connection in the middle of the response's head"
                if self._answered
                else "the server closed the connection without sending a response"
            )
            raise self._connection.failure
        self._answered = True
        self._count(data)
        self._h11.receive_data(data)

    def _count(self, data: bytes) -> None:
        """Take note of bytes received, and refuse what is not HTTP: it may never end as a head does."""
        if not data.startswith(_RESPONSE_BEGINS[self._received : self._received + len(data)]):
            raise RemoteProtocolError(f"the server does not speak HTTP/1: it sent {data[:20]!r}")
        self._received += len(data)

    def _take_event(self) -> Any:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as exc:
            raise RemoteProtocolError(str(exc)) from exc

    # -- The response's head.

    async def _receive_head(self) -> h11.Response | h11.InformationalResponse:
        if self._tracer is None:
            return await self._receive_final_head()
        if self._upload is not None:
            await self._wait_for_upload_or_data(self._upload)
        heads: list[h11.Response | h11.InformationalResponse] = []

        async def receive() -> tuple[bytes, int, bytes, Headers]:
            heads.append(await self._receive_final_head())
            return _describe(heads[0])

        info = {"request": self._prepared.request}
        await traced(self._tracer, "http11.receive_response_headers", info, receive)
        return heads[0]

    async def _wait_for_upload_or_data(self, upload: Upload) -> None:
        """Let the upload's end be traced before the response's beginning, where that is the order."""
        while not upload.reported and not self._answered:
            data = await self._wait()
            if data is not None:
                self._feed(data)

    async def _receive_final_head(self) -> h11.Response | h11.InformationalResponse:
        for _ in range(_MAX_INFORMATIONAL + 1):
            head = await self._next_event()
            self._check_head_size()
            if head.status_code >= 200 or head.status_code == 101:
                self._response_begun = True
                if self._upload is not None:
                    self._upload.answered()
                return head  # type: ignore[no-any-return]
            await self._informational(head)
        raise RemoteProtocolError(f"the server sent more than {_MAX_INFORMATIONAL} informational responses")

    def _check_head_size(self) -> None:
        """Hold the limit exactly: h11 does not, for a head that arrives together with its end."""
        limit = self._connection.settings.max_header_bytes
        if self._received > limit:
            rest = len(self._h11.trailing_data[0])
            if self._received - rest > limit:
                raise RemoteProtocolError(f"the response's head is larger than {limit} bytes")

    async def _informational(self, head: h11.InformationalResponse) -> None:
        self._received = 0
        self._count(self._h11.trailing_data[0])
        if head.status_code == 100 and self._upload is not None:
            self._upload.go_ahead.set()
        info = {"request": self._prepared.request}
        await traced(self._tracer, "http11.receive_informational_response", info, self._show, head)

    async def _show(self, head: h11.InformationalResponse) -> tuple[bytes, int, bytes, Headers]:
        callback = self._prepared.request.extensions.get("informational")
        if callback is not None:
            await call_async(
                "the informational extension",
                callback,
                head.status_code,
                head.headers.raw_items(),
            )
        return _describe(head)

    def _is_handed_over(self, head: h11.Response | h11.InformationalResponse) -> bool:
        status = head.status_code
        self._handed_over = status == 101 or (self._prepared.method == b"CONNECT" and status < 300)
        return self._handed_over

    async def _complete_request(self, head: h11.Response | h11.InformationalResponse) -> None:
        """Nothing of the request may get between what the stream's user sends."""
        if self._upload is not None:
            # The last bytes may have been sent, but their sending not have returned yet.
            await self._let_end(self._upload)
        if self._h11.our_state is not h11.SWITCHED_PROTOCOL:
            raise RemoteProtocolError(
                f"the server answered {head.status_code} before the request was sent whole"
            )

    def _to_response(self, head: h11.Response | h11.InformationalResponse) -> Response:
        version, status, reason, headers = _describe(head)
        raw = self._handed_over
        if raw:
            self._response_complete = True
        else:
            self._frame_body(status, headers)
        response = Response(status)
        response.headers = headers
        response.stream = self
        response.extensions = {
            "http_version": version,
            "reason_phrase": reason,
            "network_stream": self._connection.raw_stream() if raw else self._connection.info,
            "trailing_headers": self._trailers,
        }
        return response

    def _frame_body(self, status: int, headers: Headers) -> None:
        """Find out whether the body is of known length (RFC 9112, 6.3)."""
        length, coded = None, False
        for name, value in headers:
            match name.lower():
                case b"content-length":
                    length = int(value)
                case b"transfer-encoding":
                    coded = True
        if length is None:
            return
        if coded:
            # An attempt at smuggling, or a server that can't be understood.
            self._may_reuse = False
        elif self._prepared.method != b"HEAD" and status not in (204, 304):
            self._left = length
            self._buffered = self._h11.trailing_data[0]

    # -- The response's body.

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self._read(checkpoint=True)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def collect(self) -> bytes:
        """Read what is left of the body, and close, but for a stream that was handed over."""
        chunks = []
        try:
            while (chunk := await self._read(checkpoint=False)) is not None:
                chunks.append(chunk)
        finally:
            if not self._handed_over:
                await self._close()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _read(self, *, checkpoint: bool) -> bytes | None:
        if self._left_early:
            raise ReadError("the response was closed before its body was read")
        if self._response_complete:
            if checkpoint:
                await trio.lowlevel.checkpoint()
            return None
        tracer = self._tracer
        if tracer is None:
            return await self._read_chunk(checkpoint)
        if not self._reading_body:
            self._reading_body = True
            await tracer.report("http11.receive_response_body.started", {"request": self._prepared.request})
        try:
            chunk = await self._read_chunk(checkpoint)
        except BaseException as exc:
            self._reading_body = False
            await tracer.report("http11.receive_response_body.failed", {"exception": exc})
            raise
        if chunk is None:
            await tracer.report("http11.receive_response_body.complete", {"return_value": None})
        return chunk

    async def _read_chunk(self, checkpoint: bool) -> bytes | None:
        if self._busy:
            raise trio.BusyResourceError("another task is reading this body")
        self._busy = True
        try:
            if self._left is None:
                return await self._read_parsed(checkpoint)
            return await self._read_directly(self._left, checkpoint)
        except Exception:
            # Whatever went wrong, it goes on being wrong. A cancelled read, in contrast, can be
            # taken up again.
            self._may_reuse = False
            self._finish()
            raise
        finally:
            self._busy = False

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

    def _end_response(self, trailers: Headers) -> None:
        self._response_complete = True
        self._trailers.extend(trailers)
        if self._upload is None:
            self._finish()

    # -- The end.

    async def aclose(self) -> None:
        """Close the response; what was not read of it is given up."""
        await self._close()
        await trio.lowlevel.checkpoint()

    async def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._left_early = not self._response_complete
        if self._done and self._upload is None and self._tracer is None:
            return
        try:
            await traced(self._tracer, "http11.response_closed", {}, self._settle)
        finally:
            await self._end()
        await self._trace_closing()

    async def _settle(self) -> None:
        """Bring both sides to their end, where this takes next to no time."""
        if self._done or self._busy:
            return
        upload = self._upload
        if upload is not None and self._response_complete:
            await self._let_end(upload)
        elif upload is None or upload.done.is_set():
            await self._skip_rest()

    async def _let_end(self, upload: Upload) -> None:
        with trio.move_on_after(_UPLOAD_GRACE):
            await upload.done.wait()

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

    async def _abandon(self) -> None:
        self._closed = True
        self._may_reuse = False
        await self._end()

    async def _end(self) -> None:
        upload = self._upload
        self._finish()
        if upload is not None:
            await upload.join()
            if upload.done.is_set() and not upload.reported:
                await self._report_upload(upload)

    def _finish(self) -> None:
        """Release the connection if nothing speaks against it, else mark it for closing."""
        if not self._done:
            self._done = True
            reusable = self._is_reusable()
            if self._upload is not None and not reusable:
                self._upload.cancel()
            self._connection.exchange_done(reusable=reusable)
            self._was_last = self._connection.will_close

    def _is_reusable(self) -> bool:
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
        """Find the error to raise for a request without response, and what may be done about it."""
        connection = self._connection
        if self._answered or exc is not connection.failure:
            return exc
        connection.failure = error = self._write_error or exc
        mark_unanswered(error, unsent=connection.transport.bytes_sent == self._sent_before)
        return error

    async def _trace_closing(self) -> None:
        """Let the trace show that the connection did not outlive the exchange."""
        tracer = self._tracer and self._tracer.without_log()
        if tracer is not None and self._was_last:
            info = {"connection": self._connection}
            await traced(tracer, "connection.close", info, self._connection.closed.wait)


async def _nothing() -> None:
    """What remains to be done for a body that went out with the head."""


def _describe(
    head: h11.Response | h11.InformationalResponse,
) -> tuple[bytes, int, bytes, Headers]:
    return b"HTTP/" + head.http_version, head.status_code, head.reason, head.headers.raw_items()
