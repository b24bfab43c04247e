"""An HTTP/2 connection, which any number of streams share.

Theory of operation. Three kinds of tasks meet in an `HTTP2Connection`:

- the *reader* passes received frames to h2 or to the streams, and never waits for a stream;
- the *writer* sends the bytes that are not sent at once: those of several requests, all bytes over TLS, and
  what the kernel did not accept (`outbound`);
- the *requesters'* tasks run the exchanges and their uploads.

All of them change the state of h2 only in synchronous steps, and then call `flush`. Only a trace handler is
awaited between the two. So bytes leave in the order in which h2 made them, and a cancelled request can't
tear a frame. Opening a stream allocates its id and makes its HEADERS in one such step, since ids must
appear on the wire in ascending order.

*Resets.* If an exchange ends before both sides of its stream have ended, the stream is reset, and its place
is free at once. Frames that still arrive for it are dropped, and their data is credited to the connection
(`reset_ledger`, `receive_windows`).

*The end.* A connection that received GOAWAY, or has no stream ids left, is *draining*: its capacity is 0
and it closes after its last stream. When the connection fails, every stream gets an error of its own. After
a failed send, the reader runs for another moment: a GOAWAY from the server often gives the reason, and tells
which requests the server has not acted on.

*Bounds.* Data waits for the server's windows and for the output to drain. `_receive` limits the bytes that
are sent in answer to the server alone. `FloodGuard` limits the frames that serve no request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import h2.events
import h2.exceptions
import hpack
import trio
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from ..._connect.attempt import Established
from ..._connect.transport import Readiness, explain
from ..._exceptions import ExchangeError, ReadError, RemoteProtocolError, without_frames
from ..._fields import HeaderList
from ..._models import Response
from ..._urls import Origin, with_tls
from ..connection import HTTPConnection, Owner, Settings
from ..exchange import Exchange
from ..message_stream import CLOSED
from ..request import RequestContext
from .framer import RequestFramer
from .frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    SETTINGS,
    FloodGuard,
    Frame,
    FrameSplitter,
    Violation,
    content_of,
    fragment_of,
    name_of,
    parse_goaway,
    window_update,
)
from .h2_internals import (
    end_stream_remotely,
    forget_stream,
    highest_stream_id,
    limit_header_table,
    new_connection,
)
from .header_compression import BlockDecoder, DecodedBlock
from .outbound import OutboundQueue
from .receive_windows import CONNECTION_WINDOW, INITIAL_WINDOW, ConnectionWindow
from .reset_ledger import ResetLedger
from .stream import HTTP2Stream

# The most bytes of one receive. Larger receives do not make downloads faster.
RECEIVE_SIZE = 64 * 1024
# The most streams open at once, even if the server allows more: each may fill its receive window.
_MOST_STREAMS = 1000
_LAST_STREAM_ID = 2**31 - 1
# The most bytes of the encoder's dynamic table (RFC 7541, 4.2).
_HEADER_TABLE_SIZE = 4096
_RESETS_READ = b"resets?!"
# The most times to receive again after a full buffer, before other tasks run.
_MOST_TURNS = 3
# Seconds for which reading continues after sending has failed.
_LAST_WORDS = 1.0


class HTTP2Connection(HTTPConnection):
    """A connection that speaks HTTP/2, with as many concurrent exchanges as the server allows."""

    http_version = "HTTP/2"
    multiplexed = True

    def __init__(self, established: Established, origin: Origin, settings: Settings, owner: Owner) -> None:
        super().__init__(established, origin, settings, owner)
        # Shared by all tasks, in synchronous steps.
        self._h2 = new_connection(
            initial_window=INITIAL_WINDOW,
            connection_window=CONNECTION_WINDOW,
            max_header_bytes=settings.max_header_bytes,
        )
        self._framer = RequestFramer(self._h2)
        self._decoder = BlockDecoder(self._h2.decoder)
        self._close_requested = trio.Event()
        self.outbound: OutboundQueue = OutboundQueue(self.transport, self.stream, self._close_requested)
        self._resets = ResetLedger()
        # By id. A stream takes its place before it is opened, and keeps it until its exchange has ended.
        self._streams: dict[int, HTTP2Stream] = {}
        self._places_taken = 0
        self._draining = False
        self._failure: ExchangeError | None = None
        # The reader's state.
        self.settings_received: trio.Event = trio.Event()
        secure = with_tls(origin)
        self._splitter = FrameSplitter(None if secure is None else str(secure))
        self._window = ConnectionWindow()
        self._flood_guard = FloodGuard(trio.current_time())
        self._last_received = trio.current_time()
        # The fragments of an incomplete header block, and whether the block ends its stream.
        self._block: list[bytes] = []
        self._block_ends_stream = False
        # A description of the server's GOAWAY, for the error message when the server closes the connection.
        self._farewell = ""
        # Set by the reader for the connection's task: h2 already holds the GOAWAY for a violation.
        self._goaway_made = False

    def _details(self) -> tuple[str, ...]:
        streams = "1 stream" if self._places_taken == 1 else f"{self._places_taken} streams"
        return (streams, *super()._details())

    # -- Called by the pool.

    def readiness(self) -> Readiness:
        """Ask the kernel about a connection without exchanges. The reader watches all others."""
        if self.will_close or self._draining:
            return Readiness.CLOSED
        if self._places_taken:
            return Readiness.QUIET
        readiness = self.transport.peek()
        if readiness is Readiness.CLOSED:
            self._fail(self._closed_by_server())
        return readiness

    async def still_open(self) -> bool:
        """Let the reader process what has arrived, and return whether the connection can still be used."""
        # The kernel is polled in the first turn of the scheduler, and the reader runs in the second.
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        return not (self.will_close or self._draining)

    def decline(self) -> None:
        """Return a grant: the connection takes no more requests, but it may still carry earlier ones."""
        self.owner.released(self)

    def exchange(self, context: RequestContext) -> Awaitable[Response]:
        """Send a request and receive the head of its response. Its end does not affect other requests."""
        self.requests += 1
        self._places_taken += 1
        return Exchange(self, HTTP2Stream(self, context), context).start()

    def _is_active(self) -> bool:
        return self._places_taken > 0

    def _end_exchanges(self) -> None:
        failure = self.failure
        self.settings_received.set()
        # The exchanges outlive the connection until their users close the responses.
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.connection_failed(failure)
        self.outbound.wake_senders()

    # -- The connection's tasks.

    def start(self) -> None:
        """Start the connection's task, which reads and writes."""
        self.owner.start_task(self)

    async def run(self) -> None:
        """Run the connection's task: serve until the connection is marked for closing, then close it."""
        try:
            await self._serve()
        finally:
            self.close_soon()
            await super().run()

    def _begin_closing(self) -> None:
        self._close_requested.set()

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read)
            nursery.start_soon(self._write)
            if self.settings.ping_interval is not None:
                nursery.start_soon(self._test, self.settings.ping_interval)
            try:
                await self._close_requested.wait()
            finally:
                self.outbound.hurry()
                nursery.cancel_scope.cancel()

    @trio.lowlevel.enable_ki_protection
    async def _read(self) -> None:
        receive: Callable[[int], Any] = (
            self.transport.receive_later if self._plain else self.stream.receive_some
        )
        try:
            while data := await receive(RECEIVE_SIZE):
                if self.will_close:
                    # A further violation would replace the error code of the pending GOAWAY.
                    return
                self._receive(bytes(data))
                self._receive_more(len(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            failure = ReadError(explain(exc))
            failure.__cause__ = exc
            self._fail(failure)
        else:
            self._fail(self._closed_by_server())

    @trio.lowlevel.enable_ki_protection
    async def _write(self) -> None:
        await self.outbound.run()
        if self.outbound.failure is not None:
            self._drain()
            await trio.sleep(_LAST_WORDS)
            self._fail(self.outbound.failure)

    @trio.lowlevel.enable_ki_protection
    async def _test(self, interval: float) -> None:
        """Send a PING after `interval` seconds of silence, and fail the connection without an answer."""
        while True:
            heard = self._last_received
            await trio.sleep_until(heard + interval)
            if self._last_received != heard:
                continue
            self._h2.ping(b"are you?")
            self.flush()
            await trio.sleep(self.settings.ping_timeout)
            if self._last_received == heard:
                self._fail(
                    ReadError(
                        f"the server did not answer a PING within {self.settings.ping_timeout:g} seconds"
                    )
                )
                return

    def _closed_by_server(self) -> ExchangeError:
        return RemoteProtocolError(f"the server {self._farewell}closed the connection")

    @property
    def failure(self) -> ExchangeError:
        """The reason why the connection was closed."""
        return self._failure or ReadError("the connection was closed")

    def _fail(self, failure: ExchangeError) -> None:
        """Mark the connection for closing because of `failure`, unless it already has a failure."""
        self._failure = self._failure or without_frames(failure)
        self.close_soon()

    async def _say_goodbye(self) -> None:
        rest = self.outbound.take_rest()
        if rest is None:
            return
        if not self._goaway_made:
            self._h2.close_connection()
        await self.stream.send_all(rest + self._h2.data_to_send())

    # -- Sending.

    def flush(self, *more: bytes | memoryview) -> None:
        """Send h2's pending bytes and then `more`, at once if possible, else by the writer.

        While the connection carries several requests, it leaves the bytes of all of them to the writer, which
        sends them in one system call.
        """
        if self.outbound.accepts:
            data = b"".join((self._h2.data_to_send(), *more))
            if data:
                self.outbound.add(data, gather=self._places_taken > 1)
                if self.outbound.failure is not None:
                    self._drain()

    # -- Called by streams.

    def open(self, stream: HTTP2Stream, headers: HeaderList, body: bytes, *, end_stream: bool) -> int | None:
        """Open a stream with the request's head and, if it is small, its whole body.

        Returns:
            The stream's id, or None if the connection takes no more requests.
        """
        if self.will_close or self._draining:
            return None
        stream_id = self._framer.open(headers, body, end_stream=end_stream)
        if stream_id is None:
            # The server has lowered its limit since the pool granted this request.
            return None
        self._streams[stream_id] = stream
        if stream_id + 2 > _LAST_STREAM_ID:
            self._drain()
        return stream_id

    def room(self, stream_id: int) -> int:
        """Return how many bytes of data a stream can send now, in one frame."""
        return 0 if self.outbound.is_full else self._framer.room(stream_id)

    def fits(self, size: int) -> bool:
        """Return whether a new stream can send `size` bytes of data at once."""
        return self._framer.fits(size)

    def send_data(self, stream_id: int, data: bytes | memoryview, *, end_stream: bool) -> None:
        """Send data that fits into the stream's `room`."""
        header = self._framer.data_header(stream_id, data, end_stream=end_stream)
        self._flood_guard.earn()
        self.flush(header, data)

    @property
    def extended_connect_enabled(self) -> bool:
        """Whether the server accepts extended CONNECT (RFC 8441, 3)."""
        return bool(self._h2.remote_settings.enable_connect_protocol)

    def leave(self, stream: HTTP2Stream, reset: ErrorCodes | None) -> None:
        """Remove a stream that has ended. The stream calls this once.

        Args:
            stream: The stream, which may never have been opened.
            reset: The error code to reset the stream with, or None if both sides have ended.
        """
        stream_id = stream.stream_id
        # Marking the connection for closing has already removed all streams.
        if stream_id is not None and not self.will_close:
            del self._streams[stream_id]
            if reset is None:
                self._framer.end(stream_id)
            else:
                self._reset(stream_id, reset, stream.window.receivable)
                self.flush()
        self._places_taken -= 1
        if self._draining and not self._places_taken:
            self.close_soon()
        self.owner.released(self)

    def _reset(self, stream_id: int, code: ErrorCodes, receivable: int) -> None:
        # The frame being processed may have ended the stream.
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            self._h2.reset_stream(stream_id, code)
        self._forget(stream_id, receivable)
        self._resets.count_reset()
        self._heed_resets()

    def _forget(self, stream_id: int, receivable: int) -> None:
        """Forget a stream, and expect frames that the server sent before it saw the reset."""
        forget_stream(self._h2, stream_id)
        self._resets.remember(stream_id, receivable)

    def _heed_resets(self) -> None:
        if self._resets.ask():
            self._h2.ping(_RESETS_READ)
        if self._resets.unread_beyond_limit:
            self._tell_capacity()

    def _take_ping_ack(self, event: h2.events.PingAckReceived) -> None:
        if event.ping_data == _RESETS_READ:
            self._resets.confirm()
            self._heed_resets()
            self._tell_capacity()

    def _tell_capacity(self) -> None:
        # Until the server's SETTINGS arrive, the connection carries one request at a time.
        if self.settings_received.is_set() and not self._draining:
            limit = min(self._framer.most_streams, _MOST_STREAMS)
            # At least one place stays available, even if the server never answers the PING.
            unread = min(self._resets.unread_beyond_limit, max(0, limit - 1))
            self.owner.capacity_changed(self, limit - unread)

    def _drain(self) -> None:
        """Take no more requests, and close after the last stream."""
        if not self._draining:
            self._draining = True
            self.owner.capacity_changed(self, 0)

    # -- Receiving.

    def _receive_more(self, size: int) -> None:
        """Receive what else has arrived, if `size` bytes filled the buffer, before other tasks wake.

        Other tasks have to run too, so the number of turns is limited.
        """
        turns = _MOST_TURNS
        while size == RECEIVE_SIZE and turns and not self.will_close:
            data = self.transport.receive_nowait(RECEIVE_SIZE) if self._plain else None
            if not data:
                # The end of the stream is found again by the next receive.
                return
            self._receive(data)
            size, turns = len(data), turns - 1

    def _receive(self, data: bytes) -> None:
        self._last_received = trio.current_time()
        closing = self._close_requested.is_set
        try:
            for frame in self._splitter.split(data, highest_stream_id(self._h2)):
                if frame.kind != DATA or not self._take_data(frame):
                    self._take_frame(frame)
                if closing():
                    return
            self._grant_credit()
            before = self.outbound.size
            self.flush()
            if not self.outbound.add_answers(self.outbound.size - before):
                raise Violation(ErrorCodes.ENHANCE_YOUR_CALM, "the server does not read what it asks for")
        except Violation as exc:
            # Drop all other pending bytes: from here on only the GOAWAY matters.
            self._h2.clear_outbound_data_buffer()
            self._h2.close_connection(exc.code)
            self._goaway_made = True
            failure = RemoteProtocolError(str(exc))
            failure.__cause__ = exc.__cause__
            self._fail(failure)

    def _grant_credit(self) -> None:
        increment = self._window.take_increment()
        if increment:
            self.flush(window_update(0, increment))

    def _take_frame(self, frame: Frame) -> None:
        if frame.kind == GOAWAY:
            self._take_goaway(frame)
            return
        if frame.kind not in (HEADERS, CONTINUATION) or self._receiver(frame.stream_id) is None:
            # The frame serves no request. The work for a SETTINGS frame grows with its settings.
            cost = 1 + frame.length // 6 if frame.kind == SETTINGS else 1
            self._flood_guard.spend(self._last_received, cost)
        # Extension frames are ignored here, since h2 would reject some ALTSVC frames.
        if frame.kind <= CONTINUATION and not self._take_fragment(frame):
            self._show_h2(frame.raw)

    def _receiver(self, stream_id: int) -> HTTP2Stream | None:
        """Return the stream with that id if it may receive heads, data and trailers, else None."""
        stream = self._streams.get(stream_id)
        return stream if stream is not None and stream.receives else None

    def _take_fragment(self, frame: Frame) -> bool:
        """Take a fragment of a header block for an exchange, bypassing h2.

        Returns:
            Whether the frame was taken.
        """
        if frame.kind == HEADERS and frame.stream_id in self._streams:
            self._block_ends_stream = bool(frame.flags & END_STREAM)
        elif not self._block:
            return False
        self._block.append(fragment_of(frame))
        if frame.flags & END_HEADERS:
            data, self._block = b"".join(self._block), []
            # Decode it even for a stream that was released: later blocks depend on the dynamic table.
            block: DecodedBlock = self._blaming_server(self._decoder.decode, data)
            # The request may have been cancelled between the fragments.
            stream = self._streams.get(frame.stream_id)
            if stream is not None and stream.state is not CLOSED:
                stream.take_block(block, ends=self._block_ends_stream)
                if self._block_ends_stream:
                    self._take_end(frame.stream_id, stream)
        return True

    def _take_end(self, stream_id: int, stream: HTTP2Stream) -> None:
        """End the server's side of a stream, unless the frame with the end caused a reset."""
        if stream.state is not CLOSED:
            end_stream_remotely(self._h2, stream_id)
            stream.take_end()

    def _take_data(self, frame: Frame) -> bool:
        """Take a DATA frame, bypassing h2, if its stream is known.

        Returns:
            Whether the frame was taken. h2 checks the others.
        """
        length = frame.length
        stream = self._streams.get(frame.stream_id)
        if stream is None or not stream.receives:
            if frame.stream_id not in self._resets:
                return False
            # Dropped data still counts for the connection's window (RFC 9113, 5.1). Data that the server
            # sent before it saw the reset does not count as a flood.
            self._window.use(length)
            if not self._resets.use(frame.stream_id, length):
                self._flood_guard.spend(self._last_received)
            return True
        self._window.use(length)
        ends = frame.flags & END_STREAM
        if length or ends:
            self._flood_guard.earn()
        else:
            self._flood_guard.spend(self._last_received)
        stream.take_data(content_of(frame), length)
        if ends:
            self._take_end(frame.stream_id, stream)
        return True

    def _show_h2(self, raw: bytes) -> None:
        for event in self._blaming_server(self._h2.receive_data, raw):
            take = _EVENTS.get(type(event))
            if take is not None:
                take(self, event)

    def _blaming_server(self, parse: Callable[..., Any], *args: Any) -> Any:
        """Call a parser of the server's bytes, and raise `Violation` for any exception."""
        try:
            return parse(*args)
        except h2.exceptions.ProtocolError as exc:
            compression = isinstance(exc.__cause__, hpack.HPACKError)
            code = ErrorCodes.COMPRESSION_ERROR if compression else exc.error_code
            raise Violation(code, f"the server broke HTTP/2: {exc}") from exc
        except hpack.HPACKError as exc:
            raise Violation(
                ErrorCodes.COMPRESSION_ERROR, f"the server sent a bad header block: {exc}"
            ) from exc
        except Exception as exc:
            # A bug in the parser, triggered by the server's bytes.
            raise Violation(
                ErrorCodes.PROTOCOL_ERROR, f"the server sent what can't be understood: {exc!r}"
            ) from exc

    def _take_goaway(self, frame: Frame) -> None:
        self._flood_guard.spend(self._last_received)
        goaway = parse_goaway(frame)
        self._drain()
        reason = f"sent GOAWAY ({name_of(goaway.code)}{_quoted(goaway.debug_data)})"
        self._farewell = f"{reason} and "
        for stream_id, stream in list(self._streams.items()):
            # A stream that was refused or has failed keeps its first error.
            if stream_id > goaway.last_stream_id and stream.state is not CLOSED:
                stream.refused(f"the server {reason} and has not acted on the request")
                self._forget(stream_id, stream.window.receivable)
        if not self._places_taken:
            self._fail(RemoteProtocolError(f"the server {reason}"))

    def _take_reset(self, event: h2.events.StreamReset) -> None:
        # h2 reports only streams that it knows, and it forgets a stream when this connection does.
        stream_id = event.stream_id or 0
        stream = self._streams[stream_id]
        self._framer.end(stream_id)
        stream.take_reset(event.error_code or 0, by_server=event.remote_reset)

    def _take_settings(self, event: h2.events.RemoteSettingsChanged) -> None:
        for code in event.changed_settings:
            if not isinstance(code, SettingCodes):
                # Unknown settings are ignored (RFC 9113, 6.5.2). h2 would store all of them.
                del self._h2.remote_settings[code]
        if SettingCodes.HEADER_TABLE_SIZE in event.changed_settings:
            limit_header_table(self._h2, _HEADER_TABLE_SIZE)
        self._framer.take_settings()
        first = not self.settings_received.is_set()
        self.settings_received.set()
        if first or SettingCodes.MAX_CONCURRENT_STREAMS in event.changed_settings:
            self._tell_capacity()
        self.outbound.wake_senders()

    def _take_window(self, _: h2.events.WindowUpdated) -> None:
        self.outbound.wake_senders()


_EVENTS: dict[type, Callable[[HTTP2Connection, Any], None]] = {
    h2.events.StreamReset: HTTP2Connection._take_reset,
    h2.events.RemoteSettingsChanged: HTTP2Connection._take_settings,
    h2.events.WindowUpdated: HTTP2Connection._take_window,
    h2.events.PingAckReceived: HTTP2Connection._take_ping_ack,
}


def _quoted(debug_data: bytes) -> str:
    return f": {debug_data[:200]!r}" if debug_data else ""
