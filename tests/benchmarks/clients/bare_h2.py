"""A plain loop over h2 and one socket: no pool, no models, no errors, no limits.

A task that waits for its response receives for all tasks, unless another already does. So a single task does
what a plain loop would do, and many tasks need no further task.

It is not the least that HTTP/2 on Trio can cost: a client may do with less than h2 does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import h2.config
import h2.connection
import h2.events
import trio
from h2.settings import SettingCodes

from ..cases import (
    DOWNLOAD_SIZE,
    HEADERS,
    SMALL_SIZE,
    UPLOAD_CHUNK,
    UPLOAD_HEADERS,
    UPLOAD_SIZE,
    Work,
)
from .bare_h11 import RECEIVE_SIZE, open_stream

LOOP = "trio"
WINDOW = 2**30
CREDIT = 2**23


class Answer:
    def __init__(self) -> None:
        self.status = b""
        self.received = 0
        self.ended = False


class BareClient:
    def __init__(self, host: str, path: str, stream: trio.abc.Stream) -> None:
        self._host = host.encode()
        self._path = path.encode()
        self._stream = stream
        self._sending = trio.StrictFIFOLock()
        self._reading = False
        self._news = trio.lowlevel.ParkingLot()
        self._answers: dict[int, Answer] = {}
        self._uncredited = 0
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        self._h2.initiate_connection()
        self._h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: WINDOW})
        self._h2.increment_flow_control_window(WINDOW)

    async def get(self, lane: int) -> None:
        await self._fetch(SMALL_SIZE)

    async def download(self, lane: int) -> None:
        await self._fetch(DOWNLOAD_SIZE)

    async def _fetch(self, size: int) -> None:
        await self._finish(self._begin(b"GET", HEADERS, end=True), b"200", size)

    async def upload(self, lane: int) -> None:
        stream_id = self._begin(b"POST", UPLOAD_HEADERS, end=False)
        left = UPLOAD_SIZE
        while left:
            size = min(
                left,
                len(UPLOAD_CHUNK),
                self._h2.local_flow_control_window(stream_id),
                self._h2.max_outbound_frame_size,
            )
            if size:
                left -= size
                self._h2.send_data(stream_id, UPLOAD_CHUNK[:size], end_stream=not left)
                await self._flush()
            else:
                await self._receive()
        await self._finish(stream_id, b"204", 0)

    def _begin(self, method: bytes, headers: list[tuple[bytes, bytes]], *, end: bool) -> int:
        stream_id = self._h2.get_next_available_stream_id()
        pseudo = [
            (b":method", method),
            (b":authority", self._host),
            (b":scheme", b"http"),
            (b":path", self._path),
        ]
        block = [*pseudo, *((name.lower(), value) for name, value in headers)]
        self._h2.send_headers(stream_id, block, end_stream=end)
        self._answers[stream_id] = Answer()
        return stream_id

    async def _finish(self, stream_id: int, status: bytes, size: int) -> None:
        await self._flush()
        answer = self._answers[stream_id]
        while not answer.ended:
            await self._receive()
        del self._answers[stream_id]
        assert answer.status == status
        assert answer.received == size

    async def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            async with self._sending:
                await self._stream.send_all(data)

    async def _receive(self) -> None:
        if self._reading:
            await self._news.park()
            return
        self._reading = True
        self._take(bytes(await self._stream.receive_some(RECEIVE_SIZE)))
        self._reading = False
        self._news.unpark_all()
        await self._flush()

    def _take(self, data: bytes) -> None:
        for event in self._h2.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                answer = self._answers[event.stream_id or 0]
                answer.received += len(event.data or b"")
                self._uncredited += event.flow_controlled_length or 0
                if self._uncredited >= CREDIT:
                    self._h2.increment_flow_control_window(self._uncredited)
                    self._uncredited = 0
            elif isinstance(event, h2.events.ResponseReceived):
                self._answers[event.stream_id or 0].status = (event.headers or [])[0][1]
            elif isinstance(event, h2.events.StreamEnded):
                self._answers[event.stream_id or 0].ended = True


@asynccontextmanager
async def open_client(work: Work) -> AsyncIterator[BareClient]:
    url = urlsplit(work.url)
    stream = await open_stream(work)
    yield BareClient(url.netloc, url.path, stream)
    await trio.aclose_forcefully(stream)
