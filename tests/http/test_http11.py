from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.checks import assert_unharmed, internals, open_sockets
from tests.harness.contents import Pieces, stream_of
from tests.harness.networks import Network, Sockets
from tests.harness.peers import DELIVERIES, Recorder, Script, reset, respond, stall, transcript
from tests.harness.streams import WrappedHalfCloseable
from trio_exchange import (
    ConnectionPool,
    LocalProtocolError,
    ReadError,
    RemoteProtocolError,
    Response,
    WriteError,
)
from trio_exchange._http.http11_explanations import explain_received
from trio_exchange.testing import ScriptedPeer

URL = "http://example.com/"
LIMIT = 100 * 1024
MEGABYTE = 1024 * 1024


async def settled(pool: ConnectionPool, *, idle: int = 0) -> None:
    """Check, once every closing has been done, that only `idle` connections are left."""
    await trio.testing.wait_all_tasks_blocked()
    assert_unharmed(pool, idle=idle)


async def until_readable(response: Response) -> None:
    await trio.lowlevel.wait_readable(response.extensions["network_stream"].get_extra_info("socket"))


async def tolerate(peer: ScriptedPeer) -> None:
    """An ordinary server that does not mind requests that break off."""
    with contextlib.suppress(h11.RemoteProtocolError):
        await respond(peer)


async def drain(peer: ScriptedPeer) -> bytes:
    """All that the client sends until it closes."""
    received = b""
    while data := await peer.receive_some():
        received += data
    return received


# -- Transcripts.


@dataclass
class Case:
    """A response: its bytes, and what it is taken for.

    Attributes:
        line: The status line.
        rest: All that follows.
        body: What there is in it of a body.
        before: What comes before the status line.
        until_close: Whether the connection's end is that of the body.
        reused: Whether the connection serves another request.
    """

    line: bytes
    rest: bytes
    body: bytes = b""
    before: bytes = b""
    method: str = "GET"
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    until_close: bool = False
    reused: bool = True

    def __post_init__(self) -> None:
        self.data = b"%b%b\r\n%b" % (self.before, self.line, self.rest)
        self.reused = self.reused and not self.until_close


OK_LINE, NO_CONTENT, NOT_MODIFIED = (
    b"HTTP/1.1 200 OK",
    b"HTTP/1.1 204 No Content",
    b"HTTP/1.1 304 Not Modified",
)
HELLO = b"Content-Length: 5\r\n\r\nhello"

