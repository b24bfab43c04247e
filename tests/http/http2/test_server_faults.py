"""HTTP/2 with servers that go away, refuse, speak something else, or mean harm."""

import contextlib
import struct
from collections.abc import AsyncIterator, Iterable
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
    Frame,
    GoAwayFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.harness.certificates import alpn_server, make_tls
from tests.harness.checks import assert_unharmed, internals
from tests.harness.h2link import (
    LINKS,
    SOCKETS,
    URL,
    Paused,
    Serve,
    answer,
    background,
    fetch,
    first_request,
    h2_server,
    in_turn,
    listen_to_the_end,
    ordinary,
    requests,
    send_data,
    until,
)
from tests.harness.h2peer import H2Peer
from tests.harness.peers import DELIVERIES, Script
from tests.harness.servers import serve_tcp
from tests.harness.traces import Events
from trio_exchange import (
    ConnectionPool,
    Connector,
    ExchangeError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    WriteError,
)
from trio_exchange._http.http2.connection import HTTP2Connection
from trio_exchange._http.http2.frames import FloodGuard
from trio_exchange.testing import MemoryConnector, ScriptedPeer

FOREVER = 10_000


def assert_told(peer: H2Peer, code: ErrorCodes) -> None:
    """The client has sent one GOAWAY, with this code."""
    assert [frame.error_code for frame in peer.sent(GoAwayFrame)] == [code]


async def hang_up(peer: H2Peer) -> None:
    await trio.aclose_forcefully(peer.stream)


# -- Idle connections live.


@LINKS
async def test_ping_is_answered_and_settings_are_acknowledged_without_a_request(link: str) -> None:
    checked = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        await answer(peer)
        peer.h2.ping(b"12345678")
        peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 7})
        await peer.flush()
        event = await peer.event(h2.events.PingAckReceived)
        assert event.ping_data == b"12345678"
        while len([frame for frame in peer.sent(SettingsFrame) if "ACK" in frame.flags]) < 2:
            assert await peer.receive()
        checked.set()
        async for stream_id, _, _ in requests(peer):
            await peer.respond(stream_id)

    async with h2_server(serve, link) as (pool, server):
        await pool.request("GET", server.url)
        await checked.wait()
        await pool.request("GET", server.url)
        assert pool.statistics().connections_opened == 1


def going_away(last_stream_id: int = 1, code: int = 0, debug_data: bytes = b"") -> bytes:
    return GoAwayFrame(last_stream_id=last_stream_id, error_code=code, additional_data=debug_data).serialize()


@LINKS
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("how", ["goaway", "disconnect"])
async def test_what_ends_an_idle_connection_is_noticed_at_once(link: str, method: str, how: str) -> None:
    async def ends(peer: H2Peer) -> None:
        await peer.start()
        await answer(peer)
        if how == "goaway":
            await peer.send(going_away())
            await peer.until_closed()
            assert len(peer.sent(GoAwayFrame)) == 1

    async with h2_server(in_turn(ends, ordinary), link) as (pool, server):
        await pool.request("GET", server.url)
        await until(lambda: pool.statistics().open == 0)
        assert await fetch(pool, method, server.url, content=b"x") == method.encode() + b" x"
        assert pool.statistics().connections_opened == 2


@SOCKETS
@pytest.mark.parametrize("how", ["goaway", "disconnect", "both"])
async def test_a_post_right_after_the_end_has_arrived_goes_to_a_new_connection(link: str, how: str) -> None:
    to_end = trio.Event()
    has_ended = trio.Event()

    async def ends(peer: H2Peer) -> None:
        await peer.start()
        await answer(peer)
        await to_end.wait()
        if how != "disconnect":
            await peer.send(going_away())
        if how != "goaway":
            await hang_up(peer)
        has_ended.set()
        if how == "goaway":
            await peer.until_closed()

    async with h2_server(in_turn(ends, ordinary), link) as (pool, server):
        await pool.request("GET", server.url)
        to_end.set()
        await has_ended.wait()
        # An iterator, so that it can't have been sent twice.
        body = (piece for piece in [b"on", b"ce"])
        assert await fetch(pool, "POST", server.url, content=body) == b"POST once"


