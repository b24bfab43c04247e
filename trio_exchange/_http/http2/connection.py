"""HTTP/2: a connection, the exchanges that share it, and the tunnels that some of them become.

Theory of operation. Three kinds of tasks meet in an `HTTP2Connection`:

- its *reader* hands what arrives to h2, and what h2 makes of it to the exchanges, without ever waiting for
  one of them;
- its *writer* sends what could not be sent at once, and everything where there is TLS;
- the *requesters'* tasks run the exchanges, and their uploads.

All of them change the state of h2 in synchronous steps only, and then `flush`, before which nothing but a
trace handler is awaited. So bytes leave in the order in which h2 made them, and a cancelled request can't
tear a frame. To open a stream, allocating its id and making its HEADERS are one such step, since ids must
appear on the wire in their order.

*Exchanges.* The reader puts heads, data and the end into an exchange's `_inbox` and wakes it. A
stream whose sides have not both ended when its exchange does is reset, and its place is free at once. What
still arrives for it is dropped, and credited to the connection.

*Flow control.* The connection's window is opened again as soon as data has arrived, whoever it is for, so
that no stream can block others. A stream's window is opened as its user takes the data, so that an unread
body holds at most one window; it grows while the user keeps up, so that a fast reader isn't held
down over a link with latency.

*The end.* A connection that was told to go away, or has no stream ids left, is *draining*: its capacity is 0
and it closes after its last exchange. When it fails every exchange gets an error of its own. After
a failed send, reading goes on for a moment: the server's last words often say why, and which requests it has
not acted on.

*Bounds.* Data waits for the server's windows and for the output to drain; what is sent in answer to the
server alone is limited in `_receive`, and what a server may say to no purpose by `Patience`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import hpack
import trio
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2.stream import StreamClosedBy, StreamInputs

from ..._connect.attempt import Connection
from ..._connect.transport import RECEIVE_SIZE, Readiness, explain
from ..._exceptions import (
    ExchangeError,
    ReadError,
    RemoteProtocolError,
    WriteError,
    WriteTimeout,
    copied,
    without_frames,
)
from ..._fields import HeaderList
from ..._models import Response
from ..._timeouts import timed
from ..._urls import Origin, with_tls
from ..connection import HTTPConnection, Owner, Settings
from ..exchange import Exchange
from ..message_stream import StreamState
from ..request import RequestContext
from .flow_control import CONNECTION_WINDOW, INITIAL_WINDOW, ConnectionWindow
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
from .stream import HTTP2Stream
from .wakeup import Wakeup

# How much may wait to be sent before data has to wait.
_HIGH_WATER = 64 * 1024
# How much may wait to be sent in answer to a server that does not read it.
_MOST_ANSWERS = 256 * 1024
# The largest frame of data sent, whatever the server allows: others want to be sent too.
_MOST_IN_FRAME = 64 * 1024
# How many streams are opened at once, however many the server allows: h2 counts them one by one.
_MOST_STREAMS = 1000
_LAST_STREAM_ID = 2**31 - 1
# How large the table of headers sent before may become (RFC 7541, 4.2).
_HEADER_TABLE_SIZE = 4096
# How many of the streams left early are remembered, for what still arrives on them.
_MOST_LEFT = 1000
# How many resets a server may not have read yet before each counts as a stream that is still open. To one
# that reads hundreds of requests and their resets at once, the client looks like an attacker.
_MOST_UNREAD_RESETS = 10
_RESETS_READ = b"resets?!"
# How long sending may go on when the connection is to be closed.
_LAST_SEND = 0.5
# How long reading goes on when nothing can be sent any more.
_LAST_WORDS = 1.0


class HTTP2Connection(HTTPConnection):
    """A connection that speaks HTTP/2, as many exchanges at a time as the server allows."""

    http_version = "HTTP/2"

    def __init__(self, connection: Connection, origin: Origin, settings: Settings, owner: Owner) -> None:
        super().__init__(connection, origin, settings, owner)
        self._h2 = _new_h2(settings)
        self._exchanges = 0
        self._streams: dict[int, HTTP2Stream] = {}
        # Streams that were reset on this side, in the order of that, and how much may still arrive on each.
        self._left: dict[int, int] = {}
        # Resets that the server may not have read yet, and how many its answer to a PING will confirm.
        self._unread_resets = 0
        self._asked_for = 0
        self._draining = False
        # What the server has said of the reason why it closes the connection.
        self._farewell = ""
        self._failure: ExchangeError | None = None
        self._goaway_made = False
        self.settings_received: trio.Event = trio.Event()
        # The reader's.
        secure = with_tls(origin)
        self._splitter = FrameSplitter(None if secure is None else str(secure))
        # The pieces of an exchange's header block whose end is to come, and whether it ends the stream.
        self._block: list[bytes] = []
        self._block_ends_stream = False
        self._flood_guard = FloodGuard(trio.current_time())
        self._last_received = trio.current_time()
        self._window = ConnectionWindow()
        # What waits to be sent, how much the writer is sending, and who waits for that or for a window.
        self._outgoing = bytearray()
        self._in_flight = 0
        self._sending = trio.CancelScope()
        self._answers = 0
        self._send_failure: WriteError | None = None
        self._writable = Wakeup()
        self._progress = trio.lowlevel.ParkingLot()

    def _details(self) -> tuple[str, ...]:
        streams = "1 stream" if self._exchanges == 1 else f"{self._exchanges} streams"
        return (streams, *super()._details())

    # -- What the pool does.

    def readiness(self) -> Readiness:
        """What the kernel knows of a connection without exchanges; others are being read anyway."""
        if self.will_close or self._draining:
            return Readiness.CLOSED
        if self._exchanges:
            return Readiness.QUIET
        readiness = self.transport.peek()
        if readiness is Readiness.CLOSED:
            self._fail(self._closed_by_server())
        return readiness

    async def still_open(self) -> bool:
        """Whether the connection can be used when the reader has read what has arrived."""
        # In the first turn the kernel is asked, in the second the reader has run.
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        return not (self.will_close or self._draining)

    def decline(self) -> None:
        """Give back a grant: the connection takes no more requests, but it may carry others."""
        self.owner.released(self)

    async def exchange(self, context: RequestContext) -> Response:
        """Send a request and receive the head of its response. However it ends, others don't notice."""
        self.requests += 1
        self._exchanges += 1
        return await Exchange(self, HTTP2Stream(self, context), context).start()

    def _is_active(self) -> bool:
        return self._exchanges > 0

    def _end_exchanges(self) -> None:
        failure = self.failure
        self.settings_received.set()
        # What the users do with the responses no longer concerns the connection.
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.connection_failed(failure)
        self._progress.unpark_all()

    # -- The connection's tasks.

    async def _live(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read)
            nursery.start_soon(self._write)
            if self.settings.ping_interval is not None:
                nursery.start_soon(self._test, self.settings.ping_interval)
            try:
                await self._close_requested.wait()
            finally:
                self._sending.deadline = trio.current_time() + _LAST_SEND
                nursery.cancel_scope.cancel()

    @trio.lowlevel.enable_ki_protection
    async def _read(self) -> None:
        receive: Callable[[int], Any] = (
            self.transport.receive_later if self._plain else self.stream.receive_some
        )
        try:
            while data := await receive(RECEIVE_SIZE):
                if self.will_close:
                    # Else a further violation would replace the code of the GOAWAY that is to be sent.
                    return
                self._receive(bytes(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            failure = ReadError(explain(exc))
            failure.__cause__ = exc
            self._fail(failure)
        else:
            self._fail(self._closed_by_server())

    @trio.lowlevel.enable_ki_protection
    async def _write(self) -> None:
        while self._send_failure is None:
            if not self._outgoing:
                await self._writable.wait()
                continue
            if self.will_close:
                return
            data, self._outgoing = self._outgoing, bytearray()
            self._in_flight = len(data)
            try:
                # Not cancelled with the rest, lest it tears a frame and no GOAWAY can follow.
                with trio.CancelScope(shield=True) as self._sending:
                    await self.stream.send_all(data)
                if self.transport.send_error is not None:
                    raise copied(self.transport.send_error)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                self._sending_failed(exc)
            if self._sending.cancelled_caught:
                return
            self._in_flight = 0
            if not self._outgoing:
                self._answers = 0
            self._progress.unpark_all()
        await trio.sleep(_LAST_WORDS)
        self._fail(self._send_failure)

    @trio.lowlevel.enable_ki_protection
    async def _test(self, interval: float) -> None:
        """Find out whether the server is alive when it has said nothing for a while."""
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
        """Why the connection was closed."""
        return self._failure or ReadError("the connection was closed")

    def _fail(self, failure: ExchangeError) -> None:
        """The connection has come to its end, and this is why."""
        self._failure = self._failure or without_frames(failure)
        self.close_soon()

    async def _say_goodbye(self) -> None:
        if self._send_failure is not None or self._in_flight:
            return
        if not self._goaway_made:
            self._h2.close_connection()
        await self.stream.send_all(bytes(self._outgoing) + self._h2.data_to_send())

    # -- Sending.

    def flush(self, more: bytes = b"") -> None:
        """Send what h2 has to say and then `more`, now if this is possible, else soon."""
        if self._send_failure is not None or self.will_close:
            return
        data: bytes | memoryview = self._h2.data_to_send() + more
        if not data:
            return
        if self._plain and not self.pending:
            try:
                sent = self.transport.send_nowait(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                self._sending_failed(exc)
                return
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        self._outgoing += data
        self._writable.set()

    @property
    def pending(self) -> int:
        """How many bytes wait to be sent."""
        return self._in_flight + len(self._outgoing)

    def _sending_failed(self, exc: trio.BrokenResourceError | trio.ClosedResourceError) -> None:
        self._send_failure = WriteError(explain(exc))
        self._send_failure.__cause__ = without_frames(exc)
        self._outgoing.clear()
        self._drain()
        self._writable.set()
        self._progress.unpark_all()

    async def wait_for_progress(self) -> None:
        """Wait until more may be sent than before, for whatever reason."""
        await self._progress.park()

    def wake_senders(self) -> None:
        """Let those who wait to send look again at how things are."""
        self._progress.unpark_all()

    async def drained(self, timeout: float | None) -> None:
        """Wait until not too much waits to be sent. It is a checkpoint only if it has to wait.

        Raises:
            WriteTimeout: It took more than `timeout` seconds.
        """
        if self.pending > _HIGH_WATER:
            await timed(timeout, WriteTimeout, self._wait_until_drained)

    async def _wait_until_drained(self) -> None:
        while self.pending > _HIGH_WATER and not self.will_close:
            await self._progress.park()

    # -- Streams, as exchanges use them.

    def open(self, stream: HTTP2Stream, headers: HeaderList, body: bytes, *, end_stream: bool) -> int | None:
        """Open a stream, with the request's head and, if it is small, all of its body.

        Returns:
            The stream's id, or None if the connection takes no more requests.
        """
        if self.will_close or self._draining:
            return None
        try:
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream_id, headers, end_stream=end_stream and not body)
        except h2.exceptions.TooManyStreamsError:
            # The server has lowered its limit since this was granted.
            return None
        self._streams[stream_id] = stream
        if body:
            self._h2.send_data(stream_id, body, end_stream=end_stream)
        if stream_id + 2 > _LAST_STREAM_ID:
            self._drain()
        return stream_id

    def room(self, stream_id: int) -> int:
        """How many bytes of data can be sent on a stream now, in one frame."""
        if self.pending > _HIGH_WATER:
            return 0
        window = self._h2.local_flow_control_window(stream_id)
        return max(0, min(window, self._h2.max_outbound_frame_size, _MOST_IN_FRAME))

    def fits(self, size: int) -> bool:
        """Whether a new stream can send so many bytes of data at once."""
        return size <= min(
            self._h2.outbound_flow_control_window,
            self._h2.remote_settings.initial_window_size,
            self._h2.max_outbound_frame_size,
        )

    def send_data(self, stream_id: int, data: bytes | memoryview, *, end_stream: bool) -> None:
        """Send data for which there is room."""
        self._h2.send_data(stream_id, data, end_stream=end_stream)
        self._flood_guard.earn()
        self.flush()

    def is_contended(self) -> bool:
        """Whether others wait to send."""
        return bool(self._progress)

    @property
    def extended_connect_enabled(self) -> bool:
        """Whether the server takes extended CONNECT (RFC 8441, 3)."""
        return bool(self._h2.remote_settings.enable_connect_protocol)

    def leave(self, stream: HTTP2Stream, reset: ErrorCodes | None) -> None:
        """A stream has ended. Called by it, once.

        Args:
            stream: Which; it may never have been opened.
            reset: How to reset the stream, None if it has ended by itself.
        """
        stream_id = stream.stream_id
        # Of a connection that is to be closed all streams have ended.
        if stream_id is not None and not self.will_close:
            del self._streams[stream_id]
            if reset is not None:
                self._reset(stream_id, reset, stream.window.receivable)
                self.flush()
        self._exchanges -= 1
        if self._draining and not self._exchanges:
            self.close_soon()
        self.owner.released(self)

    def _reset(self, stream_id: int, code: ErrorCodes, receivable: int) -> None:
        # It may have ended in the frame that is being worked on.
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            self._h2.reset_stream(stream_id, code)
        self._forget(stream_id, receivable)
        self._unread_resets += 1
        self._heed_resets()

    def _forget(self, stream_id: int, receivable: int) -> None:
        """Expect nothing more on a stream, and let what still comes do no harm."""
        # Were it kept, h2 would give up the connection for a late informational response, or for data: it
        # was not shown the head.
        closed_by = self._h2.streams.pop(stream_id).closed_by
        self._h2._closed_streams[stream_id] = closed_by or StreamClosedBy.SEND_RST_STREAM
        self._left[stream_id] = receivable
        if len(self._left) > _MOST_LEFT:
            del self._left[next(iter(self._left))]

    def _heed_resets(self) -> None:
        if self._unread_resets > _MOST_UNREAD_RESETS:
            if not self._asked_for:
                self._asked_for = self._unread_resets
                self._h2.ping(_RESETS_READ)
            self._tell_capacity()

    def _take_ping_ack(self, event: h2.events.PingAckReceived) -> None:
        if event.ping_data == _RESETS_READ:
            self._unread_resets -= self._asked_for
            self._asked_for = 0
            self._heed_resets()
            self._tell_capacity()

    def _tell_capacity(self) -> None:
        # Before the server has said how many it takes, it is asked one thing at a time.
        if self.settings_received.is_set() and not self._draining:
            limit = min(self._h2.remote_settings.max_concurrent_streams, _MOST_STREAMS)
            # One is always left, even if the server does not answer.
            unread = min(max(0, self._unread_resets - _MOST_UNREAD_RESETS), max(0, limit - 1))
            self.owner.capacity_changed(self, limit - unread)

    def _drain(self) -> None:
        """Take no more requests, and close after the last."""
        if not self._draining:
            self._draining = True
            self.owner.capacity_changed(self, 0)

    # -- Receiving.

    def _receive(self, data: bytes) -> None:
        self._last_received = trio.current_time()
        try:
            for frame in self._splitter.split(data, self._h2.highest_outbound_stream_id):
                self._take_frame(frame)
                if self.will_close:
                    return
            self._grant_credit()
            before = self.pending
            self.flush()
            self._answers += self.pending - before
            if self._answers > _MOST_ANSWERS:
                raise Violation(ErrorCodes.ENHANCE_YOUR_CALM, "the server does not read what it asks for")
        except Violation as exc:
            # What else there was to say is of no interest any more.
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
        if frame.kind == DATA and self._take_data(frame):
            return
        if frame.kind == GOAWAY:
            self._take_goaway(frame)
            return
        if frame.kind not in (HEADERS, CONTINUATION) or self._receiver(frame.stream_id) is None:
            # It serves no request. A SETTINGS frame is as much work as there are settings in it.
            cost = 1 + frame.length // 6 if frame.kind == SETTINGS else 1
            self._flood_guard.spend(self._last_received, cost)
        # Extensions are not used here, and h2 would be particular about ALTSVC.
        if frame.kind <= CONTINUATION and not self._take_fragment(frame):
            self._show_h2(frame.raw)

    def _receiver(self, stream_id: int) -> HTTP2Stream | None:
        """The stream with that id if it may receive heads, data and trailers."""
        stream = self._streams.get(stream_id)
        return stream if stream is not None and stream.receives else None

    def _take_fragment(self, frame: Frame) -> bool:
        """Take a piece of a header block past h2, where it is for an exchange."""
        if frame.kind == HEADERS and frame.stream_id in self._streams:
            self._block_ends_stream = bool(frame.flags & END_STREAM)
        elif not self._block:
            return False
        self._block.append(fragment_of(frame))
        if frame.flags & END_HEADERS:
            data, self._block = b"".join(self._block), []
            # Whoever it is for, since what it says of the table of headers holds for those that follow.
            block: HeaderList = self._blaming_server(self._h2.decoder.decode, data, True)
            # The request may have been given up between the pieces.
            stream = self._streams.get(frame.stream_id)
            if stream is not None and stream.state is not StreamState.CLOSED:
                stream.take_block(block, ends=self._block_ends_stream)
                if self._block_ends_stream:
                    self._take_end(frame.stream_id, stream)
        return True

    def _take_end(self, stream_id: int, stream: HTTP2Stream) -> None:
        """The server has ended a stream, unless it was reset for what came along with the end."""
        if stream.state is not StreamState.CLOSED:
            self._h2.streams[stream_id].state_machine.process_input(StreamInputs.RECV_END_STREAM)
            stream.take_end()

    def _take_data(self, frame: Frame) -> bool:
        """Take data past h2, where it is for a stream that h2 would not complain about."""
        stream = self._receiver(frame.stream_id)
        if stream is None:
            if frame.stream_id not in self._left:
                return False
            # It counts, though it is dropped (RFC 9113, 5.1). What was sent before the reset was seen is
            # no offence.
            self._window.use(frame.length)
            self._left[frame.stream_id] -= frame.length
            if not frame.length or self._left[frame.stream_id] < 0:
                self._flood_guard.spend(self._last_received)
            return True
        self._window.use(frame.length)
        ends = frame.flags & END_STREAM
        if frame.length or ends:
            self._flood_guard.earn()
        else:
            self._flood_guard.spend(self._last_received)
        stream.take_data(content_of(frame), frame.length)
        if ends:
            self._take_end(frame.stream_id, stream)
        return True

    def _show_h2(self, raw: bytes) -> None:
        for event in self._blaming_server(self._h2.receive_data, raw):
            take = _EVENTS.get(type(event))
            if take is not None:
                take(self, event)

    def _blaming_server(self, parse: Callable[..., Any], *args: Any) -> Any:
        """Call what takes the server's bytes apart."""
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
            # Bytes are all that it was given, so that whatever it is, they are at fault.
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
            # One that has been refused, or has failed, hears no more.
            if stream_id > goaway.last_stream_id and stream.state is not StreamState.CLOSED:
                stream.refused(f"the server {reason} and has not acted on the request")
                self._forget(stream_id, stream.window.receivable)
        if not self._exchanges:
            self._fail(RemoteProtocolError(f"the server {reason}"))

    def _take_reset(self, event: h2.events.StreamReset) -> None:
        # Streams that were left h2 does not know either.
        stream = self._streams[event.stream_id or 0]
        stream.take_reset(event.error_code or 0, by_server=event.remote_reset)

    def _take_settings(self, event: h2.events.RemoteSettingsChanged) -> None:
        for code in event.changed_settings:
            if not isinstance(code, SettingCodes):
                # Unknown ones are ignored (RFC 9113, 6.5.2); h2 would keep them all.
                del self._h2.remote_settings[code]
        if SettingCodes.HEADER_TABLE_SIZE in event.changed_settings:
            self._limit_header_table()
        first = not self.settings_received.is_set()
        self.settings_received.set()
        if first or SettingCodes.MAX_CONCURRENT_STREAMS in event.changed_settings:
            self._tell_capacity()
        self._progress.unpark_all()

    def _limit_header_table(self) -> None:
        """Use no more of what the server offers than it had to offer; every header is looked for in it."""
        encoder = self._h2.encoder
        encoder.header_table_size = min(encoder.header_table_size, _HEADER_TABLE_SIZE)
        # Of several changes, only the smallest and the last are to be told (RFC 7541, 4.2).
        last = encoder.header_table_size
        smallest = min(encoder.table_size_changes, default=last)
        encoder.table_size_changes = [smallest, last] if smallest < last else [last]
        # A size that is set twice is no change to hpack, which then forgets the first.
        encoder.header_table.resized = True

    def _take_window(self, _: h2.events.WindowUpdated) -> None:
        self._progress.unpark_all()


_EVENTS: dict[type, Callable[[HTTP2Connection, Any], None]] = {
    h2.events.StreamReset: HTTP2Connection._take_reset,
    h2.events.RemoteSettingsChanged: HTTP2Connection._take_settings,
    h2.events.WindowUpdated: HTTP2Connection._take_window,
    h2.events.PingAckReceived: HTTP2Connection._take_ping_ack,
}


def _new_h2(settings: Settings) -> h2.connection.H2Connection:
    """The state of a connection, with its first bytes ready to be sent."""
    config = h2.config.H2Configuration(
        client_side=True,
        header_encoding=None,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        validate_inbound_headers=False,
        normalize_inbound_headers=False,
    )
    connection = h2.connection.H2Connection(config)
    connection.local_settings = h2.settings.Settings(
        client=True,
        initial_values={
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.INITIAL_WINDOW_SIZE: INITIAL_WINDOW,
            SettingCodes.MAX_HEADER_LIST_SIZE: settings.max_header_bytes,
        },
    )
    connection.decoder.max_header_list_size = settings.max_header_bytes
    connection.initiate_connection()
    connection.increment_flow_control_window(CONNECTION_WINDOW - connection.inbound_flow_control_window)
    return connection


def _quoted(debug_data: bytes) -> str:
    return f": {debug_data[:200]!r}" if debug_data else ""