CASES = {
    "content-length": Case(OK_LINE, HELLO, b"hello"),
    "the same length twice": Case(
        OK_LINE, b"Content-Length: 5, 5\r\ncontent-length: 5\r\n\r\nhello", b"hello"
    ),
    "empty": Case(OK_LINE, b"Content-Length: 0\r\n\r\n"),
    "chunked": Case(
        OK_LINE,
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n00a\r\n, exchange\r\n0\r\n\r\n",
        b"hello, exchange",
    ),
    "chunk extensions and trailers": Case(
        OK_LINE,
        b'transfer-encoding: Chunked\r\n\r\n5;a=b;c="d"\r\nhello\r\n0;last\r\nX-Sum: 1\r\nx-sum: 2\r\n\r\n',
        b"hello",
        trailers=[(b"X-Sum", b"1"), (b"x-sum", b"2")],
    ),
    "close-delimited": Case(OK_LINE, b"A: b\r\n\r\nhello", b"hello", until_close=True),
    "HEAD with a length": Case(OK_LINE, b"Content-Length: 5\r\n\r\n", method="HEAD"),
    "HEAD with a coding": Case(OK_LINE, b"Transfer-Encoding: chunked\r\n\r\n", method="HEAD"),
    "HEAD with the same length twice": Case(
        OK_LINE, b"Content-Length: 5, 5\r\nContent-Length: 5\r\n\r\n", method="HEAD"
    ),
    "HEAD with both lengths": Case(
        OK_LINE, b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", method="HEAD", reused=False
    ),
    "HEAD without either": Case(OK_LINE, b"\r\n", method="HEAD"),
    "204": Case(NO_CONTENT, b"\r\n"),
    "204 with a length": Case(NO_CONTENT, b"Content-Length: 5\r\n\r\n", reused=False),
    "204 with a length of 0": Case(NO_CONTENT, b"Content-Length: 0\r\n\r\n"),
    "204 with a coding": Case(NO_CONTENT, b"Transfer-Encoding: chunked\r\n\r\n", reused=False),
    "204 with both lengths": Case(
        NO_CONTENT, b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n", reused=False
    ),
    "204 to HEAD with a length": Case(NO_CONTENT, b"Content-Length: 5\r\n\r\n", method="HEAD", reused=False),
    "205": Case(b"HTTP/1.1 205 X", b"Content-Length: 0\r\n\r\n"),
    "205 with a body": Case(b"HTTP/1.1 205 X", HELLO, b"hello"),
    "205 with a coding": Case(b"HTTP/1.1 205 X", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "205 without either": Case(b"HTTP/1.1 205 X", b"\r\nhello", b"hello", until_close=True),
    "304": Case(NOT_MODIFIED, b"\r\n"),
    "304 with a length": Case(NOT_MODIFIED, b"Content-Length: 5\r\n\r\n"),
    "304 with a coding": Case(NOT_MODIFIED, b"Transfer-Encoding: chunked\r\n\r\n"),
    "304 with both lengths": Case(
        NOT_MODIFIED, b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", reused=False
    ),
    "1xx before": Case(
        b"HTTP/1.1 404 Not Found",
        b"Content-Length: 2\r\n\r\nno",
        b"no",
        before=b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        b"HTTP/1.1 102 \r\nContent-Length: 0\r\n\r\n",
    ),
    "1xx with a length before": Case(
        OK_LINE, HELLO, b"hello", before=b"HTTP/1.1 102 \r\nContent-Length: 7\r\n\r\n", reused=False
    ),
    "1xx with a coding before": Case(
        OK_LINE,
        HELLO,
        b"hello",
        before=b"HTTP/1.1 103 X\r\nTransfer-Encoding: chunked\r\n\r\nHTTP/1.1 103 X\r\n\r\n",
        reused=False,
    ),
    "HTTP/1.0": Case(b"HTTP/1.0 200 OK", b"\r\nhello", b"hello", until_close=True),
    "HTTP/1.0 with a length": Case(b"HTTP/1.0 200 OK", HELLO, b"hello", reused=False),
    "HTTP/1.0 with keep-alive": Case(
        b"HTTP/1.0 200 OK",
        b"Connection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
        b"hello",
        reused=False,
    ),
    "Connection: close": Case(
        OK_LINE, b"Connection: a, Close\r\nContent-Length: 5\r\n\r\nhello", b"hello", reused=False
    ),
    "custom reason": Case(b"HTTP/1.1 200 All \x80 is fine", b"Content-Length: 0\r\n\r\n"),
    "empty reason": Case(b"HTTP/1.1 200 ", b"Content-Length: 0\r\n\r\n"),
    "no reason": Case(b"HTTP/1.1 200", b"Content-Length: 0\r\n\r\n"),
    "unknown status": Case(b"HTTP/1.1 999 X", b"Content-Length: 1\r\n\r\n!", b"!"),
    "both lengths": Case(
        OK_LINE,
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"hello",
        reused=False,
    ),
    "folded header": Case(OK_LINE, b"A: b\r\n  c\r\nContent-Length: 1\r\n\r\nx", b"x"),
}

# Where nothing but the connection's end ends the body, what follows belongs to it.
DELIMITED_CASES = {name: case for name, case in CASES.items() if not case.until_close}


def check_response(case: Case, response: Response) -> None:
    version, status, *reason = case.line.split(b" ", 2)
    assert response.status == int(status)
    assert response.content == case.body
    assert response.extensions["http_version"] == version
    assert response.extensions["reason_phrase"] == b"".join(reason)
    assert response.extensions["trailing_headers"] == case.trailers


@pytest.mark.parametrize("name", CASES)
@DELIVERIES
async def test_transcripts(network: Network, name: str, byte_by_byte: bool) -> None:
    case = CASES[name]
    script = transcript(case.data, byte_by_byte=byte_by_byte, then_close=case.until_close)
    async with network.pool(script) as pool:
        for requests in (1, 2):
            check_response(case, await pool.request(case.method, URL))
            await settled(pool, idle=int(case.reused))
            assert len(network.dialled) == (1 if case.reused else requests)


@pytest.mark.parametrize("name", CASES)
@DELIVERIES
async def test_transcripts_in_pieces(network: Network, name: str, byte_by_byte: bool) -> None:
    case = CASES[name]
    script = transcript(case.data, byte_by_byte=byte_by_byte, then_close=case.until_close)
    async with network.pool(script) as pool:
        async with pool.stream(case.method, URL) as response:
            pieces = []
            chunks = response.aiter_stream()
            while True:
                try:
                    with trio.testing.assert_checkpoints():
                        pieces.append(await anext(chunks))
                except StopAsyncIteration:
                    break
            assert all(pieces)
            assert b"".join(pieces) == case.body
            with trio.testing.assert_checkpoints(), pytest.raises(StopAsyncIteration):
                await anext(chunks)
            assert response.extensions["trailing_headers"] == case.trailers
        await settled(pool, idle=int(case.reused))


@pytest.mark.parametrize("name", DELIMITED_CASES)
@pytest.mark.parametrize("trailing", [b"\r\n", b"x", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"])
async def test_transcripts_with_trailing_bytes(network: Network, name: str, trailing: bytes) -> None:
    case = CASES[name]
    async with network.pool(transcript(case.data + trailing)) as pool:
        for requests in (1, 2):
            check_response(case, await pool.request(case.method, URL))
            await settled(pool)
            assert len(network.dialled) == requests


@pytest.mark.parametrize("name", DELIMITED_CASES)
async def test_transcripts_with_trailing_bytes_that_come_later(sockets: Sockets, name: str) -> None:
    case = CASES[name]

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(case.data)
        await received.wait()
        await peer.send(b"x")
        sent.set()
        await trio.sleep_forever()

    async with sockets.pool(script) as pool:
        for requests in (1, 2):
            received, sent = trio.Event(), trio.Event()
            check_response(case, await pool.request(case.method, sockets.url))
            received.set()
            await sent.wait()
            assert pool.statistics().connections_opened == requests


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 204 X\r\nContent-Length: 43\r\n\r\n",
        b"HTTP/1.1 204 X\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 103 X\r\nContent-Length: 43\r\n\r\nHTTP/1.1 204 X\r\n\r\n",
        b"HTTP/1.1 103 X\r\nTransfer-Encoding: chunked\r\n\r\nHTTP/1.1 204 X\r\n\r\n",
    ],
    ids=["204, length", "204, coding", "103, length", "103, coding"],
)
@DELIVERIES
async def test_a_body_that_may_not_be_is_not_taken_for_the_next_response(
    network: Network, head: bytes, byte_by_byte: bool
) -> None:
    """The body comes when the next request has been sent, and looks like the answer to that."""

    async def script(peer: ScriptedPeer) -> None:
        async for request in peer:
            if request.target == b"/first":
                await peer.send(head, byte_by_byte=byte_by_byte)
                async for _ in peer:
                    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
            else:
                await peer.send_response(200, body=b"good")

    async with network.pool(script) as pool:
        assert (await pool.request("GET", URL + "first")).status == 204
        assert (await pool.request("GET", URL + "second")).content == b"good"


async def test_headers_keep_order_and_case(network: Network) -> None:
    script = transcript(b"HTTP/1.1 200 OK\r\nB: 1\r\na: \t2 \r\nB:\r\nCONTENT-length: 0\r\n\r\n")
    async with network.pool(script) as pool:
        response = await pool.request("GET", URL)
    assert response.headers == [(b"B", b"1"), (b"a", b"2"), (b"B", b""), (b"CONTENT-length", b"0")]


# -- Hostile answers.


def head_of_size(size: int) -> bytes:
    start, end = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX: ", b"\r\n\r\n"
    return start + b"x" * (size - len(start) - len(end)) + end


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 103 X\r\nA: b\r\n\r\n"], ids=["first", "after a 1xx"])
@pytest.mark.parametrize(("limit", "byte_by_byte"), [(1000, False), (1000, True), (LIMIT, False)])
async def test_the_limit_of_a_head_is_exact(
    network: Network, limit: int, byte_by_byte: bool, before: bytes
) -> None:
    options: dict[str, Any] = {} if limit == LIMIT else {"max_header_bytes": limit}
    for size in (limit, limit + 1):
        script = transcript(before + head_of_size(size) + b"body", byte_by_byte=byte_by_byte)
        async with network.pool(script, **options) as pool:
            if size == limit:
                # Twice, for the second head has to fit just as well.
                for _ in range(2):
                    assert (await pool.request("GET", URL)).content == b"body"
            else:
                with pytest.raises(RemoteProtocolError):
                    await pool.request("GET", URL)
            await settled(pool, idle=int(size == limit))


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1])
async def test_the_limit_of_a_head_in_large_pieces(network: Network, size: int) -> None:
    head = head_of_size(size)

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        for start in range(0, len(head), 10_000):
            await peer.send(head[start : start + 10_000])
            await trio.testing.wait_all_tasks_blocked()
        await peer.send(b"body")
        await trio.sleep_forever()

    async with network.pool(script) as pool:
        if size == LIMIT:
            assert (await pool.request("GET", URL)).content == b"body"
        else:
            with pytest.raises(RemoteProtocolError):
                await pool.request("GET", URL)


