"""The servers that the examples talk to, so that each of them runs offline.

Nothing here uses trio_exchange: these are small servers on Trio, h11, h2 and wsproto, on loopback. A peer
is a function for `nursery.start`, which gives its address. All that speak HTTP speak HTTP/1.1 and HTTP/2.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import os
import ssl
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from hashlib import sha256
from typing import Any, TypeAlias, TypeVar

import h2.config
import h2.connection
import h2.events
import h11
import trio
from h2.settings import SettingCodes, Settings

from examples._needs import needed

with needed():
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

#: The port that the proxies don't connect to: mail is none of their business.
FORBIDDEN_PORT = 25


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
    await _serve_tcp(f"https://{name}:{{}}", _site, _tls(name), task_status)


async def proxy(*, task_status: trio.TaskStatus[str]) -> None:
    """An http proxy, which makes tunnels and forwards requests."""
    await _serve_tcp("http://localhost:{}", _proxy, None, task_status)


async def https_proxy(name: str = "localhost", *, task_status: trio.TaskStatus[str]) -> None:
    """The same with TLS, and a certificate for `name`."""
    await _serve_tcp(f"https://{name}:{{}}", _proxy, _tls(name), task_status)


async def socks_proxy(*, task_status: trio.TaskStatus[str]) -> None:
    """A SOCKS5 proxy, for anybody."""
    await _listen("socks5h://localhost:{}", _socks, task_status)


async def websocket_echo(*, task_status: trio.TaskStatus[str]) -> None:
    """A WebSocket server that sends every message back."""
    await _serve_tcp("ws://localhost:{}", _echo, None, task_status)


async def secure_websocket_echo(name: str = "localhost", *, task_status: trio.TaskStatus[str]) -> None:
    """The same with TLS, and a certificate for `name`."""
    await _serve_tcp(f"wss://{name}:{{}}", _echo, _tls(name), task_status)


async def mute(*, task_status: trio.TaskStatus[str]) -> None:
    """A server that accepts connections, but neither reads nor writes."""

    async def hold(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    await _listen("localhost:{}", hold, task_status)


async def digest(*, task_status: trio.TaskStatus[str]) -> None:
    """A server without HTTP: it reads to the end of what it is sent, and answers with the SHA-256 of it."""

    async def answer(stream: trio.SocketStream) -> None:
        checksum = sha256()
        async for data in stream:
            checksum.update(data)
        await stream.send_all(checksum.hexdigest().encode())

    await _listen("localhost:{}", answer, task_status)


async def unix_site(*, task_status: trio.TaskStatus[str]) -> None:
    """The http origin on a unix socket. Its address is the socket's path."""
    with tempfile.TemporaryDirectory() as folder, trio.socket.socket(trio.socket.AF_UNIX) as sock:
        path = os.path.join(folder, "site.sock")
        await sock.bind(path)
        sock.listen()
        task_status.started(path)
        serve = functools.partial(_serve, _site, None)
        await trio.serve_listeners(functools.partial(_attend, serve), [trio.SocketListener(sock)])


# -- What they answer.


async def _site(call: Call) -> None:
    match call.method, call.target.partition("?")[0]:
        case "OPTIONS", "*":
            await call.answer(status=204, headers={"Allow": "GET, HEAD, OPTIONS, PUT"})
        case "POST", "/echo":
            # Each piece is answered as soon as it has come.
            await call.begin()
            while piece := await call.receive():
                await call.send(piece)
            await call.end({"Status": "ok"})
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
                await call.send(line)
            await call.end()
        case "GET", "/hints":
            await call.inform(103, {"Link": "</style.css>; rel=preload; as=style"})
            await call.answer(b"<link rel=stylesheet href=/style.css>\n")
        case "GET", "/trailers":
            await call.begin(headers={"Trailer": "Digest"})
            await call.send(b"".join(STORY))
            await call.end({"Digest": f"sha-256={sha256(b''.join(STORY)).hexdigest()}"})
        case "GET", "/silence":
            await call.client_left()
        case _:
            await call.answer(b"There is no such page.\n", status=404)


async def _proxy(call: Call) -> None:
    host, _, port = call.headers["host"].partition(":")
    if port == str(FORBIDDEN_PORT):
        await call.answer(b"This proxy carries no mail.\n", status=403)
        return
    try:
        onward = await trio.open_tcp_stream(host, int(port or 80))
    except OSError:
        await call.answer(b"The origin can't be reached.\n", status=502)
        return
    async with onward:
        await (_tunnel if call.method == "CONNECT" else _forward)(call, onward)


async def _tunnel(call: Call, onward: trio.SocketStream) -> None:
    await call.begin()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_pump, call.receive, onward.send_all, onward.send_eof, nursery.cancel_scope)
        nursery.start_soon(_pump, onward.receive_some, call.send, call.end, nursery.cancel_scope)


