"""What the session `instructions` counts: `python -m tests.benchmarks.scenarios FEW MANY`, under callgrind.

Each scenario runs twice, with few and with many requests, and each time in a process forked from one that has
imported everything. The output tells which process ran which scenario with how many requests.

The client's connections are pairs of connected sockets in one thread. So the client takes the same code path
as with a network, but nothing depends on when a peer runs. The peers answer with constant bytes, and are
counted with the client. Hashes, the time, garbage collection and the order in which Trio resumes tasks do not
vary.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import h11
import hpack
import trio
import trio._core._run

import trio_exchange

from .cases import HEADERS, SMALL_SIZE
from .clients.bare_h11 import receive_response
from .clients.pooled import TIMEOUTS
from .instructions import REFERENCE

Answer = Callable[[bytes], bytes]
Scenario = Callable[[int], Awaitable[None]]

URL = "http://example.com/path"
BODY = b"x" * SMALL_SIZE
REQUEST_END = b"\r\n\r\n"

_FIELDS = [
    (b"Server", b"nginx/1.22.1"),
    (b"Date", b"Mon, 02 Jan 2023 03:04:05 GMT"),
    (b"Content-Type", b"application/octet-stream"),
]
_KNOWN_LENGTH = [*_FIELDS, (b"Content-Length", str(SMALL_SIZE).encode())]


def _response(fields: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", *(b"%s: %s" % field for field in fields), b"", body]
    return b"\r\n".join(lines)


PLAIN = _response(_KNOWN_LENGTH, BODY)
CHUNKED = _response(
    [*_FIELDS, (b"Transfer-Encoding", b"chunked")], b"%x\r\n%s\r\n0\r\n\r\n" % (SMALL_SIZE, BODY)
)
LAST = _response([*_KNOWN_LENGTH, (b"Connection", b"close")], BODY)


def answer_http11(response: bytes, end: bytes) -> Callable[[], Answer]:
    """Answers with `response` to each request that ends with `end`."""
    return lambda: lambda data: response if data.endswith(end) else b""


_PREFACE = 24
_SETTINGS, _HEADERS, _DATA = 4, 1, 0
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return b"%s%c%c%s%s" % (len(payload).to_bytes(3, "big"), kind, flags, stream.to_bytes(4, "big"), payload)


class HTTP2Answer:
    """Answers each HEADERS frame, which has to end its stream."""

    # As nginx sends them: with Huffman codes, and not added to the dynamic table.
    BLOCK = hpack.Encoder().encode(
        [
            (b":status", b"200"),
            *(hpack.NeverIndexedHeaderTuple(name.lower(), value) for name, value in _KNOWN_LENGTH),
        ]
    )

    def __init__(self) -> None:
        self._skip = _PREFACE
        self._buffer = b""

    def __call__(self, data: bytes) -> bytes:
        skipped = min(self._skip, len(data))
        self._buffer += data[skipped:]
        answers = []
        if self._skip:
            self._skip -= skipped
            answers.append(_frame(_SETTINGS, 0, 0, b""))
        for kind, flags, stream in self._frames():
            if kind == _SETTINGS and not flags & _ACK:
                answers.append(_frame(_SETTINGS, _ACK, 0, b""))
            elif kind == _HEADERS:
                assert flags & _END_STREAM
                answers.append(_frame(_HEADERS, _END_HEADERS, stream, self.BLOCK))
                answers.append(_frame(_DATA, _END_STREAM, stream, BODY))
        return b"".join(answers)

    def _frames(self) -> Iterator[tuple[int, int, int]]:
        buffer = self._buffer
        while len(buffer) >= 9:
            end = 9 + int.from_bytes(buffer[:3], "big")
            if len(buffer) < end:
                break
            yield buffer[3], buffer[4], int.from_bytes(buffer[5:9], "big")
            buffer = buffer[end:]
        self._buffer = buffer


class StoppedClock(trio.abc.Clock):
    """However slow the machine is, no deadline passes, and no time has gone by between two requests."""

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return 1000.0

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - self.current_time()


class Pairs(trio_exchange.Connector):
    """Connects to peers in the same thread."""

    def __init__(self, nursery: trio.Nursery, new_answer: Callable[[], Answer], *, close: bool) -> None:
        self._nursery = nursery
        self._new_answer = new_answer
        self._close = close

    async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._nursery.start_soon(self._serve, theirs, self._new_answer())
        await trio.lowlevel.checkpoint()
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    async def _serve(self, sock: socket.socket, answer: Answer) -> None:
        with sock:
            while True:
                await trio.lowlevel.wait_readable(sock)
                data = sock.recv(65536)
                if not data:
                    break
                if response := answer(data):
                    sock.sendall(response)
                    if self._close:
                        break


@asynccontextmanager
async def connecting(new_answer: Callable[[], Answer], *, close: bool = False) -> AsyncIterator[Pairs]:
    async with trio.open_nursery() as nursery:
        yield Pairs(nursery, new_answer, close=close)
        nursery.cancel_scope.cancel()


def requests(
    new_answer: Callable[[], Answer],
    method: str = "GET",
    *,
    headers: list[tuple[bytes, bytes]] = HEADERS,
    content: bytes | None = None,
    extensions: dict[str, Any] | None = None,
    http2: bool = False,
    close: bool = False,
) -> Scenario:
    """A scenario of this client: one request after the other."""

    async def run(count: int) -> None:
        async with (
            connecting(new_answer, close=close) as connector,
            trio_exchange.ConnectionPool(connector=connector, http1=not http2, http2=http2) as pool,
        ):
            for _ in range(count):
                response = await pool.request(
                    method, URL, headers=headers, content=content, extensions=extensions
                )
                assert response.content == BODY

    return run


async def bare_loop(count: int) -> None:
    """What the others are compared with: a plain loop over h11, without this client."""
    async with connecting(answer_http11(PLAIN, REQUEST_END)) as connector:
        stream = await connector.connect_tcp("example.com", 80)
        connection = h11.Connection(h11.CLIENT)
        for _ in range(count):
            request = h11.Request(
                method=b"GET", target=b"/path", headers=[(b"Host", b"example.com"), *HEADERS]
            )
            head = connection.send(request) or b""
            await stream.send_all(head + (connection.send(h11.EndOfMessage()) or b""))
            await receive_response(stream, connection, 200, SMALL_SIZE)
        await stream.aclose()


SCENARIOS: dict[str, Scenario] = {
    REFERENCE: bare_loop,
    "http11-get": requests(answer_http11(PLAIN, REQUEST_END)),
    "http11-get-timeouts": requests(answer_http11(PLAIN, REQUEST_END), extensions={"timeout": TIMEOUTS}),
    "http11-get-chunked": requests(answer_http11(CHUNKED, REQUEST_END)),
    "http11-post": requests(answer_http11(PLAIN, BODY), "POST", content=BODY),
    "http11-connect-each": requests(
        answer_http11(LAST, REQUEST_END), headers=[*HEADERS, (b"Connection", b"close")], close=True
    ),
    "http2-get": requests(HTTP2Answer, http2=True),
}


def main() -> None:
    counts = [int(argument) for argument in sys.argv[1:]]
    runs = {}
    gc.collect()
    gc.freeze()
    gc.disable()
    # It decides the order in which Trio resumes tasks that are ready.
    trio._core._run._r.seed(0)
    for name, scenario in SCENARIOS.items():
        for count in counts:
            child = os.fork()
            if not child:
                trio.run(scenario, count, clock=StoppedClock())
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if status:
                sys.exit(f"{name} failed")
            runs[child] = (name, count)
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
