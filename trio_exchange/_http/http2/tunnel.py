"""Tunnels over an HTTP/2 stream, after a 2xx response to CONNECT (RFC 9113, 8.5)."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import trio

from ..._conflicts import ConflictDetector
from ..._connect.network_stream import check_max_bytes, to_octets
from ..._connect.transport import Pollable, Readiness
from ..._exceptions import ExchangeError, WriteError

if TYPE_CHECKING:
    from .stream import HTTP2Stream


class TunnelState(enum.Enum):
    """The local state of a tunnel.

    Attributes:
        NONE: The stream has no tunnel.
        OPEN: The user can send and receive.
        SHUT: The user has sent the end and can only receive.
        CLOSED: The user has closed the tunnel.
    """

    NONE = enum.auto()
    OPEN = enum.auto()
    SHUT = enum.auto()
    CLOSED = enum.auto()


class Tunnel(Pollable, trio.abc.HalfCloseableStream):
    """An HTTP/2 stream as a Trio stream, after a 2xx response to CONNECT (RFC 9113, 8.5).

    Attributes:
        transport_stream: The Trio stream below the HTTP/2 connection.
    """

    def __init__(self, stream: HTTP2Stream, transport_stream: trio.abc.Stream) -> None:
        self.transport_stream: trio.abc.Stream = transport_stream
        self._stream = stream
        self._receiving = ConflictDetector("another task is receiving from this stream")
        self._sending = ConflictDetector("another task is sending to this stream")
        stream.tunnel = TunnelState.OPEN

    def __repr__(self) -> str:
        return f"<Tunnel on stream {self._stream.stream_id} over {self.transport_stream!r}>"

    def peek(self) -> Readiness:
        """Return whether unread data or the end has arrived."""
        return self._stream.peek()

    @trio.lowlevel.enable_ki_protection
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive some bytes, or `b""` when the other side has ended."""
        check_max_bytes(max_bytes)
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self._check_open()
            try:
                return await self._stream.receive_some(max_bytes)
            except ExchangeError as exc:
                self._check_open()
                raise trio.BrokenResourceError(str(exc)) from exc

    @trio.lowlevel.enable_ki_protection
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, waiting for the other side's flow control."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            rest = memoryview(to_octets(data))
            try:
                while rest:
                    rest = rest[await self._stream.send_data(rest) :]
            except WriteError as exc:
                self._check_sendable()
                raise trio.BrokenResourceError(str(exc)) from exc

    @trio.lowlevel.enable_ki_protection
    async def wait_send_all_might_not_block(self) -> None:
        """Wait until data can be sent or sending would fail."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            await self._stream.wait_for_room()
            self._check_sendable()

    @trio.lowlevel.enable_ki_protection
    async def send_eof(self) -> None:
        """Tell the other side that nothing more will be sent (END_STREAM)."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            if self._stream.end_request():
                self._stream.tunnel = TunnelState.SHUT

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the tunnel. Reset the stream if the other side has not ended."""
        self._stream.end_tunnel()
        await trio.lowlevel.checkpoint()

    def _check_open(self) -> None:
        if self._stream.tunnel is TunnelState.CLOSED:
            raise trio.ClosedResourceError("the tunnel was closed")

    def _check_sendable(self) -> None:
        self._check_open()
        if self._stream.tunnel is TunnelState.SHUT:
            raise trio.ClosedResourceError("the end was sent already")