async def _pump(
    receive: Callable[[], Awaitable[bytes | bytearray]],
    send: Callable[[bytes], Awaitable[None]],
    end: Callable[[], Awaitable[None]],
    scope: trio.CancelScope,
) -> None:
    """Carry one direction of a tunnel. The other may go on, but for a stream that broke or was closed."""
    try:
        while data := bytes(await receive()):
            await send(data)
        await end()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        scope.cancel()


async def _forward(call: Call, onward: trio.SocketStream) -> None:
    headers = _onward((name, value) for name, value in call.headers.items() if not name.startswith(":"))
    if content := await call.read():
        headers["content-length"] = str(len(content))
    # Over HTTP/1.1 the target names the origin once more (RFC 9112, 3.2.2).
    target = call.target.removeprefix(f"http://{call.headers['host']}") or "/"
    wire = h11.Connection(h11.CLIENT)
    request = h11.Request(
        method=call.method, target=target, headers=[*headers.items(), ("connection", "close")]
    )
    for event in (request, h11.Data(data=content), h11.EndOfMessage()):
        await onward.send_all(wire.send(event) or b"")
    response = await _next_event(onward, wire)
    headers = _onward((name.decode(), value.decode()) for name, value in response.headers)
    await call.begin(response.status_code, {**headers, "via": "1.1 localhost"})
    while isinstance(event := await _next_event(onward, wire), h11.Data):
        await call.send(bytes(event.data))
    await call.end()


