"""The library at work against servers on loopback: what it shows is what happened, and it is checked.

It exits with 1 if anything was not as it should be.

This example needs socksio, trustme and wsproto: pip install socksio trustme wsproto
"""

from __future__ import annotations

import base64
import functools
import os
import platform
import sys
from importlib.metadata import version
from typing import Any

import trio

import trio_exchange
from examples import _peers
from examples._needs import needed
from examples.timeline import Timeline
from examples.websocket import WebSocket, handshake, upgraded
from trio_exchange import ConnectionPool, Proxy

with needed():
    # The pool imports it when a proxy speaks SOCKS.
    import socksio  # noqa: F401

WIDTH = 80


async def show_timeline(pool: ConnectionPool, url: str, show: Show) -> None:
    show.title("One request, phase by phase")
    timeline = Timeline()
    async with pool.stream("GET", f"{url}/story", extensions={"trace": timeline}) as response:
        chunks = [chunk async for chunk in response.aiter_stream()]
        tls = response.extensions["network_stream"].get_extra_info("ssl_object")
        http = response.extensions["http_version"].decode()
        show.line(f"GET {url}/story -> {response.status}, {http} over {tls.version()}")
    show.timeline(timeline)
    show.line(f"{len(chunks)} pieces arrived, one after the other:")
    for chunk in chunks:
        show.quote(chunk.decode().rstrip())
    show.check(response.status == 200 and b"".join(chunks) == b"".join(_peers.STORY), "the story is complete")
    names = [phase.name for phase in timeline.phases()]
    show.check(names == ["connect", "TLS", "send", "first byte", "body"], "every phase was traced")


async def show_reuse(pool: ConnectionPool, url: str, show: Show) -> None:
    show.title("The same again, on the same connection")
    timeline = Timeline()
    response = await pool.request("GET", f"{url}/story", extensions={"trace": timeline})
    show.timeline(timeline)
    for connection in pool.connections:
        show.line(repr(connection))
    names = [phase.name for phase in timeline.phases()]
    statistics = pool.statistics()
    show.check(response.status == 200 and names == ["send", "first byte", "body"], "no connect, no TLS")
    show.check(
        (statistics.connections_opened, statistics.requests_served) == (1, 2),
        f"requests: {statistics.requests_served}, connections opened: {statistics.connections_opened}",
    )


async def show_tunnel(pool: ConnectionPool, proxy: str, url: str, show: Show) -> None:
    show.title("A tunnel through a proxy, and TLS inside")
    origin = trio_exchange.URL(url).origin
    target = f"{origin.host.decode()}:{origin.port}"
    async with pool.stream("CONNECT", proxy, extensions={"target": target}) as response:
        show.line(f"CONNECT {target} via {proxy} -> {response.status}")
        tunnel = response.extensions["network_stream"]
        stream = await tunnel.start_tls(trio_exchange.default_ssl_context(), origin.host, timeout=5)
        tls = stream.get_extra_info("ssl_object")
        show.line(f"{tls.version()} with {tls.server_hostname}, {tls.cipher()[0]}")
        await stream.write(
            f"GET / HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n".encode(), timeout=5
        )
        head, _, body = b"".join([data async for data in stream]).decode().partition("\r\n\r\n")
        show.line(f"GET / through the tunnel -> {head.splitlines()[0]}")
        show.quote(body.rstrip())
        through_proxy = stream.get_extra_info("server_addr")[1] == trio_exchange.URL(proxy).port
    show.check(head.startswith("HTTP/1.1 200 ") and target in body, "the origin answered")
    show.check(through_proxy, "and all that the socket ever spoke with is the proxy")


