"""The output queue of an HTTP/2 connection.

Theory of operation. Any task adds bytes, in synchronous steps, so that they leave in the order in which they
were made. Without TLS, the bytes of a lone request that the socket accepts are sent at once. The writer sends
all others in its own task. That task runs after the tasks that are about to run now, so one system call sends
all that they have added. It is not cancelled while it sends, since a torn frame would make all later bytes
useless.
"""

from __future__ import annotations

import trio

from ..._connect.transport import Transport, explain
from ..._exceptions import WriteError, WriteTimeout, copied, without_frames
from ..._timeouts import timed
from .wakeup import Wakeup

# Bytes in the queue above which streams may add no more DATA.
HIGH_WATER = 64 * 1024
# The most bytes of answers to a server that does not read them.
_MOST_ANSWERS = 256 * 1024
# Seconds that a send in flight may still take once the connection is marked for closing.
_LAST_SEND = 0.5


class OutboundQueue:
    """Sends bytes in the order in which they are added.

    Args:
        transport: The transport below the connection.
        stream: The stream to send on: the transport itself, or TLS over it.
        closing: Set when the connection is marked for closing. The queue accepts no more bytes then.

    Attributes:
        failure: The error that ended sending, or None.
    """

    def __init__(self, transport: Transport, stream: trio.abc.Stream, closing: trio.Event) -> None:
        self.failure: WriteError | None = None
        self._transport = transport
        self._stream = stream
        self._closing = closing
        self._plain = stream is transport
        self._waiting = bytearray()
        # The number of bytes in answer to the server alone, since the queue was last empty.
        self._answers = 0
        # The tasks that wait for room in the queue or for one of the server's windows.
        self._progress = trio.lowlevel.ParkingLot()
        # The writer's state: the number of bytes it is sending, the scope of that send, and its wakeup.
        self._in_flight = 0
        self._sending = trio.CancelScope()
        self._writable = Wakeup()

    # -- Called by any task.

    @property
    def accepts(self) -> bool:
        """Whether the queue still takes bytes to send."""
        return self.failure is None and not self._closing.is_set()

    @property
    def size(self) -> int:
        """The number of bytes that wait to be sent."""
        return self._in_flight + len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether streams must wait before they add data."""
        return self.size > HIGH_WATER

    @property
    def is_contended(self) -> bool:
        """Whether other tasks wait to send."""
        return bool(self._progress)

    def add(self, data: bytes, *, gather: bool) -> None:
        """Send `data` at once if possible, else queue it for the writer. A failed send sets `failure`.

        Args:
            data: The bytes to send.
            gather: Whether to queue `data` anyway, since other tasks are about to add more.
        """
        if not gather and self._plain and not self.size:
            sent = self._send_nowait(data)
            if sent == len(data) or self.failure is not None:
                return
            data = data[sent:]
        self._waiting += data
        self._writable.set()

    def _send_nowait(self, data: bytes | memoryview) -> int:
        """Send what the kernel accepts at once, and return how many bytes. A failure sets `failure`."""
        try:
            return self._transport.send_nowait(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._fail(exc)
            return 0

    def add_answers(self, size: int) -> bool:
        """Count bytes that were added in answer to the server.

        Returns:
            Whether their number is still within the limit.
        """
        self._answers += size
        return self._answers <= _MOST_ANSWERS

    async def wait_for_progress(self) -> None:
        """Wait for the next change that may allow more to be sent."""
        await self._progress.park()

    def wake_senders(self) -> None:
        """Wake the tasks that wait to send, so that they check again whether they can."""
        self._progress.unpark_all()

    async def drained(self, timeout: float | None) -> None:
        """Wait until the queue is no longer full. This is a checkpoint only if it has to wait.

        Raises:
            WriteTimeout: The queue stayed full for more than `timeout` seconds.
        """
        if self.is_full:
            await timed(timeout, WriteTimeout, self._wait_until_drained)

    async def _wait_until_drained(self) -> None:
        while self.is_full and not self._closing.is_set():
            await self._progress.park()

    # -- Called by the writer's task.

    async def run(self) -> None:
        """Send the queued bytes until sending fails or the connection is marked for closing."""
        while self.failure is None:
            if not self._waiting:
                await self._writable.wait()
                continue
            if self._closing.is_set():
                return
            data, self._waiting = self._waiting, bytearray()
            if not await self._send(data):
                return
            if not self._waiting:
                self._answers = 0
            self._progress.unpark_all()

    async def _send(self, data: bytearray) -> bool:
        """Send `data`, and return whether that has ended, with or without success."""
        if self._plain:
            with memoryview(data) as view:
                sent = self._send_nowait(view)
            if sent == len(data) or self.failure is not None:
                return True
            del data[:sent]
        self._in_flight = len(data)
        try:
            # Cancelling the send would tear a frame, and no GOAWAY could follow it.
            with trio.CancelScope(shield=True) as self._sending:
                await self._stream.send_all(data)
            if self._transport.send_error is not None:
                raise copied(self._transport.send_error)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._fail(exc)
        if self._sending.cancelled_caught:
            return False
        self._in_flight = 0
        return True

    def _fail(self, exc: trio.BrokenResourceError | trio.ClosedResourceError) -> None:
        self.failure = WriteError(explain(exc))
        self.failure.__cause__ = without_frames(exc)
        self._waiting.clear()
        self._writable.set()
        self._progress.unpark_all()

    # -- Called by the connection's task when it closes.

    def hurry(self) -> None:
        """Limit the send in flight to `_LAST_SEND` seconds from now."""
        self._sending.deadline = trio.current_time() + _LAST_SEND

    def take_rest(self) -> bytes | None:
        """Return and drop the queued bytes, to be sent with the GOAWAY. None if nothing more can be sent."""
        if self.failure is not None or self._in_flight:
            return None
        rest, self._waiting = self._waiting, bytearray()
        return bytes(rest)
