"""Scripts of HTTP/1.1 peers, and what tests of such peers are parametrized over."""

from __future__ import annotations

import array
import ctypes
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import pytest
import trio
import trio.testing

from tests.harness.streams import Prefixed, Wrapped
from trio_exchange.testing import PeerRequest, ScriptedPeer

Script: TypeAlias = Callable[[ScriptedPeer], Awaitable[object]]

#: The ways in which the same bytes may arrive.
DELIVERIES = pytest.mark.parametrize("byte_by_byte", [False, True], ids=["whole", "bytewise"])


#: Buffers of which an item is more than one byte, or that have gaps, and what they amount to.
BUFFERS: dict[str, tuple[memoryview, bytes]] = {
    "items of four bytes": (
        memoryview(array.array("I", range(10_000))),
        array.array("I", range(10_000)).tobytes(),
    ),
    "every other byte": (memoryview(bytes(range(256)) * 250)[::2], (bytes(range(256)) * 250)[::2]),
    "backwards": (memoryview(array.array("H", range(9)))[::-1], array.array("H", range(8, -1, -1)).tobytes()),
    "two dimensions": (memoryview(bytes(range(24))).cast("B", (4, 6)), bytes(range(24))),
    "no dimension": (memoryview(ctypes.c_uint32(1)), bytes(ctypes.c_uint32(1))),
    "nothing": (memoryview(array.array("I")), b""),
}


async def respond(peer: ScriptedPeer) -> None:
    """The script of an ordinary server: it answers every request with the request's own body."""
    async for request in peer:
        await peer.send_response(200, body=request.body)


class Recorder:
    """The script of an ordinary server that remembers the requests, in order."""

    def __init__(self) -> None:
        self.requests: list[PeerRequest] = []

    async def __call__(self, peer: ScriptedPeer) -> None:
        async for request in peer:
            self.requests.append(request)
            await peer.send_response(200, body=request.body)

    @property
    def bodies(self) -> list[bytes]:
        return [request.body for request in self.requests]


def reset(peer: ScriptedPeer | trio.abc.Stream) -> None:
    """Close the TCP connection of a peer or stream with an RST."""
    stream: object = peer.stream if isinstance(peer, ScriptedPeer) else peer
    while isinstance(stream, (Wrapped, trio.SSLStream)):
        stream = stream.stream if isinstance(stream, Wrapped) else stream.transport_stream
    assert isinstance(stream, trio.SocketStream)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


def transcript(data: bytes, *, byte_by_byte: bool = False, then_close: bool = False) -> Script:
    """A script that answers every request with the same bytes.

    Args:
        data: The answer.
        byte_by_byte: As of `ScriptedPeer.send`.
        then_close: Whether the connection ends after the first answer.
    """

    async def script(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send(data, byte_by_byte=byte_by_byte)
            if then_close:
                return

    return script


async def mute(peer: ScriptedPeer) -> None:
    """The script of a server that never answers."""
    async for _ in peer:
        pass


async def swallow(peer: ScriptedPeer) -> None:
    """The script of a server that receives whatever comes, and never answers."""
    while await peer.receive_some():
        pass


async def stall(peer: ScriptedPeer) -> None:
    """The script of a server that receives nothing, and never answers."""
    await trio.sleep_forever()


async def begins_with(peer: ScriptedPeer) -> bytes:
    """What the client sent first; it goes back to the stream."""
    first = await peer.receive_some()
    peer.stream = Prefixed(peer.stream, first)
    return first