async def test_a_server_that_answers_the_ping_keeps_its_connection(autojump_clock: MockClock) -> None:
    async with h2_server(ordinary, http2_ping_interval=10, http2_ping_timeout=2) as (pool, server):
        await fetch(pool)
        await trio.sleep(55)
        await fetch(pool)
        assert pool.statistics().connections_opened == 1
    assert len(server.peer.sent(PingFrame)) == 5
    assert {frame.opaque_data for frame in server.peer.sent(PingFrame) if "ACK" not in frame.flags}


async def test_a_dead_server_is_found_by_a_ping(autojump_clock: MockClock) -> None:
    async def dies(peer: H2Peer) -> None:
        await peer.start()
        await answer(peer)
        while not peer.sent(PingFrame):
            assert await peer.listen()
        assert trio.current_time() - start == 10
        await listen_to_the_end(peer)
        assert trio.current_time() - start == pytest.approx(12)
        assert len(peer.sent(PingFrame)) == len(peer.sent(GoAwayFrame)) == 1

    start = trio.current_time()
    options: dict[str, Any] = {"http2_ping_interval": 10, "http2_ping_timeout": 2}
    async with h2_server(in_turn(dies, ordinary), **options) as (pool, _):
        await fetch(pool)
        await trio.sleep(20)
        assert pool.statistics().open == 0
        assert await fetch(pool, "POST", content=b"y") == b"POST y"


async def test_a_ping_without_answer_ends_a_request(autojump_clock: MockClock) -> None:
    async def deaf(peer: H2Peer) -> None:
        await first_request(peer)
        await listen_to_the_end(peer)

    start = trio.current_time()
    options: dict[str, Any] = {"http2_ping_interval": 5, "http2_ping_timeout": 3}
    async with h2_server(in_turn(deaf, ordinary), **options) as (pool, _):
        with pytest.raises(ReadError, match="did not answer a PING within 3 seconds"):
            await fetch(pool, extensions={"timeout": {"read": None}})
        assert trio.current_time() - start == pytest.approx(8)
        await fetch(pool)


async def test_what_arrives_puts_the_ping_off(autojump_clock: MockClock) -> None:
    async def chatty(peer: H2Peer) -> None:
        await peer.start()
        stream_id, _ = await peer.head()
        await peer.respond(stream_id, end=False)
        for _ in range(10):
            await trio.sleep(4)
            await send_data(peer, stream_id, b"x")
        await send_data(peer, stream_id, b"", end=True)
        await peer.until_closed()

    async with h2_server(chatty, http2_ping_interval=5) as (pool, server):
        assert await fetch(pool) == b"x" * 10
    assert not server.peer.sent(PingFrame)


async def test_no_ping_is_sent_by_default(autojump_clock: MockClock) -> None:
    async with h2_server(ordinary) as (pool, server):
        await fetch(pool)
        await trio.sleep(FOREVER)
        await fetch(pool)
        assert pool.statistics().connections_opened == 1
    assert not server.peer.sent(PingFrame)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        *[("http2_ping_interval", value, ValueError) for value in (0, -1, float("nan"))],
        ("http2_ping_interval", "5", TypeError),
        *[("http2_ping_timeout", value, ValueError) for value in (-1, float("nan"))],
        *[("http2_ping_timeout", value, TypeError) for value in (None, "5")],
    ],
)
def test_bad_times_for_pings_are_refused(option: str, value: Any, error: type[Exception]) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(error, match=option):
        ConnectionPool(http2=True, **options)


# -- GOAWAY and refusal.


REFUSALS = pytest.mark.parametrize("how", ["refused", "goaway"])


async def refuse(peer: H2Peer, stream_id: int, how: str) -> None:
    """Refuse a request: its stream alone, or all streams."""
    if how == "refused":
        await peer.send_frame(RstStreamFrame(stream_id, error_code=ErrorCodes.REFUSED_STREAM))
    else:
        await peer.send(going_away(0))


def refusing(how: str, refused: list[bytes]) -> Serve:
    """A server that refuses every request, and records their bodies."""

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        async for stream_id, _, body in requests(peer):
            refused.append(body)
            await refuse(peer, stream_id, how)

    return serve


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
@pytest.mark.parametrize("content", [b"body", [b"bo", b"dy"]], ids=["bytes", "list"])
@REFUSALS
async def test_a_refused_request_is_sent_again_whatever_its_method(
    autojump_clock: MockClock, method: str, content: Any, how: str
) -> None:
    seen: list[bytes] = []

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        async for stream_id, _, body in requests(peer):
            seen.append(body)
            if len(seen) > 1:
                await peer.respond(stream_id, body=b"done")
            else:
                await refuse(peer, stream_id, how)

    async with h2_server(serve) as (pool, _):
        assert await fetch(pool, method, content=content) == b"done"
        assert seen == [b"body", b"body"]
        # After REFUSED_STREAM the connection is as good as before.
        assert pool.statistics().connections_opened == (1 if how == "refused" else 2)
        assert pool.statistics().open == pool.statistics().idle == 1