async def test_the_limit_of_an_informational_head(network: Network) -> None:
    head = b"HTTP/1.1 103 X\r\nA: " + b"x" * LIMIT + b"\r\n\r\n"
    async with network.pool(transcript(head + b"HTTP/1.1 204 X\r\n\r\n")) as pool:
        with pytest.raises(RemoteProtocolError, match="larger"):
            await pool.request("GET", URL)


def endless(beginning: bytes, piece: bytes) -> Script:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(beginning)
        while True:
            await peer.send(piece)
            await trio.lowlevel.checkpoint()

    return script


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 50),
        (b"HTTP/1.1 200 OK\r\nA: ", b"x" * 5000),
        (b"HTTP/1.1 200 ", b"x" * 5000),
        (b"", b"x" * 5000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0" * 50),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x" * 5000),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n" * 50),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: ", b"x" * 5000),
    ],
    ids=[
        "headers", "a header", "a reason", "a line", "100", "103", "a chunk's size", "an extension",
        "trailers", "a trailer",
    ],
)  # fmt: skip
async def test_what_does_not_end_is_ended(network: Network, beginning: bytes, piece: bytes) -> None:
    async with network.pool(endless(beginning, piece)) as pool:
        with pytest.raises(RemoteProtocolError):
            await pool.request("GET", URL)
        await settled(pool)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1 200 OK\r\n\r\n",
        b"HTTP/11 200 OK\r\n\r\n",
        b"http/1.1 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b" HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nspace before : colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: no name\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: first\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\rInjected: c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\x00c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0x1\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\naaaaaaaaaa",
        b"HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999999999\r\n\r\na",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"x\r\n",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"0x1\r\na\r\n0\r\n\r\n",
        CHUNKED + b" 1\r\na\r\n0\r\n\r\n",
        CHUNKED + b"1\r\nabc\r\n0\r\n\r\n",
        CHUNKED + b"1\r\na0\r\n\r\n",
        CHUNKED + b"1\r\naXX0\r\n\r\n",
        CHUNKED + b"fffffffffffffffffffff\r\na",
        CHUNKED + b"0\r\nno colon\r\n\r\n",
        CHUNKED + b"0\r\nA: b\x00\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nnonsense\r\n\r\n",
    ],
)
@DELIVERIES
async def test_garbage(network: Network, data: bytes, byte_by_byte: bool) -> None:
    async with network.pool(transcript(data, byte_by_byte=byte_by_byte)) as pool:
        with pytest.raises(RemoteProtocolError) as info:
            await pool.request("GET", URL)
        assert re.match(r"the (server|response)'?s? ", str(info.value))
        assert "bytearray" not in str(info.value)
        await settled(pool)


