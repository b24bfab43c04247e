"""Requests to be interrupted, and what other requests do meanwhile: for the cancellation sweeps."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from tests.harness.sweep import World

PIECE = b"x" * 20_000


# More than a stream's window at first.
DOWNLOAD = bytes(range(256)) * 1600


class Body:
    """A body in pieces, each of which takes a checkpoint to come."""

    def __init__(self, pieces: int = 3) -> None:
        self.pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.pieces:
            raise StopAsyncIteration
        self.pieces -= 1
        return PIECE


async def get(world: World) -> None:
    response = await world.pool.request("GET", f"{world.origin}/", extensions=world.extensions)
    assert response.content == b"0123456789"


async def upload(world: World) -> None:
    response = await world.pool.request(
        "POST", f"{world.origin}/", content=Body(), extensions=world.extensions
    )
    assert response.content == b"0123456789"


async def full_duplex(world: World) -> None:
    async with world.pool.stream(
        "POST", f"{world.origin}/echo", content=Body(), extensions=world.extensions
    ) as response:
        received = 0
        async for chunk in response.aiter_stream():
            received += len(chunk)
        assert received == 3 * len(PIECE)


@contextlib.asynccontextmanager
async def others_behind(world: World) -> AsyncIterator[None]:
    """The request leads, and others wait for what becomes of its connection."""
    served = [trio.Event(), trio.Event()]

    async def follow(done: trio.Event) -> None:
        await trio.lowlevel.checkpoint()
        with contextlib.suppress(*world.tolerated):
            response = await world.pool.request("GET", f"{world.origin}/follower")
            assert response.status == 200
        done.set()

    for done in served:
        world.outside.start_soon(follow, done)
    yield
    if not world.tolerated:
        for done in served:
            await done.wait()


@contextlib.asynccontextmanager
async def another_leads(world: World) -> AsyncIterator[None]:
    """The request waits for what becomes of the connection that another one dials."""
    served = trio.Event()

    async def lead() -> None:
        with contextlib.suppress(*world.tolerated):
            response = await world.pool.request("GET", f"{world.origin}/leader")
            assert response.status == 200
        served.set()

    world.outside.start_soon(lead)
    while not (world.pool.statistics().connecting or world.pool.connections):
        await trio.lowlevel.checkpoint()
    yield
    if not world.tolerated:
        await served.wait()


class Handler:
    """A trace handler, or informational callback, that waits; the call with a given number it fails."""

    def __init__(self, failing: int = 0) -> None:
        self.failing = failing
        self.error = Mine()
        self.calls: list[object] = []

    async def __call__(self, *args: object) -> None:
        self.calls.append(args[0])
        await trio.lowlevel.checkpoint()
        if len(self.calls) == self.failing:
            raise self.error


class Mine(Exception):
    pass
