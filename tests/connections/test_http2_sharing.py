"""HTTP/2 connections in the pool: who leads, who shares, who waits, and what limits allow."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame, HeadersFrame, PingFrame, RstStreamFrame
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.harness.certificates import alpn_server, make_tls
from tests.harness.checks import assert_unharmed, open_sockets
from tests.harness.h2link import (
    URL,
    BackgroundRequests,
    Paused,
    answer,
    background,
    fetch,
    h2_server,
    in_turn,
    listen_to_the_end,
    memory_server,
    set_stream_limit,
    until,
)
from tests.harness.h2peer import H2Peer
from tests.harness.peers import Script, respond, swallow
from tests.harness.servers import serve_tcp
from tests.harness.traces import Events
from trio_exchange import (
    ConnectError,
    ConnectionNotAvailable,
    ConnectionPool,
    ExchangeError,
    PoolTimeout,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
)
from trio_exchange._connect.transport import Readiness
from trio_exchange._http.http2.connection import HTTP2Connection
from trio_exchange.testing import MemoryConnector, ScriptedPeer

TLS_URL = "https://example.com/"


class Origin:
    """An HTTP/2 server that answers at once, or when it is told.

    Args:
        limit: Its limit of concurrent streams, None for none.
        hold: Whether it answers only by `answer`.
        settings: Whether it sends SETTINGS at once; else it says nothing until `begin`.
        then: A limit that it sends right after the first.

    Attributes:
        peers: Its connections.
        pending: What it has not answered yet.
        most: The most streams at once on one connection since this was set.
    """

    def __init__(
        self,
        limit: int | None = None,
        *,
        hold: bool = False,
        settings: bool = True,
        then: int | None = None,
    ) -> None:
        self.peers: list[H2Peer] = []
        self.pending: list[tuple[H2Peer, int]] = []
        self.most = 0
        self.hold = hold
        self._settings = settings
        self._silence = trio.CancelScope()
        self._limit = {} if limit is None else {SettingCodes.MAX_CONCURRENT_STREAMS: limit}
        self._then: dict[SettingCodes | int, int] = {}
        if then is not None:
            self._then[SettingCodes.MAX_CONCURRENT_STREAMS] = then

    async def __call__(self, peer: H2Peer) -> None:
        self.peers.append(peer)
        received = b"" if self._settings else await self._listen(peer)
        if peer.ended:
            return
        await peer.start(self._limit, then=self._then)
        peer.events += peer.h2.receive_data(received)
        await peer.flush()
        with contextlib.suppress(EOFError, trio.BrokenResourceError):
            while True:
                stream_id, _, _ = await peer.request()
                self.pending.append((peer, stream_id))
                self.most = max(self.most, peer.h2.open_inbound_streams)
                if not self.hold:
                    await self.answer()

    async def _listen(self, peer: H2Peer) -> bytes:
        received = b""
        with self._silence:
            while data := bytes(await peer.stream.receive_some(65536)):
                peer.note(data)
                received += data
            peer.ended = True
        return received

    async def begin(self) -> None:
        """Say what was not said at first."""
        self._silence.cancel()
        await wait_all_tasks_blocked()

    async def answer(self, count: int | None = None) -> None:
        """Answer the requests that came first, and let the client take note."""
        answered, self.pending[:count] = self.pending[:count], []
        for peer, stream_id in answered:
            if not (peer.sent(RstStreamFrame, stream_id) or peer.ended):
                await peer.respond(stream_id, 200, body=b"%d" % stream_id)
        if self.hold:
            await wait_all_tasks_blocked()

    async def answer_all(self) -> None:
        """Answer also the requests that come when others have been answered."""
        while self.pending:
            await self.answer()

    async def set_limit(self, limit: int) -> None:
        """Change the limit of the first connection, and wait until the client knows."""
        await set_stream_limit(self.peers[0], limit)
        assert self.peers[0].h2.local_settings.max_concurrent_streams == limit

    async def hang_up(self) -> None:
        """End the connection of the only pending request without an answer."""
        [(peer, _)] = self.pending
        self.pending.clear()
        assert isinstance(peer.stream, trio.StapledStream)
        await peer.stream.send_eof()
        await wait_all_tasks_blocked()


def selected_alpn(peer: ScriptedPeer) -> str | None:
    assert isinstance(peer.stream, trio.SSLStream)
    protocol: str | None = peer.stream.selected_alpn_protocol()
    return protocol


def by_alpn(origin: Origin, *protocols: str) -> Script:
    """A server that speaks what ALPN selects of `protocols`; `serve_tcp` has done the handshake already."""

    async def serve(peer: ScriptedPeer) -> None:
        if not isinstance(peer.stream, trio.SSLStream):
            await peer.start_tls(alpn_server(*protocols))
        if selected_alpn(peer) == "h2":
            await origin(H2Peer(peer.stream))
        else:
            await respond(peer)

    return serve


# -- A burst to a new origin.


async def burst(pool: ConnectionPool, url: str) -> list[bytes]:
    """Make 50 requests at the same time; returns what they were answered by."""
    with trio.fail_after(30):
        async with background(pool) as requests:
            await requests.make(50, url)
    assert requests.statuses == [200] * 50
    return [request.response.extensions["http_version"] for request in requests.ended if request.response]


async def test_a_burst_makes_one_connection_to_a_server_that_speaks_http2(autojump_clock: MockClock) -> None:
    origin = Origin()
    async with memory_server(by_alpn(origin, "h2", "http/1.1"), http2=True) as (pool, connector):
        for _ in range(2):
            assert await burst(pool, TLS_URL) == [b"HTTP/2"] * 50
            assert len(connector.dialled) == 1
        assert origin.most > 10
        assert pool.statistics().requests_served == 100


async def test_a_burst_makes_as_many_connections_as_allowed_to_a_server_that_does_not(
    autojump_clock: MockClock,
) -> None:
    options = {"http2": True, "max_connections": 7, "max_keepalive_connections": 0}
    async with (
        memory_server(by_alpn(Origin(), "http/1.1"), **options) as (pool, connector),
        background(pool) as requests,
    ):
        # What the server speaks is not known yet: one request leads.
        connector.gate = trio.Event()
        await requests.make(50, TLS_URL)
        assert len(connector.dialled) == 1
        connector.gate.set()
        await wait_all_tasks_blocked()
        assert requests.statuses == [200] * 50
        assert {selected_alpn(peer) for peer in connector.peers} == {"http/1.1"}
        assert len(connector.dialled) >= 7
        assert_unharmed(pool)
        # Now it is known, although there is no connection any more.
        before = len(connector.dialled)
        connector.gate = trio.Event()
        await requests.make(50, TLS_URL)
        assert len(connector.dialled) == before + 7
        connector.gate.set()
        await wait_all_tasks_blocked()
        assert requests.statuses == [200] * 100
        assert requests.errors == []


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
async def test_a_burst_over_sockets(protocol: str) -> None:
    before = open_sockets()
    origin = Origin()
    async with trio.open_nursery() as nursery:
        server = await serve_tcp(nursery, by_alpn(origin), tls=alpn_server(protocol))
        async with ConnectionPool(make_tls().client, http2=True, max_connections=5) as pool:
            for _ in range(2):
                assert len(set(await burst(pool, server.url))) == 1
            expected = 1 if protocol == "h2" else 5
            assert pool.statistics().connections_opened == expected
            assert len(origin.peers) == (protocol == "h2")
            assert_unharmed(pool, idle=expected)
        nursery.cancel_scope.cancel()
    assert open_sockets() == before


# -- The server's limit of concurrent streams.


async def test_beyond_the_limit_another_connection_is_made_if_the_pool_allows(
    autojump_clock: MockClock,
) -> None:
    origin = Origin(2, hold=True)
    async with h2_server(origin, max_connections=3) as (pool, server), background(pool) as requests:
        await requests.make(9)
        assert server.dialled == 3
        assert [peer.h2.open_inbound_streams for peer in origin.peers] == [2, 2, 2]
        assert pool.statistics().waiting == 3
        assert (pool.statistics().active, pool.statistics().open) == (3, 3)
        assert "HTTP/2, active, 2 streams" in repr(pool.connections[0])
        await origin.answer_all()
        assert requests.statuses == [200] * 9
        assert origin.most == 2
        assert_unharmed(pool, idle=3)


async def test_else_they_wait_under_the_pool_timeout(autojump_clock: MockClock) -> None:
    origin = Origin(2, hold=True)
    async with (
        h2_server(origin, max_connections=1) as (pool, server),
        background(pool) as patient,
        background(pool) as hasty,
    ):
        await patient.make(2)
        await hasty.make(2, extensions={"timeout": {"pool": 5}})
        await patient.make(2)
        await trio.sleep(4.5)
        assert hasty.errors == []
        await trio.sleep(1)
        assert set(hasty.error_types) == {PoolTimeout}
        await origin.answer()
        await origin.answer()
        assert patient.statuses == [200] * 4
        assert server.dialled == 1


async def test_a_limit_may_be_lowered_to_one_to_nothing_and_raised_while_streams_are_open(
    autojump_clock: MockClock,
) -> None:
    origin = Origin(4, hold=True)
    async with h2_server(origin, max_connections=1) as (pool, server), background(pool) as requests:
        await requests.make(12)
        assert len(origin.pending) == 4
        await origin.set_limit(1)
        origin.most = 0
        await origin.answer(3)
        assert len(origin.pending) == 1, "one stream is left, which is all that is allowed"
        await origin.answer(1)
        assert len(origin.pending) == 1
        assert origin.most == 1
        await origin.set_limit(0)
        await requests.make(1)
        assert len(origin.pending) == 1, "none is opened"
        await origin.set_limit(3)
        assert len(origin.pending) == 3
        await origin.set_limit(100)
        assert len(origin.pending) == 9
        await origin.answer()
        assert requests.statuses == [200] * 13
        assert not origin.peers[0].sent(RstStreamFrame)
        assert server.dialled == 1
        assert_unharmed(pool, idle=1)


async def test_a_connection_that_may_not_be_used_makes_room_for_another(autojump_clock: MockClock) -> None:
    origin = Origin(hold=True)
    async with h2_server(origin, max_connections=1) as (pool, server), background(pool) as requests:
        await requests.make(1)
        await origin.set_limit(0)
        await requests.make(2)
        await origin.answer()
        assert origin.peers[0].ended
        assert origin.peers[0].sent(GoAwayFrame)
        await origin.answer()
        assert requests.statuses == [200] * 3
        assert server.dialled == 2


async def test_without_room_for_another_they_wait_until_it_may_be_used(autojump_clock: MockClock) -> None:
    origin = Origin(hold=True)
    async with (
        h2_server(origin, max_connections_per_origin=1) as (pool, server),
        background(pool) as requests,
    ):
        await requests.make(1)
        await origin.set_limit(0)
        await requests.make(2)
        await origin.answer()
        assert origin.pending == []
        numbers = pool.statistics()
        assert (numbers.open, numbers.idle, numbers.active, numbers.waiting) == (1, 1, 0, 2)
        await origin.set_limit(1)
        await origin.answer()
        await origin.answer()
        assert requests.statuses == [200] * 3
        assert server.dialled == 1


async def test_a_limit_lowered_between_the_grant_and_the_request_drops_nothing(
    autojump_clock: MockClock,
) -> None:
    """The requests were granted to the connection, but find that it takes no more."""
    origin = Origin(10, hold=True)
    handler = Paused()
    async with h2_server(origin, max_connections=1) as (pool, server), background(pool) as requests:
        await requests.make(1, extensions={"trace": handler})
        await handler.reached.wait()
        await requests.make(2)
        assert len(origin.pending) == 2
        await origin.set_limit(2)
        await handler.resume()
        assert len(origin.pending) == 2
        await origin.answer()
        await origin.answer()
        assert requests.statuses == [200] * 3
        assert origin.most == 2
        assert server.dialled == 1


@pytest.mark.parametrize("connections", [1, 3, 20])
@pytest.mark.parametrize("then", [0, 1, 2])
async def test_what_was_not_sent_for_a_limit_lowered_at_once_waits_again(
    connections: int, then: int, autojump_clock: MockClock
) -> None:
    origin = Origin(100, hold=True, then=then)
    async with h2_server(origin, max_connections=connections) as (pool, _), background(pool) as requests:
        for _ in range(20):
            # Content that can be taken only once.
            requests.start(content=(piece for piece in [b"some ", b"content"]))
        await wait_all_tasks_blocked()
        await origin.answer_all()
        assert requests.errors == []
        assert requests.statuses == [200] * 20
        assert origin.most <= max(1, then)
        assert not any(peer.sent(RstStreamFrame) for peer in origin.peers)


async def test_a_burst_meets_a_limit_lowered_at_once(autojump_clock: MockClock) -> None:
    origin = Origin(100, hold=True, then=2)
    events = Events()
    async with h2_server(origin, max_connections=1) as (pool, server), background(pool) as requests:
        await requests.make(20, extensions={"trace": events})
        assert len(origin.pending) == 2
        assert pool.statistics().waiting == 18
        await origin.answer_all()
        assert requests.statuses == [200] * 20
        assert origin.most == 2
        assert server.dialled == 1
    retries = events.infos("connection.retry.started")
    assert len(retries) == 18
    for info in retries:
        assert info.keys() == {"attempt", "delay", "exception"}
        assert (info["attempt"], info["delay"]) == (1, 0.0)
        assert isinstance(info["exception"], RemoteProtocolError)


async def test_what_was_not_sent_waits_under_the_pool_timeout(autojump_clock: MockClock) -> None:
    origin = Origin(100, hold=True, then=1)
    async with h2_server(origin, max_connections=1) as (pool, _), background(pool) as requests:
        await requests.make(5, extensions={"timeout": {"pool": 3}})
        assert len(origin.pending) == 1
        await trio.sleep(2)
        await origin.answer()
        assert requests.statuses == [200]
        await trio.sleep(2)
        assert requests.error_types == [PoolTimeout] * 3
        await origin.answer()
        assert requests.statuses == [200] * 2
        assert_unharmed(pool, idle=1)


async def test_what_was_not_sent_goes_to_the_head_of_the_queue(autojump_clock: MockClock) -> None:
    origin = Origin(2, hold=True)
    handler = Paused()
    async with h2_server(origin, max_connections=1) as (pool, _), background(pool) as requests:
        # The leader's handler takes its time, and another one's request is the only one allowed.
        await requests.make(1, URL + "first", extensions={"trace": handler})
        await requests.make(1, URL + "second")
        await origin.set_limit(1)
        await requests.make(1, URL + "third")
        await handler.resume()
        for _ in range(3):
            assert len(origin.pending) == 1
            await origin.answer()
        assert requests.order == [URL + "second", URL + "first", URL + "third"]


@pytest.mark.parametrize("times", [1, 2, 5, 6])
async def test_a_limit_of_nothing_while_a_handler_takes_its_time(
    times: int, autojump_clock: MockClock
) -> None:
    async def handler(event: str, _: dict[str, Any]) -> None:
        if event == "http2.send_connection_init.started":
            await wait_all_tasks_blocked()
            if len(origin.peers) <= times:
                await set_stream_limit(origin.peers[-1], 0)

    origin = Origin(hold=True)
    async with h2_server(origin, max_connections=1) as (pool, server), background(pool) as requests:
        body = (piece for piece in [b"can be had ", b"once"])
        await requests.make(1, content=body, extensions={"trace": handler})
        await trio.sleep(1)
        await origin.answer()
        # A connection that takes no request at all is not replaced for ever.
        assert requests.statuses == ([200] if times <= 5 else [])
        assert len(requests.errors) == (0 if times <= 5 else 1)
        assert server.dialled == min(times + 1, 6)


async def test_what_was_not_sent_may_still_be_repeated_once(autojump_clock: MockClock) -> None:
    """The request finds no place, then no answer, and is answered at the third try."""
    origin = Origin(10, hold=True)
    handler = Paused()
    async with (
        h2_server(origin, max_connections=1) as (pool, server),
        background(pool) as requests,
        background(pool) as held_up,
    ):
        await held_up.make(1, extensions={"trace": handler})
        await requests.make(1)
        await origin.set_limit(1)
        await handler.resume()
        await origin.answer()
        assert [stream_id for _, stream_id in origin.pending] == [3]
        await origin.hang_up()
        await origin.answer()
        assert held_up.statuses == requests.statuses == [200]
        assert [info["attempt"] for info in handler.infos("connection.retry.started")] == [1, 2]
        assert server.dialled == 2


async def test_what_was_not_answered_twice_is_not_sent_a_third_time(autojump_clock: MockClock) -> None:
    """Also where the second connection has carried requests before."""
    origin = Origin(1, hold=True)
    async with h2_server(origin, max_connections=2) as (pool, server), background(pool) as requests:
        await requests.make(2)
        await origin.answer()
        await requests.make(1)
        for _ in range(2):
            await origin.hang_up()
        assert requests.error_types == [RemoteProtocolError]
        assert origin.pending == []
        assert server.dialled == 2
        assert_unharmed(pool)


async def test_a_server_that_never_sends_settings_is_asked_one_thing_at_a_time(
    autojump_clock: MockClock,
) -> None:
    origin = Origin(hold=True, settings=False)
    async with (
        h2_server(origin) as (pool, server),
        background(pool) as requests,
        background(pool) as hasty,
    ):
        await requests.make(3, extensions={"timeout": {"read": 5}})
        await hasty.make(1, extensions={"timeout": {"pool": 1}})
        assert pool.statistics().waiting == 3
        await trio.sleep(1.5)
        assert hasty.error_types == [PoolTimeout]
        await trio.sleep(15)
        assert requests.error_types == [ReadTimeout] * 3
        assert server.dialled == 1
        frames = server.peer.sent((HeadersFrame, RstStreamFrame))
        assert [(type(frame), frame.stream_id) for frame in frames] == [
            (kind, stream_id) for stream_id in (1, 3, 5) for kind in (HeadersFrame, RstStreamFrame)
        ]
        assert_unharmed(pool, idle=1)


# -- The leader.


@pytest.mark.parametrize(
    ("stage", "failures", "error"),
    [
        ("dialling", 2, ConnectError),
        ("handshake", 1, ConnectError),
        # The connection was new: that it is broken is no accident of reuse.
        ("before settings", 1, RemoteProtocolError),
    ],
)
async def test_if_the_leader_fails_another_leads(
    stage: str, failures: int, error: type[ExchangeError], autojump_clock: MockClock
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        if len(connector.peers) > 1 or stage == "dialling":
            await by_alpn(Origin(), "h2")(peer)
            return
        if stage == "before settings":
            await peer.start_tls(alpn_server("h2"))
        await peer.stream.receive_some(65536)

    async with memory_server(serve, http2=True) as (pool, connector), background(pool) as requests:
        if stage == "dialling":
            connector.failures = [OSError("refused")] * failures
        await requests.make(5, TLS_URL)
        assert requests.error_types == [error] * failures
        assert requests.statuses == [200] * (5 - failures)
        assert len(connector.dialled) == failures + 1
        assert_unharmed(pool, idle=1)


@pytest.mark.parametrize("stage", ["dialling", "handshake", "before settings", "waiting for the answer"])
async def test_if_the_leader_is_cancelled_another_leads(stage: str, autojump_clock: MockClock) -> None:
    origin = Origin(hold=True, settings=stage != "before settings")
    go = trio.Event()

    async def serve(peer: ScriptedPeer) -> None:
        if stage == "handshake":
            await go.wait()
        await by_alpn(origin, "h2")(peer)

    async with memory_server(serve, http2=True) as (pool, connector), background(pool) as requests:
        if stage == "dialling":
            connector.gate = trio.Event()
        # One after the other, so that the first one leads.
        await requests.make(1, TLS_URL)
        await requests.make(4, TLS_URL)
        assert len(connector.dialled) == 1
        assert pool.statistics().waiting == (0 if stage == "waiting for the answer" else 4)
        leader = requests.made[0]
        leader.scope.cancel()
        await wait_all_tasks_blocked()
        assert leader.scope.cancelled_caught
        connector.gate.set()
        go.set()
        await wait_all_tasks_blocked()
        if stage == "before settings":
            assert origin.peers[0].sent(RstStreamFrame, 1)
            assert len(origin.peers[0].sent(HeadersFrame)) == 2
            await origin.begin()
        await origin.answer()
        assert requests.statuses == [200] * 4
        # An established connection is not given up with its first request.
        assert len(connector.dialled) == (2 if stage in ("dialling", "handshake") else 1)
        assert_unharmed(pool, idle=1)


async def test_if_a_trace_handler_fails_the_leader_another_leads(autojump_clock: MockClock) -> None:
    class MineError(Exception):
        pass

    async def handler(event: str, _: dict[str, Any]) -> None:
        if event == "http2.send_connection_init.started":
            raise MineError

    async def lead() -> None:
        with pytest.raises(MineError):
            await pool.request("GET", URL, extensions={"trace": handler})

    async with (
        h2_server(Origin()) as (pool, server),
        background(pool) as requests,
        trio.open_nursery() as nursery,
    ):
        server.connector.gate = trio.Event()
        nursery.start_soon(lead)
        await wait_all_tasks_blocked()
        await requests.make(3)
        server.connector.gate.set()
        await wait_all_tasks_blocked()
        assert requests.statuses == [200] * 3
        assert server.dialled == 1
        assert_unharmed(pool, idle=1)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("how", ["GOAWAY", "closed"])
async def test_a_connection_given_up_while_its_first_request_is_held_up_is_replaced(
    how: str, method: str, autojump_clock: MockClock
) -> None:
    """Nothing was sent yet, so that any method goes to another connection."""

    async def goes(peer: H2Peer) -> None:
        await peer.start()
        await peer.receive()
        if how == "GOAWAY":
            peer.h2.close_connection()
            await peer.flush()
            await peer.until_closed()

    events = Events()

    async def handler(event: str, info: dict[str, Any]) -> None:
        await events(event, info)
        if event == "http2.send_connection_init.started" and events.names.count(event) == 1:
            await trio.sleep(1)

    async with h2_server(in_turn(goes, Origin())) as (pool, server):
        await fetch(pool, method, content=b"body", extensions={"trace": handler})
        assert len(server.peers) == 2
        assert not server.peers[0].sent(HeadersFrame)
        assert events.names.count("connection.retry.started") == 1


# -- Others.


@pytest.mark.parametrize("limit", [1, 3])
async def test_an_http2_origin_leaves_others_their_turn(limit: int, autojump_clock: MockClock) -> None:
    busy, other = "http://busy.example/", "http://other.example/"

    async def work() -> None:
        for _ in range(30):
            await requests.make_here(busy)

    async with h2_server(Origin(limit), max_connections=1) as (pool, server), background(pool) as requests:
        async with trio.open_nursery() as workers:
            for _ in range(2 * limit):
                workers.start_soon(work)
            while requests.order.count(busy) < 5:
                await trio.lowlevel.checkpoint()
            before = len(requests.order)
            await requests.make_here(other)
            served = requests.order[before:].count(busy)
        assert requests.errors == []
        assert requests.order.count(busy) == 60 * limit
        # As many as the connection can carry, and those that it carried already.
        assert served <= 2 * limit
        assert [dialled.address for dialled in server.connector.dialled] == [
            ("busy.example", 80),
            ("other.example", 80),
            ("busy.example", 80),
        ]


async def test_two_http2_origins_take_turns_with_one_connection(autojump_clock: MockClock) -> None:
    async with h2_server(Origin(), max_connections=1) as (pool, _), background(pool) as requests:
        for _ in range(5):
            await requests.make(3, "http://one.example/")
            await requests.make(3, "http://two.example/")
        assert requests.statuses == [200] * 30
        assert pool.statistics().connections_opened == 10
        assert_unharmed(pool, idle=1)


# -- While nobody uses it.


async def test_a_connection_expires_after_its_last_request(autojump_clock: MockClock) -> None:
    origin = Origin(hold=True)
    async with h2_server(origin, keepalive_expiry=5) as (pool, server), background(pool) as requests:
        await requests.make(2)
        await origin.answer(1)
        await trio.sleep(20)
        # One stream was open all the time.
        assert pool.statistics().active == 1
        await origin.answer()
        await trio.sleep(4)
        assert pool.statistics().idle == 1
        await trio.sleep(3)
        assert_unharmed(pool)
        assert origin.peers[0].ended
        assert origin.peers[0].sent(GoAwayFrame)[0].last_stream_id == 0
        await requests.make(1)
        await origin.answer()
        assert server.dialled == 2
        assert requests.statuses == [200] * 3


@pytest.mark.parametrize("keep", [0, 1])
async def test_no_more_connections_are_kept_idle_than_allowed(keep: int, autojump_clock: MockClock) -> None:
    origin = Origin(2, hold=True)
    async with h2_server(origin, max_keepalive_connections=keep) as (pool, _), background(pool) as requests:
        await requests.make(6)
        assert pool.statistics().active == 3
        await origin.answer()
        assert requests.statuses == [200] * 6
        assert_unharmed(pool, idle=keep)
        assert [peer.ended for peer in origin.peers].count(True) == 3 - keep
        await requests.make(2)
        await origin.answer()
        assert len(origin.peers) == 4 - keep


# -- What is spoken.


@pytest.mark.parametrize(
    "arguments",
    [
        {"http1": "yes"},
        {"http1": 1},
        {"http2": None},
        {"http2": 1, "http1": False},
        {"http1": 0, "http2": True},
    ],
)
def test_yes_or_no_is_a_bool(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"http[12] must be True or False, not"):
        ConnectionPool(**arguments)


@pytest.mark.parametrize("arguments", [{"http1": False}, {"http1": False, "http2": False}])
def test_something_has_to_be_spoken(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="http1 or http2 must be True"):
        ConnectionPool(**arguments)


@pytest.mark.parametrize(
    ("arguments", "protocols", "version"),
    [
        ({}, ("h2", "http/1.1"), b"HTTP/1.1"),
        ({"http2": True}, ("h2", "http/1.1"), b"HTTP/2"),
        ({"http2": True}, ("http/1.1",), b"HTTP/1.1"),
        ({"http2": True}, (), b"HTTP/1.1"),
        ({"http2": True, "http1": False}, ("h2", "http/1.1"), b"HTTP/2"),
    ],
)
async def test_alpn_decides_over_tls(
    arguments: dict[str, Any], protocols: tuple[str, ...], version: bytes, autojump_clock: MockClock
) -> None:
    async with memory_server(by_alpn(Origin(), *protocols), **arguments) as (pool, _):
        for url in (TLS_URL, "wss://example.com/"):
            response = await pool.request("GET", url)
            assert response.extensions["http_version"] == version


@pytest.mark.parametrize("scheme", ["http", "ws"])
async def test_without_tls_both_means_http11(scheme: str, autojump_clock: MockClock) -> None:
    async with memory_server(respond, http2=True) as (pool, connector), background(pool) as requests:
        # Nobody leads where nothing is to be found out.
        connector.gate = trio.Event()
        await requests.make(3, f"{scheme}://example.com/")
        assert len(connector.dialled) == 3
        connector.gate.set()
        await wait_all_tasks_blocked()
        assert requests.statuses == [200] * 3
        assert {connection.http_version for connection in pool.connections} == {"HTTP/1.1"}


@pytest.mark.parametrize(("scheme", "on_wire"), [("ws", b"http"), ("wss", b"https")])
async def test_the_schemes_of_websockets_are_those_of_http(
    scheme: str, on_wire: bytes, autojump_clock: MockClock
) -> None:
    seen: list[bytes] = []

    async def serve(scripted: ScriptedPeer) -> None:
        if scheme == "wss":
            await scripted.start_tls(alpn_server("h2"))
        peer = H2Peer(scripted.stream)
        await peer.start()
        stream_id, headers, _ = await peer.request()
        seen.append(headers[b":scheme"])
        await peer.respond(stream_id)
        await peer.until_closed()

    async with memory_server(serve, http1=False, http2=True) as (pool, _):
        await fetch(pool, url=f"{scheme}://example.com/")
    assert seen == [on_wire]


# -- Closing the pool.


@pytest.mark.parametrize("stage", ["dialling", "before settings", "streams open", "idle"])
@pytest.mark.parametrize("how", ["aclose", "block"])
async def test_the_pool_may_be_closed_at_any_time(stage: str, how: str, autojump_clock: MockClock) -> None:
    origin = Origin(2, hold=True, settings=stage != "before settings")
    async with trio.open_nursery() as nursery:
        async with h2_server(origin, max_connections=1) as (pool, server):
            requests = BackgroundRequests(pool, nursery)
            if stage == "dialling":
                server.connector.gate = trio.Event()
            await requests.make(2 if stage == "idle" else 4)
            if stage == "idle":
                await origin.answer()
            if how == "aclose":
                await pool.aclose()
                assert_unharmed(pool)
        await wait_all_tasks_blocked()
        assert_unharmed(pool)
    errors = requests.error_types
    # Of those that were sent, all but the connection's first would be sent again.
    sent = {"dialling": 0, "before settings": 1, "streams open": 1, "idle": 0}[stage]
    assert errors.count(ReadError) == sent
    assert errors.count(ConnectionNotAvailable) == len(errors) - sent
    assert len(errors) == (0 if stage == "idle" else 4)
    if stage != "dialling":
        assert server.peer.ended
        assert len(server.peer.sent(GoAwayFrame)) == 1
    with pytest.raises(ConnectionNotAvailable):
        await pool.request("GET", URL)


async def test_a_response_outlives_its_pool_as_an_error(autojump_clock: MockClock) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start()
        await answer(peer, b"first", end=False)
        await peer.until_closed()

    async with h2_server(serve) as (pool, _), pool.stream("GET", URL) as response:
        stream = response.aiter_stream().__aiter__()
        assert await stream.__anext__() == b"first"
        await pool.aclose()
        with pytest.raises(ReadError, match="in the middle of the response"):
            await stream.__anext__()
        assert_unharmed(pool)


# -- One request's trouble with a connection is not that of others.


async def test_who_is_cancelled_while_a_connection_is_looked_at_leaves_it_to_others() -> None:
    origin = Origin(hold=True)
    impatient = trio.CancelScope()

    async def answer_one() -> None:
        await until(lambda: len(origin.pending) == 1)
        await origin.answer()

    async def be_impatient(others: trio.Nursery) -> None:
        # Something has arrived, and the connection's reader does not know yet.
        stream = server.peer.stream
        assert isinstance(stream, trio.SocketStream)
        with socket.socket(fileno=os.dup(stream.socket.fileno())) as raw:
            raw.send(PingFrame(0, opaque_data=b"are you?").serialize())
        others.start_soon(fetch, pool, "POST", server.url)
        others.start_soon(cancel)
        with impatient:
            await pool.request("GET", server.url)

    async def cancel() -> None:
        impatient.cancel()

    async with h2_server(origin, "plain") as (pool, server):
        async with trio.open_nursery() as requests:
            requests.start_soon(fetch, pool, "GET", server.url)
            await answer_one()
        async with trio.open_nursery() as requests:
            requests.start_soon(be_impatient, requests)
            await answer_one()
        assert impatient.cancelled_caught
        assert pool.statistics().connections_opened == 1
        assert [frame.stream_id for frame in server.peer.sent(HeadersFrame)] == [1, 3]
        assert_unharmed(pool, idle=1)


async def test_housekeeping_closes_no_connection_that_is_used_meanwhile(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Origin(hold=True)
    looked, go = trio.Event(), trio.Event()

    async def not_for_new_requests(_: HTTP2Connection) -> bool:
        looked.set()
        await go.wait()
        return False

    async with h2_server(origin) as (pool, server), background(pool) as requests:
        await requests.make(1)
        await origin.answer()
        with monkeypatch.context() as patch:
            patch.setattr(HTTP2Connection, "still_open", not_for_new_requests)
            patch.setattr(HTTP2Connection, "readiness", lambda _: Readiness.READABLE)
            await looked.wait()
        await requests.make(1)
        go.set()
        await wait_all_tasks_blocked()
        await origin.answer()
        assert requests.statuses == [200] * 2
        assert requests.errors == []
        assert server.dialled == 1
        assert_unharmed(pool, idle=1)


async def test_a_crash_of_a_connections_task_is_reported_at_the_end(autojump_clock: MockClock) -> None:
    """A connector's stream that raises what no stream may raise."""

    class Crashing(MemoryConnector):
        async def connect_tcp(self, *args: Any, **kwargs: Any) -> trio.abc.Stream:
            stream = await super().connect_tcp(*args, **kwargs)
            assert isinstance(stream, trio.StapledStream)

            async def crash() -> None:
                raise RuntimeError("no stream raises this")

            stream.receive_stream.receive_some_hook = crash
            return stream

    async with trio.open_nursery() as nursery:
        connector = Crashing(nursery, swallow)
        with pytest.raises(RuntimeError, match="no stream raises this"):  # noqa: PT012 - of the whole block
            async with ConnectionPool(http1=False, http2=True, connector=connector) as pool:
                with pytest.raises(ReadError):
                    await pool.request("GET", URL)
                await wait_all_tasks_blocked()
                assert_unharmed(pool)


