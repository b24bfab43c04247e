"""The server's side of an HTTP/2 connection, played by a test.

h2 itself is the judge of what the client sends: whatever it refuses fails the test that plays the peer.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import h2.config
import h2.connection
import h2.events
import h2.settings
import trio
import trio.testing
from h2.settings import SettingCodes
from hyperframe.frame import Frame

from trio_exchange import ConnectionPool
from trio_exchange.testing import MemoryConnector, ScriptedPeer

E = TypeVar("E", bound=h2.events.Event)
Headers = list[tuple[bytes, bytes]]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class H2Peer:
    """A server that does what the test says, and else only what h2 does by itself (acknowledge).

    Attributes:
        stream: The connection.
        h2: Its state; after using it directly, `flush`.
        frames: All frames that the client has sent, as they were received.
        events: Events not taken yet.
        ended: Whether the client has closed the connection.
        unparsed: The beginning of a frame whose end was not received yet.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding=None)
        )
        self.frames: list[Frame] = []
        self.events: list[h2.events.Event] = []
        self.ended = False
        self.unparsed = b""
        self._preface_left = len(PREFACE)

    async def start(
        self,
        settings: dict[SettingCodes, int] | None = None,
        *,
        then: dict[SettingCodes | int, int] | None = None,
    ) -> None:
        """Send the server's preface, with these settings besides h2's own, and others right after them."""
        if settings:
            # As if the client knew them already: they are in the first frame.
            self.h2.local_settings = h2.settings.Settings(client=False, initial_values=settings)
            self.h2.max_inbound_frame_size = self.h2.local_settings.max_frame_size
        self.h2.initiate_connection()
        if then:
            self.h2.update_settings(then)
        await self.flush()

    # -- Sending.

    async def flush(self) -> None:
        """Send what h2 has to send."""
        data = self.h2.data_to_send()
        if data:
            await self.stream.send_all(data)

    async def send(self, data: bytes, *, byte_by_byte: bool = False) -> None:
        """Send bytes as they are."""
        await self.flush()
        for piece in [data[i : i + 1] for i in range(len(data))] if byte_by_byte else [data]:
            await self.stream.send_all(piece)
            if byte_by_byte:
                await trio.testing.wait_all_tasks_blocked()

    async def send_frame(self, *frames: Frame) -> None:
        """Send frames past h2."""
        await self.send(b"".join(frame.serialize() for frame in frames))

    async def respond(
        self,
        stream_id: int,
        status: int = 200,
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        *,
        trailers: Headers | None = None,
        end: bool = True,
    ) -> None:
        """Send a response; its body has to fit the client's windows."""
        block = [(b":status", b"%d" % status), *headers]
        self.h2.send_headers(stream_id, block, end_stream=end and not body and trailers is None)
        for start in range(0, len(body), 16384):
            last = start + 16384 >= len(body)
            piece = body[start : start + 16384]
            self.h2.send_data(stream_id, piece, end_stream=end and last and trailers is None)
        if trailers is not None:
            self.h2.send_headers(stream_id, trailers, end_stream=True)
        await self.flush()

    # -- Receiving.

    async def receive(self) -> bool:
        """Receive something, and acknowledge what h2 acknowledges. False if the client has closed."""
        data = bytes(await self.stream.receive_some(65536))
        if not data:
            self.ended = True
            return False
        self.note(data)
        self.events += self.h2.receive_data(data)
        await self.flush()
        return True

    async def listen(self) -> bool:
        """Receive something, and neither check nor answer it. False if the client has closed."""
        data = bytes(await self.stream.receive_some(65536))
        self.note(data)
        self.ended = not data
        return not self.ended

    def note(self, data: bytes) -> None:
        """Take note of the frames in what was received, without giving it to h2."""
        self.unparsed += data
        if self._preface_left:
            self.unparsed, self._preface_left = self.unparsed[self._preface_left :], 0
        while len(self.unparsed) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(self.unparsed[:9]))
            if len(self.unparsed) < 9 + length:
                break
            frame.parse_body(memoryview(self.unparsed[9 : 9 + length]))
            self.frames.append(frame)
            self.unparsed = self.unparsed[9 + length :]

    async def event(self, kind: type[E], stream_id: int | None = None) -> E:
        """Wait for an event; earlier ones of other kinds stay in `events`.

        Raises:
            EOFError: The client has closed the connection.
        """
        while True:
            for index, event in enumerate(self.events):
                if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                    return self.events.pop(index)  # type: ignore[return-value]
            if not await self.receive():
                raise EOFError(f"the client closed the connection instead of {kind.__name__}")

    async def request(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Receive a whole request: its stream, headers and body; credit is given as data arrives."""
        stream_id, headers = await self.head()
        return stream_id, headers, await self.body(stream_id)

    async def head(self) -> tuple[int, dict[bytes, bytes]]:
        """Receive the head of a request."""
        event = await self.event(h2.events.RequestReceived)
        assert event.stream_id is not None
        return event.stream_id, dict(event.headers or [])

    async def body(self, stream_id: int) -> bytes:
        """Receive the body of a request, to its end."""
        body = b""
        while True:
            event = await self.event(h2.events.Event, stream_id)
            if isinstance(event, h2.events.DataReceived):
                body += event.data or b""
                if event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, stream_id)
                    await self.flush()
            elif isinstance(event, h2.events.StreamEnded):
                return body
            elif isinstance(event, h2.events.StreamReset):
                raise AssertionError(f"the client has reset the stream: {event}")

    async def until_closed(self) -> None:
        """Receive until the client closes the connection."""
        while await self.receive():
            pass

    def sent(self, kind: type[Any] | tuple[type[Any], ...], stream_id: int | None = None) -> list[Any]:
        """The frames of a type that the client has sent so far."""
        return [
            frame for frame in self.frames if isinstance(frame, kind) and stream_id in (None, frame.stream_id)
        ]


def h2_pool(nursery: trio.Nursery, serve: Any, **options: Any) -> tuple[ConnectionPool, MemoryConnector]:
    """A pool that speaks HTTP/2 by prior knowledge, with peers that `serve(peer)` plays."""

    async def play(scripted: ScriptedPeer) -> None:
        await serve(H2Peer(scripted.stream))

    connector = MemoryConnector(nursery, play)
    return ConnectionPool(http1=False, http2=True, connector=connector, **options), connector
