"""The server's side of an HTTP/2 connection, controlled by a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from .._fields import Headers, HeaderTypes, to_headers
from ._http11 import PeerRequest, send_bytes

E = TypeVar("E", bound=h2.events.Event)

# A mapping's type of keys has no subtypes.
Settings: TypeAlias = Mapping[SettingCodes, int] | Mapping[int, int]

# The client's connection preface begins with it (RFC 9113, section 3.4).
_PREFACE_START = b"PRI * HTTP/2.0"

# The size of the frame's payload without debug data, and the type of GOAWAY (RFC 9113, section 6.8).
_GOAWAY_SIZE, _GOAWAY = 8, 7

_RECEIVE_SIZE = 65_536


class StreamReset(trio.BrokenResourceError):
    """The client has reset the stream."""


class HTTP2Peer(trio.abc.AsyncResource):
    """The server's side of one HTTP/2 connection, controlled by a test.

    h2 judges what the client sends: where the client violates RFC 9113, the method that receives raises a
    `h2.exceptions.ProtocolError`, which fails the test unless the script handles it. PING and SETTINGS are
    acknowledged as they are received.

    Iteration yields whole requests until the client closes the connection, without requests that the client
    has reset. To answer requests in another order or at once, receive some before answering, or answer each
    in a task of its own: several tasks may use the methods of one peer.

    Methods that take a stream accept a request or the number of its stream. While the client's flow-control
    windows are too small, a method that sends data receives until the client enlarges them.

    When a method that receives is cancelled, what it has received stays for the next one, but not what
    `receive_request` and `receive_body` have already put together. After any cancelled method an unknown part
    of what it had to send has been sent.

    Args:
        stream: The stream of the connection, after the TLS handshake if there is one, such as
            `ScriptedPeer.stream`.
        settings: The values of the SETTINGS frame that the connection begins with, by
            `h2.settings.SettingCodes`, in addition to those of h2. The first method that sends or receives
            sends the frame.

    Attributes:
        stream: The stream of the connection.
        h2: The state of the connection. Use it for what the peer has no method for, and then call `flush`.
        events: The events that h2 has reported and no method has returned yet, in order.
    """

    def __init__(self, stream: trio.abc.Stream, settings: Settings | None = None) -> None:
        self.stream: trio.abc.Stream = stream
        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self.h2: h2.connection.H2Connection = h2.connection.H2Connection(config)
        self.events: list[h2.events.Event] = []
        self._begun = False
        self._ended: set[int] = set()
        self._reset: dict[int, int] = {}
        self._client_left = False
        self._sending = trio.Lock()
        self._unsent = b""
        self._receiving = False
        self._received = trio.Event()
        self._initiate(settings or {})

    def _initiate(self, settings: Settings) -> None:
        if settings:
            # They hold without an acknowledgement, since the first frame has them.
            initial: Any = dict(settings)
            self.h2.local_settings = h2.settings.Settings(client=False, initial_values=initial)
            self.h2.max_inbound_frame_size = self.h2.local_settings.max_frame_size
        self.h2.initiate_connection()

    # -- Receiving.

    def __aiter__(self) -> AsyncIterator[PeerRequest]:
        return self

    async def __anext__(self) -> PeerRequest:
        while True:
            try:
                return await self.receive_request()
            except EOFError:
                raise StopAsyncIteration from None
            except StreamReset:
                continue

    async def receive_request(self) -> PeerRequest:
        """Receive a whole request.

        Returns:
            The request, with its body and its `stream_id`.

        Raises:
            EOFError: The client closed the connection before it sent another whole request.
            h2.exceptions.ProtocolError: The client violated the protocol.
            trio.BrokenResourceError: The client has reset the stream, or the connection broke.
        """
        request = await self.receive_head()
        body = await self.receive_body(request)
        self._check_open(request)
        return replace(request, body=body)

    async def receive_head(self) -> PeerRequest:
        """Receive the head of a request; then `receive_chunk` or `receive_body` receives its body.

        Returns:
            The request, with its `stream_id` and an empty body.

        Raises:
            EOFError: The client closed the connection before it sent another request.
            h2.exceptions.ProtocolError: The client violated the protocol.
            trio.BrokenResourceError: The connection broke.
        """
        event = await self.receive_event(h2.events.RequestReceived)
        headers = Headers((bytes(name), bytes(value)) for name, value in event.headers or ())
        # A CONNECT request has no path (RFC 9113, section 8.5).
        target = headers.get(b":path", headers.get(b":authority", b""))
        return PeerRequest(headers.get(b":method", b""), target, headers, stream_id=event.stream_id)

    async def receive_chunk(self, stream: PeerRequest | int) -> bytes:
        """Receive some bytes of the body of a request, or of a CONNECT tunnel, and return their credit.

        Args:
            stream: The request, or the number of its stream.

        Returns:
            The bytes; `b""` at the end of the body.

        Raises:
            EOFError: The client closed the connection.
            h2.exceptions.ProtocolError: The client violated the protocol.
            trio.BrokenResourceError: The client has reset the stream, or the connection broke.
        """
        stream_id = _id_of(stream)
        kinds = (h2.events.DataReceived, h2.events.StreamEnded, h2.events.StreamReset)
        while stream_id not in self._ended:
            event: Any = await self._next_event(kinds, stream_id)
            if isinstance(event, h2.events.StreamEnded):
                self._ended.add(stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self._check_open(stream)
            else:
                self.h2.acknowledge_received_data(event.flow_controlled_length, stream_id)
                await self.flush()
                if event.data:
                    return bytes(event.data)
        return b""

    async def receive_body(self, stream: PeerRequest | int) -> bytes:
        """Receive the rest of the body of a request.

        Args:
            stream: The request, or the number of its stream.

        Raises:
            EOFError: The client closed the connection.
            h2.exceptions.ProtocolError: The client violated the protocol.
            trio.BrokenResourceError: The client has reset the stream, or the connection broke.
        """
        chunks = []
        while chunk := await self.receive_chunk(stream):
            chunks.append(chunk)
        return b"".join(chunks)

    async def receive_event(self, kind: type[E], stream: PeerRequest | int | None = None) -> E:
        """Receive until h2 reports an event, such as `h2.events.StreamReset`.

        Events of other kinds stay in `events`, for other methods.

        Args:
            kind: The type of the event.
            stream: The request, or the number of its stream; None for any stream or none.

        Returns:
            The earliest event of this kind that no method has returned yet.

        Raises:
            EOFError: The client closed the connection before that.
            h2.exceptions.ProtocolError: The client violated the protocol.
            trio.BrokenResourceError: The connection broke.
        """
        return await self._next_event(kind, None if stream is None else _id_of(stream))

    async def _next_event(self, kinds: type[E] | tuple[type[E], ...], stream_id: int | None) -> E:
        while True:
            for index, event in enumerate(self.events):
                if isinstance(event, kinds) and stream_id in (None, getattr(event, "stream_id", None)):
                    del self.events[index]
                    return event
            if not await self.receive():
                raise EOFError("the client closed the connection")

    async def receive(self) -> bool:
        """Receive some bytes, add what they mean to `events`, and acknowledge them.

        If another task is receiving, wait until that has received.

        Returns:
            Whether the client may send more; False if it has closed the connection.

        Raises:
            h2.exceptions.ProtocolError: The client violated the protocol.
            trio.BrokenResourceError: The connection broke.
        """
        received = self._received
        # The client may be waiting for it.
        await self.flush()
        if self._receiving or received.is_set():
            await received.wait()
            return True
        self._receiving = True
        try:
            data = bytes(await self.stream.receive_some(_RECEIVE_SIZE))
            self._take(data)
        finally:
            self._receiving = False
            self._received.set()
            self._received = trio.Event()
        await self.flush()
        return bool(data)

    def _take(self, data: bytes) -> None:
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError as exc:
            if self._begun or data.startswith(_PREFACE_START[: len(data)]):
                raise
            raise h2.exceptions.ProtocolError(
                f"the client does not speak HTTP/2, but begins with {data[:32]!r}: give http2=True to the "
                "pool, and http1=False for http URLs, or alpn_protocols=['h2'] to the connector for https"
            ) from exc
        self._begun = True
        self._client_left = not data
        for event in events:
            self.events.append(event)
            if isinstance(event, h2.events.StreamReset):
                self._reset[event.stream_id or 0] = event.error_code or 0
            elif isinstance(event, h2.events.ConnectionTerminated):
                self._client_left = True

    # -- Sending.

    async def flush(self) -> None:
        """Send what the state in `h2` has to send.

        Raises:
            trio.BrokenResourceError: The client has closed the connection.
        """
        self._unsent += self.h2.data_to_send()
        if self._unsent:
            async with self._sending:
                # Another task may have sent it while this one waited.
                data, self._unsent = self._unsent, b""
                if data:
                    await self.stream.send_all(data)

    async def send(self, data: bytes, *, byte_by_byte: bool = False) -> None:
        """Send bytes unchanged, valid frames or not, and unknown to `h2`.

        Args:
            data: The bytes.
            byte_by_byte: Whether to send each byte alone, and to let all tasks run until they block before
                the next.

        Raises:
            trio.BrokenResourceError: The client has closed the connection.
        """
        await self.flush()
        async with self._sending:
            await send_bytes(self.stream, data, byte_by_byte=byte_by_byte)

    async def send_response(
        self,
        stream: PeerRequest | int,
        status: int = 200,
        headers: HeaderTypes = (),
        body: bytes = b"",
        *,
        trailers: HeaderTypes = (),
        end: bool = True,
    ) -> None:
        """Send a response, or its beginning.

        Args:
            stream: The request, or the number of its stream.
            status: The status code.
            headers: A mapping or a sequence of pairs, of bytes or ASCII str. Names are sent in lower case; no
                header is added.
            body: The body, or its beginning.
            trailers: The trailer fields, which end the stream.
            end: Whether the response ends. If False, `send_data` and `send_trailers` send the rest.

        Raises:
            TypeError: The headers are of another type.
            h2.exceptions.ProtocolError: The response is invalid, or the stream has ended.
            trio.BrokenResourceError: The client has reset the stream, or closed the connection.
        """
        last = to_headers(trailers)
        end = end and not last
        self._queue_head(stream, status, headers, end=end and not body)
        await self._queue_data(stream, body, end=end)
        if last:
            self.h2.send_headers(self._check_open(stream), last, end_stream=True)
        await self.flush()

    async def send_interim(self, stream: PeerRequest | int, status: int, headers: HeaderTypes = ()) -> None:
        """Send an interim response (RFC 9110, section 15.2), before the response.

        Args:
            stream: The request, or the number of its stream.
            status: The status code, 100 to 199.
            headers: As of `send_response`.

        Raises:
            TypeError: The headers are of another type.
            h2.exceptions.ProtocolError: The response is invalid, or was begun.
            trio.BrokenResourceError: The client has reset the stream, or closed the connection.
        """
        self._queue_head(stream, status, headers, end=False)
        await self.flush()

    def _queue_head(self, stream: PeerRequest | int, status: int, headers: HeaderTypes, *, end: bool) -> None:
        block = [(b":status", b"%d" % status), *to_headers(headers)]
        self.h2.send_headers(self._check_open(stream), block, end_stream=end)

    async def send_data(self, stream: PeerRequest | int, data: bytes, *, end: bool = False) -> None:
        """Send a part of the body of a response, or of a CONNECT tunnel.

        Args:
            stream: The request, or the number of its stream.
            data: The bytes, which are sent in as many frames as needed.
            end: Whether they end the stream.

        Raises:
            h2.exceptions.ProtocolError: The response was not begun, or the stream has ended.
            trio.BrokenResourceError: The client has reset the stream, or closed the connection.
        """
        stream_id = self._check_open(stream)
        if end and not data:
            self.h2.end_stream(stream_id)
        await self._queue_data(stream, data, end=end)
        await self.flush()

    async def _queue_data(self, stream: PeerRequest | int, data: bytes, *, end: bool) -> None:
        """Give data to h2, as the windows allow; what is left in it at the end is to be flushed."""
        start = 0
        while start < len(data):
            stream_id = self._check_open(stream)
            room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
            if room > 0:
                piece = data[start : start + room]
                start += room
                self.h2.send_data(stream_id, piece, end_stream=end and start >= len(data))
            else:
                await self.receive()

    async def send_trailers(self, stream: PeerRequest | int, trailers: HeaderTypes) -> None:
        """Send trailer fields, which end the stream.

        Args:
            stream: The request, or the number of its stream.
            trailers: As the headers of `send_response`.

        Raises:
            TypeError: The trailers are of another type.
            h2.exceptions.ProtocolError: The response was not begun, or the stream has ended.
            trio.BrokenResourceError: The client has reset the stream, or closed the connection.
        """
        self.h2.send_headers(self._check_open(stream), to_headers(trailers), end_stream=True)
        await self.flush()

    async def send_reset(
        self, stream: PeerRequest | int, error_code: int = ErrorCodes.INTERNAL_ERROR
    ) -> None:
        """Reset a stream (RST_STREAM).

        Args:
            stream: The request, or the number of its stream.
            error_code: The reason, from `h2.errors.ErrorCodes` or any other.

        Raises:
            h2.exceptions.ProtocolError: The stream has ended on both sides, or was reset.
            trio.BrokenResourceError: The client has reset the stream, or closed the connection.
        """
        self.h2.reset_stream(self._check_open(stream), error_code)
        await self.flush()

    async def send_goaway(
        self,
        error_code: int = ErrorCodes.NO_ERROR,
        *,
        last_stream_id: int | None = None,
        debug_data: bytes = b"",
    ) -> None:
        """Announce that no further request will be answered (GOAWAY). Responses can still be sent.

        Args:
            error_code: The reason, from `h2.errors.ErrorCodes` or any other.
            last_stream_id: The number of the last stream that was or will be processed; None for the highest
                that was received.
            debug_data: Any bytes.

        Raises:
            trio.BrokenResourceError: The client has closed the connection.
        """
        if last_stream_id is None:
            last_stream_id = self.h2.highest_inbound_stream_id
        # Not by h2, which refuses to send anything after it.
        length = (_GOAWAY_SIZE + len(debug_data)).to_bytes(3, "big")
        numbers = b"".join(number.to_bytes(4, "big") for number in (0, last_stream_id, error_code))
        await self.send(b"%b%c\0%b%b" % (length, _GOAWAY, numbers, debug_data))

    async def send_settings(self, settings: Settings) -> None:
        """Send a SETTINGS frame; `h2.events.SettingsAcknowledged` reports that the client uses it.

        Args:
            settings: The values that change, by `h2.settings.SettingCodes`.

        Raises:
            h2.exceptions.ProtocolError: A value is invalid, or the client has closed the connection.
            trio.BrokenResourceError: The client has closed the connection.
        """
        self.h2.update_settings(dict(settings.items()))
        await self.flush()

    async def send_ping(self, data: bytes = bytes(8)) -> None:
        """Send a PING; `h2.events.PingAckReceived` reports the client's answer.

        Args:
            data: Eight bytes, which the client sends back.

        Raises:
            ValueError: `data` is not eight bytes.
            h2.exceptions.ProtocolError: The client has closed the connection.
            trio.BrokenResourceError: The client has closed the connection.
        """
        self.h2.ping(data)
        await self.flush()

    def _check_open(self, stream: PeerRequest | int) -> int:
        """Return the stream's number, if the client still expects something on it."""
        stream_id = _id_of(stream)
        if stream_id in self._reset:
            code = self._reset[stream_id]
            raise StreamReset(f"the client has reset stream {stream_id}, with error code {code}")
        if self._client_left:
            raise trio.BrokenResourceError("the client has closed the connection")
        return stream_id

    # -- The connection.

    async def aclose(self) -> None:
        """Close the connection."""
        await self.stream.aclose()


def _id_of(stream: PeerRequest | int) -> int:
    stream_id = stream.stream_id if isinstance(stream, PeerRequest) else stream
    if stream_id is None:
        raise TypeError("the request has no stream_id: it was not received over HTTP/2")
    return stream_id
