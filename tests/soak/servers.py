"""The servers of the soak: origins that follow the plans of the requests, and proxies."""

from __future__ import annotations

import functools
import itertools
import random
import socket
import ssl
import struct
import traceback
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import h2.events
import h2.exceptions
import h2.windows
import h11
import trio
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from examples import _peers

from .plans import Fault, Plan, content, make_plan, pieces

# What a server may meet since its client leaves as it likes.
# What h2 finds wrong in what it receives is reported before.
_CLIENT_LEFT = (
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    h2.exceptions.ProtocolError,
)
_FORGET_AFTER = 1000
_LONGEST_SILENCE = 1.0
_STALE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstale"
# What fits into a record of TLS, and into a segment on loopback.
_ARRIVES_AT_ONCE = 15_000
# Small, so that senders have to wait.
_RECEIVE_BUFFER = 64 * 1024

Report = Callable[[str], None]


class Cut(Exception):
    """The answer goes no further.

    Attributes:
        how: `stream` for a reset of the stream, `close` and `reset` for the connection.
        code: Of the reset of a stream.
    """

    def __init__(self, how: str, code: ErrorCodes = ErrorCodes.INTERNAL_ERROR) -> None:
        super().__init__(how)
        self.how = how
        self.code = code


class BadClient(Exception):
    """The client has broken HTTP."""


class _Windows(h2.windows.WindowManager):
    """A window that may be below zero, and still takes frames of no data (RFC 9113, 6.9), unlike h2's."""

    def window_consumed(self, size: int) -> None:
        if size:
            super().window_consumed(size)


class HTTP2Server(_peers.HTTP2Server):
    """A connection that may change its settings all the time, and end in many ways."""

    def __init__(
        self, stream: trio.abc.Stream, handler: _peers.Handler, moods: random.Random | None, report: Report
    ) -> None:
        super().__init__(stream, handler)
        self.ending = trio.CancelScope()
        self.reset = False
        self._moods = moods
        self._report = report
        # Streams above this are not served (RFC 9113, 6.8).
        self._last_stream_id = 2**31 - 1
        # The first are in the preface.
        self._settings_sent = 1
        self._settings_known = 0

    async def run(self, first: bytes) -> None:
        with self.ending:
            async with trio.open_nursery() as nursery:
                if self._moods is not None:
                    nursery.start_soon(self._change_settings, self._moods)
                await super().run(first)
                nursery.cancel_scope.cancel()

    def end(self, *, reset: bool) -> None:
        """End the connection as it is."""
        self.reset = reset
        self.ending.cancel()

    def _raw(self, data: bytes) -> None:
        # h2 has only one place where bytes wait to be sent, and nothing may overtake them.
        self.wire._data_to_send += data
        self.flush()

    def go_away(self, last_stream_id: int) -> None:
        """Send GOAWAY, and serve no stream above `last_stream_id`."""
        self._last_stream_id = min(self._last_stream_id, last_stream_id)
        self._raw(GoAwayFrame(0, last_stream_id=self._last_stream_id).serialize())

    def babble(self) -> None:
        """Send what is no HTTP/2."""
        self._raw(b"\x00\x00\x01\x00\x00\x7f\xff\xff\xffx")

    async def _change_settings(self, moods: random.Random) -> None:
        """Limits go down, to nothing even, and up again soon."""
        odd: tuple[tuple[SettingCodes | int, tuple[int, ...]], ...] = (
            (SettingCodes.MAX_CONCURRENT_STREAMS, (0, 1, 2, 5)),
            (SettingCodes.INITIAL_WINDOW_SIZE, (0, 1, 100, 5000)),
            (SettingCodes.HEADER_TABLE_SIZE, (0, 100)),
        )
        usual: dict[SettingCodes | int, int] = {
            SettingCodes.MAX_CONCURRENT_STREAMS: 100,
            SettingCodes.INITIAL_WINDOW_SIZE: 65535,
            SettingCodes.HEADER_TABLE_SIZE: 4096,
        }
        while True:
            await trio.sleep(moods.uniform(0.02, 0.3))
            chosen = moods.sample(odd, moods.randint(1, 2))
            await self._settle({code: moods.choice(values) for code, values in chosen})
            await trio.sleep(moods.uniform(0, 0.05))
            await self._settle(usual)

    async def _settle(self, settings: dict[SettingCodes | int, int]) -> None:
        """Change settings when the client has taken note of the last: h2 counts on one change at a time."""
        while self._settings_known < self._settings_sent:
            await self.windows.park()
        self.wire.update_settings(settings)
        self.flush()
        self._settings_sent += 1

    def _take(self, data: bytes, nursery: trio.Nursery) -> bool:
        try:
            events = self.wire.receive_data(data)
        except h2.exceptions.ProtocolError as exc:
            self._report(f"a client broke HTTP/2: {exc!r}")
            return False
        goes_on = True
        for event in events:
            match event:
                case h2.events.RequestReceived():
                    call = self._calls[event.stream_id] = _peers.HTTP2Call(
                        self, event.stream_id, event.headers
                    )
                    self._use_windows(event.stream_id)
                    nursery.start_soon(self._answer, call)
                case h2.events.DataReceived(stream_id=stream_id, flow_controlled_length=size):
                    self._take_data(stream_id, event.data, size)
                case h2.events.StreamEnded(stream_id=stream_id) if stream_id in self._calls:
                    self._calls[stream_id].inbox.close()
                case h2.events.StreamReset(stream_id=stream_id) if stream_id in self._calls:
                    self._calls[stream_id].scope.cancel()
                case h2.events.SettingsAcknowledged():
                    self._settings_known += 1
                    self.windows.unpark_all()
                case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                    self.windows.unpark_all()
                case h2.events.ConnectionTerminated():
                    goes_on = False
        self.flush()
        return goes_on

    def _use_windows(self, stream_id: int) -> None:
        stream = self.wire.streams.get(stream_id)
        if stream is not None:
            stream._inbound_window_manager.__class__ = _Windows

    def _take_data(self, stream_id: int, data: bytes, size: int) -> None:
        call = self._calls.get(stream_id)
        if call is not None and call.headers.get("x-deaf"):
            # It is not read, but this is no concern of the others.
            self.wire.increment_flow_control_window(size)
            return
        self.wire.acknowledge_received_data(size, stream_id)
        if call is not None:
            call.inbox.send_nowait(data)

    async def _answer(self, call: _peers.HTTP2Call) -> None:
        try:
            with call.scope:
                if call.stream_id <= self._last_stream_id:
                    await self._handler(call)
                    await call.end()
        except Cut as cut:
            if cut.how == "stream":
                self._reset_stream(call.stream_id, cut.code)
            else:
                self.end(reset=cut.how == "reset")
        except Exception as exc:
            check_client_left(exc)
            self._reset_stream(call.stream_id, ErrorCodes.CONNECT_ERROR)
        finally:
            del self._calls[call.stream_id]

    def _reset_stream(self, stream_id: int, code: ErrorCodes) -> None:
        try:
            self.wire.reset_stream(stream_id, code)
        except h2.exceptions.ProtocolError:
            return
        self.flush()