@REFUSALS
async def test_a_generator_that_was_used_is_not_sent_again(autojump_clock: MockClock, how: str) -> None:
    async def refuses(peer: H2Peer) -> None:
        stream_id = await first_request(peer)
        await refuse(peer, stream_id, how)
        async for stream_id, _, _ in requests(peer):
            assert how == "refused"
            await peer.respond(stream_id, body=b"the next")

    scripts = [refuses] if how == "refused" else [refuses, ordinary]
    async with h2_server(in_turn(*scripts)) as (pool, _):
        with pytest.raises(RemoteProtocolError, match=r"REFUSED_STREAM|GOAWAY"):
            await pool.request("POST", URL, content=(piece for piece in [b"a", b"b"]))
        assert await fetch(pool) == (b"the next" if how == "refused" else b"GET ")


@REFUSALS
async def test_a_sixth_refusal_is_an_error(autojump_clock: MockClock, how: str) -> None:
    refused: list[bytes] = []
    events = Events()
    start = trio.current_time()
    async with h2_server(refusing(how, refused)) as (pool, _):
        with pytest.raises(RemoteProtocolError, match=r"REFUSED_STREAM|GOAWAY"):
            await fetch(pool, extensions={"trace": events})
        assert len(refused) == 6
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
async def test_a_reset_of_another_kind_is_no_refusal(autojump_clock: MockClock, code: int) -> None:
    async def resets(peer: H2Peer) -> None:
        stream_id = await first_request(peer)
        await peer.send_frame(RstStreamFrame(stream_id, error_code=code))
        await answer(peer, b"the next")
        await peer.until_closed()

    name = "0xdead" if code == 0xDEAD else ErrorCodes(code).name
    async with h2_server(in_turn(resets)) as (pool, _):
        with pytest.raises(RemoteProtocolError, match=f"reset the stream: .*{name}"):
            await fetch(pool)
        assert await fetch(pool) == b"the next"


async def test_streams_up_to_the_last_finish_and_those_above_go_elsewhere(autojump_clock: MockClock) -> None:
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

    start = trio.current_time()
    async with h2_server(in_turn(goes, takes_over)) as (pool, _):
        async with background(pool) as made:
            for path in "abcd":
                await made.make(1, URL + path, method="POST", content=b"1")
            (old,) = internals(pool)[:1]
            await trio.sleep(0.5)
            # A request that is new goes to the new connection, while the old one still works.
            await made.make(1, URL + "e", method="POST", content=b"1")
        assert made.statuses == [200] * 5
        assert made.answers == {
            URL + "a": b"half and half",
            URL + "b": b"old /b",
            URL + "c": b"new /c",
            URL + "d": b"new /d",
            URL + "e": b"new /e",
        }
        await old.wait_closed()


async def test_a_graceful_end_in_two_goaways(autojump_clock: MockClock) -> None:
    async def goes(peer: H2Peer) -> None:
        await first_request(peer)
        await peer.request()
        await peer.send(going_away(2**31 - 1))
        await trio.sleep(1)
        await peer.send(going_away(1))
        await peer.respond(1, body=b"finished")
        await peer.until_closed()

    async with h2_server(in_turn(goes, ordinary)) as (pool, _), background(pool) as made:
        await made.make(2, method="POST", content=b"x")
    assert made.statuses == [200] * 2
    assert set(made.contents) == {b"POST x", b"finished"}