async def show_websocket(pool: ConnectionPool, url: str, show: Show) -> None:
    show.title("A WebSocket, with wsproto on the network stream")
    key = base64.b64encode(os.urandom(16))
    sent = ["Hello!", "Is anybody there?", "\N{WAVING HAND SIGN} Good-bye."]
    received = []
    async with pool.stream("GET", url, headers=handshake(key)) as response:
        reason = response.extensions["reason_phrase"].decode()
        show.line(f"GET {url} -> {response.status} {reason}".rstrip())
        websocket = WebSocket(upgraded(response, key))
        for text in sent:
            await websocket.send(text)
        await websocket.close()
        while (answer := await websocket.receive()) is not None:
            received.append(answer)
            show.quote(answer)
    show.check(received == sent, f"{len(received)} messages came back as they were sent")


async def show_cancellation(pool: ConnectionPool, url: str, show: Show) -> None:
    show.title("Five requests, and one that is cancelled among them")
    finished: list[bytes] = []
    asked: set[str] = set()
    all_asked = trio.Event()
    scope = trio.CancelScope()

    async def get_story(name: str) -> None:
        finished.append(await get(f"{url}/story?{name}"))

    async def wait_in_vain() -> None:
        with scope:
            await get(f"{url}/silence")

    async def get(page: str) -> bytes:
        async def note(event: str, info: object) -> None:
            if event == "http11.send_request_body.complete":
                asked.add(page)
                if len(asked) == 6:
                    all_asked.set()

        response = await pool.request("GET", page, extensions={"trace": note})
        return response.content

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_in_vain)
        for name in ("Ann", "Ben", "Cid", "Dot", "Eve"):
            nursery.start_soon(get_story, name)
        await all_asked.wait()
        show.line(f"before  {pool!r}")
        scope.cancel()
    show.line(f"after   {pool!r}")
    statistics = pool.statistics()
    show.check(scope.cancelled_caught, "it was cancelled while it waited for its answer")
    show.check(finished == [b"".join(_peers.STORY)] * 5, f"the {len(finished)} others have theirs")
    show.check(statistics.open == statistics.idle, "its connection is closed, no place in the pool is lost")
    response = await pool.request("GET", url)
    reused = pool.statistics().connections_opened == statistics.connections_opened
    show.check(response.status == 200 and reused, "the next request took a connection that was kept")


async def show_multiplexing(url: str, show: Show) -> None:
    show.title("The same over HTTP/2: one connection carries them all")
    stories: dict[int, bytes] = {}
    arrivals: list[int] = []
    protocols: set[str | None] = set()
    arrived_before_cancellation: list[int] = []
    scope = trio.CancelScope()

    async def get_story(name: str) -> None:
        async with pool.stream("GET", f"{url}/story?{name}") as response:
            tls = response.extensions["network_stream"].get_extra_info("ssl_object")
            protocols.add(tls.selected_alpn_protocol())
            stream_id = response.extensions["stream_id"]
            stories[stream_id] = b""
            async for chunk in response.aiter_stream():
                stories[stream_id] += chunk
                arrivals.append(stream_id)
                # In the midst of all the others.
                if len(arrivals) == 10:
                    scope.cancel()

    async def wait_in_vain() -> None:
        with scope:
            await pool.request("GET", f"{url}/silence", extensions={"trace": note})

    async def note(event: str, info: dict[str, Any]) -> None:
        if event == "http2.receive_response_headers.failed":
            arrived_before_cancellation.append(len(arrivals))

    async with ConnectionPool(http2=True) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_in_vain)
            for name in ("Ann", "Ben", "Cid", "Dot", "Eve"):
                nursery.start_soon(get_story, name)
        show.line("The pieces of the stories arrived on streams")
        show.quote(" ".join(map(str, arrivals)))
        opened = pool.statistics().connections_opened
        show.check(protocols == {"h2"}, "both sides chose HTTP/2 in the TLS handshake")
        show.check(opened == 1, f"requests at once: 6, connections opened: {opened}")
        show.check(len(stories) == 5 and arrivals != sorted(arrivals), "each has a stream, they took turns")
        to_come = [len(arrivals) - arrived for arrived in arrived_before_cancellation]
        show.check(len(to_come) == 1 and to_come[0] > 0, "one was cancelled in the midst of them")
        show.check(set(stories.values()) == {b"".join(_peers.STORY)}, "the five others are complete")
        response = await pool.request("GET", url)
        reused = pool.statistics().connections_opened == opened
        show.check(response.status == 200 and reused, "and the connection serves the next request")


