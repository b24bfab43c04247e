"""What is left of a request when it is over: nothing that only the garbage collector would find."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeAlias

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.exchanges import Client, ServerExchange
from trio_exchange import (
    ConnectionNotAvailable,
    ConnectionPool,
    Connector,
    ExchangeError,
    LocalProtocolError,
    NetworkStream,
    PoolTimeout,
    Proxy,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    Request,
    Response,
    WriteTimeout,
)
from trio_exchange._connections.manager import Checkout
from trio_exchange._connections.scheduler import Waiter
from trio_exchange._content import ByteStream
from trio_exchange._exceptions import ExchangeFailed
from trio_exchange._http.exchange import Exchange, ResponseBody
from trio_exchange._http.http2.stream import HTTP2Stream
from trio_exchange._http.http11 import HTTP11Stream
from trio_exchange._http.request import PreparedRequest, RequestBody, RequestContext
from trio_exchange._http.upload import Upload
from trio_exchange._timeouts import TimeBudget
from trio_exchange.testing import MemoryConnector, ScriptedPeer

SIZE = 300_000


class Chunks:
    """An iterable of bytes that is its own iterator."""

    def __init__(self, fail: bool) -> None:
        self._chunks = iter([b"x" * (SIZE // 2)] * 2)
        self._fail = fail

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._fail:
            raise KeyError("the iterator's own")
        return next(self._chunks)


async def generate(fail: bool) -> AsyncIterator[bytes]:
    yield b"x" * (SIZE // 2)
    if fail:
        raise KeyError("the generator's own")
    yield b"x" * (SIZE // 2)


BODIES: dict[str, Callable[[bool], Any]] = {
    "no body": lambda _: None,
    "small body": lambda _: b"small",
    "bytes": lambda _: bytes(SIZE),
    "iterator": Chunks,
    "generator": generate,
}

# What there is of each request, and what a traceback would keep alive.
OF_A_REQUEST = (
    Request,
    Response,
    PreparedRequest,
    RequestBody,
    RequestContext,
    HTTP11Stream,
    HTTP2Stream,
    ExchangeFailed,
    Checkout,
    Waiter,
    TimeBudget,
    Exchange,
    ResponseBody,
    Upload,
    ExchangeError,
    Chunks,
)


@pytest.fixture
def left() -> Iterator[Callable[[], list[object]]]:
    """Finds what belongs to a request and was made since the test began; nothing is collected meanwhile."""
    gc.collect()
    gc.disable()
    gc.freeze()
    yield lambda: list(filter(_is_of_a_request, gc.get_objects()))
    gc.unfreeze()
    gc.enable()


def _is_of_a_request(value: object) -> bool:
    if isinstance(value, (trio.BrokenResourceError, trio.ClosedResourceError)):
        # Trio's `SSLStream` is part of a cycle, and so may be an error of its transport, but no frames.
        return value.__traceback__ is not None
    return isinstance(value, OF_A_REQUEST)


# -- Servers that do what the target says.


async def serve(exchange: ServerExchange) -> None:
    if exchange.method == b"CONNECT":
        await exchange.accept()
        await trio.sleep(0.01)
        exchange.reset_connection()
        return
    match exchange.target:
        case b"/early":
            await exchange.respond(200, [(b"Content-Length", b"2")], b"ok")
            await trio.sleep_forever()
        case b"/reset":
            exchange.reset_connection()
            return
        case b"/unread":
            await trio.sleep_forever()
    await exchange.receive_all()
    match exchange.target:
        case b"/" | b"/ok-once":
            await exchange.respond(200, body=b"ok")
        case b"/half" | b"/half-and-reset":
            await exchange.respond(200, [(b"Content-Length", b"10")], body=None, begin=b"half")
            if exchange.target == b"/half":
                await trio.sleep_forever()
            await trio.sleep(0.01)
            exchange.reset_connection()
        case b"/garbage":
            await exchange.send_garbage()
        case _:
            await trio.sleep_forever()


def new_server() -> Callable[[ServerExchange], Awaitable[None]]:
    """A server that breaks the connection at the request after one for `/ok-once`."""
    last = b""

    async def play(exchange: ServerExchange) -> None:
        nonlocal last
        before, last = last, exchange.target
        if before == b"/ok-once":
            # Like one whose keep-alive is over when the next request comes.
            exchange.reset_connection()
            return
        await serve(exchange)

    return play


# -- The ways in which requests end.

End: TypeAlias = Callable[[ConnectionPool, Callable[..., Request]], Awaitable[None]]
ENDS: dict[str, End] = {}


def end(function: End) -> End:
    ENDS[function.__name__] = function
    return function


async def fails(kind: type[Exception], response: Awaitable[Any]) -> None:
    """As `pytest.raises`, which would keep what is raised."""
    try:
        await response
    except kind:
        return
    raise AssertionError("nothing was raised")


@end
async def read(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/"))
    assert await response.aread() == b"ok"


@end
async def iterated(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/"))
    assert b"".join([chunk async for chunk in response.aiter_stream()]) == b"ok"
    await response.aclose()


@end
async def closed_early(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/half"))
    assert await anext(response.aiter_stream()) == b"half"
    await response.aclose()
    await fails(ReadError, anext(response.aiter_stream()))


@end
async def closed_by_another(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/half"))
    assert await anext(response.aiter_stream()) == b"half"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails, ReadError, anext(response.aiter_stream()))
        await trio.testing.wait_all_tasks_blocked()
        await response.aclose()


@end
async def answered_early(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/early"))
    assert await response.aread() == b"ok"


@end
async def read_timeout(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    await fails(ReadTimeout, pool.handle_async_request(make("/silent", read=0.05)))


@end
async def read_timeout_in_body(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/half", read=0.05))
    await fails(ReadTimeout, response.aread())


@end
async def write_timeout(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    # Only with a body that is larger than the buffers there is something that takes its time.
    content = bytes(20_000_000)
    with trio.fail_after(10):
        await fails(WriteTimeout, pool.handle_async_request(make("/unread", content=content, write=0.05)))


@end
async def pool_timeout(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    # A connection to another origin has the only place.
    stream = await pool.open_tcp_stream("127.0.0.1", make("/").url.port or 0)
    await fails(PoolTimeout, pool.handle_async_request(make("/", pool=0.02)))
    await stream.aclose()


@end
async def cancelled(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    with trio.move_on_after(0.02):
        await pool.handle_async_request(make("/silent"))


@end
async def cancelled_upload(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    with trio.move_on_after(0.02):
        await pool.handle_async_request(make("/unread"))


@end
async def cancelled_in_body(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/half"))
    with trio.move_on_after(0.02):
        await response.aread()


@end
async def broken(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    await fails(ExchangeError, pool.handle_async_request(make("/reset")))


@end
async def broken_in_body(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/half-and-reset"))
    await fails(ExchangeError, response.aread())
    await fails(RuntimeError, response.aread())


@end
async def broken_twice(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/half-and-reset"))
    chunks = response.aiter_stream()
    assert await anext(chunks) == b"half"
    await fails(ExchangeError, anext(chunks))
    await fails(ExchangeError, anext(chunks))


@end
async def garbage(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    await fails(RemoteProtocolError, pool.handle_async_request(make("/garbage")))


@end
async def sent_again(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    await pool.request("GET", str(bytes(make("/ok-once").url), "ascii"))
    try:
        response = await pool.handle_async_request(make("/"))
    except ExchangeError:
        return
    await response.aread()


@end
async def failing_content(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    request = make("/", fail=True)
    failed = False
    try:
        await (await pool.handle_async_request(request)).aread()
    except KeyError:
        failed = True
    assert failed != isinstance(request.stream, ByteStream)


@end
async def closed_by_failing_content(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    responses: list[Response] = []
    answered, ended = trio.Event(), trio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield b"first"
        await answered.wait()
        try:
            await responses.pop().aclose()
        finally:
            ended.set()
            raise KeyError("of no interest")

    responses.append(await pool.handle_async_request(make("/early", content=content())))
    answered.set()
    await ended.wait()


@end
async def content_of_wrong_length(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    request = make("/", content=Chunks(fail=False), headers={"Content-Length": "10"})
    await fails(LocalProtocolError, pool.handle_async_request(request))


@end
async def broken_tunnel(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    request = Request("CONNECT", make("/").url, extensions={"target": b"a.example:443"})
    response = await pool.handle_async_request(request)
    stream: NetworkStream = response.extensions["network_stream"]
    await fails(ReadError, stream.read())
    await stream.aclose()


@end
async def failing_handler(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    async def handler(event: str, info: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        if event.endswith("receive_response_headers.complete"):
            raise ReadError("the handler's own")

    request = make("/")
    request.extensions["trace"] = handler
    await fails(ReadError, pool.handle_async_request(request))


@end
async def pool_closed(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails, ExchangeError, pool.handle_async_request(make("/silent")))
        nursery.start_soon(fails, ExchangeError, pool.handle_async_request(make("/silent")))
        await trio.testing.wait_all_tasks_blocked(0.02)
        await pool.aclose()
    await fails(ConnectionNotAvailable, pool.handle_async_request(make("/")))


@end
async def pool_closed_in_body(pool: ConnectionPool, make: Callable[..., Request]) -> None:
    response = await pool.handle_async_request(make("/half"))
    await pool.aclose()
    assert response.status == 200


async def ignore(event: str, info: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("name", ENDS)
async def test_nothing_of_a_request_is_left_when_it_is_over(
    client: Client, name: str, left: Callable[[], list[object]]
) -> None:
    for body, content in BODIES.items():
        for trace in (None, ignore):
            await run(name, client, content, trace, left)
            assert left() == [], f"{body}, {trace}"


async def run(
    name: str,
    client: Client,
    make_content: Callable[[bool], Any],
    trace: Any,
    left: Callable[[], list[object]],
) -> None:
    def make(
        target: str,
        *,
        fail: bool = False,
        content: Any = None,
        headers: dict[str, str] | None = None,
        **timeouts: float,
    ) -> Request:
        extensions = {"timeout": timeouts, **({} if trace is None else {"trace": trace})}
        body = make_content(fail) if content is None else content
        return Request("PUT", client.url[:-1] + target, headers=headers, content=body, extensions=extensions)

    async with client.pool(new_server(), sockets=True, max_connections=1) as pool:
        await ENDS[name](pool, make)
        # What a connection without requests, too, has of one.
        await trio.testing.wait_all_tasks_blocked()
        assert left() == [], "while the pool is open"


# -- Ways to a connection that lead nowhere.


class Unreachable(Connector):
    async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        raise OSError("no route")


async def refuse_tunnel(peer: ScriptedPeer) -> None:
    await peer.receive_request()
    await peer.send_response(403, body=b"no")


async def refuse_by_socks(peer: ScriptedPeer) -> None:
    await peer.receive_some()
    await peer.send(b"\5\0")
    await peer.receive_some()
    await peer.send(b"\5\5\0\1" + bytes(6))


async def end_at_once(peer: ScriptedPeer) -> None:
    await peer.receive_some()


@pytest.mark.parametrize("trace", [None, ignore])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("proxy", "serve"),
    [
        (None, None),
        (None, end_at_once),
        ("http://proxy.example", None),
        ("http://proxy.example", end_at_once),
        ("http://proxy.example", refuse_tunnel),
        ("socks5h://proxy.example", None),
        ("socks5h://proxy.example", end_at_once),
        ("socks5h://proxy.example", refuse_by_socks),
    ],
)
async def test_nothing_is_left_of_a_request_without_connection(
    proxy: str | None,
    serve: Any,
    body: str,
    trace: Any,
    nursery: trio.Nursery,
    left: Callable[[], list[object]],
    autojump_clock: MockClock,
) -> None:
    connector = Unreachable() if serve is None else MemoryConnector(nursery, serve)
    hop = None if proxy is None else Proxy(proxy)

    async def request(pool: ConnectionPool) -> None:
        extensions = {} if trace is None else {"trace": trace}
        content = BODIES[body](False)
        await fails(
            ExchangeError, pool.request("PUT", "https://a.example", content=content, extensions=extensions)
        )

    async with ConnectionPool(connector=connector, proxy=hop, retries=2) as pool:
        await request(pool)
        await trio.testing.wait_all_tasks_blocked()
        assert left() == []


@pytest.mark.parametrize("size", [100, 100_000])
async def test_an_idle_connection_does_not_keep_the_last_body(
    client: Client, size: int, left: Callable[[], list[object]]
) -> None:
    content = bytes(size)
    before = sys.getrefcount(content)
    async with client.pool(serve, sockets=True) as pool:
        await pool.request("PUT", client.url, content=content)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert pool.statistics().idle == 1
        assert sys.getrefcount(content) == before