@pytest.mark.parametrize(
    ("frame", "connections", "message"),
    [
        (
            going_away(1, ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings"),
            1,
            r"GOAWAY.*ENHANCE_YOUR_CALM.*too_many_pings.*closed",
        ),
        # No stream was acted on, so that the request is sent again; the debug data is long.
        (going_away(0, 0xBADC0DE, b"\x00\xff" * 8000), 6, "error 0xbadc0de"),
    ],
    ids=["ENHANCE_YOUR_CALM", "unknown code"],
)
async def test_goaway_with_an_error_is_explained(
    autojump_clock: MockClock, frame: bytes, connections: int, message: str
) -> None:
    async def goes(peer: H2Peer) -> None:
        await first_request(peer)
        await peer.send(frame)

    async with h2_server(in_turn(*[goes] * connections, ordinary)) as (pool, server):
        with pytest.raises(RemoteProtocolError, match=message) as caught:
            await fetch(pool)
        assert len(str(caught.value)) < 2000
        assert server.dialled == connections
        await fetch(pool)


async def test_goaway_between_the_grant_and_the_request(autojump_clock: MockClock) -> None:
    """A tracing handler waits while the connection, already granted, is told to go away."""

    async def goes(peer: H2Peer) -> None:
        await peer.start()
        await trace.reached.wait()
        await peer.send(going_away(0))
        await wait_all_tasks_blocked()
        trace.go_on.set()
        async for _ in requests(peer):
            raise AssertionError("a request was sent on a connection that goes away")

    trace = Paused()
    async with h2_server(in_turn(goes, ordinary)) as (pool, _):
        body = (piece for piece in [b"not ", b"used"])
        content = await fetch(pool, "POST", content=body, extensions={"trace": trace})
        assert content == b"POST not used"


async def test_goaway_while_others_wait_for_a_place(autojump_clock: MockClock) -> None:
    async def goes(peer: H2Peer) -> None:
        await first_request(peer, {SettingCodes.MAX_CONCURRENT_STREAMS: 1})
        await wait_all_tasks_blocked()
        # In one piece: the place becomes free, and at the same time the connection goes away.
        peer.h2.send_headers(1, [(b":status", b"200")], end_stream=True)
        await peer.send(peer.h2.data_to_send() + going_away(1))
        await peer.until_closed()
        assert peer.h2.highest_inbound_stream_id == 1

    async with h2_server(in_turn(goes, ordinary), max_connections=1) as (pool, _):
        async with background(pool) as made:
            await made.make(5, method="POST", content=b"")
        assert made.statuses == [200] * 5
        assert pool.statistics().connections_opened == 2


def goes_after(streams: int, *, at_once: bool) -> Serve:
    """A server that acts on so many streams of a connection, and then says GOAWAY.

    It says so before it answers the last of them, or only after.
    """

    async def serve(peer: H2Peer) -> None:
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
            await listen_to_the_end(peer)

    return serve


async def make_200_requests(pool: ConnectionPool, **arguments: Any) -> None:
    """Make 200 requests in 30 tasks, each of which must be answered without content."""
    left = 200

    async def work() -> None:
        nonlocal left
        while left:
            left -= 1
            assert await fetch(pool, **arguments) == b""

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(work)


WHEN = pytest.mark.parametrize("at_once", [True, False], ids=["before the answers", "after them"])


@WHEN
@pytest.mark.parametrize("streams", [1, 3, 10])
async def test_a_server_that_goes_away_again_and_again_fails_nothing(
    autojump_clock: MockClock, streams: int, at_once: bool
) -> None:
    async with h2_server(goes_after(streams, at_once=at_once)) as (pool, server):
        await make_200_requests(pool, method="POST", content=b"once")
        assert 200 / streams <= len(server.peers) <= 400 / streams


@WHEN
async def test_a_real_server_that_goes_away_again_and_again_fails_nothing(at_once: bool) -> None:
    async with h2_server(goes_after(5, at_once=at_once), "plain") as (pool, server):
        await make_200_requests(pool, url=server.url)


@pytest.mark.parametrize("max_connections", [1, 5])
async def test_a_request_refused_thrice_is_the_first_of_a_connection(
    autojump_clock: MockClock, max_connections: int
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

    events = Events()
    async with h2_server(serve, max_connections=max_connections) as (pool, _):
        async with background(pool) as made:
            await made.make(20, extensions={"trace": events})
        assert made.statuses == [200] * 20
        assert_unharmed(pool, idle=pool.statistics().idle)
    assert max(info["attempt"] for info in events.infos("connection.retry.started")) == 3


async def test_a_pause_counts_as_waiting_for_a_connection(autojump_clock: MockClock) -> None:
    async with h2_server(refusing("refused", [])) as (pool, _):
        start = trio.current_time()
        # What does not fit is not begun, and the error says what the matter is.
        with pytest.raises(RemoteProtocolError, match="REFUSED_STREAM"):
            await fetch(pool, extensions={"timeout": {"pool": 0.5}})
        assert 0 < trio.current_time() - start < 0.5
        with pytest.raises(RemoteProtocolError, match="REFUSED_STREAM"):
            await fetch(pool, extensions={"timeout": {"pool": 0}})


async def test_a_request_can_be_cancelled_in_its_pause(autojump_clock: MockClock) -> None:
    refused: list[bytes] = []
    async with h2_server(refusing("refused", refused)) as (pool, _):
        with trio.move_on_after(0.04) as scope:
            await fetch(pool)
        assert scope.cancelled_caught
        assert len(refused) == 1
        assert_unharmed(pool, idle=1)


async def test_stream_ids_running_out_open_a_new_connection(autojump_clock: MockClock) -> None:
    async with h2_server(in_turn(ordinary, ordinary)) as (pool, _):
        async with background(pool) as made:
            await made.make(1)
            connection = pool.connections[0]
            assert isinstance(connection, HTTP2Connection)
            connection._h2.highest_outbound_stream_id = 2**31 - 5
            await made.make(4)
        ids = [request.response.extensions["stream_id"] for request in made.ended if request.response]
        assert sorted(ids) == [1, 1, 3, 2**31 - 3, 2**31 - 1]
        await connection.wait_closed()
        assert connection not in pool.connections


@LINKS
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_our_own_close_sends_goaway(link: str, busy: bool) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        await answer(peer, b"x", end=not busy)
        await peer.until_closed()
        assert_told(peer, ErrorCodes.NO_ERROR)
        assert isinstance(peer.frames[-1], GoAwayFrame)

    async with h2_server(serve, link) as (pool, server), pool.stream("GET", server.url) as response:
        if busy:
            await pool.aclose()
            with pytest.raises(ExchangeError, match="closed"):
                await response.aread()
        else:
            await response.aread()


# -- A server that is not HTTP/2.


def sending(data: bytes, *, byte_by_byte: bool) -> Serve:
    """A server that sends bytes without waiting for a request, and is told that they are a fault."""

    async def serve(peer: H2Peer) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.send(data, byte_by_byte=byte_by_byte)
        await peer.until_closed()
        assert_told(peer, ErrorCodes.PROTOCOL_ERROR)

    return serve


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
    autojump_clock: MockClock, text: bytes, byte_by_byte: bool
) -> None:
    start = trio.current_time()
    async with h2_server(sending(text, byte_by_byte=byte_by_byte)) as (pool, _):
        with pytest.raises(RemoteProtocolError, match="does not speak HTTP/2") as caught:
            await fetch(pool)
        if text.startswith(b"HTTP/"):
            assert text[:9].decode() in str(caught.value)
        assert trio.current_time() == start


@DELIVERIES
@pytest.mark.parametrize("scheme", ["http", "ws"])
@pytest.mark.parametrize("trailing", [b"", b"\x15\x03\x03\x00\x02\x01\x00"], ids=["alert", "two alerts"])
async def test_a_server_that_speaks_tls_is_told_apart(
    autojump_clock: MockClock, scheme: str, trailing: bytes, byte_by_byte: bool
) -> None:
    """A TLS alert is shorter than the header of a frame."""

    alert = b"\x15\x03\x01\x00\x02\x02\x46"
    start = trio.current_time()
    async with h2_server(sending(alert + trailing, byte_by_byte=byte_by_byte)) as (pool, _):
        with pytest.raises(RemoteProtocolError) as caught:
            await pool.request("GET", f"{scheme}://example.com:8443/")
        assert str(caught.value).startswith(
            f"the server does not speak HTTP/2 on this port, but TLS (use {scheme}s://example.com:8443)"
        )
        assert trio.current_time() == start


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
    autojump_clock: MockClock, first: str, byte_by_byte: bool
) -> None:
    script = sending(FIRST_FRAMES[first] + SettingsFrame().serialize(), byte_by_byte=byte_by_byte)
    async with h2_server(in_turn(script, ordinary)) as (pool, _):
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

    async with h2_server(in_turn(serve, ordinary), link) as (pool, server):
        with pytest.raises(RemoteProtocolError, match="closed the connection, without a response"):
            await fetch(pool, url=server.url)
        assert await fetch(pool, url=server.url) == b"GET "


