"""HTTP/2 with servers that go away, refuse, speak something else, or mean harm."""

import contextlib
import functools
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any

import h2.connection
import h2.events
import hpack
import pytest
import trio
import trio.testing
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import (
    DataFrame,
    GoAwayFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.certificates import alpn_server, client_context, make_tls
from tests.harness.checks import assert_unharmed, internals
from tests.harness.h2peer import H2Peer, h2_pool
from tests.harness.peers import DELIVERIES
from tests.harness.servers import serve_tcp
from tests.harness.traces import Events
from trio_exchange import (
    ConnectionPool,
    Connector,
    ExchangeError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    Response,
    WriteError,
)
from trio_exchange._http.http2.connection import HTTP2Connection
from trio_exchange._http.http2.frames import FloodGuard
from trio_exchange.testing import MemoryConnector, ScriptedPeer

Serve = Callable[[H2Peer], Awaitable[None]]
URL = "http://example.com/"
FOREVER = 10_000


# -- Servers.


async def ordinary(peer: H2Peer) -> None:
    """A server that answers every request with its method and body."""
    await peer.start()
    with contextlib.suppress(EOFError):
        while True:
            stream_id, headers, body = await peer.request()
            await peer.respond(stream_id, body=headers[b":method"] + b" " + body)


def in_turn(*scripts: Serve) -> Serve:
    """The first connection is the first script's, and so on; there must not be more."""
    left: Iterator[Serve] = iter(scripts)

    async def serve(peer: H2Peer) -> None:
        script = next(left, None)
        assert script is not None, "one connection too many"
        await script(peer)

    return serve


@contextlib.asynccontextmanager
async def linked(link: str, serve: Serve, **options: Any) -> AsyncIterator[tuple[ConnectionPool, str]]:
    """A pool and the URL of a server, over memory, plain TCP or TLS. All scripts are played to the end."""
    async with trio.open_nursery() as nursery:
        if link == "memory":
            pool, _ = h2_pool(nursery, serve, **options)
            async with pool:
                yield pool, URL
            return
        playing = 0
        quiet = trio.Event()

        async def play(scripted: ScriptedPeer) -> None:
            nonlocal playing
            playing += 1
            try:
                await serve(H2Peer(scripted.stream))
            finally:
                playing -= 1
                if not playing:
                    quiet.set()

        server = await serve_tcp(nursery, play, tls=alpn_server("h2") if link == "tls" else None)
        context = client_context(make_tls().ca)
        async with ConnectionPool(context, http1=False, http2=True, **options) as pool:
            yield pool, server.url
        while playing:
            quiet = trio.Event()
            await quiet.wait()
        server.cancel_scope.cancel()


LINKS = pytest.mark.parametrize("link", ["memory", "plain", "tls"])


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until it is so; the test's time limit is the limit."""
    while not condition():
        await trio.lowlevel.checkpoint()


async def fetch(pool: ConnectionPool, method: str = "GET", url: str = URL, **options: Any) -> bytes:
    response = await pool.request(method, url, **options)
    assert response.status == 200
    assert response.content is not None
    return response.content


# -- Idle connections live.


@LINKS
async def test_ping_is_answered_and_settings_are_acknowledged_without_a_request(link: str) -> None:
    checked = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        await peer.respond(stream_id)
        peer.h2.ping(b"12345678")
        peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 7})
        await peer.flush()
        answer = await peer.event(h2.events.PingAckReceived)
        assert answer.ping_data == b"12345678"
        while len([frame for frame in peer.sent(SettingsFrame) if "ACK" in frame.flags]) < 2:
            assert await peer.receive()
        checked.set()
        with contextlib.suppress(EOFError):
            stream_id, _, _ = await peer.request()
            await peer.respond(stream_id)
        await peer.until_closed()

    async with linked(link, serve) as (pool, url):
        await pool.request("GET", url)
        await checked.wait()
        await pool.request("GET", url)
        assert pool.statistics().connections_opened == 1


def going_away(last_stream_id: int = 1, code: int = 0, debug_data: bytes = b"") -> bytes:
    return GoAwayFrame(last_stream_id=last_stream_id, error_code=code, additional_data=debug_data).serialize()


