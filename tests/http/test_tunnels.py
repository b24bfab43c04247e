"""CONNECT: what its stream does in HTTP/1.1 and in HTTP/2 alike, without and with TLS below."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.certificates import client_context, make_tls
from tests.harness.exchanges import Client, ExchangeScript, ServerExchange
from tests.harness.peers import BUFFERS, Script, respond, stall, swallow
from tests.harness.streams import read_exactly
from tests.harness.tunnels import TARGET, network_stream, tunnel
from trio_exchange import (
    ConnectError,
    ConnectTimeout,
    ReadError,
    ReadTimeout,
)

MEGABYTE = 1024 * 1024


def tunnel_to(then: Script) -> ExchangeScript:
    """A proxy that agrees to every CONNECT, and what is at the end of its tunnels."""

    async def script(exchange: ServerExchange) -> None:
        assert exchange.method == b"CONNECT"
        assert exchange.target == b"example.com:443"
        peer = await exchange.accept()
        with contextlib.suppress(trio.BrokenResourceError, EOFError):
            await then(peer)

    return script


async def echo(peer: Any) -> None:
    while data := await peer.receive_some():
        await peer.send(data)


# -- The answer.


@pytest.mark.parametrize("informed", [False, True])
@pytest.mark.parametrize("status", [200, 204, 299])
async def test_any_2xx_makes_a_tunnel(client: Client, status: int, informed: bool) -> None:
    async def script(exchange: ServerExchange) -> None:
        if informed:
            await exchange.inform(103)
        # A length has no meaning here (RFC 9110, 9.3.6).
        peer = await exchange.accept(status, [(b"content-length", b"3")])
        await peer.send(b"abcdef")
        await echo(peer)

    async with (
        client.pool(script) as pool,
        pool.stream("CONNECT", client.url, extensions=TARGET) as response,
    ):
        stream = network_stream(response)
        assert response.status == status
        assert await response.aread() == b""
        assert await read_exactly(stream, 6) == b"abcdef"
        await stream.write(b"def")
        assert await stream.read() == b"def"


# -- Reading and writing.


@pytest.mark.parametrize("inner", [False, True], ids=["as it is", "TLS inside"])
@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("how", ["write", "send_all"])
async def test_buffers_are_counted_in_bytes(client: Client, how: str, name: str, inner: bool) -> None:
    async def then(peer: Any) -> None:
        if inner:
            await peer.start_tls(make_tls().server)
        await echo(peer)

    buffer, content = BUFFERS[name]
    async with client.pool(tunnel_to(then), sockets=True) as pool:
        async with tunnel(pool, client.url) as stream:
            if inner:
                stream = await stream.start_tls(make_tls().client, "example.com")
            async with trio.open_nursery() as writer:
                writer.start_soon(getattr(stream, how), buffer)
                assert await read_exactly(stream, len(content)) == content
            await getattr(stream, how)(b"on")
            assert await read_exactly(stream, 2) == b"on"
        await client.assert_given_up(pool)


@pytest.mark.parametrize("what", ["text", 5, None, [b"x"]])
async def test_what_is_no_buffer_does_a_tunnel_no_harm(client: Client, what: Any) -> None:
    async with client.pool(tunnel_to(echo)) as pool, tunnel(pool, client.url) as stream:
        for send in (stream.write, stream.send_all):
            with pytest.raises(TypeError, match="bytes-like"):
                await send(what)
        await stream.write(b"unharmed")
        assert await read_exactly(stream, 8) == b"unharmed"


async def test_megabytes_both_ways_at_once(client: Client) -> None:
    """Far more than buffers and windows hold, so that neither direction gets on without the other."""
    content = bytes(range(256)) * ((3 if client.http2 else 8) * MEGABYTE // 256)
    async with client.pool(tunnel_to(echo), sockets=True) as pool, tunnel(pool, client.url) as stream:
        received = bytearray()
        async with trio.open_nursery() as inner:
            inner.start_soon(stream.write, content)
            while len(received) < len(content):
                received += await stream.read(timeout=10)
        assert received == content


async def test_reading_takes_pieces_of_what_came(client: Client) -> None:
    async def then(peer: Any) -> None:
        await peer.send(b"abcdef")
        await swallow(peer)

    async with client.pool(tunnel_to(then)) as pool, tunnel(pool, client.url) as stream:
        for wrong in (0, -1):
            with pytest.raises(ValueError, match="max_bytes"):
                await stream.read(wrong)
        assert await stream.read(1) == b"a"
        assert await stream.receive_some(2) == b"bc"
        assert await stream.receive_some() == b"def"
        with pytest.raises(ValueError, match="max_bytes"):
            await stream.read(0)


async def test_cancelled_reads_lose_no_data(client: Client) -> None:
    content = bytes(range(256)) * 500

    async def then(peer: Any) -> None:
        for start in range(0, len(content), 700):
            await peer.send(content[start : start + 700])
            await trio.testing.wait_all_tasks_blocked()

    async def cancel_after(steps: int, scope: trio.CancelScope) -> None:
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async with client.pool(tunnel_to(then)) as pool, tunnel(pool, client.url) as stream:
        received, ended, count = b"", False, 0
        while not ended:
            count += 1
            async with trio.open_nursery() as inner:
                if count % 2:
                    inner.start_soon(cancel_after, count % 5, inner.cancel_scope)
                data = await stream.read(100 if count % 3 else None)
                received += data
                ended = not data
        assert received == content


async def test_a_read_timeout_loses_no_data(client: Client, autojump_clock: MockClock) -> None:
    async def then(peer: Any) -> None:
        await trio.sleep(5)
        await peer.send(b"abc")
        await swallow(peer)

    async with client.pool(tunnel_to(then)) as pool, tunnel(pool, client.url) as stream:
        began = trio.current_time()
        with pytest.raises(ReadTimeout):
            await stream.read(timeout=3)
        assert trio.current_time() - began == pytest.approx(3)
        assert await stream.read(timeout=3) == b"abc"


async def test_two_readers_and_two_writers_are_told_apart(client: Client) -> None:
    async with client.pool(tunnel_to(stall), sockets=True) as pool, tunnel(pool, client.url) as stream:
        reads: list[Callable[[], Awaitable[object]]] = [stream.read, stream.receive_some]
        writes: list[Callable[[], Awaitable[object]]] = [
            lambda: stream.write(b"x" * 50_000_000),
            lambda: stream.send_all(b"x"),
            stream.wait_send_all_might_not_block,
        ]
        if client.http2 or client.url.startswith("http:"):
            # TLS can not be half closed.
            writes.append(stream.send_eof)
        for operations in (reads, writes):
            async with trio.open_nursery() as inner:
                inner.start_soon(operations[0])
                await trio.testing.wait_all_tasks_blocked(0.05)
                for operation in operations:
                    with pytest.raises(trio.BusyResourceError, match="another task is"):
                        await operation()
                inner.cancel_scope.cancel()


# -- TLS on the stream.


async def tls_server(peer: Any) -> None:
    await peer.start_tls(make_tls().server)
    await respond(peer)


async def no_tls(peer: Any) -> None:
    await peer.receive_some()
    await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def hang_up(_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (tls_server, "certificate of wrong.example could not be verified: Hostname"),
        (no_tls, "handshake with wrong.example failed"),
        (hang_up, "handshake with wrong.example failed"),
    ],
    ids=["wrong name", "no TLS", "closed"],
)
async def test_start_tls_that_fails_ends_the_tunnel(client: Client, then: Script, message: str) -> None:
    async with client.pool(tunnel_to(then)) as pool, tunnel(pool, client.url) as stream:
        with pytest.raises(ConnectError, match=message):
            await stream.start_tls(client_context(make_tls().ca), "wrong.example")
        with pytest.raises(ReadError):
            await stream.read()
        if client.http2 and then is hang_up:
            # Both sides have ended the stream.
            await client.assert_reusable(pool)
        else:
            await client.assert_given_up(pool)


@pytest.mark.parametrize("how", ["timeout", "cancelled"])
async def test_start_tls_that_takes_too_long_ends_the_tunnel(
    client: Client, autojump_clock: MockClock, how: str
) -> None:
    async with client.pool(tunnel_to(swallow)) as pool, tunnel(pool, client.url) as stream:
        began = trio.current_time()
        if how == "timeout":
            with pytest.raises(ConnectTimeout):
                await stream.start_tls(make_tls().client, "example.com", timeout=3)
        else:
            with trio.move_on_after(3) as scope:
                await stream.start_tls(make_tls().client, "example.com")
            assert scope.cancelled_caught
        assert trio.current_time() - began == pytest.approx(3)
        await client.assert_given_up(pool)
