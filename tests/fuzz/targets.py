"""What is fuzzed: each target takes an input, and raises if the client does not do as it must."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import trio
import trio.testing

from trio_exchange import ConnectionPool, ExchangeError, RemoteProtocolError
from trio_exchange._http.http2.frames import Frame, FrameSplitter, Violation, content_of, parse_goaway
from trio_exchange._http.http2.headers import check_fields, content_length, response_head

from .inputs import Bytes, Script, http2_script, http11_script
from .peer import Network
from .reference import chunks, chunks_by_h11, h11_alone, heads

# Of Trio's clock, which jumps; more than all timeouts together.
_FOREVER = 1000.0
_TIMEOUT = 5.0
_HIGHEST_STREAM = 5
_LARGEST_HEAD = 4096

#: What is seen of a response: status, headers, body (as far as it was read), and the error at its end.
Seen = tuple[int, list[tuple[bytes, bytes]], bytes, str | None]


class Misbehaviour(AssertionError):
    """The client did not do as it must."""


def check(condition: object, what: str) -> None:
    """Raise if the condition does not hold; not an assert, which `-O` would leave out."""
    if not condition:
        raise Misbehaviour(what)


def _run(main: Callable[..., Any], *args: Any) -> Any:
    async def limited() -> Any:
        with trio.move_on_after(_FOREVER):
            return await main(*args)
        raise Misbehaviour("it hangs")

    return trio.run(limited, clock=trio.testing.MockClock(autojump_threshold=0))


async def _fetch(
    pool: ConnectionPool,
    method: str,
    *,
    content: Any = None,
    most_chunks: int | None = None,
    headers: dict[str, str] | None = None,
) -> Seen | None:
    """Send a request; None if there is no response."""
    body: list[bytes] = []
    told: list[int] = []

    async def inform(status: int, _: Any) -> None:
        told.append(status)

    extensions: dict[str, Any] = {
        "timeout": {"read": _TIMEOUT, "write": _TIMEOUT},
        "informational": inform,
    }
    if method == "CONNECT":
        extensions["target"] = b"example.com:80"
    error = None
    try:
        async with pool.stream(
            method, "http://example.com/", headers=headers, content=content, extensions=extensions
        ) as response:
            status, fields = response.status, list(response.headers)
            check(all(100 <= each < 200 and each != 101 for each in told), f"it informed of {told}")
            try:
                async for chunk in response.aiter_stream():
                    check(chunk, "an empty chunk")
                    body.append(chunk)
                    if most_chunks is not None and len(body) >= most_chunks:
                        break
                if status == 101 or (method == "CONNECT" and 200 <= status < 300):
                    body.append(await response.extensions["network_stream"].read(100, timeout=1.0))
            except ExchangeError as exc:
                error = type(exc).__name__
    except ExchangeError:
        return None
    check(status >= 200 or status == 101, f"the final status is {status}")
    return status, fields, b"".join(body), error


async def _check_pool(pool: ConnectionPool) -> None:
    """Nothing is under way, once the connections that are to be closed are."""
    for connection in list(pool._manager):
        if connection.will_close:
            await connection.wait_closed()
    await trio.lowlevel.checkpoint()
    numbers = pool.statistics()
    check((numbers.active, numbers.connecting, numbers.waiting) == (0, 0, 0), f"the pool is {numbers}")
    for manager in pool._managers:
        used = {record.used for record in manager.scheduler._records.values()}
        check(used <= {0}, f"something is held of the connections: {used}")


async def _check_closed(pool: ConnectionPool, network: Network) -> None:
    check(pool.statistics().open == 0, f"the closed pool has connections: {pool.connections}")
    check(all(stream._closed for stream in network.streams), "a stream was left open")


# -- HTTP/1.1.

_METHODS = ("GET", "HEAD", "POST", "CONNECT")


def http11(data: bytes) -> None:
    """Two requests, one after the other, to a server that answers over HTTP/1.1 as it likes."""
    _run(_compare, http11_script(data))


async def _compare(script: Script) -> None:
    second, alone = await _exchange_twice(script)
    if second is None or alone is None:
        return
    # What the second request got has to be made of what was sent after it.
    expected = await _exchange_once(Script(script.options, (alone,), script.ends))
    if not (second[3] or (expected and expected[3])):
        check(second == expected, f"the answer {second} is not {expected}")


async def _exchange_twice(script: Script) -> tuple[Seen | None, tuple[bytes, ...] | None]:
    """The second answer, and what arrived for it, if it came on the connection of the first."""
    network = Network(script)
    pool = ConnectionPool(connector=network, max_header_bytes=_LARGEST_HEAD)
    options = script.options
    async with pool:
        most = (None, None, 1, 0)[options >> 4 & 3]
        await _request(pool, options, most)
        await _check_pool(pool)
        reused = len(network.streams) == 1 and pool.statistics().idle == 1
        second = await _request(pool, options >> 2, None)
        await _check_pool(pool)
        stream = network.streams[0]
        reused = reused and len(network.streams) == 1 and len(stream.arrived) == 2
    await _check_closed(pool, network)
    return second, stream.arrived[1] if reused else None


async def _request(pool: ConnectionPool, options: int, most_chunks: int | None) -> Seen | None:
    method = _METHODS[options & 3]
    content = b"upload" if method == "POST" else None
    return await _fetch(pool, method, content=content, most_chunks=most_chunks)


async def _exchange_once(script: Script) -> Seen | None:
    network = Network(script)
    async with ConnectionPool(connector=network, max_header_bytes=_LARGEST_HEAD) as pool:
        return await _request(pool, script.options >> 2, None)


# -- The recognizers of HTTP/1.1.


def recognizers(data: bytes) -> None:
    """What is recognized means the same to h11: a head, a chunked body, or all that a client can see."""
    script = http11_script(data)
    pieces = script.phases[0]
    match script.options >> 6:
        case 0:
            found, expected = heads(b"".join(pieces))
            check(found == expected, f"the head is {found}, not {expected}")
        case 1:
            stream = [*pieces, b""] if script.ends else [*pieces]
            seen, expected_body = chunks(stream), chunks_by_h11(stream)
            check(seen == expected_body, f"the body is {seen}, not {expected_body}")
        case _:
            usual = _run(_witness, script)
            with h11_alone():
                judged = _run(_witness, script)
            check(usual == judged, f"the client sees {usual}, not {judged}")


_HEADERS: tuple[dict[str, str], ...] = (
    {},
    {"Connection": "Upgrade", "Upgrade": "x"},
    {"Connection": "close"},
    {"Expect": "100-continue"},
)


async def _witness(script: Script) -> list[Any]:
    """Everything that a client sees of two exchanges, and of the connections that they leave."""
    network = Network(script)
    seen: list[Any] = []
    async with ConnectionPool(connector=network, max_header_bytes=_LARGEST_HEAD) as pool:
        for options in (script.options, script.options >> 2):
            seen.append(await _witness_one(pool, options, _HEADERS[script.variant & 3]))
            await _check_pool(pool)
            idle = pool.statistics().idle
            seen.append((len(network.streams), idle, [stream.sent for stream in network.streams]))
    await _check_closed(pool, network)
    return seen


async def _witness_one(pool: ConnectionPool, options: int, headers: dict[str, str]) -> list[Any]:
    method = _METHODS[options & 3]
    whole = not options & 0x20
    seen: list[Any] = []
    body = bytearray()

    async def inform(status: int, fields: Any) -> None:
        seen.append((status, list(fields)))

    extensions: dict[str, Any] = {
        "timeout": {"read": _TIMEOUT, "write": _TIMEOUT},
        "informational": inform,
    }
    if method == "CONNECT":
        extensions["target"] = b"example.com:80"
    content = b"upload" if method == "POST" else None
    try:
        async with pool.stream(
            method, "http://example.com/", headers=headers, content=content, extensions=extensions
        ) as response:
            said = response.extensions
            seen.append(
                (said["http_version"], response.status, said["reason_phrase"], list(response.headers))
            )
            async for chunk in response.aiter_stream():
                # h11 yields each chunk on its own.
                if not whole:
                    break
                body += chunk
            seen.append(list(said["trailing_headers"]))
            if response.status == 101 or (method == "CONNECT" and response.status < 300):
                seen.append(await said["network_stream"].read(100, timeout=1.0))
    except ExchangeError as exc:
        seen.append(repr(exc))
    return [*seen, bytes(body)]


# -- HTTP/2.


def http2(data: bytes) -> None:
    """Two requests at once and a third, to a server that sends what frames it likes."""
    _run(_multiplex, http2_script(data))


class _Upload:
    """A body that comes in pieces."""

    def __init__(self) -> None:
        self._left = 3

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.sleep(0.01)
        self._left -= 1
        if self._left < 0:
            raise StopAsyncIteration
        return b"0123456789"


async def _multiplex(script: Script) -> None:
    # The first frames arrive when there are two streams for them.
    network = Network(script, needed=2)
    pool = ConnectionPool(connector=network, http1=False, http2=True, max_header_bytes=_LARGEST_HEAD)
    options = script.options
    bodies: list[bytes] = []

    async def fetch(method: str, **given: Any) -> None:
        seen = await _fetch(pool, method, **given)
        if seen is not None:
            bodies.append(seen[2])

    async with pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, ("GET", "HEAD", "CONNECT", "GET")[options & 3])
            content = _Upload() if options & 4 else b"upload"
            most = 1 if options & 8 else None
            nursery.start_soon(lambda: fetch("POST", content=content, most_chunks=most))
        await _check_pool(pool)
        await fetch("GET")
        await _check_pool(pool)
        arrived = [b"".join(b"".join(phase) for phase in stream.arrived) for stream in network.streams]
    await _check_closed(pool, network)
    sources = [data for connection in arrived for data in _data_of_streams(connection)]
    for body in bodies:
        check(not body or any(source.startswith(body) for source in sources), "a body of no stream")


def _data_of_streams(data: bytes) -> Iterable[bytes]:
    """What each stream carries, taken apart once more."""
    streams: dict[int, bytearray] = {}
    while len(data) >= 9:
        size, kind, flags = int.from_bytes(data[:3], "big"), data[3], data[4]
        payload = data[9 : 9 + size]
        if kind == 0 and len(payload) == size:
            if flags & 8:
                payload = payload[1 : max(1, len(payload) - payload[0])] if payload else b""
            stream = int.from_bytes(data[5:9], "big") & 0x7FFFFFFF
            streams.setdefault(stream, bytearray()).extend(payload)
        data = data[9 + size :]
    return [bytes(each) for each in streams.values()]


# -- The parsers of HTTP/2.


def parsers(data: bytes) -> None:
    """Frames taken apart, whole and byte by byte; and header blocks."""
    source = Bytes(data)
    if source.number() & 1:
        _check_frames(source.rest())
    else:
        _check_block(source.rest())


def _split(pieces: Iterable[bytes]) -> tuple[list[Frame], str | None]:
    splitter = FrameSplitter()
    frames: list[Frame] = []
    try:
        for piece in pieces:
            # One by one: those before a violation count.
            for frame in splitter.split(piece, _HIGHEST_STREAM):
                frames.append(frame)
    except Violation as exc:
        return frames, exc.code.name
    return frames, None


def _check_frames(data: bytes) -> None:
    frames, violation = _split([data])
    bytewise = _split(data[index : index + 1] for index in range(len(data)))
    check((frames, violation) == bytewise, f"{frames}, {violation}, but byte by byte {bytewise}")
    check(data.startswith(b"".join(frame.raw for frame in frames)), "frames of other bytes")
    for frame in frames:
        _check_payload(frame)


def _check_payload(frame: Frame) -> None:
    check(frame.length == int.from_bytes(frame.raw[:3], "big"), "a frame of another length")
    try:
        if frame.kind == 0:
            check(content_of(frame) in frame.raw, "content of other bytes")
        elif frame.kind == 7:
            goaway = parse_goaway(frame)
            check(0 <= goaway.last_stream_id < 2**31, f"stream {goaway.last_stream_id}")
    except Violation:
        pass


def _check_block(data: bytes) -> None:
    lines = [line.partition(b"=") for line in data.split(b"\n")]
    block = [(name, value) for name, _, value in lines]
    try:
        head = response_head(block)
        length = content_length(head.headers)
    except RemoteProtocolError:
        return
    check(100 <= head.status <= 999 and head.status != 101, f"the status {head.status}")
    check(length is None or 0 <= length < 10**20, f"the length {length}")
    for name, value in head.headers:
        check(re.fullmatch(rb"[a-z0-9!#$%&'*+.^_`|~-]+", name), f"the name {name!r}")
        check(not re.search(rb"[\0\r\n]|^[ \t]|[ \t]$", value), f"the value {value!r}")
    check_fields(head.headers)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "http11": http11,
    "recognizers": recognizers,
    "http2": http2,
    "parsers": parsers,
}