async def show_proxies(http_url: str, https_url: str, proxies: list[str], show: Show) -> None:
    show.title("Proxies: forwarding, tunnels in one connection, a chain, a refusal")
    plain, secure, socks = proxies
    await show_forwarding(Proxy(plain), http_url, show)
    await show_shared_tunnels(Proxy(secure, http2=True), https_url, show)
    await show_chain([Proxy(socks), Proxy(secure)], https_url, show)


async def show_forwarding(proxy: Proxy, url: str, show: Show) -> None:
    async with ConnectionPool(proxy=proxy) as pool:
        response = await pool.request("GET", url)
        show.line(f"GET {url} via {proxy.url.origin} -> {response.status}")
        signed = (b"via", b"1.1 localhost") in [(name.lower(), value) for name, value in response.headers]
        show.check(response.status == 200 and signed, "the proxy has put its name to what it forwarded")


async def show_shared_tunnels(proxy: Proxy, url: str, show: Show) -> None:
    way = Dialer()
    async with ConnectionPool(proxy=proxy) as pool:
        get = functools.partial(pool.stream, "GET", url, extensions={"trace": way})
        async with get() as one, get() as other:
            show.line(f"GET {url} via {proxy.url.origin}, twice -> {one.status}, {other.status}")
            show.check(
                way.versions == [b"HTTP/2", b"HTTP/2"] and way.steps.count("connection.connect_tcp") == 1,
                f"tunnels: {way.steps.count('proxy.connect')}, as streams of one HTTP/2 connection",
            )
            contents = {await one.aread(), await other.aread()}
            show.check(contents == {greeting(url)}, "each has TLS of its own inside, and an answer")


async def show_chain(proxies: list[Proxy], url: str, show: Show) -> None:
    way = Dialer()
    async with ConnectionPool(proxy=proxies) as pool:
        response = await pool.request("GET", url, extensions={"trace": way})
        show.line(f"GET {url} via a chain -> {response.status}, and the way there:")
        for step in way.steps:
            show.quote(step)
        names = ["connection.connect_tcp", "socks.connect", "proxy.start_tls", "proxy.connect"]
        show.check(
            way.steps == [*names, "connection.start_tls"] and response.content == greeting(url),
            "SOCKS5, then an https proxy, then the origin: TLS in TLS",
        )
        try:
            await pool.request("GET", f"https://localhost:{_peers.FORBIDDEN_PORT}/")
        except trio_exchange.ProxyError as exc:
            answer = exc.response
        else:
            answer = None
        if answer is not None:
            show.line(f"ProxyError: {answer.status} {answer.extensions['reason_phrase'].decode()}")
            show.quote(answer.content.decode().rstrip())
        show.check(answer is not None and answer.status == 403, "a refusal comes with the proxy's words")


def greeting(url: str) -> bytes:
    return f"Hello, {url.partition('://')[2]}!\n".encode()


