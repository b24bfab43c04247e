"""As `tests.http.test_cancellation`, for tunnels of every kind: an interruption leaves nothing."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from tests.harness.certificates import alpn_server, client_context, make_tls
from tests.harness.h2peer import PREFACE
from tests.harness.h2server import Multiplexer, ServerStream
from tests.harness.peers import begins_with
from tests.harness.scenarios import DOWNLOAD, Handler, another_leads, full_duplex, get, others_behind, upload
from tests.harness.sweep import Interruption, Run, Scenario, World, forgiving, sweep
from trio_exchange import Proxy, ProxyError
from trio_exchange.testing import ScriptedPeer

pytestmark = pytest.mark.sweep

# -- The network: every kind of proxy, and the origin. What is spoken to it says which it is.


async def play(peer: ScriptedPeer) -> None:
    """Be whoever the client takes us for, and once a tunnel is there, whoever is at its end."""
    match (await begins_with(peer))[:1]:
        case b"":
            return
        case b"\x16":
            await peer.start_tls(alpn_server("h2", "http/1.1"))
            await play(peer)
        case b"\x05":
            if await socks5(peer):
                await play(peer)
        case b"\x04":
            await peer.receive_some()
            await peer.send(b"\x00\x5a" + bytes(6))
            await play(peer)
        case b"h":
            await echo(peer)
        case _:
            if (await begins_with(peer))[:3] == PREFACE[:3]:
                await Multiplexer(peer.stream, multiplexed).serve()
            else:
                await http1(peer)


network = forgiving(play)


async def echo(peer: ScriptedPeer) -> None:
    while data := await peer.receive_some():
        await peer.send(data)


async def socks5(peer: ScriptedPeer) -> bool:
    greeting = await peer.receive_some()
    if 2 in greeting[2:]:
        await peer.send(b"\x05\x02")
        assert await peer.receive_some() in (b"\x01\x04user\x08password", b"")
        await peer.send(b"\x01\x00")
    else:
        await peer.send(b"\x05\x00")
    request = await peer.receive_some()
    refused = request[4:8] == socket.inet_aton(ADDRESSES[0])
    await peer.send(bytes((5, 5 if refused else 0, 0, 1)) + bytes(6))
    return not refused


async def http1(peer: ScriptedPeer) -> None:
    while True:
        head = await peer.receive_head()
        match head.method, head.target.removeprefix(b"http://example.com"):
            case b"CONNECT", b"refused.example:443":
                await peer.send_response(407, body=b"first log in")
            case b"CONNECT", _:
                await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await play(peer)
                return
            case _, b"/ws":
                await peer.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")
                await echo(peer)
                return
            case _, b"/download":
                await peer.send_response(body=DOWNLOAD)
            case _, b"/echo":
                await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while chunk := await peer.receive_chunk():
                    await peer.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                await peer.send(b"0\r\n\r\n")
            case _:
                await peer.receive_body()
                await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
                await trio.lowlevel.checkpoint()
                await peer.send(b"0123456789")


async def multiplexed(stream: ServerStream) -> None:
    match stream.headers:
        case {b":method": b"CONNECT", b":authority": b"refused.example:443"}:
            await stream.respond(407)
            await stream.send_all(b"first log in")
        case {b":method": b"CONNECT"}:
            await stream.respond(200)
            await play(ScriptedPeer(stream))
        case {b":path": b"/echo"}:
            await stream.respond(200)
            while data := await stream.receive_some():
                await stream.send_all(data)
        case _:
            while await stream.receive_some():
                pass
            await stream.respond(200)
            await trio.lowlevel.checkpoint()
            await stream.send_all(b"0123456789")


# -- What is done.


async def refused(world: World) -> None:
    with pytest.raises(ProxyError) as caught:
        await world.pool.request("GET", "https://refused.example/", extensions=world.extensions)
    assert caught.value.response is not None
    assert caught.value.response.content == b"first log in"


async def websocket(world: World) -> None:
    async with world.pool.stream(
        "GET",
        "ws://example.com/ws",
        headers={"Connection": "upgrade", "Upgrade": "websocket"},
        extensions=world.extensions,
    ) as response:
        stream = response.extensions["network_stream"]
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"


async def raw(world: World) -> None:
    stream = await world.pool.open_tcp_stream("example.com", 7, extensions=world.extensions)
    try:
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"
    finally:
        await stream.aclose()


# -- Where.


@contextlib.asynccontextmanager
async def beside_a_download(world: World) -> AsyncIterator[None]:
    """Through another tunnel of the same connection others receive, and must not notice."""
    begun, over, received = trio.Event(), trio.Event(), trio.Event()

    async def download() -> None:
        with contextlib.suppress(*world.tolerated):
            async with world.pool.stream("GET", "https://localhost/download") as response:
                data = b""
                async for chunk in response.aiter_stream():
                    data += chunk
                    begun.set()
                    if len(data) > len(DOWNLOAD) // 2:
                        await over.wait()
                    elif not over.is_set():
                        await trio.sleep(world.pause / 100)
            assert data == DOWNLOAD
        received.set()

    world.outside.start_soon(download)
    await begun.wait()
    yield
    over.set()
    if not world.tolerated:
        await received.wait()
        assert world.pool._managers[-1].opened == 1


@contextlib.asynccontextmanager
async def several_addresses(_: World) -> AsyncIterator[None]:
    """The first of them the proxy refuses."""
    trio.socket.set_custom_hostname_resolver(Resolver())
    yield


class Resolver(trio.abc.HostnameResolver):
    async def getaddrinfo(self, host: Any, port: Any, *_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ADDRESSES]

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


ADDRESSES = ["192.0.2.1", "192.0.2.2"]


def through(*proxies: Proxy, http2: bool = False) -> dict[str, Any]:
    return {"options": {"proxy": proxies, "http2": http2}, "origin": "https://example.com"}


def forwarded(proxy: Proxy) -> dict[str, Any]:
    return {"options": {"proxy": proxy}, "origin": "http://example.com"}


HTTP = Proxy("http://localhost:3128")
HTTPS = Proxy("https://localhost:3129", ssl_context=client_context(make_tls().ca))
MULTIPLEXING = Proxy("https://localhost:3130", ssl_context=client_context(make_tls().ca), http2=True)
SOCKS4A = Proxy("socks4a://localhost")
SOCKS5 = Proxy("socks5://localhost")
SOCKS5H = Proxy("socks5h://user:password@localhost")

SCENARIOS = {
    "forwarded get": Scenario(get, **forwarded(HTTP)),
    "forwarded upload": Scenario(upload, **forwarded(HTTP)),
    "forwarded, h2": Scenario(upload, **forwarded(MULTIPLEXING)),
    "connect": Scenario(get, **through(HTTP)),
    "connect, tls in tls": Scenario(upload, **through(HTTPS)),
    "refused": Scenario(refused, **through(HTTP)),
    "refused, h2": Scenario(refused, **through(MULTIPLEXING)),
    "h2 first": Scenario(get, others_behind, **through(MULTIPLEXING)),
    "h2 behind": Scenario(get, another_leads, **through(MULTIPLEXING)),
    "h2 second": Scenario(upload, beside_a_download, **through(MULTIPLEXING)),
    "socks5": Scenario(get, several_addresses, **through(SOCKS5)),
    "http to socks5": Scenario(get, **through(HTTP, SOCKS5H)),
    "https, h2 to http": Scenario(get, **through(MULTIPLEXING, HTTP)),
    "h2 inside": Scenario(full_duplex, **through(HTTP, http2=True)),
    "h2 inside h2": Scenario(full_duplex, **through(MULTIPLEXING, http2=True)),
    "websocket": Scenario(websocket, **forwarded(HTTP)),
    "raw": Scenario(raw, origin="https://example.com"),
    "raw, http": Scenario(raw, **through(HTTP)),
    "raw, h2": Scenario(raw, beside_a_download, **through(MULTIPLEXING)),
    "raw, socks5": Scenario(raw, **through(SOCKS5H)),
    "raw, https to socks4a": Scenario(raw, **through(HTTPS, SOCKS4A)),
}
OVER_SOCKETS = ("forwarded upload", "connect, tls in tls", "h2 second", "http to socks5")

# Where another task is what interrupts, it takes its turn, so that before and after are much the same.
MOMENTS = {
    Interruption.CANCEL: (False, True),
    Interruption.CLOSE: (False,),
    Interruption.LEAVE: (True,),
}

scenarios = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
interruptions = pytest.mark.parametrize("interruption", Interruption)


@scenarios
@interruptions
def test_interrupted_at_any_step(scenario: Scenario, interruption: Interruption) -> None:
    steps = sweep(scenario, network, make_tls().client, interruption, moments=MOMENTS[interruption])
    assert steps >= 4


@pytest.mark.parametrize("name", OVER_SOCKETS)
def test_cancelled_at_any_step_over_sockets(name: str) -> None:
    steps = sweep(SCENARIOS[name], network, make_tls().client, Interruption.CANCEL, sockets=True)
    assert steps >= 4


@scenarios
@pytest.mark.parametrize("interruption", [Interruption.CANCEL, Interruption.LEAVE])
def test_interrupted_at_any_step_with_handlers_that_wait(
    scenario: Scenario, interruption: Interruption
) -> None:
    extensions = {"trace": Handler()}
    steps = sweep(
        scenario,
        network,
        make_tls().client,
        interruption,
        extensions=extensions,
        moments=MOMENTS[interruption],
    )
    assert steps >= 6


@scenarios
def test_a_handler_that_raises_at_any_call(scenario: Scenario) -> None:
    for call in itertools.count(1):
        handler = Handler(failing=call)
        error = Run(scenario, network, make_tls().client, {"trace": handler}).uninterrupted()
        if len(handler.calls) < call:
            assert error is None
            break
        assert error is handler.error
    assert call > 2


def test_the_scenarios_are_what_they_are_said_to_be() -> None:
    """They could take another way than the one that is to be interrupted."""
    told: dict[str, list[object]] = {}
    for name, scenario in SCENARIOS.items():
        handler = Handler()
        assert Run(scenario, network, make_tls().client, {"trace": handler}).uninterrupted() is None
        told[name] = [str(call).removesuffix(".started") for call in handler.calls if "started" in str(call)]
    tcp, tls, proxy_tls = "connection.connect_tcp", "connection.start_tls", "proxy.start_tls"
    asked, socks = "proxy.connect", "socks.connect"
    ways = {
        name: [call for call in calls if call in (tcp, tls, proxy_tls, asked, socks)]
        for name, calls in told.items()
    }
    assert ways == {
        "forwarded get": [tcp],
        "forwarded upload": [tcp],
        "forwarded, h2": [tcp, proxy_tls],
        "connect": [tcp, asked, tls],
        "connect, tls in tls": [tcp, proxy_tls, asked, tls],
        "refused": [tcp, asked],
        "refused, h2": [tcp, proxy_tls, asked],
        "h2 first": [tcp, proxy_tls, asked, tls],
        "h2 behind": [asked, tls],
        "h2 second": [asked, tls],
        "socks5": [tcp, socks, tcp, socks, tls],
        "http to socks5": [tcp, asked, socks, tls],
        "https, h2 to http": [tcp, proxy_tls, asked, asked, tls],
        "h2 inside": [tcp, asked, tls],
        "h2 inside h2": [tcp, proxy_tls, asked, tls],
        "websocket": [tcp, asked],
        "raw": [tcp],
        "raw, http": [tcp, asked],
        "raw, h2": [asked],
        "raw, socks5": [tcp, socks],
        "raw, https to socks4a": [tcp, proxy_tls, asked, socks],
    }
    for name, calls in told.items():
        assert ("http2.send_request_headers" in calls) == (
            name in ("forwarded, h2", "h2 inside", "h2 inside h2")
        )