@LINKS
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("how", ["goaway", "disconnect"])
async def test_what_ends_an_idle_connection_is_noticed_at_once(link: str, method: str, how: str) -> None:
    async def ends(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        await peer.respond(stream_id)
        if how == "goaway":
            await peer.send(going_away())
            await peer.until_closed()
            assert len(peer.sent(GoAwayFrame)) == 1

    async with linked(link, in_turn(ends, ordinary)) as (pool, url):
        await pool.request("GET", url)
        await until(lambda: pool.statistics().open == 0)
        assert await fetch(pool, method, url, content=b"x") == method.encode() + b" x"
        assert pool.statistics().connections_opened == 2


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("how", ["goaway", "disconnect", "both"])
async def test_a_post_right_after_the_end_has_arrived_goes_to_a_new_connection(tls: bool, how: str) -> None:
    to_end = trio.Event()
    has_ended = trio.Event()

    async def ends(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        await peer.respond(stream_id)
        await to_end.wait()
        if how != "disconnect":
            await peer.send(going_away())
        if how != "goaway":
            await trio.aclose_forcefully(peer.stream)
        has_ended.set()
        if how == "goaway":
            await peer.until_closed()

    async with linked("tls" if tls else "plain", in_turn(ends, ordinary)) as (pool, url):
        await pool.request("GET", url)
        to_end.set()
        await has_ended.wait()
        # An iterator, so that it can't have been sent twice.
        body = (piece for piece in [b"on", b"ce"])
        assert await fetch(pool, "POST", url, content=body) == b"POST once"


async def test_a_server_that_answers_the_ping_keeps_its_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def serve(peer: H2Peer) -> None:
        await ordinary(peer)
        assert len(peer.sent(PingFrame)) == 5
        assert {frame.opaque_data for frame in peer.sent(PingFrame) if "ACK" not in frame.flags}

    async with linked("memory", serve, http2_ping_interval=10, http2_ping_timeout=2) as (pool, _):
        await fetch(pool)
        await trio.sleep(55)
        await fetch(pool)
        assert pool.statistics().connections_opened == 1


async def test_a_dead_server_is_found_by_a_ping(autojump_clock: trio.testing.MockClock) -> None:
    async def dies(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        await peer.respond(stream_id)
        while not peer.sent(PingFrame):
            assert await peer.listen()
        assert trio.current_time() - start == 10
        while await peer.listen():
            pass
        assert trio.current_time() - start == pytest.approx(12)
        assert len(peer.sent(PingFrame)) == len(peer.sent(GoAwayFrame)) == 1

    start = trio.current_time()
    options = {"http2_ping_interval": 10, "http2_ping_timeout": 2}
    async with linked("memory", in_turn(dies, ordinary), **options) as (pool, _):
        await fetch(pool)
        await trio.sleep(20)
        assert pool.statistics().open == 0
        assert await fetch(pool, "POST", content=b"y") == b"POST y"


async def test_a_ping_without_answer_ends_a_request(autojump_clock: trio.testing.MockClock) -> None:
    async def deaf(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        while await peer.listen():
            pass

    start = trio.current_time()
    options = {"http2_ping_interval": 5, "http2_ping_timeout": 3}
    async with linked("memory", in_turn(deaf, ordinary), **options) as (pool, _):
        with pytest.raises(ReadError, match="did not answer a PING within 3 seconds"):
            await fetch(pool, extensions={"timeout": {"read": None}})
        assert trio.current_time() - start == pytest.approx(8)
        await fetch(pool)


async def test_what_arrives_puts_the_ping_off(autojump_clock: trio.testing.MockClock) -> None:
    async def chatty(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, end=False)
        for _ in range(10):
            await trio.sleep(4)
            peer.h2.send_data(stream_id, b"x")
            await peer.flush()
        peer.h2.end_stream(stream_id)
        await peer.flush()
        await peer.until_closed()
        assert not peer.sent(PingFrame)

    async with linked("memory", chatty, http2_ping_interval=5) as (pool, _):
        assert await fetch(pool) == b"x" * 10


async def test_no_ping_is_sent_by_default(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        await ordinary(peer)
        assert not peer.sent(PingFrame)

    async with linked("memory", serve) as (pool, _):
        await fetch(pool)
        await trio.sleep(FOREVER)
        await fetch(pool)
        assert pool.statistics().connections_opened == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"http2_ping_interval": 0}, ValueError),
        ({"http2_ping_interval": -1}, ValueError),
        ({"http2_ping_interval": float("nan")}, ValueError),
        ({"http2_ping_interval": "5"}, TypeError),
        ({"http2_ping_timeout": -1}, ValueError),
        ({"http2_ping_timeout": float("nan")}, ValueError),
        ({"http2_ping_timeout": None}, TypeError),
        ({"http2_ping_timeout": "5"}, TypeError),
    ],
)
def test_bad_times_for_pings_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        ConnectionPool(http2=True, **options)


# -- GOAWAY and refusal.


def list_body() -> list[bytes]:
    return [b"bo", b"dy"]


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
@pytest.mark.parametrize("content", [b"body", list_body()], ids=["bytes", "list"])
@pytest.mark.parametrize("how", ["refused", "goaway"])
async def test_a_refused_request_is_sent_again_whatever_its_method(
    autojump_clock: trio.testing.MockClock, method: str, content: Any, how: str
) -> None:
    seen: list[bytes] = []

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        with contextlib.suppress(EOFError):
            while True:
                stream_id, _, body = await peer.request()
                seen.append(body)
                if len(seen) > 1:
                    await peer.respond(stream_id, body=b"done")
                elif how == "refused":
                    await peer.send_frame(RstStreamFrame(stream_id, error_code=ErrorCodes.REFUSED_STREAM))
                else:
                    await peer.send(going_away(0))

    async with linked("memory", serve) as (pool, _):
        assert await fetch(pool, method, content=content) == b"done"
        assert seen == [b"body", b"body"]
        # After REFUSED_STREAM the connection is as good as before.
        assert pool.statistics().connections_opened == (1 if how == "refused" else 2)
        assert pool.statistics().open == pool.statistics().idle == 1


@pytest.mark.parametrize("how", ["refused", "goaway"])
async def test_a_generator_that_was_used_is_not_sent_again(
    autojump_clock: trio.testing.MockClock, how: str
) -> None:
    async def refuses(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        if how == "refused":
            await peer.send_frame(RstStreamFrame(stream_id, error_code=ErrorCodes.REFUSED_STREAM))
        else:
            await peer.send(going_away(0))
        with contextlib.suppress(EOFError):
            stream_id, _, _ = await peer.request()
            assert how == "refused"
            await peer.respond(stream_id, body=b"the next")

    scripts = [refuses] if how == "refused" else [refuses, ordinary]
    async with linked("memory", in_turn(*scripts)) as (pool, _):
        with pytest.raises(RemoteProtocolError, match=r"REFUSED_STREAM|GOAWAY"):
            await pool.request("POST", URL, content=(piece for piece in [b"a", b"b"]))
        assert await fetch(pool) == (b"the next" if how == "refused" else b"GET ")


@pytest.mark.parametrize("how", ["refused", "goaway"])
async def test_a_sixth_refusal_is_an_error(autojump_clock: trio.testing.MockClock, how: str) -> None:
    requests = 0

    async def refuses(peer: H2Peer) -> None:
        nonlocal requests
        await peer.start()
        with contextlib.suppress(EOFError):
            while True:
                stream_id, _, _ = await peer.request()
                requests += 1
                if how == "refused":
                    await peer.send_frame(RstStreamFrame(stream_id, error_code=ErrorCodes.REFUSED_STREAM))
                else:
                    await peer.send(going_away(0))

    events = Events()
    start = trio.current_time()
    async with linked("memory", refuses) as (pool, _):
        with pytest.raises(RemoteProtocolError, match=r"REFUSED_STREAM|GOAWAY"):
            await fetch(pool, extensions={"trace": events})
        assert requests == 6
        assert pool.statistics().connections_opened == (1 if how == "refused" else 6)
    retries = events.infos("connection.retry.started")
    assert [info["attempt"] for info in retries] == [1, 2, 3, 4, 5]
    assert all("REFUSED_STREAM" in str(info["exception"]) or how == "goaway" for info in retries)
    # On another connection the first repetition needs no pause.
    expected = [0.1, 0.2, 0.4, 0.8, 1.6] if how == "refused" else [0, 0.2, 0.4, 0.8, 1.6]
    for info, pause in zip(retries, expected, strict=True):
        assert 0.5 * pause <= info["delay"] <= 1.5 * pause
    assert trio.current_time() - start == pytest.approx(sum(info["delay"] for info in retries))


@pytest.mark.parametrize("code", [ErrorCodes.CANCEL, ErrorCodes.INTERNAL_ERROR, ErrorCodes.NO_ERROR, 0xDEAD])
async def test_a_reset_of_another_kind_is_no_refusal(
    autojump_clock: trio.testing.MockClock, code: int
) -> None:
    async def resets(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        await peer.send_frame(RstStreamFrame(stream_id, error_code=code))
        stream_id, _, _ = await peer.request()
        await peer.respond(stream_id, body=b"the next")
        await peer.until_closed()

    name = "0xdead" if code == 0xDEAD else ErrorCodes(code).name
    async with linked("memory", in_turn(resets)) as (pool, _):
        with pytest.raises(RemoteProtocolError, match=f"reset the stream: .*{name}"):
            await fetch(pool)
        assert await fetch(pool) == b"the next"


async def test_streams_up_to_the_last_finish_and_those_above_go_elsewhere(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def goes(peer: H2Peer) -> None:
        await peer.start()
        streams = {}
        for _ in range(4):
            stream_id, headers, _ = await peer.request()
            streams[stream_id] = headers[b":path"]
        await peer.respond(1, body=b"half", end=False)
        await peer.send(going_away(3, ErrorCodes.NO_ERROR, b"restart"))
        await trio.sleep(1)
        peer.h2.send_data(1, b" and half", end_stream=True)
        await peer.respond(3, body=b"old " + streams[3])
        await peer.until_closed()
        assert trio.current_time() - start < 2
        assert not peer.sent(RstStreamFrame, 1)
        assert not peer.sent(RstStreamFrame, 3)

    async def takes_over(peer: H2Peer) -> None:
        await peer.start()
        for _ in range(3):
            stream_id, headers, _ = await peer.request()
            await peer.respond(stream_id, body=b"new " + headers[b":path"])
        await peer.until_closed()

    results: dict[str, bytes] = {}

    async def get(path: str) -> None:
        results[path] = await fetch(pool, "POST", URL + path, content=b"1")

    start = trio.current_time()
    async with linked("memory", in_turn(goes, takes_over)) as (pool, _):
        async with trio.open_nursery() as nursery:
            for path in "abcd":
                nursery.start_soon(get, path)
                await trio.testing.wait_all_tasks_blocked()
            (old,) = internals(pool)[:1]
            await trio.sleep(0.5)
            # A request that is new goes to the new connection, while the old one still works.
            nursery.start_soon(get, "e")
        assert results == {
            "a": b"half and half",
            "b": b"old /b",
            "c": b"new /c",
            "d": b"new /d",
            "e": b"new /e",
        }
        await old.closed.wait()


async def test_a_graceful_end_in_two_goaways(autojump_clock: trio.testing.MockClock) -> None:
    async def goes(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        await peer.request()
        await peer.send(going_away(2**31 - 1))
        await trio.sleep(1)
        await peer.send(going_away(1))
        await peer.respond(1, body=b"finished")
        await peer.until_closed()

    results: list[bytes] = []

    async def get() -> None:
        results.append(await fetch(pool, "POST", content=b"x"))

    async with linked("memory", in_turn(goes, ordinary)) as (pool, _), trio.open_nursery() as nursery:
        nursery.start_soon(get)
        nursery.start_soon(get)
    assert sorted(results) == [b"POST x", b"finished"]


async def test_goaway_with_an_error_is_explained(autojump_clock: trio.testing.MockClock) -> None:
    async def goes(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        await peer.send(going_away(1, ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings"))

    async with linked("memory", in_turn(goes, ordinary)) as (pool, _):
        with pytest.raises(RemoteProtocolError, match=r"GOAWAY.*ENHANCE_YOUR_CALM.*too_many_pings.*closed"):
            await fetch(pool)
        await fetch(pool)


async def test_an_unknown_error_code_and_long_debug_data_do_no_harm(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def goes(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        await peer.send(going_away(0, 0xBADC0DE, b"\x00\xff" * 8000))

    async with linked("memory", in_turn(*[goes] * 6)) as (pool, _):
        with pytest.raises(RemoteProtocolError, match="error 0xbadc0de") as caught:
            await fetch(pool)
        assert len(str(caught.value)) < 2000


async def test_goaway_between_the_grant_and_the_request(autojump_clock: trio.testing.MockClock) -> None:
    """A tracing handler waits while the connection, already granted, is told to go away."""

    async def goes(peer: H2Peer) -> None:
        await peer.start()
        await granted.wait()
        await peer.send(going_away(0))
        sent.set()
        with contextlib.suppress(EOFError):
            await peer.request()
            raise AssertionError("a request was sent on a connection that goes away")

    granted, sent = trio.Event(), trio.Event()

    async def trace(name: str, info: dict[str, Any]) -> None:
        if name == "http2.send_connection_init.started" and not granted.is_set():
            granted.set()
            await sent.wait()
            await trio.testing.wait_all_tasks_blocked()

    async with linked("memory", in_turn(goes, ordinary)) as (pool, _):
        body = (piece for piece in [b"not ", b"used"])
        content = await fetch(pool, "POST", content=body, extensions={"trace": trace})
        assert content == b"POST not used"


async def test_goaway_while_others_wait_for_a_place(autojump_clock: trio.testing.MockClock) -> None:
    async def goes(peer: H2Peer) -> None:
        await peer.start({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
        await peer.request()
        await trio.testing.wait_all_tasks_blocked()
        # In one piece: the place becomes free, and at the same time the connection goes away.
        peer.h2.send_headers(1, [(b":status", b"200")], end_stream=True)
        await peer.send(peer.h2.data_to_send() + going_away(1))
        await peer.until_closed()
        assert peer.h2.highest_inbound_stream_id == 1

    async with linked("memory", in_turn(goes, ordinary), max_connections=1) as (pool, _):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(functools.partial(fetch, pool, "POST", content=b""))
        assert pool.statistics().connections_opened == 2


def goes_after(streams: int, served: list[H2Peer], *, at_once: bool) -> Serve:
    """A server that acts on so many streams of a connection, and then says GOAWAY.

    It says so before it answers the last of them, or only after.
    """

    async def serve(peer: H2Peer) -> None:
        served.append(peer)
        await peer.start()
        acted_on: list[int] = []
        with contextlib.suppress(trio.BrokenResourceError):
            while len(acted_on) < streams:
                if not await peer.receive():
                    return
                ids = [event.stream_id for event in peer.events if isinstance(event, h2.events.StreamEnded)]
                peer.events.clear()
                ids = ids[: streams - len(acted_on)]
                acted_on += ids
                if at_once and len(acted_on) == streams:
                    await peer.send(going_away(acted_on[-1]))
                for stream_id in ids:
                    await peer.respond(stream_id)
            if not at_once:
                await peer.send(going_away(acted_on[-1]))
            while await peer.listen():
                pass

    return serve


@pytest.mark.parametrize("at_once", [True, False], ids=["before the answers", "after them"])
@pytest.mark.parametrize("streams", [1, 3, 10])
async def test_a_server_that_goes_away_again_and_again_fails_nothing(
    autojump_clock: trio.testing.MockClock, streams: int, at_once: bool
) -> None:
    served: list[H2Peer] = []
    left = 200

    async def work() -> None:
        nonlocal left
        while left:
            left -= 1
            assert await fetch(pool, "POST", content=b"once") == b""

    async with linked("memory", goes_after(streams, served, at_once=at_once)) as (pool, _):
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(work)
        assert 200 / streams <= len(served) <= 400 / streams


@pytest.mark.parametrize("at_once", [True, False], ids=["before the answers", "after them"])
async def test_a_real_server_that_goes_away_again_and_again_fails_nothing(at_once: bool) -> None:
    left = 200

    async def work() -> None:
        nonlocal left
        while left:
            left -= 1
            assert await fetch(pool, url=url) == b""

    serve = goes_after(5, [], at_once=at_once)
    async with linked("plain", serve) as (pool, url), trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(work)


@pytest.mark.parametrize("max_connections", [1, 5])
async def test_a_request_refused_thrice_is_the_first_of_a_connection(
    autojump_clock: trio.testing.MockClock, max_connections: int
) -> None:
    """The server acts on one stream of a connection, and says so only when there are others."""

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        with contextlib.suppress(EOFError, trio.BrokenResourceError):
            first, _, _ = await peer.request()
            with trio.move_on_after(1):
                await peer.request()
                await peer.send(going_away(first))
            await peer.respond(first)
            await peer.until_closed()

    async def get() -> None:
        await fetch(pool, extensions={"trace": events})

    events = Events()
    async with linked("memory", serve, max_connections=max_connections) as (pool, _):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(get)
        assert_unharmed(pool, idle=pool.statistics().idle)
    assert max(info["attempt"] for info in events.infos("connection.retry.started")) == 3


async def test_a_pause_counts_as_waiting_for_a_connection(autojump_clock: trio.testing.MockClock) -> None:
    async def refuses(peer: H2Peer) -> None:
        await peer.start()
        with contextlib.suppress(EOFError):
            while True:
                stream_id, _, _ = await peer.request()
                await peer.send_frame(RstStreamFrame(stream_id, error_code=ErrorCodes.REFUSED_STREAM))

    async with linked("memory", refuses) as (pool, _):
        start = trio.current_time()
        # What does not fit is not begun, and the error says what the matter is.
        with pytest.raises(RemoteProtocolError, match="REFUSED_STREAM"):
            await fetch(pool, extensions={"timeout": {"pool": 0.5}})
        assert 0 < trio.current_time() - start < 0.5
        with pytest.raises(RemoteProtocolError, match="REFUSED_STREAM"):
            await fetch(pool, extensions={"timeout": {"pool": 0}})


async def test_a_request_can_be_cancelled_in_its_pause(autojump_clock: trio.testing.MockClock) -> None:
    requests = 0

    async def refuses(peer: H2Peer) -> None:
        nonlocal requests
        await peer.start()
        with contextlib.suppress(EOFError):
            while True:
                stream_id, _, _ = await peer.request()
                requests += 1
                await peer.send_frame(RstStreamFrame(stream_id, error_code=ErrorCodes.REFUSED_STREAM))

    async with linked("memory", refuses) as (pool, _):
        with trio.move_on_after(0.04) as scope:
            await fetch(pool)
        assert scope.cancelled_caught
        assert requests == 1
        assert_unharmed(pool, idle=1)


async def test_stream_ids_running_out_open_a_new_connection(autojump_clock: trio.testing.MockClock) -> None:
    ids: list[Any] = []

    async def get() -> None:
        response = await pool.request("GET", URL)
        ids.append(response.extensions["stream_id"])

    async with linked("memory", in_turn(ordinary, ordinary)) as (pool, _):
        await get()
        connection = pool.connections[0]
        assert isinstance(connection, HTTP2Connection)
        connection._h2.highest_outbound_stream_id = 2**31 - 5
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(get)
        assert sorted(ids) == [1, 1, 3, 2**31 - 3, 2**31 - 1]
        await connection.closed.wait()
        assert connection not in pool.connections


@LINKS
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_our_own_close_sends_goaway(link: str, busy: bool) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        await peer.respond(stream_id, body=b"x", end=not busy)
        await peer.until_closed()
        (goaway,) = peer.sent(GoAwayFrame)
        assert goaway.error_code == ErrorCodes.NO_ERROR
        assert peer.frames[-1] is goaway

    async with linked(link, serve) as (pool, url):
        response: Response
        async with pool.stream("GET", url) as response:
            if busy:
                await pool.aclose()
                with pytest.raises(ExchangeError, match="closed"):
                    await response.aread()
            else:
                await response.aread()


# -- A server that is not HTTP/2.

NOT_HTTP2 = [
    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.0 505 HTTP Version Not Supported\r\n\r\n",
    b"220 mail.example.com ESMTP\r\n",
    b"SSH-2.0-OpenSSH_9.2p1\r\n",
    b"\x15\x03\x01\x00\x02\x02\x46 and more",
    b"<html><body>hello</body></html>",
    bytes(1000),
]


@DELIVERIES
@pytest.mark.parametrize("text", NOT_HTTP2, ids=range(len(NOT_HTTP2)))
async def test_an_answer_that_is_not_http2_is_told_at_once(
    autojump_clock: trio.testing.MockClock, text: bytes, byte_by_byte: bool
) -> None:
    async def serve(peer: H2Peer) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.send(text, byte_by_byte=byte_by_byte)
        await peer.until_closed()
        assert [frame.error_code for frame in peer.sent(GoAwayFrame)] == [ErrorCodes.PROTOCOL_ERROR]

    start = trio.current_time()
    async with linked("memory", serve) as (pool, _):
        with pytest.raises(RemoteProtocolError, match="does not speak HTTP/2") as caught:
            await fetch(pool)
        if text.startswith(b"HTTP/"):
            assert text[:9].decode() in str(caught.value)
        assert trio.current_time() == start


@DELIVERIES
@pytest.mark.parametrize("scheme", ["http", "ws"])
@pytest.mark.parametrize("trailing", [b"", b"\x15\x03\x03\x00\x02\x01\x00"], ids=["alert", "two alerts"])
async def test_a_server_that_speaks_tls_is_told_apart(
    autojump_clock: trio.testing.MockClock, scheme: str, trailing: bytes, byte_by_byte: bool
) -> None:
    """A TLS alert is shorter than the header of a frame."""

    async def serve(peer: H2Peer) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.send(b"\x15\x03\x01\x00\x02\x02\x46" + trailing, byte_by_byte=byte_by_byte)
        await peer.until_closed()

    start = trio.current_time()
    async with linked("memory", serve) as (pool, _):
        with pytest.raises(RemoteProtocolError) as caught:
            await pool.request("GET", f"{scheme}://example.com:8443/")
        assert str(caught.value).startswith(
            f"the server does not speak HTTP/2 on this port, but TLS (use {scheme}s://example.com:8443)"
        )
        assert trio.current_time() == start


async def test_what_looks_like_tls_within_tls_is_shown() -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.stream.receive_some()
        await peer.send(b"\x15\x03\x01\x00\x02\x02\x46\x00\x00")
        await trio.sleep_forever()

    certificates = make_tls()
    async with trio.open_nursery() as nursery:
        server = await serve_tcp(nursery, script, tls=certificates.server)
        async with ConnectionPool(client_context(certificates.ca), http1=False, http2=True) as pool:
            with pytest.raises(RemoteProtocolError, match=r"does not speak HTTP/2: instead of SETTINGS"):
                await pool.request("GET", server.url)
        nursery.cancel_scope.cancel()


FIRST_FRAMES = {
    "ping": PingFrame(opaque_data=bytes(8)).serialize(),
    "ack": SettingsFrame(flags=["ACK"]).serialize(),
    "headers": b"\x00\x00\x01\x01\x05\x00\x00\x00\x01\x88",
    "window update": WindowUpdateFrame(0, window_increment=1).serialize(),
    "goaway": going_away(0),
}


@DELIVERIES
@pytest.mark.parametrize("first", FIRST_FRAMES)
async def test_the_first_frame_must_be_settings(
    autojump_clock: trio.testing.MockClock, first: str, byte_by_byte: bool
) -> None:
    async def serve(peer: H2Peer) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.send(FIRST_FRAMES[first] + SettingsFrame().serialize(), byte_by_byte=byte_by_byte)
        await peer.until_closed()
        assert [frame.error_code for frame in peer.sent(GoAwayFrame)] == [ErrorCodes.PROTOCOL_ERROR]

    async with linked("memory", in_turn(serve, ordinary)) as (pool, _):
        with pytest.raises(RemoteProtocolError, match="instead of SETTINGS"):
            await fetch(pool)
        await fetch(pool)


@LINKS
@pytest.mark.parametrize("text", [b"", b"HTTP/", b"\x00\x00\x00\x04\x00\x00\x00\x00"])
async def test_an_end_before_the_first_frame(link: str, text: bytes) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.listen()
        await peer.stream.send_all(text)
        if link == "tls":
            await peer.stream.aclose()

    async with linked(link, in_turn(serve, ordinary)) as (pool, url):
        with pytest.raises(RemoteProtocolError, match="closed the connection, without a response"):
            await fetch(pool, url=url)
        assert await fetch(pool, url=url) == b"GET "


@pytest.mark.parametrize("http1", [False, True])
async def test_a_tls_server_without_alpn(http1: bool) -> None:
    async def script(peer: ScriptedPeer) -> None:
        if http1:
            async for _ in peer:
                await peer.send_response(200, body=b"one")
        else:
            await ordinary(H2Peer(peer.stream))

    tls = make_tls()
    async with trio.open_nursery() as nursery:
        server = await serve_tcp(nursery, script, tls=tls.server)
        async with ConnectionPool(client_context(tls.ca), http1=http1, http2=True) as pool:
            response = await pool.request("GET", server.url)
        assert response.extensions["http_version"] == (b"HTTP/1.1" if http1 else b"HTTP/2")
        assert response.content == (b"one" if http1 else b"GET ")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_a_real_server_that_only_speaks_http1(tls: bool) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.stream.receive_some()
        await peer.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    certificates = make_tls()
    async with trio.open_nursery() as nursery:
        server = await serve_tcp(nursery, script, tls=certificates.server if tls else None)
        async with ConnectionPool(client_context(certificates.ca), http1=False, http2=True) as pool:
            with pytest.raises(RemoteProtocolError, match=r"does not speak HTTP/2.*HTTP/1\.1 400"):
                await pool.request("GET", server.url)
        nursery.cancel_scope.cancel()


# -- Hostile servers.


def raw(kind: int, flags: int = 0, stream_id: int = 0, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + struct.pack(">BBL", kind, flags, stream_id) + body


DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION, ALTSVC = range(11)
END_STREAM, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x4, 0x8, 0x20
HEAD = hpack.Encoder().encode([(b":status", b"200")])
ANSWER = raw(HEADERS, END_HEADERS, 1, HEAD)


def setting(code: int, value: int) -> bytes:
    return raw(SETTINGS, 0, 0, struct.pack(">HL", code, value))


def update(stream_id: int, increment: int) -> bytes:
    return raw(WINDOW, 0, stream_id, struct.pack(">L", increment))


def many(frame: bytes, count: int = 2 * FloodGuard.LIMIT) -> list[bytes]:
    return [frame * 100] * (count // 100)


def hpack_bomb() -> bytes:
    """An entry of the dynamic table, and a block that refers to it over and over."""
    encoder = hpack.Encoder()
    entry = encoder.encode([(b":status", b"200"), (b"a", b"x" * 4000)])
    return entry + b"\xbe" * 16000


def long_head() -> bytes:
    block = hpack.Encoder().encode([(b":status", b"200"), *((b"n%d" % i, b"x" * 1000) for i in range(120))])
    pieces = [block[i : i + 16384] for i in range(0, len(block), 16384)]
    frames = [raw(HEADERS if i == 0 else CONTINUATION, 0, 1, piece) for i, piece in enumerate(pieces)]
    return b"".join(frames) + raw(CONTINUATION, END_HEADERS, 1)


P, F, S = ErrorCodes.PROTOCOL_ERROR, ErrorCodes.FRAME_SIZE_ERROR, ErrorCodes.STREAM_CLOSED
FLOW, CALM, COMPRESSION = (
    ErrorCodes.FLOW_CONTROL_ERROR,
    ErrorCodes.ENHANCE_YOUR_CALM,
    ErrorCodes.COMPRESSION_ERROR,
)
DONE = raw(HEADERS, END_HEADERS | END_STREAM, 1, HEAD)

#: What is sent once stream 1 is open, and the code of the GOAWAY that it has to bring about.
FAULTS: dict[str, tuple[Iterable[bytes], ErrorCodes]] = {
    # Floods.
    "flood of PING": (many(raw(PING, 0, 0, bytes(8))), CALM),
    "flood of PING ACK": (many(raw(PING, 1, 0, bytes(8))), CALM),
    "flood of SETTINGS": (many(raw(SETTINGS)), CALM),
    "flood of settings in few frames": (
        [raw(SETTINGS, 0, 0, b"".join(struct.pack(">HL", 100 + i, 1) for i in range(2700)))] * 8,
        CALM,
    ),
    "flood of SETTINGS ACK": (many(raw(SETTINGS, 1)), CALM),
    "flood of RST_STREAM": (many(raw(RST, 0, 1, struct.pack(">L", 8))), CALM),
    "flood of empty DATA": ([ANSWER, *many(raw(DATA, 0, 1))], CALM),
    "flood of DATA after the end": ([DONE, *many(raw(DATA, 0, 1))], CALM),
    "flood of CONTINUATION": ([raw(HEADERS, 0, 1), *many(raw(CONTINUATION, 0, 1))], CALM),
    "flood of large CONTINUATION": (
        [raw(HEADERS, 0, 1), *[raw(CONTINUATION, 0, 1, bytes(16384))] * 100],
        CALM,
    ),
    "flood of WINDOW_UPDATE": (many(update(0, 1)), CALM),
    "flood of WINDOW_UPDATE on the stream": (many(update(1, 1)), CALM),
    "flood of PRIORITY": (many(raw(PRIORITY, 0, 1, bytes(5))), CALM),
    "flood of PRIORITY on idle streams": (many(raw(PRIORITY, 0, 101, bytes(5))), CALM),
    "flood of unknown frames": (many(raw(0xFA, 0, 0, b"grease")), CALM),
    "flood of ALTSVC": (many(raw(ALTSVC, 0, 0, b"\x00\x01ah2=")), CALM),
    "flood of GOAWAY": (many(going_away(1)), CALM),
    # Header blocks.
    "HPACK bomb": ([raw(HEADERS, END_HEADERS, 1, hpack_bomb()[:16384])], COMPRESSION),
    "head larger than max_header_bytes": ([long_head()], COMPRESSION),
    "index 0": ([raw(HEADERS, END_HEADERS, 1, b"\x80")], COMPRESSION),
    "index that does not exist": ([raw(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\x7f")], COMPRESSION),
    "block that ends early": ([raw(HEADERS, END_HEADERS, 1, b"\x88\x40\x05ab")], COMPRESSION),
    "bad Huffman code": ([raw(HEADERS, END_HEADERS, 1, b"\x88\x40\x84\xff\xff\xff\xff\x00")], COMPRESSION),
    "table larger than allowed": ([raw(HEADERS, END_HEADERS, 1, b"\x3f\xff\xff\x7f\x88")], COMPRESSION),
    "endless integer": ([raw(HEADERS, END_HEADERS, 1, b"\xff" * 1000)], COMPRESSION),
    "bad block of trailers": ([ANSWER, raw(HEADERS, 0x5, 1, b"\x80")], COMPRESSION),
    # Flow control.
    "window overflow of the connection": ([update(0, 2**31 - 1)], FLOW),
    "initial window too large": ([setting(4, 2**31)], FLOW),
    "window overflow of a stream by SETTINGS": ([update(1, 2**31 - 1 - 65535), setting(4, 65536)], FLOW),
    "increment 0": ([update(0, 0)], P),
    "increment 0 on the stream": ([update(1, 0)], P),
    # Streams.
    "DATA on an idle stream": ([raw(DATA, 0, 3, b"x")], P),
    "HEADERS on an idle stream": ([raw(HEADERS, END_HEADERS, 3, HEAD)], P),
    "RST_STREAM on an idle stream": ([raw(RST, 0, 3, bytes(4))], P),
    "WINDOW_UPDATE on an idle stream": ([update(3, 1)], P),
    "CONTINUATION on an idle stream": ([raw(CONTINUATION, END_HEADERS, 3, HEAD)], P),
    "DATA on an even stream": ([raw(DATA, 0, 2, b"x")], P),
    "HEADERS on an even stream": ([raw(HEADERS, END_HEADERS, 2, HEAD)], P),
    "RST_STREAM on an even stream": ([raw(RST, 0, 2, bytes(4))], P),
    "WINDOW_UPDATE on an even stream": ([update(2, 1)], P),
    "DATA on stream 0": ([raw(DATA, 0, 0, b"x")], P),
    "HEADERS on stream 0": ([raw(HEADERS, END_HEADERS, 0, HEAD)], P),
    "PRIORITY on stream 0": ([raw(PRIORITY, 0, 0, bytes(5))], P),
    "RST_STREAM on stream 0": ([raw(RST, 0, 0, bytes(4))], P),
    "CONTINUATION on stream 0": ([raw(CONTINUATION, 0, 0)], P),
    "SETTINGS on a stream": ([raw(SETTINGS, 0, 1)], P),
    "PING on a stream": ([raw(PING, 0, 1, bytes(8))], P),
    "GOAWAY on a stream": ([raw(GOAWAY, 0, 1, bytes(8))], P),
    "HEADERS after the end": ([DONE, raw(HEADERS, END_HEADERS | END_STREAM, 1, HEAD)], S),
    # PUSH_PROMISE.
    "PUSH_PROMISE": ([raw(PUSH, END_HEADERS, 1, struct.pack(">L", 2) + HEAD)], P),
    "PUSH_PROMISE on stream 0": ([raw(PUSH, END_HEADERS, 0, struct.pack(">L", 2) + HEAD)], P),
    "PUSH_PROMISE after the end": ([DONE, raw(PUSH, END_HEADERS, 1, struct.pack(">L", 2) + HEAD)], P),
    # Header blocks in pieces.
    "PING in a header block": ([raw(HEADERS, 0, 1, HEAD), raw(PING, 0, 0, bytes(8))], P),
    "PING that looks like an end": ([raw(HEADERS, 0, 1, HEAD), raw(PING, 0xFF, 0, bytes(8))], P),
    "GOAWAY in a header block": ([raw(HEADERS, 0, 1, HEAD), going_away(1)], P),
    "GOAWAY that looks like an end": ([raw(HEADERS, 0, 1, HEAD), raw(GOAWAY, 0xFF, 0, bytes(8))], P),
    "DATA in a header block": ([raw(HEADERS, 0, 1, HEAD), raw(DATA, 0xFF, 1, b"x")], P),
    "unknown frame in a header block": ([raw(HEADERS, 0, 1, HEAD), raw(0xFA, 0xFF, 0)], P),
    "CONTINUATION of another stream": ([raw(HEADERS, 0, 1, HEAD), raw(CONTINUATION, 4, 3)], P),
    "CONTINUATION without HEADERS": ([raw(CONTINUATION, END_HEADERS, 1, HEAD)], P),
    "CONTINUATION after the end of the block": ([ANSWER, raw(CONTINUATION, END_HEADERS, 1)], P),
    "CONTINUATION after the end of the stream": ([DONE, raw(CONTINUATION, END_HEADERS, 1)], P),
    # Sizes.
    "oversized DATA": ([ANSWER, raw(DATA, 0, 1, bytes(16385))], F),
    "oversized unknown frame": ([raw(0xFA, 0, 0, bytes(16385))], F),
    "header of the largest frame": ([b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"], F),
    "PRIORITY too short": ([raw(PRIORITY, 0, 1, bytes(4))], F),
    "PRIORITY too long": ([raw(PRIORITY, 0, 1, bytes(6))], F),
    "RST_STREAM too short": ([raw(RST, 0, 1, bytes(3))], F),
    "RST_STREAM too long": ([raw(RST, 0, 1, bytes(5))], F),
    "SETTINGS of a length not divisible by 6": ([raw(SETTINGS, 0, 0, bytes(7))], F),
    "SETTINGS ACK with content": ([raw(SETTINGS, 1, 0, bytes(6))], F),
    "PING too short": ([raw(PING, 0, 0, bytes(7))], F),
    "PING too long": ([raw(PING, 0, 0, bytes(9))], F),
    "GOAWAY too short": ([raw(GOAWAY, 0, 0, bytes(7))], F),
    "WINDOW_UPDATE too short": ([update(1, 1).replace(b"\0\0\4", b"\0\0\3", 1)[:-1]], F),
    "WINDOW_UPDATE too long": ([raw(WINDOW, 0, 0, bytes(5))], F),
    "padded DATA without padding length": ([ANSWER, raw(DATA, PADDED, 1)], F),
    "padded HEADERS without padding length": ([raw(HEADERS, END_HEADERS | PADDED, 1)], F),
    "prioritized HEADERS without priority": ([raw(HEADERS, END_HEADERS | PRIORITIZED, 1, b"x")], F),
    "DATA of more padding than there is": ([ANSWER, raw(DATA, PADDED, 1, b"\x09padding")], P),
    "HEADERS of more padding than there is": ([raw(HEADERS, END_HEADERS | PADDED, 1, b"\x09" + HEAD)], P),
    # Settings.
    "server enables push": ([setting(2, 1)], P),
    "push is neither 0 nor 1": ([setting(2, 2)], P),
    "frame size too small": ([setting(5, 16383)], P),
    "frame size too large": ([setting(5, 2**24)], P),
    "extended CONNECT neither 0 nor 1": ([setting(8, 2)], P),
}


def is_after_the_response(fault: str) -> bool:
    return DONE in FAULTS[fault][0]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_ends_the_connection_with_the_right_code(
    autojump_clock: trio.testing.MockClock, fault: str
) -> None:
    pieces, code = FAULTS[fault]
    sent = 0

    async def hostile(peer: H2Peer) -> None:
        nonlocal sent
        await peer.start()
        await peer.head()
        with contextlib.suppress(trio.BrokenResourceError):
            for piece in pieces:
                await peer.send(piece)
                sent += 1
                # So that the client notices when it has had enough.
                await trio.testing.wait_all_tasks_blocked()
        with contextlib.suppress(trio.BrokenResourceError):
            while await peer.listen():
                pass
        (goaway,) = peer.sent(GoAwayFrame)
        assert ErrorCodes(goaway.error_code) == code
        assert goaway.last_stream_id == 0
        assert peer.frames[-1] is goaway

    start = trio.current_time()
    async with linked("memory", in_turn(hostile, ordinary)) as (pool, _):
        if is_after_the_response(fault):
            assert await fetch(pool) == b""
        else:
            with pytest.raises(RemoteProtocolError, match="the server"):
                await fetch(pool, extensions={"timeout": {"read": 5}})
        # What the server says may have ended the request before it goes too far.
        for connection in internals(pool):
            await connection.closed.wait()
        assert await fetch(pool, "POST", content=b"next") == b"POST next"
        assert trio.current_time() == start
        assert_unharmed(pool, idle=1)


async def test_data_above_an_unread_streams_window(autojump_clock: trio.testing.MockClock) -> None:
    async def hostile(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        await peer.send(ANSWER + raw(DATA, 0, 1, bytes(16384)) * 16)
        await trio.testing.wait_all_tasks_blocked()
        assert not peer.sent(GoAwayFrame)
        await peer.send(raw(DATA, 0, 1, b"x"))
        while await peer.listen():
            pass
        assert [frame.error_code for frame in peer.sent(GoAwayFrame)] == [ErrorCodes.FLOW_CONTROL_ERROR]

    async with linked("memory", in_turn(hostile, ordinary)) as (pool, _):
        async with pool.stream("GET", URL) as response:
            await internals(pool)[0].closed.wait()
            with pytest.raises(RemoteProtocolError, match="in the middle of the response"):
                await response.aread()
        await fetch(pool)


#: What concerns its stream alone, and the code of the RST_STREAM.
STREAM_FAULTS: dict[str, tuple[bytes, ErrorCodes]] = {
    "window overflow": (update(1, 2**31 - 1), FLOW),
    "flood of 1xx": (
        raw(HEADERS, END_HEADERS, 1, hpack.Encoder().encode([(b":status", b"103")])) * 101,
        CALM,
    ),
    "empty head": (raw(HEADERS, END_HEADERS, 1), P),
}


@pytest.mark.parametrize("fault", STREAM_FAULTS)
async def test_a_fault_of_a_stream_resets_it_with_the_right_code(
    autojump_clock: trio.testing.MockClock, fault: str
) -> None:
    async def hostile(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        await peer.request()
        await peer.send(STREAM_FAULTS[fault][0])
        reset = await peer.event(h2.events.StreamReset, 1)
        assert reset.error_code == STREAM_FAULTS[fault][1]
        await peer.send(raw(HEADERS, END_HEADERS | END_STREAM, 3, b"\x88"))
        await peer.until_closed()
        assert len(peer.sent(RstStreamFrame)) == 1

    async def other() -> None:
        await trio.testing.wait_all_tasks_blocked()
        assert await fetch(pool) == b""

    async with linked("memory", in_turn(hostile)) as (pool, _), trio.open_nursery() as nursery:
        nursery.start_soon(other)
        with pytest.raises(RemoteProtocolError):
            await fetch(pool)


async def test_a_little_of_what_serves_no_request_is_borne(autojump_clock: trio.testing.MockClock) -> None:
    chatter = b"".join(
        [
            raw(0xFA, 0xFF, 0, b"grease"),
            raw(0xFA, 0xFF, 7, b"grease"),
            raw(ALTSVC, 0, 1, b"nonsense"),
            raw(PRIORITY, 0, 1, bytes(5)),
            raw(PRIORITY, 0, 55, bytes(5)),
            setting(0x1234, 1),
            raw(DATA, PADDED, 1, b"\x03" + bytes(3)),
            raw(DATA, 0, 1),
            # A bit that is reserved.
            raw(PING, 0, 0x80000000, bytes(8)),
        ]
    )

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        await peer.send(ANSWER + chatter * 100 + raw(DATA, END_STREAM, 1, b"fine"))
        await peer.until_closed()

    async with linked("memory", serve) as (pool, _):
        assert await fetch(pool) == b"fine"
        connection = pool.connections[0]
        assert isinstance(connection, HTTP2Connection)
        assert 0x1234 not in connection._h2.remote_settings


async def test_patience_is_renewed_in_time(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        for _ in range(4):
            await peer.send(raw(PING, 1, 0, bytes(8)) * (FloodGuard.LIMIT - 100))
            await trio.sleep(FloodGuard.SECONDS + 1)
        await peer.request()
        await peer.respond(1)
        await peer.until_closed()

    async with linked("memory", serve) as (pool, _):
        await fetch(pool)


async def test_a_busy_stream_of_small_frames_is_no_flood(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        await peer.send(ANSWER + (raw(DATA, 0, 1, b"x") + update(0, 1)) * 15_000 + raw(DATA, 1, 1))
        await peer.until_closed()

    async with linked("memory", serve) as (pool, _):
        assert await fetch(pool) == b"x" * 15_000


async def test_a_server_that_reads_nothing_but_asks_for_answers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pings = 0

    async def hostile(scripted: ScriptedPeer) -> None:
        nonlocal pings
        peer = H2Peer(scripted.stream)
        if len(connector.peers) > 1:
            await ordinary(peer)
            return
        frames = SettingsFrame().serialize()
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await scripted.send(frames)
                frames = raw(PING, 0, 0, bytes(8)) * 1000
                pings += 1000
                await trio.sleep(2)

    async with trio.open_nursery() as nursery:
        connector = MemoryConnector(nursery, hostile, stream_pair=trio.testing.lockstep_stream_pair)
        async with ConnectionPool(http1=False, http2=True, connector=connector) as pool:
            with pytest.raises(RemoteProtocolError, match="does not read what it asks for"):
                await fetch(pool, extensions={"timeout": {"read": None, "write": None}})
            # Each answer has 17 bytes.
            assert pings * 17 < 320 * 1024
            (connection,) = internals(pool)
            assert await fetch(pool) == b"GET "
            # Its GOAWAY can't be sent, which does not hold up the closing for long.
            with trio.fail_after(2):
                await connection.closed.wait()
            assert_unharmed(pool, idle=1)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_a_real_server_that_reads_nothing_and_floods(tls: bool) -> None:
    async def hostile(peer: H2Peer) -> None:
        await peer.start()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                await peer.stream.send_all(raw(PING, 0, 0, bytes(8)) * 500)

    link = "tls" if tls else "plain"
    async with linked(link, in_turn(hostile, ordinary)) as (pool, url):
        with pytest.raises(RemoteProtocolError, match="served no request"):
            await fetch(pool, url=url)
        assert await fetch(pool, url=url) == b"GET "


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_a_fault_over_a_real_socket_is_told_to_the_server(tls: bool) -> None:
    async def hostile(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        await peer.send(raw(RST, 0, 5, bytes(4)))
        while await peer.listen():
            pass
        assert [frame.error_code for frame in peer.sent(GoAwayFrame)] == [ErrorCodes.PROTOCOL_ERROR]

    link = "tls" if tls else "plain"
    async with linked(link, in_turn(hostile, ordinary)) as (pool, url):
        with pytest.raises(RemoteProtocolError, match="stream 5, which was never opened"):
            await fetch(pool, url=url)
        await fetch(pool, url=url)


async def send_together(stream: trio.abc.Stream, pieces: Iterable[bytes]) -> None:
    """Send pieces that arrive together; under TLS each is a record of its own, and so read by itself."""
    if isinstance(stream, trio.SSLStream):
        for piece in pieces:
            stream._ssl_object.write(piece)
        await stream.transport_stream.send_all(stream._outgoing.read())
    else:
        await stream.send_all(b"".join(pieces))


@pytest.mark.parametrize("link", ["plain", "tls"])
async def test_what_arrives_behind_a_fault_does_not_change_its_code(link: str) -> None:
    async def hostile(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        faults = [update(0, 2**31 - 1), raw(RST, 0, 5, bytes(4)), raw(DATA, 0, 2, b"x")]
        await send_together(peer.stream, [*faults, DONE, raw(PING, 0, 0, bytes(8))])
        while await peer.listen():
            pass
        assert [frame.error_code for frame in peer.sent(GoAwayFrame)] == [ErrorCodes.FLOW_CONTROL_ERROR]
        assert not peer.sent(PingFrame)

    async with linked(link, in_turn(hostile, ordinary)) as (pool, url):
        with pytest.raises(RemoteProtocolError, match="without a response"):
            await fetch(pool, url=url)
        await fetch(pool, url=url)


# -- Whatever a server sends.

_SOUND = [
    SettingsFrame().serialize(),
    setting(3, 1),
    setting(4, 0),
    setting(1, 0),
    raw(SETTINGS, 1),
    ANSWER,
    DONE,
    raw(HEADERS, 0, 1, HEAD),
    raw(HEADERS, END_HEADERS, 3, HEAD),
    raw(HEADERS, 0x5, 1, hpack.Encoder().encode([(b"trailer", b"x")])),
    raw(HEADERS, END_HEADERS, 1, hpack.Encoder().encode([(b":status", b"100")])),
    raw(HEADERS, 0x2D, 1, b"\x02" + bytes(5) + HEAD + bytes(2)),
    raw(CONTINUATION, END_HEADERS, 1, HEAD),
    raw(DATA, 0, 1, b"some data"),
    raw(DATA, END_STREAM, 1, b"the last"),
    raw(DATA, PADDED, 1, b"\x03some more" + bytes(3)),
    raw(DATA, 0, 3, b"other data"),
    raw(RST, 0, 1, struct.pack(">L", 8)),
    raw(RST, 0, 1, struct.pack(">L", 7)),
    raw(PUSH, END_HEADERS, 1, struct.pack(">L", 2) + HEAD),
    raw(PING, 0, 0, bytes(8)),
    raw(PRIORITY, 0, 1, bytes(5)),
    raw(ALTSVC, 0, 1, b"\x00\x00h2"),
    raw(0xFA, 0, 0, b"grease"),
    update(0, 1000),
    update(1, 1000),
    going_away(0),
    going_away(1),
    going_away(2**31 - 1),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A frame, or what is left of one that was damaged."""
    data = bytearray(draw(st.sampled_from(_SOUND)))
    match draw(st.sampled_from(["sound", "sound", "byte", "cut", "more", "type", "flags", "noise"])):
        case "byte":
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        case "cut":
            del data[draw(st.integers(0, len(data) - 1)) :]
        case "more":
            body = data[9:] + draw(st.binary(max_size=20))
            data[:3] = len(body).to_bytes(3, "big")
            data[9:] = body
        case "type":
            data[3] = draw(st.integers(0, 12))
        case "flags":
            data[4] = draw(st.integers(0, 255))
        case "noise":
            body = bytearray(draw(st.binary(max_size=30)))
            data[:3] = len(body).to_bytes(3, "big")
            data[9:] = body
    return bytes(data)


@given(
    preface=st.booleans(),
    pieces=st.lists(mutated(), max_size=8),
    closes=st.booleans(),
    upload=st.booleans(),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_server_sends_the_pool_survives(
    preface: bool, pieces: list[bytes], closes: bool, upload: bool
) -> None:
    orderly = False
    pool: ConnectionPool

    async def hostile(peer: H2Peer) -> None:
        if preface:
            await peer.send(SettingsFrame().serialize())
        await peer.listen()
        for piece in pieces:
            await peer.send(piece)
            await trio.testing.wait_all_tasks_blocked()
        while not closes and await peer.listen():
            pass

    async def serve(peer: H2Peer) -> None:
        # The first host's server is hostile, and so is what a request that was refused is sent to again.
        await (ordinary if orderly else hostile)(peer)

    async def talk() -> None:
        content = (piece for piece in [b"x"] * 10) if upload else b""
        # An error of ours, or an answer; never anything else.
        with contextlib.suppress(ExchangeError):
            timeout = {"read": 5, "write": 5, "pool": 5}
            await pool.request("POST", URL, content=content, extensions={"timeout": timeout})

    async def main() -> None:
        nonlocal pool, orderly
        async with trio.open_nursery() as nursery:
            pool, _ = h2_pool(nursery, serve)
            with trio.fail_after(100):
                async with pool:
                    async with trio.open_nursery() as requests:
                        requests.start_soon(talk)
                        requests.start_soon(talk)
                    orderly = True
                    answer = await pool.request("GET", "http://other.example.com/")
                    assert answer.content == b"GET "
                    assert pool.statistics().active == pool.statistics().waiting == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0), strict_exception_groups=True)


def test_a_read_timeout_is_what_ends_a_mute_server() -> None:
    """The fuzz test's own clock jumps, so that a hang would be seen there."""

    async def mute(peer: H2Peer) -> None:
        while await peer.listen():
            pass

    async def main() -> None:
        async with linked("memory", mute) as (pool, _):
            with pytest.raises(ReadTimeout):
                await fetch(pool, extensions={"timeout": {"read": 5}})

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# -- What takes luck to meet.


async def test_an_end_that_only_the_kernel_knows_of_is_seen_before_a_request() -> None:
    """No task has run between the server's closing and the request."""
    theirs: list[trio.socket.SocketType] = []

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            await ordinary(H2Peer(stream))
        await stream.aclose()

    class Pairs(Connector):
        async def connect_tcp(self, host: str, port: int, **_: Any) -> trio.abc.Stream:
            ours, other = trio.socket.socketpair()
            theirs.append(other)
            nursery.start_soon(serve, trio.SocketStream(other))
            return trio.SocketStream(ours)

    async with (
        trio.open_nursery() as nursery,
        ConnectionPool(http1=False, http2=True, connector=Pairs()) as pool,
    ):
        assert await fetch(pool) == b"GET "
        theirs[0].close()
        assert await fetch(pool, "POST", content=b"again") == b"POST again"
        assert len(theirs) == 2
        await until(lambda: pool.statistics().open == 1)


async def test_whatever_h2_makes_of_what_it_is_given_is_the_servers_fault(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(connection: h2.connection.H2Connection, data: bytes) -> list[h2.events.Event]:
        if connection.config.client_side:
            raise IndexError("what nobody thought of")
        return receive_data(connection, data)

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        await peer.until_closed()
        assert [frame.error_code for frame in peer.sent(GoAwayFrame)] == [ErrorCodes.PROTOCOL_ERROR]

    receive_data = h2.connection.H2Connection.receive_data
    monkeypatch.setattr(h2.connection.H2Connection, "receive_data", stumble)
    async with trio.open_nursery() as nursery:
        pool, _ = h2_pool(nursery, serve)
        async with pool:
            with pytest.raises(RemoteProtocolError, match="what nobody thought of") as raised:
                await pool.request("GET", URL)
            assert isinstance(raised.value.__cause__, IndexError)


async def test_a_reset_of_a_stream_that_was_refused_is_no_news(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def refuse(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _, _ = await peer.request()
        # In one piece, so that the request hears of both at once.
        await peer.send_frame(GoAwayFrame(0, 0), RstStreamFrame(stream_id, ErrorCodes.INTERNAL_ERROR))
        await peer.until_closed()

    async with trio.open_nursery() as nursery:
        pool, connector = h2_pool(nursery, in_turn(refuse, ordinary))
        async with pool:
            assert await fetch(pool, "POST", content=b"once") == b"POST once"
            assert len(connector.dialled) == 2


async def test_a_second_goaway_for_a_stream_that_was_refused_is_no_news(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def refuse(peer: H2Peer) -> None:
        await peer.start()
        await peer.request()
        # In one piece, so that the request hears of both at once.
        await peer.send_frame(GoAwayFrame(0, 0), GoAwayFrame(0, 0))
        await peer.until_closed()

    async with linked("memory", in_turn(refuse, ordinary)) as (pool, _):
        assert await fetch(pool, "POST", content=b"once") == b"POST once"


@pytest.mark.parametrize("resumes", [True, False])
async def test_closing_waits_a_moment_for_what_is_being_sent(
    autojump_clock: trio.testing.MockClock, resumes: bool
) -> None:
    """A server that has stopped reading gets a whole frame and a GOAWAY, if it goes on soon."""
    stopped = trio.Event()
    peers: list[H2Peer] = []

    async def serve(scripted: ScriptedPeer) -> None:
        peer = H2Peer(scripted.stream)
        peers.append(peer)
        await peer.start()
        await peer.head()
        stopped.set()
        await trio.sleep(0.4 if resumes else FOREVER)
        await peer.until_closed()

    async with trio.open_nursery() as nursery:
        connector = MemoryConnector(nursery, serve, stream_pair=trio.testing.lockstep_stream_pair)
        async with (
            ConnectionPool(http1=False, http2=True, connector=connector) as pool,
            trio.open_nursery() as inner,
        ):
            inner.start_soon(fetch_in_vain, pool)
            await stopped.wait()
            await trio.testing.wait_all_tasks_blocked()
            began = trio.current_time()
            await pool.aclose()
            assert trio.current_time() - began == pytest.approx(0.4 if resumes else 0.5)
        if not resumes:
            nursery.cancel_scope.cancel()
    if resumes:
        assert peers[0].ended
        assert peers[0].sent(DataFrame)
        assert isinstance(peers[0].frames[-1], GoAwayFrame)
        assert not peers[0].unparsed


async def fetch_in_vain(pool: ConnectionPool) -> None:
    with pytest.raises(ReadError):
        await pool.request("POST", URL, content=bytes(200_000))


async def test_last_words_are_heard_after_a_send_has_failed_below_tls(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What one request still gets, another one that is not answered waits for, but not for long."""
    broken = trio.Event()

    class Breaking(MemoryConnector):
        async def connect_tcp(self, *args: Any, **options: Any) -> trio.abc.Stream:
            stream = await super().connect_tcp(*args, **options)
            assert isinstance(stream, trio.StapledStream)
            streams.append(stream)
            return stream

    async def fail() -> None:
        broken.set()
        raise trio.BrokenResourceError("the cable was cut")

    async def serve(scripted: ScriptedPeer) -> None:
        await scripted.start_tls(alpn_server("h2"))
        peer = H2Peer(scripted.stream)
        await peer.start()
        stream_id, _, _ = await peer.request()
        await broken.wait()
        await peer.respond(stream_id, body=b"last words")
        await trio.sleep(5)

    async def get(pool: ConnectionPool) -> None:
        contents.append(await fetch(pool, url=url))

    url = "https://127.0.0.1/"
    streams: list[Any] = []
    contents: list[bytes] = []
    async with trio.open_nursery() as nursery:
        connector = Breaking(nursery, serve)
        async with ConnectionPool(make_tls().client, http2=True, connector=connector) as pool:
            nursery.start_soon(get, pool)
            await trio.testing.wait_all_tasks_blocked()
            streams[0].send_stream.send_all_hook = fail
            began = trio.current_time()
            with pytest.raises(WriteError, match="the cable was cut") as raised:
                await fetch(pool, "POST", url=url, content=b"lost")
            assert isinstance(raised.value.__cause__, trio.BrokenResourceError)
            assert trio.current_time() - began == pytest.approx(1)
            assert contents == [b"last words"]
            await trio.testing.wait_all_tasks_blocked()
            assert_unharmed(pool)