class Dialer:
    """A trace handler that notes the steps of the way to an origin, and what the proxies speak."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.versions: list[bytes] = []

    async def __call__(self, event: str, info: dict[str, Any]) -> None:
        step, _, phase = event.rpartition(".")
        if phase == "complete" and step.startswith(("connection.", "proxy.", "socks.")):
            self.steps.append(step)
            if step == "proxy.connect":
                self.versions.append(info["return_value"][0])


async def show_timeout(pool: ConnectionPool, url: str, show: Show) -> None:
    show.title("A server that does not answer, and a timeout")
    limit = 0.15
    started = trio.current_time()
    error = None
    try:
        await pool.request("GET", f"{url}/silence", extensions={"timeout": {"read": limit}})
    except trio_exchange.ReadTimeout as exc:
        error = exc
        show.line(f"{type(exc).__name__}: {exc}")
    seconds = trio.current_time() - started
    show.check(error is not None and limit <= seconds < 20 * limit, f"raised after {seconds * 1000:.0f} ms")
    show.check((await pool.request("GET", url)).status == 200, "the pool goes on")


async def main(url: str, http_url: str, proxy: str, https_proxy: str, socks_proxy: str, echo: str) -> bool:
    versions = [f"{name} {version(name)}" for name in ("trio", "h11", "h2")]
    show = Show()
    show.heading(f"trio_exchange {trio_exchange.__version__}")
    show.line(f"on Python {platform.python_version()}, {', '.join(versions)}; everything on loopback")
    started = trio.current_time()
    async with ConnectionPool() as pool:
        await show_timeline(pool, url, show)
        await show_reuse(pool, url, show)
        await show_tunnel(pool, proxy, url, show)
        await show_websocket(pool, echo, show)
        await show_cancellation(pool, url, show)
        await show_multiplexing(url, show)
        await show_proxies(http_url, url, [proxy, https_proxy, socks_proxy], show)
        await show_timeout(pool, url, show)
    show.title("The end of the block")
    show.line(repr(pool))
    statistics = pool.statistics()
    show.check(
        (statistics.open, statistics.connecting, statistics.waiting) == (0, 0, 0),
        f"{statistics.connections_opened} connections were opened, {statistics.open} are left",
    )
    return show.summary(trio.current_time() - started)


class Show:
    """Prints to an 80-column terminal, with colours if it is one, and counts the checks that failed."""

    def __init__(self) -> None:
        self._coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._passed = self._failed = self._titles = 0
        self._ok, self._wrong, self._bar, self._hairline, self._quote = (
            _SYMBOLS if _unicode() else _ASCII_SYMBOLS
        )

    def heading(self, text: str) -> None:
        print(self._colour("1", text))

    def title(self, text: str) -> None:
        self._titles += 1
        print(f"\n{self._colour('1;36', f'{self._titles}. {text}')}")

    def line(self, text: str) -> None:
        print(f"   {text}")

    def quote(self, text: str) -> None:
        print(self._colour("2", f"     {self._quote} {_printable(text)}"))

    def timeline(self, timeline: Timeline) -> None:
        for line in timeline.draw(WIDTH - 28, self._bar, self._hairline):
            head, bar = line[:24], line[24:]
            print(f"   {head}{self._colour('33', bar)}")

    def check(self, passed: bool, text: str) -> None:
        if passed:
            self._passed += 1
            print(f"   {self._colour('32', self._ok)} {text}")
        else:
            self._failed += 1
            print(f"   {self._colour('1;31', self._wrong)} {self._colour('31', f'NOT TRUE: {text}')}")

    def summary(self, seconds: float) -> bool:
        """Whether all checks passed."""
        total = self._passed + self._failed
        if self._failed:
            print(f"\n{self._colour('1;31', f'{self._failed} of {total} checks failed.')}")
        else:
            print(f"\n{self._colour('1;32', f'All {total} checks passed')}, in {seconds:.1f} seconds.")
        return not self._failed

    def _colour(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._coloured else text


_SYMBOLS = (
    "\N{CHECK MARK}",
    "\N{BALLOT X}",
    "\N{FULL BLOCK}",
    "\N{LEFT ONE EIGHTH BLOCK}",
    "\N{BOX DRAWINGS LIGHT VERTICAL}",
)
_ASCII_SYMBOLS = ("+", "!", "#", "|", "|")


def _unicode() -> bool:
    return _printable("".join(_SYMBOLS)) == "".join(_SYMBOLS)


def _printable(text: str) -> str:
    encoding = sys.stdout.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    proxies = (_peers.proxy, _peers.https_proxy, _peers.socks_proxy)
    sys.exit(not _peers.run(main, _peers.https_site, _peers.site, *proxies, _peers.websocket_echo))