def _onward(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers without those that are for the next hop only (RFC 9110, 7.6.1)."""
    hop_by_hop = {"connection", "keep-alive", "proxy-authorization", "te", "transfer-encoding", "upgrade"}
    return {name: value for name, value in headers if name not in hop_by_hop}


async def _socks(stream: trio.SocketStream) -> None:
    """SOCKS5 (RFC 1928) for those who speak it well."""
    _, methods = await _exactly(stream, 2)
    await _exactly(stream, methods)
    await stream.send_all(b"\5\0")
    *_, kind = await _exactly(stream, 4)
    if kind == 3:
        (length,) = await _exactly(stream, 1)
        host = (await _exactly(stream, length)).decode()
    else:
        host = str(ipaddress.ip_address(await _exactly(stream, {1: 4, 4: 16}[kind])))
    port = int.from_bytes(await _exactly(stream, 2), "big")
    # What the code of the reply means: RFC 1928, 6.
    if port == FORBIDDEN_PORT:
        await stream.send_all(_socks_reply(2))
        return
    try:
        onward = await trio.open_tcp_stream(host, port)
    except OSError:
        await stream.send_all(_socks_reply(4))
        return
    async with onward, trio.open_nursery() as nursery:
        await stream.send_all(_socks_reply(0))
        scope = nursery.cancel_scope
        nursery.start_soon(_pump, stream.receive_some, onward.send_all, onward.send_eof, scope)
        nursery.start_soon(_pump, onward.receive_some, stream.send_all, stream.send_eof, scope)


def _socks_reply(code: int) -> bytes:
    return bytes((5, code, 0, 1)) + bytes(6)


async def _exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        received = await stream.receive_some(size - len(data))
        if not received:
            raise trio.BrokenResourceError("the client left")
        data += received
    return data


async def _echo(call: Call) -> None:
    if call.protocol == "websocket":
        await call.begin()
    elif call.headers.get("upgrade", "").lower() == "websocket":
        accept = generate_accept_token(call.headers["sec-websocket-key"].encode()).decode()
        headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Accept": accept}
        await call.inform(101, headers)
    else:
        await call.answer(
            b"This server speaks WebSocket only.\n", status=426, headers={"Upgrade": "websocket"}
        )
        return
    websocket = Connection(ConnectionType.SERVER)
    while websocket.state is not ConnectionState.CLOSED:
        websocket.receive_data(await call.receive() or None)
        for event in websocket.events():
            match event:
                case Message():
                    await call.send(websocket.send(event))
                case CloseConnection() if websocket.state is ConnectionState.REMOTE_CLOSING:
                    await call.send(websocket.send(event.response()))


# -- HTTP.


class Call(ABC):
    """A request, and the means to answer it.

    Attributes:
        method: Of the request, as are the following.
        target: Its path and query, `*`, or an authority.
        headers: By their names in lower case.
        protocol: What an extended CONNECT asks for (RFC 8441).
    """

    method: str
    target: str
    headers: dict[str, str]
    protocol: str | None = None

    async def read(self) -> bytes:
        """The request's body."""
        chunks = []
        while chunk := await self.receive():
            chunks.append(chunk)
        return b"".join(chunks)

    async def answer(
        self, content: bytes = b"", *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """Send a whole response."""
        length = {} if status == 204 else {"Content-Length": str(len(content))}
        await self.begin(status, {**(headers or {}), **length})
        await self.send(content)
        await self.end()

    @abstractmethod
    async def receive(self) -> bytes:
        """A piece of the request's body, or of what a tunnel carries; none for its end."""

    @abstractmethod
    async def client_left(self) -> None:
        """Wait until the client wants no answer any more."""

    @abstractmethod
    async def inform(self, status: int, headers: dict[str, str]) -> None:
        """Send an informational response."""

    @abstractmethod
    async def begin(self, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send the head of a response."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send a piece of its body, or of what a tunnel carries."""

    @abstractmethod
    async def end(self, trailers: dict[str, str] | None = None) -> None:
        """Send its end."""


async def _serve_tcp(
    address: str,
    handler: Handler,
    tls: ssl.SSLContext | None,
    task_status: trio.TaskStatus[str],
) -> None:
    await _listen(address, functools.partial(_serve, handler, tls), task_status)


async def _listen(
    address: str,
    serve: Callable[[trio.SocketStream], Awaitable[None]],
    task_status: trio.TaskStatus[str],
) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(address.format(listeners[0].socket.getsockname()[1]))
    await trio.serve_listeners(functools.partial(_attend, serve), listeners)


async def _attend(serve: Callable[[trio.SocketStream], Awaitable[None]], stream: trio.SocketStream) -> None:
    # A client may leave at any time.
    with suppress(trio.BrokenResourceError):
        async with stream:
            await serve(stream)


async def _serve(handler: Handler, tls: ssl.SSLContext | None, stream: trio.abc.Stream) -> None:
    if tls is not None:
        stream = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
    first = bytes(await stream.receive_some())
    # With TLS or without, who speaks HTTP/2 begins by saying so (RFC 9113, 3.4).
    if first.startswith(b"PRI "):
        await HTTP2Server(stream, handler).run(first)
    else:
        await _serve_http1(stream, handler, first)


Handler: TypeAlias = Callable[[Call], Awaitable[None]]


# -- HTTP/1.1.


async def _serve_http1(stream: trio.abc.Stream, handler: Handler, first: bytes) -> None:
    wire = h11.Connection(h11.SERVER)
    wire.receive_data(first)
    while isinstance(request := await _next_event(stream, wire), h11.Request):
        await handler(HTTP1Call(stream, wire, request))
        if wire.our_state is not h11.DONE:
            break
        while wire.their_state is not h11.DONE:
            await _next_event(stream, wire)
        wire.start_next_cycle()


async def _next_event(stream: trio.abc.Stream, wire: h11.Connection) -> Any:
    while (event := wire.next_event()) is h11.NEED_DATA:
        wire.receive_data(bytes(await stream.receive_some()))
    return event


class HTTP1Call(Call):
    def __init__(self, stream: trio.abc.Stream, wire: h11.Connection, request: h11.Request) -> None:
        self.method = request.method.decode()
        self.target = request.target.decode()
        self.headers = {name.decode(): value.decode() for name, value in request.headers}
        self._stream = stream
        self._wire = wire
        self._is_tunnel = False

    async def receive(self) -> bytes:
        if self._is_tunnel:
            return bytes(await self._stream.receive_some())
        event = await _next_event(self._stream, self._wire)
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def client_left(self) -> None:
        while await self._stream.receive_some():
            pass

    async def inform(self, status: int, headers: dict[str, str]) -> None:
        await self._send_head(h11.InformationalResponse, status, headers)
        self._is_tunnel = status == 101

    async def begin(self, status: int = 200, headers: dict[str, str] | None = None) -> None:
        await self._send_head(h11.Response, status, {"Content-Type": "text/plain", **(headers or {})})
        self._is_tunnel = self.method == "CONNECT" and status == 200

    async def send(self, data: bytes) -> None:
        if self._is_tunnel:
            await self._stream.send_all(data)
        else:
            await self._send(h11.Data(data=data))

    async def end(self, trailers: dict[str, str] | None = None) -> None:
        if not self._is_tunnel:
            await self._send(h11.EndOfMessage(headers=list((trailers or {}).items())))
        elif isinstance(self._stream, trio.SocketStream):
            await self._stream.send_eof()
        else:
            await self._stream.aclose()

    async def _send_head(self, kind: Any, status: int, headers: dict[str, str]) -> None:
        reason = _REASONS.get(status, b"")
        await self._send(kind(status_code=status, headers=list(headers.items()), reason=reason))

    async def _send(self, event: h11.Event) -> None:
        await self._stream.send_all(self._wire.send(event) or b"")


_REASONS = {
    101: b"Switching Protocols",
    103: b"Early Hints",
    200: b"OK",
    204: b"No Content",
    403: b"Forbidden",
    404: b"Not Found",
    426: b"Upgrade Required",
    502: b"Bad Gateway",
}


# -- HTTP/2.


class HTTP2Server:
    """A connection: a task reads from it, another writes to it, and each call has one of its own.

    All of them change `wire` in steps that nothing can interrupt, so that no frame is ever torn.
    """

    def __init__(self, stream: trio.abc.Stream, handler: Handler) -> None:
        self.wire = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        )
        self.wire.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: 100,
                SettingCodes.ENABLE_CONNECT_PROTOCOL: 1,
            },
        )
        self.windows = trio.lowlevel.ParkingLot()
        self._stream = stream
        self._handler = handler
        self._calls: dict[int, HTTP2Call] = {}
        self._something_to_send = trio.Event()

    async def run(self, first: bytes) -> None:
        self.wire.initiate_connection()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            with suppress(trio.BrokenResourceError):
                data = first
                while data and self._take(data, nursery):
                    data = bytes(await self._stream.receive_some())
            nursery.cancel_scope.cancel()

    def flush(self) -> None:
        self._something_to_send.set()

    async def _write(self) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await self._something_to_send.wait()
                self._something_to_send = trio.Event()
                await self._stream.send_all(self.wire.data_to_send())

    def _take(self, data: bytes, nursery: trio.Nursery) -> bool:
        """Let the calls know what has come. False if the client says good-bye."""
        for event in self.wire.receive_data(data):
            match event:
                case h2.events.RequestReceived():
                    call = self._calls[event.stream_id] = HTTP2Call(self, event.stream_id, event.headers)
                    nursery.start_soon(self._answer, call)
                case h2.events.DataReceived(stream_id=stream_id):
                    self.wire.acknowledge_received_data(event.flow_controlled_length, stream_id)
                    if stream_id in self._calls:
                        self._calls[stream_id].inbox.send_nowait(event.data)
                case h2.events.StreamEnded(stream_id=stream_id) if stream_id in self._calls:
                    self._calls[stream_id].inbox.close()
                case h2.events.StreamReset(stream_id=stream_id) if stream_id in self._calls:
                    self._calls[stream_id].scope.cancel()
                case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                    self.windows.unpark_all()
                case h2.events.ConnectionTerminated():
                    return False
        self.flush()
        return True

    async def _answer(self, call: HTTP2Call) -> None:
        with call.scope:
            await self._handler(call)
            await call.end()
        del self._calls[call.stream_id]