@contextlib.asynccontextmanager
async def server_without_alpn(
    script: Script, *, tls: bool = True, **options: Any
) -> AsyncIterator[tuple[ConnectionPool, str]]:
    """Enter a pool, and the URL of a server on a socket that plays a script and does not know ALPN."""
    async with trio.open_nursery() as nursery:
        server = await serve_tcp(nursery, script, tls=make_tls().server if tls else None)
        async with ConnectionPool(make_tls().client, http2=True, **options) as pool:
            yield pool, server.url
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("http1", [False, True])
async def test_a_tls_server_without_alpn(http1: bool) -> None:
    async def script(peer: ScriptedPeer) -> None:
        if http1:
            async for _ in peer:
                await peer.send_response(200, body=b"one")
        else:
            await ordinary(H2Peer(peer.stream))

    async with server_without_alpn(script, http1=http1) as (pool, url):
        response = await pool.request("GET", url)
    assert response.extensions["http_version"] == (b"HTTP/1.1" if http1 else b"HTTP/2")
    assert response.content == (b"one" if http1 else b"GET ")


HTTP11_ANSWER = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
TLS_ALERT = b"\x15\x03\x01\x00\x02\x02\x46\x00\x00"


@pytest.mark.parametrize(
    ("tls", "data", "message"),
    [
        (False, HTTP11_ANSWER, r"does not speak HTTP/2.*HTTP/1\.1 400"),
        (True, HTTP11_ANSWER, r"does not speak HTTP/2.*HTTP/1\.1 400"),
        (True, TLS_ALERT, r"does not speak HTTP/2: instead of SETTINGS"),
    ],
    ids=["HTTP/1.1", "HTTP/1.1 in TLS", "TLS in TLS"],
)
async def test_a_real_server_that_does_not_speak_http2(tls: bool, data: bytes, message: str) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.stream.receive_some()
        await peer.send(data)
        if data == TLS_ALERT:
            await trio.sleep_forever()

    async with server_without_alpn(script, tls=tls, http1=False) as (pool, url):
        with pytest.raises(RemoteProtocolError, match=message):
            await pool.request("GET", url)


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
async def test_a_fault_ends_the_connection_with_the_right_code(autojump_clock: MockClock, fault: str) -> None:
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
                await wait_all_tasks_blocked()
        with contextlib.suppress(trio.BrokenResourceError):
            await listen_to_the_end(peer)
        (goaway,) = peer.sent(GoAwayFrame)
        assert ErrorCodes(goaway.error_code) == code
        assert goaway.last_stream_id == 0
        assert peer.frames[-1] is goaway

    start = trio.current_time()
    async with h2_server(in_turn(hostile, ordinary)) as (pool, _):
        if is_after_the_response(fault):
            assert await fetch(pool) == b""
        else:
            with pytest.raises(RemoteProtocolError, match="the server"):
                await fetch(pool, extensions={"timeout": {"read": 5}})
        # What the server says may have ended the request before it goes too far.
        for connection in internals(pool):
            await connection.wait_closed()
        assert await fetch(pool, "POST", content=b"next") == b"POST next"
        assert trio.current_time() == start
        assert_unharmed(pool, idle=1)


