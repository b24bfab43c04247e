"""HTTP/2 with nghttpd, and with nghttpx before it."""

from __future__ import annotations

import os
import random
import signal
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trustme
import wsproto
import wsproto.connection
import wsproto.events

from tests.harness.streams import read_exactly
from trio_exchange import ConnectionPool, ReadError, RemoteProtocolError, Request
from trio_exchange._connect.connector import Connector
from trio_exchange.testing import ScriptedPeer

from .actions import TIMEOUTS, in_parallel, next_text, pieces, serve, shout, until_all_closed
from .nginx import MIB
from .process import Process, running_nghttpd, running_nghttpx

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

Require = Callable[[str], None]


@pytest.fixture(scope="module", params=["tls", "tcp"])
def nghttpd(request: pytest.FixtureRequest, require: Require) -> Iterator[Process]:
    require("nghttpd")
    with running_nghttpd(tls=request.param == "tls") as server:
        yield server


@pytest.fixture(scope="module")
def backend(require: Require) -> Iterator[Process]:
    require("nghttpd")
    with running_nghttpd(tls=False) as server:
        yield server


def a_pool(server: Process, **options: Any) -> ConnectionPool:
    """HTTP/2, negotiated with TLS and without it by prior knowledge."""
    if server.scheme == "http":
        return ConnectionPool(http1=False, http2=True, **options)
    return ConnectionPool(server.client_ssl_context(), http2=True, **options)


async def get(pool: ConnectionPool, server: Process, name: str, content: bytes | None = None) -> None:
    response = await pool.request("GET", f"{server.url}/{name}", extensions=TIMEOUTS)
    assert response.status == 200
    assert response.extensions["http_version"] == b"HTTP/2"
    assert response.content == (server.file(name).read_bytes() if content is None else content)


async def post(pool: ConnectionPool, server: Process, content: bytes, *, whole: bool = True) -> None:
    """nghttpd sends back what it gets."""
    sent: Any = content if whole else pieces(content)
    response = await pool.request("POST", f"{server.url}/echo", content=sent, extensions=TIMEOUTS)
    assert response.status == 200
    assert response.content == content


# nghttpd


@pytest.mark.parametrize("connections", [1, 5])
async def test_many_concurrent_requests(nghttpd: Process, connections: int) -> None:
    """nghttpd takes 100 streams at once on a connection."""

    async def ask(index: int) -> None:
        if index % 5:
            await get(pool, nghttpd, "1k")
        else:
            await post(pool, nghttpd, b"%d" % index * 10_000, whole=index % 2 == 0)

    async with a_pool(nghttpd, max_connections=connections) as pool:
        await in_parallel(500, ask)
        assert pool.statistics().connections_opened <= connections


@pytest.mark.parametrize("options", [["-m1"], ["-m7"], ["-b200"], ["-w10", "-W16"]], ids=lambda o: o[0])
async def test_a_server_with_little_room_or_much_padding(require: Require, options: list[str]) -> None:
    """One stream, or few; padding of up to 200 bytes in each frame; windows of 1 KiB."""
    require("nghttpd")

    async def ask(index: int) -> None:
        await get(pool, server, "1k" if index % 4 else "1m")
        await post(pool, server, os.urandom(100_000), whole=index % 2 == 0)

    with running_nghttpd(*options, tls=False) as server:
        async with a_pool(server, max_connections=2) as pool:
            await in_parallel(60, ask)
            assert pool.statistics().connections_opened <= 2


async def test_large_bodies_both_ways(nghttpd: Process) -> None:
    contents = [os.urandom(24 * MIB), os.urandom(24 * MIB)]

    async def ask(index: int) -> None:
        if index < 2:
            await post(pool, nghttpd, contents[index], whole=index == 0)
        else:
            await get(pool, nghttpd, ("50m", "1m", "1k")[index % 3])

    async with a_pool(nghttpd, max_connections=1) as pool:
        await in_parallel(8, ask)


async def test_trailers(nghttpd: Process) -> None:
    async with a_pool(nghttpd) as pool:
        for name in ("1k", "1m"):
            response = await pool.request("GET", f"{nghttpd.url}/{name}", extensions=TIMEOUTS)
            assert response.extensions["trailing_headers"] == [(b"x-served-by", b"interop")]
            assert response.content == nghttpd.file(name).read_bytes()
        head = await pool.request("HEAD", f"{nghttpd.url}/1m", extensions=TIMEOUTS)
        assert (b"content-length", b"%d" % MIB) in head.headers
        assert head.content == b""


