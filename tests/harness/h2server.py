"""A server of HTTP/2 that serves many streams at once, each played by a script."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable
from typing import Any

import h2.errors
import h2.events
import trio

from tests.harness.h2peer import H2Peer, Headers
from tests.harness.streams import OneSender


class Multiplexer:
    """A server of HTTP/2 where every request is played by a script, in a task of its own.

    Args:
        connection: The stream of the connection, or its peer.
        script: Called with a `ServerStream` for every request. When it returns, the stream is ended.

    Attributes:
        peer: The connection's state.
        streams: All that were opened, by id.
        progress: Set, and replaced, when more may be sent than before.
    """

    def __init__(
        self, connection: trio.abc.Stream | H2Peer, script: Callable[[ServerStream], Awaitable[object]]
    ) -> None:
        self.peer = connection if isinstance(connection, H2Peer) else H2Peer(connection)
        self.peer.stream = OneSender(self.peer.stream)
        self.streams: dict[int, ServerStream] = {}
        self.progress = trio.Event()
        self._script = script

    async def serve(self, settings: Any = None, then: Any = None) -> None:
        """Serve until the client has gone, which must have ended all tunnels before it says so."""
        async with trio.open_nursery() as nursery:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self.peer.start(settings, then=then)
                while data := bytes(await self.peer.stream.receive_some(65536)):
                    self._receive(data, nursery)
                    await self.peer.flush()
            nursery.cancel_scope.cancel()

    def _receive(self, data: bytes, nursery: trio.Nursery) -> None:
        self.peer.note(data)
        for event in self.peer.h2.receive_data(data):
            self._take(event, nursery)

    def _take(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=int(stream_id)):
                self.streams[stream_id] = ServerStream(self, stream_id, list(event.headers or []))
                nursery.start_soon(self._play, self.streams[stream_id])
            case h2.events.DataReceived(stream_id=int(stream_id)):
                self.streams[stream_id].take(event.data or b"", event.flow_controlled_length or 0)
            case h2.events.StreamEnded(stream_id=int(stream_id)):
                self.streams[stream_id].end()
            case h2.events.StreamReset(stream_id=int(stream_id)):
                self.streams[stream_id].reset_code = event.error_code
                self.streams[stream_id].break_off()
            case h2.events.ConnectionTerminated():
                open_tunnels = [stream for stream in self.streams.values() if stream.is_open_tunnel]
                assert open_tunnels == [], "the client has left tunnels open"
                for stream in self.streams.values():
                    stream.break_off()
        self.progress.set()
        self.progress = trio.Event()

    async def _play(self, stream: ServerStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            await self._script(stream)
            await stream.aclose()


class ServerStream(trio.abc.HalfCloseableStream):
    """The server's side of one stream of HTTP/2.

    Attributes:
        server: Of its connection.
        id: Its number.
        fields: The request's head, as it came.
        headers: The same, to look things up.
        received_end: Whether the client has ended its side.
        was_reset: Whether the client has reset it.
        reset_code: What it was reset with.
        sent_end: Whether this side has ended.
    """

    def __init__(self, server: Multiplexer, stream_id: int, fields: Headers) -> None:
        self.id = stream_id
        self.fields = fields
        self.headers = dict(fields)
        self.received_end = False
        self.was_reset = False
        self.reset_code: int | None = None
        self.sent_end = False
        self.server = server
        self._h2 = server.peer.h2
        self._arrived, self._inbox = trio.open_memory_channel[tuple[bytes, int]](math.inf)
        self._rest = b""

    def take(self, data: bytes, size: int) -> None:
        """What has arrived, and by how much it has used the windows."""
        self._arrived.send_nowait((data, size))

    def end(self) -> None:
        """The client has ended its side."""
        self.received_end = True
        self._arrived.close()

    def break_off(self) -> None:
        """The client has no more use for the stream."""
        self.was_reset = True
        self._arrived.close()

    @property
    def is_open_tunnel(self) -> bool:
        """Whether it is a tunnel that the client has not ended."""
        return self.headers[b":method"] == b"CONNECT" and not (self.received_end or self.was_reset)

    async def respond(self, status: int, headers: Headers | None = None, *, end: bool = False) -> None:
        """Send a head."""
        self._check()
        self._h2.send_headers(self.id, [(b":status", b"%d" % status), *(headers or [])], end_stream=end)
        self.sent_end = end
        await self.server.peer.flush()

    async def inform(self, status: int, headers: Headers | None = None) -> None:
        """Send the head of an informational response."""
        self._check()
        self._h2.send_headers(self.id, [(b":status", b"%d" % status), *(headers or [])])
        await self.server.peer.flush()

    async def trail(self, fields: Headers) -> None:
        """End this side, with trailers."""
        self._check()
        self.sent_end = True
        self._h2.send_headers(self.id, fields, end_stream=True)
        await self.server.peer.flush()

    async def reset(self, code: h2.errors.ErrorCodes) -> None:
        """Reset the stream."""
        self._check()
        self._h2.reset_stream(self.id, code)
        self.was_reset = self.sent_end = True
        await self.server.peer.flush()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send data as the windows allow."""
        rest = bytes(data)
        while rest:
            self._check()
            room = min(self._h2.local_flow_control_window(self.id), self._h2.max_outbound_frame_size)
            if room <= 0:
                await self.server.progress.wait()
                continue
            self._h2.send_data(self.id, rest[:room])
            rest = rest[room:]
            await self.server.peer.flush()

    def _check(self) -> None:
        if self.was_reset:
            raise trio.BrokenResourceError("the client has reset the stream")
        if self.sent_end:
            raise trio.ClosedResourceError("this side has ended")

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive data, which the client may send again then."""
        if not self._rest:
            try:
                self._rest, size = await self._inbox.receive()
            except trio.EndOfChannel:
                if self.was_reset:
                    raise trio.BrokenResourceError("the client has reset the stream") from None
                return b""
            if size and not self.was_reset:
                self._h2.acknowledge_received_data(size, self.id)
                await self.server.peer.flush()
        size = len(self._rest) if max_bytes is None else max_bytes
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    async def send_eof(self) -> None:
        """End this side."""
        self._check()
        self.sent_end = True
        self._h2.end_stream(self.id)
        await self.server.peer.flush()

    async def aclose(self) -> None:
        """End this side, if that is still to be done."""
        if not (self.was_reset or self.sent_end):
            await self.send_eof()