async def test_data_above_an_unread_streams_window(autojump_clock: MockClock) -> None:
    async def hostile(peer: H2Peer) -> None:
        await first_request(peer)
        await peer.send(ANSWER + raw(DATA, 0, 1, bytes(16384)) * 16)
        await wait_all_tasks_blocked()
        assert not peer.sent(GoAwayFrame)
        await peer.send(raw(DATA, 0, 1, b"x"))
        await listen_to_the_end(peer)
        assert_told(peer, ErrorCodes.FLOW_CONTROL_ERROR)

    async with h2_server(in_turn(hostile, ordinary)) as (pool, _):
        async with pool.stream("GET", URL) as response:
            await internals(pool)[0].wait_closed()
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
    autojump_clock: MockClock, fault: str
) -> None:
    async def hostile(peer: H2Peer) -> None:
        await first_request(peer)
        await peer.request()
        await peer.send(STREAM_FAULTS[fault][0])
        reset = await peer.event(h2.events.StreamReset, 1)
        assert reset.error_code == STREAM_FAULTS[fault][1]
        await peer.send(raw(HEADERS, END_HEADERS | END_STREAM, 3, b"\x88"))
        await peer.until_closed()
        assert len(peer.sent(RstStreamFrame)) == 1

    async with h2_server(in_turn(hostile)) as (pool, _):
        async with background(pool) as made:
            await made.make(1)
            await made.make(1)
        assert made.outcomes == [RemoteProtocolError, 200]
        assert made.contents == [b""]