async def test_cancelled_requests_under_load(nghttpd: Process) -> None:
    """Those beside them do not notice, and no connection is lost."""
    chance = random.Random(7)

    async def give_up(_: int) -> None:
        await trio.sleep(chance.uniform(0, 1.0))
        with trio.move_on_after(chance.uniform(0, 0.1)):
            if chance.random() < 0.3:
                await post(pool, nghttpd, b"x" * 10 * MIB, whole=chance.random() < 0.5)
            else:
                name = chance.choice(["1k", "1m", "50m"])
                await pool.request("GET", f"{nghttpd.url}/{name}", extensions=TIMEOUTS)

    async def ask(index: int) -> None:
        await trio.sleep(index * 0.01)
        await get(pool, nghttpd, ("1k", "1m")[index % 2])

    async with a_pool(nghttpd, max_connections=1) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_parallel, 100, ask)
            nursery.start_soon(in_parallel, 300, give_up)
        numbers = pool.statistics()
        assert (numbers.active, numbers.waiting, numbers.connections_opened) == (0, 0, 1)


async def test_a_server_that_dies_in_the_middle_of_many_responses(require: Require) -> None:
    require("nghttpd")
    failures: list[Exception] = []
    begun = 0

    async def download() -> None:
        nonlocal begun
        async with pool.stream("GET", f"{server.url}/50m", extensions=TIMEOUTS) as response:
            begun += 1
            if begun == 10:
                server.stop()
            await response.aread()

    async def ask(_: int) -> None:
        with pytest.raises((RemoteProtocolError, ReadError)) as info:
            await download()
        failures.append(info.value)

    with running_nghttpd() as server:
        async with a_pool(server) as pool:
            await in_parallel(10, ask)
            await until_all_closed(pool, seconds=2)
    assert len({id(failure) for failure in failures}) == 10


# nghttpx


@pytest.fixture
def nghttpx(backend: Process, require: Require) -> Iterator[Process]:
    require("nghttpx")
    with running_nghttpx(backend.port, "h2") as server:
        yield server


async def keep_asking(pool: ConnectionPool, server: Process, contents: dict[str, bytes], times: int) -> None:
    for number in range(times):
        name = ("1k", "1k", "1m")[number % 3]
        await get(pool, server, name, contents[name])
        await post(pool, server, contents["1k"], whole=number % 2 == 0)


@pytest.mark.parametrize("connections", [1, 4])
async def test_a_limit_of_requests_under_load(backend: Process, require: Require, connections: int) -> None:
    require("nghttpx")
    contents = {name: backend.file(name).read_bytes() for name in ("1k", "1m")}
    with running_nghttpx(backend.port, "h2", "--frontend-max-requests=100") as server:
        async with a_pool(server, max_connections=connections) as pool:
            await in_parallel(20, lambda _: keep_asking(pool, server, contents, 20))
            assert pool.statistics().connections_opened >= 6


async def test_reload_under_load(nghttpx: Process, backend: Process) -> None:
    """Each reload makes a new process; the old one says GOAWAY, and finishes. Not one request fails."""
    contents = {name: backend.file(name).read_bytes() for name in ("1k", "1m")}
    done = trio.Event()

    async def load(_: int) -> None:
        while not done.is_set():
            await keep_asking(pool, nghttpx, contents, 3)

    async with a_pool(nghttpx, max_connections=10) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_parallel, 20, load)
            for _ in range(4):
                await trio.sleep(0.6)
                nghttpx.process.send_signal(signal.SIGHUP)
            await trio.sleep(0.6)
            done.set()
        assert pool.statistics().connections_opened >= 4


async def test_graceful_shutdown(nghttpx: Process, backend: Process) -> None:
    """What is under way is finished; then the connection is closed, and nothing answers any more."""
    content = backend.file("50m").read_bytes()
    async with a_pool(nghttpx) as pool:
        async with pool.stream("GET", f"{nghttpx.url}/50m", extensions=TIMEOUTS) as response:
            body = response.aiter_stream()
            received = await anext(body)
            nghttpx.process.send_signal(signal.SIGQUIT)
            await trio.sleep(0.2)
            assert received + b"".join([piece async for piece in body]) == content
        await until_all_closed(pool, seconds=5)
    with trio.fail_after(10):
        assert await trio.to_thread.run_sync(nghttpx.process.wait) == 0


