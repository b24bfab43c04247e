"""Faults of HTTP/2 that were found, each with a test that showed it."""

from collections.abc import AsyncIterator, Callable

import pytest
import trio
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, GoAwayFrame
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_exchange import ReadError, Request, Response

from .h2peer import H2Peer, h2_pool


async def serve(peer: H2Peer) -> None:
    """Answer every request until the client closes."""
    await peer.start()
    while True:
        try:
            stream_id, _, _ = await peer.request()
        except EOFError:
            return
        await peer.respond(stream_id)


async def test_small_frames_in_flight_to_streams_that_were_left_are_no_flood(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A server that had not seen the resets, and kept to its windows, lost the connection."""
    left = trio.Event()
    peers: list[H2Peer] = []

    async def send_and_serve(peer: H2Peer) -> None:
        peers.append(peer)
        await peer.start()
        ids = [(await peer.head())[0] for _ in range(60)]
        for stream_id in ids:
            await peer.respond(stream_id, end=False)
        await left.wait()
        for stream_id in ids:
            await peer.send_frame(*[DataFrame(stream_id, b"small") for _ in range(200)])
        stream_id, _ = await peer.head()
        await peer.respond(stream_id)
        await peer.until_closed()

    pool, _ = h2_pool(nursery, send_and_serve)
    async with pool:
        responses: list[Response] = []

        async def request() -> None:
            responses.append(await pool.handle_async_request(Request("GET", "http://a.example")))

        async with trio.open_nursery() as requests:
            for _ in range(60):
                requests.start_soon(request)
        for response in responses:
            await response.aclose()
        left.set()
        assert (await pool.request("POST", "http://a.example")).status == 200
        assert len(peers) == 1
        assert not peers[0].sent(GoAwayFrame)