async def test_a_little_of_what_serves_no_request_is_borne(autojump_clock: MockClock) -> None:
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
        await first_request(peer)
        await peer.send(ANSWER + chatter * 100 + raw(DATA, END_STREAM, 1, b"fine"))
        await peer.until_closed()

    async with h2_server(serve) as (pool, _):
        assert await fetch(pool) == b"fine"
        connection = pool.connections[0]
        assert isinstance(connection, HTTP2Connection)
        assert 0x1234 not in connection._h2.remote_settings


async def test_patience_is_renewed_in_time(autojump_clock: MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        for _ in range(4):
            await peer.send(raw(PING, 1, 0, bytes(8)) * (FloodGuard.LIMIT - 100))
            await trio.sleep(FloodGuard.SECONDS + 1)
        await peer.request()
        await peer.respond(1)
        await peer.until_closed()

    async with h2_server(serve) as (pool, _):
        await fetch(pool)


async def test_a_busy_stream_of_small_frames_is_no_flood(autojump_clock: MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        await first_request(peer)
        await peer.send(ANSWER + (raw(DATA, 0, 1, b"x") + update(0, 1)) * 15_000 + raw(DATA, 1, 1))
        await peer.until_closed()

    async with h2_server(serve) as (pool, _):
        assert await fetch(pool) == b"x" * 15_000


async def test_a_server_that_reads_nothing_but_asks_for_answers(autojump_clock: MockClock) -> None:
    pings = 0

    async def hostile(peer: H2Peer) -> None:
        nonlocal pings
        frames = SettingsFrame().serialize()
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await peer.send(frames)
                frames = raw(PING, 0, 0, bytes(8)) * 1000
                pings += 1000
                await trio.sleep(2)

    pair = trio.testing.lockstep_stream_pair
    async with h2_server(in_turn(hostile, ordinary), stream_pair=pair) as (pool, _):
        with pytest.raises(RemoteProtocolError, match="does not read what it asks for"):
            await fetch(pool, extensions={"timeout": {"read": None, "write": None}})
        # Each answer has 17 bytes.
        assert pings * 17 < 320 * 1024
        (connection,) = internals(pool)
        assert await fetch(pool) == b"GET "
        # Its GOAWAY can't be sent, which does not hold up the closing for long.
        with trio.fail_after(2):
            await connection.wait_closed()
        assert_unharmed(pool, idle=1)


@SOCKETS
async def test_a_real_server_that_reads_nothing_and_floods(link: str) -> None:
    async def hostile(peer: H2Peer) -> None:
        await peer.start()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                await peer.stream.send_all(raw(PING, 0, 0, bytes(8)) * 500)

    async with h2_server(in_turn(hostile, ordinary), link) as (pool, server):
        with pytest.raises(RemoteProtocolError, match="served no request"):
            await fetch(pool, url=server.url)
        assert await fetch(pool, url=server.url) == b"GET "


async def send_together(stream: trio.abc.Stream, pieces: Iterable[bytes]) -> None:
    """Send pieces that arrive together; under TLS each is a record of its own, and so read by itself."""
    if isinstance(stream, trio.SSLStream):
        for piece in pieces:
            stream._ssl_object.write(piece)
        await stream.transport_stream.send_all(stream._outgoing.read())
    else:
        await stream.send_all(b"".join(pieces))


OTHER_FAULTS = [raw(RST, 0, 5, bytes(4)), raw(DATA, 0, 2, b"x")]


@pytest.mark.parametrize(
    ("pieces", "code", "message"),
    [
        ([raw(RST, 0, 5, bytes(4))], P, "stream 5, which was never opened"),
        # What arrives behind the fault does not change its code, and is not answered.
        (
            [
                update(0, 2**31 - 1),
                raw(RST, 0, 5, bytes(4)),
                raw(DATA, 0, 2, b"x"),
                DONE,
                raw(PING, 0, 0, bytes(8)),
            ],
            FLOW,
            "without a response",
        ),
    ],
    ids=["alone", "with more behind it"],
)
@SOCKETS
async def test_a_fault_over_a_real_socket_is_told_to_the_server(
    link: str, pieces: list[bytes], code: ErrorCodes, message: str
) -> None:
    async def hostile(peer: H2Peer) -> None:
        await first_request(peer)
        await send_together(peer.stream, pieces)
        await listen_to_the_end(peer)
        assert_told(peer, code)
        assert not peer.sent(PingFrame)

    async with h2_server(in_turn(hostile, ordinary), link) as (pool, server):
        with pytest.raises(RemoteProtocolError, match=message):
            await fetch(pool, url=server.url)
        await fetch(pool, url=server.url)


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
            await wait_all_tasks_blocked()
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
        with trio.fail_after(100):
            async with h2_server(serve) as (pool, _):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(talk)
                    nursery.start_soon(talk)
                orderly = True
                assert await fetch(pool, url="http://other.example.com/") == b"GET "
                assert pool.statistics().active == pool.statistics().waiting == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0), strict_exception_groups=True)


