"""HTTP/2 with hypercorn and an ASGI application: what runs both ways at once, and what has trailers."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import trio
import wsproto.connection
import wsproto.events

from trio_exchange import ConnectionPool

from .actions import TIMEOUTS, in_parallel, pieces, until_all_closed
from .nginx import MIB
from .process import Process, running_hypercorn

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

TRAILERS = {"TE": "trailers"}


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def hypercorn(request: pytest.FixtureRequest, require: Callable[[str], None]) -> Iterator[Process]:
    require("hypercorn")
    with running_hypercorn("-k", request.param) as server:
        yield server


@pytest.fixture
def own_hypercorn(require: Callable[[str], None]) -> Iterator[Process]:
    """For tests that disturb the server."""
    require("hypercorn")
    with running_hypercorn() as server:
        yield server


def a_pool(server: Process, **options: Any) -> ConnectionPool:
    return ConnectionPool(server.client_ssl_context(), http2=True, **options)


async def echo(pool: ConnectionPool, server: Process, content: bytes, *, whole: bool = True) -> None:
    sent: Any = content if whole else pieces(content)
    response = await pool.request(
        "POST", f"{server.url}/echo", headers=TRAILERS, content=sent, extensions=TIMEOUTS
    )
    assert response.status == 200
    assert response.extensions["http_version"] == b"HTTP/2"
    assert response.content == content
    assert response.extensions["trailing_headers"] == [(b"x-size", b"%d" % len(content))]


@pytest.mark.parametrize("connections", [1, 5])
async def test_many_concurrent_requests(hypercorn: Process, connections: int) -> None:
    """hypercorn takes 100 streams at once on a connection."""

    async def ask(index: int) -> None:
        await echo(pool, hypercorn, b"%d" % index * 300, whole=index % 3 == 0)

    async with a_pool(hypercorn, max_connections=connections) as pool:
        await in_parallel(500, ask)
        assert pool.statistics().connections_opened <= connections


async def test_large_bodies_both_ways(hypercorn: Process) -> None:
    """Bodies of unknown length."""
    expected = b"".join(number.to_bytes(2, "big") * 32768 for number in range(512))

    async def download() -> None:
        response = await pool.request("GET", f"{hypercorn.url}/large", extensions=TIMEOUTS)
        assert response.content == expected

    async with a_pool(hypercorn, max_connections=1) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(download)
        nursery.start_soon(echo, pool, hypercorn, os.urandom(12 * MIB))


async def test_a_conversation(hypercorn: Process) -> None:
    """Each piece of the answer is there before the next one of the question exists, on all streams."""

    async def talk(index: int) -> None:
        send, receive = trio.open_memory_channel[bytes](0)

        async def questions() -> AsyncIterator[bytes]:
            async for question in receive:
                yield question

        async with pool.stream(
            "POST", f"{hypercorn.url}/echo", headers=TRAILERS, content=questions(), extensions=TIMEOUTS
        ) as response:
            answers = response.aiter_stream()
            async with send:
                for number in range(20):
                    question = b"%d of %d" % (number, index)
                    await send.send(question)
                    assert await anext(answers) == question
            assert [answer async for answer in answers] == []
            assert [name for name, _ in response.extensions["trailing_headers"]] == [b"x-size"]

    async with a_pool(hypercorn, max_connections=1) as pool:
        await in_parallel(20, talk)
        assert pool.statistics().connections_opened == 1


async def test_early_hints(hypercorn: Process) -> None:
    links: list[bytes] = []

    async def note(status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert status == 103
        links.extend(value for name, value in headers if name == b"link")

    async with a_pool(hypercorn) as pool:
        response = await pool.request(
            "GET", f"{hypercorn.url}/hints", extensions={**TIMEOUTS, "informational": note}
        )
    assert response.content == b"hello"
    assert links == [b"</one.css>; rel=preload", b"</two.js>; rel=preload"]


async def test_leaving_large_responses_early(hypercorn: Process) -> None:
    async def leave(_: int) -> None:
        async with pool.stream("GET", f"{hypercorn.url}/large", extensions=TIMEOUTS) as response:
            seen = 0
            async for piece in response.aiter_stream():
                seen += len(piece)
                if seen > 200_000:
                    break

    async with a_pool(hypercorn, max_connections=1) as pool:
        for _ in range(3):
            await in_parallel(20, leave)
            await echo(pool, hypercorn, b"still there")
        assert pool.statistics().connections_opened == 1


async def test_cancelled_requests_under_load(hypercorn: Process) -> None:
    async def give_up(index: int) -> None:
        await trio.sleep(index * 0.005)
        with trio.move_on_after(index % 10 * 0.01):
            if index % 2:
                await echo(pool, hypercorn, b"x" * MIB, whole=index % 4 == 1)
            else:
                await pool.request("GET", f"{hypercorn.url}/large", extensions=TIMEOUTS)

    async def ask(index: int) -> None:
        await trio.sleep(index * 0.02)
        await echo(pool, hypercorn, b"abc" * index)

    async with a_pool(hypercorn, max_connections=1) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_parallel, 100, give_up)
            nursery.start_soon(in_parallel, 40, ask)
        numbers = pool.statistics()
        assert (numbers.active, numbers.waiting, numbers.connections_opened) == (0, 0, 1)


async def test_a_websocket(hypercorn: Process) -> None:
    """Over extended CONNECT, beside ordinary requests on the same connection."""

    async def talk(index: int) -> None:
        async with pool.stream(
            "CONNECT",
            f"{hypercorn.url}/chat",
            headers={"Sec-WebSocket-Version": "13"},
            extensions={**TIMEOUTS, "protocol": "websocket"},
        ) as response:
            assert response.status == 200
            stream = response.extensions["network_stream"]
            websocket = wsproto.connection.Connection(wsproto.connection.ConnectionType.CLIENT)
            for length in (1, 1000):
                content = b"%d, " % index * length
                await stream.write(websocket.send(wsproto.events.BytesMessage(content)), timeout=10)
                answer = b""
                while len(answer) < len(content):
                    websocket.receive_data(await stream.read(timeout=10))
                    for event in websocket.events():
                        assert isinstance(event, wsproto.events.BytesMessage)
                        answer += event.data
                assert answer == content[::-1]
            await stream.write(websocket.send(wsproto.events.CloseConnection(1000)), timeout=10)
            closed: list[wsproto.events.Event] = []
            while not closed:
                websocket.receive_data(await stream.read(timeout=10))
                closed += websocket.events()
            assert [type(event) for event in closed] == [wsproto.events.CloseConnection]

    async with a_pool(hypercorn, max_connections=1) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_parallel, 10, talk)
            nursery.start_soon(in_parallel, 10, lambda index: echo(pool, hypercorn, b"x" * index))
        assert pool.statistics().connections_opened == 1


async def test_graceful_shutdown(own_hypercorn: Process) -> None:
    """What is under way goes on; then the connection is closed, and the server has gone.

    Not to the last frame, though: hypercorn may say GOAWAY just before a response's END_STREAM, which it then
    does not send.
    """
    go = trio.Event()

    async def questions() -> AsyncIterator[bytes]:
        yield b"before, "
        await go.wait()
        yield b"after"

    async with a_pool(own_hypercorn) as pool:
        async with pool.stream(
            "POST", f"{own_hypercorn.url}/echo", content=questions(), extensions=TIMEOUTS
        ) as response:
            answers = response.aiter_stream()
            assert await anext(answers) == b"before, "
            own_hypercorn.process.send_signal(signal.SIGTERM)
            await trio.sleep(0.5)
            go.set()
            assert await anext(answers) == b"after"
        await until_all_closed(pool, seconds=5)
    with trio.fail_after(10):
        assert await trio.to_thread.run_sync(own_hypercorn.process.wait) == 0
