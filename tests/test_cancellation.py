"""Whatever step a request is interrupted at, nothing is lost, nothing leaks, and nobody else notices."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from trio_exchange.testing import ScriptedPeer

from .peers import make_tls
from .sweep import Interruption, Run, Scenario, World, forgiving, sweep

ORIGIN = "http://origin.example"
PIECE = b"x" * 20_000


@forgiving
async def origin(peer: ScriptedPeer) -> None:
    """The server of all scenarios; the target says what it does."""
    if await peer_speaks_tls(peer):
        await peer.start_tls(make_tls().server)
    for served in itertools.count():
        head = await peer.receive_head()
        if head.method == b"CONNECT":
            await tunnel(peer)
            return
        match head.target:
            case b"/echo":
                await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while chunk := await peer.receive_chunk():
                    await peer.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                await peer.send(b"0\r\n\r\n")
            case b"/informed":
                await peer.send_response(102)
                await peer.send_response(100)
                await peer.receive_body()
                await peer.send_response(103, [(b"Link", b"</a>")])
                await peer.send_response()
            case b"/endless":
                await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
            case b"/dies" if served:
                return
            case _:
                await peer.receive_body()
                await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
                await trio.lowlevel.checkpoint()
                await peer.send(b"0123456789")


async def peer_speaks_tls(peer: ScriptedPeer) -> bool:
    """Whether the client begins with TLS; what it sent goes back to the stream."""
    first = await peer.receive_some()
    peer.stream = Prefixed(peer.stream, first)
    return first[:1] == b"\x16"


class Prefixed(trio.abc.HalfCloseableStream):
    """A stream with something before what is received from it."""

    def __init__(self, stream: trio.abc.Stream, first: bytes) -> None:
        self.stream = stream
        self.first = first

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self.first:
            return await self.stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        data, self.first = self.first[:max_bytes], self.first[max_bytes or len(self.first) :]
        return data

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        await self.stream.aclose()


async def tunnel(peer: ScriptedPeer) -> None:
    """Answer CONNECT, then play an echoing server behind the tunnel, with TLS if it is asked for."""
    await peer.send_response(200, [(b"Content-Length", b"0")])
    if await peer_speaks_tls(peer):
        await peer.start_tls(make_tls().server)
    while data := await peer.stream.receive_some():
        await peer.send(bytes(data))


class Body:
    """A body in pieces, each of which takes a checkpoint to come."""

    def __init__(self, pieces: int = 3) -> None:
        self.pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.pieces:
            raise StopAsyncIteration
        self.pieces -= 1
        return PIECE


# -- What is done.


async def get(world: World) -> None:
    response = await world.pool.request("GET", f"{ORIGIN}/", extensions=world.extensions)
    assert response.content == b"0123456789"


async def get_tls(world: World) -> None:
    response = await world.pool.request("GET", "https://example.com/", extensions=world.extensions)
    assert response.content == b"0123456789"


async def upload(world: World) -> None:
    response = await world.pool.request("POST", f"{ORIGIN}/", content=Body(), extensions=world.extensions)
    assert response.content == b"0123456789"


async def full_duplex(world: World) -> None:
    async with world.pool.stream(
        "POST", f"{ORIGIN}/echo", content=Body(), extensions=world.extensions
    ) as response:
        received = 0
        async for chunk in response.aiter_stream():
            received += len(chunk)
        assert received == 3 * len(PIECE)


async def half_read(world: World) -> None:
    async with world.pool.stream("GET", f"{ORIGIN}/endless", extensions=world.extensions) as response:
        async for chunk in response.aiter_stream():
            assert chunk == b"first"
            break


async def expect_continue(world: World) -> None:
    response = await world.pool.request(
        "POST",
        f"{ORIGIN}/informed",
        headers={"Expect": "100-continue"},
        content=Body(),
        extensions=world.extensions,
    )
    assert response.status == 200


async def dies(world: World) -> None:
    response = await world.pool.request("GET", f"{ORIGIN}/dies", extensions=world.extensions)
    assert response.content == b"0123456789"


async def connect(world: World) -> None:
    extensions = {**world.extensions, "target": b"example.com:443"}
    async with world.pool.stream("CONNECT", ORIGIN, extensions=extensions) as response:
        stream = response.extensions["network_stream"]
        await stream.write(b"hello")
        assert await stream.read(100) == b"hello"


async def connect_tls(world: World) -> None:
    extensions = {**world.extensions, "target": b"example.com:443"}
    async with world.pool.stream("CONNECT", ORIGIN, extensions=extensions) as response:
        stream = response.extensions["network_stream"]
        stream = await stream.start_tls(world.client_context, "example.com")
        await stream.write(b"hello")
        assert await stream.read(100) == b"hello"
        await stream.aclose()


# -- Where.


@contextlib.asynccontextmanager
async def a_full_pool(world: World) -> AsyncIterator[None]:
    """Others use its only connection for a while, and others wait behind."""
    served = trio.Event()

    async def occupy(response: Any) -> None:
        await trio.sleep(world.pause)
        with contextlib.suppress(*world.tolerated):
            await response.aread()
        await response.aclose()

    async def bystander() -> None:
        await trio.sleep(world.pause / 2)
        with contextlib.suppress(*world.tolerated):
            response = await world.pool.request("GET", f"{ORIGIN}/bystander")
            assert response.status == 200
        served.set()

    context = world.pool.stream("GET", f"{ORIGIN}/")
    world.outside.start_soon(occupy, await context.__aenter__())
    world.outside.start_soon(bystander)
    yield
    await served.wait()


@contextlib.asynccontextmanager
async def another_origin_idle(world: World) -> AsyncIterator[None]:
    await world.pool.request("GET", "http://another.example/")
    yield


@contextlib.asynccontextmanager
async def an_idle_connection(world: World) -> AsyncIterator[None]:
    await world.pool.request("GET", f"{ORIGIN}/")
    yield


SCENARIOS = {
    "get": Scenario(get),
    "get reused": Scenario(get, an_idle_connection),
    "upload": Scenario(upload),
    "full duplex": Scenario(full_duplex),
    "tls": Scenario(get_tls),
    "retries": Scenario(get, failures=[OSError, OSError], options={"retries": 3}),
    "waiting": Scenario(get, a_full_pool, options={"max_connections": 1}),
    "eviction": Scenario(get, another_origin_idle, options={"max_connections": 1}),
    "half read": Scenario(half_read),
    "connect": Scenario(connect),
    "connect and start_tls": Scenario(connect_tls),
    "expect": Scenario(expect_continue),
    "silent retry": Scenario(dies, an_idle_connection, options={"max_connections": 1}),
}


class Handler:
    """A trace handler, or informational callback, that waits; the call with a given number it fails."""

    def __init__(self, failing: int = 0) -> None:
        self.failing = failing
        self.error = Mine()
        self.calls: list[object] = []

    async def __call__(self, *args: object) -> None:
        self.calls.append(args[0])
        await trio.lowlevel.checkpoint()
        if len(self.calls) == self.failing:
            raise self.error


class Mine(Exception):
    pass


scenarios = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)

interruptions = pytest.mark.parametrize("interruption", Interruption)
transports = pytest.mark.parametrize("sockets", [False, True], ids=["memory", "sockets"])


@scenarios
@interruptions
@transports
def test_interrupted_at_any_step(scenario: Scenario, interruption: Interruption, sockets: bool) -> None:
    steps = sweep(scenario, origin, make_tls().client, interruption, sockets=sockets)
    assert steps >= 4


@scenarios
@interruptions
def test_interrupted_at_any_step_with_callbacks_that_wait(
    scenario: Scenario, interruption: Interruption
) -> None:
    handler = Handler()
    extensions = {"trace": handler, "informational": handler}
    steps = sweep(scenario, origin, make_tls().client, interruption, extensions=extensions)
    assert steps > 20


@scenarios
@transports
@pytest.mark.parametrize("which", ["trace", "informational"])
def test_a_callback_that_raises_at_any_call(scenario: Scenario, sockets: bool, which: str) -> None:
    for call in itertools.count(1):
        handler = Handler(failing=call)
        run = Run(scenario, origin, make_tls().client, {which: handler}, sockets=sockets)
        error = run.uninterrupted()
        if len(handler.calls) < call:
            assert error is None
            break
        assert error is handler.error
    assert call > 10 or which == "informational"


def test_the_scenarios_are_what_they_are_said_to_be() -> None:
    """They could take another way than the one that is to be interrupted."""
    told = {}
    for name, scenario in SCENARIOS.items():
        handler = Handler()
        extensions = {"trace": handler, "informational": handler}
        assert Run(scenario, origin, make_tls().client, extensions).uninterrupted() is None
        told[name] = handler.calls
    assert told["get reused"][0] == "http11.send_request_headers.started"
    assert told["retries"].count("connection.retry.started") == 2
    assert told["silent retry"].count("connection.retry.started") == 1
    assert told["silent retry"].count("connection.connect_tcp.complete") == 1
    assert "connection.start_tls.complete" in told["tls"]
    assert [call for call in told["expect"] if isinstance(call, int)] == [102, 100, 103]
    assert told["waiting"][0] == "http11.send_request_headers.started"
    assert "connection.connect_tcp.complete" in told["eviction"]
    assert told["half read"][-1] == "connection.close.complete"