def test_a_read_timeout_is_what_ends_a_mute_server() -> None:
    """The fuzz test's own clock jumps, so that a hang would be seen there."""

    async def main() -> None:
        async with h2_server(listen_to_the_end) as (pool, _):
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
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(connection: h2.connection.H2Connection, data: bytes) -> list[h2.events.Event]:
        if connection.config.client_side:
            raise IndexError("what nobody thought of")
        return receive_data(connection, data)

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        await peer.until_closed()
        assert_told(peer, ErrorCodes.PROTOCOL_ERROR)

    receive_data = h2.connection.H2Connection.receive_data
    monkeypatch.setattr(h2.connection.H2Connection, "receive_data", stumble)
    async with h2_server(serve) as (pool, _):
        with pytest.raises(RemoteProtocolError, match="what nobody thought of") as raised:
            await pool.request("GET", URL)
        assert isinstance(raised.value.__cause__, IndexError)


@pytest.mark.parametrize(
    "news", [RstStreamFrame(1, ErrorCodes.INTERNAL_ERROR), GoAwayFrame(0, 0)], ids=["reset", "GOAWAY"]
)
async def test_what_follows_the_refusal_of_a_stream_is_no_news(
    autojump_clock: MockClock, news: Frame
) -> None:
    async def refuse(peer: H2Peer) -> None:
        stream_id = await first_request(peer)
        assert stream_id == 1
        # In one piece, so that the request hears of both at once.
        await peer.send_frame(GoAwayFrame(0, 0), news)
        await peer.until_closed()

    async with h2_server(in_turn(refuse, ordinary)) as (pool, server):
        assert await fetch(pool, "POST", content=b"once") == b"POST once"
        assert server.dialled == 2


@pytest.mark.parametrize("resumes", [True, False])
async def test_closing_waits_a_moment_for_what_is_being_sent(
    autojump_clock: MockClock, resumes: bool
) -> None:
    """A server that has stopped reading gets a whole frame and a GOAWAY, if it goes on soon."""
    stopped = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start()
        await peer.head()
        stopped.set()
        await trio.sleep(0.4 if resumes else FOREVER)
        await peer.until_closed()

    async def fetch_in_vain() -> None:
        with pytest.raises(ReadError):
            await pool.request("POST", URL, content=bytes(200_000))

    pair = trio.testing.lockstep_stream_pair
    async with h2_server(serve, stream_pair=pair) as (pool, server), trio.open_nursery() as nursery:
        nursery.start_soon(fetch_in_vain)
        await stopped.wait()
        await wait_all_tasks_blocked()
        began = trio.current_time()
        await pool.aclose()
        assert trio.current_time() - began == pytest.approx(0.4 if resumes else 0.5)
    if resumes:
        assert server.peer.ended
        assert server.peer.sent(DataFrame)
        assert isinstance(server.peer.frames[-1], GoAwayFrame)
        assert not server.peer.unparsed


async def test_last_words_are_heard_after_a_send_has_failed_below_tls(autojump_clock: MockClock) -> None:
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
        stream_id = await first_request(peer)
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
            await wait_all_tasks_blocked()
            streams[0].send_stream.send_all_hook = fail
            began = trio.current_time()
            with pytest.raises(WriteError, match="the cable was cut") as raised:
                await fetch(pool, "POST", url=url, content=b"lost")
            assert isinstance(raised.value.__cause__, trio.BrokenResourceError)
            assert trio.current_time() - began == pytest.approx(1)
            assert contents == [b"last words"]
            await wait_all_tasks_blocked()
            assert_unharmed(pool)
