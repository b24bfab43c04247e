"""The server that sends a script, as a stream."""

from __future__ import annotations

from collections import deque
from typing import Any

import trio

from trio_exchange import Connector
from trio_exchange._connect.transport import Pollable, Readiness

from .inputs import Script

_METHODS = (b"GET ", b"HEAD ", b"POST ", b"CONNECT ")
_HEADERS = 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Replay(Pollable, trio.abc.HalfCloseableStream):
    """A connection on which the script's next phase arrives when enough requests were sent on it.

    Args:
        phases: What arrives, taken from the left; connections share it.
        ends: Whether the connection ends after the last phase.
        needed: How many requests the next phase waits for.

    Attributes:
        sent: How many requests were sent on the connection.
        arrived: What has arrived of each phase, whether it was received or not.
    """

    def __init__(self, phases: deque[tuple[bytes, ...]], *, ends: bool, needed: int) -> None:
        self.sent = 0
        self.arrived: list[tuple[bytes, ...]] = []
        self._phases = phases
        self._ends = ends
        self._needed = needed
        self._pieces: deque[bytes] = deque()
        self._progress = trio.Event()
        self._closed = False
        self._http2: bool | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError
        self.sent += self._requests_in(bytes(data))
        while self.sent >= self._needed and self._phases:
            self._needed += 1
            self.arrived.append(self._phases.popleft())
            self._pieces.extend(self.arrived[-1])
            self._wake()

    def _requests_in(self, data: bytes) -> int:
        if self._http2 is None:
            self._http2 = data.startswith(_PREFACE)
            data = data.removeprefix(_PREFACE)
        if not self._http2:
            return int(data.startswith(_METHODS))
        found = 0
        while data:
            found += data[3] == _HEADERS
            data = data[9 + int.from_bytes(data[:3], "big") :]
        return found

    def _wake(self) -> None:
        self._progress.set()
        self._progress = trio.Event()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._closed:
            if self._pieces:
                piece = self._pieces.popleft()
                if max_bytes is not None and len(piece) > max_bytes:
                    self._pieces.appendleft(piece[max_bytes:])
                    piece = piece[:max_bytes]
                return piece
            if self._is_over():
                return b""
            await self._progress.wait()
        raise trio.ClosedResourceError

    def _is_over(self) -> bool:
        return self._ends and not self._phases

    def peek(self) -> Readiness:
        if self._pieces:
            return Readiness.READABLE
        return Readiness.CLOSED if self._is_over() else Readiness.QUIET

    async def aclose(self) -> None:
        self._closed = True
        self._wake()
        await trio.lowlevel.checkpoint()


class Network(Connector):
    """Dials connections that share a script: what one has not used, the next goes on with.

    Args:
        script: As it is.
        needed: How many requests the first phase waits for.

    Attributes:
        streams: The connections, in order.
    """

    def __init__(self, script: Script, *, needed: int = 1) -> None:
        self.streams: list[Replay] = []
        self._phases = deque(script.phases)
        self._ends = script.ends
        self._needed = needed

    async def connect_tcp(self, host: str, port: int, **_: Any) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        needed, self._needed = self._needed, 1
        self.streams.append(Replay(self._phases, ends=self._ends, needed=needed))
        return self.streams[-1]