# -- Resets that the server has not read.


async def cancel_requests(
    pool: ConnectionPool, count: int, *, before: Callable[[], None] | None = None
) -> None:
    """Make requests at once, and cancel all of them when they have been sent and `before` was called."""
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(pool.request, "GET", URL)
        await wait_all_tasks_blocked()
        if before is not None:
            before()
        nursery.cancel_scope.cancel()


async def give_up_after_a_second(pool: ConnectionPool) -> None:
    with trio.move_on_after(1):
        await pool.request("GET", URL)


async def test_resets_count_as_streams_until_a_ping_shows_that_they_were_read(
    autojump_clock: MockClock,
) -> None:
    reads = trio.Event()

    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.MAX_CONCURRENT_STREAMS: 20})
        for _ in range(15):
            await peer.head()
        await reads.wait()
        with contextlib.suppress(EOFError):
            while True:
                stream_id, _ = await peer.head()
                await peer.respond(stream_id)

    async with h2_server(serve, max_connections=1) as (pool, server), background(pool) as requests:
        await cancel_requests(pool, 15)
        await requests.make(20)
        # 15 resets, of which the first 10 don't count.
        assert pool.statistics().waiting == 5
        reads.set()
        await wait_all_tasks_blocked()
        assert requests.statuses == [200] * 20
        assert len(server.peer.sent(PingFrame)) == 1
        assert server.dialled == 1