def check_client_left(exc: BaseException) -> None:
    """Raise what is not explained by a client, or an origin, that has gone."""
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            check_client_left(inner)
    elif not isinstance(exc, (*_CLIENT_LEFT, h11.RemoteProtocolError)):
        raise exc


async def _serve_http1(stream: trio.abc.Stream, handler: _peers.Handler, first: bytes) -> None:
    wire = h11.Connection(h11.SERVER)
    wire.receive_data(first)
    try:
        while isinstance(request := await _peers._next_event(stream, wire), h11.Request):
            await handler(_peers.HTTP1Call(stream, wire, request))
            if wire.our_state is not h11.DONE:
                return
            while wire.their_state is not h11.DONE:
                await _peers._next_event(stream, wire)
            wire.start_next_cycle()
    except h11.RemoteProtocolError as exc:
        if wire.their_state is h11.ERROR and not wire.trailing_data[1]:
            raise BadClient(f"a client broke HTTP/1.1: {exc}") from exc


class Server:
    """A listener on loopback, and the connections to it, all of which may be cut.

    Args:
        handler: Answers requests; None for a server without HTTP.
        tls: For the server's side.
        moods: Where the connections of HTTP/2 have the times of their changes from; None for no changes.
        report: Told what clients do wrong.
        raw: Serves a connection without HTTP.
    """

    def __init__(
        self,
        handler: _peers.Handler | None,
        report: Report,
        *,
        tls: ssl.SSLContext | None = None,
        moods: Iterator[random.Random | None] | None = None,
        raw: Callable[[trio.SocketStream], Awaitable[None]] | None = None,
    ) -> None:
        self._handler = handler
        self._report = report
        self._tls = tls
        self._moods = moods or itertools.repeat(None)
        self._raw = raw
        self.connections: set[HTTP2Server] = set()

    async def listen(self, *, task_status: trio.TaskStatus[int]) -> None:
        """Listen on any port, and tell which."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        listeners[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        task_status.started(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(self._attend, listeners)

    async def _attend(self, stream: trio.SocketStream) -> None:
        try:
            if self._raw is not None:
                async with stream:
                    await self._raw(stream)
            elif self._tls is None:
                await self._serve(stream, stream)
            else:
                tls = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
                await self._serve(tls, stream)
        except BadClient as exc:
            self._report(str(exc))
        except Exception as exc:
            try:
                check_client_left(exc)
            except Exception as unexpected:
                self._report("".join(traceback.format_exception(unexpected)))

    async def _serve(self, stream: trio.abc.Stream, bottom: trio.SocketStream) -> None:
        assert self._handler is not None
        reset = False
        try:
            first = bytes(await stream.receive_some())
            if not first.startswith(b"PRI "):
                await _serve_http1(stream, self._handler, first)
            else:
                connection = HTTP2Server(stream, self._handler, next(self._moods), self._report)
                self.connections.add(connection)
                try:
                    await connection.run(first)
                finally:
                    self.connections.discard(connection)
                reset = connection.reset
        except Cut as cut:
            reset = cut.how == "reset"
        finally:
            if reset:
                linger = struct.pack("ii", 1, 0)
                bottom.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                bottom.socket.close()
            else:
                with trio.move_on_after(1, shield=True):
                    await stream.aclose()


def moods(seed: int) -> Iterator[random.Random | None]:
    """For every other connection the times and values of its changes."""
    for number in itertools.count():
        yield random.Random(f"{seed}/moods/{number}") if number % 2 else None


# -- What the origins answer.


class Origin:
    """Answers every request as its plan says."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        # The nonces of requests that were refused once, the oldest first.
        self._refused: dict[str, None] = {}

    async def __call__(self, call: _peers.Call) -> None:
        nonce = call.headers["x-nonce"]
        plan = make_plan(self._seed, int(nonce.partition("-")[0]))
        await trio.sleep(plan.delay)
        await self._fail_first(call, plan, nonce)
        headers = {"x-nonce": nonce}
        if plan.upload is not None and not plan.early:
            headers["x-upload"] = await _read(call)
        for status in plan.informational:
            await call.inform(status, {"x-nonce": nonce})
        match plan.fault:
            case Fault.CUT | Fault.RESET if plan.cut_at < 0:
                raise _cut(plan)
            case Fault.GOAWAY if isinstance(call, _peers.HTTP2Call):
                _connection(call).go_away(call.stream_id)
            case Fault.GOAWAY:
                headers["connection"] = "close"
        body = content(nonce, plan.size)
        if plan.fault is Fault.GARBAGE and isinstance(call, _peers.HTTP1Call):
            await _respond_and_babble(call, plan, headers, body)
        else:
            await _respond(call, plan, headers, body)
        await _end(call, plan)

    async def _fail_first(self, call: _peers.Call, plan: Plan, nonce: str) -> None:
        """What is done to a request before it is read."""
        match plan.fault:
            case Fault.SILENCE:
                # A proxy between may not notice that its client has left.
                with trio.move_on_after(_LONGEST_SILENCE):
                    await call.client_left()
                raise Cut("stream" if plan.http2 else "close")
            case Fault.DEAF:
                await trio.sleep(0.3)
                raise Cut("stream" if plan.http2 else "close")
            case Fault.REFUSE if isinstance(call, _peers.HTTP2Call):
                if nonce not in self._refused:
                    self._refused[nonce] = None
                    if len(self._refused) > _FORGET_AFTER:
                        del self._refused[next(iter(self._refused))]
                    raise Cut("stream", ErrorCodes.REFUSED_STREAM)
                del self._refused[nonce]
            case Fault.GOAWAY_NOW:
                if isinstance(call, _peers.HTTP2Call):
                    _connection(call).go_away(max(0, call.stream_id - 2))
                    await trio.sleep(0.01)
                raise Cut("close")


