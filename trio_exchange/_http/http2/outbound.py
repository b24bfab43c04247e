"""What waits to be sent on a connection of HTTP/2.

Theory of operation. Any task adds bytes, in synchronous steps, so that they leave in the order in which they
were made. They are sent at once where that is possible without TLS, otherwise by the writer's task, which is
not cancelled while it sends: a torn frame would make everything after it useless.
"""

from __future__ import annotations

import trio

from ..._connect.transport import Transport, explain
from ..._exceptions import WriteError, WriteTimeout, copied, without_frames
from ..._timeouts import timed
from .wakeup import Wakeup

# How much may wait before data has to wait.
HIGH_WATER = 64 * 1024
# How much may wait in answer to a server that does not read it.
_MOST_ANSWERS = 256 * 1024
# Seconds that sending may go on when the connection is to be closed.
_LAST_SEND = 0.5


class OutboundQueue:
    """Sends bytes in the order in which they are added.

    Args:
        transport: The bottom of the connection.
        stream: What is sent on: the transport, or TLS on it.
        closing: Set when the connection is to be closed, from when on nothing more is accepted.

    Attributes:
        failure: Why sending failed.
    """

    def __init__(self, transport: Transport, stream: trio.abc.Stream, closing: trio.Event) -> None:
        self.failure: WriteError | None = None
        self._transport = transport
        self._stream = stream
        self._closing = closing
        self._waiting = bytearray()
        # Bytes made in answer to the server alone, since the queue was empty last.
        self._answers = 0
        # Wakes the tasks that wait for room here, or for a window of the server's.
        self._progress = trio.lowlevel.ParkingLot()
        # The writer's: how many bytes it is sending, in which scope, and what wakes it.
        self._in_flight = 0
        self._sending = trio.CancelScope()
        self._writable = Wakeup()

    # -- Any task.

    @property
    def accepts(self) -> bool:
        """Whether bytes that are added will be sent."""
        return self.failure is None and not self._closing.is_set()

    @property
    def size(self) -> int:
        """How many bytes wait to be sent."""
        return self._in_flight + len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether data has to wait."""
        return self.size > HIGH_WATER

    @property
    def is_contended(self) -> bool:
        """Whether other tasks wait to send."""
        return bool(self._progress)

    def add(self, data: bytes | memoryview) -> None:
        """Send `data`, now if this is possible, else soon. Failing sets `failure`."""
        if self._stream is self._transport and not self.size:
            try:
                sent = self._transport.send_nowait(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                self._fail(exc)
                return
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        self._waiting += data
        self._writable.set()

    def add_answers(self, size: int) -> bool:
        """Count bytes that were added in answer to the server. Whether it takes them as fast as it asks."""
        self._answers += size
        return self._answers <= _MOST_ANSWERS

    async def wait_for_progress(self) -> None:
        """Wait until more may be sent than before, for whatever reason."""
        await self._progress.park()

    def wake_senders(self) -> None:
        """Let the tasks that wait to send look again at how things are."""
        self._progress.unpark_all()

    async def drained(self, timeout: float | None) -> None:
        """Wait until not too much waits to be sent. It is a checkpoint only if it has to wait.

        Raises:
            WriteTimeout: It took more than `timeout` seconds.
        """
        if self.is_full:
            await timed(timeout, WriteTimeout, self._wait_until_drained)

    async def _wait_until_drained(self) -> None:
        while self.is_full and not self._closing.is_set():
            await self._progress.park()

    # -- The writer.

    async def run(self) -> None:
        """Send what can't be sent at once, until sending fails or the connection is to be closed."""
        while self.failure is None:
            if not self._waiting:
                await self._writable.wait()
                continue
            if self._closing.is_set():
                return
            data, self._waiting = self._waiting, bytearray()
            self._in_flight = len(data)
            try:
                # Not cancelled with the rest, which would tear a frame, so that no GOAWAY could follow.
                with trio.CancelScope(shield=True) as self._sending:
                    await self._stream.send_all(data)
                if self._transport.send_error is not None:
                    raise copied(self._transport.send_error)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                self._fail(exc)
            if self._sending.cancelled_caught:
                return
            self._in_flight = 0
            if not self._waiting:
                self._answers = 0
            self._progress.unpark_all()

    def _fail(self, exc: trio.BrokenResourceError | trio.ClosedResourceError) -> None:
        self.failure = WriteError(explain(exc))
        self.failure.__cause__ = without_frames(exc)
        self._waiting.clear()
        self._writable.set()
        self._progress.unpark_all()

    # -- The connection's task, at the end.

    def hurry(self) -> None:
        """Give up before long what is being sent."""
        self._sending.deadline = trio.current_time() + _LAST_SEND

    def take_rest(self) -> bytes | None:
        """Take what waits, to be sent with the GOAWAY; None if nothing can be sent any more."""
        if self.failure is not None or self._in_flight:
            return None
        rest, self._waiting = self._waiting, bytearray()
        return bytes(rest)
