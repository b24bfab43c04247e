"""What connections have in common whatever they speak, and so have exchanges.

Theory of operation. An `OwnedConnection` lives as long as its task, `run`, which is also what closes it.
Everybody else only *marks*: `close_soon` is synchronous, can be called in any state and from any task, and
is all that a failing or cancelled request has to do. So there is always exactly one place where the socket
is closed, and it is reached however a request ends.

An `Exchange` runs in the requester's task, and goes on while the response's body is read, so what happens to
the connection after a response is decided in one place, `_finish`, synchronously.

*Leaks.* The response's body, a `ResponseBody`, refers to the exchange; nothing of the library refers to the
body. So it is collected when the user has dropped the response, and if that is still open then, it gives a
`ResourceWarning` and lets Trio end the exchange. An exchange that is over is part of no reference cycle: an
error that was raised, and whose traceback leads to the exchange, is not kept by it.

*Cancellation.* Every await is inside a `try` that ends in `_abandon` or `_finish`. The only wait that is
shielded is for the upload's task after it has been cancelled; this ends as soon as the user's iterator
honours cancellation.
"""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import trio

from .._content import CollectableStream
from .._entrypoints import drop_own_frames
from .._exceptions import ExchangeError, ReadError, RemoteProtocolError, WriteError, WriteTimeout, copied
from .._fields import HeaderList, Headers
from .._models import Request, Response
from .._timeouts import Timeouts
from .._trace import Tracer, call_async, traced
from .connection import HTTPConnection
from .request import PreparedRequest
from .upload import Upload

# A body up to this size goes out with the head, in the requester's task.
SMALL_BODY = 16 * 1024
# How many informational responses one request may get before it is an attack.
MAX_INFORMATIONAL = 100
# How long an upload may still take once the response is complete, before it is given up: it may be just
# about to end.
_UPLOAD_GRACE = 0.05


C = TypeVar("C", bound=HTTPConnection)


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


class TracePoints:
    """The names of one protocol's trace points."""

    def __init__(self, protocol: str) -> None:
        self.send_request_headers: str = f"{protocol}.send_request_headers"
        self.send_request_body: str = f"{protocol}.send_request_body"
        self.receive_informational_response: str = f"{protocol}.receive_informational_response"
        self.receive_response_headers: str = f"{protocol}.receive_response_headers"
        self.receive_response_body: str = f"{protocol}.receive_response_body"
        self.response_closed: str = f"{protocol}.response_closed"