@pytest.mark.parametrize("byte_by_byte", [False, True])
@pytest.mark.parametrize("informed", [b"", b"HTTP/1.1 102 Processing\r\n\r\n"])
@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/2.0 200 OK\r\n", b"HELO", b"\x15\x03\x01\x00"]
)
async def test_what_is_not_http_is_refused_without_waiting_for_its_end(
    network: Network, answer: bytes, informed: bytes, byte_by_byte: bool
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(informed + answer, byte_by_byte=byte_by_byte)
        await trio.sleep_forever()

    async with network.pool(serve) as pool:
        with pytest.raises(RemoteProtocolError), trio.fail_after(10):
            await pool.request("GET", URL)


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"HTTP/1.1 20 OK\r\n\r\n",
            "the server sent the status line b'HTTP/1.1 20 OK'; "
            "expected is 'HTTP/1.1', a code of three digits and a reason",
        ),
        (
            b"HTTP/1.1 099 OK\r\n\r\n",
            "the server sent the status line b'HTTP/1.1 099 OK'; expected is a code from 100 to 999",
        ),
        (
            OK + b"A: b\r\nit's \"no\" colon\r\n\r\n",
            "the server sent the header line b'it\\'s \"no\" colon'; "
            "expected is a name, a colon and a value without control characters",
        ),
        (
            OK + b"A: " + b"\x00" * 1000 + b"\r\n\r\n",
            "the server sent the header line b'A: " + "\\x00" * 97 + "'...; "
            "expected is a name, a colon and a value without control characters",
        ),
        (
            OK + b" A: b\r\n\r\n",
            "the server sent a header line that begins with white space (b' A: b') and continues no other; "
            "expected is a name",
        ),
        (
            OK + b"Content-Length: 1\r\nA: b\r\ncontent-length: 2\r\n\r\nContent-Length: 3\r\n",
            "the server sent more than one Content-Length (b'Content-Length: 1', b'content-length: 2')",
        ),
        (
            b"HTTP/1.1 103 X\r\nContent-Length: 0\r\n\r\n" + OK + b"Content-Length: 1, 2\r\n\r\n",
            "the server sent more than one Content-Length (b'Content-Length: 1, 2')",
        ),
        (
            OK + b"Content-Length: -1\r\n\r\n",
            "the server sent a malformed Content-Length (b'Content-Length: -1'); "
            "expected are at most 20 digits",
        ),
        (
            OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            "the server sent more than one Transfer-Encoding "
            "(b'Transfer-Encoding: chunked', b'Transfer-Encoding: chunked'); expected is 'chunked', once",
        ),
        (
            OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
            "the server sent an unsupported Transfer-Encoding (b'Transfer-Encoding: gzip, chunked'); "
            "expected is 'chunked'",
        ),
        (
            b"HTTP/1.1 101 X\r\n\r\n",
            "the server sent 101 (Switching Protocols), but the request does not ask for an upgrade",
        ),
        (
            CHUNKED + b"0x1\r\n",
            "the server sent b'0x1\\r\\n' as the size of a chunk; expected are at most 20 hexadecimal digits",
        ),
        (CHUNKED + b"1\r\nab", "the server sent b'b' after a chunk; expected is b'\\r\\n'"),
        (
            CHUNKED + b"0\r\nContent-Length: x\r\n\r\n",
            "the server sent a malformed Content-Length (in the trailers); expected are at most 20 digits",
        ),
    ],
    ids=[
        "status line", "status code", "header line", "long header line", "continuation", "two lengths",
        "two lengths in one, after a 1xx", "length", "two codings", "coding", "switch", "chunk size",
        "chunk's end", "trailers",
    ],
)  # fmt: skip
@DELIVERIES
async def test_a_malformed_response_is_described(
    network: Network, data: bytes, message: str, byte_by_byte: bool
) -> None:
    async with network.pool(transcript(data, byte_by_byte=byte_by_byte)) as pool:
        with pytest.raises(RemoteProtocolError) as info:
            await pool.request("GET", URL)
    assert str(info.value) == message
    assert isinstance(info.value.__cause__, h11.RemoteProtocolError)


@pytest.mark.parametrize("scheme", ["http", "ws"])
@DELIVERIES
@pytest.mark.parametrize("trailing", [b"", b"\x15\x03\x03\x00\x02\x01\x00"])
async def test_a_server_that_speaks_tls_is_told_apart(
    network: Network, scheme: str, byte_by_byte: bool, trailing: bytes
) -> None:
    alert = b"\x15\x03\x01\x00\x02\x02\x46"
    script = transcript(alert + trailing, byte_by_byte=byte_by_byte, then_close=True)
    async with network.pool(script) as pool:
        with pytest.raises(RemoteProtocolError) as info:
            await pool.request("GET", f"{scheme}://example.com:8443/")
    assert str(info.value) == (
        f"the server does not speak HTTP/1 on this port, but TLS (use {scheme}s://example.com:8443)"
    )


async def test_what_looks_like_tls_within_tls_is_shown(tls: Sockets) -> None:
    async with tls.pool(transcript(b"\x15\x03\x01")) as pool:
        with pytest.raises(RemoteProtocolError, match=r"does not speak HTTP/1: it sent b'\\x15\\x03"):
            await pool.request("GET", tls.url)


def test_errors_that_h11_does_not_raise_yet() -> None:
    assert explain_received("something new", b"", 1) == "the server broke HTTP/1.1: something new"
    assert explain_received("illegal header line", b"", 1).startswith(
        "the server sent the header line illegal"
    )


@pytest.mark.parametrize(
    "whole",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\nA: b\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["content-length", "chunked", "1xx"],
)
async def test_an_answer_that_ends_early_wherever(network: Network, whole: bytes) -> None:
    for length in range(len(whole)):
        async with network.pool(transcript(whole[:length], then_close=True)) as pool:
            with pytest.raises(RemoteProtocolError):
                await pool.request("GET", URL)
            await settled(pool)


