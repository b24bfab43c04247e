"""The proxy server and the port forwarder among the examples, as somebody would use them.

What they carry is counted in gibibytes, so that they run as processes of their own, whose memory is seen.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from examples import _peers, proxy_server
from examples.port_forwarder import relay

ROOT = Path(__file__).parent.parent
MIB = 1024 * 1024
PIECE = bytes(MIB)

Serve = Callable[[trio.SocketStream], Awaitable[None]]

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs to see the memory of another process"
)


class Tool:
    """An example at work in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.port = port
        self._status = Path(f"/proc/{process.pid}/status")

    def peak(self) -> int:
        """The most memory that it ever had, in bytes."""
        found = re.search(r"VmHWM:\s+(\d+) kB", self._status.read_text())
        assert found
        return int(found[1]) * 1024

    @contextmanager
    def stays_flat(self) -> Iterator[None]:
        before = self.peak()
        yield
        assert self.peak() - before < 16 * MIB


@contextmanager
def running(name: str, *arguments: str) -> Iterator[Tool]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", f"examples.{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        found = re.search(r"localhost:(\d+)", process.stdout.readline())
        assert found, process.communicate()
        yield Tool(process, int(found[1]))
    finally:
        process.terminate()
        _, complaints = process.communicate()
    # Warnings too would be there.
    assert complaints == ""


@pytest.fixture(scope="module")
def tool() -> Iterator[Tool]:
    with running("proxy_server", "0") as running_tool:
        yield running_tool


@asynccontextmanager
async def server(*proxies: str) -> AsyncIterator[int]:
    """The proxy server in this process: its port."""
    async with proxy_server.upstream(*proxies) as pool, trio.open_nursery() as nursery:
        yield await nursery.start(proxy_server.serve, pool, 0)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def peer(serve: Serve) -> AsyncIterator[int]:
    """A server on loopback: its port."""

    async def attend(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await serve(stream)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, attend, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def receive_head(stream: trio.SocketStream) -> str:
    """To the empty line, and no byte more."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        received = await stream.receive_some(1)
        assert received, head
        head += received
    return head.decode()


async def receive_all(stream: trio.SocketStream) -> bytes:
    return b"".join([data async for data in stream])


async def count(stream: trio.SocketStream, most: int) -> int:
    """Receive as many bytes, unless there are less."""
    size = 0
    while size < most and (data := await stream.receive_some(min(MIB, most - size))):
        size += len(data)
    return size


async def send(stream: trio.SocketStream, size: int) -> None:
    for _ in range(size // MIB):
        await stream.send_all(PIECE)


async def ask(port: int, request: str) -> trio.SocketStream:
    stream = await trio.open_tcp_stream("localhost", port)
    await stream.send_all(request.replace("\n", "\r\n").encode())
    return stream


GET = "GET http://localhost:{port}/ HTTP/1.1\nHost: a\nConnection: close\n\n"
CONNECT = "CONNECT localhost:{port} HTTP/1.1\nHost: localhost:{port}\n\n"


@asynccontextmanager
async def asking(
    serve: Serve, request: str = GET, tool: Tool | None = None
) -> AsyncIterator[trio.SocketStream]:
    """Send a request to the proxy server, here or as a tool; `{port}` is where `serve` is played."""
    async with (
        peer(serve) as port,
        server() if tool is None else nullcontext(tool.port) as proxy,
        await ask(proxy, request.replace("{port}", str(port))) as stream,
    ):
        yield stream


@asynccontextmanager
async def tunnel(serve: Serve, tool: Tool | None = None) -> AsyncIterator[trio.SocketStream]:
    async with asking(serve, CONNECT, tool) as stream:
        assert (await receive_head(stream)).startswith("HTTP/1.1 200 ")
        yield stream


async def answer_of(serve: Serve, request: str = GET) -> str:
    async with asking(serve, request) as stream:
        return (await receive_all(stream)).decode()


async def answer_to(port: int, request: str) -> str:
    async with await ask(port, request) as stream:
        return (await receive_all(stream)).decode()


def replying(answer: bytes) -> Serve:
    """A server that answers one request so."""

    async def serve(stream: trio.SocketStream) -> None:
        await receive_head(stream)
        await stream.send_all(answer)

    return serve


# -- Much.


@needs_proc
async def test_a_tunnel_carries_a_gibibyte_down_in_flat_memory(tool: Tool) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await send(stream, 1024 * MIB)

    async with tunnel(serve, tool) as stream:
        assert await count(stream, 10 * MIB) == 10 * MIB
        with tool.stays_flat():
            assert await count(stream, 1024 * MIB) == 1014 * MIB


@needs_proc
async def test_a_tunnel_carries_64_mebibytes_up_in_flat_memory(tool: Tool) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"%d" % await count(stream, 1024 * MIB))

    async with tunnel(serve, tool) as stream:
        await send(stream, 10 * MIB)
        with tool.stays_flat():
            await send(stream, 54 * MIB)
            await stream.send_eof()
            assert await receive_all(stream) == b"%d" % (64 * MIB)


@needs_proc
@pytest.mark.parametrize("framing", ["Content-Length: 67108864", "Connection: close"])
async def test_a_large_response_is_forwarded_in_flat_memory(tool: Tool, framing: str) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await receive_head(stream)
        await stream.send_all(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode())
        await send(stream, 64 * MIB)

    # Without chunks, that a body may be counted.
    async with asking(serve, "GET http://localhost:{port}/ HTTP/1.0\n\n", tool) as stream:
        assert (await receive_head(stream)).startswith("HTTP/1.1 200 OK\r\n")
        assert await count(stream, 10 * MIB) == 10 * MIB
        with tool.stays_flat():
            assert await count(stream, 1024 * MIB) == 54 * MIB


@needs_proc
async def test_a_large_request_is_forwarded_in_flat_memory(tool: Tool) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        assert f"content-length: {64 * MIB}\r\n" in (await receive_head(stream)).lower()
        size = await count(stream, 64 * MIB)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n%d" % size)

    post = f"POST http://localhost:{{port}}/ HTTP/1.1\nHost: a\nContent-Length: {64 * MIB}\n\n"
    async with asking(serve, post, tool) as stream:
        await send(stream, 10 * MIB)
        with tool.stays_flat():
            await send(stream, 54 * MIB)
            await receive_head(stream)
            assert await stream.receive_some() == b"%d" % (64 * MIB)


async def test_who_does_not_read_is_not_sent_to() -> None:
    sent = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal sent
        await receive_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
        for _ in range(1024):
            await stream.send_all(PIECE)
            sent += 1

    async with asking(serve) as stream:
        await receive_head(stream)
        await trio.testing.wait_all_tasks_blocked(0.1)
        # That much the kernel's buffers take.
        assert sent < 64


# -- Half-closes.


async def test_a_tunnel_that_the_client_has_closed_still_carries_the_answer() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        question = await receive_all(stream)
        await stream.send_all(question + b"42")
        await stream.send_eof()

    async with tunnel(serve) as stream:
        await stream.send_all(b"6 * 7 = ")
        await stream.send_eof()
        assert await receive_all(stream) == b"6 * 7 = 42"


async def test_a_tunnel_that_the_server_has_closed_still_carries_what_the_client_sends() -> None:
    received = b""
    everything = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal received
        await stream.send_all(b"Leave a message.")
        await stream.send_eof()
        received = await receive_all(stream)
        everything.set()

    async with tunnel(serve) as stream:
        assert await receive_all(stream) == b"Leave a message."
        await stream.send_all(b"It's me.")
        await stream.send_eof()
        await everything.wait()
        assert received == b"It's me."


async def test_what_the_client_says_before_the_tunnel_is_there_goes_through_it() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(await receive_all(stream))

    async with asking(serve, CONNECT + "early") as stream:
        await stream.send_eof()
        assert (await receive_all(stream)).endswith(b"\r\n\r\nearly")


async def test_a_side_that_cannot_be_closed_half_way_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse() -> None:
        raise NotImplementedError

    near, left = trio.testing.memory_stream_pair()
    far, right = trio.testing.memory_stream_pair()
    monkeypatch.setattr(right.send_stream, "send_eof", refuse, raising=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay, left, right)
        await near.send_all(b"all there is")
        await near.send_eof()
        assert [bytes(data) async for data in far] == [b"all there is"]
        assert await near.receive_some() == b""


async def test_a_side_that_breaks_is_the_end_of_both() -> None:
    near, left = trio.testing.memory_stream_pair()
    far, right = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay, left, right)
        far.receive_stream.close()
        await near.send_all(b"for nobody")
        assert await near.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await far.send_all(b"from nobody")


# -- Forwarding.


async def tell_head(stream: trio.SocketStream) -> None:
    """Answer every request with its head."""
    async for data in stream:
        head = bytes(data).partition(b"\r\n\r\n")[0]
        content = b"" if head.startswith(b"HEAD") else head
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(head), content))


async def test_a_request_is_passed_on_without_what_is_for_this_hop() -> None:
    async with server() as proxy, peer(tell_head) as port:
        answer = await answer_to(
            proxy,
            f"GET http://localhost:{port}/a?b HTTP/1.1\n"
            "Host: elsewhere\nX-Kept: 1\nX-Dropped: 2\nConnection: close, x-dropped\nKeep-Alive: 5\n"
            "TE: trailers\nUpgrade: h2c\nProxy-Connection: close\n"
            "Proxy-Authorization: Basic eDp5\nVia: 1.0 before\n\n",
        )
    assert answer.partition("\r\n\r\n")[2] == (
        f"GET /a?b HTTP/1.1\r\nHost: localhost:{port}\r\nX-Kept: 1\r\nVia: 1.0 before\r\n"
        "Via: 1.1 trio-exchange"
    )


async def test_a_response_is_passed_on_without_what_is_for_this_hop() -> None:
    answer = await answer_of(
        replying(
            b"HTTP/1.1 404 Gone Fishing\r\nTransfer-Encoding: chunked\r\nX-Kept: 1\r\nX-Dropped: 2\r\n"
            b"Connection: x-dropped\r\nKeep-Alive: timeout=5\r\n\r\n3\r\nabc\r\n0\r\nTrailer: x\r\n\r\n"
        )
    )
    assert answer == (
        "HTTP/1.1 404 Gone Fishing\r\nX-Kept: 1\r\nVia: 1.1 trio-exchange\r\nTransfer-Encoding: chunked\r\n"
        "Connection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )


async def test_a_length_beside_chunks_is_not_passed_on() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        head = await receive_head(stream)
        assert await receive_head(stream) == "0\r\n\r\n"
        await stream.send_all(f"HTTP/1.1 200 OK\r\nContent-Length: {len(head)}\r\n\r\n{head}".encode())

    answer = await answer_of(
        serve,
        "POST http://localhost:{port}/ HTTP/1.1\nHost: a\nConnection: close\n"
        "Transfer-Encoding: chunked\nContent-Length: 4\n\n0\n\n",
    )
    assert "\r\nTransfer-Encoding: chunked\r\n" in answer
    assert answer.lower().count("content-length") == 1


async def test_the_client_is_told_to_continue_when_its_content_is_wanted() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        assert "expect: 100-continue\r\n" in (await receive_head(stream)).lower()
        await stream.send_all(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        assert await count(stream, 5) == 5
        await stream.send_all(b"HTTP/1.1 204 No Content\r\n\r\n")

    put = "PUT http://localhost:{port}/ HTTP/1.1\nHost: a\nContent-Length: 5\nExpect: 100-continue\n\n"
    async with asking(serve, put) as stream:
        assert (await receive_head(stream)).startswith("HTTP/1.1 103 \r\nLink: </a>\r\n")
        assert await receive_head(stream) == "HTTP/1.1 100 Continue\r\n\r\n"
        await stream.send_all(b"hello")
        assert (await receive_head(stream)).startswith("HTTP/1.1 204 No Content\r\n")


async def test_a_client_that_is_refused_early_gets_to_read_why() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await receive_head(stream)
        await stream.send_all(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
        await trio.sleep_forever()

    put = f"PUT http://localhost:{{port}}/ HTTP/1.1\nHost: a\nContent-Length: {64 * MIB}\n\n"
    async with asking(serve, put) as stream:
        await send(stream, 8 * MIB)
        assert (await receive_all(stream)).startswith(b"HTTP/1.1 413 Content Too Large\r\n")


async def test_a_client_keeps_its_connection_through_requests_and_refusals() -> None:
    answer = await answer_of(
        tell_head,
        "POST http://localhost:{port}/1 HTTP/1.1\nHost: a\nContent-Length: 0\n\n"
        "GET http://localhost:{port}/2 HTTP/1.1\nHost: a\n\n"
        "CONNECT nowhere HTTP/1.1\nHost: a\n\n"
        "HEAD http://localhost:{port}/3 HTTP/1.1\nHost: a\n\n"
        "OPTIONS http://localhost:{port} HTTP/1.1\nHost: a\nConnection: close\n\n",
    )
    assert re.findall(r"HTTP/1\.1 (\d+)", answer) == ["200", "200", "400", "200", "200"]
    assert re.findall(r"(?:GET|POST|HEAD|OPTIONS) (\S+) HTTP", answer) == ["/1", "/2", "*"]


@pytest.mark.parametrize("next_proxy", [_peers.proxy, _peers.https_proxy, _peers.socks_proxy])
async def test_proxies_behind_it_are_used(
    next_proxy: Callable[..., Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _peers.authority().cert_pem.tempfile() as ca_file:
        monkeypatch.setenv("SSL_CERT_FILE", ca_file)
        async with trio.open_nursery() as nursery:
            address = await nursery.start(next_proxy)
            site = await nursery.start(_peers.site)
            name = site.removeprefix("http://")
            async with server(address) as proxy:
                answer = await answer_to(proxy, f"GET {site}/ HTTP/1.1\nHost: a\nConnection: close\n\n")
                assert answer.endswith(f"Hello, {name}!\n")
                async with await ask(proxy, CONNECT.replace("localhost:{port}", name)) as stream:
                    assert (await receive_head(stream)).startswith("HTTP/1.1 200 ")
                    await stream.send_all(f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
                    assert (await receive_head(stream)).startswith("HTTP/1.1 200 OK")
            nursery.cancel_scope.cancel()


# -- Refusals.


@pytest.mark.parametrize(
    "request_head",
    [
        "nonsense\n\n",
        "GET / HTTP/1.1\nHost: localhost\n\n",
        "OPTIONS * HTTP/1.1\nHost: localhost\n\n",
        "GET localhost:80 HTTP/1.1\nHost: localhost\n\n",
        "GET http:///path HTTP/1.1\nHost: localhost\n\n",
        "GET http://user@localhost/ HTTP/1.1\nHost: localhost\n\n",
        "GET http://localhost:99999/ HTTP/1.1\nHost: localhost\n\n",
        "GET ftp://localhost/ HTTP/1.1\nHost: localhost\n\n",
        "CONNECT localhost HTTP/1.1\nHost: localhost\n\n",
        "CONNECT :80 HTTP/1.1\nHost: localhost\n\n",
        "CONNECT localhost:0 HTTP/1.1\nHost: localhost\n\n",
        "CONNECT localhost:http HTTP/1.1\nHost: localhost\n\n",
        "CONNECT http://localhost/ HTTP/1.1\nHost: localhost\n\n",
        "CONNECT localhost:80 HTTP/1.1\nHost: localhost\nContent-Length: 5\n\nhello",
    ],
)
async def test_nonsense_is_answered_with_400(request_head: str) -> None:
    async with server() as proxy, await ask(proxy, request_head) as stream:
        await stream.send_eof()
        assert (await receive_all(stream)).startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_a_body_that_is_nonsense_is_answered_with_400() -> None:
    chunked = "POST http://localhost:{port}/ HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\n\n"
    answer = await answer_of(listen_to_end, chunked + "nonsense\n")
    assert answer.startswith("HTTP/1.1 400 Bad Request\r\n")


async def listen_to_end(stream: trio.SocketStream) -> None:
    await receive_all(stream)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_a_server_without_an_answer_to_pass_on_is_a_502(answer: bytes) -> None:
    assert (await answer_of(replying(answer))).startswith("HTTP/1.1 502 Bad Gateway\r\n")


async def test_a_refused_head_request_gets_no_content() -> None:
    async with peer(tell_head) as port:
        pass
    async with server() as proxy:
        request = f"HEAD http://localhost:{port}/ HTTP/1.1\nHost: a\n\n"
        second = "GET / HTTP/1.1\nHost: a\nConnection: close\n\n"
        answer = await answer_to(proxy, request + second)
    assert re.findall(r"HTTP/1\.1 (\d+)", answer) == ["502", "400"]
    head, second_answer = answer.split("\r\n\r\n", 1)
    assert re.search(r"(?i)content-length: [1-9]", head)
    assert second_answer.startswith("HTTP/1.1 400 ")


@pytest.mark.parametrize("target", ["GET http://localhost:{}/", "CONNECT localhost:{}"])
async def test_a_server_that_is_not_there_is_a_502(target: str) -> None:
    async with peer(tell_head) as port:
        pass
    async with server() as proxy:
        request = f"{target.format(port)} HTTP/1.1\nHost: a\nConnection: close\n\n"
        assert (await answer_to(proxy, request)).startswith("HTTP/1.1 502 Bad Gateway\r\n")


async def test_a_server_that_is_silent_is_a_504(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(proxy_server.TIMEOUTS, "read", 0.01)
    assert (await answer_of(listen_to_end)).startswith("HTTP/1.1 504 Gateway Timeout\r\n")


async def test_half_an_answer_has_no_end() -> None:
    half = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    answer = await answer_of(replying(half), "GET http://localhost:{port}/ HTTP/1.1\nHost: a\n\n")
    assert answer.endswith("\r\n\r\n3\r\nabc\r\n")


async def test_clients_that_leave_do_no_harm() -> None:
    async with server() as proxy, peer(tell_head) as port:
        for request in (
            "",
            "GET",
            f"GET http://localhost:{port}/ HTTP/1.1\nHost: a\n\n",
            f"PUT http://localhost:{port}/ HTTP/1.1\nHost: a\nContent-Length: 5\n\nhel",
            f"CONNECT localhost:{port} HTTP/1.1\nHost: a\n\n",
        ):
            await (await ask(proxy, request)).aclose()
        assert (await answer_to(proxy, GET.replace("{port}", str(port)))).startswith("HTTP/1.1 200 OK\r\n")


# -- The port forwarder.


async def test_a_port_leads_to_a_far_host_through_proxies() -> None:
    async with trio.open_nursery() as nursery:
        target, *proxies = [
            await nursery.start(start) for start in (_peers.digest, _peers.socks_proxy, _peers.proxy)
        ]
        with running("port_forwarder", "0", target, *proxies) as forwarder:
            for _ in range(2):
                async with await trio.open_tcp_stream("localhost", forwarder.port) as stream:
                    await stream.send_eof()
                    assert (await receive_all(stream)).startswith(b"e3b0c44298fc1c149afbf4c8996fb924")
        nursery.cancel_scope.cancel()