class Exchange(abc.ABC, Generic[C]):
    """One request and its response."""

    points: ClassVar[TracePoints]

    def __init__(
        self, connection: C, prepared: PreparedRequest, timeouts: Timeouts, tracer: Tracer | None
    ) -> None:
        self._connection = connection
        self._prepared = prepared
        self._timeouts = timeouts
        self._tracer = tracer
        self._upload: Upload | None = None
        self._write_error: WriteError | WriteTimeout | None = None
        # The failure of the network, as opposed to errors that users' callbacks raise.
        self._failure: ExchangeError | None = None
        self._trailers: Headers = Headers()
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

    # -- What the protocols do differently.

    @abc.abstractmethod
    async def _send_request(self) -> None:
        """Send the head, and the body or begin to."""

    @abc.abstractmethod
    async def _receive_response(self) -> Response:
        """Receive the head, and make the response of it."""

    @abc.abstractmethod
    async def _receive(self, timeout: float | None) -> Any:
        """Wait for something from the server for at most `timeout` seconds."""

    @abc.abstractmethod
    def _feed(self, data: Any) -> None:
        """Take note of what was received before the response's head."""

    @abc.abstractmethod
    async def _next_head(self) -> Head:
        """The next head, of whatever kind."""

    @abc.abstractmethod
    async def _next_chunk(self, checkpoint: bool) -> bytes | None:
        """The next piece of the body, None for its end."""

    @abc.abstractmethod
    async def _skip_rest(self) -> None:
        """Take the rest of the response if it has arrived, and is little."""

    @abc.abstractmethod
    def _is_clean(self) -> bool:
        """Whether both sides have done all that they had to."""

    @abc.abstractmethod
    def _release(self, *, clean: bool) -> None:
        """Give the connection back."""

    @abc.abstractmethod
    def _explain(self, exc: ExchangeError) -> ExchangeError:
        """Find the error to raise for a request without response, and what may be done about it."""

    def _info(self) -> dict[str, Any]:
        """What a trace point tells of the exchange when it starts."""
        return {"request": self._prepared.request}

    def _traced_head(self, head: Head) -> Any:
        """What a trace point tells of a head."""
        return tuple(head)

    # -- The way to a response.

    async def start(self) -> Response:
        """Send the request, and receive the response's head."""
        try:
            await self._send_request()
            return await self._receive_response()
        except ExchangeError as exc:
            error = self._explain(exc)
            try:
                await self._abandon()
                await self._trace_closing()
                if error is exc:
                    raise
                raise error  # It keeps the cause that it has.
            finally:
                self._let_go_of_failure()
                del error
        except BaseException:
            await self._abandon()
            raise

    async def _trace_sent_body(self) -> None:
        """Trace a body that went out with the head, for which nothing remains to be done."""
        if self._tracer is not None:
            name = self.points.send_request_body
            await self._tracer.report(f"{name}.started", self._info())
            await self._tracer.report(f"{name}.complete", {"return_value": None})

    async def _begin_upload(self, send: Callable[[memoryview | None], Awaitable[None]]) -> None:
        """Let the body be sent, piece by piece and then None for its end, while the answer is awaited."""
        if self._tracer is not None:
            await self._tracer.report(f"{self.points.send_request_body}.started", self._info())
        if self._connection.will_close:
            # Its owner's tasks may have ended meanwhile.
            self._failure = self._failure or WriteError("the connection was closed")
            raise self._failure
        self._upload = Upload(
            self._prepared,
            send,
            write_timeout=self._timeouts.write,
            continue_timeout=self._connection.settings.expect_continue_timeout,
        )
        self._connection.owner.start_upload(self._upload)

    async def _wait(self) -> Any:
        """Wait for the server, or for the end of the upload, for which it returns None."""
        upload, timeouts = self._upload, self._timeouts
        if upload is None or upload.reported:
            return await self._receive(timeouts.read)
        if not upload.done.is_set():
            limit = timeouts.read if self._response_begun else None
            with trio.CancelScope() as upload.wake:
                return await self._receive(limit)
        await self._report_upload(upload)
        return None

    async def _report_upload(self, upload: Upload) -> None:
        """Take note of an upload's end, and raise what it has to be raised for."""
        error, failure = upload.take_outcome()
        try:
            if self._tracer is not None:
                name = self.points.send_request_body
                if error is None and failure is None:
                    await self._tracer.report(f"{name}.complete", {"return_value": None})
                else:
                    await self._tracer.report(f"{name}.failed", {"exception": error or failure})
            if error is not None:
                raise error
            if isinstance(failure, WriteTimeout) and not self._response_begun:
                raise failure
            self._write_error = failure
        finally:
            del error, failure

    async def _receive_head(self) -> Head:
        if self._tracer is None:
            return await self._receive_final_head()
        if self._upload is not None:
            await self._wait_for_upload_or_answer(self._upload)
        heads: list[Head] = []

        async def receive() -> Any:
            heads.append(await self._receive_final_head())
            return self._traced_head(heads[0])

        await traced(self._tracer, self.points.receive_response_headers, self._info(), receive)
        return heads[0]

    async def _wait_for_upload_or_answer(self, upload: Upload) -> None:
        """Let the upload's end be traced before the response's beginning, where that is the order."""
        while not upload.reported and not self._answered:
            received = await self._wait()
            if received is not None:
                self._feed(received)

    async def _receive_final_head(self) -> Head:
        for _ in range(MAX_INFORMATIONAL + 1):
            head = await self._next_head()
            if head.status >= 200 or head.status == 101:
                self._response_begun = True
                if self._upload is not None:
                    self._upload.answered()
                return head
            if head.status == 100 and self._upload is not None:
                self._upload.go_ahead.set()
            name = self.points.receive_informational_response
            await traced(self._tracer, name, self._info(), self._show, head)
        raise RemoteProtocolError(f"the server sent more than {MAX_INFORMATIONAL} informational responses")

    async def _show(self, head: Head) -> Any:
        callback = self._prepared.request.extensions.get("informational")
        if callback is not None:
            await call_async("the informational extension", callback, head.status, head.headers)
        return self._traced_head(head)

    # -- The response's body.

    @property
    def request(self) -> Request:
        """The request, as the caller made it."""
        return self._prepared.request

    @property
    def response_complete(self) -> bool:
        """Whether the response was read to its end, or handed over."""
        return self._response_complete

    @property
    def is_open(self) -> bool:
        """Whether the response is to be read or closed still, as its connection has not come to its end.

        A response that was read is open as long as it is answered before its request was sent whole.
        """
        if self._closed or (self._response_complete and (self._done or self._handed_over)):
            return False
        return self._failure is None and not self._connection.will_close

    @property
    def is_sending(self) -> bool:
        """Whether the request's body is still being sent."""
        return self._upload is not None and not self._upload.done.is_set()

    def give_up_soon(self) -> None:
        """Let Trio end the exchange. It can be called from any thread, and in the middle of anything."""
        with contextlib.suppress(trio.RunFinishedError):
            self._connection.trio_token.run_sync_soon(self._give_up)

    def _give_up(self) -> None:
        self._finish(clean=self._response_complete)
        if self._upload is not None:
            self._upload.give_up()

    async def collect(self) -> bytes:
        """Read what is left of the body, and close, but for a stream that was handed over."""
        chunks = []
        try:
            while (chunk := await self.read(checkpoint=False)) is not None:
                chunks.append(chunk)
        finally:
            if not self._handed_over:
                await self._close()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def read(self, *, checkpoint: bool) -> bytes | None:
        """Receive the next piece of the body.

        Args:
            checkpoint: Whether this is a checkpoint even if it does not have to wait.

        Returns:
            Some bytes, or None at the end.
        """
        if self._left_early:
            raise ReadError("the response was closed before its body was read")
        if self._response_complete:
            if checkpoint:
                await trio.lowlevel.checkpoint()
            return None
        tracer = self._tracer
        if tracer is None:
            return await self._read_chunk(checkpoint)
        name = self.points.receive_response_body
        if not self._reading_body:
            self._reading_body = True
            await tracer.report(f"{name}.started", self._info())
        try:
            chunk = await self._read_chunk(checkpoint)
        except BaseException as exc:
            self._reading_body = False
            await tracer.report(f"{name}.failed", {"exception": exc})
            raise
        if chunk is None:
            await tracer.report(f"{name}.complete", {"return_value": None})
        return chunk

    async def _read_chunk(self, checkpoint: bool) -> bytes | None:
        if self._busy:
            raise trio.BusyResourceError("another task is reading this body")
        self._busy = True
        try:
            return await self._next_chunk(checkpoint)
        except Exception as exc:
            # Whatever went wrong, it goes on being wrong. A cancelled read, in contrast, can be
            # taken up again.
            self._finish(clean=False)
            self._let_go_of_failure()
            if self._left_early and isinstance(exc, ReadError):
                raise ReadError("the response was closed while its body was being read") from None
            raise
        finally:
            self._busy = False

    def _end_response(self, trailers: HeaderList) -> None:
        self._response_complete = True
        self._trailers.extend(trailers)
        if not self.is_sending:
            self._finish()

    # -- The end.

    @trio.lowlevel.enable_ki_protection
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
            await traced(self._tracer, self.points.response_closed, self._closing_info(), self._settle)
        finally:
            await self._end()
        await self._trace_closing()

    def _closing_info(self) -> dict[str, Any]:
        return {}

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

    async def _abandon(self) -> None:
        self._closed = True
        self._finish(clean=False)
        await self._end()

    async def _end(self) -> None:
        upload = self._upload
        self._finish()
        if upload is not None:
            await upload.join()
            if not upload.done.is_set():
                # It is the iterator that closes the response.
                upload.give_up()
            elif not upload.reported:
                await self._report_upload(upload)

    def _finish(self, *, clean: bool = True) -> None:
        """Give the connection back, as one that can go on as if nothing had been if that is so."""
        if not self._done:
            self._done = True
            clean = clean and self._is_clean()
            if self._upload is not None and not clean:
                self._upload.cancel()
            self._release(clean=clean)

    def _let_go_of_failure(self) -> None:
        """Keep a copy of the failure, since the traceback of the one that is raised leads to the exchange."""
        if self._failure is not None:
            self._failure = copied(self._failure)

    async def _trace_closing(self) -> None:
        """Let the trace show that the connection did not outlive the exchange."""
        tracer = self._tracer and self._tracer.without_log()
        if tracer is not None and self._was_last:
            info = {"connection": self._connection}
            await traced(tracer, "connection.close", info, self._connection.closed.wait)


class ResponseBody(CollectableStream):
    """The body of a response: an asynchronous iterator of bytes.

    Args:
        exchange: Where it comes from.
    """

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange[Any]) -> None:
        self._exchange = exchange

    @property
    def ended(self) -> bool:
        """Whether it was read to its end."""
        return self._exchange.response_complete

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    # These are coroutine functions, so that the body stays alive while they are awaited.

    @trio.lowlevel.enable_ki_protection
    async def __anext__(self) -> bytes:
        try:
            chunk = await self._exchange.read(checkpoint=True)
        except ExchangeError as exc:
            drop_own_frames(exc)
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def collect(self) -> bytes:
        """Read what is left of the body, and close, but for a stream that was handed over."""
        return await self._exchange.collect()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the response; what was not read of it is given up."""
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
