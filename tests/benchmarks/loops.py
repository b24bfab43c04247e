"""The same measurement on either event loop: tasks draining one shared counter of requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio
import trio.testing

Send = Callable[[int], Awaitable[None]]


@dataclass(frozen=True)
class Sample:
    """What a number of requests took: seconds, and bytes where memory was measured."""

    requests: int
    cpu: float
    wall: float
    memory: int = 0

    @property
    def cpu_per_request(self) -> float:
        return self.cpu / self.requests

    @property
    def memory_per_request(self) -> float:
        return self.memory / self.requests


class Stopwatch:
    def __init__(self) -> None:
        self._cpu = time.process_time()
        self._wall = time.perf_counter()

    def sample(self, requests: int) -> Sample:
        return Sample(requests, time.process_time() - self._cpu, time.perf_counter() - self._wall)


# In both, the tasks wait at a gate before the watch starts: making them is no part of a request.


async def drain_on_trio(send: Send, lanes: int, requests: int) -> Sample:
    left = iter(range(requests))
    gate = trio.Event()

    async def work(lane: int) -> None:
        await gate.wait()
        for _ in left:
            await send(lane)

    async with trio.open_nursery() as nursery:
        for lane in range(lanes):
            nursery.start_soon(work, lane)
        await trio.testing.wait_all_tasks_blocked()
        watch = Stopwatch()
        gate.set()
    return watch.sample(requests)


async def drain_on_asyncio(send: Send, lanes: int, requests: int) -> Sample:
    left = iter(range(requests))
    gate = asyncio.Event()

    async def work(lane: int) -> None:
        await gate.wait()
        for _ in left:
            await send(lane)

    async with asyncio.TaskGroup() as group:
        for lane in range(lanes):
            group.create_task(work(lane))
        await asyncio.sleep(0)
        watch = Stopwatch()
        gate.set()
    return watch.sample(requests)