def _connection(call: _peers.HTTP2Call) -> HTTP2Server:
    assert isinstance(call._server, HTTP2Server)
    return call._server


def _cut(plan: Plan) -> Cut:
    if plan.fault is Fault.RESET:
        return Cut("reset")
    return Cut("stream" if plan.http2 else "close")


async def _read(call: _peers.Call) -> str:
    """Read a request's body, and tell what it was."""
    size = checksum = 0
    while data := await call.receive():
        size += len(data)
        checksum = zlib.crc32(data, checksum)
    return fingerprint(size, checksum)


def fingerprint(size: int, checksum: int) -> str:
    """What a server tells of a body."""
    return f"{size}-{checksum:08x}"


async def _respond(call: _peers.Call, plan: Plan, headers: dict[str, str], body: bytes) -> None:
    if plan.framing == "close" and isinstance(call, _peers.HTTP1Call):
        lines = [f"HTTP/1.1 {plan.status} Indeed", *(f"{name}: {value}" for name, value in headers.items())]
        head = "\r\n".join([*lines, "Connection: close", "", ""]).encode()
        await call._stream.send_all(head + (body if plan.has_body else b""))
        raise Cut("close")
    if plan.framing == "length" and plan.status == 200:
        headers = {**headers, "content-length": str(len(body))}
    await call.begin(plan.status, headers)
    if plan.has_body:
        sent = 0
        for piece in pieces(body):
            if plan.fault in (Fault.CUT, Fault.RESET) and sent >= plan.cut_at * len(body):
                raise _cut(plan)
            await call.send(piece)
            sent += len(piece)
            await trio.sleep(plan.pause)
    if plan.fault is Fault.RESET or (plan.fault is Fault.CUT and not _is_complete(call, plan)):
        raise _cut(plan)
    await call.end({"x-nonce": headers["x-nonce"]} if plan.trailers else None)


