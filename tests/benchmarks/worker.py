"""One process, one client, one case. It keeps its connections open, and measures when told to.

A case of the memory of idle connections is measured once, as the process starts.

A process for each keeps the clients out of each other's heap, and lets the rounds alternate between
event loops.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import stat
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, replace
from typing import Literal, Protocol, cast

import trio

from .cases import Work
from .loops import Sample, Send, Stopwatch, drain_on_asyncio, drain_on_trio

WARM_UPS = 10

Drain = Callable[[Send, int, int], Awaitable[Sample]]


class Client(Protocol):
    """Each operation is one request, whose answer is read to its end and checked."""

    async def get(self, lane: int) -> None: ...

    async def download(self, lane: int) -> None: ...

    async def upload(self, lane: int) -> None: ...

    async def upload_bytes(self, lane: int) -> None: ...


class Holder(Client, Protocol):
    async def hold(self, count: int) -> None:
        """Receive that many heads before the first body is read, which takes as many connections."""


class ClientModule(Protocol):
    LOOP: Literal["trio", "asyncio"]

    def open_client(self, work: Work) -> AbstractAsyncContextManager[Client]: ...


def main() -> None:
    work = Work.from_json(sys.argv[1])
    module = cast(ClientModule, importlib.import_module(f".clients.{work.module}", __package__))
    if module.LOOP == "asyncio":
        asyncio.run(serve(module, work, drain_on_asyncio))
    else:
        trio.run(serve, module, work, drain_on_trio)


async def serve(module: ClientModule, work: Work, drain: Drain) -> None:
    sockets = open_sockets()
    async with module.open_client(work) as client:
        if work.case.operation == "idle":
            emit(await measure_memory(client, work, drain, sockets))
            return
        send = cast(Send, getattr(client, work.case.operation))
        emit(await warm_up(send, work, drain, sockets))
        # The loop stands still while another client is being measured.
        for line in iter(sys.stdin.readline, ""):
            gc.collect()
            before = open_sockets()
            sample = await drain(send, work.lanes, int(line))
            if not work.case.connect_each and open_sockets() != before:
                raise RuntimeError(f"{work.client} has not kept its connections in {work.case.name}")
            emit(sample)


async def warm_up(send: Send, work: Work, drain: Drain, sockets: set[int]) -> Sample:
    """Open all connections. The last sample tells roughly what a request costs."""
    needed = 0 if work.case.connect_each else work.case.connections
    for _ in range(WARM_UPS):
        sample = await drain(send, work.lanes, work.lanes)
        opened = len(open_sockets() - sockets)
        if opened >= needed:
            # Connecting made the sample too dear; where that is dear itself, the sample has to do.
            return sample if sample.cpu > 1 else await drain(send, work.lanes, work.lanes)
    raise RuntimeError(f"{work.client} has only {opened} of {needed} connections open")


async def measure_memory(client: Client, work: Work, drain: Drain, sockets: set[int]) -> Sample:
    """The private memory that connections take which have been used and are idle."""
    connections = work.case.connections
    # What the first request imports and caches is not the connections'.
    await client.get(0)
    before = private_memory()
    watch = Stopwatch()
    if work.case.tasks == 1:
        await cast(Holder, client).hold(connections)
    else:
        await drain(client.get, work.lanes, connections)
    sample = watch.sample(connections)
    opened = len(open_sockets() - sockets)
    if opened < connections:
        raise RuntimeError(f"only {opened} of {connections} connections are open")
    return replace(sample, memory=private_memory() - before)


def private_memory() -> int:
    """The bytes of memory that this process alone uses, after a full garbage collection."""
    gc.collect()
    with open("/proc/self/smaps_rollup") as lines:
        sizes = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return sum(sizes) * 1024


def open_sockets() -> set[int]:
    """The inodes of the open sockets, which no later socket has."""
    inodes = (socket_inode(int(name)) for name in os.listdir("/dev/fd"))
    return {inode for inode in inodes if inode is not None}


def socket_inode(descriptor: int) -> int | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        # The one that listed the folder is closed by now.
        return None
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else None


def emit(sample: Sample) -> None:
    print(json.dumps(asdict(sample)), flush=True)


if __name__ == "__main__":
    main()
