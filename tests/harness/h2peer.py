"""The server's side of an HTTP/2 connection, played by a test: the public peer, which also records frames."""

from collections.abc import Iterable
from typing import Any

import trio
from h2.settings import SettingCodes
from hyperframe.frame import Frame

from trio_exchange import ConnectionPool
from trio_exchange.testing import HTTP2Peer, MemoryConnector, ScriptedPeer
from trio_exchange.testing._http2 import Settings, StreamReset

Headers = list[tuple[bytes, bytes]]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class H2Peer(HTTP2Peer):
    """A server that sends nothing before `start`, and records the frames that it receives.

    Attributes:
        frames: All frames that the client has sent, as they were received.
        ended: Whether the client has closed the connection.
        unparsed: The beginning of a frame whose end was not received yet.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self.frames: list[Frame] = []
        self.ended = False
        self.unparsed = b""
        self._preface_left = len(PREFACE)

    def _initiate(self, settings: Settings) -> None:
        """Leave it to `start`."""

    async def start(
        self,
        settings: dict[SettingCodes, int] | None = None,
        *,
        then: dict[SettingCodes | int, int] | None = None,
    ) -> None:
        """Send the server's preface, with these settings besides h2's own, and others right after them."""
        super()._initiate(settings or {})
        if then:
            self.h2.update_settings(then)
        await self.flush()

    # -- Sending.

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
        """Send a response."""
        await self.send_response(stream_id, status, list(headers), body, trailers=trailers or (), end=end)

    async def credit(self, increment: int, stream_id: int | None = None) -> None:
        """Enlarge the client's window of a stream, or of the connection."""
        self.h2.increment_flow_control_window(increment, stream_id)
        await self.flush()

    # -- Receiving.

    async def receive(self) -> bool:
        self.ended = not await super().receive()
        return not self.ended

    async def listen(self) -> bool:
        """Receive something, and neither check nor answer it. False if the client has closed."""
        data = bytes(await self.stream.receive_some(65536))
        self.note(data)
        self.ended = not data
        return not self.ended

    def _take(self, data: bytes) -> None:
        self.note(data)
        super()._take(data)

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

    event = HTTP2Peer.receive_event

    async def request(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Receive a whole request: its stream, headers and body; credit is given as data arrives."""
        stream_id, headers = await self.head()
        return stream_id, headers, await self.body(stream_id)

    async def head(self) -> tuple[int, dict[bytes, bytes]]:
        """Receive the head of a request."""
        request = await self.receive_head()
        assert request.stream_id is not None
        return request.stream_id, dict(request.headers)

    async def body(self, stream_id: int) -> bytes:
        """Receive the body of a request, to its end."""
        try:
            return await self.receive_body(stream_id)
        except StreamReset as exc:
            raise AssertionError(str(exc)) from exc

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
