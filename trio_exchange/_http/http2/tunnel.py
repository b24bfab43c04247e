"""TODO _http.http2.tunnel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ..._conflicts import ConflictDetector
from ..._connect.network_stream import check_max_bytes, to_octets
from ..._connect.transport import Pollable, Readiness
from ..._exceptions import ExchangeError, WriteError

if TYPE_CHECKING:
    from .stream import HTTP2Exchange


class Tunnel(Pollable, trio.abc.HalfCloseableStream):
    """A stream of HTTP/2 as a stream of Trio, after a 2xx answer to CONNECT (RFC 9113, 8.5).

    Attributes:
        transport_stream: What the connection runs on.
    """

    def __init__(self, exchange: HTTP2Exchange, transport_stream: trio.abc.Stream) -> None:
        self.transport_stream: trio.abc.Stream = transport_stream
        self._exchange = exchange
        self._receiving = ConflictDetector("another task is receiving from this stream")
        self._sending = ConflictDetector("another task is sending to this stream")

    def __repr__(self) -> str:
        return f"<Tunnel on stream {self._exchange.stream_id} over {self.transport_stream!r}>"

    def peek(self) -> Readiness:
        """What has arrived and was not received."""
        return self._exchange.peek()

    @trio.lowlevel.enable_ki_protection
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive some bytes; `b""` when the other side has ended."""
        check_max_bytes(max_bytes)
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self._check_open()
            try:
                return await self._exchange.receive(max_bytes)
            except ExchangeError as exc:
                self._check_open()
                raise trio.BrokenResourceError(str(exc)) from exc

    @trio.lowlevel.enable_ki_protection
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, as fast as the other side takes it."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            try:
                await self._exchange.send(to_octets(data))
            except WriteError as exc:
                self._check_sendable()
                raise trio.BrokenResourceError(str(exc)) from exc

    @trio.lowlevel.enable_ki_protection
    async def wait_send_all_might_not_block(self) -> None:
        """Wait until something can be sent, or sending fails."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            await self._exchange.wait_for_room()
            self._check_sendable()

    @trio.lowlevel.enable_ki_protection
    async def send_eof(self) -> None:
        """Tell the other side that nothing more will be sent (END_STREAM)."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            self._exchange.end_request()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """End the tunnel. If the other side has not ended, the stream is reset."""
        self._exchange.end_tunnel()
        await trio.lowlevel.checkpoint()

    def _check_open(self) -> None:
        if self._exchange.was_closed:
            raise trio.ClosedResourceError("the tunnel was closed")

    def _check_sendable(self) -> None:
        self._check_open()
        if self._exchange.sent_end:
            raise trio.ClosedResourceError("the end was sent already")