async def test_an_answer_that_is_reset(sockets: Sockets) -> None:
    async def script(peer: ScriptedPeer) -> None:
        request = await peer.receive_request()
        if request.target == b"/body":
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab")
        reset(peer)

    async with sockets.pool(script) as pool:
        for target in ("/", "/body"):
            with pytest.raises((ReadError, RemoteProtocolError)):
                await pool.request("GET", sockets.url + target)
        await settled(pool)


async def test_a_head_that_is_reset_in_its_middle_is_not_asked_for_again(sockets: Sockets) -> None:
    requests = 0

    async def script(peer: ScriptedPeer) -> None:
        nonlocal requests
        await peer.receive_request()
        requests += 1
        await peer.send(b"HTTP/1.1 200 OK\r\nA: ")
        await trio.testing.wait_all_tasks_blocked(0.05)
        reset(peer)

    async with sockets.pool(script) as pool:
        with pytest.raises(ReadError):
            await pool.request("GET", sockets.url)
        await settled(pool)
    assert requests == 1


EARLY = "the server closed the connection"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (OK + b"A: " + b"x" * LIMIT, f"the response's head is larger than {LIMIT} bytes"),
        (
            CHUNKED + b"1" * (LIMIT + 1),
            f"the response's trailers, or the size of a chunk in it, are larger than {LIMIT} bytes",
        ),
        *(
            (CHUNKED + end, f"{EARLY} before the end of the body")
            for end in (b"", b"1", b"1\r\n", b"1\r\na", b"0\r\n")
        ),
        (b"", f"{EARLY} without sending a response"),
        (b"HTTP/1.1 200", f"{EARLY} in the middle of the response's head"),
        (OK + b"Content-Length: 5\r\n\r\nab", f"{EARLY} 3 bytes before the end of the body"),
    ],
    ids=lambda value: value[-20:] if isinstance(value, str) else "",
)
async def test_a_response_that_is_too_long_or_ends_early_is_described(
    network: Network, data: bytes, message: str
) -> None:
    async with network.pool(transcript(data, then_close=True)) as pool:
        with pytest.raises(RemoteProtocolError) as info:
            await pool.request("GET", URL)
    assert str(info.value) == message
    if len(data) > LIMIT or CHUNKED in data:
        assert isinstance(info.value.__cause__, h11.RemoteProtocolError)


async def test_an_error_in_the_body_stays(network: Network) -> None:
    async with network.pool(transcript(CHUNKED + b"1\r\na\r\nnonsense\r\n")) as pool:
        async with pool.stream("GET", URL) as response:
            chunks = response.aiter_stream()
            assert await anext(chunks) == b"a"
            for _ in range(2):
                with pytest.raises(RemoteProtocolError, match="as the size of a chunk"):
                    await anext(chunks)
        await settled(pool)


# -- Leaving early.


def in_two_parts(first: bytes, second: bytes) -> tuple[Script, trio.Event]:
    """A server that sends the second part of its answer when the event is set, and then serves on."""
    go = trio.Event()

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(first)
        await go.wait()
        await peer.send(second)
        await respond(peer)

    return script, go


