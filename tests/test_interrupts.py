"""Ctrl-C: whatever a program is doing when it comes, the program ends, with a bare KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import h2.exceptions
import pytest
import trio
import trio.lowlevel
import trio.testing

from tests.harness.checks import assert_unharmed
from tests.harness.h2peer import h2_pool
from tests.harness.peers import mute, respond
from tests.harness.servers import background_nursery
from tests.harness.streams import Wrapped
from tests.harness.sweep import forgiving
from trio_exchange import ConnectionPool, ExchangeError
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "http://example.com/"
BUSY_PROGRAM = Path(__file__).parent / "harness" / "busy_program.py"

pytestmark = pytest.mark.usefixtures("interruptible")


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def interrupted(main: Callable[[], Awaitable[object]]) -> None:
    """Run a program that an interrupt has to end."""
    with pytest.raises(KeyboardInterrupt):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


# -- In the tasks of a pool.


class InterruptingStream(Wrapped):
    """A stream in whose method `name` an interrupt comes, as if it came in the task that calls it."""

    def __init__(self, stream: trio.abc.Stream, name: str) -> None:
        super().__init__(stream)
        self._name = name

    def _interrupt(self, name: str) -> None:
        if name == self._name:
            self._name = ""
            interrupt()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._interrupt("send_all")
        await self.stream.send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.stream.receive_some(max_bytes)
        self._interrupt("receive_some")
        return data

    async def aclose(self) -> None:
        self._interrupt("aclose")
        await self.stream.aclose()


class InterruptingConnector(MemoryConnector):
    """A connector of streams in which interrupts come."""

    def __init__(self, nursery: trio.Nursery, serve: Callable[[ScriptedPeer], Awaitable[object]], name: str):
        super().__init__(nursery, serve)
        self._name = name

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> trio.abc.Stream:
        return InterruptingStream(await super().connect_tcp(*args, **kwargs), self._name)


@pytest.mark.parametrize("name", ["send_all", "receive_some", "aclose"])
@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
def test_in_a_task_of_the_pool(protocol: str, name: str) -> None:
    """The request that the task works for is not the one that is told."""
    pool = ConnectionPool()

    async def serve_http2(peer: Any) -> None:
        await peer.start()
        with contextlib.suppress(EOFError):
            while True:
                stream_id, _, _ = await peer.request()
                await peer.respond(stream_id, body=b"hello")

    async def ask() -> None:
        # The pool closes under it.
        with contextlib.suppress(ExchangeError):
            await pool.request("GET", URL)

    async def main() -> None:
        nonlocal pool
        nursery = await background_nursery()
        if protocol == "HTTP/2":
            pool, connector = h2_pool(nursery, serve_http2)
        else:
            connector = MemoryConnector(nursery, respond)
            pool = ConnectionPool(connector=connector)
        wrapped = InterruptingConnector(nursery, connector._serve, name)
        connector.connect_tcp = wrapped.connect_tcp  # type: ignore[method-assign]
        async with pool:
            nursery.start_soon(ask)
            await trio.sleep(1)
            if name == "aclose":
                pool._manager.stop()
            await trio.sleep_forever()

    interrupted(main)
    assert_unharmed(pool)


def test_in_housekeeping() -> None:
    async def main() -> None:
        connector = MemoryConnector(await background_nursery(), respond)
        async with ConnectionPool(connector=connector) as pool:
            await pool.request("GET", URL)
            [connection] = pool._manager
            # Housekeeping asks each idle connection how it is.
            connection.readiness = interrupt  # type: ignore[attr-defined]
            await trio.sleep_forever()

    interrupted(main)


# -- In the program's code that a pool calls.


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("where", ["iterator", "peeked iterator", "clean-up", "trace", "informational"])
def test_in_the_programs_own_code(protocol: str, where: str) -> None:
    """An endless loop in it can be interrupted: the interrupt does not wait for a checkpoint."""
    reached = []

    def loop() -> None:
        interrupt()
        reached.append("the next line")

    async def generator() -> AsyncIterator[bytes]:
        if where in ("iterator", "peeked iterator"):
            loop()
        try:
            while True:
                yield b"chunk"
                await trio.lowlevel.checkpoint()
        finally:
            if where == "clean-up":
                loop()

    class Body:
        def __aiter__(self) -> AsyncIterator[bytes]:
            return generator()

    async def trace(event: str, _: dict[str, Any]) -> None:
        if where == "trace" and event.endswith("receive_response_headers.complete"):
            loop()

    async def informational(*_: Any) -> None:
        if where == "informational":
            loop()

    async def serve_http1(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send_response(103)
        await peer.send_response(200)

    async def serve_http2(peer: Any) -> None:
        # The stream may have been reset before the answer.
        with contextlib.suppress(h2.exceptions.ProtocolError):
            await peer.start()
            stream_id, _ = await peer.head()
            peer.h2.send_headers(stream_id, [(b":status", b"103")])
            await peer.respond(stream_id)
            await peer.until_closed()

    async def main() -> None:
        nursery = await background_nursery()
        if protocol == "HTTP/2":
            pool, _ = h2_pool(nursery, serve_http2)
        else:
            pool = ConnectionPool(connector=MemoryConnector(nursery, serve_http1))
        pools.append(pool)
        content: Any = Body() if where in ("iterator", "peeked iterator") else generator()
        async with pool:
            await pool.request(
                "GET" if where == "peeked iterator" else "POST",
                URL,
                content=content,
                extensions={"trace": trace, "informational": informational},
            )

    pools: list[ConnectionPool] = []
    interrupted(main)
    assert reached == []
    assert_unharmed(pools[0])


# -- While a pool closes.


def test_while_the_pool_waits_for_an_uploads_clean_up() -> None:
    pool = ConnectionPool()
    order: list[str] = []
    cleaning = trio.Event()

    async def slow() -> AsyncIterator[bytes]:
        try:
            yield b"chunk"
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                cleaning.set()
                await trio.sleep(5)
                order.append("cleaned up")

    async def ask() -> None:
        with pytest.raises(ExchangeError):
            await pool.request("POST", URL, content=slow())

    @trio.lowlevel.enable_ki_protection
    async def interrupt_it() -> None:
        await cleaning.wait()
        await trio.sleep(1)
        interrupt()

    async def main() -> None:
        nursery = await background_nursery()
        nonlocal pool
        pool = ConnectionPool(connector=MemoryConnector(nursery, forgiving(mute)))
        try:
            async with pool:
                nursery.start_soon(ask)
                nursery.start_soon(interrupt_it)
                await trio.testing.wait_all_tasks_blocked()
        finally:
            order.append("left")

    interrupted(main)
    assert order == ["cleaned up", "left"]
    assert_unharmed(pool)


def test_twice_while_the_pool_closes() -> None:
    """The second interrupt does not wait any longer; the closing goes on."""
    pool = ConnectionPool()
    order: list[str] = []

    class Mute(InterruptingStream):
        async def aclose(self) -> None:
            interrupt()
            await trio.sleep(0.5)
            interrupt()
            try:
                await trio.sleep_forever()
            finally:
                order.append("closed")
                await trio.aclose_forcefully(self.stream)

    class MuteConnector(MemoryConnector):
        async def connect_tcp(self, *args: Any, **kwargs: Any) -> trio.abc.Stream:
            return Mute(await super().connect_tcp(*args, **kwargs), "")

    async def main() -> None:
        nonlocal pool
        pool = ConnectionPool(connector=MuteConnector(await background_nursery(), respond))
        try:
            async with pool:
                await pool.request("GET", URL)
        finally:
            order.append("left")

    interrupted(main)
    assert order == ["left", "closed"]
    assert_unharmed(pool)


# -- While connecting.


def test_while_trio_tries_the_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trio does so in a nursery of the requester's task, which puts the interrupt into a group."""

    async def attempt() -> None:
        interrupt()

    async def open_tcp_stream(*_: Any, **__: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt)

    async def main() -> None:
        async with ConnectionPool() as pool:
            pools.append(pool)
            await pool.request("GET", URL)

    pools: list[ConnectionPool] = []
    monkeypatch.setattr(trio, "open_tcp_stream", open_tcp_stream)
    interrupted(main)
    assert_unharmed(pools[0])


# -- At any moment.


@pytest.mark.parametrize("tls", ["plain", "tls"])
@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_at_a_hundred_random_moments(protocol: str, tls: str) -> None:
    program = subprocess.run(
        [sys.executable, "-W", "error", str(BUSY_PROGRAM), protocol, tls, "100"],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert program.stderr == ""
    assert program.stdout == "100 times KeyboardInterrupt\n"
