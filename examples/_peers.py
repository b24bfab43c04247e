"""The servers that the examples talk to, so that each of them runs offline.

Nothing here uses trio_exchange: these are small servers on Trio, h11 and wsproto, on loopback. A peer is
a function for `nursery.start`, which gives its address.
"""

from __future__ import annotations

import functools
import os
import ssl
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import sha256
from typing import Any, TypeAlias, TypeVar

import h11
import trio
import trustme
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import CloseConnection, Message
from wsproto.utilities import generate_accept_token

T = TypeVar("T")

STORY = [
    b"A nursery opened its doors one morning.\n",
    b"Three tasks came in, and each had a request to send.\n",
    b"One was cancelled half-way, and the others never noticed.\n",
    b"They brought their answers home.\n",
    b"Then the doors closed, and nothing was left behind.\n",
]
STORY_PAUSE = 0.012


def run(main: Callable[..., Awaitable[T]], *peers: Callable[..., Awaitable[None]]) -> T:
    """Run `main` with the addresses of the peers, and return what it returns."""

    async def with_peers() -> T:
        async with trio.open_nursery() as nursery:
            addresses = [await nursery.start(peer) for peer in peers]
            result = await main(*addresses)
            nursery.cancel_scope.cancel()
        return result

    with authority().cert_pem.tempfile() as ca_file:
        # The library's default TLS settings trust what this names, as if it were the system's store.
        os.environ["SSL_CERT_FILE"] = ca_file
        return trio.run(with_peers)


# -- The peers.


async def site(*, task_status: trio.TaskStatus[str]) -> None:
    """An http origin."""
    await _serve_tcp("http://localhost:{}", _site, None, task_status)


async def https_site(name: str = "localhost", *, task_status: trio.TaskStatus[str]) -> None:
    """The same with TLS, and a certificate for `name`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority().issue_cert(name).configure_cert(context)
    await _serve_tcp(f"https://{name}:{{}}", _site, context, task_status)


async def proxy(*, task_status: trio.TaskStatus[str]) -> None:
    """An http proxy that answers CONNECT."""
    await _serve_tcp("http://localhost:{}", _proxy, None, task_status)


async def websocket_echo(*, task_status: trio.TaskStatus[str]) -> None:
    """A WebSocket server that sends every message back."""
    await _serve_tcp("ws://localhost:{}", _echo, None, task_status)


async def mute(*, task_status: trio.TaskStatus[str]) -> None:
    """A server that accepts connections, but neither reads nor writes."""

    async def hold(stream: trio.abc.Stream) -> None:
        async with stream:
            await trio.sleep_forever()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(f"localhost:{listeners[0].socket.getsockname()[1]}")
    await trio.serve_listeners(hold, listeners)


async def unix_site(*, task_status: trio.TaskStatus[str]) -> None:
    """The http origin on a unix socket. Its address is the socket's path."""
    with tempfile.TemporaryDirectory() as folder, trio.socket.socket(trio.socket.AF_UNIX) as sock:
        path = os.path.join(folder, "site.sock")
        await sock.bind(path)
        sock.listen()
        task_status.started(path)
        await trio.serve_listeners(functools.partial(_serve, _site, None), [trio.SocketListener(sock)])


# -- What they answer.


async def _site(call: Call) -> None:
    match call.method, call.target.partition("?")[0]:
        case "OPTIONS", "*":
            await call.answer(status=204, headers={"Allow": "GET, HEAD, OPTIONS, PUT"})
        case "PUT" | "POST", _:
            content = await call.read()
            await call.answer(b"%d bytes, SHA-256 %b" % (len(content), sha256(content).hexdigest().encode()))
        case "GET", "/":
            await call.answer(b"Hello, " + call.headers["host"].encode() + b"!\n")
        case "GET", "/story":
            await trio.sleep(3 * STORY_PAUSE)
            await call.begin()
            for line in STORY:
                await trio.sleep(STORY_PAUSE)
                await call.send(h11.Data(data=line))
            await call.send(h11.EndOfMessage())
        case "GET", "/hints":
            hint = [("Link", "</style.css>; rel=preload; as=style")]
            await call.send(h11.InformationalResponse(status_code=103, headers=hint, reason=b"Early Hints"))
            await call.answer(b"<link rel=stylesheet href=/style.css>\n")
        case "GET", "/trailers":
            await call.begin({"Trailer": "Digest"})
            await call.send(h11.Data(data=b"".join(STORY)))
            digest = sha256(b"".join(STORY)).hexdigest()
            await call.send(h11.EndOfMessage(headers=[("Digest", f"sha-256={digest}")]))
        case "GET", "/silence":
            while await call.stream.receive_some():
                pass
        case _:
            await call.answer(b"There is no such page.\n", status=404)


