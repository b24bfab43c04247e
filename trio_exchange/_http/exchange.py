"""An exchange: one request and its response, over either protocol.

Theory of operation. An `Exchange` runs in the requester's task. It sends the request, waits for the
response's head, and stays in use while the response's body is read. It owns everything that the caller can
observe: the upload of a large body, trace events, callbacks and timeouts. The `MessageStream` owns the bytes
on the wire, and decides whether the connection can be reused.

*Errors.* The `MessageStream` raises `ExchangeFailed` if the network or the server fails before the response
begins. Exceptions from trace handlers, from the `informational` callback and from the content's iterator
propagate unchanged.

*Leaks.* The response's body, a `ResponseBody`, refers to the exchange; no object of the library refers to
the body. So the body is garbage collected once the user has dropped the response. If the response is still
open then, the body emits a `ResourceWarning` and ends the exchange by `TrioToken.run_sync_soon`. A finished
exchange is not part of a reference cycle: it does not keep an error whose traceback refers to the exchange.

*Cancellation.* A request that is cancelled before its response has been returned ends in `_abandon`. A read
of the body that is cancelled can be repeated; the exchange then ends when the response is closed or dropped.
Only one wait is shielded: after the upload has been cancelled, `Upload.join` waits until the user's iterator
has reacted to that.
"""

from __future__ import annotations

import contextlib
import enum
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, final

import trio

from .._conflicts import ConflictDetector
from .._content import CollectableStream
from .._exceptions import (
    ExchangeError,
    ExchangeFailed,
    ReadError,
    RemoteProtocolError,
    WriteError,
    WriteTimeout,
)
from .._fields import Headers
from .._models import Request, Response, received_response
from .._public_calls import drop_library_frames
from .._trace import Span, call_async, span
from .connection import HTTPConnection
from .message_stream import Head, MessageStream
from .request import RequestContext
from .upload import Upload

# A body up to this size goes out with the head, in the requester's task.
SMALL_BODY = 16 * 1024
# The most informational responses for one request. A server that sends more is treated as an attacker.
MAX_INFORMATIONAL = 100
# Seconds to wait for the upload once the response is complete: often the upload is about to end.
_UPLOAD_GRACE = 0.05

T = TypeVar("T")


class ExchangeState(enum.Enum):
    """The state of an exchange.

    Attributes:
        WAITING: The final head has not arrived.
        READING: The response's body is being read.
        COMPLETE: The body was read to its end.
        HANDED_OVER: A raw byte stream follows the final head. It belongs to the user.
        CLOSED: The response was closed in the state COMPLETE or HANDED_OVER.
        CLOSED_EARLY: The response was closed before its body was read to its end.
    """

    WAITING = enum.auto()
    READING = enum.auto()
    COMPLETE = enum.auto()
    HANDED_OVER = enum.auto()
    CLOSED = enum.auto()
    CLOSED_EARLY = enum.auto()


# Python 3.11 takes a quarter of a microsecond for each lookup of a member in its class.
_WAITING, _READING, _COMPLETE, _HANDED_OVER, _CLOSED, _CLOSED_EARLY = ExchangeState


