"""The soak itself."""

from __future__ import annotations

import contextlib
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from examples import _peers, proxy_server
from tests.harness.certificates import client_context, make_tls
from trio_exchange import ConnectionPool, Proxy

from . import measures
from .client import Requests
from .servers import Origin, Server, contexts, echo, moods, proxy, shake

_TASKS = 60
# Connections are gone so soon after their last request, and with them all that they hold.
_EXPIRY = 0.5
_QUIET_WITHIN = 20.0
# It takes so long until every kind of request has been sent, and all caches are filled.
_WARM_UP = 6.0
# In a shorter run, memory does not come to rest.
_MEMORY_COUNTS_FROM = 20.0


@dataclass
class Result:
    """What a soak found.

    Attributes:
        seed: Of its plans.
        seconds: For which requests were sent.
        total: How many requests there were.
        outcomes: How many of each pool ended in each way.
        faults: How many there were for each of the servers' faults.
        problems: What should not have happened.
        measures: What the process held, by when.
    """

    seed: int
    seconds: float = 0.0
    total: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    measures: dict[str, measures.Measure] = field(default_factory=dict)

    def lines(self) -> Iterable[str]:
        """The summary."""
        yield f"seed {self.seed}: {self.total} requests in {self.seconds:.0f} s"
        yield f"  {self.total / max(self.seconds, 0.1):.0f} requests a second"
        for pool in dict.fromkeys(pool for pool, _ in self.outcomes):
            ends = Counter({end: count for (name, end), count in self.outcomes.items() if name == pool})
            told = ", ".join(f"{count} {end}" for end, count in ends.most_common())
            yield f"  {pool}: {ends.total()} requests: {told}"
        yield "  servers' faults: " + ", ".join(f"{n} {fault}" for fault, n in self.faults.most_common())
        for when, measure in self.measures.items():
            yield f"  {when}: {measure}"


