"""The soak, for a few seconds, and that it finds what it looks for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import h11
import pytest
import trio
import trio.testing

from trio_exchange import Response
from trio_exchange._connect import tls_sessions
from trio_exchange._connect.factory import ConnectionKey

from .soak import client, measures
from .soak.plans import KINDS, Fault, Plan, content, make_plan
from .soak.run import soak
from .soak.servers import Origin, Server


def test_a_short_soak_has_no_problems() -> None:
    result = soak(2.5, seed=1)
    assert result.problems == []
    assert result.total > 100
    assert {pool for pool, _ in result.outcomes} >= set(KINDS)
    assert {outcome for _, outcome in result.outcomes} >= {"answered", "left", "cancelled"}


def test_one_request_can_be_sent_again_and_again() -> None:
    index = next(index for index in range(1000) if make_plan(1, index).must_succeed)
    result = soak(0.1, seed=1, only=index)
    assert result.problems == []
    assert {pool for pool, _ in result.outcomes} == {make_plan(1, index).pool}


def test_plans_are_made_from_the_seed() -> None:
    plans = [make_plan(7, index) for index in range(2000)]
    make_plan.cache_clear()
    assert plans == [make_plan(7, index) for index in range(2000)]
    assert plans[0] != make_plan(8, 0)
    assert {plan.fault for plan in plans} == set(Fault)
    assert {plan.pool for plan in plans} == set(KINDS)


async def test_a_cut_never_closes_a_connection_after_a_complete_response(
    autojump_clock: trio.testing.MockClock,
) -> None:
    plans = [make_plan(1, index) for index in range(3000)]
    plans = [plan for plan in plans if plan.fault is Fault.CUT and not (plan.rough or plan.http2)]
    ends = Counter([await _end_of_response(plan) for plan in plans])
    assert set(ends) == {"cut", "complete"}


async def _end_of_response(plan: Plan) -> str:
    """Send the request of a plan to an origin over HTTP/1.1, and return how the response ended."""
    reports: list[str] = []
    stream, peer = trio.testing.memory_stream_pair()
    server_side: Any = peer
    wire = h11.Connection(h11.CLIENT)
    body = b"" if plan.upload is None else content(f"{plan.index}-0", plan.upload.size)
    headers = [("Host", "calm"), ("X-Nonce", f"{plan.index}-0"), ("Content-Length", str(len(body)))]
    request = h11.Request(method=plan.method, target="/", headers=headers)
    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(Server(Origin(1), reports.append)._attend, server_side)
        for sent in (request, h11.Data(data=body), h11.EndOfMessage()):
            await stream.send_all(wire.send(sent) or b"")
        while not isinstance(event := wire.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                data = await stream.receive_some()
                if not data:
                    return "cut"
                wire.receive_data(bytes(data))
        with trio.move_on_after(10) as quiet:
            assert await stream.receive_some() != b"", f"closed after a complete response: {plan}"
        assert quiet.cancelled_caught
        nursery.cancel_scope.cancel()
    assert reports == []
    return "complete"


@pytest.mark.parametrize(
    ("headers", "complaint"),
    [
        ([(b"X-Nonce", b"0-2")], "0-1 was answered"),
        ([], "0-1 was answered"),
        ([(b"x-nonce", b"0-1"), (b"x-upload", b"3-00000000")], "0-1 sent 4 bytes"),
    ],
)
def test_an_answer_to_another_request_is_found(headers: list[tuple[bytes, bytes]], complaint: str) -> None:
    response = Response(200, headers=headers)
    plan = dataclasses.replace(make_plan(0, 0), status=200)
    with pytest.raises(client.Mismatch, match=complaint):
        client._check_head(response, plan, "0-1", b"body")


async def test_a_body_of_another_answer_is_found() -> None:
    plan = dataclasses.replace(make_plan(0, 0), method="GET", status=200, size=10, consume="read")
    with pytest.raises(client.Mismatch, match="0-1 got 10 bytes, not 10"):
        await client._consume(Response(200, content=content("0-2", 10)), plan, "0-1")


async def test_what_is_left_is_found() -> None:
    before = measures.take()
    assert list(measures.growth(before, before)) == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        sender, receiver = trio.socket.socketpair()
        after = dataclasses.replace(
            measures.take(),
            rss=before.rss * 2,
            objects=before.objects + Counter({"trio_exchange._models.Request": 100}),
        )
        sender.close()
        receiver.close()
        nursery.cancel_scope.cancel()
    found = list(measures.growth(before, after))
    assert len(found) == 4
    for more, expected in zip(found, ("descriptors", "sleep_forever", "Request", "memory"), strict=True):
        assert expected in more


async def test_cached_tls_sessions_are_no_growth_up_to_the_bound_of_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tls_sessions, "_MOST_SESSIONS", 10)
    cache = tls_sessions.TLSSessions()
    before = measures.take()
    kept: Any = None
    keys = [
        tls_sessions.SessionKey(ConnectionKey(b"https", b"host", port, "host"), kept, (), None)
        for port in range(20)
    ]
    cache._kept.update((key, tls_sessions._KeptSession(kept, 0.0)) for key in keys[:10])
    del keys[:10]
    found = list(measures.growth(before, measures.take(), rss=False))
    assert len(found) == 1
    for name in ("ConnectionKey", "SessionKey"):
        assert f"{name}': 10" in found[0]
    assert "_KeptSession" not in found[0]
    cache._kept.update((key, tls_sessions._KeptSession(kept, 0.0)) for key in keys)
    del keys
    (more,) = measures.growth(before, measures.take(), rss=False)
    for name in ("ConnectionKey", "SessionKey", "_KeptSession"):
        assert f"{name}': 10" in more