async def _proxy(call: Call) -> None:
    if call.method != "CONNECT":
        await call.answer(b"This proxy only makes tunnels.\n", status=405)
        return
    host, _, port = call.target.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as onward, trio.open_nursery() as nursery:
        await call.begin()
        nursery.start_soon(_pump, call.stream, onward, nursery.cancel_scope)
        nursery.start_soon(_pump, onward, call.stream, nursery.cancel_scope)


async def _pump(source: trio.abc.Stream, sink: trio.abc.Stream, scope: trio.CancelScope) -> None:
    async for data in source:
        await sink.send_all(data)
    scope.cancel()


async def _echo(call: Call) -> None:
    if call.headers.get("upgrade", "").lower() != "websocket":
        await call.answer(
            b"This server speaks WebSocket only.\n", status=426, headers={"Upgrade": "websocket"}
        )
        return
    accept = generate_accept_token(call.headers["sec-websocket-key"].encode()).decode()
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Accept": accept}
    await call.send(
        h11.InformationalResponse(
            status_code=101, headers=list(headers.items()), reason=b"Switching Protocols"
        )
    )
    websocket = Connection(ConnectionType.SERVER)
    while websocket.state is not ConnectionState.CLOSED:
        websocket.receive_data(bytes(await call.stream.receive_some()) or None)
        for event in websocket.events():
            match event:
                case Message():
                    await call.stream.send_all(websocket.send(event))
                case CloseConnection() if websocket.state is ConnectionState.REMOTE_CLOSING:
                    await call.stream.send_all(websocket.send(event.response()))


# -- HTTP.


class Call:
    """A request, and the means to answer it."""

    def __init__(self, stream: trio.abc.Stream, wire: h11.Connection, request: h11.Request) -> None:
        self.stream = stream
        self.method = request.method.decode()
        self.target = request.target.decode()
        self.headers = {name.decode(): value.decode() for name, value in request.headers}
        self._wire = wire

    async def read(self) -> bytes:
        """The request's body."""
        chunks = []
        while isinstance(event := await _next_event(self.stream, self._wire), h11.Data):
            chunks.append(bytes(event.data))
        return b"".join(chunks)

    async def send(self, *events: h11.Event) -> None:
        await self.stream.send_all(b"".join(self._wire.send(event) or b"" for event in events))

    async def begin(self, headers: dict[str, str] | None = None) -> None:
        """Send the head of a response whose length is not known yet."""
        await self.send(_head(200, headers or {}))

    async def answer(
        self, content: bytes = b"", *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """Send a whole response."""
        length = {} if status == 204 else {"Content-Length": str(len(content))}
        head = _head(status, {**(headers or {}), **length})
        await self.send(head, h11.Data(data=content), h11.EndOfMessage())


def _head(status: int, headers: dict[str, str]) -> h11.Response:
    reason = {200: b"OK", 204: b"No Content", 404: b"Not Found", 405: b"Method Not Allowed"}
    return h11.Response(
        status_code=status,
        reason=reason.get(status, b""),
        headers=[("Content-Type", "text/plain"), *headers.items()],
    )


async def _serve_tcp(
    address: str,
    handler: Handler,
    tls: ssl.SSLContext | None,
    task_status: trio.TaskStatus[str],
) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(address.format(listeners[0].socket.getsockname()[1]))
    await trio.serve_listeners(functools.partial(_serve, handler, tls), listeners)


async def _serve(handler: Handler, tls: ssl.SSLContext | None, stream: trio.abc.Stream) -> None:
    if tls is not None:
        stream = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
    wire = h11.Connection(h11.SERVER)
    async with stream:
        # A client may leave at any time.
        with suppress(trio.BrokenResourceError):
            while isinstance(request := await _next_event(stream, wire), h11.Request):
                await handler(Call(stream, wire, request))
                if wire.our_state is not h11.DONE:
                    break
                while wire.their_state is not h11.DONE:
                    await _next_event(stream, wire)
                wire.start_next_cycle()


async def _next_event(stream: trio.abc.Stream, wire: h11.Connection) -> Any:
    while (event := wire.next_event()) is h11.NEED_DATA:
        wire.receive_data(bytes(await stream.receive_some()))
    return event


Handler: TypeAlias = Callable[[Call], Awaitable[None]]


@functools.cache
def authority() -> trustme.CA:
    """Who signs the certificate of every peer."""
    return trustme.CA()