@final
class Exchange:
    """One request and its response.

    Args:
        connection: The connection that carries the exchange.
        stream: The message stream to send to and receive from.
        context: The request.
    """

    def __init__(self, connection: HTTPConnection, stream: MessageStream, context: RequestContext) -> None:
        self._connection = connection
        self._stream = stream
        self._context = context
        self._points = stream.trace_points
        self._state: ExchangeState = _WAITING
        self._reader = ConflictDetector("another task is reading this body")
        self._trailers: Headers = Headers()
        self._upload: Upload | None = None
        self._write_error: WriteError | WriteTimeout | None = None
        # Set by the first read. It stays open across reads until the body ends or a read raises.
        self._body_span: Span | None = None

    # -- The request, up to the response's head.

    async def start(self) -> Response:
        """Send the request and receive the response's head.

        Raises:
            ExchangeFailed: The network or the server failed before the response began.
            ExchangeError: The request failed in another way.
            Exception: A callback or the content's iterator raised it.
        """
        try:
            await self._send()
            if self._context.tracer is None:
                head = await self._receive_heads()
            else:
                head = await self._receive_heads_traced()
            return await self._respond(head)
        except ExchangeFailed as exc:
            exc.error = self._stream.explain(exc.error, self._write_error)
            await self._abandon()
            await self._trace_closing()
            raise
        except ExchangeError:
            await self._abandon()
            await self._trace_closing()
            raise
        except BaseException:
            await self._abandon()
            raise

    async def _send(self) -> None:
        stream, prepared, tracer = self._stream, self._context.prepared, self._context.tracer
        content = None if prepared.expects_continue else prepared.body
        if content is not None and len(content) > SMALL_BODY:
            content = None
        whole = await stream.prepare(content)
        if tracer is None:
            await stream.send_head()
        else:
            async with self._span(self._points.send_request_headers):
                await stream.send_head()
        if not whole:
            await self._start_upload()
        elif tracer is not None:
            async with self._span(self._points.send_request_body):
                # The body was sent together with the head.
                pass

    async def _start_upload(self) -> None:
        """Start a task that sends the body while this task waits for the response."""
        tracer = self._context.tracer
        if tracer is not None:
            await tracer.report(f"{self._points.send_request_body}.started", self._info())
        # The pool's tasks may have ended during the trace handler.
        self._stream.check_open()
        settings = self._connection.settings
        upload = Upload(self._context, self._stream, continue_timeout=settings.expect_continue_timeout)
        self._upload = upload
        self._stream.stop_sending = upload.cancel
        self._connection.owner.start_upload(upload)

    async def _receive_heads_traced(self) -> Head:
        if self._upload is not None:
            await self._wait_for_upload_or_answer(self._upload)
        async with self._span(self._points.receive_response_headers) as head_span:
            head = await self._receive_heads()
            head_span.result = self._points.describe(head)
        return head

    async def _wait_for_upload_or_answer(self, upload: Upload) -> None:
        """Wait for the response's first bytes. Trace the upload's end if it comes before them."""
        while not upload.reported and not self._stream.answered:
            if upload.done.is_set():
                await self._report_upload(upload)
                return
            with trio.CancelScope() as upload.wake:
                await self._stream.wait_until_answered(None)

    async def _receive_heads(self) -> Head:
        upload = self._upload
        for _ in range(MAX_INFORMATIONAL + 1):
            head = await self._receive(self._stream.receive_head)
            if head.status >= 200 or head.status == 101:
                self._state = _READING
                if upload is not None:
                    upload.answered()
                return head
            if head.status == 100 and upload is not None:
                upload.go_ahead.set()
            async with self._span(self._points.receive_informational_response) as head_span:
                callback = self._context.prepared.request.extensions.get("informational")
                if callback is not None:
                    await call_async("the informational extension", callback, head.status, head.headers)
                head_span.result = self._points.describe(head)
        raise RemoteProtocolError(f"the server sent more than {MAX_INFORMATIONAL} informational responses")

    async def _respond(self, head: Head) -> Response:
        """Build the response from its final head."""
        status, stream = head.status, self._stream
        network_stream = self._connection.info
        if status == 101 or (self._context.prepared.method == b"CONNECT" and status < 300):
            if self._upload is not None:
                # The server may have the whole body although the task that sent it has not run on yet.
                await self._let_end(self._upload)
            network_stream = stream.hand_over(head)
            self._state = _HANDED_OVER
        else:
            stream.begin_body(head)
        extensions = {
            "http_version": head.version,
            "network_stream": network_stream,
            "trailing_headers": self._trailers,
            **stream.extensions(head),
        }
        return received_response(status, head.headers, ResponseBody(self), extensions)

    # -- Waiting for the server and for the upload.

    def _receive(self, receive: Callable[[float | None], Awaitable[T]]) -> Awaitable[T]:
        """Call `receive` with the read timeout. If the upload ends meanwhile, report it and go on."""
        if self._upload is None:
            return receive(self._context.timeouts.read)
        return self._receive_during(self._upload, receive)

    async def _receive_during(self, upload: Upload, receive: Callable[[float | None], Awaitable[T]]) -> T:
        """Await `receive`. If the upload ends meanwhile, interrupt it, report the end, and call it again."""
        timeout = self._context.timeouts.read
        while not upload.reported:
            if upload.done.is_set() and not self._stream.has_arrived():
                await self._report_upload(upload)
                break
            with trio.CancelScope() as upload.wake:
                # Before the response begins, the read timeout starts only at the upload's end.
                return await receive(None if self._state is _WAITING else timeout)
        return await receive(timeout)

    async def _report_upload(self, upload: Upload) -> None:
        """Trace an upload's end. Raise the content's error, or a write timeout before the response begins."""
        error, failure = upload.take_outcome()
        tracer = self._context.tracer
        try:
            if tracer is not None:
                name = self._points.send_request_body
                if error is None and failure is None:
                    await tracer.report(f"{name}.complete", {"return_value": None})
                else:
                    await tracer.report(f"{name}.failed", {"exception": error or failure})
            if error is not None:
                raise error
            if isinstance(failure, WriteTimeout) and self._state is _WAITING:
                raise failure
            self._write_error = failure
        finally:
            del error, failure

    async def _let_end(self, upload: Upload) -> None:
        with trio.move_on_after(_UPLOAD_GRACE):
            await upload.done.wait()

    # -- The response's body.

    @property
    def request(self) -> Request:
        """The request as the caller made it."""
        return self._context.prepared.request

    @property
    def response_complete(self) -> bool:
        """Whether the response was read to its end or handed over."""
        return self._state in (_COMPLETE, _HANDED_OVER, _CLOSED)

    @property
    def is_open(self) -> bool:
        """Whether the response still uses its connection: it must be read to its end or closed.

        A response that was read to its end uses it until its request has been sent completely.
        """
        if self._state is _COMPLETE:
            if self._stream.released:
                return False
        elif self._state is not _READING:
            return False
        return not (self._stream.failed or self._connection.will_close)

    @property
    def is_sending(self) -> bool:
        """Whether the request's body is still being sent."""
        return self._upload is not None and not self._upload.done.is_set()

    def read(self, *, checkpoint: bool) -> Awaitable[bytes | None]:
        """Receive the next chunk of the body.

        Args:
            checkpoint: Whether to execute a checkpoint even if data is available at once.

        Returns:
            A chunk of the body, or None at the end.
        """
        if self._state is not _READING:
            return self._read_nothing(checkpoint)
        if self._context.tracer is None:
            return self._read_chunk(checkpoint)
        return self._read_traced(checkpoint)

    async def _read_nothing(self, checkpoint: bool) -> None:
        if self._state is _CLOSED_EARLY:
            raise ReadError("the response was closed before its body was read")
        if checkpoint:
            await trio.lowlevel.checkpoint()

    async def _read_traced(self, checkpoint: bool) -> bytes | None:
        if self._body_span is None:
            body_span = self._body_span = self._span(self._points.receive_response_body)
            await body_span.start()
        body_span = self._body_span
        try:
            chunk = await self._read_chunk(checkpoint)
        except BaseException as exc:
            self._body_span = None
            await body_span.fail(exc)
            raise
        if chunk is None:
            await body_span.complete()
        return chunk

    async def _read_chunk(self, checkpoint: bool) -> bytes | None:
        with self._reader:
            try:
                if checkpoint and self._stream.has_arrived():
                    # The data has already arrived, so receiving it executes no checkpoint.
                    await trio.lowlevel.checkpoint()
                chunk = await self._receive(self._stream.receive_data)
            except Exception as exc:
                # A failed read stays failed: later reads fail too. A cancelled read can be repeated.
                self._release(reusable=False)
                if self._state is _CLOSED_EARLY and isinstance(exc, ReadError):
                    raise ReadError("the response was closed while its body was being read") from None
                raise
            if chunk is None:
                self._end_response()
            return chunk

    def _end_response(self) -> None:
        if self._state is _READING:
            self._state = _COMPLETE
        self._trailers.extend(self._stream.trailers)
        if not self.is_sending:
            self._release()

    async def collect(self) -> bytes:
        """Read the rest of the body, and close the response unless its stream was handed over."""
        whole = self._take_whole()
        if whole is not None:
            return whole
        chunks = []
        try:
            while (chunk := await self.read(checkpoint=False)) is not None:
                chunks.append(chunk)
        finally:
            if self._state is not _HANDED_OVER:
                await self._close()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _take_whole(self) -> bytes | None:
        """Read the rest of the body and close the response, if all of the body has arrived; else None.

        Most small responses arrive whole. They need none of the steps for waiting.
        """
        if self._state is not _READING or self._context.tracer is not None or self._upload is not None:
            return None
        with self._reader:
            try:
                data = self._stream.take_whole()
            except ExchangeError:
                self._release(reusable=False)
                raise
        if data is not None:
            self._end_response()
            self._state = _CLOSED
        return data

    # -- The end.

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the response and discard the unread part of its body."""
        await self._close()
        await trio.lowlevel.checkpoint()

    def give_up_soon(self) -> None:
        """Schedule the exchange's end on the Trio thread. Safe from any thread and from finalizers."""
        with contextlib.suppress(trio.RunFinishedError):
            self._connection.trio_token.run_sync_soon(self._give_up)

    def _give_up(self) -> None:
        self._release(reusable=self._state is _COMPLETE)
        if self._upload is not None:
            self._upload.give_up()

    async def _close(self) -> None:
        before = self._state
        if before in (_CLOSED, _CLOSED_EARLY):
            return
        reading = before is _READING
        self._state = _CLOSED_EARLY if reading else _CLOSED
        if self._context.tracer is None and self._upload is None and self._stream.released:
            return
        try:
            closing = span(self._context.tracer, self._points.response_closed, self._stream.trace_info)
            async with closing:
                await self._settle(before)
        finally:
            await self._end()
        await self._trace_closing()

    async def _settle(self, before: ExchangeState) -> None:
        """Discard what has arrived, or wait a moment for the upload, so that the connection can be reused."""
        upload = self._upload
        if before is _HANDED_OVER:
            await self._stream.discard_rest()
        elif self._stream.released or self._reader.busy:
            return
        elif upload is not None and before is _COMPLETE:
            await self._let_end(upload)
        elif (upload is None or upload.done.is_set()) and await self._stream.discard_rest():
            self._end_response()

    async def _abandon(self) -> None:
        """End the exchange without a response."""
        self._state = _CLOSED_EARLY
        self._release(reusable=False)
        await self._end()

    async def _end(self) -> None:
        upload = self._upload
        self._release()
        if upload is not None:
            await upload.join()
            if not upload.done.is_set():
                # The content's iterator closes the response, so this is the task of the upload itself.
                upload.give_up()
            elif not upload.reported:
                await self._report_upload(upload)

    def _release(self, *, reusable: bool = True) -> None:
        """Release the connection, for reuse if both sides finished cleanly."""
        upload = self._upload
        if upload is None:
            self._stream.release(reusable=reusable)
        elif not self._stream.release(reusable=reusable and upload.succeeded):
            upload.cancel()

    # -- Traces.

    def _info(self) -> dict[str, Any]:
        return {"request": self.request, **self._stream.trace_info}

    def _span(self, name: str) -> Span:
        return span(self._context.tracer, name, self._info())

    async def _trace_closing(self) -> None:
        """Trace the closing of the connection if the exchange ended it."""
        # Without the log: the connection's own task logs these events.
        tracer = self._context.tracer and self._context.tracer.without_log()
        if tracer is not None and self._stream.ends_connection:
            async with span(tracer, "connection.close", {"connection": self._connection}):
                await self._connection.wait_closed()


class ResponseBody(CollectableStream):
    """The body of a response: an asynchronous iterator of bytes.

    Args:
        exchange: The exchange that receives the body.
    """

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @property
    def ended(self) -> bool:
        """Whether the body was read to its end."""
        return self._exchange.response_complete

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    # Coroutine functions keep a reference to the body, so it stays alive while they are awaited.

    @trio.lowlevel.enable_ki_protection
    async def __anext__(self) -> bytes:
        try:
            chunk = await self._exchange.read(checkpoint=True)
        except ExchangeError as exc:
            drop_library_frames(exc)
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def collect(self) -> bytes:
        """Read the rest of the body, and close the response unless its stream was handed over."""
        return await self._exchange.collect()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the response and discard the unread part of its body."""
        await self._exchange.aclose()

    def __del__(self) -> None:
        exchange = self._exchange
        if exchange.is_open:
            exchange.give_up_soon()
            if not exchange.response_complete:
                fault = "was neither read to its end nor closed"
            elif exchange.is_sending:
                fault = "came before the request was sent whole, and was not closed"
            else:
                return
            method = exchange.request.method.decode("latin-1")
            warnings.warn(
                f"the response to {method} {exchange.request.url} {fault}",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