PARTS = {
    "content-length": (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n", b"abc", b"def"),
    "chunked": (CHUNKED, b"3\r\nabc\r\n", b"3\r\ndef\r\n0\r\nA: b\r\n\r\n"),
}


@pytest.mark.parametrize("framing", PARTS)
@pytest.mark.parametrize(
    "come", ["with the head", "later", "in part later", "read in part", "not", "in part"]
)
async def test_leaving_early(sockets: Sockets, framing: str, come: str) -> None:
    head, first, second = PARTS[framing]
    with_head = {"with the head": first + second, "later": b"", "not": b""}.get(come, first)
    script, go = in_two_parts(head + with_head, (first + second)[len(with_head) :])
    async with sockets.pool(script) as pool:
        async with pool.stream("GET", sockets.url) as response:
            if come == "read in part":
                assert await anext(response.aiter_stream()) == b"abc"
            if come not in ("not", "in part"):
                go.set()
            if "later" in come or come == "read in part":
                await until_readable(response)
        reused = come not in ("not", "in part")
        await settled(pool, idle=int(reused))
        with pytest.raises((ReadError, RuntimeError)):
            await response.aread()
        go.set()
        assert (await pool.request("PUT", sockets.url, content=b"x")).status == 200
        assert pool.statistics().connections_opened == (1 if reused else 2)


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
async def test_leaving_early_does_not_read_much(tcp: Sockets, framing: str) -> None:
    body = b"x" * MEGABYTE
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    if framing == "chunked":
        answer = CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with tcp.pool(transcript(answer)) as pool:
        async with pool.stream("GET", tcp.url):
            pass
        await settled(pool)


@pytest.mark.parametrize("after", [b"", b"garbage"], ids=["nothing", "garbage"])
@pytest.mark.parametrize("framing", PARTS)
async def test_leaving_early_with_bytes_beyond(network: Network, framing: str, after: bytes) -> None:
    async with network.pool(transcript(b"".join(PARTS[framing]) + after)) as pool:
        async with pool.stream("GET", URL):
            pass
        await settled(pool, idle=int(not after))


@pytest.mark.parametrize("rest", [b"", b"3\r\nab", b"nonsense\r\n"], ids=["closed", "truncated", "nonsense"])
async def test_leaving_early_what_is_broken(tcp: Sockets, rest: bytes) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(CHUNKED)
        await go.wait()
        await peer.send(rest)

    go = trio.Event()
    async with tcp.pool(script) as pool:
        async with pool.stream("GET", tcp.url) as response:
            go.set()
            await until_readable(response)
        await settled(pool)


@pytest.mark.parametrize("byte_by_byte", [False, True])
async def test_leaving_at_the_last_byte(sockets: Sockets, byte_by_byte: bool) -> None:
    async def script(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", byte_by_byte=byte_by_byte)

    async with sockets.pool(script) as pool:
        for _ in range(2):
            async with pool.stream("GET", sockets.url) as response:
                chunks = response.aiter_stream()
                body = b""
                while len(body) < 5:
                    body += await anext(chunks)
            assert body == b"hello"
            assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1


async def test_the_pool_closes_while_a_body_is_read(tcp: Sockets, nursery: trio.Nursery) -> None:
    async def close() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await pool.aclose()

    async with (
        tcp.pool(in_two_parts(PARTS["chunked"][0], b"")[0]) as pool,
        pool.stream("GET", tcp.url) as response,
    ):
        nursery.start_soon(close)
        with pytest.raises(ReadError):
            await response.aread()


# -- Uploads.


@pytest.mark.parametrize("size", [0, 1, 16 * 1024, 16 * 1024 + 1, 3 * MEGABYTE])
async def test_content_arrives_whole(sockets: Sockets, size: int) -> None:
    recorder = Recorder()
    async with sockets.pool(recorder) as pool:
        length = {"Content-Length": str(size)}
        contents: list[tuple[Any, dict[str, str]]] = [
            (b"x" * size, {}),
            (stream_of(size), {}),
            (stream_of(size), length),
            ([b"", b"x" * size, b""], {}),
        ]
        for content, headers in contents:
            response = await pool.request("POST", sockets.url, content=content, headers=headers)
            assert response.status == 200
        assert [len(body) for body in recorder.bodies] == [size] * 4
        assert_unharmed(pool, idle=1)
        assert pool.statistics().connections_opened == 1


@pytest.mark.parametrize("piece", [bytearray(b"abc"), memoryview(b"abc"), memoryview(b"aabbcc")[::2]])
async def test_pieces_like_bytes(network: Network, piece: Any) -> None:
    async with network.pool(respond) as pool:
        response = await pool.request("PUT", URL, content=Pieces(piece, b"d"))
    assert response.content == b"abcd"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("then", ["mute", "close", "reset"])
async def test_an_early_answer(sockets: Sockets, streamed: bool, then: str) -> None:
    """The server never reads the rest, which is far more than the buffers hold."""

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        # The answer may not overtake its own reset, nor does a real server's.
        await peer.send_response(413, body=b"too large")
        if then == "mute":
            await trio.sleep_forever()
        if then == "reset":
            reset(peer)

    before = open_sockets()
    async with sockets.pool(script) as pool:
        size = 20 * MEGABYTE
        content = Pieces(*[b"x" * 60_000] * (size // 60_000)) if streamed else b"x" * size
        with trio.fail_after(10):
            async with pool.stream("POST", sockets.url, content=content) as response:
                assert response.status == 413
                assert await response.aread() == b"too large"
        with trio.fail_after(10):
            while pool.connections:
                await internals(pool)[0].wait_closed()
    sockets.server.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert open_sockets() <= before


async def test_an_early_answer_with_a_long_body(sockets: Sockets) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send_response(413, body=b"y" * 10 * MEGABYTE)
        await trio.sleep_forever()

    async with sockets.pool(script) as pool:
        with trio.fail_after(10):
            response = await pool.request("POST", sockets.url, content=b"x" * 20 * MEGABYTE)
        assert len(response.content) == 10 * MEGABYTE


@pytest.mark.parametrize(("delay", "kept"), [(0.01, True), (1, False)])
async def test_a_complete_response_waits_a_moment_for_the_upload(
    network: Network, autojump_clock: MockClock, delay: float, kept: bool
) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send_response()
        await drain(peer)

    async def late() -> None:
        await trio.sleep(delay)

    async with network.pool(script) as pool:
        began = trio.current_time()
        await pool.request("POST", URL, content=Pieces(b"x", late))
        assert trio.current_time() - began < 0.1
        await settled(pool, idle=int(kept))


# -- Content that is not what it should be.


async def test_a_generator_that_is_looked_into_is_ended_where_it_gives_what_is_not_bytes(
    network: Network,
) -> None:
    ended = False

    async def generate() -> AsyncIterator[Any]:
        nonlocal ended
        try:
            yield None
        finally:
            ended = True

    async with network.pool(tolerate) as pool:
        with pytest.raises(LocalProtocolError, match="must give bytes, but gave NoneType"):
            await pool.request("GET", URL, content=generate())
        assert ended
        await settled(pool)


async def test_the_client_may_ask_for_the_end(network: Network) -> None:
    async with network.pool(tolerate) as pool:
        await pool.request("GET", URL, headers={"Connection": "close"})
        await settled(pool)


@pytest.mark.parametrize("count", [1, 2])
async def test_headers_that_repeat_are_not_mixed_up(network: Network, count: int) -> None:
    """Headers that were checked for one request serve for the next only if they are the same."""
    recorder = Recorder()
    async with network.pool(recorder) as pool:
        for value in ("1", "1", "2", "1"):
            await pool.request("GET", URL, headers=[("A", value)] * count)
    assert [request.header(b"a") for request in recorder.requests] == [b"1", b"1", b"2", b"1"]


async def test_the_write_timeout_limits_each_send(network: Network, autojump_clock: MockClock) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        for _ in range(3):
            await peer.receive_chunk()
            await trio.sleep(2)
        await peer.receive_body()
        await peer.send_response()
        await trio.sleep_forever()

    async with network.pool(script, lockstep=True) as pool:
        timeout = {"write": 3}
        response = await pool.request("POST", URL, content=[b"a", b"b", b"c"], timeout=timeout)
        assert response.status == 200


# -- Where sending fails.


async def test_a_server_that_breaks_off_the_upload(sockets: Sockets) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        reset(peer)

    async with sockets.pool(script) as pool:
        with pytest.raises((WriteError, ReadError, RemoteProtocolError)):
            await pool.request("POST", sockets.url, content=b"x" * 20 * MEGABYTE)
        await settled(pool)


@pytest.mark.parametrize("content", [b"x" * 100_000, Pieces(b"x"), b"x"], ids=["large", "streamed", "small"])
async def test_the_write_error_explains_that_no_answer_came(network: Network, content: Any) -> None:
    """The server stops to receive, and closes a moment later."""

    async def script(peer: ScriptedPeer) -> None:
        assert isinstance(peer.stream, trio.StapledStream)
        await peer.stream.receive_stream.aclose()
        await trio.testing.wait_all_tasks_blocked()

    async with network.pool(script) as pool:
        with pytest.raises(WriteError) as info:
            await pool.request("POST", URL, content=content)
        assert isinstance(info.value.__cause__, trio.BrokenResourceError)
        await settled(pool)


async def test_a_connection_that_breaks_before_the_head_is_sent(network: Network) -> None:
    async def script(peer: ScriptedPeer) -> None:
        pass

    async with network.pool(script, lockstep=True) as pool:
        with pytest.raises(WriteError):
            await pool.request("GET", URL)
        await settled(pool)


async def test_an_answer_is_read_though_the_head_could_not_be_sent(network: Network) -> None:
    """A server may refuse a connection in HTTP, without reading from it."""

    async def script(peer: ScriptedPeer) -> None:
        await peer.send_response(503, [(b"Connection", b"close")], b"busy")
        peer_has_sent.set()

    peer_has_sent = trio.Event()
    async with network.pool(script) as pool:

        async def wait(event: str, info: dict[str, Any]) -> None:
            if event == "http11.send_request_headers.started":
                await peer_has_sent.wait()
                await trio.testing.wait_all_tasks_blocked()

        response = await pool.request("GET", URL, extensions={"trace": wait})
        assert (response.status, response.content) == (503, b"busy")


async def test_cancelling_a_request_that_is_not_received_leaves_nothing(
    network: Network, autojump_clock: MockClock
) -> None:
    async with network.pool(stall, lockstep=True) as pool:
        for content in (b"x" * 100_000, Pieces(b"x", trio.sleep_forever)):
            with trio.move_on_after(1) as scope:
                await pool.request("POST", URL, content=content)
            assert scope.cancelled_caught
            await settled(pool)


# -- The connection.


async def test_a_connection_says_what_it_does(network: Network) -> None:
    script, go = in_two_parts(*(PARTS["content-length"][0], b"abcdef"))
    async with network.pool(script) as pool:
        async with pool.stream("GET", URL) as response:
            [connection] = internals(pool)
            assert (
                repr(connection) == "<HTTP11Connection 'http://example.com:80', HTTP/1.1, active, 1 request>"
            )
            go.set()
            await response.aread()
        assert connection.state == "idle"
        await pool.request("GET", URL)
        assert repr(connection) == "<HTTP11Connection 'http://example.com:80', HTTP/1.1, idle, 2 requests>"
        connection.close_soon()
        assert connection.state == "closing"
        connection.close_soon()
        await connection.wait_closed()
        assert connection.state == "closed"
        # Also after the end, when there is no event for it yet.
        connection = await a_connection(pool)
        connection.close_soon()
        await trio.testing.wait_all_tasks_blocked()
        assert connection.state == "closed"
        await connection.wait_closed()


async def a_connection(pool: ConnectionPool) -> Any:
    await pool.request("GET", URL)
    return internals(pool)[0]


def tasks_of(pool: ConnectionPool) -> int:
    """The number of the pool's tasks, without those of its managers."""
    internal: Any = pool
    return len(internal._pool_nursery._nursery.child_tasks) - len(internal._managers)


async def test_a_connection_has_no_task_until_it_is_to_be_closed(sockets: Sockets) -> None:
    async with sockets.pool() as pool:
        await pool.request("GET", sockets.url)
        [connection] = internals(pool)
        assert (connection.state, tasks_of(pool)) == ("idle", 0)
        connection.close_soon()
        assert (connection.state, tasks_of(pool)) == ("closing", 1)
        # Closing a socket takes a single turn of the scheduler, in which this task may come first.
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        assert (connection.state, tasks_of(pool)) == ("closed", 0)
        assert_unharmed(pool)


class MuteTLS(WrappedHalfCloseable):
    """A stream whose closing waits for its peer for ever, until it is forced."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.closed = False

    async def aclose(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.closed = True


async def test_closing_never_waits_long_for_a_peer(network: Network, autojump_clock: MockClock) -> None:
    made = []

    def pair() -> tuple[MuteTLS, Any]:
        one, other = trio.testing.memory_stream_pair()
        made.append(MuteTLS(one))
        return made[0], other

    async with network.pool(pair=pair) as pool:
        await pool.request("GET", URL)
        began = trio.current_time()
    assert trio.current_time() - began == 1
    assert made[0].closed


async def test_a_server_that_closes_an_idle_connection(sockets: Sockets) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send_response(200, body=b"bye")

    async with sockets.pool(script) as pool:
        for requests in (1, 2, 3):
            assert (await pool.request("POST", sockets.url, content=b"x")).content == b"bye"
            await trio.testing.wait_all_tasks_blocked()
            assert pool.statistics().connections_opened == requests


async def test_tls_session_tickets_do_no_harm(tls: Sockets) -> None:
    """They come with the handshake's end, and may be read only with the first response, or after it."""
    async with tls.pool() as pool:
        for _ in range(3):
            await pool.request("GET", tls.url)
            await trio.testing.wait_all_tasks_blocked()
        assert pool.statistics().connections_opened == 1


async def test_a_piece_of_a_record_on_an_idle_connection_does_no_harm(tls: Sockets) -> None:
    """TLS may have to say something at any time, of which only a part may have come."""
    go, gone = trio.Event(), trio.Event()

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send_response(200, body=b"first")
        await go.wait()
        assert isinstance(peer.stream, trio.SSLStream)
        tcp = peer.stream.transport_stream
        held, record = trio.testing.memory_stream_one_way_pair()
        # What the TLS stream sends goes astray, so that it can be sent in two parts.
        peer.stream.transport_stream = trio.StapledStream(held, tcp)
        await peer.send_response(200, body=b"second")
        data = bytes(await record.receive_some())
        await tcp.send_all(data[:7])
        gone.set()
        await peer.receive_request()
        await tcp.send_all(data[7:])
        await trio.sleep_forever()

    async with tls.pool(script) as pool:
        assert (await pool.request("GET", tls.url)).content == b"first"
        go.set()
        await gone.wait()
        assert (await pool.request("GET", tls.url)).content == b"second"
        assert pool.statistics().connections_opened == 1


async def test_garbage_on_an_idle_tls_connection_ends_it(tls: Sockets) -> None:
    go, gone = trio.Event(), trio.Event()

    async def script(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send_response()
        await go.wait()
        assert isinstance(peer.stream, trio.SSLStream)
        await peer.stream.transport_stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        gone.set()
        await trio.sleep_forever()

    async with tls.pool(script) as pool:
        await pool.request("GET", tls.url)
        go.set()
        await gone.wait()
        assert (await pool.request("GET", tls.url)).status == 200
        assert pool.statistics().connections_opened == 2


class Delay:
    """A trace handler that, before the first request's head is sent, lets something arrive."""

    def __init__(self, pool: ConnectionPool, go: trio.Event) -> None:
        self._pool = pool
        self._go = go
        self.names: list[str] = []

    async def __call__(self, event: str, info: dict[str, Any]) -> None:
        self.names.append(event)
        if event == "http11.send_request_headers.started" and not self._go.is_set():
            self._go.set()
            [connection] = internals(self._pool)
            await trio.lowlevel.wait_readable(connection.info.get_extra_info("socket"))


STALE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstale"


@pytest.mark.parametrize("stale", [STALE, STALE[:1], b""], ids=["response", "a byte", "closed"])
@pytest.mark.parametrize(
    "make_content",
    [lambda: b"x", lambda: Pieces(b"x"), lambda: b"x" * MEGABYTE],
    ids=["small", "pieces", "large"],
)
async def test_what_arrives_on_an_idle_connection_during_a_trace_is_no_response(
    sockets: Sockets, stale: bytes, make_content: Any
) -> None:
    received = []

    async def script(peer: ScriptedPeer) -> None:
        async for request in peer:
            received.append(request.method)
            await peer.send_response(200, body=b"answer %d" % len(received))
            if len(received) == 1:
                await go.wait()
                if not stale:
                    return
                await peer.send(stale)

    go = trio.Event()
    async with sockets.pool(script) as pool:
        await pool.request("GET", sockets.url)
        delay = Delay(pool, go)
        response = await pool.request(
            "POST", sockets.url, content=make_content(), extensions={"trace": delay}
        )
        assert response.content == b"answer 2"
        assert received == [b"GET", b"POST"]
        assert pool.statistics().connections_opened == 2
        assert delay.names[:4] == [
            "http11.send_request_headers.started",
            "http11.send_request_headers.failed",
            "connection.close.started",
            "connection.close.complete",
        ]
        await settled(pool, idle=1)


@DELIVERIES
async def test_a_response_that_comes_before_the_first_request_is_the_last_one(
    sockets: Sockets, byte_by_byte: bool
) -> None:
    """A server that refuses a connection in HTTP may answer the request too; no other request gets that."""
    early = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 5\r\n\r\nearly"
    connections = 0

    async def script(peer: ScriptedPeer) -> None:
        nonlocal connections
        connections += 1
        if connections == 2:
            await respond(peer)
            return
        await go.wait()
        await peer.send(early[:1] if byte_by_byte else early)
        await peer.receive_request()
        if byte_by_byte:
            await peer.send(early[1:], byte_by_byte=True)
        async for _ in peer:
            await peer.send(STALE)

    go = trio.Event()
    async with sockets.pool(script) as pool:
        response = await pool.request("GET", sockets.url, extensions={"trace": Delay(pool, go)})
        assert (response.status, response.content) == (408, b"early")
        assert (await pool.request("PUT", sockets.url, content=b"own")).content == b"own"
        assert pool.statistics().connections_opened == 2


async def test_a_banner_before_the_first_request(sockets: Sockets) -> None:
    received = b""

    async def script(peer: ScriptedPeer) -> None:
        nonlocal received
        await go.wait()
        await peer.send(b"SSH-2.0-OpenSSH_9.6\r\n")
        received = await drain(peer)

    go = trio.Event()
    async with sockets.pool(script) as pool:
        delay = Delay(pool, go)
        with pytest.raises(RemoteProtocolError, match="does not speak HTTP/1: it sent b'SSH"):
            await pool.request("GET", sockets.url, extensions={"trace": delay})
        assert pool.statistics().connections_opened == 1
        assert "connection.retry.started" not in delay.names
        await settled(pool)
    assert received == b""