class Soak:
    """Servers, pools, and the tasks that send requests.

    Args:
        seconds: For how long.
        seed: Of all that is chosen.
        only: The number of the one request that is sent again and again; None for all.
    """

    def __init__(self, seconds: float, seed: int, only: int | None = None) -> None:
        self._seconds = seconds
        self._seed = seed
        self._ca = make_tls().ca
        self._ports: dict[str, int] = {}
        self._pools: dict[str, ConnectionPool] = {}
        self._requests = Requests(seed, self._url, self._short_lived)
        self._requests.only = only
        self.result = Result(
            seed,
            outcomes=self._requests.outcomes,
            faults=self._requests.faults,
            problems=self._requests.problems,
        )

    async def run(self) -> None:
        """Run it all."""
        self._measure("at the start")
        async with trio.open_nursery() as nursery:
            await self._start_servers(nursery)
            async with self._open_pools(nursery):
                begun = time.monotonic()
                first = max(self._seconds / 10, min(self._seconds / 3, _WARM_UP))
                await self._send_requests(first)
                await self._quiet()
                self._measure("warmed up")
                await self._send_requests(self._seconds - first)
                await self._quiet()
                self._measure("at the end")
                self.result.seconds = time.monotonic() - begun
                self._compare("warmed up", "at the end", rss=self._seconds >= _MEMORY_COUNTS_FROM)
            nursery.cancel_scope.cancel()
        self.result.total = self._requests.total
        self._measure("after the pools")
        self._compare("at the start", "after the pools", rss=False)

    def _measure(self, when: str) -> None:
        self.result.measures[when] = measures.take()

    def _compare(self, before: str, after: str, *, rss: bool) -> None:
        found = self.result.measures
        for more in measures.growth(found[before], found[after], rss=rss):
            self.result.problems.append(f"{after}: {more} (which was {before})")

    # -- Servers.

    async def _start_servers(self, nursery: trio.Nursery) -> None:
        tls = contexts(self._ca)()
        servers = {
            f"{'rough' if rough else 'calm'} {'https' if secure else 'http'}": Server(
                Origin(self._seed),
                self._report,
                tls=tls if secure else None,
                moods=moods(self._seed),
            )
            for rough in (False, True)
            for secure in (False, True)
        }
        servers["proxy"] = Server(proxy, self._report)
        servers["https proxy"] = Server(proxy, self._report, tls=tls)
        servers["moody proxy"] = Server(proxy, self._report, tls=tls, moods=moods(self._seed))
        servers["shaky proxy"] = Server(proxy, self._report, tls=tls)
        servers["socks proxy"] = Server(None, self._report, raw=_peers._socks)
        servers["echo"] = Server(None, self._report, raw=echo)
        for name, server in servers.items():
            self._ports[name] = await nursery.start(server.listen)
        nursery.start_soon(shake, servers["shaky proxy"], self._seed)

    def _report(self, what: str) -> None:
        self._requests.problems.append(what)

    def _url(self, rough: bool, tls: bool) -> str:
        scheme = "https" if tls else "http"
        port = self._ports[f"rough {scheme}" if rough else f"calm {scheme}"]
        return f"{scheme}://127.0.0.1:{port}"

    # -- Pools.

    @contextlib.asynccontextmanager
    async def _open_pools(self, nursery: trio.Nursery) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:

            async def enter(name: str, **options: Any) -> None:
                pool = await stack.enter_async_context(self._pool(**options))
                self._pools[name] = self._requests.pools[name] = pool

            upstream = await stack.enter_async_context(self._pool(max_connections=None))
            self._pools["that of the own proxy"] = upstream
            self._ports["own proxy"] = await nursery.start(proxy_server.serve, upstream, 0)
            await enter("http1")
            await enter("narrow", max_connections=2, max_keepalive_connections=1)
            await enter("http2", http1=False, http2=True)
            await enter("alpn", http2=True, max_connections=3, http2_ping_interval=0.3)
            await enter("connect", http2=True, proxy=self._proxy("http", "proxy"))
            await enter("socks", http2=True, proxy=self._proxy("socks5h", "socks proxy"))
            await enter("http2 proxy", proxy=self._proxy("https", "https proxy"))
            await enter("http2 in http2", http2=True, proxy=self._proxy("https", "moody proxy"))
            chain = [self._proxy("https", "https proxy"), self._proxy("https", "moody proxy")]
            await enter("chain", http2=True, proxy=chain)
            await enter("shaky proxy", http2=True, proxy=self._proxy("https", "shaky proxy"))
            await enter("own proxy", http2=True, proxy=self._proxy("http", "own proxy"))
            try:
                yield
            finally:
                self._pools.clear()
                self._requests.pools.clear()

    def _proxy(self, scheme: str, name: str) -> Proxy:
        url = f"{scheme}://127.0.0.1:{self._ports[name]}"
        if scheme != "https":
            return Proxy(url)
        return Proxy(url, ssl_context=client_context(self._ca), http2=True)

    def _pool(self, **options: Any) -> ConnectionPool:
        settings = {"keepalive_expiry": _EXPIRY, "expect_continue_timeout": 0.05, **options}
        return ConnectionPool(client_context(self._ca), **settings)

    def _short_lived(self) -> ConnectionPool:
        return self._pool()

    # -- Requests.

    async def _send_requests(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        async with trio.open_nursery() as nursery:
            for _ in range(_TASKS):
                nursery.start_soon(self._requests.work, until, nursery)
            if self._requests.only is None:
                nursery.start_soon(self._use_raw_streams, until)

    async def _use_raw_streams(self, until: float) -> None:
        chosen = random.Random(f"{self._seed}/raw")
        while time.monotonic() < until and not self._requests.problems:
            await trio.sleep(0.1)
            with trio.move_on_after(chosen.choice((20.0, 20.0, 0.01))):
                name = chosen.choice(self._requests.known())
                await self._requests.tunnel(name, "127.0.0.1", self._ports["echo"])

    async def _quiet(self) -> None:
        """Wait until no pool has a connection, nor a server."""
        pools = self._pools
        with trio.move_on_after(_QUIET_WITHIN):
            while not all(_is_quiet(pool) for pool in pools.values()):  # noqa: ASYNC110 - no event for it
                await trio.sleep(0.1)
            # The servers notice it last.
            await trio.sleep(0.5)
            return
        for name, pool in pools.items():
            if not _is_quiet(pool):
                held = [list(manager) for manager in pool._managers]
                self.result.problems.append(
                    f"the pool {name!r} still holds something {_QUIET_WITHIN:g} seconds later: {pool}, {held}"
                )


def _is_quiet(pool: ConnectionPool) -> bool:
    schedulers = [manager.scheduler for manager in pool._managers]
    return not any(len(each) or each.connecting or each.waiting for each in schedulers)


def soak(seconds: float, seed: int, only: int | None = None) -> Result:
    """Run a soak.

    Args:
        seconds: For how long requests are sent.
        seed: Of all that is chosen.
        only: The number of the one request that is sent again and again; None for all.
    """
    run = Soak(seconds, seed, only)

    def note(unraisable: sys.UnraisableHookArgs) -> None:
        run.result.problems.append(f"not raised: {unraisable.exc_value!r} in {unraisable.object!r}")

    before: Callable[[sys.UnraisableHookArgs], Any] = sys.unraisablehook
    sys.unraisablehook = note
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trio.run(run.run)
    finally:
        sys.unraisablehook = before
    return run.result
