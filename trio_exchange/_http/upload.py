"""The upload of a body, in a task of its own, while the exchange waits for the response.

Theory of operation. A server may answer before it has read the whole request, never read the rest, or answer
piece by piece as it reads. So one task sends while another waits for the response. The upload reports its
outcome only through its attributes and by interrupting the exchange's wait. The exchange raises the errors
of the user's iterator, in the requester's task. The timeouts:

- Until the response begins, the write timeout limits each send. The read timeout starts when the upload
  has ended.
- Once the response has begun, a failure to send no longer matters, sends have no limit, and the read timeout
  applies. A send in flight is not cancelled before the response was read, since under TLS that would make
  reading impossible.
"""

from __future__ import annotations

import math
from typing import Any

import trio

from .._content import check_chunk
from .._exceptions import WriteError, WriteTimeout, without_frames
from .message_stream import MessageStream
from .request import END_OF_BODY, RequestContext, next_chunk

# A large body is sent in pieces of this size, so that the write timeout measures progress.
_SEND_SIZE = 256 * 1024
# Other tasks run at least after so many bytes, where sending a piece costs as much as so many more bytes.
_TURN_SIZE = 256 * 1024
_COST_OF_PIECE = 32 * 1024


class _SendingFailed(Exception):
    """The network failed; `failure` has the error. This never comes from the content's iterator."""


class Upload:
    """The task that sends a body, and its outcome for the exchange.

    Args:
        context: The request.
        stream: The stream to send the content on.
        continue_timeout: Seconds to wait for `100 (Continue)`, if the request expects it.

    Attributes:
        done: Set when the task has ended.
        succeeded: Whether the body was sent to its last byte, and the task has ended.
        error: The exception that the user's iterator raised, or the error that its content caused, such as
            a `LocalProtocolError` for a wrong length.
        failure: The reason why the network did not take the whole body.
        reported: Whether the exchange has taken the outcome or ignores it.
        wake: The scope of the exchange's wait. The upload cancels it when the task ends.
        go_ahead: Set when the body may be sent.
    """

    def __init__(
        self,
        context: RequestContext,
        stream: MessageStream,
        *,
        continue_timeout: float,
    ) -> None:
        self._context = context
        self._stream = stream
        self._write_timeout = context.timeouts.write
        self._continue_timeout = continue_timeout
        self._send_scope = trio.CancelScope()
        # How much of `_TURN_SIZE` is left.
        self._turn = 0
        # Shielded, so that only `cancel` ends the task. Otherwise it could end without setting `done`.
        self._scope = trio.CancelScope(shield=True)
        # The content's iterator, which runs in this task, may close the response.
        self._task: trio.lowlevel.Task | None = None
        self.go_ahead = trio.Event()
        self.done = trio.Event()
        self.succeeded = False
        self.error: BaseException | None = None
        self.failure: WriteError | WriteTimeout | None = None
        self.reported = False
        self.wake = trio.CancelScope()
        if not context.prepared.expects_continue:
            self.go_ahead.set()

    async def run(self) -> None:
        """Run the task. It raises only a KeyboardInterrupt, and only if no exchange will raise it."""
        self._task = trio.lowlevel.current_task()
        try:
            with self._scope:
                try:
                    await self._send_body()
                finally:
                    await self._context.body.close()
            if self._scope.cancelled_caught:
                self.failure = WriteError("sending the body was given up")
            else:
                self.succeeded = True
        except _SendingFailed:
            pass
        except BaseException as exc:
            if not self.reported:
                self.error = exc
            elif isinstance(exc, KeyboardInterrupt):
                raise
        finally:
            # The failure's frames and the stream refer to the upload or to its exchange.
            if self.failure is not None:
                without_frames(self.failure)
            del self._stream
            self.done.set()
            self.wake.cancel()

    async def _send_body(self) -> None:
        if not self.go_ahead.is_set():
            with trio.move_on_after(self._continue_timeout):
                await self.go_ahead.wait()
            self.go_ahead.set()
        content = self._context.prepared.body
        if content is not None:
            await self._send_chunk(content)
        else:
            iterator = self._context.body.iterate()
            while (chunk := await next_chunk(iterator)) is not END_OF_BODY:
                await self._send_chunk(chunk)
        await self._send_piece(None)

    async def _send_chunk(self, chunk: Any) -> None:
        check_chunk(chunk)
        view = memoryview(bytes(chunk) if isinstance(chunk, memoryview) else chunk)
        for start in range(0, len(view) or 1, _SEND_SIZE):
            await self._send_piece(view[start : start + _SEND_SIZE])

    async def _send_piece(self, piece: memoryview | None) -> None:
        # An iterator that never waits would otherwise keep other tasks from running.
        if self._turn > 0:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
            self._turn = _TURN_SIZE
        self._turn -= _COST_OF_PIECE + (0 if piece is None else len(piece))
        if self._write_timeout is None:
            await self._send(piece)
            return
        with trio.CancelScope() as self._send_scope:
            self._restart_timeout()
            await self._send(piece)
        if self._send_scope.cancelled_caught:
            self.failure = WriteTimeout(f"the server accepted no data within {self._write_timeout} seconds")
            raise _SendingFailed

    async def _send(self, piece: memoryview | None) -> None:
        try:
            if piece is None:
                await self._stream.send_end()
                return
            while True:
                piece = piece[await self._stream.send_data(piece) :]
                if not piece:
                    return
                self._restart_timeout()
        except WriteError as exc:
            self.failure = exc
            raise _SendingFailed from exc

    def _restart_timeout(self) -> None:
        """Restart the write timeout, since the server has accepted data."""
        if self._write_timeout is not None:
            self._send_scope.deadline = trio.current_time() + self._write_timeout

    def take_outcome(self) -> tuple[BaseException | None, WriteError | WriteTimeout | None]:
        """Return `error` and `failure`, and drop them: once raised, their tracebacks refer to the upload."""
        self.reported = True
        error, self.error = self.error, None
        failure, self.failure = self.failure, None
        return error, failure

    def answered(self) -> None:
        """Lift the limits on sending, since the response has begun."""
        self._write_timeout = None
        self._send_scope.deadline = math.inf
        if not self.go_ahead.is_set():
            # The server answered instead of asking for the body (RFC 9110, 10.1.1).
            self.cancel()

    def cancel(self) -> None:
        """End the task."""
        self._scope.cancel()

    def give_up(self) -> None:
        """End the task, and ignore its outcome."""
        self.reported = True
        self.cancel()

    async def join(self) -> None:
        """End the task, and wait for its end unless it is the calling task."""
        self.cancel()
        if trio.lowlevel.current_task() is not self._task:
            with trio.CancelScope(shield=True):
                await self.done.wait()