# Tunnels through nghttpx


async def echo_until_its_end(peer: ScriptedPeer) -> None:
    request = await peer.receive_request()
    assert (request.method, request.target) == (b"CONNECT", b"example.test:443")
    await peer.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
    while not (data := await peer.receive_some()).endswith(b"bye"):
        await peer.send(data)
    await peer.send(data)


async def test_connect(nursery: trio.Nursery, require: Require) -> None:
    require("nghttpx")
    content = os.urandom(8 * MIB)
    port = await serve(nursery, echo_until_its_end)
    extensions = {**TIMEOUTS, "target": "example.test:443"}

    async def tunnel(index: int) -> None:
        async with pool.stream("CONNECT", server.url, extensions=extensions) as response:
            assert response.status == 200
            stream = response.extensions["network_stream"]
            assert await read_exactly(stream, 5) == b"hello"
            async with trio.open_nursery() as inner:
                inner.start_soon(stream.write, content)
                assert await read_exactly(stream, len(content)) == content
            if index % 2:
                await stream.write(b"bye")
                assert await read_exactly(stream, 3) == b"bye"
                assert await stream.read(timeout=5) == b""

    with running_nghttpx(port, "http/1.1") as server:
        async with a_pool(server) as pool:
            await in_parallel(4, tunnel)
            numbers = pool.statistics()
            assert (numbers.active, numbers.connections_opened) == (0, 1)


class ThroughTunnel(Connector):
    def __init__(self, pool: ConnectionPool, proxy: str) -> None:
        self.pool = pool
        self.proxy = proxy

    async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
        request = Request("CONNECT", self.proxy, extensions={**TIMEOUTS, "target": f"{host}:{port}"})
        stream: trio.abc.Stream = (await self.pool.handle_async_request(request)).extensions["network_stream"]
        return stream


async def test_tls_in_a_tunnel(nursery: trio.Nursery, require: Require) -> None:
    """HTTPS through an HTTP/2 proxy: TLS in a stream of HTTP/2 in TLS."""
    require("nghttpx")
    authority = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("example.test").configure_cert(server_context)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client_context)

    async def play(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.start_tls(server_context)
        async for request in peer:
            await peer.send_response(200, body=request.body)

    content = os.urandom(MIB)
    port = await serve(nursery, play)
    with running_nghttpx(port, "http/1.1") as server:
        async with (
            a_pool(server) as outer,
            ConnectionPool(client_context, connector=ThroughTunnel(outer, server.url)) as pool,
        ):

            async def put(_: int) -> None:
                response = await pool.request(
                    "PUT", "https://example.test/", content=content, extensions=TIMEOUTS
                )
                assert response.extensions["http_version"] == b"HTTP/1.1"
                assert response.content == content

            await in_parallel(8, put)
            assert outer.statistics().connections_opened == 1


async def test_a_websocket(nursery: trio.Nursery, require: Require) -> None:
    """Extended CONNECT, which nghttpx makes an Upgrade of."""
    require("nghttpx")
    port = await serve(nursery, shout)

    async def talk(index: int) -> None:
        async with pool.stream(
            "CONNECT",
            f"{server.url}/chat",
            headers={"Sec-WebSocket-Version": "13"},
            extensions={**TIMEOUTS, "protocol": "websocket"},
        ) as response:
            assert response.status == 200
            stream = response.extensions["network_stream"]
            websocket = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
            for length in (1, 100, 20_000):
                text = f"hello {index} " * length
                await stream.write(websocket.send(wsproto.events.TextMessage(text)), timeout=10)
                assert await next_text(websocket, stream) == text.upper()
            await stream.write(websocket.send(wsproto.events.CloseConnection(1000)))
            while data := await stream.read(timeout=10):
                websocket.receive_data(data)
            assert [type(event) for event in websocket.events()] == [wsproto.events.CloseConnection]

    with running_nghttpx(port, "http/1.1") as server:
        async with a_pool(server) as pool:
            await in_parallel(10, talk)
            assert pool.statistics().connections_opened == 1
