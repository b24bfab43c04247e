"""A proxy server: it makes tunnels and forwards requests, itself through other proxies if it has to.

Without arguments it shows itself at work; with them it is at work until it is interrupted:

    python -m examples.proxy_server 8080 https://user:password@proxy.example.com

What a proxy for everybody needs besides: authentication, rules about who may go where, time limits for
clients, and Max-Forwards.

This example needs socksio, trustme and wsproto: pip install socksio trustme wsproto
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import h11
import trio

from examples import _peers
from examples._needs import needed
from examples.port_forwarder import relay
from trio_exchange import (
    URL,
    ConnectionPool,
    ExchangeError,
    LocalProtocolError,
    Proxy,
    ProxyError,
    TimeoutException,
    UnsupportedProtocol,
)

with needed():
    # The pool imports it when a proxy speaks SOCKS.
    import socksio  # noqa: F401

Headers = list[tuple[bytes, bytes]]

#: Of the servers that requests are forwarded to; a tunnel may be silent as long as it likes.
TIMEOUTS = {"connect": 30.0, "read": 60.0, "write": 60.0}

#: RFC 9110, 7.6.1 and 11.7; Proxy-Connection never was in one; and Trailer, as trailers are left out.
HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authentication-info",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}


def end_to_end(headers: Headers, version: bytes) -> Headers:
    """The headers of a message that are passed on, and the one that says which way it came."""
    dropped = HOP_BY_HOP | set(items(headers, b"connection"))
    if items(headers, b"transfer-encoding"):
        # It went first (RFC 9112, 6.3), and is made anew: a length beside it must mislead nobody.
        dropped.add(b"content-length")
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return [*kept, (b"Via", version + b" trio-exchange")]


def items(headers: Headers, wanted: bytes) -> list[bytes]:
    """What a header lists, in lower case."""
    lists = [value.lower().split(b",") for name, value in headers if name.lower() == wanted]
    return [item.strip() for values in lists for item in values]


def url_of(request: h11.Request) -> URL:
    """Where a request is to be forwarded."""
    try:
        url = URL(request.target)
    except ValueError as exc:
        raise Refusal(400, str(exc)) from exc
    if not url.host:
        raise Refusal(400, "a proxy needs to be told the whole URL")
    if request.method == b"OPTIONS" and url.target == b"/" and not request.target.endswith(b"/"):
        # It asks about the server as a whole (RFC 9112, 3.2.4).
        return URL(scheme=url.scheme, host=url.host, port=url.port, target="*")
    return url


class Refusal(Exception):
    """What a client is told instead of what it asked for."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Client:
    """A client's connection."""

    def __init__(self, pool: ConnectionPool, stream: trio.SocketStream) -> None:
        self._pool = pool
        self._stream = stream
        self._wire = h11.Connection(h11.SERVER)
        # The task that uploads a request's body sends `100 (Continue)`.
        self._sending = trio.Lock()

    async def serve(self) -> None:
        """Answer one request after the other."""
        try:
            while isinstance(request := await self._next_event(), h11.Request):
                await self._answer(request)
                if self._wire.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
                    break
                self._wire.start_next_cycle()
        except h11.RemoteProtocolError as exc:
            await self._refuse(exc.error_status_hint, str(exc))
        await self._hang_up()

    async def _answer(self, request: h11.Request) -> None:
        try:
            if request.method == b"CONNECT":
                await self._tunnel(request)
            else:
                await self._forward(request)
        except Refusal as exc:
            await self._refuse(exc.status, str(exc), request.method)
        except (LocalProtocolError, UnsupportedProtocol) as exc:
            await self._refuse(400, str(exc), request.method)
        except TimeoutException as exc:
            await self._refuse(504, str(exc), request.method)
        except (ExchangeError, h11.LocalProtocolError) as exc:
            # There is no answer, or none that can be passed on.
            await self._refuse(502, str(exc), request.method)

    async def _tunnel(self, request: h11.Request) -> None:
        if not isinstance(self._wire.next_event(), h11.EndOfMessage):
            raise Refusal(400, "CONNECT has no content")
        host, _, port = request.target.rpartition(b":")
        extensions = {"timeout": {"connect": TIMEOUTS["connect"]}}
        try:
            onward = await self._pool.open_tcp_stream(host, int(port), extensions=extensions)
        except ValueError as exc:
            raise Refusal(400, f"CONNECT needs a host and a port: {exc}") from exc
        async with onward:
            await self._send(h11.Response(status_code=200, headers=[], reason=b"Connection established"))
            # The client may have begun to speak without waiting for the answer.
            early, _ = self._wire.trailing_data
            await onward.send_all(early)
            await relay(self._stream, onward)

    async def _forward(self, request: h11.Request) -> None:
        async with self._pool.stream(
            request.method,
            url_of(request),
            headers=[
                # The target counts, whatever Host says (RFC 9112, 3.2.2).
                (name, value)
                for name, value in end_to_end(request.headers.raw_items(), request.http_version)
                if name.lower() != b"host"
            ],
            content=await self._content_of(request),
            extensions={"timeout": TIMEOUTS, "informational": self._inform},
        ) as response:
            if response.status == 407:
                raise Refusal(502, "the proxy behind this one wants credentials")
            head = h11.Response(
                status_code=response.status,
                headers=end_to_end(
                    response.headers, response.extensions["http_version"].removeprefix(b"HTTP/")
                ),
                reason=response.extensions.get("reason_phrase", b""),
            )
            await self._send(head)
            async for chunk in response.aiter_stream():
                await self._send(h11.Data(data=chunk))
            await self._send(h11.EndOfMessage())

    async def _content_of(self, request: h11.Request) -> AsyncIterator[bytes] | None:
        headers = request.headers.raw_items()
        if items(headers, b"transfer-encoding") or items(headers, b"content-length"):
            return self._content(self._wire.they_are_waiting_for_100_continue)
        await self._next_event()
        return None

    async def _content(self, awaits_continue: bool) -> AsyncIterator[bytes]:
        """The body of the client's request, received no faster than it is passed on."""
        if awaits_continue:
            await self._send_continue()
        while isinstance(event := await self._next_event(), h11.Data):
            yield bytes(event.data)

    async def _send_continue(self) -> None:
        async with self._sending:
            # The answer may have come meanwhile.
            if self._wire.our_state is h11.SEND_RESPONSE:
                go_ahead = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                await self._stream.send_all(self._wire.send(go_ahead) or b"")

    async def _inform(self, status: int, headers: Headers) -> None:
        """Pass on an informational response; `100 (Continue)` is sent when the body is asked for."""
        if status != 100 and self._wire.their_http_version != b"1.0":
            onward = end_to_end(headers, b"1.1")
            await self._send(h11.InformationalResponse(status_code=status, headers=onward))

    async def _refuse(self, status: int, reason: str, method: bytes = b"") -> None:
        if self._wire.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # It has got half of another answer, whose missing end says enough.
            return
        content = f"{reason}\n".encode(errors="replace")
        headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(content)))]
        phrase = HTTPStatus(status).phrase.encode()
        await self._send(h11.Response(status_code=status, headers=headers, reason=phrase))
        if method != b"HEAD":
            await self._send(h11.Data(data=content))
        await self._send(h11.EndOfMessage())

    async def _hang_up(self) -> None:
        """Close the connection so that the answer is not lost with it (RFC 9112, 9.6)."""
        with suppress(trio.ClosedResourceError), trio.move_on_after(2):
            await self._stream.send_eof()
            async for _ in self._stream:
                pass

    async def _next_event(self) -> Any:
        while (event := self._wire.next_event()) is h11.NEED_DATA:
            self._wire.receive_data(bytes(await self._stream.receive_some()))
        return event

    async def _send(self, event: h11.Event) -> None:
        async with self._sending:
            await self._stream.send_all(self._wire.send(event) or b"")