async def test_a_few_resets_are_not_asked_about(autojump_clock: MockClock) -> None:
    origin = Origin(hold=True)
    async with h2_server(origin) as (pool, server):
        await cancel_requests(pool, 10)
        await wait_all_tasks_blocked()
        assert len(server.peer.sent(RstStreamFrame)) == 10
        assert not server.peer.sent(PingFrame)


async def test_more_resets_than_an_answer_has_confirmed_are_asked_about_again(
    autojump_clock: MockClock,
) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.MAX_CONCURRENT_STREAMS: 100})
        # Not one PING is answered, until all resets have been sent.
        while len(peer.sent(RstStreamFrame)) < 45:
            await peer.listen()
        for number in (1, 2):
            while len(peer.sent(PingFrame)) < number:
                await peer.listen()
            await peer.send_frame(PingFrame(0, peer.sent(PingFrame)[-1].opaque_data, flags=["ACK"]))
        await listen_to_the_end(peer)

    async with h2_server(serve, max_connections=1) as (pool, server):
        await give_up_after_a_second(pool)
        await cancel_requests(pool, 22)
        await cancel_requests(pool, 22)
        await wait_all_tasks_blocked()
        assert len(server.peer.sent(PingFrame)) == 2
        # As many as the server allows: all were confirmed.
        await cancel_requests(pool, 100)
        await wait_all_tasks_blocked()
        assert len(server.peer.sent(HeadersFrame)) == 145


async def test_a_server_that_answers_no_ping_still_gets_one_request_at_a_time(
    autojump_clock: MockClock,
) -> None:
    async def serve(peer: H2Peer) -> None:
        await peer.start({SettingCodes.MAX_CONCURRENT_STREAMS: 3})
        await listen_to_the_end(peer)

    async with h2_server(serve, max_connections=1) as (pool, server):
        for count in range(1, 41):
            await give_up_after_a_second(pool)
            assert len(server.peer.sent(HeadersFrame)) == count
        assert server.dialled == 1


async def test_resets_before_the_first_settings_allow_no_more_at_once(autojump_clock: MockClock) -> None:
    """After a dozen of them the connection took requests as if the server had set no limit."""

    def check() -> None:
        assert len(server.peer.sent(HeadersFrame)) == 16

    async with h2_server(listen_to_the_end, max_connections=1) as (pool, server):
        for _ in range(15):
            await give_up_after_a_second(pool)
        await cancel_requests(pool, 3, before=check)
