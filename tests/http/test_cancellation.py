"""Whatever step a request is interrupted at, nothing is lost, nothing leaks, and nobody else notices."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import h2.events
import pytest
import trio

from tests.harness.certificates import alpn_server, make_tls
from tests.harness.h2peer import PREFACE, H2Peer
from tests.harness.peers import begins_with
from tests.harness.scenarios import (
    DOWNLOAD,
    PIECE,
    Body,
    Handler,
    another_leads,
    full_duplex,
    get,
    others_behind,
    upload,
)
from tests.harness.sweep import Interruption, Run, Scenario, World, forgiving, sweep
from trio_exchange.testing import ScriptedPeer

pytestmark = pytest.mark.sweep

TLS_RECORD = b"\x16"


@forgiving
async def origin(peer: ScriptedPeer) -> None:
    """The server of all scenarios; the target says what it does."""
    first = await begins_with(peer)
    if first[:1] == TLS_RECORD:
        await peer.start_tls(alpn_server("h2", "http/1.1"))
        first = await begins_with(peer)
    if first[:3] == PREFACE[:3]:
        await MultiplexingOrigin(H2Peer(peer.stream)).serve()
        return
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


class MultiplexingOrigin:
    """The same server in HTTP/2, where several requests go on at once."""

    def __init__(self, peer: H2Peer) -> None:
        self.peer = peer
        self.targets: dict[int, bytes] = {}
        # How much of a request's body was received.
        self.received: dict[int, int] = {}
        # What is to be sent, as windows allow, and streams on which it is all.
        self.queues: dict[int, bytearray] = {}
        self.ended: set[int] = set()

    async def serve(self) -> None:
        await self.peer.start()
        while await self.peer.receive():
            events, self.peer.events = self.peer.events, []
            reset = {event.stream_id for event in events if isinstance(event, h2.events.StreamReset)}
            for stream_id in reset & self.targets.keys():
                self.end(stream_id)
            if any(isinstance(event, h2.events.ConnectionTerminated) for event in events):
                return
            for event in events:
                if getattr(event, "stream_id", None) not in reset:
                    self.take(event)
            # Heads travel alone, so that there is a step between them and what follows.
            await self.peer.flush()
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            self.send()
            await self.peer.flush()

    def take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            assert event.stream_id is not None
            self.begin(event.stream_id, dict(event.headers or []))
        elif isinstance(event, h2.events.DataReceived):
            assert event.stream_id is not None
            data, size = event.data or b"", event.flow_controlled_length or 0
            self.peer.h2.acknowledge_received_data(size, event.stream_id)
            self.received[event.stream_id] += len(data)
            if self.targets[event.stream_id] in (b"/echo", b"tunnel"):
                self.queues[event.stream_id] += data
        elif isinstance(event, h2.events.StreamEnded):
            assert event.stream_id is not None
            self.complete(event.stream_id)

    def begin(self, stream_id: int, headers: dict[bytes, bytes]) -> None:
        tunnel = headers[b":method"] == b"CONNECT"
        target = self.targets[stream_id] = b"tunnel" if tunnel else headers[b":path"]
        self.received[stream_id] = 0
        self.queues[stream_id] = bytearray()
        match target:
            case b"/informed":
                for status in (102, 100):
                    self.peer.h2.send_headers(stream_id, [(b":status", b"%d" % status)])
            case b"/after":
                assert list(self.targets) == [stream_id], "a stream was left open"
            case b"/endless" | b"/echo" | b"tunnel":
                self.peer.h2.send_headers(stream_id, [(b":status", b"200")])
                self.queues[stream_id] += b"first" if target == b"/endless" else b""

    def complete(self, stream_id: int) -> None:
        match self.targets[stream_id]:
            case b"/endless":
                return
            case b"/echo" | b"tunnel":
                pass
            case target:
                if target == b"/informed":
                    self.peer.h2.send_headers(stream_id, [(b":status", b"103")])
                self.peer.h2.send_headers(stream_id, [(b":status", b"200")])
                answers = {b"/download": DOWNLOAD, b"/count": b"%d" % self.received[stream_id]}
                self.queues[stream_id] += answers.get(target, b"0123456789")
        self.ended.add(stream_id)

    def send(self) -> None:
        for stream_id, queue in list(self.queues.items()):
            while queue and (room := self.room(stream_id)):
                self.peer.h2.send_data(stream_id, bytes(queue[:room]))
                del queue[:room]
            if not queue and stream_id in self.ended:
                self.peer.h2.end_stream(stream_id)
                self.end(stream_id)

    def room(self, stream_id: int) -> int:
        window = self.peer.h2.local_flow_control_window(stream_id)
        return max(0, min(window, self.peer.h2.max_outbound_frame_size))

    def end(self, stream_id: int) -> None:
        del self.targets[stream_id], self.queues[stream_id], self.received[stream_id]
        self.ended.discard(stream_id)


async def tunnel(peer: ScriptedPeer) -> None:
    """Answer CONNECT, then play an echoing server behind the tunnel, with TLS if it is asked for."""
    await peer.send_response(200, [(b"Content-Length", b"0")])
    if (await begins_with(peer))[:1] == TLS_RECORD:
        await peer.start_tls(make_tls().server)
    while data := await peer.stream.receive_some():
        await peer.send(bytes(data))


# -- What is done.


async def get_tls(world: World) -> None:
    response = await world.pool.request("GET", "https://example.com/", extensions=world.extensions)
    assert response.content == b"0123456789"


async def half_read(world: World) -> None:
    async with world.pool.stream("GET", f"{world.origin}/endless", extensions=world.extensions) as response:
        async for chunk in response.aiter_stream():
            assert chunk == b"first"
            break


async def expect_continue(world: World) -> None:
    response = await world.pool.request(
        "POST",
        f"{world.origin}/informed",
        headers={"Expect": "100-continue"},
        content=Body(),
        extensions=world.extensions,
    )
    assert response.status == 200


async def dies(world: World) -> None:
    response = await world.pool.request("GET", f"{world.origin}/dies", extensions=world.extensions)
    assert response.content == b"0123456789"


async def connect(world: World) -> None:
    extensions = {**world.extensions, "target": b"example.com:443"}
    async with world.pool.stream("CONNECT", world.origin, extensions=extensions) as response:
        stream = response.extensions["network_stream"]
        await stream.write(b"hello")
        assert await stream.read(100) == b"hello"


async def connect_tls(world: World) -> None:
    extensions = {**world.extensions, "target": b"example.com:443"}
    async with world.pool.stream("CONNECT", world.origin, extensions=extensions) as response:
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
            response = await world.pool.request("GET", f"{world.origin}/bystander")
            assert response.status == 200
        served.set()

    context = world.pool.stream("GET", f"{world.origin}/")
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
    await world.pool.request("GET", f"{world.origin}/")
    yield


@contextlib.asynccontextmanager
async def other_streams(world: World) -> AsyncIterator[None]:
    """On the same connection others receive and send, for as long as it takes, and must not notice."""
    over, received, sent = trio.Event(), trio.Event(), trio.Event()
    begun = [trio.Event(), trio.Event()]

    async def download() -> None:
        with contextlib.suppress(*world.tolerated):
            async with world.pool.stream("GET", f"{world.origin}/download") as response:
                data = b""
                async for chunk in response.aiter_stream():
                    begun[0].set()
                    data += chunk
                    if len(data) > len(DOWNLOAD) // 2:
                        await over.wait()
                    elif not over.is_set():
                        await trio.sleep(world.pause / 100)
            assert data == DOWNLOAD
        received.set()

    class Slow:
        size = 0

        def __aiter__(self) -> AsyncIterator[bytes]:
            return self

        async def __anext__(self) -> bytes:
            await trio.sleep(world.pause / 100)
            if over.is_set():
                raise StopAsyncIteration
            begun[1].set()
            self.size += 1000
            return PIECE[:1000]

    async def upload() -> None:
        body = Slow()
        with contextlib.suppress(*world.tolerated):
            response = await world.pool.request("POST", f"{world.origin}/count", content=body)
            assert response.content == b"%d" % body.size
        sent.set()

    world.outside.start_soon(download)
    world.outside.start_soon(upload)
    for event in begun:
        await event.wait()
    assert len(world.pool.connections) == 1
    yield
    over.set()
    if not world.tolerated:
        await received.wait()
        await sent.wait()
        # Nobody has broken the connection on which they were.
        assert world.pool.statistics().connections_opened == 1


HTTP1_SCENARIOS = {
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
HTTP2: dict[str, Any] = {"options": {"http2": True, "http1": False}}
HTTP2_TLS: dict[str, Any] = {"options": {"http2": True}, "origin": "https://example.com"}
HTTP2_SCENARIOS = {
    "h2 first": Scenario(get, others_behind, **HTTP2),
    "h2 first, tls": Scenario(get, others_behind, **HTTP2_TLS),
    "h2 first upload": Scenario(upload, others_behind, **HTTP2),
    "h2 alone": Scenario(full_duplex, **HTTP2),
    "h2 get": Scenario(get, other_streams, **HTTP2),
    "h2 get, tls": Scenario(get, other_streams, **HTTP2_TLS),
    "h2 upload": Scenario(upload, other_streams, **HTTP2),
    "h2 upload, tls": Scenario(upload, other_streams, **HTTP2_TLS),
    "h2 full duplex": Scenario(full_duplex, other_streams, **HTTP2),
    "h2 full duplex, tls": Scenario(full_duplex, other_streams, **HTTP2_TLS),
    "h2 half read": Scenario(half_read, other_streams, **HTTP2),
    "h2 expect": Scenario(expect_continue, other_streams, **HTTP2),
    "h2 connect": Scenario(connect, other_streams, **HTTP2),
    "h2 behind": Scenario(get, another_leads, **HTTP2),
    "h2 behind, tls": Scenario(get, another_leads, **HTTP2_TLS),
}
SCENARIOS = HTTP1_SCENARIOS | HTTP2_SCENARIOS


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
    assert call > 8 or which == "informational"


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
    for name in ("h2 first", "h2 first, tls", "h2 first upload", "h2 alone"):
        assert "http2.send_connection_init.complete" in told[name]
    for name in ("h2 get", "h2 get, tls", "h2 upload", "h2 full duplex, tls", "h2 behind", "h2 behind, tls"):
        assert told[name][0] == "http2.send_request_headers.started"
    assert "connection.start_tls.complete" in told["h2 first, tls"]
    assert [call for call in told["h2 expect"] if isinstance(call, int)] == [102, 100, 103]
    assert told["h2 half read"][-1] == "http2.response_closed.complete"