class HTTP2Call(Call):
    def __init__(self, server: HTTP2Server, stream_id: int, headers: Any) -> None:
        self.headers = dict(headers)
        self.headers["host"] = self.headers.pop(":authority")
        self.method = self.headers.pop(":method")
        self.target = self.headers.pop(":path", self.headers["host"])
        self.protocol = self.headers.pop(":protocol", None)
        self.stream_id = stream_id
        self.scope = trio.CancelScope()
        self.inbox, self._content = trio.open_memory_channel[bytes](math.inf)
        self._server = server
        self._ended = False

    async def receive(self) -> bytes:
        try:
            return await self._content.receive()
        except trio.EndOfChannel:
            return b""

    async def client_left(self) -> None:
        await trio.sleep_forever()

    async def inform(self, status: int, headers: dict[str, str]) -> None:
        await self._send_headers({":status": str(status), **headers})

    async def begin(self, status: int = 200, headers: dict[str, str] | None = None) -> None:
        await self._send_headers({":status": str(status), "content-type": "text/plain", **(headers or {})})

    async def send(self, data: bytes) -> None:
        wire = self._server.wire
        while data:
            await trio.lowlevel.checkpoint()
            size = min(
                len(data), wire.local_flow_control_window(self.stream_id), wire.max_outbound_frame_size
            )
            if size > 0:
                wire.send_data(self.stream_id, data[:size])
                self._server.flush()
                data = data[size:]
            else:
                await self._server.windows.park()

    async def end(self, trailers: dict[str, str] | None = None) -> None:
        if self._ended:
            return
        if trailers:
            await self._send_headers(trailers, end_stream=True)
        else:
            await trio.lowlevel.checkpoint()
            self._server.wire.end_stream(self.stream_id)
            self._server.flush()
        # Not before, lest a call that is cancelled here is never ended.
        self._ended = True

    async def _send_headers(self, headers: dict[str, str], *, end_stream: bool = False) -> None:
        # The stream may have been reset, and then this is where the call is cancelled.
        await trio.lowlevel.checkpoint()
        block = [(name.lower(), value) for name, value in headers.items()]
        self._server.wire.send_headers(self.stream_id, block, end_stream=end_stream)
        self._server.flush()


# -- TLS.


@functools.cache
def authority() -> trustme.CA:
    """Who signs the certificate of every peer."""
    return trustme.CA()


def _tls(name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["h2", "http/1.1"])
    authority().issue_cert(name).configure_cert(context)
    return context