async def serve(
    pool: ConnectionPool, port: int, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """Listen on a port of the loopback interface, and answer with what the pool can reach."""

    async def serve_client(stream: trio.SocketStream) -> None:
        # A client may leave at any time.
        with suppress(trio.BrokenResourceError):
            await Client(pool, stream).serve()

    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(serve_client, listeners)


def upstream(*proxies: str) -> ConnectionPool:
    """A pool for a server: as many connections as its clients want, as long as they are in use."""
    return ConnectionPool(
        proxy=[Proxy(url) for url in proxies],
        max_connections=None,
        max_keepalive_connections=100,
        keepalive_expiry=30.0,
    )


async def main(port: int, *proxies: str) -> None:
    async with upstream(*proxies) as pool, trio.open_nursery() as nursery:
        port = await nursery.start(serve, pool, port)
        print(f"http://localhost:{port} is a proxy", flush=True)


async def demonstrate(next_proxy: str, http_url: str, https_url: str) -> None:
    forbidden = f"localhost:{_peers.FORBIDDEN_PORT}"
    async with upstream(next_proxy) as pool, trio.open_nursery() as nursery:
        port = await nursery.start(serve, pool, 0)
        async with ConnectionPool(proxy=Proxy(f"http://localhost:{port}")) as client:
            for url in (http_url, https_url, f"http://{forbidden}/"):
                response = await client.request("GET", url)
                print(f"{url}: {response.status} {response.content.decode()}", end="")
                for value in [value for name, value in response.headers if name == b"Via"]:
                    print(f"Via: {value.decode()}")
            try:
                await client.request("GET", f"https://{forbidden}/")
            except ProxyError as exc:
                print(exc)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            _peers.run(demonstrate, _peers.socks_proxy, _peers.site, _peers.https_site)
        case [listen, *proxies]:
            trio.run(main, int(listen), *proxies)
