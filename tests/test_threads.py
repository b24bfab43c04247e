"""A pool in each of several threads that run at once, each with its own `trio.run`.

The threads share the module, what it caches, and the TLS context. The pools share nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import trio

from tests.harness.certificates import make_tls
from tests.harness.checks import assert_unharmed
from tests.harness.h2server import Multiplexer, ServerStream
from tests.harness.peers import Script, mute, respond
from tests.harness.servers import serve_tcp
from trio_exchange import ConnectionPool, ReadTimeout
from trio_exchange.testing import ScriptedPeer

T = TypeVar("T")

THREADS = 4
TASKS = 10
REQUESTS = 10
CONNECTIONS = 5

# Generous, since the threads of other tests may run on the same cores.
SECONDS = 40


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    """Interrupt threads within requests, not only where they wait."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_in_threads(main: Callable[[int], Awaitable[T]]) -> list[T]:
    """Run `main(number)` in as many threads at once, each under Trio."""
    barrier = threading.Barrier(THREADS, timeout=SECONDS)

    async def limited(number: int) -> T:
        with trio.fail_after(SECONDS):
            return await main(number)

    def start(number: int) -> T:
        barrier.wait()
        return trio.run(limited, number)

    with ThreadPoolExecutor(THREADS) as executor:
        return list(executor.map(start, range(THREADS)))


async def respond_in_http2(peer: ScriptedPeer) -> None:
    async def echo(stream: ServerStream) -> None:
        body = b""
        while data := await stream.receive_some():
            body += data
        await stream.respond(200)
        await stream.send_all(body)

    await Multiplexer(peer.stream, echo).serve()


PROTOCOLS: dict[str, tuple[Script, bool, dict[str, Any]]] = {
    "http11": (respond, False, {}),
    "http11-tls": (respond, True, {}),
    "http2": (respond_in_http2, False, {"http1": False, "http2": True}),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_request_is_answered_by_its_own_response(protocol: str) -> None:
    script, tls, options = PROTOCOLS[protocol]
    context = make_tls().client

    async def main(number: int) -> tuple[int, int]:
        async with trio.open_nursery() as nursery:
            server = await serve_tcp(nursery, script, tls=make_tls().server if tls else None)
            async with (
                ConnectionPool(ssl_context=context, max_connections=CONNECTIONS, **options) as pool,
                trio.open_nursery() as tasks,
            ):
                for task in range(TASKS):
                    tasks.start_soon(send_all, pool, server.url, f"{number}-{task}")
            statistics = pool.statistics()
            nursery.cancel_scope.cancel()
        return statistics.requests_served, statistics.connections_opened

    async def send_all(pool: ConnectionPool, url: str, name: str) -> None:
        for index in range(REQUESTS):
            content = f"{name}-{index}".encode() * (1 + index * 1000)
            headers = [("X-Name", f"{name}-{index}")]
            response = await pool.request("POST", f"{url}/{name}", headers=headers, content=content)
            assert response.content == content

    for served, opened in run_in_threads(main):
        assert served == TASKS * REQUESTS
        assert 1 <= opened <= CONNECTIONS


def test_a_pool_that_fails_or_is_cancelled_leaves_the_others_alone() -> None:
    failed = threading.Event()

    async def main(number: int) -> str:
        async with trio.open_nursery() as nursery:
            server = await serve_tcp(nursery, mute if number < 2 else respond)
            outcome = await OUTCOMES[min(number, 2)](server.url)
            nursery.cancel_scope.cancel()
        return outcome

    async def time_out(url: str) -> str:
        async with ConnectionPool() as pool:
            with pytest.raises(ReadTimeout):
                await pool.request("GET", url, extensions={"timeout": {"read": 0.01}})
            failed.set()
        return "timed out"

    async def cancel(url: str) -> str:
        with trio.move_on_after(0.01) as scope:
            async with ConnectionPool() as pool:
                await pool.request("GET", url)
        return "cancelled" if scope.cancelled_caught else "answered"

    async def go_on(url: str) -> str:
        async with ConnectionPool(max_connections=1) as pool:
            while not failed.is_set():
                assert (await pool.request("POST", url, content=b"before")).content == b"before"
            assert (await pool.request("POST", url, content=b"after")).content == b"after"
            assert_unharmed(pool, idle=1)
            assert pool.statistics().connections_opened == 1
        return "answered"

    OUTCOMES = (time_out, cancel, go_on)
    assert run_in_threads(main) == ["timed out", "cancelled", "answered", "answered"]