def _is_complete(call: _peers.Call, plan: Plan) -> bool:
    """Return whether the client has all of the response once the head and the body are sent.

    Closing the connection then would not cut the response. It would race with the client's next request
    (RFC 9112, 9.5), which only `Fault.HANG_UP` of the rough origins may do.
    """
    return isinstance(call, _peers.HTTP1Call) and not (plan.has_body and plan.framing == "chunked")


class _Held(trio.abc.SendStream):
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.data = b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.data += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def _respond_and_babble(
    call: _peers.HTTP1Call, plan: Plan, headers: dict[str, str], body: bytes
) -> None:
    """Send an answer, and at once one that nobody has asked for."""
    stream, held = call._stream, _Held()
    call._stream = held  # type: ignore[assignment]
    await _respond(call, plan, headers, body)
    call._stream = stream
    # Only what comes with the answer's end can be told from the answer to the next request.
    stale = len(held.data) < _ARRIVES_AT_ONCE
    await stream.send_all(held.data + (_STALE if stale else b"\r\nnonsense"))


async def _end(call: _peers.Call, plan: Plan) -> None:
    """What is done to the connection after an answer."""
    http2 = isinstance(call, _peers.HTTP2Call)
    match plan.fault:
        case Fault.HANG_UP:
            raise Cut("close")
        case Fault.HALF_CLOSE if isinstance(call, _peers.HTTP1Call):
            if isinstance(call._stream, trio.SocketStream):
                await call._stream.send_eof()
                with trio.move_on_after(0.3):
                    await call.client_left()
            raise Cut("close")
        case Fault.GARBAGE if isinstance(call, _peers.HTTP2Call):
            _connection(call).babble()
        case Fault.GOAWAY if http2:
            await trio.sleep(0.02)
            raise Cut("close")


# -- What the proxies do.


async def proxy(call: _peers.Call) -> None:
    """Make tunnels, and forward requests."""
    try:
        await _peers._proxy(call)
    except Exception as exc:
        check_client_left(exc)
        raise Cut("stream" if isinstance(call, _peers.HTTP2Call) else "close") from exc


async def shake(server: Server, seed: int) -> None:
    """End a proxy's connections of HTTP/2, now and then."""
    chosen = random.Random(f"{seed}/shake")
    while True:
        await trio.sleep(chosen.uniform(0.1, 0.6))
        for connection in list(server.connections):
            match chosen.choice(("goaway", "reset", "close", "babble", "nothing")):
                case "goaway":
                    connection.go_away(connection.wire.highest_inbound_stream_id)
                case "reset":
                    connection.end(reset=True)
                case "close":
                    connection.end(reset=False)
                case "babble":
                    connection.babble()


async def echo(stream: trio.SocketStream) -> None:
    """Send everything back, to its end."""
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


def contexts(ca: Any) -> Callable[[], ssl.SSLContext]:
    """Server contexts for loopback that offer both protocols."""

    @functools.cache
    def make() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2", "http/1.1"])
        ca.issue_cert("127.0.0.1", "localhost").configure_cert(context)
        return context

    return make
